"""What rollout weights take: the sizes of published models, every refusal, and that the GPUs together hold it all."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from miles_plugins import PluginError
from miles_plugins.entrypoints.memory import memory
from miles_plugins.int4_qat.memory import (
    BF16,
    FP8,
    MODULES,
    MTP,
    Component,
    Format,
    Layout,
    Tensor,
    components,
    int4,
    stage_bytes,
    weight_bytes,
)

# The sizes in the models' config.json, as in slime's scripts/models.
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "moe_intermediate_size": 1536,
}
GLM45 = {
    "model_type": "glm4_moe",
    "hidden_size": 5120,
    "num_hidden_layers": 92,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "use_qk_norm": True,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "vocab_size": 151552,
    "tie_word_embeddings": False,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "vocab_size": 163840,
}
LLAMA3_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
QWEN25_72B = LLAMA3_70B | {"model_type": "qwen2", "intermediate_size": 29568, "vocab_size": 152064}
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
MODELS = [QWEN3_30B, QWEN3_235B, GLM45, DEEPSEEK_V3, KIMI_K2, LLAMA3_70B, QWEN25_72B, QWEN3_8B]


def counted(config: dict[str, Any]) -> dict[str, Component]:
    return {each.name: each for each in components(config) if each.name != MTP}


def parameters(config: dict[str, Any]) -> int:
    return sum(each.parameters for each in counted(config).values())


def gigabytes(config: dict[str, Any], format: Format) -> float:
    return round(sum(weight_bytes(each, format) for each in counted(config).values()) / 1e9, 1)


# -- published models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "billions", "share", "bf16", "experts", "everything"),
    [
        (QWEN3_30B, "30.53", "95.0", 61.1, (19.4, 18.0), (18.1, 16.7)),
        (QWEN3_235B, "235.09", "96.6", 470.2, (143.7, 133.1), (134.1, 123.1)),
        (GLM45, "352.80", "95.2", 705.6, (222.6, 206.9), (200.8, 184.3)),
        (DEEPSEEK_V3, "671.03", "97.4", 1342.1, (402.1, 371.4), (380.3, 348.9)),
        (KIMI_K2, "1026.41", "98.9", 2052.8, (594.2, 546.6), (581.0, 533.0)),
        (LLAMA3_70B, "70.55", "0.0", 141.1, (141.1, 141.1), (42.7, 39.5)),
        (QWEN25_72B, "72.71", "0.0", 145.4, (145.4, 145.4), (44.5, 41.2)),
    ],
    ids=["qwen3-30b", "qwen3-235b", "glm-4.5", "deepseek-v3", "kimi-k2", "llama-3-70b", "qwen2.5-72b"],
)
def test_the_sizes_of_published_models(config, billions, share, bf16, experts, everything):
    """The figures in GB for groups of 32 and 128: of the routed experts, and of every linear layer."""
    assert f"{parameters(config) / 1e9:.2f}" == billions
    routed = counted(config).get("routed experts", Component("none", ())).parameters
    assert f"{100 * routed / parameters(config):.1f}" == share
    assert gigabytes(config, BF16) == bf16
    assert tuple(gigabytes(config, int4(size)) for size in (32, 128)) == experts
    assert tuple(gigabytes(config, int4(size, list(MODULES))) for size in (32, 128)) == everything


def test_a_dense_qwen3():
    """By hand: its published 8.19 B, of which 6.95 B are no embeddings."""
    matrices = 4096 * 128 * (32 + 8 + 8 + 32) + 3 * 4096 * 12288
    assert parameters(QWEN3_8B) == 2 * 151936 * 4096 + 4096 + 36 * (matrices + 2 * 4096 + 2 * 128) == 8_190_735_360


def test_the_bytes_of_a_matrix_in_each_format():
    attention = counted(LLAMA3_70B)["attention"]
    one = Component("one", tuple(each for each in attention.tensors if (each.name, each.layer) == ("k_proj", 0)))
    assert one.parameters == 1024 * 8192
    assert weight_bytes(one, BF16) == 2 * 1024 * 8192
    assert weight_bytes(one, int4(64, ["attention"])) == 1024 * 8192 // 2 + 2 * 1024 * 8192 // 64 + 8
    assert weight_bytes(one, FP8) == 1024 * 8192 + 4 * 8 * 64
    ragged = Component("one", (Tensor("attention", "kv_a_proj", 0, (576, 512)),))
    assert weight_bytes(ragged, FP8) == 576 * 512 + 4 * 5 * 4, "a cut block has a scale too"


def test_what_is_never_quantised_stays_bf16():
    for format in (int4(32, list(MODULES)), FP8):
        same = {
            name for name, each in counted(DEEPSEEK_V3).items() if weight_bytes(each, format) == 2 * each.parameters
        }
        assert same == {"embedding", "router", "norms", "lm head"}


def test_which_layers_have_experts():
    def sparse(**changes):
        found = counted(QWEN3_30B | changes)["routed experts"].tensors
        return sorted({tensor.layer for tensor in found})

    assert sparse(num_hidden_layers=6, decoder_sparse_step=2) == [1, 3, 5]
    assert sparse(num_hidden_layers=4, mlp_only_layers=[0, 2]) == [1, 3]
    assert {tensor.layer for tensor in counted(GLM45)["dense MLP"].tensors} == {0, 1, 2}
    shared = [counted(GLM45 | {"n_shared_experts": number})["shared experts"].parameters for number in (1, 2)]
    assert shared == [89 * 3 * 5120 * 1536, 2 * 89 * 3 * 5120 * 1536]


def test_biases_and_norms_are_what_the_family_has():
    plain, biased = parameters(LLAMA3_70B), parameters(LLAMA3_70B | {"attention_bias": True})
    assert biased - plain == 80 * (8192 + 2 * 1024 + 8192)
    assert parameters(GLM45) - parameters(GLM45 | {"attention_bias": False}) == 92 * 128 * (96 + 8 + 8)
    assert parameters(GLM45) - parameters(GLM45 | {"use_qk_norm": False}) == 92 * 2 * 128
    as_llama = LLAMA3_70B | {key: QWEN25_72B[key] for key in ("intermediate_size", "vocab_size")}
    assert parameters(QWEN25_72B) - parameters(as_llama) == 80 * (8192 + 2 * 1024)


def test_queries_without_a_latent():
    """As in Moonlight: one matrix for two, and no norm between."""
    two = 1536 * 7168 + 1536 + 128 * 192 * 1536
    assert parameters(DEEPSEEK_V3) - parameters(DEEPSEEK_V3 | {"q_lora_rank": None}) == 61 * (two - 128 * 192 * 7168)


def test_an_mtp_layer_is_a_component_by_itself():
    *others, extra = components(DEEPSEEK_V3)
    assert extra.name == MTP
    assert {tensor.layer for tensor in extra.tensors} == {61}
    assert all(tensor.layer < 61 for each in others for tensor in each.tensors)
    last = sum(math.prod(t.shape) * t.count for each in others for t in each.tensors if t.layer == 60)
    ends = 129280 * 7168 + 7168  # lm_head and the last norm
    assert extra.parameters == last - ends + 2 * 7168 * 7168 + 3 * 7168
    without = components(DEEPSEEK_V3 | {"num_nextn_predict_layers": 0})
    assert stage_bytes(components(DEEPSEEK_V3), BF16, Layout(8)) == stage_bytes(without, BF16, Layout(8))


def test_a_language_model_inside_another():
    nested = {"model_type": "kimi_k25", "text_config": KIMI_K2}
    assert components(nested) == components(KIMI_K2)
    tied = {"tie_word_embeddings": True, "text_config": {k: v for k, v in QWEN3_8B.items() if "tie" not in k}}
    assert "lm head" not in counted(tied)


# -- on each GPU ------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], Layout]:
    """A small model of some family and how it is divided, all dividing whole."""
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    layout = Layout(
        tp, draw(st.integers(1, 3)), draw(st.sampled_from([each for each in (1, 2, 4, 8) if tp % each == 0]))
    )
    config = dict(draw(st.sampled_from(MODELS)))
    assume(layout.ep == 1 or config["model_type"] not in ("llama", "qwen2", "qwen3"))
    config |= {
        "num_hidden_layers": draw(st.integers(3, 7)),
        "hidden_size": 256,
        "vocab_size": draw(st.integers(1, 700)),
    }
    config |= {"num_attention_heads": 8, "num_key_value_heads": draw(st.sampled_from([1, 2, 8])), "head_dim": 128}
    config |= {"intermediate_size": 1024, "moe_intermediate_size": 1024, "num_experts": 8, "n_routed_experts": 8}
    return config | {"first_k_dense_replace": draw(st.integers(0, 2))}, layout


def held(tensors: list[Tensor], layout: Layout, kv_heads: int, layers: int) -> list[list[Counter[str]]]:
    """Per stage and rank of its group, how many parameters of each component: by going through rows, one by one."""
    found = [[Counter() for _ in range(layout.tp)] for _ in range(layout.pp)]
    longer = layers % layout.pp
    sizes = [layers // layout.pp + (stage >= layout.pp - longer) for stage in range(layout.pp)]
    stage_of = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    for tensor in tensors:
        name, shape = tensor.name, tensor.shape
        others = math.prod(shape[1:])
        for rank, here in enumerate(found[stage_of[tensor.layer]]):
            if name in ("embed_tokens", "lm_head"):
                rows = range(-(-shape[0] // 64) * 64)
                mine = sum(row * layout.tp // len(rows) == rank for row in rows) * others
            elif name.split(".")[0] in ("k_proj", "v_proj"):
                heads = (
                    {kv_heads * rank // layout.tp} if kv_heads < layout.tp else set(range(kv_heads)[rank :: layout.tp])
                )
                mine = sum(row * kv_heads // shape[0] in heads for row in range(shape[0])) * others
            elif tensor.component == "routed experts":
                across = layout.tp // layout.ep
                experts = sum(expert * layout.ep // tensor.count == rank // across for expert in range(tensor.count))
                width = sum(unit * across // 1024 == rank % across for unit in range(1024))
                mine = experts * width * 256
            elif tensor.component in ("dense MLP", "shared experts"):
                width = shape[1] if name.endswith("down_proj") else shape[0]
                mine = sum(unit * layout.tp // width == rank for unit in range(width)) * 256
            elif name in ("q_proj", "q_proj.bias", "kv_b_proj", "o_proj"):
                mine = sum(head % layout.tp == rank for head in range(8)) * math.prod(shape) // 8
            else:
                mine = math.prod(shape)
            here[tensor.component] += mine
    return found


@settings(max_examples=60, deadline=None)
@given(cases())
def test_all_gpus_together_hold_the_model(case):
    """Judged by an enumeration of who holds which rows: each rank holds what is said, and together they hold it all."""
    config, layout = case
    config |= {"tie_word_embeddings": False}
    parts, layers = counted(config), config["num_hidden_layers"]
    tensors = [tensor for each in parts.values() for tensor in each.tensors]
    found = held(tensors, layout, config["num_key_value_heads"], layers)

    for stage, expected in zip(found, stage_bytes(components(config), BF16, layout), strict=True):
        assert {2 * rank.total() for rank in stage} == {expected}

    together = sum((rank for stage in found for rank in stage), Counter())
    for name in {"dense MLP", "shared experts", "routed experts"} & parts.keys():
        assert together[name] == parts[name].parameters
    assert together["norms"] == parts["norms"].parameters * layout.tp
    for name in ("embedding", "lm head"):
        assert 0 <= together[name] - parts[name].parameters < 64 * 256
    if "kv_lora_rank" not in config or layout.tp == 1:
        copies = max(1, layout.tp // config["num_key_value_heads"])
        keys = sum(math.prod(t.shape) for t in parts["attention"].tensors if t.name[0] in "kv")
        if layout.tp == 1:
            keys = 0
        assert together["attention"] == parts["attention"].parameters + (copies - 1) * keys


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([int4(32, ["experts", "mlp"]), int4(128, ["experts", "shared-experts"]), FP8]))
def test_a_quantised_weight_is_divided_without_remainder(case, format):
    """All of a stage's GPUs hold the codes and scales of the divided components once; only weight_shape is repeated."""
    config, layout = case
    divided = [
        each for name, each in counted(config).items() if name in ("dense MLP", "shared experts", "routed experts")
    ]
    on_gpus = sum(stage_bytes(divided, format, Layout(layout.tp, 1, layout.ep))) * layout.tp
    # A component's own weight_shapes, 8 bytes a matrix: each GPU has those of the matrices of which it has a part.
    matrices = [(tensor.component, tensor.count) for each in divided for tensor in each.tensors]
    repeated = sum(
        8 * count * ((layout.tp // layout.ep if name == "routed experts" else layout.tp) - 1)
        for name, count in matrices
        if format.name == "int4" and name in format.components
    )
    assert on_gpus == sum(weight_bytes(each, format) for each in divided) + repeated


def test_a_tied_lm_head_is_shared_unless_another_stage_needs_it():
    tied = components(QWEN3_8B | {"tie_word_embeddings": True})
    untied = components(QWEN3_8B)
    head = 2 * 151936 * 4096
    assert stage_bytes(untied, BF16, Layout())[0] - stage_bytes(tied, BF16, Layout())[0] == head
    assert stage_bytes(tied, BF16, Layout(pp=2)) == stage_bytes(untied, BF16, Layout(pp=2))


def test_the_last_stages_take_the_layers_that_are_left():
    assert [len(stage) for stage in Layout(pp=4).stages(62)] == [15, 15, 16, 16]
    assert [list(stage) for stage in Layout(pp=3).stages(4)] == [[0], [1], [2, 3]]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "layout", "message", "fact", "next"),
    [
        (QWEN3_30B, Layout(8, 1, 3), "the experts cannot be divided so", "ep=3", "--ep 1 or 2 or 4 or 8"),
        (QWEN3_30B | {"num_experts": 6}, Layout(4, 1, 4), "the experts", "experts=6", "--ep 1 or 2"),
        (LLAMA3_70B, Layout(8, 1, 8), "the experts", "experts=none: the model is dense", "--ep 1"),
        (LLAMA3_70B, Layout(1, 81), "there are more stages than layers", "layers=80", "a lower --pp"),
        (GLM45, Layout(64), "tp 64, pp 1, ep 1 does not divide q_proj", "to divide=96 heads", "choose a --tp"),
        (GLM45 | {"num_key_value_heads": 6}, Layout(4), "does not divide k_proj", "to divide=6 heads", "choose a --tp"),
        (GLM45 | {"num_key_value_heads": 3}, Layout(8), "does not divide k_proj", "to divide=3 heads", "choose a --tp"),
        (QWEN3_8B | {"vocab_size": 64}, Layout(128), "does not divide embed_tokens", "to divide=N = 64", "--tp"),
        (QWEN3_30B | {"moe_intermediate_size": 3}, Layout(2), "divide mlp.experts.gate_proj", "N = 3", "larger --ep"),
    ],
)
def test_a_layout_that_cannot_be(config, layout, message, fact, next):
    with pytest.raises(PluginError) as error:
        stage_bytes(components(config), BF16, layout)
    assert message in error.value.message
    assert any(fact in f"{name}={value}" for name, value in error.value.facts.items())
    assert next in str(error.value.next)


