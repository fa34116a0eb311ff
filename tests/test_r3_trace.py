"""The recorded routing of a sample: what is refused, which tokens it belongs to, and how responses are joined."""

from __future__ import annotations

import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import Packing, PluginError, Schedule
from miles_plugins.r3_replay import shards
from miles_plugins.r3_replay import trace as trace_module
from miles_plugins.r3_replay.trace import Routing, RoutingTrace, Span, join, moe_layers

torch = pytest.importorskip("torch")

LAYERS, TOPK, EXPERTS = 4, 2, 8
ROUTING = Routing(tuple(range(LAYERS)), TOPK, EXPERTS)
NAME = "sample 7"


def routed(rows: int = 4, layers: int = LAYERS, topk: int = TOPK, experts: int = EXPERTS, seed: int = 0):
    """[rows, layers, topk] uint8 or int16, different experts in a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, layers, experts, generator=generator).topk(topk, dim=-1).indices
    return ids.to(torch.uint8 if experts <= 256 else torch.int16)


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


@pytest.mark.parametrize(
    ("experts", "dtype"), [(8, "uint8"), (255, "uint8"), (256, "uint8"), (257, "int16"), (4096, "int16")]
)
def test_the_smallest_type_that_holds_every_id(experts, dtype):
    original = torch.tensor([[[experts - 1, 0]]], dtype=torch.int32)
    routing = Routing((0,), TOPK, experts)
    kept = routing.narrow(original)
    assert kept.dtype == getattr(torch, dtype)
    assert kept.long().tolist() == original.tolist()
    assert kept.is_contiguous()
    assert kept.nbytes == routing.bytes_per_token
    routing.check(kept, 1, NAME)


@pytest.mark.parametrize(
    ("layers", "topk", "experts", "expected"), [(48, 8, 128, 384), (58, 8, 256, 464), (60, 8, 384, 960)]
)
def test_bytes_of_a_token_in_memory(layers, topk, experts, expected):
    """Qwen3-30B-A3B, DeepSeek-V3, Kimi-K2; the latter has more experts than a byte counts."""
    routing = Routing(tuple(range(layers)), topk, experts)
    trace = join(None, routed(63, layers, topk, experts), 0, range(64), "1", True, NAME)
    assert routing.bytes_per_token == expected
    assert trace.experts.nbytes == expected * len(trace)
    assert trace.tokens.nbytes == 4 * len(trace)


@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("topk", [1, 2, EXPERTS])
def test_a_good_routing_passes(rows, topk):
    Routing((0, 1, 2), topk, EXPERTS).check(routed(rows, 3, topk), rows, NAME)


# -- what is refused -------------------------------------------------------------------------------------------------


def damaged(row: int, layer: int, *ids: int, rows: int = 4, topk: int = TOPK):
    original = routed(rows, topk=topk).int()
    original[row, layer] = torch.tensor(ids)
    return original


REFUSED = {
    "a row too many": (routed(5), "shape", "(5, 4, 2)"),
    "a row too few": (routed(3), "shape", "(3, 4, 2)"),
    "no rows": (routed(0), "shape", "(0, 4, 2)"),
    "wrong topk": (routed(topk=3), "shape", "(4, 4, 3)"),
    "too few layers": (routed(layers=3), "shape", "(4, 3, 2)"),
    "too many layers": (routed(layers=5), "shape", "(4, 5, 2)"),
    "no layers": (routed()[:, 0], "shape", "(4, 2)"),
    "as many numbers, layers for topk": (routed().reshape(4, 2, 4), "shape", "(4, 2, 4)"),
    "as many numbers, rows for layers": (routed().reshape(2, 8, 2), "shape", "(2, 8, 2)"),
    "as many numbers, rows for topk": (routed().reshape(8, 4, 1), "shape", "(8, 4, 1)"),
    "flat": (routed().reshape(-1), "shape", "(32,)"),
    "below the range": (damaged(2, 1, -1, 3), "out of range", "-1 to "),
    "above the range": (damaged(3, 3, 8, 3), "out of range", " to 8"),
    "far above the range": (damaged(0, 0, 0, 255).to(torch.uint8), "out of range", "0 to 255"),
    "twice": (damaged(2, 1, 5, 5), "twice", "[5, 5] at token 2, layer 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replayed_is_refused_with_the_sample(case):
    rows, problem, detail = REFUSED[case]
    with pytest.raises(PluginError, match=r"routing of sample 7 cannot be replayed") as caught:
        ROUTING.check(rows, 4, NAME)
    assert problem in caught.value.message
    assert detail in caught.value.facts["got"]
    assert set(caught.value.facts) == {"got", "expected"}
    assert str(caught.value.facts["expected"]) in str(caught.value)


def test_zeros_are_refused():
    """What a layer gives whose engine records nothing: one expert, named topk times."""
    with pytest.raises(PluginError, match="twice"):
        ROUTING.check(torch.zeros(4, LAYERS, TOPK, dtype=torch.uint8), 4, NAME)


def test_a_duplicate_is_named_by_its_layer_in_the_model():
    rows = routed(layers=2)
    rows[1, 1] = 6
    with pytest.raises(PluginError, match="twice") as caught:
        Routing((0, 3), TOPK, EXPERTS).check(rows, 4, NAME)
    assert "token 1, layer 3" in str(caught.value)


@pytest.mark.parametrize("first", range(8))
@pytest.mark.parametrize("second", range(8))
def test_a_duplicate_is_found_at_any_two_places_of_a_row(first, second):
    routing = Routing((0, 1, 2), 8, 64)
    rows = routed(5, 3, 8, 64)
    rows[4, 2, second] = rows[4, 2, first]
    if first == second:
        routing.check(rows, 5, NAME)
        return
    with pytest.raises(PluginError, match="twice") as caught:
        routing.check(rows, 5, NAME)
    assert "at token 4, layer 2" in caught.value.facts["got"]


@settings(deadline=None)
@given(
    rows=st.integers(1, 6),
    layers=st.integers(1, 3),
    topk=st.integers(1, 5),
    block=st.integers(5, 40),
    data=st.data(),
)
def test_a_row_is_refused_if_and_only_if_it_repeats_an_expert(rows, layers, topk, block, data):
    """However the rows fall into the blocks in which they are compared."""
    ids = data.draw(st.lists(st.integers(0, 11), min_size=rows * layers * topk, max_size=rows * layers * topk))
    tensor = torch.tensor(ids, dtype=torch.uint8).reshape(rows, layers, topk)
    repeating = {
        (row, layer) for row in range(rows) for layer in range(layers) if len(set(tensor[row, layer].tolist())) < topk
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_module, "BLOCK", block)
        if not repeating:
            Routing(tuple(range(layers)), topk, 12).check(tensor, rows, NAME)
            return
        with pytest.raises(PluginError, match="twice") as caught:
            Routing(tuple(range(layers)), topk, 12).check(tensor, rows, NAME)
    named = re.search(r"at token (\d+), layer (\d+)", caught.value.facts["got"])
    assert (int(named[1]), int(named[2])) in repeating


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(0, LAYERS - 1), st.integers(0, TOPK - 1), st.integers(-300, 300))
def test_one_changed_id_passes_only_if_it_could_have_been_chosen(row, layer, place, value):
    rows = routed().int()
    rows[row, layer, place] = value
    other = int(rows[row, layer, 1 - place])
    if 0 <= value < EXPERTS and value != other:
        ROUTING.check(rows, 4, NAME)
    else:
        with pytest.raises(PluginError, match="sample 7"):
            ROUTING.check(rows, 4, NAME)


# -- a trace and its tokens ------------------------------------------------------------------------------------------


def trace_of(tokens, version: str = "1", seed: int = 0) -> RoutingTrace:
    """One response that recorded everything."""
    return join(None, routed(max(len(tokens) - 1, 0), seed=seed), 0, tokens, version, True, NAME)


TOKENS = [10, 11, 12, 13, 14, 15]


def test_a_sample_as_it_was_keeps_its_trace():
    trace = trace_of(TOKENS)
    assert trace.of(TOKENS, NAME) is trace
    assert trace.tokens.tolist() == TOKENS[:-1], "the last token was never forwarded"
    assert trace.spans == (Span(0, 5, "1"),)


@pytest.mark.parametrize("left", range(1, 6))
def test_rows_are_trimmed_with_the_tokens(left):
    trace = trace_of(TOKENS)
    trimmed = trace.of(TOKENS[:left], NAME)
    assert torch.equal(trimmed.experts, trace.experts[: left - 1])
    assert trimmed.tokens.tolist() == TOKENS[: left - 1]
    assert trimmed.spans == ((Span(0, left - 1, "1"),) if left > 1 else ())
    assert len(trace) == 5, "of the sample before it was trimmed"


@pytest.mark.parametrize("at", range(6))
def test_rows_of_other_tokens_are_refused_at_their_position(at):
    changed = [*TOKENS[:at], 99, *TOKENS[at + 1 :]]
    if at == 5:  # never forwarded, so no row depends on it
        assert len(trace_of(TOKENS).of(changed, NAME)) == 5
        return
    with pytest.raises(PluginError, match=r"sample 7.*belongs to other tokens") as caught:
        trace_of(TOKENS).of(changed, NAME)
    assert caught.value.facts["got"] == f"token {TOKENS[at]} at position {at}"
    assert caught.value.facts["expected"] == "token 99 there"


def test_other_tokens_are_told_from_missing_ones():
    with pytest.raises(PluginError, match="belongs to other tokens"):
        trace_of(TOKENS).of([*TOKENS[:2], 99, *TOKENS, 1, 2], NAME)


def test_the_last_token_of_a_trimmed_sample_may_be_another():
    assert len(trace_of(TOKENS).of([*TOKENS[:3], 2], NAME)) == 3


@pytest.mark.parametrize("more", [1, 2, 5])
def test_tokens_without_a_row_are_refused(more):
    with pytest.raises(PluginError, match=r"sample 7.*last tokens have none") as caught:
        trace_of(TOKENS).of([*TOKENS, *range(more)], NAME)
    assert caught.value.facts == {"got": "5 rows", "expected": f"{5 + more} rows"}


@pytest.mark.parametrize("tokens", [[], [3]], ids=["none", "one"])
def test_a_sample_without_rows(tokens):
    trace = trace_of(tokens)
    assert (len(trace), trace.spans, trace.experts.shape) == (0, (), (0, LAYERS, TOPK))
    assert trace.of(tokens, NAME) is trace
    assert len(trace_of(TOKENS).of(tokens, NAME)) == 0


def test_a_trace_survives_a_debug_dump():
    """slime saves samples with torch.save, and trains on them in another run."""
    trace = trace_of(TOKENS)
    loaded = pickle.loads(pickle.dumps(trace))
    assert torch.equal(loaded.experts, trace.experts)
    assert torch.equal(loaded.tokens, trace.tokens)
    assert loaded.spans == trace.spans


# -- responses, joined -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "overwrite"])
def test_a_resumed_sample(keep):
    """Aborted with 3 tokens and gone on with new weights, whose prefill routed those 3 once more."""
    first, second = routed(2, seed=1), routed(5, seed=2)
    before = join(None, first, 0, TOKENS[:3], "1", keep, NAME)
    after = join(before, second, 0, TOKENS, "2", keep, NAME)
    assert after.tokens.tolist() == TOKENS[:-1]
    if keep:
        assert torch.equal(after.experts, torch.cat([first, second[2:]]))
        assert after.spans == (Span(0, 2, "1"), Span(2, 5, "2"))
    else:
        assert torch.equal(after.experts, second)
        assert after.spans == (Span(0, 5, "2"),)
    assert after.experts.is_contiguous()


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "overwrite"])
def test_the_rows_of_one_version_of_the_weights_are_one_span(keep):
    before = trace_of(TOKENS[:3], "4")
    assert join(before, routed(5), 0, TOKENS, "4", keep, NAME).spans == (Span(0, 5, "4"),)
    assert join(before, routed(3), 2, TOKENS, "4", keep, NAME).spans == (Span(0, 5, "4"),)


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "overwrite"])
def test_new_rows_only_are_as_good_as_all(keep):
    """`routed_experts_start_len`: the engine leaves out the rows of tokens that it was asked about before."""
    before, whole = trace_of(TOKENS[:3], "1"), routed(5, seed=3)
    from_all = join(before, whole, 0, TOKENS, "1", True, NAME)
    from_new = join(before, whole[2:], 2, TOKENS, "1", keep, NAME)
    assert torch.equal(from_all.experts, from_new.experts)
    assert torch.equal(from_all.tokens, from_new.tokens)
    assert from_all.spans == from_new.spans


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "overwrite"])
def test_new_rows_that_overlap_earlier_ones(keep):
    before, new = trace_of(TOKENS[:4], "1"), routed(4, seed=3)
    joined = join(before, new, 1, TOKENS, "2", keep, NAME)
    kept = 3 if keep else 1
    assert torch.equal(joined.experts, torch.cat([before.experts[:kept], new[kept - 1 :]]))
    assert joined.spans == (Span(0, kept, "1"), Span(kept, 5, "2"))


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "overwrite"])
@pytest.mark.parametrize("earlier", [None, 2], ids=["nothing before", "too little before"])
def test_a_gap_is_refused(earlier, keep):
    before = earlier and trace_of(TOKENS[:earlier])
    with pytest.raises(PluginError, match=r"sample 7.*there is a gap") as caught:
        join(before, routed(3), 2, TOKENS, "1", keep, NAME)
    assert caught.value.facts["got"] == ("earlier rows for 1 tokens" if earlier else "no earlier rows")
    assert caught.value.facts["expected"] == "rows for the first 2 tokens"


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "overwrite"])
@pytest.mark.parametrize("start", [6, 7, 100])
def test_rows_that_begin_beyond_the_sample_are_refused(start, keep):
    with pytest.raises(PluginError, match="there is a gap"):
        join(trace_of(TOKENS), routed(0), start, TOKENS, "1", keep, NAME)


def test_earlier_rows_of_other_tokens_do_not_fill_a_gap():
    """The prompt was tokenized anew, say: what was recorded for token 1 is of no use, and the response left it out."""
    changed = [TOKENS[0], 99, *TOKENS[2:]]
    for keep in (True, False):
        with pytest.raises(PluginError, match="there is a gap"):
            join(trace_of(TOKENS[:3]), routed(3), 2, changed, "1", keep, NAME)


def test_earlier_rows_stay_only_as_far_as_their_tokens():
    changed = [*TOKENS[:2], 99, *TOKENS[3:]]
    before, new = trace_of(TOKENS, "1"), routed(5, seed=3)
    joined = join(before, new, 0, changed, "2", True, NAME)
    assert torch.equal(joined.experts, torch.cat([before.experts[:2], new[2:]]))
    assert joined.spans == (Span(0, 2, "1"), Span(2, 5, "2"))
    assert joined.of(changed, NAME) is joined


def test_a_response_without_anything_new_changes_nothing():
    before = trace_of(TOKENS, "1")
    joined = join(before, routed(0), 5, TOKENS, "2", True, NAME)
    assert torch.equal(joined.experts, before.experts)
    assert joined.spans == before.spans


def test_joining_leaves_the_earlier_trace_as_it_was():
    before = trace_of(TOKENS[:4], "1")
    kept = (before.experts.clone(), before.tokens.clone(), before.spans)
    join(before, routed(5), 0, TOKENS, "2", False, NAME)
    join(before, routed(5), 0, TOKENS, "2", True, NAME).experts.fill_(0)
    assert torch.equal(before.experts, kept[0])
    assert torch.equal(before.tokens, kept[1])
    assert before.spans == kept[2]


# -- at the edges of what is cut for the ranks (the rest: tests/test_packing.py) ---------------------------------------


def test_experts_of_tokens_without_a_record_are_in_range_where_ids_fill_their_type():
    routing = Routing((0,), 8, 256)
    ids = shards.spread(torch.arange(300), routing)
    assert ids.dtype == torch.uint8
    assert set(ids.flatten().tolist()) == set(range(256))
    routing.check(ids, 300, NAME)


def test_samples_of_no_schedule_are_left_out():
    """slime leaves out the trailing rollouts that fill no step."""
    (cuts,) = shards.cut([routed(2), routed(3)], Schedule([3, 4], [[[1]]]), Packing(), ROUTING, False)
    ((only,),) = cuts.values()
    assert torch.equal(torch.from_numpy(only)[:3], routed(3))
