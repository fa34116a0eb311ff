"""FP8 weights that are quantised before their ranks are gathered: half the bytes, and each rank quantises its own.

A parameter [N, K] travels as uint8 [N, blocks * 132]: each row has, for each block of 128 columns, the 128 codes and
the four bytes of the float32 scale of their tile. So it can be cut and joined along rows and along whole blocks, as
slime's collectives do with the parameter itself: over tensor-parallel ranks along either dimension, gate and up halves
apart, experts one by one. What comes out is bit for bit what quantising the gathered weight gives, because every tile
lies on one rank; `fits` says where it does.

How slime lays out one parameter's rows in the checkpoint's tensors is not copied from it: its own converter is shown a
tensor of row numbers once.

A GPU quantises and weaves in one launch, and takes a gathered parameter apart in another (`kernels`); the bytes are
those of the functions here.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from miles_plugins.errors import UpstreamError
from miles_plugins.fp8_unified.blockwise import Format, Quantised
from miles_plugins.fp8_unified.quantised import quantise_weights

if TYPE_CHECKING:
    import torch

SCALE_BYTES = 4
Convert = Callable[["torch.Tensor"], Sequence[tuple[str, "torch.Tensor"]]]
"""slime's converter of one parameter: names and tensors of the checkpoint, without a quantisation."""


def shape_of(shape: Sequence[int], format: Format) -> tuple[int, int]:
    """[N, bytes] of a parameter [N, K] on its way."""
    n, k = shape
    return n, k + SCALE_BYTES * math.ceil(k / format.block[1])


