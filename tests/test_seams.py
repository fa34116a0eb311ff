"""Seams: every hook is connected, every patch is explained, and only what a plugin needs is touched."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import Packing, Rank, Schedule, hookimpl, hookspecs
from miles_plugins.compat import slime_rollout
from miles_plugins.errors import PluginError, UpstreamError
from miles_plugins.manager import Installed, Plugin, Plugins
from miles_plugins.microbatch import Microbatch, current_microbatch, set_current
from miles_plugins.patches import seam as seam_module
from miles_plugins.patches.seam import Seam, Variant, all_seams, needed_seams, patch_set
from miles_plugins.patches.sglang import requests
from miles_plugins.patches.slime import metrics, responses, rollout_manager, shared_data, training
from miles_plugins.patching import Patch, check_statically, has_attribute, has_parameter

ROOT = Path(__file__).resolve().parents[1]

SEAMS = all_seams()
PATCHES = [patch for seam in SEAMS for patch in seam.everywhere()]
HOOKS = {name: value for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")}
# Called by the layer itself: by its commands, or in patches that are there whenever any plugin is (no Seam.hooks).
OF_THE_LAYER = {
    "tiny_model_shape",
    "prepare_tiny_model",
    "rehearsal_flags",
    "default_flags",
    "register_arguments",
    "configure",
    "process_environment",
    "rollout_ready",
    "receive_samples",
    "collect_train_data",
    "probe",
    "doctor",
}
START_UP = {"driver", "worker", "trainer", "sglang_child"}
PROCESSES = {
    "driver",
    "rollout_manager",
    "engine",
    "sglang_server",
    "sglang_scheduler",
    "sglang_detokenizer",
    "trainer",
}


def plugins(**implementations) -> Plugins:
    module = ModuleType("a")
    vars(module).update({"__file__": "", **{name: hookimpl(value) for name, value in implementations.items()}})
    return Plugins([Plugin(Installed("a", "some-plugins", "1.0", None), module)])


def implementing(hook: str) -> Plugins:
    """A plugin with one hook, which wants no argument."""
    return plugins(**{hook: lambda: None})


# -- declarations ----------------------------------------------------------------------------------------------------


def test_there_are_seams():
    assert len(SEAMS) >= 15
    assert len(PATCHES) >= 30
    assert len(HOOKS) >= 18


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_a_seam_names_hooks_that_exist(seam):
    assert set(seam.hooks) <= set(HOOKS)
    assert seam.patches
    assert seam.only_in <= START_UP


def test_seams_have_different_names():
    names = [seam.name for seam in SEAMS]
    assert len(names) == len(set(names))


def test_patches_have_different_ids():
    """Those of two releases may be the same touch at two places."""
    ids = [each for seam in SEAMS for each in {patch.id for patch in seam.everywhere()}]
    assert sorted({each for each in ids if ids.count(each) > 1}) == []
    for seam in SEAMS:
        for patches in (seam.patches, *(variant.patches for variant in seam.variants)):
            assert len({patch.id for patch in patches}) == len(patches)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.id)
def test_a_patch_says_why_what_forces_it_and_until_when(patch):
    assert patch.reason
    assert patch.upstream.startswith("https://")
    assert patch.retire_when
    assert patch.roles <= PROCESSES


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_a_patch_is_armed_where_it_is_needed(seam):
    """A role that needs a patch must come from a start-up role in which the seam is armed."""
    starts_as = {"driver": "driver", "rollout_manager": "worker", "engine": "worker", "trainer": "trainer"}
    for patch in seam.everywhere():
        for role in patch.roles:
            assert seam.needed_in(starts_as.get(role, "sglang_child")), f"{patch.id} in {role}"


# -- variants --------------------------------------------------------------------------------------------------------


def variant(**changed: Any) -> Variant:
    return Variant("old releases", (), **changed)


HERE, GONE = has_attribute("json:dumps"), has_attribute("json:dumps_of_long_ago")


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({"has": (HERE,)}, True),
        ({"has": (GONE,)}, False),
        ({"has": (HERE, GONE)}, False),
        ({"lacks": (GONE,)}, True),
        ({"lacks": (HERE,)}, False),
        ({"lacks": (GONE, HERE)}, False),
        ({"has": (HERE,), "lacks": (GONE,)}, True),
        ({"has": (HERE,), "lacks": (HERE,)}, False),
        ({"has": (has_parameter("json:dumps", "indent"),)}, True),
        ({"has": (has_parameter("json:dumps", "colour"),)}, False),
        ({"has": (has_attribute("json"),), "lacks": (has_attribute("json.observability"),)}, True),
    ],
)
def test_a_variant_is_known_by_what_upstream_has_and_lacks(changed, fits):
    assert variant(**changed).fits() is fits


def test_the_first_variant_that_fits_is_used_and_else_the_newest_releases_patches():
    newest, older, oldest = (PATCHES[number] for number in range(3))
    seam = Seam(
        "s", (), (newest,), variants=(Variant("b", (older,), has=(GONE,)), Variant("c", (oldest,), has=(HERE,)))
    )
    assert seam.here() == (oldest,)
    assert seam.everywhere() == (newest, older, oldest)
    assert [each.id for each in seam_module.patch_set([seam])] == [oldest.id]
    # Where nothing fits, the newest's are checked, and say by name what is missing.
    assert Seam("s", (), (newest,), variants=(Variant("b", (older,), has=(GONE,)),)).here() == (newest,)


@pytest.mark.parametrize("seam", [seam for seam in SEAMS if seam.variants], ids=lambda seam: seam.name)
def test_a_release_that_lost_something_is_not_taken_for_another(seam):
    """A variant is chosen by something that must be there: an empty upstream is none of them."""
    for each in seam.variants:
        assert each.releases
        assert each.has or each.lacks


def test_order_is_declared_between_patches_of_one_target_that_exist():
    ids = {patch.id for patch in PATCHES}
    for patch in PATCHES:
        assert set(patch.before) | set(patch.after) <= ids, patch.id


def test_all_modules_with_seams_are_listed():
    found = {
        "miles_plugins." + ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in (ROOT / "patches").rglob("*.py")
        if any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SEAMS"
            for node in ast.parse(file.read_text()).body
        )
    }
    assert found == set(seam_module.MODULES)


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_every_hook_is_connected():
    connected = {hook for seam in SEAMS for hook in seam.hooks}
    assert connected | OF_THE_LAYER == set(HOOKS)
    assert connected & OF_THE_LAYER == set()


def calls_of_hooks() -> Iterator[tuple[str, str, set[str]]]:
    """Every call of a hook in the layer: file, hook, argument names.

    Written `….hook.name(argument=…)`, `ask_each("name", argument=…)` or `chain("name", "argument", …, argument=…)`; in
    the embedded host also `…._hook.name(argument=…)`.
    """
    for folder in ("patches", "entrypoints", "miles_plugins"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                owner = ast.unparse(node.func.value)
                keywords = {keyword.arg or "**" for keyword in node.keywords}
                where = f"{file.relative_to(ROOT)}:{node.lineno}"
                if owner == "hook" or owner.endswith((".hook", "._hook")):
                    yield where, node.func.attr, keywords
                elif node.func.attr == "ask_each" and isinstance(node.args[0], ast.Constant):
                    yield where, node.args[0].value, keywords
                elif node.func.attr == "chain" and isinstance(node.args[0], ast.Constant):
                    yield where, node.args[0].value, keywords | {node.args[1].value}


def test_every_hook_is_called_with_just_its_arguments():
    """pluggy takes a call without an argument that only some plugins want, and fails in those."""
    called = set()
    for where, hook, keywords in calls_of_hooks():
        assert hook in HOOKS, where
        assert keywords == set(inspect.signature(HOOKS[hook]).parameters), where
        if "/embedded/" not in where:  # the real stack is to call each of them
            called.add(hook)
    by_hand = {"register_arguments", "doctor", "prepare_tiny_model"}
    missing = set(HOOKS) - called - by_hand - {"choose_device"}  # a switch, never called
    assert missing == set()


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_says_when_and_where_it_is_called(hook):
    text = inspect.getdoc(HOOKS[hook])
    assert text
    assert "every process" in text or "before any run" in text or any(role in text for role in PROCESSES)


@pytest.mark.parametrize("name", ["r3_replay", "int4_qat", "fp8_unified", "cpu_rehearsal", "metrics_jsonl"])
def test_the_sides_of_our_plugins_are_processes_that_report(name):
    (plugin,) = Plugins.named([name])
    assert set(plugin.sides) <= PROCESSES
    assert plugin.summary.endswith(".")


# -- only what is needed ---------------------------------------------------------------------------------------------


ALWAYS = {seam.name for seam in SEAMS if not seam.hooks}


def test_without_a_hook_of_a_seam_it_is_not_there():
    assert {seam.name for seam in needed_seams(plugins())} == ALWAYS
    assert {seam.name for seam in needed_seams(implementing("configure"))} == ALWAYS


@pytest.mark.parametrize("hook", sorted({hook for seam in SEAMS for hook in seam.hooks}))
def test_a_hook_brings_its_seams_and_no_others(hook):
    found = {seam.name for seam in needed_seams(implementing(hook))}
    assert found == ALWAYS | {seam.name for seam in SEAMS if hook in seam.hooks}
    assert found > ALWAYS


def ids_for(*names: str) -> set[str]:
    return {patch.id for patch in patch_set(needed_seams(Plugins.named(names)))}


def test_our_plugins_get_the_patches_they_act_through():
    assert "slime.metrics.log" in ids_for("metrics")
    assert not any(each.startswith(("megatron.", "torch.", "sglang.cpu", "slime.cpu")) for each in ids_for("metrics"))
    assert {"megatron.router.select-experts", "megatron.recompute.checkpoint", "sglang.request.received"} <= ids_for(
        "r3"
    )
    assert not any(".cpu." in each for each in ids_for("r3"))
    of_the_routing = {
        *("slime.response.received", "slime.shared-data.schedule", "slime.shared-data.receive"),
        "slime.metrics.rollout",
    }
    assert of_the_routing <= ids_for("r3")
    assert not of_the_routing & (ids_for("metrics") | ids_for("cpu"))
    assert "torch.cpu.cuda.set-device" in ids_for("cpu")
    assert "megatron.router.select-experts" not in ids_for("cpu")


def test_more_plugins_get_the_union_of_patches():
    assert ids_for("r3", "cpu", "metrics") == ids_for("r3") | ids_for("cpu") | ids_for("metrics")


def test_a_seam_confined_to_a_role_is_not_armed_elsewhere():
    patch = Patch(id="x", target="a:b", wrap=print, reason="test")
    everywhere, confined = Seam("e", (), (patch,)), Seam("c", (), (patch,), frozenset({"trainer"}))
    assert [everywhere.needed_in(role) for role in ("driver", "trainer")] == [True, True]
    assert [confined.needed_in(role) for role in ("driver", "trainer")] == [False, True]


def test_listing_the_seams_imports_nothing_of_upstream():
    """So it is in this process as well, unless another test has imported it; `tests/test_layout.py` looks closely."""
    assert all(isinstance(seam, Seam) for seam in SEAMS)


# -- against the real upstream ---------------------------------------------------------------------------------------


@pytest.fixture
def upstream(monkeypatch, slime, megatron):
    for checkout in (slime, megatron):
        monkeypatch.syspath_prepend(str(checkout))


@pytest.mark.upstream
@pytest.mark.usefixtures("upstream")
@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_a_seams_patches_fit_the_installed_upstream(seam):
    for patch in seam.here():
        notes = check_statically(patch)
        package = patch.target.partition(".")[0].partition(":")[0]
        assert f"not installed here: {package}" not in notes or package not in ("slime", "megatron", "torch", "ray")
        assert [note for note in notes if note.startswith("drifted")] == []


@pytest.mark.upstream
@pytest.mark.usefixtures("upstream")
def test_the_check_notices_a_target_that_is_not_there():
    with pytest.raises(PluginError, match="slime") as caught:
        check_statically(Patch(id="x", target="slime.utils.arguments:parse_argss", wrap=print, reason="test"))
    assert "slime.utils.arguments:parse_args" in str(caught.value)


# -- what the wrappers of slime's training loop do -------------------------------------------------------------------


@pytest.fixture
def active(monkeypatch):
    """A process with one made-up plugin."""

    def make(**implementations) -> None:
        chosen = plugins(**implementations)
        for module in (training, metrics, requests, responses, rollout_manager, shared_data):
            monkeypatch.setattr(module, "current", lambda: SimpleNamespace(hook=chosen.hook, plugins=chosen))

    yield make
    set_current(None)


@pytest.fixture
def passes(active):
    """What the hooks around a pass are told."""
    told: list[tuple] = []
    active(
        pass_begins=lambda stage: told.append(("begins", stage)),
        pass_ends=lambda stage, error: told.append(("ends", stage, error)),
        step_metrics=lambda: {"a/b": 1.0},
    )
    return told


def get_values():
    """slime tells the critic's pass by this function's name."""


def get_log_probs():
    """Any other."""


@pytest.mark.parametrize(
    ("function", "prefix", "stage"),
    [
        (get_log_probs, "", "log_prob"),
        (get_log_probs, "ref_", "ref_log_prob"),
        (get_log_probs, "teacher_", "teacher_log_prob"),
        (get_values, "", "values"),
    ],
)
def test_a_forward_pass_is_told_by_its_stage(passes, function, prefix, stage):
    def original(f, args, model, data_iterator, *rest, store_prefix="", **kwargs):
        passes.append(("runs", f, args, model, data_iterator, rest, store_prefix, kwargs))
        return "result"

    result = training.forward_only(original, function, "args", ["m"], ["iterator"], 3, store_prefix=prefix, more=1)
    assert result == "result"
    runs = ("runs", function, "args", ["m"], ["iterator"], (3,), prefix, {"more": 1})
    assert passes == [("begins", stage), runs, ("ends", stage, None)]


def test_a_training_step_is_a_pass_and_its_metrics_are_extended(passes):
    def original(args, rollout_id, step_id, data_iterator, model, *rest):
        passes.append("runs")
        return {"loss": 0.5}, 2.0

    loss, grad_norm = training.train_one_step(original, "args", 1, 2, ["iterator"], ["m"], "optimizer")
    assert (loss, grad_norm) == ({"loss": 0.5, "a/b": 1.0}, 2.0)
    assert passes == [("begins", "train"), "runs", ("ends", "train", None)]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_pass_that_raises_ends_all_the_same(passes, error):
    def original(*args, **kwargs):
        set_current(Microbatch({}, None))
        raise error

    with pytest.raises(type(error)):
        training.train_one_step(original, "args", 1, 2, ["iterator"], ["m"])
    assert passes == [("begins", "train"), ("ends", "train", error)]
    assert current_microbatch() is None
    assert training._pass_now.get() is None


def test_after_a_pass_there_is_no_microbatch(passes):
    training.forward_only(
        lambda *args, **kwargs: set_current(Microbatch({}, None)), get_log_probs, "args", ["m"], [], store_prefix=""
    )
    assert current_microbatch() is None


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_model_is_shown_with_its_role(active, role):
    shown = []
    active(model_built=lambda args, model, role: shown.append((args, model, role)))

    def setup_model_and_optimizer(args, role):
        return training.get_model(lambda provider: ["chunk"], "provider")

    assert training.remember_role(setup_model_and_optimizer, "args", role) == ["chunk"]
    assert training.get_model(lambda: ["another"]) == ["another"], "a model that slime does not build is not shown"
    assert shown == [("args", ["chunk"], role)]


@pytest.mark.parametrize("answer", [True, None, False])
def test_slimes_own_queues_are_filled_unless_a_plugin_takes_the_routing(active, answer):
    active(take_routed_experts=lambda rollout_data: answer)
    result = training.fill_routing_replay(lambda *args: args, SimpleNamespace(args="args"), "iterator", [1], {"a": 1})
    assert (result is None) is (answer is True)


def test_a_request_is_changed_before_sglang_sees_it(active):
    active(receive_engine_request=lambda server_args, request: request.append(server_args))
    server = SimpleNamespace(server_args="server args")
    assert requests.generate_request(lambda self, obj, *rest: (obj, rest), server, [], "raw") == (
        ["server args"],
        ("raw",),
    )


@pytest.mark.parametrize("meta_info", [{"id": 1, "routed_experts": "…"}, {}], ids=["a response", "a tool's tokens"])
def test_a_response_is_shown_before_slime_takes_it_over(active, meta_info):
    told, asked = [], dict(meta_info)

    def receive_response(args, sample, meta_info):
        told.append((args, sample, dict(meta_info)))
        meta_info.pop("routed_experts")

    active(receive_response=receive_response)
    result = responses.apply_meta_info(
        lambda *args, **kwargs: (args, kwargs), "sample", "args", asked, new_token_count=2
    )
    assert told == ([("args", "sample", meta_info)] if meta_info else [])
    assert "routed_experts" not in asked
    assert result == (("sample", "args", asked), {"new_token_count": 2})


def test_plugins_add_to_the_metrics_of_a_rollout(active):
    shown = []
    active(rollout_metrics=lambda args, samples: shown.append((args, samples)) or {"mine/a": 2.0})

    def compute() -> dict[str, float]:
        return metrics.compute_metrics_from_samples(lambda args, samples: {"theirs": 1.0}, "args", ["sample"])

    assert metrics.log_rollout_data(compute) == {"theirs": 1.0, "mine/a": 2.0}
    assert shown == [("args", ["sample"])]
    assert compute() == {"theirs": 1.0}, "slime computes those of an evaluation with the same function"


def test_metrics_are_shown_as_they_are_logged(active):
    shown = []
    active(metrics_logged=lambda args, metrics, step_key: shown.append((args, metrics, step_key)))
    assert metrics.log(lambda *args: "logged", "args", {"a": 1}, "train/step") == "logged"
    assert shown == [("args", {"a": 1}, "train/step")]


# -- where tokens come from ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layout():
    """slime's layout on a rank of our choice, without slime and Megatron: two chunks of a sample a rank, zigzag."""
    torch = pytest.importorskip("torch")
    patch = pytest.MonkeyPatch()
    state = SimpleNamespace(cp=1, cp_rank=0, tp=1, tp_rank=0)

    def slice_with_cp(tokens, pad):
        if state.cp == 1:
            return tokens
        size = -(-len(tokens) // (2 * state.cp))
        padded = torch.nn.functional.pad(tokens, (0, 2 * state.cp * size - len(tokens)), value=pad)
        at = [state.cp_rank, 2 * state.cp - state.cp_rank - 1]
        return torch.cat([padded[size * each : size * (each + 1)] for each in at])

    core, utils = ModuleType("megatron.core"), ModuleType("slime.backends.megatron_utils.cp_utils")
    core.mpu = SimpleNamespace(
        get_context_parallel_world_size=lambda: state.cp,
        get_context_parallel_rank=lambda: state.cp_rank,
        get_tensor_model_parallel_world_size=lambda: state.tp,
        get_tensor_model_parallel_rank=lambda: state.tp_rank,
    )
    utils.slice_with_cp = slice_with_cp
    for name in ("megatron", "slime", "slime.backends", "slime.backends.megatron_utils"):
        patch.setitem(sys.modules, name, ModuleType(name))
    patch.setitem(sys.modules, "megatron.core", core)
    patch.setitem(sys.modules, "slime.backends.megatron_utils.cp_utils", utils)
    state.slice_with_cp, state.torch = slice_with_cp, torch
    yield state
    patch.undo()


def slime_batch(layout, samples, multiplier: int, allgather: bool):
    """A microbatch as slime's get_batch packs it, with token 0 for padding."""
    torch = layout.torch
    multiple = layout.tp * multiplier
    if allgather:
        whole = torch.cat(samples)
        whole = torch.nn.functional.pad(whole, (0, -len(whole) % (multiple * layout.cp)), value=0)
        tokens = whole.chunk(layout.cp)[layout.cp_rank]
    else:
        tokens = torch.cat([layout.slice_with_cp(sample, 0) for sample in samples])
        tokens = torch.nn.functional.pad(tokens, (0, -len(tokens) % multiple), value=0)
    return {"unconcat_tokens": samples, "tokens": tokens[None]}


def arguments(layout, multiplier: int, allgather: bool, sequence_parallel: bool = False):
    return SimpleNamespace(
        context_parallel_size=layout.cp,
        tensor_model_parallel_size=layout.tp,
        data_pad_size_multiplier=multiplier,
        allgather_cp=allgather,
        sequence_parallel=sequence_parallel,
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    cp=st.sampled_from([1, 2, 4]),
    tp=st.sampled_from([1, 2]),
    multiplier=st.sampled_from([1, 4]),
    allgather=st.booleans(),
)
def test_positions_of_all_ranks_together_are_every_token_once(layout, lengths, cp, tp, multiplier, allgather):
    torch = layout.torch
    samples = list(torch.arange(1, sum(lengths) + 1).split(lengths))
    stream = torch.cat(samples)
    layout.cp, layout.tp = cp, tp
    args = arguments(layout, multiplier, allgather, sequence_parallel=True)
    seen = []
    for layout.cp_rank in range(cp):
        batch = slime_batch(layout, samples, multiplier, allgather)
        positions = training.token_positions(args, batch)
        assert positions.shape == batch["tokens"].shape[1:]
        real = positions >= 0
        assert torch.equal(stream[positions[real]], batch["tokens"][0][real])
        assert (batch["tokens"][0][~real] == 0).all()
        parts = [Packing.of(args).local(positions, rank) for rank in range(tp)]
        assert torch.equal(torch.cat(parts), positions), "the slices of the tensor-parallel ranks make up the whole"
        assert len({len(part) for part in parts}) == 1
        seen += positions[real].tolist()
    assert sorted(seen) == list(range(sum(lengths)))


@pytest.fixture(scope="module")
def slimes_own(layout, slime):
    """slime's real `get_batch`, taken out of its file: importing it would take Ray and a GPU."""
    folder = slime / "slime" / "backends" / "megatron_utils"
    torch = layout.torch
    namespace = {
        "torch": torch,
        "F": torch.nn.functional,
        "mpu": sys.modules["megatron.core"].mpu,
        "Callable": Callable,
    }
    namespace |= {"PackedSeqParams": SimpleNamespace}
    for file, name in (("cp_utils.py", "slice_with_cp"), ("data.py", "get_batch")):
        tree = ast.parse((folder / file).read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        exec(compile(tree, file, "exec", flags=annotations.compiler_flag), namespace)
    return SimpleNamespace(**namespace)


@pytest.mark.upstream
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    cp=st.sampled_from([1, 2, 4]),
    tp=st.sampled_from([1, 2]),
    multiplier=st.sampled_from([1, 4]),
    allgather=st.booleans(),
)
def test_positions_follow_slimes_own_layout(layout, slimes_own, lengths, cp, tp, multiplier, allgather):
    torch = layout.torch
    samples = list(torch.arange(1, sum(lengths) + 1).split(lengths))
    one_each = {"loss_masks": [torch.ones(1) for _ in samples], "total_lengths": lengths}
    one_each |= {"response_lengths": [1] * len(samples)}
    iterator = SimpleNamespace(get_next=lambda keys: {"tokens": samples, **one_each})
    layout.cp, layout.tp, layout.tp_rank = cp, tp, 0
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self: self)
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        for layout.cp_rank in range(cp):
            batch = slimes_own.get_batch(iterator, ["tokens"], multiplier, allgather)
            positions = training.token_positions(arguments(layout, multiplier, allgather), batch)
            tokens = batch["tokens"][0]
            assert torch.equal(torch.where(positions >= 0, positions + 1, 0), tokens)
            seen += positions[positions >= 0].tolist()
    assert sorted(seen) == list(range(sum(lengths)))


