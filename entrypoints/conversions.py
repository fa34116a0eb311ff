"""What the commands that convert a checkpoint share: their options, a bar of progress, and what they say at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from miles_plugins import conversion
from miles_plugins.console import Interrupted, interruptible
from miles_plugins.conversion import Converted
from miles_plugins.errors import PluginError

FROM = click.option(
    "--from", "source", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR"
)
TO = click.option("--to", "target", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR")


def run(doing: str, work: Callable[[conversion.Progress], Converted]) -> Converted:
    """Do the work under a bar on stderr, and say what went wrong."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal)
    try:
        with interruptible(), bar:
            task = bar.add_task(doing, total=None)
            done = work(lambda done, total: bar.update(task, completed=done, total=total))
    except PluginError as error:
        raise click.ClickException(str(error)) from error
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is not installed: run this where slime runs") from error
    except Interrupted as interruption:
        click.echo("Stopped. What is finished is kept: the same command goes on from here.", err=True)
        sys.exit(128 + interruption.signal_number)
    if done.already:
        click.echo("already complete, nothing written")
    return done


def sizes(done: Converted) -> str:
    """How much smaller or larger the checkpoint became."""
    before, after = done.bytes_before, done.bytes_after
    factor, word = (before / after, "smaller") if after < before else (after / before, "larger")
    return f"{_size(before)} before, {_size(after)} after ({factor:.2f} times {word})"


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
