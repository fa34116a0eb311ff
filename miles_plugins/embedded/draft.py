"""A draft (multi-token prediction) beside the rollout model: a decoder layer of its kind that proposes what may follow.

As SGLang serves the drafts of GLM-4.5 and DeepSeek-V3: at a position i it is given the trunk's state of i, after the
final norm, and the embedding of the token at i + 1, and says which token is at i + 2. From its own output it goes on.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins.embedded.generate_request import listed, refusal
from miles_plugins.embedded.hugging_face import checkpoint_places, read_tensors

if TYPE_CHECKING:
    import torch

DRAFT_PARTS = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
"""What the draft's layer of a checkpoint has beside the parts of a decoder layer."""
LAYERS_KEY = "num_nextn_predict_layers"


def is_of_draft(name: str, layers: int) -> bool:
    """Whether a tensor of a checkpoint belongs to the draft of a model with so many layers: it is numbered after."""
    return name.startswith(f"model.layers.{layers}.")


class Draft:
    """The draft of one model of `transformers`, whose embedding and output head it uses.

    Attributes:
        module: its own weights.
    """

    def __init__(self, model: Any) -> None:
        """With no weights yet. `model` is the causal LM; its last layer says of which kind the draft's is."""
        import torch

        trunk, config = model.base_model, copy.deepcopy(model.config)
        self._model, self._layers = model, config.num_hidden_layers
        with_experts = hasattr(trunk.layers[-1].mlp, "experts")
        config.num_hidden_layers, config.decoder_sparse_step = 1, 1
        config.mlp_only_layers, config.layer_types = [] if with_experts else [0], None
        block = type(trunk)(config)  # a layer and a norm, with masks, positions and cache as the trunk has them
        block.embed_tokens = torch.nn.Identity()
        hidden, norm = config.hidden_size, type(trunk.norm)
        parts = {
            "enorm": norm(hidden, eps=config.rms_norm_eps),
            "hnorm": norm(hidden, eps=config.rms_norm_eps),
            "eh_proj": torch.nn.Linear(2 * hidden, hidden, bias=False),
            "block": block,
        }
        self.module = torch.nn.ModuleDict(parts).to(model.device, model.dtype).eval().requires_grad_(False)

    def places(self) -> dict[str, torch.Tensor]:
        """Name in a checkpoint -> its place here, a view."""
        return {self._name(name): place for name, place in checkpoint_places(self.module).items()}

    def _name(self, name: str) -> str:
        name = name.replace("block.layers.0.", "").replace("block.norm.", "shared_head.norm.")
        return f"model.layers.{self._layers}.{name}"

    def states(
        self, tokens: torch.Tensor, before: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """[rows, n, hidden], from which the output head tells the token after each of `tokens`, and the filled cache.

        Args:
            tokens: [rows, n] int64.
            before: [rows, n, hidden], the state of the position before each token: the trunk's, or the draft's own.
            mask: [rows, cached + n], True or 1 where a slot may be looked at.
            positions: [rows, n] int64, those of `before`.
            cache: what the last call returned; None at first.
        """
        import torch

        parts = self.module
        embedded = self._model.get_input_embeddings()(tokens)
        joined = torch.cat([parts["enorm"](embedded), parts["hnorm"](before)], dim=-1)
        output = parts["block"](
            inputs_embeds=parts["eh_proj"](joined),
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state, output.past_key_values

    def load(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Take the draft's tensors of a checkpoint. Raises ArgumentError unless they are these, in their shapes."""
        import torch

        places = self.places()
        wrong = {
            "missing": sorted(places.keys() - tensors.keys()),
            "not in a draft": sorted(tensors.keys() - places.keys()),
            "wrong shape": [n for n, place in places.items() if n in tensors and tensors[n].shape != place.shape],
        }
        if problems := {problem: listed(names) for problem, names in wrong.items() if names}:
            raise refusal(
                f"{folder} has no draft for this model",
                problems,
                f"one in the layer model.layers.{self._layers}",
                "give a checkpoint with a draft as --sglang-speculative-draft-model-path",
            )
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(tensors[name])


def tensors_of_draft(folder: Path, layers: int) -> dict[str, torch.Tensor]:
    """Those of a checkpoint that belong to the draft of a model with so many layers. Raises as `read_tensors`."""
    return {name: tensor for name, tensor in read_tensors(folder).items() if is_of_draft(name, layers)}


def add_random_draft(folder: Path, seed: int) -> None:
    """Give a checkpoint in one file a random draft, its layer shaped as the last one; the other tensors stay.

    Raises OSError or SafetensorError where it cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    file = folder / "config.json"
    config = json.loads(file.read_text())
    tensors, layers, hidden = read_tensors(folder), config["num_hidden_layers"], config["hidden_size"]
    last, ours = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    shapes = {ours + name.removeprefix(last): t.shape for name, t in tensors.items() if name.startswith(last)}
    shapes |= {ours + part: torch.Size([hidden]) for part in DRAFT_PARTS}
    shapes[f"{ours}eh_proj.weight"] = torch.Size([hidden, 2 * hidden])
    generator = torch.Generator().manual_seed(seed)
    for name, shape in sorted(shapes.items()):
        random = torch.randn(shape, generator=generator) * config["initializer_range"]
        tensors[name] = (torch.ones(shape) if len(shape) == 1 else random).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file.write_text(json.dumps({**config, LAYERS_KEY: 1}, indent=2) + "\n")
