"""How many bytes the rollout engine's weights take, from a model's config.json alone: bf16, INT4 and blockwise FP8.

Counted are the tensors of the checkpoint, each at its stored size; of a GPU, its part of each. Not counted is what an
engine adds when it has loaded them: KV cache, activations, workspaces, SGLang's bf16 copy of MLA's kv_b_proj.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from miles_plugins.checkpoints import text_config
from miles_plugins.errors import PluginError

MODULES = {
    "experts": "routed experts",
    "shared-experts": "shared experts",
    "mlp": "dense MLP",
    "attention": "attention",
}
"""What can be quantised: as a command line names it -> the component."""
COMPONENTS = ("embedding", "attention", "dense MLP", "shared experts", "routed experts", "router", "norms", "lm head")
MTP = "MTP layer"
"""Multi-token prediction: an engine loads it for speculative decoding only, so it is in no total."""
GROUP_SIZES = (128, 64, 32)
MARLIN_K = 64
"""SGLang's INT4 kernel reads K in such tiles (`check_moe_marlin_supports_layer`)."""
FP8_BLOCK = 128
VOCABULARY_PADDING = 64


@dataclass(frozen=True)
class Tensor:
    """Equal weights of one layer.

    Attributes:
        component: what decides about its format; in an MTP layer too.
        shape: of one, [N, K]; of a bias or norm [N].
        count: how many; more than one only of routed experts.
        divided: among the GPUs of a tensor parallel group: `N`, `K`, by `heads` along N (of keys and values, which are
            repeated where there are more GPUs), by `vocabulary` along N, or None: each has the whole.
        units: along the divided axis, what is never cut: heads. 0: each row by itself.
    """

    component: str
    name: str
    layer: int
    shape: tuple[int, ...]
    divided: Literal["N", "K", "heads", "vocabulary"] | None = None
    units: int = 0
    count: int = 1


@dataclass(frozen=True)
class Component:
    name: str
    tensors: tuple[Tensor, ...]

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) * tensor.count for tensor in self.tensors)


@dataclass(frozen=True)
class Format:
    """How the matrices of some components are stored; all else is bf16.

    Attributes:
        components: `int4`: 4 bits a weight, 16 a group, and 8 bytes a matrix (`weight_shape`). `fp8`: a byte a weight
            and 4 bytes a block of 128 x 128.
        group_size: of int4.
    """

    name: Literal["bf16", "int4", "fp8"]
    components: frozenset[str] = frozenset()
    group_size: int = 128


BF16 = Format("bf16")
FP8 = Format("fp8", frozenset(MODULES.values()))
"""What slime's convert_hf_to_fp8.py and SGLang quantise: every linear layer but router, lm_head and eh_proj."""


def int4(group_size: int = 128, modules: Sequence[str] = ("experts",)) -> Format:
    """Raises PluginError if a module is none of MODULES, or SGLang has no kernel for the group size."""
    unknown = [name for name in modules if name not in MODULES]
    if unknown or not modules:
        found = ", ".join(unknown) or "nothing"
        raise PluginError("no such modules to quantise", {"found": found, "known": ", ".join(MODULES)})
    if group_size not in GROUP_SIZES:
        raise PluginError(
            "SGLang's INT4 kernel has no such group size", {"group size": group_size}, f"use {_either(GROUP_SIZES)}"
        )
    return Format("int4", frozenset(MODULES[name] for name in modules), group_size)


