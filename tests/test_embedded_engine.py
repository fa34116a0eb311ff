"""The rollout engine of the embedded host, against independent computations on the same model."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miles_plugins import ArgumentError, PluginError, UpstreamError
from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model
from miles_plugins.embedded import generate_request, hugging_face, token_choice
from miles_plugins.embedded.engine import RolloutEngine, ServerArgs
from miles_plugins.embedded.generate_request import GenerateRequest
from miles_plugins.embedded.hugging_face import check_model_folder
from miles_plugins.r3_replay import plugin as r3
from miles_plugins.r3_replay import wire
from miles_plugins.r3_replay.engine_probe import routing_arrives
from miles_plugins.r3_replay.trace import Routing

# A CUDA build of torchvision breaks transformers on a CPU (known, patched for SGLang in patches/torch/cpu.py).
LET_TORCHVISION_IN = """
import torch
operators = torch.library.Library("torchvision", "FRAGMENT")
try:
    import torchvision
except ImportError:
    pass
except RuntimeError:
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
"""
KEPT: dict[str, Any] = {}  # what it defines lives as long as the Library object
exec(LET_TORCHVISION_IN, KEPT)

LAYERS, EXPERTS, TOPK, VOCABULARY = 2, 8, 2, 128
PROMPT = [5, 17, 40, 99, 7]
PROMPTS = [PROMPT, [8], [30, 31, 32, 33, 34, 35, 36, 37, 38], [64, 65, 66]]
GREEDY = {"temperature": 0, "ignore_eos": True}
ROUTING = Routing(tuple(range(LAYERS)), TOPK, EXPERTS)


def sharpen(folder: Path) -> None:
    """Make attention, experts and output matter: with its small random weights the model says the same anywhere."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and "embed" not in name:
            tensor.mul_(8 if ".mlp." in name or "self_attn" in name else 12)
    tensors["model.embed_tokens.weight"].mul_(20)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, layers=LAYERS, experts=EXPERTS, topk=TOPK)
    sharpen(folder)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The model's folder, to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def start(
    folder: Path, on_request: Callable[..., None] = lambda *_: None, *encode: Any, **changed: Any
) -> RolloutEngine:
    arguments = {"device": "cpu", "dtype": "float32", "random_seed": 7, "enable_return_routed_experts": True}
    return RolloutEngine(folder, ServerArgs(model_path=str(folder), **{**arguments, **changed}), on_request, *encode)


@pytest.fixture(scope="module")
def engine(folder: Path) -> RolloutEngine:
    """In float32, where a batch and its single prompts differ by rounding only. Its weights are never changed."""
    return start(folder)


def ask(engine: RolloutEngine, prompts: Any, new: int = 6, **sampling: Any) -> Any:
    params = {"max_new_tokens": new, **sampling}
    return engine.generate(
        {"input_ids": prompts, "sampling_params": params, "return_logprob": True, "return_routed_experts": True}
    )


def routing(answer: dict[str, Any], prompt: list[int]) -> Any:
    ids = torch.frombuffer(bytearray(base64.b64decode(answer["meta_info"]["routed_experts"])), dtype=torch.int32)
    return ids.reshape(len(prompt) + len(answer["output_ids"]) - 1, LAYERS, TOPK)


