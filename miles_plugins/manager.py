"""Which plugins exist, which are selected, whether they fit together, and in which order they act.

Discovery reads metadata only: a plugin's code is imported when it is named, not because it is installed.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from miles_plugins import hookspecs
from miles_plugins.errors import PluginConflictError, PluginError, PluginNotFoundError

GROUP = "miles_plugins"
OWN_DISTRIBUTION = "miles-plugins"


@dataclass(frozen=True)
class Installed:
    """A plugin that some distribution provides, not imported yet."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint

    @property
    def short_name(self) -> str:
        """The first word of the name: `r3` for `r3_replay`."""
        return self.name.split("_")[0]


@dataclass(frozen=True)
class Plugin:
    """A selected plugin, imported.

    Its module may declare `REQUIRES` and `CONFLICTS` (names of other plugins) and `SIDES` (the process roles in which
    it must be verified before training begins; a feature of both sides names both).
    """

    installed: Installed
    module: Any

    @property
    def name(self) -> str:
        return self.installed.name

    @property
    def version(self) -> str:
        return self.installed.version

    @property
    def requires(self) -> tuple[str, ...]:
        return self._declared("REQUIRES")

    @property
    def conflicts(self) -> tuple[str, ...]:
        return self._declared("CONFLICTS")

    @property
    def sides(self) -> tuple[str, ...]:
        return self._declared("SIDES")

    def _declared(self, name: str) -> tuple[str, ...]:
        value = getattr(self.module, name, ())
        if isinstance(value, str):
            raise PluginError(
                f"plugin {self.name} declares {name} as a string",
                {"found": repr(value)},
                f"write ({value!r},), a tuple",
            )
        return tuple(value)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.module) or "").partition("\n")[0]

    def implements(self, hook: str) -> bool:
        """Whether it has an implementation of the hook."""
        return any(name == hook for name, _ in hook_implementations(self.module))


def hook_implementations(module: Any) -> Iterator[tuple[str, Any]]:
    """The hooks a plugin module implements: name and function."""
    for name, value in inspect.getmembers(module, callable):
        options = getattr(value, f"{hookspecs.PROJECT}_impl", None)
        if options is not None:
            yield options.get("specname") or name, value


def _misfit(module: Any) -> dict[str, object]:
    """The first hook, or argument of a hook, that a plugin module has and this version does not, with the nearest."""
    known = [name for name, spec in vars(hookspecs).items() if hasattr(spec, f"{hookspecs.PROJECT}_spec")]
    for name, function in hook_implementations(module):
        given, spellings, what = [name], known, "hook"
        if name in known:
            given = list(inspect.signature(function).parameters)
            spellings, what = list(inspect.signature(getattr(hookspecs, name)).parameters), f"argument of {name}"
        for word in given:
            if word not in spellings:
                near = difflib.get_close_matches(word, spellings, n=1)
                return {"unknown": f"{what}: {word}", "known": ", ".join(spellings), "nearest": "".join(near)}
    return {}


def installed_plugins() -> dict[str, Installed]:
    """Every installed plugin by full name.

    Raises:
        PluginConflictError: two distributions provide a plugin of the same name.
    """
    found: dict[str, Installed] = {}
    for entry_point in sorted(entry_points(group=GROUP), key=lambda entry_point: entry_point.name):
        distribution = entry_point.dist.name if entry_point.dist else "unknown"
        version = entry_point.dist.version if entry_point.dist else "unknown"
        name = entry_point.name.replace("-", "_")
        other = found.setdefault(name, Installed(name, distribution, version, entry_point))
        # The same distribution can be listed twice (a stale .egg-info beside an editable install): not a conflict.
        if other.distribution != distribution or other.entry_point.value != entry_point.value:
            raise PluginConflictError(
                f"two distributions provide a plugin named {name}",
                {"first": f"{other.distribution} {other.version}", "second": f"{distribution} {version}"},
                "uninstall one of them",
            )
    return found


def resolve_names(names: Iterable[str], installed: dict[str, Installed]) -> list[Installed]:
    """Full or short names to plugins, without importing them; duplicates are dropped.

    Raises:
        PluginNotFoundError: a name that nothing provides, with the nearest known one.
        PluginConflictError: a short name that fits several plugins.
    """
    chosen: dict[str, Installed] = {}
    for name in names:
        normalized = name.strip().replace("-", "_").lower()
        if normalized in installed:
            matches = [installed[normalized]]
        else:
            matches = [plugin for plugin in installed.values() if plugin.short_name == normalized]
        if not matches:
            known = sorted(installed)
            spellings = [*known, *(installed[full].short_name for full in known)]
            near = difflib.get_close_matches(normalized, spellings, n=1)
            raise PluginNotFoundError(
                f"no installed plugin is named {name!r}",
                {
                    "known": ", ".join(f"{installed[full].short_name} ({full})" for full in known),
                    "nearest": near[0] if near else None,
                },
                "check the spelling, or install the distribution that provides it, on every node",
            )
        if len(matches) > 1:
            raise PluginConflictError(
                f"{name!r} fits several plugins",
                {"plugins": ", ".join(f"{plugin.name} ({plugin.distribution})" for plugin in matches)},
                "use the full name",
            )
        chosen[matches[0].name] = matches[0]
    return list(chosen.values())


