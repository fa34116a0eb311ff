"""BF16 to FP8 and back: what is quantised, what stays, what is refused, and that a stopped conversion goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import PluginError
from miles_plugins.checkpoints import read_header
from miles_plugins.conversion import RECORD, Converted
from miles_plugins.entrypoints.convert_bf16 import convert_bf16
from miles_plugins.entrypoints.convert_fp8 import convert_fp8
from miles_plugins.entrypoints.convert_int4 import convert_int4
from miles_plugins.fp8_unified import converter, selection
from miles_plugins.fp8_unified.blockwise import Format, dequantise, is_power_of_two, per_tensor, quantise_weight
from miles_plugins.fp8_unified.checkpoint import Declared, check_scales, matrices, quantised_modules, read_format
from miles_plugins.fp8_unified.converter import convert_to_bf16, convert_to_fp8

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from safetensors.torch import load_file  # noqa: E402

from tests.checkpoint_folders import (  # noqa: E402
    INDEX,
    Stopped,
    digests,
    equal,
    load,
    one,
    states,
    stop_after,
    weights,
    write,
)

LAYER = "model.layers.1."
FLOATS, POWERS = Format(), Format(scale="power_of_two")
both = pytest.mark.parametrize("format", [FLOATS, POWERS], ids=["float32", "power_of_two"])
QUANTISED = {
    **{f"{LAYER}mlp.experts.{i}.{name}_proj": (130, 257) for i in range(2) for name in ("gate", "up")},
    **{f"{LAYER}mlp.experts.{i}.down_proj": (257, 130) for i in range(2)},
    **{f"{LAYER}mlp.shared_expert.{name}_proj": (32, 64) for name in ("gate", "up")},
    **{f"model.layers.0.mlp.{name}_proj": (32, 64) for name in ("gate", "up", "down")},
    **{f"{LAYER}self_attn.{name}_proj": (128, 64) for name in "qkvo"},
    **{f"model.layers.0.self_attn.{name}": (128, 64) for name in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")},
    f"{LAYER}self_attn.indexer.wk": (64, 64),
    f"{LAYER}linear_attn.in_proj_z": (64, 64),
    "model.layers.2.mlp.experts.0.up_proj": (64, 64),  # of an MTP layer
}
PLAIN = {
    "lm_head": (96, 64),
    "model.embed_tokens": (96, 64),
    f"{LAYER}mlp.gate": (2, 64),
    f"{LAYER}mlp.shared_expert_gate": (1, 64),
    f"{LAYER}self_attn.indexer.weights_proj": (2, 64),
    f"{LAYER}linear_attn.in_proj_a": (2, 64),
    "model.layers.2.eh_proj": (64, 128),
    "visual.blocks.0.mlp.gate_proj": (32, 64),
}
OTHERS = {"model.norm": (64,), f"{LAYER}self_attn.q_norm": (64,), f"{LAYER}linear_attn.conv1d": (64, 1, 4)}
SHAPES = {**QUANTISED, **PLAIN, **OTHERS}
LEFT = {name for name in PLAIN if "embed" not in name} | {"visual", f"{LAYER}linear_attn.in_proj_ba"}


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    """Three files, and what lies beside them."""
    tensors = weights(SHAPES)
    tensors[f"{LAYER}mlp.gate.e_score_correction_bias"] = torch.randn(2)  # float32
    tensors[f"{LAYER}self_attn.q_proj.bias"] = torch.randn(128).bfloat16()
    tensors[f"{LAYER}mlp.experts.1.up_proj.weight"][:128, 128:256] = 0  # a tile of zeros
    names = sorted(tensors)
    shards = {f"model-{i}.safetensors": {name: tensors[name] for name in names[i::3]} for i in range(3)}
    folder = write(tmp_path / "bf16", shards, {"text_config": {"num_hidden_layers": 2}})
    (folder / "tokenizer.json").write_text("tokenizer.json")
    (folder / "pytorch_model.bin").write_text("not copied")
    return folder


# -- what is made -----------------------------------------------------------------------------------------------------


@both
def test_linear_layers_are_quantised_and_all_else_stays(bf16: Path, tmp_path: Path, format: Format) -> None:
    target = tmp_path / "new" / "fp8"
    done = convert_to_fp8(bf16, target, format)
    before, after = load(bf16), load(target)
    expected = {}
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if name == module or module not in QUANTISED:
            expected[name] = tensor
            continue
        expected[name], expected[f"{module}.weight_scale_inv"] = quantise_weight(tensor, format)
    assert set(after) == set(expected)
    assert [name for name in expected if not equal(after[name], expected[name])] == []
    assert {tensor.dtype for name, tensor in after.items() if name.endswith("_inv")} == {torch.float32}
    size = sum(tensor.nbytes for tensor in expected.values())
    assert done == Converted(len(QUANTISED), sum(tensor.nbytes for tensor in before.values()), size)
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"] == {"total_size": size}
    files = sorted(target.glob("*.safetensors"))
    assert index["weight_map"] == {name: file.name for file in files for name in read_header(file)}
    assert {file.name for file in target.iterdir()} == {
        *(f"model-{i}.safetensors" for i in range(3)),
        *("tokenizer.json", INDEX, "config.json", RECORD),
    }


@both
def test_what_is_made_is_what_is_read(bf16: Path, tmp_path: Path, format: Format) -> None:
    convert_to_fp8(bf16, tmp_path / "fp8", format)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert read_format(config) == Declared(format, tuple(sorted(LEFT)))
    check_scales(tmp_path / "fp8", Declared(format))
    assert quantised_modules(tmp_path / "fp8") == {*QUANTISED}
    assert matrices(tmp_path / "fp8") == {*QUANTISED, *PLAIN}
    quantization = config.pop("quantization_config")
    assert config == json.loads((bf16 / "config.json").read_text())
    assert quantization.pop("scale_fmt", None) == ("ue8m0" if format.scale == "power_of_two" else None)
    assert quantization == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": sorted(LEFT),
    }


def test_the_lists_of_a_checkpoint_agree(bf16: Path, tmp_path: Path) -> None:
    """Converter, index and SGLang; and one entry of a list that drifts is found."""
    convert_to_fp8(bf16, tmp_path / "fp8")
    declared = read_format(json.loads((tmp_path / "fp8" / "config.json").read_text()))
    assert declared is not None
    modules = matrices(tmp_path / "fp8")
    sets = {"converter": selection.selected(modules), "checkpoint": quantised_modules(tmp_path / "fp8")}
    for matching in ("substring", "module path"):
        engine = selection.in_engine(modules, declared.not_converted, matching)
        assert selection.compare({**sets, "SGLang": engine.fp8}) == []
    drifted = selection.in_engine(modules, [*declared.not_converted, f"{LAYER}self_attn.o_proj"])
    assert selection.compare({**sets, "SGLang": drifted.fp8}) == [
        selection.Difference(f"{LAYER}self_attn.o_proj", ("converter", "checkpoint"), ("SGLang",))
    ]


def test_layers_may_stay(bf16: Path, tmp_path: Path) -> None:
    convert_to_fp8(bf16, tmp_path / "start", bf16_at_start=1)
    assert quantised_modules(tmp_path / "start") == {name for name in QUANTISED if ".layers.0." not in name}
    convert_to_fp8(bf16, tmp_path / "end", bf16_at_end=1)
    kept = {name for name in QUANTISED if LAYER in name}
    assert quantised_modules(tmp_path / "end") == {*QUANTISED} - kept  # the MTP layer is not the last one
    config = json.loads((tmp_path / "end" / "config.json").read_text())
    fused = {f"{LAYER}self_attn.qkv_proj", f"{LAYER}mlp.shared_expert.gate_up_proj"}
    fused |= {f"{LAYER}linear_attn.in_proj_qkvz"}
    assert {*config["quantization_config"]["modules_to_not_convert"]} == LEFT | kept | fused


@st.composite
def any_weight(draw: st.DrawFn) -> torch.Tensor:
    """Up to [140, 140] bfloat16: normal, ties, sparse, of all sizes."""
    rows, columns = draw(st.sampled_from([(1, 1), (3, 140), (140, 3), (129, 128), (140, 140)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "wide", "ties", "zeros"]))
    if kind == "ties":
        return (torch.randint(-448, 449, (rows, columns), generator=generator) * 2.0**-6).bfloat16()
    found = torch.randn(rows, columns, generator=generator) * 2.0 ** draw(st.integers(-60, 60))
    if kind == "wide":
        found *= 2.0 ** torch.randint(-20, 20, (rows, columns), generator=generator)
    return (found * (torch.rand(rows, columns, generator=generator) < (0.02 if kind == "zeros" else 1))).bfloat16()


@settings(deadline=None, max_examples=25)
@given(any_weight(), st.sampled_from([FLOATS, POWERS]))
def test_back_and_forth(tmp_path_factory: pytest.TempPathFactory, weight: torch.Tensor, format: Format) -> None:
    """bf16 -> fp8 -> bf16 -> fp8: the values are the engine's, rounded once, and the second files equal the first.

    With powers of two a code and its scale may both move by a factor of two, once: where rounding took a tile's largest
    code to half of what E4M3 can hold. The values are the same ones.
    """
    folder, name = tmp_path_factory.mktemp("models"), "a.experts.7.w2.weight"
    one(folder / "0", name, weight)
    convert_to_fp8(folder / "0", folder / "1", format)
    convert_to_bf16(folder / "1", folder / "2")
    quantised = quantise_weight(weight, format)
    assert equal(load(folder / "2")[name], dequantise(quantised, format).bfloat16())
    convert_to_fp8(folder / "2", folder / "3", format)
    if format is FLOATS:
        assert digests(folder / "3") == digests(folder / "1")
    convert_to_bf16(folder / "3", folder / "4")
    assert digests(folder / "4") == digests(folder / "2")
    convert_to_fp8(folder / "4", folder / "5", format)
    assert digests(folder / "5") == digests(folder / "3")


@both
def test_back_to_bf16(bf16: Path, tmp_path: Path, format: Format) -> None:
    convert_to_fp8(bf16, tmp_path / "fp8", format)
    done = convert_to_bf16(tmp_path / "fp8", tmp_path / "back")
    before, after = load(bf16), load(tmp_path / "back")
    assert set(after) == set(before)
    for name, tensor in before.items():
        fp8 = name.endswith(".weight") and name[:-7] in QUANTISED
        expected = dequantise(quantise_weight(tensor, format), format).bfloat16() if fp8 else tensor
        assert equal(after[name], expected), name
    assert after[f"{LAYER}mlp.experts.1.up_proj.weight"][:128, 128:256].eq(0).all()
    assert done.weights == len(QUANTISED)
    assert done.bytes_after == sum(tensor.nbytes for tensor in before.values())
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index == {**json.loads((bf16 / INDEX).read_text()), "metadata": {"total_size": done.bytes_after}}
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((bf16 / "config.json").read_text())


def fp8(folder: Path, in_text: bool = False, matrix: bool = False, more: Any = None, **changes: Any) -> Path:
    """An FP8 checkpoint of another tool: the scales in a file of their own."""
    weight = weights({"m.experts.0.up_proj": (130, 200)})["m.experts.0.up_proj.weight"]
    codes, scale = per_tensor(weight) if matrix else quantise_weight(weight, FLOATS)
    tensors = {".weight": codes, ".weight_scale" if matrix else ".weight_scale_inv": scale}
    tensors |= {f".{name}": tensor for name, tensor in changes.items()}
    named = {f"m.experts.0.up_proj{end}": tensor for end, tensor in tensors.items() if tensor is not None}
    first = {name: tensor for name, tensor in named.items() if "scale" in name}
    second = {name: tensor for name, tensor in named.items() if name not in first} | {"lm_head.weight": torch.ones(4)}
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    quantization |= {} if matrix else {"weight_block_size": [128, 128]}
    config = {"quantization_config": {**quantization, **(more or {})}}
    config = {"text_config": {"x": 1, **config}} if in_text else config
    return write(folder, {"a.safetensors": first, "b.safetensors": second}, config)


@pytest.mark.parametrize("in_text", [False, True])
@pytest.mark.parametrize("matrix", [False, True])
def test_other_tools_checkpoints(tmp_path: Path, in_text: bool, matrix: bool) -> None:
    convert_to_bf16(fp8(tmp_path / "fp8", in_text, matrix), tmp_path / "bf16")
    after = load_file(tmp_path / "bf16" / "b.safetensors")
    assert set(after) == {"m.experts.0.up_proj.weight", "lm_head.weight"}
    weight = weights({"m.experts.0.up_proj": (130, 200)})["m.experts.0.up_proj.weight"]
    quantised = per_tensor(weight) if matrix else quantise_weight(weight, FLOATS)
    expected = dequantise(quantised, FLOATS).bfloat16()
    assert equal(after["m.experts.0.up_proj.weight"], expected)
    assert load_file(tmp_path / "bf16" / "a.safetensors") == {}
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config == {"model_type": "qwen3_moe", **({"text_config": {"x": 1}} if in_text else {})}


def test_false_powers_of_two_can_be_mended(tmp_path: Path) -> None:
    """A checkpoint of slime's `--scale-fmt ue8m0`: by way of BF16 it becomes what it says it is."""
    source = fp8(tmp_path / "fp8", more={"scale_fmt": "ue8m0"})
    with pytest.raises(PluginError, match="ue8m0"):
        check_scales(source, Declared(POWERS))
    convert_to_bf16(source, tmp_path / "bf16")
    convert_to_fp8(tmp_path / "bf16", tmp_path / "mended", POWERS)
    check_scales(tmp_path / "mended", Declared(POWERS))
    assert is_power_of_two(load(tmp_path / "mended")["m.experts.0.up_proj.weight_scale_inv"])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "message", "advice"),
    [
        ("experts.0.up_proj.weight", torch.ones(2, 64), "experts.0.up_proj.weight is not bfloat16", "bf16"),
        ("experts.gate_up_proj", torch.ones(2, 64, 64), "gate_up_proj holds several experts", "save_original_format"),
        ("experts.w2.weight", torch.ones(2, 64, 64), "w2.weight holds several experts", "save_original_format"),
        ("experts.0.w2.weight", torch.ones(1, 2, 64).bfloat16(), "w2.weight holds several", "save_original_format"),
        ("gate.weight", torch.ones(2, 64).bfloat16(), "nothing of .* would be quantised", "of these names"),
        ("up_proj.weight_scale_inv", torch.ones(1, 1), "is quantised already", "convert-bf16"),
        ("up_proj.weight_scale", torch.ones(1), "is quantised already", "convert-bf16"),
    ],
)
def test_what_cannot_be_quantised_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str, advice: str
) -> None:
    source = one(tmp_path / "bf16", f"model.layers.0.mlp.{name}", tensor)
    with pytest.raises(PluginError, match=message) as error:
        convert_to_fp8(source, tmp_path / "fp8")
    assert advice in str(error.value.next)
    assert not (tmp_path / "fp8").exists()


