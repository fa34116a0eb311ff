"""Rules: what it serves."""

from __future__ import annotations

from collections.abc import Iterator

from miles_plugins.fp8_unified.rules.layouts import _smaller, engine_matrices, ue8m0_parts
from miles_plugins.fp8_unified.rules.run import BLOCK, Facts
from miles_plugins.fp8_unified.rules.table import (
    CONVERT_TO_POWERS,
    GARBAGE,
    NOT_MEASURED,
    REFUSED,
    Answer,
    allow,
    deny,
    rule,
    warn,
)


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
        next = "convert a BF16 checkpoint with `miles-plugins convert-fp8`; lower --rollout-num-gpus-per-engine if the "
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
            next = f"set --sglang-ep-size {engine.tp // engine.moe_dp // fewer}, or fewer --rollout-num-gpus-per-engine"
        elif fewer:
            next = f"divide it among {fewer}: set {matrix.flag}, or --sglang-enable-dp-attention for attention"
        else:
            next = f"take a checkpoint that leaves {matrix.kind} in bfloat16"
        yield deny(f"{matrix.name}: {side} (tp {engine.tp}, ep {engine.ep})", "whole blocks on each GPU", next)
    if checked and not misfits:
        yield allow(f"{len(checked)} kinds of matrices, tp {engine.tp}, ep {engine.ep}", "whole blocks on each GPU")


@rule(
    "fp8.loaded-scales",
    "on Blackwell SGLang quantises fp32-scaled weights a second time when it loads them",
    "26 % of the codes, and an error of 3.73 % instead of 2.66 %",
)
def _loaded_scales(facts: Facts) -> Iterator[Answer]:
    if not ue8m0_parts(facts):
        return
    if facts.checkpoint.scale_fmt == "ue8m0":
        yield allow("ue8m0 in the checkpoint: repacking changes no value", "ue8m0")
    else:
        found = "fp32 scales in the checkpoint, DeepGEMM on Blackwell in the engine"
        sent = (
            "after every weight update, which brings fp32 scales, too"
            if facts.plugin
            else "until the first weight update"
        )
        cost = f"26 % of the codes, and an error of 3.73 % instead of 2.66 %, {sent}"
        yield warn(found, "ue8m0 in the checkpoint", CONVERT_TO_POWERS, cost)


@rule(
    "fp8.latent-attention",
    "SGLang multiplies kv_b_proj in bfloat16, absorbed into the queries",
    "2.3 to 2.7 % of kv_b_proj's input, which the trainer alone rounds to FP8",
)
def _latent_attention(facts: Facts) -> Iterator[Answer]:
    if not facts.model.kv_rank or not facts.quantised or facts.trainer.mode == "off":
        return
    if facts.checkpoint.kv_b_quantised is False or not facts.quantises("attention"):
        yield allow("kv_b_proj is bfloat16 in the checkpoint", "bfloat16 on both sides")
    else:
        yield warn(
            "kv_b_proj is FP8: the engine dequantises it and multiplies in bfloat16, the trainer in FP8",
            "bfloat16 on both sides",
            "accept it: nothing can be done yet (convert-fp8 keeps no single projection, and a checkpoint with a part "
            "of a layer's attention in FP8 is refused)",
        )


@rule("fp8.indexer", "DSA's weights_proj is bfloat16 in the engine", NOT_MEASURED)
def _indexer(facts: Facts) -> Iterator[Answer]:
    if not facts.model.indexer or not facts.quantised or facts.trainer.mode != "te":
        return
    if facts.trainer.precision_file:
        yield allow("--te-precision-config-file decides (its content is not read)", "weights_proj in bfloat16")
    else:
        next = "give --te-precision-config-file with weights_proj in bfloat16, or --fp8-train aligned"
        yield warn("TransformerEngine runs the indexer's weights_proj in FP8", "bfloat16", next)


@rule("fp8.kv-cache", "the trainer's keys and values are bfloat16", f"{NOT_MEASURED}; it is of attention only")
def _kv_cache(facts: Facts) -> Iterator[Answer]:
    if facts.engine.kv_cache not in ("auto", "bf16", "bfloat16"):
        found = f"--sglang-kv-cache-dtype {facts.engine.kv_cache}"
        yield warn(found, "auto", "take it out; a smaller --sglang-mem-fraction-static or shorter answers save as much")