@pytest.mark.parametrize("change", ["order", "shift", "length"])
def test_a_layout_that_is_not_ours_is_refused(layout, change):
    layout.cp, layout.cp_rank, layout.tp = 1, 0, 1
    samples = list(layout.torch.arange(1, 8).split([3, 4]))
    batch = slime_batch(layout, samples, 4, False)
    tokens = batch["tokens"][0]
    if change == "length":
        batch["tokens"] = tokens[None, :-1]
    else:
        batch["tokens"] = (tokens.flip(0) if change == "order" else tokens.roll(1))[None]
    with pytest.raises(PluginError, match="lays out a microbatch in a way"):
        training.token_positions(arguments(layout, 4, False), batch)


@pytest.mark.parametrize("cut", ["contiguous", "the other rank's"])
def test_a_cut_that_is_not_ours_is_refused_also_where_tokens_repeat(layout, monkeypatch, cut):
    """A sample that repeats one token hides any order of its tokens; where slime cuts positions shows it."""
    torch = layout.torch
    layout.cp, layout.cp_rank, layout.tp = 2, 0, 1
    samples = [torch.full((8,), 5)]
    args = arguments(layout, 1, False)
    batch = slime_batch(layout, samples, 1, False)
    assert training.token_positions(args, batch).tolist() == [0, 1, 6, 7]
    other = {"contiguous": slice(0, 4), "the other rank's": slice(2, 6)}[cut]
    utils = sys.modules["slime.backends.megatron_utils.cp_utils"]
    monkeypatch.setattr(utils, "slice_with_cp", lambda tokens, pad: tokens[other])
    with pytest.raises(PluginError, match="lays out a microbatch in a way"):
        training.token_positions(args, batch)


