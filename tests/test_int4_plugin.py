"""`--plugins int4`: what the trainer computes with is what the engine has; and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from miles_plugins import places  # noqa: E402
from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model  # noqa: E402
from miles_plugins.errors import ArgumentError, PluginError  # noqa: E402
from miles_plugins.fp8_unified.converter import convert_to_fp8  # noqa: E402
from miles_plugins.int4_qat import plugin, refusals, selection  # noqa: E402
from miles_plugins.int4_qat.checkpoint import packed_modules  # noqa: E402
from miles_plugins.int4_qat.converter import convert_to_int4  # noqa: E402
from miles_plugins.int4_qat.grid import Grid, fake_quantise  # noqa: E402
from miles_plugins.linears import Linear  # noqa: E402
from tests.checkpoint_folders import load  # noqa: E402

EQUALITY = """
import json, sys
from miles_plugins.embedded import host
from miles_plugins.embedded.hugging_face import checkpoint_places
from miles_plugins.embedded.policy import hugging_face_names, split
from miles_plugins.int4_qat import plugin

runs, found = [], {"weights": 0, "elements": 0, "different": 0, "different by slime's formulas": 0, "quantized": []}
found["layers"] = []
begin, use, end = host.EmbeddedRun.__init__, plugin.Int4Weights.__call__, plugin.pass_ends

def __init__(self, *args):
    runs.append(self)
    begin(self, *args)

def slimes(weight, size):
    groups = weight.float().unflatten(-1, (-1, size))
    scale = (groups.abs().amax(-1, keepdim=True) * plugin_seventh).clamp(min=1e-5)
    return ((groups / scale).round().clamp(-7, 7) * scale).bfloat16().flatten(-2)

import torch
plugin_seventh = torch.tensor(0.14285714924335480)

def __call__(self, weights):
    values = use(self, weights)
    if plugin._in_pass == "train":
        engine, name = checkpoint_places(runs[0].engine.model), self.linear.name + ".weight"
        found["layers"] = sorted({*found["layers"], self.linear.name.rpartition(".")[2]})
        pairs = zip(hugging_face_names(name), split(runs[0].args, name, values[0]), strict=True)
        raw = dict(zip(hugging_face_names(name), split(runs[0].args, name, weights[0]), strict=True))
        for part, value in pairs:
            found["weights"] += 1
            found["elements"] += value.numel()
            found["different"] += int((value != engine[part]).sum())
            found["different by slime's formulas"] += int((slimes(raw[part], 32) != engine[part]).sum())
    return values

def pass_ends(stage, error):
    found["quantized"].append([stage, sorted({layer.quantized for layer in plugin._layers})])
    end(stage, error)

host.EmbeddedRun.__init__, plugin.Int4Weights.__call__ = __init__, __call__
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
    command = [sys.executable, "-c", EQUALITY, "--embedded", "--run-folder", str(folder), "--num-rollout", "3", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.partition("FOUND ")[2])  # type: ignore[no-any-return]


@pytest.mark.parametrize("plugins", ["int4", "r3,int4"])
def test_the_trainer_computes_with_the_very_weights_that_the_engine_generated_with(
    tmp_path: Path, plugins: str
) -> None:
    pytest.importorskip("megatron.core")
    pytest.importorskip("transformers")
    found = train(tmp_path / "run", "--plugins", plugins, "--recompute-granularity", "full")
    assert found["weights"] > 0
    assert found["layers"] == ["linear_fc1", "linear_fc2"]
    assert found["different"] == 0
    share = found["different by slime's formulas"] / found["elements"]
    assert 0.03 < share < 0.12  # the same weights by slime's trainer: 6.9 % for groups of 32
    # Once a pass, however many microbatches and recomputations.
    assert found["quantized"] == [["train", [number]] for number in (1, 2, 3)]


def test_attention_and_experts_are_the_engines_too(tmp_path: Path) -> None:
    """Where the checkpoint has both packed: queries, keys and values of each group of heads are rows of one weight."""
    pytest.importorskip("megatron.core")
    write_tiny_model(tmp_path / "model")
    convert_to_int4(tmp_path / "model", tmp_path / "int4", Grid(32), modules=("experts", "attention"))
    chosen = ("--hf-checkpoint", str(tmp_path / "int4"), "--int4-modules", "experts", "attention")
    found = train(tmp_path / "run", "--plugins", "int4", *chosen, "--num-rollout", "1")
    assert found["layers"] == ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"]
    assert found["different"] == 0
    assert found["different by slime's formulas"] > 0.03 * found["elements"]


