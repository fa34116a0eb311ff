"""The INT4 grid: the one definition of which values a quantised weight can have, for trainer, packer and converter.

Symmetric, one scale for each group of weights along the last dimension (K, the input features). The code of a weight is
`round_half_even(weight / scale)` in [-7, 7], and its value is code times bfloat16 scale, rounded once to bfloat16: what
SGLang's Marlin kernel computes from the packed checkpoint (`kU4B8`, one `__hmul2`). Two grids differ in the scale that
the codes are made with:

* `stock`: the float32 scale, and the bfloat16 one only for the values. The codes and scales are those that slime packs
  and that its `convert_hf_to_int4_direct.py` writes for a symmetric checkpoint.
* `snapped`: the bfloat16 scale for both, as in the checkpoints of Kimi-K2 Thinking. 0.3 % of the codes differ.

The scale is `amax * float32(1/7)`, on every device: on a GPU PyTorch divides by a Python number that way, on a CPU it
does not, and then 0.15 % of the codes differ.

Layout of the packed checkpoint: compressed-tensors' `pack-quantized`
(https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from miles_plugins.errors import PluginError

if TYPE_CHECKING:
    import torch

LARGEST = 7
"""The codes are symmetric: -8, which the four bits could hold, is never used."""
SEVENTH = 0.14285714924335480  # float32(1/7), exactly
OFFSET = 8
PER_WORD = 8
"""Codes in one int32."""
SMALLEST_SCALE = {"stock": 1e-5, "snapped": 2.0**-96}
"""A group of smaller weights is coarser than it need be: with `stock` below 7e-5, as in slime."""


@dataclass(frozen=True)
class Grid:
    """Which values the weights can have.

    Attributes:
        group_size: weights along K that share a scale; a multiple of 8.
    """

    group_size: int
    kind: Literal["stock", "snapped"] = "stock"

    def __post_init__(self) -> None:
        if self.group_size < PER_WORD or self.group_size % PER_WORD:
            raise PluginError(
                "this group size cannot be packed",
                {"group size": self.group_size, "expected": f"a multiple of {PER_WORD}: so many codes are one word"},
                "use 32, 64 or 128: the sizes that SGLang's Marlin kernel has",
            )

    def check(self, name: str, shape: tuple[int, ...], advice: str | None = None) -> None:
        """Raise PluginError, with this advice, unless a weight of this shape divides into whole groups along K."""
        if len(shape) < 2 or shape[-1] % self.group_size:
            raise PluginError(
                f"{name} cannot be quantised in groups of {self.group_size}",
                {
                    "shape": list(shape),
                    "expected": f"a matrix [..., N, K] with K a multiple of {self.group_size}",
                    "K": shape[-1] if shape else None,
                },
                advice
                or "convert the checkpoint with a group size that divides K on every rank, or leave this module out",
            )


class Quantised(NamedTuple):
    """Codes [..., N, K] int8 in [-7, 7] and scales [..., N, K / group size] bfloat16."""

    codes: torch.Tensor
    scale: torch.Tensor


def quantise(weight: torch.Tensor, grid: Grid) -> Quantised:
    """The codes and scales of weights [..., N, K], bfloat16 or float32.

    A group in which a weight is NaN or infinite has the scale NaN or infinity and the codes 0: its values are NaN.
    """
    import torch

    grid.check("a weight", tuple(weight.shape))
    groups = weight.detach().float().unflatten(-1, (-1, grid.group_size))
    # A tensor, and no Python number: that would be another product on another device.
    seventh = torch.tensor(SEVENTH, dtype=torch.float32, device=weight.device)
    scale = (groups.abs().amax(dim=-1) * seventh).clamp(min=SMALLEST_SCALE[grid.kind])
    rounded = scale.bfloat16()
    divisor = rounded.float() if grid.kind == "snapped" else scale
    codes = (groups / divisor.unsqueeze(-1)).round().clamp(-LARGEST, LARGEST).nan_to_num(nan=0.0)
    return Quantised(codes.to(torch.int8).flatten(-2), rounded)


def dequantise(quantised: Quantised) -> torch.Tensor:
    """The values [..., N, K] bfloat16, as the engine computes with them: the exact product, rounded once."""
    codes, scale = quantised
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    return (groups * scale.float().unsqueeze(-1)).bfloat16().flatten(-2)


def fake_quantise(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weights [..., N, K] as the engine will have them, bfloat16."""
    return dequantise(quantise(weight, grid))


def pack(codes: torch.Tensor) -> torch.Tensor:
    """[..., N, K / 8] int32: eight codes a word along K, each plus 8, the first in the lowest four bits."""
    import torch

    nibbles = (codes.int() + OFFSET).unflatten(-1, (-1, PER_WORD))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return (nibbles << shifts).sum(dim=-1, dtype=torch.int32)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes [..., N, K] int8 of `pack`'s words."""
    import torch

    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts & 15) - OFFSET).to(torch.int8).flatten(-2)
