"""A Hugging Face checkpoint on disk and its live model: what is there, where its routers and its weights are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins.checkpoints import BEGUN, CONFIG, quantization_config, read_json
from miles_plugins.embedded.generate_request import listed, refusal
from miles_plugins.errors import ArgumentError, PluginError, UpstreamError

if TYPE_CHECKING:
    import torch


TAKERS = {"compressed-tensors": "int4", "fp8": "fp8"}
"""`quant_method` of a checkpoint -> the plugin that takes it."""


def require_plain(folder: Path) -> None:
    """Raise ArgumentError for quantised weights, which transformers' model gets in bfloat16, from a plugin."""
    quantization = quantization_config(read_json(folder / CONFIG))
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        taker = TAKERS.get(method) if isinstance(method, str) else None
        raise refusal(
            f"the weights of {folder} are quantised, and no plugin takes them",
            f"quant_method {method}",
            next=f"add --plugins {taker}" if taker else "take the BF16 checkpoint of the model's publisher",
        )


def check_model_folder(folder: str | Path) -> dict[str, Any]:
    """Refuse a folder that the engine cannot load, without loading weights; returns its config.json.

    Raises:
        ArgumentError: folder, config.json, tokenizer or weights are missing or unreadable, the architecture is not a
            causal LM that `transformers` knows, or the tokenizer has more tokens than the model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise refusal("there is no model folder", folder, "the folder of a Hugging Face checkpoint")
    if (folder / BEGUN).is_file() and not (folder / "config.json").is_file():
        raise refusal(
            f"{folder} is a conversion that did not finish",
            f"{BEGUN}, and no config.json",
            next="run the same command again: it goes on where it was",
        )
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, vocabulary = config["model_type"], int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise refusal(f"no usable config.json in {folder}", found, "one with model_type and vocab_size") from error
    # Asked here, because transformers makes up an empty tokenizer where it finds none.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise refusal(f"no tokenizer in {folder}", "", "tokenizer.json", "copy the checkpoint whole")
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        raise refusal(f"no weights in {folder}", "", "*.safetensors or pytorch_model*.bin", "copy the checkpoint whole")
    with _loading(folder):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        tokens = len(load_tokenizer(folder))
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    named = config.get("architectures") or [known]
    if known is None or known not in named:
        found = f"model_type {kind}, architectures {named}"
        raise refusal(f"no causal LM that transformers knows in {folder}", found, known, "take such a model")
    if tokens > vocabulary:
        problem = f"vocabulary mismatch between checkpoint and tokenizer in {folder}"
        raise refusal(problem, f"{tokens} tokens in the tokenizer", f"at most vocab_size {vocabulary} of config.json")
    return config


@contextmanager
def _loading(folder: str | Path) -> Iterator[None]:
    """Turn what the loaders of `transformers` raise, which is of many types and long, into one block."""
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        found = f"{type(cause).__name__}: {str(cause).partition('look at the above report')[0][:500]}"
        if isinstance(error, ImportError):
            advice = "a torchvision that does not belong to this torch is a known cause: reinstall it, or take it out"
            raise UpstreamError("transformers cannot be imported whole", {"found": found}, advice) from error
        raise refusal(f"{folder} cannot be loaded", found, next="copy the checkpoint again, whole") from error


def load_tokenizer(folder: str | Path) -> Any:
    with _loading(folder):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def is_quantized(folder: str | Path) -> bool:
    """Whether a checkpoint has weights in a format of its own, which a plugin must turn into plain ones."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization_config") is not None


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's safetensors files. Raises ArgumentError: there is none, or it is unreadable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    tensors: dict[str, torch.Tensor] = {}
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise ArgumentError(
            "the checkpoint has no weights in safetensors",
            {"in": folder, "missing": ", ".join(absent[:4])},
            "copy it whole, or save it again with save_pretrained",
        )
    for file in files:
        try:
            tensors |= load_file(folder / file)
        except (OSError, SafetensorError) as error:
            raise ArgumentError(
                "the checkpoint's weights cannot be read", {"file": folder / file, "error": error}
            ) from error
    return tensors


def save_hugging_face(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint with these tensors, and whatever else is in the folder `source`.

    Raises:
        ArgumentError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "*.bin")
    try:
        shutil.copytree(source, target, ignore=weights, dirs_exist_ok=True)
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise ArgumentError(
            "the checkpoint cannot be written", {"folder": target, "error": error}, "choose another --save-hf"
        ) from error


def load_model(folder: str | Path, dtype_name: str, device: str) -> Any:
    """The causal LM of a folder, ready to generate; of a quantized checkpoint its shape only, with no weights yet.

    Raises ArgumentError, or UpstreamError without transformers.
    """
    import torch

    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise refusal("unknown dtype", dtype_name, "bfloat16 or float32")
    with _loading(folder):
        from transformers import AutoConfig, AutoModelForCausalLM

        if is_quantized(folder):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            del config.quantization_config
            return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval().requires_grad_(False)
        options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
        # transformers only warns, and fills what is missing with random numbers. A draft's layers it never loads.
        problems = {problem: [each for each in info[problem] if not _drafts(model.config, each)] for problem in info}
        if wrong := {problem: listed(sorted(map(str, names))) for problem, names in problems.items() if names}:
            raise refusal(f"the weights in {folder} do not belong to its config.json", wrong)
        return model.to(device).eval().requires_grad_(False)


