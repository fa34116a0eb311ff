"""The parts of the embedded host that are pure: rewards to advantages, the loss, prompts, checkpoints, flags."""

from __future__ import annotations

import base64
import json
import math
import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins.embedded import arguments, checkpoint, policy
from miles_plugins.embedded.engine import Answer
from miles_plugins.embedded.host import _traces
from miles_plugins.embedded.loss import grpo_loss
from miles_plugins.embedded.run_folder import finished_rollouts
from miles_plugins.embedded.samples import Prompts, Sample, Status, fill, give_rewards, group_advantages, to_train_data
from miles_plugins.errors import ArgumentError, PluginError
from miles_plugins.manager import Plugins

torch = pytest.importorskip("torch")

# -- advantages and loss ---------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=4), st.booleans())
def test_advantages_are_normalised_within_each_group(groups: list[list[float]], over_deviation: bool) -> None:
    args = Namespace(n_samples_per_prompt=3, grpo_std_normalization=over_deviation)
    found = group_advantages(args, [reward for group in groups for reward in group])
    expected = []
    for group in groups:
        scale = statistics.stdev(group) + 1e-6 if over_deviation else 1.0
        expected += [(reward - statistics.fmean(group)) / scale for reward in group]
    assert found == pytest.approx(expected, abs=1e-2)


LOSS = Namespace(eps_clip=0.2, eps_clip_high=0.3, entropy_coef=0.01, use_kl_loss=True, kl_loss_coef=0.1)


def token_by_token(args: Namespace, sample: dict[str, list[float]]) -> float:
    """One sample's part of the loss, written out."""
    total = 0.0
    for now, old, reference, entropy, mask in zip(
        sample["now"], sample["old"], sample["ref"], sample["entropy"], sample["mask"], strict=True
    ):
        ratio, advantage = math.exp(now - old), sample["advantage"][0]
        kept = min(max(ratio, 1 - args.eps_clip), 1 + args.eps_clip_high)
        policy = -min(ratio * advantage, kept * advantage)
        kl = {
            "k1": now - reference,
            "k2": (now - reference) ** 2 / 2,
            "k3": math.exp(reference - now) - (reference - now) - 1,
        }[args.kl_loss_type]
        total += mask * (policy - args.entropy_coef * entropy + args.kl_loss_coef * kl)
    return total / max(sum(sample["mask"]), 1)


@st.composite
def samples(draw: st.DrawFn) -> dict[str, list[float]]:
    length = draw(st.integers(1, 4))
    numbers = st.lists(st.floats(-2, 0), min_size=length, max_size=length)
    masks = st.lists(st.sampled_from([0.0, 1.0]), min_size=length, max_size=length)
    drawn = {name: draw(numbers) for name in ("now", "old", "ref", "entropy")}
    return {**drawn, "mask": draw(masks), "advantage": [draw(st.floats(-2, 2))]}


@settings(deadline=None)
@given(st.lists(samples(), min_size=1, max_size=5), st.integers(1, 5), st.sampled_from(["k1", "k2", "k3"]))
def test_the_loss_is_the_mean_over_samples_however_they_are_packed(
    rows: list[dict[str, Any]], size: int, kl: str
) -> None:
    args = Namespace(**vars(LOSS), global_batch_size=len(rows), kl_loss_type=kl)
    total = 0.0
    for begin in range(0, len(rows), size):
        packed = rows[begin : begin + size]

        def each(name: str, packed: list[dict[str, Any]] = packed) -> list[Any]:
            return [torch.tensor(row[name]) for row in packed]

        batch = {
            "log_probs": each("old"),
            "ref_log_probs": each("ref"),
            "loss_masks": each("mask"),
            "advantages": [torch.full((len(row["now"]),), row["advantage"][0]) for row in packed],
        }
        loss, terms = grpo_loss(args, torch.cat(each("now")), torch.cat(each("entropy")), batch)
        assert terms["loss"] == loss.item()
        total += loss.item()
    expected = sum(token_by_token(args, row) for row in rows) / len(rows)
    assert total == pytest.approx(expected, abs=1e-4)


