"""Block-scaled FP8: the reference against a derivation of its own, in whole numbers and exact fractions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import PluginError
from miles_plugins.fp8_unified import blockwise
from miles_plugins.fp8_unified.blockwise import (
    Format,
    Quantised,
    dequantise,
    fake_quantise_rows,
    fake_quantise_weight,
    is_power_of_two,
    pack_ue8m0,
    per_channel,
    per_tensor,
    quantise_rows,
    quantise_weight,
    requantise_power_of_two,
    unpack_ue8m0,
)
from miles_plugins.fp8_unified.bucket import ALIGNMENT, plan
from miles_plugins.fp8_unified.quantised import quantise_into, quantise_weights

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

settings.register_profile("fp8", deadline=None)
settings.load_profile("fp8")

KINDS = ("float32", "power_of_two")
SMALL = Format((32, 32))


def codes_of(quantised: Quantised) -> torch.Tensor:
    return quantised.codes.contiguous().view(torch.uint8)


def same(found: Quantised, expected: Quantised) -> bool:
    return (
        found.codes.shape == expected.codes.shape
        and found.scale_inv.shape == expected.scale_inv.shape
        and torch.equal(codes_of(found), codes_of(expected))
        and torch.equal(found.scale_inv.view(torch.int32), expected.scale_inv.contiguous().view(torch.int32))
    )


# -- a derivation of its own ------------------------------------------------------------------------------------------


def value_of(code: int) -> Fraction | None:
    """What an E4M3 code means; None is NaN."""
    sign, exponent, mantissa = -1 if code & 0x80 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 8) * Fraction(1, 2**6)
    return sign * (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


POSITIVE = [value for value in map(value_of, range(0x7F)) if value is not None]  # the codes 0 ... 0x7E in order


def nearest_code(x: Fraction) -> int:
    """Half to even, saturating; the sign of a zero is not known here."""
    size = abs(x)
    if size >= POSITIVE[-1]:
        code = 0x7E
    else:
        above = next(code for code, value in enumerate(POSITIVE) if value > size)
        low, high = size - POSITIVE[above - 1], POSITIVE[above] - size
        code = above if high < low or (high == low and above % 2 == 0) else above - 1
    return code | (0x80 if x < 0 else 0)


def rounded(x: Fraction) -> np.float32:
    """A positive fraction as the nearest float32, half to even, from whole numbers; infinity above the largest."""
    exponent = max(math.floor(math.log2(x.numerator) - math.log2(x.denominator)) - 24, -149)
    while x / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    while exponent > -149 and x / Fraction(2) ** exponent < 2**23:
        exponent -= 1
    whole = x / Fraction(2) ** exponent
    low = whole.numerator // whole.denominator
    rest = whole - low
    low += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1)
    if low * Fraction(2) ** exponent >= Fraction(2) ** 128:
        return np.float32(np.inf)
    return np.float32(math.ldexp(low, exponent))


def transformer_engine(x: np.ndarray, block: tuple[int, int], kind: str, largest: float) -> tuple[np.ndarray, ...]:
    """TransformerEngine's rule, tile by tile: codes uint8 and inverse scales float32 of [N, K] float32, all finite."""
    rows, columns = x.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    codes, inverses = np.zeros(x.shape, np.uint8), np.zeros((down, across), np.float32)
    for i in range(down):
        for j in range(across):
            here = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            amax = np.abs(x[here]).max()
            scale = np.float32(1)
            if amax != 0:
                scale = rounded(448 / Fraction(float(amax)))
                if np.isinf(scale):
                    scale = np.float32(largest)
                if kind == "power_of_two":
                    scale = np.float32(2.0 ** math.floor(math.log2(scale)))
                    while Fraction(float(scale)) > 448 / Fraction(float(amax)):  # log2 rounds up just below a power
                        scale /= np.float32(2)
            inverses[i, j] = rounded(1 / Fraction(float(scale)))
            scaled = x[here] * scale
            for place, value in np.ndenumerate(scaled):
                code = nearest_code(Fraction(float(value)))
                codes[here][place] = code | (0x80 if np.signbit(value) else 0)
    return codes, inverses


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """[33, 40] or smaller, bfloat16 or float32: any finite bits, tie blocks, subnormal, tiny, huge, zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from([(1, 1), (1, 40), (33, 1), (33, 40), (32, 32)]))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    kind = draw(st.sampled_from(["normal", "bits", "ties", "subnormal", "scaled", "zeros"]))
    if kind == "bits":
        words = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
        found = words.view(torch.float32).to(dtype)
        return torch.where(found.isfinite(), found, torch.ones_like(found))
    found = torch.randn(shape, generator=generator)
    if kind == "ties":  # amax 1.75 * 2^k: 448 / amax is a power of two, and odd 16ths lie between two codes
        found = torch.randint(-28, 29, shape, generator=generator) / 16 * 2.0 ** draw(st.integers(-100, 100))
        found[0, 0] = 1.75 * 2.0**3
    elif kind == "subnormal":
        found = found * 2.0 ** draw(st.integers(-140, -122))
    elif kind == "scaled":
        found = found * 2.0 ** draw(st.integers(-100, 100))
    elif kind == "zeros":
        found = found * (torch.rand(shape, generator=generator) < 0.05)
    return found.to(dtype)


@settings(max_examples=60)
@given(tensors(), st.sampled_from(KINDS), st.booleans())
def test_the_rule_is_transformer_engines(x: torch.Tensor, kind: str, is_weight: bool) -> None:
    format = Format((32, 32), kind)
    found = quantise_weight(x, format) if is_weight else quantise_rows(x, format)
    block = (32, 32) if is_weight else (1, 32)
    codes, inverses = transformer_engine(x.float().numpy(), block, kind, torch.finfo(x.dtype).max)
    assert found.codes.dtype == torch.float8_e4m3fn
    assert found.scale_inv.dtype == torch.float32
    assert found.codes.is_contiguous()
    assert found.scale_inv.is_contiguous()
    assert np.array_equal(codes_of(found).numpy(), codes)
    assert np.array_equal(found.scale_inv.numpy().view(np.int32), inverses.view(np.int32))
    assert is_power_of_two(found.scale_inv) or kind == "float32"


@pytest.mark.parametrize("shape", [(130, 257), (1, 200), (200, 1), (128, 128), (256, 384)])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_128_with_and_without_a_tail(shape: tuple[int, int], kind: str) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 0.02).bfloat16()
    found = quantise_weight(x, Format(scale=kind))
    assert found.scale_inv.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i, rows in enumerate(x.split(128, 0)):
        for j, tile in enumerate(rows.split(128, 1)):
            # The tile alone, without its neighbours and without any padding, in numpy.
            numbers = tile.float().numpy()
            scale = np.float32(448) / np.abs(numbers).max()
            if kind == "power_of_two":
                scale = np.float32(2.0) ** np.floor(np.log2(scale))
            expected = torch.from_numpy(np.clip(numbers * scale, -448, 448)).to(torch.float8_e4m3fn)
            here = found.codes[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            assert torch.equal(here.view(torch.uint8), expected.view(torch.uint8))
            assert found.scale_inv[i, j] == np.float32(1) / scale


def test_all_codes_and_every_tie() -> None:
    """A row whose largest is 448 has the scale 1: the codes of all values, of all middles, and of their neighbours."""
    middles = [(low + high) / 2 for low, high in itertools.pairwise(POSITIVE)]
    exact = [float(value) for value in POSITIVE + middles]
    near = [float(np.nextafter(np.float32(value), np.float32(way))) for value in exact[:-1] for way in (0, 500)]
    signed = [sign * value for value in exact + near for sign in (1.0, -1.0) if abs(value) <= 448]
    blocks = torch.nn.functional.pad(torch.tensor(signed), (0, -len(signed) % 127)).view(-1, 127)
    blocks = torch.nn.functional.pad(blocks, (0, 1), value=448.0)
    whole = quantise_rows(blocks, Format((32, 128)))
    assert (whole.scale_inv == 1).all()
    for block, codes in zip(blocks.tolist(), codes_of(whole).tolist(), strict=True):
        for value, code in zip(block, codes, strict=True):
            expected = nearest_code(Fraction(value)) | (0x80 if math.copysign(1, value) < 0 else 0)
            assert code == expected, value
    assert set(codes_of(whole).flatten().tolist()) == set(range(256)) - {0x7F, 0xFF}
    # And back: every code's value.
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    values = dequantise(Quantised(every, torch.tensor([[0.5, 0.5]])), (1, 128))[0].tolist()
    for code, value in enumerate(values):
        expected_value = value_of(code)
        assert math.isnan(value) if expected_value is None else value == expected_value / 2


def test_what_rounds_past_the_largest_saturates() -> None:
    """448 / amax rounds up for some amax, so that amax * scale is above 448; and never as far as a NaN."""
    amax = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)  # all mantissas
    x = amax[:, None].expand(-1, 32).contiguous()
    found = quantise_rows(x, SMALL)
    assert (codes_of(found) == 0x7E).all()
    assert (codes_of(quantise_rows(-x, SMALL)) == 0xFE).all()
    above = (x.float() * (torch.full((128, 1), 448.0) / amax.float()[:, None])) > 448
    assert above.any()
    # The cast alone would have made NaN of what lies beyond 464: the reason for the clamp, should scales ever be given.
    assert codes_of(Quantised(blockwise._codes(torch.tensor([[460.0, 465.0, -1e30]])), amax)).tolist() == [
        [126, 126, 254]
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantise", [quantise_weight, quantise_rows])
def test_a_block_of_zeros_is_zeros_and_never_nan(kind: str, quantise) -> None:
    x = torch.zeros(40, 70).bfloat16()
    x[1, 1] = -0.0
    x[35, 65] = 3.0
    found = quantise(x, Format((32, 32), kind))
    assert codes_of(found)[1, 1] == 0x80
    assert found.scale_inv.isfinite().all()
    assert (found.scale_inv > 0).all()
    assert found.scale_inv.flatten()[0] == 1
    values = dequantise(found, SMALL)
    assert torch.equal(values, x.float())
    assert values[1, 1].signbit()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_no_number_stays_visible_and_in_its_block(bad: float, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 64).to(dtype)
    clean = quantise_weight(x, Format((32, 32), kind))
    x[3, 40] = bad
    found = quantise_weight(x, Format((32, 32), kind))
    assert codes_of(found)[3, 40] == 0x7F
    assert found.scale_inv[0, 1] == 1
    values = dequantise(found, SMALL)
    assert values.isnan().nonzero().tolist() == [[3, 40]]
    others = torch.ones(64, 64, dtype=torch.bool)
    others[:32, 32:] = False
    assert torch.equal(codes_of(found)[others], codes_of(clean)[others])
    rows = quantise_rows(x, Format((32, 32), kind))
    assert dequantise(rows, SMALL).isnan().nonzero().tolist() == [[3, 40]]
    for whole in (per_tensor(x), per_channel(x)):
        assert dequantise(whole, SMALL).isnan().nonzero().tolist() == [[3, 40]]
        assert codes_of(whole)[3, 40] == 0x7F


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_would_be_infinite(kind: str) -> None:
    for dtype, bits in ((torch.bfloat16, 0x7F7F0000), (torch.float32, 0x7F7FFFFF)):
        x = torch.full((1, 32), 2.0**-126).to(dtype) * 2.0**-6  # subnormal in both: 448 / amax overflows
        assert x[0, 0] != 0
        found = quantise_weight(x, Format((32, 32), kind))
        largest = np.array(bits & (0xFF800000 if kind == "power_of_two" else 0xFFFFFFFF), np.uint32).view(np.float32)
        assert found.scale_inv.item() == np.float32(1) / largest
        # 2**-132 * 2**128: about 2**-4, and back
        assert dequantise(found, SMALL)[0, 0] == pytest.approx(2.0**-132, rel=0.01)


@given(st.integers(0, 2**32), st.sampled_from(KINDS))
def test_strides_do_not_matter(seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(80, 3, 70, generator=generator).bfloat16()
    format = Format((32, 32), kind)
    for view in (whole[:, 1], whole[:, 0].T, whole[::2, 2, ::3], whole[:, 1].chunk(2)[1], whole.permute(1, 2, 0)):
        assert not view.is_contiguous() or view.storage_offset()
        for quantise in (quantise_weight, quantise_rows):
            assert same(quantise(view, format), quantise(view.contiguous(), format))


def test_batches_are_quantised_one_by_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 50)
    for quantise in (quantise_weight, quantise_rows):
        found = quantise(x, SMALL)
        each = [[quantise(matrix, SMALL) for matrix in part] for part in x]
        codes = torch.stack([torch.stack([codes_of(one) for one in part]) for part in each])
        assert torch.equal(codes_of(found), codes)
        assert torch.equal(
            found.scale_inv, torch.stack([torch.stack([one.scale_inv for one in part]) for part in each])
        )
        assert torch.equal(dequantise(found, SMALL)[1, 2], dequantise(each[1][2], SMALL))


def test_nothing_to_quantise() -> None:
    for quantise, scales in ((quantise_weight, (0, 2)), (quantise_rows, (0, 2))):
        found = quantise(torch.ones(0, 64).bfloat16(), SMALL)
        assert found.codes.shape == (0, 64)
        assert found.scale_inv.shape == scales
        assert dequantise(found, SMALL).shape == (0, 64)


# -- shards -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.sampled_from(KINDS), st.sampled_from([1, 2, 4]))
def test_aligned_shards_are_quantised_as_in_the_whole(seed: int, kind: str, ranks: int) -> None:
    """Row and column parallel, experts, and gate and up that a rank has one after the other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(256, 128, generator=generator).bfloat16()
    format = Format((32, 32), kind)
    whole = quantise_weight(weight, format)
    for axis in (0, 1):
        shards = [quantise_weight(shard, format) for shard in weight.chunk(ranks, axis)]
        codes = torch.cat([codes_of(shard) for shard in shards], axis)
        assert same(Quantised(codes.view(torch.float8_e4m3fn), torch.cat([s.scale_inv for s in shards], axis)), whole)
    # Each rank has [gate; up] of its own rows: the codes go apart and together again as the weights do.
    gate, up = weight.chunk(2)
    ranks_have = [torch.cat(parts) for parts in zip(gate.chunk(ranks), up.chunk(ranks), strict=True)]
    quantised = [quantise_weight(each, format) for each in ranks_have]
    for place, part in enumerate((gate, up)):
        codes = torch.cat([codes_of(each).chunk(2)[place] for each in quantised])
        scales = torch.cat([each.scale_inv.chunk(2)[place] for each in quantised])
        assert same(Quantised(codes.view(torch.float8_e4m3fn), scales), quantise_weight(part, format))


