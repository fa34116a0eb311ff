"""How the commands show patches: by process, with a mark for whether each fits, and what the marks mean."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import click
from rich.console import Console, Group
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from miles_plugins.entrypoints.patch_facts import ABSENT, FITS, MISFIT, OPEN, SUPERSEDED, Facts
from miles_plugins.hookspecs import ROLES

MARKS = {FITS: "fits", MISFIT: "does not fit", SUPERSEDED: "idle", OPEN: "?", ABSENT: "–"}
VERBS = {"wrap": "wraps", "replace": "replaces", "add": "adds"}
EVERYWHERE, ANYWHERE = "every process", "wherever it is imported"
LISTED = 3  # so many patches that differ in their target only are listed one by one
PIPED_WIDTH = 120  # as `rehearse` has it


def print_with(show: Callable[[Console], None]) -> None:
    """Let `show` print to a console of the terminal's width, without the blanks that rich fills lines up with."""
    width = shutil.get_terminal_size((PIPED_WIDTH, 0)).columns
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as shown:
        show(console)
    click.echo("\n".join(line.rstrip() for line in shown.get().splitlines()))


# -- what belongs together --------------------------------------------------------------------------------------------


def by_process(patches: Iterable[Facts]) -> list[tuple[str, list[Facts]]]:
    """The patches of each process that is touched, in the order of hookspecs.py; last those without one."""
    groups: dict[str, list[Facts]] = {role: [] for role in ROLES}
    anywhere = []
    for patch in patches:
        for role in patch["roles"]:
            groups.setdefault(role, []).append(patch)
        if not patch["roles"]:
            anywhere.append(patch)
    return [(role, group) for role, group in [*groups.items(), (ANYWHERE, anywhere)] if group]


def alike(patches: Iterable[Facts]) -> list[list[Facts]]:
    """Together what differs in the target only."""
    groups: dict[str, list[Facts]] = defaultdict(list)
    for patch in patches:
        own = {"id": "", "target": "", "kind": ""}
        if len(patch.get("stack", ())) == 1:
            own |= {"stack": ""}
        groups[json.dumps(patch | own)].append(patch)
    return list(groups.values())


def _is_layers_own(patch: Facts) -> bool:
    """Whether it is there for every plugin, and nothing is to be said of it."""
    return not patch["hooks"] and not (patch["here"] == MISFIT or (patch["here"] == FITS and patch["detail"]))


# -- in full, and in two lines each -----------------------------------------------------------------------------------


def show_patches(console: Console, patches: Sequence[Facts], *, in_full: bool) -> None:
    """The patches by process.

    Unless `in_full`, many alike as one, those of the layer itself by their ids, what is idle as a number, and links
    only for a terminal to follow.
    """
    shown = [patch for patch in patches if in_full or patch["here"] != SUPERSEDED]
    links = list(dict.fromkeys(patch["upstream"] for patch in shown if patch["upstream"])) if in_full else []
    width = max((len(MARKS[patch["here"]]) for patch in shown), default=0)
    room = console.width - len("    ") - width - len("  ")
    for process, group in by_process(shown):
        console.print(Text(f"  {process}"))
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=width)
        table.add_column(overflow="fold")
        own = [] if in_full else [patch for patch in group if _is_layers_own(patch)]
        for some in alike(patch for patch in group if patch not in own):
            table.add_row(MARKS[some[0]["here"]], _entry(some, links, room, in_full))
        for mark, names in _ids_by_mark(own).items():
            table.add_row(mark, Text(f"of the layer itself: {', '.join(names)}"))
        console.print(Padding(table, (0, 0, 0, 4)))
    _show_idle(console, len(patches) - len(shown))
    if links:
        console.print()
    for position, link in enumerate(links, 1):
        console.print(Text(f"  [{position}] {link}"), soft_wrap=True)  # an address is not broken