@dataclass(frozen=True)
class Layout:
    """How SGLang divides a model among tp * pp GPUs, `--dp-size` 1, without a DeepEP-like backend.

    * By `tp`: embedding and lm_head (rows, padded to a multiple of 64), attention by heads, dense MLP and shared
      experts by their intermediate size. Keys and values are repeated where tp exceeds their heads; MLA's two down
      projections and the biases behind a sum are whole on every GPU.
    * Routed experts: whole ones by `ep`, which divides tp; each by what is left, tp / ep, along its intermediate size.
    * Router and norms: whole on every GPU.
    * Layers by `pp`, as even as can be, one more on each of the last stages; the embedding on the first stage, lm_head
      and last norm on the last. A tied lm_head is there a copy of the embedding.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def stages(self, layers: int) -> list[range]:
        """The layers of each stage."""
        ends = [layers // self.pp * stage + max(0, stage - self.pp + layers % self.pp) for stage in range(self.pp + 1)]
        return [range(*pair) for pair in itertools.pairwise(ends)]

    def ranks(self, tensor: Tensor) -> int:
        """Among how many GPUs each of these weights is divided."""
        if tensor.divided is None:
            return 1
        if tensor.divided == "heads":
            return min(self.tp, tensor.units)
        return self.tp // self.ep if tensor.component == "routed experts" else self.tp

    def part(self, tensor: Tensor) -> Tensor:
        """What one GPU of the tensor's stage has of it. Raises PluginError if it cannot be divided so."""
        n, *k = tensor.shape
        if tensor.divided == "vocabulary":
            n = math.ceil(n / VOCABULARY_PADDING) * VOCABULARY_PADDING
        ranks, size = self.ranks(tensor), k[0] if tensor.divided == "K" else n
        units = tensor.units or size
        if units % ranks or (tensor.divided == "heads" and self.tp % ranks):
            what = f"{units} heads" if tensor.units else f"{'K' if tensor.divided == 'K' else 'N'} = {size}"
            raise PluginError(
                f"{self} does not divide {tensor.name} of layer {tensor.layer}",
                {
                    "shape": list(tensor.shape),
                    "to divide": what,
                    "among": f"{ranks if units % ranks else self.tp} GPUs",
                },
                "choose a --tp that divides it" + (", or a larger --ep" if tensor.count > 1 else ""),
            )
        n, k = (n, [k[0] // ranks]) if tensor.divided == "K" else (n // ranks, k)
        count = tensor.count // self.ep if tensor.component == "routed experts" else tensor.count
        return replace(tensor, shape=(n, *k), count=count)

    def __str__(self) -> str:
        return f"tp {self.tp}, pp {self.pp}, ep {self.ep}"


WHOLE = Layout()

# -- bytes ------------------------------------------------------------------------------------------------------------


def weight_bytes(component: Component, format: Format) -> int:
    """Of the whole component. Raises PluginError where the format does not fit a shape."""
    return sum(_stored(tensor, format, WHOLE) for tensor in component.tensors)


def stage_bytes(components: Sequence[Component], format: Format, layout: Layout) -> list[int]:
    """Of one GPU of each pipeline stage, without MTP layers. Raises PluginError where the layout is impossible."""
    counted = {each.name: each for each in components if each.name != MTP}
    tensors = [tensor for each in counted.values() for tensor in each.tensors]
    layers = 1 + max(tensor.layer for tensor in tensors)
    _check(layout, layers, next((tensor.count for tensor in tensors if tensor.component == "routed experts"), 0))
    if "lm head" not in counted and layout.pp > 1:
        tensors += [replace(tensor, layer=layers - 1) for tensor in counted["embedding"].tensors]
    stages = layout.stages(layers)
    return [sum(_stored(tensor, format, layout) for tensor in tensors if tensor.layer in stage) for stage in stages]


def _check(layout: Layout, layers: int, experts: int) -> None:
    if layout.pp > layers:
        raise PluginError("there are more stages than layers", {"layers": layers, "pp": layout.pp}, "take a lower --pp")
    if layout.tp % layout.ep or (layout.ep > 1 and (not experts or experts % layout.ep)):
        fitting = [ep for ep in _divisors(layout.tp) if ep == 1 or (experts and experts % ep == 0)]
        raise PluginError(
            "the experts cannot be divided so",
            {"ep": layout.ep, "tp": layout.tp, "experts": experts or "none: the model is dense"},
            f"ep divides both tp and the experts: --ep {_either(fitting)}",
        )


def _stored(tensor: Tensor, format: Format, layout: Layout) -> int:
    """Bytes on one GPU."""
    part = layout.part(tensor)
    size = math.prod(part.shape)
    if tensor.component not in format.components or len(part.shape) < 2:
        return 2 * size * part.count
    if format.name == "int4":
        _check_groups(tensor, part, format, layout)
        return (size // 2 + size // format.group_size * 2 + 8) * part.count
    if layout.ranks(tensor) > 1 and part.shape[tensor.divided == "K"] % FP8_BLOCK:
        raise PluginError(
            f"SGLang cannot divide {tensor.name} in fp8 with {layout}",
            {"shape": list(tensor.shape), "on each GPU": list(part.shape), "expected": f"whole blocks of {FP8_BLOCK}"},
            "take a lower --tp" + (", or a larger --ep" if tensor.count > 1 else ""),
        )
    return (size + 4 * math.prod(math.ceil(side / FP8_BLOCK) for side in part.shape)) * part.count


def _check_groups(tensor: Tensor, part: Tensor, format: Format, layout: Layout) -> None:
    """Refuse what SGLang's Marlin path takes without a word, and then serves wrong experts."""
    k, whole = part.shape[-1], math.lcm(MARLIN_K, format.group_size)
    if _fits(k, format.group_size):
        return
    groups = [size for size in GROUP_SIZES if _fits(k, size)]
    ways = [f"convert with --group-size {_either(groups)}"] if groups else []
    if tensor.count > 1 and tensor.divided == "K":
        ways += [
            f"divide by whole experts: --ep {ep}"
            for ep in _divisors(layout.tp)
            if tensor.count % ep == 0
            and tensor.shape[-1] % (layout.tp // ep) == 0
            and _fits(tensor.shape[-1] * ep // layout.tp, format.group_size)
        ][:1]
    where = "" if layout == WHOLE else f" with {layout}"
    raise PluginError(
        f"{tensor.name} cannot be quantised in groups of {format.group_size}{where}",
        {
            "shape": list(tensor.shape),
            "K on each GPU": k if k == tensor.shape[-1] else f"{k} = {tensor.shape[-1]} / {layout.ranks(tensor)}",
            "expected": f"a multiple of {whole}: whole groups, and whole tiles of {MARLIN_K}",
        },
        ", or ".join(ways) or "take a lower --tp, or leave it out of --modules",
    )


def _fits(k: int, group_size: int) -> bool:
    return k % math.lcm(MARLIN_K, group_size) == 0


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(str(each) for each in numbers)


# -- what a config.json describes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What a model_type has that its config.json does not say.

    Attributes:
        bias: whether q, k and v have one; None: as `attention_bias` says.
        output_bias: whether o_proj has one with `attention_bias`.
        qk_norm: whether queries and keys are normalised; None: as `use_qk_norm` says.
        experts: the key of their number; "": the model is dense.
        latent: multi-head latent attention (MLA).
    """

    bias: bool | None = None
    output_bias: bool = False
    qk_norm: bool | None = False
    experts: str = ""
    latent: bool = False


FAMILIES = {
    "llama": Family(output_bias=True),
    "qwen2": Family(bias=True),
    "qwen3": Family(output_bias=True, qk_norm=True),
    "qwen3_moe": Family(output_bias=True, qk_norm=True, experts="num_experts"),
    "glm4_moe": Family(qk_norm=None, experts="n_routed_experts"),
    "deepseek_v3": Family(experts="n_routed_experts", latent=True),
    "kimi_k2": Family(experts="n_routed_experts", latent=True),
}


def components(config: Mapping[str, Any]) -> list[Component]:
    """The components that the model has, in the order of COMPONENTS, last its MTP layers.

    Raises PluginError if the model_type is unknown, or the config lacks a size.
    """
    config = text_config(config)
    model = _Model(config)
    layers = model.size("num_hidden_layers")
    found = [*model.ends(layers), *(tensor for layer in range(layers) for tensor in model.layer(layer))]
    extra = [tensor for n in range(config.get("num_nextn_predict_layers") or 0) for tensor in model.mtp(layers + n)]
    parts = {name: tuple(tensor for tensor in found if tensor.component == name) for name in COMPONENTS}
    return [Component(name, tensors) for name, tensors in {**parts, MTP: tuple(extra)}.items() if tensors]


class _Model:
    def __init__(self, config: Mapping[str, Any]) -> None:
        kind = str(config.get("model_type"))
        if kind not in FAMILIES:
            raise PluginError(
                f"the shapes of model_type {kind} are not known here",
                {"known": ", ".join(FAMILIES)},
                "take one of these, or add its family to miles_plugins/int4_qat/memory.py",
            )
        self.config, self.family = config, FAMILIES[kind]
        self.hidden = self.size("hidden_size")
        self.experts = self.size(self.family.experts) if self.family.experts else 0

    def size(self, key: str, default: int | None = None) -> int:
        found = self.config.get(key)
        found = default if found is None else found
        if type(found) is not int or found < 1:
            raise PluginError(
                "config.json lacks a size", {"key": key, "found": found, "expected": "a positive integer"}
            )
        return found

    def ends(self, layers: int) -> Iterator[Tensor]:
        shape = (self.size("vocab_size"), self.hidden)
        yield Tensor("embedding", "embed_tokens", 0, shape, "vocabulary")
        yield Tensor("norms", "norm", layers - 1, (self.hidden,))
        if not self.config.get("tie_word_embeddings", False):
            yield Tensor("lm head", "lm_head", layers - 1, shape, "vocabulary")

    def layer(self, layer: int) -> Iterator[Tensor]:
        yield Tensor("norms", "input and post-attention layernorm", layer, (2 * self.hidden,))
        yield from self.latent_attention(layer) if self.family.latent else self.attention(layer)
        if self.is_sparse(layer):
            yield from self.mixture(layer)
        else:
            yield from self.mlp("dense MLP", "mlp", layer, self.size("intermediate_size"))

    def is_sparse(self, layer: int) -> bool:
        if not self.experts:
            return False
        if self.family.experts == "num_experts":
            step = self.size("decoder_sparse_step", 1)
            return layer not in (self.config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0
        first = self.config.get("first_k_dense_replace") or 0
        return bool(layer >= first and layer % self.size("moe_layer_freq", 1) == 0)

    def mlp(self, component: str, name: str, layer: int, width: int, count: int = 1) -> Iterator[Tensor]:
        for each in ("gate_proj", "up_proj"):
            yield Tensor(component, f"{name}.{each}", layer, (width, self.hidden), "N", count=count)
        yield Tensor(component, f"{name}.down_proj", layer, (self.hidden, width), "K", count=count)

    def mixture(self, layer: int) -> Iterator[Tensor]:
        width = self.size("moe_intermediate_size")
        yield Tensor("router", "mlp.gate", layer, (self.experts, self.hidden))
        if self.family.experts == "n_routed_experts":
            yield Tensor("router", "mlp.gate.e_score_correction_bias", layer, (self.experts,))
        yield from self.mlp("routed experts", "mlp.experts", layer, width, self.experts)
        if shared := self.config.get("n_shared_experts") or 0:
            yield from self.mlp("shared experts", "mlp.shared_experts", layer, width * shared)

    def attention(self, layer: int) -> Iterator[Tensor]:
        heads = self.size("num_attention_heads")
        groups = self.size("num_key_value_heads", heads)
        # Qwen3's is 128 whatever the rest: to guess it would be to guess wrong.
        head = self.size("head_dim", None if self.family.qk_norm else self.hidden // heads)
        biased = bool(self.config.get("attention_bias", False))
        for name, units in (("q", heads), ("k", groups), ("v", groups)):
            divided: Literal["N", "heads"] = "N" if name == "q" else "heads"
            yield Tensor("attention", f"{name}_proj", layer, (units * head, self.hidden), divided, units)
            if biased if self.family.bias is None else self.family.bias:
                yield Tensor("attention", f"{name}_proj.bias", layer, (units * head,), divided, units)
        yield Tensor("attention", "o_proj", layer, (self.hidden, heads * head), "K", heads)
        if biased and self.family.output_bias:
            yield Tensor("attention", "o_proj.bias", layer, (self.hidden,))
        if self.config.get("use_qk_norm", False) if self.family.qk_norm is None else self.family.qk_norm:
            yield Tensor("norms", "q_norm and k_norm", layer, (2 * head,))

    def latent_attention(self, layer: int) -> Iterator[Tensor]:
        heads, latent = self.size("num_attention_heads"), self.size("kv_lora_rank")
        rope, value = self.size("qk_rope_head_dim"), self.size("v_head_dim")
        plain = self.size("qk_nope_head_dim")
        queries = self.hidden
        if self.config.get("q_lora_rank") is not None:
            queries = self.size("q_lora_rank")
            yield Tensor("attention", "q_a_proj", layer, (queries, self.hidden))
            yield Tensor("norms", "q_a_layernorm", layer, (queries,))
        yield Tensor("attention", "q_proj", layer, (heads * (plain + rope), queries), "N", heads)
        yield Tensor("attention", "kv_a_proj_with_mqa", layer, (latent + rope, self.hidden))
        yield Tensor("norms", "kv_a_layernorm", layer, (latent,))
        yield Tensor("attention", "kv_b_proj", layer, (heads * (plain + value), latent), "N", heads)
        yield Tensor("attention", "o_proj", layer, (self.hidden, heads * value), "K", heads)

    def mtp(self, layer: int) -> Iterator[Tensor]:
        """Its embedding and lm_head are the model's own."""
        yield Tensor(MTP, "eh_proj", layer, (self.hidden, 2 * self.hidden))
        yield Tensor("norms", "enorm, hnorm and shared_head.norm", layer, (3 * self.hidden,))
        yield from self.layer(layer)
