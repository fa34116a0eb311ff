"""Reading upstream without importing it gives what importing it would have shown."""

from __future__ import annotations

import enum
import importlib
import inspect
import pickle
import sys
import textwrap
import typing
from dataclasses import replace

import pytest

from miles_plugins.compat import source
from miles_plugins.compat.source import (
    compare_signatures,
    describe,
    find_definition,
    find_definitions,
    find_module,
    has_package,
    kind_of,
    names_near,
    parse_signature,
    source_fingerprint,
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes the modules of a package `vale`: path below it -> source."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**files):
        for name, text in {"init": "", **files}.items():
            path = tmp_path / "vale" / f"{name.replace('__', '/').replace('init', '__init__')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise RuntimeError('imported')\n" + textwrap.dedent(text))
        importlib.invalidate_caches()
        return tmp_path / "vale"

    yield write
    assert not [name for name in sys.modules if name.startswith("vale")]


# -- modules ---------------------------------------------------------------------------------------------------------


def test_find_module(package):
    folder = package(one="", sub__init="", sub__two="", space__three="", space__deeper__four="")
    assert find_module("vale") == folder / "__init__.py"
    assert find_module("vale.one") == folder / "one.py"
    assert find_module("vale.sub") == folder / "sub" / "__init__.py"
    assert find_module("vale.sub.two") == folder / "sub" / "two.py"
    assert find_module("vale.space.three") == folder / "space" / "three.py"  # a namespace package in between
    assert find_module("vale.space.deeper.four") == folder / "space" / "deeper" / "four.py"
    assert find_module("vale.space") is None
    assert find_module("vale.missing.one") is None
    assert find_module("vale.one.deeper") is None
    assert find_module("no_such_package.one") is None
    assert has_package("vale")
    assert not has_package("no_such_package")


def test_find_module_in_a_namespace_over_two_folders(tmp_path, monkeypatch):
    for number, name in enumerate(["one", "two"]):
        (tmp_path / str(number) / "spread" / "inner").mkdir(parents=True)
        (tmp_path / str(number) / "spread" / "inner" / f"{name}.py").write_text("def f(): ...\n")
        monkeypatch.syspath_prepend(str(tmp_path / str(number)))
    assert find_module("spread.inner.one") == tmp_path / "0" / "spread" / "inner" / "one.py"
    assert find_definition("spread.inner.two:f").kind == "function"
    assert find_module("spread.inner.three") is None


def test_find_module_that_is_compiled_or_built_in():
    assert find_module("sys") is None
    assert find_module("math") is None or find_module("math").suffix == ".so"
    assert has_package("sys")


# -- definitions -----------------------------------------------------------------------------------------------------


def test_kinds(package):
    package(
        a="""
        import functools
        def function(x, /, y=1, *rest, z, **options): ...
        async def coroutine(): ...
        value = 3
        annotated: int = 4
        computed = functools.partial(function)
        class Class(Base):
            field: int
            other: int = 5
            def method(self): ...
            @classmethod
            def of_class(cls): ...
            @staticmethod
            def static(): ...
            @property
            def read(self): ...
            @read.setter
            def read(self, value): ...
            @functools.cached_property
            def cached(self): ...
            def __new__(cls): ...
            def __init_subclass__(cls): ...
            class Inner:
                def method(self): ...
            alias = method
            def __private(self): ...
        """
    )
    kinds = {
        "function": "function",
        "coroutine": "function",
        "value": "value",
        "annotated": "value",
        "computed": "unknown",
        "Class": "class",
        "Class.field": "declared",
        "Class.other": "value",
        "Class.method": "method",
        "Class.of_class": "classmethod",
        "Class.static": "staticmethod",
        "Class.read": "property",
        "Class.cached": "property",
        "Class.__new__": "staticmethod",
        "Class.__init_subclass__": "classmethod",
        "Class.Inner.method": "method",
        "Class.alias": "method",
        "Class._Class__private": "method",
        "functools": "module",
        "functools.partial": "class",
    }
    assert {name: find_definition(f"vale.a:{name}").kind for name in kinds} == kinds
    for name in ["missing", "Class.missing", "Class.Inner.missing", "function.attribute", "Missing.method"]:
        assert find_definition(f"vale.a:{name}") is None
    assert find_definition("vale.missing:function") is None
    found = find_definition("vale.a:function")
    assert str(found.signature) == "(x, /, y=1, *rest, z, **options)"
    assert found.where == f"{find_module('vale.a')}:4"
    assert find_definition("vale.a:computed.func").kind == "unknown"


