"""A small Megatron GPTModel on the CPU whose tokens can be read back at every router.

Two channels of the residual stream hold a token's id as an angle. Nothing in the model writes to them, and a norm
scales both alike, so each router's input says which tokens it routes: after any cut of the sequence, at any pipeline
stage, and while activations are recomputed.
"""

from __future__ import annotations

import math
from typing import Any

import torch

HIDDEN = 32
VOCABULARY = 256
HEADS, GROUPS, HEAD_SIZE = 4, 4, 8


class OwnValue(torch.nn.Module):
    """Attention of each token to itself alone, without rotary positions.

    Megatron's local attention refuses context parallelism, and slime's `--allgather-cp` needs an attention of its own.
    What a token attends to does not say where it is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).flatten(1)


def transformer_config(layout: dict[str, Any], changed: dict[str, Any]) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 32,
            "num_attention_heads": HEADS,
            "num_query_groups": GROUPS,
            "kv_channels": HEAD_SIZE,
            "moe_ffn_hidden_size": 16,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_token_dispatcher_type": "alltoall",
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "init_method_std": 0.2,
            "params_dtype": torch.float32,
            "pipeline_dtype": torch.float32,
            "variable_seq_lengths": True,  # as slime
            "use_cpu_initialization": True,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "gradient_accumulation_fusion": False,
            "tensor_model_parallel_size": layout["tensor"],
            "pipeline_model_parallel_size": layout["pipeline"],
            "virtual_pipeline_model_parallel_size": layout["virtual"],
            "overlap_p2p_comm": bool(layout["virtual"]),  # Megatron's arguments ask for it in pipelines of two stages
            "batch_p2p_comm": not layout["virtual"],
            "context_parallel_size": layout["context"],
            "expert_model_parallel_size": layout["expert"],
            "expert_tensor_parallel_size": 1,
            "sequence_parallel": layout["sequence"],
            **changed,
        }
    )


def build(layout: dict[str, Any], changed: dict[str, Any], twice: bool = False) -> list[torch.nn.Module]:
    """The model chunks of this rank, wrapped for data parallelism as slime's are.

    Args:
        twice: build each decoder again and drop the first one, as some of slime's model providers do.
    """
    from megatron.core import mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    config = transformer_config(layout, changed)
    chunks = []
    for stage in range(layout["virtual"] or 1):
        chunk = _gpt(config, stage if layout["virtual"] else None)
        if twice:
            first = chunk.decoder
            chunk.decoder = _gpt(config, stage if layout["virtual"] else None).decoder
            chunk.dropped = [first]  # a list: no submodule any more, but alive
        write_code(chunk, mpu.get_tensor_model_parallel_rank())
        ddp = DistributedDataParallelConfig(overlap_grad_reduce=False)
        chunks.append(DistributedDataParallel(config, ddp, chunk))
    return chunks


def _gpt(config: Any, stage: int | None) -> Any:
    from megatron.core import mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage)
    for layer in spec.layer_specs if config.context_parallel_size > 1 else ():
        layer.submodules.self_attention.submodules.core_attention = OwnValue
    mtp = None
    if config.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=stage)
    return GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=VOCABULARY,
        pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        position_embedding_type="rope" if config.context_parallel_size == 1 else "none",
        mtp_block_spec=mtp,
        vp_stage=stage,
    )


# -- the code --------------------------------------------------------------------------------------------------------


def write_code(model: torch.nn.Module, tensor_rank: int) -> None:
    """Let the last two channels of the residual stream hold each token's id; again after an optimizer step."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("word_embeddings.weight"):
                first = tensor_rank * len(parameter)
                angles = torch.arange(first, first + len(parameter)) * (2 * math.pi / VOCABULARY)
                parameter[:, -2], parameter[:, -1] = angles.cos(), angles.sin()
            elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                parameter[-2:] = 0
            elif name.endswith("layernorm.weight"):
                parameter[-2:] = 1


def read_code(hidden: torch.Tensor) -> list[int]:
    """The ids of the tokens of a normed residual stream, [tokens, hidden]."""
    cosine, sine = hidden[:, -2].double(), hidden[:, -1].double()
    steps = torch.atan2(sine, cosine) / (2 * math.pi / VOCABULARY)
    if (steps - steps.round()).abs().max() > 0.05 or (cosine**2 + sine**2).min() < 1e-4:
        raise AssertionError("the residual stream lost the tokens' code")
    return [int(step) % VOCABULARY for step in steps.round()]
