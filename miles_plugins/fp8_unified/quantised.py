"""Weights and activations, quantised: by the kernels on a GPU, by the reference elsewhere; the bits are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles_plugins.fp8_unified import blockwise as reference

if TYPE_CHECKING:
    import torch

    from miles_plugins.fp8_unified.blockwise import Format, Quantised
    from miles_plugins.fp8_unified.bucket import Layout


def quantise_weights(weights: Sequence[torch.Tensor], format: Format) -> list[Quantised]:
    """Quantise weights [..., N, K] of any shapes on one device. All results are views of one buffer of bytes."""
    import torch

    from miles_plugins.fp8_unified.bucket import plan

    if not weights:
        return []
    if weights[0].is_cuda:
        from miles_plugins.fp8_unified import kernels

        return kernels.quantise_weights(weights, format)
    layout = plan([weight.shape for weight in weights], format)
    bucket = torch.empty(layout.size, dtype=torch.uint8, device=weights[0].device)
    quantise_into(weights, bucket, layout, format)
    return layout.views(bucket)


def quantise_into(weights: Sequence[torch.Tensor], bucket: torch.Tensor, layout: Layout, format: Format) -> None:
    """The same into a buffer [layout.size] uint8, of which every byte is written."""
    if bucket.is_cuda:
        from miles_plugins.fp8_unified import kernels

        kernels.quantise_into(weights, bucket, layout, format)
        return
    views = layout.views(bucket)
    bucket[: layout.size].zero_()
    for weight, view in zip(weights, views, strict=True):
        for target, source in zip(view, reference.quantise_weight(weight, format), strict=True):
            target.copy_(source)


def quantise_rows(x: torch.Tensor, format: Format) -> Quantised:
    """Quantise activations [..., M, K]."""
    if x.is_cuda:
        from miles_plugins.fp8_unified import kernels

        return kernels.quantise_rows(x, format)
    return reference.quantise_rows(x, format)
