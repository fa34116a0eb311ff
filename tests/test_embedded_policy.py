"""The policy is the model of the checkpoint: megatron-core's logits are those of transformers' own implementation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins.embedded import policy
from miles_plugins.errors import ArgumentError, PluginError

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]

needs_models = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("transformers", "megatron")),
    reason='the embedded host needs `pip install -e ".[embedded]"`',
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a dense layer": {"mlp_only_layers": [1]},
    "every second layer dense": {"decoder_sparse_step": 2},
    "top-k weights not normalised": {"norm_topk_prob": False},
    "tied embeddings": {"tie_word_embeddings": True},
    "no grouped queries": {"num_key_value_heads": 4, "head_dim": 8},
    "another rotary base": {"rope_theta": 500.0},
}

# In a process of its own: the patches that let Megatron run on the CPU stay.
COMPARE = """
import json, sys
from pathlib import Path
from miles_plugins.embedded import arguments, command, hugging_face, policy
from miles_plugins.embedded.trainer import _packed
from miles_plugins.manager import Plugins

args = arguments.parse([], Plugins.named([]))
arguments.complete(args)
activation, device = command._activate(Plugins.named([]), args)
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

shape = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, intermediate_size=48, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2,
             norm_topk_prob=True, max_position_embeddings=64, tie_word_embeddings=False)

def compare(folder, changes):
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**shape, **changes}))
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    for name, value in policy.shape_of(json.loads((folder / "config.json").read_text()), folder).items():
        setattr(args, name, value)
    ours = policy.build_policy(args, device).float()
    ours.config.bf16, ours.config.params_dtype = False, torch.float32
    policy.load_weights(args, ours, hugging_face.read_tensors(folder), folder)
    tokens = torch.randint(0, 96, (24,))
    found = ours(tokens[None], None, None, packed_seq_params=_packed(torch.tensor([0, 10, 24])))[0]
    expected = torch.cat([model(part[None]).logits[0] for part in (tokens[:10], tokens[10:])])
    exported = {name: tensor for batch in policy.named_batches(args, ours) for name, tensor in batch}
    saved = load_file(folder / "model.safetensors")
    return {
        "difference": (found - expected).abs().max().item() / expected.abs().max().item(),
        "same weights": exported.keys() == saved.keys() and all(torch.equal(exported[n], saved[n]) for n in saved),
    }

torch.manual_seed(7)
with command._megatron(args, device), torch.no_grad():
    variants = json.loads(sys.argv[2])
    print(json.dumps({name: compare(Path(sys.argv[1]) / name, changes) for name, changes in variants.items()}))
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("MILES_PLUGINS", "PYTHONPATH"))}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, str(tmp_path_factory.mktemp("models")), json.dumps(VARIANTS)],
        env={**inherited, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_models
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_exported_weights_are_those_of_transformers(variant: str, compared: dict[str, Any]) -> None:
    assert compared[variant]["difference"] < 1e-4
    assert compared[variant]["same weights"]


# -- names and layouts -----------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(groups=st.integers(1, 4), heads=st.integers(1, 4), size=st.integers(1, 4), width=st.integers(1, 3))
def test_query_key_and_value_come_apart_as_they_were_put_together(
    groups: int, heads: int, size: int, width: int
) -> None:
    args = Namespace(num_attention_heads=groups * heads, num_query_groups=groups, kv_channels=size)
    query, key, value = (torch.randn(count * size, width) for count in (groups * heads, groups, groups))
    joined = policy.join(args, "decoder.layers.0.self_attention.linear_qkv.weight", [query, key, value])
    # Megatron's order: the queries of a group, its key, its value.
    assert torch.equal(joined[: heads * size], query[: heads * size])
    assert torch.equal(joined[heads * size : (heads + 1) * size], key[:size])
    parts = policy.split(args, "decoder.layers.0.self_attention.linear_qkv.weight", joined)
    assert all(torch.equal(a, b) for a, b in zip(parts, (query, key, value), strict=True))


def test_a_parameter_that_no_rule_knows_is_refused() -> None:
    with pytest.raises(PluginError, match="no Hugging Face name"):
        policy.hugging_face_names("decoder.layers.0.mlp.shared_experts.linear_fc1.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters"),
        ({"num_experts": None}, "num_experts"),
    ],
)
def test_a_variant_that_would_compute_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    from miles_plugins.cpu_rehearsal.tiny_model import _config

    config = {**_config(128, 2, 64, 8, 2), **changes}
    config = {name: value for name, value in config.items() if value is not None}
    with pytest.raises(ArgumentError, match=message):
        policy.shape_of(config, Path("config.json"))
