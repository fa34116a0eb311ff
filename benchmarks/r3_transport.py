"""What a rollout's routing weighs and how long it takes on its way, ours beside slime's own code, in one run.

    SLIME_HOME=~/slime python benchmarks/r3_transport.py        # needs slime v0.3.1, SGLang and megatron-core

Shape of Qwen3-30B-A3B: 48 MoE layers, 128 experts, top-8; samples of 8192 tokens. slime's side is slime's and SGLang's
code: SGLang's encoder, `Sample.append_response_tokens`, the object that each rank of a data-parallel group gets,
`prepare_routed_experts_for_routing_replay` and `RoutingReplay.record`. Ours is what the plugin's hooks run. Replaced on
both sides: the ranks that a process asks Megatron for, and pinned memory where there is no GPU. Medians of nine runs,
one thread. Both sides are checked to give the same experts to the same tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pybase64
import torch
from rich.console import Console
from rich.table import Table

from miles_plugins import Packing, Rank, Schedule
from miles_plugins.activation import activate
from miles_plugins.r3_replay import plugin, shards, wire
from miles_plugins.r3_replay.trace import Routing

LAYERS, EXPERTS, TOPK, TOKENS = 48, 128, 8, 8192
SAMPLES = 4  # of one data-parallel rank, two in a microbatch
TENSOR, STAGES = 4, 2  # tensor parallel with sequence parallelism; pipeline stages
ROUTING = Routing(tuple(range(LAYERS)), TOPK, EXPERTS)
ARGS = Namespace(
    num_layers=LAYERS,
    moe_layer_freq=[1] * LAYERS,
    moe_router_topk=TOPK,
    num_experts=EXPERTS,
    r3_earlier_rows="keep",
    r3_missing="fail",
)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    times, result = [], None
    for _ in range(11):
        begun = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:]), result


@contextlib.contextmanager
def rank(tensor: int) -> Iterator[None]:
    """This process as one tensor-parallel rank of Megatron's; without a GPU nothing can be pinned."""
    from megatron.core import mpu

    ranks = {"get_tensor_model_parallel_world_size": TENSOR, "get_tensor_model_parallel_rank": tensor}
    ranks |= {"get_context_parallel_world_size": 1, "get_context_parallel_rank": 0}
    empty_like = torch.empty_like
    with contextlib.ExitStack() as stack:
        for name, value in ranks.items():
            stack.enter_context(patch.object(mpu, name, lambda value=value: value))
        if not torch.cuda.is_available():
            unpinned = lambda like, pin_memory=False, **kwargs: empty_like(like, **kwargs)  # noqa: E731
            stack.enter_context(patch.object(torch, "empty_like", unpinned))
        yield


def encoders() -> tuple[Callable[[torch.Tensor], str], Callable[[torch.Tensor], str]]:
    if find_spec("sglang") is None:
        print("SGLang is not installed: its encoder is imitated, by the same two calls")
        return lambda routing: pybase64.b64encode(routing.numpy().tobytes()).decode(), wire.encode
    if not torch.cuda.is_available():
        activate(["cpu_rehearsal"], "sglang_child")  # or SGLang cannot be imported
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager

    def slimes(routing: torch.Tensor) -> str:
        return DetokenizerManager._b64_encode_per_request([routing])[0]

    return slimes, wire.encode


def sample(tokens: list[int]) -> Any:
    from slime.utils.types import Sample

    return Sample(index=0, tokens=list(tokens))


def take_over(take: Any, text: str, ours: bool) -> Any:
    """One response becomes part of its sample."""
    info = {"routed_experts": text, "weight_version": "1"}
    if ours:
        plugin.receive_response(args=ARGS, sample=take, meta_info=info)
    take._apply_meta_info(ARGS, info)
    return take.rollout_routed_experts