def test_shards_that_cut_a_block_are_other_weights() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64).bfloat16()
    whole = quantise_weight(weight, SMALL)
    cut = [quantise_weight(shard, SMALL) for shard in weight.chunk(2)]  # 48 rows: one block and a half
    codes = torch.cat([codes_of(shard) for shard in cut])
    assert (codes != codes_of(whole)).any()
    assert len(torch.cat([shard.scale_inv for shard in cut])) != len(whole.scale_inv)


# -- one scale for all ------------------------------------------------------------------------------------------------


@given(tensors())
def test_per_tensor_and_per_channel(x: torch.Tensor) -> None:
    largest = torch.finfo(x.dtype).max
    found = per_tensor(x)
    codes, inverses = transformer_engine(x.float().numpy(), x.shape, "float32", largest)
    assert found.scale_inv.shape == (1,)
    assert np.array_equal(codes_of(found).numpy(), codes)
    assert found.scale_inv.numpy().view(np.int32) == inverses.view(np.int32)
    assert torch.equal(dequantise(found, Format()), found.codes.float() * found.scale_inv)
    found = per_channel(x)
    codes, inverses = transformer_engine(x.float().numpy(), (1, x.shape[1]), "float32", largest)
    assert found.scale_inv.shape == (len(x), 1)
    assert np.array_equal(codes_of(found).numpy(), codes)
    assert np.array_equal(found.scale_inv.numpy().view(np.int32), inverses.view(np.int32))
    assert torch.equal(dequantise(found, Format()), found.codes.float() * found.scale_inv)


