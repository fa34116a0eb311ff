"""Behaviour under faults: what slime restarts is verified before it is used, and many processes activate at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from miles_plugins import attestation
from miles_plugins.activation import ACTIVE, DIGEST, RUN
from miles_plugins.attestation import Registry, engine_problems, problems
from miles_plugins.errors import AttestationError, PluginError
from miles_plugins.patches.slime import engines, processes, rollout_manager
from tests.test_upstream import rehearse, replayed_everywhere, third_party

if TYPE_CHECKING:
    from tests.test_ray_delivery import Cluster

THE_DIGEST = "0123456789abcdef"
ENGINE_ROLES = ("engine", "sglang_server", "sglang_scheduler", "sglang_detokenizer")
SIDES = {"r3_replay": ("sglang_scheduler",)}
NEEDED = {role: {f"{role}.report"} for role in ENGINE_ROLES}


def report(role: str, actor: str = "first", pid: int = 1, **changed: Any) -> dict[str, Any]:
    patch = {"id": f"{role}.report", "target": "slime.train:run", "state": "verified", "detail": "", "reason": "test"}
    return {
        "role": role,
        "pid": pid,
        "rank": "0",
        "actor": actor,
        "node": "here",
        "plugins": {"r3_replay": "0.1.0"},
        "digest": THE_DIGEST,
        "patches": [patch],
        "probes": {"r3_replay": "works"},
        **changed,
    }


def engine(actor: str = "first", rank: str = "0") -> list[dict[str, Any]]:
    """What an engine and the three processes of its server report."""
    own = report("engine", actor, rank=rank, children=dict.fromkeys(ENGINE_ROLES[1:], 1))
    return [own, *(report(role, actor, rank=rank) for role in ENGINE_ROLES[1:])]


# -- the registry ----------------------------------------------------------------------------------------------------


def test_what_a_restarted_actor_reports_takes_the_place_of_what_it_reported_before() -> None:
    registry = Registry()
    registry.add(engine("first"))
    registry.add(engine("other", rank="1"))
    registry.add([report("trainer", rank="actor 0")])
    before = registry.changes()
    registry.add(engine("second"))
    assert registry.changes() != before
    assert [each["actor"] for each in registry.all() if each["role"] in ENGINE_ROLES] == ["second"] * 4 + ["other"] * 4
    assert [each.get("restarts") for each in registry.all()] == [1, *[None] * 8]
    registry.add(engine("third"))
    assert registry.all()[0]["restarts"] == 2


def test_a_server_process_that_no_longer_reports_is_not_remembered() -> None:
    registry = Registry()
    registry.add(engine("first"))
    registry.add(engine("second")[:-1])
    assert [each["role"] for each in registry.all()] == list(ENGINE_ROLES[:-1])


# -- what keeps a restarted engine from being used -------------------------------------------------------------------


def found(reports: list[dict[str, Any]], *actors: str) -> list[str]:
    return engine_problems(reports, actors, THE_DIGEST, SIDES, NEEDED)


def test_an_engine_whose_processes_all_reported_is_used() -> None:
    assert found([*engine("first"), *engine("second")], "first", "second") == []


def test_the_reports_of_the_engine_before_it_do_not_count() -> None:
    problems = found(engine("first"), "second")
    assert "engine actor second: engine: 0 of 1 processes reported" in problems


@pytest.mark.parametrize("at", range(4))
def test_a_process_of_its_server_that_did_not_report_is_named(at: int) -> None:
    reports = engine()
    role = reports.pop(at)["role"]
    assert f"engine actor first: {role}: 0 of 1 processes reported" in found(reports, "first")


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "runs another plugin set": lambda report: report.update(digest="ffff"),
    "is failed": lambda report: report["patches"][0].update(state="failed"),
    "runs without patch": lambda report: report["patches"][0].update(state="armed"),
    "runs without patch ": lambda report: report["patches"].clear(),
}


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_process_is_named(at: int, damage: str) -> None:
    reports = engine()
    DAMAGES[damage](reports[at])
    (problem, *_) = found(reports, "first")
    assert damage in problem
    assert f"{ENGINE_ROLES[at]} (pid 1 on here)" in problem


def test_a_restarted_engine_must_show_the_plugins_evidence() -> None:
    reports = engine()
    reports[2]["probes"] = {}
    assert found(reports, "first") == [
        "engine actor first: plugin r3_replay showed no evidence in 1 sglang_scheduler process(es)"
    ]


def test_a_patch_that_upstream_supersedes_is_there() -> None:
    reports = engine()
    reports[1]["patches"][0]["state"] = "superseded"
    assert found(reports, "first") == []


def test_a_patch_that_a_role_needs_keeps_training_from_beginning() -> None:
    assert problems([report("trainer")], THE_DIGEST, {"trainer": 1}, {}, {"trainer": {"trainer.report"}}) == []
    (problem,) = problems([report("trainer")], THE_DIGEST, {"trainer": 1}, {}, {"trainer": {"slime.weights.export"}})
    assert problem == "trainer (pid 1 on here) runs without patch slime.weights.export"


# -- the rollout manager ---------------------------------------------------------------------------------------------


class Handle:
    """An engine's Ray handle, as far as it is used (a mock)."""

    def __init__(self, name: str) -> None:
        self._actor_id = SimpleNamespace(hex=lambda: name)
        self.__ray_call__ = SimpleNamespace(remote=lambda ask: ask(self.process))
        self.process = SimpleNamespace(server_host=name, server_port=15000, node_rank=0)


