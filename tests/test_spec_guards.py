"""What speculation is refused for, and warned of: every reason by itself, and none for what works."""

from __future__ import annotations

import ast
import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plugins import ArgumentError, PluginError
from miles_plugins.compat.slime_drafts import logs_each_loss
from miles_plugins.compat.source import reading_from
from miles_plugins.spec_rl import guards
from tests.conftest import SLIME
from tests.wheels import unpacked_commit, unpacked_wheel

OWN = ("model.layers.0.a", "mtp.fc.weight", "mtp.layers.0.a")
LATER = {"sglang_speculative_adaptive": False}  # flags of SGLang from 0.5.12
LAST = {**LATER, "sglang_speculative_use_rejection_sampling": False}  # from 0.5.15


def folder(path: Path, names: tuple[str, ...] = OWN, **config: Any) -> str:
    """A checkpoint of one layer, with a draft layer."""
    path.mkdir()
    shape = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "architectures": ["Qwen3NextForCausalLM"]}
    (path / "config.json").write_text(json.dumps({**shape, **config}))
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")})
    )
    return str(path)


@pytest.fixture
def good(tmp_path: Path) -> dict[str, Any]:
    """The flags of issue 8, as slime has parsed them, on SGLang 0.5.15."""
    model = folder(tmp_path / "model")
    return {
        **LAST,
        "hf_checkpoint": model,
        "sglang_speculative_algorithm": "EAGLE",
        "sglang_speculative_num_steps": 3,
        "sglang_speculative_eagle_topk": 1,
        "sglang_speculative_num_draft_tokens": 4,
        "sglang_speculative_accept_threshold_single": 1.0,
        "sglang_speculative_accept_threshold_acc": 1.0,
        "sglang_enable_draft_weights_cpu_backup": True,
        "sglang_speculative_draft_model_path": model,
        "sglang_max_running_requests": 256,
        "sglang_enable_deterministic_inference": False,
        "mtp_num_layers": 1,
        "enable_mtp_training": True,
        "mtp_loss_scaling_factor": 0.2,
        "freeze_params_name_list": None,
        "offload_rollout": True,
    }


