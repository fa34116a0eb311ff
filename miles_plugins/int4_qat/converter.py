"""Convert a Hugging Face checkpoint from BF16 to INT4 and back, without a GPU and a shard at a time.

Each file of weights becomes one of the same name. It is written beside its name and then renamed, so that a conversion
that was stopped goes on where it was: run it again. What a target is made from is written into it first (`RECORD`), and
config.json last: until then the folder is no model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from miles_plugins.errors import PluginError
from miles_plugins.int4_qat.checkpoint import (
    CONFIG,
    INDEX,
    PACKED,
    SCALE,
    SHAPE,
    Format,
    TensorFacts,
    ignored,
    quantization_config,
    read_format,
    read_header,
    read_json,
    weight_map,
)
from miles_plugins.int4_qat.grid import PER_WORD, Grid, Quantised, dequantise, pack, quantise, unpack

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
"""Called with bytes of the source that are done, and all of them."""

RECORD = "miles-plugins-conversion.json"
PARTIAL = ".partial"
WEIGHT = ".weight"
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json", PARTIAL)

MODULES = {
    "experts": re.compile(r".*\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)"),
    "shared-experts": re.compile(r".*\.shared_experts?\.(gate|up|down)_proj"),
    "mlp": re.compile(r".*\.mlp\.(gate|up|down)_proj"),
    # MLA's compressed projections stay as they are: SGLang takes kv_b_proj's weight apart itself.
    "attention": re.compile(r".*\.self_attn\.(q|k|v|o)_proj"),
}
"""What can be packed: a name for the user, and the modules it means. Nothing else ever is."""
STACKED = re.compile(r".*\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)(\.weight)?")
"""transformers' fused experts: [experts, ., .] in one tensor."""
DEFAULT_IGNORE = (
    "lm_head",
    r"re:(.*\.)?(visual|vision\w*|audio\w*|mm_projector|multi_modal_projector)\.",
)
"""Left out although `MODULES` may match: a vision tower has an mlp and attention, too."""


@dataclass(frozen=True)
class Converted:
    """What was done.

    Attributes:
        weights: how many were packed, or unpacked.
        bytes_before, bytes_after: of all tensors.
    """

    weights: int
    bytes_before: int
    bytes_after: int


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
        ignore: rules as in `checkpoint.ignored`, for modules to leave out; to add some: (*DEFAULT_IGNORE, …).

    Raises:
        PluginError: the source is no BF16 checkpoint of safetensors files, nothing or something unfit is selected
            (another dtype, K not divisible, stacked experts, NaN or infinity), or the target has other files in it.
    """
    checkpoint = Source.read(source)
    if (found := quantization_config(checkpoint.config)) is not None or checkpoint.modules(PACKED):
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        advice = "convert it to BF16 first (`miles-plugins convert-bf16` takes INT4), or take the BF16 checkpoint"
        raise PluginError(f"{source} is quantised already", {"found": method or f"*{PACKED}"}, advice)
    return _convert(checkpoint, target, ToInt4.plan(checkpoint, grid, ignore, modules), progress)


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
    return _convert(checkpoint, target, ToBf16.plan(checkpoint, declared), progress)


# -- the source -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert: its config, and file -> name -> facts of its tensors."""

    folder: Path
    config: Mapping[str, Any]
    files: Mapping[str, Mapping[str, TensorFacts]]

    @classmethod
    def read(cls, folder: Path) -> Source:
        config = read_json(folder / CONFIG)
        names: dict[str, list[str]] = defaultdict(list)
        for name, file in weight_map(folder).items():
            names[file].append(name)
        files = {}
        for file, expected in sorted(names.items()):
            header = read_header(folder / file)
            if missing := [name for name in expected if name not in header]:
                facts = {"missing": missing[0], "and": f"{len(missing) - 1} more" if missing[1:] else None}
                raise PluginError(f"{folder / file} lacks tensors of the index", facts, "copy the checkpoint again")
            files[file] = {name: header[name] for name in expected}
        return cls(folder, config, files)

    @property
    def tensors(self) -> dict[str, TensorFacts]:
        return {name: facts for tensors in self.files.values() for name, facts in tensors.items()}

    def modules(self, suffix: str) -> dict[str, TensorFacts]:
        """Modules that have a tensor of this name, with its facts."""
        return {name[: -len(suffix)]: facts for name, facts in self.tensors.items() if name.endswith(suffix)}

    @contextmanager
    def reading(self, file: str) -> Iterator[Callable[[str], torch.Tensor]]:
        """Gives what reads a tensor by its name; this file is open meanwhile."""
        from safetensors import safe_open

        with safe_open(self.folder / file, framework="pt") as opened:

            def read(name: str) -> torch.Tensor:
                if name in self.files[file]:
                    return opened.get_tensor(name)
                other = next(other for other, tensors in self.files.items() if name in tensors)
                with safe_open(self.folder / other, framework="pt") as elsewhere:
                    return elsewhere.get_tensor(name)

            yield read


# -- the two conversions ----------------------------------------------------------------------------------------------


