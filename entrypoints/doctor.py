"""`miles-plugins doctor`: what is wrong with this environment, before a GPU is taken.

Each check is a small function that reads metadata and files; none imports torch, Ray, SGLang, Megatron or slime. What
only several machines together can show, such as whether the nodes' clocks agree, is not looked at.
"""

from __future__ import annotations

import ast
import json
import mmap
import os
import re
import shutil
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions, version
from pathlib import Path
from typing import Any
from urllib.request import getproxies_environment, proxy_bypass

import click
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table
from rich.text import Text

import miles_plugins
from miles_plugins.compat.source import find_module, has_package
from miles_plugins.compat.upstream import find_train_script, package_folder, slime_problem
from miles_plugins.errors import PluginError
from miles_plugins.finding import STATUSES, Finding
from miles_plugins.manager import GROUP, OWN_DISTRIBUTION, Plugins
from miles_plugins.patches.megatron.router import IMAGES, ROUTER, UTILS

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
DEVICES = Path("/dev")
SHARED_MEMORY = Path("/dev/shm")
CONTROL_GROUPS = (  # what a container may use: limit, usage, and the line of memory.stat that can be given up at once
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
RAY_LIMIT = 0.95  # of memory, and of the disk: RAY_memory_usage_threshold and RAY_local_fs_capacity_threshold
DOCKER_SHARED_MEMORY = 64 * 2**20  # its default
STYLES = {"problem": "bold red", "note": "yellow", "ok": "green"}
PIPED_WIDTH = 120


# -- upstream ---------------------------------------------------------------------------------------------------------


def slime() -> Finding:
    if problem := slime_problem():
        clone = _clone("SLIME_HOME", "~/slime", "slime/utils/arguments.py")
        advice = clone or f"{problem.next}; without slime: `slime-train --embedded`"
        return Finding("slime", "problem", problem.found, advice)
    return Finding("slime", "ok", f"in {_short(package_folder('slime'))}")


def train_script() -> Finding:
    script = find_train_script(None)
    if script is None:
        found = "no train.py beside slime, in $SLIME_HOME, or in this folder; it is in no wheel"
        return Finding("train script", "problem", found, "set SLIME_HOME to slime's clone, or give --train-script PATH")
    return Finding("train script", "ok", _short(script))


def numpy() -> Finding:
    if not has_package("numpy"):
        return Finding("numpy", "problem", "not installed", 'pip install "numpy<2"')
    found = _version("numpy")
    if not found.startswith("1."):
        return Finding("numpy", "problem", f"{found}; slime asserts 1.x when a trainer starts", 'pip install "numpy<2"')
    return Finding("numpy", "ok", found)


def torch() -> Finding:
    if not has_package("torch"):
        return Finding("torch", "problem", "not installed", "install torch's build for this machine (pytorch.org)")
    cuda, hip = _assigned("torch.version", "cuda"), _assigned("torch.version", "hip")
    build = f"for CUDA {cuda}" if cuda else f"for ROCm {hip}" if hip else "a CPU build"
    found = f"{_assigned('torch.version', '__version__') or _version('torch')}, {build}"
    if NVIDIA_DRIVER.exists() and not cuda:
        found += ", on a machine with an NVIDIA driver"
        return Finding("torch", "problem", found, "install torch's CUDA build: this one cannot use the GPUs")
    return Finding("torch", "ok", found)


def gpu() -> Finding:
    if not NVIDIA_DRIVER.exists():
        without = "without one: `slime-train --embedded`, or the whole stack with `miles-plugins rehearse`"
        return Finding("GPU", "note", "no NVIDIA driver", without)
    devices = sorted(DEVICES.glob("nvidia[0-9]*"))
    if not devices:
        found = f"an NVIDIA driver, and no GPU in {DEVICES}"
        return Finding("GPU", "problem", found, "give the container its GPUs (docker run --gpus all)")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        found = f"{len(devices)} NVIDIA GPUs, and CUDA_VISIBLE_DEVICES hides them all"
        return Finding("GPU", "problem", found, "unset CUDA_VISIBLE_DEVICES: else slime waits for GPUs for ever")
    return Finding("GPU", "ok", f"{len(devices)} NVIDIA; whether they are free is not looked at")


def megatron() -> Finding:
    name, clone = "Megatron", _clone("MEGATRON_HOME", "~/Megatron-LM", "megatron/training/__init__.py")
    clone = clone or "put a clone of NVIDIA's Megatron-LM on PYTHONPATH, at the commit that slime pins"
    core, training = find_module("megatron.core"), find_module("megatron.training")
    if core is None:
        return Finding(name, "problem", "no megatron.core", clone)
    number = ".".join(str(_assigned("megatron.core.package_info", part)) for part in ("MAJOR", "MINOR", "PATCH"))
    found = f"core {number}{_assigned('megatron.core.package_info', 'PRE_RELEASE') or ''} in {_short(core.parents[2])}"
    if training is None:
        return Finding(name, "problem", f"{found}, and no megatron.training: PyPI's megatron-core lacks it", clone)
    if training.parents[2] != core.parents[2]:
        found += f", but megatron.training in {_short(training.parents[2])}"
        return Finding(name, "problem", found, "put the clone first on PYTHONPATH, or uninstall megatron-core")
    return Finding(name, "ok", found)


def megatron_patches() -> Finding:
    """slime's and miles' images have a patched Megatron, which calls back into slime or miles."""
    name = "Megatron's patches"
    text = "".join(file.read_text() for file in map(find_module, (ROUTER, UTILS)) if file)
    called = [module for module in IMAGES if module in text]
    if not called:
        return Finding(name, "ok", "none known: a stock Megatron" if text else "no Megatron to look at")
    found = f"the routing replay of {' and of '.join(sorted({IMAGES[module] for module in called}))}"
    if missing := [module for module in called if find_module(module) is None]:
        found += f"; it imports {', '.join(missing)}, which is not installed"
        return Finding(name, "problem", found, "use that image's own slime or miles, or a stock Megatron-LM")
    return Finding(name, "note", found, "nothing with r3, which keeps it off; leave --use-routing-replay out")


def sglang() -> Finding:
    if not has_package("sglang"):
        return Finding(
            "SGLang", "problem", "not installed", "install the version that slime pins: docs/compatibility.md"
        )
    server = find_module("sglang.srt.entrypoints.http_server")
    if server is None:
        found = f"{_version('sglang')} without a server (sglang.srt)"
        return Finding("SGLang", "problem", found, "install sglang again: a folder of that name may hide it")
    if "/post_process_weights" in server.read_text():  # a route that only slime's docker patch adds
        return Finding("SGLang", "note", f"{_version('sglang')} with slime's docker patch", "nothing: it is recognised")
    return Finding("SGLang", "ok", f"{_version('sglang')}, without slime's docker patch")


def router() -> Finding:
    """The stock router forwards the request fields that it knows; slime's build of it knows `return_routed_experts`."""
    name, init = "sglang-router", find_module("sglang_router")
    if init is None:
        return Finding(name, "problem", "not installed: slime imports it", "pip install sglang-router")
    number = _assigned("sglang_router.version", "__version__") or _version("sglang-router")
    if "slime" in number or any(_contains(file, b"return_routed_experts") for file in init.parent.glob("*.so")):
        return Finding(name, "ok", f"{number}, forwards return_routed_experts")
    found = f"{number} drops the request field return_routed_experts"
    own = "slime's own routing replay needs the router of slime's image"
    return Finding(name, "note", found, f"nothing with r3, which asks inside the engine; {own}")


def ray() -> Finding:
    if not has_package("ray"):
        return Finding("Ray", "problem", "not installed", 'pip install "ray[default]"')
    number = _version("ray")
    if os.environ.get("RAY_ADDRESS", "").startswith("ray://"):
        found = f"{number}; RAY_ADDRESS is a Ray Client address, which carries no setup hook to workers"
        return Finding("Ray", "problem", found, "unset it and run on a node of the cluster, or with `ray job submit`")
    file = find_module("ray._private.runtime_env.setup_hook")
    text = file.read_text() if file else ""
    if "def export_setup_func_module" not in text:
        found = f"{number} takes no setup hook by name, by which plugins reach the workers"
        return Finding("Ray", "problem", found, "install a newer Ray (2.44 or later)")
    # Fixed in 2.55: https://github.com/ray-project/ray/pull/61473 (issue 61350).
    upload = text.partition("def upload_worker_process_setup_hook_if_needed")[2].partition("\ndef ")[0]
    if "WORKER_PROCESS_SETUP_HOOK_ENV_VAR" not in upload:
        found = f"{number} fails when it is given a worker_process_setup_hook a second time (ray issue 61350)"
        advice = "nothing under slime-train --plugins; else give no hook to `ray job submit`, or install Ray 2.55"
        return Finding("Ray", "note", found, advice)
    return Finding("Ray", "ok", number)


# -- this package -----------------------------------------------------------------------------------------------------


def plugin_names() -> Finding:
    """Which distributions register plugins: a name has one, and a distribution one record of itself."""
    name = "plugin names"
    claims: dict[str, set[str]] = defaultdict(set)
    records: dict[str, dict[object, Path]] = defaultdict(dict)
    for each in distributions():
        entries = _plugin_entries(each)
        for plugin, _ in entries:
            claims[plugin].add(_normalized(each.name))
        if entries:
            records[_normalized(each.name)] = {}
    for owner in {OWN_DISTRIBUTION, *records}:
        for each in distributions(name=owner):
            # An editable install has two equal records: the .egg-info beside the code, and the .dist-info.
            records[owner].setdefault((each.version, _plugin_entries(each)), _record(each))
    if OWN_DISTRIBUTION not in records or not claims:
        found = f"{OWN_DISTRIBUTION} is not installed here: no plugin is found"
        return Finding(name, "problem", found, "`pip install -e .` in its clone, with this Python")
    for plugin, owners in sorted(claims.items()):
        if len(owners) > 1:
            found = f"{plugin} is registered by {' and '.join(sorted(owners))}"
            return Finding(name, "problem", found, "uninstall one of them")
    for owner, differing in sorted(records.items()):
        if len(differing) > 1:
            found = f"records of {owner} that differ: {' and '.join(map(_short, differing.values()))}; the first counts"
            advice = f"remove the stale one (an .egg-info of an old checkout, say) and install {owner} again"
            return Finding(name, "problem", found, advice)
    return Finding(name, "ok", ", ".join(sorted(claims)))


def package() -> Finding:
    """RadixArk's miles installs a package that is named miles_plugins, too."""
    name, own = "miles_plugins", Path(miles_plugins.__file__).resolve().parent
    places = {Path(entry, "miles_plugins", "__init__.py").resolve() for entry in sys.path}
    if others := sorted(place.parent for place in places if place.parent != own and place.is_file()):
        found = f"another package of that name in {', '.join(map(_short, others))}; here runs {_short(own)}"
        return Finding(name, "problem", found, "uninstall it, or take it off PYTHONPATH: a worker may import it")
    try:
        files = distribution("miles").files or []
    except PackageNotFoundError:
        files = []
    if any(file.parts[0] == "miles_plugins" for file in files):
        found = f"miles {_version('miles')} installs files of that name, too"
        return Finding(name, "problem", found, "use miles or miles-plugins in an environment, not both")
    return Finding(name, "ok", f"{_version(OWN_DISTRIBUTION)} in {_short(own.parent)}, the only one on the path")


def command() -> Finding:
    script = shutil.which("slime-train")
    if script is None:
        return Finding("slime-train", "note", "not on PATH", f"put {sysconfig.get_path('scripts')} on PATH")
    here = Path(sys.executable).parent
    # Not resolved: in a virtual environment `python` is a link to another's.
    with open(script, "rb") as file:
        interpreters = re.findall(rb"/[^\s\"']*python[\d.]*", file.read(1000).partition(b"\nimport")[0])
    folders = [Path(os.fsdecode(interpreter)).parent for interpreter in interpreters]
    if Path(script).parent != here and here not in folders:
        found = f"PATH has {_short(script)}, of another environment than this Python ({_short(here)})"
        return Finding("slime-train", "problem", found, f"activate one of them, or put {_short(here)} first on PATH")
    return Finding("slime-train", "ok", _short(script))


# -- the machine ------------------------------------------------------------------------------------------------------


def python_path() -> Finding:
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if missing := [entry for entry in entries if not Path(entry).exists()]:
        found = f"does not exist: {', '.join(missing)}"
        return Finding("PYTHONPATH", "problem", found, "correct or remove it: Python passes over it without a word")
    return Finding("PYTHONPATH", "ok", os.pathsep.join(map(_short, entries)) or "not set")


def proxy() -> Finding:
    """Ray's and SGLang's processes speak HTTP with each other; slime sets no_proxy in its own scripts, too."""
    proxies = getproxies_environment()
    loopback = ("127.0.0.1", "localhost")
    diverted = [host for host in loopback if not proxy_bypass(host)]
    named = [f"{scheme}_proxy" for scheme in ("http", "all") if scheme in proxies]
    if named and diverted:
        found = f"{' and '.join(named)} would take requests to {' and '.join(diverted)} away from this machine"
        return Finding("proxy", "problem", found, "export no_proxy=127.0.0.1,localhost and every node's address")
    return Finding("proxy", "ok", f"{' and '.join(named)}, not for this machine" if named else "none")


def clock() -> Finding:
    """A clock in the past: certificates are not valid yet, and caches take old files for new ones."""
    site = Path(sysconfig.get_path("purelib"))
    newest = max((folder.stat().st_mtime for folder in site.glob("*.dist-info")), default=0.0)
    now = time.time()
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    if newest > now + 60:
        found = f"{written}, {(newest - now) / 60:.0f} minutes before packages were installed here"
        return Finding("clock", "problem", found, "set the clock, and let each node follow a time server")
    return Finding("clock", "ok", f"{written}; not compared with other nodes")


def memory() -> Finding:
    total, available = psutil.virtual_memory()[:2]
    if container := _container_memory():
        limit, used = container
        if limit < total:
            total, available = limit, min(available, limit - used)
    found = f"{_gigabytes(available)} of {_gigabytes(total)} free"
    if available < (1 - RAY_LIMIT) * total:
        advice = "end what takes it, or take a larger machine: Ray ends workers at 95 %"
        return Finding("memory", "problem", found, advice)
    return Finding("memory", "ok", found)


def shared_memory() -> Finding:
    name = "shared memory"
    if not SHARED_MEMORY.is_dir():
        return Finding(name, "note", f"no {SHARED_MEMORY}", "Ray's object store goes to the disk, which is slow")
    disk = shutil.disk_usage(SHARED_MEMORY)
    found = f"{_gigabytes(disk.free)} of {_gigabytes(disk.total)} free in {SHARED_MEMORY}"
    if disk.total <= DOCKER_SHARED_MEMORY:
        return Finding(name, "problem", f"{found}, Docker's default: NCCL needs more", "docker run --shm-size=16g …")
    # As Ray reckons: 30 % of the memory, at most 200 GB, and at most what is there if that is more than 10 GB.
    wanted = min(0.3 * psutil.virtual_memory().available, 200e9, max(10e9, 0.95 * disk.free))
    if wanted > disk.free:
        found += f"; Ray's object store wants {_gigabytes(wanted)} and goes to the disk"
        return Finding(name, "note", found, f"delete files in {SHARED_MEMORY}, or give a container more (--shm-size)")
    return Finding(name, "ok", found)


def temporary_folder() -> Finding:
    """Where Ray keeps its logs, sockets, and objects that do not fit into memory."""
    name = "temporary folder"
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    if not os.access(folder, os.W_OK):
        return Finding(name, "problem", f"{folder} cannot be written", "create it, or correct RAY_TMPDIR or TMPDIR")
    disk = shutil.disk_usage(folder)
    found = f"{_gigabytes(disk.free)} of {_gigabytes(disk.total)} free in {_short(folder)}"
    if disk.free < (1 - RAY_LIMIT) * disk.total:
        advice = "delete files (old sessions in its ray/), or set RAY_TMPDIR: Ray stores no object on a disk 95 % full"
        return Finding(name, "problem", found, advice)
    return Finding(name, "ok", found)


CHECKS: Sequence[Callable[[], Finding]] = (
    slime,
    train_script,
    megatron,
    megatron_patches,
    sglang,
    router,
    ray,
    torch,
    numpy,
    gpu,
    plugin_names,
    package,
    command,
    python_path,
    proxy,
    clock,
    memory,
    shared_memory,
    temporary_folder,
)


# -- what checks share ------------------------------------------------------------------------------------------------


def _short(path: Path | str | None) -> str:
    """A path with ~ for the home folder."""
    text, home = str(path), str(Path.home())
    return "~" + text[len(home) :] if text == home or text.startswith(home + os.sep) else text


def _clone(variable: str, default: str, file: str) -> str:
    """What to do where the clone that `rehearse` takes is there, and this environment does not import it."""
    folder = Path(os.environ.get(variable) or default).expanduser()
    found = (folder / file).is_file()
    return f"put the clone on PYTHONPATH: {_short(folder)} (`rehearse` does so by itself)" if found else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # from a checkout on PYTHONPATH
        return "of unknown version"


def _assigned(module: str, name: str) -> Any:
    """The literal that a module's file assigns to a name; None where there is none."""
    file = find_module(module)
    for node in ast.parse(file.read_text()).body if file else ():
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name in map(ast.unparse, targets):
                return node.value.value
    return None


def _contains(file: Path, text: bytes) -> bool:
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0


def _plugin_entries(found: Distribution) -> frozenset[tuple[str, str]]:
    chosen = found.entry_points.select(group=GROUP)
    return frozenset((entry.name.replace("-", "_"), entry.value) for entry in chosen)


def _normalized(name: str) -> str:
    """A distribution's name as package indexes compare it: two records of one may spell it differently."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _record(found: Distribution) -> Path:
    return Path(getattr(found, "_path", None) or str(found.locate_file("")))


def _container_memory() -> tuple[int, int] | None:
    """What this container may use, and what it uses beyond caches of files; None without a limit."""
    for limit, usage, inactive in CONTROL_GROUPS:
        if not Path(limit).is_file() or not (text := Path(limit).read_text().strip()).isdigit():
            continue
        used = int(Path(usage).read_text())
        cached = re.search(rf"^{inactive} (\d+)$", Path(limit).with_name("memory.stat").read_text(), re.MULTILINE)
        return int(text), used - int(cached[1] if cached else 0)
    return None


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


# -- the command ------------------------------------------------------------------------------------------------------


def findings(names: Sequence[str] = ()) -> list[Finding]:
    """What our checks and those of the named plugins found; a check that fails is a problem by itself."""
    found = [finding for check in CHECKS for finding in _ask(check.__name__.replace("_", " "), lambda: [check()])]  # noqa: B023
    return [*found, *_plugin_findings(names)]


def _plugin_findings(names: Sequence[str]) -> Iterator[Finding]:
    """A plugin's code is imported when it is named, and not because it is installed."""
    try:
        plugins = Plugins.named(names)
    except PluginError as error:
        facts = "".join(f"; {name}: {value}" for name, value in error.facts.items() if value)
        yield Finding("--plugins", "problem", error.message + facts, error.next or "correct --plugins")
        return
    for plugin in plugins:
        yield from _ask(f"{plugin.name}'s checks", lambda: plugins.ask(plugin, "doctor") or [])  # noqa: B023


def _ask(name: str, check: Callable[[], Sequence[Finding]]) -> list[Finding]:
    try:
        answer = list(check())
        if strange := [each for each in answer if not isinstance(each, Finding)]:
            raise TypeError(f"{strange[0]!r} is not a Finding")
    except (Exception, SystemExit) as error:
        found = f"this check failed itself: {type(error).__name__}: {error}"
        return [Finding(name, "problem", found, "please report it; what it looks at is not known to be right")]
    return answer


@click.command()
@click.option("--plugins", "named", multiple=True, metavar="NAME[,NAME…]", help="Run the checks of these plugins, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(named: Sequence[str], as_json: bool) -> None:
    """What is wrong with this environment, and what to do; exits with 1 if a run would fail.

    Looks at files and metadata only: no GPU is taken, nothing is started or changed.
    """
    names = [name.strip() for value in named for name in value.split(",") if name.strip()]
    found = sorted(findings(names), key=lambda finding: STATUSES.index(finding.status))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        console = Console(width=shutil.get_terminal_size((PIPED_WIDTH, 0)).columns, highlight=False)
        with console.capture() as shown:
            console.print(_table(found), _summary(found), sep="\n")
        click.echo("\n".join(line.rstrip() for line in shown.get().splitlines()))  # rich fills lines up with blanks
    sys.exit(any(finding.status == "problem" for finding in found))


def _table(found: Sequence[Finding]) -> Table:
    """Problems first; what is ok in one line each, cut at the edge."""
    table = Table.grid(padding=(0, 2))
    for finding in found:
        cut = {"no_wrap": True, "overflow": "ellipsis"} if finding.status == "ok" else {}
        what = Text(finding.found, **cut)  # type: ignore[arg-type]
        if finding.next:
            what.append(f"\n→ {finding.next}", style="bold" if finding.status == "problem" else "")
        table.add_row(Text(finding.status, style=STYLES[finding.status]), Text(finding.check), what)
    return table


def _summary(found: Sequence[Finding]) -> Text:
    count = {status: sum(finding.status == status for finding in found) for status in STATUSES}
    if not count["problem"]:
        return Text("\nNo problem found.", style="bold")
    return Text(f"\nProblems: {count['problem']}. A run would fail or be wrong until they are solved.", style="bold")
