"""A draft is trained beside the policy on every Megatron that slime runs on, and the policy does not notice.

Each Megatron runs in a process of its own, and in two of them for what ranks share: this file as a script, with that
Megatron in front of sys.path. The tests only read what it reports.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.wheels import unpacked_commit, unpacked_wheel

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 900  # a busy machine

# -- which Megatrons -------------------------------------------------------------------------------------------------


def wheel(version: str) -> Callable[[], Path]:
    return lambda: unpacked_wheel("megatron-core", version)


def commit(name: str) -> Callable[[], Path]:
    return lambda: unpacked_commit(("MEGATRON_HOME", "~/Megatron-LM", name), "megatron")


VERSIONS: dict[str, Callable[[], Path]] = {
    "0.14.0": wheel("0.14.0"),
    "0.15.3": wheel("0.15.3"),
    "0.16.1": wheel("0.16.1"),
    "3714d81d": commit("3714d81d418c9f1bca4594fc35f9e8289f652862"),  # slime v0.2.2 to v0.2.4
    "1dcf0dafa": commit("1dcf0dafa884ad52ffb243625717a3471643e087"),  # slime v0.3.0 and later
    "main": commit("d98e8a64ddf34856e74b24714e3bedb2f5a39553"),  # of 2026-08
}
NEEDS_CLONE = ("3714d81d", "1dcf0dafa", "main")


def of_slimes_image(stock: str, patch: str) -> Callable[[Path], Path]:
    """As slime's Dockerfile patches it, as far as the draft is concerned; the patches come from the user's checkout."""

    def folder(scratch: Path) -> Path:
        slime = unpacked_commit(("SLIME_HOME", "~/slime", "v0.3.1"), "slime", "docker/patch")
        copied = scratch / "image"
        shutil.copytree(
            VERSIONS[stock]() / "megatron", copied / "megatron", ignore=shutil.ignore_patterns("__pycache__")
        )
        files = (
            "models/gpt/gpt_model",
            "models/common/language_module/language_module",
            "transformer/multi_token_prediction",
        )
        command = [
            *("git", "apply", *(f"--include=megatron/core/{file}.py" for file in files)),
            str(slime / "docker" / "patch" / patch / "megatron.patch"),
        ]
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(scratch)}  # the folder belongs to no repository
        done = subprocess.run(command, cwd=copied, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return copied

    return folder


IMAGES = {
    "3714d81d of slime's image": of_slimes_image("3714d81d", "v0.5.9"),
    "1dcf0dafa of slime's image": of_slimes_image("1dcf0dafa", "v0.5.15.post1"),
}


def report(version: str, scratch: Path, ranks: int = 1) -> dict[str, Any]:
    """What the processes of one Megatron report: behaviour -> what is wrong with it, and the table's row."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = IMAGES[version](scratch) if version in IMAGES else VERSIONS[version]()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MILES_PLUGINS")}
    environment = {
        **variables,
        "PYTHONPATH": os.pathsep.join(map(str, [folder, ROOT])),
        "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than all of this
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    store, group = scratch / f"store-{ranks}", "image" if version in IMAGES else str(ranks)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(folder), str(store), str(rank), str(ranks), group],
            env=environment,
            cwd=scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, out[-2000:] + err[-4000:]
    found: dict[str, Any] = {}
    for rank, (out, _) in enumerate(said):
        answer = json.loads(out.splitlines()[-1])
        table = found.setdefault("table", {})
        for name, counts in answer.pop("table").items():
            table[name] = [sum(each) for each in zip(table.get(name, [0, 0]), counts, strict=True)]
        for name, problem in answer.items():
            found[name] = found.get(name) or (problem and f"rank {rank}: {problem}" if ranks > 1 else problem)
    return found


BEHAVIOURS: dict[str, dict[str, Callable[[], None]]] = {"1": {}, "2": {}, "image": {}}


def behaviour(function: Callable[[], None]) -> Callable[[], None]:
    """What follows runs in the process of one Megatron, in this order."""
    BEHAVIOURS["1"][function.__name__.replace("_", " ")] = function
    return function


def of_two_ranks(function: Callable[[], None]) -> Callable[[], None]:
    """Likewise, in each of two processes."""
    BEHAVIOURS["2"][function.__name__.replace("_", " ")] = function
    return function


def of_an_image(function: Callable[[], None]) -> Callable[[], None]:
    """Likewise, with the Megatron of slime's image."""
    BEHAVIOURS["image"][function.__name__.replace("_", " ")] = function
    return function


# -- in the process of one Megatron ----------------------------------------------------------------------------------

HIDDEN, VOCABULARY, LAYERS = 32, 64, 2
SAMPLES = [(4, [1] * 8), (3, [1, 1, 0, 0, 1, 1]), (6, [1, 0, 1, 1]), (2, [1])]
"""Length of the prompt, and the response's loss mask."""
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"

here = SimpleNamespace(targets=None, asked=0, table={})


def draft_targets(model: Any, microbatch: Any) -> Any:
    """The hook of a plugin; `here.targets` is set by the behaviour that runs."""
    here.asked += 1
    return here.targets and here.targets(model, microbatch)


