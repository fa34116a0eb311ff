"""Weights at SGLang's schedulers, and slime's engines around them: begin, load, judge, pack, continue.

A model of two stub layers stands in for SGLang's Marlin experts, which need a GPU. The real path, without them, is the
rehearsal in test_upstream.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from miles_plugins import PluginError  # noqa: E402
from miles_plugins.compat.sglang_weights import BEGIN, END, model_of  # noqa: E402
from miles_plugins.patches.sglang import weights  # noqa: E402
from miles_plugins.patches.slime import weight_update  # noqa: E402
from tests.test_activation import plugins  # noqa: E402
from tests.wheels import unpacked_wheel  # noqa: E402

FULL = {"experts.1.a": 1, "norm": 1}


class Scheme:
    """Stands in for CompressedTensorsWNA16MoE, whose kernels run on a GPU only."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def restore_weights_before_loading(self, layer: Any) -> None:
        self.events.append("restore")

    def process_weights_after_loading(self, layer: Any) -> None:
        self.events.append("process")
        layer.workspace = torch.zeros(4)  # as Marlin's, which is anew each time


class Model(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events
        self.experts = torch.nn.Linear(2, 2)
        self.experts.scheme = Scheme(events)
        self.plain = torch.nn.Linear(2, 2)
        self.loaded: dict[str, Any] = {}

    def load_weights(self, weights: Any) -> None:
        self.events.append("load")
        given = dict(weights)
        if "too large" in given:
            raise MemoryError("no memory left")
        self.loaded.update(given)


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def model(events: list[str], monkeypatch: pytest.MonkeyPatch) -> Model:
    """As the layer's patch gives it to SGLang, which here has no update sessions."""

    def receive_weights(named_tensors: Any) -> Iterator[tuple[str, Any]]:
        for name, tensor in named_tensors:
            yield name, tensor + 1

    def after_weight_update(received: Mapping[str, int]) -> None:
        events.append(f"judge {dict(received)}")
        if received != {"a": 1, "b": 1}:
            raise PluginError("weights are missing")

    given = plugins(receive_weights=receive_weights, after_weight_update=after_weight_update)
    layer = Namespace(plugins=given, hook=given.hook)
    monkeypatch.setattr(weights, "current", lambda: layer)
    monkeypatch.setattr(weights, "_scheduler", Namespace(server_args=None))
    monkeypatch.setattr(weights, "has_update_sessions", lambda: False)
    monkeypatch.setattr(weights, "_of_all_ranks", lambda mine: [mine])
    monkeypatch.setattr(weights, "_on_its_device", nullcontext)
    return weights.receive_through_plugins(lambda: Model(events))  # type: ignore[no-any-return]


def act(model: Model, action: str) -> None:
    weights.handle(
        lambda *_, **__: pytest.fail("SGLang does not know it"), Namespace(_get_model=lambda: model), action=action
    )


def test_an_update_is_restored_loaded_judged_and_packed(model: Model, events: list[str]) -> None:
    model.load_weights([("a", torch.zeros(1)), ("b", torch.zeros(1)), ("c", torch.zeros(1))])  # the checkpoint
    act(model, BEGIN)
    model.load_weights(iter([("a", torch.zeros(1))]))
    model.load_weights([("b", torch.ones(1))])
    act(model, END)
    assert events == ["load", "restore", "load", "load", "judge {'a': 1, 'b': 1}", "process"]
    assert [float(model.loaded[name]) for name in "abc"] == [1, 2, 1]
    events.clear()
    act(model, BEGIN)
    assert events == ["restore"]


def test_a_partial_update_is_not_packed_and_no_other_may_follow(model: Model, events: list[str]) -> None:
    act(model, BEGIN)
    model.load_weights([("a", torch.zeros(1))])
    with pytest.raises(PluginError, match="weights are missing"):
        act(model, END)
    assert "process" not in events
    with pytest.raises(PluginError, match="before the last one has ended"):
        act(model, BEGIN)


def test_what_could_not_be_loaded_has_not_come(model: Model, events: list[str]) -> None:
    act(model, BEGIN)
    model.load_weights([("a", torch.zeros(1))])
    with pytest.raises(MemoryError):  # SGLang answers this with a text, which slime hears of the first rank only
        model.load_weights([("b", torch.zeros(1)), ("too large", torch.zeros(1))])
    with pytest.raises(PluginError, match=r"could not be loaded(?s:.*)MemoryError: no memory left"):
        act(model, END)
    assert "process" not in events


def test_what_cuda_graphs_have_captured_stays_where_it_is(model: Model) -> None:
    captured = model.experts.workspace = torch.ones(4)
    act(model, BEGIN)
    model.load_weights([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    act(model, END)
    assert model.experts.workspace is captured
    assert captured.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("mine", "complaint"),
    [
        ({"experts.0.a": 1, "experts.1.a": 1, "norm": 1}, None),  # of four experts, the first two
        (dict.fromkeys(("experts.0.a", "experts.1.a", "experts.2.a", "experts.3.a", "norm"), 1), None),
        ({"experts.0.a": 1, "norm": 1}, "such as model.experts.1.a"),
        ({"experts.0.a": 1, "experts.1.a": 1}, "such as model.norm"),
    ],
)
def test_a_rank_needs_its_own_experts_only(mine: dict[str, int], complaint: str | None) -> None:
    model = torch.nn.Module()
    model.moe_ep_size, model.moe_ep_rank = 2, 0
    other = {"experts.2.a": 1, "experts.3.a": 1, "norm": 1}
    own, every = (
        {f"model.{name}": times for name, times in each.items()} for each in (mine, {**other, **mine, **FULL})
    )
    with pytest.raises(PluginError, match=complaint) if complaint else nullcontext():
        weights._require_own(model, own, every)


def test_an_end_without_a_beginning_is_an_error(model: Model) -> None:
    with pytest.raises(PluginError, match="did not begin"):
        act(model, END)


def test_an_sglang_with_sessions_restores_and_packs_by_itself(
    model: Model, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "has_update_sessions", lambda: True)
    act(model, BEGIN)
    model.load_weights([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    act(model, END)
    assert events == ["load", "judge {'a': 1, 'b': 1}"]


@pytest.mark.parametrize("name", ["scheme", "restore_weights_before_loading"])
def test_packed_weights_that_no_layer_makes_loadable_again_are_refused(
    model: Model, events: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As where SGLang calls it something else: new weights would be loaded into what the kernel has made of the old."""
    monkeypatch.delattr(model.experts if name == "scheme" else Scheme, name)
    act(model, BEGIN)  # nothing of this checkpoint was packed
    model.load_weights([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    act(model, END)
    events.clear()
    model.load_weights([("experts.0.w1.weight_packed", torch.zeros(1))])
    with pytest.raises(PluginError, match=r"no layer(?s:.*)experts\.0\.w1\.weight_packed"):
        act(model, BEGIN)
    assert events == ["load"]


def test_what_a_plugin_unpacks_needs_no_way_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SGLang on the CPU is given its weights."""
    del model.experts.scheme
    given = plugins(receive_weights=lambda named_tensors: [(n.replace("_packed", ""), t) for n, t in named_tensors])
    monkeypatch.setattr(weights, "current", lambda: Namespace(plugins=given, hook=given.hook))
    model.load_weights([("experts.0.w1.weight_packed", torch.zeros(1))])
    assert list(model.loaded) == ["experts.0.w1.weight"]
    act(model, BEGIN)


@pytest.mark.parametrize("sessions", [False, True])
def test_a_kernel_without_a_way_back_is_refused_by_name(
    model: Model, events: list[str], monkeypatch: pytest.MonkeyPatch, sessions: bool
) -> None:
    """SGLang's sessions ask Triton's layers, too: they inherit Marlin's way back, which is not theirs."""
    monkeypatch.setattr(weights, "has_update_sessions", lambda: sessions)
    model.experts.is_triton_converted = True
    with pytest.raises(PluginError, match=r"experts cannot be replaced(?s:.*)marlin"):
        act(model, BEGIN)
    assert events == []


@pytest.mark.usefixtures("model")
def test_a_model_that_came_past_the_loader_is_refused(events: list[str]) -> None:
    with pytest.raises(PluginError, match="do not pass the plugins"):
        act(Model(events), BEGIN)


def test_a_failure_of_another_rank_is_one_here(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_of_all_ranks", lambda mine: [mine, (None, "rank 1: weights are missing")])
    with pytest.raises(PluginError, match="1 other rank"):
        act(model, BEGIN)


RANK = """
import json, sys
from argparse import Namespace
import torch
library = torch.library.Library("torchvision", "DEF")  # its CUDA build does not import without a GPU
library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
from sglang.srt.distributed import parallel_state
from miles_plugins.compat.sglang_weights import BEGIN, END
from miles_plugins.patches.sglang import weights
from tests.test_activation import plugins

rank, port, case = int(sys.argv[1]), sys.argv[2], sys.argv[3]
address = f"tcp://127.0.0.1:{port}"
parallel_state.init_distributed_environment(
    backend="gloo", world_size=2, rank=rank, local_rank=rank, distributed_init_method=address)
parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, backend="gloo")

class Model(torch.nn.Module):
    def load_weights(self, named):
        names = dict(named)
        if case == "fails" and rank == 1:
            raise MemoryError("no memory left")

judged = []
given = plugins(after_weight_update=lambda received: judged.append(received))
weights.current = lambda: Namespace(plugins=given, hook=given.hook)
weights._scheduler = Namespace(server_args=None)
model = weights.receive_through_plugins(Model)
act = lambda action: weights.handle(None, Namespace(_get_model=lambda: model), action=action)
error = None
try:
    act(BEGIN)
    names = ["a"] if case == "misses" and rank == 1 else ["a", "b"]
    try:
        model.load_weights([(name, torch.zeros(1)) for name in names])
    except MemoryError:
        pass  # so does SGLang: it answers with a text
    act(END)
except Exception as found:
    error = str(found)
print(json.dumps([error, judged]))
"""


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("comes", None, None),
        ("fails", "failed on 1 other rank.*no memory left", "no memory left"),
        ("misses", "failed on 1 other rank.*did not bring this rank", "missing.*such as b"),
    ],
)
def test_two_ranks_of_sglang_agree_on_whether_an_update_succeeded(case: str, first: str, second: str) -> None:
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("needs SGLang (CONTRIBUTING.md)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    commands = [[sys.executable, "-W", "ignore", "-c", RANK, str(rank), port, case] for rank in (0, 1)]
    processes = [subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for each in commands]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    for (stdout, _), expected in zip(outputs, (first, second), strict=True):
        error, judged = json.loads(stdout.splitlines()[-1])
        if expected is None:
            assert error is None
            assert judged == [{"a": 1, "b": 1}]
        else:
            assert re.search(expected, error, re.DOTALL)


def test_sglangs_own_actions_stay_its_own() -> None:
    assert weights.handle(lambda checker, action: (checker, action), "checker", action="snapshot") == (
        "checker",
        "snapshot",
    )


# -- what each SGLang is relied on for ---------------------------------------------------------------------------------

COMPRESSED = "layers/quantization/compressed_tensors"


class Source:
    """The classes of a release's files, unpacked and not imported: their kernels need a GPU."""

    def __init__(self, version: str) -> None:
        self.folder = unpacked_wheel("sglang", version) / "sglang" / "srt"

    def text(self, file: str) -> str:
        return (self.folder / file).read_text(encoding="utf-8")

    def members(self, file: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
        """The classes and functions of a file, by name."""
        body = ast.parse(self.text(file)).body
        return {each.name: each for each in body if isinstance(each, (ast.ClassDef, ast.FunctionDef))}

    def methods(self, file: str, name: str) -> dict[str, str]:
        """The methods of a class by name, as text."""
        found = self.members(file)[name]
        return {each.name: ast.unparse(each) for each in found.body if isinstance(each, ast.FunctionDef)}


@pytest.mark.parametrize("version", ["0.5.9", "0.5.12.post1", "0.5.15.post1", "0.5.23"])
def test_each_sglang_has_what_an_update_of_packed_weights_relies_on(version: str) -> None:
    sglang, sessions = Source(version), version == "0.5.23"

    checker = sglang.methods("utils/weight_checker.py", "WeightChecker")
    assert re.search(r"def handle\(self, action: str", checker["handle"])
    kept = "self._get_model = get_model" if sessions else "self._model_runner = model_runner"
    assert kept in checker["__init__"]  # compat.sglang_weights.model_of

    loader = sglang.members("model_loader/loader.py")
    assert {"_initialize_model", "device_loading_context"} <= set(loader)

    config = sglang.methods(f"{COMPRESSED}/compressed_tensors.py", "CompressedTensorsConfig")
    assert "layer.scheme = self.get_moe_scheme(layer=layer, layer_name=prefix)" in config["get_quant_method"]
    assert "return CompressedTensorsWNA16MoE(self" in config["get_moe_scheme"]

    experts = f"{COMPRESSED}/schemes/compressed_tensors_wNa16_moe.py"
    marlin = sglang.methods(experts, "CompressedTensorsWNA16MoE")
    for method in ("restore_weights_before_loading", "process_weights_after_loading"):
        assert marlin[method].startswith(f"def {method}(self, layer: torch.nn.Module)")
    # Triton's inherits the way back, and marks what has none.
    triton = sglang.members(experts)["CompressedTensorsWNA16TritonMoE"]
    assert [ast.unparse(base) for base in triton.bases] == ["CompressedTensorsWNA16MoE"]
    converted = sglang.methods(experts, "CompressedTensorsWNA16TritonMoE")
    assert "layer.is_triton_converted = True" in converted["process_weights_after_loading"]
    assert "restore_weights_before_loading" not in converted
    # Dense layers have none: `refusals` takes experts only.
    dense = sglang.methods(f"{COMPRESSED}/schemes/compressed_tensors_wNa16.py", "CompressedTensorsWNA16")
    assert "restore_weights_before_loading" not in dense

    of_experts = sglang.methods("layers/moe/fused_moe_triton/layer.py", "FusedMoE")["__init__"]
    assert all(f"self.{name} = " in of_experts for name in ("moe_ep_size", "moe_ep_rank"))  # `_require_own`

    assert ("BeginWeightUpdateReqInput" in sglang.members("managers/io_struct.py")) == sessions
    if sessions:
        updater = sglang.methods("model_executor/model_runner_components/weight_updater.py", "WeightUpdater")
        assert "DefaultModelLoader.restore_weights_before_loading(" in updater["begin_weight_update"]
        assert "DefaultModelLoader.postprocess_weights(" in updater["end_weight_update"]
        method = sglang.methods(f"{COMPRESSED}/compressed_tensors.py", "CompressedTensorsFusedMoEMethod")
        for name in ("restore_weights_before_loading", "process_weights_after_loading"):
            assert f"layer.scheme.{name}(layer)" in method[name]


def test_the_model_is_found_in_either_checker() -> None:
    assert model_of(Namespace(_model_runner=Namespace(model="old"))) == "old"
    assert model_of(Namespace(_get_model=lambda: "new")) == "new"


# -- slime's engine --------------------------------------------------------------------------------------------------


class Engine:
    """slime's SGLangEngine as far as an update needs it: notes what it asks of the server."""

    def __init__(self, node_rank: int = 0, failing: str = "") -> None:
        self.node_rank, self.failing, self.asked = node_rank, failing, []

    def _make_request(self, endpoint: str, payload: dict[str, Any]) -> None:
        self.asked.append(endpoint)

    def check_weights(self, action: str) -> None:
        self.asked.append(action)
        if action == self.failing:
            raise OSError("400 Client Error")

    def pause(self) -> None:
        self.asked.append("pause")

    def resume(self) -> None:
        self.asked.append("resume")


@pytest.mark.parametrize("sessions", [False, True])
def test_an_update_lies_between_pausing_and_continuing(monkeypatch: pytest.MonkeyPatch, sessions: bool) -> None:
    monkeypatch.setattr(weight_update, "has_update_sessions", lambda: sessions)
    engine = Engine()
    weight_update.begin_when_paused(Engine.pause, engine)
    weight_update.end_before_continuing(Engine.resume, engine)
    own = [["begin_weight_update"], ["end_weight_update"]] if sessions else [[], []]
    assert engine.asked == ["pause", *own[0], BEGIN, END, *own[1], "resume"]


@pytest.mark.parametrize("sessions", [False, True])
def test_generation_does_not_go_on_after_a_failure(monkeypatch: pytest.MonkeyPatch, sessions: bool) -> None:
    monkeypatch.setattr(weight_update, "has_update_sessions", lambda: sessions)
    engine = Engine(failing=END)
    with pytest.raises(OSError, match="400"):
        weight_update.end_before_continuing(Engine.resume, engine)
    assert engine.asked == [END]


def test_further_nodes_of_an_engine_have_no_server_to_ask() -> None:
    engine = Engine(node_rank=1)
    weight_update.begin_when_paused(Engine.pause, engine)
    weight_update.end_before_continuing(Engine.resume, engine)
    assert engine.asked == ["pause", "resume"]
