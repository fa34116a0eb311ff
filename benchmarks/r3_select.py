"""What routing replay costs a router, beside Megatron's own top-k, in one run.

    python benchmarks/r3_select.py            # CUDA if there is a GPU, else the CPU

Shapes of Qwen3-30B-A3B: 48 MoE layers, 128 experts, top-8; one microbatch of 8192 tokens in 8 samples. Medians of
repeated runs; every variant is first checked against the CPU's answer on fresh random routing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from miles_plugins.r3_replay.replay import Recorded, Replay
from miles_plugins.r3_replay.trace import lay_out

LAYERS, EXPERTS, TOPK, SAMPLES, TOKENS = 48, 128, 8, 8, 8192


class Router(torch.nn.Module):
    """Of Megatron's router only what replay looks at."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.router_replay = None


def median_milliseconds(run: Callable[[], object], device: str, repeat: int = 50) -> float:
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length = TOKENS // SAMPLES
    traces = [
        torch.rand(length - 1, LAYERS, EXPERTS).topk(TOPK, dim=-1).indices.to(torch.uint8) for _ in range(SAMPLES)
    ]
    on_cpu = torch.cat([torch.arange(TOKENS), torch.full((128,), -1)])
    positions = on_cpu.to(device)
    indices, recorded = lay_out(traces, positions, EXPERTS)
    expected = lay_out(traces, on_cpu, EXPERTS)
    assert torch.equal(indices.cpu(), expected[0])
    assert torch.equal(recorded.cpu(), expected[1])

    model = torch.nn.ModuleList([Router(layer + 1) for layer in range(LAYERS)])
    replay = Replay([model], list(range(LAYERS)))
    scores = torch.randn(positions.numel(), EXPERTS, device=device, requires_grad=True)

    def natural() -> tuple[torch.Tensor, torch.Tensor]:
        values, chosen = torch.topk(scores, TOPK, dim=1)
        return values, chosen

    def replayed() -> tuple[torch.Tensor, torch.Tensor] | None:
        microbatch = Recorded(indices, recorded, replayed=set())
        return replay.select(model[0], microbatch, False, scores, TOPK, natural)

    replay.begin()
    probabilities, chosen = replayed() or (None, None)
    assert chosen is not None
    assert probabilities is not None
    assert torch.equal(chosen, indices[0].long())
    assert torch.equal(probabilities, scores.gather(1, chosen))
    probabilities.sum().backward()
    assert scores.grad is not None
    assert torch.equal(scores.grad.nonzero()[:, 1].reshape(-1, TOPK), chosen.sort(dim=1).values)

    top_k, replays = median_milliseconds(natural, device), median_milliseconds(replayed, device)
    laid_out = median_milliseconds(lambda: lay_out(traces, positions, EXPERTS), device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, {TOKENS} tokens, {EXPERTS} experts, top-{TOPK}")
    print(f"  Megatron's top-k, a router        {top_k:8.3f} ms")
    print(f"  replay and count, a router        {replays:8.3f} ms   {replays / top_k:.1f} x")
    print(f"  lay out {LAYERS} layers, a microbatch  {laid_out:8.3f} ms   ({indices.numel() / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
