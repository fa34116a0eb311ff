"""`miles-plugins explain NAME`: what a plugin is, where it acts, and what is changed upstream for it, and why.

Reads our declarations and upstream's files: it imports nothing of upstream, and no plugin but the one that is named.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import json
import re
import shutil
import sys
from argparse import SUPPRESS, Action, ArgumentParser
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

import miles_plugins
from miles_plugins.compat.source import find_module, has_package
from miles_plugins.compat.upstream import find_train_script, package_folder, slime_problem
from miles_plugins.entrypoints.docs import hooks
from miles_plugins.errors import PatchError, PluginError
from miles_plugins.hookspecs import ROLES
from miles_plugins.manager import OWN_DISTRIBUTION, Installed, Plugin, Plugins, installed_plugins, load, resolve_names
from miles_plugins.patches.seam import Seam, needed_seams
from miles_plugins.patching import Need, Patch, check_statically

Facts = dict[str, Any]  # what JSON can hold

FITS, MISFIT, SUPERSEDED, OPEN, ABSENT = "fits", "does not fit", "superseded", "known on import", "not installed"
MARKS = {FITS: "fits", MISFIT: "does not fit", SUPERSEDED: "idle", OPEN: "?", ABSENT: "–"}
VERBS = {"wrap": "wraps", "replace": "replaces", "add": "adds"}
LISTED = 3  # so many patches that differ in their target only are listed one by one
PIPED_WIDTH = 120  # as `rehearse` has it


@click.command()
@click.argument("name")
@click.option("--all", "everything", is_flag=True, help="Every patch by itself with its link, and those of the layer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(name: str, everything: bool, as_json: bool) -> None:
    """What a plugin is, where it acts, and what is changed upstream for it.

    NAME is a plugin's full or short name; `miles-plugins list` shows them.
    """
    try:
        facts = explain_plugin(name, with_layer=everything)
    except PluginError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    width = shutil.get_terminal_size((PIPED_WIDTH, 0)).columns
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as shown:
        show_plugin(console, facts)
        show_patches(console, facts["patches"], in_full=everything)
        show_rest(console, facts)
    click.echo("\n".join(line.rstrip() for line in shown.get().splitlines()))  # rich fills lines up with blanks


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
    alone = Plugins([_Alone(installed, plugin.module)])
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
        "flags": _flags(alone, problems),
        "default_flags": _default_flags(alone, problems),
        "problems": problems,
        "hooks": [_explain_hook(hook, spec) for hook, spec in hooks() if plugin.implements(hook)],
    }
    return facts | _explain_seams(needed_seams(alone), with_layer)


class _Alone(Plugin):
    """A plugin without what it requires: that may be a third party's, and is not imported to explain this one."""

    @property
    def requires(self) -> tuple[str, ...]:
        return ()


def _page(installed: Installed) -> str | None:
    if installed.distribution != OWN_DISTRIBUTION:
        distribution = installed.entry_point.dist
        links = (distribution and distribution.metadata.get_all("Project-URL")) or []
        return next((link.partition(", ")[2] for link in links), None)
    page = Path(miles_plugins.__file__).parents[1] / "docs" / f"{installed.name}.md"
    if not page.is_file():  # installed from a wheel
        return f"docs/{page.name} in the repository"
    return str(page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else page)


def _flags(alone: Plugins, problems: dict[str, str]) -> list[Facts]:
    parser = ArgumentParser(add_help=False)
    try:
        alone.hook.register_arguments(parser=parser.add_argument_group())
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


def _default_flags(alone: Plugins, problems: dict[str, str]) -> list[str]:
    try:
        return [word for words in alone.hook.default_flags(flags=()) for word in words]
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


# -- what is known of patches -----------------------------------------------------------------------------------------


