"""`slime-train` runs the user's own train.py: without plugins exactly as Python would, with them only if they fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plugins.compat import upstream
from miles_plugins.entrypoints import slime_train
from miles_plugins.entrypoints.slime_train import _split, plugin_error
from miles_plugins.errors import ArgumentError, AttestationError, PatchError, PluginError, PluginNotFoundError

ROOT = Path(__file__).resolve().parents[1]

SHOW = """
import json, sys
import beside
print(json.dumps({"argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "spec": __spec__ is None,
                  "main": sys.modules["__main__"].__dict__ is globals(), "beside": beside.__file__}))
"""
FAIL = "raise SystemExit('must not run')\n"


def slime_train_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", *arguments]


def run(
    command: list[str], folder: Path, path: Iterable[object] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MILES_PLUGINS", "PYTHONPATH", "SLIME_HOME", "PYTHONSAFEPATH"))
    }
    search = os.pathsep.join([*map(str, path), str(ROOT)])
    return subprocess.run(
        command,
        cwd=folder,
        env={**inherited, "PYTHONPATH": search, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def fake_slime(folder: Path, script: str | None = "print('beside slime')\n") -> Path:
    """A checkout that looks like slime: the package, and train.py beside it."""
    (folder / "slime" / "utils").mkdir(parents=True)
    for file in ("slime/__init__.py", "slime/utils/__init__.py", "slime/utils/arguments.py"):
        (folder / file).write_text("")
    if script is not None:
        (folder / "train.py").write_text(script)
    return folder


@pytest.fixture
def script(tmp_path):
    """A train.py with a module beside it."""

    def write(source: str) -> Path:
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / "scripts" / "beside.py").write_text("")
        (tmp_path / "scripts" / "train.py").write_text(source)
        return tmp_path / "scripts" / "train.py"

    return write


# -- our own flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own",
    [["--plugins", "a", "--plugins", "b"], ["--plugins", "a,b"], ["--plugins=a,b"], ["--plugins=a", "--plugins", "b"]],
    ids=" ".join,
)
def test_the_forms_of_plugins(own, monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(slime_train, "refuse_slips", lambda names, argv, allowed: None)
    monkeypatch.setattr(slime_train, "_begin", lambda names, script, flags, allowed: begun.append((names, flags)))
    monkeypatch.setattr(sys, "argv", ["slime-train"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "train.py").write_text("")
    flags = ["--lr", "1e-6", "--plugin", "x", "--plug", "-1", "--train", "y"]
    slime_train.main(["--train-script", str(tmp_path / "train.py"), *flags[:3], *own, *flags[3:]])
    assert begun == [(["a", "b"], flags)]


WORDS = st.one_of(
    st.sampled_from(
        ["--lr", "1e-6", "-1", "-1e-6", "-x", "--lr=-1", "a=b", "--plugin", "--train", "-p", "", " ", "[1, 2]"]
    ),
    st.text(alphabet="-=ax ,", max_size=6).filter(lambda word: word != "--" and not word.startswith("--plugins")),
)


@given(st.lists(WORDS), st.sampled_from([[], ["--plugins", "a"], ["--plugins=a"]]), st.data())
def test_every_other_word_goes_to_the_script_unchanged(words, own, data):
    at = data.draw(st.integers(0, len(words)))
    parsed, rest = _split([*words[:at], *own, *words[at:]])
    assert rest == words
    assert parsed.plugins == (["a"] if own else [])
    assert parsed.train_script is None


def test_help_of_our_own(tmp_path):
    done = run(slime_train_command("--plugins-help"), tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: slime-train")


# -- which script ----------------------------------------------------------------------------------------------------


def test_the_search_for_the_script(tmp_path, monkeypatch):
    """Explicit, beside slime, in $SLIME_HOME, here: each is found when those before it are taken away."""
    places = {}
    for place in ("explicit", "beside", "home", "here"):
        (tmp_path / place).mkdir()
        places[place] = tmp_path / place / "train.py"
        places[place].write_text("")
    fake_slime(tmp_path / "beside")
    monkeypatch.syspath_prepend(str(tmp_path / "beside"))
    monkeypatch.chdir(tmp_path / "here")
    home = {"SLIME_HOME": str(tmp_path / "home")}

    assert upstream.find_train_script(str(places["explicit"]), home) == places["explicit"]
    assert upstream.find_train_script(None, home) == places["beside"]
    places["beside"].unlink()
    assert upstream.find_train_script(None, home) == places["home"]
    assert upstream.find_train_script(None, {}) == places["here"]
    places["here"].unlink()
    assert upstream.find_train_script(None, {}) is None
    assert upstream.find_train_script(str(tmp_path / "nothing.py"), home) is None, "what was asked for, or nothing"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.py").write_text("")
    assert upstream.find_train_script("~/train.py", {}) == tmp_path / "train.py"


# -- without plugins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", ["", "1"], ids=["", "safe path"])
@pytest.mark.parametrize("form", ["absolute", "relative", "here"])
def test_without_plugins_the_script_sees_what_python_would_show_it(script, form, safe):
    path = script(SHOW)
    given = {"absolute": str(path), "relative": f"{path.parent.name}/train.py", "here": "train.py"}[form]
    folder = path.parent if form == "here" else path.parent.parent
    flags = ["--lr", "-1e-6", "--name=a b", "--", "x"]
    environment = {"path": [path.parent], "PYTHONSAFEPATH": safe} if safe else {}
    plain = run([sys.executable, given, *flags], folder, **environment)
    ours = run(slime_train_command("--train-script", given, *flags), folder, **environment)
    assert plain.returncode == ours.returncode == 0, ours.stderr
    assert json.loads(ours.stdout) == json.loads(plain.stdout)
    assert ours.stderr == plain.stderr == ""


def test_a_safe_path_keeps_its_first_entry(script, tmp_path):
    """With PYTHONSAFEPATH the first entry is not ours to overwrite: it may be the user's Megatron-LM."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "their_library.py").write_text("")
    path = script("import their_library")
    command = slime_train_command("--train-script", str(path))
    done = run(command, tmp_path, [tmp_path / "theirs"], PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "source",
    [
        "",
        "import sys; sys.exit(3)",
        "raise SystemExit('stop')",
        "raise KeyError('lost')",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    ],
    ids=["end", "exit", "exit with text", "exception", "signal"],
)
def test_without_plugins_the_script_ends_as_under_python(script, source):
    path = script(source)
    plain = run([sys.executable, str(path)], path.parent)
    ours = run(slime_train_command("--train-script", str(path)), path.parent)
    assert ours.returncode == plain.returncode
    assert ours.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]
    assert ours.stdout == plain.stdout


