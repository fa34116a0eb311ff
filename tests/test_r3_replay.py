"""Replay on one model: recorded experts, current probabilities, and an honest count; on Megatron's own routers too."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from miles_plugins import ArgumentError, PluginError, hookimpl
from miles_plugins.manager import Installed, Plugin, Plugins
from miles_plugins.microbatch import Microbatch, bind, set_current
from miles_plugins.patches.megatron import router as router_seam
from miles_plugins.r3_replay import plugin as r3
from miles_plugins.r3_replay.replay import Recorded, Replay

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
    layers: int, tokens: int = TOKENS, topk: int = TOPK, without: tuple[int, ...] = (), seed: int = 0
) -> Recorded:
    """The routing of a microbatch, which says nothing of the tokens `without`."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(layers, tokens, EXPERTS, generator=generator).topk(topk, dim=-1).indices.to(torch.uint8)
    known = torch.ones(tokens, dtype=torch.bool)
    known[list(without)] = False
    return Recorded(indices, known, replayed=set())


def select(replay: Replay, router: torch.nn.Module, microbatch: Recorded, scores=None, recomputing=False, topk=TOPK):
    scores = torch.randn(microbatch.indices.shape[1], EXPERTS) if scores is None else scores
    return replay.select(router, microbatch, recomputing, scores, topk, lambda: torch.topk(scores, topk, dim=1))


def one_pass(replay: Replay, *microbatches: Recorded) -> list[float]:
    replay.begin()
    for microbatch in microbatches:
        replay.add(microbatch)
        for router in replay._layer_of:
            select(replay, router, microbatch)
    replay.end()
    return replay.counts().tolist()


# -- binding ---------------------------------------------------------------------------------------------------------


def test_each_router_takes_the_routing_of_its_layer():
    chunks = [model(1, 2, dense=(1,)), model(5, 6, dense=(6,))]  # one rank of a pipeline, two virtual stages
    replay = Replay(chunks, layers=[1, 2, 4])  # global indices; layer 2 is on another rank
    assert replay.local_layers == {0, 2}
    microbatch = recorded(layers=3)
    second, fifth = routers(*chunks)
    assert torch.equal(select(replay, second, microbatch)[1], microbatch.indices[0].long())
    assert torch.equal(select(replay, fifth, microbatch)[1], microbatch.indices[2].long())


def test_a_rank_without_routers_replays_nothing():
    replay = Replay([model(1, 2, dense=(1, 2))], layers=[2])
    assert replay.local_layers == set()
    assert one_pass(replay, recorded(1)) == [0, 0, 0]


def test_a_router_where_the_arguments_have_no_moe_layer_is_refused():
    with pytest.raises(PluginError, match="not the ones that its arguments describe") as caught:
        Replay([model(1, 2)], layers=[0])
    assert caught.value.facts["its layer"] == 1
    assert caught.value.facts["router"] == "decoder.layers.1.mlp.router"


def test_two_routers_of_one_layer_are_refused():
    with pytest.raises(PluginError, match="not the ones"):
        Replay([model(1), model(1)], layers=[0])


def test_the_draft_heads_router_chooses_for_itself():
    chunk = model(1)
    chunk.mtp = model(1)
    replay = Replay([chunk], layers=[0])
    main, draft = routers(chunk)
    microbatch = recorded(1)
    assert select(replay, draft, microbatch) is None
    assert select(replay, main, microbatch) is not None
    assert one_pass(replay, recorded(1))[:2] == [TOKENS, TOKENS], "nor is it expected to replay"


def test_a_router_of_another_model_chooses_for_itself():
    chunk, other = model(1), model(1)
    replay = Replay([chunk], layers=[0])
    assert select(replay, routers(other)[0], recorded(1)) is None


def test_the_routers_may_go():
    """A reference model is swapped in and out; the replay must not keep dead routers alive."""
    chunk = model(1)
    replay = Replay([chunk], layers=[0])
    del chunk
    assert replay.local_layers == set()


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
    replayed, expected, _ = one_pass(replay, recorded(3, without=(0, 5)), recorded(3, tokens=4))
    assert replayed == expected == 3 * (TOKENS - 2 + 4)


def test_a_router_that_was_not_asked_is_missing_from_the_count():
    chunk = model(1, 2)
    replay = Replay([chunk], layers=[0, 1])
    replay.begin()
    microbatches = [recorded(2), recorded(2, without=(1,))]
    for microbatch in microbatches:
        replay.add(microbatch)
        select(replay, routers(chunk)[0], microbatch)
    select(replay, routers(chunk)[1], microbatches[0])
    assert replay.counts().tolist()[:2] == [2 * TOKENS + (TOKENS - 1), 2 * (TOKENS + TOKENS - 1)]


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
    assert replay.counts().tolist() == [TOKENS - 1, TOKENS - 1, 2]