def _explain_seams(seams: Sequence[Seam], with_layer: bool) -> Facts:
    with _reading_upstream():
        patches = [explain_patch(patch, seam) for seam in seams if seam.hooks or with_layer for patch in seam.patches]
        found: dict[str, str | None] = {}
        for patch in patches:
            package = patch["target"].partition(":")[0].partition(".")[0]
            if patch["here"] != ABSENT:
                found[package] = str(package_folder(package))
            found.setdefault(package, None)
    layer = sum(len(seam.patches) for seam in seams if not seam.hooks)
    return {"patches": patches, "layer_patches": layer, "upstream": found}


@contextmanager
def _reading_upstream() -> Iterator[None]:
    """Upstream is looked for where `slime-train` would find it: beside the train script first."""
    script = find_train_script(None)
    path, collects = list(sys.path), gc.isenabled()
    sys.path[:0] = [str(script.parent)] if script else []
    gc.disable()  # it would look through the syntax trees of large files again and again: a third of the time
    try:
        yield
    finally:
        sys.path[:] = path
        if collects:
            gc.enable()


def explain_patch(patch: Patch, seam: Seam) -> Facts:
    """What is known of one patch.

    Keys:
        id, target, kind, reason, retire_when, upstream: As declared.
        seam, hooks: The seam that it belongs to, and the seam's hooks.
        roles: The processes in which it must be verified, in the order of hookspecs.py; none: wherever it is imported.
        needs: Further conditions on upstream.
        superseded_when: Where upstream is left as it is; None: nowhere.
        here: "fits", "does not fit", "superseded", "not installed", or "known on import" if the files do not tell.
        detail: Why, in one line; how upstream has drifted, if it fits; what is not installed.
    """
    here, detail = fit(patch)
    return {
        "id": patch.id,
        "target": patch.target,
        "kind": patch.kind,
        "reason": patch.reason,
        "retire_when": patch.retire_when,
        "upstream": patch.upstream,
        "seam": seam.name,
        "hooks": list(seam.hooks),
        "roles": [role for role in ROLES if role in patch.roles],
        "needs": [str(need) for need in patch.needs],
        "superseded_when": _superseded_when(patch),
        "here": here,
        "detail": detail,
    }


def _superseded_when(patch: Patch) -> str | None:
    condition = patch.superseded_when
    if condition is None:
        return None
    return f"upstream has {condition}" if isinstance(condition, Need) else "upstream does it itself"


def fit(patch: Patch) -> tuple[str, str]:
    """Whether a patch fits the upstream that is installed, and why; upstream's files are read, and not imported."""
    for target in (patch.target, *(need.target for need in patch.needs)):
        if absent := _absent(target):
            return ABSENT, absent
    try:
        notes = check_statically(patch)
    except PatchError as error:
        problem = error.message.removeprefix(f"patch {patch.id} ").removeprefix("does not fit: ")
        told = [f"{name} {error.facts[name]}" for name in ("expected", "found", "nearest") if name in error.facts]
        return MISFIT, "; ".join([problem, *told])
    here = OPEN
    if any(note.startswith("superseded") for note in notes):
        here = SUPERSEDED
    elif all(note.startswith("drifted") for note in notes):
        here = FITS
    return here, "; ".join(notes)


def _absent(target: str) -> str:
    """What of upstream is not installed, where that is why a target cannot be there; else ""."""
    parts = target.partition(":")[0].split(".")
    if parts[0] == "slime" and has_package("slime") and (problem := slime_problem()):
        return problem.found  # an impostor
    for end in range(1, len(parts) + 1):
        name, parent = ".".join(parts[:end]), ".".join(parts[: end - 1])
        if not has_package(name):
            # Of a namespace package each distribution has a part: PyPI's megatron-core has no megatron.training.
            return "" if parent and find_module(parent) else name
    return ""


# -- what is shown ----------------------------------------------------------------------------------------------------


def show_plugin(console: Console, facts: Facts) -> None:
    """What it is, its flags, and its hooks."""
    console.print(Text(f"{facts['name']} {facts['version']}", style="bold"))
    for paragraph in [facts["summary"], *facts["description"].split("\n\n")]:
        if paragraph:
            console.print(Text(_reflowed(paragraph)), end="\n\n")
    about = Table.grid(padding=(0, 2))
    for label, value in _about(facts):
        about.add_row(label, value)
    console.print(about)
    if facts["hooks"]:
        console.print(Text("\nHooks", style="bold"))
        _show_hooks(console, facts["hooks"])


