"""The children of an SGLang engine are activated by a sitecustomize; no other Python program is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miles_plugins.patches.slime.processes import CHILD_PROCESS_FOLDER, reach_children

ROOT = Path(__file__).resolve().parents[1]

STATE = """
import json, os, sys

def say(*_):
    layer = sys.modules.get("miles_plugins.activation")
    active = layer is not None and layer.is_active() and [layer.current().role, layer.current().plugins.names]
    return {"imported": layer is not None, "active": active, "user": getattr(sys, "of_the_user", None)}
"""
SPAWN = """
import json, multiprocessing
from state import say

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe()
    import talk
    child = context.Process(target=talk.talk, args=(send,))
    child.start()
    child.join(60)
    print(json.dumps({"code": child.exitcode, "said": receive.recv() if receive.poll() else None}))
"""
TALK = "from state import say\ndef talk(connection):\n    connection.send(say())\n"


@pytest.fixture
def programs(tmp_path):
    """A folder with small programs that say whether the plugin layer is active in them."""
    (tmp_path / "state.py").write_text(STATE)
    (tmp_path / "talk.py").write_text(TALK)
    (tmp_path / "spawn.py").write_text(SPAWN)
    (tmp_path / "plain.py").write_text("import json\nfrom state import say\nprint(json.dumps(say()))\n")
    (tmp_path / "user").mkdir()
    return tmp_path


def run(programs: Path, program: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MILES_PLUGINS")}
    path = [CHILD_PROCESS_FOLDER, programs / "user", ROOT]
    inherited["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, *flags, str(programs / f"{program}.py")]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=60)


def said(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ON = {"MILES_PLUGINS": "metrics_jsonl"}


def test_a_spawned_child_is_activated(programs):
    answer = said(run(programs, "spawn", **ON))
    assert answer["code"] == 0
    assert answer["said"]["active"] == ["sglang_child", ["metrics_jsonl"]]


@pytest.mark.parametrize("environment", [{}, {"MILES_PLUGINS": ""}], ids=["unset", "empty"])
def test_without_the_variable_nothing_is_even_imported(programs, environment):
    answer = said(run(programs, "spawn", **environment))
    assert answer == {"code": 0, "said": {"imported": False, "active": False, "user": None}}


def test_other_python_programs_are_left_alone(programs):
    assert said(run(programs, "plain", **ON)) == {"imported": False, "active": False, "user": None}


def test_a_program_that_a_child_starts_is_left_alone(programs):
    (programs / "talk.py").write_text(
        "import json, subprocess, sys\n"
        "def talk(connection):\n"
        f"    done = subprocess.run([sys.executable, {str(programs / 'plain.py')!r}], capture_output=True)\n"
        "    connection.send(json.loads(done.stdout))\n"
    )
    assert said(run(programs, "spawn", **ON))["said"]["active"] is False


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MILES_PLUGINS": "nonsense"}, "no installed plugin is named 'nonsense'"),
        ({**ON, "MILES_PLUGINS_DIGEST": "f" * 16}, "are not the driver's"),
    ],
    ids=["name", "digest"],
)
def test_a_child_that_cannot_be_activated_ends(programs, environment, message):
    done = run(programs, "spawn", **environment)
    assert said(done) == {"code": 78, "said": None}
    assert message in done.stderr
    assert "Traceback" in done.stderr


def test_a_broken_name_does_not_end_other_programs(programs):
    assert said(run(programs, "plain", MILES_PLUGINS="nonsense"))["active"] is False


# -- the user's own sitecustomize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["plain", "spawn"])
@pytest.mark.parametrize("environment", [{}, ON], ids=["off", "on"])
def test_the_users_own_sitecustomize_runs(programs, program, environment):
    (programs / "user" / "sitecustomize.py").write_text("import sys; sys.of_the_user = __file__")
    answer = said(run(programs, program, **environment))
    assert (answer["said"] if program == "spawn" else answer)["user"] == str(programs / "user" / "sitecustomize.py")


def test_the_users_own_sitecustomize_may_be_a_package(programs):
    (programs / "user" / "sitecustomize").mkdir()
    (programs / "user" / "sitecustomize" / "__init__.py").write_text("import sys; sys.of_the_user = 'package'")
    assert said(run(programs, "plain", **ON))["user"] == "package"


def test_the_users_own_sitecustomize_runs_before_the_plugins(programs):
    (programs / "user" / "sitecustomize.py").write_text(
        "import sys; sys.of_the_user = 'miles_plugins.activation' in sys.modules"
    )
    answer = said(run(programs, "spawn", **ON))["said"]
    assert answer["active"]
    assert answer["user"] is False


@pytest.mark.parametrize("problem", ["raise ValueError('broken')", "import nothing_of_that_name", "def broken(:"])
def test_a_broken_sitecustomize_of_the_users_own_does_not_keep_the_plugins_out(programs, problem):
    """Python prints such an error and goes on; going on without the plugins is what must not happen."""
    (programs / "user" / "sitecustomize.py").write_text(problem)
    done = run(programs, "spawn", **ON)
    answer = said(done)
    assert answer["code"] == 78 or answer["said"]["active"]


def test_our_folder_may_be_on_the_path_under_two_names(programs):
    """Through the link in the package, too: it must not take itself for the user's."""
    folders = [ROOT / "miles_plugins" / "entrypoints" / "child_process", CHILD_PROCESS_FOLDER, ROOT, programs / "user"]
    (programs / "user" / "sitecustomize.py").write_text("import sys; sys.of_the_user = 'once'")
    answer = said(run(programs, "spawn", PYTHONPATH=os.pathsep.join(map(str, folders)), **ON))["said"]
    assert answer["user"] == "once"
    assert answer["active"]


def test_a_child_of_an_isolated_interpreter_is_not_reached(programs):
    """`python -I` ignores PYTHONPATH: nothing of ours runs, so nothing reports, and the driver says so."""
    (programs / "alone.py").write_text("import sys; print('\"' + str('miles_plugins' in sys.modules) + '\"')")
    assert said(run(programs, "alone", "-I", **ON)) == "False"


# -- the parent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, "", "/theirs"], ids=["unset", "empty", "set"])
@pytest.mark.parametrize("fails", [False, True], ids=["starts", "fails"])
def test_the_parents_path_is_changed_only_while_its_children_start(monkeypatch, before, fails):
    if before is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", before)

    def launch(number):
        assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(CHILD_PROCESS_FOLDER), *filter(None, [before])]
        if fails:
            raise RuntimeError("no server")
        return number

    if fails:
        with pytest.raises(RuntimeError, match="no server"):
            reach_children(launch, 3)
    else:
        assert reach_children(launch, 3) == 3
    assert os.environ.get("PYTHONPATH") == before


def test_the_folder_holds_a_sitecustomize():
    assert (CHILD_PROCESS_FOLDER / "sitecustomize.py").is_file()
