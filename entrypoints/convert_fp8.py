"""`miles-plugins convert-fp8`: a checkpoint's linear layers in FP8, in tiles of 128 x 128."""

from __future__ import annotations

from pathlib import Path

import click

from miles_plugins.checkpoints import CONFIG, read_json
from miles_plugins.entrypoints.conversions import FROM, TO, run, sizes
from miles_plugins.fp8_unified import converter
from miles_plugins.fp8_unified.blockwise import Format
from miles_plugins.fp8_unified.checkpoint import BLOCK
from miles_plugins.fp8_unified.selection import kind

layers = click.IntRange(min=0)


@click.command("convert-fp8")
@FROM
@TO
@click.option(
    "--scale",
    type=click.Choice(["float32", "power-of-two"]),
    default="float32",
    show_default=True,
    help="What the scales can be: on Hopper float32, on Blackwell powers of two (ue8m0).",
)
@click.option(
    "--keep-bf16-layers-at-start", "at_start", type=layers, default=0, metavar="N", help="First layers that stay."
)
@click.option("--keep-bf16-layers-at-end", "at_end", type=layers, default=0, metavar="N", help="Last ones; not MTP's.")
def convert_fp8(source: Path, target: Path, scale: str, at_start: int, at_end: int) -> None:
    """Quantise a BF16 checkpoint's linear layers to FP8: experts, MLPs and attention, as SGLang serves them.

    Needs no GPU, and the memory of about one file that it writes. Stopped, the same command goes on.
    """
    format = Format(BLOCK, "power_of_two" if scale == "power-of-two" else "float32")
    done = run(
        "quantising",
        lambda progress: converter.convert_to_fp8(
            source, target, format, progress, bf16_at_start=at_start, bf16_at_end=at_end
        ),
    )
    click.echo(f"{done.weights} weights quantised in tiles of 128 x 128, with {scale} scales")
    click.echo(sizes(done))
    if at_start + at_end:
        click.echo(f"in TransformerEngine's FP8 (--fp8-train te) they are {_megatrons(at_start, at_end)}")
        left = read_json(target / CONFIG)["quantization_config"]["modules_to_not_convert"]
        if any(kind(module) == "experts" for module in left):
            click.echo("note: SGLang serves experts in BF16 beside FP8 ones since 0.5.12; 0.5.9 cannot")
    click.echo(f"next: train on it, `slime-train --plugins fp8 --hf-checkpoint {target} …`, or serve it with SGLang")


def _megatrons(at_start: int, at_end: int) -> str:
    """Megatron's flags for the same layers."""
    return f"--first-last-layers-bf16 --num-layers-at-start-in-bf16 {at_start} --num-layers-at-end-in-bf16 {at_end}"
