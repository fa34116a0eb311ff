"""Replay on one model: which router takes which layer's routing, and the count of what was replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from miles_plugins.errors import PluginError

if TYPE_CHECKING:
    import torch


@dataclass
class Recorded:
    """The routing of one microbatch on this rank.

    Attributes:
        indices: [MoE layers, tokens, topk] expert ids.
        recorded: [tokens] bool, whether the rollout recorded a choice.
        replayed: MoE layers whose router has taken its choice in the forward pass.
    """

    indices: torch.Tensor
    recorded: torch.Tensor
    replayed: set[int]


class Replay:
    """The routers of one live model, and the counters of the pass that runs.

    Routers are found by walking the module tree, never by construction order: a provider that builds its decoder twice
    would leave dead routers first in line.
    """

    def __init__(self, model: Sequence[torch.nn.Module], layers: Sequence[int]) -> None:
        """Bind the routers of `model` to `layers`, the global indices of the model's MoE layers.

        Raises:
            PluginError: a router's layer is no MoE layer by the arguments, or two routers claim one.
        """
        self._layer_of: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
        index = {layer: position for position, layer in enumerate(layers)}
        for chunk in model:
            for name, module in chunk.named_modules():
                if not hasattr(module, "router_replay") or ".mtp." in f".{name}.":
                    continue  # the draft head (MTP) predicts other tokens than the rollout routed
                layer = module.layer_number - 1
                if layer not in index or index[layer] in self._layer_of.values():
                    raise PluginError(
                        "the model's routers are not the ones that its arguments describe",
                        {
                            "router": name,
                            "its layer": layer,
                            "MoE layers": f"{list(layers)} by --num-layers and --moe-layer-freq",
                        },
                        "correct --moe-layer-freq",
                    )
                self._layer_of[module] = index[layer]
        self._routers = len(self._layer_of)  # also should one of them vanish: then it did not replay
        self.active = False
        self._begin()

    def _begin(self) -> None:
        # Of each microbatch only what is counted: its routing is let go as soon as its last recomputation is over.
        self._passed: list[tuple[torch.Tensor, set[int]]] = []
        self._different: list[torch.Tensor] = []

    @property
    def local_layers(self) -> set[int]:
        """Positions, among the MoE layers, of those on this rank."""
        return set(self._layer_of.values())

    def is_bound(self, router: torch.nn.Module) -> bool:
        """Whether this router replays when a pass does."""
        return router in self._layer_of

    def begin(self) -> None:
        """A pass that replays begins."""
        self._begin()
        self.active = True

    def end(self) -> None:
        """The pass ended: routers choose for themselves again."""
        self.active = False

    def add(self, microbatch: Recorded) -> None:
        """The forward pass of one microbatch is about to run."""
        self._passed.append((microbatch.recorded.sum(), microbatch.replayed))

    def select(
        self,
        router: torch.nn.Module,
        microbatch: Recorded,
        recomputing: bool,
        scores: torch.Tensor,
        topk: int,
        choose: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The recorded experts with probabilities from the current scores, [tokens, topk] each; None if not bound.

        Raises:
            PluginError: the shape is not the router's, or the layer's routing was taken before in this forward pass.
        """
        import torch

        layer = self._layer_of.get(router)
        if layer is None:
            return None
        indices = microbatch.indices[layer].long()
        if indices.shape != (scores.shape[0], topk):
            raise PluginError(
                "the recorded routing does not fit the router",
                {"got": tuple(indices.shape), "expected": (scores.shape[0], topk), "MoE layer": layer},
                "this parallel layout is not supported; see docs/r3_replay.md",
            )
        if not recomputing:
            if layer in microbatch.replayed:
                raise PluginError(
                    "a router asked twice for one microbatch in one forward pass",
                    {"MoE layer": layer},
                    "report this with your parallel and recompute flags",
                )
            microbatch.replayed.add(layer)
            with torch.no_grad():
                natural = choose()[1]
            differs = (natural.sort(dim=1).values != indices.sort(dim=1).values).any(dim=1)
            self._different.append((differs & microbatch.recorded).sum())
        return scores.gather(1, indices), indices

    def counts(self) -> torch.Tensor:
        """[replayed, expected, different] (token, MoE layer) pairs of this pass on this rank, float64 on the CPU."""
        import torch

        replayed = expected = 0
        for recorded, layers in self._passed:
            replayed += int(recorded) * len(layers)
            expected += int(recorded) * self._routers
        different = int(torch.stack(self._different).sum()) if self._different else 0
        return torch.tensor([replayed, expected, different], dtype=torch.float64)
