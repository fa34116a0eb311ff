"""The block-FP8 product: the one definition of what a quantised linear layer computes, for trainer and engine.

`y[m, n] = sum over blocks b of K of (x codes[m, b] . w codes[n, b]) * x scale[m, b] * w scale[n's tile, b]`, as in
DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 3.3), DeepGEMM and SGLang's Triton kernels. The reference is
exact up to its last steps: a product of two e4m3 codes has 8 significant bits and the sum of 128 of them fits into a
float64 without rounding, in any order; the blocks are then added one by one. So the result of a row depends on nothing
but the row and the weight: not on how many rows there are, not on the library that multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from miles_plugins.fp8_unified.quantised import quantise_rows

if TYPE_CHECKING:
    import torch

    from miles_plugins.fp8_unified.blockwise import Format, Quantised


def multiply(x: Quantised, weight: Quantised, format: Format) -> torch.Tensor:
    """[M, N] bfloat16 of x [M, K] (scales [M, blocks]) and a weight [N, K] (scales [tiles, blocks]): the reference."""
    import torch

    tile, block = format.block
    m, n = len(x.codes), len(weight.codes)
    rows = weight.scale_inv.repeat_interleave(tile, dim=0)[:n].double()  # [N, blocks]
    columns = x.scale_inv.double()
    result = torch.zeros(m, n, dtype=torch.float64, device=x.codes.device)
    of_x, of_weight = x.codes.float().double().split(block, 1), weight.codes.float().double().split(block, 1)
    for number, (left, right) in enumerate(zip(of_x, of_weight, strict=True)):
        result += (left @ right.t()) * (columns[:, number, None] * rows[None, :, number])
    return result.bfloat16()


def activations(format: Format, device: torch.device) -> Format:
    """How the input of a product with such weights is quantised, as SGLang does on the same kind of device.

    Below compute capability 10 its scales are float32 whatever the weights' are; from there on DeepGEMM wants powers of
    two with powers of two.
    """
    import torch

    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10:
        return format
    return replace(format, scale="float32")


def linear(x: torch.Tensor, weights: Sequence[Quantised], rows: Sequence[int], format: Format) -> torch.Tensor:
    """[M, N] of x [M, K] bfloat16, quantised here: `rows[i]` of its rows, in order, are multiplied with `weights[i]`.

    On a GPU by the Triton kernel, whose float32 sums depend on their order; elsewhere by the reference.
    """
    import torch

    quantised = quantise_rows(x, activations(format, x.device))
    if x.is_cuda:
        from miles_plugins.fp8_unified import kernels

        return kernels.grouped_linear(quantised, weights, rows, format)
    if len(weights) == 1:
        return multiply(quantised, weights[0], format)
    each = zip(quantised.codes.split(list(rows)), quantised.scale_inv.split(list(rows)), weights, strict=True)
    return torch.cat([multiply(type(quantised)(codes, scale), weight, format) for codes, scale, weight in each])
