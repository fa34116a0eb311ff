"""What of a checkpoint is FP8, for the trainer that computes with it and the update that sends it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from miles_plugins import ArgumentError, Linear, PluginError
from miles_plugins.checkpoints import CONFIG, layer_of, number_of_layers, read_json
from miles_plugins.fp8_unified.checkpoint import CONVERT, WEIGHT, Declared, matrices, quantised_modules, read_format
from miles_plugins.fp8_unified.selection import kind
from miles_plugins.places import Place, place

TRAINED = frozenset({"experts", "shared-experts", "mlp", "attention"})
"""Kinds of modules (`selection.KINDS`) that the aligned forward has layers for."""


@dataclass(frozen=True)
class Chosen:
    """The FP8 weights of a checkpoint.

    Attributes:
        declared: how they are quantised.
        modules: names of the modules, without `.weight`.
        places: the same by layer and kind, in Megatron's numbering.
        layers: of the model.
    """

    declared: Declared
    modules: frozenset[str]
    places: frozenset[Place]
    layers: int

    def has(self, linear: Linear) -> bool:
        """Whether a layer of the trainer is FP8 in the checkpoint."""
        return place(linear) in self.places

    @property
    def kinds(self) -> set[str]:
        return {kind for _, kind in self.places}


def read(folder: Path) -> Chosen:
    """The FP8 weights of a checkpoint.

    Raises:
        ArgumentError: it is no FP8 checkpoint, or quantises a part of what the trainer computes in one piece.
        PluginError: it is quantised in another way; a file is missing.
    """
    declared, modules = read_format(read_json(folder / CONFIG)), quantised_modules(folder)
    if declared is None or not modules:
        raise ArgumentError(
            "--hf-checkpoint is not FP8, so the engine would not be",
            {
                "in": folder,
                "found": f"no quantization_config in {CONFIG}" if declared is None else "no tensor with a scale",
                "expected": "a checkpoint in FP8: it says what is quantised, and how",
            },
            f"make one: {CONVERT.partition(': ')[2]}",
        )
    layers = number_of_layers(folder)
    places = frozenset((layer_of(module, layers), str(kind(module))) for module in modules)
    _require_whole(folder, modules, layers)
    return Chosen(declared, modules, places, layers)


def _require_whole(folder: Path, modules: frozenset[str], layers: int) -> None:
    """Of one layer and kind all weights are FP8, or none: both sides compute with several of them in one piece."""
    plain = {(layer_of(each, layers), kind(each)): each for each in matrices(folder) - modules if kind(each)}
    if torn := sorted((*key, plain[key]) for key in plain.keys() & {(layer_of(m, layers), kind(m)) for m in modules}):
        raise ArgumentError(
            "the checkpoint has a part of the weights of one kind in one layer in FP8",
            {"in": folder, "layer and kind": f"{torn[0][0]}, {torn[0][1]}", "not FP8": torn[0][2], "such": len(torn)},
            CONVERT,
        )


def require_covered(found: Chosen, covered: Mapping[Place, int], experts_apart: int) -> None:
    """Raise unless the trainer's layers of each place are made of all tensors that the checkpoint has there in FP8.

    Args:
        covered: how many of them this rank's layers are made of.
        experts_apart: ranks that have other experts each.
    """
    wanted = Counter((layer_of(module, found.layers), str(kind(module))) for module in found.modules)
    for where in sorted(covered):
        expected = wanted[where] // (experts_apart if where[1] == "experts" else 1)
        if covered[where] != expected:
            raise PluginError(
                "a part of what the checkpoint has in FP8 has no linear layer in the trainer that computes so",
                {
                    "layer and kind": ", ".join(where),
                    "tensors in the checkpoint": expected,
                    "in the trainer's layers": covered[where],
                },
                "a model provider with layers of its own must use Megatron's or TransformerEngine's linear layers",
            )


def check_received(wanted: Iterable[str], allowed: Iterable[str], scale: str, received: Mapping[str, int]) -> None:
    """Raise unless each FP8 weight of the checkpoint and its scale came once in an update, and no scale besides.

    Args:
        wanted: modules that must have come.
        allowed: modules besides that may: of a draft that not every trainer trains.
        scale: what a module's scale is called, behind its name.
    """
    wanted, known = set(wanted), {*wanted, *allowed}
    ends = (WEIGHT, scale)
    missing = sorted(module + end for module in wanted for end in ends if module + end not in received)
    twice = sorted(module + end for module in known for end in ends if received.get(module + end, 0) > 1)
    half = sorted(module for module in known - wanted if len([end for end in ends if module + end in received]) == 1)
    strange = sorted(name for name in received if name.endswith(scale) and name[: -len(scale)] not in known)
    if missing or twice or half or strange:
        raise PluginError(
            "a weight update did not bring each FP8 weight of the checkpoint, with its scale, once; generation does "
            "not resume",
            {
                "expected": f"{2 * len(wanted)} tensors",
                "missing": _some(missing),
                "twice": _some(twice),
                "without its other half": _some(half),
                "unknown": _some(strange),
            },
            f"the trainer and the engine must have the same --hf-checkpoint; else report this. {CONVERT}"
            if strange
            else "go on from the last checkpoint; look for the first error in the trainers' logs",
        )


def _some(names: list[str]) -> str | None:
    return f"{len(names)}, such as {names[0]}" if names else None
