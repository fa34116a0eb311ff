"""Change upstream at run time: declared, checked first, all or nothing, reversible.

A `Patch` is data: which target, what to do there, why, and what upstream must look like for it to fit. A `PatchSet`
carries its patches through resolve -> check -> apply -> verify as one transaction, and back with `undo()`.

What stands in a function's place is one plain function of the original's name and sort, however many patches share it:
it pickles by reference, binds like the original and is transparent to `inspect`. Our layers lie below it, in declared
order. Targets are objects, not names: two dotted paths to one function are one target.

Limits. Copies of a target are looked for in module globals only (not in containers, default arguments or closures), so
use the `original` that a wrapper is given and do not import the target yourself. `importlib.reload` of a target brings
the unpatched one back; the records then say so.
"""

from __future__ import annotations

import difflib
import functools
import graphlib
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from enum import Enum
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import wrapt

from miles_plugins.compat.source import (
    FUNCTION_KINDS,
    Definition,
    compare_signatures,
    describe,
    find_definition,
    find_definitions,
    find_module,
    has_package,
    kind_of,
    names_near,
    parse_signature,
    source_fingerprint,
    syntax_problem,
)
from miles_plugins.errors import PatchError

__all__ = [
    "Need",
    "Patch",
    "PatchSet",
    "Record",
    "State",
    "check_statically",
    "exists_statically",
    "has_attribute",
    "has_parameter",
    "source_fingerprint",
]


class _Absent(Enum):  # an enum member stays itself when it is pickled
    ABSENT = "<absent>"


ABSENT = _Absent.ABSENT


# -- declarations ----------------------------------------------------------------------------------------------------


class State(str, Enum):
    """Where a patch is in this process. Only VERIFIED and SUPERSEDED mean that the feature is there."""

    ARMED = "armed"  # waits for its target to be imported
    APPLIED = "applied"  # upstream has been changed, but nothing shows that it has an effect
    VERIFIED = "verified"  # the target leads to us, and the patch's probe, if it has one, has passed
    SKIPPED = "skipped"  # not applied, or undone
    SUPERSEDED = "superseded"  # upstream does it natively; nothing was changed
    FAILED = "failed"


@dataclass(frozen=True)
class Need:
    """A condition on upstream: `target` exists and, if a parameter is named, takes it."""

    target: str
    parameter: str | None = None

    def __str__(self) -> str:
        return f"{self.target} with a parameter {self.parameter}" if self.parameter else self.target


def has_parameter(target: str, name: str) -> Need:
    """The function `module:qualname` has a parameter called `name`; `**kwargs` does not count."""
    return Need(target, name)


def has_attribute(target: str) -> Need:
    """`module:qualname` exists; a field that a class only annotates counts."""
    return Need(target)


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """One touch on upstream. Exactly one of `wrap`, `replace`, `replace_with` and `add` says what is done.

    Attributes:
        id: Unique, such as "megatron.router.select-experts".
        target: "package.module:function", "package.module:Class.method" or any other attribute.
        reason: Why upstream's own extension points do not do.
        wrap: Called as `wrap(original, *args, **kwargs)` in place of a function. Of a method, `original` is the plain
            function and the instance (of a classmethod, the class) the first argument. A plain function can wrap any
            but one written with `async def` (see `async_too`); a coroutine or generator function only its own sort.
        async_too: Whether a plain `wrap` also fits a target that is written with `async def`: it returns what
            `original` returns as it is, and does nothing after it. Any other would go on before upstream is done.
        replace: What takes the target's place. A function is given a function of the same sort, which then binds as
            the original did. One whose body is none of `fingerprints` is not replaced.
        replace_with: Computes the replacement from the original; the way to subclass a class.
        add: What is put where nothing was.
        signature: The parameters that the patch was written for: "(self, config, *, groups=None)". Upstream may have
            added parameters with defaults at the end, nothing else.
        fingerprints: Upstream's name for a known body -> its `source_fingerprint`. A wrapper of another body is
            applied and noted as drifted.
        needs: Further conditions on upstream.
        roles: Processes in which the patch must be verified.
        before: Ids of patches of the same target that this one is outside of: closer to the caller.
        after: Ids of patches of the same target that this one is inside of. Without before and after, the smaller id
            is outside; a replacement is inside of everything.
        superseded_when: A need that upstream may meet by itself: where it does, nothing is changed, and the check
            before the launch says the same. Or a function which, given the loaded module, says why upstream needs no
            patch any more, or returns None.
        inherited: Whether the target may be one that its class only inherits. Otherwise a definition that upstream
            moved to a base class is refused: what it does there may serve others too.
        upstream: Link to what forces the patch.
        retire_when: When it can be deleted.
        probe: Raises when the patch does not really act; runs after it has been applied. What it returns is noted.

    Raises:
        PatchError: the declaration contradicts itself.
    """

    id: str
    target: str
    reason: str
    wrap: Callable[..., Any] | None = None
    async_too: bool = False
    replace: Any = ABSENT
    replace_with: Callable[[Any], Any] | None = None
    add: Any = ABSENT
    signature: str | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    roles: frozenset[str] = frozenset()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    superseded_when: Need | Callable[[ModuleType], str | None] | None = None
    inherited: bool = False
    upstream: str = ""
    retire_when: str = ""
    probe: Callable[[], str | None] | None = None

    def __post_init__(self) -> None:
        ways = {"wrap": None, "replace": ABSENT, "replace_with": None, "add": ABSENT}
        given = [way for way, nothing in ways.items() if getattr(self, way) is not nothing]
        problem = None
        if len(given) != 1:
            problem = f"give exactly one of {', '.join(ways)}; given: {', '.join(given) or 'none'}"
        elif not all(part.isidentifier() for part in (*self.module.split("."), *self.qualname.split("."))):
            problem = "a target is written package.module:function or package.module:Class.method"
        elif isinstance(self.before, str) or isinstance(self.after, str):
            problem = "before and after are tuples of patch ids"
        elif self.signature is not None:
            try:
                parse_signature(self.signature)
            except ValueError as error:
                problem = str(error)
        if problem:
            raise _misfit(self, "is not well declared", found=problem, next="correct the declaration")

    @property
    def kind(self) -> str:
        """wrap, replace or add."""
        if self.wrap is not None:
            return "wrap"
        return "replace" if self.add is ABSENT else "add"

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def qualname(self) -> str:
        return self.target.partition(":")[2]


