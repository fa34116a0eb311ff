"""Let code that takes CUDA for granted run on the CPU (hook: choose_device).

`torch.cuda.is_available()` stays False, so everything that asks first keeps its own CPU path; only what does not ask is
answered here. Nothing computes differently: the answers are "nothing to do" or the CPU's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Need, Patch, has_parameter

if TYPE_CHECKING:
    import torch

GIGABYTE = 1 << 30


def _nothing(*args: Any, **kwargs: Any) -> None:
    """There is no device to do it on."""


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _one(*args: Any, **kwargs: Any) -> int:
    return 1


def _yes(*args: Any, **kwargs: Any) -> bool:
    return True


def _cpu(*args: Any, **kwargs: Any) -> torch.device:
    import torch

    return torch.device("cpu")


def _memory(*args: Any, **kwargs: Any) -> tuple[int, int]:
    """Free and total bytes: room enough, so that nothing is offloaded for lack of it."""
    return 64 * GIGABYTE, 64 * GIGABYTE


def _name(*args: Any, **kwargs: Any) -> str:
    return "CPU (cpu_rehearsal)"


def _capability(*args: Any, **kwargs: Any) -> tuple[int, int]:
    """Hopper's, which is what Megatron's argument checks take as the ordinary case."""
    return 9, 0


def _properties(*args: Any, **kwargs: Any) -> SimpleNamespace:
    return SimpleNamespace(
        name=_name(), major=9, minor=0, total_memory=64 * GIGABYTE, multi_processor_count=1, uuid="cpu", warp_size=32
    )


def _random_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Megatron keeps a CUDA random state a tensor-parallel rank; dropout is off, so any state will do."""
    import torch

    return torch.get_rng_state()


class Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: object) -> None: ...


class Event:
    """An event that has already come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _stream(*args: Any, **kwargs: Any) -> Stream:
    return Stream()


def _stream_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


ANSWERS: dict[str, Callable[..., Any] | type] = {
    "set_device": _nothing,
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "ipc_collect": _nothing,
    "manual_seed": _nothing,
    "manual_seed_all": _nothing,
    "set_rng_state": _nothing,
    "reset_peak_memory_stats": _nothing,
    "current_device": _cpu,
    "device_count": _one,
    "is_initialized": _yes,
    "_lazy_init": _nothing,
    "_lazy_call": _nothing,  # torch would queue it until CUDA is initialised, which never happens
    "memory_allocated": _zero,
    "memory_reserved": _zero,
    "max_memory_allocated": _zero,
    "max_memory_reserved": _zero,
    "mem_get_info": _memory,
    "get_device_name": _name,
    "get_device_capability": _capability,
    "get_device_properties": _properties,
    "get_rng_state": _random_state,
    "Stream": Stream,
    "Event": Event,
    "current_stream": _stream,
    "default_stream": _stream,
    "stream": _stream_context,
}


# -- tensors ---------------------------------------------------------------------------------------------------------


def _stay(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """`.cuda()` and `.pin_memory()`: the tensor or module is already where it will be used."""
    return self


def cuda_type_names(original: Callable[..., Any], self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Megatron's distributed optimizer recognises parameters by the name of their CUDA tensor type."""
    if dtype is None:
        # Under a function mode torch looks this method up by name again, so the name may have been changed already.
        return "torch.cuda." + original(self).removeprefix("torch.").removeprefix("cuda.")
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.", 1)
    return original(self, dtype, *args, **kwargs)


