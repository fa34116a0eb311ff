"""The same training with routing replay and without, on the real stack on a CPU: real slime, Megatron-LM, SGLang.

    python benchmarks/r3_on_off.py --slime ~/slime --megatron ~/Megatron-LM          # about ten minutes on two cores

Both runs record the rollout's routing; one replays it (`--plugins r3`), one only measures (`--r3-measure-only`). Same
model, prompts and seeds, so the first rollouts are the same; after the first step each trains on by itself. What the
routers really used is watched from outside of the plugin, with forward hooks on Megatron's routers. The model is the
rehearsal's with larger weights, so that experts matter to the output as they do in a trained model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model

SHAPE = {"layers": 4, "experts": 16, "topk": 4}
INITIALIZER_RANGE = 0.1

METER = '''
"""Counts the tokens whose router used other experts than the rollout recorded, whatever the plugin says."""
import torch
from miles_plugins import current_microbatch, hookimpl

counts = {"tokens": 0, "different": 0}


def watch(router, inputs, output):
    microbatch = current_microbatch()
    record = microbatch and microbatch.values.get("r3_replay")
    if record is None or microbatch.recomputing:
        return
    used = output[1].bool()
    indices = record.indices[router.layer_number - 1].long()
    recorded = torch.zeros_like(used).scatter_(1, indices, True)
    counts["different"] += int(((used != recorded).any(dim=1) & record.recorded).sum())
    counts["tokens"] += int(record.recorded.sum())


@hookimpl
def model_built(model):
    for chunk in model:
        for module in chunk.modules():
            if type(module).__name__ == "TopKRouter":
                module.register_forward_hook(watch)


@hookimpl
def pass_begins(stage):
    counts.update(tokens=0, different=0)


@hookimpl
def step_metrics():
    return {"used_others": counts["different"] / max(counts["tokens"], 1)}
'''


def write_meter(folder: Path) -> None:
    """A plugin of its own, as a third party's: a distribution with an entry point."""
    (folder / "routing_meter.py").write_text(METER)
    info = folder / "routing_meter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: routing-meter\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[miles_plugins]\nrouting_meter = routing_meter\n")


def rehearse(options: argparse.Namespace, folder: Path, run: str, *flags: str) -> list[dict[str, float]]:
    """One run; the metrics of each of its steps."""
    model = write_tiny_model(folder / f"model-{run}", initializer_range=INITIALIZER_RANGE, **SHAPE)
    shape = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    command = [
        *(sys.executable, "-m", "miles_plugins.entrypoints.cli", "rehearse", "--json"),
        *("--plugins", "r3,routing_meter", "--rollouts", str(options.rollouts), *shape),
        *("--slime", options.slime, "--megatron", options.megatron, "--folder", str(folder / run)),
        *("--", "--hf-checkpoint", str(model.folder), "--load", str(model.folder), *flags),
    ]
    print("run", run, flush=True)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=False
    )
    rows = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["metrics"] for row in rows if "train/used_others" in row["metrics"]]
    if len(steps) != options.rollouts:
        sys.exit(f"the run {run} ended with exit code {done.returncode}: {folder / run / 'slime.log'}")
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slime", default=os.environ.get("SLIME_HOME", str(Path("~/slime").expanduser())))
    parser.add_argument("--megatron", default=os.environ.get("MEGATRON_HOME", str(Path("~/Megatron-LM").expanduser())))
    parser.add_argument("--rollouts", type=int, default=4)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="r3-on-off-"))
    write_meter(folder)
    with_replay = rehearse(options, folder, "with")
    without = rehearse(options, folder, "without", "--r3-measure-only")

    table = Table("rollout", box=None, pad_edge=False)
    for column in ("used other experts", "log-prob difference", "coverage"):
        for run in ("with r3", "without"):
            table.add_column(f"{column},\n{run}", justify="right")
    for number, pair in enumerate(zip(with_replay, without, strict=True), 1):
        used = [f"{step['train/used_others']:.2%}" for step in pair]
        difference = [f"{step['train/train_rollout_logprob_abs_diff']:.5f}" for step in pair]
        table.add_row(str(number), *used, *difference, *(f"{step['train/r3/coverage']:.0%}" for step in pair))
    Console(width=140).print(table)
    print("files:", folder)


if __name__ == "__main__":
    main()
