"""`miles-plugins convert-bf16`: the weights of an INT4 or FP8 checkpoint as the values that an engine computes with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from miles_plugins.checkpoints import CONFIG, quantization_config, read_json
from miles_plugins.conversion import Converted, Progress
from miles_plugins.entrypoints.conversions import FROM, TO, run, sizes
from miles_plugins.errors import PluginError
from miles_plugins.fp8_unified import converter as fp8
from miles_plugins.int4_qat import converter as int4

CONVERTERS = {"compressed-tensors": (int4.convert_to_bf16, "convert-int4"), "fp8": (fp8.convert_to_bf16, "convert-fp8")}
"""By the `quant_method` of a checkpoint: what takes it, and the command that makes such a checkpoint."""


@click.command("convert-bf16")
@FROM
@TO
def convert_bf16(source: Path, target: Path) -> None:
    """Turn an INT4 (compressed-tensors) or FP8 checkpoint into BF16: the values that an engine computes with.

    Needs no GPU, and the memory of about one file that it writes. Stopped, the same command goes on.
    """
    again = ""

    def work(progress: Progress) -> Converted:
        nonlocal again
        convert, again = CONVERTERS[_method(source)]
        return convert(source, target, progress)

    done = run("unpacking", work)
    click.echo(f"{done.weights} weights unpacked")
    click.echo(sizes(done))
    click.echo(f"next: load {target} as any BF16 checkpoint, or convert it again with `miles-plugins {again}`")


def _method(source: Path) -> str:
    """How a checkpoint is quantised. Raises PluginError where it is not, or in another way than these."""
    quantization = quantization_config(read_json(source / CONFIG))
    if quantization is None:
        expected = {"expected": f"quantization_config in {CONFIG}"}
        raise PluginError(f"{source} is not quantised", expected, "use it as it is")
    found = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if not isinstance(found, str) or found not in CONVERTERS:
        raise PluginError(
            f"{source} is quantised in a way that cannot be undone here",
            {"quant_method": found or "missing", "expected": " or ".join(CONVERTERS)},
            "take the BF16 checkpoint of the model's publisher",
        )
    return found
