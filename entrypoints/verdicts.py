"""What is to be said of each patch by the files of a tree of upstream, without importing any of it."""

from __future__ import annotations

import ast
import difflib
import gc
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from miles_plugins.compat.releases import Release, Traits, differences, recorded_releases, traits_of
from miles_plugins.compat.source import find_definition, has_package, names_near, reading_from
from miles_plugins.compat.trees import absent_part, holds
from miles_plugins.entrypoints.patch_facts import FITS, MISFIT, OPEN, SUPERSEDED
from miles_plugins.errors import PatchError
from miles_plugins.patches.seam import Seam, all_seams
from miles_plugins.patching import Need, Patch, check_statically

DRIFTED = "drifted"
LEFT_OUT = "not in this distribution"
NOT_HERE = "for other releases"


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one patch.

    Attributes:
        verdict: fits, drifted (it still fits), does not fit, superseded, known on import, or not in this distribution.
        why: Line by line; of a patch that does not fit, what was expected, what was found, and what is nearest.
        diff: The target's text in a base tree and here, if both are known.
    """

    patch: Patch
    seam: Seam
    verdict: str
    why: tuple[str, ...] = ()
    diff: str = ""


@contextmanager
def reading_trees(roots: Sequence[Path]) -> Iterator[None]:
    """Upstream is these folders. Without garbage collection, which would visit large syntax trees again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with reading_from(*roots):
            yield
    finally:
        if collects:
            gc.enable()


# -- which targets there are -------------------------------------------------------------------------------------------


def package_of(target: str) -> str:
    return target.partition(":")[0].partition(".")[0]


def packages_of(seams: Iterable[Seam]) -> list[str]:
    """The top-level packages that patches of these seams act in."""
    return list(dict.fromkeys(package_of(patch.target) for seam in seams for patch in seam.everywhere()))


def every_target(package: str) -> list[str]:
    """All that a patch or variant asks of a package, in any release."""
    targets = {target for seam in all_seams() for target in _asked(seam) if package_of(target) == package}
    return sorted(targets)


def _asked(seam: Seam) -> Iterator[str]:
    for variant in seam.variants:
        yield from (need.target for need in (*variant.has, *variant.lacks))
    for patch in seam.everywhere():
        yield patch.target
        yield from (need.target for need in patch.needs)
        if isinstance(patch.superseded_when, Need):
            yield patch.superseded_when.target


def record(name: str, package: str, roots: Sequence[Path]) -> Release:
    """What a release's file keeps of the package in these folders."""
    with reading_trees(roots):
        targets = {target: traits_of(target) for target in every_target(package)}
        patches = {patch.id: NOT_HERE for seam in all_seams() for patch in seam.everywhere()}
        patches |= {each.patch.id: each.verdict for each in judge_all(all_seams(), roots)}
    own = {patch.id for seam in all_seams() for patch in seam.everywhere() if package_of(patch.target) == package}
    return Release(name, package, targets, {patch: verdict for patch, verdict in patches.items() if patch in own})


# -- verdicts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Past:
    """What upstream is compared with: recorded releases, or a base tree.

    Attributes:
        releases: Of each package, the release that is nearest.
        roots: The folders of a base tree; its definitions count before a release's.
    """

    releases: Mapping[str, Release] = field(default_factory=dict)
    roots: tuple[Path, ...] = ()

    def traits(self, target: str) -> Traits | None:
        """What a target was; None if that is not known."""
        package = package_of(target)
        if any(holds(root, package) for root in self.roots):
            with reading_trees(self.roots):
                return traits_of(target)
        release = self.releases.get(package)
        return release.targets.get(target) if release else None


def judge_all(seams: Iterable[Seam], roots: Sequence[Path], past: Past | None = None) -> list[Verdict]:
    """The verdicts on the patches for the upstream that is read now, of the packages that it holds."""
    return [
        judge(patch, seam, roots, past or Past())
        for seam in seams
        for patch in seam.here()
        if any(holds(root, package_of(patch.target)) for root in roots)
    ]


def judge(patch: Patch, seam: Seam, roots: Sequence[Path], past: Past) -> Verdict:
    """The verdict on one patch."""
    if part := absent_part(patch.module, roots):
        return Verdict(patch, seam, LEFT_OUT, (f"there is no {part}",))
    try:
        notes = check_statically(patch)
    except PatchError as error:
        return Verdict(patch, seam, MISFIT, _told(patch, error, past), _diff(patch.target, past))
    if any(note.startswith("superseded") for note in notes):
        return Verdict(patch, seam, SUPERSEDED, tuple(note.removeprefix("superseded: ") for note in notes))
    drift = [note for note in notes if note.startswith("drifted")]
    known = traits_of(patch.target) if patch.kind != "add" else ()
    before = past.traits(patch.target)
    changes = differences(before, known) if before else []
    if not all(note.startswith(("drifted", "not installed here")) for note in notes):
        return Verdict(patch, seam, OPEN, (*notes, *changes))
    if drift or changes:
        changes += _also_known(patch.target, known) if changes else []
        notes = [note.removeprefix("drifted: ") for note in notes]
        return Verdict(patch, seam, DRIFTED, (*notes, *changes), _diff(patch.target, past))
    return Verdict(patch, seam, FITS, tuple(notes))


def _told(patch: Patch, error: PatchError, past: Past) -> tuple[str, ...]:
    problem = error.message.removeprefix(f"patch {patch.id} ").removeprefix("does not fit: ")
    told = {"nearest": ", ".join(names_near(patch.target)), **error.facts}
    facts = [f"{name:<9} {told[name]}" for name in ("expected", "found", "where", "nearest") if told.get(name)]
    found = traits_of(patch.target)
    was = past.traits(patch.target)
    changes = differences(was, found) if was and found else []
    return (problem, *facts, *changes)


def _also_known(target: str, found: Traits) -> list[str]:
    names = [
        release.name
        for release in recorded_releases()
        if release.package == package_of(target) and release.targets.get(target) == found
    ]
    return [f"it is as in {', '.join(names)}"] if names else []


# -- the text of a target ----------------------------------------------------------------------------------------------


def _diff(target: str, past: Past) -> str:
    """The unified diff from the base tree's text to the text that is read now; "" without both."""
    if not past.roots:
        return ""
    after = _text_of(target)
    with reading_trees(past.roots):
        before = _text_of(target)
    if before is None or after is None:
        return ""
    lines = difflib.unified_diff(before, after, f"base {target}", f"here {target}", lineterm="")
    return "\n".join(lines)


def _text_of(target: str) -> list[str] | None:
    """The lines of a function or class, moved to the left; None if it is neither, or not there."""
    found = find_definition(target)
    if found is None or found.path is None or found.line is None or found.path.suffix != ".py":
        return None
    source = found.path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.lineno == found.line:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return textwrap.dedent("\n".join(source.splitlines()[first - 1 : node.end_lineno])).splitlines()
    return None


def present_packages(packages: Iterable[str], roots: Sequence[Path]) -> list[str]:
    """Those of the packages that a folder holds."""
    return [package for package in packages if has_package(package) and any(holds(root, package) for root in roots)]
