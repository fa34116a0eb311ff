"""`miles-plugins explain NAME`: what a plugin is, where it acts, and what is changed upstream for it, and why.

NAME may also be something of upstream, or a patch: see explain_target.py. Reads our declarations and upstream's files:
it imports nothing of upstream, and no plugin but the one that is named.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from argparse import SUPPRESS, Action, ArgumentParser
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

import miles_plugins
from miles_plugins.entrypoints.docs import hooks
from miles_plugins.entrypoints.explain_target import explain_target, is_end_of_target, is_target, show_target
from miles_plugins.entrypoints.patch_facts import (
    SUPERSEDED,
    Facts,
    alone,
    explain_patch,
    folders,
    patches_here,
    reading_upstream,
)
from miles_plugins.entrypoints.patch_table import (
    EVERYWHERE,
    print_with,
    show_briefly,
    show_legend,
    show_patches,
)
from miles_plugins.errors import PluginError
from miles_plugins.hookspecs import ROLES
from miles_plugins.manager import OWN_DISTRIBUTION, Installed, Plugins, installed_plugins, load, resolve_names
from miles_plugins.patches.seam import Seam, needed_seams


@click.command()
@click.argument("name")
@click.option("--all", "everything", is_flag=True, help="Of a plugin: every patch by itself with its link, and more.")
@click.option("--diff", is_flag=True, help="Of a target: upstream's body beside what runs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(name: str, everything: bool, diff: bool, as_json: bool) -> None:
    """What a plugin is, where it acts, and what is changed upstream for it; or who changes something of upstream.

    NAME is a plugin's full or short name (`miles-plugins list` shows them), something of upstream
    (package.module:Class.method), or the id of a patch.
    """
    try:
        if of_upstream := is_target(name) or is_end_of_target(name):
            facts = explain_target(name, with_sources=diff)
        elif diff:
            raise PluginError(
                f"{name} is a plugin", next="--diff needs a function of upstream: package.module:function"
            )
        else:
            facts = explain_plugin(name, with_layer=everything)
    except PluginError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    elif of_upstream:
        show_target(facts)
    else:
        print_with(lambda console: show_plugin(console, facts, in_full=everything))


# -- what is known of a plugin ----------------------------------------------------------------------------------------


def explain_plugin(name: str, *, with_layer: bool = False) -> Facts:
    """Everything that the command shows of a plugin; `--json` prints it as it is.

    Keys:
        name, short, from, version, summary: As `miles-plugins list --json` has them.
        description: What the docstring says after its first line.
        page: Its document: a file, or an address; None where there is none.
        sides, requires, conflicts: As the module declares them.
        flags: What it registers, each {flag, default, help}; a default is text, or None.
        default_flags: What it puts in front of an empty command line.
        problems: Hook -> error, where one of the two hooks that give the flags cannot be called without a run.
        hooks: What it implements, in the order of hookspecs.py, each {name, summary, processes}.
        patches: Of the seams that it acts through, each as `explain_patch` has it; with `with_layer` (--all) also those
            of the layer itself, whose `hooks` are empty.
        layer_patches: How many the layer itself has, for every plugin the same.
        upstream: Each top-level package that the patches touch -> its folder here, None if it is not installed.

    Raises:
        PluginError: no plugin, or more than one, has that name; or it cannot be imported, or does not fit the hooks.
    """
    (installed,) = resolve_names([name], installed_plugins())
    plugin = load(installed)
    only = alone(plugin)
    problems: dict[str, str] = {}
    facts = {
        "name": plugin.name,
        "short": installed.short_name,
        "from": installed.distribution,
        "version": plugin.version,
        "summary": plugin.summary,
        "description": (inspect.getdoc(plugin.module) or "").partition("\n")[2].strip(),
        "page": _page(installed),
        "sides": list(plugin.sides),
        "requires": list(plugin.requires),
        "conflicts": list(plugin.conflicts),
        "flags": _flags(only, problems),
        "default_flags": _default_flags(only, problems),
        "problems": problems,
        "hooks": [_explain_hook(hook, spec) for hook, spec in hooks() if plugin.implements(hook)],
    }
    return facts | _explain_seams(needed_seams(only), with_layer)


def _page(installed: Installed) -> str | None:
    if installed.distribution != OWN_DISTRIBUTION:
        distribution = installed.entry_point.dist
        links = (distribution and distribution.metadata.get_all("Project-URL")) or []
        return next((link.partition(", ")[2] for link in links), None)
    page = Path(miles_plugins.__file__).parents[1] / "docs" / f"{installed.name}.md"
    if not page.is_file():  # installed from a wheel
        return f"docs/{page.name} in the repository"
    return str(page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else page)


def _flags(only: Plugins, problems: dict[str, str]) -> list[Facts]:
    parser = ArgumentParser(add_help=False)
    try:
        only.hook.register_arguments(parser=parser.add_argument_group())
    except Exception as error:
        problems["register_arguments"] = f"{type(error).__name__}: {error}"
    return [_explain_flag(parser, action) for action in parser._actions]


def _explain_flag(parser: ArgumentParser, action: Action) -> Facts:
    has_default = action.nargs != 0 and action.default not in (None, SUPPRESS)
    try:
        text = parser._get_formatter()._expand_help(action) if action.help else ""
    except (KeyError, TypeError, ValueError):  # a lone % in it
        text = action.help or ""
    return {
        "flag": ", ".join(action.option_strings),
        "default": str(action.default) if has_default else None,
        "help": "" if text == SUPPRESS else text,
    }


def _default_flags(only: Plugins, problems: dict[str, str]) -> list[str]:
    try:
        return [word for words in only.hook.default_flags(flags=()) for word in words]
    except Exception as error:
        problems["default_flags"] = f"{type(error).__name__}: {error}"
        return []


def _explain_hook(name: str, spec: Any) -> Facts:
    text = inspect.getdoc(spec) or ""
    return {"name": name, "summary": text.partition("\n")[0], "processes": processes_in(text)}


def processes_in(docstring: str) -> list[str]:
    """The processes that a hook's docstring names in brackets: `(driver, rollout_manager or trainer)`."""
    for brackets in re.findall(r"\(([^()]*)\)", docstring):
        if "every process" in brackets:
            return list(ROLES)
        if named := [role for role in ROLES if role in re.findall(r"\w+", brackets)]:
            return named
    return []


