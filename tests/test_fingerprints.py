"""The records of upstream's releases are what the command writes, and tell one release from another."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from miles_plugins.compat import releases as module
from miles_plugins.compat.releases import (
    FOLDER,
    Release,
    Trait,
    differences,
    identify,
    recorded_releases,
    traits_of,
)
from miles_plugins.compat.source import reading_from
from miles_plugins.entrypoints.cli import main
from miles_plugins.entrypoints.fingerprint import write_record
from miles_plugins.entrypoints.patch_facts import MISFIT
from miles_plugins.entrypoints.verdicts import every_target, package_of, record
from miles_plugins.patches.seam import all_seams
from tests.fingerprints import sources, unpacked
from tests.skeleton import build

ANEW = "run `make fingerprints`"
RELEASES = recorded_releases()
by_name = pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)


# -- the committed files ----------------------------------------------------------------------------------------------


def test_every_release_is_recorded_and_no_other() -> None:
    assert {release.name for release in RELEASES} == set(sources()), ANEW
    assert {file.name for file in FOLDER.iterdir()} == {release.file_name for release in RELEASES}


@by_name
def test_every_target_and_patch_is_recorded(release: Release) -> None:
    assert list(release.targets) == every_target(release.package), ANEW
    patches = {patch.id for seam in all_seams() for patch in seam.everywhere()}
    targets = {patch.id: patch.target for seam in all_seams() for patch in seam.everywhere()}
    assert set(release.patches) == {each for each in patches if package_of(targets[each]) == release.package}, ANEW


# No stack has this release (tests/test_stacks.py), and its gate takes no bias.
MISFITS = {"megatron-core 0.14.0": {"megatron.cpu.router-gate"}}


@by_name
def test_no_patch_is_a_misfit_that_is_not_known(release: Release) -> None:
    misfits = {patch for patch, verdict in release.patches.items() if verdict == MISFIT}
    assert misfits <= MISFITS.get(release.name, set())


@by_name
def test_a_file_is_sorted_and_has_a_target_a_line(release: Release) -> None:
    text = (FOLDER / release.file_name).read_text()
    assert text == release.dumps(), "a record is generated, never edited"
    assert len(text.splitlines()) == len(release.targets) + len(release.patches) + 6
    assert str(Path.home()) not in text
    assert "/" not in text


@by_name
def test_the_records_hold_all_that_patches_ask_of_upstream(release: Release, tmp_path: Path) -> None:
    """A tree of nothing but what is recorded gets the same verdicts: today's patches are judged without checkouts."""
    again = record(release.name, release.package, [build(release, tmp_path)])
    assert again.patches == release.patches, ANEW
    for target, traits in release.targets.items():
        assert [replace(trait, body=None) for trait in again.targets[target]] == [
            replace(trait, body=None) for trait in traits
        ]


