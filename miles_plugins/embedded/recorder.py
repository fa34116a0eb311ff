"""Write what a run of the embedded host measures: metrics.jsonl, as the plugin metrics_jsonl does, and TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from miles_plugins.console import read_metrics
from miles_plugins.embedded.results import rollout_of
from miles_plugins.errors import ArgumentError, UpstreamError
from miles_plugins.metrics_jsonl.plugin import json_number

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class Recorder:
    """A context manager that records a run in its folder.

    metrics.jsonl holds complete lines only, whatever happens: a reader never takes half a number for a whole one.
    """

    def __init__(self, folder: Path, resume_from: int | None = None) -> None:
        """`resume_from`: the first rollout to be done again; what was recorded of it and of later ones is dropped."""
        self.file = folder / METRICS
        self._events = folder / TENSORBOARD
        self._resume_from = resume_from
        self._open = ExitStack()

    def __enter__(self) -> Recorder:
        with writing(self.file), ExitStack() as opening:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self._resume_from is not None and self.file.exists():
                _rewrite(self.file, self._resume_from)
            self._output = opening.enter_context(open(self.file, "ab", buffering=0))
            _cut_half_a_line(self.file, self._output)
            with writing(self._events):
                self._board = _summary_writer(self._events, afresh=self._resume_from is not None)
                opening.callback(self._board.close)
                if self._resume_from is not None:  # events cannot be dropped from a file of TensorBoard's
                    for line in read_metrics(self.file):
                        step = int(line["metrics"].pop(line["step_key"]))
                        self._write_events(line["metrics"], step, line["time"])
                    self._board.flush()
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with writing(self._events):
                self._open.close()
        else:
            with suppress(OSError):  # the first error says more
                self._open.close()

    def log(self, metrics: Mapping[str, float], step_key: str) -> None:
        """Record one step's metrics; `metrics[step_key]` is the step. Raises ArgumentError if it cannot be written."""
        now, step = time.time(), int(metrics[step_key])
        numbers = {name: number for name, value in metrics.items() if (number := json_number(value)) is not None}
        line = json.dumps({"time": now, "step_key": step_key, "metrics": numbers}) + "\n"
        with writing(self.file):
            _write_all_or_nothing(self._output, line.encode())
        with writing(self._events):
            self._write_events({name: float(number) for name, number in numbers.items() if name != step_key}, step, now)
            self._board.flush()  # a full disk shows here, not in a thread

    def _write_events(self, metrics: Mapping[str, float], step: int, when: float) -> None:
        for name, value in metrics.items():
            self._board.add_scalar(name, value, global_step=step, walltime=when)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn what the operating system refuses into an ArgumentError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(
            f"{file} cannot be written",
            {"reason": error.strerror or error},
            "free space or choose another --run-folder; the lines written so far are complete",
        ) from error


def _write_all_or_nothing(output: FileIO, line: bytes) -> None:
    """Append a line; what was written of one that does not fit is cut off again."""
    before = os.fstat(output.fileno()).st_size
    left = memoryview(line)
    try:
        while left:  # a disk that fills up takes a part first, and refuses only the rest
            left = left[output.write(left) or 0 :]
    except BaseException:  # an interruption can come between the parts
        with suppress(OSError):
            output.truncate(before)
        raise


def _cut_half_a_line(file: Path, output: FileIO) -> None:
    """A run that was killed may have left one; the next line must not be appended to it."""
    content = file.read_bytes() if file.is_file() else b""  # /dev/full has no end
    if content and not content.endswith(b"\n"):
        output.truncate(content.rfind(b"\n") + 1)


def _rewrite(file: Path, resume_from: int) -> None:
    """Drop the rollouts from this one on, their train steps, and half a line; all of it or nothing."""
    kept = []
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            continue
        try:
            entry = json.loads(line)
            rollout = rollout_of(entry["step_key"], entry["metrics"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(
                f"{file} cannot be read as metrics of a run, so it cannot be continued",
                {"line": line[:100].decode(errors="replace"), "found": f"{type(error).__name__}: {error}"},
                "choose another --run-folder",
            ) from error
        if rollout is None or rollout < resume_from:
            kept.append(line)
    write_atomically(file, lambda temporary: temporary.write_bytes(b"".join(kept)))


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place, then put there: it is never seen half written. Raises OSError."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _summary_writer(folder: Path, *, afresh: bool) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UpstreamError(
            "TensorBoard's event files cannot be written",
            {"missing": error.name or error},
            'pip install "miles-plugins[embedded]"',
        ) from error
    if afresh:
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()
    return SummaryWriter(str(folder))
