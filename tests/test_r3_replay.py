"""Replay on one model: recorded experts, current probabilities, and an honest count; on Megatron's own routers too."""

from __future__ import annotations

import gc
import importlib.util
import sys
import weakref
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from miles_plugins import ArgumentError, Packing, PluginError, Rank, Schedule, hookimpl
from miles_plugins.manager import Installed, Plugin, Plugins
from miles_plugins.microbatch import Microbatch, bind, set_current
from miles_plugins.patches.megatron import router as router_seam
from miles_plugins.r3_replay import plugin as r3
from miles_plugins.r3_replay import refusals
from miles_plugins.r3_replay.replay import DIFFERENT, RECORDED, REPLAYED, Recorded, Replay
from miles_plugins.r3_replay.replay import TOKENS as CHOICES
from miles_plugins.r3_replay.trace import join

torch = pytest.importorskip("torch")

EXPERTS, TOPK, TOKENS, HIDDEN = 8, 2, 6, 4


# -- small routers ---------------------------------------------------------------------------------------------------


class Router(torch.nn.Module):
    """What Replay uses of Megatron's."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.router_replay = None
        self.weight = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x):
        return x @ self.weight.t()


class Layer(torch.nn.Module):
    def __init__(self, layer_number: int, moe: bool = True) -> None:
        super().__init__()
        self.mlp = torch.nn.Module()
        if moe:
            self.mlp.router = Router(layer_number)


def model(*layer_numbers: int, dense: tuple[int, ...] = ()) -> torch.nn.Module:
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([Layer(number, number not in dense) for number in layer_numbers])
    return chunk


def routers(*chunks: torch.nn.Module) -> list[Router]:
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]


def recorded(
    layers: int,
    tokens: int = TOKENS,
    topk: int = TOPK,
    without: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    chunk: int = 0,
    seed: int = 0,
) -> Recorded:
    """The routing of a microbatch for a rank's layers, which says nothing of the tokens `without`."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(layers, tokens, EXPERTS, generator=generator).topk(topk, dim=-1).indices.to(torch.uint8)
    counts = torch.ones(tokens, dtype=torch.bool)
    counts[list(padding)] = False
    known = counts.clone()
    known[list(without)] = False
    return Recorded(indices, known, counts, chunk)


def select(replay: Replay, router: torch.nn.Module, microbatch: Recorded, scores=None, recomputing=False, topk=TOPK):
    scores = torch.randn(microbatch.indices.shape[1], EXPERTS) if scores is None else scores
    return replay.select(router, microbatch, recomputing, scores, topk, lambda: torch.topk(scores, topk, dim=1))


def one_pass(replay: Replay, *microbatches: Recorded):
    """[MoE layers, 4] counts."""
    replay.begin()
    for microbatch in microbatches:
        replay.add(microbatch)
        for router in replay._layer_of:
            select(replay, router, microbatch)
    replay.end()
    return replay.counts()


# -- binding ---------------------------------------------------------------------------------------------------------


def test_each_router_takes_the_routing_of_its_layer():
    chunks = [model(1, 2, dense=(1,)), model(5, 6, dense=(6,))]  # one rank of a pipeline, two virtual stages
    replay = Replay(chunks, layers=[1, 2, 4])  # global indices; layer 2 is on another rank
    assert replay.local_layers == [0, 2]
    assert [replay.rows_of(chunk) for chunk in (0, 1)] == [[0], [1]]
    for chunk, router in enumerate(routers(*chunks)):
        microbatch = recorded(layers=1, chunk=chunk, seed=chunk)  # of this chunk's layers only
        assert torch.equal(select(replay, router, microbatch)[1], microbatch.indices[0].long())


def test_routing_is_in_the_order_of_the_layers_whatever_the_order_of_the_chunks():
    chunks = [model(4, 3), model(2, 1)]  # a provider may build them in any order
    replay = Replay(chunks, layers=[0, 1, 2, 3])
    assert replay.local_layers == [0, 1, 2, 3]
    assert [replay.rows_of(chunk) for chunk in (0, 1)] == [[2, 3], [0, 1]]
    for chunk in (0, 1):
        microbatch = recorded(layers=2, chunk=chunk, seed=chunk)
        later, earlier = routers(chunks[chunk])
        assert torch.equal(select(replay, earlier, microbatch)[1], microbatch.indices[0].long())
        assert torch.equal(select(replay, later, microbatch)[1], microbatch.indices[1].long())


def test_a_rank_without_routers_replays_nothing():
    replay = Replay([model(1, 2, dense=(1, 2))], layers=[2])
    assert replay.local_layers == []
    assert one_pass(replay, recorded(0)).tolist() == [[0, 0, 0, 0]]


def test_a_router_where_the_arguments_have_no_moe_layer_is_refused():
    with pytest.raises(PluginError, match="not the ones that its arguments describe") as caught:
        Replay([model(1, 2)], layers=[0])
    assert caught.value.facts["its layer"] == 1
    assert caught.value.facts["router"] == "decoder.layers.1.mlp.router"


def test_two_routers_of_one_layer_are_refused():
    with pytest.raises(PluginError, match="not the ones"):
        Replay([model(1), model(1)], layers=[0])


@pytest.mark.parametrize("known_by", ["its name", "Megatron's mark"])
def test_the_draft_heads_router_chooses_for_itself(known_by):
    chunk = model(1)
    if known_by == "its name":
        chunk.mtp = model(1)
    else:
        chunk.head = model(1)
        routers(chunk.head)[0].is_mtp_layer = True
    replay = Replay([chunk], layers=[0])
    main, draft = routers(chunk)
    microbatch = recorded(1)
    assert select(replay, draft, microbatch) is None
    assert select(replay, main, microbatch) is not None
    counts = one_pass(replay, recorded(1))
    assert counts[:, [REPLAYED, RECORDED]].tolist() == [[TOKENS, TOKENS]], "nor is it expected to replay"


def test_a_router_of_another_model_chooses_for_itself():
    chunk, other = model(1), model(1)
    replay = Replay([chunk], layers=[0])
    assert select(replay, routers(other)[0], recorded(1)) is None


