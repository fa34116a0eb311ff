"""MXFP8 and NVFP4 against exact fractions and an enumeration of their codes. No kernel has them, no GPU was used."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import PluginError
from miles_plugins.fp8_unified.microscaling import (
    E2M1,
    dequantise_mxfp8,
    dequantise_nvfp4,
    quantise_mxfp8,
    quantise_nvfp4,
)

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

settings.register_profile("microscaling", deadline=None)
settings.load_profile("microscaling")


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """[5, 64] bfloat16 or float32: normal, of any scale, sparse."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    found = torch.randn(5, 64, generator=generator) * 2.0 ** draw(st.integers(-110, 100))
    if draw(st.booleans()):
        found *= torch.rand(5, 64, generator=generator) < 0.05
    return found.to(draw(st.sampled_from([torch.bfloat16, torch.float32])))


@given(tensors())
def test_mxfp8_scales_are_the_next_power_of_two(x: torch.Tensor) -> None:
    found = quantise_mxfp8(x)
    assert (found.codes.dtype, found.codes.shape) == (torch.float8_e4m3fn, (5, 64))
    assert (found.scale.dtype, found.scale.shape) == (torch.uint8, (5, 2))
    amax = x.float().view(5, 2, 32).abs().amax(-1)
    for row in range(5):
        for block in range(2):
            # As TransformerEngine does: the product in float32, and then up.
            wanted = Fraction(float(np.float32(amax[row, block].item()) * np.float32(1 / 448)))
            expected = 0
            while expected < 254 and Fraction(2) ** (expected - 127) < wanted:
                expected += 1
            assert found.scale[row, block] == expected
    values = dequantise_mxfp8(found)
    # Half a step of three bits of mantissa, and of the smallest code; the largest may round to what saturates.
    step = (2.0 ** (found.scale.double() - 137)).repeat_interleave(32, 1)
    room = torch.maximum(x.double().abs() / 16, step) * 1.0001
    assert ((values.double() - x.double()).abs() <= room).all()


