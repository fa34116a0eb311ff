"""`--plugins fp8`: trainer and engine compute with the same codes; what goes between them; alarms and refusals."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model  # noqa: E402
from miles_plugins.discrepancy import Discrepancy, Drift  # noqa: E402
from miles_plugins.errors import ArgumentError, PluginError, UpstreamError  # noqa: E402
from miles_plugins.fp8_unified import chosen, engine, plugin  # noqa: E402
from miles_plugins.fp8_unified.blockwise import Format, Quantised, dequantise, quantise_weight  # noqa: E402
from miles_plugins.fp8_unified.converter import convert_to_fp8  # noqa: E402

WATCH = """
import json, sys
import torch
from miles_plugins.embedded import host
from miles_plugins.embedded.hugging_face import checkpoint_places
from miles_plugins.embedded.policy import hugging_face_names
from miles_plugins.fp8_unified import aligned, blockwise, plugin

runs, found = [], {"weights": 0, "codes": 0, "different": 0, "passes": []}
begin, quantise, end = host.EmbeddedRun.__init__, aligned.AlignedLinear._quantise, plugin.pass_ends

def __init__(self, *args):
    runs.append(self)
    begin(self, *args)

def _quantise(self, weights):
    parts = quantise(self, weights)
    if plugin._in_pass == "train":
        engine = checkpoint_places(runs[0].engine.model)
        names = hugging_face_names(self.linear.name + ".weight")
        assert len(names) == len(parts)
        for name, part in zip(names, parts):
            other = blockwise.quantise_weight(engine[name], blockwise.Format())
            found["weights"] += 1
            found["codes"] += other.codes.numel()
            found["different"] += int((part[0].codes.float() != other.codes.float()).sum())
            found["different"] += int((part[0].scale_inv != other.scale_inv).sum())
    return parts

def pass_ends(stage, error):
    found["passes"].append([stage, sorted({layer.quantised for layer in plugin._layers})])
    end(stage, error)

host.EmbeddedRun.__init__, aligned.AlignedLinear._quantise = __init__, _quantise
pass_ends.__dict__.update(end.__dict__)
plugin.pass_ends = pass_ends
from miles_plugins.entrypoints.slime_train import main
sys.argv = ["slime-train", *sys.argv[1:]]
try:
    main()
finally:
    print("FOUND", json.dumps(found))
"""


def train(folder: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-c", WATCH, "--embedded", "--run-folder", str(folder), "--num-rollout", "2", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.partition("FOUND ")[2])  # type: ignore[no-any-return]


@pytest.mark.parametrize("plugins", ["fp8", "r3,fp8"])
def test_trainer_and_engine_have_the_same_codes_and_scales(tmp_path: Path, plugins: str) -> None:
    pytest.importorskip("megatron.core")
    found = train(tmp_path / "run", "--plugins", plugins, "--recompute-granularity", "full")
    assert found["weights"] > 0
    assert found["different"] == 0
    # Once a pass, however many microbatches and recomputations.
    assert found["passes"] == [["train", [1]], ["train", [2]]]
    lines = [json.loads(line)["metrics"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [each for each in lines if "train/step" in each]
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["train/fp8/difference/k3"] < 0.05
        slimes = step["train/train_rollout_logprob_abs_diff"]
        assert step["train/fp8/difference/sample_mean"] == pytest.approx(slimes, rel=1e-3)


def test_the_reference_computes_alike_unless_it_is_told_not_to(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    kl = ("--plugins", "fp8", "--use-kl-loss", "--kl-loss-coef", "0.1", "--kl-loss-type", "k3")
    both = train(tmp_path / "both", *kl)
    assert both["passes"][:2] == [["ref_log_prob", [1]], ["train", [2]]]
    actor = train(tmp_path / "actor", *kl, "--fp8-other-passes")
    assert actor["passes"][:2] == [["ref_log_prob", [0]], ["train", [1]]]


# -- what goes to the engine, and arrives ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "bf16", hidden_size=96).folder


@pytest.fixture(scope="module")
def checkpoint(bf16: Path) -> Path:
    target = bf16.with_name("fp8")
    convert_to_fp8(bf16, target, Format())
    return target


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plugin remembers of a process."""
    for name in ("_chosen", "_at_engine", "_difference", "_result"):
        monkeypatch.setattr(plugin, name, None)
    monkeypatch.setattr(plugin, "_drift", Drift())
    monkeypatch.setattr(plugin, "_products", engine.Products())
    monkeypatch.setattr(plugin, "_arrived", 0)
    monkeypatch.setattr(plugin, "_updates", 0)
    monkeypatch.setattr(plugin, "_first_step", True)


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def as_bytes(tensor: Any) -> Any:
    return tensor.contiguous().view(torch.uint8)


