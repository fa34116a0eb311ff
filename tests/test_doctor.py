"""`miles-plugins doctor`: each check in an environment that has the problem, and in one that has not."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import miles_plugins
from miles_plugins import Finding
from miles_plugins.entrypoints import doctor as command
from miles_plugins.entrypoints.doctor import CHECKS, findings
from miles_plugins.r3_replay import environment

ROOT = Path(__file__).resolve().parents[1]
UPSTREAM = {"torch", "ray", "slime", "megatron", "sglang", "sglang_router", "numpy", "miles"}
VARIABLES = (
    "SLIME_HOME MEGATRON_HOME RAY_ADDRESS RAY_TMPDIR TMPDIR PYTHONPATH CUDA_VISIBLE_DEVICES ENABLE_ROUTING_REPLAY "
    "http_proxy https_proxy all_proxy no_proxy"
).split()
Check = Callable[[], Finding]


# -- an environment made of files -------------------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with nothing in it: one folder is all of sys.path, no variable is set, home is elsewhere."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    sysconfig.get_paths()  # imports what it needs, while it can
    for name in [name for name in sys.modules if name.partition(".")[0] in UPSTREAM]:
        monkeypatch.delitem(sys.modules, name)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.chdir(tmp_path)
    return folder


def write(folder: Path, file: str, text: str = "") -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()
    return path


def record(folder: Path, name: str, version: str, entries: str = "", kind: str = "dist-info") -> Path:
    """What pip writes beside an installed distribution."""
    file = f"{name.replace('-', '_')}{f'-{version}' if kind == 'dist-info' else ''}.{kind}"
    write(folder, f"{file}/entry_points.txt", f"[miles_plugins]\n{entries}" if entries else "")
    said = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    write(folder, f"{file}/{'METADATA' if kind == 'dist-info' else 'PKG-INFO'}", said)
    return folder / file


def status(check: Check, *words: str) -> str:
    """The status of what a check finds, which must say these words."""
    finding = check()
    for word in words:
        assert word in f"{finding.found}\n{finding.next}"
    return finding.status


# -- upstream ---------------------------------------------------------------------------------------------------------


def test_slime(empty: Path) -> None:
    assert status(command.slime, "no package named slime", "--embedded") == "problem"
    write(empty, "slime/__init__.py")
    assert status(command.slime, "PyPI", "pip uninstall slime") == "problem"
    write(empty, "slime/utils/arguments.py")
    assert status(command.slime, "slime") == "ok"


def test_a_folder_around_slime(empty: Path) -> None:
    write(empty, "slime/slime/utils/arguments.py")
    assert status(command.slime, "a folder around slime") == "problem"


def test_a_clone_that_is_not_on_the_path_is_named(empty: Path) -> None:
    write(Path.home(), "slime/slime/utils/arguments.py")
    write(Path.home(), "Megatron-LM/megatron/training/__init__.py")
    assert status(command.slime, "put the clone on PYTHONPATH: ~/slime") == "problem"
    assert status(command.megatron, "put the clone on PYTHONPATH: ~/Megatron-LM") == "problem"


def test_train_script(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(command.train_script, "--train-script") == "problem"
    home = write(empty, "elsewhere/train.py").parent
    monkeypatch.setenv("SLIME_HOME", str(home))
    assert status(command.train_script, str(home / "train.py")) == "ok"


def test_numpy(empty: Path) -> None:
    assert status(command.numpy, "not installed") == "problem"
    write(empty, "numpy/__init__.py")
    record(empty, "numpy", "1.26.4")
    assert status(command.numpy, "1.26.4") == "ok"
    shutil.rmtree(empty / "numpy-1.26.4.dist-info")
    record(empty, "numpy", "2.1.0")
    assert status(command.numpy, "2.1.0", "numpy<2") == "problem"


@pytest.mark.parametrize(
    ("cuda", "driver", "expected", "words"),
    [
        (None, False, "ok", "a CPU build"),
        (None, True, "problem", "an NVIDIA driver"),
        ("12.8", True, "ok", "for CUDA 12.8"),
        ("12.8", False, "ok", "for CUDA 12.8"),
    ],
)
def test_torch(
    empty: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, driver: bool, expected: str, words: str
) -> None:
    monkeypatch.setattr(command, "NVIDIA_DRIVER", empty if driver else empty / "none")
    assert status(command.torch, "not installed") == "problem"
    write(empty, "torch/__init__.py", "raise RuntimeError('imported')")
    build = f"from typing import Optional\n__version__ = '2.9.1'\ncuda: Optional[str] = {cuda!r}\nhip = None\n"
    write(empty, "torch/version.py", build)
    assert status(command.torch, "2.9.1", words) == expected


def test_gpu(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "NVIDIA_DRIVER", empty / "version")
    monkeypatch.setattr(command, "DEVICES", empty)
    write(empty, "nvidiactl")
    assert status(command.gpu, "no NVIDIA driver", "rehearse") == "note"
    write(empty, "version")
    assert status(command.gpu, "no GPU in", "--gpus all") == "problem"
    write(empty, "nvidia0")
    write(empty, "nvidia1")
    assert status(command.gpu, "2 NVIDIA") == "ok"
    for hidden, expected in (("", "problem"), ("-1", "problem"), ("1", "ok")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert status(command.gpu) == expected


def write_megatron(folder: Path, training: bool) -> None:
    write(folder, "megatron/core/__init__.py", "raise RuntimeError('imported')")
    write(folder, "megatron/core/package_info.py", "MAJOR = 0\nMINOR = 16\nPATCH = 1\nPRE_RELEASE = 'rc0'\n")
    if training:
        write(folder, "megatron/training/__init__.py")


def test_megatron(empty: Path) -> None:
    assert status(command.megatron, "no megatron.core") == "problem"
    write_megatron(empty, training=False)
    assert status(command.megatron, "0.16.1rc0", "PyPI's megatron-core lacks it", "clone") == "problem"
    write_megatron(empty, training=True)
    assert status(command.megatron, f"core 0.16.1rc0 in {empty}") == "ok"


def test_two_megatrons_mixed(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_megatron(empty, training=False)
    write_megatron(tmp_path / "clone", training=True)
    monkeypatch.setattr(sys, "path", [str(empty), str(tmp_path / "clone")])
    assert status(command.megatron, str(empty), str(tmp_path / "clone"), "first on PYTHONPATH") == "problem"
    monkeypatch.setattr(sys, "path", [str(tmp_path / "clone"), str(empty)])
    assert status(command.megatron, str(tmp_path / "clone")) == "ok"


@pytest.mark.parametrize("module", ["slime.utils.routing_replay", "miles.utils.replay_base"])
def test_megatron_patches(empty: Path, module: str) -> None:
    folder = "megatron/core/transformer/moe"
    assert status(command.megatron_patches, "no Megatron to look at") == "ok"
    write(empty, f"{folder}/router.py", "class TopKRouter: ...\n")
    write(empty, f"{folder}/moe_utils.py", "def topk(): ...\n")
    assert status(command.megatron_patches, "a stock Megatron") == "ok"
    write(empty, f"{folder}/moe_utils.py", f"def topk():\n    from {module} import compute\n")
    owner = module.partition(".")[0]
    assert status(command.megatron_patches, f"{owner}' image" if owner == "miles" else "slime's image") == "problem"
    write(empty, f"{module.replace('.', '/')}.py")
    assert status(command.megatron_patches, "keeps it off") == "note"


def test_sglang(empty: Path) -> None:
    assert status(command.sglang, "not installed") == "problem"
    write(empty, "sglang/__init__.py")
    assert status(command.sglang, "without a server") == "problem"
    record(empty, "sglang", "0.5.15.post1")
    write(empty, "sglang/srt/entrypoints/http_server.py", "@app.post('/generate')\n")
    assert status(command.sglang, "0.5.15.post1, without slime's docker patch") == "ok"
    write(empty, "sglang/srt/entrypoints/http_server.py", '@app.post("/post_process_weights")\n')
    assert status(command.sglang, "0.5.15.post1 with slime's docker patch") == "note"


def test_router(empty: Path) -> None:
    assert status(command.router, "not installed") == "problem"
    write(empty, "sglang_router/__init__.py")
    write(empty, "sglang_router/version.py", '__version__ = "0.3.2"\n')
    compiled = write(empty, "sglang_router/router.abi3.so", "… return_hidden_states …")
    assert status(command.router, "0.3.2 drops", "nothing with r3") == "note"
    compiled.write_text("… return_hidden_states return_routed_experts …")
    assert status(command.router, "0.3.2, forwards") == "ok"
    compiled.write_text("… return_hidden_states …")
    write(empty, "sglang_router/version.py", '__version__ = "0.3.2+slime"\n')  # as slime's Dockerfile asserts
    assert status(command.router, "0.3.2+slime, forwards") == "ok"


SETUP_HOOK = """
from ray import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

