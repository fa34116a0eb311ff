"""Weights on their way into SGLang's model (hooks: engine_model_built, receive_weights, after_weight_update).

Every way that weights take, from the checkpoint and in each kind of update, ends in `load_weights` of the model. What
one update brings is known only to who sends it, so the engine's actor says where it begins and ends
(`miles_plugins.patches.slime.weight_update`). Its word reaches every scheduler of the server through SGLang's
`/weights_checker`, which takes any text as its action, and answers with an HTTP error where one raises.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from miles_plugins.activation import current
from miles_plugins.compat.sglang_weights import BEGIN, END, device_loading_context, has_update_sessions, model_of
from miles_plugins.errors import PluginError
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Need, Patch, has_parameter
from miles_plugins.weights import receive

if TYPE_CHECKING:
    import torch

PACKED = ".weight_packed"  # in a checkpoint of compressed-tensors
SGLANG = "https://github.com/sgl-project/sglang/blob/v0.5.15.post1/python/sglang/srt"
logger = logging.getLogger("miles_plugins")
_scheduler: Any = None  # of this process; its `server_args` are there before it loads a model


class Reception:
    """In place of `load_weights` of one model: what it loads passes the plugins, and is counted."""

    def __init__(self, load_weights: Callable[..., Any]) -> None:
        self._load_weights = load_weights
        self.received: Counter[str] = Counter()
        self.failed: str | None = None  # SGLang turns this into an answer, which slime hears of the first rank only
        self.updating = False
        self.packed: str | None = None  # the first tensor that came to the model for an INT4 kernel
        self.restored: list[tuple[Any, Any]] = []  # layers whose packed weights wait for `process`, and who does that

    def __call__(self, weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        given = receive(current().plugins, _scheduler.server_args, self._counted(weights))
        try:
            return self._load_weights(self._loaded(given), *args, **kwargs)
        except BaseException as error:
            self.failed = f"{type(error).__name__}: {error}"
            raise

    def _counted(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self.received[name] += 1
            yield name, tensor

    def _loaded(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name.endswith(PACKED):
                self.packed = self.packed or name
            yield name, tensor


def remember_scheduler(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    global _scheduler
    _scheduler = self
    original(self, *args, **kwargs)


def receive_through_plugins(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    model = original(*args, **kwargs)
    current().hook.engine_model_built(server_args=_scheduler.server_args, model=model)
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
    reception.failed = None
    reception.updating = True
    layers = list(_packed_layers(model))
    if reception.packed and not layers:
        raise PluginError(
            "packed weights cannot be replaced: no layer of this model can make them loadable again",
            {"packed": reception.packed, "expected": "restore_weights_before_loading of the layer's scheme"},
            "use a supported SGLang (docs/compatibility.md), and its Marlin kernel: --sglang-moe-runner-backend marlin",
        )
    # An SGLang with update sessions has restored them itself.
    reception.restored = [] if has_update_sessions() else layers
    for layer, method in reception.restored:
        method.restore_weights_before_loading(layer)


def received(model: Any) -> Counter[str]:
    """How often each name came in the update that ends.

    Raises:
        PluginError: no update had begun, or a part of it could not be loaded.
    """
    reception = _reception(model)
    if not reception.updating:
        raise PluginError(
            "a weight update ends that did not begin",
            {},
            "the server was restarted during an update; go on from the last checkpoint",
        )
    if reception.failed is not None:
        raise PluginError(
            "a part of a weight update could not be loaded",
            {"found": reception.failed},
            "look for the first error in this engine's log, and go on from the last checkpoint",
        )
    return reception.received


def end_update(model: Any, of_ranks: Sequence[Mapping[str, int]]) -> None:
    """Let the plugins judge what has come to all ranks, and pack it again for the kernels.

    Raises:
        PluginError: this rank or a plugin misses something. The layers then stay unpacked.
    """
    reception = _reception(model)
    every: Counter[str] = Counter()
    for names in of_ranks:
        every |= Counter(names)  # the larger of both counts
    _require_own(model, reception.received, every)
    current().hook.after_weight_update(server_args=_scheduler.server_args, received=dict(every))
    for layer, method in reception.restored:
        with _on_its_device(layer), _in_the_same_memory(layer):
            method.process_weights_after_loading(layer)
    reception.restored = []
    reception.updating = False


_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def _require_own(model: Any, own: Mapping[str, int], every: Mapping[str, int]) -> None:
    """Raise unless this rank got what others did, except for their experts: slime may send each rank only its own."""
    size, rank = next(
        ((each.moe_ep_size, each.moe_ep_rank) for each in model.modules() if hasattr(each, "moe_ep_rank")), (1, 0)
    )
    numbers = {name: int(found[1]) for name in every if (found := _EXPERT.search(name))}
    experts = max(numbers.values(), default=0) + 1

    def elsewhere(name: str) -> bool:
        return name in numbers and numbers[name] * size // experts != rank

    if missing := sorted(name for name in every if name not in own and not elsewhere(name)):
        raise PluginError(
            "a weight update did not bring this rank what it brought others",
            {"missing": f"{len(missing)}, such as {missing[0]}", "experts of this rank": f"part {rank + 1} of {size}"},
            "look for the first error in this engine's log, and go on from the last checkpoint",
        )


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


@contextmanager
def _in_the_same_memory(layer: Any) -> Iterator[None]:
    """CUDA graphs go on using the tensors they were captured with; Marlin's workspace, for one, is made anew."""
    import torch

    places = (layer._parameters, layer._buffers, layer.__dict__)
    before = [(place, name, each) for place in places for name, each in place.items() if torch.is_tensor(each)]
    yield
    for place, name, old in before:
        new = place.get(name)
        if torch.is_tensor(new) and new is not old and (new.shape, new.dtype) == (old.shape, old.dtype):
            old.data.copy_(new.data)
            place[name] = old


def handle(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    action = str(kwargs.get("action"))  # by position SGLang itself would refuse ours
    if action == BEGIN:
        _on_all_ranks(action, lambda: begin_update(model_of(self)))
    elif action == END:
        of_ranks = _on_all_ranks(action, lambda: dict(received(model_of(self))))
        _on_all_ranks(action, lambda: end_update(model_of(self), of_ranks))
    else:
        return original(self, *args, **kwargs)
    return None


def _on_all_ranks(action: str, step: Callable[[], Any]) -> list[Any]:
    """What a step gave on each rank of this engine. Where it raised on one, all raise: only the first one is heard."""
    result, error = None, None
    try:
        result = step()
    except Exception as found:
        error = found
    of_ranks = _of_all_ranks((result, None if error is None else str(error)))
    if error is not None:
        logger.error("%s", error)
        raise error
    if failures := [failure for _, failure in of_ranks if failure]:
        raise PluginError(f"{action} failed on {len(failures)} other rank(s): {failures[0]}")
    return [result for result, _ in of_ranks]


def _of_all_ranks(mine: Any) -> list[Any]:
    """The same of each of this engine's tensor-parallel ranks."""
    import torch.distributed
    from sglang.srt.distributed.parallel_state import get_tp_group

    if not torch.distributed.is_initialized() or get_tp_group().world_size == 1:
        return [mine]
    every = [None] * get_tp_group().world_size
    torch.distributed.all_gather_object(every, mine, group=get_tp_group().cpu_group)
    return every


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
        hooks=("engine_model_built", "receive_weights", "after_weight_update"),
        patches=(
            _patch(
                "arguments",
                "sglang.srt.managers.scheduler:Scheduler.__init__",
                remember_scheduler,
                "the code that loads a model is not given the server's arguments",
                "SGLang gives load_weights the server's arguments",
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
