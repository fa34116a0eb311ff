"""Block-scaled FP8 (E4M3): the one definition of codes and scales, for trainer, weight sync and converter.

A tile of a weight (128 x 128), or of an activation (1 x 128), shares one scale. The rule is TransformerEngine's, step
for step in float32, so that what a TE trainer computes with and what the engine receives are the same bits:

    scale     = 448 / amax              correctly rounded; 1 for an amax of 0, infinity or NaN; the largest number of
                                        the input's dtype where the quotient overflows
    scale     = scale & 0xFF800000      power_of_two only: rounded down
    code      = e4m3(x * scale)         to the nearest, half to even, saturating; -0.0 keeps its sign
    scale_inv = 1 / scale               correctly rounded: value = code * scale_inv

(transformer_engine/common/recipe/recipe_common.cuh, transpose/quantize_transpose_square_blockwise.cu.) Formulas that
are near are other bits: those of slime's converter, `x / (amax / 448)`, and of its sync kernel,
`x * (1 / (amax / 448))`, have four in ten scales and one or two codes in ten thousand different. A tile at the edge is
quantised as if zeros followed.

What is no number stays visible: NaN and infinity become the code 0x7F (NaN), in weights and activations, with either
scale. Their tile has the scale 1: its other values are coarse, and other tiles are not touched. TE saturates an
infinity to 448 instead; only in that do the codes differ. With powers of two a number above 1.9 * 2**127 can come back
as infinity, as with TE: its code and scale multiply to 2**128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from miles_plugins.errors import PluginError

if TYPE_CHECKING:
    import torch

LARGEST = 448.0
"""The largest number in E4M3 (`fn`: no infinity, one NaN of each sign)."""
SIZES = (32, 64, 128)
POWER_OF_TWO_BITS = -0x800000  # 0xFF800000 as int32: sign and exponent
INFINITY_BITS = 0x7F800000
SMALLEST_E8M0_BITS = 0x400000  # 2**-127, subnormal: the exponent byte 0
PER_WORD = 4
"""Exponents in one int32."""
ROWS_PER_SCALE = 128
"""Rows that share a scale in SGLang's packed layout."""
TMA_ROWS = 4  # DeepGEMM aligns a column of int32 to 16 bytes


@dataclass(frozen=True)
class Format:
    """How weights and activations are quantised.

    Attributes:
        block: rows (N) and columns (K) of a weight's tile. An activation's tile is 1 x `block[1]`.
        scale: `power_of_two` is what Blackwell's UE8M0 scales can hold.
    """

    block: tuple[int, int] = (128, 128)
    scale: Literal["float32", "power_of_two"] = "float32"

    def __post_init__(self) -> None:
        if len(self.block) != 2 or any(type(size) is not int or size not in SIZES for size in self.block):
            raise PluginError(
                "this block size is not supported",
                {"block (N, K)": self.block, "expected": f"a tuple of two of {', '.join(map(str, SIZES))}"},
                "use (128, 128): the block of TransformerEngine, DeepGEMM and the published checkpoints",
            )
        if self.scale not in ("float32", "power_of_two"):
            raise PluginError(
                "this kind of scale is not supported",
                {"scale": self.scale, "expected": "float32 or power_of_two"},
                "power_of_two is `scale_fmt: ue8m0`, and TransformerEngine's NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0",
            )


class Quantised(NamedTuple):
    """Codes [..., N, K] float8_e4m3fn and the factors that make values of them, float32.

    `scale_inv` is [..., ceil(N / block N), ceil(K / block K)] for weights, [..., M, ceil(K / block K)] for activations,
    [1] for `per_tensor` and [..., N, 1] for `per_channel`.
    """

    codes: torch.Tensor
    scale_inv: torch.Tensor


class Requantised(NamedTuple):
    """What `requantise_power_of_two` made, and how many values are other ones than before: 0 is exact."""

    quantised: Quantised
    changed: int


def quantise_weight(weight: torch.Tensor, format: Format) -> Quantised:
    """The codes and scales of weights [..., N, K], bfloat16 or float32, with any strides."""
    return _quantise(weight, format.block, format.scale)


