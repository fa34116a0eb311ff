"""Every recorded release of upstream and where its files are; as a script, records all of them anew.

    python -m tests.fingerprints

It needs the clones that CONTRIBUTING.md names, and the wheels that tests/wheels.py fetches. To record one release from
a folder of your own: `miles-plugins fingerprint --slime DIR --release "slime v0.3.1"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from miles_plugins.compat.releases import FOLDER
from miles_plugins.compat.stacks import listed_stacks
from miles_plugins.compat.trees import tree_root
from miles_plugins.entrypoints.fingerprint import write_record
from tests.wheels import unpacked_commit, unpacked_wheel

# Beside the stacks' own (compat/stacks.toml): what the embedded host and the routing record are tested with.
FURTHER = ("megatron-core 0.14.0", "megatron-core 0.15.3", "megatron-core 0.16.1", "sglang 0.5.23")


class Source(NamedTuple):
    """Where a release is to be had: a clone's commit, or a wheel."""

    package: str
    distribution: str
    version: str


def sources() -> dict[str, Source]:
    """The name of each release -> where it is to be had."""
    found: dict[str, Source] = {}
    for stack in listed_stacks():
        slime, megatron, sglang = stack.releases
        found[slime] = Source("slime", "slime", stack.slime.removeprefix("main-"))
        found[megatron] = Source("megatron", "Megatron-LM", stack.megatron)
        found[sglang] = Source("sglang", "sglang", stack.sglang)
    for name in FURTHER:
        distribution, version = name.split()
        found[name] = Source(distribution.partition("-")[0], distribution, version)
    return found


def unpacked(name: str) -> Path:
    """The folder that holds a release; skips with one line where it is not to be had."""
    package, distribution, version = sources()[name]
    if distribution == "slime":
        return unpacked_commit(("SLIME_HOME", "~/slime", version), "slime")
    if distribution == "Megatron-LM":
        return unpacked_commit(("MEGATRON_HOME", "~/Megatron-LM", version), "megatron")
    return tree_root(unpacked_wheel(distribution, version), [package])


if __name__ == "__main__":
    for release, source in sources().items():
        print(write_record(release, source.package, unpacked(release), FOLDER))
