"""The recorded routing of a sample: what is refused, what is kept, and where each token's row ends up."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins.errors import PluginError
from miles_plugins.r3_replay.trace import compact, lay_out, moe_layers

torch = pytest.importorskip("torch")

LAYERS, TOPK, EXPERTS = 4, 2, 8


def routing(tokens: int = 5, layers: int = LAYERS, topk: int = TOPK, experts: int = EXPERTS, seed: int = 0):
    """[tokens - 1, layers, topk] int32, different experts in a row."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens - 1, layers, experts, generator=generator)
    return scores.topk(topk, dim=-1).indices.to(torch.int32)


def check(routed_experts, tokens=5, layers=range(LAYERS), topk=TOPK, experts=EXPERTS):
    return compact(routed_experts, tokens, list(layers), topk, experts, "sample 7")


# -- which layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "frequency", "expected"),
    [
        (4, 1, [0, 1, 2, 3]),
        (5, 2, [0, 2, 4]),
        (4, 4, [0]),
        (4, [0, 1, 1, 0], [1, 2]),
        (3, [0, 0, 0], []),
        (4, [1] * 4, [0, 1, 2, 3]),
    ],
)
def test_moe_layers(layers, frequency, expected):
    assert moe_layers(layers, frequency) == expected


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_a_good_routing_is_kept_as_it_is():
    original = routing()
    kept = check(original)
    assert kept.tolist() == original.tolist()
    assert kept.is_contiguous()


def test_dense_layers_are_dropped():
    original = routing()
    original[:, 0] = -1  # what a dense layer records is not looked at
    original[:, 3] = 0
    assert check(original, layers=[1, 2]).tolist() == original[:, 1:3].tolist()
    assert check(original, layers=[2]).shape == (4, 1, TOPK)


@pytest.mark.parametrize(
    ("experts", "dtype"), [(8, "uint8"), (255, "uint8"), (256, "uint8"), (257, "int16"), (4096, "int16")]
)
def test_the_smallest_type_that_holds_every_id(experts, dtype):
    original = routing(experts=experts)
    original[0, 0] = torch.tensor([experts - 1, 0])
    kept = check(original, experts=experts)
    assert kept.dtype == getattr(torch, dtype)
    assert kept.long().tolist() == original.tolist()


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_any_integer_type_and_numpy_give_the_same(dtype):
    original = routing()
    assert torch.equal(check(original.to(getattr(torch, dtype))), check(original))
    assert torch.equal(check(original.numpy().astype(dtype)), check(original))


def test_what_slime_decodes_from_the_engines_bytes():
    original = routing()
    decoded = torch.frombuffer(bytearray(original.numpy().tobytes()), dtype=torch.int32).reshape(original.shape)
    assert torch.equal(check(decoded), check(original))
    array = numpy.frombuffer(original.numpy().tobytes(), dtype=numpy.int32).reshape(original.shape).copy()
    assert torch.equal(check(array), check(original))


def test_a_sample_of_one_token_has_no_rows():
    assert check(routing(tokens=1), tokens=1).shape == (0, LAYERS, TOPK)


def test_what_is_kept_is_a_copy():
    original = routing().to(torch.uint8)
    kept = check(original)
    before = kept.clone()
    original.zero_()
    if kept.data_ptr() == original.data_ptr():
        pytest.skip("all layers in the right type: nothing to copy, and nobody writes to it")
    assert torch.equal(kept, before)


# -- what is refused -------------------------------------------------------------------------------------------------


def damaged(change) -> object:
    original = routing()
    change(original)
    return original