def begun_microbatches(layout, active, iterators, drawn, tp_rank: int = 0, **changed):
    """What `microbatch_begins` is told in a pass of these iterators, of which `drawn` is drawn from."""
    layout.cp, layout.cp_rank, layout.tp, layout.tp_rank = 1, 0, changed.pop("tp", 1), tp_rank
    samples = [layout.torch.arange(1, 5)]
    asked, begun = [], []

    def original(iterator, keys, *rest):
        asked.append((keys, rest))
        return slime_batch(layout, samples, 1, False)

    active(
        microbatch_keys=lambda args: ["tokens", "rollout_routed_experts"],
        microbatch_begins=lambda args, microbatch: begun.append((args, microbatch, current_microbatch())),
    )
    args = arguments(layout, 1, False, **changed)
    token = training._pass_now.set((args, iterators))
    try:
        batch = training.get_batch(original, drawn, ["tokens", "rewards"], 4)
    finally:
        training._pass_now.reset(token)
    assert asked == [(["tokens", "rewards", "rollout_routed_experts"], (4,))]
    ((told_args, microbatch, current),) = begun
    assert told_args is args
    assert microbatch is current
    assert microbatch.batch is batch
    return microbatch


def test_a_microbatch_begins_with_the_fields_that_plugins_want(layout, active):
    microbatch = begun_microbatches(layout, active, ["iterator"], "iterator")
    assert microbatch.positions.tolist() == [0, 1, 2, 3]
    assert microbatch.chunk == 0


