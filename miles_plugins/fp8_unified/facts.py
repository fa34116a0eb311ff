"""The facts that `rules` judges: from slime's arguments, the environment and the files of a checkpoint.

Nothing of upstream is imported. What depends on the machine comes as `Here`, which `look_here` finds in files.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from miles_plugins.checkpoints import CONFIG, layer_of, quantization_config, read_json, text_config, weight_map
from miles_plugins.compat import fp8_upstream, slime_drafts
from miles_plugins.errors import ArgumentError, PluginError
from miles_plugins.fp8_unified import selection
from miles_plugins.fp8_unified.checkpoint import LEFT_OUT, MATRIX_SCALE, SCALE, WEIGHT, matrices, quantised_modules
from miles_plugins.fp8_unified.rules import (
    DEEPGEMM_DISPATCHERS,
    VARIABLE,
    Checkpoint,
    Engine,
    Facts,
    Method,
    Mode,
    Model,
    Recipe,
    Trainer,
    Upstream,
)

GPUS = {
    **dict.fromkeys(("a100", "a800", "a30"), 80),
    **dict.fromkeys(("a10", "a40", "a6000"), 86),
    **dict.fromkeys(("l4", "l20", "l40", "l40s", "4090"), 89),
    **dict.fromkeys(("h100", "h200", "h800", "h20", "gh200"), 90),
    **dict.fromkeys(("b100", "b200", "gb200"), 100),
    **dict.fromkeys(("b300", "gb300"), 103),
    **dict.fromkeys(("5090",), 120),
}
"""Compute capability (times ten) of GPUs, by a word of their names."""
ACTIVE = "MILES_PLUGINS"
"""The variable that carries a run's plugins, as activation.py writes it."""
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
OURS = ("fp8", "fp8_unified")
OTHER_LAYERS = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "fp16",
        "moe_apply_probs_on_input",
        "delay_wgrad_compute",
        "use_transformer_engine_op_fuser",
        "moe_use_legacy_grouped_gemm",
    )
}
"""Flags with which Megatron computes past its linear layers, or not in bfloat16, by their names in the arguments."""
MOST_SCALES = 4096
"""Of a checkpoint's scales, so many tensors are read, spread over all of it."""


@dataclass(frozen=True)
class Here:
    """What this machine and its packages are; each None unless known."""

    capability: int | None = None
    transformer_engine: str | None = None
    cuda: tuple[int, int] | None = None
    sglang: str | None = None
    weight_session: bool | None = None
    upstream: Upstream = field(default_factory=Upstream)


def from_args(
    args: Namespace, environment: Mapping[str, str], folder: Path | None = None, here: Here | None = None
) -> Facts:
    """The facts of a run.

    Args:
        args: slime's, with Megatron's among them and SGLang's as `sglang_…`; what is missing has upstream's default,
            `fp8_train` the plugin's where the plugin is named, and else what Megatron's flags say.
            Without any `sglang_device` the engine is taken for one without a GPU: the embedded host's.
        environment: of the process that starts the run: slime hands some of it on.
        folder: of the checkpoint that the engine loads; None: sizes are taken from the arguments, format and
            modules remain unknown.
        here: of the machines that will run it; by default unknown.

    Raises:
        PluginError: the folder has no config.json, or an argument cannot be understood.
    """
    here = here or Here()
    if folder is not None and not folder.is_dir():
        raise PluginError(
            "--hf-checkpoint is no folder here",
            {"found": folder},
            "give a folder; config.json alone shows most (with the safetensors index, what is quantised, too)",
        )
    config = read_json(folder / CONFIG) if folder is not None else {}
    model = _model(args, config)
    plugins = _plugins(args, environment)
    plugin = _get(args, "fp8_train") is not None or not plugins.isdisjoint(OURS)
    trainer = _trainer(args, environment, model, here, plugin)
    engine = _engine(args, environment, here, plugin)
    checkpoint = _checkpoint(config)
    selections: dict[str, frozenset[str]] = {}
    torn: frozenset[str] = frozenset()
    if folder is not None and checkpoint.method in ("fp8-block", "fp8-tensor"):
        modules = _modules(folder)
        if modules:
            quantised = quantised_modules(folder)
            checkpoint = _with_tensors(checkpoint, folder, quantised, modules, model)
            selections, torn = _selections(config, quantised, modules, checkpoint, trainer, engine, model)
    return Facts(
        trainer=trainer,
        model=model,
        checkpoint=checkpoint,
        engine=engine,
        upstream=here.upstream,
        selections=selections,
        torn=torn,
        megatron_to_hf_mode=_get(args, "megatron_to_hf_mode", "raw"),
        update_weight_mode=_get(args, "update_weight_mode", "full"),
        save_hf=bool(_get(args, "save_hf")),
        use_rollout_logprobs=bool(_get(args, "use_rollout_logprobs")),
        check_weight_update_equal=bool(_get(args, "check_weight_update_equal")),
        routing_replay=bool(_get(args, "use_rollout_routing_replay")) or not plugins.isdisjoint(("r3", "r3_replay")),
        plugin=plugin,
        embedded=_embedded(args),
    )


