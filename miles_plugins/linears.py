"""The linear layers of a Megatron model, and the weights that they compute with: the hook `forward_weight`.

Where plugins want more than other weights, `products` does it (`forward_linear`).

Each selected layer, and no other, gets its own `Substitute`; nothing is decided by class. How it is reached:

* Megatron's own Column- and RowParallelLinear hand their weight to `_forward_impl` (patches/megatron/linear.py).
* TransformerEngine's layers ask `self._get_weight_tensors()`; the instance gets its own, which answers with other
  weights while its forward pass runs and with the parameters otherwise: weight gradients that are computed later
  (`backward_dw`) are written onto what it returns.
* Megatron's legacy GroupedMLP reads two parameters that hold all experts, K before N.

The gradient goes straight through. Where a layer adds its weight gradient to `main_grad` itself
(--gradient-accumulation-fusion), what it computes with carries the parameter's `main_grad`, and the parameter is told
that its gradient has arrived: no zeros are added, and no uninitialised placeholder either.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from miles_plugins import products
from miles_plugins.errors import PluginError, UpstreamError
from miles_plugins.gradients import arrived
from miles_plugins.manager import Plugins
from miles_plugins.products import SUBSTITUTE, require_free

if TYPE_CHECKING:
    import torch

Change = Callable[[Sequence["torch.Tensor"]], Sequence["torch.Tensor"]]


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear layer, or one of the two of a group of experts.

    Attributes:
        name: its module's name within the model, without wrappers: "decoder.layers.3.mlp.experts.linear_fc1".
        layer: the number of its transformer layer in the whole model, from 0; None outside, as the output layer.
        shape: [N, K] of each weight, on this rank.
        count: how many weights it has: one, or one an expert.
        module: Megatron's or TransformerEngine's.
        parameters: names in the module; their tensors are [N, K], but for a legacy GroupedMLP.
    """

    name: str
    layer: int | None
    shape: tuple[int, int]
    count: int
    module: torch.nn.Module
    parameters: tuple[str, ...]
    kind: str = field(repr=False)

    @property
    def is_multi_token_prediction(self) -> bool:
        """Whether it is in a block that predicts further tokens; `layer` then counts those blocks."""
        return self.name.startswith("mtp.") or ".mtp." in self.name


# -- finding them -----------------------------------------------------------------------------------------------------


def linear_layers(model: Sequence[torch.nn.Module]) -> Iterator[Linear]:
    """The linear layers with weights of their own, in the order of the modules, of all chunks of a model."""
    for chunk in model:
        numbers: dict[str, int] = {}  # name of a transformer layer -> its number in the whole model
        for full_name, module in chunk.named_modules():
            name = re.sub(r"^(module\.)+", "", full_name)
            number = getattr(module, "layer_number", None)
            if isinstance(number, int) and re.search(r"(^|\.)layers\.\d+$", name):
                numbers[name] = number - 1
            kind = _kind(module)
            if kind is not None:
                yield from _of(module, name, _layer(name, numbers), kind)


def _layer(name: str, numbers: Mapping[str, int]) -> int | None:
    """That of the outermost layer around it: inside of a multi-token prediction block there is another one."""
    parts = name.split(".")
    around = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((numbers[prefix] for prefix in around if prefix in numbers), None)


def _kind(module: torch.nn.Module) -> str | None:
    names = {base.__name__ for base in type(module).__mro__}
    origin = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    if "GroupedMLP" in names and hasattr(module, "weight1"):
        return "grouped_mlp"
    if callable(getattr(module, "_get_weight_tensors", None)):
        return "transformer_engine"
    if callable(getattr(module, "_forward_impl", None)) and getattr(module, "weight", None) is not None:
        return "megatron"
    if "transformer_engine" in origin and names & {"GroupedLinear", "Linear", "LayerNormLinear"}:
        return "transformer_engine"  # an old one: refused as soon as a plugin wants it
    return None


