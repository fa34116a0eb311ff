"""Folders of Hugging Face checkpoints in safetensors: what their files say. Only reads, and never whole weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_plugins.errors import ArgumentError, PluginError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BEGUN = "miles-plugins-conversion.json"  # of a conversion; its config.json comes last
BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # the other names of safetensors' dtypes end so: F8_E4M3, BF16
SENSES = r"(.*\.)?(visual|vision\w*|audio\w*|mm_projector|multi_modal_projector)\."
"""What a model sees and hears with, as the beginning of its modules' names: it has attention and an MLP, too."""


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


def shown(facts: TensorFacts | None) -> str:
    """A tensor's dtype and shape, for an error."""
    return f"{facts.dtype} {list(facts.shape)}" if facts else "missing"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if file.name == CONFIG and (file.parent / BEGUN).is_file():
            raise PluginError(
                f"{file.parent} is a conversion that did not finish",
                {"found": BEGUN, "missing": CONFIG},
                "run the same command again: it goes on where it was",
            ) from error
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


# -- the config ------------------------------------------------------------------------------------------------------


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a model that also sees, the part that describes the language model."""
    nested = config.get("text_config")
    outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**outer, **nested} if isinstance(nested, Mapping) else config


def quantization_config(config: Mapping[str, Any]) -> Any:
    """A model's `quantization_config`: its own, or its `text_config`'s (Kimi-K2.5); None when there is none."""
    text = config.get("text_config")
    return config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, Mapping) else None)


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


# -- names of modules -------------------------------------------------------------------------------------------------


def layer_of(module: str, layers: int) -> str:
    """A module's transformer layer, of a model that has so many: "3"; "mtp 0" for multi-token prediction; "-1"."""
    if found := re.search(r"(^|\.)mtp\.layers\.(\d+)\.", module):
        return f"mtp {found[2]}"
    found = re.search(r"\.layers\.(\d+)\.", f".{module}")
    number = int(found[1]) if found else -1
    return str(number) if number < layers else f"mtp {number - layers}"  # DeepSeek's and GLM's come after the others


def without_drafts(modules: Iterable[str], layers: int) -> frozenset[str]:
    """The modules that are no part of multi-token prediction, which not every engine and trainer has."""
    return frozenset(module for module in modules if not layer_of(module, layers).startswith("mtp"))


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
