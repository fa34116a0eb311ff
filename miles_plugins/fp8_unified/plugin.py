"""Unified FP8: trainer and engine quantise alike and multiply alike, and what is left of a difference is measured.

The checkpoint says what is FP8 (`chosen`); the rules say whether everything agrees (`rules`). In the trainer those
layers compute the engine's product (`forward_linear`), with the router's probabilities where the engine applies them;
on their way to the engine the same function quantises the same weights (`export_weights`).
"""

from __future__ import annotations

import functools
import logging
import os
import re
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins import ArgumentError, Linear, PluginError, hookimpl
from miles_plugins.checkpoints import CONFIG, read_json, without_drafts
from miles_plugins.discrepancy import Discrepancy, Drift, Result, reduced
from miles_plugins.fp8_unified import blockwise, chosen, facts, rules, travel
from miles_plugins.fp8_unified.aligned import AlignedLinear, rows_of_checkpoint
from miles_plugins.fp8_unified.checkpoint import WEIGHT, Declared, check_scales, read_format
from miles_plugins.fp8_unified.chosen import TRAINED, Chosen
from miles_plugins.fp8_unified.converter import convert_to_fp8
from miles_plugins.fp8_unified.engine import Products, multiply_in_fp8, weights_changed
from miles_plugins.fp8_unified.quantised import quantise_weights
from miles_plugins.places import Place, layer_in, place, place_of, require_all
from miles_plugins.plain_engine import is_plain, tell_nothing_of_the_format

if TYPE_CHECKING:
    import torch

SIDES = ("trainer", "sglang_scheduler")
CONFLICTS = ("int4_qat",)
OTHER_PASSES = {"ref": "ref_log_prob", "teacher": "teacher_log_prob"}

_log = logging.getLogger(__name__)

_chosen: Chosen | None = None
_layers: list[AlignedLinear] = []
_places: Counter[Place] = Counter()
_covered: Counter[Place] = Counter()  # the checkpoint's tensors that these layers are made of
_experts_apart = 1  # ranks that have other experts each
_natural: frozenset[str] = frozenset()  # passes that compute as they would without the plugin
_in_pass: str | None = None
_role, _mode = "", ""
_aligned = False  # whether this trainer's layers are to be
_complete = False  # whether every layer that must be quantised was found
_difference: Discrepancy | None = None  # of the step that runs
_result: Result | None = None  # of the last one
_drift = Drift()
_first_step = True  # of a rollout: later ones differ by what the policy has learnt as well

_at_engine: Chosen | None = None  # of the checkpoint that this engine began with
_arrived = 0  # FP8 weights that came to the engine, in updates too
_products = Products()
_updates = 0  # that have ended


# -- the driver ------------------------------------------------------------------------------------------------------


@hookimpl
def register_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--fp8-train",
        choices=("aligned", "te", "off"),
        default="aligned",
        help="aligned: the trainer's linear layers compute the engine's block-FP8 product, backward in bfloat16; te: "
        "TransformerEngine's FP8 (give --fp8-format e4m3 --fp8-recipe blockwise); off: bfloat16 (default: aligned)",
    )
    parser.add_argument(
        "--fp8-other-passes",
        nargs="*",
        choices=("ref", "teacher", "critic"),
        default=["ref"],
        help="with --fp8-train aligned, passes besides the actor's own that compute so; ref does, so that the KL "
        "begins at zero; give the flag without a value for none (default: ref)",
    )
    parser.add_argument(
        "--fp8-gather",
        choices=("fp8", "bf16"),
        default="fp8",
        help="fp8: each rank quantises its own weights before they are gathered, where blocks allow it; bf16: they are "
        "gathered first; the engine receives the same bytes (default: fp8)",
    )
    parser.add_argument(
        "--fp8-max-kl",
        type=float,
        default=0.05,
        metavar="NATS",
        help="alarm when the k3 estimate of KL(rollout || training) of a step is above this (default: 0.05)",
    )
    parser.add_argument(
        "--fp8-alarm",
        choices=("warn", "stop"),
        default="warn",
        help="what an alarm does: of --fp8-max-kl, of a difference that rises over the steps, and of log-probs that "
        "are not finite (default: warn)",
    )