def test_the_reference_computes_on_the_grid_unless_it_is_told_not_to(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    kl = ("--plugins", "int4", "--use-kl-loss", "--kl-loss-coef", "0.1", "--kl-loss-type", "k3")
    both = train(tmp_path / "both", *kl)
    assert both["quantized"][:2] == [["ref_log_prob", [1]], ["train", [2]]]
    actor = train(tmp_path / "actor", *kl, "--int4-other-passes")
    assert actor["quantized"][:2] == [["ref_log_prob", [0]], ["train", [1]]]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a trainer that has not built a model."""
    found = {"_selection": None, "_grid": None, "_layers": [], "_places": Counter(), "_natural": frozenset()}
    found |= {"_in_pass": None, "_role": "", "_complete": False}
    for name, value in found.items():
        monkeypatch.setattr(plugin, name, value)


def layer(args: Namespace, role: str = "actor", columns: int = 64) -> Any:
    """What the plugin has the first layer's experts compute with: of one weight [2, columns]."""
    name = "decoder.layers.0.mlp.experts.linear_fc1"
    return plugin.forward_weight(args, role, Linear(name, 0, (2, columns), 1, None, ("weight",), "megatron"))  # type: ignore[arg-type]


def one_pass(stage: str, use: Any, error: BaseException | None = None) -> Any:
    plugin.pass_begins(stage, [])
    try:
        return use()
    finally:
        plugin.pass_ends(stage, error)


@pytest.mark.usefixtures("trainer")
@pytest.mark.parametrize(
    ("others", "on_the_grid"),
    [
        ([], {"train"}),
        (["ref"], {"train", "ref_log_prob"}),
        (["teacher"], {"train", "teacher_log_prob"}),
        (["ref", "teacher", "critic"], {"train", "ref_log_prob", "teacher_log_prob"}),
    ],
)
def test_other_passes_compute_on_the_grid_only_where_that_is_said(
    checkpoint: Path, others: list[str], on_the_grid: set[str]
) -> None:
    args = arguments(checkpoint, int4_other_passes=others)
    plugin.model_built(args, [], "actor")
    weight = torch.randn(2, 64).bfloat16()
    compute, found = layer(args), set()
    plugin._complete = True  # of this model there is one layer
    for stage in ("train", "ref_log_prob", "teacher_log_prob"):
        (value,) = one_pass(stage, lambda: compute([weight]))
        found |= {stage} if torch.equal(value, fake_quantise(weight, Grid(32))) else set()
        assert stage in found or value is weight
    assert found == on_the_grid


@pytest.mark.usefixtures("trainer")
def test_a_critic_computes_on_the_grid_only_where_that_is_said(checkpoint: Path) -> None:
    for others, quantised in ((["ref", "teacher"], False), (["critic"], True)):
        args = arguments(checkpoint, int4_other_passes=others)
        plugin.model_built(args, [], "critic")
        assert (layer(args, "critic") is not None) == quantised
        plugin.model_built(args, [], "actor")
        assert layer(args, "actor") is not None


@pytest.mark.usefixtures("trainer")
@pytest.mark.parametrize("error", [None, ValueError("no memory left")])
def test_a_pass_computes_with_the_weights_that_it_finds(checkpoint: Path, error: BaseException | None) -> None:
    """slime loads the reference's into the very parameters of the actor; a pass may also end with an error."""
    args = arguments(checkpoint)
    plugin.model_built(args, [], "actor")
    plugin._complete = True  # as above
    parameter, compute = torch.randn(2, 64).bfloat16(), layer(args)
    values = {}
    for stage in ("ref_log_prob", "train"):
        parameter.copy_(torch.randn(2, 64))
        values[stage] = one_pass(stage, lambda: [compute([parameter])[0] for _ in range(3)], error)
        assert all(torch.equal(value, fake_quantise(parameter, Grid(32))) for value in values[stage])
        assert compute._kept is None
    assert compute.quantized == 2
    assert not torch.equal(values["ref_log_prob"][0], values["train"][0])


@pytest.mark.usefixtures("trainer")
def test_a_pass_that_begins_computes_with_new_weights_whatever_was_before(checkpoint: Path) -> None:
    args = arguments(checkpoint)
    plugin.model_built(args, [], "actor")
    plugin._complete = True
    compute = layer(args)
    for weight in torch.randn(2, 2, 64).bfloat16():
        plugin.pass_begins("train", [])
        assert torch.equal(compute([weight])[0], fake_quantise(weight, Grid(32)))


@pytest.mark.usefixtures("trainer")
def test_a_layer_of_which_this_rank_has_no_whole_groups_is_refused(checkpoint: Path) -> None:
    args = arguments(checkpoint)
    plugin.model_built(args, [], "actor")
    with pytest.raises(ArgumentError, match="linear_fc1 cannot be quantised in groups of 32 on this rank"):
        layer(args, columns=48)


@pytest.mark.usefixtures("trainer")
def test_weights_of_another_dtype_are_refused(checkpoint: Path) -> None:
    args = arguments(checkpoint)
    plugin.model_built(args, [], "actor")
    with pytest.raises(PluginError, match=r"linear_fc1 cannot be trained on the INT4 grid(?s:.*)torch.float32"):
        layer(args)([torch.randn(2, 64)])


@pytest.mark.usefixtures("trainer")
def test_training_does_not_begin_without_layers_for_all_that_is_packed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(checkpoint)
    plugin.model_built(args, [], "actor")
    layer(args)
    monkeypatch.setattr(places, "local_layers", lambda model: {"0"})
    plugin.pass_begins("train", [])
    plugin.pass_ends("train", None)
    monkeypatch.setattr(places, "local_layers", lambda model: {"0", "1"})
    monkeypatch.setattr(plugin, "_complete", False)
    with pytest.raises(PluginError, match=r"have no linear layers in the trainer(?s:.*)1 \(experts\)"):
        plugin.pass_begins("train", [])


@pytest.mark.parametrize("make", ["int4", "fp8"])
def test_a_quantised_checkpoint_without_its_plugin_is_refused_with_the_flag_to_give(tmp_path: Path, make: str) -> None:
    """By what its config.json says: no plugin is read for it."""
    write_tiny_model(tmp_path / "model")
    if make == "int4":
        convert_to_int4(tmp_path / "model", tmp_path / "small", Grid(32))
    else:
        convert_to_fp8(tmp_path / "model", tmp_path / "small")
    flags = ["--embedded", "--num-rollout", "1", "--hf-checkpoint", str(tmp_path / "small"), "--plugins", "r3"]
    command = [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", *flags]
    done = subprocess.run(
        [*command, "--run-folder", str(tmp_path / "run")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert re.search(rf"(?s)quantised.*add --plugins {make}", done.stderr), done.stderr[-2000:]


# -- what goes to the engine, and arrives ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bf16"
    write_tiny_model(folder)
    return plugin.prepare_tiny_model(folder)


def arguments(folder: Path, **others: Any) -> Namespace:
    return Namespace(
        hf_checkpoint=str(folder),
        **{
            "int4_modules": ["experts"],
            "int4_grid": "stock",
            "int4_other_passes": ["ref"],
            **others,
        },
    )


def test_exactly_the_weights_that_the_checkpoint_has_packed_are_packed(checkpoint: Path) -> None:
    torch.manual_seed(0)
    gate = torch.randn(8, 64).bfloat16()
    down = torch.randn(64, 32).bfloat16()
    name = "model.layers.1.mlp.experts.7.down_proj"
    sent = plugin.export_weights(
        arguments(checkpoint), [("model.layers.1.mlp.gate.weight", gate), (f"{name}.weight", down)]
    )
    assert [each for each, _ in sent] == [
        "model.layers.1.mlp.gate.weight",
        *(f"{name}.weight_{part}" for part in ("packed", "scale", "shape")),
    ]
    assert sent[0][1] is gate
    arrived = dict(plugin.receive_weights(None, iter(sent)))  # type: ignore[arg-type]
    assert torch.equal(arrived[f"{name}.weight"], fake_quantise(down, Grid(32)))


def test_a_weight_of_which_a_group_would_be_cut_is_not_exported(checkpoint: Path) -> None:
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    with pytest.raises(PluginError, match=rf"{name} cannot be quantised in groups of 32"):
        plugin.export_weights(arguments(checkpoint), [(name, torch.ones(64, 48).bfloat16())])


def test_half_of_a_packed_weight_is_refused() -> None:
    parts = [("a.weight_packed", torch.zeros(2, 4, dtype=torch.int32))]
    with pytest.raises(PluginError, match="without its scales"):
        list(plugin.receive_weights(None, parts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda names: names.pop("b.weight_scale"), "missing"),
        (lambda names: names.update({"b.weight_packed": 2}), "twice"),
        (lambda names: names.update({"b.weight": 1}), "not packed"),
        (lambda names: names.update({"c.weight_packed": 1}), "unknown"),
    ],
)
def test_an_update_must_bring_each_packed_weight_once(change: Any, problem: str) -> None:
    wanted = ["b.weight_packed", "b.weight_scale"]
    names = dict.fromkeys(wanted, 1)
    refusals.check_received(wanted, [], names)
    change(names)
    with pytest.raises(PluginError, match=rf"{problem} .*1, such as"):
        refusals.check_received(wanted, [], names)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a scheduler that has not loaded a model."""
    monkeypatch.setattr(plugin, "_packed_at_engine", None)


def packed_names(folder: Path) -> dict[str, int]:
    return {f"{module}.weight_{part}": 1 for module in packed_modules(folder) for part in ("packed", "scale")}


@pytest.mark.usefixtures("engine")
def test_the_engine_holds_an_update_to_the_checkpoint_that_it_began_with(checkpoint: Path, tmp_path: Path) -> None:
    server = Namespace(model_path=str(checkpoint))
    plugin.receive_weights(server, iter([]))
    server.model_path = str(tmp_path / "weights_v000001")  # so does SGLang for an update on disk, which slime deletes
    names = packed_names(checkpoint)
    plugin.after_weight_update(server_args=server, received=names)
    names.popitem()
    with pytest.raises(PluginError, match="does not resume"):
        plugin.after_weight_update(server_args=server, received=names)


@pytest.mark.usefixtures("engine")
def test_a_packed_draft_may_come_and_may_stay_away(checkpoint: Path, tmp_path: Path) -> None:
    """GLM's and DeepSeek's checkpoints have it as a layer after the last; not every trainer has it."""
    folder = changed(checkpoint, tmp_path / "model", lambda config: config.update(num_hidden_layers=1))
    server = Namespace(model_path=str(folder))
    plugin.receive_weights(server, iter([]))
    names = packed_names(folder)
    policy = {name: times for name, times in names.items() if ".layers.0." in name}
    assert 0 < len(policy) < len(names)
    for received in (names, policy):
        plugin.after_weight_update(server_args=server, received=received)
    policy.popitem()
    with pytest.raises(PluginError, match="does not resume"):
        plugin.after_weight_update(server_args=server, received=policy)


SERVER = {"json_model_override_args": "{}", "tp_size": 1, "ep_size": 1, "pp_size": 1, "moe_runner_backend": "auto"}


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pp_size": 2}, "pp_size"),
        ({"speculative_algorithm": "EAGLE"}, "speculative_algorithm"),
        ({"moe_runner_backend": "triton"}, "moe_runner_backend"),
        ({"tp_size": 2}, "without a word"),
    ],
)
def test_an_engine_with_arguments_of_its_own_is_held_to_the_same(
    checkpoint: Path, changes: dict[str, Any], named: str
) -> None:
    """As --sglang-config gives one, past the flags that the driver sees."""
    server = Namespace(model_path=str(checkpoint), **{**SERVER, **changes})
    with pytest.raises(ArgumentError, match=named):
        plugin.receive_weights(server, iter([]))


# -- refusals --------------------------------------------------------------------------------------------------------


def check(args: Namespace) -> None:
    refusals.check(args, selection.read(Path(args.hf_checkpoint)))


def test_a_checkpoint_that_fits_is_taken(checkpoint: Path) -> None:
    check(arguments(checkpoint))


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"train_env_vars": '{"OPEN_TRAINING_INT4_FAKE_QAT_FLAG": "1"}'}, "--train-env-vars"),
        ({"use_transformer_engine_op_fuser": True}, "--use-transformer-engine-op-fuser"),
        ({"moe_single_grouped_weight": True}, "--moe-single-grouped-weight"),
        ({"fp8": "e4m3"}, "--fp8-format"),
        ({"fp4": "e2m1"}, "--fp4-format"),
        ({"fp16": True}, "--fp16"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
        ({"enable_cuda_graph": True}, "--enable-cuda-graph"),
        ({"external_cuda_graph": True}, "--external-cuda-graph"),
        ({"update_weight_mode": "delta"}, "--update-weight-mode"),
        ({"megatron_to_hf_mode": "bridge"}, "--megatron-to-hf-mode"),
        ({"sglang_device": None, "sglang_moe_runner_backend": "triton"}, "--sglang-moe-runner-backend"),
        ({"sglang_pp_size": 2}, "--sglang-pp-size"),
        ({"sglang_pipeline_parallel_size": 2}, "--sglang-pp-size"),
        ({"sglang_speculative_algorithm": "EAGLE"}, "--sglang-speculative-algorithm"),
        ({"int4_modules": ["experts", "mlp"]}, "--int4-modules"),
    ],
)
def test_what_cannot_work_is_refused_by_its_flag(checkpoint: Path, others: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        check(arguments(checkpoint, **others))


def test_the_hook_of_slimes_image_would_quantize_twice(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(refusals.HOOK, "1")
    with pytest.raises(ArgumentError, match=refusals.HOOK):
        check(arguments(checkpoint))


@pytest.mark.usefixtures("trainer")
def test_a_trainer_looks_at_its_own_environment_and_arguments(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's environment is not the driver's, nor its arguments with --megatron-config-path."""
    with pytest.raises(ArgumentError, match=r"(?s)this trainer.*--fp16"):
        plugin.model_built(arguments(checkpoint, fp16=True), [], "actor")
    plugin.model_built(arguments(checkpoint), [], "actor")
    monkeypatch.setenv(refusals.HOOK, "1")
    with pytest.raises(ArgumentError, match=rf"(?s)this trainer.*{refusals.HOOK}"):
        plugin.model_built(arguments(checkpoint), [], "actor")


def test_sglang_on_the_cpu_is_told_nothing_of_the_format(checkpoint: Path) -> None:
    args = arguments(checkpoint, sglang_device="cpu", sglang_json_model_override_args='{"rope_theta": 5}')
    plugin.configure(args)
    assert json.loads(args.sglang_json_model_override_args) == {"rope_theta": 5, "quantization_config": None}


@pytest.mark.usefixtures("engine")
def test_sglang_with_the_kernel_gets_the_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_dequantized", 0)
    parts = [("a.weight_packed", torch.zeros(2, 4, dtype=torch.int32)), ("b.weight", torch.zeros(2))]
    server = Namespace(json_model_override_args='{"quantization_config": {"of": "the user"}}')
    assert list(plugin.receive_weights(server, iter(parts))) == parts  # type: ignore[arg-type]
    assert "loaded packed" in str(plugin.probe("sglang_scheduler"))


def test_groups_on_two_ranks_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ArgumentError, match=r"(?s)down_proj.*groups of 32.*32 / 2.*--expert-tensor-parallel-size"):
        check(arguments(checkpoint, expert_tensor_parallel_size=2))


def test_marlin_would_take_these_groups_for_others(checkpoint: Path) -> None:
    with pytest.raises(ArgumentError, match=r"(?s)without a word.*multiple of 64"):
        check(arguments(checkpoint, sglang_device=None, rollout_num_gpus_per_engine=1))


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (3, 1, 1), (8, 4, 1), (8, 8, 1), (4, 1, 2), (4, 2, 2)])
def test_marlin_takes_whole_groups_on_each_gpu(layout: tuple[int, int, int]) -> None:
    """(GPUs of an engine, --ep-size, --moe-dp-size), for Qwen3-30B-A3B's experts: 768 divided by 1, 2, 3."""
    refusals._require_marlins_groups(("down", 768, 2048), 128, *layout)


