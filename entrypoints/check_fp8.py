"""`miles-plugins check-fp8 <slime flags>`: whether trainer, environment, checkpoint and engine agree on FP8.

Reads flags, variables and files only: no GPU, no Ray, no slime. Of slime's flags it knows those that a rule looks at.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from miles_plugins.entrypoints.patch_table import print_with
from miles_plugins.errors import ArgumentError, PluginError
from miles_plugins.fp8_unified.facts import GPUS, OTHER_LAYERS, capability_of, from_args, look_here
from miles_plugins.fp8_unified.rules import RULES, VARIABLE, VERDICTS, Decision, Facts, judge, needs_post_process

STYLES = {"deny": "bold red", "warn": "yellow", "allow": "green"}
SOURCE = (
    "Costs are differences in percent rms, emulated exactly for Gaussian weights; FP8 itself is 2.65 % from bfloat16."
)

_NUMBERS = (  # flags of slime, Megatron and SGLang that the rules read: with a number, with a word, alone
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
    "--num-layers-at-start-in-bf16",
    "--num-layers-at-end-in-bf16",
    "--num-layers",
    "--hidden-size",
    "--ffn-hidden-size",
    "--num-attention-heads",
    "--num-query-groups",
    "--kv-channels",
    "--q-lora-rank",
    "--kv-lora-rank",
    "--qk-head-dim",
    "--qk-pos-emb-head-dim",
    "--v-head-dim",
    "--num-experts",
    "--moe-ffn-hidden-size",
    "--moe-shared-expert-intermediate-size",
    "--mtp-num-layers",
    "--rollout-num-gpus-per-engine",
    "--sglang-pp-size",
    "--sglang-dp-size",
    "--sglang-moe-dense-tp-size",
)
_WORDS = (
    "--hf-checkpoint",
    "--plugins",
    "--fp8-recipe",
    "--fp4-recipe",
    "--transformer-impl",
    "--te-precision-config-file",
    "--train-env-vars",
    "--moe-layer-freq",
    "--megatron-to-hf-mode",
    "--update-weight-mode",
    "--save-hf",
    "--sglang-moe-runner-backend",
    "--sglang-moe-a2a-backend",
    "--sglang-fp8-gemm-backend",
    "--sglang-kv-cache-dtype",
    "--sglang-quantization",
    "--sglang-device",
    "--sglang-config",
)
_ALONE = (
    "--fp8-param-gather",
    "--first-last-layers-bf16",
    "--fp8-dot-product-attention",
    "--fp8-multi-head-attention",
    "--optimizer-cpu-offload",
    "--multi-latent-attention",
    "--group-query-attention",
    *OTHER_LAYERS.values(),
    "--use-rollout-logprobs",
    "--use-rollout-routing-replay",
    "--check-weight-update-equal",
    "--sglang-enable-dp-attention",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message, next="give slime's flags as the launch script does")


def parse(flags: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What the rules read of a launch script's flags, under the names that slime gives it, and the flags left over.

    Raises ArgumentError for a value that slime would refuse, too.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    for flag in _NUMBERS:
        parser.add_argument(flag, type=int)
    for flag in _WORDS:
        parser.add_argument(flag)
    for flag in _ALONE:
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--fp8-train", choices=("te", "aligned", "off"))
    parser.add_argument("--fp8-format", dest="fp8")
    parser.add_argument("--fp4-format", dest="fp4")
    parser.add_argument("--sglang-ep-size", "--sglang-expert-parallel-size", "--sglang-ep", type=int)
    parser.add_argument("--sglang-moe-dp-size", "--sglang-moe-data-parallel-size", type=int)
    parser.add_argument("--sglang-pipeline-parallel-size", "--sglang-pp", dest="sglang_pp_size", type=int)
    parser.add_argument("--sglang-data-parallel-size", "--sglang-dp", dest="sglang_dp_size", type=int)
    args, rest = parser.parse_known_args(list(flags))
    return args, [flag for flag in rest if flag.startswith("--")]


@click.command(
    "check-fp8",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True},
    epilog=f"GPUs by name: {', '.join(GPUS)}.",
)
@click.option("--gpu", metavar="NAME", help="GPU of trainer and engine, or its compute capability (9.0).")
@click.option("--engine-gpu", metavar="NAME", help="Of the engine, where it is another.")
@click.option(
    "--env", "variables", multiple=True, metavar="NAME=VALUE", help="A variable of the job, as in its runtime_env."
)
@click.option("--all", "show_all", is_flag=True, help="Also show in full what is allowed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[SLIME FLAGS]…")
def check_fp8(
    gpu: str | None,
    engine_gpu: str | None,
    variables: Sequence[str],
    show_all: bool,
    as_json: bool,
    flags: Sequence[str],
) -> None:
    """Whether trainer, environment, checkpoint and engine agree on FP8; exits with 1 if something is denied.

    Give the flags of your launch script; those that do not matter are passed over. --hf-checkpoint is a folder here.
    Nothing is started and no GPU is used. What cannot be seen from here is said.
    """
    try:
        args, unknown = parse(flags)
        facts = _facts(args, gpu, engine_gpu, {**os.environ, **_variables(variables)})
    except PluginError as error:
        raise click.ClickException(str(error)) from error
    decisions = judge(facts)
    if as_json:
        found = {
            "decisions": [asdict(each) for each in decisions],
            "post_process": needs_post_process(facts),
            "ignored": unknown,
        }
        click.echo(json.dumps(found, indent=1))
    else:
        print_with(lambda console: _show(console, decisions, len(unknown), show_all))
    sys.exit(any(each.verdict == "deny" for each in decisions))


def _variables(given: Sequence[str]) -> dict[str, str]:
    pairs = [each.partition("=") for each in given]
    if wrong := [name for name, equals, _ in pairs if not equals or not name]:
        raise ArgumentError("--env takes NAME=VALUE", {"found": wrong[0]}, f"write --env {VARIABLE}=1")
    return {name: value for name, _, value in pairs}


def _facts(args: argparse.Namespace, gpu: str | None, engine_gpu: str | None, environment: dict[str, str]) -> Facts:
    here = look_here()
    if here.transformer_engine == "" and here.capability is None and args.sglang_device != "cpu":
        here = replace(here, transformer_engine=None)  # without a GPU, this is not the machine that will train
    if gpu is not None:
        here = replace(here, capability=_capability(gpu))
    folder = Path(args.hf_checkpoint).expanduser() if args.hf_checkpoint else None
    facts = from_args(args, environment, folder, here)
    if engine_gpu is None:
        return facts
    return replace(facts, engine=replace(facts.engine, capability=_capability(engine_gpu)))


def _capability(name: str) -> int:
    found = capability_of(name)
    if found is None:
        facts = {"found": name, "known": ", ".join(GPUS)}
        raise ArgumentError("this GPU is not known", facts, "give one of these, or its compute capability, such as 9.0")
    return found


# -- what is shown ----------------------------------------------------------------------------------------------------


def _show(console: Console, decisions: Sequence[Decision], unknown: int, show_all: bool) -> None:
    shown = Table.grid(padding=(0, 2))
    for each in decisions:
        cut: dict[str, Any] = {} if show_all or each.verdict != "allow" else {"no_wrap": True, "overflow": "ellipsis"}
        what = Text(each.found, **cut)
        if each.verdict != "allow" or show_all:
            what.append(f"\nexpected  {each.expected}")
        if each.cost:
            what.append(f"\n{each.consequence}")
        if each.next:
            what.append(f"\n→ {each.next}", style="bold" if each.verdict == "deny" else "")
        shown.add_row(Text(each.verdict, style=STYLES[each.verdict]), Text(each.rule), what)
    console.print(Group(shown, Text(""), Text(SOURCE, style="dim"), _summary(decisions, unknown)))


def _summary(decisions: Sequence[Decision], unknown: int) -> Text:
    words = {"deny": "denied", "warn": "with a warning", "allow": "allowed"}
    counts = [(sum(each.verdict == verdict for each in decisions), words[verdict]) for verdict in VERDICTS]
    ignored = f"; {unknown} other flags were passed over" if unknown else ""
    silent = len(RULES) - len({each.rule for each in decisions})
    text = f"{', '.join(f'{count} {word}' for count, word in counts)}; {silent} rules do not apply{ignored}."
    return Text(text, style="bold" if counts[0][0] else "")
