"""Rules: how weights get there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from miles_plugins.fp8_unified.rules.layouts import Matrix, engine_matrices, moe_runner, needs_post_process, ue8m0_parts
from miles_plugins.fp8_unified.rules.run import Facts
from miles_plugins.fp8_unified.rules.table import GARBAGE, REFUSED, Answer, allow, deny, rule, warn


@rule("fp8.conversion", "bridge mode's names match no rule of slime's quantiser", GARBAGE)
def _conversion(facts: Facts) -> Iterator[Answer]:
    if not facts.quantised:
        return
    if facts.megatron_to_hf_mode == "bridge":
        found = "--megatron-to-hf-mode bridge: bfloat16 is cast into SGLang's FP8 experts, against old scales"
        yield deny(found, "raw", "set --megatron-to-hf-mode raw")
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
    if not facts.packs_at_source:
        yield allow("the weight update brings one fp32 scale a block, packed for no kernel", "scales for any kernel")
        return
    moe = bool(facts.model.experts) and facts.quantises("experts")
    runner = moe_runner(facts)
    if moe and "experts" not in parts:
        yield deny(
            f"the weight update packs ue8m0 scales for all, and the experts run in {runner}",
            "DeepGEMM for dense layers and experts, or for neither",
            "set --sglang-moe-runner-backend deep_gemm with --sglang-moe-a2a-backend deepep, "
            "or --sglang-fp8-gemm-backend triton; or use --plugins fp8, which packs nothing",
        )
    elif moe and "experts" in parts and "dense" not in parts:
        found = f"the weight update packs ue8m0 scales for all, and dense layers run in {facts.engine.gemm}"
        yield deny(found, "DeepGEMM for both", "set --sglang-fp8-gemm-backend deep_gemm")
    bad = [each for each in engine_matrices(facts.model, facts.engine) if _packed(facts, each, parts)]
    for matrix in bad:
        rows, columns = _per_rank(matrix)
        yield deny(
            f"{matrix.name}: [{rows:g}, {columns:g}] on each GPU: SGLang runs it in Triton, which expects fp32 scales",
            "N a multiple of 64, K of 128",
            f"take fewer GPUs ({matrix.flag}), or --sglang-fp8-gemm-backend triton",
        )
    if not bad and (not moe or parts == {"dense", "experts"}):
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
    if facts.plugin and facts.upstream.delta_leaves_tensors_out:
        yield deny(
            "--update-weight-mode delta leaves out tensors that did not change in this slime, scales among them; the "
            "engine would take the update for incomplete",
            "each FP8 weight with its scale in every update",
            "set --update-weight-mode full, or take slime v0.3.1, whose deltas lie on disk",
        )
    elif ue8m0_parts(facts) and facts.packs_at_source:
        found = "--update-weight-mode delta, and ue8m0 scales are packed into int32"
        yield deny(found, "full, or fp32 scales", "set --update-weight-mode full")
    else:
        yield allow("--update-weight-mode delta with fp32 scales", "scales as the checkpoint has them")


@rule("fp8.saved-scales", "a saved checkpoint must hold scales that can be read again", "an unreadable checkpoint")
def _saved_scales(facts: Facts) -> Iterator[Answer]:
    if not facts.save_hf or not ue8m0_parts(facts):
        return
    if facts.packs_at_source and facts.upstream.unpacks_saved_scales is False:
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
        yield allow(f"{found}; SGLang's update session ends with it", "processed after each update")
    else:
        unknown = "whether this SGLang has update sessions is not known"
        found += f"; {unknown}" if able is None else ", and nobody processes them after an update"
        answer = warn if able is None else deny
        yield answer(found, "processed after each update", _without_processing(facts))


_KERNELS = {"gemm": "--sglang-fp8-gemm-backend triton", "moe_runner": "--sglang-moe-runner-backend triton"}


def _without_processing(facts: Facts) -> str:
    """What to do where nothing processes weights: the fewest flags with which that is not needed, if there are."""
    sessions = "take SGLang with update sessions (begin_weight_update, 0.5.23) and --plugins fp8, which opens them"
    if facts.checkpoint.method != "fp8-block":
        return f"{sessions}; or a checkpoint in blocks of 128 x 128"
    for names in (("gemm",), ("moe_runner",), tuple(_KERNELS)):
        changes: dict[str, Any] = dict.fromkeys(names, "triton")
        other = replace(facts, engine=replace(facts.engine, **changes))
        if not needs_post_process(other):
            return f"set {' '.join(_KERNELS[name] for name in names)}; or {sessions}"
    return f"{sessions}; or a newer GPU"


def _layout(facts: Facts) -> str:
    if facts.checkpoint.method != "fp8-block":
        return facts.checkpoint.method
    if facts.model.experts and moe_runner(facts) not in ("triton", "cutlass", "deep_gemm"):
        return f"MoE runner {moe_runner(facts)}"
    return "DeepGEMM on Blackwell" if ue8m0_parts(facts) else f"GEMM backend {facts.engine.gemm}"