def log_probs(answer: dict[str, Any]) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def reference(engine: RolloutEngine, tokens: list[int]) -> tuple[Any, Any]:
    """One pass over all tokens without a cache: logits [tokens, vocabulary], and what the experts were handed."""
    handed: dict[int, Any] = {}

    def look(layer: int) -> Callable[..., None]:
        return lambda module, inputs: handed.__setitem__(layer, inputs[1].clone())

    modules = [layer.mlp for layer in engine.model.model.layers]
    hooks = [
        module.experts.register_forward_pre_hook(look(layer))
        for layer, module in enumerate(modules)
        if hasattr(module, "experts")
    ]
    with torch.no_grad():
        logits = engine.model(torch.tensor([tokens]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, handed


# -- the answer ------------------------------------------------------------------------------------------------------


def test_one_prompt_gives_one_answer_in_sglangs_shape(engine: RolloutEngine) -> None:
    answer = ask(engine, PROMPT, new=4, **GREEDY)
    assert set(answer) == {"text", "output_ids", "meta_info"}
    meta = answer["meta_info"]
    assert len(answer["output_ids"]) == meta["completion_tokens"] == 4
    assert answer["text"] == engine.tokenizer.decode(answer["output_ids"], skip_special_tokens=True)
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert (meta["prompt_tokens"], meta["cached_tokens"], meta["weight_version"]) == (len(PROMPT), 0, "default")
    assert isinstance(meta["id"], str)
    assert 0 < meta["e2e_latency"] < 60
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [[token, None] for token in answer["output_ids"]]
    ROUTING.check(routing(answer, PROMPT), len(PROMPT) + 3, "the answer")
    assert torch.equal(answer.routing, routing(answer, PROMPT)), "for the host itself, whatever is sent"
    assert "routing" not in json.dumps(answer)


def test_only_what_is_asked_for_is_answered(engine: RolloutEngine) -> None:
    meta = engine.generate({"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}})["meta_info"]
    assert not {"output_token_logprobs", "routed_experts"} & set(meta)
    assert engine.generate({"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}).routing is None


def test_text_is_tokenized_with_the_folders_tokenizer(engine: RolloutEngine) -> None:
    payload = {"sampling_params": {"max_new_tokens": 3, **GREEDY}}
    ids = engine.tokenizer("2+3=")["input_ids"]
    assert engine.generate({"text": "2+3=", **payload})["output_ids"] == ask(engine, ids, 3, **GREEDY)["output_ids"]
    batch = engine.generate({"text": ["2+3=", "x"], **payload})
    assert [answer["meta_info"]["prompt_tokens"] for answer in batch] == [4, 1]


def test_request_ids(engine: RolloutEngine) -> None:
    def ids(rid: Any, prompts: Any) -> list[str]:
        payload = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 1}, "rid": rid}
        answers = engine.generate(payload)
        return [answer["meta_info"]["id"] for answer in (answers if isinstance(answers, list) else [answers])]

    assert ids("a", [5]) == ["a"]
    assert ids("a", [[5], [6]]) == ["a_0", "a_1"]
    assert ids(["b", "c"], [[5], [6]]) == ["b", "c"]
    assert len(set(ids(None, [[5], [6]]) + ids(None, [5]))) == 3


def test_no_new_tokens_still_gives_the_prompts_routing(engine: RolloutEngine) -> None:
    answer = ask(engine, PROMPT, new=0)
    assert answer["output_ids"] == []
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert routing(answer, PROMPT).shape == (len(PROMPT) - 1, LAYERS, TOPK)


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_routing_is_what_the_experts_get_in_one_whole_pass(engine: RolloutEngine) -> None:
    for prompt, answer in zip(PROMPTS, ask(engine, PROMPTS, new=8, **GREEDY), strict=True):
        _, handed = reference(engine, prompt + answer["output_ids"])
        for layer in range(LAYERS):
            recorded = routing(answer, prompt)[:, layer]
            assert torch.equal(recorded.long(), handed[layer][:-1]), f"layer {layer}"
    assert len({tuple(row) for row in handed[0].tolist()}) > 3  # or the test could not fail


@pytest.mark.parametrize("temperature", [0, 0.6, 1.7])
def test_log_probs_are_those_of_one_whole_pass(engine: RolloutEngine, temperature: float) -> None:
    # With top_k: SGLang's log-probs are of the distribution before it is restricted.
    for prompt, answer in zip(PROMPTS, ask(engine, PROMPTS, new=8, temperature=temperature, top_k=40), strict=True):
        own = answer["output_ids"]
        logits, _ = reference(engine, prompt + own)
        if temperature == 0:
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == own
        expected = torch.log_softmax(logits[len(prompt) - 1 : -1] / (temperature or 1), -1)
        expected = expected.gather(-1, torch.tensor(own)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(log_probs(answer)), expected, atol=1e-4, rtol=1e-4)


def same(batched: dict[str, Any], single: dict[str, Any], prompt: list[int]) -> None:
    assert batched["output_ids"] == single["output_ids"]
    assert batched["text"] == single["text"]
    assert batched["meta_info"]["finish_reason"] == single["meta_info"]["finish_reason"]
    assert torch.equal(routing(batched, prompt), routing(single, prompt))
    assert log_probs(batched) == pytest.approx(log_probs(single), abs=1e-4)


def test_a_batch_gives_what_its_prompts_give_alone(engine: RolloutEngine) -> None:
    params = [{"max_new_tokens": new, **GREEDY} for new in (3, 9, 0, 5)]
    payload = {"input_ids": PROMPTS, "sampling_params": params, "return_logprob": True, "return_routed_experts": True}
    for prompt, own, batched in zip(PROMPTS, params, engine.generate(payload), strict=True):
        same(batched, ask(engine, prompt, own["max_new_tokens"], **GREEDY), prompt)


def test_positions_count_from_the_first_token_of_each_prompt(engine: RolloutEngine) -> None:
    # Asked of the call: rotary embeddings are relative, and the same shift everywhere would not show in the numbers.
    seen: list[Any] = []
    hook = engine.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    ask(engine, [[4, 5, 6], [7]], new=3, **GREEDY)
    hook.remove()
    assert [call["position_ids"].tolist() for call in seen] == [[[0, 1, 2], [0, 0, 0]], [[3], [1]], [[4], [2]]]
    assert [call["input_ids"].shape[1] for call in seen] == [3, 1, 1]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12), min_size=1, max_size=4),
    temperatures=st.permutations([0.0, 0.8, 0.0, 1.3]),
)
def test_any_prompts_share_a_batch(engine: RolloutEngine, prompts: list[list[int]], temperatures: list[float]) -> None:
    params = [{"temperature": temperatures[n], "sampling_seed": n, "max_new_tokens": 4} for n in range(len(prompts))]
    payload = {"sampling_params": params, "return_logprob": True, "return_routed_experts": True}
    for n, batched in enumerate(engine.generate({"input_ids": prompts, **payload})):
        same(batched, ask(engine, prompts[n], 4, temperature=temperatures[n], sampling_seed=n), prompts[n])


@pytest.fixture
def half_dense(copy: Path) -> Path:
    """The model with a first layer that has no experts."""
    config = json.loads((copy / "config.json").read_text()) | {"mlp_only_layers": [0]}
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp." not in name}
    wide, hidden = config["intermediate_size"], config["hidden_size"]
    for name, shape in {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}.items():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] = weight.bfloat16()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_dense_layers_are_zeros_in_the_routing(half_dense: Path) -> None:
    engine = start(half_dense)
    answer = ask(engine, PROMPT, **GREEDY)
    _, handed = reference(engine, PROMPT + answer["output_ids"])
    assert not routing(answer, PROMPT)[:, 0].any()
    assert torch.equal(routing(answer, PROMPT)[:, 1].long(), handed[1][:-1])
    before = ask(engine, PROMPT, **GREEDY)["output_ids"]
    engine.update_weights(load_file(half_dense / "model.safetensors").items(), "1")
    assert ask(engine, PROMPT, **GREEDY)["output_ids"] == before


