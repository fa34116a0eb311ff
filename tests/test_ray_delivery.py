"""The plugins reach every Ray worker and its spawned children, or the run ends and says why: real Ray, on loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray")

LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_AUTH_MODE": "disabled",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """A Ray head of our own, stopped by its process tree."""

    def __init__(self, folder: Path, environment: dict[str, str], dashboard: int | None = None) -> None:
        self.folder = folder
        # Between asking for a free port and using it, another test's Ray may have taken it.
        for _ in range(3):
            self._start(environment, dashboard)
            if self._is_up():
                return
            self.stop()
        raise RuntimeError("three Ray heads in a row did not start")

    def _start(self, environment: dict[str, str], dashboard: int | None) -> None:
        self.folder.mkdir(exist_ok=True)
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {**os.environ, **LOOPBACK, **environment, "RAY_ADDRESS": self.address}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "2"]
        command += ["--node-ip-address", "127.0.0.1", "--port", self.address.split(":")[1]]
        command += ["--ray-client-server-port", str(free_port()), "--include-dashboard", str(dashboard is not None)]
        command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard or free_port())]
        # Ports that two clusters on one machine would otherwise share.
        for name in ("dashboard-agent-listen-port", "metrics-export-port", "runtime-env-agent-port"):
            command += [f"--{name}", str(free_port())]
        command += ["--temp-dir", str(self.folder), "--object-store-memory", str(128 * 2**20)]
        self.log = (self.folder / "head.log").open("w")
        self.head = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)

    def _is_up(self, patience: float = 60) -> bool:
        """Whether the head has started all that belongs to it; then it says so and stays."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and self.head.poll() is None:
            if "Ray runtime started" in (self.folder / "head.log").read_text():
                return True
            time.sleep(0.2)
        return False

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a driver script to its end."""
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )

    def stop(self) -> None:
        """Also of a head that has ended by itself, whose processes are nobody's children then."""
        processes = [each for each in psutil.process_iter(["cmdline"]) if str(self.folder) in str(each.info["cmdline"])]
        with suppress(psutil.NoSuchProcess):
            processes += psutil.Process(self.head.pid).children(recursive=True)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.head.kill()
        self.head.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def plugin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third party's distribution with one plugin, importable from this folder."""
    folder = tmp_path_factory.mktemp("third_party")
    (folder / "hello_ray.py").write_text(
        '"""Say hello."""\nfrom miles_plugins import hookimpl\n\nSIDES = ("engine",)\n\n'
        "@hookimpl\ndef probe(role):\n    return f'hello from {role}'\n"
    )
    info = folder / "hello_ray-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hello-ray\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[miles_plugins]\nhello_ray = hello_ray\n")
    return folder


def test_a_head_that_does_not_start_is_stopped_and_another_one_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tempfile.mkdtemp(prefix="mp-", dir="/tmp"))
    start = Cluster._start
    heads = []

    def first_fails(self: Cluster, environment: dict[str, str], dashboard: int | None) -> None:
        start(self, environment, dashboard)
        if not heads:
            self.head.kill()
            self.head.wait()
        heads.append(self.head.pid)

    monkeypatch.setattr(Cluster, "_start", first_fails)
    running = Cluster(folder, {})
    running.stop()
    assert len(set(heads)) == 2
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(folder) in str(each.info["cmdline"])]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, plugin_folder: Path) -> Iterator[Cluster]:
    # Ray's sockets live below this folder, and a socket's path is short.
    folder = Path(tempfile.mkdtemp(prefix="mp-", dir="/tmp"))
    running = Cluster(folder, {"PYTHONPATH": str(plugin_folder)})
    yield running
    running.stop()


BEGIN = """
from miles_plugins.activation import activate, current
activation = activate(["hello"], "driver", environment={})
import json, os, sys, ray
"""


