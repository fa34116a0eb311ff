"""`miles-plugins rehearse`: the verdict, the flags, and that nothing it starts outlives it.

A fake slime, a short script that writes what the plugin layer writes, stands in for the real one: its end-to-end run
is another test. Ray is real where it appears.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from miles_plugins import hookimpl
from miles_plugins.console import Interrupted, read_metrics
from miles_plugins.cpu_rehearsal.tiny_model import TinyModel
from miles_plugins.entrypoints import rehearse as module
from miles_plugins.entrypoints.rehearse import (
    Display,
    Outcome,
    Phase,
    Rehearsal,
    RunProcesses,
    error_block,
    judge,
    present,
    rehearse,
    rollout_rows,
    run_environment,
    slime_flags,
    tables,
)
from miles_plugins.errors import ArgumentError, UpstreamError
from miles_plugins.manager import Installed, Plugin, Plugins

ROLES = (
    "driver",
    "rollout_manager",
    "trainer",
    "engine",
    "sglang_server",
    "sglang_scheduler",
    "sglang_detokenizer",
)


def processes_of(*, trainers: int = 1, engines: int = 1) -> list[dict[str, Any]]:
    counts = {"driver": 1, "rollout_manager": 1, "trainer": trainers}
    return [
        {
            "role": role,
            "pid": 100 + index,
            "rank": str(rank) if role == "trainer" else None,
            "node": "127.0.0.1",
            "plugins": {"cpu_rehearsal": "0.1.0", "r3_replay": "0.1.0"},
            "digest": "d1",
            "patches": [
                {"id": "torch.cuda", "target": "torch:cuda", "state": "verified", "detail": ""},
                {"id": "router", "target": "megatron:Router", "state": "armed", "detail": ""},
            ],
            "probes": {"r3_replay": "replayed 12 tokens"},
        }
        for index, role in enumerate(ROLES)
        for rank in range(counts.get(role, engines))
    ]


def metrics_of(rollouts: int, *, begun: float = 1000.0) -> list[dict[str, Any]]:
    """As slime logs: a rollout's numbers in several records, a train step a second after its rollout."""
    records = []
    for step in range(rollouts):
        for key, time_passed, values in [
            ("rollout/step", 1.0, {"perf/rollout_time": 1.0}),
            ("rollout/step", 1.5, {"rollout/raw_reward": 0.1 + step, "train/r3/different_tokens": 0.25}),
            ("train/step", 2.0, {"train/grad_norm": 2.0, "train/train_rollout_logprob_abs_diff": 0.0005}),
            ("train/step", 2.0, {"train/r3/coverage": 1.0}),
        ]:
            when = begun + 2 * step + time_passed
            records.append({"time": when, "step_key": key, "metrics": {key: float(step), **values}})
    return records


# -- the verdict ------------------------------------------------------------------------------------------------------


def verdict(**changes: Any) -> list[str]:
    arguments: dict[str, Any] = {
        "metrics": metrics_of(3),
        "processes": processes_of(),
        "exit_code": 0,
        "rollouts": 3,
        "plugins": ["r3_replay"],
        **changes,
    }
    return judge(**arguments)


def changed_metrics(name: str, value: float | None, step: int = 1) -> list[dict[str, Any]]:
    """The metrics with one number of one step replaced, or left out."""
    records = metrics_of(3)
    for record in records:
        if name in record["metrics"] and record["metrics"][record["step_key"]] == step:
            del record["metrics"][name]
            if value is not None:
                record["metrics"][name] = value
    return records


def changed_process(role: str, **changes: Any) -> list[dict[str, Any]]:
    return [process | (changes if process["role"] == role else {}) for process in copy.deepcopy(processes_of())]


def with_state(role: str, state: str) -> list[dict[str, Any]]:
    patch = {"id": "router", "target": "megatron:Router", "state": state, "detail": "the why"}
    return changed_process(role, patches=[patch])


def test_a_good_run_passes() -> None:
    assert verdict() == []


@pytest.mark.parametrize("state", ["verified", "superseded", "skipped", "armed"])
def test_harmless_patch_states_pass(state: str) -> None:
    assert verdict(processes=with_state("trainer", state)) == []


@pytest.mark.parametrize("state", ["applied", "failed", "something new"])
@pytest.mark.parametrize("role", ROLES)
def test_a_patch_that_is_not_verified_fails(role: str, state: str) -> None:
    (reason,) = verdict(processes=with_state(role, state))
    for part in (role, "router", "megatron:Router", state, "the why"):
        assert part in reason


