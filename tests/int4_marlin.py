"""SGLang's own INT4 experts are given new weights: `python -m tests.int4_marlin`, on a GPU with SGLang 0.5.15.

A layer of CompressedTensorsWNA16MoE goes through an update (begin, load, end) as the plugin makes it. It must then hold
the same bits as a layer that was loaded with these weights in the first place, in the memory that it had before.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16_moe as sglang_scheme

from miles_plugins.compat.sglang_weights import BEGIN, END
from miles_plugins.int4_qat import plugin
from miles_plugins.int4_qat.grid import Grid
from miles_plugins.int4_qat.packed import pack
from miles_plugins.patches.sglang import weights
from tests.test_activation import plugins

EXPERTS, HIDDEN, INNER, GROUP = 8, 256, 128, 64
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


class Experts(torch.nn.Module):
    """What SGLang's FusedMoE is to the scheme."""

    def __init__(self) -> None:
        super().__init__()
        self.moe_ep_size, self.moe_ep_rank, self.moe_tp_size = 1, 0, 1
        weight_quant = Namespace(num_bits=4, strategy="group", group_size=GROUP, actorder=None, symmetric=True)
        self.scheme = sglang_scheme.CompressedTensorsWNA16MoE(Namespace(quant_format="pack-quantized"), weight_quant)
        with torch.device("cuda"):
            self.scheme.create_weights(self, EXPERTS, HIDDEN, INNER, torch.bfloat16)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in named:
            _, expert, matrix, part = name.split(".")
            if part == "weight_shape":
                continue
            whole = getattr(self.experts, f"{'w2' if matrix == 'down_proj' else 'w13'}_{part}").data[int(expert)]
            columns = {"gate_proj": slice(INNER), "up_proj": slice(INNER, None), "down_proj": slice(None)}[matrix]
            whole[:, columns].copy_(tensor.t())  # SGLang has them transposed


def sent(seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """What the trainer sends for one set of random weights."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for expert in range(EXPERTS):
        for matrix, shape in SHAPES.items():
            weight = torch.randn(shape, generator=generator, device="cuda").bfloat16()
            packed, module = pack([weight], Grid(GROUP)), f"experts.{expert}.{matrix}"
            yield f"{module}.weight_packed", packed.packed[0]
            yield f"{module}.weight_scale", packed.scale[0]
            yield f"{module}.weight_shape", torch.tensor(shape)


def loaded(seed: int) -> Any:
    """A model as SGLang loads it from a checkpoint."""
    model = weights.receive_through_plugins(Model)
    model.load_weights(sent(seed))
    model.experts.scheme.process_weights_after_loading(model.experts)
    return model


def different(one: Any, other: Any) -> int:
    """Elements of packed weights and scales."""
    names = [f"{matrix}_weight_{part}" for matrix in ("w13", "w2") for part in ("packed", "scale")]
    return sum(int((getattr(one.experts, name) != getattr(other.experts, name)).sum()) for name in names)


def tensors(model: Any) -> dict[str, int]:
    given = {**dict(model.experts.named_parameters()), "workspace": model.experts.workspace}
    return {name: tensor.data_ptr() for name, tensor in given.items() if tensor.numel()}


def main() -> None:
    given = plugins(receive_weights=plugin.receive_weights, after_weight_update=plugin.after_weight_update)
    weights.current = lambda: Namespace(plugins=given, hook=given.hook)  # type: ignore[assignment,return-value]
    weights._scheduler = Namespace(server_args=Namespace(json_model_override_args="{}"))
    weights._of_all_ranks = lambda mine: [mine]
    plugin._packed_at_engine = frozenset(f"experts.{expert}.{matrix}" for expert in range(EXPERTS) for matrix in SHAPES)
    plugin._layers_at_engine = 1

    model, fresh = loaded(1), loaded(2)
    before, places = different(model, fresh), tensors(model)

    def act(action: str) -> None:
        weights.handle(None, Namespace(_get_model=lambda: model), action=action)  # type: ignore[arg-type]

    act(BEGIN)
    model.load_weights(sent(2))
    act(END)
    after, moved = different(model, fresh), [name for name, place in tensors(model).items() if place != places[name]]
    print(f"elements that differ from a fresh load: {before} before the update, {after} after it")
    print(f"tensors that moved: {', '.join(moved) or 'none'}")
    if after or moved or not before:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
