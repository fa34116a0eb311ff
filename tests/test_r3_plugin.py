"""r3_replay on the rollout's side: every fate of a sample, what is missing, what is counted, what the trainer gets."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import PluginError, Schedule
from miles_plugins.embedded.samples import Sample
from miles_plugins.r3_replay import plugin as r3
from miles_plugins.r3_replay import wire
from miles_plugins.r3_replay.trace import RoutingTrace

torch = pytest.importorskip("torch")
pytest.importorskip("xxhash")

LAYERS, TOPK, EXPERTS = 3, 2, 4096  # so many experts that a row says which response it is of, and of which position
HALF = EXPERTS // 2


def arguments(**changed: Any) -> Namespace:
    """Layer 0 is dense."""
    return Namespace(
        **{
            "num_layers": LAYERS,
            "moe_layer_freq": [0, 1, 1],
            "moe_router_topk": TOPK,
            "num_experts": EXPERTS,
            "pipeline_model_parallel_size": 1,
            "context_parallel_size": 1,
            "tensor_model_parallel_size": 1,
            "sequence_parallel": False,
            "allgather_cp": False,
            "data_pad_size_multiplier": 1,
            "r3_earlier_rows": "keep",
            "r3_missing": "fail",
            "r3_measure_only": False,
            **changed,
        }
    )


def rows_of(response: int, begin: int, end: int):
    """[end - begin, MoE layers, topk] int16: what `response` recorded for the positions from `begin` up to `end`."""
    ids = [[[response, HALF + at], [HALF + at, response]] for at in range(begin, end)]
    return torch.tensor(ids, dtype=torch.int16).reshape(-1, LAYERS - 1, TOPK)


def responses_in(rows: Any) -> list[int]:
    """Whose each row is; and that it is at its position."""
    assert rows[:, 0, 1].tolist() == [HALF + at for at in range(len(rows))]
    return rows[:, 0, 0].tolist()


def answer(sample: Any, response: int, version: str = "1", start: int = 0, **changed: Any) -> dict[str, Any]:
    """`meta_info` of a response whose tokens the sample has already; it recorded all of them from `start` on."""
    end = max(len(sample.tokens) - 1, start)
    meta_info = {"routed_experts": wire.encode(rows_of(response, start, end)), "weight_version": version}
    if start:
        meta_info["routed_experts_start_len"] = start
    return {**meta_info, "finish_reason": {"type": "stop"}, **changed}


def a_sample(*tokens: int, index: int = 7) -> Sample:
    return Sample(0, index, "prompt", None, tokens=list(tokens))


def answered(*tokens: int, index: int = 7, response: int = 1, version: str = "1", **changed: Any) -> Sample:
    sample = a_sample(*tokens, index=index)
    r3.receive_response(arguments(**changed), sample, answer(sample, response, version))
    return sample


def converted(*samples: Any) -> dict[str, Any]:
    """slime's training data of these samples, one token of each trained on."""
    return {
        "tokens": [sample.tokens for sample in samples],
        "loss_masks": [[0] if sample.remove_sample else [1] for sample in samples],
    }


