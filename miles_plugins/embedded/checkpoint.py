"""Checkpoints of the embedded host: whole or not there, and never taken for another model's or another plugin set's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles_plugins.errors import ArgumentError

LATEST = "latest_checkpointed_iteration.txt"
STATE = "state.pt"
FORMAT = 1


def save(folder: Path, rollouts: int, identity: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
    """Write the state after so many rollouts.

    Args:
        identity: `shape` of the model, `plugins` (name to version) and their `digest`.

    Raises:
        ArgumentError: the disk is full or the folder cannot be written; what was there before still is.
    """
    import torch

    target, partial = _folder_of(folder, rollouts), folder / f".{rollouts}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with open(partial / STATE, "wb") as file:
            torch.save({"format": FORMAT, "rollouts": rollouts, **identity, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(target)
        latest = folder / f".{LATEST}.partial"
        latest.write_text(f"{rollouts}\n")
        latest.replace(folder / LATEST)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise ArgumentError(
            "the checkpoint could not be written; the ones before it are whole",
            {"folder": target, "error": error},
            "free space, or choose another folder with --save",
        ) from error
    return target


def load(folder: Path, identity: Mapping[str, Any], *, other_plugins: bool = False) -> dict[str, Any]:
    """The latest checkpoint of a folder.

    Args:
        identity: of the run that loads, as in `save`.
        other_plugins: go on although the checkpoint was made under another plugin set.

    Raises:
        ArgumentError: there is none, it cannot be read, or it belongs to another model or plugin set.
    """
    import torch

    file = _folder_of(folder, latest(folder)) / STATE
    where = {"file": file}
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        found = {name: state[name] for name in ("format", "rollouts", *identity)}
    except Exception as error:  # torch.load has no error of its own: pickle's, zip's and the system's come through
        reason = f"{type(error).__name__}: {error}"
        raise ArgumentError(
            "the checkpoint cannot be read",
            {**where, "error": reason},
            f"take an older one: write its number into {LATEST}",
        ) from error
    if found["format"] != FORMAT:
        raise ArgumentError(
            "the checkpoint has another format", {"found": found["format"], "expected": FORMAT, **where}
        )
    differing = {
        name: f"{found['shape'].get(name)} in the checkpoint, {value} in this run"
        for name, value in identity["shape"].items()
        if found["shape"].get(name) != value
    }
    if differing:
        raise ArgumentError(
            "the checkpoint is of another model", {**differing, **where}, "give the model that it was trained from"
        )
    if found["digest"] != identity["digest"] and not other_plugins:
        same = found["plugins"] == identity["plugins"]
        raise ArgumentError(
            "the checkpoint was made under another plugin set" if not same else "the plugins' code has changed since",
            {"checkpoint": _plugins(found), "this run": _plugins(identity), **where},
            "give the same --plugins, or --load-with-other-plugins to go on with these",
        )
    return state


def holds_one(folder: Path) -> bool:
    """Whether a run has saved here."""
    return (folder / LATEST).exists()


def latest(folder: Path) -> int:
    """The number of rollouts in the latest checkpoint. Raises ArgumentError when there is none."""
    try:
        return int((folder / LATEST).read_text())
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "there is no checkpoint", {"file": folder / LATEST, "error": error}, "check --load"
        ) from error


def _folder_of(folder: Path, rollouts: int) -> Path:
    return folder / f"iter_{rollouts:07d}"


def _plugins(identity: Mapping[str, Any]) -> str:
    names = ", ".join(f"{name} {version}" for name, version in identity["plugins"].items())
    return f"{names or 'no plugins'} [{identity['digest']}]"