def prepare(folder: str, store: str, rank: int, ranks: int) -> None:
    """Arm the patches as in a trainer, before Megatron is imported; then the process groups."""
    import torch

    from miles_plugins import activation, hookimpl
    from miles_plugins.manager import Installed, Plugin, Plugins
    from miles_plugins.patches.megatron import cpu as megatron_cpu
    from miles_plugins.patches.seam import Host, patch_set
    from miles_plugins.patches.torch import cpu
    from miles_plugins.patching import PatchSet, check_statically

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    patch_set(cpu.SEAMS).apply()
    cpu.device_mode().__enter__()
    on_cpu = [patch for seam in megatron_cpu.SEAMS for patch in seam.patches if not patch.id.endswith("router-gate")]
    PatchSet(*on_cpu, name="megatron on the cpu").arm()
    modules = tuple(f"miles_plugins.patches.megatron.{name}" for name in ("recompute", "draft"))
    always = frozenset({"microbatch_begins"})
    module = ModuleType("drafting")
    vars(module).update(__file__="", draft_targets=hookimpl(draft_targets))
    plugins = Plugins([Plugin(Installed("drafting", "tests", "0", None), module)])
    here.activation = activation.Activation(plugins, "trainer", "run", Host("test", modules, always=always))
    activation._current = here.activation
    here.static = {patch.id: check_statically(patch) for patch in here.activation.patches}
    here.activation.patches.arm()
    here.rank, here.ranks, here.store = rank, ranks, store

    from megatron.core import optimizer
    from megatron.core.models.gpt import gpt_model
    from megatron.core.transformer import multi_token_prediction
    from megatron.core.transformer.moe import moe_utils

    assert Path(gpt_model.__file__).is_relative_to(folder), gpt_model.__file__
    assert optimizer
    moe_utils.te_general_gemm = None  # undefined without TransformerEngine
    here.mtp = multi_token_prediction
    here.is_main = hasattr(multi_token_prediction, "process_mtp_loss")
    if hasattr(multi_token_prediction, "is_inference_column_parallel_linear"):
        multi_token_prediction.is_inference_column_parallel_linear = lambda module: False
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    parallel()


