"""The toy task: prompts that slime can read, a reward that a random model earns sometimes."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import random
import string
from pathlib import Path
from types import SimpleNamespace

import pytest

from miles_plugins.cpu_rehearsal import toy_task


def earned(response: str | None) -> float:
    return asyncio.run(toy_task.reward(SimpleNamespace(), SimpleNamespace(response=response)))


@pytest.mark.parametrize(
    ("response", "share"),
    [("", 0.0), (None, 0.0), ("abc", 0.0), ("123", 1.0), ("a1b2", 0.5), ("x²³٣", 0.0), ("<eos>5", 1 / 6)],
)
def test_reward_is_the_share_of_ascii_digits(response: str | None, share: float) -> None:
    assert earned(response) == pytest.approx(share)


def test_a_random_model_earns_something_and_not_always_the_same() -> None:
    numbers = random.Random(0)
    rewards = [earned("".join(numbers.choices(string.printable, k=16))) for _ in range(8)]
    assert len(set(rewards)) > 1  # equal rewards in a group are zero advantages and zero gradients
    assert 0 < sum(rewards) / len(rewards) < 1


def test_prompts_have_the_keys_that_the_flags_name(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    for name in ("--prompt-data", "--input-key", "--label-key", "--custom-rm-path"):
        parser.add_argument(name, required=True)
    flags = parser.parse_args(toy_task.flags(tmp_path))

    toy_task.write_prompts(flags.prompt_data, 5, seed=1)
    records = [json.loads(line) for line in Path(flags.prompt_data).read_text().splitlines()]
    assert len(records) == 5
    for record in records:
        assert record[flags.label_key].isdigit()
        assert " ".join(record[flags.label_key]) in record[flags.input_key]

    module, _, name = flags.custom_rm_path.rpartition(".")  # as slime's load_function does
    assert getattr(importlib.import_module(module), name) is toy_task.reward


def test_prompts_depend_on_the_seed_alone(tmp_path: Path) -> None:
    written = []
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        toy_task.write_prompts(tmp_path / name, 20, seed)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1] != written[2]
