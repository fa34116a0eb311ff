"""Activate the plugins in every Ray worker of the job, before any actor's module is imported there.

slime never calls `ray.init`; Ray does, at the first use. Wrapping it covers both that and a user's own call.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

from miles_plugins import attestation
from miles_plugins.activation import ACTIVE, DIGEST, RUN, USER_SETUP_HOOK, current
from miles_plugins.errors import AttestationError, PluginError
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch, has_parameter

SETUP_HOOK = "miles_plugins.entrypoints.ray_worker.setup"
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # how `ray job submit` hands its runtime_env to the driver
_RAY_HOOK_VARIABLE = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"  # Ray has one slot for a setup hook


def init(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`ray.init` with our setup hook; a hook of the user's own runs inside ours."""
    activation = current()
    if activation.role != "driver":
        return original(*args, **kwargs)
    address = next(filter(None, (*args, kwargs.get("address"))), None)
    if str(address or os.environ.get("RAY_ADDRESS", "")).startswith("ray://"):
        raise PluginError(
            "Ray Client cannot carry plugins: its workers take no setup hook",
            {"address": address or os.environ["RAY_ADDRESS"]},
            "run slime-train on a node of the cluster, or through `ray job submit`",
        )
    given = {**getattr(kwargs.get("job_config"), "runtime_env", {}), **(kwargs.get("runtime_env") or {})}
    ours = {**activation.process_environment("worker"), **activation.environment}
    kwargs["runtime_env"] = with_setup_hook(given, ours, activation.user_setup_hook)
    activation.user_setup_hook = kwargs["runtime_env"]["env_vars"].get(USER_SETUP_HOOK)
    context = original(*args, **kwargs)
    activation.registry = attestation.start_registry(activation.run)
    check_nodes()
    return context


def with_setup_hook(
    runtime_env: dict[str, Any], environment: dict[str, str], job_hook: str | None = None
) -> dict[str, Any]:
    """The driver's runtime_env with our hook and variables; the job's own hook is taken out and chained.

    Ray refuses a key that both the job and the driver set, so ours are removed from the job's description.
    """
    runtime_env = dict(runtime_env)
    user_hook = runtime_env.pop("worker_process_setup_hook", None)
    job = json.loads(os.environ.get(_JOB_CONFIG, "null"))
    if job and (job_env := job.get("runtime_env")):
        variables = job_env.get("env_vars", {})
        by_name = job_env.pop("worker_process_setup_hook", None)
        # Ray keeps a hook given as a function under this variable, as a key into its store.
        job_hook = variables.pop(_RAY_HOOK_VARIABLE, None) or by_name or job_hook
        for name in (_RAY_HOOK_VARIABLE, ACTIVE, DIGEST, RUN, USER_SETUP_HOOK):
            variables.pop(name, None)
        os.environ[_JOB_CONFIG] = json.dumps(job)
    user_hook = user_hook or job_hook
    if callable(user_hook):
        raise PluginError(
            "ray.init was given a setup hook that is a function; ours must run beside it",
            {"hook": repr(user_hook)},
            "give it by name instead: worker_process_setup_hook='module.function'",
        )
    variables = {**runtime_env.get("env_vars", {}), **environment}
    if user_hook and user_hook != SETUP_HOOK:
        variables[USER_SETUP_HOOK] = user_hook
    return {**runtime_env, "env_vars": variables, "worker_process_setup_hook": SETUP_HOOK}


def check_nodes(timeout: float = 600) -> None:
    """Start one worker on every node and compare its plugin set with the driver's, before any GPU is taken.

    Raises:
        AttestationError: a node lacks the package, or has another version of it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from miles_plugins.entrypoints.ray_worker import Witness

    expected = current().plugins.digest
    # An actor, not a task: Ray keeps the reason for which an actor's worker died, and forgets a task's.
    witness_class = ray.remote(num_cpus=0, max_restarts=0)(Witness)
    witnesses = {
        node["NodeManagerAddress"]: witness_class.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"]
    }
    for address, witness in witnesses.items():
        try:
            digest = ray.get(witness.digest.remote(), timeout=timeout)
        except ray.exceptions.GetTimeoutError as error:
            raise AttestationError(
                f"no Ray worker started on node {address} within {timeout:.0f} s",
                {"node": address},
                "look at the node's Ray logs; its runtime_env may still be installing",
            ) from error
        except Exception as error:
            raise AttestationError(
                f"the plugins cannot be activated on node {address}",
                {"error": _root_cause(error)},
                "install miles-plugins and the named plugins there, in the environment that Ray's workers use",
            ) from error
        finally:
            ray.kill(witness)
        if digest != expected:
            raise AttestationError(
                f"node {address} runs another plugin set", {"driver": expected, "node": digest}, "install the same"
            )


def _root_cause(error: BaseException) -> str:
    """What the worker's own traceback ends with: Ray wraps it in several of its own."""
    paragraphs = str(error).split("\n\n")
    lines = paragraphs[0].splitlines()
    ends = [number for number, line in enumerate(lines) if re.match(r"[\w.]+Error: ", line)]
    return "\n".join(lines[ends[-1] :]) if ends else f"{type(error).__name__}: {error}"


INIT = "ray._private.worker:init"
SEAMS = (
    Seam(
        name="ray workers",
        hooks=(),
        patches=(
            Patch(
                id="ray.init.setup-hook",
                target=INIT,
                wrap=init,
                needs=tuple(has_parameter(INIT, name) for name in ("address", "job_config", "runtime_env")),
                roles=frozenset({"driver"}),
                reason="slime leaves ray.init to Ray, so nothing else can give its workers a setup hook",
                upstream="https://docs.ray.io/en/latest/ray-core/api/runtime-env.html (worker_process_setup_hook)",
                retire_when="slime starts Ray itself with a runtime_env that a user can extend",
            ),
        ),
    ),
)
