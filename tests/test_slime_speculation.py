"""slime counts what its SGLang tells; its servers know whether their draft is trained: every release of slime."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miles_plugins.patches.sglang.draft import DRAFT
from miles_plugins.patches.slime import speculation
from miles_plugins.patching import check_statically
from miles_plugins.spec_rl import accept, guards
from tests.test_seams import plugins
from tests.test_spec_accept import LEGACY, NONE, RELEASES
from tests.wheels import unpacked_commit

ROOT = Path(__file__).resolve().parents[1]
SLIME = ("v0.2.2", "v0.2.3", "v0.2.4", "v0.3.0", "v0.3.1", "624b824a898ab0ec1fcb4d373004c7f3852bf515")
SILENT = ("v0.2.2", "v0.2.3", "v0.2.4")  # which compute the two numbers and log none

SCRIPT = """
import json, sys
from types import ModuleType, SimpleNamespace
from argparse import Namespace
from miles_plugins import activation, hookimpl
from miles_plugins.manager import Installed, Plugin, Plugins
from miles_plugins.patches.seam import patch_set
from miles_plugins.spec_rl import accept

module = ModuleType("a")
module.__file__ = ""
module.speculation_counts = hookimpl(lambda meta_info: accept.slimes(meta_info))
plugins = Plugins([Plugin(Installed("a", "a", "1.0", None), module)])
activation._current = activation.Activation(plugins, "worker", "lab")
patches = patch_set(seam for seam in activation._current.seams if seam.name == "speculation counts")
patched, releases = json.loads(sys.argv[1])
if patched:
    patches.arm()
from slime.utils.types import Sample

args = Namespace(sglang_speculative_algorithm="EAGLE", use_slime_router=False, slime_router_middleware_paths=[],
                 use_rollout_routing_replay=False, rollout_top_p=1.0)
found = {}
for name, parts in releases.items():
    sample = Sample()
    for meta_info in parts:
        given = {"finish_reason": {"type": "stop"}, "prompt_tokens": 3, "cached_tokens": 0, **meta_info}
        take = sample._apply_meta_info if hasattr(sample, "_apply_meta_info") else sample.update_from_meta_info
        take(args, given)
    again = Sample.from_dict(sample.to_dict()).spec_info
    found[name] = [sample.spec_info.to_dict(), again.spec_accept_rate, again.spec_accept_length]
print(json.dumps([found, [record.state.value for record in patches.records()]]))
"""


def counted(commit: str, patched: bool, releases: Mapping[str, list[dict[str, Any]]]) -> tuple[dict[str, Any], str]:
    """What slime's own Sample has counted of the parts of a response, by name."""
    slime = unpacked_commit(("SLIME_HOME", "~/slime", commit), "slime")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(slime), str(ROOT)])}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps([patched, releases])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found, (state,) = json.loads(done.stdout.splitlines()[-1])
    return found, state


@pytest.mark.upstream
@pytest.mark.parametrize("commit", SLIME)
def test_slimes_samples_count_what_every_sglang_tells(commit: str) -> None:
    """In two parts, as a partial rollout has, with one between that was never verified."""
    pytest.importorskip("torch")
    parts = {name: [meta_info, NONE, meta_info] for name, meta_info in RELEASES.items()}
    found, state = counted(commit, True, parts)
    assert state == "verified"
    for name, (counts, rate, length) in found.items():
        assert counts == {
            "spec_accept_token_num": 12,
            "spec_draft_token_num": 24,
            "spec_verify_ct": 8,
            "completion_token_num": 20,
        }, name
        assert (rate, length) == (0.5, 2.5), name


@pytest.mark.upstream
@pytest.mark.parametrize("commit", ["v0.2.4", "v0.3.1"])
def test_by_itself_it_counts_nothing_by_the_new_names(commit: str) -> None:
    """Else there would be nothing to patch."""
    pytest.importorskip("torch")
    found, _ = counted(commit, False, {name: [meta_info] for name, meta_info in RELEASES.items()})
    rates = {name: rate for name, (_, rate, _) in found.items()}
    assert rates == {"0.5.9": 0.5, "0.5.12.post1": 0.0, "0.5.15.post1": 0.0, "0.5.23": 0.0}


def source(commit: str) -> str:
    root = unpacked_commit(("SLIME_HOME", "~/slime", commit), "slime") / "slime"
    later = root / "observability" / "rollout_metrics.py"
    return (later if later.is_file() else root / "ray" / "rollout.py").read_text()


