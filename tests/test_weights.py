"""Weights on their way to the engine: what plugins may return, how they compose, slime's own ways of sending them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from miles_plugins import PluginError, hookimpl
from miles_plugins.manager import Installed, Plugin, Plugins
from miles_plugins.patches.slime import weights as seam
from miles_plugins.weights import export, receive

torch = pytest.importorskip("torch")
ARGS = Namespace()


OTHERS = ("take_weight_quantization", "receive_weights")


def plugins(**functions) -> Plugins:
    """Plugins by name, each with one hook: `export_weights`, if its function is of no other's name."""

    def one(name: str, function) -> Plugin:
        module = ModuleType(name)
        hook = function.__name__ if function.__name__ in OTHERS else "export_weights"
        vars(module).update({"__file__": "", hook: hookimpl(function)})
        return Plugin(Installed(name, "some-plugins", "1.0", None), module)

    return Plugins([one(name, function) for name, function in functions.items()])


def batch() -> list[tuple[str, object]]:
    return [("q.weight", torch.ones(2, 3)), ("k.weight", torch.full((2, 3), 2.0))]


def test_what_a_plugin_returns_is_exported():
    scale = torch.ones(1)

    def quantize(args, named_tensors):
        assert args is ARGS
        codes = [(name, tensor.to(torch.float8_e4m3fn)) for name, tensor in named_tensors]
        return [*codes, ("q.weight_scale_inv", scale)]

    exported = export(plugins(a=quantize), ARGS, batch())
    assert [name for name, _ in exported] == ["q.weight", "k.weight", "q.weight_scale_inv"]
    assert exported[0][1].dtype == torch.float8_e4m3fn
    assert exported[2][1] is scale


def test_each_plugin_is_given_what_the_one_before_returned():
    def double(named_tensors):
        return [(name, tensor * 2) for name, tensor in named_tensors]

    def add_one(named_tensors):
        return tuple([name, tensor + 1] for name, tensor in named_tensors)

    exported = export(plugins(b=add_one, a=double, c=lambda named_tensors: None), ARGS, batch())
    assert [(name, tensor.unique().tolist()) for name, tensor in exported] == [("q.weight", [3.0]), ("k.weight", [5.0])]
    exported = export(plugins(a=add_one, b=double), ARGS, batch())
    assert [(name, tensor.unique().tolist()) for name, tensor in exported] == [("q.weight", [4.0]), ("k.weight", [6.0])]


@pytest.mark.parametrize("those", [{}, {"a": lambda named_tensors: None}], ids=["no plugin", "nothing to say"])
def test_weights_are_left_as_they_are(those):
    given = batch()
    exported = export(plugins(**those), ARGS, given)
    assert type(exported) is list
    assert [(name, id(tensor)) for name, tensor in exported] == [(name, id(tensor)) for name, tensor in given]


def test_all_of_a_batch_can_be_withheld():
    assert export(plugins(a=lambda named_tensors: []), ARGS, batch()) == []


def test_an_empty_batch_asks_nobody():
    assert export(plugins(a=lambda named_tensors: pytest.fail("it was asked")), ARGS, []) == []


def test_a_plugin_cannot_add_to_the_batch_in_place():
    def add(named_tensors):
        named_tensors.append(("q.weight_scale_inv", torch.ones(1)))

    with pytest.raises(AttributeError, match="append"):
        export(plugins(a=add), ARGS, batch())


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda: torch.ones(2, 2), "a Tensor"),
        (lambda: dict(batch()), "a dict"),
        (lambda: (pair for pair in batch()), "a generator"),
        (lambda: "q.weight", "a str"),
        (lambda: True, "a bool"),
        (lambda: [*batch(), torch.ones(2)], "item 2 is a Tensor"),
        (lambda: ["qk"], "item 0 is a str"),
        (lambda: ("q.weight", torch.ones(1)), "item 0 is a str"),
        (lambda: [("q.weight", [1.0])], "item 0 is ('q.weight', list)"),
        (lambda: [("q.weight", None)], "item 0 is ('q.weight', NoneType)"),
        (lambda: [(torch.ones(1), "q.weight")], "item 0 is (Tensor, 'q.weight')"),
        (lambda: [(1, torch.ones(1))], "item 0 is (int, Tensor)"),
        (lambda: [("q.weight", torch.ones(1), torch.ones(1))], "item 0 is ('q.weight', Tensor, Tensor)"),
        (lambda: [*batch(), ("q.weight", torch.ones(1))], "q.weight twice"),
    ],
)
def test_an_answer_that_no_engine_can_receive_names_the_plugin(answer, found):
    after = []
    with pytest.raises(PluginError) as caught:
        export(plugins(a=lambda: None, b=answer, c=lambda: after.append("asked")), ARGS, batch())
    assert caught.value.message == "plugin b returned from export_weights what the engine cannot receive"
    assert caught.value.facts["found"] == found
    assert after == []