def test_the_trap_of_a_group_larger_than_a_gpus_part():
    """Qwen3-30B-A3B in groups of 128 at tp 4: SGLang takes it without a word, and serves wrong experts."""
    found = components(QWEN3_30B)
    with pytest.raises(PluginError, match=r"mlp\.experts\.down_proj cannot be .* groups of 128 with tp 4") as error:
        stage_bytes(found, int4(128), Layout(4))
    assert error.value.facts["K on each GPU"] == "192 = 768 / 4"
    assert error.value.next == "convert with --group-size 64 or 32, or divide by whole experts: --ep 2"
    for way in ((int4(64), Layout(4)), (int4(32), Layout(4)), (int4(128), Layout(4, 1, 2)), (int4(128), Layout(2))):
        assert stage_bytes(found, *way)[0] < 2 * parameters(QWEN3_30B) / 4
    with pytest.raises(PluginError, match="groups of 128") as error:
        stage_bytes(components(QWEN3_30B | {"num_experts": 127}), int4(128), Layout(4))
    assert error.value.next == "convert with --group-size 64 or 32", "127 experts are not divided by any --ep"
    with pytest.raises(PluginError, match="groups of 32") as error:
        stage_bytes(found, int4(32), Layout(8))  # K is 96: three groups, but no whole tiles
    assert error.value.next == "divide by whole experts: --ep 2"


