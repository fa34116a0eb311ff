"""What cannot work with speculation, or works otherwise than the flags say; found before anything starts.

Most of SGLang's own refusals come when its server starts, after GPUs were taken, and some of what it changes is a line
in a server's log. slime's `--sglang-*` flags are those of the SGLang that is installed, so that which of them there are
tells the releases apart.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles_plugins import ArgumentError, PluginError
from miles_plugins.checkpoints import CONFIG, number_of_layers, read_json, text_config, weight_map
from miles_plugins.compat.slime_drafts import exchanges_halves, logs_each_loss, mtp_names_agree
from miles_plugins.spec_rl.accept import relative_draft_cost
from miles_plugins.spec_rl.halves import EXCHANGED

ADVICE = "change what is named, or leave spec out"
RUNNING = 48  # requests at a time, where SGLang speculates and the flag does not say
OWN = ("EAGLE", "NEXTN")  # whose draft may be the model's own layer, which slime trains
TREES = (*OWN, "EAGLE3", "STANDALONE")  # whose draft is a model that proposes a tree
# Models for which SGLang takes the draft from their own checkpoint if no path is given (0.5.9 to 0.5.23).
FIND_THEMSELVES = (
    *("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM", "Glm4MoeForCausalLM"),
    *("Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM"),
    *("BailingMoeV2_5ForCausalLM", "MistralLarge3ForCausalLM", "PixtralForConditionalGeneration", "HYV3ForCausalLM"),
)
TREE_BACKENDS = ("flashinfer", "fa3")  # that can verify a tree with pages of several tokens
MULTI_LAYER = ("MiMoV2FlashForCausalLM", "Step3p5ForCausalLM")  # for which 0.5.9 turns spec v2 on by itself
PATH = "--sglang-speculative-draft-model-path"
STEPS, TOPK, TOKENS = (f"--sglang-speculative-{name}" for name in ("num-steps", "eagle-topk", "num-draft-tokens"))
THRESHOLDS = ("single", "acc")


def algorithm(args: Namespace) -> str | None:
    """How the engines speculate; None where they do not, or where there are none."""
    found = getattr(args, "sglang_speculative_algorithm", None)
    return str(found).upper() if found else None


def trains(args: Namespace) -> bool:
    return bool(getattr(args, "enable_mtp_training", False))


def is_idle(args: Namespace) -> bool:
    """Whether the trainer has a draft that shall stay as it is."""
    return bool(getattr(args, "mtp_num_layers", None)) and not trains(args)


def draft_is_trained(args: Namespace, algorithm: str) -> bool:
    """Whether the draft of an engine that speculates so follows the trainer: --sglang-config may differ from the flag.

    Not to be asked for weights is right for n-grams as well: SGLang 0.5.12 and 0.5.15 fail when they are.
    """
    return trains(args) and algorithm.upper() in OWN


def model_type(args: Namespace) -> str:
    """Of --hf-checkpoint, which must be a folder."""
    return str(read_json(Path(args.hf_checkpoint) / CONFIG).get("model_type"))


def draft_cost(args: Namespace) -> float | None:
    """What a draft costs a verification pass (`accept.relative_draft_cost`); None where that cannot be told.

    A draft that is another model costs what that does, and without the number of steps SGLang chooses it by itself.
    """
    steps, checkpoint = getattr(args, "sglang_speculative_num_steps", None), Path(args.hf_checkpoint)
    one_layer = algorithm(args) in (*OWN, "EAGLE3") and not getattr(args, "sglang_speculative_adaptive", False)
    if not steps or not one_layer or not (checkpoint / CONFIG).is_file():
        return None
    return relative_draft_cost(steps, number_of_layers(checkpoint))


def check(args: Namespace, environment: Mapping[str, str]) -> None:
    """Raise ArgumentError naming every flag, variable or folder that speaks against it (driver)."""
    reasons = {**_training(args), **_engine(args, environment), **_tree(args), **_folders(args)}
    reasons = {name: reason for name, reason in reasons.items() if reason}
    if reasons:
        raise ArgumentError("spec_rl cannot work with these arguments", reasons, ADVICE)


def check_server(server_args: Any, told: str | None) -> str | None:
    """What an SGLang server is about to do with its draft, one line; None where it has none (sglang_scheduler).

    Its arguments may be other than slime's: --sglang-config changes them for a group of engines. `told` is what its
    engine's actor said of the draft.

    Raises:
        PluginError: it was told nothing, or its own arguments speak against it.
    """
    found = str(getattr(server_args, "speculative_algorithm", None) or "").upper()
    if not found:
        return None
    names = {name: f"speculative_accept_threshold_{name}" for name in THRESHOLDS}
    lossy = {each for each in names.values() if float(getattr(server_args, each, 1.0)) != 1.0}
    forgets = (
        found != "NGRAM"
        and getattr(server_args, "enable_memory_saver", False)
        and not getattr(server_args, "enable_draft_weights_cpu_backup", False)
    )
    reasons = {
        "its draft": _when(told is None, "nobody said whether it is trained: the engine's actor was not patched"),
        **dict.fromkeys(sorted(lossy), "is not 1: drafts that the policy would not sample are accepted"),
        "enable_draft_weights_cpu_backup": _when(
            forgets, "is off: the draft would come back from offloading with any weights"
        ),
    }
    reasons = {name: reason for name, reason in reasons.items() if reason}
    if reasons:
        raise PluginError("an SGLang server cannot speculate as it was started", reasons, "see --sglang-config")
    return f"{found}, the draft is {told}"


def warnings(args: Namespace) -> list[str]:
    """What works, and not as one would think (driver)."""
    speculates, layers = algorithm(args), getattr(args, "mtp_num_layers", None)
    found = []
    if speculates and getattr(args, "sglang_max_running_requests", None) is None:
        found.append(_running(args))
    if trains(args) and not speculates and not getattr(args, "debug_train_only", False):
        found.append(
            "the draft is trained, and no engine uses it: rollouts are as slow as without "
            "(--sglang-speculative-algorithm EAGLE)"
        )
    if layers and not trains(args):
        found.append(
            f"--mtp-num-layers {layers} without --enable-mtp-training: the draft is loaded into the trainer, and stays "
            "as it is"
        )
    if speculates and speculates != "NGRAM" and not trains(args):
        found.append("the draft is frozen: the policy moves away from it, and less of what it proposes is accepted")
    return found


def _running(args: Namespace) -> str:
    """How far SGLang's number is from what this rollout would run at a time."""
    samples = int(getattr(args, "rollout_batch_size", None) or 0) * int(
        getattr(args, "n_samples_per_prompt", None) or 1
    )
    gpus, each = (int(getattr(args, name, None) or 0) for name in ("rollout_num_gpus", "rollout_num_gpus_per_engine"))
    engines = max(gpus // each, 1) if gpus and each else 1
    wanted = min(-(-samples // engines), int(getattr(args, "sglang_server_concurrency", None) or 512))
    advice = f"--sglang-max-running-requests {wanted}" if wanted > RUNNING else "--sglang-max-running-requests"
    return (
        f"with speculation SGLang runs at most {RUNNING} requests at a time on an engine, where the flag does not say"
        + (f"; this run sends up to {wanted}" if wanted > RUNNING else "")
        + f": set {advice} to what its memory holds"
    )


# -- reasons ---------------------------------------------------------------------------------------------------------

Reasons = dict[str, str | None]


def _when(condition: object, reason: str) -> str | None:
    return reason if condition else None


def _training(args: Namespace) -> Reasons:
    layers, speculates = getattr(args, "mtp_num_layers", None), algorithm(args)
    return {
        "--enable-mtp-training": _when(
            trains(args) and not layers, "without --mtp-num-layers there is no draft to train"
        ),
        "--mtp-num-layers": _when(
            layers and mtp_names_agree() is False,
            "this slime does not know the names that this Megatron gives a draft's layers (mtp_model_layer): take the "
            "Megatron of slime's image",
        )
        or _frozen(args)
        or _when(
            trains(args) and layers and layers > 1 and logs_each_loss() is False,
            f"{layers}: this slime logs one draft loss, and fails at more (its main logs each)",
        ),
        "--hf-checkpoint": _checkpoint(args),
        "--use-critic": _when(
            layers and getattr(args, "use_critic", False) and getattr(args, "overlap_grad_reduce", False),
            "the critic has a draft too, which gives no gradient, and --overlap-grad-reduce waits for one: leave one "
            "of the two out",
        ),
        "--allgather-cp": _when(
            trains(args) and getattr(args, "allgather_cp", False),
            "not proved: a draft was trained with samples that are cut each by itself (zigzag), slime's default; leave "
            "it out",
        ),
        "--overlap-moe-expert-parallel-comm": _when(
            layers and getattr(args, "overlap_moe_expert_parallel_comm", False),
            "that schedule (combined 1F1B) computes the model piece by piece, without its draft: leave it out",
        ),
        "--sglang-speculative-algorithm": _when(
            trains(args) and speculates and speculates not in OWN,
            f"{speculates}: its draft is not the model's own, which --enable-mtp-training trains; take EAGLE",
        ),
        "--rollout-external": _when(
            trains(args) and speculates and getattr(args, "rollout_external", False),
            "an engine that was started elsewhere is not told that its draft is trained",
        ),
    }


def _checkpoint(args: Namespace) -> str | None:
    """Why a checkpoint does not tell how its draft is trained."""
    folder = getattr(args, "hf_checkpoint", None)
    if not trains(args) or not folder:
        return None
    if not (Path(folder) / CONFIG).is_file():
        return f"no {CONFIG} in {folder}: give the folder of the checkpoint, not its name on a hub"
    if model_type(args) not in EXCHANGED:
        return None
    return _when(
        getattr(args, "megatron_to_hf_mode", "raw") == "bridge",
        "of Qwen3-Next, with --megatron-to-hf-mode bridge: the halves of its draft's input projection are exchanged in "
        "slime's own conversion only; take that (raw)",
    ) or _when(
        exchanges_halves() is False,
        "of Qwen3-Next: this slime does not convert the input projection of its draft, or otherwise than v0.2.3 to "
        "main of 2026-08 do; take one of these",
    )


def _frozen(args: Namespace) -> str | None:
    """Why a draft cannot stay as it is."""
    if not is_idle(args):
        return None
    if not hasattr(args, "freeze_params_name_list"):
        return (
            "this slime (before v0.2.3) cannot keep the draft out of the optimizer, whose weight decay would move it: "
            "give --enable-mtp-training, or leave this out"
        )
    apart = getattr(args, "pipeline_model_parallel_size", 1) > 1 and getattr(
        args, "untie_embeddings_and_output_weights", False
    )
    return _when(
        apart and getattr(args, "overlap_grad_reduce", False),
        "the last pipeline stage has a copy of the embedding for the draft, and --overlap-grad-reduce waits for its "
        "gradient, which a frozen draft does not give: leave one of the three out, or give --enable-mtp-training",
    )


def _engine(args: Namespace, environment: Mapping[str, str]) -> Reasons:
    if not algorithm(args):
        return {}
    thresholds = {f"--sglang-speculative-accept-threshold-{name}": _threshold(args, name) for name in THRESHOLDS}
    return {
        **thresholds,
        "SGLANG_ENABLE_SPEC_V2": _spec_v2(args, environment),
        "SGLANG_RETURN_ORIGINAL_LOGPROB": _when(
            _is_on(environment, "SGLANG_RETURN_ORIGINAL_LOGPROB"),
            "log-probabilities would not be of the distribution that is sampled",
        ),
        "SGLANG_SIMULATE_ACC_LEN": _when(
            _number(environment.get("SGLANG_SIMULATE_ACC_LEN")) > 0,
            "drafts would be accepted by lot, whatever the policy says of them: for benchmarks only",
        ),
        "--sglang-enable-deterministic-inference": _when(
            getattr(args, "sglang_enable_deterministic_inference", False),
            "which drafts are accepted is drawn from a generator that no seed of a request reaches",
        ),
        "--sglang-enable-draft-weights-cpu-backup": _when(
            algorithm(args) != "NGRAM"
            and getattr(args, "offload_rollout", False)
            and not hasattr(args, "sglang_enable_draft_weights_cpu_backup"),
            "this SGLang has no such flag: a draft would come back from --offload-rollout with any weights",
        ),
    }


def _threshold(args: Namespace, name: str) -> str | None:
    found = getattr(args, f"sglang_speculative_accept_threshold_{name}", None)
    biased = "drafts that the policy would not sample are accepted: rollouts are of another policy; leave it at 1"
    return _when(found is not None and float(found) != 1.0, f"{found}: {biased}")


def _spec_v2(args: Namespace, environment: Mapping[str, str]) -> str | None:
    if hasattr(args, "sglang_speculative_adaptive") or algorithm(args) not in TREES:
        return None  # since 0.5.12 it gives log-probabilities
    by_itself = algorithm(args) in OWN and _architecture(getattr(args, "hf_checkpoint", None)) in MULTI_LAYER
    silent = "its second generation of speculation gives no log-probabilities for decoded tokens"
    if by_itself:
        return f"SGLang turns it on for this model, and {silent}: take SGLang 0.5.12 or later"
    return _when(_is_on(environment, "SGLANG_ENABLE_SPEC_V2"), f"{silent}: unset it, or take SGLang 0.5.12 or later")


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t")


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


# -- the tree of drafts ----------------------------------------------------------------------------------------------


def _tree(args: Namespace) -> Reasons:
    if algorithm(args) not in TREES or getattr(args, "sglang_speculative_adaptive", False):
        return {}
    steps, topk, tokens = (
        getattr(args, f"sglang_speculative_{name}", None) for name in ("num_steps", "eagle_topk", "num_draft_tokens")
    )
    if steps is None:
        return {STEPS: _when(topk is not None or tokens is not None, f"missing: SGLang takes {TOPK} only with it")}
    if topk is None:
        return {TOPK: f"missing: SGLang takes {STEPS} {steps} only with it"}
    if steps < 1 or topk < 1:
        return {
            STEPS: _when(steps < 1, f"{steps}: nothing is drafted"),
            TOPK: _when(topk < 1, f"{topk}: as good as none"),
        }
    if topk == 1:
        changed = tokens is not None and tokens != steps + 1
        return {TOKENS: _when(changed, f"{tokens}: with {TOPK} 1, SGLang takes {STEPS} + 1; give {steps + 1}, or none")}
    most = 1 + topk + (steps - 1) * topk**2
    return {TOKENS: _tokens(tokens, most), TOPK: _several(args, topk)}


def _tokens(tokens: int | None, most: int) -> str | None:
    if tokens is None:
        return f"missing: with {TOPK} above 1 SGLang does not choose it"
    return _when(not 2 <= tokens <= most, f"{tokens}: a tree of this depth and width has 2 to {most}")


def _several(args: Namespace, topk: int) -> str | None:
    """Why SGLang cannot verify several candidates a step."""
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    backends = [found for name in names if (found := getattr(args, f"sglang_{name}", None))]
    if "trtllm_mha" in backends:
        return f"{topk}: trtllm_mha can verify one candidate a step"
    later = ("triton",) if hasattr(args, "sglang_speculative_use_rejection_sampling") else ()  # since 0.5.15
    page, known = getattr(args, "sglang_page_size", None) or 1, (*TREE_BACKENDS, *later)
    backend = getattr(args, "sglang_attention_backend", None)
    return _when(
        page > 1 and backend is not None and backend not in known,
        f"{topk}: with --sglang-page-size {page}, {backend} cannot verify several candidates a step, only "
        f"{', '.join(known)}",
    )


# -- folders ---------------------------------------------------------------------------------------------------------


def _folders(args: Namespace) -> Reasons:
    checkpoint, path = getattr(args, "hf_checkpoint", None), getattr(args, "sglang_speculative_draft_model_path", None)
    if algorithm(args) not in (*TREES, "DFLASH") or not checkpoint or not (Path(checkpoint) / CONFIG).is_file():
        return {}
    if path is None:
        found = algorithm(args) in TREES and _architecture(checkpoint) in FIND_THEMSELVES
        here = f": for the model's own draft give {checkpoint}" if algorithm(args) in OWN else ""
        return {PATH: _own_layers(args, Path(checkpoint)) if found else f"missing{here}"}
    if not (Path(path) / CONFIG).is_file():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not Path(path).parent.is_dir()
        return {PATH: _when(not hub, f"no {CONFIG} in {path}")}
    return {PATH: _misfit(args, Path(checkpoint), Path(path))}


def _misfit(args: Namespace, checkpoint: Path, folder: Path) -> str | None:
    """Why the draft in a folder is none for the model in another; the first reason only."""
    target, draft = (text_config(read_json(each / CONFIG)) for each in (checkpoint, folder))
    theirs, ours = draft.get("vocab_size"), target.get("vocab_size")
    if theirs != ours:
        return f"its vocabulary has {theirs} tokens, and that of --hf-checkpoint {ours}"
    hidden, wanted = draft.get("target_hidden_size") or draft.get("hidden_size"), target.get("hidden_size")
    if algorithm(args) in (*OWN, "EAGLE3") and hidden != wanted:
        return f"it is made for hidden states of {hidden}, and those of --hf-checkpoint have {wanted}"
    same = _architecture(folder) == _architecture(checkpoint)
    if trains(args) and not same:
        return (
            f"it is a {_architecture(folder)}, and what is trained is the draft of a {_architecture(checkpoint)}: give "
            f"{checkpoint}, or leave out --enable-mtp-training"
        )
    return _own_layers(args, folder) if same and algorithm(args) in OWN else None


def _own_layers(args: Namespace, folder: Path) -> str | None:
    """Why a model's own checkpoint has no draft: SGLang fills layers that it does not find with anything."""
    try:
        names, layers = weight_map(folder), number_of_layers(folder)
    except PluginError:
        return None  # another format: SGLang can read it, and we cannot
    drafts = {found for name in names if (found := draft_layer(name, layers)) is not None}
    trained = getattr(args, "mtp_num_layers", None)
    if not drafts:
        return f"{folder} has no draft layer (multi-token prediction): SGLang would draft with random weights"
    return _when(
        trains(args) and trained and trained > len(drafts),
        f"{folder} has {len(drafts)} draft layer(s), and --mtp-num-layers is {trained}",
    )


def draft_layer(name: str, layers: int) -> int | None:
    """Which draft layer a tensor of a checkpoint is in; None for the rest of a model that has so many layers."""
    if found := re.search(r"(?:^|\.)mtp[._]layers\.(\d+)\.", name):  # Qwen's, MiMo's
        return int(found[1])
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    number = int(found[1]) - layers if found else -1  # DeepSeek's and GLM's come after the others
    return number if number >= 0 else None


def _architecture(folder: str | Path | None) -> str | None:
    if folder is None or not (Path(folder) / CONFIG).is_file():
        return None
    found: Any = read_json(Path(folder) / CONFIG).get("architectures")
    return str(found[0]) if found else None
