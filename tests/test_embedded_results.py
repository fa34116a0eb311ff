"""What a run of the embedded host records, and what is read back from it."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins.embedded.recorder import METRICS, TENSORBOARD, Recorder, write_atomically
from miles_plugins.embedded.results import RolloutResult, read_results, summarize
from miles_plugins.errors import ArgumentError, UpstreamError


def rollout_line(rollout: int, **metrics: Any) -> dict[str, Any]:
    named = {f"rollout/{name}": value for name, value in metrics.items()}
    return {"time": 1.0, "step_key": "rollout/step", "metrics": {"rollout/step": rollout, **named}}


def train_line(step: int, rollout: int | None, **metrics: Any) -> dict[str, Any]:
    named = {f"train/{name}": value for name, value in metrics.items()}
    join = {} if rollout is None else {"train/rollout": rollout}
    return {"time": 2.0, "step_key": "train/step", "metrics": {"train/step": step, **join, **named}}


def read(tmp_path: Path, *lines: dict[str, Any], end: str = "") -> list[RolloutResult]:
    file = tmp_path / METRICS
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return read_results(file)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_every_number_of_a_rollout_is_read(tmp_path: Path) -> None:
    generated = rollout_line(
        4,
        raw_reward=0.5,
        truncated_ratio=0.25,
        response_lengths=7.5,
        tokens=900,
        seconds=2.0,
        zero_variance_groups=0.125,
    )
    difference = "train_rollout_logprob_abs_diff"
    trained = train_line(
        9,
        4,
        loss=-0.5,
        pg_loss=1,
        pg_clipfrac=1,
        grad_norm=1.5,
        entropy_loss=1,
        seconds=1.0,
        **{difference: 0.001, f"{difference}_p99": 0.01, f"{difference}_max": 0.1},
        routing_different=0.02,
        routing_different_layer_11=0.03,
        routing_different_layer_2=0.01,
        **{"r3/coverage": 1.0},
    )
    (result,) = read(tmp_path, generated, trained)
    assert result == RolloutResult(
        rollout=4,
        reward=0.5,
        truncated=0.25,
        response_length=7.5,
        tokens=900.0,
        seconds=3.0,
        zero_variance_groups=0.125,
        loss=-0.5,
        grad_norm=1.5,
        logprob_difference=0.001,
        logprob_difference_p99=0.01,
        logprob_difference_max=0.1,
        routing_different=0.02,
        routing_different_by_layer={2: 0.01, 11: 0.03},
        plugin_metrics={"train/r3/coverage": 1.0},
    )
    assert list(result.routing_different_by_layer) == [2, 11]
    assert result.tokens_per_second == 300.0


def test_the_steps_of_a_rollout_are_averaged_their_seconds_added_and_the_largest_maximum_taken(tmp_path: Path) -> None:
    difference = "train_rollout_logprob_abs_diff"
    steps = [
        train_line(step, 1, loss=loss, seconds=0.5, **{f"{difference}_max": largest, difference: 2 * loss})
        for step, loss, largest in [(2, 1.0, 0.25), (3, 2.0, 0.75)]
    ]
    other = train_line(1, 0, loss=100.0)
    _, result = read(tmp_path, rollout_line(0), rollout_line(1, seconds=2.0), other, *steps)
    assert (result.loss, result.logprob_difference) == (1.5, 3.0)
    assert (result.logprob_difference_max, result.seconds) == (0.75, 3.0)


def test_without_train_rollout_it_is_one_step_a_rollout(tmp_path: Path) -> None:
    results = read(
        tmp_path, rollout_line(0), train_line(0, None, loss=1.0), rollout_line(1), train_line(1, None, loss=2)
    )
    assert [(each.rollout, each.loss) for each in results] == [(0, 1.0), (1, 2.0)]


def test_what_was_not_logged_is_none(tmp_path: Path) -> None:
    generated_only, trained_only = read(tmp_path, train_line(0, 3, loss=1.0), rollout_line(2, raw_reward=0.5))
    assert generated_only == RolloutResult(rollout=2, reward=0.5)
    assert trained_only == RolloutResult(rollout=3, loss=1.0)


def test_a_number_that_is_none_stays_visible(tmp_path: Path) -> None:
    names = ["loss", "train_rollout_logprob_abs_diff_max"]
    steps = [train_line(step, 0, **dict.fromkeys(names, value)) for step, value in enumerate([1.0, "nan", 2.0])]
    (result,) = read(tmp_path, rollout_line(0, raw_reward="-inf"), *steps)
    assert result.reward == -math.inf
    assert result.loss is not None
    assert result.logprob_difference_max is not None
    assert math.isnan(result.loss)
    assert math.isnan(result.logprob_difference_max)


def test_a_rollout_that_was_done_again_counts_as_it_was_done_last(tmp_path: Path) -> None:
    """Also when the second time has fewer train steps, and other metrics."""
    results = read(
        tmp_path,
        *(rollout_line(0, raw_reward=0.1), train_line(0, 0, loss=1.0)),
        *(rollout_line(1, raw_reward=0.2, truncated=1.0), train_line(1, 1, loss=1.0), train_line(2, 1, grad_norm=9.0)),
        *(rollout_line(1, raw_reward=0.3), train_line(1, 1, loss=5.0)),
    )
    assert results[0] == RolloutResult(rollout=0, reward=0.1, loss=1.0)
    assert results[1:] == [RolloutResult(rollout=1, reward=0.3, loss=5.0)]


def test_a_train_step_that_was_done_again_counts_once(tmp_path: Path) -> None:
    (result,) = read(tmp_path, train_line(0, 0, loss=1.0, grad_norm=9.0), train_line(0, 0, loss=3.0))
    assert result == RolloutResult(rollout=0, loss=3.0)


def test_a_step_may_be_logged_in_several_lines(tmp_path: Path) -> None:
    """A plugin's metrics may come apart from the host's."""
    lines = [rollout_line(0, raw_reward=0.5), rollout_line(0, **{"p/x": 1.0}), train_line(0, 0, loss=2.0)]
    (result,) = read(tmp_path, *lines, train_line(0, 0, **{"r3/coverage": 1.0}))
    assert (result.reward, result.loss) == (0.5, 2.0)
    assert result.plugin_metrics == {"rollout/p/x": 1.0, "train/r3/coverage": 1.0}


@pytest.mark.parametrize("end", ["{", '{"time": 1.0, "step_key": "rollout/step", "metrics": {"rollout/step": 1}}'])
def test_half_a_line_at_the_end_is_left_out(tmp_path: Path, end: str) -> None:
    """Also one that lacks only its end: nobody knows that nothing more was to come."""
    assert len(read(tmp_path, rollout_line(0), end=end)) == 1


def test_no_file_is_no_results(tmp_path: Path) -> None:
    assert read_results(tmp_path / "absent") == []


@pytest.mark.parametrize("content", ["no json\n", "[]\n", '{"step_key": "rollout/step", "metrics": {}}\n', "5\n"])
def test_another_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    file = tmp_path / "other.txt"
    file.write_text(content)
    with pytest.raises(ArgumentError, match=r"other\.txt cannot be read"):
        read_results(file)


# -- the summary ------------------------------------------------------------------------------------------------------


def test_the_summary() -> None:
    results = [
        RolloutResult(
            rollout=index,
            reward=0.1 if index < 2 else 0.8 if index >= 18 else 0.5,
            tokens=100.0,
            seconds=0.5,
            logprob_difference=0.001 * (1 + index % 2),
            logprob_difference_p99=0.01,
            logprob_difference_max=0.5 if index == 7 else 0.1,
            routing_different=0.02,
            zero_variance_groups=1.0 if index in (3, 4) else 0.9,
        )
        for index in range(20)
    ]
    summary = summarize(results)
    assert summary.rollouts == 20
    assert (summary.first_reward, summary.last_reward) == (pytest.approx(0.1), pytest.approx(0.8))
    assert summary.reward_ratio == pytest.approx(8.0)
    assert summary.logprob_difference == pytest.approx(0.0015)
    assert summary.logprob_difference_p99 == pytest.approx(0.01)
    assert summary.logprob_difference_max == 0.5
    assert summary.routing_different == pytest.approx(0.02)
    assert (summary.tokens_per_second, summary.seconds) == (200.0, 10.0)
    assert summary.rollouts_without_gradient == 2


@pytest.mark.parametrize(
    ("first", "last", "ratio"), [(0.0, 0.5, math.inf), (0.0, 0.0, None), (None, 0.5, None), (0.5, 0.0, 0.0)]
)
def test_the_ratio_of_rewards_where_there_is_none(first: float | None, last: float, ratio: float | None) -> None:
    results = [RolloutResult(rollout=0, reward=first), RolloutResult(rollout=1, reward=last)]
    assert summarize(results).reward_ratio == ratio


def test_a_run_without_numbers_has_a_summary() -> None:
    for results in ([], [RolloutResult(rollout=0)]):
        summary = summarize(results)
        assert summary.rollouts == len(results)
        assert summary.first_reward is summary.seconds is summary.tokens_per_second is None
        assert summary.logprob_difference_max is None


# -- recording --------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    pytest.importorskip("tensorboard")
    with Recorder(tmp_path / "run") as recorder:
        yield recorder


@contextmanager
def recording(folder: Path, resume_from: int | None = None) -> Iterator[Recorder]:
    """A recorder whose TensorBoard writer, which is slow to import and to start, is a mock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miles_plugins.embedded.recorder._summary_writer", lambda *_, **__: MockSummaryWriter())
        with Recorder(folder, resume_from) as recorder:
            yield recorder


