"""Look at upstream without importing it: where a module is, what it defines, with which parameters and which body.

Everything here reads files only. What cannot be known without running upstream (a value that is computed, a compiled
module) is said to be of kind "unknown", never guessed. `describe` and `source_fingerprint` give the same answers for
objects that are already loaded, so that one comparison serves both.
"""

from __future__ import annotations

import ast
import builtins
import copy
import difflib
import functools
import hashlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

FUNCTION_KINDS = frozenset({"function", "method", "classmethod", "staticmethod"})
"""The kinds of `Definition` that are called: what a wrapper can go around."""

_MAX_HOPS = 32  # re-exports and base classes followed for one target
_FunctionNode = (ast.FunctionDef, ast.AsyncFunctionDef)


class _Body:
    """What a function or class does, known by its fingerprint, which is computed when it is asked for."""

    def __init__(self, node: Any = None, fingerprint: str | None = None, loaded: Any = None) -> None:
        self._node, self._fingerprint, self._loaded = node, fingerprint, loaded

    @property
    def fingerprint(self) -> str | None:
        if self._node is not None:  # most definitions are never asked, and of a large class it takes long
            self._fingerprint, self._node = _fingerprint_of_node(self._node), None
        if self._loaded is not None:
            with suppress(OSError, TypeError):  # compiled: there is no source
                self._fingerprint = source_fingerprint(self._loaded)
            self._loaded = None
        return self._fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Body) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return repr(self.fingerprint)

    def __reduce__(self) -> tuple[object, ...]:  # without the syntax tree
        return _Body, (None, self.fingerprint)


_NO_BODY = _Body()


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What a target is.

    `kind` is one of function, method, classmethod, staticmethod, property, class, module, value, declared (annotated
    in a class body, without a value) and unknown. `signature` has no annotations and includes `self` or `cls`.
    """

    target: str
    kind: str
    signature: inspect.Signature | None = None
    body: _Body = _NO_BODY
    path: Path | None = None
    line: int | None = None

    @property
    def fingerprint(self) -> str | None:
        """See `source_fingerprint`; None where there is no source."""
        return self.body.fingerprint

    @property
    def where(self) -> str:
        return ":".join(str(part) for part in (self.path, self.line) if part is not None)


# -- signatures ------------------------------------------------------------------------------------------------------


class _Default:
    """A default value, known by its source text only."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def parse_signature(text: str) -> inspect.Signature:
    """The signature written as `(self, config, *, groups=None)`. Raises ValueError when it is not one."""
    try:
        body = ast.parse(f"def _{text}: ...").body
    except (SyntaxError, ValueError):
        body = []
    if len(body) == 1 and isinstance(body[0], ast.FunctionDef) and len(body[0].body) == 1:
        return _signature_of_node(body[0].args)
    raise ValueError(f"not a parameter list: {text!r}; one looks like (self, config, *, groups=None)")


