"""`miles-plugins rehearse`: the real training loop on a tiny model, on the CPU of this machine, and a verdict.

It writes a model and a task, starts a Ray of its own, runs `slime-train` on the user's slime, watches what the plugin
layer writes (metrics.jsonl, processes.json), judges that, and stops every process it started.
"""

from __future__ import annotations

import enum
import importlib.util
import json
import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from miles_plugins.console import Interrupted, interruptible, number, percent, read_metrics, steps_of, table
from miles_plugins.cpu_rehearsal import toy_task
from miles_plugins.cpu_rehearsal.tiny_model import TinyModel, write_tiny_model
from miles_plugins.errors import ArgumentError, PluginError, UpstreamError
from miles_plugins.manager import Plugins, installed_plugins, resolve_names

PROMPTS_PER_ROLLOUT = 4
SAMPLES_PER_PROMPT = 8

LOG, METRICS, PROCESSES = "slime.log", "metrics.jsonl", "processes.json"
TIMED_OUT = 124
POLL_SECONDS = 0.25
PATIENCE_SECONDS = 3.0  # between asking a process to end and ending it

# Megatron-LM's flags that say how many layers each pipeline stage has, where it is not the same number for all.
UNEVEN_STAGES = ("--decoder-first-pipeline", "--decoder-last-pipeline", "--pipeline-model-parallel-layout")

# "armed": the patch's target was never imported in that process, so there was nothing to change.
HARMLESS_STATES = ("verified", "superseded", "skipped", "armed")
ENGINE_ROLES = ("engine", "sglang_server", "sglang_scheduler", "sglang_detokenizer")  # one of each an engine


@dataclass(frozen=True)
class Rehearsal:
    """What to rehearse, where, and on which checkouts."""

    folder: Path
    slime: Path
    megatron: Path
    plugins: tuple[str, ...] = ("r3_replay",)
    rollouts: int = 3
    layers: int = 2
    dense_layers: int = 0
    hidden_size: int = 64
    experts: int = 8
    topk: int = 2
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    data_parallel: int = 1
    engines: int = 1
    seed: int = 0
    timeout: float = 600.0
    extra_flags: tuple[str, ...] = ()

    @property
    def trainers(self) -> int:
        """Trainer ranks; expert parallelism divides them and adds none."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    @property
    def gpus(self) -> int:
        """What Ray is told it has; no GPU is used."""
        return self.trainers + self.engines

    @property
    def all_plugins(self) -> list[str]:
        """The user's plugins between the one that makes a CPU run possible and the one that records it."""
        return list(dict.fromkeys(["cpu_rehearsal", *self.plugins, "metrics_jsonl"]))


# -- what is run ------------------------------------------------------------------------------------------------------


def check_requirements(rehearsal: Rehearsal) -> None:
    """Raise UpstreamError naming everything that is missing, and how to get it."""
    missing = {
        module: f"not installed in {sys.executable}"
        for module in ("torch", "transformers", "ray", "sglang")
        if importlib.util.find_spec(module) is None
    }
    for name, folder, inside in [
        ("slime", rehearsal.slime, ("train.py", "slime/ray")),
        ("Megatron-LM", rehearsal.megatron, ("megatron/core", "megatron/training")),
    ]:
        absent = [path for path in inside if not (folder / path).exists()]
        if absent:
            missing[name] = f"no {' and no '.join(absent)} in {folder}"
    if missing:
        raise UpstreamError(
            "something that a rehearsal needs is missing; nothing was started",
            missing,
            "install the packages into this Python, as CONTRIBUTING.md (The real stack) says;\n"
            "give the checkouts with --slime and --megatron, or set SLIME_HOME and MEGATRON_HOME.\n"
            "PyPI's `slime` is an unrelated package: git clone https://github.com/THUDM/slime ~/slime",
        )