@hookimpl
def configure(args: Namespace) -> None:
    folder = Path(args.hf_checkpoint)
    found = chosen.read(folder)
    check_scales(folder, found.declared)
    if args.fp8_train == "te":
        _give_transformer_engine_the_same_scales(args, found.declared)
    if args.fp8_train == "aligned":
        _require_trained(folder, found)
    if getattr(args, "sglang_device", None) == "cpu" and getattr(args, "sglang_speculative_algorithm", None):
        raise ArgumentError(
            "the reference that stands for SGLang's FP8 kernels on the CPU takes a draft's layers for the model's",
            {"--sglang-speculative-algorithm": args.sglang_speculative_algorithm},
            "leave speculative decoding out of this rehearsal",
        )
    decisions = rules.judge(facts.from_args(args, os.environ, folder, facts.look_here()))
    for decision in decisions:
        if decision.verdict == "warn":
            _log.warning("%s: %s", decision.rule, decision.sentence)
    if denied := [decision for decision in decisions if decision.verdict == "deny"]:
        raise ArgumentError(
            "trainer, checkpoint and engine do not agree on FP8",
            {each.rule: each.sentence for each in denied},
            "change what is named (`miles-plugins check-fp8` with the same flags shows all of it), or leave fp8 out",
        )
    tell_nothing_of_the_format(args)  # without the format it builds plain layers, which multiply as FP8 ones do


def _give_transformer_engine_the_same_scales(args: Namespace, declared: Declared) -> None:
    """It reads the variable when it is imported: the actor must be started with it."""
    variables = args.train_env_vars
    if isinstance(variables, MutableMapping) and declared.format is not None:
        variables.setdefault(rules.VARIABLE, "1" if declared.format.scale == "float32" else "0")


def _require_trained(folder: Path, found: Chosen) -> None:
    if found.declared.format is None:
        raise ArgumentError(
            "--fp8-train aligned has no product for this checkpoint",
            {"in": folder, "found": "one scale for each matrix", "expected": "weight_block_size [128, 128]"},
            "convert the BF16 checkpoint with `miles-plugins convert-fp8`, or take --fp8-train off",
        )
    if strange := sorted(found.kinds - TRAINED):
        raise ArgumentError(
            "--fp8-train aligned has no layers for some FP8 weights of the checkpoint",
            {"in": folder, "kinds": ", ".join(strange), "known": ", ".join(sorted(TRAINED))},
            "take --fp8-train te or off, or a checkpoint that has these in BF16",
        )


@hookimpl
def prepare_tiny_model(folder: Path) -> Path:
    target = folder.with_name(folder.name + "-fp8")
    convert_to_fp8(folder, target, blockwise.Format())
    return target


# -- training --------------------------------------------------------------------------------------------------------


@hookimpl
def model_built(args: Namespace, role: str) -> None:
    global _chosen, _natural, _role, _mode, _aligned, _complete, _experts_apart
    _chosen = chosen.read(Path(args.hf_checkpoint))
    _natural = frozenset(OTHER_PASSES[name] for name in OTHER_PASSES.keys() - set(args.fp8_other_passes))
    _role, _mode, _aligned, _complete = role, args.fp8_train, _is_aligned(args, role), False
    _experts_apart = getattr(args, "expert_model_parallel_size", None) or 1
    for each in (_layers, _places, _covered):
        each.clear()


def _is_aligned(args: Namespace, role: str) -> bool:
    return args.fp8_train == "aligned" and (role != "critic" or "critic" in args.fp8_other_passes)


@hookimpl
def forward_linear(args: Namespace, role: str, linear: Linear) -> Callable[..., torch.Tensor] | None:
    assert _chosen is not None
    found = place(linear)
    if not _is_aligned(args, role) or found is None or not _chosen.has(linear):
        return None
    assert _chosen.declared.format is not None  # `configure`
    parts, order = rows_of_checkpoint(args, linear)
    layer = AlignedLinear(linear, _chosen.declared.format, parts, order, in_pass=lambda: _in_pass, natural=_natural)
    _places[found] += linear.count
    _covered[found] += linear.count * len(parts)
    _layers.append(layer)
    return layer


@hookimpl
def weigh_expert_outputs(args: Namespace, role: str) -> bool:
    assert _chosen is not None
    return _is_aligned(args, role) and "experts" in _chosen.kinds


@hookimpl
def pass_begins(stage: str, model: Sequence[Any]) -> None:
    global _in_pass, _complete, _difference
    if not _complete and _aligned:
        assert _chosen is not None
        require_all(model, _chosen.places, _places)
        chosen.require_covered(_chosen, _covered, _experts_apart)
        _complete = True
    _forget()
    _in_pass = stage
    _difference = Discrepancy() if stage == "train" else None


@hookimpl
def pass_ends(stage: str, error: BaseException | None) -> None:
    global _in_pass, _result
    _in_pass = None
    _forget()
    if stage == "train" and error is None and _difference is not None:
        _result = reduced(_difference).result()


def _forget() -> None:
    for layer in _layers:
        layer.forget()


# -- how far they are apart ------------------------------------------------------------------------------------------


@hookimpl
def receive_train_data() -> None:
    global _first_step
    _first_step = True


