"""Where tokens go: the packed layout is slime's own, and each rank is handed the routing of its tokens and layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import Packing, PluginError, Rank, Schedule
from miles_plugins.r3_replay import shards
from miles_plugins.r3_replay.trace import Routing

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]

# 1: one token, which has no routing; below 2 * context_parallel: chunks that are padding only.
LENGTHS = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 19)), min_size=1, max_size=5)


@st.composite
def packings(draw: st.DrawFn) -> Packing:
    tensor = draw(st.sampled_from([1, 2, 4]))
    return Packing(
        context_parallel=draw(st.sampled_from([1, 2, 4])),
        tensor_parallel=tensor,
        sequence_parallel=draw(st.booleans()),
        multiple=tensor * draw(st.sampled_from([1, 3, 8, 128])),
        all_gather=draw(st.booleans()),
    )


# -- the layout by itself --------------------------------------------------------------------------------------------


def in_order(packing: Packing, lengths: list[int]) -> list[int]:
    """The positions of a packed microbatch, put together again from what the ranks hold, as attention does it."""
    ranks = []
    for context in range(packing.context_parallel):
        tensor_ranks = range(packing.tensor_parallel if packing.sequence_parallel else 1)
        stream = packing.positions(lengths, context)
        ranks.append([int(p) for tensor in tensor_ranks for p in packing.local(stream, tensor)])
    if packing.all_gather or packing.context_parallel == 1:
        return [position for rank in ranks for position in rank]
    found, begin = [], 0
    for length in lengths:
        chunk = -(-length // (2 * packing.context_parallel))
        firsts = [rank[begin : begin + chunk] for rank in ranks]
        seconds = [rank[begin + chunk : begin + 2 * chunk] for rank in ranks]
        for part in (*firsts, *reversed(seconds)):
            found += part
        begin += 2 * chunk
    return found + [position for rank in ranks for position in rank[begin:]]


@settings(max_examples=300, deadline=None)
@given(packings(), LENGTHS)
def test_every_token_is_at_one_place_and_all_together_are_in_order(packing: Packing, lengths: list[int]) -> None:
    whole = in_order(packing, lengths)
    assert [position for position in whole if position >= 0] == list(range(sum(lengths)))
    assert set(whole) - set(range(sum(lengths))) <= {-1}


@settings(max_examples=200, deadline=None)
@given(packings(), LENGTHS)
def test_every_rank_holds_as_many_tokens_and_no_more_padding_than_slime_asks_for(
    packing: Packing, lengths: list[int]
) -> None:
    streams = [packing.positions(lengths, context) for context in range(packing.context_parallel)]
    (length,) = {len(stream) for stream in streams}
    assert length % packing.multiple == 0
    parts = [len(packing.local(streams[context], tensor)) for context, tensor in packing.token_ranks]
    assert set(parts) == {length // (packing.tensor_parallel if packing.sequence_parallel else 1)}
    chunks = 1 if packing.all_gather or packing.context_parallel == 1 else 2 * packing.context_parallel
    each = sum(-(-sample // chunks) * chunks for sample in lengths)
    assert length * packing.context_parallel - each < packing.multiple * packing.context_parallel


@settings(max_examples=100, deadline=None)
@given(packings(), LENGTHS)
def test_the_ranks_that_see_different_tokens_are_listed_once(packing: Packing, lengths: list[int]) -> None:
    assert len(set(packing.token_ranks)) == len(packing.token_ranks)
    seen = [
        int(position)
        for context, tensor in packing.token_ranks
        for position in packing.local(packing.positions(lengths, context), tensor)
        if position >= 0
    ]
    assert sorted(seen) == list(range(sum(lengths)))


def test_without_sequence_parallelism_tensor_ranks_see_the_same_tokens() -> None:
    packing = Packing(tensor_parallel=2, multiple=2)
    stream = packing.positions([3])
    assert stream.tolist() == [0, 1, 2, -1]
    assert packing.local(stream, 0).tolist() == packing.local(stream, 1).tolist() == stream.tolist()
    assert packing.token_ranks == [(0, 0)]


def test_the_layout_is_in_slimes_arguments() -> None:
    args = Namespace(
        context_parallel_size=2,
        tensor_model_parallel_size=4,
        sequence_parallel=True,
        data_pad_size_multiplier=128,
        allgather_cp=True,
    )
    assert Packing.of(args) == Packing(2, 4, True, 512, True)


# -- the layout is slime's -------------------------------------------------------------------------------------------

# Every token is coded by its position and every expert by position, layer and place; both go through slime's own
# functions and through ours. One process for all: importing slime takes longer than all of it.
COMPARE = """
import itertools, json, random
import torch

