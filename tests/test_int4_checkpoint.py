"""What an INT4 checkpoint says of itself: which formats are read, which are refused, and which modules are packed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import PluginError
from miles_plugins.checkpoints import TensorFacts, ignored, read_header, weight_map
from miles_plugins.int4_qat.checkpoint import Format, packed_modules, read_format
from miles_plugins.int4_qat.grid import Grid

WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 128,
    "dynamic": False,
    "actorder": None,
    "observer": "minmax",
}
INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "kv_cache_scheme": None,
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """A model's config with another value at this place of quantization_config; `...` takes it out."""
    found = copy.deepcopy(INT4)
    *folders, last = path.split(".")
    place = found
    for folder in folders:
        place = place[folder]
    place[last] = value
    if value is ...:
        del place[last]
    return {"model_type": "qwen3_moe", "quantization_config": found}


def write_safetensors(file: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    """A file of zeros: name -> dtype, shape, bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content + bytes(end))


# -- the format -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    size=st.sampled_from([8, 32, 64, 128, 256]),
    group=st.text(min_size=1),
    nested=st.booleans(),
    ignore=st.lists(st.text(), max_size=3) | st.none(),
)
def test_the_format_is_found_wherever_it_is(size: int, group: str, nested: bool, ignore: list[str] | None) -> None:
    weights = {**WEIGHTS, "group_size": size}
    quantization = {**INT4, "config_groups": {group: {"targets": ["Linear"], "weights": weights}}, "ignore": ignore}
    config = {"quantization_config": quantization}
    found = read_format(
        {"text_config": config, "quantization_config": None} if nested else {**config, "text_config": {}}
    )
    assert found == Format(size, tuple(ignore or ()))
    assert found.grid("snapped") == Grid(size, "snapped")


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {"hidden_size": 8}}])
def test_a_model_that_is_not_quantised_has_no_format(config: dict[str, Any]) -> None:
    assert read_format(config) is None


def test_what_may_be_missing() -> None:
    """compressed-tensors leaves out what is as by default."""
    minimal = {name: WEIGHTS[name] for name in ("num_bits", "strategy", "group_size")}
    assert read_format(changed("config_groups.group_0.weights", minimal)) == Format(128, tuple(INT4["ignore"]))


@pytest.mark.parametrize(
    ("path", "value", "shown"),
    [
        ("quant_method", "fp8", '"fp8"'),
        ("quant_method", ..., "missing"),
        ("format", "int-quantized", '"int-quantized"'),
        ("config_groups", {}, "missing"),
        ("config_groups", {"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS}}, '"a, b"'),
        ("config_groups", ["W4A16"], '["W4A16"]'),
        ("config_groups.group_0.weights", None, "missing"),
        ("config_groups.group_0.input_activations", {"num_bits": 8}, '{"num_bits": 8}'),
        ("config_groups.group_0.weights.num_bits", 8, "8"),
        ("config_groups.group_0.weights.num_bits", ..., "missing"),
        ("config_groups.group_0.weights.strategy", "channel", '"channel"'),
        ("config_groups.group_0.weights.symmetric", False, "false"),
        ("config_groups.group_0.weights.type", "float", '"float"'),
        ("config_groups.group_0.weights.actorder", "weight", '"weight"'),
        ("config_groups.group_0.weights.actorder", True, "true"),
        ("config_groups.group_0.weights.dynamic", True, "true"),
        ("config_groups.group_0.weights.dynamic", "local", '"local"'),
        ("config_groups.group_0.weights.group_size", ..., "missing"),
        ("config_groups.group_0.weights.group_size", -1, "-1"),
        ("config_groups.group_0.weights.group_size", 12, "12"),
        ("config_groups.group_0.weights.group_size", True, "true"),
    ],
)
def test_another_format_is_refused_by_its_field(path: str, value: Any, shown: str) -> None:
    with pytest.raises(PluginError, match="quantised in a way that INT4 training does not have") as error:
        read_format(changed(path, value))
    assert error.value.facts["field"] == path
    assert error.value.facts["found"] == shown
    assert error.value.facts["expected"]
    assert "convert-int4" in str(error.value.next)


def test_a_quantization_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(PluginError) as error:
        read_format({"quantization_config": ["int4"]})
    assert error.value.facts["field"] == "quantization_config"


# -- names ------------------------------------------------------------------------------------------------------------

parts = st.sampled_from(["model", "layers", "1", "10", "mlp", "gate", "gate_proj"])
names = st.lists(parts, min_size=1, max_size=5).map(".".join)


@settings(deadline=None)
@given(names, names)
def test_a_prefix_ends_at_a_dot(name: str, rule: str) -> None:
    expected = name.split(".")[: rule.count(".") + 1] == rule.split(".")
    assert ignored(name, [rule]) == expected
    assert ignored(name, ["nothing", rule]) == expected


def test_ignore_rules() -> None:
    assert ignored("model.layers.1.mlp", ["model.layers.1"])
    assert ignored("model.layers.1.mlp", ["model.layers.1."])
    assert not ignored("model.layers.10.mlp", ["model.layers.1"])  # slime's startswith takes it
    assert ignored("lm_head", ["lm_head"])
    assert ignored("model.layers.3.self_attn.q_proj", ["re:.*self_attn"])
    assert not ignored("model.layers.3.mlp", ["re:layers"])  # as re.match: from the beginning
    assert not ignored("model.layers.3.mlp", ["model.layers.[0-9]"])
    assert not ignored("lm_head", [])


def test_packed_modules_of_an_index_and_of_one_file(tmp_path: Path) -> None:
    experts = {f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(3)}
    tensors = {
        name: ("I32", [2], 8)
        for module in experts
        for name in (f"{module}.weight_packed", f"{module}.weight_scale", f"{module}.weight_shape")
    }
    write_safetensors(tmp_path / "model.safetensors", {**tensors, "lm_head.weight": ("BF16", [1, 4], 8)})
    assert packed_modules(tmp_path) == experts
    index = {"weight_map": {"a.weight_packed": "x.safetensors", "b.weight": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert packed_modules(tmp_path) == {"a"}


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F32", "I32", "I64", "U8", "BOOL", "F8_E4M3"])
def test_a_header_says_what_a_tensor_is(tmp_path: Path, dtype: str) -> None:
    width = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8}.get(dtype, 1)
    write_safetensors(tmp_path / "x", {"a": (dtype, [3, 5], 15 * width), "b": ("F32", [], 4)})
    assert read_header(tmp_path / "x") == {"a": TensorFacts(dtype, (3, 5)), "b": TensorFacts("F32", ())}
    assert [facts.size for facts in read_header(tmp_path / "x").values()] == [15 * width, 4]


@settings(deadline=None)
@given(cut=st.integers(0, 10_000), kind=st.sampled_from(["shorter", "longer", "noise"]))
def test_a_damaged_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int, kind: str) -> None:
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    write_safetensors(file, {"a": ("BF16", [4, 8], 64)})
    whole = file.read_bytes()
    content = {"shorter": whole[: cut % len(whole)], "longer": whole + b"\0", "noise": bytes([cut % 256]) * 40}[kind]
    file.write_bytes(content)
    with pytest.raises(PluginError, match="cannot read"):
        read_header(file)


def test_a_folder_without_usable_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(PluginError, match=r"no model\.safetensors\.index\.json and no model\.safetensors") as error:
        weight_map(tmp_path)
    assert error.value.facts["found"] == "pytorch_model.bin"
    for content in ('{"weight_map": {"a": "../elsewhere"}}', '{"weight_map": ["a"]}', "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(PluginError, match="cannot be used"):
            weight_map(tmp_path)
    for content, problem in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(PluginError, match=problem):
            weight_map(tmp_path)