REFUSED = {
    "none": (None, "returned none", "4 rows"),
    "a row too many": (routing(tokens=6), "shape", "(5, 4, 2)"),
    "a row too few": (routing(tokens=4), "shape", "(3, 4, 2)"),
    "no rows": (routing(tokens=1), "shape", "(0, 4, 2)"),
    "wrong topk": (routing(topk=3), "shape", "(4, 4, 3)"),
    "too few layers": (routing(layers=3), "shape", "(4, 3, 2)"),
    "no layers": (routing()[:, 0], "shape", "(4, 2)"),
    "the numbers fit, the shape does not": (routing().reshape(4, 2, 4), "shape", "(4, 2, 4)"),
    "flat": (routing().reshape(-1), "shape", "(32,)"),
    "below the range": (damaged(lambda r: r[2, 1].copy_(torch.tensor([-1, 3]))), "out of range", "-1 to "),
    "above the range": (damaged(lambda r: r[3, 3].copy_(torch.tensor([8, 3]))), "out of range", " to 8"),
    "twice": (damaged(lambda r: r[2, 1].fill_(5)), "twice", "[5, 5] at token 2, layer 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replayed_is_refused_with_the_sample(case):
    given_routing, problem, detail = REFUSED[case]
    with pytest.raises(PluginError, match=r"routing of sample 7 cannot be replayed") as caught:
        check(given_routing)
    assert problem in caught.value.message
    assert detail in str(caught.value)
    assert {"got", "expected"} <= set(caught.value.facts)


def test_a_duplicate_is_named_by_its_layer_in_the_model():
    original = routing()
    original[1, 3] = 6
    with pytest.raises(PluginError, match="twice") as caught:
        check(original, layers=[0, 3])
    assert "token 1, layer 3" in str(caught.value)


def test_duplicates_that_are_not_neighbours_are_found():
    original = routing(topk=3)
    original[0, 0] = torch.tensor([1, 5, 1])
    with pytest.raises(PluginError, match="twice"):
        check(original, topk=3)


@given(st.integers(0, 3), st.integers(0, LAYERS - 1), st.integers(0, TOPK - 1), st.integers(-300, 300))
def test_one_changed_id_is_kept_or_refused_never_altered(row, layer, place, value):
    original = routing()
    original[row, layer, place] = value
    other = int(original[row, layer, 1 - place])
    if 0 <= value < EXPERTS and value != other:
        assert check(original).tolist() == original.tolist()
    else:
        with pytest.raises(PluginError, match="sample 7"):
            check(original)


# -- the layout of a microbatch --------------------------------------------------------------------------------------


@st.composite
def microbatches(draw):
    """Samples of any lengths, and the positions of their tokens in any order, cut, with padding anywhere."""
    experts = draw(st.integers(1, 12))
    topk = draw(st.integers(1, min(3, experts)))
    layers = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    traces = [
        routing(length, layers, topk, experts, seed=number).to(torch.uint8) for number, length in enumerate(lengths)
    ]
    positions = draw(st.permutations([*range(sum(lengths)), *[-1] * draw(st.integers(0, 6))]))
    positions = positions[: draw(st.integers(1, len(positions)))]
    return traces, torch.tensor(positions), experts


def slow_lay_out(traces, positions):
    """Row by row: the recorded choice of each token, or None."""
    rows = [row for trace in traces for row in [*trace.unbind(0), None]]
    return [None if position < 0 else rows[position] for position in positions.tolist()]


@settings(max_examples=150)
@given(microbatches())
def test_each_token_gets_its_own_row(microbatch):
    traces, positions, experts = microbatch
    indices, recorded = lay_out(traces, positions, experts)
    layers, topk = traces[0].shape[1:]
    assert indices.shape == (layers, len(positions), topk)
    assert indices.is_contiguous()
    assert recorded.dtype == torch.bool
    for token, expected in enumerate(slow_lay_out(traces, positions)):
        found = indices[:, token]
        assert bool(recorded[token]) == (expected is not None)
        if expected is not None:
            assert torch.equal(found, expected)
        assert int(found.min()) >= 0
        assert int(found.max()) < experts
        for row in found.tolist():
            assert len(set(row)) == topk, "a dispatcher counts on different experts"


def test_padding_does_not_burden_one_expert():
    indices, recorded = lay_out([routing(tokens=1).to(torch.uint8)], torch.full((64,), -1), EXPERTS)
    assert not recorded.any()
    for layer in indices:
        assert layer.long().flatten().bincount(minlength=EXPERTS).tolist() == [64 * TOPK // EXPERTS] * EXPERTS


def test_padding_is_in_range_where_ids_fill_their_type():
    trace = routing(tokens=2, topk=8, experts=256).to(torch.uint8)
    indices, _ = lay_out([trace], torch.full((300,), -1), 256)
    assert indices.dtype == torch.uint8
    assert set(indices.flatten().tolist()) == set(range(256))


def test_the_last_token_of_each_sample_is_not_recorded():
    traces = [routing(tokens=length).to(torch.uint8) for length in (3, 1, 2)]
    _, recorded = lay_out(traces, torch.arange(6), EXPERTS)
    assert recorded.tolist() == [True, True, False, False, True, False]
