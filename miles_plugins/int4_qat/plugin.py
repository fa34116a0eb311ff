"""INT4 quantization-aware training: the trainer computes with the weights that the INT4 engine has, bit for bit.

The checkpoint says what is INT4 (`selection`). In the trainer those layers compute with their weights on the grid
(`forward_weight`), quantized once a pass; on their way to the engine the same function packs them (`export_weights`).
"""

from __future__ import annotations

from argparse import Action, ArgumentError, ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins import Linear, PluginError, hookimpl
from miles_plugins.checkpoints import CONFIG, number_of_layers, without_drafts
from miles_plugins.int4_qat import refusals, selection
from miles_plugins.int4_qat.checkpoint import PACKED, SCALE, SHAPE, packed_modules
from miles_plugins.int4_qat.converter import MODULES, convert_to_int4
from miles_plugins.int4_qat.grid import Grid
from miles_plugins.int4_qat.packed import Packed, dequantise, pack
from miles_plugins.int4_qat.selection import Selection
from miles_plugins.places import Place, place, require_all
from miles_plugins.plain_engine import is_plain, tell_nothing_of_the_format

if TYPE_CHECKING:
    import torch

SIDES = ("trainer", "sglang_scheduler")
OTHER_PASSES = {"ref": "ref_log_prob", "teacher": "teacher_log_prob"}
WEIGHT = ".weight"
TINY_GROUP = 32  # of the tiny models to try it on, whose experts have a K of 32

_selection: Selection | None = None
_grid: Grid | None = None
_layers: list[Int4Weights] = []
_places: Counter[Place] = Counter()
_natural: frozenset[str] = frozenset()  # passes that compute with the weights as they are
_in_pass: str | None = None
_role = ""
_complete = False  # whether every layer that must be quantized was found
_arrived = 0  # packed weights that came to the engine, in updates too
_dequantized = 0  # of them, at one without an INT4 kernel
_packed_at_engine: frozenset[str] | None = None  # modules, of the checkpoint that this engine began with
_layers_at_engine = 0


# -- the driver ------------------------------------------------------------------------------------------------------