def fits(args: Namespace, name: str, shape: Sequence[int], dim: int | None, format: Format) -> bool:
    """Whether each tile of the checkpoint's tensors lies within this rank's part of a parameter.

    Args:
        name: Megatron's, as "decoder.layers.3.self_attention.linear_qkv".
        shape: [N, K] of the part.
        dim: along which it is divided over ranks; None for a whole parameter.
    """
    rows, columns = format.block
    n, k = shape
    if (dim == 0 and n % rows) or (dim == 1 and k % columns):
        return False
    if name.endswith(".linear_fc1"):  # gate and up, one after the other
        return n % (2 * rows) == 0
    if name.endswith(".linear_qkv"):  # heads of query, key and value, by groups
        size, groups = args.kv_channels, args.num_query_groups or args.num_attention_heads
        return bool(size % rows == 0 and n % ((args.num_attention_heads // groups + 2) * size) == 0)
    # Of latent attention slime sends two parameters' tensors together, whichever comes last.
    return re.search(r"\.linear_(q|kv)_down_proj$", name) is None


def encode(parameters: Sequence[torch.Tensor], format: Format) -> list[torch.Tensor]:
    """The bytes of parameters [N, K] bfloat16 of any shapes, on one device; a GPU makes all of them in one launch."""
    if parameters and parameters[0].is_cuda:
        from miles_plugins.fp8_unified import kernels

        return kernels.quantise_woven(parameters, format)
    return [_woven(quantised, format) for quantised in quantise_weights(parameters, format)]


def _woven(quantised: Quantised, format: Format) -> torch.Tensor:
    import torch

    codes, scale_inv = quantised
    rows, columns = format.block
    n, k = codes.shape
    whole = k // columns
    scales = scale_inv.repeat_interleave(rows, dim=0)[:n].contiguous().view(torch.uint8).view(n, -1, SCALE_BYTES)
    plain = codes.view(torch.uint8)
    woven = torch.empty(shape_of(codes.shape, format), dtype=torch.uint8, device=codes.device)
    blocks = woven[:, : whole * (columns + SCALE_BYTES)].view(n, whole, columns + SCALE_BYTES)
    blocks[..., :columns] = plain[:, : whole * columns].view(n, whole, columns)
    blocks[..., columns:] = scales[:, :whole]
    if k % columns:
        woven[:, -SCALE_BYTES - k % columns :] = torch.cat([plain[:, whole * columns :], scales[:, whole]], dim=1)
    return woven


def unwoven(woven: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] uint8, and the scales [ceil(N / rows of a tile), blocks] float32 of the rows that begin tiles."""
    import torch

    if woven.is_cuda:
        from miles_plugins.fp8_unified import kernels

        return kernels.unweave(woven, format)
    rows, columns = format.block
    n, size = woven.shape
    whole, rest = divmod(size, columns + SCALE_BYTES)
    blocks = woven[:, : whole * (columns + SCALE_BYTES)].reshape(n, whole, columns + SCALE_BYTES)
    codes, scales = blocks[..., :columns].reshape(n, -1), blocks[::rows, :, columns:]
    if rest:
        codes = torch.cat([codes, woven[:, -rest:-SCALE_BYTES]], dim=1)
        scales = torch.cat([scales, woven[::rows, None, -SCALE_BYTES:]], dim=1)
    return codes.contiguous(), scales.contiguous().view(torch.float32).squeeze(-1)


def decode(name: str, woven: torch.Tensor, convert: Convert, format: Format) -> list[tuple[str, Quantised]]:
    """The checkpoint's tensors of one gathered parameter: name with codes and scales.

    Raises:
        UpstreamError: slime's converter does more than to pick rows, or its rows do not begin where tiles do.
    """
    import torch

    codes, scales = unwoven(woven, format)
    layout = _layout(name, codes, convert, format)
    return [
        (converted, Quantised(tensor.contiguous().view(torch.float8_e4m3fn), scales[tiles]))
        for (converted, tensor), tiles in zip(convert(codes), layout, strict=True)
    ]


_layouts: dict[tuple[str, tuple[int, ...], torch.device], list[slice | torch.Tensor]] = {}


def _layout(name: str, codes: torch.Tensor, convert: Convert, format: Format) -> list[slice | torch.Tensor]:
    """Which of the parameter's tiles, from its first row on, each of the checkpoint's tensors has, in order.

    A slice where they follow each other; else their numbers, on the codes' device.
    """
    key = re.sub(r"\d+", "#", name), tuple(codes.shape), codes.device
    if key not in _layouts:
        k = codes.shape[1]
        found = [_tiles(converted, rows, k, format) for converted, rows in _numbered(codes.shape, convert)]
        _layouts[key] = [_sliced(tiles, codes.device) for tiles in found]
    return _layouts[key]


def _numbered(shape: Sequence[int], convert: Convert) -> Sequence[tuple[str, torch.Tensor]]:
    """What the converter makes of the numbers of rows: on the CPU, and in memory only where it insists."""
    import torch

    n, k = shape
    numbers = torch.arange(n, dtype=torch.int32)[:, None].expand(n, k)
    try:
        return convert(numbers)
    except RuntimeError:  # a `view` that strides do not allow
        return convert(numbers.contiguous())


def _sliced(tiles: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    first, count = int(tiles[0]) if len(tiles) else 0, len(tiles)
    return slice(first, first + count) if tiles.tolist() == list(range(first, first + count)) else tiles.to(device)


def _tiles(name: str, rows: torch.Tensor, k: int, format: Format) -> torch.Tensor:
    import torch

    tile = format.block[0]
    numbers = rows[:, 0].long() if rows.dim() == 2 else rows.new_zeros(0)
    begins = numbers[::tile]
    run = torch.arange(len(numbers)) % tile
    expected = begins.repeat_interleave(tile)[: len(numbers)] + run
    # One scale serves a whole tile: its rows must be those of one tile of the parameter, from the first on.
    if rows.shape[1:] != (k,) or not (rows == expected[:, None]).all() or (begins % tile).any():
        raise UpstreamError(
            f"slime makes {name} of its parameter in a way that FP8 weights cannot go along with",
            {
                "shape": list(rows.shape),
                "expected": f"rows of the parameter, {k} columns each, in whole tiles of {tile}",
            },
            "report this, and use --fp8-gather bf16 meanwhile",
        )
    return begins // tile
