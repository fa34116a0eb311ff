"""The embedded host's command line: slime's flags, as far as this host has them, and a few of its own."""

from __future__ import annotations

import argparse
import difflib
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from miles_plugins.cpu_rehearsal import toy_task
from miles_plugins.errors import ArgumentError
from miles_plugins.manager import Plugins

# What slime lets its user choose and this host does not. Plugins read these.
FIXED: dict[str, Any] = {
    "advantage_estimator": "grpo",
    "train_backend": "megatron",
    "transformer_impl": "local",
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "allgather_cp": False,
    "qkv_format": "thd",
    "bf16": True,
    "use_critic": False,
    "use_dynamic_batch_size": False,
    "moe_router_fusion": False,
    "moe_router_load_balancing_type": "none",
    "moe_expert_capacity_factor": None,
    "moe_grouped_gemm": False,
    "moe_token_dispatcher_type": "alltoall",
    "sglang_config": None,
    "prefill_num_servers": None,
    "rollout_external": False,
    "colocate": False,
    "offload_train": False,
    "offload_rollout": False,
    "train_env_vars": {},
}


# Of the random model. More layers, experts and choices than the rehearsal's: routing then differs more visibly.
TINY = {"num_layers": 4, "hidden_size": 64, "num_experts": 16, "moe_router_topk": 4}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message, next="`slime-train --embedded --help` shows every flag")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The host's own flags; plugins add theirs."""
    parser = _Parser(
        prog="slime-train --embedded",
        usage="slime-train --embedded [--plugins NAME[,NAME…]] [flags]",
        description="A small GRPO trainer in one process, on the CPU or one GPU: megatron-core's GPTModel as the "
        "policy, transformers' model of the same weights as the rollout engine. It is not slime: it needs none, and "
        "it calls the same plugins.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--run-folder", type=Path, help="new folder for all results (default: runs/embedded-DATE-TIME)")
    run.add_argument("--compare", action="store_true", help="run twice, with and without the plugins, and compare")
    run.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    run.add_argument("--seed", type=int, default=1234, help="of the random model, the prompts and the sampling")
    run.add_argument("--threads", type=_positive, default=1, help="CPU threads; part of what makes a run repeatable")
    run.add_argument("--num-rollout", type=_positive, default=60, help="rollouts to train on, all runs together")

    model = parser.add_argument_group("the model: a Qwen3-MoE folder, or a tiny random one of this shape")
    model.add_argument("--hf-checkpoint", type=Path, help="Hugging Face folder; the next flags then must not be given")
    model.add_argument("--num-layers", type=_positive, help=f"(default: {TINY['num_layers']})")
    model.add_argument("--hidden-size", type=_positive, help=f"(default: {TINY['hidden_size']})")
    model.add_argument("--num-experts", type=_positive, help=f"(default: {TINY['num_experts']})")
    model.add_argument("--moe-router-topk", type=_positive, help=f"(default: {TINY['moe_router_topk']})")
    model.add_argument("--recompute-granularity", choices=["full"], help="recompute activations in the backward pass")

    rollout = parser.add_argument_group("the rollout")
    rollout.add_argument("--prompt-data", type=Path, help="JSON lines (default: a built-in task: answer with digits)")
    rollout.add_argument("--input-key", default="text")
    rollout.add_argument("--label-key", default="label")
    rollout.add_argument("--custom-rm-path", default=f"{toy_task.__name__}.reward", help="MODULE.FUNCTION, as in slime")
    rollout.add_argument("--rollout-batch-size", type=_positive, default=8, help="prompts a rollout")
    rollout.add_argument("--n-samples-per-prompt", type=_positive, default=8)
    rollout.add_argument("--rollout-max-response-len", type=_positive, default=16)
    rollout.add_argument("--rollout-temperature", type=float, default=1.0)
    rollout.add_argument("--rollout-shuffle", action="store_true")
    rollout.add_argument("--rollout-seed", type=int, help="(default: --seed)")

    training = parser.add_argument_group("training")
    training.add_argument("--global-batch-size", type=_positive, help="samples a step (default: one step a rollout)")
    training.add_argument("--micro-batch-size", type=_positive, default=16, help="samples packed into one forward pass")
    training.add_argument("--lr", type=float, default=2e-3)
    training.add_argument("--adam-beta1", type=float, default=0.9)
    training.add_argument("--adam-beta2", type=float, default=0.98)
    training.add_argument("--adam-eps", type=float, default=1e-8)
    training.add_argument("--weight-decay", type=float, default=0.0)
    training.add_argument("--clip-grad", type=float, default=1.0)
    training.add_argument("--eps-clip", type=float, default=0.2)
    training.add_argument("--eps-clip-high", type=float, help="(default: --eps-clip)")
    training.add_argument("--entropy-coef", type=float, default=0.0)
    training.add_argument("--use-kl-loss", action="store_true", help="towards the weights at the start")
    training.add_argument("--kl-loss-coef", type=float, default=0.0)
    training.add_argument(
        "--disable-grpo-std-normalization", action="store_false", dest="grpo_std_normalization", help=argparse.SUPPRESS
    )
    training.add_argument("--use-rollout-routing-replay", action="store_true", help="set by --plugins r3")

    checkpoint = parser.add_argument_group("checkpoints")
    checkpoint.add_argument("--save", type=Path, help="folder for checkpoints")
    checkpoint.add_argument("--save-interval", type=_positive, help="rollouts (default: only the last)")
    checkpoint.add_argument("--load", type=Path, help="folder of --save to go on from, at its latest checkpoint")
    checkpoint.add_argument(
        "--load-with-other-plugins", action="store_true", help="go on although the checkpoint had other plugins"
    )
    return parser


