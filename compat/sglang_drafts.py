"""Where SGLang's releases keep the models that draft."""

from __future__ import annotations

from typing import Any


def draft_runners(draft_worker: Any) -> list[Any]:
    """The ModelRunners of a scheduler's draft worker: none (no speculation, n-grams), one, or one a draft layer."""
    if draft_worker is None:
        return []
    if hasattr(type(draft_worker), "weight_update_runners"):  # since 0.5.23
        return [runner for _, runner in draft_worker.weight_update_runners()]
    inner = getattr(draft_worker, "_draft_worker", None)
    if inner is not None:  # the workers of spec v2
        several = getattr(inner, "draft_runner_list", None)
        return list(several) if several else [getattr(inner, "draft_runner", None) or inner.model_runner]
    if getattr(draft_worker, "is_draft_worker", False):  # until 0.5.12, a worker that is its own draft
        return list(draft_worker.model_runner_list)
    runner = getattr(draft_worker, "draft_model_runner", None)  # DFLASH of 0.5.12: the rest of it is the target's
    return [] if runner is None else [runner]


def is_draft(model_config: Any) -> bool:
    """Whether a model is built to draft."""
    return bool(getattr(model_config, "is_draft_model", False))