@pytest.mark.parametrize("role", ROLES)
def test_a_role_that_did_not_report_fails(role: str) -> None:
    remaining = [process for process in processes_of() if process["role"] != role]
    assert verdict(processes=remaining) == [f"0 of 1 {role} processes reported"]


def test_every_trainer_and_engine_must_report() -> None:
    reasons = verdict(trainers=2, engines=2)
    assert reasons == [f"1 of 2 {role} processes reported" for role in ROLES[2:]]
    assert verdict(processes=processes_of(trainers=2, engines=2), trainers=2, engines=2) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exit_code": 1}, "exit code 1"),
        ({"exit_code": -9}, "exit code -9"),
        ({"exit_code": None}, "did not end by itself"),
        ({"processes": []}, "never verified"),
        ({"processes": changed_process("engine", digest="d2")}, "do not run the same plugins"),
        ({"metrics": changed_metrics("train/grad_norm", 0.0)}, "rollout 1: the gradient norm is 0.0"),
        ({"metrics": changed_metrics("train/grad_norm", -1.0)}, "rollout 1: the gradient norm is -1.0"),
        ({"metrics": changed_metrics("train/grad_norm", float("nan"))}, "rollout 1: the gradient norm is nan"),
        ({"metrics": changed_metrics("train/grad_norm", float("inf"))}, "rollout 1: the gradient norm is inf"),
        ({"metrics": changed_metrics("train/grad_norm", None)}, "rollout 1: the gradient norm is None"),
        ({"metrics": changed_metrics("train/r3/coverage", 0.9999999)}, "rollout 1: 99.999 %"),
        ({"metrics": changed_metrics("train/r3/coverage", 2.0)}, "rollout 1: 200.000 %"),
        ({"metrics": changed_metrics("train/r3/coverage", None)}, "rollout 1: – of the routing"),
    ],
)
def test_one_thing_wrong_is_one_reason(changes: dict[str, Any], reason: str) -> None:
    (found,) = verdict(**changes)
    assert reason in found


def test_missing_rollouts_fail() -> None:
    assert verdict(metrics=metrics_of(2)) == [
        "not collected, of 3 rollouts: 2",
        "not trained on, of 3 rollouts: 2",
    ]
    untrained = [record for record in metrics_of(3) if record["step_key"] != "train/step"]
    assert verdict(metrics=untrained) == ["not trained on, of 3 rollouts: 0, 1, 2"]


@pytest.mark.parametrize("plugins", [["r3_replay"], ["fp8", "r3_replay"]])
def test_coverage_counts_only_with_r3(plugins: list[str]) -> None:
    bare = changed_metrics("train/r3/coverage", None)
    assert verdict(metrics=bare, plugins=plugins)
    assert verdict(metrics=bare, plugins=["fp8"]) == []


# -- what is read -----------------------------------------------------------------------------------------------------


def test_rows_merge_a_steps_records_and_time_from_the_last() -> None:
    first, second = rollout_rows(metrics_of(2), begun=1000.0)
    assert first == {
        "rollout": 0,
        "reward": 0.1,
        "grad_norm": 2.0,
        "logprob_difference": 0.0005,
        "replay_coverage": 1.0,
        "routing_difference": 0.25,
        "seconds": 2.0,
    }
    assert (second["rollout"], second["reward"], second["seconds"]) == (1, 1.1, 2.0)


def test_half_written_files_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    metrics, processes = tmp_path / "metrics.jsonl", tmp_path / "processes.json"
    assert read_metrics(metrics) == module.read_processes(processes) == []
    lines = "".join(json.dumps(record) + "\n" for record in metrics_of(1))
    metrics.write_text(lines[:-10])
    processes.write_text(json.dumps(processes_of())[:-10])
    assert read_metrics(metrics) == metrics_of(1)[:-1]
    assert module.read_processes(processes) == []


def test_measuring_only_must_replay_nothing() -> None:
    """A rehearsal of what r3 would change: full coverage would mean that it changed it."""
    none = metrics_of(3)
    for record in none:
        if "train/r3/coverage" in record["metrics"]:
            record["metrics"]["train/r3/coverage"] = 0.0
    assert verdict(metrics=none, measure_only=True) == []
    assert len(verdict(metrics=none)) == 3
    assert verdict(measure_only=True)[0] == "rollout 0: 100 % of the routing was replayed, not 0.000 %"


