"""What cannot work together with INT4 training, found before anything starts; at the latest before training does."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from miles_plugins import ArgumentError, PluginError
from miles_plugins.checkpoints import CONFIG, read_header, read_json, weight_map
from miles_plugins.int4_qat.checkpoint import CONVERT, PACKED, read_format
from miles_plugins.int4_qat.converter import MODULES
from miles_plugins.int4_qat.memory import GROUP_SIZES, MARLIN_K
from miles_plugins.int4_qat.selection import Selection

HOOK = "OPEN_TRAINING_INT4_FAKE_QAT_FLAG"
"""Turns on the fake quantization in the Megatron of slime's and miles' images, and of NVIDIA/Megatron-LM#5108."""
ADVICE = "change what is named, or leave int4 out"
CAPTURED = "a captured pass would not quantize the next weights"
TWICE = "the Megatron of slime's image would quantize as well, on another grid: unset it"


def check(args: Namespace, selection: Selection) -> None:
    """Raise ArgumentError naming every flag, variable or field of the checkpoint that speaks against it (driver)."""
    reasons = {**_reasons(args), **_checkpoint(args, selection)}
    reasons = {name: reason for name, reason in reasons.items() if reason}
    if reasons:
        raise ArgumentError("int4_qat cannot work with these arguments", reasons, ADVICE)
    _require_whole_groups(args, selection)


def check_trainer(args: Namespace) -> None:
    """The same of what one trainer sees: its own environment, and its own arguments of --megatron-config-path."""
    reasons = {name: reason for name, reason in _reasons(args).items() if reason}
    if reasons:
        raise ArgumentError("int4_qat cannot work in this trainer", reasons, ADVICE)


def _reasons(args: Namespace) -> dict[str, str | None]:
    def given(name: str) -> object:
        return getattr(args, name, None)

    def when(condition: object, reason: str) -> str | None:
        return reason if condition else None

    variables = given("train_env_vars")
    variables = json.loads(variables) if isinstance(variables, str) and variables else variables or {}
    on = isinstance(variables, Mapping) and str(variables.get(HOOK)) == "1"
    return {
        HOOK: when(os.environ.get(HOOK) == "1", TWICE),
        "--train-env-vars": when(on, f"{HOOK}=1 in it: {TWICE}"),
        "--use-transformer-engine-op-fuser": when(
            given("use_transformer_engine_op_fuser"), "the fused operations read the parameters past the layers"
        ),
        "--moe-single-grouped-weight": when(
            given("moe_single_grouped_weight"), "one GroupedTensor for all experts has no weights one by one"
        ),
        "--fp8-format": when(given("fp8") or given("fp8_format"), "the weights would be FP8 on top of INT4"),
        "--fp4-format": when(given("fp4") or given("fp4_format"), "the weights would be FP4 on top of INT4"),
        "--use-megatron-fsdp": when(given("use_megatron_fsdp"), "its weights are gathered inside each layer's forward"),
        "--use-torch-fsdp2": when(given("use_torch_fsdp2"), "its weights are gathered inside each layer's forward"),
        "--fp16": when(given("fp16"), "the engine's grid has bfloat16 scales"),
        "--cuda-graph-impl": when(given("cuda_graph_impl") not in (None, "none"), CAPTURED),
        "--enable-cuda-graph": when(given("enable_cuda_graph"), CAPTURED),
        "--external-cuda-graph": when(given("external_cuda_graph"), CAPTURED),
        "--megatron-to-hf-mode": when(
            given("megatron_to_hf_mode") == "bridge",
            "bridge: its colocated weight sync packs by slime's own rules, past the plugins; take raw",
        ),
        "--update-weight-mode": when(
            given("update_weight_mode") == "delta", "an engine's packed weights can only be replaced as a whole"
        ),
        "--sglang-pp-size": when(
            _pipeline_stages(args) > 1,
            "only the first pipeline stage answers whether an update succeeded",
        ),
        "--sglang-speculative-algorithm": when(
            given("sglang_speculative_algorithm"), "which weights a draft model must have received is not known"
        ),
        "--sglang-moe-runner-backend": when(
            given("sglang_moe_runner_backend") not in (None, "auto", "marlin") and not _on_cpu(args),
            f"{given('sglang_moe_runner_backend')}: only Marlin's INT4 experts can be given new weights",
        ),
    }


