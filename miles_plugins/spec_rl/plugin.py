"""Speculative RL: the draft that makes rollouts fast learns with the policy, and the policy does not notice.

The draft is the model's own multi-token prediction, which Megatron calls MTP. In the trainer it learns from each
microbatch of the actor (`draft_targets`), apart from everything else; at the engines it follows the weight updates
(`draft_is_trained`); and what of its proposals is accepted is counted right (`speculation_counts`, `rollout_metrics`).
"""

from __future__ import annotations

import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins import Microbatch, hookimpl
from miles_plugins.patches.sglang.draft import role as role_of_draft
from miles_plugins.spec_rl import accept, draft_loss, draft_weights, guards, halves
from miles_plugins.spec_rl.draft_loss import CONVENTIONS, CORRECT, Targets

if TYPE_CHECKING:
    import torch

REHEARSED = (
    "--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 3 --sglang-speculative-eagle-topk 1 "
    "--sglang-speculative-num-draft-tokens 4 --enable-mtp-training --mtp-loss-scaling-factor 0.2"
).split()
SIDES = ("trainer", "rollout_manager", "sglang_scheduler")

_log = logging.getLogger(__name__)
_args: Namespace | None = None  # this trainer's, if its model is the actor
_stage: str | None = None
_loaded: draft_weights.FromCheckpoint | None = None  # until the first pass
_tally, _decay = accept.Tally(), accept.Decay()
_server: Any = None


# -- the driver ------------------------------------------------------------------------------------------------------


@hookimpl
def register_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--spec-compat",
        choices=CONVENTIONS,
        default=CORRECT,
        help="docker: which tokens the draft learns, and by which norm its gradients are clipped, as with the Megatron "
        "of slime's image, for comparisons with it (default: correct)",
    )


@hookimpl
def configure(args: Namespace) -> None:
    guards.check(args, os.environ)
    for warning in guards.warnings(args):
        _log.warning("spec_rl: %s", warning)
    if guards.is_idle(args):
        # Before the model is wrapped for data parallelism; the optimizer's weight decay would move it otherwise.
        args.freeze_params_name_list = [*(args.freeze_params_name_list or ()), draft_weights.FROZEN]


@hookimpl
def tiny_model_shape() -> Mapping[str, int]:
    return {"draft_layers": 1}


@hookimpl
def rehearsal_flags(checkpoint: Path) -> Sequence[str]:
    return [*REHEARSED, guards.PATH, str(checkpoint)]


# -- training --------------------------------------------------------------------------------------------------------


@hookimpl
def model_built(args: Namespace, model: Sequence[Any], role: str) -> None:
    global _args, _loaded
    if not args.mtp_num_layers:
        return
    if role != "actor":
        args.enable_mtp_training = False  # a critic's own: its draft predicts nothing, and slime would log its loss
        return
    _args, _loaded = args, draft_weights.FromCheckpoint(model)
    if args.spec_compat == CORRECT:
        draft_weights.clip_apart(model)
    if guards.trains(args):
        for chunk in model:
            halves.exchange_inputs(guards.model_type(args), chunk)


@hookimpl
def pass_begins(stage: str, model: Sequence[Any]) -> None:
    global _stage, _loaded
    _stage = stage
    if _loaded is not None:
        _loaded.require(model)
        _loaded = None


@hookimpl
def pass_ends() -> None:
    global _stage
    _stage = None


@hookimpl
def microbatch_keys() -> Sequence[str]:
    return ("response_lengths", "loss_masks")


@hookimpl
def draft_targets(model: torch.nn.Module, microbatch: Microbatch) -> Targets | None:
    if _args is None or _stage != "train" or not guards.trains(_args):
        return None
    return draft_loss.targets_of(
        microbatch, _args.mtp_num_layers, ranks=_args.context_parallel_size, convention=_args.spec_compat
    )


# -- the engine ------------------------------------------------------------------------------------------------------


@hookimpl
def draft_is_trained(args: Namespace, algorithm: str) -> bool:
    return guards.draft_is_trained(args, algorithm)


@hookimpl
def engine_model_built(server_args: Any) -> None:
    global _server
    guards.check_server(server_args, role_of_draft())
    _server = server_args


@hookimpl
def after_weight_update() -> None:
    """Nothing to do: what the draft has received is judged where an update ends, and this has its end announced."""


# -- acceptance ------------------------------------------------------------------------------------------------------


@hookimpl
def speculation_counts(meta_info: Mapping[str, Any]) -> Mapping[str, int]:
    return accept.slimes(meta_info)


@hookimpl
def receive_response(sample: Any, meta_info: dict[str, Any]) -> None:
    _tally.add(sample, meta_info)


@hookimpl
def rollout_metrics(args: Namespace, samples: Sequence[Any]) -> Mapping[str, float]:
    found = accept.metrics(_tally.by_version(samples), guards.draft_cost(args))
    length = found.get("spec/accept_length")
    if length is not None and (warning := _decay.add(length)):
        _log.warning("spec_rl: %s%s", warning, "" if guards.trains(args) else "; train it (--enable-mtp-training)")
    return {**accept.slimes_metrics(samples), **found} if found else {}


# -- every process ---------------------------------------------------------------------------------------------------


@hookimpl
def probe(role: str) -> str | None:
    if role == "trainer":
        if _args is None:
            return "no draft in this trainer"
        return "the draft learns apart from the policy" if guards.trains(_args) else "the draft is frozen"
    if role == "rollout_manager":
        return "what engines accept is counted"
    if role == "sglang_scheduler":
        return guards.check_server(_server, role_of_draft()) or "this engine does not speculate"
    return None