def test_reexports(package):
    package(
        init="from .sub import f as g, K\nfrom .sub.deep import *\nfrom . import sub as renamed",
        sub__init="from .deep import f\nfrom ..other import K",
        sub__deep="def f(): ...\ndef starred(): ...\ndef _hidden(): ...",
        other="class K:\n    def m(self): ...",
        user="import vale.sub.deep\nimport vale.sub.deep as d\nfrom vale import g as h",
    )
    targets = {
        "vale:g": "vale.sub.deep:f",
        "vale:starred": "vale.sub.deep:starred",
        "vale:K.m": "vale.other:K.m",
        "vale:renamed.f": "vale.sub.deep:f",
        "vale:sub.deep.f": "vale.sub.deep:f",
        "vale.user:vale.sub.deep.f": "vale.sub.deep:f",
        "vale.user:d.f": "vale.sub.deep:f",
        "vale.user:h": "vale.sub.deep:f",
    }
    assert {target: find_definition(target).target for target in targets} == targets
    assert find_definition("vale:_hidden") is None
    assert find_definition("vale:h") is None


def test_circles_end(package):
    package(
        a="from .b import f, g\nclass K(K): ...\nclass A(B): ...\nfrom .b import B\nx = y\ny = x",
        b="from .a import f, A\nfrom .c import *\nclass B(A): ...",
        c="from .b import *",
    )
    for name in ("f", "g", "K.m", "A.m"):
        assert find_definition(f"vale.a:{name}") is None
    assert find_definition("vale.a:x").kind == "unknown"


def test_branches(package):
    package(
        a="""
        import sys
        from typing import TYPE_CHECKING
        try:
            from no_such_package import fast
        except ImportError:
            def fast(slow): ...
        try:
            from .b import f
        except ImportError:
            f = None
        if TYPE_CHECKING:
            def typed(wrong): ...
        else:
            def typed(right): ...
        if sys.platform == "linux":
            def branched(): ...
        elif sys.platform == "darwin":
            def other(): ...
        with open("x") as y:
            def within(): ...
        if sys.byteorder:
            def either(one): ...
        else:
            def either(other): ...
        def overridden(hidden): ...
        def overridden(general): ...
        if sys.byteorder:
            def overridden(special): ...
        def twice(first): ...
        def twice(second): ...
        if False:
            def never(): ...
        if __name__ == "__main__":
            def script(): ...
        class K:
            if sys.platform == "linux":
                def m(self): ...
        """,
        b="def f(): ...",
    )
    signatures = {"fast": "(slow)", "f": "()", "typed": "(right)", "branched": "()", "other": "()", "within": "()"}
    signatures |= {"twice": "(second)", "K.m": "(self)"}
    assert {name: str(find_definition(f"vale.a:{name}").signature) for name in signatures} == signatures
    assert find_definition("vale.a:never") is None
    assert [str(each.signature) for each in find_definitions("vale.a:either")] == ["(one)", "(other)"]
    assert [str(each.signature) for each in find_definitions("vale.a:overridden")] == ["(special)", "(general)"]
    assert find_definition("vale.a:script") is None


