"""The bench of a frozen draft against a trained one: its task, its test of distributions, and the command."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from miles_plugins.embedded import counting_task
from miles_plugins.embedded.draft_bench import ARMS, FROZEN, ONLINE, Bench, chi_square

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]

needs_models = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("transformers", "megatron", "matplotlib", "tensorboard")),
    reason='the embedded host needs `pip install -e ".[embedded]"`',
)


@pytest.mark.parametrize(
    ("text", "step", "worth"),
    [
        ("2301230", 1, 1.0),
        ("0321", -1, 1.0),
        ("0321", 1, 0.2),
        ("2323", 1, 0.2 + 0.3 * 2 / 3),  # to and fro
        ("2323", -1, 0.2 + 0.3 / 3),
        ("12ab", 1, 0.1 + 0.3 / 3),
        ("456", 1, 0.0),
        ("1²3", 1, 0.2 * 2 / 3),
        ("01", 1, 0.0),
        ("", 1, 0.0),
    ],
)
def test_what_counting_is_worth(text: str, step: int, worth: float) -> None:
    assert counting_task.score(text, step) == pytest.approx(worth)


def test_prompts_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        counting_task.write_prompts(tmp_path / name, 20, seed)
    first, again, other = (file.read_text() for file in sorted(tmp_path.iterdir()))
    assert first == again != other
    assert all(json.loads(line)["input"].startswith("Count on from ") for line in first.splitlines())


# -- chi-square ------------------------------------------------------------------------------------------------------


def test_chi_square_of_a_known_table() -> None:
    """Two by two: 30 and 70 against 50 and 50 of 100 each; statistic 25/3, p of one degree 0.0039."""
    bins, statistic, p_value = chi_square(Counter(a=30, b=70), Counter(a=50, b=50))
    assert bins == 2
    assert statistic == pytest.approx(25 / 3)
    assert p_value == pytest.approx(0.003892, abs=1e-6)


def test_p_values_of_equal_distributions_are_spread_and_of_others_are_not() -> None:
    numbers = random.Random(0)

    def draw(weights: list[int]) -> Counter[int]:
        return Counter(numbers.choices(range(len(weights)), weights, k=2000))

    same = [chi_square(draw([5, 3, 2, 1]), draw([5, 3, 2, 1]))[2] for _ in range(200)]
    assert 0.3 < sum(p < 0.5 for p in same) / len(same) < 0.7
    assert sum(p < 0.01 for p in same) <= 8
    assert all(chi_square(draw([5, 3, 2, 1]), draw([4, 4, 2, 1]))[2] < 1e-3 for _ in range(5))


def test_rare_values_are_one_bin() -> None:
    first, second = Counter({"a": 50, **{str(n): 1 for n in range(9)}}), Counter({"a": 50, "x": 9})
    assert chi_square(first, second) == (2, 0.0, 1.0)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_two_runs_differ_in_the_training_of_the_draft_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [1], 2, 2, 1e-3, 0.0, 100)
    frozen, online = ([word.replace(run, "RUN") for word in bench.flags(1, run)] for run in (FROZEN, ONLINE))
    assert online == ["--enable-mtp-training", *frozen]


@needs_models
def test_the_command_measures_both_and_draws_them(tmp_path: Path) -> None:
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("MILES_PLUGINS", "PYTHONPATH"))}
    command = [sys.executable, "-m", "miles_plugins.entrypoints.cli", "bench-draft", "--json", "--samples", "100"]
    command += ["--rollouts", "2", "--base-rollouts", "2", "--out", str(tmp_path / "bench")]
    options = {"env": {**inherited, "PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = json.loads(done.stdout)
    assert json.loads((tmp_path / "bench" / "results.json").read_text()).items() <= shown.items()
    runs = shown["seeds"]["1"]
    for arm in ARMS:
        assert len(runs[arm]["rollouts"]["reward"]) == 2
        assert all(1 <= length <= 4 for length in runs[arm]["rollouts"]["accept_length"])
    assert None not in runs[ONLINE]["rollouts"]["draft_loss"]
    assert runs[FROZEN]["rollouts"]["draft_loss"] == [None, None]
    # The first rollout is drawn from the base: the same weights and seeds.
    assert len({runs[arm]["rollouts"]["reward"][0] for arm in ARMS}) == 1
    assert len({runs[arm]["rollouts"]["accept_length"][0] for arm in ARMS}) == 1
    assert 0 < shown["distribution"]["p_value"] <= 1
    assert (tmp_path / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command, **options)
    assert again.returncode != 0
    assert "is not an empty folder" in again.stderr
