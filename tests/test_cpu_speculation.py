"""Speculation on a CPU: tokens are distributed as without it, and SGLang is told of them as by its own kernels."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import ArgumentError
from miles_plugins.cpu_rehearsal import chain
from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model
from miles_plugins.patches.sglang import cpu_speculation as speculation

torch = pytest.importorskip("torch")


def never(*args: Any, **kwargs: Any) -> None:
    pytest.fail("the original was called")


# -- what is accepted ------------------------------------------------------------------------------------------------


def test_a_chain_is_a_tree() -> None:
    tree = chain.tree(torch.tensor([7, 3], dtype=torch.int32), 3)
    assert tree.positions.tolist() == [7, 8, 9, 3, 4, 5]
    assert tree.numbers.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tree.child.tolist() == [[1, 2, -1]] * 2
    assert tree.sibling.tolist() == [[-1] * 3] * 2
    assert {each.dtype for each in tree} == {torch.int64}
    assert all(each.is_contiguous() for each in tree)


tokens = st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(tokens, tokens)
def test_greedily_proposals_count_until_the_first_that_is_wrong(candidates: list[Any], chosen: list[Any]) -> None:
    candidates, chosen = candidates[: len(chosen)], chosen[: len(candidates)]
    drafts, said = chain.accept_greedily(torch.tensor(candidates), torch.tensor(chosen))
    for row, (proposed, wanted) in enumerate(zip(candidates, chosen, strict=True)):
        count = 0
        while count < 3 and proposed[count + 1] == wanted[count]:
            count += 1
        assert drafts[row] == count
        assert said[row, : count + 1].tolist() == [*proposed[1 : count + 1], wanted[count]]


P = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.6, 0.05, 0.25], [0.25, 0.25, 0.4, 0.1]])
PROPOSALS = (0, 2)  # what P[0] finds likely, and what P[1] does not
ROWS = 40_000
LARGE = 24.0  # chi-square of tokens of the very distribution exceeds it once in 40 000 (3 degrees of freedom)


def chi_square(found: Any, weights: Any) -> float:
    """How far tokens are from a distribution; none may be one of weight 0."""
    possible = weights > 0
    counts = torch.bincount(found, minlength=len(weights)).double()
    assert counts[~possible].sum() == 0
    expected = weights[possible].double() * len(found)
    return float(((counts[possible] - expected) ** 2 / expected).sum())


def spoken(accept: Any, seed: int) -> tuple[Any, Any]:
    """[ROWS] and [ROWS, 3]: of so many passes with the same proposals, how many were accepted, and the tokens."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.tensor([3, *PROPOSALS]).expand(ROWS, 3)
    coins, last = torch.rand((ROWS, 3), generator=generator), torch.rand(ROWS, generator=generator)
    accepted = accept(candidates, P.expand(ROWS, 3, 4), coins, last)
    return accepted.drafts, accepted.tokens


@pytest.mark.parametrize("seed", range(3))
def test_what_comes_is_distributed_as_without_speculation(seed: int) -> None:
    drafts, said = spoken(chain.accept_by_chance, seed)
    assert chi_square(said[:, 0], P[0]) < LARGE
    first = drafts >= 1  # then the second token of the pass is one as well
    assert set(said[first, 0].tolist()) == {PROPOSALS[0]}
    assert chi_square(said[first, 1], P[1]) < LARGE
    both = drafts == 2
    assert set(said[both, 1].tolist()) == {PROPOSALS[1]}
    assert chi_square(said[both, 2], P[2]) < LARGE
    assert first.float().mean() == pytest.approx(0.5, abs=0.02)
    assert both.sum() / first.sum() == pytest.approx(0.05, abs=0.01)


def with_the_refused(candidates: Any, probabilities: Any, coins: Any, last_coins: Any) -> chain.Accepted:
    """Wrong: after a refusal it draws from all of p."""
    found = chain.accept_by_chance(candidates, probabilities, coins, last_coins)
    rows = torch.arange(len(found.drafts))
    found.tokens[rows, found.drafts] = chain.draw(probabilities[rows, found.drafts], last_coins)
    return found


def the_likeliest(candidates: Any, probabilities: Any, coins: Any, last_coins: Any) -> chain.Accepted:
    """Wrong: it verifies greedily at any temperature."""
    return chain.accept_greedily(candidates, probabilities.argmax(dim=2))


