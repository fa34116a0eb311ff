"""`miles-plugins verify` says of a tree of upstream what each patch would meet there, and imports none of it.

Trees: each recorded release rebuilt from its record (tests/skeleton.py), so that no checkout is needed; and slime
v0.3.1 itself, where there is a clone.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result

from miles_plugins.compat import releases as module
from miles_plugins.compat.releases import Release, recorded_releases
from miles_plugins.entrypoints import verdicts
from miles_plugins.entrypoints.cli import main
from miles_plugins.entrypoints.patch_facts import FITS, MISFIT, SUPERSEDED
from miles_plugins.entrypoints.verdicts import DRIFTED, LEFT_OUT, NOT_HERE, record
from tests.fingerprints import unpacked
from tests.skeleton import build

RELEASES = {release.name: release for release in recorded_releases()}
ACTOR = "slime/backends/megatron_utils/actor.py"
# Some targets of slime v0.3.1; ENGINE is patched without a declared signature.
REPLAY = ("slime.trainer.routed-experts", ACTOR, "MegatronTrainRayActor.fill_routing_replay")
INIT = ("slime.trainer.report", ACTOR, "MegatronTrainRayActor.init")
LAUNCH = ("slime.engine.reach-children", "slime/backends/sglang_utils/sglang_engine.py", "launch_server_process")
ENGINE = ("slime.engine.report", LAUNCH[1], "SGLangEngine.init")
BATCH = ("slime.microbatch.begins", "slime/backends/megatron_utils/data.py", "get_batch")
SCHEDULE = ("slime.shared-data.schedule", "slime/utils/dp_schedule.py", "build_dp_schedule")


def verify(*options: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, options)])


def verdicts_of(result: Result) -> dict[str, str]:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return {patch["id"]: patch["verdict"] for patch in json.loads(result.stdout)["patches"]}


# -- every release ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES.values(), ids=lambda release: release.name)
def test_each_release_gets_its_recorded_verdicts(release: Release, tmp_path: Path) -> None:
    result = verify("--against", build(release, tmp_path / "tree"), "--json")
    assert result.exit_code == (MISFIT in release.patches.values())
    # A skeleton has no bodies, so what fits may show as drifted.
    expected = {id: FITS if verdict == DRIFTED else verdict for id, verdict in release.patches.items()}
    found = {id: FITS if verdict == DRIFTED else verdict for id, verdict in verdicts_of(result).items()}
    assert found == {id: verdict for id, verdict in expected.items() if verdict != NOT_HERE}


def test_what_upstream_does_itself_and_what_a_distribution_leaves_out(tmp_path: Path) -> None:
    result = verify("--against", build(RELEASES["megatron-core 0.16.1"], tmp_path / "tree"))
    assert f"{SUPERSEDED} (5): upstream does it by itself, so nothing is changed\n  megatron.router." in result.output
    assert f"{LEFT_OUT} (1)" in result.output
    assert "there is no megatron.training" in result.output
    assert "not there    ray, slime, sglang, torch: their patches were not judged" in result.output


def test_a_checkout_that_has_lost_a_package_is_no_distribution_without_it(tmp_path: Path) -> None:
    tree = build(RELEASES["Megatron-LM 1dcf0dafa"], tmp_path / "tree")
    shutil.rmtree(tree / "megatron" / "training")
    result = verify("--against", tree, "--json")
    assert result.exit_code == 1
    assert verdicts_of(result)["megatron.model.built"] == MISFIT


def test_the_repository_of_sglang_has_its_package_under_python(tmp_path: Path) -> None:
    build(RELEASES["sglang 0.5.23"], tmp_path / "python")
    result = verify("--against", tmp_path, "--json")
    assert result.exit_code == 0
    assert list(json.loads(result.stdout)["upstream"]) == ["sglang"]


def test_several_trees_are_one_stack(tmp_path: Path) -> None:
    names = ("slime v0.3.1", "Megatron-LM 1dcf0dafa", "sglang 0.5.15.post1")
    trees = [build(RELEASES[name], tmp_path / name.split()[0]) for name in names]
    result = verify(*(option for tree in trees for option in ("--against", tree)), "--json")
    facts = json.loads(result.stdout)
    assert sorted(facts["upstream"]) == ["megatron", "sglang", "slime"]
    assert facts["not_judged"] == ["ray", "torch"]
    assert facts["against"] == [str(tree) for tree in trees]
    assert len(facts["patches"]) == sum(
        verdict != NOT_HERE for name in names for verdict in RELEASES[name].patches.values()
    )


def test_only_what_the_plugins_need(tmp_path: Path) -> None:
    tree = build(RELEASES["slime v0.3.1"], tmp_path / "tree")
    found = verdicts_of(verify("--against", tree, "--plugins", "metrics", "--json"))
    assert "slime.metrics.log" in found
    assert "slime.trainer.report" in found  # the layer's own, for every plugin
    assert "slime.trainer.routed-experts" not in found
    result = verify("--against", tree, "--plugins", "no_such_plugin")
    assert result.exit_code == 1
    assert "no_such_plugin" in result.output


def test_a_folder_without_upstream_is_refused(tmp_path: Path) -> None:
    result = verify("--against", tmp_path)
    assert result.exit_code == 1
    assert "no package slime, megatron or sglang in" in result.output
    assert verify("--against", tmp_path / "missing").exit_code == 2
    assert verify().exit_code == 2


def test_nothing_of_upstream_is_imported(tmp_path: Path) -> None:
    tree = build(RELEASES["slime v0.3.1"], tmp_path / "tree")
    for file in tree.rglob("*.py"):
        file.write_text(f"raise RuntimeError('imported')\n{file.read_text()}")
    script = (
        "import sys; from miles_plugins.entrypoints.cli import main\n"
        f"try: main(['verify', '--against', {str(tree)!r}, '--json'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'slime', 'megatron', 'sglang', 'torch', 'ray', 'numpy', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tree)
    assert result.returncode == 0, result.stderr


# -- what changed by hand ---------------------------------------------------------------------------------------------


class Tree(NamedTuple):
    """A tree to change, and its release unchanged."""

    changed: Path
    base: Path
    release: str


@pytest.fixture(params=["skeleton", "clone"])
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    if request.param == "clone":
        base = unpacked("slime v0.3.1")
        shutil.copytree(base, tmp_path / "changed")
        return Tree(tmp_path / "changed", base, "slime v0.3.1")
    base = build(RELEASES["slime v0.3.1"], tmp_path / "base")
    known = (record("slime v9", "slime", [base]),)
    monkeypatch.setattr(module, "recorded_releases", lambda: known)
    monkeypatch.setattr(verdicts, "recorded_releases", lambda: known)
    return Tree(build(RELEASES["slime v0.3.1"], tmp_path / "changed"), base, "slime v9")


def change(folder: Path, file: str, qualname: str, edit: Callable[[Any, Any], object]) -> None:
    """Call `edit(owner, definition)` on the syntax tree of a file, and write it."""
    parsed = owner = ast.parse((folder / file).read_text())
    *scope, name = qualname.split(".")
    for part in scope:
        owner = next(node for node in owner.body if getattr(node, "name", None) == part)  # type: ignore[assignment]
    edit(owner, next(node for node in owner.body if getattr(node, "name", None) == name))
    (folder / file).write_text(ast.unparse(parsed))


def rename(owner: Any, definition: Any) -> None:
    definition.name += "s"


def delete(owner: Any, definition: Any) -> None:
    owner.body[owner.body.index(definition)] = ast.Pass()


def require_more(owner: Any, definition: Any) -> None:
    definition.args.args.append(ast.arg("more"))
    definition.args.defaults = []


def take_more(owner: Any, definition: Any) -> None:
    definition.args.kwonlyargs.append(ast.arg("more"))
    definition.args.kw_defaults.append(ast.Constant(None))


def do_more(owner: Any, definition: Any) -> None:
    definition.body.append(ast.parse("more = 1").body[0])


def become_async(owner: Any, definition: Any) -> None:
    owner.body[owner.body.index(definition)] = ast.AsyncFunctionDef(**vars(definition))


def test_an_unchanged_tree_is_its_release(tree: Tree) -> None:
    result = verify("--against", tree.changed, "--strict")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"slime        {tree.release}\n")
    assert result.output.rstrip().endswith(f" {FITS}")


@pytest.mark.parametrize("target", [REPLAY, INIT, BATCH, SCHEDULE], ids=lambda target: target[0])
@pytest.mark.parametrize("edit", [rename, delete], ids=lambda edit: edit.__name__)
def test_a_target_that_is_gone(tree: Tree, target: tuple[str, str, str], edit: Callable[[Any, Any], None]) -> None:
    patch, file, qualname = target
    change(tree.changed, file, qualname, edit)
    result = verify("--against", tree.changed)
    assert result.exit_code == 1
    assert f"{MISFIT} (1): slime-train would refuse to start\n  {patch}  " in result.output
    report = result.output.partition(f"\n{MISFIT} (")[2]
    why = report.partition(f":{qualname}\n      ")[2]
    # The real class inherits another `init`, which is not taken for it.
    assert why.startswith(("its target does not exist\n", "its target is only inherited\n"))
    assert (f"{qualname}s" in why.partition("nearest")[2]) is (edit is rename)
    assert result.output.startswith(f"slime        nearest to {tree.release}: ")
    assert verdicts_of(verify("--against", tree.changed, "--json"))[patch] == MISFIT


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (REPLAY, "(self, data_iterator, num_microbatches, rollout_data"),
        (INIT, "(self, args, role, with_ref=False, with_opd_teacher=False"),
        (LAUNCH, "(server_args"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_new_required_parameter_under_a_declared_signature(
    tree: Tree, target: tuple[str, str, str], expected: str
) -> None:
    patch, file, qualname = target
    change(tree.changed, file, qualname, require_more)
    result = verify("--against", tree.changed)
    assert result.exit_code == 1
    report = result.output.partition(f"\n{MISFIT} (1)")[2]
    assert f"  {patch}  " in report
    assert "its target takes other arguments" in report
    assert f"expected  {expected})\n" in report
    assert f"found     {expected.replace('=False', '')}, more)\n" in report


def test_a_function_that_has_become_another_sort(tree: Tree) -> None:
    patch, file, qualname = BATCH
    change(tree.changed, file, qualname, become_async)
    result = verify("--against", tree.changed)
    assert result.exit_code == 1
    report = result.output.partition(f"\n{MISFIT} (1)")[2]
    assert f"  {patch}  " in report
    assert "      sort  plain -> async\n" in report


@pytest.mark.parametrize(
    ("target", "edit"),
    [(ENGINE, require_more), (REPLAY, take_more)],
    ids=["undeclared", "optional"],
)
def test_other_parameters_that_the_patch_does_not_mind(
    tree: Tree, target: tuple[str, str, str], edit: Callable[[Any, Any], None]
) -> None:
    patch, file, qualname = target
    change(tree.changed, file, qualname, edit)
    result = verify("--against", tree.changed)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"slime        nearest to {tree.release}: 1 of ")
    report = result.output.partition(f"\n{DRIFTED} (1)")[2]
    assert f"  {patch}  " in report
    (line,) = [line for line in report.splitlines() if "signature  " in line]
    before, after = line.split(" -> ")
    assert "more" not in before
    assert "more" in after
    assert verify("--against", tree.changed, "--strict").exit_code == 1


def test_a_file_that_python_cannot_read_is_no_fit(tree: Tree) -> None:
    with (tree.changed / BATCH[1]).open("a") as stream:
        stream.write("\ndef broken(:\n")
    result = verify("--against", tree.changed)
    assert result.exit_code == 1
    report = result.output.partition(f"\n{MISFIT} (")[2]
    assert f"  {BATCH[0]}  " in report
    assert "this Python cannot read the file of its target" in report
    assert f"{tree.changed / BATCH[1]}:" in report


def test_two_folders_of_one_package_are_refused(tree: Tree) -> None:
    result = verify("--against", tree.changed, "--against", tree.base)
    assert result.exit_code == 1
    assert "slime is in several of the folders" in result.output
    assert str(tree.changed) in result.output
    assert str(tree.base) in result.output


def test_a_base_of_another_package_is_refused(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "other" / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "other" / "megatron" / "core" / "__init__.py").touch()
    result = verify("--against", tree.changed, "--base", tmp_path / "other")
    assert result.exit_code == 1
    assert "holds nothing to compare with" in result.output


def test_another_body(tree: Tree) -> None:
    patch, file, qualname = BATCH
    change(tree.changed, file, qualname, do_more)
    result = verify("--against", tree.changed)
    assert result.exit_code == 0
    report = result.output.partition(f"\n{DRIFTED} (1)")[2]
    assert f"  {patch}  " in report
    assert "      body  " in report
    assert "|" not in report  # a record has no text to compare with
    assert verify("--against", tree.changed, "--strict").exit_code == 1


def test_another_body_beside_the_base(tree: Tree) -> None:
    patch, file, qualname = BATCH
    change(tree.changed, file, qualname, do_more)
    result = verify("--against", tree.changed, "--base", tree.base, "--json")
    (drifted,) = [each for each in json.loads(result.stdout)["patches"] if each["verdict"] == DRIFTED]
    assert drifted["id"] == patch
    diff = drifted["diff"].splitlines()
    assert diff[0] == "--- base slime.backends.megatron_utils.data:get_batch"
    assert "+    more = 1" in diff
    shown = verify("--against", tree.changed, "--base", tree.base)
    assert "      | +    more = 1\n" in shown.output
    assert verify("--against", tree.base, "--base", tree.base, "--strict").exit_code == 0


def test_a_base_is_compared_with_in_place_of_a_release(tree: Tree) -> None:
    for folder in (tree.changed, base := tree.changed.parent / "second"):
        if folder == base:
            shutil.copytree(tree.changed, base)
        else:
            change(folder, BATCH[1], BATCH[2], do_more)
    assert verify("--against", tree.changed, "--strict").exit_code == 1
    assert verify("--against", tree.changed, "--base", base, "--strict").exit_code == 0


def test_a_function_that_was_moved(tree: Tree) -> None:
    patch, file, qualname = BATCH
    moved: list[Any] = []

    def move(owner: Any, definition: Any) -> None:
        moved.append(definition)
        owner.body[owner.body.index(definition)] = ast.Pass()

    change(tree.changed, file, qualname, move)
    result = verify("--against", tree.changed)
    assert result.exit_code == 1
    assert f"  {patch}  " in result.output.partition(f"\n{MISFIT} (1)")[2]

    folder = (tree.changed / file).parent
    (folder / "batches.py").write_text(ast.unparse(ast.Module([ast.Import([ast.alias("torch")]), *moved], [])))
    with (tree.changed / file).open("a") as stream:
        stream.write("\nfrom .batches import get_batch\n")
    result = verify("--against", tree.changed)
    assert result.exit_code == 0, result.output
    report = result.output.partition(f"\n{DRIFTED} (1)")[2]
    assert f"  {patch}  " in report
    assert "home  its own module -> slime.backends.megatron_utils.batches:get_batch" in report


def test_a_body_that_another_release_has_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = build(RELEASES["slime v0.3.1"], tmp_path / "old")
    known = [record("slime v8", "slime", [old])]
    new = shutil.copytree(old, tmp_path / "new")
    for _, file, qualname in (REPLAY, INIT, BATCH):
        change(new, file, qualname, do_more)
    known.append(record("slime v9", "slime", [new]))
    monkeypatch.setattr(module, "recorded_releases", lambda: known)
    monkeypatch.setattr(verdicts, "recorded_releases", lambda: known)
    shutil.copy(old / BATCH[1], new / BATCH[1])
    output = verify("--against", new).output
    assert "nearest to slime v9: 1 of " in output
    assert "it is as in slime v8" in output
