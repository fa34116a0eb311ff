"""What an FP8 checkpoint says of itself: what is read, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import PluginError
from miles_plugins.checkpoints import TensorFacts
from miles_plugins.fp8_unified.blockwise import Format, per_tensor, quantise_weight
from miles_plugins.fp8_unified.checkpoint import (
    Declared,
    check_scales,
    matrices,
    quantised_modules,
    read_format,
    require_shapes,
)

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from tests.checkpoint_folders import Tensors, write  # noqa: E402

FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
}
BLOCKS = Declared(Format(), ("lm_head", "model.layers.0.mlp.gate"))
POWERS = Format(scale="power_of_two")
UE8M0 = Declared(POWERS)
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}


def changed(**changes: Any) -> dict[str, Any]:
    """A model's config with other fields; `...` takes one out."""
    quantization = {name: value for name, value in {**FP8, **changes}.items() if value is not ...}
    return {"model_type": "qwen3_moe", "quantization_config": quantization}


# -- the format -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, BLOCKS),
        ({"fmt": ...}, BLOCKS),  # Qwen3.5-FP8
        ({"fmt": None}, BLOCKS),
        ({"scale_fmt": "ue8m0"}, Declared(POWERS, BLOCKS.not_converted)),  # DeepSeek-V3.1
        ({"scale_fmt": None}, BLOCKS),
        ({"modules_to_not_convert": ...}, Declared(Format())),  # DeepSeek-V3
        ({"modules_to_not_convert": None}, Declared(Format())),
        ({"weight_block_size": None}, Declared(None, BLOCKS.not_converted)),
        ({"weight_block_size": ...}, Declared(None, BLOCKS.not_converted)),
        ({"ignored_layers": ["a"]}, Declared(Format(), ("a",))),  # as SGLang: the first that is there
        ({"ignored_layers": []}, Declared(Format())),
    ],
)
def test_what_is_declared(changes: dict[str, Any], expected: Declared) -> None:
    config = changed(**changes)
    assert read_format(config) == expected
    assert read_format({"text_config": config, "quantization_config": None}) == expected


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {"hidden_size": 8}}])
def test_a_model_that_is_not_quantised_has_no_format(config: dict[str, Any]) -> None:
    assert read_format(config) is None


@pytest.mark.parametrize(
    ("field", "value", "found", "expected"),
    [
        ("quant_method", ..., "missing", '"fp8"'),
        ("quant_method", "mxfp8", '"mxfp8"', '"fp8"'),
        ("quant_method", "modelopt", '"modelopt"', '"fp8"'),
        ("quant_method", ["fp8"], '["fp8"]', '"fp8"'),
        ("fmt", "e5m2", '"e5m2"', '"e4m3" or missing'),
        ("activation_scheme", "static", '"static"', '"dynamic"'),
        ("activation_scheme", ..., "missing", '"dynamic"'),  # SGLang raises, too
        ("weight_block_size", [64, 64], "[64, 64]", "[128, 128] or missing"),  # Kimi-K2 for many GPUs
        ("weight_block_size", [1, 32], "[1, 32]", "[128, 128] or missing"),
        ("weight_block_size", [128], "[128]", "[128, 128] or missing"),
        ("weight_block_size", 128, "128", "[128, 128] or missing"),
        ("weight_block_size", [], "[]", "[128, 128] or missing"),
        ("scale_fmt", "float32", '"float32"', '"ue8m0" or missing'),
        ("scale_fmt", True, "true", '"ue8m0" or missing'),
        ("modules_to_not_convert", "lm_head", '"lm_head"', "a list of names"),
        ("modules_to_not_convert", [1], "[1]", "a list of names"),
    ],
)
def test_another_format_is_refused_by_its_field(field: str, value: Any, found: str, expected: str) -> None:
    with pytest.raises(PluginError, match="quantised in a way that FP8 training does not have") as error:
        read_format(changed(**{field: value}))
    assert error.value.facts == {"field": field, "found": found, "expected": expected}
    assert "convert-fp8" in str(error.value.next)


def test_one_scale_for_a_matrix_is_no_power_of_two() -> None:
    with pytest.raises(PluginError) as error:
        read_format(changed(weight_block_size=None, scale_fmt="ue8m0"))
    assert error.value.facts == {"field": "scale_fmt", "found": '"ue8m0"', "expected": "missing"}


@pytest.mark.parametrize("quantization", [["fp8"], "fp8", {"quant_algo": "FP8"}])
def test_what_has_no_method_is_refused(quantization: Any) -> None:
    """ModelOpt's older files have `quant_algo` only: in a weight update slime would raise a KeyError."""
    with pytest.raises(PluginError) as error:
        read_format({"quantization_config": quantization})
    found = 'missing; quant_algo "FP8"' if isinstance(quantization, dict) else json.dumps(quantization)
    assert error.value.facts["found"] == found


