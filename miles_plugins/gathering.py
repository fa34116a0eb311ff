"""What a plugin may make of the trainer's parameters before their ranks are gathered for a weight update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Encoding(Protocol):
    """How parameters travel: as uint8 with the same number of rows, so that they can be cut and joined as they can.

    The hook returns the same object for parameters that are encoded alike: these are encoded together.
    """

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[N, bytes] of a parameter [N, K]."""
        ...

    def encode(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The bytes of each, on its device; of this rank's parts, detached."""
        ...
