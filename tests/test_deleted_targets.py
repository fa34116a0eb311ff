"""Each patch, its target deleted from a copy of upstream: nothing starts, and the error names the target."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from miles_plugins.compat.source import find_definition
from miles_plugins.errors import PatchError
from miles_plugins.patches.seam import all_seams
from miles_plugins.patching import Patch, check_statically

PATCHES = [patch for seam in all_seams() for patch in seam.patches]
# Written in C: there is no definition to delete, and none to read without importing torch.
COMPILED = {"torch:Tensor.cuda", "torch:Tensor.pin_memory", "torch:Tensor.type"}


def overlay(package: Path, changed: Path, text: str, folder: Path) -> Path:
    """A copy of `package` in `folder`, of links to the original but for one changed file."""
    copy = folder / package.name
    copy.mkdir(parents=True)
    original = package
    for part in changed.relative_to(package).parts:
        for entry in original.iterdir():
            if entry.name not in (part, "__pycache__"):
                (copy / entry.name).symlink_to(entry)
        original, copy = original / part, copy / part
        if original.is_dir():
            copy.mkdir()
    copy.write_text(text)
    return folder


def without(source: str, qualname: str) -> str:
    """The source without one definition (all of that name in its class or module, also inside `if` and `try`)."""
    tree = ast.parse(source)
    *owners, name = qualname.split(".")
    body: Iterable[ast.stmt] = tree.body
    for owner in owners:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == owner).body
    wanted = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [node for top in body for node in ast.walk(top) if isinstance(node, wanted) and node.name == name]
    if owners:
        found = [node for node in found if node in body]
    assert found, f"{qualname} is not defined in this file"
    lines = source.splitlines()
    for node in found:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
        lines[first : node.end_lineno] = [f"{indent}pass"] + [""] * ((node.end_lineno or 0) - first - 1)
    return "\n".join(lines) + "\n"


READABLE = [patch for patch in PATCHES if patch.target not in COMPILED]
COMMAND = [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", "--plugins", "cpu,r3,metrics"]
# One of each package also through the command; all of them take their way through the same check.
SAMPLE = ["slime.trainer.report", "megatron.router.select-experts", "sglang.scheduler.report", "ray.init.setup-hook"]


def copy_without(patch: Patch, folder: Path) -> Path:
    """A folder with a copy of the target's package in which the target is gone."""
    definition = find_definition(patch.target)
    assert definition is not None
    assert definition.path is not None
    top = patch.target.split(":")[0].split(".")[0]
    package = next(parent for parent in definition.path.parents if parent.name == top)
    return overlay(package, definition.path, without(definition.path.read_text(), patch.qualname), folder)


@pytest.fixture
def upstream(slime: Path, megatron: Path, upstream_path: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in (megatron, slime):
        monkeypatch.syspath_prepend(str(folder))
    return slime


@pytest.mark.upstream
@pytest.mark.parametrize("patch", READABLE, ids=lambda patch: patch.id)
def test_a_deleted_target_is_missed(
    patch: Patch, upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another test may have imported the package; the check is of what a new process would find.
    monkeypatch.delitem(sys.modules, patch.module.split(".")[0], raising=False)
    if any(note.startswith("superseded") for note in check_statically(patch)):
        pytest.skip("this upstream does it by itself; an older one is in test_megatron_versions, test_sglang_routing")
    monkeypatch.syspath_prepend(str(copy_without(patch, tmp_path)))
    with pytest.raises(PatchError) as caught:
        check_statically(patch)
    assert patch.target in str(caught.value)
    assert patch.id in str(caught.value)


@pytest.mark.upstream
@pytest.mark.parametrize("patch", [patch for patch in PATCHES if patch.id in SAMPLE], ids=lambda patch: patch.id)
def test_a_deleted_target_stops_the_command(patch: Patch, upstream: Path, upstream_path: str, tmp_path: Path) -> None:
    copy = copy_without(patch, tmp_path)
    script = upstream / "train.py"
    if (copy / "slime").exists():
        script = copy / "train.py"
        script.write_text((upstream / "train.py").read_text())
    result = subprocess.run(
        [*COMMAND, "--train-script", str(script), "--num-rollout", "3"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), upstream_path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert patch.target in result.stderr, result.stderr
    assert "nothing was changed and nothing was started" in result.stderr
