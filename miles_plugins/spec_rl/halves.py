"""Which half of a draft's input projection belongs to what: the token's embedding, or the hidden state before it.

Megatron's `eh_proj` multiplies [embedding, hidden]. SGLang's models do the same, but for MiMo's `input_proj`, which has
the hidden state first; so slime exchanges the halves of MiMo's weights. It does so for Qwen3-Next as well, both when a
checkpoint is loaded and when weights are sent. A draft that is only served never notices, for two exchanges are none.
One that is trained is fed each input where the weights for the other are: it begins as if it were random, and what it
learns reaches the engine the wrong way round to what it was.

The weights cannot be put right: checkpoints of earlier runs have them as they are. The inputs can.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from miles_plugins import PluginError

if TYPE_CHECKING:
    import torch

EXCHANGED = ("qwen3_next",)
"""`model_type`s whose weights slime gives the trainer exchanged, against what the engine's model does."""
SENT_AS = "mtp.fc.weight"


def exchange(x: torch.Tensor) -> torch.Tensor:
    """The halves of the last dimension in the other order."""
    import torch

    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


def projections(model: Any) -> Iterator[Any]:
    """Every draft's input projection in a Megatron model, or a part of one."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "eh_proj":
            yield module


def exchange_inputs(model_type: str, model: Any) -> int:
    """Let the input projections of such a model multiply what their weights are for; how many there are here."""
    if model_type not in EXCHANGED:
        return 0
    found = list(projections(model))
    for projection in found:
        projection.register_forward_pre_hook(lambda _, given: (exchange(given[0]), *given[1:]))
    return len(found)


def require_exchanged(rows: torch.Tensor, sent: torch.Tensor) -> None:
    """Raise where slime has sent a projection as it is trained: then its inputs may not be exchanged.

    `rows` are those of it that this rank has, [n, 2 * hidden]; `sent` is all of it as it leaves for the engine. A
    projection that is the same both ways, zeros for one, tells nothing.
    """
    of_rank = [sent[first : first + len(rows)] for first in range(0, len(sent), len(rows))]
    if any(part.equal(exchange(rows)) for part in of_rank) or not any(part.equal(rows) for part in of_rank):
        return
    raise PluginError(
        f"{SENT_AS} is sent as it is trained, and the trainer multiplies it with its halves exchanged",
        {"expected": "halves exchanged, as slime until v0.3.1 and its main of 2026-07 send them"},
        "slime has changed its converter: take an earlier slime, or a later miles-plugins",
    )
