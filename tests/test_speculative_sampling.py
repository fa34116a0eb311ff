"""Speculative decoding in the embedded engine: the answers are distributed as those of plain decoding, and counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

from miles_plugins import ArgumentError, PluginError
from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model
from miles_plugins.embedded import speculation
from miles_plugins.embedded.draft import DRAFT_PARTS, add_random_draft, is_of_draft
from miles_plugins.embedded.engine import RolloutEngine, ServerArgs
from miles_plugins.embedded.hugging_face import read_tensors
from miles_plugins.embedded.speculation import count_accepted

from .test_embedded_engine import KEPT, log_probs, routing, sharpen  # noqa: F401  (KEPT lets torchvision in)

LAYERS, VOCABULARY, STEPS = 2, 128, 3
PROMPTS = [[5, 17, 40, 99, 7], [8], [30, 31, 32, 33, 34, 35, 36, 37, 38], [64, 65, 66]]
UNLIKELY = 1e-4  # a test with fixed seeds: a p-value below it is a fault, not chance
EAGLE = {
    "speculative_algorithm": "EAGLE",
    "speculative_num_steps": STEPS,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": STEPS + 1,
}


def p_value(observed: Any, expected: Any) -> float:
    """Chi-square, of counts against expected counts; bins that expect fewer than 5 are one."""
    rare = expected < 5
    pooled = [torch.cat([each[~rare], each[rare].sum()[None]]).double() for each in (observed, expected)]
    counts, wanted = (each[pooled[1] > 0] for each in pooled)
    statistic = ((counts - wanted) ** 2 / wanted).sum()
    degrees = torch.tensor(float(len(wanted) - 1))
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is sure of little, with a draft that is often right: it repeats what the trunk would say."""
    folder = tmp_path_factory.mktemp("drafting")
    write_tiny_model(folder, layers=LAYERS)
    sharpen(folder)
    add_random_draft(folder, 3)
    tensors = load_file(folder / "model.safetensors")
    eye = torch.eye(tensors["model.norm.weight"].numel(), dtype=torch.bfloat16)
    # Mostly the state of the position before, which the head reads; and some of the layer, so that all of it matters.
    tensors[f"model.layers.{LAYERS}.eh_proj.weight"] = torch.cat([0.3 * eye, eye], dim=1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def start(folder: Path, draft_is_trained: bool = False, **changed: Any) -> RolloutEngine:
    arguments = {"device": "cpu", "dtype": "float32", "random_seed": 7, "enable_return_routed_experts": True}
    server_args = ServerArgs(model_path=str(folder), **{**arguments, **changed})
    return RolloutEngine(folder, server_args, draft_is_trained=draft_is_trained)


@pytest.fixture(scope="module")
def speculative(folder: Path) -> RolloutEngine:
    return start(folder, **EAGLE)


@pytest.fixture(scope="module")
def plain(folder: Path) -> RolloutEngine:
    return start(folder)


def ask(engine: RolloutEngine, prompts: Any, new: int = 12, **sampling: Any) -> Any:
    params = {"max_new_tokens": new, **sampling}
    return engine.generate(
        {"input_ids": prompts, "sampling_params": params, "return_logprob": True, "return_routed_experts": True}
    )


# -- the pure function -----------------------------------------------------------------------------------------------


def test_what_stands_is_all_before_the_first_difference() -> None:
    proposed = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    drawn = torch.tensor([[1, 2, 3, 9], [9, 2, 3, 9], [1, 9, 3, 9], [1, 2, 9, 9]])
    assert count_accepted(proposed, drawn).tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize("proposal", range(4))
def test_accepted_with_probability_p_and_else_as_p_without_the_proposal(proposal: int) -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = torch.multinomial(p, 40_000 * 2, replacement=True, generator=torch.Generator().manual_seed(proposal))
    drawn = draws.reshape(-1, 2)
    accepted = count_accepted(torch.full((len(drawn), 1), proposal), drawn)
    assert int(accepted.sum()) == pytest.approx(len(drawn) * float(p[proposal]), abs=4 * len(drawn) ** 0.5 / 2)
    others = p.clone()
    others[proposal] = 0
    rejected = drawn[accepted == 0, 0]
    expected = len(rejected) * others / others.sum()
    assert p_value(torch.bincount(rejected, minlength=4), expected) > UNLIKELY


# -- the engine ------------------------------------------------------------------------------------------------------


def pairs_of(engine: RolloutEngine, seed: int, **sampling: Any) -> list[tuple[int, ...]]:
    """The second and third token of many answers to one prompt: those that are verified."""
    params = [{"max_new_tokens": 3, "sampling_seed": seed + n, **sampling} for n in range(1500)]
    answers = engine.generate({"input_ids": [PROMPTS[0]] * len(params), "sampling_params": params})
    return [tuple(answer["output_ids"][1:]) for answer in answers]


def compare(engine: RolloutEngine, reference: RolloutEngine, **sampling: Any) -> float:
    """The p-value of the hypothesis that both answer alike: chi-square of two samples, of other seeds."""
    first, second = (Counter(pairs_of(each, seed, **sampling)) for each, seed in ((engine, 0), (reference, 10**6)))
    sums = Counter(first) + Counter(second)
    bins = [key for key, count in sums.items() if count >= 10]
    rest = [sum(each.values()) - sum(each[key] for key in bins) for each in (first, second)]
    table = torch.tensor([[first[key], second[key]] for key in bins] + [rest], dtype=torch.float64)
    table = table[table.sum(dim=1) > 0]
    expected = table.sum(dim=1, keepdim=True) * table.sum(dim=0) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(table) - 1) / 2), statistic / 2))


