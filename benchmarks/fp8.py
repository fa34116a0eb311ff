"""The FP8 kernels beside slime's own, in one run on one GPU: time, bytes, bits, share of the copy bandwidth.

`python -m benchmarks.fp8` (a CUDA GPU). The weights are all those of one layer of Qwen3-30B-A3B that FP8 has: 128
experts of gate and up [768, 2048] and down [2048, 768], q [4096, 2048], k and v [512, 2048], o [2048, 4096], bfloat16.
slime's kernel is the one in the user's checkout ($SLIME_HOME, ~/slime, or --slime-kernel), one launch a tensor.

"One parameter at a time" is how slime updates: what it makes of a parameter of Megatron's (gate and up; down; query,
key and value; output) comes in one call. "New addresses": weights that were not there before, in a bucket of a known
layout. "First time": with nothing known. "Again": as in every later update of the same parameters.

`device ms`: the GPU's own time, from events; the GPU sleeps before, so that the host is ahead of it, and a buffer
larger than its cache is written before. `wall ms`: from the call until the GPU is done, with an idle GPU before: what a
weight update waits for. Medians. Without a GPU the kernels are judged in Triton's interpreter, and nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
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
PARAMETERS = [((1536, 2048), [768, 768]), ((2048, 768), [2048])] * EXPERTS
PARAMETERS += [((5120, 2048), [4096, 512, 512]), ((2048, 4096), [2048])]
"""Megatron's, and the rows of the checkpoint's tensors in each."""
LAYER = [(n, k) for (_, k), rows in PARAMETERS for n in rows]
SLIME_KERNEL = "slime/backends/megatron_utils/kernels/fp8_kernel.py"
SLEEP_CYCLES, FLUSHED_BYTES = 60_000_000, 2**29
CLOCKS = ("device", "wall")
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

    def device_ms(self, run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        times = []
        for _ in range(self.repeats + 3):
            before()
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

    def wall_ms(self, run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        times = []
        for _ in range(self.repeats + 3):
            before()
            self._flushed.zero_()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times[3:])


def forget() -> None:
    """All that is kept from one call to the next, but for compiled kernels."""
    from miles_plugins.fp8_unified import bucket, kernels

    kept = kernels._known, kernels._known_on, kernels._places, kernels._addresses, kernels._runs_of
    for each in (bucket._plan, kernels._plan_woven, *kept):
        each.cache_clear()


def measure_layer(clock: Clock, slimes: Quantiser | None) -> list[dict[str, Any]]:
    """One layer's weights from bfloat16 to FP8."""
    from miles_plugins.fp8_unified import kernels
    from miles_plugins.fp8_unified.blockwise import Format
    from miles_plugins.fp8_unified.bucket import plan
    from miles_plugins.fp8_unified.quantised import quantise_weights

    weights = [(torch.randn(shape, device="cuda") * 0.02).bfloat16() for shape in LAYER]
    count = sum(weight.numel() for weight in weights)
    exact, powers = Format(), Format(scale="power_of_two")
    layout = plan(LAYER, exact)
    bucket = torch.empty(layout.size, dtype=torch.uint8, device="cuda")
    whole = torch.cat([weight.flatten() for weight in weights])
    target = torch.empty_like(whole)
    moved = 3 * count + 4 * sum(-(-n // 128) * -(-k // 128) for n, k in LAYER)
    rest = iter(weights)
    of_parameters = [list(itertools.islice(rest, len(rows))) for _, rows in PARAMETERS]

    def by_parameter() -> list[Any]:
        return [quantise_weights(tensors, exact) for tensors in of_parameters]

    def one_by_one() -> list[Any]:
        return [quantise_weights([weight], exact) for weight in weights]

    def slimes_way() -> list[Any]:
        assert slimes is not None
        return [slimes(weight) for weight in weights]

    def slimes_bucket() -> torch.Tensor:
        """As slime's colocated update sends them: quantised one by one, then copied into one buffer."""
        return torch.cat([part.flatten().view(torch.uint8) for pair in slimes_way() for part in pair])

    def into() -> None:
        kernels.quantise_into(weights, bucket, layout, exact)

    cases: dict[str, tuple[int, Callable[[], object], Callable[[], object]]] = {
        "copy bfloat16": (4 * count, lambda: target.copy_(whole), nothing),
        "ours, into a bucket": (moved, into, nothing),
        "ours, into a bucket, new addresses": (moved, into, kernels._places.cache_clear),
        "ours, power_of_two": (moved, lambda: kernels.quantise_into(weights, bucket, layout, powers), nothing),
        "ours, with buffer and views": (moved, lambda: quantise_weights(weights, exact), nothing),
        "ours, with buffer and views, first time": (moved, lambda: quantise_weights(weights, exact), forget),
        "ours, one parameter at a time": (moved, by_parameter, nothing),
        "ours, one parameter at a time, first time": (moved, by_parameter, forget),
        "ours, a launch a tensor": (moved, one_by_one, nothing),
    }
    if slimes is not None:
        cases["slime's, a launch a tensor"] = moved, slimes_way, nothing
        cases["slime's, and its bucket"] = moved, slimes_bucket, nothing
    rows: list[dict[str, Any]] = []
    bandwidth = 0.0
    for name, (size, run, before) in cases.items():
        device = clock.device_ms(run, before)
        bandwidth = bandwidth or size / device
        rows.append(
            {
                "what": name,
                "device ms": round(device, 3),
                "wall ms": round(clock.wall_ms(run, before), 3),
                "MB at best": round(size / 1e6, 1),
                "GB/s": round(size / device / 1e6),
                "share of copy": round(size / device / bandwidth, 3),
            }
        )
    if slimes is not None:
        rows += ratios({row["what"]: row for row in rows})
    rows.append({"what": "bytes sent, bfloat16", "bytes": 2 * count})
    rows.append({"what": "bytes sent, FP8", "bytes": layout.size, "share": round(layout.size / (2 * count), 4)})
    return rows


def nothing() -> None:
    """Before a run that may know what the last one knew."""


def ratios(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as long slime's takes."""
    found = []
    for slimes, ours in (
        ("slime's, a launch a tensor", "ours, with buffer and views"),
        ("slime's, a launch a tensor", "ours, one parameter at a time"),
        ("slime's, a launch a tensor", "ours, one parameter at a time, first time"),
        ("slime's, a launch a tensor", "ours, a launch a tensor"),
        ("slime's, and its bucket", "ours, into a bucket"),
        ("slime's, and its bucket", "ours, into a bucket, new addresses"),
        ("slime's, and its bucket", "ours, with buffer and views, first time"),
    ):
        times = {
            f"{clock} times": round(rows[slimes][f"{clock} ms"] / rows[ours][f"{clock} ms"], 2) for clock in CLOCKS
        }
        found.append({"what": f"{slimes} / {ours}", **times})
    return found


def measure_travel(clock: Clock) -> list[dict[str, Any]]:
    """A layer's parameters as they are gathered: quantised first, or bfloat16 of twice the bytes."""
    from miles_plugins.fp8_unified import travel
    from miles_plugins.fp8_unified.blockwise import Format
    from miles_plugins.fp8_unified.quantised import quantise_weights

    format = Format()
    parameters = [(torch.randn(shape, device="cuda") * 0.02).bfloat16() for shape, _ in PARAMETERS]
    sizes = [math.prod(travel.shape_of(shape, format)) for shape, _ in PARAMETERS]
    plain = sum(2 * parameter.numel() for parameter in parameters)

    def together() -> object:
        return travel.encode(parameters, format)

    def one_by_one() -> object:
        return [travel.encode([parameter], format) for parameter in parameters]

    rows: list[dict[str, Any]] = [
        {"what": "bytes gathered, bfloat16", "bytes": plain},
        {"what": "bytes gathered, FP8 and scales", "bytes": sum(sizes), "share": round(sum(sizes) / plain, 4)},
    ]
    woven = travel.encode(parameters, format)
    converters = [
        lambda tensor, rows=rows: [(f"{i}.weight", part) for i, part in enumerate(tensor.split(rows))]
        for _, rows in PARAMETERS
    ]

    def decode() -> object:
        named = zip(PARAMETERS, woven, converters, strict=True)
        return [travel.decode(f"{rows}.weight", each, convert, format) for (_, rows), each, convert in named]

    def gathered_first() -> object:
        return [
            quantise_weights([part for _, part in convert(parameter)], format)
            for parameter, convert in zip(parameters, converters, strict=True)
        ]

    cases: list[tuple[str, Callable[[], object]]] = [
        ("quantise, all parameters", lambda: quantise_weights(parameters, format)),
        ("encode, all parameters", together),
        ("encode, one at a time", one_by_one),
        ("decode, one at a time", decode),
        ("encode all, then decode one at a time", lambda: (together(), decode())),
        ("gathered first: quantise, one at a time", gathered_first),
    ]
    for name, run in cases:
        device, wall = clock.device_ms(run), clock.wall_ms(run)
        rows.append({"what": name, "device ms": round(device, 3), "wall ms": round(wall, 3)})
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

        def product(c: Any = codes, w: Any = quantised, r: Any = counts) -> torch.Tensor:
            return kernels.grouped_linear(c, w, r, format)

        cases: list[tuple[str, Callable[[], object]]] = [("bfloat16, torch.mm", plain)]
        if experts > 1 and hasattr(torch, "_grouped_mm"):
            stacked = torch.stack(weights).transpose(-2, -1)
            ends = torch.tensor(counts, device="cuda").cumsum(0).int()
            cases.append(
                ("bfloat16, torch._grouped_mm", lambda x=x, b=stacked, ends=ends: torch._grouped_mm(x, b, offs=ends))
            )
        cases += [
            ("quantise x", lambda x=x: kernels.quantise_rows(x, format)),
            ("FP8 product", product),
            ("FP8 product, first time", product),
            (
                "FP8, both",
                lambda x=x, w=quantised, r=counts: kernels.grouped_linear(
                    kernels.quantise_rows(x, format), w, r, format
                ),
            ),
        ]
        for what, run in cases:
            before = forget if "first time" in what else nothing
            device, wall = clock.device_ms(run, before), clock.wall_ms(run, before)
            found: dict[str, Any] = {"what": f"{name} [{n}, {k}] x {experts}: {what}"}
            found |= {"device ms": round(device, 3), "wall ms": round(wall, 3)}
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
        "no CUDA GPU here: nothing is measured; the kernels in Triton's interpreter, which takes a minute:",
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
        "parameters of one layer on their way": measure_travel(clock),
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
            print("  ".join(f"{value!s:<72}" if key == "what" else f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
