"""Small checkpoints to convert, and what is the same in two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
Tensors = dict[str, Any]


def write(folder: Path, shards: dict[str, Tensors], config: dict[str, Any] | None = None, index: bool = True) -> Path:
    """A checkpoint of these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if index:
        names = {name: file for file, tensors in shards.items() for name in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 17}, "weight_map": names}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **(config or {})}))
    return folder


def one(folder: Path, name: str, tensor: torch.Tensor, **more: Any) -> Path:
    """A checkpoint of one tensor, without an index."""
    return write(folder, {"model.safetensors": {name: tensor}}, more, index=False)


def weights(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    torch.manual_seed(0)
    return {f"{name}.weight": (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}


def load(folder: Path) -> Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit: zeros of both signs differ, too."""
    same = left.dtype == right.dtype and left.shape == right.shape
    return same and torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (left, right)))


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """What differs as soon as a file is written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors")}


class Stopped(Exception):
    pass


def stop_after(calls: int) -> Callable[[int, int], None]:
    """A progress that stops a conversion."""
    count = iter(range(calls))

    def progress(done: int, total: int) -> None:
        if next(count, None) is None:
            raise Stopped

    return progress
