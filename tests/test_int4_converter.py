"""BF16 to INT4 and back: what is packed, what stays, what is refused, and that a stopped conversion goes on."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import PluginError, conversion
from miles_plugins.checkpoints import read_header
from miles_plugins.conversion import RECORD, Converted
from miles_plugins.embedded.hugging_face import check_model_folder
from miles_plugins.entrypoints import convert_int4 as command
from miles_plugins.entrypoints.conversions import sizes
from miles_plugins.entrypoints.convert_bf16 import convert_bf16
from miles_plugins.int4_qat import converter, selection
from miles_plugins.int4_qat.checkpoint import Format, packed_modules, read_format
from miles_plugins.int4_qat.converter import DEFAULT_IGNORE, convert_to_bf16, convert_to_int4
from miles_plugins.int4_qat.grid import Grid, Quantised, dequantise, fake_quantise, pack, quantise, unpack

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from safetensors.torch import load_file  # noqa: E402

from tests.checkpoint_folders import (  # noqa: E402
    INDEX,
    Stopped,
    Tensors,
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
GRID = Grid(32)
EXPERTS = {
    **{f"{LAYER}mlp.experts.{i}.{name}_proj": shape for i in range(2) for name, shape in [("gate", (32, 64))]},
    **{f"{LAYER}mlp.experts.{i}.{name}": (32, 64) for i in range(2) for name in ("up_proj", "w1", "w3")},
    **{f"{LAYER}mlp.experts.{i}.{name}": (64, 32) for i in range(2) for name in ("down_proj", "w2")},
}
SHARED = {f"{LAYER}mlp.shared_expert.{name}_proj": (32, 64) for name in ("gate", "up")} | {
    f"{LAYER}mlp.shared_experts.down_proj": (64, 32)
}
DENSE = {f"model.layers.0.mlp.{name}_proj": (32, 64) for name in ("gate", "up")}
ATTENTION = {f"{LAYER}self_attn.{name}_proj": (64, 64) for name in "qkvo"}
NEVER = {
    "lm_head": (96, 64),
    "model.embed_tokens": (96, 64),
    "model.norm": (64,),
    f"{LAYER}mlp.gate": (2, 64),
    f"{LAYER}mlp.shared_expert_gate": (1, 64),
    f"{LAYER}self_attn.kv_b_proj": (64, 64),
    f"{LAYER}self_attn.q_norm": (64,),
    f"{LAYER}linear_attn.conv1d": (64, 1, 4),
    f"{LAYER}linear_attn.in_proj_qkvz": (64, 64),
    f"{LAYER}eh_proj": (64, 128),
    "visual.blocks.0.mlp.gate_proj": (32, 64),
    "model.visual.blocks.0.mlp.up_proj": (32, 64),
    "vision_tower.layers.0.self_attn.q_proj": (64, 64),
}
SHAPES = {**EXPERTS, **SHARED, **DENSE, **ATTENTION, **NEVER}


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    """Three files, and what lies beside them."""
    tensors = weights(SHAPES)
    tensors[f"{LAYER}mlp.gate.e_score_correction_bias"] = torch.randn(2)  # float32
    names = sorted(tensors)
    shards = {f"model-{i}.safetensors": {name: tensors[name] for name in names[i::3]} for i in range(3)}
    folder = write(tmp_path / "bf16", shards, {"text_config": {"hidden_size": 64}})
    for other in ("tokenizer.json", "modeling_own.py"):
        (folder / other).write_text(other)
    for other in ("pytorch_model.bin", "optimizer.pt", "pytorch_model.bin.index.json", "consolidated.safetensors"):
        (folder / other).write_text("not copied")
    (folder / ".cache").mkdir()
    return folder


# -- what is made -----------------------------------------------------------------------------------------------------


def test_experts_are_packed_and_all_else_stays(bf16: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "int4"
    done = convert_to_int4(bf16, target, GRID)
    assert packed_modules(target) == set(EXPERTS)
    before = {name: tensor for i in range(3) for name, tensor in load_file(bf16 / f"model-{i}.safetensors").items()}
    after = load(target)
    expected = {}
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module not in EXPERTS:
            expected[name] = tensor
            continue
        codes, scale = quantise(tensor, GRID)
        shape = torch.tensor(tensor.shape, dtype=torch.int64)
        made = {"packed": pack(codes), "scale": scale, "shape": shape}
        expected |= {f"{module}.weight_{each}": tensor for each, tensor in made.items()}
    assert set(after) == set(expected)
    assert [name for name in expected if not equal(after[name], expected[name])] == []
    size = sum(tensor.nbytes for tensor in expected.values())
    assert done == Converted(len(EXPERTS), sum(tensor.nbytes for tensor in before.values()), size)

    index = json.loads((target / INDEX).read_text())
    assert index["metadata"] == {"total_size": size}
    assert index["weight_map"] == {
        name: file.name for file in target.glob("*.safetensors") for name in read_header(file)
    }
    files = {f"model-{i}.safetensors" for i in range(3)} | {"tokenizer.json", "modeling_own.py"}
    assert {file.name for file in target.iterdir()} == files | {INDEX, "config.json", RECORD}
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
    modes = {file.stat().st_mode for file in target.iterdir()}
    assert modes == {(bf16 / "config.json").stat().st_mode}  # others can read them, too


def test_the_config_says_what_is_packed(bf16: Path, tmp_path: Path) -> None:
    convert_to_int4(bf16, tmp_path / "int4", Grid(32, "snapped"))
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    left = sorted(name for name, shape in SHAPES.items() if len(shape) == 2 and name not in EXPERTS)
    assert read_format(config) == Format(32, tuple(left))
    assert config.pop("quantization_config") == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                    "actorder": None,
                    "observer": "minmax",
                },
            }
        },
        "ignore": left,
    }
    assert config == json.loads((bf16 / "config.json").read_text())


def test_a_tied_head_is_ignored(tmp_path: Path) -> None:
    """No tensor of the file, and a linear layer of the model that an engine would take for packed."""
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    convert_to_int4(one(tmp_path / "bf16", name, torch.ones(8, 32).bfloat16()), tmp_path / "int4", GRID)
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("modules", "packed"),
    [
        (["shared-experts"], {*SHARED}),
        (["mlp"], {*DENSE}),
        (["attention"], {*ATTENTION}),
        (["experts", "mlp", "shared-experts", "attention"], {*EXPERTS, *SHARED, *DENSE, *ATTENTION}),
    ],
)
def test_modules_widen_what_is_packed(bf16: Path, tmp_path: Path, modules: list[str], packed: set[str]) -> None:
    done = convert_to_int4(bf16, tmp_path / "int4", GRID, modules=modules)
    assert packed_modules(tmp_path / "int4") == packed
    assert done.weights == len(packed)
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert not packed & {*config["quantization_config"]["ignore"]}


def test_ignored_modules_are_left_out(bf16: Path, tmp_path: Path) -> None:
    rules = (*DEFAULT_IGNORE, f"{LAYER}mlp.experts.0", r"re:.*\.w2")
    convert_to_int4(bf16, tmp_path / "int4", GRID, rules)
    kept = {name for name in EXPERTS if ".experts.1." in name and not name.endswith("w2")}
    assert packed_modules(tmp_path / "int4") == kept


@st.composite
def any_weight(draw: st.DrawFn) -> torch.Tensor:
    """[3, 128] bfloat16: any finite bits, ties, tiny values, zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["bits", "normal", "ties", "zeros"]))
    if kind == "bits":
        words = torch.randint(-(2**15), 2**15, (3, 128), generator=generator).to(torch.int16).view(torch.bfloat16)
        return torch.where(words.abs() < 2.0**120, words, 1)
    if kind == "ties":
        return (torch.randint(-14, 15, (3, 128), generator=generator) / 14).bfloat16()
    found = torch.randn(3, 128, generator=generator) * 2.0 ** draw(st.integers(-30, 10))
    return (found * (torch.rand(3, 128, generator=generator) < (0.05 if kind == "zeros" else 1))).bfloat16()


