"""A task with few good answers: count from 0 to 3, round and round. Two rewards: upwards, and then downwards.

Answers to it become predictable, which is what a draft needs; and a policy that counts up turns to counting down within
some ten rollouts, while it still tries other things now and then.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

SYMBOLS = "0123"
# What is worth what, together 1. A random model finds a symbol first, then a step. Two steps in a row are worth most:
# going to and fro has every second step right, in both directions.
SYMBOL, STEP, TWO_STEPS = 0.2, 0.3, 0.5


def write_prompts(file: Path, count: int, seed: int) -> None:
    """Write `count` JSON lines {"input": prompt}, the same for the same seed."""
    numbers = random.Random(seed)
    lines = [json.dumps({"input": f"Count on from {numbers.randrange(10)}: "}) for _ in range(count)]
    file.write_text("\n".join(lines) + "\n")


def score(text: str, step: int) -> float:
    """How well a text counts in steps of so many, round the four symbols, from 0 to 1; fewer than 3 characters do not.

    The shares of its characters that are symbols, of its steps that are right, and of its pairs of steps that are.
    """
    if len(text) < 3:
        return 0.0
    places = [SYMBOLS.find(character) for character in text]
    right = [a >= 0 and b >= 0 and (b - a - step) % len(SYMBOLS) == 0 for a, b in pairwise(places)]
    twice = [a and b for a, b in pairwise(right)]
    return SYMBOL * _share([place >= 0 for place in places]) + STEP * _share(right) + TWO_STEPS * _share(twice)


def _share(are: list[bool]) -> float:
    return sum(are) / len(are)


async def up(args: Any, sample: Any, **kwargs: Any) -> float:
    """The first reward: 0, 1, 2, 3, 0, …"""
    return score(sample.response, 1)


async def down(args: Any, sample: Any, **kwargs: Any) -> float:
    """The reward that follows: 3, 2, 1, 0, 3, …"""
    return score(sample.response, -1)