@hookimpl
def microbatch_keys() -> Sequence[str]:
    return ("sample_indices",)


@hookimpl
def training_log_probs(args: Namespace, batch: Mapping[str, Any], log_probs: Sequence[torch.Tensor]) -> None:
    if _difference is not None:
        _difference.add_microbatch(args, batch, log_probs)


@hookimpl
def step_metrics(args: Namespace) -> Mapping[str, float]:
    global _first_step
    if _result is None or not _result.tokens + _result.nonfinite:
        return {}
    if _first_step:
        _raise_alarms(args, _result)
    _first_step = False
    return _result.metrics("fp8/difference/")


def _raise_alarms(args: Namespace, result: Result) -> None:
    """Warn or stop, of this step's numbers; they are the same on every rank that has log-probabilities."""
    facts: dict[str, object] = {}
    if result.nonfinite:
        facts["not finite"] = f"{result.nonfinite} tokens, {100 * result.nonfinite_share:.2g} %"
    if result.k3 > args.fp8_max_kl:
        facts["KL (k3)"] = f"{result.k3:.3g} nats, above --fp8-max-kl {args.fp8_max_kl:g}"
    if rise := _drift.add(result.mean):
        facts["rise"] = f"mean difference from {rise.first:.3g} to {rise.last:.3g} nats in {rise.step} steps"
    if not facts:
        return
    if result.worst:
        worst = result.worst[0]
        facts["worst token here"] = (
            f"{worst.token} at {worst.position} of sample {worst.sample}: "
            f"trainer {worst.train:.4g}, rollout {worst.rollout:.4g}"
        )
    error = PluginError(
        "the trainer's log-probabilities are far from the rollout's",
        facts,
        "compare `miles-plugins check-fp8` with how this run was started; look at the engines' logs of weight updates",
    )
    if args.fp8_alarm == "stop":
        raise error
    _log.warning("%s", error)


# -- weights on their way to the engine ------------------------------------------------------------------------------


@hookimpl
def take_weight_quantization(quantization: Mapping[str, Any]) -> bool | None:
    return True if quantization.get("quant_method") == "fp8" else None


