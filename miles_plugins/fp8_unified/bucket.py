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
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from miles_plugins.errors import PluginError
from miles_plugins.fp8_unified.blockwise import Format, Quantised

if TYPE_CHECKING:
    import torch

ALIGNMENT = 128
"""A line of the GPU's cache; TMA and loads of 16 bytes need less."""
SUFFIX = "_scale_inv"  # `x.weight` has `x.weight_scale_inv`: the names in a block-FP8 checkpoint
CODES: Final = "float8_e4m3fn"
SCALES: Final = "float32"
BYTES = {CODES: 1, SCALES: 4}
MOST_ALTERNATE = 4
"""Tensors of one shape that may alternate, as an expert's gate and up do, for their views to be made together."""


class Entry(NamedTuple):
    """One tensor of a bucket; `offset` in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def size(self) -> int:
        """Its bytes, without the gap behind it."""
        return math.prod(self.shape) * BYTES[self.dtype]


class _Run(NamedTuple):
    """Entries (by number) that one strided view of the bucket holds, one after the other along its first axis."""

    numbers: list[int]
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int


@dataclass(frozen=True, eq=False)
class Layout:
    """All tensors of a bucket: codes and scales of each weight in turn. Compared by identity; `plan` keeps them.

    Attributes:
        shapes: of the weights.
        offsets: of codes and scales, in bytes; one more for the end.
    """

    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    block: tuple[int, int]
    names: tuple[str, ...] | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.offsets[-1]

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All tensors, in order."""
        names = map(str, range(len(self.shapes))) if self.names is None else self.names
        named = [each for name in names for each in (name, name + SUFFIX)]
        return tuple(
            [Entry(name, *kind, begin) for name, kind, begin in zip(named, self._kinds, self.offsets[:-1], strict=True)]
        )

    @cached_property
    def tiles(self) -> int:
        """Of all weights: as many as there are scales."""
        return sum([math.prod(shape) for shape, _ in self._kinds[1::2]])

    @cached_property
    def plain(self) -> bool:
        """Whether all weights are matrices, and none is empty."""
        return all(len(shape) == 2 and 0 not in shape for shape in self.shapes)

    @cached_property
    def _kinds(self) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of each tensor."""
        scales = {shape: _scales(shape, self.block) for shape in self.shapes}
        return [each for shape in self.shapes for each in ((shape, CODES), (scales[shape], SCALES))]

    def views(self, bucket: torch.Tensor) -> list[Quantised]:
        """The weights in a bucket [size] uint8, without a copy."""
        import torch

        self.check(bucket)
        whole = bucket[: self.size]
        return self.views_of(whole.view(torch.float8_e4m3fn), whole.view(torch.float32))

    def views_of(self, codes: torch.Tensor, scales: torch.Tensor) -> list[Quantised]:
        """The same of one buffer seen as codes and as scales."""
        found: list[Any] = [None] * (2 * len(self.shapes))
        for numbers, dtype, shape, strides, begin in self._runs:
            flat = codes if dtype == CODES else scales
            view = flat.as_strided(shape, strides, flat.storage_offset() + begin)
            if len(numbers) == 1:
                found[numbers[0]] = view
            else:
                for number, part in zip(numbers, view.unbind(), strict=True):
                    found[number] = part
        return [Quantised(*pair) for pair in zip(found[::2], found[1::2], strict=True)]

    @cached_property
    def _runs(self) -> list[_Run]:
        """All tensors, in as few runs as are easily found: a view made by `unbind` costs a third of one made alone."""
        alike: dict[tuple[tuple[int, ...], str], list[int]] = {}
        for number, kind in enumerate(self._kinds):
            alike.setdefault(kind, []).append(number)
        runs = []
        for (shape, dtype), numbers in alike.items():
            size = BYTES[dtype]
            strides = tuple([math.prod(shape[axis + 1 :]) for axis in range(len(shape))])
            for part in self._fewest(numbers):
                begin, *others = [self.offsets[number] // size for number in part[:2]]
                if others:
                    run = _Run(part, dtype, (len(part), *shape), (others[0] - begin, *strides), begin)
                else:
                    run = _Run(part, dtype, shape, strides, begin)
                runs.append(run)
        return runs

    def _fewest(self, numbers: list[int]) -> list[list[int]]:
        """Tensors of one kind, cut where their distance changes: the gates of experts, their ups, ..."""
        best = [[number] for number in numbers]
        for every in range(1, MOST_ALTERNATE + 1):
            runs = [run for first in range(every) for run in self._cut(numbers[first::every])]
            best = min(best, runs, key=len)
            if len(best) <= every:
                break
        return best

    def _cut(self, numbers: list[int]) -> list[list[int]]:
        runs, step = [numbers[:1]], None
        for before, number in pairwise(numbers):
            distance = self.offsets[number] - self.offsets[before]
            if step is None or distance == step:
                runs[-1].append(number)
                step = distance
            else:
                runs.append([number])
                step = None
        return [run for run in runs if run]

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
    if isinstance(shapes, Mapping):
        return _plan(tuple(map(tuple, shapes.values())), format.block, tuple(shapes))
    return _plan(tuple(map(tuple, shapes)), format.block)


@lru_cache(maxsize=256)
def _plan(shapes: tuple[tuple[int, ...], ...], block: tuple[int, int], names: tuple[str, ...] | None = None) -> Layout:
    offset, offsets = 0, [0]
    sizes: dict[tuple[int, ...], tuple[int, int]] = {}
    for number, shape in enumerate(shapes):
        if shape not in sizes:
            if len(shape) < 2:
                raise PluginError(
                    f"{names[number] if names else number} cannot be quantised to FP8",
                    {"shape": list(shape), "expected": "[..., N, K]"},
                    "leave it out: it is no matrix",
                )
            codes, scales = math.prod(shape), math.prod(_scales(shape, block)) * BYTES[SCALES]
            sizes[shape] = codes + -codes % ALIGNMENT, scales + -scales % ALIGNMENT
        for size in sizes[shape]:
            offset += size
            offsets.append(offset)
    return Layout(shapes, tuple(offsets), block, names)


def _scales(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