def _reflowed(paragraph: str) -> str:
    """Joined lines, to be wrapped anew; lists and code are left as they are."""
    lines = paragraph.split("\n")
    is_prose = all(line[:1].isalnum() or line[:1] in "`'\"(" for line in lines)
    return " ".join(lines) if is_prose else paragraph


def _about(facts: Facts) -> Iterator[tuple[str, Text | Table]]:
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
        yield "flags", _flag_table(facts["flags"], problems.get("register_arguments"))
    if facts["default_flags"] or "default_flags" in problems:
        yield "adds", Text(problems.get("default_flags") or " ".join([*facts["default_flags"], "(before your own)"]))


def _flag_table(flags: Sequence[Facts], problem: str | None) -> Table:
    table = Table.grid(padding=(0, 2))
    for flag in flags:
        is_said = flag["default"] is None or "default" in flag["help"]
        default = "" if is_said else f"(default: {flag['default']})"
        table.add_row(Text(flag["flag"]), Text(f"{flag['help']} {default}".strip()))
    if problem:
        table.add_row(Text(problem))
    return table


def _show_hooks(console: Console, implemented: Sequence[Facts]) -> None:
    width = max(len(hook["name"]) for hook in implemented)
    for processes, group in itertools.groupby(implemented, key=lambda hook: hook["processes"]):
        console.print(Text(f"  {'every process' if processes == list(ROLES) else ', '.join(processes)}"))
        for hook in group:
            line = f"    {hook['name']:<{width}}  {_without_processes(hook['summary'])}"
            console.print(Text(line), no_wrap=True, overflow="ellipsis")  # docs/hooks.md has the whole text


def _without_processes(summary: str) -> str:
    """The line above says them."""
    return re.sub(rf" \((?:every process|{'|'.join(ROLES)}|, | or )+\)", "", summary)


def show_patches(console: Console, patches: Sequence[Facts], *, in_full: bool) -> None:
    """The patches by process; unless `in_full`, many alike as one, and their links only for a terminal to follow."""
    console.print(Text("\nChanged upstream", style="bold"))
    groups = _by_roles(patches)
    shown = [patch for _, group in groups for patch in group]
    links = list(dict.fromkeys(patch["upstream"] for patch in shown if patch["upstream"])) if in_full else []
    width = max((len(MARKS[patch["here"]]) for patch in patches), default=0)
    room = console.width - len("    ") - width - len("  ")
    for roles, group in groups:
        console.print(Text(f"  {', '.join(roles) or 'wherever it is imported'}"))
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=width)
        table.add_column(overflow="fold")
        for alike in _alike(group, in_full):
            table.add_row(MARKS[alike[0]["here"]], _entry(alike, links, room, in_full))
        console.print(Padding(table, (0, 0, 0, 4)))
    if links:
        console.print()
    for position, link in enumerate(links, 1):
        console.print(Text(f"  [{position}] {link}"), soft_wrap=True)  # an address is not broken


def _by_roles(patches: Iterable[Facts]) -> list[tuple[tuple[str, ...], list[Facts]]]:
    """The patches of each process, or of the same several; last those without one."""
    groups: dict[tuple[str, ...], list[Facts]] = defaultdict(list)
    for patch in patches:
        groups[tuple(patch["roles"])].append(patch)
    return sorted(groups.items(), key=lambda item: [ROLES.index(role) for role in item[0]] or [len(ROLES)])


def _alike(patches: Iterable[Facts], in_full: bool) -> list[list[Facts]]:
    """Together what differs in the target only; unless `in_full`, also what is idle for one and the same reason."""
    groups: dict[str, list[Facts]] = defaultdict(list)
    for patch in patches:
        own = {"id": "", "target": "", "kind": ""}
        if patch["here"] == SUPERSEDED and not in_full:
            own |= {"reason": "", "retire_when": ""}
        groups[json.dumps(patch | own)].append(patch)
    return list(groups.values())


