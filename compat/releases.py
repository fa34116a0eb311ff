"""Which release of upstream this is: told by what its files define, not by the version that it states.

The tag v0.2.4 of slime calls itself 0.2.3, and two Megatron-LM commits both call themselves 0.16.0rc0. So for each
release `fingerprints/` keeps what every patch target is in it (written by `miles-plugins fingerprint`, never edited).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_plugins.compat.source import FUNCTION_KINDS, Definition, find_definitions, has_package

FOLDER = Path(__file__).parent / "fingerprints"


@dataclass(frozen=True)
class Trait:
    """One definition of a target, as far as it is recorded.

    Attributes:
        kind: See `Definition`.
        signature: Its parameters, if it is called.
        sort: "async" if it is written with `async def`.
        body: Its `source_fingerprint`; None where there is no source.
        home: Where it is defined, if the target's module only imports it or its class inherits it.
    """

    kind: str
    signature: str | None = None
    sort: str | None = None
    body: str | None = None
    home: str | None = None

    @classmethod
    def of(cls, target: str, found: Definition) -> Trait:
        signature = str(found.signature) if found.signature else None
        home = found.target if found.target != target else None
        return cls(found.kind, signature, _sort_of(found), found.fingerprint, home)

    def to_dict(self) -> dict[str, str]:
        return {name: value for name, value in vars(self).items() if value is not None}


def _sort_of(found: Definition) -> str | None:
    if found.kind not in FUNCTION_KINDS or found.path is None or found.line is None:
        return None
    line = found.path.read_text(encoding="utf-8", errors="replace").splitlines()[found.line - 1]
    return "async" if line.lstrip().startswith("async ") else None


Traits = tuple[Trait, ...]
"""More than one where a condition in upstream decides; none where the target does not exist."""


def traits_of(target: str) -> Traits:
    """What a target is in the files that are read now."""
    return tuple(Trait.of(target, found) for found in find_definitions(target))


@dataclass(frozen=True)
class Release:
    """What is recorded of one release.

    Attributes:
        name: "slime v0.3.1"; the distribution and its version, tag or commit.
        package: The top-level package that it is.
        targets: Every target that patches have in that package, in any release -> what it is in this one.
        patches: The patches of the seams for this release -> "fits", "superseded", …, as `miles-plugins verify` says.
    """

    name: str
    package: str
    targets: Mapping[str, Traits]
    patches: Mapping[str, str]

    @property
    def file_name(self) -> str:
        return f"{self.name.replace(' ', '-').lower()}.json"

    def dumps(self) -> str:
        """The text of its file: sorted, a target a line."""
        targets = {target: [trait.to_dict() for trait in traits] for target, traits in self.targets.items()}
        parts = [
            f'{{"release": {json.dumps(self.name)},',
            f' "package": {json.dumps(self.package)},',
            f' "targets": {_one_a_line(targets)},',
            f' "patches": {_one_a_line(self.patches)}}}',
        ]
        return "\n".join(parts) + "\n"

    @classmethod
    def loads(cls, text: str) -> Release:
        stored = json.loads(text)
        targets = {target: tuple(Trait(**trait) for trait in traits) for target, traits in stored["targets"].items()}
        return cls(stored["release"], stored["package"], targets, stored["patches"])


def _one_a_line(items: Mapping[str, Any]) -> str:
    lines = [f"  {json.dumps(name)}: {json.dumps(items[name])}" for name in sorted(items)]
    return "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"


@functools.lru_cache(maxsize=4)
def recorded_releases(folder: Path = FOLDER) -> tuple[Release, ...]:
    """All that are recorded, by name."""
    releases = [Release.loads(file.read_text()) for file in folder.glob("*.json")]
    return tuple(sorted(releases, key=lambda release: _by_version(release.name)))


def _by_version(name: str) -> list[Any]:
    """A sort key: 0.5.9 comes before 0.5.12, tags before commits."""
    product, _, version = name.partition(" ")
    is_version = version.removeprefix("v")[:1].isdigit() and "." in version
    numbers = [int(part) if part.isdigit() else 0 for part in version.removeprefix("v").split(".")]
    return [product.lower(), not is_version, numbers if is_version else [], version]


@dataclass(frozen=True)
class Identity:
    """Which recorded release a package is.

    Attributes:
        release: The one that it differs least from; None if no target is as in any release.
        names: Its name, and those of the releases that are the same in every target.
        differing: The targets that differ; `differences` tells how.
        compared: How many targets were compared.
    """

    package: str
    release: Release | None
    names: tuple[str, ...]
    differing: tuple[str, ...]
    compared: int

    @property
    def certainty(self) -> str:
        """exact, nearest or unknown."""
        if self.release is None:
            return "unknown"
        return "nearest" if self.differing else "exact"

    def __str__(self) -> str:
        if self.release is None:
            return f"unknown: none of its targets is as in a recorded release of {self.package}"
        names = " or ".join(self.names)
        if not self.differing:
            return names
        return f"nearest to {names}: {len(self.differing)} of {self.compared} targets differ"


def identify(package: str, releases: Iterable[Release] | None = None) -> Identity | None:
    """The recorded release that a package (as it is read now) differs least from; None if the package is not there."""
    if not has_package(package):
        return None
    candidates = [each for each in releases or recorded_releases() if each.package == package]
    found = {target: traits_of(target) for target in sorted({name for each in candidates for name in each.targets})}
    differing = {each.name: _differing(each, found) for each in candidates}
    # That both lack a target says nothing: so do two unrelated packages of the same name.
    known = [each for each in candidates if any(found[name] and found[name] == each.targets[name] for name in found)]
    if not known:
        return Identity(package, None, (), (), len(found))
    fewest = min(len(differing[each.name]) for each in known)
    nearest = [each for each in known if len(differing[each.name]) == fewest]
    newest = nearest[-1]
    names = tuple(each.name for each in nearest if each.targets == newest.targets)
    return Identity(package, newest, names, differing[newest.name], len(found))


def _differing(release: Release, found: Mapping[str, Traits]) -> tuple[str, ...]:
    return tuple(target for target in found if release.targets.get(target, ()) != found[target])


def differences(recorded: Traits, found: Traits) -> list[str]:
    """What of a target has changed, one line each; of a body it is only known that it has."""
    if recorded == found:
        return []
    if not recorded or not found:
        return ["it is new" if found else "it is gone"]
    if len(recorded) != len(found):
        return [f"definitions  {len(recorded)} -> {len(found)} (a condition decides which)"]
    lines = []
    for old, new in zip(recorded, found, strict=True):
        for what, nothing in (("kind", ""), ("signature", "none"), ("sort", "plain"), ("home", "its own module")):
            before, after = getattr(old, what), getattr(new, what)
            if before != after:
                lines.append(f"{what}  {before or nothing} -> {after or nothing}")
        if old.body != new.body:
            lines.append(f"body  {old.body} -> {new.body}")
    return lines