def _signature_of_node(arguments: ast.arguments) -> inspect.Signature:
    parameters: list[inspect.Parameter] = []

    def add(argument: ast.arg, kind: Any, default: ast.expr | None = None) -> None:
        value = inspect.Parameter.empty if default is None else _Default(ast.unparse(default))
        parameters.append(inspect.Parameter(argument.arg, kind, default=value))

    positional: list[tuple[ast.arg, Any]]
    positional = [(argument, inspect.Parameter.POSITIONAL_ONLY) for argument in arguments.posonlyargs]
    positional += [(argument, inspect.Parameter.POSITIONAL_OR_KEYWORD) for argument in arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for (argument, kind), default in zip(positional, defaults, strict=True):
        add(argument, kind, default)
    if arguments.vararg:
        add(arguments.vararg, inspect.Parameter.VAR_POSITIONAL)
    for argument, keyword_default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        add(argument, inspect.Parameter.KEYWORD_ONLY, keyword_default)
    if arguments.kwarg:
        add(arguments.kwarg, inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature(parameters)


def _signature_of_object(function: Any) -> inspect.Signature | None:
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):  # compiled, and does not say
        return None
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return inspect.Signature(bare)


def compare_signatures(recorded: inspect.Signature, found: inspect.Signature) -> list[str] | None:
    """What `found` accepts beyond `recorded`; None when it does not accept the recorded arguments the same way.

    Names, kinds and the presence of defaults must agree. New parameters may follow if they have defaults; a new
    positional one may not push into `*args`.
    """
    old, new = _by_kind(recorded), _by_kind(found)
    added: list[inspect.Parameter] = new.positional[len(old.positional) :]
    if [_shape(p) for p in old.positional] != [_shape(p) for p in new.positional[: len(old.positional)]]:
        return None
    if (old.star and (added or not new.star)) or (old.double_star and not new.double_star):
        return None
    for name, parameter in old.keyword.items():
        if name not in new.keyword or _shape(new.keyword[name]) != _shape(parameter):
            return None
    added += [parameter for name, parameter in new.keyword.items() if name not in old.keyword]
    if any(parameter.default is inspect.Parameter.empty for parameter in added):
        return None
    stars = [f"*{new.star}"] if new.star and not old.star else []
    stars += [f"**{new.double_star}"] if new.double_star and not old.double_star else []
    return [parameter.name for parameter in added] + stars


@dataclass
class _Parameters:
    positional: list[inspect.Parameter]
    star: str | None
    keyword: dict[str, inspect.Parameter]
    double_star: str | None


def _by_kind(signature: inspect.Signature) -> _Parameters:
    sorted_out = _Parameters([], None, {}, None)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            sorted_out.star = parameter.name
        elif parameter.kind is parameter.VAR_KEYWORD:
            sorted_out.double_star = parameter.name
        elif parameter.kind is parameter.KEYWORD_ONLY:
            sorted_out.keyword[parameter.name] = parameter
        else:
            sorted_out.positional.append(parameter)
    return sorted_out


def _shape(parameter: inspect.Parameter) -> tuple[str, Any, bool]:
    return parameter.name, parameter.kind, parameter.default is inspect.Parameter.empty


# -- fingerprints ----------------------------------------------------------------------------------------------------


def source_fingerprint(function: Any) -> str:
    """16 hex digits that change when what a loaded function (or class) does changes.

    Comments, layout, docstrings, annotations and its own decorators do not count. The number is the same in every
    Python version and from `find_definition`. Raises OSError or TypeError when there is no source to read.
    """
    text = inspect.getsource(inspect.unwrap(function))
    # `if 1:` rather than dedent: dedent would also move the text inside multi-line strings.
    try:
        first = ast.parse(f"if 1:\n{text}" if text[:1].isspace() else text).body[0]
    except SyntaxError:
        raise OSError(f"the source of {function!r} is only a part of a statement") from None
    first = first.body[0] if isinstance(first, ast.If) else first
    if not isinstance(first, (*_FunctionNode, ast.ClassDef)):
        raise OSError(f"{function!r} is not written as a def or class statement")
    return _fingerprint_of_node(first)


def _fingerprint_of_node(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    essence = copy.deepcopy(node)
    essence.decorator_list = []
    text = _canonical(_Essence().visit(essence))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Essence(ast.NodeTransformer):
    """Removes what does not run: docstrings and annotations."""

    def _definition(self, node: Any) -> Any:
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        node.returns = None
        node.type_params = []
        return self.generic_visit(node)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _definition

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return self.generic_visit(ast.Expr(value=node.target))
        return self.generic_visit(ast.Assign(targets=[node.target], value=node.value))


def _canonical(node: object) -> str:
    # Not ast.dump: its text differs between Python versions.
    if isinstance(node, ast.AST):
        kept = (
            f"{name}={_canonical(value)}"
            for name, value in ast.iter_fields(node)
            if name not in ("ctx", "kind", "type_comment") and value is not None and value != []
        )
        return f"{type(node).__name__}({','.join(kept)})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return ascii(node)


# -- loaded objects --------------------------------------------------------------------------------------------------


def kind_of(owner: object, raw: object) -> str:
    """The kind (see `Definition`) of `raw`, an entry of `vars(owner)`."""
    if isinstance(raw, staticmethod):
        return "staticmethod"
    if isinstance(raw, classmethod):
        return "classmethod"
    if inspect.isclass(raw):
        return "class"
    if inspect.ismodule(raw):
        return "module"
    if isinstance(owner, ModuleType):
        return "function" if inspect.isroutine(raw) else "value"
    if inspect.isbuiltin(raw):  # does not bind its instance
        return "staticmethod"
    if inspect.isroutine(raw):
        return "method"
    return "property" if hasattr(type(raw), "__get__") else "value"


def describe(target: str, kind: str, value: Any) -> Definition:
    """The `Definition` of a loaded object of a known kind (a method as the plain function)."""
    if kind not in FUNCTION_KINDS and kind != "class":
        return Definition(target=target, kind=kind)
    path = line = None
    plain = inspect.unwrap(value)
    if hasattr(plain, "__code__"):
        path, line = Path(plain.__code__.co_filename), plain.__code__.co_firstlineno
    signature = _signature_of_object(value) if kind in FUNCTION_KINDS else None
    body = _Body(loaded=value)
    return Definition(target=target, kind=kind, signature=signature, body=body, path=path, line=line)


# -- files -----------------------------------------------------------------------------------------------------------

_folders: ContextVar[tuple[str, ...] | None] = ContextVar("folders", default=None)  # None: what Python would import


@contextmanager
def reading_from(*folders: Path) -> Iterator[None]:
    """Within it, these folders are all that there is: modules are looked for in them, the first that has one wins.

    Of a module that is elsewhere (`import torch` in a checkout of slime), nothing is known but that it is a module.
    """
    token = _folders.set(tuple(str(folder.expanduser().resolve()) for folder in folders))
    try:
        yield
    finally:
        _folders.reset(token)


def find_module(name: str) -> Path | None:
    """The file of a module, without importing it or its parents; None when there is none (or a namespace package)."""
    located = _locate_module(name)
    return located[0] if located else None


def text_of(module: str) -> str | None:
    """A module's source, without importing it or its parents; None where there is none."""
    try:
        file = find_module(module)
        return None if file is None or file.suffix != ".py" else file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def has_package(name: str) -> bool:
    """Whether a top-level package is installed at all."""
    return _locate_module(name) is not None


_noted: ContextVar[set[str] | None] = ContextVar("noted", default=None)


@contextmanager
def noting_modules() -> Iterator[set[str]]:
    """Within it, the names of all modules that are looked for are collected: what is read depends on nothing else."""
    names: set[str] = set()
    token = _noted.set(names)
    try:
        yield names
    finally:
        _noted.reset(token)


def state_of_module(name: str) -> list[str | int] | None:
    """What tells whether a module is the same as before: where it is, its size and its time of change, in ns."""
    located = _locate_module(name)
    if located is None:
        return None
    path, folders = located
    if path is None:
        return list(folders)
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _locate_module(name: str) -> tuple[Path | None, list[str]] | None:
    """The file of a module and the folders of its submodules; None when there is no such module."""
    if (noted := _noted.get()) is not None:
        noted.add(name)
    top, *rest = name.split(".")
    located = _locate_top(top)
    for part in rest:
        # By hand: PathFinder asks sys.modules for the parent of a nested namespace package.
        located = _locate_in(located[1], part) if located else None
    return located


def _locate_top(name: str) -> tuple[Path | None, list[str]] | None:
    if (folders := _folders.get()) is not None:
        return _locate_in(folders, name)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    path = Path(spec.origin) if spec.has_location and spec.origin else None
    return path, list(spec.submodule_search_locations or ())


def _locate_in(folders: Iterable[str], part: str) -> tuple[Path | None, list[str]] | None:
    namespace = []
    for folder in folders:
        base = Path(folder, part)
        if (base / "__init__.py").is_file():
            return base / "__init__.py", [str(base)]
        for suffix in (*EXTENSION_SUFFIXES, *SOURCE_SUFFIXES):
            if (file := Path(folder, part + suffix)).is_file():
                return file, []
        if base.is_dir():
            namespace.append(str(base))
    return (None, namespace) if namespace else None


@dataclass(frozen=True)
class _Module:
    name: str
    path: Path
    tree: ast.Module | None

    @property
    def body(self) -> list[ast.stmt]:
        return self.tree.body if self.tree else []

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


def _read_module(name: str) -> _Module | None:
    """The parsed module, its `tree` None if it is not Python source; None when it does not exist."""
    located = _locate_module(name)
    if located is None:
        # Of what is in none of the folders that are read, no name can be told.
        is_elsewhere = _folders.get() is not None and not has_package(name.partition(".")[0])
        return _Module(name, Path(f"{name}.py"), None) if is_elsewhere else None
    path, _ = located
    if path is None:  # a namespace package, or built in
        return _Module(name, Path("__init__.py"), ast.Module(body=[], type_ignores=[]))
    if path.suffix != ".py":
        return _Module(name, path, None)
    status = path.stat()
    try:
        return _Module(name, path, _parse(path, status.st_mtime_ns, status.st_size))
    except (SyntaxError, ValueError):
        return _Module(name, path, None)


def syntax_problem(module: str) -> str | None:
    """Where this interpreter cannot read the file of a module, and why; None where it can, or there is no file."""
    file = find_module(module)
    if file is None or file.suffix != ".py":
        return None
    try:
        ast.parse(file.read_bytes())
    except SyntaxError as error:
        return f"{file}:{error.lineno}: {error.msg}"
    except ValueError as error:
        return f"{file}: {error}"
    return None


@functools.lru_cache(maxsize=256)
def _parse(path: Path, modified: int, size: int) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's own syntax warnings are not for our reader
        return ast.parse(path.read_bytes(), filename=str(path))


# -- definitions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a name gets its value; `scope` holds the names of the classes around it."""

    module: _Module
    scope: tuple[str, ...]
    name: str
    node: Any  # the statement; of a builtin class, its member; None for the module itself
    is_known: bool = True

    @property
    def target(self) -> str:
        return f"{self.module.name}:{'.'.join((*self.scope, self.name))}"


_Trail = tuple[object, ...]  # the questions that have led here: ends circular re-exports


def find_definition(target: str) -> Definition | None:
    """What `module:qualname` is, read from the files; None when there is nothing of that name.

    Follows re-exports (`from x import y`, also `*`), aliases (`a = b`), base classes, and the branches of if, try and
    with. Where several branches define the name, this is the first; see `find_definitions`.
    """
    return next(iter(find_definitions(target)), None)


def find_definitions(target: str) -> list[Definition]:
    """Everything that `module:qualname` can be: more than one thing if a condition decides."""
    module, _, qualname = target.partition(":")
    parts = tuple(qualname.split(".")) if qualname else ()
    places = _find_in_module(module, parts, ())
    return [_define(place, parts) for place in dict.fromkeys(places)]


def _find_in_module(name: str, parts: tuple[str, ...], trail: _Trail) -> list[_Place]:
    if (name, parts) in trail or len(trail) >= _MAX_HOPS:
        return []
    trail = (*trail, (name, parts))
    module = _read_module(name)
    if module is None:
        return []
    if not parts:
        return [_Place(module, (), "", None)]
    found = _find_in_body(module, (), module.body, parts, trail)
    if not found and module.path.name == "__init__.py":
        found = _find_in_module(f"{name}.{parts[0]}", parts[1:], trail)
    if not found and (module.tree is None or any(True for _ in _bindings(module.body, "__getattr__"))):
        found = [_Place(module, parts[:-1], parts[-1], None, is_known=False)]
    return found


def _find_in_body(
    module: _Module, scope: tuple[str, ...], body: list[ast.stmt], parts: tuple[str, ...], trail: _Trail
) -> list[_Place]:
    places: list[_Place] = []
    name, rest = parts[0], parts[1:]
    for node, is_conditional in _bindings(body, name):
        found: list[_Place] = []
        if isinstance(node, ast.ImportFrom):
            found = _find_in_import(module, node, name, rest, trail)
        elif isinstance(node, ast.Import):
            imported = next((alias.name for alias in node.names if alias.asname == name), name)
            found = _find_in_module(imported, rest, trail)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            found = _find_in_assignment(module, scope, body, node, parts, trail)
        elif not rest:
            found = [_Place(module, scope, name, node)]
        elif isinstance(node, ast.ClassDef):
            found = _find_in_class(_Place(module, scope, name, node), rest, trail)
        places += found
        if found and not is_conditional:
            break
    return places


def _find_in_import(
    module: _Module, node: ast.ImportFrom, name: str, rest: tuple[str, ...], trail: _Trail
) -> list[_Place]:
    package = module.package.split(".")
    base = package[: len(package) - node.level + 1] if node.level else []
    source = ".".join([*base, *([node.module] if node.module else [])])
    original = next((alias.name for alias in node.names if (alias.asname or alias.name) == name), name)
    return _find_in_module(source, (original, *rest), trail)


def _find_in_assignment(
    module: _Module, scope: tuple[str, ...], body: list[ast.stmt], node: Any, parts: tuple[str, ...], trail: _Trail
) -> list[_Place]:
    name, rest = parts[0], parts[1:]
    question = (module.name, scope, parts)
    if isinstance(node.value, ast.Name) and node.value.id != name and question not in trail:
        meant, trail = (node.value.id, *rest), (*trail, question)
        found = _find_in_body(module, scope, body, meant, trail)
        if not found and scope:
            found = _find_in_body(module, (), module.body, meant, trail)
        if found:
            return found
    return [_Place(module, scope, name, node, is_known=not rest)]


def _find_in_class(place: _Place, parts: tuple[str, ...], trail: _Trail) -> list[_Place]:
    """Depth first, each class at its last mention: Python's own order in all but contrived hierarchies."""
    name, rest = parts[0], parts[1:]
    lineage = _lineage(place, trail)
    for position, ancestor in enumerate(lineage):
        if ancestor in lineage[position + 1 :]:
            continue
        if isinstance(ancestor.node, ast.ClassDef):
            written = _unmangled(name, ancestor.name)
            scope, body = (*ancestor.scope, ancestor.name), ancestor.node.body
            found = _find_in_body(ancestor.module, scope, body, (written, *rest), trail) if written else []
            if found:
                return found
        elif not rest and hasattr(ancestor.node, name):
            return [_Place(ancestor.module, (ancestor.name,), name, getattr(ancestor.node, name))]
    return []


def _unmangled(name: str, class_name: str) -> str | None:
    """How a class body writes what Python stores as `name`: `_Class__private` is written `__private`."""
    if name.startswith("__") and not name.endswith("__"):
        return None
    prefix = f"_{class_name.lstrip('_')}"
    return name.removeprefix(prefix) if name.startswith(f"{prefix}__") else name


def _lineage(place: _Place, trail: _Trail) -> list[_Place]:
    """A class, and what it inherits from as far as that can be read; `object` last."""
    if not isinstance(place.node, ast.ClassDef):
        return [place]
    lineage = [place]
    question = (place.target, "bases")
    for expression in place.node.bases if question not in trail and len(trail) < _MAX_HOPS else ():
        parts = _dotted(expression)
        if not parts:
            continue
        bases = _find_in_body(place.module, (), place.module.body, parts, (*trail, question))
        if bases and bases[0].is_known:
            lineage += _lineage(bases[0], (*trail, question))
        elif not bases and isinstance(builtin := getattr(builtins, ".".join(parts), None), type):
            lineage.append(_Place(place.module, (), parts[0], builtin))
    return [*lineage, _Place(place.module, (), "object", object)]


def _dotted(expression: ast.expr) -> tuple[str, ...]:
    if isinstance(expression, ast.Subscript):  # Generic[T]
        return _dotted(expression.value)
    if isinstance(expression, ast.Attribute) and (front := _dotted(expression.value)):
        return (*front, expression.attr)
    return (expression.id,) if isinstance(expression, ast.Name) else ()


def _bindings(body: list[ast.stmt], name: str | None) -> Iterator[tuple[ast.stmt, bool]]:
    """The statements that bind `name` (any name, if None), the last first, as it hides the others; is it conditional?

    Of a try statement, what is tried counts before what handles its failure.
    """
    for node in reversed(body):
        if isinstance(node, ast.If):
            for block in (node.body if _runs_on_import(node.test) else [], node.orelse):
                yield from ((inner, True) for inner, _ in _bindings(block, name))
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            yield from _bindings(node.body, name)
        elif isinstance(node, ast.Try):
            for block in (node.finalbody, node.orelse, node.body, *(handler.body for handler in node.handlers)):
                yield from _bindings(block, name)
        elif any(name in (None, bound) or (bound == "*" and not str(name).startswith("_")) for bound in _bound(node)):
            yield node, False


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (*_FunctionNode, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            elements = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
            yield from (element.id for element in elements if isinstance(element, ast.Name))


def _runs_on_import(test: ast.expr) -> bool:
    if isinstance(test, ast.Constant):
        return bool(test.value)
    return "TYPE_CHECKING" not in _dotted(test) and not ast.unparse(test).startswith("__name__ ==")


def _define(place: _Place, parts: tuple[str, ...]) -> Definition:
    node, module = place.node, place.module
    path = module.path if module.path.is_absolute() else None
    if not place.is_known:
        return Definition(target=place.target, kind="unknown", path=path, line=getattr(node, "lineno", None))
    if node is None:
        return Definition(target=module.name, kind="module", path=path)
    if not isinstance(node, ast.AST):  # inherited from a builtin class
        kind = kind_of(object, inspect.getattr_static(getattr(builtins, place.scope[0]), place.name))
        return Definition(target=place.target, kind=kind, signature=_signature_of_object(node))
    kind, signature, body = "unknown", None, _NO_BODY
    if isinstance(node, _FunctionNode):
        kind = _method_kind(node, parts[-1]) if len(parts) > 1 else "function"
        signature, body = _signature_of_node(node.args), _Body(node)
    elif isinstance(node, ast.ClassDef):
        kind, body = "class", _Body(node)
    elif isinstance(node, ast.AnnAssign) and node.value is None:
        kind = "declared"
    elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(
        node.value, (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.JoinedStr, ast.UnaryOp, ast.BinOp)
    ):
        kind = "value"
    return Definition(
        target=place.target,
        kind=kind,
        signature=signature,
        body=body,
        path=path,
        line=getattr(node, "lineno", None),
    )


def _method_kind(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    if name == "__new__":
        return "staticmethod"
    if name in ("__init_subclass__", "__class_getitem__"):
        return "classmethod"
    for decorator in node.decorator_list:
        last = (_dotted(decorator.func if isinstance(decorator, ast.Call) else decorator) or ("",))[-1]
        if last in ("staticmethod", "classmethod"):
            return last
        if last.endswith("property") or last in ("setter", "getter", "deleter"):
            return "property"
    return "method"


# -- what it may be called now ---------------------------------------------------------------------------------------


def names_near(target: str, limit: int = 5) -> list[str]:
    """Targets that a missing one may have become: similar names in its owner, the same name elsewhere in its module.

    For a missing class: similar classes; for a missing module: similar modules in the nearest package that exists.
    """
    module, _, qualname = target.partition(":")
    source = _read_module(module)
    if source is None:
        return _modules_near(module, limit)
    *scope, wanted = qualname.split(".")
    everything = list(_all_names(source.body))
    siblings = {name[-1]: f"{module}:{'.'.join(name)}" for name in everything if name[:-1] == tuple(scope)}
    owners = _find_in_module(module, tuple(scope), ()) if scope else []
    for ancestor in reversed([ancestor for owner in owners for ancestor in _lineage(owner, ())]):
        if isinstance(ancestor.node, ast.ClassDef):
            names = [name for node, _ in _bindings(ancestor.node.body, None) for name in _bound(node)]
            siblings |= {name: f"{ancestor.target}.{name}" for name in names}
    near = [siblings[name] for name in difflib.get_close_matches(wanted, siblings, n=limit)]
    near += [f"{module}:{'.'.join(name)}" for name in everything if name[-1] == wanted]
    if scope and not owners:
        near += names_near(f"{module}:{'.'.join(scope)}", limit)
    return [name for name in dict.fromkeys(near) if name != target][:limit]


def _all_names(body: list[ast.stmt], scope: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for node, _ in _bindings(body, None):
        for name in _bound(node):
            yield (*scope, name)
        if isinstance(node, ast.ClassDef):
            yield from _all_names(node.body, (*scope, node.name))


def _modules_near(module: str, limit: int) -> list[str]:
    parent, _, last = module.rpartition(".")
    while parent:
        located = _locate_module(parent)
        if located is not None:
            names = {
                entry.name.partition(".")[0]
                for folder in located[1]
                for entry in Path(folder).iterdir()
                if entry.is_dir() or entry.suffix == ".py" or entry.name.endswith(tuple(EXTENSION_SUFFIXES))
            }
            return [f"{parent}.{name}" for name in difflib.get_close_matches(last, sorted(names), n=limit)]
        parent, _, last = parent.rpartition(".")
    return []
