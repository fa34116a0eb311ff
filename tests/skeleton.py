"""A release of upstream rebuilt from its record: every target with its kind, parameters and home, and no body."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from pathlib import Path

from miles_plugins.compat.releases import Release, Trait

_DECORATORS = {"staticmethod": "    @staticmethod\n", "classmethod": "    @classmethod\n"}


def build(release: Release, folder: Path) -> Path:
    """Write the modules of a release into a folder; returns it."""
    modules = _modules(release)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in modules.items():
        file = _file(folder, name, modules)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for inner in folder.rglob("*"):
        if inner.is_dir() and inner != folder / "megatron":  # a namespace package
            (inner / "__init__.py").touch()
    if release.name.startswith("megatron-core"):
        (folder / f"{release.name.replace('-', '_').replace(' ', '-')}.dist-info").mkdir()
    return folder


def _file(folder: Path, name: str, modules: dict[str, str]) -> Path:
    path = folder.joinpath(*name.split("."))
    is_package = any(other.startswith(f"{name}.") for other in modules)
    return path / "__init__.py" if is_package else path.with_suffix(".py")


def _modules(release: Release) -> dict[str, str]:
    """The source of every module that a target is in, or comes from."""
    imports: dict[str, list[str]] = defaultdict(list)
    classes: dict[tuple[str, str], list[str]] = defaultdict(list)
    bases: dict[tuple[str, str], str] = {}
    rest: dict[str, list[str]] = defaultdict(list)
    imported: set[tuple[str, str]] = set()
    for target, traits in release.targets.items():
        if not traits:
            continue
        (trait,) = traits
        module, _, qualname = target.partition(":")
        home, _, origin = (trait.home or target).partition(":")
        owner, _, name = qualname.rpartition(".")
        first, home_owner = qualname.partition(".")[0], origin.rpartition(".")[0]
        rest[module], rest[home] = rest[module], rest[home] if origin else []
        if trait.home and not origin:
            imports[module].append(f"import {trait.home}")
            del rest[home]
            continue
        if trait.home and owner == home_owner:
            imports[module].append(f"from {home} import {first}")
            imported.add((module, first))
        elif trait.home:
            imports[module].append(f"from {home} import {home_owner}")
            bases[module, owner] = home_owner
            classes[module, owner] += []
        if trait.kind == "class":
            classes[home, origin] += []
        elif home_owner:
            classes[home, home_owner].append(_member(name, trait))
        elif trait.kind != "module":
            rest[home].append(_member(name, trait).replace("    ", ""))
    for module, name in list(classes):  # what is around a class in a class need not have a target of its own
        classes[module, name.partition(".")[0]] += []
    for (module, name), members in sorted(classes.items(), key=lambda each: -each[0][1].count(".")):
        if (module, name) in imported:
            continue
        body = "".join(dict.fromkeys(members)) or "    ...\n"
        outer, _, inner = name.rpartition(".")
        text = f"class {inner}({bases.get((module, name), '')}):\n{body}"
        if outer:
            classes[module, outer].append(textwrap.indent(text, "    "))
        else:
            rest[module].append(text)
    lines = {module: [*dict.fromkeys(imports[module]), *dict.fromkeys(texts)] for module, texts in rest.items()}
    return {module: "\n".join(texts) + "\n" for module, texts in lines.items()}


def _member(name: str, trait: Trait) -> str:
    if trait.signature is None:
        return f"    {name} = 1\n"
    keyword = "async def" if trait.sort == "async" else "def"
    return f"{_DECORATORS.get(trait.kind, '')}    {keyword} {name}{trait.signature}: ...\n"
