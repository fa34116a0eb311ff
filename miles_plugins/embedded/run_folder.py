"""The folder of one run: what may go into it, what is in it, and that a run which measured nothing leaves nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from miles_plugins.cpu_rehearsal import toy_task
from miles_plugins.embedded import arguments, checkpoint, report
from miles_plugins.embedded.recorder import METRICS, write_atomically
from miles_plugins.embedded.results import RolloutResult, read_results
from miles_plugins.errors import ArgumentError

ARGUMENTS, PROCESSES, REPORT, MODEL, PROMPTS = (
    *("arguments.json", "processes.json", "report.png", "model", "prompts.jsonl"),
)
BUILT_IN_PROMPTS = 256


@contextmanager
def run_folder(args: Namespace) -> Iterator[None]:
    """Make the folder; should the run end before it has measured anything, take out again what it put there.

    Raises:
        ArgumentError: another run's results are in it or in --save, or it cannot be written.
    """
    folder: Path = args.run_folder
    before = set(folder.iterdir()) if folder.is_dir() else None
    _refuse_foreign(args)
    for wanted in filter(None, (folder, args.save)):
        _try_writing(wanted)
    try:
        yield
    except BaseException:
        if not any(metrics.stat().st_size for metrics in folder.rglob(METRICS)):
            _remove_all(folder, before)
        raise


def _refuse_foreign(args: Namespace) -> None:
    folder = args.run_folder
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"--run-folder {folder} is a file", next="name a new folder")
    if folder.exists() and any(folder.iterdir()) and not (args.load and _run_of(folder) == args.run_id):
        raise ArgumentError(
            f"--run-folder {folder} is not empty",
            {"in it": "another run than the checkpoint's" if args.load else None},
            "name a new folder",
        )
    if args.save and checkpoint.holds_one(args.save) and args.save != args.load:
        raise ArgumentError(
            f"--save {args.save} holds checkpoints of another run", next="name a new folder, or --load the same one"
        )


def _run_of(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / ARGUMENTS).read_text())["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _try_writing(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise ArgumentError(
            f"{folder} cannot be written", {"reason": error.strerror or error}, "choose another folder"
        ) from error


def _remove_all(folder: Path, kept: set[Path] | None) -> None:
    for path in set(folder.iterdir()) - (kept or set()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kept is None:
        with suppress(OSError):
            folder.rmdir()


def begin_or_continue(args: Namespace) -> int:
    """Set `args.run_id`; the number of rollouts that --load brings.

    Raises:
        ArgumentError: there is no checkpoint, or nothing left to do.
    """
    if not args.load:
        args.run_id = uuid.uuid4().hex[:12]
        return 0
    found = checkpoint.describe(args.load)
    args.run_id = found["run"]
    done: int = found["rollouts"]
    if done >= args.num_rollout:
        raise ArgumentError(
            "the checkpoint already has all rollouts",
            {"in it": done, "--num-rollout": args.num_rollout},
            "give a larger --num-rollout: it counts from the very start",
        )
    return done


def write_inputs(args: Namespace, prepare: Callable[[Path], Path | None] = lambda _: None) -> None:
    """The random model and the built-in prompts, where the user gave none, and the model's shape into `args`.

    `prepare` may make another checkpoint of the random model, and returns that.

    Raises:
        ArgumentError: the model cannot be made or read, or the folder cannot be written.
    """
    from miles_plugins.embedded.hugging_face import check_model_folder
    from miles_plugins.embedded.policy import shape_of

    given = {name: value for name in arguments.TINY if (value := getattr(args, name)) is not None}
    random_model = args.hf_checkpoint is None
    if random_model:
        args.hf_checkpoint = args.run_folder / MODEL
        drafts = bool(args.mtp_num_layers or args.sglang_speculative_algorithm)
        _write_random_model(args.hf_checkpoint, args.seed, {**arguments.TINY, **given}, drafts=drafts)
        args.hf_checkpoint = prepare(args.hf_checkpoint) or args.hf_checkpoint
    if args.sglang_speculative_algorithm and args.sglang_speculative_draft_model_path is None:
        args.sglang_speculative_draft_model_path = args.hf_checkpoint  # what SGLang does for models that it knows
    shape = shape_of(check_model_folder(args.hf_checkpoint), args.hf_checkpoint)
    for name, value in given.items():
        if value != shape[name] and not random_model:
            raise ArgumentError(
                f"--{name.replace('_', '-')} {value} is not what the checkpoint has",
                {"checkpoint": shape[name], "in": args.hf_checkpoint},
                "leave the flag out: the shape comes from config.json",
            )
    for name, value in shape.items():
        setattr(args, name, value)
    if args.prompt_data is None:
        args.prompt_data = args.run_folder / PROMPTS
        try:
            toy_task.write_prompts(args.prompt_data, BUILT_IN_PROMPTS, args.seed)
        except OSError as error:
            raise _unwritable(args.prompt_data, error) from error


def _write_random_model(folder: Path, seed: int, shape: Mapping[str, int], *, drafts: bool) -> None:
    from safetensors import SafetensorError

    from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model
    from miles_plugins.embedded.draft import add_random_draft

    try:
        write_tiny_model(
            folder,
            seed=seed,
            layers=shape["num_layers"],
            hidden_size=shape["hidden_size"],
            experts=shape["num_experts"],
            topk=shape["moe_router_topk"],
        )
        if drafts:
            add_random_draft(folder, seed)
    except ValueError as error:
        raise ArgumentError("the embedded host cannot make a model of this shape", {"found": error}) from error
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error


def write_arguments(args: Namespace) -> None:
    """The effective arguments. Raises ArgumentError when they cannot be written."""
    write_json(args.run_folder / ARGUMENTS, {name: _plain(value) for name, value in sorted(vars(args).items())})


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


def write_json(file: Path, content: Any) -> None:
    """One JSON file, whole. Raises ArgumentError when it cannot be written."""
    try:
        write_atomically(file, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
    except OSError as error:
        raise _unwritable(file, error) from error


def finished_rollouts(folder: Path) -> list[RolloutResult]:
    """Those that were trained on; an interruption may have come before."""
    return [result for result in read_results(folder / METRICS) if result.grad_norm is not None]


def write_report(folder: Path, runs: Mapping[str, Sequence[RolloutResult]]) -> None:
    """The picture. Raises ArgumentError when it cannot be written."""
    try:
        report.write_report(folder / REPORT, runs, title="Embedded host: GRPO on a small mixture of experts")
    except OSError as error:
        raise _unwritable(folder / REPORT, error) from error


def _unwritable(file: Path, error: Exception) -> ArgumentError:
    reason = getattr(error, "strerror", None) or error
    return ArgumentError(f"{file} cannot be written", {"reason": reason}, "free space, or choose another --run-folder")
