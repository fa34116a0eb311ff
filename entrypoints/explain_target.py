"""`miles-plugins explain TARGET`: who changes a function of upstream, in which order, why, until when; and the sources.

Reads our declarations and upstream's files, and imports nothing of upstream.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from miles_plugins.compat.source import Definition, find_definitions, find_module, names_near
from miles_plugins.entrypoints.bodies import difference, our_body, our_place, upstream_body
from miles_plugins.entrypoints.patch_facts import (
    SUPERSEDED,
    Facts,
    explain_patch,
    home,
    patches_here,
    reading_upstream,
    stacks,
)
from miles_plugins.entrypoints.patch_table import ANYWHERE, VERBS, for_whom, print_with, shortened
from miles_plugins.errors import PluginError
from miles_plugins.manager import OWN_DISTRIBUTION, Plugin, installed_plugins, load
from miles_plugins.patches.seam import Seam, all_seams
from miles_plugins.patching import Patch

NEAREST = 5


# -- which target is meant --------------------------------------------------------------------------------------------


def is_target(name: str) -> bool:
    """Whether a name can be something of upstream, or a patch; plugins' names have neither dot nor colon."""
    return "." in name or ":" in name


def is_end_of_target(name: str) -> bool:
    """Whether a name without dot and colon is no plugin's, but the last part of something that is changed upstream."""
    known = {each for plugin in installed_plugins().values() for each in (plugin.name, plugin.short_name)}
    targets = {patch.target for seam in all_seams() for patch in seam.everywhere()}
    return name not in known and any(re.split("[.:]", target)[-1] == name for target in targets)


def resolve_target(name: str, patches: Sequence[Patch]) -> str:
    """`module:qualname` of a target, a dotted path, the end of a changed target that no other has, or a patch's id.

    Raises:
        PluginError: nothing of upstream and no patch has that name.
    """
    by_id = {patch.id: patch.target for patch in reversed(patches)}  # of several with one id, the first
    if name in by_id:
        return by_id[name]
    changed = sorted({patch.target for patch in patches})
    dotted = name.replace(":", ".")
    same = [target for target in changed if target.replace(":", ".") == dotted]
    same = same or [target for target in changed if target.replace(":", ".").endswith(f".{dotted}")]
    if len(same) == 1:
        return same[0]
    if len(same) > 1:
        raise PluginError(f"{name} is several targets", {"targets": "\n".join(same)}, "write more of the name")
    if ":" in name and find_module(name.partition(":")[0]):
        return name
    parts = dotted.split(".")
    guesses = [f"{'.'.join(parts[:end])}:{'.'.join(parts[end:])}" for end in range(len(parts) - 1, 0, -1)]
    guess = next((guess for guess in guesses if find_module(guess.partition(":")[0])), None)
    if guess and find_definitions(guess):
        return guess
    ends = {".".join(target.replace(":", ".").split(".")[-len(parts) :]): target for target in changed}
    near = [ends.get(each, each) for each in difflib.get_close_matches(dotted, [*by_id, *ends], n=3)]
    raise PluginError(
        f"neither a patch nor anything installed is named {name}",
        {"nearest": "\n".join(dict.fromkeys([*near, *(names_near(guess, 3) if guess else [])]))},
        "write package.module:Class.method, or a patch's id (docs/patches.md has all)",
    )


# -- what is known of it ----------------------------------------------------------------------------------------------


