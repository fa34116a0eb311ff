"""Whether trainer, environment, checkpoint and engine agree on FP8: a table of rules over facts, without upstream.

`judge(facts)` asks every rule of RULES. Each answers nothing where it does not apply, and else `deny`, `warn` or
`allow`; a denial or a warning says what was found, what was expected, what it costs, and what to do.

Costs are differences of dequantised values in percent rms, found by exact emulation of e4m3 and bfloat16 on Gaussian
weights (sigma 0.02) without a GPU. To compare: FP8 itself is 2.65 % away from bfloat16.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

BLOCK = 128
VARIABLE = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
"""TransformerEngine's: "1" for fp32 scales; all else, and unset, for powers of two. Read when it is imported."""

Verdict = Literal["deny", "warn", "allow"]
VERDICTS: tuple[Verdict, ...] = ("deny", "warn", "allow")  # in the order in which they are shown
Recipe = Literal["none", "blockwise", "tensorwise", "delayed", "mxfp8", "nvfp4", "custom"]
Mode = Literal["te", "aligned", "off"]
Method = Literal["bf16", "fp8-block", "fp8-tensor", "fp8-channel", "mxfp8", "nvfp4", "int4", "unknown"]
Scales = Literal["fp32", "pow2"]

DEEPGEMM_DISPATCHERS = frozenset(("deepep", "mooncake", "nixl"))
"""--moe-a2a-backend with which SGLang's runner `auto` is DeepGEMM (Fp8MoEMethod)."""

# -- facts ------------------------------------------------------------------------------------------------------------


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
        weight_session: whether it can process weights after an update (begin_weight_update, or slime's patch's
            /post_process_weights); None: unknown.
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
    """

    hard_codes_scales: bool | None = None
    mtp_names_agree: bool | None = None
    unpacks_saved_scales: bool | None = None
    blind_metric: bool | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that the rules look at.

    Attributes:
        selections: who quantises what: "checkpoint", "weight update", "engine", "trainer" -> names of modules.
            Absent: unknown.
        torn: SGLang's fused layers of which only a part is quantised.
        megatron_to_hf_mode, update_weight_mode, save_hf, use_rollout_logprobs, check_weight_update_equal: slime's.
        routing_replay: whether experts are replayed in training as the engine chose them.
        runner_aware_sync: whether ue8m0 scales go only to those parts of an engine that take them.
        packs_at_source: whether ue8m0 scales are sent as DeepGEMM wants them, so that the engine repacks nothing.
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
    runner_aware_sync: bool = False
    packs_at_source: bool = False

    @property
    def quantised(self) -> bool:
        """Whether the rollout is."""
        return self.checkpoint.method != "bf16"

    def quantises(self, kind: str) -> bool:
        return self.quantised and (self.checkpoint.kinds is None or kind in self.checkpoint.kinds)


# -- decisions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What one rule says of a run.

    Attributes:
        rule: its id, such as `fp8.scale-kind`.
        found, expected: both sides, with names and numbers; one line each.
        cost: what it costs to go on, in percent rms or in words; empty where nothing is lost.
        next: what to do; empty only when allowed.
    """

    rule: str
    verdict: Verdict
    found: str
    expected: str
    cost: str = ""
    next: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"the verdict of {self.rule} is {self.verdict!r}; known: {', '.join(VERDICTS)}")
        if not (self.rule and self.found and self.expected):
            raise ValueError(f"a decision of rule {self.rule!r} does not say what was found and expected")
        if self.verdict != "allow" and not (self.next and self.cost):
            raise ValueError(f"rule {self.rule!r} does not say what it costs and what to do: give `cost` and `next`")


class Answer(NamedTuple):
    """A decision, before the table adds whose it is; `cost` None: the rule's own."""

    verdict: Verdict
    found: str
    expected: str
    next: str = ""
    cost: str | None = None


Judgement = Callable[[Facts], Iterable[Answer]]


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        id: its name, in messages and documents.
        reason: why there is such a rule, in a line.
        cost: of breaking it.
        judgement: Facts -> its answers; none where it does not apply.
    """

    id: str
    reason: str
    cost: str
    judgement: Judgement

    def decide(self, facts: Facts) -> Iterator[Decision]:
        for answer in self.judgement(facts):
            cost = self.cost if answer.cost is None else answer.cost
            cost = "" if answer.verdict == "allow" and answer.cost is None else cost
            yield Decision(self.id, answer.verdict, answer.found, answer.expected, cost, answer.next)


RULES: list[Rule] = []
"""The table, in the order of a run: how it trains, what it serves, how weights get there, how it is measured."""


def rule(id: str, reason: str, cost: str) -> Callable[[Judgement], Judgement]:
    """Add the decorated function to the table."""

    def add(judgement: Judgement) -> Judgement:
        RULES.append(Rule(id, reason, cost, judgement))
        return judgement

    return add


def judge(facts: Facts) -> list[Decision]:
    """What every rule says that applies: denials first, then warnings."""
    found = [decision for each in RULES for decision in each.decide(facts)]
    return sorted(found, key=lambda decision: VERDICTS.index(decision.verdict))


def deny(found: str, expected: str, next: str, cost: str | None = None) -> Answer:
    return Answer("deny", found, expected, next, cost)


def warn(found: str, expected: str, next: str, cost: str | None = None) -> Answer:
    return Answer("warn", found, expected, next, cost)


def allow(found: str, expected: str, cost: str | None = None) -> Answer:
    return Answer("allow", found, expected, cost=cost)


NOT_MEASURED = "not measured"
REFUSED = "the run fails by itself, later"
GARBAGE = "wrong weights, without an error"

# -- what an engine makes of them -------------------------------------------------------------------------------------


def moe_runner(facts: Facts) -> str:
    """The runner that SGLang takes; `auto` as 0.5.15 resolves it, on Blackwell for most models."""
    engine = facts.engine
    if engine.moe_runner != "auto":
        return engine.moe_runner
    if facts.checkpoint.method == "mxfp8":
        return "flashinfer_trtllm"
    if engine.deepgemm and engine.dispatcher in DEEPGEMM_DISPATCHERS:
        return "deep_gemm"
    return "flashinfer_trtllm" if _blackwell(engine.capability) and engine.dispatcher == "none" else "triton"


def ue8m0_parts(facts: Facts) -> frozenset[str]:
    """Which of `dense` and `experts` run in DeepGEMM on Blackwell: there it takes packed powers of two as scales."""
    engine = facts.engine
    if facts.checkpoint.method != "fp8-block" or not engine.deepgemm or not _blackwell(engine.capability):
        return frozenset()
    parts = {"dense"} if engine.gemm in ("auto", "deep_gemm") else set()
    if facts.model.experts and moe_runner(facts) == "deep_gemm":
        parts.add("experts")
    return frozenset(parts)


def rollout_scales(facts: Facts, part: str) -> Scales:
    """Of weights: of the dense layers, or of the experts."""
    return "pow2" if part in ue8m0_parts(facts) or facts.checkpoint.scale_fmt == "ue8m0" else "fp32"


def needs_post_process(facts: Facts) -> bool:
    """Whether the engine must process weights after an update: where it keeps them otherwise than they are sent.

    Not for block FP8 on Hopper with DeepGEMM, Triton or CUTLASS, which compute with the tensors as they are loaded.
    """
    engine = facts.engine
    if not facts.quantised or engine.device == "cpu":
        return False
    if facts.checkpoint.method != "fp8-block":
        return True  # transposed and rescaled per tensor, swizzled for MXFP8 and NVFP4, packed for INT4
    if facts.model.experts and facts.quantises("experts"):
        runner = moe_runner(facts)
        if runner.startswith("flashinfer") or runner in ("experimental_sgl_trtllm", "marlin", "aiter"):
            return True
    if engine.gemm in ("flashinfer_trtllm", "aiter") or _marlin(engine.capability):
        return True
    return bool(ue8m0_parts(facts)) and not facts.packs_at_source


def _blackwell(capability: int | None) -> bool:
    return capability is not None and 100 <= capability < 120  # 120, for desktops, has no DeepGEMM


def _marlin(capability: int | None) -> bool:
    return capability is not None and 80 <= capability < 89


# -- shapes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One dimension of a matrix, divided among ranks. `block`: of what each rank must have whole ones."""

    dimension: str
    size: int
    ranks: int = 1
    block: int = BLOCK

    @property
    def whole(self) -> bool:
        return self.size % self.ranks == 0 and self.size // self.ranks % self.block == 0

    def __str__(self) -> str:
        each = self.size / self.ranks
        divided = f" / {self.ranks} = {each:g}" if self.ranks > 1 else ""
        blocks = f", {each / self.block:g} blocks of {self.block}" if self.block > 1 else ""
        return f"{self.dimension} {self.size}{divided}{blocks}"


