"""What a run of the embedded host came to: a picture, tables, and JSON; of one run, or of two side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from miles_plugins.console import number, table
from miles_plugins.embedded.display import compact, duration, share
from miles_plugins.embedded.recorder import write_atomically, writing
from miles_plugins.embedded.results import RolloutResult, RunSummary, summarize
from miles_plugins.errors import UpstreamError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f6fb4", "#d9722b", "#3a9160", "#8460ad")  # a run each, told apart by colour-blind readers too
INK, FAINT = "#30343b", "#767c86"
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b9bec6",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e7e9ed",
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "lines.solid_capstyle": "round",
}
WIDTH, PANEL, DPI = 9.0, 3.0, 150  # inches of the picture and of a panel with its title, and pixels an inch
HEAD, FOOT = 0.7, 0.3  # inches
SMOOTHED_FROM = 20  # rollouts; fewer need no moving mean to be read
LAYER_LINES = 8  # more are drawn as a mean and a band
LABEL_HEIGHT = 0.065  # of a panel
EXACTLY_ZERO = "exactly 0 in every rollout"


# -- the picture ------------------------------------------------------------------------------------------------------


def write_report(file: Path, runs: Mapping[str, Sequence[RolloutResult]], title: str) -> None:
    """Draw runs by name into a PNG of 1350 x 1500 pixels: reward, log-prob difference and routing differences.

    Where there are any, the accept length of drafts and the draft's loss follow, and it is 450 pixels higher for each.

    Raises ArgumentError if the file cannot be written, UpstreamError without matplotlib. The file is never half there.
    """
    colored = {name: (COLORS[index % len(COLORS)], results) for index, (name, results) in enumerate(runs.items())}
    every = [each for results in runs.values() for each in results]
    panels = [partial(draw, runs=colored) for draw in _panels(every)]
    write_picture(file, title, {name: color for name, (color, _) in colored.items()}, panels, every)


def write_picture(
    file: Path,
    title: str,
    legend: Mapping[str, str],
    panels: Sequence[Callable[[Axes], None]],
    results: Sequence[RolloutResult],
) -> None:
    """Draw panels over the rollouts of `results`, from top to bottom, under a title and a legend of name to color.

    Raises as `write_report`.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UpstreamError(
            "a report cannot be drawn", {"missing": error.name or error}, 'pip install "miles-plugins[embedded]"'
        ) from error

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the reader's own matplotlibrc must not change the picture
        matplotlib.rcParams.update(STYLE)
        height = HEAD + PANEL * len(panels) + FOOT
        figure = Figure(figsize=(WIDTH, height))
        figure.subplots_adjust(left=0.1, right=0.895, top=1 - 1.15 / height, bottom=0.55 / height, hspace=0.27)
        size = min(14, 14 * 68 / max(1, len(title)))
        figure.text(0.1, 1 - 0.35 / height, title, fontsize=size, fontweight="bold", va="center")
        handles = [Line2D([], [], color=color, linewidth=2.2, label=name) for name, color in legend.items()]
        if handles:
            place = (0.092, 1 - 0.63 / height)
            figure.legend(handles=handles, loc="center left", bbox_to_anchor=place, ncols=len(legend), borderpad=0)
        axes = list(figure.subplots(len(panels), 1, squeeze=False)[:, 0])
        for panel, draw in zip(axes, panels, strict=True):
            draw(panel)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.yaxis.grid(True)
            panel.xaxis.grid(False)
            panel.set_xlim(*_limits([each.rollout for each in results]))
        axes[-1].set_xlabel("Rollout")
        with writing(file):
            write_atomically(file, lambda path: figure.savefig(path, format="png", dpi=DPI, facecolor="white"))


Runs = Mapping[str, tuple[str, Sequence[RolloutResult]]]  # name -> color, results


def _panels(results: Sequence[RolloutResult]) -> list[Callable[..., None]]:
    """What there is to be drawn, from top to bottom."""
    panels: list[Callable[..., None]] = [_draw_reward, _draw_logprobs, _draw_routing]
    if any(each.accept_length is not None for each in results):
        panels.append(_draw_accept_length)
    if any(each.draft_loss is not None for each in results):
        panels.append(_draw_draft_loss)
    return panels


