"""What of a draft's training depends on the release of slime and Megatron-LM; found in their files, None: unknown."""

from __future__ import annotations

from miles_plugins.compat.source import text_of


def logs_each_loss() -> bool | None:
    """Whether slime logs the losses of several draft layers; until v0.3.1 it takes there to be one."""
    loop = text_of("slime.backends.megatron_utils.model")
    return None if loop is None else "mtp_losses[" in loop


def exchanges_halves() -> bool | None:
    """Whether slime sends Qwen3-Next's input projection (`eh_proj`) with its halves exchanged, as it does until now."""
    converter = text_of("slime.backends.megatron_utils.megatron_to_hf.qwen3_next")
    return None if converter is None else "torch.cat([second_half, first_half], dim=1)" in converter


def mtp_names_agree() -> bool | None:
    """Whether slime knows the name that Megatron gives an MTP block's layer."""
    megatron = text_of("megatron.core.transformer.multi_token_prediction")
    slime = text_of("slime.backends.megatron_utils.update_weight.common")
    if megatron is None or slime is None:
        return None
    return "mtp_model_layer" not in megatron or "mtp_model_layer" in slime