@pytest.mark.parametrize("where", ["top", "text_config"])
def test_a_quantised_source_is_refused(tmp_path: Path, where: str) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    more = config if where == "top" else {where: config}
    source = one(tmp_path / "fp8", "a.experts.0.w1.weight", torch.ones(2, 64).bfloat16(), **more)
    with pytest.raises(PluginError, match="is quantised already") as error:
        convert_to_fp8(source, tmp_path / "again")
    assert error.value.facts["found"] == "fp8"


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: str) -> None:
    weight = torch.ones(2, 64).bfloat16()
    weight[1, 3] = float(bad)
    with pytest.raises(PluginError, match=r"a\.experts\.0\.w1\.weight has values that are not finite") as error:
        convert_to_fp8(one(tmp_path / "bf16", "a.experts.0.w1.weight", weight), tmp_path / "fp8")
    assert error.value.facts["found"] == f"{bad} at [1, 3]"
    assert [file.name for file in (tmp_path / "fp8").iterdir()] == [RECORD]


def test_another_block_is_refused(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="this block size cannot be served"):
        convert_to_fp8(bf16, tmp_path / "fp8", Format((64, 64)))


def test_layers_that_all_stay_are_refused(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    source = one(tmp_path / "x", "model.layers.0.mlp.up_proj.weight", torch.ones(2, 2).bfloat16(), num_hidden_layers=1)
    with pytest.raises(PluginError, match=r"nothing of .* would be quantised") as error:
        convert_to_fp8(source, tmp_path / "fp8", bf16_at_start=1, bf16_at_end=0)
    assert error.value.facts["kept in BF16"] == "1 at the start, 0 at the end"
    assert error.value.next == "keep fewer layers in BF16"
    source = one(tmp_path / "x", "model.layers.0.mlp.up_proj.weight", torch.ones(2, 2).bfloat16())
    with pytest.raises(PluginError, match="how many layers"):
        convert_to_fp8(source, tmp_path / "fp8", bf16_at_start=1)


def test_a_list_that_sglang_would_read_otherwise_is_refused(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = selection.names_to_leave_out
    monkeypatch.setattr(converter, "names_to_leave_out", lambda *sets: (*names(*sets), f"{LAYER}self_attn.q_proj"))
    with pytest.raises(PluginError, match="SGLang would not take the same weights") as error:
        convert_to_fp8(bf16, tmp_path / "fp8")
    parts = ", ".join(f"{LAYER}self_attn.{name}_proj" for name in "kqv")
    assert error.value.facts["FP8 only by this checkpoint, SGLang 0.5.9"] == f"3: {parts}"
    assert error.value.facts["fused in SGLang, FP8 in part"] == f"{LAYER}self_attn.qkv_proj"
    monkeypatch.setattr(converter, "names_to_leave_out", lambda *sets: (*names(*sets), "mlp.shared_experts.up"))
    convert_to_fp8(bf16, tmp_path / "fp8")  # matches nothing
    monkeypatch.setattr(converter, "names_to_leave_out", lambda *sets: (*names(*sets), "layers.0.mlp.gate"))
    with pytest.raises(PluginError, match="SGLang would not take the same weights") as error:
        convert_to_fp8(bf16, tmp_path / "other")
    assert next(iter(error.value.facts)) == "FP8 only by this checkpoint, SGLang"  # not 0.5.9


@pytest.mark.parametrize(
    ("changes", "name", "found"),
    [
        ({"weight_scale_inv": None}, "weight", "F8_E4M3 [130, 200] without weight_scale_inv"),
        ({"weight_scale_inv": torch.ones(2, 1)}, "weight_scale_inv", "F32 [2, 1]"),
        ({"weight_scale_inv": torch.ones(2, 2).bfloat16()}, "weight_scale_inv", "BF16 [2, 2]"),
        ({"weight": torch.ones(130, 200).bfloat16()}, "weight", "BF16 [130, 200]"),
        ({"weight": None}, "weight", "missing"),
    ],
)
def test_tensors_that_are_not_as_declared_are_refused(
    tmp_path: Path, changes: dict[str, Any], name: str, found: str
) -> None:
    with pytest.raises(PluginError, match=f"up_proj.{name} is not what config.json says") as error:
        convert_to_bf16(fp8(tmp_path / "fp8", **changes), tmp_path / "bf16")
    assert error.value.facts["found"] == found
    assert not (tmp_path / "bf16").exists()


def test_nan_is_not_dequantised(tmp_path: Path) -> None:
    """A tile of zeros of slime's converter up to v0.3.1."""
    codes = torch.full((130, 200), float("nan")).to(torch.float8_e4m3fn)
    with pytest.raises(PluginError, match=r"up_proj\.weight has values that are not finite"):
        convert_to_bf16(fp8(tmp_path / "fp8", weight=codes), tmp_path / "bf16")


def test_what_is_not_fp8_is_not_dequantised(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="is not quantised"):
        convert_to_bf16(bf16, tmp_path / "back")
    with pytest.raises(PluginError, match=r"nothing of .* is quantised"):
        convert_to_bf16(fp8(tmp_path / "fp8", weight=None, weight_scale_inv=None), tmp_path / "back")
    with pytest.raises(PluginError, match="quantised in a way that FP8 training"):
        convert_to_bf16(fp8(tmp_path / "other", more={"weight_block_size": [64, 64]}), tmp_path / "back")


# -- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, len(SHAPES) // 2, len(SHAPES)])
@pytest.mark.parametrize("back", [False, True])
def test_a_stopped_conversion_goes_on(bf16: Path, tmp_path: Path, calls: int, back: bool) -> None:
    convert: Callable[..., Converted] = lambda target, progress=None: convert_to_fp8(  # noqa: E731
        bf16, target, progress=progress
    )
    if back:
        convert_to_fp8(bf16, tmp_path / "fp8")
        convert = lambda target, progress=None: convert_to_bf16(tmp_path / "fp8", target, progress)  # noqa: E731
    target, whole = tmp_path / "stopped", tmp_path / "whole"
    with pytest.raises(Stopped):
        convert(target, stop_after(calls))
    kept = states(target)
    assert len(kept) < 3
    assert not (target / "config.json").exists()  # no model yet
    (target / "model-2.safetensors.partial").write_text("of a process that was killed")
    made: list[tuple[int, int]] = []
    done = convert(target, lambda *numbers: made.append(numbers))
    assert states(target).items() >= kept.items()  # not written again
    assert made == sorted(made)
    assert made[-1] == (done.bytes_before, done.bytes_before)
    assert convert(whole) == done
    assert digests(target) == digests(whole)
    for name in (INDEX, "config.json", RECORD):
        assert (target / name).read_text() == (whole / name).read_text()
    assert {file.name for file in target.iterdir()} == {file.name for file in whole.iterdir()}


def test_a_target_of_another_conversion_is_refused(bf16: Path, tmp_path: Path) -> None:
    target = tmp_path / "fp8"
    with pytest.raises(Stopped):
        convert_to_fp8(bf16, target, progress=stop_after(20))
    for other, differs in (
        (lambda: convert_to_fp8(bf16, target, POWERS), "scale"),
        (lambda: convert_to_fp8(bf16, target, bf16_at_start=1), "not quantised"),
        (lambda: convert_to_bf16(fp8(tmp_path / "other"), target), "to"),
    ):
        with pytest.raises(PluginError, match="begun as another conversion") as error:
            other()
        assert error.value.facts["differs"] == differs


# -- the commands -----------------------------------------------------------------------------------------------------


def test_the_commands_convert_there_and_back(bf16: Path, tmp_path: Path) -> None:
    there = ["--from", str(bf16), "--to", str(tmp_path / "fp8")]
    done = CliRunner().invoke(convert_fp8, [*there, "--scale", "power-of-two"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == f"{len(QUANTISED)} weights quantised in tiles of 128 x 128, with power-of-two scales"
    assert "times smaller" in lines[1]
    flags = f"--plugins fp8 --hf-checkpoint {tmp_path / 'fp8'}"
    assert lines[2:] == [f"next: train on it, `slime-train {flags} …`, or serve it with SGLang"]
    assert read_format(json.loads((tmp_path / "fp8" / "config.json").read_text())) == Declared(
        POWERS, tuple(sorted(LEFT))
    )
    done = CliRunner().invoke(convert_bf16, ["--from", str(tmp_path / "fp8"), "--to", str(tmp_path / "back")])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{len(QUANTISED)} weights unpacked\n")
    assert "times larger" in done.stdout
    assert done.stdout.endswith("or convert it again with `miles-plugins convert-fp8`\n")
    assert load(tmp_path / "back").keys() == load(bf16).keys()


@pytest.mark.parametrize(("start", "end", "experts"), [(1, 0, False), (0, 1, True)])
def test_the_command_says_how_to_train_with_layers_in_bf16(
    bf16: Path, tmp_path: Path, start: int, end: int, experts: bool
) -> None:
    layers = ["--keep-bf16-layers-at-start", str(start), "--keep-bf16-layers-at-end", str(end)]
    done = CliRunner().invoke(convert_fp8, ["--from", str(bf16), "--to", str(tmp_path / "fp8"), *layers])
    assert done.exit_code == 0, done.output
    flags = f"--num-layers-at-start-in-bf16 {start} --num-layers-at-end-in-bf16 {end}"
    assert f"(--fp8-train te) they are --first-last-layers-bf16 {flags}\n" in done.stdout
    assert ("0.5.9 cannot" in done.stdout) == experts
    assert 0 < len(quantised_modules(tmp_path / "fp8")) < len(QUANTISED)


def test_a_checkpoint_goes_back_by_what_it_says(tmp_path: Path) -> None:
    source = one(tmp_path / "bf16", "a.experts.0.w1.weight", torch.ones(2, 128).bfloat16())
    done = CliRunner().invoke(convert_int4, ["--from", str(source), "--to", str(tmp_path / "int4")])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(convert_bf16, ["--from", str(tmp_path / "int4"), "--to", str(tmp_path / "back")])
    assert done.stdout.endswith("or convert it again with `miles-plugins convert-int4`\n")
    assert load(tmp_path / "back")["a.experts.0.w1.weight"].shape == (2, 128)


@pytest.mark.parametrize(
    ("quantization", "found"),
    [({"quant_method": "mxfp8"}, "mxfp8"), ({"quant_algo": "FP8"}, "missing"), (["fp8"], "['fp8']"), (None, "is not")],
)
def test_the_command_refuses_what_it_cannot_undo(tmp_path: Path, quantization: Any, found: str) -> None:
    name = "a.experts.0.w1.weight"
    source = one(tmp_path / "x", name, torch.ones(2, 128).bfloat16(), quantization_config=quantization)
    done = CliRunner().invoke(convert_bf16, ["--from", str(source), "--to", str(tmp_path / "back")])
    assert done.exit_code == 1
    assert found in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "back").exists()


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    source = one(tmp_path / "bf16", "a.experts.0.w1.weight", torch.ones(2, 128))
    done = CliRunner().invoke(convert_fp8, ["--from", str(source), "--to", str(tmp_path / "fp8")])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: a.experts.0.w1.weight is not bfloat16\n")
    assert done.stdout == ""
