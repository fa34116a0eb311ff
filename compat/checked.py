"""Remember that all patches fitted these very files: the next start then need not parse them again.

A file is taken for unchanged by its path, size and time of change, as Python takes its own compiled files. Only what
fitted is remembered; what did not is looked at each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from miles_plugins.compat.source import noting_modules, state_of_module


def folder() -> Path:
    """Where it is remembered, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "miles-plugins", "checked")


def checked(what: Iterable[object], check: Callable[[], list[str]]) -> list[str]:
    """The notes of `check`, or those that it had when it last passed on the same files.

    Args:
        what: all that the verdict depends on beside the files that it reads: our own code and the patches.
        check: reads upstream through `compat.source` only, and raises where something does not fit.
    """
    key = hashlib.sha256(repr(list(what)).encode()).hexdigest()[:24]
    file = folder() / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        known = json.loads(file.read_text())
        if all(state_of_module(name) == state for name, state in known["modules"].items()):
            return [str(note) for note in known["notes"]]
    with noting_modules() as names:
        notes = check()
    with suppress(OSError):
        _write(file, json.dumps({"modules": {name: state_of_module(name) for name in sorted(names)}, "notes": notes}))
    return notes


def _write(file: Path, text: str) -> None:
    """Whole or not at all: many processes may start at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.replace(name, file)
    except OSError:
        with suppress(OSError):
            os.unlink(name)
        raise
