"""Layers that compute with other weights than their own: which ones, with what gradients, for how long."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from miles_plugins import products  # noqa: E402
from miles_plugins.errors import PluginError, UpstreamError  # noqa: E402
from miles_plugins.hookspecs import hookimpl  # noqa: E402
from miles_plugins.linears import Linear, Substitute, attach, linear_layers, offer, used_weight  # noqa: E402
from miles_plugins.manager import Installed, Plugin, Plugins  # noqa: E402

nn = torch.nn


def double(weights: Any) -> Any:
    return [2 * weight for weight in weights]


class StandInGroupedLinear(nn.Module):
    """Stands for TransformerEngine's GroupedLinear, which needs CUDA: where it asks for weights, and what for.

    `fuse_wgrad_accumulation`: its backward adds to `main_grad` of the tensors it was given, and returns a placeholder
    of garbage to those that have `grad_added_to_main_grad`, nothing to others.
    """

    def __init__(self, experts: int = 2, fuse: bool = False) -> None:
        super().__init__()
        self.num_gemms, self.fuse_wgrad_accumulation = experts, fuse
        for number in range(experts):
            weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(number)))
            self.register_parameter(f"weight{number}", weight)

    def _get_weight_tensors(self) -> list[Any]:
        return [getattr(self, f"weight{number}") for number in range(self.num_gemms)]

    def forward(self, x: Any) -> Any:
        outputs = [
            Fused.apply(x, weight) if self.fuse_wgrad_accumulation else x @ weight.t()
            for weight in self._get_weight_tensors()
        ]
        return torch.stack(outputs)

    def backward_dw(self) -> None:
        for weight in self._get_weight_tensors():
            weight.grad = torch.ones_like(weight)


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.main_grad = weight, weight.main_grad
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        x, weight = ctx.saved_tensors
        ctx.main_grad += gradient.t() @ x
        if hasattr(ctx.weight, "grad_added_to_main_grad"):
            ctx.weight.grad_added_to_main_grad = True
            return gradient @ weight, torch.full_like(weight, torch.nan)
        return gradient @ weight, None


def the_linear(module: Any) -> Linear:
    (linear,) = linear_layers([nn.ModuleDict({"linear_fc1": module})])
    return linear


def test_a_grouped_layer_computes_with_the_others_in_its_forward_only() -> None:
    module = StandInGroupedLinear()
    attach(the_linear(module), double, "some_plugin")
    x = torch.randn(5, 4)
    assert torch.equal(module(x)[1], x @ (2 * module.weight1).t())
    assert module._get_weight_tensors()[0] is module.weight0  # outside of forward
    module.backward_dw()
    assert module.weight1.grad is not None


def test_the_gradient_goes_straight_through() -> None:
    module = StandInGroupedLinear()
    attach(the_linear(module), double, "some_plugin")
    x = torch.randn(5, 4, requires_grad=True)
    module(x).sum().backward()
    ones = torch.ones(5, 3)
    assert torch.equal(module.weight0.grad, ones.t() @ x.detach())
    assert torch.equal(x.grad, ones @ (2 * module.weight0) + ones @ (2 * module.weight1))


@pytest.mark.parametrize("overlap", [False, True])
def test_what_the_layer_added_to_main_grad_is_neither_added_again_nor_followed_by_garbage(overlap: bool) -> None:
    module = StandInGroupedLinear(fuse=True)
    attach(the_linear(module), double, "some_plugin")
    seen: list[bool] = []
    for parameter in module.parameters():
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros(3, 4), False

        def ddp(changed: Any) -> None:  # what Megatron's DistributedDataParallel does when a gradient is there
            assert changed.grad is not None or not overlap
            seen.append(changed.grad_added_to_main_grad)
            if changed.grad is not None and not changed.grad_added_to_main_grad:
                changed.main_grad += changed.grad
            changed.grad = None

        parameter.register_post_accumulate_grad_hook(ddp)
    x = torch.randn(5, 4)
    for _ in range(2):
        module(x).sum().backward()
    assert seen == [True] * 4
    assert torch.allclose(module.weight0.main_grad, 2 * torch.ones(5, 3).t() @ x)


DDP = """
import json, sys
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from miles_plugins.linears import attach, linear_layers
from tests.test_linears import StandInGroupedLinear, double

torch.cuda.current_device = lambda: "cpu"  # where Megatron allocates gradients
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
parallel_state.initialize_model_parallel()

