"""Upstream changes under the patches: each target deleted, renamed, moved, ..., in a copy of upstream.

The check before the launch must then refuse, naming the patch and its target, or be right by one of these rules:

- The name still leads to the same definition, with the same parameters and body: a re-export is followed.
- A wrapper that takes any arguments and hands them on as they are hands on a new one too (`hands_on`); one that returns
  what it is given as it is, also what is awaited (`returns_as_it_is`).
- A patch that says `inherited` means what its class inherits, from whatever base.

Everything else is a silent pass, and fails the test of its stack.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from miles_plugins.compat.source import Definition, find_definition, find_module, parse_signature, reading_from
from miles_plugins.compat.stacks import listed_stacks
from miles_plugins.errors import PatchError
from miles_plugins.patches.seam import Seam, all_seams
from miles_plugins.patching import Patch, check_statically, has_parameter
from tests.conftest import MEGATRON, SLIME
from tests.mutations import MUTATIONS, SIBLING, Mutated, NotApplicable
from tests.wheels import unpacked_commit, unpacked_wheel

pytestmark = pytest.mark.upstream

STACKS = {stack.slime: stack for stack in listed_stacks()}
MAIN = next(name for name in STACKS if name.startswith("main-"))
STACKS[f"{MAIN} with sglang 0.5.23"] = replace(STACKS[MAIN], sglang="0.5.23")
REPOSITORY = Path(__file__).parents[1]
INSTALLED = ("torch", "ray")


def folders_of(stack: str) -> tuple[Path, ...]:
    """slime, Megatron-LM and SGLang of one stack; skips with one line where one of them cannot be had."""
    of = STACKS[stack]
    return (
        unpacked_commit((*SLIME[:2], of.slime.removeprefix("main-")), "slime"),
        unpacked_commit((*MEGATRON[:2], of.megatron), "megatron"),
        unpacked_wheel("sglang", of.sglang),
    )


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every stack takes as it is installed, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    for name in INSTALLED:
        file = find_module(name)
        if file is None:
            pytest.skip(f"the upstream tier needs {name} (see CONTRIBUTING.md)")
        (folder / name).symlink_to(file.parent)
    return folder


# -- a copy of upstream ----------------------------------------------------------------------------------------------


class Copy:
    """A package of links to upstream's files but for one, which changes."""

    _times = itertools.count(1)

    def __init__(self, original: Path, package: str, folder: Path) -> None:
        self.original, self.folder = original, folder
        top = next(parent for parent in original.parents if parent.name == package)
        copy = folder / package
        copy.mkdir(parents=True)
        for part in original.relative_to(top).parts:
            for entry in top.iterdir():
                if entry.name not in (part, "__pycache__"):
                    (copy / entry.name).symlink_to(entry)
            top, copy = top / part, copy / part
            if top.is_dir():
                copy.mkdir()
        self.file = copy
        self.sibling = copy.with_name(f"{SIBLING}.py")

    def write(self, mutated: Mutated) -> None:
        self.file.write_text(mutated.text)
        self.sibling.unlink(missing_ok=True)
        if mutated.sibling is not None:
            self.sibling.write_text(mutated.sibling)
        # Parsed files are remembered by their time: no two texts may have the same.
        for file in filter(Path.exists, (self.file, self.sibling)):
            os.utime(file, (now := next(self._times), now))


# -- one mutation ----------------------------------------------------------------------------------------------------


class SilentPass(Exception):
    """The check found nothing wrong with a mutation, and no rule says that nothing is."""


@dataclass(frozen=True)
class Target:
    """What a patch rests on: its own target, or one of its needs."""

    patch: Patch
    seam: Seam
    name: str
    definition: Definition

    @property
    def qualname(self) -> str:
        return self.definition.target.partition(":")[2]

    @property
    def is_need(self) -> bool:
        return self.name != self.patch.target


