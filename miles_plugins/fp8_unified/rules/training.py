"""Rules: how it trains."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from miles_plugins.fp8_unified.chosen import TRAINED
from miles_plugins.fp8_unified.rules.layouts import (
    Matrix,
    _blackwell,
    _marlin,
    _smaller,
    rollout_scales,
    trainer_matrices,
    ue8m0_parts,
)
from miles_plugins.fp8_unified.rules.run import VARIABLE, Facts, Method, Trainer
from miles_plugins.fp8_unified.rules.table import (
    CONVERT_TO_POWERS,
    NOT_MEASURED,
    REFUSED,
    Answer,
    Verdict,
    allow,
    deny,
    rule,
    warn,
)


@rule("fp8.train-mode", "--fp8-train and Megatron's own FP8 flags must ask for one thing", "the other one trains")
def _train_mode(facts: Facts) -> Iterator[Answer]:
    mode, recipe = facts.trainer.mode, facts.trainer.recipe
    if mode == "te" and facts.embedded:
        return  # fp8.transformer-engine
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
            "take --fp8-format (or --fp4-format) out, or use --fp8-train te",
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
        how = "--fp8-train aligned" if facts.embedded else _RECIPE_OF[method]
        yield warn(found, f"with {method}, an FP8 forward in training", f"train with {how}")
    elif verdict == "warn":
        yield warn(found, expected, "take blockwise on both sides, which can be made equal", NOT_MEASURED)
    elif method == "bf16":
        next = "convert it (`miles-plugins convert-fp8`) and give the result as --hf-checkpoint, or use --fp8-train off"
        yield deny(found, expected, next)
    else:
        yield deny(found, expected, f"give {_ROLLOUT_OF[recipe]}, or train with {_RECIPE_OF[method]}")


@rule(
    "fp8.trainer-layers",
    "aligned replaces Megatron's linear layers, in bfloat16: what computes past them is not FP8",
    "2.65 % of the weights and 2.3 to 2.7 % of the activations there, or a run that fails later",
)
def _trainer_layers(facts: Facts) -> Iterator[Answer]:
    if facts.trainer.mode != "aligned":
        return
    if flags := facts.trainer.other_layers:
        yield deny(
            f"--fp8-train aligned with {', '.join(flags)}",
            "Megatron's linear layers as they are, in bfloat16",
            f"take {'it' if len(flags) == 1 else 'them'} out",
        )
    if strange := sorted((facts.checkpoint.kinds or frozenset()) - TRAINED):
        yield deny(
            f"FP8 in the checkpoint: {', '.join(strange)}, for which --fp8-train aligned has no layers",
            f"FP8 in no more than {', '.join(sorted(TRAINED))}",
            "use --fp8-train te or off, or take a checkpoint that has these in BF16",
        )
    elif not flags:
        yield allow("the FP8 weights are of layers that aligned replaces", "Megatron's linear layers, in bfloat16")


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
    if facts.embedded:
        found = "the embedded host has Megatron's own layers, without TransformerEngine"
        yield deny(found, "slime, for --fp8-train te", "use --fp8-train aligned, or run under slime")
    elif trainer.transformer_impl != "transformer_engine":
        found = f"--transformer-impl {trainer.transformer_impl}: Megatron's own layers know no FP8"
        yield deny(found, "--transformer-impl transformer_engine", f"take the flag out; {aligned}")
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
            yield deny(found, f"{needed} or higher", "take blockwise on Hopper, or --fp8-train off on older GPUs")
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
        either = "" if hard_coded else "take it out of the shell, or "
        found += "; this slime passes over the shell" if hard_coded else ""
        yield deny(f"the shell says {shell!r}, and {found}", "one value", f"{either}set {_flag(shell)}")
    else:
        yield allow(found, f"powers of two or fp32, as the rollout: {trainer.scales}")


def _flag(value: str) -> str:
    return f"--train-env-vars '{json.dumps({VARIABLE: value})}'"


WITHOUT_UE8M0 = "take a checkpoint with fp32 scales (`miles-plugins convert-fp8 --scale float32`)"
_PARTS = (("dense", "dense layers"), ("experts", "experts"))


@rule(
    "fp8.scale-kind",
    "weights quantised with fp32 scales and with powers of two are two sets of weights",
    "3.7 % of the weights: more than FP8's own 2.65 %",
)
def _scale_kind(facts: Facts) -> Iterator[Answer]:
    trainer = facts.trainer
    if _aligned(facts):
        yield from _aligned_scale_kind(facts)
    if not _blockwise(facts):
        return
    for part, name in _quantised_parts(facts):
        aligned = "use --fp8-train aligned" if _fits_aligned(facts) else ""
        rollout, who = rollout_scales(facts, part), trainer.fp32_scales_from
        found = f"{name}: trainer {trainer.scales} (from {who}), rollout {rollout} ({_why(facts, part)})"
        if rollout == trainer.scales:
            yield allow(found, "one kind")
        elif _blackwell(facts.engine.capability):
            runner = "--sglang-moe-runner-backend deep_gemm" if part == "experts" else "--sglang-fp8-gemm-backend auto"
            next = _flag("0") if rollout == "pow2" else f"{runner}, whose scales are powers of two"
            yield deny(found, "powers of two on both sides", f"set {next}{'; or ' if aligned else ''}{aligned}")
        elif rollout == "pow2":
            yield deny(found, "fp32 on both sides", f"use --fp8-train aligned; or {WITHOUT_UE8M0} and {_flag('1')}")
        else:
            yield deny(found, "fp32 on both sides", f"set {_flag('1')}; or use --fp8-train aligned")


def _aligned_scale_kind(facts: Facts) -> Iterator[Answer]:
    """The plugin's weights have the checkpoint's kind of scales, in training and when they are sent."""
    declared = facts.checkpoint.scale_fmt == "ue8m0"
    for part, name in _quantised_parts(facts):
        found = f"{name}: trainer {'pow2' if declared else 'fp32'} (from the checkpoint), rollout "
        found += f"{rollout_scales(facts, part)} ({_why(facts, part)})"
        if part not in ue8m0_parts(facts) or declared:
            yield allow(found, "one kind")
            continue
        runner = "--sglang-moe-runner-backend" if part == "experts" else "--sglang-fp8-gemm-backend"
        yield deny(
            f"{found}: the engine quantises what it is sent once more, and activations with powers of two",
            "powers of two on both sides",
            f"{CONVERT_TO_POWERS}, or set {runner} triton",
        )


def _fits_aligned(facts: Facts) -> bool:
    """Whether --fp8-train aligned would have the engine's kinds of scales."""
    answers = [*_aligned_scale_kind(facts), *_aligned_activation_scales(facts)]
    return all(answer.verdict == "allow" for answer in answers)


