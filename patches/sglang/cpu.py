"""Let SGLang record routing without a GPU (hook: choose_device)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patches.torch.cpu import device_mode
from miles_plugins.patching import Patch, has_attribute


def unpinned(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    with device_mode():
        original(self, *args, **kwargs)


def _unpinned(target: str, release: str, file: str) -> Patch:
    return Patch(
        id="sglang.cpu.routing-record",
        target=target,
        wrap=unpinned,
        reason="SGLang pins the memory of its routing record, which torch refuses without an accelerator",
        upstream=f"https://github.com/sgl-project/sglang/blob/{release}/python/sglang/srt/{file}",
        retire_when="SGLang pins memory only when there is an accelerator",
    )


SEAMS = (
    Seam(
        name="routing record on the cpu",
        hooks=("choose_device",),
        patches=(
            _unpinned(
                "sglang.srt.state_capturer.base:BaseHostCache.__init__", "v0.5.15.post1", "state_capturer/base.py"
            ),
        ),
        variants=(
            Variant(
                "SGLang before 0.5.12",
                (
                    _unpinned(
                        "sglang.srt.layers.moe.routed_experts_capturer:_RoutedExpertsHostCache.__init__",
                        "v0.5.9",
                        "layers/moe/routed_experts_capturer.py",
                    ),
                ),
                lacks=(has_attribute("sglang.srt.state_capturer"),),
            ),
        ),
    ),
)