def verdict(target: Target, mutation: str) -> str:
    """refused, followed, handed on or inherited. Raises SilentPass."""
    patch = target.patch
    # Also which patches are the right ones is decided by the mutated files.
    chosen = [each for each in target.seam.here() if each.id == patch.id]
    said = []
    for each in chosen:
        try:
            said += check_statically(each)
        except PatchError as error:
            said.append(str(error))
            if all(name in str(error) for name in (patch.id, patch.target, target.name)):
                return "refused"
    found = find_definition(target.name)
    if patch not in chosen:
        said.append("other patches were chosen")
    elif found is not None:
        if mutation.startswith("re-exported") and is_same(found, target.definition):
            return "followed"
        if mutation.endswith("base class") and patch.inherited and is_same(found, target.definition):
            return "inherited"
        if ("required" in mutation or "parameters" in mutation) and hands_on(patch, target.definition):
            return "handed on"
        if "async" in mutation and patch.async_too and returns_as_it_is(patch):
            return "handed on"
    raise SilentPass("; ".join(dict.fromkeys(said)) or "the check says nothing")


def is_same(found: Definition, original: Definition) -> bool:
    same = (found.kind, str(found.signature)) == (original.kind, str(original.signature))
    return same and found.fingerprint == original.fingerprint


def hands_on(patch: Patch, definition: Definition) -> bool:
    """Whether a wrapper takes any arguments (after the instance) and hands them on, or drops them all.

    It may look for some by name, if the patch needs parameters of that name; and at all of them, in whatever place.
    """
    if patch.wrap is None:
        return False
    node = written(patch.wrap)
    parameters = [argument.arg for argument in node.args.posonlyargs + node.args.args][1:]
    if parameters["." in patch.qualname :] or not node.args.vararg or not node.args.kwarg:
        return False
    rest = {node.args.vararg.arg, node.args.kwarg.arg}
    used = {id(each) for each in ast.walk(node) if isinstance(each, ast.Name) and each.id in rest}
    allowed, looked_for = set[int](), set[object]()
    for each in ast.walk(node):
        if isinstance(each, (ast.Starred, ast.keyword)):
            allowed.add(id(each.value))
        elif isinstance(each, ast.For):
            allowed.add(id(each.iter))
        elif isinstance(each, (ast.Subscript, ast.Call)) and (key := key_of(each)) is not None:
            allowed.add(id(each.value if isinstance(each, ast.Subscript) else each.func.value))  # type: ignore[attr-defined]
            looked_for.add(key)
    signature = definition.signature
    names = set(signature.parameters) if signature else set()
    needed = {need.parameter for need in patch.needs if need.target == patch.target}
    return used <= allowed and (looked_for & names) <= needed


def key_of(node: ast.Subscript | ast.Call) -> object:
    """ "x" of `something["x"]` and `something.get("x")`."""
    if isinstance(node, ast.Subscript):
        key: ast.expr | None = node.slice
    else:
        key = node.args[0] if ast.unparse(node.func).endswith(".get") and node.args else None
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def returns_as_it_is(patch: Patch) -> bool:
    """Whether a wrapper calls the original only where it returns what that returns, and has nothing to do after it."""
    assert patch.wrap is not None
    node = written(patch.wrap)
    original = node.args.args[0].arg
    last = {id(each.value.func) for each in returns_of(node.body) if isinstance(each.value, ast.Call)}
    uses = {id(each) for each in ast.walk(node) if isinstance(each, ast.Name) and each.id == original}
    return uses <= last


def returns_of(body: list[ast.stmt] | ast.expr) -> Iterator[ast.Return]:
    for node in body if isinstance(body, list) else ():
        if isinstance(node, ast.Return):
            yield node
        elif isinstance(node, ast.If):
            yield from returns_of([*node.body, *node.orelse])


def written(wrapper: Callable[..., object]) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda:
    """The definition of a function in its file."""
    code = inspect.unwrap(wrapper).__code__  # type: ignore[attr-defined]
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return next(
        node
        for node in ast.walk(parsed(code.co_filename))
        if isinstance(node, functions) and node.lineno == code.co_firstlineno
    )


@functools.cache
def parsed(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())


# -- a stack ---------------------------------------------------------------------------------------------------------


def targets_of(seam: Seam) -> Iterator[Target]:
    """Of the patches that are applied to this upstream and whose target can be read."""
    for patch in seam.here():
        notes = check_statically(patch)
        if any(note.startswith("superseded") for note in notes):
            continue
        for name in dict.fromkeys((patch.target, *(need.target for need in patch.needs))):
            definition = find_definition(name)
            if definition is not None and definition.kind != "unknown":
                yield Target(patch, seam, name, definition)


def mutations_of(target: Target) -> list[str]:
    return ["deleted"] if target.is_need else list(MUTATIONS)


