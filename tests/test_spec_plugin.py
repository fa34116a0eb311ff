"""`--plugins spec`: what the plugin does at each hook; its parts have tests of their own."""

from __future__ import annotations

import json
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from miles_plugins import ArgumentError, Microbatch, PluginError  # noqa: E402
from miles_plugins.patches.sglang.draft import DRAFT  # noqa: E402
from miles_plugins.spec_rl import accept, draft_weights, guards, plugin  # noqa: E402

STATE = ("_args", "_stage", "_loaded", "_server")
CURRENT = {"completion_tokens": 8, "spec_verify_ct": 4, "spec_num_correct_drafts": 4, "spec_num_proposed_drafts": 12}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    before = {name: getattr(plugin, name) for name in STATE}
    yield
    for name, value in before.items():
        setattr(plugin, name, value)
    plugin._tally, plugin._decay = accept.Tally(), accept.Decay()


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    """Of a trainer without speculation at the engines."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm4_moe", "num_hidden_layers": 6}))
    return Namespace(
        hf_checkpoint=str(tmp_path),
        mtp_num_layers=1,
        enable_mtp_training=True,
        freeze_params_name_list=None,
        spec_compat="correct",
        context_parallel_size=1,
    )


class Counted(SimpleNamespace):
    """In place of slime's Sample, which can be referred to weakly too."""


