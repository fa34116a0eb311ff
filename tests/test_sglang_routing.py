"""The record of routing in SGLang 0.5.9 to 0.5.23: real capturer, runner, streamer and detokenizer, our real patches.

Each release runs in a process of its own (this file, as a script), from its wheel. Two things stand in for what cannot
run here: `sgl_kernel`, which has no CPU build, and the registration of host memory with CUDA. The model is three linear
gates with SGLang's own TopK; everything from there to a response's `meta_info` is SGLang's code.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import importlib.machinery
import json
import logging
import os
import pickle
import subprocess
import sys
import types
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

VERSIONS = ("0.5.9", "0.5.12.post1", "0.5.15.post1", "0.5.23")
LAYERS, MOE, TOPK, EXPERTS, HIDDEN = 4, (1, 3), 2, 8, 6
ROOM = 16  # tokens of a forward pass in the record, by chunked_prefill_size
SLOTS = 41  # of the KV cache


# -- one release, in a process of its own ----------------------------------------------------------------------------


class NoKernels:
    """Finds `sgl_kernel` and whatever is asked of it: names that nothing here calls."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.partition(".")[0] == "sgl_kernel":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        class Kernels(types.ModuleType):
            __path__ = ()

            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                return MagicMock(name=f"{self.__name__}.{name}")

        return Kernels(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


class Release:
    """SGLang as it is loaded here, with the patches that a plugin with the given hooks asks for."""

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        import torch

        from miles_plugins import activation, hookimpl
        from miles_plugins.manager import Installed, Plugin, Plugins
        from miles_plugins.patches.seam import patch_set

        self.torch = torch
        module = types.ModuleType("recorder")
        module.__file__ = ""
        for name, function in {**hooks, "choose_device": lambda: "cpu"}.items():
            setattr(module, name, hookimpl(function))
        plugins = Plugins([Plugin(Installed("recorder", "recorder", "1.0", None), module)])
        activation._current = activation.Activation(plugins, "sglang_child", "lab")
        wanted = ("routing record", "narrow routing record", "routing record on the cpu", "torchvision operators")
        self.patches = patch_set(seam for seam in activation._current.seams if seam.name in wanted)
        self.patches.arm()
        self.reports: list[str] = []
        from miles_plugins.patches.sglang import routing

        routing.attestation = SimpleNamespace(  # type: ignore[attr-defined]
            write_child_report=lambda run, error: self.reports.append(str(error))
        )
        self.runners = self.module("model_executor.model_runner")
        self.topk = self.module("layers.moe.topk")
        self.arguments(chunked_prefill_size=ROOM)
        with contextlib.suppress(ImportError):
            self.module("mem_cache.pool_host.common")._cuda_host_register = lambda *args, **kwargs: None

    @staticmethod
    def module(name: str) -> Any:
        return importlib.import_module(f"sglang.srt.{name}")

    def arguments(self, **arguments: Any) -> Any:
        server_args = self.module("server_args")
        given = {"model_path": "dummy", "device": "cpu", "enable_return_routed_experts": True, **arguments}
        self.server_args = server_args.ServerArgs(**given)
        if hasattr(self.server_args, "resolve_once"):
            self.server_args.resolve_once()
        server_args.set_global_server_args_for_scheduler(self.server_args)
        return self.server_args

    def model(self, layers: Any = MOE, experts: int = EXPERTS, topk: int = TOPK, **options: Any) -> Any:
        """A model of which only the routers are there, each after its gate."""
        torch = self.torch

        class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
            def __init__(block, layer: int | None) -> None:
                super().__init__()
                block.gate = torch.nn.Linear(HIDDEN, experts, bias=False)
                block.topk = self.topk.TopK(topk, layer_id=layer, **options)

        class TinyForCausalLM(torch.nn.Module):  # type: ignore[misc, name-defined]
            def __init__(model) -> None:
                super().__init__()
                model.layers = torch.nn.ModuleList([torch.nn.Linear(HIDDEN, HIDDEN), *map(Block, layers)])
                model.shared_experts_config = SimpleNamespace(num_fused_shared_experts=0)

            def forward(model, hidden: Any) -> None:
                for block in model.layers[1:]:
                    block.topk.forward_native(hidden, block.gate(hidden))

            def choices(model, hidden: Any) -> list[Any]:
                """What the routers choose, by plain torch: [tokens][MoE layers][topk], each in order of size."""
                chosen = [
                    block.gate(hidden).softmax(-1).topk(topk).indices.sort(-1).values for block in model.layers[1:]
                ]
                return torch.stack(chosen, dim=1).tolist()

        torch.manual_seed(0)
        return TinyForCausalLM()

    def runner(self, model: Any, draft: bool = False, layers: int = LAYERS, **config: Any) -> Any:
        """SGLang's ModelRunner for that model, after it has loaded it."""
        text = {
            "num_hidden_layers": layers,
            "num_experts_per_tok": TOPK,
            "num_experts": EXPERTS,
            "hidden_size": HIDDEN,
            **config,
        }
        runner = object.__new__(self.runners.ModelRunner)
        vars(runner).update(
            model=model,
            is_draft_worker=draft,
            server_args=self.server_args,
            model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**text)),
            max_total_num_tokens=SLOTS - 1,
            page_size=1,
            max_running_requests=4,
            device="cpu",
            forward_pass_id=0,
            # 0.5.12 to 0.5.23
            kv_index_translator=SimpleNamespace(capture_token_capacity=lambda tokens: SLOTS),
            enable_hisparse=False,
            is_hybrid_swa=False,
            msprobe_debugger=None,
            enable_elastic_ep=False,
            eplb_manager=None,
            canary_manager=None,
            graph_runner=None,
            decode_cuda_graph_runner=None,
            gpu_id=0,
            dp_size=1,
            tp_rank=0,
        )
        return runner

    def record(self, model: Any, **config: Any) -> Any:
        """The runner of that model, its capturer made."""
        from miles_plugins.patches.torch.cpu import device_mode

        runner = self.runner(model, **config)
        with device_mode():  # 0.5.9 pins host memory; elsewhere our own patch sees to that
            runner.init_routed_experts_capturer()
        return runner

    @property
    def capturer(self) -> Any:
        from miles_plugins.compat import sglang_routing

        return sglang_routing.capturer_of_this_process()

    def forward(self, runner: Any, hidden: Any, slots: list[int]) -> Any:
        """One forward pass; what it leaves for the scheduler to copy later, if anything."""

        def run(*args: Any, **kwargs: Any) -> Any:
            runner.model(hidden)
            return self.runners.ModelRunnerOutput(logits_output=None, can_run_graph=False)

        runner._forward_raw = run
        batch = MagicMock(name="ForwardBatch")
        batch.out_cache_loc, batch.out_cache_loc_virtual = self.torch.tensor(slots), None
        return getattr(runner.forward(batch), "routed_experts_output", None)

    def recorded(self, slots: list[int]) -> list[Any]:
        """What the host buffer has for these slots: [tokens][MoE layers][topk], each in order of size."""
        rows = self.capturer.host_cache.buffer[slots].sort(-1).values
        return (rows[:, list(MOE)] if rows.shape[1] == LAYERS else rows).tolist()

    @property
    def recorder(self) -> Any:
        from miles_plugins.compat import sglang_routing

        return sglang_routing.recorder()

    @staticmethod
    def finish(later: Any) -> None:
        """What the scheduler does once the copy is over."""
        if later is not None:
            later.finalize()

    def request(self, name: str, slots: list[int], asks: bool) -> Any:
        """A finished request of SGLang's, with its slots in the request pool."""
        batch = self.module("managers.schedule_batch")
        parameters = self.module("sampling.sampling_params").SamplingParams(max_new_tokens=1)
        prompt: Any = list(range(len(slots)))
        request = batch.Req(name, "", prompt, parameters, return_routed_experts=asks)
        if isinstance(request.output_ids, array):  # from 0.5.15
            request = batch.Req(name, "", array("q", prompt), parameters, return_routed_experts=asks)
        request.output_ids.append(1)
        request.finished_reason = batch.FINISH_LENGTH(1)
        request.finished_len = 1
        request.tokenizer = None
        self.pool.req_to_token[number := len(self.numbers), : len(slots)] = self.torch.tensor(slots)
        self.numbers.append(number)
        if hasattr(request, "kv"):
            request.kv = SimpleNamespace(req_pool_idx=number)
        else:
            request.req_pool_idx = number
        return request

    def pooled(self) -> None:
        self.pool = SimpleNamespace(req_to_token=self.torch.zeros(8, 32, dtype=self.torch.int32))
        self.numbers: list[int] = []

    def collect(self, request: Any) -> Any:
        """The rows of a finished request, as the scheduler gathers them."""
        scheduler = SimpleNamespace(req_to_token_pool=self.pool)
        try:
            processor = self.module("managers.scheduler_components.batch_result_processor")
        except ImportError:
            mixin = self.module("managers.scheduler_output_processor_mixin")
            mixin.SchedulerOutputProcessorMixin.maybe_collect_routed_experts(scheduler, request)
        else:
            processor.SchedulerBatchResultProcessor._maybe_collect_routed_experts(scheduler, request)
        return request.routed_experts

    def send(self, requests: list[Any]) -> bytes:
        """What the scheduler sends to the detokenizer for these requests."""
        sent: list[Any] = []
        sender = SimpleNamespace(send_output=lambda output, *args: sent.append(output))
        common = {
            "send_to_detokenizer": sender,
            "server_args": self.server_args,
            "spec_algorithm": self.module("speculative.spec_info").SpeculativeAlgorithm.from_string(None),
            "disaggregation_mode": self.module("disaggregation.utils").DisaggregationMode.NULL,
        }
        try:
            streamer = self.module("managers.scheduler_components.output_streamer").SchedulerOutputStreamer
        except ImportError:
            scheduler = object.__new__(self.module("managers.scheduler").Scheduler)
            vars(scheduler).update(
                **common,
                model_config=SimpleNamespace(is_multimodal_gen=False),
                get_load=lambda *args: None,
                get_loads=lambda *args: None,
                _get_cached_tokens_details=lambda request: None,
                attn_tp_rank=0,
                dp_rank=None,
                stream_interval=1,
            )
            scheduler.stream_output_generation(requests, False)
        else:
            parallel = {"ps": SimpleNamespace(dp_rank=None, attn_tp_rank=0)}
            known = {*getattr(streamer, "__slots__", ()), *getattr(streamer, "__dataclass_fields__", ())}
            more = {"tree_cache": None, "is_generation": True, "enable_hicache_storage": lambda: False, **parallel}
            given = {name: value for name, value in {**common, **more}.items() if name in known}
            with contextlib.ExitStack() as stack:
                if "ps" not in known:  # 0.5.23 asks for the ranks where it needs them
                    state = self.module("runtime_context").get_parallel()
                    stack.enter_context(state.override(attn_tp_rank=0, dp_rank=None))
                streamer(**given)._stream_output_generation(requests, False)
        (output,) = sent
        output.time_stats = None  # holds locks and clocks
        return pickle.dumps(output)

    def detokenize(self, message: bytes) -> Any:
        manager = object.__new__(self.module("managers.detokenizer_manager").DetokenizerManager)
        manager._decode_batch_token_id_output = lambda output: ["" for _ in output.rids]  # needs a tokenizer
        return pickle.loads(pickle.dumps(manager.handle_batch_token_id_out(pickle.loads(message))))

    def answer(self, output: Any) -> dict[str, Any]:
        """`meta_info["routed_experts"]` of each request, as the server answers it; `absent` without the key."""
        manager = MagicMock(name="TokenizerManager")
        manager.enable_metrics = manager.dump_requests_folder = manager.crash_dump_folder = False
        manager.server_args = self.server_args
        states = {}
        for name in output.rids:
            options = {"return_logprob": False, "stream": False, "log_metrics": False, "lora_path": None}
            states[name] = MagicMock(name=name, out_list=[], output_ids=[], text="", obj=SimpleNamespace(**options))
        manager.rid_to_state = dict(states)
        tokenizer_manager = self.module("managers.tokenizer_manager").TokenizerManager
        handled = tokenizer_manager._handle_batch_output(manager, output)
        if asyncio.iscoroutine(handled):
            asyncio.run(handled)
        return {name: state.out_list[-1]["meta_info"].get("routed_experts", "absent") for name, state in states.items()}

    def refusal(self, function: Callable[[], Any]) -> str:
        from miles_plugins import PluginError

        try:
            function()
        except PluginError as error:
            return str(error)
        return "nothing was refused"