def check_shape(rehearsal: Rehearsal) -> None:
    """Raise ArgumentError for a model that cannot be made, or for a split that Megatron-LM would refuse much later."""
    split, ranks = rehearsal.expert_parallel, rehearsal.tensor_parallel * rehearsal.data_parallel
    if ranks % split or rehearsal.experts % split:
        raise ArgumentError(
            f"--expert-parallel {split} does not divide both the trainer ranks and the experts evenly",
            {"trainer ranks": f"{ranks} (--tensor-parallel x --data-parallel)", "experts": rehearsal.experts},
            "choose a number that divides both",
        )
    stages = rehearsal.pipeline_parallel
    if rehearsal.layers % stages and not any(flag.startswith(UNEVEN_STAGES) for flag in rehearsal.extra_flags):
        raise ArgumentError(
            f"--pipeline-parallel {stages} does not divide the layers evenly",
            {"layers": rehearsal.layers},
            "choose another --layers, or say after `--` how many each stage has: --decoder-first-pipeline-num-layers N",
        )
    if rehearsal.topk > rehearsal.experts:
        raise ArgumentError(f"--topk {rehearsal.topk} is more than the experts", {"experts": rehearsal.experts})
    if rehearsal.dense_layers >= rehearsal.layers:
        raise ArgumentError(
            f"--dense-layers {rehearsal.dense_layers} leaves no layer with experts", {"layers": rehearsal.layers}
        )


def make_folder(folder: Path) -> None:
    """Make the rehearsal's folder. Raises ArgumentError if something is in it: old results would be judged again."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ArgumentError(f"--folder {folder} is not empty", next="name a new folder")


def write_inputs(rehearsal: Rehearsal) -> list[str]:
    """Write the model and the prompts into the rehearsal's folder; the command that trains on them."""
    shapes = Plugins.named(rehearsal.all_plugins).hook.tiny_model_shape()
    model = write_tiny_model(
        rehearsal.folder / "model",
        seed=rehearsal.seed,
        layers=rehearsal.layers,
        dense_layers=rehearsal.dense_layers,
        hidden_size=rehearsal.hidden_size,
        experts=rehearsal.experts,
        topk=rehearsal.topk,
        tensor_parallel=rehearsal.tensor_parallel,
        **{name: size for shape in shapes for name, size in shape.items()},
    )
    prompts = rehearsal.rollouts * PROMPTS_PER_ROLLOUT
    toy_task.write_prompts(rehearsal.folder / toy_task.PROMPTS, prompts, rehearsal.seed)
    return [
        *(sys.executable, "-m", "miles_plugins.entrypoints.slime_train"),
        *("--plugins", ",".join(rehearsal.all_plugins)),
        *("--train-script", str(rehearsal.slime / "train.py")),
        *("--metrics-jsonl", str(rehearsal.folder / METRICS)),
        *slime_flags(rehearsal, model, toy_task.flags(rehearsal.folder)),
    ]


def slime_flags(rehearsal: Rehearsal, model: TinyModel, task: Sequence[str]) -> list[str]:
    """What a launch script says to slime. The CPU-specific flags are the cpu plugin's."""
    cluster = {
        "--actor-num-nodes": 1,
        "--actor-num-gpus-per-node": rehearsal.trainers,
        "--rollout-num-gpus": rehearsal.engines,
        "--rollout-num-gpus-per-engine": 1,
        "--num-gpus-per-node": rehearsal.gpus,
        "--tensor-model-parallel-size": rehearsal.tensor_parallel,
        "--expert-model-parallel-size": rehearsal.expert_parallel,
        "--expert-tensor-parallel-size": 1,
        "--pipeline-model-parallel-size": rehearsal.pipeline_parallel,
    }
    plugins = Plugins.named(rehearsal.all_plugins)
    checkpoint = plugins.hook.prepare_tiny_model(folder=model.folder) or model.folder
    checkpoints = {"--hf-checkpoint": checkpoint, "--load": model.folder}
    rollout = {
        "--num-rollout": rehearsal.rollouts,
        "--rollout-batch-size": PROMPTS_PER_ROLLOUT,
        "--n-samples-per-prompt": SAMPLES_PER_PROMPT,
        "--rollout-max-response-len": 16,
        "--rollout-temperature": 1.0,
        "--rollout-seed": rehearsal.seed,
    }
    training = {
        "--global-batch-size": PROMPTS_PER_ROLLOUT * SAMPLES_PER_PROMPT,  # one optimizer step a rollout
        "--micro-batch-size": 1,
        "--advantage-estimator": "grpo",
        "--optimizer": "adam",
        "--lr": 1e-3,
        "--lr-decay-style": "constant",
        "--seed": rehearsal.seed,
    }
    options = {**cluster, **checkpoints, **rollout, **training}
    by_plugins = [word for flags in plugins.hook.rehearsal_flags(checkpoint=checkpoint) for word in flags]
    return [
        *model.flags,
        *(word for name, value in options.items() for word in (name, str(value))),
        *(["--sequence-parallel"] if rehearsal.tensor_parallel > 1 else []),  # Megatron-LM demands it for MoE
        *task,
        *by_plugins,
        *rehearsal.extra_flags,  # last, so that they win
    ]


