"""Weights reach SGLang's drafts, or pass them by: each release's own code, each way, each kind of draft, our patches.

Each release runs in a process of its own (tests/sglang_drafts.py), from its wheel; the tests only read what it reports.
With `None` SGLang acts by itself: that is how a test here fails when a patch does nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from miles_plugins import PluginError  # noqa: E402
from miles_plugins.compat.slime_drafts import exchanges_halves  # noqa: E402
from miles_plugins.compat.source import reading_from  # noqa: E402
from miles_plugins.patches.sglang import draft  # noqa: E402
from miles_plugins.spec_rl import halves  # noqa: E402
from tests.sglang_drafts import FAMILIES, HIDDEN, KINDS, OWN, SHARED, TRAINED, WAYS, WITHOUT_DRAFT, inputs  # noqa: E402
from tests.wheels import unpacked_commit, unpacked_wheel  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("0.5.9", "0.5.12.post1", "0.5.15.post1", "0.5.23")
# Kinds that a release does not have; the first generation of multi-layer drafts cannot be imported in any.
LACKS = {"0.5.9": ("dflash",), "0.5.15.post1": ("eagle v1",), "0.5.23": ("eagle v1",)}
DRAFTS = tuple(kind for kind in KINDS if kind not in ("ngram", "none"))


@pytest.fixture(scope="module")
def processes(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Two releases at a time, each in its process; those that a test wants."""
    wanted = {item.callspec.params.get("version") for item in request.session.items if hasattr(item, "callspec")}
    missing = [name for name in ("transformers", "zmq", "msgspec", "fastapi") if find_spec(name) is None]
    if missing:
        pytest.skip(f"the upstream tier needs {', '.join(missing)} (see CONTRIBUTING.md)")
    started: dict[str, Any] = {}
    with ThreadPoolExecutor(2) as pool:
        for version in [each for each in VERSIONS if each in wanted]:
            try:
                started[version] = pool.submit(in_its_own_process, unpacked_wheel("sglang", version))
            except pytest.skip.Exception as reason:
                started[version] = reason
        yield started


def in_its_own_process(wheel: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "sglang_drafts.py"), str(wheel)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def found(version: str, processes: dict[str, Any]) -> dict[str, Any]:
    process = processes[version]
    if not isinstance(process, Future):
        raise process
    answer: dict[str, Any] = process.result()
    return answer


def of(found: dict[str, Any], scenario: str) -> dict[str, Any]:
    answer: dict[str, Any] = found[scenario]
    if "raised" in answer:
        pytest.fail(answer["raised"])
    return answer


def names_of(kind: str) -> list[str]:
    return ["draft 0", "draft 1"] if kind == "multi-layer v2" else ["draft"]


def parts_of(way: str, names: tuple[str, ...] = TRAINED) -> list[list[str]]:
    half = len(names) // 2
    return [list(names)] if way == "disk" else [list(names[:half]), list(names[half:])]


def loaded(answer: dict[str, Any], model: str) -> list[list[str]]:
    return [names for label, names in answer["events"] if label == model and isinstance(names, list)]


def handled(answer: dict[str, Any], model: str) -> list[str]:
    """What was done to a model before and after its weights came."""
    return [what for label, what in answer["events"] if label == model and isinstance(what, str)]


def kinds(version: str) -> tuple[str, ...]:
    return tuple(kind for kind in DRAFTS if kind not in LACKS.get(version, ()))


# -- a trained draft ---------------------------------------------------------------------------------------------------


@pytest.mark.upstream
@pytest.mark.parametrize("way", WAYS)
def test_a_trained_draft_loads_what_the_target_does_and_it_is_received_once(
    found: dict[str, Any], version: str, way: str
) -> None:
    for kind in kinds(version):
        answer = of(found, f"{kind}, {way}, trained")
        assert answer["complaint"] == "", kind
        assert all(answer["succeeded"]), kind
        for model in ("target", *names_of(kind)):
            assert loaded(answer, model) == parts_of(way), (kind, model)
        # Each tensor, or each bucket, comes over the wire once, however many models load it.
        assert answer["broadcasts"] == {"distributed": len(TRAINED), "flattened": 2}.get(way, 0), kind
        assert answer["flushes"] == len(parts_of(way)), kind


