"""slime's engines say where a weight update begins and ends (hooks: receive_weights, after_weight_update).

In every release slime pauses an engine to send it weights, whichever way, and for nothing else. What raises here fails
the trainer's update: generation does not go on with weights of which some are missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_plugins.compat.sglang_weights import BEGIN, END, has_update_sessions
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch


def begin_when_paused(original: Callable[..., Any], self: Any) -> Any:
    result = original(self)
    if self.node_rank == 0:  # through which all nodes of the server are reached
        if has_update_sessions():
            self._make_request("begin_weight_update", {})
        self.check_weights(BEGIN)
    return result


def end_before_continuing(original: Callable[..., Any], self: Any) -> Any:
    if self.node_rank == 0:
        self.check_weights(END)
        if has_update_sessions():
            self._make_request("end_weight_update", {})
    return original(self)


def leave_to_us(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """Nothing: the update's beginning and end do it, on an SGLang without the endpoint of slime's image."""


def _patch(name: str, method: str, wrap: Callable[..., Any], signature: str, reason: str) -> Patch:
    return Patch(
        id=f"slime.weight-update.{name}",
        target=f"slime.backends.sglang_utils.sglang_engine:SGLangEngine.{method}",
        wrap=wrap,
        signature=signature,
        roles=frozenset({"engine"}),
        reason=reason,
        upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/backends/sglang_utils/sglang_engine.py",
        retire_when="slime opens and closes SGLang's weight update sessions itself",
    )


_SILENT = "slime does not tell an engine where an update begins and ends, but by pausing it"
SEAMS = (
    Seam(
        name="weight updates",
        hooks=("receive_weights", "after_weight_update"),
        patches=(
            _patch("begin", "pause_generation", begin_when_paused, "(self)", _SILENT),
            _patch("end", "continue_generation", end_before_continuing, "(self)", _SILENT),
            _patch(
                "post-process",
                "post_process_weights",
                leave_to_us,
                "(self, restore_weights_before_load=False, post_process_quantization=False)",
                "slime asks for an endpoint that only the SGLang of its image has",
            ),
        ),
    ),
)
