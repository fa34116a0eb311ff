"""An engine's draft follows the trained weights, or is left alone (hook: draft_is_trained).

Which updates reach a draft differs by SGLang's release, by the way that weights come, and by the kind of draft; before
0.5.23 nothing that comes over nccl does. Here all are one: only the target receives, and what it is about to load the
drafts load as well, the same tensors in the same call. A frozen draft is not there for an update at all: neither
weights that have its names, nor what is done to a model before and after it is given new ones.

The engine's actor knows whether drafts are trained; its word reaches the schedulers by the environment.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from miles_plugins.compat.sglang_drafts import draft_runners, is_draft
from miles_plugins.compat.sglang_weights import BEGIN, END, model_of
from miles_plugins.errors import PluginError
from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patches.sglang import weights
from miles_plugins.patching import Patch, has_attribute, has_parameter

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

SGLANG = "https://github.com/sgl-project/sglang/blob/v0.5.15.post1/python/sglang/srt"
DRAFT = "MILES_PLUGINS_DRAFT"
TRAINED, FROZEN = "trained", "frozen"
LOST = "look for the first error in this engine's log, and go on from the last checkpoint"
logger = logging.getLogger("miles_plugins")


def role() -> str | None:
    """What this server's drafts are; None where SGLang shall treat them as it does."""
    found = os.environ.get(DRAFT)
    return found if found in (TRAINED, FROZEN) else None


@contextmanager
def told(draft_is_trained: bool | None) -> Iterator[None]:
    """Within it, a server that is started learns what its draft is; None says nothing."""
    before = os.environ.pop(DRAFT, None)
    if draft_is_trained is not None:
        os.environ[DRAFT] = TRAINED if draft_is_trained else FROZEN
    try:
        yield
    finally:
        os.environ.pop(DRAFT, None)
        if before is not None:
            os.environ[DRAFT] = before


# -- receive once, load everywhere -----------------------------------------------------------------------------------


class _Alone:
    """A scheduler, or its weight updater, without its draft worker; everything else is its own."""

    draft_worker = None

    def __init__(self, whole: Any) -> None:
        self.__dict__["_whole"] = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._whole, name, value)