@pytest.mark.parametrize("answers", [True, False])
def test_changing_a_parameter_in_place_is_an_error(answers):
    parameter = torch.nn.Parameter(torch.ones(4, 2))
    gate, up = parameter.data.chunk(2)  # as slime's converters cut it

    def quantize(named_tensors):
        named_tensors[1][1].mul_(2)
        return list(named_tensors) if answers else None

    with pytest.raises(PluginError, match="changed weights in place") as caught:
        export(plugins(a=quantize), ARGS, [("gate", gate), ("up", up)])
    assert "up" in caught.value.facts["changed"]
    assert caught.value.facts["plugins"] == "a"


def test_weights_of_inference_mode_are_exported():
    with torch.inference_mode():
        given = batch()
    assert len(export(plugins(a=lambda named_tensors: list(named_tensors)), ARGS, given)) == 2


# -- slime -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", [False, True])
def test_slimes_conversion_runs_first_however_it_is_called(monkeypatch, keywords):
    asked = []

    def export_weights(args, named_tensors):
        asked.append((args, [name for name, _ in named_tensors]))

    def original(args, model_name, name, param, quantization_config=None, later=False):
        return [(f"{model_name}.{name}", param), ("scale", quantization_config)]

    active = plugins(a=export_weights)
    monkeypatch.setattr(seam, "current", lambda: SimpleNamespace(plugins=active, hook=active.hook))
    one, scale = torch.ones(1), torch.ones(2)
    if keywords:
        given = {"args": ARGS, "model_name": "m", "name": "n", "param": one, "quantization_config": scale}
        result = seam.convert_to_hf(original, **given, later=True)
    else:
        result = seam.convert_to_hf(original, ARGS, "m", "n", one, scale)
    assert asked == [(ARGS, ["m.n", "scale"])]
    assert result == [("m.n", one), ("scale", scale)]


def test_a_plugin_that_quantizes_itself_gets_the_weights_as_they_are(monkeypatch):
    def take_weight_quantization(args, quantization):
        return True if quantization["quant_method"] == "mine" else None

    active = plugins(a=take_weight_quantization)
    monkeypatch.setattr(seam, "current", lambda: SimpleNamespace(plugins=active, hook=active.hook))

    def original(args, model_name, name, param, quantization_config):
        return [(str(quantization_config), param)]

    for method, expected in (("mine", "None"), ("fp8", "{'quant_method': 'fp8'}")):
        result = seam.convert_to_hf(original, ARGS, "m", "n", torch.ones(1), {"quant_method": method})
        assert [name for name, _ in result] == [expected]


def test_arriving_weights_pass_the_plugins_one_by_one():
    def receive_weights(named_tensors):
        return ((name + ".x", tensor + 1) for name, tensor in named_tensors)

    arrived = list(receive(plugins(a=receive_weights, b=receive_weights), None, iter([("n", torch.zeros(1))])))
    assert arrived == [("n.x.x", torch.full((1,), 2.0))]

    def broken(named_tensors):
        return 3

    broken.__name__ = "receive_weights"
    with pytest.raises(PluginError, match="an iterable"):
        receive(plugins(a=broken), None, [])


