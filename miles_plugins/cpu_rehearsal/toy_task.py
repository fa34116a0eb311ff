"""A task that a random model earns something on, sometimes: answer with digits.

With an exact-answer reward every sample of a random model scores 0, every advantage is 0 and so is every gradient:
such a run tests nothing. The share of digits varies from sample to sample within a group.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

PROMPTS = "prompts.jsonl"
DIGITS = frozenset("0123456789")  # str.isdigit() also accepts superscripts


def write_prompts(file: str | Path, count: int, seed: int) -> None:
    """Write `count` JSON lines {"text": prompt, "label": answer}, the same for the same seed."""
    numbers = random.Random(seed)
    with open(file, "w", encoding="utf-8") as lines:
        for _ in range(count):
            label = "".join(numbers.choices("0123456789", k=4))
            lines.write(json.dumps({"text": f"Copy {' '.join(label)}: ", "label": label}) + "\n")


def flags(folder: str | Path) -> list[str]:
    """slime's flags for the prompts in `folder` and this module's reward."""
    return [
        *("--prompt-data", str(Path(folder) / PROMPTS)),
        *("--input-key", "text"),
        *("--label-key", "label"),
        *("--custom-rm-path", f"{__name__}.reward"),
    ]


async def reward(args: Any, sample: Any, **kwargs: Any) -> float:
    """The share of digits among the characters of `sample.response`, 0..1 (slime calls this once a sample)."""
    if not sample.response:
        return 0.0
    return sum(character in DIGITS for character in sample.response) / len(sample.response)