@settings(deadline=None, max_examples=40)
@given(any_weight(), st.sampled_from([32, 64, 128]), st.sampled_from(["stock", "snapped"]))
def test_back_and_forth_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, weight: torch.Tensor, size: int, kind: Any
) -> None:
    """bf16 -> int4 -> bf16 -> int4: the values are the grid's, and the second files equal the first, byte for byte."""
    folder, grid, name = tmp_path_factory.mktemp("models"), Grid(size, kind), "a.experts.7.w2.weight"
    one(folder / "0", name, weight)
    convert_to_int4(folder / "0", folder / "1", grid)
    convert_to_bf16(folder / "1", folder / "2")
    assert equal(load(folder / "2")[name], fake_quantise(weight, grid))
    convert_to_int4(folder / "2", folder / "3", grid)
    codes = quantise(weight, grid).codes.unflatten(-1, (-1, size))
    if codes.ne(0).any(-1).all():  # a group that becomes zeros has the smallest scale
        assert digests(folder / "3") == digests(folder / "1")
    convert_to_bf16(folder / "3", folder / "4")
    assert digests(folder / "4") == digests(folder / "2")
    packed = "a.experts.7.w2.weight_packed"
    assert equal(load(folder / "1")[packed], load(folder / "3")[packed])


def test_back_to_bf16(bf16: Path, tmp_path: Path) -> None:
    convert_to_int4(bf16, tmp_path / "int4", GRID)
    done = convert_to_bf16(tmp_path / "int4", tmp_path / "back")
    before = {name: tensor for i in range(3) for name, tensor in load_file(bf16 / f"model-{i}.safetensors").items()}
    after = load(tmp_path / "back")
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert equal(after[name], fake_quantise(tensor, GRID) if name[:-7] in EXPERTS else tensor), name
    assert done.weights == len(EXPERTS)
    assert done.bytes_after == sum(tensor.nbytes for tensor in before.values())
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["metadata"]["total_size"] == done.bytes_after
    assert index["weight_map"] == json.loads((bf16 / INDEX).read_text())["weight_map"]
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((bf16 / "config.json").read_text())
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "back" / RECORD).read_text())["to"] == "bf16"


