"""Acceptance: what every SGLang tells of it, what it amounts to over a rollout, and when it is reported as falling."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plugins.spec_rl import accept
from miles_plugins.spec_rl.accept import Counts, Decay, Tally

LEGACY = {"spec_accept_token_num": 6, "spec_draft_token_num": 12, "spec_verify_ct": 4, "completion_tokens": 10}
NEW = {"spec_num_correct_drafts": 6, "spec_num_proposed_drafts": 12, "spec_verify_ct": 4, "completion_tokens": 10}
ALIASES = {"spec_accepted_drafts": 6, "spec_proposed_drafts": 12}
NONE: dict[str, Any] = {"completion_tokens": 1}

# As SGLang's tokenizer managers write them.
RELEASES = {
    "0.5.9": {**LEGACY, "spec_accept_rate": 0.5, "spec_accept_length": 2.5, "spec_accept_histogram": [1, 1, 1, 1]},
    "0.5.12.post1": {**NEW, **ALIASES, "spec_accept_rate": 0.5, "spec_accept_length": 2.5},
    "0.5.15.post1": {**NEW, **ALIASES, "spec_accept_rate": 0.5, "spec_accept_length": 2.5},
    "0.5.23": {**NEW, "spec_accept_rate": 0.5, "spec_accept_length": 2.5, "spec_cap_length": 3.0},
}


@dataclass
class Info:
    spec_accept_token_num: int = 0
    spec_draft_token_num: int = 0
    spec_verify_ct: int = 0
    completion_token_num: int = 0


@dataclass  # as slime's: with equality, so without a hash
class Sample:
    spec_info: Info = field(default_factory=Info)
    weight_versions: list[str] = field(default_factory=list)


@pytest.mark.parametrize("release", RELEASES)
def test_the_counts_of_every_release_are_read(release: str) -> None:
    found = accept.read(RELEASES[release])
    assert found == Counts(6, 12, 4, 10)
    assert found.rate == RELEASES[release]["spec_accept_rate"]
    assert found.length == RELEASES[release]["spec_accept_length"]


@pytest.mark.parametrize("release", RELEASES)
def test_slime_gets_them_by_the_names_it_reads(release: str) -> None:
    assert accept.slimes(RELEASES[release]) == LEGACY


@pytest.mark.parametrize("nothing", [{}, NONE, {**NEW, "spec_verify_ct": 0}, {**LEGACY, "spec_verify_ct": None}])
def test_a_response_that_was_never_verified_counts_as_nothing(nothing: dict[str, Any]) -> None:
    found = accept.read(nothing)
    assert found == Counts()
    assert (found.rate, found.length) == (None, None)
    assert set(accept.slimes(nothing).values()) == {0}


@st.composite
def meta_infos(draw: Any) -> dict[str, Any]:
    passes, drafts = draw(st.integers(0, 50)), draw(st.integers(1, 7))
    accepted = draw(st.integers(0, passes * drafts))
    names = draw(st.sampled_from([tuple(LEGACY)[:2], tuple(NEW)[:2], tuple(ALIASES)]))
    version = draw(st.sampled_from(["1", "2", "9", "default", None]))
    told = {names[0]: accepted, names[1]: passes * drafts, "spec_verify_ct": passes} if passes else {}
    return {**told, "completion_tokens": accepted + passes + 1, "weight_version": version}


@given(st.lists(st.lists(meta_infos(), max_size=4), max_size=5))
def test_all_parts_of_all_samples_are_in_the_sum_once(parts: list[list[dict[str, Any]]]) -> None:
    tally, samples = Tally(), [Sample() for _ in parts]
    for sample, each in zip(samples, parts, strict=True):
        for meta_info in each:
            tally.add(sample, meta_info)
    every = [meta_info for each in parts for meta_info in each]
    found = tally.by_version(samples)
    assert accept.total(found.values()) == accept.total(map(accept.read, every))
    for version, counts in found.items():
        of_version = [each for each in every if str(each["weight_version"] or accept.UNKNOWN) == version]
        assert counts == accept.total(map(accept.read, of_version))


def test_means_are_of_tokens_not_of_samples() -> None:
    """A long response with 3 tokens a pass, and a short one with 1."""
    tally, long, short = Tally(), Sample(), Sample()
    tally.add(long, {**NEW, "spec_verify_ct": 100, "completion_tokens": 300})
    tally.add(short, {**NEW, "spec_verify_ct": 2, "completion_tokens": 2})
    found = accept.metrics(tally.by_version([long, short]))
    assert found["spec/accept_length"] == 302 / 102
    assert found["spec/accept_rate"] == 0.5


def test_samples_that_are_not_trained_on_are_not_counted() -> None:
    tally, trained, dropped = Tally(), Sample(), Sample()
    for sample in (trained, dropped):
        tally.add(sample, NEW)
    assert accept.total(tally.by_version([trained]).values()) == accept.read(NEW)


def test_a_samples_counts_go_with_it() -> None:
    tally = Tally()
    kept = [Sample() for _ in range(3)]
    for sample in (*kept, *(Sample() for _ in range(50))):
        tally.add(sample, NEW)
    del sample
    gc.collect()
    assert len(tally) == 3


def test_a_copied_sample_has_what_slime_counted() -> None:
    tally, sample = Tally(), Sample(Info(1, 4, 2, 5), ["3", "3"])
    tally.add(sample, {**NEW, "weight_version": "3"})
    assert tally.by_version([copy.deepcopy(sample)]) == {"3": Counts(1, 4, 2, 5)}
    sample.weight_versions.append("4")
    assert tally.by_version([copy.deepcopy(sample)]) == {accept.UNKNOWN: Counts(1, 4, 2, 5)}
    assert tally.by_version([SimpleNamespace()]) == {}


def test_older_weights_are_told_from_newer_ones() -> None:
    found = accept.metrics({"9": Counts(0, 3, 1, 1), "11": Counts(2, 3, 1, 3), accept.UNKNOWN: Counts(0, 3, 1, 2)})
    assert found["spec/accept_length"] == 2
    assert {name: value for name, value in found.items() if "lag" in name} == {
        "spec/accept_length/lag_0": 3,
        "spec/accept_length/lag_2": 1,
    }
    assert not any("lag" in name for name in accept.metrics({"9": Counts(1, 3, 1, 2)}))
    assert accept.metrics({}) == {}


def test_slimes_own_numbers_are_means_of_samples() -> None:
    info = SimpleNamespace(spec_accept_rate=0.5, spec_accept_length=3.0, spec_verify_ct=2)
    none = SimpleNamespace(spec_accept_rate=0.0, spec_accept_length=0.0, spec_verify_ct=0)
    samples = [SimpleNamespace(spec_info=each) for each in (info, none)]
    assert accept.slimes_metrics(samples) == {"spec_accept_rate": 0.25, "spec_accept_length": 1.5}
    assert accept.slimes_metrics(samples[1:]) == {}


# -- what it saves ---------------------------------------------------------------------------------------------------


def test_the_speed_up_is_the_documented_formula() -> None:
    assert accept.relative_draft_cost(3, 36) == pytest.approx(3 / 36)
    assert accept.speed_up(2.6, accept.relative_draft_cost(3, 10)) == pytest.approx(2.0)
    assert accept.metrics({"1": Counts(0, 3, 10, 26)}, 0.3)["spec/estimated_speed_up"] == pytest.approx(2.0)
    assert accept.speed_up(1.0, 0.1) < 1, "a draft that is never right costs"


# -- decay -----------------------------------------------------------------------------------------------------------


def warnings(lengths: list[float], **rule: Any) -> list[int]:
    decay = Decay(**rule)
    return [step for step, length in enumerate(lengths) if decay.add(length) is not None]


def test_a_fall_is_reported_once_and_again_when_it_goes_on() -> None:
    # Averages of two of the gain: 2, 2, 2, 1.5 (warned at 0.75 of the best), 1 (0.67 of that), 1
    assert warnings([3, 3, 3, 3, 2, 2, 2], window=2) == [4, 5]
    assert warnings([3, 3, 2, 2, 3, 3, 2, 2], window=2, share=0.7) == [3, 7]


def test_one_bad_rollout_is_no_decay() -> None:
    assert warnings([3] * 10 + [2.2] + [3] * 10) == []


@given(st.lists(st.floats(1, 8), max_size=40).map(sorted))
def test_acceptance_that_does_not_fall_is_never_reported(lengths: list[float]) -> None:
    assert warnings(lengths) == []


@given(st.floats(1.5, 8), st.floats(0, 0.75))
def test_a_lasting_fall_of_a_quarter_is_always_reported(length: float, left: float) -> None:
    assert warnings([length] * 5 + [1 + (length - 1) * left] * 5) != []


def test_a_warning_says_from_where_to_where() -> None:
    decay = Decay(window=1)
    decay.add(3.0)
    assert "to 1.50 (mean of 1 rollouts) from 3.00" in str(decay.add(1.5))
