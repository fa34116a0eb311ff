"""Which weights are INT4: read from the checkpoint, and found again among the trainer's layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from miles_plugins import ArgumentError, Linear
from miles_plugins.checkpoints import CONFIG, layer_of, number_of_layers, read_header, read_json, weight_map
from miles_plugins.int4_qat.checkpoint import CONVERT, PACKED, SCALE, Format, packed_modules, read_format
from miles_plugins.int4_qat.converter import MODULES
from miles_plugins.places import Place, place

COMPRESSED = re.compile(r"\.linear_(q|kv)_(down|up)_proj$")
"""Multi-latent attention's, which `MODULES` has not: no checkpoint that is read here has them packed."""


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
        return place(linear) in self.places and not COMPRESSED.search(linear.name)


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
    places = frozenset((layer_of(module, layers), str(kind)) for module, kind in kinds.items())
    _require_whole(folder, modules)
    _require_scales(folder, modules, format)
    return Selection(format, modules, places)


def _kind(module: str) -> str | None:
    return next((kind for kind, pattern in MODULES.items() if pattern.fullmatch(module)), None)


def _require_whole(folder: Path, modules: Iterable[str]) -> None:
    """Of one layer and kind all weights are packed, or none: the trainer computes with them in one piece."""
    plain = Counter(
        (layer_of(name, 1 << 30), _kind(name[: -len(".weight")]))
        for name in weight_map(folder)
        if name.endswith(".weight") and _kind(name[: -len(".weight")])
    )
    packed = Counter((layer_of(module, 1 << 30), _kind(module)) for module in modules)
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