def test_the_routers_may_go_and_are_missed():
    """A reference model is swapped in and out; the replay must not keep dead routers alive."""
    chunk = model(1)
    replay = Replay([chunk], layers=[0])
    router = weakref.ref(routers(chunk)[0])
    del chunk
    assert router() is None
    assert one_pass(replay, recorded(1))[:, [REPLAYED, RECORDED]].tolist() == [[0, TOKENS]]


# -- selecting -------------------------------------------------------------------------------------------------------


def test_the_probabilities_are_the_current_scores_and_carry_the_gradient():
    chunk = model(1)
    (router,) = routers(chunk)
    replay = Replay([chunk], layers=[0])
    x = torch.randn(TOKENS, HIDDEN)
    results = []
    for scale in (1.0, 2.0):
        scores = router(x * scale)
        probabilities, indices = select(replay, router, recorded(1), scores)
        assert torch.equal(probabilities, scores.gather(1, indices))
        results.append((probabilities, indices))
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[1][0])
    router.zero_grad()
    probabilities.sum().backward()
    expected = torch.zeros(EXPERTS, HIDDEN)
    for token, row in enumerate(indices.tolist()):
        for expert in row:
            expected[expert] += 2 * x[token]
    torch.testing.assert_close(router.weight.grad, expected)


@pytest.mark.parametrize(
    ("tokens", "topk"), [(TOKENS - 1, TOPK), (TOKENS + 1, TOPK), (TOKENS, TOPK + 1), (TOKENS, TOPK - 1)]
)
def test_a_routing_of_another_shape_is_refused(tokens, topk):
    chunk = model(1)
    replay = Replay([chunk], layers=[0])
    with pytest.raises(PluginError, match="does not fit the router") as caught:
        select(replay, routers(chunk)[0], recorded(1), torch.randn(tokens, EXPERTS), topk=topk)
    assert caught.value.facts["got"] == (TOKENS, TOPK)
    assert caught.value.facts["expected"] == (tokens, topk)


def test_a_router_that_asks_twice_in_a_forward_is_an_error():
    chunk = model(1, 2)
    first, second = routers(chunk)
    replay = Replay([chunk], layers=[0, 1])
    microbatch = recorded(2)
    select(replay, first, microbatch)
    select(replay, second, microbatch)
    with pytest.raises(PluginError, match="asked twice") as caught:
        select(replay, second, microbatch)
    assert caught.value.facts == {"MoE layer": 1}
    select(replay, first, recorded(2))  # another microbatch is another forward


def test_a_measurement_compares_and_leaves_the_choice():
    chunk = model(1)
    (router,) = routers(chunk)
    microbatch, scores = recorded(1), torch.randn(TOKENS, EXPERTS)
    found = []
    for measure_only in (False, True):
        replay = Replay([chunk], layers=[0], measure_only=measure_only)
        replay.begin()
        same_again = recorded(1)
        replay.add(same_again)
        found.append((select(replay, router, same_again, scores), replay.counts()))
    assert torch.equal(found[0][0][1], microbatch.indices[0].long())
    assert found[1][0] is None
    assert torch.equal(found[0][1], found[1][1]), "what differs is the same, and so is how much was looked at"
    assert found[0][1][0, DIFFERENT] > 0


def test_a_recomputation_gives_the_same_and_is_not_counted():
    chunk = model(1)
    (router,) = routers(chunk)
    replay = Replay([chunk], layers=[0])
    replay.begin()
    microbatch = recorded(1)
    replay.add(microbatch)
    scores = torch.randn(TOKENS, EXPERTS)
    forward = select(replay, router, microbatch, scores)
    counted = replay.counts()
    for _ in range(2):
        again = replay.select(
            router, microbatch, True, scores, TOPK, lambda: pytest.fail("asked for the natural choice")
        )
        assert torch.equal(again[0], forward[0])
        assert torch.equal(again[1], forward[1])
    assert torch.equal(replay.counts(), counted)


# -- counting --------------------------------------------------------------------------------------------------------


def test_the_count_is_of_recorded_tokens_in_every_layer():
    chunk = model(1, 2, 3)
    replay = Replay([chunk], layers=[0, 1, 2])
    counts = one_pass(replay, recorded(3, without=(0, 5)), recorded(3, tokens=4))
    assert counts[:, :3].tolist() == [[TOKENS - 2 + 4, TOKENS - 2 + 4, TOKENS + 4]] * 3


def test_padding_and_last_tokens_are_no_tokens_at_all():
    chunk = model(1)
    counts = one_pass(Replay([chunk], layers=[0]), recorded(1, without=(1,), padding=(0, 5)))
    assert counts[0, [REPLAYED, RECORDED, CHOICES]].tolist() == [TOKENS - 3, TOKENS - 3, TOKENS - 2]


def test_a_router_that_was_not_asked_is_missing_from_the_count():
    chunk = model(1, 2)
    replay = Replay([chunk], layers=[0, 1])
    replay.begin()
    microbatches = [recorded(2), recorded(2, without=(1,))]
    for microbatch in microbatches:
        replay.add(microbatch)
        select(replay, routers(chunk)[0], microbatch)
    select(replay, routers(chunk)[1], microbatches[0])
    counts = replay.counts()
    assert counts[:, REPLAYED].tolist() == [2 * TOKENS - 1, TOKENS]
    assert counts[:, RECORDED].tolist() == [2 * TOKENS - 1] * 2


def test_layers_of_another_rank_count_nothing_here():
    chunk = model(2)
    counts = one_pass(Replay([chunk], layers=[0, 1, 2]), recorded(1))
    assert counts[:, [REPLAYED, RECORDED, CHOICES]].tolist() == [[0] * 3, [TOKENS] * 3, [0] * 3]


def test_a_forward_pass_through_one_chunk_expects_only_that_chunks_layers():
    """Virtual pipeline stages: each microbatch passes each chunk by itself."""
    chunks = [model(1), model(3)]
    replay = Replay(chunks, layers=[0, 1, 2])
    first, third = routers(*chunks)
    replay.begin()
    for chunk, router in ((0, first), (1, third)):
        microbatch = recorded(2, chunk=chunk)
        replay.add(microbatch)
        select(replay, router, microbatch)
    assert replay.counts()[:, [REPLAYED, RECORDED]].tolist() == [[TOKENS] * 2, [0, 0], [TOKENS] * 2]
    missed = recorded(2, chunk=1)
    replay.add(missed)
    assert replay.counts()[:, [REPLAYED, RECORDED]].tolist() == [[TOKENS] * 2, [0, 0], [TOKENS, 2 * TOKENS]]


