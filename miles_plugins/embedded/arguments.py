"""The embedded host's command line: slime's flags, as far as this host has them, and a few of its own."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from miles_plugins.cpu_rehearsal import toy_task
from miles_plugins.embedded.generate_request import GREEDY_BELOW
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
    "data_pad_size_multiplier": 128,
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
    "freeze_params_name_list": None,
}

FOLDERS = ("run_folder", "hf_checkpoint", "save", "save_hf", "load", "sglang_speculative_draft_model_path")
DRAFT_FLAGS = (
    *("mtp_num_layers", "enable_mtp_training", "mtp_loss_scaling_factor", "sglang_speculative_algorithm"),
    *("sglang_speculative_num_steps", "sglang_speculative_eagle_topk", "sglang_speculative_num_draft_tokens"),
    "sglang_speculative_draft_model_path",
)


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


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a number in [low, high), or (low, high) if `above`."""

    def number(text: str) -> float:
        value = float(text)
        if not (low < value if above else low <= value) or not value < high:
            limits = f"{'above' if above else 'at least'} {low:g}" + (f" and below {high:g}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    return number


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63")
    return value


class _Help(argparse.HelpFormatter):
    """Defaults where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, argparse.SUPPRESS) and "default" not in (action.help or "")
        return f"{action.help} (default: %(default)s)" if shown else action.help


def build_parser() -> argparse.ArgumentParser:
    """The host's own flags; plugins add theirs."""
    parser = _Parser(
        prog="slime-train --embedded",
        usage="slime-train --embedded [--plugins NAME[,NAME…]] [flags]",
        description="A small GRPO trainer in one process, on the CPU or one GPU: megatron-core's GPTModel as the "
        "policy, transformers' model of the same weights as the rollout engine. It is not slime: it needs none, and "
        "it calls the same plugins (`miles-plugins list` shows them). Flags have slime's names where slime has them.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    count: dict[str, Any] = {"type": _positive, "metavar": "N"}
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR"}

    def number(low: float, high: float = math.inf, *, above: bool = False) -> dict[str, Any]:
        return {"type": _number(low, high, above=above), "metavar": "X"}

    run = parser.add_argument_group("the run").add_argument
    run("--run-folder", **folder, help="new folder for all results (default: runs/embedded-DATE-TIME)")
    run("--compare", action="store_true", help="run twice, without and with the plugins, and compare")
    run("--json", action="store_true", help="print one JSON object instead of tables")
    run("--seed", type=_seed, metavar="N", default=1234, help="of the random model, the prompts and the sampling")
    run("--threads", **count, default=1, help="CPU threads; part of what makes a run repeatable")
    run("--num-rollout", **count, default=60, help="rollouts to train on, counted from the very start")

    model = parser.add_argument_group("the model: a Qwen3-MoE folder, or a tiny random one of this shape").add_argument
    model("--hf-checkpoint", **folder, help="Hugging Face folder; its config.json then says the shape")
    model("--num-layers", **count, help=f"layers (default: {TINY['num_layers']})")
    model("--hidden-size", **count, help=f"width (default: {TINY['hidden_size']})")
    model("--num-experts", **count, help=f"experts a layer (default: {TINY['num_experts']})")
    model("--moe-router-topk", **count, help=f"experts a token (default: {TINY['moe_router_topk']})")
    model("--recompute-granularity", choices=["full"], help="recompute activations in the backward pass")

    task = parser.add_argument_group("the task").add_argument
    task("--prompt-data", type=Path, metavar="FILE", help="JSON lines (default: built-in prompts: answer with digits)")
    task("--input-key", metavar="KEY", help="the prompt's field (default: input)")
    task("--label-key", metavar="KEY", help="the label's field, if there is one (default: none)")
    task(
        "--custom-rm-path",
        metavar="MODULE.FUNCTION",
        default=f"{toy_task.__name__}.reward",
        help="async def reward(args, sample, **kwargs) -> float (default: the share of digits in the answer)",
    )

    rollout = parser.add_argument_group("the rollout").add_argument
    rollout("--rollout-batch-size", **count, default=8, help="prompts a rollout")
    rollout("--n-samples-per-prompt", **count, default=8, help="answers a prompt: a group")
    rollout("--rollout-max-response-len", **count, default=16, help="tokens; longer answers are truncated")
    rollout("--rollout-temperature", **number(GREEDY_BELOW), default=1.0, help="of the sampling")
    rollout("--rollout-shuffle", action="store_true", help="shuffle the prompts in each epoch")
    rollout("--rollout-seed", type=_seed, metavar="N", help="of shuffling and sampling (default: --seed)")

    training = parser.add_argument_group("training").add_argument
    training("--global-batch-size", **count, help="samples an optimizer step (default: one step a rollout)")
    training("--micro-batch-size", **count, default=16, help="samples packed into one forward pass")
    training("--lr", **number(0), default=2e-3, help="learning rate, constant")
    training("--adam-beta1", **number(0, 1), default=0.9, help="decay of the mean")
    training("--adam-beta2", **number(0, 1), default=0.98, help="decay of the mean square")
    training("--adam-eps", **number(0, above=True), default=1e-8, help="of the denominator")
    training("--weight-decay", **number(0), default=0.0, help="of matrices")
    training("--clip-grad", **number(0), default=1.0, help="largest gradient norm; 0: no limit")
    training("--eps-clip", **number(0), default=0.2, help="how far the ratio may fall")
    training("--eps-clip-high", **number(0), help="how far it may rise (default: --eps-clip)")
    training("--entropy-coef", **number(0), default=0.0, help="weight of the entropy bonus")
    training("--use-kl-loss", action="store_true", help="hold the policy near its first weights")
    training("--kl-loss-type", choices=["k1", "k2", "k3", "low_var_kl"], default="k1", help="estimator of that")
    training("--kl-loss-coef", **number(0), default=0.0, help="weight of that")
    training(
        "--disable-grpo-std-normalization",
        action="store_false",
        dest="grpo_std_normalization",
        help="advantages are not divided by their group's standard deviation (default: they are)",
    )
    training("--use-rollout-routing-replay", action="store_true", help="set by --plugins r3")

    draft = parser.add_argument_group("the draft: speculative decoding, and its training with --plugins spec")
    flag = draft.add_argument
    flag("--mtp-num-layers", type=int, choices=[1], help="the policy has a draft (multi-token prediction)")
    flag("--enable-mtp-training", action="store_true", help="and it is trained")
    flag("--mtp-loss-scaling-factor", **number(0), default=0.2, help="weight of the draft's loss, for itself alone")
    flag("--sglang-speculative-algorithm", choices=["EAGLE", "NEXTN"], help="the engine decodes speculatively")
    flag("--sglang-speculative-num-steps", **count, help="tokens proposed before they are verified (default: 3)")
    flag("--sglang-speculative-eagle-topk", **count, help="proposals a step, which here are 1 (default: 1)")
    flag("--sglang-speculative-num-draft-tokens", **count, help="tokens that are verified (default: steps + 1)")
    flag("--sglang-speculative-draft-model-path", **folder, help="where the draft is (default: --hf-checkpoint)")

    checkpoints = parser.add_argument_group("checkpoints").add_argument
    checkpoints("--save", **folder, help="where to save; always after the last rollout")
    checkpoints("--save-interval", **count, help="also after every N rollouts")
    checkpoints("--save-hf", **folder, help="where to save the last weights as a Hugging Face checkpoint")
    checkpoints("--load", **folder, help="a folder of --save, to go on from its latest checkpoint")
    checkpoints(
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
                {"it sets": f"flags that only slime has, {unknown[0]} and others"},
                "leave it out" + (": this host computes on the CPU by itself" if name == "cpu_rehearsal" else ""),
            )
        added += defaults
    if unknown := [word for word in _unknown(parser, flags) if word.startswith("-")] or _unknown(parser, flags):
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
        left_out = (*DRAFT_FLAGS, "compare", "json", "run_folder", "use_rollout_routing_replay")
        if action.dest in left_out or value == action.default:
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
    for name in (*FOLDERS, "prompt_data"):
        if (path := getattr(args, name)) is not None:
            setattr(args, name, path.expanduser().absolute())
    if args.prompt_data is None:
        args.input_key, args.label_key = "text", "label"  # of the built-in task
    args.input_key = args.input_key or "input"
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
    _complete_draft(args, samples)
    if args.threads > (cores := len(os.sched_getaffinity(0))):
        raise ArgumentError(f"--threads {args.threads}: there are {cores} cores here")
    if args.compare and (args.save or args.load):
        raise ArgumentError("--compare runs twice from the start", next="leave --save and --load out")


def _complete_draft(args: Namespace, samples: int) -> None:
    args.sglang_max_running_requests = samples  # the engine decodes a whole rollout at once
    if args.enable_mtp_training and not args.mtp_num_layers:
        raise ArgumentError("--enable-mtp-training: there is no draft to train", next="give --mtp-num-layers 1 as well")
    if args.sglang_speculative_algorithm is None:
        given = [name for name in DRAFT_FLAGS if name.startswith("sglang_") and getattr(args, name) is not None]
        if given:
            raise ArgumentError(
                f"--{given[0].replace('_', '-')} is given, and the engine does not speculate",
                next="give --sglang-speculative-algorithm EAGLE as well",
            )
        return
    args.sglang_speculative_num_steps = steps = args.sglang_speculative_num_steps or 3
    args.sglang_speculative_eagle_topk = topk = args.sglang_speculative_eagle_topk or 1
    args.sglang_speculative_num_draft_tokens = tokens = args.sglang_speculative_num_draft_tokens or steps + 1
    if topk != 1 or tokens != steps + 1:
        raise ArgumentError(
            "the embedded host drafts a chain: one proposal a step",
            {
                "--sglang-speculative-eagle-topk": f"{topk}, expected 1",
                "--sglang-speculative-num-draft-tokens": f"{tokens}, expected {steps + 1}: the steps and one",
            },
            "leave both out",
        )
