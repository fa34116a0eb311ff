"""Rollout Routing Replay: train on the experts that the rollout used.

One sample's way: SGLang records the routing (asked for in `receive_engine_request`) and sends it narrow
(`encode_routed_experts`); it is checked and joined to its sample in `receive_response`, cut for the ranks in
`share_train_data`, fetched by each in `receive_train_data`, and taken by the routers in `select_experts`.
"""

from __future__ import annotations

import logging
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from miles_plugins import Finding, Microbatch, Packing, PluginError, Rank, Schedule, current_microbatch, hookimpl
from miles_plugins.r3_replay import engine_probe, environment, refusals, shards, wire
from miles_plugins.r3_replay.replay import DIFFERENT, RECORDED, REPLAYED, TOKENS, Recorded, Replay
from miles_plugins.r3_replay.trace import Routing, RoutingTrace, join, moe_layers, refused

if TYPE_CHECKING:
    import torch

SIDES = ("trainer", "rollout_manager", "sglang_scheduler")
REPLAYING = ("log_prob", "train")  # the reference, the teacher and the critic route for themselves
LAYOUT = "layout of the routing"
REMEMBERED = 20  # steps whose share of different tokens a new one is compared with

_log = logging.getLogger(__name__)

_traces: list[RoutingTrace | None] = []  # of the samples that are about to be scheduled
_received = {"bytes": 0, "rows": 0, "seconds": 0.0}  # since the last rollout
_evidence: str | None = None

_replay: Replay | None = None  # bound to the actor's model
_natural: WeakSet[Any] = WeakSet()  # the chunks of other models in this process: they route for themselves
_shard: shards.Shard | None = None
_metrics: dict[str, float] = {}
_seconds = 0.0  # of this process in a step, without the device's
_shares: deque[float] = deque(maxlen=REMEMBERED)


def _routing(args: Namespace) -> Routing:
    return Routing(tuple(moe_layers(args.num_layers, args.moe_layer_freq)), args.moe_router_topk, args.num_experts)


# -- miles-plugins doctor --------------------------------------------------------------------------------------------


@hookimpl
def doctor() -> Sequence[Finding]:
    return environment.findings()


# -- the driver ------------------------------------------------------------------------------------------------------


@hookimpl
def default_flags() -> Sequence[str]:
    return ["--use-rollout-routing-replay"]


@hookimpl
def register_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--r3-earlier-rows",
        choices=("keep", "overwrite"),
        default="keep",
        help="a resumed or multi-turn sample: keep the routing that its earlier tokens were sampled with, or overwrite "
        "it with that of the last request's prefill (default: keep)",
    )
    parser.add_argument(
        "--r3-missing",
        choices=("fail", "drop"),
        default="fail",
        help="a sample without its routing: end the run, or mask the sample out of the loss (default: fail)",
    )
    parser.add_argument(
        "--r3-measure-only",
        action="store_true",
        help="record and compare, but leave the trainer its own routing: shows what replay would change",
    )


@hookimpl
def configure(args: Namespace) -> None:
    refusals.check(args)
    # slime would now expect a patched Megatron to fill and drain its queues; the replay here needs neither.
    args.use_routing_replay = False


# -- SGLang ----------------------------------------------------------------------------------------------------------


@hookimpl
def receive_engine_request(server_args: Any, request: Any) -> None:
    # sglang-router drops the request field `return_routed_experts`. Asking here keeps its load balancing whole.
    if server_args.enable_return_routed_experts:
        request.return_routed_experts = True


@hookimpl
def encode_routed_experts(experts: torch.Tensor) -> str:
    return wire.encode(experts)


# -- rollout ---------------------------------------------------------------------------------------------------------


@hookimpl
def rollout_ready(args: Namespace, router_url: str, engine_urls: Sequence[str]) -> None:
    global _evidence
    _evidence = engine_probe.routing_arrives(_routing(args), router_url, engine_urls)


