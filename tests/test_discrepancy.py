"""The discrepancy between two sides' log-probabilities, and the alarm for its drift: pure."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from argparse import Namespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins.discrepancy import BINS, OCTAVES, RESOLUTION, Discrepancy, Drift, Result, reduced, response_part
from miles_plugins.errors import UpstreamError

torch = pytest.importorskip("torch")

# -- against a definition in plain Python ----------------------------------------------------------------------------

Row = tuple[float, float, bool]  # train, rollout, whether the loss counts it
FINITE = st.floats(-60, 0, width=32)
ANY = st.one_of(FINITE, st.sampled_from([math.nan, math.inf, -math.inf]))
ROWS = st.lists(st.tuples(ANY, ANY, st.booleans()), max_size=8)
SOUND = st.lists(st.tuples(FINITE, FINITE, st.booleans()), max_size=8)


def columns(rows: list[Row]) -> tuple[Any, Any, Any]:
    train, rollout, mask = ([row[column] for row in rows] for column in range(3))
    return torch.tensor(train), torch.tensor(rollout), torch.tensor(mask, dtype=torch.int)


def found(samples: list[list[Row]], worst: int = 5) -> Discrepancy:
    whole = Discrepancy(worst)
    for rows in samples:
        whole.add(*columns(rows))
    return whole


def written_out(samples: list[list[Row]]) -> dict[str, float]:
    """The numbers, one token at a time."""
    kept = [[(t, r) for t, r, counted in rows if counted and math.isfinite(t - r)] for rows in samples]
    pairs = [pair for rows in kept for pair in rows]
    counted = [sum(counted for *_, counted in rows) for rows in samples]
    shares = sum(len(rows) / n for rows, n in zip(kept, counted, strict=True) if n)

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values) if values else math.nan

    in_samples = math.fsum(abs(t - r) / n for rows, n in zip(kept, counted, strict=True) for t, r in rows)
    return {
        "tokens": len(pairs),
        "nonfinite": sum(counted) - len(pairs),
        "nonfinite_share": (sum(counted) - len(pairs)) / sum(counted) if sum(counted) else math.nan,
        "mean": mean([abs(t - r) for t, r in pairs]),
        "sample_mean": in_samples / shares if shares else math.nan,
        "k1": mean([r - t for t, r in pairs]),
        "k3": mean([math.expm1(t - r) - (t - r) for t, r in pairs]),
        "maximum": max((abs(t - r) for t, r in pairs), default=math.nan),
    }


def numbers(result: Result) -> dict[str, float]:
    return {field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name != "worst"}


@settings(deadline=None)
@given(st.lists(ROWS, max_size=5))
def test_every_number_is_what_its_definition_says(samples: list[list[Row]]) -> None:
    result = numbers(found(samples).result())
    for name, value in written_out(samples).items():
        assert result[name] == pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True), name


def test_a_mean_over_samples_is_slimes() -> None:
    """With every token finite: of each sample's mean, whatever its length."""
    samples = [[(-1.0, -2.0, True), (-1.0, -1.5, True), (-9.0, -1.0, False)], [(-3.0, -3.25, True)]]
    assert found(samples).result().sample_mean == pytest.approx((0.75 + 0.25) / 2)
    assert found(samples).result().mean == pytest.approx((1 + 0.5 + 0.25) / 3)


@settings(deadline=None)
@given(st.lists(SOUND, max_size=4), ANY, ANY, st.randoms(use_true_random=False))
def test_what_is_masked_does_not_matter(samples: list[list[Row]], train: float, rollout: float, rng: Any) -> None:
    without = [[row for row in rows if row[2]] for rows in samples]
    with_others = [list(rows) for rows in without]
    for rows in with_others:
        for _ in range(rng.randint(0, 3)):
            rows.insert(rng.randint(0, len(rows)), (train, rollout, False))
    some, other = found(without).result(), found(with_others).result()
    assert numbers(some) == pytest.approx(numbers(other), rel=1e-12, nan_ok=True)
    assert [token.difference for token in some.worst] == [token.difference for token in other.worst]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_counted_token_that_is_not_finite_is_reported_and_in_no_mean(bad: float, side: int) -> None:
    sound = [(-1.0, -1.5, True), (-2.0, -2.25, True)]
    pair = [-3.0, -3.0]
    pair[side] = bad
    result = found([[*sound, (*pair, True)]]).result()
    assert (result.tokens, result.nonfinite) == (2, 1)
    assert result.nonfinite_share == pytest.approx(1 / 3)
    assert (result.mean, result.sample_mean, result.maximum) == (0.375, 0.375, 0.5)
    assert result.worst[0].position == 2, "it is what to look at first"
    assert [token.position for token in result.worst] == [2, 0, 1]
    assert all(math.isfinite(value) for value in result.metrics().values())