def export_setup_func_module(runtime_env, module):
    assert WORKER_PROCESS_SETUP_HOOK_ENV_VAR not in runtime_env["env_vars"]

def upload_worker_process_setup_hook_if_needed(runtime_env, worker):
    {}
    return export_setup_func_module(runtime_env, runtime_env["worker_process_setup_hook"])

def load_and_execute_setup_hook(key):
    return WORKER_PROCESS_SETUP_HOOK_ENV_VAR
"""


def test_ray(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = "ray/_private/runtime_env/setup_hook.py"
    assert status(command.ray, "not installed") == "problem"
    write(empty, "ray/__init__.py", "raise RuntimeError('imported')")
    record(empty, "ray", "2.54.0")
    write(empty, file, "def upload_worker_process_setup_hook_if_needed(runtime_env, worker): ...\n")
    assert status(command.ray, "takes no setup hook by name") == "problem"
    write(empty, file, SETUP_HOOK.format("pass"))
    assert status(command.ray, "2.54.0 fails", "61350") == "note"
    write(empty, file, SETUP_HOOK.format("existing = env_vars.get(WORKER_PROCESS_SETUP_HOOK_ENV_VAR)"))
    assert status(command.ray, "2.54.0") == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert status(command.ray, "Ray Client") == "problem"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert status(command.ray) == "ok"


# -- this package -----------------------------------------------------------------------------------------------------


def test_plugin_names(empty: Path) -> None:
    assert status(command.plugin_names, "miles-plugins is not installed", "pip install") == "problem"
    record(empty, "miles-plugins", "0.1.0", "r3_replay = miles_plugins.r3_replay.plugin\n")
    record(empty, "unrelated", "1.0")
    assert status(command.plugin_names, "r3_replay") == "ok"
    record(empty, "length-log", "1.0", "r3-replay = length_log\n")
    assert status(command.plugin_names, "length-log and miles-plugins", "uninstall one") == "problem"


def test_a_stale_record(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "clone"
    monkeypatch.setattr(sys, "path", [str(clone), str(empty)])
    record(empty, "miles-plugins", "0.1.0", "r3_replay = a\ncpu = b\n")
    record(clone, "miles_plugins", "0.1.0", "cpu = b\nr3-replay = a\n", "egg-info")
    assert status(command.plugin_names) == "ok"  # an editable install has both, and they are equal
    record(clone, "miles-plugins", "0.1.0", "cpu = b\n", "egg-info")
    assert status(command.plugin_names, "clone/miles_plugins.egg-info", "differ", "stale") == "problem"
    record(clone, "miles-plugins", "0.0.9", "cpu = b\nr3_replay = a\n", "egg-info")
    assert status(command.plugin_names, "differ") == "problem"


def test_a_stale_record_of_a_third_party(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "clone"), str(empty)])
    record(empty, "miles-plugins", "0.1.0", "r3_replay = a\n")
    record(empty, "length-log", "1.1", "length_log = c\nlength_plot = d\n")
    record(tmp_path / "clone", "length-log", "1.1", "length_log = c\n", "egg-info")
    assert status(command.plugin_names, "records of length-log that differ") == "problem"


def test_a_stale_record_from_before_it_had_plugins(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "clone"), str(empty)])
    record(empty, "miles-plugins", "0.1.0", "cpu = b\n")
    record(tmp_path / "clone", "miles-plugins", "0.1.0", "", "egg-info")
    assert status(command.plugin_names, "differ") == "problem"


def test_package(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(empty, "miles-plugins", "0.1.0")
    (tmp_path / "link").symlink_to(Path(miles_plugins.__file__).parent.parent)
    monkeypatch.setattr(sys, "path", [str(empty), str(ROOT), str(tmp_path / "link")])
    assert status(command.package, "0.1.0", "the only one") == "ok"
    write(empty, "miles_plugins/__init__.py")
    assert status(command.package, str(empty / "miles_plugins"), str(ROOT)) == "problem"


def test_miles_in_the_same_environment(empty: Path) -> None:
    write(record(empty, "miles", "0.2.0"), "RECORD", "miles/__init__.py,,\n")
    assert status(command.package) == "ok"
    write(empty, "miles-0.2.0.dist-info/RECORD", "miles/__init__.py,,\nmiles_plugins/__init__.py,,\n")
    assert status(command.package, "miles 0.2.0", "not both") == "problem"


@pytest.mark.parametrize(
    ("first_lines", "expected"),
    [
        ("#!{here}/python\nimport sys\n", "ok"),
        ("#!/bin/sh\n'''exec' \"{here}/python3.11\" \"$0\" \"$@\"\n' '''\nimport sys\n", "ok"),  # a long path
        ("#!/opt/other/bin/python3\nimport sys\n", "problem"),
        ("#!/opt/other/bin/python3\nimport sys\nsys.path.append('{here}/python')\n", "problem"),
    ],
)
def test_command(empty: Path, monkeypatch: pytest.MonkeyPatch, first_lines: str, expected: str) -> None:
    monkeypatch.setenv("PATH", str(empty))
    assert status(command.command, "not on PATH") == "note"
    script = write(empty, "slime-train", first_lines.format(here=Path(sys.executable).parent))
    script.chmod(0o755)
    assert status(command.command, str(script)) == expected


# -- the machine ------------------------------------------------------------------------------------------------------


def test_python_path(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(command.python_path, "not set") == "ok"
    monkeypatch.setenv("PYTHONPATH", f"{empty}:{empty}/mistyped:")
    assert command.python_path() == Finding(
        "PYTHONPATH",
        "problem",
        f"does not exist: {empty}/mistyped",
        "correct or remove it: Python passes over it without a word",
    )
    monkeypatch.setenv("PYTHONPATH", f"{empty}:")
    assert status(command.python_path, str(empty)) == "ok"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "ok"),
        ({"http_proxy": "http://user:secret@proxy:3128"}, "problem"),
        ({"ALL_PROXY": "http://user:secret@proxy:3128"}, "problem"),
        ({"https_proxy": "http://proxy:3128"}, "ok"),  # between our processes it is http
        ({"http_proxy": "http://proxy:3128", "no_proxy": "127.0.0.1,localhost"}, "ok"),
        ({"http_proxy": "http://proxy:3128", "NO_PROXY": "127.0.0.1"}, "problem"),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "*"}, "ok"),
    ],
)
def test_proxy(empty: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert status(command.proxy) == expected
    assert "secret" not in str(command.proxy())


def test_clock(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.sysconfig, "get_path", lambda name: str(empty))
    assert status(command.clock) == "ok"
    installed = record(empty, "rich", "14.0")
    assert status(command.clock, "not compared") == "ok"
    future = command.time.time() + 3600
    os.utime(installed, (future, future))
    assert status(command.clock, "60 minutes before", "time server") == "problem"


Memory = namedtuple("Memory", "total available")
Disk = namedtuple("Disk", "total used free")


def test_memory(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CONTROL_GROUPS", ())
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: Memory(100e9, 6e9))
    assert status(command.memory, "6.0 GB of 100.0 GB") == "ok"
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: Memory(100e9, 4e9))
    assert status(command.memory, "4.0 GB of 100.0 GB", "95 %") == "problem"


def test_memory_of_a_container(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("memory.max", "memory.current")
    monkeypatch.setattr(command, "CONTROL_GROUPS", [(*(str(empty / name) for name in names), "inactive_file")])
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: Memory(100e9, 50e9))
    write(empty, "memory.current", "9900000000\n")
    write(empty, "memory.stat", "anon 1\nslab_inactive_file 7\ninactive_file 1000000000\n")
    write(empty, "memory.max", "max\n")
    assert status(command.memory, "50.0 GB of 100.0 GB") == "ok"
    write(empty, "memory.max", "10000000000\n")
    assert status(command.memory, "1.1 GB of 10.0 GB") == "ok"
    write(empty, "memory.stat", "inactive_file 0\n")
    assert status(command.memory, "0.1 GB of 10.0 GB") == "problem"


def test_shared_memory(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SHARED_MEMORY", empty / "none")
    assert status(command.shared_memory) == "note"
    monkeypatch.setattr(command, "SHARED_MEMORY", empty)
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: Memory(100e9, 20e9))
    for total, free, expected, words in (
        (2**26, 2**26, "problem", "--shm-size"),
        (8e9, 7e9, "ok", "7.0 GB of 8.0 GB"),
        (8e9, 5e9, "note", "wants 6.0 GB"),
    ):
        monkeypatch.setattr(command.shutil, "disk_usage", {empty: Disk(total, total - free, free)}.__getitem__)
        assert status(command.shared_memory, words) == expected


def test_temporary_folder(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(folder: Path) -> Disk:
        asked.append(folder)
        return Disk(100e9, 0, free)

    monkeypatch.setattr(command.shutil, "disk_usage", usage)
    monkeypatch.setenv("TMPDIR", str(empty / "none"))
    assert status(command.temporary_folder, "cannot be written") == "problem"
    monkeypatch.setenv("RAY_TMPDIR", str(empty))
    free = 6e9
    assert status(command.temporary_folder, "6.0 GB of 100.0 GB") == "ok"
    free = 4e9
    assert status(command.temporary_folder, "95 % full") == "problem"
    assert asked == [empty, empty]


# -- what plugins add -------------------------------------------------------------------------------------------------

SCRATCH = """
from miles_plugins import Finding, hookimpl

