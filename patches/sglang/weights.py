"""Weights on their way into SGLang's model (hooks: receive_weights, after_weight_update).

Every way that weights take, from the checkpoint and in each kind of update, ends in `load_weights` of the model. What
one update brings is known only to who sends it, so the engine's actor says where it begins and ends
(`miles_plugins.patches.slime.weight_update`). Its word reaches every scheduler of the server through SGLang's
`/weights_checker`, which takes any text as its action, and answers with an HTTP error where one raises.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from miles_plugins.activation import current
from miles_plugins.compat.sglang_weights import BEGIN, END, device_loading_context, has_update_sessions, model_of
from miles_plugins.errors import PluginError
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Need, Patch, has_parameter
from miles_plugins.weights import receive

if TYPE_CHECKING:
    import torch

SGLANG = "https://github.com/sgl-project/sglang/blob/v0.5.15.post1/python/sglang/srt"
logger = logging.getLogger("miles_plugins")
_scheduler: Any = None  # of this process; its `server_args` are there before it loads a model


class Reception:
    """In place of `load_weights` of one model: what it loads passes the plugins, and is counted."""

    def __init__(self, load_weights: Callable[..., Any]) -> None:
        self._load_weights = load_weights
        self.received: Counter[str] = Counter()
        self.updating = False
        self.restored: list[tuple[Any, Any]] = []  # layers whose packed weights wait for `process`, and who does that

    def __call__(self, weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        given = receive(current().plugins, _scheduler.server_args, self._counted(weights))
        return self._load_weights(given, *args, **kwargs)

    def _counted(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self.received[name] += 1
            yield name, tensor


def remember_scheduler(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    global _scheduler
    _scheduler = self
    original(self, *args, **kwargs)


def receive_through_plugins(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    model = original(*args, **kwargs)
    model.load_weights = Reception(model.load_weights)
    return model


# -- one weight update -----------------------------------------------------------------------------------------------


def begin_update(model: Any) -> None:
    """Make packed weights loadable again, and count from nothing.

    Raises:
        PluginError: an update began before and did not end, or a layer cannot be given new weights.
    """
    reception = _reception(model)
    if reception.updating:
        raise PluginError(
            "a weight update begins before the last one has ended: the engine has weights of two",
            {"names received of the last": len(reception.received)},
            "look for the first error in the logs of the trainers and engines, and go on from the last checkpoint",
        )
    reception.received.clear()
    reception.updating = True
    # An SGLang with update sessions has restored them itself.
    reception.restored = [] if has_update_sessions() else list(_packed_layers(model))
    for layer, method in reception.restored:
        method.restore_weights_before_loading(layer)


def end_update(model: Any) -> None:
    """Let the plugins judge what has come, and pack it again for the kernels.

    Raises:
        PluginError: no update had begun, or a plugin misses something. The layers then stay unpacked.
    """
    reception = _reception(model)
    if not reception.updating:
        raise PluginError(
            "a weight update ends that did not begin",
            {},
            "the server was restarted during an update; go on from the last checkpoint",
        )
    current().hook.after_weight_update(server_args=_scheduler.server_args, received=dict(reception.received))
    for layer, method in reception.restored:
        with _on_its_device(layer):
            method.process_weights_after_loading(layer)
    reception.restored = []
    reception.updating = False


def _reception(model: Any) -> Reception:
    found = model.load_weights
    if not isinstance(found, Reception):
        raise PluginError(
            f"the weights of {type(model).__name__} do not pass the plugins",
            {"expected": f"{Reception.__name__} as its load_weights", "found": type(found).__name__},
            "its loader builds models in a way of its own; take another --sglang-load-format, or report this",
        )
    return found


def _packed_layers(model: Any) -> Iterator[tuple[Any, Any]]:
    """Layers whose kernel has weights in another form than the checkpoint, each with what can turn them back."""
    for name, layer in model.named_modules():
        for method in (getattr(layer, "scheme", None), getattr(layer, "quant_method", None)):
            if not hasattr(method, "restore_weights_before_loading"):
                continue
            if hasattr(layer, "is_triton_converted"):
                raise PluginError(
                    f"the weights of {name} cannot be replaced: SGLang's Triton kernel has no way back",
                    {"found": type(method).__name__},
                    "use the Marlin kernel: --sglang-moe-runner-backend marlin",
                )
            yield layer, method
            break


def _on_its_device(layer: Any) -> AbstractContextManager[Any]:
    return device_loading_context(layer, next(layer.parameters()).device)


_ACTIONS = {BEGIN: begin_update, END: end_update}


def handle(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    action = str(kwargs.get("action"))  # by position SGLang itself would refuse ours
    if action not in _ACTIONS:
        return original(self, *args, **kwargs)
    error: Exception | None = None
    try:
        _ACTIONS[action](model_of(self))
    except Exception as found:
        error = found
    failures = _of_all_ranks(None if error is None else str(error))  # only the first rank answers the request
    if error is not None:
        logger.error("%s", error)
        raise error
    if failures:
        raise PluginError(f"{action} failed on {len(failures)} other rank(s): {failures[0]}")
    return None


def _of_all_ranks(failure: str | None) -> list[str]:
    """The failures of this engine's tensor-parallel ranks."""
    import torch.distributed
    from sglang.srt.distributed.parallel_state import get_tp_group

    if not torch.distributed.is_initialized() or get_tp_group().world_size == 1:
        return [failure] if failure else []
    every: list[str | None] = [None] * get_tp_group().world_size
    torch.distributed.all_gather_object(every, failure, group=get_tp_group().cpu_group)
    return [each for each in every if each]


_CHECKER = "sglang.srt.utils.weight_checker:WeightChecker.handle"


def _patch(
    name: str, target: str, wrap: Callable[..., Any], reason: str, retire_when: str, needs: tuple[Need, ...] = ()
) -> Patch:
    file = target.partition(":")[0].removeprefix("sglang.srt.").replace(".", "/")
    return Patch(
        id=f"sglang.weights.{name}",
        target=target,
        wrap=wrap,
        needs=needs,
        roles=frozenset({"sglang_scheduler"}),
        reason=reason,
        upstream=f"{SGLANG}/{file}.py",
        retire_when=retire_when,
    )


SEAMS = (
    Seam(
        name="weights at the engine",
        hooks=("receive_weights", "after_weight_update"),
        patches=(
            _patch(
                "arguments",
                "sglang.srt.managers.scheduler:Scheduler.__init__",
                remember_scheduler,
                "the code that loads a model is not given the server's arguments",
                "load_weights is",
            ),
            _patch(
                "receive",
                "sglang.srt.model_loader.loader:_initialize_model",
                receive_through_plugins,
                "SGLang has no hook between weights that arrive and the model",
                "SGLang has a hook on what it loads, in all kinds of update",
            ),
            _patch(
                "update",
                _CHECKER,
                handle,
                "before 0.5.23 SGLang does not know when updates begin or end, and loads packed weights once",
                "every supported SGLang has update sessions that tell what they received",
                needs=(has_parameter(_CHECKER, "action"),),
            ),
        ),
    ),
)
