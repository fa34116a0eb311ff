"""The list of supported stacks is well written, and agrees with what is recorded of its releases."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from miles_plugins.compat.releases import recorded_releases
from miles_plugins.compat.stacks import Stack, Support, listed_stacks
from miles_plugins.entrypoints.compatibility import stack_page
from miles_plugins.entrypoints.patch_facts import MISFIT
from miles_plugins.entrypoints.verdicts import packages_of
from miles_plugins.manager import OWN_DISTRIBUTION, Plugins, installed_plugins
from miles_plugins.patches.seam import needed_seams

STACKS = listed_stacks()
OWN = [name for name, each in installed_plugins().items() if each.distribution == OWN_DISTRIBUTION]


def stacks_of(folder: Path, plugins: str, reasons: str = "") -> tuple[Stack, ...]:
    file = folder / "stacks.toml"
    file.write_text(
        textwrap.dedent(
            f"""
            [reasons]
            {reasons}

            [[stack]]
            slime = "v1"
            megatron = "0123456789abcdef"
            sglang = "1.0"
            plugins = {{ {plugins} }}
            """
        )
    )
    return listed_stacks(file)


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.slime)
def test_every_part_of_a_stack_is_recorded(stack: Stack) -> None:
    assert set(stack.releases) <= {release.name for release in recorded_releases()}


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.slime)
def test_every_plugin_of_ours_has_a_status(stack: Stack) -> None:
    assert set(stack.plugins) == set(OWN)


@pytest.mark.parametrize("plugin", OWN)
@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.slime)
def test_a_plugin_that_is_not_refused_has_only_patches_that_fit(stack: Stack, plugin: str) -> None:
    seams = needed_seams(Plugins.named([plugin]))
    assert packages_of(seams)
    mine = {patch.id for seam in seams for patch in seam.everywhere()}
    misfits = [
        patch
        for release in recorded_releases()
        if release.name in stack.releases
        for patch, verdict in release.patches.items()
        if patch in mine and verdict == MISFIT
    ]
    assert bool(misfits) is (stack.plugins[plugin].status == "refused"), misfits


def test_a_stack_is_read(tmp_path: Path) -> None:
    (stack,) = stacks_of(
        tmp_path, 'a = { status = "limits", reasons = ["slow"] }, b = { status = "works" }', 'slow = "it is slow"'
    )
    assert stack.plugins == {"a": Support("limits", ("it is slow",)), "b": Support("works")}
    assert stack.releases == ("slime v1", "Megatron-LM 012345678", "sglang 1.0")


@pytest.mark.parametrize(
    ("plugins", "reasons", "problem"),
    [
        ('a = { status = "fine" }', "", "v1, a: the status is 'fine', and not one of works, limits, refused"),
        ('a = { status = "limits" }', "", "v1, a: limits needs reasons"),
        ('a = { status = "refused", reasons = [] }', "", "v1, a: refused needs reasons"),
        ('a = { status = "works", reasons = ["slow"] }', 'slow = ""', "v1, a: a plugin that works has no reasons"),
        ('a = { status = "limits", reasons = ["slow"] }', "", r"v1, a: \[reasons\] has no slow"),
        ('a = { status = "works" }', 'slow = "it is"', "stacks.toml: no stack gives the reasons slow"),
    ],
)
def test_a_list_that_contradicts_itself_is_refused(tmp_path: Path, plugins: str, reasons: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        stacks_of(tmp_path, plugins, reasons)


def test_the_page_names_every_stack_reason_and_release() -> None:
    page = "\n".join(stack_page())
    for stack in STACKS:
        assert f"| {stack.slime.replace('main-', 'main ')}" in page
        for text in [stack.note, *(reason for each in stack.plugins.values() for reason in each.reasons)]:
            assert text in page
    for release in recorded_releases():
        assert f"| {release.name} |" in page