@dataclass(kw_only=True)
class Record:
    """What has become of one patch in this process; `layers` are the patches of its target, outermost first."""

    patch: Patch
    state: State = State.SKIPPED
    detail: str = "not applied yet"
    layers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, str]:
        return {
            "id": self.patch.id,
            "target": self.patch.target,
            "state": self.state.value,
            "detail": self.detail,
            "reason": self.patch.reason,
            "kind": self.patch.kind,
        }


# -- sets ------------------------------------------------------------------------------------------------------------


class PatchSet:
    """Patches that hold together in this process, or not at all."""

    def __init__(self, *patches: Patch, name: str = "") -> None:
        self.name = name
        self._records: dict[str, Record] = {}
        self._failure: PatchError | None = None
        for patch in patches:
            if patch.id in self._records:
                raise _misfit(patch, "is twice in one set", found=f"set {name}", next="give every patch its own id")
            self._records[patch.id] = Record(patch=patch)

    def __iter__(self) -> Iterator[Patch]:
        return iter([record.patch for record in self._records.values()])

    def __repr__(self) -> str:
        return f"<PatchSet {self.name or ', '.join(self._records)}>"

    def apply(self) -> None:
        """Import the targets and apply what is not in place yet, as one transaction.

        Raises:
            PatchError: a patch does not fit or does not act. Everything that this set ever did is undone.
        """
        with self._all_or_nothing():
            for record in self._records.values():
                with _blamed(record):
                    _import_target(record.patch)
            self._change(self._pending())

    def arm(self) -> None:
        """Apply to each target module when it has been executed, before its importer binds names; now if it is loaded.

        The patches of one module are one transaction. When it fails, everything that this set did is undone, and until
        `undo()` the set's targets cannot be imported: a feature is never half on.

        Raises:
            PatchError: as `apply`; from here, or from the import statement.
        """
        with self._all_or_nothing():
            pending = self._pending()
            for record in pending:
                record.state, record.detail = State.ARMED, ""
                if not _is_loaded(record.patch.module):
                    _when_imported(record.patch.module, self)
            self._change([record for record in pending if _is_loaded(record.patch.module)])

    def undo(self) -> None:
        """Disarm, and take this set's layers out: no one else's, and none that another set has asked for as well."""
        for waiting in _waiting.values():
            if self in waiting:
                waiting.remove(self)
        self._failure = None
        self._take_out(self._records.values())
        for record in self._records.values():
            record.state, record.detail = State.SKIPPED, "undone"

    def records(self) -> list[Record]:
        """What has become of each patch until now, in declared order."""
        with _lock:
            return [self._snapshot(record) for record in self._records.values()]

    def _snapshot(self, record: Record) -> Record:
        site = next((site for site in _sites if site.holds(record.patch, self)), None)
        if site is None:
            return changed(record)
        now = changed(record, layers=tuple(patch.id for patch in _ordered(site.patches)))
        if not site.leads_to_us():
            now.state = State.APPLIED
            now.detail = _joined(record.detail, "someone has since put something else in the target's place")
        return now

    def _pending(self) -> list[Record]:
        in_place = (State.APPLIED, State.VERIFIED, State.SUPERSEDED)
        return [record for record in self._records.values() if record.state not in in_place]

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        self._failure = None
        try:
            yield
        except BaseException as error:
            records = self._records.values()
            failed = [record for record in records if record.state is State.FAILED]
            culprit = failed[0].patch.id if failed else type(error).__name__
            self._take_out(records)
            for record in records:
                if record.state is not State.FAILED:
                    record.state, record.detail = State.SKIPPED, f"undone: {culprit} failed"
            self._failure = error if isinstance(error, PatchError) else PatchError(f"{self!r} was interrupted")
            raise

    def _change(self, records: list[Record]) -> None:
        for record in records:  # without the lock: this may import
            with _blamed(record):
                _check_surroundings(record)
        entered: list[tuple[Record, _Site]] = []
        with _lock:
            _settle()
            for record in records:
                if record.state is not State.SUPERSEDED:
                    with _blamed(record):
                        entered.append((record, _enter(record, self)))
            # Nothing of upstream has changed before this line.
            for record, site in entered:
                with _blamed(record):
                    site.show()
                record.state = State.APPLIED
            _rebind_copies([site for _, site in entered])
        for record, site in entered:
            with _blamed(record):
                record.detail = _joined(record.detail, _verify(record.patch, site))
            record.state = State.VERIFIED

    def _take_out(self, records: Iterable[Record]) -> None:
        with _lock:
            for site in _sites:
                for record in records:
                    site.release(record.patch, self)
            _settle()

    def _on_import(self, module: str) -> None:
        if self._failure is not None:
            raise PatchError(self._failure.message, self._failure.facts, self._failure.next)
        with self._all_or_nothing():
            self._change([record for record in self._of(module) if record.state is State.ARMED])

    def _on_failed_import(self, module: str) -> None:
        """The module was patched and is thrown away: wait for its next import."""
        if self._failure is None:
            self._take_out(self._of(module))
            for record in self._of(module):
                record.state, record.detail = State.ARMED, ""

    def _of(self, module: str) -> list[Record]:
        return [record for record in self._records.values() if record.patch.module == module]