def text_of(experts: Any) -> str:
    """A plugin's own encoding, as plain as can be."""
    return json.dumps([str(experts.dtype), experts.tolist()])


SCENARIOS: dict[str, Callable[[Release], Any]] = {}


def scenario(function: Callable[[Release], Any]) -> Callable[[Release], Any]:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def patches(release: Release) -> Any:
    for name in ("managers.detokenizer_manager", "managers.tokenizer_manager", "managers.scheduler"):
        release.module(name)
    return {record.patch.id: [record.state.value, record.detail] for record in release.patches.records()}


@scenario
def buffers(release: Release) -> Any:
    from miles_plugins.patches.sglang.routing import capturer

    release.record(release.model())
    record = capturer()
    assert record is not None
    host, device = release.capturer.host_cache.buffer, release.capturer.device_cache.buffer
    return {
        "record": vars(record),
        "host": [list(host.shape), str(host.dtype), host.untyped_storage().nbytes()],
        "device": [list(device.shape), str(device.dtype)],
    }


@scenario
def buffers_of_qwen3_30b_a3b(release: Release) -> Any:
    from miles_plugins.patches.sglang.routing import capturer

    release.record(release.model(range(48), 128, topk=8), layers=48, num_experts=128, num_experts_per_tok=8)
    record = capturer()
    assert record is not None
    release.pooled()
    requests = [release.request(name, list(range(1, 32)), True) for name in ("gathered", "not")]
    release.collect(requests[0])
    gathered, without = (len(release.send([request])) for request in requests)
    return {
        "dtype": record.dtype,
        "bytes_per_token": record.bytes_per_token,
        "host": release.capturer.host_cache.buffer.untyped_storage().nbytes() / SLOTS,
        "wire": (gathered - without) / 31,
    }


