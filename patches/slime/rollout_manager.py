"""slime's RolloutManager: report, verify and probe the engines before they are used, and see the training data.

`RolloutManager` carries `@ray.remote`, so Ray pickles it by value from the driver and a patched method would be lost or
would drag the driver's module globals along. An importable subclass is pickled by reference instead, and its base is
resolved in the worker, where our patches are active.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from miles_plugins import attestation
from miles_plugins.activation import current
from miles_plugins.compat.slime_rollout import engine_count
from miles_plugins.patches.seam import Seam
from miles_plugins.patches.slime.engines import Engines
from miles_plugins.patches.slime.shared_data import split_train_data
from miles_plugins.patching import Patch, has_attribute


def _subclass(base: type) -> type:
    class RolloutManager(base):  # type: ignore[misc]
        """slime's RolloutManager, calling the plugins' hooks."""

        def __init__(self, args: Any, pg: Any) -> None:
            activation = current()
            activation.role = "rollout_manager"
            super().__init__(args, pg)
            self._engines = Engines(self)
            self._engines.probe()
            attestation.send(activation.run, [{**activation.report(), "engines": engine_count(self)}])

        def engines_are_up(self) -> None:
            """For the driver: an actor answers nothing before its __init__ is done, which waits for the engines."""

        def recover_updatable_engines(self) -> Any:
            recovered = super().recover_updatable_engines()
            self._engines.verify()  # before weights are sent to them
            return recovered

        def recover_rollout_engines(self) -> Any:  # its name before v0.2.3
            recovered = super().recover_rollout_engines()
            self._engines.verify()
            return recovered

        def generate(self, rollout_id: int) -> Any:
            self._engines.probe()
            return super().generate(rollout_id)

        def eval(self, rollout_id: int) -> Any:
            self._engines.probe()
            return super().eval(rollout_id)

        def _convert_samples_to_train_data(self, samples: Sequence[Any]) -> dict[str, Any]:
            hook = current().hook
            hook.receive_samples(args=self.args, samples=samples)
            with _without_routing(samples, hidden=bool(current().plugins.implement("take_routed_experts"))):
                train_data: dict[str, Any] = super()._convert_samples_to_train_data(samples)
            hook.collect_train_data(args=self.args, samples=samples, train_data=train_data)
            return train_data

        def _split_train_data_by_dp(self, data: dict[str, Any], *dp_size: int) -> Any:
            original = super()._split_train_data_by_dp
            plugins = current().plugins
            if not (plugins.implement("share_train_data") or plugins.implement("receive_train_data")):
                return original(data, *dp_size)
            return split_train_data(lambda: original(data, *dp_size), self.args)

    RolloutManager.__module__ = __name__
    RolloutManager.__qualname__ = "RolloutManager"
    return RolloutManager


@contextmanager
def _without_routing(samples: Sequence[Any], hidden: bool) -> Iterator[None]:
    """Whoever takes the routing also in the trainer has it in a format of its own; slime after v0.3.1 reads it here."""
    kept = [sample.rollout_routed_experts for sample in samples] if hidden else []
    for sample, _ in zip(samples, kept, strict=False):
        sample.rollout_routed_experts = None
    try:
        yield
    finally:
        for sample, routing in zip(samples, kept, strict=False):
            sample.rollout_routed_experts = routing


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
                needs=tuple(
                    has_attribute(f"slime.ray.rollout:RolloutManager.{method}")
                    for method in ("_convert_samples_to_train_data", "_split_train_data_by_dp")
                ),
                roles=frozenset({"rollout_manager"}),
                reason="its methods are pickled by value from the driver, where wrappers are lost",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/ray/rollout.py",
                retire_when="slime takes the RolloutManager class from an argument, as it does the trainer's",
            ),
        ),
    ),
)
