"""A random mixture-of-experts checkpoint, small enough to train on two CPU cores, in Hugging Face format.

Qwen3-MoE; with dense layers or a draft GLM-4.5: SGLang's Qwen3-MoE builds experts in every layer, whatever
`mlp_only_layers` says, and then runs the ones that the checkpoint lacks with uninitialised weights; and slime does not
convert a draft of Qwen3-MoE.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
TEXT = [chr(code) for code in range(ord(" "), ord("~") + 1)] + ["\n", "\t"]
FIRST_FILLER = 0xC0  # from here on: hundreds of printable letters without a break, none of them a digit

HEAD_SIZE = 32
HEADS = 4
QUERY_GROUPS = 2
ROUTER_BIAS = "e_score_correction_bias"  # float32, like its name GLM-4.5's

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint on disk, and the command-line flags that tell slime and Megatron-LM its shape."""

    folder: Path
    flags: list[str]
    vocabulary: int
    parameters: int


def write_tiny_model(
    folder: str | Path,
    *,
    seed: int = 0,
    layers: int = 2,
    dense_layers: int = 0,
    draft_layers: int = 0,
    hidden_size: int = 64,
    experts: int = 8,
    topk: int = 2,
    tensor_parallel: int = 1,
    initializer_range: float = 0.02,
) -> TinyModel:
    """Write config.json, model.safetensors (bfloat16) and a character tokenizer into `folder`.

    The same arguments give the same bytes. Nothing is downloaded. With the defaults: 165 k parameters, 128 tokens.
    `dense_layers`: so many of the `layers`, the first, have an ordinary MLP instead of experts; the others then have a
    shared expert too, and a router with sigmoid scores and a bias, as GLM-4.5 does. `draft_layers`: 1 for a layer that
    drafts (multi-token prediction), of the same kind as the last. `initializer_range`: standard deviation of the
    matrices.

    Raises ValueError for a shape that Megatron-LM cannot train or split.
    """
    if tensor_parallel < 1 or QUERY_GROUPS % tensor_parallel:
        raise ValueError(
            f"tensor_parallel={tensor_parallel}: the {QUERY_GROUPS} query groups cannot be split over that many ranks"
        )
    if not 2 <= topk <= experts:
        raise ValueError(f"topk={topk}: must be between 2 (a router with one choice learns nothing) and {experts=}")
    if layers < 1 or hidden_size < 2 or hidden_size % 2:
        raise ValueError(f"{layers=} must be positive and {hidden_size=} positive and even")
    if not 0 <= dense_layers < layers:
        raise ValueError(f"{dense_layers=}: must leave at least one of the {layers=} with experts")
    if draft_layers not in (0, 1):
        raise ValueError(f"{draft_layers=}: GLM-4.5 has one or none")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Megatron-LM pads the vocabulary to a multiple of 128 x TP, and its padding would join the softmax.
    vocabulary = 128 * tensor_parallel
    config = _config(vocabulary, layers, hidden_size, experts, topk)
    if dense_layers or draft_layers:
        config = _of_glm(config, dense_layers, draft_layers)
    config["initializer_range"] = initializer_range
    _write_json(folder / "config.json", config)
    _write_tokenizer(folder, vocabulary, config["max_position_embeddings"])
    parameters = _write_weights(folder, config, seed)
    return TinyModel(folder=folder, flags=_flags(config), vocabulary=vocabulary, parameters=parameters)


