"""Training begins only when every process has reported the driver's plugins, verified."""

from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plugins import attestation
from miles_plugins.attestation import Registry, problems, read_child_reports, summary, write_child_report
from miles_plugins.errors import AttestationError, PatchError, PluginError

DIGEST = "0123456789abcdef"
EXPECTED = {"driver": 1, "rollout_manager": 1, "trainer": 2, "engine": 1, "sglang_server": 1, "sglang_scheduler": 1}
SIDES = {"r3_replay": ("trainer", "rollout_manager", "sglang_scheduler"), "metrics_jsonl": ()}


def report(role: str, pid: int = 1, **changed) -> dict:
    patch = {"id": f"{role}.patch", "target": "slime.train:run", "state": "verified", "detail": "", "reason": "test"}
    return {
        "role": role,
        "pid": pid,
        "rank": None,
        "node": "here",
        "plugins": {"metrics_jsonl": "0.1.0", "r3_replay": "0.1.0"},
        "digest": DIGEST,
        "patches": [patch, {**patch, "id": "armed.patch", "state": "armed"}],
        "probes": {"r3_replay": "works"},
        **changed,
    }


def good() -> list[dict]:
    roles = [role for role, count in EXPECTED.items() for _ in range(count)]
    return [report(role, pid) for pid, role in enumerate(roles, 100)]


def of_role(reports: list[dict], role: str) -> dict:
    return next(each for each in reports if each["role"] == role)


def found(reports: list[dict]) -> list[str]:
    return problems(reports, DIGEST, EXPECTED, SIDES)


# -- problems --------------------------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_good_reports():
    assert found(good()) == []


def test_more_processes_than_expected_are_welcome_if_they_are_good():
    assert found([*good(), report("trainer", 900), report("worker", 901)]) == []


@pytest.mark.parametrize("role", EXPECTED)
def test_a_missing_process_is_named(role):
    reports = good()
    reports.remove(of_role(reports, role))
    assert any(each.startswith(f"{role}: {EXPECTED[role] - 1} of {EXPECTED[role]}") for each in found(reports))


def test_no_report_at_all():
    assert len(found([])) == len(EXPECTED) + len(SIDES["r3_replay"])


def test_another_digest_is_named_with_both():
    reports = good()
    of_role(reports, "engine")["digest"] = "ffff"
    (problem,) = found(reports)
    assert problem.startswith("engine (pid ")
    assert "here" in problem
    assert "ffff" in problem
    assert DIGEST in problem


@pytest.mark.parametrize("state", ["failed", "applied"])
def test_a_patch_that_is_not_verified_is_named(state):
    reports = good()
    of_role(reports, "trainer")["patches"][0] |= {"state": state, "detail": "its probe said no"}
    (problem,) = found(reports)
    for part in ("trainer", "trainer.patch", state, "slime.train:run", "its probe said no"):
        assert part in problem


@pytest.mark.parametrize("state", ["armed", "verified", "superseded"])
def test_a_patch_that_waits_or_is_not_needed_is_no_problem(state):
    reports = good()
    of_role(reports, "trainer")["patches"][0]["state"] = state
    assert found(reports) == []


@pytest.mark.parametrize("role", SIDES["r3_replay"])
def test_a_plugin_must_show_evidence_in_each_of_its_roles(role):
    reports = good()
    del of_role(reports, role)["probes"]["r3_replay"]
    (problem,) = found(reports)
    assert "r3_replay" in problem
    assert f"1 {role}" in problem


def test_no_evidence_is_asked_of_other_roles():
    reports = good()
    for role in ("driver", "engine", "sglang_server"):
        of_role(reports, role)["probes"] = {}
    assert found(reports) == []


def test_a_side_whose_processes_do_not_belong_to_the_run_is_not_asked():
    """--debug-rollout-only: there is no trainer."""
    reports = [each for each in good() if each["role"] != "trainer"]
    expected = {role: count for role, count in EXPECTED.items() if role != "trainer"}
    assert problems(reports, DIGEST, expected, SIDES) == []


DAMAGES = {
    "missing": lambda reports, at: reports.pop(at),
    "digest": lambda reports, at: reports[at].update(digest="ffff"),
    "failed": lambda reports, at: reports[at]["patches"][0].update(state="failed"),
    "applied": lambda reports, at: reports[at]["patches"][1].update(state="applied"),
    "role": lambda reports, at: reports[at].update(role="worker"),
    "evidence": lambda reports, at: reports[at].update(probes={}),
}


@given(st.sets(st.tuples(st.sampled_from(sorted(DAMAGES)), st.integers(0, sum(EXPECTED.values()) - 1))))
def test_any_damage_is_a_problem(damages):
    """Only evidence that no side asks for may be missing."""
    reports = copy.deepcopy(good())
    counts = False
    for kind, at in sorted(damages, key=lambda damage: (-damage[1], damage[0])):  # from the back: `missing` shifts
        if at >= len(reports):
            continue
        counts |= kind != "evidence" or reports[at]["role"] in SIDES["r3_replay"]
        DAMAGES[kind](reports, at)
    assert bool(found(reports)) == counts