class Model(torch.nn.Module):  # type: ignore[misc]
    """In place of a GPTModel: some policy, and some draft."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Linear(4, 4)
        self.mtp = torch.nn.ModuleDict({"eh_proj": torch.nn.Linear(4, 4)})


def load(model: Model, *, draft: bool = True) -> None:
    with torch.no_grad():
        model.decoder.weight.add_(1)
        if draft:
            model.mtp["eh_proj"].weight.add_(1)


def test_a_rehearsal_has_a_draft_to_train_and_to_serve(tmp_path: Path) -> None:
    assert plugin.tiny_model_shape() == {"draft_layers": 1}
    flags = plugin.rehearsal_flags(tmp_path)
    assert flags[flags.index(guards.PATH) + 1] == str(tmp_path)
    assert "--enable-mtp-training" in flags


def test_its_flag_has_the_conventions_of_the_loss() -> None:
    parser = ArgumentParser()
    plugin.register_arguments(parser)
    assert parser.parse_args([]).spec_compat == "correct"
    assert parser.parse_args(["--spec-compat", "docker"]).spec_compat == "docker"


@pytest.mark.parametrize("before", [None, ["vision"]])
def test_a_draft_that_is_not_trained_is_frozen_by_slimes_own_list(
    args: Namespace, caplog: pytest.LogCaptureFixture, before: list[str] | None
) -> None:
    args.freeze_params_name_list = before
    plugin.configure(args)
    assert args.freeze_params_name_list == before
    args.enable_mtp_training = False
    with caplog.at_level(logging.WARNING):
        plugin.configure(args)
    assert args.freeze_params_name_list == [*(before or []), draft_weights.FROZEN]
    assert "stays as it is" in caplog.text


def test_what_the_guards_refuse_is_refused(args: Namespace) -> None:
    args.mtp_num_layers = None
    with pytest.raises(ArgumentError, match="spec_rl cannot work"):
        plugin.configure(args)


@pytest.mark.parametrize(("compat", "apart"), [("correct", True), ("docker", False)])
def test_the_drafts_gradients_are_clipped_apart(args: Namespace, compat: str, apart: bool) -> None:
    args.spec_compat = compat
    model = Model()
    plugin.model_built(args, [model], "actor")
    grouped = {name for name, each in model.named_parameters() if hasattr(each, draft_weights.GROUP)}
    assert grouped == ({"mtp.eh_proj.weight", "mtp.eh_proj.bias"} if apart else set())


@pytest.mark.parametrize(("layers", "role"), [(None, "actor"), (1, "critic")])
def test_other_models_are_left_alone(args: Namespace, layers: int | None, role: str) -> None:
    args.mtp_num_layers = layers
    model = Model()
    plugin.model_built(args, [model], role)
    plugin.pass_begins("train", [model])
    assert not any(hasattr(each, draft_weights.GROUP) for each in model.parameters())
    assert plugin.draft_targets(model, Microbatch({}, torch.arange(0))) is None
    assert plugin.probe("trainer") == "no draft in this trainer"
    assert args.enable_mtp_training is (role == "actor")  # slime would look for the loss of a critic's draft


def test_a_draft_that_was_not_loaded_ends_the_run_at_the_first_pass(args: Namespace) -> None:
    model = Model()
    plugin.model_built(args, [model], "actor")
    load(model, draft=False)
    with pytest.raises(PluginError, match="no weights for the draft"):
        plugin.pass_begins("log_prob", [model])


def test_the_draft_learns_in_train_passes_of_the_actor_only(args: Namespace) -> None:
    tokens = [torch.tensor([5, 6, 7, 8, 9])]
    batch = {"unconcat_tokens": tokens, "response_lengths": [3], "loss_masks": [torch.ones(3)]}
    model, microbatch = Model(), Microbatch(batch, torch.arange(5))
    plugin.model_built(args, [model], "actor")
    load(model)
    found = {}
    for stage in ("ref_log_prob", "log_prob", "train"):
        plugin.pass_begins(stage, [model])
        found[stage] = plugin.draft_targets(model, microbatch)
        plugin.pass_ends()
    assert plugin.draft_targets(model, microbatch) is None
    assert found["ref_log_prob"] is None
    assert found["log_prob"] is None
    learnt = found["train"]
    assert learnt is not None
    assert learnt.labels[0][learnt.masks[0]].tolist() == [7, 8, 9]  # the response; stood at two tokens before each
    assert int(learnt.counts[0]) == 3
    assert plugin.probe("trainer") == "the draft learns apart from the policy"
    args.enable_mtp_training = False
    plugin.pass_begins("train", [model])
    assert plugin.draft_targets(model, microbatch) is None
    assert plugin.probe("trainer") == "the draft is frozen"


def test_every_microbatch_has_what_the_draft_learns_from() -> None:
    assert set(plugin.microbatch_keys()) == {"response_lengths", "loss_masks"}


@pytest.mark.parametrize(("family", "trained"), [("qwen3_next", True), ("qwen3_next", False), ("glm4_moe", True)])
def test_projections_whose_halves_slime_exchanges_are_fed_so(args: Namespace, family: str, trained: bool) -> None:
    (Path(args.hf_checkpoint) / "config.json").write_text(json.dumps({"model_type": family}))
    args.enable_mtp_training = trained
    model = Model()
    plugin.model_built(args, [model], "actor")
    x, projection = torch.randn(1, 4), model.mtp["eh_proj"]
    fed = torch.cat([x[:, 2:], x[:, :2]], dim=-1) if family == "qwen3_next" and trained else x
    assert torch.equal(projection(x), torch.nn.functional.linear(fed, projection.weight, projection.bias))


def test_a_server_must_have_been_told_of_its_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SimpleNamespace(speculative_algorithm="EAGLE", enable_draft_weights_cpu_backup=True)
    monkeypatch.delenv(DRAFT, raising=False)
    with pytest.raises(PluginError, match="cannot speculate"):
        plugin.engine_model_built(server)
    monkeypatch.setenv(DRAFT, "trained")
    plugin.engine_model_built(server)
    assert plugin.probe("sglang_scheduler") == "EAGLE, the draft is trained"
    plugin.engine_model_built(SimpleNamespace(speculative_algorithm=None))
    assert plugin.probe("sglang_scheduler") == "this engine does not speculate"


def test_acceptance_is_counted_and_its_decay_is_told_of(args: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    sample = Counted(spec_info=SimpleNamespace(spec_verify_ct=4, spec_accept_rate=4 / 12, spec_accept_length=2.0))
    silent = Counted(spec_info=SimpleNamespace(spec_verify_ct=0))
    assert plugin.rollout_metrics(args, [silent]) == {}
    args.sglang_speculative_algorithm = "EAGLE"
    plugin.receive_response(sample, {**CURRENT, "weight_version": "3"})
    found = plugin.rollout_metrics(args, [sample])
    assert found["spec/accept_length"] == 2.0
    assert found["spec/accept_rate"] == found["spec_accept_rate"] == 4 / 12
    assert "spec/estimated_speed_up" not in found  # SGLang chooses how many steps a draft takes
    args.sglang_speculative_num_steps = 3
    assert plugin.rollout_metrics(args, [sample])["spec/estimated_speed_up"] == pytest.approx(2.0 / 1.5)
    assert plugin.probe("rollout_manager") == "what engines accept is counted"
    worse = Counted(spec_info=sample.spec_info)
    plugin.receive_response(worse, {**CURRENT, "spec_verify_ct": 8})
    with caplog.at_level(logging.WARNING):
        for each in [sample] * 5 + [worse] * 5:
            plugin.rollout_metrics(args, [each])
    assert "the accept length has fallen" in caplog.text
    assert "train it" not in caplog.text  # it is trained


def test_slime_is_given_the_counts_by_its_own_names() -> None:
    assert plugin.speculation_counts(CURRENT)["spec_accept_token_num"] == 4
