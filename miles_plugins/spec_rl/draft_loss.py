"""What the draft is trained on: which tokens it is given, which it shall predict, and what its loss is.

Pure. The draft (Megatron's multi-token prediction) is a chain of layers. The layer of depth d = 1, 2, … stands at
position i with the trunk's state of i and the embedding of token i + d, and predicts token i + d + 1 of the same
sample. Megatron gets there by rolling the packed stream, which needs its neighbours in a context-parallel ring; here
every rank has the whole samples of its microbatch, and picks what it needs by position.

Shapes: N samples of a microbatch with `total` tokens together; T positions of this rank's packed stream, padding
included (`Microbatch.stream`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from miles_plugins import Microbatch, PluginError

if TYPE_CHECKING:
    import torch

CORRECT, DOCKER = CONVENTIONS = ("correct", "docker")
"""Which positions are trained.

correct: where the token to be predicted is one that the loss mask has, and no other.
docker: as the Megatron of slime's image does since v0.2.2, for runs that are compared with it. It shifts a mask that
    is aligned with the labels already once more: the last token before each trained stretch is trained, and the last
    one of each stretch (the end-of-sequence token) never. Each context-parallel rank takes a mean of its own there.
"""


@dataclass(frozen=True)
class Targets:
    """What the draft learns from one microbatch, on one rank; item d - 1 of each tuple belongs to depth d.

    Attributes:
        inputs: [1, T] int64, the tokens to be embedded; 0 where the sample has ended.
        labels: [1, T] int64, the tokens to be predicted; 0 where the sample has ended.
        masks: [1, T] bool, the positions that are trained.
        counts: [] int64, how many there are on all ranks that share the samples.
        ranks: how many ranks share them; gradients are averaged over these.
    """

    inputs: tuple[torch.Tensor, ...]
    labels: tuple[torch.Tensor, ...]
    masks: tuple[torch.Tensor, ...]
    counts: tuple[torch.Tensor, ...]
    ranks: int = 1

    def total(self, depth: int, losses: torch.Tensor) -> torch.Tensor:
        """[] in the dtype of `losses` [1, T], of this depth (from 1): their sum, this rank's part.

        Exactly 0 where nothing is trained, whatever the losses of other positions are; and so is its gradient.
        """
        return losses.where(self.masks[depth - 1], losses.new_zeros(())).sum()

    def mean(self, depth: int, losses: torch.Tensor) -> torch.Tensor:
        """[] likewise: the mean over the microbatch, in parts whose mean over the ranks it is."""
        return self.total(depth, losses) * self.ranks / self.counts[depth - 1].clamp(min=1)


def make_targets(
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    trained: torch.Tensor,
    positions: torch.Tensor,
    depths: int,
    *,
    ranks: int = 1,
    convention: str = CORRECT,
) -> Targets:
    """What a draft of so many depths learns from one microbatch.

    Args:
        tokens: [total] int64, the samples' tokens in a row.
        cu_seqlens: [N + 1] int64, where each sample begins, and the end of the last; without padding.
        trained: [total] bool, whether the loss mask has this token (`trained_tokens`).
        positions: [T] int64, where the tokens of this rank come from in `tokens`; -1 for padding.
        ranks: context-parallel ranks, among which the samples are cut.
        convention: one of CONVENTIONS.
    """
    import torch

    if convention not in CONVENTIONS:
        raise PluginError(
            "there is no such convention", {"found": convention, "known": ", ".join(CONVENTIONS)}, "name one of them"
        )
    device = tokens.device
    bounds, here = cu_seqlens.to(device), positions.to(device)
    whole = torch.arange(len(tokens), device=device)
    inputs, labels, masks, counts = [], [], [], []
    for depth in range(1, depths + 1):
        seen = depth + 1 if convention == CORRECT else depth + 2  # whose entry of the mask decides
        inputs.append(_ahead(tokens, bounds, here, depth)[None])
        labels.append(_ahead(tokens, bounds, here, depth + 1)[None])
        masks.append(_ahead(trained.to(device), bounds, here, seen)[None])
        everywhere = _ahead(trained.to(device), bounds, whole, seen) if convention == CORRECT else masks[-1]
        counts.append(everywhere.sum())
    return Targets(
        tuple(inputs), tuple(labels), tuple(masks), tuple(counts), ranks=ranks if convention == CORRECT else 1
    )


def _ahead(values: torch.Tensor, bounds: torch.Tensor, positions: torch.Tensor, by: int) -> torch.Tensor:
    """[T] of `values` [total], so many tokens after each position; 0 for padding and where the sample has ended."""
    import torch

    if len(values) == 0:
        return values.new_zeros(len(positions))
    ends = bounds[1:][torch.searchsorted(bounds[1:], positions, right=True).clamp(max=len(bounds) - 2)]
    there = positions + by
    inside = (positions >= 0) & (there < ends)
    return values[there.where(inside, 0)].where(inside, values.new_zeros(()))


def trained_tokens(
    total_lengths: Sequence[int], response_lengths: Sequence[int], loss_masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """[total] bool, whether each of the samples' tokens is one that the loss mask has.

    A sample's response are its last tokens; `loss_masks` are of whole responses, [response length] each, of any dtype.
    """
    import torch

    parts = []
    for total, response, mask in zip(total_lengths, response_lengths, loss_masks, strict=True):
        if len(mask) != response or not 0 <= response <= total:
            raise PluginError(
                "a loss mask does not fit its sample",
                {"mask": f"{len(mask)} tokens", "response": f"{response} tokens", "sample": f"{total} tokens"},
                "the rollout must give one entry of loss_mask for each token of the response",
            )
        parts.append(torch.nn.functional.pad(mask.bool(), (total - response, 0)))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def targets_of(microbatch: Microbatch, depths: int, *, ranks: int = 1, convention: str = CORRECT) -> Targets:
    """Of slime's microbatch, for this rank's packed stream; see `make_targets`."""
    import torch

    batch = microbatch.batch
    samples = batch["unconcat_tokens"]
    lengths = [len(sample) for sample in samples]
    return make_targets(
        torch.cat(list(samples)),
        torch.tensor([0, *lengths]).cumsum(0),
        trained_tokens(lengths, batch["response_lengths"], batch["loss_masks"]),
        microbatch.stream,
        depths,
        ranks=ranks,
        convention=convention,
    )