def test_a_loss_that_is_no_number_fails_the_rehearsal(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    numbers = {"train/step": 0, "train/grad_norm": "nan"}
    file.write_text(json.dumps({"time": 1.0, "step_key": "train/step", "metrics": numbers}) + "\n")
    reasons = module._judge_steps(read_metrics(file), 1, coverage=None)
    assert any("nan" in reason for reason in reasons)


def test_the_error_block_is_the_last_message_with_facts() -> None:
    log = """\
        slime-train: plugins r3_replay 0.1.0
        slime-train: first
          patch   old
        (RolloutManager pid=3) noise
        slime-train: plugin r3_replay cannot be applied
          patch     megatron.router
          found     (self, x)
                    in ~/Megatron-LM
        Exception ignored
        slime-train: note, without facts"""
    assert error_block(textwrap.dedent(log)) == textwrap.dedent("""\
        slime-train: plugin r3_replay cannot be applied
          patch     megatron.router
          found     (self, x)
                    in ~/Megatron-LM""")


def test_without_a_message_the_error_block_is_the_end_of_the_log() -> None:
    log = "\n".join(["slime-train: plugins r3_replay 0.1.0", *map(str, range(100))])
    assert error_block(log) == "\n".join(map(str, range(70, 100)))
    assert error_block("") == ""


# -- what is asked for ------------------------------------------------------------------------------------------------


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    folder = tmp_path / "run"
    return Rehearsal(folder=folder, slime=tmp_path / "slime", megatron=tmp_path / "Megatron-LM", timeout=60)


def flags_of(rehearsal: Rehearsal) -> list[str]:
    return slime_flags(rehearsal, TinyModel(Path("/model"), ["--shape", "1"], 128, 1), ["--task", "2"])


def following(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]


def test_the_flags_describe_the_cluster(rehearsal: Rehearsal) -> None:
    flags = flags_of(
        replace(
            rehearsal,
            tensor_parallel=2,
            pipeline_parallel=3,
            expert_parallel=4,
            data_parallel=2,
            engines=3,
            extra_flags=("--lr", "0"),
        )
    )
    assert following(flags, "--actor-num-gpus-per-node") == "12"
    assert following(flags, "--rollout-num-gpus") == "3"
    assert following(flags, "--num-gpus-per-node") == "15"
    assert following(flags, "--tensor-model-parallel-size") == "2"
    assert following(flags, "--pipeline-model-parallel-size") == "3"
    assert following(flags, "--expert-model-parallel-size") == "4"
    assert "--sequence-parallel" in flags
    assert following(flags, "--shape") == "1"
    assert flags[-4:] == ["--task", "2", "--lr", "0"]  # the user's come last, so that they win
    assert "--sequence-parallel" not in flags_of(rehearsal)


@pytest.mark.parametrize("given", ["r3", "r3-replay", "r3_replay", " r3 ,"])
def test_every_spelling_of_a_plugin_is_its_full_name(given: str) -> None:
    assert module._full_names(given) == ("r3_replay",)


def test_an_unknown_plugin_ends_before_anything_is_started() -> None:
    with pytest.raises(click.ClickException, match="no installed plugin is named 'r4'"):
        module._full_names("r4")


def test_a_rollout_is_one_optimizer_step(rehearsal: Rehearsal) -> None:
    flags = flags_of(rehearsal)
    samples = int(following(flags, "--rollout-batch-size")) * int(following(flags, "--n-samples-per-prompt"))
    assert int(following(flags, "--global-batch-size")) == samples


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), ["cpu_rehearsal", "metrics_jsonl"]),
        (("r3_replay", "cpu_rehearsal"), ["cpu_rehearsal", "r3_replay", "metrics_jsonl"]),
    ],
)
def test_cpu_comes_first_and_the_recorder_last(
    rehearsal: Rehearsal, given: tuple[str, ...], expected: list[str]
) -> None:
    assert replace(rehearsal, plugins=given).all_plugins == expected


def test_the_inputs_are_written(rehearsal: Rehearsal) -> None:
    pytest.importorskip("torch")
    command = module.write_inputs(replace(rehearsal, tensor_parallel=2))
    assert command[:3] == [sys.executable, "-m", "miles_plugins.entrypoints.slime_train"]
    assert following(command, "--plugins") == "cpu_rehearsal,r3_replay,metrics_jsonl"
    assert following(command, "--train-script") == str(rehearsal.slime / "train.py")
    assert following(command, "--metrics-jsonl") == str(rehearsal.folder / "metrics.jsonl")
    assert following(command, "--vocab-size") == "256"
    assert (Path(following(command, "--hf-checkpoint")) / "config.json").exists()
    assert len(Path(following(command, "--prompt-data")).read_text().splitlines()) == 12