RANK = dict(context=0, contexts=1, tensor=0, tensors=1)
torch.cuda.current_device = lambda: torch.device("cpu")
torch.Tensor.cuda = lambda self, *args, **kwargs: self
from megatron.core import mpu

mpu.get_context_parallel_rank = lambda: RANK["context"]
mpu.get_context_parallel_world_size = lambda: RANK["contexts"]
mpu.get_tensor_model_parallel_rank = lambda: RANK["tensor"]
mpu.get_tensor_model_parallel_world_size = lambda: RANK["tensors"]
from slime.backends.megatron_utils.cp_utils import prepare_routed_experts_for_routing_replay
from slime.backends.megatron_utils.data import DataIterator, get_batch

from argparse import Namespace
from miles_plugins import Packing, Rank, Schedule
from miles_plugins.patches.slime.training import token_positions
from miles_plugins.r3_replay import shards
from miles_plugins.r3_replay.trace import Routing

LAYERS, TOPK, EXPERTS = 2, 3, 30_000
routing = Routing(tuple(range(LAYERS)), TOPK, EXPERTS)
KEYS = ["tokens", "loss_masks", "total_lengths", "response_lengths"]

def slimes(tokens, experts, args):
    lengths = [len(each) for each in tokens]
    data = {"tokens": tokens, "loss_masks": [torch.ones(n - 1) for n in lengths], "total_lengths": lengths,
            "response_lengths": [n - 1 for n in lengths]}
    iterator = DataIterator(data, [list(range(len(tokens)))])
    batch = get_batch(iterator, KEYS, args.data_pad_size_multiplier, args.allgather_cp)
    replay = prepare_routed_experts_for_routing_replay(
        experts, tokens, num_experts=EXPERTS, data_pad_size_multiplier=args.data_pad_size_multiplier,
        sequence_parallel=args.sequence_parallel, allgather_cp=args.allgather_cp)
    return batch, replay

def compare(lengths, args):
    packing, wrong = Packing.of(args), []
    total = sum(lengths)
    tokens = list(torch.arange(1, total + 1).split(lengths))  # slime pads with 0
    coded = torch.arange(total * LAYERS * TOPK, dtype=torch.int16).reshape(total, LAYERS, TOPK)
    experts = [each[:-1].clone() for each in coded.split(lengths)]
    last = {sum(lengths[: n + 1]) - 1 for n in range(len(lengths))}
    (cuts,) = shards.cut(experts, Schedule(lengths, [[list(range(len(lengths)))]]), packing, routing, False)
    for RANK["context"], RANK["tensor"] in itertools.product(range(RANK["contexts"]), range(RANK["tensors"])):
        batch, replay = slimes(tokens, [each.int() for each in experts], args)
        stream = batch["tokens"].reshape(-1)
        positions = packing.positions(lengths, RANK["context"])
        local = packing.local(positions, RANK["tensor"])
        rank = Rank(0, RANK["context"], RANK["tensor"])
        (name,) = shards.names(rank, packing, range(LAYERS), False)
        mine = torch.from_numpy(cuts[name][0])
        real = torch.tensor([int(p) >= 0 and int(p) not in last for p in local], dtype=torch.bool)
        token_positions(args, batch)  # raises unless it is slime's layout
        facts = {
            "tokens": torch.equal(stream, positions + 1),
            "length": len(replay) == len(local) == len(mine),
            "experts": torch.equal(replay[real].long(), mine[real].long()),
            "coded": torch.equal(mine[real], coded[local[real]]),
        }
        wrong += [[name, lengths, vars(args), dict(RANK)] for name, holds in facts.items() if not holds]
    return wrong

