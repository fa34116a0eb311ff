"""`miles-plugins check-fp8`, and the facts that it finds: flags, variables, config.json, a few bytes of weights."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from miles_plugins import activation
from miles_plugins.compat import fp8_upstream, slime_drafts
from miles_plugins.compat.source import reading_from
from miles_plugins.entrypoints.check_fp8 import check_fp8, parse
from miles_plugins.errors import PluginError
from miles_plugins.fp8_unified import facts as facts_module
from miles_plugins.fp8_unified.facts import ACTIVE, Here, capability_of, from_args, look_here
from miles_plugins.fp8_unified.rules import VARIABLE, Facts, Model, Upstream, judge

TINY: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "intermediate_size": 256,
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
SHAPES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (256, 256),
    "mlp.up_proj": (256, 256),
    "mlp.down_proj": (256, 256),
}
BLOCKWISE = ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"]
ALL_SEEN = Here(90, "2.10.0", (12, 9), "0.5.15.post1", False, Upstream(False, True, True, False))


def write_safetensors(file: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def checkpoint(
    folder: Path, scale: float = 0.3, plain: tuple[str, ...] = (), code: bytes = b"\x38", **quantization: Any
) -> Path:
    """A tiny FP8 checkpoint; `plain`: ends of modules that stay in bfloat16."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY | {"quantization_config": FP8 | quantization}))
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for layer in range(2):
        for name, (n, k) in SHAPES.items():
            module = f"model.layers.{layer}.{name}"
            if any(end in module for end in plain):
                tensors[f"{module}.weight"] = ("BF16", (n, k), bytes(2 * n * k))
                continue
            tensors[f"{module}.weight"] = ("F8_E4M3", (n, k), code * (n * k))
            tiles = (n // 128, k // 128)
            data = struct.pack("<f", scale) * (tiles[0] * tiles[1])
            tensors[f"{module}.weight_scale_inv"] = ("F32", tiles, data)
        norm = f"model.layers.{layer}.input_layernorm.weight"
        tensors[norm] = ("BF16", (256,), bytes(512))
    tensors["model.embed_tokens.weight"] = ("BF16", (32, 256), bytes(2 * 32 * 256))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """No test depends on what is installed on this machine, or on its variables."""
    monkeypatch.setattr("miles_plugins.entrypoints.check_fp8.look_here", lambda: ALL_SEEN)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("SGLANG_ENABLE_JIT_DEEPGEMM", raising=False)


def run(*flags: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(check_fp8, [str(flag) for flag in flags])


def verdicts(*flags: object) -> dict[str, set[str]]:
    """Rule -> its verdicts."""
    found: dict[str, set[str]] = {}
    for decision in json.loads(run("--json", *flags).output)["decisions"]:
        found.setdefault(decision["rule"], set()).add(decision["verdict"])
    return found


def denied(*flags: object) -> set[str]:
    return {rule for rule, of_rule in verdicts(*flags).items() if "deny" in of_rule}


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_launch_that_agrees(tmp_path):
    result = run("--hf-checkpoint", checkpoint(tmp_path), *BLOCKWISE, "--lr", "1e-6", "--colocate", "--bf16")
    assert result.exit_code == 0, result.output
    assert "deny " not in result.output
    assert "fp8.scale-kind" in result.output
    assert result.output.splitlines()[-1].startswith("0 denied, 0 with a warning, ")
    assert "3 other flags were passed over" in result.output
    assert {
        rule for rule, found in verdicts("--hf-checkpoint", tmp_path, *BLOCKWISE).items() if "warn" in found
    } == set()


def test_a_launch_that_does_not_shows_both_sides_the_cost_and_the_fix(tmp_path):
    flags = ["--hf-checkpoint", checkpoint(tmp_path), *BLOCKWISE, "--train-env-vars", json.dumps({VARIABLE: "0"})]
    result = run(*flags)
    assert result.exit_code == 1
    first = result.output.splitlines()[0]
    assert first.startswith("deny   fp8.scale-kind")
    words = " ".join(result.output.split())
    assert "trainer pow2 (from --train-env-vars), rollout fp32" in words
    assert "expected fp32 on both sides" in words
    assert "costs 3.7 %" in words
    assert f'→ set --train-env-vars \'{{"{VARIABLE}": "1"}}\'' in words
    assert "1 denied" in result.output.splitlines()[-1]


def test_without_flags_there_is_nothing_to_deny():
    result = run()
    assert result.exit_code == 0
    assert "there is no FP8" in result.output


def test_all_shows_what_is_allowed_in_full(tmp_path):
    flags = ["--hf-checkpoint", checkpoint(tmp_path), *BLOCKWISE]
    assert run(*flags).output.count("expected ") < run("--all", *flags).output.count("expected ")


def test_json_has_every_field(tmp_path):
    found = json.loads(run("--json", "--hf-checkpoint", checkpoint(tmp_path), "--colocate").output)
    assert set(found) == {"decisions", "post_process", "ignored"}
    assert found["ignored"] == ["--colocate"]
    assert found["post_process"] is False
    assert all(set(each) == {"rule", "verdict", "found", "expected", "cost", "next"} for each in found["decisions"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hf-checkpoint", "/nowhere/at/all"], "is no folder here"),
        (["--gpu", "voodoo2"], "this GPU is not known"),
        (["--gpu", "voodoo2"], "such as 9.0"),
        (["--tensor-model-parallel-size", "two"], "invalid int value"),
        (["--train-env-vars", "{oops"], "--train-env-vars is not JSON"),
        (["--train-env-vars", "[1]"], "--train-env-vars is not a JSON object"),
        (["--fp8-format", "e4m3", "--fp8-recipe", "cubic"], "this FP8 recipe is not known"),
        (["--fp8-train", "maybe"], "invalid choice"),
        (["--env", "NAME"], "--env takes NAME=VALUE"),
    ],
)
def test_what_cannot_be_understood_is_one_readable_error(flags, words):
    result = run(*flags)
    assert result.exit_code == 1
    assert words in result.output
    assert "next" in result.output
    assert "Traceback" not in result.output


def test_a_folder_without_config(tmp_path):
    result = run("--hf-checkpoint", tmp_path)
    assert result.exit_code == 1
    assert "no config.json in" in result.output


def test_the_gpu_is_named_for_both_sides_or_for_the_engine_alone(tmp_path):
    flags = ["--hf-checkpoint", checkpoint(tmp_path), *BLOCKWISE]
    assert denied(*flags) == set()
    assert {"fp8.emulated-blocks", "fp8.scale-kind"} <= denied("--gpu", "b200", *flags)
    assert denied("--engine-gpu", "B200", *flags) == {"fp8.scale-kind"}
    assert "fp8.compute-capability" in denied("--gpu", "8.0", *flags)


def test_a_variable_of_the_job(tmp_path):
    flags = ["--hf-checkpoint", checkpoint(tmp_path), *BLOCKWISE]
    assert "fp8.scale-kind" in denied("--env", f"{VARIABLE}=0", *flags)
    assert denied("--env", f"{VARIABLE}=1", *flags) == set()


def test_on_a_machine_without_a_gpu_a_missing_transformer_engine_says_nothing(tmp_path, monkeypatch):
    flags = ["--hf-checkpoint", checkpoint(tmp_path), *BLOCKWISE]
    laptop = Here(transformer_engine="")
    monkeypatch.setattr("miles_plugins.entrypoints.check_fp8.look_here", lambda: laptop)
    assert "fp8.transformer-engine" not in verdicts(*flags)
    assert verdicts(*flags)["fp8.not-visible"] == {"warn"}
    assert "fp8.transformer-engine" in denied("--sglang-device", "cpu", *flags)
    monkeypatch.setattr("miles_plugins.entrypoints.check_fp8.look_here", lambda: Here(90, ""))
    assert "fp8.transformer-engine" in denied(*flags)


def test_nothing_heavy_is_imported(tmp_path):
    code = """
import sys
from miles_plugins.entrypoints.check_fp8 import check_fp8
check_fp8(sys.argv[1:], standalone_mode=False)
"""
    watch = "import atexit, sys; atexit.register(lambda: print('HEAVY', sorted({'torch', 'ray', 'slime', 'megatron', "
    watch += "'sglang', 'transformers', 'transformer_engine', 'triton', 'numpy'} & set(sys.modules))))\n"
    flags = ["--gpu", "h100", "--hf-checkpoint", str(checkpoint(tmp_path)), *BLOCKWISE]
    done = subprocess.run([sys.executable, "-c", watch + code, *flags], capture_output=True, text=True, timeout=60)
    assert "HEAVY []" in done.stdout, done.stderr


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def test_ue8m0_that_is_only_a_word(tmp_path):
    folder = checkpoint(tmp_path, scale=0.3, scale_fmt="ue8m0")
    assert "fp8.declared-scales" in denied("--hf-checkpoint", folder)
    folder = checkpoint(tmp_path, scale=0.25, scale_fmt="ue8m0")
    assert denied("--hf-checkpoint", folder) == set()


def test_powers_of_two_that_nobody_declares(tmp_path):
    folder = checkpoint(tmp_path, scale=2.0**-9)
    assert verdicts("--hf-checkpoint", folder)["fp8.declared-scales"] == {"warn"}


@pytest.mark.parametrize("scale", [2.0**-9 * (1 + 2.0**-23), 0.0009765626, 3.0])
def test_scales_that_are_nearly_powers_of_two(tmp_path, scale):
    folder = checkpoint(tmp_path, scale=scale)
    assert verdicts("--hf-checkpoint", folder)["fp8.declared-scales"] == {"allow"}


@pytest.mark.parametrize(("code", "found"), [(b"\x7f", True), (b"\xff", True), (b"\x00", False), (b"\x80", False)])
def test_blocks_of_zeros_that_became_nan(tmp_path, code, found):
    folder = checkpoint(tmp_path, scale=0.0, code=code)
    assert ("fp8.zero-blocks" in denied("--hf-checkpoint", folder)) is found


def test_modules_that_sglang_would_build_otherwise(tmp_path):
    folder = checkpoint(tmp_path, modules_to_not_convert=["model.layers.1.mlp.down_proj"])
    result = run("--hf-checkpoint", folder)
    assert result.exit_code == 1
    assert "only in checkpoint: model.layers.1.mlp.down_proj" in " ".join(result.output.split())


def test_a_module_that_only_the_converter_quantises(tmp_path, monkeypatch):
    """slime's converter quantises all but a list of names; a weight update sends this gate in bfloat16."""
    monkeypatch.setitem(SHAPES, "mlp.shared_expert_gate", (1, 256))
    found = run("--hf-checkpoint", checkpoint(tmp_path)).output
    assert "only in checkpoint: model.layers.0.mlp.shared_expert_gate" in " ".join(found.split())


def test_a_fused_layer_that_is_half_fp8(tmp_path):
    left = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    folder = checkpoint(tmp_path, plain=("q_proj",), modules_to_not_convert=left)
    assert "fp8.torn-layers" in denied("--hf-checkpoint", folder)


def test_layers_that_the_checkpoint_keeps(tmp_path):
    left = [f"model.layers.1.{name}" for name in SHAPES]
    folder = checkpoint(tmp_path, plain=("layers.1.",), modules_to_not_convert=left)
    flags = ["--hf-checkpoint", folder, *BLOCKWISE]
    assert denied(*flags) == {"fp8.bf16-layers"}
    start, end = "--num-layers-at-start-in-bf16", "--num-layers-at-end-in-bf16"
    assert denied(*flags, "--first-last-layers-bf16", start, "0", end, "1") == set()
    assert denied(*flags, "--first-last-layers-bf16") == {"fp8.bf16-layers"}  # both ends are 1 then


def test_only_experts_in_fp8_are_not_asked_for_blocks_of_attention(tmp_path):
    left = [f"model.layers.{layer}.{name}" for layer in range(2) for name in SHAPES if "self_attn" in name]
    folder = checkpoint(tmp_path, plain=("self_attn",), modules_to_not_convert=left)
    facts = from_args(parse(["--fp8-train", "aligned"])[0], {}, folder, ALL_SEEN)
    assert facts.checkpoint.kinds == {"mlp"}
    assert denied("--hf-checkpoint", folder, "--rollout-num-gpus-per-engine", "2") == set()
    assert denied("--hf-checkpoint", folder, *BLOCKWISE) == {"fp8.selection"}  # TransformerEngine's attention is FP8
    assert "fp8.engine-blocks" in denied("--hf-checkpoint", folder, "--rollout-num-gpus-per-engine", "4")


def test_config_alone_and_index_alone(tmp_path):
    folder = checkpoint(tmp_path)
    names = set(json.loads(_header(folder / "model.safetensors")))
    (folder / "model.safetensors").unlink()
    facts = from_args(parse([])[0], {}, folder, ALL_SEEN)
    assert facts.checkpoint.method == "fp8-block"
    assert facts.selections == {}
    assert facts.checkpoint.powers_of_two is None
    index = {"weight_map": dict.fromkeys(names, "model-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    facts = from_args(parse([])[0], {}, folder, ALL_SEEN)
    assert len(facts.selections["checkpoint"]) == 14
    assert facts.selections["checkpoint"] == facts.selections["engine"] == facts.selections["weight update"]
    assert facts.checkpoint.powers_of_two is None
    assert "the checkpoint's scales" in next(each.found for each in judge(facts) if each.rule == "fp8.not-visible")


def _header(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 : 8 + struct.unpack("<Q", data[:8])[0]]


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        (FP8, "fp8-block"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8-tensor"),
        ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, "mxfp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "unknown"),
        ({"quant_algo": "FP8"}, "unknown"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "int4"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8-channel"),
        ({"quant_method": "awq"}, "unknown"),
        ("fp8", "unknown"),
        (None, "bf16"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_method_of_a_checkpoint(tmp_path, quantization, method, nested):
    config = TINY | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    facts = from_args(parse([])[0], {}, tmp_path)
    assert facts.checkpoint.method == method
    assert facts.model.hidden == 256


# -- the model --------------------------------------------------------------------------------------------------------

MLA = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
FAMILIES = {
    "llama": (
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
        {"ffn": 14336, "groups": 32, "head_dim": 128, "experts": 0},
    ),
    "qwen2": (
        {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864},
        {"ffn": 4864, "groups": 2, "head_dim": 64},
    ),
    "qwen2_moe": (
        {
            "num_experts": 60,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "intermediate_size": 5632,
            "decoder_sparse_step": 1,
        },
        {"ffn": 0, "experts": 60, "moe_ffn": 1408, "shared_ffn": 5632},
    ),
    "qwen3_moe": (
        {
            "num_experts": 128,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        {"ffn": 0, "experts": 128, "moe_ffn": 768, "shared_ffn": 0},
    ),
    "qwen3_moe, one dense": (
        {"num_experts": 128, "moe_intermediate_size": 768, "intermediate_size": 6144, "mlp_only_layers": [0]},
        {"ffn": 6144},
    ),
    "deepseek_v3": (
        {
            **MLA,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "moe_intermediate_size": 2048,
            "intermediate_size": 18432,
            "first_k_dense_replace": 3,
            "moe_layer_freq": 1,
        },
        {"ffn": 18432, "q_rank": 1536, "kv_rank": 512, "nope": 128, "rope": 64, "value": 128, "shared_ffn": 2048},
    ),
    "deepseek_v2 lite": (
        {**MLA, "q_lora_rank": None, "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1408},
        {"q_rank": 0, "kv_rank": 512, "shared_ffn": 2816},
    ),
    "deepseek_v32": ({**MLA, "index_n_heads": 64}, {"indexer": True}),
    "glm4_moe": (
        {
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "moe_intermediate_size": 1408,
            "intermediate_size": 10944,
            "first_k_dense_replace": 1,
        },
        {"ffn": 10944, "experts": 128, "shared_ffn": 1408},
    ),
    "mixtral": ({"num_local_experts": 8, "intermediate_size": 14336}, {"ffn": 0, "experts": 8, "moe_ffn": 14336}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "in text_config"])
def test_the_sizes_of_a_family(tmp_path, family, nested):
    config, sizes = FAMILIES[family]
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": config, "vision_config": {}} if nested else config)
    )
    model = from_args(parse([])[0], {}, tmp_path).model
    assert {name: getattr(model, name) for name in sizes} == sizes


def test_without_a_checkpoint_the_sizes_are_megatrons():
    flags = (
        "--num-layers 36 --hidden-size 2560 --ffn-hidden-size 9728 --num-attention-heads 32 --group-query-attention "
        "--num-query-groups 8 --kv-channels 128"
    )
    model = from_args(parse(flags.split())[0], {}).model
    assert model == Model(hidden=2560, layers=36, ffn=9728, heads=32, groups=8, head_dim=128)


@pytest.mark.parametrize(
    ("frequency", "ffn"), [("[0, 0, 1, 1]", 18432), ("([0]*3+[1]*58)", 18432), ("[1]*40", 0), ("1", 0), ("2", 18432)]
)
def test_dense_layers_of_megatrons_mixture(frequency, ffn):
    flags = ["--num-experts", "8", "--ffn-hidden-size", "18432", "--moe-layer-freq", frequency]
    flags += "--moe-ffn-hidden-size 2048 --multi-latent-attention --kv-lora-rank 512 --q-lora-rank 1536".split()
    model = from_args(parse(flags)[0], {}).model
    assert (model.ffn, model.moe_ffn, model.kv_rank, model.nope) == (ffn, 2048, 512, 128)


# -- the variable -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard_coded", [True, False, None])
@pytest.mark.parametrize("shell", [None, "0", "1"])
@pytest.mark.parametrize("given", [None, "0", "1"])
@pytest.mark.parametrize("as_json", [True, False])
def test_what_an_actor_sees_is_what_slime_hands_on(hard_coded, shell, given, as_json):
    """slime: {"…": "1" or os.environ.get("…", "1"), **args.train_env_vars}."""
    expected = {VARIABLE: "1" if hard_coded or shell is None else shell} | ({VARIABLE: given} if given else {})
    variables = {VARIABLE: given} if given else {}
    args = Namespace(
        fp8="e4m3",
        fp8_recipe="blockwise",
        train_env_vars=json.dumps(variables) if as_json else variables,
        sglang_device=None,
    )
    environment = {VARIABLE: shell} if shell else {}
    facts = from_args(args, environment, None, Here(upstream=Upstream(hard_codes_scales=hard_coded)))
    assert facts.trainer.fp32_scales == expected[VARIABLE]
    assert (facts.trainer.fp32_scales_from == "--train-env-vars") is (given is not None)
    assert facts.trainer.fp32_scales_shell == shell
    silent = shell is None or expected[VARIABLE] == shell
    said = [each.verdict for each in judge(facts) if each.rule == "fp8.scales-variable"]
    assert said == ["allow" if silent else "deny"]


def test_without_slime_the_variable_is_as_the_process_has_it():
    args = Namespace(fp8="e4m3", fp8_recipe="blockwise")
    assert from_args(args, {}).trainer.fp32_scales is None
    assert from_args(args, {}).trainer.scales == "pow2"
    assert from_args(args, {VARIABLE: "1"}).trainer.scales == "fp32"


# -- arguments --------------------------------------------------------------------------------------------------------


def facts_of(*flags: str) -> Facts:
    return from_args(parse(flags)[0], {}, None, ALL_SEEN)


@pytest.mark.parametrize(
    ("flags", "mode", "recipe"),
    [
        ([], "off", "none"),
        (["--fp8-format", "e4m3"], "te", "delayed"),  # Megatron's default
        (BLOCKWISE, "te", "blockwise"),
        (["--fp8-train", "aligned"], "aligned", "none"),
        (["--plugins", "cpu,fp8"], "aligned", "none"),  # the plugin's default
        (["--plugins", "fp8_unified", *BLOCKWISE], "aligned", "blockwise"),
        (["--plugins", "fp8", "--fp8-train", "off"], "off", "none"),
        (["--plugins", "r3"], "off", "none"),
        ([*BLOCKWISE, "--fp8-train", "off"], "off", "blockwise"),
        (["--fp4-format", "e2m1", "--fp4-recipe", "nvfp4"], "te", "nvfp4"),
    ],
)
def test_how_it_trains(flags, mode, recipe):
    trainer = facts_of(*flags).trainer
    assert (trainer.mode, trainer.recipe) == (mode, recipe)


def test_experts_are_divided_as_megatron_does_by_default():
    assert facts_of("--tensor-model-parallel-size", "4").trainer.etp == 4
    assert facts_of("--tensor-model-parallel-size", "4", "--expert-tensor-parallel-size", "1").trainer.etp == 1


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ("--rollout-num-gpus-per-engine 8", (8, 1, 8, 8)),
        ("--rollout-num-gpus-per-engine 8 --sglang-pp-size 2", (4, 1, 4, 4)),
        ("--rollout-num-gpus-per-engine 8 --sglang-expert-parallel-size 8", (8, 8, 8, 8)),
        ("--rollout-num-gpus-per-engine 8 --sglang-moe-a2a-backend deepep", (8, 8, 8, 8)),
        ("--rollout-num-gpus-per-engine 8 --sglang-dp-size 4", (8, 1, 8, 8)),
        ("--rollout-num-gpus-per-engine 8 --sglang-dp-size 4 --sglang-enable-dp-attention", (8, 1, 2, 8)),
        ("--rollout-num-gpus-per-engine 8 --sglang-moe-dense-tp-size 1", (8, 1, 8, 1)),
    ],
)
def test_how_the_engine_is_divided(flags, sizes):
    engine = facts_of(*flags.split()).engine
    assert (engine.tp, engine.ep, engine.attention_tp, engine.dense_tp) == sizes


@pytest.mark.parametrize(
    ("flags", "replays"),
    [
        ("--plugins fp8,r3", True),
        ("--plugins r3_replay", True),
        ("--plugins fp8", False),
        ("--use-rollout-routing-replay", True),
        ("", False),
    ],
)
def test_whether_experts_are_replayed(flags, replays):
    assert facts_of(*flags.split()).routing_replay is replays


def test_a_runs_own_process_knows_its_plugins_from_the_environment():
    facts = from_args(Namespace(fp8_train="aligned"), {"MILES_PLUGINS": "fp8_unified,r3_replay"})
    assert facts.routing_replay
    assert ACTIVE == "MILES_PLUGINS" == activation.ACTIVE


def test_the_rest_of_the_flags():
    facts = facts_of(
        *"--fp8-param-gather --optimizer-cpu-offload --save-hf x --update-weight-mode delta "
        "--megatron-to-hf-mode bridge "
        "--use-rollout-logprobs --check-weight-update-equal --sglang-kv-cache-dtype fp8_e4m3 --sglang-config y "
        "--sglang-moe-runner-backend triton --sglang-fp8-gemm-backend cutlass --sglang-quantization fp8 "
        "--te-precision-config-file z --transformer-impl local --mtp-num-layers 1".split()
    )
    trainer, engine = facts.trainer, facts.engine
    assert trainer.param_gather
    assert trainer.cpu_offload
    assert trainer.precision_file
    assert trainer.transformer_impl == "local"
    assert (facts.save_hf, facts.update_weight_mode, facts.megatron_to_hf_mode) == (True, "delta", "bridge")
    assert facts.use_rollout_logprobs
    assert facts.check_weight_update_equal
    assert facts.model.mtp_layers == 1
    assert (engine.kv_cache, engine.moe_runner, engine.gemm) == ("fp8_e4m3", "triton", "cutlass")
    assert (engine.quantization, engine.config_file, engine.device) == ("fp8", True, "cuda")


@pytest.mark.parametrize(
    "flag",
    [
        "--fp16",
        "--moe-apply-probs-on-input",
        "--delay-wgrad-compute",
        "--use-transformer-engine-op-fuser",
        "--moe-use-legacy-grouped-gemm",
    ],
)
def test_flags_that_compute_past_the_layers(tmp_path, flag):
    flags = ["--plugins", "fp8", "--hf-checkpoint", checkpoint(tmp_path)]
    assert denied(*flags) == set()
    assert denied(*flags, flag) == {"fp8.trainer-layers"}
    assert denied(*flags, flag, "--fp8-train", "off") == set()


@pytest.mark.parametrize(
    ("flags", "plugin"), [("", False), ("--plugins r3", False), ("--plugins r3,fp8", True), ("--fp8-train off", True)]
)
def test_whether_the_plugin_makes_the_update(flags, plugin):
    here = replace(ALL_SEEN, weight_session=True)
    facts = from_args(parse(flags.split())[0], {}, None, here)
    assert facts.plugin is plugin
    assert facts.packs_at_source is not plugin
    assert facts.engine.weight_session is plugin  # slime opens no session
    assert not facts.embedded
    assert from_args(Namespace(), {}).embedded


def test_the_plugin_on_blackwell_needs_powers_of_two_and_a_session(tmp_path, monkeypatch):
    flags = ["--plugins", "fp8", "--gpu", "b200", "--hf-checkpoint"]
    assert denied(*flags, checkpoint(tmp_path)) == {"fp8.scale-kind", "fp8.post-process"}
    folder = checkpoint(tmp_path, scale=0.25, scale_fmt="ue8m0")
    assert denied(*flags, folder) == {"fp8.post-process"}
    assert denied("--plugins", "fp8", "--hf-checkpoint", folder) == set()  # on Hopper activations are fp32's
    here = replace(ALL_SEEN, weight_session=True)
    monkeypatch.setattr("miles_plugins.entrypoints.check_fp8.look_here", lambda: here)
    assert denied(*flags, folder) == set()


def test_flags_are_never_abbreviated_or_swallowed():
    args, rest = parse(
        ["--sglang-cuda-graph-bs", "1", "2", "--save", "x", "--num-rollout", "3", "--hf-checkpoint", "y"]
    )
    assert args.hf_checkpoint == "y"
    assert args.save_hf is None
    assert rest == ["--sglang-cuda-graph-bs", "--save", "--num-rollout"]


# -- this machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("h100", 90),
        ("NVIDIA H100 80GB HBM3", 90),
        ("NVIDIA H200", 90),
        ("B200", 100),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA GeForce RTX 5090", 120),
        ("9.0", 90),
        ("100", 100),
        ("12.0", 120),
        ("voodoo2", None),
    ],
)
def test_a_gpus_capability(name, capability):
    assert capability_of(name) == capability


SOURCES = {  # what the rules' facts are found by, as these releases write it
    "v0.2.1": {
        "slime/ray/actor_group.py": '"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1",\n**self.args.train_env_vars,\n',
        "slime/backends/megatron_utils/loss.py": "sum_of_sample_mean((old_log_probs - rollout_log_probs).abs())",
        "slime/backends/megatron_utils/megatron_to_hf/__init__.py": "quantize_params(args, name, params, config)",
    },
    "main": {
        "slime/ray/actor_group.py": f'"{VARIABLE}": os.environ.get("{VARIABLE}", "1"),',
        "slime/backends/megatron_utils/loss.py": "log_probs_to_compare = log_probs",
        "slime/backends/megatron_utils/megatron_to_hf/__init__.py": "quantize_params(args, name, transform_ue8m0)",
    },
}


@pytest.mark.parametrize(
    ("release", "mtp", "upstream"),
    [
        ("v0.2.1", "self.transformer_layer = ", Upstream(True, True, False, True, False)),
        ("main", "self.mtp_model_layer = ", Upstream(False, False, True, False, False)),
    ],
)
def test_releases_are_told_apart_by_their_files(tmp_path, monkeypatch, release, mtp, upstream):
    texts = {
        name.replace("/", ".").removesuffix(".py").removesuffix(".__init__"): text
        for name, text in SOURCES[release].items()
    }
    texts["slime.backends.megatron_utils.update_weight.common"] = "transformer_layer"
    texts["megatron.core.transformer.multi_token_prediction"] = mtp
    texts["sglang.srt.entrypoints.http_server"] = '@app.post("/begin_weight_update")'
    texts["torch.version"] = "__version__ = '2.9.1+cu129'\ncuda: Optional[str] = '12.9'\n"
    gpus = tmp_path / "0000:01:00.0"
    gpus.mkdir()
    (gpus / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    for module in (fp8_upstream, slime_drafts):
        monkeypatch.setattr(module, "text_of", texts.get)
    monkeypatch.setattr(facts_module, "NVIDIA_GPUS", tmp_path)
    here = look_here()
    assert here.upstream == upstream
    assert (here.capability, here.cuda, here.weight_session) == (90, (12, 9), True)


def test_a_release_without_sessions_whose_deltas_leave_tensors_out(monkeypatch):
    texts = {
        "sglang.srt.entrypoints.http_server": '@app.post("/post_process_weights")',
        "slime.ray.actor_group": "",
        "slime.backends.megatron_utils.update_weight.update_weight_from_distributed_delta": "",
    }
    for module in (fp8_upstream, slime_drafts):
        monkeypatch.setattr(module, "text_of", texts.get)
    here = look_here()
    assert here.weight_session is False
    assert here.upstream.delta_leaves_tensors_out is True


def test_a_source_is_found_without_an_import(tmp_path):
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up" / "__init__.py").write_text("raise SystemExit")
    (tmp_path / "made_up" / "part.py").write_text("x = 1")
    with reading_from(tmp_path):
        assert fp8_upstream.text_of("made_up") == "raise SystemExit"
        assert fp8_upstream.text_of("made_up.part") == "x = 1"
        assert fp8_upstream.text_of("made_up.other") is None
        assert fp8_upstream.text_of("nothing.at.all") is None


def test_a_machine_with_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_upstream, "text_of", lambda module: None)
    monkeypatch.setattr(facts_module, "NVIDIA_GPUS", tmp_path / "none")
    monkeypatch.setattr(facts_module, "_installed", lambda *names: None)
    assert look_here() == Here(transformer_engine="")


def test_the_real_machine_can_be_looked_at():
    assert isinstance(look_here(), Here)


def test_a_recipe_that_is_an_enum():
    class Recipe:
        value = "blockwise"

    assert from_args(Namespace(fp8="e4m3", fp8_recipe=Recipe()), {}).trainer.recipe == "blockwise"
    with pytest.raises(PluginError, match="not known"):
        from_args(Namespace(fp8="e4m3", fp8_recipe="cubic"), {})
