"""The FP8 kernels against their reference (on a GPU; without one, in Triton's interpreter, in a process of its own)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENVIRONMENT = {**os.environ, **({} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"})}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=ENVIRONMENT,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_kernels_equal_the_reference() -> None:
    done = python("-m", "tests.fp8_kernels", DEVICE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "32 weights equal, 4 products near, on cpu\n" or DEVICE == "cuda"


REFUSED = """
import torch
from miles_plugins import PluginError
from miles_plugins.fp8_unified import kernels
from miles_plugins.fp8_unified.blockwise import Format, Quantised
from miles_plugins.fp8_unified.bucket import plan

format = Format((32, 32))
ones = torch.ones(32, 64)


def refused(kind, word, call, *arguments):
    try:
        call(*arguments)
    except kind as error:
        assert word in str(error), error
    else:
        raise AssertionError(word)


layout = plan([(32, 64)], format)
bucket = torch.zeros(layout.size, dtype=torch.uint8)
refused(ValueError, "2 weights for a layout of 1", kernels.quantise_into, [ones, ones], bucket, layout, format)
refused(ValueError, "the layout has 0 [32, 64]", kernels.quantise_into, [ones.T], bucket, layout, format)
refused(PluginError, "another block size", kernels.quantise_into, [ones], bucket, layout, Format((64, 64)))
refused(PluginError, "cannot be quantised", kernels.quantise_weights, [ones.half()], format)
refused(PluginError, "cannot be quantised", kernels.quantise_weights, [ones] * 8 + [ones.half()], format)
refused(PluginError, "cannot be quantised", kernels.quantise_rows, ones.half(), format)
x, weight = kernels.quantise_rows(ones, format), kernels.quantise_weights([ones], format)[0]
refused(ValueError, "2 weights and 32 rows", kernels.grouped_linear, x, [weight, weight], [32], format)
refused(ValueError, "31 rows", kernels.grouped_linear, x, [weight], [31], format)
other = Quantised(weight.codes, weight.scale_inv[:, :1])
refused(ValueError, "expected", kernels.grouped_linear, x, [weight, other], [16, 16], format)
"""


def test_what_does_not_fit_together_is_refused() -> None:
    done = python("-c", REFUSED)
    assert done.returncode == 0, done.stderr[-3000:]
