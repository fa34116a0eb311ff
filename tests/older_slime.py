"""What a release of slime does under our patches, in a process of its own: python older_slime.py FOLDER SLIME MEGATRON.

PYTHONPATH holds that slime, its Megatron-LM, its SGLang and this repository. It prints JSON: behaviour -> what is wrong
with it. Two things stand in for what cannot run here: a local HTTP server for SGLang's router, and one process for two
data-parallel ranks, whose numbers it is told.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import importlib
import inspect
import io
import json
import logging
import os
import sys
import threading
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

BEHAVIOURS: dict[str, Callable[[], None]] = {}
LAYERS, TOPK, EXPERTS = 2, 2, 8
run = SimpleNamespace()  # what behaviours leave for later ones


def behaviour(function: Callable[[], None]) -> Callable[[], None]:
    """They run in this order."""
    BEHAVIOURS[function.__name__.replace("_", " ")] = function
    return function


@contextmanager
def raised(kind: type[BaseException]) -> Iterator[SimpleNamespace]:
    """What must raise; the error is left in `error`."""
    caught = SimpleNamespace(error=None)
    try:
        yield caught
    except kind as error:
        caught.error = error
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


def experts_of(tokens: Sequence[int], version: int) -> Any:
    """[tokens, layers, topk] uint8: experts that tell a token, its position, its layer and the weights apart."""
    import torch

    rows = []
    for position, token in enumerate(tokens):
        first = [(3 * token + position + 5 * layer + version) % EXPERTS for layer in range(LAYERS)]
        other = [(first[layer] + 1 + (token + layer) % (EXPERTS - 1)) % EXPERTS for layer in range(LAYERS)]
        rows.append([list(pair) for pair in zip(first, other, strict=True)])
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), LAYERS, TOPK)


# -- patches ---------------------------------------------------------------------------------------------------------


@behaviour
def every_patch_of_slime_megatron_ray_and_torch_is_verified() -> None:
    """SGLang's own have tests of their own; most of its modules need its kernels."""
    patches = [patch for patch in run.activation.patches if not patch.module.startswith("sglang")]
    for patch in patches:
        importlib.import_module(patch.module)
    ids = {patch.id for patch in patches}
    states = {
        record.patch.id: record.state.value for record in run.activation.patches.records() if record.patch.id in ids
    }
    run.verified = len(ids)
    assert set(states.values()) <= {"verified", "superseded"}, {
        name: state for name, state in states.items() if state not in ("verified", "superseded")
    }
    assert {"slime.response.received", "slime.response.generated"} & ids
    assert {"slime.shared-data.receive", "slime.microbatch.begins", "slime.metrics.rollout"} <= ids


# -- arguments -------------------------------------------------------------------------------------------------------


def parse(*flags: str) -> Namespace:
    """slime's parse_args of a command line, through our layer."""
    from slime.utils import arguments

    from miles_plugins.patches.slime import arguments as ours

    ours._main_options.clear()  # a driver parses once
    ours._sglang_options.clear()
    sys.argv = ["train.py", *run.flags, *flags]
    with redirect_stdout(io.StringIO()) as run.output, redirect_stderr(io.StringIO()) as run.errors:
        parsed: Namespace = arguments.parse_args()
    return parsed


@behaviour
def flags_are_parsed_and_plugins_configured() -> None:
    from miles_plugins.cpu_rehearsal import toy_task
    from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model
    from miles_plugins.entrypoints.rehearse import Rehearsal, slime_flags

    more = ("--n-samples-per-prompt", "4", "--global-batch-size", "8", "--data-pad-size-multiplier", "4")
    rehearsal = Rehearsal(run.folder, run.slime, run.megatron, layers=LAYERS, experts=EXPERTS, topk=TOPK)
    rehearsal = Rehearsal(**{**vars(rehearsal), "extra_flags": more})
    model = write_tiny_model(run.folder / "model", layers=LAYERS, experts=EXPERTS, topk=TOPK)
    toy_task.write_prompts(run.folder / toy_task.PROMPTS, 4, 0)
    flags = slime_flags(rehearsal, model, toy_task.flags(run.folder))
    added = run.activation.hook.default_flags(flags=tuple(flags))
    metrics = run.folder / "metrics.jsonl"
    users = json.dumps({"CUDA_DEVICE_MAX_CONNECTIONS": "7"})
    run.flags = [word for defaults in added for word in defaults] + flags
    run.flags += ["--metrics-jsonl", str(metrics), "--train-env-vars", users]

    args = run.args = parse("--r3-earlier-rows", "keep")
    assert args.metrics_jsonl == metrics.resolve(), args.metrics_jsonl
    assert args.r3_earlier_rows == "keep", args.r3_earlier_rows
    assert args.r3_missing == "fail", args.r3_missing
    assert args.use_rollout_routing_replay is True
    assert args.use_routing_replay is False, "r3's configure did not run"
    assert (args.num_layers, args.num_experts, args.moe_router_topk) == (LAYERS, EXPERTS, TOPK)
    assert args.transformer_impl == "local", "the cpu plugin's flags were not added"
    assert args.sglang_device == "cpu", args.sglang_device
    variables = args.train_env_vars
    assert variables["MILES_PLUGINS_ROLE"] == "trainer", variables
    assert variables["TORCHDYNAMO_DISABLE"] == "1", variables
    assert variables["CUDA_DEVICE_MAX_CONNECTIONS"] == "7", "the user's variable must win"


