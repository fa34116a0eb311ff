"""slime's processes report what they run, and training begins only when every one of them is verified."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miles_plugins import attestation
from miles_plugins.activation import RUN_DIR, current
from miles_plugins.errors import AttestationError, PluginError
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch

logger = logging.getLogger("miles_plugins")

CHILD_PROCESS_FOLDER = Path(__file__).resolve().parents[2] / "entrypoints" / "child_process"


# -- the driver ------------------------------------------------------------------------------------------------------


def verify_before_training(
    original: Callable[..., Any], args: Any, pgs: Any, rollout_manager: Any, *rest: Any, **kwargs: Any
) -> Any:
    """Both sides are up once the training models exist: compare all reports, or stop."""
    import ray

    models = original(args, pgs, rollout_manager, *rest, **kwargs)
    ray.get(rollout_manager.get_updatable_engines_and_lock.remote())  # waits for its __init__, so for its engines
    require_all_processes(args)
    return models


def require_all_processes(args: Any) -> None:
    """Raise unless every process that this run has reported the driver's plugin set, verified."""
    import ray

    activation = current()
    registry = ray.get_actor(attestation.registry_name(activation.run))
    reports = [activation.report(), *ray.get(registry.all.remote())]
    if folder := os.environ.get(RUN_DIR):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "processes.json").write_text(json.dumps(reports, indent=1))
    engines = sum(report.get("engines", 0) for report in reports)
    expected = {"driver": 1, "rollout_manager": 1}
    if not args.debug_rollout_only:
        expected["trainer"] = args.actor_num_nodes * args.actor_num_gpus_per_node * (2 if args.use_critic else 1)
    if not args.debug_train_only:
        expected |= {"engine": engines, "sglang_server": engines, "sglang_scheduler": engines}
        expected |= {"sglang_detokenizer": engines}
    problems = attestation.problems(
        reports, activation.plugins.digest, expected, {plugin.name: plugin.sides for plugin in activation.plugins}
    )
    if problems:
        raise AttestationError(
            "training does not begin: not every process runs the plugins, verified",
            {str(number): problem for number, problem in enumerate(problems, 1)},
            "the log of the named process says more",
        )
    logger.info(attestation.summary(reports, activation.plugins.digest))


# -- Ray actors ------------------------------------------------------------------------------------------------------


def report_trainer(original: Callable[..., Any], self: Any, args: Any, role: str, *rest: Any, **kwargs: Any) -> Any:
    activation = current()
    activation.role = "trainer"
    result = original(self, args, role, *rest, **kwargs)
    activation.rank = f"{role} {self._rank}"
    attestation.send(activation.run, [activation.report()])
    return result


def report_engine(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Pass on what the processes of this engine's SGLang server say."""
    activation = current()
    activation.role = "engine"
    activation.rank = str(self.rank)
    os.environ[attestation.ENGINE] = engine = uuid.uuid4().hex[:12]
    try:
        result = original(self, *args, **kwargs)
    except Exception:
        attestation.read_child_reports(activation.run, engine)  # a child's own error says more than "server died"
        raise
    children = wait_for_children(engine) if getattr(self, "process", None) else []
    attestation.send(activation.run, [activation.report(), *children])
    return result


def wait_for_children(engine: str, timeout: float = 20) -> list[attestation.Report]:
    """The server answers once its processes are up, so their reports are there or about to be."""
    wanted = {"sglang_server", "sglang_scheduler", "sglang_detokenizer"}
    deadline = time.monotonic() + timeout
    while True:
        reports = attestation.read_child_reports(current().run, engine)
        if wanted <= {report["role"] for report in reports} or time.monotonic() > deadline:
            return reports
        time.sleep(0.2)


def reach_children(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Put our `sitecustomize` first on PYTHONPATH while the server's processes start, and only then."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHILD_PROCESS_FOLDER), before]))
    try:
        return original(*args, **kwargs)
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def report_or_stop(role: str) -> None:
    """A child process reports, or leaves its error and raises."""
    activation = current()
    activation.role = role
    try:
        attestation.write_child_report(activation.run, activation.report())
    except PluginError as error:
        attestation.write_child_report(activation.run, error)
        raise


SEAMS = (
    Seam(
        name="processes",
        hooks=(),
        patches=(
            Patch(
                id="slime.driver.verify",
                target="slime.ray.placement_group:create_training_models",
                wrap=verify_before_training,
                roles=frozenset({"driver"}),
                reason="train.py has no hook between building both sides and the first rollout",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/train.py",
                retire_when="slime checks its workers' plugins itself",
            ),
            Patch(
                id="slime.trainer.report",
                target="slime.backends.megatron_utils.actor:MegatronTrainRayActor.init",
                wrap=report_trainer,
                roles=frozenset({"trainer"}),
                reason="a trainer's patches can be verified only once its modules are loaded and its model is built",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/backends/megatron_utils/actor.py",
                retire_when="slime checks its workers' plugins itself",
            ),
            Patch(
                id="slime.engine.report",
                target="slime.backends.sglang_utils.sglang_engine:SGLangEngine.init",
                wrap=report_engine,
                roles=frozenset({"engine"}),
                reason="no native hook of slime runs in the engine actor",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/backends/sglang_utils/sglang_engine.py",
                retire_when="slime checks its workers' plugins itself",
            ),
            Patch(
                id="slime.engine.reach-children",
                target="slime.backends.sglang_utils.sglang_engine:launch_server_process",
                wrap=reach_children,
                roles=frozenset({"engine"}),
                reason="the server, scheduler and detokenizer are spawned, and no Ray hook reaches them",
                upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/backends/sglang_utils/sglang_engine.py",
                retire_when="every supported SGLang loads its own plugins (sglang.srt.plugins) in all its processes",
            ),
        ),
    ),
)