@contextmanager
def _blamed(record: Record) -> Iterator[None]:
    """Any exception in here is this patch's failure, and a PatchError that says so."""
    try:
        yield
    except Exception as error:
        failure = error
        if not isinstance(failure, PatchError):
            found = f"{type(error).__name__}: {error}"
            failure = _misfit(record.patch, "failed", found=found, next="see the exception that caused this one")
        if failure.facts.get("patch", record.patch.id) == record.patch.id:  # else an import's, or another set's
            facts = (f"{name} {value}" for name, value in failure.facts.items() if name not in ("patch", "target"))
            record.state, record.detail = State.FAILED, "; ".join([failure.message, *facts])
        raise failure from (error if failure is not error else error.__cause__)


def _misfit(patch: Patch, problem: str, *, next: str | None = None, **facts: object) -> PatchError:
    next = next or "use a listed stack (docs/compatibility.md), or report this with the versions you run"
    shown = {name: str(value) for name, value in facts.items() if value not in (None, "")}
    return PatchError(f"patch {patch.id} {problem}", {"patch": patch.id, "target": patch.target, **shown}, next=next)


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


# -- checks ----------------------------------------------------------------------------------------------------------


def exists_statically(need: Need) -> bool:
    """Whether the installed upstream meets a need for sure, by its files."""
    candidates = find_definitions(need.target)
    return bool(candidates) and all(_meets(need, candidate) for candidate in candidates)


def check_statically(patch: Patch) -> list[str]:
    """Make the checks of `PatchSet.apply` on the installed files, without importing upstream.

    What runs code (probe, a function as superseded_when, replace_with) and what meets other patches is left to `apply`.

    Returns:
        Notes: drift, "superseded", "not installed here", and what only an import can tell.

    Raises:
        PatchError: the patch cannot fit.
    """
    if not has_package(package := _package(patch.target)):
        return [f"not installed here: {package}"]
    by = patch.superseded_when
    if isinstance(by, Need):
        if exists_statically(by):
            return [f"superseded: {_superseded(by)}"]
        if any(candidate.kind == "unknown" or _meets(by, candidate) for candidate in find_definitions(by.target)):
            return [f"whether it is superseded ({_superseded(by)}) is only known when it is imported"]
    found = [definition for definition in find_definitions(patch.target) if definition.kind != "declared"]
    if not found and callable(by):
        return ["its target does not exist; whether upstream supersedes it is only known when it is imported"]
    notes = []
    if patch.kind == "add":
        owner = patch.target.rpartition("." if "." in patch.qualname else ":")[0]
        if found and found[0].kind != "unknown":
            raise _already_there(patch, found[0].where)
        if not find_definitions(owner):
            raise _missing(patch)
    elif not found:
        raise _missing(patch)
    else:
        if not patch.inherited and (ancestor := _static_ancestor(patch, found[0])):
            raise _only_inherited(patch, ancestor)
        notes += _first_that_fits(lambda definition: _judge_file(patch, definition), found)
    for need in patch.needs:
        if has_package(package := _package(need.target)):
            judge = functools.partial(_judge_need, patch, need)
            notes += _first_that_fits(judge, find_definitions(need.target) or [None])
        else:
            notes.append(f"not installed here: {package}")
    return notes


def _static_ancestor(patch: Patch, found: Definition) -> str | None:
    """The class that defines the target for the one that is named; None when that one does."""
    if "." not in patch.qualname or found.kind == "unknown":
        return None
    named = find_definition(patch.target.rpartition(".")[0])
    defining = found.target.rpartition(".")[0]
    return None if named is None or named.target == defining else defining