# -- the estimators --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(FINITE, st.floats(-1e-3, 1e-3)), min_size=1, max_size=20))
def test_k3_is_never_negative_and_zero_only_without_a_difference(pairs: list[tuple[float, float]]) -> None:
    for train, off in pairs:
        whole = Discrepancy()
        row = torch.tensor([train], dtype=torch.float64)
        whole.add(row, row + off, torch.ones(1))
        result = whole.result()
        assert result.k3 >= 0
        actually = result.maximum
        if actually > 1e-7:
            assert result.k3 == pytest.approx(actually**2 / 2, rel=1e-2)


def test_both_estimate_the_kl_of_tokens_that_the_rollout_sampled() -> None:
    draw = torch.Generator().manual_seed(3)
    rollout, train = (torch.randn(50, generator=draw, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = float((rollout.exp() * (rollout - train)).sum())
    tokens = rollout.exp().multinomial(200_000, replacement=True, generator=draw)
    whole = Discrepancy()
    whole.add(train[tokens], rollout[tokens], torch.ones(len(tokens)))
    result = whole.result()
    assert result.k1 == pytest.approx(exact, rel=0.03)
    assert result.k3 == pytest.approx(exact, rel=0.03)


# -- merging ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(ROWS, max_size=8), st.integers(1, 4), st.randoms(use_true_random=False))
def test_parts_in_any_order_and_division_are_the_whole(samples: list[list[Row]], ranks: int, rng: Any) -> None:
    whole = found(samples)
    parts = [Discrepancy() for _ in range(ranks)]
    shuffled = list(enumerate(samples))
    rng.shuffle(shuffled)
    for index, rows in shuffled:
        rng.choice(parts).add(*columns(rows), sample=index)
    merged = Discrepancy()
    for part in parts:
        merged.merge(part)
    assert numbers(merged.result()) == pytest.approx(numbers(whole.result()), rel=1e-12, abs=1e-12, nan_ok=True)
    assert merged.samples == whole.samples == len(samples)
    one, other = (
        [token.difference for token in each.result().worst if math.isfinite(token.difference)]
        for each in (merged, whole)
    )
    assert one == other


@settings(deadline=None)
@given(SOUND, st.integers(1, 4), st.data())
def test_a_sample_cut_among_ranks_is_the_whole_sample(rows: list[Row], ranks: int, data: st.DataObject) -> None:
    train, rollout, mask = columns(rows)
    counted = mask.sum()
    owner = torch.tensor([data.draw(st.integers(0, ranks - 1)) for _ in rows], dtype=torch.int)
    merged = Discrepancy()
    for rank in range(ranks):
        part, mine = Discrepancy(), owner == rank
        places = torch.arange(len(rows))[mine]
        part.add(train[mine], rollout[mine], mask[mine], sample=0, positions=places, counted=counted)
        merged.merge(part)
    assert numbers(merged.result()) == pytest.approx(numbers(found([rows]).result()), rel=1e-12, nan_ok=True)


def test_merging_changes_nothing_in_what_is_merged() -> None:
    one, other = found([[(-1.0, -2.0, True)]]), found([[(-1.0, -4.0, True)]])
    before = numbers(other.result())
    whole = Discrepancy()
    for each in (one, other):
        whole.merge(each)
    whole.merge(other)
    assert numbers(other.result()) == before
    assert whole.result().tokens == 3


def test_without_torch_distributed_one_rank_is_all() -> None:
    one = found([[(-1.0, -2.0, True), (-1.0, math.nan, True)]])
    whole = reduced(one)
    assert whole is not one
    assert numbers(whole.result()) == numbers(one.result())
    whole.add(*columns([(-1.0, -9.0, True)]))
    assert (one.result().tokens, one.result().maximum) == (1, 1)


def test_the_state_of_a_rank_is_small_and_of_one_size() -> None:
    empty, some = Discrepancy(), found([[(-1.0, -2.0, True)] * 100] * 10)
    assert empty._sums.shape == some._sums.shape
    assert empty._sums.nbytes < 16 * 1024
    assert len(some._worst) == 5


# -- quantiles -------------------------------------------------------------------------------------------------------

LOWEST, HIGHEST = 2.0**OCTAVES.start, 2.0**OCTAVES.stop


def exact(values: list[float], share: float) -> float:
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]


def quantiles(values: list[float]) -> dict[float, float]:
    whole = Discrepancy()
    zeros = torch.zeros(len(values), dtype=torch.float64)
    whole.add(zeros, torch.tensor(values, dtype=torch.float64), torch.ones(len(values)))
    result = whole.result()
    return {0.5: result.p50, 0.99: result.p99, 0.999: result.p999}


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_a_quantile_is_within_the_resolution_of_an_exact_one(values: list[float]) -> None:
    for share, value in quantiles(values).items():
        expected = exact(values, share)
        if expected < LOWEST:
            assert value == 0
        elif expected < HIGHEST:
            assert value == pytest.approx(expected, rel=RESOLUTION)
        else:
            assert expected <= value == max(values)


@given(st.integers(OCTAVES.start, OCTAVES.stop - 1), st.integers(0, 31))
@settings(deadline=None)
def test_the_edges_of_a_bin_are_exact(octave: int, step: int) -> None:
    edge = math.ldexp(1 + step / 32, octave)
    lower, upper = (quantiles([value, 1e6])[0.5] for value in (math.nextafter(edge, 0), edge))
    assert lower < edge < upper or (octave == OCTAVES.start and step == 0 and lower == 0)
    assert upper <= edge * (1 + 1 / 32)


def test_no_difference_at_all_is_zero_and_nothing_to_compare_is_nan() -> None:
    same = found([[(-1.0, -1.0, True)] * 3]).result()
    assert (same.mean, same.k1, same.k3, same.p50, same.p999, same.maximum) == (0,) * 6
    assert same.tokens == 3
    nothing = found([[(-1.0, -2.0, False)]]).result()
    assert nothing.tokens == 0
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.p99)
    assert nothing.metrics("d/") == {"d/tokens": 0.0, "d/nonfinite": 0.0}
    assert nothing.worst == ()


