"""Whether SGLang really records routing, and whether the record really arrives: asked, not assumed."""

from __future__ import annotations

import base64
import json
import urllib.request
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from miles_plugins.errors import PluginError
from miles_plugins.patches.sglang.routing import capturer
from miles_plugins.r3_replay.trace import compact, moe_layers

PROMPT = [1, 2, 3, 4, 5]
NEW_TOKENS = 2


def capture_is_on() -> str:
    """Evidence from the scheduler process (sglang_scheduler)."""
    found = capturer()
    if found is None:
        raise PluginError(
            "SGLang does not record routing in this scheduler",
            {"expected": "a routed-experts capturer", "found": "none"},
            "enable_return_routed_experts did not reach the server; look for overrides in --sglang-config",
        )
    return f"records {found.num_layers} layers x top-{found.topk_size}"


def routing_arrives(args: Namespace, router_url: str, engine_urls: Sequence[str]) -> str:
    """Send one small request to every engine, and one through the router, and check the routing that comes back.

    Raises:
        PluginError: no routing, or another amount of it than the tokens need.
    """
    for url in [*engine_urls, router_url]:
        _check(args, url, "the router drops it" if url == router_url else "the engine returns none", _generate(url))
    return f"routing arrives from {len(engine_urls)} engine(s) and through the router"


def _generate(url: str) -> dict[str, Any]:
    # Without asking for routing: that the plugin asks in the server's name is part of what is proved.
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
    }
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the cluster's own traffic takes no proxy
    try:
        with opener.open(request, timeout=300) as response:
            answer: dict[str, Any] = json.load(response)
    except OSError as error:
        raise PluginError(
            "the probe request for recorded routing got no answer",
            {"asked": request.full_url, "error": str(error)},
            "look at the log of the SGLang server, or of the router",
        ) from error
    return answer


def _check(args: Namespace, url: str, missing: str, answer: dict[str, Any]) -> None:
    import torch

    tokens = len(PROMPT) + NEW_TOKENS
    expected = (tokens - 1) * args.num_layers * args.moe_router_topk
    encoded = answer["meta_info"].get("routed_experts")
    ids = torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.int32) if encoded else torch.empty(0)
    if ids.numel() != expected:
        raise PluginError(
            f"recorded routing does not arrive: {'its size is wrong' if ids.numel() else missing}",
            {
                "asked": f"{url}/generate",
                "expected": f"{expected} expert ids for {tokens} tokens",
                "found": ids.numel() or f"none among {sorted(answer['meta_info'])}",
            },
            "check the versions of sglang and sglang-router (docs/compatibility.md)",
        )
    trace = ids.reshape(tokens - 1, args.num_layers, args.moe_router_topk)
    layers = moe_layers(args.num_layers, args.moe_layer_freq)
    compact(trace, tokens, layers, args.moe_router_topk, args.num_experts, f"the probe request to {url}")
