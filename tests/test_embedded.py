"""The embedded host, run as a user runs it: every test here starts `slime-train --embedded` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from miles_plugins import hookspecs
from miles_plugins.embedded.results import read_results, summarize

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]
SMALL = "--num-layers 2 --num-experts 8 --moe-router-topk 2 --rollout-batch-size 2 --n-samples-per-prompt 4".split()
HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")]

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("torch", "transformers", "megatron", "matplotlib", "tensorboard")),
    reason='the embedded host needs `pip install -e ".[embedded]"`',
)


def environment(*path: Path) -> dict[str, str]:
    """Of a user's shell: nothing of a test run, nor of a checkout on PYTHONPATH."""
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("MILES_PLUGINS", "PYTHONPATH"))}
    return {**inherited, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}


def command(*flags: object) -> list[str]:
    return [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", "--embedded", *map(str, flags)]


def embedded(*flags: object, path: Sequence[Path] = (), code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run to the end; the exit code must be `code`."""
    done = subprocess.run(command(*flags), env=environment(*path), capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def plugin(folder: Path, name: str, source: str) -> Path:
    """A third party's distribution with one plugin, on a folder for PYTHONPATH."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[miles_plugins]\n{name} = {name}\n")
    (folder / f"{name}.py").write_text(f'"""A plugin of the tests."""\nfrom miles_plugins import hookimpl\n{source}')
    return folder


def metrics(folder: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """What was logged, line by line; without the times, which differ between two runs of the same numbers."""
    lines = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if timed or "seconds" not in name} for line in lines]


SAVED = [*SMALL, "--plugins", "r3", "--num-rollout", 2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rollouts with r3 that saved its state after each."""
    folder = tmp_path_factory.mktemp("saved")
    embedded(*SAVED, "--save-interval", 1, "--save", folder / "checkpoints", "--run-folder", folder / "run")
    return folder


# -- hooks -----------------------------------------------------------------------------------------------------------


FACTS = """
import json
from pathlib import Path

def note(**facts):
    with open({file!r}, "a") as file:
        file.write(json.dumps(facts) + chr(10))

@hookimpl
def configure(args):
    note(model=(Path(args.hf_checkpoint) / "config.json").exists(), prompts=Path(args.prompt_data).exists())

@hookimpl
def take_routed_experts(rollout_data):
    note(lengths=rollout_data["total_lengths"] == [len(tokens) for tokens in rollout_data["tokens"]])

@hookimpl
def microbatch_keys():
    return ["raw_reward", "no_such_field"]

@hookimpl
def microbatch_begins(microbatch):
    batch = microbatch.batch
    note(wanted=len(batch["raw_reward"]) == len(batch["unconcat_tokens"]), absent=batch["no_such_field"] is None)
    note(packed=batch["tokens"].shape[1] == len(microbatch.positions) and batch["tokens"].shape[1] % 128 == 0)

@hookimpl
def step_metrics():
    import torch
    return {{"facts/mean": torch.tensor([1.0, 3.0])}}
"""


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rollouts with a plugin that implements every hook, and one that looks at what it is given."""
    folder = tmp_path_factory.mktemp("hooks")
    log = folder / "calls"
    told = {"pass_begins": "stage", "pass_ends": "stage", "probe": "role", "metrics_logged": "step_key"}
    functions = f"def note(*words):\n    open({str(log)!r}, 'a').write(' '.join(words) + chr(10))\n"
    for hook in HOOKS:
        argument = told.get(hook, "")
        functions += f"\n@hookimpl\ndef {hook}({argument}):\n    note({hook!r}, {argument})\n"
    path = plugin(folder / "site", "all_hooks", functions)
    plugin(path, "a_few_facts", FACTS.format(file=str(folder / "facts")))
    embedded(
        *SMALL,
        "--plugins",
        "all_hooks,a_few_facts,r3",
        "--num-rollout",
        2,
        "--run-folder",
        folder / "run",
        "--use-kl-loss",
        *("--mtp-num-layers", 1, "--sglang-speculative-algorithm", "EAGLE"),
        path=[path],
    )
    return folder


@pytest.fixture(scope="module")
def calls(hooked: Path) -> list[str]:
    """Every call of every hook, in order."""
    return (hooked / "calls").read_text().splitlines()


# `doctor` belongs to no run, and two to a rehearsal; the others are about slime's quantizer and its gathering of ranks,
# which this host lacks.
ELSEWHERE = (
    *("doctor", "tiny_model_shape", "rehearsal_flags"),
    *("take_weight_quantization", "encode_for_gathering", "decode_gathered"),
)


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in ELSEWHERE])
def test_every_hook_is_called(hook: str, calls: list[str]) -> None:
    assert any(call.split()[0] == hook for call in calls)