def load(installed: Installed) -> Plugin:
    """Import one plugin's code."""
    try:
        plugin = Plugin(installed, installed.entry_point.load())
    except Exception as error:
        raise PluginError(
            f"plugin {installed.name} cannot be imported",
            {
                "distribution": f"{installed.distribution} {installed.version}",
                "code": installed.entry_point.value,
                "error": f"{type(error).__name__}: {error}",
            },
            "reinstall that distribution, or leave the plugin out",
        ) from error
    for side in plugin.sides:
        if side not in hookspecs.ROLES:
            near = difflib.get_close_matches(side, hookspecs.ROLES, n=1)
            raise PluginError(
                f"plugin {plugin.name} names a process in SIDES that does not exist",
                {"found": side, "known": ", ".join(hookspecs.ROLES), "nearest": near[0] if near else None},
                "correct it",
            )
    return plugin


def in_order(plugins: Sequence[Plugin]) -> list[Plugin]:
    """Requirements first, then by name: never by installation order nor by the order on the command line.

    Raises:
        PluginConflictError: a required plugin is not selected, two selected ones exclude each other, or a cycle.
    """
    by_name = {plugin.name: plugin for plugin in plugins}
    for plugin in plugins:
        for required in plugin.requires:
            if required not in by_name:
                raise PluginConflictError(
                    f"plugin {plugin.name} requires {required}, which is not selected",
                    {"selected": ", ".join(sorted(by_name))},
                    f"add {required} to --plugins",
                )
        for other in plugin.conflicts:
            if other in by_name:
                raise PluginConflictError(
                    f"plugins {plugin.name} and {other} cannot be used together", next=f"leave {other} out"
                )
    sorter = TopologicalSorter({name: by_name[name].requires for name in by_name})
    try:
        sorter.prepare()
    except CycleError as error:
        raise PluginConflictError("plugins require each other in a circle", {"circle": error.args[1]}) from error
    ready: list[str] = []
    ordered = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()])  # the same in every process: hooks must run in one order
        ordered.append(by_name[ready[0]])
        sorter.done(ready.pop(0))
    return ordered


class Plugins:
    """The selected plugins of one process: their hooks, their order, their digest."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self.plugins = in_order(plugins)
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        for plugin in reversed(self.plugins):  # pluggy calls the last registered first
            self._register(plugin)

    @classmethod
    def named(cls, names: Iterable[str]) -> Plugins:
        """Select and import plugins by full or short name."""
        return cls([load(found) for found in resolve_names(names, installed_plugins())])

    def _register(self, plugin: Plugin) -> None:
        try:
            self._manager.register(plugin.module, name=plugin.name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(
                f"plugin {plugin.name} does not fit the hooks of this version",
                _misfit(plugin.module) or {"error": str(error).replace("\n", " ")},
                "see docs/hooks.md for every hook and its arguments",
            ) from error

    @property
    def hook(self) -> Any:
        """pluggy's hook relay: `plugins.hook.model_built(args=…, model=…, role=…)`."""
        return self._manager.hook

    def ask(self, plugin: Plugin, hook: str, **arguments: Any) -> Any:
        """Call one plugin's implementation of a hook; None when it has none or has nothing to say."""
        others = [other.module for other in self.plugins if other is not plugin]
        answer = self._manager.subset_hook_caller(hook, others)(**arguments)
        return next(iter(answer), None) if isinstance(answer, list) else answer

    def ask_each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call one hook plugin by plugin, in order: each plugin's name with its answer, if it has one."""
        for plugin in self.plugins:
            if (answer := self.ask(plugin, hook, **arguments)) is not None:
                yield plugin.name, answer

    def chain(
        self,
        hook: str,
        argument: str,
        value: Any,
        check: Callable[[str, Any], None] | None = None,
        /,
        **arguments: Any,
    ) -> Any:
        """Pass one value through a hook, plugin by plugin, in order.

        Each gets as `argument` what the one before returned; None leaves it. `check` is given each plugin's name and
        answer, and raises if the next plugin cannot take it.
        """
        for plugin in self.plugins:
            answer = self.ask(plugin, hook, **{argument: value}, **arguments)
            if answer is not None:
                if check is not None:
                    check(plugin.name, answer)
                value = answer
        return value

    @property
    def names(self) -> list[str]:
        return [plugin.name for plugin in self.plugins]

    def __iter__(self) -> Iterator[Plugin]:
        return iter(self.plugins)

    def implement(self, hook: str) -> bool:
        """Whether any selected plugin implements the hook."""
        return any(plugin.implements(hook) for plugin in self.plugins)

    @cached_property
    def digest(self) -> str:
        """One hash over names, versions and source code: two processes with the same digest run the same layer."""
        named = sorted(f"{plugin.name}={plugin.version}" for plugin in self.plugins)
        files = _source_files(Path(__file__).parent / "__init__.py")
        for plugin in self.plugins:
            if plugin.installed.distribution != OWN_DISTRIBUTION and isinstance(plugin.module, ModuleType):
                top = sys.modules.get(plugin.module.__name__.partition(".")[0], plugin.module)
                files |= _source_files(Path(getattr(top, "__file__", None) or plugin.module.__file__ or ""))
        # Sorted by content, not by path: an editable install and a wheel of the same code agree.
        contents = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
        return hashlib.sha256("\n".join([*named, *contents]).encode()).hexdigest()[:16]


def _source_files(module_file: Path) -> set[Path]:
    """The files of a package, links to folders followed, or of a single-file module."""
    if module_file.name != "__init__.py":
        return {module_file} if module_file.is_file() else set()
    folders = [module_file.parent, *(entry for entry in module_file.parent.iterdir() if entry.is_symlink())]
    return {file.resolve() for folder in folders for file in folder.resolve().rglob("*.py")}
