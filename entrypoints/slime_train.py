"""`slime-train --plugins a,b [--train-script PATH] <slime flags>`: the user's own train.py, with plugins.

Without --plugins it is `python train.py`, and nothing of ours happens. With --embedded a small trainer of our own runs
in slime's place.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

from miles_plugins.errors import ArgumentError, PluginError, UpstreamError

USAGE = """usage: slime-train [--plugins NAME[,NAME…]] [--train-script PATH] <slime flags>
       slime-train --embedded [--plugins NAME[,NAME…]] <flags>

  --plugins        plugins to turn on, by full or short name (r3 or r3_replay); `miles-plugins list` shows them
  --train-script   slime's train.py or train_async.py, or your own driver; by default the one beside the installed
                   slime, else $SLIME_HOME/train.py, else ./train.py
  --embedded       no slime: a small GRPO trainer in this process, to see plugins work on any machine;
                   `slime-train --embedded --help` shows its flags
  --allow-flag     a flag that slime does not know and your script reads by itself (may be given several times)
  --plugins-help   this text

All other flags go to the train script; `slime-train --plugins r3 --help` shows them with the plugins' own (without a
GPU: `--plugins cpu,r3 --help`)."""


def main(argv: Sequence[str] | None = None) -> None:
    """The console command."""
    argv = sys.argv[1:] if argv is None else argv
    own, flags = _split(argv)
    own.argv = argv
    if own.plugins_help:
        print(USAGE)
        return
    try:
        if own.embedded:
            sys.exit(_run_embedded(own, flags))
        _run(own, flags)
    except KeyboardInterrupt:
        if not own.embedded:  # the train script's own affair
            raise
        sys.exit(130)
    except Exception as error:
        known = plugin_error(error)
        if known is None:
            raise
        print(f"\nslime-train: {known}", file=sys.stderr)
        sys.exit(1)


def _split(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and the rest for slime, which must never see ours."""
    parser = argparse.ArgumentParser(prog="slime-train", add_help=False, allow_abbrev=False)
    parser.add_argument("--plugins", action="append", default=[])
    parser.add_argument("--train-script")
    parser.add_argument("--allow-flag", action="append", default=[])
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--plugins-help", action="store_true")
    return parser.parse_known_args(argv)


def _run_embedded(own: argparse.Namespace, flags: list[str]) -> int:
    from miles_plugins.embedded.command import main as embedded_main

    names = _named(own)
    unfit = {"--train-script": own.train_script, "--allow-flag": ", ".join(own.allow_flag)}
    if any(unfit.values()):
        raise ArgumentError("--embedded runs no train script", unfit, "leave these flags out")
    if not getattr(sys.flags, "safe_path", False):
        sys.path.append(os.getcwd())  # for a reward function beside the prompts
    return embedded_main(names, flags)


def _named(own: argparse.Namespace) -> list[str]:
    """The names in --plugins, all of them known."""
    names = [name.strip() for value in own.plugins for name in value.split(",")]
    if "" in names:
        raise ArgumentError(
            "--plugins has an empty name", {"found": own.plugins}, "leave it out, or all of --plugins to train without"
        )
    refuse_slips(names, own.argv, own.allow_flag)
    return names


def _run(own: argparse.Namespace, flags: list[str]) -> None:
    from miles_plugins.compat.upstream import find_train_script, slime_problem

    names = _named(own)
    script = find_train_script(own.train_script)
    if script is None and not own.train_script and {"--help", "-h"} & set(flags):
        print(USAGE)
        return
    if script is None:
        problem = None if own.train_script else slime_problem()
        raise UpstreamError(
            "no train script was found" if own.train_script is None else f"no such file: {own.train_script}",
            {"found": problem.found if problem else None},
            f"{problem.next if problem else 'give train.py with --train-script, or set SLIME_HOME'}\n"
            "without slime there is `slime-train --embedded`, a small trainer of our own",
        )
    # As `python train.py` has it: the script's folder first (not with -P), and the script as argv[0].
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(script.resolve().parent)
    sys.argv = [str(Path(own.train_script).expanduser()) if own.train_script else str(script), *flags]
    if names:
        _begin(names, script, flags, own.allow_flag)
    run_as_main(script.absolute())


def refuse_slips(names: Sequence[str], argv: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse what looks like --plugins and would train without a plugin: `--plugin r3`, or `--plugins cpu r3`."""
    slip = next((word for word in argv if word.split("=")[0] == "--plugin"), None)
    if slip and "plugin" not in [flag.lstrip("-") for flag in allowed]:
        raise ArgumentError(f"there is no flag {slip}", next="write --plugins")
    for flag, value, after in zip(argv, argv[1:], argv[2:], strict=False):
        if flag == "--plugins" and not after.startswith("-"):
            raise ArgumentError(
                f"{after!r} stands alone after --plugins {value}", next="separate names with commas, without spaces"
            )
    if names:
        from miles_plugins.manager import installed_plugins, resolve_names

        resolve_names(names, installed_plugins())  # a misspelt plugin is said before a missing slime is looked for


def run_as_main(script: Path) -> None:
    """Run a script as Python runs it; runpy would put its own idea of the path into `sys.argv[0]`."""
    module = types.ModuleType("__main__")
    module.__file__ = str(script)
    sys.modules["__main__"] = module
    exec(compile(script.read_bytes(), str(script), "exec"), module.__dict__)


def _begin(names: list[str], script: Path, flags: list[str], allowed: list[str]) -> None:
    """Select the plugins, check every patch against the installed source, arm them."""
    from miles_plugins.activation import RUN, activate
    from miles_plugins.compat.upstream import slime_problem

    if problem := slime_problem():
        raise UpstreamError("slime cannot be used", {"found": problem.found}, problem.next)
    # The command line names the plugins, also where the job's environment already does (a run inside a run).
    activation = activate(names, "driver", environment={RUN: os.environ.get(RUN, "")})
    activation.allowed_flags = tuple(f"--{flag.lstrip('-')}" for flag in allowed)
    try:
        notes = activation.check()
    except PluginError as error:
        raise type(error)(
            f"{error.message}; nothing was changed and nothing was started", error.facts, error.next
        ) from error
    os.environ.update(activation.process_environment("driver"))
    added = [list(defaults) for defaults in activation.hook.default_flags(flags=tuple(flags))]
    sys.argv[1:] = [word for defaults in added for word in defaults] + flags
    _announce(f"plugins {', '.join(f'{p.name} {p.version}' for p in activation.plugins)} [{activation.plugins.digest}]")
    _announce(f"script  {script}")
    for defaults in filter(None, added):
        _announce(f"added   {' '.join(defaults)}")
    for note in (note for note in notes if note.startswith("drifted")):
        _announce(f"note    {note}")


def _announce(line: str) -> None:
    print(f"slime-train: {line}", file=sys.stderr, flush=True)


def plugin_error(error: BaseException) -> PluginError | None:
    """The error of ours inside another one: Ray wraps what its workers raise."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        cause = getattr(link, "cause", None)
        if isinstance(link, PluginError) and not isinstance(cause, BaseException):
            return link
        chain += [cause if isinstance(cause, BaseException) else None, link.__cause__]
        chain += [] if link.__suppress_context__ else [link.__context__]
    return _quoted_error(str(error))


def _quoted_error(text: str) -> PluginError | None:
    """Our error in the text of Ray's: a worker that dies while it starts leaves nothing but its traceback."""
    _, found, rest = text.partition("\nmiles_plugins.errors.")
    return PluginError(rest.partition(": ")[2].split("\n\n")[0].rstrip()) if found else None


if __name__ == "__main__":
    main()