def _drafts(config: Any, name: object) -> bool:
    """Whether a tensor of the checkpoint is in a layer after the last one, and the config says that those draft."""
    found = re.match(r"model\.layers\.(\d+)\.", str(name))
    drafts = getattr(config, "num_nextn_predict_layers", None) or 0
    return found is not None and 0 <= int(found[1]) - config.num_hidden_layers < drafts


def expert_ids(output: Any) -> Any:
    """The one integer tensor in what a router returns, [tokens, topk]: the experts it chose. None if there is none."""
    import torch

    parts = output if isinstance(output, tuple | list) else (output,)
    ids = [part for part in parts if isinstance(part, torch.Tensor) and part.dtype in (torch.int32, torch.int64)]
    return ids[0] if len(ids) == 1 else None


def find_routers(model: Any) -> dict[int, Any]:
    """layer -> its router: the one module there that returns topk integers for each token of a forward pass.

    Raises:
        UpstreamError: a layer has experts and no such module, or has several.
    """
    import torch

    tokens, topk = 3, getattr(model.config, "num_experts_per_tok", None)
    found: dict[int, dict[str, Any]] = {}

    def hook(layer: int, name: str) -> Callable[..., None]:
        def look(module: Any, inputs: Any, output: Any) -> None:
            ids = expert_ids(output)
            if ids is not None and tuple(ids.shape) == (tokens, topk):
                found.setdefault(layer, {})[name] = module

        return look

    names = {name: re.search(r"\blayers\.(\d+)\.", name) for name, _ in model.named_modules()}
    layers = {name: int(inside[1]) for name, inside in names.items() if inside}
    sparse = {layer for name, layer in layers.items() if name.endswith(".experts")}
    with ExitStack() as hooks, torch.inference_mode():
        for name, layer in layers.items():
            hooks.callback(model.get_submodule(name).register_forward_hook(hook(layer, name)).remove)
        try:
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=model.device), use_cache=False)
        except RuntimeError as error:
            raise refusal("transformers cannot run a model of this shape", error, next="choose other sizes") from error
    claimed = [
        name for name in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(model.config, name, 0)
    ]
    if (claimed and not found) or sparse - set(found) or any(len(routers) > 1 for routers in found.values()):
        facts = {
            "model": f"{type(model).__name__} with {', '.join(claimed)}; layers with experts: {sorted(sparse)}",
            "found": listed([name for routers in found.values() for name in routers]) or "no router",
            "expected": f"one module in each of them that returns [tokens, {topk}] integers",
        }
        raise UpstreamError("the routers are not recognised", facts, "use a Qwen3-MoE model and transformers 5")
    return {layer: next(iter(routers.values())) for layer, routers in sorted(found.items())}


def checkpoint_places(model: Any) -> dict[str, torch.Tensor]:
    """Checkpoint name -> its place in the live model, a view. transformers 5 keeps all experts in one tensor:

    `gate_up_proj` [experts, 2 x intermediate, hidden], gate first, and `down_proj` [experts, hidden, intermediate].
    """
    places: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        value = parameter.detach()
        if leaf == "gate_up_proj" and value.dim() == 3:
            for expert, (gate, up) in enumerate(each.chunk(2) for each in value):
                places[f"{owner}.{expert}.gate_proj.weight"] = gate
                places[f"{owner}.{expert}.up_proj.weight"] = up
        elif leaf == "down_proj" and value.dim() == 3:
            places |= {f"{owner}.{expert}.down_proj.weight": each for expert, each in enumerate(value)}
        else:
            places[name] = value
    return places


def require_known_fusion(model: Any) -> None:
    """Compute one expert from its places and by its module: in nothing else does the layout show.

    Raises:
        UpstreamError: the results differ.
    """
    import torch
    from torch.nn.functional import linear

    places = checkpoint_places(model)
    fused = [name for name, module in model.named_modules() if getattr(module, "gate_up_proj", None) is not None]
    for name in [name for name in fused if f"{name}.0.gate_proj.weight" in places][:1]:
        experts = model.get_submodule(name)
        gate, up, down = (places[f"{name}.0.{part}_proj.weight"] for part in ("gate", "up", "down"))
        with torch.inference_mode():
            x = torch.linspace(-1, 1, gate.shape[1]).to(gate)[None]
            first = torch.zeros(1, 1, dtype=torch.long, device=gate.device)
            found = experts(x, first, torch.ones_like(first, dtype=gate.dtype)).float()
            expected = linear(experts.act_fn(linear(x, gate)) * linear(x, up), down).float()
        if (found - expected).norm() > 0.05 * expected.norm():
            facts = {"module": f"{name} ({type(experts).__name__})", "expected": "gate and up in one tensor, in halves"}
            raise UpstreamError("the experts' weights lie in memory in an unknown way", facts, "use a Qwen3-MoE model")
