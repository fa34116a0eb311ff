"""Which weights are FP8, for each family of models, and that a list that drifts by one entry is found."""

from __future__ import annotations

import ast
import typing
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins.fp8_unified.selection import (
    FUSED,
    Difference,
    Kept,
    Matching,
    compare,
    grouped,
    in_engine,
    is_fp8,
    kind,
    names_to_leave_out,
    selected,
)

LAYERS = 3  # of every model here, and layer 3 is its MTP layer where it is numbered on
GQA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLA = (
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
)
INDEXER = ("self_attn.indexer.wq_b", "self_attn.indexer.wk")
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = tuple(f"mlp.experts.{i}.{name}" for i in (0, 1, 10) for name in ("gate_proj", "up_proj", "down_proj"))
MIXTRAL = tuple(f"block_sparse_moe.experts.{i}.{name}" for i in (0, 1) for name in ("w1", "w2", "w3"))
SHARED = tuple(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down"))
QWEN_SHARED = tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))
LINEAR = tuple(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj"))
NEXT = tuple(f"linear_attn.{name}" for name in ("in_proj_qkvz", "out_proj"))
DECAY = ("linear_attn.in_proj_a", "linear_attn.in_proj_b")
ROUTER = ("mlp.gate",)
ENDS = ("model.embed_tokens", "lm_head")
MTP = ("eh_proj", "shared_head.head", "embed_tokens")

Layer = dict[bool, tuple[str, ...]]
"""FP8 or not -> names in a layer."""


def model(layers: list[Layer], root: str = "model.", **others: Layer) -> Layer:
    """The matrices of a model: its layers, the ends, and other modules by their prefix."""
    found: dict[bool, list[str]] = {True: [], False: [*ENDS]}
    for number, layer in enumerate(layers):
        for fp8, names in layer.items():
            found[fp8] += [f"{root}layers.{number}.{name}" for name in names]
    for prefix, layer in others.items():
        for fp8, names in layer.items():
            found[fp8] += [f"{prefix}{name}" for name in names]
    return {fp8: tuple(names) for fp8, names in found.items()}


SENSES: Layer = {False: ("blocks.0.attn.qkv", "blocks.0.mlp.gate_proj", "blocks.0.self_attn.q_proj", "merger.mlp.0")}
FAMILIES: dict[str, Layer] = {
    "qwen3": model([{True: (*GQA, *DENSE)}] * 3),
    "qwen3_moe": model([{True: (*GQA, *EXPERTS), False: ROUTER}] * 3),
    "qwen2_moe": model([{True: (*GQA, *EXPERTS, *QWEN_SHARED), False: (*ROUTER, "mlp.shared_expert_gate")}] * 3),
    "mixtral": model([{True: (*GQA, *MIXTRAL), False: ("block_sparse_moe.gate",)}] * 3),
    "glm4_moe": model(
        [
            {True: (*GQA, *DENSE)},
            *[{True: (*GQA, *EXPERTS, *SHARED), False: ROUTER}] * 2,
            {True: (*GQA, *EXPERTS, *SHARED), False: (*ROUTER, *MTP)},
        ]
    ),
    "deepseek_v3": model(
        [
            {True: (*MLA, *DENSE)},
            *[{True: (*MLA, *EXPERTS, *SHARED), False: ROUTER}] * 2,
            {True: (*MLA, *EXPERTS, *SHARED), False: (*ROUTER, *MTP)},
        ]
    ),
    "deepseek_v2_lite": model(
        [{True: ("self_attn.q_proj", *MLA[2:], *EXPERTS, *SHARED), False: ROUTER}] * 3  # no q_a_proj
    ),
    "deepseek_v32": model(
        [{True: (*MLA, *INDEXER, *DENSE), False: ("self_attn.indexer.weights_proj",)}]
        + [{True: (*MLA, *INDEXER, *EXPERTS, *SHARED), False: (*ROUTER, "self_attn.indexer.weights_proj")}] * 2
    ),
    "qwen3_next": model(
        [{True: (*NEXT, *EXPERTS), False: ("linear_attn.in_proj_ba", *ROUTER)}] * 2 + [{True: (*GQA, *EXPERTS)}],
        **{"mtp.": {True: tuple(f"layers.0.{name}" for name in (*GQA, *EXPERTS)), False: ("fc", "layers.0.mlp.gate")}},
    ),
    "qwen3_5": model(
        [{True: (*LINEAR, *DENSE), False: DECAY}] * 2 + [{True: (*GQA, *DENSE)}],
        "model.language_model.",
        **{"model.visual.": SENSES, "mtp.": {True: tuple(f"layers.0.{name}" for name in (*GQA, *DENSE))}},
    ),
    "kimi_k25": model(
        [{True: (*MLA, *EXPERTS, *SHARED), False: ROUTER}] * 3,
        "language_model.model.",
        **{"vision_tower.": SENSES, "mm_projector.": {False: ("proj.0",)}},
    ),
}
everything = pytest.mark.parametrize("family", FAMILIES)
KEEPS = [Kept(LAYERS), Kept(LAYERS, at_start=1), Kept(LAYERS, at_end=1), Kept(LAYERS, 1, 2)]


def modules(family: str) -> frozenset[str]:
    return frozenset(name for names in FAMILIES[family].values() for name in names)


# -- the list ---------------------------------------------------------------------------------------------------------


@everything
def test_what_is_fp8(family: str) -> None:
    assert selected(modules(family)) == frozenset(FAMILIES[family][True])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp.experts.7.w2", "experts"),
        ("mlp.shared_expert.up_proj", "shared-experts"),
        ("mlp.up_proj", "mlp"),
        ("self_attn.kv_b_proj", "attention"),
        ("self_attn.indexer.wk", "indexer"),
        ("linear_attn.out_proj", "linear-attention"),
        *[
            (name, None)
            for name in (
                "mlp.experts.up_proj",  # stacked
                "mlp.gate",
                "mlp.shared_expert_gate",
                "mlp.gate.e_score_correction_bias",
                "self_attn.q_norm",
                "self_attn.q_a_layernorm",
                "self_attn.q_proj.bias",
                "self_attn.indexer.weights_proj",
                "self_attn.indexer.k_norm",
                "linear_attn.conv1d",
                "linear_attn.in_proj_a",
                "linear_attn.in_proj_ba",
                "linear_attn.A_log",
                "eh_proj",
                "shared_head.head",
                "input_layernorm",
            )
        ],
    ],
)
@pytest.mark.parametrize(
    "layer", ["model.layers.3.", "mtp.layers.0.", "model.mtp_layers.0.", "language_model.layers.3."]
)
def test_kinds(layer: str, name: str, expected: str | None) -> None:
    """In an MTP layer likewise, whatever a model calls it."""
    assert kind(layer + name) == expected
    assert is_fp8(layer + name) == (expected is not None)


