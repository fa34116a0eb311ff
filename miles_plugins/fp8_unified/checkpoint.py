"""What an FP8 checkpoint says of itself: its format, and which modules are quantised. Only reads files.

A quantised linear layer `<module>` with the weight [N, K] has two tensors:

* `<module>.weight`            float8_e4m3fn [N, K]: the codes
* `<module>.weight_scale_inv`  float32 [ceil(N / 128), ceil(K / 128)]: what the codes of a tile are multiplied with; or,
  where one scale serves the whole matrix, `<module>.weight_scale` float32 [1]

The format is DeepSeek-V3's (https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from miles_plugins.checkpoints import CONFIG, TensorFacts, quantization_config, read_header, shown, weight_map
from miles_plugins.errors import PluginError
from miles_plugins.fp8_unified.blockwise import Format, is_power_of_two

if TYPE_CHECKING:
    import torch

WEIGHT, SCALE, MATRIX_SCALE = ".weight", ".weight_scale_inv", ".weight_scale"
BLOCK = (128, 128)
"""SGLang's kernels, TransformerEngine's recipe and its weight checker have no other."""
CODES = "F8_E4M3"
CONVERT = "take the BF16 checkpoint, and convert it: `miles-plugins convert-fp8 --from DIR --to DIR`"
LEFT_OUT = ("ignored_layers", "modules_to_not_convert")
"""The fields that may list what is not quantised. SGLang takes the first that is there."""


# -- the format -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Declared:
    """How the weights are quantised: always E4M3, with scales for the activations that the engine finds itself.

    Attributes:
        format: of the tiles; None where a matrix has one scale.
        not_converted: what the engine leaves in BF16, as the file says it. Which modules *are* quantised
            `quantised_modules` knows better.
    """

    format: Format | None
    not_converted: tuple[str, ...] = ()

    @property
    def scale(self) -> str:
        """What a module's scale is called, behind its name."""
        return MATRIX_SCALE if self.format is None else SCALE

    def expected(self, weight: TensorFacts) -> TensorFacts:
        """What the scale of a weight [N, K] must be."""
        if self.format is None:
            return TensorFacts("F32", (1,))
        return TensorFacts("F32", tuple(-(-side // of) for side, of in zip(weight.shape, BLOCK, strict=False)))


def read_format(config: Mapping[str, Any]) -> Declared | None:
    """What a model's config.json declares; None for a model that is not quantised.

    Raises:
        PluginError: it is quantised in another way: it names the field, what it is, and what it must be.
    """
    quantization = quantization_config(config)
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        _refuse("quantization_config", quantization, "a JSON object")
    _require_method(quantization)
    _require("fmt", quantization.get("fmt"), ("e4m3", None))  # Qwen3.5's files leave it out
    _require("activation_scheme", quantization.get("activation_scheme"), ("dynamic",))
    block = quantization.get("weight_block_size")
    _require("weight_block_size", block, (list(BLOCK), None))
    kind = quantization.get("scale_fmt")
    _require("scale_fmt", kind, ("ue8m0", None) if block else (None,))
    left: Any = next((found for name in LEFT_OUT if (found := quantization.get(name)) is not None), [])
    if not isinstance(left, list) or not all(isinstance(each, str) for each in left):
        _refuse("modules_to_not_convert", left, "a list of names")
    format = Format(BLOCK, "power_of_two" if kind == "ue8m0" else "float32") if block else None
    return Declared(format, tuple(left))


def _require_method(quantization: Mapping[str, Any]) -> None:
    method = quantization.get("quant_method")
    if method == "fp8":
        return
    if method == "compressed-tensors":
        form = quantization.get("format")
        if form == "float-quantized":
            raise PluginError(
                "this checkpoint has FP8 weights in compressed-tensors' form, with a scale for each channel or matrix",
                {"field": "format", "found": json.dumps(form), "expected": 'quant_method "fp8", tiles of 128 x 128'},
                f"slime would take it for INT4. {CONVERT}",
            )
        advice = f"INT4 is trained with --plugins int4. For FP8 {CONVERT}" if form == "pack-quantized" else CONVERT
        _refuse("quant_method", method, '"fp8"', advice)
    if method is None and "quant_algo" in quantization:  # ModelOpt's older files
        _refuse("quant_method", f"missing; quant_algo {json.dumps(quantization['quant_algo'])}", '"fp8"', shown=True)
    _refuse("quant_method", method, '"fp8"')


def _require(field: str, found: object, allowed: tuple[object, ...]) -> None:
    if not any(found == each and type(found) is type(each) for each in allowed):
        _refuse(field, found, " or ".join("missing" if each is None else json.dumps(each) for each in allowed))


def _refuse(field: str, found: object, expected: str, advice: str = CONVERT, shown: bool = False) -> NoReturn:
    text = found if shown else "missing" if found is None else json.dumps(found)
    raise PluginError(
        "this checkpoint is quantised in a way that FP8 training does not have",
        {"field": field, "found": text, "expected": expected},
        advice,
    )


# -- the modules ------------------------------------------------------------------------------------------------------


def quantised_modules(folder: Path) -> frozenset[str]:
    """Names of the modules that have a scale, of either kind, without `.weight`."""
    names = weight_map(folder)
    return frozenset(
        name.removesuffix(suffix) for name in names for suffix in (SCALE, MATRIX_SCALE) if name.endswith(suffix)
    )


def matrices(folder: Path) -> frozenset[str]:
    """Names of all modules whose weight has two dimensions, quantised or not. Reads the headers of all files."""
    return frozenset(
        name.removesuffix(WEIGHT)
        for name, (_, facts) in _tensors(folder).items()
        if name.endswith(WEIGHT) and len(facts.shape) == 2
    )


def _tensors(folder: Path) -> dict[str, tuple[str, TensorFacts]]:
    """Tensor's name -> its file, and facts."""
    names = weight_map(folder)
    headers = {file: read_header(folder / file) for file in sorted(set(names.values()))}
    if lost := sorted(name for name, file in names.items() if name not in headers[file]):
        facts = {"missing": lost[0], "and": f"{len(lost) - 1} more" if lost[1:] else None}
        raise PluginError(f"{folder / names[lost[0]]} lacks tensors of the index", facts, "copy the checkpoint again")
    return {name: (file, headers[file][name]) for name, file in names.items()}


def require_shapes(tensors: Mapping[str, TensorFacts], declared: Declared) -> frozenset[str]:
    """The quantised modules of these tensors. Raises PluginError unless each has codes and scales as declared."""
    modules = set()
    for name, facts in sorted(tensors.items()):
        end = next((end for end in (SCALE, MATRIX_SCALE) if name.endswith(end)), None)
        if end is not None:
            if end != declared.scale:
                _disagree(name, shown(facts), f"{declared.scale[1:]}, for {_of(declared)}")
            modules.add(name.removesuffix(end))
        elif facts.dtype.startswith("F8_") and name.removesuffix(WEIGHT) + declared.scale not in tensors:
            _disagree(name, f"{shown(facts)} without {declared.scale[1:]}", "a scale beside each FP8 weight")
    for module in sorted(modules):
        weight = tensors.get(module + WEIGHT)
        if weight is None or weight.dtype != CODES or len(weight.shape) != 2:
            _disagree(module + WEIGHT, shown(weight), f"{CODES} [N, K], because it has a scale")
        assert weight is not None
        scale, expected = tensors[module + declared.scale], declared.expected(weight)
        allowed = [expected, TensorFacts("F32", ())] if declared.format is None else [expected]
        if scale not in allowed:
            _disagree(module + declared.scale, shown(scale), f"{shown(expected)} for {shown(weight)}")
    return frozenset(modules)


def _disagree(name: str, found: str, expected: str) -> NoReturn:
    raise PluginError(
        f"{name} is not what {CONFIG} says",
        {"found": found, "expected": expected},
        f"copy the checkpoint again, or {CONVERT}",
    )


def _of(declared: Declared) -> str:
    block = None if declared.format is None else list(BLOCK)
    return f"weight_block_size {json.dumps(block)}"


# -- the scales -------------------------------------------------------------------------------------------------------


def check_scales(folder: Path, declared: Declared) -> None:
    """Raise unless the scales are what config.json says. Reads the scales, and of the weights no more than it must.

    slime's `--scale-fmt ue8m0` writes the word into config.json and leaves the scales as they are: an engine on
    Blackwell then drops their mantissas, and computes with other weights than anyone trained.

    Raises:
        PluginError: a weight or scale has another dtype or shape, or is missing; a scale is no power of two although
            ue8m0 is declared, or no number; a tile of zeros became NaN, as slime's converter makes it up to v0.3.1.
    """
    tensors = _tensors(folder)
    modules = require_shapes({name: facts for name, (_, facts) in tensors.items()}, declared)
    files: dict[str, list[str]] = defaultdict(list)
    for module in sorted(modules):
        files[tensors[module + declared.scale][0]].append(module)
    for file, of_file in sorted(files.items()):
        for module, scale in _scales(folder / file, of_file, declared.scale):
            if not scale.all():
                _check_zeros(folder / tensors[module + WEIGHT][0], module + WEIGHT)
            _check_numbers(module + declared.scale, scale, declared)


def _scales(file: Path, modules: list[str], suffix: str) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for module in modules:
            yield module, opened.get_tensor(module + suffix)


def _check_numbers(name: str, scale: torch.Tensor, declared: Declared) -> None:
    if not (scale.isfinite() & (scale >= 0)).all():
        found = scale[~(scale.isfinite() & (scale >= 0))][0].item()
        facts = {"found": found, "expected": "finite numbers above 0"}
        raise PluginError(f"{name} cannot be multiplied with", facts, CONVERT)
    if declared.format is not None and declared.format.scale == "power_of_two" and not is_power_of_two(scale):
        strange = scale[scale.frexp().mantissa != 0.5]  # or none: beyond what eight bits can hold
        raise PluginError(
            f"{CONFIG} declares scale_fmt ue8m0, and the checkpoint has scales that are no powers of two",
            {
                "scales": name,
                "found": (strange if strange.numel() else scale.flatten())[0].item(),
                "expected": "powers of two, or no scale_fmt",
            },
            f"take scale_fmt out of {CONFIG} to train with float32 scales; or {CONVERT} --scale power-of-two",
        )


def _check_zeros(file: Path, name: str) -> None:
    """A tile of zeros that was divided by its amax is NaN from then on."""
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        codes = opened.get_tensor(name)
    nan = (codes.view(torch.uint8) & 0x7F) == 0x7F
    if nan.any():
        raise PluginError(
            f"{name} has NaN in place of zeros",
            {"found": f"{int(nan.sum())} NaN of {math.prod(codes.shape)} weights", "expected": "zeros"},
            f"the tool that made it divides zero by zero. {CONVERT}",
        )