def test_it_works_in_bfloat16(folder: Path) -> None:
    engine = start(folder, dtype="bfloat16")
    assert engine.model.dtype == torch.bfloat16
    for prompt, answer in zip(PROMPTS, ask(engine, PROMPTS), strict=True):
        ROUTING.check(routing(answer, prompt), len(prompt) + len(answer["output_ids"]) - 1, "the answer")


# -- sampling --------------------------------------------------------------------------------------------------------


def first_tokens(engine: RolloutEngine, draws: int, **sampling: Any) -> Any:
    """[draws] the first token after PROMPT, and the model's probabilities for it [vocabulary], float64."""
    answers = ask(engine, [PROMPT] * draws, new=1, **sampling)
    logits, _ = reference(engine, PROMPT)
    probabilities = torch.softmax(logits[-1].double() / sampling["temperature"], -1)
    return torch.tensor([answer["output_ids"][0] for answer in answers]), probabilities


def fits(tokens: Any, probabilities: Any) -> bool:
    """Pearson's chi-square over the tokens expected at least five times, the others as one; six sigma."""
    expected = probabilities * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    freedom = len(expected) - 1
    return bool(((counts - expected) ** 2 / expected.clamp(min=1)).sum() < freedom + 6 * (2 * freedom) ** 0.5)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_frequencies_follow_the_distribution(engine: RolloutEngine, temperature: float) -> None:
    tokens, probabilities = first_tokens(engine, 3000, temperature=temperature)
    assert fits(tokens, probabilities)
    other = torch.softmax(probabilities.log() * 1.3, -1)
    assert not fits(tokens, other), "the test could not tell another temperature"


@pytest.mark.parametrize("restriction", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.7}])
def test_top_k_and_top_p_restrict(engine: RolloutEngine, restriction: dict[str, Any]) -> None:
    tokens, probabilities = first_tokens(engine, 2000, temperature=1.5, **restriction)
    ordered, order = probabilities.sort(descending=True)
    kept = [
        int(token)
        for rank, (token, before) in enumerate(zip(order, ordered.cumsum(0) - ordered, strict=True))
        if rank < restriction.get("top_k", VOCABULARY) and before <= restriction.get("top_p", 1)
    ]
    assert 1 < len(kept) < 60
    assert set(tokens.tolist()) <= set(kept)
    restricted = torch.zeros_like(probabilities)
    restricted[kept] = probabilities[kept] / probabilities[kept].sum()
    assert fits(tokens, restricted)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_numbers_stay_inside_the_restriction(
    monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    monkeypatch.setattr(torch, "rand", lambda length, **_: torch.full((length,), number, dtype=torch.float64))
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(3)) * 3
    sampling = generate_request.Sampling(max_new_tokens=1, top_k=3)
    choose = token_choice.token_chooser([sampling] * 200, torch.Generator(), torch.device("cpu"))
    tokens, _ = choose(logits, 0)
    assert (tokens[:, None] == logits.topk(3).indices).any(-1).all()


def test_the_restriction_of_one_row_leaves_the_others_alone(engine: RolloutEngine) -> None:
    alone = ask(engine, PROMPT, new=12, temperature=1.2, sampling_seed=5)
    params = [{"max_new_tokens": 12, "temperature": 1.2, "sampling_seed": 5}, {"temperature": 1.2, "top_k": 2}]
    both = engine.generate({"input_ids": [PROMPT, [9, 9]], "sampling_params": params})
    assert both[0]["output_ids"] == alone["output_ids"]


