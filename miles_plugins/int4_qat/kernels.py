"""The INT4 grid on a GPU: the functions of `grid`, bit for bit, for many weights in one launch.

Each weight is read once and its result written once; nothing of its size is allocated besides. The arithmetic is the
reference's: a product with float32(1/7), the correctly rounded quotient, half-to-even by adding 1.5 * 2**23 (a zero
comes out positive), one rounding to bfloat16 each.

Triton's interpreter rounds no bfloat16, misreads subnormal ones, and has no fused multiply-add. What depends on that is
written twice, for a GPU and for the interpreter (`native`); `python -m tests.int4_kernels cuda` judges the first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from miles_plugins.int4_qat import grid as reference
from miles_plugins.int4_qat.grid import Grid
from miles_plugins.int4_qat.packed import Packed

SEVENTH = tl.constexpr(reference.SEVENTH)
ROUNDER = tl.constexpr(12582912.0)  # added and taken off again: float32 then holds whole numbers only
TILE, WARPS = 2048, 4
"""Weights a program takes, and its warps: 16 weights a thread, in two loads of 16 bytes."""


@triton.jit
def _load(pointer, places, mask, native: tl.constexpr):
    """bfloat16 as float32."""
    if native:
        return tl.load(pointer + places, mask=mask, other=0.0).to(tl.float32)
    bits = tl.load(pointer.to(tl.pointer_type(tl.uint16), bitcast=True) + places, mask=mask, other=0)
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _round(x, native: tl.constexpr):
    """float32 to the nearest that a bfloat16 holds, half to even."""
    if native:
        return x.to(tl.bfloat16).to(tl.float32)
    bits = x.to(tl.uint32, bitcast=True)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x)


@triton.jit
def _store(pointer, places, x, mask, native: tl.constexpr):
    """float32 as bfloat16, rounded."""
    if native:
        tl.store(pointer + places, x.to(tl.bfloat16), mask=mask)
    else:
        bits = (_round(x, False).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
        tl.store(pointer.to(tl.pointer_type(tl.uint16), bitcast=True) + places, bits, mask=mask)


@triton.jit
def _scale(x, smallest: tl.constexpr):
    """[groups] float32 of weights [groups, size] float32; NaN where one of them is NaN."""
    # The bits of magnitudes are ordered as the numbers are, with NaN above all; a maximum of floats passes NaN over.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(bits, axis=1).to(tl.float32, bitcast=True) * SEVENTH
    return tl.where(scale < smallest, smallest, scale)


@triton.jit
def _codes(x, scale, native: tl.constexpr):
    """[groups, size] float32, whole, in [-7, 7]: no quotient is as far as 7.5 from zero. NaN in a group of such."""
    each = tl.broadcast_to(scale[:, None], x.shape)
    if native:
        # The reciprocal, once a group, correctly rounded; after two corrections the quotient is as well (Markstein,
        # "Computation of elementary functions on the IBM RISC System/6000 processor", 1990, theorem 8). `div_rn` does
        # the same and takes care of exponents that cannot occur here.
        reciprocal = tl.broadcast_to(tl.div_rn(1.0, scale)[:, None], x.shape)
        q = x * reciprocal
        q = tl.fma(tl.fma(-q, each, x), reciprocal, q)
        q = tl.fma(tl.fma(-q, each, x), reciprocal, q)
    else:
        q = tl.div_rn(x, each)
    return (q + ROUNDER) - ROUNDER


@triton.jit
def _fake_quantise(
    weights, values, packed, scales, groups, size: tl.constexpr, many: tl.constexpr, smallest: tl.constexpr,
    snapped: tl.constexpr, wants_values: tl.constexpr, wants_packed: tl.constexpr, native: tl.constexpr,
):  # fmt: skip
    """Program (i, w): groups i * many … of weight w. `weights` are addresses; results lie one after the other."""
    weight = tl.program_id(1).to(tl.int64)
    source = tl.load(weights + weight).to(tl.pointer_type(tl.bfloat16))
    source = tl.multiple_of(source, 16)
    rows = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many)
    inside = rows < groups
    places = rows[:, None] * size + tl.arange(0, size)[None, :]
    x = _load(source, places, inside[:, None], native)
    scale = _scale(x, smallest)
    rounded = _round(scale, native)
    codes = _codes(x, rounded if snapped else scale, native)
    begin = weight * groups
    if wants_values:
        _store(values, begin * size + places, codes * rounded[:, None], inside[:, None], native)
    if wants_packed:
        words: tl.constexpr = size // 8
        nibbles = tl.where(codes == codes, codes, 0.0).to(tl.int32) + 8
        shifted = tl.reshape(nibbles, (many, words, 8)) << (tl.arange(0, 8) * 4)[None, None, :]
        word_places = rows[:, None] * words + tl.arange(0, words)[None, :]
        tl.store(packed + begin * words + word_places, tl.sum(shifted, axis=2), mask=inside[:, None])
        _store(scales, begin + rows, rounded, inside, native)


@triton.jit
def _dequantise(packed, scales, values, groups, size: tl.constexpr, many: tl.constexpr, native: tl.constexpr):
    words: tl.constexpr = size // 8
    rows = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many)
    inside = rows < groups
    word_places = rows[:, None] * words + tl.arange(0, words)[None, :]
    word = tl.load(packed + word_places, mask=inside[:, None], other=0)
    scale = _load(scales, rows, inside, native)
    codes = ((word[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]) & 15) - 8
    value = tl.reshape(codes, (many, size)).to(tl.float32) * scale[:, None]
    places = rows[:, None] * size + tl.arange(0, size)[None, :]
    _store(values, places, value, inside[:, None], native)


def fake_quantise(weights: Sequence[torch.Tensor], grid: Grid) -> torch.Tensor:
    """`grid.fake_quantise` of weights [N, K] bfloat16 of one shape on one device: [weights, N, K] bfloat16."""
    values = _new(weights, grid, torch.bfloat16, 1)
    _launch(weights, grid, values, None)
    return values


def pack(weights: Sequence[torch.Tensor], grid: Grid) -> Packed:
    """`grid.quantise` and `grid.pack` of the same."""
    found = Packed(_new(weights, grid, torch.int32, 8), _new(weights, grid, torch.bfloat16, grid.group_size))
    _launch(weights, grid, None, found)
    return found


def dequantise(quantised: Packed) -> torch.Tensor:
    """`grid.dequantise` of all of them: [weights, N, K] bfloat16."""
    packed, scale = quantised.packed, quantised.scale
    values = torch.empty(*packed.shape[:-1], packed.shape[-1] * 8, dtype=torch.bfloat16, device=packed.device)
    size = values.shape[-1] // scale.shape[-1]
    groups, many = scale.numel(), TILE // size
    with _on(packed.device):
        _dequantise[triton.cdiv(groups, many),](
            packed, scale, values, groups, size, many, _is_native(packed), num_warps=WARPS
        )
    return values


def _launch(weights: Sequence[torch.Tensor], grid: Grid, values: Any, into: Packed | None) -> None:
    first = weights[0]
    device, kind = first.device, (first.shape, torch.bfloat16, first.device)
    readable = []  # they live until the launch is enqueued; the stream orders what frees them
    for weight in weights:
        if (weight.shape, weight.dtype, weight.device) != kind:
            raise ValueError(
                f"one launch takes bfloat16 weights of one shape on one device: {tuple(first.shape)} on {device}, "
                f"not {tuple(weight.shape)} {weight.dtype} on {weight.device}"
            )
        readable.append(_readable(weight))
    addresses = _addresses(tuple([weight.data_ptr() for weight in readable]), device)
    groups, many = weights[0].numel() // grid.group_size, TILE // grid.group_size
    nothing = addresses
    with _on(device):
        _fake_quantise[triton.cdiv(groups, many), len(weights)](
            addresses,
            nothing if values is None else values,
            nothing if into is None else into.packed,
            nothing if into is None else into.scale,
            groups,
            grid.group_size,
            many,
            reference.SMALLEST_SCALE[grid.kind],
            grid.kind == "snapped",
            values is not None,
            into is not None,
            _is_native(weights[0]),
            num_warps=WARPS,
        )


def _readable(weight: torch.Tensor) -> torch.Tensor:
    """Contiguous, and at an address that loads of 16 bytes can begin at."""
    if weight.is_contiguous() and weight.data_ptr() % 16 == 0:
        return weight
    return weight.detach().clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=1024)
def _addresses(addresses: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """On the device; making it waits for the GPU, so it is kept."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def _is_native(tensor: torch.Tensor) -> bool:
    return bool(tensor.is_cuda)


def _new(weights: Sequence[torch.Tensor], grid: Grid, dtype: torch.dtype, share: int) -> torch.Tensor:
    first = weights[0]
    grid.check("a weight", tuple(first.shape))
    return torch.empty(len(weights), first.shape[0], first.shape[1] // share, dtype=dtype, device=first.device)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
