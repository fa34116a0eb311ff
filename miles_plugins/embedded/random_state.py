"""Random numbers that upstream or a plugin draws: seeded at the start, kept in checkpoints."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast


def seed(value: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    import numpy
    import torch

    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value)


def capture() -> dict[str, Any]:
    """Their states, as what `torch.load(weights_only=True)` takes back."""
    import numpy
    import torch

    name, keys, *rest = cast("tuple[Any, ...]", numpy.random.get_state(legacy=True))
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(states: Mapping[str, Any]) -> None:
    """Go on drawing where `capture` was called."""
    import numpy
    import torch

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
