"""Which weights are FP8, by Hugging Face's names: the one list that converter, weight sync and validator share.

Who else has a list are the checkpoint (the modules with a scale in its index) and SGLang (all linear layers it builds,
less what `modules_to_not_convert` matches). Where the lists differ, weights are cast to FP8 without a scale, or a layer
waits for weights that do not come: `compare` finds it before anything starts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Literal, NamedTuple

from miles_plugins.checkpoints import SENSES, layer_of

KINDS = {
    "experts": re.compile(r".*\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)"),
    "shared-experts": re.compile(r".*\.shared_experts?\.(gate|up|down)_proj"),
    "mlp": re.compile(r".*\.mlp\.(gate|up|down)_proj"),
    # MLA's too: q_a, q_b, kv_a and kv_b.
    "attention": re.compile(r".*\.self_attn\.([qkvo]_proj|q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj)"),
    "indexer": re.compile(r".*\.self_attn\.indexer\.(wq_b|wk)"),
    # in_proj_qkvz is Qwen3-Next's name of both in one. in_proj_a and _b stay: a few rows, which decide about decay.
    "linear-attention": re.compile(r".*\.linear_attn\.(in_proj_qkv|in_proj_z|in_proj_qkvz|out_proj)"),
}
"""What can be FP8: a name for the user, and the modules it means. Nothing else ever is."""
_SENSES = re.compile(SENSES)

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""SGLang's layers that hold several of the checkpoint's modules: all of them are FP8, or none."""
_FUSED_INTO = {part: fused for fused, parts in FUSED.items() for part in parts}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.\w+")
# Built without a quantisation, whatever the checkpoint says: embeddings, the head, routers, what is float32.
_PLAIN = re.compile(
    r"(.*\.)?(embed_tokens|\w*embed\w*|lm_head|shared_head\.head|(mlp|block_sparse_moe)\.gate|shared_expert_gate"
    r"|\w*norm\w*|eh_proj|mtp\.fc|input_proj|weights_proj|conv1d)"
)

Matching = Literal["substring", "module path"]
"""How SGLang reads an entry of `modules_to_not_convert`: 0.5.9 as any part of a name, 0.5.12 and later as a path.

An entry that ends in a dot, which nothing here writes, 0.5.12 never finds; 0.5.15 takes the dot away, as is done here.
"""


# -- the list ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Layers that stay in BF16: Megatron's `--first-last-layers-bf16`, which does not count multi-token prediction.

    Attributes:
        layers: of the model, without those of multi-token prediction.
    """

    layers: int
    at_start: int = 0
    at_end: int = 0

    def __contains__(self, module: object) -> bool:
        layer = layer_of(str(module), self.layers)
        if not layer.isdecimal():
            return False
        return int(layer) < self.at_start or int(layer) >= self.layers - self.at_end


NONE_KEPT = Kept(1 << 30)


def kind(module: str) -> str | None:
    """Which of KINDS a module is; None for one that is never FP8."""
    if _SENSES.match(module):
        return None
    return next((name for name, pattern in KINDS.items() if pattern.fullmatch(module)), None)


def is_fp8(module: str, kept: Kept = NONE_KEPT) -> bool:
    """Whether the weight of a module, by its name without `.weight`, is FP8."""
    return kind(module) is not None and module not in kept


def selected(modules: Iterable[str], kept: Kept = NONE_KEPT) -> frozenset[str]:
    """The modules whose weight is FP8: what the converter quantises."""
    return frozenset(module for module in modules if is_fp8(module, kept))


# -- SGLang's list ----------------------------------------------------------------------------------------------------


class Engine(NamedTuple):
    """What SGLang makes of a checkpoint: the modules it takes for FP8, and fused layers it refuses to build."""

    fp8: frozenset[str]
    torn: frozenset[str] = frozenset()


def in_engine(modules: Iterable[str], not_converted: Collection[str], matching: Matching = "module path") -> Engine:
    """What SGLang takes for FP8.

    SGLang 0.5.9 takes routed experts always for FP8, whatever is listed; later, one entry of one expert takes all
    experts of its layer out. With `substring` the entry `mlp.gate` matches `mlp.gate_up_proj`, too.

    Args:
        modules: all that have a matrix for a weight.
        not_converted: `modules_to_not_convert`.
    """
    entries = tuple(not_converted)
    if matching == "module path":
        bare = [entry.removeprefix("model.").rstrip(".") for entry in entries]
        entries = tuple(dict.fromkeys(name for each in bare if each for name in (each, f"model.{each}")))
    layers: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        if not _PLAIN.fullmatch(module):
            layers[_engine_layer(module)].append(module)
    fp8, torn = set[str](), set[str]()
    for layer, parts in layers.items():
        left = _left_out(layer, parts, entries, matching)
        if len(left) > 1:
            torn.add(layer)
        if left == {False}:
            fp8.update(parts)
    return Engine(frozenset(fp8), frozenset(torn))


def _engine_layer(module: str) -> str:
    """The name of SGLang's layer that a module becomes a part of."""
    if found := _EXPERT.fullmatch(module):
        return found[1]
    above, dot, last = module.rpartition(".")
    return above + dot + _FUSED_INTO.get(last, last)


