"""The log-probabilities that slime's training pass computes, and the discrepancy made of them, on every release.

Each slime runs with its Megatron in two processes of its own, as two data-parallel and as two context-parallel ranks:
this file as a script. The tests only read what it reports. What there is no need of here is a model: logits are drawn.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import subprocess
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from miles_plugins import hookimpl
from miles_plugins.discrepancy import Discrepancy, Result, reduced, response_part
from miles_plugins.manager import Installed, Plugin, Plugins
from miles_plugins.patches.seam import patch_set
from miles_plugins.patches.slime import losses

ROOT = Path(__file__).resolve().parents[1]
OLD = "3714d81d418c9f1bca4594fc35f9e8289f652862"
NEW = "1dcf0dafa884ad52ffb243625717a3471643e087"
MAIN = "624b824a898ab0ec1fcb4d373004c7f3852bf515"
RELEASES = {"v0.2.2": OLD, "v0.2.3": OLD, "v0.2.4": OLD, "v0.3.0": NEW, "v0.3.1": NEW, MAIN: NEW}
RANKS = 2

CHECKS: dict[str, Callable[[], None]] = {}
run = SimpleNamespace()  # what the script knows: its rank, slime's modules, what the hook was given


# -- the wrappers alone ----------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    return listening(monkeypatch.setattr)


def listening(setattr: Callable[[Any, str, Any], None]) -> list[tuple[Any, Any, Any]]:
    """What a plugin with the hook is given from here on."""
    told: list[tuple[Any, Any, Any]] = []
    module = ModuleType("listening")
    hook = hookimpl(lambda args, batch, log_probs: told.append((args, batch, log_probs)))
    vars(module).update(__file__="", training_log_probs=hook)
    chosen = Plugins([Plugin(Installed("listening", "some-plugins", "1.0", None), module)])
    setattr(losses, "current", lambda: SimpleNamespace(hook=chosen.hook, plugins=chosen))
    return told


@pytest.mark.parametrize("as_tuple", [True, False], ids=["v0.2.3 and later", "v0.2.2"])
def test_the_first_log_probs_in_a_loss_are_handed_over_and_returned_as_they_are(told: Any, as_tuple: bool) -> None:
    torch = pytest.importorskip("torch")
    log_probs = [torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)]
    returned = {"log_probs": log_probs, "entropy": []}
    made = (torch.empty(0), returned) if as_tuple else returned

    def loss(args: Any, batch: Any, num_microbatches: int, *, logits: Any) -> Any:
        assert (num_microbatches, logits) == (3, "logits")
        found = losses.get_log_probs_and_entropy(lambda *args, **kwargs: made, logits, args=args)
        assert found is made
        assert losses.get_log_probs_and_entropy(lambda *args, **kwargs: made, logits, args=args) is made, "again"
        return "loss"

    assert losses.loss_function(loss, "args", {"tokens": 1}, 3, logits="logits") == "loss"
    ((args, batch, given),) = told
    assert (args, batch) == ("args", {"tokens": 1})
    assert [each.tolist() for each in given] == [[-1.0, -2.0], [-3.0]]
    assert not any(each.requires_grad for each in given)
    assert all(each.requires_grad for each in log_probs)


def test_outside_of_a_loss_nothing_is_handed_over_also_after_one_that_raised(told: Any) -> None:
    def loss(*args: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        losses.loss_function(loss, "args", {}, 1, "logits")
    assert losses.get_log_probs_and_entropy(lambda: {"log_probs": [None]}) == {"log_probs": [None]}
    assert not told


# -- every release ---------------------------------------------------------------------------------------------------


def check(function: Callable[[], None]) -> Callable[[], None]:
    """They run in this order, on every rank."""
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


VOCABULARY, TEMPERATURE = 13, 0.7
RESPONSES = (5, 1, 8, 3, 6, 2, 9, 4)  # tokens of each sample's response; its prompt has one more than its index % 3
TERMS = ("plain", "rejecting")


def make_samples(wrong: float = 0.1, masked: float = math.nan) -> list[dict[str, Any]]:
    """Samples with logits, of which the rollout was `wrong` by about that much, and anything where it is masked."""
    import torch

    draw = torch.Generator().manual_seed(5)
    samples = []
    for index, response in enumerate(RESPONSES):
        total = response + index % 3 + 1
        logits = torch.randn(total, VOCABULARY, generator=draw)
        tokens = torch.randint(1, VOCABULARY, (total,), generator=draw)
        mask = (torch.rand(response, generator=draw) > 0.3).int()
        mask[0] = 1
        row = torch.arange(total - response - 1, total - 1)
        train = (logits[row] / TEMPERATURE).log_softmax(-1).gather(1, tokens[row + 1, None])[:, 0]
        rollout = train + wrong * torch.randn(response, generator=draw)
        rollout = torch.where(mask == 1, rollout, masked)
        samples.append({"index": index, "tokens": tokens, "logits": logits, "mask": mask, "train": train})
        samples[-1] |= {"rollout": rollout, "advantages": torch.randn(response, generator=draw)}
    return samples


def directly(samples: Sequence[dict[str, Any]]) -> Result:
    """The discrepancy of all samples, token by token, without slime."""
    whole = Discrepancy()
    for sample in samples:
        tokens = sample["tokens"][-len(sample["mask"]) :]
        whole.add(sample["train"], sample["rollout"], sample["mask"], sample=sample["index"], tokens=tokens)
    return whole.result()


def arguments(**changed: Any) -> Namespace:
    """What slime's losses ask for, on any release."""
    given = {
        "context_parallel_size": run.context_parallel,
        "allgather_cp": False,
        "qkv_format": "thd",
        "rollout_temperature": TEMPERATURE,
        "rollout_top_p": 1.0,
        "log_probs_chunk_size": -1,
        "loss_type": "policy_loss",
        "advantage_estimator": "grpo",
        "use_rollout_logprobs": False,
        "use_tis": False,
        "get_mismatch_metrics": False,
        "custom_tis_function_path": None,
        "custom_pg_loss_reducer_function_path": None,
        "use_opsm": False,
        "use_kl_loss": False,
        "entropy_coef": 0.01,
        "eps_clip": 0.2,
        "eps_clip_high": 0.3,
        "eps_clip_c": None,
        "value_clip": 0.2,
        "calculate_per_token_loss": False,
        "recompute_loss_function": False,
        "global_batch_size": len(RESPONSES),
    }
    return Namespace(**{**given, **changed})


