"""What cannot work together with routing replay, found in the arguments before anything starts."""

from __future__ import annotations

import os
from argparse import Namespace

from miles_plugins import ArgumentError

CAPTURED = "a CUDA graph captures one microbatch's choice and repeats it for all"


def check(args: Namespace) -> None:
    """Raise ArgumentError naming every flag or variable under which routing would not be replayed, or not rightly."""
    reasons = {flag: reason for flag, reason in _reasons(args).items() if reason}
    if reasons:
        raise ArgumentError("r3_replay cannot work with these arguments", reasons, "leave the flags or r3 out")


def _reasons(args: Namespace) -> dict[str, str | None]:
    def when(condition: object, reason: str) -> str | None:
        return reason if condition else None

    def given(name: str) -> object:
        return getattr(args, name, None)

    load_balancing = str(args.moe_router_load_balancing_type)
    return {
        "--num-experts": when(not args.num_experts, "the model has no experts"),
        "--moe-router-fusion": when(args.moe_router_fusion, "the fused router decides before replay is asked"),
        "--moe-router-load-balancing-type": when("sinkhorn" in load_balancing, "sinkhorn routing has no top-k")
        or when("quantile" in load_balancing, "quantile balancing decides without a top-k"),
        "--moe-expert-capacity-factor": when(
            args.moe_expert_capacity_factor is not None, "a capacity drops replayed experts"
        ),
        "--moe-expert-rank-capacity-factor": when(
            given("moe_expert_rank_capacity_factor") is not None, "a capacity drops replayed experts"
        ),
        "--moe-router-force-load-balancing": when(
            given("moe_router_force_load_balancing"), "the weights of the replayed experts would be random"
        ),
        "--moe-router-force-biased": when(
            given("moe_router_force_biased") is not None, "the weights of the replayed experts would be made up"
        ),
        "--cuda-graph-impl": when(given("cuda_graph_impl") not in (None, "none"), CAPTURED),
        "--enable-cuda-graph": when(given("enable_cuda_graph"), CAPTURED),
        "--external-cuda-graph": when(given("external_cuda_graph"), CAPTURED),
        "ENABLE_ROUTING_REPLAY": when(
            os.environ.get("ENABLE_ROUTING_REPLAY") == "1",
            "it turns on a patched Megatron's own replay",
        ),
        "--moe-enable-routing-replay": when(
            given("moe_enable_routing_replay"), "Megatron's own replay holds one target a layer"
        ),
        "--overlap-moe-expert-parallel-comm": when(
            given("overlap_moe_expert_parallel_comm"), "the combined schedule runs two microbatches at once"
        ),
        "--qkv-format": when(given("qkv_format") == "bshd", "routing is laid out for packed sequences (thd) only"),
        "--prefill-num-servers": when(
            given("prefill_num_servers") is not None, "a decode server does not know the prompt's routing"
        ),
        "--sglang-config": when(_disaggregated(args), "a decode server does not know the prompt's routing"),
        "--sglang-enable-hierarchical-cache": when(
            given("sglang_enable_hierarchical_cache"), "SGLang reloads cached tokens without their routing"
        ),
        "--sglang-speculative-algorithm": when(
            given("sglang_speculative_algorithm") and given("sglang_enable_dp_attention"),
            "with --sglang-enable-dp-attention SGLang reads another rank's routing",
        ),
        "--custom-config-path": when(not args.use_rollout_routing_replay, "the file switches routing replay off"),
    }


def _disaggregated(args: Namespace) -> bool:
    """Whether the file of --sglang-config has prefill, decode or encoder servers."""
    if getattr(args, "sglang_config", None) is None:
        return False
    import yaml

    with open(args.sglang_config) as file:
        models = yaml.safe_load(file)["sglang"]
    groups = [group for model in models for group in model.get("server_groups", [])]
    return any(group["worker_type"] in ("prefill", "decode", "encoder") for group in groups)
