"""Upstream, loaded and then changed in memory under the patches: what `PatchSet.apply` says, and what it leaves behind.

Run as a script with one stack on the path, by test_mutations.py. Prints one line of JSON: counts, and what went wrong.
"""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import json
import sys
import textwrap
import types
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from miles_plugins import patching
from miles_plugins.activation import activate
from miles_plugins.compat.source import FUNCTION_KINDS, describe, kind_of
from miles_plugins.errors import PatchError
from miles_plugins.patches.seam import patch_set
from miles_plugins.patching import Patch, PatchSet, State
from tests import mutations
from tests.mutations import RENAMED, SIBLING, NotApplicable
from tests.test_mutations import hands_on, returns_as_it_is
from tests.test_sglang_routing import NoKernels


class Place:
    """Where a target is: the module or class that it is asked of, its name there, and what is stored."""

    def __init__(self, target: str) -> None:
        self.target = target
        named, self.name = patching._resolve(target)
        lineage = getattr(named, "__mro__", (named,))
        self.owner = next(each for each in lineage if self.name in vars(each))
        self.stored = vars(self.owner)[self.name]
        self.kind = kind_of(self.owner, self.stored)

    @property
    def function(self) -> Any:
        return getattr(self.stored, "__func__", self.stored)


# -- the mutations ---------------------------------------------------------------------------------------------------


def delete(place: Place) -> None:
    # Ray derives a class of its own from an actor class, with copies of its methods.
    for owner in {place.owner, getattr(place.owner, "__ray_actor_class__", place.owner)}:
        delattr(owner, place.name)


def rename(place: Place) -> None:
    setattr(place.owner, place.name + RENAMED, place.stored)
    delete(place)


def move(place: Place) -> None:
    write_elsewhere(place)
    delete(place)


def re_export(place: Place) -> None:
    setattr(place.owner, place.name, write_elsewhere(place))


def write_elsewhere(place: Place) -> Any:
    """The same function as another module defines it."""
    if place.kind != "function" or type(place.stored) is not types.FunctionType:
        raise NotApplicable("the tests of the files have the rest")
    old = place.stored
    new = types.FunctionType(old.__code__, old.__globals__, old.__name__, old.__defaults__, old.__closure__)
    new.__kwdefaults__ = copy.copy(old.__kwdefaults__)
    new.__module__, new.__qualname__ = SIBLING, place.name
    vars(new).update(vars(old))
    sys.modules[SIBLING] = types.ModuleType(SIBLING)
    setattr(sys.modules[SIBLING], place.name, new)
    return new


def rewrite(mutation: Callable[[str, str], mutations.Mutated]) -> Callable[[Place], None]:
    """The function that its changed source defines."""

    def change(place: Place) -> None:
        plain = inspect.unwrap(place.function)
        if place.kind not in FUNCTION_KINDS or not isinstance(plain, types.FunctionType):
            raise NotApplicable("not written in Python")
        source = textwrap.dedent(inspect.getsource(plain))
        # As a method, so that the mutation knows its first parameter.
        is_method = isinstance(place.owner, type)
        name = plain.__name__
        source = f"class Owner:\n{textwrap.indent(source, '    ')}" if is_method else source
        tree = mutations.parsed(mutation(source, f"Owner.{name}" if is_method else name).text)
        tree = copy.deepcopy(tree)
        body = tree.body[0].body if is_method else tree.body  # type: ignore[attr-defined]
        body[0].decorator_list = []
        tree.body = body
        namespace = dict(plain.__globals__)
        exec(compile(tree, "<mutated>", "exec"), namespace)
        binding = {"staticmethod": staticmethod, "classmethod": classmethod}.get(place.kind)
        if name == "__new__":
            binding = staticmethod
        setattr(place.owner, place.name, binding(namespace[name]) if binding else namespace[name])

    return change


def make_property(place: Place) -> None:
    if place.kind != "method" or place.name.endswith("__"):
        raise NotApplicable("only a method becomes a property, and a special one does not")
    setattr(place.owner, place.name, property(place.function))


def move_to_base(place: Place) -> None:
    bases = [base for base in getattr(place.owner, "__mro__", ())[1:] if base.__module__ != "builtins"]
    if place.kind not in FUNCTION_KINDS or not bases or place.name in vars(bases[0]):
        raise NotApplicable("it has no base class that could take it")
    setattr(bases[0], place.name, place.stored)
    delete(place)


MUTATIONS: dict[str, Callable[[Place], None]] = {
    "deleted": delete,
    "renamed": rename,
    "moved to another module": move,
    "re-exported from another module": re_export,
    "a new required keyword": rewrite(mutations.needs_a_keyword),
    "a new required position": rewrite(mutations.needs_a_position),
    "its parameters renamed": rewrite(mutations.parameters_renamed),
    "moved to a base class": move_to_base,
    "made a property": make_property,
    "made async, or no longer": rewrite(mutations.made_async),
}


# -- what is left behind ---------------------------------------------------------------------------------------------