def test_the_top_bin_is_read_as_the_maximum() -> None:
    assert quantiles([5e8, 7e8]) == {0.5: 7e8, 0.99: 7e8, 0.999: 7e8}
    assert BINS == 40 * 32 + 2


def test_sums_are_float64() -> None:
    """A float32 sum of so many tokens would stand still."""
    whole = Discrepancy()
    size = 1 << 22
    whole.add(torch.full((size,), -1.0), torch.full((size,), -1.0 - 2**-20), torch.ones(size))
    whole.add(torch.tensor([0.0]), torch.tensor([-256.0]), torch.ones(1))
    assert whole.result().mean * (size + 1) == pytest.approx(256 + 4, rel=1e-12)


# -- the worst tokens ------------------------------------------------------------------------------------------------


def test_the_worst_tokens_have_their_sample_place_and_id() -> None:
    whole = Discrepancy(worst=2)
    mask = torch.ones(3)
    whole.add(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.1, -4.0, -1.2]), mask, tokens=torch.tensor([7, 8, 9]))
    whole.add(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.5, -1.0, -9.0]), torch.tensor([1, 1, 0]), sample=70)
    first, second = whole.result().worst
    assert (first.sample, first.position, first.token, first.train, first.rollout) == (0, 1, 8, -1.0, -4.0)
    assert (second.sample, second.position, second.token, second.difference) == (70, 0, -1, 0.5)