@pytest.mark.upstream
@pytest.mark.parametrize("way", WAYS)
def test_afterwards_every_parameter_of_it_is_new(found: dict[str, Any], version: str, way: str) -> None:
    for kind in kinds(version):
        for model, values in of(found, f"{kind}, {way}, trained")["values"].items():
            assert values == {name: [2.0] for name in values}, (kind, model)


@pytest.mark.upstream
@pytest.mark.parametrize("way", WAYS)
def test_it_is_judged_and_repacked_as_the_target_is(found: dict[str, Any], version: str, way: str) -> None:
    """Once each, whether or not SGLang asks the draft by itself where an update begins and ends."""
    for kind in kinds(version):
        answer = of(found, f"{kind}, {way}, trained")
        models = ("target", *names_of(kind))
        assert answer["judged"] == [len(TRAINED)] * len(models), kind
        for model in models:
            assert sorted(set(handled(answer, model))) == sorted(handled(answer, model)), (kind, model)
        assert {tuple(handled(answer, model)) for model in models} == {tuple(handled(answer, "target"))}, kind
        assert "processed" in handled(answer, "target"), kind


# -- a frozen draft ----------------------------------------------------------------------------------------------------


@pytest.mark.upstream
@pytest.mark.parametrize("way", WAYS)
def test_a_frozen_draft_gets_nothing_and_nothing_is_done_to_it(found: dict[str, Any], version: str, way: str) -> None:
    """miles #1926: post-processing alone cut the accept length from 2.71 to 1.00."""
    for kind in (*kinds(version), "ngram", "none"):
        answer = of(found, f"{kind}, {way}, frozen")
        assert answer["complaint"] == "", kind
        assert all(answer["succeeded"]), kind
        assert {label for label, _ in answer["events"]} == {"target"}, kind
        assert loaded(answer, "target") == parts_of(way), kind
        assert answer["judged"] == [len(TRAINED)], kind
        for model in set(answer["values"]) - {"target"}:
            own = {name: value for name, value in answer["values"][model].items() if name not in SHARED}
            assert own == {name: [1.0] for name in own}, (kind, model)
        assert answer["flushes"] == len(parts_of(way)), kind


# -- SGLang by itself --------------------------------------------------------------------------------------------------

REACHED = {  # which drafts SGLang gives the weights, by way: kinds of draft, None for a failure
    "0.5.9": {"distributed": (), "flattened": (), "disk": (), "tensor": ("eagle v1", "eagle v2", "standalone v2")},
    "0.5.12.post1": {"distributed": (), "flattened": (), "tensor": ("eagle v1", "eagle v2", "standalone v2")},
    "0.5.15.post1": {"distributed": (), "flattened": (), "tensor": ("eagle v2", "standalone v2")},
}


@pytest.mark.upstream
@pytest.mark.parametrize("way", WAYS)
def test_sglang_by_itself_reaches_some_drafts_some_ways(found: dict[str, Any], version: str, way: str) -> None:
    expected = REACHED.get(version, {}).get(way)
    if expected is None:
        pytest.skip("it reaches them all, or most: from 0.5.23, and from disk since 0.5.12")
    for kind in kinds(version):
        answer = found[f"{kind}, {way}, None"]
        if "raised" in answer:
            assert (kind, way) == ("multi-layer v2", "tensor"), answer["raised"]
            assert "AttributeError" in answer["raised"]
        elif kind in expected:
            assert loaded(answer, "draft") == parts_of(way), kind
        else:
            assert not any(loaded(answer, model) for model in names_of(kind)), kind


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.upstream
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["ngram", "none"])
def test_an_engine_without_a_draft_is_refused_where_one_is_trained(found: dict[str, Any], kind: str, way: str) -> None:
    answer = of(found, f"{kind}, {way}, trained")
    assert "the draft is trained, and this engine has none" in answer["complaint"]
    assert answer["succeeded"] == [], "generation must not go on"


@pytest.mark.upstream
@pytest.mark.parametrize("way", WAYS)
def test_an_update_without_the_drafts_layers_is_refused_by_name(found: dict[str, Any], way: str) -> None:
    """Every name that came is known to the target: the draft passes over them without a word."""
    answer = of(found, f"no draft layers, {way}")
    assert loaded(answer, "draft") == parts_of(way, WITHOUT_DRAFT)
    assert "a weight update left a part of the draft as it was" in answer["complaint"]
    assert f"{len(OWN)} parameter(s), such as mtp_0_fc_weight" in answer["complaint"]
    assert answer["judged"] == []


