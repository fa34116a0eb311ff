"""A seam: one place in upstream where plugins may act."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module

from miles_plugins.manager import Plugins
from miles_plugins.patching import Patch, PatchSet

# One module a seam. Order does not matter: wrap order is declared by the patches themselves.
MODULES = (
    "miles_plugins.patches.ray.workers",
    "miles_plugins.patches.slime.arguments",
    "miles_plugins.patches.slime.processes",
    "miles_plugins.patches.slime.rollout_manager",
    "miles_plugins.patches.slime.training",
    "miles_plugins.patches.slime.metrics",
    "miles_plugins.patches.megatron.router",
    "miles_plugins.patches.megatron.recompute",
    "miles_plugins.patches.sglang.processes",
    "miles_plugins.patches.sglang.requests",
    "miles_plugins.patches.sglang.routing",
    "miles_plugins.patches.torch.cpu",
    "miles_plugins.patches.megatron.cpu",
    "miles_plugins.patches.slime.cpu",
    "miles_plugins.patches.sglang.cpu",
)


@dataclass(frozen=True)
class Seam:
    """Some hooks and the patches that connect them to upstream.

    With `hooks` empty the seam belongs to the layer itself (delivery, attestation) and is there whenever any plugin is.
    """

    name: str
    hooks: tuple[str, ...]
    patches: tuple[Patch, ...]
    only_in: frozenset[str] = frozenset()
    """Start-up roles (`driver`, `worker`, `trainer`, `sglang_child`) to which it is confined; empty: all."""

    def needed_by(self, plugins: Plugins) -> bool:
        return not self.hooks or any(plugins.implement(hook) for hook in self.hooks)

    def needed_in(self, role: str) -> bool:
        return not self.only_in or role in self.only_in


def all_seams() -> list[Seam]:
    """Every seam; importing them imports nothing of upstream."""
    return [seam for module in MODULES for seam in import_module(module).SEAMS]


def needed_seams(plugins: Plugins) -> list[Seam]:
    """The seams that some selected plugin acts through."""
    return [seam for seam in all_seams() if seam.needed_by(plugins)]


def patch_set(seams: Iterable[Seam]) -> PatchSet:
    """All patches of the seams as one set: they are applied together or not at all."""
    return PatchSet(*(patch for seam in seams for patch in seam.patches), name="miles_plugins")
