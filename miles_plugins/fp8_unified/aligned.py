"""The trainer's linear layers as the engine computes them: block-FP8 forward, bfloat16 backward."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from miles_plugins import Linear, PluginError
from miles_plugins.fp8_unified import product
from miles_plugins.fp8_unified.blockwise import Format, Quantised
from miles_plugins.fp8_unified.quantised import quantise_weights

if TYPE_CHECKING:
    import torch


class AlignedLinear:
    """What one layer computes: its weights quantised once a pass, its input in each forward.

    Within a pass (all microbatches, recomputation, the backward pass) weights do not change; an optimizer step, a
    switch to the reference or back, loading and waking up come between passes. So nothing is kept from one to the next.

    Args:
        parts: how many rows each of the checkpoint's tensors has that make up the layer's weight, in the checkpoint's
            order; `order` [N] int64 are their rows in the weight, None where they lie there as they are.
        in_pass: the pass that runs, None outside of one.
        natural: passes that compute x @ weight.T.
    """

    def __init__(
        self,
        linear: Linear,
        format: Format,
        parts: Sequence[int],
        order: torch.Tensor | None,
        in_pass: Callable[[], str | None],
        natural: Collection[str] = (),
    ) -> None:
        self.linear, self.quantised = linear, 0
        self._format, self._parts, self._order = format, list(parts), order
        self._in_pass, self._natural = in_pass, natural
        # Where the checkpoint's tiles are not tiles of the whole weight, each part is quantised by itself, as there.
        self._apart = not tiles_agree(parts, order, format.block[0])
        self._inverse = None if order is None else order.argsort()
        self._kept: list[list[Quantised]] | None = None

    def __call__(self, x: torch.Tensor, weights: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
        import torch

        stage = self._in_pass()
        if stage in self._natural:
            pairs = zip(x.split(list(rows)), weights, strict=True)
            return torch.cat([part @ weight.t() for part, weight in pairs])
        kept = self._kept
        if kept is None:
            kept = self._quantise(weights)
            if stage is not None:
                self._kept = kept
        of_parts = [product.linear(x, part, rows, self._format) for part in kept]
        result = of_parts[0] if len(of_parts) == 1 else torch.cat(of_parts, dim=1)
        return result if not self._apart or self._inverse is None else result[:, self._inverse.to(x.device)]

    def _quantise(self, weights: Sequence[torch.Tensor]) -> list[list[Quantised]]:
        """For each part, all weights of it."""
        self.quantised += 1
        if not self._apart:
            return [quantise_weights(weights, self._format)]
        whole = [weight if self._order is None else weight[self._order.to(weight.device)] for weight in weights]
        return [
            quantise_weights(part, self._format)
            for part in zip(*(each.split(self._parts) for each in whole), strict=True)
        ]

    def forget(self) -> None:
        """The weights may be others from here on."""
        self._kept = None


def tiles_agree(parts: Sequence[int], order: torch.Tensor | None, tile: int) -> bool:
    """Whether tiles of a weight, of `tile` rows, are those of the checkpoint's tensors: all runs of rows are whole."""
    if any(part % tile for part in parts[:-1]):  # the last part's tail is the weight's own
        return False
    if order is None:
        return True
    begins = (order[1:] != order[:-1] + 1).nonzero().flatten() + 1
    return bool((begins % tile == 0).all() and (order[begins] % tile == 0).all()) and parts[-1] % tile == 0


def rows_of_checkpoint(args: Namespace, linear: Linear) -> tuple[list[int], torch.Tensor | None]:
    """The rows of each tensor of the checkpoint that make up this layer's weight, and where they are in it.

    Megatron keeps query, key and value heads of one group together, and gate and up one after the other.

    Raises:
        PluginError: the weight has another number of rows than its heads have.
    """
    import torch

    n = linear.shape[0]
    if linear.name.endswith(".linear_fc1"):
        return [n // 2, n // 2], None
    if not linear.name.endswith(".self_attention.linear_qkv"):
        return [n], None
    size = args.kv_channels
    groups = args.num_query_groups if getattr(args, "group_query_attention", True) else args.num_attention_heads
    heads = args.num_attention_heads // groups
    if n % ((heads + 2) * size):
        raise PluginError(
            f"{linear.name} is no query, key and value of {groups} groups",
            {"rows": n, "expected": f"a multiple of ({heads} + 2) x {size}", "heads": args.num_attention_heads},
            "attention with a gate, or with more than one rank a group, cannot be trained in FP8 yet: leave fp8 out",
        )
    rows = torch.arange(n).view(-1, heads + 2, size)
    each = [part.flatten() for part in rows.split([heads, 1, 1], dim=1)]
    return [len(part) for part in each], torch.cat(each)
