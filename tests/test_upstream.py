"""The whole real stack on the CPU: slime v0.3.1, stock Megatron-LM, SGLang, sglang-router and Ray."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from miles_plugins.console import read_metrics, steps_of
from tests.wheels import unpacked_commit

pytestmark = pytest.mark.upstream

MAIN = "624b824a898ab0ec1fcb4d373004c7f3852bf515"  # slime's main of 2026-07


def rehearse(
    slime: Path, megatron: Path, folder: Path, *options: str, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miles_plugins.entrypoints.cli", "rehearse", "--json", "--folder", str(folder)]
    paths = os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH")]))
    # slime looks for free ports from 15000 on in each run: two at once would find the same.
    with FileLock(Path(tempfile.gettempdir(), f"miles-plugins-rehearsal-{os.getuid()}.lock")):
        return subprocess.run(
            [*command, "--slime", str(slime), "--megatron", str(megatron), *options],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=800,
        )


def passed(result: subprocess.CompletedProcess[str], folder: Path, rollouts: int = 3) -> dict[str, Any]:
    log = folder / "slime.log"
    assert result.returncode == 0, result.stderr + (log.read_text()[-4000:] if log.exists() else "")
    answer: dict[str, Any] = json.loads(result.stdout)
    assert answer["passed"]
    assert len(answer["rollouts"]) == rollouts
    for row in answer["rollouts"]:
        assert row["grad_norm"] > 0
        assert row["logprob_difference"] < 0.01, "the engine does not run the weights that were trained"
    return answer


def replayed_everywhere(answer: dict[str, Any]) -> None:
    """Every choice, and each by its own router: the engine begins with the trainer's weights, so both choose alike."""
    rows = answer["rollouts"]
    assert [row["replay_coverage"] for row in rows] == [1.0] * len(rows)
    assert rows[0]["routing_difference"] < 0.1, "the routers were given other routers' choices"


HOOK_LOG = """
import os
from pathlib import Path

from miles_plugins.activation import current, is_active


def note(*words):
    if is_active():
        with (Path(__file__).parent / f"{current().role}-{os.getpid()}.calls").open("a") as file:
            file.write(" ".join(words) + chr(10))
"""
TOLD = {"pass_begins": "stage", "pass_ends": "stage", "metrics_logged": "step_key", "model_built": "role"}
IN_STEP = ("rollout_ready", "collect_train_data", "take_routed_experts", "step_metrics", "export_weights", *TOLD)


def calls(folder: Path, role: str) -> list[str]:
    """The hook calls of a role's process."""
    return [line for file in folder.glob(f"{role}-*.calls") for line in file.read_text().splitlines()]


def in_order(calls: list[str], names: set[str]) -> list[str]:
    """Those of these names, without repetition."""
    return [call for call, _ in itertools.groupby(call for call in calls if call in names)]


WEIGHT_WATCH = """
import hashlib, json
from pathlib import Path

import torch

from miles_plugins.int4_qat import plugin as int4

FOLDER = Path(__file__).parent
arrived, used = {}, set()


def digest(weight):
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def write(side, digests):
    with (FOLDER / side).open("a") as file:
        file.write(json.dumps(sorted(digests)) + chr(10))


@hookimpl
def receive_weights(named_tensors):
    for name, tensor in named_tensors:
        if ".experts." in name:
            arrived[name] = digest(tensor)
        yield name, tensor


@hookimpl
def after_weight_update():
    write("engine", arrived.values())


@hookimpl
def model_built():
    compute = int4.Int4Weights.__call__

    def watched(self, weights):
        found = compute(self, weights)
        parts = 2 if self.linear.name.endswith("fc1") else 1  # gate and up
        used.update(digest(part) for weight in found for part in weight.chunk(parts))
        return found

    int4.Int4Weights.__call__ = watched


@hookimpl
def pass_begins():
    used.clear()


@hookimpl
def pass_ends(stage):
    if stage == "train":
        write("trainer", used)
"""


@pytest.mark.usefixtures("upstream_path")
@pytest.mark.parametrize(("version", "plugins"), [(MAIN, "r3,int4"), ("v0.3.1", "int4")], ids=["main", "v0.3.1"])
def test_the_trainer_computes_with_the_engines_int4_weights(
    megatron: Path, tmp_path: Path, version: str, plugins: str
) -> None:
    """slime's main keeps its metrics, its accelerators and a check of the routing elsewhere."""
    path = third_party(tmp_path, "weight_watch", WEIGHT_WATCH)
    slime = unpacked_commit(("SLIME_HOME", "~/slime", version))
    options = ["--plugins", f"{plugins},weight_watch", "--rollouts", "2"]
    answer = passed(rehearse(slime, megatron, tmp_path / "run", *options, path=path), tmp_path / "run", rollouts=2)
    if "r3" in plugins:
        replayed_everywhere(answer)
    engine, trainer = (
        [json.loads(line) for line in (tmp_path / side).read_text().splitlines()] for side in ("engine", "trainer")
    )
    assert [len(digests) for digests in trainer] == [48, 48]  # 2 layers of 8 experts with 3 matrices
    assert engine[:2] == trainer
    assert engine[0] != engine[1], "nothing was trained"


