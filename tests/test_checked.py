"""What was checked once is not checked again as long as every file is the same, and is as soon as one is not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from miles_plugins.compat.checked import checked, folder
from miles_plugins.compat.source import find_definition
from miles_plugins.errors import PatchError

OF_NOW = ("digest", "3.11", ("patch", "upstream.parts:work"))


@pytest.fixture
def upstream(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = site / "upstream"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("def work(): ...\n")
    return package


@pytest.fixture
def look(upstream: Path) -> Callable[..., tuple[list[str], bool]]:
    """look() -> the notes, and whether upstream was read for them."""

    def look(what: object = OF_NOW) -> tuple[list[str], bool]:
        read = []

        def check() -> list[str]:
            read.append(True)
            found = [find_definition(target) for target in ("upstream.parts:work", "upstream.more:work")]
            if found[0] is None:
                raise PatchError("its target does not exist")
            return [each.where for each in found if each]

        return checked([what], check), bool(read)

    return look


def test_it_is_read_once_and_the_notes_are_the_same(look):
    first, read = look()
    assert (len(first), read) == (1, True)
    assert look() == (first, False)


def test_of_other_code_of_ours_it_is_read_again(look):
    look()
    assert look(("another digest", "3.11"))[1] is True
    assert look()[1] is False, "one does not push out the other"


@pytest.mark.parametrize("change", ["another size", "another time", "a module more", "a package in front", "gone"])
def test_it_is_read_again_when_upstream_changed(look, upstream, tmp_path, monkeypatch, change):
    before, _ = look()
    if change == "another size":
        (upstream / "parts.py").write_text("\n\ndef work(): ...\n")
    elif change == "another time":
        os.utime(upstream / "parts.py", ns=(1, 1))
    elif change == "a module more":
        (upstream / "more.py").write_text("def work(): ...\n")
    elif change == "a package in front":
        other = tmp_path / "other" / "upstream"
        other.mkdir(parents=True)
        for file in upstream.glob("*.py"):
            (other / file.name).write_text(file.read_text())
        monkeypatch.syspath_prepend(str(other.parent))
    else:
        (upstream / "parts.py").unlink()
        with pytest.raises(PatchError):
            look()
        return
    notes, read = look()
    assert read is True
    assert (notes == before) == (change == "another time")
    assert look() == (notes, False)


def test_what_did_not_fit_is_never_remembered(look, upstream):
    (upstream / "parts.py").write_text("def other(): ...\n")
    for _ in range(2):
        with pytest.raises(PatchError):
            look()
    assert not folder().exists() or list(folder().iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"modules": {}}', '{"modules": [], "notes": []}'])
def test_a_damaged_memory_is_as_good_as_none(look, text):
    first, _ = look()
    (file,) = folder().iterdir()
    file.write_text(text)
    assert look() == (first, True)
    assert json.loads(file.read_text())["notes"] == first


def test_without_a_place_to_remember_it_is_read_each_time(look, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert [look()[1] for _ in range(2)] == [True, True]
