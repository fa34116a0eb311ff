"""Which plugins are found, chosen and loaded, in which order they act, and what their digest covers."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plugins import hookimpl, manager
from miles_plugins.errors import PluginConflictError, PluginError, PluginNotFoundError
from miles_plugins.manager import GROUP, Installed, Plugin, Plugins, in_order, installed_plugins, load, resolve_names

ROOT = Path(__file__).resolve().parents[1]


# -- helpers ---------------------------------------------------------------------------------------------------------


def installed(name: str, distribution: str = "some-plugins", version: str = "1.0", code: str = "") -> Installed:
    return Installed(name, distribution, version, EntryPoint(name, code or name, GROUP))


def catalogue(*names: str) -> dict[str, Installed]:
    return {name: installed(name) for name in names}


def plugin(name: str, version: str = "1.0", **declared) -> Plugin:
    module = ModuleType(name)
    vars(module).update({"__file__": "", **declared})
    return Plugin(installed(name, version=version), module)


def distribution(folder: Path, name: str, plugins: dict[str, str], version: str = "1.0", **modules: str) -> Path:
    """A distribution as pip leaves it: metadata, entry points, and its modules beside them."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{plugin} = {code}" for plugin, code in plugins.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
    return folder


def calls_in_order(*names: str, **declared) -> tuple[Plugins, list[str]]:
    """Plugins whose `pass_begins` says who was called."""
    called: list[str] = []

    def one(name: str) -> Plugin:
        @hookimpl
        def pass_begins(stage):
            called.append(name)

        return plugin(name, pass_begins=pass_begins, **declared.get(name, {}))

    return Plugins([one(name) for name in names]), called


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r3_replay", "r3-replay", "r3", " r3 "])
def test_a_plugin_has_a_full_and_a_short_name(name):
    found = resolve_names([name], catalogue("r3_replay", "cpu_rehearsal"))
    assert [each.name for each in found] == ["r3_replay"]


def test_a_plugin_named_twice_is_chosen_once():
    found = resolve_names(["r3", "cpu", "r3_replay", "r3"], catalogue("r3_replay", "cpu_rehearsal"))
    assert [each.name for each in found] == ["r3_replay", "cpu_rehearsal"]


def test_a_full_name_wins_over_a_short_one():
    """`r3` is a plugin of its own, beside r3_replay whose short name it is."""
    assert [each.name for each in resolve_names(["r3"], catalogue("r3", "r3_replay"))] == ["r3"]


def test_an_entry_point_written_with_a_hyphen_can_be_named(site):
    """Distributions are named with hyphens, so authors name entry points so too."""
    distribution(site, "length-log", {"length-log": "length_log"}, length_log="")
    for name in ("length-log", "length_log", "length"):
        assert [each.distribution for each in resolve_names([name], installed_plugins())] == ["length-log"], name


@pytest.mark.parametrize(("name", "nearest"), [("r3_repaly", "r3_replay"), ("cpuu", "cpu"), ("zzz", None)])
def test_an_unknown_name_lists_the_known_ones_with_the_nearest(name, nearest):
    with pytest.raises(PluginNotFoundError) as caught:
        resolve_names(["r3", name], catalogue("r3_replay", "cpu_rehearsal"))
    assert repr(name) in caught.value.message
    assert caught.value.facts == {"known": "cpu (cpu_rehearsal), r3 (r3_replay)", "nearest": nearest}


def test_an_unknown_name_where_nothing_is_installed():
    with pytest.raises(PluginNotFoundError, match="'r3'"):
        resolve_names(["r3"], {})


def test_a_short_name_of_several_plugins_is_refused():
    with pytest.raises(PluginConflictError) as caught:
        resolve_names(["fp8"], catalogue("fp8_unified", "fp8_other"))
    assert "fp8_unified" in str(caught.value)
    assert "fp8_other" in str(caught.value)
    assert resolve_names(["fp8_other"], catalogue("fp8_unified", "fp8_other"))[0].name == "fp8_other"


