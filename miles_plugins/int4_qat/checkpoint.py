"""What an INT4 checkpoint says of itself: its format, and which modules are packed. Only reads files.

A packed linear layer `<module>` with the weight [N, K] has three tensors in place of `<module>.weight`:

* `<module>.weight_packed`  int32 [N, K / 8]: eight codes a word (`grid.pack`)
* `<module>.weight_scale`   bfloat16 [N, K / group size]
* `<module>.weight_shape`   int64 [2]: N and K. slime writes int32; everything that loads it takes both.

The format is compressed-tensors' `pack-quantized` (https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from miles_plugins.checkpoints import quantization_config, weight_map
from miles_plugins.errors import PluginError
from miles_plugins.int4_qat.grid import PER_WORD, Grid

PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
CONVERT = "take the BF16 checkpoint, and convert it: `miles-plugins convert-int4 --from DIR --to DIR`"


# -- the format -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How the packed weights are quantised: always symmetric INT4 in groups along K.

    Attributes:
        group_size: weights along K that share a scale; one that `Grid` takes.
        ignore: compressed-tensors' rules for the modules that are not packed (see `checkpoints.ignored`). Which ones
            *are* packed `packed_modules` knows better.
    """

    group_size: int
    ignore: tuple[str, ...] = ()

    def grid(self, kind: Literal["stock", "snapped"] = "stock") -> Grid:
        """The grid of this checkpoint. The file does not say which kind made it."""
        return Grid(self.group_size, kind)


def read_format(config: Mapping[str, Any]) -> Format | None:
    """The format that a model's config.json declares; None for a model that is not quantised.

    Raises:
        PluginError: it is quantised in another way than the grid: it names the field, what it is, and what it must be.
    """
    quantization = quantization_config(config)
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        _refuse("quantization_config", quantization, "a JSON object")
    _require("quant_method", quantization.get("quant_method"), "compressed-tensors")
    _require("format", quantization.get("format"), "pack-quantized")
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        found = ", ".join(groups) if isinstance(groups, Mapping) else groups
        _refuse("config_groups", found or None, "one group: one size for all weights")
    ((name, group),) = groups.items()
    place = f"config_groups.{name}"
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        _refuse(f"{place}.weights", weights, "a JSON object")
    if group.get("input_activations") is not None:
        _refuse(f"{place}.input_activations", group["input_activations"], "null: only weights are quantised")
    place += ".weights"
    _require(f"{place}.num_bits", weights.get("num_bits"), 4)
    _require(f"{place}.type", weights.get("type", "int"), "int")
    _require(f"{place}.symmetric", weights.get("symmetric", True), True)
    _require(f"{place}.strategy", weights.get("strategy"), "group")
    _require(f"{place}.dynamic", weights.get("dynamic", False), False)
    if weights.get("actorder") not in (None, False):
        _refuse(f"{place}.actorder", weights["actorder"], "null: columns in their own order")
    size = weights.get("group_size")
    if type(size) is not int or size < PER_WORD or size % PER_WORD:
        _refuse(f"{place}.group_size", size, f"a multiple of {PER_WORD}, such as 32 or 128")
    return Format(size, tuple(quantization.get("ignore") or ()))


def _require(field: str, found: object, expected: object) -> None:
    if found != expected or isinstance(found, bool) != isinstance(expected, bool):
        _refuse(field, found, json.dumps(expected))


def _refuse(field: str, found: object, expected: str) -> NoReturn:
    raise PluginError(
        "this checkpoint is quantised in a way that INT4 training does not have",
        {"field": field, "found": "missing" if found is None else json.dumps(found), "expected": expected},
        CONVERT,
    )


# -- the files --------------------------------------------------------------------------------------------------------


def packed_modules(folder: Path) -> frozenset[str]:
    """Names of the modules whose weight is packed, without `.weight_packed`."""
    return frozenset(name[: -len(PACKED)] for name in weight_map(folder) if name.endswith(PACKED))
