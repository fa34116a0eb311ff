"""What the commands share: ending on a signal, reading metrics.jsonl, tables."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from miles_plugins.console import Interrupted, interruptible, number, percent, read_metrics, steps_of, table


def test_the_handlers_are_given_back() -> None:
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background run has it ignored
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_raised_where_no_handler_swallows_it(number: signal.Signals) -> None:
    outside = signal.signal(number, signal.SIG_DFL)
    try:
        with interruptible() as ignore_signals:
            with pytest.raises(Interrupted, match=number.name) as raised, suppress(Exception):
                signal.raise_signal(number)
            assert raised.value.signal_number == number
            ignore_signals()
            signal.raise_signal(number)
    finally:
        signal.signal(number, outside)


def test_a_steps_lines_are_merged_and_its_time_is_the_last(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    records = [
        {"time": 1.0, "step_key": "train/step", "metrics": {"train/step": 3, "a": 1, "b": "nan"}},
        {"time": 2.0, "step_key": "rollout/step", "metrics": {"rollout/step": 3, "a": 7}},
        {"time": 3.0, "step_key": "train/step", "metrics": {"train/step": 3, "a": 2}},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"time": 4.0, "st')
    (step,) = steps_of(read_metrics(file), "train/step").items()
    assert step[0] == 3
    assert step[1].pop("b") != step[1].get("b")  # nan
    assert step[1] == {"train/step": 3.0, "a": 2.0, "time": 3.0}


def test_cells_are_text_and_not_markup() -> None:
    console = Console(file=StringIO(), width=60)
    console.print(table("Title", ["name", "value"], [["[red]x", number(None, ".3f")], ["y", number(0.25, ".3f")]]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]x" in text
    assert "–" in text
    assert "0.250" in text


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "–"), (1.0, "100 %"), (0.9999999, "99.999 %"), (0.5, "50.000 %"), (0.0, "0.000 %"), (1.5, "150.000 %")],
)
def test_only_all_is_100_percent(share: float | None, text: str) -> None:
    assert percent(share) == text