def _embedded(args: Namespace) -> bool:
    return not hasattr(args, "sglang_device")


def _get(args: Namespace, name: str, default: Any = None) -> Any:
    found = getattr(args, name, None)
    return default if found is None else found


def _first(args: Namespace, *names: str, default: Any = None) -> Any:
    return next((found for name in names if (found := getattr(args, name, None)) is not None), default)


def _plugins(args: Namespace, environment: Mapping[str, str]) -> frozenset[str]:
    """The plugins that are named: of a run's own process in its environment, of a launch script in --plugins."""
    given = (_get(args, "plugins", ""), environment.get(ACTIVE, ""))
    return frozenset(name.strip().replace("-", "_") for each in given for name in str(each).split(",") if name.strip())


# -- the trainer ------------------------------------------------------------------------------------------------------


def _trainer(args: Namespace, environment: Mapping[str, str], model: Model, here: Here, plugin: bool) -> Trainer:
    recipe = _recipe(args)
    stock: Mode = "off" if recipe == "none" else "te"
    mode: Mode = _get(args, "fp8_train", "aligned" if plugin else stock)
    given = _train_env_vars(args)
    variables = {key: value for key, value in {**environment, **given}.items() if key.startswith("NVTE_")}
    seen, who = _fp32_scales(environment, given, here.upstream, embedded=_embedded(args))
    kept = bool(_get(args, "first_last_layers_bf16"))
    tp = int(_get(args, "tensor_model_parallel_size", 1))
    return Trainer(
        mode=mode,
        recipe=recipe,
        transformer_impl=_get(args, "transformer_impl", "transformer_engine"),
        fp32_scales=seen,
        fp32_scales_from=who,
        fp32_scales_shell=environment.get(VARIABLE),
        variables=variables,
        param_gather=bool(_first(args, "fp8_param_gather", "fp8_param")),
        cpu_offload=bool(_get(args, "optimizer_cpu_offload")),
        fp8_attention=bool(_get(args, "fp8_dot_product_attention") or _get(args, "fp8_multi_head_attention")),
        precision_file=bool(_get(args, "te_precision_config_file")),
        tp=tp,
        pp=int(_get(args, "pipeline_model_parallel_size", 1)),
        ep=int(_get(args, "expert_model_parallel_size", 1)),
        etp=int(_get(args, "expert_tensor_parallel_size", tp)),
        first_bf16=int(_get(args, "num_layers_at_start_in_bf16", 1)) if kept else 0,
        last_bf16=int(_get(args, "num_layers_at_end_in_bf16", 1)) if kept else 0,
        other_layers=tuple(flag for name, flag in OTHER_LAYERS.items() if _get(args, name)),
        probabilities_before_fc2=mode == "te" and model.experts > 0,
        capability=here.capability,
        transformer_engine=here.transformer_engine,
        cuda=here.cuda,
    )


def _recipe(args: Namespace) -> Recipe:
    if _first(args, "fp4", "fp4_format"):
        return "nvfp4" if _get(args, "fp4_recipe", "nvfp4") == "nvfp4" else "custom"
    if not _first(args, "fp8", "fp8_format"):
        return "none"
    found: Any = _get(args, "fp8_recipe", "delayed")  # Megatron's default
    name = str(getattr(found, "value", found))
    recipes: tuple[Recipe, ...] = ("blockwise", "tensorwise", "delayed", "mxfp8", "custom")
    for recipe in recipes:
        if name == recipe:
            return recipe
    facts = {"--fp8-recipe": name, "known": ", ".join(recipes)}
    raise ArgumentError("this FP8 recipe is not known", facts, "use one of them")


_AS_JSON = f"""write it as --train-env-vars '{json.dumps({VARIABLE: "1"})}'"""


def _train_env_vars(args: Namespace) -> dict[str, str]:
    given = _get(args, "train_env_vars", {})
    if isinstance(given, str):
        try:
            given = json.loads(given or "{}")
        except ValueError as error:
            facts = {"found": given, "error": error}
            raise ArgumentError("--train-env-vars is not JSON", facts, _AS_JSON) from error
    if not isinstance(given, Mapping):
        raise ArgumentError("--train-env-vars is not a JSON object", {"found": given}, _AS_JSON)
    return {str(key): str(value) for key, value in given.items()}


