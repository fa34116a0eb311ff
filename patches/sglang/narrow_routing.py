"""SGLang's record of expert routing, without what need not be in it (hook: encode_routed_experts).

SGLang keeps and sends four bytes an expert id, for every layer. Here a record has the MoE layers only, with one byte an
id up to 256 experts and two above: on the device, in the host buffer, and on the way to the detokenizer.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from miles_plugins.activation import current
from miles_plugins.errors import PluginError
from miles_plugins.patches.seam import Seam
from miles_plugins.patches.sglang.routing import RUNNER, SCHEDULER, SOURCE, Plan, Rows, plan_of_this_model
from miles_plugins.patching import Patch, has_parameter

if TYPE_CHECKING:
    import torch

LAYERS = "_miles_plugins_layers"  # attribute of a tensor, pickled with it: the layers it has, and how many there are

_log = logging.getLogger("miles_plugins")


def id_dtype(plan: Plan) -> torch.dtype:
    """The smallest one for the ids of a model's experts; of unknown many, the larger."""
    import torch

    return torch.uint8 if plan.experts is not None and plan.experts <= 256 else torch.int16


# -- the scheduler ---------------------------------------------------------------------------------------------------


def create(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """SGLang's capturer with narrow buffers, the host's allocated and pinned by SGLang itself, and never at full size.

    SGLang is asked for so many tokens of its own that their bytes hold all tokens of ours.
    """
    plan = plan_of_this_model()
    if plan is None:
        return original(*args, **kwargs)  # nothing is to be recorded
    bound = inspect.signature(original).bind(*args, **kwargs)
    tokens = bound.arguments["num_tokens"]
    config = bound.arguments["model_config"].hf_text_config
    every_layer, layers, topk = config.num_hidden_layers, len(plan.layers), config.num_experts_per_tok
    dtype = id_dtype(plan)
    bound.arguments["num_tokens"] = -(-tokens * layers * dtype.itemsize // (every_layer * 4))
    made = original(*bound.args, **bound.kwargs)

    host, device = made.host_cache, made.device_cache.buffer
    for buffer in (host.buffer, device):
        if buffer.dim() != 3 or buffer.shape[1] != every_layer or buffer.shape[2] < topk or buffer.element_size() != 4:
            raise PluginError(
                "SGLang's record of routing is not laid out as this layer knows it",
                {"expected": f"[tokens, {every_layer} layers, {topk}] int32", "found": _described(buffer)},
                "use a listed stack (docs/compatibility.md), or report this with the version of sglang",
            )
    allocated = host.buffer
    host.buffer = allocated.view(dtype).reshape(-1)[: tokens * layers * topk].view(tokens, layers, topk)
    vars(host.buffer).update(vars(allocated))  # 0.5.23 notes there what it has to unpin
    host.num_tokens, host.num_layers = tokens, layers
    narrow = device.new_zeros((device.shape[0], layers, device.shape[2]), dtype=dtype)
    made.device_cache = Rows(narrow, plan, {layer: row for row, layer in enumerate(plan.layers)})
    for read in ("get_topk", "get_routed_experts"):  # the second is its name in 0.5.9
        if hasattr(made, read):
            setattr(made, read, _labelled(getattr(made, read), plan.layers, every_layer))
    _log.info("routing of %d of %d layers is recorded as %s on the host", layers, every_layer, _described(host.buffer))
    return made


def _described(buffer: torch.Tensor) -> str:
    return f"{list(buffer.shape)} {str(buffer.dtype).removeprefix('torch.')}"


def _labelled(read: Callable[..., Any], layers: tuple[int, ...], every_layer: int) -> Callable[..., Any]:
    def read_labelled(*args: Any, **kwargs: Any) -> Any:
        experts = read(*args, **kwargs)
        setattr(experts, LAYERS, (layers, every_layer))
        return experts

    return read_labelled


# -- the detokenizer, or the server where the user does without one --------------------------------------------------


def encode(original: Callable[..., Any], self: Any, recv_obj: Any, *args: Any, **kwargs: Any) -> Any:
    """A plugin's texts in place of SGLang's own; what no plugin wants leaves SGLang as if it had never been narrow."""
    narrow: list[torch.Tensor | None] = recv_obj.routed_experts
    if not _is_narrow(narrow):
        return original(self, recv_obj, *args, **kwargs)
    texts = [_ask(experts) for experts in narrow]
    recv_obj.routed_experts = _left(narrow, texts)
    output = original(self, recv_obj, *args, **kwargs)
    output.routed_experts = [
        theirs if text is None else text for text, theirs in zip(texts, output.routed_experts, strict=True)
    ]
    return output


def encode_directly(original: Callable[..., Any], self: Any, recv_obj: Any, *args: Any, **kwargs: Any) -> Any:
    """With --skip-tokenizer-init the scheduler's tensors come to the server as they are."""
    narrow: Any = getattr(recv_obj, "routed_experts", None)  # not of embeddings
    if _is_narrow(narrow):
        texts = [_ask(experts) for experts in narrow]
        left = _left(narrow, texts)
        recv_obj.routed_experts = [theirs if text is None else text for text, theirs in zip(texts, left, strict=True)]
    return original(self, recv_obj, *args, **kwargs)


def _is_narrow(routed_experts: Any) -> bool:
    """Whether these are tensors that `create` has made narrow: not texts, None, or SGLang's own int32."""
    sizes = [experts.element_size() for experts in routed_experts or () if hasattr(experts, "element_size")]
    return min(sizes, default=4) < 4


def _ask(experts: torch.Tensor | None) -> str | None:
    if experts is None:
        return None
    text: str | None = current().hook.encode_routed_experts(experts=experts)
    return text


def _left(narrow: list[torch.Tensor | None], texts: list[str | None]) -> list[torch.Tensor | None]:
    """What SGLang has to encode, with all layers in int32 again."""
    return [
        _widened(experts) if experts is not None and text is None else None
        for experts, text in zip(narrow, texts, strict=True)
    ]


def _widened(experts: torch.Tensor) -> torch.Tensor:
    import torch

    label = getattr(experts, LAYERS, None)
    if label is None:
        raise PluginError(
            "no plugin encodes the recorded routing, and which layers it is of was lost on the way",
            {"found": _described(experts)},
            "unset SGLANG_USE_PICKLE_IPC=0, or let the plugin's encode_routed_experts answer always",
        )
    layers, every_layer = label
    wide = torch.zeros((experts.shape[0], every_layer, experts.shape[2]), dtype=torch.int32)
    wide[:, list(layers)] = experts.int()
    return wide


CREATE = f"{RUNNER}:RoutedExpertsCapturer.create"
SEAMS = (
    Seam(
        name="narrow routing record",
        hooks=("encode_routed_experts",),
        patches=(
            Patch(
                id="sglang.routing.narrow",
                target=CREATE,
                wrap=create,
                needs=tuple(has_parameter(CREATE, name) for name in ("num_tokens", "model_config")),
                roles=SCHEDULER,
                reason="SGLang records four bytes an expert id, and layers that have no experts",
                upstream=f"{SOURCE}/v0.5.15.post1/python/sglang/srt/state_capturer/base.py",
                retire_when="SGLang records routing as narrow as its ids are",
            ),
            Patch(
                id="sglang.routing.encode",
                target="sglang.srt.managers.detokenizer_manager:DetokenizerManager.handle_batch_token_id_out",
                wrap=encode,
                signature="(self, recv_obj)",
                roles=frozenset({"sglang_detokenizer"}),
                reason="SGLang's answer is base64 of int32, which says neither its shape nor its type",
                upstream=f"{SOURCE}/v0.5.15.post1/python/sglang/srt/managers/detokenizer_manager.py",
                retire_when="SGLang answers with a narrow record that says what it is",
            ),
            Patch(
                id="sglang.routing.encode-directly",
                target="sglang.srt.managers.tokenizer_manager:TokenizerManager._handle_batch_output",
                wrap=encode_directly,
                async_too=True,  # since 0.5.12 it is
                signature="(self, recv_obj)",
                roles=frozenset({"sglang_server"}),
                reason="with --skip-tokenizer-init the detokenizer is passed by, and the server encodes",
                upstream=f"{SOURCE}/v0.5.15.post1/python/sglang/srt/managers/tokenizer_manager.py",
                retire_when="SGLang answers with a narrow record that says what it is",
            ),
        ),
    ),
)