def test_a_clipped_token_has_no_gradient() -> None:
    args = Namespace(**{**vars(LOSS), "use_kl_loss": False, "entropy_coef": 0.0}, global_batch_size=1)
    now = torch.tensor([0.5, 0.0], requires_grad=True)
    batch = {"log_probs": [torch.zeros(2)], "advantages": [torch.ones(2)], "loss_masks": [torch.ones(2)]}
    loss, terms = grpo_loss(args, now, torch.zeros(2), batch)
    loss.backward()
    assert now.grad.tolist() == [0.0, -0.5]
    assert terms["pg_clipfrac"] == 0.5


# -- prompts and samples ---------------------------------------------------------------------------------------------


def prompt_args(folder: Path, **changes: Any) -> Namespace:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"prompt {number}", "label": str(number)}) for number in range(5)))
    defaults = {"rollout_batch_size": 2, "n_samples_per_prompt": 3, "rollout_shuffle": False, "rollout_seed": 0}
    return Namespace(prompt_data=file, input_key="text", label_key="label", **{**defaults, **changes})


def test_prompts_go_round_in_order_a_group_each(tmp_path: Path) -> None:
    prompts = Prompts(prompt_args(tmp_path))
    seen = [sample for rollout in range(3) for sample in prompts.of(rollout)]
    assert [sample.label for sample in seen] == [str(group % 5) for group in range(6) for _ in range(3)]
    assert [sample.index for sample in seen] == list(range(18))
    assert [sample.group_index for sample in seen] == [group for group in range(6) for _ in range(3)]


def test_shuffled_prompts_depend_on_the_rollout_and_the_seed_alone(tmp_path: Path) -> None:
    def labels(seed: int, rollouts: range) -> list[str | None]:
        prompts = Prompts(prompt_args(tmp_path, rollout_shuffle=True, rollout_seed=seed, rollout_batch_size=5))
        return [sample.label for rollout in rollouts for sample in prompts.of(rollout)[::3]]

    whole = labels(0, range(4))
    assert whole[10:] == labels(0, range(2, 4))  # as after a resume
    assert all(sorted(whole[i : i + 5]) == list("01234") for i in range(0, 20, 5))
    assert whole[:5] != whole[5:10]
    assert whole != labels(1, range(4))


FILL = Namespace(num_layers=3, moe_router_topk=2, sglang_speculative_algorithm=None)


def an_answer() -> Answer:
    experts = torch.arange(2 * 3 * 2, dtype=torch.int32).reshape(2, 3, 2)
    answer = Answer(
        text="42",
        meta_info={
            "output_token_logprobs": [[-0.5, 8, None], [-1.5, 9, None]],
            "finish_reason": {"type": "length", "length": 2},
            "weight_version": "7",
            "routed_experts": base64.b64encode(experts.numpy().tobytes()).decode(),
        },
    )
    answer.routing = experts
    return answer


def hearing(function: Callable[..., None] = lambda **_: None) -> Any:
    return SimpleNamespace(receive_response=function)


def test_an_answer_becomes_a_sample() -> None:
    sample, answer = Sample(0, 0, "p", None), an_answer()
    fill(FILL, sample, [5], answer, hearing())
    assert (sample.tokens, sample.rollout_log_probs, sample.response_length) == ([5, 8, 9], [-0.5, -1.5], 2)
    assert (sample.status, sample.weight_versions, sample.response) == (Status.TRUNCATED, ["7"], "42")
    assert sample.rollout_routed_experts is not None
    assert torch.equal(sample.rollout_routed_experts, answer.routing)
    assert sample.recorded is answer.routing


