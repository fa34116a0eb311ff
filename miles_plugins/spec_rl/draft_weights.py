"""The draft's parameters among a Megatron model's: which they are, whether they were loaded, how they are clipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from miles_plugins.errors import PluginError

if TYPE_CHECKING:
    import torch

GROUP = "grad_norm_group"
"""An attribute of parameters that Megatron-LM's main knows too (see `patches/megatron/draft.py`)."""
FROZEN = r"(^|\.)mtp\."
"""The draft's parameters, for slime's `freeze_params_name_list` (slime v0.2.3 and later): weight decay would move them.

slime freezes before it wraps the model for data parallelism. In the hook `model_built` it would be too late: Megatron's
distributed optimizer misses the parameters of its buffers then (KeyError).
"""
SAMPLED = 64  # entries of a matrix that tell it from another


def draft_parameters(model: Sequence[Any]) -> dict[str, torch.nn.Parameter]:
    """Those of Megatron's multi-token prediction, by name; `model` holds one chunk a virtual pipeline stage."""
    return {f"{number}.{name}": each for number, name, each in _named(model) if "mtp" in name.split(".")}


def _named(model: Sequence[Any]) -> Iterable[tuple[int, str, Any]]:
    for number, chunk in enumerate(model):
        for name, parameter in chunk.named_parameters():
            yield number, name, parameter


def clip_apart(model: Sequence[Any]) -> None:
    """Let the gradients of the draft be clipped by their own norm, and the policy's by theirs.

    To be called before the optimizer is built, on every rank.
    """
    for parameter in draft_parameters(model).values():
        setattr(parameter, GROUP, "mtp")


class FromCheckpoint:
    """Whether the draft's weights came with the policy's from the checkpoint, whatever read it.

    Megatron initialises a draft at random. A loader that skips what a checkpoint lacks, such as that of slime's image,
    leaves it so without a word.
    """

    def __init__(self, model: Sequence[Any]) -> None:
        """To be called before anything is loaded. Norms are left out: a loaded one may well consist of ones."""
        self._before = {f"{number}.{name}": _sample(each) for number, name, each in _named(model) if each.dim() > 1}
        self._draft = [name for name in draft_parameters(model) if name in self._before]

    def require(self, model: Sequence[Any]) -> None:
        """To be called after loading and before the first step.

        Raises:
            PluginError: the policy was loaded, and not all of the draft.
        """
        import torch

        now = {f"{number}.{name}": each for number, name, each in _named(model)}
        same = {name for name, before in self._before.items() if torch.equal(before, _sample(now[name]))}
        missing = [name for name in self._draft if name in same]
        if missing and not same >= self._before.keys() - set(self._draft):
            raise PluginError(
                "the checkpoint has no weights for the draft: they are as random as they were",
                {
                    "not loaded": f"{len(missing)} of {len(self._draft)} matrices",
                    "such as": missing[0].partition(".")[2],
                },
                "convert the checkpoint with --mtp-num-layers, from a model that has a draft (multi-token prediction)",
            )


def _sample(parameter: Any) -> torch.Tensor:
    """A few of its entries, all over it, on the CPU."""
    flat = parameter.detach().reshape(-1)
    found: torch.Tensor = flat[:: max(flat.numel() // SAMPLED, 1)].cpu().clone()
    return found
