"""Recomputed activations belong to the microbatch that computed them first.

A cursor over microbatches goes wrong as soon as only some are recomputed; the checkpointed function itself knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_plugins.microbatch import bind
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch


def checkpoint(original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(bind(function), *args, **kwargs)


def checkpoint_without_output(
    original: Callable[..., Any], self: Any, run_function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return original(self, bind(run_function), *args, **kwargs)


def _patch(
    name: str, target: str, wrap: Callable[..., Any], signature: str, roles: frozenset[str] = frozenset()
) -> Patch:
    return Patch(
        id=f"megatron.recompute.{name}",
        target=target,
        wrap=wrap,
        signature=signature,
        roles=roles,
        reason="Megatron does not say which microbatch a recomputation belongs to",
        upstream="https://github.com/NVIDIA/Megatron-LM (megatron/core/tensor_parallel/random.py)",
        retire_when="Megatron passes a microbatch id through the pipeline schedule",
    )


_TRAINER = frozenset({"trainer"})

SEAMS = (
    Seam(
        name="recomputation",
        hooks=("microbatch_begins",),
        patches=(
            _patch(
                "checkpoint",
                "megatron.core.tensor_parallel.random:checkpoint",
                checkpoint,
                "(function, distribute_saved_activations, *args)",
                _TRAINER,
            ),
            _patch(
                "without-output",
                "megatron.core.tensor_parallel.random:CheckpointWithoutOutput.checkpoint",
                checkpoint_without_output,
                "(self, run_function, *args)",
                _TRAINER,
            ),
            _patch(
                "te",
                "megatron.core.extensions.transformer_engine:te_checkpoint",
                checkpoint,
                "(forward_func, distribute_saved_activations, get_rng_state_tracker, tp_group, *args, **kwargs)",
            ),
        ),
    ),
)
