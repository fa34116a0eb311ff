"""Which half of a draft's input projection belongs to what: the token's embedding, or the hidden state before it.

Megatron's `eh_proj` multiplies [embedding, hidden]. SGLang's models do the same, but for MiMo's `input_proj`, which has
the hidden state first; so slime exchanges the halves of MiMo's weights. It does so for Qwen3-Next as well, both when a
checkpoint is loaded and when weights are sent. A draft that is only served never notices, for two exchanges are none.
One that is trained is fed each input where the weights for the other are: it begins as if it were random, and what it
learns reaches the engine the wrong way round to what it was.

The weights cannot be put right: checkpoints of earlier runs have them as they are. The inputs can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EXCHANGED = ("qwen3_next",)
"""`model_type`s whose weights slime gives the trainer exchanged, against what the engine's model does."""


def exchange(x: torch.Tensor) -> torch.Tensor:
    """The halves of the last dimension in the other order."""
    import torch

    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


def exchange_inputs(model_type: str, model: Any) -> int:
    """Let the input projections of such a model multiply what their weights are for; how many there are here."""
    if model_type not in EXCHANGED:
        return 0
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "eh_proj"]
    for projection in found:
        projection.register_forward_pre_hook(lambda _, given: (exchange(given[0]), *given[1:]))
    return len(found)
