"""Rollout Routing Replay: train on the experts that the rollout used.

One sample's way: SGLang records the routing (asked for in `receive_engine_request`), slime carries it, it is checked
and made compact in `collect_train_data`, laid out like the tokens in `microbatch_begins`, and taken by the routers in
`select_experts`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles_plugins import ArgumentError, Microbatch, PluginError, current_microbatch, hookimpl
from miles_plugins.r3_replay import engine_probe
from miles_plugins.r3_replay.replay import Recorded, Replay
from miles_plugins.r3_replay.trace import compact, lay_out, moe_layers

if TYPE_CHECKING:
    import torch

SIDES = ("trainer", "rollout_manager", "sglang_scheduler")
REPLAYING = ("log_prob", "train")  # the reference, the teacher and the critic route for themselves

_replay: Replay | None = None  # one a trainer process, bound to its actor model
_evidence: str | None = None
_metrics: dict[str, float] = {}


# -- the driver ------------------------------------------------------------------------------------------------------


@hookimpl
def default_flags() -> Sequence[str]:
    return ["--use-rollout-routing-replay"]


@hookimpl
def configure(args: Namespace) -> None:
    refused = {
        "--num-experts": not args.num_experts and "the model has no experts",
        "--moe-router-fusion": args.moe_router_fusion and "the fused router decides before replay is asked",
        "--moe-router-load-balancing-type": "sinkhorn" in str(args.moe_router_load_balancing_type)
        and "sinkhorn routing decides without a top-k",
        "--moe-expert-capacity-factor": args.moe_expert_capacity_factor is not None
        and "a capacity drops replayed experts",
        "--moe-enable-routing-replay": getattr(args, "moe_enable_routing_replay", False)
        and "Megatron's own replay holds one target a layer",
        "--overlap-moe-expert-parallel-comm": getattr(args, "overlap_moe_expert_parallel_comm", False)
        and "the combined schedule runs two microbatches at once",
        "--prefill-num-servers": getattr(args, "prefill_num_servers", None) is not None
        and "a decode server does not know the prompt's routing",
        "--sglang-config": _disaggregated(args) and "a decode server does not know the prompt's routing",
        "--sglang-enable-hierarchical-cache": getattr(args, "sglang_enable_hierarchical_cache", False)
        and "SGLang reloads cached tokens without their routing",
        "--sglang-speculative-algorithm": getattr(args, "sglang_speculative_algorithm", None)
        and getattr(args, "sglang_enable_dp_attention", False)
        and "with --sglang-enable-dp-attention SGLang reads another rank's routing",
        "--num-layers-per-virtual-pipeline-stage": getattr(args, "virtual_pipeline_model_parallel_size", None)
        and "virtual pipeline stages are not replayed yet",
        "--custom-config-path": not args.use_rollout_routing_replay and "the file switches routing replay off",
    }
    reasons = {flag: reason for flag, reason in refused.items() if reason}
    if reasons:
        raise ArgumentError("r3_replay cannot work with these arguments", reasons, "leave the flags or r3 out")
    # slime would now expect a patched Megatron to fill and drain its queues; the replay here needs neither.
    args.use_routing_replay = False


def _disaggregated(args: Namespace) -> bool:
    """Whether the file of --sglang-config has prefill, decode or encoder servers."""
    if getattr(args, "sglang_config", None) is None:
        return False
    import yaml

    with open(args.sglang_config) as file:
        models = yaml.safe_load(file)["sglang"]
    groups = [group for model in models for group in model.get("server_groups", [])]
    return any(group["worker_type"] in ("prefill", "decode", "encoder") for group in groups)


# -- rollout ---------------------------------------------------------------------------------------------------------


@hookimpl
def receive_engine_request(server_args: Any, request: Any) -> None:
    # sglang-router drops the request field `return_routed_experts`. Asking here keeps its load balancing whole.
    if server_args.enable_return_routed_experts:
        request.return_routed_experts = True


@hookimpl
def rollout_ready(args: Namespace, router_url: str, engine_urls: Sequence[str]) -> None:
    global _evidence
    _evidence = engine_probe.routing_arrives(args, router_url, engine_urls)


@hookimpl
def collect_train_data(args: Namespace, samples: Sequence[Any], train_data: dict[str, Any]) -> None:
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
    layers = moe_layers(args.num_layers, args.moe_layer_freq)
    train_data["rollout_routed_experts"] = [
        compact(
            sample.rollout_routed_experts,
            len(sample.tokens),
            layers,
            args.moe_router_topk,
            args.num_experts,
            f"sample {sample.index}",
        )
        for sample in samples
    ]


# -- training --------------------------------------------------------------------------------------------------------


@hookimpl
def model_built(args: Namespace, model: Sequence[Any], role: str) -> None:
    global _replay
    if role == "actor":
        layers = moe_layers(args.num_layers, args.moe_layer_freq)
        replay = Replay(model, layers)
        _require_all(layers, replay.local_layers)
        _replay = replay


@hookimpl
def take_routed_experts(rollout_data: dict[str, Any]) -> bool:
    if "rollout_routed_experts" not in rollout_data:
        raise PluginError(
            "the training data carries no routing",
            {"fields": ", ".join(rollout_data)},
            "with --load-debug-rollout-data, the dump must come from a run with r3",
        )
    return True


@hookimpl
def microbatch_keys() -> Sequence[str]:
    return ["rollout_routed_experts"]


@hookimpl
def pass_begins(stage: str) -> None:
    if _replay and stage in REPLAYING:
        _replay.begin()


@hookimpl
def microbatch_begins(args: Namespace, microbatch: Microbatch) -> None:
    if _replay and _replay.active:
        traces = microbatch.batch["rollout_routed_experts"]
        lengths = [len(tokens) for tokens in microbatch.batch["unconcat_tokens"]]
        if [len(trace) + 1 for trace in traces] != lengths:
            raise PluginError(
                "the recorded routing of a microbatch does not belong to its tokens",
                {"tokens": lengths, "rows of routing": [len(trace) for trace in traces]},
                "whatever changes the samples after the rollout must change their routing with them",
            )
        recorded = Recorded(*lay_out(traces, microbatch.positions, args.num_experts), replayed=set())
        microbatch.values["r3_replay"] = recorded
        _replay.add(recorded)


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
def pass_ends(stage: str, model: Sequence[Any], error: BaseException | None) -> None:
    if _replay is None or not _replay.active:
        return
    _replay.end()
    if error is not None:
        return
    replayed, expected, different = _sum_over_ranks(_replay.counts(), model)
    if replayed != expected:
        raise PluginError(
            f"routing was not replayed everywhere in the {stage} pass",
            {"replayed": f"{replayed:.0f} (token, MoE layer) pairs", "expected": f"{expected:.0f}"},
            "another plugin's select_experts may have decided first; else report this with your parallel and recompute "
            "flags. Go on from the last checkpoint, not from this step",
        )
    if stage == "train":
        _metrics["r3/coverage"] = replayed / expected if expected else 0.0
        _metrics["r3/different_tokens"] = different / expected if expected else 0.0


@hookimpl
def step_metrics() -> Mapping[str, float]:
    return _metrics


def _require_all(layers: Sequence[int], local: set[int]) -> None:
    """Raise unless the ranks of the actor hold a router for each MoE layer of the arguments, taken together."""
    import torch.distributed

    everywhere = [local]
    if torch.distributed.is_initialized():
        everywhere = [set()] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, local)
    missing = set(range(len(layers))) - set().union(*everywhere)
    if missing:
        raise PluginError(
            "the model has MoE layers without a router that can replay",
            {"layers": ", ".join(str(layers[position]) for position in sorted(missing)), "of": str(list(layers))},
            "a model provider with a router of its own must take `router_replay` as Megatron's TopKRouter does",
        )


def _sum_over_ranks(counts: torch.Tensor, model: Sequence[Any]) -> list[float]:
    import torch.distributed

    device = next(model[0].parameters()).device
    total = counts.to(device)
    torch.distributed.all_reduce(total)
    values: list[float] = total.tolist()
    return values


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