@pytest.mark.parametrize("tower", ["visual", "model.visual", "vision_tower", "vision_model", "audio_tower"])
def test_what_a_model_sees_with_is_never_fp8(tower: str) -> None:
    assert not [name for name in (*GQA, *DENSE, *EXPERTS) if is_fp8(f"{tower}.layers.0.{name}")]


def test_kept_layers() -> None:
    """As Megatron counts them: an MTP layer is none of the last ones."""
    kept = Kept(LAYERS, 1, 1)
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(4)] + ["mtp.layers.0.mlp.up_proj"]
    assert selected(names, kept) == {names[1], names[3], names[4]}
    assert selected(names, Kept(LAYERS, 2, 2)) == {names[3], names[4]}
    assert "model.layers.10.mlp.up_proj" not in Kept(12, 1, 1)
    assert "lm_head" not in Kept(LAYERS, 3, 3)  # not in any layer; and never FP8


# -- SGLang's list ----------------------------------------------------------------------------------------------------


@everything
@pytest.mark.parametrize("kept", KEEPS, ids=lambda kept: f"{kept.at_start}-{kept.at_end}")
def test_all_lists_agree(family: str, kept: Kept) -> None:
    """The converter's, and SGLang's with what the converter writes into config.json."""
    fp8 = selected(modules(family), kept)
    left = names_to_leave_out(modules(family), fp8)
    assert not fp8 & {*left}
    assert list(left) == sorted({*left, "lm_head"})
    newer, older = in_engine(modules(family), left), in_engine(modules(family), left, "substring")
    assert compare({"converter": fp8, "SGLang": newer.fp8}) == []
    assert newer.torn == frozenset()
    kept_experts = {module for module in selected(modules(family)) - fp8 if kind(module) == "experts"}
    assert older.fp8 - fp8 == kept_experts  # that 0.5.9 cannot leave out
    assert fp8 <= older.fp8