def explain_target(name: str, *, with_sources: bool = False) -> Facts:
    """Everything that the command shows of a target; `--json` prints it as it is.

    Keys:
        target: As `module:qualname`.
        here: What is installed, each {target, where, kind, signature, fingerprint}; several if a condition decides
            which of them it is, none if upstream has no such name.
        patches: Those that change it, outermost first, each as `explain_patch` has it, with `for` (plugin -> the hooks
            for which it needs the patch; empty: every plugin), and `code` (what stands there: name, file and line).
        idle: Patches of it that are superseded here, likewise.
        elsewhere: Ids of patches that change it in other releases of upstream.
        not_asked: Third parties' plugins: they are not imported, and may need a patch too.
        nearest: Where nobody changes it, the nearest names that are changed, or that upstream has.
        sources: With `with_sources` (--diff), the lines that run: see `_what_runs`; else empty.

    Raises:
        PluginError: see `resolve_target`.
    """
    with reading_upstream():
        here = [(patch, seam) for seam in all_seams() for patch in patches_here(seam)]
        everywhere = [patch for seam in all_seams() for patch in seam.everywhere()]
        target = resolve_target(name, [*(patch for patch, _ in here), *everywhere])
        found = find_definitions(target)
        plugins, others = _installed()
        facts = {patch.id: _explain(patch, seam, plugins) for patch, seam in _of_target(target, here)}
        patches = {patch.id: patch for patch, _ in here}
        working = [patches[id] for id in facts if facts[id]["here"] != SUPERSEDED]
        chain = [patch for stack in stacks(working) for patch in stack]
        elsewhere = [patch.id for patch in everywhere if patch.target == target and patch.id not in facts]
        return {
            "target": target,
            "here": [_explain_definition(each) for each in found],
            "patches": [facts[patch.id] for patch in chain],
            "idle": [fact for fact in facts.values() if fact["here"] == SUPERSEDED],
            "elsewhere": list(dict.fromkeys(elsewhere)),
            "not_asked": others,
            "nearest": [] if facts else _nearest(target, found, list(patches.values())),
            "sources": _what_runs(chain, found[0] if found else None) if with_sources else [],
        }


def _of_target(target: str, patches: Sequence[tuple[Patch, Seam]]) -> Iterator[tuple[Patch, Seam]]:
    """The patches of one object, by whatever path they name it."""
    meant = home(target)
    names = {each.rpartition(":")[2].rpartition(".")[2] for each in (target, meant)}
    for patch, seam in patches:
        # Only a target of that name is looked up: it takes reading files.
        if patch.qualname.rpartition(".")[2] in names and home(patch.target) == meant:
            yield patch, seam


def _explain(patch: Patch, seam: Seam, plugins: Sequence[Plugin]) -> Facts:
    return explain_patch(patch, seam) | {"for": needed_for(seam, plugins), "code": our_place(patch)}


def needed_for(seam: Seam, plugins: Sequence[Plugin]) -> dict[str, list[str]]:
    """The plugins that act through a seam, by short name, and the hooks that they implement of it."""
    implemented = {
        plugin.installed.short_name: [hook for hook in seam.hooks if plugin.implements(hook)] for plugin in plugins
    }
    return {name: hooks for name, hooks in implemented.items() if hooks}


def _installed() -> tuple[list[Plugin], list[str]]:
    """Our own plugins, those that can be imported; the names of the third parties'."""
    ours, others = [], []
    for installed in installed_plugins().values():
        if installed.distribution != OWN_DISTRIBUTION:
            others.append(installed.name)
            continue
        try:
            ours.append(load(installed))
        except PluginError:  # `miles-plugins list` says so
            continue
    return ours, others


def _explain_definition(found: Definition) -> Facts:
    return {
        "target": found.target,
        "where": found.where,
        "kind": found.kind,
        "signature": str(found.signature) if found.signature else None,
        "fingerprint": found.fingerprint,
    }


def _nearest(target: str, found: Sequence[Definition], patches: Sequence[Patch]) -> list[str]:
    if not found:
        return names_near(target, NEAREST)
    changed = list(dict.fromkeys(patch.target for patch in patches))
    module = target.partition(":")[0]
    beside = [other for other in changed if other.partition(":")[0] == module]
    return list(dict.fromkeys([*beside, *difflib.get_close_matches(target, changed, n=NEAREST)]))[:NEAREST]


# -- the sources ------------------------------------------------------------------------------------------------------