def _explain_seams(seams: Sequence[Seam], with_layer: bool) -> Facts:
    with reading_upstream():
        patches = [
            explain_patch(patch, seam) for seam in seams if seam.hooks or with_layer for patch in patches_here(seam)
        ]
        layer = sum(len(patches_here(seam)) for seam in seams if not seam.hooks)
        return {"patches": patches, "layer_patches": layer, "upstream": folders(patches)}


# -- what is shown ----------------------------------------------------------------------------------------------------


def show_plugin(console: Console, facts: Facts, *, in_full: bool) -> None:
    """What it is, its flags, its hooks, and what is changed upstream; unless `in_full`, on about one screen."""
    console.print(Text(f"{facts['name']} {facts['version']}", style="bold"))
    for paragraph in [facts["summary"], *(facts["description"].split("\n\n") if in_full else [])]:
        if paragraph:
            console.print(Text(_reflowed(paragraph)), end="\n\n")
    about = Table.grid(padding=(0, 2))
    for label, value in _about(facts, in_full):
        about.add_row(label, value)
    console.print(about)
    (_show_all if in_full else _show_summary)(console, facts)


def _show_all(console: Console, facts: Facts) -> None:
    if facts["hooks"]:
        console.print(Text("\nHooks", style="bold"))
        _show_hooks(console, facts["hooks"])
    console.print(Text("\nChanged upstream", style="bold"))
    show_legend(console, facts["patches"], facts["upstream"])
    show_patches(console, facts["patches"], in_full=True)


def _show_summary(console: Console, facts: Facts) -> None:
    """Hooks and patches by process."""
    console.print(Text("\nWhere it acts: its hooks, and what is changed upstream for them", style="bold"))
    show_legend(console, [patch for patch in facts["patches"] if patch["here"] != SUPERSEDED], facts["upstream"])
    show_briefly(console, facts["patches"], _hooks_by_process(facts["hooks"]))
    count = f"{'and' if facts['patches'] else 'changed upstream: only'} {facts['layer_patches']}"
    console.print(Text(f"  {count} of the plugin layer itself, for every plugin the same (--all lists them)"))


def _hooks_by_process(implemented: Sequence[Facts]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for hook in implemented:
        for process in [EVERYWHERE] if hook["processes"] == list(ROLES) else hook["processes"]:
            found[process].append(hook["name"])
    return found


def _reflowed(paragraph: str) -> str:
    """Joined lines, to be wrapped anew; lists and code are left as they are."""
    lines = paragraph.split("\n")
    is_prose = all(line[:1].isalnum() or line[:1] in "`'\"(" for line in lines)
    return " ".join(lines) if is_prose else paragraph


def _about(facts: Facts, in_full: bool) -> Iterator[tuple[str, Text | Table]]:
    problems = facts["problems"]
    yield "from", Text(f"{facts['from']}; its short name is {facts['short']}")
    if facts["page"]:
        yield "page", Text(facts["page"])
    if facts["requires"]:
        yield "requires", Text(", ".join(facts["requires"]))
    if facts["conflicts"]:
        yield "not with", Text(", ".join(facts["conflicts"]))
    if facts["sides"]:
        yield "sides", Text(f"{', '.join(facts['sides'])}: verified in each before training begins")
    if facts["flags"] or "register_arguments" in problems:
        yield "flags", _flag_table(facts["flags"], problems.get("register_arguments"), in_full)
    if facts["default_flags"] or "default_flags" in problems:
        yield "adds", Text(problems.get("default_flags") or " ".join([*facts["default_flags"], "(before your own)"]))


def _flag_table(flags: Sequence[Facts], problem: str | None, in_full: bool) -> Table:
    """A flag a line, unless `in_full`; `slime-train --help` has the whole text too."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for flag in flags:
        is_said = flag["default"] is None or "default" in flag["help"]
        default = "" if is_said else f"(default: {flag['default']})"
        text = Text(
            f"{flag['help']} {default}".strip(), no_wrap=not in_full, overflow="fold" if in_full else "ellipsis"
        )
        table.add_row(Text(flag["flag"]), text)
    if problem:
        table.add_row(Text(problem))
    return table


def _show_hooks(console: Console, implemented: Sequence[Facts]) -> None:
    width = max(len(hook["name"]) for hook in implemented)
    for processes, group in itertools.groupby(implemented, key=lambda hook: hook["processes"]):
        console.print(Text(f"  {EVERYWHERE if processes == list(ROLES) else ', '.join(processes)}"))
        for hook in group:
            line = f"    {hook['name']:<{width}}  {_without_processes(hook['summary'])}"
            console.print(Text(line), no_wrap=True, overflow="ellipsis")  # docs/hooks.md has the whole text


def _without_processes(summary: str) -> str:
    """The line above says them."""
    return re.sub(rf" \((?:every process|{'|'.join(ROLES)}|, | or )+\)", "", summary)