@contextmanager
def _followed(target: Any, drafts: list[Any]) -> Iterator[None]:
    """Within it, drafts load what the target does, after it."""
    own = target.load_weights

    def load_weights(named_tensors: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        named_tensors = list(named_tensors)
        result = own(named_tensors, *args, **kwargs)
        for draft in drafts:
            draft.load_weights(named_tensors)
        return result

    target.load_weights = load_weights
    try:
        yield
    finally:
        target.load_weights = own


def load_everywhere(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    """An update by tensors, from whichever transport."""
    if role() is None:
        return original(self, recv_req)
    followers = [runner.model for runner in draft_runners(self.draft_worker)] if role() == TRAINED else []
    with _followed(self.tp_worker.model_runner.model, followers):
        return original(_Alone(self), recv_req)


def read_everywhere(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    """An update from a folder, which each model reads by itself: to keep it in memory could take more than there is."""
    if role() is None:
        return original(self, recv_req)
    answer = original(_Alone(self), recv_req)
    for runner in draft_runners(self.draft_worker) if role() == TRAINED else ():
        if not answer.success:
            break
        success, message = runner.update_weights_from_disk(
            recv_req.model_path, recv_req.load_format, recapture_cuda_graph=recv_req.recapture_cuda_graph
        )
        if not success:
            logger.error("%s", message)
            answer = type(answer)(success=False, message=message, num_paused_requests=0)
    return answer


def select_runners(original: Callable[..., Any], self: Any, selector: str = "all") -> Any:
    """Where updates go to the runners that are selected, a frozen draft is none of them, whatever is asked for."""
    runners = original(self, selector)
    return [each for each in runners if each[0] == "target"] if role() == FROZEN else runners


# -- what has come ---------------------------------------------------------------------------------------------------


class Written:
    """In place of `load_weights` of a draft: which of its parameters were written to.

    SGLang's models pass over names that they do not know. So it takes more than names that came to show that a draft
    has new weights: every parameter that its checkpoint filled must have been written to again.
    """

    def __init__(self, model: Any, load_weights: Callable[..., Any]) -> None:
        self._model, self._load_weights = model, load_weights
        self.names: set[str] = set()
        self.at_start: frozenset[str] | None = None  # until the first update begins, the checkpoint is read

    def __call__(self, named_tensors: Any, *args: Any, **kwargs: Any) -> Any:
        before = {name: _range(each) for name, each in self._model.named_parameters()}
        with _watched(before, self.names):
            result = self._load_weights(named_tensors, *args, **kwargs)
        self.names |= {name for name, each in self._model.named_parameters() if _range(each) != before.get(name)}
        return result

    def begin(self) -> None:
        if self.at_start is None:
            self.at_start = frozenset(self.names)
        self.names.clear()

    def missing(self, target: Any) -> list[str]:
        """What the update left as it was, of the draft's own: embedding and head may be the target's."""
        shared = {_range(each) for each in target.parameters()}
        own = {name for name, each in self._model.named_parameters() if _range(each) not in shared}
        return sorted((own & self.at_start if self.at_start else own) - self.names)


def _range(parameter: Any) -> tuple[int, int]:
    begin = parameter.data_ptr()
    return begin, begin + parameter.numel() * parameter.element_size()


@contextmanager
def _watched(ranges: Mapping[str, tuple[int, int]], written: set[str]) -> Iterator[None]:
    """Note the parameters, by the memory they have, that any operation writes to.

    A dispatch mode is of one thread, and some of SGLang's models load weights that are on the CPU in a pool of threads.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and hasattr(value, "data_ptr"):
                    at = value.data_ptr()
                    written.update(name for name, (begin, end) in ranges.items() if begin <= at < end)
            return func(*args, **(kwargs or {}))

    submit = ThreadPoolExecutor.submit

    def submit_watched(self: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with Watch():
                return function(*args, **kwargs)

        return submit(self, watched, *args, **kwargs)

    ThreadPoolExecutor.submit = submit_watched  # type: ignore[method-assign]
    try:
        with Watch():
            yield
    finally:
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]


def watch_drafts(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    model = original(model_config, *args, **kwargs)
    if role() == TRAINED and is_draft(model_config):
        model.load_weights = model.miles_plugins_written = Written(model, model.load_weights)
    return model


def handle(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Where an update begins and ends for the target, it does for its drafts: some releases ask them as well."""
    action = str(kwargs.get("action"))
    if action not in (BEGIN, END) or role() is None:
        return original(self, *args, **kwargs)
    target, drafts = _models()
    if any(model_of(self) is draft for draft in drafts):
        return None
    if role() == FROZEN:
        return original(self, *args, **kwargs)
    if action == BEGIN:
        original(self, *args, **kwargs)
        weights._on_all_ranks(action, lambda: begin_drafts(drafts))
        return None
    weights._on_all_ranks(action, lambda: judge_drafts(target, drafts))
    original(self, *args, **kwargs)
    for draft in drafts:
        of_ranks = weights._on_all_ranks(action, partial(weights.received, draft))
        weights._on_all_ranks(action, partial(weights.end_update, draft, of_ranks))
    return None


def _models() -> tuple[Any, list[Any]]:
    scheduler = weights._scheduler
    return scheduler.tp_worker.model_runner.model, [each.model for each in draft_runners(scheduler.draft_worker)]


def begin_drafts(drafts: list[Any]) -> None:
    if not drafts:
        raise PluginError(
            "the draft is trained, and this engine has none that can be given weights",
            {"draft worker": type(weights._scheduler.draft_worker).__name__},
            "take --sglang-speculative-algorithm EAGLE, or leave out --enable-mtp-training",
        )
    for draft in drafts:
        weights.begin_update(draft)
        _written(draft).begin()


def judge_drafts(target: Any, drafts: list[Any]) -> None:
    """Raise unless each draft has got new weights for all that is its own (each rank)."""
    for number, draft in enumerate(drafts):
        came, at_target = len(weights.received(draft)), len(weights._reception(target).received)
        which = f"draft {number + 1} of {len(drafts)}, {type(draft).__name__}"
        if not came:
            raise PluginError(
                "a weight update did not reach the draft",
                {"draft": which, "names at the target": at_target, "names at the draft": 0},
                LOST,
            )
        written = _written(draft)
        if missing := written.missing(target):
            raise PluginError(
                "a weight update left a part of the draft as it was",
                {
                    "draft": which,
                    "missing": f"{len(missing)} parameter(s), such as {missing[0]}",
                    "written": len(written.names),
                    "names received": came,
                },
                "the trainer must have the draft's layers (--mtp-num-layers), and "
                "--sglang-speculative-draft-model-path be of the same family as --hf-checkpoint",
            )
        logger.info("%s: %d names received, %d parameters written", which, came, len(written.names))


def _written(draft: Any) -> Written:
    found = getattr(draft, "miles_plugins_written", None)
    if not isinstance(found, Written):
        raise PluginError(
            f"nobody watched how {type(draft).__name__} was loaded",
            {"expected": f"{Written.__name__} as its load_weights"},
            "its loader builds models in a way of its own; take another --sglang-load-format, or report this",
        )
    return found


def _patch(name: str, target: str, wrap: Callable[..., Any], reason: str, **more: Any) -> Patch:
    file = target.partition(":")[0].removeprefix("sglang.srt.").replace(".", "/")
    return Patch(
        id=f"sglang.draft.{name}",
        target=target,
        wrap=wrap,
        roles=frozenset({"sglang_scheduler"}),
        reason=reason,
        upstream=f"{SGLANG}/{file}.py",
        retire_when="slime sends weights to the runners that it selects, and SGLang tells what each has loaded",
        **more,
    )


_CHECKER = "sglang.srt.utils.weight_checker:WeightChecker.handle"
_MIXIN = "sglang.srt.managers.scheduler_update_weights_mixin:SchedulerUpdateWeightsMixin"
_OTHER_MIXIN = (
    "sglang.srt.managers.scheduler_output_processor_mixin:SchedulerOutputProcessorMixin"  # of the same releases
)
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
_WATCH = (
    _patch(
        "watch",
        "sglang.srt.model_loader.loader:_initialize_model",
        watch_drafts,
        "a model passes over names that it does not know, without a word",
        signature="(model_config, load_config, quant_config=None)",
        after=("sglang.weights.receive",),
    ),
    _patch(
        "update",
        _CHECKER,
        handle,
        "some releases ask the draft where an update begins and ends, also a frozen one; the others ask none",
        needs=(has_parameter(_CHECKER, "action"),),
        before=("sglang.weights.update",),
    ),
)


def _of(owner: str) -> tuple[Patch, ...]:
    ways = {"tensor": load_everywhere, "distributed": load_everywhere, "disk": read_everywhere}
    return tuple(
        _patch(
            way,
            f"{owner}.update_weights_from_{way}",
            wrap,
            "weights reach target, draft or both, by the way they come and the kind of draft",
            signature="(self, recv_req)",
        )
        for way, wrap in ways.items()
    )


SEAMS = (
    Seam(
        name="drafts at the engine",
        hooks=("draft_is_trained",),
        patches=(*_WATCH, *_of(_MANAGER)),
        variants=(
            Variant(
                "SGLang from 0.5.23",
                (
                    *_WATCH,
                    _patch(
                        "select",
                        f"{_MANAGER}._select_runners",
                        select_runners,
                        "slime asks for no runners, which is taken for all",
                        signature="(self, selector='all')",
                    ),
                ),
                has=(has_attribute("sglang.srt.managers.io_struct:BeginWeightUpdateReqInput"),),
            ),
            Variant("SGLang before 0.5.15", (*_WATCH, *_of(_MIXIN)), has=(has_attribute(_OTHER_MIXIN),)),
        ),
    ),
)