def test_a_seed_decides_alone(engine: RolloutEngine) -> None:
    def seeded(seed: int) -> list[int]:
        return ask(engine, PROMPT, new=12, temperature=1.0, ignore_eos=True, sampling_seed=seed)["output_ids"]

    first = seeded(1)
    assert seeded(1) == first != seeded(2)
    params = [{"max_new_tokens": 20, "ignore_eos": True}] * 2
    params.insert(1, {"max_new_tokens": 12, "ignore_eos": True, "sampling_seed": 1})
    batch = engine.generate({"input_ids": [PROMPTS[2], PROMPT, [3]], "sampling_params": params})
    assert batch[1]["output_ids"] == first


def test_without_a_seed_the_servers_random_seed_decides(folder: Path) -> None:
    def answers(seed: int) -> list[Any]:
        engine = start(folder, random_seed=seed)
        return [ask(engine, PROMPT, new=12)["output_ids"] for _ in range(2)]

    first, second = answers(1)
    assert first != second
    assert answers(1) == [first, second]
    assert answers(2) != [first, second]


# -- the end ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def greedy(engine: RolloutEngine) -> tuple[list[int], int]:
    """Ten greedy tokens after PROMPT, and the place of the first that did not occur before and shows in the text."""
    tokens = ask(engine, PROMPT, new=10, **GREEDY)["output_ids"]
    place = next(n for n in range(2, 9) if tokens[n] > 3 and tokens[n] not in tokens[:n])
    return tokens, place


def test_a_stop_token_ends_the_answer_and_belongs_to_it(engine: RolloutEngine, greedy: tuple[list[int], int]) -> None:
    tokens, place = greedy
    through = tokens[: place + 1]
    stop = {"temperature": 0, "stop_token_ids": [tokens[place]]}
    answer = ask(engine, PROMPT, 10, **stop)
    assert answer["output_ids"] == through
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": tokens[place]}
    assert len(log_probs(answer)) == answer["meta_info"]["completion_tokens"] == place + 1
    assert len(routing(answer, PROMPT)) == len(PROMPT) + place
    assert answer["text"] == engine.tokenizer.decode(through[:-1], skip_special_tokens=True)
    untrimmed = ask(engine, PROMPT, 10, no_stop_trim=True, **stop)
    assert untrimmed["text"] == engine.tokenizer.decode(through, skip_special_tokens=True) != answer["text"]
    assert ask(engine, PROMPT, 10, ignore_eos=True, **stop)["output_ids"] == tokens  # as SGLang: both kinds
    last = ask(engine, PROMPT, place + 1, **stop)
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": place + 1}  # as SGLang: length first
    assert last["text"] == untrimmed["text"]


def test_rows_end_at_their_own_places(engine: RolloutEngine, greedy: tuple[list[int], int]) -> None:
    tokens, place = greedy
    params = [{**GREEDY, "max_new_tokens": 10}, {"temperature": 0, "stop_token_ids": [tokens[place]]}]
    whole, short = engine.generate({"input_ids": [PROMPT, PROMPT], "sampling_params": params})
    assert (whole["output_ids"], short["output_ids"]) == (tokens, tokens[: place + 1])


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_the_models_own_end_of_sequence(copy: Path, greedy: tuple[list[int], int], file: str) -> None:
    tokens, place = greedy
    if file == "tokenizer_config.json":
        content = json.loads((copy / file).read_text())
        content["eos_token"] = start(copy).tokenizer.convert_ids_to_tokens(tokens[place])
    elif file == "config.json":
        content = json.loads((copy / file).read_text()) | {"eos_token_id": [2, tokens[place]]}
        (copy / "generation_config.json").write_text('{"eos_token_id": 2}')  # adds to the others, replaces none
    else:
        content = {"eos_token_id": tokens[place]}
    (copy / file).write_text(json.dumps(content))
    assert ask(start(copy), PROMPT, 10, temperature=0)["output_ids"] == tokens[: place + 1]