BYTE_WATCH = """
import hashlib, json
from pathlib import Path

import torch

from miles_plugins import hookimpl

LOG = Path(__file__).with_name("arrived")


@hookimpl(tryfirst=True)
def receive_weights(named_tensors):
    for name, tensor in named_tensors:
        content = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        with LOG.open("a") as file:
            file.write(json.dumps([name, str(tensor.dtype), hashlib.sha256(content).hexdigest()]) + chr(10))
        yield name, tensor
"""


@pytest.mark.usefixtures("upstream_path")
def test_the_first_update_brings_sglang_the_fp8_checkpoint_byte_for_byte(
    slime: Path, megatron: Path, tmp_path: Path
) -> None:
    path = third_party(tmp_path, "byte_watch", BYTE_WATCH)
    options = ["--plugins", "byte_watch,r3,fp8", "--rollouts", "2", "--", "--fp8-alarm", "stop"]
    answer = passed(rehearse(slime, megatron, tmp_path / "run", *options, path=path), tmp_path / "run", rollouts=2)
    replayed_everywhere(answer)
    arrived = [json.loads(line) for line in (tmp_path / "arrived").read_text().splitlines()]
    names = {name for name, *_ in arrived}
    by_name = {name: [what for other, *what in arrived if other == name] for name in names}
    assert {len(each) for each in by_name.values()} == {4}  # the checkpoint, and three updates
    assert sum(each[0][0] == "torch.float8_e4m3fn" for each in by_name.values()) == 2 * (4 + 3 * 8)
    assert all(each[0] == each[1] for each in by_name.values())
    assert any(each[1] != each[3] for each in by_name.values()), "nothing was trained"
    evidence = {process["role"]: process["probes"].get("fp8_unified") for process in answer["processes"]}
    assert "multiply in FP8 (attention, experts)" in evidence["trainer"]
    assert "8 parameters multiply in FP8 by the reference" in evidence["sglang_scheduler"]


@pytest.mark.usefixtures("upstream_path")
def test_routing_is_replayed_and_the_embedded_host_calls_the_hooks_as_slime_does(
    slime: Path, megatron: Path, tmp_path: Path
) -> None:
    code = HOOK_LOG
    for hook in IN_STEP:
        code += f"\n\n@hookimpl\ndef {hook}({TOLD.get(hook, '')}):\n    note({hook!r}, {TOLD.get(hook, '')})\n"
    path = third_party(tmp_path, "hook_log", code)
    answer = passed(
        rehearse(slime, megatron, tmp_path / "run", "--plugins", "r3,hook_log", path=path), tmp_path / "run"
    )

    trainer, manager = calls(tmp_path, "trainer"), calls(tmp_path, "rollout_manager")
    for file in tmp_path.glob("*.calls"):
        file.unlink()
    small = (
        "--embedded --plugins r3,hook_log --num-rollout 3 --num-layers 2 --num-experts 8 --moe-router-topk 2".split()
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "miles_plugins.entrypoints.slime_train",
            *small,
            "--run-folder",
            str(tmp_path / "embedded"),
        ],
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # The one process was the driver first, then reported as each, and trained as the trainer.
    every = [call for role in ("driver", "rollout_manager", "trainer") for call in calls(tmp_path, role)]
    shared = {"metrics_logged rollout/step"}  # slime's trainer logs a part of it as well
    for of_slime, names in ((trainer, set(trainer) - shared), (manager, set(manager))):
        assert in_order(every, names) == in_order(of_slime, names)
    assert set(every) == set(trainer) | set(manager)

    replayed_everywhere(answer)
    roles = {process["role"] for process in answer["processes"]}
    assert roles == {
        "driver",
        "rollout_manager",
        "trainer",
        "engine",
        "sglang_server",
        "sglang_scheduler",
        "sglang_detokenizer",
    }


DENSE_FIRST_LAYER = "--layers 4 --dense-layers 1 --experts 16 --topk 4".split()
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
VIRTUAL_STAGES = ["--num-layers-per-virtual-pipeline-stage", "1"]