def parse(flags: Sequence[str], plugins: Plugins) -> Namespace:
    """The command line as slime's argument namespace.

    Raises:
        ArgumentError: an unknown flag, with the nearest known one; a flag that argparse refuses.
    """
    parser = _full_parser(plugins)
    added: list[str] = []
    for name, defaults in plugins.ask_each("default_flags", flags=tuple(flags)):
        if unknown := _unknown(parser, defaults):
            raise ArgumentError(
                f"plugin {name} is not for the embedded host",
                {"it sets": " ".join(unknown), "which": "only slime has"},
                "leave it out" + (": this host computes on the CPU by itself" if name == "cpu_rehearsal" else ""),
            )
        added += defaults
    if unknown := _unknown(parser, flags):
        known = sorted(parser._option_string_actions)
        near = {word: "".join(difflib.get_close_matches(word.split("=")[0], known, n=1)) for word in unknown}
        raise ArgumentError(
            "the embedded host does not know " + ", ".join(unknown),
            {word: f"did you mean {match}?" if match else None for word, match in near.items()},
            "`slime-train --embedded --help` shows its flags; it has some of slime's, not all",
        )
    args, _ = parser.parse_known_args([*added, *flags])
    for name, value in FIXED.items():
        setattr(args, name, value)
    return args


def _full_parser(plugins: Plugins) -> argparse.ArgumentParser:
    parser = build_parser()
    for plugin in plugins:
        if plugin.implements("register_arguments"):
            plugins.ask(plugin, "register_arguments", parser=parser.add_argument_group(f"plugin {plugin.name}"))
    return parser


def _unknown(parser: argparse.ArgumentParser, flags: Sequence[str]) -> list[str]:
    return parser.parse_known_args(list(flags))[1]


def baseline_flags(flags: Sequence[str], plugins: Plugins) -> list[str]:
    """The command line for the same run without plugins: without their flags, and without what they set."""
    args, _ = _full_parser(plugins).parse_known_args(list(flags))
    words: list[str] = []
    for action in build_parser()._actions:
        value = getattr(args, action.dest, action.default)
        if action.dest in ("compare", "json", "run_folder", "use_rollout_routing_replay") or value == action.default:
            continue
        words += [action.option_strings[0]] if action.nargs == 0 else [action.option_strings[0], str(value)]
    return words


# -- what argparse cannot say ----------------------------------------------------------------------------------------


def complete(args: Namespace) -> None:
    """Fill what follows from other flags; refuse what cannot work.

    Raises:
        ArgumentError: see the messages.
    """
    if args.run_folder is None:
        args.run_folder = Path("runs") / time.strftime("embedded-%Y%m%d-%H%M%S")
    for name in ("run_folder", "hf_checkpoint", "prompt_data", "save", "load"):
        if (path := getattr(args, name)) is not None:
            setattr(args, name, path.expanduser().absolute())
    if args.rollout_seed is None:
        args.rollout_seed = args.seed
    if args.eps_clip_high is None:
        args.eps_clip_high = args.eps_clip
    samples = args.rollout_batch_size * args.n_samples_per_prompt
    if args.global_batch_size is None:
        args.global_batch_size = samples
    if samples % args.global_batch_size:
        raise ArgumentError(
            f"--global-batch-size {args.global_batch_size} does not divide a rollout",
            {"a rollout": f"{args.rollout_batch_size} prompts x {args.n_samples_per_prompt} = {samples} samples"},
        )
    if args.n_samples_per_prompt < 2:
        raise ArgumentError(
            "with one sample a prompt every advantage is zero",
            {"--n-samples-per-prompt": args.n_samples_per_prompt},
            "give at least 2: GRPO compares the samples of a group",
        )
    if args.rollout_temperature <= 0:
        raise ArgumentError(
            "without chance every sample of a group is the same, and nothing is learnt",
            {"--rollout-temperature": args.rollout_temperature},
            "give a temperature above 0",
        )
    if args.threads > (cores := len(os.sched_getaffinity(0))):
        raise ArgumentError(f"--threads {args.threads}: there are {cores} cores here")
    if args.compare and (args.save or args.load):
        raise ArgumentError("--compare runs twice from the start", next="leave --save and --load out")
