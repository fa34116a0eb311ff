"""Do the FP8 kernels equal their reference: codes and scales bit for bit, the product to rounding?

`python -m tests.fp8_kernels cuda`, or `TRITON_INTERPRET=1 python -m tests.fp8_kernels cpu`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from miles_plugins.fp8_unified import blockwise as reference
from miles_plugins.fp8_unified import kernels, quantised
from miles_plugins.fp8_unified.blockwise import Format, Quantised
from miles_plugins.fp8_unified.bucket import plan

# What the interpreter can do in seconds; weights of Qwen3-30B-A3B and of DeepSeek-V3, and tiles that are not full.
SHAPES = {
    "cpu": ((130, 139),),
    "cuda": ((1536, 2048), (2048, 768), (576, 7168), (130, 257), (1, 1), (127, 16)),
}
FORMATS = [Format(block, kind) for block in ((128, 128), (64, 32)) for kind in ("float32", "power_of_two")]
PRODUCTS = {  # rows of each weight, N, K
    "cpu": (((5, 0, 70), 130, 160), ((40,), 96, 257)),
    "cuda": (
        ((4096,), 4096, 2048),
        ((1, 0, 63, 64, 65, 500, 0, 300), 1536, 2048),
        ((3000, 1, 0, 2000), 2048, 768),
        ((5, 0, 70), 130, 160),
        ((40,), 96, 257),
    ),
}


def weights_of(shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Ordinary weights, and all that could round, overflow or be lost; views of any strides."""
    n, k = shape
    normal = (torch.randn(shape) * 0.02).bfloat16()
    yield normal
    yield torch.randn(shape)  # float32
    ties = torch.randint(-28, 29, shape) / 16  # amax 1.75 * 2^k: every number is a code or lies between two
    ties[::32, ::32] = 1.75
    yield ties.bfloat16()
    yield (torch.randn(shape) * 2.0 ** torch.randint(-140, 120, (n, 1))).bfloat16()
    yield (torch.randn(shape) * 2.0 ** torch.randint(-148, 120, (n, 1))).nan_to_num(1, 1, 1)
    yield (torch.randn(shape) * 2.0**-130).bfloat16()  # subnormal throughout: the scale would be infinite
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    yield torch.where(bits.isfinite(), bits, 0)
    yield bits  # with NaN of all kinds, and infinities
    yield torch.where(torch.rand(shape) < 0.01, normal, -0.0)
    zeros = torch.zeros(shape).bfloat16()
    zeros[0, 0] = float("inf")
    yield zeros
    yield (torch.randn(k, n) * 0.02).bfloat16().T
    yield torch.randn(2 * n, 3 * k).bfloat16()[::2, ::3]
    yield torch.randn(n + 1, 2 * k).bfloat16()[1:, k:]  # rows of a larger one, at an address of its own
    yield torch.randn(n, 2, k)[:, 1]
    yield torch.zeros(0, k).bfloat16()


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8 if tensor.dtype == torch.float8_e4m3fn else torch.int32)


def require_same(found: Quantised, expected: Quantised, what: str) -> None:
    for name, left, right in zip(found._fields, found, expected, strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape), (what, name, left.shape, right.shape)
        differs = bits_of(left) != bits_of(right)
        assert not differs.any(), (
            f"{what}: {int(differs.sum())} of {differs.numel()} {name} differ, first {differs.nonzero()[0].tolist()}"
        )


def check_quantised(shape: tuple[int, int], format: Format, device: str) -> int:
    weights = list(weights_of(shape))
    weights.append(torch.stack(weights[:1] * 3))  # experts in one tensor
    placed = [place(weight, device) for weight in weights]
    layout = plan([weight.shape for weight in weights], format)
    expected = torch.empty(layout.size, dtype=torch.uint8)
    quantised.quantise_into(weights, expected, layout, format)
    bucket = torch.full((layout.size + 64,), 170, dtype=torch.uint8, device=device)
    kernels.quantise_into(placed, bucket, layout, format)
    for number, (found, each) in enumerate(zip(layout.views(bucket), layout.views(expected), strict=True)):
        require_same(found, each, f"weight {number} {list(shape)} {format}")
    # Every byte of the bucket is written, the gaps too, and none beyond it.
    assert torch.equal(bucket[: layout.size].cpu(), expected)
    assert (bucket[layout.size :] == 170).all()
    for number, (x, each) in enumerate(zip(placed, weights, strict=True)):
        wanted = reference.quantise_rows(each, format)
        require_same(kernels.quantise_rows(x, format), wanted, f"rows {number} {list(shape)} {format}")
    return len(weights)