def refused(flag: str, nearest: str) -> None:
    from miles_plugins.errors import ArgumentError

    with raised(ArgumentError) as caught:
        parse(flag, "1")
    facts = {name: value for name, value in caught.error.facts.items() if value}
    assert facts == {flag: f"did you mean {nearest}?"}, facts


@behaviour
def a_mistyped_flag_is_refused_with_the_nearest() -> None:
    refused("--r3-mising", "--r3-missing")
    refused("--rollout-batch-sise", "--rollout-batch-size")
    refused("--num-layerz", "--num-layers")
    refused("--sglang-server-concurency", "--sglang-server-concurrency")


@behaviour
def a_bad_value_is_left_to_slimes_own_message() -> None:
    with raised(SystemExit) as caught:
        parse("--rollout-batch-size", "many")
    assert caught.error.code == 2, caught.error.code
    assert "rollout-batch-size" in run.errors.getvalue(), run.errors.getvalue()[-500:]


@behaviour
def help_shows_the_plugins_flags() -> None:
    with raised(SystemExit) as caught:
        parse("--help")
    assert caught.error.code == 0, caught.error.code
    shown = run.output.getvalue()
    missing = [word for word in ("plugin r3_replay", "--r3-missing", "--metrics-jsonl") if word not in shown]
    assert not missing, missing


# -- generate --------------------------------------------------------------------------------------------------------