def _ids_by_mark(patches: Iterable[Facts]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for patch in patches:
        found[MARKS[patch["here"]]].append(patch["id"])
    return found


def _show_idle(console: Console, count: int) -> None:
    if count:
        console.print(Text(f"  {count} more idle here: they are for other releases of upstream"))


def _entry(some: Sequence[Facts], links: Sequence[str], room: int, in_full: bool) -> Group:
    """Some patches that are alike, and why they are there."""
    first = some[0]
    number = f" [{links.index(first['upstream']) + 1}]" if first["upstream"] in links else ""
    if not in_full and len(some) > LISTED:
        lines = [_all_in_one(some)]
    else:
        lines = [_line(patch, number, room, in_full) for patch in some]
    return Group(*lines, Padding(_why(first, room - 2, in_full), (0, 0, 0, 2)))


def _line(patch: Facts, number: str, room: int, in_full: bool) -> Text:
    """The patch and its target; a long one is broken where that is easiest to read, or shortened unless `in_full`."""
    target = patch["target"] if in_full else shortened(patch["target"])
    what, layer = f"{number} {VERBS[patch['kind']]}", _layer(patch)
    if len(patch["id"] + what + target + layer) + 1 <= room:
        return Text.assemble(_id(patch["id"], patch), f"{what} {target}{layer}")
    if len(target) + 2 > room:
        target = target.replace(":", ":\n    ")
    return Text.assemble(_id(patch["id"], patch), f"{what}\n  {target}{layer}")


def _layer(patch: Facts) -> str:
    """Where it stands among the patches of its target, if it is not alone there."""
    stack = patch.get("stack", ())
    if len(stack) < 2 or patch["id"] not in stack:
        return ""
    position = stack.index(patch["id"])
    inside = f", around {stack[position + 1]}" if position + 1 < len(stack) else ""
    return f" (layer {position + 1} of {len(stack)}{inside})"


def _all_in_one(some: Sequence[Facts]) -> Text:
    ids, targets = (_beginning([patch[name] for patch in some]) for name in ("id", "target"))
    verbs = " or ".join(dict.fromkeys(VERBS[patch["kind"]] for patch in some))
    return Text.assemble(_id(f"{ids}*", some[0]), f" ({len(some)} patches) {verbs} {targets}*")


def _id(text: str, patch: Facts) -> tuple[str, Style]:
    """Terminals follow the link; elsewhere nothing is seen of it."""
    return text, Style(link=patch["upstream"].partition(" ")[0] or None)


def _beginning(names: Sequence[str]) -> str:
    """What all names begin with."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)


def _why(patch: Facts, room: int, in_full: bool) -> Text:
    """For whom and why, unless `in_full` in one line; `in_full` also until when and on which conditions.

    That it does not fit, or has drifted, is always said at length.
    """
    # Of what is not installed, and of what only an import tells, the legend says enough.
    detail = f"\n{patch['detail']}" if patch["detail"] and patch["here"] in (FITS, MISFIT) else ""
    why = Text(for_whom(patch, in_full) + patch["reason"])
    if not in_full:
        why.truncate(room, overflow="ellipsis")
        return why.append(detail)
    condition = shortened(patch["superseded_when"] or "")
    words = [f"until {patch['retire_when']}"] if patch["retire_when"] else []
    words += [f"needs {shortened(need)}" for need in patch["needs"]]
    words += [f"idle where {condition}"] if condition else []
    return why.append("".join(f"; {each}" for each in words) + detail)


def for_whom(patch: Facts, in_full: bool = True) -> str:
    """`r3 (model_built): `, where it is known; nothing of the layer's own patches, which are for every plugin."""
    words = []
    for name, hooks in patch.get("for", {}).items():
        more = [f"{len(hooks) - 1} more"] if len(hooks) > 2 and not in_full else []
        words.append(f"{name} ({', '.join([*(hooks[:1] if more else hooks), *more])})")
    return f"{', '.join(words)}: " if words else ""


def shortened(name: str) -> str:
    """Of a module's name in `module:qualname` the last part: it says enough."""
    return re.sub(r"(?:\w+\.)+(?=\w+:)", "", name)


# -- in one line each -------------------------------------------------------------------------------------------------


def show_briefly(console: Console, patches: Sequence[Facts], hooks: Mapping[str, Sequence[str]]) -> None:
    """By process: the hooks that are called there, and one line a target.

    What idles is a number. Below a line stands why a patch does not fit, or how upstream has drifted.
    """
    working = [patch for patch in patches if patch["here"] != SUPERSEDED]
    marks = max((len(MARKS[patch["here"]]) for patch in working), default=0)
    room = min(max((len(_name(patch)) for patch in working), default=0), console.width // 3)
    groups = dict(by_process(working))
    for process in (*ROLES, EVERYWHERE, ANYWHERE):
        if process in hooks or process in groups:
            row = Table.grid(padding=(0, 2))
            row.add_column(min_width=max(len(role) for role in ROLES))
            row.add_row(Text(process), Text(", ".join(hooks.get(process, ()))))
            console.print(Padding(row, (0, 0, 0, 2)))
        for some in alike(groups.get(process, ())):
            names = [_name(patch) for patch in some]
            for name in names if len(names) <= LISTED else [f"{_beginning(names)}* ({len(names)})"]:
                line = f"    {MARKS[some[0]['here']]:<{marks}}  {_fitting(name, room):<{room}}  {some[0]['reason']}"
                console.print(Text(line), no_wrap=True, overflow="ellipsis")
            if some[0]["here"] in (FITS, MISFIT) and some[0]["detail"]:
                console.print(Padding(Text(some[0]["detail"]), (0, 0, 0, 8)))
    _show_idle(console, len(patches) - len(working))


def _name(patch: Facts) -> str:
    """A method with its class, a function with its module: no more is needed to know which is meant."""
    name: str = shortened(patch["target"])
    qualname = name.partition(":")[2]
    return qualname if "." in qualname else name


def _fitting(name: str, room: int) -> str:
    return name if len(name) <= room else f"{name[: room - 1]}…"


# -- what the marks mean ----------------------------------------------------------------------------------------------


def show_legend(console: Console, patches: Sequence[Facts], upstream: Mapping[str, str | None]) -> None:
    """What the marks that occur mean, and where upstream was read."""
    legend = Table.grid(padding=(0, 2))
    if here := [f"{name} ({_from_home(folder)})" for name, folder in upstream.items() if folder]:
        legend.add_row(MARKS[FITS], Text(f"by the files of {', '.join(here)}; nothing was imported"))
    if any(patch["here"] == SUPERSEDED for patch in patches):
        legend.add_row(MARKS[SUPERSEDED], Text("superseded: upstream does it itself, so nothing is changed"))
    if any(patch["here"] == OPEN for patch in patches):
        legend.add_row(MARKS[OPEN], Text("known only when it is imported, and checked then"))
    if absent := dict.fromkeys(patch["detail"] for patch in patches if patch["here"] == ABSENT):
        legend.add_row(MARKS[ABSENT], Text(f"not installed here: {', '.join(absent)}"))
    if patches:
        console.print(Padding(legend, (0, 0, 0, 2)))


def _from_home(folder: str) -> str:
    path = Path(folder)
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else folder