def refused(arguments: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    try:
        guards.check(Namespace(**arguments), environment or {})
    except ArgumentError as error:
        return dict(error.facts)
    return {}


def test_the_flags_of_the_issue_are_taken_without_a_word(good: dict[str, Any]) -> None:
    assert refused(good) == {}
    assert guards.warnings(Namespace(**good)) == []


@pytest.mark.parametrize("arguments", [{}, {"enable_mtp_training": False}, {"debug_train_only": True}])
def test_a_run_without_speculation_is_none_of_its_business(arguments: dict[str, Any]) -> None:
    """--debug-train-only has no flags of SGLang at all."""
    threshold = {"sglang_speculative_accept_threshold_acc": 0.5} if arguments else {}
    assert refused({**arguments, **threshold}, {"SGLANG_ENABLE_SPEC_V2": "1"}) == {}
    assert guards.warnings(Namespace(**arguments)) == []


FROZEN = {"enable_mtp_training": False}
OVERLAPPED = {
    **FROZEN,
    "pipeline_model_parallel_size": 2,
    "untie_embeddings_and_output_weights": True,
    "overlap_grad_reduce": True,
}


@pytest.mark.parametrize("missing", ["pipeline_model_parallel_size", "untie_embeddings_and_output_weights", "overlap"])
def test_a_frozen_draft_needs_no_gradient_that_somebody_waits_for(good: dict[str, Any], missing: str) -> None:
    reason = refused({**good, **OVERLAPPED})["--mtp-num-layers"]
    assert "a copy of the embedding" in reason
    fewer = {name: value for name, value in OVERLAPPED.items() if not name.startswith(missing)}
    assert refused({**good, **fewer}) == {}


def test_a_draft_that_cannot_be_frozen_is_refused(good: dict[str, Any]) -> None:
    before = {name: value for name, value in good.items() if name != "freeze_params_name_list"}  # slime v0.2.2
    assert refused(before) == {}
    assert "v0.2.3" in refused({**before, **FROZEN})["--mtp-num-layers"]


@pytest.mark.parametrize(("logs", "trained", "taken"), [(True, True, True), (False, True, False), (False, False, True)])
def test_several_draft_layers_need_a_slime_that_logs_each(
    good: dict[str, Any], monkeypatch: pytest.MonkeyPatch, logs: bool, trained: bool, taken: bool
) -> None:
    monkeypatch.setattr(guards, "logs_each_loss", lambda: logs)
    model = folder(Path(good["hf_checkpoint"]).parent / "two", (*OWN, "mtp.layers.1.a"))
    several = {"mtp_num_layers": 2, "enable_mtp_training": trained, "sglang_speculative_draft_model_path": model}
    assert list(refused({**good, **several, "hf_checkpoint": model})) == ([] if taken else ["--mtp-num-layers"])


@pytest.mark.parametrize("known", [True, False, None])
def test_slime_must_know_what_megatron_calls_a_drafts_layer(
    good: dict[str, Any], monkeypatch: pytest.MonkeyPatch, known: bool | None
) -> None:
    monkeypatch.setattr(guards, "mtp_names_agree", lambda: known)
    assert list(refused(good)) == ([] if known is not False else ["--mtp-num-layers"])
    assert refused({**good, "mtp_num_layers": None, "enable_mtp_training": False}) == {}


def test_a_checkpoint_that_is_no_folder_does_not_tell_how_its_draft_is_trained(good: dict[str, Any]) -> None:
    hub = {"hf_checkpoint": "zai-org/GLM-4.5", "sglang_speculative_draft_model_path": None}
    assert "not its name on a hub" in refused({**good, **hub})["--hf-checkpoint"]
    assert refused({**good, **hub, **FROZEN, "mtp_num_layers": None}) == {}


@pytest.mark.parametrize(
    ("family", "mode", "exchanges", "reason"),
    [
        ("qwen3_next", "raw", True, None),
        ("qwen3_next", "raw", None, None),
        ("qwen3_next", "raw", False, "does not convert the input projection"),
        ("qwen3_next", "bridge", True, "own conversion only"),
        ("glm4_moe", "bridge", False, None),
    ],
)
def test_halves_that_somebody_may_not_exchange(
    good: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    mode: str,
    exchanges: bool | None,
    reason: str | None,
) -> None:
    monkeypatch.setattr(guards, "exchanges_halves", lambda: exchanges)
    model = folder(tmp_path / family, model_type=family)
    paths = {"hf_checkpoint": model, "sglang_speculative_draft_model_path": model, "megatron_to_hf_mode": mode}
    found = refused({**good, **paths})
    assert list(found) == (["--hf-checkpoint"] if reason else [])
    assert (reason or "") in str(found)


def test_a_critics_draft_gives_no_gradient_that_somebody_waits_for(good: dict[str, Any]) -> None:
    overlapped = {"use_critic": True, "overlap_grad_reduce": True}
    assert list(refused({**good, **overlapped})) == ["--use-critic"]
    assert refused({**good, **overlapped, "overlap_grad_reduce": False}) == {}
    assert refused({**good, **overlapped, "mtp_num_layers": None, "enable_mtp_training": False}) == {}


@pytest.mark.parametrize(
    ("changed", "cost"),
    [
        ({}, 3.0),
        ({"sglang_speculative_algorithm": "EAGLE3"}, 3.0),
        ({"sglang_speculative_algorithm": "STANDALONE"}, None),
        ({"sglang_speculative_algorithm": "NGRAM"}, None),
        ({"sglang_speculative_num_steps": None}, None),
        ({"sglang_speculative_adaptive": True}, None),
        ({"hf_checkpoint": "zai-org/GLM-4.5"}, None),
    ],
)
def test_what_a_draft_costs_is_told_of_one_layer_only(
    good: dict[str, Any], changed: dict[str, Any], cost: float | None
) -> None:
    assert guards.draft_cost(Namespace(**{**good, **changed})) == cost


@pytest.mark.upstream
@pytest.mark.parametrize(("release", "several"), [("v0.2.4", False), ("v0.3.1", False), ("624b824a8", True)])
def test_which_slimes_log_several_losses(release: str, several: bool) -> None:
    with reading_from(unpacked_commit((*SLIME[:2], release), "slime")):
        assert logs_each_loss() is several


@pytest.mark.parametrize(
    ("changed", "flag", "reason"),
    [
        ({"mtp_num_layers": None}, "--enable-mtp-training", "--mtp-num-layers"),
        ({"allgather_cp": True}, "--allgather-cp", "zigzag"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm", "without its draft"),
        ({"rollout_external": True}, "--rollout-external", "not told"),
        ({"sglang_speculative_algorithm": "EAGLE3"}, "--sglang-speculative-algorithm", "EAGLE3: its draft is not"),
        ({"sglang_speculative_algorithm": "STANDALONE"}, "--sglang-speculative-algorithm", "STANDALONE"),
        ({"sglang_speculative_algorithm": "NGRAM"}, "--sglang-speculative-algorithm", "NGRAM"),
        (
            {"sglang_speculative_accept_threshold_single": 0.9},
            "--sglang-speculative-accept-threshold-single",
            "another policy",
        ),
        (
            {"sglang_speculative_accept_threshold_acc": 0.99},
            "--sglang-speculative-accept-threshold-acc",
            "0.99",
        ),
        ({"sglang_enable_deterministic_inference": True}, "--sglang-enable-deterministic-inference", "seed"),
        ({"sglang_speculative_num_draft_tokens": 8}, guards.TOKENS, "give 4"),
        ({"sglang_speculative_num_draft_tokens": 3}, guards.TOKENS, "give 4"),
        ({"sglang_speculative_num_steps": None}, guards.STEPS, "only with it"),
        ({"sglang_speculative_eagle_topk": None}, guards.TOPK, "only with it"),
        ({"sglang_speculative_num_steps": 0}, guards.STEPS, "nothing is drafted"),
        ({"sglang_speculative_eagle_topk": 0}, guards.TOPK, "0"),
        (
            {"sglang_speculative_eagle_topk": 2, "sglang_speculative_num_draft_tokens": None},
            guards.TOKENS,
            "does not choose",
        ),
        (
            {"sglang_speculative_eagle_topk": 2, "sglang_speculative_num_draft_tokens": 12},
            guards.TOKENS,
            "2 to 11",
        ),
        ({"sglang_speculative_draft_model_path": None}, guards.PATH, "missing: for the model's own draft give"),
    ],
)
def test_each_reason_is_named_by_its_flag(
    good: dict[str, Any], changed: dict[str, Any], flag: str, reason: str
) -> None:
    found = refused({**good, **changed})
    assert list(found) == [flag], found
    assert reason in found[flag]


def test_all_reasons_are_named_at_once(good: dict[str, Any]) -> None:
    changed = {"allgather_cp": True, "sglang_enable_deterministic_inference": True}
    assert set(refused({**good, **changed})) == {"--allgather-cp", "--sglang-enable-deterministic-inference"}


@pytest.mark.parametrize("allowed", [{"allgather_cp": True}, {"mtp_num_layers": 1}, {"rollout_external": True}])
def test_a_frozen_draft_may_do_what_a_trained_one_may_not(good: dict[str, Any], allowed: dict[str, Any]) -> None:
    assert refused({**good, "enable_mtp_training": False, **allowed}) == {}


def test_routing_replay_is_allowed(good: dict[str, Any]) -> None:
    """The routers of a draft are exempt from it."""
    assert refused({**good, "use_rollout_routing_replay": True, "num_experts": 8}) == {}


# -- variables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "refusal"),
    [
        ({"SGLANG_RETURN_ORIGINAL_LOGPROB": "true"}, "log-probabilities would not be"),
        ({"SGLANG_RETURN_ORIGINAL_LOGPROB": "0"}, None),
        ({"SGLANG_SIMULATE_ACC_LEN": "2.5"}, "by lot"),
        ({"SGLANG_SIMULATE_ACC_LEN": "-1"}, None),
        ({"SGLANG_ENABLE_SPEC_V2": "1"}, None),
    ],
)
def test_variables_that_change_what_is_sampled(
    good: dict[str, Any], environment: dict[str, str], refusal: str | None
) -> None:
    found = refused(good, environment)
    assert list(found) == ([next(iter(environment))] if refusal else [])
    assert refusal is None or refusal in found[next(iter(environment))]


@pytest.mark.parametrize("value", ["1", "true", "True", "yes"])
@pytest.mark.parametrize(("release", "silent"), [({}, True), (LATER, False), (LAST, False)])
def test_spec_v2_is_refused_where_it_gives_no_log_probs(
    good: dict[str, Any], release: dict[str, Any], silent: bool, value: str
) -> None:
    arguments = {name: flag for name, flag in good.items() if name not in LAST}
    found = refused({**arguments, **release}, {"SGLANG_ENABLE_SPEC_V2": value})
    assert list(found) == (["SGLANG_ENABLE_SPEC_V2"] if silent else [])
    assert refused({**arguments, **release}, {"SGLANG_ENABLE_SPEC_V2": "0"}) == {}


def test_a_model_for_which_sglang_turns_spec_v2_on_by_itself(good: dict[str, Any], tmp_path: Path) -> None:
    model = folder(tmp_path / "mimo", architectures=["MiMoV2FlashForCausalLM"])
    paths = {"hf_checkpoint": model, "sglang_speculative_draft_model_path": model}
    old = {name: flag for name, flag in good.items() if name not in LAST}
    assert "turns it on for this model" in refused({**old, **paths})["SGLANG_ENABLE_SPEC_V2"]
    assert refused({**good, **paths}) == {}


def test_an_sglang_that_cannot_keep_a_draft_while_it_sleeps(good: dict[str, Any]) -> None:
    del good["sglang_enable_draft_weights_cpu_backup"]
    assert list(refused(good)) == ["--sglang-enable-draft-weights-cpu-backup"]
    assert refused({**good, "offload_rollout": False}) == {}


# -- the tree ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.integers(-1, 60) | st.none())
def test_a_tree_is_taken_if_it_can_be_drawn(steps: int, topk: int, tokens: int | None) -> None:
    """SGLang chooses tokens - 1 of the nodes that `steps` steps with `topk` candidates each have."""
    args = Namespace(
        sglang_speculative_algorithm="EAGLE",
        sglang_speculative_num_steps=steps,
        sglang_speculative_eagle_topk=topk,
        sglang_speculative_num_draft_tokens=tokens,
    )
    nodes = sum(topk if step == 0 else topk * topk for step in range(steps))
    fine = tokens in (None, steps + 1) if topk == 1 else tokens is not None and 1 <= tokens - 1 <= nodes
    found = {name: reason for name, reason in guards._tree(args).items() if reason}
    assert (found == {}) is fine, found


@pytest.mark.parametrize(
    ("backend", "page", "release", "fine"),
    [
        ("flashinfer", 64, {}, True),
        ("fa3", 64, LATER, True),
        ("triton", 64, LATER, False),
        ("triton", 64, LAST, True),
        ("triton", 1, {}, True),
        ("cutlass_mla", 64, LAST, False),
        (None, 64, {}, True),  # SGLang chooses
        ("trtllm_mha", 1, LAST, False),
    ],
)
def test_several_candidates_a_step_need_a_backend_that_can(
    good: dict[str, Any], backend: str | None, page: int, release: dict[str, Any], fine: bool
) -> None:
    base = {name: flag for name, flag in good.items() if name not in LAST}
    tree = {"sglang_speculative_eagle_topk": 4, "sglang_speculative_num_draft_tokens": 16}
    flags = {"sglang_attention_backend": backend, "sglang_page_size": page}
    assert list(refused({**base, **release, **tree, **flags})) == ([] if fine else [guards.TOPK])


def test_an_adaptive_tree_is_sglangs_business(good: dict[str, Any]) -> None:
    adaptive = {"sglang_speculative_adaptive": True, "sglang_speculative_eagle_topk": None}
    assert refused({**good, **adaptive}) == {}


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "names", "reason"),
    [
        ({"vocab_size": 33}, OWN, "33 tokens, and that of --hf-checkpoint 32"),
        ({"hidden_size": 16}, OWN, "hidden states of 16, and those of --hf-checkpoint have 8"),
        ({"architectures": ["LlamaForCausalLMEagle"]}, OWN, "LlamaForCausalLMEagle"),
        ({}, ("model.layers.0.a",), "no draft layer"),
        ({"num_hidden_layers": 1}, ("model.layers.0.a", "model.layers.1.eh_proj.weight"), None),
        ({}, ("model.layers.0.a", "model.mtp_layers.0.input_proj.weight"), None),
    ],
)
def test_a_draft_that_is_none_for_the_model(
    good: dict[str, Any], tmp_path: Path, config: dict[str, Any], names: tuple[str, ...], reason: str | None
) -> None:
    draft = folder(tmp_path / "draft", names, **config)
    found = refused({**good, "sglang_speculative_draft_model_path": draft})
    assert list(found) == ([guards.PATH] if reason else [])
    assert reason is None or reason in found[guards.PATH]


