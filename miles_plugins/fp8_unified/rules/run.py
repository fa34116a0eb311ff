"""What the rules look at: a run as its flags, its environment and its checkpoint describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

BLOCK = 128
VARIABLE = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
"""TransformerEngine's: "1" for fp32 scales; all else, and unset, for powers of two. Read when it is imported."""

Recipe = Literal["none", "blockwise", "tensorwise", "delayed", "mxfp8", "nvfp4", "custom"]
Mode = Literal["te", "aligned", "off"]
Method = Literal["bf16", "fp8-block", "fp8-tensor", "fp8-channel", "mxfp8", "nvfp4", "int4", "unknown"]
Scales = Literal["fp32", "pow2"]

DEEPGEMM_DISPATCHERS = frozenset(("deepep", "mooncake", "nixl"))
"""--moe-a2a-backend with which SGLang's runner `auto` is DeepGEMM (Fp8MoEMethod)."""


@dataclass(frozen=True)
class Trainer:
    """What the trainer's processes will be told.

    Attributes:
        mode: --fp8-train: TransformerEngine's FP8, the plugin's aligned forward, or bfloat16.
        recipe: of Megatron's flags; `nvfp4` from --fp4-format; `none` without either.
        transformer_impl: --transformer-impl.
        fp32_scales: VARIABLE as an actor sees it before it imports TransformerEngine; None: unset.
        fp32_scales_from: who sets it, in words.
        fp32_scales_shell: the same variable in the shell that starts the run; None: not there.
        fp32_scales_imported: what an already imported TransformerEngine has read; None: not imported yet.
        variables: NVTE_* as an actor sees them.
        param_gather: --fp8-param-gather.
        cpu_offload: --optimizer-cpu-offload.
        fp8_attention: --fp8-dot-product-attention or --fp8-multi-head-attention.
        precision_file: --te-precision-config-file.
        tp, pp, ep, etp: parallel sizes; etp divides each expert.
        first_bf16, last_bf16: layers that --first-last-layers-bf16 keeps in bfloat16, of each end.
        other_layers: flags with which Megatron computes past the layers that the plugin replaces, or not in bfloat16.
        probabilities_before_fc2: whether the router's probabilities are in fc2's input when it is quantised.
        capability: of its GPUs, as 90; None: unknown.
        transformer_engine: its version; "": there is none; None: unknown.
        cuda: as (12, 9); None: unknown.
    """

    mode: Mode = "off"
    recipe: Recipe = "none"
    transformer_impl: str = "transformer_engine"
    fp32_scales: str | None = None
    fp32_scales_from: str = "nobody"
    fp32_scales_shell: str | None = None
    fp32_scales_imported: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    param_gather: bool = False
    cpu_offload: bool = False
    fp8_attention: bool = False
    precision_file: bool = False
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    first_bf16: int = 0
    last_bf16: int = 0
    other_layers: tuple[str, ...] = ()
    probabilities_before_fc2: bool = False
    capability: int | None = None
    transformer_engine: str | None = None
    cuda: tuple[int, int] | None = None

    @property
    def scales(self) -> Scales:
        """Of TransformerEngine's blockwise recipe."""
        return "fp32" if self.fp32_scales == "1" else "pow2"


@dataclass(frozen=True)
class Model:
    """Sizes of config.json.

    Attributes:
        ffn: of a dense MLP; 0 where every layer is a mixture.
        groups: heads of keys and values.
        q_rank, kv_rank, nope, rope, value: of multi-head latent attention (MLA); kv_rank 0: it has none.
        experts, moe_ffn, shared_ffn: of a mixture; 0 where there is none.
        mtp_layers: of multi-token prediction.
        indexer: whether attention is sparse by an indexer (DSA).
    """

    hidden: int = 0
    layers: int = 0
    ffn: int = 0
    heads: int = 0
    groups: int = 0
    head_dim: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    nope: int = 0
    rope: int = 0
    value: int = 0
    experts: int = 0
    moe_ffn: int = 0
    shared_ffn: int = 0
    mtp_layers: int = 0
    indexer: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """What --hf-checkpoint is: SGLang loads it, and a weight update must bring the same format.

    Attributes:
        method: `bf16` without a quantization_config.
        name: its `quant_method`, for messages.
        block: its `weight_block_size`.
        scale_fmt: `ue8m0` where it declares scales that are powers of two.
        activation_scheme, fmt: as it says.
        powers_of_two: whether the stored scales are; None: not looked at.
        nan: a weight with NaN in place of zeros; "": none was found.
        kinds: what is quantised, of `selection.KINDS`; None: unknown, taken for everything.
        kv_b_quantised: of MLA; None: unknown.
        bf16_layers: layers in which nothing is quantised; None: unknown.
    """

    method: Method = "bf16"
    name: str = ""
    block: tuple[int, ...] | None = None
    scale_fmt: str | None = None
    activation_scheme: str = "dynamic"
    fmt: str = "e4m3"
    powers_of_two: bool | None = None
    nan: str = ""
    kinds: frozenset[str] | None = None
    kv_b_quantised: bool | None = None
    bf16_layers: frozenset[int] | None = None


