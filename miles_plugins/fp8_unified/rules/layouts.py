"""What an engine and a trainer make of a model: kernels, and the matrices that one GPU has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from miles_plugins.fp8_unified.rules.run import BLOCK, DEEPGEMM_DISPATCHERS, Engine, Facts, Model, Scales, Trainer


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
    if facts.checkpoint.method != "fp8-block" or not engine.deepgemm or engine.device == "cpu":
        return frozenset()
    if not _blackwell(engine.capability):
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