def test_the_summary_says_what_runs_where():
    line = summary(good(), DIGEST)
    assert "r3_replay 0.1.0" in line
    assert DIGEST in line
    assert "2 trainer" in line
    assert "7 patches in 7 processes" in line
    assert "\n" not in line


# -- reports of child processes --------------------------------------------------------------------------------------


@pytest.fixture
def _temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(attestation.tempfile, "gettempdir", lambda: str(tmp_path))


pytestmark = pytest.mark.usefixtures("_temporary_folder")


def leave(engine: str, content, pid: int = 1, run: str = "run") -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(attestation.ENGINE, engine)
        patch.setattr(os, "getpid", lambda: pid)
        write_child_report(run, content)


def test_an_engine_reads_the_reports_of_its_own_children():
    leave("e1", report("sglang_server"), pid=1)
    leave("e1", report("sglang_scheduler"), pid=2)
    leave("e2", report("sglang_detokenizer"), pid=3)
    leave("e1", report("sglang_detokenizer"), pid=4, run="another run")
    assert read_child_reports("run", "e1") == [report("sglang_server"), report("sglang_scheduler")]
    assert read_child_reports("run", "e2") == [report("sglang_detokenizer")]
    assert read_child_reports("run", "e3") == []


def test_a_later_report_of_a_process_takes_the_place_of_its_earlier_one():
    leave("e1", report("sglang_server", rank="0"))
    leave("e1", report("sglang_server", rank="1"))
    assert [each["rank"] for each in read_child_reports("run", "e1")] == ["1"]


def test_the_error_that_ended_a_child_is_raised_for_its_engine():
    error = PatchError("the patch does not fit", {"expected": "(self)", "found": "(cls)"}, "use a listed stack")
    leave("e1", report("sglang_server"), pid=1)
    leave("e1", error, pid=77)
    with pytest.raises(AttestationError) as caught:
        read_child_reports("run", "e1")
    for part in ("pid 77", "the patch does not fit", "(cls)", "use a listed stack"):
        assert part in str(caught.value)
    assert read_child_reports("run", "e2") == []


def test_a_half_written_report_is_not_read(tmp_path):
    leave("e1", report("sglang_server"))
    (attestation.folder("run") / "e1-99.partial").write_text('{"role": ')
    assert len(read_child_reports("run", "e1")) == 1
    assert all(json.loads(file.read_text()) for file in attestation.folder("run").glob("*.json"))


def test_reports_are_for_their_owner_only():
    assert attestation.folder("run").stat().st_mode & 0o077 == 0


def test_a_report_that_cannot_be_written_down_leaves_no_file():
    with pytest.raises(TypeError):
        leave("e1", report("sglang_server", rank=object()))
    assert read_child_reports("run", "e1") == []


# -- the registry and the errors -------------------------------------------------------------------------------------


def test_the_registry_keeps_what_it_is_told():
    registry = Registry()
    registry.add([report("engine"), report("sglang_server")])
    registry.add([report("trainer")])
    assert [each["role"] for each in registry.all()] == ["engine", "sglang_server", "trainer"]


def test_registries_of_two_runs_have_two_names():
    assert attestation.registry_name("a") != attestation.registry_name("b")


@pytest.mark.parametrize("kind", [PluginError, PatchError, AttestationError])
def test_errors_cross_processes_whole(kind):
    error = pickle.loads(pickle.dumps(kind("it is broken", {"found": "a\nb", "nothing": None}, "mend it")))
    assert type(error) is kind
    assert str(error) == "it is broken\n  found  a\n         b\n  next   mend it"


def test_a_folder_of_reports_is_private(tmp_path, monkeypatch):
    monkeypatch.setattr(attestation.tempfile, "gettempdir", lambda: str(tmp_path))
    made = attestation.folder("run")
    assert made.stat().st_mode & 0o777 == made.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["writable", "link"])
def test_a_folder_that_others_can_write_is_refused(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(attestation.tempfile, "gettempdir", lambda: str(tmp_path))
    own = tmp_path / f"miles-plugins-{os.getuid()}"
    if damage == "link":
        (tmp_path / "elsewhere").mkdir()
        own.symlink_to(tmp_path / "elsewhere")
    else:
        own.mkdir()
        own.chmod(0o777)
    with pytest.raises(AttestationError, match="not a private folder"):
        attestation.folder("run")


def test_reports_that_were_passed_on_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(attestation.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv(attestation.ENGINE, "one")
    attestation.write_child_report("run", {"role": "sglang_server"})
    assert attestation.read_child_reports("run", "one") == [{"role": "sglang_server"}]
    attestation.forget_child_reports("run", "one")
    assert list(attestation.folder("run").iterdir()) == []