def rejecting(*, pg_loss: Any, rollout_log_probs: Any, train_log_probs: Any, loss_masks: Any, **more: Any) -> Any:
    """As slime's --custom-tis-function-path: what is wrong by more than 0.1 is rejected."""
    import torch

    pairs = list(zip(train_log_probs, rollout_log_probs, strict=True))
    wrong = torch.cat([(train - rollout).abs() for train, rollout in pairs])
    masks = loss_masks
    if run.context_parallel == 1:
        masks = [mask * (train - rollout).abs().le(0.1) for mask, (train, rollout) in zip(masks, pairs, strict=True)]
    return pg_loss * (wrong <= 0.1), masks, {}


def batch_of(args: Namespace, samples: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Any]:
    """slime's microbatch, and the model's logits, as they are on this rank."""
    import torch

    def cut(name: str) -> list[Any]:
        return [run.cp.slice_log_prob_with_cp(each[name], len(each["tokens"]), len(each[name])) for each in samples]

    batch = {
        "unconcat_tokens": [each["tokens"] for each in samples],
        "total_lengths": [len(each["tokens"]) for each in samples],
        "response_lengths": [len(each["mask"]) for each in samples],
        "loss_masks": [each["mask"] for each in samples],
        "sample_indices": [each["index"] for each in samples],
        "log_probs": cut("train"),
        "rollout_log_probs": cut("rollout"),
        "advantages": cut("advantages"),
    }
    batch |= {"values": batch["log_probs"], "returns": batch["advantages"]}
    sums = [each["mask"].sum().float() for each in samples]
    batch |= {"rollout_mask_sums": sums, "group_mask_sums": sums} if run.has_sums else {}
    if args.allgather_cp:
        whole = torch.cat([each["logits"] for each in samples])
        whole = torch.nn.functional.pad(whole, (0, 0, 0, -len(whole) % (4 * run.context_parallel)))
        logits = whole.chunk(run.context_parallel)[run.rank]
    else:
        logits = torch.cat([run.cp.slice_with_cp(each["logits"], 0.0) for each in samples])
        logits = torch.nn.functional.pad(logits, (0, 0, 0, -len(logits) % 4))
    return batch, logits[None].clone().requires_grad_()


