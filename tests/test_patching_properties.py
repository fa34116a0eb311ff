"""Random histories of patching, against a model; static and loaded views of random functions, against each other."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import patching
from miles_plugins.compat.source import compare_signatures, describe, find_definition, parse_signature
from miles_plugins.errors import PatchError
from miles_plugins.patching import Patch, PatchSet, check_statically, source_fingerprint

UPSTREAM = Path(__file__).parent / "patch_targets" / "up.py"
TARGETS = ["up:f", "down:g", "up:Base.m", "up:Sub.m", "up:Sub.c", "up:Base.s"]
ORIGINALLY = {"up:f": ["f"], "down:g": ["f"], "up:Base.m": ["m"], "up:Sub.c": ["c", "Sub"], "up:Base.s": ["s"]}
SITES = {"down:g": "up:f"}  # the same object


def declare(number, target, bodies):
    """The patch of one target in set `number`. The last set replaces; its ids sort last, as a replacement acts last."""
    if number < 2:
        return Patch(id=f"{number}{target}", target=target, reason="", inherited=True, wrap=marker(f"{number}{target}"))
    name = f"~{target}"
    return Patch(id=name, target=target, reason="", inherited=True, replace=lambda *_: [name], fingerprints=bodies)


def marker(name):
    def wrap(original, *args):
        return [name, *original(*args)]

    return wrap


def foreign(name, below):
    @functools.wraps(below)
    def wrapper():
        return [name, *below()]

    return wrapper


class World:
    """A small upstream, the real patch sets, and a model of what calling each target must return."""

    def __init__(self, sets):
        self.modules = {name: ModuleType(name) for name in ("up", "down")}
        exec(compile(UPSTREAM.read_text(), str(UPSTREAM), "exec"), vars(self.modules["up"]))
        self.modules["down"].g = self.modules["up"].f
        sys.modules.update(self.modules)
        self.before = self.snapshot()
        up = self.modules["up"]
        bodies = {str(function): source_fingerprint(function) for function in (up.f, up.Base.m, up.Base.c, up.Base.s)}
        sets[2] = [target for target in sets[2] if target != "down:g"]  # no conflicts in here
        self.sets = [
            PatchSet(*(declare(number, target, bodies) for target in targets)) for number, targets in enumerate(sets)
        ]
        self.applied: set[int] = set()
        # For each site a list of segments: our layers, then someone else's wrapper, then our layers, ...
        self.segments: dict[str, list[object]] = {target: [set()] for target in TARGETS}

    def close(self):
        patching._sites.clear()
        for name in self.modules:
            del sys.modules[name]

    def snapshot(self):
        up, down = self.modules["up"], self.modules["down"]
        return [list(vars(owner).items()) for owner in (up, down, up.Base, up.Sub)]

    def owner(self, target):
        module, _, qualname = target.partition(":")
        *path, name = qualname.split(".")
        return functools.reduce(getattr, path, self.modules[module]), name

    def call(self, target):
        owner, name = self.owner(target)
        return getattr(owner() if isinstance(owner, type) else owner, name)()

    def expected(self, target):
        words = []
        for segment in reversed(self.segments[SITES.get(target, target)]):
            words += sorted(segment) if isinstance(segment, set) else [segment]
            if words and words[-1].startswith("~"):
                return words
        if target == "up:Sub.m":
            return words + self.expected("up:Base.m")
        return words + ORIGINALLY[target]

    def apply(self, number, how="apply"):
        getattr(self.sets[number], how)()
        if number not in self.applied:
            self.applied.add(number)
            for patch in self.sets[number]:
                segments = self.segments[SITES.get(patch.target, patch.target)]
                if not isinstance(segments[-1], set):
                    segments.append(set())
                segments[-1].add(patch.id)

    def undo(self, number):
        self.sets[number].undo()
        self.applied.discard(number)
        for segments in self.segments.values():
            for segment in segments:
                if isinstance(segment, set):
                    segment -= {patch.id for patch in self.sets[number]}
            if len(segments) > 1 and segments[-1] == set():
                segments.pop()


set_of_targets = st.lists(st.sampled_from(TARGETS), min_size=1, max_size=4, unique=True)
steps = st.lists(st.tuples(st.sampled_from(["apply", "undo", "arm"]), st.integers(0, 2)), max_size=12)


@settings(max_examples=100, deadline=None)
@given(sets=st.lists(set_of_targets, min_size=3, max_size=3), steps=steps)
def test_any_history_behaves_like_the_model_and_can_be_undone(sets, steps):
    world = World(sets)
    try:
        for step, number in steps:
            world.undo(number) if step == "undo" else world.apply(number, step)
            assert {target: world.call(target) for target in TARGETS} == {
                target: world.expected(target) for target in TARGETS
            }
        for patch_set in world.sets:
            patch_set.undo()
        after = world.snapshot()
        assert [[name for name, _ in owner] for owner in after] == [
            [name for name, _ in owner] for owner in world.before
        ]
        for old, new in zip(itertools.chain(*world.before), itertools.chain(*after), strict=True):
            assert old[1] is new[1], old[0]
        assert not patching._sites
    finally:
        world.close()


@settings(max_examples=100, deadline=None)
@given(
    sets=st.lists(set_of_targets, min_size=3, max_size=3),
    steps=st.lists(
        st.tuples(st.sampled_from(["apply", "undo", "wrap", "unwrap"]), st.integers(0, 2)), min_size=3, max_size=14
    ),
)
def test_with_someone_else_wrapping_in_between(sets, steps):
    """Someone else wraps up:f, or takes the wrapper off again while it is in front; ours must not mind."""
    world = World([[target for target in targets if target != "down:g"] or ["up:f"] for targets in sets])
    up, theirs = world.modules["up"], []
    try:
        for step, number in steps:
            segments = world.segments["up:f"]
            if step == "wrap":
                name = f"foreign{len(theirs)}"
                below = up.f
                up.f = foreign(name, below)
                theirs.append((up.f, below))
                segments.append(name)
            elif step == "unwrap":
                if not theirs or up.f is not theirs[-1][0]:
                    continue
                up.f = theirs.pop()[1]
                segments.pop()
            else:
                getattr(world, step)(number)
            assert world.call("up:f") == world.expected("up:f")
            assert world.call("up:Sub.m") == world.expected("up:Sub.m")
        for patch_set in world.sets:
            patch_set.undo()
        while theirs:
            assert up.f is theirs[-1][0]
            up.f = theirs.pop()[1]
            PatchSet().apply()  # what only passed calls through, and stands in front now, goes as well
        assert up.f is dict(world.before[0])["f"]
        assert not patching._sites
    finally:
        world.close()


# -- static and loaded -----------------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c", "d"])
defaults = st.sampled_from(["", "=0", "='x'", "=None"])


@st.composite
def parameters(draw):
    """A parameter list, as text."""
    chosen = draw(st.lists(names, unique=True, max_size=4))
    cut = sorted(draw(st.tuples(*[st.integers(0, len(chosen))] * 2)))
    positional_only, positional, keyword = chosen[: cut[0]], chosen[cut[0] : cut[1]], chosen[cut[1] :]
    first_default = draw(st.integers(0, cut[1]))
    texts = [
        name + ("=0" if number >= first_default else "") for number, name in enumerate(positional_only + positional)
    ]
    if positional_only:
        texts.insert(len(positional_only), "/")
    star = draw(st.sampled_from(["", "*rest"]))
    if star or keyword:
        texts.append(star or "*")
    texts += [name + draw(defaults) for name in keyword]
    texts += draw(st.sampled_from([[], ["**options"]]))
    return f"({', '.join(texts)})"


sources = st.sampled_from(
    ["return 1", "return a + b", "x = [c for c in range(3)]\n    return x", "if a:\n        yield a", "pass"]
)
decorators = st.sampled_from(["", "@functools.wraps(print)\n", "@functools.lru_cache\n"])
counter = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generated")
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))
    patching._sites.clear()


def write(folder, text):
    name = f"generated_{next(counter)}"
    (folder / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    return name


@settings(max_examples=100, deadline=None)
@given(
    upstream=parameters(),
    recorded=parameters(),
    same=st.booleans(),
    body=sources,
    how=st.sampled_from(["function", "method", "static"]),
)
def test_static_and_loaded_checks_agree(folder, upstream, recorded, same, body, how):
    function = f"def f{upstream}:\n    {body}\n"
    recorded = upstream if same else recorded
    qualname = "f"
    if how != "function":
        qualname = "K.f"
        function = "class K:\n" + textwrap.indent(("@staticmethod\n" if how == "static" else "") + function, "    ")
    name = write(folder, function)
    target = f"{name}:{qualname}"
    patch = Patch(id=target, target=target, reason="", inherited=True, wrap=marker("w"), signature=recorded)
    try:
        notes = check_statically(patch)
    except PatchError as error:
        static = error
    else:
        static = None
    patches = PatchSet(patch)
    if static is None:
        patches.apply()
        assert [patches.records()[0].detail] == (notes or [""])
    else:
        with pytest.raises(PatchError) as loaded:
            patches.apply()
        assert loaded.value.message == static.message
        assert loaded.value.facts["expected"] == static.facts["expected"]
        assert loaded.value.facts["found"].replace("'", '"') == static.facts["found"].replace("'", '"')
    patches.undo()
    if same:
        assert static is None
    function = functools.reduce(getattr, qualname.split("."), sys.modules[name])
    found = find_definition(target)
    assert found.fingerprint == source_fingerprint(function)
    assert found.kind == describe(target, {"static": "staticmethod"}.get(how, how), function).kind
    del sys.modules[name]


@settings(max_examples=300, deadline=None)
@given(old=parameters(), new=parameters())
def test_a_signature_that_fits_takes_every_call_of_the_recorded_one(old, new):
    if compare_signatures(parse_signature(old), parse_signature(new)) is None:
        return
    scope: dict = {}
    exec(f"def old{old}: return locals()\ndef new{new}: return locals()", scope)
    every_keyword = itertools.chain.from_iterable(itertools.combinations("abcd", count) for count in range(5))
    for count, keywords in itertools.product(range(5), every_keyword):
        positional, options = range(1, count + 1), {name: name for name in keywords}
        try:
            before = scope["old"](*positional, **options)
        except TypeError:
            continue
        after = scope["new"](*positional, **options)
        passed = {name: value for name, value in before.items() if value in (*positional, *keywords)}
        assert passed.items() <= after.items()


# -- fingerprints ----------------------------------------------------------------------------------------------------

FUNCTION = '''
def f(a, b: int = 1, *, c="x") -> int:
    """Documented."""
    total: int = a + b  # why
    for item in range(3):
        total += item
    return total
'''
SAME = [
    ("# why", "# another reason"),
    ('"""Documented."""', '"""Otherwise documented."""'),
    ('    """Documented."""\n', ""),
    ("b: int", "b: float"),
    (" -> int", ""),
    ("total: int =", "total ="),
    ("def f", "@decorate\ndef f"),
    ("a + b", "(a\n        + b)"),
    ('"x"', "'x'"),
    ("\n    return", "\n\n    return"),
]
OTHER = [
    ("a + b", "a - b"),
    ("range(3)", "range(4)"),
    ("range(3)", "range(3.0)"),
    ("range(3)", "range(True)"),
    ("+= item", "-= item"),
    ("= 1", "= 2"),
    ('"x"', 'b"x"'),
    ("b: int = 1", "b: int"),
    ("def f", "async def f"),
    ("*, ", ""),
    ("    return total", "    return"),
    ("a, b", "a, bb"),
]


def fingerprint(folder, text):
    return find_definition(f"{write(folder, 'decorate = lambda f: f' + chr(10) + text)}:f").fingerprint


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.sampled_from(SAME), max_size=4, unique=True))
def test_what_a_fingerprint_ignores(folder, changes):
    text = functools.reduce(lambda text, change: text.replace(*change), changes, FUNCTION)
    assert fingerprint(folder, text) == fingerprint(folder, FUNCTION)


@pytest.mark.parametrize("change", OTHER)
def test_what_a_fingerprint_sees(folder, change):
    assert change[0] in FUNCTION
    assert fingerprint(folder, FUNCTION.replace(*change)) != fingerprint(folder, FUNCTION)


def test_fingerprints_are_the_same_in_every_python_version(folder):
    """Recorded with 3.11; a new Python version that parses differently shows here, not on a user's machine."""
    assert fingerprint(folder, FUNCTION) == "76a1553c97dc27e9"