def parallel(**sizes: int) -> None:
    """The process groups of another layout."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
        gc.collect()
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(1)


def configuration(**changed: Any) -> Any:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 32,
            "num_attention_heads": 4,
            "add_bias_linear": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "init_method_std": 0.2,
            "params_dtype": torch.float32,
            "pipeline_dtype": torch.float32,
            "variable_seq_lengths": True,
            "moe_token_dispatcher_type": "alltoall",
            "use_cpu_initialization": True,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "gradient_accumulation_fusion": False,
            "mtp_loss_scaling_factor": 0.2,
            **changed,
        }
    )


def made(depths: int = 0, tied: bool = False, local: bool = False, **changed: Any) -> Any:
    """Megatron's GPTModel of local layers; all have the same policy.

    Args:
        depths: layers of the draft.
        local: with an attention of each token to itself alone, which context parallelism cannot disturb.
    """
    import torch
    from megatron.core import mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    config = configuration(mtp_num_layers=depths or None, **changed)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for layer in spec.layer_specs if local else ():
        layer.submodules.self_attention.submodules.core_attention = own_value()
    torch.manual_seed(0)
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=256,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
        position_embedding_type="none" if local else "rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if depths else None,
    )
    with torch.no_grad():  # by name: a draft in between takes random numbers
        for name, parameter in policy(model).items():
            if parameter.dim() > 1:
                named = EMBEDDING if tied and name == HEAD else name
                number = zlib.crc32(named.encode()) + mpu.get_tensor_model_parallel_rank()
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
    return model


def own_value() -> type:
    import torch

    class OwnValue(torch.nn.Module):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()

        def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).flatten(1)

    return OwnValue


def policy(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith("mtp.")}


def draft(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith("mtp.")}


def arguments(context: int = 1, pad: int = 1) -> Namespace:
    return Namespace(
        context_parallel_size=context,
        tensor_model_parallel_size=1,
        sequence_parallel=False,
        data_pad_size_multiplier=pad,
        allgather_cp=False,
    )


def batch_of(samples: Sequence[tuple[int, list[int]]], args: Namespace, rank: int = 0, seed: int = 3) -> dict[str, Any]:
    """A microbatch as slime packs it."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    from miles_plugins.packing import Packing

    lengths = [prompt + len(mask) for prompt, mask in samples]
    tokens = [
        torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed + prompt + length))
        for (prompt, _), length in zip(samples, lengths, strict=True)
    ]
    positions = Packing.of(args).positions(lengths, rank)
    whole = torch.cat(tokens)
    cut = (
        [-(-length // (2 * args.context_parallel_size)) * 2 for length in lengths]
        if rank or (args.context_parallel_size > 1)
        else lengths
    )
    padding = len(positions) - sum(cut)
    bounds = torch.tensor([0, *cut, *([padding] if padding else [])]).cumsum(0).int() * args.context_parallel_size
    return {
        "unconcat_tokens": tokens,
        "total_lengths": lengths,
        "response_lengths": [len(mask) for _, mask in samples],
        "loss_masks": [torch.tensor(mask) for _, mask in samples],
        "tokens": whole[positions].where(positions >= 0, 0)[None],
        "positions": positions,
        "packed_seq_params": PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=64, max_seqlen_kv=64
        ),
    }


@contextmanager
def learning(ranks: int = 1, convention: str = "correct") -> Iterator[None]:
    """The plugin has the draft learn what it shall."""
    from miles_plugins.spec_rl.draft_loss import targets_of

    def targets(model: Any, microbatch: Any) -> Any:
        return targets_of(microbatch, model.config.mtp_num_layers, ranks=ranks, convention=convention)

    here.targets = targets
    try:
        yield
    finally:
        here.targets = None


def logits_of(model: Any, batch: dict[str, Any], **more: Any) -> Any:
    """As slime calls it."""
    from miles_plugins.microbatch import Microbatch, set_current

    set_current(Microbatch(batch, batch["positions"]))
    try:
        return model(
            input_ids=batch["tokens"],
            position_ids=None,
            attention_mask=None,
            labels=None,
            packed_seq_params=batch["packed_seq_params"],
            **more,
        )
    finally:
        set_current(None)


AS_SLIME: dict[str, Any] = {"loss_mask": None, "mtp_kwargs": {"mtp_labels": None}}


def gradients(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: None if each.grad is None else each.grad.clone() for name, each in parameters.items()}


def stepped(model: Any, samples: Sequence[Any] = SAMPLES, weight: float = 1.0, **more: Any) -> tuple[Any, Any, Any]:
    """Logits, and the gradients of policy and draft, of one microbatch."""
    model.zero_grad()
    logits = logits_of(model, batch_of(samples, arguments()), **more)
    (logits.float().square().mean() * weight).backward()
    return logits.detach(), gradients(policy(model)), gradients(draft(model))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import torch

    return one.keys() == other.keys() and all(
        (one[name] is None and other[name] is None) or torch.equal(one[name], other[name]) for name in one
    )


def unchanged(where: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """All of it is what it was without a draft, bit for bit; counted for the table."""
    import torch

    assert expected.keys() == found.keys()
    assert not any(each is None for each in expected.values())
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    before = here.table.get(where, [0, 0])
    here.table[where] = [before[0] + len(different), before[1] + len(expected)]
    assert not different, (where, different)


CASES = [(depths, tied, recompute) for depths in (1, 2) for tied in (False, True) for recompute in ({}, RECOMPUTE)]


@behaviour
def every_patch_fits_and_what_megatron_has_is_left_to_it() -> None:
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    records = {record.patch.id: record for record in here.activation.patches.records()}
    ours = {name: record for name, record in records.items() if name.startswith("megatron.draft.")}
    assert len(ours) == 9
    native = hasattr(MegatronOptimizer, "has_grad_norm_group")
    assert native == here.is_main
    for name, record in ours.items():
        asks = name.endswith((".step", ".norm", ".gradients"))
        superseded = native if asks else not here.is_main if name.endswith("metric") else False
        expected = "superseded" if superseded else ("applied", "verified")
        assert record.state.value in expected, (name, record.state, record.detail)
        assert "drifted" not in record.detail, (name, record.detail)
        notes = here.static[name]
        assert bool([note for note in notes if note.startswith("superseded")]) == superseded, (name, notes)


@behaviour
def the_policys_logits_and_gradients_are_the_same_with_the_draft_trained_idle_and_absent() -> None:
    for depths, tied, recompute in CASES:
        absent = stepped(made(tied=tied, **recompute))
        model = made(depths, tied=tied, **recompute)
        idle = stepped(model)
        with learning():
            trained = stepped(model, **AS_SLIME)
        for which, (logits, of_policy, _) in (("draft trained", trained), ("draft idle", idle)):
            unchanged(f"{which}: logits", {"logits": absent[0]}, {"logits": logits})
            unchanged(f"{which}: gradients", absent[1], of_policy)
        assert all(gradient is None for gradient in idle[2].values()), "the draft did not run"
        assert len(trained[2]) >= 9 * depths
        assert all(gradient.any() for gradient in trained[2].values()), (depths, tied, recompute)


@behaviour
def experts_and_their_routers_are_isolated_too() -> None:
    experts = {
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 16,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
    }
    model = made(1, **experts)
    with learning():
        trained = stepped(model)
    absent = stepped(made(**experts))  # last: Megatron makes room for the losses of its layers once
    unchanged("draft trained: logits", {"logits": absent[0]}, {"logits": trained[0]})
    unchanged("draft trained: gradients", absent[1], trained[1])
    routers = [gradient for name, gradient in trained[2].items() if name.endswith("router.weight")]
    assert routers
    assert all(gradient.any() for gradient in routers)


@behaviour
def without_an_advantage_only_the_draft_has_a_gradient() -> None:
    for tied in (False, True):
        with learning():
            _, of_policy, of_draft = stepped(made(2, tied=tied), weight=0.0)
        assert all(gradient is None or not gradient.any() for gradient in of_policy.values())
        assert all(gradient.any() for gradient in of_draft.values())


@behaviour
def passes_without_gradient_and_evaluation_leave_the_draft_alone() -> None:
    import torch

    model = made(1)
    calls = watched(model)
    batch = batch_of(SAMPLES, arguments())
    with learning():
        here.asked = 0
        with torch.no_grad():
            logits_of(model, batch, loss_mask=None)
        model.eval()
        logits_of(model, batch)
        model.train()
        assert (calls, here.asked) == ([], 0)
        logits_of(model, batch)
        assert here.asked == 1
        assert len(calls) == 1
    logits_of(model, batch)  # nobody wants it trained
    assert len(calls) == 1


def watched(model: Any, name: str = "enorm", given: bool = True) -> list[Any]:
    """A list that grows by what a module of each of the draft's layers is given, or gives."""
    calls: list[Any] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        calls.append((inputs[0] if given else output).detach())

    for layer in model.mtp.layers:
        getattr(layer, name).register_forward_hook(hook)
    return calls


@behaviour
def the_draft_sees_the_next_tokens_and_its_loss_is_the_cross_entropy_of_the_response() -> None:
    """By hand, from the states that Megatron's layers give: which tokens, which labels, what mean, what scale."""
    import torch

    for depths in (1, 2):
        model = made(depths)
        calls, heads = watched(model), watched(model, "final_layernorm", given=False)
        batch = batch_of(SAMPLES, arguments(pad=16))
        clean()
        with learning():
            logits_of(model, batch)
        tokens = [tokens.tolist() for tokens in batch["unconcat_tokens"]]
        for depth in range(1, depths + 1):
            given = [each for sample in tokens for each in [*sample[depth:], *[0] * min(depth, len(sample))]]
            with torch.no_grad():
                embedded = model.embedding(torch.tensor([given]), None)
            assert torch.equal(calls[depth - 1][: len(given)], embedded)
            entropies, begin = [], 0
            for sample, (prompt, mask) in zip(tokens, SAMPLES, strict=True):
                for place in range(len(sample) - depth - 1):
                    target = place + depth + 1
                    if target >= prompt and mask[target - prompt]:
                        scores = model.output_layer.weight @ heads[depth - 1][begin + place, 0]
                        entropies.append(-scores.log_softmax(0)[sample[target]])
                begin += len(sample)
            expected = torch.stack(entropies).mean().detach()
            torch.testing.assert_close(here.mtp.MTPLossLoggingHelper.tracker["values"][depth - 1], expected)


def clean() -> None:
    """What slime does after a step, by the name that it knows."""
    here.mtp.MTPLossLoggingHelper.tracker.setdefault("values", __import__("torch").zeros(1))
    here.mtp.MTPLossLoggingHelper.clean_loss_in_tracker()


@behaviour
def slime_finds_its_metric() -> None:
    """Its code of v0.3.1 and of main, over two microbatches."""
    import torch

    tracker = here.mtp.MTPLossLoggingHelper.tracker
    for depths in (1, 2):
        tracker.clear()
        model = made(depths)
        each = []
        for samples in (SAMPLES[:2], SAMPLES[2:]):
            before = tracker["values"].clone() if "values" in tracker else torch.zeros(depths)
            with learning():
                stepped(model, samples, **AS_SLIME)
            each.append(tracker["values"] - before)
        assert tracker.get("reduce_group") is None
        torch.distributed.all_reduce(tracker["values"], group=tracker["avg_group"], op=torch.distributed.ReduceOp.AVG)
        torch.testing.assert_close(tracker["values"] / 2, sum(each) / 2)
        assert tracker["values"].shape == (depths,)
        assert (tracker["values"] > 0).all()
        here.mtp.MTPLossLoggingHelper.clean_loss_in_tracker()
        assert not tracker["values"].any()
        assert tracker["avg_group"] is None


@behaviour
def packed_samples_learn_what_they_learn_one_by_one() -> None:
    import torch

    for recompute in ({}, RECOMPUTE):
        model = made(2, **recompute)
        with learning():
            _, _, packed = stepped(model)
        counts = [counted(sample) for sample in SAMPLES]
        summed: dict[str, Any] = {}
        for sample, count in zip(SAMPLES, counts, strict=True):
            for depth in range(2):  # each depth has a mean of its own
                with learning(), only_depth(depth + 1):
                    _, _, alone = stepped(model, [sample])
                share = count[depth] / max(sum(each[depth] for each in counts), 1)
                for name, gradient in alone.items():
                    if gradient is not None:
                        summed[name] = summed.get(name, 0) + gradient * share
        for name, gradient in packed.items():
            torch.testing.assert_close(gradient, summed[name], rtol=1e-4, atol=1e-6)


def counted(sample: tuple[int, list[int]]) -> list[int]:
    """Of how many positions each depth learns."""
    prompt, mask = sample
    return [sum(mask[max(depth + 2 - prompt, 0) :]) for depth in range(2)]


@contextmanager
def only_depth(depth: int) -> Iterator[None]:
    """The other depths learn nothing."""
    import torch

    inner = here.targets

    def targets(model: Any, microbatch: Any) -> Any:
        found = inner(model, microbatch)
        masks = [mask if each == depth else torch.zeros_like(mask) for each, mask in enumerate(found.masks, start=1)]
        return type(found)(found.inputs, found.labels, tuple(masks), found.counts, found.ranks)

    here.targets = targets
    try:
        yield
    finally:
        here.targets = inner


@behaviour
def recomputation_changes_nothing() -> None:
    import torch

    for samples in (SAMPLES, SAMPLES[:1]):
        with learning():
            plain, recomputed = stepped(made(2), samples), stepped(made(2, **RECOMPUTE), samples)
        assert torch.equal(plain[0], recomputed[0])
        assert same(plain[1], recomputed[1])
        assert same(plain[2], recomputed[2])


@behaviour
def a_microbatch_without_a_response_gives_zero() -> None:
    import torch

    nothing = [(prompt, [0] * len(mask)) for prompt, mask in SAMPLES]
    model = made(2)
    clean()
    with learning():
        _, of_policy, of_draft = stepped(model, nothing)
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in of_draft.values())
        assert not here.mtp.MTPLossLoggingHelper.tracker["values"].any()
        assert same(of_policy, stepped(made(), nothing)[1])
        _, _, alone = stepped(model)
        model.zero_grad()
        for samples in (nothing, SAMPLES):
            logits_of(model, batch_of(samples, arguments())).float().square().mean().backward()
    assert same(gradients(draft(model)), alone)


@behaviour
def the_scale_is_megatrons() -> None:
    """The factor over the depths, the schedule's own scale, and sums where Megatron divides by the tokens later."""
    import torch

    scaler = here.mtp.MTPLossAutoScaler
    before = scaler.main_loss_backward_scale
    with learning():
        _, _, plain = stepped(made(1))
        for depths, factor, microbatches in ((1, 0.4, 1), (1, 0.2, 4)):
            scaler.set_loss_scale(torch.ones(1) / microbatches)
            _, _, found = stepped(made(depths, mtp_loss_scaling_factor=factor))
            scaler.set_loss_scale(before)
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, plain[name] * (factor / 0.2) / microbatches, rtol=1e-5, atol=1e-7)
        _, _, summed = stepped(made(1, calculate_per_token_loss=True))
        count = sum(counted(sample)[0] for sample in SAMPLES)
        for name, gradient in summed.items():
            torch.testing.assert_close(gradient, plain[name] * count, rtol=1e-4, atol=1e-6)
        both = made(2)
        _, _, found = stepped(both)
        with only_depth(1):
            _, _, first = stepped(both)
        with only_depth(2):
            _, _, second = stepped(both)
        for name, gradient in found.items():
            parts = [each[name] for each in (first, second) if each[name] is not None]
            torch.testing.assert_close(gradient, sum(parts), rtol=1e-4, atol=1e-6)
        one = made(1)
        one.load_state_dict(both.state_dict(), strict=False)
        _, _, alone = stepped(one)
        for name, gradient in alone.items():
            torch.testing.assert_close(first[name] * 2, gradient, rtol=1e-4, atol=1e-6)


