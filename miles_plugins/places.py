"""Where a quantised weight of a checkpoint is in the trainer's model: a transformer layer, and what in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

from miles_plugins.errors import PluginError
from miles_plugins.linears import Linear, linear_layers

Place = tuple[str, str]
"""A transformer layer ("3"; "mtp 0" for a multi-token prediction block) and what in it ("experts", …)."""

_KINDS = {
    "experts": re.compile(r"\.mlp\.experts\."),
    "shared-experts": re.compile(r"\.mlp\.shared_experts\."),
    "mlp": re.compile(r"\.mlp\.linear_fc[12]$"),
    "attention": re.compile(
        r"\.self_attention\.(linear_qkv|linear_proj|linear_q_proj|linear_(q|kv)_(down|up)_proj|linear_kv_proj)$"
    ),
}


def place(linear: Linear) -> Place | None:
    """Where a layer of the trainer is; None where nothing is quantised."""
    return place_of(linear.name, layer_name(linear))


def place_of(name: str, layer: str | None) -> Place | None:
    """The same by Megatron's name of the layer, without `.weight`, and its transformer layer."""
    kind = next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), None)
    return None if kind is None or layer is None else (layer, kind)


def layer_name(linear: Linear) -> str | None:
    """Its transformer layer, as in `Place`; None outside of them."""
    if linear.is_multi_token_prediction:
        return layer_in(linear.name)
    return None if linear.layer is None else str(linear.layer)  # names count from this rank's first layer


def layer_in(name: str) -> str | None:
    """The transformer layer in a name of the whole model."""
    if found := re.search(r"(^|\.)(mtp\.)?layers\.(\d+)\.", name):
        return f"mtp {found[3]}" if found[2] else found[3]
    return None


def local_layers(model: Iterable[Any]) -> set[str]:
    """The transformer layers that this rank holds."""
    return {layer for linear in linear_layers(list(model)) if (layer := layer_name(linear)) is not None}


def require_all(model: Iterable[Any], quantised: Set[Place], used: Mapping[Place, int]) -> None:
    """Raise unless every place of this rank that the checkpoint has quantised has layers of the trainer in `used`."""
    local = local_layers(model)
    if absent := sorted(each for each in quantised if each[0] in local and each not in used):
        raise PluginError(
            "weights that the checkpoint has quantised have no linear layers in the trainer that could be",
            {
                "layers": ", ".join(f"{layer} ({kind})" for layer, kind in absent[:8]),
                "quantised": f"{sum(used.values())} weights in {len(used)} places",
            },
            "a model provider with layers of its own must use Megatron's or TransformerEngine's linear layers",
        )