def gradients(overlap, fuse):
    layer = StandInGroupedLinear(fuse=fuse)
    model = torch.nn.ModuleDict({"linear_fc1": layer})
    model.forward = lambda x: layer(x).sum()
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, gradient_accumulation_fusion=fuse)
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(overlap_grad_reduce=overlap, bucket_size=1), model)
    (linear,) = linear_layers([model])
    attach(linear, double, "some_plugin")
    for step in (1, 2):  # the first one counts which gradients come
        ddp.zero_grad_buffer()
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(step))
        with ddp.no_sync():
            ddp(x[0]).backward()
        ddp(x[1]).backward()
        assert (step == 1 or not overlap) or all(group.grad_reduce_handle for group in ddp.bucket_groups)
        ddp.finish_grad_sync()
    return [getattr(layer, name).main_grad.tolist() for name in ("weight0", "weight1")], x.sum((0, 1)).tolist()

print(json.dumps([gradients(overlap, fuse) for overlap in (False, True) for fuse in (False, True)]))
"""


def test_megatrons_ddp_reduces_each_gradient_once(tmp_path: Path) -> None:
    """With --overlap-grad-reduce it starts when autograd has given each parameter a gradient."""
    command = [sys.executable, "-W", "ignore", "-c", DDP, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout.splitlines()[-1])
    assert len(cases) == 4
    for gradients, inputs in cases:
        for gradient in gradients:
            assert torch.allclose(torch.tensor(gradient), torch.tensor(inputs).expand(3, 4), atol=1e-5)


def test_a_layer_whose_weight_gradient_comes_later_gets_no_placeholder() -> None:
    module = StandInGroupedLinear(fuse=True)
    module.config = type("Config", (), {"delay_wgrad_compute": True})()
    attach(the_linear(module), double, "some_plugin")
    for parameter in module.parameters():
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros(3, 4), False
    module(torch.randn(5, 4, requires_grad=True)).sum().backward()
    assert module.weight0.grad is None
    assert not module.weight0.grad_added_to_main_grad


def test_layers_that_cannot_be_reached_are_refused_by_name() -> None:
    silent = StandInGroupedLinear()
    silent.forward = lambda x: x @ silent.weight0.t()  # type: ignore[method-assign]
    attach(the_linear(silent), double, "some_plugin")
    with pytest.raises(UpstreamError, match=r"linear_fc1.*\n.*\n.*did not ask"):
        silent(torch.randn(5, 4))

    fused = StandInGroupedLinear()
    fused.config = type("Config", (), {"use_transformer_engine_op_fuser": True})()
    with pytest.raises(UpstreamError, match="op-fuser"):
        attach(the_linear(fused), double, "some_plugin")

    grouped = StandInGroupedLinear()
    grouped._get_weight_tensors = lambda: [torch.stack([grouped.weight0, grouped.weight1])]  # type: ignore[method-assign]
    with pytest.raises(UpstreamError, match="returns 1"):
        attach(the_linear(grouped), double, "some_plugin")


class StandInLinear(nn.Module):
    """Stands for Megatron's Column- or RowParallelLinear, which hands its weight to `_forward_impl`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape or (3, 4)))

    def _forward_impl(self, x: Any, weight: Any) -> Any:
        return x @ used_weight(self, weight).t()


def test_a_transformer_engine_that_asks_nobody_is_refused() -> None:
    old = type("Linear", (nn.Module,), {"__module__": "transformer_engine.pytorch.module.linear"})()
    old.weight = nn.Parameter(torch.randn(3, 4))
    with pytest.raises(UpstreamError, match=r"linear_fc1(?s:.*)do not ask `_get_weight_tensors`"):
        attach(the_linear(old), double, "some_plugin")


@pytest.mark.parametrize("kind", ["GroupedTensor", "QuantizedTensor"])
def test_a_weight_that_is_no_plain_tensor_is_refused(kind: str) -> None:
    module = StandInLinear()
    module.weight.data = module.weight.data.clone()
    module.weight = type(kind, (nn.Parameter,), {})(module.weight.data)
    with pytest.raises(UpstreamError, match=rf"its weight is a {kind}, not a plain tensor"):
        attach(the_linear(module), double, "some_plugin")


def test_a_weight_of_three_dimensions_is_refused() -> None:
    with pytest.raises(UpstreamError, match="its weight has 3 dimensions, not 2"):
        attach(the_linear(StandInLinear(2, 3, 4)), double, "some_plugin")


