"""Upstream's releases and commits, unpacked once a machine and installed nowhere."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

CACHE = ("MILES_PLUGINS_WHEELS", "~/.cache/miles-plugins/wheels")


def unpacked_wheel(distribution: str, version: str) -> Path:
    """A folder for sys.path with one release; fetched by pip, without what it depends on, if it is not there yet.

    Skips with one line when it is not there and pip cannot fetch it.
    """

    def unpack(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as fetched, zipfile.ZipFile(_fetch(distribution, version, fetched)) as wheel:
            wheel.extractall(folder)

    return _once(f"{distribution.replace('-', '_')}-{version}", unpack)


def unpacked_commit(checkout: tuple[str, str, str], *paths: str) -> Path:
    """A folder with these paths of one commit: (variable that names the clone, where else it is, commit).

    Skips with one line when there is no clone that has the commit.
    """
    variable, default, commit = checkout
    clone = Path(os.environ.get(variable, default)).expanduser()

    def git(*command: str) -> bytes:
        result = subprocess.run(["git", "-C", str(clone), *command], capture_output=True)
        if result.returncode != 0:
            pytest.skip(
                f"no git clone with {commit} at {clone}: clone it there, or set {variable} (see CONTRIBUTING.md)"
            )
        return result.stdout

    def unpack(folder: Path) -> None:
        with tarfile.open(fileobj=BytesIO(git("archive", "--format=tar", commit, *paths))) as tar:
            tar.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(folder)

    full = git("rev-parse", "--verify", f"{commit}^{{commit}}").decode().strip()
    return _once("-".join([clone.name, full, *paths]).replace("/", "-"), unpack)


def _once(name: str, unpack: Callable[[Path], None]) -> Path:
    """The folder of this name in the cache, filled if it is not there yet: wholly or not at all, also by several."""
    variable, default = CACHE
    cache = Path(os.environ.get(variable) or default).expanduser()
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():  # another process was faster
            return folder
        with tempfile.TemporaryDirectory(dir=cache, prefix=".unpacking-") as scratch:
            unpack(unpacked := Path(scratch, name))
            unpacked.rename(folder)
    return folder


def _fetch(distribution: str, version: str, folder: str) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=1"]
    requirement = f"{distribution}=={version}"
    command = [*pip, "--no-deps", "--only-binary=:all:", f"--dest={folder}", requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        problem = (result.stderr.strip().splitlines() or ["pip says nothing"])[-1]
    except subprocess.TimeoutExpired:
        problem = "no answer for five minutes"
    wheels = list(Path(folder).glob("*.whl"))
    if not wheels:
        pytest.skip(f"{requirement} is not in ${CACHE[0]} (else {CACHE[1]}), and pip cannot fetch it: {problem}")
    return wheels[0]