def _entry(alike: Sequence[Facts], links: Sequence[str], room: int, in_full: bool) -> Group:
    """Some patches that are alike, and why they are there."""
    first = alike[0]
    number = f" [{links.index(first['upstream']) + 1}]" if first["upstream"] in links else ""
    if not in_full and len(alike) > (1 if first["here"] == SUPERSEDED else LISTED):
        lines = [_all_in_one(alike)]
    else:
        lines = [_line(patch, number, room) for patch in alike]
    return Group(*lines, Padding(_why(first, in_full), (0, 0, 0, 2)))


def _line(patch: Facts, number: str, room: int) -> Text:
    """The patch and its target; a long one is broken where that is easiest to read."""
    what, target = f"{number} {VERBS[patch['kind']]}", patch["target"]
    if len(patch["id"] + what) + 1 + len(target) <= room:
        return Text.assemble(_id(patch["id"], patch), f"{what} {target}")
    if len(target) + 2 > room:
        target = target.replace(":", ":\n    ")
    return Text.assemble(_id(patch["id"], patch), f"{what}\n  {target}")


def _all_in_one(alike: Sequence[Facts]) -> Text:
    ids, targets = (_beginning([patch[name] for patch in alike]) for name in ("id", "target"))
    verbs = " or ".join(dict.fromkeys(VERBS[patch["kind"]] for patch in alike))
    return Text.assemble(_id(f"{ids}*", alike[0]), f" ({len(alike)} patches) {verbs} {targets}*")


def _id(text: str, patch: Facts) -> tuple[str, Style]:
    """Terminals follow the link; elsewhere nothing is seen of it."""
    return text, Style(link=patch["upstream"].partition(" ")[0] or None)


def _beginning(names: Sequence[str]) -> str:
    """What all names begin with."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)


def _why(patch: Facts, in_full: bool) -> Text:
    """Why, and `in_full` also until when and under which conditions; of an idle patch else only why it is idle."""
    condition = _shortened(patch["superseded_when"] or "")
    if patch["here"] == SUPERSEDED and not in_full:
        return Text(condition)
    words = [patch["reason"]]
    if in_full:
        words += [f"until {patch['retire_when']}"] if patch["retire_when"] else []
        words += [f"needs {_shortened(need)}" for need in patch["needs"]]
        words += [f"idle where {condition}"] if condition else []
    # Of what is not installed, and of what only an import tells, the legend says enough.
    detail = f"\n{patch['detail']}" if patch["detail"] and patch["here"] in (FITS, MISFIT) else ""
    return Text("; ".join(words) + detail)


def _shortened(condition: str) -> str:
    return re.sub(r"(?:\w+\.)+(?=\w+:)", "", condition)  # the last part of a module says enough


def show_rest(console: Console, facts: Facts) -> None:
    """The layer's own patches, if they are not listed; what the marks mean."""
    patches = facts["patches"]
    if all(patch["hooks"] for patch in patches):
        count = f"{'and' if patches else 'only'} {facts['layer_patches']}"
        console.print(Text(f"  {count} of the plugin layer itself, for every plugin the same (see --all)"))
    legend = Table.grid(padding=(0, 2))
    if here := [f"{name} ({folder})" for name, folder in facts["upstream"].items() if folder]:
        legend.add_row(MARKS[FITS], Text(f"by the files of {', '.join(here)}; nothing was imported"))
    if any(patch["here"] == SUPERSEDED for patch in patches):
        legend.add_row(MARKS[SUPERSEDED], Text("superseded: upstream does it itself, so nothing is changed"))
    if any(patch["here"] == OPEN for patch in patches):
        legend.add_row(MARKS[OPEN], Text("known only when it is imported, and checked then"))
    if absent := dict.fromkeys(patch["detail"] for patch in patches if patch["here"] == ABSENT):
        legend.add_row(MARKS[ABSENT], Text(f"not installed here: {', '.join(absent)}"))
    if patches:
        console.print(Padding(legend, (1, 0, 0, 2)))
