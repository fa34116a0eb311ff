"""Replay on one model: which router takes which layer's routing, and the count of what was replayed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from miles_plugins.errors import PluginError

if TYPE_CHECKING:
    import torch

REPLAYED, RECORDED, TOKENS, DIFFERENT = range(4)  # the columns of `Replay.counts`


@dataclass
class Recorded:
    """The routing of one microbatch on this rank.

    Attributes:
        indices: [MoE layers of the chunk, tokens, topk] expert ids, in the order of `Replay.rows_of(chunk)`.
        recorded: [tokens] bool, whether the rollout recorded a choice.
        tokens: tokens whose choice mattered in the rollout or would have: neither padding nor the last of a sample.
        chunk: the model chunk (virtual pipeline stage) that this forward pass is of.
        replayed: MoE layers whose router has taken its choice in the forward pass.
    """

    indices: torch.Tensor
    recorded: torch.Tensor
    tokens: torch.Tensor
    chunk: int = 0
    replayed: set[int] = field(default_factory=set)


@dataclass
class _Passed:
    """Of a microbatch only what is counted: its routing is let go as soon as its last recomputation is over."""

    recorded: torch.Tensor
    tokens: torch.Tensor
    chunk: int
    replayed: set[int]


class Replay:
    """The routers of one live model, and the counters of the pass that runs.

    Routers are found by walking the module tree, never by construction order: a provider that builds its decoder twice
    would leave dead routers first in line.
    """

    def __init__(self, model: Sequence[torch.nn.Module], layers: Sequence[int], measure_only: bool = False) -> None:
        """Bind the routers of `model` to `layers`, the global indices of the model's MoE layers.

        Args:
            model: one module a virtual pipeline stage.
            measure_only: compare the recorded choice with the natural one and leave the natural one.

        Raises:
            PluginError: a router's layer is no MoE layer by the arguments, or two routers claim one.
        """
        self._model = [weakref.ref(chunk) for chunk in model]
        self._layer_of: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
        self._layers = len(layers)
        self._measure_only = measure_only
        self._of_chunk: list[list[int]] = []
        index = {layer: position for position, layer in enumerate(layers)}
        for chunk in model:
            self._of_chunk.append([])
            for name, module in chunk.named_modules():
                if not hasattr(module, "router_replay") or _is_draft(name, module):
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
                self._of_chunk[-1].append(index[layer])
        # Also should a router vanish: then it did not replay.
        self.local_layers = sorted(layer for chunk_layers in self._of_chunk for layer in chunk_layers)
        """Positions, among the MoE layers, of those on this rank."""
        self._row = {layer: row for of_chunk in self._of_chunk for row, layer in enumerate(sorted(of_chunk))}
        self.active = False
        self._begin()

    def _begin(self) -> None:
        self._passed: list[_Passed] = []
        self._different: dict[int, list[torch.Tensor]] = {}

    def is_of(self, model: Sequence[torch.nn.Module]) -> bool:
        """Whether it was made for this very model, not for another one in the process."""
        return [chunk() for chunk in self._model] == list(model)

    def rows_of(self, chunk: int) -> list[int]:
        """Where, in `local_layers`, the layers of a model chunk are."""
        return [self.local_layers.index(layer) for layer in sorted(self._of_chunk[chunk])]

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

    def forget(self) -> None:
        """The pass was counted: nothing of it stays on the device."""
        self._begin()

    def add(self, microbatch: Recorded) -> None:
        """The forward pass of one microbatch, through one model chunk, is about to run."""
        recorded, tokens = microbatch.recorded.sum(), microbatch.tokens.sum()
        self._passed.append(_Passed(recorded, tokens, microbatch.chunk, microbatch.replayed))

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
        layer = self._layer_of.get(router)
        if layer is None:
            return None
        indices = microbatch.indices[self._row[layer]].long()
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
            self._compare(layer, choose, indices, microbatch.recorded)
        return None if self._measure_only else (scores.gather(1, indices), indices)

    def _compare(
        self,
        layer: int,
        choose: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        indices: torch.Tensor,
        recorded: torch.Tensor,
    ) -> None:
        """Count the tokens whose natural choice is another set of experts than the recorded one."""
        import torch

        with torch.no_grad():
            natural = choose()[1]
            # Both hold topk different experts, so they are the same set if each of one is in the other.
            same = (natural[:, :, None] == indices[:, None, :]).any(dim=2).all(dim=1)
            self._different.setdefault(layer, []).append((recorded & ~same).sum())

    def counts(self) -> torch.Tensor:
        """[MoE layers, 4] float64 on the CPU, of this pass on this rank.

        For each layer, over its tokens: those replayed, those with a record, all (neither padding nor the last of a
        sample), and those with a record whose natural choice differs from it.
        """
        import torch

        counts = torch.zeros(self._layers, 4, dtype=torch.float64)
        pairs = [torch.stack((passed.recorded, passed.tokens)) for passed in self._passed]
        sums = torch.stack(pairs).tolist() if pairs else []  # the device is waited for once
        for passed, (recorded, tokens) in zip(self._passed, sums, strict=True):
            for layer in self._of_chunk[passed.chunk]:
                counts[layer, REPLAYED] += recorded * (layer in passed.replayed)
                counts[layer, RECORDED] += recorded
                counts[layer, TOKENS] += tokens
        for layer, different in self._different.items():
            counts[layer, DIFFERENT] = int(torch.stack(different).sum())
        return counts


def _is_draft(name: str, module: torch.nn.Module) -> bool:
    return ".mtp." in f".{name}." or bool(getattr(module, "is_mtp_layer", False))