def test_special_tokens_in_the_text(engine: RolloutEngine) -> None:
    def text(**sampling: Any) -> str:
        sampling = generate_request.Sampling(max_new_tokens=2, **sampling)
        return engine._answer(1, sampling, [4, 1], [0.0, 0.0])["text"]

    assert text() == engine.tokenizer.decode([4])
    assert text(skip_special_tokens=False, spaces_between_special_tokens=False) == engine.tokenizer.decode([4, 1])
    assert "<bos>" in text(skip_special_tokens=False)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"input_ids": PROMPT, "image_data": "x", "lora_path": "y"}, "unknown field: image_data, lora_path"),
        ({}, "either text or input_ids"),
        ({"input_ids": PROMPT, "text": "x"}, "either text or input_ids"),
        ({"input_ids": []}, "at least one prompt"),
        ({"text": []}, "at least one prompt"),
        ({"text": ["a", 3]}, "text is not of the right kind"),
        ({"text": ""}, "prompt 0 is not of the right kind"),
        ({"input_ids": [[4], []]}, "prompt 1 is not of the right kind"),
        ({"input_ids": [4, "5"]}, "prompt 0 is not of the right kind"),
        ({"input_ids": [[4, True]]}, "prompt 0 is not of the right kind"),
        ({"input_ids": [[4], [5, VOCABULARY]]}, "prompt 1 has ids out of the vocabulary(.|\n)*5 to 128"),
        ({"input_ids": [-1, 5]}, "prompt 0 has ids out of the vocabulary"),
        ({"input_ids": PROMPT, "stream": True}, "stream cannot have this value"),
        ({"input_ids": PROMPT, "logprob_start_len": 0}, "logprob_start_len cannot"),
        ({"input_ids": PROMPT, "top_logprobs_num": 2}, "top_logprobs_num cannot"),
        ({"input_ids": PROMPT, "return_logprob": [True]}, "return_logprob cannot"),
        ({"input_ids": PROMPT, "rid": ["a", "b"]}, "rid is not of the right kind"),
        ({"input_ids": [[4], [5]], "rid": ["a", "a"]}, "rid is not of the right kind"),
        ({"input_ids": PROMPT, "sampling_params": [{}, {}]}, "another length than the batch"),
        ({"input_ids": PROMPT, "sampling_params": "hot"}, "sampling_params is not of the right kind"),
        (
            {"input_ids": [4] * 4000, "sampling_params": {"max_new_tokens": 97}},
            r"4000 prompt tokens \+ 97 new(.|\n)*4096",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(engine: RolloutEngine, payload: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        engine.generate(payload)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", 0),
        ("top_k", 2.5),
        ("max_new_tokens", -1),
        ("max_new_tokens", None),
        ("stop", ["\n"]),
        ("stop_token_ids", ["a"]),
        ("ignore_eos", 1),
        ("sampling_seed", -1),
        ("n", 2),
        ("custom_params", {"return_top_p_token_ids": True}),
        ("min_p", 0.1),
        ("json_schema", "{}"),
    ],
)
def test_a_wrong_sampling_parameter_is_refused_by_name(engine: RolloutEngine, name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"sampling parameter:? {name}\\b"):
        engine.generate({"input_ids": PROMPT, "sampling_params": {name: value}})


def test_what_slime_sends_by_default_is_understood(engine: RolloutEngine) -> None:
    params = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 2,
        "stop": None,
        "stop_token_ids": None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
    payload = {"sampling_params": params, "return_logprob": True, "return_routed_experts": True, "input_ids": PROMPT}
    assert len(engine.generate(payload)["output_ids"]) == 2


def test_output_that_is_not_finite_is_an_error(folder: Path) -> None:
    engine = start(folder)
    engine.model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(PluginError, match="not finite"):
        ask(engine, PROMPT)


# -- the hook --------------------------------------------------------------------------------------------------------


def test_the_hook_is_called_once_and_may_switch_routing_on(folder: Path) -> None:
    seen: list[Any] = []

    def on_request(server_args: ServerArgs, request: GenerateRequest) -> None:
        seen.append((server_args, request.input_ids))
        r3.receive_engine_request(server_args, request)

    engine = start(folder, on_request)
    payload = {"input_ids": [PROMPT, [4]], "sampling_params": {"max_new_tokens": 2}}
    assert [
        len(routing(answer, prompt)) for answer, prompt in zip(engine.generate(payload), [PROMPT, [4]], strict=True)
    ]
    assert seen == [(engine.server_args, [PROMPT, [4]])]
    engine.server_args.enable_return_routed_experts = False
    assert "routed_experts" not in engine.generate(payload)[0]["meta_info"]


def test_routing_that_the_server_does_not_record_is_left_out_as_by_sglang(folder: Path) -> None:
    answer = ask(start(folder, enable_return_routed_experts=False), PROMPT)
    assert "routed_experts" not in answer["meta_info"]


def test_routing_is_sent_as_a_plugin_encodes_it_without_the_layers_that_have_none(half_dense: Path) -> None:
    given: list[Any] = []

    def encode(experts: Any) -> str | None:
        given.append(experts)
        return "encoded" if len(given) == 1 else None

    engine = start(half_dense, lambda *_: None, encode)
    first, second = (ask(engine, PROMPT, **GREEDY) for _ in range(2))
    assert first["meta_info"]["routed_experts"] == "encoded"
    assert [(experts.dtype, experts.shape[1:]) for experts in given] == [(torch.uint8, (1, TOPK))] * 2
    assert torch.equal(given[0].int(), first.routing[:, 1:])
    assert torch.equal(routing(second, PROMPT), first.routing), "None leaves it to SGLang's own"


