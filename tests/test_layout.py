"""Who may import what, and under which name: the rules that keep upstream out until it is needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import miles_plugins

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "miles_plugins"
LINKED = ("patches", "compat", "entrypoints")
HEAVY = {"torch", "ray", "slime", "megatron", "sglang", "sglang_router", "transformers", "transformer_engine", "triton"}
SELF_CONTAINED = {"sitecustomize"}  # imported by Python itself, under that name
# Triton's decorators run when their module is imported: whoever needs a kernel imports it where it is used.
KERNELS = {"miles_plugins.int4_qat.kernels", "miles_plugins.fp8_unified.kernels"}


def sources() -> list[Path]:
    folders = [PACKAGE, *(ROOT / name for name in LINKED)]
    return sorted({file.resolve() for folder in folders for file in folder.rglob("*.py")})


def module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in LINKED:
        parts.insert(0, "miles_plugins")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sources()}


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(file: Path, everywhere: bool = False) -> Iterator[tuple[str, int]]:
    """What a file imports when it is imported itself (or ever): full name of each module or of each name in one."""

    def walk(node: ast.AST) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = node.module or ""
            if node.level:
                package = module_name(file).split(".")
                package = package[: len(package) - node.level + (file.name == "__init__.py")]
                prefix = ".".join([*package, prefix]).strip(".")
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not everywhere:
            return
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.orelse:
                yield from walk(child)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child)

    yield from walk(ast.parse(file.read_text()))


def offenders(names: Iterator[tuple[str, int]] | list[tuple[str, int]], forbidden: set[str]) -> list[str]:
    return [f"line {line}: {name}" for name, line in names if name.partition(".")[0] in forbidden]


# -- upstream stays out until it is needed ---------------------------------------------------------------------------


def test_there_is_something_to_look_at():
    assert {"miles_plugins.manager", "miles_plugins.patches.slime.training", "miles_plugins.compat.source"} <= set(
        MODULES
    )


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_upstream_when_it_is_imported(module):
    allowed = {"torch", "triton"} if module in KERNELS else set()
    assert offenders(imports(MODULES[module]), HEAVY - allowed) == []


def test_the_walk_sees_what_it_should(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "import torch.nn\n"
        "if TYPE_CHECKING:\n    import ray\nelse:\n    import sglang\n"
        "try:\n    from megatron.core import mpu\nexcept ImportError:\n    mpu = None\n"
        "class C:\n    import slime\n    def f(self):\n        import transformers\n"
        "def g():\n    import torch\n"
    )
    assert offenders(imports(file), HEAVY) == [
        "line 2: torch.nn",
        "line 6: sglang",
        "line 8: megatron.core.mpu",
        "line 12: slime",
    ]
    assert len(offenders(imports(file, everywhere=True), HEAVY)) == 6


def test_importing_everything_imports_nothing_of_upstream():
    """What the syntax tree cannot tell: an import through another package."""
    modules = [name for name in MODULES if name.rpartition(".")[2] not in SELF_CONTAINED and name not in KERNELS]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*sorted(set(sys.modules) & set({sorted(HEAVY)!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# -- dependencies point one way --------------------------------------------------------------------------------------


FEATURES = sorted(folder.parent.name for folder in PACKAGE.glob("*/plugin.py"))
PUBLIC = {f"miles_plugins.{name}" for name in miles_plugins.__all__}
# Files of checkpoints: what features with a format of their own share, and a third party may import, too.
SHARED = tuple(
    f"miles_plugins.{module}." for module in ("checkpoints", "conversion", "discrepancy", "places", "plain_engine")
)
# A read-only look at SGLang, which only its seam may name; and at the files of what is installed.
ALSO_ALLOWED = {
    "r3_replay": {f"miles_plugins.patches.sglang.routing.{name}" for name in ("capturer", "switched_off")},
    "fp8_unified": {"miles_plugins.compat.fp8_upstream", "miles_plugins.compat.slime_drafts"},
    "spec_rl": {
        "miles_plugins.patches.sglang.draft.role",
        *(
            f"miles_plugins.compat.slime_drafts.{name}"
            for name in ("exchanges_halves", "logs_each_loss", "mtp_names_agree")
        ),
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_uses_the_public_api_only(feature):
    """So that a third party can write one. The errors, which are public, may be imported from where they are."""
    allowed = PUBLIC | ALSO_ALLOWED.get(feature, set())
    public_errors = {f"miles_plugins.errors.{name}" for name in miles_plugins.__all__ if name.endswith("Error")}
    for file in sorted((PACKAGE / feature).rglob("*.py")):
        ours = [name for name, _ in imports(file, everywhere=True) if name.partition(".")[0] == "miles_plugins"]
        foreign = {name for name in ours if not name.startswith((f"miles_plugins.{feature}", *SHARED))}
        assert foreign <= allowed | public_errors, file.name


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_never_imports_upstream_by_itself(feature):
    """torch is every feature's; slime, Megatron-LM, SGLang and Ray are reached through seams."""
    upstream = HEAVY - {"torch", "transformers", "triton"}
    for file in sorted((PACKAGE / feature).rglob("*.py")):
        assert offenders(imports(file, everywhere=True), upstream) == [], file.name


