"""How a run of the embedded host is going: live in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from miles_plugins.console import number
from miles_plugins.embedded.results import RolloutResult

SPARKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 24  # characters
WIDTH_WITHOUT_SPARKLINE = 82  # of the line of numbers
PLAIN_LINES = 10  # about so many a run
RECENT = 10  # rollouts that tell how long the next ones take


class Display:
    """A context manager that shows phases and results as they come, and leaves the terminal as it was."""

    def __init__(self, console: Console, rollouts: int, done: int = 0, title: str = "Training") -> None:
        """`rollouts`: of the whole run; `done`: those that an earlier session did. `title` heads the bar."""
        self._console = console
        self._rollouts = rollouts
        self._phase = ""
        self._rewards: list[float] = []
        self._result: RolloutResult | None = None  # the latest
        self._printed: RolloutResult | None = None
        self._begun = time.monotonic()
        self._shown_at: deque[float] = deque(maxlen=RECENT + 1)
        self._live: Live | None = None
        self._bar = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24, complete_style="blue"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[phase]}", style="dim", markup=False),
            console=console,
        )
        self._task = self._bar.add_task(title, total=rollouts, completed=done, phase="")

    def __enter__(self) -> Display:
        if self._console.is_interactive:
            # What goes to stdout is printed above the bar, unless it goes to a file.
            self._live = Live(console=self._console, get_renderable=self._render, redirect_stdout=sys.stdout.isatty())
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            if kind is not None:
                self._bar.stop_task(self._task)
                self._set_phase(f"stopped while {self._phase}" if self._phase else "stopped")
            else:
                self._set_phase("")
            self._live.stop()
        elif self._result is not self._printed:
            self._print()

    def phase(self, text: str) -> None:
        """What is being done now: "generating", "training"."""
        self._phase = text
        self._set_phase(text)

    def show(self, result: RolloutResult) -> None:
        """A rollout was generated and trained on."""
        self._shown_at.append(time.monotonic())
        self._result = result
        if result.reward is not None and math.isfinite(result.reward):
            self._rewards.append(result.reward)
        done = result.rollout + 1
        self._bar.update(self._task, completed=done)
        if self._live is not None:
            self._live.refresh()
        elif self._printed is None or done >= self._rollouts or done % math.ceil(self._rollouts / PLAIN_LINES) == 0:
            self._print()

    def _set_phase(self, text: str) -> None:
        self._bar.update(self._task, phase=text)

    def _seconds_left(self) -> float | None:
        if self._result is None:
            return None
        recent = list(self._shown_at)
        rollouts_left = max(0, self._rollouts - self._result.rollout - 1)
        if len(recent) > 1:
            return rollouts_left * (recent[-1] - recent[0]) / (len(recent) - 1)
        return rollouts_left * self._result.seconds if self._result.seconds is not None else None

    def _render(self) -> Group:
        elapsed, left = time.monotonic() - self._begun, self._seconds_left()
        if left is not None:  # counts down while a long rollout is being done
            left = max(0.0, left - (time.monotonic() - self._shown_at[-1]))
        cells = [("elapsed", duration(elapsed)), ("left", duration(left))]
        if self._result is not None:
            room = 0 if self._console.options.ascii_only else self._console.width - WIDTH_WITHOUT_SPARKLINE
            history = sparkline(self._rewards, min(SPARKLINE_WIDTH, room))
            cells = [
                ("reward", f"{history} {number(self._result.reward, '.3f')}".lstrip()),
                *measures(self._result),
                *cells,
            ]
        table = Table.grid(padding=(0, 3, 0, 0))
        table.add_row(*(Text(name, style="dim") for name, _ in cells))
        table.add_row(*(Text(value) for _, value in cells))
        return Group(self._bar, table)

    def _print(self) -> None:
        self._printed = result = self._result
        assert result is not None
        width = len(str(self._rollouts))
        parts = [
            f"rollout {result.rollout + 1:>{width + 1}}/{self._rollouts}",
            f"reward {number(result.reward, '.3f')}",
            *(value if name == "speed" else f"{name} {value}" for name, value in measures(result)),
            f"left {duration(self._seconds_left())}",
        ]
        self._console.print("  ".join(parts), markup=False, highlight=False, soft_wrap=True)


def measures(result: RolloutResult) -> list[tuple[str, str]]:
    """What train and rollout disagree on, and the speed, in words."""
    differently = result.routing_different
    speed = result.tokens_per_second
    return [
        ("log-prob diff", number(result.logprob_difference, ".2g")),
        ("routed differently", "–" if differently is None else share(differently)),
        ("speed", "–" if speed is None else f"{compact(speed)} tokens/s"),
    ]


def share(value: float) -> str:
    """A share of 1 in percent; "0 %" only if it is exactly that."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f} %"
    return f"{100 * value:.1f} %" if value >= 0.0005 else "< 0.1 %"


def compact(value: float) -> str:
    """A count in a few characters: 310, 3.1k, 31k, 3.1M."""
    for factor, unit in [(1e6, "M"), (1e3, "k")]:
        if value >= factor:
            scaled = value / factor
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def duration(seconds: float | None) -> str:
    """Minutes and seconds, hours where there are any: 0:48, 1:02:03; a dash if it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def sparkline(values: Sequence[float], width: int = SPARKLINE_WIDTH) -> str:
    """The course of a number, from the smallest to the largest, in at most `width` characters, each a mean."""
    count = max(0, min(width, len(values)))
    edges = [index * len(values) // count for index in range(count + 1)] if count else []
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, spread = min(means), max(means) - min(means)
    return "".join(SPARKS[round((mean - low) / spread * (len(SPARKS) - 1)) if spread else 0] for mean in means)
