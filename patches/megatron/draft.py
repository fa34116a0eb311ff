"""Train the draft (multi-token prediction) beside the policy, and leave the policy as it is (hook: draft_targets).

Megatron computes the draft and its loss in the middle of GPTModel._postprocess. Here that is switched off, and done
before it, with Megatron's own layers: what the trunk, the embedding and the head give is detached, tokens are picked by
position and not rolled (miles_plugins/spec_rl/draft_loss.py), and where nobody wants the draft trained it does not run.
So the policy's logits and gradients are those of a model without a draft, bit for bit.

One thing is left in common: the norm by which gradients are clipped. Parameters with an attribute `grad_norm_group` are
clipped by a norm of their own, as Megatron-LM does by itself since 5b16c9964.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from miles_plugins.activation import current
from miles_plugins.errors import PluginError
from miles_plugins.microbatch import current_microbatch
from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patching import Patch, has_attribute, has_parameter

if TYPE_CHECKING:
    import torch

    from miles_plugins.spec_rl.draft_loss import Targets

GPT = "megatron.core.models.gpt.gpt_model:GPTModel"
MTP = "megatron.core.transformer.multi_token_prediction"
OPTIMIZER = "megatron.core.optimizer.optimizer"


# -- the loss --------------------------------------------------------------------------------------------------------


def forward(original: Callable[..., Any], self: Any, *args: Any, mtp_kwargs: Any = None, **kwargs: Any) -> Any:
    """With --enable-mtp-training slime hands over `mtp_kwargs`, which only its image's Megatron takes."""
    return original(self, *args, **kwargs)


def postprocess(original: Callable[..., Any], self: Any, **given: Any) -> Any:  # Megatron names them all
    if not hasattr(self, "mtp"):
        return original(self, **given)
    if not self.post_process:
        raise PluginError(
            "the draft's layers are on a pipeline stage without the output head",
            {"model": type(self).__name__},
            "leave the draft (m) in --pipeline-model-parallel-layout on the last stage",
        )
    microbatch = current_microbatch()
    if microbatch is not None and self.training and _gradients_are_wanted():
        targets = current().hook.draft_targets(model=self, microbatch=microbatch)
        if targets is not None:
            given["hidden_states"] = _with_draft_loss(self, targets, given)
    with _as_without_draft(self):
        return original(self, **{**given, "mtp_in_postprocess": False})


def _gradients_are_wanted() -> bool:
    import torch

    return bool(torch.is_grad_enabled())


@contextmanager
def _as_without_draft(model: Any) -> Iterator[None]:
    """What Megatrons ask before they compute a draft: an attribute of the model, or of its configuration.

    The configuration is every layer's, and other models' too; this model alone gets another one for a moment. Which
    weight a tied head has depends on the draft as well, and stays as it is.
    """
    stock = model.config, model.mtp_process
    weight = model.shared_embedding_or_output_weight()
    model.config = copy.copy(model.config)
    model.config.mtp_num_layers, model.mtp_process = None, False
    model.shared_embedding_or_output_weight = lambda: weight
    try:
        yield
    finally:
        model.config, model.mtp_process = stock
        del model.shared_embedding_or_output_weight


def _with_draft_loss(model: Any, targets: Targets, given: dict[str, Any]) -> torch.Tensor:
    """The trunk's output as it is; the backward pass from it goes through the draft's loss as well."""
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    config = model.config
    layers = _layers(model)
    output: torch.Tensor = given["hidden_states"]
    state = output.detach()
    tied = model.share_embeddings_and_output_weights
    weight = (model.shared_embedding_or_output_weight() if tied else model.output_layer.weight).detach()
    scaled = getattr(model, "_scale_logits", lambda logits: logits)  # µP, in Megatron's main
    for depth, layer in enumerate(layers, start=1):
        state = _through(layer, state, _embedded(model, targets.inputs[depth - 1]), given)
        logits, _ = model.output_layer(state, weight=weight, runtime_gather_output=False)
        losses = model.compute_language_model_loss(targets.labels[depth - 1], scaled(logits))
        mean = targets.mean(depth, losses)
        # Where Megatron divides by the tokens later, it counts each as often as ranks share it.
        loss = targets.total(depth, losses) * targets.ranks if config.calculate_per_token_loss else mean
        output = MTPLossAutoScaler.apply(output, (config.mtp_loss_scaling_factor / len(layers) * loss).reshape(1))
        _log(mean, depth, len(layers))
    return output


