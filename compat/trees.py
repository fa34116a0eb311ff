"""Upstream in a folder, installed nowhere: a checkout, an unpacked wheel, or any folder that could be on sys.path."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from miles_plugins.compat.source import find_module, has_package

UPSTREAM = ("slime", "megatron", "sglang")
"""The packages that users have checkouts of, and of whose releases there are fingerprints."""

_MEGATRON = ("core", "training")  # `megatron` itself has no __init__.py


def tree_root(directory: Path, packages: Iterable[str] = UPSTREAM) -> Path:
    """The folder that holds the packages: the directory, or `python/` in it, where SGLang's repository has its own.

    Raises LookupError when neither holds one.
    """
    directory, packages = directory.expanduser().resolve(), tuple(packages)
    for root in (directory, directory / "python"):
        if any(holds(root, package) for package in packages):
            return root
    raise LookupError(
        f"no package {', '.join(packages[:-1])}{' or ' * (len(packages) > 1)}{packages[-1]} in {directory} "
        "nor in its folder python/; name the root of a checkout or of an unpacked wheel"
    )


def holds(root: Path, package: str) -> bool:
    """Whether the folder has the package, and not just a folder of that name."""
    names = [f"{package}/{part}" for part in _MEGATRON] if package == "megatron" else [package]
    return any((root / name / "__init__.py").is_file() for name in names)


def absent_part(module: str, roots: Iterable[Path]) -> str:
    """The package of a module that no folder has because only some distributions hold it, else "".

    The distribution megatron-core has no `megatron.training`. A checkout without it is one that has lost it.
    """
    parts = module.split(".")
    package = ".".join(parts[:2])
    if parts[0] != "megatron" or has_package(package) or find_module(parts[0]):
        return ""
    is_distribution = any(file for root in roots for file in root.glob("megatron_core-*.dist-info"))
    return package if is_distribution else ""