random.seed(5)
wrong, count = [], 0
layouts = itertools.product((1, 2, 4), (1, 2, 4), (False, True), (False, True), (1, 3, 128))
for contexts, tensors, sequence, all_gather, pad in layouts:
    RANK.update(contexts=contexts, tensors=tensors)
    args = Namespace(context_parallel_size=contexts, tensor_model_parallel_size=tensors, sequence_parallel=sequence,
                     data_pad_size_multiplier=pad, allgather_cp=all_gather)
    fixed = [[1], [2, 1, 7], [3, 8, 5, 16]]
    chosen = [[random.randint(1, 19) for _ in range(random.randint(1, 5))] for _ in range(2)]
    for lengths in fixed + chosen:
        wrong += compare(lengths, args)
        count += 1
print(json.dumps({"compared": count, "wrong": wrong[:5]}))
"""


@pytest.mark.upstream
def test_slimes_own_code_puts_coded_tokens_and_experts_at_the_same_places(upstream_path: str) -> None:
    path = os.pathsep.join([upstream_path, str(ROOT)])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MILES_PLUGINS")}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env={**inherited, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["compared"] == 3 * 3 * 2 * 2 * 3 * 5


# -- what each rank is handed ----------------------------------------------------------------------------------------


def recorded_rows(length: int) -> st.SearchStrategy[int]:
    """Mostly one for each token but the last; fewer where a conversation ends on what no engine saw."""
    return st.one_of(st.just(length - 1), st.integers(0, length - 1))


class Rollout:
    """Samples with random routing, scheduled at random over data-parallel ranks and microbatches."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.packing = draw(packings())
        layers = draw(st.integers(1, 4))
        topk = draw(st.integers(1, 3))
        self.routing = Routing(tuple(range(3, 3 + layers)), topk, draw(st.sampled_from([topk + 1, 8, 300])))
        count = draw(st.integers(1, 6))
        lengths = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        dropped = draw(st.sets(st.integers(0, count - 1), max_size=2))
        self.traces = [
            None if index in dropped else self._trace(draw(recorded_rows(length)), generator)
            for index, length in enumerate(lengths)
        ]
        self.lists = [None if trace is None else trace.tolist() for trace in self.traces]
        order = draw(st.permutations(range(count)))
        data_ranks = draw(st.integers(1, 2))
        each = draw(st.integers(1, 3))
        of_ranks = [list(order[rank::data_ranks]) for rank in range(data_ranks)]
        microbatches = [[mine[at : at + each] for at in range(0, len(mine), each)] for mine in of_ranks]
        self.schedule = Schedule(lengths, microbatches)

    def _trace(self, rows: int, generator: Any) -> Any:
        scores = torch.rand(rows, len(self.routing.layers), self.routing.experts, generator=generator)
        return self.routing.narrow(scores.topk(self.routing.topk, dim=-1).indices)

    def ranks(self) -> list[Rank]:
        """Every trainer, also the tensor ranks that see the same tokens."""
        packing = self.packing
        return [
            Rank(data, context, tensor)
            for data in range(len(self.schedule.microbatches))
            for context in range(packing.context_parallel)
            for tensor in range(packing.tensor_parallel)
        ]

    def expected(self, samples: list[int], position: int) -> tuple[Any, bool]:
        """[MoE layers, topk] of a token of a microbatch, None if it has no routing; and whether it has a choice."""
        for index in samples if position >= 0 else ():
            length = self.schedule.lengths[index]
            if position < length:
                trace = self.lists[index] or []
                return (trace[position] if position < len(trace) else None), position < length - 1
            position -= length
        return None, False  # padding


rollouts = st.composite(lambda draw: Rollout(draw))