def run_environment(rehearsal: Rehearsal, run: str, ray_port: int, scratch: Path) -> dict[str, str]:
    """The environment of Ray and of slime: this one's, on loopback only, without another run's plugin layer."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MILES_PLUGINS")}
    paths = [str(rehearsal.megatron), str(rehearsal.slime), inherited.get("PYTHONPATH", "")]
    return {
        **inherited,
        "MILES_PLUGINS_RUN": run,
        "MILES_PLUGINS_RUN_DIR": str(rehearsal.folder),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(scratch),
        "RAY_ADDRESS": f"127.0.0.1:{ray_port}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # otherwise Ray turns 127.0.0.1 into the machine's own address
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",  # a cluster of our own, whatever ~/.ray/auth_token another one left
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "SLIME_HOST_IP": "127.0.0.1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than all that a rehearsal computes
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }


def ray_command(rehearsal: Rehearsal, port: int, client_port: int, scratch: Path) -> list[str]:
    """Start a Ray head that stays our child (--block), on ports that no other Ray of this machine uses."""
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *(
            "--num-gpus",
            str(rehearsal.gpus),
            "--num-cpus",
            str(rehearsal.gpus + 4),
            "--object-store-memory",
            str(256 * 2**20),
        ),
        *("--node-ip-address", "127.0.0.1", "--port", str(port), "--ray-client-server-port", str(client_port)),
        *("--include-dashboard", "false", "--dashboard-agent-listen-port", "0"),
        *("--min-worker-port", "0", "--max-worker-port", "0"),  # 0: any free one
        *("--temp-dir", str(scratch)),
    ]


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, all different."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


# -- processes --------------------------------------------------------------------------------------------------------


class RunProcesses:
    """Every process of one run, on a machine where others may run Ray and SGLang too.

    Ray workers and SGLang servers live in sessions of their own, and outlive their parents. So a process belongs to
    the run if its parent does, or if its environment names the run; what was once seen is remembered.
    """

    def __init__(self, run: str) -> None:
        self._mark = f"MILES_PLUGINS_RUN={run}".encode()
        self._started: list[subprocess.Popen[bytes]] = []
        self._known: dict[int, psutil.Process] = {}

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command with its output in `log`; not in our process group, so that Ctrl-C reaches us alone."""
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._started.append(process)
        with suppress(psutil.NoSuchProcess):
            self._known[process.pid] = psutil.Process(process.pid)
        return process

    def alive(self) -> list[psutil.Process]:
        """The run's living processes. Call it often: it sees children only while their parents live."""
        for process in self._started:
            process.poll()  # reaps it
        # A number can be given to somebody else's process: is_running() compares the start times too.
        self._known = {pid: process for pid, process in self._known.items() if process.is_running()}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid not in self._known and (process.ppid() in self._known or self._is_marked(process.pid)):
                    self._known[process.pid] = process
        return [process for process in self._known.values() if not _is_zombie(process)]

    def stop(self) -> None:
        """Ask every process to end, then end it. Raises PluginError if one cannot be ended."""
        asked: set[int] = set()
        begun = time.monotonic()
        while processes := self.alive():
            waited = time.monotonic() - begun
            if waited > 10 * PATIENCE_SECONDS:
                raise PluginError(
                    "some processes of this rehearsal do not end",
                    {str(process.pid): _command_line(process) for process in processes},
                    "end them by hand",
                )
            for process in processes:
                with suppress(psutil.Error):
                    if waited > PATIENCE_SECONDS:
                        process.kill()
                    elif process.pid not in asked:
                        asked.add(process.pid)
                        process.terminate()
            time.sleep(0.1)

    def _is_marked(self, pid: int) -> bool:
        if pid == os.getpid():
            return False
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # ended, or another user's
            return False


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