SAMPLINGS: list[dict[str, Any]] = [{"temperature": 1.5}, {"temperature": 2.0, "top_k": 5, "top_p": 0.9}]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_answers_are_distributed_as_in_plain_decoding(
    sampling: dict[str, Any], speculative: RolloutEngine, plain: RolloutEngine
) -> None:
    assert compare(speculative, plain, ignore_eos=True, **sampling) > UNLIKELY


def always(proposed: Any, drawn: Any) -> Any:
    return torch.full_like(proposed[:, 0], proposed.shape[1])


def keep_proposals(original: Callable[..., Any]) -> Callable[..., Any]:
    """A verification that takes the proposals for what was drawn."""

    def accept(proposed: Any, drawn: Any) -> Any:
        drawn[:, :-1] = proposed
        return always(proposed, drawn)

    return accept


def test_and_would_not_be_if_every_proposal_were_accepted(
    speculative: RolloutEngine, plain: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "count_accepted", keep_proposals(count_accepted))
    assert compare(speculative, plain, ignore_eos=True, temperature=1.5) < UNLIKELY / 100


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.3}, {"temperature": 1.3, "top_k": 4}])
def test_the_same_seeds_give_the_answers_of_plain_decoding(
    sampling: dict[str, Any], speculative: RolloutEngine, plain: RolloutEngine
) -> None:
    params = [{"max_new_tokens": new, "sampling_seed": n, **sampling} for n, new in enumerate((1, 24, 9, 17, 0, 30))]
    prompts = [*PROMPTS, PROMPTS[0], PROMPTS[2]]
    request = {"input_ids": prompts, "sampling_params": params, "return_logprob": True, "return_routed_experts": True}
    ours, theirs = speculative.generate(request), plain.generate(request)
    assert any(answer["meta_info"].get("spec_num_correct_drafts") for answer in ours)
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        assert one["output_ids"] == other["output_ids"]
        assert one["text"] == other["text"]
        assert one["meta_info"]["finish_reason"] == other["meta_info"]["finish_reason"]
        assert log_probs(one) == pytest.approx(log_probs(other), abs=2e-4)
        # The routing is of the tokens that stand: the shape, and the experts that a pass over the answer chooses.
        assert routing(one, prompt).shape == routing(other, prompt).shape
        assert torch.equal(routing(one, prompt), routing(other, prompt))