def test_the_routing_that_r3_sends_is_what_was_recorded(folder: Path) -> None:
    engine = start(folder, lambda *_: None, r3.encode_routed_experts)
    for answer in ask(engine, PROMPTS, 3, **GREEDY):
        assert torch.equal(wire.decode(answer["meta_info"]["routed_experts"]).int(), answer.routing)


def test_the_hook_comes_before_everything(folder: Path) -> None:
    def replace(server_args: ServerArgs, request: GenerateRequest) -> None:
        request.input_ids = [4, 5]

    engine = start(folder, replace)
    payload = {"input_ids": [10**6], "sampling_params": {"max_new_tokens": 1}}
    assert engine.generate(payload)["meta_info"]["prompt_tokens"] == 2


# -- HTTP ------------------------------------------------------------------------------------------------------------


def call(url: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data), timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[RolloutEngine, str]]:
    engine = start(folder, r3.receive_engine_request)
    with engine.serve() as url:
        yield engine, url


def test_the_probe_of_r3_is_content_with_what_r3_sends_and_with_nothing_else(
    served: tuple[RolloutEngine, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, url = served
    with pytest.raises(PluginError, match="cannot be read"):
        routing_arrives(ROUTING, url, [url])
    monkeypatch.setattr(engine, "_encode", r3.encode_routed_experts)
    assert "through the router" in routing_arrives(ROUTING, url, [url])


def test_http_gives_what_generate_gives(served: tuple[RolloutEngine, str]) -> None:
    engine, url = served
    payload = {"input_ids": PROMPTS, "sampling_params": {"max_new_tokens": 3, **GREEDY}, "return_logprob": True}
    status, answers = call(f"{url}/generate", payload)
    expected = engine.generate(payload)
    for answer in [*answers, *expected]:
        del answer["meta_info"]["id"], answer["meta_info"]["e2e_latency"]
    assert (status, answers) == (200, expected)


def test_requests_at_the_same_time(served: tuple[RolloutEngine, str]) -> None:
    engine, url = served
    answers: dict[int, Any] = {}

    def request(number: int) -> None:
        payload = {"input_ids": PROMPTS[number], "sampling_params": {"max_new_tokens": 4, **GREEDY}}
        answers[number] = call(f"{url}/generate", payload)[1]["output_ids"]

    threads = [threading.Thread(target=request, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, prompt in enumerate(PROMPTS):
        assert answers[number] == ask(engine, prompt, 4, **GREEDY)["output_ids"]


def test_http_pages_and_errors(served: tuple[RolloutEngine, str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, url = served
    assert call(f"{url}/health") == (200, {})
    status, info = call(f"{url}/get_model_info")
    assert (status, info["weight_version"], info["model_type"]) == (200, "default", "qwen3_moe")
    assert info["model_path"] == engine.server_args.model_path
    for body, message in [({"images": 1}, "images"), (b"{", "Expecting"), (b"[1]", "not a JSON object")]:
        status, answer = call(f"{url}/generate", body)
        assert (status, message in answer["error"]["message"]) == (400, True), answer
    assert call(f"{url}/other")[0] == call(f"{url}/other", {})[0] == 404
    monkeypatch.setattr(engine, "_on_request", lambda *_: 1 / 0)
    status, answer = call(f"{url}/generate", {"input_ids": PROMPT})
    assert (status, answer["error"]["message"]) == (500, "ZeroDivisionError: division by zero")
    assert call(f"{url}/health")[0] == 200
    assert "sglang" not in json.dumps([info, answer]).lower()


def test_the_server_is_gone_afterwards(engine: RolloutEngine) -> None:
    before = set(threading.enumerate())
    with engine.serve() as url:
        assert call(f"{url}/health")[0] == 200
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before
    with pytest.raises(OSError, match="refused"):
        call(f"{url}/health")


def test_the_server_waits_for_the_request_in_hand(folder: Path) -> None:
    entered, answers = threading.Event(), []

    def slow(*_: object) -> None:
        entered.set()
        time.sleep(0.3)

    before = set(threading.enumerate())
    with start(folder, slow).serve() as url:
        payload = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}
        client = threading.Thread(target=lambda: answers.append(call(f"{url}/generate", payload)))
        client.start()
        assert entered.wait(10)
    assert set(threading.enumerate()) <= before | {client}
    client.join()
    assert answers[0][0] == 200


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def snapshot(engine: RolloutEngine) -> dict[str, Any]:
    return {name: parameter.clone() for name, parameter in engine.model.named_parameters()}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_folders_own_weights_change_nothing(folder: Path, tensors: dict[str, Any], dtype: str) -> None:
    engine = start(folder, dtype=dtype)
    loaded, before = snapshot(engine), ask(engine, PROMPTS, **GREEDY)
    for parameter in engine.model.parameters():
        parameter.zero_()  # so that nothing is right because nothing was copied
    engine.update_weights(iter(tensors.items()), "2")
    assert equal(loaded, snapshot(engine))
    after = ask(engine, PROMPTS, **GREEDY)
    for one, other, prompt in zip(before, after, PROMPTS, strict=True):
        assert (one["meta_info"]["weight_version"], other["meta_info"]["weight_version"]) == ("default", "2")
        assert one["output_ids"] == other["output_ids"]
        assert log_probs(one) == log_probs(other)
        assert torch.equal(routing(one, prompt), routing(other, prompt))


def test_new_weights_are_used(folder: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, seed=1, layers=LAYERS, experts=EXPERTS, topk=TOPK)
    sharpen(tmp_path)
    engine, other = start(folder), start(tmp_path)
    expected = ask(other, PROMPTS, **GREEDY)
    engine.update_weights(load_file(tmp_path / "model.safetensors").items(), "1")
    assert equal(snapshot(engine), snapshot(other))
    assert [a["output_ids"] for a in ask(engine, PROMPTS, **GREEDY)] == [a["output_ids"] for a in expected]


def test_the_iterable_may_reuse_its_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    def reused() -> Iterator[tuple[str, Any]]:
        for name, tensor in tensors.items():
            buffer = tensor.float()
            yield name, buffer
            buffer.fill_(float("nan"))

    engine = start(folder)
    before = snapshot(engine)
    engine.update_weights(reused(), "1")
    assert equal(before, snapshot(engine))


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown .*model.other": lambda t: [*t.items(), ("model.other", torch.zeros(2))],
    f"missing .*{re.escape(EXPERT)}": lambda t: [(n, v) for n, v in t.items() if n != EXPERT],
    f"came twice .*{re.escape(EXPERT)}": lambda t: [*t.items(), (EXPERT, t[EXPERT])],
    f"wrong shape .*{re.escape(EXPERT)} .64, 32., expected .32, 64.": lambda t: {**t, EXPERT: t[EXPERT].T}.items(),
    f"not floating point .*{re.escape(EXPERT)} torch.int8": lambda t: {**t, EXPERT: t[EXPERT].to(torch.int8)}.items(),
    f"not finite .*{re.escape(EXPERT)}": lambda t: {**t, EXPERT: t[EXPERT] * float("inf")}.items(),
    "missing .*model.norm.weight": lambda t: [(n, v + 1) for n, v in t.items() if n != "model.norm.weight"],
    "and [0-9]+ more": lambda t: [],
}


@pytest.mark.parametrize("message", SPOILED)
def test_weights_that_do_not_fit_change_nothing(folder: Path, tensors: dict[str, Any], message: str) -> None:
    engine = start(folder)
    before = snapshot(engine)
    with pytest.raises(PluginError, match=message):
        engine.update_weights(SPOILED[message](tensors), "2")
    assert equal(before, snapshot(engine))
    assert engine.server_args.weight_version == "default"


def test_weights_too_large_for_the_models_dtype_are_not_finite(folder: Path, tensors: dict[str, Any]) -> None:
    huge = torch.full((64,), torch.finfo(torch.float32).max)
    with pytest.raises(PluginError, match=r"not finite .*model\.norm\.weight"):
        start(folder, dtype="bfloat16").update_weights({**tensors, "model.norm.weight": huge}.items(), "2")


def test_experts_that_are_separate_modules_have_places_too() -> None:
    model = torch.nn.Module()
    model.experts = torch.nn.ModuleList(torch.nn.ModuleDict({"down_proj": torch.nn.Linear(2, 3)}) for _ in range(2))
    places = hugging_face.checkpoint_places(model)
    assert places["experts.1.down_proj.weight"].data_ptr() == model.experts[1]["down_proj"].weight.data_ptr()


# -- the model's folder and its architecture -------------------------------------------------------------------------


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "there is no model folder": shutil.rmtree,
    "no usable config.json(.|\n)*FileNotFoundError": lambda f: (f / "config.json").unlink(),
    "no usable config.json(.|\n)*JSONDecodeError": lambda f: (f / "config.json").write_text("{"),
    "no usable config.json(.|\n)*vocab_size": lambda f: (f / "config.json").write_text('{"model_type": "qwen3_moe"}'),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no causal LM(.|\n)*made_up": lambda f: rewrite(f / "config.json", model_type="made_up"),
    "no causal LM(.|\n)*Classification": lambda f: rewrite(
        f / "config.json", architectures=["Qwen3MoeForSequenceClassification"]
    ),
    "vocabulary mismatch(.|\n)*128 tokens(.|\n)*100": lambda f: rewrite(f / "config.json", vocab_size=100),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "cannot be loaded": lambda f: (f / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("message", FOLDERS)
def test_a_folder_that_cannot_be_used(copy: Path, message: str) -> None:
    FOLDERS[message](copy)
    with pytest.raises(ArgumentError, match=message):
        check_model_folder(copy)


def test_a_usable_folder_gives_its_configuration(folder: Path) -> None:
    assert check_model_folder(folder)["num_experts"] == EXPERTS
    assert check_model_folder(str(folder))["vocab_size"] == VOCABULARY


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(EXPERT), "cannot be loaded|do not belong"),
        (lambda t: t.pop("model.norm.weight"), "do not belong(.|\n)*model.norm.weight"),
        (lambda t: t.update({"model.other.weight": torch.zeros(2)}), "do not belong(.|\n)*model.other.weight"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)}), "cannot be loaded|do not belong"),
    ],
)
def test_weights_of_another_model(copy: Path, tensors: dict[str, Any], spoil: Any, message: str) -> None:
    spoiled = dict(tensors)
    spoil(spoiled)
    save_file(spoiled, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match=message):
        start(copy)


