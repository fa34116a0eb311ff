"""Which weights are INT4: read from the checkpoint, and found again among the trainer's layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_plugins import ArgumentError, Linear, linear_layers
from miles_plugins.int4_qat.checkpoint import (
    CONFIG,
    CONVERT,
    PACKED,
    SCALE,
    Format,
    packed_modules,
    read_format,
    read_header,
    read_json,
    weight_map,
)
from miles_plugins.int4_qat.converter import MODULES
from miles_plugins.int4_qat.memory import text_config

Place = tuple[str, str]
"""A transformer layer ("3"; "mtp 0" for a multi-token prediction block) and what in it ("experts", …)."""

_MEGATRON = {
    "experts": re.compile(r"\.mlp\.experts\."),
    "shared-experts": re.compile(r"\.mlp\.shared_experts\."),
    "mlp": re.compile(r"\.mlp\.linear_fc[12]$"),
    "attention": re.compile(r"\.self_attention\.(linear_qkv|linear_proj|linear_q_proj|linear_kv_proj)$"),
}


@dataclass(frozen=True)
class Selection:
    """What of a checkpoint is packed.

    Attributes:
        format: how.
        modules: names of the packed modules, without `.weight`.
        places: the same by layer and kind, in Megatron's numbering.
    """

    format: Format
    modules: frozenset[str]
    places: frozenset[Place]

    @property
    def kinds(self) -> set[str]:
        return {kind for _, kind in self.places}

    def has(self, linear: Linear) -> bool:
        """Whether a layer of the trainer is packed in the checkpoint."""
        return place(linear) in self.places


def read(folder: Path) -> Selection:
    """The selection of a checkpoint.

    Raises:
        ArgumentError: it is no INT4 checkpoint, or packs something that the trainer cannot.
        PluginError: it is quantised in another way; a file is missing.
    """
    format, modules = read_format(read_json(folder / CONFIG)), packed_modules(folder)
    if format is None or not modules:
        raise ArgumentError(
            "--hf-checkpoint is not INT4, so there is nothing to train for",
            {
                "in": folder,
                "found": f"no quantization_config in {CONFIG}" if format is None else f"no tensor *{PACKED}",
                "expected": "a checkpoint whose experts are packed: it says what is quantised, and in which groups",
            },
            "make one: `miles-plugins convert-int4 --from DIR --to DIR`",
        )
    kinds = {module: _kind(module) for module in modules}
    if strange := sorted(module for module, kind in kinds.items() if kind is None):
        raise ArgumentError(
            "the checkpoint packs modules that INT4 training does not know",
            {"in": folder, "modules": f"{len(strange)}, such as {strange[0]}", "known": ", ".join(MODULES)},
            CONVERT,
        )
    layers = number_of_layers(folder)
    places = frozenset((_layer_of(module, layers), str(kind)) for module, kind in kinds.items())
    _require_whole(folder, modules)
    _require_scales(folder, modules, format)
    return Selection(format, modules, places)


def number_of_layers(folder: Path) -> int:
    """Of the model of a checkpoint; those of multi-token prediction, which some models number on, are not counted."""
    found = text_config(read_json(folder / CONFIG)).get("num_hidden_layers")
    if type(found) is not int:
        raise ArgumentError(
            "the checkpoint does not say how many layers its model has",
            {"in": folder / CONFIG, "num_hidden_layers": found, "expected": "a number"},
            "add it, as in the config.json of the model's publisher",
        )
    return found


def without_drafts(modules: Iterable[str], layers: int) -> frozenset[str]:
    """The modules that are no part of multi-token prediction, which not every engine and trainer has."""
    return frozenset(module for module in modules if not _layer_of(module, layers).startswith("mtp"))


def _kind(module: str) -> str | None:
    return next((kind for kind, pattern in MODULES.items() if pattern.fullmatch(module)), None)


def _layer_of(module: str, layers: int) -> str:
    if found := re.search(r"(^|\.)mtp\.layers\.(\d+)\.", module):
        return f"mtp {found[2]}"
    found = re.search(r"\.layers\.(\d+)\.", f".{module}")
    number = int(found[1]) if found else -1
    return str(number) if number < layers else f"mtp {number - layers}"  # DeepSeek's and GLM's come after the others


def place(linear: Linear) -> Place | None:
    """Where a layer of the trainer is; None where nothing can be packed."""
    kind = next((kind for kind, pattern in _MEGATRON.items() if pattern.search(linear.name)), None)
    layer = _layer_name(linear)
    return None if kind is None or layer is None else (layer, kind)


def _layer_name(linear: Linear) -> str | None:
    if found := re.search(r"(^|\.)mtp\.layers\.(\d+)\.", linear.name):
        return f"mtp {found[2]}"
    return None if linear.layer is None else str(linear.layer)


def _require_whole(folder: Path, modules: Iterable[str]) -> None:
    """Of one layer and kind all weights are packed, or none: the trainer computes with them in one piece."""
    plain = Counter(
        (_layer_of(name, 1 << 30), _kind(name[: -len(".weight")]))
        for name in weight_map(folder)
        if name.endswith(".weight") and _kind(name[: -len(".weight")])
    )
    packed = Counter((_layer_of(module, 1 << 30), _kind(module)) for module in modules)
    if both := sorted(str(key) for key in plain.keys() & packed.keys()):
        raise ArgumentError(
            "the checkpoint packs a part of the weights of one kind in one layer",
            {"in": folder, "layer and kind": ", ".join(both[:4])},
            "pack all of them or none: `miles-plugins convert-int4`",
        )


def _require_scales(folder: Path, modules: Iterable[str], format: Format) -> None:
    """The tensors have the group size that config.json declares."""
    files: dict[str, list[str]] = {}
    names = weight_map(folder)
    for module in modules:
        files.setdefault(names[module + PACKED], []).append(module)
    for file, of_file in sorted(files.items()):
        header = read_header(folder / file)
        for module in of_file:
            words, scale = header[module + PACKED].shape, header.get(module + SCALE)
            found = words[-1] * 8 / scale.shape[-1] if scale is not None and scale.shape[-1] else None
            if found != format.group_size:
                raise ArgumentError(
                    "the checkpoint's scales are not of the groups that its config.json declares",
                    {
                        "module": module,
                        "declared": f"group_size {format.group_size}",
                        "found": f"{words[-1] * 8} columns in {scale.shape[-1]} groups" if scale else f"no {SCALE}",
                    },
                    CONVERT,
                )


def require_divisible(selection: Selection, linear: Linear) -> None:
    """Raise unless a rank's part of the trainer's weights has whole groups."""
    if linear.shape[1] % selection.format.group_size:
        raise ArgumentError(
            f"{linear.name} cannot be quantised in groups of {selection.format.group_size} on this rank",
            {
                "shape": f"[N, K] = {list(linear.shape)} of each weight on this rank",
                "expected": f"K a multiple of {selection.format.group_size}: no group may lie on two ranks",
            },
            "take a lower --expert-tensor-parallel-size (or --tensor-model-parallel-size, for other modules than "
            "experts), or convert the checkpoint with a smaller --group-size",
        )


def local_layers(model: Iterable[Any]) -> set[str]:
    """The transformer layers that this rank holds, numbered as in `Place`."""
    return {layer for linear in linear_layers(list(model)) if (layer := _layer_name(linear)) is not None}


def missing(selection: Selection, layers: Iterable[str], used: Mapping[Place, int]) -> list[Place]:
    """Places of these layers that are packed in the checkpoint and have no layer of the trainer."""
    local = set(layers)
    return sorted(each for each in selection.places if each[0] in local and each not in used)
