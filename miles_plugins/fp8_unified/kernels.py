"""Block-scaled FP8 on a GPU: the functions of `blockwise`, bit for bit, and the product of what they make.

Weights of any shapes are quantised in one launch, each read once and its codes and scales written once, straight into
the buffer that is sent: 3 bytes a weight. A program takes one tile and keeps it in registers. The arithmetic is the
reference's: correctly rounded quotients (`div_rn`; Triton's `/` is an approximation), a product, the GPU's own
conversion to E4M3.

What a launch needs to know goes up as its arguments where that is little: up to `FEW` weights, a product with one. Of
more weights there are tables, kept on the GPU for those who come again with the same addresses; no call waits for the
GPU. Numbers that kernels share are defaults of their parameters: Triton compares globals again at every launch.

Triton's interpreter rounds neither bfloat16 nor E4M3 as a GPU does and multiplies no FP8. What depends on that is
written twice, for a GPU and for the interpreter (`native`); `python -m tests.fp8_kernels cuda` judges the first.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from miles_plugins.errors import PluginError
from miles_plugins.fp8_unified import blockwise as reference
from miles_plugins.fp8_unified.blockwise import Format, Quantised
from miles_plugins.fp8_unified.bucket import ALIGNMENT, BYTES, SCALES, Layout, plan

LARGEST = tl.constexpr(reference.LARGEST)
INFINITY_BITS = tl.constexpr(reference.INFINITY_BITS)
GAP = tl.constexpr(ALIGNMENT)
SCALE_BYTES = tl.constexpr(BYTES[SCALES])
ROUNDER = tl.constexpr(12582912.0)  # added and taken off again: float32 then holds whole numbers only
PLACE, FACTS = tl.constexpr(4), tl.constexpr(8)
"""Numbers in a table about a matrix. Where it is: address, two strides, kind of launch. What is known of it from the
layout: shape, two offsets, first tile, tiles in a row, two gaps."""
FEW = 4
"""Weights that a launch takes as arguments: what slime makes of one parameter (query, key, value)."""
KEPT = 512
"""Tables of addresses: two for each layer of experts, a few kilobytes each."""
OVERFLOW = {dtype: torch.finfo(dtype).max for dtype in (torch.bfloat16, torch.float32)}
"""What weights may be, and the scale where 448 / amax is infinite."""
PER_THREAD = 64
"""Weights a thread holds: a tile of 128 x 128 takes 8 warps, and two tiles fit on a multiprocessor with room left."""
ROWS_TILE, ROWS_WARPS = 4096, 4
UNWOVEN_WARPS = 8
TOGETHER, PRODUCT_STAGES = 8, 4
"""Tiles of rows that run side by side, and how many blocks of K are on their way."""


@triton.jit
def _numbers(bits, wide: tl.constexpr):
    """The bits of float32 (`wide`) or bfloat16 as float32."""
    return (bits if wide else bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _amax_bits(bits, axis: tl.constexpr, wide: tl.constexpr):
    """The bits of the largest magnitude, as float32. Bits are ordered as numbers are, NaN above all."""
    # As 16 bits until a tile's scale is known: a thread then keeps half as many registers, and three tiles fit.
    found = tl.max((bits & 0x7FFFFFFF) if wide else (bits & 0x7FFF), axis).to(tl.int32)
    return found if wide else found << 16


@triton.jit
def _scale(
    amax_bits, overflow: tl.constexpr, power_of_two: tl.constexpr, largest: tl.constexpr = LARGEST,
    infinity_bits: tl.constexpr = INFINITY_BITS,
):  # fmt: skip
    """The scale of a tile, from the bits of its largest magnitude. `overflow` is what an infinite quotient becomes."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.full(amax.shape, largest, tl.float32), amax)
    scale = tl.where(scale == float("inf"), overflow, scale)
    scale = tl.where((amax_bits == 0) | (amax_bits >= infinity_bits), 1.0, scale)
    if power_of_two:
        scale = (scale.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _inverse(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _codes(
    x, native: tl.constexpr, largest: tl.constexpr = LARGEST, infinity_bits: tl.constexpr = INFINITY_BITS,
    rounder: tl.constexpr = ROUNDER,
):  # fmt: skip
    """E4M3 codes as uint8 of float32: half to even, saturating; NaN and infinity are 0x7F."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if native:
        numbers = tl.where(magnitude == infinity_bits, float("nan"), x)
        return numbers.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    size = tl.minimum(magnitude.to(tl.float32, bitcast=True), largest)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = ((size * 512.0 + rounder) - rounder).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    code = tl.where(size < 0.015625, subnormal, normal) | sign
    return tl.where(magnitude >= infinity_bits, 0x7F, code).to(tl.uint8)


@triton.jit
def _quantise_tile(
    source, n, k, row_step, column_step, codes, scales, tile, across, codes_size, codes_gap, scales_size, scales_gap,
    height: tl.constexpr, width: tl.constexpr, overflow: tl.constexpr, power_of_two: tl.constexpr, wide: tl.constexpr,
    woven: tl.constexpr, native: tl.constexpr, gap: tl.constexpr = GAP, bytes_of_scale: tl.constexpr = SCALE_BYTES,
):  # fmt: skip
    """Tile `tile` of a weight, `across` of them in a row; the first one also fills the gaps behind codes and scales.

    `woven`: each row of the tile is followed by the scale, and there are no scales elsewhere and no gaps.
    """
    down = tile // across
    first_row = down.to(tl.int64) * height
    first_column = (tile - down * across).to(tl.int64) * width
    rows = first_row + tl.arange(0, height)[:, None]
    columns = first_column + tl.arange(0, width)[None, :]
    inside = (rows < n) & (columns < k)
    bits = tl.load(source + rows * row_step + columns * column_step, mask=inside, other=0)
    scale = _scale(_amax_bits(bits, None, wide), overflow, power_of_two)
    if woven:
        begins = codes + rows * (k + across * bytes_of_scale) + (tile - down * across) * bytes_of_scale
        tl.store(begins + columns, _codes(_numbers(bits, wide) * scale, native), mask=inside)
        # Byte by byte: the scale of a row of odd length is not aligned.
        places = tl.arange(0, bytes_of_scale)[None, :]
        parts = (_inverse(scale).to(tl.uint32, bitcast=True) >> places * 8) & 0xFF
        parts = tl.broadcast_to(parts.to(tl.uint8), [height, bytes_of_scale])
        tl.store(begins + tl.minimum(first_column + width, k) + places, parts, mask=(rows < n) & (places >= 0))
    else:
        tl.store(codes + rows * k + columns, _codes(_numbers(bits, wide) * scale, native), mask=inside)
        tl.store(scales.to(tl.pointer_type(tl.float32)) + tile, _inverse(scale))
        if tile == 0:
            places = tl.arange(0, gap)
            nothing = tl.zeros([gap], tl.uint8)
            tl.store(codes + codes_size + places, nothing, mask=places < codes_gap)
            tl.store(scales + scales_size + places, nothing, mask=places < scales_gap)


@triton.jit
def _quantise_many(
    owners, places, facts, bucket, height: tl.constexpr, width: tl.constexpr, overflow: tl.constexpr,
    power_of_two: tl.constexpr, wide: tl.constexpr, along: tl.constexpr, aligned: tl.constexpr, woven: tl.constexpr,
    native: tl.constexpr, place: tl.constexpr = PLACE, known: tl.constexpr = FACTS,
):  # fmt: skip
    """Program i: a tile of matrix `owners[i]`, if that is of the kind which this launch is for.

    `along` is the axis of stride 1 (-1: none), `aligned` by 16 bytes.
    """
    tile = tl.program_id(0)
    owner = tl.load(owners + tile).to(tl.int64)
    places += owner * place
    facts += owner * known
    if tl.load(places + 3) == (wide * 3 + along + 1) * 2 + aligned:
        source = tl.load(places).to(tl.pointer_type(tl.uint32 if wide else tl.uint16))
        row_step = tl.load(places + 1)
        column_step = tl.load(places + 2)
        n = tl.load(facts)
        k = tl.load(facts + 1)
        codes = tl.load(facts + 2)
        scales = tl.load(facts + 3)
        tile -= tl.load(facts + 4).to(tl.int32)
        across = tl.load(facts + 5).to(tl.int32)
        codes_gap = tl.load(facts + 6)
        scales_gap = tl.load(facts + 7)
        if aligned:
            source = tl.multiple_of(source, 16)
            codes = tl.multiple_of(codes, 16)
            k = tl.multiple_of(k, 16)
            if along == 1:
                row_step = tl.multiple_of(row_step, 8)
            else:
                column_step = tl.multiple_of(column_step, 8)
                n = tl.multiple_of(n, 16)
        if along == 1:
            column_step = 1
        if along == 0:
            row_step = 1
        scales_size = (n + height - 1) // height * across * 4
        target = bucket.to(tl.pointer_type(tl.uint8), bitcast=True)
        _quantise_tile(
            source, n, k, row_step, column_step, target + codes, target + scales, tile, across, n * k, codes_gap,
            scales_size, scales_gap, height, width, overflow, power_of_two, wide, woven, native,
        )  # fmt: skip


@triton.jit
def _quantise_few(
    bucket, weights, height: tl.constexpr, width: tl.constexpr, overflow: tl.constexpr, power_of_two: tl.constexpr,
    wide: tl.constexpr, woven: tl.constexpr, native: tl.constexpr, gap: tl.constexpr = GAP,
):  # fmt: skip
    """Program i: tile i of all tiles of `weights`, a tuple of (weight, n, k, stride, stride).

    Where they go is what `bucket.plan` says: each weight's codes, then its scales, both up to a multiple of `gap`; or
    the rows of each, `woven`, up to a multiple of it.
    """
    tile = tl.program_id(0)
    target = bucket.to(tl.pointer_type(tl.uint8), bitcast=True)
    begin = tl.cast(0, tl.int64)
    for i in tl.static_range(len(weights)):
        source, n, k, row_step, column_step = weights[i]
        across = tl.cdiv(k, width)
        tiles = tl.cdiv(n, height) * across
        codes_size = tl.cast(n, tl.int64) * k
        scales_size = tl.cast(tiles, tl.int64) * 4
        if woven:
            # Of every row each block's scale; `scales` is not written to.
            scales = begin
            end = begin + (tl.cast(n, tl.int64) * (k + across * 4) + gap - 1) // gap * gap
        else:
            scales = begin + (codes_size + gap - 1) // gap * gap
            end = scales + (scales_size + gap - 1) // gap * gap
        if (tile >= 0) & (tile < tiles):
            _quantise_tile(
                source.to(tl.pointer_type(tl.uint32 if wide else tl.uint16), bitcast=True), n, k, row_step, column_step,
                target + begin, target + scales, tile, across, codes_size, scales - begin - codes_size, scales_size,
                end - scales - scales_size, height, width, overflow, power_of_two, wide, woven, native,
            )  # fmt: skip
        tile -= tiles
        begin = end


@triton.jit(do_not_specialize=["n"])
def _unweave(
    rows_of_bytes, codes, scales, n, k, size, across, height: tl.constexpr, width: tl.constexpr, unit: tl.constexpr,
    bytes_of_scale: tl.constexpr = SCALE_BYTES,
):  # fmt: skip
    """Program i: tile i of a weight whose rows are woven, and its scale, from its first row.

    All is copied in units of `unit` bytes, 4 or 1; k, `size` (of a woven row) and `width` count those.
    """
    kind: tl.constexpr = tl.pointer_type(tl.uint32 if unit == 4 else tl.uint8)
    parts: tl.constexpr = bytes_of_scale // unit
    tile = tl.program_id(0)
    down = tile // across
    block = tile - down * across
    first_row = down.to(tl.int64) * height
    source = rows_of_bytes.to(kind, bitcast=True) + block * parts
    rows = first_row + tl.arange(0, height)[:, None]
    columns = block * width + tl.arange(0, width)[None, :]
    inside = (rows < n) & (columns < k)
    found = tl.load(source + rows * size + columns, mask=inside)
    tl.store(codes.to(kind, bitcast=True) + rows * k + columns, found, mask=inside)
    places = tl.arange(0, parts)
    scale = tl.load(source + first_row * size + tl.minimum(block * width + width, k) + places)
    tl.store(scales.to(kind, bitcast=True) + tile * parts + places, scale)


@triton.jit(do_not_specialize=["groups"])
def _quantise_rows(
    x, codes, scales, groups, k, across, row_step, column_step, width: tl.constexpr, many: tl.constexpr,
    overflow: tl.constexpr, power_of_two: tl.constexpr, wide: tl.constexpr, native: tl.constexpr,
):  # fmt: skip
    """Program i: `many` groups of `width` numbers of a row, wherever they are; `across` groups are a row."""
    group = tl.program_id(0) * many + tl.arange(0, many)
    row = group // across
    columns = ((group - row * across) * width)[:, None] + tl.arange(0, width)[None, :]
    inside = (group < groups)[:, None] & (columns < k)
    row = row.to(tl.int64)[:, None]
    source = x.to(tl.pointer_type(tl.uint32 if wide else tl.uint16), bitcast=True)
    bits = tl.load(source + row * row_step + columns.to(tl.int64) * column_step, mask=inside, other=0)
    scale = _scale(_amax_bits(bits, 1, wide), overflow, power_of_two)
    target = codes.to(tl.pointer_type(tl.uint8), bitcast=True)
    tl.store(target + row * k + columns, _codes(_numbers(bits, wide) * scale[:, None], native), mask=inside)
    tl.store(scales + group, _inverse(scale), mask=group < groups)


@triton.jit
def _load_codes(pointer, places, mask, native: tl.constexpr):
    """E4M3 codes to multiply: as they are, or as float32 where there is no FP8 product."""
    if native:
        found = tl.load(pointer.to(tl.pointer_type(tl.float8e4nv), bitcast=True) + places, mask=mask, other=0.0)
    else:
        pointer = pointer.to(tl.pointer_type(tl.uint8), bitcast=True)
        code = tl.load(pointer + places, mask=mask, other=0).to(tl.int32)
        # The exponent has the bias 7 and gets 127.
        found = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
        found = tl.where((code & 0x7F) == 0x7F, float("nan"), found)
        found = tl.where(code >= 0x80, -found, found)
    return found


@triton.jit
def _store(pointer, places, x, mask, native: tl.constexpr):
    """float32 as bfloat16, rounded half to even."""
    if native:
        tl.store(pointer + places, x.to(tl.bfloat16), mask=mask)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(x == x, nearest, 0x7FC0).to(tl.uint16)
        tl.store(pointer.to(tl.pointer_type(tl.uint16), bitcast=True) + places, nearest, mask=mask)


@triton.jit
def _tile_of(row_tiles, column_tiles, together: tl.constexpr):
    """The tile of y that this program takes.

    Programs that run at the same time share rows of x and of the weight: `together` tiles down, then one across.
    """
    program = tl.program_id(0)
    first = program // (together * column_tiles) * together
    high = tl.minimum(row_tiles - first, together)
    within = program % (together * column_tiles)
    return first + within % high, within // high


@triton.jit
def _multiply_tile(
    x, x_scales, codes, scales, y, begin, end, row_tile, column_tile, n, k, block_m: tl.constexpr,
    block_n: tl.constexpr, block_k: tl.constexpr, even: tl.constexpr, native: tl.constexpr,
):  # fmt: skip
    """A tile [block_m, block_n] of the rows from `begin` to `end` of y."""
    rows = begin + row_tile.to(tl.int64) * block_m + tl.arange(0, block_m)
    columns = column_tile.to(tl.int64) * block_n + tl.arange(0, block_n)
    steps = tl.arange(0, block_k)
    blocks = tl.cdiv(k, block_k)
    left = rows[:, None] * k + steps[None, :]
    right = columns[None, :] * k + steps[:, None]
    x_factors = x_scales + rows * blocks
    scales += column_tile.to(tl.int64) * blocks
    total = tl.zeros([block_m, block_n], tl.float32)
    for block in range(blocks):
        begins = block * block_k
        here = steps < (block_k if even else k - begins)
        a = _load_codes(x, left + begins, (rows < end)[:, None] & here[None, :], native)
        b = _load_codes(codes, right + begins, (columns < n)[None, :] & here[:, None], native)
        factor = tl.load(x_factors + block, mask=rows < end, other=0.0)
        total += tl.dot(a, b, input_precision="ieee") * factor[:, None] * tl.load(scales + block)
    places = rows[:, None] * n + columns[None, :]
    _store(y, places, total, (rows < end)[:, None] & (columns < n)[None, :], native)


@triton.jit(do_not_specialize=["m"])
def _linear(
    x, x_scales, codes, scales, y, m, n, k, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
    together: tl.constexpr, even: tl.constexpr, native: tl.constexpr,
):  # fmt: skip
    """Program i: a tile [block_m, block_n] of y, with one weight."""
    row_tile, column_tile = _tile_of(tl.cdiv(m, block_m), tl.cdiv(n, block_n), together)
    _multiply_tile(
        x, x_scales, codes, scales, y, 0, m, row_tile, column_tile, n, k, block_m, block_n, block_k, even, native
    )


@triton.jit(do_not_specialize=["row_tiles"])
def _grouped_linear(
    x, x_scales, weights, y, plan, row_tiles, n, k, count, block_m: tl.constexpr, block_n: tl.constexpr,
    block_k: tl.constexpr, together: tl.constexpr, even: tl.constexpr, aligned: tl.constexpr, native: tl.constexpr,
):  # fmt: skip
    """Program i: a tile [block_m, block_n] of y.

    `weights` [2, count] are the addresses of codes and scales. `plan` is, for each weight, its first row, the row after
    its last and its first tile of rows (3 * count), and then the weight of each tile of rows; `count` for no weight.
    """
    row_tile, column_tile = _tile_of(row_tiles, tl.cdiv(n, block_n), together)
    owner = tl.load(plan + 3 * count + row_tile)
    if owner < count:
        begin = tl.load(plan + owner)
        end = tl.load(plan + count + owner)
        row_tile -= tl.load(plan + 2 * count + owner).to(tl.int32)
        codes = tl.load(weights + owner).to(tl.pointer_type(tl.uint8))
        if aligned:
            codes = tl.multiple_of(codes, 16)
        scales = tl.load(weights + count + owner).to(tl.pointer_type(tl.float32))
        _multiply_tile(
            x, x_scales, codes, scales, y, begin, end, row_tile, column_tile, n, k, block_m, block_n, block_k, even,
            native,
        )  # fmt: skip


# -- weights ----------------------------------------------------------------------------------------------------------


def quantise_weights(weights: Sequence[torch.Tensor], format: Format) -> list[Quantised]:
    """`blockwise.quantise_weight` of weights [..., N, K] of any shapes on one device, as views of one buffer."""
    if not weights:
        return []
    layout = plan([weight.shape for weight in weights], format)
    bucket = torch.empty(layout.size, dtype=torch.float8_e4m3fn, device=weights[0].device)
    _enqueue(weights, bucket, layout, format)
    return layout.views_of(bucket, bucket.view(torch.float32))  # while the GPU works


def quantise_into(weights: Sequence[torch.Tensor], bucket: torch.Tensor, layout: Layout, format: Format) -> None:
    """The same into a buffer [layout.size] uint8 on the current stream, of which every byte is written.

    Nothing waits for the GPU. The weights may be freed when this returns, on the stream that it ran on.
    """
    layout.check(bucket)
    if layout.block != format.block:
        raise PluginError(
            "this layout is for another block size",
            {"layout": layout.block, "expected (N, K)": format.block},
            "plan it with the format that the weights are quantised with",
        )
    if tuple([weight.shape for weight in weights]) != layout.shapes:
        _refuse(weights, layout)
    _enqueue(weights, bucket, layout, format)


def _refuse(weights: Sequence[torch.Tensor], layout: Layout) -> None:
    if len(weights) != len(layout.shapes):
        raise ValueError(f"{len(weights)} weights for a layout of {len(layout.shapes)}")
    for weight, entry in zip(weights, layout.entries[::2], strict=True):
        if weight.shape != entry.shape:
            raise ValueError(f"the layout has {entry.name} {list(entry.shape)}, not {list(weight.shape)}")


def _enqueue(
    weights: Sequence[torch.Tensor], bucket: torch.Tensor, layout: Layout, format: Format, woven: bool = False
) -> None:
    """`quantise_into` for weights of the layout's shapes; the bucket's elements are one byte each."""
    device = bucket.device
    dtypes = {weight.dtype for weight in weights}
    if not dtypes <= OVERFLOW.keys():
        for weight in weights:
            if weight.dtype not in OVERFLOW:
                reference.quantise_weight(weight, format)  # says what is wrong with it
    if {weight.get_device() for weight in weights} != {bucket.get_device()}:
        raise ValueError(
            f"the buffer is on {device}, weights are on {sorted({str(weight.device) for weight in weights})}"
        )
    if not layout.tiles:
        return
    height, width = format.block
    power_of_two, native = format.scale == "power_of_two", _is_native(bucket)
    warps = max(1, height * width // (32 * PER_THREAD))
    if len(weights) <= FEW and len(dtypes) == 1 and layout.plain:
        (dtype,) = dtypes
        with _on(device):
            _quantise_few[layout.tiles,](
                bucket,
                tuple([(weight, *weight.shape, *weight.stride()) for weight in weights]),
                height,
                width,
                OVERFLOW[dtype],
                power_of_two,
                dtype == torch.float32,
                woven,
                native,
                num_warps=warps,
            )
        return
    numbers: list[int] = []
    for weight in weights:
        numbers += weight.element_size(), weight.data_ptr(), *weight.stride()
    with _on(device):
        stream = _stream(device)
        owners, facts = _known_on(layout, device, stream)
        places, kinds = _places(layout, tuple(numbers), device, stream)
        for wide, along, aligned in kinds:
            _quantise_many[layout.tiles,](
                owners,
                places,
                facts,
                bucket,
                height,
                width,
                OVERFLOW[torch.float32 if wide else torch.bfloat16],
                power_of_two,
                wide,
                along,
                aligned,
                woven,
                native,
                num_warps=warps,
            )


@lru_cache(maxsize=64)
def _known(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix of each tile [tiles] int32, and [matrices, FACTS] int64."""
    height, width = layout.block
    owners, facts = array("i"), array("q")
    number = first = 0
    of_codes, of_scales, ends = layout.offsets[:-1:2], layout.offsets[1::2], layout.offsets[2::2]
    for shape, codes, scales, end in zip(layout.shapes, of_codes, of_scales, ends, strict=True):
        if 0 in shape:
            continue
        n, k = shape[-2:]
        across, last = -(-k // width), math.prod(shape[:-2]) - 1
        tiles = -(-n // height) * across
        for index in range(last + 1):
            begin, scales_begin = codes + index * n * k, scales + index * tiles * 4
            gaps = (scales - begin - n * k, end - scales_begin - tiles * 4) if index == last else (0, 0)
            facts.extend((n, k, begin, scales_begin, first, across, *gaps))
            owners += array("i", (number,)) * tiles
            number, first = number + 1, first + tiles
    return torch.frombuffer(owners, dtype=torch.int32), torch.frombuffer(facts, dtype=torch.int64).view(number, -1)


@lru_cache(maxsize=64)
def _known_on(layout: Layout, device: torch.device, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    owners, facts = _known(layout)
    return _to(owners, device), _to(facts, device)


@lru_cache(maxsize=KEPT)
def _places(
    layout: Layout, weights: tuple[int, ...], device: torch.device, stream: int
) -> tuple[torch.Tensor, list[tuple[bool, int, bool]]]:
    """[matrices, PLACE] int64 on the device, and the launches that they need: (wide, along, aligned).

    `weights` are, for each of the layout, the size of an element, the address and the strides.
    """
    n, k, codes, *_ = _known(layout)[1].unbind(1)
    size, address, row_step, column_step = _table(_matrices(layout, weights)).view(-1, 4).unbind(1)
    in_rows, in_columns = column_step == 1, row_step == 1
    step = torch.where(in_rows, row_step, column_step) * size
    aligned = (in_rows | (in_columns & (n % 16 == 0))) & ((address | step | k | codes) % 16 == 0)
    along = torch.where(in_rows, 1, in_columns.long() - 1)
    kind = ((size == 4) * 3 + along + 1) * 2 + aligned
    kinds = [(each >= 6, each // 2 % 3 - 1, each % 2 == 1) for each in kind.unique().tolist()]
    return _to(torch.stack([address, row_step, column_step, kind], dim=1), device), kinds


def _matrices(layout: Layout, weights: Sequence[int]) -> Sequence[int]:
    """The same for each matrix."""
    if layout.plain:
        return weights
    numbers, found = iter(weights), list[int]()
    for shape in layout.shapes:
        size, address, *steps = itertools.islice(numbers, len(shape) + 2)
        if 0 in shape:
            continue
        for index in itertools.product(*map(range, shape[:-2])):
            offset = sum([i * step for i, step in zip(index, steps, strict=False)])
            found += size, address + size * offset, *steps[-2:]
    return found


# -- weights on their way (`travel`) ----------------------------------------------------------------------------------


def quantise_woven(weights: Sequence[torch.Tensor], format: Format) -> list[torch.Tensor]:
    """`travel.encode` of weights [N, K] on one device, quantised and woven in one go, as views of one buffer."""
    if not weights:
        return []
    layout = _plan_woven(tuple([tuple(weight.shape) for weight in weights]), format.block)
    bucket = torch.empty(layout.size, dtype=torch.uint8, device=weights[0].device)
    _enqueue(weights, bucket, layout, format, woven=True)
    found = []
    for (n, k), begin in zip(layout.shapes, layout.offsets[:-1:2], strict=True):  # while the GPU works
        size = _woven_size(k, format.block[1])
        found.append(bucket.as_strided((n, size), (size, 1), begin))
    return found


def _woven_size(k: int, width: int) -> int:
    return k + -(-k // width) * BYTES[SCALES]


@lru_cache(maxsize=64)
def _plan_woven(shapes: tuple[tuple[int, ...], ...], block: tuple[int, int]) -> Layout:
    """A layout in which the offset of a weight's codes is that of its woven rows, and that of its scales their end."""
    offsets = [0]
    for n, k in shapes:
        size = n * _woven_size(k, block[1])
        end = offsets[-1] + size + -size % ALIGNMENT
        offsets += end, end
    return Layout(shapes, tuple(offsets), block)


def unweave(woven: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """`travel.unwoven` in one launch: codes [N, K] uint8 and the scale of each tile."""
    height, width = format.block
    n, size = woven.shape
    across = -(-size // (width + BYTES[SCALES]))
    k, down = size - across * BYTES[SCALES], -(-n // height)
    codes = torch.empty((n, k), dtype=torch.uint8, device=woven.device)
    scales = torch.empty((down, across), dtype=torch.float32, device=woven.device)
    if codes.numel():
        woven = woven.contiguous()
        unit = 1 if k % 4 or woven.data_ptr() % 4 else 4
        with _on(woven.device):
            _unweave[down * across,](
                woven, codes, scales, n, k // unit, size // unit, across, height, width // unit, unit,
                num_warps=UNWOVEN_WARPS,
            )  # fmt: skip
    return codes, scales


# -- activations ------------------------------------------------------------------------------------------------------


def quantise_rows(x: torch.Tensor, format: Format) -> Quantised:
    """`blockwise.quantise_rows` of activations [..., M, K], bfloat16 or float32; a view of strides is not copied."""
    if x.dtype not in OVERFLOW or x.dim() < 2:
        return reference.quantise_rows(x, format)  # says what is wrong with it
    k, width = x.shape[-1], format.block[1]
    across = -(-k // width)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((*x.shape[:-1], across), dtype=torch.float32, device=x.device)
    groups, many = scales.numel(), ROWS_TILE // width
    if not groups:
        return Quantised(codes, scales)
    if groups >= 2**31 - many:
        raise ValueError(f"{groups} groups in one call: more than a launch can number")
    flat = x if x.dim() == 2 else x.detach().reshape(-1, k)
    with _on(x.device):
        _quantise_rows[-(-groups // many),](
            flat,
            codes,
            scales,
            groups,
            k,
            across,
            *flat.stride(),
            width,
            many,
            OVERFLOW[x.dtype],
            format.scale == "power_of_two",
            x.dtype == torch.float32,
            _is_native(x),
            num_warps=ROWS_WARPS,
        )
    return Quantised(codes, scales)


# -- the product ------------------------------------------------------------------------------------------------------


def grouped_linear(
    x: Quantised,
    weights: Quantised | Sequence[Quantised],
    rows_per_weight: Sequence[int] | torch.Tensor,
    format: Format,
) -> torch.Tensor:
    """y [M, N] bfloat16 = x weight^T, a weight for each run of rows: the first `rows_per_weight[0]` have weight 0.

    K goes block by block, in order: `y += dot(codes, codes) * x_scale * weight_scale` in float32, as in the Triton
    kernels of SGLang. A row's result does not depend on the rows beside it.

    Args:
        x: `quantise_rows` of [M, K].
        weights: codes [E, N, K] and scales [E, ...] in one tensor each, or E of [N, K] anywhere in memory.
        rows_per_weight: E numbers. A list, or a tensor on the CPU, adds up to M. A tensor on the GPU is not waited for:
            rows beyond its sum are zero, and its sum must not be above M.
    """
    parts = [Quantised(*pair) for pair in zip(*weights, strict=True)] if isinstance(weights, Quantised) else weights
    m, k = x.codes.shape
    n = _check_product(x, parts, format)
    count, device = len(parts), x.codes.device
    counts = rows_per_weight if isinstance(rows_per_weight, torch.Tensor) else tuple(rows_per_weight)
    if isinstance(counts, torch.Tensor) and not counts.is_cuda:
        counts = tuple(counts.tolist())
    told = isinstance(counts, tuple)
    if len(counts) != count or (told and sum(counts) != m):
        raise ValueError(f"{count} weights and {m} rows, but {len(counts)} runs" + f", {sum(counts)} rows" * told)
    y = (torch.empty if told else torch.zeros)((m, n), dtype=torch.bfloat16, device=device)
    if not y.numel():
        return y
    height, width = format.block
    block_m = 64 if m <= 64 * count else 128
    options = {"num_warps": 4 if block_m == 64 else 8, "num_stages": PRODUCT_STAGES}
    constants = block_m, height, width, TOGETHER, k % width == 0
    column_tiles = -(-n // height)
    with _on(device):
        if told and count == 1:
            _linear[-(-m // block_m) * column_tiles,](
                *x, *parts[0], y, m, n, k, *constants, _is_native(y), **options
            )  # fmt: skip
            return y
        stream = _stream(device)
        runs, row_tiles = _runs_of(counts, block_m, device, stream) if told else _runs(counts, m, block_m)
        addresses = [codes.data_ptr() for codes, _ in parts] + [scale_inv.data_ptr() for _, scale_inv in parts]
        table, aligned = _addresses(tuple(addresses), device, stream)
        _grouped_linear[row_tiles * column_tiles,](
            *x, table, y, runs, row_tiles, n, k, count, *constants, aligned, _is_native(y), **options
        )  # fmt: skip
    return y


def _check_product(x: Quantised, weights: Sequence[Quantised], format: Format) -> int:
    """N of the weights."""
    (m, k), (height, width) = x.codes.shape, format.block
    n, blocks = weights[0].codes.shape[0], -(-k // width)
    device, shape, of_scales = x.codes.device, (n, k), (-(-n // height), blocks)
    if x.scale_inv.shape != (m, blocks) or not (x.codes.is_contiguous() and x.scale_inv.is_contiguous()):
        raise ValueError(f"x has the scales {list(x.scale_inv.shape)}, expected {[m, blocks]}, contiguous")
    for codes, scale_inv in weights:
        if codes.shape != shape or scale_inv.shape != of_scales or codes.device != device:
            raise ValueError(
                f"a weight has codes {list(codes.shape)} and scales {list(scale_inv.shape)} on {codes.device}; "
                f"expected {list(shape)} and {list(of_scales)} on {device}"
            )
        if not (codes.is_contiguous() and scale_inv.is_contiguous()):
            raise ValueError(f"a weight is not contiguous: strides {codes.stride()} and {scale_inv.stride()}")
    return int(n)


@lru_cache(maxsize=KEPT)
def _addresses(addresses: tuple[int, ...], device: torch.device, stream: int) -> tuple[torch.Tensor, bool]:
    """`_grouped_linear`'s weights, and whether all codes begin at multiples of 16 bytes."""
    return _to(_table(addresses), device), not any(each % 16 for each in addresses[: len(addresses) // 2])


@lru_cache(maxsize=KEPT)
def _runs_of(counts: tuple[int, ...], block_m: int, device: torch.device, stream: int) -> tuple[torch.Tensor, int]:
    """`_grouped_linear`'s plan on the device, and its number of tiles of rows."""
    tiles = [-(-count // block_m) for count in counts]
    ends, tile_ends = list(itertools.accumulate(counts)), list(itertools.accumulate(tiles))
    table = [end - count for end, count in zip(ends, counts, strict=True)] + ends
    table += [end - many for end, many in zip(tile_ends, tiles, strict=True)]
    for owner, many in enumerate(tiles):
        table += [owner] * many
    return _to(_table(table), device), tile_ends[-1]


def _runs(counts: torch.Tensor, m: int, block_m: int) -> tuple[torch.Tensor, int]:
    """The same of counts that only the GPU knows: as many tiles as there can be."""
    tiles = (counts + (block_m - 1)) // block_m
    ends, tile_ends = counts.cumsum(0), tiles.cumsum(0)
    row_tiles = m // block_m + len(counts)
    owners = torch.searchsorted(tile_ends, torch.arange(row_tiles, device=counts.device), right=True)
    return torch.cat([ends - counts, ends, tile_ends - tiles, owners]), row_tiles


# -- tables -----------------------------------------------------------------------------------------------------------


def _table(numbers: Sequence[int]) -> torch.Tensor:
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def _to(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, after what was enqueued before on this stream, and without waiting for it.

    What is kept of it is kept for this stream alone (`_stream`): no other one would wait for the copy.
    """
    if device.type != "cuda":
        return table
    if torch.cuda.is_current_stream_capturing():
        raise PluginError(
            "FP8 weights of many tensors cannot be looked up while a CUDA graph is captured",
            {"found": "a stream that captures, and a table that it does not have yet"},
            "run this once on the same stream before the capture",
        )
    return table.pin_memory().to(device, non_blocking=True)


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _is_native(tensor: torch.Tensor) -> bool:
    return bool(tensor.is_cuda)


def _on(device: torch.device) -> Any:
    """Launches go to the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
