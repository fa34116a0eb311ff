"""slime's command line: plugins add flags and check the result; an unknown flag is an error.

slime >= v0.2.3 parses one command line with three parsers and ignores what none of them knows, so a mistyped flag, or a
flag of a plugin that is not active, would be lost without a word.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from miles_plugins.activation import ROLE, current
from miles_plugins.errors import ArgumentError
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch

# Option strings of slime's parsers, filled while they are built. slime's first, small parser (`_pre_parse_mode`) builds
# its own; its flags are these.
_PRE_PARSED = ("--train-backend", "--debug-rollout-only", "--debug-train-only", "--load-debug-rollout-data")
_main_options: set[str] = set()
_sglang_options: set[str] = set()


def add_plugin_arguments(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Extend the function that slime hands to Megatron's parser."""
    add_slime_arguments = original(*args, **kwargs)

    def add_all_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_slime_arguments(parser)
        plugins = current().plugins
        for plugin in plugins:
            if plugin.implements("register_arguments"):
                plugins.ask(plugin, "register_arguments", parser=parser.add_argument_group(f"plugin {plugin.name}"))
        for action in parser._actions:
            if isinstance(action.help, tuple):  # a comma too many, before v0.3.0: --help would end in an error
                action.help = "".join(action.help)
        # Megatron's parser. slime v0.2.2 first builds one without its flags, only to ask for --train-backend.
        if not parser.allow_abbrev:
            _main_options.update(parser._option_string_actions)
        return parser

    return add_all_arguments


def record_sglang_options(
    original: Callable[..., Any], parser: argparse.ArgumentParser, *args: Any, **kwargs: Any
) -> Any:
    """Remember the flags that slime takes from SGLang; slime v0.2.2 adds them to the parser that has all others."""
    before = set(parser._option_string_actions)
    result = original(parser, *args, **kwargs)
    _sglang_options.update(set(parser._option_string_actions) - before)
    return result


def parse_args(original: Callable[..., Any], *args: Any, **kwargs: Any) -> argparse.Namespace:
    """slime's `parse_args`, then the plugins' own checks."""
    try:
        parsed: argparse.Namespace = original(*args, **kwargs)
    except (Exception, SystemExit) as error:
        if getattr(error, "code", 1) != 0:  # not --help: a mistyped flag may well be what slime complains about
            check_flags(error)
        raise
    check_flags()
    activation = current()
    refuse_external_engines(parsed)
    activation.hook.configure(args=parsed)
    # The user's --train-env-vars win over a plugin's.
    parsed.train_env_vars = {**activation.process_environment("trainer"), **parsed.train_env_vars, ROLE: "trainer"}
    return parsed


def check_flags(cause: BaseException | None = None) -> None:
    """Refuse what no parser of slime's knows, as soon as they are built."""
    if not _main_options:
        if cause is not None:
            return  # slime stopped before it built its parser
        raise ArgumentError("the flags could not be checked: slime did not build its parser where it was expected")
    if not _sglang_options:  # slime skips that parser when it starts no engines; its flags may stand there all the same
        from slime.backends.sglang_utils.arguments import add_sglang_arguments

        add_sglang_arguments(argparse.ArgumentParser(add_help=False))
    exact = {*_PRE_PARSED, *_main_options, *current().allowed_flags}
    try:
        # SGLang's flags that stand in the main parser (slime v0.2.2) are taken by their whole names, as all there.
        refuse_unknown_flags(sys.argv[1:], exact, _sglang_options - _main_options)
    except ArgumentError as error:
        raise error from cause


def refuse_unknown_flags(argv: Sequence[str], exact: Iterable[str], abbreviated: Iterable[str] = ()) -> None:
    """Raise for every flag that no parser knows, with the nearest known one.

    Megatron's parser takes a flag by its whole name (`exact`), SGLang's also by a beginning of it (`abbreviated`).
    """
    exact, abbreviated = set(exact), sorted(abbreviated)
    known = sorted([*exact, *abbreviated])
    unknown = [
        flag
        for flag in dict.fromkeys(word.split("=", 1)[0] for word in argv if word.startswith("--") and word != "--")
        if flag not in exact and not any(option.startswith(flag) for option in abbreviated)
    ]
    if unknown:
        near = {flag: "".join(difflib.get_close_matches(flag, known, n=1)) for flag in unknown}
        raise ArgumentError(
            "unknown flag" + ("s" if len(unknown) > 1 else "") + ": slime would ignore what it does not know",
            {flag: f"did you mean {match}?" if match else "nothing is named like it" for flag, match in near.items()},
            "correct it; a plugin's flags exist only while the plugin is in --plugins; --allow-flag NAME lets one pass "
            "that your script reads by itself",
        )


def refuse_external_engines(args: argparse.Namespace) -> None:
    """Engines that somebody else launched are outside our process tree, so a plugin's engine side cannot act there."""
    if not getattr(args, "rollout_external", False):
        return
    affected = [plugin.name for plugin in current().plugins if any("sglang" in side for side in plugin.sides)]
    if affected:
        raise ArgumentError(
            "externally launched SGLang engines cannot be patched from here",
            {"plugins": ", ".join(affected), "engines": ", ".join(args.rollout_external_engine_addrs)},
            "let slime launch the engines (leave --rollout-external-engine-addrs out), or leave the plugins out",
        )


SEAMS = (
    Seam(
        name="arguments",
        hooks=(),
        patches=(
            Patch(
                id="slime.arguments.register",
                target="slime.utils.arguments:get_slime_extra_args_provider",
                wrap=add_plugin_arguments,
                signature="(add_custom_arguments=None)",
                roles=frozenset({"driver"}),
                reason="train.py calls parse_args() without its add_custom_arguments",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/utils/arguments.py",
                retire_when="slime discovers plugins' arguments itself",
            ),
            Patch(
                id="slime.arguments.sglang-options",
                target="slime.backends.sglang_utils.arguments:add_sglang_arguments",
                wrap=record_sglang_options,
                signature="(parser)",
                reason="slime ignores unknown flags; all known ones must be collected to refuse the others",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/backends/sglang_utils/arguments.py",
                retire_when="slime refuses unknown flags",
            ),
            Patch(
                id="slime.arguments.configure",
                target="slime.utils.arguments:parse_args",
                wrap=parse_args,
                signature="(add_custom_arguments=None)",
                roles=frozenset({"driver"}),
                reason="slime has no hook after argument validation",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/utils/arguments.py",
                retire_when="slime has such a hook",
            ),
        ),
    ),
)