def test_base_classes(package):
    package(
        a="""
        from .b import Root, Base
        from . import b
        class Left(Root):
            pass
        class Right(Root):
            def m(self, right): ...
        class Both(Left, Right): ...
        class Far(b.Base[int]): ...
        class Error(ValueError): ...
        class Lost(no.such.Base): ...
        class Dynamic(make_base()): ...
        class Named(Base, metaclass=type): ...
        """,
        b="""
        from typing import Generic, TypeVar
        class Root:
            def m(self, root): ...
            def __hidden(self): ...
        class Base(Root, Generic[T]):
            def n(self, base): ...
        """,
    )
    places = {
        "Both.m": "vale.a:Right.m",  # after Left comes Right, and only then Root
        "Left.m": "vale.b:Root.m",
        "Far.n": "vale.b:Base.n",
        "Far.m": "vale.b:Root.m",
        "Named.n": "vale.b:Base.n",
        "Left._Root__hidden": "vale.b:Root.__hidden",
    }
    assert {name: find_definition(f"vale.a:{name}").target for name in places} == places
    assert find_definition("vale.a:Error.add_note" if sys.version_info >= (3, 11) else "vale.a:Error.with_traceback")
    assert find_definition("vale.a:Left.__init__").kind == "method"
    assert find_definition("vale.a:Left.__new__").kind == "staticmethod"
    for name in ("Error.m", "Lost.m", "Dynamic.m", "Left.__hidden", "Left._Left__hidden"):
        assert find_definition(f"vale.a:{name}") is None


def test_what_only_running_tells_is_unknown(package):
    folder = package(
        lazy="def __getattr__(name): ...",
        starred="from .lazy import *",
        broken="def f(:",
        computed="K = make()\nx = f(1)",
    )
    (folder / "native.so").write_bytes(b"")
    for target in ("lazy:anything", "broken:f", "native:f", "computed:K", "computed:K.m", "computed:x"):
        assert find_definition(f"vale.{target}").kind == "unknown", target
    assert find_definition("vale.computed:y") is None


# -- names near ------------------------------------------------------------------------------------------------------


def test_names_near(package):
    package(
        router="""
        class Router:
            def route(self): ...
        class TopKRouter(Router):
            def forward(self): ...
            def routing_map(self): ...
        def topk_routing(): ...
        """,
        moe__router="",
        moe__experts="",
    )
    assert names_near("vale.router:TopKRouter.routing_mop") == ["vale.router:TopKRouter.routing_map"]
    assert names_near("vale.router:TopKRouter.routes") == ["vale.router:Router.route"]  # inherited
    assert names_near("vale.router:forward") == ["vale.router:TopKRouter.forward"]  # it has moved into a class
    assert names_near("vale.router:TopRouter.forward") == [
        "vale.router:TopKRouter.forward",
        "vale.router:TopKRouter",
        "vale.router:Router",
    ]
    assert names_near("vale.router:nothing_like_it") == []
    assert names_near("vale.moe.routers:f") == ["vale.moe.router"]
    assert names_near("vale.moes.router:f") == ["vale.moe"]
    assert names_near("no_such_package:f") == []


# -- signatures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recorded", "found", "added"),
    [
        ("(a, b=1)", "(a, b=2)", []),
        ("(a)", "(a, b=1)", ["b"]),
        ("(a)", "(a, *, b=1)", ["b"]),
        ("(a, *, b)", "(a, *, c=1, b)", ["c"]),
        ("(a)", "(a, *rest)", ["*rest"]),
        ("(a)", "(a, **options)", ["**options"]),
        ("(a, *args, **kwargs)", "(a, *rest, **options)", []),
        ("(a)", "(a, b)", None),
        ("(a)", "(b=1, a=1)", None),
        ("(a)", "(a, *, b)", None),
        ("(a, b=1)", "(a, b)", None),
        ("(a, b)", "(a, b=1)", None),
        ("(a, b)", "(b, a)", None),
        ("(a, b)", "(a)", None),
        ("(a, /)", "(a)", None),
        ("(a, *, b)", "(a, b)", None),
        ("(a, *rest)", "(a)", None),
        ("(a, *rest)", "(a, b=1, *rest)", None),  # b would take what was meant for rest
        ("(a, **options)", "(a)", None),
    ],
)
def test_compare_signatures(recorded, found, added):
    assert compare_signatures(parse_signature(recorded), parse_signature(found)) == added