# -- what the run left behind -----------------------------------------------------------------------------------------


def read_processes(file: Path) -> list[dict[str, Any]]:
    """The processes that reported, each {"role", "pid", "rank", "plugins", "digest", "patches", "probes"}."""
    with suppress(FileNotFoundError, json.JSONDecodeError):  # not yet there, or not yet all of it
        return list(json.loads(file.read_text(encoding="utf-8")))
    return []


def rollout_rows(metrics: Sequence[Mapping[str, Any]], begun: float) -> list[dict[str, Any]]:
    """One row a rollout that was trained on; `begun` is the unix time at which the first could start."""
    rollouts, training = steps_of(metrics, "rollout/step"), steps_of(metrics, "train/step")
    rows = []
    for step in sorted(training):
        values = {**rollouts.get(step, {}), **training[step]}
        rows.append(
            {
                "rollout": step,
                "reward": values.get("rollout/raw_reward"),
                "grad_norm": values.get("train/grad_norm"),
                "logprob_difference": values.get("train/train_rollout_logprob_abs_diff"),
                "replay_coverage": values.get("train/r3/coverage"),
                "routing_difference": values.get("train/r3/different_tokens"),
                "seconds": values["time"] - begun,
            }
        )
        begun = values["time"]
    return rows


def judge(
    metrics: Sequence[Mapping[str, Any]],
    processes: Sequence[Mapping[str, Any]],
    exit_code: int | None,
    rollouts: int,
    plugins: Sequence[str],
    *,
    trainers: int = 1,
    engines: int = 1,
    measure_only: bool = False,
) -> list[str]:
    """Why the rehearsal failed; nothing if all of it held. `exit_code` is slime's, None if it had to be stopped."""
    reasons = []
    if exit_code is None:
        reasons.append("slime did not end by itself")
    elif exit_code != 0:
        reasons.append(f"slime ended with exit code {exit_code}")
    reasons += _judge_steps(metrics, rollouts, coverage=float(not measure_only) if "r3_replay" in plugins else None)
    reasons += _judge_processes(processes, trainers, engines)
    return reasons


def _judge_steps(metrics: Sequence[Mapping[str, Any]], rollouts: int, *, coverage: float | None) -> list[str]:
    reasons = []
    collected, training = steps_of(metrics, "rollout/step"), steps_of(metrics, "train/step")
    for what, steps in [("collected", collected), ("trained on", training)]:
        absent = [str(step) for step in range(rollouts) if step not in steps]
        if absent:
            reasons.append(f"not {what}, of {rollouts} rollouts: {', '.join(absent)}")
    for step, values in sorted(training.items()):
        grad_norm = values.get("train/grad_norm")
        if grad_norm is None or not math.isfinite(grad_norm) or grad_norm <= 0:
            reasons.append(f"rollout {step}: the gradient norm is {grad_norm}, not a positive number")
        found = {**collected.get(step, {}), **values}.get("train/r3/coverage")
        if coverage is not None and found != coverage:
            reasons.append(f"rollout {step}: {percent(found)} of the routing was replayed, not {percent(coverage)}")
    return reasons


def _judge_processes(processes: Sequence[Mapping[str, Any]], trainers: int, engines: int) -> list[str]:
    if not processes:
        return ["the processes were never verified"]
    reasons = []
    expected = {"driver": 1, "rollout_manager": 1, "trainer": trainers, **dict.fromkeys(ENGINE_ROLES, engines)}
    reported = Counter(process["role"] for process in processes)
    for role, count in expected.items():
        if reported[role] < count:
            reasons.append(f"{reported[role]} of {count} {role} processes reported")
    if len({process["digest"] for process in processes}) > 1:
        reasons.append("the processes do not run the same plugins")
    for process in processes:
        for patch in process["patches"]:
            if patch["state"] not in HARMLESS_STATES:
                where = f"{process_name(process)} (pid {process['pid']})"
                detail = f": {patch['detail']}" if patch.get("detail") else ""
                reasons.append(f"{where}: patch {patch['id']} on {patch['target']} is {patch['state']}{detail}")
    return reasons


