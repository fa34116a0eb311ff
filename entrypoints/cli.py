"""`miles-plugins`: look at what is installed, and rehearse a launch."""

from __future__ import annotations

import json as json_module
import sys
from importlib.metadata import metadata

import click
from rich.console import Console
from rich.table import Table

from miles_plugins.entrypoints.explain import explain
from miles_plugins.entrypoints.rehearse import rehearse
from miles_plugins.manager import OWN_DISTRIBUTION, installed_plugins, load


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="miles-plugins")
def main() -> None:
    """Plugins for an unmodified slime. Turn them on with `slime-train --plugins NAME,… <slime flags>`."""


@main.command("list")
@click.option("--json", is_flag=True, help="Print JSON.")
def list_plugins(json: bool) -> None:
    """Every installed plugin: its names, its version, what it does."""
    rows = []
    for installed in installed_plugins().values():
        row = {"name": installed.name, "short": installed.short_name, "from": installed.distribution}
        # A third party's code is imported when its plugin is named, and not to be listed.
        own = installed.distribution == OWN_DISTRIBUTION
        summary = load(installed).summary if own else metadata(installed.distribution)["Summary"]
        rows.append(row | {"version": installed.version, "summary": summary or ""})
    if json:
        click.echo(json_module.dumps(rows, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("plugin", "version", "what it does"):
        table.add_column(column)
    for row in rows:
        source = "" if row["from"] == OWN_DISTRIBUTION else f" ({row['from']})"
        table.add_row(f"{row['short']}, {row['name']}", f"{row['version']}{source}", row["summary"])
    Console().print(table)


main.add_command(explain)
main.add_command(rehearse)

if __name__ == "__main__":
    sys.exit(main())