# -- microbatches ----------------------------------------------------------------------------------------------------


def microbatch(responses: list[int], size: int, rank: int, padded: int | None = None) -> tuple[Any, Any]:
    """A microbatch as a context-parallel rank has it, and its log-probs; tokens and values tell each place."""
    draw = random.Random(1)
    batch: dict[str, list[Any]] = {
        name: []
        for name in (
            *("unconcat_tokens", "total_lengths", "response_lengths", "loss_masks", "rollout_log_probs"),
            *("sample_indices", "max_seq_lens"),
        )
    }
    log_probs = []
    for index, response in enumerate(responses):
        total = response + 1 + index
        train = -torch.tensor([draw.random() for _ in range(response)])
        rollout = train - torch.tensor([draw.random() for _ in range(response)])
        mask = torch.tensor([int(draw.random() > 0.3) for _ in range(response)], dtype=torch.int)
        parts = response_part(total, response, padded or total, size, rank)
        places = [place for part in parts for place in part]
        batch["unconcat_tokens"].append(torch.arange(100 * index, 100 * index + total))
        batch["total_lengths"].append(total)
        batch["response_lengths"].append(response)
        batch["loss_masks"].append(mask)
        batch["rollout_log_probs"].append(rollout[places])
        batch["sample_indices"].append(1000 + index)
        batch["max_seq_lens"].append(padded)
        log_probs.append(train[places])
    return batch, log_probs


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=4)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), st.booleans())
def test_a_microbatch_is_its_samples_on_any_number_of_context_parallel_ranks(
    responses: list[int], size: int, bshd: bool
) -> None:
    padded = max(responses) + len(responses) + 3 if bshd else None
    batch, log_probs = microbatch(responses, 1, 0)
    one_by_one = Discrepancy()
    pairs = zip(log_probs, batch["rollout_log_probs"], batch["loss_masks"], strict=True)
    for index, (train, rollout, mask) in enumerate(pairs):
        tokens = batch["unconcat_tokens"][index][-len(mask) :]
        one_by_one.add(train, rollout, mask, sample=1000 + index, tokens=tokens)
    args = Namespace(context_parallel_size=size, qkv_format="bshd" if bshd else "thd")
    merged = Discrepancy()
    for rank in range(size):
        part = Discrepancy()
        assert part.add_microbatch(args, *microbatch(responses, size, rank, padded), context_rank=rank)
        merged.merge(part)
    expected, result = one_by_one.result(), merged.result()
    assert numbers(result) == pytest.approx(numbers(expected), rel=1e-12, nan_ok=True)
    key = sorted((token.sample, token.position, token.token) for token in result.worst)
    assert key == sorted((token.sample, token.position, token.token) for token in expected.worst)


@pytest.mark.parametrize("name", ["rollout_mask_sums", "group_mask_sums"])
def test_samples_of_one_rollout_are_weighted_as_slime_weighs_them(name: str) -> None:
    """Two samples of one rollout, and one of another: slime divides the first two by the tokens of both."""
    batch, log_probs = microbatch([3, 4, 5], 1, 0)
    batch["loss_masks"] = [torch.ones(n, dtype=torch.int) for n in (3, 4, 5)]
    batch[name] = [torch.tensor(float(n)) for n in (7, 7, 5)]
    whole = Discrepancy()
    whole.add_microbatch(Namespace(context_parallel_size=1), batch, log_probs)
    differences = [(one - other).abs() for one, other in zip(log_probs, batch["rollout_log_probs"], strict=True)]
    expected = [torch.cat(differences[:2]).double().mean().item(), differences[2].double().mean().item()]
    assert whole.result().sample_mean == pytest.approx(statistics.fmean(expected))


