"""Our product beside SGLang's own Triton kernel: `python -m tests.fp8_sglang FILE`, on a GPU.

FILE is SGLang's sglang/srt/layers/quantization/fp8_kernel.py, of which the kernel is taken as it stands; the package
itself need not be installed. Both get the same codes and scales: what the trainer computes and what that kernel of the
engine computes must then be the same bits.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton

from miles_plugins.fp8_unified import kernels
from miles_plugins.fp8_unified.blockwise import Format, Quantised

KERNEL = "_w8a8_block_fp8_matmul"
SHAPES = [(1, 128, 128), (7, 512, 2048), (64, 768, 2048), (300, 2048, 768), (1024, 4096, 2048), (4096, 2048, 4096)]


def sglangs_kernel(file: Path, folder: Path) -> Any:
    source = file.read_text()
    (found,) = [each for each in ast.parse(source).body if getattr(each, "name", "") == KERNEL]
    first = min(each.lineno for each in found.decorator_list)  # type: ignore[attr-defined]
    lines = source.splitlines()[first - 1 : found.end_lineno]
    module = folder / "sglangs_kernel.py"
    module.write_text("\n".join(["import triton", "import triton.language as tl", "", *lines, ""]))
    spec = importlib.util.spec_from_file_location("sglangs_kernel", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["sglangs_kernel"] = loaded
    spec.loader.exec_module(loaded)
    return getattr(loaded, KERNEL)


def sglangs_product(kernel: Any, x: Quantised, weight: Quantised, size: tuple[int, int]) -> torch.Tensor:
    (m, k), n = x.codes.shape, len(weight.codes)
    y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    rows, columns = size
    kernel[triton.cdiv(m, rows) * triton.cdiv(n, columns),](
        x.codes, weight.codes, y, x.scale_inv, weight.scale_inv, m, n, k, 128, 128,
        x.codes.stride(0), x.codes.stride(1), weight.codes.stride(1), weight.codes.stride(0), y.stride(0), y.stride(1),
        x.scale_inv.stride(0), x.scale_inv.stride(1), weight.scale_inv.stride(1), weight.scale_inv.stride(0),
        BLOCK_SIZE_M=rows, BLOCK_SIZE_N=columns, BLOCK_SIZE_K=128, GROUP_SIZE_M=32, needs_masking=bool(k % 128),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return y


def main() -> None:
    format = Format()
    with tempfile.TemporaryDirectory() as folder:
        kernel = sglangs_kernel(Path(sys.argv[1]), Path(folder))
        generator = torch.Generator(device="cuda").manual_seed(0)
        worst = 0
        for m, n, k in SHAPES:
            x, w = (torch.randn(rows, k, generator=generator, device="cuda").bfloat16() for rows in (m, n))
            codes, (weight,) = kernels.quantise_rows(x, format), kernels.quantise_weights([w], format)
            ours = kernels.grouped_linear(codes, [weight], [m], format)
            for size in ((64, 128), (16, 128), (128, 128), (64, 64)):
                different = int((ours != sglangs_product(kernel, codes, weight, size)).sum())
                worst = max(worst, different)
                print(f"[{m}, {k}] x [{n}, {k}], SGLang's tiles {size}: {different} of {ours.numel()} differ")
    print("no difference" if worst == 0 else "they differ")
    sys.exit(worst != 0)


if __name__ == "__main__":
    main()
