"""Do the FP8 kernels equal their reference: codes and scales bit for bit, the product to rounding?

`python -m tests.fp8_kernels cuda`, or `TRITON_INTERPRET=1 python -m tests.fp8_kernels cpu`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from miles_plugins.errors import PluginError
from miles_plugins.fp8_unified import blockwise as reference
from miles_plugins.fp8_unified import kernels, quantised, travel
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
    check_bucket(weights, placed, format, device)
    check_bucket(weights, [place(weight, device) for weight in weights], format, device)  # at other addresses
    check_travel(shape, format, device)
    tables = kernels._places.cache_info().currsize
    for some in few(weights, 1 if device == "cuda" else 5):
        check_bucket([weights[i] for i in some], [placed[i] for i in some], format, device)
    assert kernels._places.cache_info().currsize == tables  # they need none
    for number, (x, each) in enumerate(zip(placed, weights, strict=True)):
        wanted = reference.quantise_rows(each, format)
        require_same(kernels.quantise_rows(x, format), wanted, f"rows {number} {list(shape)} {format}")
    return len(weights)


def few(weights: list[torch.Tensor], every: int) -> Iterator[list[int]]:
    """Matrices of one dtype, by number: one, two, ... as many as a launch takes as arguments, again and again."""
    for dtype in (torch.bfloat16, torch.float32):
        of_dtype = [i for i, each in enumerate(weights) if each.dtype == dtype and each.dim() == 2 and each.numel()]
        for i in range(0, len(of_dtype), every):
            yield of_dtype[i : i + 1 + i % kernels.FEW]


def check_bucket(weights: list[torch.Tensor], placed: list[torch.Tensor], format: Format, device: str) -> None:
    layout = plan([weight.shape for weight in weights], format)
    expected = torch.empty(layout.size, dtype=torch.uint8)
    quantised.quantise_into(weights, expected, layout, format)
    bucket = torch.full((layout.size + 64,), 170, dtype=torch.uint8, device=device)
    kernels.quantise_into(placed, bucket, layout, format)
    alone = kernels.quantise_weights(placed, format)  # with the tables of the call before
    for number, (found, each) in enumerate(zip(layout.views(bucket), layout.views(expected), strict=True)):
        what = f"weight {number} of {len(weights)} {list(weights[number].shape)} {format}"
        require_same(found, each, what)
        require_same(alone[number], each, what)
    # Every byte of the bucket is written, the gaps too, and none beyond it.
    assert torch.equal(bucket[: layout.size].cpu(), expected)
    assert (bucket[layout.size :] == 170).all()


def check_travel(shape: tuple[int, int], format: Format, device: str) -> None:
    """Rows with codes and scales woven, and unwoven: by few and by many weights in a launch."""
    matrices = [weight for weight in weights_of(shape) if weight.dtype == torch.bfloat16 and weight.numel()]
    placed = [place(weight, device) for weight in matrices]
    expected = [travel._woven(reference.quantise_weight(weight, format), format) for weight in matrices]
    groups = [range(len(placed)), range(1), range(2, 5)]
    for group in groups:
        found = kernels.quantise_woven([placed[i] for i in group], format)
        for number, woven in zip(group, found, strict=True):
            what = f"woven {number} of {len(group)} {list(shape)} {format}"
            assert woven.is_contiguous(), what
            assert torch.equal(woven.cpu(), expected[number]), what
    for number, (woven, weight) in enumerate(zip(expected, matrices, strict=True)):
        wanted = reference.quantise_weight(weight, format)
        shifted = torch.empty(woven.numel() + 1, dtype=torch.uint8, device=device)[1:].view(woven.shape)
        for each in (woven.to(device), shifted.copy_(woven)):  # at an odd address too
            codes, scales = kernels.unweave(each, format)
            unwoven = Quantised(codes.view(torch.float8_e4m3fn), scales)
            require_same(unwoven, wanted, f"unwoven {number} {list(shape)} {format}")


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
        kernels.grouped_linear(placed_x, placed, torch.tensor(rows), format),
        kernels.grouped_linear(placed_x, placed, counts, format),
    ):
        assert torch.equal(found, other)
    assert (found.dtype, found.shape) == (torch.bfloat16, exact.shape)
    # bfloat16 rounds by 2^-9 of a result; a GPU adds FP8 products with 13 bits or more, by blocks of 128.
    room = exact.abs() * 2.0**-8 + exact.square().mean().sqrt() * (2.0**-9 if device == "cuda" else 2.0**-20)
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
    last = reference.quantise_weight(weight[-128:].cpu(), format)
    for others in (1, kernels.FEW):
        found = kernels.quantise_weights([weight, *[small.cuda()] * others], format)
        require_same(Quantised(found[0].codes[-128:], found[0].scale_inv[-1:]), last, "the end of a large weight")
        require_same(found[-1], reference.quantise_weight(small, format), "the weight behind a large one")
        woven = kernels.quantise_woven([weight, *[small.cuda()] * others], format)
        for each, wanted in ((woven[0], last), (woven[-1], reference.quantise_weight(small, format))):
            codes, scales = kernels.unweave(each, format)
            end = Quantised(codes[-len(wanted.codes) :].view(torch.float8_e4m3fn), scales[-len(wanted.scale_inv) :])
            require_same(end, wanted, "the end of woven rows")
        del woven, codes, scales, end
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


def check_nothing_waits() -> None:
    """No call waits for the GPU, whether it has been there before or not."""
    format = Format()
    weights = [(torch.randn(256, 384, device="cuda") * 0.02).bfloat16() for _ in range(8)]
    x = torch.randn(100, 384, device="cuda").bfloat16()

    def run() -> None:
        quantised.quantise_weights(weights[:3], format)
        codes, parts = kernels.quantise_rows(x, format), kernels.quantise_weights(weights, format)
        kernels.grouped_linear(codes, parts[:1], [100], format)
        for woven in travel.encode(weights, format):
            travel.decode("a.weight", woven, lambda tensor: [("a.weight", tensor)], format)
        kernels.grouped_linear(codes, parts, [20, 0, 30, 1, 2, 3, 4, 40], format)

    run()
    for kept in (kernels._known, kernels._known_on, kernels._places, kernels._addresses, kernels._runs_of):
        kept.cache_clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_captured() -> None:
    """What needs no table can be captured in a graph; what needs one that is not there says so."""
    format = Format()
    weights = [(torch.randn(256, 384, device="cuda") * 0.02).bfloat16() for _ in range(8)]
    expected = [Quantised(*(part.clone() for part in each)) for each in kernels.quantise_weights(weights[:2], format)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.quantise_weights(weights[:2], format)
        try:
            kernels.quantise_weights(weights, format)
            refused = ""
        except PluginError as error:
            refused = str(error)
    assert "CUDA graph" in refused
    graph.replay()
    for left, right in zip(found, expected, strict=True):
        require_same(left, right, "captured")


def main(device: str) -> None:
    torch.manual_seed(0)
    formats = FORMATS if device == "cuda" else FORMATS[::3]
    weights = sum(check_quantised(shape, format, device) for format in formats for shape in SHAPES[device])
    products = sum(check_product(*case, format, device) for format in FORMATS[::2] for case in PRODUCTS[device])
    if device == "cuda":
        check_large()
        check_streams()
        check_nothing_waits()
        check_captured()
    print(f"{weights} weights equal, {products} products near, on {device}")


if __name__ == "__main__":
    main(sys.argv[1])