def on_cpu(value: Any) -> Any:
    """A device argument: every CUDA device becomes the CPU."""
    import torch

    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def device_mode() -> Any:
    """A torch function mode that maps `device="cuda…"` to the CPU and leaves memory unpinned."""
    from torch.overrides import TorchFunctionMode

    class CpuMode(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if "device" in kwargs:
                kwargs["device"] = on_cpu(kwargs["device"])
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            if getattr(function, "__name__", "") == "to":
                args = tuple(on_cpu(argument) for argument in args)
            return function(*args, **kwargs)

    return CpuMode()


def known_operators(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """torchvision's CUDA build names operators that its library, which cannot be loaded here, would have defined."""
    import torch

    for op in args:
        if isinstance(op, str) and op.startswith("torchvision::"):
            try:
                torch._C._dispatch_find_schema_or_throw(op, "")
            except RuntimeError:
                return lambda function: function
    return original(*args, **kwargs)


# -- process groups --------------------------------------------------------------------------------------------------


def gloo_group(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """slime, Megatron-LM and SGLang ask for nccl by name, with options for it; here every group is gloo's.

    For `init_process_group`, `new_group` and the `_new_process_group_helper` that slime and SGLang call directly.
    """
    import inspect

    import torch

    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.arguments["backend"] = torch.distributed.Backend("gloo")
    for option in ("backend_options", "pg_options", "device_id"):
        if option in bound.arguments:
            bound.arguments[option] = None
    return original(*bound.args, **bound.kwargs)


def broadcast_bytes(original: Callable[..., Any], tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """gloo has no FP8; nccl sends it as bytes."""
    import torch

    is_byte = tensor.is_floating_point() and tensor.element_size() == 1
    return original(tensor.view(torch.uint8) if is_byte else tensor, *args, **kwargs)


def _patch(
    name: str,
    target: str,
    reason: str,
    roles: tuple[str, ...] = (),
    *,
    wrap: Callable[..., Any] | None = None,
    replace_with: Callable[[Any], Any] | None = None,
    inherited: bool = False,
    needs: tuple[Need, ...] = (),
    signature: str | None = None,
) -> Patch:
    return Patch(
        id=f"torch.cpu.{name}",
        target=target,
        wrap=wrap,
        replace_with=replace_with,
        roles=frozenset(roles),
        inherited=inherited,
        needs=needs,
        signature=signature,
        reason=reason,
        upstream="https://github.com/THUDM/slime (slime.utils.accelerator, after v0.3.1)",
        retire_when="slime and Megatron-LM ask an accelerator registry everywhere",
    )


def _cuda_patch(name: str, answer: Any) -> Patch:
    patch_name = f"cuda.{name.strip('_').replace('_', '-')}"
    target = f"torch.cuda:{name}"
    reason = "slime and Megatron-LM call it without asking whether there is a GPU"
    if isinstance(answer, type):
        return _patch(patch_name, target, reason, replace_with=lambda original: answer)
    return _patch(patch_name, target, reason, wrap=lambda original, *args, **kwargs: answer(*args, **kwargs))


def _group_patch(name: str, function: str, reason: str, roles: tuple[str, ...] = ()) -> Patch:
    target = f"torch.distributed.distributed_c10d:{function}"
    return _patch(name, target, reason, roles, wrap=gloo_group, needs=(has_parameter(target, "backend"),))


_NCCL = "Megatron-LM and slime name nccl for some groups whatever --distributed-backend says"
_NO_QUESTION = "slime and Megatron-LM move tensors to the GPU without asking whether there is one"

SEAMS = (
    Seam(
        name="cuda on the cpu",
        hooks=("choose_device",),
        only_in=frozenset({"driver", "trainer"}),
        patches=(
            *(_cuda_patch(name, answer) for name, answer in ANSWERS.items()),
            _patch("tensor-cuda", "torch:Tensor.cuda", _NO_QUESTION, wrap=_stay, inherited=True),
            _patch("tensor-pin-memory", "torch:Tensor.pin_memory", _NO_QUESTION, wrap=_stay, inherited=True),
            _patch(
                "tensor-type",
                "torch:Tensor.type",
                "Megatron compares CUDA tensor type names",
                wrap=cuda_type_names,
                inherited=True,
            ),
            _patch("module-cuda", "torch.nn.modules.module:Module.cuda", _NO_QUESTION, wrap=_stay),
            _group_patch("init-group", "init_process_group", _NCCL),
            _group_patch("new-group", "new_group", _NCCL),
        ),
    ),
    Seam(
        name="gloo groups",
        hooks=("choose_device",),
        patches=(
            _group_patch(
                "group",
                "_new_process_group_helper",
                "slime and SGLang name nccl for the group that carries the weights",
                ("trainer", "sglang_scheduler"),
            ),
            _patch(
                "broadcast",
                "torch.distributed.distributed_c10d:broadcast",
                "slime sends FP8 weights to SGLang, and gloo does not know the type",
                ("trainer", "sglang_scheduler"),
                wrap=broadcast_bytes,
                signature="(tensor, src=None, group=None, async_op=False, group_src=None)",
            ),
        ),
    ),
    Seam(
        name="torchvision operators",
        hooks=("choose_device",),
        patches=(
            _patch(
                "torchvision-operators",
                "torch.library:register_fake",
                wrap=known_operators,
                reason="no index has a CPU build of torchvision, and its CUDA build does not import without a GPU",
                roles=("sglang_server", "sglang_scheduler"),
            ),
        ),
    ),
)