@behaviour
def the_draft_learns_and_shuffled_labels_do_not_help() -> None:
    import torch

    found = {}
    for shuffled in (False, True):
        model = made(1)
        adam = torch.optim.Adam(draft(model).values(), lr=0.01)
        clean()
        losses = []
        with learning():
            inner = here.targets
            if shuffled:
                here.targets = lambda model, microbatch, inner=inner: with_other_labels(inner(model, microbatch))
            for _ in range(30):
                stepped(model)
                losses.append(here.mtp.MTPLossLoggingHelper.tracker["values"][0].item())
                clean()
                adam.step()
            here.targets = inner
            stepped(model)
            losses.append(here.mtp.MTPLossLoggingHelper.tracker["values"][0].item())
            clean()
        found[shuffled] = losses
    assert found[False][-1] < 0.5 * found[False][0], found[False]
    assert found[True][-1] > found[False][-1] + 1, found


def with_other_labels(targets: Any) -> Any:
    import torch

    other = [
        torch.randint(1, VOCABULARY, label.shape, generator=torch.Generator().manual_seed(9))
        for label in targets.labels
    ]
    return type(targets)(targets.inputs, tuple(other), targets.masks, targets.counts, targets.ranks)


@behaviour
def what_is_switched_off_for_a_moment_is_restored_also_after_an_exception() -> None:
    model, other = made(1), made(1)
    config, state = model.config, copy.copy(vars(model.config))
    seen = []

    def failing(module: Any, inputs: Any) -> None:
        seen.append(
            (model.config.mtp_num_layers, model.mtp_process, config.mtp_num_layers, other.config.mtp_num_layers)
        )
        raise ZeroDivisionError

    handle = model.output_layer.register_forward_pre_hook(failing)
    with pytest.raises(ZeroDivisionError):
        stepped(model)
    handle.remove()
    assert seen == [(None, False, 1, 1)]
    assert model.config is config
    assert vars(config) == state
    assert model.mtp_process
    with learning():
        assert stepped(model)[2]["mtp.layers.0.eh_proj.weight"] is not None