def test_mxfp8_scales_at_their_edges() -> None:
    """Exactly 448 keeps the scale 1; one bit more doubles it. Zeros, and what is too small, have the scale 0."""
    x = torch.zeros(6, 32)
    x[0, 0], x[1, 0], x[2, 0] = 448.0, 450.0, 224.0
    x[4, 0], x[5, 0] = 2.0**-140, 2.0**-117
    found = quantise_mxfp8(x)
    assert found.scale[:, 0].tolist() == [127, 128, 126, 0, 0, 2]  # 2^-117 / 448 is between 2^-126 and 2^-125
    values = dequantise_mxfp8(found)
    assert values[:, 0].tolist() == [448.0, 448.0, 224.0, 0.0, 0.0, 2.0**-117]
    assert torch.equal(quantise_mxfp8(-x).codes.float(), -found.codes.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_spoils_its_mxfp8_block_and_no_other(bad: float) -> None:
    x = torch.ones(2, 64).bfloat16()
    x[0, 40] = bad
    found = quantise_mxfp8(x)
    assert found.scale.tolist() == [[119, 255], [119, 119]]
    values = dequantise_mxfp8(found)
    assert values[0, 32:].isnan().all()
    assert torch.equal(values[0, :32], torch.ones(32))
    assert torch.equal(values[1], torch.ones(64))


def code_of(x: Fraction) -> int:
    """The nearest E2M1 code of a positive number, the even one of two; by trying all."""
    distances = [(abs(Fraction(value) - x), code % 2, code) for code, value in enumerate(E2M1)]
    return min(distances)[2]


def test_every_e2m1_code_and_tie() -> None:
    """A tensor whose largest is 6 * 448 has the scales 1: its codes are those of its numbers, of middles and near."""
    middles = [(low + high) / 2 for low, high in itertools.pairwise(E2M1)]
    near = [float(np.nextafter(np.float32(value), np.float32(way))) for value in middles for way in (0, 9)]
    signed = [sign * value for value in (*E2M1, *middles, *near) for sign in (1.0, -1.0)]
    blocks = torch.nn.functional.pad(torch.tensor(signed), (0, -len(signed) % 15)).view(-1, 15)
    blocks = torch.nn.functional.pad(blocks, (0, 1), value=6.0)  # every block's largest
    whole = torch.cat([blocks, torch.full((1, 16), 6.0 * 448)])
    (found,) = quantise_nvfp4([whole])
    assert found.scale_2 == 1
    assert found.scale[:, 0].tolist() == [1.0] * len(blocks) + [448.0]
    codes = torch.stack([found.packed & 15, found.packed >> 4], -1).flatten(-2)
    for row, expected in zip(codes[:-1].tolist(), blocks.tolist(), strict=True):
        for code, value in zip(row, expected, strict=True):
            assert code == code_of(Fraction(abs(value))) + 8 * (math.copysign(1, value) < 0), value
    assert set(codes.flatten().tolist()) == set(range(16))
    # Two codes a byte, the first in the low half.
    assert found.packed[0, 0] == codes[0, 0] | codes[0, 1] << 4
    values = dequantise_nvfp4(found)
    assert values[-1].tolist() == [2688.0] * 16
    exact = torch.isin(blocks.abs(), torch.tensor(E2M1))
    assert torch.equal(values[:-1][exact], blocks[exact])


@given(tensors())
def test_nvfp4_is_its_rule(x: torch.Tensor) -> None:
    (found,) = quantise_nvfp4([x])
    assert (found.packed.dtype, found.packed.shape) == (torch.uint8, (5, 32))
    assert (found.scale.dtype, found.scale.shape) == (torch.float8_e4m3fn, (5, 4))
    assert (found.scale_2.dtype, found.scale_2.shape) == (torch.float32, ())
    numbers = x.float().numpy()
    amax = np.abs(numbers).max()
    with np.errstate(over="ignore", divide="ignore"):
        encode = np.float32(1) if amax == 0 else min(np.float32(2688) / amax, np.finfo(np.float32).max)
        scale_2 = np.float32(1) / encode
        assert found.scale_2.numpy() == scale_2
        blocks = numbers.reshape(5, 4, 16)
        wanted = np.abs(blocks).max(-1) * (encode * np.float32(1 / 6))
        scale = found.scale.float().numpy()
        # The nearest of all E4M3 numbers, by trying all.
        every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy().astype(np.float64)
        nearest = np.abs(every[None, None] - wanted[..., None].astype(np.float64)).min(-1)
        assert np.array_equal(np.abs(scale.astype(np.float64) - wanted), nearest)
        factor = np.minimum(np.float32(1) / (scale * scale_2), np.finfo(np.float32).max)
        scaled = blocks * factor[..., None]
    codes = torch.stack([found.packed & 15, found.packed >> 4], -1).flatten(-2).view(5, 4, 16)
    for place, value in np.ndenumerate(scaled):
        assert codes[place] == code_of(Fraction(float(abs(value)))) + 8 * bool(np.signbit(value))
    values = np.array([*E2M1, *(-value for value in E2M1)], np.float32)[codes.numpy()] * scale[..., None] * scale_2
    assert np.array_equal(dequantise_nvfp4(found).numpy().view(np.int32), values.reshape(5, 64).view(np.int32))


def test_gate_and_up_share_the_scale_of_the_second_level() -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(32, 64).bfloat16(), torch.randn(32, 64).bfloat16() * 7
    pair = quantise_nvfp4([gate, up])
    (whole,) = quantise_nvfp4([torch.cat([gate, up])])
    assert pair[0].scale_2 == pair[1].scale_2 == whole.scale_2
    assert torch.equal(torch.cat([each.packed for each in pair]), whole.packed)
    assert torch.equal(
        torch.cat([each.scale.view(torch.uint8) for each in pair]),
        whole.scale.view(torch.uint8),
    )
    (alone,) = quantise_nvfp4([gate])
    assert alone.scale_2 < pair[0].scale_2
    assert not torch.equal(alone.packed, pair[0].packed)
    error = (dequantise_nvfp4(pair[1]) - up.float()).square().mean().sqrt() / up.float().square().mean().sqrt()
    assert 0.05 < error < 0.12


def test_nvfp4_zeros_and_what_is_no_number() -> None:
    (found,) = quantise_nvfp4([torch.zeros(2, 32)])
    assert found.scale_2 == 1
    assert torch.equal(dequantise_nvfp4(found), torch.zeros(2, 32))
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 32)
        x[1, 1] = bad
        clean, spoilt = quantise_nvfp4([torch.ones(2, 32), x])
        assert dequantise_nvfp4(spoilt).isnan().all()
        assert dequantise_nvfp4(clean).isnan().all()  # they share what is no number


def test_widths_that_have_no_whole_blocks_are_refused() -> None:
    with pytest.raises(PluginError, match="cannot be quantised to MXFP8"):
        quantise_mxfp8(torch.ones(2, 48))
    with pytest.raises(PluginError, match="cannot be quantised to NVFP4"):
        quantise_nvfp4([torch.ones(2, 24)])