# -- distributions ---------------------------------------------------------------------------------------------------


def test_our_own_plugins_are_installed():
    ours = {name for name, each in installed_plugins().items() if each.distribution == manager.OWN_DISTRIBUTION}
    assert {"r3_replay", "cpu_rehearsal", "metrics_jsonl"} <= ours


def test_a_distribution_provides_its_plugin(site):
    distribution(site, "length-log", {"length_log": "length_log"}, "2.1", length_log='"""Log lengths."""')
    found = installed_plugins()["length_log"]
    assert (found.distribution, found.version, found.short_name) == ("length-log", "2.1", "length")
    assert load(found).summary == "Log lengths."


def test_two_distributions_with_one_plugin_name_are_refused(tmp_path, monkeypatch):
    for number in "12":
        folder = distribution(tmp_path / number, f"length-log-{number}", {"length_log": "length_log"})
        monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(PluginConflictError) as caught:
        installed_plugins()
    assert "length_log" in caught.value.message
    assert set(caught.value.facts.values()) == {"length-log-1 1.0", "length-log-2 1.0"}


def test_a_plugin_cannot_take_the_name_of_ours(site):
    distribution(site, "better-r3", {"r3_replay": "better_r3"})
    with pytest.raises(PluginConflictError, match="r3_replay"):
        installed_plugins()


def test_a_stale_duplicate_of_one_distribution_is_no_conflict(tmp_path, monkeypatch):
    for number in "12":
        folder = distribution(tmp_path / number, "length-log", {"length_log": "length_log"})
        monkeypatch.syspath_prepend(str(folder))
    assert installed_plugins()["length_log"].distribution == "length-log"


def test_a_duplicate_entry_is_a_conflict_only_when_it_leads_elsewhere(monkeypatch):
    """However many times importlib.metadata lists one distribution."""

    def listed(*codes: str):
        dist = SimpleNamespace(name="length-log", version="1.0")
        points = [SimpleNamespace(name="length_log", value=code, dist=dist) for code in codes]
        monkeypatch.setattr(manager, "entry_points", lambda group: points)

    listed("length_log", "length_log")
    assert list(installed_plugins()) == ["length_log"]
    listed("length_log", "other_code")
    with pytest.raises(PluginConflictError):
        installed_plugins()


def test_only_named_plugins_are_imported(site):
    """An installed plugin does nothing, not even harm, until somebody names it."""
    distribution(
        site,
        "two-plugins",
        {"quiet_one": "quiet_one", "loud_one": "loud_one"},
        quiet_one='"""Quiet."""',
        loud_one="raise RuntimeError('imported')",
    )
    assert {"quiet_one", "loud_one"} <= set(installed_plugins())
    assert Plugins.named(["quiet"]).names == ["quiet_one"]
    assert "quiet_one" in sys.modules
    assert "loud_one" not in sys.modules
    assert "miles_plugins.r3_replay.plugin" not in imported_by("quiet_one", site)


def imported_by(name: str, site: Path) -> str:
    script = f"import sys; from miles_plugins.manager import Plugins; Plugins.named([{name!r}]); print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout.split()
    return done.stdout


@pytest.mark.parametrize(
    "source",
    ["import nothing_of_that_name", "raise ValueError('broken')", "def broken(:"],
    ids=["import", "run", "parse"],
)
def test_a_plugin_that_cannot_be_imported_names_its_distribution(site, source):
    distribution(site, "broken-log", {"broken_log": "broken_log"}, "3.2", broken_log=source)
    with pytest.raises(PluginError) as caught:
        Plugins.named(["broken"])
    assert "broken_log" in caught.value.message
    assert caught.value.facts["distribution"] == "broken-log 3.2"
    assert caught.value.facts["code"] == "broken_log"
    assert type(caught.value.__cause__).__name__ in caught.value.facts["error"]


def test_an_entry_point_to_nothing_names_its_distribution(site):
    distribution(site, "broken-log", {"broken_log": "broken_log:plugin"}, broken_log="")
    with pytest.raises(PluginError) as caught:
        Plugins.named(["broken"])
    assert "broken-log" in str(caught.value)


