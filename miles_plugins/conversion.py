"""Convert a Hugging Face checkpoint into another format without a GPU, a shard at a time.

Each file of weights becomes one of the same name. It is written beside its name and then renamed, so that a conversion
that was stopped goes on where it was: run it again. What a target is made from is written into it first (`RECORD`), and
config.json last: until then the folder is no model.

A format brings a `Conversion`: what becomes of each tensor. Everything else is here.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from miles_plugins.checkpoints import (
    BEGUN,
    CONFIG,
    INDEX,
    TensorFacts,
    quantization_config,
    read_header,
    read_json,
    weight_map,
)
from miles_plugins.errors import PluginError

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
"""Called with bytes of the source that are done, and all of them."""

RECORD = BEGUN
PARTIAL = ".partial"
WEIGHT = ".weight"
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json", PARTIAL)
STACKED = re.compile(r".*\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)(\.weight)?")
"""transformers' fused experts: [experts, ., .] in one tensor."""


@dataclass(frozen=True)
class Converted:
    """What was done.

    Attributes:
        weights: how many were quantised, or dequantised.
        bytes_before, bytes_after: of all tensors.
        already: whether all of it was there, and nothing was written.
    """

    weights: int
    bytes_before: int
    bytes_after: int
    already: bool = field(default=False, compare=False)


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


# -- what is done to it -----------------------------------------------------------------------------------------------


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


def refuse_stacked(source: Source) -> None:
    """Raise where a tensor holds the weights of several experts."""
    for name, facts in source.tensors.items():
        if len(facts.shape) == 3 and STACKED.fullmatch(name):
            raise stacked(name, facts)


def stacked(name: str, facts: TensorFacts) -> PluginError:
    """What to raise for one: an engine is sent each expert's weights by themselves."""
    advice = "save one tensor for each expert, as transformers' save_pretrained(save_original_format=True) does"
    return PluginError(
        f"{name} holds several experts in one tensor",
        {"shape": list(facts.shape), "expected": "matrices [N, K]: …experts.0.gate_proj.weight, …"},
        advice,
    )


def require_bf16(name: str, facts: TensorFacts) -> None:
    """Raise unless it is what a trainer sends."""
    if facts.dtype != "BF16":
        advice = "convert it to bf16 first, e.g. transformers' from_pretrained(dtype=torch.bfloat16).save_pretrained()"
        raise PluginError(f"{name} is not bfloat16", {"found": facts.dtype, "expected": "BF16"}, advice)


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Raise where a weight [N, K] has a NaN or an infinity: its whole group or block would become one."""
    if not weight.isfinite().all():
        row, column = (~weight.isfinite()).nonzero()[0].tolist()
        facts = {"found": f"{weight[row, column].item()} at [{row}, {column}]", "shape": list(weight.shape)}
        raise PluginError(f"{name} has values that are not finite", facts, "find out how this checkpoint came about")


def require_plain(source: Source, marks: Collection[str]) -> None:
    """Raise where a checkpoint is quantised: its config.json says so, or it has tensors whose names end so."""
    found = quantization_config(source.config)
    mark = next((mark for mark in marks if source.modules(mark)), None)
    if found is not None or mark is not None:
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        advice = "convert it to BF16 first (`miles-plugins convert-bf16`: INT4 and FP8), or take the BF16 checkpoint"
        raise PluginError(f"{source.folder} is quantised already", {"found": method or f"*{mark}"}, advice)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same model in BF16."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {name: value for name, value in text.items() if name != "quantization_config"}
    return plain


# -- the target -------------------------------------------------------------------------------------------------------


def convert(source: Source, target: Path, conversion: Conversion, progress: Progress | None) -> Converted:
    """Write the converted checkpoint into the folder `target`, or what of it is not there yet."""
    _give_memory_back()
    layouts = {
        file: {
            made: expected
            for name, facts in tensors.items()
            for made, expected in conversion.layout(name, facts).items()
        }
        for file, tensors in source.files.items()
    }
    _begin(source, target, conversion)
    others = [each for each in sorted(source.folder.iterdir()) if each.is_file() and _is_copied(each.name)]
    config = conversion.config(source.config)
    done, total = 0, sum(facts.size for facts in source.tensors.values())
    size = sum(facts.size for layout in layouts.values() for facts in layout.values())
    if _is_complete(target, layouts, others, config):
        if progress:
            progress(total, total)
        return Converted(conversion.weights, total, size, already=True)
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
    for other in others:
        with _writing(target / other.name) as partial:
            shutil.copyfile(other, partial)
    index = {made: file for file, layout in layouts.items() for made in layout}
    _write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))})
    _write_json(target / CONFIG, config)
    return Converted(conversion.weights, total, size)


def _is_copied(name: str) -> bool:
    return name not in (CONFIG, RECORD) and not name.endswith(NOT_COPIED)


def _is_complete(
    target: Path, layouts: Mapping[str, Mapping[str, TensorFacts]], others: Collection[Path], config: Mapping[str, Any]
) -> bool:
    """Whether a conversion that was begun has nothing left to do."""
    beside = [target / INDEX, *(target / other.name for other in others)]
    return (
        (target / CONFIG).is_file()
        and read_json(target / CONFIG) == config
        and all(file.is_file() for file in beside)
        and all(_finished(target / file, layout) for file, layout in layouts.items())
    )


def _give_memory_back() -> None:
    """Have glibc give each tensor back to the system as soon as it is no more.

    It learns from the first large ones to keep such memory, and then what is kept until a file is written lies between
    holes: 3 to 12 times that file were measured. mallopt(3): M_MMAP_THRESHOLD, which also ends the learning.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library: no such function, or no such names
        ctypes.CDLL(None).mallopt(-3, 256 * 1024)


def _begin(source: Source, target: Path, conversion: Conversion) -> None:
    """Make the target, or see that it was begun as the same conversion of the same files."""
    if target.resolve() == source.folder.resolve():
        raise PluginError(
            "a checkpoint cannot be converted into its own folder", {"folder": target}, "give another one"
        )
    if source.folder.resolve() in target.resolve().parents:
        raise PluginError(
            "the target would lie inside of the checkpoint that is converted",
            {"from": source.folder, "to": target},
            "give a folder beside it: what copies or loads the checkpoint would take both",
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
            short = all(isinstance(each.get(differs), (str, int, type(None))) for each in (before, record))
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