def test_every_pass_counts_for_itself():
    chunk = model(1)
    replay = Replay([chunk], layers=[0])
    first = one_pass(replay, recorded(1), recorded(1))
    second = one_pass(replay, recorded(1))
    assert first[:2] == [2 * TOKENS] * 2
    assert second[:2] == [TOKENS] * 2


def test_after_an_exception_in_a_pass_the_next_one_is_clean():
    chunk = model(1, 2)
    replay = Replay([chunk], layers=[0, 1])
    replay.begin()
    half = recorded(2)
    replay.add(half)
    select(replay, routers(chunk)[0], half)  # … and then the second layer raised
    replay.end()
    assert one_pass(replay, recorded(2))[:2] == [2 * TOKENS] * 2


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
    assert one_pass(Replay([chunk], layers=[0])) == [0, 0, 0]


# -- the plugin ------------------------------------------------------------------------------------------------------


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
            **changed,
        }
    )


@pytest.fixture
def trainer(monkeypatch):
    """One trainer process with a model of two MoE layers; reductions are over this rank alone."""
    monkeypatch.setattr(r3, "_replay", None)
    monkeypatch.setattr(r3, "_metrics", {})
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None, raising=False)
    chunk = model(1, 2)
    r3.model_built(args=arguments(), model=[chunk], role="actor")
    yield SimpleNamespace(args=arguments(), chunk=chunk, routers=routers(chunk))
    set_current(None)


def begin_microbatch(trainer, tokens: int = TOKENS, seed: int = 0) -> Microbatch:
    trace = recorded(2, tokens=tokens - 1, seed=seed).indices.transpose(0, 1)  # one sample, whose last token has no row
    batch = {"rollout_routed_experts": [trace], "unconcat_tokens": [torch.zeros(tokens)]}
    microbatch = Microbatch(batch, torch.arange(tokens))
    set_current(microbatch)
    r3.microbatch_begins(args=trainer.args, microbatch=microbatch)
    return microbatch


def ask(router: Router, scores=None):
    scores = torch.randn(TOKENS, EXPERTS) if scores is None else scores
    return r3.select_experts(router, scores, TOPK, lambda: torch.topk(scores, TOPK, dim=1))


@pytest.mark.parametrize("stage", ["log_prob", "train"])
def test_the_actors_passes_replay(trainer, stage):
    r3.pass_begins(stage)
    microbatch = begin_microbatch(trainer)
    for layer, router in enumerate(trainer.routers):
        trace = microbatch.batch["rollout_routed_experts"][0]
        assert torch.equal(ask(router)[1][:-1], trace[:, layer].long())
    r3.pass_ends(stage, [trainer.chunk], None)
    metrics = r3.step_metrics()
    assert (metrics.get("r3/coverage") == 1.0) == (stage == "train")
    assert ("r3/different_tokens" in metrics) == (stage == "train")


@pytest.mark.parametrize("stage", ["ref_log_prob", "teacher_log_prob", "values"])
def test_other_passes_route_for_themselves(trainer, stage):
    r3.pass_begins(stage)
    microbatch = begin_microbatch(trainer)
    assert microbatch.values == {}
    assert ask(trainer.routers[0]) is None
    r3.pass_ends(stage, [trainer.chunk], None)


def test_outside_of_a_pass_routers_choose_for_themselves(trainer):
    assert ask(trainer.routers[0]) is None


def test_an_incomplete_replay_ends_the_run(trainer):
    r3.pass_begins("train")
    begin_microbatch(trainer)
    ask(trainer.routers[0])
    with pytest.raises(PluginError, match="not replayed everywhere in the train pass") as caught:
        r3.pass_ends("train", [trainer.chunk], None)
    assert caught.value.facts["replayed"].startswith(f"{TOKENS - 1} ")
    assert caught.value.facts["expected"] == str(2 * (TOKENS - 1))


def test_a_pass_that_raised_is_not_judged_and_the_next_is_clean(trainer):
    r3.pass_begins("train")
    begin_microbatch(trainer)
    ask(trainer.routers[0])
    r3.pass_ends("train", [trainer.chunk], RuntimeError("out of memory"))
    r3.pass_begins("ref_log_prob")
    assert begin_microbatch(trainer).values == {}
    r3.pass_ends("ref_log_prob", [trainer.chunk], None)
    test_the_actors_passes_replay(trainer, "train")


def test_interleaved_microbatches_with_recomputation(trainer):
    """1F1B: the backward of the first microbatch runs after the forward of the second."""
    r3.pass_begins("train")
    bound, traces = [], []
    for seed in range(2):
        microbatch = begin_microbatch(trainer, seed=seed)
        traces.append(microbatch.batch["rollout_routed_experts"][0])
        bound.append([bind(lambda router=router: ask(router)[1][:-1]) for router in trainer.routers])
        for function in bound[-1]:
            function()
    for seed in (0, 1):
        for layer, function in reversed(list(enumerate(bound[seed]))):
            assert torch.equal(function(), traces[seed][:, layer].long())
    r3.pass_ends("train", [trainer.chunk], None)
    assert r3.step_metrics()["r3/coverage"] == 1.0


