"""Replay on real Megatron models over 2 and 4 processes: each router takes the routing of its tokens and its layer.

The ranks run Megatron's GPTModel and schedules (`tests/parallel`). Tokens are numbered through a rollout, and at every
router the numbers are read back from the residual stream, so that what was routed how is known without our layout code.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]
EXPERTS, TOPK = 8, 2
SECONDS = 240  # a case takes one or two, where nothing else runs
LENGTHS = [5, 3, 1, 7, 2, 6, 4, 9]

pytestmark = pytest.mark.skipif(
    find_spec("megatron") is None, reason='a real Megatron needs `pip install -e ".[embedded]"`'
)


# -- the processes ---------------------------------------------------------------------------------------------------


class Workers:
    """Processes that run one case after another; most of a case's time would be their start."""

    def __init__(self, folder: Path, path: str, *arguments: str) -> None:
        self._folder, self._path, self._arguments = folder, path, arguments
        self._ranks: list[tuple[connection.Connection, subprocess.Popen[bytes]]] = []
        self._stores = itertools.count()

    def _start(self) -> None:
        ours, theirs = Pipe()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MILES_PLUGINS")}
        alone = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TQDM_DISABLE": "1"}
        script = str(Path(__file__).parent / "parallel" / "worker.py")
        with theirs:
            descriptor = theirs.fileno()
            process = subprocess.Popen(
                [sys.executable, script, str(len(self._ranks)), str(descriptor), *self._arguments],
                env={**inherited, **alone, "PYTHONPATH": self._path},
                pass_fds=[descriptor],
            )
        self._ranks.append((ours, process))

    def run(self, case: dict[str, Any]) -> list[dict[str, Any]]:
        """What each rank answers."""
        world = case["layout"]["world"]
        while len(self._ranks) < world:
            self._start()
        case = {**case, "store": str(self._folder / f"store{next(self._stores)}")}
        ranks = [ours for ours, _ in self._ranks[:world]]
        for rank in ranks:
            rank.send(case)
        answers: dict[int, Any] = {}
        until = time.monotonic() + SECONDS
        while len(answers) < world and time.monotonic() < until:
            waiting = [rank for number, rank in enumerate(ranks) if number not in answers]
            for rank in connection.wait(waiting, timeout=until - time.monotonic()):
                kind, answer = self._answer(rank)  # type: ignore[arg-type]
                answers[ranks.index(rank)] = answer  # type: ignore[arg-type]
                if kind == "failed":  # the others may wait for it
                    self.stop()
                    pytest.fail(answer)
        if len(answers) < world:
            self.stop()
            pytest.fail(f"only ranks {sorted(answers)} answered within {SECONDS} s")
        return [answers[number] for number in range(world)]

    @staticmethod
    def _answer(rank: connection.Connection) -> tuple[str, Any]:
        try:
            return rank.recv()
        except EOFError:
            return "failed", "a worker died; what it said is above"

    def stop(self) -> None:
        for ours, process in self._ranks:
            ours.close()
            process.kill()
            process.wait()
        self._ranks.clear()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """With the installed megatron-core, and a stand-in for slime's loop."""
    started = Workers(tmp_path_factory.mktemp("workers"), str(ROOT))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def slime_workers(tmp_path_factory: pytest.TempPathFactory, upstream_path: str) -> Iterator[Workers]:
    """With slime's own loop, on the Megatron-LM that slime is pinned to."""
    path = os.pathsep.join([upstream_path, str(ROOT)])
    started = Workers(tmp_path_factory.mktemp("slime_workers"), path, "slime")
    yield started
    started.stop()


# -- a case ----------------------------------------------------------------------------------------------------------


def layout(
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int | None = None,
    context: int = 1,
    expert: int = 1,
    data: int = 1,
    sequence: bool = False,
    all_gather: bool = False,
    pad: int = 3,
) -> dict[str, Any]:
    return {**locals(), "world": tensor * pipeline * context * data}


