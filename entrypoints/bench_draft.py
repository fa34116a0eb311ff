"""`miles-plugins bench-draft`: what training the draft online is worth, measured without a GPU."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from miles_plugins.console import Interrupted
from miles_plugins.embedded.command import require_packages
from miles_plugins.embedded.draft_bench import Bench, draw, measure, summary
from miles_plugins.embedded.run_folder import write_json
from miles_plugins.errors import ArgumentError, PluginError

RESULTS, PICTURE = "results.json", "bench.png"


@click.command("bench-draft")
@click.option("--rollouts", type=click.IntRange(1), default=60, show_default=True, help="Of each run that drifts.")
@click.option("--base-rollouts", type=click.IntRange(1), default=60, show_default=True, help="Of the base before them.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How many seeds, from 1.")
@click.option("--lr", type=float, default=4e-3, show_default=True, help="Learning rate of policy and draft.")
@click.option("--entropy-coef", type=float, default=0.03, show_default=True, help="Weight of the entropy bonus.")
@click.option("--samples", type=click.IntRange(100), default=4000, show_default=True, help="Answers compared.")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder. [default: runs/bench-draft-DATE-TIME]")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON instead of a table.")
def bench_draft(
    rollouts: int,
    base_rollouts: int,
    seeds: int,
    lr: float,
    entropy_coef: float,
    samples: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare a frozen draft with one that is trained online, while the policy drifts.

    A tiny model in the embedded host, on the CPU: three to five minutes a seed. It also checks that
    speculative decoding leaves the distribution of answers as it is.
    """
    try:
        _bench(out, Bench(Path(), range(1, seeds + 1), base_rollouts, rollouts, lr, entropy_coef, samples), as_json)
    except PluginError as error:
        raise click.ClickException(str(error)) from error
    except Interrupted as interrupted:
        sys.exit(128 + interrupted.signal_number)


def _bench(out: Path | None, wanted: Bench, as_json: bool) -> None:
    require_packages()
    folder = (out or Path("runs") / time.strftime("bench-draft-%Y%m%d-%H%M%S")).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"--out {folder} is not an empty folder", next="name a new one")
    bench = replace(wanted, folder=folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        found = measure(bench, progress)
    write_json(folder / RESULTS, found)
    draw(bench, folder / PICTURE)
    if as_json:
        click.echo(json.dumps({**found, "folder": str(folder)}))
        return
    Console().print(summary(found))
    test = found["distribution"]
    click.echo(
        f"{test['answers']} speculative answers (accept length {test['accept_length']:.2f}), as many plain ones: "
        f"chi-square {test['statistic']:.1f} in {test['bins']} bins, p = {test['p_value']:.3f}"
    )
    click.echo(f"{folder / PICTURE}, and beside it {RESULTS}")