@pytest.mark.upstream
@pytest.mark.parametrize("way", WAYS)
def test_one_missing_parameter_is_enough(found: dict[str, Any], way: str) -> None:
    assert "1 parameter(s), such as mtp_1_norm_weight" in of(found, f"half a layer, {way}")["complaint"]


@pytest.mark.upstream
def test_a_draft_of_another_shape_is_an_error(found: dict[str, Any]) -> None:
    answer = of(found, "another shape")
    assert not all(answer["succeeded"])
    assert "could not be loaded" in answer["complaint"]
    assert answer["judged"] == []


@pytest.mark.upstream
def test_weights_that_came_past_the_draft_are_noticed(found: dict[str, Any]) -> None:
    answer = found["past us"]
    assert isinstance(answer, str), answer
    assert "a weight update did not reach the draft" in answer
    assert f"names at the target  {len(TRAINED)}" in answer


@pytest.mark.upstream
def test_all_patches_are_in_place(found: dict[str, Any], version: str) -> None:
    states = {name: state for name, (state, _) in found["patches"].items() if name.startswith("sglang.draft.")}
    ways = {"select"} if version == "0.5.23" else {"tensor", "distributed", "disk"}
    assert states == dict.fromkeys((f"sglang.draft.{name}" for name in ("watch", "update", *ways)), "verified")


# -- what was written (no SGLang) --------------------------------------------------------------------------------------