@pytest.mark.parametrize(
    ("algorithm", "config", "fine"),
    [
        ("EAGLE3", {"hidden_size": 8}, True),
        ("EAGLE3", {"hidden_size": 4}, False),
        ("EAGLE3", {"hidden_size": 4, "target_hidden_size": 8}, True),
        ("STANDALONE", {"hidden_size": 4}, True),
        ("STANDALONE", {"vocab_size": 4}, False),
        ("DFLASH", {"hidden_size": 8}, True),
    ],
)
def test_frozen_drafts_of_other_kinds(
    good: dict[str, Any], tmp_path: Path, algorithm: str, config: dict[str, Any], fine: bool
) -> None:
    draft = folder(tmp_path / "draft", ("layers.0.a",), architectures=["Other"], **config)
    changed = {"sglang_speculative_algorithm": algorithm, "sglang_speculative_draft_model_path": draft}
    assert list(refused({**good, "enable_mtp_training": False, **changed})) == ([] if fine else [guards.PATH])


def test_more_layers_than_the_checkpoint_has(good: dict[str, Any]) -> None:
    found = refused({**good, "mtp_num_layers": 2})
    assert "has 1 draft layer(s), and --mtp-num-layers is 2" in found[guards.PATH]


@pytest.mark.parametrize(("path", "fine"), [("lmsys/some-draft", True), ("/nowhere/draft", False), ("./draft", False)])
def test_a_path_must_be_there_unless_it_is_a_hubs(good: dict[str, Any], path: str, fine: bool) -> None:
    assert list(refused({**good, "sglang_speculative_draft_model_path": path})) == ([] if fine else [guards.PATH])


