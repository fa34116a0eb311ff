"""slime's command line: plugins add flags and check the result, and an unknown flag is an error."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plugins import ArgumentError, hookimpl
from miles_plugins.activation import ROLE
from miles_plugins.manager import Installed, Plugin, Plugins
from miles_plugins.patches.slime import arguments
from miles_plugins.patches.slime.arguments import refuse_external_engines, refuse_unknown_flags

KNOWN = ["--lr", "--lr-decay-style", "--num-experts", "--rollout-batch-size", "--train-backend", "-h", "--help"]


def plugin(name: str, **declared) -> Plugin:
    module = ModuleType(name)
    vars(module).update({"__file__": "", **declared})
    return Plugin(Installed(name, "some-plugins", "1.0", None), module)


@pytest.fixture
def active(monkeypatch):
    """The plugins of this process, and nothing else of an activation."""

    def make(*plugins: Plugin, environment: dict[str, str] | None = None) -> Plugins:
        chosen = Plugins(plugins)
        layer = SimpleNamespace(
            plugins=chosen,
            hook=chosen.hook,
            process_environment=lambda role: {**(environment or {}), "ROLE": role},
            allowed_flags=("--mine",),
        )
        monkeypatch.setattr(arguments, "current", lambda: layer)
        return chosen

    return make


# -- unknown flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--lr", "1e-6"],
        ["--lr=1e-6", "--num-experts=8"],
        ["--lr", "-1e-6", "--num-experts", "-1", "-1", "-.5"],
        ["--rollout-b", "8", "--num=8"],
        ["value", "a--b", "-x", "-", "", "--"],
        ["--lr=--unknown"],
        ["--help"],
    ],
    ids=" ".join,
)
def test_known_flags_pass(argv):
    refuse_unknown_flags(argv, KNOWN[:1], KNOWN)


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--rollout-batchsize", "--rollout-batch-size"),
        ("--lrr", "--lr"),
        ("--num_experts", "--num-experts"),
        ("--rollout-batch-size-", "--rollout-batch-size"),
    ],
)
@pytest.mark.parametrize("form", ["{} 8", "{}=8", "{}"])
def test_an_unknown_flag_is_refused_with_the_nearest(flag, nearest, form):
    with pytest.raises(ArgumentError, match=r"^unknown flag: ") as caught:
        refuse_unknown_flags(["--lr", "1", *form.format(flag).split()], KNOWN)
    assert caught.value.facts == {flag: f"did you mean {nearest}?"}


def test_an_unknown_flag_that_is_like_nothing():
    with pytest.raises(ArgumentError) as caught:
        refuse_unknown_flags(["--zzzzzzzz"], KNOWN)
    assert caught.value.facts == {"--zzzzzzzz": "nothing is named like it"}


def test_a_truncated_flag_is_unknown_to_megatrons_parser():
    with pytest.raises(ArgumentError, match="did you mean --rollout-batch-size"):
        refuse_unknown_flags(["--rollout-batch-siz", "4"], ["--rollout-batch-size"], ["--sglang-device"])
    refuse_unknown_flags(["--sglang-dev", "cpu"], ["--rollout-batch-size"], ["--sglang-device"])


def test_all_unknown_flags_are_named_once():
    with pytest.raises(ArgumentError, match=r"^unknown flags: ") as caught:
        refuse_unknown_flags(["--aaa", "1", "--lr", "1", "--bbb=2", "--aaa=3"], KNOWN)
    assert list(caught.value.facts) == ["--aaa", "--bbb"]


def test_a_plugins_flag_without_its_plugin_is_explained():
    with pytest.raises(ArgumentError, match="plugin's flags exist only while") as caught:
        refuse_unknown_flags(["--metrics-jsonl", "x"], KNOWN)
    assert "--plugins" in str(caught.value.next)
    refuse_unknown_flags(["--metrics-jsonl", "x"], [*KNOWN, "--metrics-jsonl"])


FLAGS = st.sampled_from([each for each in KNOWN if each.startswith("--")])


@given(st.lists(st.tuples(FLAGS, st.integers(3, 30), st.sampled_from([" ", "=", ""]), st.integers(-9, 9))))
def test_what_argparse_accepts_is_accepted(words):
    """Flags, their beginnings, with a value beside, joined or absent."""
    argv = [
        part for flag, cut, joint, value in words for part in f"{flag[:cut]}{joint}{value if joint else ''}".split(" ")
    ]
    refuse_unknown_flags(argv, KNOWN[:1], KNOWN)


def test_the_known_flags_of_slimes_first_parser():
    """slime looks for these before it builds the parsers whose flags are collected."""
    refuse_unknown_flags(["--train-backend", "megatron", "--debug-rollout-only"], arguments._PRE_PARSED)


# -- the plugins' own flags ------------------------------------------------------------------------------------------


def extended(*given_words: str) -> tuple[argparse.ArgumentParser, Namespace]:
    """A parser as slime builds it: Megatron's, extended by the function that slime hands over."""

    def get_slime_extra_args_provider(add_custom_arguments=None):
        def add_slime_arguments(parser):
            parser.add_argument("--rollout-batch-size", type=int)
            return parser

        return add_slime_arguments

    provider = arguments.add_plugin_arguments(get_slime_extra_args_provider)
    parser = provider(argparse.ArgumentParser(allow_abbrev=False))  # as Megatron's
    return parser, parser.parse_args(given_words)


@pytest.fixture
def _own_options(monkeypatch):
    monkeypatch.setattr(arguments, "_main_options", {"--known-to-megatron"})
    monkeypatch.setattr(arguments, "_sglang_options", {"--sglang-known"})


