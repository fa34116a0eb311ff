"""`miles-plugins list`: every installed plugin, where it comes from, in which processes it acts, whether it works here.

Of a third party's plugin only the metadata are read: its code is imported when it is named, and not to be listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import metadata

import click
from rich.console import Console
from rich.text import Text

from miles_plugins.compat.source import find_module
from miles_plugins.entrypoints.patch_facts import ABSENT, Facts, Fit, alone, fit, patches_here, reading_upstream
from miles_plugins.entrypoints.patch_table import print_with
from miles_plugins.errors import PluginError
from miles_plugins.hookspecs import ROLES
from miles_plugins.manager import OWN_DISTRIBUTION, Installed, Plugin, installed_plugins, load
from miles_plugins.patches.seam import needed_seams

READY, NOT_LOOKED_AT = "ready", "not looked at"


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_plugins(as_json: bool) -> None:
    """Every installed plugin: its names, what it does, where it comes from, and whether it can be used here."""
    try:
        rows = explain_installed()
    except PluginError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        print_with(lambda console: _show(console, rows))


def explain_installed() -> list[Facts]:
    """Everything that the command shows, a plugin each; `--json` prints it as it is.

    Keys:
        name, short, from, version, summary: The distribution's, and of ours the first line of the docstring.
        sides: Where it must be verified before training begins; None: its code was not imported.
        state: "ready", "not looked at" (a third party's), or in a few words why it cannot be used here.
        detail: The same at length; "" if there is no more to say.

    Raises:
        PluginConflictError: two distributions provide a plugin of the same name.
    """
    judged: dict[str, Fit] = {}
    with reading_upstream():
        return [_explain(installed, judged) for installed in installed_plugins().values()]


def _explain(installed: Installed, judged: dict[str, Fit]) -> Facts:
    about = {"name": installed.name, "short": installed.short_name, "from": installed.distribution}
    about |= {"version": installed.version}
    if installed.distribution != OWN_DISTRIBUTION:
        summary = metadata(installed.distribution)["Summary"] or ""
        return about | {"summary": summary, "sides": None} | _told(*_state_of_another(installed))
    try:
        plugin = load(installed)
    except PluginError as error:
        return about | {"summary": "", "sides": None} | _told(*_unusable(error))
    facts = about | {"summary": plugin.summary, "sides": list(plugin.sides)}
    try:
        return facts | _told(*_state(plugin, judged))
    except PluginError as error:
        return facts | _told(*_unusable(error))


def _told(state: str, detail: str = "") -> Facts:
    return {"state": state, "detail": detail}


def _unusable(error: PluginError) -> tuple[str, str]:
    what = str(error.facts.get("error", "")).partition(":")[0]
    return (f"does not import: {what}" if what else "is not well made"), str(error)


def _state_of_another(installed: Installed) -> tuple[str, str]:
    """What tells without importing it: whether its module is there."""
    module = installed.entry_point.module
    if find_module(module) is None:
        return f"no module {module}", f"{installed.distribution} names {module}, which cannot be found: reinstall it"
    return NOT_LOOKED_AT, "a third party's code is imported when its plugin is named: miles-plugins explain NAME"


def _state(plugin: Plugin, judged: dict[str, Fit]) -> tuple[str, str]:
    """By its patches and those of the layer, each of which is judged once."""
    found = {patch.id: patch for seam in needed_seams(alone(plugin)) for patch in patches_here(seam)}
    for id, patch in found.items():
        if id not in judged:
            judged[id] = fit(patch)
    absent = list(dict.fromkeys(judged[id].detail for id in found if judged[id].here == ABSENT))
    unfit = [f"{id}: {judged[id].detail}" for id in found if judged[id].refused and judged[id].here != ABSENT]
    if absent:
        packages = dict.fromkeys(name.partition(".")[0] if " " not in name else "slime" for name in absent)
        return f"not installed: {', '.join(packages)}", "; ".join(absent)
    if unfit:
        return f"{len(unfit)} {'patch does' if len(unfit) == 1 else 'patches do'} not fit", "; ".join(unfit)
    return READY, ""


# -- what is shown ----------------------------------------------------------------------------------------------------

COLUMNS = ("plugin", "version", "from", "state", "sides")


def _show(console: Console, rows: Sequence[Facts]) -> None:
    cells = [COLUMNS, *(tuple(_cells(row)) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    for line, row in zip(cells, [None, *rows], strict=True):
        aligned = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        console.print(Text(aligned.rstrip(), style="" if row else "bold"), overflow="ellipsis", no_wrap=True)
        if row and row["summary"]:
            console.print(Text(f"    {row['summary']}"), overflow="ellipsis", no_wrap=True)


def _cells(row: Facts) -> Iterator[str]:
    yield f"{row['short']}, {row['name']}"
    yield row["version"]
    yield row["from"]
    yield row["state"]
    sides = row["sides"]
    yield "" if sides is None else "every process" if set(sides) == set(ROLES) else ", ".join(sides) or "none"