@pytest.mark.parametrize(
    ("layout", "flags", "engines", "logged"),
    [
        ("--tensor-parallel 2 --expert-parallel 2 --engines 2", [], 2, "(tensor, pipeline) model parallel rank (1, 0)"),
        ("--pipeline-parallel 2", [], 1, "(tensor, pipeline) model parallel rank (0, 1)"),
        ("--pipeline-parallel 2", VIRTUAL_STAGES, 1, "Number of virtual stages per pipeline stage: 2"),
    ],
    ids=["tensor-and-expert", "pipeline", "virtual-pipeline"],
)
@pytest.mark.usefixtures("upstream_path")
def test_routing_is_replayed_behind_a_dense_layer_on_two_ranks_that_recompute(
    slime: Path, megatron: Path, tmp_path: Path, layout: str, flags: list[str], engines: int, logged: str
) -> None:
    options = ["--plugins", "r3", "--rollouts", "2", *DENSE_FIRST_LAYER, *layout.split()]
    folder = tmp_path / "run"
    answer = passed(rehearse(slime, megatron, folder, *options, "--", *RECOMPUTE, *flags), folder, rollouts=2)
    replayed_everywhere(answer)
    assert sum(process["role"] == "trainer" for process in answer["processes"]) == 2
    assert sum(process["role"] == "sglang_scheduler" for process in answer["processes"]) == engines
    # Otherwise two ranks of data parallelism would pass too.
    assert logged in (folder / "slime.log").read_text()


@pytest.mark.usefixtures("upstream_path")
def test_the_draft_of_the_real_engine_learns_from_the_real_trainer(slime: Path, megatron: Path, tmp_path: Path) -> None:
    folder, rollouts = tmp_path / "run", 8
    # A policy that learns fast: to draft for it, the draft must learn as well (frozen, 0.7 % became 0.3 %).
    fast = ["--lr", "1e-2", "--rollout-max-response-len", "24"]
    result = rehearse(slime, megatron, folder, "--plugins", "r3,spec", "--rollouts", str(rollouts), "--", *fast)
    answer = passed(result, folder, rollouts=rollouts)
    replayed_everywhere(answer)  # what the draft routes is not recorded

    metrics = read_metrics(folder / "metrics.jsonl")
    losses = [step["train/mtp_loss"] for step in steps_of(metrics, "train/step").values()]
    assert losses[0] == pytest.approx(math.log(128), abs=0.1)  # a random draft knows nothing
    assert losses[-1] < losses[0] - 0.3
    steps = list(steps_of(metrics, "rollout/step").values())
    assert all(step["rollout/spec/verified"] > 300 for step in steps)
    rates = [step["rollout/spec/accept_rate"] for step in steps]
    assert sum(rates[-2:]) > 1.5 * sum(rates[:2])
    assert steps[-1]["rollout/spec/accept_length"] > steps[0]["rollout/spec/accept_length"] > 1

    # Once before the first rollout, and after each; SGLang's draft has all of its parameters from the update.
    updates = re.findall(r"Glm4MoeForCausalLMNextN: (\d+) names received, (\d+) parameters written", _log(folder))
    assert len(updates) == rollouts + 1
    assert len(set(updates)) == 1
    assert min(map(int, updates[0])) > 0
    evidence = {process["role"]: process["probes"].get("spec_rl") for process in answer["processes"]}
    assert evidence["sglang_scheduler"] == "EAGLE, the draft is trained"


def _log(folder: Path) -> str:
    return (folder / "slime.log").read_text()


def third_party(folder: Path, name: str, code: str) -> Path:
    """A distribution with one plugin, importable from the folder."""
    (folder / f"{name}.py").write_text(f"from miles_plugins import PluginError, hookimpl\n{code}")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[miles_plugins]\n{name} = {name}\n")
    return folder


@pytest.mark.usefixtures("upstream_path")
def test_training_does_not_begin_without_evidence(slime: Path, megatron: Path, tmp_path: Path) -> None:
    path = third_party(tmp_path, "silent", "SIDES = ('trainer',)\n\n@hookimpl\ndef probe():\n    return None\n")
    result = rehearse(slime, megatron, tmp_path / "run", "--plugins", "silent", path=path)
    assert result.returncode == 1
    error = json.loads(result.stdout)["error"]
    assert "training does not begin" in error
    assert "plugin silent showed no evidence in 1 trainer process(es)" in error
    assert json.loads(result.stdout)["rollouts"] == []


