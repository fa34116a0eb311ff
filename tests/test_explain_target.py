"""`miles-plugins explain TARGET` says who changes a function of upstream, in which order, and shows both sources."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys

import pytest
from click.testing import CliRunner, Result

from miles_plugins.compat.source import find_definition, source_fingerprint
from miles_plugins.entrypoints import explain_target as command
from miles_plugins.entrypoints.bodies import our_body, our_place, upstream_body
from miles_plugins.entrypoints.cli import main
from miles_plugins.entrypoints.explain_target import explain_target, resolve_target
from miles_plugins.errors import PluginError
from miles_plugins.patches.seam import Seam, Variant, all_seams
from miles_plugins.patching import Patch, has_attribute

UPSTREAM = '''
raise ImportError('must not be imported')
def plant(seed, depth=1):
    """Plant it."""
    hole = dig(depth)
    return [*hole, seed]

def prune(): ...

class Tree:
    """A tree."""

    @property
    def height(self):
        return 1

    @decorated
    def grow(self):
        self.height += 1

limit = 7
'''


def plant_deeper(original, seed, depth=1):
    return original(seed, depth + 1)


def count_seeds(original, *args, **kwargs):
    return original(*args, **kwargs)


def plant_flat(seed, depth=1):
    """Plant it."""
    hole = []
    return [*hole, seed]


def greener(base):
    return type("Green", (base,), {})


def patch(target: str = "grove:plant", id: str = "grove.deeper", **declared) -> Patch:
    ways = {} if {"replace", "replace_with", "add", "wrap"} & set(declared) else {"wrap": plant_deeper}
    return Patch(**{"id": id, "target": target, "reason": f"why {id}", **ways, **declared})


@pytest.fixture
def grove(site, monkeypatch):
    """An upstream that cannot be imported, and what is declared for it."""
    (site / "grove").mkdir()
    (site / "grove" / "__init__.py").write_text(UPSTREAM.lstrip())
    (site / "grove" / "again.py").write_text("from grove import plant\n")

    def declare(*patches: Patch, hooks: tuple[str, ...] = ("metrics_logged",), variants: tuple[Variant, ...] = ()):
        seam = Seam("grove", hooks, patches, variants=variants)
        monkeypatch.setattr(command, "all_seams", lambda: [seam])

    declare(patch(), patch("grove:Tree.grow", id="grove.grow"))
    yield declare
    assert "grove" not in sys.modules


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain", *arguments], env={"COLUMNS": "120"})


def shown(*arguments: str) -> str:
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return done.output


# -- which is meant ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("grove:plant", "grove:plant"),
        ("grove.plant", "grove:plant"),
        ("grove.deeper", "grove:plant"),
        ("Tree.grow", "grove:Tree.grow"),
        ("grove.Tree.grow", "grove:Tree.grow"),
        ("grove.prune", "grove:prune"),
        ("grove.Tree.height", "grove:Tree.height"),
        ("grove.again.plant", "grove.again:plant"),
        ("grove:nothing", "grove:nothing"),
    ],
)
def test_the_ways_to_name_a_target(grove, name, target):
    assert explain_target(name)["target"] == target


def test_the_end_of_a_name_must_be_enough(grove):
    patches = [patch("grove:Tree.grow", id="a"), patch("grove.shed:Tree.grow", id="b")]
    with pytest.raises(PluginError, match="is several targets") as raised:
        resolve_target("Tree.grow", patches)
    assert raised.value.facts == {"targets": "grove.shed:Tree.grow\ngrove:Tree.grow"}
    assert resolve_target("shed:Tree.grow", patches) == "grove.shed:Tree.grow"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Tree.grows", "grove:Tree.grow"),
        ("grove.deper", "grove.deeper"),
        ("grove.prunes", "grove:prune"),
        ("meadow.mow", ""),
        ("meadow:mow", ""),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(grove, name, near):
    done = run(name)
    assert done.exit_code == 1
    assert (
        f"Error: neither a patch nor anything installed is named {name}" in done.output or "grove:deper" in done.output
    )
    if name == "Tree.grows":
        assert re.search(r"nearest +grove:Tree.grow\n", done.output)


@pytest.mark.parametrize("each", [each for seam in all_seams() for each in seam.patches][::9], ids=lambda each: each.id)
def test_every_patch_is_found_by_its_id_and_by_its_target(each):
    for name in (each.id, each.target, each.target.replace(":", ".")):
        facts = explain_target(name)
        assert facts["target"] == each.target
        assert each.id in [fact["id"] for fact in [*facts["patches"], *facts["idle"]]] + facts["elsewhere"]


# -- who changes it ----------------------------------------------------------------------------------------------------


def test_what_is_known_of_a_patch_of_it(grove):
    links = {"upstream": "https://example.org/grove", "retire_when": "trees do it"}
    grove(patch(roles=frozenset({"trainer"}), signature="(seed)", **links))
    text = shown("grove:plant")
    for words in (
        r"^grove:plant\n  here  .*grove/__init__.py:2\n        function \(seed, depth=1\)$",
        r"^  1  grove.deeper wraps it: fits$",
        r"^ +fit +drifted: it also takes depth$",
        r"^ +why +why grove.deeper$",
        r"^ +for +metrics \(metrics_logged\)$",
        r"^ +in +trainer$",
        r"^ +until +trees do it$",
        r"^ +upstream +https://example.org/grove$",
        r"^ +code +plant_deeper, tests/test_explain_target.py:\d+$",
        r"^  2  upstream's own$",
    ):
        assert re.search(words, text, re.M), words


def test_the_chain_of_wrappers_by_whatever_name_they_call_it(grove):
    by_name = patch("grove.again:plant", id="x.outer", before=("grove.deeper",), wrap=count_seeds)
    idle = patch(id="x.idle", superseded_when=has_attribute("grove:prune"))
    grove(patch(), by_name, idle, patch("grove:prune", id="x.other"))
    for name in ("grove:plant", "grove.again:plant"):
        facts = explain_target(name)
        assert [fact["id"] for fact in facts["patches"]] == ["x.outer", "grove.deeper"]
        assert [fact["id"] for fact in facts["idle"]] == ["x.idle"]
    text = shown("grove:plant")
    assert re.search(r"1  x.outer wraps[\s\S]+2  grove.deeper wraps[\s\S]+3  upstream's own\n  idle: x.idle, ", text)


def test_of_the_layer_itself(grove):
    grove(patch(), hooks=())
    assert "every plugin: it belongs to the layer itself" in shown("grove:plant")


def test_patches_for_other_releases_are_named(grove):
    old = Variant("grove 0.9", (patch(id="grove.old"),), has=(has_attribute("grove:nothing"),))
    grove(patch(), variants=(old,))
    facts = explain_target("grove.old")
    assert (facts["target"], facts["elsewhere"]) == ("grove:plant", ["grove.old"])
    assert "in other releases of upstream: grove.old" in shown("grove:plant")


def test_of_two_releases_patches_of_one_id_the_one_for_here_is_meant(grove):
    other = Variant("grove 0.9", (patch("grove:prune"),), has=(has_attribute("grove:prune"),))
    grove(patch(), variants=(other,))
    assert explain_target("grove.deeper")["target"] == "grove:prune"
    grove(patch(), variants=(Variant("grove 0.9", other.patches, has=(has_attribute("grove:nothing"),)),))
    assert explain_target("grove.deeper")["target"] == "grove:plant"


def test_what_nobody_changes(grove):
    text = shown("grove:prune")
    assert "Nobody changes it." in text
    assert re.search(r"These are changed, and are the nearest:\n  grove:plant\n  grove:Tree.grow", text)
    assert "What a call passes through" not in text


def test_what_upstream_does_not_have(grove):
    text = shown("grove:plants")
    assert "upstream has no such name, or is not installed" in text
    assert "Upstream has, and are the nearest:\n  grove:plant\n" in text


def test_a_third_partys_plugin_is_not_imported_and_that_is_said(grove, site):
    (site / "lengths.py").write_text("raise RuntimeError('imported')\n")
    info = site / "lengths-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lengths\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text("[miles_plugins]\ncount_lengths = lengths\n")
    assert "not asked whether they need it: count_lengths" in shown("grove:plant")
    assert "lengths" not in sys.modules


# -- the sources -------------------------------------------------------------------------------------------------------


def test_a_wrapper_stands_before_upstreams_body(grove):
    text = shown("grove:plant", "--diff")
    _, _, sources = text.partition("What runs: + is the patch's, the rest upstream's\n")
    lines = sources.splitlines()
    assert re.fullmatch(r"\+ # grove.deeper wraps it: plant_deeper, tests/test_explain_target.py:\d+", lines[0])
    assert lines[1:4] == ["+ def plant_deeper(original, seed, depth=1):", "+     return original(seed, depth + 1)", "+"]
    assert re.fullmatch(r"  # upstream: .*grove/__init__.py:2", lines[4])
    assert lines[5:] == [
        "  def plant(seed, depth=1):",
        '      """Plant it."""',
        "      hole = dig(depth)",
        "      return [*hole, seed]",
    ]
    assert "What runs" not in shown("grove:plant")


def test_of_a_replacement_there_is_a_unified_diff(grove):
    body = find_definition("grove:plant").fingerprint
    replacement = patch(id="grove.flat", replace=plant_flat, fingerprints={"here": body})
    grove(replacement, patch(id="grove.count", wrap=count_seeds))
    lines = explain_target("grove:plant", with_sources=True)["sources"]
    assert [fact["id"] for fact in explain_target("grove:plant")["patches"]] == ["grove.count", "grove.flat"]
    start = next(index for index, line in enumerate(lines) if line.startswith("--- upstream  "))
    assert "+ def count_seeds(original, *args, **kwargs):" in lines[:start]
    assert lines[start + 1].startswith("+++ grove.flat  plant_flat, tests/test_explain_target.py:")
    assert lines[start + 3 :] == [
        "-def plant(seed, depth=1):",
        "+def plant_flat(seed, depth=1):",
        '     """Plant it."""',
        "-    hole = dig(depth)",
        "+    hole = []",
        "     return [*hole, seed]",
    ]


def test_of_a_class_only_how_it_begins(grove):
    grove(patch("grove:Tree", id="grove.green", replace_with=greener))
    lines = explain_target("grove:Tree", with_sources=True)["sources"]
    assert "+ def greener(base):" in lines
    assert lines[-2:] == ["  class Tree:", "      …  # 9 lines"]


def test_the_body_of_a_method_has_its_decorators_and_a_value_its_line(grove):
    assert upstream_body(find_definition("grove:Tree.grow")) == [
        "@decorated",
        "def grow(self):",
        "    self.height += 1",
    ]
    assert upstream_body(find_definition("grove:limit")) == ["limit = 7"]


def test_what_has_no_source(grove):
    assert upstream_body(find_definition("math:sqrt")) == []
    assert our_body(patch("grove:new", id="new", add=7)) == ["7"]
    assert our_place(patch("grove:new", id="new", add=7)) == "7"
    assert our_body(patch(wrap=functools.partial(plant_deeper))) == inspect.getsource(plant_deeper).splitlines()
    passes_on = (lambda inner: patch(wrap=lambda original: inner(original)))(count_seeds)
    assert inspect.getsource(count_seeds).splitlines() == our_body(passes_on)[1:]


def test_the_sources_of_a_plugin_are_not_a_diff():
    done = run("r3", "--diff")
    assert done.exit_code == 1
    assert "package.module:function" in done.output


# -- the command -------------------------------------------------------------------------------------------------------


def test_json_is_what_the_function_gives(grove):
    assert json.loads(shown("grove:plant", "--diff", "--json")) == explain_target("grove:plant", with_sources=True)
    assert json.loads(shown("grove:plant", "--json"))["sources"] == []


def test_every_key_is_documented(grove):
    documented = re.findall(r"^    (\w+):", inspect.getdoc(explain_target), re.M)
    assert [name for name in documented if name != "PluginError"] == list(explain_target("grove:plant"))


def test_the_body_found_is_the_one_that_is_named(grove, site):
    facts = explain_target("grove:plant")
    (found,) = facts["here"]
    assert (found["kind"], found["signature"]) == ("function", "(seed, depth=1)")

    def plant(seed, depth=1):
        hole = dig(depth)  # noqa: F821
        return [*hole, seed]

    assert found["fingerprint"] == source_fingerprint(plant)