def int4(folder: Path, config_in_text: bool = False, **changes: Any) -> Path:
    """An INT4 checkpoint of another tool: int32 shapes, and a module's tensors in two files."""
    module, weight = "m.experts.0.up_proj", torch.arange(-64, 64).bfloat16().view(2, 64)
    codes, scale = quantise(weight, GRID)
    tensors = {".weight_packed": pack(codes), ".weight_scale": scale, ".weight_shape": torch.tensor([2, 64]).int()}
    tensors |= {f".weight_{name}": tensor for name, tensor in changes.items()}
    named = {module + suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}
    first = {name: named[name] for name in named if name.endswith("scale")} | {"lm_head.weight": torch.ones(4)}
    second = {name: named[name] for name in named if name not in first}
    quantization = converter.ToInt4(GRID, frozenset(), ()).config({})
    return write(
        folder,
        {"a.safetensors": first, "b.safetensors": second},
        {"text_config": {"x": 1, **quantization}} if config_in_text else quantization,
    )


@pytest.mark.parametrize("config_in_text", [False, True])
def test_a_module_may_lie_in_two_files(tmp_path: Path, config_in_text: bool) -> None:
    convert_to_bf16(int4(tmp_path / "int4", config_in_text), tmp_path / "bf16")
    weight = torch.arange(-64, 64).bfloat16().view(2, 64)
    after = load_file(tmp_path / "bf16" / "b.safetensors")
    assert list(after) == ["m.experts.0.up_proj.weight"]
    assert equal(after["m.experts.0.up_proj.weight"], fake_quantise(weight, GRID))
    assert list(load_file(tmp_path / "bf16" / "a.safetensors")) == ["lm_head.weight"]
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config == {"model_type": "qwen3_moe", **({"text_config": {"x": 1}} if config_in_text else {})}


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "message", "advice"),
    [
        ("experts.0.up_proj.weight", torch.ones(2, 64), "experts.0.up_proj.weight is not bfloat16", "bf16"),
        ("experts.0.w1.weight", torch.ones(2, 48).bfloat16(), "w1.weight cannot be quantised in groups", "--modules"),
        ("experts.gate_up_proj", torch.ones(2, 64, 64), "gate_up_proj holds several experts", "save_original_format"),
        ("experts.w2.weight", torch.ones(2, 64, 64), "w2.weight holds several experts", "save_original_format"),
        ("experts.0.w2.weight", torch.ones(1, 2, 64).bfloat16(), "w2.weight holds several", "save_original_format"),
        ("mlp.up_proj.weight", torch.ones(2, 64).bfloat16(), "nothing of .* would be packed", "--modules"),
        ("experts.0.w1.weight_packed", torch.ones(2, 8).int(), "is quantised already", "convert-bf16"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str, advice: str
) -> None:
    source = one(tmp_path / "bf16", f"model.layers.0.mlp.{name}", tensor)
    with pytest.raises(PluginError, match=message) as error:
        convert_to_int4(source, tmp_path / "int4", GRID)
    assert advice in str(error.value.next)
    assert not (tmp_path / "int4").exists()


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        ((192, 192), "--group-size 64 or 32"),
        ((192, 96), "--group-size 32"),
        ((192, 1408), "--group-size 64 or 32"),  # Moonlight's experts
        ((192, 48), "with --modules"),
    ],
)
def test_it_is_said_which_groups_would_fit(tmp_path: Path, columns: tuple[int, int], advice: str) -> None:
    experts = {f"m.experts.{i}.w1.weight": torch.ones(2, k).bfloat16() for i, k in enumerate(columns)}
    with pytest.raises(PluginError, match="cannot be quantised in groups of 128") as error:
        convert_to_int4(write(tmp_path / "bf16", {"model.safetensors": experts}), tmp_path / "int4", Grid(128))
    assert f"{advice}:" in str(error.value.next)


