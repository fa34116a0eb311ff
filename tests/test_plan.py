"""`miles-plugins plan` says what would be changed where, in which order and why; and ends as `slime-train` would."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from miles_plugins import hookspecs
from miles_plugins.entrypoints import plan as command
from miles_plugins.entrypoints.cli import main
from miles_plugins.entrypoints.patch_facts import SUPERSEDED, home, stacks
from miles_plugins.entrypoints.plan import make_plan
from miles_plugins.errors import PatchError
from miles_plugins.patches.seam import Seam, needed_seams
from miles_plugins.patching import Patch, has_attribute

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "ray", "slime", "megatron", "sglang", "transformers", "numpy"}
TRAINER, DRIVER = frozenset({"trainer"}), frozenset({"driver"})


def write(file: Path, text: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def patch(target: str = "grove:plant", id: str = "grove.plant", **declared) -> Patch:
    ways = {} if {"replace", "replace_with", "add"} & set(declared) else {"wrap": lambda original: original()}
    return Patch(**{"id": id, "target": target, "reason": f"why {id}", **ways, **declared})


def run(*arguments: str, columns: int = 120) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments], env={"COLUMNS": str(columns)})


@pytest.fixture
def grove(site):
    """An upstream that cannot be imported, and one more name for one of its functions."""
    functions = "def plant(seed): ...\ndef prune(): ...\nclass Tree:\n    def grow(self): ...\n"
    write(site / "grove" / "__init__.py", f"raise ImportError('must not be imported')\n{functions}")
    write(site / "grove" / "again.py", "from grove import plant, Tree\n")
    return site


@pytest.fixture
def planned(grove, monkeypatch):
    """What is planned where these seams are needed; slime itself is there."""

    def plan(*patches: Patch, hooks: tuple[str, ...] = ("metrics_logged",)) -> None:
        monkeypatch.setattr(command, "needed_seams", lambda plugins, host: [Seam("grove", hooks, patches)])

    monkeypatch.setattr(command, "slime_problem", lambda: None)
    return plan


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "where"),
    [
        ("grove:plant", "grove:plant"),
        ("grove.again:plant", "grove:plant"),
        ("grove.again:Tree.grow", "grove:Tree.grow"),
        ("grove.again:Tree", "grove:Tree"),
        ("grove.again:sow", "grove.again:sow"),
        ("meadow:mow", "meadow:mow"),
    ],
)
def test_where_a_target_is_defined(grove, target, where):
    assert home(target) == where


def test_patches_of_one_function_are_one_stack_whatever_they_call_it(grove):
    inner, outer = patch("grove.again:plant", id="a"), patch(id="b", before=("a",))
    base = patch(id="0", replace=lambda seed: None, fingerprints={"x": "y"})
    other = patch("grove:prune", id="c")
    assert [[each.id for each in stack] for stack in stacks([base, inner, other, outer])] == [["b", "a", "0"], ["c"]]


@pytest.mark.parametrize(
    "declared",
    [
        [patch(id="a", before=("b",)), patch(id="b", before=("a",))],
        [patch(id="a", replace=1), patch("grove.again:plant", id="b", replace_with=lambda original: original)],
    ],
    ids=["circle", "two replacements"],
)
def test_patches_that_exclude_each_other(grove, planned, declared):
    with pytest.raises(PatchError, match=r"a|b"):
        stacks(declared)
    planned(*declared)
    done = run("--plugins", "metrics")
    assert done.exit_code == 1
    assert re.search(r"(b -> a|a -> b|patches a and b replace the same object)", done.output)


def test_the_layers_of_a_target_are_shown_from_the_outside(planned):
    planned(
        patch("grove:prune", id="z"),
        patch(id="inner", roles=TRAINER),
        patch("grove.again:plant", id="outer", before=("inner",), roles=TRAINER),
        patch(id="idle", superseded_when=has_attribute("grove:prune"), roles=TRAINER),
    )
    facts = make_plan(["metrics"])
    assert [(each["id"], each["stack"]) for each in facts["patches"]] == [
        ("z", ["z"]),
        ("outer", ["outer", "inner"]),
        ("inner", ["outer", "inner"]),
        ("idle", []),
    ]
    assert [each["id"] for each in facts["patches"] if each["here"] == SUPERSEDED] == ["idle"]
    text = run("--plugins", "metrics").output
    assert re.search(r"outer wraps again:plant \(layer 1 of 2, around inner\)\n", text)
    assert re.search(r"inner wraps grove:plant \(layer 2 of 2\)\n", text)
    assert text.index("outer wraps") < text.index("inner wraps")
    assert "z wraps grove:prune\n" in text


# -- by process --------------------------------------------------------------------------------------------------------


def test_processes_that_are_touched_and_only_those(planned):
    planned(
        patch(id="a", roles=TRAINER),
        patch("grove:prune", id="b", roles=TRAINER | DRIVER),
        patch("grove:Tree", id="c", replace_with=id),
    )
    facts = make_plan(["metrics"])
    assert facts["processes"] == {"driver": ["b"], "trainer": ["a", "b"], "wherever it is imported": ["c"]}
    text = run("--plugins", "metrics").output
    titles = re.findall(r"^  (\w[\w ]*)$", text, re.M)
    assert titles == ["driver", "trainer", "wherever it is imported"]


def test_for_which_plugin_and_why(planned):
    planned(patch(roles=TRAINER), hooks=("pass_begins", "metrics_logged"))
    (fact,) = make_plan(["metrics"])["patches"]
    assert fact["for"] == {"metrics": ["metrics_logged"]}
    assert "metrics (metrics_logged): why grove.plant" in run("--plugins", "metrics").output


def test_patches_of_the_layer_are_named_and_explained_when_asked_for_or_when_they_do_not_fit(planned):
    planned(patch(roles=DRIVER), patch("grove:plants", id="grove.bad", roles=DRIVER), hooks=())
    text = run("--plugins", "metrics").output
    assert re.search(r"^ +fits +of the layer itself: grove.plant$", text, re.M)
    assert "why grove.plant" not in text
    assert "why grove.bad" in text
    text = run("--plugins", "metrics", "--all").output
    assert "grove.plant wraps grove:plant\n" in text
    assert "why grove.plant" in text


def test_the_embedded_host_is_one_process():
    facts = make_plan(["r3"], embedded=True)
    assert facts["host"] == "embedded"
    assert list(facts["processes"]) == ["the embedded host's one process"]
    assert "megatron.router.select-experts" in facts["processes"]["the embedded host's one process"]
    assert not [each for each in facts["patches"] if each["target"].startswith(("slime", "sglang", "ray"))]
    (checkpoint,) = [each for each in facts["patches"] if each["id"] == "megatron.cpu.norm"]
    assert checkpoint["for"] == {"the embedded host": ["choose_device"]}


def test_it_is_what_slime_train_would_arm():
    for names in (["r3", "cpu"], ["metrics"]):
        plugins = command.Plugins.named(names)
        expected = {each.id for seam in needed_seams(plugins) for each in seam.here()}
        assert {each["id"] for each in make_plan(names)["patches"]} == expected


# -- how it ends -------------------------------------------------------------------------------------------------------


def test_a_patch_that_does_not_fit_is_named_and_ends_it_with_one(planned):
    planned(patch(), patch("grove:plants", id="grove.bad"))
    done = run("--plugins", "metrics")
    assert done.exit_code == 1
    assert (
        "slime-train would end before it starts:\n  patch grove.bad: does not fit: its target does not exist"
        in done.output
    )
    assert "patch grove.plant" not in done.output
    facts = json.loads(CliRunner().invoke(main, ["plan", "--plugins", "metrics", "--json"]).stdout)
    assert [problem.partition(":")[0] for problem in facts["problems"]] == ["  patch grove.bad"]


def test_all_is_well(planned):
    planned(patch(), patch("meadow:mow", id="meadow.mow"))
    done = run("--plugins", "metrics")
    assert done.exit_code == 0, done.output
    assert "2 patches: 1 fit, 1 not installed. Nothing was changed." in done.output
    assert "would end" not in done.output


def test_without_slime_it_ends_as_slime_train_would(tmp_path):
    output, _, code = elsewhere(tmp_path, "plan", "--plugins", "metrics")
    assert code == 1
    assert "slime cannot be used: no package named slime can be imported" in output
    assert output.count("  patch ") == 0, "what is only not installed is not said once more"


@pytest.mark.parametrize("names", ["r4", "r3,", ""])
def test_a_wrong_name_is_an_error_without_a_traceback(names):
    done = run("--plugins", names)
    assert done.exit_code == 1
    assert done.output.startswith("Error: no installed plugin is named ")
    assert isinstance(done.exception, SystemExit)


# -- the command -------------------------------------------------------------------------------------------------------


def test_json_is_what_the_function_gives():
    assert json.loads(run("--plugins", "r3,cpu", "--json").stdout) == make_plan(["r3", "cpu"])


def test_every_key_is_documented():
    documented = re.findall(r"^    (\w+):", inspect.getdoc(make_plan), re.M)
    assert [name for name in documented if name != "PluginError"] == list(make_plan(["metrics"]))


@pytest.mark.parametrize("columns", [80, 120])
def test_it_fits_on_two_screens(columns):
    lines = run("--plugins", "r3,cpu", columns=columns).stdout.split("\n")
    assert max(map(len, lines)) <= columns
    assert len(lines) <= {120: 120, 80: 155}[columns]


def elsewhere(folder: Path, *arguments: str, path: str = "") -> tuple[str, set[str], int]:
    """Output, imported top-level packages and exit code of a command in a process of its own, without slime."""
    script = f"""