def _left_out(layer: str, parts: Iterable[str], entries: Collection[str], matching: Matching) -> set[bool]:
    """Whether a layer of SGLang's stays in BF16; both where its parts disagree."""
    if matching == "substring":
        return {_left_out_by_substring(layer, entries)}
    if layer.rpartition(".")[2] in FUSED:
        return {any(_on_path(entry, part) for entry in entries) for part in parts}
    return {any(_on_path(entry, layer) or _names_experts_of(entry, layer) for entry in entries)}


def _left_out_by_substring(layer: str, entries: Collection[str]) -> bool:
    if layer.endswith(".experts"):
        return False
    if layer.endswith("gate_up_proj"):
        both = [layer.removesuffix("gate_up_proj") + part for part in FUSED["gate_up_proj"]]
        return any(entry in layer for entry in entries) or all(part in entries for part in both)
    if "experts" in layer:  # shared ones: only an entry that names them counts
        return any(_names_experts_of(entry, layer) for entry in entries)
    return any(entry in layer for entry in entries)


def _on_path(entry: str, name: str) -> bool:
    """Whether an entry is a part of a name that begins and ends at a dot."""
    return f".{entry}." in f".{name}."


def _names_experts_of(entry: str, layer: str) -> bool:
    return "experts" in layer and "experts" in entry and layer in entry


# -- what to write into a checkpoint ----------------------------------------------------------------------------------


def names_to_leave_out(modules: Iterable[str], fp8: Set[str]) -> tuple[str, ...]:
    """`modules_to_not_convert` of a checkpoint in which only `fp8` of these modules are: exact names, sorted.

    Beside each module its fused layer in SGLang, which 0.5.9 asks for by that name; and the name of a vision tower
    itself, in which SGLang has other names. A router beside a dense MLP is not named where 0.5.9 would find it in
    `gate_up_proj`: no version quantises routers.
    """
    everything = set(modules)
    left = {module for module in everything - fp8 if "embed" not in module.rpartition(".")[2]}
    towers = {found[2] for module in left if (found := _SENSES.match(module))}
    own = (module for module in left if not _SENSES.match(module) and not _EXPERT.fullmatch(module))
    fused = {layer for module in own if (layer := _engine_layer(module)) != module}
    # A tied head is no tensor of the file, and a linear layer of the model all the same.
    entries = left | fused | towers | {"lm_head"}
    layers = {_engine_layer(module) for module in fp8}
    hidden = {
        entry
        for entry in entries
        if _PLAIN.fullmatch(entry) and any(entry in layer and not layer.endswith(".experts") for layer in layers)
    }
    return tuple(sorted(entries - hidden))


# -- the comparison ---------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A module that some take for FP8 and others do not, each by its name in `compare`."""

    module: str
    by: tuple[str, ...]
    not_by: tuple[str, ...]


def compare(sets: Mapping[str, Set[str]]) -> list[Difference]:
    """The modules that are not in all of the sets, sorted by name."""
    everything = frozenset[str]().union(*sets.values())
    return list(_differences(sorted(everything), sets))


def _differences(modules: Iterable[str], sets: Mapping[str, Set[str]]) -> Iterator[Difference]:
    for module in modules:
        by = tuple(name for name, members in sets.items() if module in members)
        if len(by) < len(sets):
            yield Difference(module, by, tuple(name for name in sets if name not in by))


def grouped(differences: Iterable[Difference]) -> dict[str, str]:
    """For an error: "FP8 only by converter, engine" -> how many modules, and the first ones' names."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for module, by, _ in differences:
        groups[by].append(module)
    return {
        f"FP8 only by {', '.join(by)}": f"{len(names)}: {', '.join(names[:3])}{', …' if names[3:] else ''}"
        for by, names in groups.items()
    }