def test_a_truncated_file(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ArgumentError, match="cannot be loaded"):
        start(copy)


def test_an_unknown_dtype(folder: Path) -> None:
    with pytest.raises(ArgumentError, match=r"unknown dtype(.|\n)*int4"):
        start(folder, dtype="int4")


class Layered(torch.nn.Module):
    """As little of a model with experts as shows its routers: every layer has a gate that returns `chosen`."""

    def __init__(self, chosen: Any, num_experts: int = 4) -> None:
        super().__init__()

        class Gate(torch.nn.Module):
            def forward(self, tokens: Any) -> Any:
                return chosen(tokens)

        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"gate": Gate()}) for _ in range(2))
        self.config = SimpleNamespace(num_experts=num_experts, num_experts_per_tok=2)
        self.device = torch.device("cpu")

    def forward(self, input_ids: Any, use_cache: bool) -> None:
        for layer in self.layers:
            layer["gate"](input_ids.reshape(-1, 1))


def test_routers_are_known_by_what_they_return() -> None:
    both = Layered(lambda tokens: (tokens.float(), tokens.repeat(1, 2)))
    assert list(hugging_face.find_routers(both)) == [0, 1]
    for chosen in (lambda tokens: tokens.float(), lambda tokens: (tokens.float(), tokens.repeat(1, 3))):
        with pytest.raises(UpstreamError, match=r"routers are not recognised(.|\n)*no router"):
            hugging_face.find_routers(Layered(chosen))
    assert hugging_face.find_routers(Layered(lambda tokens: tokens.float(), num_experts=0)) == {}