class _AsFp8:
    """How weights travel between ranks (`travel`)."""

    def __init__(self, format: blockwise.Format) -> None:
        self._format = format

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return travel.shape_of(shape, self._format)

    def encode(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return travel.encode([parameter.detach() for parameter in parameters], self._format)


_as_fp8 = functools.cache(_AsFp8)
_PARAMETER = re.compile(r"(.+)\.weight\d*")


@hookimpl
def encode_for_gathering(
    args: Namespace, name: str, shape: tuple[int, int], dtype: torch.dtype, dim: int | None
) -> _AsFp8 | None:
    found, linear = _trainers(args), _PARAMETER.fullmatch(name)
    format = found.declared.format
    if args.fp8_gather == "bf16" or format is None or str(dtype) != "torch.bfloat16" or linear is None:
        return None
    here = place_of(linear[1], layer_in(linear[1]))
    return _as_fp8(format) if here in found.places and travel.fits(args, linear[1], shape, dim, format) else None


@hookimpl
def decode_gathered(
    args: Namespace, name: str, gathered: torch.Tensor, convert: travel.Convert
) -> Sequence[tuple[str, torch.Tensor]]:
    declared = _trainers(args).declared
    assert declared.format is not None  # or it was not encoded
    decoded = travel.decode(name, gathered, convert, declared.format)
    return [pair for name, quantised in decoded for pair in _pair(name, quantised, declared)]


def _trainers(args: Namespace) -> Chosen:
    global _chosen
    _chosen = _chosen or chosen.read(Path(args.hf_checkpoint))
    return _chosen


def _pair(name: str, quantised: blockwise.Quantised, declared: Declared) -> list[tuple[str, torch.Tensor]]:
    return [(name, quantised.codes), (name[: -len(WEIGHT)] + declared.scale, quantised.scale_inv)]


@hookimpl
def export_weights(
    args: Namespace, named_tensors: Sequence[tuple[str, torch.Tensor]]
) -> Sequence[tuple[str, torch.Tensor]]:
    found = _trainers(args)
    selected = [
        name.endswith(WEIGHT) and name[: -len(WEIGHT)] in found.modules and tensor.element_size() > 1
        for name, tensor in named_tensors  # what has travelled as FP8 is FP8 already
    ]
    tensors = [tensor.detach() for (_, tensor), one in zip(named_tensors, selected, strict=True) if one]
    quantised = iter(_quantised(tensors, found.declared))
    exported: list[tuple[str, torch.Tensor]] = []
    for (name, tensor), one in zip(named_tensors, selected, strict=True):
        exported += _pair(name, next(quantised), found.declared) if one else [(name, tensor)]
    return exported


def _quantised(tensors: Sequence[torch.Tensor], declared: Declared) -> Sequence[blockwise.Quantised]:
    if declared.format is None:
        return [blockwise.per_tensor(tensor) for tensor in tensors]
    return quantise_weights(tensors, declared.format)


# -- the engine -------------------------------------------------------------------------------------------------------


def _of_engine(server_args: Any) -> Chosen | None:
    """The FP8 weights of the checkpoint that an engine began with; `model_path` becomes that of an update on disk."""
    global _at_engine
    if _at_engine is None:
        folder = Path(getattr(server_args, "model_path", None) or "")
        if (folder / CONFIG).is_file() and _is_fp8(folder):
            _at_engine = chosen.read(folder)
    return _at_engine


def _is_fp8(folder: Path) -> bool:
    """Frozen models beside the trained one, and drafts, may be anything."""
    try:
        return read_format(read_json(folder / CONFIG)) is not None
    except PluginError:
        return False


@hookimpl
def engine_model_built(server_args: Any, model: torch.nn.Module) -> None:
    found = _of_engine(server_args)
    if found is not None and found.declared.format is not None and is_plain(server_args):
        multiply_in_fp8(model, found.modules.__contains__, found.declared.format, _products)


@hookimpl
def receive_weights(
    server_args: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterable[tuple[str, torch.Tensor]] | None:
    found = _of_engine(server_args)
    if found is None:
        return None
    return _dequantised(named_tensors, found) if is_plain(server_args) else _counted(named_tensors, found)


def _counted(named_tensors: Iterable[tuple[str, torch.Tensor]], found: Chosen) -> Iterator[tuple[str, torch.Tensor]]:
    global _arrived
    for name, tensor in named_tensors:
        _arrived += name.endswith(found.declared.scale)
        yield name, tensor


def _dequantised(
    named_tensors: Iterable[tuple[str, torch.Tensor]], found: Chosen
) -> Iterator[tuple[str, torch.Tensor]]:
    """Plain weights in place of codes and scales, which become the same codes and scales again (`engine`)."""
    global _arrived
    weights_changed()
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in named_tensors:
        end = next((end for end in (WEIGHT, found.declared.scale) if name.endswith(end)), None)
        module = name[: -len(end)] if end else name
        if end is None or module not in found.modules:
            yield name, tensor
            continue
        both = halves.setdefault(module, {})
        both[end] = tensor.clone()  # a bucket's memory may be used again before the other half comes
        if len(both) == 2:
            del halves[module]
            _arrived += 1
            yield module + WEIGHT, _plain(both[WEIGHT], both[found.declared.scale], found.declared)
    weights_changed()
    if halves:
        raise PluginError(
            "an FP8 weight came without its scale, or a scale without its weight",
            {"modules": f"{len(halves)}, such as {next(iter(halves))}"},
            "both must lie in one part of a weight update",
        )


def _plain(codes: torch.Tensor, scale_inv: torch.Tensor, declared: Declared) -> torch.Tensor:
    if declared.format is None:
        return (codes.float() * scale_inv).bfloat16()
    return blockwise.dequantise(blockwise.Quantised(codes, scale_inv), declared.format).bfloat16()


@hookimpl
def after_weight_update(server_args: Any, received: Mapping[str, int]) -> None:
    global _updates
    found = _of_engine(server_args)
    if found is None:
        return
    wanted = without_drafts(found.modules, found.layers)
    chosen.check_received(wanted, found.modules - wanted, found.declared.scale, received)
    weights_changed()  # whatever was computed while they came
    _updates += 1
    if _updates > 1 and (unused := _products.unused):  # a rollout lies between the first and the second
        raise PluginError(
            "FP8 weights of the engine have not multiplied anything in a rollout",
            {"weights": f"{len(unused)} of {len(_products)}, such as {unused[0]}"},
            "report this, with the model's name: its layers multiply in a way of their own",
        )


# -- every process ---------------------------------------------------------------------------------------------------


@hookimpl
def probe(role: str) -> str | None:
    if role == "trainer":
        if _chosen is None:
            raise PluginError("no model was built in this trainer, so nothing is quantised")
        if not _layers:
            return f"{_role}: computes without the plugin (--fp8-train {_mode})"
        kinds = ", ".join(sorted({kind for _, kind in _places}))
        return f"{sum(_places.values())} weights of {len(_layers)} layers multiply in FP8 ({kinds})"
    if role in ("rollout_manager", "sglang_scheduler"):
        if not _arrived:
            return None
        if _products:
            return f"{_arrived} FP8 weights loaded; {len(_products)} parameters multiply in FP8 by the reference"
        return f"{_arrived} FP8 weights loaded"
    return None