def _written_class(owner: type) -> type:
    """The class as upstream wrote it: Ray derives one of its own from an actor class."""
    written: type = getattr(owner, "__ray_actor_class__", owner)
    return written


def _only_inherited(patch: Patch, ancestor: str) -> PatchError:
    return _misfit(
        patch,
        "does not fit: its target is only inherited",
        expected=f"{patch.qualname} in a class body of its own",
        found=f"inherited from {ancestor}",
        where=find_module(patch.module),
        next="find where upstream moved it; if the base class is meant, target it there",
    )


def _first_that_fits(judge: Callable[[Any], list[str]], definitions: Sequence[Definition | None]) -> list[str]:
    """Of several, a condition in upstream decides which is there when it runs."""
    failures = []
    for definition in definitions:
        try:
            return judge(definition)
        except PatchError as failure:
            failures.append(failure)
    raise failures[0]


def _package(target: str) -> str:
    return target.partition(":")[0].partition(".")[0]


def _judge(patch: Patch, found: Definition) -> list[str]:
    """What differs without doing harm. Raises PatchError if the patch does not fit."""
    if found.kind == "unknown":
        if problem := syntax_problem(patch.module):
            raise _misfit(
                patch,
                "cannot be checked: this Python cannot read the file of its target",
                found=problem,
                next="copy that file again, or run a Python that reads it",
            )
        return ["its target cannot be read without importing it"]
    is_function = found.kind in FUNCTION_KINDS
    if patch.kind == "wrap" and not is_function:
        advice = {"class": "wrap its __init__, or replace_with a subclass", "property": "replace_with a new property"}
        raise _misfit(
            patch,
            "cannot wrap its target",
            expected="a function or method",
            found=f"a {found.kind}",
            where=found.where,
            next=advice.get(found.kind, "use replace or replace_with"),
        )
    notes = []
    if patch.signature is not None:
        added = compare_signatures(parse_signature(patch.signature), found.signature) if found.signature else None
        if added is None:
            raise _misfit(
                patch,
                "does not fit: its target takes other arguments",
                expected=patch.signature,
                found=found.signature or f"a {found.kind} that does not tell its parameters",
                where=found.where,
                nearest=", ".join(names_near(patch.target)),
            )
        if added:
            notes.append(f"drifted: it also takes {', '.join(added)}")
    by_body = patch.fingerprints or patch.kind == "replace"
    if by_body and found.fingerprint not in patch.fingerprints.values():
        body = found.fingerprint or "no source to read"
        if patch.kind == "replace" and (is_function or patch.fingerprints):
            known = [f"{fingerprint} ({name})" for name, fingerprint in patch.fingerprints.items()]
            raise _misfit(
                patch,
                "does not fit: it would replace a body that it does not know",
                expected=", ".join(known) or "a recorded fingerprint",
                found=body,
                where=found.where,
                next="compare that body with the replacement; if it still does, record the fingerprint found",
            )
        if patch.fingerprints:
            notes.append(f"drifted: its body is {body}, not that of {' or '.join(patch.fingerprints)}")
    return notes


def _judge_file(patch: Patch, found: Definition) -> list[str]:
    notes = _judge(patch, found)
    if found.kind in FUNCTION_KINDS and found.path is not None and found.line is not None:
        line = found.path.read_text(encoding="utf-8", errors="replace").splitlines()[found.line - 1]
        _judge_sort(patch, line.lstrip().startswith("async "), found.where)
    return notes


def _judge_sort(patch: Patch, is_async: bool, where: str = "") -> None:
    """Whether the wrapper waits for its target, judged by how both are written, beneath decorators."""
    if patch.wrap is None or is_async == _is_async(patch.wrap) or (is_async and patch.async_too):
        return
    sorts = {True: "written with async def", False: "a plain function"}
    raise _misfit(
        patch,
        "does not fit: its wrapper is for another sort of function",
        expected=sorts[not is_async],
        found=sorts[is_async],
        where=where,
    )


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _superseded(need: Need) -> str:
    return f"upstream has {need}"