def _layers(model: Any) -> list[Any]:
    """The layer of each depth."""
    config = model.config
    if getattr(config, "mtp_hsm", False):
        raise PluginError(
            "the draft cannot be trained with mixed hidden states", {"flag": "--mtp-hsm"}, "leave that flag out"
        )
    if model.position_embedding_type == "learned_absolute":
        raise PluginError(
            "the draft cannot be trained with learned positions",
            {"flag": "--position-embedding-type learned_absolute"},
            "use a model with rotary positions",
        )
    layers = list(model.mtp.layers)
    return layers * config.mtp_num_layers if getattr(config, "mtp_use_repeated_layer", False) else layers


def _embedded(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[T, 1, hidden], or this rank's part with sequence parallelism, without a gradient."""
    import torch

    if model.pre_process or model.share_embeddings_and_output_weights:
        with torch.no_grad():
            embedded: torch.Tensor = model.embedding(input_ids=tokens, position_ids=None)
            return embedded
    # This copy of the embedding is there for the draft alone. Megatron overlaps the reduction of gradients with the
    # backward pass where every parameter of a bucket has got one, so it gets zeros.
    return _zero_gradient(model.embedding(input_ids=tokens, position_ids=None))


def _zero_gradient(x: torch.Tensor) -> torch.Tensor:
    """The same values; what comes back is zero."""
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient.new_zeros(()).expand_as(gradient))
    return x


PASSED_ON = (
    "attention_mask",
    "rotary_pos_emb",
    "rotary_pos_cos",
    "rotary_pos_sin",
    "packed_seq_params",
    "sequence_len_offset",
)


