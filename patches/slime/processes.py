"""slime's processes report what they run; training begins, and goes on, only while every one of them is verified."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_plugins import attestation
from miles_plugins.activation import RUN_DIR, current
from miles_plugins.errors import AttestationError, PluginError
from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patching import Patch, has_parameter

logger = logging.getLogger("miles_plugins")

CHILD_PROCESS_FOLDER = Path(__file__).resolve().parents[2] / "entrypoints" / "child_process"


# -- the driver ------------------------------------------------------------------------------------------------------


def verify_before_training(
    original: Callable[..., Any], args: Any, pgs: Any, rollout_manager: Any, *rest: Any, **kwargs: Any
) -> Any:
    """Both sides are up once the training models exist: compare all reports, or stop."""
    import ray

    models = original(args, pgs, rollout_manager, *rest, **kwargs)
    ray.get(rollout_manager.engines_are_up.remote())
    require_all_processes(args)
    return models


def verify_again(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """slime restarts engines when weights are sent: before the next rollout, compare the reports of what is new."""
    import ray

    result = original(self, *args, **kwargs)
    registry = ray.get_actor(attestation.registry_name(current().run))
    if ray.get(registry.changes.remote()) != _compared:
        require_all_processes(self.args, "training does not go on")
    return result


_compared = 0  # how many changes the registry had counted when the driver last compared


def require_all_processes(args: Any, consequence: str = "training does not begin") -> None:
    """Raise unless every process that this run has reported the driver's plugin set, verified."""
    import ray

    global _compared
    activation = current()
    registry = ray.get_actor(attestation.registry_name(activation.run))
    _compared = ray.get(registry.changes.remote())
    reports = [activation.report(), *ray.get(registry.all.remote())]
    if folder := os.environ.get(RUN_DIR):
        write_processes(Path(folder), reports)
    problems = attestation.problems(
        reports,
        activation.plugins.digest,
        expected_processes(args, reports),
        activation.sides,
        activation.needed_patches,
    )
    if problems:
        raise AttestationError(
            f"{consequence}: not every process runs the plugins, verified",
            {str(number): problem for number, problem in enumerate(problems, 1)},
            "the log of the named process says more",
        )
    logger.info(attestation.summary(reports, activation.plugins.digest))


def expected_processes(args: Any, reports: Sequence[attestation.Report]) -> dict[str, int]:
    """How many processes of each role this run has."""
    expected = {"driver": 1, "rollout_manager": 1}
    if not args.debug_rollout_only:
        expected["trainer"] = args.actor_num_nodes * args.actor_num_gpus_per_node * (2 if args.use_critic else 1)
    if engines := sum(report.get("engines", 0) for report in reports):
        expected["engine"] = engines
    return {**expected, **attestation.children_of(reports)}


def write_processes(folder: Path, reports: Sequence[attestation.Report]) -> None:
    """Write the run's processes down; who reads meanwhile sees the earlier file or this one."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "processes.json.partial"
    partial.write_text(json.dumps(reports, indent=1))
    partial.replace(folder / "processes.json")


# -- Ray actors ------------------------------------------------------------------------------------------------------


def report_trainer(original: Callable[..., Any], self: Any, args: Any, role: str, *rest: Any, **kwargs: Any) -> Any:
    activation = current()
    activation.role = "trainer"
    result = original(self, args, role, *rest, **kwargs)
    if args.debug_rollout_only:
        return result  # it has built nothing and will train nothing
    activation.rank = f"{role} {self._rank}"
    attestation.send(activation.run, [activation.report()])
    return result


def report_engine(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Pass on what the processes of this engine's SGLang server say."""
    import ray

    activation = current()
    activation.role = "engine"
    activation.rank = str(self.rank)
    os.environ[attestation.ENGINE] = engine = uuid.uuid4().hex[:12]
    _launched.clear()
    try:
        result = original(self, *args, **kwargs)
    except Exception:
        attestation.read_child_reports(activation.run, engine)  # a child's own error says more than "server died"
        raise
    expected = expected_children(_launched[0]) if _launched else {}
    # The rollout manager knows an engine by its actor's id: one that slime restarts has the rank of the one before.
    whose = {"actor": ray.get_runtime_context().get_actor_id(), "rank": activation.rank}
    own = {**activation.report(), **whose, "children": expected}
    children = [{**child, **whose} for child in wait_for_children(engine, expected)]
    attestation.send(activation.run, [own, *children])
    return result


