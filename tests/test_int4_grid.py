"""The INT4 grid: its reference, and the kernels that must equal it bit for bit (here in Triton's interpreter)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import PluginError
from miles_plugins.int4_qat.grid import (
    SEVENTH,
    Grid,
    Quantised,
    dequantise,
    fake_quantise,
    pack,
    quantise,
    unpack,
)

torch = pytest.importorskip("torch")

KINDS = ("stock", "snapped")
SIZES = (32, 64, 128)
grids = st.builds(Grid, st.sampled_from(SIZES), st.sampled_from(KINDS))


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.int16).flatten().tolist()


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """[4, 128] bfloat16: any finite bits, ties, tiny and huge groups, zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "bits", "ties", "tiny", "zeros"]))
    if kind == "bits":
        words = torch.randint(-(2**15), 2**15, (4, 128), generator=generator, dtype=torch.int32).to(torch.int16)
        found = words.view(torch.bfloat16)
        # Beyond, seven rounded steps are no bfloat16 any more.
        return torch.where(found.abs() < 2.0**127, found, torch.ones_like(found))
    found = torch.randn(4, 128, generator=generator)
    if kind == "ties":  # halves of the largest: 3.5 steps, and their neighbours
        found = torch.randint(-14, 15, (4, 128), generator=generator) / 14
    elif kind == "tiny":
        found = found * 2.0 ** draw(st.integers(-133, -14))
    elif kind == "zeros":
        found = found * (torch.rand(4, 128, generator=generator) < 0.1)
    return found.bfloat16()