def test_the_shape_reaches_the_model(rehearsal: Rehearsal) -> None:
    pytest.importorskip("torch")
    command = module.write_inputs(replace(rehearsal, layers=3, dense_layers=1, experts=16, topk=4))
    assert following(command, "--num-layers") == "3"
    assert following(command, "--moe-layer-freq") == "[0]*1+[1]*2"
    assert following(command, "--num-experts") == "16"
    assert following(command, "--moe-router-topk") == "4"


def test_plugins_say_what_they_need_of_the_model_and_what_to_try(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")

    class Drafts:
        @hookimpl
        def tiny_model_shape(self) -> dict[str, int]:
            return {"draft_layers": 1}

        @hookimpl
        def rehearsal_flags(self, checkpoint: Path) -> list[str]:
            return ["--draft-from", str(checkpoint), "--lr", "5"]

    plugins = Plugins([Plugin(Installed("drafts", "", "1", EntryPoint("drafts", "drafts", "")), Drafts())])
    monkeypatch.setattr(module.Plugins, "named", lambda names: plugins)
    command = module.write_inputs(replace(rehearsal, extra_flags=("--lr", "6")))
    assert following(command, "--mtp-num-layers") == "1"
    assert following(command, "--draft-from") == following(command, "--hf-checkpoint")
    assert [value for flag, value in pairwise(command) if flag == "--lr"] == ["0.001", "5", "6"]  # the last wins


def test_every_option_reaches_the_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {
        "rollouts": 4,
        "layers": 6,
        "dense_layers": 1,
        "experts": 16,
        "topk": 5,
        "tensor_parallel": 2,
        "pipeline_parallel": 3,
        "expert_parallel": 8,
        "data_parallel": 7,
        "engines": 9,
        "seed": 10,
        "timeout": 11.0,
    }
    found = []
    monkeypatch.setattr(module, "present", lambda rehearsal, **how: found.append(rehearsal) or 0)
    options = [word for name, value in asked.items() for word in ("--" + name.replace("_", "-"), str(value))]
    result = CliRunner().invoke(rehearse, [*options, "--folder", str(tmp_path), "--", "--lr", "0"])
    assert result.exit_code == 0, result.output
    (made,) = found
    assert {name: getattr(made, name) for name in asked} == asked
    assert made.extra_flags == ("--lr", "0")


def test_what_is_not_asked_for_is_as_the_rehearsal_has_it(
    rehearsal: Rehearsal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(module, "present", lambda rehearsal, **how: found.append(rehearsal) or 0)
    assert CliRunner().invoke(rehearse, ["--folder", str(rehearsal.folder)]).exit_code == 0
    paths = {"slime": rehearsal.slime, "megatron": rehearsal.megatron}
    assert replace(found[0], **paths) == Rehearsal(folder=rehearsal.folder, **paths)


def test_the_environment_is_this_runs_alone(
    rehearsal: Rehearsal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILES_PLUGINS", "fp8")
    monkeypatch.setenv("MILES_PLUGINS_DIGEST", "stale")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    environment = run_environment(rehearsal, "abc", 1234, tmp_path)
    ours = {name: value for name, value in environment.items() if name.startswith("MILES_PLUGINS")}
    assert ours == {"MILES_PLUGINS_RUN": "abc", "MILES_PLUGINS_RUN_DIR": str(rehearsal.folder)}
    assert environment["RAY_ADDRESS"] == "127.0.0.1:1234"
    assert environment["TORCHDYNAMO_DISABLE"] == "1"
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(rehearsal.megatron), str(rehearsal.slime), "/mine"]


def test_everything_missing_is_named_before_anything_starts(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("ray", "sglang") else find(name))
    (rehearsal.slime / "slime").mkdir(parents=True)  # an impostor: it has no slime/ray
    with pytest.raises(UpstreamError) as error:
        module.check_requirements(rehearsal)
    assert {"ray", "sglang", "slime", "Megatron-LM"} <= set(error.value.facts)
    assert str(rehearsal.slime) in str(error.value)
    assert "git clone" in str(error.value)


def test_complete_requirements_pass(rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for folder in ("slime/slime/ray", "Megatron-LM/megatron/core", "Megatron-LM/megatron/training"):
        (rehearsal.slime.parent / folder).mkdir(parents=True)
    (rehearsal.slime / "train.py").touch()
    module.check_requirements(rehearsal)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"expert_parallel": 2, "tensor_parallel": 2},
        {"expert_parallel": 4, "data_parallel": 4, "experts": 4},
        {"pipeline_parallel": 2},
        {"pipeline_parallel": 3, "layers": 3},
        {"pipeline_parallel": 2, "tensor_parallel": 2, "expert_parallel": 2},
        {"pipeline_parallel": 2, "layers": 3, "extra_flags": ("--decoder-first-pipeline-num-layers", "1")},
        {"pipeline_parallel": 2, "layers": 3, "extra_flags": ("--decoder-last-pipeline-num-layers=1",)},
        {"pipeline_parallel": 2, "layers": 3, "extra_flags": ("--pipeline-model-parallel-layout", "Et|ttL")},
        {"topk": 8},
        {"dense_layers": 1},
    ],
)
def test_possible_shapes_pass(rehearsal: Rehearsal, shape: dict[str, Any]) -> None:
    module.check_shape(replace(rehearsal, **shape))