class Model(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.whole = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.packed = torch.nn.Parameter(torch.zeros(2, 4, 4), requires_grad=False)
        self.never = torch.nn.Parameter(torch.zeros(3), requires_grad=False)

    def load_weights(self, named: Any) -> None:
        for name, tensor in named:
            if name == "whole":
                self.whole.data.copy_(tensor)
            elif name == "expert":
                self.packed.data[1].narrow(0, 0, 2).copy_(tensor)  # as a loader writes a part of a part
            elif name == "anew":
                self.whole.data = tensor.clone()


def test_what_can_be_read_once_is_read_by_all() -> None:
    """SGLang's transports give lists; a loader of a user's own may give what it reads as it comes."""
    target, first, second = Model(), Model(), Model()
    with draft._followed(target, [first, second]):
        target.load_weights((name, torch.ones(4, 4)) for name in ["whole"])
    assert [float(each.whole.sum()) for each in (target, first, second)] == [16, 16, 16]
    target.load_weights([("whole", torch.zeros(4, 4))])
    assert [float(each.whole.sum()) for each in (target, first, second)] == [0, 16, 16]


def test_a_target_that_fails_is_left_as_it_was() -> None:
    target, follower = Model(), Model()
    with pytest.raises(RuntimeError), draft._followed(target, [follower]):
        target.load_weights([("whole", torch.ones(3))])
    assert float(follower.whole.sum()) == 0
    target.load_weights([("whole", torch.ones(4, 4))])
    assert float(follower.whole.sum()) == 0


@pytest.fixture
def written() -> draft.Written:
    model = Model()
    return draft.Written(model, model.load_weights)


@pytest.mark.parametrize(
    ("named", "names"),
    [
        ({}, set()),
        ({"unknown": torch.ones(4, 4)}, set()),
        ({"whole": torch.zeros(4, 4)}, {"whole"}),  # the same values as before
        ({"expert": torch.ones(2, 4)}, {"packed"}),
        ({"anew": torch.ones(4, 4)}, {"whole"}),
        ({"whole": torch.ones(4, 4), "expert": torch.ones(2, 4)}, {"whole", "packed"}),
    ],
)
def test_what_is_written_to_is_told_by_the_parameters_memory(
    written: draft.Written, named: dict[str, Any], names: set[str]
) -> None:
    written(named.items())
    assert written.names == names


def test_what_a_pool_of_threads_writes_is_seen_too() -> None:
    """SGLang's DeepSeek models load weights that are on the CPU so."""
    model = Model()
    submit = ThreadPoolExecutor.submit

    def load_weights(named_tensors: Any) -> None:
        with ThreadPoolExecutor() as pool:
            futures = [pool.submit(model.load_weights, [each]) for each in named_tensors]
        assert [future.result() for future in futures] == [None] * len(futures)

    written = draft.Written(model, load_weights)
    written([("whole", torch.ones(4, 4)), ("expert", torch.ones(2, 4))])
    assert written.names == {"whole", "packed"}
    assert ThreadPoolExecutor.submit is submit


def test_an_update_must_write_what_the_checkpoint_did(written: draft.Written) -> None:
    target = torch.nn.Linear(2, 2)
    written({"whole": torch.ones(4, 4), "expert": torch.ones(2, 4)}.items())
    written.begin()
    assert written.missing(target) == ["packed", "whole"]
    written({"whole": torch.ones(4, 4)}.items())
    assert written.missing(target) == ["packed"]
    written({"expert": torch.ones(2, 4)}.items())
    assert written.missing(target) == []  # `never` is in no checkpoint
    written.begin()
    assert written.missing(target) == ["packed", "whole"]
    target.shared = written._model.whole
    assert written.missing(target) == ["packed"]


def test_a_draft_that_began_without_a_checkpoint_must_be_written_whole(written: draft.Written) -> None:
    written.begin()
    written({"whole": torch.ones(4, 4), "expert": torch.ones(2, 4)}.items())
    assert written.missing(torch.nn.Linear(2, 2)) == ["never"]


def test_only_drafts_of_a_trained_run_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, is_draft, watched in (
        ("trained", True, True),
        ("trained", False, False),
        ("frozen", True, False),
        ("nonsense", True, False),
    ):
        monkeypatch.setenv(draft.DRAFT, said)
        model = draft.watch_drafts(lambda config: Model(), SimpleNamespace(is_draft_model=is_draft))
        assert isinstance(model.load_weights, draft.Written) is watched, said


def test_a_draft_that_nobody_watched_is_refused() -> None:
    with pytest.raises(PluginError, match="nobody watched how Model was loaded"):
        draft._written(Model())


# -- halves of the input projection ------------------------------------------------------------------------------------

SLIME = ("v0.2.2", "v0.2.3", "v0.2.4", "v0.3.0", "v0.3.1", "624b824a898ab0ec1fcb4d373004c7f3852bf515")
CONVERTERS = {  # family -> slime's module, its function
    "mimo": ("mimo", "convert_mimo_to_hf"),
    "deepseek": ("deepseekv3", "convert_deepseekv3_to_hf"),
    "glm4_moe": ("glm4moe", "convert_glm4moe_to_hf"),
    "qwen3_next": ("qwen3_next", "convert_qwen3_next_to_hf"),
    "qwen3_5": ("qwen3_5", "convert_qwen3_5_to_hf"),
}
HF_NAMES = {
    "mimo": "model.mtp_layers.0.input_proj.weight",
    "deepseek": "model.layers.2.eh_proj.weight",
    "glm4_moe": "model.layers.2.eh_proj.weight",
    "qwen3_next": "mtp.fc.weight",
    "qwen3_5": "mtp.fc.weight",
}
READERS = {  # family -> slime's module, its function, from v0.3.1
    "mimo": ("qwen", "mimo_hf_tensor"),
    "deepseek": ("deepseek", "deepseek_hf_tensor"),
    "glm4_moe": ("glm", "glm4_moe_hf_tensor"),
    "qwen3_next": ("qwen3_next", "qwen3_next_hf_tensor"),
    "qwen3_5": ("qwen3_5", "qwen3_5_hf_tensor"),
}
NAME = "module.module.mtp.layers.0.eh_proj.weight"


def slimes(commit: str, folder: str, module: str) -> Any:
    """A module of slime's, without what is around it; None where that release has none."""
    path = unpacked_commit(("SLIME_HOME", "~/slime", commit), "slime") / "slime/backends/megatron_utils" / folder
    if not (path / f"{module}.py").is_file():
        return None
    package = types.ModuleType(f"slime_{commit.replace('.', '_')}_{folder}")
    package.__path__ = [str(path)]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.{module}")


def sent(commit: str, family: str, weight: Any) -> Any:
    """What slime makes of the trainer's projection for the engine."""
    module, function = CONVERTERS[family]
    converter = slimes(commit, "megatron_to_hf", module)
    if converter is None or "eh_proj" not in Path(converter.__file__).read_text():
        pytest.skip(f"slime {commit} has no draft of {family}")
    args = SimpleNamespace(num_layers=2, kv_channels=2, hidden_size=HIDDEN, num_attention_heads=2, num_query_groups=1)
    ((name, tensor),) = getattr(converter, function)(args, NAME, weight)
    assert name == HF_NAMES[family]
    return tensor


class Projection(torch.nn.Module):  # type: ignore[misc]
    """As Megatron's parallel layers: returns its bias as well."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: Any) -> tuple[Any, None]:
        return x @ self.weight.T, None


def trained_with(weight: Any, embedding: Any, hidden: Any, rewire: str = "") -> Any:
    """What Megatron's own MTP layer feeds its transformer layer with, with norms that double and treble."""
    mtp = pytest.importorskip("megatron.core.transformer.multi_token_prediction")
    layer = torch.nn.Module()
    layer.eh_proj = Projection(weight.clone())
    layer.enorm, layer.hnorm, layer.sequence_parallel = (lambda x: 2 * x), (lambda x: 3 * x), False
    if rewire:
        assert halves.exchange_inputs(rewire, layer) == (rewire == "qwen3_next")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mtp, "gather_from_tensor_model_parallel_region", lambda x: x)
        return mtp.MultiTokenPredictionLayer._concat_embeddings(layer, hidden.clone(), embedding.clone())