def test_scales_for_channels_are_refused_by_name() -> None:
    """What slime's converter writes with `--strategy channel`, and its weight sync takes for INT4."""
    with pytest.raises(PluginError, match="compressed-tensors' form, with a scale for each channel") as error:
        read_format({"quantization_config": CHANNELS})
    assert "convert-fp8" in str(error.value.next)
    with pytest.raises(PluginError) as error:
        read_format({"quantization_config": {**CHANNELS, "format": "pack-quantized"}})
    assert "--plugins int4" in str(error.value.next)


# -- the tensors ------------------------------------------------------------------------------------------------------


def fp8(shapes: dict[str, tuple[int, ...]], format: Format | None = None) -> Tensors:
    """Weights with one scale a matrix, or of a format."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape).bfloat16()
        codes, scale = per_tensor(weight) if format is None else quantise_weight(weight, format)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale{'' if format is None else '_inv'}": scale}
    return tensors


SHAPES = {"a.q_proj": (130, 257), "a.o_proj": (128, 64), "b.experts.0.w1": (1, 1)}


def test_the_modules_that_have_scales(tmp_path: Path) -> None:
    plain = {"lm_head.weight": torch.ones(4, 8).bfloat16(), "norm.weight": torch.ones(8).bfloat16()}
    block, matrix = fp8(SHAPES, Format()), fp8({"c.up_proj": (4, 8)})
    write(tmp_path, {"a.safetensors": block, "b.safetensors": {**matrix, **plain}})
    assert quantised_modules(tmp_path) == {*SHAPES, "c.up_proj"}
    assert matrices(tmp_path) == {*SHAPES, "c.up_proj", "lm_head"}


@pytest.mark.parametrize("declared", [Declared(None), Declared(Format()), UE8M0], ids=["matrix", "block", "ue8m0"])
def test_what_is_as_declared_passes(tmp_path: Path, declared: Declared) -> None:
    tensors = fp8(SHAPES, declared.format)
    first = {name: tensor for name, tensor in tensors.items() if name.endswith(declared.scale)}
    second = {name: tensor for name, tensor in tensors.items() if name not in first}
    second["norm.weight"] = torch.ones(8)
    check_scales(write(tmp_path, {"a.safetensors": first, "b.safetensors": second}), declared)


def test_powers_of_two_are_float32_scales_too(tmp_path: Path) -> None:
    check_scales(write(tmp_path, {"a.safetensors": fp8(SHAPES, POWERS)}), BLOCKS)


@given(rows=st.integers(1, 1000), columns=st.integers(1, 1000))
def test_the_shape_of_the_scales(rows: int, columns: int) -> None:
    weight = TensorFacts("F8_E4M3", (rows, columns))
    scale = TensorFacts("F32", ((rows + 127) // 128, (columns + 127) // 128))
    assert require_shapes({"m.weight": weight, "m.weight_scale_inv": scale}, BLOCKS) == {"m"}
    assert require_shapes({"m.weight": weight, "m.weight_scale": TensorFacts("F32", (1,))}, Declared(None)) == {"m"}
    assert require_shapes({"m.weight": weight, "m.weight_scale": TensorFacts("F32", ())}, Declared(None)) == {"m"}
    for wrong in [(scale.shape[0] + 1, scale.shape[1]), scale.shape[::-1] if len({*scale.shape}) == 2 else (1,)]:
        with pytest.raises(PluginError, match="weight_scale_inv is not what"):
            require_shapes({"m.weight": weight, "m.weight_scale_inv": TensorFacts("F32", wrong)}, BLOCKS)


CODES = TensorFacts("F8_E4M3", (130, 64))
SCALES = TensorFacts("F32", (2, 1))
MATRIX_SCALE = TensorFacts("F32", (1,))


@pytest.mark.parametrize(
    ("weight", "scale_inv", "scale", "name", "found"),
    [
        (CODES, None, None, "weight", "F8_E4M3 [130, 64] without weight_scale_inv"),
        (CODES, None, MATRIX_SCALE, "weight", "F8_E4M3 [130, 64] without weight_scale_inv"),
        (None, None, MATRIX_SCALE, "weight_scale", "F32 [1]"),
        (None, SCALES, None, "weight", "missing"),
        (TensorFacts("BF16", (130, 64)), SCALES, None, "weight", "BF16 [130, 64]"),
        (TensorFacts("F8_E5M2", (130, 64)), SCALES, None, "weight", "F8_E5M2 [130, 64]"),
        (TensorFacts("F8_E4M3", (2, 130, 64)), SCALES, None, "weight", "F8_E4M3 [2, 130, 64]"),
        (CODES, TensorFacts("BF16", (2, 1)), None, "weight_scale_inv", "BF16 [2, 1]"),
        (CODES, TensorFacts("F8_E8M0", (2, 1)), None, "weight_scale_inv", "F8_E8M0 [2, 1]"),
        # What slime packed for DeepGEMM, and saved so up to its v0.3.1.
        (CODES, TensorFacts("I32", (130, 1)), None, "weight_scale_inv", "I32 [130, 1]"),
    ],
)
def test_tensors_that_are_not_as_declared_are_refused(
    weight: TensorFacts | None, scale_inv: TensorFacts | None, scale: TensorFacts | None, name: str, found: str
) -> None:
    given = {"m.weight": weight, "m.weight_scale_inv": scale_inv, "m.weight_scale": scale}
    with pytest.raises(PluginError, match=f"^m.{name} is not what config.json says") as error:
        require_shapes({name: facts for name, facts in given.items() if facts is not None}, BLOCKS)
    assert error.value.facts["found"] == found
    assert error.value.facts["expected"]
    assert "convert-fp8" in str(error.value.next)


# -- the scales -------------------------------------------------------------------------------------------------------


def test_float32_scales_under_ue8m0_are_refused(tmp_path: Path) -> None:
    """What slime's `--scale-fmt ue8m0` makes."""
    tensors = {**fp8({"a": (256, 256)}, POWERS), **fp8({"b": (256, 256)}, Format())}
    write(tmp_path, {"a.safetensors": tensors})
    with pytest.raises(
        PluginError, match="declares scale_fmt ue8m0, and the checkpoint has scales that are no"
    ) as error:
        check_scales(tmp_path, UE8M0)
    assert error.value.facts["scales"] == "b.weight_scale_inv"
    assert float(str(error.value.facts["found"])) in tensors["b.weight_scale_inv"].flatten().tolist()
    assert "convert-fp8" in str(error.value.next)
    check_scales(tmp_path, BLOCKS)


