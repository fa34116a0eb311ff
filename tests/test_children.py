"""How many of an SGLang server's processes must report, and what happens when one does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from miles_plugins import AttestationError, attestation
from miles_plugins.patches.slime import processes


def server(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"tp_size": 1, "pp_size": 1, "nnodes": 1, "node_rank": 0, **changed})


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {"sglang_server": 1, "sglang_scheduler": 1, "sglang_detokenizer": 1}),
        ({"tp_size": 8, "pp_size": 2}, {"sglang_server": 1, "sglang_scheduler": 16, "sglang_detokenizer": 1}),
        ({"tp_size": 16, "nnodes": 2}, {"sglang_server": 1, "sglang_scheduler": 8, "sglang_detokenizer": 1}),
        ({"tp_size": 16, "nnodes": 2, "node_rank": 1}, {"sglang_scheduler": 8}),
        ({"encoder_only": True}, {}),
    ],
)
def test_each_process_of_a_server_is_expected(changed: dict[str, Any], expected: dict[str, int]) -> None:
    assert processes.expected_children(server(**changed)) == expected


@pytest.fixture
def run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(attestation.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(processes, "current", lambda: SimpleNamespace(run="run"))
    monkeypatch.setenv(attestation.ENGINE, "engine")
    return "run"


def test_all_that_reported_are_passed_on(run: str) -> None:
    attestation.write_child_report(run, {"role": "sglang_scheduler"})
    assert processes.wait_for_children("engine", {"sglang_scheduler": 1}) == [{"role": "sglang_scheduler"}]


def test_one_scheduler_of_two_is_not_enough(run: str) -> None:
    attestation.write_child_report(run, {"role": "sglang_scheduler"})
    with pytest.raises(AttestationError, match="do not report") as caught:
        processes.wait_for_children("engine", {"sglang_scheduler": 2, "sglang_detokenizer": 1}, timeout=0.3)
    assert caught.value.facts == {"sglang_scheduler": "1 missing", "sglang_detokenizer": "1 missing"}


def test_reports_of_another_engine_do_not_count(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(attestation.ENGINE, "other")
    attestation.write_child_report(run, {"role": "sglang_scheduler"})
    with pytest.raises(AttestationError):
        processes.wait_for_children("engine", {"sglang_scheduler": 1}, timeout=0.3)


def test_a_childs_own_error_is_raised(run: str) -> None:
    attestation.write_child_report(run, AttestationError("this one is not right"))
    with pytest.raises(AttestationError, match="this one is not right"):
        processes.wait_for_children("engine", {"sglang_scheduler": 1})
