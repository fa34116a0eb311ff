"""`miles-plugins plan --plugins a,b`: what these plugins would change, in which process and order, and whether it fits.

Changes nothing and imports nothing of upstream. Ends with exit code 1 where `slime-train` would end before it starts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from miles_plugins.compat.upstream import slime_problem
from miles_plugins.entrypoints.explain_target import needed_for
from miles_plugins.entrypoints.patch_facts import (
    ABSENT,
    FITS,
    MISFIT,
    OPEN,
    SUPERSEDED,
    Facts,
    explain_patch,
    folders,
    patches_here,
    reading_upstream,
    stacks,
)
from miles_plugins.entrypoints.patch_table import by_process, print_with, show_legend, show_patches
from miles_plugins.errors import PatchError, PluginError
from miles_plugins.manager import Plugins
from miles_plugins.patches.seam import EMBEDDED_ON_CPU, EMBEDDED_ON_GPU, SLIME, Host, Seam, needed_seams
from miles_plugins.patching import Patch

EMBEDDED_PROCESS = "the embedded host's one process"
COUNTED = {FITS: "fit", MISFIT: "do not fit", SUPERSEDED: "idle", OPEN: "known on import", ABSENT: "not installed"}
GPU = Path("/dev/nvidiactl")  # to ask torch would be to import it


@click.command()
@click.option("--plugins", "names", required=True, multiple=True, metavar="NAME[,NAME…]", help="As for slime-train.")
@click.option("--embedded", is_flag=True, help="As for slime-train: for its own small trainer, without slime.")
@click.option("--all", "everything", is_flag=True, help="Every patch by itself: its link, and until when it is needed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(names: Sequence[str], embedded: bool, everything: bool, as_json: bool) -> None:
    """What would be changed, in which process, in which order and why; nothing is changed.

    Ends with exit code 1 where a patch does not fit what is installed, as slime-train would.
    """
    try:
        facts = make_plan([name for value in names for name in value.split(",")], embedded=embedded)
    except PluginError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        print_with(lambda console: _show(console, facts, everything))
    if facts["problems"]:
        command = "slime-train --embedded" if embedded else "slime-train"
        click.echo("\n".join([f"{command} would end before it starts:", *facts["problems"]]), err=True)
        raise SystemExit(1)


def make_plan(names: Sequence[str], *, embedded: bool = False) -> Facts:
    """Everything that the command shows; `--json` prints it as it is.

    Keys:
        plugins: Name -> version, in the order in which they act.
        host: "slime" or "embedded".
        patches: Each as `explain_patch` has it, with `for` (plugin, or host -> the hooks for which it needs the patch;
            empty: every plugin) and `stack` (the ids of all patches of its target, outermost first; of one that is
            superseded none). The embedded host is one process: `roles` then names only that.
        processes: Role -> ids of the patches that must be in place there, by target, outermost first; processes that
            are not touched are not listed. Those under "wherever it is imported" belong to no process in particular.
        upstream: Each top-level package that the patches touch -> its folder here, None if it is not installed.
        problems: Why `slime-train` would end before it starts.

    Raises:
        PluginError: a plugin does not exist, cannot be imported, or not be used with another.
    """
    plugins = Plugins.named(names)
    host = _host(plugins, embedded)
    with reading_upstream():
        here = [(patch, seam) for seam in needed_seams(plugins, host) for patch in patches_here(seam)]
        needs = {seam.name: needed_for(seam, list(plugins)) or _by_host(host, seam) for _, seam in here}
        facts = [_explain(patch, seam, needs[seam.name], embedded) for patch, seam in here]
        superseded = {fact["id"] for fact in facts if fact["here"] == SUPERSEDED}
        problems = _problems(facts, embedded)
        try:
            chains = stacks(patch for patch, _ in here if patch.id not in superseded)
        except PatchError as error:
            chains, problems = [], [*problems, str(error)]
        patches = _in_order(facts, chains)
    return {
        "plugins": {plugin.name: plugin.version for plugin in plugins},
        "host": host.name,
        "patches": patches,
        "processes": {role: [patch["id"] for patch in group] for role, group in by_process(patches)},
        "upstream": folders(patches),
        "problems": problems,
    }


def _host(plugins: Plugins, embedded: bool) -> Host:
    if not embedded:
        return SLIME
    device = plugins.hook.choose_device() or ("cuda" if GPU.exists() else "cpu")
    return EMBEDDED_ON_CPU if device == "cpu" else EMBEDDED_ON_GPU


def _by_host(host: Host, seam: Seam) -> dict[str, list[str]]:
    hooks = [hook for hook in seam.hooks if hook in host.always]
    return {f"the {host.name} host": hooks} if hooks else {}


def _explain(patch: Patch, seam: Seam, needed: dict[str, list[str]], embedded: bool) -> Facts:
    roles = {"roles": [EMBEDDED_PROCESS]} if embedded else {}
    return explain_patch(patch, seam) | roles | {"for": needed}


def _problems(facts: Sequence[Facts], embedded: bool) -> list[str]:
    problem = None if embedded else slime_problem()
    unfit = [fact for fact in facts if fact["refused"] and not (problem and fact["here"] == ABSENT)]
    found = [f"  slime cannot be used: {problem.found}\n    next  {problem.next}"] if problem else []
    return [*found, *(f"  patch {fact['id']}: {fact['here']}: {fact['detail']}" for fact in unfit)]


def _in_order(facts: Sequence[Facts], chains: Sequence[Sequence[Patch]]) -> list[Facts]:
    """The patches of one target behind each other, outermost first, each with its `stack`."""
    by_id = {fact["id"]: fact for fact in facts}
    stack_of = {patch.id: [other.id for other in chain] for chain in chains for patch in chain}
    ids = dict.fromkeys(id for fact in facts for id in stack_of.get(fact["id"], [fact["id"]]))
    return [by_id[id] | {"stack": stack_of.get(id, [])} for id in ids]


# -- what is shown ----------------------------------------------------------------------------------------------------


def _show(console: Console, facts: Facts, in_full: bool) -> None:
    plugins = ", ".join(f"{name} {version}" for name, version in facts["plugins"].items())
    patches = facts["patches"]
    counts = Counter(COUNTED[patch["here"]] for patch in patches)
    found = ", ".join(f"{number} {state}" for state, number in counts.items())
    console.print(Text(f"{plugins}, on {facts['host']}", style="bold"))
    console.print(Text(f"{len(patches)} patches: {found}. Nothing was changed."))
    shown = [patch for patch in patches if in_full or patch["here"] != SUPERSEDED]
    show_legend(console, shown, facts["upstream"])
    console.print()
    show_patches(console, patches, in_full=in_full)
