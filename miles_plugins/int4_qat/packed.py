"""Many weights of one shape, quantised: by the kernels on a GPU, by the reference elsewhere; the bits are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from miles_plugins.int4_qat import grid as reference

if TYPE_CHECKING:
    import torch

    from miles_plugins.int4_qat.grid import Grid


class Packed(NamedTuple):
    """`packed` [weights, N, K / 8] int32 and `scale` [weights, N, K / group size] bfloat16: as the engine gets them."""

    packed: torch.Tensor
    scale: torch.Tensor

    def quantised(self) -> reference.Quantised:
        """The codes one by one."""
        return reference.Quantised(reference.unpack(self.packed), self.scale)


def pack(weights: Sequence[torch.Tensor], grid: Grid) -> Packed:
    """Quantise weights [N, K] bfloat16 of one shape on one device."""
    if weights[0].is_cuda:
        from miles_plugins.int4_qat import kernels

        return kernels.pack(weights, grid)
    import torch

    codes, scale = reference.quantise(torch.stack(list(weights)), grid)
    return Packed(reference.pack(codes), scale)


def dequantise(packed: Packed) -> torch.Tensor:
    """The values [weights, N, K] bfloat16, as the engine computes with them."""
    if packed.packed.is_cuda:
        from miles_plugins.int4_qat import kernels

        return kernels.dequantise(packed)
    return reference.dequantise(packed.quantised())