def test_without_names_samples_are_numbered_through_all_microbatches() -> None:
    whole = Discrepancy(worst=9)
    for _ in range(2):
        batch, log_probs = microbatch([1, 1], 1, 0)
        batch["loss_masks"] = [torch.ones(1)] * 2
        del batch["sample_indices"]
        whole.add_microbatch(Namespace(context_parallel_size=1), batch, log_probs)
    assert sorted(token.sample for token in whole.result().worst) == [0, 1, 2, 3]


@pytest.mark.parametrize("absent", [None, []])
def test_a_rollout_without_log_probs_is_nothing_to_compare(absent: Any) -> None:
    batch, log_probs = microbatch([3], 1, 0)
    batch["rollout_log_probs"] = absent
    whole = Discrepancy()
    assert not whole.add_microbatch(Namespace(context_parallel_size=1), batch, log_probs)
    assert whole.result().tokens == 0


@pytest.mark.parametrize("name", ["loss_masks", "rollout_log_probs", "log_probs"])
def test_another_layout_than_slimes_is_refused(name: str) -> None:
    batch, log_probs = microbatch([9, 4], 2, 0)
    changed = log_probs if name == "log_probs" else batch[name]
    changed[0] = changed[0][:-1]
    with pytest.raises(UpstreamError, match="other response tokens") as caught:
        Discrepancy().add_microbatch(Namespace(context_parallel_size=2), batch, log_probs, context_rank=0)
    assert list(caught.value.facts) == [name]


def test_nothing_is_read_back_from_the_device_before_the_result() -> None:
    """A meta tensor has no values: whatever asked for one, as a boolean index does, would raise."""
    batch, log_probs = microbatch([3, 5], 2, 0)
    names = ("unconcat_tokens", "loss_masks", "rollout_log_probs")
    batch |= {name: [each.to("meta") for each in batch[name]] for name in names}
    one, other = Discrepancy(), Discrepancy()
    args = Namespace(context_parallel_size=2)
    one.add_microbatch(args, batch, [each.to("meta") for each in log_probs], context_rank=0)
    one.add(*(each.to("meta") for each in columns([(-1.0, -2.0, True)])))
    other.merge(one)
    assert other._sums.device.type == "meta"
    with pytest.raises((NotImplementedError, RuntimeError)):
        other.result()


# -- drift -----------------------------------------------------------------------------------------------------------


def rises(drift: Drift, values: list[float]) -> list[int]:
    return [step for step, value in enumerate(values) if drift.add(value)]


def test_the_drift_that_slime_was_reported_with_is_found_within_its_30_steps() -> None:
    drift, values = Drift(), [0.011 + 0.025 * step / 29 for step in range(30)]
    at = rises(drift, values)
    assert at
    assert at == list(range(at[0], 30)), "it stays"
    rise = drift.add(values[-1])
    assert rise is not None
    assert rise.step == 31
    assert rise.ratio == rise.last / rise.first > 2


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.floats(1e-5, 1))
def test_noise_and_single_outliers_are_no_drift(seed: int, level: float) -> None:
    draw = random.Random(seed)
    values = [level * draw.uniform(0.75, 1.25) for _ in range(100)]
    for step in range(3, 100, 7):
        values[step] *= 50
    assert not rises(Drift(), values)


def test_what_comes_before_the_first_window_is_left_out_and_windows_share_no_step() -> None:
    drift = Drift(window=3, warm_up=2, factor=1.5, floor=0)
    assert rises(drift, [0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0]) == []
    rise = drift.add(2.0)
    assert rise is not None
    assert (rise.step, rise.first, rise.last, rise.ratio) == (8, 1.0, 2.0, 2.0)


def test_a_difference_that_began_with_nothing_is_a_drift_above_the_floor_only() -> None:
    assert not rises(Drift(), [0.0] * 10 + [9e-5] * 20)
    drift = Drift()
    assert rises(drift, [0.0] * 10 + [2e-4] * 20)
    assert (rise := drift.add(2e-4)) is not None
    assert rise.ratio == math.inf


def test_a_step_without_a_number_is_no_step() -> None:
    drift = Drift(window=1, warm_up=0)
    assert rises(drift, [math.nan, 0.01, math.inf, math.nan]) == []
    assert drift.steps == 1
    assert drift.add(0.03) is not None
