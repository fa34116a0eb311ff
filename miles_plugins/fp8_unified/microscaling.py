"""MXFP8 and NVFP4, Blackwell's formats: what their codes and scales are, on any device.

References only. There is no kernel here, no engine was run with either, and nothing was run on a Blackwell GPU: the
rules are those that TransformerEngine's quantisers state, without Hadamard transform, 2-D blocks, stochastic rounding,
fast math and 4-over-6, the settings under which trainer and engine can agree. Both are compared with an exact
derivation in tests/test_fp8_microscaling.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from miles_plugins.errors import PluginError

if TYPE_CHECKING:
    import torch

MXFP8_BLOCK, NVFP4_BLOCK = 32, 16
LARGEST_E4M3, LARGEST_E2M1 = 448.0, 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of the codes 0 ... 7; plus 8 they are negative."""
NOT_A_NUMBER = 0xFF
"""The E8M0 scale of a block in which a number is NaN or infinite: all its values are NaN."""
SUBNORMAL = 0x400000  # 2**-127 as float32 bits: the E8M0 scale 0


class MXFP8(NamedTuple):
    """Codes [..., M, K] float8_e4m3fn and scales [..., M, K / 32] uint8: E8M0, 2**(scale - 127); not swizzled."""

    codes: torch.Tensor
    scale: torch.Tensor


class NVFP4(NamedTuple):
    """Two codes a byte, the first in the low four bits, and scales of two levels.

    `packed` [..., M, K / 2] uint8, `scale` [..., M, K / 16] float8_e4m3fn (not swizzled), `scale_2` [] float32.
    A checkpoint calls them `weight`, `weight_scale` and `weight_scale_2`.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    scale_2: torch.Tensor


def quantise_mxfp8(x: torch.Tensor) -> MXFP8:
    """MXFP8 of [..., M, K] bfloat16 or float32, K a multiple of 32.

    The scale is amax * float32(1 / 448), rounded up to a power of two (`float_to_e8m0`); the codes are the products
    with its reciprocal. A scale of 0 counts as the reciprocal 1 (`exp2f_rcp`): what is smaller than 2**-118 becomes 0.
    """
    import torch

    blocks = _blocks(x, MXFP8_BLOCK, "MXFP8")
    amax = blocks.abs().amax(dim=-1)
    wanted = amax * torch.tensor(1 / LARGEST_E4M3, dtype=torch.float32, device=x.device)
    bits = wanted.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & ~((exponent == 0) & (mantissa <= SUBNORMAL))
    scale = torch.where(amax.isfinite(), exponent + up.int(), NOT_A_NUMBER)
    reciprocal = torch.where(scale == 0, 127 << 23, (254 - scale).clamp(min=0) << 23).to(torch.int32)
    codes = _e4m3(blocks * reciprocal.view(torch.float32).unsqueeze(-1))
    return MXFP8(codes.flatten(-2), scale.to(torch.uint8))


def dequantise_mxfp8(quantised: MXFP8) -> torch.Tensor:
    """The values [..., M, K] float32."""
    import torch

    exponent = quantised.scale.to(torch.int32)
    bits = torch.where(exponent == 0, SUBNORMAL, exponent << 23).to(torch.int32)
    scale = torch.where(exponent == NOT_A_NUMBER, torch.nan, bits.view(torch.float32))
    return (quantised.codes.float().unflatten(-1, (-1, MXFP8_BLOCK)) * scale.unsqueeze(-1)).flatten(-2)


def quantise_nvfp4(weights: Sequence[torch.Tensor]) -> list[NVFP4]:
    """NVFP4 of weights [..., M, K] that share the scale of the second level, K a multiple of 16.

    An engine multiplies gate and up in one product with one such scale, so they are quantised together; any other
    weight alone. With amax of all of them:

        encode = min(448 * 6 / amax, largest float32), 1 for an amax of 0         scale_2 = 1 / encode
        scale  = e4m3(block's amax * (encode * float32(1 / 6)))
        code   = e2m1(x * min(1 / (scale * scale_2), largest float32))            half to even, saturating

    A NaN or an infinity anywhere makes scale_2 NaN, and with it every value: E2M1 has no code for it.
    """
    import torch

    parts = [_blocks(weight, NVFP4_BLOCK, "NVFP4") for weight in weights]
    amax = torch.stack([part.abs().amax() if part.numel() else part.new_zeros(()) for part in parts]).amax()
    most = torch.finfo(torch.float32).max
    encode = (torch.full_like(amax, LARGEST_E4M3 * LARGEST_E2M1) / amax).clamp(max=most)
    encode = torch.where(amax == 0, 1.0, torch.where(amax.isfinite(), encode, torch.nan))
    scale_2 = torch.ones_like(encode) / encode
    sixth = torch.tensor(1 / LARGEST_E2M1, dtype=torch.float32, device=amax.device)
    found = []
    for part in parts:
        scale = _e4m3((part.abs().amax(dim=-1) * (encode * sixth)).clamp(max=most))
        step = scale.float() * scale_2
        factor = (torch.ones_like(step) / step).clamp(max=most)
        found.append(NVFP4(_pack(_e2m1(part * factor.unsqueeze(-1)).flatten(-2)), scale, scale_2))
    return found


def dequantise_nvfp4(quantised: NVFP4) -> torch.Tensor:
    """The values [..., M, K] float32: (code * scale) * scale_2."""
    import torch

    values = torch.tensor((*E2M1, *(-value for value in E2M1)), device=quantised.packed.device)
    codes = torch.stack([quantised.packed & 15, quantised.packed >> 4], dim=-1).flatten(-2)
    blocks = values[codes.long()].unflatten(-1, (-1, NVFP4_BLOCK))
    return (blocks * quantised.scale.float().unsqueeze(-1) * quantised.scale_2).flatten(-2)


def _blocks(x: torch.Tensor, size: int, kind: str) -> torch.Tensor:
    if x.dim() < 2 or x.shape[-1] % size:
        raise PluginError(
            f"this tensor cannot be quantised to {kind}",
            {"shape": list(x.shape), "expected": f"[..., M, K] with K a multiple of {size}"},
            "leave this module in bfloat16",
        )
    return x.detach().float().unflatten(-1, (-1, size))


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    import torch

    numbers = torch.where(x.isfinite(), x, torch.nan)
    return numbers.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)


def _e2m1(x: torch.Tensor) -> torch.Tensor:
    """The codes uint8: the nearest, a tie to the even one; the sign stays."""
    import torch

    size = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for place, (low, high) in enumerate(itertools.pairwise(E2M1)):
        middle = (low + high) / 2
        code += size > middle if place % 2 == 0 else size >= middle
    return code + 8 * x.signbit().to(torch.uint8)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    return codes[..., ::2] | codes[..., 1::2] << 4