def trained(args: Namespace, samples: Sequence[dict[str, Any]], size: int) -> list[Any]:
    """slime's loss of every microbatch of `size` samples of this rank, with its gradient: all that it computes."""
    found = []
    own = samples if run.context_parallel > 1 else samples[run.rank :: RANKS]
    for at in range(0, len(own), size):
        batch, logits = batch_of(args, own[at : at + size])
        scale = (
            [len(RESPONSES)] if "step_global_batch_size" in inspect.signature(run.loss.loss_function).parameters else []
        )
        loss, tokens, log = run.loss.loss_function(args, batch, 1, *scale, logits)
        loss.backward()
        found += [
            loss.detach(),
            tokens,
            log["values"],
            logits.grad,
            dict(zip(log["keys"], log["values"][1:].tolist(), strict=True)),
        ]
    return found


def measured(args: Namespace, samples: Sequence[dict[str, Any]], size: int = 2) -> Result:
    """The discrepancy of a step, of all ranks."""
    run.told.clear()
    trained(args, samples, size)
    found = Discrepancy()
    for _, batch, log_probs in run.told:
        assert found.add_microbatch(args, batch, log_probs)
    return reduced(found, run.group).result()


def alike(found: Result, expected: Result, worst: bool = True) -> None:
    """Up to the rounding of slime's float32 log-softmax, and of sums in another order."""
    assert (found.tokens, found.nonfinite) == (expected.tokens, expected.nonfinite)
    for name in ("mean", "sample_mean", "k1", "k3", "p50", "p99", "p999", "maximum"):
        got, want = getattr(found, name), getattr(expected, name)
        assert math.isclose(got, want, rel_tol=0.04 if name.startswith("p") else 1e-4, abs_tol=1e-6), (name, got, want)


def settings() -> Iterator[Namespace]:
    for use_rollout_logprobs in (False, True):
        for terms in TERMS:
            for recompute in (False, True):
                rejected = {"use_tis": True, "custom_tis_function_path": f"{__name__}.rejecting"}
                yield arguments(
                    use_rollout_logprobs=use_rollout_logprobs,
                    recompute_loss_function=recompute,
                    **(rejected if terms == "rejecting" else {}),
                )


@check
def it_is_measured_with_rollout_log_probs_in_the_loss_or_not_whatever_is_rejected_or_recomputed() -> None:
    samples = make_samples(masked=-1.0)
    expected = directly(samples)
    assert expected.mean > 0.05
    for args in settings():
        alike(measured(args, samples), expected)
        assert len(run.told) == len(samples) / (2 if run.context_parallel > 1 else 2 * RANKS), "not once a microbatch"


@check
def slimes_own_metric_is_wrong_where_it_is_said_to_be() -> None:
    """0 under --use-rollout-logprobs before v0.3.1, and smaller for what was rejected on every release."""
    import torch

    samples = make_samples(masked=-1.0)

    def own(args: Namespace) -> float:
        name = "train_rollout_logprob_abs_diff"
        total = torch.tensor(sum(each[name] for each in trained(args, samples, 2)[4::5]))
        torch.distributed.all_reduce(total, group=run.group)
        return float(total) / len(samples)

    honest = measured(arguments(), samples).sample_mean
    assert math.isclose(own(arguments()), honest, rel_tol=1e-4), (own(arguments()), honest)
    found = own(arguments(use_rollout_logprobs=True))
    assert math.isclose(found, honest, rel_tol=1e-4) if run.fixed else found == 0, (found, honest)
    if run.context_parallel == 1:
        args = arguments(use_tis=True, custom_tis_function_path=f"{__name__}.rejecting")
        assert own(args) < 0.7 * honest, (own(args), honest)


