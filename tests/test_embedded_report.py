"""What a run of the embedded host shows: while it goes, and when it is over."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from miles_plugins.embedded import report
from miles_plugins.embedded.display import Display, compact, duration, share, sparkline
from miles_plugins.embedded.report import comparison_table, moving_mean, summary_table, to_json, write_report
from miles_plugins.embedded.results import RolloutResult, summarize
from miles_plugins.errors import ArgumentError, UpstreamError


def results_of(rollouts: int, *, layers: Sequence[int] = (1, 3), different: float = 0.01) -> list[RolloutResult]:
    return [
        RolloutResult(
            rollout=index,
            reward=(index + 1) / rollouts,
            tokens=6200.0,
            seconds=2.0,
            logprob_difference=0.0041,
            logprob_difference_p99=0.03,
            logprob_difference_max=0.2,
            routing_different=different,
            routing_different_by_layer=dict.fromkeys(layers, different),
        )
        for index in range(rollouts)
    ]


def text_of(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


# -- while it goes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plain() -> Console:
    return Console(file=StringIO(), force_terminal=False, width=40)


@pytest.fixture
def terminal() -> Console:
    environment = {"TERM": "xterm-256color"}
    return Console(file=StringIO(), force_terminal=True, width=120, color_system=None, _environ=environment)


def numbers_shown(console: Console) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in text_of(console).splitlines()]


@pytest.mark.parametrize(
    ("rollouts", "shown"),
    [
        (1, [1]),
        (4, [1, 2, 3, 4]),
        (15, [1, 2, 4, 6, 8, 10, 12, 14, 15]),
        (100, [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (105, [1, 11, 22, 33, 44, 55, 66, 77, 88, 99, 105]),
    ],
)
def test_outside_a_terminal_it_says_the_first_the_last_and_each_tenth(
    plain: Console, rollouts: int, shown: list[int]
) -> None:
    with Display(plain, rollouts) as display:
        for result in results_of(rollouts):
            display.phase("generating")
            display.show(result)
    assert numbers_shown(plain) == shown


def test_a_plain_line(plain: Console) -> None:
    with Display(plain, 100, done=8) as display:
        display.show(replace(results_of(100)[9], reward=0.213, routing_different=0.012))
    assert text_of(plain) == (
        "rollout   10/100  reward 0.213  log-prob diff 0.0041  routed differently 1.2 %  3.1k tokens/s  left 3:00\n"
    )


def test_a_plain_line_of_what_is_not_known(plain: Console) -> None:
    with Display(plain, 100) as display:
        display.show(RolloutResult(rollout=0, reward=math.nan))
    assert text_of(plain) == "rollout    1/100  reward nan  log-prob diff –  routed differently –  –  left –\n"


def test_a_run_that_stops_says_how_far_it_came(plain: Console) -> None:
    def run() -> None:
        with Display(plain, 100) as display:
            for result in results_of(100)[:37]:
                display.show(result)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert numbers_shown(plain) == [1, 10, 20, 30, 37]


def test_nothing_happened_is_nothing_said(plain: Console) -> None:
    with Display(plain, 5) as display:
        display.phase("loading the model")
    assert text_of(plain) == ""


def test_in_a_terminal_it_shows_everything(terminal: Console) -> None:
    with Display(terminal, 10, title="GRPO [on] CPU") as display:
        display.phase("loading the model")
        for result in results_of(10)[:4]:
            display.show(result)
        display.phase("training")
        text = text_of(terminal)
    last = text[text.rindex("GRPO") :]
    for part in ["GRPO [on] CPU", "4/10", "▁▃▆█ 0.400", "0.0041", "1.0 %", "3.1k tokens/s"]:
        assert part in last
    assert "loading the model" in text


@pytest.mark.parametrize("error", [None, RuntimeError("theirs"), KeyboardInterrupt()])
def test_the_terminal_is_left_as_it_was(terminal: Console, error: BaseException | None) -> None:
    stdout = sys.stdout

    def run() -> None:
        with Display(terminal, 10) as display:
            display.phase("training")
            display.show(results_of(10)[0])
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    shown = text_of(terminal)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor, hidden and shown again
    assert shown.rindex("\x1b[?25h") > shown.rindex("Training")
    assert shown.rstrip("\x1b[?25h").endswith("\n")
    assert ("stopped while training" in shown) == (error is not None)
    assert sys.stdout is stdout


def test_the_time_left_is_that_of_the_recent_rollouts(plain: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("miles_plugins.embedded.display.time.monotonic", lambda: clock)
    with Display(plain, 40) as display:
        for result in results_of(40)[:30]:
            clock += 100.0 if result.rollout < 15 else 6.0  # they get faster
            display.show(result)
    assert text_of(plain).splitlines()[-1].endswith("left 1:00")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 %"), (0.0001, "< 0.1 %"), (0.0123, "1.2 %"), (1.0, "100.0 %"), (math.nan, "nan %")]
)
def test_only_nothing_is_0_percent(value: float, text: str) -> None:
    assert share(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(3.21, "3.2"), (310.4, "310"), (3100, "3.1k"), (31_000, "31k"), (3.1e6, "3.1M")]
)
def test_compact_counts(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (math.inf, "–"), (0.4, "0:00"), (59.7, "1:00"), (3723.0, "1:02:03")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_a_sparkline_goes_from_the_smallest_to_the_largest() -> None:
    assert sparkline([1, 2, 3], 10) == "▁▅█"
    assert sparkline(range(16), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0], 8) == "▁▁"
    assert sparkline([], 8) == sparkline([1.0], -5) == ""


# -- when it is over --------------------------------------------------------------------------------------------------


def cells_of(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(map(str, column.cells) for column in table.columns), strict=True)]


def test_the_summary_is_a_table_of_two_columns() -> None:
    table = summary_table(summarize(results_of(20, different=0.012)), title="The run [r3]")
    assert cells_of(table) == [
        ["rollouts", "20"],
        ["mean reward, first tenth of the rollouts", "0.075"],
        ["mean reward, last tenth", "0.975"],
        ["last / first", "13.0 x"],
        ["log-prob difference, mean", "0.0041"],
        ["log-prob difference, 99th percentile", "0.03"],
        ["log-prob difference, maximum", "0.2"],
        ["routed differently, of (token, layer)", "1.2 %"],
        ["rollouts without gradient", "0"],
        ["speed", "3.1k tokens/s"],
        ["time, without loading", "0:40"],
    ]
    console = Console(file=StringIO(), width=80)
    console.print(table)
    assert "mean reward, last tenth" in text_of(console)


def test_two_runs_stand_side_by_side() -> None:
    with_, without = summarize(results_of(10, different=0.0)), summarize(results_of(20, different=0.012))
    table = comparison_table(with_, without, plugins="r3_replay")
    assert [column.header for column in table.columns] == ["", "with r3_replay", "without plugins"]
    rows = {row[0]: row[1:] for row in cells_of(table)}
    assert rows["rollouts"] == ["10", "20"]
    assert rows["routed differently, of (token, layer)"] == ["0 %", "1.2 %"]


def test_a_table_of_nothing_known() -> None:
    rows = dict(cells_of(summary_table(summarize([]))))
    assert set(rows.values()) == {"0", "–"}


def test_json_has_no_bare_nan() -> None:
    result = RolloutResult(
        rollout=0,
        reward=0.0,
        loss=math.nan,
        routing_different_by_layer={3: math.inf},
        plugin_metrics={"train/x": -math.inf},
    )
    answer = to_json([result, RolloutResult(rollout=1, reward=0.5)])
    read = json.loads(json.dumps(answer, allow_nan=False), parse_constant=pytest.fail)
    assert read == answer
    first, second = read["rollouts"]
    assert (first["loss"], first["routing_different_by_layer"], first["plugin_metrics"]) == (
        "nan",
        {"3": "inf"},
        {"train/x": "-inf"},
    )
    assert (second["rollout"], second["reward"], second["loss"]) == (1, 0.5, None)
    assert read["summary"]["reward_ratio"] == "inf"
    assert read["summary"]["rollouts"] == 2


def test_a_moving_mean_leaves_out_what_is_missing() -> None:
    assert moving_mean([1.0, 3.0, None, 5.0, math.nan], 1) == [2.0, 2.0, 4.0, 5.0, 5.0]
    assert moving_mean([None, None], 1) == [None, None]


# -- the picture ------------------------------------------------------------------------------------------------------


def pixels(file: Path, color: str) -> int:
    """How many pixels of the picture, decoded, have one of the runs' colors."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    return int((abs(imread(file)[..., :3] - to_rgb(color)).max(axis=-1) < 0.02).sum())