class SlimesManager:
    """slime's RolloutManager, as far as it is used (a mock): `recover` starts what is dead, as slime's does."""

    def __init__(self, args: Any, pg: Any) -> None:
        self.args = args
        group = [Handle("one"), Handle("two")]
        self.server = SimpleNamespace(router_ip="router", router_port=1, engines=group, all_engines=group)
        frozen = [Handle("frozen")]
        self.servers = {"actor": self.server, "ref": SimpleNamespace(engines=frozen, all_engines=frozen)}

    def _get_updatable_server(self) -> Any:
        return self.server

    def recover_updatable_engines(self) -> None:
        group = self.server.all_engines
        group[:] = [Handle("new") if each is None else each for each in group]

    def generate(self, rollout_id: int) -> str:
        return f"rollout {rollout_id}"

    def eval(self, rollout_id: int) -> str:
        return f"evaluation {rollout_id}"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of the plugins, and which engines are compared; the registry and Ray are mocks."""
    told: list[Any] = []
    activation = SimpleNamespace(
        run="run",
        report=lambda: report("rollout_manager", rank=None),
        hook=SimpleNamespace(
            rollout_ready=lambda args, router_url, engine_urls: told.append((router_url, engine_urls))
        ),
    )
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda references: references))
    for module in (engines, rollout_manager):
        monkeypatch.setattr(module, "current", lambda: activation)
    monkeypatch.setattr(attestation, "send", lambda run, reports: told.append("sent"))
    monkeypatch.setattr(engines, "require_engines", lambda actors: told.append(actors))
    return told


@pytest.fixture
def manager(told: list[Any]) -> Any:
    made = rollout_manager._subclass(SlimesManager)("args", "pg")
    assert told == [["frozen", "one", "two"], ("http://router:1", ["http://one:15000", "http://two:15000"]), "sent"]
    told.clear()
    return made


def test_nothing_is_asked_again_while_no_engine_is_restarted(manager: Any, told: list[Any]) -> None:
    manager.recover_updatable_engines()
    assert manager.generate(1) == "rollout 1"
    assert manager.eval(1) == "evaluation 1"
    assert told == []


@pytest.mark.parametrize("use", ["generate", "eval"])
def test_a_restarted_engine_is_verified_before_it_gets_weights_and_probed_before_it_is_asked(
    manager: Any, told: list[Any], use: str
) -> None:
    manager.server.all_engines[1] = None
    manager.generate(1)
    assert told == []
    manager.recover_updatable_engines()
    assert told == [["new"]]
    getattr(manager, use)(2)
    assert told == [["new"], ("http://router:1", ["http://new:15000"])]
    manager.generate(3)
    assert len(told) == 2


def test_an_engine_that_was_put_there_in_another_way_is_verified_too(manager: Any, told: list[Any]) -> None:
    manager.server.all_engines[0] = Handle("put")
    manager.generate(1)
    assert told == [["put"], ("http://router:1", ["http://put:15000"])]


def test_an_engine_that_is_not_verified_is_not_used(
    manager: Any, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(actors: list[str]) -> None:
        raise AttestationError(f"not {actors}")

    monkeypatch.setattr(engines, "require_engines", refuse)
    manager.server.all_engines[1] = None
    for step in (manager.recover_updatable_engines, lambda: manager.generate(2), lambda: manager.eval(2)):
        with pytest.raises(AttestationError, match=r"not \['new'\]"):
            step()
    assert told == []


def test_a_restarted_engine_that_a_plugin_refuses_is_not_used(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: Any) -> None:
        raise PluginError("no routing arrives")

    monkeypatch.setattr(engines.current().hook, "rollout_ready", refuse)
    manager.server.all_engines[1] = None
    manager.recover_updatable_engines()
    for _ in range(2):
        with pytest.raises(PluginError, match="no routing"):
            manager.generate(2)


# -- the driver ------------------------------------------------------------------------------------------------------


def test_the_driver_compares_again_only_when_something_was_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, compared = Registry(), []
    remote = SimpleNamespace(changes=SimpleNamespace(remote=registry.changes))
    ray = SimpleNamespace(get=lambda result: result, get_actor=lambda name: remote)  # a mock
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(processes, "current", lambda: SimpleNamespace(run="run"))
    monkeypatch.setattr(processes, "_compared", 0)
    monkeypatch.setattr(processes, "require_all_processes", lambda *asked: compared.append(asked))
    group = SimpleNamespace(args="args")

    assert processes.verify_again(lambda group: "sent", group) == "sent"
    assert compared == []
    registry.add(engine())
    assert processes.verify_again(lambda group: "sent", group) == "sent"
    assert compared == [("args", "training does not go on")]


def test_the_processes_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes.write_processes(tmp_path / "run", engine("first"))
    processes.write_processes(tmp_path / "run", engine("second"))
    assert json.loads((tmp_path / "run" / "processes.json").read_text()) == engine("second")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["processes.json"]

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space"):
        processes.write_processes(tmp_path / "run", engine("third"))
    assert json.loads((tmp_path / "run" / "processes.json").read_text()) == engine("second")


def write_half(file: Path, text: str) -> None:
    """A disk that is full, or a process that is killed while it writes."""
    file.write_bytes(text[: len(text) // 2].encode())
    raise OSError("no space left on device")


# -- many at once ----------------------------------------------------------------------------------------------------

WORKERS = 100
WORKER = """
import sys
from miles_plugins import attestation
from miles_plugins.activation import current
from miles_plugins.entrypoints.ray_worker import setup
print("ready", flush=True)
sys.stdin.read()  # ends for all workers at once
setup()
attestation.write_child_report(current().run, current().report())
"""


class Workers:
    """Processes that activate at once, as Ray's workers do, and leave their reports in one folder; no Ray, no torch."""

    def __init__(self, environment: dict[str, str], count: int, folder: Path) -> None:
        start, self._hold = os.pipe()
        self._log = (folder / "workers.log").open("w+")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER],
                env=environment,
                stdin=start,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
            for _ in range(count)
        ]
        os.close(start)

    def begin(self) -> None:
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", self.log()
        os.close(self._hold)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self._log.close()