class MockSummaryWriter:
    def add_scalar(self, tag: str, value: float, global_step: int, walltime: float) -> None:
        assert isinstance(global_step, int)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show: the steps and values of each name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / TENSORBOARD)).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"reward": finite | st.just(math.inf), "losses": st.lists(finite, max_size=3), "layers": st.lists(finite)}
        ),
        max_size=5,
    )
)
def test_what_is_recorded_is_read_back(rollouts: list[dict[str, Any]]) -> None:
    step = 0
    with tempfile.TemporaryDirectory() as folder:
        with recording(Path(folder)) as recorder:
            for index, rollout in enumerate(rollouts):
                recorder.log({"rollout/step": index, "rollout/raw_reward": rollout["reward"]}, "rollout/step")
                layers = {f"train/routing_different_layer_{n}": value for n, value in enumerate(rollout["layers"])}
                for loss in rollout["losses"]:
                    metrics = {"train/step": step, "train/rollout": index, "train/loss": loss, **layers}
                    recorder.log(metrics, "train/step")
                    step += 1
        results = read_results(Path(folder) / METRICS)
    assert [each.rollout for each in results] == list(range(len(rollouts)))
    for result, rollout in zip(results, rollouts, strict=True):
        losses = rollout["losses"]
        assert result.reward == rollout["reward"]
        assert result.loss == (math.fsum(losses) / len(losses) if losses else None)
        expected = dict(enumerate(rollout["layers"])) if losses else {}
        assert result.routing_different_by_layer == pytest.approx(expected)


