"""SGLang's record of expert routing (hook: take_routed_experts, for who replays it must be able to trust it)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch


def capturer() -> Any | None:
    """The scheduler's routed-experts capturer, with `num_layers` and `topk_size`; None when it records nothing."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    return get_global_experts_capturer()


def own_copy(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The slice of one forward pass, kept apart from the buffer that the next one writes into."""
    return original(self, *args, **kwargs).clone()


SEAMS = (
    Seam(
        name="routing record",
        hooks=("take_routed_experts",),
        patches=(
            Patch(
                id="sglang.routing.own-copy",
                target="sglang.srt.state_capturer.routed_experts:RoutedExpertsCapturer._get_local_slice",
                wrap=own_copy,
                roles=frozenset({"sglang_scheduler"}),
                reason="under overlap scheduling a view is copied to the host while the next forward writes to it",
                upstream="https://github.com/sgl-project/sglang/blob/v0.5.15.post1/python/sglang/srt/state_capturer/base.py",
                retire_when="SGLang clones it itself (0.5.23 does)",
            ),
        ),
    ),
)