def main() -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(os.environ.get("SLIME_HOME", "~/slime")).expanduser()))
    from slime.backends.megatron_utils.cp_utils import prepare_routed_experts_for_routing_replay
    from slime.utils.misc import decode_int32_meta_array
    from slime.utils.routing_replay import RoutingReplay

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, (SAMPLES, TOKENS), generator=generator)
    narrow = [
        torch.rand(TOKENS - 1, LAYERS, EXPERTS, generator=generator).topk(TOPK).indices.to(torch.uint8)
        for _ in range(SAMPLES)
    ]
    wide = [rows.int() for rows in narrow]
    rows: list[tuple[str, float, float]] = []

    def compare(what: str, slimes: Callable[[], Any], ours: Callable[[], Any]) -> tuple[Any, Any]:
        (their_time, theirs), (our_time, mine) = seconds(slimes), seconds(ours)
        rows.append((what, their_time * 1e3, our_time * 1e3))
        return theirs, mine

    # One sample: engine, wire, rollout manager.
    encode_theirs, encode_ours = encoders()
    text, short = compare("encode", lambda: encode_theirs(wide[0]), lambda: encode_ours(narrow[0]))
    compare(
        "decode",
        lambda: decode_int32_meta_array({"routed_experts": text}, "routed_experts"),
        lambda: wire.decode(short),
    )
    rows.append(("encode and decode", rows[0][1] + rows[1][1], rows[0][2] + rows[1][2]))
    compare("write and read the JSON", lambda: json.loads(_json(text)), lambda: json.loads(_json(short)))
    prompt = tokens[0].tolist()
    theirs, mine = compare(
        "take over into the sample (decode; ours checks every id)",
        lambda: take_over(sample(prompt), text, ours=False),
        lambda: take_over(sample(prompt), short, ours=True),
    )
    assert torch.equal(theirs, mine.experts.int())

    # The samples of one data-parallel rank, to its tensor- and pipeline-parallel ranks.
    packing = Packing(tensor_parallel=TENSOR, sequence_parallel=True, multiple=TENSOR * 128)
    schedule = Schedule([TOKENS] * SAMPLES, [[[0, 1], [2, 3]]])
    cut_time, (cuts,) = seconds(lambda: shards.cut(narrow, schedule, packing, ROUTING, by_layer=True))
    local = range(LAYERS // STAGES)
    names = shards.names(Rank(tensor=1), packing, local, by_layer=True)
    fetched = [cuts[name] for name in names]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def slimes_microbatch() -> list[RoutingReplay]:
        with rank(tensor=1):
            replays = [RoutingReplay() for _ in local]
            laid_out = prepare_routed_experts_for_routing_replay(
                wide[:2], list(tokens[:2]), num_experts=EXPERTS, data_pad_size_multiplier=128,
                sequence_parallel=True, allgather_cp=False,
            )  # fmt: skip
            for layer, replay in enumerate(replays):
                replay.record(laid_out[:, layer])
            for replay in replays:
                replay.top_indices_list[0].to(device)
            _wait(device)
        RoutingReplay.all_routing_replays.clear()
        return replays

    def our_microbatch() -> torch.Tensor:
        moved = shards.Shard(schedule.microbatches[0], fetched, by_layer=True).take([0, 1], positions.to(device))
        _wait(device)
        return moved

    positions = packing.local(packing.positions([TOKENS, TOKENS]), 1)
    replays, moved = compare("lay out a microbatch, to the device", slimes_microbatch, our_microbatch)
    _, recorded = shards.which_count([TOKENS, TOKENS], [TOKENS - 1] * 2, positions)
    for layer, replay in enumerate(replays):
        assert torch.equal(replay.top_indices_list[0][recorded], moved[layer].cpu()[recorded].int())

    weights = [
        ("on HTTP", len(text), len(short), TOKENS - 1),
        ("in the rollout manager", wide[0].nbytes, mine.experts.nbytes, TOKENS - 1),
        (
            "received by a trainer rank",
            len(pickle.dumps(wide, protocol=5)),
            sum(array.nbytes for part in fetched for array in part),
            SAMPLES * TOKENS,
        ),
        (
            "pinned by it",
            sum(buffer.nbytes for replay in replays for buffer in replay.top_indices_list) * SAMPLES / 2,
            moved.nbytes,
            SAMPLES * TOKENS,
        ),
    ]
    _print(rows, weights, cut_time, moved.shape)


def _json(text: str) -> bytes:
    try:
        from orjson import dumps  # what SGLang answers with
    except ImportError:
        return json.dumps({"text": "", "meta_info": {"routed_experts": text}}).encode()
    return dumps({"text": "", "meta_info": {"routed_experts": text}})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _print(
    rows: list[tuple[str, float, float]],
    weights: list[tuple[str, float, float, int]],
    cut_time: float,
    shape: torch.Size,
) -> None:
    console = Console(width=100)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    console.print(f"{where}; {LAYERS} MoE layers, top-{TOPK} of {EXPERTS}, samples of {TOKENS} tokens\n")
    table = Table("bytes a token", "slime", "r3_replay", "ratio", box=None, pad_edge=False)
    for what, theirs, mine, tokens in weights:
        table.add_row(what, f"{theirs / tokens:.1f}", f"{mine / tokens:.1f}", f"{theirs / mine:.1f}")
    console.print(table)
    console.print(
        f"  a rank of {SAMPLES} samples, tensor parallel {TENSOR} (sequence parallel), {STAGES} pipeline stages\n"
    )
    table = Table("milliseconds", "slime", "r3_replay", "ratio", box=None, pad_edge=False)
    for what, theirs, mine in rows:
        table.add_row(what, f"{theirs:.2f}", f"{mine:.2f}", f"{theirs / mine:.1f}")
    table.add_row(f"cut for all {TENSOR * STAGES} ranks, once", "", f"{cut_time * 1e3:.2f}", "")
    console.print(table)
    console.print(f"  a microbatch on one rank: {shape[0]} layers x {shape[1]} tokens x {shape[2]}")


if __name__ == "__main__":
    main()