def file_and_name(target: Target) -> tuple[Path, str]:
    """Where a target is written; a module that another imports, where it is imported."""
    if target.definition.kind == "module":
        file = find_module(target.patch.module)
        assert file is not None
        return file, target.patch.qualname
    assert target.definition.path is not None
    return target.definition.path, target.qualname


class Suite:
    """Every mutation of every target, each of a release once: stacks share releases, and a verdict needs no other."""

    def __init__(self, installed: Path, folder: Path) -> None:
        self.installed, self.folder = installed, folder
        self.copies: dict[Path, Copy] = {}
        self.known: dict[tuple[Patch, str, Path, str], str] = {}

    def run(self, folders: tuple[Path, ...]) -> tuple[Counter[str], int, list[str]]:
        """Verdicts, the number of targets, and the silent passes."""
        verdicts, silent, count = Counter[str](), [], 0
        everything = (*folders, self.installed)
        with reading_from(*everything):
            targets = [(target, *file_and_name(target)) for seam in all_seams() for target in targets_of(seam)]
        for target, file, qualname in targets:
            count += 1
            for mutation in mutations_of(target):
                key = (target.patch, target.name, file, mutation)
                if key not in self.known:
                    self.known[key] = self.judge(target, mutation, file, qualname, everything)
                if (result := self.known[key]) in ("refused", "followed", "handed on", "inherited"):
                    verdicts[result] += 1
                elif result:
                    silent.append(f"{target.patch.id}  {target.name}  {mutation}: {result}")
        return verdicts, count, silent

    def judge(self, target: Target, mutation: str, file: Path, qualname: str, folders: tuple[Path, ...]) -> str:
        """The verdict; of a silent pass what was said; nothing where the mutation cannot be done."""
        package = target.name.partition(":")[0].partition(".")[0]
        if file not in self.copies:
            self.copies[file] = Copy(file, package, self.folder / str(len(self.copies)))
        copy = self.copies[file]
        try:
            copy.write(MUTATIONS[mutation](file.read_text(), qualname))
        except NotApplicable:
            return ""
        with reading_from(copy.folder, *folders):
            try:
                return verdict(target, mutation)
            except SilentPass as error:
                return str(error) or "silent"


