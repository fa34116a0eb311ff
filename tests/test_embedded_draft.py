"""A policy with a draft in the embedded host: trained beside it, sent to the engine, and of no effect on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from miles_plugins.embedded import arguments
from miles_plugins.manager import Plugins

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]
SMALL = "--num-layers 2 --num-experts 8 --moe-router-topk 2 --rollout-batch-size 2 --n-samples-per-prompt 4".split()
DRAFT = ["--mtp-num-layers", 1]
TRAINED = [*DRAFT, "--enable-mtp-training", "--mtp-loss-scaling-factor", 0.2]
EAGLE = (
    "--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 3 --sglang-speculative-eagle-topk 1 "
    "--sglang-speculative-num-draft-tokens 4"
).split()
LAYER = "model.layers.2."

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("torch", "transformers", "megatron", "matplotlib", "tensorboard")),
    reason='the embedded host needs `pip install -e ".[embedded]"`',
)


def environment() -> dict[str, str]:
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("MILES_PLUGINS", "PYTHONPATH"))}
    return {**inherited, "PYTHONPATH": str(ROOT)}


def embedded(*flags: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run to the end; the exit code must be `code`."""
    command = [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", "--embedded", *map(str, flags)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def metrics(folder: Path, step_key: str) -> list[dict[str, float]]:
    """Of each step; without the times."""
    lines = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if "seconds" not in n} for line in lines if step_key in line]


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 rollouts in which the draft is trained, and drafts."""
    folder = tmp_path_factory.mktemp("online")
    more = ["--save", folder / "saved", "--save-interval", 4, "--save-hf", folder / "hf", "--micro-batch-size", 3]
    embedded(*SMALL, "--plugins", "spec", *TRAINED, *EAGLE, "--num-rollout", 8, "--run-folder", folder / "run", *more)
    return folder


# -- the draft is Megatron's -----------------------------------------------------------------------------------------

# In a process of its own: the patches that let Megatron run on the CPU stay.
COMPARE = """
import json, sys
from pathlib import Path
from miles_plugins.embedded import arguments, command, run_folder
from miles_plugins.embedded.samples import to_train_data
from miles_plugins.manager import Plugins

