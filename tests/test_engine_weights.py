"""Weights at SGLang's schedulers, and slime's engines around them: begin, load, judge, pack, continue.

A model of two stub layers stands in for SGLang's Marlin experts, which need a GPU. The real path, without them, is the
rehearsal in test_upstream.
"""

from __future__ import annotations

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
from miles_plugins.compat.sglang_weights import BEGIN, END  # noqa: E402
from miles_plugins.patches.sglang import weights  # noqa: E402
from miles_plugins.patches.slime import weight_update  # noqa: E402
from tests.test_activation import plugins  # noqa: E402

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


def test_a_kernel_without_a_way_back_is_refused_by_name(model: Model, events: list[str]) -> None:
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