def test_the_first_update_is_the_converted_checkpoint_byte_for_byte(bf16: Path, checkpoint: Path) -> None:
    args = Namespace(hf_checkpoint=str(checkpoint))
    exported = dict(plugin.export_weights(args, list(tensors(bf16).items())))
    converted = tensors(checkpoint)
    assert exported.keys() == converted.keys()
    assert all(each.dtype == converted[name].dtype for name, each in exported.items())
    assert all(torch.equal(as_bytes(each), as_bytes(converted[name])) for name, each in exported.items())
    assert sum(each.dtype == torch.float8_e4m3fn for each in exported.values()) == 2 * (4 + 8 * 3)


def test_the_same_weights_give_the_same_bytes_again(bf16: Path, checkpoint: Path) -> None:
    args = Namespace(hf_checkpoint=str(checkpoint))
    once, again = (dict(plugin.export_weights(args, list(tensors(bf16).items()))) for _ in range(2))
    assert all(torch.equal(as_bytes(once[name]), as_bytes(again[name])) for name in once)


def test_what_travelled_as_fp8_is_left_alone(checkpoint: Path) -> None:
    args = Namespace(hf_checkpoint=str(checkpoint))
    given = list(tensors(checkpoint).items())
    exported = plugin.export_weights(args, given)
    assert [name for name, _ in exported] == [name for name, _ in given]
    assert all(one is other for (_, one), (_, other) in zip(exported, given, strict=True))


def test_slimes_quantisers_are_relieved_of_fp8_only() -> None:
    assert plugin.take_weight_quantization({"quant_method": "fp8"}) is True
    assert plugin.take_weight_quantization({"quant_method": "compressed-tensors"}) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda names: names.pop("model.layers.0.self_attn.q_proj.weight"), "missing"),
        (lambda names: names.pop("model.layers.1.mlp.experts.7.up_proj.weight_scale_inv"), "missing"),
        (lambda names: names.update({"model.layers.0.self_attn.k_proj.weight": 2}), "twice"),
        (lambda names: names.update({"model.layers.0.mlp.gate.weight_scale_inv": 1}), "unknown"),
    ],
)
def test_an_update_must_bring_each_weight_with_its_scale_once(checkpoint: Path, change: Any, problem: str) -> None:
    server_args = SimpleNamespace(model_path=str(checkpoint))
    received = dict.fromkeys(tensors(checkpoint), 1)
    plugin.after_weight_update(server_args, received)
    change(received)
    with pytest.raises(PluginError, match=problem):
        plugin.after_weight_update(server_args, received)


def test_half_of_a_draft_is_refused() -> None:
    whole = {"a.weight": 1, "a.weight_scale_inv": 1}
    chosen.check_received(["a"], ["draft"], ".weight_scale_inv", whole)
    with pytest.raises(PluginError, match=r"without its other half.*draft"):
        chosen.check_received(["a"], ["draft"], ".weight_scale_inv", {**whole, "draft.weight": 1})


def test_an_engine_without_kernels_gets_values_that_quantise_back(bf16: Path, checkpoint: Path) -> None:
    server_args = SimpleNamespace(model_path=str(checkpoint))
    plain = dict(plugin.receive_weights(server_args, tensors(checkpoint).items()) or ())
    assert plain.keys() == tensors(bf16).keys()
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    expected = quantise_weight(tensors(bf16)[name], Format())
    assert plain[name].dtype == torch.bfloat16
    found = quantise_weight(plain[name], Format())
    assert torch.equal(as_bytes(found.codes), as_bytes(expected.codes))
    assert torch.equal(found.scale_inv, expected.scale_inv)
    assert plugin.probe("sglang_scheduler") == f"{2 * 28} FP8 weights loaded"