RANKS = "{} (--tensor-parallel x --data-parallel)"


@pytest.mark.parametrize(
    ("shape", "message", "fact"),
    [
        ({"expert_parallel": 2}, "--expert-parallel 2", ("trainer ranks", RANKS.format(1))),
        ({"expert_parallel": 3, "data_parallel": 3}, "--expert-parallel 3", ("experts", 8)),
        # A pipeline stage has all the experts of its layers, so its own ranks must share them.
        ({"expert_parallel": 2, "pipeline_parallel": 2}, "--expert-parallel 2", ("trainer ranks", RANKS.format(1))),
        ({"pipeline_parallel": 2, "layers": 3}, "--pipeline-parallel 2", ("layers", 3)),
        ({"pipeline_parallel": 4, "layers": 2, "extra_flags": ("--lr", "0")}, "--pipeline-parallel 4", ("layers", 2)),
        ({"topk": 9}, "--topk 9", ("experts", 8)),
        ({"dense_layers": 2}, "--dense-layers 2", ("layers", 2)),
    ],
)
def test_impossible_shapes_are_refused(rehearsal: Rehearsal, shape: dict[str, Any], message: str, fact: object) -> None:
    with pytest.raises(ArgumentError, match=message) as error:
        module.check_shape(replace(rehearsal, **shape))
    assert fact in error.value.facts.items()


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    options = ["--slime", str(tmp_path / "nowhere"), "--folder", str(tmp_path / "run")]
    result = CliRunner().invoke(rehearse, options)
    assert result.exit_code == 1
    assert "nowhere" in result.stderr
    assert not (tmp_path / "run").exists()

    result = CliRunner().invoke(rehearse, [*options, "--json"])
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert not answer["passed"]
    assert "nowhere" in answer["reasons"][0]


# -- processes --------------------------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def eventually(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not happen in time"
        time.sleep(0.02)


SLEEP = "import time; time.sleep(300)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(300)"
)

# A parent that leaves a child in a session of its own behind: argv is the file for its pid, an optional environment.
LEAVE_CHILD = f"""
import json, pathlib, subprocess, sys, time
environment = json.loads(sys.argv[3]) if len(sys.argv) > 3 else None
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True, env=environment)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def processes() -> Iterator[RunProcesses]:
    running = RunProcesses("this-run")
    yield running
    running.stop()


def environment_of(run: str) -> dict[str, str]:
    return {**os.environ, "MILES_PLUGINS_RUN": run}


def pid_in(file: Path) -> int:
    eventually(lambda: file.exists() and file.read_text())
    return int(file.read_text())


def test_an_orphan_is_found_by_its_environment(processes: RunProcesses, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVE_CHILD, str(tmp_path / "pid"), "0"]
    parent = processes.start(command, tmp_path / "log", environment_of("this-run"))
    parent.wait()  # we never looked while it lived
    orphan = pid_in(tmp_path / "pid")
    assert not gone(orphan)
    processes.stop()
    assert gone(orphan)


def test_an_orphan_without_the_mark_was_seen_while_its_parent_lived(processes: RunProcesses, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVE_CHILD, str(tmp_path / "pid"), "300", "{}"]
    parent = processes.start(command, tmp_path / "log", environment_of("this-run"))
    orphan = pid_in(tmp_path / "pid")
    assert orphan in {process.pid for process in processes.alive()}
    parent.kill()
    parent.wait()
    assert orphan in {process.pid for process in processes.alive()}
    processes.stop()
    assert gone(orphan)


def test_a_process_that_ignores_the_request_is_killed(
    processes: RunProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.3)
    deaf = processes.start([sys.executable, "-c", STUBBORN], tmp_path / "log", environment_of("this-run"))
    eventually(lambda: (tmp_path / "log").read_text())
    processes.stop()
    assert deaf.wait() == -signal.SIGKILL


@pytest.mark.parametrize("run", ["another-run", "this-run-too"])
def test_other_peoples_processes_are_left_alone(processes: RunProcesses, tmp_path: Path, run: str) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", SLEEP], env=environment_of(run))
    try:
        processes.start([sys.executable, "-c", SLEEP], tmp_path / "log", environment_of("this-run"))
        assert bystander.pid not in {process.pid for process in processes.alive()}
        processes.stop()
        assert processes.alive() == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_ctrl_c_in_a_terminal_reaches_only_us(processes: RunProcesses, tmp_path: Path) -> None:
    child = processes.start([sys.executable, "-c", SLEEP], tmp_path / "log", environment_of("this-run"))
    assert os.getpgid(child.pid) != os.getpgid(0)


def test_our_own_process_is_never_one_of_them(processes: RunProcesses) -> None:
    assert os.getpid() not in {process.pid for process in processes.alive()}


def test_free_ports_are_different() -> None:
    assert len(set(module.free_ports(5))) == 5


# -- the run, with a fake slime ---------------------------------------------------------------------------------------

FAKE_SLIME = """
import json, os, pathlib, signal, subprocess, sys, time
behaviour, content = sys.argv[1], json.loads(sys.argv[2])
folder = pathlib.Path(os.environ["MILES_PLUGINS_RUN_DIR"])
print("slime starts", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
(folder / "child").write_text(str(child.pid))  # a server that outlives its parent, as SGLang's do
if behaviour == "refuse":
    print("slime-train: plugin r3_replay cannot be applied\\n  patch   megatron.router", flush=True)
    sys.exit(1)
(folder / "processes.json").write_text(json.dumps(content["processes"]))
with open(folder / "metrics.jsonl", "a") as file:
    for record in content["metrics"]:
        file.write(json.dumps({**record, "time": time.time()}) + "\\n")
        file.flush()
        time.sleep(0.05)
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "deaf").touch()
if behaviour in ("hang", "deaf"):
    time.sleep(300)