def _draw_accept_length(panel: Axes, runs: Runs) -> None:
    head(panel, "Accept length of speculative decoding", "1: nothing of what is drafted is accepted")
    panel.set_ylabel("Tokens a verification pass")
    _draw_numbers(panel, runs, lambda each: each.accept_length)


def _draw_draft_loss(panel: Axes, runs: Runs) -> None:
    head(panel, "Draft loss", "")
    panel.set_ylabel("Nats per response token")
    _draw_numbers(panel, runs, lambda each: each.draft_loss)


def _draw_numbers(panel: Axes, runs: Runs, of: Callable[[RolloutResult], float | None]) -> None:
    for color, results in runs.values():
        draw_course(panel, results, [of(each) for each in results], color)


def _draw_reward(panel: Axes, runs: Runs) -> None:
    smoothed = any(len(results) >= SMOOTHED_FROM for _, results in runs.values())
    head(panel, "Reward", "thin: each rollout, thick: moving mean" if smoothed else "")
    values = []
    for color, results in runs.values():
        rewards = [each.reward for each in results]
        draw_course(panel, results, rewards, color)
        values += _finite(rewards)
    panel.set_ylabel("Mean reward")
    if not values:
        _say(panel, "no rewards were recorded")
    elif all(0 <= value <= 1 for value in values):
        panel.set_ylim(-0.03, 1.03)


def _draw_logprobs(panel: Axes, runs: Runs) -> None:
    from matplotlib.lines import Line2D

    head(panel, "Train-rollout log-prob difference")
    panel.set_ylabel("Nats per response token")
    values: list[float] = []
    styles: dict[str, dict[str, Any]] = {
        "mean": {"linewidth": 2.0},
        "99th percentile": {"linewidth": 1.2, "dashes": (5, 2), "alpha": 0.85},
        "maximum": {"linewidth": 1.1, "dashes": (1, 1.6), "alpha": 0.75},
    }
    for color, results in runs.values():
        courses = {
            "mean": [each.logprob_difference for each in results],
            "99th percentile": [each.logprob_difference_p99 for each in results],
            "maximum": [each.logprob_difference_max for each in results],
        }
        for name, numbers in courses.items():
            _draw_line(panel, results, numbers, color, **styles[name])
            values += _finite(numbers)
    positive = [value for value in values if value > 0]
    if not values:
        _say(panel, "no log-prob differences were recorded")
    elif not positive:
        _say_zero(panel)
    else:
        _log_scale(panel, min(positive), max(positive), zeros=len(positive) < len(values))
        panel.legend(
            handles=[Line2D([], [], color=FAINT, label=name, **style) for name, style in styles.items()],
            loc="lower right",
            bbox_to_anchor=(1.012, 0.99),
            ncols=len(styles),
            fontsize=9,
            labelcolor=FAINT,
        )