def process_name(process: Mapping[str, Any]) -> str:
    """A process's role, and its rank where it has one."""
    return process["role"] if process.get("rank") is None else f"{process['role']} {process['rank']}"


def error_block(log: str, lines: int = 30) -> str:
    """What to read first in slime's log: the last `slime-train:` message with its indented facts, else the end."""
    text = log.splitlines()
    for start in range(len(text) - 1, -1, -1):
        if text[start].startswith("slime-train:"):
            end = start + 1
            while end < len(text) and text[end].startswith("  "):
                end += 1
            if end > start + 1:  # a message without facts is a note, not an error
                return "\n".join(text[start:end])
    return "\n".join(text[-lines:])


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def tail(file: Path, lines: int = 30) -> str:
    """The last lines of a log."""
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


# -- what is shown ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a rehearsal went. `exit_code` is the command's: 0, 1, 124 (too long) or 128 + signal."""

    exit_code: int = 1
    reasons: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    processes: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class Phase(enum.IntEnum):
    """Where a rehearsal stands; only ever forward."""

    RAY = enum.auto()
    SLIME = enum.auto()
    ENGINES = enum.auto()
    ROLLOUTS = enum.auto()
    STOPPING = enum.auto()


PHASE_WORDS = {
    Phase.RAY: "starting Ray",
    Phase.SLIME: "starting slime",
    Phase.ENGINES: "starting engines and trainers",
    Phase.ROLLOUTS: "rolling out and training",
    Phase.STOPPING: "stopping",
}


class Display:
    """The phases as they pass: live in a terminal, a line each elsewhere."""

    def __init__(self, console: Console, rollouts: int, log: Path | None = None) -> None:
        """`log`: a file to print as it grows."""
        self._console = console
        self._rollouts = rollouts
        self._log = log
        self._log_read = 0
        self._begun = time.monotonic()
        self._phase: Phase | None = None
        self._done = 0
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24, complete_style="blue"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar: TaskID | None = None

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_bar(complete=True)
        self._bars.stop()

    @property
    def phase(self) -> str:
        """What is being done now, in words."""
        if self._phase is None:
            return "starting"
        words = PHASE_WORDS[self._phase]
        return f"{words}, {self._done}/{self._rollouts} done" if self._phase is Phase.ROLLOUTS else words

    def show(self, phase: Phase, done: int = 0) -> None:
        """Now in this phase, with so many rollouts done. Call it as often as you like; it never goes back."""
        self._print_log()
        before = self.phase
        if self._phase is None or phase > self._phase:
            self._close_bar(complete=phase is not Phase.STOPPING or self._done >= self._rollouts)
            self._phase = phase
            total = self._rollouts if phase is Phase.ROLLOUTS else None
            self._bar = self._bars.add_task(PHASE_WORDS[phase], total=total)
        self._done = max(self._done, done)
        if self._bar is not None and self._phase is Phase.ROLLOUTS:
            self._bars.update(self._bar, completed=self._done, description=self.phase)
        if self.phase != before and not self._console.is_terminal:
            self._console.print(
                f"[{time.monotonic() - self._begun:6.1f} s] {self.phase}", markup=False, highlight=False
            )

    def _close_bar(self, *, complete: bool) -> None:
        if self._bar is None:
            return
        if complete:
            self._bars.update(self._bar, total=self._rollouts, completed=self._rollouts)
        else:
            self._bars.update(self._bar, description=f"[red]{self.phase}")
            self._bars.stop_task(self._bar)

    def _print_log(self) -> None:
        if self._log is None or not self._log.exists():
            return
        with open(self._log, "rb") as log:
            log.seek(self._log_read)
            grown = log.read()
        whole = grown[: grown.rfind(b"\n") + 1]  # a character can be half written
        self._log_read += len(whole)
        if whole:
            self._console.print(whole.decode("utf-8", "replace"), end="", markup=False, highlight=False)