def test_hooks_are_given_what_slime_gives(hooked: Path) -> None:
    noted = [json.loads(line) for line in (hooked / "facts").read_text().splitlines()]
    assert {name for line in noted for name in line} == {"model", "prompts", "lengths", "wanted", "absent", "packed"}
    assert all(all(line.values()) for line in noted)
    assert [line["train/facts/mean"] for line in metrics(hooked / "run") if "train/step" in line] == [2.0, 2.0]


def test_hooks_are_called_in_the_order_of_slimes_training_loop(calls: list[str]) -> None:
    in_order = [name for name, _ in groupby(calls)]
    ready = in_order.index("rollout_ready")
    assert in_order.index("register_arguments") < in_order.index("configure") < ready
    assert ready < in_order.index("model_built") < in_order.index("export_weights")
    assert [call for call in calls if call.startswith("probe")] == [
        "probe driver",
        "probe rollout_manager",
        "probe trainer",
    ]
    first = calls.index("metrics_logged rollout/step")
    rollout = calls[first : calls.index("metrics_logged rollout/step", first + 1)]
    often = ("microbatch", "select", "draft_targets", "speculation_counts")  # in the midst of others
    steps = [name for name, _ in groupby(call for call in rollout if not call.startswith(often))]
    assert steps == [
        "metrics_logged rollout/step",
        "receive_samples",
        "collect_train_data",
        "share_train_data",
        "receive_train_data",
        "take_routed_experts",
        "pass_begins ref_log_prob",
        "pass_ends ref_log_prob",
        "pass_begins train",
        "training_log_probs",
        "pass_ends train",
        "step_metrics",
        "metrics_logged train/step",
        "receive_weights",  # which draws from export_weights
        "export_weights",
        "after_weight_update",
        "receive_engine_request",
        "encode_routed_experts",
        "receive_response",
        "rollout_metrics",
    ]


def test_what_export_weights_returns_is_what_the_engine_gets(tmp_path: Path) -> None:
    source = """
@hookimpl
def export_weights(named_tensors):
    return [(name, tensor * 0 if name == "lm_head.weight" else tensor) for name, tensor in named_tensors]
"""
    path = plugin(tmp_path / "site", "silent_head", source)
    run = tmp_path / "run"
    embedded(*SMALL, "--plugins", "silent_head", "--num-rollout", 1, "--run-folder", run, path=[path])
    shape = json.loads((run / "arguments.json").read_text())
    # All logits are zero, so the engine says -ln(vocabulary) for every token, and the trainer does not.
    assert metrics(run)[1]["train/train_rollout_logprob_abs_diff"] > 0.05
    assert metrics(run)[0]["rollout/raw_reward"] == pytest.approx(10 / shape["vocab_size"], abs=0.1)


# -- what it is for --------------------------------------------------------------------------------------------------


def test_the_default_model_learns_the_default_task(tmp_path: Path) -> None:
    embedded("--plugins", "r3", "--num-rollout", 20, "--run-folder", tmp_path / "run")
    summary = summarize(read_results(tmp_path / "run" / "metrics.jsonl"))
    assert summary.first_reward is not None
    assert 0 < summary.first_reward < 0.2
    assert summary.reward_ratio is not None
    assert summary.reward_ratio >= 2


def test_compare_shows_different_routing_without_r3_and_none_with_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = embedded("--plugins", "r3", "--compare", "--json", "--num-rollout", 3, "--run-folder", run)
    shown = json.loads(done.stdout)
    for name in ("with", "without"):
        results = read_results(run / name / "metrics.jsonl")
        assert [result.rollout for result in results] == [0, 1, 2]
        differences = [result.routing_different for result in results]
        assert None not in differences
        assert sum(differences) == 0 if name == "with" else min(differences) > 0
        assert name in shown
    assert (run / "report.png").stat().st_size > 10_000
    # The first rollout is drawn before anything was learnt: the same weights and seeds, so the same samples.
    first = {name: value for name, value in metrics(run / "with")[0].items() if "/r3/" not in name}
    assert first == metrics(run / "without")[0]
    assert metrics(run / "with")[0]["rollout/r3/samples_without_routing"] == 0


