"""Gradients of parameters whose layers compute with something else than they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def arrived(parameter: Any, gradient: torch.Tensor | None, fused: bool) -> torch.Tensor | None:
    """The gradient that autograd shall give a parameter; None says that the layer has added it to `main_grad`.

    Megatron's DDP waits for one from every parameter under --overlap-grad-reduce, and adds it unless the parameter says
    that main_grad has it already.
    """
    if not fused or not hasattr(parameter, "main_grad"):
        return gradient
    if gradient is not None:
        parameter.grad_added_to_main_grad = False
        return gradient
    parameter.grad_added_to_main_grad = True
    return _placeholder(parameter)


_placeholders: dict[Any, torch.Tensor] = {}


def _placeholder(parameter: torch.Tensor) -> torch.Tensor:
    """Of the parameter's shape; never read, unless Megatron wants zeros there. One for all parameters of a shape."""
    import torch

    zero = bool(getattr(parameter, "zero_out_wgrad", False))
    key = (parameter.shape, parameter.dtype, parameter.device, zero)
    if key not in _placeholders:
        make = torch.zeros if zero else torch.empty
        _placeholders[key] = make(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    return _placeholders[key].detach()  # its own tensor object: autograd then takes it over and does not copy it
