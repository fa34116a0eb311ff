"""What the commands share: tables and numbers in them, ending on a signal, and reading metrics.jsonl."""

from __future__ import annotations

import json
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

# -- ending on a signal -----------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """A signal asked us to end. Not an Exception, so that no handler on the way swallows it."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(signal.Signals(signal_number).name)


class Interruption:
    """What `interruptible` knows: the signal that came, also where a C extension turned or swallowed the exception."""

    def __init__(self, handled: Mapping[signal.Signals, Any]) -> None:
        self._handled = handled
        self.received: Interrupted | None = None

    def __call__(self) -> None:
        """From here on, ignore the signals."""
        for number in self._handled:
            signal.signal(number, signal.SIG_IGN)

    def check(self) -> None:
        """Raise what was received, should it have been swallowed."""
        if self.received is not None:
            raise self.received


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Raise Interrupted on Ctrl-C, SIGTERM and hang-up, until what it gives is called: from then, ignore them.

    Outside the main thread Python allows no signal handlers, and this does nothing.
    """
    before: dict[signal.Signals, Any] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        interruption.received = Interrupted(number)
        raise interruption.received

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
                before[number] = signal.signal(number, interrupt)

    interruption = Interruption(before)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- metrics.jsonl ----------------------------------------------------------------------------------------------------


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl so far: {"time", "step_key", "metrics"}; all metrics are numbers, or nan."""
    with suppress(FileNotFoundError), open(file, encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
        return [{**e, "metrics": {name: float(value) for name, value in e["metrics"].items()}} for e in entries]
    return []


def steps_of(metrics: Sequence[Mapping[str, Any]], step_key: str) -> dict[int, dict[str, Any]]:
    """Everything logged under one step key, merged by step: slime logs a step in several records."""
    steps: dict[int, dict[str, Any]] = defaultdict(dict)
    for record in metrics:
        if record["step_key"] == step_key:
            steps[int(record["metrics"][step_key])].update(record["metrics"], time=record["time"])
    return dict(steps)


# -- tables -----------------------------------------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> Table:
    """A table as every command prints it; `numbers` are aligned to the right. Cells are text, not rich's markup."""
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def number(value: float | None, form: str) -> str:
    """A number in one of Python's formats, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def percent(share: float | None) -> str:
    """A share of 1 as a percentage that says 100 only if it is."""
    if share is None:
        return "–"
    return "100 %" if share == 1 else f"{min(100 * share, 99.999) if share < 1 else 100 * share:.3f} %"
