"""What slime logs, as it logs it (hook: metrics_logged), and what plugins add to it (hook: rollout_metrics)."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from miles_plugins.activation import current
from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patching import Patch, has_attribute


def log(original: Callable[..., Any], args: Any, metrics: Any, step_key: str) -> Any:
    result = original(args, metrics, step_key)
    current().hook.metrics_logged(args=args, metrics=metrics, step_key=step_key)
    return result


_of_rollout: ContextVar[bool] = ContextVar("of_rollout", default=False)


def log_rollout_data(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """slime computes the metrics of an evaluation with the same function."""
    token = _of_rollout.set(True)
    try:
        return original(*args, **kwargs)
    finally:
        _of_rollout.reset(token)


def compute_metrics_from_samples(original: Callable[..., Any], args: Any, samples: Any) -> Any:
    metrics = original(args, samples)
    if not _of_rollout.get():
        return metrics
    for added in current().hook.rollout_metrics(args=args, samples=samples):
        metrics.update(added)
    return metrics


def _log(module: str) -> Patch:
    return Patch(
        id="slime.metrics.log",
        target=f"{module}:log",
        wrap=log,
        signature="(args, metrics, step_key)",
        roles=frozenset({"trainer", "rollout_manager"}),
        reason="slime logs to W&B and TensorBoard only",
        upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/utils/logging_utils.py",
        retire_when="slime has pluggable trackers",
    )


def _of_rollouts(module: str, name: str) -> tuple[Patch, ...]:
    upstream = "https://github.com/THUDM/slime/blob/v0.3.1/slime/ray/rollout.py"
    return (
        Patch(
            id="slime.metrics.of-rollout",
            target=f"{module}:{name}",
            wrap=log_rollout_data,
            roles=frozenset({"rollout_manager"}),
            reason="slime computes the metrics of a rollout and of an evaluation with one function",
            upstream=upstream,
            retire_when="slime takes metrics from several functions",
        ),
        Patch(
            id="slime.metrics.rollout",
            target=f"{module}:compute_metrics_from_samples",
            wrap=compute_metrics_from_samples,
            signature="(args, samples)",
            roles=frozenset({"rollout_manager"}),
            reason="slime's --custom-rollout-log-function-path is the user's, and one alone",
            upstream=upstream,
            retire_when="slime takes metrics from several functions",
        ),
    )


_MOVED = has_attribute("slime.observability")
_AFTER = "slime after v0.3.1"
SEAMS = (
    Seam(
        name="metrics",
        hooks=("metrics_logged",),
        patches=(_log("slime.utils.logging_utils"),),
        variants=(Variant(_AFTER, (_log("slime.observability.logging_utils"),), has=(_MOVED,)),),
    ),
    Seam(
        name="rollout metrics",
        hooks=("rollout_metrics",),
        patches=_of_rollouts("slime.ray.rollout", "_log_rollout_data"),
        variants=(
            Variant(_AFTER, _of_rollouts("slime.observability.rollout_metrics", "log_rollout_data"), has=(_MOVED,)),
        ),
    ),
)