def test_a_microbatch_has_the_tokens_of_its_tensor_parallel_rank(layout, active):
    for tp_rank, expected in enumerate([[0, 1], [2, 3]]):
        told = begun_microbatches(layout, active, ["i"], "i", tp_rank=tp_rank, tp=2, sequence_parallel=True)
        assert told.positions.tolist() == expected


def test_a_microbatch_says_which_virtual_stage_it_passes(layout, active):
    """By the identity of the iterator: those of two stages may well be equal."""
    iterators = [[1], [1], [1]]
    for chunk, iterator in enumerate(iterators):
        assert begun_microbatches(layout, active, iterators, iterator).chunk == chunk
    with pytest.raises(UpstreamError, match="none of its pass"):
        begun_microbatches(layout, active, iterators, [1])


def test_outside_of_a_pass_a_batch_is_only_looked_at(active):
    active(microbatch_begins=lambda: pytest.fail("no pass runs"), microbatch_keys=lambda: ["more"])
    assert training.get_batch(lambda *args: args, "iterator", ["tokens"], 4) == ("iterator", ["tokens"], 4)


# -- what the rollout manager shares with the trainers ---------------------------------------------------------------


@pytest.fixture
def ray(monkeypatch):
    """An object store of our own: a reference is worth nothing by itself, and every fetch is noted."""
    store, fetched = [], []

    class Reference:
        def __init__(self, number: int) -> None:
            self.number = number

    def put(value):
        assert not isinstance(value, Reference)
        store.append(value)
        return Reference(len(store) - 1)

    def get(references):
        if isinstance(references, list):
            return [get(each) for each in references]
        fetched.append(references.number)
        return store[references.number]

    fake = SimpleNamespace(put=put, get=get, store=store, fetched=fetched)
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


