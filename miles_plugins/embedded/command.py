"""`slime-train --embedded`: set one process up, run, show, and leave a folder that can be read.

Exit code: 0 when every rollout was trained on, 1 for a mistake or a failure, 130 on Ctrl-C.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from miles_plugins.activation import Activation, activate
from miles_plugins.console import Interrupted, Interruption, interruptible
from miles_plugins.embedded import arguments, random_state, report
from miles_plugins.embedded.display import Display
from miles_plugins.embedded.recorder import METRICS, Recorder
from miles_plugins.embedded.results import RolloutResult, summarize
from miles_plugins.embedded.run_folder import (
    PROCESSES,
    REPORT,
    begin_or_continue,
    finished_rollouts,
    run_folder,
    write_arguments,
    write_inputs,
    write_json,
    write_report,
)
from miles_plugins.embedded.samples import Prompts, load_reward
from miles_plugins.errors import ArgumentError, PluginError, UpstreamError
from miles_plugins.manager import Plugins

if TYPE_CHECKING:
    import torch

NEEDED = ("torch", "transformers", "megatron.core", "matplotlib", "tensorboard")
WITH, WITHOUT = "with", "without"  # folders of --compare
PATIENCE_SECONDS = 30.0  # for one run of a comparison to leave its folder readable


def main(names: Sequence[str], flags: Sequence[str]) -> int:
    """Run the embedded host. Returns the exit code.

    Raises:
        PluginError: one readable block for whatever the user can mend.
    """
    plugins = Plugins.named(names)
    args = arguments.parse(flags, plugins)
    arguments.complete(args)
    require_packages()
    load_reward(args.custom_rm_path)
    if args.prompt_data is not None:
        Prompts(args)
    if args.use_rollout_routing_replay and not plugins.implement("take_routed_experts"):
        raise ArgumentError(
            "--use-rollout-routing-replay is given and nothing replays", next="name the plugin that does: --plugins r3"
        )
    if args.mtp_num_layers and not plugins.implement("draft_targets"):
        raise ArgumentError(
            "--mtp-num-layers is given, and stock Megatron cannot run a model with a draft here",
            {"why": "it wants labels for the draft in every pass, and trains the policy with the draft's loss"},
            "name the plugin that trains it: --plugins spec; or leave the flag out",
        )
    done = begin_or_continue(args)
    return compare(args, plugins, flags) if args.compare else train(args, plugins, done)


def require_packages() -> None:
    """Raises UpstreamError naming what is not installed; imports nothing."""
    from importlib.util import find_spec

    missing = [name for name in NEEDED if not _can_find(find_spec, name)]
    if missing:
        raise UpstreamError(
            "the embedded host needs packages that are not installed",
            {"missing": ", ".join(missing), "in": sys.executable},
            'pip install "miles-plugins[embedded]"   (from a clone: pip install -e ".[embedded]")',
        )


def _can_find(find_spec: Any, name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


# -- one run ---------------------------------------------------------------------------------------------------------


def train(args: Namespace, plugins: Plugins, done: int) -> int:
    """One run, from an empty folder or a checkpoint of `done` rollouts to the report."""
    console = Console(stderr=True)
    title = f"Embedded host, {_name(plugins)}"
    with interruptible() as interruption:
        try:
            if done:
                console.print(f"going on from {args.load}, which has {done} rollouts", highlight=False, soft_wrap=True)
            # What a plugin prints must not stand in the JSON.
            with redirect_stdout(sys.stderr) if args.json else nullcontext(), run_folder(args):  # noqa: SIM117
                with Display(console, args.num_rollout, done=done, title=title) as display:
                    _train(args, plugins, display, interruption)
        except BaseException as error:
            # Whatever a signal turned into on its way out of upstream's code, it was the signal.
            if interruption.received is None:
                if isinstance(error, PluginError):
                    with suppress(PluginError):  # the first error says more
                        _draw(args.run_folder, plugins)
                raise
        interruption()  # what follows is short, and leaves the folder whole
        results = _draw(args.run_folder, plugins)
    interrupted = interruption.received
    if args.json:
        shown = {"folder": str(args.run_folder), "interrupted": interrupted is not None}
        print(json.dumps({**report.to_json(results), **shown}))
    elif results:
        _console().print(report.summary_table(summarize(results), title=title))
        _console().print(
            f"{escape(_shown(args.run_folder / REPORT))}, and beside it {METRICS}, {PROCESSES}, tensorboard/"
        )
    if interrupted is None:
        return 0
    console.print(f"interrupted by {interrupted} after {len(results)} of {args.num_rollout} rollouts")
    return 128 + interrupted.signal_number


def _name(plugins: Plugins) -> str:
    return f"with {', '.join(plugins.names)}" if plugins.names else "without plugins"


def _draw(folder: Path, plugins: Plugins) -> list[RolloutResult]:
    """The report of what was measured so far, if anything was."""
    results = finished_rollouts(folder)
    if results:
        write_report(folder, {_name(plugins): results})
    return results


def _train(args: Namespace, plugins: Plugins, display: Display, interruption: Interruption) -> None:
    def phase(text: str) -> None:
        interruption.check()
        display.phase(text)

    phase("loading")
    activation, device = _activate(plugins, args)
    write_inputs(args, lambda folder: activation.hook.prepare_tiny_model(folder=folder))
    activation.hook.configure(args=args)
    write_arguments(args)
    with _megatron(args, device):
        from miles_plugins.embedded.host import EmbeddedRun

        run = EmbeddedRun(args, activation, device)
        write_json(args.run_folder / PROCESSES, run.reports)
        with Recorder(args.run_folder, resume_from=run.first_rollout if args.load else None) as recorder:
            for result in run.rollouts(recorder, phase):
                display.show(result)


def _activate(plugins: Plugins, args: Namespace) -> tuple[Activation, torch.device]:
    """Choose the device, arm the patches of this host, check them, and quiet what upstream says about the CPU."""
    wanted: dict[str, str] = {}
    for role in ("driver", "worker", "trainer"):  # this process is all of them
        for _, variables in plugins.ask_each("process_environment", role=role):
            wanted |= variables
    # Compiling takes longer than a small run.
    for name, value in {"TORCHDYNAMO_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", **wanted}.items():
        os.environ.setdefault(name, value)
    import torch

    from miles_plugins.patches.seam import EMBEDDED_ON_CPU, EMBEDDED_ON_GPU

    chosen = plugins.hook.choose_device()
    device = torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(args.threads)
    random_state.seed(args.seed)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    host = EMBEDDED_ON_CPU if device.type == "cpu" else EMBEDDED_ON_GPU
    activation = activate(plugins.names, "driver", environment={}, host=host)
    activation.check()
    quiet_upstream()
    return activation, device


def quiet_upstream() -> None:
    """Keep what upstream says about the CPU, and the progress of loading a tiny model, from the terminal."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.nn\.functional")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("megatron.core", "transformers"):  # now: transformers sets its own when it is imported
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _megatron(args: Namespace, device: torch.device) -> Iterator[None]:
    """Megatron's process groups for this one process; its store is in memory, and nothing listens anywhere."""
    import torch.distributed
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    backend = "gloo" if device.type == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(args.seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


# -- two runs --------------------------------------------------------------------------------------------------------


def compare(args: Namespace, plugins: Plugins, flags: Sequence[str]) -> int:
    """The same run without and with the plugins, each in a process of its own; then both side by side."""
    if not plugins.names:
        raise ArgumentError("--compare needs plugins to compare with", next="name them: --plugins r3")
    folder: Path = args.run_folder
    with_plugins = [word for word in flags if word not in ("--compare", "--json")]
    commands = {
        WITHOUT: arguments.baseline_flags(flags, plugins),
        WITH: ["--plugins", ",".join(plugins.names), *with_plugins],
    }
    with run_folder(args):
        for run, words in commands.items():
            print("without plugins:" if run == WITHOUT else f"{_name(plugins)}:", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", "--embedded", *words]
            code = _run([*command, "--json", "--run-folder", str(folder / run)])
            if code != 0:
                if any(folder.iterdir()):
                    print(f"what was finished is in {_shown(folder)}", file=sys.stderr)
                return code
    results = {run: finished_rollouts(folder / run) for run in (WITH, WITHOUT)}
    write_report(folder, {_name(plugins): results[WITH], "without plugins": results[WITHOUT]})
    if args.json:
        print(json.dumps({run: report.to_json(found) for run, found in results.items()} | {"folder": str(folder)}))
    else:
        summaries = {run: summarize(found) for run, found in results.items()}
        table = report.comparison_table(summaries[WITH], summaries[WITHOUT], plugins=", ".join(plugins.names))
        _console().print(table)
        _console().print(f"{escape(_shown(folder / REPORT))}, and beside it {WITH}/, {WITHOUT}/")
    return 0


def _run(command: Sequence[str]) -> int:
    """One of the two; its result is not shown. When interrupted, wait until it has left its folder readable."""
    # In a session of its own a Ctrl-C reaches it once, from here.
    with (
        interruptible() as interruption,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as run,
    ):
        try:
            return run.wait()
        except Interrupted as interrupted:
            interruption()
            with suppress(ProcessLookupError):
                run.send_signal(interrupted.signal_number)
            with suppress(subprocess.TimeoutExpired):
                run.wait(timeout=PATIENCE_SECONDS)
            run.kill()
            return 128 + interrupted.signal_number


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)


def _shown(folder: Path) -> str:
    with suppress(ValueError):
        return str(folder.relative_to(Path.cwd()))
    return str(folder)
