"""Where SGLang's releases differ in how a server is given new weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

BEGIN = "miles_plugins:begin_weight_update"
END = "miles_plugins:end_weight_update"


def has_update_sessions() -> bool:
    """Whether updates must lie between /begin_weight_update and /end_weight_update (0.5.23), which also repack."""
    return hasattr(import_module("sglang.srt.managers.io_struct"), "BeginWeightUpdateReqInput")


def model_of(weight_checker: Any) -> Any:
    """The model that a `WeightChecker` looks at."""
    get_model = getattr(weight_checker, "_get_model", None)  # since 0.5.23
    return get_model() if get_model is not None else weight_checker._model_runner.model


def device_loading_context(module: Any, device: Any) -> AbstractContextManager[Any]:
    """SGLang's own, around `process_weights_after_loading`."""
    return import_module("sglang.srt.model_loader.loader").device_loading_context(module, device)  # type: ignore[no-any-return]