@pytest.mark.parametrize("text", ["", "a", "(a", "(a))", "(a):pass\ndef g()", "(a): pass;", "(b=1, a)"])
def test_parse_signature_refuses(text):
    with pytest.raises(ValueError, match="not a parameter list"):
        parse_signature(text)


# -- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprint_needs_source():
    for value in (len, lambda: 0, eval("lambda: 0")):
        with pytest.raises((OSError, TypeError)):
            source_fingerprint(value)


def test_text_in_the_first_column(package, tmp_path):
    """Dedenting the source would change the string."""
    (tmp_path / "flush.py").write_text('class K:\n    def m(self):\n        return """\nflush\n  left"""\n')
    importlib.invalidate_caches()
    loaded = importlib.import_module("flush")
    assert find_definition("flush:K.m").fingerprint == source_fingerprint(loaded.K.m)


def test_a_fingerprint_is_computed_when_it_is_asked_for(package, monkeypatch):
    package(init="def f(a): return a")
    asked = []
    original = source._fingerprint_of_node
    monkeypatch.setattr(source, "_fingerprint_of_node", lambda node: asked.append(node) or original(node))
    found = find_definition("vale:f")
    assert (found.kind, str(found.signature), asked) == ("function", "(a)", [])
    first = found.fingerprint
    assert (found.fingerprint, len(asked), len(first)) == (first, 1, 16)


def test_definitions_with_different_bodies_differ(package):
    package(one="def f(a): return a", two="def f(a): return 2")
    one, two = (replace(find_definition(f"vale.{name}:f"), target="", signature=None) for name in ("one", "two"))
    same = replace(find_definition("vale.one:f"), target="", signature=None)
    assert one == same
    assert hash(one) == hash(same)
    assert replace(one, path=None) != replace(two, path=None)


def test_a_definition_is_pickled_with_its_fingerprint_and_without_its_tree(package):
    package(init="def f(a): return a")
    found = replace(find_definition("vale:f"), signature=None)
    pickled = pickle.dumps(found)
    assert pickle.loads(pickled) == found
    assert pickle.loads(pickled).fingerprint == find_definition("vale:f").fingerprint
    assert b"FunctionDef" not in pickled


# -- real code -------------------------------------------------------------------------------------------------------


def loaded_functions(module):
    """Qualified name, owner and stored function of whatever is written in the module's own file."""
    classes = [
        value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    for owner in (module, *classes):
        for name, raw in vars(owner).items():
            function = getattr(raw, "__func__", raw)
            if inspect.isfunction(function) and inspect.unwrap(function).__code__.co_filename == module.__file__:
                yield name if owner is module else f"{owner.__name__}.{name}", owner, raw


@pytest.mark.parametrize(
    "name",
    """argparse ast asyncio.base_events concurrent.futures.thread contextlib dataclasses functools json.decoder
    logging multiprocessing.pool subprocess tempfile threading unittest.mock""".split(),
)
def test_static_and_loaded_views_of_the_standard_library_agree(name):
    module = importlib.import_module(name)
    seen = 0
    for qualname, owner, raw in loaded_functions(module):
        function = getattr(raw, "__func__", raw)
        loaded = describe(f"{name}:{qualname}", kind_of(owner, raw), function)
        candidates = find_definitions(f"{name}:{qualname}")
        if not candidates or candidates[0].kind == "unknown" or made_by_its_metaclass(owner):
            continue  # put there by running code
        assert (loaded.kind, loaded.fingerprint) in [(each.kind, each.fingerprint) for each in candidates], qualname
        if not hasattr(function, "__wrapped__"):
            shapes = [
                [(p.name, p.kind, p.default is p.empty) for p in each.signature.parameters.values()]
                for each in candidates
            ]
            assert [(p.name, p.kind, p.default is p.empty) for p in loaded.signature.parameters.values()] in shapes
        seen += 1
    assert seen > 5


def made_by_its_metaclass(owner):
    return isinstance(owner, (enum.EnumMeta, type(typing.Protocol)))
