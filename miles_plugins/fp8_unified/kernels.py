"""Block-scaled FP8 on a GPU: the functions of `blockwise`, bit for bit, and the product of what they make.

Weights of any shapes are quantised in one launch, each read once and its codes and scales written once, straight into
the buffer that is sent: 3 bytes a weight. A program takes one tile, keeps it in registers, and finds out from two
tables which weight it belongs to. The arithmetic is the reference's: correctly rounded quotients (`div_rn`; Triton's
`/` is an approximation), a product, the GPU's own conversion to E4M3.

Triton's interpreter rounds neither bfloat16 nor E4M3 as a GPU does and multiplies no FP8. What depends on that is
written twice, for a GPU and for the interpreter (`native`); `python -m tests.fp8_kernels cuda` judges the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from miles_plugins.errors import PluginError
from miles_plugins.fp8_unified import blockwise as reference
from miles_plugins.fp8_unified.blockwise import Format, Quantised
from miles_plugins.fp8_unified.bucket import ALIGNMENT, Layout, plan

LARGEST = tl.constexpr(reference.LARGEST)
INFINITY_BITS = tl.constexpr(reference.INFINITY_BITS)
GAP = tl.constexpr(ALIGNMENT)
ROUNDER = tl.constexpr(12582912.0)  # added and taken off again: float32 then holds whole numbers only
FACTS = tl.constexpr(11)
"""Numbers that a program reads about its weight: address, strides, shape, two offsets, first tile, tiles, gaps."""
PER_THREAD = 64
"""Weights a thread holds: a tile of 128 x 128 takes 8 warps, and two tiles fit on a multiprocessor with room left."""
ROWS_TILE, ROWS_WARPS = 4096, 4
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
def _scale(amax_bits, largest: tl.constexpr, power_of_two: tl.constexpr):
    """The scale of a tile, from the bits of its largest magnitude. `largest` is what an infinite quotient becomes."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.full(amax.shape, LARGEST, tl.float32), amax)
    scale = tl.where(scale == float("inf"), largest, scale)
    scale = tl.where((amax_bits == 0) | (amax_bits >= INFINITY_BITS), 1.0, scale)
    if power_of_two:
        scale = (scale.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _inverse(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _codes(x, native: tl.constexpr):
    """E4M3 codes as uint8 of float32: half to even, saturating; NaN and infinity are 0x7F."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if native:
        numbers = tl.where(magnitude == INFINITY_BITS, float("nan"), x)
        return numbers.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    size = tl.minimum(magnitude.to(tl.float32, bitcast=True), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = ((size * 512.0 + ROUNDER) - ROUNDER).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    code = tl.where(size < 0.015625, subnormal, normal) | sign
    return tl.where(magnitude >= INFINITY_BITS, 0x7F, code).to(tl.uint8)


@triton.jit
def _quantise_weights(
    owners, table, bucket, height: tl.constexpr, width: tl.constexpr, largest: tl.constexpr,
    power_of_two: tl.constexpr, wide: tl.constexpr, along: tl.constexpr, aligned: tl.constexpr, native: tl.constexpr,
):  # fmt: skip
    """Program i: a tile of weight `owners[i]`. `along` is the axis of stride 1 (-1: none), `aligned` by 16 bytes."""
    tile = tl.program_id(0)
    facts = table + tl.load(owners + tile).to(tl.int64) * FACTS
    address = tl.load(facts)
    row_step = tl.load(facts + 1)
    column_step = tl.load(facts + 2)
    n = tl.load(facts + 3)
    k = tl.load(facts + 4)
    codes_begin = tl.load(facts + 5)
    scales_begin = tl.load(facts + 6)
    tile -= tl.load(facts + 7).to(tl.int32)
    across = tl.load(facts + 8).to(tl.int32)
    codes_gap = tl.load(facts + 9)
    scales_gap = tl.load(facts + 10)
    source = address.to(tl.pointer_type(tl.uint32 if wide else tl.uint16))
    if aligned:
        source = tl.multiple_of(source, 16)
        codes_begin = tl.multiple_of(codes_begin, 16)
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

    down = tile // across
    first_row = down.to(tl.int64) * height
    first_column = (tile - down * across).to(tl.int64) * width
    rows = first_row + tl.arange(0, height)[:, None]
    columns = first_column + tl.arange(0, width)[None, :]
    inside = (rows < n) & (columns < k)
    bits = tl.load(source + rows * row_step + columns * column_step, mask=inside, other=0)
    scale = _scale(_amax_bits(bits, None, wide), largest, power_of_two)
    codes = _codes(_numbers(bits, wide) * scale, native)
    tl.store(bucket + codes_begin + rows * k + columns, codes, mask=inside)
    scales = (bucket + scales_begin).to(tl.pointer_type(tl.float32))
    tl.store(scales + tile, _inverse(scale))

    if tile == 0:
        places = tl.arange(0, GAP)
        nothing = tl.zeros([GAP], tl.uint8)
        tl.store(bucket + codes_begin + n * k + places, nothing, mask=places < codes_gap)
        size = (n + height - 1) // height * across * 4
        tl.store(bucket + scales_begin + size + places, nothing, mask=places < scales_gap)


@triton.jit
def _quantise_rows(
    x, codes, scales, groups, k, across, row_step, column_step, width: tl.constexpr, many: tl.constexpr,
    largest: tl.constexpr, power_of_two: tl.constexpr, wide: tl.constexpr, native: tl.constexpr,
):  # fmt: skip
    """Program i: `many` groups of `width` numbers of a row, wherever they are; `across` groups are a row."""
    group = tl.program_id(0) * many + tl.arange(0, many)
    row = group // across
    columns = ((group - row * across) * width)[:, None] + tl.arange(0, width)[None, :]
    inside = (group < groups)[:, None] & (columns < k)
    row = row.to(tl.int64)[:, None]
    bits = tl.load(x + row * row_step + columns.to(tl.int64) * column_step, mask=inside, other=0)
    scale = _scale(_amax_bits(bits, 1, wide), largest, power_of_two)
    tl.store(codes + row * k + columns, _codes(_numbers(bits, wide) * scale[:, None], native), mask=inside)
    tl.store(scales + group, _inverse(scale), mask=group < groups)


@triton.jit
def _load_codes(pointer, places, mask, native: tl.constexpr):
    """E4M3 codes to multiply: as they are, or as float32 where there is no FP8 product."""
    if native:
        found = tl.load(pointer.to(tl.pointer_type(tl.float8e4nv), bitcast=True) + places, mask=mask, other=0.0)
    else:
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
def _grouped_linear(
    x, x_scales, weights, y, plan, row_tiles, n, k, count, block_m: tl.constexpr, block_n: tl.constexpr,
    block_k: tl.constexpr, together: tl.constexpr, even: tl.constexpr, aligned: tl.constexpr, native: tl.constexpr,
):  # fmt: skip
    """Program i: a tile [block_m, block_n] of y.

    `weights` [2, count] are the addresses of codes and scales. `plan` is, for each weight, its first row, the row after
    its last and its first tile of rows (3 * count), and then the weight of each tile of rows; `count` for no weight.
    """
    # Programs that run at the same time share rows of x and of the weight: `together` tiles down, then one across.
    program = tl.program_id(0)
    column_tiles = tl.cdiv(n, block_n)
    first = program // (together * column_tiles) * together
    high = tl.minimum(row_tiles - first, together)
    within = program % (together * column_tiles)
    row_tile = first + within % high
    column_tile = within // high
    owner = tl.load(plan + 3 * count + row_tile)
    if owner < count:
        begin = tl.load(plan + owner)
        end = tl.load(plan + count + owner)
        row_tile -= tl.load(plan + 2 * count + owner).to(tl.int32)
        codes = tl.load(weights + owner).to(tl.pointer_type(tl.uint8))
        if aligned:
            codes = tl.multiple_of(codes, 16)
        scales = tl.load(weights + count + owner).to(tl.pointer_type(tl.float32))

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


# -- weights ----------------------------------------------------------------------------------------------------------


def quantise_weights(weights: Sequence[torch.Tensor], format: Format) -> list[Quantised]:
    """`blockwise.quantise_weight` of weights [..., N, K] of any shapes on one device, as views of one buffer."""
    if not weights:
        return []
    layout = plan([weight.shape for weight in weights], format)
    bucket = torch.empty(layout.size, dtype=torch.uint8, device=weights[0].device)
    quantise_into(weights, bucket, layout, format)
    return layout.views(bucket)


def quantise_into(weights: Sequence[torch.Tensor], bucket: torch.Tensor, layout: Layout, format: Format) -> None:
    """The same into a buffer [layout.size] uint8 on the current stream, of which every byte is written.

    Nothing waits for the GPU. The weights may be freed when this returns, on the stream that it ran on.
    """
    layout.check(bucket)
    static = _static(layout, format.block)
    groups: dict[tuple[torch.dtype, int, bool], tuple[list[int], list[tuple[int, int, int]]]] = {}
    for place, (weight, job) in enumerate(zip(_matrices(weights, layout, bucket), static.jobs, strict=True)):
        address, steps = weight.data_ptr(), weight.stride()
        along = 1 if steps[1] == 1 else 0 if steps[0] == 1 else -1
        size = weight.element_size()
        aligned = along >= 0 and job.aligned[along] and not (address % 16 or steps[1 - along] * size % 16)
        places, dynamic = groups.setdefault((weight.dtype, along, aligned), ([], []))
        places.append(place)
        dynamic.append((address, *steps))
    height, width = format.block
    with _on(bucket.device):
        for (dtype, along, aligned), (places, dynamic) in groups.items():
            table = _table(static, places, dynamic)
            owners = static.owners if len(places) == len(static.jobs) else _owners(static.tiles[places])
            _quantise_weights[len(owners),](
                _to(owners, bucket.device),
                _to(table, bucket.device),
                bucket,
                height,
                width,
                torch.finfo(dtype).max,
                format.scale == "power_of_two",
                dtype == torch.float32,
                along,
                aligned,
                _is_native(bucket),
                num_warps=max(1, height * width // (32 * PER_THREAD)),
            )


class _Job(NamedTuple):
    """A matrix of the bucket. `aligned`: whether its part of it is, for a weight with stride 1 along axis 0, axis 1."""

    tiles: int
    aligned: tuple[bool, bool]


class _Static(NamedTuple):
    """What is known of a layout's matrices without the weights: `table` [matrices, 7] int64, see `FACTS`."""

    jobs: list[_Job]
    table: torch.Tensor
    tiles: torch.Tensor
    owners: torch.Tensor


@lru_cache(maxsize=256)
def _static(layout: Layout, block: tuple[int, int]) -> _Static:
    jobs, facts = [], []
    for codes, scales in layout.pairs:
        n, k = codes.shape[-2:]
        down, across = -(-n // block[0]), -(-k // block[1])
        if scales.shape[-2:] != (down, across):
            raise PluginError(
                "this layout is for another block size",
                {"scales": list(scales.shape), "expected": [down, across], "block (N, K)": block},
                "plan it with the format that the weights are quantised with",
            )
        many = codes.size // (n * k) if n * k else 0
        for index in range(many):
            begin, scale_begin = codes.offset + index * n * k, scales.offset + index * down * across * 4
            last = index == many - 1
            facts.append((n, k, begin, scale_begin, across, codes.gap * last, scales.gap * last))
            fits = begin % 16 == 0 and k % 16 == 0
            jobs.append(_Job(down * across, (fits and n % 16 == 0, fits)))
    table = torch.tensor(facts, dtype=torch.int64).view(-1, 7)
    tiles = torch.tensor([job.tiles for job in jobs], dtype=torch.int64)
    return _Static(jobs, table, tiles, _owners(tiles))


def _owners(tiles: torch.Tensor) -> torch.Tensor:
    """[all tiles] int32: the matrix of each."""
    return torch.repeat_interleave(torch.arange(len(tiles), dtype=torch.int32), tiles)


def _matrices(weights: Sequence[torch.Tensor], layout: Layout, bucket: torch.Tensor) -> Iterator[torch.Tensor]:
    pairs = layout.entries[::2]
    if len(weights) != len(pairs):
        raise ValueError(f"{len(weights)} weights for a layout of {len(pairs)}")
    for weight, entry in zip(weights, pairs, strict=True):
        if weight.shape != entry.shape or weight.device != bucket.device:
            raise ValueError(
                f"the layout has {entry.name} {list(entry.shape)} on {bucket.device}, "
                f"not {list(weight.shape)} on {weight.device}"
            )
        if weight.dtype not in (torch.bfloat16, torch.float32):
            reference.quantise_weight(weight, Format())  # says what is wrong with it
        if not weight.numel():
            continue
        if weight.dim() == 2:
            yield weight
        else:
            for index in itertools.product(*map(range, weight.shape[:-2])):
                yield weight[index]


def _table(static: _Static, places: list[int], dynamic: list[tuple[int, int, int]]) -> torch.Tensor:
    chosen = slice(None) if len(places) == len(static.jobs) else places
    known, tiles = static.table[chosen], static.tiles[chosen]
    first = torch.cumsum(tiles, 0) - tiles
    return torch.cat([torch.tensor(dynamic), known[:, :4], first[:, None], known[:, 4:]], dim=1).contiguous()


# -- activations ------------------------------------------------------------------------------------------------------


def quantise_rows(x: torch.Tensor, format: Format) -> Quantised:
    """`blockwise.quantise_rows` of activations [..., M, K], bfloat16 or float32; a view of strides is not copied."""
    if x.dtype not in (torch.bfloat16, torch.float32) or x.dim() < 2:
        return reference.quantise_rows(x, format)  # says what is wrong with it
    k, width = x.shape[-1], format.block[1]
    across = -(-k // width)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(*x.shape[:-1], across, dtype=torch.float32, device=x.device)
    groups, many = scales.numel(), ROWS_TILE // width
    if not groups:
        return Quantised(codes, scales)
    flat = x.detach().reshape(-1, k)
    if groups >= 2**31 - many:
        raise ValueError(f"{groups} groups in one call: more than a launch can number")
    wide = x.dtype == torch.float32
    with _on(x.device):
        _quantise_rows[triton.cdiv(groups, many),](
            flat.view(torch.uint32 if wide else torch.uint16),
            codes.view(torch.uint8),
            scales,
            groups,
            k,
            across,
            *flat.stride(),
            width,
            many,
            torch.finfo(x.dtype).max,
            format.scale == "power_of_two",
            wide,
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
    counts = torch.as_tensor(rows_per_weight, dtype=torch.int64)
    if len(counts) != len(parts) or (not counts.is_cuda and int(counts.sum()) != m):
        found = f"{len(counts)} runs" if counts.is_cuda else f"{len(counts)} runs, {int(counts.sum())} rows"
        raise ValueError(f"{len(parts)} weights and {m} rows, but {found}")
    device = x.codes.device
    y = (torch.zeros if counts.is_cuda else torch.empty)(m, n, dtype=torch.bfloat16, device=device)
    if not y.numel():
        return y
    block_m = 64 if m <= 64 * len(parts) else 128
    plan, row_tiles = _runs(counts, m, block_m)
    addresses = [code.data_ptr() for code, _ in parts]
    aligned = all(address % 16 == 0 for address in addresses)
    addresses += [scale.data_ptr() for _, scale in parts]
    height, width = format.block
    with _on(device):
        _grouped_linear[row_tiles * triton.cdiv(n, height),](
            x.codes.view(torch.uint8),
            x.scale_inv,
            _to(torch.tensor(addresses, dtype=torch.int64), device),
            y,
            _to(plan, device),
            row_tiles,
            n,
            k,
            len(parts),
            block_m,
            height,
            width,
            TOGETHER,
            k % width == 0,
            aligned,
            _is_native(y),
            num_warps=4 if block_m == 64 else 8,
            num_stages=PRODUCT_STAGES,
        )
    return y


def _check_product(x: Quantised, weights: Sequence[Quantised], format: Format) -> int:
    """N of the weights."""
    (m, k), (height, width) = x.codes.shape, format.block
    n, blocks = weights[0].codes.shape[0], -(-k // width)
    device, shapes = x.codes.device, ((n, k), (-(-n // height), blocks))
    if x.scale_inv.shape != (m, blocks) or not (x.codes.is_contiguous() and x.scale_inv.is_contiguous()):
        raise ValueError(f"x has the scales {list(x.scale_inv.shape)}, expected {[m, blocks]}, contiguous")
    for codes, scale_inv in weights:
        if (codes.shape, scale_inv.shape) != shapes or codes.device != device:
            raise ValueError(
                f"a weight has codes {list(codes.shape)} and scales {list(scale_inv.shape)} on {codes.device}; "
                f"expected {[*map(list, shapes)]} on {device}"
            )
        if not (codes.is_contiguous() and scale_inv.is_contiguous()):
            raise ValueError(f"a weight is not contiguous: strides {codes.stride()} and {scale_inv.stride()}")
    return int(n)


def _runs(counts: torch.Tensor, m: int, block_m: int) -> tuple[torch.Tensor, int]:
    """`_grouped_linear`'s plan, int64, and its number of tiles of rows: at least as many as are needed."""
    tiles = (counts + (block_m - 1)) // block_m
    ends, tile_ends = counts.cumsum(0), tiles.cumsum(0)
    row_tiles = m // block_m + len(counts) if counts.is_cuda else int(tile_ends[-1])
    owners = torch.searchsorted(tile_ends, torch.arange(row_tiles, device=counts.device), right=True)
    return torch.cat([ends - counts, ends, tile_ends - tiles, owners]), row_tiles


def _to(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for it."""
    if device.type != "cuda" or table.is_cuda:
        return table
    return table.pin_memory().to(device, non_blocking=True)


def _is_native(tensor: torch.Tensor) -> bool:
    return bool(tensor.is_cuda)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