@pytest.fixture
def start_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Workers]]:
    """Start the workers of a run whose driver has the metrics plugin; nobody has made its folder yet."""
    from miles_plugins.manager import Plugins

    monkeypatch.setattr(attestation.tempfile, "gettempdir", lambda: str(tmp_path))
    run = {ACTIVE: "metrics_jsonl", DIGEST: Plugins.named(["metrics_jsonl"]).digest, RUN: "run"}
    started: list[Workers] = []

    def start(count: int, **changed: str) -> Workers:
        environment = {**os.environ, **run, attestation.ENGINE: "e", "TMPDIR": str(tmp_path), **changed}
        started.append(Workers(environment, count, tmp_path))
        return started[-1]

    yield start
    for workers in started:
        workers.stop()


def test_a_hundred_workers_that_start_at_once_are_all_verified(start_workers: Callable[..., Workers]) -> None:
    workers = start_workers(WORKERS)
    pids = {process.pid for process in workers.processes}
    workers.begin()
    deadline = time.monotonic() + 120
    reports: list[dict[str, Any]] = []
    while len(reports) < WORKERS and time.monotonic() < deadline:
        reports = attestation.read_child_reports("run", "e")  # at all times: whole reports of these processes, or none
        assert {each["pid"] for each in reports} <= pids
        time.sleep(0.01)
    assert [process.wait(timeout=60) for process in workers.processes] == [0] * WORKERS, workers.log()
    assert {each["pid"] for each in reports} == pids
    assert problems(reports, reports[0]["digest"], {"worker": WORKERS}, {}) == []
    assert {each.suffix for each in attestation.folder("run").iterdir()} == {".json"}
    registry = Registry()
    for each in reports:
        registry.add([{**each, "rank": str(each["pid"])}])
    assert len(registry.all()) == registry.changes() == WORKERS
    attestation.forget_child_reports("run", "e")
    assert list(attestation.folder("run").iterdir()) == []