def test_different_tokens_are_counted_where_a_choice_was_recorded():
    """As sets: another order of the same experts is no difference."""
    chunk = model(1)
    (router,) = routers(chunk)
    replay = Replay([chunk], layers=[0])
    scores = torch.zeros(TOKENS, EXPERTS)
    scores[:, 0], scores[:, 1] = 2.0, 1.0  # everybody's natural choice: experts 0 and 1
    microbatch = recorded(1, without=(4,))
    microbatch.indices[0] = torch.tensor([[0, 1], [1, 0], [0, 2], [3, 2], [5, 6], [1, 0]])
    replay.begin()
    replay.add(microbatch)
    select(replay, router, microbatch, scores)
    assert replay.counts().tolist() == [[TOKENS - 1, TOKENS - 1, TOKENS, 2]]


def test_different_tokens_are_counted_by_layer():
    chunk = model(1, 2)
    replay = Replay([chunk], layers=[0, 1])
    scores = torch.zeros(TOKENS, EXPERTS)
    scores[:, 0], scores[:, 1] = 2.0, 1.0
    microbatch = recorded(2)
    microbatch.indices[0] = torch.tensor([[0, 1]])
    microbatch.indices[1] = torch.tensor([[0, 2]])
    replay.begin()
    for router in routers(chunk):
        select(replay, router, microbatch, scores)
    assert replay.counts()[:, DIFFERENT].tolist() == [0, TOKENS]


def test_every_pass_counts_for_itself():
    chunk = model(1)
    replay = Replay([chunk], layers=[0])
    first = one_pass(replay, recorded(1), recorded(1))
    second = one_pass(replay, recorded(1))
    assert first[0, :3].tolist() == [2 * TOKENS] * 3
    assert second[0, :3].tolist() == [TOKENS] * 3


def test_after_an_exception_in_a_pass_the_next_one_is_clean():
    chunk = model(1, 2)
    replay = Replay([chunk], layers=[0, 1])
    replay.begin()
    half = recorded(2)
    replay.add(half)
    select(replay, routers(chunk)[0], half)  # … and then the second layer raised
    replay.end()
    assert one_pass(replay, recorded(2))[:, :2].tolist() == [[TOKENS] * 2] * 2


def test_the_routing_of_a_microbatch_is_let_go_before_the_pass_ends():
    replay = Replay([model(1, 2)], layers=[0, 1])
    microbatch = recorded(2)
    routing = weakref.ref(microbatch.indices)
    replay.begin()
    replay.add(microbatch)
    del microbatch
    assert routing() is None


def test_a_pass_without_microbatches_counts_nothing():
    chunk = model(1)
    assert one_pass(Replay([chunk], layers=[0])).tolist() == [[0, 0, 0, 0]]


# -- the plugin, training --------------------------------------------------------------------------------------------


def arguments(**changed) -> Namespace:
    return Namespace(
        **{
            "num_layers": 2,
            "moe_layer_freq": 1,
            "moe_router_topk": TOPK,
            "num_experts": EXPERTS,
            "moe_router_fusion": False,
            "moe_router_load_balancing_type": "none",
            "moe_expert_capacity_factor": None,
            "use_rollout_routing_replay": True,
            "use_routing_replay": True,
            "pipeline_model_parallel_size": 1,
            "context_parallel_size": 1,
            "tensor_model_parallel_size": 1,
            "sequence_parallel": False,
            "allgather_cp": False,
            "data_pad_size_multiplier": 4,
            "r3_earlier_rows": "keep",
            "r3_missing": "fail",
            "r3_measure_only": False,
            **changed,
        }
    )


class Trainer:
    """One trainer process with a model of two MoE layers, and the rollout that it was given."""

    def __init__(self, args: Namespace) -> None:
        self.args, self.chunk = args, model(1, 2)
        self.routers = routers(self.chunk)
        r3.model_built(args=args, model=[self.chunk], role="actor")

    def receive(self, lengths=(TOKENS,), microbatches=((0,),), without=(), seed: int = 0) -> None:
        """A rollout of samples that repeat no token; those `without` routing were masked out."""
        self.tokens = [list(range(100 * number, 100 * number + length)) for number, length in enumerate(lengths)]
        self.traces = [
            None if number in without else recorded(2, n - 1, seed=seed + number).indices.transpose(0, 1)
            for number, n in enumerate(lengths)
        ]
        samples = [
            SimpleNamespace(
                tokens=tokens,
                rollout_routed_experts=None if rows is None else join(None, rows, 0, tokens, "1", True, "a sample"),
            )
            for tokens, rows in zip(self.tokens, self.traces, strict=True)
        ]
        masks = [[int(rows is not None)] * len(tokens) for tokens, rows in zip(self.tokens, self.traces, strict=True)]
        self.data = {"tokens": self.tokens, "loss_masks": masks}
        r3.collect_train_data(self.args, samples, self.data)
        self.data["micro_batch_indices"] = [list(samples) for samples in microbatches]
        (shared,) = r3.share_train_data(self.args, Schedule(lengths, [self.data["micro_batch_indices"]]))
        r3.receive_train_data(self.args, self.data, Rank(), lambda names: [shared[name] for name in names])

    def begin(self, *samples: int, chunk: int = 0) -> Microbatch:
        """The forward pass of a microbatch of these samples."""
        samples = samples or (0,)
        batch = {
            "rollout_routed_experts": [self.data["rollout_routed_experts"][number] for number in samples],
            "unconcat_tokens": [torch.tensor(self.tokens[number]) for number in samples],
        }
        lengths = [len(self.tokens[number]) for number in samples]
        microbatch = Microbatch(batch, Packing.of(self.args).positions(lengths), chunk)
        set_current(microbatch)
        r3.microbatch_begins(microbatch=microbatch)
        return microbatch

    def enter(self, stage: str = "train", chunk: torch.nn.Module | None = None) -> None:
        r3.pass_begins(stage, [self.chunk if chunk is None else chunk])

    def end(self, stage: str = "train", error: BaseException | None = None) -> dict[str, float]:
        r3.pass_ends(self.args, stage, [self.chunk], error)
        return dict(r3.step_metrics())

    def step(self, *scores, **changed) -> dict[str, float]:
        """One training step over the whole rollout; every router is asked once a microbatch."""
        self.enter()
        for samples in self.data["micro_batch_indices"]:
            microbatch = self.begin(*samples)
            for layer, router in enumerate(self.routers):
                ask(router, scores[layer] if scores else torch.randn(len(microbatch.positions), EXPERTS))
        return self.end()


