"""The INT4 kernels beside the eager formulation, in one run on one GPU: time, bytes, share of the copy bandwidth.

`python -m benchmarks.int4` (a CUDA GPU). The weights are the experts of layers of Qwen3-30B-A3B: 128 experts, fc1
[1536, 2048] and fc2 [2048, 768] bfloat16, more than a GPU's cache holds. Eager is what slime's trainer hook and packer
do, written anew from their description: twelve PyTorch operations a weight (fake), and about as many to pack.

Then what a pass and a weight update cost for one such layer. A pass: 8 microbatches with full recomputation, 16
forwards, quantized once or each time. An update: 384 tensors, packed as `export_weights` is given
them, a Megatron parameter at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence

import torch

from miles_plugins.int4_qat import kernels
from miles_plugins.int4_qat import packed as packed_form
from miles_plugins.int4_qat.grid import Grid

EXPERTS, SHAPES = 128, ((1536, 2048), (2048, 768))
FORWARDS = 16  # 8 microbatches, each computed again in the backward pass


def eager_fake(weight: torch.Tensor, size: int) -> torch.Tensor:
    rows, width = weight.shape
    padded = torch.zeros(rows, width, dtype=weight.dtype, device=weight.device)
    padded[:, :width] = weight
    groups = padded.view(rows, -1, size)
    scale = (groups.abs().float().amax(dim=-1, keepdim=True) / 7).clamp(min=1e-5)
    codes = torch.round(groups / scale).clamp(-7, 7)
    return (codes * scale).to(weight.dtype).view(rows, width)


def eager_pack(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = weight.shape
    groups = weight.view(rows, -1, size)
    scale = (groups.abs().float().amax(dim=-1, keepdim=True) / 7).clamp(min=1e-5)
    codes = (torch.round(groups / scale).clamp(-7, 7).to(torch.int8).view(rows, width) + 8).to(torch.uint8)
    words = codes.to(torch.int32).view(rows, -1, 8)
    shifts = torch.arange(0, 32, 4, device=weight.device, dtype=torch.int32)
    return (words << shifts).sum(dim=-1, dtype=torch.int32), scale.to(weight.dtype)


def milliseconds(run: Callable[[], object], repeats: int, together: int = 10) -> float:
    """Median device time of one run; some together, so that the host is ahead of the GPU as it is in training."""
    times = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(together):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / together)
    return statistics.median(times[3:])


def each(function: Callable[[torch.Tensor, int], object], weights: Sequence[torch.Tensor], size: int) -> None:
    for weight in weights:
        function(weight, size)


def measure(size: int, shape: tuple[int, int], repeats: int) -> list[dict[str, object]]:
    grid = Grid(size)
    weights = [(torch.randn(shape, device="cuda") * 0.02).bfloat16() for _ in range(EXPERTS)]
    whole = torch.cat([weight.flatten() for weight in weights])
    target = torch.empty_like(whole)
    count = whole.numel()
    packed_bytes = count // 2 + 2 * count // size
    copy = milliseconds(lambda: target.copy_(whole), repeats)
    bandwidth = 4 * count / copy  # bytes a millisecond
    packed = kernels.pack(weights, grid)
    cases: list[tuple[str, int, Callable[[], object]]] = [
        ("copy", 4 * count, lambda: target.copy_(whole)),
        ("fake quantise, eager", 4 * count, lambda: each(eager_fake, weights, size)),
        ("fake quantise", 4 * count, lambda: kernels.fake_quantise(weights, grid)),
        ("pack, eager", 2 * count + packed_bytes, lambda: each(eager_pack, weights, size)),
        ("pack", 2 * count + packed_bytes, lambda: kernels.pack(weights, grid)),
        ("dequantise the packed", 2 * count + packed_bytes, lambda: kernels.dequantise(packed)),
    ]
    rows: list[dict[str, object]] = []
    for name, moved, run in cases:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated() - before
        time = milliseconds(run, repeats)
        rows.append(
            {
                "group size": size,
                "shape": list(shape),
                "what": name,
                "ms": round(time, 3),
                "MB moved at best": round(moved / 1e6, 1),
                "share of copy": round(moved / time / bandwidth, 3),
                "peak MB": round(peak / 1e6, 1),
            }
        )
    return rows


def measure_layer(size: int, repeats: int) -> list[dict[str, object]]:
    """One MoE layer in a training pass and in a weight update, by each way."""
    grid = Grid(size)
    fc1, fc2 = ([(torch.randn(shape, device="cuda") * 0.02).bfloat16() for _ in range(EXPERTS)] for shape in SHAPES)
    parameters = [list(weight.chunk(2)) for weight in fc1] + [[weight] for weight in fc2]

    def forwards(quantise: Callable[[Sequence[torch.Tensor]], object]) -> None:
        for _ in range(FORWARDS):
            quantise(fc1)
            quantise(fc2)

    def once() -> None:
        packed = [packed_form.pack(fc1, grid), packed_form.pack(fc2, grid)]
        for _ in range(FORWARDS):
            for each_layer in packed:
                packed_form.dequantise(each_layer)

    cases: list[tuple[str, Callable[[], object]]] = [
        ("a pass, eager each forward", lambda: forwards(lambda weights: each(eager_fake, weights, size))),
        ("a pass, fused each forward", lambda: forwards(lambda weights: kernels.fake_quantise(weights, grid))),
        ("a pass, quantised once", once),
        ("an update, eager", lambda: [eager_pack(weight, size) for parts in parameters for weight in parts]),
        ("an update, ours", lambda: [packed_form.pack([weight], grid) for parts in parameters for weight in parts]),
    ]
    return [
        {"group size": size, "what": name, "ms": round(milliseconds(run, repeats, together=2), 3)}
        for name, run in cases
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here: nothing was measured")
    rows = [row for size in (32, 64, 128) for shape in SHAPES for row in measure(size, shape, options.repeats)]
    rows += [row for size in (32, 64, 128) for row in measure_layer(size, options.repeats)]
    if options.json:
        print(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}))
        return
    print(f"{torch.cuda.get_device_name()}, {EXPERTS} experts, median of {options.repeats}")
    for row in rows:
        print("  ".join(f"{value!s:>27}" if key == "what" else f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