def test_only_linear_layers_are_named() -> None:
    left = names_to_leave_out(modules("qwen3_moe"), selected(modules("qwen3_moe")))
    assert left == ("lm_head", *(f"model.layers.{number}.mlp.gate" for number in range(3)))
    left = names_to_leave_out(modules("qwen3_5"), selected(modules("qwen3_5")))
    assert "visual" in left  # SGLang's names in it are others
    assert "model.language_model.layers.0.linear_attn.in_proj_ba" in left  # SGLang's of both


def test_a_router_is_not_named_where_it_would_take_out_an_mlp() -> None:
    """`mlp.gate` is in `mlp.gate_up_proj`: where a layer has both, SGLang 0.5.9 would serve the MLP in BF16."""
    names = [f"model.layers.0.{name}" for name in (*DENSE, *EXPERTS, "mlp.gate")]
    assert in_engine(names, ["model.layers.0.mlp.gate"], "substring").fp8 == {
        name for name in names if "experts" in name
    } | {"model.layers.0.mlp.down_proj"}
    left = names_to_leave_out(names, selected(names))
    assert left == ("lm_head",)
    for matching in ("substring", "module path"):
        assert in_engine(names, left, matching).fp8 == selected(names)


def test_a_layer_is_not_another_whose_number_begins_so() -> None:
    names = [f"model.layers.{number}.{name}" for number in (1, 10, 11) for name in (*GQA, *DENSE)]
    fp8 = frozenset(name for name in names if ".1." not in name)
    for matching in ("substring", "module path"):
        assert in_engine(names, names_to_leave_out(names, fp8), matching).fp8 == fp8
    assert in_engine(names, ["model.layers.1."]).fp8 == fp8
    assert in_engine(names, ["model.layers.1"], "substring").fp8 == frozenset()


@pytest.mark.parametrize("entry", ["mlp.experts", "experts.1.up_proj", "layers.0.mlp", "model.layers.0"])
def test_one_entry_takes_all_experts_of_a_layer_out(entry: str) -> None:
    names = [f"model.layers.0.{name}" for name in EXPERTS]
    entry = f"model.layers.0.mlp.{entry}" if entry.startswith("experts") else entry
    assert in_engine(names, [entry]).fp8 == frozenset()
    assert in_engine(names, [entry], "substring").fp8 == frozenset(names)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_may_begin_without_model(prefix: str) -> None:
    names = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert in_engine(names, [f"{prefix}layers.0.self_attn.o_proj"]).fp8 == {names[1]}


# -- drift ------------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_one_entry_too_many_is_found(data: st.DataObject) -> None:
    """Of SGLang's list: with the names of all that goes with it."""
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    fp8 = selected(modules(family))
    entry = data.draw(st.sampled_from(sorted(fp8)))
    left = names_to_leave_out(modules(family), fp8)
    drifted = in_engine(modules(family), [*left, entry])
    found = compare({"checkpoint": fp8, "SGLang": drifted.fp8})
    missing = {each.module for each in found}
    assert entry in missing
    assert {(each.by, each.not_by) for each in found} == {(("checkpoint",), ("SGLang",))}
    above = entry.rpartition(".")[0]
    if kind(entry) == "experts":
        experts = above.rpartition(".")[0]
        assert missing == {name for name in fp8 if name.startswith(f"{experts}.")}
    elif parts := next((parts for parts in FUSED.values() if entry.rpartition(".")[2] in parts), None):
        whole = {f"{above}.{part}" for part in parts} & modules(family)
        assert missing == whole
        assert len(drifted.torn) == (len(whole) > 1)  # SGLang refuses to start
    else:
        assert missing == {entry}


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_one_entry_too_few_is_found(data: st.DataObject) -> None:
    """A layer kept in BF16 whose entry is lost: SGLang casts the weight to FP8, and nothing is raised."""
    family, kept = data.draw(st.sampled_from(sorted(FAMILIES))), Kept(LAYERS, 1, 0)
    fp8 = selected(modules(family), kept)
    left = names_to_leave_out(modules(family), fp8)
    candidates = [name for name in left if name in modules(family) and kind(name) not in (None, "experts")]
    lost = data.draw(st.sampled_from(candidates))
    engine = in_engine(modules(family), [each for each in left if each != lost])
    found = compare({"checkpoint": fp8, "SGLang": engine.fp8})
    others = [name for name in candidates if name != lost and engine_layer(name) == engine_layer(lost)]
    if others:  # they still have theirs: SGLang refuses to start
        assert engine.torn == {engine_layer(lost)}
        assert found == []
    else:
        assert found == [Difference(lost, ("SGLang",), ("checkpoint",))]


