"""Read access to SGLang's record of expert routing; nothing is changed."""

from __future__ import annotations

from typing import Any


def capturer() -> Any | None:
    """The scheduler's routed-experts capturer, with `num_layers` and `topk_size`; None when it records nothing."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    return get_global_experts_capturer()
