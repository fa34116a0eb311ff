"""`miles-plugins fingerprint`: which release of upstream is this; and the record of a release, to know it by later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from miles_plugins.compat.releases import FOLDER, Identity, differences, identify, traits_of
from miles_plugins.compat.trees import UPSTREAM, tree_root
from miles_plugins.entrypoints.patch_facts import reading_upstream
from miles_plugins.entrypoints.verdicts import reading_trees, record

NAMES = {"slime": "slime", "megatron": "Megatron-LM", "sglang": "SGLang"}
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.option("--slime", type=_FOLDER, help="A checkout of slime.")
@click.option("--megatron", type=_FOLDER, help="A checkout of Megatron-LM, or an unpacked wheel of megatron-core.")
@click.option("--sglang", type=_FOLDER, help="A checkout of SGLang, or an unpacked wheel.")
@click.option("--release", metavar="NAME", help='Record the one folder that is given as this, such as "slime v0.3.1".')
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, help="Where to record it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fingerprint(release: str | None, folder: Path, as_json: bool, **trees: Path | None) -> None:
    """Which release of upstream is installed, or in these folders, by what its files define; nothing is imported.

    With --release, write what every patch target is there into a file, for later runs to compare with.
    """
    if release is not None and sum(tree is not None for tree in trees.values()) != 1:
        raise click.UsageError("--release records one folder: give one of --slime, --megatron and --sglang")
    given = {package: _root(tree, package) for package, tree in trees.items() if tree is not None}
    if release is None:
        _show(_identify(given), as_json)
        return
    ((package, root),) = given.items()
    click.echo(write_record(release, package, root, folder))


def _root(tree: Path, package: str) -> Path:
    try:
        return tree_root(tree, [package])
    except LookupError as error:
        raise click.ClickException(str(error)) from error


def write_record(name: str, package: str, root: Path, folder: Path) -> Path:
    """Write the file of one release, and return it."""
    release = record(name, package, [root])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / release.file_name
    file.write_text(release.dumps(), encoding="utf-8")
    return file


def _identify(roots: dict[str, Path]) -> dict[str, tuple[Identity | None, dict[str, list[str]]]]:
    """Each package -> what it is, and how its targets differ: of these folders, or of all that is installed."""
    if not roots:
        with reading_upstream():
            return {package: _identify_one(package) for package in UPSTREAM}
    found = {}
    for package, root in roots.items():
        with reading_trees([root]):
            found[package] = _identify_one(package)
    return found


def _identify_one(package: str) -> tuple[Identity | None, dict[str, list[str]]]:
    identity = identify(package)
    if identity is None or identity.release is None:
        return identity, {}
    recorded = identity.release.targets
    return identity, {name: differences(recorded.get(name, ()), traits_of(name)) for name in identity.differing}


def facts_of(identity: Identity) -> dict[str, Any]:
    """What `--json` says of a package: certainty is exact, nearest or unknown."""
    return {
        "certainty": identity.certainty,
        "releases": list(identity.names),
        "differing": len(identity.differing),
        "compared": identity.compared,
    }


def _show(found: dict[str, tuple[Identity | None, dict[str, list[str]]]], as_json: bool) -> None:
    if as_json:
        facts = {
            package: facts_of(identity) | {"targets": changes} if identity else None
            for package, (identity, changes) in found.items()
        }
        click.echo(json.dumps(facts, indent=1))
        return
    for package, (identity, changes) in found.items():
        click.echo(f"{NAMES[package]:<12} {identity or 'not installed'}")
        for target, lines in changes.items():
            click.echo(f"  {target}")
            for line in lines:
                click.echo(f"    {line}")
