"""What is known of patches before anything runs: what they change, in which process and order, and whether they fit.

Reads our declarations and upstream's files; imports nothing of upstream.
"""

from __future__ import annotations

import gc
import graphlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from miles_plugins.compat.source import FUNCTION_KINDS, find_definition, find_module, has_package
from miles_plugins.compat.upstream import find_train_script, package_folder, slime_problem
from miles_plugins.errors import PatchError
from miles_plugins.hookspecs import ROLES
from miles_plugins.manager import Plugin, Plugins
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Need, Patch, _ordered, check_statically

Facts = dict[str, Any]  # what JSON can hold

FITS, MISFIT, SUPERSEDED, OPEN, ABSENT = "fits", "does not fit", "superseded", "known on import", "not installed"


@contextmanager
def reading_upstream() -> Iterator[None]:
    """Upstream is looked for where `slime-train` would find it: beside the train script first."""
    script = find_train_script(None)
    path, collects = list(sys.path), gc.isenabled()
    sys.path[:0] = [str(script.parent)] if script else []
    gc.disable()  # it would look through the syntax trees of large files again and again: a third of the time
    try:
        yield
    finally:
        sys.path[:] = path
        if collects:
            gc.enable()


class _Alone(Plugin):
    """A plugin without what it requires: that may be a third party's, and is not imported to look at this one."""

    @property
    def requires(self) -> tuple[str, ...]:
        return ()


def alone(plugin: Plugin) -> Plugins:
    """One plugin, and whether it fits the hooks.

    Raises:
        PluginError: it does not.
    """
    return Plugins([_Alone(plugin.installed, plugin.module)])


def patches_here(seam: Seam) -> tuple[Patch, ...]:
    """The patches of a seam for the upstream that is installed; to be asked inside of `reading_upstream`."""
    return seam.here()


def explain_patch(patch: Patch, seam: Seam) -> Facts:
    """What is known of one patch.

    Keys:
        id, target, kind, reason, retire_when, upstream: As declared.
        seam, hooks: The seam that it belongs to, and the seam's hooks.
        roles: The processes in which it must be verified, in the order of hookspecs.py; none: wherever it is imported.
        needs: Further conditions on upstream.
        superseded_when: Where upstream is left as it is; None: nowhere.
        here: "fits", "does not fit", "superseded", "not installed", or "known on import" if the files do not tell.
        detail: Why, in one line; how upstream has drifted, if it fits; what is not installed.
        refused: Whether `slime-train` ends before it starts because of it.
    """
    here, detail, refused = fit(patch)
    return {
        "id": patch.id,
        "target": patch.target,
        "kind": patch.kind,
        "reason": patch.reason,
        "retire_when": patch.retire_when,
        "upstream": patch.upstream,
        "seam": seam.name,
        "hooks": list(seam.hooks),
        "roles": [role for role in ROLES if role in patch.roles],
        "needs": [str(need) for need in patch.needs],
        "superseded_when": _superseded_when(patch),
        "here": here,
        "detail": detail,
        "refused": refused,
    }


def _superseded_when(patch: Patch) -> str | None:
    condition = patch.superseded_when
    if condition is None:
        return None
    return f"upstream has {condition}" if isinstance(condition, Need) else "upstream does it itself"


class Fit(NamedTuple):
    """See the last three keys of `explain_patch`."""

    here: str
    detail: str
    refused: bool


def fit(patch: Patch) -> Fit:
    """Whether a patch fits the upstream that is installed, and why; upstream's files are read, and not imported."""
    try:
        found = _judged_by(check_statically(patch))
    except PatchError as error:
        problem = error.message.removeprefix(f"patch {patch.id} ").removeprefix("does not fit: ")
        told = [f"{name} {error.facts[name]}" for name in ("expected", "found", "nearest") if name in error.facts]
        found = Fit(MISFIT, "; ".join([problem, *told]), refused=True)
    for target in (patch.target, *(need.target for need in patch.needs)):
        if absent := _absent(target):
            return Fit(ABSENT, absent, found.refused)
    return found


def _judged_by(notes: Sequence[str]) -> Fit:
    here = OPEN
    if any(note.startswith("superseded") for note in notes):
        here = SUPERSEDED
    elif all(note.startswith("drifted") for note in notes):
        here = FITS
    return Fit(here, "; ".join(notes), refused=False)


def _absent(target: str) -> str:
    """What of upstream is not installed, where that is why a target cannot be there; else ""."""
    parts = target.partition(":")[0].split(".")
    if parts[0] == "slime" and has_package("slime") and (problem := slime_problem()):
        return problem.found  # an impostor
    for end in range(1, len(parts) + 1):
        name, parent = ".".join(parts[:end]), ".".join(parts[: end - 1])
        if not has_package(name):
            # Of a namespace package each distribution has a part: PyPI's megatron-core has no megatron.training.
            return "" if parent and find_module(parent) else name
    return ""


def folders(patches: Iterable[Facts]) -> dict[str, str | None]:
    """Each top-level package that patches touch -> its folder here, None if it is not installed."""
    found: dict[str, str | None] = {}
    for patch in patches:
        package = patch["target"].partition(":")[0].partition(".")[0]
        if patch["here"] != ABSENT:
            found[package] = str(package_folder(package))
        found.setdefault(package, None)
    return found


# -- several patches of one target ------------------------------------------------------------------------------------


def stacks(patches: Iterable[Patch]) -> list[list[Patch]]:
    """The patches of each target as calls pass through them, outermost first; a replacement is inside of all wrappers.

    Two dotted paths to one function are one target.

    Raises:
        PatchError: two patches replace one target, or their `before` and `after` contradict each other.
    """
    sites: dict[str, list[Patch]] = defaultdict(list)
    for patch in patches:
        sites[home(patch.target)].append(patch)
    return [_in_layers(site) for site in sites.values()]


def _in_layers(patches: list[Patch]) -> list[Patch]:
    try:
        ordered = _ordered(patches)
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise PatchError(
            f"patches of {patches[0].target} have no order", {"circle": circle}, "change a before or after"
        ) from error
    outer = [patch for patch in ordered if patch.kind == "wrap"]
    inner = [patch for patch in ordered if patch.kind != "wrap"]
    if len(inner) > 1:
        both = " and ".join(patch.id for patch in inner)
        raise PatchError(f"patches {both} replace the same object", {"target": patches[0].target}, "enable one of them")
    return outer + inner


def home(target: str) -> str:
    """Where a function, class or method is defined that `module:qualname` may only re-export."""
    module, _, qualname = target.partition(":")
    owner, _, name = qualname.rpartition(".")
    if owner:  # a method that a class inherits is that class's own target
        found = find_definition(f"{module}:{owner}")
        return f"{found.target}.{name}" if found and found.kind == "class" else target
    found = find_definition(target)
    return found.target if found and found.kind in {*FUNCTION_KINDS, "class"} else target
