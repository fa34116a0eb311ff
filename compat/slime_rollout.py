"""What slime's RolloutManager is called with and holds, in the releases that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainedServer:
    """The engines that take the trained weights, and the router in front of them."""

    router_url: str
    engines: Sequence[Any]


def trained_server(manager: Any) -> TrainedServer | None:
    """Of a RolloutManager that has started its engines; None if it started none."""
    if hasattr(manager, "_get_updatable_server"):
        server = manager._get_updatable_server()  # frozen models beside it are not trained on
        if server is None or not server.engines:
            return None
        return TrainedServer(f"http://{server.router_ip}:{server.router_port}", server.engines)
    if not manager.rollout_engines:  # before v0.2.3 there was one server, and its router was in the arguments
        return None
    args = manager.args
    return TrainedServer(f"http://{args.sglang_router_ip}:{args.sglang_router_port}", manager.rollout_engines)


def engine_count(manager: Any) -> int:
    """How many engine actors it has started, frozen models' included."""
    if hasattr(manager, "servers"):
        return sum(len(server.all_engines) for server in manager.servers.values())
    return len(manager.all_rollout_engines)


def engine_url(engine: Any) -> str | None:
    """Where a SGLangEngine's server listens, asked in the engine's own process; its further nodes have none."""
    return f"http://{engine.server_host}:{engine.server_port}" if engine.node_rank == 0 else None
