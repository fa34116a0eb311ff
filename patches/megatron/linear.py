"""What Megatron's own linear layers compute, and with which weights (hooks: forward_linear, forward_weight).

Both hand their weight, by keyword, to a method of their own. Which layers get another one is decided one by one when
the model is built; TransformerEngine's and legacy GroupedMLP are reached there (miles_plugins/linears.py, products.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_plugins import products
from miles_plugins.linears import used_weight
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch


def forward_impl(original: Callable[..., Any], self: Any, input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    product = products.product_of(self)
    if product is None:
        return original(self, input, used_weight(self, weight), *args, **kwargs)
    return products.multiply(product, input, weight, kwargs)  # Megatron names them all


def _patch(name: str) -> Patch:
    return Patch(
        id=f"megatron.linear.{name.lower()}",
        target=f"megatron.core.tensor_parallel.layers:{name}ParallelLinear._forward_impl",
        wrap=forward_impl,
        signature="(self, input, weight, *args, **kwargs)",
        roles=frozenset({"trainer"}),
        reason="Megatron's local linear layers have no way to compute with other weights than their own",
        upstream="https://github.com/NVIDIA/Megatron-LM (megatron/core/tensor_parallel/layers.py)",
        retire_when="Megatron quantizes the weights of its local layers by recipe",
    )


SEAMS = (
    Seam(
        name="weights of linear layers",
        hooks=("forward_weight", "forward_linear"),
        patches=(_patch("Column"), _patch("Row")),
    ),
)
