"""What linear layers of a Megatron model compute in place of their own product: the hook `forward_linear`.

The forward pass is the plugin's; the backward pass is that of x @ weight.T in the layer's own dtype (straight through),
with the parallelism and the gradient accumulation that the layer has: tensor and sequence parallel inputs are gathered
and reduced by Megatron's own collectives, and under --gradient-accumulation-fusion gradients go to `main_grad`.

* Megatron's own Column- and RowParallelLinear hand over in `_forward_impl` (patches/megatron/linear.py).
* TransformerEngine's layers get a forward pass of their own, on the instance: theirs has no place between the norm,
  the collective and the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles_plugins.errors import PluginError, UpstreamError
from miles_plugins.gradients import arrived

if TYPE_CHECKING:
    import torch

    from miles_plugins.linears import Linear

Compute = Callable[["torch.Tensor", Sequence["torch.Tensor"], Sequence[int]], "torch.Tensor"]
PRODUCT = "_miles_plugins_forward_linear"  # on the module of a selected layer


class Product:
    """What a selected layer computes.

    Attributes:
        linear: whose.
        plugin: whose choice it is.
        used: forward passes so far.
    """

    def __init__(self, linear: Linear, compute: Compute, plugin: str, fused: bool) -> None:
        self.linear, self.plugin, self.used = linear, plugin, 0
        self._compute, self._fused = compute, fused

    def __call__(self, x: torch.Tensor, weights: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
        """[len(x), N] of x [rows of all weights together, K]; `rows[i]` of them belong to `weights[i]`."""
        self.used += 1
        multiplied: torch.Tensor = _multiplied().apply(self._checked, tuple(rows), self._fused, x, *weights)
        return multiplied

    def _checked(self, x: torch.Tensor, weights: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
        result = self._compute(x, weights, rows)
        expected = ((len(x), self.linear.shape[0]), x.dtype, x.device)
        if (found := (tuple(result.shape), result.dtype, result.device)) != expected:
            raise PluginError(
                f"plugin {self.plugin} returned another product from forward_linear than the layer gives",
                {"layer": self.linear.name, "expected": str(expected), "found": str(found)},
                "return one row for each row of x, of the same dtype and device",
            )
        return result


def attach(linear: Linear, compute: Compute, plugin: str) -> None:
    """Let a layer compute `compute`. Raises UpstreamError where that cannot be."""
    module = linear.module
    config = getattr(module, "config", None)
    problem = None
    if linear.kind == "grouped_mlp":
        problem = (
            "legacy GroupedMLP computes all experts in one kernel; take --transformer-impl's grouped or local experts"
        )
    elif getattr(config, "delay_wgrad_compute", False):
        problem = "--delay-wgrad-compute: its weight gradients come from TransformerEngine's own product"
    elif getattr(config, "use_transformer_engine_op_fuser", False):
        problem = "--use-transformer-engine-op-fuser computes past this layer"
    if problem:
        raise UpstreamError(
            f"what {linear.name} computes cannot be chosen",
            {"module": f"{type(module).__module__}.{type(module).__qualname__}", "found": problem},
            "leave that feature out, or use a listed stack (docs/compatibility.md)",
        )
    if linear.kind == "megatron":
        fused = bool(getattr(module, "gradient_accumulation_fusion", False))
        setattr(module, PRODUCT, Product(linear, compute, plugin, fused))
        return
    fused = bool(getattr(module, "fuse_wgrad_accumulation", False))
    product = Product(linear, compute, plugin, fused)
    setattr(module, PRODUCT, product)
    module.forward = _Grouped(module, product) if len(linear.parameters) > 1 else _Dense(module, product)


def product_of(module: torch.nn.Module) -> Product | None:
    """What one of Megatron's own linear layers shall compute in place of its product."""
    found: Product | None = module.__dict__.get(PRODUCT)
    return found


def multiply(product: Product, x: torch.Tensor, weight: torch.Tensor, how: Mapping[str, Any]) -> torch.Tensor:
    """One of Megatron's own linear layers, [..., N]; `how`: what it was told of its input, gradient and bias."""
    if how.get("sequence_parallel"):
        x = _mapping("gather_from_sequence_parallel_region")(x, group=how.get("tp_group"))
    elif how.get("allreduce_dgrad"):
        x = _mapping("copy_to_tensor_model_parallel_region")(x, group=how.get("tp_group"))
    result = product(x.flatten(0, -2), [weight], [x.flatten(0, -2).shape[0]]).unflatten(0, x.shape[:-1])
    bias = how.get("bias")
    return result if bias is None else result + bias


def _mapping(name: str) -> Callable[..., torch.Tensor]:
    from megatron.core.tensor_parallel import mappings

    return getattr(mappings, name)  # type: ignore[no-any-return]


# -- TransformerEngine's layers ---------------------------------------------------------------------------------------


