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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
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


def test_it_is_small_and_random(folder: Path) -> None:
    import torch

    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert 150_000 < sum(tensor.numel() for tensor in tensors.values()) < 200_000
    for name, tensor in tensors.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert tensor.float().std() == pytest.approx(0.02, rel=0.2), name


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_flags_are_the_config(tmp_path: Path, tensor_parallel: int) -> None:
    model = write_tiny_model(tmp_path, layers=3, hidden_size=32, experts=4, topk=3, tensor_parallel=tensor_parallel)
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
        "--num-experts": "num_experts",
        "--moe-router-topk": "num_experts_per_tok",
        "--vocab-size": "vocab_size",
        "--norm-epsilon": "rms_norm_eps",
        "--rotary-base": "rope_theta",
    }.items():
        assert float(given[flag]) == config[name], flag
    assert given["--moe-layer-freq"] == "[1]*3"
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


def test_transformers_loads_every_weight(folder: Path) -> None:
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
    "parameters": sum(parameter.numel() for parameter in model.parameters()),
    "shape": list(logits.shape),
    "finite": bool(logits.isfinite().all()),
}))
"""
    answer = in_fresh_process(code, folder)
    assert answer == {"problems": 0, "parameters": 165_312, "shape": [1, 28, 128], "finite": True}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor_parallel": 3},
        {"tensor_parallel": 0},
        {"topk": 1},
        {"topk": 9},
        {"layers": 0},
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