@hookimpl
def receive_response(args: Namespace, sample: Any, meta_info: dict[str, Any]) -> None:
    text = meta_info.pop("routed_experts", None)
    if not text:
        return  # aborted while it was queued, say: what the sample has still belongs to the tokens it has
    if args is None:
        raise PluginError(
            "a response's routing cannot be read without slime's arguments",
            {"sample": sample.index},
            "your rollout function must hand args to Sample.append_response_tokens",
        )
    begun = time.perf_counter()
    try:
        sample.rollout_routed_experts, rows = _joined(args, sample, text, meta_info)
    except PluginError as problem:
        if args.r3_missing == "fail":
            raise
        _log.warning("r3_replay: %s", problem)
        sample.rollout_routed_experts, rows = None, 0
    _received["bytes"] += len(text)
    _received["rows"] += rows
    _received["seconds"] += time.perf_counter() - begun


def _joined(args: Namespace, sample: Any, text: str, meta_info: Mapping[str, Any]) -> tuple[RoutingTrace, int]:
    """The sample's routing with that of its last response, and how many rows came."""
    name, tokens = _name(sample), sample.tokens
    rows = wire.decode(text, f"a response for {name}")
    start = int(meta_info.get("routed_experts_start_len") or 0)
    if start < 0:
        raise refused(name, "its first row is of no token", f"routed_experts_start_len {start}", "at least 0")
    _routing(args).check(rows, max(len(tokens) - 1 - start, 0), name)
    earlier = sample.rollout_routed_experts
    earlier = earlier if isinstance(earlier, RoutingTrace) else None
    version, keep = str(meta_info.get("weight_version", "")), args.r3_earlier_rows == "keep"
    return join(earlier, rows, start, tokens, version, keep, name), len(rows)


@hookimpl
def rollout_metrics(args: Namespace, samples: Sequence[Any]) -> Mapping[str, float]:
    found = [_trace_or_problem(args, sample) for sample in samples]
    traces = [trace for trace in found if isinstance(trace, RoutingTrace)]
    rows = sum(map(len, traces))
    last = sum(trace.spans[-1].end - trace.spans[-1].begin for trace in traces if trace.spans)
    return {
        "r3/wire_bytes_per_token": _received["bytes"] / max(_received["rows"], 1),
        "r3/bytes_per_token": float(_routing(args).bytes_per_token),
        "r3/receive_seconds": _received["seconds"],
        "r3/samples_without_routing": float(len(found) - len(traces)),
        "r3/rows_of_earlier_weights": (rows - last) / max(rows, 1),
    }


@hookimpl
def receive_samples(args: Namespace, samples: Sequence[Any]) -> None:
    for sample in samples:
        found = _trace_or_problem(args, sample)
        if isinstance(found, RoutingTrace):
            sample.rollout_routed_experts = found
            continue
        if not sample.remove_sample and _is_trained_on(sample):
            if args.r3_missing == "fail":
                raise found
            _log.warning("r3_replay: %s is masked out of the loss: %s", _name(sample), found)
            sample.remove_sample = True
        sample.rollout_routed_experts = None


@hookimpl
def collect_train_data(args: Namespace, samples: Sequence[Any], train_data: dict[str, Any]) -> None:
    import numpy

    found, expected = [list(tokens) for tokens in train_data["tokens"]], [list(sample.tokens) for sample in samples]
    if found != expected:
        differing = [index for index, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]]
        raise PluginError(
            "the training data does not hold the rollout's samples, one for one and in order",
            {
                "samples": f"{len(expected)} of lengths {[len(tokens) for tokens in expected[:8]]}",
                "training data": f"{len(found)}, {[len(tokens) for tokens in found[:8]]}",
                "other tokens": f"in {len(differing)}, first in number {differing[0]}" if differing else None,
            },
            "--custom-convert-samples-to-train-data-path must keep the samples, or r3 be left out",
        )
    unmasked = [
        _name(sample)
        for sample, mask in zip(samples, train_data["loss_masks"], strict=True)
        if sample.rollout_routed_experts is None and any(mask)
    ]
    if unmasked:
        raise PluginError(
            "samples without routing would be trained on experts that no rollout used",
            {"samples": ", ".join(unmasked[:8]), "expected": "a loss mask of zeros: they are marked remove_sample"},
            "--custom-convert-samples-to-train-data-path must mask out what is marked remove_sample",
        )
    _received.update(bytes=0, rows=0, seconds=0.0)
    _traces[:] = [sample.rollout_routed_experts for sample in samples]
    # The routing itself goes its own way, in `share_train_data`; slime carries which sample it is of, its rows, tokens.
    train_data["rollout_routed_experts"] = [  # arrays: slime before v0.3.1 makes tensors of them
        numpy.array([number, 0 if trace is None else len(trace), len(sample.tokens)])
        for number, (trace, sample) in enumerate(zip(_traces, samples, strict=True))
    ]


