"""The FP8 rules: each denies or warns where it should and not just beside it; blocks against a count by hand."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from miles_plugins.fp8_unified.chosen import TRAINED
from miles_plugins.fp8_unified.rules import (
    BLOCK,
    RULES,
    VERDICTS,
    Checkpoint,
    Decision,
    Engine,
    Facts,
    Model,
    Rule,
    Trainer,
    Upstream,
    deny,
    engine_matrices,
    judge,
    moe_runner,
    needs_post_process,
    rollout_scales,
    trainer_matrices,
    ue8m0_parts,
)
from miles_plugins.fp8_unified.rules.table import GARBAGE, NOT_MEASURED, REFUSED

VERBS = frozenset(
    "accept add change convert divide give install leave list make read run serve set take train use watch".split()
)
FLAG = """--train-env-vars '{"A": "1"}'"""
QWEN3_4B = Model(hidden=2560, layers=36, ffn=9728, heads=32, groups=8, head_dim=128)
QWEN3_30B = Model(hidden=2048, layers=48, heads=32, groups=4, head_dim=128, experts=128, moe_ffn=768)
DEEPSEEK = Model(
    hidden=7168,
    layers=61,
    ffn=18432,
    heads=128,
    groups=128,
    head_dim=56,
    q_rank=1536,
    kv_rank=512,
    nope=128,
    rope=64,
    value=128,
    experts=256,
    moe_ffn=2048,
    shared_ffn=2048,
)
BLOCKS = Checkpoint("fp8-block", "fp8", (128, 128), powers_of_two=False, kv_b_quantised=True, bf16_layers=frozenset())
UE8M0 = replace(BLOCKS, scale_fmt="ue8m0", powers_of_two=True)
KNOWN = Upstream(False, True, True, False)
MODULES = frozenset({"model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"})

# On Hopper, TransformerEngine's blocks on both sides, everything known.
UNIFIED = Facts(
    trainer=Trainer(
        mode="te",
        recipe="blockwise",
        fp32_scales="1",
        fp32_scales_from="slime's default",
        tp=2,
        capability=90,
        transformer_engine="2.10.0",
        cuda=(12, 9),
    ),
    model=QWEN3_4B,
    checkpoint=BLOCKS,
    engine=Engine(capability=90, version="0.5.15.post1", weight_session=False),
    upstream=KNOWN,
    selections={"checkpoint": MODULES, "weight update": MODULES, "engine": MODULES, "trainer": MODULES},
)


def change(facts: Facts, changes: dict[str, Any]) -> Facts:
    """With other values, by names such as `trainer.recipe`; a name without a dot is of Facts."""
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    whole: dict[str, Any] = {}
    for name, value in changes.items():
        part, dot, attribute = name.partition(".")
        if dot:
            parts[part][attribute] = value
        else:
            whole[part] = value
    facts = replace(facts, **whole)
    return replace(facts, **{part: replace(getattr(facts, part), **values) for part, values in parts.items()})


def said(facts: Facts, rule: str) -> list[str]:
    return [decision.verdict for decision in judge(facts) if decision.rule == rule]


def worst(facts: Facts, rules: Iterable[str] | None = None) -> str:
    found = {each.verdict for each in judge(facts) if rules is None or each.rule in rules}
    return next((verdict for verdict in VERDICTS if verdict in found), "allow")


# -- the table --------------------------------------------------------------------------------------------------------


def test_a_unified_run_is_allowed_without_a_word():
    decisions = judge(UNIFIED)
    assert {each.verdict for each in decisions} == {"allow"}
    assert len(decisions) > 8


def test_a_unified_mixture_is_allowed_when_aligned_and_replayed():
    facts = change(UNIFIED, {"trainer.mode": "aligned", "trainer.recipe": "none", "model": QWEN3_30B})
    assert worst(change(facts, {"routing_replay": True})) == "allow"


def test_ids_are_unique_and_every_rule_says_why_and_what_it_costs():
    assert len({rule.id for rule in RULES}) == len(RULES)
    assert all(rule.id.startswith("fp8.") and rule.reason and rule.cost for rule in RULES)


def test_a_run_without_fp8_is_not_bothered():
    facts = Facts(model=QWEN3_30B)
    assert {each.verdict for each in judge(facts)} == {"allow"}


MOE = {"model": QWEN3_30B}
B200 = {"engine.capability": 100, "trainer.capability": 100, "trainer.fp32_scales": "0", "engine.weight_session": True}
OFF = {"trainer.mode": "off", "trainer.recipe": "none"}
ALIGNED = {"trainer.mode": "aligned", "trainer.recipe": "none"}
NVFP4 = {"trainer.recipe": "nvfp4", "checkpoint": Checkpoint("nvfp4", "modelopt"), **B200}
VARIABLES = {"NVTE_NVFP4_DISABLE_2D_QUANTIZATION": "1", "NVTE_NVFP4_DISABLE_RHT": "1"}
GATHER = {"trainer.param_gather": True}
OFFLOAD = {**GATHER, "trainer.cpu_offload": True}
DEEPEP = {"engine.dispatcher": "deepep", "engine.moe_runner": "deep_gemm"}
PLUGIN = {"plugin": True}
DELTA = {"update_weight_mode": "delta"}
LEAVES_OUT = {"upstream.delta_leaves_tensors_out": True}
B200_ALIGNED = {**B200, **ALIGNED, **PLUGIN}
B200_UE8M0 = {**B200_ALIGNED, "checkpoint": UE8M0}
LATER = {"checkpoint": Checkpoint("fp8-tensor", "fp8")}

# rule, verdict, what is changed in UNIFIED so that it says so, and what so that it does not, just beside it.
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("fp8.train-mode", "deny", {"trainer.recipe": "none"}, OFF),
    ("fp8.train-mode", "deny", {"trainer.mode": "off"}, {}),
    ("fp8.train-mode", "deny", {"trainer.mode": "aligned"}, ALIGNED),
    ("fp8.recipe", "deny", {"checkpoint": Checkpoint()}, {**OFF, "checkpoint": Checkpoint()}),
    ("fp8.recipe", "deny", LATER, {**LATER, "trainer.recipe": "tensorwise"}),
    ("fp8.recipe", "deny", {"trainer.recipe": "mxfp8"}, {"trainer.recipe": "custom"}),
    ("fp8.recipe", "deny", {**ALIGNED, **LATER}, ALIGNED),
    ("fp8.recipe", "warn", OFF, {}),
    ("fp8.recipe", "warn", {**LATER, "trainer.recipe": "delayed"}, {"trainer.recipe": "blockwise"}),
    ("fp8.transformer-engine", "deny", {"trainer.transformer_engine": ""}, {"trainer.transformer_engine": None}),
    ("fp8.transformer-engine", "deny", {"trainer.transformer_engine": "2.2.0"}, {"trainer.transformer_engine": "2.3"}),
    ("fp8.transformer-engine", "deny", {"trainer.transformer_engine": "1.13"}, {"trainer.transformer_engine": "2.13"}),
    ("fp8.transformer-engine", "deny", {"trainer.cuda": (12, 8)}, {"trainer.cuda": (13, 0)}),
    (
        "fp8.transformer-engine",
        "deny",
        {"trainer.transformer_impl": "local"},
        {**ALIGNED, "trainer.transformer_impl": "local", "trainer.transformer_engine": ""},
    ),
    ("fp8.compute-capability", "deny", {"trainer.capability": 89}, {"trainer.capability": None}),
    ("fp8.compute-capability", "deny", {"trainer.recipe": "mxfp8"}, {"trainer.recipe": "mxfp8", **B200}),
    ("fp8.compute-capability", "deny", {"trainer.recipe": "nvfp4"}, {"trainer.recipe": "nvfp4", **B200}),
    (
        "fp8.compute-capability",
        "deny",
        {"checkpoint.method": "mxfp8", **OFF},
        {"checkpoint.method": "mxfp8", **OFF, "engine.capability": 100},
    ),
    (
        "fp8.compute-capability",
        "deny",
        {"engine.capability": 75},
        {"engine.capability": 75, "engine.device": "cpu"},
    ),
    ("fp8.compute-capability", "warn", {"engine.capability": 80}, {"engine.capability": 89}),
    (
        "fp8.scales-variable",
        "deny",
        {"trainer.fp32_scales_shell": "0", "upstream.hard_codes_scales": True},
        {"trainer.fp32_scales_shell": "1", "upstream.hard_codes_scales": True},
    ),
    (
        "fp8.scales-variable",
        "deny",
        {"trainer.fp32_scales_shell": "0", "trainer.fp32_scales_from": "--train-env-vars"},
        {"trainer.fp32_scales_shell": None, "trainer.fp32_scales_from": "--train-env-vars"},
    ),
    ("fp8.scales-variable", "deny", {"trainer.fp32_scales": "true"}, {"trainer.fp32_scales": None}),
    ("fp8.scales-variable", "deny", {"trainer.fp32_scales_imported": "0"}, {"trainer.fp32_scales_imported": "1"}),
    ("fp8.scale-kind", "deny", {"trainer.fp32_scales": "0"}, {}),
    ("fp8.scale-kind", "deny", {"trainer.fp32_scales": None}, {"trainer.fp32_scales": None, **ALIGNED}),
    ("fp8.scale-kind", "deny", {"checkpoint": UE8M0}, {"checkpoint": UE8M0, "trainer.fp32_scales": "0"}),
    ("fp8.scale-kind", "deny", {**B200, "trainer.fp32_scales": "1"}, B200),
    ("fp8.scale-kind", "deny", {**B200, "engine.gemm": "triton"}, {**B200, "engine.gemm": "deep_gemm"}),
    ("fp8.scale-kind", "deny", {**B200, **MOE}, {**B200, **MOE, **DEEPEP}),
    (
        "fp8.scale-kind",
        "deny",
        {**B200, **MOE, "engine.dispatcher": "none"},
        {**B200, **MOE, "checkpoint.kinds": frozenset({"attention"})},
    ),
    (
        "fp8.activation-scales",
        "deny",
        {"checkpoint": UE8M0, "trainer.fp32_scales": "0"},
        {**B200, "checkpoint": UE8M0},
    ),
    (
        "fp8.activation-scales",
        "deny",
        {"checkpoint": UE8M0, "trainer.fp32_scales": "0"},
        {"checkpoint": UE8M0, "trainer.fp32_scales": "0", **ALIGNED},
    ),
    ("fp8.scale-kind", "deny", B200_ALIGNED, B200_UE8M0),
    ("fp8.scale-kind", "deny", B200_ALIGNED, {**B200_ALIGNED, "engine.gemm": "triton"}),
    ("fp8.scale-kind", "deny", B200_ALIGNED, {**B200_ALIGNED, "engine.device": "cpu"}),
    ("fp8.scale-kind", "deny", B200_ALIGNED, {**ALIGNED, "checkpoint": UE8M0}),
    (
        "fp8.scale-kind",
        "deny",
        {**B200_ALIGNED, **MOE},
        {**B200_ALIGNED, **MOE, "checkpoint.kinds": frozenset({"experts"})},  # which do not run in DeepGEMM
    ),
    ("fp8.activation-scales", "deny", {**B200_UE8M0, "engine.gemm": "triton"}, B200_UE8M0),
    ("fp8.activation-scales", "deny", {**B200_UE8M0, **MOE}, {**B200_UE8M0, **MOE, **DEEPEP}),
    (
        "fp8.activation-scales",
        "deny",
        {**B200_UE8M0, "trainer.capability": 90},
        {**B200_UE8M0, "trainer.capability": 90, "engine.capability": 90},
    ),
    (
        "fp8.activation-scales",
        "deny",
        {**B200_UE8M0, "trainer.capability": 90},
        {**B200_UE8M0, "trainer.capability": 90, "engine.device": "cpu"},
    ),
    (
        "fp8.trainer-layers",
        "deny",
        {**ALIGNED, "trainer.other_layers": ("--fp16",)},
        {"trainer.other_layers": ("--fp16",)},
    ),
    (
        "fp8.trainer-layers",
        "deny",
        {**ALIGNED, "checkpoint.kinds": frozenset({"attention", "indexer"})},
        {**ALIGNED, "checkpoint.kinds": TRAINED},
    ),
    ("fp8.transformer-engine", "deny", {"embedded": True}, {"embedded": True, **ALIGNED}),
    ("fp8.emulated-blocks", "deny", {**B200, "trainer.fp32_scales": "1"}, B200),
    ("fp8.emulated-blocks", "warn", {**B200, **MOE}, B200),
    ("fp8.nvfp4-variables", "warn", NVFP4, {**NVFP4, "trainer.variables": VARIABLES}),
    ("fp8.trainer-blocks", "deny", {"trainer.tp": 8}, {"trainer.tp": 4}),
    ("fp8.trainer-blocks", "deny", {"model.head_dim": 64}, {"model.head_dim": 256}),
    ("fp8.trainer-blocks", "deny", {"model.groups": 3}, {"model.groups": 4}),
    ("fp8.trainer-blocks", "deny", {**MOE, "trainer.etp": 4}, {**MOE, "trainer.etp": 2, "trainer.tp": 4}),
    ("fp8.trainer-blocks", "deny", {"model.head_dim": 64}, {"model.head_dim": 64, **ALIGNED}),
    (
        "fp8.trainer-blocks",
        "deny",
        {"trainer.tp": 8},
        {"trainer.tp": 8, "checkpoint.kinds": frozenset({"attention"})},
    ),
    ("fp8.trainer-blocks", "deny", {**ALIGNED, "model.groups": 3}, {**OFF, "model.groups": 3}),
    ("fp8.trainer-blocks", "warn", {**ALIGNED, "trainer.tp": 8}, {**OFF, "trainer.tp": 8}),
    ("fp8.router-probabilities", "warn", {**MOE, "trainer.probabilities_before_fc2": True}, MOE),
    (
        "fp8.router-probabilities",
        "warn",
        {**MOE, "trainer.probabilities_before_fc2": True},
        {**MOE, "trainer.probabilities_before_fc2": True, **ALIGNED},
    ),
    ("fp8.param-gather", "deny", OFFLOAD, {**OFFLOAD, "trainer.recipe": "delayed"}),
    ("fp8.param-gather", "deny", {**GATHER, **ALIGNED}, ALIGNED),
    ("fp8.param-gather", "warn", GATHER, {**GATHER, "trainer.fp32_scales": "0"}),
    ("fp8.attention", "deny", {"trainer.fp8_attention": True}, {"trainer.fp8_attention": True, **ALIGNED}),
    ("fp8.attention", "warn", {"trainer.fp8_attention": True, "trainer.recipe": "delayed"}, {}),
    (
        "fp8.bf16-layers",
        "deny",
        {"trainer.first_bf16": 1, "trainer.last_bf16": 1},
        {"trainer.first_bf16": 1, "trainer.last_bf16": 1, "checkpoint.bf16_layers": frozenset({0, 35})},
    ),
    ("fp8.bf16-layers", "deny", {"checkpoint.bf16_layers": frozenset({0})}, {"trainer.first_bf16": 0}),
    ("fp8.bf16-layers", "deny", {"trainer.first_bf16": 1, "trainer.recipe": "delayed"}, {"trainer.recipe": "delayed"}),
    (
        "fp8.bf16-layers",
        "warn",
        {"trainer.first_bf16": 1, "checkpoint.bf16_layers": None},
        {"checkpoint.bf16_layers": None},
    ),
    ("fp8.routing", "warn", MOE, {**MOE, "routing_replay": True}),
    ("fp8.rollout-method", "deny", {"checkpoint": Checkpoint("unknown", "awq")}, {}),
    ("fp8.rollout-method", "deny", {"checkpoint": Checkpoint("fp8-channel", "compressed-tensors")}, LATER),
    ("fp8.rollout-method", "deny", {"checkpoint": Checkpoint("int4", "compressed-tensors")}, LATER),
    ("fp8.rollout-method", "deny", {"checkpoint.activation_scheme": "static"}, {}),
    ("fp8.rollout-method", "deny", {"checkpoint.fmt": "e5m2"}, {}),
    ("fp8.block-size", "deny", {"checkpoint.block": (64, 64)}, LATER),
    ("fp8.block-size", "deny", {"checkpoint.block": (128, 64)}, {}),
    (
        "fp8.online-quantization",
        "deny",
        {"checkpoint": Checkpoint(), "engine.quantization": "fp8"},
        {"engine.quantization": "fp8"},
    ),
    ("fp8.declared-scales", "deny", {"checkpoint.scale_fmt": "ue8m0"}, {"checkpoint": UE8M0}),
    ("fp8.declared-scales", "warn", {"checkpoint.powers_of_two": True}, {"checkpoint.powers_of_two": None}),
    ("fp8.zero-blocks", "deny", {"checkpoint.nan": "model.layers.0.mlp.up_proj.weight"}, {}),
    ("fp8.engine-blocks", "deny", {"engine.dense_tp": 8}, {"engine.dense_tp": 4}),
    ("fp8.engine-blocks", "deny", {**MOE, "engine.tp": 4}, {**MOE, "engine.tp": 4, "engine.ep": 2}),
    ("fp8.engine-blocks", "deny", {**MOE, "engine.tp": 4}, {**MOE, "engine.tp": 4, "engine.device": "cpu"}),
    (
        "fp8.engine-blocks",
        "deny",
        {"model.head_dim": 64, "engine.attention_tp": 8},
        {"model.head_dim": 64, "engine.attention_tp": 4},
    ),
    ("fp8.loaded-scales", "warn", B200, {**B200, "checkpoint": UE8M0}),
    ("fp8.loaded-scales", "warn", B200, {**B200, "engine.deepgemm": False}),
    (
        "fp8.latent-attention",
        "warn",
        {"model": DEEPSEEK},
        {"model": DEEPSEEK, "checkpoint.kv_b_quantised": False},
    ),
    ("fp8.latent-attention", "warn", {"model": DEEPSEEK, **ALIGNED}, {"model": DEEPSEEK, **OFF}),
    ("fp8.indexer", "warn", {"model.indexer": True}, {"model.indexer": True, "trainer.precision_file": True}),
    ("fp8.indexer", "warn", {"model.indexer": True}, {"model.indexer": True, **ALIGNED}),
    ("fp8.kv-cache", "warn", {"engine.kv_cache": "fp8_e4m3"}, {"engine.kv_cache": "bfloat16"}),
    (
        "fp8.conversion",
        "deny",
        {"megatron_to_hf_mode": "bridge"},
        {"megatron_to_hf_mode": "bridge", "checkpoint": Checkpoint(), **OFF},
    ),
    (
        "fp8.mtp-names",
        "deny",
        {"model.mtp_layers": 1, "upstream.mtp_names_agree": False},
        {"model.mtp_layers": 0, "upstream.mtp_names_agree": False},
    ),
    (
        "fp8.selection",
        "deny",
        {"selections": {"checkpoint": MODULES, "engine": MODULES - {"model.layers.0.mlp.up_proj"}}},
        {"selections": {"checkpoint": MODULES, "engine": MODULES}},
    ),
    (
        "fp8.selection",
        "deny",
        {"selections": {"checkpoint": MODULES, "trainer": MODULES | {"model.layers.0.mlp.down_proj"}}},
        {"selections": {"checkpoint": MODULES, "trainer": frozenset()}, **OFF},
    ),
    ("fp8.torn-layers", "deny", {"torn": frozenset({"model.layers.0.mlp.gate_up_proj"})}, {}),
    ("fp8.scale-packing", "deny", {**B200, **MOE}, {**B200, **MOE, **DEEPEP}),
    ("fp8.scale-packing", "deny", {**B200, **MOE}, {**B200, **MOE, **PLUGIN}),
    (
        "fp8.scale-packing",
        "deny",
        {**B200, **MOE, **DEEPEP, "engine.gemm": "triton"},
        {**B200, **MOE, "engine.gemm": "triton"},
    ),
    ("fp8.scale-packing", "deny", {**B200, "model.hidden": 2624}, {"model.hidden": 2624}),
    ("fp8.scale-packing", "deny", {**B200, "model.ffn": 9760}, {**B200, "model.ffn": 9728}),
    ("fp8.scale-packing", "deny", {**B200, "model.ffn": 9760}, {**B200, "model.ffn": 9760, **PLUGIN}),
    ("fp8.delta", "deny", {**B200, **DELTA}, DELTA),
    ("fp8.delta", "deny", {**B200, **DELTA}, {**B200, **DELTA, **PLUGIN}),
    ("fp8.delta", "deny", {**DELTA, **PLUGIN, **LEAVES_OUT}, {**DELTA, **LEAVES_OUT}),
    ("fp8.delta", "deny", {**DELTA, **PLUGIN, **LEAVES_OUT}, {**DELTA, **PLUGIN}),
    (
        "fp8.saved-scales",
        "deny",
        {**B200, "save_hf": True, "upstream.unpacks_saved_scales": False},
        {"save_hf": True, "upstream.unpacks_saved_scales": False},
    ),
    (
        "fp8.saved-scales",
        "deny",
        {**B200, "save_hf": True, "upstream.unpacks_saved_scales": False},
        {**B200, "save_hf": True, "upstream.unpacks_saved_scales": False, **PLUGIN},
    ),
    ("fp8.post-process", "deny", {**B200, **PLUGIN, "engine.weight_session": False}, {**B200, **PLUGIN}),
    (
        "fp8.post-process",
        "deny",
        {**B200, **PLUGIN, "engine.weight_session": False},
        {**B200, "engine.weight_session": False},
    ),
    (
        "fp8.post-process",
        "deny",
        {**MOE, "engine.moe_runner": "flashinfer_trtllm"},
        {**MOE, "engine.moe_runner": "flashinfer_trtllm", "engine.weight_session": True},
    ),
    (
        "fp8.post-process",
        "warn",
        {**MOE, "engine.moe_runner": "marlin", "engine.weight_session": None},
        {**MOE, "engine.weight_session": None},
    ),
    (
        "fp8.weight-check",
        "deny",
        {"check_weight_update_equal": True, "engine.version": "0.5.9"},
        {"check_weight_update_equal": True, "engine.version": "0.5.12.post1"},
    ),
    (
        "fp8.blind-metric",
        "warn",
        {"use_rollout_logprobs": True, "upstream.blind_metric": True},
        {"use_rollout_logprobs": True},
    ),
    ("fp8.not-visible", "warn", {"trainer.capability": None}, {"trainer.capability": None, **ALIGNED}),
    ("fp8.not-visible", "warn", {"engine.capability": None}, {"engine.capability": None, "engine.device": "cpu"}),
    ("fp8.not-visible", "warn", {"engine.config_file": True}, {}),
    ("fp8.not-visible", "warn", {"selections": {}}, {"selections": {}, **OFF, "checkpoint": Checkpoint()}),
    (
        "fp8.not-visible",
        "warn",
        {"upstream.hard_codes_scales": None},
        {"upstream.hard_codes_scales": None, "trainer.fp32_scales_from": "--train-env-vars"},
    ),
]


@pytest.mark.parametrize(("rule", "verdict", "broken", "beside"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_a_rule_speaks_where_it_should_and_not_beside(rule, verdict, broken, beside):
    assert verdict in said(change(UNIFIED, broken), rule)
    assert verdict not in said(change(UNIFIED, beside), rule)


def test_every_rule_has_such_a_case():
    assert {rule.id for rule in RULES} == {case[0] for case in CASES}


def test_every_decision_says_all_that_a_reader_needs():
    decisions = [each for _, _, *both in CASES for changes in both for each in judge(change(UNIFIED, changes))]
    reasons = {rule.id: rule.reason for rule in RULES}
    for each in decisions:
        assert each.found
        assert each.expected
        assert reasons[each.rule]
        assert each.verdict == "allow" or (each.next and each.cost)
        assert "\n" not in each.sentence
        assert not re.search(r"\.\.|\s\s|[,;:]\.|costs (the|wrong|not)|None", each.sentence), each.sentence
        assert not each.next or each.next.split()[0] in VERBS, each.next


def test_denials_come_first():
    verdicts = [each.verdict for each in judge(change(UNIFIED, {**B200, **MOE, "trainer.etp": 4}))]
    assert verdicts == sorted(verdicts, key=VERDICTS.index)
    assert set(verdicts) == set(VERDICTS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"verdict": "maybe"},
        {"found": ""},
        {"expected": ""},
        {"verdict": "deny", "next": ""},
        {"verdict": "warn", "cost": ""},
    ],
)
def test_a_decision_that_leaves_its_reader_alone_is_refused(wrong):
    whole = {"rule": "fp8.x", "verdict": "deny", "found": "a", "expected": "b", "cost": "c", "next": "d"}
    Decision(**whole)
    with pytest.raises(ValueError, match=r"fp8\.x"):
        Decision(**whole | wrong)


@pytest.mark.parametrize(
    ("cost", "next", "sentence"),
    [
        ("3.7 % of it", "use --plugins fp8,r3", "a; expected b. It costs 3.7 % of it. Use --plugins fp8,r3."),
        (NOT_MEASURED, "take it out", "a; expected b. What it costs was not measured. Take it out."),
        (REFUSED, f"set {FLAG}", f"a; expected b. The consequence: the run fails by itself, later. Set {FLAG}"),
        (GARBAGE, "do it", "a; expected b. The consequence: wrong weights, without an error. Do it."),
    ],
)
def test_a_decision_is_a_sentence(cost, next, sentence):
    assert Decision("fp8.x", "deny", "a", "b", cost, next).sentence == sentence
    assert Decision("fp8.x", "allow", "a", "b").sentence == "a; expected b."


def test_a_rule_hands_its_cost_on_unless_the_answer_has_one():
    rule = Rule("fp8.x", "because", "2 %", lambda facts: [deny("a", "b", "c"), deny("a", "b", "c", "3 %")])
    assert [each.cost for each in rule.decide(UNIFIED)] == ["2 %", "3 %"]


# -- the matrix: recipe x rollout x variable x capability -------------------------------------------------------------

ROLLOUTS = {
    "bf16": Checkpoint(),
    "fp8": BLOCKS,
    "fp8-ue8m0": UE8M0,
    "fp8-tensor": Checkpoint("fp8-tensor", "fp8"),
    "mxfp8": Checkpoint("mxfp8", "mxfp8", (1, 32)),
    "nvfp4": Checkpoint("nvfp4", "modelopt"),
}
RECIPES = ("none", "blockwise", "mxfp8", "nvfp4")
VARIABLE_VALUES = ("0", "1", None)
CAPABILITIES = (90, 100)
# (recipe, rollout, capability) -> the verdict for the variable 0, 1, unset. Whatever is not here is denied.
EXPECTED = {
    ("none", "bf16", 90): ("allow", "allow", "allow"),
    ("none", "bf16", 100): ("allow", "allow", "allow"),
    ("none", "fp8", 90): ("warn", "warn", "warn"),
    ("none", "fp8", 100): ("warn", "warn", "warn"),
    ("none", "fp8-ue8m0", 90): ("warn", "warn", "warn"),
    ("none", "fp8-ue8m0", 100): ("warn", "warn", "warn"),
    ("none", "fp8-tensor", 90): ("warn", "warn", "warn"),
    ("none", "fp8-tensor", 100): ("warn", "warn", "warn"),
    ("none", "mxfp8", 100): ("warn", "warn", "warn"),
    ("none", "nvfp4", 100): ("warn", "warn", "warn"),
    ("blockwise", "fp8", 90): ("deny", "allow", "deny"),
    ("blockwise", "fp8", 100): ("warn", "deny", "warn"),  # quantised a second time when it is loaded
    ("blockwise", "fp8-ue8m0", 100): ("allow", "deny", "allow"),
    ("mxfp8", "mxfp8", 100): ("allow", "allow", "allow"),
    ("nvfp4", "nvfp4", 100): ("allow", "allow", "allow"),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_matrix(recipe, rollout, capability):
    expected = EXPECTED.get((recipe, rollout, capability), ("deny", "deny", "deny"))
    base = change(
        UNIFIED,
        {
            "trainer.mode": "off" if recipe == "none" else "te",
            "trainer.recipe": recipe,
            "trainer.capability": capability,
            "trainer.variables": VARIABLES,
            "checkpoint": ROLLOUTS[rollout],
            "engine.capability": capability,
            "engine.weight_session": True,
        },
    )
    for value, verdict in zip(VARIABLE_VALUES, expected, strict=True):
        facts = change(base, {"trainer.fp32_scales": value})
        assert worst(facts) == verdict, [each for each in judge(facts) if each.verdict != "allow"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("value", VARIABLE_VALUES)
@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_the_aligned_forward_asks_for_blocks_and_for_no_variable(rollout, value, capability):
    facts = change(UNIFIED, {**ALIGNED, "trainer.fp32_scales": value, "checkpoint": ROLLOUTS[rollout]})
    both = {"engine.capability": capability, "trainer.capability": capability, "engine.weight_session": True}
    fits = rollout == "fp8-ue8m0" or (rollout == "fp8" and capability == 90)
    assert worst(change(facts, {**both, **PLUGIN})) == ("allow" if fits else "deny")


# -- messages ---------------------------------------------------------------------------------------------------------


def only(facts: Facts, rule: str, verdict: str) -> Decision:
    found = [each for each in judge(facts) if (each.rule, each.verdict) == (rule, verdict)]
    assert len(found) == 1, found
    return found[0]


def test_a_shard_that_does_not_fit_is_named_with_its_size_and_the_fix():
    denied = [each for each in judge(change(UNIFIED, {"trainer.tp": 8})) if each.verdict == "deny"]
    assert [each.found for each in denied] == [
        "mlp.linear_fc1.weight: ffn_hidden_size 9728 / 8 = 1216, 9.5 blocks of 128 (--tensor-model-parallel-size 8)",
        "mlp.linear_fc2.weight: ffn_hidden_size 9728 / 8 = 1216, 9.5 blocks of 128 (--tensor-model-parallel-size 8)",
    ]
    assert all("--tensor-model-parallel-size 4" in each.next and "2.9 %" in each.cost for each in denied)


@pytest.mark.parametrize("mode", [OFF, ALIGNED])
def test_a_head_of_64_is_gathered_first_where_the_trainer_has_no_blocks_of_its_own(mode):
    allowed = only(change(UNIFIED, {"model.head_dim": 64, **mode}), "fp8.trainer-blocks", "allow")
    assert "gather first" in allowed.found
    assert "head_dim 64" in allowed.found


def test_an_engine_is_told_by_how_many_to_divide_the_experts():
    facts = change(UNIFIED, {**MOE, "engine.tp": 8, "engine.attention_tp": 4})
    denied = [each for each in judge(facts) if each.rule == "fp8.engine-blocks"]
    assert all("moe_intermediate_size 768 / 8 = 96, 0.75 blocks" in each.found for each in denied)
    assert all("--sglang-ep-size 4" in each.next for each in denied)  # 768 / 2 = 384
    fixed = change(facts, {"engine.ep": 4})
    assert worst(fixed, ["fp8.engine-blocks"]) == "allow"


def test_a_scale_of_the_other_kind_names_both_sides_and_who_set_it():
    denied = only(change(UNIFIED, {"trainer.fp32_scales": "0"}), "fp8.scale-kind", "deny")
    assert denied.found == (
        "dense layers: trainer pow2 (from slime's default), rollout fp32 (the checkpoint's scale_fmt: none)"
    )
    assert '"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"' in denied.next
    assert "3.7 %" in denied.cost


@pytest.mark.parametrize(("scales", "cost"), [("1", "1.2 %"), ("0", "3.8 %"), (None, "3.8 %")])
def test_folded_probabilities_cost_more_with_powers_of_two(scales, cost):
    facts = change(UNIFIED, {**MOE, "trainer.probabilities_before_fc2": True, "trainer.fp32_scales": scales})
    assert cost in only(facts, "fp8.router-probabilities", "warn").cost


@pytest.mark.parametrize(
    ("changes", "offered"),
    [
        ({"trainer.fp32_scales": "0"}, True),
        ({"checkpoint": UE8M0, "trainer.fp32_scales": "1"}, True),
        ({**B200, "trainer.fp32_scales": "1"}, False),  # the engine would quantise the fp32-scaled weights again
        ({**B200, "trainer.fp32_scales": "1", "checkpoint": UE8M0}, True),
        ({**B200, "engine.gemm": "triton"}, True),
    ],
)
def test_aligned_is_offered_only_where_it_is_allowed(changes, offered):
    facts = change(UNIFIED, changes)
    assert ("aligned" in only(facts, "fp8.scale-kind", "deny").next) is offered
    kinds = ("fp8.scale-kind", "fp8.activation-scales")
    assert (worst(change(facts, ALIGNED), kinds) == "allow") is offered


def test_scales_that_are_quantised_again_say_until_when():
    assert "until the first weight update" in only(change(UNIFIED, B200), "fp8.loaded-scales", "warn").cost
    ours = only(change(UNIFIED, {**B200, **PLUGIN}), "fp8.loaded-scales", "warn")
    assert "after every weight update" in ours.cost


def test_the_embedded_host_does_not_blame_a_flag_that_nobody_gave():
    changes = {"trainer.recipe": "none", "trainer.transformer_impl": "local", "embedded": True}
    denied = [each for each in judge(change(UNIFIED, changes)) if each.verdict == "deny"]
    assert [each.rule for each in denied] == ["fp8.transformer-engine"]
    assert "--transformer-impl" not in denied[0].sentence
    assert denied[0].next == "use --fp8-train aligned, or run under slime"


@pytest.mark.parametrize(
    ("changes", "next"),
    [
        (B200_ALIGNED, "set --sglang-fp8-gemm-backend triton; or take SGLang"),
        ({**MOE, "engine.moe_runner": "marlin"}, "set --sglang-moe-runner-backend triton; or take SGLang"),
        (
            {**B200_ALIGNED, **MOE},
            "set --sglang-fp8-gemm-backend triton --sglang-moe-runner-backend triton; or take SGLang",
        ),
        ({"engine.capability": 80}, "take SGLang with update sessions"),
        ({"checkpoint": Checkpoint("mxfp8", "mxfp8")}, "take SGLang with update sessions"),
    ],
)
def test_a_kernel_that_nobody_gives_its_weights_is_named_with_one_that_takes_them(changes, next):
    denied = only(change(UNIFIED, {**changes, "engine.weight_session": False}), "fp8.post-process", "deny")
    assert denied.next.startswith(next)


def test_selections_that_differ_are_printed():
    engine = MODULES - {"model.layers.0.mlp.up_proj"} | {"model.layers.0.mlp.down_proj"}
    facts = change(UNIFIED, {"selections": {"checkpoint": MODULES, "engine": engine}})
    found = only(facts, "fp8.selection", "deny").found
    assert found == ("only in checkpoint: model.layers.0.mlp.up_proj; only in engine: model.layers.0.mlp.down_proj")


def test_layers_in_bfloat16_are_named_on_both_sides():
    facts = change(UNIFIED, {"trainer.first_bf16": 1, "trainer.last_bf16": 2, "checkpoint.bf16_layers": frozenset({0})})
    found = only(facts, "fp8.bf16-layers", "deny").found
    assert found == "bfloat16 in the trainer: layers 0, 34, 35; in the checkpoint: layers 0"


def test_what_cannot_be_seen_is_listed_once():
    facts = change(UNIFIED, {"trainer.capability": None, "engine.capability": None, "trainer.transformer_engine": None})
    found = only(facts, "fp8.not-visible", "warn").found
    assert found == "not known: the trainer's GPU, the engine's GPU, TransformerEngine's version"


# -- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"engine.gemm": "deep_gemm"}, False),
        ({"engine.gemm": "triton"}, False),
        ({"engine.gemm": "cutlass"}, False),
        ({**MOE, "engine.moe_runner": "triton"}, False),
        ({**MOE, "engine.moe_runner": "cutlass"}, False),
        ({**MOE, **DEEPEP}, False),
        ({**MOE, "engine.moe_runner": "flashinfer_trtllm"}, True),
        ({**MOE, "engine.moe_runner": "flashinfer_trtllm_routed"}, True),
        ({**MOE, "engine.moe_runner": "marlin"}, True),
        ({"engine.moe_runner": "marlin"}, False),  # a dense model has no experts to run
        ({**MOE, "engine.moe_runner": "marlin", "checkpoint.kinds": frozenset({"attention"})}, False),
        ({"engine.gemm": "flashinfer_trtllm"}, True),
        ({"engine.capability": 80}, True),
        (B200, False),  # slime packs
        ({**B200, **PLUGIN}, True),
        ({**B200, **PLUGIN, "engine.deepgemm": False}, False),
        ({**B200, **PLUGIN, "engine.gemm": "triton"}, False),
        ({**MOE, **B200}, True),
        ({"checkpoint": Checkpoint("mxfp8", "mxfp8")}, True),
        ({"checkpoint": Checkpoint("nvfp4", "modelopt")}, True),
        ({"checkpoint": Checkpoint("fp8-tensor", "fp8")}, True),
        ({"checkpoint": Checkpoint("mxfp8", "mxfp8"), "engine.device": "cpu"}, False),
        ({"checkpoint": Checkpoint()}, False),
    ],
)
def test_after_an_update_the_engine_processes_weights_only_where_it_must(changes, needed):
    assert needs_post_process(change(UNIFIED, changes)) is needed


@pytest.mark.parametrize(
    ("changes", "runner", "parts"),
    [
        ({}, "triton", set()),
        ({"engine.dispatcher": "deepep"}, "deep_gemm", set()),
        ({"engine.dispatcher": "deepep", "engine.deepgemm": False}, "triton", set()),
        ({"engine.capability": 100}, "flashinfer_trtllm", {"dense"}),
        ({"engine.capability": 100, "engine.dispatcher": "deepep"}, "deep_gemm", {"dense", "experts"}),
        (
            {"engine.capability": 100, "engine.dispatcher": "mooncake", "engine.gemm": "triton"},
            "deep_gemm",
            {"experts"},
        ),
        ({"engine.capability": 120}, "triton", set()),
        ({"engine.capability": None}, "triton", set()),
        ({"checkpoint.method": "mxfp8"}, "flashinfer_trtllm", set()),
    ],
)
def test_which_kernels_an_engine_takes(changes, runner, parts):
    facts = change(UNIFIED, {**MOE, **changes})
    assert moe_runner(facts) == runner
    assert ue8m0_parts(facts) == parts
    assert [rollout_scales(facts, each) for each in ("dense", "experts")] == [
        "pow2" if each in parts else "fp32" for each in ("dense", "experts")
    ]


# -- blocks, counted --------------------------------------------------------------------------------------------------

Row = tuple[str, int]


def tiles(rows: list[Hashable]) -> set[frozenset[Hashable]]:
    """Which rows (or columns) share a scale, when a tensor with these rows is quantised in blocks."""
    return {frozenset(rows[first : first + BLOCK]) for first in range(0, len(rows), BLOCK)}


def of_checkpoint(tensors: dict[str, int]) -> set[frozenset[Hashable]]:
    return set().union(*(tiles([(name, row) for row in range(size)]) for name, size in tensors.items()))


def of_trainer(shards: Iterable[list[Hashable]]) -> set[frozenset[Hashable]]:
    return set().union(*(tiles(shard) for shard in shards))


def part(name: str, size: int, rank: int, ranks: int) -> list[Hashable]:
    each = size // ranks
    return [(name, row) for row in range(rank * each, (rank + 1) * each)]


def rule_says(model: Model, trainer: Trainer, name: str) -> bool:
    matrix = next(each for each in trainer_matrices(model, trainer) if each.name == name)
    return not matrix.misfits()


RANKS = st.sampled_from([1, 2, 4, 8])


@settings(deadline=None)
@given(ffn=st.integers(1, 40).map(lambda n: 64 * n), ranks=RANKS)
def test_gate_and_up_share_scales_exactly_as_the_rule_says(ffn, ranks):
    assume(ffn % ranks == 0)
    shards = [[*part("gate", ffn, rank, ranks), *part("up", ffn, rank, ranks)] for rank in range(ranks)]
    same = of_trainer(shards) == of_checkpoint({"gate": ffn, "up": ffn})
    assert rule_says(Model(hidden=256, ffn=ffn), Trainer(tp=ranks), "mlp.linear_fc1.weight") is same


@settings(deadline=None)
@given(size=st.integers(1, 80).map(lambda n: 32 * n), ranks=RANKS)
def test_divided_columns_share_scales_exactly_as_the_rule_says(size, ranks):
    assume(size % ranks == 0)
    same = of_trainer(part("down", size, rank, ranks) for rank in range(ranks)) == of_checkpoint({"down": size})
    model = Model(hidden=256, experts=8, moe_ffn=size)
    assert rule_says(model, Trainer(tp=1, etp=ranks), "mlp.experts.linear_fc2.weight*") is same


@settings(deadline=None)
@given(
    head=st.sampled_from([32, 64, 80, 96, 128, 192, 256]),
    groups=st.integers(1, 8),
    queries=st.integers(1, 5),
    ranks=RANKS,
)
def test_heads_share_scales_exactly_as_the_rule_says(head, groups, queries, ranks):
    assume(groups % ranks == 0)

    def group(number: int) -> list[Hashable]:  # Megatron's order: its queries, its key, its value
        rows = part("q", groups * queries * head, number, groups)
        return [*rows, *part("k", groups * head, number, groups), *part("v", groups * head, number, groups)]

    each = groups // ranks
    shards = [[row for g in range(rank * each, (rank + 1) * each) for row in group(g)] for rank in range(ranks)]
    same = of_trainer(shards) == of_checkpoint({"q": groups * queries * head, "k": groups * head, "v": groups * head})
    model = Model(hidden=256, heads=groups * queries, groups=groups, head_dim=head)
    assert rule_says(model, Trainer(tp=ranks), "self_attention.linear_qkv.weight") is same


@settings(deadline=None)
@given(heads=st.sampled_from([8, 16, 32]), nope=st.sampled_from([32, 64, 128, 192]), ranks=RANKS)
def test_latent_attention_shares_scales_exactly_as_the_rule_says(heads, nope, ranks):
    model = Model(hidden=256, heads=heads, kv_rank=512, q_rank=256, nope=nope, rope=64, value=nope)
    for name, size in (("linear_q_up_proj", heads * (nope + 64)), ("linear_kv_up_proj", heads * 2 * nope)):
        same = of_trainer(part("w", size, rank, ranks) for rank in range(ranks)) == of_checkpoint({"w": size})
        assert rule_says(model, Trainer(tp=ranks), f"self_attention.{name}.weight") is same


@pytest.mark.parametrize(("ranks", "fits"), [(1, True), (2, True), (4, True), (8, False)])
def test_qwen3_4b_can_be_divided_by_4_and_not_by_8(ranks, fits):
    assert (worst(change(UNIFIED, {"trainer.tp": ranks}), ["fp8.trainer-blocks"]) == "allow") is fits


@pytest.mark.parametrize(
    ("head", "fits"), [(64, False), (80, False), (96, False), (128, True), (192, False), (256, True)]
)
def test_heads_must_be_whole_blocks(head, fits):
    assert (worst(change(UNIFIED, {"model.head_dim": head}), ["fp8.trainer-blocks"]) == "allow") is fits


def test_a_whole_tail_is_padded_alike_and_no_misfit():
    model = replace(QWEN3_4B, hidden=2500)  # no multiple of anything
    assert not any(matrix.misfits() for matrix in trainer_matrices(model, Trainer(tp=4)))
    assert not any(matrix.misfits() for matrix in engine_matrices(model, Engine(tp=4, attention_tp=4, dense_tp=4)))


def test_down_projections_of_latent_attention_are_whole_on_every_rank():
    names = {matrix.name for matrix in trainer_matrices(DEEPSEEK, Trainer(tp=8))}
    assert not any("down_proj" in name for name in names)
    assert not any(matrix.misfits() for matrix in trainer_matrices(DEEPSEEK, Trainer(tp=8)))
    assert not any(matrix.misfits() for matrix in trainer_matrices(replace(DEEPSEEK, q_rank=0), Trainer(tp=8)))


@settings(deadline=None)
@given(
    size=st.integers(1, 80).map(lambda n: 32 * n),
    ranks=RANKS,
    groups=st.sampled_from([1, 2, 4, 8]),
    head=st.sampled_from([64, 128]),
)
def test_the_engine_refuses_what_sglang_refuses(size, ranks, groups, head):
    """SGLang's own condition (Fp8LinearMethod.validate_block_quant_shapes), written down once more."""
    assume(size % ranks == 0)
    model = Model(hidden=256, ffn=size, heads=8, groups=groups, head_dim=head)
    engine = Engine(tp=ranks, attention_tp=ranks, dense_tp=ranks)

    def refused(inputs: int, each_input: int, outputs: int, parts: list[int]) -> bool:
        if ranks > 1 and inputs // each_input == ranks and each_input % BLOCK:
            return True
        fused = (ranks > 1 and outputs // sum(parts) == ranks) or len(parts) > 1
        return fused and any(each % BLOCK for each in parts)

    key = max(1, groups // ranks) * head
    expected = {
        "mlp.gate_up_proj": refused(256, 256, 2 * size, [size // ranks] * 2),
        "mlp.down_proj": refused(size, size // ranks, 256, [256]),
        "self_attn.qkv_proj": refused(256, 256, ranks * (8 * head // ranks + 2 * key), [8 * head // ranks, key, key]),
        "self_attn.o_proj": refused(8 * head, 8 * head // ranks, 256, [256]),
    }
    assert {each.name: bool(each.misfits()) for each in engine_matrices(model, engine)} == expected


def test_deepseek_on_the_usual_machines():
    engine = Engine(tp=8, ep=8, attention_tp=8, dense_tp=8)
    assert not any(matrix.misfits() for matrix in engine_matrices(DEEPSEEK, engine))
    wide = Engine(tp=32, ep=1, attention_tp=32, dense_tp=32)
    assert {matrix.kind for matrix in engine_matrices(DEEPSEEK, wide) if matrix.misfits()} == {
        "mlp",
        "experts",
        "shared-experts",
    }
