"""The policy: megatron-core's GPTModel with MoE layers, and its weights under their Hugging Face names.

It may have a draft (multi-token prediction). In a checkpoint that is a layer after the last one, as GLM-4.5 and
DeepSeek-V3 have it: a decoder layer with an input projection and norms of its own. Embedding and head are the trunk's.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins.embedded.draft import DRAFT_PARTS, is_of_draft
from miles_plugins.errors import ArgumentError, PluginError

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "qwen3_moe"

# Hugging Face's name of each of Megatron's parameters; several names are joined into one tensor.
_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
_EXPERT = {
    "linear_fc1.weight": ("gate_proj.weight", "up_proj.weight"),
    "linear_fc2.weight": ("down_proj.weight",),
}
_OTHER = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
_DRAFT_LAYER = dict(
    zip(("enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight"), DRAFT_PARTS, strict=True)
)


SHAPE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "norm_epsilon", "rotary_base", "num_experts", "moe_ffn_hidden_size", "moe_router_topk"),
    *("moe_router_pre_softmax", "moe_layer_freq", "untie_embeddings_and_output_weights", "max_position_embeddings"),
)


# -- its shape -------------------------------------------------------------------------------------------------------


def shape_of(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The shape that a Hugging Face config.json describes, under slime's argument names.

    Raises:
        ArgumentError: another architecture, or a variant of this one that the policy is not built for.
    """
    if config.get("model_type") != ARCHITECTURE:
        raise ArgumentError(
            "the embedded host does not know this model",
            {"in": source, "found": f"model_type {config.get('model_type')!r}", "expected": repr(ARCHITECTURE)},
            "give a Qwen3-MoE checkpoint with --hf-checkpoint, or leave the flag out for a tiny random one; other "
            "architectures run under slime itself",
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    unsupported = {
        "attention_bias": config.get("attention_bias") and "must be false",
        "hidden_act": config.get("hidden_act", "silu") != "silu" and "must be silu",
        "use_sliding_window": config.get("use_sliding_window") and "must be false",
        "rope_parameters": rope.get("rope_type", rope.get("type", "default")) != "default"
        and "must be of type default",
    }
    if problems := {name: f"{config.get(name)!r}: {problem}" for name, problem in unsupported.items() if problem}:
        raise ArgumentError("the embedded host cannot build this variant of Qwen3-MoE", {"in": source, **problems})
    try:
        layers, step = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
        dense = set(config.get("mlp_only_layers") or ())
        return {
            "num_layers": layers,
            "hidden_size": config["hidden_size"],
            "ffn_hidden_size": config["intermediate_size"],
            "num_attention_heads": config["num_attention_heads"],
            "num_query_groups": config["num_key_value_heads"],
            "kv_channels": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            "vocab_size": config["vocab_size"],
            "norm_epsilon": config["rms_norm_eps"],
            "rotary_base": config.get("rope_theta") or rope["rope_theta"],
            "num_experts": config.get("num_local_experts") or config["num_experts"],  # transformers 5 writes the former
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            "moe_router_topk": config["num_experts_per_tok"],
            "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
            "moe_layer_freq": [int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers)],
            "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
            "max_position_embeddings": config["max_position_embeddings"],
        }
    except KeyError as error:
        raise ArgumentError(f"the model's config.json has no {error}", {"in": source}) from error


# -- the model -------------------------------------------------------------------------------------------------------


def build_policy(args: Namespace, device: torch.device) -> torch.nn.Module:
    """A GPTModel of the shape in `args`, bfloat16, with megatron-core's local (not TransformerEngine) modules.

    With `args.mtp_num_layers` it has a draft. `args.freeze_params_name_list`, slime's, are regular expressions for
    names of parameters that stay as they are.

    Raises:
        ArgumentError: megatron-core refuses the shape.
    """
    try:
        policy = _build(args).bfloat16().to(device)  # as Megatron's Float16Module does
    except (ValueError, AssertionError) as error:
        raise ArgumentError(
            "megatron-core refuses the model's shape",
            {"error": str(error).strip() or type(error).__name__, "in": args.hf_checkpoint},
            "change the shape, or give another checkpoint",
        ) from error
    for name, parameter in policy.named_parameters():
        if any(re.search(frozen, name) for frozen in args.freeze_params_name_list or ()):
            parameter.requires_grad_(False)
    return policy


def _build(args: Namespace) -> torch.nn.Module:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        num_moe_experts=args.num_experts,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size,
        moe_layer_freq=args.moe_layer_freq,
        moe_router_topk=args.moe_router_topk,
        moe_router_pre_softmax=args.moe_router_pre_softmax,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type=args.moe_router_load_balancing_type,
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        layernorm_epsilon=args.norm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        recompute_granularity=args.recompute_granularity,
        recompute_method="uniform" if args.recompute_granularity == "full" else None,
        recompute_num_layers=1 if args.recompute_granularity == "full" else None,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,  # the weights come from a checkpoint
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        mtp_num_layers=args.mtp_num_layers,
        mtp_loss_scaling_factor=args.mtp_loss_scaling_factor,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    draft = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if args.mtp_num_layers else None
    policy: torch.nn.Module = GPTModel(
        config,
        spec,
        vocab_size=args.vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        mtp_block_spec=draft,
    )
    return policy