def test_a_folder_that_another_process_makes_at_the_same_moment_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too short a moment for processes to meet in it reliably."""
    mkdir = Path.mkdir

    def mkdir_second(folder: Path, *args: Any, **kwargs: Any) -> None:
        os.mkdir(folder, 0o700)
        mkdir(folder, *args, **kwargs)

    monkeypatch.setattr(attestation.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(Path, "mkdir", mkdir_second)
    assert attestation.folder("run").is_dir()


def test_a_report_that_is_half_written_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attestation.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv(attestation.ENGINE, "e")
    with monkeypatch.context() as half:
        half.setattr(Path, "write_text", write_half)
        with pytest.raises(OSError, match="no space"):
            attestation.write_child_report("run", report("sglang_scheduler"))
    assert attestation.read_child_reports("run", "e") == []
    attestation.write_child_report("run", report("sglang_scheduler"))
    assert attestation.read_child_reports("run", "e") == [report("sglang_scheduler")]


def test_workers_with_another_plugin_set_are_refused_and_leave_no_report(start_workers: Callable[..., Workers]) -> None:
    workers = start_workers(3, **{DIGEST: "ffff"})
    workers.begin()
    assert [process.wait(timeout=60) for process in workers.processes] == [1] * 3
    assert workers.log().count("are not the driver's") == 3
    assert attestation.read_child_reports("run", "e") == []


# -- real Ray --------------------------------------------------------------------------------------------------------

SLIMES_ENGINE = """
class SGLangEngine:
    rank = 0

    def init(self):
        pass


def launch_server_process(server_args):
    pass
"""
RESTARTS = """
from miles_plugins.activation import activate, current
activation = activate(["steady"], "driver", environment={})
import json, os, signal, sys, ray
from pathlib import Path
from types import SimpleNamespace
ray.init()
from miles_plugins.errors import AttestationError
from miles_plugins.patches.slime import engines