def test_actor_is_activated_before_its_module_is_imported(cluster: Cluster, plugin_folder: Path) -> None:
    (plugin_folder / "late.py").write_text(
        "from miles_plugins.activation import is_active\nactive_at_import = is_active()\n"
        "class Late:\n    def state(self):\n        from miles_plugins.activation import current\n"
        "        return active_at_import, current().role, current().plugins.names, current().plugins.digest\n"
    )
    result = cluster.run(
        BEGIN
        + """
from late import Late
actor = ray.remote(num_cpus=0)(Late).options(runtime_env={"env_vars": {"OTHER": "1"}}).remote()
print(json.dumps([*ray.get(actor.state.remote()), activation.plugins.digest]))
""",
    )
    assert result.returncode == 0, result.stderr
    active_at_import, role, names, digest, expected = json.loads(result.stdout.splitlines()[-1])
    assert active_at_import is True
    assert (role, names, digest) == ("worker", ["hello_ray"], expected)


def test_workers_report_to_the_registry(cluster: Cluster) -> None:
    result = cluster.run(
        BEGIN
        + """
from miles_plugins import attestation
@ray.remote(num_cpus=0)
def report():
    from miles_plugins import attestation
    from miles_plugins.activation import current
    current().role = "elsewhere"
    attestation.send(current().run, [current().report()])
ray.get(report.remote())
print(json.dumps(ray.get(activation.registry.all.remote())))
"""
    )
    assert result.returncode == 0, result.stderr
    (report,) = json.loads(result.stdout.splitlines()[-1])
    assert report["plugins"] == {"hello_ray": "1.0"}
    assert report["probes"] == {"hello_ray": "hello from elsewhere"}


def test_a_users_own_setup_hook_runs_too(cluster: Cluster, plugin_folder: Path) -> None:
    (plugin_folder / "users_hook.py").write_text("import os\ndef setup():\n    os.environ['USERS_HOOK_RAN'] = '1'\n")
    result = cluster.run(
        BEGIN
        + """
ray.init(runtime_env={"worker_process_setup_hook": "users_hook.setup", "env_vars": {"USERS": "yes"}})
@ray.remote(num_cpus=0)
def look():
    from miles_plugins.activation import current
    return os.environ.get("USERS_HOOK_RAN"), os.environ.get("USERS"), current().plugins.names
print(json.dumps(ray.get(look.remote())))
"""
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ["1", "yes", ["hello_ray"]]


def test_inside_a_submitted_job_its_environment_and_hook_stay(cluster: Cluster, plugin_folder: Path) -> None:
    """`ray job submit --runtime-env-json` reaches the driver in this variable (see patches/ray/workers.py)."""
    (plugin_folder / "jobs_hook.py").write_text("import os\ndef setup():\n    os.environ['JOBS_HOOK_RAN'] = '1'\n")
    job = {
        "runtime_env": {
            "env_vars": {"PYTHONPATH": str(plugin_folder), "JOBS": "yes", "MILES_PLUGINS": "stale"},
            "worker_process_setup_hook": "jobs_hook.setup",
        },
        "metadata": {"job_submission_id": "raysubmit_test"},
    }
    result = cluster.run(
        BEGIN
        + """
@ray.remote(num_cpus=0)
def look():
    from miles_plugins.activation import current
    return os.environ.get("JOBS_HOOK_RAN"), os.environ.get("JOBS"), current().plugins.names
print(json.dumps(ray.get(look.remote())))
""",
        RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps(job),
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ["1", "yes", ["hello_ray"]]


def test_a_really_submitted_job(plugin_folder: Path, tmp_path: Path) -> None:
    if find_spec("opencensus") is None:
        pytest.skip("`ray job submit` needs the package ray[default]")
    port = free_port()
    head = Cluster(Path(tempfile.mkdtemp(prefix="mp-", dir="/tmp")), {}, dashboard=port)
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent(BEGIN)
        + textwrap.dedent("""
        @ray.remote(num_cpus=0)
        class Actor:
            def look(self):
                from miles_plugins.activation import current
                return os.environ.get("JOBS"), current().plugins.names
        actor = Actor.options(runtime_env={"env_vars": {"OTHER": "1"}}).remote()
        print("seen", json.dumps(ray.get(actor.look.remote())))
        """)
    )
    runtime_env = json.dumps({"env_vars": {"PYTHONPATH": str(plugin_folder), "JOBS": "yes"}})
    address = f"http://127.0.0.1:{port}"
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address]
    try:
        wait_for_port(port)
        for _ in range(20):
            result = subprocess.run(
                [*submit, f"--runtime-env-json={runtime_env}", "--", sys.executable, str(script)],
                env={**head.environment, "RAY_ADDRESS": address},
                capture_output=True,
                text=True,
                timeout=240,
            )
            if "No available agent" not in result.stderr:  # the node's agent starts after the port is open
                break
            time.sleep(2)
    finally:
        head.stop()
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'seen ["yes", ["hello_ray"]]' in result.stdout