def quantise_rows(x: torch.Tensor, format: Format) -> Quantised:
    """The same of activations [..., M, K]: every row has scales of its own."""
    return _quantise(x, (1, format.block[1]), format.scale)


def per_tensor(weight: torch.Tensor) -> Quantised:
    """One scale [1] for all of a weight, float32 throughout.

    slime's own divides a bfloat16 tensor by a scale of no dimensions, which PyTorch rounds to bfloat16: 3 % of the
    codes are other ones, under a stored scale that they were not made with.
    """
    import torch

    x = _numbers(weight)
    scale = _scale(x.abs().amax() if x.numel() else x.new_zeros(()), weight.dtype, "float32")
    return Quantised(_codes(x * scale), (torch.ones_like(scale) / scale).reshape(1))


def per_channel(weight: torch.Tensor) -> Quantised:
    """One scale for each row: [..., N, 1]."""
    return _quantise(weight, (1, max(weight.shape[-1], 1)), "float32")


def dequantise(quantised: Quantised, block: Format | tuple[int, int]) -> torch.Tensor:
    """The values [..., N, K] float32 of weights and of activations: code times scale, rounded once."""
    codes, scale_inv = quantised
    height, width = block.block if isinstance(block, Format) else block
    rows, columns = codes.shape[-2:]
    expanded = scale_inv.reshape(1, 1) if scale_inv.dim() < 2 else scale_inv
    for axis, size, length in ((-2, height, rows), (-1, width, columns)):
        found = expanded.shape[axis]
        if found == _ceil(length, size):
            expanded = expanded.repeat_interleave(size, axis).narrow(axis, 0, length)
        elif found != length and found != 1:
            raise PluginError(
                "these scales do not belong to these codes",
                {
                    "codes": list(codes.shape),
                    "scale_inv": list(scale_inv.shape),
                    "block (N, K)": (height, width),
                    "expected": f"one for each block, {[_ceil(rows, height), _ceil(columns, width)]}, or each row",
                },
                "check that the checkpoint's weight_block_size is the one these were quantised with",
            )
    return codes.float() * expanded


def fake_quantise_weight(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """Weights [..., N, K] as the engine will have them, rounded to bfloat16."""
    return dequantise(quantise_weight(weight, format), format).bfloat16()


def fake_quantise_rows(x: torch.Tensor, format: Format) -> torch.Tensor:
    """Activations [..., M, K] as the engine will have them, rounded to bfloat16."""
    return dequantise(quantise_rows(x, format), format).bfloat16()


# -- power-of-two scales as the exponents that the engine keeps -------------------------------------------------------


def is_power_of_two(scale_inv: torch.Tensor) -> bool:
    """Whether UE8M0 can hold every one of these float32 scales: 2**-127 ... 2**127."""
    import torch

    bits = scale_inv.contiguous().view(torch.int32)
    whole = ((bits & 0x7FFFFF) == 0) & (bits > 0) & (bits < INFINITY_BITS)
    return bool((whole | (bits == SMALLEST_E8M0_BITS)).all())


def pack_ue8m0(scale_inv: torch.Tensor, rows: int) -> torch.Tensor:
    """The scales [..., ceil(rows / 128), k] float32 of weights with `rows` rows, as SGLang's DeepGEMM keeps them.

    Returns [..., rows, ceil(k / 4)] int32: every row has its block's exponents, four to a word, the first in the lowest
    byte; words past the last block are filled with 0. Rows are next to each other in memory, and a column begins every
    `ceil(rows / 4) * 4` words (the alignment of TMA). The same values as `transform_scale_ue8m0`
    (sglang/srt/layers/quantization/fp8_utils.py), which needs a GPU.
    """
    import torch

    if not is_power_of_two(scale_inv):
        raise PluginError(
            "these scales cannot be packed as UE8M0",
            {"found": "scales that are no powers of two", "expected": "2**-127 ... 2**127"},
            "quantise with scale='power_of_two'; `requantise_power_of_two` converts codes that exist, with a loss",
        )
    if scale_inv.shape[-2] != _ceil(rows, ROWS_PER_SCALE):
        raise PluginError(
            "these scales do not belong to this weight",
            {"scale_inv": list(scale_inv.shape), "rows": rows, "expected rows of scales": _ceil(rows, ROWS_PER_SCALE)},
            f"UE8M0 is packed for blocks of {ROWS_PER_SCALE} rows",
        )
    exponents = scale_inv.contiguous().view(torch.int32) >> 23
    words = _ceil(exponents.shape[-1], PER_WORD)
    bytes_ = torch.nn.functional.pad(exponents, (0, words * PER_WORD - exponents.shape[-1])).unflatten(-1, (words, -1))
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=scale_inv.device)
    packed = (bytes_ << shifts).sum(dim=-1, dtype=torch.int32)
    columns = packed.new_zeros(*packed.shape[:-2], words, _ceil(rows, TMA_ROWS) * TMA_ROWS)
    columns[..., :rows] = packed.repeat_interleave(ROWS_PER_SCALE, -2)[..., :rows, :].transpose(-1, -2)
    return columns.transpose(-1, -2)[..., :rows, :]


