"""The page of supported stacks: what is said of them in compat/stacks.toml, and what their recorded files say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from miles_plugins.compat.releases import Release, recorded_releases
from miles_plugins.compat.stacks import Stack, listed_stacks
from miles_plugins.entrypoints.patch_facts import FITS, MISFIT, OPEN, SUPERSEDED
from miles_plugins.entrypoints.verdicts import DRIFTED, LEFT_OUT, NOT_HERE

ABOUT_STACKS = """\
A stack is a release of slime with the Megatron-LM commit and the SGLang version of its image. v0.3.1 is tested as a
whole by `make test-upstream`, on CPUs, Python 3.11.

Other versions are not refused by their number: every patch is checked against the code that is installed, and
`slime-train` ends with the name of the first that does not fit. `miles-plugins verify --against DIR` makes the same
check of a checkout or an unpacked wheel ([verify](verify.md)); `miles-plugins fingerprint` says which of these releases
is installed."""

ABOUT_EMBEDDED = """\
The embedded host (`slime-train --embedded`) needs none of these: megatron-core 0.16.1 and transformers 5.12.1, both
from the package index, are what it is tested with. `r3_replay` at the routers was tested on megatron-core 0.14.0 to
Megatron-LM's main, and its recording on SGLang 0.5.9 to 0.5.23, each by itself ([r3_replay](r3_replay.md))."""

ABOUT_RELEASES = """\
Whether all patches, of all plugins, fit by what each release's files define (`compat/fingerprints/`). A superseded
patch changes nothing, as that release does by itself what it is for; one that drifted fits, but was written for fewer
parameters. That a patch fits does not say that the plugin was run there."""

_FITTING = (FITS, DRIFTED)
_NAMED = (DRIFTED, SUPERSEDED, OPEN, LEFT_OUT, MISFIT)  # worth naming one by one


def stack_page() -> list[str]:
    """The parts of docs/compatibility.md below its title."""
    return [
        _stack_table(listed_stacks()),
        ABOUT_STACKS,
        ABOUT_EMBEDDED,
        "## Recorded releases",
        ABOUT_RELEASES,
        _release_table(recorded_releases()),
    ]


def _stack_table(stacks: tuple[Stack, ...]) -> str:
    plugins = list(dict.fromkeys(name for stack in stacks for name in stack.plugins))
    texts = _numbered(stacks)
    columns = ["slime", "Megatron-LM", "SGLang", *(f"`{name}`" for name in plugins)]
    rows = [_row(columns), _row("---" for _ in columns)]
    for stack in stacks:
        slime = stack.slime.replace("main-", "main ") + _marks([stack.note] if stack.note else [], texts)
        supports = [_support(stack, name, texts) for name in plugins]
        rows.append(_row([slime, stack.megatron[:9], stack.sglang, *supports]))
    notes = [f"{number}. {text}" for text, number in texts.items()]
    return "\n".join(rows) + "\n\n" + "\n".join(notes)


def _numbered(stacks: tuple[Stack, ...]) -> dict[str, int]:
    """Every note and reason -> its number below the table."""
    texts: dict[str, int] = {}
    for stack in stacks:
        reasons = [reason for support in stack.plugins.values() for reason in support.reasons]
        for text in ([stack.note] if stack.note else []) + reasons:
            texts.setdefault(text, len(texts) + 1)
    return texts


def _support(stack: Stack, plugin: str, texts: dict[str, int]) -> str:
    support = stack.plugins.get(plugin)
    if support is None:
        return "not checked"
    words = {"limits": "with limits"}.get(support.status, support.status)
    return words + _marks(support.reasons, texts)


def _marks(notes: Sequence[str], texts: dict[str, int]) -> str:
    return f" ({', '.join(str(texts[note]) for note in notes)})" if notes else ""


def _release_table(releases: tuple[Release, ...]) -> str:
    rows = [_row(["release", "patches that fit", "others"]), _row(["---"] * 3)]
    for release in releases:
        judged = {patch: verdict for patch, verdict in release.patches.items() if verdict != NOT_HERE}
        counts = Counter(judged.values())
        fitting = sum(counts[verdict] for verdict in _FITTING)
        others = [
            f"{verdict}: {', '.join(patch for patch, each in judged.items() if each == verdict)}"
            for verdict in _NAMED
            if counts[verdict]
        ]
        rows.append(_row([release.name, f"{fitting} of {len(judged)}", "; ".join(others)]))
    return "\n".join(rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