def _through(layer: Any, state: torch.Tensor, embedded: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """One of the draft's layers; recomputed in the backward pass if Megatron would."""
    same = {name: given.get(name) for name in PASSED_ON}

    def run(state: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        computed: torch.Tensor = layer._proj_and_transformer_layer(hidden_states=state, decoder_input=embedded, **same)
        return computed

    if layer.config.recompute_granularity != "full":
        return run(state, embedded)
    if not state.requires_grad:  # a checkpoint without such an input has no gradient at all
        state = state.detach().requires_grad_()
    again: torch.Tensor
    if "forward_func" in inspect.signature(layer._checkpointed_forward).parameters:
        # Before Megatron's main it keeps its arguments as tensors; packed_seq_params is none.
        again = layer._checkpointed_forward(run, state, embedded)
    else:
        again = layer._checkpointed_forward(hidden_states=state, decoder_input=embedded, **same)
    return again


# -- the metric ------------------------------------------------------------------------------------------------------


def _log(loss: torch.Tensor, depth: int, depths: int) -> None:
    """Where slime finds what it logs as train/mtp_loss; Megatron's main keeps its own under another name."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    tracker = MTPLossLoggingHelper.tracker
    values = tracker.get("values")
    if values is None or len(values) != depths:
        values = tracker["values"] = torch.zeros(depths, device=loss.device)
    values[depth - 1] += loss.detach()
    tracker["reduce_group"] = None
    tracker["avg_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)


def clean_loss_in_tracker() -> None:
    """slime calls it once it has read the tracker."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    tracker = MTPLossLoggingHelper.tracker
    if "values" in tracker:
        tracker["values"].zero_()
    tracker["reduce_group"] = tracker["avg_group"] = None


# -- what it cannot be trained under ---------------------------------------------------------------------------------


def build_schedule_plan(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if hasattr(self, "mtp"):
        raise PluginError(
            "the draft cannot be trained with this schedule",
            {"flag": "--overlap-moe-expert-parallel-comm", "schedule": "combined 1F1B"},
            "leave that flag out",
        )
    return original(self, *args, **kwargs)


# -- gradient norms --------------------------------------------------------------------------------------------------
#
# ChainedOptimizer.step takes one norm of all gradients and scales all of them by it. Within a step, the norm is taken
# twice, of either half of the parameters, and each half is scaled by its own.

GROUP = "grad_norm_group"
_half: ContextVar[bool | None] = ContextVar("half", default=None)  # whose norm is taken: True of the parameters apart
_norm_apart: ContextVar[list[float] | None] = ContextVar("norm_apart", default=None)  # of this step, once it is known


def is_apart(parameter: Any) -> bool:
    return getattr(parameter, GROUP, None) is not None


def copy_attributes(original: Callable[..., Any], destination_tensor: Any, source_tensor: Any) -> Any:
    """The optimizer's own copy of a parameter belongs to the same group."""
    if is_apart(source_tensor):
        setattr(destination_tensor, GROUP, getattr(source_tensor, GROUP))
    return original(destination_tensor, source_tensor)


def step(original: Callable[..., Any], self: Any) -> Any:
    token = _norm_apart.set([])
    try:
        return original(self)
    finally:
        _norm_apart.reset(token)


def get_grad_norm(original: Callable[..., Any], self: Any) -> Any:
    found = _norm_apart.get()
    if found is None or _half.get() is not None:  # not in a step, or one of a chain's optimizers
        return original(self)
    found[:] = [_of_half(True, original, self)]
    return _of_half(False, original, self)


def _of_half(apart: bool, original: Callable[..., Any], *args: Any) -> Any:
    token = _half.set(apart)
    try:
        return original(*args)
    finally:
        _half.reset(token)


def get_main_grads_for_grad_norm(original: Callable[..., Any], self: Any) -> Any:
    half = _half.get()
    if half is None:
        return original(self)
    of_half = [parameter for parameter in self.get_parameters() if is_apart(parameter) == half]
    own = dict(vars(self))
    self.get_parameters = lambda: of_half  # of this one optimizer, for this one call
    try:
        return original(self)
    finally:
        del self.get_parameters
        vars(self).update({name: own[name] for name in ("get_parameters",) if name in own})


def clip_grad_by_total_norm(
    original: Callable[..., Any], parameters: Any, max_norm: Any, total_norm: Any, *args: Any, **kwargs: Any
) -> Any:
    norms = _norm_apart.get()
    if not norms:
        return original(parameters, max_norm, total_norm, *args, **kwargs)
    for apart, norm in ((False, total_norm), (True, norms[0])):
        of_half = [parameter for parameter in parameters if is_apart(parameter) == apart]
        if of_half:
            original(of_half, max_norm, norm, *args, **kwargs)
    return None


# -- patches ---------------------------------------------------------------------------------------------------------

_TRAINER = frozenset({"trainer"})
MEGATRON = "https://github.com/NVIDIA/Megatron-LM"


def _patch(name: str, target: str, reason: str, **how: Any) -> Patch:
    return Patch(
        id=f"megatron.draft.{name}",
        target=target,
        roles=_TRAINER,
        reason=reason,
        **{
            "upstream": f"{MEGATRON}/commit/71e418ea7",
            "retire_when": "no supported Megatron lacks mtp_detach_heads, and it takes the caller's labels and mask",
            **how,
        },
    )


def _norm_patch(
    name: str, target: str, wrap: Callable[..., Any], signature: str, reason: str, can_ask: bool = True
) -> Patch:
    """`can_ask`: whether the target's module can import the optimizer's; else it is patched, and does nothing there."""
    return _patch(
        f"norm.{name}",
        target,
        reason,
        wrap=wrap,
        signature=signature,
        superseded_when=has_attribute(f"{OPTIMIZER}:MegatronOptimizer.has_grad_norm_group") if can_ask else None,
        upstream=f"{MEGATRON}/commit/5b16c9964",
        retire_when="no supported Megatron is older than 5b16c9964",
    )


_LAYER = f"{MTP}:MultiTokenPredictionLayer"

_FIRST = (
    "self, hidden_states, input_ids, position_ids, labels, rotary_pos_emb, rotary_pos_cos, rotary_pos_sin, "
    "mtp_in_postprocess=None, loss_mask=None, decoder_input=None, attention_mask=None"
)
_LAST = (
    "inference_params=None, packed_seq_params=None, sequence_len_offset=None, runtime_gather_output=None, "
    "extra_block_kwargs=None, inference_context=None"
)
_RELEASED = f"({_FIRST}, {_LAST})"
_MAIN = f"({_FIRST}, padding_mask=None, {_LAST}, output_processor=None, output_processor_context=None)"


def _patches(postprocess_signature: str) -> tuple[Patch, ...]:
    return (
        _patch(
            "arguments",
            f"{GPT}.forward",
            "stock Megatron does not take mtp_kwargs, which slime hands over with --enable-mtp-training",
            wrap=forward,
            needs=(has_parameter(f"{GPT}.forward", "loss_mask"),),
            upstream="https://github.com/THUDM/slime (docker/patch)",
            retire_when="slime hands over nothing of its image's Megatron",
        ),
        _patch(
            "loss",
            f"{GPT}._postprocess",
            "Megatron trains trunk, embedding and head with the draft's loss, stops where slime gives no labels, "
            "and computes the draft in passes without gradient too",
            wrap=postprocess,
            signature=postprocess_signature,
            needs=(
                has_parameter(f"{_LAYER}._proj_and_transformer_layer", "packed_seq_params"),
                has_attribute(f"{_LAYER}._checkpointed_forward"),
                has_attribute(f"{MTP}:MTPLossAutoScaler"),
                has_attribute(f"{MTP}:MTPLossLoggingHelper.tracker"),
            ),
        ),
        _patch(
            "schedule",
            f"{GPT}.build_schedule_plan",
            "combined 1F1B computes a model piece by piece, and not through GPTModel.forward",
            wrap=build_schedule_plan,
        ),
        _patch(
            "metric",
            f"{MTP}:MTPLossLoggingHelper.clean_loss_in_tracker",
            "slime calls it by its old name",
            add=staticmethod(clean_loss_in_tracker),
            superseded_when=has_attribute(f"{MTP}:MTPLossLoggingHelper.clean_loss_in_tracker"),
            upstream=f"{MEGATRON}/commit/aed93211e",
            retire_when="slime knows Megatron's new name (clean_metrics_in_tracker)",
        ),
        _norm_patch(
            "group",
            "megatron.core.tensor_parallel.layers:copy_tensor_model_parallel_attributes",
            copy_attributes,
            "(destination_tensor, source_tensor)",
            "Megatron's optimizer does not know which of its parameters are the draft's",
            can_ask=False,
        ),
        _norm_patch(
            "step",
            f"{OPTIMIZER}:ChainedOptimizer.step",
            step,
            "(self)",
            "a draft's gradient would shorten the policy's step",
        ),
        _norm_patch(
            "norm",
            f"{OPTIMIZER}:ChainedOptimizer.get_grad_norm",
            get_grad_norm,
            "(self)",
            "Megatron takes one norm of all gradients",
        ),
        _norm_patch(
            "gradients",
            f"{OPTIMIZER}:MegatronOptimizer.get_main_grads_for_grad_norm",
            get_main_grads_for_grad_norm,
            "(self)",
            "Megatron takes one norm of all gradients",
        ),
        _norm_patch(
            "clip",
            "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
            clip_grad_by_total_norm,
            "(parameters, max_norm, total_norm, use_decoupled_grad=False)",
            "Megatron clips all gradients by one norm",
            can_ask=False,
        ),
    )


SEAMS = (
    Seam(
        name="draft training",
        hooks=("draft_targets",),
        patches=_patches(_RELEASED),
        variants=(
            Variant(
                "Megatron-LM's main", _patches(_MAIN), has=(has_parameter(f"{GPT}._postprocess", "output_processor"),)
            ),
        ),
    ),
)
