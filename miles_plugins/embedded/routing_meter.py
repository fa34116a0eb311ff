"""How often the trainer's routers use other experts than the rollout did, watched from outside of any plugin."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from miles_plugins.microbatch import current_microbatch
from miles_plugins.r3_replay.trace import moe_layers

if TYPE_CHECKING:
    import torch


class RoutingMeter:
    """Counts, while it is entered, the (token, MoE layer) pairs whose set of experts is not the rollout's."""

    def __init__(self, policy: torch.nn.Module, args: Namespace) -> None:
        from megatron.core.transformer.moe.router import TopKRouter

        self._args = args
        self._layers = moe_layers(args.num_layers, args.moe_layer_freq)
        self.traces: Sequence[torch.Tensor] = ()
        """Each sample's routing in the rollout, [tokens - 1, all layers, topk]; the host sets it for each rollout."""
        self.next: Sequence[int] = ()
        """The samples of the next microbatch."""
        self._expected: tuple[torch.Tensor, torch.Tensor] | None = None
        self._entered = False
        self._reset()
        for name, module in policy.named_modules():
            if isinstance(module, TopKRouter) and "mtp" not in name.split("."):  # no rollout records a draft's routing
                module.register_forward_hook(self._watch)

    def _reset(self) -> None:
        self._tokens = 0
        self._different = dict.fromkeys(self._layers, 0)

    def __enter__(self) -> RoutingMeter:
        self._reset()
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered = False

    def microbatch(self, positions: torch.Tensor) -> None:
        """The forward pass of one microbatch is about to run; `positions`: see `Microbatch.positions`."""
        if self._entered:
            kept = [self.traces[sample][:, self._layers] for sample in self.next]
            self._expected = _laid_out(kept, positions)
            self._tokens += int(self._expected[1].sum())

    def _watch(self, router: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """`output` is Megatron's (probabilities, routing map), [tokens, experts] each."""
        import torch

        microbatch = current_microbatch()
        if not self._entered or self._expected is None or (microbatch and microbatch.recomputing):
            return
        layer = router.layer_number - 1
        indices, recorded = self._expected
        used = output[1].bool()
        expected = torch.zeros_like(used).scatter_(1, indices[self._layers.index(layer)].long(), True)
        self._different[layer] += int(((used != expected).any(dim=1) & recorded).sum())

    def shares(self) -> dict[str, float]:
        """The share of differing pairs, over all and in each MoE layer, of what ran since it was entered."""
        tokens = max(self._tokens, 1)
        layers = {f"routing_different_layer_{layer}": count / tokens for layer, count in self._different.items()}
        return {"routing_different": sum(layers.values()) / len(layers) if layers else 0.0, **layers}


def _laid_out(traces: Sequence[torch.Tensor], positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[layers, tokens, topk] ids, and [tokens] bool: whether the rollout recorded a choice for the token."""
    import torch

    blank = torch.zeros_like(traces[0][:1])
    stream = torch.cat([part for trace in traces for part in (trace, blank)]).to(positions.device)
    known = torch.cat([torch.arange(len(trace) + 1) < len(trace) for trace in traces]).to(positions.device)
    return stream[positions].transpose(0, 1), known[positions] & (positions >= 0)
