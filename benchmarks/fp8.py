"""The FP8 kernels beside slime's own, in one run on one GPU: time, bytes, bits, share of the copy bandwidth.

`python -m benchmarks.fp8` (a CUDA GPU). The weights are all those of one layer of Qwen3-30B-A3B that FP8 has: 128
experts of gate and up [768, 2048] and down [2048, 768], q [4096, 2048], k and v [512, 2048], o [2048, 4096], bfloat16.
slime's kernel is the one in the user's checkout ($SLIME_HOME, ~/slime, or --slime-kernel), one launch a tensor.

`device ms`: the GPU's own time, from events; the GPU sleeps before, so that the host is ahead of it, and a buffer
larger than its cache is written before. `wall ms`: from the call until the GPU is done, with an idle GPU before: what a
weight update waits for. Medians. Without a GPU the kernels are judged in Triton's interpreter, and nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

EXPERTS, TOP_K = 128, 8
LAYER = [(768, 2048), (768, 2048), (2048, 768)] * EXPERTS + [(4096, 2048), (512, 2048), (512, 2048), (2048, 4096)]
SLIME_KERNEL = "slime/backends/megatron_utils/kernels/fp8_kernel.py"
SLEEP_CYCLES, FLUSHED_BYTES = 60_000_000, 2**29
Quantiser = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def slimes_kernel(path: str | None) -> Quantiser | None:
    """`blockwise_cast_to_fp8_triton` of a checkout; the file needs nothing of slime."""
    home = Path(os.environ.get("SLIME_HOME", "~/slime")).expanduser()
    file = Path(path).expanduser() if path else home / SLIME_KERNEL
    if not file.is_file():
        if path:
            raise SystemExit(f"no such file: {file}")
        return None
    spec = importlib.util.spec_from_file_location("slimes_fp8_kernel", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.blockwise_cast_to_fp8_triton


class Clock:
    """Times functions that run on the GPU."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def device_ms(self, run: Callable[[], object]) -> float:
        times = []
        for _ in range(self.repeats + 3):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
            self._flushed.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times[3:])

    def wall_ms(self, run: Callable[[], object]) -> float:
        times = []
        for _ in range(self.repeats + 3):
            self._flushed.zero_()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times[3:])


