"""The generated documents are fresh, and everything they should name is in them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from miles_plugins.entrypoints.docs import DOCUMENTS, hooks
from miles_plugins.manager import installed_plugins

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_generated_document_is_fresh(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == DOCUMENTS[name](), "run `make docs`"


def test_every_hook_has_a_heading_with_its_exact_arguments() -> None:
    text = (ROOT / "docs" / "hooks.md").read_text()
    headings = re.findall(r"^## `(\w+)\(([\w, ]*)\)`", text, re.M)
    assert headings == [(name, ", ".join(inspect.signature(function).parameters)) for name, function in hooks()]


@pytest.mark.parametrize("hook", [name for name, _ in hooks()])
def test_every_hook_is_implemented_or_called_by_a_test(hook: str) -> None:
    """By a plugin that a test makes, in code or in the text of a module, or by its own name on one of ours."""
    used = rf"def {hook}\(|\b{hook}=|\bhook\.{hook}\(|\b(r3|cpu|plugin)\.{hook}\(|\.ask\(\w+, \"{hook}\""
    others = [file for file in (ROOT / "tests").rglob("*.py") if file != Path(__file__).resolve()]
    assert [file.name for file in others if re.search(used, file.read_text())]


def test_every_own_plugin_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    own = [plugin for plugin in installed_plugins().values() if plugin.distribution == "miles-plugins"]
    assert own
    for plugin in own:
        assert f"`{plugin.short_name}`" in readme


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(((?!http)[^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