from slime.backends.sglang_utils.sglang_engine import SGLangEngine

class Engine(SGLangEngine):
    def pretend(self, digest):  # a process that does not refuse itself
        from miles_plugins.activation import current
        report = current().report
        current().report = lambda: {**report(), "digest": digest}

    def pid(self):
        return os.getpid()

def start():  # its own variables: Ray starts a new process, as it does for slime's engines
    return ray.remote(num_cpus=0)(Engine).options(runtime_env={"env_vars": {"ENGINE": "1"}}).remote()

group = [start()]
manager = SimpleNamespace(servers={"actor": SimpleNamespace(all_engines=group)})
known = engines.Engines(manager)
ray.get(group[0].init.remote())
told = {"pids": [ray.get(group[0].pid.remote())]}
known.verify()
reported = lambda: [(each["pid"], each.get("restarts")) for each in ray.get(activation.registry.all.remote())]
told["first"] = reported()

os.kill(told["pids"][0], signal.SIGKILL)
try:
    ray.get(group[0].pid.remote())
except ray.exceptions.RayActorError as error:
    told["killed"] = type(error).__name__

def refused():
    try:
        known.verify()
    except AttestationError as error:
        return str(error)

group[0] = start()
ray.get(group[0].pid.remote())
told["unreported"] = refused()
ray.get(group[0].pretend.remote("ffff"))
ray.get(group[0].init.remote())
told["another"] = refused()
ray.kill(group[0])
group[0] = start()
ray.get(group[0].init.remote())
told["pids"].append(ray.get(group[0].pid.remote()))
known.verify()
told["second"] = reported()
ray.kill(group[0])
print(json.dumps(told), flush=True)

plugin = Path(sys.modules["steady"].__file__)
plugin.write_text(plugin.read_text().replace("steady as ever", "changed"))
group[0] = start()
ray.get(group[0].init.remote())
"""


@pytest.fixture
def plugin_folder(tmp_path: Path) -> Path:
    """A plugin, and slime's engine actor without a server (a mock), where slime has it."""
    module = tmp_path / "slime" / "backends" / "sglang_utils" / "sglang_engine.py"
    module.parent.mkdir(parents=True)
    for folder in list(module.parents)[:3]:
        (folder / "__init__.py").touch()
    module.write_text(SLIMES_ENGINE)
    code = "SIDES = ('engine',)\n\n@hookimpl\ndef probe():\n    return 'steady as ever'\n"
    return third_party(tmp_path, "steady", code)


@pytest.fixture
def cluster(plugin_folder: Path) -> Iterator[Cluster]:
    pytest.importorskip("ray")
    from tests.test_ray_delivery import Cluster

    # Ray's sockets live below this folder, and a socket's path is short.
    paths = os.pathsep.join(filter(None, [str(plugin_folder), os.environ.get("PYTHONPATH")]))
    running = Cluster(Path(tempfile.mkdtemp(prefix="mp-", dir="/tmp")), {"PYTHONPATH": paths})
    yield running
    running.stop()


def test_a_killed_engine_actor_is_replaced_by_one_that_is_verified_or_refused(cluster: Cluster) -> None:
    """Real actors and a real kill; what is not real is the SGLang server that the actor would have."""
    result = cluster.run(RESTARTS)
    answers = [line for line in result.stdout.splitlines() if line.startswith("{")]  # Ray logs to it too
    assert answers, result.stderr
    told = json.loads(answers[0])
    first, second = told["pids"]
    assert told["first"] == [[first, None]]
    assert told["killed"] == "ActorDiedError"
    assert "engine: 0 of 1 processes reported" in told["unreported"]
    assert "runs another plugin set" in told["another"]
    assert "digest ffff not" in told["another"]
    assert told["second"] == [[second, 2]]
    # At last the plugin's code has changed on disk: the new process refuses itself.
    assert result.returncode != 0
    assert "are not the driver's" in result.stderr, result.stderr