@behaviour
def what_cannot_be_trained_is_refused_by_name() -> None:
    from miles_plugins.errors import PluginError

    model = made(1)
    with pytest.raises(PluginError, match="with this schedule") as caught:
        model.build_schedule_plan(None, None, None)
    assert caught.value.facts["flag"] == "--overlap-moe-expert-parallel-comm"
    model.post_process = False
    with pytest.raises(PluginError, match="without the output head"):
        stepped(model)
    model.post_process = True
    model.position_embedding_type = "learned_absolute"
    with learning(), pytest.raises(PluginError, match="learned positions"):
        stepped(model)


# -- the optimizer ---------------------------------------------------------------------------------------------------


def optimizer_of(
    model: Any, clip: float, kind: str, decay: float = 0.1, after_wrapping: Callable[..., None] | None = None
) -> tuple[Any, Any]:
    """Megatron's own, with its wrapper for data parallelism: (wrapped model, optimizer)."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    distributed, half = "distributed" in kind, "bf16" in kind
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), model
    )
    if after_wrapping is not None:
        after_wrapping([wrapped])
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.01,
        weight_decay=decay,
        clip_grad=clip,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        use_distributed_optimizer=distributed,
    )
    return wrapped, get_megatron_optimizer(config, [wrapped])


def trained(depths: int, clip: float, kind: str, learns: bool, steps: int = 3, apart: bool = True) -> dict[str, Any]:
    """Parameters after some of Megatron's steps, and the norms that it reported."""
    import torch

    from miles_plugins.spec_rl.draft_weights import clip_apart

    model = made(depths, **({"params_dtype": torch.bfloat16, "bf16": True} if "bf16" in kind else {}))
    if "bf16" in kind:
        model.bfloat16()
    wrapped, optimizer = optimizer_of(model, clip, kind, after_wrapping=clip_apart if apart else None)
    norms = []
    for number in range(steps):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        batch = batch_of(SAMPLES, arguments(), seed=number)
        if learns:
            with learning():
                logits = logits_of(wrapped, batch)
        else:
            logits = logits_of(wrapped, batch)
        (logits.float().square().mean() * 30).backward()
        wrapped.finish_grad_sync()
        successful, norm, _ = optimizer.step()
        assert successful
        norms.append(norm)
    return {
        "norms": norms,
        "policy": {name: each.detach().clone() for name, each in policy(model).items()},
        "draft": {name: each.detach().clone() for name, each in draft(model).items()},
    }


