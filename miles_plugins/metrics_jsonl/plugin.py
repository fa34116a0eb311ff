"""Write what slime logs to a file of JSON lines."""

from __future__ import annotations

import json
import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles_plugins import hookimpl


@hookimpl
def register_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--metrics-jsonl", type=Path, default=Path("metrics.jsonl"), help="the file; appended to")


@hookimpl
def configure(args: Namespace) -> None:
    args.metrics_jsonl = args.metrics_jsonl.expanduser().resolve()  # workers have another working directory
    args.metrics_jsonl.parent.mkdir(parents=True, exist_ok=True)


@hookimpl
def metrics_logged(args: Namespace, metrics: Mapping[str, Any], step_key: str) -> None:
    numbers = {name: number for name, value in metrics.items() if (number := json_number(value)) is not None}
    line = json.dumps({"time": time.time(), "step_key": step_key, "metrics": numbers})
    with args.metrics_jsonl.open("a") as file:
        file.write(line + "\n")  # one short write: lines of several processes do not mix


def json_number(value: Any) -> float | str | None:
    """What JSON can hold: a number, or the name of one that it cannot (nan, inf); None for what is no single number."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else str(number)
