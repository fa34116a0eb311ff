"""`miles-plugins convert-int4` and `convert-bf16`: a checkpoint's weights packed into four bits, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from miles_plugins.console import Interrupted, interruptible
from miles_plugins.errors import PluginError
from miles_plugins.int4_qat import converter
from miles_plugins.int4_qat.converter import MODULES, Converted
from miles_plugins.int4_qat.grid import Grid

FROM = click.option(
    "--from", "source", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR"
)
TO = click.option("--to", "target", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR")


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

    Needs no GPU, and the memory of about one file of the checkpoint. Stopped, the same command goes on.
    """
    grid = Grid(int(group_size), "snapped" if snapped else "stock")
    chosen = list(dict.fromkeys(name.strip() for value in modules for name in value.split(",") if name.strip()))
    done = _run(
        "packing", lambda progress: converter.convert_to_int4(source, target, grid, progress=progress, modules=chosen)
    )
    click.echo(f"{done.weights} weights packed in groups of {grid.group_size}: {', '.join(chosen)}")
    click.echo(_sizes(done, done.bytes_before / done.bytes_after, "smaller"))
    flags = ["--plugins int4", f"--hf-checkpoint {target}"]
    if snapped:
        flags.append("--int4-grid snapped")
    if chosen != ["experts"]:
        flags.append(f"--int4-modules {' '.join(chosen)}")
    click.echo(f"next: train on it, `slime-train {' '.join(flags)} …`, or serve it with SGLang")


@click.command("convert-bf16")
@FROM
@TO
def convert_bf16(source: Path, target: Path) -> None:
    """Unpack an INT4 checkpoint (compressed-tensors) into BF16: the values that an engine computes with.

    Needs no GPU, and the memory of about four files of the checkpoint. Stopped, the same command goes on.
    """
    done = _run("unpacking", lambda progress: converter.convert_to_bf16(source, target, progress))
    click.echo(f"{done.weights} weights unpacked")
    click.echo(_sizes(done, done.bytes_after / done.bytes_before, "larger"))
    click.echo(f"next: load {target} as any BF16 checkpoint, or pack it again with `miles-plugins convert-int4`")


def _run(doing: str, work: Callable[[converter.Progress], Converted]) -> Converted:
    """Do the work under a bar on stderr, and say what went wrong."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal)
    try:
        with interruptible(), bar:
            task = bar.add_task(doing, total=None)
            return work(lambda done, total: bar.update(task, completed=done, total=total))
    except PluginError as error:
        raise click.ClickException(str(error)) from error
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is not installed: run this where slime runs") from error
    except Interrupted as interruption:
        click.echo("Stopped. What is finished is kept: the same command goes on from here.", err=True)
        sys.exit(128 + interruption.signal_number)


def _sizes(done: Converted, factor: float, word: str) -> str:
    return f"{done.bytes_before / 1e9:.1f} GB before, {done.bytes_after / 1e9:.1f} GB after ({factor:.2f} times {word})"
