"""Let plugins choose the experts of one MoE router (hook: select_experts).

Megatron-LM since db6b895c69 hands `router.router_replay` the whole top-k decision; its own RouterReplay holds one
target a layer, which does not fit several microbatches in flight. An object of ours with the same method asks the
plugins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from miles_plugins.activation import current
from miles_plugins.errors import PatchError
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch, has_parameter

if TYPE_CHECKING:
    import torch


class ExpertSelector:
    """Stands where Megatron expects a RouterReplay."""

    def __init__(self, router: Any) -> None:
        self._router = router

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def choose() -> tuple[torch.Tensor, torch.Tensor]:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)

        chosen = current().hook.select_experts(router=self._router, scores=scores, topk=topk, choose=choose)
        return choose() if chosen is None else chosen


def attach_selector(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    if self.router_replay is not None:
        raise PatchError(
            "two features want to decide the routing of this router",
            {"router": type(self).__name__, "other": "Megatron's own --moe-enable-routing-replay"},
            "leave that flag out",
        )
    self.router_replay = ExpertSelector(self)


def probe_selector() -> None:
    """Megatron's routing function really asks such an object: a choice it would never make comes out."""
    import torch
    from megatron.core.transformer.moe.router import topk_routing_with_score_function

    class LeastLikely:
        def get_replay_topk(
            self, scores: Any, topk: int, num_groups: Any, group_topk: Any, default_compute_topk: Any
        ) -> Any:
            return torch.topk(scores, topk, dim=1, largest=False)

    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    _, routing_map = topk_routing_with_score_function(logits, 2, router_replay=LeastLikely())
    if routing_map.bool().tolist() != [[False, False, True, True]]:
        raise PatchError(
            "Megatron's routing does not follow the object it is given",
            {"expected": "experts 2 and 3", "found": routing_map.tolist()},
            "this Megatron routes on another path; see docs/compatibility.md",
        )


SEAMS = (
    Seam(
        name="expert selection",
        hooks=("select_experts",),
        patches=(
            Patch(
                id="megatron.router.select-experts",
                target="megatron.core.transformer.moe.router:TopKRouter.__init__",
                wrap=attach_selector,
                needs=(
                    has_parameter(
                        "megatron.core.transformer.moe.moe_utils:topk_routing_with_score_function", "router_replay"
                    ),
                ),
                roles=frozenset({"trainer"}),
                reason="stock Megatron replays one target a layer, not one a microbatch",
                upstream="https://github.com/NVIDIA/Megatron-LM (megatron/core/transformer/moe/router_replay.py)",
                retire_when="RouterReplay takes a target a microbatch",
                probe=probe_selector,
            ),
        ),
    ),
)
