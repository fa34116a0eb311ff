"""Where the quantised weights of a checkpoint are in Megatron's model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from miles_plugins import places
from miles_plugins.checkpoints import layer_of
from miles_plugins.errors import PluginError
from miles_plugins.int4_qat.converter import MODULES
from miles_plugins.linears import Linear

LAYERS = 4  # of the model below, whose first two are on this rank
NAMES = [
    # Megatron's name within this rank; the layer's number in the model; (layer, kind); a name in the checkpoint
    ("decoder.layers.1.mlp.experts.linear_fc1", 3, ("3", "experts"), "model.layers.3.mlp.experts.0.gate_proj"),
    ("decoder.layers.1.mlp.experts.linear_fc2", 3, ("3", "experts"), "model.layers.3.mlp.experts.0.down_proj"),
    (
        "decoder.layers.1.mlp.experts.local_experts.7.linear_fc2",
        3,
        ("3", "experts"),
        "model.layers.3.mlp.experts.7.down_proj",
    ),
    (
        "decoder.layers.0.mlp.shared_experts.linear_fc1",
        2,
        ("2", "shared-experts"),
        "model.layers.2.mlp.shared_experts.up_proj",
    ),
    (
        "decoder.layers.0.mlp.shared_experts.linear_fc2",
        2,
        ("2", "shared-experts"),
        "model.layers.2.mlp.shared_expert.down_proj",
    ),
    ("decoder.layers.0.mlp.linear_fc1", 0, ("0", "mlp"), "model.layers.0.mlp.gate_proj"),
    ("decoder.layers.0.mlp.linear_fc2", 0, ("0", "mlp"), "model.layers.0.mlp.down_proj"),
    ("decoder.layers.0.self_attention.linear_qkv", 0, ("0", "attention"), "model.layers.0.self_attn.k_proj"),
    ("decoder.layers.0.self_attention.linear_proj", 0, ("0", "attention"), "model.layers.0.self_attn.o_proj"),
    # A multi-token prediction block counts its own; DeepSeek's and GLM's checkpoints number it on after the last layer.
    (
        "mtp.layers.0.transformer_layer.mlp.experts.linear_fc1",
        0,
        ("mtp 0", "experts"),
        f"model.layers.{LAYERS}.mlp.experts.0.up_proj",
    ),
    (
        "mtp.layers.1.mtp_model_layer.mlp.experts.linear_fc2",
        1,
        ("mtp 1", "experts"),
        f"model.layers.{LAYERS + 1}.mlp.experts.0.w2",
    ),
    (
        "mtp.layers.0.transformer_layer.self_attention.linear_qkv",
        0,
        ("mtp 0", "attention"),
        "mtp.layers.0.self_attn.q_proj",
    ),
]
NOWHERE = [
    ("decoder.layers.0.mlp.router", 0),
    ("decoder.layers.0.self_attention.core_attention", 0),
    ("decoder.layers.0.self_attention.linear_qkv_extra", 0),
    ("mtp.layers.0.eh_proj", 0),
    ("output_layer", None),
    ("embedding.word_embeddings", None),
    ("mlp.experts.linear_fc1", None),  # of no transformer layer
]


def linear(name: str, layer: int | None, count: int = 1) -> Linear:
    return Linear(name, layer, (8, 8), count, None, ("weight",), "megatron")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "layer", "place", "module"), NAMES, ids=lambda each: str(each)[-40:])
def test_a_layer_of_the_trainer_is_where_its_weights_of_the_checkpoint_are(
    name: str, layer: int, place: places.Place, module: str
) -> None:
    assert places.place(linear(name, layer)) == place
    (kind,) = [kind for kind, pattern in MODULES.items() if pattern.fullmatch(module)]
    assert (layer_of(module, LAYERS), kind) == place


@pytest.mark.parametrize(("name", "layer"), NOWHERE)
def test_what_is_never_quantised_is_nowhere(name: str, layer: int | None) -> None:
    assert places.place(linear(name, layer)) is None


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("decoder.layers.11.mlp.experts.linear_fc1", "11"),
        ("module.module.decoder.layers.0.mlp.router.weight", "0"),
        ("mtp.layers.1.transformer_layer.mlp.experts.linear_fc1", "mtp 1"),
        ("output_layer.weight", None),
    ],
)
def test_the_layer_in_a_name_of_the_whole_model(name: str, layer: str | None) -> None:
    assert places.layer_in(name) == layer


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A rank that holds layers 2 and 3."""

    def linear_layers(model: list[Any]) -> Iterator[Linear]:
        yield from model

    monkeypatch.setattr(places, "linear_layers", linear_layers)
    names = ("self_attention.linear_qkv", "mlp.experts.linear_fc1")
    return [linear(f"decoder.layers.{layer - 2}.{name}", layer) for layer in (2, 3) for name in names]


def test_every_quantised_place_of_this_rank_must_be_used(model: list[Any]) -> None:
    assert places.local_layers(model) == {"2", "3"}
    quantised = {(layer, "experts") for layer in ("0", "2", "3")}
    used = {("2", "experts"): 8, ("3", "experts"): 8}
    places.require_all(model, quantised, used)
    del used["3", "experts"]
    with pytest.raises(PluginError, match="have no linear layers in the trainer") as error:
        places.require_all(model, quantised, used)
    assert error.value.facts == {"layers": "3 (experts)", "quantised": "8 weights in 1 places"}