def test_both_files_hold_what_was_logged(recorder: Recorder) -> None:
    folder = recorder.file.parent
    recorder.log({"rollout/step": 3, "rollout/raw_reward": 0.5, "rollout/text": "no number"}, "rollout/step")
    recorder.log({"train/step": 7, "train/rollout": 3, "train/loss": math.nan}, "train/step")
    first, second = map(json.loads, recorder.file.read_text().splitlines())  # while it runs: `tail -f` shows it
    assert first["metrics"] == {"rollout/step": 3.0, "rollout/raw_reward": 0.5}
    assert second["metrics"] == {"train/step": 7.0, "train/rollout": 3.0, "train/loss": "nan"}
    assert (first["step_key"], second["step_key"]) == ("rollout/step", "train/step")
    shown = events(folder)
    assert shown["rollout/raw_reward"] == [(3, 0.5)]
    assert shown["train/rollout"] == [(7, 3.0)]
    assert math.isnan(shown["train/loss"][0][1])


def test_resuming_drops_what_is_done_again_in_both_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Recorder(tmp_path) as recorder:
        for rollout in range(3):
            recorder.log({"rollout/step": rollout, "rollout/raw_reward": rollout}, "rollout/step")
            for step in (2 * rollout, 2 * rollout + 1):
                recorder.log({"train/step": step, "train/rollout": rollout, "train/loss": step}, "train/step")
        recorder.log({"eval/step": 2, "eval/score": 1}, "eval/step")
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"time": 1')
    with Recorder(tmp_path, resume_from=1) as recorder:
        assert [each.rollout for each in read_results(recorder.file)] == [0]
        recorder.log({"rollout/step": 1, "rollout/raw_reward": 0.25}, "rollout/step")
    assert [each.reward for each in read_results(tmp_path / METRICS)] == [0.0, 0.25]
    assert read_results(tmp_path / METRICS)[0].loss == 0.5
    shown = events(tmp_path)
    assert shown["rollout/raw_reward"] == [(0, 0.0), (1, 0.25)]
    assert shown["train/loss"] == [(0, 0.0), (1, 1.0)]
    assert shown["eval/score"] == [(2, 1.0)]  # not about a rollout


def test_resuming_where_nothing_was_recorded(tmp_path: Path) -> None:
    with recording(tmp_path, resume_from=5) as recorder:
        recorder.log({"rollout/step": 5}, "rollout/step")
    assert [each.rollout for each in read_results(tmp_path / METRICS)] == [5]


