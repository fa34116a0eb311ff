"""`slime-train --embedded`: set one process up, run, show, and leave a folder that can be read.

Exit code: 0 when every rollout was trained on, 1 for a mistake or a failure, 130 on Ctrl-C.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from miles_plugins.activation import Activation, activate
from miles_plugins.console import Interrupted, interruptible
from miles_plugins.embedded import arguments, checkpoint, report
from miles_plugins.embedded.display import Display
from miles_plugins.embedded.recorder import METRICS, Recorder, write_atomically
from miles_plugins.embedded.results import RolloutResult, read_results, summarize
from miles_plugins.embedded.samples import Prompts, load_reward
from miles_plugins.errors import ArgumentError, UpstreamError
from miles_plugins.manager import Plugins

if TYPE_CHECKING:
    import torch

ARGUMENTS, PROCESSES, REPORT, MODEL, PROMPTS = (
    *("arguments.json", "processes.json", "report.png", "model", "prompts.jsonl"),
)
NEEDED = ("torch", "transformers", "megatron.core", "matplotlib", "tensorboard")
WITH, WITHOUT = "with", "without"  # folders of --compare


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
    if args.compare:
        return compare(args, plugins, flags)
    return train(args, plugins)


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


def train(args: Namespace, plugins: Plugins) -> int:
    """One run, from an empty folder or a checkpoint to the report."""
    console = Console(stderr=True)
    folder: Path = args.run_folder
    title = ", ".join(plugins.names) or "no plugins"
    interrupted: Interrupted | None = None
    with interruptible() as ignore_signals:
        try:
            _check_folders(args)
            done = _rollouts_done(args)
            with Display(console, args.num_rollout, done=done, title=f"embedded host, {title}") as display:
                display.phase("loading")
                _train(args, plugins, display)
        except Interrupted as interruption:
            interrupted = interruption
        ignore_signals()  # what follows is short, and leaves the folder whole
        results = read_results(folder / METRICS)
        if results:
            _write_report(folder, {f"with {title}" if plugins.names else "without plugins": results})
    if args.json:
        print(json.dumps({**report.to_json(results), "folder": str(folder), "interrupted": interrupted is not None}))
    elif results:
        _console().print(report.summary_table(summarize(results), title=f"Embedded host, {title}"))
        _console().print(f"everything is in {escape(_shown(folder))}: {METRICS}, {REPORT}, {PROCESSES}, tensorboard/")
    if interrupted is not None:
        console.print(f"interrupted by {interrupted} after {len(results)} of {args.num_rollout} rollouts")
        return 128 + interrupted.signal_number
    return 0


def _train(args: Namespace, plugins: Plugins, display: Display) -> None:
    activation, device = _activate(plugins, args)
    with _model(args) as model_folder, _megatron(args, device):
        activation.hook.configure(args=args)
        _make_run_folder(args, model_folder)
        from miles_plugins.embedded.host import EmbeddedRun

        run = EmbeddedRun(args, activation, device)
        _write_json(args.run_folder / PROCESSES, run.reports)
        with Recorder(args.run_folder, resume_from=run.first_rollout if args.load else None) as recorder:
            for result in run.rollouts(recorder, display.phase):
                display.show(result)


def _activate(plugins: Plugins, args: Namespace) -> tuple[Activation, torch.device]:
    """Choose the device, arm the patches of this host, check them, and quiet what upstream says about the CPU."""
    for role in ("driver", "worker", "trainer"):  # this process is all of them
        for _, variables in plugins.ask_each("process_environment", role=role):
            for name, value in variables.items():
                os.environ.setdefault(name, value)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than a small run
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from miles_plugins.patches.seam import EMBEDDED_ON_CPU, EMBEDDED_ON_GPU

    chosen = plugins.hook.choose_device()
    device = torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    host = EMBEDDED_ON_CPU if device.type == "cpu" else EMBEDDED_ON_GPU
    activation = activate(plugins.names, "driver", environment={}, host=host)
    activation.check()
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.nn\.functional")
    for name in ("megatron.core", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return activation, device


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


# -- folders ---------------------------------------------------------------------------------------------------------


def _check_folders(args: Namespace) -> None:
    """Refuse, before anything is loaded, folders that hold another run's results, and those that cannot be written."""
    folder = args.run_folder
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"--run-folder {folder} is a file", next="name a new folder")
    resumed = args.load and (folder / ARGUMENTS).exists()
    if folder.exists() and any(folder.iterdir()) and not resumed:
        raise ArgumentError(f"--run-folder {folder} is not empty", next="name a new folder")
    if args.save and checkpoint.holds_one(args.save) and args.save != args.load:
        raise ArgumentError(
            f"--save {args.save} holds checkpoints of another run", next="name a new folder, or --load the same one"
        )
    for wanted in filter(None, (folder, args.save)):
        try:
            wanted.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=wanted) as file:
                file.write(bytes(1 << 16))
        except OSError as error:
            raise ArgumentError(
                f"{wanted} cannot be written", {"reason": error.strerror or error}, "choose another folder"
            ) from error


def _rollouts_done(args: Namespace) -> int:
    """How many rollouts --load brings. Raises ArgumentError if there is no checkpoint, or nothing left to do."""
    done = checkpoint.latest(args.load) if args.load else 0
    if done >= args.num_rollout:
        raise ArgumentError(
            "the checkpoint already has all rollouts",
            {"in it": done, "--num-rollout": args.num_rollout},
            "give a larger --num-rollout: it counts from the very start",
        )
    return done