@hookimpl
def share_train_data(args: Namespace, schedule: Schedule) -> Sequence[Mapping[str, Any]]:
    experts = [None if trace is None else trace.experts for trace in _traces]
    _traces.clear()
    packing = Packing.of(args) if schedule.scheduled else Packing()  # else whole samples: the trainers lay them out
    cuts = shards.cut(experts, schedule, packing, _routing(args), _by_layer(args))
    return [{**of_rank, LAYOUT: _layout(args)} for of_rank in cuts]


def _layout(args: Namespace) -> str:
    """What a rank's cut depends on: two layouts may cut pieces of one size, with other tokens in them."""
    return repr((Packing.of(args), _routing(args), _by_layer(args)))


def _by_layer(args: Namespace) -> bool:
    """Whether ranks hold different layers: then each fetches its own only."""
    return bool(args.pipeline_model_parallel_size > 1)


def _name(sample: Any) -> str:
    return f"sample {sample.index}"


def _trace_or_problem(args: Namespace, sample: Any) -> RoutingTrace | PluginError:
    """The routing of the tokens that the sample has now, or why it has none that can be replayed."""
    try:
        found, name = sample.rollout_routed_experts, _name(sample)
        if found is None:
            raise refused(name, "there is none", "no routed_experts", f"{len(sample.tokens) - 1} rows")
        trace = found if isinstance(found, RoutingTrace) else _from_tensor(args, sample)
        return trace.of(sample.tokens, name, _needed_rows(sample))
    except PluginError as problem:
        return problem


def _is_trained_on(sample: Any) -> bool:
    """Whether a token of it reaches the loss: by default all of the response do."""
    return sample.loss_mask is None or any(sample.loss_mask)


def _needed_rows(sample: Any) -> int:
    """Rows up to the last token that is trained on: what is routed after it reaches no loss."""
    rows = max(len(sample.tokens) - 1, 0)
    mask = sample.loss_mask or []
    masked_out = next((number for number, trained in enumerate(reversed(mask)) if trained), len(mask))
    return max(rows - masked_out, 0)


def _from_tensor(args: Namespace, sample: Any) -> RoutingTrace:
    """Where a user's own rollout function put [tokens - 1, all layers, topk] ids."""
    import torch

    routing, name, tokens = _routing(args), _name(sample), sample.tokens
    try:
        rows = torch.as_tensor(sample.rollout_routed_experts)
    except (TypeError, ValueError) as error:
        raise refused(name, "it is no tensor", str(error), "[tokens - 1, layers, top-k] integers") from error
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise refused(name, "its ids are no integers", str(rows.dtype), "an integer dtype")
    if rows.dim() == 3 and rows.shape[1] == args.num_layers:
        rows = rows[:, list(routing.layers)]
    routing.check(rows, max(len(tokens) - 1, 0), name)
    version = str(sample.weight_versions[-1]) if sample.weight_versions else ""
    return join(None, routing.narrow(rows), 0, tokens, version, True, name)


# -- training --------------------------------------------------------------------------------------------------------


@hookimpl
def model_built(args: Namespace, model: Sequence[Any], role: str) -> None:
    global _replay
    if role == "actor":
        refusals.check(args)  # these are the actor's own, with what --megatron-config-path says
        layers = _routing(args).layers
        replay = Replay(model, layers, args.r3_measure_only)
        _require_all(layers, replay.local_layers)
        _replay = replay
    else:
        _natural.update(model)


