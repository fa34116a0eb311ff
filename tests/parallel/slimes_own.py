"""The same cases through slime's own loop: its iterators, its `get_batch`, its passes and its steps, as patched."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import torch

_running: Any = None  # slime loads its hooks by path


def arguments(args: Namespace) -> Namespace:
    """What slime's loop asks for besides."""
    vars(args).update(
        seq_length=1,
        micro_batch_size=1,
        decoder_seq_length=None,
        loss_type="custom_loss",
        custom_loss_function_path="slimes_own.loss",
        custom_megatron_before_log_prob_hook_path=None,
        custom_megatron_before_train_step_hook_path="slimes_own.before_step",
        calculate_per_token_loss=False,
        recompute_loss_function=False,
        rollout_top_p=1.0,
        use_rollout_entropy=False,
        use_dynamic_batch_size=False,
        enable_mtp_training=False,
        check_for_nan_in_loss_and_grad=True,
        ci_test=False,
        ci_save_grad_norm=None,
        ci_load_grad_norm=None,
        reset_optimizer_states=False,
        manual_gc=False,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        use_distributed_optimizer=False,
        use_wandb=False,
        use_tensorboard=False,
    )
    return args


def iterators(data: dict[str, Any]) -> list[Any]:
    from slime.backends.megatron_utils.data import get_data_iterator

    return get_data_iterator(data)


def forward_only(case: Any, prefix: str) -> list[Any]:
    from slime.backends.megatron_utils.model import forward_only

    return forward_only(get_loss, case.args, case.model, case.iterators, case.steps, store_prefix=prefix)


def train(case: Any) -> None:
    global _running
    from megatron.training import global_vars
    from slime.backends.megatron_utils.model import train
    from slime.utils import logging_utils

    _running = case
    global_vars.unset_global_variables()
    global_vars.set_args(case.args)
    logging_utils.log = lambda args, metrics, step_key: case.results["metrics"].append(metrics)
    scheduler = SimpleNamespace(step=lambda increment: None)
    train(0, case.model, case.optimizer, scheduler, case.iterators, case.steps, [1] * len(case.steps))


def before_step(args: Namespace, rollout_id: int, step_id: int, *rest: Any) -> None:
    _running.observer.stage = f"train {step_id}"


def loss(args: Namespace, batch: dict[str, Any], logits: torch.Tensor, mean: Any) -> tuple[Any, dict[str, Any]]:
    found = logits.float().pow(2).mean()
    return found, {"loss": found.detach().clone()}


def get_loss(output: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    return torch.zeros(()), {"loss": [output.float().pow(2).mean()] * len(kwargs["total_lengths"])}
