"""slime's RolloutManager: report, probe the engines before the first rollout, and see the training data.

`RolloutManager` carries `@ray.remote`, so Ray pickles it by value from the driver and a patched method would be lost or
would drag the driver's module globals along. An importable subclass is pickled by reference instead, and its base is
resolved in the worker, where our patches are active.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from miles_plugins import attestation
from miles_plugins.activation import current
from miles_plugins.patches.seam import Seam
from miles_plugins.patches.slime.shared_data import split_train_data
from miles_plugins.patching import Patch


def _subclass(base: type) -> type:
    class RolloutManager(base):  # type: ignore[misc]
        """slime's RolloutManager, calling the plugins' hooks."""

        def __init__(self, args: Any, pg: Any) -> None:
            activation = current()
            activation.role = "rollout_manager"
            super().__init__(args, pg)
            server = self._get_updatable_server()  # frozen models beside it are not trained on
            if server is not None and server.engines:
                activation.hook.rollout_ready(
                    args=args,
                    router_url=f"http://{server.router_ip}:{server.router_port}",
                    engine_urls=_urls(server.engines),
                )
            engines = sum(len(server.all_engines) for server in self.servers.values())
            attestation.send(activation.run, [{**activation.report(), "engines": engines}])

        def _convert_samples_to_train_data(self, samples: Sequence[Any]) -> dict[str, Any]:
            hook = current().hook
            hook.receive_samples(args=self.args, samples=samples)
            train_data: dict[str, Any] = super()._convert_samples_to_train_data(samples)
            hook.collect_train_data(args=self.args, samples=samples, train_data=train_data)
            return train_data

        def _split_train_data_by_dp(self, data: dict[str, Any]) -> Any:
            original = super()._split_train_data_by_dp
            plugins = current().plugins
            if not (plugins.implement("share_train_data") or plugins.implement("receive_train_data")):
                return original(data)
            return split_train_data(lambda: original(data), self.args)

    RolloutManager.__module__ = __name__
    RolloutManager.__qualname__ = "RolloutManager"
    return RolloutManager


def _urls(engines: Sequence[Any]) -> list[str]:
    import ray

    return [url for url in ray.get([engine.get_url.remote() for engine in engines]) if url is not None]


def with_hooks(original: Any) -> Any:
    """The Ray actor class of our subclass."""
    import ray

    globals()["RolloutManager"] = _subclass(original.__ray_metadata__.modified_class.__ray_actor_class__)
    return ray.remote(globals()["RolloutManager"])


def __getattr__(name: str) -> Any:
    # Unpickling by reference asks for the class in a worker that has not imported slime's module yet.
    if name == "RolloutManager":
        import importlib

        importlib.import_module("slime.ray.rollout")  # the patch below runs at its end
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


SEAMS = (
    Seam(
        name="rollout manager",
        hooks=(),
        patches=(
            Patch(
                id="slime.rollout-manager.hooks",
                target="slime.ray.rollout:RolloutManager",
                replace_with=with_hooks,
                roles=frozenset({"rollout_manager"}),
                reason="its methods are pickled by value from the driver, where wrappers are lost",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/ray/rollout.py",
                retire_when="slime takes the RolloutManager class from an argument, as it does the trainer's",
            ),
        ),
    ),
)
