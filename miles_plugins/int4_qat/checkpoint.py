"""What an INT4 checkpoint says of itself: its format, and which modules are packed. Only reads files.

A packed linear layer `<module>` with the weight [N, K] has three tensors in place of `<module>.weight`:

* `<module>.weight_packed`  int32 [N, K / 8]: eight codes a word (`grid.pack`)
* `<module>.weight_scale`   bfloat16 [N, K / group size]
* `<module>.weight_shape`   int64 [2]: N and K. slime writes int32; everything that loads it takes both.

The format is compressed-tensors' `pack-quantized` (https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from miles_plugins.errors import PluginError
from miles_plugins.int4_qat.grid import PER_WORD, Grid

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # the other names of safetensors' dtypes end so: F8_E4M3, BF16
CONVERT = "take the BF16 checkpoint, and convert it: `miles-plugins convert-int4 --from DIR --to DIR`"


# -- the format -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How the packed weights are quantised: always symmetric INT4 in groups along K.

    Attributes:
        group_size: weights along K that share a scale; one that `Grid` takes.
        ignore: compressed-tensors' rules for the modules that are not packed (see `ignored`). Which ones *are* packed
            `packed_modules` knows better.
    """

    group_size: int
    ignore: tuple[str, ...] = ()

    def grid(self, kind: Literal["stock", "snapped"] = "stock") -> Grid:
        """The grid of this checkpoint. The file does not say which kind made it."""
        return Grid(self.group_size, kind)


def quantization_config(config: Mapping[str, Any]) -> Any:
    """A model's `quantization_config`: its own, or its `text_config`'s (Kimi-K2.5); None when there is none."""
    text = config.get("text_config")
    return config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, Mapping) else None)


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


def ignored(name: str, rules: Iterable[str]) -> bool:
    """Whether a module's name is one of compressed-tensors' `ignore` rules: itself, `re:…`, or what it lies in.

    A prefix ends at a dot: `model.layers.1` is also `model.layers.1.mlp`, and not `model.layers.10`. slime differs: its
    packer asks `startswith` (slime/backends/megatron_utils/megatron_to_hf/processors/quantizer_compressed_tensors.py).
    """
    return any(
        re.match(rule[3:], name) is not None
        if rule.startswith("re:")
        else name == rule or name.startswith(rule.rstrip(".") + ".")
        for rule in rules
    )


# -- the files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorFacts:
    """What a file's header says of a tensor: `dtype` as safetensors writes it ("BF16", "I32")."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        bits = BITS.get(self.dtype) or int(re.match(r"[A-Z]+(\d+)", self.dtype)[1])  # type: ignore[index]
        return math.prod(self.shape) * bits // 8


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PluginError(f"no {file.name} in {file.parent}", next="give the folder of a whole checkpoint") from error
    except ValueError as error:
        raise PluginError(f"{file} is not JSON", {"found": error}, "copy the checkpoint again") from error
    if not isinstance(found, dict):
        raise PluginError(f"{file} is not a JSON object", {"found": type(found).__name__}, "copy the checkpoint again")
    return found


def read_header(file: Path) -> dict[str, TensorFacts]:
    """Name -> facts of the tensors in a safetensors file.

    Raises:
        PluginError: there is no such file, it is none of safetensors, or its end is missing.
    """
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size
            if length > size:
                raise ValueError(f"its header would be longer than the file ({size} bytes)")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"{size} bytes, and its header describes {end}")
        return {name: TensorFacts(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise PluginError(f"cannot read {file}", {"found": problem}, "copy the checkpoint again, whole") from error


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor's name -> name of its file: of the index, or of the one model.safetensors without an index.

    Raises:
        PluginError: there is neither, or the index names a file elsewhere.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            found = ", ".join(sorted(file.name for file in folder.glob("*.bin"))) or "no weights"
            advice = "save the model with safetensors: other formats are not read"
            raise PluginError(f"no {INDEX} and no {SINGLE} in {folder}", {"found": found}, advice)
        return dict.fromkeys(read_header(folder / SINGLE), SINGLE)
    files = read_json(folder / INDEX).get("weight_map")
    strange = [file for file in files.values() if Path(str(file)).name != file] if isinstance(files, dict) else [files]
    if strange or not isinstance(files, dict):
        facts = {"found": strange[0], "expected": "weight_map: tensor's name -> name of a file in this folder"}
        raise PluginError(f"{folder / INDEX} cannot be used", facts, "copy the checkpoint again")
    return files


def packed_modules(folder: Path) -> frozenset[str]:
    """Names of the modules whose weight is packed, without `.weight_packed`."""
    return frozenset(name[: -len(PACKED)] for name in weight_map(folder) if name.endswith(PACKED))
