"""How SGLang 0.5.9 to 0.5.23 record expert routing, asked of the code that is loaded and not of its version."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from miles_plugins.compat.source import find_module

MOVED_TO = "sglang.srt.state_capturer.routed_experts"  # after 0.5.9
MOVED_FROM = "sglang.srt.layers.moe.routed_experts_capturer"
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")  # in Hugging Face configs


def recorder() -> Any:
    """The module of SGLang's `RoutedExpertsCapturer`."""
    return importlib.import_module(MOVED_TO if find_module(MOVED_TO) else MOVED_FROM)


def capturer_of_this_process() -> Any | None:
    """SGLang's capturer; None where nothing is recorded, for which 0.5.9 has an empty one."""
    found = recorder().get_global_experts_capturer()
    return found if hasattr(found, "host_cache") else None


@contextmanager
def no_capturer() -> Iterator[None]:
    """Whatever runs here records nothing and finds nothing to copy."""
    module = recorder()
    capturer = module.get_global_experts_capturer()
    nothing = module.RoutedExpertsCapturer.create(
        enable=False,
        model_config=None,
        num_fused_shared_experts=0,
        num_tokens=0,
        max_running_requests=0,
        device="cpu",
    )
    module.set_global_experts_capturer(nothing)
    try:
        yield
    finally:
        module.set_global_experts_capturer(capturer)


def copies_before_reuse(capturer: Any) -> bool:
    """Whether SGLang itself keeps what it will copy to the host apart from the buffer that the next pass changes."""
    return "clone" in type(capturer).on_forward_end.__code__.co_names


def routers(model: Any) -> dict[str, Any]:
    """The modules of a loaded model that choose experts and are recorded, by name."""
    from sglang.srt.layers.moe.topk import TopK

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TopK) and getattr(module.topk_config, "allow_routed_experts_capture", True)
    }


def unrecorded_choice(router: Any, device: str) -> str | None:
    """What a router hands to a kernel that then chooses inside; None where it chooses itself, as it does on a CPU."""
    if device != "cuda":
        return None
    from sglang.srt.layers.moe import get_moe_runner_backend
    from sglang.srt.layers.moe.topk import TopKOutputFormat

    output = router.topk_config.output_format
    if output is None:  # until 0.5.15 it is decided at each call
        backend = get_moe_runner_backend()
        if backend.is_triton_kernels():
            output = TopKOutputFormat.TRITON_KERNEL
        elif backend.is_flashinfer_trtllm() or (
            backend.is_flashinfer_mxfp4() and not getattr(router, "is_fp4_experts", False)
        ):
            output = TopKOutputFormat.BYPASSED
    unrecorded = (TopKOutputFormat.TRITON_KERNEL, TopKOutputFormat.BYPASSED)
    return str(output.name).lower() if output in unrecorded else None


def experts_a_layer(model: Any, config: Any) -> int | None:
    """How many experts the routers choose from; None if neither config nor model tells.

    The larger number counts: a config may leave out experts that a gate offers, and an id must fit.
    """
    counts: list[Any] = []
    for name in EXPERTS:
        value = getattr(config, name, None)
        counts += value if isinstance(value, list) else [value]  # a number a layer
    for name in routers(model):
        gate = getattr(model.get_submodule(name.rpartition(".")[0]), "gate", None)
        weight = getattr(gate, "weight", None)
        if weight is not None and weight.dim() == 2 and weight.shape[1] == config.hidden_size:
            counts.append(weight.shape[0])
    return max((count for count in counts if isinstance(count, int)), default=None)


def final_arguments(server_args: Any) -> Callable[[str], Any]:
    """A look-up of the server's arguments as SGLang has completed them; None for one that it does not have."""
    resolved: Callable[[], Mapping[str, Any]] | None = getattr(server_args, "resolved_dict", None)
    if resolved is not None:  # 0.5.23 leaves what it completes out of the object itself
        return resolved().get
    return lambda name: getattr(server_args, name, None)


def unrecordable(argument: Callable[[str], Any]) -> dict[str, str]:
    """Arguments under which the record would be wrong or incomplete, and why; no release says so itself.

    Args:
        argument: gives the value of one of SGLang's `ServerArgs` by its name, None if it does not exist.
    """

    def more_than_one(name: str) -> bool:
        return (argument(name) or 1) > 1

    speculative = argument("speculative_algorithm")
    problems = {
        "pp_size": more_than_one("pp_size") and "each pipeline stage records its own layers only",
        "attn_cp_size": more_than_one("attn_cp_size") and "each context-parallel rank records its part of the prompt",
        "enable_two_batch_overlap": argument("enable_two_batch_overlap")
        and "both halves of a batch are recorded in the same place",
        "enable_pdmux": argument("enable_pdmux") and "prefill and decoding run at once and record in the same place",
        "disaggregation_mode": argument("disaggregation_mode") not in (None, "null")
        and "the decode server does not know the prompt's routing",
        "enable_hierarchical_cache": argument("enable_hierarchical_cache")
        and "cached tokens are loaded again without their routing",
        "enable_lmcache": argument("enable_lmcache") and "cached tokens are loaded without their routing",
        "chunked_prefill_size": (argument("chunked_prefill_size") or 1) < 0
        and "a prompt of any length is one pass, and the record of a pass has a fixed size",
        "speculative_eagle_topk": speculative
        and more_than_one("speculative_eagle_topk")
        and "the accepted branch of the draft's tree is moved in the cache, its routing is not",
        "enable_dp_attention": speculative
        and argument("enable_dp_attention")
        and "with --speculative-algorithm a rank takes the rows of another",
        "speculative_algorithm": str(speculative).upper() == "NGRAM"
        and "the accepted branch of the draft's tree is moved in the cache, its routing is not",
        "ep_dispatch_algorithm": (argument("ep_dispatch_algorithm") or argument("enable_eplb"))
        and find_module(MOVED_TO) is None
        and "this SGLang records the places of experts (EPLB), not the experts",
    }
    return {name: reason for name, reason in problems.items() if isinstance(reason, str)}