PLUGIN = """
from miles_plugins import hookimpl

@hookimpl
def export_weights(args, named_tensors):
    assert args.hidden_size == 8
    return [pair for name, tensor in named_tensors for pair in ((name, tensor * 2), (name + "_scale", tensor[:1] * 0))]
"""
SENDERS = ("hf_weight_iterator_direct", "update_weight_from_distributed", "update_weight_from_tensor")
SCRIPT = """
import importlib, json, sys
from types import SimpleNamespace
import torch

library = torch.library.Library("torchvision", "DEF")  # its CUDA build does not import without a GPU
library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
from miles_plugins.activation import activate

BACKEND = "slime.backends.megatron_utils."
early, senders = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name in early:
    importlib.import_module(BACKEND + "update_weight." + name)
assert (BACKEND + "megatron_to_hf" in sys.modules) == bool(early)
activation = activate(["doubler"], "trainer", environment={})
iterator, distributed, tensor = (importlib.import_module(BACKEND + "update_weight." + name) for name in senders)
converter = importlib.import_module(BACKEND + "megatron_to_hf")

args = SimpleNamespace(
    vocab_size=16, q_lora_rank=None, kv_channels=None, hidden_size=8, num_attention_heads=2, num_query_groups=1,
    update_weight_buffer_size=10**9,
)
updater = SimpleNamespace(
    args=args, model_name="qwen3moeconfig", quantization_config=None, model=None, rank=0, _is_pp_src_rank=True
)
fc1 = torch.arange(32.0).view(4, 8)
expert = "module.module.decoder.layers.1.mlp.experts.linear_fc1.weight3"
dense = "module.module.decoder.layers.1.self_attention.linear_qkv.weight"

def shown(named_tensors):
    assert type(named_tensors) is list
    return {name: weight.sum(dim=-1).tolist() for name, weight in named_tensors}

def everyone():
    yield "itself", converter.convert_to_hf(args, "qwen3moeconfig", expert, fc1)
    yield "iterator", iterator.HfWeightIteratorDirect._convert_to_hf_named_tensors(
        updater, [fc1], [SimpleNamespace(name=expert)]
    )
    distributed.named_params_and_buffers = lambda args, model: [(dense, torch.ones(16, 8))]
    distributed.all_gather_param = lambda name, param: param
    yield "dense", [
        pair for chunk in distributed.UpdateWeightFromDistributed._iter_non_expert_chunks(updater) for pair in chunk
    ]
    info = SimpleNamespace(name=expert, dtype=fc1.dtype, shape=fc1.shape)
    transfer = SimpleNamespace(
        source_rank=0, target_ranks=(0,), params=[SimpleNamespace(info=info, target_ranks=(0,))]
    )
    staging = {(fc1.dtype, tuple(fc1.shape)): [torch.empty(4, 8)]}
    yield "routed", tensor.UpdateWeightFromTensor._prepare_expert_weight_batch(
        updater, [transfer], {expert: fc1}, staging
    )

active = {name: shown(result) for name, result in everyone()}
record = next(record for record in activation.patches.records() if record.patch.id == "slime.weights.export")
visual = shown(converter.convert_to_hf(args, "qwen3vl", "module.module.model.visual.x", torch.ones(2, 2)))
args.q_lora_rank = 2  # MLA: the first of a pair is kept back
mla = [
    shown(converter.convert_to_hf(args, "deepseekv3", f"module.module.decoder.layers.0.self_attention.{name}.weight",
                                  torch.ones(2, 2)))
    for name in ("linear_q_down_proj", "linear_kv_down_proj")
]
args.q_lora_rank = None
activation.patches.undo()
plain = {name: shown(result) for name, result in everyone()}
print(json.dumps({"active": active, "plain": plain, "state": record.state.value, "visual": visual, "mla": mla}))
"""


def third_party(folder: Path, name: str, code: str) -> Path:
    """A distribution with one plugin, importable from the folder."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[miles_plugins]\n{name} = {name}\n")
    return folder


@pytest.mark.upstream
@pytest.mark.parametrize("early", [(), SENDERS[:1], SENDERS], ids=["none", "one", "all"])
def test_every_sender_of_slimes_asks_the_plugins(upstream_path: str, tmp_path: Path, early: tuple[str, ...]) -> None:
    """`early` are those that have copied the function's name before the layer is active."""
    third_party(tmp_path, "doubler", PLUGIN)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(early), json.dumps(SENDERS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), upstream_path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["state"] == "verified"

    def doubled(weights: dict[str, list[float]]) -> dict[str, list[float]]:
        scales = {f"{name}_scale": [0.0] for name in weights}
        return {name: [2 * value for value in values] for name, values in weights.items()} | scales

    expert = "model.layers.1.mlp.experts.3"
    halves = {f"{expert}.gate_proj.weight": [28.0, 92.0], f"{expert}.up_proj.weight": [156.0, 220.0]}
    attention = "model.layers.1.self_attn"
    dense = {f"{attention}.{name}_proj.weight": [8.0] * rows for name, rows in (("q", 8), ("k", 4), ("v", 4))}
    plain = {"itself": halves, "iterator": halves, "dense": dense, "routed": halves}
    assert found["plain"] == plain
    assert found["active"] == {name: doubled(weights) for name, weights in plain.items()}
    assert found["visual"] == doubled({"model.visual.x": [2.0, 2.0]})
    pair = {f"model.layers.0.self_attn.{name}.weight": [2.0, 2.0] for name in ("q_a_proj", "kv_a_proj_with_mqa")}
    assert found["mla"] == [{}, doubled(pair)]
