"""Whether SGLang really records routing, and whether the record really arrives: asked, not assumed."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from typing import Any

from miles_plugins.errors import PluginError
from miles_plugins.patches.sglang.routing import capturer, switched_off
from miles_plugins.r3_replay import wire
from miles_plugins.r3_replay.trace import Routing

PROMPT = [1, 2, 3, 4, 5]
NEW_TOKENS = 2


def capture_is_on() -> str:
    """Evidence from the scheduler process (sglang_scheduler)."""
    found = capturer()
    if found is None and switched_off():  # were it the trained model's, the request below would come back without
        return "records nothing: switched off for this server"
    if found is None:
        raise PluginError(
            "SGLang does not record routing in this scheduler",
            {"expected": "a routed-experts capturer", "found": "none"},
            "enable_return_routed_experts did not reach the server; look for overrides in --sglang-config",
        )
    return f"records {len(found.layers)} MoE layers x top-{found.topk}, {found.bytes_per_token} bytes a token"


def routing_arrives(routing: Routing, router_url: str, engine_urls: Sequence[str]) -> str:
    """Send one small request to every engine, and one through the router, and check the routing that comes back.

    Raises:
        PluginError: no routing, routing that this side cannot read, or another amount of it than the tokens need.
    """
    for url in [*engine_urls, router_url]:
        _check(routing, url, "the router drops it" if url == router_url else "the engine returns none", _generate(url))
    return f"{routing.bytes_per_token} bytes a token arrive from {len(engine_urls)} engine(s) and through the router"


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


def _check(routing: Routing, url: str, missing: str, answer: dict[str, Any]) -> None:
    text = answer["meta_info"].get("routed_experts")
    if not text:
        raise PluginError(
            f"recorded routing does not arrive: {missing}",
            {
                "asked": f"{url}/generate",
                "expected": f"routing of {len(PROMPT) + NEW_TOKENS - 1} tokens",
                "found": f"none among {sorted(answer['meta_info'])}",
            },
            "check the versions of sglang and sglang-router (docs/compatibility.md)",
        )
    rows = wire.decode(text, f"the answer of {url}")
    routing.check(rows, len(PROMPT) + NEW_TOKENS - 1, f"the probe request to {url}")