# -- its weights -----------------------------------------------------------------------------------------------------


def hugging_face_names(name: str, draft: int | None = None) -> tuple[str, ...]:
    """The names, in a Hugging Face checkpoint, of what makes up one of Megatron's parameters.

    Args:
        draft: the number of the draft's layer there, which is that of the trunk's layers; None for a model without one.

    Raises:
        PluginError: a parameter that no rule knows.
    """
    if name in _OTHER:
        return _OTHER[name]
    of_draft = re.fullmatch(r"mtp\.layers\.0\.(?:(?:transformer_layer|mtp_model_layer)\.)?(.+)", name)
    if of_draft and draft is not None:
        if of_draft[1] in _DRAFT_LAYER:
            return (f"model.layers.{draft}.{_DRAFT_LAYER[of_draft[1]]}",)
        name = f"decoder.layers.{draft}.{of_draft[1]}"
    expert = re.fullmatch(r"decoder\.layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.(.+)", name)
    if expert and expert[3] in _EXPERT:
        return tuple(f"model.layers.{expert[1]}.mlp.experts.{expert[2]}.{part}" for part in _EXPERT[expert[3]])
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if layer and layer[2] in _LAYER:
        return tuple(f"model.layers.{layer[1]}.{part}" for part in _LAYER[layer[2]])
    raise PluginError("a parameter of the policy has no Hugging Face name", {"parameter": name})


def split(args: Namespace, name: str, parameter: torch.Tensor) -> list[torch.Tensor]:
    """One of Megatron's parameters as Hugging Face's tensors, [output, input] each; the inverse of `join`."""
    if name.endswith("linear_qkv.weight"):
        heads = args.num_attention_heads // args.num_query_groups
        grouped = parameter.unflatten(0, (args.num_query_groups, heads + 2, args.kv_channels))
        return [part.flatten(0, 2).contiguous() for part in grouped.split([heads, 1, 1], dim=1)]
    if name.endswith("linear_fc1.weight"):
        return [part.contiguous() for part in parameter.chunk(2)]
    return [parameter]


def join(args: Namespace, name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hugging Face's tensors as one of Megatron's parameters: query, key and value heads interleaved by group."""
    import torch

    if name.endswith("linear_qkv.weight"):
        grouped = [part.unflatten(0, (args.num_query_groups, -1, args.kv_channels)) for part in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 2)
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def named_batches(args: Namespace, policy: torch.nn.Module) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The weights under their Hugging Face names, one batch for each of Megatron's parameters."""
    for name, parameter in policy.named_parameters():
        yield list(zip(hugging_face_names(name, args.num_layers), split(args, name, parameter.detach()), strict=True))


def load_weights(args: Namespace, policy: torch.nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Fill the policy from the tensors of a Hugging Face folder.

    Raises:
        ArgumentError: a tensor is missing, is of another shape, or is one that the policy does not have; but a draft
            may be there that it does not have.
    """
    import torch

    wanted = {name: hugging_face_names(name, args.num_layers) for name, _ in policy.named_parameters()}
    names = {part for parts in wanted.values() for part in parts}
    tied = set() if args.untie_embeddings_and_output_weights else {"lm_head.weight"}  # a copy of the embeddings
    missing = sorted(names - set(tensors))
    foreign = sorted(name for name in set(tensors) - names - tied if not is_of_draft(name, args.num_layers))
    if missing and all(is_of_draft(name, args.num_layers) for name in missing):
        raise ArgumentError(
            "the checkpoint has no draft, or not all of one",
            {"in": folder, "missing": ", ".join(missing[:4])},
            "give a checkpoint with a draft (multi-token prediction), or leave --mtp-num-layers out",
        )
    if missing or foreign:
        raise ArgumentError(
            "the checkpoint's tensors are not those of the model in its config.json",
            {"in": folder, "missing": ", ".join(missing[:4]), "not in the model": ", ".join(foreign[:4])},
            "give the folder of one whole checkpoint",
        )
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parts = [tensors[part] for part in wanted[name]]
            try:
                parameter.copy_(join(args, name, parts))
            except RuntimeError as error:
                raise ArgumentError(
                    "a tensor of the checkpoint has another shape than its config.json says",
                    {
                        "tensor": ", ".join(
                            f"{part} {tuple(t.shape)}" for part, t in zip(wanted[name], parts, strict=True)
                        ),
                        "expected": f"{tuple(parameter.shape)} together",
                        "in": folder,
                    },
                ) from error