@pytest.fixture(scope="session")
def suite(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite(installed, tmp_path_factory.mktemp("copies"))


@pytest.mark.parametrize("stack", STACKS)
def test_every_mutation_is_detected(stack: str, suite: Suite, record_property: Callable[[str, object], None]) -> None:
    verdicts, targets, silent = suite.run(folders_of(stack))
    assert not silent, f"{len(silent)} silent passes on {stack}:\n" + "\n".join(silent)
    assert verdicts["refused"] > 4 * targets > 0
    record_property("mutations", report(f"{stack}, its files", verdicts, targets))


def report(what: str, verdicts: Counter[str], targets: int) -> str:
    shown = ", ".join(f"{count} {result}" for result, count in verdicts.most_common())
    return f"{what}: {verdicts.total()} mutations of {targets} targets: all detected ({shown})"


# -- loaded upstream -------------------------------------------------------------------------------------------------


# Loaded upstream: the oldest stack, and those in between that differ the most; every stack's files are judged above.
LOADED = ("v0.2.2", "v0.3.0", "v0.3.1", f"{MAIN} with sglang 0.5.23")


@pytest.mark.parametrize("stack", LOADED)
def test_every_mutation_in_memory_is_detected(stack: str, record_property: Callable[[str, object], None]) -> None:
    """What `PatchSet.apply` says of upstream that is loaded; and that it leaves nothing behind."""
    if missing := [name for name in ("torch", "ray", "transformers") if find_spec(name) is None]:
        pytest.skip(f"the upstream tier needs {', '.join(missing)} (see CONTRIBUTING.md)")
    path = os.pathsep.join(map(str, (*folders_of(stack), REPOSITORY)))
    command = [sys.executable, "-m", "tests.mutated_process"]
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    found = [line.removeprefix("RESULT ") for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, result.stderr[-4000:]
    told = json.loads(found[0])
    assert not told["problems"], f"{len(told['problems'])} on {stack}:\n" + "\n".join(told["problems"])
    assert not told["absent"]
    verdicts = Counter(told["counts"])
    assert verdicts["refused"] > 3 * told["targets"] > 0
    record_property("mutations", report(f"{stack}, loaded", verdicts, told["targets"]))


# -- the rules by which something may pass ---------------------------------------------------------------------------


def pure(original, self, *args, **kwargs):
    return original(self, *args, **kwargs)


def finds_by_place(original, self, *args, **kwargs):
    return original(self, *args, **kwargs) if args[0] else None


def finds_by_name(original, self, *args, **kwargs):
    return original(self, *args, **kwargs) if kwargs.get("x") else None


def names(original, self, x, *args, **kwargs):
    return original(self, x, *args, **kwargs)


def takes_no_keywords(original, self, *args):
    return original(self, *args)


def changes(original, self, *args, **kwargs):
    kwargs["x"] = 1
    return original(self, *args, **kwargs)


def binds(original, self, *args, **kwargs):
    bound = inspect.signature(original).bind(self, *args, **kwargs)
    bound.arguments["x"] = 1
    return original(*bound.args, **bound.kwargs)


@pytest.mark.parametrize(
    ("wrapper", "without_need", "with_need"),
    [
        (pure, True, True),
        (finds_by_place, False, False),
        (finds_by_name, False, True),
        (names, False, False),
        (takes_no_keywords, False, False),
        (changes, False, True),
        (binds, False, True),
    ],
)
def test_what_hands_on(wrapper: Callable[..., object], without_need: bool, with_need: bool) -> None:
    target = "m:C.f"
    definition = Definition(target=target, kind="method", signature=parse_signature("(self, x)"))
    needs = (has_parameter(target, "x"),)
    patch = Patch(id="p", target=target, reason="", wrap=wrapper)
    assert hands_on(patch, definition) is without_need
    assert hands_on(replace(patch, needs=needs), definition) is with_need


def acts_after(original, *args):
    result = original(*args)
    print("done")
    return result


def acts_around(original, *args):
    with open("log"):
        return original(*args)


def acts_on_it(original, *args):
    return [original(*args)]


def acts_before(original, *args):
    print("begins")
    if args:
        return original(*args)
    return None


@pytest.mark.parametrize(
    ("wrapper", "answer"), [(acts_after, False), (acts_around, False), (acts_on_it, False), (acts_before, True)]
)
def test_what_returns_as_it_is(wrapper: Callable[..., object], answer: bool) -> None:
    assert returns_as_it_is(Patch(id="p", target="m:f", reason="", wrap=wrapper)) is answer


# -- the command -----------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", "--plugins", "cpu,r3,metrics"]
# One of each package: all of them take their way through the same check.
SAMPLE = (
    ("slime.trainer.report", "deleted"),
    ("megatron.router.select-experts", "moved to another module"),
    ("sglang.scheduler.report", "renamed"),
    ("ray.init.setup-hook", "its parameters renamed"),
    ("torch.cpu.group", "made async, or no longer"),
)


@pytest.mark.parametrize(("name", "mutation"), SAMPLE)
def test_a_mutation_stops_the_command(
    name: str, mutation: str, slime: Path, megatron: Path, upstream_path: str, tmp_path: Path
) -> None:
    patch = next(patch for seam in all_seams() for patch in seam.patches if patch.id == name)
    definition = find_in((slime, megatron), patch)
    assert definition.path is not None
    package = patch.target.partition(".")[0].partition(":")[0]
    copy = Copy(definition.path, package, tmp_path)
    copy.write(MUTATIONS[mutation](definition.path.read_text(), definition.target.partition(":")[2]))
    script = slime / "train.py"
    if package == "slime":  # train.py runs beside its own slime
        script = tmp_path / "train.py"
        script.write_text((slime / "train.py").read_text())
    result = subprocess.run(
        [*COMMAND, "--train-script", str(script), "--num-rollout", "3"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), upstream_path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert patch.target in result.stderr, result.stderr
    assert patch.id in result.stderr
    assert "nothing was changed and nothing was started" in result.stderr


def find_in(folders: tuple[Path, ...], patch: Patch) -> Definition:
    elsewhere = find_module(patch.target.partition(".")[0])
    with reading_from(*folders, *([elsewhere.parent.parent] if elsewhere else [])):
        definition = find_definition(patch.target)
    assert definition is not None
    return definition
