"""One process activates one set of plugins, once, and hands it on to others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from miles_plugins import activation, hookimpl
from miles_plugins.activation import ACTIVE, DIGEST, ROLE, RUN, USER_SETUP_HOOK, Activation
from miles_plugins.errors import AttestationError, PatchError, PluginError
from miles_plugins.manager import Installed, Plugin, Plugins
from miles_plugins.patches.ray import workers
from miles_plugins.patching import Patch, PatchSet

ROOT = Path(__file__).resolve().parents[1]
PRELUDE = """
import json, os, sys
from miles_plugins import activation
from miles_plugins.activation import activate, activate_from_environment, current, is_active
from miles_plugins.errors import PluginError
"""


def run(script: str, environment: Mapping[str, str] | None = None) -> dict:
    """What a Python process of its own prints last, as JSON."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MILES_PLUGINS")}
    inherited["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env=inherited | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ENVIRONMENT = 'print(json.dumps(activate({names}, "driver", environment={{}}).environment))'
SAY = """
active = activate_from_environment("worker")
print(json.dumps(active and [active.plugins.names, active.plugins.digest, active.run, active.role]))
"""
CATCH = """
try:
    {code}
except PluginError as error:
    print(json.dumps([error.message, {{name: str(value) for name, value in error.facts.items()}}]))
"""


# -- from one process to the next ------------------------------------------------------------------------------------


def test_the_environment_carries_the_set_to_another_process():
    environment = run(ENVIRONMENT.format(names=["metrics", "r3"]))
    assert environment[ACTIVE] == "metrics_jsonl,r3_replay"
    assert run(SAY, environment) == [["metrics_jsonl", "r3_replay"], environment[DIGEST], environment[RUN], "worker"]


def test_every_run_has_a_name_of_its_own():
    one, two = (run(ENVIRONMENT.format(names=["metrics"])) for _ in range(2))
    assert one[DIGEST] == two[DIGEST]
    assert one[RUN] != two[RUN]


def test_with_the_variable_unset_nothing_happens():
    script = SAY + "print(json.dumps([active, is_active(), 'miles_plugins.r3_replay.plugin' in sys.modules]))"
    assert run(script) == [None, False, False]
    assert run(script, {ACTIVE: ""}) == [None, False, False]


def test_a_process_with_other_code_is_refused_with_both_digests():
    environment = run(ENVIRONMENT.format(names=["metrics"]))
    here = environment[DIGEST]
    message, facts = run(CATCH.format(code="activate_from_environment('worker')"), environment | {DIGEST: "f" * 16})
    assert "not the driver's" in message
    assert facts["driver"] == "f" * 16
    assert facts["here"] == here
    assert "metrics_jsonl" in facts["plugins"]


def test_a_refused_process_is_not_active():
    script = CATCH.format(code="activate_from_environment('worker')") + "print(json.dumps(is_active()))"
    assert run(script, {ACTIVE: "metrics", DIGEST: "f" * 16}) is False


def test_a_process_without_the_plugin_says_so():
    message, facts = run(CATCH.format(code="activate_from_environment('worker')"), {ACTIVE: "metrics_jsonl,nonsense"})
    assert "'nonsense'" in message
    assert "r3_replay" in facts["known"]


# -- once ------------------------------------------------------------------------------------------------------------


def test_activation_is_idempotent():
    script = """
    first = activate(["metrics", "r3"], "driver", environment={})
    again = activate(["r3_replay", "metrics-jsonl"], "worker", environment={})
    print(json.dumps([first is again, first is current(), first.role]))
    """
    assert run(script) == [True, True, "driver"]


@pytest.mark.parametrize("other", [["r3"], ["metrics", "r3"]])
def test_another_set_in_the_same_process_is_refused(other):
    code = f"activate(['metrics'], 'driver', environment={{}}); activate({other}, 'driver', environment={{}})"
    message, facts = run(CATCH.format(code=code))
    assert "another plugin set" in message
    assert facts == {"active": "metrics_jsonl", "asked for": ", ".join(other)}


def test_without_a_set_the_current_one_is_an_error():
    message, _ = run(CATCH.format(code="current()"))
    assert "not active" in message


def test_activating_imports_nothing_of_upstream():
    script = """
    activate(["cpu", "r3", "metrics"], "driver", environment={})
    print(json.dumps([name for name in ("torch", "ray", "slime", "megatron", "sglang", "transformers")
                      if name in sys.modules]))
    """
    assert run(script) == []


def test_a_process_whose_patches_do_not_fit_is_not_active(tmp_path):
    """A second call must not hand out what the first one could not set up."""
    (tmp_path / "slime" / "utils").mkdir(parents=True)
    for folder in (tmp_path / "slime", tmp_path / "slime" / "utils"):
        (folder / "__init__.py").write_text("")
    (tmp_path / "slime" / "utils" / "logging_utils.py").write_text("def log(another, signature, altogether): pass")
    script = """
    import slime.utils.logging_utils
    outcomes = []
    for _ in range(2):
        try:
            activate(["metrics"], "trainer", environment={})
            outcomes.append("active")
        except PluginError as error:
            outcomes.append(type(error).__name__)
    print(json.dumps(outcomes))
    """
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert run(script, {"PYTHONPATH": path}) == ["PatchError", "PatchError"]


# -- what a process says of itself -----------------------------------------------------------------------------------


def plugins(**implementations) -> Plugins:
    module = ModuleType("a")
    vars(module).update({"__file__": "", **{name: hookimpl(value) for name, value in implementations.items()}})
    return Plugins([Plugin(Installed("a", "some-plugins", "1.0", None), module)])


@pytest.fixture
def layer(monkeypatch):
    """The plugin layer of a process with one made-up plugin, and with given patches only."""

    def make(*patches: Patch, role: str = "trainer", **implementations) -> Activation:
        monkeypatch.setattr(activation, "needed_seams", lambda plugins, host: [])
        made = Activation(plugins(**implementations), role, "run")
        made.patches = PatchSet(*patches)
        monkeypatch.setattr(activation, "_current", made)
        return made

    return make


def test_a_report_is_plain_and_says_who_runs_what(layer):
    made = layer(probe=lambda role: f"works as {role}")
    made.rank = "actor 0"
    report = json.loads(json.dumps(made.report()))
    assert report.pop("node")
    assert report == {
        "role": "trainer",
        "pid": os.getpid(),
        "rank": "actor 0",
        "plugins": {"a": "1.0"},
        "digest": made.plugins.digest,
        "patches": [],
        "probes": {"a": "works as trainer"},
    }


def test_a_plugin_without_evidence_is_absent_from_the_probes(layer):
    assert layer(probe=lambda role: None).report()["probes"] == {}


def test_a_probe_that_fails_ends_the_report(layer):
    def probe(role):
        raise PluginError("it does not work")

    with pytest.raises(PluginError, match="it does not work"):
        layer(probe=probe).report()


def test_a_patch_that_its_role_needs_must_be_verified(layer):
    waiting = Patch(
        id="x", target="never_imported:f", wrap=print, reason="test", roles=frozenset({"trainer", "engine"})
    )
    made = layer(waiting)
    made.patches.arm()
    with pytest.raises(AttestationError, match=r"trainer \(pid ") as caught:
        made.report()
    assert "armed: never_imported:f" in caught.value.facts["x"]
    made.role = "driver"
    assert made.report()["patches"][0]["state"] == "armed"
    made.patches.undo()


def test_check_collects_notes_of_every_role_and_raises_for_a_misfit(layer, monkeypatch):
    made = layer()
    absent = Patch(id="x", target="not_installed_at_all:f", wrap=print, reason="test")
    misfit = Patch(id="y", target="json:dumps_to_nothing", wrap=print, reason="test")
    made.seams = [SimpleNamespace(here=lambda: (absent,))]
    assert made.check() == ["not installed here: not_installed_at_all"]
    made.seams.append(SimpleNamespace(here=lambda: (misfit,)))
    with pytest.raises(PatchError, match="y"):
        made.check()


def test_what_plugins_want_in_an_environment_never_overrides_the_users(monkeypatch):
    monkeypatch.setenv("OF_THE_USER", "mine")
    monkeypatch.delenv("NEW", raising=False)
    monkeypatch.setattr(activation, "needed_seams", lambda plugins, host: [])
    wants = plugins(process_environment=lambda role: {"OF_THE_USER": "yours", "NEW": role})
    made = Activation(wants, "driver", "run")
    assert made.process_environment("trainer") == {"NEW": "trainer"}
    os.environ.update(made.process_environment("driver"))
    assert made.process_environment("worker") == {"NEW": "worker"}, "what we set ourselves is not the user's"
    monkeypatch.delenv("NEW")


# -- in a Ray worker -------------------------------------------------------------------------------------------------


SETUP = """
from miles_plugins.entrypoints.ray_worker import setup
setup()
print(json.dumps(is_active() and [current().role, current().plugins.digest, current().run]))
"""


def test_a_ray_worker_activates_the_drivers_set():
    environment = run(ENVIRONMENT.format(names=["metrics"]))
    assert run(SETUP, environment) == ["worker", environment[DIGEST], environment[RUN]]
    assert run(SETUP, environment | {ROLE: "trainer"})[0] == "trainer"
    assert run(SETUP) is False


def test_a_ray_worker_runs_the_users_own_setup_hook_after_ours(tmp_path):
    (tmp_path / "ray" / "_private" / "runtime_env").mkdir(parents=True)
    for folder in ("ray", "ray/_private", "ray/_private/runtime_env"):
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "ray" / "_private" / "runtime_env" / "setup_hook.py").write_text(
        "def load_and_execute_setup_hook(name):\n"
        "    from miles_plugins.activation import is_active\n"
        "    return f'{name}: active {is_active()}'\n"
    )
    script = """
    from miles_plugins.entrypoints.ray_worker import setup
    try:
        setup()
    except RuntimeError as error:
        print(json.dumps(str(error)))
    """
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    said = run(script, {"PYTHONPATH": path, ACTIVE: "metrics_jsonl", USER_SETUP_HOOK: "mine.setup"})
    assert said.endswith("mine.setup: active True")


