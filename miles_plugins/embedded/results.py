"""What a run of the embedded host measured, read back from its metrics.jsonl: one result a rollout, and their summary.

A share is a number from 0 to 1; a log-prob difference is |log p in training - log p in the rollout|, in nats.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from miles_plugins.console import read_metrics
from miles_plugins.errors import ArgumentError

ROLLOUT_STEP, TRAIN_STEP = "rollout/step", "train/step"
ROLLOUT_OF_TRAIN_STEP = "train/rollout"  # several train steps a rollout: train/step runs ahead of rollout/step

LOGPROB_DIFFERENCE = "train/train_rollout_logprob_abs_diff"
ROUTING_DIFFERENT = "train/routing_different"
ROUTING_DIFFERENT_IN_LAYER = "train/routing_different_layer_"  # and the layer's index in the whole model

# What the host itself logs; every other metric is a plugin's.
HOST_METRICS = {
    *(ROLLOUT_STEP, "rollout/raw_reward", "rollout/truncated_ratio", "rollout/response_lengths", "rollout/tokens"),
    *("rollout/seconds", "rollout/zero_variance_groups", "rollout/spec_accept_rate", "rollout/spec_accept_length"),
    *(TRAIN_STEP, ROLLOUT_OF_TRAIN_STEP, "train/loss", "train/pg_loss", "train/pg_clipfrac", "train/grad_norm"),
    *("train/entropy_loss", "train/ppo_kl", "train/kl_loss", "train/seconds", ROUTING_DIFFERENT),
    "train/mtp_loss",
    *(LOGPROB_DIFFERENCE, f"{LOGPROB_DIFFERENCE}_p99", f"{LOGPROB_DIFFERENCE}_max"),
}


@dataclass(frozen=True)
class RolloutResult:
    """One rollout and the train steps on it; None where nothing was logged, nan where it was not a number."""

    rollout: int
    reward: float | None = None  # mean over samples
    truncated: float | None = None  # share of samples
    response_length: float | None = None  # tokens, mean over samples
    tokens: float | None = None  # prompt and response
    seconds: float | None = None  # to generate and to train
    zero_variance_groups: float | None = None  # share of prompts whose samples were all rewarded alike: no gradient
    loss: float | None = None
    grad_norm: float | None = None
    logprob_difference: float | None = None  # mean over response tokens
    logprob_difference_p99: float | None = None
    logprob_difference_max: float | None = None
    routing_different: float | None = None  # share of (token, MoE layer) pairs
    routing_different_by_layer: dict[int, float] = field(default_factory=dict)  # share of tokens
    plugin_metrics: dict[str, float] = field(default_factory=dict)
    accept_length: float | None = None  # tokens a verification pass; of speculative decoding
    accept_rate: float | None = None  # share of proposed tokens
    draft_loss: float | None = None  # nats a token

    @property
    def tokens_per_second(self) -> float | None:
        """Prompt and response tokens a second of generating and training."""
        return self.tokens / self.seconds if self.tokens is not None and self.seconds else None

    @classmethod
    def from_metrics(
        cls, rollout: int, rollout_metrics: Mapping[str, float], train_metrics: Sequence[Mapping[str, float]]
    ) -> RolloutResult:
        """Join what was logged for a rollout with its train steps: their mean, the largest _max, the sum of seconds."""
        trained: defaultdict[str, list[float]] = defaultdict(list)
        for step in train_metrics:
            for name, value in step.items():
                trained[name].append(value)
        values = {**rollout_metrics, **{name: math.fsum(found) / len(found) for name, found in trained.items()}}
        seconds = [rollout_metrics.get("rollout/seconds"), *trained.get("train/seconds", ())]
        return cls(
            rollout=rollout,
            reward=values.get("rollout/raw_reward"),
            truncated=values.get("rollout/truncated_ratio"),
            response_length=values.get("rollout/response_lengths"),
            tokens=values.get("rollout/tokens"),
            seconds=_sum([each for each in seconds if each is not None]),
            zero_variance_groups=values.get("rollout/zero_variance_groups"),
            loss=values.get("train/loss"),
            grad_norm=values.get("train/grad_norm"),
            logprob_difference=values.get(LOGPROB_DIFFERENCE),
            logprob_difference_p99=values.get(f"{LOGPROB_DIFFERENCE}_p99"),
            logprob_difference_max=_largest(trained.get(f"{LOGPROB_DIFFERENCE}_max", ())),
            routing_different=values.get(ROUTING_DIFFERENT),
            routing_different_by_layer=dict(
                sorted(
                    (int(name.removeprefix(ROUTING_DIFFERENT_IN_LAYER)), value)
                    for name, value in values.items()
                    if _is_layer(name)
                )
            ),
            plugin_metrics={
                name: value for name, value in values.items() if name not in HOST_METRICS and not _is_layer(name)
            },
            # The plugin's are of all tokens together, slime's are means over samples.
            accept_length=values.get("rollout/spec/accept_length", values.get("rollout/spec_accept_length")),
            accept_rate=values.get("rollout/spec/accept_rate", values.get("rollout/spec_accept_rate")),
            draft_loss=values.get("train/mtp_loss"),
        )


def rollout_of(step_key: str, metrics: Mapping[str, object]) -> int | None:
    """The rollout that a line of metrics.jsonl belongs to; None if it is about something else."""
    if step_key == TRAIN_STEP:  # without train/rollout, as slime logs it, it is one train step a rollout
        return int(float(str(metrics.get(ROLLOUT_OF_TRAIN_STEP, metrics[TRAIN_STEP]))))
    return int(float(str(metrics[ROLLOUT_STEP]))) if step_key == ROLLOUT_STEP else None


def read_results(metrics_file: Path) -> list[RolloutResult]:
    """The rollouts in a metrics.jsonl, in order; empty without the file. A line half written at the end is left out.

    A rollout that was done again, after a resume, counts as it was done last. Raises ArgumentError for another file.
    """
    generated: dict[int, dict[str, float]] = {}
    trained: defaultdict[int, dict[int, dict[str, float]]] = defaultdict(dict)  # rollout -> train step -> metrics
    try:
        for line in read_metrics(metrics_file):
            rollout, metrics = rollout_of(line["step_key"], line["metrics"]), line["metrics"]
            if rollout is None:
                continue
            if line["step_key"] == ROLLOUT_STEP:
                if _says_again(generated.get(rollout, {}), metrics, ROLLOUT_STEP):
                    del generated[rollout]
                    trained.pop(rollout, None)  # it trained on samples that were thrown away
                generated.setdefault(rollout, {}).update(metrics)
            else:
                steps, step = trained[rollout], int(metrics[TRAIN_STEP])
                if _says_again(steps.get(step, {}), metrics, TRAIN_STEP, ROLLOUT_OF_TRAIN_STEP):
                    del steps[step]
                steps.setdefault(step, {}).update(metrics)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ArgumentError(
            f"{metrics_file} cannot be read as metrics of a run",
            {"found": f"{type(error).__name__}: {error}", "expected": '{"time", "step_key", "metrics"} on each line'},
            "name the run folder of `slime-train --embedded`",
        ) from error
    return [
        RolloutResult.from_metrics(rollout, generated.get(rollout, {}), list(trained.get(rollout, {}).values()))
        for rollout in sorted({*generated, *trained})
    ]


@dataclass(frozen=True)
class RunSummary:
    """A run in a few numbers; None where no rollout logged one."""

    rollouts: int
    first_reward: float | None  # mean over the first tenth of the rollouts, at least one
    last_reward: float | None  # mean over the last tenth
    reward_ratio: float | None  # last / first; inf if the first is 0, None if both are
    logprob_difference: float | None  # mean over rollouts
    logprob_difference_p99: float | None  # mean over rollouts of each one's 99th percentile
    logprob_difference_max: float | None  # of all tokens of the run
    routing_different: float | None  # mean over rollouts
    tokens_per_second: float | None
    seconds: float | None  # of generating and training; without loading the model
    rollouts_without_gradient: int  # every group was rewarded alike
    first_accept_length: float | None = None  # as first_reward
    last_accept_length: float | None = None
    last_draft_loss: float | None = None


def summarize(results: Sequence[RolloutResult]) -> RunSummary:
    """Sum up a run."""
    edge = max(1, len(results) // 10)
    first, last = _mean([each.reward for each in results[:edge]]), _mean([each.reward for each in results[-edge:]])
    timed = [(each.tokens, each.seconds) for each in results if each.tokens is not None and each.seconds]
    return RunSummary(
        rollouts=len(results),
        first_reward=first,
        last_reward=last,
        reward_ratio=_ratio(last, first),
        logprob_difference=_mean([each.logprob_difference for each in results]),
        logprob_difference_p99=_mean([each.logprob_difference_p99 for each in results]),
        logprob_difference_max=_largest([each.logprob_difference_max for each in results]),
        routing_different=_mean([each.routing_different for each in results]),
        tokens_per_second=sum(tokens for tokens, _ in timed) / sum(seconds for _, seconds in timed) if timed else None,
        seconds=_sum([each.seconds for each in results if each.seconds is not None]),
        rollouts_without_gradient=sum(each.zero_variance_groups == 1 for each in results),
        first_accept_length=_mean([each.accept_length for each in results[:edge]]),
        last_accept_length=_mean([each.accept_length for each in results[-edge:]]),
        last_draft_loss=_mean([each.draft_loss for each in results[-edge:]]),
    )


def _says_again(said: Mapping[str, float], metrics: Mapping[str, float], *keys: str) -> bool:
    """A step may be logged in several lines, each with other metrics; one that repeats a metric begins it anew."""
    return any(name in said for name in metrics if name not in keys)


def _is_layer(name: str) -> bool:
    return name.startswith(ROUTING_DIFFERENT_IN_LAYER) and name.removeprefix(ROUTING_DIFFERENT_IN_LAYER).isdecimal()


def _sum(values: Sequence[float]) -> float | None:
    return math.fsum(values) if values else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None


def _largest(values: Sequence[float | None]) -> float | None:
    """nan if one is: max() would depend on the order."""
    present = [value for value in values if value is not None]
    return math.nan if any(map(math.isnan, present)) else max(present, default=None)


def _ratio(last: float | None, first: float | None) -> float | None:
    if last is None or first is None or (first == 0 and last == 0):
        return None
    return last / first if first else math.copysign(math.inf, last)