@pytest.mark.upstream
@pytest.mark.parametrize("commit", SLIME)
def test_the_two_numbers_are_slimes_own_where_it_logs_none(commit: str) -> None:
    """Computed by slime's function, which some releases never call; ours gives the same, also to those that do."""
    tree = ast.parse(source(commit))
    (function,) = (node for node in tree.body if getattr(node, "name", "") == "_compute_spec_metrics")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == function.name]
    assert (calls == []) is (commit in SILENT)
    function.returns = None
    for argument in function.args.args:
        argument.annotation = None
    scope: dict[str, Any] = {}
    exec(compile(ast.Module([function], []), "slime", "exec"), scope)
    infos = [
        SimpleNamespace(spec_accept_rate=rate, spec_accept_length=length, spec_verify_ct=passes)
        for rate, length, passes in ((0.5, 2.5, 4), (0.25, 1.75, 8), (0.0, 0.0, 0))
    ]
    samples = [SimpleNamespace(spec_info=info) for info in infos]
    theirs = scope[function.name](Namespace(sglang_speculative_algorithm="EAGLE"), samples)
    assert accept.slimes_metrics(samples) == theirs == {"spec_accept_rate": 0.25, "spec_accept_length": 4.25 / 3}


# -- the wrappers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(**implementations: Any) -> None:
        chosen = plugins(**implementations)
        monkeypatch.setattr(speculation, "current", lambda: SimpleNamespace(hook=chosen.hook, plugins=chosen))

    return make


def test_what_a_plugin_does_not_count_slime_counts_by_itself(active: Any) -> None:
    active(speculation_counts=lambda meta_info: None)
    assert speculation.add(lambda self, meta_info: (self, meta_info), "info", meta_info=LEGACY) == ("info", LEGACY)


def test_the_rest_of_a_response_stays_and_the_given_one_is_not_changed(active: Any) -> None:
    active(speculation_counts=lambda meta_info: {"spec_verify_ct": 9})
    given = {"id": "a", "spec_verify_ct": 1}
    _, passed = speculation.add(lambda self, meta_info: (self, meta_info), "info", given)
    assert passed == {"id": "a", "spec_verify_ct": 9}
    assert given == {"id": "a", "spec_verify_ct": 1}


@pytest.mark.parametrize(
    ("algorithm", "trained", "told"),
    [
        ("EAGLE", True, "trained"),
        ("nextn", True, "trained"),
        ("EAGLE", False, "frozen"),
        ("EAGLE3", True, "frozen"),
        ("NGRAM", True, "frozen"),
        (None, True, None),
    ],
)
def test_a_server_is_told_while_it_starts_and_only_then(
    active: Any, monkeypatch: pytest.MonkeyPatch, algorithm: str | None, trained: bool, told: str | None
) -> None:
    active(draft_is_trained=guards.draft_is_trained)
    monkeypatch.delenv(DRAFT, raising=False)
    engine = SimpleNamespace(args=Namespace(enable_mtp_training=trained))  # the flag may be --sglang-config's
    seen = speculation.tell_the_server(
        lambda self, server_args_dict: os.environ.get(DRAFT), engine, {"speculative_algorithm": algorithm}
    )
    assert seen == told
    assert DRAFT not in os.environ


def test_a_server_without_a_draft_beside_one_that_has_is_told_nothing(
    active: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--sglang-config gives each group of engines arguments of its own. What was there before is there again."""
    active(draft_is_trained=lambda args, algorithm: True)
    monkeypatch.setenv(DRAFT, "of the run around this one")
    engine = SimpleNamespace(args=Namespace(sglang_speculative_algorithm="EAGLE"))
    assert speculation.tell_the_server(lambda *_: os.environ.get(DRAFT), engine, {}) is None
    assert os.environ[DRAFT] == "of the run around this one"


def test_a_server_that_does_not_start_leaves_nothing_behind(active: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    active(draft_is_trained=lambda args, algorithm: True)
    monkeypatch.delenv(DRAFT, raising=False)

    def fail(self: Any, server_args_dict: Any) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        speculation.tell_the_server(fail, SimpleNamespace(args=None), {"speculative_algorithm": "EAGLE"})
    assert DRAFT not in os.environ


@pytest.mark.upstream
@pytest.mark.parametrize("commit", SLIME)
def test_the_patches_fit_every_release(commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(unpacked_commit(("SLIME_HOME", "~/slime", commit), "slime")))
    for seam in speculation.SEAMS:
        for patch in seam.here():
            assert check_statically(patch) == [], patch.id