def _fp32_scales(
    environment: Mapping[str, str], given: Mapping[str, str], upstream: Upstream, *, embedded: bool
) -> tuple[str | None, str]:
    """What an actor sees of VARIABLE before it imports TransformerEngine, and who set it (slime/ray/actor_group.py)."""
    shell = environment.get(VARIABLE)
    if VARIABLE in given:
        return given[VARIABLE], "--train-env-vars"
    if embedded:
        return shell, "nobody: TransformerEngine's default" if shell is None else "the shell"
    if upstream.hard_codes_scales:
        return "1", "slime, which sets it whatever the shell says"
    return ("1", "slime's default") if shell is None else (shell, "the shell")


# -- the engine -------------------------------------------------------------------------------------------------------


def _engine(args: Namespace, environment: Mapping[str, str], here: Here, plugin: bool) -> Engine:
    def size(*names: str) -> int:
        return int(_first(args, *(f"sglang_{name}" for name in names), default=1) or 1)

    tp = max(int(_get(args, "rollout_num_gpus_per_engine", 1)) // size("pp_size", "pipeline_parallel_size"), 1)
    dispatcher = _get(args, "sglang_moe_a2a_backend", "none")
    dp = size("dp_size", "data_parallel_size") if _get(args, "sglang_enable_dp_attention") else 1
    ep = tp if dispatcher in DEEPGEMM_DISPATCHERS else size("ep_size", "expert_parallel_size")
    return Engine(
        tp=tp,
        ep=ep,
        attention_tp=max(tp // dp, 1),
        dense_tp=int(_get(args, "sglang_moe_dense_tp_size", tp)),
        moe_dp=size("moe_dp_size", "moe_data_parallel_size"),
        moe_runner=_get(args, "sglang_moe_runner_backend", "auto"),
        dispatcher=dispatcher,
        gemm=_first(args, "sglang_fp8_gemm_runner_backend", "sglang_fp8_gemm_backend", default="auto"),
        kv_cache=_get(args, "sglang_kv_cache_dtype", "auto"),
        quantization=_get(args, "sglang_quantization"),
        deepgemm=environment.get("SGLANG_ENABLE_JIT_DEEPGEMM", "1").lower() not in ("0", "false"),
        device="cpu" if getattr(args, "sglang_device", "cpu") == "cpu" else "cuda",
        capability=here.capability,
        version=here.sglang,
        weight_session=here.weight_session if plugin else False,  # slime opens none
        config_file=bool(_get(args, "sglang_config")),
    )


# -- the model --------------------------------------------------------------------------------------------------------


def _model(args: Namespace, config: Mapping[str, Any]) -> Model:
    config = text_config(config)
    mtp = int(_get(args, "mtp_num_layers", 0))
    if not config:
        return _megatron_model(args, mtp)

    def size(*keys: str, default: int = 0) -> int:
        return next((int(found) for key in keys if isinstance(found := config.get(key), int)), default)

    heads, hidden, layers = size("num_attention_heads"), size("hidden_size"), size("num_hidden_layers")
    experts = size("num_experts", "n_routed_experts", "num_local_experts")
    width = size("moe_intermediate_size", "intermediate_size") if experts else 0
    shared = size("shared_expert_intermediate_size") or width * size("n_shared_experts", "num_shared_experts")
    latent = size("kv_lora_rank")
    return Model(
        hidden=hidden,
        layers=layers,
        ffn=size("intermediate_size") if not experts or _has_dense_layers(config) else 0,
        heads=heads,
        groups=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", default=hidden // heads if heads else 0),
        q_rank=size("q_lora_rank"),
        kv_rank=latent,
        nope=size("qk_nope_head_dim") if latent else 0,
        rope=size("qk_rope_head_dim") if latent else 0,
        value=size("v_head_dim") if latent else 0,
        experts=experts,
        moe_ffn=width,
        shared_ffn=shared,
        mtp_layers=mtp,
        indexer=size("index_n_heads") > 0,
    )


def _has_dense_layers(config: Mapping[str, Any]) -> bool:
    """Of a mixture: whether some layers are dense."""
    frequency = config.get("moe_layer_freq", 1)
    if isinstance(frequency, list):
        return 0 in frequency
    if config.get("first_k_dense_replace") or config.get("mlp_only_layers"):
        return True
    return any(config.get(key, 1) not in (1, None) for key in ("moe_layer_freq", "decoder_sparse_step"))


def _megatron_model(args: Namespace, mtp: int) -> Model:
    """The same of Megatron's arguments."""

    def size(name: str, default: int = 0) -> int:
        return int(_get(args, name, default))

    heads, hidden, experts = size("num_attention_heads"), size("hidden_size"), size("num_experts")
    latent = bool(_get(args, "multi_latent_attention"))
    frequency = str(_get(args, "moe_layer_freq", "1"))  # a number, or Python's list of 0 and 1
    dense = re.search(r"\b0\b", frequency) if "[" in frequency else frequency != "1"
    return Model(
        hidden=hidden,
        layers=size("num_layers"),
        ffn=size("ffn_hidden_size") if not experts or dense else 0,
        heads=heads,
        groups=size("num_query_groups", heads) if _get(args, "group_query_attention") else heads,
        head_dim=size("kv_channels", hidden // heads if heads else 0),
        q_rank=size("q_lora_rank") if latent else 0,
        kv_rank=size("kv_lora_rank", 32) if latent else 0,  # Megatron's defaults
        nope=size("qk_head_dim", 128) if latent else 0,
        rope=size("qk_pos_emb_head_dim", 64) if latent else 0,
        value=size("v_head_dim", 128) if latent else 0,
        experts=experts,
        moe_ffn=size("moe_ffn_hidden_size", size("ffn_hidden_size")) if experts else 0,
        shared_ffn=size("moe_shared_expert_intermediate_size"),
        mtp_layers=mtp,
    )


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def _checkpoint(config: Mapping[str, Any]) -> Checkpoint:
    found = quantization_config(config)
    if found is None:
        return Checkpoint()
    if not isinstance(found, Mapping):
        return Checkpoint("unknown", f"quantization_config {found!r}")
    block = found.get("weight_block_size")
    return Checkpoint(
        method=_method(found),
        name=str(found.get("quant_method") or found.get("quant_algo") or ""),
        block=tuple(block) if isinstance(block, list) else None,
        scale_fmt=found.get("scale_fmt"),
        activation_scheme=str(found.get("activation_scheme", "not given")),
        fmt=str(found.get("fmt", "e4m3")),  # Qwen3.5's files leave it out
    )


def _method(found: Mapping[str, Any]) -> Method:
    method = str(found.get("quant_method") or "")
    if method == "fp8":
        return "fp8-tensor" if found.get("weight_block_size") is None else "fp8-block"
    if method == "mxfp8":
        return "mxfp8"
    if "NVFP4" in json.dumps(found) and method in ("", "modelopt", "modelopt_fp4"):
        return "nvfp4"
    if method == "compressed-tensors":
        forms: dict[str, Method] = {"pack-quantized": "int4", "float-quantized": "fp8-channel"}
        return forms.get(str(found.get("format")), "unknown")
    return "unknown"


def _modules(folder: Path) -> frozenset[str]:
    """All modules with a matrix; of a folder with an index only, all with a weight; none without either."""
    with suppress(PluginError):
        return matrices(folder)
    with suppress(PluginError):
        return frozenset(name.removesuffix(WEIGHT) for name in weight_map(folder) if name.endswith(WEIGHT))
    return frozenset()


def _with_tensors(
    checkpoint: Checkpoint, folder: Path, quantised: frozenset[str], modules: frozenset[str], model: Model
) -> Checkpoint:
    """What the tensors' names, and some of their scales, add to what config.json says."""
    powers, nan = _scales(folder, quantised)
    can_be = {each: layer_of(each, model.layers) for each in modules if selection.kind(each)}
    layers = {layer for each, layer in can_be.items() if each in quantised}
    plain = {int(layer) for layer in can_be.values() if layer.isdecimal() and layer not in layers}
    kv_b = [each for each in modules if each.endswith(".kv_b_proj")]
    return replace(
        checkpoint,
        powers_of_two=powers if checkpoint.method == "fp8-block" else None,
        nan=nan,
        kinds=frozenset(kind for each in quantised if (kind := selection.kind(each))),
        kv_b_quantised=any(each in quantised for each in kv_b) if kv_b else None,
        bf16_layers=frozenset(plain),
    )


def _scales(folder: Path, quantised: frozenset[str]) -> tuple[bool | None, str]:
    """Whether scales are powers of two (None: there are none here to read), and a weight with NaN for zeros."""
    names = sorted(name for module in quantised for name in (module + SCALE, module + MATRIX_SCALE))
    files = weight_map(folder)
    names = [name for name in names if name in files]
    names = names[:: -(-len(names) // MOST_SCALES) or 1]
    names.sort(key=files.__getitem__)
    powers: bool | None = None
    for name in names:
        data = next(_bytes(folder / files[name], name, "F32"), None)
        if data is None:
            continue
        # Little-endian float32: of a power of two, and of 0, all 23 bits of the mantissa are 0.
        exact = (
            not any(data[0::4]) and not any(data[1::4]) and data[2::4].translate(_LOW_BITS).count(0) == len(data) // 4
        )
        powers = exact and powers is not False
        if 0 in memoryview(data).cast("I"):
            weight = name.removesuffix(SCALE).removesuffix(MATRIX_SCALE) + WEIGHT
            codes = next(_bytes(folder / files[weight], weight, "F8_E4M3"), b"") if weight in files else b""
            if b"\x7f" in codes or b"\xff" in codes:
                return powers, weight
    return powers, ""


_LOW_BITS = bytes(value & 0x7F for value in range(256))


def _bytes(file: Path, name: str, dtype: str) -> Iterator[bytes]:
    """A tensor's, where there is one of that dtype."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        stat = file.stat()
        start, header = _header(file, stat.st_size, stat.st_mtime_ns)
        begin, end = header[name]["data_offsets"]
        if header[name]["dtype"] == dtype:
            with open(file, "rb") as opened:
                opened.seek(start + begin)
                yield opened.read(end - begin)


@lru_cache(maxsize=4)
def _header(file: Path, size: int, modified: int) -> tuple[int, dict[str, Any]]:
    """Its length with what is before it, and its entries; read once for all tensors of a file."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return 8 + length, json.loads(opened.read(length))


def _selections(
    config: Mapping[str, Any],
    quantised: frozenset[str],
    modules: frozenset[str],
    checkpoint: Checkpoint,
    trainer: Trainer,
    engine: Engine,
    model: Model,
) -> tuple[dict[str, frozenset[str]], frozenset[str]]:
    """Who takes which modules for FP8. Layers that the checkpoint keeps in bfloat16 as a whole are another rule's."""
    kept = {str(layer) for layer in checkpoint.bf16_layers or ()}
    all_linear = frozenset(each for each in selection.selected(modules) if layer_of(each, model.layers) not in kept)
    declared = quantization_config(config)
    left: list[str] = next((found for name in LEFT_OUT if (found := declared.get(name)) is not None), [])
    old = engine.version is not None and _numbers(engine.version) < (0, 5, 12)
    matching: Literal["substring", "module path"] = "substring" if old else "module path"
    found = selection.in_engine(modules, left, matching)
    # An update sends in FP8 what the checkpoint has, as far as it is a linear layer that a trainer has.
    update = frozenset(each for each in quantised if selection.kind(each))
    sets = {"checkpoint": quantised, "weight update": update, "engine": found.fp8}
    te = trainer.mode == "te" and not trainer.precision_file  # it quantises every linear layer
    return sets | ({"trainer": all_linear} if te else {}), found.torn


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


# -- this machine -----------------------------------------------------------------------------------------------------


def look_here() -> Here:
    """What files say of this machine: its GPU, TransformerEngine, CUDA, SGLang, slime and Megatron."""
    return Here(
        capability=_capability(),
        transformer_engine=_installed("transformer_engine", "transformer-engine", "transformer_engine_torch") or "",
        cuda=fp8_upstream.cuda_version(),
        sglang=_installed("sglang"),
        weight_session=fp8_upstream.has_update_sessions(),
        upstream=Upstream(
            hard_codes_scales=fp8_upstream.sets_variable(VARIABLE),
            mtp_names_agree=slime_drafts.mtp_names_agree(),
            unpacks_saved_scales=fp8_upstream.unpacks_saved_scales(),
            blind_metric=fp8_upstream.has_blind_metric(),
            delta_leaves_tensors_out=fp8_upstream.delta_leaves_tensors_out(),
        ),
    )


def capability_of(name: str) -> int | None:
    """Of a GPU by its name ("NVIDIA H100 80GB HBM3", "h100"), or of a capability itself ("9.0", "90")."""
    if re.fullmatch(r"\d{1,2}\.\d", name) or re.fullmatch(r"\d{2,3}", name):
        return int(name.replace(".", ""))
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((GPUS[word] for word in words if word in GPUS), None)


def _capability() -> int | None:
    for file in sorted(NVIDIA_GPUS.glob("*/information")):
        with suppress(OSError):
            if found := re.search(r"^Model:\s*(.+)$", file.read_text(), re.MULTILINE):
                return capability_of(found[1])
    return None


def _installed(*names: str) -> str | None:
    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return None