@contextmanager
def _model(args: Namespace) -> Iterator[Path | None]:
    """Give `args` the model's shape; for a random model also write it, beside the run folder until all is checked."""
    from miles_plugins.embedded.hugging_face import check_model_folder
    from miles_plugins.embedded.policy import shape_of

    given = {name: value for name in arguments.TINY if (value := getattr(args, name)) is not None}
    with tempfile.TemporaryDirectory() as temporary:
        written: Path | None = None
        if args.hf_checkpoint is None:
            written = Path(temporary) / MODEL
            try:
                _write_random_model(written, args.seed, {**arguments.TINY, **given})
            except ValueError as error:
                raise ArgumentError("the embedded host cannot make a model of this shape", {"found": error}) from error
        source = written or args.hf_checkpoint
        shape = shape_of(check_model_folder(source), source)
        if written is None:
            for name, value in given.items():
                if value != shape[name]:
                    raise ArgumentError(
                        f"--{name.replace('_', '-')} {value} is not what the checkpoint has",
                        {"checkpoint": shape[name], "in": source},
                        "leave the flag out: the shape comes from config.json",
                    )
        for name, value in shape.items():
            setattr(args, name, value)
        yield written


def _write_random_model(folder: Path, seed: int, shape: Mapping[str, int]) -> None:
    from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model

    write_tiny_model(
        folder,
        seed=seed,
        layers=shape["num_layers"],
        hidden_size=shape["hidden_size"],
        experts=shape["num_experts"],
        topk=shape["moe_router_topk"],
    )


def _make_run_folder(args: Namespace, model_folder: Path | None) -> None:
    """Put the random model, the built-in prompts and the effective arguments into the run folder."""
    from miles_plugins.cpu_rehearsal import toy_task

    folder = args.run_folder
    try:
        if model_folder is not None:
            args.hf_checkpoint = folder / MODEL
            if not args.hf_checkpoint.exists():  # a resumed run has it already, and the seed makes the same again
                shutil.copytree(model_folder, args.hf_checkpoint)
        if args.prompt_data is None:
            args.prompt_data = folder / PROMPTS
            toy_task.write_prompts(args.prompt_data, 256, args.seed)
    except OSError as error:
        raise ArgumentError(f"{folder} cannot be written", {"reason": error.strerror or error}) from error
    _write_json(folder / ARGUMENTS, {name: _plain(value) for name, value in sorted(vars(args).items())})


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)


def _write_json(file: Path, content: Any) -> None:
    try:
        write_atomically(file, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
    except OSError as error:
        raise ArgumentError(f"{file} cannot be written", {"reason": error.strerror or error}) from error


def _write_report(folder: Path, runs: Mapping[str, Sequence[RolloutResult]]) -> None:
    try:
        report.write_report(folder / REPORT, runs, title="Embedded host: GRPO on a small mixture of experts")
    except OSError as error:
        raise ArgumentError(f"{folder / REPORT} cannot be written", {"reason": error.strerror or error}) from error


# -- two runs --------------------------------------------------------------------------------------------------------


def compare(args: Namespace, plugins: Plugins, flags: Sequence[str]) -> int:
    """The same run without and with the plugins, each in a process of its own; then both side by side."""
    if not plugins.names:
        raise ArgumentError("--compare needs plugins to compare with", next="name them: --plugins r3")
    folder = args.run_folder
    _check_folders(args)
    with_plugins = [word for word in flags if word not in ("--compare", "--json")]
    commands = {
        WITHOUT: arguments.baseline_flags(flags, plugins),
        WITH: ["--plugins", ",".join(plugins.names), *with_plugins],
    }
    for run, words in commands.items():
        command = [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", "--embedded", *words]
        code = _run([*command, "--run-folder", str(folder / run)])
        if code != 0:
            return code
    results = {run: read_results(folder / run / METRICS) for run in commands}
    names = ", ".join(plugins.names)
    _write_report(folder, {"without plugins": results[WITHOUT], f"with {names}": results[WITH]})
    if args.json:
        print(json.dumps({run: report.to_json(found) for run, found in results.items()} | {"folder": str(folder)}))
    else:
        summaries = {run: summarize(found) for run, found in results.items()}
        _console().print(report.comparison_table(summaries[WITH], summaries[WITHOUT], plugins=names))
        _console().print(f"everything is in {escape(_shown(folder))}: {REPORT}, {WITH}/, {WITHOUT}/")
    return 0


def _run(command: Sequence[str]) -> int:
    """One of the two; its tables are not shown. When interrupted, wait until it has left its folder readable."""
    # In a session of its own a Ctrl-C reaches it once, from here.
    with interruptible() as ignore, subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as run:
        try:
            return run.wait()
        except Interrupted as interruption:
            ignore()
            with suppress(ProcessLookupError):
                run.send_signal(interruption.signal_number)
            with suppress(subprocess.TimeoutExpired):
                run.wait(timeout=30)
            run.kill()
            return 128 + interruption.signal_number


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)


def _shown(folder: Path) -> str:
    with suppress(ValueError):
        return str(folder.relative_to(Path.cwd()))
    return str(folder)