def measure_layer(clock: Clock, slimes: Quantiser | None) -> list[dict[str, Any]]:
    """One layer's weights from bfloat16 to FP8."""
    from miles_plugins.fp8_unified import kernels
    from miles_plugins.fp8_unified.blockwise import Format
    from miles_plugins.fp8_unified.bucket import plan

    weights = [(torch.randn(shape, device="cuda") * 0.02).bfloat16() for shape in LAYER]
    count = sum(weight.numel() for weight in weights)
    exact, powers = Format(), Format(scale="power_of_two")
    layout = plan(LAYER, exact)
    bucket = torch.empty(layout.size, dtype=torch.uint8, device="cuda")
    whole = torch.cat([weight.flatten() for weight in weights])
    target = torch.empty_like(whole)
    moved = 3 * count + 4 * sum(-(-n // 128) * -(-k // 128) for n, k in LAYER)

    def one_by_one() -> None:
        for weight in weights:
            kernels.quantise_weights([weight], exact)

    def slimes_way() -> None:
        assert slimes is not None
        for weight in weights:
            slimes(weight)

    def slimes_bucket() -> torch.Tensor:
        """As slime's colocated update sends them: quantised one by one, then copied into one buffer."""
        assert slimes is not None
        parts = [part for weight in weights for part in slimes(weight)]
        return torch.cat([part.flatten().view(torch.uint8) for part in parts])

    cases: list[tuple[str, int, Callable[[], object]]] = [
        ("copy bfloat16", 4 * count, lambda: target.copy_(whole)),
        ("ours, into a bucket", moved, lambda: kernels.quantise_into(weights, bucket, layout, exact)),
        ("ours, power_of_two", moved, lambda: kernels.quantise_into(weights, bucket, layout, powers)),
        ("ours, with buffer and views", moved, lambda: kernels.quantise_weights(weights, exact)),
        ("ours, a launch a tensor", moved, one_by_one),
    ]
    if slimes is not None:
        cases += [("slime's, a launch a tensor", moved, slimes_way), ("slime's, and its bucket", moved, slimes_bucket)]
    rows: list[dict[str, Any]] = []
    bandwidth = 0.0
    for name, size, run in cases:
        device = clock.device_ms(run)
        bandwidth = bandwidth or size / device
        rows.append(
            {
                "what": name,
                "device ms": round(device, 3),
                "wall ms": round(clock.wall_ms(run), 3),
                "MB at best": round(size / 1e6, 1),
                "GB/s": round(size / device / 1e6),
                "share of copy": round(size / device / bandwidth, 3),
            }
        )
    rows.append({"what": "bytes sent, bfloat16", "bytes": 2 * count})
    rows.append({"what": "bytes sent, FP8", "bytes": layout.size, "share": round(layout.size / (2 * count), 4)})
    return rows


def count_differences(slimes: Quantiser | None) -> list[dict[str, Any]]:
    """Ours and slime's against the reference, computed on the CPU."""
    from miles_plugins.fp8_unified import blockwise, kernels
    from miles_plugins.fp8_unified.blockwise import Format

    format, shape = Format(), (2048, 4096)
    normal = (torch.randn(shape) * 0.02).bfloat16()
    ties = normal.clamp(-0.1, 0.1)
    ties[::128, ::128] = 1.75 * 2.0**-4
    zeros = normal.clone()
    zeros[:1024] = 0
    cases = {"normal": normal, "tie blocks, amax 1.75 * 2^-4": ties, "half of the blocks zero": zeros}
    quantisers: dict[str, Quantiser] = {"ours": lambda weight: kernels.quantise_weights([weight], format)[0]}
    if slimes is not None:
        quantisers["slime's"] = slimes
    rows = []
    for case, weight in cases.items():
        codes, scale_inv = blockwise.quantise_weight(weight, format)
        for name, quantise in quantisers.items():
            found_codes, found_scales = (part.cpu() for part in quantise(weight.cuda()))
            wrong = (found_codes.view(torch.uint8) != codes.view(torch.uint8)).sum().item()
            wrong_scales = (found_scales.view(torch.int32) != scale_inv.view(torch.int32)).sum().item()
            rows.append(
                {
                    "what": f"{name}: {case}",
                    "codes that differ": wrong,
                    "of": codes.numel(),
                    "share": f"{wrong / codes.numel():.4%}",
                    "scales that differ": wrong_scales,
                    "of scales": scale_inv.numel(),
                }
            )
    return rows


def measure_products(clock: Clock, tokens: int) -> list[dict[str, Any]]:
    """y = x weight^T of a dense layer, and of the experts with TOP_K rows a token, beside PyTorch in bfloat16."""
    from miles_plugins.fp8_unified import kernels
    from miles_plugins.fp8_unified.blockwise import Format

    format = Format()
    rows: list[dict[str, Any]] = []
    for name, (n, k), experts in (
        ("dense", (4096, 2048), 1),
        ("fc1", (1536, 2048), EXPERTS),
        ("fc2", (2048, 768), EXPERTS),
    ):
        m = tokens if experts == 1 else tokens * TOP_K
        counts = torch.bincount(torch.randint(experts, (m,)), minlength=experts).tolist()
        x = torch.randn(m, k, device="cuda").bfloat16()
        weights = [(torch.randn(n, k, device="cuda") * 0.02).bfloat16() for _ in range(experts)]
        y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        quantised, codes = kernels.quantise_weights(weights, format), kernels.quantise_rows(x, format)
        parts = list(zip(x.split(counts), weights, y.split(counts), strict=True))

        def plain(parts: Sequence[tuple[torch.Tensor, ...]] = parts) -> None:
            for left, weight, out in parts:
                torch.mm(left, weight.T, out=out)

        cases: list[tuple[str, Callable[[], object]]] = [("bfloat16, torch.mm", plain)]
        if experts > 1 and hasattr(torch, "_grouped_mm"):
            stacked = torch.stack(weights).transpose(-2, -1)
            ends = torch.tensor(counts, device="cuda").cumsum(0).int()
            cases.append(
                ("bfloat16, torch._grouped_mm", lambda x=x, b=stacked, ends=ends: torch._grouped_mm(x, b, offs=ends))
            )
        cases += [
            ("quantise x", lambda x=x: kernels.quantise_rows(x, format)),
            ("FP8 product", lambda c=codes, w=quantised, r=counts: kernels.grouped_linear(c, w, r, format)),
            (
                "FP8, both",
                lambda x=x, w=quantised, r=counts: kernels.grouped_linear(
                    kernels.quantise_rows(x, format), w, r, format
                ),
            ),
        ]
        for what, run in cases:
            device = clock.device_ms(run)
            found: dict[str, Any] = {"what": f"{name} [{n}, {k}] x {experts}: {what}", "device ms": round(device, 3)}
            if what != "quantise x":
                found["tokens/s"] = round(1e3 * tokens / device)
                found["TFLOP/s"] = round(2 * m * n * k / device / 1e9)
            rows.append(found)
        plain()
        difference = kernels.grouped_linear(codes, quantised, counts, format).float() - y.float()
        error = (difference.square().mean() / y.float().square().mean()).sqrt().item()
        rows.append({"what": f"{name}: FP8 from bfloat16, relative rms", "error": round(error, 4)})
    return rows


def interpreter_only() -> int:
    print(
        "no CUDA GPU here: nothing is measured; the kernels in Triton's interpreter, which takes half a minute:",
        flush=True,
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-m", "tests.fp8_kernels", "cpu"], env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--slime-kernel", metavar="PATH", help="slime's fp8_kernel.py, where there is no checkout")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(interpreter_only())
    torch.manual_seed(0)
    slimes = slimes_kernel(options.slime_kernel)
    clock = Clock(options.repeats)
    sections = {
        "weights of one layer": measure_layer(clock, slimes),
        "bits": count_differences(slimes),
        f"products, {options.tokens} tokens": measure_products(clock, options.tokens),
    }
    if options.json:
        print(json.dumps({"gpu": torch.cuda.get_device_name(), "slime's kernel": slimes is not None, **sections}))
        return
    print(f"{torch.cuda.get_device_name()}, median of {options.repeats}")
    if slimes is None:
        print("slime's kernel was not found and is not compared: set SLIME_HOME, or give --slime-kernel")
    for title, rows in sections.items():
        print(f"\n{title}")
        for row in rows:
            print("  ".join(f"{value!s:<46}" if key == "what" else f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
