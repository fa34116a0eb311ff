"""The engines of slime's RolloutManager, which may use one only once all its processes are verified.

With --use-fault-tolerance slime kills an engine that answers no health check during a rollout, and starts another in
its place before it next sends weights: a new Ray actor with a new SGLang server, maybe on another node's code.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from miles_plugins import attestation
from miles_plugins.activation import current
from miles_plugins.compat.slime_rollout import engine_url, trained_server
from miles_plugins.errors import AttestationError

logger = logging.getLogger("miles_plugins")


class Engines:
    """Which engines of one RolloutManager were verified, and which were probed by the plugins (rollout_ready)."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._verified: set[str] = set()
        self._probed: set[str] = set()

    def verify(self) -> None:
        """Raise unless the engines that are new since the last call are verified with all their processes."""
        new = {actor_id(engine) for engine in started_engines(self._manager)} - self._verified
        if not new:
            return
        require_engines(sorted(new))
        if self._verified:
            logger.info("plugins verified in %d restarted engine(s)", len(new))
        self._verified |= new

    def probe(self) -> None:
        """Let the plugins probe the engines that are new since the last call, once these take requests.

        After a restart that is only when slime has sent the weights: with --colocate a new engine's memory is released
        until then.
        """
        self.verify()
        server = trained_server(self._manager)
        engines = {actor_id(engine): engine for engine in server.engines if engine is not None} if server else {}
        new = [engine for actor, engine in engines.items() if actor not in self._probed]
        if server is None or not new:
            return
        current().hook.rollout_ready(
            args=self._manager.args, router_url=server.router_url, engine_urls=engine_urls(new)
        )
        self._probed |= set(engines)


def started_engines(manager: Any) -> list[Any]:
    """Every engine actor, frozen models' included; slime puts None in the place of one that it has killed."""
    servers = manager.servers.values() if hasattr(manager, "servers") else None  # before v0.2.3 there was one, unnamed
    groups = [manager.all_rollout_engines] if servers is None else [server.all_engines for server in servers]
    return [engine for group in groups for engine in group if engine is not None]


def actor_id(engine: Any) -> str:
    """What `ray.get_runtime_context().get_actor_id()` is in the engine's own process."""
    return str(engine._actor_id.hex())


def engine_urls(engines: Sequence[Any]) -> list[str]:
    """Where their servers listen; an engine's further nodes have none."""
    import ray

    # slime's own get_url came with v0.2.3.
    return [url for url in ray.get([engine.__ray_call__.remote(engine_url) for engine in engines]) if url is not None]


def require_engines(engines: Sequence[str]) -> None:
    """Raise unless these engine actors, and all processes of their servers, reported the run's plugins, verified."""
    import ray

    activation = current()
    registry = ray.get_actor(attestation.registry_name(activation.run))
    problems = attestation.engine_problems(
        ray.get(registry.all.remote()),
        engines,
        activation.plugins.digest,
        activation.sides,
        activation.needed_patches,
    )
    if problems:
        raise AttestationError(
            "an SGLang engine may not be used: not all of its processes run the plugins, verified",
            {
                "expected": f"the driver's plugin set, digest {activation.plugins.digest}",
                **{f"found {number}": problem for number, problem in enumerate(problems, 1)},
            },
            "the log of the named process says more; install the same code on every node on which slime may restart "
            "an engine, then start the run again from its last checkpoint",
        )
