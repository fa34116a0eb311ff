"""The probe request for recorded routing, against small HTTP servers of our own."""

from __future__ import annotations

import base64
import json
import struct
import threading
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from miles_plugins import PluginError
from miles_plugins.r3_replay import engine_probe

ARGS = Namespace(num_layers=3, moe_router_topk=2, moe_layer_freq=1, num_experts=4)
WHOLE = (len(engine_probe.PROMPT) + engine_probe.NEW_TOKENS - 1) * ARGS.num_layers * ARGS.moe_router_topk


@pytest.fixture
def serve() -> Iterator[Any]:
    """serve(ids) -> URL of a server whose answers carry that many expert ids; None: no routing; negative: all zero."""
    running: list[HTTPServer] = []

    def start(ids: int | None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/generate"
                assert "return_routed_experts" not in body, "the plugin asks in the server's name"
                routing = struct.pack(
                    f"<{abs(ids or 0)}i", *([0] * -ids if (ids or 0) < 0 else [i % 4 for i in range(ids or 0)])
                )
                meta = {} if ids is None else {"routed_experts": base64.b64encode(routing).decode()}
                answer = json.dumps({"text": "", "meta_info": meta}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: object) -> None: ...

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_routing_from_everywhere_is_evidence(serve: Any) -> None:
    evidence = engine_probe.routing_arrives(ARGS, serve(WHOLE), [serve(WHOLE), serve(WHOLE)])
    assert evidence == "routing arrives from 2 engine(s) and through the router"


@pytest.mark.parametrize(
    ("router", "engine", "message"),
    [
        (None, WHOLE, "the router drops it"),
        (WHOLE, None, "the engine returns none"),
        (WHOLE, WHOLE - 1, "its size is wrong"),
        (WHOLE + 6, WHOLE, "its size is wrong"),
        (WHOLE, -WHOLE, "an expert is named twice"),
    ],
)
def test_missing_or_wrong_routing_stops_the_run(serve: Any, router: int, engine: int, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        engine_probe.routing_arrives(ARGS, serve(router), [serve(engine)])


def test_no_answer_is_an_error_of_ours(serve: Any) -> None:
    with pytest.raises(PluginError, match="got no answer"):
        engine_probe.routing_arrives(ARGS, serve(WHOLE), ["http://127.0.0.1:9"])