def _checkpoint(args: Namespace, selection: Selection) -> dict[str, str | None]:
    wanted, found = set(args.int4_modules), selection.kinds
    dense, size = sorted(found - {"experts"}), selection.format.group_size
    packed, named = (",".join(name for name in MODULES if name in each) for each in (found, wanted))
    differ = f"the checkpoint packs {packed}, and the flag says {named}: give --int4-modules {packed}"
    at_top = read_json(Path(args.hf_checkpoint) / CONFIG).get("quantization_config") is not None
    return {
        "--int4-modules": differ if wanted != found else None,
        "--hf-checkpoint": "quantization_config is in text_config only, where slime does not look: copy it to the top "
        f"of {CONFIG}"
        if not at_top
        else None
        if _on_cpu(args)
        else f"packs {', '.join(dense)}: SGLang cannot give its dense INT4 layers new weights; pack experts only"
        if dense
        else f"has groups of {size}, and SGLang's kernel only {', '.join(map(str, sorted(GROUP_SIZES)))}: {CONVERT}"
        if size not in GROUP_SIZES
        else None,
    }


def _on_cpu(args: Namespace) -> bool:
    """Whether the engine computes with dequantized weights: SGLang on the CPU, the embedded host's anywhere."""
    return getattr(args, "sglang_device", "cpu") == "cpu"


def _pipeline_stages(args: Namespace) -> int:
    """Of one engine."""
    return int(getattr(args, "sglang_pp_size", None) or getattr(args, "sglang_pipeline_parallel_size", None) or 1)


