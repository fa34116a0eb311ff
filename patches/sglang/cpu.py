"""Let SGLang record routing without a GPU (hook: choose_device)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_plugins.patches.seam import Seam
from miles_plugins.patches.torch.cpu import device_mode
from miles_plugins.patching import Patch


def unpinned(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    with device_mode():
        original(self, *args, **kwargs)


SEAMS = (
    Seam(
        name="routing record on the cpu",
        hooks=("choose_device",),
        patches=(
            Patch(
                id="sglang.cpu.routing-record",
                target="sglang.srt.state_capturer.base:BaseHostCache.__init__",
                wrap=unpinned,
                reason="SGLang pins the memory of its routing record, which torch refuses without an accelerator",
                upstream="https://github.com/sgl-project/sglang/blob/v0.5.15.post1/python/sglang/srt/state_capturer/base.py",
                retire_when="SGLang pins memory only when there is an accelerator",
            ),
        ),
    ),
)
