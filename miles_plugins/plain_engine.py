"""An engine that has no kernels for a quantised checkpoint: it is built plain, and a plugin fills it.

SGLang has none on the CPU; the embedded host's engine is transformers' model.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any


def tell_nothing_of_the_format(args: Namespace) -> None:
    """Let SGLang on the CPU build plain layers, whatever the checkpoint's `quantization_config` says (driver)."""
    if getattr(args, "sglang_device", None) == "cpu":
        given = json.loads(args.sglang_json_model_override_args or "{}")
        args.sglang_json_model_override_args = json.dumps({**given, "quantization_config": None})


def is_plain(server_args: Any) -> bool:
    """Whether an engine has plain layers in place of quantised ones."""
    overrides = getattr(server_args, "json_model_override_args", None)
    return overrides is None or json.loads(overrides or "{}").get("quantization_config", "its own") is None