@given(st.lists(st.frozensets(st.sampled_from("abcde")), min_size=1, max_size=4))
def test_differences(sets: list[frozenset[str]]) -> None:
    named = {f"list {number}": members for number, members in enumerate(sets)}
    found = compare(named)
    assert {each.module for each in found} == frozenset().union(*sets) - frozenset.intersection(*sets)
    for each in found:
        assert {*each.by} == {name for name, members in named.items() if each.module in members}
        assert {*each.by, *each.not_by} == {*named}
    assert sum(int(text.partition(":")[0]) for text in grouped(found).values()) == len(found)


def test_differences_are_told_with_names() -> None:
    found = [Difference(f"m.{number}", ("converter",), ("SGLang",)) for number in range(4)]
    found.append(Difference("n", ("SGLang",), ("converter",)))
    assert grouped(found) == {"FP8 only by converter": "4: m.0, m.1, m.2, …", "FP8 only by SGLang": "1: n"}
    assert grouped([]) == {}


# -- SGLang itself ----------------------------------------------------------------------------------------------------


def sglangs_own(package: Path) -> Any:
    """`is_layer_skipped` of an SGLang, which is not imported: that takes a minute, and kernels."""
    wanted = ("_module_path_match", "_FALLBACK_FUSED_SHARDS", "is_layer_skipped")
    source = (package / "srt/layers/quantization/utils.py").read_text()
    body = [
        node
        for node in ast.parse(source).body
        if getattr(node, "name", None) in wanted
        or (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in wanted)
    ]
    namespace: dict[str, Any] = {**vars(typing), "MappingProxyType": MappingProxyType}
    exec(compile(ast.Module(body, type_ignores=[]), "sglang", "exec"), namespace)
    return namespace["is_layer_skipped"]


def engine_layer(module: str) -> str:
    above, _, last = module.rpartition(".")
    if kind(module) == "experts":
        return above.rpartition(".")[0]
    return next((f"{above}.{fused}" for fused, parts in FUSED.items() if last in parts), module)


@pytest.mark.upstream
def test_sglang_itself_takes_the_same() -> None:
    """The installed one's own function, for each of its layers, with entries of every kind, one and two at a time."""
    found = find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        pytest.skip("SGLang is not installed (CONTRIBUTING.md: the upstream tier)")
    is_layer_skipped = sglangs_own(Path(found.submodule_search_locations[0]))
    check_against(is_layer_skipped, "module path")


def check_against(is_layer_skipped: Any, matching: Matching) -> None:
    names = [f"model.layers.{n}.{name}" for n in (1, 10) for name in (*GQA, *SHARED, *EXPERTS)]
    names += [f"model.layers.2.{name}" for name in DENSE]
    entries = [*names, "model.layers.1", "model.layers.1.", "layers.10.mlp", "model.layers.2.mlp.gate", "self_attn"]
    entries += ["q_proj", "lm_head", "model.layers.1.mlp.experts", "mlp.shared_experts", "model.layers.1.mlp.experts.1"]
    layers = sorted({engine_layer(name) for name in names})

    def theirs(left: list[str]) -> tuple[set[str], set[str]]:
        if matching == "module path":  # as Fp8Config.from_config does
            left = [
                name for each in left for name in (each.removeprefix("model."), f"model.{each.removeprefix('model.')}")
            ]
        fp8, torn = set(), set()
        for layer in layers:
            try:
                experts_of_older = matching == "substring" and layer.endswith(".experts")
                if experts_of_older or not is_layer_skipped(layer, left):
                    fp8.add(layer)
            except ValueError:
                torn.add(layer)
        return fp8, torn

    def ours(left: list[str]) -> tuple[set[str], set[str]]:
        engine = in_engine(names, left, matching)
        return {engine_layer(name) for name in engine.fp8}, {*engine.torn}

    for left in ([], *([one] for one in entries), *(list(pair) for pair in combinations(entries, 2))):
        assert ours(left) == theirs(left), left
