"""Checkpoints of the embedded host: whole or not there, and never taken for another model's or another plugin set's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles_plugins.errors import ArgumentError

LATEST = "latest_checkpointed_iteration.txt"
STATE, IDENTITY = "state.pt", "identity.json"
FORMAT = 1


def save(folder: Path, rollouts: int, identity: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
    """Write the state after so many rollouts; a checkpoint of that number gives way to it.

    Args:
        identity: `shape` of the model, `plugins` (name to version) and their `digest`, and the `run` it belongs to.

    Raises:
        ArgumentError: the disk is full or the folder cannot be written; what was there before still is.
    """
    import torch

    target = _folder_of(folder, rollouts)
    partial, replaced = folder / f".{rollouts}.partial", folder / f".{rollouts}.replaced"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / IDENTITY).write_text(json.dumps({"format": FORMAT, "rollouts": rollouts, **identity}, indent=2))
        with open(partial / STATE, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():  # an interrupted save, or a run that went back to an older checkpoint
            target.rename(replaced)
        partial.rename(target)
        latest = folder / f".{LATEST}.partial"
        latest.write_text(f"{rollouts}\n")
        latest.replace(folder / LATEST)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise ArgumentError(
            "the checkpoint could not be written; the ones before it are whole",
            {"folder": target, "error": error},
            "free space, or choose another folder with --save",
        ) from error
    return target


def describe(folder: Path) -> dict[str, Any]:
    """What the latest checkpoint of a folder says of itself: see `save`, and `rollouts`. Reads no weights.

    Raises:
        ArgumentError: there is none, or it cannot be read.
    """
    try:
        number = int((folder / LATEST).read_text())
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "there is no checkpoint", {"file": folder / LATEST, "error": error}, "check --load"
        ) from error
    file = _folder_of(folder, number) / IDENTITY
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        known = found["format"] == FORMAT and all(
            name in found for name in ("rollouts", "shape", "plugins", "digest", "run")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(file, error) from error
    if not known:
        raise ArgumentError("the checkpoint has another format", {"file": file, "expected": FORMAT})
    return found


def load(folder: Path, identity: Mapping[str, Any], *, other_plugins: bool = False) -> dict[str, Any]:
    """The state in the latest checkpoint of a folder.

    Args:
        identity: of the run that loads, as in `save`.
        other_plugins: go on although the checkpoint was made under another plugin set.

    Raises:
        ArgumentError: there is none, it cannot be read, or it belongs to another model or plugin set.
    """
    import torch

    found = describe(folder)
    file = _folder_of(folder, found["rollouts"]) / STATE
    differing = {
        name: f"{found['shape'].get(name)} in the checkpoint, {value} in this run"
        for name, value in identity["shape"].items()
        if found["shape"].get(name) != value
    }
    if differing:
        raise ArgumentError(
            "the checkpoint is of another model", {**differing, "in": file}, "give the model that it was trained from"
        )
    if found["digest"] != identity["digest"] and not other_plugins:
        same = found["plugins"] == identity["plugins"]
        raise ArgumentError(
            "the checkpoint was made under another plugin set" if not same else "the plugins' code has changed since",
            {"checkpoint": _plugins(found, digest=same), "this run": _plugins(identity, digest=same), "in": file},
            "give the same --plugins, or --load-with-other-plugins to go on with these",
        )
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own: pickle's, zip's and the system's come through
        raise _unreadable(file, error) from error
    return state


def holds_one(folder: Path) -> bool:
    """Whether a run has saved here."""
    return (folder / LATEST).exists()


def _unreadable(file: Path, error: Exception) -> ArgumentError:
    return ArgumentError(
        "the checkpoint cannot be read",
        {"file": file, "error": f"{type(error).__name__}: {error}"},
        f"take an older one: write its number into {LATEST}",
    )


def _folder_of(folder: Path, rollouts: int) -> Path:
    return folder / f"iter_{rollouts:07d}"


def _plugins(identity: Mapping[str, Any], *, digest: bool) -> str:
    names = ", ".join(f"{name} {version}" for name, version in identity["plugins"].items()) or "no plugins"
    return f"{names} [{identity['digest']}]" if digest else names
