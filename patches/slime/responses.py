"""A response of the engine becomes part of a sample (hook: receive_response)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_plugins.activation import current
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch


def apply_meta_info(
    original: Callable[..., Any], self: Any, args: Any, meta_info: dict[str, Any], **kwargs: Any
) -> Any:
    if meta_info:  # tokens that no engine generated, a tool's, come without
        current().hook.receive_response(args=args, sample=self, meta_info=meta_info)
    return original(self, args, meta_info, **kwargs)


SEAMS = (
    Seam(
        name="responses",
        hooks=("receive_response",),
        patches=(
            Patch(
                id="slime.response.received",
                target="slime.utils.types:Sample._apply_meta_info",
                wrap=apply_meta_info,
                signature="(self, args, meta_info, *, new_token_count=0, pad_missing_top_p=False, "
                "update_terminal_info=True)",
                roles=frozenset({"rollout_manager"}),
                reason="slime keeps of a response only what it knows, and expects routing as int32 of all layers",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/utils/types.py",
                retire_when="slime lets a plugin read a response",
            ),
        ),
    ),
)