def test_a_plugin_receives_the_answer_with_its_tokens_and_may_take_the_routing() -> None:
    told: list[Any] = []

    def receive(args: Namespace, sample: Sample, meta_info: dict[str, Any]) -> None:
        told.append((args, list(sample.tokens), sample.response_length, meta_info.pop("routed_experts")))
        sample.rollout_routed_experts = "mine"

    sample, answer = Sample(0, 0, "p", None), an_answer()
    text = answer["meta_info"]["routed_experts"]
    fill(FILL, sample, [5], answer, hearing(receive))
    assert told == [(FILL, [5, 8, 9], 2, text)]
    assert sample.rollout_routed_experts == "mine"
    assert sample.recorded is answer.routing, "what the host measures by is no plugin's to change"


def test_a_removed_sample_stays_and_adds_nothing_to_the_loss() -> None:
    args = Namespace(n_samples_per_prompt=3, grpo_std_normalization=True, use_rollout_routing_replay=False)
    three = [Sample(0, index, "p", None, tokens=[1, 2, 3], response_length=2) for index in range(3)]
    three[0].remove_sample = True
    three[1].loss_mask = [0, 1]
    data = to_train_data(args, three)
    assert data["loss_masks"] == [[0, 0], [0, 1], [1, 1]]
    assert len(data["tokens"]) == 3


@pytest.mark.parametrize("replay", [False, True])
def test_routing_is_training_data_only_for_who_replays_it(replay: bool) -> None:
    args = Namespace(n_samples_per_prompt=2, grpo_std_normalization=True, use_rollout_routing_replay=replay)
    two = [Sample(0, index, "p", None, tokens=[1, 2], response_length=1, reward=float(index)) for index in range(2)]
    data = to_train_data(args, two)
    assert ("rollout_routed_experts" in data) == replay
    assert data["loss_masks"] == [[1], [1]]
    assert data["raw_reward"] == [0.0, 1.0]


@pytest.mark.parametrize("found", [{"score": 1}, math.nan, math.inf, None])
def test_a_reward_that_is_no_number_is_named(found: Any) -> None:
    async def reward(args: Any, sample: Any, **kwargs: Any) -> Any:
        return found

    with pytest.raises(ArgumentError, match="no finite number"):
        give_rewards(Namespace(custom_rm_path="mine.reward"), [Sample(0, 0, "p", None)], reward)


def test_no_sample_is_measured_by_another_ones_routing() -> None:
    two = [Sample(0, index, "p", None, tokens=[1, index], recorded=torch.zeros(1)) for index in range(2)]
    assert len(_traces(two, {"tokens": [[1, 0], [1, 1]]})) == 2
    with pytest.raises(PluginError, match="changed or reordered"):
        _traces(two, {"tokens": [[1, 1], [1, 0]]})


def test_a_rollout_that_was_not_trained_on_does_not_count(tmp_path: Path) -> None:
    lines = [("rollout/step", 0), ("train/step", 0), ("rollout/step", 1)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"time": 0, "step_key": key, "metrics": {key: step, "train/grad_norm": 1.0}}) + "\n"
            if key == "train/step"
            else json.dumps({"time": 0, "step_key": key, "metrics": {key: step, "rollout/raw_reward": 0.5}}) + "\n"
            for key, step in lines
        )
    )
    assert [result.rollout for result in finished_rollouts(tmp_path)] == [0]


# -- checkpoints -----------------------------------------------------------------------------------------------------

IDENTITY = {"shape": {"num_layers": 2}, "plugins": {"r3_replay": "0.1.0"}, "digest": "abc", "run": "r"}


def test_a_checkpoint_belongs_to_a_model_with_everything_that_makes_it(tmp_path: Path) -> None:
    from miles_plugins.cpu_rehearsal.tiny_model import _config

    assert set(policy.shape_of(_config(128, 2, 64, 8, 2), tmp_path)) == set(policy.SHAPE)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    for rollouts in (1, 2):
        checkpoint.save(tmp_path, rollouts, IDENTITY, {"main_weights": [torch.full((3,), float(rollouts))]})
    assert checkpoint.describe(tmp_path)["rollouts"] == 2
    state = checkpoint.load(tmp_path, IDENTITY)
    assert state["main_weights"][0].tolist() == [2.0] * 3
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "iter_0000001",
        "iter_0000002",
        "latest_checkpointed_iteration.txt",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": {"num_layers": 3}}, "of another model"),
        ({"plugins": {}, "digest": "def"}, "another plugin set"),
        ({"digest": "def"}, "code has changed"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, IDENTITY, {"main_weights": []})
    with pytest.raises(ArgumentError, match=message):
        checkpoint.load(tmp_path, {**IDENTITY, **changes})
    if "shape" not in changes:
        assert checkpoint.load(tmp_path, {**IDENTITY, **changes}, other_plugins=True) == {"main_weights": []}


