"""What the draft is trained on: against a definition that is written token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from miles_plugins import Microbatch, PluginError  # noqa: E402
from miles_plugins.packing import Packing  # noqa: E402
from miles_plugins.spec_rl.draft_loss import (  # noqa: E402
    CONVENTIONS,
    Targets,
    make_targets,
    targets_of,
    trained_tokens,
)

Sample = tuple[int, list[int]]
"""Length of the prompt, and the loss mask of the response."""


@st.composite
def samples(draw: Any) -> list[Sample]:
    one = st.tuples(st.integers(0, 9), st.lists(st.integers(0, 1), max_size=9)).filter(lambda s: s[0] + len(s[1]) > 0)
    return draw(st.lists(one, min_size=1, max_size=5))


def made(
    sizes: list[Sample], packing: Packing | None = None, rank: int = 0, depths: int = 1, convention: str = "correct"
) -> Targets:
    """Each token's id is 1 + its place in the samples' concatenation."""
    packing = packing or Packing()
    lengths = [prompt + len(mask) for prompt, mask in sizes]
    return make_targets(
        torch.arange(sum(lengths)) + 1,
        torch.tensor([0, *lengths]).cumsum(0),
        trained_tokens(lengths, [len(mask) for _, mask in sizes], [torch.tensor(mask) for _, mask in sizes]),
        packing.positions(lengths, rank),
        depths,
        ranks=packing.context_parallel,
        convention=convention,
    )


def by_hand(sizes: list[Sample], depth: int, convention: str) -> dict[int, tuple[int, int, bool]]:
    """Place in the concatenation -> (token given, token to be predicted, whether it is trained); 0: there is none."""
    found = {}
    begin = 0
    for prompt, mask in sizes:
        wanted = [0] * prompt + mask
        for place in range(len(wanted)):
            given, label, decides = (
                place + ahead for ahead in (depth, depth + 1, depth + (1 if convention == "correct" else 2))
            )
            found[begin + place] = (
                1 + begin + given if given < len(wanted) else 0,
                1 + begin + label if label < len(wanted) else 0,
                decides < len(wanted) and bool(wanted[decides]),
            )
        begin += len(wanted)
    return found


packings = st.builds(
    Packing, context_parallel=st.sampled_from([1, 2, 4]), multiple=st.integers(1, 7), tensor_parallel=st.just(1)
)


@settings(max_examples=200, deadline=None)
@given(samples(), packings, st.integers(1, 3), st.sampled_from(CONVENTIONS))
def test_every_position_of_every_rank(sizes: list[Sample], packing: Packing, depths: int, convention: str) -> None:
    lengths = [prompt + len(mask) for prompt, mask in sizes]
    for rank in range(packing.context_parallel):
        targets = made(sizes, packing, rank, depths, convention)
        places = packing.positions(lengths, rank).tolist()
        for depth in range(1, depths + 1):
            expected = by_hand(sizes, depth, convention)
            rows = [part[depth - 1][0].tolist() for part in (targets.inputs, targets.labels, targets.masks)]
            assert list(zip(*rows, strict=True)) == [expected.get(place, (0, 0, False)) for place in places]
            if convention == "correct":
                assert targets.counts[depth - 1] == sum(trained for *_, trained in expected.values())
            else:
                assert targets.counts[depth - 1] == targets.masks[depth - 1].sum()


@settings(max_examples=100, deadline=None)
@given(samples(), packings, st.integers(1, 3))
def test_the_ranks_parts_make_the_whole(sizes: list[Sample], packing: Packing, depth: int) -> None:
    lengths = [prompt + len(mask) for prompt, mask in sizes]
    of_tokens = torch.rand(sum(lengths), dtype=torch.float64)
    whole = made(sizes, depths=depth).mean(depth, of_tokens[None])
    parts, totals = [], []
    for rank in range(packing.context_parallel):
        targets = made(sizes, packing, rank, depth)
        losses = of_tokens[packing.positions(lengths, rank)][None]
        parts.append(targets.mean(depth, losses))
        totals.append(targets.total(depth, losses))
    torch.testing.assert_close(sum(parts) / len(parts), whole)
    torch.testing.assert_close(sum(totals), made(sizes, depths=depth).total(depth, of_tokens[None]))


@settings(max_examples=100, deadline=None)
@given(samples(), st.integers(1, 2))
def test_exactly_the_response_is_learnt(sizes: list[Sample], depth: int) -> None:
    """Its first token and its last one too; only a sample's first tokens have no position to be predicted from."""
    targets = made(sizes, depths=depth)
    learnt = targets.labels[-1][targets.masks[-1]].tolist()
    expected, begin = [], 0
    for prompt, mask in sizes:
        wanted = [0] * prompt + mask
        expected += [1 + begin + place for place in range(depth + 1, len(wanted)) if wanted[place]]
        begin += len(wanted)
    assert learnt == expected


def test_a_prompt_of_four_of_twelve() -> None:
    """The example of the research notes: what the image trains, and what the response is."""
    learnt = {}
    for convention in CONVENTIONS:
        targets = made([(4, [1] * 8)], convention=convention)
        learnt[convention] = [token - 1 for token in targets.labels[0][targets.masks[0]].tolist()]
    assert learnt == {"correct": [4, 5, 6, 7, 8, 9, 10, 11], "docker": [3, 4, 5, 6, 7, 8, 9, 10]}


def test_a_tools_answer_between_two_turns() -> None:
    targets = made([(3, [1, 1, 0, 0, 1])])
    assert [token - 1 for token in targets.labels[0][targets.masks[0]].tolist()] == [3, 4, 7]


@pytest.mark.parametrize("sizes", [[(5, [0, 0])], [(1, [1])], [(3, [])]], ids=["masked", "two tokens", "no response"])
def test_nothing_to_learn_is_exactly_zero(sizes: list[Sample]) -> None:
    targets = made(sizes)
    losses = torch.full((1, targets.labels[0].shape[1]), math.inf, requires_grad=True)
    for loss in (targets.mean(1, losses), targets.total(1, losses)):
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, losses)
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_rank_with_nothing_to_learn_is_exactly_zero() -> None:
    """Of 16 tokens the second rank has the middle ones: here a prompt."""
    packing = Packing(context_parallel=2)
    sizes = [(14, [1, 1])]
    ranks = [made(sizes, packing, rank) for rank in range(2)]
    losses = torch.ones(1, 8)
    assert [targets.mean(1, losses).item() for targets in ranks] == [2.0, 0.0]


def test_of_slimes_microbatch() -> None:
    batch = {
        "unconcat_tokens": [torch.arange(1, 8), torch.arange(8, 12)],
        "response_lengths": [3, 2],
        "loss_masks": [torch.tensor([1, 0, 1]), torch.ones(2)],
    }
    packing = Packing(context_parallel=2, multiple=3)
    for rank in range(2):
        stream = packing.positions([7, 4], rank)
        found = targets_of(Microbatch(batch, stream[:2], 0, stream), depths=2, ranks=2)
        expected = made([(4, [1, 0, 1]), (2, [1, 1])], packing, rank, depths=2)
        for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
            assert one == other if isinstance(one, int) else all(map(torch.equal, one, other))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(PluginError, match="does not fit its sample"):
        trained_tokens([5], [2], [torch.ones(3)])
    with pytest.raises(PluginError, match="no such convention"):
        made([(1, [1])], convention="dokcer")
    assert len(trained_tokens([], [], [])) == 0