def test_slimes_per_tensor_division_is_in_bfloat16() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(512, 512) * 0.02).bfloat16()
    scale = weight.abs().max().float() / 448
    slimes = weight / scale  # no dimensions: bfloat16 stays
    assert slimes.dtype == torch.bfloat16
    codes = slimes.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    differs = (codes != codes_of(per_tensor(weight))).float().mean().item()
    assert 0.005 < differs < 0.1


# -- formulas that are near -------------------------------------------------------------------------------------------


def divided(tiles: np.ndarray, amax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`tools/convert_hf_to_fp8.py`: x / (amax / 448)."""
    scale = amax / np.float32(448)
    return tiles / scale, scale


def by_reciprocal(tiles: np.ndarray, amax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """slime's sync kernel, were its divisions exact: x * (1 / (amax / 448))."""
    scale = np.maximum(amax, np.float32(1e-10)) / np.float32(448)
    return tiles * (np.float32(1) / scale), scale


@pytest.mark.parametrize(
    ("formula", "low", "high"), [(divided, 1e-5, 2e-4), (by_reciprocal, 1e-4, 5e-4)], ids=["converter", "sync"]
)
def test_the_formulas_in_use_are_other_bits(formula, low: float, high: float) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(2048, 2048) * 0.02).bfloat16()
    found = quantise_weight(weight, Format())
    tiles = weight.float().unflatten(0, (16, 128)).unflatten(2, (16, 128)).numpy()
    amax = np.abs(tiles).max(axis=(1, 3), keepdims=True)
    scaled, scale = formula(tiles, amax)
    codes = torch.from_numpy(np.clip(scaled, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).reshape(2048, 2048)
    code_share = (codes != codes_of(found)).float().mean().item()
    scale_share = (scale.reshape(16, 16) != found.scale_inv.numpy()).mean()
    print(f"{formula.__name__}: {code_share:.4%} of the codes, {scale_share:.0%} of the scales")
    assert low < code_share < high
    assert 0.25 < scale_share < 0.5


def test_a_reciprocal_one_ulp_off_flips_ties() -> None:
    """Blocks with amax 1.75 * 2^k: their scale is a power of two, and their bfloat16 weights lie between two codes."""
    torch.manual_seed(0)
    weight = (torch.randn(128, 1024).clamp(-3, 3) * 0.02).bfloat16()
    weight[0, ::128] = 1.75 * 2.0**-4
    found = quantise_weight(weight, Format())
    assert (found.scale_inv == 2.0**-12).all()  # 448 / (1.75 * 2^-4) = 2^12, exactly
    scale = np.nextafter(np.float32(2.0**12), np.float32(0))
    codes = torch.from_numpy(weight.float().numpy() * scale).to(torch.float8_e4m3fn).view(torch.uint8)
    share = (codes != codes_of(found)).float().mean().item()
    print(f"tie blocks, a reciprocal that is one ulp off: {share:.2%} of the codes")
    assert 0.01 < share < 0.06


# -- power-of-two scales ----------------------------------------------------------------------------------------------


def test_which_scales_ue8m0_can_hold() -> None:
    powers = torch.tensor([2.0**exponent for exponent in range(-127, 128)], dtype=torch.float64).float()
    assert is_power_of_two(powers)
    for bad in (3.0, 0.0, -1.0, 2.0**-128, float("inf"), float("nan"), np.nextafter(np.float32(1), np.float32(2))):
        assert not is_power_of_two(torch.tensor([1.0, float(bad)])), bad


@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 2, 127, 128, 129, 130, 257, 384]),
    st.integers(1, 9),
    st.sampled_from([(), (1,), (2, 3)]),
)
def test_packed_exponents(seed: int, rows: int, columns: int, batch: tuple[int, ...]) -> None:
    """Against DeepGEMM's layout, byte by byte: where each exponent lies in memory, and what the padding is."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-rows // 128)
    exponents = torch.randint(-127, 128, (*batch, blocks, columns), generator=generator)
    scale_inv = torch.pow(torch.tensor(2.0, dtype=torch.float64), exponents).float()
    packed = pack_ue8m0(scale_inv, rows)
    words, column = -(-columns // 4), -(-rows // 4) * 4
    assert packed.dtype == torch.int32
    assert packed.shape == (*batch, rows, words)
    assert packed.stride()[-2:] == (1, column)
    assert packed.data_ptr() % 16 == 0
    assert torch.equal(unpack_ue8m0(packed, columns).view(torch.int32), scale_inv.view(torch.int32))
    memory = packed.flatten(0, -3) if batch else packed[None]
    wanted = exponents.flatten(0, -3) if batch else exponents[None]
    raw = memory.as_strided((len(memory), words, column), (words * column, column, 1)).contiguous().numpy()
    in_bytes = raw.view(np.uint8).reshape(len(memory), words, column, 4)
    for row in range(column):
        for block in range(words * 4):
            expected = wanted[:, row // 128, block] + 127 if row < rows and block < columns else np.zeros(len(memory))
            assert np.array_equal(in_bytes[:, block // 4, row, block % 4], np.asarray(expected))


def test_scales_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(PluginError, match="cannot be packed as UE8M0"):
        pack_ue8m0(torch.tensor([[1.0, 3.0]]), 128)
    with pytest.raises(PluginError, match="do not belong") as error:
        pack_ue8m0(torch.ones(2, 2), 128)
    assert error.value.facts["expected rows of scales"] == 1


@given(st.integers(0, 2**32), st.sampled_from(["normal", "outliers", "scaled"]))
def test_powers_of_two_are_requantised_without_loss(seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(70, 64, generator=generator)
    if kind == "outliers":
        weight *= 10 ** torch.randn(70, 64, generator=generator)
    elif kind == "scaled":
        weight *= 2.0 ** torch.randint(-60, 60, (70, 1), generator=generator)
    once = quantise_weight(weight.bfloat16(), Format((32, 32), "power_of_two"))
    again = requantise_power_of_two(once, SMALL)
    assert again.changed == 0
    assert torch.equal(dequantise(again.quantised, SMALL), dequantise(once, SMALL))
    assert is_power_of_two(again.quantised.scale_inv)


def test_a_requantised_block_may_move_between_code_and_scale() -> None:
    """Half of what a block of power-of-two scale can hold rounds down to 224: code and scale change, no value does."""
    weight = torch.full((32, 32), 228.0).bfloat16()  # scale 1, code 224 (a tie to even)
    once = quantise_weight(weight, Format((32, 32), "power_of_two"))
    assert once.scale_inv.item() == 1
    again = requantise_power_of_two(once, SMALL)
    assert again.changed == 0
    assert again.quantised.scale_inv.item() == 0.5
    assert (codes_of(again.quantised) != codes_of(once)).all()


def test_float32_scales_are_requantised_with_a_loss_that_is_told() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(256, 256) * 0.02).bfloat16()
    once = quantise_weight(weight, Format())
    again = requantise_power_of_two(once, Format())
    before, after = dequantise(once, Format()), dequantise(again.quantised, Format())
    assert again.changed == int((before != after).sum())
    assert again.changed > 0.1 * weight.numel()
    # A second quantisation adds to the first one's error; weights that go straight to such scales do not have it.
    straight = dequantise(quantise_weight(weight, Format(scale="power_of_two")), Format())
    error = [(values - weight.float()).square().mean().sqrt() for values in (straight, after)]
    assert error[1] > 1.1 * error[0]


# -- values -----------------------------------------------------------------------------------------------------------


@given(tensors(), st.sampled_from(KINDS))
def test_values_are_near_and_quantise_to_themselves(x: torch.Tensor, kind: str) -> None:
    x = x.clamp(-(2.0**127), 2.0**127)  # above it, code and scale can multiply to infinity
    format = Format((32, 32), kind)
    for quantise, fake in ((quantise_weight, fake_quantise_weight), (quantise_rows, fake_quantise_rows)):
        found = quantise(x, format)
        values = dequantise(found, format)
        assert fake(x, format).dtype == torch.bfloat16
        assert torch.equal(fake(x, format), values.bfloat16())
        # Half a step of the mantissa, or of the smallest code where the number is smaller than 2**-6 of the scale.
        tolerance = x.double().abs() / 16 * 1.0001
        step = dequantise(Quantised(torch.ones_like(found.codes, dtype=torch.float32), found.scale_inv), format)
        assert ((values.double() - x.double()).abs() <= torch.maximum(tolerance, step.double() * 2.0**-10 * 1.01)).all()


def test_weights_from_bfloat16_quantise_to_themselves() -> None:
    """So a converted checkpoint, or an engine's values in bfloat16, give the codes and scales back."""
    torch.manual_seed(0)
    weight = (torch.randn(512, 512) * 0.02).bfloat16()
    for kind in KINDS:
        format = Format(scale=kind)
        once = quantise_weight(weight, format)
        again = quantise_weight(fake_quantise_weight(weight, format), format)
        assert torch.equal(dequantise(again, format), dequantise(once, format))
        if kind == "float32":
            assert same(again, once)