@pytest.mark.parametrize("name", ["state.pt", "identity.json"])
@pytest.mark.parametrize("cut", [0, 10, -1])
def test_a_broken_checkpoint_is_refused(name: str, cut: int, tmp_path: Path) -> None:
    file = checkpoint.save(tmp_path, 1, IDENTITY, {"main_weights": [torch.zeros(100)]}) / name
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ArgumentError, match="cannot be read"):
        checkpoint.load(tmp_path, IDENTITY)


def test_a_checkpoint_of_the_same_number_gives_way(tmp_path: Path) -> None:
    """After going back to an older one, or after a save that was cut off before it became the latest."""
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, 1, IDENTITY, {"main_weights": [torch.tensor(value)]})
    assert checkpoint.load(tmp_path, IDENTITY)["main_weights"] == [torch.tensor(2.0)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, IDENTITY, {"main_weights": []})
    (tmp_path / ".2.partial").write_text("in the way")
    with pytest.raises(ArgumentError, match="could not be written"):
        checkpoint.save(tmp_path, 2, IDENTITY, {"main_weights": []})
    assert checkpoint.load(tmp_path, IDENTITY) == {"main_weights": []}
    assert checkpoint.describe(tmp_path)["rollouts"] == 1


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    import random

    import numpy

    from miles_plugins.embedded import random_state

    def draw() -> list[float]:
        return [random.random(), float(numpy.random.random()), torch.rand(1).item(), float(numpy.random.normal())]

    random_state.seed(3)
    seeded = draw()
    checkpoint.save(tmp_path, 1, IDENTITY, {"random": random_state.capture()})
    expected = draw()
    random_state.restore(checkpoint.load(tmp_path, IDENTITY)["random"])
    assert draw() == expected
    random_state.seed(3)
    assert draw() == seeded


# -- flags -----------------------------------------------------------------------------------------------------------


def test_the_baseline_of_a_comparison_keeps_the_hosts_flags_and_no_plugins() -> None:
    plugins = Plugins.named(["r3", "metrics"])
    flags = ["--seed", "8", "--metrics-jsonl", "8", "--num-rollout=3", "--compare", "--json", "--use-kl-loss"]
    of_r3 = ["--use-rollout-routing-replay", "--r3-missing", "drop", "--r3-measure-only", "--r3-earlier-rows=overwrite"]
    kept = arguments.baseline_flags([*flags, *of_r3, "--run-folder", "x"], plugins)
    assert kept == ["--seed", "8", "--num-rollout", "3", "--use-kl-loss"]


def test_what_a_plugin_sets_gives_way_to_the_user() -> None:
    args = arguments.parse([], Plugins.named(["r3"]))
    assert args.use_rollout_routing_replay is True
    assert arguments.parse([], Plugins.named([])).use_rollout_routing_replay is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--global-batch-size", "7"], "does not divide"),
        (["--rollout-temperature", "1e-8"], "1e-8 is not at least"),
        (["--clip-grad", "-1"], "-1 is not at least 0"),
        (["--lr", "nan"], "nan is not"),
        (["--adam-beta1", "1"], "below 1"),
        (["--adam-eps", "0"], "above 0"),
        (["--seed", "-1"], "-1 is not between"),
        (["--threads", "10000"], "cores"),
        (["--compare", "--save", "x"], "leave --save"),
        (["--num-rollout", "0"], "not positive"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        arguments.complete(arguments.parse(flags, Plugins.named([])))
    assert message in str(refused.value)