def test_a_group_that_divides_no_row():
    odd = components(LLAMA3_70B | {"intermediate_size": 28704})
    mlp = next(each for each in odd if each.name == "dense MLP")
    with pytest.raises(PluginError, match=r"mlp\.down_proj cannot be quantised in groups of 128\n") as error:
        weight_bytes(mlp, int4(128, ["mlp"]))
    assert error.value.facts["K on each GPU"] == 28704
    assert error.value.next == "take a lower --tp, or leave it out of --modules"


def test_blocks_that_sglang_cannot_divide():
    with pytest.raises(PluginError, match=r"SGLang cannot divide mlp\.experts\.gate_proj in fp8 with tp 4") as error:
        stage_bytes(components(QWEN3_30B), FP8, Layout(4))
    assert error.value.facts["on each GPU"] == [192, 2048]
    assert error.value.next == "take a lower --tp, or a larger --ep"
    with pytest.raises(PluginError, match=r"mlp\.gate_proj") as error:
        stage_bytes(components(QWEN25_72B | {"num_key_value_heads": 64}), FP8, Layout(8))
    assert error.value.next == "take a lower --tp"


@pytest.mark.parametrize("modules", [["router"], ["experts", ""], []])
def test_modules_that_do_not_exist(modules):
    with pytest.raises(PluginError, match="no such modules") as error:
        int4(128, modules)
    assert error.value.facts["known"] == "experts, shared-experts, mlp, attention"


