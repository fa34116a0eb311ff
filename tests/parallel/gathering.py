"""One rank of slime's own weight gathering on a real Megatron model, with FP8 quantised after it and before it.

python gathering.py RANK WORLD STORE RESULT
"""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from miles_plugins.activation import activate
from miles_plugins.patches.seam import EMBEDDED_ON_CPU, Host

LAYERS, EXPERTS, HIDDEN, HEADS, GROUPS, HEAD_SIZE, INNER = 2, 4, 256, 4, 2, 128, 256
SLIMES = ("gather", "weights", "cpu")
moved: Counter[str] = Counter()  # bytes by the collective that moved them


def activate_here() -> None:
    modules = (*(f"miles_plugins.patches.slime.{name}" for name in SLIMES), *EMBEDDED_ON_CPU.modules)
    activate(["cpu", "fp8"], "trainer", environment={}, host=Host("test", modules, EMBEDDED_ON_CPU.always))


def arguments() -> Namespace:
    return Namespace(
        hf_checkpoint="none",
        num_experts=EXPERTS,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_SIZE,
        hidden_size=HIDDEN,
        vocab_size=256,
        q_lora_rank=None,
        update_weight_buffer_size=1 << 20,
        fp8_gather="bf16",
    )


def build() -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_SIZE,
        ffn_hidden_size=INNER,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=INNER,
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=torch.distributed.get_world_size(),
        expert_model_parallel_size=torch.distributed.get_world_size(),
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
    )
    spec = get_gpt_layer_local_spec(EXPERTS, False, normalization="RMSNorm")
    model = GPTModel(config, spec, vocab_size=256, max_sequence_length=16, position_embedding_type="rope")
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)  # as Megatron's get_model does
        parameter.data.normal_(generator=generator)
    wrapped = torch.nn.Module()  # as Float16Module does
    wrapped.module, wrapped.config = model, config
    return wrapped


def choose() -> None:
    """In place of a checkpoint's index: what an FP8 one of this model would have."""
    from miles_plugins.fp8_unified import plugin
    from miles_plugins.fp8_unified.blockwise import Format
    from miles_plugins.fp8_unified.checkpoint import Declared
    from miles_plugins.fp8_unified.chosen import Chosen

    attention = [f"model.layers.{n}.self_attn.{x}_proj" for n in range(LAYERS) for x in "qkvo"]
    experts = [
        f"model.layers.{n}.mlp.experts.{expert}.{x}_proj"
        for n in range(LAYERS)
        for expert in range(EXPERTS)
        for x in ("gate", "up", "down")
    ]
    places = {(str(n), kind) for n in range(LAYERS) for kind in ("attention", "experts")}
    plugin._chosen = Chosen(Declared(Format()), frozenset([*attention, *experts]), frozenset(places), LAYERS)


def count_bytes() -> None:
    import torch.distributed as dist

    def counted(original: Any, place: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            moved[str(args[place].dtype)] += args[place].numel() * args[place].element_size()
            return original(*args, **kwargs)

        return call

    dist.all_gather, dist.broadcast = counted(dist.all_gather, 1), counted(dist.broadcast, 0)


def digest(named: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, tensor in named:
        assert name not in found, f"{name} twice"
        content = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        found[name] = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"
    return found


def over_nccl(args: Namespace, model: Any) -> dict[str, str]:
    """slime's own walk through the parameters; the first rank converts."""
    from slime.backends.megatron_utils.update_weight import update_weight_from_distributed as slimes

    found: list[Any] = []

    class Update(slimes.UpdateWeightFromDistributed):
        def _send_weights(self, pbar: Any) -> None:
            for chunks in (self._iter_non_expert_chunks(), self._iter_expert_chunks()):
                for chunk in chunks:
                    found.extend(chunk)

    slimes.ray.get = lambda refs: []  # stands for engines that are paused and go on
    update = Update(args, [model], dict, model_name="qwen3_moe", quantization_config={"quant_method": "fp8"})
    update.rollout_engines, update._is_pp_src_rank = [], torch.distributed.get_rank() == 0
    update._group_name = "none"
    update.update_weights()
    return digest(found)


def colocated(args: Namespace, model: Any) -> dict[str, str]:
    """slime's list of what all ranks have, and its gathering of a copy of the weights; every rank converts."""
    from slime.backends.megatron_utils.update_weight.common import named_params_and_buffers
    from slime.backends.megatron_utils.update_weight.hf_weight_iterator_direct import HfWeightIteratorDirect

    iterator = HfWeightIteratorDirect(
        args, [model], model_name="qwen3_moe", quantization_config={"quant_method": "fp8"}
    )
    weights = {name: parameter.detach().clone() for name, parameter in named_params_and_buffers(args, [model])}
    return digest(pair for chunk in iterator.get_hf_weight_chunks(weights) for pair in chunk)


def main() -> None:
    rank, world, store, result = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    activate_here()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=world, expert_model_parallel_size=world, expert_tensor_parallel_size=1
    )
    model_parallel_cuda_manual_seed(7)
    from slime.utils.distributed_utils import init_gloo_group

    init_gloo_group()
    args, model = arguments(), build()
    choose()
    count_bytes()
    answer: dict[str, Any] = {}
    for way in (over_nccl, colocated):
        for gather in ("bf16", "fp8"):
            args.fp8_gather = gather
            moved.clear()
            answer[f"{way.__name__} {gather}"] = [way(args, model), dict(moved)]
    result.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