@hookimpl
def receive_train_data(
    args: Namespace, rollout_data: dict[str, Any], rank: Rank, fetch: Callable[[Sequence[str]], list[Any]]
) -> None:
    global _shard
    if _replay is None:
        return  # the critic routes for itself
    if "rollout_routed_experts" not in rollout_data:
        raise PluginError(
            "the training data carries no routing",
            {"fields": ", ".join(rollout_data)},
            "with --load-debug-rollout-data, the dump must come from a run with r3",
        )
    _shard = None  # its arrays are Ray's memory: never two rollouts at once
    if (found := fetch([LAYOUT])[0]) != _layout(args):
        raise PluginError(
            "the routing was cut for another layout than this trainer's",
            {"rollout manager": found, "trainer": _layout(args)},
            "give the parallel layout on the command line, for all processes, not in --megatron-config-path",
        )
    samples = {int(number): int(tokens) for number, _, tokens in rollout_data["rollout_routed_experts"]}
    if (microbatches := rollout_data.get("micro_batch_indices")) is None:
        whole = fetch(shards.names(Rank(rank.data), Packing(), _replay.local_layers, _by_layer(args)))
        _shard = shards.UnscheduledShard(samples, whole, _by_layer(args), _routing(args))
        return
    numbers = list(samples)
    parts = fetch(shards.names(rank, Packing.of(args), _replay.local_layers, _by_layer(args)))
    _shard = shards.Shard([[numbers[local] for local in each] for each in microbatches], parts, _by_layer(args))


@hookimpl
def take_routed_experts() -> bool:
    return True


@hookimpl
def microbatch_keys() -> Sequence[str]:
    return ["rollout_routed_experts"]


@hookimpl
def pass_begins(stage: str, model: Sequence[Any]) -> None:
    global _seconds
    if _replay is None or stage not in REPLAYING or model[0] in _natural:
        return
    if not _replay.is_of(model):
        raise PluginError(
            "a pass that should replay runs on another model than the one that was bound",
            {"pass": stage, "model": f"{len(model)} chunk(s) of {type(model[0]).__name__}"},
            "whatever replaces the model after it was built must be left out",
        )
    if _shard is None:
        raise PluginError(
            "a pass that should replay runs before any training data came",
            {"pass": stage},
            "run it through slime's MegatronTrainRayActor.train, which receives the data",
        )
    _shard.begin()
    _replay.begin()
    _seconds = 0.0


@hookimpl
def microbatch_begins(microbatch: Microbatch) -> None:
    global _seconds
    if _replay is None or _shard is None or not _replay.active:
        return
    begun = time.perf_counter()
    handles = [handle.tolist() for handle in microbatch.batch["rollout_routed_experts"]]
    numbers, rows, tokens_then = zip(*handles, strict=True)
    lengths = [len(tokens) for tokens in microbatch.batch["unconcat_tokens"]]
    if list(tokens_then) != lengths:
        raise PluginError(
            "the recorded routing of a microbatch does not belong to its tokens",
            {"tokens": lengths, "in the rollout": list(tokens_then), "rows of routing": list(rows)},
            "whatever changes the samples after the rollout must change their routing with them",
        )
    indices = _shard.take(numbers, microbatch.positions, _replay.rows_of(microbatch.chunk))
    tokens, recorded = shards.which_count(lengths, rows, microbatch.positions)
    mine = Recorded(indices, recorded, tokens, microbatch.chunk)
    microbatch.values["r3_replay"] = mine
    _replay.add(mine)
    _seconds += time.perf_counter() - begun