def test_scales_of_another_block_are_refused() -> None:
    found = quantise_weight(torch.ones(256, 256), Format())
    with pytest.raises(PluginError, match="do not belong") as error:
        dequantise(found, (64, 64))
    assert error.value.facts["expected"] == "one for each block, [4, 4], or each row"


@pytest.mark.parametrize("block", [(0, 128), (128, 48), (128,), (128, 256), (128.0, 128), (True, 128)])
def test_unsupported_blocks_are_refused(block) -> None:
    with pytest.raises(PluginError, match="block size is not supported"):
        Format(block)


def test_unsupported_scales_and_tensors_are_refused() -> None:
    with pytest.raises(PluginError, match="kind of scale"):
        Format(scale="ue8m0")  # type: ignore[arg-type]
    for tensor in (torch.ones(4), torch.ones(4, 4).half(), torch.ones(4, 4).long()):
        with pytest.raises(PluginError, match="cannot be quantised to FP8"):
            quantise_weight(tensor, Format())


# -- the buffer that is sent ------------------------------------------------------------------------------------------


shapes = st.lists(
    st.one_of(st.tuples(*[st.integers(0, 70)] * 2), st.tuples(*[st.integers(0, 3), *[st.integers(1, 40)] * 2])),
    max_size=6,
)