def test_resuming_changes_nothing_in_a_file_it_cannot_read(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    file.write_text("my notes\n")
    with pytest.raises(ArgumentError, match="cannot be continued"), recording(tmp_path, resume_from=0):
        pass
    assert file.read_text() == "my notes\n"
    assert [each.name for each in tmp_path.iterdir()] == [METRICS]


def test_half_a_line_of_a_killed_run_is_not_appended_to(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(json.dumps(rollout_line(0)) + '\n{"time": 1.0, "st')
    with recording(tmp_path) as recorder:
        recorder.log({"rollout/step": 1}, "rollout/step")
    assert [each.rollout for each in read_results(tmp_path / METRICS)] == [0, 1]


def test_an_exception_closes_everything_and_is_not_hidden(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recorder = Recorder(tmp_path)

    def run() -> None:
        with recorder:
            recorder.log({"rollout/step": 0, "rollout/raw_reward": 0.5}, "rollout/step")
            raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        run()
    assert recorder._output.closed
    assert events(tmp_path)["rollout/raw_reward"] == [(0, 0.5)]


def test_a_step_without_its_number_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with recording(tmp_path) as recorder, pytest.raises(KeyError, match="train/step"):
        recorder.log({"rollout/step": 0}, "train/step")
    assert recorder.file.read_bytes() == b""


# -- when it cannot be recorded ---------------------------------------------------------------------------------------


class MockFullDisk:
    """A file that takes so many bytes more, then refuses as a full disk does; the rest is the real file's."""

    def __init__(self, file: Any, room: int) -> None:
        self._file = file
        self._room = room

    def write(self, data: memoryview) -> int:
        taken = min(self._room, len(data))
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room -= taken
        return int(self._file.write(data[:taken]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_disk_that_fills_up_within_a_line_leaves_no_half_of_it(tmp_path: Path, room: int) -> None:
    with recording(tmp_path) as recorder:
        recorder.log({"rollout/step": 0}, "rollout/step")
        before = recorder.file.read_bytes()
        output = recorder._output
        recorder._output = MockFullDisk(output, room)  # type: ignore[assignment]
        with pytest.raises(ArgumentError) as error:
            recorder.log({"rollout/step": 1}, "rollout/step")
        assert recorder.file.read_bytes() == before
        recorder._output = output  # space was freed
        recorder.log({"rollout/step": 1}, "rollout/step")
    assert [each.rollout for each in read_results(tmp_path / METRICS)] == [0, 1]
    assert f"{tmp_path / METRICS} cannot be written" in str(error.value)
    assert "No space left on device" in str(error.value)
    assert "free space or choose another --run-folder; the lines written so far are complete" in str(error.value)


def test_a_real_limit_within_a_line(tmp_path: Path) -> None:
    """The kernel itself writes a part of the line here, and refuses the rest."""
    pytest.importorskip("resource")
    program = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_embedded_results import recording
from miles_plugins.errors import ArgumentError
resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))
try:
    with recording(Path(sys.argv[1])) as recorder:
        for rollout in range(10):
            recorder.log({"rollout/step": rollout, "rollout/raw_reward": 0.5}, "rollout/step")
except ArgumentError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "File too large" in done.stdout, done.stderr
    content = (tmp_path / METRICS).read_bytes()
    assert 100 < len(content) < 250
    assert content.endswith(b"\n")
    assert [each.reward for each in read_results(tmp_path / METRICS)] == [0.5, 0.5]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / METRICS).symlink_to("/dev/full")
    with recording(tmp_path) as recorder, pytest.raises(ArgumentError, match="No space left on device"):
        recorder.log({"rollout/step": 0}, "rollout/step")


def test_a_folder_that_cannot_be_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"file/run/metrics\.jsonl cannot be written") as error:
        Recorder(tmp_path / "file" / "run").__enter__()
    assert "Not a directory" in str(error.value)


def test_tensorboards_files_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / TENSORBOARD).touch()
    with pytest.raises(ArgumentError, match=f"{TENSORBOARD} cannot be written"):
        Recorder(tmp_path).__enter__()


def test_a_disk_that_is_full_for_tensorboard_is_an_error_at_once(tmp_path: Path) -> None:
    """TensorBoard writes in a thread: only a flush brings its error here."""

    class MockFullBoard(MockSummaryWriter):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with recording(tmp_path) as recorder:
        recorder._board = MockFullBoard()  # type: ignore[assignment]
        with pytest.raises(ArgumentError, match=f"{TENSORBOARD} cannot be written"):
            recorder.log({"rollout/step": 0}, "rollout/step")
    assert len(read_results(tmp_path / METRICS)) == 1


def test_without_tensorboard_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UpstreamError, match=r'pip install "miles-plugins\[embedded\]"'):
        Recorder(tmp_path).__enter__()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("old")

    def half(path: Path) -> None:
        path.write_text("ne")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        write_atomically(file, half)
    assert file.read_text() == "old"
    write_atomically(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]