KINDS = ("plain", "bf16", "distributed bf16")


@behaviour
def clipping_does_not_couple_them() -> None:
    for kind in KINDS:
        for clip in (1.0, 0.01):
            absent = trained(0, clip, kind, learns=False)
            with_draft = trained(1, clip, kind, learns=True)
            assert absent["norms"] == with_draft["norms"], (kind, clip)
            assert min(absent["norms"]) > 0.02
            unchanged("clipped steps", absent["policy"], with_draft["policy"])
        coupled = trained(1, 1.0, kind, learns=True, apart=False)
        assert coupled["norms"] != absent["norms"], "else this test would see nothing"


@behaviour
def the_drafts_step_is_clipped_by_its_own_norm() -> None:
    """So it is the same whatever the policy's gradient is, and another where its own is clipped."""
    import torch

    from miles_plugins.spec_rl.draft_weights import clip_apart

    found = {}
    for weight in (30.0, 3.0):
        for clip in (1e9, 1e-3):
            model = made(1)
            wrapped, optimizer = optimizer_of(model, clip, "plain", after_wrapping=clip_apart)
            wrapped.zero_grad_buffer()
            with learning():
                (logits_of(wrapped, batch_of(SAMPLES, arguments())).float().square().mean() * weight).backward()
            wrapped.finish_grad_sync()
            before = [each.main_grad.clone() for each in draft(model).values()]
            optimizer.step()
            after = [each.main_grad.clone() for each in draft(model).values()]
            norm = torch.stack([each.norm() for each in before]).norm()
            for one, other in zip(before, after, strict=True):
                torch.testing.assert_close(other, one * min(1.0, clip / (norm.item() + 1e-6)))
            found[weight, clip] = after
    for clip in (1e9, 1e-3):
        assert all(map(torch.equal, found[30.0, clip], found[3.0, clip]))


@behaviour
def a_frozen_draft_stays_as_it_is_under_weight_decay() -> None:
    """Where that is done before its model is wrapped for data parallelism, as by slime's --freeze-params-name-list."""
    import torch

    from miles_plugins.spec_rl.draft_weights import FROZEN, draft_parameters

    model = made(2)
    named = [name for name, _ in model.named_parameters() if re.search(FROZEN, name)]
    assert named == [name.partition(".")[2] for name in draft_parameters([model])] == list(draft(model))
    for kind in KINDS:
        model = made(1, **({"params_dtype": torch.bfloat16, "bf16": True} if "bf16" in kind else {}))
        if "bf16" in kind:
            model.bfloat16()
        before = {name: each.detach().clone() for name, each in model.named_parameters()}
        for name, each in model.named_parameters():
            each.requires_grad_(not re.search(FROZEN, name))
        wrapped, optimizer = optimizer_of(model, 1.0, kind, decay=0.5)
        for number in range(2):
            wrapped.zero_grad_buffer()
            logits_of(wrapped, batch_of(SAMPLES, arguments(), seed=number)).float().square().mean().backward()
            wrapped.finish_grad_sync()
            assert optimizer.step()[0]
        after = dict(model.named_parameters())
        assert all(torch.equal(before[name], after[name]) for name in draft(model)), kind
        assert not any(torch.equal(before[name], each) for name, each in policy(model).items() if each.dim() > 1)
        drifting = trained(1, 1.0, kind, learns=False)["draft"]
        assert not torch.equal(drifting["mtp.layers.0.eh_proj.weight"], before["mtp.layers.0.eh_proj.weight"]), (
            "else this test would see nothing"
        )


# -- checkpoints -----------------------------------------------------------------------------------------------------