def unpack_ue8m0(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The scales [..., ceil(rows / 128), columns] float32 of `pack_ue8m0`'s words; `columns` is ceil(K / 128)."""
    import torch

    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=packed.device)
    exponents = (packed[..., ::ROWS_PER_SCALE, :].unsqueeze(-1) >> shifts & 0xFF).flatten(-2)[..., :columns]
    bits = torch.where(exponents == 0, SMALLEST_E8M0_BITS, exponents << 23)
    return bits.to(torch.int32).contiguous().view(torch.float32)


def requantise_power_of_two(quantised: Quantised, format: Format) -> Requantised:
    """Weights with power-of-two scales, from weights with any: over bfloat16 values, as SGLang does when it loads.

    Nothing changes if the scales were powers of two (a code has four significant bits, bfloat16 holds eight), although
    code and scale may both move by a factor of two. From float32 scales it is a second quantisation: `changed` says of
    how many values.
    """
    import torch

    before = dequantise(quantised, format)
    after = quantise_weight(before.bfloat16(), Format(format.block, "power_of_two"))
    values = dequantise(after, format)
    differs = (values != before) & ~(torch.isnan(values) & torch.isnan(before))
    return Requantised(after, int(differs.sum()))


# -- the rule ---------------------------------------------------------------------------------------------------------


def _quantise(tensor: torch.Tensor, block: tuple[int, int], kind: str) -> Quantised:
    import torch

    x = _numbers(tensor)
    (rows, columns), (height, width) = x.shape[-2:], block
    down, across = _ceil(rows, height), _ceil(columns, width)
    padded = torch.nn.functional.pad(x, (0, across * width - columns, 0, down * height - rows))
    tiles = padded.unflatten(-1, (across, width)).unflatten(-3, (down, height))
    scale = _scale(tiles.abs().amax(dim=(-3, -1)), tensor.dtype, kind)
    scaled = (tiles * scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2)[..., :rows, :columns]
    return Quantised(_codes(scaled).contiguous(), torch.ones_like(scale) / scale)


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if tensor.dtype not in (torch.bfloat16, torch.float32) or tensor.dim() < 2:
        raise PluginError(
            "this tensor cannot be quantised to FP8",
            {
                "found": f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}",
                "expected": "[..., N, K] bfloat16 or float32",
            },
            "leave this module out: it is no matrix of weights or activations",
        )
    return tensor.detach().float()


def _scale(amax: torch.Tensor, dtype: torch.dtype, kind: str) -> torch.Tensor:
    import torch

    # Two tensors: a Python number over a tensor is its reciprocal, rounded, times the number.
    scale = torch.full_like(amax, LARGEST) / amax
    scale = torch.where(scale.isinf(), torch.finfo(dtype).max, scale)
    scale = torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)
    if kind == "power_of_two":
        scale = (scale.view(torch.int32) & POWER_OF_TWO_BITS).view(torch.float32)
    return scale


def _codes(scaled: torch.Tensor) -> torch.Tensor:
    import torch

    # The cast of a CPU has no saturation: what lies beyond 464 becomes NaN. And one NaN is chosen, 0x7F.
    numbers = torch.where(scaled.isfinite(), scaled, torch.nan)
    return numbers.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _ceil(length: int, size: int) -> int:
    return -(-length // size)
