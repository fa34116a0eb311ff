"""What the training forward pass gives each token (hook: training_log_probs).

slime's `loss_function` runs once a microbatch of an optimizer step, in the forward pass only, whatever the loss; in it
`get_log_probs_and_entropy` is first called for the log-probabilities that the loss is made of. So both are wrapped: the
outer one says which microbatch it is, the inner one hands over what slime has computed. The inner one alone is also
called in other passes and by slime's log-prob server; and a wrapper of `policy_loss_function` would have to compute the
log-softmax again, and would be called again where the backward pass recomputes the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from miles_plugins.activation import current
from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patching import Patch, has_parameter

_LOSS = "slime.backends.megatron_utils.loss"
SLIME = "https://github.com/THUDM/slime/blob/v0.3.1/slime/backends/megatron_utils/loss.py"

_awaited: ContextVar[tuple[Any, Any] | None] = ContextVar("loss", default=None)  # args, microbatch


def loss_function(original: Callable[..., Any], args: Any, batch: Any, *rest: Any, **kwargs: Any) -> Any:
    token = _awaited.set((args, batch))
    try:
        return original(args, batch, *rest, **kwargs)
    finally:
        _awaited.reset(token)


def get_log_probs_and_entropy(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    awaited = _awaited.get()
    if awaited is not None:
        _awaited.set(None)  # a loss of the user's may ask again
        found = result if isinstance(result, dict) else result[1]  # v0.2.2 returns the dictionary alone
        log_probs = [each.detach() for each in found["log_probs"]]
        current().hook.training_log_probs(args=awaited[0], batch=awaited[1], log_probs=log_probs)
    return result


def _patches(loss_signature: str, log_probs_signature: str) -> tuple[Patch, ...]:
    retire_when = "slime has a hook between the log-probabilities and the loss"
    return (
        Patch(
            id="slime.loss.begins",
            target=f"{_LOSS}:loss_function",
            wrap=loss_function,
            signature=f"(args, batch, num_microbatches{loss_signature}, logits)",
            roles=frozenset({"trainer"}),
            reason="slime gives the log-probabilities of a training pass to its loss only; its own difference to the "
            "rollout's is 0 under --use-rollout-logprobs before v0.3.1, and leaves out what TIS rejected",
            upstream=SLIME,
            retire_when=retire_when,
        ),
        Patch(
            id="slime.loss.log-probs",
            target=f"{_LOSS}:get_log_probs_and_entropy",
            wrap=get_log_probs_and_entropy,
            signature="(logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False, "
            f"non_loss_data=True{log_probs_signature})",
            roles=frozenset({"trainer"}),
            reason="computing them a second time would cost a log-softmax over the vocabulary",
            upstream=SLIME,
            retire_when=retire_when,
        ),
    )


_BATCH_SIZE = ", step_global_batch_size"
_PADDED = ", max_seq_lens=None"
_HAS_BATCH_SIZE = has_parameter(f"{_LOSS}:loss_function", "step_global_batch_size")
_HAS_PADDED = has_parameter(f"{_LOSS}:get_log_probs_and_entropy", "max_seq_lens")

SEAMS = (
    Seam(
        name="losses",
        hooks=("training_log_probs",),
        patches=_patches(_BATCH_SIZE, ", top_p_token_ids=None, top_p_token_offsets=None"),
        variants=(
            Variant("slime v0.3.0", _patches(_BATCH_SIZE, _PADDED), has=(_HAS_BATCH_SIZE, _HAS_PADDED)),
            Variant("slime before v0.3.0", _patches("", _PADDED), has=(_HAS_PADDED,), lacks=(_HAS_BATCH_SIZE,)),
        ),
    ),
)
