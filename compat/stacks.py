"""The supported stacks: releases of upstream that go together, and what each of our plugins can do there."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).parent / "stacks.toml"
STATUSES = ("works", "limits", "refused")


@dataclass(frozen=True)
class Support:
    """What a plugin can do in a stack: works, limits (works, but for the reasons) or refused (for the reasons)."""

    status: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """Releases that go together.

    Attributes:
        slime: A tag, or `main-` and a commit.
        megatron: The commit of Megatron-LM, in full.
        sglang: The version.
        plugins: Full name -> what it can do.
        note: What else there is to say.
    """

    slime: str
    megatron: str
    sglang: str
    plugins: Mapping[str, Support]
    note: str = ""

    @property
    def releases(self) -> tuple[str, str, str]:
        """The names under which its parts are recorded (see compat/releases.py)."""
        return f"slime {self.slime}", f"Megatron-LM {self.megatron[:9]}", f"sglang {self.sglang}"


def listed_stacks(file: Path = FILE) -> tuple[Stack, ...]:
    """The stacks of the file, in its order. Raises ValueError where it is not well written."""
    stored = tomllib.loads(file.read_text(encoding="utf-8"))
    texts = stored.get("reasons", {})
    stacks = tuple(_stack(each, texts) for each in stored["stack"])
    unused = set(texts) - {key for each in stored["stack"] for one in each["plugins"].values() for key in _keys(one)}
    if unused:
        raise ValueError(f"{file.name}: no stack gives the reasons {', '.join(sorted(unused))}")
    return stacks


def _stack(stored: Mapping[str, Any], texts: Mapping[str, str]) -> Stack:
    plugins = {name: _support(f"{stored['slime']}, {name}", one, texts) for name, one in stored["plugins"].items()}
    return Stack(**{**stored, "plugins": plugins})


def _support(where: str, stored: Mapping[str, Any], texts: Mapping[str, str]) -> Support:
    status, keys = stored["status"], _keys(stored)
    if status not in STATUSES:
        raise ValueError(f"{where}: the status is {status!r}, and not one of {', '.join(STATUSES)}")
    if (status == "works") is bool(keys):
        raise ValueError(f"{where}: {'a plugin that works has no reasons' if keys else f'{status} needs reasons'}")
    if unknown := [key for key in keys if key not in texts]:
        raise ValueError(f"{where}: [reasons] has no {', '.join(unknown)}")
    return Support(status, tuple(texts[key] for key in keys))


def _keys(stored: Mapping[str, Any]) -> list[str]:
    return list(stored.get("reasons", ()))
