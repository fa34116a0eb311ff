"""Every process says what it runs; the driver lets training begin only when all of it is there and verified.

A feature on one side alone is worse than off: wrong numbers under a log line that says it is on. So each process
reports its plugins, their digest, the state of every patch and the plugins' own evidence. Ray actors report to one
named actor; SGLang's processes, which are not Ray's, leave a file that their parent, slime's engine actor, passes on.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_plugins.errors import AttestationError, PluginError

ENGINE = "MILES_PLUGINS_ENGINE"  # set by an engine actor for the processes of its SGLang server

Report = dict[str, Any]


# -- Ray actors ------------------------------------------------------------------------------------------------------


class Registry:
    """The named Ray actor that holds the reports of one run: of the processes that it has now."""

    def __init__(self) -> None:
        self._by_actor: dict[tuple[str, str | None], list[Report]] = {}
        self._changes = 0

    def add(self, reports: list[Report]) -> None:
        """Keep what one Ray actor says of itself (the first report) and of its child processes (the others).

        An actor of the same role and rank was there before it, if slime has restarted it: what that one said is dropped
        and `restarts` counts it. slime numbers trainers and engines through the whole run.
        """
        own = reports[0]
        place = own["role"], own["rank"]
        if place in self._by_actor:
            own = {**own, "restarts": self._by_actor[place][0].get("restarts", 0) + 1}
        self._by_actor[place] = [own, *reports[1:]]
        self._changes += 1

    def all(self) -> list[Report]:
        return [report for reports in self._by_actor.values() for report in reports]

    def changes(self) -> int:
        """How often something was added: the driver compares anew when this has changed."""
        return self._changes


def registry_name(run: str) -> str:
    return f"miles_plugins:{run}"


def start_registry(run: str) -> Any:
    """Start the registry (driver, connected to Ray); it ends with the driver's job."""
    import ray

    return ray.remote(Registry).options(name=registry_name(run), num_cpus=0, get_if_exists=True).remote()


def send(run: str, reports: list[Report]) -> None:
    """Report to the driver's registry (any Ray worker of the same job)."""
    import ray

    try:
        registry = ray.get_actor(registry_name(run))
    except ValueError as error:
        raise AttestationError(
            "this process cannot find the registry of its run",
            {"run": run},
            "start training with `slime-train --plugins …`; the driver then starts the registry",
        ) from error
    ray.get(registry.add.remote(reports))


# -- processes that are not Ray's ------------------------------------------------------------------------------------


def folder(run: str) -> Path:
    """Where child processes of this node leave their reports."""
    own = Path(tempfile.gettempdir()) / f"miles-plugins-{os.getuid()}"
    for path in (own, own / run):
        path.mkdir(exist_ok=True, mode=0o700)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise AttestationError(
                f"{path} is not a private folder of this user, so reports there could be forged",
                next="remove it, or set TMPDIR to a folder of your own",
            )
    return own / run


def write_child_report(run: str, report: Report | PluginError) -> None:
    """Leave a report, or the error that ends this process, for the engine actor above it."""
    content = {"error": str(report), "pid": os.getpid()} if isinstance(report, PluginError) else report
    file = folder(run) / f"{os.environ.get(ENGINE, 'none')}-{os.getpid()}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(file)  # readers see a whole report or none


def read_child_reports(run: str, engine: str) -> list[Report]:
    """The reports of one SGLang server's processes.

    Raises:
        AttestationError: one of them ended with an error of this layer.
    """
    reports = [json.loads(file.read_text()) for file in sorted(folder(run).glob(f"{engine}-*.json"))]
    for report in reports:
        if "error" in report:
            raise AttestationError(f"an SGLang process (pid {report['pid']}) stopped: {report['error']}")
    return reports


def forget_child_reports(run: str, engine: str) -> None:
    """Remove the files of one server's processes, once they are passed on.

    The empty folder stays: another engine's process may be about to write into it.
    """
    for file in folder(run).glob(f"{engine}-*"):
        file.unlink(missing_ok=True)


# -- the driver ------------------------------------------------------------------------------------------------------


def problems(
    reports: Iterable[Report],
    digest: str,
    expected: Mapping[str, int],
    sides: Mapping[str, Sequence[str]],
    needed: Mapping[str, Collection[str]] = {},
) -> list[str]:
    """What keeps these processes from being used; empty when all is well.

    Args:
        reports: one a process.
        digest: the driver's; every process must have the same.
        expected: at least how many processes of each role.
        sides: for each plugin, the roles in which it must show evidence.
        needed: for each role, the ids of the patches that it must have.
    """
    reports = list(reports)
    found = []
    seen = Counter(report["role"] for report in reports)
    for role, count in expected.items():
        if seen[role] < count:
            found.append(f"{role}: {seen[role]} of {count} processes reported")
    for report in reports:
        who = f"{report['role']} (pid {report['pid']} on {report['node']})"
        if report["digest"] != digest:
            found.append(f"{who} runs another plugin set: {report['plugins']}, digest {report['digest']} not {digest}")
        for patch in report["patches"]:
            if patch["state"] in ("failed", "applied"):
                found.append(f"{who}: patch {patch['id']} is {patch['state']}: {patch['target']} {patch['detail']}")
        there = {patch["id"] for patch in report["patches"] if patch["state"] not in ("armed", "skipped")}
        for patch_id in sorted(set(needed.get(report["role"], ())) - there):
            found.append(f"{who} runs without patch {patch_id}")
    for plugin, roles in sides.items():
        for role in roles:
            silent = [report for report in reports if report["role"] == role and plugin not in report["probes"]]
            if role in expected and (silent or not seen[role]):
                found.append(f"plugin {plugin} showed no evidence in {len(silent) or 'any'} {role} process(es)")
    return found


def engine_problems(
    reports: Iterable[Report],
    engines: Iterable[str],
    digest: str,
    sides: Mapping[str, Sequence[str]],
    needed: Mapping[str, Collection[str]] = {},
) -> list[str]:
    """What keeps these engines from being used; empty when all is well.

    Args:
        reports: of the run.
        engines: ids of the engines' Ray actors. Each must have reported, and each process of its SGLang server.
        digest: see `problems`; `sides` and `needed` too.
    """
    by_actor: dict[str, list[Report]] = {engine: [] for engine in engines}
    for report in reports:
        by_actor.get(report.get("actor", ""), []).append(report)
    return [
        f"engine actor {engine}: {problem}"
        for engine, own in by_actor.items()
        for problem in problems(own, digest, {"engine": 1, **children_of(own)}, sides, needed)
    ]


def children_of(reports: Iterable[Report]) -> Counter[str]:
    """How many processes of each role the engines' SGLang servers have, as the engines say."""
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update(report.get("children", {}))
    return counts


def summary(reports: Sequence[Report], digest: str) -> str:
    """One line for the log."""
    roles = Counter(report["role"] for report in reports)
    verified = sum(patch["state"] == "verified" for report in reports for patch in report["patches"])
    plugins = ", ".join(f"{name} {version}" for name, version in reports[0]["plugins"].items())
    processes = ", ".join(f"{count} {role}" for role, count in sorted(roles.items()))
    return f"plugins verified: {plugins} [{digest}]; {verified} patches in {len(reports)} processes ({processes})"
