"""One flat buffer for many quantised weights: what lies where.

SGLang's FlattenedTensorBucket puts tensors one after the other without a gap. Codes of an odd number of bytes before
float32 scales are then an error ("storage_offset is not divisible by 4"), or a misaligned read. Here every tensor
begins at a multiple of 128 bytes, and the gaps are zero, so that equal weights are equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal

from miles_plugins.errors import PluginError
from miles_plugins.fp8_unified.blockwise import Format, Quantised

if TYPE_CHECKING:
    import torch

ALIGNMENT = 128
"""A line of the GPU's cache; TMA and loads of 16 bytes need less."""
SUFFIX = "_scale_inv"  # `x.weight` has `x.weight_scale_inv`: the names in a block-FP8 checkpoint
BYTES = {"float8_e4m3fn": 1, "float32": 4}


@dataclass(frozen=True)
class Entry:
    """One tensor of a bucket; `offset` in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float8_e4m3fn", "float32"]
    offset: int

    @property
    def size(self) -> int:
        """Its bytes, without the gap behind it."""
        return math.prod(self.shape) * BYTES[self.dtype]

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Of a contiguous tensor, in elements."""
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    @property
    def gap(self) -> int:
        """Zero bytes behind it."""
        return -self.size % ALIGNMENT


@dataclass(frozen=True, eq=False)
class Layout:
    """All tensors of a bucket: codes and scales of each weight in turn. Compared by identity; `plan` keeps them."""

    entries: tuple[Entry, ...]
    size: int

    @cached_property
    def pairs(self) -> tuple[tuple[Entry, Entry], ...]:
        """Codes and scales of each weight."""
        return tuple(zip(self.entries[::2], self.entries[1::2], strict=True))

    def views(self, bucket: torch.Tensor) -> list[Quantised]:
        """The weights in a bucket [size] uint8, without a copy."""
        import torch

        self.check(bucket)
        whole = bucket[: self.size]
        of_dtype = {name: whole.view(getattr(torch, name)) for name in BYTES}
        begins = {name: view.storage_offset() for name, view in of_dtype.items()}

        def view(entry: Entry) -> torch.Tensor:
            begin = begins[entry.dtype] + entry.offset // BYTES[entry.dtype]
            return of_dtype[entry.dtype].as_strided(entry.shape, entry.strides, begin)

        return [Quantised(view(codes), view(scale_inv)) for codes, scale_inv in self.pairs]

    def check(self, bucket: torch.Tensor) -> None:
        """Raise PluginError unless this is a buffer that the layout fits into."""
        import torch

        fits = bucket.dtype == torch.uint8 and bucket.dim() == 1 and bucket.is_contiguous()
        if not fits or bucket.numel() < self.size or bucket.data_ptr() % 16:
            raise PluginError(
                "this buffer cannot hold the quantised weights",
                {
                    "found": f"{list(bucket.shape)} {str(bucket.dtype).removeprefix('torch.')}, "
                    f"at an address that is {bucket.data_ptr() % 16} modulo 16",
                    "expected": f"[{self.size}] uint8 or more, contiguous, at a multiple of 16 bytes",
                },
                "allocate one buffer a bucket, or cut a large one at multiples of 128 bytes",
            )


def plan(shapes: Mapping[str, Sequence[int]] | Sequence[Sequence[int]], format: Format) -> Layout:
    """Where codes and scales of weights [..., N, K] of these shapes go. Without names they are called 0, 1, ..."""
    named = shapes.items() if isinstance(shapes, Mapping) else ((str(i), shape) for i, shape in enumerate(shapes))
    return _plan(tuple([(name, tuple(shape)) for name, shape in named]), format.block)


@lru_cache(maxsize=256)
def _plan(shapes: tuple[tuple[str, tuple[int, ...]], ...], block: tuple[int, int]) -> Layout:
    entries: list[Entry] = []
    offset = 0
    for name, shape in shapes:
        if len(shape) < 2:
            raise PluginError(
                f"{name} cannot be quantised to FP8",
                {"shape": list(shape), "expected": "[..., N, K]"},
                "leave it out: it is no matrix",
            )
        scales = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        codes = Entry(name, shape, "float8_e4m3fn", offset)
        scale_inv = Entry(name + SUFFIX, scales, "float32", offset + codes.size + codes.gap)
        entries += [codes, scale_inv]
        offset = scale_inv.offset + scale_inv.size + scale_inv.gap
    return Layout(tuple(entries), offset)