@pytest.mark.parametrize("size", [12, 16, 256])
def test_a_group_size_without_a_kernel(size):
    with pytest.raises(PluginError, match="SGLang's INT4 kernel has no such group size") as error:
        int4(size)
    assert error.value.facts["group size"] == size
    assert error.value.next == "use 128 or 64 or 32"


@pytest.mark.parametrize("kind", ["gpt_oss", None])
def test_a_family_that_is_not_known(kind):
    with pytest.raises(PluginError, match=f"model_type {kind} are not known") as error:
        components(LLAMA3_70B | {"model_type": kind})
    assert error.value.facts["known"] == "llama, qwen2, qwen3, qwen3_moe, glm4_moe, deepseek_v3, kimi_k2"


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (LLAMA3_70B, "hidden_size", None),
        (LLAMA3_70B, "vocab_size", "128256"),
        (QWEN3_8B, "head_dim", None),
        (QWEN3_30B, "num_experts", 0),
        (DEEPSEEK_V3, "kv_lora_rank", None),
        (GLM45, "moe_intermediate_size", True),
    ],
)
def test_a_size_that_is_missing(config, key, value):
    with pytest.raises(PluginError, match=r"config\.json lacks a size") as error:
        components(config | {key: value})
    assert error.value.facts["key"] == key


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path):
    """Run the command on a config, in a folder of its own."""

    def invoke(config: Any, *arguments: str) -> Result:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return CliRunner().invoke(memory, [str(tmp_path), *arguments], env={"COLUMNS": "120"})

    return invoke