@hookimpl
def register_arguments(parser):
    parser.add_argument("--length-log-limit", type=int, default=3)


@pytest.mark.usefixtures("_own_options")
def test_plugins_add_flags_in_a_group_of_their_own(active):
    active(plugin("length_log", register_arguments=register_arguments), plugin("other"))
    parser, parsed = extended("--length-log-limit", "5", "--rollout-batch-size", "8")
    assert (parsed.length_log_limit, parsed.rollout_batch_size) == (5, 8)
    assert "plugin length_log" in parser.format_help()
    assert "plugin other" not in parser.format_help()
    assert {"--length-log-limit", "--rollout-batch-size"} <= arguments._main_options


@pytest.mark.usefixtures("_own_options")
def test_a_hook_under_another_function_name_adds_its_flags(active):
    @hookimpl(specname="register_arguments")
    def add_flags(parser):
        parser.add_argument("--length-log-limit", type=int)

    active(plugin("length_log", add_flags=add_flags))
    assert extended("--length-log-limit", "5")[1].length_log_limit == 5


@pytest.mark.usefixtures("_own_options")
def test_the_flags_of_the_sglang_parser_are_known():
    parser = argparse.ArgumentParser()
    original = lambda parser: parser.add_argument("--sglang-device")  # noqa: E731
    arguments.record_sglang_options(original, parser)
    refuse_unknown_flags(["--sglang-dev", "cpu"], [], arguments._sglang_options)


# -- after slime's own checks ----------------------------------------------------------------------------------------


def parse(monkeypatch, *argv: str, **parsed) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    return arguments.parse_args(lambda *args: Namespace(**{"train_env_vars": {}, **parsed}))


@pytest.mark.usefixtures("_own_options")
def test_plugins_configure_what_slime_has_parsed(active, monkeypatch):
    @hookimpl
    def configure(args):
        args.limit = args.limit + 1

    active(plugin("length_log", configure=configure))
    assert parse(monkeypatch, limit=3).limit == 4


@pytest.mark.usefixtures("_own_options")
def test_an_unknown_flag_ends_before_any_plugin_is_asked(active, monkeypatch):
    active(plugin("length_log", configure=hookimpl(lambda args: pytest.fail("asked"))))
    with pytest.raises(ArgumentError, match="unknown flag"):
        parse(monkeypatch, "--mistyped")


@pytest.mark.usefixtures("_own_options")
def test_a_mistyped_flag_explains_slimes_own_complaint(active, monkeypatch):
    active(plugin("length_log"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--known-to-megatro", "3"])

    def parse_args():
        raise AssertionError("known_to_megatron is not set")

    with pytest.raises(ArgumentError, match="did you mean --known-to-megatron") as caught:
        arguments.parse_args(parse_args)
    assert isinstance(caught.value.__cause__, AssertionError)


def test_a_parser_that_was_not_seen_is_not_taken_for_all_well(active, monkeypatch):
    active(plugin("length_log"))
    monkeypatch.setattr(arguments, "_main_options", set())
    with pytest.raises(ArgumentError, match="could not be checked"):
        parse(monkeypatch)


@pytest.mark.usefixtures("_own_options")
def test_a_flag_that_the_script_reads_itself_may_pass(active, monkeypatch):
    active(plugin("length_log"))
    parse(monkeypatch, "--mine")


@pytest.mark.usefixtures("_own_options")
def test_a_plugin_refuses(active, monkeypatch):
    @hookimpl
    def configure(args):
        raise ArgumentError("not with these")

    active(plugin("length_log", configure=configure))
    with pytest.raises(ArgumentError, match="not with these"):
        parse(monkeypatch)


@pytest.mark.usefixtures("_own_options")
def test_trainers_get_the_plugins_environment_under_the_users_own(active, monkeypatch):
    active(plugin("length_log"), environment={"A": "plugin's", "B": "plugin's"})
    parsed = parse(monkeypatch, train_env_vars={"B": "user's", ROLE: "user's"})
    assert parsed.train_env_vars == {"A": "plugin's", "B": "user's", "ROLE": "trainer", ROLE: "trainer"}


@pytest.mark.parametrize(
    ("sides", "refused"),
    [
        ({"a": ("trainer", "sglang_scheduler"), "b": ("trainer",)}, "a"),
        ({"a": ("sglang_server",), "b": ("sglang_scheduler",)}, "a, b"),
        ({"a": ("trainer",)}, None),
    ],
    ids=["one", "both", "none"],
)
def test_engines_of_somebody_else_are_refused_where_a_plugin_acts_in_engines(active, sides, refused):
    active(*(plugin(name, SIDES=roles) for name, roles in sides.items()))
    refuse_external_engines(Namespace(rollout_external=False))
    refuse_external_engines(Namespace())
    external = Namespace(rollout_external=True, rollout_external_engine_addrs=["10.0.0.1:30000", "10.0.0.2:30000"])
    if refused is None:
        refuse_external_engines(external)
        return
    with pytest.raises(ArgumentError) as caught:
        refuse_external_engines(external)
    assert caught.value.facts == {"plugins": refused, "engines": "10.0.0.1:30000, 10.0.0.2:30000"}


@pytest.mark.usefixtures("_own_options")
def test_engines_of_somebody_else_are_refused_before_a_plugin_is_asked(active, monkeypatch):
    asked = hookimpl(lambda args: pytest.fail("asked"))
    active(plugin("a", SIDES=("sglang_server",), configure=asked))
    with pytest.raises(ArgumentError, match="externally launched"):
        parse(monkeypatch, rollout_external=True, rollout_external_engine_addrs=["x"])
