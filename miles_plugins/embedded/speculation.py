"""Speculative decoding as SGLang's EAGLE does it with one candidate a step: a chain of drafts, verified in one pass.

A row of the batch keeps what was rejected in its caches, masked out: rows accept different numbers, and their slots
stay in line. A cached slot is of the same token in both caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from miles_plugins.embedded.draft import Draft

if TYPE_CHECKING:
    import torch

    Choose = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def count_accepted(proposed: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """How many proposed tokens stand: those before the first that is not what was drawn.

    Speculative sampling (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318) accepts a token x
    with probability min(1, p(x) / q(x)), and else draws from max(0, p - q), normalised. A draft that always proposes
    its most likely token has q(x) = 1, so x is accepted with probability p(x), and else the token is drawn from p
    without x. SGLang's tree_speculative_sampling_target_only does so with two random numbers a position. One is enough:
    draw a token from p, and accept x if it is x. That has probability p(x); and given that it is another, it is
    distributed as p without x. Where all were accepted, one more is drawn from p.

    So every token of an answer is one drawn from p, given the tokens before it, whatever the draft proposes: the
    distribution is that of plain decoding. As the random number of a position hangs on its seed alone, so is the answer
    to a request with a seed, but for rounding.

    Args:
        proposed: [rows, steps] int64, the chain of each row.
        drawn: [rows, steps + 1] int64, drawn from p at each position, given the proposed tokens before it.

    Returns:
        [rows] int64, from 0 to steps: `drawn[row, : accepted + 1]` is the row's answer from here on.
    """
    return (proposed == drawn[:, :-1]).long().cumprod(dim=-1).sum(dim=-1)


@dataclass
class Row:
    """The answer to one prompt, and how it came about."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    verified: int = 0  # passes in which the target verified a chain
    accepted: int = 0  # proposed tokens that stood, as SGLang counts them: also those after the answer's end

    def counts(self, steps: int) -> dict[str, Any]:
        """What SGLang 0.5.15 tells in `meta_info`; nothing of an answer that was never verified."""
        if not self.verified:
            return {}
        proposed = self.verified * steps
        return {
            "spec_accept_rate": self.accepted / proposed,
            "spec_accept_length": len(self.tokens) / self.verified,
            "spec_num_correct_drafts": self.accepted,
            "spec_num_proposed_drafts": proposed,
            "spec_verify_ct": self.verified,
        }


def speculate(
    model: Any,
    draft: Draft,
    steps: int,
    ids: torch.Tensor,
    slots: torch.Tensor,
    choose: Choose,
    limits: torch.Tensor,
    ends: torch.Tensor,
) -> tuple[list[Row], torch.Tensor]:
    """Decode all rows until each has ended.

    Args:
        model: a causal LM of `transformers`.
        steps: how many tokens the draft proposes before the target verifies them.
        ids: [rows, width] int64, the prompts, left-padded.
        slots: [rows, width] bool, where they are.
        choose: of logits [rows, vocabulary] float32 and the number of the token in its answer [rows], from 0: a token
            and its log-prob.
        limits: [rows] int64, the longest answer of each row.
        ends: [rows, most] int64, tokens that end the row's answer.

    Returns:
        The rows, and [rows, slots of the target's cache] bool: which of them hold the prompt and what was accepted.
    """
    import torch

    every, head = torch.arange(len(ids), device=ids.device), model.get_output_embeddings()
    found = [Row() for _ in ids]
    positions = (slots.cumsum(-1) - 1).clamp(min=0)
    states, cache = _trunk(model, ids, slots, positions, None)
    token, log_prob = choose(head(states[:, -1]).float(), torch.zeros_like(limits))
    alive = _append(found, token[:, None], log_prob[:, None], limits > 0, limits, ends)
    following, last = torch.cat([ids[:, 1:], token[:, None]], dim=1), torch.full_like(limits, ids.shape[1] - 1)
    drafts_cache = None
    ahead = torch.arange(steps + 1, device=ids.device)
    while any(alive):
        # The draft's own slots hold the trunk's states; what it made of its own states is dropped again.
        states, drafts_cache = draft.states(following, states, slots, positions, drafts_cache)
        state, position = states[every, last], positions[every, last]
        chain, seen = [token, head(state).argmax(dim=-1)], slots
        for step in range(1, steps):
            seen = torch.nn.functional.pad(seen, (0, 1), value=True)
            state, drafts_cache = draft.states(
                chain[-1][:, None], state[:, None], seen, position[:, None] + step, drafts_cache
            )
            state = state[:, 0]
            chain.append(head(state).argmax(dim=-1))
        drafts_cache.crop(slots.shape[1])

        ids, positions = torch.stack(chain, dim=1), position[:, None] + 1 + ahead
        seen = torch.nn.functional.pad(slots, (0, steps + 1), value=True)
        states, cache = _trunk(model, ids, seen, positions, cache)
        at = torch.tensor([len(row.tokens) for row in found], device=ids.device)
        drawn = [choose(head(states[:, number]).float(), at + number) for number in range(steps + 1)]
        following, log_probs = (torch.stack(list(parts), dim=1) for parts in zip(*drawn, strict=True))
        last = count_accepted(ids[:, 1:], following)
        kept = ahead <= last[:, None]
        slots = torch.cat([slots, kept], dim=1)
        token = following[every, last]
        for row, accepted, is_alive in zip(found, last.tolist(), alive.tolist(), strict=True):
            row.verified += is_alive
            row.accepted += accepted * is_alive
        alive = _append(found, following, log_probs, alive, limits, ends, kept)
    return found, slots


def _trunk(model: Any, ids: torch.Tensor, seen: torch.Tensor, positions: torch.Tensor, cache: Any) -> tuple[Any, Any]:
    """The target's states after its final norm, [rows, n, hidden], and its cache."""
    output = model.base_model(
        input_ids=ids, attention_mask=seen.long(), position_ids=positions, past_key_values=cache, use_cache=True
    )
    return output.last_hidden_state, output.past_key_values


def _append(
    found: list[Row],
    tokens: torch.Tensor,
    log_probs: torch.Tensor,
    alive: torch.Tensor,
    limits: torch.Tensor,
    ends: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add what was decoded to the answers of the rows that are alive, up to their ends; [rows] bool, who still is."""
    import torch

    still = alive.tolist()
    counts = (torch.full_like(limits, tokens.shape[1]) if kept is None else kept.sum(dim=-1)).tolist()
    columns = zip(tokens.tolist(), log_probs.tolist(), counts, limits.tolist(), ends.tolist(), strict=True)
    for index, (row_tokens, row_log_probs, count, limit, row_ends) in enumerate(columns):
        row = found[index]
        for token, log_prob in zip(row_tokens[:count], row_log_probs[:count], strict=True):
            if not still[index]:
                break
            row.tokens.append(token)
            row.log_probs.append(log_prob)
            still[index] = len(row.tokens) < limit and token not in row_ends
    return torch.tensor(still, device=tokens.device)