@pytest.mark.parametrize("where", ["top", "text_config"])
def test_a_quantised_source_is_refused(tmp_path: Path, where: str) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    source = one(tmp_path / "fp8", "a.experts.0.w1.weight", torch.ones(2, 64).bfloat16())
    one(source, "a.experts.0.w1.weight", torch.ones(2, 64), **(config if where == "top" else {where: config}))
    with pytest.raises(PluginError, match="is quantised already") as error:
        convert_to_int4(source, tmp_path / "int4", GRID)
    assert error.value.facts["found"] == "fp8"


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: str) -> None:
    weight = torch.ones(2, 64).bfloat16()
    weight[1, 3] = float(bad)
    with pytest.raises(PluginError, match=r"a\.experts\.0\.w1\.weight has values that are not finite") as error:
        convert_to_int4(one(tmp_path / "bf16", "a.experts.0.w1.weight", weight), tmp_path / "int4", GRID)
    assert error.value.facts["found"] == f"{bad} at [1, 3]"
    assert [file.name for file in (tmp_path / "int4").iterdir()] == [RECORD]


@pytest.mark.parametrize("modules", [[], ["router"], ["experts", "lm_head"]])
def test_unknown_modules_are_refused(bf16: Path, tmp_path: Path, modules: list[str]) -> None:
    with pytest.raises(PluginError, match="no such modules") as error:
        convert_to_int4(bf16, tmp_path / "int4", GRID, modules=modules)
    assert error.value.facts["expected"] == "experts, shared-experts, mlp, attention"


def test_a_source_that_lacks_something_is_refused(bf16: Path, tmp_path: Path) -> None:
    index = json.loads((bf16 / INDEX).read_text())
    index["weight_map"]["model.lost.weight"] = "model-1.safetensors"
    (bf16 / INDEX).write_text(json.dumps(index))
    with pytest.raises(PluginError, match="lacks tensors of the index") as error:
        convert_to_int4(bf16, tmp_path / "int4", GRID)
    assert error.value.facts["missing"] == "model.lost.weight"
    (bf16 / "model-0.safetensors").unlink()
    with pytest.raises(PluginError, match=r"cannot read .*model-0"):
        convert_to_int4(bf16, tmp_path / "int4", GRID)
    (bf16 / "config.json").unlink()
    with pytest.raises(PluginError, match=r"no config\.json"):
        convert_to_int4(bf16, tmp_path / "int4", GRID)