def ask(router: Router, scores=None):
    scores = torch.randn(8, EXPERTS) if scores is None else scores  # 6 tokens and padding
    return r3.select_experts(router, scores, TOPK, lambda: torch.topk(scores, TOPK, dim=1))


@pytest.fixture
def build_trainer(monkeypatch):
    """Trainer processes by their arguments; reductions are over this rank alone."""
    for name, value in {"_replay": None, "_shard": None, "_metrics": {}, "_traces": []}.items():
        monkeypatch.setattr(r3, name, value)
    r3._shares.clear()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None, raising=False)

    def build(**changed) -> Trainer:
        made = Trainer(arguments(**changed))
        made.receive()
        return made

    yield build
    set_current(None)
    r3._shares.clear()


@pytest.fixture
def trainer(build_trainer) -> Trainer:
    return build_trainer()


@pytest.mark.parametrize("stage", ["log_prob", "train"])
def test_the_actors_passes_replay(trainer, stage):
    trainer.enter(stage)
    trainer.begin()
    for layer, router in enumerate(trainer.routers):
        assert torch.equal(ask(router)[1][: TOKENS - 1], trainer.traces[0][:, layer].long())
    metrics = trainer.end(stage)
    assert (metrics.get("r3/coverage") == 1.0) == (stage == "train")
    assert ("r3/different_tokens" in metrics) == (stage == "train")


@pytest.mark.parametrize("pipeline", [1, 2], ids=["one stage", "several stages"])
def test_each_microbatch_takes_its_own_samples_in_its_own_order(build_trainer, pipeline):
    """Also where pipeline stages fetch layer by layer."""
    trainer = build_trainer(pipeline_model_parallel_size=pipeline)
    trainer.receive(lengths=(3, 5, 1, 2), microbatches=((2, 1), (3, 0)))
    trainer.enter()
    for samples in ((2, 1), (3, 0)):
        microbatch = trainer.begin(*samples)
        assert len(microbatch.positions) == 8
        for layer, router in enumerate(trainer.routers):
            chosen, begin = ask(router)[1], 0
            for sample in samples:
                rows = trainer.traces[sample][:, layer].long()
                assert torch.equal(chosen[begin : begin + len(rows)], rows)
                begin += len(rows) + 1
    assert trainer.end()["r3/coverage"] == 1.0