class _Dense:
    """The forward pass of one TELinear or TELayerNormColumnParallelLinear: norm, collective, product, collective."""

    def __init__(self, module: Any, product: Product) -> None:
        self._module, self._product = module, product

    def __call__(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        module = self._module
        mode, parallel = getattr(module, "parallel_mode", None), getattr(module, "tp_size", 1) > 1
        group, sequence = getattr(module, "tp_group", None), bool(getattr(module, "sequence_parallel", False))
        x = _normed(module, x)
        if mode == "column" and parallel:
            name = "gather_from_sequence_parallel_region" if sequence else "copy_to_tensor_model_parallel_region"
            x = _mapping(name)(x, group=group)
        flat = x.flatten(0, -2)
        y = self._product(flat, [module.weight], [len(flat)]).unflatten(0, x.shape[:-1])
        if mode == "row" and parallel:
            name = (
                "reduce_scatter_to_sequence_parallel_region" if sequence else "reduce_from_tensor_model_parallel_region"
            )
            y = _mapping(name)(y, group=group)
        return _with_bias(module, y)


class _Grouped:
    """The forward pass of one TEGroupedLinear: the experts' tokens one after the other."""

    def __init__(self, module: Any, product: Product) -> None:
        self._module, self._product = module, product

    def __call__(self, x: torch.Tensor, m_splits: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        module = self._module
        rows = [int(each) for each in m_splits]
        weights = [getattr(module, name) for name in self._product.linear.parameters]
        if getattr(module, "use_bias", False):
            raise UpstreamError(
                f"what {self._product.linear.name} computes cannot be chosen",
                {"found": "experts with a bias"},
                "leave them out",
            )
        return self._product(x.flatten(0, -2), weights, rows).unflatten(0, x.shape[:-1]), None


def _normed(module: Any, x: torch.Tensor) -> torch.Tensor:
    """TransformerEngine's norm in front of a LayerNormLinear: computed in float32, rounded once to x's dtype."""
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return x
    wide = x.float()
    if module.normalization == "RMSNorm":
        wide = wide * (wide.square().mean(-1, keepdim=True) + module.eps).rsqrt()
    else:
        wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * (wide.square().mean(-1, keepdim=True) + module.eps).rsqrt()
    wide = wide * (weight.float() + 1 if getattr(module, "zero_centered_gamma", False) else weight.float())
    bias = getattr(module, "layer_norm_bias", None)
    return (wide if bias is None else wide + bias.float()).to(x.dtype)


def _with_bias(module: Any, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    bias = getattr(module, "bias", None)
    if bias is None or not bias.numel():
        return y, None
    return (y, bias) if getattr(module, "te_return_bias", False) else (y + bias, None)


# -- experts ----------------------------------------------------------------------------------------------------------


def weigh_outputs(experts: Any) -> None:
    """Let one layer's experts multiply the router's probabilities with what their second linear layer gives.

    Megatron multiplies them with what that layer gets, where they take part in its quantization; SGLang weighs the
    outputs. All of Megatron's experts take (tokens, tokens of each expert, probabilities) and return (output, bias).
    """
    if getattr(experts.config, "moe_apply_probs_on_input", False):
        raise PluginError(
            "router probabilities cannot be multiplied with the experts' outputs",
            {"found": "--moe-apply-probs-on-input: they are multiplied with the inputs of the first layer"},
            "leave that flag out, or the plugin",
        )
    forward = experts.forward

    def weighed(tokens: Any, tokens_per_expert: Any, permuted_probs: Any, *rest: Any, **others: Any) -> Any:
        import torch

        output, bias = forward(tokens, tokens_per_expert, torch.ones_like(permuted_probs), *rest, **others)
        return (output * permuted_probs.unsqueeze(-1)).to(output.dtype), bias

    experts.forward = weighed


# -- the gradient -----------------------------------------------------------------------------------------------------

_function: Any = None


def _multiplied() -> Any:
    """The autograd function; made at first use, for this module is read where torch is not."""
    global _function
    if _function is None:
        import torch

        class Multiplied(torch.autograd.Function):  # type: ignore[misc]
            """(compute, rows, are gradients for main_grad, x, *weights) -> compute's, with the gradients of x @ w.T."""

            @staticmethod
            def forward(ctx: Any, compute: Compute, rows: Any, fused: bool, x: Any, *weights: Any) -> Any:
                ctx.save_for_backward(x, *weights)
                ctx.rows, ctx.fused, ctx.parameters = rows, fused, weights
                return compute(x.detach(), [weight.detach() for weight in weights], rows)

            @staticmethod
            def backward(ctx: Any, gradient: Any) -> Any:
                x, *weights = ctx.saved_tensors
                parts = list(zip(gradient.split(ctx.rows), x.split(ctx.rows), weights, ctx.parameters, strict=True))
                of_x = torch.cat([part @ weight for part, _, weight, _ in parts]) if ctx.needs_input_grad[3] else None
                return None, None, None, of_x, *(_of_weight(part, own, each, ctx.fused) for part, own, _, each in parts)

        _function = Multiplied
    return _function


def _of_weight(gradient: torch.Tensor, x: torch.Tensor, parameter: torch.Tensor, fused: bool) -> torch.Tensor | None:
    if not parameter.requires_grad:
        return None
    if not fused or not hasattr(parameter, "main_grad"):
        return gradient.t() @ x
    add_product(parameter.main_grad, gradient, x)
    return arrived(parameter, None, fused)


def add_product(main_grad: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor) -> None:
    """main_grad [N, K] += gradient [M, N].T @ x [M, K], summed in float32 where the device can."""
    import torch

    if gradient.is_cuda and main_grad.dtype == torch.float32 and gradient.dtype != torch.float32:
        main_grad += torch.mm(gradient.t(), x, out_dtype=torch.float32)
    else:
        main_grad += gradient.t() @ x