@pytest.mark.parametrize(
    ("changes", "suffix", "found"),
    [
        ({"scale": None}, "weight_scale", "missing"),
        ({"shape": None}, "weight_shape", "missing"),
        ({"scale": torch.ones(2, 1).bfloat16()}, "weight_scale", "BF16 [2, 1]"),  # the group size is another
        ({"scale": torch.ones(2, 2)}, "weight_scale", "F32 [2, 2]"),
        ({"packed": torch.ones(2, 2, 8).int()}, "weight_packed", "I32 [2, 2, 8]"),
    ],
)
def test_tensors_that_are_not_as_declared_are_refused(
    tmp_path: Path, changes: dict[str, Any], suffix: str, found: str
) -> None:
    with pytest.raises(PluginError, match=f"up_proj.{suffix} is not what config.json says") as error:
        convert_to_bf16(int4(tmp_path / "int4", **changes), tmp_path / "bf16")
    assert error.value.facts["found"] == found
    assert not (tmp_path / "bf16").exists()


def test_a_shape_that_is_not_the_codes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="weight_shape is another shape") as error:
        convert_to_bf16(int4(tmp_path / "int4", shape=torch.tensor([2, 60])), tmp_path / "bf16")
    assert error.value.facts["found"] == [2, 60]


def test_what_is_not_int4_is_not_unpacked(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="is not quantised"):
        convert_to_bf16(bf16, tmp_path / "back")
    source = int4(tmp_path / "int4", packed=None, scale=None, shape=torch.ones(1))
    with pytest.raises(PluginError, match=r"nothing of .* is packed"):
        convert_to_bf16(source, tmp_path / "back")
    (source / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(PluginError, match="quantised in a way"):
        convert_to_bf16(source, tmp_path / "back")


def test_a_folder_with_other_files_is_no_target(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="its own folder"):
        convert_to_int4(bf16, bf16 / ".." / "bf16", GRID)
    with pytest.raises(PluginError, match="inside of the checkpoint") as error:
        convert_to_int4(bf16, bf16 / "new" / "int4", GRID)
    assert not (bf16 / "new").exists()
    (tmp_path / "int4").mkdir()
    (tmp_path / "int4" / "diary.txt").touch()
    with pytest.raises(PluginError, match="other files in it") as error:
        convert_to_int4(bf16, tmp_path / "int4", GRID)
    assert error.value.facts["found"] == "diary.txt"
    with pytest.raises(PluginError, match="cannot make the folder"):
        convert_to_int4(bf16, tmp_path / "int4" / "diary.txt", GRID)
    assert [file.name for file in (tmp_path / "int4").iterdir()] == ["diary.txt"]


# -- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 1, len(SHAPES) // 2, len(SHAPES)])
@pytest.mark.parametrize("back", [False, True])
def test_a_stopped_conversion_goes_on(bf16: Path, tmp_path: Path, calls: int, back: bool) -> None:
    source, convert = bf16, lambda target, progress=None: convert_to_int4(bf16, target, GRID, progress=progress)
    if back:
        convert_to_int4(bf16, tmp_path / "int4", GRID)
        source, convert = tmp_path / "int4", lambda target, progress=None: convert_to_bf16(source, target, progress)
    target, whole = tmp_path / "stopped", tmp_path / "whole"
    with pytest.raises(Stopped):
        convert(target, stop_after(calls))
    kept = states(target)
    assert len(kept) < 3
    assert not (target / "config.json").exists()  # no model yet
    assert not list(target.glob("*.partial"))
    for name in ("model-2.safetensors.partial", "old.json.partial", ".tmpa1b2c3"):
        (target / name).write_text("of a process that was killed")

    calls_made: list[tuple[int, int]] = []
    done = convert(target, lambda *numbers: calls_made.append(numbers))
    assert states(target).items() >= kept.items()  # not written again
    assert calls_made == sorted(calls_made)
    assert calls_made[-1] == (done.bytes_before, done.bytes_before)
    assert convert(whole) == done
    assert digests(target) == digests(whole)
    for name in (INDEX, "config.json", RECORD):
        assert (target / name).read_text() == (whole / name).read_text()
    assert {file.name for file in target.iterdir()} == {file.name for file in whole.iterdir()}

    finished = states(target)
    assert convert(target) == done  # and once more
    assert states(target) == finished


def test_what_is_complete_is_not_written_again(bf16: Path, tmp_path: Path) -> None:
    target = tmp_path / "int4"

    def written() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in target.iterdir()}

    first = convert_to_int4(bf16, target, GRID)
    before, calls = written(), []
    again = convert_to_int4(bf16, target, GRID, progress=lambda *numbers: calls.append(numbers))
    assert (first.already, again.already) == (False, True)
    assert again == first
    assert calls[-1] == (first.bytes_before, first.bytes_before)
    assert written() == before
    (target / "tokenizer.json").unlink()
    assert not convert_to_int4(bf16, target, GRID).already
    assert written().keys() == before.keys()
    config = json.loads((bf16 / "config.json").read_text())
    (bf16 / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))  # as a refusal asks for
    assert not convert_to_int4(bf16, target, GRID).already
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_stopped_conversion_is_no_model(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        convert_to_int4(bf16, tmp_path / "int4", GRID, progress=stop_after(3))
    for use in (lambda: selection.read(tmp_path / "int4"), lambda: check_model_folder(tmp_path / "int4")):
        with pytest.raises(PluginError, match="conversion that did not finish") as error:
            use()
        assert "same command again" in str(error.value.next)


def test_a_file_that_is_not_whole_is_made_again(bf16: Path, tmp_path: Path) -> None:
    convert_to_int4(bf16, tmp_path / "int4", GRID)
    before, kept = digests(tmp_path / "int4"), states(tmp_path / "int4")
    file = tmp_path / "int4" / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    convert_to_int4(bf16, tmp_path / "int4", GRID)
    assert digests(tmp_path / "int4") == before
    again = states(tmp_path / "int4")
    assert [name for name in kept if kept[name] != again[name]] == ["model-1.safetensors"]


def test_a_target_of_another_conversion_is_refused(bf16: Path, tmp_path: Path) -> None:
    target = tmp_path / "int4"
    with pytest.raises(Stopped):
        convert_to_int4(bf16, target, GRID, progress=stop_after(20))
    kept = states(target)
    for other, differs in (
        (lambda: convert_to_int4(bf16, target, Grid(64), ["re:.*(w2|down_proj)"]), "group_size"),
        (lambda: convert_to_int4(bf16, target, Grid(32, "snapped")), "kind"),
        (lambda: convert_to_int4(bf16, target, GRID, modules=["experts", "mlp"]), "not packed"),
        (lambda: convert_to_bf16(int4(tmp_path / "other"), target), "to"),
    ):
        with pytest.raises(PluginError, match="begun as another conversion") as error:
            other()
        assert error.value.facts["differs"] == differs
    file = bf16 / "model-0.safetensors"
    file.write_bytes(file.read_bytes())  # the same bytes, written later
    with pytest.raises(PluginError, match="begun as another conversion") as error:
        convert_to_int4(bf16, target, GRID)
    assert error.value.facts["differs"] == "the source's files"
    assert states(target) == kept


def test_a_full_disk_loses_nothing_that_is_finished(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, target, written = conversion._save, tmp_path / "int4", []

    def fill(tensors: Tensors, file: Path) -> None:
        written.append(file.name)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(written) == 2:  # safetensors renames a file of its own: a device like /dev/full would be replaced
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save(tensors, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(conversion, "_save", fill)
    with pytest.raises(PluginError, match=r"cannot write .*model-1\.safetensors") as error:
        convert_to_int4(bf16, target, GRID)
    assert "File too large" in str(error.value)
    assert {file.name for file in target.iterdir()} == {"model-0.safetensors", RECORD}
    convert_to_int4(bf16, target, GRID)
    assert written == [f"model-{i}.safetensors.partial" for i in (0, 1, 1, 2)]
    assert packed_modules(target) == set(EXPERTS)


# -- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import re, sys, threading, time
from pathlib import Path
from miles_plugins.int4_qat.converter import convert_to_bf16, convert_to_int4
from miles_plugins.int4_qat.grid import Grid
import torch

def own():  # without the pages of mapped files, which the system takes back when it wants to
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    while True:
        peaks[-1] = max(peaks[-1], own())
        time.sleep(0.005)

folder = Path(sys.argv[1])
before, peaks = own(), [0]
threading.Thread(target=watch, daemon=True).start()
for convert in (lambda: convert_to_int4(folder / "bf16", folder / "int4", Grid(128)),
                lambda: convert_to_bf16(folder / "int4", folder / "back")):
    convert()
    print(peaks[-1] - before)
    peaks.append(0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads a process's memory from /proc")
def test_a_conversion_takes_the_memory_of_one_file_that_it_writes(tmp_path: Path) -> None:
    """Without more: glibc's heap kept twelve times that of this one, in holes between what is kept."""
    matrix = (torch.randn(768, 2048) * 0.02).bfloat16()
    write(
        tmp_path / "bf16",
        {"model.safetensors": {f"m.experts.{i}.w1.weight": matrix.roll(i, 0) for i in range(64)}},
    )
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rise, folder in zip(map(int, done.stdout.split()), ("int4", "back"), strict=True):
        written = (tmp_path / folder / "model.safetensors").stat().st_size
        assert rise < 1.3 * written + 60e6, (folder, rise, written)


# -- compressed-tensors itself ----------------------------------------------------------------------------------------

THEIRS = """
import sys
sys.modules["torchvision"] = None  # its CUDA build does not import without a GPU; transformers does without it
import json, torch
from pathlib import Path
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
(scheme,) = config.config_groups.values()
assert config.format == "pack-quantized"
tensors = load_file(folder / "model.safetensors")
names = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
answer = {}
for name in names:
    state = {each: tensors[f"{name}.{each}"] for each in ("weight_packed", "weight_scale", "weight_shape")}
    answer[f"{name}.codes"] = unpack_from_int32(state["weight_packed"], 4, torch.Size(state["weight_shape"]))
    weight = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    answer[f"{name}.weight"] = weight
    again = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": state["weight_scale"]}, scheme)
    answer |= {f"{name}.again_{each}": again[each] for each in state}
save_file({name: tensor.contiguous() for name, tensor in answer.items()}, sys.argv[2])
"""


@pytest.mark.upstream
@pytest.mark.parametrize("kind", ["stock", "snapped"])
def test_compressed_tensors_reads_what_we_pack(tmp_path: Path, kind: Any) -> None:
    """Its codes, its values and its own packing are ours, dtypes included, for every finite kind of weight."""
    if find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed (CONTRIBUTING.md: the upstream tier)")
    torch.manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (8, 256)).to(torch.int16).view(torch.bfloat16)
    kinds = {
        "a.experts.0.w1": (torch.randn(8, 256) * 0.02).bfloat16(),
        "a.experts.0.w2": (torch.randint(-14, 15, (8, 256)) / 14).bfloat16(),
        "a.experts.0.w3": torch.where((bits.abs() < 2.0**120) & (bits.abs() > 2.0**-80), bits, 1),
    }
    grid = Grid(64, kind)
    write(tmp_path / "bf16", {"model.safetensors": {f"{name}.weight": each for name, each in kinds.items()}})
    convert_to_int4(tmp_path / "bf16", tmp_path / "int4", grid)
    run = [sys.executable, "-c", THEIRS, str(tmp_path / "int4"), str(tmp_path / "theirs.safetensors")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = load_file(tmp_path / "theirs.safetensors"), load(tmp_path / "int4")
    for name, weight in kinds.items():
        packed, scale = ours[f"{name}.weight_packed"], ours[f"{name}.weight_scale"]
        assert equal(theirs[f"{name}.codes"], quantise(weight, grid).codes), name
        assert equal(theirs[f"{name}.codes"], unpack(packed)), name
        assert torch.equal(theirs[f"{name}.weight"], dequantise(Quantised(unpack(packed), scale))), name
        for each in ("weight_packed", "weight_scale", "weight_shape"):
            assert equal(theirs[f"{name}.again_{each}"], ours[f"{name}.{each}"]), (name, each)


# -- the commands -----------------------------------------------------------------------------------------------------


def test_the_commands_convert_there_and_back(bf16: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    there = ["--from", str(bf16), "--to", str(tmp_path / "int4"), "--group-size", "32", "--snapped"]
    done = run(command.convert_int4, [*there, "--modules", "experts,mlp", "--modules", "attention"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    count = len(EXPERTS) + len(DENSE) + len(ATTENTION)
    assert lines[0] == f"{count} weights packed in groups of 32: experts, mlp, attention"
    assert "MB before" in lines[1]
    assert "times smaller" in lines[1]
    flags = f"--hf-checkpoint {tmp_path / 'int4'} --int4-grid snapped --int4-modules experts,mlp,attention"
    assert lines[2] == f"next: serve it with SGLang, or train on the CPU, `slime-train --plugins int4 {flags} …`"
    note = "note: SGLang on a GPU cannot give dense INT4 layers (mlp, attention) new weights"
    assert lines[3:] == [f"{note}; to train there, pack experts only"]
    again = run(command.convert_int4, [*there, "--modules", "experts,mlp,attention"])
    assert again.stdout.splitlines() == ["already complete, nothing written", *lines]
    assert packed_modules(tmp_path / "int4") == {*EXPERTS, *DENSE, *ATTENTION}
    assert json.loads((tmp_path / "int4" / RECORD).read_text())["kind"] == "snapped"
    done = run(convert_bf16, ["--from", str(tmp_path / "int4"), "--to", str(tmp_path / "back")])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == f"{count} weights unpacked"
    assert "times larger" in done.stdout
    assert not packed_modules(tmp_path / "back")


def test_the_command_packs_experts_in_groups_of_128_by_default(tmp_path: Path) -> None:
    one(tmp_path / "bf16", "a.experts.0.w1.weight", torch.ones(2, 256).bfloat16())
    arguments = ["--from", str(tmp_path / "bf16"), "--to", str(tmp_path / "int4")]
    done = CliRunner().invoke(command.convert_int4, arguments)
    assert done.stdout.startswith("1 weights packed in groups of 128: experts\n")
    flags = f"--plugins int4 --hf-checkpoint {tmp_path / 'int4'}"
    assert done.stdout.endswith(f"next: train on it, `slime-train {flags} …`, or serve it with SGLang\n")
    assert load(tmp_path / "int4")["a.experts.0.w1.weight_scale"].shape == (2, 2)


def test_a_command_says_what_is_wrong(bf16: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(command.convert_int4, ["--from", str(bf16), "--to", str(tmp_path / "int4")])
    assert done.exit_code == 1
    assert done.stderr.startswith(
        f"Error: {LAYER}mlp.experts.0.down_proj.weight cannot be quantised in groups of 128\n"
    )
    assert "\n  next      --group-size 32: " in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (61_100_000_000, 16_800_000_000, "61.1 GB before, 16.8 GB after (3.64 times smaller)"),
        (999_000_000, 2_000_000_000, "999.0 MB before, 2.0 GB after (2.00 times larger)"),
        (240_128, 138_000, "0.2 MB before, 0.1 MB after (1.74 times smaller)"),
    ],
)
def test_sizes_are_shown_as_one_reads_them(before: int, after: int, shown: str) -> None:
    assert sizes(Converted(1, before, after)) == shown


@pytest.fixture
def listening() -> Iterator[None]:
    """To Ctrl-C: what a shell starts in the background ignores it, and its children do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_how_it_goes_on(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    convert = converter.convert_to_int4

    def interrupted(*arguments: Any, **options: Any) -> Converted:
        return convert(*arguments, **{**options, "progress": lambda done, total: signal.raise_signal(number)})

    monkeypatch.setattr(converter, "convert_to_int4", interrupted)
    arguments = ["--from", str(bf16), "--to", str(tmp_path / "int4"), "--group-size", "32"]
    done = CliRunner().invoke(command.convert_int4, arguments)
    assert done.exit_code == code
    assert done.stderr == "Stopped. What is finished is kept: the same command goes on from here.\n"
    monkeypatch.undo()
    assert CliRunner().invoke(command.convert_int4, arguments).exit_code == 0
    assert packed_modules(tmp_path / "int4") == set(EXPERTS)