# Two ranks, of five samples of which the last is left out; the microbatches of a rank count its own samples.
PARTITIONS, MICROBATCHES, LENGTHS = [[2, 0], [3, 1]], [[[0, 1]], [[0], [1]]], [7, 5, 6, 4, 9]


def slimes_split(boxes=("box 0", "box 1")):
    """slime's method as far as it matters here: it schedules, and makes a box for each rank."""

    def split():
        def build(args, config, lengths, *, global_batch_size, rollout_indices):
            return PARTITIONS, MICROBATCHES, [1], [global_batch_size]

        known = {"global_batch_size": 4, "rollout_indices": [0, 1, 2, 3, 4]}
        result = shared_data.build_dp_schedule(build, "args", {}, LENGTHS, **known)
        assert result == (PARTITIONS, MICROBATCHES, [1], [4])
        return [SimpleNamespace(inner=box) for box in boxes]

    return split


def test_where_the_trainers_schedule_the_boxes_say_whose_a_sample_is(active, ray):
    """slime before v0.3.0."""
    told = []
    active(share_train_data=lambda args, schedule: told.append((args, schedule)) or [{"a": 0}, {"a": 1}])
    data = [{"partition": each, "total_lengths": LENGTHS, "tokens": []} for each in ([0, 2, 4], range(1, 4, 2))]
    boxes = [SimpleNamespace(inner=ray.put(each)) for each in data]
    shared = shared_data.split_train_data(lambda: boxes, "args")
    assert told == [("args", Schedule(LENGTHS, [[[0, 2, 4]], [[1, 3]]], scheduled=False))]
    assert [ray.get(ray.get(box.shared)["a"]) for box in shared] == [0, 1]