@settings(deadline=None, max_examples=30)
@given(exponent=st.integers(-140, 127), mantissa=st.sampled_from([1.0, 1.0, 1.5, 1 + 2**-23]))
def test_which_scales_ue8m0_can_hold(tmp_path_factory: pytest.TempPathFactory, exponent: int, mantissa: float) -> None:
    folder, scale = tmp_path_factory.mktemp("scales"), torch.tensor([[mantissa * 2.0**exponent]])
    write(
        folder, {"a.safetensors": {"m.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "m.weight_scale_inv": scale}}
    )
    if (mantissa == 1 and exponent >= -127) or (scale.frexp().mantissa.item() == 0.5 and exponent >= -127):
        check_scales(folder, UE8M0)
    else:
        with pytest.raises(PluginError, match="ue8m0"):
            check_scales(folder, UE8M0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("declared", [BLOCKS, UE8M0], ids=["float32", "ue8m0"])
def test_scales_that_are_no_factors_are_refused(tmp_path: Path, bad: float, declared: Declared) -> None:
    tensors = fp8({"a": (256, 256)}, POWERS)
    tensors["a.weight_scale_inv"][1, 0] = bad
    with pytest.raises(PluginError, match=r"a\.weight_scale_inv cannot be multiplied with") as error:
        check_scales(write(tmp_path, {"a.safetensors": tensors}), declared)
    assert str(error.value.facts["found"]) == str(bad)


def test_a_tile_of_zeros_that_became_nan_is_refused(tmp_path: Path) -> None:
    """`x / (amax / 448)` of zeros, as in slime's converter up to v0.3.1. A scale of zero alone does no harm."""
    tensors = fp8({"a": (256, 256)}, Format())
    tensors["a.weight_scale_inv"][1, 1] = 0
    tensors["a.weight"][128:, 128:] = 0
    check_scales(write(tmp_path / "zero", {"a.safetensors": tensors}), BLOCKS)
    tensors["a.weight"][128:, 128:] = float("nan")
    with pytest.raises(PluginError, match=r"a\.weight has NaN in place of zeros") as error:
        check_scales(write(tmp_path / "nan", {"a.safetensors": tensors}), BLOCKS)
    assert error.value.facts["found"] == "16384 NaN of 65536 weights"


def test_only_scales_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    read: list[str] = []
    opened = safetensors.safe_open

    class Recorded:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file = opened(*arguments, **options)

        def __enter__(self) -> Recorded:
            self.open = self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            read.append(name)
            return self.open.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Recorded)
    check_scales(write(tmp_path, {"a.safetensors": fp8(SHAPES, POWERS)}), UE8M0)
    assert read == [f"{name}.weight_scale_inv" for name in sorted(SHAPES)]


def test_a_tensor_that_the_index_has_and_no_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.safetensors": fp8(SHAPES, Format())})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["lost.weight"] = "a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PluginError, match="lacks tensors of the index") as error:
        check_scales(tmp_path, BLOCKS)
    assert error.value.facts["missing"] == "lost.weight"