@scenario
def ids_of_many_experts(release: Release) -> Any:
    found = {}
    for experts, config in ((256, {"num_experts": 256}), (257, {"num_experts": 256}), (300, {"num_experts": None})):
        model = release.model(experts=experts)
        runner = release.record(model, **config)
        hidden = release.torch.randn(ROOM, HIDDEN)
        release.finish(release.forward(runner, hidden, list(range(ROOM))))
        rows = release.recorded(list(range(ROOM)))
        found[experts] = [str(release.capturer.host_cache.buffer.dtype), rows == model.choices(hidden)]
    return found


@scenario
def rows_of_a_request(release: Release) -> Any:
    """A prompt in two chunks, beside another request, then a token of each: rows are gathered by slot."""
    model = release.model()
    runner = release.record(model)
    torch = release.torch
    hidden = torch.randn(13, HIDDEN)
    passes = [([0, 1, 2, 3, 4], [9, 8, 7, 30, 31]), ([5, 6, 7, 8], [6, 5, 32, 33]), ([9, 10], [4, 34])]
    for tokens, slots in passes:
        release.finish(release.forward(runner, hidden[tokens], slots))
    release.pooled()
    request = release.request("one", [9, 8, 7, 6, 5, 4], True)
    request.routed_experts_start_len = 0
    rows = release.collect(request)
    wanted = model.choices(hidden[[0, 1, 2, 5, 6, 9]])  # and no row for the last token, which was never forwarded
    return {"rows": rows.sort(-1).values.tolist(), "wanted": wanted, "dtype": str(rows.dtype)}


@scenario
def overlap(release: Release) -> Any:
    """The next pass runs before what the one before it left is copied to the host."""
    model = release.model()
    runner = release.record(model)
    first, second = release.torch.randn(3, HIDDEN), release.torch.randn(5, HIDDEN)
    later = release.forward(runner, first, [1, 2, 3])
    last = release.forward(runner, second, [4, 5, 6, 7, 8])
    release.finish(later)
    release.finish(last)
    return {
        "deferred": later is not None,
        "first": release.recorded([1, 2, 3]) == model.choices(first),
        "second": release.recorded([4, 5, 6, 7, 8]) == model.choices(second),
    }


