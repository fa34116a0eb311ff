"""Do the INT4 kernels equal their reference, bit for bit?

`python -m tests.int4_kernels cuda`, or `TRITON_INTERPRET=1 python -m tests.int4_kernels cpu`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from miles_plugins.int4_qat import grid as reference
from miles_plugins.int4_qat import kernels
from miles_plugins.int4_qat.grid import Grid

# What the interpreter can do in seconds; a layer of Qwen3-30B-A3B, one of Kimi-K2, and tiles that are not full.
SHAPES = {"cpu": ((3, 128), (33, 256)), "cuda": ((1536, 2048), (2048, 768), (4096, 7168), (37, 384))}


def weights_of(shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    normal = [(torch.randn(shape) * 0.02).bfloat16() for _ in range(3)]
    yield from normal
    yield (torch.randint(-14, 15, shape) / 14).bfloat16()  # ties
    yield (torch.randn(shape) * 2.0 ** torch.randint(-130, -10, (shape[0], 1))).bfloat16()
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    yield torch.where(bits.isfinite(), bits, 0)
    holes = normal[0].clone()
    holes[0, 5], holes[1, 70], holes[2, 9] = float("nan"), float("inf"), -0.0
    yield holes


def check(weights: list[torch.Tensor], grid: Grid, device: str) -> int:
    placed = [weight.to(device) for weight in weights]
    expected = [reference.quantise(weight, grid) for weight in weights]
    values = torch.stack([reference.dequantise(each) for each in expected])
    packed = kernels.pack(placed, grid)
    require_same(packed.packed, torch.stack([reference.pack(each.codes) for each in expected]))
    require_same(packed.scale, torch.stack([each.scale for each in expected]))
    require_same(kernels.fake_quantise(placed, grid), values)
    require_same(kernels.dequantise(packed), values)
    return len(weights)


def require_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    found = found.cpu()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    bits = torch.int16 if found.dtype == torch.bfloat16 else torch.int32
    differs = found.view(bits) != expected.view(bits)
    differs &= ~(found.float().isnan() & expected.float().isnan())  # one NaN is as good as another
    assert not differs.any(), f"{int(differs.sum())} of {differs.numel()} differ, first {differs.nonzero()[0].tolist()}"


def main(device: str) -> None:
    torch.manual_seed(0)
    count = 0
    for grid in [Grid(size, kind) for kind in ("stock", "snapped") for size in (32, 64, 128)]:
        for shape in SHAPES[device]:
            weights = list(weights_of(shape))
            strided = weights[1].repeat(1, 2)[:, ::2]
            count += check(weights, grid, device) + check([strided], grid, device)
    print(f"{count} weights equal on {device}")


if __name__ == "__main__":
    main(sys.argv[1])