@pytest.mark.upstream
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("commit", SLIME)
def test_trainer_and_engine_feed_the_draft_alike(found: dict[str, Any], commit: str, family: str) -> None:
    """By what the forward passes give, not by names that come back: two wrong exchanges are a round trip."""
    checkpoint, embedding, hidden = inputs()
    weight = sent(commit, family, checkpoint)  # each of slime's conversions is its own inverse
    assert sent(commit, family, weight).equal(checkpoint)
    engine = torch.tensor(found[f"projection of {family}"])
    by_itself = trained_with(weight, embedding, hidden)
    assert by_itself.equal(engine) is (family not in halves.EXCHANGED)
    assert trained_with(weight, embedding, hidden, rewire=family).equal(engine)


class Files(dict[str, Any]):
    """A checkpoint, as slime's readers take one."""

    get_tensor = dict.__getitem__


@pytest.mark.upstream
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("commit", SLIME[4:])
def test_slime_reads_a_checkpoint_as_it_sends_weights(commit: str, family: str) -> None:
    """So that the exchange is there from the first step on, and not only in what is sent."""
    module, function = READERS[family]
    reader = slimes(commit, "hf_to_megatron", module)
    assert reader is not None
    checkpoint, *_ = inputs()
    files = Files({HF_NAMES[family]: checkpoint})
    config = SimpleNamespace(num_hidden_layers=2, tie_word_embeddings=False)
    weight = getattr(reader, function)(NAME, files, config)
    assert sent(commit, family, weight).equal(checkpoint)
    assert weight.equal(checkpoint) is (family not in ("mimo", *halves.EXCHANGED))


def test_gradients_reach_the_half_that_the_input_is_for() -> None:
    layer = torch.nn.Module()
    layer.eh_proj = Projection(torch.zeros(1, 2))
    assert halves.exchange_inputs("qwen3_next", layer) == 1
    out, _ = layer.eh_proj(torch.tensor([[5.0, 7.0]]))  # embedding, hidden
    out.sum().backward()
    assert layer.eh_proj.weight.grad.tolist() == [[7.0, 5.0]]


def test_only_the_named_family_is_rewired() -> None:
    layer = torch.nn.Module()
    layer.eh_proj = Projection(torch.tensor([[1.0, 10.0]]))
    assert halves.exchange_inputs("qwen3_5_moe", layer) == 0
    assert layer.eh_proj(torch.tensor([[5.0, 7.0]]))[0].tolist() == [[75.0]]


@pytest.mark.upstream
@pytest.mark.parametrize("commit", SLIME)
def test_these_slimes_exchange(commit: str) -> None:
    with reading_from(unpacked_commit(("SLIME_HOME", "~/slime", commit), "slime")):
        assert exchanges_halves() is (commit != "v0.2.2")  # which has no draft of this family