@scenario
def draft(release: Release) -> Any:
    """A draft of MoE layers with the target's layer numbers, in the same process, after it, over the same slots."""
    model, drafter = release.model(), release.model()
    for block in drafter.layers[1:]:
        block.gate.weight.data.neg_()  # chooses otherwise
    runner = release.record(model)
    target = release.capturer
    hidden = release.torch.randn(4, HIDDEN)
    later = release.forward(runner, hidden, [1, 2, 3, 4])
    before = target.device_cache.buffer.clone()
    draft_runner = release.record(drafter, draft=True)
    same = release.capturer is target
    left = release.forward(draft_runner, hidden, [4, 3, 2, 1])  # a draft's batch is in an order of its own
    drafter(hidden)  # as the draft's CUDA graph runners do: past ModelRunner.forward
    release.finish(later)
    release.finish(left)
    untouched = release.torch.equal(before, target.device_cache.buffer)
    rows = release.recorded([1, 2, 3, 4])
    again = release.forward(runner, hidden, [5, 6, 7, 8])
    release.finish(again)
    return {
        "same capturer": same and release.capturer is target,
        "device untouched": untouched,
        "rows": rows == model.choices(hidden) != drafter.choices(hidden),
        "target still records": release.recorded([5, 6, 7, 8]) == model.choices(hidden),
    }


@scenario
def nameless_router(release: Release) -> Any:
    runner = release.record(release.model())
    ids = release.torch.tensor([[1, 2]])
    before = release.capturer.device_cache.buffer.clone()
    return {
        "start": release.refusal(lambda: release.record(release.model(layers=(1, None)))),
        "twice": release.refusal(lambda: release.record(release.model(layers=(1, 1)))),
        "none": release.refusal(lambda: release.record(release.model(layers=()))),
        "late": release.refusal(lambda: release.capturer.capture(None, ids)),
        "unknown": release.refusal(lambda: release.capturer.capture(2, ids)),
        "untouched": release.torch.equal(before, release.capturer.device_cache.buffer) and runner is not None,
        "reported": len(release.reports) == 3,
    }


@scenario
def overflow(release: Release) -> Any:
    runner = release.record(release.model())
    fits = release.torch.randn(ROOM, HIDDEN)
    release.finish(release.forward(runner, fits, list(range(ROOM))))
    more = release.torch.randn(ROOM + 1, HIDDEN)
    wide = release.torch.ones(1, TOPK + 1, dtype=release.torch.int32)
    return {
        "long": release.refusal(lambda: release.forward(runner, more, list(range(ROOM + 1)))),
        "wide": release.refusal(lambda: release.capturer.device_cache.capture(1, wide)),
        "narrow": release.refusal(lambda: release.capturer.device_cache.capture(1, wide[:, :1])),
    }


def mixed(release: Release, asks: tuple[bool, ...] = (True, False, True)) -> tuple[Any, dict[str, Any], bytes]:
    """Some requests ask for their routing and some do not: what was chosen for each, and what is sent."""
    model = release.model()
    runner = release.record(model)
    release.pooled()
    wanted, requests = {}, []
    for number, asking in enumerate(asks):
        slots = [1 + 5 * number + position for position in range(3 + number)]
        hidden = release.torch.randn(len(slots), HIDDEN)
        release.finish(release.forward(runner, hidden, slots))
        requests.append(release.request(f"r{number}", slots, asking))
        release.collect(requests[-1])
        wanted[f"r{number}"] = model.choices(hidden) if asking else None
    message = release.send(requests)
    asked = [request.return_routed_experts for request in requests]
    assert asked == list(asks), "the requests were given back as they were"
    return requests, wanted, message


@scenario
def mixed_batch(release: Release) -> Any:
    """From the scheduler to the answer; at once, and split for several tokenizer workers."""
    _, wanted, message = mixed(release)
    output = release.detokenize(message)
    split = release.module("managers.multi_tokenizer_mixin")._handle_output_by_index
    parts = {name: split(output, number).routed_experts for number, name in enumerate(output.rids)}
    silent = release.send([release.request("silent", [1, 2], False)])
    return {
        "wanted": wanted,
        "answers": release.answer(output),
        "parts": parts,
        "sent": [rows if rows is None else str(rows.dtype) for rows in pickle.loads(message).routed_experts],
        "nobody asks": release.detokenize(silent).routed_experts,
    }


@scenario
def without_detokenizer(release: Release) -> Any:
    _, wanted, message = mixed(release)
    return {"wanted": wanted, "answers": release.answer(pickle.loads(message))}


@scenario
def unanswered(release: Release) -> Any:
    """The plugin leaves some requests to SGLang, which then sends what it would have sent by itself."""
    _, wanted, message = mixed(release, asks=(True, True, False))
    output = pickle.loads(message)
    QUIET[:] = [4]  # rows of the second request
    answers = release.answer(release.detokenize(message))
    direct = release.answer(output)
    QUIET.clear()
    return {"wanted": wanted, "answers": answers, "direct": direct}


@scenario
def fused_shared_experts(release: Release) -> Any:
    """SGLang appends a column for them, which no record has."""
    torch = release.torch
    model = release.model()
    model.num_fused_shared_experts = model.shared_experts_config.num_fused_shared_experts = 1
    release.record(model)
    ids = torch.tensor([[3, 5, EXPERTS], [7, 0, EXPERTS]], dtype=torch.int32)
    for layer in MOE:
        release.capturer.capture(layer, ids)
    batch = SimpleNamespace(out_cache_loc=torch.tensor([2, 3]), out_cache_loc_virtual=None)
    release.finish(release.capturer.on_forward_end(batch, False, None))
    return {
        "device": list(release.capturer.device_cache.buffer.shape),
        "rows": release.capturer.host_cache.buffer[2:4].tolist(),
    }