def test_a_model_whose_draft_sglang_finds_by_itself(good: dict[str, Any], tmp_path: Path) -> None:
    names = ("model.layers.0.a", "model.layers.1.eh_proj.weight")
    model = folder(tmp_path / "glm", names, architectures=["Glm4MoeForCausalLM"])
    without = {"hf_checkpoint": model, "sglang_speculative_draft_model_path": None}
    assert refused({**good, **without}) == {}
    model = folder(tmp_path / "pruned", names[:1], architectures=["Glm4MoeForCausalLM"])
    assert "no draft layer" in refused({**good, **without, "hf_checkpoint": model})[guards.PATH]


def test_a_vision_models_language_part_is_looked_at(good: dict[str, Any], tmp_path: Path) -> None:
    text = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1}
    model = folder(tmp_path / "vision", hidden_size=99, text_config=text)
    paths = {"hf_checkpoint": model, "sglang_speculative_draft_model_path": model}
    assert refused({**good, **paths}) == {}


def test_weights_that_we_cannot_read_are_left_to_sglang(good: dict[str, Any], tmp_path: Path) -> None:
    draft = folder(tmp_path / "draft")
    (Path(draft) / "model.safetensors.index.json").unlink()
    (Path(draft) / "pytorch_model.bin").write_bytes(b"")
    assert refused({**good, "sglang_speculative_draft_model_path": draft}) == {}