@hookimpl
def select_experts(
    router: torch.nn.Module,
    scores: torch.Tensor,
    topk: int,
    choose: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if _replay is None or not _replay.active or not _replay.is_bound(router):
        return None
    microbatch = current_microbatch()
    if microbatch is None or "r3_replay" not in microbatch.values:
        raise PluginError(
            "a router runs in a replaying pass and nothing says for which microbatch",
            {"router": type(router).__name__},
            "report this with your recompute flags: an activation is recomputed in a way that is not known here",
        )
    return _replay.select(router, microbatch.values["r3_replay"], microbatch.recomputing, scores, topk, choose)


@hookimpl
def pass_ends(args: Namespace, stage: str, model: Sequence[Any], error: BaseException | None) -> None:
    if _replay is None or _shard is None or not _replay.active:
        return
    _replay.end()
    if error is not None:
        return
    if stage == "train":
        _shard.let_go()
    counts = _sum_over_ranks(_replay.counts(), model)
    _replay.forget()
    total = counts.sum(dim=0)
    if total[REPLAYED] != total[RECORDED]:
        raise PluginError(
            f"routing was not replayed everywhere in the {stage} pass",
            {
                "replayed": f"{total[REPLAYED]:.0f} (token, MoE layer) pairs",
                "expected": f"{total[RECORDED]:.0f}",
                "layers": ", ".join(
                    str(layer)
                    for layer, row in zip(_routing(args).layers, counts.tolist(), strict=True)
                    if row[REPLAYED] != row[RECORDED]
                ),
            },
            "another plugin's select_experts may have decided first; else report this with your parallel and recompute "
            "flags. Go on from the last checkpoint, not from this step",
        )
    if stage == "train":
        _measure(args, counts)


def _measure(args: Namespace, counts: torch.Tensor) -> None:
    total = counts.sum(dim=0)
    by_layer = (counts[:, DIFFERENT] / counts[:, RECORDED].clamp(min=1)).tolist()
    replayed = 0.0 if args.r3_measure_only else float(total[REPLAYED])
    share = float(total[DIFFERENT] / total[RECORDED].clamp(min=1))
    _metrics.clear()
    _metrics["r3/coverage"] = replayed / max(float(total[TOKENS]), 1.0)
    _metrics["r3/different_tokens"] = share
    for layer, different in zip(_routing(args).layers, by_layer, strict=True):
        _metrics[f"r3/different_tokens/layer_{layer}"] = different
    _metrics["r3/host_seconds"] = _seconds
    warning = jump(share, _shares, dict(zip(_routing(args).layers, by_layer, strict=True)))
    if warning and _is_first_rank():
        _log.warning("r3_replay: %s", warning)
    _shares.append(share)


def jump(share: float, before: Sequence[float], by_layer: Mapping[int, float]) -> str | None:
    """A warning when many more tokens than before route differently by themselves; None while all is well."""
    usual = statistics.median(before) if len(before) >= 3 else None
    if share < 0.5 and (usual is None or share < max(0.05, 5 * usual)):
        return None
    worst = max(by_layer, key=lambda layer: by_layer[layer])
    return (
        f"{share:.1%} of the (token, MoE layer) pairs would route differently by themselves"
        + (f", after {usual:.1%} before" if usual is not None else "")
        + f" (worst: layer {worst}, {by_layer[worst]:.1%}). Routing that belongs to other tokens looks like this, and "
        "so do weights that did not reach the engine: compare train_rollout_logprob_abs_diff before you go on"
    )


@hookimpl
def step_metrics() -> Mapping[str, float]:
    return _metrics


def _require_all(layers: Sequence[int], local: Sequence[int]) -> None:
    """Raise unless the ranks of the actor hold a router for each MoE layer of the arguments, taken together."""
    import torch.distributed

    everywhere = [local]
    if torch.distributed.is_initialized():
        everywhere = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, local)
    missing = set(range(len(layers))).difference(*everywhere)
    if missing:
        raise PluginError(
            "the model has MoE layers without a router that can replay",
            {"layers": ", ".join(str(layers[position]) for position in sorted(missing)), "of": str(list(layers))},
            "a model provider with a router of its own must take `router_replay` as Megatron's TopKRouter does",
        )


def _is_first_rank() -> bool:
    import torch.distributed

    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _sum_over_ranks(counts: torch.Tensor, model: Sequence[Any]) -> torch.Tensor:
    import torch.distributed

    device = next(model[0].parameters()).device
    total = counts.to(device)
    torch.distributed.all_reduce(total)
    return total.cpu()


# -- every process ---------------------------------------------------------------------------------------------------


@hookimpl
def probe(role: str) -> str | None:
    if role == "trainer":
        return (
            f"{len(_replay.local_layers)} routers of this rank replay" if _replay else "not the actor: natural routing"
        )
    if role == "rollout_manager":
        return _evidence or "no engines in this run"
    if role == "sglang_scheduler":
        return engine_probe.capture_is_on()
    return None
