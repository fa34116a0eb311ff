"""Layers that compute another product than their own: which product, with what gradients, and where it is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from miles_plugins import products  # noqa: E402
from miles_plugins.errors import PluginError, UpstreamError  # noqa: E402
from miles_plugins.linears import Linear, linear_layers  # noqa: E402
from tests.test_linears import StandInGroupedLinear  # noqa: E402

nn = torch.nn


class StandInLayerNormLinear(nn.Module):
    """Stands for TransformerEngine's LayerNormLinear on one rank: its attributes, without its kernels."""

    def __init__(self, normalization: str = "RMSNorm", zero_centered: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.layer_norm_weight = nn.Parameter(torch.randn(4))
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.randn(4))
        self.eps, self.normalization, self.zero_centered_gamma = 1e-5, normalization, zero_centered
        self.parallel_mode, self.tp_size, self.sequence_parallel = "column", 1, False

    def _get_weight_tensors(self) -> list[Any]:
        return [self.weight]


def the_linear(module: Any) -> Linear:
    (linear,) = linear_layers([nn.ModuleDict({"linear_fc1": module})])
    return linear


def tripled(x: Any, weights: Any, rows: Any) -> Any:
    pairs = zip(x.split(list(rows)), weights, strict=True)
    return torch.cat([3 * (part @ weight.t()) for part, weight in pairs])


def test_each_expert_multiplies_its_own_rows_and_gradients_are_of_the_plain_product() -> None:
    module = StandInGroupedLinear()
    products.attach(the_linear(module), tripled, "some_plugin")
    x = torch.randn(5, 4, requires_grad=True)
    output, bias = module(x, [2, 3])
    assert bias is None
    parts = torch.cat([x[:2] @ module.weight0.t(), x[2:] @ module.weight1.t()])
    assert torch.equal(output, 3 * parts)
    outside = torch.randn(5, 3)
    output.backward(outside)
    expected = torch.autograd.grad(parts, [x, module.weight0, module.weight1], outside)
    for found, each in zip((x.grad, module.weight0.grad, module.weight1.grad), expected, strict=True):
        assert torch.allclose(found, each)


def test_an_expert_without_tokens_gets_no_gradient_but_zeros() -> None:
    module = StandInGroupedLinear()
    products.attach(the_linear(module), tripled, "some_plugin")
    module(torch.randn(5, 4), torch.tensor([5, 0]))[0].sum().backward()
    assert module.weight0.grad.any()
    assert not module.weight1.grad.any()


def test_with_fused_gradients_they_go_to_main_grad_once() -> None:
    module = StandInGroupedLinear(fuse=True)
    products.attach(the_linear(module), tripled, "some_plugin")
    for parameter in module.parameters():
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.ones(3, 4), False
    x = torch.randn(5, 4)
    module(x, [2, 3])[0].sum().backward()
    assert module.weight1.grad_added_to_main_grad
    assert torch.allclose(module.weight1.main_grad, 1 + torch.ones(3, 3).t() @ x[2:])


@pytest.mark.parametrize(
    ("normalization", "zero_centered"), [("RMSNorm", False), ("RMSNorm", True), ("LayerNorm", False)]
)
def test_the_norm_in_front_is_computed_and_trained(normalization: str, zero_centered: bool) -> None:
    module = StandInLayerNormLinear(normalization, zero_centered)
    products.attach(the_linear(module), lambda x, weights, rows: x @ weights[0].t(), "some_plugin")
    x = torch.randn(5, 2, 4, requires_grad=True)
    output, _ = module(x)
    scale = module.layer_norm_weight + (1 if zero_centered else 0)
    if normalization == "RMSNorm":
        normed = nn.functional.rms_norm(x, (4,), scale, 1e-5)
    else:
        normed = nn.functional.layer_norm(x, (4,), scale, module.layer_norm_bias, 1e-5)
    expected = normed @ module.weight.t()
    assert torch.allclose(output, expected, atol=1e-6)
    outside = torch.randn(5, 2, 6)
    output.backward(outside)
    for parameter, gradient in zip(
        (x, *module.parameters()), torch.autograd.grad(expected, [x, *module.parameters()], outside), strict=True
    ):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)


def test_a_group_of_one_expert_is_a_group() -> None:
    module = StandInGroupedLinear(experts=1)
    products.attach(the_linear(module), tripled, "some_plugin")
    x = torch.randn(5, 4)
    assert torch.equal(module(x, [5])[0], 3 * (x @ module.weight0.t()))


def test_a_bias_is_added_or_handed_back() -> None:
    for hands_back in (False, True):
        module = StandInLayerNormLinear()
        module.bias, module.te_return_bias = nn.Parameter(torch.randn(6)), hands_back
        products.attach(the_linear(module), lambda x, weights, rows: x @ weights[0].t(), "some_plugin")
        plain = StandInLayerNormLinear()
        plain.load_state_dict({name: each for name, each in module.state_dict().items() if name != "bias"})
        products.attach(the_linear(plain), lambda x, weights, rows: x @ weights[0].t(), "some_plugin")
        x = torch.randn(5, 4)
        output, bias = module(x)
        assert torch.equal(output, plain(x)[0] if hands_back else plain(x)[0] + module.bias)
        assert (bias is module.bias) == hands_back


def test_experts_with_a_bias_are_refused() -> None:
    module = StandInGroupedLinear()
    module.use_bias = True
    products.attach(the_linear(module), tripled, "some_plugin")
    with pytest.raises(UpstreamError, match="bias"):
        module(torch.randn(5, 4), [2, 3])


