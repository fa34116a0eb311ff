"""Upstream is read from the folders that are named, and from nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from miles_plugins.compat.source import find_definition, find_definitions, find_module, has_package, reading_from
from miles_plugins.compat.source import names_near as near
from miles_plugins.compat.trees import absent_part, holds, tree_root


def write(folder: Path, **modules: str) -> Path:
    """A package `dale` in a folder; `a__b` is the module dale.a.b."""
    for name, text in {"__init__": "", **modules}.items():
        path = folder / "dale" / f"{name if name == '__init__' else name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_only_the_named_folders_are_read_and_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = write(tmp_path / "installed", one="def f(installed): ...\n", only="def here(): ...\n")
    first, second = write(tmp_path / "1", one="def f(a): ...\n"), write(tmp_path / "2", one="def f(b): ...\n", two="")
    monkeypatch.syspath_prepend(str(installed))
    with reading_from(first, second):
        assert find_module("dale.one") == first / "dale" / "one.py"
        assert str(find_definition("dale.one:f").signature) == "(a)"  # type: ignore[union-attr]
        assert find_module("dale.two") is None  # a package is wholly in one folder
        assert find_definitions("dale.only:here") == []
        assert near("dale.one:g") == []
        assert near("dale.one:ff") == ["dale.one:f"]
        assert not has_package("json")
        assert not has_package("click")
        with reading_from(second):
            assert str(find_definition("dale.one:f").signature) == "(b)"  # type: ignore[union-attr]
        assert find_module("dale.one") == first / "dale" / "one.py"
    assert find_module("dale.one") == installed / "dale" / "one.py"
    assert has_package("json")
    assert "dale" not in sys.modules


def test_a_namespace_package_lies_in_several_folders(tmp_path: Path) -> None:
    for part in ("core", "training"):
        (tmp_path / part / "megatron" / part).mkdir(parents=True)
        (tmp_path / part / "megatron" / part / "__init__.py").write_text("")
    with reading_from(tmp_path / "core", tmp_path / "training"):
        assert find_module("megatron.training")
        assert find_module("megatron.core")
    with reading_from(tmp_path / "core"):
        assert find_module("megatron.training") is None


def test_of_a_module_in_no_folder_nothing_is_guessed(tmp_path: Path) -> None:
    text = "import json\nfrom json import loads\nimport json.decoder as inner\nclass A(json.JSONDecoder): ...\n"
    with reading_from(write(tmp_path, one=text)):
        assert find_definition("dale.one:json").kind == "module"  # type: ignore[union-attr]
        assert find_definition("dale.one:inner").kind == "module"  # type: ignore[union-attr]
        assert find_definition("dale.one:loads").kind == "unknown"  # type: ignore[union-attr]
        assert find_definition("dale.one:json.loads").kind == "unknown"  # type: ignore[union-attr]
        assert find_definition("dale.one:A").kind == "class"  # type: ignore[union-attr]
        assert find_definition("dale.one:missing") is None
        assert find_module("json") is None


def test_a_failure_inside_does_not_leave_the_folders_in_place(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), reading_from(tmp_path):
        raise ZeroDivisionError
    assert has_package("json")


@pytest.mark.parametrize("inside", [".", "python"])
def test_the_root_of_a_tree(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside / "sglang").mkdir(parents=True)
    with pytest.raises(LookupError, match="no package slime, megatron or sglang in"):
        tree_root(tmp_path)  # a folder of that name is no package
    (tmp_path / inside / "sglang" / "__init__.py").touch()
    assert tree_root(tmp_path) == (tmp_path / inside).resolve()
    with pytest.raises(LookupError, match="no package slime in"):
        tree_root(tmp_path, ["slime"])


def test_what_of_megatron_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    assert not holds(tmp_path, "megatron")
    (tmp_path / "megatron" / "core" / "__init__.py").touch()
    assert holds(tmp_path, "megatron")
    with reading_from(tmp_path):
        assert absent_part("megatron.training.training", [tmp_path]) == ""  # a checkout that has lost it
        (tmp_path / "megatron_core-0.16.1.dist-info").mkdir()
        assert absent_part("megatron.training.training", [tmp_path]) == "megatron.training"
        assert absent_part("megatron.core.transformer", [tmp_path]) == ""
        assert absent_part("slime.utils", [tmp_path]) == ""