class Router(ThreadingHTTPServer):
    """Answers /generate as SGLang does; a stand-in: no engine computes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Callable[[dict[str, Any]], dict[str, Any]] = dict
        self.asked: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(payload)  # type: ignore[attr-defined]
        answer = self.server.reply(payload)  # type: ignore[attr-defined]
        chunks = _chunks(answer) if payload.get("stream") else [json.dumps(answer)]
        body = "".join(chunks).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if payload.get("stream") else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


def _chunks(answer: dict[str, Any]) -> list[str]:
    """The answer in two: the first with half of the tokens and without routing, the last with all, as SGLang's."""
    meta = answer["meta_info"]
    half = meta["output_token_logprobs"][: len(meta["output_token_logprobs"]) // 2]
    first = {name: value for name, value in meta.items() if name != "routed_experts"}
    first |= {"finish_reason": None, "output_token_logprobs": half, "completion_tokens": len(half)}
    chunks = [{"text": answer["text"][: len(half)], "meta_info": first}, answer]
    return [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]


def answer(
    given: Sequence[int], new: Sequence[int], version: int, finish: str = "stop", routing: bool = True
) -> dict[str, Any]:
    """SGLang's answer to a request of the tokens `given`, whose rows r3's engine side sends."""
    tokens = [*given, *new]
    meta_info: dict[str, Any] = {
        "id": f"{tokens[0]}-{version}",
        "finish_reason": {"type": finish},
        "prompt_tokens": len(given),
        "completion_tokens": len(new),
        "cached_tokens": 0,
        "weight_version": str(version),
        "output_token_logprobs": [[-0.5, token, None] for token in new],
    }
    if routing:
        text = run.activation.hook.encode_routed_experts(experts=experts_of(tokens[:-1], version))
        meta_info["routed_experts"] = text
    return {"text": "1" * len(new), "meta_info": meta_info}


@contextmanager
def routed(reply: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[Namespace]:
    """slime's arguments, with a router that replies so."""
    from slime.utils import http_utils

    router = run.router = Router()
    router.reply = reply
    args = copy.copy(run.args)
    args.sglang_router_ip, args.sglang_router_port = router.server_address
    http_utils._http_client = None  # of another event loop
    http_utils.init_http_client(args)
    try:
        yield args
    finally:
        router.shutdown()
        router.server_close()


def sample_of(prompt: str, index: int) -> Any:
    from slime.utils.types import Sample

    return Sample(index=index, prompt=prompt)


async def generate(args: Namespace, sample: Any, streaming: bool = False) -> Any:
    module = importlib.import_module(f"slime.rollout.sglang_{'streaming_' if streaming else ''}rollout")
    function = module.generate_streaming if streaming else module.generate
    return await function(args, sample, {"max_new_tokens": 16, "temperature": 1.0})


def has_rows(sample: Any, versions: Sequence[tuple[int, int]], tokens: int) -> None:
    """`versions`: (rows, version) in order."""
    from miles_plugins.r3_replay.trace import RoutingTrace

    trace = sample.rollout_routed_experts
    assert isinstance(trace, RoutingTrace), type(trace)
    assert len(sample.tokens) == tokens, sample.tokens
    assert len(trace) == tokens - 1 == sum(rows for rows, _ in versions), (len(trace), versions)
    assert trace.tokens.tolist() == sample.tokens[:-1]
    begin = 0
    for (rows, version), span in zip(versions, trace.spans, strict=True):
        assert (span.begin, span.end, span.weight_version) == (begin, begin + rows, str(version)), trace.spans
        expected = experts_of(sample.tokens[:-1], version)[begin : begin + rows]
        assert (trace.experts[begin : begin + rows] == expected).all(), f"the rows of version {version} are others"
        begin += rows


@behaviour
def generate_gives_a_sample_the_rows_of_its_response() -> None:
    with routed(lambda payload: answer(payload["input_ids"], [20, 21, 22], 3)) as args:
        sample = asyncio.run(generate(args, sample_of("abcd", 0)))
        assert run.router.asked[0]["return_routed_experts"] is True
    has_rows(sample, [(6, 3)], 7)
    assert sample.status.value == "completed", sample.status
    assert sample.response_length == 3
    assert sample.rollout_log_probs == [-0.5] * 3
    assert [str(version) for version in sample.weight_versions] == ["3"]


@behaviour
def two_at_once_do_not_mix() -> None:
    both, second_is_out = threading.Barrier(2), threading.Event()

    def reply(payload: dict[str, Any]) -> dict[str, Any]:
        both.wait(20)  # neither is answered before both have asked
        ids = payload["input_ids"]
        if len(ids) == 4:  # the first is answered last
            second_is_out.wait(20)
            return answer(ids, [30, 31], 5)
        second_is_out.set()
        return answer(ids, [40, 41, 42, 43], 6)

    with routed(reply) as args:

        async def at_once() -> Any:
            return await asyncio.gather(generate(args, sample_of("abcd", 0)), generate(args, sample_of("efghijk", 1)))

        first, second = asyncio.run(at_once())
    has_rows(first, [(5, 5)], 6)
    has_rows(second, [(10, 6)], 11)


@behaviour
def a_resumed_sample_keeps_its_earlier_rows() -> None:
    def reply(payload: dict[str, Any]) -> dict[str, Any]:
        ids = payload["input_ids"]
        return answer(ids, [20, 21], 3, finish="abort") if len(ids) == 4 else answer(ids, [22, 23, 24], 4)

    with routed(reply) as args:

        async def twice() -> Any:
            sample = await generate(args, sample_of("abcd", 0))
            assert sample.status.value == "aborted", sample.status
            has_rows(sample, [(5, 3)], 6)
            return await generate(args, sample)

        sample = asyncio.run(twice())
        assert run.router.asked[1]["input_ids"] == sample.tokens[:6]
    has_rows(sample, [(5, 3), (3, 4)], 9)


@behaviour
def an_aborted_answer_without_routing_leaves_the_sample_as_it_is() -> None:
    def reply(payload: dict[str, Any]) -> dict[str, Any]:
        ids = payload["input_ids"]
        if len(ids) == 4:
            return answer(ids, [20, 21], 3, finish="abort")
        return answer(ids, [], 4, finish="abort", routing=False)

    with routed(reply) as args:

        async def thrice() -> Any:
            sample = await generate(args, sample_of("abcd", 0))
            return await generate(args, sample), await generate(args, sample_of("efghi", 1))

        sample, unbegun = asyncio.run(thrice())
    has_rows(sample, [(5, 3)], 6)
    assert unbegun.rollout_routed_experts is None
    assert unbegun.status.value == "aborted"


@behaviour
def a_request_outside_of_generate_is_not_touched() -> None:
    sent: list[Any] = []

    def reply(payload: dict[str, Any]) -> dict[str, Any]:
        sent.append(answer(payload["input_ids"], [20], 3))
        return sent[-1]

    with routed(reply) as args:
        from slime.rollout import sglang_rollout

        url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
        got = asyncio.run(sglang_rollout.post(url, {"input_ids": [5, 6, 7]}))
    assert got == sent[0], got


@behaviour
def corrupted_routing_is_refused_and_the_sample_named() -> None:
    from miles_plugins.errors import PluginError

    def reply(payload: dict[str, Any]) -> dict[str, Any]:
        found = answer(payload["input_ids"], [20, 21, 22], 3)
        sent = bytearray(base64.b64decode(found["meta_info"]["routed_experts"]))
        sent[-2:] = sent[:-3:-1]  # the last token's experts in another order: valid, and not what was sent
        found["meta_info"]["routed_experts"] = base64.b64encode(sent).decode()
        return found

    with routed(reply) as args, raised(PluginError) as caught:
        asyncio.run(generate(args, sample_of("abcd", 77)))
    assert "sample 77" in str(caught.error), caught.error


@behaviour
def the_streaming_rollout_gives_a_sample_its_rows() -> None:
    if find_spec("slime.rollout.sglang_streaming_rollout") is None:
        return  # v0.3.0 brought it

    def reply(payload: dict[str, Any]) -> dict[str, Any]:
        ids = payload["input_ids"]
        return answer(ids, [20, 21], 3, finish="abort") if len(ids) == 4 else answer(ids, [22, 23, 24, 25], 4)

    with routed(reply) as args:

        async def twice() -> Any:
            sample = await generate(args, sample_of("abcd", 0), streaming=True)
            has_rows(sample, [(5, 3)], 6)
            return await generate(args, sample, streaming=True)

        has_rows(asyncio.run(twice()), [(5, 3), (4, 4)], 10)


# -- training data and passes ----------------------------------------------------------------------------------------

LENGTHS = (9, 5, 12, 7, 6, 11, 8, 10, 5, 6, 12, 9, 7, 8, 5, 6)  # of the samples; their tokens are all different
DATA_RANKS = 2


def rollout() -> list[Any]:
    """Samples whose routing came with a response, and one that is masked out."""
    first, samples = 1, []
    for index, length in enumerate(LENGTHS):
        sample = sample_of("", index)
        sample.tokens, sample.response_length = list(range(first, first + length)), length - 2
        sample.rollout_log_probs = [-0.5] * (length - 2)
        sample.reward, sample.status = float(index % 3), type(sample).Status.COMPLETED
        text = run.activation.hook.encode_routed_experts(experts=experts_of(sample.tokens[:-1], 1))
        meta_info = {"routed_experts": text, "weight_version": "1"}
        run.activation.hook.receive_response(args=run.args, sample=sample, meta_info=meta_info)
        samples.append(sample)
        first += length
    return samples


def boxes_of(args: Namespace, samples: list[Any]) -> Any:
    """What slime's RolloutManager gives its trainers, in Ray's store."""
    importlib.import_module("slime.ray.rollout")
    from miles_plugins.patches.slime.rollout_manager import RolloutManager  # type: ignore[attr-defined]

    manager = object.__new__(RolloutManager)  # without engines
    manager.args = args
    manager.custom_reward_post_process_func = manager.custom_convert_samples_to_train_data_func = None
    config = {"dp_size": DATA_RANKS, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1}
    manager.train_parallel_config = config
    train_data = manager._convert_samples_to_train_data(samples)
    takes = inspect.signature(RolloutManager.__mro__[1]._split_train_data_by_dp).parameters
    return manager._split_train_data_by_dp(train_data, *([DATA_RANKS] if "dp_size" in takes else []))


@contextmanager
def data_rank(rank: int) -> Iterator[None]:
    """Megatron's word for which data-parallel rank this is."""
    from megatron.core import mpu

    with (
        mock.patch.object(mpu, "get_data_parallel_rank", return_value=rank),
        mock.patch.object(mpu, "get_data_parallel_world_size", return_value=DATA_RANKS),
    ):
        yield


def begin_training() -> None:
    """Megatron's groups and a model whose routers tell which tokens they see."""
    import tiny_gpt
    import torch
    import worker
    from megatron.core import mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training import global_vars

    from miles_plugins.patches.torch.cpu import device_mode

    device_mode().__enter__()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{run.folder / 'store'}", rank=0, world_size=1, timeout=worker.TIMEOUT
    )
    mpu.initialize_model_parallel(expert_tensor_parallel_size=1)
    model_parallel_cuda_manual_seed(7)
    torch.manual_seed(11)
    layout = dict.fromkeys(("tensor", "pipeline", "context", "expert"), 1) | {"virtual": None, "sequence": False}
    shape = {"num_layers": LAYERS, "num_moe_experts": EXPERTS, "moe_router_topk": TOPK}
    run.model = tiny_gpt.build(layout, shape)
    run.observer = worker.Observer()
    run.observer.watch(run.model, [range(LAYERS)])
    run.optimizer = worker.Optimizer(run.model, 1.0)
    run.activation.hook.model_built(args=run.args, model=run.model, role="actor")
    global_vars.set_args(run.args)


@behaviour
def routers_of_this_megatron_take_the_recorded_experts() -> None:
    """In whole passes of slime's, of the data that slime's RolloutManager made, with and without dynamic batches."""
    begin_training()
    few, many = passes(use_dynamic_batch_size=False), passes(use_dynamic_batch_size=True)
    assert few == len(LENGTHS) > many, f"{few} microbatches of one sample, {many} of dynamic size"


def passes(use_dynamic_batch_size: bool) -> int:
    """All passes of a rollout on both data ranks; how many microbatches there were."""
    from slime.backends.megatron_utils import actor

    run.args.use_dynamic_batch_size, run.args.max_tokens_per_gpu = use_dynamic_batch_size, 24
    samples = rollout()
    boxes = boxes_of(run.args, samples)
    assert len(boxes) == DATA_RANKS
    microbatches, trained = 0, []
    for rank in range(DATA_RANKS):
        trainer = object.__new__(actor.MegatronTrainRayActor)  # without its model, optimizer and engines
        trainer.args = run.args
        with data_rank(rank):
            data = trainer._get_rollout_data(boxes)
            iterators, steps = schedule(data)
        microbatches += sum(steps)
        run.observer.calls.clear()
        train_on(trainer, data, iterators, steps)
        trained += sorted(seen(samples, sum(steps)))
    assert sorted(trained) == list(range(1, sum(LENGTHS) + 1)), "the ranks do not train on every token once"
    return microbatches


def schedule(data: dict[str, Any]) -> tuple[list[Any], list[int]]:
    from slime.backends.megatron_utils.data import get_data_iterator

    if "micro_batch_indices" in data:
        return get_data_iterator(data), data["num_microbatches"]
    iterators, steps = get_data_iterator(run.args, run.model, data)  # before v0.3.0
    return iterators, steps


def train_on(trainer: Any, data: dict[str, Any], iterators: list[Any], steps: list[int]) -> None:
    """slime's own log-prob pass and steps, as its trainer has them after each other."""
    from slime.backends.megatron_utils import loss
    from slime.backends.megatron_utils import model as slime_model

    from miles_plugins.errors import PluginError
    from miles_plugins.r3_replay import plugin as r3

    args = run.args
    args.loss_type, args.custom_loss_function_path = "custom_loss", "slimes_own.loss"
    trainer.fill_routing_replay(iterators, steps, data)  # of slime's own, which would not know this data
    run.observer.stage = "log_prob"
    slime_model.forward_only(loss.get_log_probs_and_entropy, args, run.model, iterators, steps, store_prefix="")
    assert r3._shard._cuts, "let go before it was trained on"
    run.observer.stage = "train"
    scheduler = SimpleNamespace(step=lambda increment: None)
    takes = inspect.signature(slime_model.train).parameters
    # The last one, if any, is of v0.3.0 and later: the global batch size of each step.
    sizes = [data["global_batch_sizes"]] if len(takes) > 6 else []
    slime_model.train(0, run.model, run.optimizer, scheduler, iterators, steps, *sizes)
    assert not r3._shard._cuts, "what was trained on is still held"
    run.observer.stage = "again"
    for iterator in iterators:
        iterator.reset()
    with raised(PluginError) as caught:
        slime_model.forward_only(loss.get_log_probs_and_entropy, args, run.model, iterators, steps, store_prefix="")
    assert "trained on before" in str(caught.error), caught.error


def seen(samples: list[Any], microbatches: int) -> list[int]:
    """The tokens that the routers of a rank saw, each with its own experts, in each layer and each pass."""
    rows = {token: row for sample in samples for token, row in zip(*rows_of(sample), strict=True)}
    by_pass: dict[tuple[str, int], list[int]] = {}
    natural = 0
    for stage in ("log_prob", "train"):
        for layer in range(LAYERS):
            calls = [call for call in run.observer.calls if (call["stage"], call["layer"]) == (stage, layer)]
            assert len(calls) == microbatches, f"{len(calls)} of {microbatches} microbatches in layer {layer}"
            for call in calls:
                for token, experts, by_itself in zip(call["tokens"], call["experts"], call["natural"], strict=True):
                    if token == 0:
                        continue  # padding
                    by_pass.setdefault((stage, layer), []).append(token)
                    if token in rows:  # the last of a sample has no record
                        assert experts == sorted(rows[token][layer]), (stage, layer, token, experts, rows[token])
                        natural += by_itself
    first = sorted(by_pass["train", 0])
    assert all(sorted(tokens) == first for tokens in by_pass.values()), "layers or passes saw other tokens"
    assert natural < len(first) * LAYERS, "the routers would have chosen so by themselves"
    return first


def rows_of(sample: Any) -> tuple[list[int], list[list[list[int]]]]:
    return sample.tokens[:-1], experts_of(sample.tokens[:-1], 1).tolist()


# -- metrics ---------------------------------------------------------------------------------------------------------


def logged(step_key: str) -> list[dict[str, Any]]:
    """What reached metrics_logged: the metrics plugin writes it down."""
    lines = map(json.loads, run.args.metrics_jsonl.read_text().splitlines())
    return [line["metrics"] for line in lines if line["step_key"] == step_key]


@behaviour
def a_steps_metrics_are_logged_with_those_of_replay() -> None:
    steps = logged("train/step")
    assert len(steps) == 2 * DATA_RANKS * 2, len(steps)  # steps a rank, twice
    assert {step["train/r3/coverage"] for step in steps} == {1.0}
    assert all("train/grad_norm" in step for step in steps)


@behaviour
def a_rollouts_metrics_have_those_of_r3_and_an_evaluations_do_not() -> None:
    samples = rollout()
    run.args.metrics_jsonl.unlink(missing_ok=True)
    if find_spec("slime.observability") is not None:
        from slime.observability import rollout_metrics as module

        of_rollout, of_evaluation = module.log_rollout_data, module.log_eval_rollout_data
    else:
        from slime.ray import rollout as module

        of_rollout, of_evaluation = module._log_rollout_data, module._log_eval_rollout_data
    of_rollout(0, run.args, samples, {}, 1.0)
    of_evaluation(0, run.args, {"toy": {"rewards": [1.0] * len(samples), "samples": samples}})
    (rolled_out,), (evaluated,) = logged("rollout/step"), logged("eval/step")
    assert rolled_out["rollout/r3/samples_without_routing"] == 0, rolled_out
    assert rolled_out["rollout/r3/bytes_per_token"] == LAYERS * TOPK
    assert "rollout/response_len/mean" in rolled_out, rolled_out
    assert evaluated["eval/toy"] == 1.0
    assert not [name for name in evaluated if "r3" in name], evaluated


def main() -> None:
    run.folder, run.slime, run.megatron = map(Path, sys.argv[1:4])
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    from miles_plugins.activation import activate
    from miles_plugins.patches.seam import patch_set

    os.environ.pop("TORCHDYNAMO_DISABLE", None)  # what the user's environment has, no plugin adds
    activation = run.activation = activate(["r3", "cpu", "metrics"], "trainer", environment={})
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than all of this
    activation.patches.undo()
    activation.patches = patch_set(activation.seams)  # of every role: here one process has them all
    activation.patches.arm()
    import ray
    import torch

    torch.set_num_threads(1)
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=128 * 2**20,
    )
    sys.path.append(str(Path(__file__).parent / "parallel"))
    found = {}
    for name, function in BEHAVIOURS.items():
        try:
            function()
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
    ray.shutdown()
    print(json.dumps({"behaviours": found, "patches": getattr(run, "verified", 0)}))


if __name__ == "__main__":
    main()