def test_log_probs_are_those_of_one_pass_over_the_answer(speculative: RolloutEngine) -> None:
    answers = ask(speculative, PROMPTS, new=20, temperature=1.3, ignore_eos=True)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = [*prompt, *answer["output_ids"]]
        with torch.no_grad():
            logits = speculative.model(torch.tensor([tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 1.3).log_softmax(dim=-1).gather(1, torch.tensor(answer["output_ids"])[:, None])[:, 0]
        assert log_probs(answer) == pytest.approx(expected.tolist(), abs=2e-4)


def test_an_answer_ends_at_its_stop_token_within_what_was_accepted(
    speculative: RolloutEngine, plain: RolloutEngine
) -> None:
    whole = ask(plain, [PROMPTS[2]], new=24, temperature=0, ignore_eos=True)[0]["output_ids"]
    for stop in dict.fromkeys(whole):
        answer = ask(speculative, [PROMPTS[2]], new=24, temperature=0, ignore_eos=False, stop_token_ids=[stop])[0]
        assert answer["output_ids"] == whole[: whole.index(stop) + 1]


def proposals(engine: RolloutEngine, tokens: list[int]) -> list[int]:
    """What the draft proposes after these tokens, computed afresh: no cache, no padding, no other row."""
    assert engine.draft is not None
    head = engine.model.get_output_embeddings()
    with torch.inference_mode():
        before = engine.model.base_model(torch.tensor([tokens[:-1]]), use_cache=False).last_hidden_state
        following, found = torch.tensor([tokens[1:]]), []
        for _ in range(STEPS):
            length = following.shape[1]
            everything, positions = torch.ones(1, length), torch.arange(length)[None]
            states, _ = engine.draft.states(following, before, everything, positions, None)
            found.append(int(head(states[0, -1]).argmax()))
            following = torch.cat([following, torch.tensor([found[-1:]])], dim=1)
            before = torch.cat([before, states[:, -1:]], dim=1)
    return found


def test_proposals_are_those_of_the_draft_over_what_stands(
    speculative: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches, masks and positions hold only what was accepted, also after rejections and beside longer rows."""
    passes: list[tuple[Any, Any]] = []

    def look(proposed: Any, drawn: Any) -> Any:
        passes.append((proposed, count_accepted(proposed, drawn)))
        return passes[-1][1]

    monkeypatch.setattr(speculation, "count_accepted", look)
    params = [{"max_new_tokens": 16, "temperature": 1.3, "ignore_eos": True, "sampling_seed": n} for n in range(4)]
    answers: Any = speculative.generate({"input_ids": PROMPTS, "sampling_params": params})
    rejected = 0
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        done = 1
        for proposed, accepted in passes:
            if done < len(answer["output_ids"]):
                expected = proposals(speculative, [*prompt, *answer["output_ids"][:done]])
                assert proposed[row].tolist() == expected
                rejected += int(accepted[row]) < STEPS
            done += int(accepted[row]) + 1
    assert rejected > 10


# -- counts ----------------------------------------------------------------------------------------------------------


def test_counts_are_sglangs(speculative: RolloutEngine) -> None:
    for answer in ask(speculative, PROMPTS, new=20, temperature=0, ignore_eos=True):
        info = answer["meta_info"]
        verified, correct = info["spec_verify_ct"], info["spec_num_correct_drafts"]
        assert info["spec_num_proposed_drafts"] == STEPS * verified
        assert info["spec_accept_rate"] == correct / (STEPS * verified)
        assert info["spec_accept_length"] == 20 / verified
        # The first token is not verified; each pass brings its own token and the accepted ones, the last maybe more.
        assert 20 <= 1 + verified + correct <= 20 + STEPS


def test_an_answer_of_one_token_is_never_verified(speculative: RolloutEngine) -> None:
    info = ask(speculative, PROMPTS[:1], new=1)[0]["meta_info"]
    assert not [name for name in info if name.startswith("spec_")]


def test_without_a_draft_nothing_is_counted(plain: RolloutEngine) -> None:
    info = ask(plain, PROMPTS[:1])[0]["meta_info"]
    assert not [name for name in info if name.startswith("spec_")]


def test_a_perfect_draft_is_always_accepted(folder: Path, tmp_path: Path) -> None:
    """It says what the target says, whose last layer it is: the counts are then known."""
    write_tiny_model(tmp_path, layers=1)
    add_random_draft(tmp_path, 3)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():  # trunk and draft add nothing: each token's likeliest successor is its own
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    torch.manual_seed(0)
    tensors["model.embed_tokens.weight"] = torch.randn(128, 64).bfloat16()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0).contiguous()  # after n comes n + 1
    eye = torch.eye(64, dtype=torch.bfloat16)
    tensors["model.layers.1.eh_proj.weight"] = torch.cat([eye, 0 * eye], dim=1)
    save_file(tensors, file, metadata={"format": "pt"})
    answer = ask(start(tmp_path, **EAGLE), [[20, 21]], new=13, temperature=0, ignore_eos=True)[0]
    assert answer["output_ids"] == list(range(22, 35))
    assert answer["meta_info"]["spec_accept_rate"] == 1.0
    assert answer["meta_info"]["spec_verify_ct"] == 3  # 1 + 3 x (3 + 1) tokens


# -- weights ---------------------------------------------------------------------------------------------------------


def test_an_update_takes_the_drafts_tensors_too(folder: Path) -> None:
    engine = start(folder, draft_is_trained=True, **EAGLE)
    tensors = {name: tensor * 0.5 for name, tensor in read_tensors(folder).items()}
    engine.update_weights(tensors.items(), "2")
    assert engine.draft is not None
    places = engine.draft.places()
    assert {f"model.layers.{LAYERS}.{part}" for part in DRAFT_PARTS} < places.keys()
    for name, place in places.items():
        assert torch.equal(place, tensors[name].float())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop(f"model.layers.{LAYERS}.eh_proj.weight"), ["missing", "eh_proj"]),
        (lambda t: t.update({f"model.layers.{LAYERS}.fc.weight": torch.zeros(2)}), ["unknown", "fc.weight"]),
        (lambda t: t.update({f"model.layers.{LAYERS}.enorm.weight": torch.zeros(2)}), ["wrong shape", "enorm"]),
    ],
)
def test_an_update_without_all_of_a_trained_draft_is_refused(
    spoil: Callable[[dict[str, Any]], Any], words: list[str], folder: Path
) -> None:
    engine = start(folder, draft_is_trained=True, **EAGLE)
    assert engine.draft is not None
    before = {name: place.clone() for name, place in engine.draft.places().items()}
    tensors = {name: tensor * 0.5 for name, tensor in read_tensors(folder).items()}
    spoil(tensors)
    with pytest.raises(PluginError) as refused:
        engine.update_weights(tensors.items(), "2")
    assert all(word in str(refused.value) for word in words)
    assert all(torch.equal(place, before[name]) for name, place in engine.draft.places().items())


@pytest.mark.parametrize("sent", [True, False])
def test_updates_pass_a_frozen_draft_by(sent: bool, folder: Path) -> None:
    engine = start(folder, **EAGLE)
    assert engine.draft is not None
    before = {name: place.clone() for name, place in engine.draft.places().items()}
    tensors = read_tensors(folder).items()
    engine.update_weights(((n, t * 0.5) for n, t in tensors if sent or not is_of_draft(n, LAYERS)), "2")
    assert engine.server_args.weight_version == "2"
    assert all(torch.equal(place, before[name]) for name, place in engine.draft.places().items())


def test_an_engine_without_a_draft_takes_no_draft(folder: Path) -> None:
    engine = start(folder)
    engine.update_weights(read_tensors(folder).items(), "2")
    assert engine.server_args.weight_version == "2"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculative_algorithm": "EAGLE3"}, "EAGLE3"),
        ({"speculative_eagle_topk": 4}, "top-k 4"),
        ({"speculative_num_draft_tokens": 8}, "8 draft tokens"),
        ({"speculative_num_steps": 0, "speculative_num_draft_tokens": 1}, "0 steps"),
    ],
)
def test_other_kinds_of_speculation_are_refused(changes: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(ArgumentError, match=words):
        start(folder, **{**EAGLE, **changes})


def test_a_checkpoint_without_a_draft_is_refused(folder: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, layers=LAYERS)
    with pytest.raises(ArgumentError, match=r"(?s)has no draft for this model.*missing.*eh_proj"):
        start(folder, **EAGLE, speculative_draft_model_path=str(tmp_path))


def test_a_random_draft_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, layers=LAYERS)
    before = read_tensors(tmp_path)
    add_random_draft(tmp_path, 1)
    after = read_tensors(tmp_path)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(is_of_draft(name, LAYERS) for name in after.keys() - before.keys())
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