def test_the_critic_is_not_bound(trainer):
    before = r3._replay
    r3.model_built(args=arguments(), model=[model(7)], role="critic")
    assert r3._replay is before


def test_the_routing_must_reach_the_trainer():
    assert r3.take_routed_experts({"rollout_routed_experts": []}) is True
    with pytest.raises(PluginError, match="carries no routing"):
        r3.take_routed_experts({"tokens": [], "rewards": []})


def test_samples_become_compact_traces():
    samples = [
        SimpleNamespace(index=number, tokens=[0] * 4, rollout_routed_experts=recorded(3, tokens=2, seed=number).indices)
        for number in range(2)
    ]
    train_data = {"tokens": [sample.tokens for sample in samples]}
    r3.collect_train_data(arguments(moe_layer_freq=[0, 1]), samples, train_data)
    kept = train_data["rollout_routed_experts"]
    assert [tuple(each.shape) for each in kept] == [(3, 1, TOPK)] * 2
    samples[1].rollout_routed_experts = None
    with pytest.raises(PluginError, match="sample 1"):
        r3.collect_train_data(arguments(moe_layer_freq=[0, 1]), samples, train_data)


def test_training_data_that_lost_or_changed_a_sample_is_refused():
    samples = [SimpleNamespace(index=0, tokens=[0] * 4), SimpleNamespace(index=1, tokens=[0] * 5)]
    for tokens in ([[0] * 4], [[0] * 5, [0] * 4], [[0] * 4, [0] * 4 + [1]]):
        with pytest.raises(PluginError, match="one for one and in order"):
            r3.collect_train_data(arguments(), samples, {"tokens": tokens})


def test_routing_that_does_not_belong_to_the_tokens_is_refused(trainer):
    r3.pass_begins("train")
    trace = recorded(2, tokens=TOKENS - 2).indices.transpose(0, 1)
    batch = {"rollout_routed_experts": [trace], "unconcat_tokens": [torch.zeros(TOKENS)]}
    with pytest.raises(PluginError, match="does not belong to its tokens"):
        r3.microbatch_begins(args=trainer.args, microbatch=Microbatch(batch, torch.arange(TOKENS)))


def test_a_bound_router_without_a_microbatch_is_an_error(trainer):
    """A recomputation in another thread, say, that nothing has bound to its microbatch."""
    r3.pass_begins("train")
    begin_microbatch(trainer)
    with ThreadPoolExecutor(1) as thread, pytest.raises(PluginError, match="nothing says for which microbatch"):
        thread.submit(ask, trainer.routers[0]).result()


def test_a_model_without_its_routers_is_refused(trainer):
    with pytest.raises(PluginError, match="without a router") as caught:
        r3.model_built(args=arguments(), model=[model(2)], role="actor")
    assert caught.value.facts["layers"] == "0"


def test_a_critic_says_that_it_routes_for_itself(monkeypatch):
    monkeypatch.setattr(r3, "_replay", None)
    assert r3.probe("trainer")


@pytest.mark.parametrize("on", [True, False])
def test_the_engine_is_asked_for_its_routing_only_if_it_records_it(on):
    request = SimpleNamespace(return_routed_experts=False)
    r3.receive_engine_request(SimpleNamespace(enable_return_routed_experts=on), request)
    assert request.return_routed_experts is on


def test_arguments_that_fit():
    args = arguments()
    r3.configure(args)
    assert args.use_routing_replay is False
    assert args.use_rollout_routing_replay is True


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"num_experts": None}, "--num-experts"),
        ({"moe_router_fusion": True}, "--moe-router-fusion"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "--moe-router-load-balancing-type"),
        ({"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]}, "--moe-router-load-balancing-type"),
        ({"moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor"),
        ({"moe_enable_routing_replay": True}, "--moe-enable-routing-replay"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
        ({"prefill_num_servers": 1}, "--prefill-num-servers"),
        ({"use_rollout_routing_replay": False}, "--custom-config-path"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_cannot_work_are_refused(changed, flag):
    with pytest.raises(ArgumentError, match="r3_replay cannot work") as caught:
        r3.configure(arguments(**changed))
    assert list(caught.value.facts) == [flag]


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
        record = Recorded(indices[None].to(torch.uint8), torch.ones(TOKENS, dtype=torch.bool), set())
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
    assert r3._replay.counts().tolist() == [TOKENS, TOKENS, 0]

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
        lambda logits, topk, router_replay=None: stock(logits, topk),
    )
    with pytest.raises(PluginError, match="does not follow"):
        router_seam.probe_selector()


@pytest.mark.upstream
def test_megatrons_own_replay_beside_ours_is_refused(megatron):
    with pytest.raises(PluginError, match="two features want to decide"):
        build(megatron, moe_enable_routing_replay=True)
