"""Which weights of a checkpoint are INT4, found again among the trainer's layers; and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model  # noqa: E402
from miles_plugins.errors import ArgumentError  # noqa: E402
from miles_plugins.int4_qat import selection  # noqa: E402
from miles_plugins.int4_qat.checkpoint import Format  # noqa: E402
from miles_plugins.int4_qat.converter import DEFAULT_IGNORE, ToInt4, convert_to_int4  # noqa: E402
from miles_plugins.int4_qat.grid import Grid  # noqa: E402
from miles_plugins.int4_qat.selection import Selection, require_divisible  # noqa: E402
from miles_plugins.linears import Linear  # noqa: E402
from tests.checkpoint_folders import load, write  # noqa: E402

GRID = Grid(32)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bf16"
    write_tiny_model(folder)
    return folder


def linear(name: str, layer: int = 0, shape: tuple[int, int] = (64, 64)) -> Linear:
    return Linear(name, layer, shape, 1, None, ("weight",), "megatron")  # type: ignore[arg-type]


def test_a_selection_has_the_layers_that_the_checkpoint_packs(bf16: Path, tmp_path: Path) -> None:
    convert_to_int4(bf16, tmp_path / "int4", GRID, (*DEFAULT_IGNORE, "re:.*layers.1.*"), modules=("experts",))
    found = selection.read(tmp_path / "int4")
    assert found.places == {("0", "experts")}
    assert len(found.modules) == 8 * 3
    names = ("mlp.experts.linear_fc1", "mlp.linear_fc1", "self_attention.linear_qkv")
    has = [found.has(linear(f"decoder.layers.0.{name}", layer)) for layer in (0, 1) for name in names]
    assert has == [True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("linear_qkv", True),
        ("linear_q_proj", True),  # multi-latent attention's, in a model that does not compress its queries
        ("linear_proj", True),
        ("linear_q_down_proj", False),
        ("linear_q_up_proj", False),
        ("linear_kv_down_proj", False),
        ("linear_kv_up_proj", False),
    ],
)
def test_compressed_projections_stay_as_they_are(name: str, packed: bool) -> None:
    """The converter packs q_proj, k_proj, v_proj and o_proj: the engine has all others in bfloat16."""
    chosen = Selection(Format(32), frozenset(), frozenset({("0", "attention")}))
    assert chosen.has(linear(f"decoder.layers.0.self_attention.{name}")) == packed


def test_a_layer_of_which_a_part_is_packed_is_refused(bf16: Path, tmp_path: Path) -> None:
    convert_to_int4(bf16, tmp_path / "int4", GRID, (*DEFAULT_IGNORE, "model.layers.1.mlp.experts.3"))
    with pytest.raises(ArgumentError, match="packs a part of the weights of one kind") as error:
        selection.read(tmp_path / "int4")
    assert error.value.facts["layer and kind"] == "('1', 'experts')"


def test_packed_modules_that_nobody_knows_are_refused(bf16: Path, tmp_path: Path) -> None:
    convert_to_int4(bf16, tmp_path / "int4", GRID)
    tensors = load(tmp_path / "int4")
    for part in ("packed", "scale", "shape"):
        name = f"model.layers.0.mlp.experts.0.up_proj.weight_{part}"
        tensors[f"model.layers.0.linear_attn.in_proj_qkvz.weight_{part}"] = tensors[name].clone()
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    with pytest.raises(ArgumentError, match="packs modules that INT4 training does not know") as error:
        selection.read(write(tmp_path / "strange", {"model.safetensors": tensors}, config))
    assert error.value.facts["modules"] == "1, such as model.layers.0.linear_attn.in_proj_qkvz"


def changed_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_model_of_an_unknown_number_of_layers_is_refused(bf16: Path, tmp_path: Path) -> None:
    """Layers after the last are of multi-token prediction."""
    convert_to_int4(bf16, tmp_path / "int4", GRID)
    changed_config(tmp_path / "int4", num_hidden_layers=None)
    with pytest.raises(ArgumentError, match="does not say how many layers"):
        selection.read(tmp_path / "int4")


def test_a_checkpoint_that_declares_int4_and_has_nothing_packed_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    changed_config(tmp_path / "model", **ToInt4(GRID, frozenset(), ()).config({}))
    with pytest.raises(ArgumentError, match="is not INT4") as error:
        selection.read(tmp_path / "model")
    assert error.value.facts["found"] == "no tensor *.weight_packed"


def test_a_rank_must_have_whole_groups() -> None:
    chosen = Selection(Format(32), frozenset(), frozenset({("0", "experts")}))
    require_divisible(chosen, linear("decoder.layers.0.mlp.experts.linear_fc2", shape=(48, 64)))
    with pytest.raises(ArgumentError, match=r"linear_fc2 cannot be quantised in groups of 32 on this rank") as error:
        require_divisible(chosen, linear("decoder.layers.0.mlp.experts.linear_fc2", shape=(64, 48)))
    assert "--expert-tensor-parallel-size" in str(error.value.next)
