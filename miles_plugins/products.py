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
PRODUCT, SUBSTITUTE = "_miles_plugins_forward_linear", "_miles_plugins_forward_weight"  # on a selected layer's module


class Product:
    """What a selected layer computes.

    Attributes:
        linear: whose.
        plugin: whose choice it is.
    """

    def __init__(self, linear: Linear, compute: Compute, plugin: str, fused: bool) -> None:
        self.linear, self.plugin = linear, plugin
        self._compute, self._fused = compute, fused

    def __call__(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        rows: Sequence[int] | None = None,
        gathered: Gathered | None = None,
    ) -> torch.Tensor:
        """[..., N] of x [..., K]; `rows[i]` of its rows belong to `weights[i]`. `gathered`: x is part of a sequence."""
        multiplied: torch.Tensor = _multiplied().apply(
            self._checked, None if rows is None else tuple(rows), self._fused, gathered, x, *weights
        )
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


def require_free(linear: Linear, plugin: str) -> None:
    """Raise PluginError where a plugin has chosen already what this layer computes, or with which weights."""
    for mark in (PRODUCT, SUBSTITUTE):
        taken = linear.module.__dict__.get(mark)
        if isinstance(taken, dict):  # a legacy GroupedMLP: by parameter
            taken = taken.get(linear.parameters[0])
        if taken is not None:
            raise PluginError(
                f"what {linear.name} computes was chosen already",
                {"by plugin": taken.plugin, "again by": plugin},
                "one choice a layer; if it is the same plugin, the model was offered twice: report this",
            )


def attach(linear: Linear, compute: Compute, plugin: str) -> None:
    """Let a layer compute `compute`. Raises UpstreamError where that cannot be, PluginError where another does."""
    require_free(linear, plugin)
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
    grouped = linear.parameters != ("weight",)  # a group of one expert has weight0
    module.forward = _Grouped(module, product) if grouped else _Dense(module, product)


def product_of(module: torch.nn.Module) -> Product | None:
    """What one of Megatron's own linear layers shall compute in place of its product."""
    found: Product | None = module.__dict__.get(PRODUCT)
    return found


_KNOWN = frozenset(
    ("bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel", "tp_group", "async_grad_allreduce")
)
"""What Megatron tells a linear layer's product, and what is done here."""


def multiply(product: Product, x: torch.Tensor, weight: torch.Tensor, how: Mapping[str, Any]) -> torch.Tensor:
    """One of Megatron's own linear layers, [..., N]; `how`: what it was told of its input, gradient and bias."""
    if unknown := {name for name, value in how.items() if name not in _KNOWN and value not in (None, False, 0, 1)}:
        raise UpstreamError(
            f"what {product.linear.name} computes cannot be chosen",
            {"found": f"Megatron's layer was told {', '.join(sorted(unknown))}", "known": ", ".join(sorted(_KNOWN))},
            "leave that feature out, or use a listed stack (docs/compatibility.md)",
        )
    group = how.get("tp_group")
    gathered = Gathered(group) if how.get("sequence_parallel") else None
    if how.get("allreduce_dgrad") and gathered is None:
        x = _mapping("copy_to_tensor_model_parallel_region")(x, group=group)
    result = product(x, [weight], gathered=gathered)
    bias = how.get("bias")
    return result if bias is None else result + bias


class Gathered:
    """A sequence whose parts are on tensor-parallel ranks, along the first dimension.

    Only the own part is kept for the backward pass, as in Megatron; there it is gathered again.
    """

    def __init__(self, group: Any) -> None:
        if group is None:  # as Megatron's layers of before 0.15 leave it
            from megatron.core import mpu

            group = mpu.get_tensor_model_parallel_group()
        self._group = group

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        size = dist.get_world_size(self._group)
        whole = part.new_empty(size * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=self._group)
        return whole

    def own(self, gradient: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum over ranks."""
        import torch.distributed as dist

        size = dist.get_world_size(self._group)
        own = gradient.new_empty(gradient.shape[0] // size, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=self._group)
        return own


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
        gathered = None
        if mode == "column" and parallel:
            if sequence:
                gathered = Gathered(group)
            else:
                x = _mapping("copy_to_tensor_model_parallel_region")(x, group=group)
        y = self._product(x, [module.weight], gathered=gathered)
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
        return self._product(x, weights, rows), None


def _normed(module: Any, x: torch.Tensor) -> torch.Tensor:
    """TransformerEngine's norm in front of a LayerNormLinear, if it has one; the backward pass computes it again."""
    from torch.utils.checkpoint import checkpoint

    if getattr(module, "layer_norm_weight", None) is None:
        return x
    normed: torch.Tensor = checkpoint(_norm, module, x, use_reentrant=False, preserve_rng_state=False)
    return normed


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Computed in float32, rounded once to x's dtype."""
    weight, bias = module.layer_norm_weight, getattr(module, "layer_norm_bias", None)
    wide = x.float()
    if module.normalization != "RMSNorm":
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * (wide.square().mean(-1, keepdim=True) + module.eps).rsqrt()
    wide = wide * (weight.float() + 1 if getattr(module, "zero_centered_gamma", False) else weight.float())
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
            """(compute, rows, is main_grad added to, gathered, x, *weights) -> compute's; gradients of x @ w.T."""

            @staticmethod
            def forward(
                ctx: Any, compute: Compute, rows: Any, fused: bool, gathered: Any, x: Any, *weights: Any
            ) -> Any:
                ctx.save_for_backward(x, *weights)
                whole = x.detach() if gathered is None else gathered.whole(x.detach())
                flat = whole.flatten(0, -2)
                ctx.rows = (len(flat),) if rows is None else rows
                ctx.fused, ctx.gathered, ctx.parameters = fused, gathered, weights
                result = compute(flat, [weight.detach() for weight in weights], ctx.rows)
                return result.view(*whole.shape[:-1], result.shape[-1])

            @staticmethod
            def backward(ctx: Any, gradient: Any) -> Any:
                x, *weights = ctx.saved_tensors
                gradients = gradient.flatten(0, -2).split(ctx.rows)
                of_x = None
                if ctx.needs_input_grad[4]:
                    products = [part @ weight for part, weight in zip(gradients, weights, strict=True)]
                    of_x = torch.cat(products).view(*gradient.shape[:-1], x.shape[-1])
                    of_x = of_x if ctx.gathered is None else ctx.gathered.own(of_x)
                of_weights: list[Any] = [None] * len(weights)
                if any(parameter.requires_grad for parameter in ctx.parameters):
                    whole = x if ctx.gathered is None else ctx.gathered.whole(x)
                    each = zip(gradients, whole.flatten(0, -2).split(ctx.rows), ctx.parameters, strict=True)
                    of_weights = [_of_weight(part, own, parameter, ctx.fused) for part, own, parameter in each]
                return None, None, None, None, of_x, *of_weights

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
