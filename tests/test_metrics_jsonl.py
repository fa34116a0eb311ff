"""What slime logs, as lines of JSON in a file."""

from __future__ import annotations

import argparse
import json
import math
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest

from miles_plugins.metrics_jsonl import plugin


@pytest.fixture
def log(tmp_path):
    """Log metrics to a file, and read the file."""
    args = Namespace(metrics_jsonl=tmp_path / "metrics.jsonl")

    def one(metrics: dict, step_key: str = "train/step") -> list[dict]:
        plugin.metrics_logged(args=args, metrics=metrics, step_key=step_key)
        return read(args.metrics_jsonl)

    return one


def read(file: Path) -> list[dict]:
    """As any other program reads JSON: NaN and Infinity are not part of it."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


# -- the flag --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"), [([], Path("metrics.jsonl")), (["--metrics-jsonl", "~/m/x.jsonl"], Path("~/m/x.jsonl"))]
)
def test_the_flag(argv, expected):
    parser = argparse.ArgumentParser()
    plugin.register_arguments(parser.add_argument_group("plugin metrics_jsonl"))
    assert parser.parse_args(argv).metrics_jsonl == expected


def test_the_file_is_the_same_one_for_every_process(tmp_path, monkeypatch):
    """Ray's workers have another working directory than the driver."""
    monkeypatch.chdir(tmp_path)
    args = Namespace(metrics_jsonl=Path("new/folder/metrics.jsonl"))
    plugin.configure(args)
    assert args.metrics_jsonl == tmp_path / "new" / "folder" / "metrics.jsonl"
    assert args.metrics_jsonl.parent.is_dir()
    plugin.configure(args)  # the folder may be there


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = Namespace(metrics_jsonl=Path("~/metrics.jsonl"))
    plugin.configure(args)
    assert args.metrics_jsonl == tmp_path / "metrics.jsonl"


# -- the lines -------------------------------------------------------------------------------------------------------


def test_one_line_a_set_of_metrics(log):
    before = time.time()
    log({"train/loss": 0.5, "train/step": 3})
    first, second = log({"rollout/reward": 1, "rollout/step": 4}, "rollout/step")
    assert before <= first.pop("time") <= second.pop("time") <= time.time()
    assert first == {"step_key": "train/step", "metrics": {"train/loss": 0.5, "train/step": 3.0}}
    assert second == {"step_key": "rollout/step", "metrics": {"rollout/reward": 1.0, "rollout/step": 4.0}}


def test_an_earlier_runs_lines_stay(log, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step_key": "old"}\n')
    assert [line["step_key"] for line in log({"train/step": 1})] == ["old", "train/step"]


def test_numbers_of_every_sort_are_kept(log):
    metrics = {
        "int": 2,
        "bool": True,
        "float32": numpy.float32(0.5),
        "int64": numpy.int64(7),
        "array": numpy.array(1.5),
    }
    assert log(metrics)[0]["metrics"] == {"int": 2.0, "bool": 1.0, "float32": 0.5, "int64": 7.0, "array": 1.5}


def test_tensors_of_one_number_are_kept(log):
    torch = pytest.importorskip("torch")
    metrics = {
        "loss": torch.tensor(0.25),
        "grad": torch.tensor([2.0]),
        "half": torch.tensor(1.5).half(),
    }
    assert log(metrics)[0]["metrics"] == {"loss": 0.25, "grad": 2.0, "half": 1.5}


def test_what_is_no_number_is_left_out(log):
    metrics = {"step": 1, "text": "a\nb", "list": [1.0], "none": None, "table": object(), "date": {"a": 1}}
    assert log(metrics)[0]["metrics"] == {"step": 1.0}


def test_several_numbers_are_left_out(log):
    """Logging must not end the training."""
    torch = pytest.importorskip("torch")
    metrics = {"step": 1, "vector": torch.ones(3), "array": numpy.ones(3), "empty": torch.empty(0)}
    assert log(metrics)[0]["metrics"] == {"step": 1.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_line_is_json_whatever_the_loss(log, value):
    (line,) = log({"train/loss": value, "train/step": 3})
    assert line["metrics"]["train/step"] == 3.0
    assert not isinstance(line["metrics"].get("train/loss"), float)


def test_lines_of_several_writers_do_not_mix(tmp_path):
    args = Namespace(metrics_jsonl=tmp_path / "metrics.jsonl")
    metrics = {f"metric/{number:04}": float(number) for number in range(1000)}  # longer than a buffer

    def write(writer: int) -> None:
        for step in range(5):
            plugin.metrics_logged(args=args, metrics={**metrics, "writer": writer, "step": step}, step_key="step")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    lines = [line["metrics"] for line in read(args.metrics_jsonl)]
    assert sorted((line["writer"], line["step"]) for line in lines) == [(w, s) for w in range(8) for s in range(5)]
    assert all(len(line) == 1002 for line in lines)