def test_the_schedule_names_samples_as_the_training_data_does(active, ray):
    told = []
    active(share_train_data=lambda args, schedule: told.append((args, schedule)) or [{}, {}])
    shared_data.split_train_data(slimes_split(), "args")
    assert told == [("args", Schedule(LENGTHS, [[[2, 0]], [[3], [1]]]))]
    assert shared_data._scheduled.get() is None, "of this rollout only"


def test_a_rank_fetches_by_name_what_was_shared_with_it_and_nothing_else(layout, active, ray):
    layout.cp_rank, layout.tp_rank = 1, 0
    received = []
    active(
        share_train_data=lambda schedule: [
            {"mine": ["of 0"], "large": "0" * 99},
            {"mine": ["of 1"], "large": "1" * 99},
        ],
        receive_train_data=lambda args, rollout_data, rank, fetch: received.append(
            (args, rollout_data, rank, fetch(["mine"]))
        ),
    )
    boxes = shared_data.split_train_data(slimes_split(), "args")
    assert [box.inner for box in boxes] == ["box 0", "box 1"]
    for data in (0, 1):
        ray.fetched.clear()
        result = shared_data.process_rollout_data(
            lambda args, boxes, rank, size: {"rank": rank, "size": size}, "args", boxes, data, 2
        )
        assert result == {"rank": data, "size": 2}
        assert received.pop() == ("args", result, Rank(data, 1, 0), [[f"of {data}"]])
        assert [ray.store[number] for number in ray.fetched if isinstance(ray.store[number], str)] == []