@pytest.mark.parametrize(
    ("experts", "size", "layout"),
    [
        (("down", 768, 2048), 128, (4, 1, 1)),  # 192 is one group and a half
        (("down", 768, 2048), 128, (8, 2, 1)),
        (("down", 768, 2048), 128, (8, 1, 2)),
        (("down", 768, 2048), 32, (8, 1, 1)),  # 96: three groups of 32, and no whole tiles of 64
        (("down", 768, 2112), 32, (1, 1, 1)),  # 2112 / 128
    ],
)
def test_marlin_would_take_several_groups_for_one(
    experts: tuple[str, int, int], size: int, layout: tuple[int, int, int]
) -> None:
    with pytest.raises(ArgumentError, match="take the groups of down for others"):
        refusals._require_marlins_groups(experts, size, *layout)


def test_groups_that_the_engines_kernel_does_not_have_are_refused_for_it(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    folder = tmp_path / "small"
    convert_to_int4(tmp_path / "model", folder, Grid(8))
    check(arguments(folder))
    with pytest.raises(ArgumentError, match=r"--hf-checkpoint.*groups of 8, and SGLang's kernel only 32, 64, 128"):
        check(arguments(folder, sglang_device=None))


def test_a_checkpoint_that_is_not_int4_is_refused_with_the_way_out(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    with pytest.raises(ArgumentError, match="convert-int4"):
        check(arguments(tmp_path / "model"))


def changed(checkpoint: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    (group,) = config["quantization_config"]["config_groups"].values()
    return group["weights"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda config: weights_of(config).update(symmetric=False), "symmetric"),
        (lambda config: weights_of(config).update(group_size=16), "declared.*group_size 16"),
        (lambda config: config.update(text_config={**config}, quantization_config=None), "text_config only.*top"),
    ],
)
def test_a_checkpoint_that_says_something_else_than_it_holds(
    checkpoint: Path, tmp_path: Path, change: Any, problem: str
) -> None:
    with pytest.raises(PluginError, match=rf"(?s){problem}"):
        check(arguments(changed(checkpoint, tmp_path / "changed", change)))


@pytest.mark.parametrize("given", [["experts", "attention"], ["experts,attention"], ["experts,", "attention"]])
def test_modules_are_named_with_spaces_or_commas(given: list[str]) -> None:
    parser = ArgumentParser()
    plugin.register_arguments(parser)
    assert parser.parse_args(["--int4-modules", *given]).int4_modules == ["experts", "attention"]
    assert parser.parse_args([]).int4_modules == ["experts"]


@pytest.mark.parametrize("given", [["router"], ["experts,router"], [","]])
def test_modules_that_there_are_not_are_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    plugin.register_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--int4-modules", *given])
    assert "--int4-modules" in (error := capsys.readouterr().err)
    assert "experts, shared-experts, mlp, attention" in error


def test_other_modules_than_the_checkpoints_are_refused_with_the_flag_to_give(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    convert_to_int4(tmp_path / "model", tmp_path / "int4", Grid(32), modules=("attention", "experts"))
    with pytest.raises(ArgumentError, match="give --int4-modules experts,attention") as error:
        check(arguments(tmp_path / "int4"))
    assert "the flag says experts" in str(error.value)


@pytest.mark.usefixtures("trainer", "engine")
def test_the_trainers_and_the_engines_numbers_are_of_the_same_matrices(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert's gate and up are one weight of Megatron's, and queries, keys and values another."""
    args = arguments(checkpoint)
    plugin.model_built(args, [], "actor")
    for number, name in ((0, "fc1"), (0, "fc2"), (1, "fc1"), (1, "fc2")):
        whole = f"decoder.layers.{number}.mlp.experts.linear_{name}"
        plugin.forward_weight(args, "actor", Linear(whole, number, (64, 64), 8, None, ("weight",), "grouped_mlp"))  # type: ignore[arg-type]
    assert plugin.probe("trainer") == (
        "actor: 48 INT4 matrices, gate and up in one: 32 weights of 4 layers on the grid (experts, groups of 32)"
    )
    monkeypatch.setattr(plugin, "_arrived", 0)
    monkeypatch.setattr(plugin, "_dequantized", 0)
    packed = [pair for name, tensor in load(checkpoint).items() if ".weight_" in name for pair in [(name, tensor)]]
    list(plugin.receive_weights(Namespace(model_path=str(checkpoint)), packed))  # type: ignore[arg-type]
    assert str(plugin.probe("sglang_scheduler")).startswith("48 INT4 matrices loaded as the bfloat16 values")


def test_dense_int4_layers_are_refused_for_sglang(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    convert_to_int4(tmp_path / "model", tmp_path / "dense", Grid(32), modules=("experts", "attention"))
    both = arguments(tmp_path / "dense", int4_modules=["attention", "experts"])
    check(both)
    both.sglang_device = None
    with pytest.raises(ArgumentError, match=r"--hf-checkpoint.*packs attention"):
        check(both)
