"""`miles-plugins convert-int4`: a checkpoint's weights packed into four bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from miles_plugins.entrypoints.conversions import FROM, TO, run, sizes
from miles_plugins.int4_qat import converter
from miles_plugins.int4_qat.converter import MODULES
from miles_plugins.int4_qat.grid import Grid


@click.command("convert-int4")
@FROM
@TO
@click.option(
    "--group-size", type=click.Choice(["32", "64", "128"]), default="128", show_default=True, help="Weights to a scale."
)
@click.option(
    "--modules",
    multiple=True,
    default=["experts"],
    show_default=True,
    metavar="NAME[,NAME…]",
    help=f"What to pack: {', '.join(MODULES)}.",
)
@click.option("--snapped", is_flag=True, help="Make the codes with the rounded scale, as Kimi-K2 Thinking's are.")
def convert_int4(source: Path, target: Path, group_size: str, modules: Sequence[str], snapped: bool) -> None:
    """Pack a BF16 checkpoint's experts into INT4 (compressed-tensors).

    Needs no GPU, and the memory of about one file that it writes. Stopped, the same command goes on.
    """
    grid = Grid(int(group_size), "snapped" if snapped else "stock")
    chosen = list(dict.fromkeys(name.strip() for value in modules for name in value.split(",") if name.strip()))
    done = run(
        "packing", lambda progress: converter.convert_to_int4(source, target, grid, progress=progress, modules=chosen)
    )
    click.echo(f"{done.weights} weights packed in groups of {grid.group_size}: {', '.join(chosen)}")
    click.echo(sizes(done))
    flags = ["--plugins int4", f"--hf-checkpoint {target}"]
    if snapped:
        flags.append("--int4-grid snapped")
    if chosen == ["experts"]:
        click.echo(f"next: train on it, `slime-train {' '.join(flags)} …`, or serve it with SGLang")
        return
    flags.append(f"--int4-modules {','.join(chosen)}")
    click.echo(f"next: serve it with SGLang, or train on the CPU, `slime-train {' '.join(flags)} …`")
    dense = ", ".join(name for name in chosen if name != "experts")
    click.echo(
        f"note: SGLang on a GPU cannot give dense INT4 layers ({dense}) new weights; to train there, pack experts only"
    )