def _of(module: torch.nn.Module, name: str, layer: int | None, kind: str) -> Iterator[Linear]:
    own = dict(module.named_parameters(recurse=False))
    if kind == "grouped_mlp":
        experts = int(module.num_local_experts)
        hidden = own["weight1"].shape[0]
        inner = own["weight2"].numel() // (experts * hidden)
        shapes = {"weight1": (own["weight1"].shape[1] // experts, hidden), "weight2": (hidden, inner)}
        for number, (parameter, shape) in enumerate(shapes.items(), 1):
            yield Linear(f"{name}.linear_fc{number}", layer, shape, experts, module, (parameter,), kind)
        return
    weights = tuple(each for each in own if re.fullmatch(r"weight\d*", each))
    if weights:
        n, k = tuple(own[weights[0]].shape)[-2:] if own[weights[0]].dim() >= 2 else (0, 0)
        yield Linear(name, layer, (n, k), len(weights), module, weights, kind)


# -- asking the plugins -----------------------------------------------------------------------------------------------


def offer(plugins: Plugins, args: Namespace, model: Sequence[torch.nn.Module], role: str) -> None:
    """Ask every plugin, for every linear layer of a model that was just built, what it shall compute, and with what.

    Raises:
        PluginError: two plugins want one layer.
        UpstreamError: a layer that a plugin wants cannot be reached.
    """
    wanted = plugins.implement("forward_weight") or plugins.implement("forward_linear")
    for linear in linear_layers(model) if wanted else ():
        weights = list(plugins.ask_each("forward_weight", args=args, role=role, linear=linear))
        computations = list(plugins.ask_each("forward_linear", args=args, role=role, linear=linear))
        if len(weights) + len(computations) > 1:
            raise PluginError(
                "two plugins want to choose what one layer computes",
                {"layer": linear.name, "plugins": ", ".join(name for name, _ in (*weights, *computations))},
                "leave one of them out",
            )
        for name, change in weights:
            attach(linear, change, name)
        for name, compute in computations:
            products.attach(linear, compute, name)
    if any(answer for _, answer in plugins.ask_each("weigh_expert_outputs", args=args, role=role)):
        for experts in expert_groups(model):
            products.weigh_outputs(experts)


EXPERTS = {"TEGroupedMLP", "SequentialMLP", "GroupedMLP"}
"""Megatron's classes for the experts of one layer."""


def expert_groups(model: Sequence[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    """The experts of each layer, of all chunks of a model."""
    for chunk in model:
        for module in chunk.modules():
            if EXPERTS & {base.__name__ for base in type(module).__mro__}:
                yield module


def attach(linear: Linear, change: Change, plugin: str) -> None:
    """Let a layer compute with what `change` makes of its weights.

    Raises:
        UpstreamError: that cannot be.
        PluginError: what it computes was chosen already.
    """
    require_free(linear, plugin)
    module = linear.module
    parameters = [getattr(module, name) for name in linear.parameters]
    _require_plain(linear, parameters)
    if linear.kind == "grouped_mlp":
        own: dict[str, Substitute] = module.__dict__.setdefault(SUBSTITUTE, {})
        if not own:
            module.forward = _with_experts(module.forward, module, own)
        own[linear.parameters[0]] = Substitute(linear, _transposed(change, linear), plugin, fused=False)
        return
    if linear.kind == "transformer_engine":
        fused = bool(getattr(module, "fuse_wgrad_accumulation", False))
    else:
        fused = bool(getattr(module, "gradient_accumulation_fusion", False))
    substitute = Substitute(linear, change, plugin, fused)
    setattr(module, SUBSTITUTE, substitute)
    if linear.kind == "transformer_engine":
        _answer_in_forward(module, substitute)


def _require_plain(linear: Linear, parameters: Sequence[torch.Tensor]) -> None:
    import torch

    config = getattr(linear.module, "config", None)
    problem = None
    if getattr(config, "use_transformer_engine_op_fuser", False):
        problem = "--use-transformer-engine-op-fuser computes with the parameters past this layer"
    elif linear.kind == "transformer_engine" and not callable(getattr(linear.module, "_get_weight_tensors", None)):
        problem = "this TransformerEngine's layers do not ask `_get_weight_tensors` for their weights (2.6's do)"
    elif any(type(each) not in (torch.nn.Parameter, torch.Tensor) for each in parameters):
        problem = f"its weight is a {type(parameters[0]).__name__}, not a plain tensor"
    elif any(each.dim() != 2 for each in parameters):
        problem = f"its weight has {parameters[0].dim()} dimensions, not 2"
    if problem:
        raise _unreachable(linear, problem)


def _unreachable(linear: Linear, problem: str) -> UpstreamError:
    return UpstreamError(
        f"the weights that {linear.name} computes with cannot be chosen",
        {"module": f"{type(linear.module).__module__}.{type(linear.module).__qualname__}", "found": problem},
        "leave that feature out, or use a listed stack (docs/compatibility.md)",
    )


def used_weight(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """What one of Megatron's own linear layers shall compute with (`_forward_impl`)."""
    substitute: Substitute | None = module.__dict__.get(SUBSTITUTE)
    if substitute is None:
        return weight
    if weight is not module.weight:
        raise _unreachable(substitute.linear, "it computes with another module's weight")
    return substitute([weight])[0]


def _answer_in_forward(module: torch.nn.Module, substitute: Substitute) -> None:
    """TransformerEngine's: also `backward_dw` and the set-up of quantizers ask, and these must get the parameters."""
    ask: Callable[[], Iterable[torch.Tensor]] = module._get_weight_tensors
    parameters = [getattr(module, name) for name in substitute.linear.parameters]
    found = list(ask())
    if len(found) != len(parameters) or any(one is not other for one, other in zip(found, parameters, strict=True)):
        raise _unreachable(
            substitute.linear,
            f"_get_weight_tensors returns {len(found)} {type(found[0]).__name__ if found else 'tensors'} that are not "
            f"its {len(parameters)} parameters",
        )
    running = [False]

    def weights() -> list[torch.Tensor]:
        return substitute(list(ask())) if running[0] else list(ask())

    def begin(*_: Any) -> None:
        running[0], substitute.asked = True, False

    def end(*_: Any) -> None:
        running[0] = False

    def require_asked(*_: Any) -> None:
        if not substitute.asked:
            raise _unreachable(substitute.linear, "its forward pass did not ask `_get_weight_tensors`")

    module._get_weight_tensors = weights
    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)
    module.register_forward_hook(require_asked)


def _with_experts(
    forward: Callable[..., Any], module: torch.nn.Module, substitutes: Mapping[str, Substitute]
) -> Callable[..., Any]:
    """A legacy GroupedMLP reads `self.weight1` and `self.weight2`: while it runs, it has others of these names."""

    def with_experts(*args: Any, **kwargs: Any) -> Any:
        try:
            for name, substitute in substitutes.items():
                module.__dict__[name] = substitute([getattr(module, name)])[0]
            return forward(*args, **kwargs)
        finally:
            for name in substitutes:
                module.__dict__.pop(name, None)

    return with_experts


def _transposed(change: Change, linear: Linear) -> Change:
    """For a parameter that holds `count` matrices [K, N] in one piece; plugins get and give [N, K]."""
    n, k = linear.shape

    def transposed(weights: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        import torch

        (whole,) = weights
        matrices = whole.view(linear.count, k, n)  # as GroupedMLP views both of its parameters
        values = change([matrix.transpose(0, 1) for matrix in matrices])
        return [torch.stack([value.transpose(0, 1) for value in values]).view(whole.shape)]

    return transposed


# -- computing with others --------------------------------------------------------------------------------------------


class Substitute:
    """What a selected layer computes with in place of its parameters.

    Attributes:
        linear: whose.
        plugin: whose choice it is.
        asked: whether the last forward pass used it.
    """

    def __init__(self, linear: Linear, change: Change, plugin: str, fused: bool) -> None:
        self.linear, self.plugin = linear, plugin
        self._change, self._fused = change, fused
        self._deferred = bool(getattr(getattr(linear.module, "config", None), "delay_wgrad_compute", False))
        self.asked = False

    def __call__(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        import torch

        self.asked = True
        with torch.no_grad():
            values = list(self._change([parameter.detach() for parameter in parameters]))
        kinds = [[(each.shape, each.dtype, each.device) for each in tensors] for tensors in (parameters, values)]
        if kinds[0] != kinds[1]:
            raise PluginError(
                f"plugin {self.plugin} returned other weights from forward_weight than the layer has",
                {"layer": self.linear.name, "expected": str(kinds[0][:1]), "found": str(kinds[1][:1])},
                "return as many tensors of the same shapes, dtype and device",
            )
        if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in parameters):
            return values
        through: Any = _straight_through()
        outputs: list[torch.Tensor] = list(through.apply(values, self._fused and not self._deferred, *parameters))
        if self._fused:
            for output, parameter in zip(outputs, parameters, strict=True):
                if hasattr(parameter, "main_grad"):
                    output.main_grad = parameter.main_grad
        return outputs


_function: Any = None


def _straight_through() -> Any:
    """The autograd function; made at first use, for this module is read where torch is not."""
    global _function
    if _function is None:
        import torch

        class StraightThrough(torch.autograd.Function):  # type: ignore[misc]
            """(values, whether the layer adds to main_grad itself, *parameters) -> values, with identity gradients."""

            @staticmethod
            def forward(ctx: Any, values: Any, fused: bool, *parameters: Any) -> Any:
                ctx.set_materialize_grads(False)  # else a gradient that is already in main_grad comes as zeros
                ctx.parameters, ctx.fused = parameters, fused
                return tuple(value.detach() for value in values)  # an output must be no tensor of somebody else's

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                pairs = zip(ctx.parameters, gradients, strict=True)
                return None, None, *(arrived(parameter, gradient, ctx.fused) for parameter, gradient in pairs)

        _function = StraightThrough
    return _function