def test_an_engine_with_kernels_gets_what_was_sent(checkpoint: Path) -> None:
    server_args = SimpleNamespace(model_path=str(checkpoint), json_model_override_args="{}")
    given = tensors(checkpoint)
    found = dict(plugin.receive_weights(server_args, given.items()) or ())
    assert all(found[name] is given[name] for name in given)
    assert plugin.probe("sglang_scheduler") == f"{2 * 28} FP8 weights loaded"


def test_a_scale_without_its_weight_is_refused(checkpoint: Path) -> None:
    server_args = SimpleNamespace(model_path=str(checkpoint))
    half = [(name, each) for name, each in tensors(checkpoint).items() if name.endswith("scale_inv")]
    with pytest.raises(PluginError, match="without its scale"):
        list(plugin.receive_weights(server_args, half) or ())


def test_other_models_beside_the_trained_one_are_left_alone(bf16: Path) -> None:
    server_args = SimpleNamespace(model_path=str(bf16))
    assert plugin.receive_weights(server_args, []) is None
    plugin.after_weight_update(server_args, {})
    assert plugin.probe("sglang_scheduler") is None


# -- an engine that multiplies by the reference ----------------------------------------------------------------------


class Fused(torch.nn.Module):
    """As SGLang fuses them: query, key and value in one, and all experts in one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = torch.nn.Linear(160, 192 + 64 + 64, bias=True, dtype=torch.bfloat16)
        self.qkv_proj.output_partition_sizes = [192, 64, 64]
        self.qkv_proj.weight.weight_loader = "SGLang's"
        self.experts = torch.nn.Module()
        self.experts.w13_weight = torch.nn.Parameter(torch.randn(2, 64, 160).bfloat16())
        self.gate = torch.nn.Linear(160, 2, bias=False, dtype=torch.bfloat16)


def near(found: Any, expected: Any) -> bool:
    """Up to the last bit of bfloat16; other tiles would be 3 % away."""
    return torch.allclose(found.float(), expected.float(), rtol=2.0**-7, atol=1e-3)


def exact(x: Any, weight: Any) -> Any:
    """The dequantised product in float64, rounded once."""
    format = Format()
    from miles_plugins.fp8_unified.blockwise import quantise_rows

    values = [dequantise(quantise_rows(x, format), (1, 128)), dequantise(quantise_weight(weight, format), format)]
    return (values[0].double() @ values[1].double().t()).bfloat16()


def test_parts_of_fused_weights_have_tiles_of_their_own() -> None:
    model, count = Fused(), engine.Products()
    weight, bias = model.qkv_proj.weight.detach().clone(), model.qkv_proj.bias.detach().clone()
    engine.multiply_in_fp8(model, lambda module: not module.endswith("gate"), Format(), count)
    assert len(count) == 2
    assert type(model.gate.weight) is torch.nn.Parameter
    assert model.qkv_proj.weight.weight_loader == "SGLang's"
    x = torch.randn(3, 5, 160).bfloat16()
    parts = [exact(x.flatten(0, 1), part) for part in weight.split([192, 64, 64])]
    assert near(model.qkv_proj(x), torch.cat(parts, dim=1).view(3, 5, -1) + bias)
    one = torch.nn.functional.linear(x[0], model.experts.w13_weight[torch.tensor(1)])
    halves = model.experts.w13_weight.detach()[1].chunk(2)
    assert near(one, torch.cat([exact(x[0], half) for half in halves], dim=1))
    assert count.of == {"qkv_proj.weight": 1, "experts.w13_weight": 1}
    assert not count.unused
    assert model.qkv_proj(x[:, :0]).shape == (3, 0, 320)
    keywords = torch.nn.functional.linear(input=x, weight=model.qkv_proj.weight, bias=model.qkv_proj.bias)
    assert torch.equal(keywords, model.qkv_proj(x))


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, weight: x @ weight[0].t(),
        lambda x, weight: torch.bmm(x[None], weight.transpose(1, 2)[:1]),
        lambda x, weight: torch.einsum("mk,enk->men", x, weight),
    ],
)
def test_other_products_with_an_fp8_weight_are_errors(multiply: Any) -> None:
    model = Fused()
    engine.multiply_in_fp8(model, lambda module: True, Format(), engine.Products())
    with pytest.raises(UpstreamError, match=r"experts\.w13_weight"):
        multiply(torch.randn(5, 160).bfloat16(), model.experts.w13_weight)


def test_a_weight_that_never_multiplied_ends_the_run(checkpoint: Path) -> None:
    server_args = SimpleNamespace(model_path=str(checkpoint))
    plugin.engine_model_built(server_args, as_transformers_names_them())
    received = dict.fromkeys(tensors(checkpoint), 1)
    plugin.after_weight_update(server_args, received)
    for name in plugin._products.of:
        plugin._products.of[name] = 1
    plugin.after_weight_update(server_args, received)
    plugin._products.of["model.layers.0.mlp.experts.down_proj"] = 0
    with pytest.raises(PluginError, match=r"1 of 6, such as .*down_proj"):
        plugin.after_weight_update(server_args, received)


def tree(**modules: Any) -> Any:
    return torch.nn.ModuleDict(modules)


def as_transformers_names_them() -> Any:
    experts = torch.nn.Module()
    experts.gate_up_proj = torch.nn.Parameter(torch.zeros(8, 96, 96))
    experts.down_proj = torch.nn.Parameter(torch.zeros(8, 96, 48))
    attention = tree(**{f"{name}_proj": torch.nn.Linear(96, 96) for name in "qkvo"}, q_norm=torch.nn.LayerNorm(32))
    layer = tree(self_attn=attention, mlp=tree(gate=torch.nn.Linear(96, 8), experts=experts))
    layers = torch.nn.ModuleList([layer])
    return tree(model=tree(layers=layers, embed_tokens=torch.nn.Embedding(8, 96)), lm_head=torch.nn.Linear(96, 8))


def test_the_engines_model_multiplies_in_fp8_where_the_checkpoint_is(checkpoint: Path, bf16: Path) -> None:
    for folder, overrides, expected in ((checkpoint, None, 4 + 2), (checkpoint, "{}", 0), (bf16, None, 0)):
        plugin._at_engine, plugin._products = None, engine.Products()
        server_args = SimpleNamespace(model_path=str(folder), json_model_override_args=overrides)
        plugin.engine_model_built(server_args, as_transformers_names_them())
        assert len(plugin._products) == expected  # projections, and all experts' in two


def test_new_weights_are_quantised_anew() -> None:
    model, count = Fused(), engine.Products()
    engine.multiply_in_fp8(model, lambda module: True, Format(), count)
    x = torch.randn(5, 160).bfloat16()
    first = torch.nn.functional.linear(x, model.experts.w13_weight[0])
    model.experts.w13_weight.data[0].copy_(torch.randn(64, 160))  # as loaders do
    engine.weights_changed()
    second = torch.nn.functional.linear(x, model.experts.w13_weight[0])
    halves = model.experts.w13_weight.detach()[0].chunk(2)
    assert not torch.equal(first, second)
    assert near(second, torch.cat([exact(x, half) for half in halves], dim=1))


# -- alarms ------------------------------------------------------------------------------------------------------------


def stepped(args: Namespace, difference: float) -> dict[str, float]:
    """What a step reports whose log-probs differ by this."""
    found = Discrepancy()
    found.add(torch.full((8,), -1.0), torch.full((8,), -1.0 + difference), torch.ones(8))
    plugin._result = found.result()
    return dict(plugin.step_metrics(args))


def test_a_small_difference_raises_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        metrics = stepped(Namespace(fp8_max_kl=0.05, fp8_alarm="stop"), 0.01)
    assert metrics["fp8/difference/mean"] == pytest.approx(0.01, rel=1e-5)
    assert not caplog.records


def test_a_large_one_stops_or_warns(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PluginError, match=r"KL.*above --fp8-max-kl 0.05"):
        stepped(Namespace(fp8_max_kl=0.05, fp8_alarm="stop"), 1.0)
    with caplog.at_level(logging.WARNING):
        assert stepped(Namespace(fp8_max_kl=0.05, fp8_alarm="warn"), 1.0)
    assert "far from the rollout's" in caplog.text


def test_log_probs_that_are_not_finite_are_an_alarm() -> None:
    with pytest.raises(PluginError, match=r"not finite"):
        stepped(Namespace(fp8_max_kl=0.05, fp8_alarm="stop"), float("nan"))


def test_a_difference_that_rises_is_an_alarm() -> None:
    args = Namespace(fp8_max_kl=10.0, fp8_alarm="stop")
    differences = [0.011 + 0.025 * step / 29 for step in range(30)]

    def rollout(difference: float) -> None:
        plugin.receive_train_data()
        stepped(args, difference)

    for difference in differences[:12]:
        rollout(difference)
    with pytest.raises(PluginError, match="rise"):
        [rollout(difference) for difference in differences[12:]]


def test_only_the_first_step_of_a_rollout_is_judged() -> None:
    args = Namespace(fp8_max_kl=0.05, fp8_alarm="stop")
    stepped(args, 0.01)
    assert stepped(args, 1.0)  # a later one: the policy has moved
    plugin.receive_train_data()
    with pytest.raises(PluginError, match="KL"):
        stepped(args, 1.0)


def test_every_tensor_of_a_place_must_be_in_a_layer(checkpoint: Path) -> None:
    found = chosen.read(checkpoint)
    whole = {("0", "attention"): 4, ("0", "experts"): 8 * 3}
    chosen.require_covered(found, whole, 1)
    chosen.require_covered(found, {("1", "experts"): 4 * 3}, 2)
    with pytest.raises(PluginError, match=r"0, attention.*\n.*4\n.*3"):
        chosen.require_covered(found, {**whole, ("0", "attention"): 3}, 1)  # the output projection is of another class


# -- refusals ----------------------------------------------------------------------------------------------------------


def arguments(folder: Path, **others: Any) -> Namespace:
    given = {
        "hf_checkpoint": str(folder),
        "fp8_train": "aligned",
        "train_env_vars": {},
        "sglang_device": "cpu",
        "sglang_json_model_override_args": "{}",
        "plugins": "fp8,r3",
    }
    return Namespace(**{**given, **others})


def test_a_checkpoint_that_fits_is_taken_and_sglang_on_the_cpu_is_told_nothing(checkpoint: Path) -> None:
    args = arguments(checkpoint)
    plugin.configure(args)
    assert json.loads(args.sglang_json_model_override_args) == {"quantization_config": None}


def test_a_checkpoint_that_is_not_fp8_is_refused_with_the_way_out(bf16: Path) -> None:
    with pytest.raises(ArgumentError, match=r"not FP8.*\n(.*\n)*.*convert-fp8"):
        plugin.configure(arguments(bf16))


def test_what_the_rules_deny_is_refused_by_the_rules_name(checkpoint: Path) -> None:
    with pytest.raises(ArgumentError, match=r"fp8\.conversion"):
        plugin.configure(arguments(checkpoint, megatron_to_hf_mode="bridge"))


def test_transformer_engine_is_started_with_the_checkpoints_kind_of_scales(checkpoint: Path) -> None:
    args = arguments(checkpoint, fp8_train="te", fp8="e4m3", fp8_recipe="blockwise", sglang_device="cuda")
    with pytest.raises(ArgumentError):  # hidden sizes of the tiny model are no whole blocks
        plugin.configure(args)
    assert args.train_env_vars == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}
    own = arguments(checkpoint, fp8_train="te", train_env_vars={"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"})
    with pytest.raises(ArgumentError):
        plugin.configure(own)
    assert own.train_env_vars == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"}  # the rules judge what the user says


def test_a_part_of_a_layers_experts_in_fp8_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "torn"
    shutil.copytree(checkpoint, folder)
    for file in folder.glob("*.safetensors"):
        kept = tensors(folder)
        module = "model.layers.0.mlp.experts.2.up_proj"
        values = Quantised(kept.pop(f"{module}.weight"), kept.pop(f"{module}.weight_scale_inv"))
        kept[f"{module}.weight"] = dequantise(values, Format()).bfloat16()
        save_file(kept, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].pop(f"{module}.weight_scale_inv")
    index.write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match=r"a part of the weights.*\n(.*\n)*.*experts"):
        chosen.read(folder)


def test_int4_and_fp8_exclude_each_other() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", "--embedded", "--plugins", "int4,fp8"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "cannot be used together" in done.stderr
