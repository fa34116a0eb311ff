"""What a draft changes of the policy, on each Megatron: `python -m benchmarks.draft_isolation [VERSION …]`.

Each cell says how many tensors differ, in one bit or more, from those of the same model without a draft, and how many
were compared: logits and gradients of a microbatch, or weights after optimizer steps with clipping. `stock` is Megatron
by itself, with labels of its own. The models and layouts are those of tests/test_megatron_draft.py, which asserts the
same; two processes with gloo for layouts of two ranks, the policy's tensors of both counted.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.test_megatron_draft import VERSIONS, report

COLUMNS = (
    "draft trained: logits",
    "draft trained: gradients",
    "draft idle: logits",
    "draft idle: gradients",
    "clipped steps",
    "tensor 2",
    "pipeline 2",
    "context 2",
    "stock: gradients",
)


def row(version: str, scratch: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for ranks in (1, 2):
        answer = report(version, scratch / version, ranks)
        for name, (differing, compared) in answer.pop("table").items():
            found[name] = f"{differing} of {compared}"
        for name, problem in answer.items():
            if problem:
                print(f"{version}: {name}: {problem}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=list(VERSIONS), help=f"of {', '.join(VERSIONS)}")
    versions = parser.parse_args().versions
    print(f"| megatron-core | {' | '.join(COLUMNS)} |")
    print(f"|---|{'---:|' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as scratch:
        for version in versions:
            found = row(version, Path(scratch))
            print(f"| {version} | {' | '.join(found.get(column, '—') for column in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
