"""What routing replay costs a trainer, beside Megatron's own top-k, in one run.

    python benchmarks/r3_replay.py            # CUDA if there is a GPU, else the CPU

Shapes of Qwen3-30B-A3B: 48 MoE layers, 128 experts, top-8; one microbatch of 8192 tokens in 8 samples, one rank.
Medians of repeated runs; what is timed is first checked against plain indexing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from miles_plugins import Packing, Rank, Schedule
from miles_plugins.r3_replay import shards
from miles_plugins.r3_replay.replay import Recorded, Replay
from miles_plugins.r3_replay.trace import Routing

LAYERS, EXPERTS, TOPK, SAMPLES, TOKENS = 48, 128, 8, 8, 8192
ROUTING = Routing(tuple(range(LAYERS)), TOPK, EXPERTS)
LENGTHS = [TOKENS // SAMPLES] * SAMPLES
SCHEDULE = Schedule(LENGTHS, [[list(range(SAMPLES))]])
PACKING = Packing(multiple=128)


class Router(torch.nn.Module):
    """Of Megatron's router only what replay looks at."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.router_replay = None


def milliseconds(run: Callable[[], object], device: str, repeat: int = 30) -> float:
    """The median, the device's work included."""
    times = []
    for _ in range(repeat + 5):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times[5:])


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    traces = [torch.rand(length - 1, LAYERS, EXPERTS).topk(TOPK, dim=-1).indices.to(torch.uint8) for length in LENGTHS]
    cuts = shards.cut(traces, SCHEDULE, PACKING, ROUTING, by_layer=False)[0]
    names = shards.names(Rank(), PACKING, range(LAYERS), by_layer=False)
    shard = shards.Shard(SCHEDULE.microbatches[0], [cuts[name] for name in names], by_layer=False)
    positions = PACKING.positions(LENGTHS).to(device)

    def lay_out() -> Recorded:
        indices = shard.take(range(SAMPLES), positions)
        tokens, recorded = shards.which_count(LENGTHS, [len(trace) for trace in traces], positions)
        return Recorded(indices, recorded, tokens)

    recorded = lay_out()
    expected = torch.cat([row for trace in traces for row in (trace, torch.zeros_like(trace[:1]))])
    known = recorded.recorded.cpu()
    assert int(known.sum()) == TOKENS - SAMPLES
    assert torch.equal(recorded.indices.cpu().transpose(0, 1)[known], expected[known])

    model = torch.nn.ModuleList([Router(layer + 1) for layer in range(LAYERS)])
    replay = Replay([model], list(range(LAYERS)))
    scores = torch.randn(TOKENS, EXPERTS, device=device, requires_grad=True)

    def natural() -> tuple[torch.Tensor, torch.Tensor]:
        values, chosen = torch.topk(scores, TOPK, dim=1)
        return values, chosen

    def replayed(recomputing: bool = False) -> tuple[torch.Tensor, torch.Tensor] | None:
        recorded.replayed.clear()
        return replay.select(model[0], recorded, recomputing, scores, TOPK, natural)

    replay.begin()
    probabilities, chosen = replayed() or (None, None)
    assert chosen is not None
    assert probabilities is not None
    assert torch.equal(chosen, recorded.indices[0].long())
    probabilities.sum().backward()
    assert scores.grad is not None
    assert torch.equal(scores.grad.nonzero()[:, 1].reshape(-1, TOPK), chosen.sort(dim=1).values)

    top_k = milliseconds(natural, device.type)
    forward, again = milliseconds(replayed, device.type), milliseconds(lambda: replayed(True), device.type)
    laid_out = milliseconds(lay_out, device.type)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{name}; {TOKENS} tokens, {LAYERS} layers, {EXPERTS} experts, top-{TOPK}")
    print(f"  Megatron's top-k, a router                {top_k:8.3f} ms")
    print(f"  replay and compare, a router              {forward:8.3f} ms   {forward / top_k:.1f} x")
    print(f"  replay in a recomputation, a router       {again:8.3f} ms   {again / top_k:.1f} x")
    print(
        f"  routing to the device, a microbatch       {laid_out:8.3f} ms   {recorded.indices.numel() / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