plugins = Plugins.named(["spec"])
args = arguments.parse([*sys.argv[2:], "--run-folder", sys.argv[1]], plugins)
arguments.complete(args)
run_folder.begin_or_continue(args)
activation, device = command._activate(plugins, args)
import torch
with command._megatron(args, device):
    args.run_folder.mkdir()
    run_folder.write_inputs(args)
    activation.hook.configure(args=args)
    from miles_plugins.embedded.host import EmbeddedRun
    run = EmbeddedRun(args, activation, device)
    policy, engine = run.trainer.policy.float(), run.engine
    policy.config.bf16, policy.config.params_dtype = False, torch.float32
    engine.model.float(), engine.draft.module.float()
    with torch.no_grad():  # norms of ones could stand anywhere
        for weights in (policy, engine.model, engine.draft.module):
            for name, parameter in weights.named_parameters():
                if parameter.dim() == 1:
                    torch.manual_seed(len(parameter) + name.count("enorm") + 2 * name.count("hnorm"))
                    parameter.copy_(1 + 0.3 * torch.rand_like(parameter))
        for weight, parameter in zip(run.trainer.main_weights, policy.parameters()):
            weight.copy_(parameter)
    scale = engine.draft.module["enorm"].weight.requires_grad_()
    grad = run.trainer.main_weights[[n for n, _ in policy.named_parameters()].index("mtp.layers.0.enorm.weight")]
    samples = run.generate(0)
    data = to_train_data(args, samples)
    data["loss_masks"][1] = [0, 1] * (len(data["loss_masks"][1]) // 2) + [0] * (len(data["loss_masks"][1]) % 2)
    activation.hook.collect_train_data(args=args, samples=samples, train_data=data)
    found = []
    policy.mtp.layers[0].final_layernorm.register_forward_hook(lambda m, i, output: found.append(output[:, 0]))
    run.trainer.meter.traces = [sample.recorded for sample in samples]
    [step] = list(run._train(0, data))
    begin, difference, losses = 0, 0.0, []
    with torch.enable_grad():
        for sample, mask in zip(samples, data["loss_masks"]):
            ids = torch.tensor([sample.tokens])
            states = engine.model.base_model(ids).last_hidden_state
            n = ids.shape[1] - 1
            everything, positions = torch.ones(1, n, dtype=torch.bool), torch.arange(n)[None]
            ours, _ = engine.draft.states(ids[:, 1:], states[:, :-1], everything, positions, None)
            theirs = found[0][begin : begin + n]
            difference = max(difference, ((ours[0] - theirs).abs().max() / theirs.abs().max()).item())
            log_probs = engine.model.lm_head(ours[0, :-1]).log_softmax(-1)
            picked = log_probs.gather(1, ids[0, 2:, None])[:, 0]
            trained = torch.tensor([0] * (len(sample.tokens) - len(mask)) + mask)[2:].bool()
            losses.append(-picked[trained])
            begin += n + 1
    loss, passes, found_gradient = torch.cat(losses).mean(), len(found), grad.grad.clone()
    (0.2 * loss).backward()
    args.micro_batch_size = 2
    list(run._train(1, data))
    print(json.dumps({"difference": difference, "logged": step["train/mtp_loss"], "passes": passes,
                      "loss": loss.item(), "gradient": found_gradient.tolist(), "expected": scale.grad.tolist(),
                      "in microbatches of two": (grad.grad.norm() / found_gradient.norm()).item()}))
"""


def test_the_engines_draft_is_megatrons_and_its_loss_is_the_one_that_is_logged(tmp_path: Path) -> None:
    flags = [*SMALL, *TRAINED, *EAGLE, "--lr", 0, "--clip-grad", 0]
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, str(tmp_path / "run"), *map(str, flags)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compared = json.loads(done.stdout.splitlines()[-1])
    assert compared["passes"] == 1
    assert compared["difference"] < 1e-4
    assert compared["logged"] == pytest.approx(compared["loss"], rel=1e-5)
    # Of the mean, times --mtp-loss-scaling-factor; of the mean of the microbatches where there are more.
    assert compared["gradient"] == pytest.approx(compared["expected"], rel=1e-3, abs=1e-7)
    assert compared["in microbatches of two"] == pytest.approx(1, abs=0.3)


# -- it is trained, and the policy does not notice -------------------------------------------------------------------


def test_the_draft_learns_and_its_loss_is_logged(online: Path) -> None:
    losses = [step["train/mtp_loss"] for step in metrics(online / "run", "train/step")]
    assert len(losses) == 8
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.05
    before, after = tensors(online / "run" / "model"), tensors(online / "hf")
    assert before.keys() == after.keys()
    drafts = [name for name in after if name.startswith(LAYER) and ".experts." not in name]
    assert len(drafts) > 10
    assert all(not torch.equal(before[name], after[name]) for name in drafts if after[name].dim() > 1)


def test_acceptance_is_counted_in_every_rollout(online: Path) -> None:
    for rollout in metrics(online / "run", "rollout/step"):
        assert rollout["rollout/spec/verified"] > 0
        assert 1 <= rollout["rollout/spec/accept_length"] <= 4
        assert 0 <= rollout["rollout/spec/accept_rate"] <= 1
        assert {"rollout/spec_accept_rate", "rollout/spec_accept_length"} < rollout.keys()
    reports = json.loads((online / "run" / "processes.json").read_text())
    assert [report["role"] for report in reports if "spec_rl" in report["probes"]] == ["rollout_manager", "trainer"]


def test_a_trained_draft_changes_no_bit_of_the_policy(online: Path, tmp_path: Path) -> None:
    """Plain decoding: speculation rounds otherwise, and so could draw another token."""
    flags = [*SMALL, "--num-rollout", 5, "--weight-decay", 0.1, "--clip-grad", 0.3]
    embedded(*flags, "--run-folder", tmp_path / "a", "--save-hf", tmp_path / "without")
    embedded(*flags, "--plugins", "spec", *TRAINED, "--run-folder", tmp_path / "b", "--save-hf", tmp_path / "with")
    for step in ("rollout/step", "train/step"):
        with_draft = [{n: v for n, v in line.items() if "mtp" not in n} for line in metrics(tmp_path / "b", step)]
        assert with_draft == metrics(tmp_path / "a", step)
    assert all("train/mtp_loss" in line for line in metrics(tmp_path / "b", "train/step"))
    without, with_ = tensors(tmp_path / "without"), tensors(tmp_path / "with")
    assert {name for name in with_ if not name.startswith(LAYER)} == without.keys()
    assert all(torch.equal(tensor, with_[name]) for name, tensor in without.items())


def test_a_frozen_draft_stays_bit_for_bit_and_still_drafts(tmp_path: Path) -> None:
    flags = [*SMALL, "--plugins", "r3,spec", *DRAFT, *EAGLE, "--num-rollout", 2, "--weight-decay", 0.1, "--lr", 0.01]
    done = embedded(*flags, "--run-folder", tmp_path / "run", "--save-hf", tmp_path / "hf")
    before, after = tensors(tmp_path / "run" / "model"), tensors(tmp_path / "hf")
    drafts = [name for name in before if name.startswith(LAYER)]
    assert all(torch.equal(before[name], after[name]) for name in drafts)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert "the draft is frozen" in done.stderr
    assert all("train/mtp_loss" not in step for step in metrics(tmp_path / "run", "train/step"))
    assert all(rollout["rollout/spec/verified"] > 0 for rollout in metrics(tmp_path / "run", "rollout/step"))


@pytest.mark.parametrize("recompute", [[], ["--recompute-granularity", "full"]])
def test_routing_is_replayed_exactly_beside_a_draft_with_experts(recompute: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    embedded(*SMALL, "--plugins", "r3,spec", *TRAINED, *EAGLE, *recompute, "--num-rollout", 2, "--run-folder", run)
    for step in metrics(run, "train/step"):
        assert step["train/routing_different"] == 0
        assert step["train/r3/coverage"] == 1
        assert step["train/r3/different_tokens"] >= 0
        assert step["train/mtp_loss"] > 0


def test_a_resumed_run_gives_the_numbers_of_one_without_interruption(online: Path, tmp_path: Path) -> None:
    # The checkpoint of rollout 4; `--load` takes the latest, so that is named.
    (online / "saved" / "latest_checkpointed_iteration.txt").write_text("4")
    more = ["--num-rollout", 8, "--micro-batch-size", 3, "--load", online / "saved", "--run-folder", tmp_path / "run"]
    embedded(*SMALL, "--plugins", "spec", *TRAINED, *EAGLE, *more)
    for step in ("rollout/step", "train/step"):
        resumed, whole = metrics(tmp_path / "run", step), metrics(online / "run", step)[4:]
        assert resumed == whole
    frozen = [*SMALL, "--plugins", "spec", *DRAFT, *EAGLE, "--num-rollout", 8, "--load", online / "saved"]
    refused = embedded(*frozen, "--run-folder", tmp_path / "frozen", code=1)
    assert "enable_mtp_training" in refused.stderr


# -- flags -----------------------------------------------------------------------------------------------------------


def without_draft(folder: Path) -> list[object]:
    from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model

    write_tiny_model(folder / "model")
    return ["--hf-checkpoint", folder / "model"]


MISTAKES: dict[str, tuple[Any, list[str]]] = {
    "a draft without the plugin that trains it": (lambda _: DRAFT, ["--plugins spec", "stock Megatron"]),
    "training without a draft": (
        lambda _: ["--plugins", "spec", "--enable-mtp-training"],
        ["there is no draft to train", "--mtp-num-layers 1"],
    ),
    "a tree": (
        lambda _: [*EAGLE[:4], "--sglang-speculative-eagle-topk", 4],
        ["--sglang-speculative-eagle-topk", "4, expected 1"],
    ),
    "steps without an algorithm": (lambda _: EAGLE[2:4], ["--sglang-speculative-num-steps", "EAGLE"]),
    "a checkpoint without a draft": (
        lambda f: ["--plugins", "spec", *TRAINED, *without_draft(f)],
        ["the checkpoint has no draft", "eh_proj"],
    ),
    "an engine whose checkpoint has none": (
        lambda f: [*EAGLE, *without_draft(f)],
        ["has no draft for this model", "--sglang-speculative-draft-model-path"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained(mistake: str, tmp_path: Path) -> None:
    prepare, expected = MISTAKES[mistake]
    refused = embedded("--num-rollout", 1, "--run-folder", tmp_path / "run", *prepare(tmp_path), code=1)
    assert "Traceback" not in refused.stderr
    for text in expected:
        assert text in refused.stderr


def test_the_baseline_of_a_comparison_has_no_draft() -> None:
    flags = [str(flag) for flag in (*SMALL, *TRAINED, *EAGLE, "--plugins-flag")]
    words = arguments.baseline_flags(flags[:-1], Plugins.named(["spec"]))
    assert words == arguments.baseline_flags(SMALL, Plugins.named([]))