@behaviour
def a_draft_that_no_checkpoint_gave_is_an_error() -> None:
    """Where a loader skips what is missing, as that of slime's image does; Megatron's own stops by itself."""
    from miles_plugins.errors import PluginError
    from miles_plugins.spec_rl.draft_weights import FromCheckpoint

    model = made(2)
    loaded = FromCheckpoint([model])
    loaded.require([model])  # nothing was loaded at all: a model that begins at random
    for parameter in policy(model).values():
        parameter.data.mul_(2)
    with pytest.raises(PluginError, match="no weights for the draft") as caught:
        loaded.require([model])
    assert "mtp.layers.0." in caught.value.facts["such as"]
    for name, parameter in draft(model).items():
        if ".1." not in name:
            parameter.data.mul_(2)
    with pytest.raises(PluginError, match="no weights for the draft") as caught:
        loaded.require([model])
    assert "mtp.layers.1." in caught.value.facts["such as"]
    for parameter in draft(model).values():
        parameter.data.mul_(2)
    loaded.require([model])


# -- without our patches ---------------------------------------------------------------------------------------------


@behaviour
def stock_megatron_disturbs_the_policy_or_stops() -> None:
    """The reason for all of this; and its main, which isolates a draft by itself, gives it the same gradients."""
    import torch

    samples = SAMPLES[:1]
    batch = batch_of(samples, arguments())
    length = batch["tokens"].shape[1]
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    absent, ours = stepped(made(), samples), made(1)
    with learning():
        _, _, of_draft = stepped(ours, samples)
    here.activation.patches.undo()
    try:
        with pytest.raises(TypeError):
            logits_of(made(1), batch, **AS_SLIME)
        model = made(1)
        if not here.is_main:
            with pytest.raises((TypeError, AttributeError, AssertionError)):
                logits_of(model, batch)
        positions = torch.arange(length)[None]
        labels = batch["tokens"].roll(-1)

        def losses(model: Any) -> Any:
            return model(batch["tokens"], positions, mask, labels=labels, loss_mask=torch.ones(1, length)).mean()

        found = []
        for depths in (0, 1):
            model = made(depths)
            losses(model).backward()
            found.append(gradients(policy(model)))
        different = [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
        here.table["stock: gradients"] = [len(different), len(found[0])]
        assert len(different) == len(found[0])
        if here.is_main:
            plain, native = made(), made(1, mtp_detach_heads=True)
            plain(batch["tokens"], None, mask).float().square().mean().backward()
            ((_, of_response),) = samples
            of_tokens = torch.tensor([0] * (length - len(of_response)) + of_response)[None].float()
            logits = native(batch["tokens"], None, mask, labels=None, loss_mask=of_tokens)
            logits.float().square().mean().backward()
            assert same(gradients(policy(native)), gradients(policy(plain)))
            for name, gradient in gradients(draft(native)).items():
                torch.testing.assert_close(gradient, of_draft[name], rtol=1e-4, atol=1e-6)
    finally:
        here.activation.patches.apply()
    assert same(stepped(ours, samples)[1], absent[1])


# -- two ranks -------------------------------------------------------------------------------------------------------


@of_two_ranks
def tensor_parallel_ranks_isolate_it_too() -> None:
    parallel(tensor_model_parallel_size=2)
    for sequence in (False, True):
        for tied in (False, True):
            for recompute in ({}, RECOMPUTE):
                changed = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence, "tied": tied, **recompute}
                samples = [*SAMPLES, (1, [1] * (-sum(p + len(m) for p, m in SAMPLES) % 2 + 1))]
                absent = stepped(made(**changed), samples)
                model = made(1, **changed)
                with learning():
                    found = stepped(model, samples)
                unchanged("tensor 2", {"logits": absent[0], **absent[1]}, {"logits": found[0], **found[1]})
                assert all(gradient.any() for gradient in found[2].values()), changed


@of_two_ranks
def context_parallel_ranks_learn_what_one_learns() -> None:
    import torch
    from megatron.core import mpu

    parallel(context_parallel_size=2)
    rank = mpu.get_context_parallel_rank()
    uneven = [*SAMPLES, (29, [1, 1])]  # the second rank has most of the prompt
    for samples in (SAMPLES, uneven, [(14, [1, 1])]):
        for recompute in ({}, RECOMPUTE, {"calculate_per_token_loss": True}):
            alone = made(2, local=True, **recompute)
            with learning():
                clean()
                _, _, expected = stepped(alone, samples)
                loss = here.mtp.MTPLossLoggingHelper.tracker["values"].clone()
            model = made(2, local=True, context_parallel_size=2, **recompute)
            args = arguments(2)
            clean()
            model.zero_grad()
            with learning(args.context_parallel_size):
                logits_of(model, batch_of(samples, args, rank)).float().square().mean().backward()
            with_context = made(local=True, context_parallel_size=2, **recompute)
            logits_of(with_context, batch_of(samples, args, rank)).float().square().mean().backward()
            unchanged("context 2", gradients(policy(with_context)), gradients(policy(model)))
            found = gradients(draft(model))
            for name, gradient in found.items():
                torch.distributed.all_reduce(gradient)
                # As many ranks share the samples, by so many Megatron divides: their number, or each token as often.
                torch.testing.assert_close(gradient / 2, expected[name], rtol=1e-4, atol=1e-5)
            tracker = here.mtp.MTPLossLoggingHelper.tracker
            torch.distributed.all_reduce(tracker["values"], group=tracker["avg_group"])
            torch.testing.assert_close(tracker["values"] / 2, loss)