def wait_for_port(port: int, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"nothing listens on port {port}")


def test_a_cluster_that_ray_starts_itself(cluster: Cluster) -> None:
    result = cluster.run(
        BEGIN
        + """
ray.init(address="local", num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1",
         object_store_memory=128 * 2**20)
@ray.remote(num_cpus=0)
def look():
    from miles_plugins.activation import current
    return current().plugins.names
print(json.dumps(ray.get(look.remote())))
""",
        RAY_ADDRESS="",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ["hello_ray"]


def test_ray_client_is_refused(cluster: Cluster) -> None:
    result = cluster.run(BEGIN + "ray.init('ray://127.0.0.1:10001')")
    assert result.returncode != 0
    assert "Ray Client cannot carry plugins" in result.stderr


@pytest.mark.parametrize(
    ("blocked", "expected"),
    [("miles_plugins", "No module named 'miles_plugins'"), ("hello_ray", "No module named 'hello_ray'")],
)
def test_a_node_without_the_package_ends_the_run(
    tmp_path: Path, plugin_folder: Path, blocked: str, expected: str
) -> None:
    """The node's interpreter refuses the import, as one where the package is not installed."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name == {blocked!r}:
                    raise ModuleNotFoundError("No module named {blocked!r}", name=name)
        sys.meta_path.insert(0, Blocker())
        """)
    )
    folder = Path(tempfile.mkdtemp(prefix="mp-", dir="/tmp"))
    node = Cluster(folder, {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(plugin_folder)])})
    try:
        result = node.run(BEGIN + "ray.init()", PYTHONPATH=str(plugin_folder))
    finally:
        node.stop()
    assert result.returncode != 0
    assert "the plugins cannot be activated on node 127.0.0.1" in result.stderr, result.stderr
    assert expected in result.stderr


def test_a_node_with_other_code_ends_the_run(tmp_path: Path, plugin_folder: Path) -> None:
    """The same distribution and version, another source: the digest tells."""
    other = tmp_path / "other"
    other.mkdir()
    for file in plugin_folder.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            copy = other / file.relative_to(plugin_folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(file.read_text().replace("hello from", "good day from"))
    folder = Path(tempfile.mkdtemp(prefix="mp-", dir="/tmp"))
    node = Cluster(folder, {"PYTHONPATH": str(other)})
    try:
        result = node.run(BEGIN + "ray.init()", PYTHONPATH=str(plugin_folder))
    finally:
        node.stop()
    assert result.returncode != 0
    assert "are not the driver's" in result.stderr, result.stderr


def test_spawned_children_are_reached_and_only_while_they_start(cluster: Cluster) -> None:
    result = cluster.run(
        BEGIN
        + """
@ray.remote(num_cpus=0)
class Engine:
    def spawn(self):
        import multiprocessing
        from miles_plugins.patches.slime.processes import reach_children
        context = multiprocessing.get_context("spawn")
        before = os.environ.get("PYTHONPATH")
        with context.Pool(1) as plain:
            without = plain.apply(children_plugins)
        reached = reach_children(lambda: context.Pool(1))
        try:
            return without, reached.apply(children_plugins), os.environ.get("PYTHONPATH") == before
        finally:
            reached.terminate()
from children import children_plugins
print(json.dumps(ray.get(Engine.remote().spawn.remote())))
"""
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [None, [["hello_ray"], "sglang_child"], True]


@pytest.fixture(scope="module", autouse=True)
def children_module(plugin_folder: Path) -> None:
    (plugin_folder / "children.py").write_text(
        "import sys\ndef children_plugins():\n    activation = sys.modules.get('miles_plugins.activation')\n"
        "    return activation and [activation.current().plugins.names, activation.current().role]\n"
    )