def tables(outcome: Outcome) -> Iterator[Table]:
    """The rollouts, the processes, the patches that are not verified, and what the probes found."""
    if outcome.rows:
        yield table(
            "Rollouts",
            ["rollout", "reward", "grad norm", "log-prob difference", "replayed", "routed differently", "seconds"],
            [
                [
                    str(row["rollout"]),
                    number(row["reward"], ".3f"),
                    number(row["grad_norm"], ".3f"),
                    number(row["logprob_difference"], ".6f"),
                    percent(row["replay_coverage"]),
                    percent(row["routing_difference"]),
                    number(row["seconds"], ".1f"),
                ]
                for row in outcome.rows
            ],
            numbers=True,
        )
    if not outcome.processes:
        return
    plugins = outcome.processes[0]["plugins"]  # the same everywhere, or the rehearsal failed
    names = ", ".join(f"{name} {version}" for name, version in plugins.items())
    evidence = [", ".join(map(str, process.get("probes", {}).values())) for process in outcome.processes]
    yield table(
        f"Every process runs {names}",
        ["process", "pid", "patches", "the plugins' evidence"],
        [
            [process_name(process), str(process["pid"]), _states(process), shown]
            for process, shown in zip(outcome.processes, evidence, strict=True)
        ],
    )
    if rows := _not_verified(outcome.processes):
        yield table("Patches that are not verified", ["patch", "state", "in"], rows)


def _states(process: Mapping[str, Any]) -> str:
    """`armed` (the target was never imported here, so it needs no change) is left out."""
    states = Counter(patch["state"] for patch in process["patches"])
    return ", ".join(f"{count} {state}" for state, count in states.items() if state != "armed") or "none needed"


