"""A seam: one place in upstream where plugins may act; a host: what runs the training loop, and the seams it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module

from miles_plugins.manager import Plugins
from miles_plugins.patching import Need, Patch, PatchSet, exists_statically

# One module a seam. Order does not matter: wrap order is declared by the patches themselves.
MODULES = (
    "miles_plugins.patches.ray.workers",
    "miles_plugins.patches.slime.arguments",
    "miles_plugins.patches.slime.processes",
    "miles_plugins.patches.slime.rollout_manager",
    "miles_plugins.patches.slime.responses",
    "miles_plugins.patches.slime.speculation",
    "miles_plugins.patches.slime.shared_data",
    "miles_plugins.patches.slime.training",
    "miles_plugins.patches.slime.losses",
    "miles_plugins.patches.slime.gather",
    "miles_plugins.patches.slime.weights",
    "miles_plugins.patches.slime.weight_update",
    "miles_plugins.patches.slime.metrics",
    "miles_plugins.patches.megatron.router",
    "miles_plugins.patches.megatron.recompute",
    "miles_plugins.patches.megatron.linear",
    "miles_plugins.patches.megatron.draft",
    "miles_plugins.patches.sglang.processes",
    "miles_plugins.patches.sglang.weights",
    "miles_plugins.patches.sglang.requests",
    "miles_plugins.patches.sglang.routing",
    "miles_plugins.patches.sglang.narrow_routing",
    "miles_plugins.patches.sglang.draft",
    "miles_plugins.patches.torch.cpu",
    "miles_plugins.patches.megatron.cpu",
    "miles_plugins.patches.slime.cpu",
    "miles_plugins.patches.sglang.cpu",
    "miles_plugins.patches.sglang.cpu_speculation",
)


@dataclass(frozen=True)
class Host:
    """What runs the training loop: slime, reached by patches, or the embedded trainer, which calls most hooks itself.

    Attributes:
        modules: where its seams are.
        always: hooks whose seams the host needs for itself, also when no plugin implements them.
    """

    name: str
    modules: tuple[str, ...]
    always: frozenset[str] = frozenset()


SLIME = Host("slime", MODULES)
# Always: Megatron's local modules do not train packed sequences by themselves on any device (`choose_device`), and the
# host itself asks which microbatch runs (`microbatch_begins`).
_EMBEDDED = tuple(
    f"miles_plugins.patches.megatron.{module}" for module in ("router", "recompute", "linear", "draft", "cpu")
)
EMBEDDED_ON_GPU = Host("embedded", _EMBEDDED, always=frozenset({"choose_device", "microbatch_begins"}))
EMBEDDED_ON_CPU = Host("embedded", (*_EMBEDDED, "miles_plugins.patches.torch.cpu"), always=EMBEDDED_ON_GPU.always)


@dataclass(frozen=True)
class Variant:
    """The patches of a seam in other releases of upstream, known by what these have and lack.

    Attributes:
        releases: how documents name them: "slime before v0.3.1".
        has: what there must be.
        lacks: what there may not be, so that a release in which it was merely lost is not taken for one of these.
    """

    releases: str
    patches: tuple[Patch, ...]
    has: tuple[Need, ...] = ()
    lacks: tuple[Need, ...] = ()

    def fits(self) -> bool:
        """Whether the installed upstream is one of these releases, by its files."""
        # What is lacked first: that is mostly a module, for which no file has to be parsed.
        return not any(map(exists_statically, self.lacks)) and all(map(exists_statically, self.has))


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
    variants: tuple[Variant, ...] = ()
    """For releases where `patches` are not the right ones; what none of them fits is judged by `patches`."""

    def here(self) -> tuple[Patch, ...]:
        """The patches for the upstream that is installed."""
        return next((variant.patches for variant in self.variants if variant.fits()), self.patches)

    def everywhere(self) -> tuple[Patch, ...]:
        """The patches for all releases, the newest's first."""
        return (*self.patches, *(patch for variant in self.variants for patch in variant.patches))

    def needed_by(self, plugins: Plugins) -> bool:
        return not self.hooks or any(plugins.implement(hook) for hook in self.hooks)

    def needed_in(self, role: str) -> bool:
        return not self.only_in or role in self.only_in


def all_seams(host: Host = SLIME) -> list[Seam]:
    """Every seam; importing them imports nothing of upstream."""
    return [seam for module in host.modules for seam in import_module(module).SEAMS]


def needed_seams(plugins: Plugins, host: Host = SLIME) -> list[Seam]:
    """The seams that some selected plugin, or the host itself, acts through."""
    return [seam for seam in all_seams(host) if seam.needed_by(plugins) or not host.always.isdisjoint(seam.hooks)]


def patch_set(seams: Iterable[Seam]) -> PatchSet:
    """All patches of the seams as one set: they are applied together or not at all."""
    return PatchSet(*(patch for seam in seams for patch in seam.here()), name="miles_plugins")