@hookimpl
def doctor():
    return [Finding("scratch disk", "problem", "1 GB free", "delete files")]
"""


def test_a_named_plugin_adds_its_checks_and_no_other(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CHECKS", ())
    write(site, "scratch_check.py", SCRATCH)
    write(site, "unnamed_check.py", "raise RuntimeError('imported')")
    record(site, "scratch-check", "1.0", "scratch_check = scratch_check\nunnamed_check = unnamed_check\n")
    assert findings(["scratch"]) == [Finding("scratch disk", "problem", "1 GB free", "delete files")]
    assert findings() == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise OSError('no such disk')", "OSError: no such disk"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return ['fine']", "'fine' is not a Finding"),
        ("return 3", "TypeError"),
        ("return [Finding('a', 'bad', 'b')]", "'bad'; known: problem, note, ok"),
    ],
)
def test_a_plugin_that_fails_is_a_problem_that_names_it(
    site: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str
) -> None:
    monkeypatch.setattr(command, "CHECKS", ())
    write(site, "broken_check.py", SCRATCH.partition("    return")[0] + f"    {body}\n")
    record(site, "broken-check", "1.0", "broken_check = broken_check\n")
    (found,) = findings(["broken_check"])
    assert (found.check, found.status) == ("broken_check's checks", "problem")
    assert words in found.found


def test_a_plugin_that_says_nothing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CHECKS", ())
    write(site, "quiet_check.py", SCRATCH.partition("    return")[0] + "    return None\n")
    record(site, "quiet-check", "1.0", "quiet_check = quiet_check\n")
    assert findings(["quiet_check", "metrics"]) == []


def test_a_misspelt_plugin_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CHECKS", ())
    (found,) = findings(["metrcs"])
    assert (found.check, found.status) == ("--plugins", "problem")
    assert "'metrcs'" in found.found
    assert "nearest: metrics" in found.found


def test_r3_compiled_codecs(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in environment.COMPILED]:
        monkeypatch.delitem(sys.modules, name)
    write(site, "xxhash.py")
    write(site, "pybase64.py", "def get_version(): return '1.5.1 (C extension active - AVX2)'\n")
    assert status(environment.codecs, "AVX2") == "ok"
    monkeypatch.delitem(sys.modules, "pybase64")
    write(site, "pybase64.py", "def get_version(): return '1.5.1 (C extension inactive)'  # slower\n")
    assert status(environment.codecs, "inactive", "ten times") == "note"
    monkeypatch.delitem(sys.modules, "xxhash")
    write(site, "xxhash.py", "raise ImportError('libxxhash.so.0 is missing, say')\n")
    assert status(environment.codecs, "xxhash cannot be imported: libxxhash.so.0") == "problem"


@pytest.mark.parametrize(("value", "expected"), [(None, "ok"), ("0", "ok"), ("1", "problem")])
def test_r3_other_replay(empty: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, expected: str) -> None:
    if value is not None:
        monkeypatch.setenv("ENABLE_ROUTING_REPLAY", value)
    assert status(environment.other_replay) == expected


def test_r3_is_asked_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CHECKS", ())
    assert [found.check for found in findings(["r3"])] == ["r3: codecs", "r3: other replay"]


# -- the command ------------------------------------------------------------------------------------------------------


def fine() -> Finding:
    return Finding("fine", "ok", "all of it " + "x" * 200)


def useful_to_know() -> Finding:
    return Finding("useful", "note", "[slow]", "wait")


def broken() -> Finding:
    return Finding("broken", "problem", "nothing works", "mend it")


def crashing_check() -> Finding:
    raise ValueError("no [such] file")


def run(monkeypatch: pytest.MonkeyPatch, checks: list[Check], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(command, "CHECKS", checks)
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(command.doctor, list(arguments))
    return done.exit_code, done.output


def test_problems_come_first_and_end_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(monkeypatch, [fine, useful_to_know, broken])
    lines = text.splitlines()
    assert code == 1
    assert lines[0].split() == ["problem", "broken", "nothing", "works"]
    assert lines[1].strip() == "→ mend it"
    assert lines[2].split() == ["note", "useful", "[slow]"]
    assert lines[3].strip() == "→ wait"
    assert lines[4].startswith("ok")
    assert lines[4].endswith("x…")
    assert len(lines[4]) == 80
    assert lines[5:] == ["", "Problems: 1. A run would fail or be wrong until they are solved."]
    assert lines[0].index("nothing") == lines[1].index("→") == lines[2].index("[slow]") == lines[4].index("all")


def test_a_note_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(monkeypatch, [useful_to_know, fine])
    assert code == 0
    assert text.endswith("\n\nNo problem found.\n")


def test_json_has_the_same_facts_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(monkeypatch, [fine, useful_to_know, broken], "--json")
    assert code == 1
    assert json.loads(text) == [
        {"check": "broken", "status": "problem", "found": "nothing works", "next": "mend it"},
        {"check": "useful", "status": "note", "found": "[slow]", "next": "wait"},
        {"check": "fine", "status": "ok", "found": fine().found, "next": ""},
    ]


def test_a_check_that_crashes_is_a_problem_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(monkeypatch, [crashing_check, fine], "--json")
    crashed, after = json.loads(text)
    assert code == 1
    assert (crashed["check"], crashed["status"]) == ("crashing check", "problem")
    assert "ValueError: no [such] file" in crashed["found"]
    assert after["check"] == "fine"


def test_names_are_split_at_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = run(monkeypatch, [], "--json", "--plugins", "metrics, r3", "--plugins", "cpu")
    assert [found["check"] for found in json.loads(text)] == ["r3: codecs", "r3: other replay"]


@pytest.mark.parametrize("check", CHECKS)
def test_no_check_crashes_where_nothing_is_installed(empty: Path, check: Check) -> None:
    assert isinstance(check(), Finding)


def test_it_imports_nothing_of_upstream() -> None:
    """Here, where as much as possible is installed: a check that imported would show."""
    script = (
        "import sys\nfrom miles_plugins.entrypoints.doctor import findings\nfound = findings(['r3', 'cpu'])\n"
        "print(len(found), *[each.found for each in found if 'failed itself' in each.found])\n"
        f"print(*sorted(set(sys.modules) & {UPSTREAM!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [str(len(CHECKS) + 2), ""], done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a", "bad", "b"), "'bad'"),
        (("a", "problem", "b"), "does not say what to do"),
        (("a", "ok", "b", "c"), "says what to do"),
    ],
)
def test_a_finding_is_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Finding(*arguments)