@dataclass(frozen=True)
class Engine:
    """What SGLang will be told.

    Attributes:
        tp, ep: GPUs of a tensor parallel group of one engine; among how many of them whole experts are divided.
        attention_tp: among how many attention is divided (fewer than tp with --enable-dp-attention).
        dense_tp: the same of a dense MLP (--moe-dense-tp-size).
        moe_dp: copies of the experts (--moe-dp-size).
        moe_runner, dispatcher, gemm: --moe-runner-backend, --moe-a2a-backend, --fp8-gemm-backend.
        kv_cache: --kv-cache-dtype.
        quantization: --quantization.
        deepgemm: whether DeepGEMM may be used (SGLANG_ENABLE_JIT_DEEPGEMM).
        device: `cpu` for SGLang without a GPU, or the embedded host.
        capability: of its GPUs, as 90; None: unknown.
        version: of SGLang; None: unknown.
        weight_session: whether it processes weights after an update: it has begin_weight_update, which the plugin
            calls. (Nobody calls /post_process_weights of slime's image for FP8.) None: unknown.
        config_file: --sglang-config, which may say otherwise for some engines.
    """

    tp: int = 1
    ep: int = 1
    attention_tp: int = 1
    dense_tp: int = 1
    moe_dp: int = 1
    moe_runner: str = "auto"
    dispatcher: str = "none"
    gemm: str = "auto"
    kv_cache: str = "auto"
    quantization: str | None = None
    deepgemm: bool = True
    device: str = "cuda"
    capability: int | None = None
    version: str | None = None
    weight_session: bool | None = None
    config_file: bool = False


@dataclass(frozen=True)
class Upstream:
    """What depends on the release of slime and Megatron; found in their files. None: unknown.

    Attributes:
        hard_codes_scales: slime sets VARIABLE to "1" whatever the shell says (v0.2.0 and v0.2.1).
        mtp_names_agree: slime knows the name that Megatron gives an MTP block's layer.
        unpacks_saved_scales: --save-hf writes ue8m0 scales as a checkpoint has them (slime after v0.3.1).
        blind_metric: train_rollout_logprob_abs_diff is 0 under --use-rollout-logprobs (slime up to v0.3.0).
        delta_leaves_tensors_out: --update-weight-mode delta sends only what has changed (slime v0.3.0).
    """

    hard_codes_scales: bool | None = None
    mtp_names_agree: bool | None = None
    unpacks_saved_scales: bool | None = None
    blind_metric: bool | None = None
    delta_leaves_tensors_out: bool | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that the rules look at.

    Attributes:
        selections: who quantises what: "checkpoint", "weight update", "engine", "trainer" -> names of modules.
            Absent: unknown.
        torn: SGLang's fused layers of which only a part is quantised.
        megatron_to_hf_mode, update_weight_mode, save_hf, use_rollout_logprobs, check_weight_update_equal: slime's.
        routing_replay: whether experts are replayed in training as the engine chose them.
        plugin: whether the plugin is on: it then makes the weight update, of one fp32 scale a block, and counts it.
        embedded: whether the embedded host runs it, which has no TransformerEngine and no flag for it.
    """

    trainer: Trainer = field(default_factory=Trainer)
    model: Model = field(default_factory=Model)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    engine: Engine = field(default_factory=Engine)
    upstream: Upstream = field(default_factory=Upstream)
    selections: Mapping[str, frozenset[str]] = field(default_factory=dict)
    torn: frozenset[str] = frozenset()
    megatron_to_hf_mode: str = "raw"
    update_weight_mode: str = "full"
    save_hf: bool = False
    use_rollout_logprobs: bool = False
    check_weight_update_equal: bool = False
    routing_replay: bool = False
    plugin: bool = False
    embedded: bool = False

    @property
    def packs_at_source(self) -> bool:
        """Whether a weight update brings ue8m0 scales packed for DeepGEMM, as slime does for every layer alike."""
        return not self.plugin

    @property
    def quantised(self) -> bool:
        """Whether the rollout is."""
        return self.checkpoint.method != "bf16"

    def quantises(self, kind: str) -> bool:
        return self.quantised and (self.checkpoint.kinds is None or kind in self.checkpoint.kinds)