def _quantised_parts(facts: Facts) -> list[tuple[str, str]]:
    """Those of _PARTS that are FP8."""
    kinds = facts.checkpoint.kinds
    dense = kinds is None or bool(kinds - {"experts"})
    experts = bool(facts.model.experts) and facts.quantises("experts")
    return [(part, name) for part, name in _PARTS if (experts if part == "experts" else dense)]


def _aligned(facts: Facts) -> bool:
    return facts.trainer.mode == "aligned" and facts.checkpoint.method == "fp8-block"


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
    if _aligned(facts):
        yield from _aligned_activation_scales(facts)
    if not _blockwise(facts) or facts.trainer.scales != "pow2" or facts.checkpoint.scale_fmt != "ue8m0":
        return
    others = [name for part, name in _quantised_parts(facts) if part not in ue8m0_parts(facts)]
    if others:
        found = f"{' and '.join(others)}: activations have scales that are powers of two in the trainer only"
        aligned = "use --fp8-train aligned; or " if _fits_aligned(facts) else ""
        yield deny(found, "one kind", f"{aligned}{WITHOUT_UE8M0} and {_flag('1')}")
    else:
        yield allow("powers of two in trainer and engine", "one kind")


def _aligned_activation_scales(facts: Facts) -> Iterator[Answer]:
    """`product.activations`: fp32 below capability 100, and the weights' kind from there on."""
    capability = facts.trainer.capability
    if (
        facts.checkpoint.scale_fmt != "ue8m0"
        or capability is None
        or facts.engine.capability is None
        or facts.engine.device == "cpu"
    ):
        return
    powers = capability >= 100
    others = [name for part, name in _quantised_parts(facts) if (part in ue8m0_parts(facts)) is not powers]
    kinds = "powers of two" if powers else "fp32"
    if not others:
        yield allow(f"{kinds} in trainer and engine", "one kind")
        return
    found = f"{' and '.join(others)}: activations have scales that are "
    found += f"{kinds} in the trainer (capability {capability}) only"
    deepgemm = "--sglang-moe-runner-backend deep_gemm with --sglang-moe-a2a-backend deepep, which takes powers of two"
    if not powers:
        next = f"train and serve on one kind of GPU, or {WITHOUT_UE8M0} and --sglang-fp8-gemm-backend triton"
    elif others == ["experts"]:
        next = f"set {deepgemm}; or {WITHOUT_UE8M0} and --sglang-fp8-gemm-backend triton"
    else:
        next = WITHOUT_UE8M0
    yield deny(found, "one kind", next)


@rule("fp8.emulated-blocks", "on Blackwell TransformerEngine emulates blockwise scaling with MXFP8", REFUSED)
def _emulated_blocks(facts: Facts) -> Iterator[Answer]:
    trainer = facts.trainer
    if trainer.mode != "te" or trainer.recipe != "blockwise" or (trainer.capability or 0) < 100:
        return
    found = f"capability {trainer.capability}, scales {trainer.scales} (from {trainer.fp32_scales_from})"
    if trainer.scales == "fp32":
        yield deny(found, "powers of two: MXFP8's scales are nothing else", f"set {_flag('0')}")
    else:
        yield allow(found, "powers of two")
    if facts.model.experts:
        yield warn(
            f"{found}, {facts.model.experts} experts",
            "a token for every expert: SkyRL found that ones without misbehave in the emulation",
            "watch for NaN, or use --fp8-train aligned",
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
        yield warn(f"not 1: {', '.join(missing)}", "both 1", f"set --train-env-vars '{values}'")
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
        next = f"set {matrix.flag} {fewer}" if fewer else f"leave {matrix.kind} in bfloat16 on both sides"
        if trainer.mode == "te":
            yield deny(found, whole, next if side.ranks > 1 else f"{next}; or use --fp8-train aligned")
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
        "use --fp8-train aligned, which applies them there",
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
            "recipe delayed: Megatron allows both with no other",
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
            next = "give --first-last-layers-bf16 with these, or convert the checkpoint without exceptions"
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
        yield warn("the trainer's router chooses again", "the engine's choice, replayed", "use --plugins fp8,r3")
