"""What of FP8 depends on the release of slime, Megatron-LM, SGLang and torch; found in their files, None: unknown."""

from __future__ import annotations

import re

from miles_plugins.compat.source import text_of

_SLIME = "slime.backends.megatron_utils"


def sets_variable(name: str) -> bool | None:
    """Whether slime sets this variable of its actors to "1" whatever the shell says (v0.2.0 and v0.2.1)."""
    actors = text_of("slime.ray.actor_group")
    return None if actors is None else f'"{name}": "1"' in actors


def unpacks_saved_scales() -> bool | None:
    """Whether --save-hf writes ue8m0 scales as a checkpoint has them (slime after v0.3.1)."""
    converter = text_of(f"{_SLIME}.megatron_to_hf")
    return None if converter is None else "transform_ue8m0" in converter


def has_blind_metric() -> bool | None:
    """Whether train_rollout_logprob_abs_diff is 0 under --use-rollout-logprobs (slime up to v0.3.0)."""
    loss = text_of(f"{_SLIME}.loss")
    return None if loss is None else "log_probs_to_compare" not in loss


def delta_leaves_tensors_out() -> bool | None:
    """Whether --update-weight-mode delta sends only what changed (v0.3.0), and not files of whole tensors (v0.3.1)."""
    if text_of("slime.ray.actor_group") is None:
        return None
    return text_of(f"{_SLIME}.update_weight.update_weight_from_distributed_delta") is not None


def has_update_sessions() -> bool | None:
    """Whether SGLang has /begin_weight_update, after which it processes what came (0.5.23)."""
    server = text_of("sglang.srt.entrypoints.http_server")
    return None if server is None else "begin_weight_update" in server


def cuda_version() -> tuple[int, int] | None:
    """Of torch, as (12, 9)."""
    found = re.search(r"^cuda\b.*= '(\d+)\.(\d+)'", text_of("torch.version") or "", re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None
