"""Patched functions cross process borders, and import order does not matter."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import multiprocessing
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from miles_plugins import patching
from miles_plugins.patching import Patch, PatchSet

try:
    import cloudpickle
except ImportError:
    cloudpickle = pytest.importorskip("ray.cloudpickle")

TARGETS = str(Path(__file__).parent / "patch_targets")


@pytest.fixture(autouse=True)
def _fresh_orchard(monkeypatch):
    monkeypatch.syspath_prepend(TARGETS)
    yield
    patching._sites.clear()
    patching._waiting.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("orchard", "gardener")]:
        del sys.modules[name]


def load(name):
    return importlib.import_module(name)


def patch(target, wrap=None):
    return Patch(id=target, target=target, wrap=wrap or load("gardener").mark, reason="test", inherited=True)


def run(script, *arguments, data=b"", timeout=60):
    """The JSON that a Python process of its own prints last."""
    prelude = f"import json, sys; sys.path.insert(0, {TARGETS!r})\n"
    command = [sys.executable, "-c", prelude + textwrap.dedent(script), *arguments]
    done = subprocess.run(command, input=data, capture_output=True, timeout=timeout)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout.splitlines()[-1])


UNPICKLE = """
import pickle
value = pickle.loads(sys.stdin.buffer.read())
"""


# -- by reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps], ids=["pickle", "cloudpickle"])
@pytest.mark.parametrize(
    "target",
    [
        "orchard.tools:cut",
        "orchard.tools:pick",
        "orchard.tools:decorated",
        "orchard.trees:Plant.grow",
        "orchard.trees:Plant.price",
        "orchard.trees:Tree.grow",
        "orchard.trees:Tree.Leaf.turn",
        "orchard.trees:Tree.climb",
        "orchard.trees:Bare.__init__",
    ],
)
def test_functions_and_unbound_methods_are_pickled_by_reference(target, dumps):
    module, _, qualname = target.partition(":")
    first = replace(patch(target), async_too=True)
    patches = PatchSet(first, replace(first, id="second"))
    patches.apply()
    function = load(module)
    for name in qualname.split("."):
        function = getattr(function, name)
    payload = dumps(function)
    assert pickle.loads(payload) is function
    assert len(payload) < 200  # a name, no code
    # Elsewhere the name leads to what is there: the original, for that process has not been activated.
    assert run(UNPICKLE + "print(json.dumps(hasattr(value, '__wrapped__')))", data=payload) is False
    patches.undo()


def test_bound_methods_and_classes_are_pickled_by_reference():
    patches = PatchSet(patch("orchard.trees:Plant.grow"), patch("orchard.trees:Plant.seed"))
    patches.apply()
    trees = load("orchard.trees")
    for dumps in (pickle.dumps, cloudpickle.dumps):
        assert pickle.loads(dumps(trees.Plant("oak").grow))()[0] == "marked"
        assert pickle.loads(dumps(trees.Tree.seed))(1) == ["marked", "Plant.seed", "Tree", 1]
        assert pickle.loads(dumps(trees.Plant)) is trees.Plant
    patches.undo()


def test_spawn():
    patches = PatchSet(patch("orchard.tools:cut"), patch("orchard.trees:Plant.grow"))
    patches.apply()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(load("orchard.tools").cut, (1,)) == ["cut", 1, 0]
        assert pool.apply(load("orchard.trees").Plant("oak").grow) == ["Plant.grow", "oak", 1]
        assert pool.apply(load("gardener").cut_in_child) == ["marked", "cut", 7, 0]
        assert pool.apply(load("orchard.tools").cut, (1,)) == ["marked", "cut", 1, 0]
    patches.undo()


# -- by value --------------------------------------------------------------------------------------------------------

CALL_ALL = """
import asyncio
one = value("oak")
result = [one.generate(1), value.make(1), value.scale(1), asyncio.run(one.serve(1)), list(one.stream(1)), one.seed(1)]
print(json.dumps(result))
"""
MARKED = [
    ["marked", "Plant.grow", "oak", 1, "Manager"],
    ["marked", "Manager", 1],
    ["marked", 1],
    ["marked", "serve", 1],
    ["marked", 0],
    ["marked", "Plant.seed", "Manager", 1],
]


def manager_patches(mark, mark_async):
    wraps = {"generate": mark, "make": mark, "scale": mark, "serve": mark_async, "stream": mark, "seed": mark}
    return PatchSet(*(patch(f"orchard.remote:Manager.{name}", wrap) for name, wrap in wraps.items()))


@pytest.mark.parametrize("importable", [True, False])
def test_a_class_pickled_by_value_takes_its_wrappers_along(importable):
    def mark(original, *args):
        return ["marked", *original(*args)]

    async def mark_async(original, *args):
        return ["marked", *await original(*args)]

    gardener, remote = load("gardener"), load("orchard.remote")
    patches = manager_patches(*((gardener.mark, gardener.mark_async) if importable else (mark, mark_async)))
    patches.apply()
    manager = remote.Manager
    remote.hide("Manager")
    payload = cloudpickle.dumps(manager)
    assert run(UNPICKLE + CALL_ALL, data=payload) == MARKED
    assert asyncio.run(manager().serve(2)) == ["marked", "serve", 2]
    # Other sets' layers, and undone ones, travel as well as they act here.
    remote.Manager = manager
    patches.undo()
    remote.hide("Manager")
    unmarked = [[word for word in result if word != "marked"] for result in MARKED]
    assert run(UNPICKLE + CALL_ALL, data=cloudpickle.dumps(manager)) == unmarked


def test_an_undone_layer_under_someone_elses_wrapper_passes_through_after_pickling_too():
    remote = load("orchard.remote")
    manager = remote.Manager
    patches = PatchSet(patch("orchard.remote:Manager.generate"))
    patches.apply()
    ours = manager.generate
    manager.generate = lambda self, count: ["foreign", *ours(self, count)]
    patches.undo()
    remote.hide("Manager")
    script = UNPICKLE + "print(json.dumps(value('oak').generate(1)))"
    assert run(script, data=cloudpickle.dumps(manager)) == ["foreign", "Plant.grow", "oak", 1, "Manager"]


def test_ray_remote_class():
    ray = pytest.importorskip("ray")
    remote = load("orchard.remote")
    remote.Manager = ray.remote(remote.Manager)
    patches = manager_patches(load("gardener").mark, load("gardener").mark_async)
    patches.apply()  # through the handle that ray.remote has put in the class's place
    exported = remote.Manager.__ray_metadata__.modified_class  # what Ray pickles
    assert run(UNPICKLE + CALL_ALL, data=cloudpickle.dumps(exported)) == MARKED
    patches.undo()
    assert exported("oak").generate(1) == ["Plant.grow", "oak", 1, "Manager"]


def test_class_defined_in_main():
    payload = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
            import sys; sys.path.insert(0, {TARGETS!r})
            try: import cloudpickle
            except ImportError: from ray import cloudpickle
            class Counter:
                def count(self): return ["count"]
            import gardener
            gardener.arm("__main__:Counter.count")
            sys.stdout.buffer.write(cloudpickle.dumps(Counter))
            """),
        ],
        capture_output=True,
        check=True,
    ).stdout
    assert run(UNPICKLE + "print(json.dumps(value().count()))", data=payload) == ["marked", "count"]


