"""A response of the engine becomes part of a sample (hook: receive_response)."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from miles_plugins.activation import current
from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patching import Patch, has_attribute


def apply_meta_info(
    original: Callable[..., Any], self: Any, args: Any, meta_info: dict[str, Any], **kwargs: Any
) -> Any:
    if meta_info:  # tokens that no engine generated, a tool's, come without
        current().hook.receive_response(args=args, sample=self, meta_info=meta_info)
    return original(self, args, meta_info, **kwargs)


# -- slime before v0.3.1: `generate` reads the response itself ---------------------------------------------------------

_WITHHELD = ("routed_experts",)  # what slime would read, in a format of its own
_received: ContextVar[list[dict[str, Any]] | None] = ContextVar("received", default=None)  # by the generate that runs
_streamed: ContextVar[list[dict[str, Any]] | None] = ContextVar("streamed", default=None)  # likewise, chunk by chunk


async def post(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Keep what the engine says of a response, and withhold from slime what plugins read in its place."""
    output = await original(*args, **kwargs)
    received = _received.get()
    if received is None or not isinstance(output, dict) or "meta_info" not in output:
        return output  # of somebody else's request
    meta_info = output["meta_info"]
    received.append(dict(meta_info))
    return {**output, "meta_info": {name: value for name, value in meta_info.items() if name not in _WITHHELD}}


async def generate(original: Callable[..., Any], args: Any, sample: Any, sampling_params: Any) -> Any:
    """One request for one sample: its tokens hold the response when slime's function is done with it."""
    return await _into(_received, original, args, sample, sampling_params)


def last_chunk(original: Callable[..., Any], meta: dict[str, Any]) -> Any:
    """slime describes the end of a streamed response, by its last chunk's `meta_info`, just before it reads that."""
    attributes = original(meta)
    if (streamed := _streamed.get()) is not None:
        streamed.append(dict(meta))
        for name in _WITHHELD:
            meta.pop(name, None)
    return attributes


async def generate_streaming(original: Callable[..., Any], args: Any, sample: Any, sampling_params: Any) -> Any:
    """As `generate`; slime reads the chunks by itself, without `post`."""
    return await _into(_streamed, original, args, sample, sampling_params)


async def _into(
    kept: ContextVar[list[dict[str, Any]] | None],
    original: Callable[..., Any],
    args: Any,
    sample: Any,
    sampling_params: Any,
) -> Any:
    received: list[dict[str, Any]] = []
    token = kept.set(received)
    try:
        sample = await original(args, sample, sampling_params)
    finally:
        kept.reset(token)
    for meta_info in received:
        current().hook.receive_response(args=args, sample=sample, meta_info=meta_info)
    return sample


_BEFORE = (
    Patch(
        id="slime.response.posted",
        target="slime.utils.http_utils:post",
        wrap=post,
        roles=frozenset({"rollout_manager"}),
        reason="slime expects routing as int32 of all layers",
        upstream="https://github.com/THUDM/slime/blob/v0.3.0/slime/utils/http_utils.py",
        retire_when="slime before v0.3.1 is no longer supported",
    ),
    Patch(
        id="slime.response.generated",
        target="slime.rollout.sglang_rollout:generate",
        wrap=generate,
        signature="(args, sample, sampling_params)",
        roles=frozenset({"rollout_manager"}),
        reason="slime keeps of a response only what it knows",
        upstream="https://github.com/THUDM/slime/blob/v0.3.0/slime/rollout/sglang_rollout.py",
        retire_when="slime before v0.3.1 is no longer supported",
    ),
)

_STREAMING = "slime.rollout.sglang_streaming_rollout"
_STREAMED = (
    Patch(
        id="slime.response.last-chunk",
        target="slime.utils.trace_utils:build_sglang_meta_trace_attrs",
        wrap=last_chunk,
        signature="(meta)",
        roles=frozenset({"rollout_manager"}),
        reason="the streaming rollout reads its response line by line, and expects routing as int32 of all layers",
        upstream="https://github.com/THUDM/slime/blob/v0.3.0/slime/utils/trace_utils.py",
        retire_when="slime before v0.3.1 is no longer supported",
    ),
    Patch(
        id="slime.response.streamed",
        target=f"{_STREAMING}:generate_streaming",
        wrap=generate_streaming,
        signature="(args, sample, sampling_params)",  # no role must have it: it is imported where a flag names it
        reason="slime keeps of a response only what it knows",
        upstream="https://github.com/THUDM/slime/blob/v0.3.0/slime/rollout/sglang_streaming_rollout.py",
        retire_when="slime before v0.3.1 is no longer supported",
    ),
)
_READS_ITSELF = (has_attribute("slime.utils.types:Sample.update_from_meta_info"),)
_READS_LATER = (has_attribute("slime.utils.types:Sample.append_response_tokens"),)
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
        variants=(
            Variant(
                "slime v0.3.0",
                (*_BEFORE, *_STREAMED),
                has=(*_READS_ITSELF, has_attribute(_STREAMING)),
                lacks=_READS_LATER,
            ),
            Variant(
                "slime before v0.3.0",
                _BEFORE,
                has=_READS_ITSELF,
                lacks=(*_READS_LATER, has_attribute(_STREAMING)),
            ),
        ),
    ),
)