def test_what_several_plugins_share_is_one_box(layout, ray, monkeypatch):
    modules = []
    for name in ("a", "b"):
        module = ModuleType(name)
        share = hookimpl(lambda name=name: [{f"of {name}": name}, {f"of {name}": name.upper()}])
        vars(module).update({"__file__": "", "share_train_data": share})
        modules.append(Plugin(Installed(name, "some-plugins", "1.0", None), module))
    both = Plugins(modules)
    monkeypatch.setattr(shared_data, "current", lambda: SimpleNamespace(hook=both.hook, plugins=both))
    boxes = shared_data.split_train_data(slimes_split(), "args")
    fetched = [shared_data._fetcher(box.shared)(["of b", "of a"]) for box in boxes]
    assert fetched == [["b", "a"], ["B", "A"]]


def test_a_name_that_was_not_shared_is_refused(active, ray):
    active(share_train_data=lambda: [{"routing for rank 0": 1}, {}])
    boxes = shared_data.split_train_data(slimes_split(), "args")
    with pytest.raises(PluginError, match="was not shared with it") as caught:
        shared_data._fetcher(boxes[0].shared)(["routing for rank 0", "routing for rank 7"])
    assert caught.value.facts == {"asked for": "routing for rank 7", "shared": "routing for rank 0"}
    with pytest.raises(PluginError, match="was not shared with it") as caught:
        shared_data._fetcher(boxes[1].shared)(["routing for rank 0"])
    assert caught.value.facts["shared"] == "nothing"


def test_of_a_box_that_nothing_was_shared_with_nothing_can_be_fetched(active, layout):
    """slime's own, of training data that somebody brought from elsewhere."""
    active(receive_train_data=lambda fetch: fetch(["routing"]))
    with pytest.raises(PluginError, match="was not shared with it") as caught:
        shared_data.process_rollout_data(lambda *_: {}, "args", [SimpleNamespace(inner="a box")], 0, 1)
    assert caught.value.facts["shared"] == "nothing"


def test_a_plugin_that_shares_with_another_number_of_ranks_is_an_error(active, ray):
    active(share_train_data=lambda: [{"a": 1}])
    with pytest.raises(ValueError, match="zip"):
        shared_data.split_train_data(slimes_split(), "args")