def test_one_file_without_an_index_is_read(good: dict[str, Any], tmp_path: Path) -> None:
    draft = Path(folder(tmp_path / "draft"))
    (draft / "model.safetensors.index.json").unlink()
    header = json.dumps({"model.layers.0.a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (draft / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "no draft layer" in refused({**good, "sglang_speculative_draft_model_path": str(draft)})[guards.PATH]


# -- warnings ----------------------------------------------------------------------------------------------------------


def test_the_number_of_requests_that_sglang_takes_is_told(good: dict[str, Any]) -> None:
    rollout = {
        "rollout_batch_size": 32,
        "n_samples_per_prompt": 8,
        "rollout_num_gpus": 8,
        "rollout_num_gpus_per_engine": 4,
        "sglang_server_concurrency": 512,
    }
    args = Namespace(**{**good, "sglang_max_running_requests": None, **rollout})
    (warning,) = guards.warnings(args)
    assert "at most 48 requests" in warning
    assert "up to 128" in warning
    assert "--sglang-max-running-requests 128" in warning
    args.sglang_server_concurrency = 64
    assert "up to 64" in guards.warnings(args)[0]
    args.rollout_batch_size = 2
    assert "this run sends" not in guards.warnings(args)[0]


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        ({"sglang_speculative_algorithm": None}, "no engine uses it"),
        ({"sglang_speculative_algorithm": None, "debug_train_only": True}, None),
        ({"enable_mtp_training": False, "mtp_num_layers": None}, "the draft is frozen"),
        ({"enable_mtp_training": False, "sglang_speculative_algorithm": None}, "without --enable-mtp-training"),
    ],
)
def test_what_works_otherwise_than_one_would_think(
    good: dict[str, Any], changed: dict[str, Any], warning: str | None
) -> None:
    found = guards.warnings(Namespace(**{**good, **changed}))
    assert len(found) == (1 if warning else 0)
    assert warning is None or warning in found[0]