@dataclass(frozen=True)
class Matrix:
    """A weight [N, K] as one rank holds it, possibly several fused along N.

    Attributes:
        name: of the parameter.
        kind: of `selection.KINDS`.
        rows: one a fused part; of several, or of one that is divided, each rank must hold whole blocks: else a block
            spans what is two blocks in the checkpoint.
        columns: the same; never fused.
        flag: what divides it.
    """

    name: str
    kind: str
    rows: tuple[Side, ...]
    columns: Side
    flag: str

    def misfits(self) -> list[Side]:
        """The sides of which a rank does not hold whole blocks. An undivided tail is padded alike by everyone."""
        fused = len(self.rows) > 1
        sides = [side for side in self.rows if fused or side.ranks > 1]
        sides += [self.columns] if self.columns.ranks > 1 else []
        return list(dict.fromkeys(side for side in sides if not side.whole))


def trainer_matrices(model: Model, trainer: Trainer) -> list[Matrix]:
    """Megatron's linear layers, under the names of a decoder layer; one of each kind, for they are alike."""
    tp, etp = trainer.tp, trainer.etp
    by_tp, by_etp = "--tensor-model-parallel-size", "--expert-tensor-parallel-size"
    hidden = Side("hidden_size", model.hidden)

    def mlp(kind: str, name: str, dimension: str, size: int, ranks: int, flag: str, weight: str) -> list[Matrix]:
        inner = Side(dimension, size, ranks)
        return [
            Matrix(f"{name}.linear_fc1.{weight}", kind, (inner, inner), hidden, flag),  # [gate; up] of each rank
            Matrix(f"{name}.linear_fc2.{weight}", kind, (hidden,), inner, flag),
        ]

    found: list[Matrix] = []
    if model.kv_rank:
        heads = model.heads
        queries = Side(f"{heads} heads of {model.nope + model.rope}", heads * (model.nope + model.rope), tp)
        name = "linear_q_up_proj" if model.q_rank else "linear_q_proj"
        rank = Side("q_lora_rank", model.q_rank) if model.q_rank else hidden
        keys = Side(f"{heads} heads of {model.nope + model.value}", heads * (model.nope + model.value), tp)
        values = Side(f"{heads} heads of {model.value}", heads * model.value, tp)
        found += [
            Matrix(f"self_attention.{name}.weight", "attention", (queries,), rank, by_tp),
            Matrix(
                "self_attention.linear_kv_up_proj.weight",
                "attention",
                (keys,),
                Side("kv_lora_rank", model.kv_rank),
                by_tp,
            ),
            Matrix("self_attention.linear_proj.weight", "attention", (hidden,), values, by_tp),
        ]
    elif model.heads:
        # q heads, k and v of one group after another: heads are the pieces that must be whole blocks.
        pieces = (Side("head_dim", model.head_dim), Side("num_query_groups", model.groups, tp, 1))
        values = Side(f"{model.heads} heads of {model.head_dim}", model.heads * model.head_dim, tp)
        found += [
            Matrix("self_attention.linear_qkv.weight", "attention", pieces, hidden, by_tp),
            Matrix("self_attention.linear_proj.weight", "attention", (hidden,), values, by_tp),
        ]
    if model.ffn:
        found += mlp("mlp", "mlp", "ffn_hidden_size", model.ffn, tp, by_tp, "weight")
    if model.experts:
        found += mlp("experts", "mlp.experts", "moe_ffn_hidden_size", model.moe_ffn, etp, by_etp, "weight*")
    if model.shared_ffn:
        size = model.shared_ffn
        found += mlp("shared-experts", "mlp.shared_experts", "shared expert's size", size, tp, by_tp, "weight")
    return found