def _log_scale(panel: Axes, smallest: float, largest: float, *, zeros: bool) -> None:
    """A log scale for positive numbers; for zeros too, a short linear stretch below the smallest of the others."""
    from matplotlib.ticker import FixedLocator, NullLocator

    if not zeros:
        panel.set_yscale("log")
        return
    panel.set_yscale("symlog", linthresh=smallest, linscale=0.5)
    powers = [10.0**power for power in range(math.ceil(math.log10(smallest)), math.floor(math.log10(largest)) + 1)]
    panel.yaxis.set_major_locator(FixedLocator([0, *powers]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_ylim(-0.15 * smallest, 2 * largest)


def _draw_routing(panel: Axes, runs: Runs) -> None:
    layers = sorted({layer for _, results in runs.values() for each in results for layer in _layers(each)})
    percents = {
        name: {layer: [_percent(_layers(each).get(layer)) for each in results] for layer in layers}
        for name, (_, results) in runs.items()
    }
    differing = [name for name, by_layer in percents.items() if any(map(any, map(_finite, by_layer.values())))]
    lines = 0 < len(layers) <= LAYER_LINES and len(differing) <= 1
    drawn = "a line for each MoE layer" if lines else "mean of the MoE layers, and their range"
    head(panel, "Train-rollout routing differences", drawn if differing else "")
    panel.set_ylabel("Tokens with other experts (%)")
    values: list[float] = []
    ends: list[tuple[float, str, str]] = []
    for name, (color, results) in runs.items():
        overall = [_percent(each.routing_different) for each in results]
        values += _finite([*overall, *(value for numbers in percents[name].values() for value in numbers)])
        if lines and name in differing:
            for (layer, numbers), shade in zip(percents[name].items(), _shades(color, len(layers)), strict=True):
                end = draw_course(panel, results, numbers, shade)
                ends += [(end, f"layer {layer}", shade)] if end is not None else []
        else:
            end = draw_course(panel, results, overall, color)
            ends += [(0.0, "exactly 0", color)] if end == 0 and name not in differing else []
            if name in differing:
                _draw_band(panel, results, percents[name], color)
    if not values:
        _say(panel, "no routing was recorded")
    elif not any(values):
        _say_zero(panel)
    else:
        panel.set_ylim(-0.03 * max(values), 1.05 * max(values))
        _label(panel, ends)


def head(panel: Axes, title: str, note: str = "") -> None:
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=9)
    panel.set_title(note, loc="right", fontsize=9, color=FAINT, pad=9)


def _draw_line(
    panel: Axes, results: Sequence[RolloutResult], values: Sequence[float | None], color: str, **style: Any
) -> None:
    """A line with gaps where a value is missing; a dot for one that has no neighbour to be joined with."""
    steps, numbers = [each.rollout for each in results], [_or_nan(value) for value in values]
    panel.plot(steps, numbers, color=color, clip_on=False, zorder=3, **style)
    known = [math.nan, *numbers, math.nan]
    alone = [i for i in range(len(numbers)) if not any(map(math.isfinite, (known[i], known[i + 2])))]
    panel.plot(
        [steps[i] for i in alone], [numbers[i] for i in alone], "o", color=color, markersize=4, clip_on=False, zorder=3
    )


def draw_course(
    panel: Axes, results: Sequence[RolloutResult], values: Sequence[float | None], color: str
) -> float | None:
    """A noisy number: faint as it is, and a moving mean over it once there are enough rollouts. Returns the last."""
    course = values
    if len(results) >= SMOOTHED_FROM:
        _draw_line(panel, results, values, color, linewidth=0.9, alpha=0.25)
        course = moving_mean(values, max(1, len(values) // 25))
    _draw_line(panel, results, course, color, linewidth=2.0)
    return next((value for value in reversed(_finite(course))), None)


def _draw_band(
    panel: Axes, results: Sequence[RolloutResult], by_layer: Mapping[int, Sequence[float | None]], color: str
) -> None:
    spans = [_finite(numbers) for numbers in zip(*by_layer.values(), strict=True)]
    panel.fill_between(
        [each.rollout for each in results],
        [min(span, default=math.nan) for span in spans],
        [max(span, default=math.nan) for span in spans],
        color=color,
        alpha=0.16,
        linewidth=0,
    )


def moving_mean(values: Sequence[float | None], reach: int) -> list[float | None]:
    """Each number's mean with `reach` neighbours on both sides; fewer at the ends, and where one is missing."""
    windows = (_finite(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values)))
    return [math.fsum(window) / len(window) if window else None for window in windows]


def _label(panel: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name lines at their right end, in their own color: (height, text, color), moved apart where they would meet."""
    low, high = panel.get_ylim()
    gap = LABEL_HEIGHT * (high - low)
    heights = [end for end, _, _ in sorted(ends)]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    top = high
    for index in reversed(range(len(heights))):  # and down again from the top
        heights[index] = min(heights[index], top)
        top = heights[index] - gap
    for height, (_, text, color) in zip(heights, sorted(ends), strict=True):
        panel.annotate(
            text,
            xy=(1, height),
            xycoords=("axes fraction", "data"),
            xytext=(7, 0),
            textcoords="offset points",
            color=color,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )


def _shades(color: str, count: int) -> list[str]:
    """The color from light, for the first layer, to full."""
    from matplotlib.colors import to_hex, to_rgb

    whites = [0.5 * (1 - index / (count - 1)) if count > 1 else 0.0 for index in range(count)]
    red, green, blue = to_rgb(color)
    return [to_hex((red + (1 - red) * w, green + (1 - green) * w, blue + (1 - blue) * w)) for w in whites]


def _say(panel: Axes, text: str) -> None:
    """For a panel without numbers."""
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=FAINT, fontsize=11)
    panel.set_yticks([])


def _say_zero(panel: Axes) -> None:
    panel.text(0.5, 0.5, EXACTLY_ZERO, transform=panel.transAxes, ha="center", va="center", color=FAINT, fontsize=11)
    panel.set_ylim(-0.03, 1)
    panel.set_yticks([0])


def _limits(rollouts: Sequence[int]) -> tuple[float, float]:
    """From the first to the last rollout; some room around one that is alone."""
    first, last = min(rollouts, default=0), max(rollouts, default=0)
    return (first, last) if last > first else (first - 0.5, last + 0.5)


def _layers(result: RolloutResult) -> Mapping[int, float]:
    return result.routing_different_by_layer


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _or_nan(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


# -- tables and JSON --------------------------------------------------------------------------------------------------


def summary_table(summary: RunSummary, title: str = "Summary") -> Table:
    """One run: what was measured, and the number."""
    return _table(title, {"": summary})


def comparison_table(with_: RunSummary, without: RunSummary, plugins: str = "plugins") -> Table:
    """Two runs side by side; `plugins` names those that one of them had."""
    return _table("Comparison", {f"with {plugins}": with_, "without plugins": without})


def _table(title: str, summaries: Mapping[str, RunSummary]) -> Table:
    columns = [_cells(each) for each in summaries.values()]
    names = max(columns, key=len, default={})  # a run without a draft has no rows about one
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    made = table(title, ["", *summaries], rows)
    made.show_header = any(summaries)
    for column in made.columns[1:]:
        column.justify = "right"
    return made


def _cells(summary: RunSummary) -> dict[str, str]:
    ratio, speed, different = summary.reward_ratio, summary.tokens_per_second, summary.routing_different
    drafts = {
        "accept length, first tenth of the rollouts": number(summary.first_accept_length, ".2f"),
        "accept length, last tenth": number(summary.last_accept_length, ".2f"),
        "draft loss, last tenth": number(summary.last_draft_loss, ".3f"),
    }
    return {
        "rollouts": str(summary.rollouts),
        "mean reward, first tenth of the rollouts": number(summary.first_reward, ".3f"),
        "mean reward, last tenth": number(summary.last_reward, ".3f"),
        "last / first": "–" if ratio is None else f"{ratio:.1f} x",
        "log-prob difference, mean": number(summary.logprob_difference, ".2g"),
        "log-prob difference, 99th percentile": number(summary.logprob_difference_p99, ".2g"),
        "log-prob difference, maximum": number(summary.logprob_difference_max, ".2g"),
        "routed differently, of (token, layer)": "–" if different is None else share(different),
        **{name: value for name, value in drafts.items() if value != "–"},
        "rollouts without gradient": str(summary.rollouts_without_gradient),
        "speed": "–" if speed is None else f"{compact(speed)} tokens/s",
        "time, without loading": duration(summary.seconds),
    }


def to_json(results: Sequence[RolloutResult]) -> dict[str, Any]:
    """A run's summary and rollouts as JSON has them: numbers that it does not have become strings."""
    return {
        "summary": _plain(dataclasses.asdict(summarize(results))),
        "rollouts": [_plain(dataclasses.asdict(each)) for each in results],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