# -- a server's own arguments ------------------------------------------------------------------------------------------


SERVER = {
    "speculative_algorithm": "EAGLE",
    "speculative_accept_threshold_single": 1.0,
    "speculative_accept_threshold_acc": 1.0,
    "enable_memory_saver": True,
    "enable_draft_weights_cpu_backup": True,
}


@pytest.mark.parametrize(
    ("changed", "told", "reason"),
    [
        ({}, None, "its draft"),
        ({"speculative_accept_threshold_acc": 0.5}, "trained", "speculative_accept_threshold_acc"),
        ({"enable_draft_weights_cpu_backup": False}, "frozen", "enable_draft_weights_cpu_backup"),
    ],
)
def test_a_server_whose_own_arguments_speak_against_it(changed: dict[str, Any], told: str | None, reason: str) -> None:
    with pytest.raises(PluginError) as caught:
        guards.check_server(Namespace(**{**SERVER, **changed}), told)
    assert list(caught.value.facts) == [reason]


def test_a_server_says_what_it_does_with_its_draft() -> None:
    assert guards.check_server(Namespace(**SERVER), "trained") == "EAGLE, the draft is trained"
    assert guards.check_server(Namespace(speculative_algorithm=None), None) is None
    awake = {**SERVER, "enable_memory_saver": False, "enable_draft_weights_cpu_backup": False}
    assert guards.check_server(Namespace(**awake), "frozen") is not None
    ngram = {**SERVER, "speculative_algorithm": "NGRAM", "enable_draft_weights_cpu_backup": False}
    assert guards.check_server(Namespace(**ngram), "frozen") == "NGRAM, the draft is frozen"


# -- what SGLang's source says -----------------------------------------------------------------------------------------

HANDLERS = {  # release -> the file in which it decides
    "0.5.9": "server_args.py",
    "0.5.12.post1": "server_args.py",
    "0.5.15.post1": "arg_groups/speculative_hook.py",
    "0.5.23": "arg_groups/speculative_hook.py",
}


@pytest.mark.upstream
@pytest.mark.parametrize("release", HANDLERS)
def test_the_source_of_each_release_says_so_too(release: str) -> None:
    """The numbers, lists and flags that guards takes from it, as they stand there."""
    root = unpacked_wheel("sglang", release) / "sglang" / "srt"
    text = (root / HANDLERS[release]).read_text()
    assert f"reset to {guards.RUNNING} for speculative decoding" in text
    assert "adjusted to speculative_num_steps + 1 when speculative_eagle_topk == 1" in text
    lists = [
        {item.value for item in node.elts if isinstance(item, ast.Constant)}
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.List)
    ]
    finding = [names for names in lists if {"DeepseekV3ForCausalLM", "PixtralForConditionalGeneration"} <= names]
    known = set(guards.FIND_THEMSELVES)
    assert any(known - {"DeepseekV4ForCausalLM", "HYV3ForCausalLM"} <= names for names in finding)
    later = known - {"DeepseekV4ForCausalLM"} if release == "0.5.12.post1" else known
    assert release == "0.5.9" or any(later <= names for names in finding)
    fields = (root / "server_args.py").read_text()
    if release != "0.5.23":  # whose flags are elsewhere; slime has no stack with it
        assert ("speculative_adaptive" in fields) is ("sglang_speculative_adaptive" in FLAGS[release])
        rejection = "sglang_speculative_use_rejection_sampling"
        assert (rejection.removeprefix("sglang_") in fields) is (rejection in FLAGS[release])
        assert "enable_draft_weights_cpu_backup" in fields


FLAGS: dict[str, dict[str, Any]] = {"0.5.9": {}, "0.5.12.post1": LATER, "0.5.15.post1": LAST}


@pytest.mark.upstream
@pytest.mark.parametrize(("release", "without"), [("0.5.9", True), ("0.5.12.post1", False), ("0.5.15.post1", False)])
def test_spec_v2_has_log_probs_from_0_5_12_on(release: str, without: bool) -> None:
    worker = unpacked_wheel("sglang", release) / "sglang" / "srt" / "speculative" / "eagle_worker_v2.py"
    assert ("compute_spec_v2_logprobs" not in worker.read_text()) is without
