"""Weights on their way from the trainer to the rollout engine, the same for every host.

They leave through the hook `export_weights`, and arrive through `receive_weights`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from miles_plugins.errors import PluginError
from miles_plugins.manager import Plugins

if TYPE_CHECKING:
    import torch


def export(
    plugins: Plugins, args: Namespace, named_tensors: Sequence[tuple[str, torch.Tensor]]
) -> list[tuple[str, torch.Tensor]]:
    """What the engine shall receive in place of one batch of names and tensors; a new list.

    Raises:
        PluginError: a plugin returned something else than names with tensors, or changed a tensor in place.
    """
    if not named_tensors:
        return []
    given = tuple(named_tensors)  # what a plugin adds, it returns
    versions = [_version(tensor) for _, tensor in given]
    exported = plugins.chain("export_weights", "named_tensors", given, _check, args=args)
    changed = [name for (name, tensor), version in zip(given, versions, strict=True) if _version(tensor) != version]
    if changed:
        raise PluginError(
            "a plugin changed weights in place in export_weights: they may be the very parameters that are trained",
            {
                "changed": ", ".join(changed),
                "plugins": ", ".join(plugin.name for plugin in plugins if plugin.implements("export_weights")),
            },
            "compute new tensors and return them",
        )
    return [(name, tensor) for name, tensor in exported]


def receive(
    plugins: Plugins, server_args: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterable[tuple[str, torch.Tensor]]:
    """What the engine shall load in place of these names and tensors, which are read once.

    Raises:
        PluginError: a plugin returned something that cannot be read name by name.
    """
    return plugins.chain("receive_weights", "named_tensors", named_tensors, _check_received, server_args=server_args)  # type: ignore[no-any-return]


def _check_received(plugin: str, answer: Any) -> None:
    if not isinstance(answer, Iterable) or isinstance(answer, (str, bytes)):
        raise PluginError(
            f"plugin {plugin} returned from receive_weights what the engine cannot load",
            {"expected": "an iterable of (name, tensor)", "found": f"a {type(answer).__name__}"},
            "return or yield (str, torch.Tensor) pairs, or return None to leave them as they are",
        )


def _version(tensor: torch.Tensor) -> int | None:
    """Counts the changes of a tensor and of what shares its memory."""
    return None if tensor.is_inference() else tensor._version


def _check(plugin: str, answer: Any) -> None:
    found = _misfit(answer)
    if found:
        raise PluginError(
            f"plugin {plugin} returned from export_weights what the engine cannot receive",
            {"expected": "a sequence of (name, tensor), each name once", "found": found},
            "return the whole batch, as a list of (str, torch.Tensor), or None to leave it as it is",
        )


def _misfit(answer: Any) -> str | None:
    """What is wrong with an answer, if anything is."""
    import torch

    if not isinstance(answer, Sequence) or isinstance(answer, (str, bytes)):
        return f"a {type(answer).__name__}"
    names: set[str] = set()
    for index, pair in enumerate(answer):
        if not isinstance(pair, (tuple, list)):
            return f"item {index} is a {type(pair).__name__}"
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], torch.Tensor):
            return f"item {index} is ({', '.join(_shown(each) for each in pair)})"
        if pair[0] in names:
            return f"{pair[0]} twice"
        names.add(pair[0])
    return None


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else type(value).__name__
