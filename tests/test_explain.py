"""`miles-plugins explain` says what the plugin, the hooks and the patches declare; of upstream it only reads files."""

from __future__ import annotations

import gc
import inspect
import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from miles_plugins import hookspecs
from miles_plugins.entrypoints import patch_table
from miles_plugins.entrypoints.cli import main
from miles_plugins.entrypoints.docs import hooks
from miles_plugins.entrypoints.explain import explain_plugin, processes_in
from miles_plugins.entrypoints.explain_target import is_end_of_target
from miles_plugins.entrypoints.patch_facts import ABSENT, FITS, MISFIT, OPEN, SUPERSEDED, explain_patch, fit
from miles_plugins.manager import GROUP, OWN_DISTRIBUTION, Plugins, installed_plugins
from miles_plugins.patches.seam import Seam, all_seams, needed_seams
from miles_plugins.patching import Patch, has_attribute, has_parameter

ROOT = Path(__file__).resolve().parents[1]
OWN = sorted(name for name, each in installed_plugins().items() if each.distribution == OWN_DISTRIBUTION)
HEAVY = {"torch", "ray", "slime", "megatron", "sglang", "transformers", "numpy"}

COUNT_LENGTHS = '''
"""Count [lengths].

They are counted
in tokens.

* one
* two
"""
from miles_plugins import hookimpl

SIDES = ("driver",)
REQUIRES = ("other_plugin",)


@hookimpl
def step_metrics(args):
    return {}


@hookimpl
def register_arguments(parser):
    parser.add_argument("--lengths-limit", type=int, default=7, help="at most [red]so many[/red], 5 %% more")
    parser.add_argument("--lengths-off", action="store_true", help="50 % of it")


@hookimpl
def default_flags(flags):
    return ["--lengths-limit", "8"]


@hookimpl
def configure(args): ...
'''
OTHER = "raise RuntimeError('imported')\n"


# -- helpers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lengths(site):
    """A third party's distribution of two plugins, one of which breaks whoever imports it."""
    write(site / "lengths.py", COUNT_LENGTHS.lstrip())
    write(site / "other.py", OTHER)
    page = "Project-URL: Home, https://example.org/lengths"
    write(site / "lengths-2.1.dist-info" / "METADATA", f"Metadata-Version: 2.1\nName: lengths\nVersion: 2.1\n{page}\n")
    names = f"[{GROUP}]\ncount-lengths = lengths\nother_plugin = other\n"
    write(site / "lengths-2.1.dist-info" / "entry_points.txt", names)
    return site