def engine_matrices(model: Model, engine: Engine) -> list[Matrix]:
    """SGLang's linear layers, fused as it fuses them."""
    heads, attention = model.heads, engine.attention_tp
    by_tp = "--rollout-num-gpus-per-engine"
    hidden = Side("hidden_size", model.hidden)

    def mlp(kind: str, name: str, dimension: str, size: int, ranks: int, flag: str) -> list[Matrix]:
        inner = Side(dimension, size, ranks)
        return [
            Matrix(f"{name}.gate_up_proj", kind, (inner, inner), hidden, flag),
            Matrix(f"{name}.down_proj", kind, (hidden,), inner, flag),
        ]

    found: list[Matrix] = []
    if model.kv_rank:
        query, key = model.nope + model.rope, model.nope + model.value
        queries = Side(f"{heads} heads of {query}", heads * query, attention)
        keys = Side(f"{heads} heads of {key}", heads * key, attention)
        values = Side(f"{heads} heads of {model.value}", heads * model.value, attention)
        rank = Side("q_lora_rank", model.q_rank) if model.q_rank else hidden
        name = "q_b_proj" if model.q_rank else "q_proj"
        found += [
            Matrix(f"self_attn.{name}", "attention", (queries,), rank, by_tp),
            Matrix("self_attn.kv_b_proj", "attention", (keys,), Side("kv_lora_rank", model.kv_rank), by_tp),
            Matrix("self_attn.o_proj", "attention", (hidden,), values, by_tp),
        ]
    elif heads:
        queries = Side(f"{heads} heads of {model.head_dim}", heads * model.head_dim, attention)
        copies = min(attention, model.groups)  # keys and values are repeated where there are more ranks
        keys = Side(f"{model.groups} key heads of {model.head_dim}", model.groups * model.head_dim, copies)
        found += [
            Matrix("self_attn.qkv_proj", "attention", (queries, keys, keys), hidden, by_tp),
            Matrix("self_attn.o_proj", "attention", (hidden,), queries, by_tp),
        ]
    if model.ffn:
        found += mlp("mlp", "mlp", "intermediate_size", model.ffn, engine.dense_tp, by_tp)
    if model.experts:
        ranks = max(engine.tp // engine.ep // engine.moe_dp, 1)
        found += mlp("experts", "mlp.experts", "moe_intermediate_size", model.moe_ffn, ranks, "--sglang-ep-size")
    if model.shared_ffn:
        ranks = 1 if engine.dispatcher != "none" else engine.tp
        found += mlp("shared-experts", "mlp.shared_experts", "shared expert's size", model.shared_ffn, ranks, by_tp)
    return found


def _smaller(side: Side) -> int | None:
    """The most ranks, fewer than now, of which each has whole blocks."""
    fewer = (ranks for ranks in range(side.ranks - 1, 0, -1) if side.ranks % ranks == 0)
    return next((ranks for ranks in fewer if replace(side, ranks=ranks).whole), None)


# -- how it trains ----------------------------------------------------------------------------------------------------


@rule("fp8.train-mode", "--fp8-train and Megatron's own FP8 flags must ask for one thing", "the other one trains")
def _train_mode(facts: Facts) -> Iterator[Answer]:
    mode, recipe = facts.trainer.mode, facts.trainer.recipe
    if mode == "te" and recipe == "none":
        yield deny(
            "--fp8-train te, and neither --fp8-format nor --fp4-format: the trainer would compute in bfloat16",
            "a recipe for TransformerEngine",
            "add --fp8-format e4m3 --fp8-recipe blockwise",
        )
    elif mode != "te" and recipe != "none":
        yield deny(
            f"--fp8-train {mode}, and Megatron's flags ask TransformerEngine for recipe {recipe}",
            "--fp8-train te with a recipe, or no recipe",
            "take --fp8-format (or --fp4-format) out, or --fp8-train te",
        )
    else:
        yield allow(f"--fp8-train {mode}, recipe {recipe}", "one of them")


# What the trainer computes with (its recipe; `aligned`: the plugin's) and what the rollout is -> verdict, remark.
_PAIRS: dict[tuple[str, Method], tuple[Verdict, str]] = {
    ("none", "bf16"): ("allow", "bfloat16 on both sides: there is no FP8"),
    ("none", "fp8-block"): ("warn", "the trainer computes in bfloat16"),
    ("none", "fp8-tensor"): ("warn", "the trainer computes in bfloat16"),
    ("none", "mxfp8"): ("warn", "the trainer computes in bfloat16"),
    ("none", "nvfp4"): ("warn", "the trainer computes in bfloat16"),
    ("aligned", "fp8-block"): ("allow", "one forward on both sides"),
    ("blockwise", "fp8-block"): ("allow", "blocks of 128 x 128, and of 1 x 128 for activations, on both sides"),
    ("tensorwise", "fp8-tensor"): ("warn", "TransformerEngine has one scale for fused q, k, v and gate, up"),
    ("delayed", "fp8-tensor"): ("warn", "the trainer's scales are of earlier steps, the rollout's of its own tensors"),
    ("custom", "fp8-block"): ("warn", "what --fp8-quantizer-factory does cannot be seen"),
    ("mxfp8", "mxfp8"): ("allow", "MXFP8 on both sides (this project ran it on no Blackwell GPU)"),
    ("nvfp4", "nvfp4"): ("allow", "NVFP4 on both sides (this project ran it on no Blackwell GPU)"),
}
_ROLLOUT_OF = {  # recipe -> what its rollout is, and how to come by it
    "none": "a BF16 checkpoint",
    "aligned": "a checkpoint in blocks of 128 x 128",
    "blockwise": "a checkpoint in blocks of 128 x 128",
    "custom": "a checkpoint in blocks of 128 x 128",
    "tensorwise": "a checkpoint with one scale a tensor",
    "delayed": "a checkpoint with one scale a tensor",
    "mxfp8": "an MXFP8 checkpoint",
    "nvfp4": "an NVFP4 checkpoint",
}
_RECIPE_OF: dict[Method, str] = {
    "fp8-block": "--fp8-format e4m3 --fp8-recipe blockwise, or --fp8-train aligned",
    "fp8-tensor": "--fp8-format e4m3 --fp8-recipe tensorwise",
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8",
    "nvfp4": "--fp4-format e2m1 --fp4-recipe nvfp4",
}


@rule(
    "fp8.recipe",
    "trainer and rollout must round to the same grid",
    "2.65 % of the weights and 2.3 to 2.7 % of the activations, or more: all that FP8 itself costs",
)
def _recipe(facts: Facts) -> Iterator[Answer]:
    method = facts.checkpoint.method
    if method in ("unknown", "int4", "fp8-channel"):
        return  # fp8.rollout-method
    recipe = "aligned" if facts.trainer.mode == "aligned" else facts.trainer.recipe
    verdict, remark = _PAIRS.get((recipe, method), ("deny", "two grids"))
    found, expected = f"trainer {recipe}, rollout {method}: {remark}", f"with {recipe}, {_ROLLOUT_OF[recipe]}"
    if verdict == "allow":
        yield allow(found, expected)
    elif recipe == "none":
        yield warn(found, f"with {method}, an FP8 forward in training", f"train with {_RECIPE_OF[method]}")
    elif verdict == "warn":
        yield warn(found, expected, "take blockwise on both sides, which can be made equal", NOT_MEASURED)
    elif method == "bf16":
        next = "convert it (`miles-plugins convert-fp8`) and give the result as --hf-checkpoint, or --fp8-train off"
        yield deny(found, expected, next)
    else:
        yield deny(found, expected, f"give {_ROLLOUT_OF[recipe]}, or train with {_RECIPE_OF[method]}")


_MINIMUM = {"blockwise": (2, 3), "mxfp8": (2, 1), "tensorwise": (2, 2), "nvfp4": (2, 7)}
"""TransformerEngine's first release with the recipe, as Megatron asks for it (fp8_utils.get_fp8_recipe)."""


@rule("fp8.transformer-engine", "Megatron's recipes are TransformerEngine's, and newer ones need newer ones", REFUSED)
def _transformer_engine(facts: Facts) -> Iterator[Answer]:
    trainer = facts.trainer
    if trainer.mode != "te":
        return
    needed, found = _MINIMUM.get(trainer.recipe), trainer.transformer_engine
    expected = "TransformerEngine" + (f" {'.'.join(map(str, needed))} or later" if needed else "")
    aligned = "--fp8-train aligned needs none"
    if trainer.transformer_impl != "transformer_engine":
        found = f"--transformer-impl {trainer.transformer_impl}: Megatron's own layers know no FP8"
        yield deny(found, "--transformer-impl transformer_engine", f"say so; {aligned}")
    elif found == "":
        yield deny("no TransformerEngine here", expected, f"install it; {aligned}, and runs on the CPU, too")
    elif found is not None and needed is not None and _version(found) < needed:
        yield deny(f"TransformerEngine {found}", expected, f"install a newer one; {aligned}")
    elif trainer.recipe == "blockwise" and trainer.cuda is not None and trainer.cuda < (12, 9):
        cuda = f"CUDA {trainer.cuda[0]}.{trainer.cuda[1]}"
        yield deny(cuda, "CUDA 12.9 or later: cuBLAS multiplies blocks since then", f"take its image; {aligned}")
    elif found is not None:
        yield allow(f"TransformerEngine {found}", expected)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


_TRAINS_ON = {"blockwise": 90, "tensorwise": 89, "delayed": 89, "mxfp8": 100, "nvfp4": 100}
_SERVES_ON: dict[Method, int] = {"fp8-block": 89, "fp8-tensor": 89, "mxfp8": 100, "nvfp4": 100}


@rule("fp8.compute-capability", "each format needs GPUs that multiply it", REFUSED)
def _compute_capability(facts: Facts) -> Iterator[Answer]:
    trainer, engine, method = facts.trainer, facts.engine, facts.checkpoint.method
    if trainer.mode == "te" and trainer.recipe in _TRAINS_ON and trainer.capability is not None:
        needed, found = _TRAINS_ON[trainer.recipe], f"recipe {trainer.recipe} on capability {trainer.capability}"
        if trainer.capability < needed:
            yield deny(found, f"{needed} or higher", "take blockwise on Hopper; --fp8-train off on older GPUs")
        else:
            yield allow(found, f"{needed} or higher")
    if method in _SERVES_ON and engine.capability is not None and engine.device != "cpu":
        needed, found = _SERVES_ON[method], f"a rollout in {method} on capability {engine.capability}"
        if engine.capability >= needed:
            yield allow(found, f"{needed} or higher")
        elif needed < 100 and _marlin(engine.capability):
            yield warn(
                f"{found}: SGLang's Marlin kernel leaves activations in bfloat16",
                f"{needed} or higher",
                "serve on Ada, Hopper or Blackwell",
                "2.3 to 2.7 % of the activations, where the trainer's are FP8",
            )
        else:
            other = "a checkpoint in blocks of 128 x 128" if needed >= 100 else "a BF16 checkpoint"
            yield deny(found, f"{needed} or higher", f"take {other} there")


@rule(
    "fp8.scales-variable",
    f"{VARIABLE} is read when an actor imports TransformerEngine, and nowhere else",
    "3.7 %: the scales are of the other kind than intended",
)
def _scales_variable(facts: Facts) -> Iterator[Answer]:
    trainer = facts.trainer
    if trainer.mode != "te" or trainer.recipe != "blockwise":
        return
    seen, shell = trainer.fp32_scales, trainer.fp32_scales_shell
    found = f"actors see {'it unset' if seen is None else repr(seen)}, from {trainer.fp32_scales_from}"
    if seen not in (None, "0", "1"):
        yield deny(found, '"0" or "1": all but "1" means powers of two', f"set {_flag('1')} or {_flag('0')}")
    elif trainer.fp32_scales_imported is not None and (trainer.fp32_scales_imported == "1") != (seen == "1"):
        yield deny(
            f"TransformerEngine was imported with {trainer.fp32_scales_imported!r}: {seen!r} changes nothing now",
            "it set before that import",
            f"set it in the actors' environment: {_flag(seen or '0')}",
        )
    elif shell is not None and (shell == "1") != (seen == "1"):
        hard_coded = facts.upstream.hard_codes_scales and trainer.fp32_scales_from != "--train-env-vars"
        next = "this slime passes over the shell" if hard_coded else "take it out of the shell"
        yield deny(f"the shell says {shell!r}, and {found}", "one value", f"{next}; or {_flag(shell)}")
    else:
        yield allow(found, f"powers of two or fp32, as the rollout: {trainer.scales}")


def _flag(value: str) -> str:
    return f"--train-env-vars '{json.dumps({VARIABLE: value})}'"


WITHOUT_UE8M0 = "a checkpoint with fp32 scales (`miles-plugins convert-fp8 --scale float32`)"
_PARTS = (("dense", "dense layers"), ("experts", "experts"))


@rule(
    "fp8.scale-kind",
    "weights quantised with fp32 scales and with powers of two are two sets of weights",
    "3.7 % of the weights: more than FP8's own 2.65 %",
)
def _scale_kind(facts: Facts) -> Iterator[Answer]:
    trainer = facts.trainer
    if not _blockwise(facts):
        return
    for part, name in _PARTS:
        if part == "experts" and not (facts.model.experts and facts.quantises("experts")):
            continue
        rollout, who = rollout_scales(facts, part), trainer.fp32_scales_from
        found = f"{name}: trainer {trainer.scales} (from {who}), rollout {rollout} ({_why(facts, part)})"
        if rollout == trainer.scales:
            yield allow(found, "one kind")
        elif _blackwell(facts.engine.capability):
            runner = "--sglang-moe-runner-backend deep_gemm" if part == "experts" else "--sglang-fp8-gemm-backend auto"
            next = _flag("0") if rollout == "pow2" else f"{runner}, whose scales are powers of two"
            yield deny(found, "powers of two on both sides", f"{next}; or --fp8-train aligned")
        elif rollout == "pow2":
            yield deny(found, "fp32 on both sides", f"--fp8-train aligned; or {WITHOUT_UE8M0} and {_flag('1')}")
        else:
            yield deny(found, "fp32 on both sides", f"{_flag('1')}; or --fp8-train aligned")


def _why(facts: Facts, part: str) -> str:
    if part in ue8m0_parts(facts):
        return "DeepGEMM on Blackwell takes only these"
    return f"the checkpoint's scale_fmt: {facts.checkpoint.scale_fmt or 'none'}"


def _blockwise(facts: Facts) -> bool:
    """TransformerEngine's blocks against the engine's."""
    trainer = facts.trainer
    return trainer.mode == "te" and trainer.recipe == "blockwise" and facts.checkpoint.method == "fp8-block"


@rule(
    "fp8.activation-scales",
    "on Hopper SGLang's activations have fp32 scales, whatever the checkpoint's weights have",
    "3.7 % of the activations",
)
def _activation_scales(facts: Facts) -> Iterator[Answer]:
    if not _blockwise(facts) or facts.trainer.scales != "pow2" or facts.checkpoint.scale_fmt != "ue8m0":
        return
    parts = [name for part, name in _PARTS if part == "dense" or (facts.model.experts and facts.quantises("experts"))]
    powers = [name for part, name in _PARTS if part in ue8m0_parts(facts)]
    others = [name for name in parts if name not in powers]
    if others:
        found = f"{' and '.join(others)}: activations have scales that are powers of two in the trainer only"
        yield deny(found, "one kind", f"--fp8-train aligned; or {WITHOUT_UE8M0} and {_flag('1')}")
    else:
        yield allow("powers of two in trainer and engine", "one kind")


@rule("fp8.emulated-blocks", "on Blackwell TransformerEngine emulates blockwise scaling with MXFP8", REFUSED)
def _emulated_blocks(facts: Facts) -> Iterator[Answer]:
    trainer = facts.trainer
    if trainer.mode != "te" or trainer.recipe != "blockwise" or (trainer.capability or 0) < 100:
        return
    found = f"capability {trainer.capability}, scales {trainer.scales} (from {trainer.fp32_scales_from})"
    if trainer.scales == "fp32":
        yield deny(found, "powers of two: MXFP8's scales are nothing else", _flag("0"))
    else:
        yield allow(found, "powers of two")
    if facts.model.experts:
        yield warn(
            f"{found}, {facts.model.experts} experts",
            "a token for every expert: SkyRL found that ones without misbehave in the emulation",
            "watch for NaN, or --fp8-train aligned",
            NOT_MEASURED,
        )


_NVFP4 = ("NVTE_NVFP4_DISABLE_2D_QUANTIZATION", "NVTE_NVFP4_DISABLE_RHT")


@rule("fp8.nvfp4-variables", "an engine's NVFP4 is in blocks of 1 x 16 and not rotated", NOT_MEASURED)
def _nvfp4_variables(facts: Facts) -> Iterator[Answer]:
    if facts.trainer.mode != "te" or facts.trainer.recipe != "nvfp4":
        return
    missing = [name for name in _NVFP4 if facts.trainer.variables.get(name) != "1"]
    if missing:
        values = json.dumps(dict.fromkeys(missing, "1"))
        yield warn(f"not 1: {', '.join(missing)}", "both 1", f"--train-env-vars '{values}'")
    else:
        yield allow("TransformerEngine's NVFP4 without 2-D blocks and rotation", "both off")


@rule(
    "fp8.trainer-blocks",
    "a rank's shard must hold whole 128 x 128 blocks of the checkpoint's tensors",
    "2.9 % in the blocks concerned",
)
def _trainer_blocks(facts: Facts) -> Iterator[Answer]:
    trainer = facts.trainer
    if facts.checkpoint.method != "fp8-block" or (trainer.mode == "te" and trainer.recipe != "blockwise"):
        return
    checked = [each for each in trainer_matrices(facts.model, trainer) if facts.quantises(each.kind)]
    misfits = [(each, side) for each in checked for side in each.misfits()]
    for matrix, side in misfits:
        found = f"{matrix.name}: {side} ({matrix.flag} {_ranks(matrix, trainer)})"
        whole = "no group of heads on two ranks" if side.block == 1 else "whole blocks on each rank"
        fewer = _smaller(side)
        next = f"{matrix.flag} {fewer}" if fewer else f"leave {matrix.kind} in bfloat16 on both sides"
        if trainer.mode == "te":
            yield deny(found, whole, next if side.ranks > 1 else f"{next}; or --fp8-train aligned")
        elif trainer.mode == "aligned" and side.block == 1:
            yield deny(found, whole, next, REFUSED)
        elif trainer.mode == "aligned" and side.ranks > 1:
            # Fused parts get scales of their own; a shard's blocks begin where the shard does.
            yield warn(f"{found}: gathered before it is quantised for the engine; in training it is not", whole, next)
        else:
            yield allow(f"{found}: gather first, then quantise", "whole blocks, to quantise before gathering")
    if checked and not misfits:
        found = f"{len(checked)} kinds of matrices, tp {trainer.tp}, etp {trainer.etp}"
        yield allow(found, "whole blocks on each rank")


def _ranks(matrix: Matrix, trainer: Trainer) -> int:
    return trainer.etp if matrix.kind == "experts" else trainer.tp


@rule(
    "fp8.router-probabilities",
    "SGLang weighs an expert's output; Megatron its second layer's input, before it is quantised",
    "1.2 % of that input with fp32 scales, 3.8 % with powers of two",
)
def _router_probabilities(facts: Facts) -> Iterator[Answer]:
    trainer = facts.trainer
    if not facts.model.experts or not facts.quantises("experts") or trainer.mode == "off":
        return
    if trainer.mode == "aligned" or not trainer.probabilities_before_fc2:
        yield allow("the router's probabilities are applied after the second layer", "where SGLang applies them")
        return
    pow2 = trainer.recipe in ("mxfp8", "nvfp4") or (trainer.recipe == "blockwise" and trainer.scales == "pow2")
    yield warn(
        "the router's probabilities are multiplied into linear_fc2's input before it is quantised",
        "after it, where SGLang applies them",
        "--fp8-train aligned, which applies them there",
        "3.8 % of that input: powers of two" if pow2 else "1.2 % of that input",
    )


@rule("fp8.param-gather", "weights kept in FP8 are dequantised and quantised again for the rollout", "1.3 %")
def _param_gather(facts: Facts) -> Iterator[Answer]:
    trainer = facts.trainer
    if not trainer.param_gather:
        return
    if trainer.mode != "te" or trainer.recipe == "none":
        yield deny("--fp8-param-gather without FP8 training", "a recipe", "take it out", REFUSED)
        return
    if trainer.cpu_offload and trainer.recipe != "delayed":
        yield deny(
            f"--fp8-param-gather with --optimizer-cpu-offload, recipe {trainer.recipe}",
            "Megatron allows both with recipe delayed only",
            "take --fp8-param-gather out",
            REFUSED,
        )
    elif trainer.recipe == "blockwise" and trainer.scales == "fp32":
        yield warn(
            "--fp8-param-gather with fp32 scales: codes of fp32 master weights, then codes of their bfloat16 values",
            "codes made once, of bfloat16 weights",
            "take --fp8-param-gather out",
            "1.3 %, and scales that drift by 0.17 %",
        )
    elif trainer.recipe == "blockwise":
        yield allow("--fp8-param-gather with powers of two: quantised again, they stay as they are", "no second error")


@rule("fp8.attention", "SGLang computes attention in bfloat16", NOT_MEASURED)
def _attention(facts: Facts) -> Iterator[Answer]:
    trainer = facts.trainer
    if trainer.mode != "te" or not trainer.fp8_attention:
        return
    found = "the trainer's attention is FP8"
    next = "take --fp8-dot-product-attention and --fp8-multi-head-attention out"
    if trainer.recipe == "blockwise":
        yield deny(found, "bfloat16: blockwise scaling knows no FP8 attention", next, REFUSED)
    else:
        yield warn(found, "bfloat16, as in the rollout", next)


@rule("fp8.bf16-layers", "a layer must be in FP8 on both sides, or on neither", "2.65 % in these layers")
def _bf16_layers(facts: Facts) -> Iterator[Answer]:
    trainer, layers = facts.trainer, facts.model.layers
    first, last = trainer.first_bf16, trainer.last_bf16
    if trainer.mode != "te" or not facts.quantised:
        return
    if trainer.recipe == "delayed" and (first or last):
        yield deny("--first-last-layers-bf16 with recipe delayed", "another recipe", "take it out", REFUSED)
        return
    if facts.checkpoint.bf16_layers is None:
        if first or last:
            yield warn(
                f"the trainer keeps {first} first and {last} last layers in bfloat16; the checkpoint's are not known",
                "the same layers in both",
                "give --hf-checkpoint a folder with the tensors' names",
            )
        return
    kept = {*range(first), *range(layers - last, layers)}
    if kept == facts.checkpoint.bf16_layers:
        yield allow(f"bfloat16 in both: {_numbers(kept)}", "the same layers")
    else:
        flags = f"--num-layers-at-start-in-bf16 {first}, --num-layers-at-end-in-bf16 {last}"
        if first or last:
            next = f"change {flags}, or convert the checkpoint with the same"
        else:
            next = "--first-last-layers-bf16 with these, or convert the checkpoint without exceptions"
        found = f"bfloat16 in the trainer: {_numbers(kept)}; in the checkpoint: "
        yield deny(found + _numbers(facts.checkpoint.bf16_layers), "the same layers in both", next)


def _numbers(layers: Iterable[int]) -> str:
    found = sorted(layers)
    more = f", … ({len(found)})" if len(found) > 8 else ""
    return f"layers {', '.join(map(str, found[:8]))}{more}" if found else "no layer"


@rule("fp8.routing", "two forwards choose two sets of experts where scores are close", NOT_MEASURED)
def _routing(facts: Facts) -> Iterator[Answer]:
    if not facts.model.experts or not facts.quantised:
        return
    if facts.routing_replay:
        yield allow("the trainer replays the experts that the engine chose", "one choice")
    else:
        yield warn("the trainer's router chooses again", "the engine's choice, replayed", "--plugins fp8,r3")


# -- what it serves ---------------------------------------------------------------------------------------------------


@rule("fp8.rollout-method", "a format that the weight update cannot make must be found before it starts", GARBAGE)
def _rollout_method(facts: Facts) -> Iterator[Answer]:
    checkpoint = facts.checkpoint
    if not facts.quantised:
        return
    convert = "convert a BF16 checkpoint with `miles-plugins convert-fp8`"
    known = "fp8 in blocks of 128 x 128 or per tensor, mxfp8, nvfp4"
    if checkpoint.method == "int4":
        yield deny(f"{checkpoint.name}, INT4", known, f"{convert}; INT4 is another plugin's: --plugins int4")
    elif checkpoint.method in ("unknown", "fp8-channel"):
        what = f"{checkpoint.name or 'no quant_method'}"
        what += ", a scale a channel: slime takes it for INT4" if checkpoint.method == "fp8-channel" else ""
        yield deny(f"quant_method {what}", known, convert)
    elif checkpoint.method in ("fp8-block", "fp8-tensor") and checkpoint.activation_scheme != "dynamic":
        yield deny(f"activation_scheme {checkpoint.activation_scheme}", "dynamic", convert)
    elif checkpoint.method in ("fp8-block", "fp8-tensor") and checkpoint.fmt != "e4m3":
        yield deny(f"fmt {checkpoint.fmt}", "e4m3", convert)
    else:
        yield allow(f"{checkpoint.name or checkpoint.method}, activations {checkpoint.activation_scheme}", known)


@rule("fp8.block-size", "the trainer's blocks, and DeepGEMM's, are 128 x 128", "2.9 %, or a weight update that fails")
def _block_size(facts: Facts) -> Iterator[Answer]:
    if facts.checkpoint.method != "fp8-block":
        return
    block = list(facts.checkpoint.block or ())
    if block == [BLOCK, BLOCK]:
        yield allow("weight_block_size [128, 128]", "[128, 128]")
    else:
        next = "convert a BF16 checkpoint with `miles-plugins convert-fp8`; fewer --rollout-num-gpus-per-engine if the "
        yield deny(f"weight_block_size {block}", "[128, 128]", f"{next}blocks were made small for their number")


@rule(
    "fp8.online-quantization",
    "SGLang would quantise a BF16 checkpoint while loading; weight updates write bfloat16 over FP8",
    GARBAGE,
)
def _online_quantization(facts: Facts) -> Iterator[Answer]:
    asked = facts.engine.quantization
    if asked is not None and not facts.quantised:
        next = "take it out and give a converted checkpoint (`miles-plugins convert-fp8`)"
        yield deny(f"--sglang-quantization {asked}, and the checkpoint is BF16", "a quantised checkpoint", next)


@rule("fp8.declared-scales", "config.json must say of the scales what they are", "3.7 % between the two kinds")
def _declared_scales(facts: Facts) -> Iterator[Answer]:
    checkpoint = facts.checkpoint
    if checkpoint.method != "fp8-block" or checkpoint.powers_of_two is None:
        return
    declared = checkpoint.scale_fmt == "ue8m0"
    are = "are" if checkpoint.powers_of_two else "are no"
    found = f"scale_fmt {checkpoint.scale_fmt or 'none'}, and the scales {are} powers of two"
    if declared and not checkpoint.powers_of_two:
        reason = "slime's converter writes the word and rounds nothing"
        yield deny(found, f"powers of two: {reason}", "convert again with `miles-plugins convert-fp8`, or take it out")
    elif checkpoint.powers_of_two and not declared:
        next = 'add "scale_fmt": "ue8m0" to its quantization_config, or convert again'
        yield warn(f"{found}: the first weight update would bring fp32 scales", "ue8m0, declared", next)
    else:
        yield allow(found, "as declared")


@rule("fp8.zero-blocks", "slime's converter before v0.3.2 divides a block of zeros by zero", "NaN in every output")
def _zero_blocks(facts: Facts) -> Iterator[Answer]:
    if facts.checkpoint.nan:
        yield deny(
            f"{facts.checkpoint.nan} has NaN in place of zeros", "zeros", "convert with `miles-plugins convert-fp8`"
        )


@rule(
    "fp8.engine-blocks",
    "SGLang gives each GPU whole blocks, or refuses (validate_block_quant_shapes)",
    REFUSED,
)
def _engine_blocks(facts: Facts) -> Iterator[Answer]:
    engine = facts.engine
    if facts.checkpoint.method != "fp8-block" or engine.device == "cpu":
        return
    checked = [each for each in engine_matrices(facts.model, engine) if facts.quantises(each.kind)]
    misfits = [(each, side) for each in checked for side in each.misfits()]
    for matrix, side in misfits:
        fewer = _smaller(side)
        if matrix.kind == "experts" and fewer:
            next = f"--sglang-ep-size {engine.tp // engine.moe_dp // fewer}, or fewer --rollout-num-gpus-per-engine"
        elif fewer:
            next = f"divide it among {fewer}: {matrix.flag}, or --sglang-enable-dp-attention for attention"
        else:
            next = f"a checkpoint that leaves {matrix.kind} in bfloat16"
        yield deny(f"{matrix.name}: {side} (tp {engine.tp}, ep {engine.ep})", "whole blocks on each GPU", next)
    if checked and not misfits:
        yield allow(f"{len(checked)} kinds of matrices, tp {engine.tp}, ep {engine.ep}", "whole blocks on each GPU")


@rule(
    "fp8.loaded-scales",
    "on Blackwell SGLang quantises fp32-scaled weights a second time when it loads them",
    "26 % of the codes, and an error of 3.73 % instead of 2.66 %, until the first weight update",
)
def _loaded_scales(facts: Facts) -> Iterator[Answer]:
    if not ue8m0_parts(facts):
        return
    if facts.checkpoint.scale_fmt == "ue8m0":
        yield allow("ue8m0 in the checkpoint: repacking changes no value", "ue8m0")
    else:
        found = "fp32 scales in the checkpoint, DeepGEMM on Blackwell in the engine"
        yield warn(found, "ue8m0 in the checkpoint", "`miles-plugins convert-fp8 --scale power-of-two`")


@rule("fp8.latent-attention", "SGLang multiplies kv_b_proj in bfloat16, absorbed into the queries", NOT_MEASURED)
def _latent_attention(facts: Facts) -> Iterator[Answer]:
    if not facts.model.kv_rank or not facts.quantised or facts.trainer.mode == "off":
        return
    if facts.checkpoint.kv_b_quantised is False or not facts.quantises("attention"):
        yield allow("kv_b_proj is bfloat16 in the checkpoint", "bfloat16 on both sides")
    else:
        yield warn(
            "kv_b_proj is FP8: the engine dequantises it and multiplies in bfloat16, the trainer in FP8",
            "bfloat16 on both sides",
            "convert the checkpoint with kv_b_proj kept, and keep linear_kv_up_proj in bfloat16",
        )


@rule("fp8.indexer", "DSA's weights_proj is bfloat16 in the engine", NOT_MEASURED)
def _indexer(facts: Facts) -> Iterator[Answer]:
    if not facts.model.indexer or not facts.quantised or facts.trainer.mode != "te":
        return
    if facts.trainer.precision_file:
        yield allow("--te-precision-config-file decides (its content is not read)", "weights_proj in bfloat16")
    else:
        next = "--te-precision-config-file with weights_proj in bfloat16, or --fp8-train aligned"
        yield warn("TransformerEngine runs the indexer's weights_proj in FP8", "bfloat16", next)


@rule("fp8.kv-cache", "the trainer's keys and values are bfloat16", "attention only, not measured")
def _kv_cache(facts: Facts) -> Iterator[Answer]:
    if facts.engine.kv_cache not in ("auto", "bf16", "bfloat16"):
        found = f"--sglang-kv-cache-dtype {facts.engine.kv_cache}"
        yield warn(found, "auto", "take it out; a smaller --sglang-mem-fraction-static or shorter answers save as much")


# -- how weights get there --------------------------------------------------------------------------------------------


@rule("fp8.conversion", "bridge mode's names match no rule of slime's quantiser", GARBAGE)
def _conversion(facts: Facts) -> Iterator[Answer]:
    if not facts.quantised:
        return
    if facts.megatron_to_hf_mode == "bridge":
        found = "--megatron-to-hf-mode bridge: bfloat16 is cast into SGLang's FP8 experts, against old scales"
        yield deny(found, "raw", "--megatron-to-hf-mode raw")
    else:
        yield allow(f"--megatron-to-hf-mode {facts.megatron_to_hf_mode}", "raw")


@rule("fp8.mtp-names", "MTP layers that slime does not recognise are sent in bfloat16", GARBAGE)
def _mtp_names(facts: Facts) -> Iterator[Answer]:
    if not facts.model.mtp_layers or not facts.quantised or facts.upstream.mtp_names_agree is None:
        return
    if facts.upstream.mtp_names_agree:
        yield allow("Megatron's MTP layers have the name that slime knows", "one name")
    else:
        found = "this Megatron says mtp_model_layer, and slime looks for transformer_layer"
        yield deny(found, "one name", "take the Megatron that slime pins, or leave MTP out (--mtp-num-layers 0)")


@rule("fp8.selection", "checkpoint, weight update, engine and trainer must quantise the same modules", GARBAGE)
def _selection(facts: Facts) -> Iterator[Answer]:
    sets = dict(facts.selections)
    if facts.trainer.mode == "off":
        sets.pop("trainer", None)
    if len(sets) < 2:
        return
    (first, wanted), *others = sets.items()
    differing = [(name, found) for name, found in others if found != wanted]
    for name, found in differing:
        parts = [f"only in {first}: {_some(wanted - found)}", f"only in {name}: {_some(found - wanted)}"]
        yield deny(
            "; ".join(part for part, more in zip(parts, (wanted - found, found - wanted), strict=True) if more),
            f"the {len(wanted)} modules of {first} in {name}",
            "convert the checkpoint with the same modules, or make modules_to_not_convert say what its tensors are",
        )
    if not differing:
        yield allow(f"{len(wanted)} modules in {', '.join(sets)}", "one set")


@rule("fp8.torn-layers", "SGLang builds q, k and v, or gate and up, as one layer: FP8 or not", REFUSED)
def _torn_layers(facts: Facts) -> Iterator[Answer]:
    if facts.torn:
        found = f"only a part is FP8 of {_some(facts.torn)}"
        yield deny(found, "all parts, or none", "list all of them in modules_to_not_convert, or none")


def _some(names: frozenset[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (f", … ({len(found)})" if len(found) > 3 else "")


@rule("fp8.scale-packing", "only DeepGEMM reads packed ue8m0 scales", GARBAGE)
def _scale_packing(facts: Facts) -> Iterator[Answer]:
    parts = ue8m0_parts(facts)
    if not parts:
        return
    moe = bool(facts.model.experts) and facts.quantises("experts")
    runner = moe_runner(facts)
    if moe and "experts" not in parts and not facts.runner_aware_sync:
        yield deny(
            f"the weight update packs ue8m0 scales for all, and the experts run in {runner}",
            "DeepGEMM for dense layers and experts, or for neither",
            "--sglang-moe-runner-backend deep_gemm with --sglang-moe-a2a-backend deepep, "
            "or --sglang-fp8-gemm-backend triton",
        )
    elif moe and "experts" in parts and "dense" not in parts and not facts.runner_aware_sync:
        found = f"the weight update packs ue8m0 scales for all, and dense layers run in {facts.engine.gemm}"
        yield deny(found, "DeepGEMM for both", "--sglang-fp8-gemm-backend deep_gemm")
    bad = [each for each in engine_matrices(facts.model, facts.engine) if _packed(facts, each, parts)]
    for matrix in bad:
        rows, columns = _per_rank(matrix)
        yield deny(
            f"{matrix.name}: [{rows:g}, {columns:g}] on each GPU: SGLang runs it in Triton, which expects fp32 scales",
            "N a multiple of 64, K of 128",
            f"fewer GPUs: {matrix.flag}; or --sglang-fp8-gemm-backend triton",
        )
    if not bad and (not moe or facts.runner_aware_sync or parts == {"dense", "experts"}):
        yield allow(f"ue8m0 scales for {' and '.join(sorted(parts))}, in DeepGEMM", "DeepGEMM")


def _packed(facts: Facts, matrix: Matrix, parts: frozenset[str]) -> bool:
    """Whether its scales would be packed, and DeepGEMM cannot multiply it."""
    part = "experts" if matrix.kind == "experts" else "dense"
    rows, columns = _per_rank(matrix)
    return part in parts and facts.quantises(matrix.kind) and bool(rows % 64 or columns % 128)


def _per_rank(matrix: Matrix) -> tuple[float, float]:
    return sum(side.size / side.ranks for side in matrix.rows), matrix.columns.size / matrix.columns.ranks


@rule("fp8.delta", "a delta against the checkpoint needs scales as the checkpoint has them", REFUSED)
def _delta(facts: Facts) -> Iterator[Answer]:
    if facts.update_weight_mode != "delta" or not facts.quantised:
        return
    if ue8m0_parts(facts):
        found = "--update-weight-mode delta, and ue8m0 scales are packed into int32"
        yield deny(found, "full, or fp32 scales", "--update-weight-mode full")
    else:
        yield allow("--update-weight-mode delta with fp32 scales", "scales as the checkpoint has them")


@rule("fp8.saved-scales", "a saved checkpoint must hold scales that can be read again", "an unreadable checkpoint")
def _saved_scales(facts: Facts) -> Iterator[Answer]:
    if not facts.save_hf or not ue8m0_parts(facts):
        return
    if facts.upstream.unpacks_saved_scales is False:
        next = "take --save-hf out and convert afterwards, or a newer slime (its pull request 2271)"
        yield deny("--save-hf writes packed int32 scales in this slime", "one scale a block", next)
    else:
        yield allow("--save-hf writes one scale a block", "one scale a block")


@rule("fp8.post-process", "some kernels keep weights in a layout of their own", "stale or wrong weights")
def _post_process(facts: Facts) -> Iterator[Answer]:
    if not facts.quantised:
        return
    able = facts.engine.weight_session
    if not needs_post_process(facts):
        yield allow("the engine computes with weights as they are sent: nothing to do after an update", "no processing")
        return
    found = f"{_layout(facts)} keeps weights in a layout of its own"
    if able:
        yield allow(f"{found}; SGLang can process them after an update", "processed after each update")
    else:
        unknown = "; whether this SGLang can process them after an update is not known"
        next = "SGLang with begin_weight_update (0.5.23 has it), slime's image, or a runner that needs none: triton"
        answer = warn if able is None else deny
        yield answer(found + (unknown if able is None else ""), "processed after each update", next)


def _layout(facts: Facts) -> str:
    if facts.checkpoint.method != "fp8-block":
        return facts.checkpoint.method
    if facts.model.experts and moe_runner(facts) not in ("triton", "cutlass", "deep_gemm"):
        return f"MoE runner {moe_runner(facts)}"
    return "DeepGEMM on Blackwell" if ue8m0_parts(facts) else f"GEMM backend {facts.engine.gemm}"


# -- how it is measured -----------------------------------------------------------------------------------------------


@rule("fp8.weight-check", "SGLang's own comparison of weights must know their format", REFUSED)
def _weight_check(facts: Facts) -> Iterator[Answer]:
    if not facts.check_weight_update_equal or facts.checkpoint.method != "fp8-block":
        return
    version = facts.engine.version
    if version is not None and _release(version) < (0, 5, 12) and not ue8m0_parts(facts):
        found = f"--check-weight-update-equal with SGLang {version}, which takes every scale for packed ue8m0"
        yield deny(found, "SGLang 0.5.12 or later", "take the flag out")
    else:
        yield allow("--check-weight-update-equal", "SGLang 0.5.12 or later")


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


@rule("fp8.blind-metric", "slime up to v0.3.0 compares rollout log-probs with themselves", "a metric that is always 0")
def _blind_metric(facts: Facts) -> Iterator[Answer]:
    if not facts.use_rollout_logprobs or not (facts.quantised or facts.trainer.mode != "off"):
        return
    if facts.upstream.blind_metric:
        found = "--use-rollout-logprobs: slime's train_rollout_logprob_abs_diff is exactly 0 in this release"
        yield warn(found, "the training forward's log-probs", "read the plugin's own figures, fp8/…, or slime v0.3.1")
    elif facts.upstream.blind_metric is False:
        yield allow("--use-rollout-logprobs: slime compares with the training forward", "the training forward")


@rule("fp8.not-visible", "what could not be looked at was not judged", "whatever the rules would have found")
def _not_visible(facts: Facts) -> Iterator[Answer]:
    trainer, engine = facts.trainer, facts.engine
    if not facts.quantised and trainer.mode == "off":
        return
    te, cpu = trainer.mode == "te", engine.device == "cpu"
    unseen = {
        "the trainer's GPU": te and trainer.capability is None,
        "the engine's GPU": not cpu and engine.capability is None,
        "TransformerEngine's version": te and trainer.transformer_engine is None,
        "the CUDA version": te and trainer.recipe == "blockwise" and trainer.cuda is None,
        "the model's sizes": facts.quantised and not facts.model.hidden,
        "the checkpoint's scales": facts.checkpoint.method == "fp8-block" and facts.checkpoint.powers_of_two is None,
        "which modules are quantised": facts.quantised and len(facts.selections) < 2,
        f"whether slime sets {VARIABLE} itself": te
        and trainer.recipe == "blockwise"
        and trainer.fp32_scales_from != "--train-env-vars"
        and facts.upstream.hard_codes_scales is None,
        "what --sglang-config says": engine.config_file,
        "what --te-precision-config-file says": trainer.precision_file,
    }
    names = [name for name, is_unseen in unseen.items() if is_unseen]
    if names:
        next = "run this where slime runs, with --gpu for its GPUs and --hf-checkpoint for the folder"
        yield warn(f"not known: {', '.join(names)}", "everything that decides", next)
