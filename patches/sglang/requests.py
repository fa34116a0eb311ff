"""Requests as they reach the SGLang server (hook: receive_engine_request)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_plugins.activation import current
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch


def generate_request(original: Callable[..., Any], self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    current().hook.receive_engine_request(server_args=self.server_args, request=obj)
    return original(self, obj, *args, **kwargs)


SEAMS = (
    Seam(
        name="engine requests",
        hooks=("receive_engine_request",),
        patches=(
            Patch(
                id="sglang.request.received",
                target="sglang.srt.managers.tokenizer_manager:TokenizerManager.generate_request",
                wrap=generate_request,
                async_too=True,
                signature="(self, obj, request=None)",
                roles=frozenset({"sglang_server"}),
                reason="sglang-router forwards only the fields it knows",
                upstream="https://github.com/THUDM/slime/blob/v0.2.3/docs/en/advanced/slime-router.md",
                retire_when="sglang-router passes unknown fields on",
            ),
        ),
    ),
)