@settings(deadline=None)
@given(weights(), grids)
def test_every_code_is_the_nearest(weight: torch.Tensor, grid: Grid) -> None:
    """Judged in float64, apart from exact ties of the float32 quotient."""
    found = quantise(weight, grid)
    assert found.codes.shape == weight.shape
    assert found.scale.shape == (4, 128 // grid.group_size)
    assert found.codes.abs().max() <= 7
    groups = weight.double().unflatten(-1, (-1, grid.group_size))
    scale = groups.float().abs().amax(-1) * torch.tensor(SEVENTH)
    floor = 1e-5 if grid.kind == "stock" else 2.0**-96
    scale = scale.clamp(min=floor)
    assert bits(found.scale) == bits(scale.bfloat16())
    divisor = scale if grid.kind == "stock" else scale.bfloat16().float()
    steps = groups / divisor.double().unsqueeze(-1)
    distance = (found.codes.unflatten(-1, (-1, grid.group_size)).double() - steps.clamp(-7, 7)).abs()
    assert distance.max() <= 0.5 + 1e-6


@settings(deadline=None)
@given(weights(), grids)
def test_packing_loses_nothing(weight: torch.Tensor, grid: Grid) -> None:
    found = quantise(weight, grid)
    packed = pack(found.codes)
    assert packed.dtype == torch.int32
    assert packed.shape == (4, 16)
    assert torch.equal(unpack(packed), found.codes)
    for place in (0, 7):  # the first code lies in the lowest four bits
        nibbles = packed >> (4 * place) & 15
        assert torch.equal(nibbles, found.codes[:, place::8].int() + 8)
    assert bits(dequantise(Quantised(unpack(packed), found.scale))) == bits(fake_quantise(weight, grid))


@settings(deadline=None)
@given(weights(), grids)
def test_what_is_on_the_grid_stays(weight: torch.Tensor, grid: Grid) -> None:
    once = fake_quantise(weight, grid)
    first, second = quantise(weight, grid), quantise(once, grid)
    assert bits(fake_quantise(once, grid)) == bits(once)
    whole = first.codes.unflatten(-1, (-1, grid.group_size)).ne(0).any(-1)  # a group of zeros has the smallest scale
    assert torch.equal(first.scale[whole], second.scale[whole])
    assert torch.equal(first.codes, second.codes)


def test_all_codes_and_their_values() -> None:
    scale = 0.25
    weight = torch.tensor([[code * scale for code in range(-7, 8)] + [0.0] * 17]).bfloat16()
    for kind in KINDS:
        found = quantise(weight, Grid(32, kind))
        assert found.scale.tolist() == [[scale]]
        assert found.codes[0, :15].tolist() == list(range(-7, 8))
        assert torch.equal(fake_quantise(weight, Grid(32, kind)), weight)


def test_ties_go_to_even_and_zeros_are_positive() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([7.0, 0.5, 1.5, -2.5, -0.0, -0.25])
    found = quantise(weight.bfloat16(), Grid(32))
    assert found.codes[0, :6].tolist() == [7, 0, 2, -2, 0, 0]
    assert bits(fake_quantise(weight.bfloat16(), Grid(32)))[4:6] == [0, 0]


@settings(deadline=None)
@given(st.integers(-60, 60), st.sampled_from(KINDS), st.sampled_from(SIZES))
def test_beside_a_tie_the_nearer_code_is_taken(exponent: int, kind: str, size: int) -> None:
    """Halves of a step, and the bfloat16 numbers just below and above: an ulp decides."""
    if kind == "stock" and exponent < -14:
        exponent = -14  # smaller steps are the smallest there
    step = 2.0**exponent  # 7 steps times float32(1/7) are exactly this
    halves = torch.arange(7) + 0.5
    ties = torch.cat([halves, -halves]).mul(step).bfloat16()
    nearest = {  # the sign is the highest bit: one more in the word is one ulp away from zero
        0: 2 * (halves / 2).round(),
        1: halves + 0.5,
        -1: halves - 0.5,
    }
    for ulp, codes in nearest.items():
        weight = torch.zeros(1, size).bfloat16()
        weight[0, :14] = (ties.view(torch.int16) + ulp).view(torch.bfloat16)
        weight[0, 14] = 7 * step
        found = quantise(weight, Grid(size, kind))
        assert found.scale[0, 0] == step
        assert found.codes[0, :14].tolist() == [*codes.int().tolist(), *(-codes).int().tolist()], ulp


def test_all_sixteen_codes_are_unpacked() -> None:
    """Other tools' checkpoints have -8 as well, which the engine's kernel takes for what it is."""
    every = list(range(-8, 8))
    words = torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32], [0xFEDCBA98 - 2**32, 0x00000000]], dtype=torch.int32)
    found = unpack(words)
    assert found.dtype == torch.int8
    assert found.tolist() == [every, [*range(8), *[-8] * 8]]
    assert torch.equal(pack(found), words)
    scale = torch.tensor([[0.75, 2.0], [1.0, 3.0]]).bfloat16()
    values = dequantise(Quantised(found, scale))
    assert values.tolist() == [
        [0.75 * code for code in every[:8]] + [2.0 * code for code in every[8:]],
        [*map(float, range(8)), *[-24.0] * 8],
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_no_number_spoils_its_group_and_no_other(bad: float, kind: str) -> None:
    weight = torch.ones(1, 64)
    weight[0, 3] = bad
    values = fake_quantise(weight.bfloat16(), Grid(32, kind))
    assert values[0, :32].isnan().all()
    assert torch.equal(values[0, 32:], torch.ones(32).bfloat16())


def test_a_shard_of_whole_groups_is_quantised_as_in_the_whole() -> None:
    weight = torch.randn(64, 256).bfloat16()
    grid = Grid(64)
    whole = fake_quantise(weight, grid)
    assert torch.equal(torch.cat([fake_quantise(shard, grid) for shard in weight.chunk(4, 0)]), whole)
    assert torch.equal(torch.cat([fake_quantise(shard, grid) for shard in weight.chunk(4, 1)], 1), whole)


def test_a_shard_that_cuts_a_group_is_refused() -> None:
    with pytest.raises(PluginError, match="cannot be quantised in groups of 128") as error:
        quantise(torch.ones(4, 192), Grid(128))
    assert error.value.facts["K"] == 192
    with pytest.raises(PluginError, match="cannot be packed"):
        Grid(12)


def test_slimes_own_formula_differs_where_ours_does_not() -> None:
    """slime's trainer multiplies with the float32 scale, its packer stores the bfloat16 one."""
    torch.manual_seed(0)
    weight = (torch.randn(1024, 1024) * 0.02).bfloat16()
    for size, low, high in ((32, 0.06, 0.08), (128, 0.05, 0.065)):
        grid = Grid(size)
        codes, rounded = quantise(weight, grid)
        groups = weight.float().unflatten(-1, (-1, size))
        scale = (groups.abs().amax(-1) * torch.tensor(SEVENTH)).clamp(min=1e-5)
        slimes = (codes.unflatten(-1, (-1, size)).float() * scale.unsqueeze(-1)).bfloat16().flatten(-2)
        received = dequantise(Quantised(unpack(pack(codes)), rounded))
        assert low < (slimes != received).float().mean() < high
        assert torch.equal(fake_quantise(weight, grid), received)


# -- the kernels -----------------------------------------------------------------------------------------------------


def test_the_kernels_equal_the_reference() -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = {**os.environ, **({} if device == "cuda" else {"TRITON_INTERPRET": "1"})}
    command = [sys.executable, "-m", "tests.int4_kernels", device]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"96 weights equal on {device}\n" or device == "cuda"
