"""Does the embedded host's default run learn, whatever the seed? Prints one row a seed.

python benchmarks/embedded_learning.py [--seeds 5] [flags for slime-train --embedded]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    own, flags = parser.parse_known_args()
    print("| seed | first reward | last reward | ratio | log-prob difference |\n|---|---|---|---|---|")
    for seed in range(own.seeds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", "--embedded", "--plugins", "r3"]
            command += ["--json", "--seed", str(seed), "--run-folder", str(Path(folder) / "run"), *flags]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
        run = json.loads(done.stdout)["summary"]
        print(
            f"| {seed} | {run['first_reward']:.3f} | {run['last_reward']:.3f} | {run['reward_ratio']:.1f} x "
            f"| {run['logprob_difference']:.5f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