@pytest.mark.parametrize("wrong", [with_the_refused, the_likeliest])
def test_the_comparison_can_fail(wrong: Any) -> None:
    _, said = spoken(wrong, 0)
    assert chi_square(said[:, 0], P[0]) > 100 * LARGE


def test_a_certain_proposal_is_accepted_and_an_impossible_one_never() -> None:
    certain = torch.zeros(1, 3, 4)
    certain[0, 0, 1] = certain[0, 1, 2] = certain[0, 2, 3] = 1
    most = torch.tensor([1 - 2**-24])
    assert chain.accept_by_chance(torch.tensor([[0, 1, 2]]), certain, most.expand(1, 3), most).drafts == 2
    accepted = chain.accept_by_chance(torch.tensor([[0, 0, 2]]), certain, torch.zeros(1, 3), torch.zeros(1))
    assert (accepted.drafts.item(), accepted.tokens[0, 0].item()) == (0, 1)


@pytest.mark.parametrize("coin", [0.0, 0.49, 0.51, 1 - 2**-24])
def test_what_has_no_weight_is_not_drawn(coin: float) -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]])
    assert chain.draw(weights, torch.tensor([coin])).tolist() == [1 if coin < 0.5 else 3]


def test_where_nothing_is_left_there_still_is_a_token() -> None:
    assert chain.draw(torch.zeros(1, 4), torch.tensor([0.3])).tolist() == [3]


rows_of_weights = st.lists(st.lists(st.integers(0, 5), min_size=5, max_size=5).filter(any), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(rows_of_weights, st.integers(1, 7), st.sampled_from([0.1, 0.5, 0.75, 1.0]))
def test_the_most_likely_are_kept(rows: list[list[int]], count: int, share: float) -> None:
    weights = torch.tensor(rows, dtype=torch.float32)
    given_ones = weights / weights.sum(dim=1, keepdim=True)
    top_k = chain.keep_top_k(given_ones, torch.full((len(rows),), count))
    top_p = chain.keep_top_p(given_ones, torch.full((len(rows),), share))
    for row, kept_k, kept_p in zip(given_ones.tolist(), top_k.tolist(), top_p.tolist(), strict=True):
        order = sorted(range(5), key=lambda token: -row[token])
        sums = [sum(row[token] for token in order[:place]) for place in range(5)]
        for kept, chosen in (
            (kept_k, order[:count]),
            (kept_p, [token for token, before in zip(order, sums, strict=True) if before < share - 1e-6 or share == 1]),
        ):
            total = sum(row[token] for token in chosen)
            assert kept == pytest.approx([row[token] / total if token in chosen else 0 for token in range(5)])


def test_without_a_limit_probabilities_stay_what_they_are() -> None:
    given_ones = torch.rand(4, 50).softmax(dim=1)
    assert torch.equal(chain.keep_top_k(given_ones, torch.full((4,), 1 << 30)), given_ones)
    assert torch.equal(chain.keep_top_p(given_ones, torch.ones(4)), given_ones)


# -- what SGLang is told ---------------------------------------------------------------------------------------------


def told(batch: int, width: int) -> tuple[Any, Any, Any]:
    """SGLang's tensors, with anything in them."""
    whatever = {"dtype": torch.int32}
    return (
        torch.full((batch * width,), 77, **whatever),
        torch.full((batch, width), -1, **whatever),
        torch.full((batch,), 77, **whatever),
    )


def test_the_accepted_tokens_are_where_sglang_looks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = torch.tensor([[9, 1, 2], [9, 5, 6]])
    chosen = torch.tensor([[1, 2, 3], [4, 0, 0]])
    predicts, index, count = speculation.verify_greedily(
        never, *told(2, 3), candidates=candidates, retrieve_index=None, target_predict=chosen, topk=1
    )
    assert count.tolist() == [2, 0]
    assert index.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert predicts[index[0]].tolist() == [1, 2, 3]
    assert predicts[index[1, :1]].tolist() == [4]
    last = torch.empty(2, dtype=torch.int32)
    worker: Any = ModuleType("sglang.srt.speculative.eagle_worker_v2")
    worker.fill_bonus_tokens = never
    monkeypatch.setitem(sys.modules, "sglang.srt.speculative", SimpleNamespace(eagle_worker_v2=worker))

    def sglangs(self: Any, batch: Any) -> Any:
        worker.fill_bonus_tokens[(2,)](predicts[index], count + 1, last, 3)
        return batch

    assert speculation.verify(sglangs, None, 5) == 5
    assert last.tolist() == [3, 4]
    assert worker.fill_bonus_tokens is never


def test_sampling_finds_the_kernels_and_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def sglangs(answer: int) -> int:
        from sgl_kernel import top_k_renorm_prob, top_p_renorm_prob, tree_speculative_sampling_target_only

        assert (top_k_renorm_prob, top_p_renorm_prob) == (chain.keep_top_k, chain.keep_top_p)
        out = told(1, 2)
        tree_speculative_sampling_target_only(
            predicts=out[0],
            accept_index=out[1],
            accept_token_num=out[2],
            candidates=torch.tensor([[0, 1]]),
            retrive_index=None,
            uniform_samples=torch.zeros(1, 2),
            uniform_samples_for_final_sampling=torch.zeros(1),
            target_probs=torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]),
            draft_probs=None,
            deterministic=True,
        )
        assert [each.tolist() for each in out] == [[1, 0], [[0, 1]], [1]]
        if answer < 0:
            raise ValueError(answer)
        return answer

    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)
    assert speculation.sample(sglangs, 5) == 5
    assert "sgl_kernel" not in sys.modules
    installed = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "sgl_kernel", installed)
    with pytest.raises(ValueError, match="-1"):
        speculation.sample(sglangs, answer=-1)
    assert sys.modules["sgl_kernel"] is installed


