"""The arguments of an SGLang server (hook: engine_arguments)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_plugins.activation import current
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch


def compute_server_args(original: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    server_args, fields_to_check = original(args, *rest, **kwargs)
    current().hook.engine_arguments(args=args, server_args=server_args)
    return server_args, fields_to_check


SEAMS = (
    Seam(
        name="engine arguments",
        hooks=("engine_arguments",),
        patches=(
            Patch(
                id="slime.engine.arguments",
                target="slime.backends.sglang_utils.sglang_engine:_compute_server_args",
                wrap=compute_server_args,
                roles=frozenset({"engine"}),
                reason="some ServerArgs fields have no --sglang-* flag, or depend on the engine",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/backends/sglang_utils/sglang_engine.py",
                retire_when="slime has a hook for server arguments",
            ),
        ),
    ),
)
