"""The recorded routing of one sample: what is valid, and its compact form.

Row i holds the experts that token i went through; the last token of a sample was never forwarded, so a sample of n
tokens has n - 1 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles_plugins.errors import PluginError

if TYPE_CHECKING:
    import torch


def moe_layers(layers: int, moe_layer_freq: int | Sequence[int]) -> list[int]:
    """Global indices of the MoE layers, as Megatron reads `--moe-layer-freq`: every n-th, or a 0/1 list."""
    if isinstance(moe_layer_freq, int):
        return [layer for layer in range(layers) if layer % moe_layer_freq == 0]
    return [layer for layer, is_moe in enumerate(moe_layer_freq) if is_moe]


def compact(
    routed_experts: torch.Tensor | None, tokens: int, layers: Sequence[int], topk: int, experts: int, sample: str
) -> torch.Tensor:
    """Check one sample's routing and keep what is needed: the MoE layers, in the smallest integer type.

    Args:
        routed_experts: [tokens - 1, all layers, topk] integer ids; None when the engine returned none.
        tokens: number of tokens of the sample, prompt and response.
        layers: global indices of the MoE layers.
        sample: how an error names the sample.

    Returns:
        [tokens - 1, len(layers), topk], uint8 up to 256 experts, else int16.

    Raises:
        PluginError: missing, of another shape, an id out of range, or an expert twice in a row. None of those may reach
            a token dispatcher, which counts on `topk` different experts a token.
    """
    import torch

    def refuse(problem: str, got: object, expected: object) -> PluginError:
        return PluginError(
            f"the recorded routing of {sample} cannot be replayed: {problem}",
            {"got": got, "expected": expected},
            "look for the request in the log of the SGLang server; docs/r3_replay.md lists the known causes",
        )

    if routed_experts is None:
        raise refuse("the engine returned none", "no routed_experts", f"{tokens - 1} rows")
    routed_experts = torch.as_tensor(routed_experts)
    shape = tuple(routed_experts.shape)
    if len(shape) != 3 or shape[0] != tokens - 1 or shape[2] != topk or shape[1] <= max(layers):
        raise refuse("its shape is wrong", shape, f"({tokens - 1}, more than {max(layers)}, {topk})")
    kept = routed_experts[:, list(layers)]
    if kept.numel():
        low, high = int(kept.min()), int(kept.max())
        if low < 0 or high >= experts:
            raise refuse("an expert id is out of range", f"{low} to {high}", f"0 to {experts - 1}")
        ordered = kept.sort(dim=-1).values
        repeated = (ordered[..., 1:] == ordered[..., :-1]).any(dim=-1)
        if repeated.any():
            row, layer = (int(i) for i in repeated.nonzero()[0])
            raise refuse(
                "an expert is named twice for one token",
                f"experts {kept[row, layer].tolist()} at token {row}, layer {layers[layer]}",
                f"{topk} different experts",
            )
    return kept.to(torch.uint8 if experts <= 256 else torch.int16).contiguous()


def lay_out(traces: Sequence[torch.Tensor], positions: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The routing of one microbatch, in the order in which its tokens reach the routers.

    Args:
        traces: one compact trace a sample, [tokens of the sample - 1, layers, topk].
        positions: [local tokens] int64, position in the samples' concatenation, -1 for padding.

    Returns:
        `(indices, recorded)`: [layers, local tokens, topk] expert ids, and [local tokens] bool, whether a choice was
        recorded for the token. Other tokens (padding, each sample's last) get experts of their own, spread evenly and
        different within a row: zeros would name one expert `topk` times.
    """
    import torch

    device = positions.device
    layers, topk = traces[0].shape[1:]
    blank = traces[0].new_zeros(1, layers, topk)
    stream = torch.cat([part for trace in traces for part in (trace, blank)]).to(device, non_blocking=True)
    lengths = torch.tensor([trace.shape[0] + 1 for trace in traces])
    recorded_in_stream = torch.ones(int(lengths.sum()), dtype=torch.bool)
    recorded_in_stream[lengths.cumsum(0) - 1] = False
    recorded = recorded_in_stream.to(device)[positions] & (positions >= 0)
    spread = torch.arange(positions.numel() * topk, device=device).reshape(-1, 1, topk) % experts
    indices = torch.where(recorded[:, None, None], stream[positions], spread.to(stream.dtype))
    return indices.transpose(0, 1).contiguous(), recorded