# -- fitting together ------------------------------------------------------------------------------------------------


def test_a_missing_requirement_is_named():
    with pytest.raises(PluginConflictError, match="a requires b, which is not selected") as caught:
        in_order([plugin("a", REQUIRES=("b",)), plugin("c")])
    assert caught.value.facts == {"selected": "a, c"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_conflict_is_refused_whoever_declares_it(order):
    both = [plugin("a", CONFLICTS=("b",)), plugin("b")]
    with pytest.raises(PluginConflictError, match="a and b"):
        in_order([both[i] for i in order])
    assert [each.name for each in in_order([both[0]])] == ["a"]


@pytest.mark.parametrize("circle", ["a", "ab", "abc"])
def test_a_circle_of_requirements_is_refused(circle):
    following = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    with pytest.raises(PluginConflictError, match="circle") as caught:
        in_order([plugin(name, REQUIRES=(required,)) for name, required in following.items()])
    assert set(caught.value.facts["circle"]) == set(circle)


@st.composite
def selections(draw):
    """Some plugins without a circle of requirements, and two orders in which they could be named."""
    names = [f"p{number}" for number in range(draw(st.integers(1, 6)))]
    ranked = draw(st.permutations(names))
    requires = {
        name: draw(st.sets(st.sampled_from(ranked[:rank]))) if rank else set() for rank, name in enumerate(ranked)
    }
    return requires, draw(st.permutations(names)), draw(st.permutations(names))


@given(selections())
def test_the_order_is_by_requirement_then_name_whatever_the_command_line(selection):
    requires, first, second = selection
    orders = [
        [each.name for each in in_order([plugin(name, REQUIRES=tuple(requires[name])) for name in named])]
        for named in (first, second)
    ]
    assert orders[0] == orders[1]
    place = {name: number for number, name in enumerate(orders[0])}
    assert sorted(place) == sorted(requires)
    assert all(place[required] < place[name] for name in requires for required in requires[name])
    free = [name for name in orders[0] if not requires[name]]
    assert free == sorted(free), "by name where no requirement says otherwise"


def test_the_order_is_the_same_in_every_process():
    """Sets of strings iterate differently in each process; the order in which hooks act must not."""
    script = """
from types import ModuleType
from miles_plugins.manager import Installed, Plugin, in_order

plugins = []
for name in "aqrstuvwxyz":
    module = ModuleType(name)
    module.REQUIRES = tuple("qrstuvwxyz") if name == "a" else ()
    plugins.append(Plugin(Installed(name, "d", "1", None), module))
print(*(plugin.name for plugin in in_order(plugins)))
"""
    orders = set()
    for seed in "123":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        orders.add(done.stdout.strip())
    assert len(orders) == 1, orders


# -- hooks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", list(itertools.permutations("abc")))
def test_hooks_are_called_in_the_order_of_the_plugins(named):
    plugins, called = calls_in_order(*named, a={"REQUIRES": ("c",)})
    plugins.hook.pass_begins(args=None, stage="train", model=[])
    assert called == plugins.names
    assert called.index("c") < called.index("a")
    called.clear()
    assert list(plugins.ask_each("pass_begins", args=None, stage="train", model=[])) == []  # called, nothing to say
    assert called == plugins.names
    assert called == plugins.names


def test_ask_each_says_who_answered_and_gives_each_only_what_it_wants():
    @hookimpl
    def probe(role):
        return f"works as {role}"

    @hookimpl(specname="probe")
    def quiet():
        return None

    plugins = Plugins([plugin("b", probe=probe), plugin("a", quiet=quiet), plugin("c")])
    assert list(plugins.ask_each("probe", role="trainer")) == [("b", "works as trainer")]


def adding(word: str):
    """An implementation of a hook that is given a value and returns another."""

    @hookimpl(specname="default_flags")
    def add(flags):
        return None if word == "nothing" else [*flags, word]

    return {"add": add}


@pytest.mark.parametrize("named", list(itertools.permutations("abc")))
def test_a_value_goes_through_the_plugins_in_their_order(named):
    declared = {"a": {"REQUIRES": ("c",)}}
    plugins = Plugins([plugin(name, **adding(name), **declared.get(name, {})) for name in named])
    assert plugins.chain("default_flags", "flags", ["given"]) == ["given", *plugins.names]
    assert plugins.names.index("c") < plugins.names.index("a")


def test_a_plugin_without_an_answer_leaves_the_value_to_the_next():
    plugins = Plugins(
        [plugin("a", **adding("1")), plugin("b", **adding("nothing")), plugin("c"), plugin("d", **adding("2"))]
    )
    assert plugins.chain("default_flags", "flags", []) == ["1", "2"]
    given = []
    assert Plugins([plugin("b", **adding("nothing"))]).chain("default_flags", "flags", given) is given
    assert Plugins([]).chain("default_flags", "flags", given) is given


def test_each_answer_of_a_chain_is_checked_before_the_next_plugin_has_it():
    checked = []
    plugins = Plugins([plugin("a", **adding("1")), plugin("b", **adding("nothing")), plugin("c", **adding("2"))])
    plugins.chain("default_flags", "flags", [], lambda name, answer: checked.append((name, answer)))
    assert checked == [("a", ["1"]), ("c", ["1", "2"])]

    def refuse(name, answer):
        raise PluginError(f"{name}: {answer}")

    with pytest.raises(PluginError, match=r"a: \['1'\]"):
        plugins.chain("default_flags", "flags", [], refuse)


def test_the_other_arguments_of_a_chained_hook_are_the_same_for_all():
    @hookimpl
    def export_weights(args, named_tensors):
        return [*named_tensors, args]

    plugins = Plugins([plugin(name, export_weights=export_weights) for name in "ab"])
    assert plugins.chain("export_weights", "named_tensors", (0,), args="x") == [0, "x", "x"]


def test_a_wrapper_is_not_taken_for_an_answer():
    """pluggy's wrappers are generators around the others' answers, and no answers themselves."""

    @hookimpl(wrapper=True)
    def probe(role):
        return (yield)

    try:
        answers = list(Plugins([plugin("a", probe=probe)]).ask_each("probe", role="trainer"))
    except PluginError:
        return  # refusing it is as good
    assert [answer for _, answer in answers if answer is not None] == []


@pytest.mark.parametrize(("name", "nearest"), [("pass_begin", "pass_begins"), ("model_buildt", "model_built")])
def test_an_unknown_hook_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(PluginError) as caught:
        Plugins([plugin("a", **{name: hookimpl(lambda: None)})])
    assert "plugin a " in caught.value.message
    assert caught.value.facts["unknown"] == f"hook: {name}"
    assert caught.value.facts["nearest"] == nearest


def test_an_unknown_argument_of_a_hook_is_refused():
    @hookimpl
    def pass_begins(stag):
        pass

    with pytest.raises(PluginError, match="plugin a ") as caught:
        Plugins([plugin("a", pass_begins=pass_begins)])
    facts = {"unknown": "argument of pass_begins: stag", "known": "args, stage, model", "nearest": "stage"}
    assert caught.value.facts == facts


def test_what_pluggy_refuses_for_another_reason_is_quoted():
    @hookimpl(wrapper=True)
    def pass_begins(stage):
        return None  # a wrapper must yield

    with pytest.raises(PluginError, match="plugin a ") as caught:
        Plugins([plugin("a", pass_begins=pass_begins)])
    assert "wrapper" in caught.value.facts["error"]


def test_a_function_that_is_not_marked_is_no_hook():
    plugins = Plugins([plugin("a", pass_begins=lambda stage: 1 / 0, probe=hookimpl(lambda: "here"))])
    plugins.hook.pass_begins(args=None, stage="train", model=[])
    assert not plugins.implement("pass_begins")
    assert plugins.implement("probe")


def test_what_a_plugin_implements_follows_the_name_of_the_hook_not_of_the_function():
    @hookimpl(specname="step_metrics")
    def lengths():
        return {}

    one = plugin("a", lengths=lengths)
    assert one.implements("step_metrics")
    assert not one.implements("lengths")


# -- the digest ------------------------------------------------------------------------------------------------------


def digest(*names: str) -> str:
    return Plugins.named(names).digest


def reimport(site: Path) -> None:
    for name in [name for name, module in sys.modules.items() if str(site) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def test_the_digest_does_not_depend_on_the_order_of_the_names():
    assert len({digest(*named) for named in itertools.permutations(["r3", "cpu", "metrics"])}) == 1


def test_the_digest_depends_on_which_plugins_are_selected():
    digests = [digest("r3"), digest("cpu"), digest("r3", "cpu"), digest("metrics")]
    assert len(set(digests)) == 4


def test_the_digest_depends_on_the_version():
    one, two = (Plugins([plugin("a", version=version)]).digest for version in ("1.0", "1.1"))
    assert one != two


def test_the_digest_covers_a_third_partys_module(site):
    distribution(site, "length-log", {"length_log": "length_log"}, length_log="limit = 1")
    before = digest("length")
    assert digest("length") == before
    (site / "length_log.py").write_text("limit = 2")
    assert digest("length") != before


def test_the_digest_covers_a_third_partys_package(site):
    distribution(site, "length-log", {"length_log": "length_log"})
    (site / "length_log").mkdir()
    (site / "length_log" / "__init__.py").write_text("")
    (site / "length_log" / "numbers.py").write_text("limit = 1")
    before = digest("length")
    (site / "length_log" / "numbers.py").write_text("limit = 2")
    assert digest("length") != before


def test_the_digest_covers_what_lies_beside_a_third_partys_plugin_module(site):
    """Laid out as our own features are: package/plugin.py with the mathematics beside it."""
    distribution(site, "length-log", {"length_log": "length_log.plugin"})
    (site / "length_log").mkdir()
    (site / "length_log" / "__init__.py").write_text("")
    (site / "length_log" / "plugin.py").write_text("from length_log import numbers")
    (site / "length_log" / "numbers.py").write_text("limit = 1")
    before = digest("length")
    reimport(site)
    (site / "length_log" / "numbers.py").write_text("limit = 2")
    assert digest("length") != before


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of this package's source, links kept, that the manager takes for its own."""
    for name in ("miles_plugins", "patches", "compat", "entrypoints"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "miles_plugins" / "manager.py"))
    return tmp_path


@pytest.mark.parametrize(
    "file",
    ["miles_plugins/r3_replay/trace.py", "patches/slime/training.py", "entrypoints/child_process/sitecustomize.py"],
)
def test_the_digest_covers_all_of_our_own_source(copy, file):
    before = digest("metrics")
    (copy / file).write_text((copy / file).read_text() + "\n# changed\n")
    assert digest("metrics") != before


def test_the_digest_of_a_wheel_is_that_of_the_checkout(copy, tmp_path, monkeypatch):
    """A wheel holds folders where the checkout holds links."""
    before = digest("metrics")
    shutil.copytree(copy / "miles_plugins", tmp_path / "wheel" / "miles_plugins")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "wheel" / "miles_plugins" / "manager.py"))
    assert digest("metrics") == before


# -- declarations that would be passed over ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["REQUIRES", "CONFLICTS", "SIDES"])
def test_a_declaration_that_is_a_string_is_refused(name):
    with pytest.raises(PluginError, match="as a string"):
        getattr(plugin("a", **{name: "trainer"}), name.lower())


def test_a_process_that_does_not_exist_is_refused(monkeypatch):
    found = installed("a")
    monkeypatch.setattr(type(found.entry_point), "load", lambda self: SimpleNamespace(SIDES=("trainr",)))
    with pytest.raises(PluginError, match="does not exist") as caught:
        load(found)
    assert caught.value.facts["nearest"] == "trainer"
