"""What slime's training loop does around Megatron's schedules, where slime is not installed; and slime's own.

Of the same shape, function by function, so that the same patches wrap both.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

import torch

KEYS = ["tokens", "loss_masks", "total_lengths", "response_lengths"]


class DataIterator:
    """Gives the microbatches of a rollout; one for each virtual pipeline stage."""

    def __init__(self, data: dict[str, Any], microbatches: list[list[int]]) -> None:
        self.data, self.micro_batch_indices, self.offset = data, microbatches, 0

    def get_next(self, keys: list[str]) -> dict[str, Any]:
        indices = self.micro_batch_indices[self.offset]
        self.offset += 1
        return {key: [self.data[key][i] for i in indices] if key in self.data else None for key in keys}

    def reset(self) -> None:
        self.offset = 0


def get_batch(iterator: DataIterator, keys: list[str], multiplier: int, all_gather: bool) -> dict[str, Any]:
    """One packed microbatch, without context parallelism."""
    from megatron.core import mpu
    from megatron.core.packed_seq_params import PackedSeqParams

    batch = iterator.get_next(keys)
    batch["unconcat_tokens"] = batch["tokens"]
    stream = torch.cat(batch["tokens"])
    padding = -len(stream) % (mpu.get_tensor_model_parallel_world_size() * multiplier)
    lengths = [len(sample) for sample in batch["tokens"]] + ([padding] if padding else [])
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    batch["tokens"] = torch.nn.functional.pad(stream, (0, padding))[None]
    batch["packed_seq_params"] = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    return batch


def _forward_step(args: Namespace, after: Any, iterator: Any, model: Any, checkpoint_all: bool | None = None) -> Any:
    from miles_plugins.patches.slime import training

    batch = training.get_batch(get_batch, iterator, KEYS, args.data_pad_size_multiplier, args.allgather_cp)
    if checkpoint_all is not None:  # asked for microbatch by microbatch; what GPTModel makes of it is the caller's
        model.module.decoder.config.recompute_granularity = "full" if checkpoint_all else None
    tokens, more = batch["tokens"], {}
    if model.module.config.mtp_num_layers:  # the draft head computes its own loss
        more = {"labels": tokens.roll(-1), "loss_mask": torch.ones(tokens.shape)}
    output = model(tokens, torch.zeros_like(tokens), None, packed_seq_params=batch["packed_seq_params"], **more)
    return output, partial(after, batch)


def _schedule(args: Namespace, after: Any, model: Any, iterators: Any, microbatches: int, forward_only: bool) -> Any:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, args, after),
        data_iterator=iterators,
        model=model,
        num_microbatches=microbatches,
        seq_length=1,  # sequences are of variable length
        micro_batch_size=1,
        forward_only=forward_only,
    )


def forward_only(
    f: Any, args: Namespace, model: Any, iterators: Any, num_microbatches: list[int], store_prefix: str = ""
) -> list[Any]:
    for iterator in iterators:
        iterator.reset()
    for chunk in model:
        chunk.eval()
    found = []
    with torch.no_grad():
        for microbatches in num_microbatches:
            found += _schedule(args, lambda batch, out: f(out), model, iterators, microbatches, forward_only=True)
    for chunk in model:
        chunk.train()
    return found


def train_one_step(
    args: Namespace,
    rollout_id: int,
    step_id: int,
    iterators: Any,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    num_microbatches: int,
    global_batch_size: int,
) -> tuple[dict[str, Any], float]:
    for chunk in model:
        chunk.zero_grad_buffer()
    after = partial(args.loss, args)
    losses = _schedule(args, after, model, iterators, num_microbatches, forward_only=False)
    _, grad_norm, _ = optimizer.step()
    return {"losses": [float(each["loss"]) for each in losses]}, grad_norm
