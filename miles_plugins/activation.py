"""What happens in one process: which plugins, which role, which patches, and what it reports.

The active set travels to other processes in environment variables. Activation is idempotent; with the variable unset
it costs one dictionary look-up.
"""

from __future__ import annotations

import os
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from miles_plugins.compat.checked import checked
from miles_plugins.errors import AttestationError, PluginError
from miles_plugins.manager import Plugins
from miles_plugins.patches.seam import SLIME, Host, Seam, needed_seams, patch_set
from miles_plugins.patching import State, check_statically

ACTIVE = "MILES_PLUGINS"  # names of the active plugins, comma-separated
DIGEST = "MILES_PLUGINS_DIGEST"  # the driver's digest: every process must compute the same
RUN = "MILES_PLUGINS_RUN"  # identifies one run on a machine shared with others
RUN_DIR = "MILES_PLUGINS_RUN_DIR"  # folder for processes.json, optional
ROLE = "MILES_PLUGINS_ROLE"  # given to processes whose role is known before they start
USER_SETUP_HOOK = "MILES_PLUGINS_USER_SETUP_HOOK"  # a Ray setup hook of the user's own, which ours runs first


class Activation:
    """The plugin layer of this process."""

    def __init__(self, plugins: Plugins, role: str, run: str, host: Host = SLIME) -> None:
        self.plugins = plugins
        self.role = role
        self.run = run
        self.rank: str | None = None
        self.seams: list[Seam] = needed_seams(plugins, host)
        self.patches = patch_set(seam for seam in self.seams if seam.needed_in(role))
        self.probes: dict[str, str] = {}
        self.allowed_flags: tuple[str, ...] = ()  # flags that no parser of slime's knows and that may pass
        self.user_setup_hook: str | None = None  # a Ray setup hook that the job had
        self._user_variables = frozenset(os.environ)
        self.registry: Any = None  # the driver's handle: the actor that collects the reports lives while it is held

    @property
    def hook(self) -> Any:
        """Call a hook of every active plugin: `current().hook.model_built(args=…, model=…, role=…)`."""
        return self.plugins.hook

    @property
    def environment(self) -> dict[str, str]:
        """What another process needs to activate the same set."""
        return {ACTIVE: ",".join(self.plugins.names), DIGEST: self.plugins.digest, RUN: self.run}

    @property
    def sides(self) -> dict[str, Sequence[str]]:
        """The roles in which each plugin must show evidence."""
        return {plugin.name: plugin.sides for plugin in self.plugins}

    @property
    def needed_patches(self) -> dict[str, set[str]]:
        """The ids of the patches that each role must have; the same in every process of the run."""
        needed: dict[str, set[str]] = {}
        for patch in patch_set(self.seams):
            for role in patch.roles:
                needed.setdefault(role, set()).add(patch.id)
        return needed

    def process_environment(self, role: str) -> dict[str, str]:
        """What the plugins want in the environment of one role, without what the user's environment already says."""
        wanted: dict[str, str] = {}
        for _, variables in self.plugins.ask_each("process_environment", role=role):
            wanted |= variables
        return {name: value for name, value in wanted.items() if name not in self._user_variables}

    def check(self) -> list[str]:
        """Check every patch of every process against the installed source, without importing upstream.

        Returns:
            Notes about drift and about packages that are not installed here.

        Raises:
            PatchError: a patch does not fit. Nothing was changed.
        """
        patches = list(patch_set(self.seams))
        declared = [(patch.id, patch.target, patch.signature) for patch in patches]
        return checked(
            (self.plugins.digest, sys.version, declared),
            lambda: [note for patch in patches for note in check_statically(patch)],
        )

    def run_probes(self) -> None:
        """Ask every plugin to show that it works in this process."""
        self.probes.update(self.plugins.ask_each("probe", role=self.role))

    def report(self) -> dict[str, Any]:
        """What this process says of itself; plain data.

        Raises:
            AttestationError: a patch that this role needs is not verified.
        """
        self.run_probes()
        records = list(self.patches.records())
        missing = [
            record
            for record in records
            if self.role in record.patch.roles and record.state not in (State.VERIFIED, State.SUPERSEDED)
        ]
        if missing:
            raise AttestationError(
                f"process {self.role} (pid {os.getpid()}) runs without a patch that it needs",
                {record.patch.id: f"{record.state.value}: {record.patch.target} {record.detail}" for record in missing},
                "the target was never imported here, or another import path holds it; report this with the log",
            )
        return {
            "role": self.role,
            "pid": os.getpid(),
            "rank": self.rank,
            "node": socket.gethostname(),
            "plugins": {plugin.name: plugin.version for plugin in self.plugins},
            "digest": self.plugins.digest,
            "patches": [record.to_dict() for record in records],
            "probes": dict(self.probes),
        }


_current: Activation | None = None


def current() -> Activation:
    """The plugin layer of this process.

    Raises:
        PluginError: this process has none.
    """
    if _current is None:
        raise PluginError("the plugin layer is not active in this process")
    return _current


def is_active() -> bool:
    return _current is not None


def activate(
    names: Sequence[str], role: str, environment: Mapping[str, str] = os.environ, host: Host = SLIME
) -> Activation:
    """Select plugins and arm their patches; the second call in a process returns the first's result.

    Raises:
        PluginError: see `Plugins.named`; also when this node's code is not the driver's.
    """
    global _current
    if _current is not None:
        if set(_current.plugins.names) != set(Plugins.named(names).names):
            raise PluginError(
                "this process already runs another plugin set",
                {"active": ", ".join(_current.plugins.names), "asked for": ", ".join(names)},
                "start a new process",
            )
        return _current
    plugins = Plugins.named(names)
    expected = environment.get(DIGEST)
    if expected is not None and expected != plugins.digest:
        raise PluginError(
            f"the plugins installed on {socket.gethostname()} are not the driver's",
            {
                "driver": expected,
                "here": plugins.digest,
                "plugins": ", ".join(f"{plugin.name} {plugin.version}" for plugin in plugins),
            },
            "install the same versions of miles-plugins and of every plugin on every node",
        )
    _current = Activation(plugins, role, environment.get(RUN) or uuid.uuid4().hex[:12], host)
    try:
        _current.patches.arm()
    except BaseException:
        _current = None
        raise
    return _current


def activate_from_environment(role: str) -> Activation | None:
    """Activate what the parent process asked for; None when it asked for nothing."""
    names = os.environ.get(ACTIVE)
    return activate(names.split(","), role) if names else None