import sys
from miles_plugins.entrypoints.cli import main
try: main({list(arguments)!r})
finally: print("\\nIMPORTED", *{{name.partition(".")[0] for name in sys.modules}})
"""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SLIME_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**inherited, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), path]))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    text, _, imported = done.stdout.partition("\nIMPORTED")
    return text + done.stderr, set(imported.split()), done.returncode


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["plan", "--plugins", "r3,cpu"],
        ["plan", "--plugins", "r3,cpu", "--embedded", "--all"],
        ["explain", "r3"],
        ["explain", "torch.cuda:set_device", "--diff"],
        ["explain", "sglang.srt.managers.scheduler:Scheduler.__init__"],
    ],
    ids=" ".join,
)
def test_nothing_of_upstream_is_imported(arguments, tmp_path):
    write(tmp_path / "slime" / "__init__.py", "raise ImportError('must not be imported')\n")
    write(tmp_path / "slime" / "utils" / "arguments.py")
    output, imported, _ = elsewhere(tmp_path, *arguments, path=str(tmp_path))
    assert output
    assert "Traceback" not in output
    assert "miles_plugins" in imported
    assert not imported & HEAVY, output


def test_the_roles_are_the_contracts():
    assert set(make_plan(["r3", "cpu"])["processes"]) <= {*hookspecs.ROLES, "wherever it is imported"}