def moe_layers(layers: int, frequency: int | list[int]) -> list[int]:
    pattern = [int(layer % frequency == 0) for layer in range(layers)] if isinstance(frequency, int) else frequency
    return [layer for layer in range(layers) if pattern[layer]]


def rollout(
    layers: int,
    data: int = 1,
    steps: tuple[int, ...] = (4,),
    lengths: list[int] | None = None,
    without: tuple[int, ...] = (),
    ending: dict[int, int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Samples of numbered tokens with random routing, two a microbatch.

    Those `without` have none. Those with an `ending` have none for so many last tokens more than usual.
    """
    chosen = random.Random(seed)
    lengths = lengths or LENGTHS[: 2 * sum(steps) * data]
    number = itertools.count(1)  # 0 is slime's padding
    order = chosen.sample(range(len(lengths)), len(lengths))
    of_ranks = [order[rank::data] for rank in range(data)]
    return {
        "tokens": [[next(number) for _ in range(length)] for length in lengths],
        "traces": [
            None
            if index in without
            else [
                [chosen.sample(range(EXPERTS), TOPK) for _ in range(layers)]
                for _ in range(length - 1 - (ending or {}).get(index, 0))
            ]
            for index, length in enumerate(lengths)
        ],
        "microbatches": [[mine[at : at + 2] for at in range(0, len(mine), 2)] for mine in of_ranks],
        "steps": list(steps),
    }


def case(
    stages: list[list[int]],
    script: list[Any] | None = None,
    *,
    steps: tuple[int, ...] = (4,),
    model: dict[str, Any] | None = None,
    rollouts: list[dict[str, Any]] | None = None,
    more: dict[str, Any] | None = None,
    **parallel: Any,
) -> dict[str, Any]:
    """`stages`: the global layers of each pipeline stage; virtual ones follow all first ones, as in Megatron."""
    place = layout(**parallel)
    layers = sum(map(len, stages))
    model = {"num_layers": layers, "num_moe_experts": EXPERTS, "moe_router_topk": TOPK, **(model or {})}
    moe = moe_layers(layers, model.get("moe_layer_freq", 1))
    return {
        "layout": place,
        "model": model,
        "stages": stages,
        "moe": moe,
        "rollouts": rollouts or [rollout(len(moe), place["data"], steps)],
        "script": script or ["receive", "train"],
        **(more or {}),
    }


class Run:
    """What all ranks of a case did in one of its rollouts."""

    def __init__(self, case: dict[str, Any], ranks: list[dict[str, Any]], number: int = 0) -> None:
        self.case, self.ranks = case, ranks
        self._number, self._rollout = number, case["rollouts"][number]
        self._place = {
            token: (sample, position)
            for sample, tokens in enumerate(self._rollout["tokens"])
            for position, token in enumerate(tokens)
        }

    def calls(self, stage: str, whose: str = "actor") -> Iterator[tuple[dict[str, int], dict[str, Any]]]:
        for rank in self.ranks:
            for call in rank["calls"]:
                if (call["rollout"], call["stage"], call["whose"]) == (self._number, stage, whose):
                    yield rank["place"], call

    def recorded(self, token: int, layer: int) -> set[int] | None:
        """What the rollout recorded; None if nothing: padding, the last token of a sample, a masked sample."""
        if token == 0:
            return None
        sample, position = self._place[token]
        trace = self._rollout["traces"][sample]
        if trace is None or position >= len(trace):
            return None
        return set(trace[position][self.case["moe"].index(layer)])

    def misrouted(self, stage: str) -> list[str]:
        """The tokens that went elsewhere than recorded, or not to `TOPK` experts."""
        found = []
        for place, call in self.calls(stage):
            for token, experts in zip(call["tokens"], call["experts"], strict=True):
                recorded = self.recorded(token, call["layer"])
                if len(experts) != TOPK or (recorded is not None and set(experts) != recorded):
                    found.append(f"{place} layer {call['layer']} token {token}: {experts} for {recorded}")
        return found

    def times(self, stage: str) -> dict[tuple[int, int], set[int]]:
        """How often the tokens of a microbatch were routed in a layer, taking the ranks together that share them."""
        together = self.case["layout"]["sequence"]
        counted: Counter[tuple[Any, ...]] = Counter()
        for place, call in self.calls(stage):
            for token in call["tokens"]:
                counted[place["data"], None if together else place["tensor"], call["layer"], token] += 1
        found: dict[tuple[int, int], set[int]] = {}
        tensors = [None] if together else range(self.case["layout"]["tensor"])
        for data, microbatches in enumerate(self._rollout["microbatches"]):
            for (number, samples), layer in itertools.product(enumerate(microbatches), self.case["moe"]):
                tokens = [token for index in samples for token in self._rollout["tokens"][index]]
                times = {counted[data, tensor, layer, token] for tensor in tensors for token in tokens}
                found.setdefault((layer, number), set()).update(times)
        return {which: times for which, times in found.items() if times != {0}}

    def every(self, microbatches: range, times: int = 1) -> dict[tuple[int, int], set[int]]:
        return {(layer, number): {times} for layer in self.case["moe"] for number in microbatches}

    def natural(self, stage: str, whose: str = "actor") -> float:
        """The share of tokens that went where the router itself would have sent them."""
        each = [natural for _, call in self.calls(stage, whose) for natural in call["natural"]]
        return sum(each) / len(each)

    def of_ranks(self, name: str) -> list[Any]:
        return [rank[name] for rank in self.ranks]


def replayed(run: Run, stage: str = "train 0", microbatches: range = range(4), times: Any = 1) -> None:
    """Each token of each microbatch went through each MoE layer so many times, always as recorded."""
    assert run.misrouted(stage) == []
    assert run.times(stage) == (run.every(microbatches, times) if isinstance(times, int) else times)
    assert run.natural(stage) < 0.5, "the recorded routing is none that the routers would choose"


def covered(run: Run, steps: int = 1) -> None:
    """Each rank was told that everything was replayed."""
    for metrics in run.of_ranks("metrics"):
        assert [step["r3/coverage"] for step in metrics] == [1.0] * steps
        assert all(step["r3/different_tokens"] > 0.5 for step in metrics)


def learnt(run: Run) -> None:
    """Every router has a gradient in every step."""
    for place, steps in zip(run.of_ranks("place"), run.of_ranks("gradients"), strict=True):
        assert all(any(values) for step in steps for values in step.values()), place
    routers = {name for steps in run.of_ranks("gradients") for step in steps for name in step}
    assert routers


def flat(values: Any) -> list[float]:
    if isinstance(values, dict):
        values = [values[name] for name in sorted(values)]
    return [number for value in values for number in flat(value)] if isinstance(values, list) else [values]


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


# -- tensor, sequence and expert parallelism -------------------------------------------------------------------------

FLAT = {
    "tensor 2, sequence": {"tensor": 2, "sequence": True},
    "expert 2": {"data": 2, "expert": 2},
    "tensor 2, sequence, expert 2": {"tensor": 2, "sequence": True, "expert": 2},
    "tensor 2, sequence, expert 2, data 2": {"tensor": 2, "sequence": True, "expert": 2, "data": 2},
    "tensor 4, sequence, expert 4": {"tensor": 4, "sequence": True, "expert": 4},
}


@pytest.mark.parametrize("parallel", FLAT.values(), ids=FLAT)
@pytest.mark.parametrize("recompute", [{}, FULL], ids=["", "recomputed"])
def test_routers_that_share_tokens_or_experts(
    workers: Workers, parallel: dict[str, Any], recompute: dict[str, Any]
) -> None:
    steps = (4,) if parallel.get("data", 1) == 1 else (2,)
    one = case([[0, 1, 2]], steps=steps, model={"moe_layer_freq": [0, 1, 1], **recompute}, **parallel)
    run = Run(one, workers.run(one))
    replayed(run, microbatches=range(sum(steps)), times=2 if recompute else 1)
    covered(run)
    learnt(run)


def test_tensor_parallelism_without_sequence_parallelism(workers: Workers) -> None:
    """Megatron trains no MoE so, but computes log-probabilities."""
    one = case([[0, 1]], ["receive", ["forward", ""]], tensor=2)
    run = Run(one, workers.run(one))
    replayed(run, "log_prob")
    assert [place["tensor"] for place in run.of_ranks("place")] == [0, 1]


# -- pipelines -------------------------------------------------------------------------------------------------------

EVEN = [[0, 1], [2, 3]]
RECOMPUTE: dict[str, tuple[dict[str, Any], Callable[[int, int], int]]] = {
    "none": ({}, lambda layer, number: 1),
    "selective": ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, lambda layer, number: 2),
    "selective, norm": (
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm", "moe"]},
        lambda layer, number: 2,
    ),
    "full, uniform": (FULL, lambda layer, number: 2),
    "full, uniform, two layers": ({**FULL, "recompute_num_layers": 2}, lambda layer, number: 2),
    "full, block": ({**FULL, "recompute_method": "block"}, lambda layer, number: 2 if layer in (0, 2) else 1),
    # Only every second microbatch, and the last stage, which runs each backward at once, none.
    "full, partial microbatches": (
        {**FULL, "num_microbatches_with_partial_activation_checkpoints": 1},
        lambda layer, number: 2 if layer < 2 and number % 2 else 1,
    ),
}


@pytest.fixture(scope="module")
def without_recomputation(workers: Workers) -> Run:
    one = case(EVEN, ["receive", "train", "receive", "train"], pipeline=2)
    return Run(one, workers.run(one))


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_one_forward_one_backward_with_recomputation(
    workers: Workers, without_recomputation: Run, recompute: str
) -> None:
    changed, times = RECOMPUTE[recompute]
    one = case(EVEN, ["receive", "train", "receive", "train"], model=changed, pipeline=2)
    run = Run(one, workers.run(one))
    # The rollout is trained on twice, so that the second time's loss depends on the first one's gradients.
    twice = {which: {2 * n for n in each} for which, each in expected(run, times).items()}
    replayed(run, times=twice)
    covered(run, steps=2)
    learnt(run)
    # Bit for bit, unless a gradient is summed in another order.
    tolerance = (1e-5, 1e-7) if "norm" in recompute else (0.0, 0.0)
    for name in ("losses", "gradients"):
        assert flat(run.of_ranks(name)) == pytest.approx(flat(without_recomputation.of_ranks(name)), *tolerance)


def expected(run: Run, times: Callable[[int, int], int], microbatches: range = range(4)) -> dict[Any, set[int]]:
    return {(layer, number): {times(layer, number)} for layer in run.case["moe"] for number in microbatches}


def test_the_schedule_is_one_in_which_a_cursor_goes_wrong(workers: Workers) -> None:
    """Else the tests above would show less than they say."""
    one = case(EVEN, model=FULL, pipeline=2)
    run = Run(one, workers.run(one))
    firsts = [sorted(call["tokens"])[-1] for place, call in run.calls("train 0") if place["pipeline"] == 0]
    order = [list(dict.fromkeys(firsts)).index(token) for token in firsts]
    assert order == [0, 0, 1, 1, 0, 0, 2, 2, 1, 1, 3, 3, 2, 2, 3, 3], "microbatch 1's forward before 0's backward"


STAGES: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "short first": ([[0], [1, 2, 3]], {"num_layers_in_first_pipeline_stage": 1}),
    "short last": ([[0, 1, 2], [3]], {"num_layers_in_last_pipeline_stage": 1}),
    "dense first layer": (EVEN, {"moe_layer_freq": [0, 1, 1, 1]}),
    "every second layer": ([[0, 1, 2], [3, 4, 5]], {"moe_layer_freq": 2}),
    "short first, dense in the middle": (
        [[0], [1, 2, 3]],
        {"num_layers_in_first_pipeline_stage": 1, "moe_layer_freq": [1, 0, 1, 1]},
    ),
    "no experts in the first stage": (EVEN, {"moe_layer_freq": [0, 0, 1, 1]}),
    "by layout": (
        [[0], [1, 2, 3]],
        {"pipeline_model_parallel_layout": [["embedding", "decoder"], [*["decoder"] * 3, "loss"]]},
    ),
}


@pytest.mark.parametrize("stages", STAGES)
def test_pipeline_stages_of_any_size_and_kind(workers: Workers, stages: str) -> None:
    layers, changed = STAGES[stages]
    one = case(layers, ["receive", ["forward", ""], "train"], model={**changed, **FULL}, pipeline=2)
    run = Run(one, workers.run(one))
    replayed(run, "log_prob")
    replayed(run, times=2)
    covered(run)
    learnt(run)
    # And each stage fetched the routing of its own layers only.
    for place, asked in zip(run.of_ranks("place"), run.of_ranks("asked"), strict=True):
        own = [one["moe"].index(layer) for layer in layers[place["pipeline"]] if layer in one["moe"]]
        assert [int(name.rpartition("MoE layer ")[2]) for name in asked if name.startswith("routing for")] == own


VIRTUAL: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "even": ([[0], [1], [2], [3]], {}),
    "dense layers": ([[0], [1], [2], [3]], {"moe_layer_freq": [0, 1, 1, 1]}),
    "uneven": ([[0], [1, 2], [3], [4, 5]], {"num_layers_in_first_pipeline_stage": 2}),
    "by layout": (
        [[0, 1], [2], [3], [4]],
        {
            "pipeline_model_parallel_layout": [
                ["embedding", "decoder", "decoder"],
                ["decoder"],
                ["decoder"],
                ["decoder", "loss"],
            ],
            "moe_layer_freq": 2,
        },
    ),
}


@pytest.mark.parametrize("recompute", ["none", "full, uniform"])
@pytest.mark.parametrize("stages", VIRTUAL)
def test_interleaved_virtual_stages(workers: Workers, stages: str, recompute: str) -> None:
    layers, changed = VIRTUAL[stages]
    full, times = RECOMPUTE[recompute]
    script = ["receive", ["forward", ""], "train"]
    one = case(layers, script, model={**changed, **full}, pipeline=2, virtual=2)
    run = Run(one, workers.run(one))
    replayed(run, "log_prob")
    replayed(run, times=times(0, 0))
    covered(run)
    learnt(run)


def test_interleaved_virtual_stages_that_recompute_some_microbatches(workers: Workers) -> None:
    changed = {**FULL, "num_microbatches_with_partial_activation_checkpoints": 2}
    one = case([[0], [1], [2], [3]], model=changed, pipeline=2, virtual=2)
    run = Run(one, workers.run(one))
    times = run.times("train 0")
    assert sorted(times) == sorted(run.every(range(4)))
    assert {frozenset(each) for each in times.values()} == {frozenset({1}), frozenset({2})}, "some, not all"
    replayed(run, times=times)
    covered(run)
    learnt(run)


# -- all together, on four ranks -------------------------------------------------------------------------------------

FOUR: dict[str, tuple[list[list[int]], dict[str, Any], dict[str, Any]]] = {
    "tensor 2, expert 2, pipeline 2": (EVEN, {"tensor": 2, "sequence": True, "expert": 2, "pipeline": 2}, {}),
    "tensor 2, pipeline 2, virtual 2": (
        [[0], [1], [2], [3]],
        {"tensor": 2, "sequence": True, "pipeline": 2, "virtual": 2},
        {"moe_layer_freq": [0, 1, 1, 1]},
    ),
    "pipeline 2, virtual 2, data 2, expert 2": (
        [[0], [1], [2], [3]],
        {"pipeline": 2, "virtual": 2, "data": 2, "expert": 2},
        {},
    ),
    "pipeline 4": (
        [[0], [1, 2], [3, 4], [5]],
        {"pipeline": 4},
        {
            "num_layers_in_first_pipeline_stage": 1,
            "num_layers_in_last_pipeline_stage": 1,
            "moe_layer_freq": [1, 0, 1, 1, 1, 1],
        },
    ),
}


@pytest.mark.parametrize("recompute", ["none", "full, uniform"])
@pytest.mark.parametrize("layouts", FOUR)
def test_four_ranks(workers: Workers, layouts: str, recompute: str) -> None:
    stages, parallel, changed = FOUR[layouts]
    full, times = RECOMPUTE[recompute]
    steps = (2,) if parallel.get("data", 1) == 2 else (4,)
    script = ["receive", ["forward", ""], "train"]
    one = case(stages, script, steps=steps, model={**changed, **full}, **parallel)
    run = Run(one, workers.run(one))
    replayed(run, "log_prob", range(steps[0]))
    replayed(run, "train 0", range(steps[0]), times(0, 0))
    covered(run)
    learnt(run)


# -- passes, steps and rollouts --------------------------------------------------------------------------------------

PASSES = [["forward", "ref_"], ["forward", "teacher_"], ["forward", ""], "train"]


@pytest.mark.parametrize("virtual", [None, 2], ids=["", "virtual"])
def test_every_pass_of_several_steps_and_rollouts(workers: Workers, virtual: int | None) -> None:
    steps = (2, 4, 2) if virtual else (2, 1, 1)
    lengths = (LENGTHS * 2)[: 2 * sum(steps)]
    one = case(
        [[0], [1], [2], [3]] if virtual else EVEN,
        ["receive", *PASSES, ["receive", 1], *PASSES],
        model=FULL,
        rollouts=[rollout(4, steps=steps, lengths=lengths, seed=seed) for seed in (1, 2)],
        more={"rate": 3.0},
        pipeline=2,
        virtual=virtual,
    )
    ranks = workers.run(one)
    for number in range(2):
        run = Run(one, ranks, number)
        for stage in ("ref_log_prob", "teacher_log_prob"):
            assert run.natural(stage) == 1.0
            assert run.times(stage) == run.every(range(sum(steps)))
        replayed(run, "log_prob", range(sum(steps)))
        begin = 0
        for step, microbatches in enumerate(steps):
            replayed(run, f"train {step}", range(begin, begin + microbatches), 2)
            begin += microbatches
    covered(run, steps=2 * len(steps))
    learnt(run)
    assert len({tuple(flat(step)) for step in ranks[0]["gradients"]}) == 2 * len(steps)


def test_after_an_exception_in_a_forward_the_next_step_is_clean(workers: Workers) -> None:
    script = ["receive", ["fail", "router", None, 8], ["raises", "train"], "train"]
    parallel = {"tensor": 2, "sequence": True, "expert": 2}
    one = case([[0, 1, 2]], script, model=FULL, **parallel)
    run, unharmed = Run(one, workers.run(one)), case([[0, 1, 2]], model=FULL, **parallel)
    assert run.of_ranks("raised") == [[["Boom", ""]]] * 2
    assert run.misrouted("train 0") == []
    times = run.times("train 0")
    assert times.pop((0, 0)) == {4}, "of the step that failed as well"
    assert times[1, 1] == {3}, "the eighth call is in the second microbatch's forward, after the first one's backward"
    assert times[2, 3] == {2}
    covered(run)
    clean = Run(unharmed, workers.run(unharmed))
    assert run.of_ranks("gradients") == clean.of_ranks("gradients")
    assert run.of_ranks("losses") == clean.of_ranks("losses")


def test_after_an_exception_in_a_recomputation_the_next_step_is_clean(workers: Workers) -> None:
    """Of the last microbatch, when nothing is on its way between the stages any more."""
    faults = [["fail", "router", 0, 15], ["fail", "optimizer", 1]]
    one = case(EVEN, ["receive", *faults, ["raises", "train"], "train"], model=FULL, pipeline=2)
    run, unharmed = Run(one, workers.run(one)), case(EVEN, model=FULL, pipeline=2)
    assert run.of_ranks("raised") == [[["Boom", ""]]] * 2
    assert run.misrouted("train 0") == []
    assert run.times("train 0")[0, 3] == {3}, "the first step did not come to recompute it"
    covered(run)
    assert run.of_ranks("gradients") == Run(unharmed, workers.run(unharmed)).of_ranks("gradients")


# -- whose routers ---------------------------------------------------------------------------------------------------


def test_the_critic_routes_for_itself(workers: Workers) -> None:
    one = case(EVEN, ["receive", "values", "train"], more={"role": "critic"}, pipeline=2)
    run = Run(one, workers.run(one))
    for stage in ("values", "train 0"):
        assert run.natural(stage) == 1.0
        assert run.times(stage) == run.every(range(4))
    assert run.of_ranks("asked") == [[], []], "it fetches nothing either"
    assert run.of_ranks("metrics") == [[{}], [{}]]
    assert run.of_ranks("evidence") == [["not the actor: natural routing"]] * 2


def test_another_model_in_the_same_pass_routes_for_itself(workers: Workers) -> None:
    one = case([[0, 1]], ["receive", "build_another", "train"], tensor=2, sequence=True)
    run = Run(one, workers.run(one))
    replayed(run)
    covered(run)
    assert run.natural("train 0", "another") == 1.0
    assert len(list(run.calls("train 0", "another"))) == 2 * 4 * 2


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_the_draft_heads_routers_route_for_themselves(workers: Workers, recompute: str) -> None:
    """Megatron's draft head does not recompute whole layers of packed sequences."""
    changed, times = RECOMPUTE[recompute]
    script = ["receive", ["forward", ""], "train"]
    one = case(EVEN, script, model={"mtp_num_layers": 1, **changed}, pipeline=2)
    run = Run(one, workers.run(one))
    replayed(run, "log_prob")
    replayed(run, times=times(0, 0))
    covered(run)
    drafts = list(run.calls("train 0", "draft"))
    assert len(drafts) >= 4
    assert {place["pipeline"] for place, _ in drafts} == {1}
    assert run.natural("train 0", "draft") == 1.0
    assert run.of_ranks("evidence") == [["2 routers of this rank replay"]] * 2


def test_a_decoder_that_was_built_twice_replays_in_the_one_that_lives(workers: Workers) -> None:
    one = case(EVEN, model=FULL, more={"built": "twice"}, pipeline=2)
    run = Run(one, workers.run(one))
    replayed(run, times=2)
    covered(run)
    assert run.of_ranks("evidence") == [["2 routers of this rank replay"]] * 2


# -- the count -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["train", "log_prob"])
def test_a_router_that_does_not_ask_ends_the_pass_on_every_rank(workers: Workers, stage: str) -> None:
    ending = "train" if stage == "train" else ["forward", ""]
    then = ["raises", *([ending] if isinstance(ending, str) else ending)]
    one = case(EVEN, ["receive", ["bypass", 1], then], pipeline=2)
    for ((kind, said),) in Run(one, workers.run(one)).of_ranks("raised"):
        assert kind == "PluginError"
        assert f"routing was not replayed everywhere in the {stage} pass" in said
        assert "layers    3\n" in said


@pytest.mark.parametrize(
    ("missing", "unrecorded"),
    [({"without": (3, 5)}, {3: 6, 5: 5}), ({"ending": {0: 2, 7: 8}}, {0: 2, 7: 8})],
    ids=["masked samples", "a tool's answer at the end"],
)
def test_tokens_without_routing_are_told_apart_from_those_that_were_not_replayed(
    workers: Workers, missing: dict[str, Any], unrecorded: dict[int, int]
) -> None:
    some = rollout(3, **missing)
    changed = {**FULL, "num_layers_in_first_pipeline_stage": 1}
    one = case([[0], [1, 2]], rollouts=[some], more={"missing": "drop"}, pipeline=2, model=changed)
    run = Run(one, workers.run(one))
    replayed(run, times=2)
    choices = sum(len(tokens) - 1 for tokens in some["tokens"])
    share = 1 - sum(unrecorded.values()) / choices
    assert [metrics["r3/coverage"] for (metrics,) in run.of_ranks("metrics")] == pytest.approx([share] * 2)


def test_measuring_leaves_the_routing_natural(workers: Workers) -> None:
    one = case(EVEN, more={"measure_only": True}, pipeline=2)
    run = Run(one, workers.run(one))
    assert run.natural("train 0") == 1.0
    for (metrics,) in run.of_ranks("metrics"):
        assert metrics["r3/coverage"] == 0.0
        assert metrics["r3/different_tokens"] > 0.5


# -- slime's own loop, and context parallelism, whose layout is slime's ----------------------------------------------

SLIMES: dict[str, tuple[list[list[int]], dict[str, Any], dict[str, Any]]] = {
    "context 2, zigzag": ([[0, 1]], {"context": 2}, {}),
    "context 2, all-gather": ([[0, 1]], {"context": 2, "all_gather": True}, {}),
    "pipeline 2": (EVEN, {"pipeline": 2}, {"moe_layer_freq": [0, 1, 1, 1]}),
    "pipeline 2, virtual 2": ([[0], [1], [2], [3]], {"pipeline": 2, "virtual": 2}, {}),
    "context 4, zigzag": ([[0, 1]], {"context": 4}, {}),
    "context 4, all-gather, expert 4": ([[0, 1]], {"context": 4, "all_gather": True, "expert": 4}, {}),
    "context 2, tensor 2, sequence": ([[0, 1]], {"context": 2, "tensor": 2, "sequence": True, "expert": 2}, {}),
    "context 2, all-gather, tensor 2, sequence": (
        [[0, 1]],
        {"context": 2, "all_gather": True, "tensor": 2, "sequence": True},
        {},
    ),
    "context 2, pipeline 2, virtual 2": ([[0], [1], [2], [3]], {"context": 2, "pipeline": 2, "virtual": 2}, {}),
}


@pytest.mark.upstream
@pytest.mark.parametrize("layouts", SLIMES)
def test_slimes_own_loop(slime_workers: Workers, layouts: str) -> None:
    stages, parallel, changed = SLIMES[layouts]
    steps = (2, 2) if parallel.get("pipeline") else (1, 3)
    script = ["receive", ["forward", "ref_"], ["forward", ""], "train"]
    one = case(stages, script, steps=steps, model={**changed, **FULL}, **parallel)
    run = Run(one, slime_workers.run(one))
    assert run.natural("ref_log_prob") == 1.0
    replayed(run, "log_prob")
    replayed(run, "train 0", range(steps[0]), 2)
    replayed(run, "train 1", range(steps[0], 4), 2)
    learnt(run)
    (logged,) = [steps for steps in run.of_ranks("metrics") if steps]
    assert [step["train/r3/coverage"] for step in logged] == [1.0, 1.0]


# -- the check itself ------------------------------------------------------------------------------------------------


def test_the_check_notices_routing_of_other_tokens_layers_and_microbatches(workers: Workers) -> None:
    one = case(EVEN, model=FULL, pipeline=2)
    ranks = workers.run(one)
    assert Run(one, ranks).misrouted("train 0") == []
    traces = one["rollouts"][0]["traces"]
    longest = max(traces, key=len)
    wrong = {
        "of the next token": [trace[1:] + trace[:1] for trace in traces],
        "of the next layer": [[layers[1:] + layers[:1] for layers in trace] for trace in traces],
        "of another sample": [longest[: len(trace)] for trace in traces],
    }
    for what, changed in wrong.items():
        other = {**one, "rollouts": [{**one["rollouts"][0], "traces": changed}]}
        assert len(Run(other, ranks).misrouted("train 0")) > 50, what
    for rank in ranks:
        rank["calls"] = rank["calls"][:-1]
    assert Run(one, ranks).times("train 0") != Run(one, ranks).every(range(4), 2)
