"""Let Megatron-LM's local (not TransformerEngine) modules train packed sequences on the CPU (hook: choose_device)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch

if TYPE_CHECKING:
    import torch


def packed_attention(
    original: Callable[..., Any],
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    packed_seq_params: Any = None,
    **kwargs: Any,
) -> Any:
    """Causal attention within each packed sequence.

    `query` is [tokens, heads, head size], `key` and `value` [tokens, groups, head size]; the result is
    [tokens, heads * head size].
    """
    import torch

    if packed_seq_params is None:
        return original(self, query, key, value, attention_mask, *args, **kwargs)
    repeat = query.shape[1] // key.shape[1]
    bounds = packed_seq_params.cu_seqlens_q.tolist()
    outputs = []
    for begin, end in pairwise(bounds):
        q, k, v = (part[begin:end].transpose(0, 1) for part in (query, key, value))  # [heads, tokens, head size]
        k, v = k.repeat_interleave(repeat, dim=0), v.repeat_interleave(repeat, dim=0)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs).reshape(query.shape[0], -1)


def split_sizes_as_numbers(
    original: Callable[..., Any],
    ctx: Any,
    group: Any,
    input: Any,
    output_split_sizes: Any,
    input_split_sizes: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Megatron turns them to numbers while it copies them off the GPU; here they never were on one."""

    def numbers(sizes: Any) -> Any:
        return sizes.tolist() if hasattr(sizes, "tolist") else sizes

    return original(ctx, group, input, numbers(output_split_sizes), numbers(input_split_sizes), *args, **kwargs)


def norm_under_sequence_parallelism(
    original: Callable[..., Any], cls: type, config: Any, *args: Any, **kwargs: Any
) -> Any:
    """torch's norm works on a slice of the sequence as on all of it; only its gradient must be summed over ranks."""
    if not config.sequence_parallel:
        return original(cls, config, *args, **kwargs)
    alone = copy.copy(config)
    alone.sequence_parallel = False
    norm = original(cls, alone, *args, **kwargs)
    for parameter in norm.parameters():
        parameter.sequence_parallel = True
    return norm


def send_a_copy(original: Callable[..., Any], *, tensor_send_next: torch.Tensor | None, **kwargs: Any) -> Any:
    """Megatron empties a stage's output as soon as its sending is queued, which the order of a CUDA stream allows.

    gloo reads the memory when the receiver is ready, and then it would be another tensor's: with
    --overlap-p2p-communication-warmup-flush the gradients became NaN.
    """
    return original(tensor_send_next=None if tensor_send_next is None else tensor_send_next.clone(), **kwargs)


def gate(
    original: Callable[..., Any],
    inp: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    router_dtype: torch.dtype,
) -> Any:
    """The router's logits without TransformerEngine's matrix product, whose name Megatron leaves undefined."""
    import torch

    bias = None if bias is None else bias.to(router_dtype)
    return torch.nn.functional.linear(inp.to(router_dtype), weight.to(router_dtype), bias)


def _patch(name: str, target: str, wrap: Callable[..., Any], signature: str, reason: str) -> Patch:
    return Patch(
        id=f"megatron.cpu.{name}",
        target=target,
        wrap=wrap,
        signature=signature,
        roles=frozenset({"trainer"}),
        reason=reason,
        upstream="https://github.com/NVIDIA/Megatron-LM (megatron/core)",
        retire_when="Megatron-LM's local modules take packed sequences and run without a GPU",
    )


SEAMS = (
    Seam(
        name="megatron on the cpu",
        hooks=("choose_device",),
        only_in=frozenset({"driver", "trainer"}),
        patches=(
            _patch(
                "packed-attention",
                "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
                packed_attention,
                "(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, "
                "packed_seq_params=None)",
                "slime always packs sequences, and Megatron's own attention refuses packed ones",
            ),
            _patch(
                "all-to-all",
                "megatron.core.tensor_parallel.mappings:_AllToAll.forward",
                split_sizes_as_numbers,
                "(ctx, group, input, output_split_sizes, input_split_sizes)",
                "Megatron's split sizes stay tensors when they are on the CPU already",
            ),
            _patch(
                "norm",
                "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
                norm_under_sequence_parallelism,
                "(cls, config, hidden_size, eps=1e-5, persist_layer_norm=False, zero_centered_gamma=False, "
                "normalization='LayerNorm')",
                "Megatron's torch norm refuses sequence parallelism",
            ),
            _patch(
                "pipeline-send",
                "megatron.core.pipeline_parallel.p2p_communication:_p2p_ops",
                send_a_copy,
                "(*, tensor_send_prev, tensor_recv_prev, tensor_send_next, tensor_recv_next, group, "
                "prev_pipeline_rank, next_pipeline_rank)",
                "with virtual pipeline stages Megatron frees what it sends while gloo has yet to read it",
            ),
            _patch(
                "router-gate",
                "megatron.core.transformer.moe.moe_utils:router_gating_linear",
                gate,
                "(inp, weight, bias, router_dtype)",
                "without TransformerEngine Megatron's function stops with a NameError (te_general_gemm)",
            ),
        ),
    ),
)
