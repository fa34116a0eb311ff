"""Convert a Hugging Face checkpoint from BF16 to FP8 and back: what `conversion` does to each tensor.

The codes and scales are those of `blockwise`, which the weight sync quantises with: the first update after the start
changes nothing that training did not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins.checkpoints import CONFIG, TensorFacts, number_of_layers
from miles_plugins.conversion import (
    Converted,
    Progress,
    Source,
    convert,
    refuse_stacked,
    require_bf16,
    require_finite,
    require_plain,
    stacked,
    without_quantization,
)
from miles_plugins.errors import PluginError
from miles_plugins.fp8_unified.blockwise import Format, Quantised, dequantise, is_power_of_two, quantise_weight
from miles_plugins.fp8_unified.checkpoint import (
    BLOCK,
    CODES,
    MATRIX_SCALE,
    SCALE,
    WEIGHT,
    Declared,
    read_format,
    require_shapes,
)
from miles_plugins.fp8_unified.selection import (
    KINDS,
    NONE_KEPT,
    Kept,
    compare,
    grouped,
    in_engine,
    names_to_leave_out,
    selected,
)

if TYPE_CHECKING:
    import torch

FP8 = Format(BLOCK)


def convert_to_fp8(
    source: Path,
    target: Path,
    format: Format = FP8,
    progress: Progress | None = None,
    bf16_at_start: int = 0,
    bf16_at_end: int = 0,
) -> Converted:
    """Quantise the weights of `selection.is_fp8` into the folder `target`; the other tensors stay, bit for bit.

    Args:
        bf16_at_start, bf16_at_end: layers that stay in BF16, as the trainer's (`selection.Kept`).

    Raises:
        PluginError: the source is no BF16 checkpoint of safetensors files, nothing or something unfit is selected
            (another dtype, stacked experts, NaN or infinity), SGLang would take other weights for FP8, or the target
            has other files in it.
    """
    checkpoint = Source.read(source)
    require_plain(checkpoint, (SCALE, MATRIX_SCALE))
    kept = NONE_KEPT
    if bf16_at_start or bf16_at_end:
        kept = Kept(number_of_layers(source), bf16_at_start, bf16_at_end)
    return convert(checkpoint, target, ToFp8.plan(checkpoint, format, kept), progress)


def convert_to_bf16(source: Path, target: Path, progress: Progress | None = None) -> Converted:
    """Dequantise every FP8 weight into the folder `target`, rounded once; the other tensors stay, bit for bit.

    Scales that are no powers of two although ue8m0 is declared are taken as they are: that is how to mend them.

    Raises:
        PluginError: the source is no FP8 checkpoint of safetensors files (`checkpoint.read_format`), its tensors are
            not what its config.json says, a weight is NaN, or the target has other files in it.
    """
    checkpoint = Source.read(source)
    declared = read_format(checkpoint.config)
    if declared is None:
        expected = {"expected": f"quantization_config in {CONFIG}"}
        raise PluginError(f"{source} is not quantised", expected, "use it as it is")
    return convert(checkpoint, target, ToBf16.plan(checkpoint, declared), progress)


@dataclass(frozen=True)
class ToFp8:
    format: Format
    quantised: frozenset[str]
    left: tuple[str, ...]

    @classmethod
    def plan(cls, source: Source, format: Format, kept: Kept = NONE_KEPT) -> ToFp8:
        """Select what is quantised, and refuse it where it does not fit: before anything is written."""
        if format.block != BLOCK:
            advice = "leave the block size as it is: no other is trained and served"
            raise PluginError("this block size cannot be served", {"found": format.block, "expected": BLOCK}, advice)
        refuse_stacked(source)
        weights = source.modules(WEIGHT)
        quantised = selected(weights, kept)
        if not quantised:
            all_kept = bool(selected(weights))
            facts = {
                "searched for": ", ".join(KINDS),
                "tensors": len(source.tensors),
                "layers": kept.layers if all_kept else None,
                "kept in BF16": f"{kept.at_start} at the start, {kept.at_end} at the end" if all_kept else None,
            }
            advice = "keep fewer layers in BF16" if all_kept else "give a model with linear layers of these names"
            raise PluginError(f"nothing of {source.folder} would be quantised", facts, advice)
        for name in sorted(quantised):
            require_bf16(name + WEIGHT, weights[name])
            if len(weights[name].shape) != 2:
                raise stacked(name + WEIGHT, weights[name])
        matrices = frozenset(name for name, each in weights.items() if len(each.shape) == 2)
        left = names_to_leave_out(matrices, quantised)
        _require_engine_agrees(matrices, quantised, left)
        return cls(format, quantised, left)

    @property
    def settings(self) -> dict[str, Any]:
        return {"to": "fp8", "scale": self.format.scale, "not quantised": list(self.left)}

    @property
    def weights(self) -> int:
        return len(self.quantised)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        quantization = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.format.block),
            **({"scale_fmt": "ue8m0"} if self.format.scale == "power_of_two" else {}),
            "modules_to_not_convert": list(self.left),
        }
        return {**config, "quantization_config": quantization}

    def layout(self, name: str, facts: TensorFacts) -> dict[str, TensorFacts]:
        if name.removesuffix(WEIGHT) not in self.quantised or not name.endswith(WEIGHT):
            return {name: facts}
        codes = TensorFacts(CODES, facts.shape)
        return {name: codes, name.removesuffix(WEIGHT) + SCALE: Declared(self.format).expected(codes)}

    def convert(self, name: str, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = read(name)
        if name.removesuffix(WEIGHT) not in self.quantised or not name.endswith(WEIGHT):
            return {name: weight}
        require_finite(name, weight)
        codes, scale = quantise_weight(weight, self.format)
        assert self.format.scale != "power_of_two" or is_power_of_two(scale)  # config.json will say so
        return {name: codes, name.removesuffix(WEIGHT) + SCALE: scale}


def _require_engine_agrees(matrices: frozenset[str], quantised: frozenset[str], left: tuple[str, ...]) -> None:
    """Raise where SGLang would take something else for FP8 than is, by either of its readings of `left`."""
    newer, older = in_engine(matrices, left), in_engine(matrices, left, "substring").fp8
    always = {module for module in older - quantised if ".experts." in module}  # 0.5.9 cannot leave them out
    differences = compare({"this checkpoint": quantised, "SGLang": newer.fp8, "SGLang 0.5.9": older - always})
    if differences or newer.torn:
        raise PluginError(
            "SGLang would not take the same weights for FP8 as this checkpoint has",
            {**grouped(differences), "fused in SGLang, FP8 in part": ", ".join(sorted(newer.torn)[:3])},
            "a module's name is a part of another's, or half of a fused layer is FP8: report this model",
        )


@dataclass(frozen=True)
class ToBf16:
    declared: Declared
    quantised: frozenset[str]

    @classmethod
    def plan(cls, source: Source, declared: Declared) -> ToBf16:
        """Refuse what is not as declared: before anything is written."""
        quantised = require_shapes(source.tensors, declared)
        if not quantised:
            expected = {"expected": f"tensors *{declared.scale}, as its {CONFIG} says", "tensors": len(source.tensors)}
            raise PluginError(f"nothing of {source.folder} is quantised", expected, "copy the checkpoint again")
        return cls(declared, quantised)

    @property
    def settings(self) -> dict[str, Any]:
        return {"to": "bf16"}

    @property
    def weights(self) -> int:
        return len(self.quantised)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return without_quantization(config)

    def layout(self, name: str, facts: TensorFacts) -> dict[str, TensorFacts]:
        if self._is_scale(name):
            return {}
        return {name: TensorFacts("BF16", facts.shape) if self._is_code(name) else facts}

    def convert(self, name: str, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._is_scale(name):
            return {}
        found = read(name)
        if not self._is_code(name):
            return {name: found}
        scale = read(name.removesuffix(WEIGHT) + self.declared.scale)
        weight = dequantise(Quantised(found, scale), BLOCK).bfloat16()
        require_finite(name, weight)
        return {name: weight}

    def _is_scale(self, name: str) -> bool:
        return name.endswith(self.declared.scale) and name.removesuffix(self.declared.scale) in self.quantised

    def _is_code(self, name: str) -> bool:
        return name.endswith(WEIGHT) and name.removesuffix(WEIGHT) in self.quantised