OURS = {ACTIVE: "metrics_jsonl", DIGEST: "d", RUN: "r"}


@pytest.fixture
def _no_job(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)


@pytest.mark.usefixtures("_no_job")
def test_the_runtime_environment_keeps_what_the_user_put_there():
    theirs = {"env_vars": {"A": "1"}, "working_dir": "/x"}
    made = workers.with_setup_hook(theirs, OURS)
    assert made == {
        "env_vars": {"A": "1", **OURS},
        "working_dir": "/x",
        "worker_process_setup_hook": workers.SETUP_HOOK,
    }
    assert theirs == {"env_vars": {"A": "1"}, "working_dir": "/x"}


@pytest.mark.usefixtures("_no_job")
def test_the_users_setup_hook_is_chained_once():
    first = workers.with_setup_hook({"worker_process_setup_hook": "mine.setup"}, OURS)
    assert first["worker_process_setup_hook"] == workers.SETUP_HOOK
    assert first["env_vars"][USER_SETUP_HOOK] == "mine.setup"
    assert workers.with_setup_hook(first, OURS) == first, "ours is not chained to ours"


@pytest.mark.usefixtures("_no_job")
def test_a_setup_hook_that_is_a_function_is_refused():
    with pytest.raises(PluginError, match="function"):
        workers.with_setup_hook({"worker_process_setup_hook": print}, OURS)