def _require_whole_groups(args: Namespace, selection: Selection) -> None:
    """Raise for a layout in which a group would lie on two GPUs, or Marlin take several groups for one."""
    folder, size = Path(args.hf_checkpoint), selection.format.group_size
    experts = _expert_sizes(folder, selection.modules)
    if experts is None:
        return
    down, inner, _ = experts
    trainer = int(getattr(args, "expert_tensor_parallel_size", None) or 1)
    if inner % (trainer * size):
        raise ArgumentError(
            f"{down} cannot be quantized in groups of {size} with --expert-tensor-parallel-size {trainer}",
            {"K": inner, "on each rank": f"{inner} / {trainer}", "expected": f"a multiple of {size}"},
            "take a lower --expert-tensor-parallel-size, or convert the checkpoint with a smaller --group-size",
        )
    if _on_cpu(args):
        return
    gpus = int(getattr(args, "rollout_num_gpus_per_engine", None) or 1)
    whole_experts = int(
        getattr(args, "sglang_ep_size", None) or getattr(args, "sglang_expert_parallel_size", None) or 1
    )
    copies = int(getattr(args, "sglang_moe_dp_size", None) or 1)
    _require_marlins_groups(experts, size, gpus // _pipeline_stages(args), whole_experts, copies)


def _expert_sizes(folder: Path, packed: Collection[str]) -> tuple[str, int, int] | None:
    """(name of a second weight, its K, the first weight's K) of the packed experts of a checkpoint."""
    files = weight_map(folder)
    modules = sorted(module for module in packed if ".experts." in module)
    down = next((module for module in modules if module.endswith((".down_proj", ".w2"))), None)
    up = next((module for module in modules if module.endswith((".up_proj", ".gate_proj", ".w1", ".w3"))), None)
    if down is None or up is None:
        return None
    inner, hidden = (read_header(folder / files[each + PACKED])[each + PACKED].shape[-1] * 8 for each in (down, up))
    return down, inner, hidden


def _require_marlins_groups(
    experts: tuple[str, int, int], size: int, gpus: int, whole_experts: int, copies: int
) -> None:
    """Raise where Marlin would take several groups for one, with so many GPUs, --ep-size and --moe-dp-size."""
    down, inner, hidden = experts
    tensor = max(gpus // whole_experts // copies, 1)
    whole = max(MARLIN_K, size)
    if inner % (tensor * whole) or hidden % 128:
        raise ArgumentError(
            f"SGLang's INT4 kernel would take the groups of {down} for others, and serve wrong experts without a word",
            {
                "K on each GPU": f"{inner} / {tensor} ({gpus} GPUs an engine, {whole_experts} by whole experts)",
                "expected": f"a multiple of {whole}",
                "hidden size": hidden,
                "its multiple": 128,
            },
            "divide by whole experts: --sglang-ep-size; or fewer GPUs an engine; or a checkpoint with smaller groups",
        )


# -- the engine ------------------------------------------------------------------------------------------------------


def check_engine(server_args: Any, packed: Collection[str]) -> None:
    """Raise where this engine itself, whose arguments --sglang-config may have changed, cannot work (scheduler)."""
    backend = getattr(server_args, "moe_runner_backend", None)
    stages, draft = getattr(server_args, "pp_size", 1), getattr(server_args, "speculative_algorithm", None)
    reasons = {
        "pp_size": f"{stages}: only the first pipeline stage answers whether an update succeeded"
        if stages > 1
        else None,
        "speculative_algorithm": f"{draft}: which weights a draft model must have received is not known"
        if draft
        else None,
        "moe_runner_backend": f"{backend}: only Marlin's INT4 experts can be given new weights"
        if backend not in (None, "auto", "marlin")
        else None,
    }
    reasons = {name: reason for name, reason in reasons.items() if reason}
    if reasons:
        raise ArgumentError("int4_qat cannot work with this engine", reasons, f"{ADVICE}; see --sglang-config as well")
    folder = Path(server_args.model_path)
    experts, format = _expert_sizes(folder, packed), read_format(read_json(folder / CONFIG))
    if experts is not None and format is not None:
        copies = getattr(server_args, "moe_dp_size", 1)
        _require_marlins_groups(experts, format.group_size, server_args.tp_size, server_args.ep_size, copies)


def check_received(wanted: Collection[str], allowed: Collection[str], received: Mapping[str, int]) -> None:
    """Raise unless each packed tensor of the checkpoint, and no plain weight in its place, came once in an update.

    Args:
        wanted: names that must have come.
        allowed: names besides that may: of a draft that not every trainer trains.
        received: how often each name came.
    """
    known = {*wanted, *allowed}
    missing = sorted(name for name in wanted if name not in received)
    twice = sorted(name for name, times in received.items() if times > 1 and name in known)
    weights = [name for name in received if name.endswith(".weight")]
    plain = sorted(name for name in weights if name.removesuffix(".weight") + PACKED in known)
    strange = sorted(name for name in received if name.endswith(PACKED) and name not in known)
    if missing or twice or plain or strange:
        raise PluginError(
            "a weight update did not bring each INT4 weight of the checkpoint once; generation does not resume",
            {
                "expected": f"{len(wanted)} tensors",
                "missing": _some(missing),
                "twice": _some(twice),
                "not packed": _some(plain),
                "unknown": _some(strange),
            },
            f"the trainer and the engine must have the same --hf-checkpoint; else report this. {CONVERT}"
            if strange or plain
            else "go on from the last checkpoint; look for the first error in the trainers' logs",
        )


def _some(names: list[str]) -> str | None:
    return f"{len(names)}, such as {names[0]}" if names else None


def engine_evidence(arrived: int, dequantized: int) -> str | None:
    """What this process shows of itself; None where no packed weight was loaded, as of a frozen bfloat16 model."""
    if not arrived:
        return None
    if dequantized:
        return f"{dequantized} INT4 matrices loaded as the bfloat16 values they stand for (no INT4 kernel here)"
    return f"{arrived} INT4 matrices loaded packed"
