"""How slime packs the samples of a microbatch into the one stream of tokens that each rank computes.

Pure: what a rank needs can be cut where the schedule is known, before the rank has it. That it is slime's own layout is
proved in the trainer at every microbatch (`patches/slime/training.py`).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Packing:
    """The parallel layout of a trainer, as far as it decides where a token is computed.

    Attributes:
        context_parallel: ranks that share a sequence.
        tensor_parallel: ranks that share a layer.
        sequence_parallel: whether these share the tokens outside of attention, so also at the routers.
        multiple: the packed stream of a context-parallel rank is padded to a multiple of this many tokens.
        all_gather: whether context parallelism cuts the packed stream once (slime's `--allgather-cp`); else each sample
            is cut by itself, first and last chunk to the first rank, and so on inwards.
    """

    context_parallel: int = 1
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    multiple: int = 1
    all_gather: bool = False

    @classmethod
    def of(cls, args: Namespace) -> Packing:
        """From slime's arguments."""
        return cls(
            context_parallel=args.context_parallel_size,
            tensor_parallel=args.tensor_model_parallel_size,
            sequence_parallel=args.sequence_parallel,
            multiple=args.tensor_model_parallel_size * args.data_pad_size_multiplier,
            all_gather=getattr(args, "allgather_cp", False),  # slime v0.2.2 has no such flag
        )

    @property
    def token_ranks(self) -> list[tuple[int, int]]:
        """(context rank, tensor rank) of the ranks whose routers see different tokens."""
        tensor_ranks = range(self.tensor_parallel if self.sequence_parallel else 1)
        return [(context, tensor) for context in range(self.context_parallel) for tensor in tensor_ranks]

    def positions(self, lengths: Sequence[int], context_rank: int = 0) -> torch.Tensor:
        """[packed length] int64: position of each token in the samples' concatenation, -1 for padding.

        `lengths` are those of the microbatch's samples. The packed stream is the one of a context-parallel rank, as
        attention sees it.
        """
        import torch

        total = sum(lengths)
        if self.all_gather:
            whole = _padded(torch.arange(total), self.context_parallel * self.multiple)
            return whole.chunk(self.context_parallel)[context_rank]
        each = torch.arange(total).split(list(lengths))
        cut = [
            torch.arange(0),
            *(self._zigzag(sample, context_rank) for sample in each),
        ]  # there may be no sample at all
        return _padded(torch.cat(cut), self.multiple)

    def _zigzag(self, sample: torch.Tensor, context_rank: int) -> torch.Tensor:
        import torch

        if self.context_parallel == 1:
            return sample
        chunks = _padded(sample, 2 * self.context_parallel).chunk(2 * self.context_parallel)
        return torch.cat([chunks[context_rank], chunks[-1 - context_rank]])

    def local(self, positions: torch.Tensor, tensor_rank: int = 0) -> torch.Tensor:
        """The part of the packed stream that reaches this rank's routers, in their order."""
        if not self.sequence_parallel:
            return positions
        return positions.chunk(self.tensor_parallel)[tensor_rank]


@dataclass(frozen=True)
class Rank:
    """Where a trainer process stands among the others: its data-, context- and tensor-parallel rank."""

    data: int = 0
    context: int = 0
    tensor: int = 0


def _padded(positions: torch.Tensor, multiple: int) -> torch.Tensor:
    import torch

    return torch.nn.functional.pad(positions, (0, -len(positions) % multiple), value=-1)


@dataclass(frozen=True)
class Schedule:
    """Who trains on what in one rollout.

    Attributes:
        lengths: number of tokens of each sample of the training data.
        microbatches: for each data-parallel rank, the sample indices of each of its microbatches, in order.
        scheduled: False on slime before v0.3.0, whose trainers choose their microbatches themselves: `microbatches`
            then holds, for each rank, one list of all its samples.
    """

    lengths: Sequence[int]
    microbatches: Sequence[Sequence[Sequence[int]]]
    scheduled: bool = True