def test_the_tree_comes_with_the_tokens() -> None:
    mask, *tree, tokens_of_pass = speculation.build_tree(
        never, torch.tensor([8, 9]), None, None, torch.tensor([[1, 2], [3, 4]]), torch.tensor([5, 6]), 11, 1, 2, 3
    )
    assert tokens_of_pass.tolist() == [8, 1, 2, 9, 3, 4]
    assert mask.numel() == 0
    assert [each.tolist() for each in tree] == [each.tolist() for each in chain.tree(torch.tensor([5, 6]), 3)]


def test_places_in_the_cache_are_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.arange(40, dtype=torch.int32).reshape(4, 10)
    rows, lengths = torch.tensor([2, 0]), torch.tensor([3, 5])
    assert speculation.read_places(never, rows, table, lengths, lengths + 2, 2, 2, "cpu").tolist() == [23, 24, 5, 6]

    kernels: Any = ModuleType("cache_locs")
    kernels.assign_draft_cache_locs_contiguous = never
    package = SimpleNamespace(cache_locs=kernels)
    monkeypatch.setitem(sys.modules, "sglang.srt.speculative.triton_ops", package)
    found = torch.empty(6, dtype=torch.int64)

    def sglangs(self: Any, topk: int, *, num_steps: int) -> None:
        kernels.assign_draft_cache_locs_contiguous[(2,)](rows, table, lengths, found, 10, topk, num_steps)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        speculation.prepare_for_draft(sglangs, None, 1, num_steps=3)
    assert found.tolist() == [23, 24, 25, 5, 6, 7]
    assert kernels.assign_draft_cache_locs_contiguous is never

    ends = torch.tensor([3, 8], dtype=torch.int32)  # nothing for the first
    speculation.write_places(never, rows, table, lengths.int(), ends, torch.tensor([91, 92, 93]), 2)
    assert table[0].tolist() == [0, 1, 2, 3, 4, 91, 92, 93, 8, 9]
    assert table[1:].flatten().tolist() == list(range(10, 40))


def test_nobody_waits_for_a_gpu_and_no_kernel_is_tried_out() -> None:
    own = torch.cuda.synchronize
    speculation.share_head(lambda self: torch.cuda.synchronize(), None)
    assert torch.cuda.synchronize is own
    pool = SimpleNamespace()
    speculation.move_nothing(never, pool)
    assert pool._kv_copy_config is None


# -- attention -------------------------------------------------------------------------------------------------------


EXACT = {
    "speculative_eagle_topk": 1,
    "speculative_accept_threshold_single": 1.0,
    "speculative_accept_threshold_acc": 1.0,
    "speculative_use_rejection_sampling": False,
}