def _config(vocabulary: int, layers: int, hidden_size: int, experts: int, topk: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": QUERY_GROUPS,
        "head_dim": HEAD_SIZE,
        "intermediate_size": 2 * hidden_size,  # of the dense layers; slime compares it even without one
        "moe_intermediate_size": hidden_size // 2,
        "num_experts": experts,
        "num_experts_per_tok": topk,
        "norm_topk_prob": True,  # what Megatron-LM computes without --moe-router-pre-softmax
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 4096,
        "rope_theta": 1000000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
        "bos_token_id": SPECIAL_TOKENS.index("<bos>"),
        "eos_token_id": SPECIAL_TOKENS.index("<eos>"),
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _of_glm(config: Mapping[str, Any], dense_layers: int, draft_layers: int) -> dict[str, Any]:
    """The Qwen3-MoE configuration as one of GLM-4.5, whose first layers have no experts, and whose last may draft."""
    of_qwen = ("num_experts", "decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef")
    return {
        **{name: value for name, value in config.items() if name not in of_qwen},
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "first_k_dense_replace": dense_layers,
        "num_nextn_predict_layers": draft_layers,
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": True,
        "partial_rotary_factor": 1.0,
    }


def _is_glm(config: Mapping[str, Any]) -> bool:
    return "n_routed_experts" in config


def _experts(config: Mapping[str, Any]) -> int:
    return int(config["n_routed_experts"] if _is_glm(config) else config["num_experts"])


def _flags(config: Mapping[str, Any]) -> list[str]:
    """The shape of `config` in the words of slime/scripts/models/, less the GPU-only fusions."""
    layers, dense_layers = config["num_hidden_layers"], config.get("first_k_dense_replace", 0)
    options = {
        "--num-layers": layers,
        "--hidden-size": config["hidden_size"],
        "--ffn-hidden-size": config["intermediate_size"],
        "--num-attention-heads": config["num_attention_heads"],
        "--num-query-groups": config["num_key_value_heads"],
        "--kv-channels": config["head_dim"],
        "--vocab-size": config["vocab_size"],
        "--normalization": "RMSNorm",
        "--norm-epsilon": config["rms_norm_eps"],
        "--position-embedding-type": "rope",
        "--rotary-percent": 1.0,
        "--rotary-base": config["rope_theta"],
        "--num-experts": _experts(config),
        "--moe-ffn-hidden-size": config["moe_intermediate_size"],
        "--moe-layer-freq": f"[1]*{layers}",
        "--moe-router-topk": config["num_experts_per_tok"],
        "--moe-router-score-function": "softmax",
        "--moe-router-dtype": "fp32",
        "--moe-aux-loss-coeff": 0.0,
        "--moe-token-dispatcher-type": "alltoall",
    }
    switches = [
        "--group-query-attention",
        "--qk-layernorm",
        "--swiglu",
        "--disable-bias-linear",
        "--untie-embeddings-and-output-weights",
    ]
    if _is_glm(config):
        switches.append("--moe-router-enable-expert-bias")
        options |= {
            "--moe-layer-freq": f"[0]*{dense_layers}+[1]*{layers - dense_layers}",
            "--moe-router-score-function": "sigmoid",
            "--moe-router-bias-update-rate": 0,
            "--moe-shared-expert-intermediate-size": config["moe_intermediate_size"],
        }
    if config.get("num_nextn_predict_layers"):
        options["--mtp-num-layers"] = config["num_nextn_predict_layers"]
    return [word for name, value in options.items() for word in (name, str(value))] + switches


def _write_weights(folder: Path, config: Mapping[str, Any], seed: int) -> int:
    """Write model.safetensors, one tensor per expert as released Qwen3-MoE checkpoints do; count parameters."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in _shapes(config):
        if "norm" in name:
            weight = torch.ones(shape)
        else:
            weight = torch.randn(shape, generator=generator) * config["initializer_range"]
        tensors[name] = weight if name.endswith(ROUTER_BIAS) else weight.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each parameter's Hugging Face name and shape, (output, input) for the matrices."""
    vocabulary, hidden, expert = config["vocab_size"], config["hidden_size"], config["moe_intermediate_size"]
    experts, dense_layers = _experts(config), config.get("first_k_dense_replace", 0)
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]

    yield "model.embed_tokens.weight", (vocabulary, hidden)
    layers = config["num_hidden_layers"]
    for layer in range(layers + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}"
        if layer >= layers:  # what drafts has a decoder layer inside
            yield f"{prefix}.enorm.weight", (hidden,)
            yield f"{prefix}.hnorm.weight", (hidden,)
            yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
            yield f"{prefix}.shared_head.norm.weight", (hidden,)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (query, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (key, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (key, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, query)
        yield f"{prefix}.self_attn.q_norm.weight", (config["head_dim"],)
        yield f"{prefix}.self_attn.k_norm.weight", (config["head_dim"],)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if layer < dense_layers:
            yield from _gated_mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
            continue
        yield f"{prefix}.mlp.gate.weight", (experts, hidden)
        for index in range(experts):
            yield from _gated_mlp(f"{prefix}.mlp.experts.{index}", hidden, expert)
        if _is_glm(config):
            yield f"{prefix}.mlp.gate.{ROUTER_BIAS}", (experts,)
            yield from _gated_mlp(f"{prefix}.mlp.shared_experts", hidden, expert)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def _gated_mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """An MLP of a dense layer, or of one expert."""
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _write_tokenizer(folder: Path, vocabulary: int, longest: int) -> None:
    """Write a fast tokenizer in which every character is one token, so that an answer's length is its token count."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    fillers = [chr(FIRST_FILLER + index) for index in range(vocabulary - len(SPECIAL_TOKENS) - len(TEXT))]
    tokens = [*SPECIAL_TOKENS, *TEXT, *fillers]
    # Byte-pair encoding without merges splits into characters and keeps every space.
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": longest,
        },
    )


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
