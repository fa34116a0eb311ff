"""What training the draft online is worth: acceptance with a frozen draft and with a trained one, as a policy drifts.

For each seed: a base, in which policy and draft are trained together on one reward; then, from its weights, two runs of
the same seed on another reward, one with the draft as it was, one with the draft trained. Every run is a process of its
own (`slime-train --embedded --plugins spec`). And it is checked that speculation leaves the distribution of answers as
it is.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins.console import interruptible, number, table
from miles_plugins.embedded import counting_task, report
from miles_plugins.embedded.recorder import METRICS
from miles_plugins.embedded.results import RolloutResult, read_results
from miles_plugins.errors import PluginError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

BASE, FROZEN, ONLINE = "base", "frozen", "online"
ARMS = {FROZEN: "draft frozen", ONLINE: "draft trained online"}
STEPS = 3  # tokens that are proposed before they are verified
SMALL = ("--num-layers", "2", "--num-experts", "8", "--moe-router-topk", "2")
PROMPTS, WEIGHTS, LOG = "prompts.jsonl", "hf", "log"
POLL_SECONDS = 0.5
ANSWER = 4  # tokens of an answer whose distribution is compared: one, and three that are verified
FEWEST = 10  # answers in a bin of the chi-square test; rarer ones are one bin


@dataclass(frozen=True)
class Bench:
    """What to measure, and where.

    Attributes:
        samples: answers of each kind of decoding that are compared.
    """

    folder: Path
    seeds: Sequence[int]
    base_rollouts: int
    rollouts: int
    learning_rate: float
    entropy: float
    samples: int

    def run_folder(self, seed: int, run: str) -> Path:
        return self.folder / f"seed-{seed}" / run

    def results(self, seed: int, run: str) -> list[RolloutResult]:
        return read_results(self.run_folder(seed, run) / METRICS)

    def flags(self, seed: int, run: str) -> list[str]:
        """Of `slime-train`, for one run."""
        reward = counting_task.up if run == BASE else counting_task.down
        model = [*SMALL, "--save-hf", str(self.run_folder(seed, WEIGHTS))] if run == BASE else []
        options = {
            "--run-folder": self.run_folder(seed, run),
            "--seed": seed,
            "--num-rollout": self.base_rollouts if run == BASE else self.rollouts,
            "--prompt-data": self.folder / PROMPTS,
            "--custom-rm-path": f"{counting_task.__name__}.{reward.__name__}",
            "--lr": self.learning_rate,
            "--entropy-coef": self.entropy,
            "--mtp-num-layers": 1,
            "--sglang-speculative-algorithm": "EAGLE",
            "--sglang-speculative-num-steps": STEPS,
        }
        if run != BASE:
            options["--hf-checkpoint"] = self.run_folder(seed, WEIGHTS)
        trained = [] if run == FROZEN else ["--enable-mtp-training"]
        return [*model, *trained, *(str(word) for pair in options.items() for word in pair)]


def measure(bench: Bench, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run everything; what was found, as JSON has it.

    Args:
        progress: called with what is being done, how many rollouts of it are done, and of how many.

    Raises:
        PluginError: a run ended before its end.
    """
    bench.folder.mkdir(parents=True, exist_ok=True)
    counting_task.write_prompts(bench.folder / PROMPTS, count=256, seed=0)
    for seed in bench.seeds:
        for run in (BASE, FROZEN, ONLINE):
            _run(bench, seed, run, partial(progress, f"seed {seed}, {run}"))
    found = Distribution.of(bench.run_folder(bench.seeds[0], WEIGHTS), bench.samples, partial(progress, "chi-square"))
    return {
        "seeds": {str(seed): _measured(bench, seed) for seed in bench.seeds},
        "distribution": {
            "answers": bench.samples,
            "bins": found.bins,
            "statistic": found.statistic,
            "p_value": found.p_value,
            "accept_length": found.accept_length,
        },
    }