def _what_runs(chain: Sequence[Patch], found: Definition | None) -> list[str]:
    """What a call passes through, from the outside, as lines that begin like those of a diff.

    `+` is a patch's, a blank upstream's own. Of a function that is replaced it is a unified diff of the two bodies;
    what computes a replacement from the original (`replace_with`) stands before it, as a wrapper does.
    """
    upstream = upstream_body(found) if found else []
    lines: list[str] = []
    for patch in chain:
        if patch.kind == "replace" and patch.replace_with is None:
            names = (f"upstream  {found.where if found else ''}", f"{patch.id}  {our_place(patch)}")
            return [*lines, *difference(upstream, our_body(patch), names)]
        lines += [f"+ # {patch.id} {VERBS[patch.kind]} it: {our_place(patch)}", *_marked("+", our_body(patch)), "+"]
    if found:
        lines.append(f"  # upstream: {found.where or found.kind}")
        lines += _marked(" ", upstream or ["# there is no source to read"])
    return lines


def _marked(mark: str, lines: Sequence[str]) -> list[str]:
    return [f"{mark} {line}".rstrip() for line in lines]


# -- what is shown ----------------------------------------------------------------------------------------------------


def show_target(facts: Facts) -> None:
    """Print what `explain_target` knows."""
    print_with(lambda console: _show(console, facts))
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in facts["sources"]:
        click.secho(line, fg=colours.get(line[:1]))


def _show(console: Console, facts: Facts) -> None:
    console.print(Text(facts["target"], style="bold"), soft_wrap=True)
    for found in facts["here"]:
        console.print(Text(f"  here  {found['where'] or found['target']}"), soft_wrap=True)
        console.print(Text(f"        {found['kind']} {found['signature'] or ''}"))
    if not facts["here"]:
        console.print(Text("  here  upstream has no such name, or is not installed"))
    chain = facts["patches"]
    if not chain:
        console.print(Text(f"\nNobody changes it{' here' if facts['idle'] or facts['elsewhere'] else ''}."))
        if facts["nearest"]:
            what = "These are changed" if facts["here"] else "Upstream has"
            console.print(Text("\n  ".join([f"{what}, and are the nearest:", *facts["nearest"]])), soft_wrap=True)
    else:
        console.print(Text("\nWhat a call passes through", style="bold"))
    for position, patch in enumerate(chain, 1):
        console.print(Text(f"  {position}  {patch['id']} {VERBS[patch['kind']]} it: {patch['here']}"))
        console.print(_about(patch))
    if chain and all(patch["kind"] == "wrap" for patch in chain):
        console.print(Text(f"  {len(chain) + 1}  upstream's own"))
    for patch in facts["idle"]:
        console.print(Text(f"  idle: {patch['id']}, {shortened(patch['superseded_when'])}"))
    if facts["elsewhere"]:
        console.print(Text(f"  in other releases of upstream: {', '.join(facts['elsewhere'])}"))
    if chain and facts["not_asked"]:
        console.print(Text(f"  not asked whether they need it: {', '.join(facts['not_asked'])}"))
    if facts["sources"]:
        console.print(Text("\nWhat runs: + is the patch's, the rest upstream's", style="bold"))


def _about(patch: Facts) -> Table:
    rows = {
        "fit": patch["detail"],
        "why": patch["reason"],
        "for": for_whom(patch).removesuffix(": ") or "every plugin: it belongs to the layer itself",
        "in": ", ".join(patch["roles"]) or ANYWHERE,
        "needs": ", ".join(patch["needs"]),
        "idle": f"where {patch['superseded_when']}" if patch["superseded_when"] else "",
        "until": patch["retire_when"],
        "upstream": patch["upstream"],
        "code": patch["code"],
    }
    table = Table.grid(padding=(0, 2))
    for label, text in rows.items():
        if text and not (label == "for" and patch["hooks"] and not patch["for"]):
            table.add_row(f"     {label}", Text(text, overflow="fold"))
    return table