@settings(max_examples=80, deadline=None)
@given(rollouts(), st.booleans(), st.data())
def test_each_rank_is_handed_the_routing_of_its_own_tokens_and_layers(
    rollout: Rollout, by_layer: bool, data: st.DataObject
) -> None:
    packing, schedule, routing = rollout.packing, rollout.schedule, rollout.routing
    cuts = shards.cut(rollout.traces, schedule, packing, routing, by_layer)
    assert len(cuts) == len(schedule.microbatches)
    every = list(range(len(routing.layers)))
    layers = sorted(data.draw(st.sets(st.sampled_from(every)))) if by_layer else every  # none: a stage without experts
    for rank in rollout.ranks():
        mine = schedule.microbatches[rank.data]
        names = shards.names(rank, packing, layers, by_layer)
        if not mine:
            continue
        shard = shards.Shard(mine, [cuts[rank.data][name] for name in names], by_layer)
        for samples in mine:
            lengths = [schedule.lengths[index] for index in samples]
            rows = [0 if rollout.traces[index] is None else len(rollout.traces[index]) for index in samples]
            local = packing.local(packing.positions(lengths, rank.context), rank.tensor)
            taken = shard.take(samples, local)
            tokens, recorded = shards.which_count(lengths, rows, local)
            assert len(taken) == len(layers)
            if not layers:
                continue
            assert taken.shape == (len(layers), len(local), routing.topk)
            assert taken.dtype == (torch.uint8 if routing.experts <= 256 else torch.int16)
            known = [rollout.expected(samples, position) for position in local.tolist()]
            assert tokens.tolist() == [choice for _, choice in known]
            assert recorded.tolist() == [expected is not None for expected, _ in known]
            for found, (expected, _) in zip(taken.transpose(0, 1).tolist(), known, strict=True):
                if expected is not None:
                    assert found == [expected[layer] for layer in layers]
                else:  # still something that a dispatcher can count on
                    assert all(len(set(experts)) == routing.topk for experts in found)
                    assert all(0 <= expert < routing.experts for experts in found for expert in experts)


@settings(max_examples=100, deadline=None)
@given(rollouts(), st.booleans())
def test_a_rank_asks_for_its_own_part_and_nothing_is_cut_in_vain(rollout: Rollout, by_layer: bool) -> None:
    packing, routing = rollout.packing, rollout.routing
    cuts = shards.cut(rollout.traces, rollout.schedule, packing, routing, by_layer)
    every = range(len(routing.layers))
    asked: dict[int, dict[str, tuple[int, int]]] = {}
    for rank in rollout.ranks():
        names = shards.names(rank, packing, every, by_layer)
        assert len(names) == (len(every) if by_layer else 1)
        if by_layer:
            assert [shards.names(rank, packing, [layer], True) for layer in every] == [[name] for name in names]
        tokens = (rank.context, rank.tensor if packing.sequence_parallel else 0)
        for name in names:
            assert asked.setdefault(rank.data, {}).setdefault(name, tokens) == tokens, "of other tokens"
    for data, of_rank in enumerate(cuts):
        assert set(of_rank) == (set(asked[data]) if rollout.schedule.microbatches[data] else set())


def test_a_rank_without_samples_is_given_an_empty_cut() -> None:
    cuts = shards.cut([], Schedule([], [[[]]], scheduled=False), Packing(), Routing((0, 2), 2, 8), by_layer=False)
    ((only,),) = cuts[0].values()
    assert only.shape == (0, 2, 2)