def _not_verified(processes: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Patches in another state than verified; `armed` only for those that no process needed."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for process in processes:
        for patch in process["patches"]:
            names[patch["id"], patch["state"]].append(process_name(process))
    used = {patch for patch, state in names if state == "verified"}
    rows = {key: found for key, found in sorted(names.items()) if key[1] not in ("verified", "armed")}
    rows |= {
        (patch, state): ["no process imports its target"]
        for patch, state in names
        if state == "armed" and patch not in used
    }
    return [[patch, state, ", ".join(found)] for (patch, state), found in rows.items()]


def to_json(outcome: Outcome, folder: Path) -> str:
    """The whole outcome as one JSON object; numbers that JSON does not have become strings."""
    rows = [
        {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        for row in outcome.rows
    ]
    return json.dumps(
        {
            "passed": outcome.exit_code == 0,
            "exit_code": outcome.exit_code,
            "reasons": outcome.reasons,
            "error": "" if outcome.exit_code == 0 else error_block(_read(folder / LOG)),
            "folder": str(folder),
            "seconds": round(outcome.seconds, 1),
            "rollouts": rows,
            "processes": outcome.processes,
        },
        indent=2,
        allow_nan=False,
    )


# -- the run ----------------------------------------------------------------------------------------------------------


def conduct(
    rehearsal: Rehearsal,
    display: Display,
    *,
    command: Callable[[Rehearsal], list[str]] = write_inputs,
    with_ray: bool = True,
) -> Outcome:
    """Run the rehearsal in its existing folder, stop everything, and judge. Tests put another `command` in.

    Raises UpstreamError if Ray does not start or ends early. Also then, and when interrupted, nothing is left running.
    """
    begun = time.time()
    run = uuid.uuid4().hex[:12]
    processes = RunProcesses(run)
    scratch = Path(tempfile.mkdtemp(prefix="mp-", dir="/tmp"))  # Ray's sockets: the path must be short
    slime_exit: int | None = None
    stopped: tuple[int, str] | None = None
    with interruptible() as ignore_signals:
        try:
            deadline = time.monotonic() + rehearsal.timeout
            port, client_port = free_ports(2)
            environment = run_environment(rehearsal, run, port, scratch)
            display.show(Phase.RAY)
            watched = []
            if with_ray:
                ray = ray_command(rehearsal, port, client_port, scratch)
                watched.append(processes.start(ray, rehearsal.folder / "ray.log", environment))
            slime_arguments = command(rehearsal)
            if with_ray:
                _wait_for_port(port, rehearsal, watched, deadline)
            display.show(Phase.SLIME)
            slime = processes.start(slime_arguments, rehearsal.folder / LOG, environment)
            while (slime_exit := slime.poll()) is None:
                _check_running(rehearsal, watched, deadline)
                display.show(*_progress(rehearsal, processes.alive()))
                time.sleep(POLL_SECONDS)
            display.show(*_progress(rehearsal, alive=[]))
        except TimeoutError:
            stopped = TIMED_OUT, f"not finished after {rehearsal.timeout:g} s; it was {display.phase}"
        except Interrupted as interruption:
            stopped = 128 + interruption.signal_number, f"interrupted by {interruption}; it was {display.phase}"
        finally:
            ignore_signals()
            display.show(Phase.STOPPING)
            processes.stop()
            with suppress(OSError):
                shutil.copytree(scratch / "session_latest" / "logs", rehearsal.folder / "ray", dirs_exist_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)

    metrics = read_metrics(rehearsal.folder / METRICS)
    reported = read_processes(rehearsal.folder / PROCESSES)
    ready = (rehearsal.folder / PROCESSES).stat().st_mtime if reported else begun
    reasons = judge(
        metrics,
        reported,
        None if stopped else slime_exit,
        rehearsal.rollouts,
        rehearsal.plugins,
        trainers=rehearsal.trainers,
        engines=rehearsal.engines,
        measure_only="--r3-measure-only" in rehearsal.extra_flags,
    )
    if stopped:
        reasons[0] = stopped[1]  # says more than "did not end by itself"
    return Outcome(
        exit_code=stopped[0] if stopped else int(bool(reasons)),
        reasons=reasons,
        rows=rollout_rows(metrics, ready),
        processes=reported,
        seconds=time.time() - begun,
    )


def _check_running(rehearsal: Rehearsal, watched: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError
    if any(process.poll() is not None for process in watched):
        log = rehearsal.folder / "ray.log"
        raise UpstreamError("Ray did not stay up; everything was stopped", {"log": log}, tail(log))


def _wait_for_port(
    port: int, rehearsal: Rehearsal, watched: Sequence[subprocess.Popen[bytes]], deadline: float
) -> None:
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        _check_running(rehearsal, watched, deadline)
        time.sleep(POLL_SECONDS)


def _progress(rehearsal: Rehearsal, alive: Sequence[psutil.Process]) -> tuple[Phase, int]:
    """The phase, and how many rollouts have been trained on."""
    if read_processes(rehearsal.folder / PROCESSES):
        return Phase.ROLLOUTS, len(steps_of(read_metrics(rehearsal.folder / METRICS), "train/step"))
    titles = [_command_line(process) for process in alive]
    engine_seen = any("ray::SGLangEngine" in title or "sglang::" in title for title in titles)
    return (Phase.ENGINES if engine_seen else Phase.SLIME), 0


# -- the command ------------------------------------------------------------------------------------------------------


@click.command(name="rehearse")
@click.option("--plugins", default="r3", show_default=True, help="Comma-separated; cpu is always added in front.")
@click.option("--rollouts", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--layers", type=click.IntRange(min=1), default=2, show_default=True, help="Layers of the model.")
@click.option(
    "--dense-layers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The first so many layers have no experts; the model is then a GLM-4.5.",
)
@click.option(
    "--hidden-size",
    type=click.IntRange(min=32),
    default=64,
    show_default=True,
    help="Of the model; its experts are half as wide.",
)
@click.option("--experts", type=click.IntRange(min=2), default=8, show_default=True, help="Experts of a layer.")
@click.option("--topk", type=click.IntRange(min=2), default=2, show_default=True, help="Experts of a token.")
@click.option("--tensor-parallel", type=click.IntRange(1, 2), default=1, show_default=True)
@click.option("--pipeline-parallel", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--expert-parallel", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--data-parallel", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--engines", type=click.IntRange(min=1), default=1, show_default=True, help="SGLang engines.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--slime",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="SLIME_HOME",
    default="~/slime",
    show_default="$SLIME_HOME, ~/slime",
    help="slime checkout.",
)
@click.option(
    "--megatron",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="MEGATRON_HOME",
    default="~/Megatron-LM",
    show_default="$MEGATRON_HOME, ~/Megatron-LM",
    help="Megatron-LM checkout.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="New folder for the model, the logs and the results.  [default: runs/rehearsal-DATE-TIME]",
)
@click.option("--timeout", type=click.FloatRange(min=1), default=600, show_default=True, help="Seconds for all of it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--verbose", is_flag=True, help="Also show slime's log while it grows.")
@click.argument("extra_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- SLIME FLAGS]")
@click.pass_context
def rehearse(
    context: click.Context,
    plugins: str,
    rollouts: int,
    layers: int,
    dense_layers: int,
    hidden_size: int,
    experts: int,
    topk: int,
    tensor_parallel: int,
    pipeline_parallel: int,
    expert_parallel: int,
    data_parallel: int,
    engines: int,
    seed: int,
    slime: Path,
    megatron: Path,
    folder: Path | None,
    timeout: float,
    as_json: bool,
    verbose: bool,
    extra_flags: tuple[str, ...],
) -> None:
    """Run the real training loop on a tiny model, without a GPU, and judge it.

    Real slime, Ray, SGLang and Megatron-LM train a tiny random MoE model (165 k parameters, if you do not say
    otherwise) for a few rollouts on this machine's CPU. Further flags for slime go after `--`.

    Exit code: 0 if everything held, 1 if not, 124 if it took too long, 130 on Ctrl-C.
    """
    rehearsal = Rehearsal(
        folder=(folder or Path("runs") / time.strftime("rehearsal-%Y%m%d-%H%M%S")).absolute(),
        slime=slime.expanduser().absolute(),
        megatron=megatron.expanduser().absolute(),
        plugins=_full_names(plugins),
        rollouts=rollouts,
        layers=layers,
        dense_layers=dense_layers,
        hidden_size=hidden_size,
        experts=experts,
        topk=topk,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
        data_parallel=data_parallel,
        engines=engines,
        seed=seed,
        timeout=timeout,
        extra_flags=extra_flags,
    )
    context.exit(present(rehearsal, as_json=as_json, verbose=verbose))


def _full_names(plugins: str) -> tuple[str, ...]:
    """An unknown name ends here, before anything is started."""
    names = [name for name in plugins.split(",") if name.strip()]
    try:
        return tuple(plugin.name for plugin in resolve_names(names, installed_plugins()))
    except PluginError as error:
        raise click.ClickException(str(error)) from error


def present(
    rehearsal: Rehearsal,
    *,
    as_json: bool = False,
    verbose: bool = False,
    command: Callable[[Rehearsal], list[str]] = write_inputs,
    upstream: bool = True,
) -> int:
    """Check, conduct and report: progress to stderr, the result to stdout. Returns the exit code.

    Tests put another `command` in, and do without the `upstream` packages.
    """
    errors = Console(stderr=True)
    try:
        check_shape(rehearsal)
        if upstream:
            check_requirements(rehearsal)
        make_folder(rehearsal.folder)
        with Display(errors, rehearsal.rollouts, rehearsal.folder / LOG if verbose else None) as display:
            outcome = conduct(rehearsal, display, command=command, with_ray=upstream)
    except PluginError as error:
        outcome = Outcome(reasons=[str(error)])

    if as_json:
        click.echo(to_json(outcome, rehearsal.folder))
        return outcome.exit_code
    console = Console(width=None if sys.stdout.isatty() else 120)
    for shown in tables(outcome):
        console.print(shown)
    if outcome.exit_code == 0:
        console.print(f"[green]The rehearsal passed[/] in {outcome.seconds:.0f} s: {escape(str(rehearsal.folder))}")
    else:
        _explain(outcome, rehearsal.folder / LOG)
    return outcome.exit_code


def _explain(outcome: Outcome, log: Path) -> None:
    click.echo("The rehearsal failed:", err=True)
    for reason in outcome.reasons:
        click.echo("  - " + reason.replace("\n", "\n    "), err=True)
    if log.exists():
        click.echo(f"\n{error_block(_read(log))}\n\nlog: {log}", err=True)