def cells(result: Result, first: str) -> list[str]:
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.strip().startswith(first)]
    return line.split()


def test_all_formats_side_by_side(run):
    result = run(QWEN3_30B)
    assert cells(result, "component") == "component parameters share bf16 GB int4 GB fp8 GB".split()
    assert cells(result, "routed experts") == "routed experts 28.99 B 95.0% 58.0 14.9 29.0".split()
    assert cells(result, "norms") == "norms 0.21 M 0.0% 0.0 0.0 0.0".split()
    assert cells(result, "total") == "total 30.53 B 100.0% 61.1 18.0 31.2".split()
    assert cells(result, "smaller by") == "smaller by 1.00x 3.39x 1.96x".split()
    assert "int4: routed experts in groups of 128; the rest bf16" in result.output
    assert "neither its KV cache and activations, nor the trainer" in " ".join(result.output.split())
    assert "1 GB is 1e9 bytes" in result.output
    assert "GPUs" not in result.output


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        (["--int4"], ["bf16", "int4"]),
        (["--fp8"], ["bf16", "fp8"]),
        (["--int4", "--fp8"], ["bf16", "int4", "fp8"]),
        (["--group-size", "32"], ["bf16", "int4"]),
        (["--modules", "experts,attention", "--fp8"], ["bf16", "int4", "fp8"]),
    ],
)
def test_only_what_was_asked_for(run, arguments, columns):
    assert [name for name in cells(run(QWEN3_30B, *arguments), "component")[3:] if name != "GB"] == columns