@settings(max_examples=60, deadline=None)
@given(rollouts(), st.booleans(), st.randoms(use_true_random=False))
def test_trainers_that_choose_their_microbatches_take_the_routing_of_their_own_tokens(
    rollout: Rollout, by_layer: bool, chance: Any
) -> None:
    """slime before v0.3.0: the rollout manager knows whose a sample is, and no more."""
    packing, routing = rollout.packing, rollout.routing
    of_ranks = [[sample for samples in of_rank for sample in samples] for of_rank in rollout.schedule.microbatches]
    schedule = Schedule(rollout.schedule.lengths, [[samples] for samples in of_ranks], scheduled=False)
    cuts = shards.cut(rollout.traces, schedule, Packing(), routing, by_layer)
    every = list(range(len(routing.layers)))
    for rank in rollout.ranks():
        if not (mine := list(of_ranks[rank.data])):
            continue
        fetched = [cuts[rank.data][name] for name in shards.names(Rank(rank.data), Packing(), every, by_layer)]
        lengths = {sample: schedule.lengths[sample] for sample in mine}
        shard = shards.UnscheduledShard(lengths, fetched, by_layer, routing)
        chance.shuffle(mine)
        while mine:
            samples, mine = mine[: (count := chance.randint(1, len(mine)))], mine[count:]
            local = packing.local(packing.positions([lengths[sample] for sample in samples], rank.context), rank.tensor)
            taken = shard.take(samples, local)
            assert taken.shape == (len(every), len(local), routing.topk)
            assert taken.dtype == (torch.uint8 if routing.experts <= 256 else torch.int16)
            for found, position in zip(taken.transpose(0, 1).tolist(), local.tolist(), strict=True):
                expected, _ = rollout.expected(samples, position)
                assert found == expected or expected is None
                assert all(len(set(experts)) == routing.topk for experts in found)
            shard.let_go()
            with pytest.raises(PluginError, match="or was trained on before"):
                shard.take(samples, local)
            shard.begin()


def unrecorded(traces: list[Any], lengths: list[int], packing: Packing, routing: Routing) -> list[int]:
    """The experts, one number each, of the tokens of one microbatch without a record, in the first MoE layer."""
    schedule = Schedule(lengths, [[list(range(len(lengths)))]])
    (cuts,) = shards.cut(traces, schedule, packing, routing, False)
    found = []
    for context, tensor in packing.token_ranks:
        local = packing.local(packing.positions(lengths, context), tensor)
        (name,) = shards.names(Rank(0, context, tensor), packing, [0], False)
        rows = [0 if trace is None else len(trace) for trace in traces]
        _, recorded = shards.which_count(lengths, rows, local)
        found += cuts[name][0][~recorded.numpy(), 0].reshape(-1).tolist()
    return found


@pytest.mark.parametrize(
    ("lengths", "dropped", "packing"),
    [
        ([4], set(), Packing(multiple=64)),
        ([5, 5, 5, 5, 5, 5, 5, 5], set(), Packing()),
        ([9, 16], {0, 1}, Packing()),
        ([7, 3, 12, 5], {2}, Packing(2, 2, True, 16)),
    ],
    ids=["padding", "last tokens of samples", "masked samples", "all of it"],
)
def test_tokens_without_a_record_are_spread_evenly_over_the_experts(
    lengths: list[int], dropped: set[int], packing: Packing
) -> None:
    routing = Routing((0,), 2, 8)
    traces = [
        None if index in dropped else torch.zeros(length - 1, 1, 2, dtype=torch.uint8)
        for index, length in enumerate(lengths)
    ]
    found = unrecorded(traces, lengths, packing, routing)
    load = [found.count(expert) for expert in range(routing.experts)]
    # The microbatch's own tokens and each rank's padding are each as even as whole numbers can be.
    assert max(load) - min(load) <= 1 + len(packing.token_ranks), load


def test_a_microbatch_that_nothing_was_cut_for_is_refused() -> None:
    routing = Routing((0,), 1, 4)
    traces = [torch.zeros(2, 1, 1, dtype=torch.uint8)] * 2
    (cuts,) = shards.cut(traces, Schedule([3, 3], [[[0], [1]]]), Packing(), routing, False)
    shard = shards.Shard([[0], [1]], [cuts[name] for name in shards.names(Rank(), Packing(), [0], False)], False)
    with pytest.raises(PluginError, match="none of those that the routing was cut for") as caught:
        shard.take([1, 0], torch.arange(6))
    assert caught.value.facts["its samples"] == [1, 0]
    assert caught.value.facts["cut for"] == "[0]; [1]"