@scenario
def data_parallel_attention(release: Release) -> Any:
    """Each rank records the whole batch and takes its own part: after the tokens of the ranks before, or padded."""
    torch = release.torch
    release.record(release.model())
    recorder = release.recorder
    recorder.is_dp_attention_enabled = lambda: True
    attention = release.module("layers.dp_attention")
    for module in (recorder, attention):
        if hasattr(module, "get_attention_dp_rank"):
            module.get_attention_dp_rank = lambda: 1
    if hasattr(attention, "get_parallel"):
        attention.get_parallel = lambda: SimpleNamespace(attn_dp_rank=1, attn_dp_size=2)
    ids = torch.arange(10, dtype=torch.int32)[:, None].expand(10, TOPK) % EXPERTS
    release.capturer.capture(MOE[0], ids)
    found = {}
    for graph, size in ((False, None), (True, 4)):
        batch = MagicMock(out_cache_loc=torch.tensor([20, 21, 22]), out_cache_loc_virtual=None)
        batch.global_num_tokens_cpu, batch.global_num_tokens_gpu = [2, 3], torch.tensor([2, 3])
        batch.dp_local_start_pos = None
        release.finish(release.capturer.on_forward_end(batch, graph, size))
        found[f"graph {graph}"] = release.capturer.host_cache.buffer[20:23, 0, 0].tolist()
    return found


@scenario
def deepep(release: Release) -> Any:
    """Each attention-TP rank sees its part of the tokens: SGLang gathers them, in int32."""
    torch = release.torch
    model = release.model()
    recorder = release.recorder
    if not hasattr(recorder, "attn_tp_all_gather_into_tensor"):
        return None
    backend = MagicMock(name="deepep", is_deepep=lambda: True)
    recorder.get_moe_a2a_backend = lambda: backend
    recorder.is_dp_attention_enabled = lambda: True
    for name, value in {
        "get_attention_tp_size": lambda: 2,
        "get_parallel": lambda: SimpleNamespace(attn_tp_size=2, num_dp_ranks=1),
    }.items():
        if hasattr(recorder, name):
            setattr(recorder, name, value)
    recorder.attn_tp_all_gather_into_tensor = lambda out, local: out.copy_(torch.cat([local, local + 1]))
    release.record(model)
    release.capturer.capture(MOE[1], torch.tensor([[0, 1], [2, 3]], dtype=torch.int32))
    return {
        "gather": str(release.capturer.gather_buffer.dtype),
        "rows": release.capturer.device_cache.buffer[:4, 1].tolist(),
    }


@scenario
def argument_names(release: Release) -> Any:
    """Those that are looked at and that this release does not have."""
    from miles_plugins.compat import sglang_routing

    asked: list[str] = []

    def argument(name: str) -> str | None:
        asked.append(name)
        return "EAGLE" if name == "speculative_algorithm" else None

    sglang_routing.unrecordable(argument)
    assert len(asked) > 10
    return [name for name in asked if not hasattr(release.server_args, name)]


@scenario
def refusals(release: Release) -> Any:
    def start(**arguments: Any) -> str:
        release.arguments(**{"chunked_prefill_size": ROOM, **arguments})
        return release.refusal(lambda: release.record(release.model()))

    kept = release.server_args
    formats = release.topk.TopKOutputFormat
    found = {
        "pp_size": start(pp_size=2),
        "chunked_prefill_size": start(chunked_prefill_size=-1),
        "ep_dispatch_algorithm": start(ep_dispatch_algorithm="static"),
    }
    release.server_args = kept
    runner = release.runner(release.model(output_format=formats.BYPASSED))
    runner.device = "cuda"
    found["bypassed"] = release.refusal(runner.init_routed_experts_capturer)
    return found


@scenario
def traced(release: Release) -> Any:
    """torch.compile, which piecewise CUDA graphs use, takes the capture into its graph, for any number of tokens."""
    torch = release.torch
    release.record(release.model())
    capturer = release.capturer
    operations: list[list[str]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls = [node.target for node in graph.graph.nodes if node.op.startswith("call")]
        operations.append(sorted({getattr(target, "__name__", str(target)) for target in calls}))
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)  # type: ignore[untyped-decorator]
    def model(ids: Any) -> Any:
        capturer.device_cache.capture(MOE[0], ids)
        capturer.device_cache.capture(MOE[1], ids + 1)
        return ids + 2

    found = []
    for tokens in (5, 7, 11):
        ids = torch.randint(0, EXPERTS - 1, (tokens, TOPK), dtype=torch.int32)
        model(ids)
        rows = torch.stack([ids, ids + 1], dim=1).tolist()
        found.append(capturer.device_cache.buffer[:tokens].tolist() == rows)
    return {"recorded": found, "operations": operations}


QUIET: list[int] = []  # rows of the requests that the plugin does not encode