@check
def masked_nan_does_not_matter_and_other_nan_is_counted() -> None:
    samples = make_samples()
    args = arguments()
    alike(measured(args, samples), directly(make_samples(masked=-1.0)))
    samples[2]["rollout"][0] = math.nan
    samples[6]["rollout"][0] = -math.inf
    found = measured(args, samples)
    assert found.nonfinite == 2
    alike(found, directly(samples))


@check
def it_does_not_depend_on_how_samples_are_packed() -> None:
    samples = make_samples()
    args = arguments()
    each = [measured(args, samples, size) for size in (1, 3, 8)]
    again = measured(args, samples[::-1], 3)
    for found in (*each, again):
        alike(found, directly(samples))


@check
def all_gathered_context_parallelism_gives_the_same() -> None:
    if "allgather_cp" not in inspect.getsource(run.loss) or run.context_parallel == 1:
        return
    samples = make_samples()
    for use_rollout_logprobs in (False, True):
        args = arguments(allgather_cp=True, use_rollout_logprobs=use_rollout_logprobs)
        alike(measured(args, samples), directly(samples))


@check
def the_worst_tokens_are_named() -> None:
    samples = make_samples()
    samples[3]["rollout"][0] -= 5
    token = int(samples[3]["tokens"][-3])
    run.told.clear()
    trained(arguments(), samples, 2)
    found = Discrepancy(worst=1)
    for args, batch, log_probs in run.told:
        found.add_microbatch(args, batch, log_probs)
    (worst,) = found.result().worst
    here = worst.sample == 3
    if here:
        assert (worst.position, worst.token) == (0, token)
        assert math.isclose(worst.difference, 5, abs_tol=0.5)
    import torch

    count = torch.tensor(int(here))
    torch.distributed.all_reduce(count, group=run.group)
    assert int(count) == 1, f"{int(count)} ranks have it"


@check
def which_tokens_a_context_parallel_rank_has_is_what_slime_cuts() -> None:
    import torch

    for size in (1, 2, 3, 4):
        for total in range(2, 20):
            for response in range(1, total):
                held = []
                for rank in range(size):
                    with (
                        mock.patch.object(run.mpu, "get_context_parallel_world_size", return_value=size),
                        mock.patch.object(run.mpu, "get_context_parallel_rank", return_value=rank),
                    ):
                        cut = run.cp.slice_log_prob_with_cp(torch.arange(response), total, response)
                    parts = response_part(total, response, total, size, rank)
                    assert cut.tolist() == [place for part in parts for place in part], (size, rank, total, response)
                    held += cut.tolist()
                assert sorted(held) == list(range(response))
    if "qkv_format" in inspect.signature(run.cp.slice_log_prob_with_cp).parameters:
        with (
            mock.patch.object(run.mpu, "get_context_parallel_world_size", return_value=2),
            mock.patch.object(run.mpu, "get_context_parallel_rank", return_value=1),
        ):
            for padded in (9, 16, 31):
                cut = run.cp.slice_log_prob_with_cp(torch.arange(6), 9, 6, "bshd", padded)
                assert cut.tolist() == [place for part in response_part(9, 6, padded, 2, 1) for place in part]


