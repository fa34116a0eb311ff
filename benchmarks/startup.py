"""What starting with plugins costs: `slime-train --plugins r3` beside plain `python train.py`, in one run.

    python benchmarks/startup.py --slime ~/slime --megatron ~/Megatron-LM            # about four minutes on two cores

Twice side by side, the two commands of a pair in turn: a train script that does nothing, which shows all that happens
before slime (plugins found, every patch checked against the installed files); and `train.py --help`, which shows also
what happens while slime is imported. Processor time of the whole process, which a busy machine disturbs less than the
clock, and the clock; medians.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

OURS = "miles_plugins.entrypoints.slime_train"
# For both: torchvision's CUDA build does not import where there is no GPU, and slime's train.py with it.
TORCHVISION = """
import os
if not os.path.exists("/dev/nvidiactl") and "--help" in __import__("sys").orig_argv:
    import torch
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
"""


def seconds(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Processor time and clock time of one process."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    clock, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, clock


def compare(
    plain: list[str], ours: list[str], environment: dict[str, str], rounds: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Both commands in turn, after one run of each that fills the caches."""
    seconds(plain, environment)
    seconds(ours, environment)
    pairs = [(seconds(plain, environment), seconds(ours, environment)) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slime", type=Path, default=Path("~/slime"))
    parser.add_argument("--megatron", type=Path, default=Path("~/Megatron-LM"))
    parser.add_argument("--plugins", default="r3")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    slime, megatron = (str(path.expanduser().absolute()) for path in (options.slime, options.megatron))

    table = Table("", "plain", f"--plugins {options.plugins}", "difference", box=None)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(TORCHVISION)
        paths = [folder, slime, megatron, os.environ.get("PYTHONPATH")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once
        nothing = Path(folder, "train.py")
        nothing.write_text("")
        for what, script, flags, rounds in (
            ("an empty script", nothing, [], 3 * options.rounds),
            ("train.py --help", Path(slime, "train.py"), ["--help"], options.rounds),
        ):
            ours = [sys.executable, "-m", OURS, "--plugins", options.plugins, "--train-script", str(script), *flags]
            measured = compare([sys.executable, str(script), *flags], ours, environment, rounds)
            for kind, name in enumerate(("processor", "clock")):
                plain, with_plugins = ([each[kind] for each in runs] for runs in measured)
                difference = statistics.median(b - a for a, b in zip(plain, with_plugins, strict=True))
                middle = [f"{statistics.median(values):.2f} s" for values in (plain, with_plugins)]
                table.add_row(f"{what}, {name} time", *middle, f"{difference:+.2f} s")
    Console().print(table)


if __name__ == "__main__":
    main()
