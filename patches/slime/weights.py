"""slime's weight sync: what leaves the trainer for the engines.

Every path of slime's weights (colocated, nccl, whole and changed checkpoints on disk, `--save-hf`) calls
`convert_to_hf` once a Megatron parameter, and bundles what it returns after that. The exception is
`--megatron-to-hf-mode bridge`, colocated, of slime v0.3.0 and older: int4_qat refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_plugins.activation import current
from miles_plugins.errors import PluginError
from miles_plugins.patches.seam import Seam
from miles_plugins.patches.slime.gather import without_wrappers
from miles_plugins.patching import Patch
from miles_plugins.weights import export


def convert_to_hf(
    original: Callable[..., Any],
    args: Any,
    model_name: str,
    name: str,
    param: Any,
    quantization_config: Any = None,
    **kwargs: Any,
) -> list[Any]:
    if str(param.dtype) == "torch.uint8":  # no parameter is: a plugin has encoded it (patches/slime/gather.py)
        return _decoded(original, args, model_name, name, param, kwargs)
    if quantization_config is not None and current().hook.take_weight_quantization(
        args=args, quantization=quantization_config
    ):
        quantization_config = None
    return export(current().plugins, args, original(args, model_name, name, param, quantization_config, **kwargs))


def _decoded(
    original: Callable[..., Any], args: Any, model_name: str, name: str, gathered: Any, kwargs: dict[str, Any]
) -> list[Any]:
    decoded = current().hook.decode_gathered(
        args=args,
        name=without_wrappers(name),
        gathered=gathered,
        convert=lambda tensor: original(args, model_name, name, tensor, None, **kwargs),
    )
    if decoded is None:
        raise PluginError(
            f"{name} was encoded before it was gathered, and no plugin decodes it",
            {"found": f"uint8 {list(gathered.shape)}"},
            "implement decode_gathered with encode_for_gathering",
        )
    return export(current().plugins, args, decoded)


SEAMS = (
    Seam(
        name="weight export",
        hooks=("export_weights", "take_weight_quantization", "decode_gathered"),
        patches=(
            Patch(
                id="slime.weights.export",
                target="slime.backends.megatron_utils.megatron_to_hf:convert_to_hf",
                wrap=convert_to_hf,
                signature="(args, model_name, name, param, quantization_config=None)",
                roles=frozenset({"trainer"}),
                reason="slime quantizes in a fixed list of formats, and has no hook on the weights it sends",
                upstream=(
                    "https://github.com/THUDM/slime/blob/v0.3.1/slime/backends/megatron_utils/megatron_to_hf/__init__.py"
                ),
                retire_when="slime takes a function that converts or quantizes a parameter from an argument",
            ),
        ),
    ),
)