@of_two_ranks
def a_pipelines_first_stage_has_no_draft_and_the_last_one_trains_it() -> None:
    """Tied, Megatron has a head without use beside the draft, and would wait for its gradient where that overlaps."""
    import torch

    parallel(pipeline_model_parallel_size=2)
    for tied, overlap in ((False, False), (False, True), (True, False)):
        absent, found = (pipelined(depths, tied, overlap) for depths in (0, 1))
        assert torch.equal(absent["output"], found["output"])
        if here.rank == 1 and tied:
            absent["policy"][EMBEDDING] = absent["policy"].pop(HEAD)
            assert not found["policy"].pop(HEAD).any()
        extra = found["policy"].keys() - absent["policy"].keys()
        assert extra == ({EMBEDDING} if here.rank == 1 and not tied else set())
        unchanged("pipeline 2", absent["policy"], {name: found["policy"][name] for name in absent["policy"]})
        assert (len(found["draft"]) >= 9) == (here.rank == 1)
        assert all(gradient.any() for gradient in found["draft"].values())


def pipelined(depths: int, tied: bool, overlap: bool) -> dict[str, Any]:
    """Gradients of two microbatches through Megatron's schedule."""
    import torch
    from megatron.core import mpu
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = made(depths, tied=tied, pipeline_model_parallel_size=2)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(overlap_grad_reduce=overlap), model)
    if overlap:
        model.config.no_sync_func = wrapped.no_sync
    model.config.finalize_model_grads_func = finalize_model_grads
    outputs = []

    def forward_step(iterator: Any, chunk: Any, *args: Any) -> Any:
        batch = next(iterator)
        output = logits_of(chunk, batch)
        if mpu.is_pipeline_last_stage():
            outputs.append(output.detach().clone())
        return output, lambda out: (out.float().square().mean(), {})

    args = arguments()
    for _ in range(2):  # from the second step on Megatron expects the gradients that it had in the first
        wrapped.zero_grad_buffer()
        with learning():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([batch_of(SAMPLES, args), batch_of(SAMPLES[:2], args)]),
                model=[wrapped],
                num_microbatches=2,
                seq_length=1,
                micro_batch_size=1,
                forward_only=False,
            )
    found = {name: each.main_grad.clone() for name, each in model.named_parameters()}
    return {
        "policy": {name: each for name, each in found.items() if not name.startswith("mtp.")},
        "draft": {name: each for name, each in found.items() if name.startswith("mtp.")},
        "output": torch.cat([each.flatten() for each in outputs]) if outputs else torch.zeros(1),
    }


# -- slime's image -----------------------------------------------------------------------------------------------------


@of_an_image
def the_image_is_reproduced_on_demand() -> None:
    """Its own draft gets the gradients that ours gets with its convention; and with the other one, others."""
    import torch

    for samples in (SAMPLES, SAMPLES[:1]):
        batch = batch_of(samples, arguments())
        # As slime's get_batch makes it: of each sample, and of the label at each position.
        masks = [each for prompt, mask in samples for each in [*[0] * (prompt - 1), *mask, 0]]
        as_slime = {"loss_mask": torch.tensor([masks]), "mtp_kwargs": {"mtp_labels": batch["tokens"]}}
        model = made(1)
        here.activation.patches.undo()
        try:
            image = stepped(model, samples, **as_slime)
        finally:
            here.activation.patches.apply()
        with learning(convention="docker"):
            ours = stepped(model, samples, **as_slime)
        with learning():
            correct = stepped(model, samples, **as_slime)
        assert torch.equal(image[0], ours[0])
        assert same(image[1], ours[1])
        for name, gradient in image[2].items():
            torch.testing.assert_close(ours[2][name], gradient, rtol=1e-4, atol=1e-7)
        name = "mtp.layers.0.eh_proj.weight"
        assert not torch.allclose(correct[2][name], image[2][name], rtol=1e-2, atol=1e-4)


@of_an_image
def its_own_draft_stays_off() -> None:
    for depths in (1, 2):
        absent, model = stepped(made()), made(depths)
        with learning():
            found = stepped(model, **AS_SLIME)
        assert same(found[1], absent[1])
        assert all(gradient.any() for gradient in found[2].values())


# -- what they report ------------------------------------------------------------------------------------------------

PARAMETERS = [pytest.param(name, marks=[pytest.mark.upstream] if name in NEEDS_CLONE else []) for name in VERSIONS]


@pytest.fixture(scope="module", params=PARAMETERS)
def reported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("torch")
    scratch = tmp_path_factory.mktemp("megatron")
    return {**report(request.param, scratch), **report(request.param, scratch, ranks=2)}


@pytest.fixture(scope="module", params=IMAGES)
def reported_by_image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("torch")
    return report(request.param, tmp_path_factory.mktemp("image"))


@pytest.mark.upstream
@pytest.mark.parametrize("name", BEHAVIOURS["image"])
def test_on_slimes_image(name: str, reported_by_image: dict[str, Any]) -> None:
    assert reported_by_image[name] == "", reported_by_image[name]


@pytest.mark.parametrize("name", [*BEHAVIOURS["1"], *BEHAVIOURS["2"]])
def test_on_every_megatron(name: str, reported: dict[str, Any]) -> None:
    assert reported[name] == "", reported[name]


def run() -> None:
    folder, store, rank, ranks, group = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    prepare(folder, store, rank, ranks)
    wanted = os.environ.get("ONLY")
    found = {}
    for name, function in BEHAVIOURS[group].items():
        if wanted and wanted not in name:
            continue
        try:
            function()
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
            if ranks > 1:  # the other waits
                break
    print(json.dumps({**found, "table": here.table}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    run()