def place(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """On the device, with the strides and the alignment that it has here."""
    if device == "cpu":
        return tensor
    # storage_offset() is within its storage; a copy of all of that keeps what lies around it.
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check_product(rows: tuple[int, ...], n: int, k: int, format: Format, device: str) -> int:
    x = reference.quantise_rows(torch.randn(sum(rows), k).bfloat16(), format)
    weights = [reference.quantise_weight((torch.randn(n, k) * 0.02).bfloat16(), format) for _ in rows]
    exact = torch.cat(
        [
            reference.dequantise(Quantised(*pair), format).to(device).double()
            @ reference.dequantise(weight, format).to(device).double().T
            for *pair, weight in zip(x.codes.split(rows), x.scale_inv.split(rows), weights, strict=True)
        ]
    ).cpu()
    placed_x = Quantised(*(part.to(device) for part in x))
    placed = [Quantised(*(part.to(device) for part in weight)) for weight in weights]
    stacked = Quantised(
        torch.stack([weight.codes.view(torch.uint8) for weight in placed]).view(torch.float8_e4m3fn),
        torch.stack([weight.scale_inv for weight in placed]),
    )
    found = kernels.grouped_linear(placed_x, placed, rows, format)
    counts = torch.tensor(rows, device=device)
    for other in (
        kernels.grouped_linear(placed_x, stacked, rows, format),
        kernels.grouped_linear(placed_x, placed, counts, format),
    ):
        assert torch.equal(found, other)
    assert (found.dtype, found.shape) == (torch.bfloat16, exact.shape)
    # bfloat16 rounds by 2^-9 of a result; a GPU adds FP8 products with 13 bits or more, by blocks of 128.
    room = exact.abs() * 2.0**-8 + exact.square().mean().sqrt() * (2.0**-10 if device == "cuda" else 2.0**-20)
    distance = (found.cpu().double() - exact).abs() / room
    assert distance.max() <= 1, f"{rows} {n} {k} {format}: {distance.max():.2f} times what is allowed"
    # A row does not depend on the rows beside it.
    begin = sum(rows[: (last := max(range(len(rows)), key=rows.__getitem__))])
    alone = Quantised(*(part[begin : begin + 3].contiguous() for part in placed_x))
    assert torch.equal(kernels.grouped_linear(alone, [placed[last]], [len(alone.codes)], format), found[begin:][:3])
    return 1


def check_large() -> None:
    """More than 2^31 weights in one bucket, and more than 2^31 bytes within one weight: offsets of 64 bits."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        return
    format = Format()
    weight = torch.zeros(2**21 + 128, 1024, dtype=torch.bfloat16, device="cuda")
    weight[-128:] = torch.randn(128, 1024, device="cuda").bfloat16()
    small = (torch.randn(256, 256) * 0.02).bfloat16()
    found = kernels.quantise_weights([weight, small.cuda()], format)
    last = reference.quantise_weight(weight[-128:].cpu(), format)
    require_same(Quantised(found[0].codes[-128:], found[0].scale_inv[-1:]), last, "the end of a large weight")
    require_same(found[1], reference.quantise_weight(small, format), "the weight behind a large one")
    rows = kernels.quantise_rows(weight, format)
    wanted = reference.quantise_rows(weight[-128:].cpu(), format)
    require_same(Quantised(rows.codes[-128:], rows.scale_inv[-128:]), wanted, "the end of many rows")


def check_streams() -> None:
    """Two streams with a buffer each give the bytes that one gives, without waiting in between."""
    format = Format()
    weights = [(torch.randn(1536, 2048, device="cuda") * 0.02).bfloat16() for _ in range(64)]
    layout = plan([weight.shape for weight in weights[:32]], format)
    expected = []
    for half in (weights[:32], weights[32:]):
        bucket = torch.empty(layout.size, dtype=torch.uint8, device="cuda")
        kernels.quantise_into(half, bucket, layout, format)
        expected.append(bucket.cpu())
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(10):
        found = []
        for half, stream in zip((weights[:32], weights[32:]), streams, strict=True):
            with torch.cuda.stream(stream):
                bucket = torch.zeros(layout.size, dtype=torch.uint8, device="cuda")
                kernels.quantise_into(half, bucket, layout, format)
                found.append(bucket)
        torch.cuda.synchronize()
        assert all(torch.equal(left.cpu(), right) for left, right in zip(found, expected, strict=True))


def main(device: str) -> None:
    torch.manual_seed(0)
    formats = FORMATS if device == "cuda" else FORMATS[::3]
    weights = sum(check_quantised(shape, format, device) for format in formats for shape in SHAPES[device])
    products = sum(check_product(*case, format, device) for format in FORMATS[::2] for case in PRODUCTS[device])
    if device == "cuda":
        check_large()
        check_streams()
    print(f"{weights} weights equal, {products} products near, on {device}")


if __name__ == "__main__":
    main(sys.argv[1])