class Conversion(Protocol):
    """What becomes of each tensor. `settings` are JSON: two conversions with the same ones do the same."""

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def weights(self) -> int: ...

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]: ...

    def layout(self, name: str, facts: TensorFacts) -> dict[str, TensorFacts]:
        """What this tensor becomes: nothing, where another one takes it along."""
        ...

    def convert(self, name: str, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same with its numbers."""
        ...


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
            _refuse_stacked(source)
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
        for name in sorted(packed):
            _require_bf16(name + WEIGHT, weights[name])
            grid.check(name + WEIGHT, weights[name].shape)
            if len(weights[name].shape) != 2:
                raise _stacked(name + WEIGHT, weights[name])
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
        if not weight.isfinite().all():
            row, column = (~weight.isfinite()).nonzero()[0].tolist()
            facts = {"found": f"{weight[row, column].item()} at [{row}, {column}]", "shape": list(weight.shape)}
            raise PluginError(
                f"{name} has values that are not finite", facts, "find out how this checkpoint came about"
            )
        codes, scale = quantise(weight, self.grid)
        shape = torch.tensor(weight.shape, dtype=torch.int64)
        return {module + PACKED: pack(codes), module + SCALE: scale, module + SHAPE: shape}


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
                        {"found": _shown(found), "expected": _shown(allowed[0]), "group size": declared.group_size},
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
        plain = {name: value for name, value in config.items() if name != "quantization_config"}
        if isinstance(text := plain.get("text_config"), Mapping):
            plain["text_config"] = {name: value for name, value in text.items() if name != "quantization_config"}
        return plain

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


def _refuse_stacked(source: Source) -> None:
    for name, facts in source.tensors.items():
        if len(facts.shape) == 3 and STACKED.fullmatch(name):
            raise _stacked(name, facts)


def _stacked(name: str, facts: TensorFacts) -> PluginError:
    advice = "save one tensor for each expert, as transformers' save_pretrained(save_original_format=True) does"
    return PluginError(
        f"{name} holds several experts in one tensor",
        {"shape": list(facts.shape), "expected": "matrices [N, K]: …experts.0.gate_proj.weight, …"},
        advice,
    )


def _require_bf16(name: str, facts: TensorFacts) -> None:
    if facts.dtype != "BF16":
        advice = "convert it to bf16 first, e.g. transformers' from_pretrained(dtype=torch.bfloat16).save_pretrained()"
        raise PluginError(f"{name} is not bfloat16", {"found": facts.dtype, "expected": "BF16"}, advice)


def _shown(facts: TensorFacts | None) -> str:
    return f"{facts.dtype} {list(facts.shape)}" if facts else "missing"


# -- the target -------------------------------------------------------------------------------------------------------


def _convert(source: Source, target: Path, conversion: Conversion, progress: Progress | None) -> Converted:
    layouts = {
        file: {
            made: expected
            for name, facts in tensors.items()
            for made, expected in conversion.layout(name, facts).items()
        }
        for file, tensors in source.files.items()
    }
    _begin(source, target, conversion)
    done, total = 0, sum(facts.size for facts in source.tensors.values())
    for file, tensors in source.files.items():
        if _finished(target / file, layouts[file]):
            done += sum(facts.size for facts in tensors.values())
            if progress:
                progress(done, total)
            continue
        made = {}
        with source.reading(file) as read:
            for name, facts in tensors.items():
                made.update(conversion.convert(name, read))
                done += facts.size
                if progress:
                    progress(done, total)
            with _writing(target / file) as partial:
                _save(made, partial)
    for other in sorted(source.folder.iterdir()):
        if other.is_file() and other.name not in (CONFIG, RECORD) and not other.name.endswith(NOT_COPIED):
            with _writing(target / other.name) as partial:
                shutil.copyfile(other, partial)
    size = sum(facts.size for file in layouts for facts in read_header(target / file).values())
    index = {made: file for file, layout in layouts.items() for made in layout}
    _write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))})
    _write_json(target / CONFIG, conversion.config(source.config))
    return Converted(conversion.weights, total, size)


def _begin(source: Source, target: Path, conversion: Conversion) -> None:
    """Make the target, or see that it was begun as the same conversion of the same files."""
    if target.resolve() == source.folder.resolve():
        raise PluginError(
            "a checkpoint cannot be converted into its own folder", {"folder": target}, "give another one"
        )
    stats = {file: (source.folder / file).stat() for file in source.files}
    files = {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}
    record = {**conversion.settings, "source": files}
    if target.is_dir() and any(target.iterdir()):
        advice = "give an empty folder, or delete this one"
        if not (target / RECORD).is_file():
            found = min(file.name for file in target.iterdir())
            raise PluginError(f"{target} has other files in it", {"found": found, "expected": RECORD}, advice)
        before = read_json(target / RECORD)
        if before != record:
            differs = next(key for key in (*record, *before) if before.get(key) != record.get(key))
            short = differs in ("to", "group_size", "kind")
            facts = {
                "differs": "the source's files" if differs == "source" else differs,
                "begun with": before.get(differs) if short else None,
                "now": record.get(differs) if short else None,
            }
            raise PluginError(f"{target} was begun as another conversion", facts, advice)
        for left in [*target.glob(".tmp*"), *target.glob(f"*{PARTIAL}")]:  # safetensors' own, and ours
            left.unlink()  # of a process that was killed
        return
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PluginError(f"cannot make the folder {target}", {"found": error}, "give another one") from error
    _write_json(target / RECORD, record)


def _finished(file: Path, layout: Mapping[str, TensorFacts]) -> bool:
    """Whether a file is there with these tensors, whole."""
    if not file.is_file():
        return False
    try:
        return read_header(file) == layout
    except PluginError:
        return False


@contextmanager
def _writing(file: Path) -> Iterator[Path]:
    """Gives a file to write, which takes the place of this one when it is complete."""
    from safetensors import SafetensorError

    partial = file.with_name(file.name + PARTIAL)
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        advice = "make room there; the same command goes on from here"
        raise PluginError(f"cannot write {file}", {"found": error}, advice) from error
    finally:
        partial.unlink(missing_ok=True)


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    with _writing(file) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