@pytest.mark.usefixtures("upstream_path")
def test_the_error_of_an_sglang_process_reaches_the_user(slime: Path, megatron: Path, tmp_path: Path) -> None:
    code = """
@hookimpl
def probe(role):
    if role == "sglang_scheduler":
        raise PluginError("this scheduler is not what it should be", {"found": "a test"}, "pass it")
"""
    path = third_party(tmp_path, "broken", code)
    result = rehearse(slime, megatron, tmp_path / "run", "--plugins", "broken", path=path)
    assert result.returncode == 1
    error = json.loads(result.stdout)["error"]
    assert "this scheduler is not what it should be" in error, error
    assert json.loads(result.stdout)["rollouts"] == []


ZERO_HEAD = """
from pathlib import Path

FOLDER = Path(__file__).parent


@hookimpl
def export_weights(named_tensors):
    with (FOLDER / "sent").open("a") as file:
        file.writelines(f"{name}\\n" for name, _ in named_tensors)
    return [(name, tensor * 0 if name == "lm_head.weight" else tensor) for name, tensor in named_tensors]


@hookimpl
def collect_train_data(train_data):
    (FOLDER / "log_probs").write_text(repr(train_data["rollout_log_probs"]))
"""


@pytest.mark.usefixtures("upstream_path")
def test_under_data_parallelism_the_engine_runs_the_weights_that_a_plugin_exported(
    slime: Path, megatron: Path, tmp_path: Path
) -> None:
    """With a head of zeros, all of the 128 tokens are equally likely: to the engine, and in what is saved."""
    path = third_party(tmp_path, "zero_head", ZERO_HEAD)
    save = f"--save {tmp_path}/saved --save-interval 1 --no-save-optim --save-hf {tmp_path}/hf-{{rollout_id}}"
    options = ["--plugins", "zero_head", "--data-parallel", "2", "--rollouts", "1", "--", *save.split()]
    result = rehearse(slime, megatron, tmp_path / "run", *options, path=path)
    assert result.returncode == 0, result.stderr + (tmp_path / "run" / "slime.log").read_text()[-4000:]
    log_probs = [each for sample in json.loads((tmp_path / "log_probs").read_text()) for each in sample]
    assert len(log_probs) > 32
    assert log_probs == pytest.approx([-math.log(128)] * len(log_probs), abs=1e-6)

    from safetensors.torch import load_file

    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    sent = Counter((tmp_path / "sent").read_text().split())
    assert set(sent) == set(trained)
    assert len(set(sent.values())) == 1, "every weight is sent as often as any other"
    saved = {
        name: weight for file in (tmp_path / "hf-0").glob("*.safetensors") for name, weight in load_file(file).items()
    }
    assert set(saved) == set(trained)
    assert {name for name, weight in saved.items() if not weight.any()} == {"lm_head.weight"}
    answer = json.loads(result.stdout)
    trainer, _ = (process for process in answer["processes"] if process["role"] == "trainer")
    states = {patch["id"]: patch["state"] for patch in trainer["patches"]}
    assert states["slime.weights.export"] == "verified"
    (row,) = answer["rollouts"]
    assert row["logprob_difference"] > 0.05, "the trainer's own head is no head of zeros"
    assert row["grad_norm"] > 0
    assert row["replay_coverage"] is None


TORCHVISION = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
"""


def test_without_plugins_the_help_is_train_pys_own(slime: Path, upstream_path: str, tmp_path: Path) -> None:
    # torchvision's CUDA build does not import without a GPU, so that both commands need its operators defined.
    (tmp_path / "sitecustomize.py").write_text(TORCHVISION)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), upstream_path]), "COLUMNS": "120"}
    train = str(slime / "train.py")
    plain = [sys.executable, train, "--help"]
    ours = [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", "--train-script", train, "--help"]
    results = [subprocess.run(c, env=environment, capture_output=True, text=True, timeout=300) for c in (plain, ours)]
    assert results[0].returncode == results[1].returncode == 0, results[0].stderr
    assert "--rollout-batch-size" in results[0].stdout
    assert results[0].stdout == results[1].stdout


@pytest.mark.usefixtures("upstream_path")
def test_a_mistyped_flag_is_refused_before_anything_starts(slime: Path, megatron: Path, tmp_path: Path) -> None:
    result = rehearse(slime, megatron, tmp_path / "run", "--", "--rollout-temprature", "0.5")
    assert result.returncode == 1
    assert "did you mean --rollout-temperature?" in result.stdout
    assert not (tmp_path / "run" / "processes.json").exists()


@pytest.mark.usefixtures("upstream_path")
def test_what_needs_a_gpu_is_refused_by_name(slime: Path, megatron: Path, tmp_path: Path) -> None:
    result = rehearse(slime, megatron, tmp_path / "run", "--", "--colocate")
    assert result.returncode == 1
    assert "cpu_rehearsal cannot work with these arguments" in result.stdout
    assert "--colocate" in result.stdout
