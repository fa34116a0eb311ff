"""Speculation with one proposal at each step, in plain torch: what SGLang's kernels do where the tree is a chain.

Of each of B requests, K tokens are verified in one pass: its last token, and K - 1 proposals one after the other. What
the pass says at position i is what follows token i, so it judges the proposal i + 1. The tokens of a pass are numbered
through the batch: those of request b are b * K to b * K + K - 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Tree(NamedTuple):
    """The chain in the words of a tree.

    Attributes:
        positions: [B * K], where each token is in its sequence.
        numbers: [B, K], of the tokens.
        child: [B, K], the token of the same request that follows; -1: none.
        sibling: [B, K], all -1.
    """

    positions: Tensor
    numbers: Tensor
    child: Tensor
    sibling: Tensor


class Accepted(NamedTuple):
    """What comes of one pass.

    Attributes:
        drafts: [B], how many proposals were accepted.
        tokens: [B, K], the accepted proposals and one more token, the target's own; after that, anything.
    """

    drafts: Tensor
    tokens: Tensor


def tree(lengths: Tensor, width: int) -> Tree:
    """Of sequences with these `lengths`, [B], before what is verified, K of which is the `width`."""
    import torch

    steps = torch.arange(width)
    numbers = steps + width * torch.arange(len(lengths))[:, None]
    child = torch.where(steps < width - 1, steps + 1, -1).repeat(len(lengths), 1)
    return Tree((lengths.long()[:, None] + steps).flatten(), numbers, child, torch.full_like(child, -1))


def accept_greedily(candidates: Tensor, chosen: Tensor) -> Accepted:
    """Accept proposals as long as they are what the target would have chosen.

    Args:
        candidates: [B, K], the tokens that were verified.
        chosen: [B, K], the target's choice after each.
    """
    return Accepted(_leading(candidates[:, 1:] == chosen[:, :-1]), chosen)


def accept_by_chance(candidates: Tensor, probabilities: Tensor, coins: Tensor, last_coins: Tensor) -> Accepted:
    """Accept a proposal x with its probability p(x), else draw from p without x: what comes is distributed as p.

    This is exact speculative sampling (Leviathan et al. 2023) of a draft that is certain of x, as one is that proposes
    what it finds most likely.

    Args:
        candidates: [B, K], the tokens that were verified.
        probabilities: [B, K, vocabulary], the target's after each.
        coins: [B, K], uniform in [0, 1), for the proposals; the last is not used.
        last_coins: [B], uniform in [0, 1), for the token after the accepted ones.
    """
    import torch

    proposals = candidates[:, 1:].long()
    chances = probabilities[:, :-1].gather(2, proposals[..., None])[..., 0]
    drafts = _leading(coins[:, :-1] < chances)
    rows = torch.arange(len(drafts))
    left = probabilities[rows, drafts].clone()
    refused = rows[drafts < proposals.shape[1]]
    left[refused, proposals[refused, drafts[refused]]] = 0
    tokens = torch.nn.functional.pad(proposals, (0, 1))
    tokens[rows, drafts] = draw(left, last_coins)
    return Accepted(drafts, tokens)


def _leading(accepted: Tensor) -> Tensor:
    """[B]: how many are true before the first that is not."""
    return accepted.long().cumprod(dim=1).sum(dim=1)


def draw(weights: Tensor, coins: Tensor) -> Tensor:
    """[B]: for each row of `weights`, [B, vocabulary], a token in proportion to them, never one without any.

    If there is nothing left in a row, the last token: all of it was the refused one's, and rounding refused it.
    """
    import torch

    sums = weights.double().cumsum(dim=1)
    found = torch.searchsorted(sums, (coins.double() * sums[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=weights.shape[1] - 1)


def keep_top_k(probabilities: Tensor, counts: Tensor) -> Tensor:
    """Of each row the `counts` most likely tokens, and they sum to 1; of equal ones those that come first."""
    import torch

    order = probabilities.sort(dim=1, descending=True, stable=True).indices
    kept = torch.arange(probabilities.shape[1]) < counts[:, None]
    return _renormalised(probabilities, torch.empty_like(kept).scatter_(1, order, kept))


def keep_top_p(probabilities: Tensor, shares: Tensor) -> Tensor:
    """Of each row the fewest tokens that have its share together, and they sum to 1."""
    import torch

    values, order = probabilities.sort(dim=1, descending=True, stable=True)
    before = values.double().cumsum(dim=1) - values
    kept = (before < shares[:, None]) | (shares[:, None] >= 1)
    return _renormalised(probabilities, torch.empty_like(kept).scatter_(1, order, kept))


def _renormalised(probabilities: Tensor, kept: Tensor) -> Tensor:
    """A row of which everything is kept stays as it is, to the bit."""
    import torch

    some = torch.where(kept, probabilities, 0)
    return torch.where(kept.all(dim=1, keepdim=True), probabilities, some / some.sum(dim=1, keepdim=True))


def places(rows: Tensor, begins: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of what lies between `begins` and `ends` in each of the `rows`, one row's after the other's."""
    import torch

    counts = (ends - begins).long()
    first = counts.cumsum(dim=0) - counts
    within = torch.arange(int(counts.sum())) - first.repeat_interleave(counts)
    return rows.long().repeat_interleave(counts), begins.long().repeat_interleave(counts) + within