_launched: list[Any] = []  # the ServerArgs of the server that this engine has launched


def expected_children(server_args: Any) -> dict[str, int]:
    """How many processes of which role one SGLang server starts on this node."""
    if getattr(server_args, "encoder_only", False):
        return {}
    schedulers = max(1, server_args.tp_size * server_args.pp_size // server_args.nnodes)
    if server_args.node_rank > 0:
        return {"sglang_scheduler": schedulers}
    return {"sglang_server": 1, "sglang_scheduler": schedulers, "sglang_detokenizer": 1}


def wait_for_children(engine: str, expected: Mapping[str, int], timeout: float = 1800) -> list[attestation.Report]:
    """The reports of this engine's processes, as many as expected.

    On a server's first node they are there, for the server already answers; elsewhere the model may still be loading.

    Raises:
        AttestationError: one of them stopped, or does not report.
    """
    deadline = time.monotonic() + timeout
    while True:
        reports = attestation.read_child_reports(current().run, engine)
        seen = Counter(report["role"] for report in reports)
        missing = {role: count - seen[role] for role, count in expected.items() if seen[role] < count}
        if not missing:
            attestation.forget_child_reports(current().run, engine)
            return reports
        if time.monotonic() > deadline:
            raise AttestationError(
                "processes of an SGLang server do not report: the plugins have not reached them",
                {role: f"{count} missing" for role, count in missing.items()},
                "look at the log of the server; something else may own PYTHONPATH or sitecustomize there",
            )
        time.sleep(0.2)


def reach_children(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Put our `sitecustomize` first on PYTHONPATH while the server's processes start, and only then."""
    _launched[:] = args[:1]
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


def _patches(models: str, init: str) -> tuple[Patch, ...]:
    """Of one release: the parameters of its `create_training_models` and of its trainer's `init`."""
    return (
        Patch(
            id="slime.driver.verify",
            target="slime.ray.placement_group:create_training_models",
            wrap=verify_before_training,
            signature=models,
            roles=frozenset({"driver"}),
            reason="train.py has no hook between building both sides and the first rollout",
            upstream="https://github.com/THUDM/slime/blob/v0.3.1/train.py",
            retire_when="slime checks its workers' plugins itself",
        ),
        Patch(
            id="slime.driver.verify-again",
            target="slime.ray.actor_group:RayTrainGroup.update_weights",
            wrap=verify_again,
            signature="(self)",
            roles=frozenset({"driver"}),
            reason="train.py has no hook between a restart (--use-fault-tolerance) and the next rollout",
            upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/ray/actor_group.py",
            retire_when="slime checks its workers' plugins itself",
        ),
        Patch(
            id="slime.trainer.report",
            target="slime.backends.megatron_utils.actor:MegatronTrainRayActor.init",
            wrap=report_trainer,
            signature=init,
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
            signature="(server_args)",
            roles=frozenset({"engine"}),
            reason="the server, scheduler and detokenizer are spawned, and no Ray hook reaches them",
            upstream="https://github.com/THUDM/slime/blob/v0.3.1/slime/backends/sglang_utils/sglang_engine.py",
            retire_when="every supported SGLang loads its own plugins (sglang.srt.plugins) in all its processes",
        ),
    )


_MODELS = "slime.ray.placement_group:create_training_models"
_INIT = "slime.backends.megatron_utils.actor:MegatronTrainRayActor.init"
_THREE = "(args, pgs, rollout_manager)"
_BY_ACTOR = has_parameter(_MODELS, "actor_cls")
_TEACHER = has_parameter(_INIT, "with_opd_teacher")
_WITH_TEACHER = "(self, args, role, with_ref=False, with_opd_teacher=False)"
SEAMS = (
    Seam(
        name="processes",
        hooks=(),
        patches=_patches("(args, pgs, rollout_manager, actor_cls=None)", _WITH_TEACHER),
        variants=(
            Variant(
                "slime v0.2.3 to v0.3.0",
                _patches(_THREE, _WITH_TEACHER),
                has=(has_parameter(_MODELS, "rollout_manager"), _TEACHER),
                lacks=(_BY_ACTOR,),
            ),
            Variant(
                "slime v0.2.2",
                _patches(_THREE, "(self, args, role, with_ref=False)"),
                has=(has_parameter(_MODELS, "rollout_manager"), has_parameter(_INIT, "with_ref")),
                lacks=(_BY_ACTOR, _TEACHER),
            ),
        ),
    ),
)
