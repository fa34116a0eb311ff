"""The probe request for recorded routing, against small HTTP servers of our own."""

from __future__ import annotations

import base64
import json
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from miles_plugins import PluginError
from miles_plugins.r3_replay import engine_probe, wire
from miles_plugins.r3_replay.trace import Routing

torch = pytest.importorskip("torch")
pytest.importorskip("xxhash")

ROUTING = Routing((0, 1, 2), topk=2, experts=4)
TOKENS = len(engine_probe.PROMPT) + engine_probe.NEW_TOKENS - 1
ROW = [[0, 1], [2, 3], [3, 0]]


def text(rows: int = TOKENS, row: list[list[int]] = ROW) -> str:
    """What an engine with the plugin sends."""
    return wire.encode(torch.tensor([row] * rows, dtype=torch.uint8))


WHOLE = text()
OF_SGLANG = base64.b64encode(struct.pack(f"<{TOKENS * 6}i", *range(TOKENS * 6))).decode()


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """serve(routing) -> URL of a server whose answers carry this as their routing; nothing without an argument."""
    running: list[HTTPServer] = []

    def start(*routing: object) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/generate"
                assert "return_routed_experts" not in body, "the plugin asks in the server's name"
                meta = {"routed_experts": routing[0]} if routing else {}
                answer = json.dumps({"text": "", "meta_info": meta}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: object) -> None: ...

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_routing_from_everywhere_is_evidence(serve: Callable[..., str]) -> None:
    evidence = engine_probe.routing_arrives(ROUTING, serve(WHOLE), [serve(WHOLE), serve(WHOLE)])
    assert evidence == "6 bytes a token arrive from 2 engine(s) and through the router"


WRONG = {
    "none": ((), "{missing}"),
    "null": ((None,), "{missing}"),
    "empty": (("",), "{missing}"),
    "a row too few": ((text(TOKENS - 1),), "its shape is wrong"),
    "a row too many": ((text(TOKENS + 1),), "its shape is wrong"),
    "a layer too many": ((text(row=[*ROW, [1, 2]]),), "its shape is wrong"),
    "zeros": ((text(row=[[0, 0]] * 3),), "an expert is named twice"),
    "an expert that is not there": ((text(row=[[0, 4]] * 3),), "out of range"),
    "an engine without the plugin": ((OF_SGLANG,), "cannot be read"),
    "changed on the way": ((WHOLE[:60] + ("A" if WHOLE[60] != "A" else "B") + WHOLE[61:],), "cannot be read"),
    "a list of numbers": (([1, 2, 3],), "cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("where", ["router", "first engine", "last engine"])
def test_missing_or_wrong_routing_stops_the_run(serve: Callable[..., str], where: str, case: str) -> None:
    routing, message = WRONG[case]
    missing = "the router drops it" if where == "router" else "the engine returns none"
    urls = [serve(*(routing if where == each else (WHOLE,))) for each in ("router", "first engine", "last engine")]
    with pytest.raises(PluginError, match=message.format(missing=missing)) as caught:
        engine_probe.routing_arrives(ROUTING, urls[0], urls[1:])
    url = urls[["router", "first engine", "last engine"].index(where)]
    assert url in str(caught.value)


def test_no_answer_is_an_error_of_ours(serve: Callable[..., str]) -> None:
    with pytest.raises(PluginError, match="got no answer"):
        engine_probe.routing_arrives(ROUTING, serve(WHOLE), ["http://127.0.0.1:9"])


def test_a_server_that_was_told_not_to_record_is_no_failure_but_one_that_lost_its_record_is(monkeypatch) -> None:
    """The reference's servers, in --sglang-config, record nothing; the trained model's must."""
    monkeypatch.setattr(engine_probe, "capturer", lambda: None)
    monkeypatch.setattr(engine_probe, "switched_off", lambda: True)
    assert engine_probe.capture_is_on() == "records nothing: switched off for this server"
    monkeypatch.setattr(engine_probe, "switched_off", lambda: False)
    with pytest.raises(PluginError, match="does not record routing in this scheduler"):
        engine_probe.capture_is_on()