def test_a_layer_that_computes_with_anothers_weight_is_refused() -> None:
    """As an output layer that shares the embedding's."""
    module, other = StandInLinear(), StandInLinear()
    attach(the_linear(module), double, "some_plugin")
    x = torch.randn(5, 4)
    assert torch.equal(module._forward_impl(x, module.weight), x @ (2 * module.weight).t())
    with pytest.raises(UpstreamError, match=r"linear_fc1(?s:.*)another module's weight"):
        module._forward_impl(x, other.weight)


@pytest.mark.parametrize("stand_in", [StandInLinear, StandInGroupedLinear])
@pytest.mark.parametrize("first", [attach, products.attach])
@pytest.mark.parametrize("second", [attach, products.attach])
def test_what_a_layer_computes_is_chosen_once(stand_in: Any, first: Any, second: Any) -> None:
    """As when a model is offered to the plugins twice: the weights would be on the grid of a grid."""
    module = stand_in()
    first(the_linear(module), double, "some_plugin")
    before = {**module.__dict__}
    with pytest.raises(PluginError, match=r"linear_fc1 (?s:.*)some_plugin(?s:.*)another_plugin"):
        second(the_linear(module), double, "another_plugin")
    assert module.__dict__ == before


def test_other_shapes_or_dtypes_are_refused() -> None:
    module = StandInGroupedLinear()
    attach(the_linear(module), lambda weights: [weight.half() for weight in weights], "some_plugin")
    with pytest.raises(PluginError, match="some_plugin"):
        module(torch.randn(5, 4))


class GroupedMLP(nn.Module):
    """Stands for Megatron's legacy class of this name, which needs grouped_gemm and CUDA; the same layout."""

    def __init__(self) -> None:
        super().__init__()
        self.num_local_experts = 2
        self.weight1 = nn.Parameter(torch.randn(4, 2 * 6))
        self.weight2 = nn.Parameter(torch.randn(2 * 3, 4))

    def forward(self, x: Any) -> Any:
        return x @ self.weight1.view(2, 4, -1), self.weight2.view(2, -1, 4)


def test_a_legacy_grouped_mlp_hands_out_its_matrices_the_other_way_round() -> None:
    module = GroupedMLP()
    given: list[Any] = []

    def halve_rows(weights: Any) -> Any:
        given.extend(weights)
        return [weight * torch.arange(1, weight.shape[0] + 1)[:, None] for weight in weights]

    for linear in linear_layers([nn.ModuleDict({"experts": module})]):
        attach(linear, halve_rows, "some_plugin")
    x = torch.randn(2, 5, 4)
    first, second = module(x)
    assert [tuple(each.shape) for each in given] == [(6, 4)] * 2 + [(4, 3)] * 2
    assert torch.allclose(first, (x @ module.weight1.view(2, 4, 6)) * torch.arange(1, 7))
    assert torch.allclose(second, module.weight2.view(2, 3, 4) * torch.arange(1, 5))
    first.sum().backward()
    assert module.weight1.grad is not None
    assert "weight1" not in module.__dict__


def test_each_matrix_of_a_legacy_grouped_mlp_is_chosen_once() -> None:
    first, second = linear_layers([nn.ModuleDict({"experts": GroupedMLP()})])
    attach(first, double, "some_plugin")
    attach(second, double, "another_plugin")
    for linear in (first, second):
        with pytest.raises(PluginError, match=rf"experts.linear_fc{linear.parameters[0][-1]}"):
            attach(linear, double, "some_plugin")


def test_without_gradients_nothing_is_wrapped() -> None:
    substitute = Substitute(the_linear(StandInGroupedLinear(1)), double, "some_plugin", fused=False)
    with torch.no_grad():
        (value,) = substitute([nn.Parameter(torch.ones(3, 4))])
    assert not value.requires_grad


def test_two_plugins_cannot_choose_for_one_layer() -> None:
    def forward_weight(linear: Linear) -> Any:
        return double if linear.name == "linear_fc1" else None

    def plugin(name: str) -> Plugin:
        module = ModuleType(name)
        vars(module).update({"__file__": "", "forward_weight": hookimpl(forward_weight)})
        return Plugin(Installed(name, "some-plugins", "1.0", None), module)

    model = [nn.ModuleDict({"linear_fc1": StandInGroupedLinear(), "linear_fc2": StandInGroupedLinear()})]
    offer(Plugins([plugin("a")]), Namespace(), model, "actor")
    x = torch.ones(1, 4)
    assert torch.equal(model[0]["linear_fc1"](x), 2 * model[0]["linear_fc2"](x))
    with pytest.raises(PluginError, match="a, b"):
        offer(Plugins([plugin("a"), plugin("b")]), Namespace(), model, "actor")