# -- import order ----------------------------------------------------------------------------------------------------

STEPS = """
import importlib
import gardener
patches = None
for step in sys.argv[1].split(","):
    if step == "arm":
        patches = gardener.arm("orchard.tools:cut", "orchard.early:use")
    elif step == "undo":
        patches.undo()
    else:
        importlib.import_module(step)
import orchard.tools, orchard.early
print(json.dumps([
    orchard.tools.cut(7),
    orchard.early.use(),
    orchard.cut is orchard.tools.cut is orchard.early.cut is orchard.early.chop,
    [record.state for record in patches.records()],
]))
"""
IN_ANY_ORDER = [
    order
    for order in itertools.permutations(["orchard.tools", "orchard.early", "arm", "undo"])
    if order.index("arm") < order.index("undo")
]


@pytest.mark.parametrize("order", IN_ANY_ORDER, ids=",".join)
def test_undone_in_any_order_of_imports(order):
    assert run(STEPS, ",".join(order)) == [["cut", 7, 0], ["cut", 7, 0], True, ["skipped", "skipped"]]


@pytest.mark.parametrize("order", sorted({tuple(step for step in order if step != "undo") for order in IN_ANY_ORDER}))
def test_patched_in_any_order_of_imports(order):
    cut = ["marked", "cut", 7, 0]
    assert run(STEPS, ",".join(order)) == [cut, ["marked", *cut], True, ["verified", "verified"]]


def test_half_imported_package_is_patched_before_its_importer_goes_on(tmp_path):
    package = tmp_path / "grove"
    package.mkdir()
    (package / "__init__.py").write_text("from grove.middle import go\nfrom grove.work import f\n")
    (package / "middle.py").write_text(
        "import gardener\n"
        "go = gardener.arm('grove:f', 'grove.work:f', 'grove.middle:later')\n"
        "def later(): return ['later']\n"
    )
    (package / "work.py").write_text("def f(): return ['f']\n")
    (tmp_path / "user.py").write_text("from grove import f\nfrom grove.middle import later\n")
    script = f"sys.path.insert(0, {str(tmp_path)!r})\nimport user, grove\nprint(json.dumps([user.f(), user.later()]))"
    assert run(script) == [["marked", "marked", "f"], ["marked", "later"]]


def test_imports_in_two_threads_do_not_lock_each_other_out(tmp_path):
    (tmp_path / "slow.py").write_text("import time; time.sleep(0.5)\ndef f(): return ['f']\n")
    (tmp_path / "quick.py").write_text("def g(): return ['g']\n")
    script = f"""
        import threading, time
        sys.path.insert(0, {str(tmp_path)!r})
        import gardener
        from miles_plugins.patching import Patch, PatchSet, has_attribute
        gardener.arm("slow:f")
        needs = (has_attribute("slow:f"),)
        needy = PatchSet(Patch(id="g", target="quick:g", wrap=gardener.mark, reason="", inherited=True, needs=needs))
        thread = threading.Thread(target=lambda: __import__("slow"))
        thread.start()
        time.sleep(0.1)
        needy.apply()
        thread.join()
        import quick, slow
        print(json.dumps([quick.g(), slow.f()]))
    """
    assert run(script, timeout=20) == [["marked", "g"], ["marked", "f"]]


def test_nothing_heavy_is_imported():
    modules = run("import miles_plugins.patching; print(json.dumps(sorted(sys.modules)))")
    assert not {"torch", "ray", "numpy", "orchard", "cloudpickle"} & set(modules)