def _meets(need: Need, found: Definition | None) -> bool:
    parameters = found.signature.parameters.values() if found and found.signature else ()
    named = {each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    return found is not None and found.kind != "unknown" and need.parameter in (None, *named)


def _judge_need(patch: Patch, need: Need, found: Definition | None) -> list[str]:
    if found is not None and found.kind == "unknown":
        return [f"{need.target} cannot be read without importing it"]
    if not _meets(need, found):
        raise _misfit(
            patch,
            "needs what upstream does not have",
            expected=need,
            found=(found.signature or f"a {found.kind}") if found else "no such name",
            where=found.where if found else find_module(need.target.partition(":")[0]),
            nearest=", ".join(names_near(need.target)),
        )
    return []


def _missing(patch: Patch, owner: object = None) -> PatchError:
    path = find_module(patch.module)
    near = names_near(patch.target)
    if owner is not None:  # also knows the names that are computed
        names = difflib.get_close_matches(patch.qualname.rpartition(".")[2], dir(owner))
        near += [name for name in names if not any(other.endswith(name) for other in near)]
    return _misfit(
        patch,
        "does not fit: its target does not exist",
        expected=f"{patch.qualname} in {patch.module}",
        found="no such name" if path or owner else "no such module",
        where=path,
        nearest=", ".join(near) or "nothing similar",
    )


def _already_there(patch: Patch, where: object) -> PatchError:
    return _misfit(
        patch,
        "adds what is there already",
        expected="nothing of this name",
        found="upstream, or another patch, has it",
        where=where,
        next="retire the patch if upstream does this now; else choose another name",
    )


# -- checks on what is loaded ----------------------------------------------------------------------------------------


def _import_target(patch: Patch) -> None:
    try:
        module = importlib.import_module(patch.module)
    except ModuleNotFoundError as error:
        if f"{patch.module}.".startswith(f"{error.name}."):
            raise _missing(patch) from error
        raise
    if _is_half_imported(module):
        raise _misfit(patch, "comes too early: its target is being imported", next="use arm(), which waits")


def _resolve(target: str) -> tuple[Any, str]:
    """The module or class whose attribute a loaded target is, and the attribute. Raises LookupError."""
    module, _, qualname = target.partition(":")
    *path, name = qualname.split(".")
    owner: Any = sys.modules[module]
    for part in path:
        found = _stored(owner, part) if isinstance(owner, (ModuleType, type)) else getattr(owner, part, ABSENT)
        if found is ABSENT:
            raise LookupError(part)
        owner = found
    if not isinstance(owner, (ModuleType, type)):  # @ray.remote puts a handle in the place of the class that it runs
        owner = getattr(getattr(owner, "__ray_metadata__", None), "modified_class", None)
    if owner is None:
        raise LookupError(qualname)
    return owner, name


def _stored(owner: Any, name: str) -> Any:
    """What a module or class has stored as `name`, unbound; ABSENT if nothing."""
    if isinstance(owner, type):
        return next((vars(ancestor)[name] for ancestor in owner.__mro__ if name in vars(ancestor)), ABSENT)
    return vars(owner)[name] if name in vars(owner) else getattr(owner, name, ABSENT)


def _home(owner: Any, name: str) -> tuple[Any, str]:
    """Where a function or class is defined that a module only re-exports."""
    found = _stored(owner, name)
    if isinstance(owner, ModuleType) and (inspect.isroutine(found) or inspect.isclass(found)):
        try:
            home = _resolve(f"{found.__module__}:{found.__qualname__}")
            there = _stored(*home)
        except (AttributeError, LookupError):
            return owner, name
        if found is there or found is getattr(there, "__func__", None):
            return home
    return owner, name


def _describe_loaded(target: str) -> Definition | None:
    try:
        importlib.import_module(target.partition(":")[0])
        owner, name = _resolve(target)
    except (ModuleNotFoundError, LookupError):
        return None
    found = _stored(owner, name)
    if found is not ABSENT:
        return describe(target, kind_of(owner, found), getattr(found, "__func__", found))
    annotated = any(name in vars(ancestor).get("__annotations__", ()) for ancestor in getattr(owner, "__mro__", ()))
    return Definition(target=target, kind="declared") if annotated else None


def _check_surroundings(record: Record) -> None:
    patch = record.patch
    if any(layer.patch.id == patch.id for site in _sites for layer in site.layers):
        return  # applied for another set: what it added is not upstream's
    by = patch.superseded_when
    if isinstance(by, Need):
        why = _superseded(by) if _meets(by, _describe_loaded(by.target)) else None
    else:
        why = by(sys.modules[patch.module]) if by else None
    if why:
        record.state, record.detail = State.SUPERSEDED, why
        return
    for need in patch.needs:
        _judge_need(patch, need, _describe_loaded(need.target))


def _enter(record: Record, holder: PatchSet) -> _Site:
    """Check the target and who else is there, and take a place in its order. Shows nothing yet."""
    patch = record.patch
    record.detail = ""
    try:
        owner, name = _resolve(patch.target)
    except LookupError:
        raise _missing(patch, sys.modules[patch.module]) from None
    site = _site_of(*_home(owner, name))
    stack = [other for other in _sites if other.owner is site.owner and other.name == site.name]
    for other in _sites:
        for layer in other.layers:
            if layer.patch.id != patch.id:
                continue
            if layer.patch.target != patch.target:
                raise _misfit(patch, "has another patch's id", found=layer.patch.target, next="rename one of them")
            if other in stack:
                layer.holders.add(holder)
                return other
    if patch.kind == "add":
        if site.kind != "absent" or site.layers:
            raise _already_there(patch, getattr(sys.modules[patch.module], "__file__", None))
    elif site.kind == "absent":
        raise _missing(patch, owner)
    elif isinstance(owner, type) and not patch.inherited and name not in vars(_written_class(owner)):
        raise _only_inherited(
            patch, next(ancestor.__qualname__ for ancestor in owner.__mro__ if name in vars(ancestor))
        )
    _check_company(patch, site, [other for underneath in stack for other in underneath.patches])
    if patch.kind != "add":
        record.detail = _joined(*_judge(patch, describe(patch.target, site.kind, site.original)))
        if site.kind in FUNCTION_KINDS:
            _judge_sort(patch, _is_async(inspect.unwrap(site.original)))
    site.layers.append(_Layer(patch, {holder}))
    return site


def _check_company(patch: Patch, site: _Site, others: list[Patch]) -> None:
    sort = _sort_of(site.original)
    if patch.wrap is not None and site.kind in FUNCTION_KINDS and _sort_of(patch.wrap) not in ("function", sort):
        found = f"a {_sort_of(patch.wrap)}"
        raise _misfit(patch, "would return something else", expected=f"a wrapper for a {sort}", found=found)
    for other in others:
        if patch.kind != "wrap" and other.kind != "wrap":
            raise _misfit(
                patch,
                f"and patch {other.id} replace the same object",
                found=f"{other.target}, replaced by {other.id}",
                next="enable only one of the two, or make one of them a wrap",
            )
        if other not in site.patches and (patch.id in other.before or other.id in patch.after):
            raise _misfit(
                patch,
                f"belongs inside of patch {other.id}, but someone else's wrapper lies between",
                found=_full_name(site.original),
                next="apply both patches before that wrapper is made",
            )
    try:
        _ordered([*site.patches, patch])
    except graphlib.CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        raise _misfit(patch, "has no place in the order", found=cycle, next="change a before or after") from None


def _verify(patch: Patch, site: _Site) -> str:
    shown = _stored(*_resolve(patch.target))
    if not site.leads_to_us() or not any(shown is face for face in (site.front, site.function)):
        raise _misfit(patch, "was applied, but its target does not show it", found=_full_name(shown))
    return (patch.probe() if patch.probe is not None else None) or ""


def _full_name(value: object) -> str:
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', repr(value))}"


# -- what stands in a target's place ---------------------------------------------------------------------------------


@dataclass(eq=False)
class _Layer:
    patch: Patch
    holders: set[PatchSet]
    value: Any = ABSENT  # of a replacement or addition


class _Site:
    """One attribute of a module or class: what was there, what stands there now, and our layers."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.raw = vars(owner).get(name, ABSENT)  # to be put back
        found = _stored(owner, name)
        self.kind = "absent" if found is ABSENT else kind_of(owner, found)
        self.original = _plain_function(owner, name, found) if self.kind in FUNCTION_KINDS else found
        self.layers: list[_Layer] = []
        self.installed: Any = ABSENT
        self.function: Any = None  # in a function's place: the one that callers see ...
        self.calls: list[Callable[..., Any]] = []  # ... and the one thing that it calls
        self.copies: list[tuple[dict[str, Any], str]] | None = None

    @property
    def patches(self) -> list[Patch]:
        return [layer.patch for layer in self.layers]

    @property
    def standing(self) -> Any:
        return self.raw if self.installed is ABSENT else self.installed

    @property
    def old_and_new(self) -> tuple[Any, Any]:
        """What modules that have imported the target hold, before and after."""
        old = self.original if isinstance(self.owner, ModuleType) else getattr(self.raw, "__func__", self.raw)
        return old, self.function or self.installed

    @property
    def front(self) -> Any:
        """What is there now, whoever has put it there."""
        return vars(self.owner).get(self.name, ABSENT)

    def leads_to_us(self) -> bool:
        """Whether we stand in front, or someone who says by `__wrapped__` that it calls us."""
        front = self.front
        for _ in range(100):
            if front is self.standing or front is self.function:
                return True
            front = getattr(front, "__func__", None) or getattr(front, "__wrapped__", ABSENT)
        return False

    def holds(self, patch: Patch, holder: PatchSet) -> bool:
        return any(layer.patch.id == patch.id and holder in layer.holders for layer in self.layers)

    def release(self, patch: Patch, holder: PatchSet) -> None:
        for layer in self.layers:
            if layer.patch.id == patch.id:
                layer.holders.discard(holder)
        self.layers = [layer for layer in self.layers if layer.holders]

    def show(self) -> None:
        """Make the target run exactly the layers of now."""
        base = self.original
        for layer in self.layers:
            if layer.patch.wrap is None:
                base = self._replacement(layer)
        wraps = [patch.wrap for patch in _ordered(self.patches) if patch.wrap is not None]
        if self.kind in FUNCTION_KINDS and inspect.isroutine(base):
            self._show_function(base, wraps)
        elif wraps:
            raise TypeError(f"another patch wraps {self.name}, so only a function can replace it")
        elif self.installed is not base:
            self._install(base)

    def _replacement(self, layer: _Layer) -> Any:
        patch = layer.patch
        if layer.value is ABSENT:
            value = patch.replace if patch.kind == "replace" else patch.add
            value = patch.replace_with(self.original) if patch.replace_with else value
            if self.kind in FUNCTION_KINDS:
                value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
                if inspect.isroutine(value) and _sort_of(value) != _sort_of(self.original):
                    raise TypeError(f"a {_sort_of(value)} cannot replace a {_sort_of(self.original)}")
            layer.value = value
        return layer.value

    def _show_function(self, base: Callable[..., Any], wraps: list[Callable[..., Any]]) -> None:
        if self.function is None:
            self.calls.append(base)
            self.function = _function_like(self.original, self.calls)
            # It is pickled by these names: the original's own, unless that was inherited or borrowed.
            in_class = isinstance(self.owner, type)
            self.function.__module__ = self.owner.__module__ if in_class else self.owner.__name__
            self.function.__qualname__ = f"{self.owner.__qualname__}.{self.name}" if in_class else self.name
        below = base
        for wrap in reversed(wraps[1:]):
            below = _function_like(below, [functools.partial(wrap, below)])
        self.calls[0] = functools.partial(wraps[0], below) if wraps else base
        self.function.__wrapped__ = base
        if self.installed is ABSENT:
            binding = {"staticmethod": staticmethod, "classmethod": classmethod}.get(self.kind)
            self._install(binding(self.function) if binding else self.function)

    def _install(self, value: Any) -> None:
        setattr(self.owner, self.name, value)
        self.installed = value

    def withdraw(self) -> bool:
        """Put back what was there. False if someone else stands in front; we then only pass calls through."""
        if self.calls:
            self.calls[0] = self.function.__wrapped__ = self.original
        if self.installed is ABSENT:
            return True
        if self.front is not self.installed:
            return False
        if self.raw is ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.raw)
        return True


def _sort_of(function: Any) -> str:
    if inspect.iscoroutinefunction(function):
        return "coroutine function"
    if inspect.isasyncgenfunction(function):
        return "async generator function"
    return "generator function" if inspect.isgeneratorfunction(function) else "function"


def _function_like(original: Any, calls: list[Callable[..., Any]]) -> Any:
    """A plain function of the sort and name of `original` that runs `calls[0]`, whatever that is by then.

    Made of plain functions and lists only, so that a class that is pickled by value takes it along.
    """
    function: Any
    sort = _sort_of(original)
    if sort == "coroutine function":

        async def function(*args: Any, **kwargs: Any) -> Any:
            result = calls[0](*args, **kwargs)
            return await result if inspect.isawaitable(result) else result

    elif sort == "generator function":

        def function(*args: Any, **kwargs: Any) -> Any:
            return (yield from calls[0](*args, **kwargs))

    elif sort == "async generator function":

        async def function(*args: Any, **kwargs: Any) -> Any:
            below = calls[0](*args, **kwargs)
            step = below.__anext__()
            try:
                while True:
                    try:
                        item = await step
                    except StopAsyncIteration:
                        return
                    try:
                        sent = yield item
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        step = below.athrow(error)
                    else:
                        step = below.asend(sent)
            finally:
                await below.aclose()

    else:

        def function(*args: Any, **kwargs: Any) -> Any:
            return calls[0](*args, **kwargs)

    return functools.wraps(original)(function)


def _plain_function(owner: Any, name: str, found: Any) -> Any:
    """A stored function or method as something to call with all its arguments, `self` or `cls` included."""
    kind, own = kind_of(owner, found), name in vars(owner)
    if isinstance(owner, ModuleType) or (own and type(found) in (FunctionType, BuiltinFunctionType)):
        return found
    if own and type(found) in (staticmethod, classmethod):
        return found.__func__

    def call(*args: Any, **kwargs: Any) -> Any:
        first = owner if kind == "staticmethod" else args[0]
        rest = args if kind == "staticmethod" else args[1:]
        if not own:  # inherited: what comes next for this very instance, as in an override
            bound = getattr(super(owner, first), name)
        elif kind == "method":  # someone else's descriptor
            bound = found.__get__(first, type(first))
        else:
            bound = found.__get__(None, first)
        return bound(*rest, **kwargs)

    return _function_like(getattr(found, "__func__", found), [call])


def _ordered(patches: list[Patch]) -> list[Patch]:
    """Outermost first. Raises graphlib.CycleError."""
    outside: dict[str, set[str]] = {patch.id: set(patch.after) for patch in patches}
    for patch in patches:
        for other in patch.before:
            outside.setdefault(other, set()).add(patch.id)
    sorter = graphlib.TopologicalSorter(outside)
    sorter.prepare()
    order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        order += ready
        sorter.done(*ready)
    return sorted(patches, key=lambda patch: order.index(patch.id))


# -- everything that this process has changed ------------------------------------------------------------------------

_lock = threading.RLock()  # not held while importing, unless a `replace_with` imports
_sites: list[_Site] = []


def _site_of(owner: Any, name: str) -> _Site:
    """The site that made what `owner.name` is now, reached by whatever path; else a new one, in front of it."""
    namespace = vars(owner)
    current = namespace.get(name, ABSENT)
    traceable = isinstance(owner, ModuleType) and current is not ABSENT and _is_traceable(current)
    for site in _sites:
        here = site.owner is owner and site.name == name
        is_addition = site.kind == "absent" and site.installed is not ABSENT  # a target of its own for other patches
        if site.standing is current and not is_addition and (here or traceable or _is_in(site.copies, namespace, name)):
            return site
    _sites.append(_Site(owner, name))
    return _sites[-1]


def _settle() -> None:
    """Bring every site in line with its layers, and forget those without."""
    idle = []
    for site in reversed(_sites):
        if not site.layers:
            idle.append(site)
        elif site.installed is not ABSENT:
            site.show()
    gone = [site for site in idle if site.withdraw()]
    _restore_copies(idle)
    _sites[:] = [site for site in _sites if site not in gone]


def _namespaces() -> Iterator[dict[str, Any]]:
    for module in list(sys.modules.values()):
        try:  # past what a lazy module does on attribute access
            namespace = object.__getattribute__(module, "__dict__")
        except Exception:
            continue
        if type(namespace) is dict:
            yield namespace


def _is_traceable(value: object) -> bool:
    """Whether another name for this very object is a copy of the target; not so for constants, nor for `import x`."""
    shared = (type(None), bool, int, float, complex, str, bytes, tuple, frozenset, type(...), Enum, ModuleType)
    return not isinstance(value, shared)


def _is_in(copies: list[tuple[dict[str, Any], str]] | None, namespace: dict[str, Any], name: str) -> bool:
    return any(name == other and namespace is elsewhere for elsewhere, other in copies or ())


def _rebind_copies(sites: list[_Site]) -> None:
    """Let the copies that `from target import name` has made show what the target shows."""
    wanted = {}
    for site in sites:
        old, _ = site.old_and_new
        if site.copies is None and _is_traceable(old):
            wanted[id(old)] = site
        site.copies = site.copies or []
    for namespace in _namespaces() if wanted else ():
        if wanted.keys().isdisjoint(map(id, list(namespace.values()))):
            continue  # nearly all of some thousand modules
        for name, value in list(namespace.items()):
            if (found := wanted.get(id(value))) is None:
                continue
            _, new = found.old_and_new
            if found.function is None and namespace.get("__name__") == getattr(new, "__module__", None):
                continue  # where a class is replaced by its subclass, this is the base's name in the subclass's module
            namespace[name] = new
            found.copies = [*(found.copies or ()), (namespace, name)]


def _restore_copies(sites: list[_Site]) -> None:
    """Undo `_rebind_copies`, also in modules that have been imported since."""
    later: dict[int, _Site] = {}
    for site in sites:
        old, new = site.old_and_new
        for namespace, name in site.copies or ():
            if namespace.get(name) is new:
                namespace[name] = old
        if site.copies is not None and _is_traceable(old) and _is_traceable(new):
            later[id(new)] = site
            site.copies = []
    for namespace in _namespaces() if later else ():
        if later.keys().isdisjoint(map(id, list(namespace.values()))):
            continue
        for name, value in list(namespace.items()):
            # Only we have made the function. A replacement may also be known elsewhere, by a name of its own.
            if (found := later.get(id(value))) is None or (found.function is None and name != found.name):
                continue
            old, new = found.old_and_new
            if found.function is not None or namespace.get("__name__") != getattr(new, "__module__", None):
                namespace[name] = old  # but the replacement itself stays in the module that defines it


# -- imports ---------------------------------------------------------------------------------------------------------

_waiting: dict[str, list[PatchSet]] = {}


def _is_half_imported(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not _is_half_imported(module)


def _when_imported(name: str, patch_set: PatchSet) -> None:
    waiting = _waiting.setdefault(name, [])
    if patch_set not in waiting:
        waiting.append(patch_set)
        if len(waiting) == 1:
            _hook(name)


def _hook(name: str) -> None:
    """Call `_imported(name)` once, when the module has been executed."""
    module = sys.modules.get(name)
    if module is None:
        wrapt.register_post_import_hook(lambda _: _imported(name), name)
        return
    # It is being imported, so no finder will be asked again. But the last that the import system does with a module,
    # before the importer goes on, is `spec._initializing = False`.
    plain: Any = type(module.__spec__)

    class Watched(plain):  # type: ignore[misc]
        def __setattr__(self, attribute: str, value: object) -> None:
            if attribute != "_initializing" or value:
                super().__setattr__(attribute, value)
                return
            self.__class__ = plain
            self._initializing = value
            if name in sys.modules:
                _imported(name)
            else:  # it failed: wait for the next attempt
                _hook(name)

    module.__spec__.__class__ = Watched


def _imported(name: str) -> None:
    patch_sets = _waiting.pop(name, [])
    try:
        for patch_set in patch_sets:
            patch_set._on_import(name)
    except BaseException:
        # This import fails, and so must the next: every set waits again.
        sys.modules.pop(name, None)
        for patch_set in patch_sets:
            patch_set._on_failed_import(name)
            _when_imported(name, patch_set)
        raise