def _run(bench: Bench, seed: int, run: str, progress: Callable[[int, int], None]) -> None:
    log = bench.folder / f"seed-{seed}" / f"{run}.{LOG}"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", "--embedded", "--plugins", "spec"]
    total = bench.base_rollouts if run == BASE else bench.rollouts
    with open(log, "wb") as output:
        process = subprocess.Popen([*command, *bench.flags(seed, run)], stdout=output, stderr=subprocess.STDOUT)
        try:
            with interruptible():  # a signal must not leave the run behind
                while process.poll() is None:
                    progress(_steps(bench.run_folder(seed, run) / METRICS), total)
                    time.sleep(POLL_SECONDS)
        finally:
            process.terminate()  # of one that has ended: nothing
            process.wait()
    if process.returncode != 0:
        raise PluginError(
            f"the run {run} of seed {seed} ended with exit code {process.returncode}",
            {"log": log, "its end": " / ".join(log.read_text(errors="replace").splitlines()[-3:])},
            "run the command again in another folder, or with other --seeds",
        )
    progress(total, total)


def _steps(metrics: Path) -> int:
    return metrics.read_bytes().count(b'"step_key": "train/step"') if metrics.exists() else 0


# -- what came out ---------------------------------------------------------------------------------------------------


def _measured(bench: Bench, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for run in (BASE, FROZEN, ONLINE):
        results = bench.results(seed, run)
        edge = results[-max(1, len(results) // 10) :]
        found[run] = {
            "last_tenth": {name: _mean([getattr(each, name) for each in edge]) for name in MEASURES},
            "rollouts": {name: [getattr(each, name) for each in results] for name in MEASURES},
        }
    return found


MEASURES = ("accept_length", "accept_rate", "reward", "draft_loss")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def summary(found: Mapping[str, Any]) -> Table:
    """A row a seed: means over the last tenth of the rollouts of each run."""
    columns = {
        "length, base": (BASE, "accept_length", ".2f"),
        "length, frozen": (FROZEN, "accept_length", ".2f"),
        "length, online": (ONLINE, "accept_length", ".2f"),
        "rate, frozen": (FROZEN, "accept_rate", ".2f"),
        "rate, online": (ONLINE, "accept_rate", ".2f"),
        "reward, frozen": (FROZEN, "reward", ".2f"),
        "reward, online": (ONLINE, "reward", ".2f"),
    }
    rows = [
        [seed, *(number(runs[run]["last_tenth"][name], form) for run, name, form in columns.values())]
        for seed, runs in found["seeds"].items()
    ]
    return table("Acceptance and reward, last tenth of the rollouts", ["seed", *columns], rows, numbers=True)


def draw(bench: Bench, file: Path) -> None:
    """Accept length, accept rate and reward by rollout: thin each seed, thick their mean. Raises as `write_report`."""
    runs = {arm: [bench.results(seed, arm) for seed in bench.seeds] for arm in ARMS}
    colors = dict(zip(ARMS, reversed(report.COLORS[:2]), strict=True))
    panels = {
        "Accept length": ("Tokens a verification pass", "accept_length"),
        "Accept rate": ("Share of what was proposed", "accept_rate"),
        "Reward": ("Mean reward", "reward"),
    }
    report.write_picture(
        file,
        "Embedded host: a policy drifts, and its draft follows or not",
        {label: colors[arm] for arm, label in ARMS.items()},
        [partial(_draw, title=title, runs=runs, colors=colors, of=of) for title, of in panels.items()],
        runs[ONLINE][0],
    )


def _draw(
    panel: Axes,
    title: str,
    runs: Mapping[str, Sequence[Sequence[RolloutResult]]],
    colors: Mapping[str, str],
    of: tuple[str, str],
) -> None:
    label, name = of
    report.head(panel, title, "thin: a seed, thick: mean of the seeds" if len(runs[ONLINE]) > 1 else "")
    panel.set_ylabel(label)
    for arm, seeds in runs.items():
        courses = [[getattr(each, name) for each in results] for results in seeds]
        smooth = [report.moving_mean(course, 2) for course in courses]
        for course in smooth if len(courses) > 1 else courses:
            panel.plot([_or_nan(value) for value in course], color=colors[arm], linewidth=0.9, alpha=0.35)
        means = [_or_nan(_mean(values)) for values in zip(*smooth, strict=True)]
        panel.plot(means, color=colors[arm], linewidth=2.2)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


# -- the distribution of answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distribution:
    """Whether speculative and plain decoding answer alike: a chi-square test of two samples of answers.

    Attributes:
        p_value: of the hypothesis that both are of one distribution.
        accept_length: of the speculative ones, so that it is seen that they were.
    """

    bins: int
    statistic: float
    p_value: float
    accept_length: float
    counts: tuple[Counter[Any], Counter[Any]] = field(repr=False)

    @classmethod
    def of(cls, folder: Path, samples: int, progress: Callable[[int, int], None]) -> Distribution:
        """Of the model and draft of a checkpoint: so many answers of either kind, of different seeds, to one prompt."""
        import torch

        from miles_plugins.activation import activate
        from miles_plugins.embedded.command import quiet_upstream
        from miles_plugins.embedded.engine import RolloutEngine, ServerArgs
        from miles_plugins.patches.seam import EMBEDDED_ON_CPU

        activate((), "driver", environment={}, host=EMBEDDED_ON_CPU).check()  # transformers cannot be imported without
        quiet_upstream()
        torch.set_num_threads(1)
        options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "random_seed": 0}
        eagle: dict[str, Any] = {
            "speculative_algorithm": "EAGLE",
            "speculative_num_steps": STEPS,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": STEPS + 1,
        }
        counts: list[Counter[Any]] = []
        tokens = verified = 0
        kinds: tuple[dict[str, Any], ...] = ({}, eagle)
        for kind, more in enumerate(kinds):
            server_args = ServerArgs(str(folder), enable_return_routed_experts=False, **options, **more)
            engine, found = RolloutEngine(folder, server_args), Counter[Any]()
            prompt = engine.tokenizer.encode("Count on from 1: ", add_special_tokens=False)
            for begin in range(0, samples, 500):
                rows = range(begin, min(begin + 500, samples))
                params = [{"max_new_tokens": ANSWER, "sampling_seed": kind * samples + row} for row in rows]
                answers: Any = engine.generate({"input_ids": [prompt] * len(rows), "sampling_params": params})
                found.update(tuple(answer["output_ids"]) for answer in answers)
                infos = [answer["meta_info"] for answer in answers if "spec_verify_ct" in answer["meta_info"]]
                tokens += sum(info["completion_tokens"] for info in infos)
                verified += sum(info["spec_verify_ct"] for info in infos)
                progress(kind * samples + rows.stop, 2 * samples)
            counts.append(found)
        bins, statistic, p_value = chi_square(*counts)
        return cls(bins, statistic, p_value, tokens / verified if verified else math.nan, (counts[0], counts[1]))


def chi_square(first: Counter[Any], second: Counter[Any]) -> tuple[int, float, float]:
    """Bins, statistic and p-value of the hypothesis that both samples are of one distribution (Pearson).

    Values that came fewer than FEWEST times in both together are one bin.
    """
    import torch

    both = first + second
    often = [value for value, count in both.items() if count >= FEWEST]
    rows = [(first[value], second[value]) for value in often]
    rare = first.total() - sum(row[0] for row in rows), second.total() - sum(row[1] for row in rows)
    rows += [rare] if sum(rare) else []
    observed = torch.tensor(rows, dtype=torch.float64)
    expected = observed.sum(dim=1, keepdim=True) * observed.sum(dim=0) / observed.sum()
    statistic = float(((observed - expected) ** 2 / expected).sum())
    degrees = torch.tensor(max(len(rows) - 1, 1), dtype=torch.float64)
    p_value = torch.special.gammaincc(degrees / 2, torch.tensor(statistic, dtype=torch.float64) / 2)
    return len(rows), statistic, float(p_value)