@given(shapes, st.integers(0, 2**32), st.sampled_from(KINDS))
def test_a_bucket_holds_what_was_put_in(sizes: list[tuple[int, ...]], seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    format = Format((32, 64), kind)
    weights = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    layout = plan({f"layers.{i}.weight": size for i, size in enumerate(sizes)}, format)
    end = 0
    for entry in layout.entries:
        assert entry.offset % ALIGNMENT == 0
        assert entry.offset >= end
        end = entry.offset + entry.size
    assert end <= layout.size
    assert layout.size % ALIGNMENT == 0
    assert [entry.name for entry in layout.entries] == [
        f"layers.{i}.{name}" for i in range(len(sizes)) for name in ("weight", "weight_scale_inv")
    ]
    first, second = torch.full((layout.size,), 170, dtype=torch.uint8), torch.zeros(layout.size + 9, dtype=torch.uint8)
    quantise_into(weights, first, layout, format)
    quantise_into(weights, second, layout, format)
    assert torch.equal(first, second[: layout.size])  # a second update of the same weights changes no byte
    for weight, view, alone in zip(weights, layout.views(first), quantise_weights(weights, format), strict=True):
        assert view.codes.is_contiguous()
        assert view.scale_inv.is_contiguous()
        assert view.scale_inv.data_ptr() % 16 == first.data_ptr() % 16 == 0
        assert same(view, quantise_weight(weight, format))
        assert same(alone, view)
    used = torch.zeros(layout.size, dtype=torch.bool)
    for entry in layout.entries:
        assert not used[entry.offset : entry.offset + entry.size].any()
        used[entry.offset : entry.offset + entry.size] = True
    assert (first[~used] == 0).all()


@given(st.lists(st.sampled_from([(64, 32), (32, 64), (96, 32), (2, 32, 32), (0, 32)]), max_size=5), st.integers(1, 9))
def test_views_lie_where_the_layout_says(sizes: list[tuple[int, ...]], experts: int) -> None:
    """Those of equal shapes at equal distances are made by one call."""
    layout = plan([*sizes * experts, (32, 32), *sizes * experts], SMALL)
    bucket = torch.zeros(layout.size + 256, dtype=torch.uint8)[128:]
    parts = [part for view in layout.views(bucket) for part in view]
    assert len(parts) == len(layout.entries)
    for part, entry in zip(parts, layout.entries, strict=True):
        assert (part.shape, str(part.dtype)) == (entry.shape, f"torch.{entry.dtype}")
        assert part.is_contiguous()
        assert part.data_ptr() - bucket.data_ptr() == entry.offset or not entry.size


def test_results_are_views_of_one_buffer() -> None:
    found = quantise_weights([torch.ones(33, 33), torch.ones(3, 5)], SMALL)
    assert len({part.untyped_storage().data_ptr() for each in found for part in each}) == 1
    assert quantise_weights([], SMALL) == []


def test_buffers_that_do_not_fit_are_refused() -> None:
    layout = plan([(32, 32)], SMALL)
    whole = torch.zeros(layout.size + 16, dtype=torch.uint8)
    layout.views(whole[16:])
    for bad in (whole[: layout.size - 1], whole[1:], whole.view(torch.int8), whole[None]):
        with pytest.raises(PluginError, match="cannot hold"):
            layout.views(bad)
    with pytest.raises(PluginError, match="cannot be quantised"):
        plan({"norm.weight": (32,)}, SMALL)