class _Names(Action):
    """Names in MODULES, with spaces or commas between them."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None) -> None:
        names = [name for value in values for name in value.split(",") if name]
        if not names or set(names) - MODULES.keys():
            raise ArgumentError(self, f"invalid choice: {' '.join(values)} (choose from {', '.join(MODULES)})")
        setattr(namespace, self.dest, names)


@hookimpl
def register_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--int4-modules",
        nargs="+",
        action=_Names,
        default=["experts"],
        metavar="NAME",
        help="what --hf-checkpoint may have packed; it decides what is quantized, and another set is refused: "
        f"{', '.join(MODULES)} (default: experts)",
    )
    parser.add_argument(
        "--int4-grid",
        choices=("stock", "snapped"),
        default="stock",
        help="stock: the codes that slime's packer and converter give; snapped: those of Kimi-K2 Thinking's files "
        "(default: stock)",
    )
    parser.add_argument(
        "--int4-other-passes",
        nargs="*",
        choices=("ref", "teacher", "critic"),
        default=["ref"],
        help="passes besides the actor's own that compute with quantized weights; ref does, so that the KL begins "
        "at zero; give the flag without a value for none (default: ref)",
    )


@hookimpl
def configure(args: Namespace) -> None:
    refusals.check(args, selection.read(Path(args.hf_checkpoint)))
    tell_nothing_of_the_format(args)  # without the format it builds plain layers, and `receive_weights` fills them


@hookimpl
def prepare_tiny_model(folder: Path) -> Path:
    target = folder.with_name(folder.name + "-int4")
    convert_to_int4(folder, target, Grid(TINY_GROUP))
    return target


# -- training --------------------------------------------------------------------------------------------------------


class Int4Weights:
    """The weights of one layer on the grid: quantized once a pass, dequantized in each forward.

    Within a pass (all microbatches, recomputation, the backward pass) weights do not change; an optimizer step, a
    switch to the reference or back, loading and waking up come between passes. So nothing is kept from one to the next.
    """

    def __init__(self, linear: Linear, grid: Grid) -> None:
        self.linear, self._grid = linear, grid
        self._kept: Packed | None = None
        self.quantized = 0  # how often

    def __call__(self, weights: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if _in_pass in _natural:
            return weights
        packed = self._kept
        if packed is None:
            _require_bfloat16(self.linear, weights)
            packed = pack(weights, self._grid)
            self.quantized += 1
            if _in_pass is not None:
                self._kept = packed
        return list(dequantise(packed).unbind(0))

    def forget(self) -> None:
        """The weights may be others from here on."""
        self._kept = None


def _require_bfloat16(linear: Linear, weights: Sequence[torch.Tensor]) -> None:
    import torch

    if weights[0].dtype != torch.bfloat16:
        raise PluginError(
            f"the weights of {linear.name} cannot be trained on the INT4 grid",
            {"found": weights[0].dtype, "expected": "torch.bfloat16, as the engine's"},
            "train with --bf16",
        )


@hookimpl
def model_built(args: Namespace, model: Sequence[Any], role: str) -> None:
    global _selection, _grid, _natural, _role, _complete
    refusals.check_trainer(args)
    _selection = selection.read(Path(args.hf_checkpoint))
    _grid = _selection.format.grid(args.int4_grid)
    _natural = frozenset(OTHER_PASSES[name] for name in OTHER_PASSES.keys() - set(args.int4_other_passes))
    _role, _complete = role, False
    _layers.clear()
    _places.clear()


@hookimpl
def forward_weight(args: Namespace, role: str, linear: Linear) -> Callable[..., Sequence[torch.Tensor]] | None:
    assert _selection is not None
    assert _grid is not None
    if (role == "critic" and "critic" not in args.int4_other_passes) or not _selection.has(linear):
        return None
    selection.require_divisible(_selection, linear)
    found = place(linear)
    assert found is not None
    _places[found] += linear.count
    _layers.append(Int4Weights(linear, _grid))
    return _layers[-1]


@hookimpl
def pass_begins(stage: str, model: Sequence[Any]) -> None:
    global _in_pass, _complete
    if not _complete and _role == "actor":
        assert _selection is not None
        require_all(model, _selection.places, _places)
        _complete = True
    _forget()
    _in_pass = stage


@hookimpl
def pass_ends(stage: str, error: BaseException | None) -> None:
    global _in_pass
    _in_pass = None
    _forget()


def _forget() -> None:
    for layer in _layers:
        layer.forget()


# -- weights on their way to the engine ------------------------------------------------------------------------------


@hookimpl
def take_weight_quantization(quantization: Mapping[str, Any]) -> bool | None:
    return True if _selection is not None else None


@hookimpl
def export_weights(
    args: Namespace, named_tensors: Sequence[tuple[str, torch.Tensor]]
) -> Sequence[tuple[str, torch.Tensor]]:
    chosen = _selection or selection.read(Path(args.hf_checkpoint))
    grid = chosen.format.grid(args.int4_grid)
    return [pair for name, tensor in named_tensors for pair in _exported(name, tensor, chosen, grid)]


def _exported(name: str, tensor: torch.Tensor, chosen: Selection, grid: Grid) -> Iterator[tuple[str, torch.Tensor]]:
    """What the engine is sent in place of one weight: its packed form if the checkpoint has it packed."""
    import torch

    module = name.removesuffix(WEIGHT)
    if not name.endswith(WEIGHT) or module not in chosen.modules:
        yield name, tensor
        return
    grid.check(name, tuple(tensor.shape))
    packed = pack([tensor.detach().contiguous()], grid)
    yield module + PACKED, packed.packed[0]
    yield module + SCALE, packed.scale[0]
    yield module + SHAPE, torch.tensor(tensor.shape, dtype=torch.int32, device=tensor.device)


# -- the engine -------------------------------------------------------------------------------------------------------


@hookimpl
def receive_weights(
    server_args: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterable[tuple[str, torch.Tensor]] | None:
    kernel = not is_plain(server_args)
    if _packed_at_engine is None:
        _read_checkpoint(server_args, kernel)
    return _counted(named_tensors) if kernel else _unpacked(named_tensors)


def _read_checkpoint(server_args: Any, kernel: bool) -> None:
    """What an update must bring. Before the first weights: `model_path` becomes the folder of an update on disk."""
    global _packed_at_engine, _layers_at_engine
    folder = Path(getattr(server_args, "model_path", None) or "")
    _packed_at_engine = packed_modules(folder) if (folder / CONFIG).is_file() else frozenset()
    if _packed_at_engine:
        _layers_at_engine = number_of_layers(folder)
        if kernel:
            refusals.check_engine(server_args, _packed_at_engine)


def _counted(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    global _arrived
    for name, tensor in named_tensors:
        _arrived += name.endswith(PACKED)
        yield name, tensor


def _unpacked(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Plain weights in place of packed ones: exactly the values that an INT4 kernel would compute with."""
    global _arrived, _dequantized
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in named_tensors:
        end = next((end for end in (PACKED, SCALE, SHAPE) if name.endswith(end)), None)
        if end is None:
            yield name, tensor
            continue
        if end == SHAPE:
            continue
        module = name.removesuffix(end)
        both = halves.setdefault(module, {})
        both[end] = tensor.clone()  # a bucket's memory may be used again before the other half comes
        if len(both) == 2:
            del halves[module]
            _arrived += 1
            _dequantized += 1
            yield module + WEIGHT, dequantise(Packed(both[PACKED], both[SCALE]))
    if halves:
        raise PluginError(
            "a packed weight came without its scales, or scales without their weight",
            {"modules": f"{len(halves)}, such as {next(iter(halves))}"},
            "both must lie in one part of a weight update",
        )


@hookimpl
def after_weight_update(server_args: Any, received: Mapping[str, int]) -> None:
    assert _packed_at_engine is not None  # no model without weights
    wanted = without_drafts(_packed_at_engine, _layers_at_engine)
    refusals.check_received(_tensors(wanted), _tensors(_packed_at_engine - wanted), received)


def _tensors(modules: Iterable[str]) -> set[str]:
    return {module + end for module in modules for end in (PACKED, SCALE)}


# -- every process ---------------------------------------------------------------------------------------------------


def _matrices(linear: Linear) -> int:
    """How many of the checkpoint's are in a layer of the trainer."""
    name = linear.name.rpartition(".")[2]
    return linear.count * {"linear_fc1": 2, "linear_qkv": 3}.get(name, 1)


@hookimpl
def probe(role: str) -> str | None:
    if role == "trainer":
        if _selection is None:
            raise PluginError("no model was built in this trainer, so nothing is quantized")
        if not _layers:
            return f"{_role}: weights as they are"
        kinds, size = ", ".join(sorted(_selection.kinds)), _selection.format.group_size
        weights, matrices = sum(_places.values()), sum(_matrices(layer.linear) for layer in _layers)
        merged = "gate and up" if "attention" not in _selection.kinds else "gate and up, and query, key and value,"
        return (
            f"{_role}: {matrices} INT4 matrices, {merged} in one: {weights} weights of {len(_layers)} layers on the "
            f"grid ({kinds}, groups of {size})"
        )
    if role in ("rollout_manager", "sglang_scheduler"):
        return refusals.engine_evidence(_arrived, _dequantized)
    return None
