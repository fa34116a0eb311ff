"""Let slime's trainer run on the CPU and exchange weights with Megatron-LM's local modules (hook: choose_device)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patches.torch.cpu import device_mode
from miles_plugins.patching import Patch, has_attribute

_LOCAL_EXPERT = re.compile(r"\.mlp\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.(weight|bias)$")
# A draft's layer has a transformer layer inside.
_INPUT_NORM = re.compile(r"(\.layers\.\d+(?:\.transformer_layer)?)\.input_layernorm\.weight$")


def transformer_engine_name(name: str, expert_offset: int) -> str:
    """A parameter's name under Megatron's local layer specification, as TransformerEngine's modules would call it.

    slime's converters, in both directions, know those names only. `expert_offset` is the global index of this rank's
    first expert.
    """

    def grouped(match: re.Match[str]) -> str:
        index, linear, kind = match.groups()
        return f".mlp.experts.{linear}.{kind}{int(index) + expert_offset}"

    name = _LOCAL_EXPERT.sub(grouped, name)
    return _INPUT_NORM.sub(r"\1.self_attention.linear_qkv.layer_norm_weight", name)


def named_params_and_buffers(
    original: Callable[..., Any],
    args: Any,
    model: Sequence[Any],
    convert_to_global_name: bool = True,
    *rest: Any,
    **kwargs: Any,
) -> Iterator[tuple[str, Any]]:
    from megatron.core import mpu

    offset = 0
    if args.num_experts and convert_to_global_name:
        per_rank = args.num_experts // mpu.get_expert_model_parallel_world_size()
        offset = mpu.get_expert_model_parallel_rank() * per_rank
    named = original(args, model, convert_to_global_name, *rest, **kwargs)
    return ((transformer_engine_name(name, offset), parameter) for name, parameter in named)


def enter_device_mode(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """The mode belongs to a thread; slime's actor does all its work in the one that builds it."""
    # Megatron initialises weights under its CUDA random state and warns, for each, that the CPU's has moved: it has.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    device_mode().__enter__()
    original(self, *args, **kwargs)


def is_available(original: Callable[..., Any], *args: Any) -> bool:
    """slime's CUDA accelerator: its calls of torch.cuda are answered by the CPU here (see patches/torch/cpu.py)."""
    return True


def current_device(original: Callable[..., Any], self: Any, index: Any = None) -> Any:
    """slime wants torch.cuda's number, and hands it, or "cuda:" with it, to torch as a device; the CPU has none."""
    return self._module().current_device()


def leave_torch_distributed_alone(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """slime's reloadable groups serve offloading, which needs a GPU; they do not forward newer torch's collectives."""


def _accelerator(name: str, target: str, signature: str, wrap: Callable[..., Any] = is_available) -> Patch:
    return Patch(
        id=f"slime.cpu.accelerator-{name}",
        target=f"slime.utils.accelerator{target}",
        wrap=wrap,
        signature=signature,
        roles=frozenset({"trainer"}),
        reason="slime looks for a GPU before it trains",
        upstream="https://github.com/THUDM/slime/blob/624b824a8/slime/utils/accelerator",
        retire_when="slime has an accelerator for CPUs",
    )


SEAMS = (
    Seam(
        name="device of the trainer",
        hooks=("choose_device",),
        only_in=frozenset({"driver", "trainer"}),
        patches=(
            Patch(
                id="slime.cpu.device-mode",
                target="slime.ray.train_actor:TrainRayActor.__init__",
                wrap=enter_device_mode,
                roles=frozenset({"trainer"}),
                reason='Megatron-LM writes device="cuda" in its code',
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/ray/train_actor.py",
                retire_when="Megatron-LM runs without a GPU",
            ),
        ),
    ),
    Seam(
        name="accelerator",
        hooks=("choose_device",),
        patches=(
            _accelerator("found", ":_cuda_available", "()"),
            _accelerator("usable", ".cuda:CUDAAccelerator.is_available", "(self)"),
            _accelerator("number", ".torch_accelerator:TorchAccelerator.current_device", "(self)", current_device),
            _accelerator("device", ".torch_accelerator:TorchAccelerator.device", "(self, index=None)", current_device),
        ),
        variants=(
            Variant(
                "slime up to v0.3.1",  # asks torch.cuda
                (),
                has=(has_attribute("slime.utils.logging_utils"),),
                lacks=(has_attribute("slime.utils.accelerator"),),
            ),
        ),
    ),
    Seam(
        name="plain process groups",
        hooks=("choose_device",),
        only_in=frozenset({"driver", "trainer"}),
        patches=(
            Patch(
                id="slime.cpu.process-groups",
                target="slime.utils.reloadable_process_group:monkey_patch_torch_dist",
                wrap=leave_torch_distributed_alone,
                roles=frozenset({"trainer"}),
                reason="with it and torch 2.13, collectives stop: 'No backend type associated with device type cpu'",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/utils/reloadable_process_group.py",
                retire_when="slime forwards every collective of the installed torch",
            ),
        ),
    ),
    Seam(
        name="local parameter names",
        hooks=("choose_device",),
        only_in=frozenset({"driver", "trainer"}),
        patches=(
            Patch(
                id="slime.cpu.parameter-names",
                target="slime.backends.megatron_utils.update_weight.common:named_params_and_buffers",
                wrap=named_params_and_buffers,
                signature="(args, model, convert_to_global_name=True, translate_gpu_to_cpu=False)",
                roles=frozenset({"trainer"}),
                reason="slime's converters know only the parameter names of TransformerEngine's modules",
                upstream="https://github.com/THUDM/slime/tree/v0.3.1/slime/backends/megatron_utils/megatron_to_hf",
                retire_when="slime converts the local layer specification too",
            ),
        ),
    ),
)