def test_a_sample_of_the_schedules_other_rank_is_not_needed(trainer):
    """What a rank is given of the handles is its own part; they say themselves of which sample they are."""
    trainer.receive(lengths=(3, 4, 5, 6), microbatches=((3,), (1,)))
    whole = trainer.data
    (shared,) = r3.shards.cut(
        [trace.contiguous() for trace in trainer.traces],
        Schedule((3, 4, 5, 6), [[[3], [1]]]),
        Packing.of(trainer.args),
        r3._routing(trainer.args),
        False,
    )
    shared[r3.LAYOUT] = r3._layout(trainer.args)
    mine = {
        "rollout_routed_experts": [whole["rollout_routed_experts"][3], whole["rollout_routed_experts"][1]],
        "micro_batch_indices": [[0], [1]],
    }
    r3.receive_train_data(trainer.args, mine, Rank(), lambda names: [shared[name] for name in names])
    trainer.enter()
    for sample in (3, 1):
        trainer.begin(sample)
        chosen = [ask(router, torch.randn(4 * -(-(sample + 3) // 4), EXPERTS))[1] for router in trainer.routers]
        assert torch.equal(chosen[0][: sample + 2], trainer.traces[sample][:, 0].long())
    assert trainer.end()["r3/coverage"] == 1.0


@pytest.mark.parametrize("stage", ["ref_log_prob", "teacher_log_prob", "values"])
def test_other_passes_route_for_themselves(trainer, stage):
    trainer.enter(stage)
    microbatch = trainer.begin()
    assert microbatch.values == {}
    assert ask(trainer.routers[0]) is None
    trainer.end(stage)


def test_outside_of_a_pass_routers_choose_for_themselves(trainer):
    assert ask(trainer.routers[0]) is None


def test_an_incomplete_replay_ends_the_run(trainer):
    trainer.enter()
    trainer.begin()
    ask(trainer.routers[0])
    with pytest.raises(PluginError, match="not replayed everywhere in the train pass") as caught:
        trainer.end()
    assert caught.value.facts["replayed"].startswith(f"{TOKENS - 1} ")
    assert caught.value.facts["expected"] == str(2 * (TOKENS - 1))
    assert caught.value.facts["layers"] == "1"


def test_a_pass_that_raised_is_not_judged_and_the_next_is_clean(trainer):
    trainer.enter()
    trainer.begin()
    ask(trainer.routers[0])
    trainer.end(error=RuntimeError("out of memory"))
    trainer.enter("ref_log_prob")
    assert trainer.begin().values == {}
    trainer.end("ref_log_prob")
    test_the_actors_passes_replay(trainer, "train")


def test_interleaved_microbatches_with_recomputation(trainer):
    """1F1B: the backward of the first microbatch runs after the forward of the second."""
    trainer.receive(lengths=(TOKENS, TOKENS), microbatches=((0,), (1,)))
    trainer.enter()
    bound = []
    for sample in range(2):
        trainer.begin(sample)
        bound.append([bind(lambda router=router: ask(router)[1][: TOKENS - 1]) for router in trainer.routers])
        for function in bound[-1]:
            function()
    for sample in (0, 1):
        for layer, function in reversed(list(enumerate(bound[sample]))):
            assert torch.equal(function(), trainer.traces[sample][:, layer].long())
    assert trainer.end()["r3/coverage"] == 1.0


def test_a_masked_sample_has_no_routing_and_the_coverage_says_so(trainer):
    """It routes for itself as far as it can: experts of nobody's choice, which its loss mask keeps from mattering."""
    trainer.receive(lengths=(5, 3, 5), microbatches=((0, 1), (2,)), without=(1,))
    metrics = trainer.step()
    assert metrics["r3/coverage"] == pytest.approx(8 / 10)
    trainer.receive(lengths=(5,), microbatches=((0,),), without=(0,))
    assert trainer.step()["r3/coverage"] == 0.0


def test_the_share_of_different_tokens_is_of_recorded_ones_in_all_and_by_layer(trainer):
    trainer.receive(lengths=(5, 3), microbatches=((0, 1),), without=(1,))
    natural = torch.zeros(8, EXPERTS)
    natural[range(4), trainer.traces[0][:, 0, 0].long()] = 2.0
    natural[range(4), trainer.traces[0][:, 0, 1].long()] = 1.0
    other = natural.clone()
    other[0] = 0
    other[0, [expert for expert in range(EXPERTS) if expert not in trainer.traces[0][0, 1]][:TOPK]] = 1.0
    other[1:4] = 0
    other[torch.arange(1, 4)[:, None], trainer.traces[0][1:, 1].long()] = 1.0
    metrics = trainer.step(natural, other)
    assert metrics["r3/different_tokens/layer_0"] == 0
    assert metrics["r3/different_tokens/layer_1"] == 1 / 4
    assert metrics["r3/different_tokens"] == 1 / 8
    assert metrics["r3/host_seconds"] >= 0


def test_layers_are_named_as_the_model_numbers_them(build_trainer, monkeypatch):
    """Layer 0 is dense: the two MoE layers are 1 and 2."""
    chunk = model(1, 2, 3, dense=(1,))
    monkeypatch.setattr(sys.modules[__name__], "model", lambda *numbers: chunk)
    trainer = build_trainer(num_layers=3, moe_layer_freq=[0, 1, 1])
    named = {name for name in trainer.step() if "/layer_" in name}
    assert named == {"r3/different_tokens/layer_1", "r3/different_tokens/layer_2"}


# -- measuring only --------------------------------------------------------------------------------------------------


def test_measuring_leaves_every_choice_and_finds_what_replay_finds(build_trainer):
    lengths, microbatches = (5, 3, 4), ((0, 1), (2,))
    scores = [torch.randn(8, EXPERTS), torch.randn(8, EXPERTS)]
    found = {}
    for measure_only in (False, True):
        trainer = build_trainer(r3_measure_only=measure_only)
        trainer.receive(lengths, microbatches)
        trainer.enter()
        for samples in microbatches:
            positions = trainer.begin(*samples).positions
            for layer, router in enumerate(trainer.routers):
                choice = ask(router, scores[layer][: len(positions)])
                assert (choice is None) == measure_only, "None: the router keeps its own"
        found[measure_only] = trainer.end()
    assert found[False]["r3/coverage"] == 1.0
    assert found[True]["r3/coverage"] == 0.0
    assert found[True]["r3/different_tokens"] > 0
    shares = [{n: v for n, v in metrics.items() if "different" in n} for metrics in found.values()]
    assert shares[0] == shares[1]


# -- memory ----------------------------------------------------------------------------------------------------------


def test_what_was_trained_on_is_let_go_and_the_rest_stays(build_trainer):
    """Two optimizer steps; the log-prob pass before them needs all of it, and lets nothing go."""
    trainer = build_trainer()
    trainer.receive(lengths=(6, 6), microbatches=((0,), (1,)))
    held = [weakref.ref(part) for parts in r3._shard._cuts.values() for part in parts]
    trainer.enter("log_prob")
    for number in (0, 1):
        trainer.begin(number)
        for router in trainer.routers:
            ask(router)
    trainer.end("log_prob")
    for number, left in ((0, [False, True]), (1, [False, False])):
        trainer.enter()
        microbatch = trainer.begin(number)
        for router in trainer.routers:
            ask(router)
        trainer.end()
        set_current(None)
        del microbatch
        gc.collect()
        assert [part() is not None for part in held] == left
    trainer.enter()
    with pytest.raises(PluginError, match="or was trained on before"):
        trainer.begin(0)
    trainer.end(error=PluginError("above"))


def test_what_was_counted_is_not_kept_on_the_device(trainer):
    trainer.step()
    assert (r3._replay._passed, r3._replay._different) == ([], {})


def test_a_step_that_raised_keeps_its_routing(trainer):
    trainer.enter()
    trainer.begin()
    trainer.end(error=RuntimeError("out of memory"))
    assert trainer.step()["r3/coverage"] == 1.0


def test_a_pass_before_any_data_says_so(trainer):
    r3._shard = None
    with pytest.raises(PluginError, match="before any training data came"):
        trainer.enter()
    assert not r3._replay.active


# -- a jump ----------------------------------------------------------------------------------------------------------

BY_LAYER = {0: 0.1, 5: 0.9}


@pytest.mark.parametrize(
    ("share", "before"),
    [
        (0.0, []),
        (0.3, []),
        (0.3, [0.0, 0.0]),
        (0.0, [0.0] * 20),
        (0.015, [0.0] * 20),
        (0.015, [0.001] * 20),
        (0.1, [0.09, 0.1, 0.08, 0.12]),
        (0.2, [0.1] * 20),
        (0.01, [0.2] * 20),
        (0.1, [0.1] * 19 + [0.0]),
    ],
)
def test_small_and_steady_shares_are_no_warning(share, before):
    assert r3.jump(share, before, BY_LAYER) is None


@pytest.mark.parametrize(
    ("share", "before", "said"),
    [
        (0.1, [0.0] * 3, "10.0%"),
        (0.1, [0.01] * 20, "after 1.0% before"),
        (0.1, [0.01] * 18 + [0.4] * 2, "after 1.0% before"),
        (0.49, [0.05] * 3, "after 5.0% before"),
        (0.5, [], "50.0%"),
        (0.93, [], "93.0%"),
        (0.6, [0.6] * 20, "after 60.0% before"),
    ],
)
def test_a_jump_or_more_than_half_is_a_warning_that_names_the_worst_layer(share, before, said):
    warning = r3.jump(share, before, BY_LAYER)
    assert said in warning
    assert "layer 5, 90.0%" in warning
    assert ("before (" in warning) == (len(before) >= 3)


def test_a_run_warns_at_the_step_that_jumps_and_only_there(trainer, caplog):
    def step(different: bool) -> None:
        scores = [torch.zeros(8, EXPERTS) for _ in range(2)]
        for layer in range(2):
            chosen = trainer.traces[0][:, layer].long()
            scores[layer][torch.arange(TOKENS - 1)[:, None], chosen] = -1.0 if different else 1.0
        trainer.step(*scores)
        trainer.receive()

    for _ in range(r3.REMEMBERED + 3):
        step(different=False)
    assert len(r3._shares) == r3.REMEMBERED
    assert caplog.records == []
    step(different=True)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "would route differently by themselves" in record.getMessage()
    assert "after 0.0% before" in record.getMessage()
    step(different=False)
    assert len(caplog.records) == 1


def test_the_warning_is_of_one_rank(trainer, caplog, monkeypatch):
    scores = [torch.zeros(8, EXPERTS) for _ in range(2)]
    for layer in range(2):
        scores[layer][torch.arange(TOKENS - 1)[:, None], trainer.traces[0][:, layer].long()] = -1.0
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, warnings in ((1, 0), (0, 1)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        trainer.step(*scores)
        trainer.receive()
        assert len(caplog.records) == warnings


# -- what is refused -------------------------------------------------------------------------------------------------


def test_what_only_the_actors_own_arguments_say_is_refused_too(trainer):
    """--megatron-config-path changes the actor's arguments after the driver has checked the command line's."""
    with pytest.raises(ArgumentError, match="cannot work with these arguments") as caught:
        r3.model_built(args=arguments(moe_router_fusion=True), model=[model(1, 2)], role="actor")
    assert set(caught.value.facts) == {"--moe-router-fusion"}


def test_the_critic_is_not_bound_and_its_passes_are_natural(trainer):
    """Actor and critic may live in one process, where the critic trains in a pass of the same name."""
    before, critic = r3._replay, model(7)
    r3.model_built(args=arguments(), model=[critic], role="critic")
    assert r3._replay is before
    trainer.enter("train", critic)
    assert trainer.begin().values == {}
    assert ask(routers(critic)[0]) is None
    trainer.end("train")
    assert trainer.step()["r3/coverage"] == 1.0


@pytest.mark.parametrize("stage", ["log_prob", "train"])
def test_a_replaying_pass_on_a_model_that_was_never_bound_is_refused(trainer, stage):
    with pytest.raises(PluginError, match="another model than the one that was bound"):
        trainer.enter(stage, model(1, 2))
    trainer.enter("ref_log_prob", model(1, 2))
    assert ask(trainer.routers[0]) is None


def test_the_critic_fetches_no_routing(monkeypatch):
    monkeypatch.setattr(r3, "_replay", None)
    r3.receive_train_data(arguments(), {}, Rank(), lambda names: pytest.fail("fetched"))


def test_routing_that_was_cut_for_another_layout_is_refused(trainer):
    """Zigzag and all-gather cut pieces of one size: nothing else would notice."""
    trainer.receive(lengths=(4, 4), microbatches=((0, 1),))
    other = arguments(allgather_cp=True)
    with pytest.raises(PluginError, match="another layout") as caught:
        r3.receive_train_data(trainer.args, trainer.data, Rank(), lambda names: [r3._layout(other) for _ in names])
    assert "all_gather=True" in caught.value.facts["rollout manager"]


def test_the_routing_must_reach_the_trainer(trainer):
    assert r3.take_routed_experts() is True
    with pytest.raises(PluginError, match="carries no routing") as caught:
        r3.receive_train_data(trainer.args, {"tokens": [], "rewards": []}, Rank(), lambda names: [])
    assert caught.value.facts == {"fields": "tokens, rewards"}


@pytest.mark.parametrize("change", ["a token more", "a token less", "another sample's"])
def test_routing_that_does_not_belong_to_the_tokens_is_refused(trainer, change):
    trainer.receive(lengths=(TOKENS, 4), microbatches=((0,), (1,)))
    if change == "another sample's":
        trainer.data["rollout_routed_experts"].reverse()
    else:
        trainer.tokens[0] = list(range(TOKENS + (1 if change == "a token more" else -1)))
    trainer.enter()
    with pytest.raises(PluginError, match="does not belong to its tokens") as caught:
        trainer.begin(0)
    assert caught.value.facts["tokens"] == [len(trainer.tokens[0])]


@pytest.mark.parametrize("samples", [(1, 0), (0,), (0, 1, 2), (1, 2)], ids=str)
def test_a_microbatch_that_is_not_in_the_schedule_is_refused(trainer, samples):
    trainer.receive(lengths=(4, 4, 4), microbatches=((0, 1), (2,)))
    trainer.enter()
    with pytest.raises(PluginError, match="none of those that the routing was cut for") as caught:
        trainer.begin(*samples)
    assert caught.value.facts["its samples"] == list(samples)


def test_a_bound_router_without_a_microbatch_is_an_error(trainer):
    """A recomputation in another thread, say, that nothing has bound to its microbatch."""
    trainer.enter()
    trainer.begin()
    with ThreadPoolExecutor(1) as thread, pytest.raises(PluginError, match="nothing says for which microbatch"):
        thread.submit(ask, trainer.routers[0]).result()


def test_a_model_without_its_routers_is_refused(trainer):
    with pytest.raises(PluginError, match="without a router") as caught:
        r3.model_built(args=arguments(), model=[model(2)], role="actor")
    assert caught.value.facts["layers"] == "0"


def test_a_critic_says_that_it_routes_for_itself(monkeypatch):
    monkeypatch.setattr(r3, "_replay", None)
    assert r3.probe("trainer")


def test_a_trainer_says_how_many_routers_replay(trainer):
    assert r3.probe("trainer") == "2 routers of this rank replay"


# -- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_that_fit():
    args = arguments()
    r3.configure(args)
    assert args.use_routing_replay is False
    assert args.use_rollout_routing_replay is True


def servers(*kinds: str) -> str:
    groups = "".join(f"\n  - {{worker_type: {kind}, num_gpus: 1}}" for kind in kinds)
    return f"sglang:\n- name: actor\n  server_groups:{groups}\n"


# Each flag that r3 cannot work with, and arguments that make it so; a new line of refusals.py needs one here.
REFUSED = [
    ("--num-experts", {"num_experts": None}),
    ("--num-experts", {"num_experts": 0}),
    ("--moe-router-fusion", {"moe_router_fusion": True}),
    ("--moe-router-load-balancing-type", {"moe_router_load_balancing_type": "sinkhorn"}),
    ("--moe-router-load-balancing-type", {"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]}),
    ("--moe-router-load-balancing-type", {"moe_router_load_balancing_type": "quantile_balancing"}),
    ("--moe-router-load-balancing-type", {"moe_router_load_balancing_type": ["quantile_balancing"]}),
    ("--moe-expert-capacity-factor", {"moe_expert_capacity_factor": 1.0}),
    ("--moe-expert-capacity-factor", {"moe_expert_capacity_factor": 0.0}),
    ("--moe-enable-routing-replay", {"moe_enable_routing_replay": True}),
    ("--overlap-moe-expert-parallel-comm", {"overlap_moe_expert_parallel_comm": True}),
    ("--qkv-format", {"qkv_format": "bshd"}),
    ("--prefill-num-servers", {"prefill_num_servers": 1}),
    ("--prefill-num-servers", {"prefill_num_servers": 0}),
    ("--sglang-config", {"sglang_config": servers("prefill", "decode")}),
    ("--sglang-config", {"sglang_config": servers("regular", "encoder")}),
    ("--sglang-enable-hierarchical-cache", {"sglang_enable_hierarchical_cache": True}),
    (
        "--sglang-speculative-algorithm",
        {"sglang_speculative_algorithm": "EAGLE", "sglang_enable_dp_attention": True},
    ),
    ("--custom-config-path", {"use_rollout_routing_replay": False}),
    ("--moe-expert-rank-capacity-factor", {"moe_expert_rank_capacity_factor": 1.5}),
    ("--moe-router-force-load-balancing", {"moe_router_force_load_balancing": True}),
    ("--moe-router-force-biased", {"moe_router_force_biased": 0.0}),
    ("--cuda-graph-impl", {"cuda_graph_impl": "local"}),
    ("--enable-cuda-graph", {"enable_cuda_graph": True}),
    ("--external-cuda-graph", {"external_cuda_graph": True}),
]
# Close to one of those, and fine.
ACCEPTED = [
    {},
    {"moe_router_load_balancing_type": "aux_loss"},
    {"moe_router_load_balancing_type": ["aux_loss", "none"]},
    {"qkv_format": "thd"},
    {"sglang_config": None},
    {"sglang_config": servers("regular", "placeholder")},
    {"sglang_speculative_algorithm": "EAGLE"},
    {"sglang_speculative_algorithm": "EAGLE", "sglang_enable_dp_attention": False},
    {"sglang_enable_dp_attention": True},
    {"prefill_num_servers": None, "sglang_enable_hierarchical_cache": False},
    {"moe_enable_routing_replay": False, "overlap_moe_expert_parallel_comm": False},
    {"cuda_graph_impl": "none", "enable_cuda_graph": False, "external_cuda_graph": False},
    {"moe_router_force_load_balancing": False, "moe_router_force_biased": None},
]


def configured(changed: dict[str, object], folder) -> Namespace:
    args = arguments(**changed)
    if text := changed.get("sglang_config"):
        pytest.importorskip("yaml")
        args.sglang_config = str(folder / "servers.yaml")
        (folder / "servers.yaml").write_text(text)
    r3.configure(args)
    return args


@pytest.mark.parametrize(("flag", "changed"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_arguments_that_cannot_work_are_refused(flag, changed, tmp_path):
    with pytest.raises(ArgumentError, match="r3_replay cannot work") as caught:
        configured(changed, tmp_path)
    assert list(caught.value.facts) == [flag]
    assert caught.value.facts[flag], "with the reason"


@pytest.mark.parametrize("changed", ACCEPTED, ids=str)
def test_arguments_next_to_those_are_accepted(changed, tmp_path):
    assert configured(changed, tmp_path).use_rollout_routing_replay is True


def test_every_flag_that_can_be_refused_is_tried():
    assert {flag for flag, _ in REFUSED} | {"ENABLE_ROUTING_REPLAY"} == set(refusals._reasons(arguments()))


def test_the_variable_that_turns_on_a_patched_megatrons_own_replay_is_refused(monkeypatch):
    monkeypatch.setenv("ENABLE_ROUTING_REPLAY", "1")
    with pytest.raises(ArgumentError) as caught:
        r3.configure(arguments())
    assert list(caught.value.facts) == ["ENABLE_ROUTING_REPLAY"]
    monkeypatch.setenv("ENABLE_ROUTING_REPLAY", "0")
    r3.configure(arguments())


def test_all_reasons_are_given_at_once():
    with pytest.raises(ArgumentError) as caught:
        r3.configure(arguments(moe_router_fusion=True, moe_expert_capacity_factor=1.0))
    assert len(caught.value.facts) == 2


# -- Megatron's own routers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def megatron(megatron):
    """megatron.core's routing code, on a machine without GPU and TransformerEngine."""
    if importlib.util.find_spec("megatron") is None:
        sys.path.append(str(megatron))
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    from megatron.core.transformer.moe import moe_utils, router

    patch.setattr(moe_utils, "te_general_gemm", None, raising=False)  # without TransformerEngine the name is missing
    yield SimpleNamespace(router=router, moe_utils=moe_utils)
    patch.undo()


@pytest.fixture
def selecting(monkeypatch):
    """A process in which r3_replay decides through Megatron's seam."""
    hook = Plugins([Plugin(Installed("r3_replay", "miles-plugins", "0", None), r3)]).hook
    monkeypatch.setattr(router_seam, "current", lambda: SimpleNamespace(hook=hook))


def build(megatron, layer_number: int = 1, **changed):
    """Megatron's TopKRouter, with our selector attached as the patch attaches it."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(layer_number)
    config = TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": HIDDEN,
            "num_attention_heads": 2,
            "num_moe_experts": EXPERTS,
            "moe_router_topk": TOPK,
            "moe_router_load_balancing_type": "none",
            "add_bias_linear": False,
            "moe_router_dtype": "fp32",
            **changed,
        }
    )
    groups = SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
    made = object.__new__(megatron.router.TopKRouter)
    router_seam.attach_selector(megatron.router.TopKRouter.__init__, made, config, pg_collection=groups)
    made.set_layer_number(layer_number)
    return made


SCORES = {
    "softmax after": {"moe_router_pre_softmax": False},
    "softmax before": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "sigmoid with bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 1,
        "moe_router_topk": TOPK,
    },
    "groups with bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 1,
    },
    "scaled": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
}


def as_indices(routing_map) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in routing_map]


@pytest.mark.upstream
@pytest.mark.parametrize("case", SCORES)
def test_megatron_routes_as_recorded(megatron, selecting, monkeypatch, case):
    made = build(megatron, **SCORES[case])
    if made.expert_bias is not None:
        made.expert_bias.copy_(torch.linspace(-1, 1, EXPERTS))
    chunk = torch.nn.Module()
    chunk.router = made
    monkeypatch.setattr(r3, "_replay", Replay([chunk], layers=[0]))
    x = torch.randn(TOKENS, 1, HIDDEN)
    natural_probs, natural_map = made(x)
    assert (natural_map.sum(dim=1) == TOPK).all()

    def replayed(indices):
        r3._replay.begin()
        microbatch = Microbatch({}, torch.arange(TOKENS))
        every = torch.ones(TOKENS, dtype=torch.bool)
        record = Recorded(indices[None].to(torch.uint8), every, every)
        microbatch.values["r3_replay"] = record
        r3._replay.add(record)
        set_current(microbatch)
        try:
            return made(x)
        finally:
            set_current(None)

    # What it would have chosen anyway: bit for bit the same.
    own = torch.tensor([sorted(row) for row in as_indices(natural_map)])
    probs, routing_map = replayed(own)
    assert torch.equal(routing_map, natural_map)
    torch.testing.assert_close(probs, natural_probs, rtol=1e-6, atol=1e-7)
    assert r3._replay.counts().tolist() == [[TOKENS, TOKENS, TOKENS, 0]]

    # What it never would: the least likely experts, one of each end, so outside of any natural group.
    logits = made.gating(x.reshape(TOKENS, HIDDEN))
    unlikely = torch.stack([logits.argmin(dim=1), (logits.argmin(dim=1) + 3) % EXPERTS], dim=1)
    probs, routing_map = replayed(unlikely)
    assert as_indices(routing_map) == [set(row) for row in unlikely.tolist()]
    assert torch.isfinite(probs).all()
    assert (probs.gather(1, unlikely) > 0).all(), "no replayed expert is lost"
    assert (probs.gather(1, unlikely).sum(dim=1) - probs.sum(dim=1)).abs().max() < 1e-6
    made.weight.grad = None
    (probs.gather(1, unlikely) * torch.tensor([1.0, 2.0])).sum().backward()
    assert made.weight.grad.abs().sum() > 0


@pytest.mark.upstream
@pytest.mark.parametrize("case", ["softmax after", "softmax before", "sigmoid"])
def test_the_weights_and_their_gradient_are_those_of_the_formula(megatron, selecting, monkeypatch, case):
    made = build(megatron, **SCORES[case]).double()
    made.config.moe_router_dtype = "fp64"
    chunk = torch.nn.Module()
    chunk.router = made
    monkeypatch.setattr(r3, "_replay", Replay([chunk], layers=[0]))
    x = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.float64)
    record = recorded(1)
    indices = record.indices[0].long()
    microbatch = Microbatch({}, torch.arange(TOKENS))
    microbatch.values["r3_replay"] = record
    r3._replay.begin()
    set_current(microbatch)
    try:
        probs, _ = made(x)
    finally:
        set_current(None)
    weight = made.weight.detach().clone().requires_grad_()
    logits = x.reshape(TOKENS, HIDDEN) @ weight.t()
    if case == "softmax after":
        expected = logits.gather(1, indices).softmax(dim=1)
    elif case == "softmax before":
        expected = logits.softmax(dim=1).gather(1, indices)
    else:
        chosen = logits.sigmoid().gather(1, indices)
        expected = chosen / chosen.sum(dim=1, keepdim=True)
    torch.testing.assert_close(probs.gather(1, indices), expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    factors = torch.randn(TOKENS, TOPK, dtype=torch.float64)
    (probs.gather(1, indices) * factors).sum().backward()
    (expected * factors).sum().backward()
    torch.testing.assert_close(made.weight.grad, weight.grad, rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.mark.upstream
def test_without_a_plugin_that_decides_megatron_chooses_for_itself(megatron, monkeypatch):
    hook = Plugins([]).hook
    monkeypatch.setattr(router_seam, "current", lambda: SimpleNamespace(hook=hook))
    made = build(megatron)
    x = torch.randn(TOKENS, 1, HIDDEN)
    with_selector = made(x)
    made.router_replay = None
    without = made(x)
    assert torch.equal(with_selector[0], without[0])
    assert torch.equal(with_selector[1], without[1])


@pytest.mark.upstream
def test_two_plugins_compose(megatron, monkeypatch):
    """The first that decides wins; one that returns None leaves it to the next."""
    from types import ModuleType

    def deciding(name, choice):
        module = ModuleType(name)

        @hookimpl
        def select_experts(scores, topk):
            return choice and (scores[:, choice], torch.tensor([choice]).expand(len(scores), topk))

        vars(module).update({"__file__": "", "select_experts": select_experts})
        return Plugin(Installed(name, "d", "0", None), module)

    hook = Plugins([deciding("b", [3, 4]), deciding("a", None), deciding("c", [0, 1])]).hook
    monkeypatch.setattr(router_seam, "current", lambda: SimpleNamespace(hook=hook))
    _, routing_map = build(megatron)(torch.randn(TOKENS, 1, HIDDEN))
    assert as_indices(routing_map) == [{3, 4}] * TOKENS


@pytest.mark.upstream
def test_the_seams_own_probe_passes_on_megatron(megatron):
    router_seam.probe_selector()


@pytest.mark.upstream
def test_the_seams_own_probe_notices_a_routing_that_does_not_ask(megatron, monkeypatch):
    stock = megatron.router.topk_routing_with_score_function
    monkeypatch.setattr(
        megatron.router,
        "topk_routing_with_score_function",
        lambda logits, topk, router_replay=None, **kwargs: stock(logits, topk, **kwargs),
    )
    with pytest.raises(PluginError, match="does not follow"):
        router_seam.probe_selector()


@pytest.mark.upstream
def test_megatrons_own_replay_beside_ours_is_refused(megatron):
    with pytest.raises(PluginError, match="two features want to decide"):
        build(megatron, moe_enable_routing_replay=True)