def a_pass(verifies: bool) -> SimpleNamespace:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_target_verify=lambda: verifies),
        spec_info=SimpleNamespace(draft_token_num=4),
        seq_lens=torch.tensor([7, 3]),
        extend_prefix_lens=None,
        extend_seq_lens=None,
    )


def test_verifying_extends_each_sequence_by_the_chain() -> None:
    seen = []
    original = lambda self, q, k, v, layer, batch, save_kv_cache=True: seen.append((batch, save_kv_cache))  # noqa: E731
    given_batch = a_pass(verifies=True)
    speculation.extend(original, None, 0, 0, 0, 0, given_batch, save_kv_cache=False)
    batch, saves = seen[0]
    assert not saves
    assert batch.extend_prefix_lens.tolist() == [7, 3]
    assert batch.extend_seq_lens.tolist() == [4, 4]
    assert batch.seq_lens.tolist() == [11, 7]
    assert given_batch.seq_lens.tolist() == [7, 3]  # SGLang goes on from it
    assert given_batch.extend_seq_lens is None
    other = a_pass(verifies=False)
    speculation.extend(original, None, 0, 0, 0, 0, other)
    assert seen[1] == (other, True)


class Backend:
    """As far as SGLang's `torch_native` is asked here."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.planned, self.read = runner, [], []

    def init_forward_metadata(self, batch: Any) -> None:
        self.planned.append(batch)

    def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True) -> None:
        self.read.append(batch.seq_lens.tolist())


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """SGLang's, of the backends for a draft."""
    module: Any = ModuleType("torch_native_backend")
    module.TorchNativeAttnBackend = Backend
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.attention.torch_native_backend", module)
    runner = SimpleNamespace()
    runner.attn_backend = Backend(runner)
    server_args = SimpleNamespace(**EXACT)
    return SimpleNamespace(draft_model_runner=runner, speculative_num_steps=3, server_args=server_args)


def test_each_step_of_the_draft_reads_one_token_more(factory: SimpleNamespace) -> None:
    backend = speculation.draft_attention(never, factory)
    batch = a_pass(verifies=False)
    backend.init_forward_metadata(batch)
    for step in backend.attn_backends:  # the first of the three proposals was made before
        step.forward_decode(0, 0, 0, 0, batch)
    assert [step.planned for step in backend.attn_backends] == [[batch], [batch]]
    assert [step.read for step in backend.attn_backends] == [[[8, 4]], [[9, 5]]]
    assert batch.seq_lens.tolist() == [7, 3]
    assert speculation.draft_extend_attention(never, factory) is None
    factory.speculative_num_steps = 1
    assert speculation.draft_attention(never, factory) is None


def test_other_attention_is_sglangs_own_affair(factory: SimpleNamespace) -> None:
    factory.draft_model_runner.attn_backend = object()
    factory.server_args.speculative_eagle_topk = 2
    assert speculation.draft_attention(lambda self: ("own", self), factory) == ("own", factory)
    assert speculation.draft_extend_attention(lambda self: ("own", self), factory) == ("own", factory)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"speculative_eagle_topk": 2}, "--sglang-speculative-eagle-topk"),
        ({"speculative_accept_threshold_acc": 0.9}, "--sglang-speculative-accept-threshold-acc"),
        ({"speculative_use_rejection_sampling": True}, "--sglang-speculative-use-rejection-sampling"),
    ],
)
def test_a_tree_is_refused_and_so_is_inexact_sampling(
    factory: SimpleNamespace, changed: dict[str, Any], flag: str
) -> None:
    vars(factory.server_args).update(changed)
    with pytest.raises(ArgumentError, match="one proposal at each step") as caught:
        speculation.draft_attention(never, factory)
    assert list(caught.value.facts) == [flag]


# -- the real engine -------------------------------------------------------------------------------------------------