def test_without_plugins_nothing_of_ours_is_loaded(script):
    path = script(
        "import sys\n"
        "ours = ('miles_plugins.activation', 'miles_plugins.patches')\n"
        "print([name for name in sys.modules if name.startswith(ours)])"
    )
    assert run(slime_train_command("--train-script", str(path)), path.parent).stdout == "[]\n"


def test_help_goes_to_the_script_and_imports_nothing_heavy(script):
    path = script("import sys; print(sys.argv[1:])")
    command = slime_train_command("--train-script", str(path), "--help")
    done = run([command[0], "-X", "importtime", *command[1:]], path.parent)
    assert done.stdout == "['--help']\n"
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "miles_plugins" in imported
    assert not imported & {"torch", "ray", "sglang", "megatron", "slime", "transformers", "numpy", "rich", "click"}


# -- what cannot run -------------------------------------------------------------------------------------------------


def test_no_script_and_no_slime(tmp_path):
    done = run(slime_train_command("--plugins", "metrics"), tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("\nslime-train: no train script was found")
    assert "no package named slime can be imported" in done.stderr
    assert "git" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_explicit_script_that_is_not_there(tmp_path):
    done = run(slime_train_command("--train-script", "nothing.py"), tmp_path)
    assert done.returncode == 1
    assert "no such file: nothing.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_slime_without_its_script(tmp_path):
    done = run(slime_train_command(), tmp_path, [fake_slime(tmp_path / "checkout", script=None)])
    assert done.returncode == 1
    assert "--train-script" in done.stderr
    assert "SLIME_HOME" in done.stderr
    assert "slime-train --embedded" in done.stderr


@pytest.mark.parametrize("flags", [["--help"], ["--plugins", "r3", "-h"]])
def test_without_slime_the_help_is_ours(flags, tmp_path):
    done = run(slime_train_command(*flags), tmp_path)
    assert done.returncode == 0
    assert "--embedded" in done.stdout
    assert "--train-script" in done.stdout


def test_plugins_without_slime(script):
    path = script(FAIL)
    done = run(slime_train_command("--plugins", "metrics", "--train-script", str(path)), path.parent)
    assert done.returncode == 1
    assert "slime cannot be used" in done.stderr
    assert "no package named slime" in done.stderr


@pytest.mark.parametrize("impostor", ["package", "folder"])
def test_an_impostor_is_named(script, tmp_path, impostor):
    """PyPI's slime is a statistics library; a folder of that name on the path is a package for Python, too."""
    path = script(FAIL)
    (tmp_path / "other" / "slime").mkdir(parents=True)
    if impostor == "package":
        (tmp_path / "other" / "slime" / "__init__.py").write_text(FAIL)
    command = slime_train_command("--plugins", "metrics", "--train-script", str(path))
    done = run(command, tmp_path, [tmp_path / "other"])
    assert done.returncode == 1
    assert str(tmp_path / "other" / "slime") in done.stderr
    assert "is not THUDM's slime" in done.stderr
    assert "must not run" not in done.stderr


@pytest.mark.parametrize(
    ("names", "expected"),
    [("nonsense", "no installed plugin is named 'nonsense'"), ("metric_jsonl", "metrics_jsonl"), ("r3,nope", "'nope'")],
)
def test_a_mistyped_plugin_ends_before_the_script(tmp_path, names, expected):
    done = run(slime_train_command("--plugins", names), tmp_path, [fake_slime(tmp_path / "checkout", FAIL)])
    assert done.returncode == 1
    assert expected in done.stderr
    assert "must not run" not in done.stderr
    assert "Traceback" not in done.stderr


def test_plugins_with_no_name_are_not_silently_none(tmp_path):
    """`--plugins "$PLUGINS"` with the variable unset: training without the feature is what must not happen."""
    done = run(
        slime_train_command("--plugins", ""), tmp_path, [fake_slime(tmp_path / "checkout", "print('trained')\n")]
    )
    assert done.returncode != 0
    assert "trained" not in done.stdout


# -- with plugins, on the real slime ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory, slime, megatron):
    """A copy of the real slime that may be changed, with a train.py that only says what it sees."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(slime / "slime", folder / "slime", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "train.py").write_text(
        "import json, os, sys\n"
        "upstream = [name for name in ('slime', 'megatron', 'torch', 'ray', 'sglang') if name in sys.modules]\n"
        "print(json.dumps([sys.argv[1:], upstream, os.environ.get('SGLANG_USE_CPU_ENGINE')]))\n"
    )
    return folder


@pytest.mark.upstream
def test_with_plugins_the_script_runs_with_their_default_flags_in_front(real, megatron):
    command = slime_train_command("--plugins", "r3", "--lr", "1", "--plugins=metrics")
    done = run(command, real, [real, megatron])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["--use-rollout-routing-replay", "--lr", "1"], [], None]
    assert "slime-train: plugins metrics_jsonl 0.1.0, r3_replay 0.1.0 [" in done.stderr
    assert str(real / "train.py") in done.stderr


@pytest.mark.upstream
def test_with_cpu_rehearsal_its_environment_is_there(real, megatron):
    done = run(slime_train_command("--plugins", "cpu"), real, [real, megatron])
    assert done.returncode == 0, done.stderr
    argv, imported, environment = json.loads(done.stdout)
    assert "--transformer-impl" in argv
    assert "slime" not in imported
    assert environment == "1"


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("file", "old", "new", "target"),
    [
        (
            "backends/megatron_utils/model.py",
            "def train_one_step(",
            "def train_one_more_step(",
            "slime.backends.megatron_utils.model:train_one_step",
        ),
        (
            "utils/arguments.py",
            "def get_slime_extra_args_provider(add_custom_arguments=None)",
            "def get_slime_extra_args_provider(custom)",
            "slime.utils.arguments:get_slime_extra_args_provider",
        ),
    ],
    ids=["renamed", "other arguments"],
)
def test_an_upstream_that_does_not_fit_ends_before_the_script(real, megatron, tmp_path, file, old, new, target):
    shutil.copytree(real / "slime", tmp_path / "slime")
    path = tmp_path / "slime" / file
    source = path.read_text()
    assert old in source, "the test renames what is there"
    path.write_text(source.replace(old, new))
    (tmp_path / "train.py").write_text("print('must not run')")
    done = run(slime_train_command("--plugins", "r3"), tmp_path, [tmp_path, megatron])
    assert done.returncode == 1
    assert target in done.stderr
    assert "nothing was changed and nothing was started" in done.stderr
    assert new.removeprefix("def ").partition("(")[0] in done.stderr, "the nearest match, or what was found"
    assert "must not run" not in done.stdout
    assert "Traceback" not in done.stderr


# -- our error inside Ray's ------------------------------------------------------------------------------------------


class Wrapper(Exception):
    """As Ray's RayTaskError: what went wrong is in `cause`."""

    def __init__(self, cause: object, text: str = "a worker died") -> None:
        super().__init__(text)
        self.cause = cause


class BothAtOnce(Wrapper, PluginError):
    """Ray makes a class of its own and the cause's, whose text is Ray's traceback."""

    def __str__(self) -> str:
        return "ray::actor.method() (pid=1) and a long traceback"


OURS = PatchError("it does not fit", {"target": "slime.a:b"}, "mend it")


def raised(
    error: BaseException, *, by: BaseException | None = None, during: BaseException | None = None
) -> BaseException:
    error.__cause__, error.__context__ = by, during
    error.__suppress_context__ = False  # setting a cause, even None, sets it
    return error


@pytest.mark.parametrize(
    "error",
    [
        OURS,
        Wrapper(OURS),
        Wrapper(Wrapper(OURS)),
        raised(RuntimeError("x"), by=OURS),
        raised(RuntimeError("x"), during=OURS),
        raised(RuntimeError("x"), by=Wrapper(raised(ValueError("y"), during=OURS))),
        BothAtOnce(OURS),
        Wrapper(BothAtOnce(OURS)),
        raised(BothAtOnce(OURS), during=RuntimeError("x")),
    ],
    ids=["itself", "cause", "deep cause", "from", "during", "mixed", "both", "deep both", "both during"],
)
def test_an_error_of_ours_is_found(error):
    assert plugin_error(error) is OURS


@pytest.mark.parametrize("error", [RuntimeError("x"), Wrapper("no exception"), Wrapper(ValueError("miles_plugins"))])
def test_an_error_that_is_not_ours_is_not_taken_for_it(error):
    assert plugin_error(error) is None


def test_a_circle_of_errors_ends():
    one, two = RuntimeError("x"), ValueError("y")
    one.__context__, two.__context__ = two, one
    assert plugin_error(one) is None


def test_an_error_that_took_the_place_of_ours_is_shown_itself():
    """`raise … from None`: the script dealt with our error and then met another one."""

    def handle():
        try:
            raise OURS
        except PluginError:
            raise KeyError("the real problem") from None

    with pytest.raises(KeyError) as caught:
        handle()
    assert plugin_error(caught.value) is None


def test_an_error_of_ours_is_found_in_quoted_text():
    text = (
        "The actor died because its worker ended while it started:\n"
        "Traceback (most recent call last):\n"
        '  File "/x/ray_worker.py", line 20, in setup\n'
        f"miles_plugins.errors.AttestationError: {AttestationError('not the same', {'here': 'a: b'}, 'install it')}\n"
        "\nMore of Ray's own words: exit code 1"
    )
    found = plugin_error(RuntimeError(text))
    assert str(found) == "not the same\n  here  a: b\n  next  install it"


def test_an_error_of_ours_in_the_script_is_shown_without_a_traceback(script):
    path = script(
        "from miles_plugins.errors import AttestationError\n"
        "try:\n    raise AttestationError('not everything is verified', {'1': 'trainer'})\n"
        "except Exception as error:\n    raise RuntimeError('a worker died') from error\n"
    )
    done = run(slime_train_command("--train-script", str(path)), path.parent)
    assert done.returncode == 1
    assert done.stderr == "\nslime-train: not everything is verified\n  1  trainer\n"


# -- slips that would train without a plugin ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plugin", "r3"], "there is no flag --plugin"),
        (["--lr", "1", "--plugin=r3"], "there is no flag --plugin=r3"),
        (["--plugins", "cpu", "r3", "--lr", "1"], "'r3' stands alone after --plugins cpu"),
        (["--plugins", "cpu,", "r3"], "'r3' stands alone"),
    ],
)
def test_a_slip_is_refused(argv, message):
    with pytest.raises(ArgumentError) as caught:
        slime_train.refuse_slips([], argv, [])
    assert message in str(caught.value)


def test_what_is_no_slip_passes():
    slime_train.refuse_slips([], ["--plugins", "cpu,r3", "--lr", "1"], [])
    slime_train.refuse_slips([], ["--plugins=cpu", "prompt", "--x"], [])
    slime_train.refuse_slips([], ["--plugin", "mine"], ["--plugin"])


def test_a_misspelt_plugin_is_said_before_slime_is_looked_for():
    with pytest.raises(PluginNotFoundError, match="rr3"):
        slime_train.refuse_slips(["rr3"], ["--plugins", "rr3"], [])
