"""SGLang's server, scheduler and detokenizer report what they run, once each is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_plugins.patches.seam import Seam
from miles_plugins.patches.slime.processes import report_or_stop
from miles_plugins.patching import Patch

SGLANG = "https://github.com/sgl-project/sglang/blob/v0.5.15.post1/python/sglang/srt/managers"


def report_server(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    report_or_stop("sglang_server")


def report_scheduler(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    report_or_stop("sglang_scheduler")


def report_detokenizer(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    report_or_stop("sglang_detokenizer")


def _patch(role: str, target: str, wrap: Callable[..., Any]) -> Patch:
    return Patch(
        id=f"sglang.{role}.report",
        target=target,
        wrap=wrap,
        roles=frozenset({f"sglang_{role}"}),
        reason="SGLang's own plugins are logged when they fail, and the server goes on without them",
        upstream=f"{SGLANG}/{target.partition(':')[0].rpartition('.')[2]}.py",
        retire_when="SGLang reports its active plugins",
    )


SEAMS = (
    Seam(
        name="sglang processes",
        hooks=(),
        patches=(
            _patch("server", "sglang.srt.managers.tokenizer_manager:TokenizerManager.__init__", report_server),
            _patch("scheduler", "sglang.srt.managers.scheduler:Scheduler.__init__", report_scheduler),
            _patch(
                "detokenizer",
                "sglang.srt.managers.detokenizer_manager:DetokenizerManager.__init__",
                report_detokenizer,
            ),
        ),
    ),
)
