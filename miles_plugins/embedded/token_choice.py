"""Which token comes next: temperature, top-k, top-p, and random numbers that hang on nothing but their seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from miles_plugins.embedded.generate_request import Sampling

if TYPE_CHECKING:
    import torch


def token_chooser(
    samplings: Sequence[Sampling], random: torch.Generator, device: torch.device
) -> Callable[[torch.Tensor, int | torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A function of (logits [rows, vocabulary] float32, at): token [rows] int64 and its log-prob [rows] float32.

    `at`, one number or [rows] int64, is the token's number in its answer, from 0. All random numbers are drawn here,
    row by row and one a token, so that what a row gets hangs on no other row's length, and not on how it got there.
    """
    import torch

    uniform = torch.zeros(len(samplings), max(1, *(s.max_new_tokens for s in samplings)), dtype=torch.float64)
    for row, sampling in enumerate(samplings):
        if not sampling.greedy:
            seed, length = sampling.sampling_seed, sampling.max_new_tokens
            source = random if seed is None else torch.Generator().manual_seed(seed)
            uniform[row, :length] = torch.rand(length, generator=source, dtype=torch.float64)
    uniform = uniform.to(device)
    greedy = torch.tensor([s.greedy for s in samplings], device=device)
    temperature = torch.tensor([1.0 if s.greedy else s.temperature for s in samplings], device=device)[:, None]
    # Off is infinite: rounding lifts a sum of probabilities above one, which must not cut a tail that nobody asked to.
    top_p = torch.tensor([math.inf if s.top_p == 1 else s.top_p for s in samplings], device=device)[:, None]
    top_k = torch.tensor([1 << 31 if s.top_k == -1 else s.top_k for s in samplings], device=device)[:, None]
    restricted = any(not s.greedy and (s.top_p < 1 or s.top_k != -1) for s in samplings)

    def choose(logits: torch.Tensor, at: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = torch.log_softmax(logits / temperature, dim=-1)
        token = logits.argmax(dim=-1)
        if not greedy.all():
            weights = log_probs.double().exp()
            sums = (_restrict(weights, top_k, top_p) if restricted else weights).cumsum(dim=-1)
            # Never a token of weight zero: the first sum above the point, and in float64 the point is below the last.
            # Of a row that has ended, whose token is left out, it may be any.
            number = torch.as_tensor(at, device=device).expand(len(logits)).clamp(max=uniform.shape[1] - 1)
            point = uniform.gather(1, number[:, None]) * sums[:, -1:]
            drawn = torch.searchsorted(sums, point, right=True).squeeze(-1)
            drawn = drawn.clamp(max=logits.shape[-1] - 1)  # of NaN there is none above; the caller refuses those
            token = torch.where(greedy, token, drawn)
        return token, log_probs.gather(-1, token[:, None]).squeeze(-1)

    return choose


def _restrict(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero the weights [rows, vocabulary] outside of top-k [rows, 1] and top-p [rows, 1].

    In the vocabulary's order, not sorted: a row must draw the same token whether or not another row is restricted.
    """
    import torch

    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(weights.shape[-1], device=weights.device)
    dropped = (rank >= top_k) | (ordered.cumsum(dim=-1) - ordered > top_p)
    return weights.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0)


def ending_tokens(samplings: Sequence[Sampling], eos: set[int]) -> torch.Tensor:
    """[rows, most] int64: the tokens that end each row's answer, filled up with -1, which is no token."""
    import torch

    ends = [[] if s.ignore_eos else [*eos, *s.stop_token_ids] for s in samplings]
    most = max(map(len, ends))
    return torch.tensor([row + [-1] * (most - len(row)) for row in ends], dtype=torch.long)