@check
def other_passes_and_other_losses_hand_over_nothing() -> None:
    samples = make_samples(masked=-1.0)
    args = arguments(loss_type="value_loss")
    run.told.clear()
    batch, logits = batch_of(args, samples[:2])
    scale = [2] if "step_global_batch_size" in inspect.signature(run.loss.loss_function).parameters else []
    run.loss.loss_function(args, batch, 1, *scale, logits[..., :1])
    names = ("unconcat_tokens", "total_lengths", "response_lengths")
    run.loss.get_log_probs_and_entropy(logits, args=args, **{name: batch[name] for name in names})
    assert not run.told
    args.loss_type = "sft_loss"
    run.loss.loss_function(args, batch, 1, *scale, logits)
    assert len(run.told) == 1


@check
def slime_computes_bit_for_bit_what_it_computes_without_us() -> None:
    import torch

    samples = make_samples()
    for args in settings():
        with_us = trained(args, samples, 2)
        run.patches.undo()
        without = trained(args, samples, 2)
        run.patches.arm()
        assert run.model.loss_function is run.loss.loss_function
        assert len(with_us) == len(without) > 0
        for one, other in zip(with_us, without, strict=True):
            if isinstance(one, dict):
                assert list(one) == list(other)
            else:
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@contextmanager
def parallel(context: int) -> Iterator[None]:
    """The two ranks share samples, or the tokens of each."""
    from megatron.core import mpu

    run.context_parallel = context
    mpu.initialize_model_parallel(context_parallel_size=context)
    run.group = mpu.get_data_parallel_group(with_context_parallel=True)
    try:
        yield
    finally:
        mpu.destroy_model_parallel()


def main() -> None:
    folder, run.rank, run.fixed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "fixed"
    sys.modules["test_losses"] = sys.modules["__main__"]  # for slime's load_function
    globals()["__name__"] = "test_losses"
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=run.rank, world_size=RANKS
    )
    run.told = listening(setattr)
    run.patches = patch_set(losses.SEAMS)
    run.patches.arm()
    from megatron.core import mpu

    package = "slime.backends.megatron_utils"
    run.mpu = mpu
    run.loss, run.cp, run.model = (
        importlib.import_module(f"{package}.{name}") for name in ("loss", "cp_utils", "model")
    )
    run.has_sums = "step_global_batch_size" in inspect.signature(run.loss.loss_function).parameters
    found: dict[str, str] = {"states": ", ".join(record.state.value for record in run.patches.records())}
    for context in (1, RANKS):
        with parallel(context):
            for name, function in CHECKS.items():
                try:
                    function()
                    found.setdefault(name, "")
                except Exception:
                    found[name] = f"context parallel {context}, rank {run.rank}:\n{traceback.format_exc()}"
    print(json.dumps(found))


@pytest.fixture(scope="module", params=list(RELEASES), ids=lambda release: "main" if release == MAIN else release)
def reported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What is wrong on one release, by rank."""
    for needed in ("ray", "transformers"):
        pytest.importorskip(needed)
    from tests.wheels import unpacked_commit

    slime = unpacked_commit(("SLIME_HOME", "~/slime", request.param), "slime")
    megatron = unpacked_commit(("MEGATRON_HOME", "~/Megatron-LM", RELEASES[request.param]), "megatron")
    folder = tmp_path_factory.mktemp("losses")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MILES_PLUGINS")},
        "PYTHONPATH": os.pathsep.join(map(str, (slime, megatron, ROOT))),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    fixed = "fixed" if request.param in ("v0.3.1", MAIN) else "zero"
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), str(folder)]
    started = [
        subprocess.Popen(
            [*command, str(rank), fixed], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    done = [each.communicate(timeout=240) for each in started]
    for process, (output, errors) in zip(started, done, strict=True):
        assert process.returncode == 0, output[-2000:] + errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in done]


@pytest.mark.upstream
def test_the_patches_are_verified(reported: list[dict[str, str]]) -> None:
    assert [each["states"] for each in reported] == ["verified, verified"] * RANKS


@pytest.mark.upstream
@pytest.mark.parametrize("name", list(CHECKS))
def test_a_release(reported: list[dict[str, str]], name: str) -> None:
    for of_rank in reported:
        assert not of_rank[name], of_rank[name]


if __name__ == "__main__":
    main()
