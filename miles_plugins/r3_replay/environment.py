"""What routing replay needs of an environment, for `miles-plugins doctor`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module

from miles_plugins import Finding

SWITCH = "ENABLE_ROUTING_REPLAY"  # read by a Megatron that slime's or miles' image patched
COMPILED = ("xxhash", "pybase64")


def findings() -> Sequence[Finding]:
    return [codecs(), other_replay()]


def codecs() -> Finding:
    """The routing's checksum and encoding: pybase64 falls back to Python's own base64 without a word."""
    name, problems = "r3: codecs", []
    for module in COMPILED:
        try:
            import_module(module)
        except ImportError as error:
            problems.append(f"{module} cannot be imported: {error}")
    if problems:
        return Finding(name, "problem", "; ".join(problems), f"pip install --force-reinstall {' '.join(COMPILED)}")
    import pybase64

    described = pybase64.get_version()
    if "C extension active" not in described:
        slow = "nothing for correctness; for ten times the speed install a pybase64 wheel of this platform"
        return Finding(name, "note", f"pybase64 {described}", slow)
    return Finding(name, "ok", f"xxhash, pybase64 {described}")


def other_replay() -> Finding:
    found = f"{SWITCH}={os.environ[SWITCH]}" if SWITCH in os.environ else "none"
    if os.environ.get(SWITCH) == "1":
        return Finding("r3: other replay", "problem", f"{found} turns on a patched Megatron's own", f"unset {SWITCH}")
    return Finding("r3: other replay", "ok", found)
