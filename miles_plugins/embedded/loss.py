"""GRPO's loss on one microbatch: pure, on tensors of the response tokens."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def grpo_loss(
    args: Namespace, log_probs: torch.Tensor, entropy: torch.Tensor, batch: Mapping[str, Any]
) -> tuple[torch.Tensor, dict[str, float]]:
    """PPO's clipped loss with one advantage a response, this microbatch's part of an optimizer step.

    Schulman et al., arXiv:1707.06347, equation 7; with an upper bound of its own: Yu et al., "DAPO", arXiv:2503.14476.
    Each sample counts by the mean over its tokens, and all samples of the step alike, as in slime without
    --calculate-per-token-loss: the parts of all microbatches add up to the step's loss.

    Args:
        log_probs, entropy: [tokens] float32, the samples' response tokens one after the other.
        batch: a list with one [response length] float32 tensor a sample under `log_probs` (before the step),
            `advantages`, `loss_masks` (0 or 1), and with --use-kl-loss `ref_log_probs`.

    Returns:
        The loss, with gradient, and its terms.
    """
    import torch

    old, advantages = torch.cat(batch["log_probs"]), torch.cat(batch["advantages"])
    log_ratio = log_probs - old
    ratio = log_ratio.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high) * advantages
    terms = {
        "pg_loss": -torch.minimum(unclipped, clipped),
        "pg_clipfrac": (clipped < unclipped).float(),
        "ppo_kl": -log_ratio,
        "entropy_loss": entropy,
    }
    if args.use_kl_loss:
        terms["kl_loss"] = kl_estimate(log_probs - torch.cat(batch["ref_log_probs"]), args.kl_loss_type)
    shares = torch.cat([mask / mask.sum().clamp_min(1) for mask in batch["loss_masks"]]) / args.global_batch_size
    means = {name: (term * shares).sum() for name, term in terms.items()}
    loss = means["pg_loss"] - args.entropy_coef * means["entropy_loss"]
    if args.use_kl_loss:
        loss = loss + args.kl_loss_coef * means["kl_loss"]
    return loss, {name: float(mean.detach()) for name, mean in {**means, "loss": loss}.items()}


def kl_estimate(log_ratio: torch.Tensor, kind: str) -> torch.Tensor:
    """The KL divergence from the reference, estimated at each token.

    Schulman, joschu.net/blog/kl-approx.html: k1 is unbiased, k2 has low variance, k3 (low_var_kl) both, and neither of
    these two is ever negative.

    Args:
        log_ratio: log-probability of the policy less that of the reference.
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return (-log_ratio).exp() + log_ratio - 1