@by_name
def test_the_command_writes_the_committed_file(release: Release, tmp_path: Path) -> None:
    option = f"--{release.package}={unpacked(release.name)}"
    result = CliRunner().invoke(main, ["fingerprint", option, "--release", release.name, f"--folder={tmp_path}"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / release.file_name).read_text() == (FOLDER / release.file_name).read_text(), ANEW


@by_name
def test_each_release_is_known_by_its_files(release: Release) -> None:
    with reading_from(unpacked(release.name)):
        identity = identify(release.package)
    assert identity is not None
    assert identity.certainty == "exact"
    assert identity.names == (release.name,)
    assert str(identity) == release.name


def test_reading_in_another_python_version_gives_the_same_signatures() -> None:
    """`inspect` writes them, so nothing of this interpreter may show."""
    for release in RELEASES:
        for traits in release.targets.values():
            assert all("<" not in str(trait.signature) and "object at" not in str(trait.signature) for trait in traits)


# -- which release it is ----------------------------------------------------------------------------------------------


@pytest.fixture
def glen(tmp_path: Path) -> Path:
    """A package of two functions."""
    (tmp_path / "glen").mkdir()
    (tmp_path / "glen" / "__init__.py").write_text("def f(a): return a\ndef g(b): return b\n")
    return tmp_path


def glen_release(name: str, folder: Path, **changed: str) -> Release:
    with reading_from(folder):
        targets = {f"glen:{each}": traits_of(f"glen:{each}") for each in ("f", "g", "h")}
    targets |= {f"glen:{each}": (Trait("function", signature),) for each, signature in changed.items()}
    return Release(f"glen {name}", "glen", targets, {})


def test_the_release_with_the_fewest_differences_is_the_nearest(glen: Path) -> None:
    far = glen_release("1.0", glen, f="(x)", g="(y)", h="(z)")
    near = glen_release("1.1", glen, g="(y)")
    same = glen_release("1.2", glen)
    with reading_from(glen):
        exact, nearest = identify("glen", [far, near, same]), identify("glen", [far, near])
        unknown, absent = identify("glen", [far]), identify("dale", [far])
    assert exact
    assert (exact.certainty, exact.names, exact.differing) == ("exact", ("glen 1.2",), ())
    assert nearest
    assert (nearest.certainty, nearest.names, nearest.differing) == ("nearest", ("glen 1.1",), ("glen:g",))
    assert str(nearest) == "nearest to glen 1.1: 1 of 3 targets differ"
    assert unknown
    assert (unknown.certainty, unknown.release) == ("unknown", None)
    assert absent is None


def test_releases_that_are_the_same_in_every_target_are_all_named(glen: Path) -> None:
    one, two, other = glen_release("1.0", glen), glen_release("1.1", glen), glen_release("1.2", glen, h="()")
    with reading_from(glen):
        identity = identify("glen", [one, two, other])
    assert identity
    assert str(identity) == "glen 1.0 or glen 1.1"


def test_a_namesake_is_no_release_of_upstream(tmp_path: Path) -> None:
    """PyPI's `slime` lacks every target, as any release lacks some: that says nothing."""
    (tmp_path / "slime").mkdir()
    (tmp_path / "slime" / "__init__.py").touch()
    with reading_from(tmp_path):
        identity = identify("slime")
    assert identity
    assert identity.certainty == "unknown"


def test_differences_are_told() -> None:
    old = Trait("function", "(a)", None, "0", None)
    assert differences((old,), (old,)) == []
    assert differences((old,), ()) == ["it is gone"]
    assert differences((), (old,)) == ["it is new"]
    assert differences((old,), (old, old)) == ["definitions  1 -> 2 (a condition decides which)"]
    changed = Trait("method", "(a, b)", "async", "1", "elsewhere:f")
    assert differences((old,), (changed,)) == [
        "kind  function -> method",
        "signature  (a) -> (a, b)",
        "sort  plain -> async",
        "home  its own module -> elsewhere:f",
        "body  0 -> 1",
    ]


def test_a_record_survives_its_file(glen: Path) -> None:
    release = Release("glen 1.0", "glen", glen_release("1.0", glen).targets, {"b": "fits", "a": "superseded"})
    assert Release.loads(release.dumps()) == release
    assert release.dumps().splitlines()[0] == '{"release": "glen 1.0",'
    assert Release.loads(Release("glen 1.0", "glen", {}, {}).dumps()).targets == {}


def test_releases_are_listed_by_version() -> None:
    names = [release.name for release in RELEASES]
    assert names.index("sglang 0.5.9") < names.index("sglang 0.5.12.post1") < names.index("sglang 0.5.23")
    assert names[-1] == "slime main-624b824a8"


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    (release,) = (each for each in RELEASES if each.name == "slime v0.3.1")
    return build(release, tmp_path / "skeleton")


def test_the_command_names_the_release_and_what_differs(
    skeleton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record("slime v9", "slime", skeleton, tmp_path / "records")
    monkeypatch.setattr(module, "recorded_releases", lambda: recorded_releases(tmp_path / "records"))
    command = ["fingerprint", "--slime", str(skeleton)]
    assert CliRunner().invoke(main, command).output == "slime        slime v9\n"
    file = skeleton / "slime" / "utils" / "http_utils.py"
    file.write_text(file.read_text().replace("def post(url,", "def post(address,"))
    output = CliRunner().invoke(main, command).output
    assert output.splitlines()[0].startswith("slime        nearest to slime v9: 1 of ")
    assert "  slime.utils.http_utils:post\n    signature  (url, payload" in output
    facts = json.loads(CliRunner().invoke(main, [*command, "--json"]).output)["slime"]
    assert (facts["certainty"], facts["releases"], facts["differing"]) == ("nearest", ["slime v9"], 1)
    assert list(facts["targets"]) == ["slime.utils.http_utils:post"]


def test_the_command_says_what_is_installed(skeleton: Path) -> None:
    command = [sys.executable, "-m", "miles_plugins.entrypoints.cli", "fingerprint", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(skeleton)}, cwd=skeleton)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["slime"]["certainty"] == "nearest"  # by kind alone: a skeleton has no bodies


def test_a_release_is_recorded_from_one_folder(skeleton: Path, tmp_path: Path) -> None:
    for options in ([], ["--slime", str(skeleton), "--megatron", str(skeleton)]):
        result = CliRunner().invoke(main, ["fingerprint", "--release", "slime v9", *options])
        assert result.exit_code == 2
        assert "--release records one folder" in result.output
    result = CliRunner().invoke(main, ["fingerprint", "--sglang", str(skeleton), "--release", "sglang 9"])
    assert result.exit_code == 1
    assert "no package sglang in" in result.output