def test_a_dense_model_gains_nothing_and_is_told_so(run):
    result = run(LLAMA3_70B, "--int4")
    assert cells(result, "total") == "total 70.55 B 100.0% 141.1 141.1".split()
    told = " ".join(result.output.split())
    assert "gains nothing here: the model is dense and has no routed experts." in told
    assert "`--modules mlp,attention` gives 39.5 GB, 3.57x smaller than bf16; but SGLang cannot" in told
    assert "gains nothing" not in run(LLAMA3_70B, "--modules", "mlp").output
    other = " ".join(run(QWEN3_30B, "--modules", "shared-experts").output.split())
    assert "the model has no shared experts. `--modules experts` gives 18.0 GB, 3.39x" in other
    odd = " ".join(run(LLAMA3_70B | {"intermediate_size": 28704}, "--int4").output.split())
    assert "`--modules mlp,attention` does not fit: mlp.down_proj cannot be quantised" in odd


def test_on_each_gpu(run):
    result = run(DEEPSEEK_V3, "--tp", "8", "--pp", "2", "--ep", "8")
    expected = "fullest of 16 GPUs (tp 8, pp 2, ep 8): bf16 90.3 GB (stage 2), int4 25.5 GB (stage 2), fp8 45.4 GB"
    assert expected in " ".join(result.output.split())
    assert cells(result, "MTP layer, not in the total")[6:] == "11.61 B 23.2 6.5 11.7".split()
    assert (
        "fullest of 2 GPUs (tp 2, pp 1, ep 1): bf16 30.5 GB, int4 9.0 GB, fp8 15.6 GB\n"
        in run(QWEN3_30B, "--tp", "2").output
    )


def test_what_was_not_asked_for_is_left_open_where_it_does_not_fit(run):
    result = run(QWEN3_30B, "--tp", "4")
    assert "fullest of 4 GPUs (tp 4, pp 1, ep 1): bf16 15.3 GB, int4 –, fp8 –" in result.output
    assert "int4 does not fit: mlp.experts.down_proj cannot be quantised in groups of 128" in result.output
    facts = json.loads(run(QWEN3_30B, "--tp", "4", "--json").output)
    assert facts["per_gpu"]["stages"]["int4"] is None
    assert set(facts["refused"]) == {"int4", "fp8"}
    whole = run(QWEN3_30B | {"moe_intermediate_size": 800})
    assert cells(whole, "total")[-3:] == ["63.5", "–", "32.4"]
    assert cells(whole, "smaller by")[3] == "–"


@pytest.mark.parametrize("arguments", [["--int4", "--tp", "4"], ["--fp8", "--tp", "4"], ["--tp", "3"], ["--ep", "2"]])
def test_a_refusal_ends_the_command(run, arguments):
    result = run(QWEN3_30B, *arguments)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "\n  next " in result.output


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_none(run, text):
    result = run(text)
    assert result.exit_code == 1
    assert "config" in result.output.splitlines()[0]


def test_a_folder_without_a_config(tmp_path):
    result = CliRunner().invoke(memory, [str(tmp_path)])
    assert result.exit_code == 1
    assert "no model's config can be read" in result.output
    assert "FileNotFoundError" in result.output


def test_json_says_the_same_in_bytes(run, tmp_path):
    facts = json.loads(run(GLM45, "--int4", "--group-size", "32", "--tp", "8", "--json").output)
    again = json.loads(CliRunner().invoke(memory, [str(tmp_path / "config.json"), "--int4", "--json"]).output)
    assert again["total"]["bytes"]["bf16"] == facts["total"]["bytes"]["bf16"] == 2 * parameters(GLM45)
    assert facts["formats"]["int4"] == {"components": ["routed experts"], "group_size": 32}
    rows = {row["name"]: row for row in facts["components"]}
    assert list(rows) == [each.name for each in components(GLM45)]
    for name in ("bf16", "int4"):
        assert sum(row["bytes"][name] for row in rows.values() if row["name"] != MTP) == facts["total"]["bytes"][name]
    assert facts["per_gpu"]["gpus"] == 8
    assert facts["per_gpu"]["stages"]["int4"] == stage_bytes(components(GLM45), int4(32), Layout(8))
    assert facts["refused"] == {}


def test_that_a_vision_tower_is_not_counted_is_said(run):
    result = run({"model_type": "kimi_k25", "text_config": KIMI_K2})
    assert "Only the language model is counted" in result.output
    assert "Only the language model" not in run(KIMI_K2).output