def test_replay_covers_every_token_also_when_activations_are_recomputed(saved: Path, tmp_path: Path) -> None:
    embedded(*SAVED, "--recompute-granularity", "full", "--run-folder", tmp_path / "run")
    recomputed = metrics(tmp_path / "run")
    assert [line["train/r3/coverage"] for line in recomputed if "train/step" in line] == [1.0, 1.0]
    assert recomputed == metrics(saved / "run")  # recomputing changes no number, on the CPU


def test_without_plugins_recomputing_changes_no_number_and_another_seed_does(saved: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--num-rollout", 2, "--seed", 6]
    embedded(*flags, "--run-folder", tmp_path / "kept")
    embedded(*flags, "--run-folder", tmp_path / "recomputed", "--recompute-granularity", "full")
    assert metrics(tmp_path / "kept") == metrics(tmp_path / "recomputed")  # nor what the routing meter counts
    assert metrics(tmp_path / "kept")[0] != metrics(saved / "run")[0]


LOSES_SOME = """
@hookimpl(tryfirst=True)
def receive_response(sample, meta_info):
    if sample.index % 4 == 1:
        meta_info.pop("routed_experts")
    if sample.index % 4 == 2:
        meta_info["routed_experts"] = meta_info["routed_experts"][:-4]

@hookimpl(trylast=True)
def collect_train_data(samples, train_data):
    for sample, mask in zip(samples, train_data["loss_masks"], strict=True):
        assert any(mask) is (sample.index % 4 not in (1, 2)), sample.index
        assert len(mask) == sample.response_length
"""


def test_samples_without_their_routing_end_the_run(tmp_path: Path) -> None:
    path = plugin(tmp_path / "site", "loses_some", LOSES_SOME)
    flags = [*SMALL, "--plugins", "loses_some,r3", "--num-rollout", 1, "--run-folder", tmp_path / "run"]
    refused = embedded(*flags, path=[path], code=1)
    assert "the routing in" in refused.stderr or "the recorded routing of sample 1 cannot be replayed" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_or_are_masked_out_of_the_loss_and_the_coverage_says_so(tmp_path: Path) -> None:
    """Half of the samples: the gradient is that of the others, and the run goes on."""
    run, path = tmp_path / "run", plugin(tmp_path / "site", "loses_some", LOSES_SOME)
    flags = [*SMALL, "--plugins", "loses_some,r3", "--num-rollout", 2, "--run-folder", run]
    done = embedded(*flags, "--r3-missing", "drop", path=[path])
    assert "sample 1 is masked out of the loss" in done.stderr
    steps = [line for line in metrics(run) if "train/step" in line]
    rollouts = [line for line in metrics(run) if "rollout/step" in line]
    assert [line["rollout/r3/samples_without_routing"] for line in rollouts] == [4.0, 4.0]
    for step in steps:
        assert 0.3 < step["train/r3/coverage"] < 0.7
        assert step["train/grad_norm"] > 0


def test_measuring_only_trains_as_without_r3_and_tells_what_would_change(tmp_path: Path) -> None:
    flags = [*SMALL, "--num-rollout", 2, "--run-folder"]
    embedded(*flags, tmp_path / "without")
    embedded(*flags, tmp_path / "measured", "--plugins", "r3", "--r3-measure-only")
    without, measured = metrics(tmp_path / "without"), metrics(tmp_path / "measured")
    assert [{n: v for n, v in line.items() if "/r3/" not in n} for line in measured] == without
    for step in (line for line in measured if "train/step" in line):
        assert step["train/r3/coverage"] == 0.0
        assert step["train/r3/different_tokens"] == pytest.approx(step["train/routing_different"])
        assert step["train/r3/different_tokens"] > 0


def test_several_optimizer_steps_a_rollout(tmp_path: Path) -> None:
    run = tmp_path / "run"
    embedded(*SMALL, "--plugins", "r3", "--num-rollout", 2, "--global-batch-size", 2, "--run-folder", run)
    steps = [line for line in metrics(run) if "train/step" in line]
    assert [step["train/step"] for step in steps] == list(range(8))
    assert {step["train/r3/coverage"] for step in steps} == {1.0}
    assert [result.rollout for result in read_results(run / "metrics.jsonl")] == [0, 1]


# -- what a person finds ---------------------------------------------------------------------------------------------


def test_own_prompts_and_reward_from_the_folder_one_is_in(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("async def reward(args, sample, **kwargs):\n    return sample.index % 3\n")
    (tmp_path / "prompts.jsonl").write_text('{"input": "one"}\n{"input": "two"}\n')
    flags = [*SMALL, "--prompt-data", "prompts.jsonl", "--custom-rm-path", "mine.reward", "--num-rollout", 1]
    script = Path(sys.executable).parent / "slime-train"  # `python -m` would put the folder on sys.path by itself
    done = subprocess.run(
        [script, "--embedded", *map(str, flags), "--run-folder", "run"],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run")[0]["rollout/raw_reward"] == sum(index % 3 for index in range(8)) / 8


def test_the_run_folder_holds_everything_and_the_same_seed_gives_the_same(saved: Path, tmp_path: Path) -> None:
    run, own = tmp_path / "run", tmp_path / "own.jsonl"
    done = embedded(*SAVED, "--plugins", "r3,metrics", "--metrics-jsonl", own, "--run-folder", run)
    assert metrics(run) == metrics(saved / "run")
    assert "reward" in done.stdout
    assert not any(word in done.stderr for word in ("Traceback", "Warning", "Loading weights"))
    assert [json.loads(line)["step_key"] for line in own.read_text().splitlines()] == ["rollout/step", "train/step"] * 2
    arguments = json.loads((run / "arguments.json").read_text())
    assert arguments["num_rollout"] == 2
    assert arguments["use_rollout_routing_replay"] is True
    reports = json.loads((run / "processes.json").read_text())
    assert [report["role"] for report in reports] == ["driver", "rollout_manager", "trainer"]
    assert reports[2]["probes"]["r3_replay"] == "2 routers of this rank replay"
    states = {patch["id"]: patch["state"] for patch in reports[2]["patches"]}
    assert states["megatron.router.select-experts"] == "verified"
    assert {state for name, state in states.items() if name.startswith("megatron.router")} <= {"verified", "superseded"}
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


def hear_signals() -> None:
    """In the child: a test run in the background ignores SIGINT, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command with these flags; it is not left running, whatever the test finds."""
    processes: list[subprocess.Popen[str]] = []

    def start(*flags: object) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command(*flags), env=environment(), preexec_fn=hear_signals, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.terminate()  # not killed: the run of a comparison has a process of its own to end
            process.wait(timeout=60)


def wait_for(process: subprocess.Popen[str], rollouts: int, run: Path) -> None:
    files = [run / "metrics.jsonl", run / "without" / "metrics.jsonl"]
    deadline = time.monotonic() + 240
    while not any(file.exists() and file.read_text().count("train/step") > 2 * rollouts for file in files):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("compare", [False, True])
def test_ctrl_c_leaves_a_readable_folder_and_code_130(
    compare: bool, tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    more = ["--compare"] if compare else []
    process = started(*SMALL, "--plugins", "r3", "--num-rollout", 100_000, "--run-folder", run, *more)
    wait_for(process, 2, run)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors
    folder = run / "without" if compare else run
    assert len(read_results(folder / "metrics.jsonl")) >= 2
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_while_it_loads_leaves_nothing_and_code_130(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    process = started(*SMALL, "--plugins", "r3", "--run-folder", run)
    while not run.exists():
        time.sleep(0.01)
    time.sleep(0.2)  # in the middle of importing torch
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not run.exists()


# -- checkpoints -----------------------------------------------------------------------------------------------------


def state(checkpoints: Path, rollouts: int) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(checkpoints / f"iter_{rollouts:07d}" / "state.pt", weights_only=True)
    return loaded


def main_weights(checkpoints: Path, rollouts: int) -> list[Any]:
    weights: list[Any] = state(checkpoints, rollouts)["main_weights"]
    return weights


def test_resuming_gives_the_numbers_of_a_run_without_interruption(saved: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--plugins", "r3", "--num-rollout", 4]
    embedded(*flags, "--save", tmp_path / "whole", "--run-folder", tmp_path / "a")
    embedded(*flags, "--load", saved / "checkpoints", "--save", tmp_path / "resumed", "--run-folder", tmp_path / "b")
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")[4:]

    whole, resumed = (state(tmp_path / name, 4) for name in ("whole", "resumed"))
    assert all(torch.equal(a, b) for a, b in zip(whole["main_weights"], resumed["main_weights"], strict=True))
    moments = [saved_state["optimizer"]["state"] for saved_state in (whole, resumed)]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])


def test_a_resumed_run_may_go_on_in_its_own_folder(tmp_path: Path) -> None:
    flags = [*SMALL, "--save", tmp_path / "checkpoints", "--run-folder", tmp_path / "run", "--save-interval", 2]
    embedded(*flags, "--num-rollout", 2)
    embedded(*flags, "--num-rollout", 4, "--load", tmp_path / "checkpoints")
    assert [result.rollout for result in read_results(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
    refused = embedded(*flags, "--num-rollout", 4, "--load", tmp_path / "checkpoints", code=1)
    assert "already has all rollouts" in refused.stderr


def test_another_plugin_set_must_be_asked_for(saved: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--load", saved / "checkpoints", "--num-rollout", 3]
    refused = embedded(*flags, "--run-folder", tmp_path / "a", code=1)
    assert "another plugin set" in refused.stderr
    assert "r3_replay" in refused.stderr
    assert "--load-with-other-plugins" in refused.stderr
    # What the flags say now holds: nothing is learnt at this rate. And a reward that has become flat stops no resumed
    # run, as it would not have stopped the whole one.
    flat_rewards(tmp_path)
    still = ["--lr", 0, "--custom-rm-path", "flat.reward", "--save", tmp_path / "still"]
    embedded(*flags, *still, "--run-folder", tmp_path / "b", "--load-with-other-plugins", path=[tmp_path])
    before, after = main_weights(saved / "checkpoints", 2), main_weights(tmp_path / "still", 3)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_another_runs_folder_is_left_alone(saved: Path, tmp_path: Path) -> None:
    embedded(*SMALL, "--num-rollout", 1, "--run-folder", tmp_path / "other")
    before = {file: file.read_bytes() for file in (tmp_path / "other").glob("*.json*")}
    flags = [*SMALL, "--plugins", "r3", "--num-rollout", 3, "--load", saved / "checkpoints"]
    refused = embedded(*flags, "--run-folder", tmp_path / "other", code=1)
    assert "another run than the checkpoint's" in refused.stderr
    assert {file: file.read_bytes() for file in before} == before


def test_a_checkpoint_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--plugins", "r3", "--num-experts", 4, "--load", saved / "checkpoints", "--num-rollout", 3]
    refused = embedded(*flags, "--run-folder", tmp_path / "a", code=1)
    assert "of another model" in refused.stderr
    assert "8 in the checkpoint, 4 in this run" in refused.stderr


# -- mistakes --------------------------------------------------------------------------------------------------------


def prompts(*lines: str) -> Callable[[Path], list[object]]:
    def write(folder: Path) -> list[object]:
        (folder / "prompts.jsonl").write_text("\n".join(lines))
        return ["--prompt-data", folder / "prompts.jsonl"]

    return write


def model(**changes: object) -> Callable[[Path], list[object]]:
    """A checkpoint with another config.json."""

    def write(folder: Path) -> list[object]:
        from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model

        write_tiny_model(folder / "model")
        config = json.loads((folder / "model" / "config.json").read_text())
        (folder / "model" / "config.json").write_text(json.dumps({**config, **changes}))
        return ["--hf-checkpoint", folder / "model"]

    return write


def occupied(folder: Path) -> list[object]:
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("mine\n")
    return []


MISTAKES: dict[str, tuple[Callable[[Path], list[object]], list[str]]] = {
    "a mistyped flag": (lambda _: ["--num-rolout", 3], ["--num-rolout", "did you mean --num-rollout?"]),
    "a value of the wrong kind": (lambda _: ["--lr", "fast"], ["--lr", "fast"]),
    "no model there": (lambda f: ["--hf-checkpoint", f / "none"], ["none"]),
    "an unknown architecture": (model(model_type="llama", architectures=["LlamaForCausalLM"]), ["llama", "qwen3_moe"]),
    "an impossible shape": (lambda _: ["--moe-router-topk", 9, "--num-experts", 8], ["topk=9"]),
    "a shape beside a checkpoint": (
        lambda f: [*model()(f), "--num-layers", 3],
        ["--num-layers 3", "leave the flag out"],
    ),
    "a shape that Megatron refuses": (model(num_experts_per_tok=1), ["megatron-core refuses", "pre-softmax"]),
    "a size that transformers cannot run": (lambda _: ["--hidden-size", 6], ["choose other sizes"]),
    "a tokenizer with more tokens than the model": (model(vocab_size=100), ["vocab", "100", "128"]),
    "tensors of another model": (model(num_hidden_layers=3), ["model.layers.2"]),
    "no prompts": (prompts(""), ["no prompts", "prompts.jsonl"]),
    "a line that is no prompt": (prompts('{"text": "hello"}'), ["line 1", "input"]),
    "a prompt longer than the model allows": (prompts(json.dumps({"input": "1" * 5000})), ["4096", "5000"]),
    "a reward that does not exist": (lambda _: ["--custom-rm-path", "json.nothing"], ["json.nothing"]),
    "a reward that tells nothing apart": (
        lambda _: ["--custom-rm-path", "flat.reward"],
        ["nothing can be learnt", "flat.reward"],
    ),
    "a reward that is not awaited": (lambda _: ["--custom-rm-path", "flat.plain"], ["flat.plain", "async def"]),
    "one sample a prompt": (lambda _: ["--n-samples-per-prompt", 1], ["at least 2"]),
    "a folder with results": (occupied, ["not empty"]),
    "a folder that cannot be written": (lambda _: ["--run-folder", "/proc/run"], ["/proc/run"]),
    "no checkpoint": (lambda f: ["--load", f / "none"], ["no checkpoint"]),
    "nothing to compare": (lambda _: ["--compare"], ["needs plugins"]),
    "replay without its plugin": (lambda _: ["--use-rollout-routing-replay"], ["--plugins r3"]),
    "slime's own CPU plugin": (lambda _: ["--plugins", "cpu"], ["leave it out"]),
    "a train script": (lambda _: ["--train-script", "train.py"], ["no train script"]),
}


def flat_rewards(folder: Path) -> None:
    source = "async def reward(args, sample, **kwargs):\n    return 1.0\n\n\ndef plain(args, sample):\n    return 1.0\n"
    (folder / "flat.py").write_text(source)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_without_a_traceback(mistake: str, tmp_path: Path) -> None:
    prepare, expected = MISTAKES[mistake]
    flat_rewards(tmp_path)
    flags = [*SMALL[6:], "--num-rollout", 2, "--run-folder", tmp_path / "run", *prepare(tmp_path)]
    kept = {file: file.read_bytes() for file in (tmp_path / "run").glob("*")}
    refused = embedded(*flags, path=[tmp_path], code=1)
    assert "Traceback" not in refused.stderr
    for text in expected:
        assert text in refused.stderr
    assert {file: file.read_bytes() for file in (tmp_path / "run").glob("*") if file in kept} == kept
    measured = mistake == "a reward that tells nothing apart"
    assert kept or measured or not (tmp_path / "run").exists()  # so that the corrected command can use it


@pytest.mark.parametrize("size", [100_000, 1 << 20])
def test_a_disk_that_fills_up_leaves_nothing_half_written(size: int, tmp_path: Path) -> None:
    """The file size limit of the process stands in for the disk's end; SIGXFSZ is ignored, so that a write fails."""
    limit = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "
        "from miles_plugins.entrypoints.slime_train import main; main()"
    )
    flags = ["--embedded", *SMALL, "--num-rollout", "4", "--save", tmp_path / "save", "--save-interval", "2"]
    done = subprocess.run(
        [sys.executable, "-c", limit.format(size), *map(str, flags), "--run-folder", str(tmp_path / "run")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "save").iterdir())
    if size < 1 << 20:  # too little for the model
        assert "cannot be written" in done.stderr
        assert not (tmp_path / "run").exists()
    else:
        assert "the checkpoint could not be written" in done.stderr
        assert len(metrics(tmp_path / "run")) == 4