class Snapshot:
    """Every attribute of every owner of a target (and of its bases), by identity."""

    def __init__(self, places: list[Place]) -> None:
        owners = {id(each): each for place in places for each in getattr(place.owner, "__mro__", (place.owner,))}
        self.state = {key: (owner, dict(vars(owner))) for key, owner in owners.items() if owner is not object}

    def differences(self) -> list[str]:
        found = []
        for owner, before in self.state.values():
            now = vars(owner)
            for name in {*before, *now}:
                if before.get(name, self) is not now.get(name, self):
                    found.append(f"{owner.__name__}.{name}")
        return found

    def restore(self) -> None:
        for owner, before in self.state.values():
            for name in {*before, *vars(owner)}:
                if name not in before:
                    delattr(owner, name)
                elif vars(owner).get(name, self) is not before[name]:
                    setattr(owner, name, before[name])


# -- the run ---------------------------------------------------------------------------------------------------------


class Run:
    def __init__(self, patches: list[Patch]) -> None:
        self.patches = patches
        self.places = {name: Place(name) for patch in patches for name in targets_of(patch)}
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def whole(self) -> None:
        """Nothing is applied twice, and `undo` leaves upstream exactly as it was found."""
        before = Snapshot(list(self.places.values()))
        patches = PatchSet(*self.patches)
        patches.apply()
        applied = Snapshot(list(self.places.values()))
        patches.apply()
        if twice := applied.differences():
            self.problems.append(f"applied twice: {twice}")
        layers = Counter(layer.patch.id for site in patching._sites for layer in site.layers)
        if wrong := [patch.id for patch in self.patches if layers[patch.id] != 1]:
            self.problems.append(f"not one layer each: {wrong}")
        patches.undo()
        if left := before.differences():
            self.problems.append(f"undo left {left}")
        if patching._sites:
            self.problems.append(f"sites left: {[site.name for site in patching._sites]}")

    def every_mutation(self) -> None:
        for patch in self.patches:
            for name in targets_of(patch):
                for mutation in MUTATIONS if name == patch.target else ("deleted",):
                    self.one(patch, self.places[name], mutation)

    def one(self, patch: Patch, place: Place, mutation: str) -> None:
        original = describe(place.target, place.kind, place.function)
        before = Snapshot([place])
        try:
            MUTATIONS[mutation](place)
            # Of these, and of every other owner.
            mutated = Snapshot(list(self.places.values()))
            try:
                result = self.applied(patch, place, mutation, original)
            finally:
                left = mutated.differences()
            self.counts[result] += 1
            if left:
                self.problems.append(f"{patch.id}  {place.target}  {mutation}: not rolled back: {left}")
            if result == "silent":
                self.problems.append(f"{patch.id}  {place.target}  {mutation}: silent pass")
        except NotApplicable:
            pass
        except TypeError as error:
            if "immutable type" not in str(error):
                raise
        finally:
            before.restore()
            sys.modules.pop(SIBLING, None)

    def applied(self, patch: Patch, place: Place, mutation: str, original: Any) -> str:
        patches = PatchSet(*self.patches)
        try:
            patches.apply()
        except PatchError as error:
            of_target = [each.id for each in self.patches if place.target in targets_of(each)]
            said = place.target in str(error) and any(name in str(error) for name in of_target)
            return "refused" if said else self.misnamed(error)
        try:
            if mutation.startswith("re-exported"):
                same = vars(sys.modules[SIBLING])[place.name] is vars(place.owner)[place.name]
                return "followed" if same else "silent"
            if "async" in mutation and patch.async_too and returns_as_it_is(patch):
                return "handed on"
            if ("required" in mutation or "parameters" in mutation) and hands_on(patch, original):
                return "handed on"
            return "inherited" if mutation.endswith("base class") and patch.inherited else "silent"
        finally:
            patches.undo()

    def misnamed(self, error: PatchError) -> str:
        self.problems.append(f"the refusal does not name it: {error}")
        return "refused"


def targets_of(patch: Patch) -> list[str]:
    return list(dict.fromkeys((patch.target, *(need.target for need in patch.needs))))


def loaded() -> tuple[list[Patch], list[str]]:
    """The patches of this stack that are applied in one process, and why others are not."""
    activation = activate(["r3", "cpu", "metrics"], "trainer", environment={})
    activation.patches.undo()
    patches = activation.patches = patch_set(activation.seams)
    patches.arm()
    absent = []
    for patch in patches:
        try:
            importlib.import_module(patch.module)
        except Exception as error:
            absent.append(f"{patch.id}: {type(error).__name__}: {error}")
    records = patches.records()
    applied = [record.patch for record in records if record.state is State.VERIFIED]
    absent += [f"{record.patch.id}: {record.state.value}" for record in records if record.state is State.ARMED]
    patches.undo()
    return applied, absent


def main() -> None:
    if find_spec("sgl_kernel") is None:
        sys.meta_path.insert(0, NoKernels())
    patches, absent = loaded()
    gc.freeze()
    run = Run(patches)
    run.whole()
    run.every_mutation()
    run.whole()
    result = {"targets": len(run.places), "counts": run.counts, "problems": run.problems, "absent": absent}
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