# -- the real stack --------------------------------------------------------------------------------------------------

FAULTS = """
import json, os, signal, time
from pathlib import Path

FOLDER = Path(__file__).parent
PLAN = json.loads((FOLDER / "plan.json").read_text())  # rollout -> which process to kill, which to wait for
rollouts = 0


def process_of(place):
    processes = json.loads((Path(os.environ["MILES_PLUGINS_RUN_DIR"]) / "processes.json").read_text())
    return next(each["pid"] for each in processes if [each["role"], each["rank"]] == place)


@hookimpl
def rollout_ready(engine_urls):
    with (FOLDER / "probed").open("a") as file:
        file.write(json.dumps([rollouts, list(engine_urls)]) + chr(10))


@hookimpl
def receive_response():
    if (fault := PLAN.pop(str(rollouts), None)) is None:
        return
    killed, awaited = map(process_of, fault)
    os.kill(killed, signal.SIGKILL)
    with (FOLDER / "killed").open("a") as file:
        file.write(json.dumps([rollouts, killed, time.time()]) + chr(10))
    # The rest of the rollout takes less time than a health check.
    deadline = time.monotonic() + 120
    while Path(f"/proc/{awaited}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)


@hookimpl
def receive_samples():
    global rollouts
    rollouts += 1
"""
TOLERANT = "--use-fault-tolerance --rollout-health-check-interval 1 --rollout-health-check-timeout 30".split()


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.upstream
@pytest.mark.usefixtures("upstream_path")
def test_after_a_scheduler_is_killed_the_restarted_engine_is_verified_and_a_killed_trainer_ends_the_run(
    slime: Path, megatron: Path, tmp_path: Path
) -> None:
    """slime restarts engines, and no trainers. A second engine finishes the rollout in which the first one dies."""
    path = third_party(tmp_path, "faults", FAULTS)
    scheduler, trainer = ["sglang_scheduler", "1"], ["trainer", "actor 0"]
    (tmp_path / "plan.json").write_text(json.dumps({"1": [scheduler, ["engine", "1"]], "3": [trainer, trainer]}))
    folder = tmp_path / "run"
    options = ["--plugins", "r3,faults", "--engines", "2", "--rollouts", "4", "--", *TOLERANT]
    result = rehearse(slime, megatron, folder, *options, path=path)
    ended = time.time()
    log = (folder / "slime.log").read_text()
    (first, killed_scheduler, _), (last, killed_trainer, when) = lines(tmp_path / "killed")

    assert (first, last) == (1, 3)
    assert result.returncode == 1, result.stderr
    assert ended - when < 60, "the run went on without its trainer"
    answer = json.loads(result.stdout)
    assert [row["rollout"] for row in answer["rollouts"]] == [0, 1, 2], log[-4000:]
    replayed_everywhere(answer)
    assert all(row["logprob_difference"] < 0.01 for row in answer["rollouts"])

    restarted = {each["role"]: each for each in answer["processes"] if each["rank"] == "1"}
    assert set(restarted) == set(ENGINE_ROLES)
    assert restarted["engine"]["restarts"] == 1
    assert restarted["sglang_scheduler"]["pid"] != killed_scheduler
    for role, each in restarted.items():
        states = {patch["id"]: patch["state"] for patch in each["patches"]}
        assert (
            states[f"{'slime' if role == 'engine' else 'sglang'}.{role.removeprefix('sglang_')}.report"] == "verified"
        )
    assert "r3_replay" in restarted["sglang_scheduler"]["probes"]

    (at_start, both), (again, new) = lines(tmp_path / "probed")
    assert (at_start, len(both), again, len(new)) == (0, 2, 2, 1)
    assert "plugins verified in 1 restarted engine(s)" in log
    assert log.count("plugins verified: ") == 2
    assert str(killed_trainer) in log