def write(file: Path, text: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def run(*arguments: str, columns: int = 120) -> Result:
    return CliRunner().invoke(main, ["explain", *arguments], env={"COLUMNS": str(columns)})


def shown(*arguments: str, columns: int = 120) -> str:
    done = run(*arguments, columns=columns)
    assert done.exit_code == 0, done.output
    return done.output


def section(text: str, title: str) -> str:
    """The indented lines below a line."""
    lines = text.split("\n")
    start = next(index for index, line in enumerate(lines) if line.strip() == title)
    indent = len(lines[start]) - len(lines[start].lstrip())
    below = lines[start + 1 :]
    end = next((i for i, line in enumerate(below) if len(line) - len(line.lstrip()) <= indent), len(below))
    return "\n".join(below[:end])


def patch(target: str = "grove:plant", id: str = "grove.plant", **declared) -> Patch:
    ways = {} if {"replace", "replace_with", "add"} & set(declared) else {"wrap": lambda original: original()}
    return Patch(**{"id": id, "target": target, "reason": "it grows by itself", **ways, **declared})


def patches_shown(*patches: Patch, columns: int = 120, in_full: bool = False) -> str:
    console = Console(file=StringIO(), width=columns, highlight=False)
    seam = Seam("grove", ("probe",), patches)
    patch_table.show_patches(console, [explain_patch(each, seam) for each in patches], in_full=in_full)
    return "\n".join(line.rstrip() for line in console.file.getvalue().split("\n"))


# -- a third party's plugin -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["count", "count-lengths", "count_lengths"])
def test_what_it_is(lengths, name):
    facts = explain_plugin(name)
    assert (facts["name"], facts["short"]) == ("count_lengths", "count")
    assert (facts["from"], facts["version"]) == ("lengths", "2.1")
    assert facts["summary"] == "Count [lengths]."
    assert facts["description"] == "They are counted\nin tokens.\n\n* one\n* two"
    assert facts["page"] == "https://example.org/lengths"
    assert (facts["sides"], facts["requires"], facts["conflicts"]) == (["driver"], ["other_plugin"], [])


def test_the_last_part_of_a_target_is_a_target_and_a_plugins_name_a_plugin():
    assert is_end_of_target("train_one_step")
    assert not is_end_of_target("r3")
    assert not is_end_of_target("r3_replay")
    assert not is_end_of_target("nobody_knows")


def test_its_flags(lengths):
    facts = explain_plugin("count")
    assert facts["flags"] == [
        {"flag": "--lengths-limit", "default": "7", "help": "at most [red]so many[/red], 5 % more"},
        {"flag": "--lengths-off", "default": None, "help": "50 % of it"},  # argparse cannot show this one
    ]
    assert facts["default_flags"] == ["--lengths-limit", "8"]
    assert facts["problems"] == {}


def test_its_hooks_are_in_the_order_of_the_contract(lengths):
    """Which is neither that of the plugin's file, nor that of the alphabet."""
    facts = explain_plugin("count")
    names = [hook["name"] for hook in facts["hooks"]]
    assert set(names) == {"step_metrics", "register_arguments", "default_flags", "configure"}
    assert names == sorted(names, key=lambda name: inspect.getsourcelines(getattr(hookspecs, name))[1])
    for hook in facts["hooks"]:
        assert hook["summary"] == inspect.getdoc(getattr(hookspecs, hook["name"])).split("\n")[0]


def test_another_plugin_is_not_imported_to_explain_one(lengths):
    """Not even one that it requires."""
    text = shown("count")
    assert re.search(r"^requires +other_plugin$", text, re.M)
    assert "other" not in sys.modules


def test_what_is_shown_of_it(lengths):
    text = shown("count", "--all")
    assert text.startswith("count_lengths 2.1\nCount [lengths].\n\nThey are counted in tokens.\n\n* one\n* two\n\n")
    assert "at most [red]so many[/red], 5 % more (default: 7)" in text, "text, and not rich's markup"
    assert "default_flags " in section(text, "driver")
    assert "step_metrics " in section(section(text, "Hooks"), "trainer")
    text = shown("count")
    assert "They are counted" not in text
    assert re.search(r"^ +--lengths-off +50 % of it$", text, re.M)
    assert re.search(r"^  driver +default_flags, register_arguments, configure$", text, re.M)
    assert re.search(r"^  trainer +step_metrics$", text, re.M)
    assert "--lengths-limit 8" in text
    assert "\x1b" not in text, "no colour, no link, when it is not a terminal"


@pytest.mark.parametrize("hook", ["default_flags", "register_arguments"])
def test_a_plugin_that_cannot_be_asked_for_its_flags_is_explained_all_the_same(lengths, hook):
    source = (lengths / "lengths.py").read_text()
    broken = re.sub(rf"(def {hook}\(.*\):\n)", r"\1    raise ValueError('only in a run')\n", source)
    write(lengths / "lengths.py", broken)
    facts = explain_plugin("count")
    assert facts["problems"] == {hook: "ValueError: only in a run"}
    assert len(facts["hooks"]) == 4
    assert "ValueError: only in a run" in shown("count")


def test_a_plugin_that_cannot_be_imported_is_an_error_without_a_traceback(lengths):
    done = run("other")
    assert done.exit_code == 1
    assert "Error: plugin other_plugin cannot be imported" in done.output
    assert "RuntimeError: imported" in done.output
    assert isinstance(done.exception, SystemExit)


def test_a_plugin_that_changes_nothing_itself(lengths):
    source = '"""Looks on."""\nfrom miles_plugins import hookimpl\n@hookimpl\ndef configure(args): ...\n'
    write(lengths / "lengths.py", source)
    facts, text = explain_plugin("count"), shown("count")
    assert (facts["patches"], facts["flags"], facts["default_flags"], facts["sides"]) == ([], [], [], [])
    assert f"\n  changed upstream: only {facts['layer_patches']} of the plugin layer itself" in text


# -- our own ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_a_plugin_of_ours_has_its_page_and_its_patches(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    facts = explain_plugin(name)
    assert facts["page"] == f"docs/{name}.md"
    assert (ROOT / facts["page"]).is_file()
    expected = {each.id for seam in needed_seams(Plugins.named([name])) if seam.hooks for each in seam.patches}
    assert {each["id"] for each in facts["patches"]} == expected


def test_the_page_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(explain_plugin(OWN[0])["page"]).is_file()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("everything", [[], ["--all"]], ids=["", "all"])
def test_it_fits_on_the_screen(name, columns, everything):
    lines = shown(name, *everything, columns=columns).split("\n")
    links = [line for line in lines if re.match(r"  \[\d+\] http", line)]
    assert max(len(line) for line in lines if line not in links) <= columns
    assert [line for line in lines if line != line.rstrip()] == []
    assert bool(links) == bool(everything)


def test_the_summary_is_about_one_screen_and_says_first_what_its_marks_mean():
    lines = shown("r3").split("\n")
    assert len(lines) <= 52
    for flag in explain_plugin("r3")["flags"]:
        assert any(re.match(rf"(flags|     )  {flag['flag']} +{re.escape(flag['help'][:40])}", line) for line in lines)
    legend = next(
        index for index, line in enumerate(lines) if "nothing was imported" in line or "not installed" in line
    )
    assert legend < next(index for index, line in enumerate(lines) if "TopKRouter.__init__" in line)


def test_the_summary_says_in_one_line_what_is_changed_and_why(grove):
    names = ["plant", "prune", "plough", "plant_trees"]
    write(grove / "grove" / "__init__.py", "".join(f"def {name}(a): ...\n" for name in names))
    patches = [patch(f"grove:{name}", id=name, reason="it grows") for name in names]
    patches += [patch("grove.shed:Spade.dig", id="dig", reason="it rusts " * 20, roles=frozenset({"trainer"}))]
    patches += [
        patch(id="drifted", signature="()", reason="x"),
        patch(id="idle", superseded_when=has_attribute("grove:plant")),
    ]
    console = Console(file=StringIO(), width=80, highlight=False)
    seam = Seam("grove", ("probe",), tuple(patches))
    facts = [explain_patch(each, seam) for each in patches]
    patch_table.show_briefly(console, facts, {"trainer": ["pass_begins", "pass_ends"], "every process": ["probe"]})
    lines = [line.rstrip() for line in console.file.getvalue().split("\n")]
    assert re.fullmatch(r"  trainer +pass_begins, pass_ends", lines[0])
    assert re.fullmatch(r"    does not fit  Spade.dig +it rusts it rusts.*…", lines[1])
    assert "its target does not exist" in lines[2]
    assert any(re.fullmatch(r"  every process +probe", line) for line in lines)
    everywhere = lines.index("  wherever it is imported")
    assert re.fullmatch(r"    fits          grove:p\* \(4\) +it grows", lines[everywhere + 1])
    assert lines[-2] == "  1 more idle here: they are for other releases of upstream"


@pytest.mark.parametrize("name", OWN)
def test_all_shows_every_patch_with_its_reason_and_its_link(name):
    text = shown(name, "--all", columns=80)
    run_together = re.sub(r"\s+", "", text)
    for each in explain_plugin(name, with_layer=True)["patches"]:
        for field in ("id", "target", "reason", "retire_when"):
            assert re.sub(r"\s+", "", each[field]) in run_together
        assert f"] {each['upstream']}\n" in text or not each["upstream"], "whole, to be followed"


@pytest.mark.parametrize("name", OWN)
def test_the_patches_of_the_layer_are_a_number_unless_all_are_asked_for(name):
    layer = {each.id for seam in all_seams() if not seam.hooks for each in seam.patches}
    few, all_of_them = explain_plugin(name), explain_plugin(name, with_layer=True)
    assert few["layer_patches"] == all_of_them["layer_patches"] == len(layer)
    assert {each["id"] for each in few["patches"]} == {each["id"] for each in all_of_them["patches"]} - layer
    assert layer <= {each["id"] for each in all_of_them["patches"]}
    assert f" {len(layer)} of the plugin layer itself" in shown(name)
    assert "of the plugin layer itself" not in shown(name, "--all")


@pytest.mark.parametrize("everything", [[], ["--all"]], ids=["", "all"])
def test_json_is_what_the_function_gives(everything):
    facts = json.loads(shown("r3", *everything, "--json"))
    assert facts == explain_plugin("r3", with_layer=bool(everything))


def test_every_key_is_documented():
    facts = explain_plugin("r3")
    for function, keys in [(explain_plugin, facts), (explain_patch, facts["patches"][0])]:
        documented = re.findall(r"^    ([\w, ]+):", inspect.getdoc(function), re.M)
        assert [name for names in documented for name in names.split(", ") if name != "PluginError"] == list(keys)


def test_a_wrong_name_is_answered_with_the_nearest():
    done = run("r3_repaly")
    assert done.exit_code == 1
    assert "Error: no installed plugin is named 'r3_repaly'" in done.output
    assert re.search(r"nearest +r3_replay", done.output)


# -- hooks ------------------------------------------------------------------------------------------------------------


# `doctor` is called by the command of that name, in no process of a run.
@pytest.mark.parametrize("name", [name for name, _ in hooks() if name != "doctor"])
def test_every_hook_says_in_which_process_it_is_called(name):
    assert processes_in(inspect.getdoc(getattr(hookspecs, name))) != []


@pytest.mark.parametrize(
    ("docstring", "processes"),
    [
        ("It begins (trainer).", ["trainer"]),
        ("It ended (of any sort), (trainer, every rank): it is logged (driver).", ["trainer"]),
        ("Logged (trainer, driver or rollout_manager).", ["driver", "rollout_manager", "trainer"]),
        ("It works (every process).", list(hookspecs.ROLES)),
        ("The trainers begin (retrainers).", []),
    ],
)
def test_the_processes_in_a_docstring(docstring, processes):
    assert processes_in(docstring) == processes


# -- whether a patch fits ---------------------------------------------------------------------------------------------


@pytest.fixture
def grove(site):
    """An upstream that cannot be imported."""
    source = "raise ImportError('must not be imported')\ndef plant(seed, depth=1): ...\ndef prune(): ...\n"
    write(site / "grove" / "__init__.py", source)
    write(site / "grove" / "lazy.py", "def __getattr__(name): ...\n")
    write(site / "estate" / "park" / "__init__.py", "def lay_out(): ...\n")  # estate is a namespace package
    return site


@pytest.mark.parametrize(
    ("declared", "here", "detail"),
    [
        (patch(), FITS, r""),
        (patch(signature="(seed, depth=1)"), FITS, r""),
        (patch(signature="(seed)"), FITS, r"drifted: .*depth"),
        (patch(signature="(tree)"), MISFIT, r"takes other arguments; expected \(tree\); found \(seed, depth=1\)"),
        (patch("grove:plants"), MISFIT, r"its target does not exist; .*; nearest grove:plant$"),
        (patch("grove.shed:plant"), MISFIT, r"its target does not exist; .*found no such module"),
        (patch("grove:plant", add=1), MISFIT, r"adds what is there already"),
        (patch("grove:water", add=1), FITS, r""),
        (patch("grove.lazy:plant"), OPEN, r"cannot be read without importing"),
        (patch(needs=(has_parameter("grove:plant", "seed"),)), FITS, r""),
        (patch(needs=(has_parameter("grove:plant", "tree"),)), MISFIT, r"expected grove:plant with a parameter tree"),
        (patch(needs=(has_attribute("meadow:mow"),)), ABSENT, r"meadow"),
        (patch("meadow.hay:make"), ABSENT, r"meadow"),
        (patch("estate.farm:plough"), ABSENT, r"estate.farm"),
        (patch("estate.park:lay_out"), FITS, r""),
        (patch("estate.park.lawn:mow"), MISFIT, r"its target does not exist"),
        (patch(superseded_when=has_parameter("grove:plant", "seed")), SUPERSEDED, r"grove:plant with a parameter seed"),
        (patch(superseded_when=has_parameter("grove:plant", "tree")), FITS, r""),
        (patch("grove:plants", superseded_when=lambda module: None), OPEN, r"only known when it is imported"),
    ],
    ids=lambda value: value.target if isinstance(value, Patch) else "",
)
def test_whether_a_patch_fits(grove, declared, here, detail):
    found, why, refused = fit(declared)
    assert found == here
    # A folder that only lacks a part is no excuse: the check before the launch refuses.
    assert refused == (found == MISFIT or declared.target == "estate.farm:plough")
    assert re.search(detail, why) if detail else why == ""
    assert "\n" not in why
    assert not {"grove", "estate"} & set(sys.modules)


def test_why_a_patch_does_not_fit_is_shown_and_what_is_not_installed_is_not_repeated(grove):
    text = patches_shown(patch("grove:plants"), patch("meadow:mow", id="meadow.mow"), columns=200)
    assert re.search(r"^    does not fit  grove.plant wraps grove:plants$", text, re.M)
    assert "its target does not exist; expected plants in grove; found no such name; nearest grove:plant" in text
    assert text.count("meadow") == 2
    assert re.search(r"^    – +meadow.mow wraps meadow:mow\n +it grows by itself$", text, re.M)


def test_why_until_when_and_on_what_condition(grove):
    conditional = patch(
        retire_when="trees plant trees",
        needs=(has_parameter("grove:plant", "seed"),),
        superseded_when=has_attribute("grove.lazier:sow"),
    )
    why = "until trees plant trees; needs grove:plant with a parameter seed; idle where upstream has lazier:sow"
    assert f"it grows by itself; {why}" in patches_shown(conditional, columns=200, in_full=True)
    short = patches_shown(conditional, columns=200)
    assert "it grows by itself" in short
    assert "until" not in short


def test_patches_stand_under_their_process(grove):
    text = patches_shown(
        patch("grove:prune", id="nowhere"),
        patch(id="late", roles=frozenset({hookspecs.ROLES[-1]})),
        patch(id="both", roles=frozenset(hookspecs.ROLES[:2])),
        patch(id="first", roles=frozenset({hookspecs.ROLES[0]})),
    )
    titles = [line.strip() for line in text.split("\n") if re.match(r"  \w", line)]
    *processes, nowhere = titles
    assert processes == [*hookspecs.ROLES[:2], hookspecs.ROLES[-1]]
    assert nowhere == "wherever it is imported"
    for title, ids in zip(titles, [{"first", "both"}, {"both"}, {"late"}, {"nowhere"}], strict=True):
        assert set(re.findall(r"(\w+) wraps grove:", section(text, title))) == ids


def test_many_patches_for_one_reason_are_one_line_unless_all_are_asked_for(grove):
    names = ["plant", "prune", "plough", "plant_trees"]
    write(grove / "grove" / "__init__.py", "".join(f"def {name}(): ...\n" for name in names))
    many = [patch(f"grove:{name}", id=f"grove.{name}") for name in names]
    other = patch("grove:plant", id="other", reason="it does not grow")
    text = patches_shown(*many, other)
    assert "grove.p* (4 patches) wraps grove:p*" in text
    assert text.count("it grows by itself") == 1
    assert "other wraps grove:plant" in text
    text = patches_shown(*many, other, in_full=True)
    assert all(f" grove.{name} wraps grove:{name}" in text for name in names)
    assert text.count("it grows by itself") == 1


def test_what_upstream_does_itself_is_a_number_unless_all_are_asked_for(grove):
    """The variants for an older upstream are not what somebody with a newer one wants to read."""
    condition = {"superseded_when": has_attribute("grove:plant")}
    both = [patch(f"grove:{name}", id=f"old.{name}", reason=f"no {name}", **condition) for name in ("plant", "prune")]
    text = patches_shown(*both, patch())
    assert "  2 more idle here: " in text
    assert "old." not in text
    assert "grove.plant wraps grove:plant" in text
    assert "no plant; idle where upstream has grove:plant" in patches_shown(*both, in_full=True)


def test_a_long_target_is_broken_between_its_module_and_its_name():
    long = patch("meadow.of.many.flowers:Daisy.bloom", id="meadow.daisy")
    assert "flowers:Daisy.bloom" in patches_shown(long, columns=40)
    lines = [line.strip() for line in patches_shown(long, columns=40, in_full=True).split("\n")]
    assert lines[lines.index("–  meadow.daisy wraps") + 1 :][:2] == ["meadow.of.many.flowers:", "Daisy.bloom"]


def test_a_terminal_can_follow_the_link(grove):
    console = Console(file=StringIO(), width=120, force_terminal=True, color_system="truecolor", _environ={})
    linked = patch(upstream="https://example.org/grove (plant.py)")
    patch_table.show_patches(console, [explain_patch(linked, Seam("grove", ("probe",), (linked,)))], in_full=False)
    assert ";https://example.org/grove\x1b\\grove.plant\x1b]8;;\x1b\\ wraps" in console.file.getvalue()


# -- where upstream is looked for -------------------------------------------------------------------------------------


def slime_checkout(folder: Path) -> Path:
    write(folder / "train.py")
    write(folder / "slime" / "__init__.py", "raise ImportError('must not be imported')\n")
    write(folder / "slime" / "utils" / "__init__.py")
    write(folder / "slime" / "utils" / "arguments.py", "def parse_args(add_custom_arguments=None): ...\n")
    return folder


def explain_elsewhere(folder: Path, *arguments: str, **environment: str) -> tuple[str, set[str]]:
    """Output and imported top-level packages of the command in a process where upstream is only what is given."""
    script = f"""
import sys
class Hide:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        spec = self.finder.find_spec(name, path, target)
        away = spec and name.partition(".")[0] in {HEAVY!r} and {str(folder)!r} not in str(spec)
        return None if away else spec
    def find_distributions(self, *arguments): return self.finder.find_distributions(*arguments)
sys.meta_path = [Hide(finder) if hasattr(finder, "find_distributions") else finder for finder in sys.meta_path]
from miles_plugins.entrypoints.cli import main
try: main({["explain", *arguments]!r})
finally: print("\\nIMPORTED", *{{name.partition(".")[0] for name in sys.modules}})
"""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SLIME_HOME", "COLUMNS")
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    text, _, imported = done.stdout.partition("\nIMPORTED")
    return text, set(imported.split())


@pytest.mark.parametrize("name", OWN)
def test_nothing_of_upstream_is_needed(name, tmp_path):
    text, imported = explain_elsewhere(tmp_path, name, "--all", "--json")
    facts = json.loads(text)
    assert {each["here"] for each in facts["patches"]} == {ABSENT}
    assert set(facts["upstream"].values()) == {None}
    assert not imported & HEAVY
    text, _ = explain_elsewhere(tmp_path, name)
    assert re.search(r"^  – +not installed here: .*slime", text, re.M)
    assert max(len(line) for line in text.split("\n")) <= 120


@pytest.mark.parametrize("way", ["installed", "SLIME_HOME", "working directory"])
def test_slime_is_found_where_slime_train_would_find_it(way, tmp_path):
    """And is read, and not imported."""
    slime = slime_checkout(tmp_path if way == "working directory" else tmp_path / "checkout")
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{slime}"} if way == "installed" else {}
    environment |= {"SLIME_HOME": str(slime)} if way == "SLIME_HOME" else {}
    text, imported = explain_elsewhere(tmp_path, "metrics", "--all", "--json", **environment)
    facts = json.loads(text)
    here = {each["target"]: each["here"] for each in facts["patches"]}
    assert here["slime.utils.arguments:parse_args"] == FITS
    assert here["slime.utils.arguments:get_slime_extra_args_provider"] == MISFIT
    assert facts["upstream"]["slime"] == str(slime / "slime")
    assert not imported & HEAVY


def test_the_interpreter_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIME_HOME", str(slime_checkout(tmp_path)))
    before = list(sys.path)
    gc.enable()
    explain_plugin("metrics")
    assert sys.path == before
    assert gc.isenabled()


def test_an_impostor_is_not_slime(tmp_path):
    """PyPI's slime is a statistics library: nothing of ours can fit it, nor fail to."""
    write(tmp_path / "site" / "slime" / "__init__.py")
    path = os.pathsep.join([str(ROOT), str(tmp_path / "site")])
    text, _ = explain_elsewhere(tmp_path, "metrics", PYTHONPATH=path)
    assert "is not THUDM's slime" in " ".join(text.split())
    assert "does not fit" not in text
