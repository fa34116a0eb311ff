"""Run the whole real stack on the CPU, to rehearse a launch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence

from miles_plugins import ArgumentError, hookimpl

SIDES = ("trainer", "sglang_scheduler")

MEGATRON_FLAGS = (
    "--transformer-impl local --distributed-backend gloo --no-gradient-accumulation-fusion --no-persist-layer-norm "
    "--no-rope-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --attention-dropout 0 --hidden-dropout 0 "
    "--moe-token-dispatcher-type alltoall"
).split()
SGLANG_FLAGS = (
    "--sglang-device cpu --sglang-attention-backend torch_native --sglang-sampling-backend pytorch "
    "--sglang-mem-fraction-static 0.05 --sglang-max-total-tokens 4096 --sglang-disable-cuda-graph "
    "--sglang-disable-overlap-schedule --sglang-grammar-backend none"
).split()


@hookimpl
def choose_device() -> str:
    return "cpu"


@hookimpl
def default_flags() -> Sequence[str]:
    return [*MEGATRON_FLAGS, *SGLANG_FLAGS]


@hookimpl
def process_environment(role: str) -> Mapping[str, str]:
    everywhere = {"SGLANG_USE_CPU_ENGINE": "1"}
    training = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return training if role == "trainer" else everywhere | training if role == "driver" else everywhere


@hookimpl
def configure(args: Namespace) -> None:
    refused = {
        "--advantage-estimator": args.use_critic
        and "slime offloads the trainers for ppo, and there is no GPU memory to free",
        "--colocate": args.colocate and "sharing a GPU between training and rollout needs one",
        "--offload-train": args.offload_train and not args.use_critic and "there is no GPU memory to free",
        "--offload-rollout": args.offload_rollout and "there is no GPU memory to free",
        "--transformer-impl": args.transformer_impl != "local" and "TransformerEngine needs CUDA",
        "--distributed-backend": args.distributed_backend != "gloo" and "nccl needs CUDA",
        "--sglang-device": getattr(args, "sglang_device", "cpu") != "cpu" and "there is no other device",
        "--fp8-format": getattr(args, "fp8", None) and "FP8 training needs TransformerEngine",
        "--context-parallel-size": args.context_parallel_size > 1 and "its attention needs TransformerEngine",
        "--moe-grouped-gemm": args.moe_grouped_gemm and "grouped matrix products need CUDA",
    }
    reasons = {flag: reason for flag, reason in refused.items() if reason}
    if reasons:
        raise ArgumentError("cpu_rehearsal cannot work with these arguments", reasons, "leave the flags out")


@hookimpl
def probe(role: str) -> str | None:
    return "computes on the CPU" if role in SIDES else None