if behaviour == "crash":
    raise RuntimeError("out of ideas")
"""


def fake_slime(behaviour: str, rollouts: int = 3) -> Callable[[Rehearsal], list[str]]:
    content = json.dumps({"processes": processes_of(), "metrics": metrics_of(rollouts)})
    return lambda rehearsal: [sys.executable, "-c", FAKE_SLIME, behaviour, content]


def child_of(rehearsal: Rehearsal) -> int:
    return int((rehearsal.folder / "child").read_text())


def test_a_good_rehearsal_prints_its_tables(rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]) -> None:
    assert present(rehearsal, command=fake_slime("good"), upstream=False) == 0
    output, errors = capsys.readouterr()
    for part in [
        "Rollouts",
        "100 %",
        "25.000 %",
        "0.000500",
        "2.100",
        "Every process runs",
        "trainer 0",
        "sglang_scheduler",
    ]:
        assert part in output
    assert "1 verified" in output
    assert "no process imports its target" in output
    assert "r3_replay 0.1.0" in output
    assert "replayed 12 tokens" in output
    assert "The rehearsal passed" in output
    assert "rolling out and training, 3/3 done" in errors
    assert gone(child_of(rehearsal))


def test_json_is_one_object_on_stdout(rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]) -> None:
    assert present(rehearsal, as_json=True, command=fake_slime("good"), upstream=False) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"]
    assert answer["reasons"] == []
    assert answer["folder"] == str(rehearsal.folder)
    assert [row["grad_norm"] for row in answer["rollouts"]] == [2.0, 2.0, 2.0]
    assert [process["role"] for process in answer["processes"]] == list(ROLES)


def test_json_has_no_bare_nan() -> None:
    outcome = Outcome(rows=[{"rollout": 0, "grad_norm": float("nan")}])
    assert (
        json.loads(module.to_json(outcome, Path("x")), parse_constant=pytest.fail)["rollouts"][0]["grad_norm"] == "nan"
    )


def test_a_refusal_shows_its_error(rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]) -> None:
    assert present(rehearsal, command=fake_slime("refuse"), upstream=False) == 1
    errors = capsys.readouterr().err
    assert "slime ended with exit code 1" in errors
    assert "slime-train: plugin r3_replay cannot be applied\n  patch   megatron.router" in errors
    assert "slime starts" not in errors
    assert str(rehearsal.folder / "slime.log") in errors
    assert gone(child_of(rehearsal))


def test_a_crash_shows_the_end_of_the_log(rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]) -> None:
    assert present(rehearsal, command=fake_slime("crash"), upstream=False) == 1
    assert "out of ideas" in capsys.readouterr().err
    assert gone(child_of(rehearsal))


def test_too_few_rollouts_fail(rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]) -> None:
    assert present(rehearsal, command=fake_slime("good", rollouts=2), upstream=False) == 1
    assert "not trained on, of 3 rollouts: 2" in capsys.readouterr().err


def test_a_rehearsal_that_takes_too_long_ends(rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]) -> None:
    slow = replace(rehearsal, timeout=2.0)
    assert present(slow, as_json=True, command=fake_slime("hang", rollouts=2), upstream=False) == 124
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == 124
    assert answer["reasons"][0] == "not finished after 2 s; it was rolling out and training, 2/3 done"
    assert len(answer["rollouts"]) == 2
    assert gone(child_of(slow))


def test_verbose_shows_the_log(rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]) -> None:
    present(rehearsal, verbose=True, command=fake_slime("good"), upstream=False)
    assert capsys.readouterr().err.count("slime starts") == 1


def test_a_used_folder_is_refused(rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]) -> None:
    rehearsal.folder.mkdir()
    (rehearsal.folder / "metrics.jsonl").touch()
    assert present(rehearsal, command=lambda _: pytest.fail("it was started"), upstream=False) == 1
    assert "is not empty" in capsys.readouterr().err


def test_a_program_that_cannot_start_leaves_nothing(rehearsal: Rehearsal) -> None:
    before = set(Path("/tmp").glob("mp-*"))
    with pytest.raises(FileNotFoundError):
        present(rehearsal, command=lambda _: ["/no/such/program"], upstream=False)
    assert set(Path("/tmp").glob("mp-*")) <= before


def hear_signals() -> None:
    """As in a terminal: a test run in the background, or under nohup, hands ignored signals down."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_stop_everything(rehearsal: Rehearsal, tmp_path: Path, number: signal.Signals, code: int) -> None:
    content = json.dumps({"processes": processes_of(), "metrics": metrics_of(1)})
    program = f"""
import pathlib, sys
from miles_plugins.entrypoints.rehearse import Rehearsal, present
folder = pathlib.Path(sys.argv[1])
rehearsal = Rehearsal(folder=folder, slime=folder, megatron=folder)
command = [sys.executable, "-c", {FAKE_SLIME!r}, "deaf", {content!r}]
sys.exit(present(rehearsal, command=lambda _: command, upstream=False))
"""
    ours = subprocess.Popen(
        [sys.executable, "-c", program, str(rehearsal.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    eventually((rehearsal.folder / "deaf").exists)
    slime = next(process for process in psutil.Process(ours.pid).children())
    assert ours.stderr
    errors = ""
    for awaited in ("1/3 done", "stopping"):  # impatience must not cut the cleaning short
        while awaited not in errors:
            errors += ours.stderr.readline()
        ours.send_signal(number)
    output, rest = ours.communicate(timeout=30)
    errors += rest
    assert ours.returncode == code, errors
    assert f"interrupted by {number.name}; it was rolling out and training, 1/3 done" in errors
    assert "Rollouts" in output
    assert gone(slime.pid)
    assert gone(child_of(rehearsal))


def test_an_interruption_after_slime_ended_counts(rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(rehearsal: Rehearsal, alive: list[psutil.Process]) -> tuple[Phase, int]:
        if alive:
            return Phase.SLIME, 0
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(module, "_progress", interrupt)
    rehearsal.folder.mkdir()
    with Display(Console(stderr=True), rehearsal.rollouts) as display:
        outcome = module.conduct(rehearsal, display, command=fake_slime("good"), with_ray=False)
    assert outcome.exit_code == 130
    assert outcome.reasons == ["interrupted by SIGINT; it was starting slime"]


def test_measuring_only_is_judged_as_such(rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "judge", lambda *_, measure_only, **__: [str(measure_only)])
    rehearsal.folder.mkdir()
    for flags in ((), ("--r3-measure-only",)):
        measuring = dataclasses.replace(rehearsal, extra_flags=flags)
        with Display(Console(stderr=True), rehearsal.rollouts) as display:
            outcome = module.conduct(measuring, display, command=fake_slime("good"), with_ray=False)
        assert outcome.reasons == [str(bool(flags))]


FAKE_SLIME_ON_RAY = """
import json, os, pathlib, subprocess, sys, time
import ray
folder = pathlib.Path(os.environ["MILES_PLUGINS_RUN_DIR"])
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)

@ray.remote(num_gpus=1)
class Engine:
    def serve(self):
        server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
        return {"pids": [os.getpid(), server.pid], "node": ray.util.get_node_ip_address(), "temp": ray._private.worker
                ._global_node.get_temp_dir_path()}

engines = [Engine.remote() for _ in range(2)]  # one a GPU that Ray believes in
(folder / "served").write_text(json.dumps(ray.get([engine.serve.remote() for engine in engines])))
sys.exit(3)
"""


def test_a_ray_of_its_own_is_started_and_stopped(rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    rehearsal.folder.mkdir()
    with Display(Console(stderr=True), rehearsal.rollouts) as display:
        command = [sys.executable, "-c", FAKE_SLIME_ON_RAY]
        outcome = module.conduct(rehearsal, display, command=lambda _: command)
    assert "slime ended with exit code 3" in outcome.reasons, (rehearsal.folder / "slime.log").read_text()
    served = json.loads((rehearsal.folder / "served").read_text())
    assert {engine["node"] for engine in served} == {"127.0.0.1"}
    assert all(gone(pid) for engine in served for pid in engine["pids"])
    temporary = served[0]["temp"]
    assert not Path(temporary).exists()
    assert not [process for process in psutil.process_iter(["cmdline"]) if temporary in str(process.info["cmdline"])]
    assert list((rehearsal.folder / "ray").glob("raylet*"))  # its logs are kept


def test_a_ray_that_ends_is_an_error(rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal.folder.mkdir()
    broken = [sys.executable, "-c", "print('no room for Ray'); raise SystemExit(1)"]
    monkeypatch.setattr(module, "ray_command", lambda *_: broken)
    with (
        Display(Console(stderr=True), 3) as display,
        pytest.raises(UpstreamError, match="Ray did not stay up") as error,
    ):
        module.conduct(rehearsal, display, command=fake_slime("good"))
    assert "no room for Ray" in str(error.value)
    assert not (rehearsal.folder / "slime.log").exists()


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_the_plain_display_says_each_thing_once_and_never_goes_back() -> None:
    console = Console(file=StringIO(), force_terminal=False, width=100)
    with Display(console, rollouts=2) as display:
        for phase, done in [
            (Phase.RAY, 0),
            (Phase.SLIME, 0),
            (Phase.SLIME, 0),
            (Phase.ROLLOUTS, 0),
            (Phase.ENGINES, 0),
            (Phase.ROLLOUTS, 1),
            (Phase.ROLLOUTS, 1),
            (Phase.STOPPING, 0),
        ]:
            display.show(phase, done)
    shown = [line.split("] ")[1] for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert shown == [
        "starting Ray",
        "starting slime",
        "rolling out and training, 0/2 done",
        "rolling out and training, 1/2 done",
        "stopping",
    ]


def test_the_phase_follows_what_runs_and_what_was_written(
    rehearsal: Rehearsal, processes: RunProcesses, tmp_path: Path
) -> None:
    rehearsal.folder.mkdir()
    assert module._progress(rehearsal, processes.alive()) == (Phase.SLIME, 0)
    # The title that Ray and SGLang give themselves is all that shows of an engine from outside.
    processes.start([sys.executable, "-c", SLEEP, "ray::SGLangEngine"], tmp_path / "log", environment_of("this-run"))
    eventually(lambda: module._progress(rehearsal, processes.alive()) == (Phase.ENGINES, 0))
    (rehearsal.folder / "processes.json").write_text(json.dumps(processes_of()))
    assert module._progress(rehearsal, processes.alive()) == (Phase.ROLLOUTS, 0)
    lines = "".join(json.dumps(record) + "\n" for record in metrics_of(2))
    (rehearsal.folder / "metrics.jsonl").write_text(lines)
    assert module._progress(rehearsal, []) == (Phase.ROLLOUTS, 2)


def test_the_live_display_ticks_only_what_was_done() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=100, color_system=None)
    with Display(console, rollouts=2) as display:
        for phase in (Phase.RAY, Phase.SLIME, Phase.ROLLOUTS, Phase.STOPPING):
            display.show(phase)
    end = console.file.getvalue().rsplit("starting Ray", 1)  # type: ignore[attr-defined]
    lines = (end[0].splitlines()[-1] + "starting Ray" + end[1]).splitlines()
    ticked = {line.split("✓")[1].split("━")[0].strip() for line in lines if "✓" in line}
    assert ticked == {"starting Ray", "starting slime", "stopping"}


def test_patches_that_are_not_verified_are_named() -> None:
    console = Console(file=StringIO(), width=120)
    for table in tables(Outcome(processes=with_state("trainer", "failed"))):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Patches that are not verified" in text
    (row,) = [line for line in text.splitlines() if "failed" in line and "router" in line]
    assert row.split()[-2:] == ["trainer", "0"]
