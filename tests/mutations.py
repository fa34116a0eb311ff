"""What upstream does to a definition between two releases, done to the text of its file."""

from __future__ import annotations

import ast
import copy
import functools
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

SIBLING = "moved_by_the_mutation"
"""The new module beside the old one, of those mutations that have one."""
PARAMETER = "required_by_the_mutation"
RENAMED = "_of_another_name"

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Edit = Callable[[Any, list[str]], list[str]]


class NotApplicable(Exception):
    """This mutation cannot be done to this definition."""


@dataclass(frozen=True)
class Mutated:
    """The new text of the file, and of the module beside it."""

    text: str
    sibling: str | None = None


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a class or module, also inside `if`, `try` and `with`."""
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from statements(getattr(node, block, ()))
        for handler in getattr(node, "handlers", ()):
            yield from statements(handler.body)


def binds(node: ast.stmt, name: str) -> bool:
    if isinstance(node, (*Function, ast.ClassDef)):
        return node.name == name
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return any((alias.asname or alias.name) == name for alias in node.names)
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Name) and target.id == name for target in targets)
    return False


@functools.lru_cache(maxsize=8)
def parsed(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's own
        return ast.parse(source)


def nodes_of(source: str, qualname: str) -> list[Any]:
    """All statements that bind a name: a condition may decide which runs."""
    *owners, name = qualname.split(".")
    bodies = [parsed(source).body]
    for owner in owners:
        bodies = [node.body for body in bodies for node in statements(body) if binds(node, owner)]  # type: ignore[attr-defined]
    found = [node for body in bodies for node in statements(body) if binds(node, name)]
    if not found:
        raise NotApplicable(f"{qualname} is not written in this file")
    return found


def edited(source: str, qualname: str, edit: Edit) -> str:
    """The source with the lines of each statement that binds the name, its decorators included, replaced."""
    lines = source.splitlines()
    for node in reversed(nodes_of(source, qualname)):
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))]) - 1
        indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
        new = edit(node, lines[first : node.end_lineno])
        lines[first : node.end_lineno] = textwrap.indent("\n".join(new), indent).splitlines()
    return "\n".join(lines) + "\n"


def rewritten(source: str, qualname: str, change: Callable[[Any], None]) -> str:
    """The source with the syntax tree of each function of that name changed."""

    def edit(node: Any, lines: list[str]) -> list[str]:
        node = copy.deepcopy(function(node))
        change(node)
        return ast.unparse(node).splitlines()

    return edited(source, qualname, edit)


def function(node: Any) -> Any:
    if not isinstance(node, Function):
        raise NotApplicable("only a function has parameters and a body of its own")
    return node


def is_bound(node: Any, qualname: str) -> bool:
    """Whether the first parameter is the instance or class."""
    decorators = {ast.unparse(each) for each in node.decorator_list}
    return "." in qualname and "staticmethod" not in decorators


# -- the mutations ---------------------------------------------------------------------------------------------------


def deleted(source: str, qualname: str) -> Mutated:
    return Mutated(edited(source, qualname, lambda node, lines: ["pass"]))


def renamed(source: str, qualname: str) -> Mutated:
    name = qualname.rpartition(".")[2]

    def rename(node: Any, lines: list[str]) -> list[str]:
        at_first = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        lines = [line[at_first:] for line in lines]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return ast.unparse(node).replace(name, f"{name} as {name}{RENAMED}").splitlines()
        pattern = rf"^((?:async\s+)?(?:def|class)\s+|){name}\b"
        return re.sub(pattern, rf"\g<1>{name}{RENAMED}", "\n".join(lines), count=1, flags=re.MULTILINE).splitlines()

    return Mutated(edited(source, qualname, rename))


def moved(source: str, qualname: str) -> Mutated:
    """To a new module beside the old one; of a method, with its class."""
    top = top_of(source, qualname)
    return Mutated(edited(source, top, lambda node, lines: ["pass"]), sibling=source)


def re_exported(source: str, qualname: str) -> Mutated:
    """As `moved`, but the old module imports it from the new one."""
    top = top_of(source, qualname)
    line = f"from .{SIBLING} import {top}"
    return Mutated(edited(source, top, lambda node, lines: [line]), sibling=source)


def top_of(source: str, qualname: str) -> str:
    top = qualname.partition(".")[0]
    if not all(isinstance(node, (*Function, ast.ClassDef)) for node in nodes_of(source, top)):
        raise NotApplicable("only a function or a class can be written in another module")
    return top


def needs_a_keyword(source: str, qualname: str) -> Mutated:
    def change(node: Any) -> None:
        node.args.kwonlyargs.append(ast.arg(PARAMETER))
        node.args.kw_defaults.append(None)

    return Mutated(rewritten(source, qualname, change))


def needs_a_position(source: str, qualname: str) -> Mutated:
    """The new parameter is the first (after the instance or class): only there it needs no default of others."""

    def change(node: Any) -> None:
        place = 1 if is_bound(node, qualname) else 0
        of = node.args.posonlyargs or node.args.args
        of.insert(place, ast.arg(PARAMETER))

    return Mutated(rewritten(source, qualname, change))


def parameters_renamed(source: str, qualname: str) -> Mutated:
    """All but the instance or class, and *args and **kwargs, whose names no caller writes."""

    def change(node: Any) -> None:
        positional = [*node.args.posonlyargs, *node.args.args]
        parameters = [*positional[is_bound(node, qualname) :], *node.args.kwonlyargs]
        if not parameters:
            raise NotApplicable("it has none")
        for parameter in parameters:
            parameter.arg += RENAMED

    return Mutated(rewritten(source, qualname, change))


def moved_to_a_base(source: str, qualname: str) -> Mutated:
    """The method belongs to a new class that its own now inherits it from."""
    owner, _, _ = qualname.rpartition(".")
    if not owner or "." in owner:
        raise NotApplicable("only a method can be inherited")
    methods = [ast.unparse(function(node)) for node in nodes_of(source, qualname)]
    base = f"Base{RENAMED}"

    def inherit(node: Any, lines: list[str]) -> list[str]:
        indent = len(lines[0]) - len(lines[0].lstrip())
        text = "\n".join(line[indent:] for line in lines)
        text = re.sub(rf"^class {owner}\(", f"class {owner}({base}, ", text, count=1, flags=re.MULTILINE)
        text = re.sub(rf"^class {owner}:", f"class {owner}({base}):", text, count=1, flags=re.MULTILINE)
        return [f"class {base}:", *textwrap.indent("\n".join(methods), "    ").splitlines(), *text.splitlines()]

    return Mutated(edited(deleted(source, qualname).text, owner, inherit))


def made_a_property(source: str, qualname: str) -> Mutated:
    if "." not in qualname or qualname.endswith("__"):
        raise NotApplicable("only a method becomes a property, and a special one does not")
    return Mutated(rewritten(source, qualname, lambda node: node.decorator_list.insert(0, ast.Name("property"))))


def made_async(source: str, qualname: str) -> Mutated:
    if qualname.endswith("__"):
        raise NotApplicable("Python wants it as it is")

    def change(node: Any) -> None:
        if isinstance(node, ast.AsyncFunctionDef):
            node.__class__, node.body = ast.FunctionDef, [ast.Pass()]  # what it awaits would be a syntax error
        else:
            node.__class__ = ast.AsyncFunctionDef

    return Mutated(rewritten(source, qualname, change))


MUTATIONS: dict[str, Callable[[str, str], Mutated]] = {
    "deleted": deleted,
    "renamed": renamed,
    "moved to another module": moved,
    "re-exported from another module": re_exported,
    "a new required keyword": needs_a_keyword,
    "a new required position": needs_a_position,
    "its parameters renamed": parameters_renamed,
    "moved to a base class": moved_to_a_base,
    "made a property": made_a_property,
    "made async, or no longer": made_async,
}