def test_megatrons_layer_must_say_nothing_unknown() -> None:
    product = products.Product(the_linear(StandInGroupedLinear()), tripled, "some_plugin", fused=False)
    x, weight = torch.randn(5, 4), torch.randn(3, 4)
    told = {"bias": torch.ones(3), "sequence_parallel": False, "allreduce_dgrad": False, "tp_group": None}
    told |= {"gradient_accumulation_fusion": False, "grad_output_buffer": None, "wgrad_deferral_limit": None}
    assert torch.equal(products.multiply(product, x, weight, told), 3 * (x @ weight.t()) + 1)
    with pytest.raises(UpstreamError, match="gtp_remat_size"):
        products.multiply(product, x, weight, {**told, "gtp_remat_size": 2})


PARALLEL = """
import sys, torch
import torch.distributed as dist
from megatron.core import parallel_state
from miles_plugins import products
from tests.test_products import StandInLayerNormLinear, the_linear

torch.cuda.current_device = lambda: "cpu"  # where Megatron makes room for what it reduces
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
group = parallel_state.get_tensor_model_parallel_group()

def product(x, weights, rows):
    return x @ weights[0].t()

def run(mode, sequence, whole):
    # The whole layer on one rank, and this rank's part of it.
    torch.manual_seed(0)
    layer, x, outside = StandInLayerNormLinear(), torch.randn(6, 2, 4), torch.randn(6, 2, 6)
    if mode == "row":
        del layer.layer_norm_weight
        layer.layer_norm_weight = None
    if not whole:
        part = layer.weight.data.chunk(2, dim=0 if mode == "column" else 1)[rank]
        layer.weight = torch.nn.Parameter(part.clone())
        layer.parallel_mode, layer.tp_size, layer.sequence_parallel, layer.tp_group = mode, 2, sequence, group
    products.attach(the_linear(layer), product, "some_plugin")
    dim = {"column": 0, "row": 2}[mode]
    own = x if whole or (mode == "column" and not sequence) else x.chunk(2, dim=dim)[rank]
    own = own.clone().requires_grad_()
    y, _ = layer(own)
    dim = {"column": 2, "row": 0}[mode]
    out = outside if whole or (mode == "row" and not sequence) else outside.chunk(2, dim=dim)[rank]
    y.backward(out)
    return y, own.grad, layer.weight.grad, layer.layer_norm_weight

for mode in ("column", "row"):
    y, of_x, of_weight, _ = run(mode, False, True)
    for sequence in (False, True):
        found = run(mode, sequence, False)
        parts = [
            y if mode == "row" and not sequence else y.chunk(2, dim=2 if mode == "column" else 0)[rank],
            of_x if mode == "column" and not sequence else of_x.chunk(2, dim=0 if mode == "column" else 2)[rank],
            of_weight.chunk(2, dim=0 if mode == "column" else 1)[rank],
        ]
        for one, other in zip(found, parts):
            assert torch.allclose(one, other, atol=1e-5), (mode, sequence, (one - other).abs().max())
print("alike")
"""


def test_on_two_ranks_it_is_the_layer_of_one(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    command = [sys.executable, "-W", "ignore", "-c", PARALLEL]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, complaints = rank.communicate(timeout=300)
            assert rank.returncode == 0, complaints[-3000:]
    finally:
        for rank in ranks:
            rank.kill()


def test_a_frozen_weight_gets_no_gradient() -> None:
    module = StandInLayerNormLinear()
    module.weight.requires_grad_(False)
    products.attach(the_linear(module), lambda x, weights, rows: x @ weights[0].t(), "some_plugin")
    x = torch.randn(5, 4, requires_grad=True)
    module(x)[0].sum().backward()
    assert module.weight.grad is None
    assert x.grad is not None


def test_another_shape_is_refused_with_both_sides() -> None:
    module = StandInGroupedLinear()
    products.attach(the_linear(module), lambda x, weights, rows: x, "some_plugin")
    with pytest.raises(PluginError, match=r"some_plugin.*\n.*linear_fc1.*\n.*\(5, 3\).*\n.*\(5, 4\)"):
        module(torch.randn(5, 4), [2, 3])


@pytest.mark.parametrize(
    ("option", "named"),
    [("delay_wgrad_compute", "delay-wgrad-compute"), ("use_transformer_engine_op_fuser", "op-fuser")],
)
def test_what_computes_past_the_product_is_refused(option: str, named: str) -> None:
    module = StandInGroupedLinear()
    module.config = type("Config", (), {option: True})()
    with pytest.raises(UpstreamError, match=named):
        products.attach(the_linear(module), tripled, "some_plugin")


def test_probabilities_are_multiplied_with_the_outputs() -> None:
    given: list[Any] = []

    class SequentialMLP(nn.Module):
        config = type("Config", (), {"moe_apply_probs_on_input": False})()

        def forward(self, tokens: Any, tokens_per_expert: Any, probs: Any) -> Any:
            given.append(probs)
            return tokens.square() * probs.unsqueeze(-1), None

    experts = SequentialMLP()
    products.weigh_outputs(experts)
    tokens, probs = torch.randn(3, 4), torch.rand(3, requires_grad=True)
    output, _ = experts(tokens, torch.tensor([3]), probs)
    assert torch.equal(given[0], torch.ones(3))
    assert torch.equal(output, tokens.square() * probs.unsqueeze(-1))
    output.sum().backward()
    assert torch.allclose(probs.grad, tokens.square().sum(-1))

    experts.config = type("Config", (), {"moe_apply_probs_on_input": True})()
    with pytest.raises(PluginError, match="moe-apply-probs-on-input"):
        products.weigh_outputs(experts)
