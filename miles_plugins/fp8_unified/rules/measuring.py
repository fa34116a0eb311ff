"""Rules: how it is measured."""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles_plugins.fp8_unified.rules.layouts import ue8m0_parts
from miles_plugins.fp8_unified.rules.run import VARIABLE, Facts
from miles_plugins.fp8_unified.rules.table import REFUSED, Answer, allow, deny, rule, warn


@rule("fp8.weight-check", "SGLang's own comparison of weights must know their format", REFUSED)
def _weight_check(facts: Facts) -> Iterator[Answer]:
    if not facts.check_weight_update_equal or facts.checkpoint.method != "fp8-block":
        return
    version = facts.engine.version
    if version is not None and _release(version) < (0, 5, 12) and not ue8m0_parts(facts):
        found = f"--check-weight-update-equal with SGLang {version}, which takes every scale for packed ue8m0"
        yield deny(found, "SGLang 0.5.12 or later", "take the flag out")
    else:
        yield allow("--check-weight-update-equal", "SGLang 0.5.12 or later")


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


@rule("fp8.blind-metric", "slime up to v0.3.0 compares rollout log-probs with themselves", "a metric that is always 0")
def _blind_metric(facts: Facts) -> Iterator[Answer]:
    if not facts.use_rollout_logprobs or not (facts.quantised or facts.trainer.mode != "off"):
        return
    if facts.upstream.blind_metric:
        found = "--use-rollout-logprobs: slime's train_rollout_logprob_abs_diff is exactly 0 in this release"
        next = "read the plugin's own figures, fp8/…, or take slime v0.3.1"
        yield warn(found, "the training forward's log-probs", next)
    elif facts.upstream.blind_metric is False:
        yield allow("--use-rollout-logprobs: slime compares with the training forward", "the training forward")


@rule("fp8.not-visible", "what could not be looked at was not judged", "whatever the rules would have found")
def _not_visible(facts: Facts) -> Iterator[Answer]:
    trainer, engine = facts.trainer, facts.engine
    if not facts.quantised and trainer.mode == "off":
        return
    te, cpu = trainer.mode == "te", engine.device == "cpu"
    unseen = {
        "the trainer's GPU": te and trainer.capability is None,
        "the engine's GPU": not cpu and engine.capability is None,
        "TransformerEngine's version": te and trainer.transformer_engine is None,
        "the CUDA version": te and trainer.recipe == "blockwise" and trainer.cuda is None,
        "the model's sizes": facts.quantised and not facts.model.hidden,
        "the checkpoint's scales": facts.checkpoint.method == "fp8-block" and facts.checkpoint.powers_of_two is None,
        "which modules are quantised": facts.quantised and len(facts.selections) < 2,
        f"whether slime sets {VARIABLE} itself": te
        and trainer.recipe == "blockwise"
        and trainer.fp32_scales_from != "--train-env-vars"
        and facts.upstream.hard_codes_scales is None,
        "what --sglang-config says": engine.config_file,
        "what --te-precision-config-file says": trainer.precision_file,
    }
    names = [name for name, is_unseen in unseen.items() if is_unseen]
    if names:
        next = "run this where slime runs, with --gpu for its GPUs and --hf-checkpoint for the folder"
        yield warn(f"not known: {', '.join(names)}", "everything that decides", next)