def versions_in(trace: RoutingTrace) -> list[str]:
    return [span.weight_version for span in trace.spans for _ in range(span.begin, span.end)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """A rollout manager that has received nothing yet."""
    forget()
    yield
    forget()


def forget() -> None:
    r3._received.update(bytes=0, rows=0, seconds=0.0)
    r3._traces.clear()


# -- one sample's fate -----------------------------------------------------------------------------------------------


def test_a_response_becomes_a_trace_and_slime_sees_none_of_it():
    sample = a_sample(5, 6, 7, 8)
    meta_info = answer(sample, 3, "12")
    r3.receive_response(arguments(), sample, meta_info)
    assert "routed_experts" not in meta_info
    assert meta_info["weight_version"] == "12"
    trace = sample.rollout_routed_experts
    assert responses_in(trace.experts) == [3, 3, 3]
    assert trace.tokens.tolist() == [5, 6, 7]
    assert versions_in(trace) == ["12"] * 3


@pytest.mark.parametrize("kind", ["stop", "length", "abort"])
def test_a_truncated_or_aborted_response_is_as_long_as_its_tokens(kind):
    sample = a_sample(5, 6, 7)
    r3.receive_response(arguments(), sample, answer(sample, 3, finish_reason={"type": kind}))
    assert len(sample.rollout_routed_experts) == 2


@pytest.mark.parametrize("meta_info", [{}, {"routed_experts": None}, {"routed_experts": ""}], ids=str)
def test_a_response_that_was_aborted_in_the_queue_leaves_the_sample_as_it_was(meta_info):
    sample = a_sample(5, 6)
    r3.receive_response(arguments(), sample, {**meta_info, "finish_reason": {"type": "abort"}})
    assert sample.rollout_routed_experts is None
    sample = answered(5, 6, 7)
    before = sample.rollout_routed_experts
    r3.receive_response(arguments(), sample, {**meta_info, "finish_reason": {"type": "abort"}})
    assert sample.rollout_routed_experts is before
    r3.receive_samples(arguments(), [sample])
    assert sample.rollout_routed_experts is before


@pytest.mark.parametrize(("earlier", "expected"), [("keep", [1, 1, 2, 2]), ("overwrite", [2, 2, 2, 2])])
def test_a_partial_rollout_goes_on_with_new_weights(earlier, expected):
    """The tokens of the first response were sampled with its routing; the second one's prefill routed them again."""
    args = arguments(r3_earlier_rows=earlier)
    sample = answered(5, 6, 7, response=1, version="1")
    sample.tokens += [8, 9]
    r3.receive_response(args, sample, answer(sample, 2, "2"))
    assert responses_in(sample.rollout_routed_experts.experts) == expected
    assert versions_in(sample.rollout_routed_experts) == [str(each) for each in expected]


@pytest.mark.parametrize("delta", [False, True], ids=["all rows", "new rows"])
def test_the_rows_of_tool_tokens_come_with_the_next_response(delta):
    sample = answered(5, 6, 7, response=1)
    sample.tokens += [70, 71]  # a tool's, which no engine has seen yet
    with pytest.raises(PluginError, match="last tokens have none"):
        r3.receive_samples(arguments(), [sample])
    sample.tokens += [8, 9]
    r3.receive_response(arguments(), sample, answer(sample, 2, start=2 if delta else 0))
    r3.receive_samples(arguments(), [sample])
    assert responses_in(sample.rollout_routed_experts.experts) == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("start", [3, 4, 6])
def test_a_response_that_leaves_out_more_than_is_known_is_refused(start):
    sample = answered(5, 6, 7, response=1)
    sample.tokens += [8, 9, 10]
    with pytest.raises(PluginError, match=r"sample 7.*there is a gap"):
        r3.receive_response(arguments(), sample, answer(sample, 2, start=start))
    assert responses_in(sample.rollout_routed_experts.experts) == [1, 1]


@pytest.mark.parametrize("more", [-1, 1])
def test_a_response_with_rows_of_more_or_fewer_tokens_is_refused(more):
    sample = a_sample(5, 6, 7)
    text = wire.encode(rows_of(1, 0, 2 + more))
    with pytest.raises(PluginError, match=r"sample 7.*its shape is wrong") as caught:
        r3.receive_response(arguments(), sample, {"routed_experts": text})
    assert caught.value.facts["expected"] == "(2, 2, 2)"
    assert f"({2 + more}, 2, 2)" in caught.value.facts["got"]


@pytest.mark.parametrize("start", [-1, -2, -9])
def test_a_response_that_begins_before_the_sample_is_refused(start):
    """Its first row is counted from the end, if nobody looks."""
    sample = a_sample(5, 6, 7)
    text = wire.encode(rows_of(1, 0, 2 - start))
    with pytest.raises(PluginError, match=r"sample 7.*of no token"):
        r3.receive_response(arguments(), sample, {"routed_experts": text, "routed_experts_start_len": start})
    assert sample.rollout_routed_experts is None


def test_a_sample_that_is_trimmed_loses_the_rows_of_its_end():
    sample = answered(5, 6, 7, 8, 9)
    del sample.tokens[-2:]
    r3.receive_samples(arguments(), [sample])
    assert sample.rollout_routed_experts.tokens.tolist() == [5, 6]


def test_a_sample_whose_tokens_were_changed_is_refused_at_the_position():
    sample = answered(5, 6, 7, 8, 9)
    sample.tokens[2] = 99
    with pytest.raises(PluginError, match="belongs to other tokens") as caught:
        r3.receive_samples(arguments(), [sample])
    assert "position 2" in str(caught.value)
    assert "99" in str(caught.value)


# -- any history -----------------------------------------------------------------------------------------------------


class History:
    """A sample's life, and beside it the plainest account of it: for each row, (token, response, weight version).

    Steps are drawn elsewhere; `number` picks whatever a step leaves open.
    """

    def __init__(self, sample: Any, args: Namespace) -> None:
        self.sample, self.args = sample, args
        self.known: list[tuple[int, int, str]] = []
        self.version, self.response, self.token = 1, 0, 100

    def new_tokens(self, count: int) -> list[int]:
        self.token += count
        return list(range(self.token - count, self.token))

    # What slime does to a sample; on its own class in a test of the upstream tier.

    def append(self, tokens: list[int], meta_info: dict[str, Any] | None) -> None:
        self.sample.tokens = [*self.sample.tokens, *tokens]
        if meta_info is not None:
            r3.receive_response(self.args, self.sample, meta_info)

    def snapshot(self) -> Any:
        return list(self.sample.tokens)

    def restore(self, tokens: Any) -> None:
        self.sample.tokens = list(tokens)

    def trim(self, count: int) -> None:
        self.sample.tokens = self.sample.tokens[: max(len(self.sample.tokens) - count, 1)]

    def change(self, at: int) -> None:
        self.sample.tokens[at] = self.new_tokens(1)[0]

    # What can happen.

    def step_respond(self, number: int) -> None:
        """All rows, or the new ones, or new ones and some before, or too few."""
        total = len(self.sample.tokens)
        tokens = self.new_tokens(number % 4)
        start = [0, 0, len(self.known), max(len(self.known) - 1, 0), len(self.known) + 1][number // 4 % 5]
        start = min(start, total + len(tokens))
        self.response += 1
        self.receive(tokens, start)

    def step_stream(self, number: int) -> None:
        """Chunks of one response, each with all that came before; some without routing; the last may not come."""
        before, tokens = self.snapshot(), self.new_tokens(3)
        self.response += 1
        for length in range(1, 4 - number % 2):
            self.restore(before)
            if number >> length & 1:
                self.append(tokens[:length], {"weight_version": str(self.version)})
            else:
                self.receive(tokens[:length], 0)

    def step_abort_in_queue(self, number: int) -> None:
        self.append([], {"finish_reason": {"type": "abort"}})

    def step_tool(self, number: int) -> None:
        self.append(self.new_tokens(1 + number % 3), None)

    def step_trim(self, number: int) -> None:
        self.trim(1 + number % 3)

    def step_change(self, number: int) -> None:
        self.change(number % len(self.sample.tokens))

    def step_weights(self, number: int) -> None:
        self.version += 1

    def receive(self, tokens: list[int], start: int) -> None:
        sample = SimpleNamespace(tokens=[*self.sample.tokens, *tokens])
        meta_info = answer(sample, self.response, str(self.version), start)
        asked = max(len(sample.tokens) - 1, start)  # of a trimmed sample the last token may have a row from before
        same = 0
        while same < min(asked, len(sample.tokens), len(self.known)) and self.known[same][0] == sample.tokens[same]:
            same += 1
        if start > same:
            if self.args.r3_missing == "fail":
                with pytest.raises(PluginError, match="there is a gap"):
                    self.append(tokens, meta_info)
            else:
                self.append(tokens, meta_info)
                self.known = []
            return
        self.append(tokens, meta_info)
        first = same if self.args.r3_earlier_rows == "keep" else start
        new = [(sample.tokens[at], self.response, str(self.version)) for at in range(first, len(sample.tokens) - 1)]
        self.known = self.known[:first] + new

    def check(self) -> None:
        trace = self.sample.rollout_routed_experts
        if trace is None:
            assert self.known == []
            return
        assert self.of(trace) == self.known
        ends = [0, *(span.end for span in trace.spans)]
        assert [span.begin for span in trace.spans] == ends[:-1], "no gaps"
        assert all(span.begin < span.end for span in trace.spans)
        for one, next_one in itertools.pairwise(trace.spans):
            assert one.weight_version != next_one.weight_version

    def check_end(self) -> None:
        """It can be trained on if each token has the row that it should have, up to the last that is trained on."""
        tokens = self.sample.tokens
        rows = self.known[: len(tokens) - 1]
        masked_out = "".join(map(str, self.sample.loss_mask or [])).rpartition("1")[2]
        good = self.sample.rollout_routed_experts is not None and len(rows) >= len(tokens) - 1 - len(masked_out)
        good = good and [row[0] for row in rows] == tokens[: len(rows)]
        trained_on = self.sample.loss_mask is None or any(self.sample.loss_mask)
        if not good and trained_on and self.args.r3_missing == "fail":
            with pytest.raises(PluginError, match="cannot be replayed"):
                r3.receive_samples(self.args, [self.sample])
            return
        r3.receive_samples(self.args, [self.sample])
        assert self.sample.remove_sample == (trained_on and not good)
        assert (self.sample.rollout_routed_experts is not None) == good
        if good:
            assert self.of(self.sample.rollout_routed_experts) == rows

    @staticmethod
    def of(trace: RoutingTrace) -> list[tuple[int, int, str]]:
        return list(zip(trace.tokens.tolist(), responses_in(trace.experts), versions_in(trace), strict=True))


STEPS = [name.removeprefix("step_") for name in vars(History) if name.startswith("step_")]
MODES = [
    {"r3_earlier_rows": rows, "r3_missing": missing} for rows in ("keep", "overwrite") for missing in ("fail", "drop")
]


def play(history: History, steps: list[tuple[str, int]]) -> None:
    for name, number in steps:
        getattr(history, f"step_{name}")(number)
        history.check()
    history.check_end()


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.integers(1, 4),
    steps=st.lists(st.tuples(st.sampled_from([*STEPS, "respond", "respond"]), st.integers(0, 63)), max_size=12),
    mode=st.sampled_from(MODES),
)
def test_whatever_happens_each_token_has_the_row_that_it_should_have(prompt, steps, mode):
    play(History(a_sample(*range(prompt)), arguments(**mode)), steps)


# -- routing that is missing -----------------------------------------------------------------------------------------


def lose(sample: Sample) -> None:
    sample.rollout_routed_experts = None


def lengthen(sample: Sample) -> None:
    sample.tokens.append(1)


def change(sample: Sample) -> None:
    sample.tokens[0] = 99


def misshape(sample: Sample) -> None:
    sample.rollout_routed_experts = torch.zeros(1, 2, 3)


LOSSES = [lose, lengthen, change, misshape]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_sample_without_its_routing_ends_the_run(loss, which):
    samples = [answered(5, 6, 7 + number, index=40 + number) for number in range(3)]
    loss(samples[which])
    with pytest.raises(PluginError, match=rf"routing of sample 4{which} cannot be replayed") as caught:
        r3.receive_samples(arguments(), samples)
    assert set(caught.value.facts) == {"got", "expected"}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("loss", LOSSES)
def test_or_it_alone_is_masked_out_with_a_warning(loss, which, caplog):
    samples = [answered(5, 6, 7 + number, index=40 + number) for number in range(3)]
    loss(samples[which])
    r3.receive_samples(arguments(r3_missing="drop"), samples)
    assert [sample.remove_sample for sample in samples] == [number == which for number in range(3)]
    assert [sample.rollout_routed_experts is None for sample in samples] == [number == which for number in range(3)]
    (record,) = caplog.records
    assert f"sample 4{which} is masked out" in record.getMessage()


@pytest.mark.parametrize("missing", ["fail", "drop"])
@pytest.mark.parametrize("earlier", [False, True], ids=["never answered", "answered before"])
def test_a_sample_that_is_masked_out_already_needs_no_routing(earlier, missing, caplog):
    """A generate function that gave up on it, as slime's coding_agent_rl does: two tokens, removed from the loss."""
    given_up = answered(5, 6, 7) if earlier else a_sample()
    given_up.tokens, given_up.remove_sample = [0, 0], True
    good, removed = answered(5, 6, 7), answered(5, 6, 7)
    removed.remove_sample = True
    args = arguments(r3_missing=missing)
    r3.receive_samples(args, [given_up, good, removed])
    assert [sample.rollout_routed_experts is None for sample in (given_up, good, removed)] == [True, False, False]
    assert [sample.remove_sample for sample in (given_up, good, removed)] == [True, False, True]
    assert caplog.records == []
    train_data = converted(given_up, good, removed)
    r3.collect_train_data(args, [given_up, good, removed], train_data)
    assert [int(rows) for _, rows, _ in train_data["rollout_routed_experts"]] == [0, 2, 2]


@pytest.mark.parametrize("missing", ["fail", "drop"])
def test_a_sample_of_which_nothing_is_trained_on_needs_no_routing(missing, caplog):
    """slime's dynamic filters and multi-turn code mask whole samples by their loss mask."""
    masked = a_sample(5, 6, 7)
    masked.loss_mask = [0, 0]
    args = arguments(r3_missing=missing)
    r3.receive_samples(args, [masked])
    assert (masked.rollout_routed_experts, masked.remove_sample, caplog.records) == (None, False, [])
    train_data = {"tokens": [masked.tokens], "loss_masks": [masked.loss_mask]}
    r3.collect_train_data(args, [masked], train_data)
    assert train_data["rollout_routed_experts"][0].tolist() == [0, 0, 3]


def test_a_dropped_sample_that_is_trained_on_all_the_same_is_refused():
    """A user's own conversion may not know of remove_sample."""
    lost, good = a_sample(5, 6, 7, index=41), answered(5, 6, 7, index=42)
    args = arguments(r3_missing="drop")
    r3.receive_samples(args, [lost, good])
    train_data = {"tokens": [lost.tokens, good.tokens], "loss_masks": [[0, 1], [1, 1]]}
    with pytest.raises(PluginError, match="experts that no rollout used") as caught:
        r3.collect_train_data(args, [lost, good], train_data)
    assert caught.value.facts["samples"] == "sample 41"
    train_data["loss_masks"][0] = [0, 0]
    r3.collect_train_data(args, [lost, good], train_data)
    assert len(r3._traces) == 2


@given(st.lists(st.sampled_from([None, *LOSSES]), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_no_sample_that_counts_is_without_routing(losses):
    samples = [answered(5, 6, 7, 8, index=number) for number in range(len(losses))]
    for sample, loss in zip(samples, losses, strict=True):
        if loss:
            loss(sample)
    r3.receive_samples(arguments(r3_missing="drop"), samples)
    for sample, loss in zip(samples, losses, strict=True):
        if loss:
            assert (sample.remove_sample, sample.rollout_routed_experts) == (True, None)
        else:
            assert len(sample.rollout_routed_experts) == len(sample.tokens) - 1
            assert not sample.remove_sample


BROKEN = {
    "not base64": "no routing at all",
    "of SGLang itself": "AAAAAAEAAAA" * 8,
    "cut": wire.encode(rows_of(1, 0, 2))[:-8],
    "an expert twice": wire.encode(torch.zeros(2, 2, 2, dtype=torch.int16)),
    "an expert that is not there": wire.encode(torch.tensor([EXPERTS, 0] * 4, dtype=torch.int16).reshape(2, 2, 2)),
    "all layers": wire.encode(torch.arange(12, dtype=torch.int16).reshape(2, 3, 2)),
    "nothing": wire.encode(torch.zeros(0, 2, 2, dtype=torch.int16)),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_response_that_cannot_be_used_ends_the_run_or_leaves_the_sample_without(broken, caplog):
    sample = a_sample(5, 6, 7)
    with pytest.raises(PluginError, match=r"routing .*sample 7.* cannot be"):
        r3.receive_response(arguments(), sample, {"routed_experts": BROKEN[broken]})
    assert sample.rollout_routed_experts is None
    args, meta_info = arguments(r3_missing="drop"), {"routed_experts": BROKEN[broken]}
    r3.receive_response(args, sample, meta_info)
    assert meta_info == {}
    assert len(caplog.records) == 1
    r3.receive_samples(args, [sample])
    assert sample.remove_sample


def test_a_response_that_cannot_be_used_takes_the_earlier_rows_with_it():
    """Under drop: what a broken response had to say about the earlier tokens is not known."""
    args = arguments(r3_missing="drop")
    sample = answered(5, 6, 7)
    r3.receive_response(args, sample, {"routed_experts": "broken"})
    assert sample.rollout_routed_experts is None
    sample.tokens.append(8)
    r3.receive_response(args, sample, answer(sample, 2))
    r3.receive_samples(args, [sample])
    assert responses_in(sample.rollout_routed_experts.experts) == [2, 2, 2], "a whole response heals it"
    assert not sample.remove_sample


# -- routing that a user's own rollout function put there --------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda ids: ids, lambda ids: ids.numpy(), lambda ids: ids.long(), lambda ids: ids.tolist()]
)
@pytest.mark.parametrize("layers", [LAYERS, LAYERS - 1], ids=["all layers", "MoE layers"])
def test_a_plain_tensor_of_all_layers_becomes_a_trace(make, layers):
    sample = a_sample(5, 6, 7, 8)
    whole = torch.full((3, LAYERS, TOPK), -1, dtype=torch.int32)  # what the dense layer says is not looked at
    whole[:, 1:] = rows_of(4, 0, 3).int()
    sample.rollout_routed_experts = make(whole[:, LAYERS - layers :])
    sample.weight_versions = ["3", "4"]
    r3.receive_samples(arguments(), [sample])
    trace = sample.rollout_routed_experts
    assert responses_in(trace.experts) == [4, 4, 4]
    assert trace.experts.dtype == torch.int16
    assert trace.tokens.tolist() == [5, 6, 7]
    assert versions_in(trace) == ["4"] * 3
    assert r3.rollout_metrics(arguments(), [sample])["r3/samples_without_routing"] == 0


def test_few_experts_are_kept_in_a_byte():
    sample = a_sample(5, 6, 7)
    sample.rollout_routed_experts = torch.tensor([[[0, 0], [1, 2], [3, 0]]] * 2)
    r3.receive_samples(arguments(num_experts=4), [sample])
    assert sample.rollout_routed_experts.experts.dtype == torch.uint8
    assert sample.rollout_routed_experts.experts.tolist() == [[[1, 2], [3, 0]]] * 2


@pytest.mark.parametrize(
    "shape", [(2, LAYERS, TOPK), (4, LAYERS, TOPK), (3, LAYERS, 3), (3, 4, TOPK), (18,), (3, 6)], ids=str
)
def test_a_plain_tensor_of_another_shape_is_refused(shape):
    sample = a_sample(5, 6, 7, 8)
    sample.rollout_routed_experts = torch.arange(torch.Size(shape).numel()).reshape(shape)
    with pytest.raises(PluginError, match=r"sample 7.*its shape is wrong"):
        r3.receive_samples(arguments(), [sample])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (torch.zeros(2, LAYERS, TOPK), "its ids are no integers"),
        (torch.zeros(2, LAYERS, TOPK, dtype=torch.bool), "its ids are no integers"),
        ([[[1, 2]], [[1]]], "it is no tensor"),
        ("abc", "it is no tensor"),
    ],
    ids=["float", "bool", "ragged", "text"],
)
def test_what_holds_no_ids_is_refused_by_name(made, said):
    sample = a_sample(5, 6, 7)
    sample.rollout_routed_experts = made
    with pytest.raises(PluginError, match=f"sample 7.*{said}"):
        r3.receive_samples(arguments(), [sample])


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_bytes_are_counted_since_the_last_rollout():
    args = arguments()
    samples = [a_sample(*range(3)), a_sample(*range(40))]
    texts = []
    for sample in samples:
        meta_info = answer(sample, 1)
        texts.append(meta_info["routed_experts"])
        r3.receive_response(args, sample, meta_info)
    metrics = r3.rollout_metrics(args, samples)
    assert metrics["r3/wire_bytes_per_token"] == sum(map(len, texts)) / (2 + 39)
    assert metrics["r3/bytes_per_token"] == 2 * TOPK * 2
    assert metrics["r3/receive_seconds"] > 0
    assert metrics["r3/samples_without_routing"] == 0
    r3.collect_train_data(args, samples, converted(*samples))
    again = r3.rollout_metrics(args, samples)
    assert again["r3/wire_bytes_per_token"] == again["r3/receive_seconds"] == 0


def test_rows_of_earlier_weights_are_counted():
    args = arguments()
    resumed = answered(5, 6, 7, response=1, version="1")
    resumed.tokens += [8, 9]
    r3.receive_response(args, resumed, answer(resumed, 2, "2"))
    whole = answered(*range(5), version="2")
    assert r3.rollout_metrics(args, [whole])["r3/rows_of_earlier_weights"] == 0
    assert r3.rollout_metrics(args, [resumed])["r3/rows_of_earlier_weights"] == 2 / 4
    assert r3.rollout_metrics(args, [resumed, whole])["r3/rows_of_earlier_weights"] == 2 / 8
    overwritten = answered(5, 6, 7, response=1, version="1")
    overwritten.tokens += [8, 9]
    r3.receive_response(arguments(r3_earlier_rows="overwrite"), overwritten, answer(overwritten, 2, "2"))
    assert r3.rollout_metrics(args, [overwritten])["r3/rows_of_earlier_weights"] == 0


@pytest.mark.parametrize("missing", ["fail", "drop"])
def test_metrics_count_what_is_missing_and_leave_it_to_others_to_refuse(missing):
    samples = [answered(5, 6, 7), a_sample(5, 6), answered(5, 6, 7), a_sample(1)]
    samples[2].tokens.append(8)
    metrics = r3.rollout_metrics(arguments(r3_missing=missing), samples)
    assert metrics["r3/samples_without_routing"] == 3
    assert not any(sample.remove_sample for sample in samples)
    assert all(isinstance(value, float) for value in metrics.values())
    assert r3.rollout_metrics(arguments(), [])["r3/rows_of_earlier_weights"] == 0


# -- to the trainer --------------------------------------------------------------------------------------------------


def test_the_training_data_carries_which_sample_and_how_many_rows():
    args = arguments(r3_missing="drop")
    samples = [answered(*range(3), index=30), a_sample(*range(5), index=31), answered(*range(4), index=32)]
    r3.receive_samples(args, samples)
    train_data = {**converted(*samples), "rollout_routed_experts": ["of slime"]}
    r3.collect_train_data(args, samples, train_data)
    assert [each.tolist() for each in train_data["rollout_routed_experts"]] == [[0, 2, 3], [1, 0, 5], [2, 3, 4]]
    (shared,) = r3.share_train_data(args, Schedule([3, 5, 4], [[[2, 0], [1]]]))
    assert shared.pop(r3.LAYOUT) == r3._layout(args)
    ((both, masked),) = shared.values()
    assert both.tolist()[:3] == rows_of(1, 0, 3).tolist()
    assert both.tolist()[4:6] == rows_of(1, 0, 2).tolist()
    assert masked.shape == (5, LAYERS - 1, TOPK)
    assert r3._traces == [], "let go as soon as it is cut"


def test_what_is_shared_is_no_larger_than_the_routing():
    samples = [answered(*range(64), index=number) for number in range(4)]
    args = arguments()
    r3.collect_train_data(args, samples, converted(*samples))
    everything = r3.share_train_data(args, Schedule([64] * 4, [[[0], [1]], [[2], [3]]]))
    cuts = [[cut for name, cuts in shared.items() if name != r3.LAYOUT for cut in cuts] for shared in everything]
    assert [sum(cut.nbytes for cut in of_rank) for of_rank in cuts] == [2 * 64 * 8] * 2


def test_a_conversation_may_end_on_what_no_engine_saw_if_it_is_masked():
    """A tool's last answer: nothing after it is predicted, so its routing reaches no loss."""
    args = arguments()
    for loss_mask, fine in (([1, 1, 0, 0], True), ([1, 1, 0, 1], False), (None, False)):
        sample = answered(5, 6, 7)
        sample.tokens += [8, 9]
        sample.loss_mask = loss_mask
        if fine:
            r3.receive_samples(args, [sample])
            assert len(sample.rollout_routed_experts) == 2
        else:
            with pytest.raises(PluginError, match="its last tokens have none"):
                r3.receive_samples(args, [sample])


def test_a_response_without_slimes_arguments_says_what_to_do():
    sample = a_sample(*range(3))
    with pytest.raises(PluginError, match="without slime's arguments"):
        r3.receive_response(None, sample, answer(sample, 1))


def test_training_data_that_lost_or_changed_a_sample_is_refused():
    samples = [SimpleNamespace(index=0, tokens=[0] * 4), SimpleNamespace(index=1, tokens=[0] * 5)]
    for tokens in ([[0] * 4], [[0] * 5, [0] * 4], [[0] * 4, [0] * 4 + [1]], []):
        with pytest.raises(PluginError, match="one for one and in order"):
            r3.collect_train_data(arguments(), samples, {"tokens": tokens})


# -- the engine's side -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [True, False])
def test_the_engine_is_asked_for_its_routing_only_if_it_records_it(on):
    request = SimpleNamespace(return_routed_experts=False)
    r3.receive_engine_request(SimpleNamespace(enable_return_routed_experts=on), request)
    assert request.return_routed_experts is on


def test_what_the_engine_sends_is_what_the_rollout_reads():
    rows = rows_of(3, 0, 9)
    assert torch.equal(wire.decode(r3.encode_routed_experts(rows)), rows)


# -- flags -----------------------------------------------------------------------------------------------------------


def parsed(*flags: str) -> Namespace:
    parser = argparse.ArgumentParser()
    r3.register_arguments(parser)
    return parser.parse_args(flags)


def test_the_flags_and_what_they_are_without_asking():
    assert vars(parsed()) == {"r3_earlier_rows": "keep", "r3_missing": "fail", "r3_measure_only": False}
    assert parsed("--r3-earlier-rows", "overwrite").r3_earlier_rows == "overwrite"
    assert parsed("--r3-missing", "drop").r3_missing == "drop"
    assert parsed("--r3-measure-only").r3_measure_only is True
    assert r3.default_flags() == ["--use-rollout-routing-replay"]


@pytest.mark.parametrize(
    "flags", [("--r3-missing", "ignore"), ("--r3-earlier-rows", "new"), ("--r3-measure-only", "1")]
)
def test_other_values_are_refused(flags):
    with pytest.raises(SystemExit):
        parsed(*flags)


# -- on slime's own samples ------------------------------------------------------------------------------------------


class SlimeHistory(History):
    """The same on slime's `Sample`, whose `append_response_tokens` is patched."""

    def append(self, tokens: list[int], meta_info: dict[str, Any] | None) -> None:
        trainable = meta_info is not None
        self.sample.append_response_tokens(
            self.args,
            tokens=tokens,
            log_probs=[-0.5] * len(tokens) if trainable else None,
            trainable=trainable,
            meta_info=meta_info,
            text="x" * len(tokens),
            update_terminal_info=trainable and "finish_reason" in meta_info,
        )

    def snapshot(self) -> Any:
        sample = self.sample
        one_each = [None if each is None else list(each) for each in (sample.rollout_log_probs, sample.loss_mask)]
        return list(sample.tokens), sample.response, sample.response_length, *one_each

    def restore(self, snapshot: Any) -> None:
        """As slime's streaming rollout does before each chunk; it does not restore the routing."""
        tokens, self.sample.response, self.sample.response_length, log_probs, loss_mask = snapshot
        self.sample.tokens = list(tokens)
        self.sample.rollout_log_probs = None if log_probs is None else list(log_probs)
        self.sample.loss_mask = None if loss_mask is None else list(loss_mask)

    def trim(self, count: int) -> None:
        sample = self.sample
        count = min(count, sample.response_length)
        if count:
            for name in ("tokens", "loss_mask", "rollout_log_probs"):
                setattr(sample, name, getattr(sample, name)[:-count])
            sample.response_length -= count


def play_on_slime() -> None:
    """Run in a process with slime on its path."""
    from slime.utils.types import Sample as SlimesSample

    from miles_plugins.activation import current

    chance = random.Random(7)
    for _ in range(300):
        prompt = list(range(chance.randrange(1, 5)))
        history = SlimeHistory(SlimesSample(index=7, tokens=prompt), arguments(**chance.choice(MODES)))
        play(history, [(chance.choice([*STEPS, "respond", "respond"]), chance.randrange(64)) for _ in range(10)])
        sample = history.sample
        assert len(sample.loss_mask or []) == sample.response_length
    (record,) = (each for each in current().patches.records() if each.patch.id == "slime.response.received")
    print("played", record.state.value)


PLAY = """
import sys
from miles_plugins.activation import activate
activate(["r3"], "rollout_manager", environment={})
sys.path.insert(0, sys.argv[1])
import test_r3_plugin
test_r3_plugin.play_on_slime()
"""

# slime's own routing, of all layers, through a layer in which some plugin only listens.
LISTEN = """
import base64, copy
from argparse import Namespace
from types import ModuleType, SimpleNamespace

import torch
from slime.utils.types import Sample

from miles_plugins import hookimpl
from miles_plugins.manager import Installed, Plugin, Plugins
from miles_plugins.patches.slime import responses
from miles_plugins.patching import PatchSet

args = Namespace(num_layers=3, moe_router_topk=2)


def live():
    sample = Sample(index=1, tokens=[1, 2])
    def respond(count, start, kind, version):
        rows = torch.arange((len(sample.tokens) + count - 1 - start) * 6, dtype=torch.int32)
        meta = {"routed_experts": base64.b64encode(rows.numpy().tobytes()).decode(), "routed_experts_start_len": start,
                "finish_reason": {"type": kind}, "weight_version": version, "cached_tokens": 3, "prompt_tokens": 2}
        sample.append_response_tokens(args, tokens=[5] * count, log_probs=[-1.0] * count, meta_info=meta, text="a")
        return meta
    metas = [respond(3, 0, "abort", "1")]
    sample.append_response_tokens(args, tokens=[8, 9], trainable=False, text="tool")
    metas.append(respond(2, 4, "length", "2"))
    metas.append(respond(0, 0, "stop", "3"))
    result = sample.to_dict()
    result["rollout_routed_experts"] = result["rollout_routed_experts"].tolist()
    return result, metas


plain = live()
heard = []
module = ModuleType("listener")
listen = hookimpl(lambda sample, meta_info: heard.append((len(sample.tokens), sorted(meta_info))))
vars(module).update(__file__="", receive_response=listen)
plugins = Plugins([Plugin(Installed("listener", "d", "0", None), module)])
responses.current = lambda: SimpleNamespace(hook=plugins.hook)
PatchSet(*responses.SEAMS[0].patches).apply()
assert live() == plain
assert [tokens for tokens, _ in heard] == [5, 9, 9], heard
assert all("routed_experts" in names for _, names in heard)
print("listened")
"""


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("script", "said"), [(PLAY, "played verified"), (LISTEN, "listened")], ids=["r3", "without r3"]
)
def test_slimes_own_samples(script: str, said: str, upstream_path: str, tmp_path: Path) -> None:
    """Any history gives what the reference says; and where r3 is not active, what slime makes of it."""
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": upstream_path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[-2] == said