def test_compat_imports_nothing_of_ours_but_itself():
    for name, file in MODULES.items():
        if name.startswith("miles_plugins.compat"):
            ours = [each for each, _ in imports(file, everywhere=True) if each.startswith("miles_plugins")]
            assert [each for each in ours if not each.startswith("miles_plugins.compat")] == [], name


@pytest.mark.parametrize("folder", ["errors", "hookspecs", "manager", "microbatch", "patching", "attestation"])
def test_the_core_does_not_know_patches_or_features(folder):
    names = [name for name, _ in imports(MODULES[f"miles_plugins.{folder}"], everywhere=True)]
    beyond = tuple(f"miles_plugins.{each}" for each in ("patches", "entrypoints", "activation", *FEATURES))
    assert [name for name in names if name.startswith(beyond)] == []


def test_nothing_is_imported_by_a_bare_name():
    for name, file in MODULES.items():
        assert offenders(imports(file, everywhere=True), set(LINKED)) == [], name


def test_nothing_but_the_layer_imports_its_own_tests():
    for name, file in MODULES.items():
        assert offenders(imports(file, everywhere=True), {"tests", "pytest", "hypothesis"}) == [] or "testing" in name


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINKED)
def test_a_root_folder_refuses_its_bare_name(name):
    script = f"import {name}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert (
        done.stderr.rstrip().splitlines()[-1].startswith(f"ImportError: import miles_plugins.{name}, not the checkout")
    )


@pytest.mark.parametrize(
    "module", ["patches.seam", "patches.slime.training", "compat.upstream", "entrypoints.slime_train"]
)
def test_a_module_in_a_root_folder_refuses_its_bare_name(module):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"import {module}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ImportError: import miles_plugins." in done.stderr


@pytest.mark.parametrize("name", LINKED)
def test_the_root_folders_are_linked_into_the_package(name):
    link = PACKAGE / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}", "relative, so that a clone anywhere works"
    assert import_module(f"miles_plugins.{name}").__name__ == f"miles_plugins.{name}"


def test_every_folder_of_code_is_a_package():
    """A folder without __init__.py is left out of the wheel by setuptools, and nothing says so."""
    folders = {file.parent for file in sources()}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_type_marker_is_there():
    assert (PACKAGE / "py.typed").is_file()


def test_the_public_names_exist_and_are_sorted():
    assert all(hasattr(miles_plugins, name) for name in miles_plugins.__all__)
    assert list(miles_plugins.__all__) == sorted(miles_plugins.__all__)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_is_published(feature):
    """In pyproject.toml: a feature that is not listed there can never be named."""
    lines = [line.split("=")[0].strip() for line in (ROOT / "pyproject.toml").read_text().splitlines() if "=" in line]
    assert feature in lines
    assert import_module(f"miles_plugins.{feature}.plugin").__doc__


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("child_process")])
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))