def test_the_jobs_own_setup_hook_is_taken_out_and_chained(monkeypatch):
    """Ray refuses a key that both `ray job submit --runtime-env` and the driver set."""
    job = {"runtime_env": {"worker_process_setup_hook": "job.setup", "env_vars": {"A": "1", ACTIVE: "stale"}}, "x": 1}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    made = workers.with_setup_hook({}, OURS)
    assert made["env_vars"][USER_SETUP_HOOK] == "job.setup"
    left = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])
    assert left == {"runtime_env": {"env_vars": {"A": "1"}}, "x": 1}
    again = workers.with_setup_hook({}, OURS, made["env_vars"][USER_SETUP_HOOK])  # Ray is started a second time
    assert again["env_vars"][USER_SETUP_HOOK] == "job.setup"


@pytest.mark.parametrize("how", ["argument", "keyword", "environment"])
def test_ray_client_is_refused(layer, monkeypatch, how):
    layer(role="driver")
    arguments = ("ray://head:10001",) if how == "argument" else ()
    keywords = {"address": "ray://head:10001"} if how == "keyword" else {}
    if how == "environment":
        monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(PluginError, match="Ray Client") as caught:
        workers.init(pytest.fail, *arguments, **keywords)
    assert caught.value.facts["address"] == "ray://head:10001"


def test_ray_init_of_a_worker_is_left_alone(layer):
    layer(role="trainer")
    assert workers.init(lambda *args, **kwargs: (args, kwargs), "auto", num_cpus=1) == (("auto",), {"num_cpus": 1})