def run(wheel: str) -> None:
    """Every scenario on one release; prints what was found."""
    logging.disable(logging.INFO)
    sys.path.insert(0, wheel)
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    if find_spec("sgl_kernel") is None:
        sys.meta_path.insert(0, NoKernels())  # type: ignore[arg-type]

    def encode_routed_experts(experts: Any) -> str | None:
        return None if len(experts) in QUIET else text_of(experts)

    release = Release(encode_routed_experts=encode_routed_experts)
    found = {name: attempted(function, release) for name, function in SCENARIOS.items()}

    # A plugin that only replays: SGLang's own format, and as right.
    release.patches.undo()
    release = Release(take_routed_experts=lambda: True)
    for name in STOCK:
        found[f"stock {name}"] = attempted(SCENARIOS[name], release)
    print("\n" + json.dumps(found, default=lambda tensor: {"tensor": tensor.tolist(), "dtype": str(tensor.dtype)}))


STOCK = (
    *("patches", "buffers", "buffers_of_qwen3_30b_a3b", "overlap", "draft", "nameless_router", "overflow"),
    *("mixed_batch", "without_detokenizer"),
)


def attempted(function: Callable[[Release], Any], release: Release) -> Any:
    import traceback

    before = {name: dict(vars(module)) for name, module in sys.modules.items() if name in TOUCHED}
    kept = release.server_args
    release.reports.clear()
    try:
        return function(release)
    except Exception:
        return {"raised": traceback.format_exc()}
    finally:
        release.server_args = kept
        release.module("server_args").set_global_server_args_for_scheduler(kept)
        for name, values in before.items():
            vars(sys.modules[name]).update(values)


TOUCHED = (
    "sglang.srt.state_capturer.routed_experts",
    "sglang.srt.layers.moe.routed_experts_capturer",
    "sglang.srt.layers.dp_attention",
)


if __name__ == "__main__":
    run(sys.argv[1])
    sys.exit()


# -- what was found --------------------------------------------------------------------------------------------------


import pytest  # noqa: E402

from miles_plugins.compat import sglang_routing  # noqa: E402
from miles_plugins.patches.seam import all_seams  # noqa: E402
from miles_plugins.patching import check_statically  # noqa: E402
from tests.wheels import unpacked_wheel  # noqa: E402

SEAMS = [seam for seam in all_seams() if any(patch.target.startswith("sglang.") for patch in seam.everywhere())]


