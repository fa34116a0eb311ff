"""What tests share: the real upstream, exported at the tag and pin that they need, and a folder of plugins."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

SLIME = ("SLIME_HOME", "~/slime", "v0.3.1")
MEGATRON = ("MEGATRON_HOME", "~/Megatron-LM", "1dcf0dafa884ad52ffb243625717a3471643e087")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two workers (`make test`), one begins with the longest file: else it is left alone with it at the end."""
    items.sort(key=lambda item: not item.path.name.startswith("test_upstream"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the mutation tests have counted (test_mutations.py)."""
    passed = terminalreporter.stats.get("passed", ())
    for line in [value for each in passed for name, value in each.user_properties if name == "mutations"]:
        terminalreporter.write_line(line)


def export(checkout: tuple[str, str, str], folder: Path) -> Path:
    """The files of one commit, whatever is checked out; skips with one line when there is no clone that has it."""
    variable, default, commit = checkout
    clone = Path(os.environ.get(variable, default)).expanduser()
    command = ["git", "-C", str(clone), "archive", "--format=tar", commit]
    archive = subprocess.run(command, capture_output=True)
    if archive.returncode != 0:
        pytest.skip(f"no git clone with {commit} at {clone}: clone it there, or set {variable} (see CONTRIBUTING.md)")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def slime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """slime v0.3.1."""
    return export(SLIME, tmp_path_factory.mktemp("slime"))


@pytest.fixture(scope="session")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Megatron-LM at slime v0.3.1's pin."""
    return export(MEGATRON, tmp_path_factory.mktemp("megatron"))


@pytest.fixture(scope="session")
def upstream_path(slime: Path, megatron: Path) -> str:
    """PYTHONPATH with both."""
    missing = [name for name in ("sglang", "ray", "torch", "transformers") if find_spec(name) is None]
    if missing:
        pytest.skip(f"the upstream tier needs {', '.join(missing)} (see CONTRIBUTING.md)")
    return os.pathsep.join([str(slime), str(megatron)])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path; what is imported from it is forgotten after the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
