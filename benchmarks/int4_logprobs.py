"""How far trainer and rollout are apart under INT4: `python -m benchmarks.int4_logprobs`, in the embedded host.

Four runs from the same model, prompts and seeds: both sides in bfloat16; the rollout alone in INT4; the trainer with
the formulas of slime's hook; the trainer on the rollout's own weights (`--plugins int4`). They learn, for a
checkpoint's own weights lie on the grid already; the first rollouts are left out of the means. The first run is the
floor: two implementations that compute with equal weights.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from miles_plugins.console import read_metrics, steps_of, table

MODEL = ("--hidden-size", "128", "--num-experts", "16", "--moe-router-topk", "4", "--num-layers", "4")
METRICS, SKIPPED = "metrics.jsonl", 3
NAME = "train/train_rollout_logprob_abs_diff"
WITHOUT = "int4.Int4Weights.__call__ = lambda self, weights: weights"
SLIMES = """
import torch
def slimes(self, weights):
    seventh, size, values = torch.tensor(0.14285714924335480), self._grid.group_size, []
    for weight in weights:
        groups = weight.float().unflatten(-1, (-1, size))
        scale = (groups.abs().amax(-1, keepdim=True) * seventh).clamp(min=1e-5)
        values.append(((groups / scale).round().clamp(-7, 7) * scale).bfloat16().flatten(-2))
    return values
int4.Int4Weights.__call__ = slimes
"""
ARMS = {
    "bfloat16 on both sides (the floor)": ("", ""),
    "INT4 rollout, bfloat16 trainer": (WITHOUT, "int4"),
    "INT4 rollout, slime's formulas in the trainer": (SLIMES, "int4"),
    "INT4 rollout, --plugins int4": ("", "int4"),
}


def run(folder: Path, change: str, plugins: str, rollouts: int, seed: int) -> dict[str, float]:
    """The mean over rollouts of each difference."""
    program = f"""
import sys
from miles_plugins.int4_qat import plugin as int4
{change}
from miles_plugins.entrypoints.slime_train import main
main()
"""
    flags = [
        "--embedded",
        "--run-folder",
        str(folder),
        "--num-rollout",
        str(rollouts),
        "--seed",
        str(seed),
    ]
    command = [sys.executable, "-c", program, *flags, *MODEL, *(["--plugins", plugins] if plugins else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    steps = [
        step for number, step in steps_of(read_metrics(folder / METRICS), "train/step").items() if number >= SKIPPED
    ]
    return {end: statistics.mean(step[NAME + end] for step in steps) for end in ("", "_p99", "_max")}


def main(rollouts: int = 15, seeds: int = 3) -> None:
    """Print the table, and the same as JSON."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for number, (name, (change, plugins)) in enumerate(ARMS.items()):
                found[name].append(run(Path(folder) / f"{number}-{seed}", change, plugins, rollouts, seed))
    means = {
        name: {end: statistics.mean(each[end] for each in runs) for end in ("", "_p99", "_max")}
        for name, runs in found.items()
    }
    rows = [[name, *(f"{values[end]:.5f}" for end in ("", "_p99", "_max"))] for name, values in means.items()]
    title = f"|log-prob of trainer - rollout|, {seeds} models of {rollouts} rollouts"
    Console(width=110).print(table(title, ["weights", "mean", "99th percentile", "maximum"], rows, numbers=False))
    print(json.dumps(means))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