SPARSE = [RolloutResult(rollout=0), RolloutResult(rollout=1, reward=0.5), RolloutResult(rollout=2, reward=math.nan)]


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([results_of(100)], id="one run"),
        pytest.param([results_of(30), results_of(40, different=0.0)], id="two runs, one without differences"),
        pytest.param(
            [results_of(30, layers=range(24)), results_of(40, layers=range(24), different=0.02)], id="many layers"
        ),
        pytest.param([results_of(1)], id="one rollout"),
        pytest.param([SPARSE, results_of(3)], id="gaps"),
    ],
)
def test_the_picture_shows_every_run_in_its_color(
    tmp_path: Path, runs: list[list[RolloutResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "DPI", 70)  # quicker
    file, legend_only = tmp_path / "report.png", tmp_path / "legend.png"
    write_report(file, {f"run {index}": results for index, results in enumerate(runs)}, title="The title")
    write_report(legend_only, {f"run {index}": [] for index in range(len(runs))}, title="The title")
    for color in report.COLORS[: len(runs)]:
        assert pixels(file, color) > pixels(legend_only, color) > 0
    assert pixels(file, report.COLORS[len(runs)]) == 0
    assert {each.name for each in tmp_path.iterdir()} == {"report.png", "legend.png"}


def test_the_picture_has_the_size_that_is_documented(tmp_path: Path) -> None:
    imread = pytest.importorskip("matplotlib.image").imread
    file = tmp_path / "report.png"
    write_report(file, {"run": results_of(3)}, title="The title")
    assert imread(file).shape[:2] == (1500, 1350)
    assert "1350 x 1500" in (write_report.__doc__ or "")


def figure_of(monkeypatch: pytest.MonkeyPatch, **runs: Sequence[RolloutResult]) -> Any:
    """The figure itself, instead of its picture."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn: list[Any] = []
    monkeypatch.setattr(figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b"")))
    with tempfile.TemporaryDirectory() as folder:
        write_report(Path(folder) / "report.png", runs, title="The title")
    return drawn[0]


def texts_in(panel: Any) -> list[str]:
    return [text.get_text() for text in panel.texts]


@pytest.mark.parametrize("rest", [0.0001, 0.01], ids=["at the bottom", "at the top"])
def test_layers_are_lines_with_names_that_do_not_meet(monkeypatch: pytest.MonkeyPatch, rest: float) -> None:
    layers = dict.fromkeys(range(7), rest) | {7: 0.01}
    results = [replace(each, routing_different_by_layer=layers) for each in results_of(10)]
    panel = figure_of(monkeypatch, run=results).axes[2]
    assert texts_in(panel) == [f"layer {layer}" for layer in range(8)]
    heights = [text.xy[1] for text in panel.texts]
    low, high = panel.get_ylim()
    gaps = [b - a for a, b in pairwise(heights)]
    assert min(gaps) >= 0.99 * report.LABEL_HEIGHT * (high - low)
    assert low <= min(heights)
    assert max(heights) <= high


def test_many_layers_are_a_band(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        replace(each, routing_different_by_layer={layer: 0.001 * layer for layer in range(20)})
        for each in results_of(10)
    ]
    panel = figure_of(monkeypatch, run=results).axes[2]
    (band,) = panel.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (pytest.approx(0.0), pytest.approx(1.9))
    assert texts_in(panel) == []


def test_a_run_without_differences_is_said_to_be_exactly_so(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = [
        replace(each, logprob_difference=0.0, logprob_difference_p99=0.0, logprob_difference_max=0.0)
        for each in results_of(10, different=0.0)
    ]
    alone = figure_of(monkeypatch, zero=zero)
    assert texts_in(alone.axes[1]) == texts_in(alone.axes[2]) == ["exactly 0 in every rollout"]
    beside = figure_of(monkeypatch, zero=zero, other=results_of(10))
    assert beside.axes[1].get_yscale() == "symlog"
    low, high = beside.axes[1].get_ylim()
    assert low < 0 < 0.2 < high
    assert list(beside.axes[1].get_yticks()) == pytest.approx([0, 0.01, 0.1])
    assert sorted(texts_in(beside.axes[2])) == ["exactly 0", "layer 1", "layer 3"]
    assert figure_of(monkeypatch, other=results_of(10)).axes[1].get_yscale() == "log"


def test_what_was_not_recorded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for results in ([], [RolloutResult(rollout=0)]):
        texts = [texts_in(panel) for panel in figure_of(monkeypatch, run=results).axes]
        assert texts == [
            ["no rewards were recorded"],
            ["no log-prob differences were recorded"],
            ["no routing was recorded"],
        ]


number_or_not = st.none() | st.floats(width=32)
some_results = st.lists(
    st.builds(
        RolloutResult,
        rollout=st.integers(0, 1000),
        reward=number_or_not,
        logprob_difference=st.none() | st.floats(min_value=0, width=32),
        logprob_difference_max=st.none() | st.floats(min_value=0, width=32),
        routing_different=st.none() | st.floats(0, 1),
        routing_different_by_layer=st.dictionaries(st.integers(0, 99), st.floats(0, 1), max_size=10),
    ),
    max_size=4,
    unique_by=lambda result: result.rollout,
).map(lambda results: sorted(results, key=lambda result: result.rollout))


@settings(max_examples=8, deadline=None)
@given(some_results, some_results)
def test_whatever_was_recorded_can_be_drawn(one: list[RolloutResult], other: list[RolloutResult]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "DPI", 20)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "report.png"
            pytest.importorskip("matplotlib")
            write_report(file, {"one": one, "other": other}, title="The title")
            assert file.read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_the_callers_matplotlib_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    before = matplotlib.rcParams.copy()
    figure = figure_of(monkeypatch, run=results_of(3))
    assert matplotlib.rcParams.copy() == before
    assert figure.axes[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    file = tmp_path / "report.png"
    file.write_text("old")

    def mock_full_disk(self: Any, path: Path, **_: Any) -> None:
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", mock_full_disk)
    with pytest.raises(ArgumentError, match=r"report\.png cannot be written") as error:
        write_report(file, {"run": results_of(3)}, title="The title")
    assert "No space left on device" in str(error.value)
    assert file.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["report.png"]


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UpstreamError, match=r'pip install "miles-plugins\[embedded\]"'):
        write_report(tmp_path / "report.png", {"run": results_of(3)}, title="The title")
