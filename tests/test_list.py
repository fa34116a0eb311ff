"""`miles-plugins list` says whether each plugin can be used here, and imports no third party's code for it."""

from __future__ import annotations

import inspect
import json
import re
import sys
from importlib.metadata import EntryPoint

import pytest
from click.testing import CliRunner

from miles_plugins.entrypoints import list_plugins as command
from miles_plugins.entrypoints.cli import main
from miles_plugins.entrypoints.list_plugins import explain_installed
from miles_plugins.errors import PluginConflictError
from miles_plugins.manager import GROUP, OWN_DISTRIBUTION, Installed, installed_plugins
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch

PLUGIN = '''
"""Looks on."""
from miles_plugins import hookimpl

SIDES = ("trainer", "driver")


@hookimpl
def configure(args): ...
'''


@pytest.fixture
def ours(site, monkeypatch):
    """Plugins of our own distribution, each a module of the given source; slime's patches fit, or are these."""

    def install(*patches: Patch, **sources: str) -> None:
        found = {}
        for name, source in sources.items():
            (site / f"{name}.py").write_text(source)
            found[name] = Installed(name, OWN_DISTRIBUTION, "1.0", EntryPoint(name, name, GROUP))
        monkeypatch.setattr(command, "installed_plugins", lambda: found)
        monkeypatch.setattr(command, "needed_seams", lambda plugins: [Seam("grove", ("configure",), patches)])

    (site / "grove.py").write_text("raise ImportError('must not be imported')\ndef plant(): ...\n")
    return install


def patch(target: str) -> Patch:
    return Patch(id=target.replace(":", "."), target=target, reason="", wrap=lambda original: original())


def shown(*arguments: str, columns: int = 120) -> str:
    done = CliRunner().invoke(main, ["list", *arguments], env={"COLUMNS": str(columns)})
    assert done.exit_code == 0, done.output
    return done.output


def state_of(name: str) -> tuple[str, str]:
    (row,) = [row for row in explain_installed() if row["name"] == name]
    return row["state"], row["detail"]


def test_all_of_ours_are_there():
    own = {name for name, each in installed_plugins().items() if each.distribution == OWN_DISTRIBUTION}
    rows = {row["name"]: row for row in json.loads(shown("--json")) if row["from"] == OWN_DISTRIBUTION}
    assert set(rows) == own
    assert rows["r3_replay"]["short"] == "r3"
    assert rows["r3_replay"]["sides"] == ["trainer", "rollout_manager", "sglang_scheduler"]
    assert all(row["summary"] and row["version"] for row in rows.values())


def test_what_is_ready(ours):
    ours(patch("grove:plant"), looks_on=PLUGIN)
    assert state_of("looks_on") == ("ready", "")
    lines = shown().split("\n")
    assert re.fullmatch(r"plugin +version +from +state +sides", lines[0])
    assert re.fullmatch(r"looks, looks_on +1.0 +miles-plugins +ready +trainer, driver", lines[1])
    assert lines[2] == "    Looks on."
    assert "grove" not in sys.modules


@pytest.mark.parametrize(
    ("source", "state"),
    [
        ("raise RuntimeError('no')\n", "does not import: RuntimeError"),
        ("import nothing_of_that_name\n", "does not import: ModuleNotFoundError"),
        ("def (\n", "does not import: SyntaxError"),
        ('SIDES = "trainer"\n', "is not well made"),
        ("from miles_plugins import hookimpl\n@hookimpl\ndef pass_beginz(): ...\n", "is not well made"),
    ],
)
def test_a_plugin_of_ours_that_is_broken_is_a_line_and_no_traceback(ours, source, state):
    ours(patch("grove:plant"), broken=source, looks_on=PLUGIN)
    found, detail = state_of("broken")
    assert found == state
    assert "plugin broken" in detail
    assert state_of("looks_on")[0] == "ready"
    assert f"  {state}" in shown()


def test_patches_that_do_not_fit_are_counted_and_named(ours):
    ours(patch("grove:plants"), patch("grove:plant"), looks_on=PLUGIN)
    state, detail = state_of("looks_on")
    assert state == "1 patch does not fit"
    assert detail.startswith("grove.plants: its target does not exist")
    ours(patch("grove:plants"), patch("grove:trees"), looks_on=PLUGIN)
    assert state_of("looks_on")[0] == "2 patches do not fit"


def test_what_of_upstream_is_not_installed(ours):
    ours(patch("grove:plant"), patch("meadow.hay:mow"), patch("meadow:lie"), patch("pond:swim"), looks_on=PLUGIN)
    assert state_of("looks_on") == ("not installed: meadow, pond", "meadow; pond")


def test_a_third_partys_plugin_is_not_imported(site):
    (site / "lengths.py").write_text("raise RuntimeError('imported')\n")
    info = site / "lengths-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lengths\nVersion: 2.1\nSummary: Counts [lengths].\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\ncount_lengths = lengths\nlost_plugin = nowhere.there\n")
    assert state_of("count_lengths")[0] == "not looked at"
    assert state_of("lost_plugin")[0] == "no module nowhere.there"
    assert "lengths" not in sys.modules
    text = shown()
    assert re.search(r"^count, count_lengths +2.1 +lengths +not looked at\n    Counts \[lengths\].$", text, re.M)


def test_two_distributions_of_one_name_are_an_error_without_a_traceback(monkeypatch):
    def conflict():
        raise PluginConflictError("two distributions provide a plugin named x")

    monkeypatch.setattr(command, "installed_plugins", conflict)
    done = CliRunner().invoke(main, ["list"])
    assert (done.exit_code, done.output) == (1, "Error: two distributions provide a plugin named x\n")


@pytest.mark.parametrize("columns", [60, 120])
def test_it_fits_on_the_screen(columns):
    assert max(map(len, shown(columns=columns).split("\n"))) <= columns


def test_every_key_is_documented():
    documented = re.findall(r"^    ([\w, ]+):", inspect.getdoc(explain_installed), re.M)
    keys = [name for names in documented for name in names.split(", ") if name != "PluginConflictError"]
    assert all(list(row) == keys for row in explain_installed())