def test_a_split_without_a_schedule_is_refused(active, ray):
    """A slime that schedules elsewhere: nothing may be cut by the schedule of the rollout before."""
    active(share_train_data=lambda: [{}, {}])
    shared_data.split_train_data(slimes_split(), "args")
    before = shared_data._scheduled.set(Schedule([1], [[[0]]]))  # somebody looked at what would be scheduled
    try:
        for data in ({"tokens": []}, {"partition": [0], "total_lengths": [1], "micro_batch_indices": [[0]]}):
            box = SimpleNamespace(inner=ray.put(data))
            with pytest.raises(PluginError, match="without the schedule"):
                shared_data.split_train_data(lambda box=box: [box] * 2, "args")
    finally:
        shared_data._scheduled.reset(before)
    assert shared_data._scheduled.get() is None


class SlimesManager:
    """What our subclass of slime's RolloutManager calls of it."""

    args = "args"

    def _convert_samples_to_train_data(self, samples):
        return {"tokens": [list(sample.tokens) for sample in samples if not sample.remove_sample]}

    def _split_train_data_by_dp(self, data):
        return slimes_split()()


@pytest.fixture
def manager():
    made = rollout_manager._subclass(SlimesManager)
    return object.__new__(made)


def test_samples_are_received_before_they_are_converted_and_collected_after(active, manager):
    told = []

    def receive_samples(args, samples):
        told.append(("received", args, list(samples)))
        samples[1].remove_sample = True

    def collect_train_data(args, samples, train_data):
        told.append(("collected", args, list(samples), dict(train_data)))
        train_data["more"] = 1

    active(receive_samples=receive_samples, collect_train_data=collect_train_data)
    samples = [SimpleNamespace(tokens=[number], remove_sample=False) for number in range(3)]
    assert manager._convert_samples_to_train_data(samples) == {"tokens": [[0], [2]], "more": 1}
    assert told == [("received", "args", samples), ("collected", "args", samples, {"tokens": [[0], [2]]})]


def test_nothing_is_shared_where_no_plugin_shares_or_receives(active, manager, ray):
    active(collect_train_data=lambda: None)
    assert [type(box) for box in manager._split_train_data_by_dp({})] == [SimpleNamespace] * 2
    assert ray.store == []


@pytest.mark.parametrize("hook", ["share_train_data", "receive_train_data"])
def test_boxes_carry_what_is_shared_where_one_plugin_shares_or_receives(active, manager, ray, hook):
    """Both patches of the seam are there for either hook; the trainer's expects the manager's boxes."""
    active(**{hook: lambda: [{"a": 1}, {"b": 2}]})
    boxes = manager._split_train_data_by_dp({})
    assert [box.inner for box in boxes] == ["box 0", "box 1"]
    assert [list(ray.get(box.shared)) for box in boxes] == ([["a"], ["b"]] if hook == "share_train_data" else [[], []])


@pytest.mark.parametrize("hidden", [True, False])
def test_slime_does_not_see_routing_that_a_plugin_takes(active, manager, hidden):
    """slime after v0.3.1 makes tensors of it while it converts the samples, and checks them."""
    seen = []
    hooks = {"take_routed_experts": lambda: True} if hidden else {"collect_train_data": lambda: None}
    active(**hooks)
    samples = [SimpleNamespace(tokens=[0], remove_sample=False, rollout_routed_experts=number) for number in range(2)]

    def convert(self: Any, samples: Any) -> dict[str, Any]:
        seen.extend(each.rollout_routed_experts for each in samples)
        return {}

    patch = pytest.MonkeyPatch()
    with patch.context() as changed:
        changed.setattr(SlimesManager, "_convert_samples_to_train_data", convert)
        manager._convert_samples_to_train_data(samples)
    assert seen == ([None, None] if hidden else [0, 1])
    assert [each.rollout_routed_experts for each in samples] == [0, 1]
    with patch.context() as changed:
        changed.setattr(SlimesManager, "_convert_samples_to_train_data", lambda self, samples: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            manager._convert_samples_to_train_data(samples)
    assert [each.rollout_routed_experts for each in samples] == [0, 1]


@pytest.mark.parametrize("release", ["before v0.2.3", "since v0.2.3"])
def test_the_server_of_the_trained_weights_in_every_release(release):
    """Before v0.2.3 there is one server, with its router in the arguments."""
    args = SimpleNamespace(sglang_router_ip="1.2.3.4", sglang_router_port=5)
    trained = SimpleNamespace(router_ip="1.2.3.4", router_port=5, engines=["a"], all_engines=["a", "b"])
    if release == "before v0.2.3":
        up = SimpleNamespace(args=args, rollout_engines=["a"], all_rollout_engines=["a", "b"])
        none = SimpleNamespace(args=args, rollout_engines=[], all_rollout_engines=[])
    else:
        frozen = SimpleNamespace(all_engines=["c"])
        up = SimpleNamespace(_get_updatable_server=lambda: trained, servers={"actor": trained, "ref": frozen})
        none = SimpleNamespace(_get_updatable_server=lambda: None, servers={})
    assert slime_rollout.trained_server(up) == slime_rollout.TrainedServer("http://1.2.3.4:5", ["a"])
    assert slime_rollout.engine_count(up) == (2 if release == "before v0.2.3" else 3)
    assert (slime_rollout.trained_server(none), slime_rollout.engine_count(none)) == (None, 0)
