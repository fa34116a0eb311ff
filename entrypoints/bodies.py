"""Source texts, read from files: upstream's body of a target, and what a patch puts there."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from difflib import unified_diff
from pathlib import Path
from typing import Any

import miles_plugins
from miles_plugins.compat.source import Definition
from miles_plugins.patching import Patch

ROOT = Path(miles_plugins.__file__).resolve().parents[1]


def upstream_body(found: Definition) -> list[str]:
    """The lines of a definition with its decorators; of a class only how it begins; none where there is no source."""
    if found.path is None or found.line is None or found.path.suffix != ".py":
        return []
    text = found.path.read_text(encoding="utf-8")
    begins = [node for node in ast.walk(ast.parse(text)) if getattr(node, "lineno", None) == found.line]
    node = next((node for node in begins if isinstance(node, ast.stmt)), None)
    if node is None or node.end_lineno is None:
        return []
    decorators = [each.lineno for each in getattr(node, "decorator_list", ())]
    end = node.body[0].lineno - 1 if isinstance(node, ast.ClassDef) else node.end_lineno
    lines = _dedented("\n".join(text.splitlines()[min([node.lineno, *decorators]) - 1 : max(end, node.lineno)]))
    return [*lines, f"    …  # {node.end_lineno - end} lines"] if isinstance(node, ast.ClassDef) else lines


def our_code(patch: Patch) -> Any:
    """The function or class that a patch is made of, or the value that it puts there."""
    code = patch.wrap or patch.replace_with or (patch.replace if patch.kind == "replace" else patch.add)
    return code.func if isinstance(code, functools.partial) else code


def our_body(patch: Patch) -> list[str]:
    """Its lines, and those of the functions that a lambda only passes on to."""
    code = our_code(patch)
    parts = [code]
    if inspect.isfunction(code) and code.__name__ == "<lambda>":
        parts += [value for value in inspect.getclosurevars(code).nonlocals.values() if callable(value)]
    lines: list[str] = []
    for part in parts:
        try:
            lines += _dedented(inspect.getsource(part))
        except (OSError, TypeError):  # a value, or made by a program
            lines.append(repr(part))
    return lines


def our_place(patch: Patch) -> str:
    """`name, patches/megatron/router.py:52`."""
    code = our_code(patch)
    name = getattr(code, "__qualname__", None) or repr(code)
    try:
        file, line = Path(inspect.getsourcefile(code) or "").resolve(), inspect.getsourcelines(code)[1]
    except (OSError, TypeError):
        return name
    return f"{name}, {file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}:{line}"


def _dedented(text: str) -> list[str]:
    return textwrap.dedent(text).splitlines()


def difference(upstream: list[str], ours: list[str], names: tuple[str, str]) -> list[str]:
    """A unified diff with all its context: the body is read as a whole."""
    lines = max(len(upstream), len(ours))
    return list(unified_diff(upstream, ours, *names, lineterm="", n=lines))