@pytest.fixture(scope="module")
def processes(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Two releases at a time, each in its process, as soon as the first is asked for; those that a test wants."""
    wanted = {item.callspec.params.get("version") for item in request.session.items if hasattr(item, "callspec")}
    missing = [name for name in ("torch", "transformers", "zmq", "msgspec", "fastapi") if find_spec(name) is None]
    if missing:
        pytest.skip(f"the upstream tier needs {', '.join(missing)} (see CONTRIBUTING.md)")
    started: dict[str, Any] = {}
    with ThreadPoolExecutor(2) as pool:
        for version in [each for each in VERSIONS if each in wanted]:
            try:
                started[version] = pool.submit(in_its_own_process, unpacked_wheel("sglang", version))
            except pytest.skip.Exception as reason:
                started[version] = reason
        yield started


def in_its_own_process(wheel: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, str(wheel)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def found(version: str, processes: dict[str, Any]) -> Callable[[str], Any]:
    """found(scenario): what it found on this release."""
    process = processes[version]
    if not isinstance(process, Future):
        raise process

    def of(name: str) -> Any:
        answer = process.result()[name]
        if isinstance(answer, dict) and "raised" in answer:
            pytest.fail(answer["raised"])
        return answer

    return of


def decoded(text: str) -> list[Any]:
    """SGLang's own encoding: [tokens][layers][topk], each in order of size."""
    import numpy

    return numpy.sort(numpy.frombuffer(base64.b64decode(text), numpy.int32).reshape(-1, LAYERS, TOPK)).tolist()


def of_moe_layers(rows: list[Any]) -> list[Any]:
    """Of a record of all layers; the others must be zero, as SGLang sends them."""
    assert all(rows[token][layer] == [0] * TOPK for token in range(len(rows)) for layer in {*range(LAYERS)} - {*MOE})
    return [[row[layer] for layer in MOE] for row in rows]


# -- the patches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_a_patch_fits_each_release_or_is_superseded(seam: Any, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(unpacked_wheel("sglang", version)))
    for patch in seam.here():
        if not patch.target.startswith("sglang.") or (version, patch.id) == ("0.5.9", "sglang.cpu.routing-record"):
            continue  # SGLang 0.5.9 is not run on the CPU
        notes = check_statically(patch)
        assert all(note.startswith("superseded") for note in notes), (patch.id, notes)
        assert bool(notes) == (patch.id in SUPERSEDED[version]), patch.id


OF_THE_RECORD = {f"sglang.routing.{name}" for name in ("target-only", "draft-forward", "own-copy", "mixed-batch")}
OF_THE_NARROW_RECORD = {f"sglang.routing.{name}" for name in ("narrow", "encode", "encode-directly")}
NATIVE = {"sglang.routing.draft-forward", "sglang.routing.mixed-batch"}
SUPERSEDED = {
    "0.5.9": {"sglang.routing.own-copy"},
    "0.5.12.post1": set(),
    "0.5.15.post1": NATIVE,
    "0.5.23": NATIVE,
}


@pytest.mark.upstream
@pytest.mark.parametrize("plugin", ["", "stock "])
def test_every_patch_acts_or_is_not_needed(plugin: str, found: Callable[[str], Any], version: str) -> None:
    states = {name: state for name, (state, _) in found(f"{plugin}patches").items() if "routing." in name}
    expected = OF_THE_RECORD if plugin else OF_THE_RECORD | OF_THE_NARROW_RECORD
    assert {name for name, state in states.items() if state == "superseded"} == SUPERSEDED[version]
    assert {name for name, state in states.items() if state == "verified"} == expected - SUPERSEDED[version]


def test_what_cannot_be_recorded_is_refused_by_its_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = {"pp_size": 1, "disaggregation_mode": "null", "chunked_prefill_size": 8192, "speculative_eagle_topk": 1}
    speculative = {"speculative_algorithm": "EAGLE"}

    def refused(**arguments: Any) -> list[str]:
        return list(sglang_routing.unrecordable({**harmless, **arguments}.get))

    assert refused() == refused(**speculative) == []
    assert sglang_routing.unrecordable(lambda name: None) == {}  # as in a release that has none of them
    for name, value in {
        "pp_size": 2,
        "attn_cp_size": 2,
        "enable_two_batch_overlap": True,
        "enable_pdmux": True,
        "disaggregation_mode": "decode",
        "enable_hierarchical_cache": True,
        "enable_lmcache": True,
        "chunked_prefill_size": -1,
    }.items():
        assert refused(**{name: value}) == [name]
    assert refused(**speculative, speculative_eagle_topk=4) == ["speculative_eagle_topk"]
    assert refused(**speculative, enable_dp_attention=True) == ["enable_dp_attention"]
    assert refused(enable_dp_attention=True) == []
    assert refused(speculative_algorithm="ngram") == ["speculative_algorithm"]
    assert refused(speculative_eagle_topk=4) == []  # nothing speculates
    for is_old in (True, False):
        monkeypatch.setattr(sglang_routing, "find_module", lambda name, old=is_old: None if old else Path(name))
        assert refused(ep_dispatch_algorithm="static") == refused(enable_eplb=True)
        assert refused(enable_eplb=True) == ["ep_dispatch_algorithm"] * is_old


@pytest.mark.upstream
def test_arguments_are_looked_at_by_their_name(found: Callable[[str], Any], version: str) -> None:
    """A misspelt one would never be refused. No release lacks one of them."""
    assert found("argument_names") == []


@pytest.mark.upstream
def test_an_engine_that_cannot_record_does_not_start(found: Callable[[str], Any], version: str) -> None:
    refusals = found("refusals")
    assert "--sglang-pp-size  each pipeline stage records its own layers only" in refusals["pp_size"]
    assert "--sglang-chunked-prefill-size" in refusals["chunked_prefill_size"]
    assert ("EPLB" in refusals["ep_dispatch_algorithm"]) == (version == "0.5.9")
    assert "the MoE kernel chooses the experts and does not tell" in refusals["bypassed"]
    assert "layers.1.topk: bypassed" in refusals["bypassed"]


# -- what is recorded ------------------------------------------------------------------------------------------------


@pytest.mark.upstream
def test_the_record_has_the_moe_layers_in_one_byte_an_id(found: Callable[[str], Any]) -> None:
    answer = found("buffers")
    assert answer["record"] == {
        "layers": [1, 3],
        "topk": 2,
        "experts": 8,
        "dtype": "uint8",
        "bytes_per_token": 4,
        "host_bytes": 4 * SLOTS,
    }
    assert answer["host"][:2] == [[SLOTS, 2, 2], "torch.uint8"]
    assert 4 * SLOTS <= answer["host"][2] < 4 * SLOTS + 32  # less than one of SGLang's own rows more
    assert answer["device"] == [[ROOM, 2, 2], "torch.uint8"]


@pytest.mark.upstream
def test_without_a_plugin_that_encodes_the_record_is_sglangs_own(found: Callable[[str], Any]) -> None:
    answer = found("stock buffers")
    assert answer["record"]["layers"] == [1, 3]
    assert answer["record"]["dtype"] == "int32"
    assert answer["host"] == [[SLOTS, LAYERS, TOPK], "torch.int32", SLOTS * LAYERS * TOPK * 4]
    assert answer["device"] == [[ROOM, LAYERS, TOPK], "torch.int32"]


@pytest.mark.upstream
def test_qwen3_30b_a3b_takes_384_bytes_a_token_instead_of_1536(found: Callable[[str], Any]) -> None:
    for name, wanted in (("buffers_of_qwen3_30b_a3b", 384), ("stock buffers_of_qwen3_30b_a3b", 1536)):
        answer = found(name)
        assert answer["bytes_per_token"] == wanted
        assert wanted <= answer["host"] < wanted + 1536 / SLOTS
        assert wanted <= answer["wire"] < wanted + 20  # and what pickle says of a tensor


@pytest.mark.upstream
def test_ids_of_more_than_256_experts_take_two_bytes(found: Callable[[str], Any]) -> None:
    """Also if only the gate tells how many there are; every id comes out as it was chosen."""
    wanted = {"256": ["torch.uint8", True], "257": ["torch.int16", True], "300": ["torch.int16", True]}
    assert found("ids_of_many_experts") == wanted


@pytest.mark.upstream
def test_rows_are_those_of_the_requests_tokens(found: Callable[[str], Any]) -> None:
    answer = found("rows_of_a_request")
    assert answer["rows"] == answer["wanted"]
    assert answer["dtype"] == "torch.uint8"


@pytest.mark.upstream
@pytest.mark.parametrize("plugin", ["", "stock "])
def test_the_next_pass_does_not_change_what_is_not_copied_yet(
    plugin: str, found: Callable[[str], Any], version: str
) -> None:
    assert found(f"{plugin}overlap") == {"deferred": version != "0.5.9", "first": True, "second": True}


@pytest.mark.upstream
@pytest.mark.parametrize("plugin", ["", "stock "])
def test_a_draft_worker_leaves_the_targets_record_alone(plugin: str, found: Callable[[str], Any]) -> None:
    answer = found(f"{plugin}draft")
    assert answer == dict.fromkeys(("same capturer", "device untouched", "rows", "target still records"), True)


@pytest.mark.upstream
@pytest.mark.parametrize("plugin", ["", "stock "])
def test_a_router_without_its_layer_is_refused(plugin: str, found: Callable[[str], Any]) -> None:
    """When the model is loaded, and, should it come later, before anything is written."""
    answer = found(f"{plugin}nameless_router")
    for name in ("start", "twice", "none"):
        assert "the routing of TinyForCausalLM cannot be recorded: SGLang cannot tell its layers apart" in answer[name]
    assert "1, such as layers.2.topk" in answer["start"]
    for name, layer in (("late", "None"), ("unknown", "2")):
        assert "a router is in no layer known to have one" in answer[name]
        assert f"its layer_id  {layer}" in answer[name]
    assert answer["untouched"]
    assert answer["reported"], "the engine passes the first three on to the user"


@pytest.mark.upstream
@pytest.mark.parametrize("plugin", ["", "stock "])
def test_a_pass_that_does_not_fit_is_an_error_that_says_so(plugin: str, found: Callable[[str], Any]) -> None:
    answer = found(f"{plugin}overflow")
    assert f"{ROOM + 1}, room for {ROOM}" in answer["long"]
    assert "--sglang-chunked-prefill-size" in answer["long"]
    assert "3, room for 2" in answer["wide"]
    assert "1, room for 2" in answer["narrow"]


@pytest.mark.upstream
def test_fused_shared_experts_are_not_in_the_record(found: Callable[[str], Any]) -> None:
    assert found("fused_shared_experts") == {
        "device": [ROOM, 2, TOPK + 1],
        "rows": [[[3, 5], [3, 5]], [[7, 0], [7, 0]]],
    }


@pytest.mark.upstream
def test_a_rank_of_data_parallel_attention_takes_its_own_rows(found: Callable[[str], Any]) -> None:
    """After the two tokens of the rank before; padded to four in a CUDA graph."""
    assert found("data_parallel_attention") == {"graph False": [2, 3, 4], "graph True": [4, 5, 6]}


@pytest.mark.upstream
def test_deepeps_gathering_stays_as_it_is(found: Callable[[str], Any], version: str) -> None:
    wanted = {"gather": "torch.int32", "rows": [[0, 1], [2, 3], [1, 2], [3, 4]]}
    assert found("deepep") == (None if version == "0.5.9" else wanted)


@pytest.mark.upstream
def test_the_capture_is_traced_into_one_graph(found: Callable[[str], Any]) -> None:
    """Of copies into parts of the buffer: nothing is allocated, and nothing waits for the device."""
    assert found("traced") == {"recorded": [True, True, True], "operations": [["add", "copy_", "getitem"]]}


# -- what is sent ----------------------------------------------------------------------------------------------------


def silence(version: str) -> str | None:
    """What a request that did not ask has in the answer: 0.5.9 has the key in any case."""
    return None if version == "0.5.9" else "absent"


def rows_in(text: str) -> list[Any]:
    """Of our plugin's encoding, each in order of size."""
    dtype, rows = json.loads(text)
    assert dtype == "torch.uint8"
    return [[sorted(chosen) for chosen in row] for row in rows]


@pytest.mark.upstream
def test_in_a_mixed_batch_each_request_keeps_its_rows(found: Callable[[str], Any], version: str) -> None:
    answer = found("mixed_batch")
    assert answer["sent"] == ["torch.uint8", None, "torch.uint8"]
    for name, wanted in answer["wanted"].items():
        (part,) = answer["parts"][name]
        text = answer["answers"][name]
        if wanted is None:
            assert (part, text) == (None, silence(version))
        else:
            assert rows_in(part) == rows_in(text) == wanted
    assert answer["nobody asks"] is None


@pytest.mark.upstream
def test_in_a_mixed_batch_of_sglangs_own_records_as_well(found: Callable[[str], Any], version: str) -> None:
    answer = found("stock mixed_batch")
    assert answer["sent"] == ["torch.int32", None, "torch.int32"]
    for name, wanted in answer["wanted"].items():
        text = answer["answers"][name]
        assert answer["parts"][name] == [None if wanted is None else text]
        assert text == silence(version) if wanted is None else of_moe_layers(decoded(text)) == wanted


@pytest.mark.upstream
def test_without_a_detokenizer_the_server_asks_the_plugin(found: Callable[[str], Any], version: str) -> None:
    answer = found("without_detokenizer")
    for name, wanted in answer["wanted"].items():
        text = answer["answers"][name]
        assert text == silence(version) if wanted is None else rows_in(text) == wanted


@pytest.mark.upstream
def test_what_no_plugin_encodes_is_sent_as_sglang_sends_it(found: Callable[[str], Any], version: str) -> None:
    """All layers, int32, in base64; without a detokenizer 0.5.9 passes the tensor on."""
    answer = found("unanswered")
    first, second, silent = answer["wanted"].values()
    for answers in (answer["answers"], answer["direct"]):
        assert rows_in(answers["r0"]) == first
        text = answers["r1"]
        rows = text["tensor"] if isinstance(text, dict) else decoded(text)
        assert [[sorted(chosen) for chosen in row] for row in of_moe_layers(rows)] == second
        assert silent is None
        assert answers["r2"] == silence(version)
    assert isinstance(answer["direct"]["r1"], dict) == (version == "0.5.9")
