"""What slime makes of speculative decoding (hooks: draft_is_trained, speculation_counts)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from miles_plugins.activation import current
from miles_plugins.patches.seam import Seam
from miles_plugins.patches.sglang.draft import told
from miles_plugins.patching import Patch


def add(original: Callable[..., Any], self: Any, meta_info: Mapping[str, Any]) -> Any:
    counts = current().hook.speculation_counts(meta_info=meta_info)
    return original(self, meta_info if counts is None else {**meta_info, **counts})


def tell_the_server(original: Callable[..., Any], self: Any, server_args_dict: Mapping[str, Any]) -> Any:
    """slime's server and its schedulers inherit this process's environment when it starts them, and only then."""
    algorithm = server_args_dict.get("speculative_algorithm")
    trained = current().hook.draft_is_trained(args=self.args, algorithm=str(algorithm)) if algorithm else None
    with told(trained):
        return original(self, server_args_dict)


SEAMS = (
    Seam(
        name="speculation counts",
        hooks=("speculation_counts",),
        patches=(
            Patch(
                id="slime.speculation.counts",
                target="slime.utils.types:Sample.SpecInfo.add",
                wrap=add,
                signature="(self, meta_info)",
                roles=frozenset({"rollout_manager"}),
                reason="slime counts by names that SGLang gave up in 0.5.12: its accept rate is 0",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/utils/types.py",
                retire_when="slime counts by SGLang's names",
            ),
        ),
    ),
    Seam(
        name="drafts",
        hooks=("draft_is_trained",),
        patches=(
            Patch(
                id="slime.speculation.engine",
                target="slime.backends.sglang_utils.sglang_engine:SGLangEngine._init_normal",
                wrap=tell_the_server,
                signature="(self, server_args_dict)",
                roles=frozenset({"engine"}),
                reason="a server is not told whether its draft is trained",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/backends/sglang_utils/sglang_engine.py",
                retire_when="slime sends weights to the runners that it selects",
            ),
        ),
    ),
)