def test_two_candidates_for_a_router_are_none() -> None:
    model = Layered(lambda tokens: (tokens.float(), tokens.repeat(1, 2)))
    model.layers[0]["gate"].inner = model.layers[1]["gate"]
    model.layers[0]["gate"].forward = lambda tokens: model.layers[0]["gate"].inner(tokens)
    with pytest.raises(UpstreamError, match=r"layers\.0\.gate"):
        hugging_face.find_routers(model)


def test_another_layout_of_fused_experts_is_refused(folder: Path) -> None:
    engine = start(folder)
    experts = engine.model.model.layers[0].mlp.experts
    own = type(experts).forward

    def interleaved(hidden: Any, index: Any, weights: Any) -> Any:
        kept = experts.gate_up_proj.clone()
        experts.gate_up_proj.copy_(torch.cat([kept[:, ::2], kept[:, 1::2]], dim=1))
        result = own(experts, hidden, index, weights)
        experts.gate_up_proj.copy_(kept)
        return result

    experts.forward = interleaved
    with pytest.raises(UpstreamError, match="unknown way"):
        hugging_face.require_known_fusion(engine.model)


# -- the environment -------------------------------------------------------------------------------------------------


def test_the_module_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, miles_plugins.embedded.engine; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_field_names_are_sglangs() -> None:
    if find_spec("sglang") is None:
        pytest.skip("needs sglang (see CONTRIBUTING.md)")
    code = LET_TORCHVISION_IN + (
        "import dataclasses, json\n"
        "from sglang.srt.managers.io_struct import GenerateReqInput\n"
        "from sglang.srt.server_args import ServerArgs\n"
        "from sglang.srt.sampling.sampling_params import SamplingParams\n"
        "names = lambda t: [f.name for f in dataclasses.fields(t)]\n"
        "sampling = list(getattr(SamplingParams, '__struct_fields__', ())) or list(vars(SamplingParams()))\n"
        "print('NAMES', json.dumps([names(GenerateReqInput), names(ServerArgs), sampling]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = re.search(r"NAMES (.*)", result.stdout)
    assert found, result.stderr[-2000:]
    requests, server, sampling = map(set, json.loads(found[1]))
    assert {field.name for field in fields(GenerateRequest)} <= requests
    assert {field.name for field in fields(ServerArgs)} <= server
    assert set(generate_request._PARAMETERS) <= sampling
