"""The tiny checkpoint: the same bytes for a seed, readable by Hugging Face, and flags that tell its shape."""

from __future__ import annotations

import itertools
import json
import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file

from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model

DENSE = {"layers": 3, "dense_layers": 1, "experts": 16, "topk": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a dense first layer."""
    folder = tmp_path_factory.mktemp("dense")
    write_tiny_model(folder, **DENSE)
    return folder


def options(flags: list[str]) -> dict[str, str]:
    """The flags that have a value."""
    pairs = itertools.pairwise(flags)
    return {name: value for name, value in pairs if name.startswith("--") and not value.startswith("--")}


def in_fresh_process(code: str, *arguments: object) -> Any:
    """What `code` prints as JSON, offline."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "same")
    write_tiny_model(tmp_path / "other", seed=1)
    assert contents(tmp_path / "same") == contents(folder)
    different = {name for name, data in contents(tmp_path / "other").items() if data != contents(folder)[name]}
    assert different == {"model.safetensors"}


def test_a_dense_layer_is_as_deterministic(dense_folder: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, **DENSE)
    assert contents(tmp_path) == contents(dense_folder)


@pytest.mark.parametrize(
    ("made", "router_bias", "size"),
    [("folder", [], 165_312), ("dense_folder", ["float32"] * 2, 326_304)],
)
def test_it_is_small_and_random(request: pytest.FixtureRequest, made: str, router_bias: list[str], size: int) -> None:
    import torch

    tensors = load_file(request.getfixturevalue(made) / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == size
    biases = [tensor for name, tensor in tensors.items() if "bias" in name]
    assert [str(tensor.dtype).removeprefix("torch.") for tensor in biases] == router_bias
    assert {tensor.dtype for name, tensor in tensors.items() if "bias" not in name} == {torch.bfloat16}
    for name, tensor in tensors.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert tensor.float().std() == pytest.approx(0.02, rel=0.5 if tensor.dim() == 1 else 0.2), name


def test_dense_layers_come_first_and_have_no_experts(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path, layers=5, dense_layers=2, experts=4)
    tensors = load_file(tmp_path / "model.safetensors")
    sizes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for layer in range(5):
        mlp = {name.split(".mlp.")[1] for name in tensors if name.startswith(f"model.layers.{layer}.mlp.")}
        if layer < 2:
            assert mlp == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
            assert sizes[f"model.layers.{layer}.mlp.up_proj.weight"] == [128, 64]
        else:
            assert {"gate.weight", "gate.e_score_correction_bias", "shared_experts.up_proj.weight"} < mlp
            assert {name.split(".")[1] for name in mlp if name.startswith("experts.")} == {"0", "1", "2", "3"}
    assert options(model.flags)["--moe-layer-freq"] == "[0]*2+[1]*3"
    config = json.loads((tmp_path / "config.json").read_text())
    # SGLang's Qwen3-MoE builds experts in every layer, also in those of `mlp_only_layers`.
    assert (config["model_type"], config["first_k_dense_replace"]) == ("glm4_moe", 2)


def test_without_dense_layers_it_is_qwen3_moe(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["mlp_only_layers"]) == ("qwen3_moe", [])
    assert "first_k_dense_replace" not in config


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_a_draft_is_a_layer_after_the_last(tmp_path: Path, dense_layers: int) -> None:
    model = write_tiny_model(tmp_path / "draft", layers=2, dense_layers=dense_layers, experts=4, draft_layers=1)
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    parts = {
        layer: {name.split(".", 3)[3] for name in tensors if name.startswith(f"model.layers.{layer}.")}
        for layer in range(4)
    }
    joint = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    assert parts[2] == parts[1] | joint
    assert "mlp.shared_experts.up_proj.weight" in parts[1]
    assert not parts[3]
    assert tensors["model.layers.2.eh_proj.weight"].shape == (64, 128)
    assert tensors["model.layers.2.eh_proj.weight"].float().std() == pytest.approx(0.02, rel=0.2)
    assert options(model.flags)["--mtp-num-layers"] == "1"
    assert options(model.flags)["--num-layers"] == "2"
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["architectures"] == ["Glm4MoeForCausalLM"]  # of which SGLang and slime know the draft
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (2, 1)
    assert config["first_k_dense_replace"] == dense_layers
    assert parts[0] == parts[1] or dense_layers
    without = write_tiny_model(tmp_path / "none", layers=2, dense_layers=1)
    assert "--mtp-num-layers" not in without.flags


@pytest.mark.parametrize("dense_layers", [0, 1])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_flags_are_the_config(tmp_path: Path, tensor_parallel: int, dense_layers: int) -> None:
    shape = {"layers": 3, "hidden_size": 32, "experts": 4, "topk": 3, "tensor_parallel": tensor_parallel}
    model = write_tiny_model(tmp_path, dense_layers=dense_layers, **shape)
    config = json.loads((tmp_path / "config.json").read_text())
    given = options(model.flags)
    for flag, name in {
        "--num-layers": "num_hidden_layers",
        "--hidden-size": "hidden_size",
        "--ffn-hidden-size": "intermediate_size",
        "--moe-ffn-hidden-size": "moe_intermediate_size",
        "--num-attention-heads": "num_attention_heads",
        "--num-query-groups": "num_key_value_heads",
        "--kv-channels": "head_dim",
        "--num-experts": "n_routed_experts" if dense_layers else "num_experts",
        "--moe-router-topk": "num_experts_per_tok",
        "--vocab-size": "vocab_size",
        "--norm-epsilon": "rms_norm_eps",
        "--rotary-base": "rope_theta",
    }.items():
        assert float(given[flag]) == config[name], flag
    assert given["--moe-layer-freq"] == ("[0]*1+[1]*2" if dense_layers else "[1]*3")
    assert given["--moe-router-score-function"] == ("sigmoid" if dense_layers else "softmax")
    assert ("--moe-router-enable-expert-bias" in model.flags) is bool(dense_layers)
    if dense_layers:
        shared = config["n_shared_experts"] * config["moe_intermediate_size"]
        assert given["--moe-shared-expert-intermediate-size"] == str(shared)
    assert config["vocab_size"] == model.vocabulary
    assert model.vocabulary % (128 * tensor_parallel) == 0  # Megatron-LM's padding would join the softmax
    assert config["norm_topk_prob"]
    assert "--moe-router-pre-softmax" not in model.flags
    assert config["tie_word_embeddings"] is ("--untie-embeddings-and-output-weights" not in model.flags)


def test_the_tokenizer_in_a_fresh_process(folder: Path) -> None:
    code = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
text = sys.argv[2]
ids = tokenizer.encode(text, add_special_tokens=False)
every = list(range(len(tokenizer)))
print(json.dumps({
    "ids": ids,
    "text": tokenizer.decode(ids),
    "with_special": tokenizer.encode(text),
    "every": tokenizer.encode(tokenizer.decode(every), add_special_tokens=False) == every,
    "skipped": tokenizer.decode([1, *ids, 2, 0], skip_special_tokens=True),
    "special": [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
    "unknown": tokenizer.encode("日", add_special_tokens=False),
    "chat": tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1"}], tokenize=False, add_generation_prompt=True),
    "size": len(tokenizer),
}))
"""
    text = "  Two  spaces,\n a tab\t; " + string.printable[:95] + " don 't , . !"
    answer = in_fresh_process(code, folder, text)
    assert answer["text"] == text
    assert len(answer["ids"]) == len(text)  # a character a token
    assert answer["with_special"] == answer["ids"]
    assert answer["every"]
    assert answer["skipped"] == text
    assert answer["special"] == [0, 1, 2, 3]
    assert answer["unknown"] == [3]
    assert answer["chat"] == "user: 1 + 1\nassistant: "
    assert answer["size"] == 128


def test_the_tokenizer_fills_a_larger_vocabulary(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path, tensor_parallel=2)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(model.vocabulary)) == list(range(256))
    fillers = [token for token in vocabulary if not token.isascii()]
    assert len(fillers) == 155
    assert all(len(token) == 1 and token.isprintable() and not token.isdigit() for token in fillers)


@pytest.mark.parametrize(("made", "parameters"), [("folder", 165_312), ("dense_folder", 326_304)])
def test_transformers_loads_every_weight(request: pytest.FixtureRequest, made: str, parameters: int) -> None:
    code = """
import json, sys, torch
operators = torch.library.Library("torchvision", "DEF")  # a CUDA build of torchvision breaks transformers on a CPU
try:
    import torchvision
except Exception:
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
logits = model(torch.arange(100, 128)[None]).logits
print(json.dumps({
    "problems": sum(map(len, info.values())),
    "parameters": sum(map(torch.numel, dict(model.named_parameters()).values()))
    + sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")),
    "shape": list(logits.shape),
    "finite": bool(logits.isfinite().all()),
}))
"""
    answer = in_fresh_process(code, request.getfixturevalue(made))
    assert answer == {"problems": 0, "parameters": parameters, "shape": [1, 28, 128], "finite": True}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor_parallel": 3},
        {"tensor_parallel": 0},
        {"topk": 1},
        {"topk": 9},
        {"layers": 0},
        {"dense_layers": 2},
        {"dense_layers": -1},
        {"draft_layers": 2},
        {"hidden_size": 63},
    ],
)
def test_shapes_that_cannot_be_trained_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        write_tiny_model(tmp_path / "model", **wrong)
    assert not (tmp_path / "model").exists()


def test_importing_it_costs_nothing() -> None:
    code = """
import json, sys
import miles_plugins.cpu_rehearsal.tiny_model, miles_plugins.cpu_rehearsal.toy_task
print(json.dumps(sorted({"torch", "transformers", "tokenizers", "safetensors"} & set(sys.modules))))
"""
    assert in_fresh_process(code) == []