ANSWERS = """
import json, os, sys

from miles_plugins.activation import ACTIVE, activate
from miles_plugins.patches.slime.processes import CHILD_PROCESS_FOLDER

SPECULATION = {
    "speculative_algorithm": "EAGLE",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}


def answers(engine, temperature, prompts):
    sampling = {"temperature": temperature, "max_new_tokens": 30, "ignore_eos": True}
    found = engine.generate(prompts, sampling, return_logprob=True, return_routed_experts=True)
    return [each["meta_info"] | {"ids": each["output_ids"]} for each in found]


def main():
    model, output = sys.argv[1:]
    activate(["cpu_rehearsal"], "sglang_child")
    os.environ[ACTIVE] = "cpu_rehearsal"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CHILD_PROCESS_FOLDER), os.environ["PYTHONPATH"]])
    import sglang

    prompts, found = [f"question {number}" for number in range(60)], {}
    for name, more in {"speculative": {**SPECULATION, "speculative_draft_model_path": model}, "plain": {}}.items():
        engine = sglang.Engine(
            model_path=model, device="cpu", attention_backend="torch_native", sampling_backend="pytorch",
            mem_fraction_static=0.05, max_total_tokens=4096, disable_cuda_graph=True, disable_overlap_schedule=True,
            grammar_backend="none", skip_server_warmup=True, host="127.0.0.1", log_level="warning",
            enable_return_routed_experts=True, **more,
        )
        found[name] = {"greedy": answers(engine, 0, prompts[:3]), "sampled": answers(engine, 1.0, prompts)}
        if name == "plain":  # what it says of the other's tokens, read at once
            ids = [engine.tokenizer_manager.tokenizer.encode(prompt) for prompt in prompts]
            read = [prompt + answer["ids"] for prompt, answer in zip(ids, found["speculative"]["sampled"])]
            scored = engine.generate(
                input_ids=read, sampling_params={"max_new_tokens": 1, "temperature": 1.0},
                return_logprob=True, logprob_start_len=0,
            )
            found["read"] = [
                [logprob for logprob, _, _ in each["meta_info"]["input_token_logprobs"]][-30:] for each in scored
            ]
        engine.shutdown()
    with open(output, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
"""


def write_sure_model(folder: Path) -> None:
    """One that finds some token likely after each, in every context another share, and a draft that half knows it."""
    from safetensors.torch import load_file, save_file

    write_tiny_model(folder, draft_layers=1)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(128, 64, generator=generator)
    head = torch.empty_like(embedding)
    head[torch.randperm(128, generator=generator)] = embedding * 0.1
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = embedding.bfloat16(), head.bfloat16()
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        elif "eh_proj" in name:
            tensor.copy_(torch.eye(64, 128))  # the draft looks at tokens only
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def said(answer: dict[str, Any]) -> list[float]:
    return [logprob for logprob, _, _ in answer["output_token_logprobs"]]


def choices(answer: dict[str, Any]) -> Any:
    """[tokens, layers, top-k], sorted."""
    found = torch.frombuffer(bytearray(base64.b64decode(answer["routed_experts"])), dtype=torch.int32)
    return found.reshape(answer["prompt_tokens"] + 29, -1, 2).sort(dim=-1).values


@pytest.mark.upstream
@pytest.mark.usefixtures("upstream_path")
def test_the_real_engine_answers_as_without_speculation(tmp_path: Path) -> None:
    write_sure_model(tmp_path / "model")
    script = tmp_path / "answers.py"
    script.write_text(ANSWERS)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MILES_PLUGINS")},
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(script), str(tmp_path / "model"), str(tmp_path / "answers.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "answers.json").read_text())
    speculative, plain = found["speculative"], found["plain"]

    for answer, expected in zip(speculative["greedy"], plain["greedy"], strict=True):
        assert answer["ids"] == expected["ids"]
        assert said(answer) == pytest.approx(said(expected), abs=0.02)  # bfloat16
        assert (choices(answer) != choices(expected)).float().mean() < 0.05
    greedy = [each["spec_accept_length"] for each in speculative["greedy"]]
    assert sum(greedy) / len(greedy) > 1.5, "the draft does not read what it should"
    assert "spec_accept_length" not in plain["greedy"][0]

    tokens = 60 * 30
    for answer, read in zip(speculative["sampled"], found["read"], strict=True):
        assert said(answer) == pytest.approx(read, abs=0.06)  # bfloat16
    drafts, proposed = (
        sum(each[f"spec_num_{name}_drafts"] for each in speculative["sampled"]) for name in ("correct", "proposed")
    )
    assert 0.1 < drafts / proposed < 0.9, "hardly anything was refused, or accepted"
    # What is verified greedily is far likelier.
    likely = [sum(map(sum, map(said, each["sampled"]))) / tokens for each in (speculative, plain)]
    assert likely[0] == pytest.approx(likely[1], abs=0.2)
