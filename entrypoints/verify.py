"""`miles-plugins verify --against DIR`: what a checkout or an unpacked wheel of upstream would do to the patches.

Offline, without a GPU, and without importing anything of upstream.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from miles_plugins.compat.releases import Identity, identify
from miles_plugins.compat.trees import UPSTREAM, holds, tree_root
from miles_plugins.entrypoints.fingerprint import NAMES, facts_of
from miles_plugins.entrypoints.patch_facts import FITS, MISFIT, OPEN, SUPERSEDED
from miles_plugins.entrypoints.verdicts import (
    DRIFTED,
    LEFT_OUT,
    Past,
    Verdict,
    judge_all,
    packages_of,
    present_packages,
    reading_trees,
)
from miles_plugins.errors import PluginError
from miles_plugins.manager import Plugins
from miles_plugins.patches.seam import all_seams, needed_seams

ORDER = (FITS, OPEN, SUPERSEDED, LEFT_OUT, DRIFTED, MISFIT)  # what matters most is last: there a log is read
MEANINGS = {
    FITS: "",
    OPEN: "the files do not tell; it is checked when upstream is imported",
    SUPERSEDED: "upstream does it by itself, so nothing is changed",
    LEFT_OUT: "megatron-core has megatron.core only",
    DRIFTED: "parameters still fit, the rest has changed: read it beside the old one (--base DIR)",
    MISFIT: "slime-train would refuse to start",
}
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.option("--against", multiple=True, required=True, type=_FOLDER, help="A checkout or an unpacked wheel.")
@click.option("--base", multiple=True, type=_FOLDER, help="Another one: show how the targets' text differs from it.")
@click.option("--plugins", metavar="NAMES", help="Only the patches that these plugins need (default: all patches).")
@click.option("--strict", is_flag=True, help="Exit 1 also where upstream has drifted.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(against: Sequence[Path], base: Sequence[Path], plugins: str | None, strict: bool, as_json: bool) -> None:
    """Which patches fit the upstream in these folders; nothing of it is imported.

    Only patches of the packages that the folders hold are judged. Exit code 1 if a patch does not fit.
    """
    try:
        roots, base_roots = [tree_root(each) for each in against], [tree_root(each) for each in base]
        seams = all_seams() if plugins is None else needed_seams(Plugins.named(plugins.split(",")))
    except (LookupError, PluginError) as error:
        raise click.ClickException(str(error)) from error
    with reading_trees(roots):
        packages = packages_of(seams)
        present = present_packages(packages, roots)
        _require_one_of_each(present, roots)
        _require_in_common(present, base_roots)
        identities = {name: found for name in present if name in UPSTREAM and (found := identify(name))}
        releases = {name: found.release for name, found in identities.items() if found.release}
        verdicts = judge_all(seams, roots, Past(releases, tuple(base_roots)))
    facts = {
        "against": [str(root) for root in roots],
        "base": [str(root) for root in base_roots],
        "upstream": {name: facts_of(identity) for name, identity in identities.items()},
        "not_judged": [package for package in packages if package not in present],
        "patches": [_facts(verdict) for verdict in verdicts],
    }
    click.echo(json.dumps(facts, indent=1) if as_json else "\n".join(_report(facts, identities, verdicts)))
    failing = {MISFIT, DRIFTED} if strict else {MISFIT}
    sys.exit(any(verdict.verdict in failing for verdict in verdicts))


def _facts(verdict: Verdict) -> dict[str, Any]:
    return {
        "id": verdict.patch.id,
        "target": verdict.patch.target,
        "seam": verdict.seam.name,
        "verdict": verdict.verdict,
        "why": list(verdict.why),
        "diff": verdict.diff,
    }


def _report(facts: dict[str, Any], identities: dict[str, Identity], verdicts: Sequence[Verdict]) -> Iterable[str]:
    for package, identity in identities.items():
        yield f"{NAMES[package]:<12} {identity}"
    if facts["not_judged"]:
        yield f"{'not there':<12} {', '.join(facts['not_judged'])}: their patches were not judged"
    counts = Counter(verdict.verdict for verdict in verdicts)
    for kind in (kind for kind in ORDER if counts[kind]):
        yield ""
        yield f"{kind} ({counts[kind]})" + (f": {MEANINGS[kind]}" if MEANINGS[kind] else "")
        for verdict in verdicts:
            if verdict.verdict == kind:
                yield from _entry(verdict)
    yield ""
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in ORDER if counts[kind])
    yield f"{len(verdicts)} patches: {summary}" if verdicts else "no patch acts here"


def _entry(verdict: Verdict) -> Iterable[str]:
    yield f"  {verdict.patch.id}  {verdict.patch.target}"
    for line in verdict.why:
        yield f"      {line}"
    for line in verdict.diff.splitlines():
        yield f"      | {line}".rstrip()


def _require_one_of_each(packages: Sequence[str], roots: Sequence[Path]) -> None:
    for package in packages:
        if len(found := [str(root) for root in roots if holds(root, package)]) > 1:
            raise click.ClickException(
                str(PluginError(f"{package} is in several of the folders", {"found": "\n".join(found)}, "give one"))
            )


def _require_in_common(packages: Sequence[str], base_roots: Sequence[Path]) -> None:
    for root in base_roots:
        if not any(holds(root, package) for package in packages):
            facts = {"expected": f"one of {', '.join(packages)}: what --against holds"}
            raise click.ClickException(str(PluginError(f"--base {root} holds nothing to compare with", facts)))
