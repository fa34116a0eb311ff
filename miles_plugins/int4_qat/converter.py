"""Convert a Hugging Face checkpoint from BF16 to INT4 and back: what `conversion` does to each tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins.checkpoints import CONFIG, SENSES, TensorFacts, ignored, shown
from miles_plugins.conversion import (
    WEIGHT,
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
from miles_plugins.int4_qat.checkpoint import PACKED, SCALE, SHAPE, Format, read_format
from miles_plugins.int4_qat.grid import PER_WORD, Grid, Quantised, dequantise, pack, quantise, unpack
from miles_plugins.int4_qat.memory import GROUP_SIZES

if TYPE_CHECKING:
    import torch

MODULES = {
    "experts": re.compile(r".*\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)"),
    "shared-experts": re.compile(r".*\.shared_experts?\.(gate|up|down)_proj"),
    "mlp": re.compile(r".*\.mlp\.(gate|up|down)_proj"),
    # MLA's compressed projections stay as they are: SGLang takes kv_b_proj's weight apart itself.
    "attention": re.compile(r".*\.self_attn\.(q|k|v|o)_proj"),
}
"""What can be packed: a name for the user, and the modules it means. Nothing else ever is."""
DEFAULT_IGNORE = ("lm_head", f"re:{SENSES}")
"""Left out although `MODULES` may match: a vision tower has an mlp and attention, too."""


def convert_to_int4(
    source: Path,
    target: Path,
    grid: Grid,
    ignore: Collection[str] = DEFAULT_IGNORE,
    progress: Progress | None = None,
    modules: Collection[str] = ("experts",),
) -> Converted:
    """Pack the weights of `modules` (names in MODULES) into the folder `target`; the other tensors stay, bit for bit.

    Args:
        ignore: rules as in `checkpoints.ignored`, for modules to leave out; to add some: (*DEFAULT_IGNORE, …).

    Raises:
        PluginError: the source is no BF16 checkpoint of safetensors files, nothing or something unfit is selected
            (another dtype, K not divisible, stacked experts, NaN or infinity), or the target has other files in it.
    """
    checkpoint = Source.read(source)
    require_plain(checkpoint, (PACKED,))
    return convert(checkpoint, target, ToInt4.plan(checkpoint, grid, ignore, modules), progress)


def convert_to_bf16(source: Path, target: Path, progress: Progress | None = None) -> Converted:
    """Unpack every packed weight into the folder `target`; the other tensors stay, bit for bit.

    Raises:
        PluginError: the source is no INT4 checkpoint of safetensors files (`checkpoint.read_format`), its tensors are
            not what its config.json says, or the target has other files in it.
    """
    checkpoint = Source.read(source)
    declared = read_format(checkpoint.config)
    if declared is None:
        raise PluginError(
            f"{source} is not quantised",
            {"expected": f"quantization_config in {CONFIG}"},
            "use it as it is",
        )
    return convert(checkpoint, target, ToBf16.plan(checkpoint, declared), progress)


# -- the two conversions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToInt4:
    grid: Grid
    packed: frozenset[str]
    left: tuple[str, ...]

    @classmethod
    def plan(cls, source: Source, grid: Grid, ignore: Collection[str], modules: Collection[str]) -> ToInt4:
        """Select what is packed, and refuse it where it does not fit: before anything is written."""
        unknown = [name for name in modules if name not in MODULES]
        if unknown or not modules:
            facts = {"found": ", ".join(unknown) or "none", "expected": ", ".join(MODULES)}
            raise PluginError("there are no such modules to pack", facts, "name one of them, or several")
        if "experts" in modules:
            refuse_stacked(source)
        weights = source.modules(WEIGHT)
        patterns = [MODULES[name] for name in modules]
        packed = {
            name
            for name in weights
            if any(pattern.fullmatch(name) for pattern in patterns) and not ignored(name, ignore)
        }
        if not packed:
            searched = {"modules": ", ".join(modules), "tensors": len(source.tensors)}
            advice = f"widen --modules: {', '.join(MODULES)}; by default a model without experts has nothing to pack"
            raise PluginError(f"nothing of {source.folder} would be packed", searched, advice)
        advice = _fitting({weights[name].shape[-1] for name in packed})
        for name in sorted(packed):
            require_bf16(name + WEIGHT, weights[name])
            grid.check(name + WEIGHT, weights[name].shape, advice)
            if len(weights[name].shape) != 2:
                raise stacked(name + WEIGHT, weights[name])
        left = {name for name, facts in weights.items() if len(facts.shape) == 2} - packed
        # A tied head is no tensor of the file, and a linear layer of the model all the same.
        return cls(grid, frozenset(packed), tuple(sorted(left | {"lm_head"})))

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "to": "int4",
            "group_size": self.grid.group_size,
            "kind": self.grid.kind,
            "not packed": list(self.left),
        }

    @property
    def weights(self) -> int:
        return len(self.packed)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.grid.group_size,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
        }
        quantization = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": list(self.left),  # names and no patterns: a pattern too wide packs a router unseen
        }
        return {**config, "quantization_config": quantization}

    def layout(self, name: str, facts: TensorFacts) -> dict[str, TensorFacts]:
        module = name.removesuffix(WEIGHT)
        if module == name or module not in self.packed:
            return {name: facts}
        rows, columns = facts.shape
        return {
            module + PACKED: TensorFacts("I32", (rows, columns // PER_WORD)),
            module + SCALE: TensorFacts("BF16", (rows, columns // self.grid.group_size)),
            module + SHAPE: TensorFacts("I64", (2,)),
        }

    def convert(self, name: str, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        module = name.removesuffix(WEIGHT)
        weight = read(name)
        if module == name or module not in self.packed:
            return {name: weight}
        require_finite(name, weight)
        codes, scale = quantise(weight, self.grid)
        shape = torch.tensor(weight.shape, dtype=torch.int64)
        return {module + PACKED: pack(codes), module + SCALE: scale, module + SHAPE: shape}


def _fitting(columns: Collection[int]) -> str:
    """Which groups would divide these K."""
    if sizes := [str(size) for size in GROUP_SIZES if not any(k % size for k in columns)]:
        return f"--group-size {' or '.join(sizes)}: that divides K of all that is selected"
    sizes = [str(size) for size in GROUP_SIZES]
    return f"select others with --modules: none of SGLang's groups ({', '.join(sizes)}) divides K of all of these"


@dataclass(frozen=True)
class ToBf16:
    packed: frozenset[str]

    @classmethod
    def plan(cls, source: Source, declared: Format) -> ToBf16:
        """Refuse what is not as declared: before anything is written."""
        packed, tensors = source.modules(PACKED), source.tensors
        if not packed:
            facts = {"expected": f"tensors *{PACKED}, as its {CONFIG} says", "tensors": len(tensors)}
            raise PluginError(f"nothing of {source.folder} is packed", facts, "copy the checkpoint again")
        for name, words_of in sorted(packed.items()):
            rows, words = words_of.shape if len(words_of.shape) == 2 else (0, 0)
            expected = {
                PACKED: [TensorFacts("I32", (rows, words))],
                SCALE: [TensorFacts("BF16", (rows, words * PER_WORD // declared.group_size))],
                SHAPE: [TensorFacts("I64", (2,)), TensorFacts("I32", (2,))],
            }
            for suffix, allowed in expected.items():
                if (found := tensors.get(name + suffix)) not in allowed:
                    raise PluginError(
                        f"{name + suffix} is not what {CONFIG} says",
                        {"found": shown(found), "expected": shown(allowed[0]), "group size": declared.group_size},
                        "copy the checkpoint again, or convert it with the tool that made it",
                    )
        return cls(frozenset(packed))

    @property
    def settings(self) -> dict[str, Any]:
        return {"to": "bf16"}

    @property
    def weights(self) -> int:
        return len(self.packed)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return without_quantization(config)

    def layout(self, name: str, facts: TensorFacts) -> dict[str, TensorFacts]:
        module, dot, kind = name.rpartition(".")
        if module not in self.packed or dot + kind not in (PACKED, SCALE, SHAPE):
            return {name: facts}
        if dot + kind != PACKED:
            return {}
        rows, words = facts.shape
        return {module + WEIGHT: TensorFacts("BF16", (rows, words * PER_WORD))}

    def convert(self, name: str, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        module, dot, kind = name.rpartition(".")
        if module not in self.packed or dot + kind not in (PACKED, SCALE, SHAPE):
            return {name: read(name)}
        if dot + kind != PACKED:
            return {}
        codes = unpack(read(name))
        if (shape := read(module + SHAPE).tolist()) != list(codes.shape):  # other tools fill the last word up
            facts = {"found": shape, "expected": list(codes.shape)}
            raise PluginError(f"{module + SHAPE} is another shape than its codes have", facts, "copy it again")
        return {module + WEIGHT: dequantise(Quantised(codes, read(module + SCALE)))}
