"""What plugins do to routers and linear layers is one behaviour on every Megatron that slime runs on.

Also where an image has patched it.

Each Megatron runs in a process of its own: this file as a script, with that Megatron in front of sys.path. The tests
only read what it reports.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.wheels import unpacked_commit, unpacked_wheel

ROOT = Path(__file__).resolve().parents[1]
MOE = "megatron/core/transformer/moe"


# -- which Megatrons -------------------------------------------------------------------------------------------------


def wheel(version: str) -> Callable[[Path], list[Path]]:
    return lambda scratch: [unpacked_wheel("megatron-core", version)]


def commit(name: str) -> Callable[[Path], list[Path]]:
    return lambda scratch: [unpacked_commit(("MEGATRON_HOME", "~/Megatron-LM", name), "megatron")]


def main(scratch: Path) -> list[Path]:
    """Megatron-LM's main of 2026-08, which these tests are known to pass with; else the clone's."""
    try:
        return commit("d98e8a64ddf34856e74b24714e3bedb2f5a39553")(scratch)
    except pytest.skip.Exception:
        return commit("origin/main")(scratch)


def of_slimes_image(stock: Callable[[Path], list[Path]], patch: str) -> Callable[[Path], list[Path]]:
    """As slime's Dockerfile patches it, as far as routing is concerned; its patches come from the user's checkout."""

    def folders(scratch: Path) -> list[Path]:
        slime = unpacked_commit(("SLIME_HOME", "~/slime", "v0.3.1"), "slime", "docker/patch")
        folder = own_moe(stock(scratch)[0], scratch)
        command = ["git", "apply", f"--include={MOE}/*", str(slime / "docker" / "patch" / patch / "megatron.patch")]
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(scratch)}  # the folder belongs to no repository
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return [folder, slime]

    return folders


REPLAY_BASE = """
class Manager:
    enabled = False

    def get_topk_fn(self, compute_topk, return_probs):
        def passing_on(scores, topk, *args, **kwargs):
            assert not self.enabled
            return compute_topk(scores, topk, *args, **kwargs)

        return passing_on

    def register_to_module(self, module, name):
        if self.enabled:
            setattr(module, name, object())


routing_replay_manager = Manager()
"""


def of_miles_image(stock: Callable[[Path], list[Path]]) -> Callable[[Path], list[Path]]:
    """A change of the shape of the one in miles' Megatron; the manager is a stand-in of our own."""

    def folders(scratch: Path) -> list[Path]:
        folder = own_moe(stock(scratch)[0], scratch)
        importing = "from miles.utils.replay_base import routing_replay_manager"
        for file, before, indent, added in (
            (
                "moe_utils.py",
                '\n    if score_function == "softmax":\n        if use_pre_softmax',
                "    ",
                "compute_topk = routing_replay_manager.get_topk_fn(compute_topk, return_probs=True)",
            ),
            (
                "router.py",
                "\n    def _maintain_float32_expert_bias",
                "        ",
                'routing_replay_manager.register_to_module(self, "routing_replay")',
            ),
        ):
            path = folder / MOE / file
            text = path.read_text()
            assert text.count(before) == 1, file
            path.write_text(text.replace(before, f"\n{indent}{importing}\n{indent}{added}\n{before}"))
        package = scratch / "miles-image" / "miles" / "utils"
        package.mkdir(parents=True)
        (package / "replay_base.py").write_text(REPLAY_BASE)
        return [folder, package.parents[1]]

    return folders


def own_moe(stock: Path, scratch: Path) -> Path:
    """A copy of a Megatron of links to it, but for the folder of the routers."""
    original, copy = stock, scratch / "megatron-of-an-image"
    copy.mkdir()
    for part in Path(MOE).parts:
        for entry in original.iterdir():
            if entry.name != part:
                (copy / entry.name).symlink_to(entry)
        original, copy = original / part, copy / part
        copy.mkdir()
    shutil.copytree(original, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return scratch / "megatron-of-an-image"


OLD = commit("3714d81d418c9f1bca4594fc35f9e8289f652862")  # slime v0.2.2 to v0.2.4; both pins call themselves 0.16.0rc0
NEW = commit("1dcf0dafa884ad52ffb243625717a3471643e087")  # slime v0.3.0 and later

# id -> where it comes from, whether Megatron asks `router_replay` by itself, whose image it is.
VERSIONS: dict[str, tuple[Callable[[Path], list[Path]], bool, str]] = {
    "0.14.0": (wheel("0.14.0"), False, ""),
    "0.15.3": (wheel("0.15.3"), False, ""),
    "0.16.1": (wheel("0.16.1"), True, ""),
    "3714d81d": (OLD, False, ""),
    "1dcf0dafa": (NEW, True, ""),
    "main": (main, True, ""),
    "0.14.0 of slime's image": (of_slimes_image(wheel("0.14.0"), "v0.5.6"), False, "slime"),
    "3714d81d of slime's image": (of_slimes_image(OLD, "v0.5.9"), False, "slime"),
    "1dcf0dafa of slime's image": (of_slimes_image(NEW, "v0.5.15.post1"), True, "slime"),
    "0.15.3 of miles' image": (of_miles_image(wheel("0.15.3")), False, "miles"),
}
NEEDS_CLONES = [name for name in VERSIONS if name not in ("0.14.0", "0.15.3", "0.16.1", "0.15.3 of miles' image")]


# -- what they report ------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.upstream] if name in NEEDS_CLONES else []) for name in VERSIONS],
)
def reported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Behaviour -> what is wrong with it on one Megatron."""
    pytest.importorskip("torch")
    where, asks, image = VERSIONS[request.param]
    scratch = tmp_path_factory.mktemp("megatron")
    folders = where(scratch)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MILES_PLUGINS")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(folders[0]), json.dumps(asks), image],
        env={
            **variables,
            "PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT])),
            "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than all of this
            "CUDA_VISIBLE_DEVICES": "",
            "ENABLE_ROUTING_REPLAY": "0",
        },
        cwd=scratch,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


BEHAVIOURS: dict[str, Callable[[], None]] = {}


def behaviour(function: Callable[[], None]) -> Callable[[], None]:
    """What follows runs in the process of one Megatron, in this order."""
    BEHAVIOURS[function.__name__.replace("_", " ")] = function
    return function


# -- in the process of one Megatron ----------------------------------------------------------------------------------

EXPERTS, TOPK, TOKENS, HIDDEN = 16, 4, 64, 8
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = {"moe_router_enable_expert_bias": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "softmax after": {"moe_router_pre_softmax": False},
    "softmax before": {"moe_router_pre_softmax": True},
    "sigmoid": SIGMOID,
    "sigmoid with bias": {**SIGMOID, **BIAS},
    "square root of softplus": {"moe_router_score_function": "sqrtsoftplus"},  # Megatron's main only
    "groups, softmax after": GROUPS,
    "groups, softmax before": {**GROUPS, "moe_router_pre_softmax": True},
    "groups, sigmoid": {**GROUPS, **SIGMOID},
    "groups, sigmoid with bias": {**GROUPS, **SIGMOID, **BIAS, "moe_router_topk_scaling_factor": 2.5},
}
IN_GROUPS_WITHOUT_BIAS = [name for name in FAMILIES if name.startswith("groups") and "bias" not in name]

here = SimpleNamespace()
"""Of this process: the Megatron that it runs, and what the plugin's hook does just now."""


def select_experts(router: Any, scores: Any, topk: int, choose: Any) -> Any:
    """The hook of a plugin; `here.decide` is set by the behaviour that runs."""
    return here.decide and here.decide(router, scores, topk, choose)


def forward_weight(linear: Any) -> Any:
    """The same of the weights of linear layers: those of experts are rounded."""
    return rounded if ".experts." in linear.name else None


def rounded(weights: Any) -> list[Any]:
    return [(weight * 64).round() / 64 for weight in weights]


@contextmanager
def deciding(decide: Callable[..., Any] | None) -> Iterator[None]:
    here.decide = decide
    try:
        yield
    finally:
        here.decide = None


class Recording:
    """A hook that notes what it was asked, and leaves the choice to Megatron."""

    def __init__(self) -> None:
        self.questions: list[SimpleNamespace] = []

    def __call__(self, router: Any, scores: Any, topk: int, choose: Any) -> None:
        self.questions.append(SimpleNamespace(router=router, scores=scores, topk=topk, choice=choose()))

    @property
    def only(self) -> SimpleNamespace:
        assert len(self.questions) == 1, f"asked {len(self.questions)} times"
        return self.questions[0]


def replaying(indices: Any) -> Callable[..., Any]:
    return lambda router, scores, topk, choose: (scores.gather(1, indices), indices)


def prepare(folder: str, asks: bool, image: str) -> None:
    """Arm the patches as in a trainer, before Megatron is imported; then one process group of one rank."""
    import torch

    from miles_plugins import activation, hookimpl
    from miles_plugins.manager import Installed, Plugin, Plugins
    from miles_plugins.patches.seam import Host, patch_set
    from miles_plugins.patches.torch import cpu
    from miles_plugins.patching import check_statically

    torch.set_num_threads(1)
    patch_set(cpu.SEAMS).apply()
    modules = tuple(f"miles_plugins.patches.megatron.{name}" for name in ("router", "recompute", "linear"))
    host = Host("test", modules, always=frozenset({"microbatch_begins"}))
    module = ModuleType("deciding")
    vars(module).update(__file__="", select_experts=hookimpl(select_experts), forward_weight=hookimpl(forward_weight))
    plugins = Plugins([Plugin(Installed("deciding", "tests", "0", None), module)])
    here.activation = activation.Activation(plugins, "trainer", "run", host)
    activation._current = here.activation
    here.without_plugin = activation.Activation(Plugins([]), "trainer", "run", host)
    here.decide, here.asks, here.image = None, asks, image
    here.static = {patch.id: check_statically(patch) for patch in here.activation.patches}
    here.activation.patches.arm()

    from megatron.core import parallel_state
    from megatron.core.models import gpt  # noqa: F401  imports the routers in the order of a trainer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import multi_token_prediction
    from megatron.core.transformer.moe import moe_utils, router

    assert Path(router.__file__).is_relative_to(folder), router.__file__
    here.router, here.utils = router, moe_utils
    moe_utils.te_general_gemm = None  # undefined without TransformerEngine, and with it not for the CPU
    if hasattr(multi_token_prediction, "is_inference_column_parallel_linear"):
        multi_token_prediction.is_inference_column_parallel_linear = lambda module: False
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    here.groups = SimpleNamespace(
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        tp_cp=parallel_state.get_tensor_and_context_parallel_group(),
        tp_dp_cp=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    )


def configuration(**changed: Any) -> Any:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": HIDDEN,
            "num_attention_heads": 2,
            "num_moe_experts": EXPERTS,
            "moe_ffn_hidden_size": HIDDEN,
            "moe_router_topk": TOPK,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_token_dispatcher_type": "alltoall",
            "add_bias_linear": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "normalization": "RMSNorm",
            "activation_func": torch.nn.functional.gelu,
            "use_cpu_initialization": True,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "gradient_accumulation_fusion": False,
            **changed,
        }
    )


def made_router(seed: int = 0, **changed: Any) -> Any:
    """Megatron's TopKRouter, its biases (if it has them) and its weights far from zero."""
    import torch

    torch.manual_seed(seed)
    made = here.router.TopKRouter(configuration(**changed), here.groups)
    made.set_layer_number(1)
    made.weight.data.normal_()
    if made.expert_bias is not None:
        made.expert_bias.copy_(torch.linspace(-0.5, 0.5, EXPERTS)[torch.randperm(EXPERTS)])
    return made


def inputs(seed: int = 0) -> Any:
    import torch

    return torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(seed))


def arbitrary(seed: int = 1, tokens: int = TOKENS) -> Any:
    """[tokens, topk] experts that no router chose."""
    import torch

    return torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed)).topk(TOPK, dim=1).indices


def as_map(indices: Any) -> Any:
    import torch

    return torch.zeros(len(indices), EXPERTS, dtype=torch.bool).scatter(1, indices, True)


def formula(name: str, weight: Any, x: Any, indices: Any) -> Any:
    """The weights of these experts in float64, [tokens, topk]."""
    import torch

    logits = x.reshape(TOKENS, HIDDEN).double() @ weight.t()
    if "sigmoid" in name or "softplus" in name:
        scores = logits.sigmoid() if "sigmoid" in name else torch.nn.functional.softplus(logits).sqrt()
        chosen = scores.gather(1, indices)
        chosen = chosen / chosen.sum(dim=1, keepdim=True)
    elif "before" in name:
        chosen = logits.softmax(dim=1).gather(1, indices)
    else:
        chosen = logits.gather(1, indices).softmax(dim=1)
    return chosen * FAMILIES[name].get("moe_router_topk_scaling_factor", 1.0)


def scores_of(name: str, made: Any, x: Any) -> Any:
    """What its experts are chosen by."""
    import torch

    logits = made.gating(x).reshape(TOKENS, EXPERTS)
    if "sigmoid" in name:
        scores = torch.sigmoid(logits.float())
        return scores if made.expert_bias is None else scores + made.expert_bias
    if "softplus" in name:
        return torch.nn.functional.softplus(logits.float()).sqrt()
    return logits.softmax(dim=1) if "before" in name else logits


def cases() -> Iterator[tuple[str, str, Any]]:
    known = inspect.getsource(inspect.unwrap(here.router.topk_routing_with_score_function))
    for name, changed in FAMILIES.items():
        if changed.get("moe_router_score_function", "") not in known:
            continue
        for dtype in ("fp32", "fp64"):
            yield name, dtype, made_router(**changed, moe_router_dtype=dtype)


@behaviour
def the_code_decides_which_patches_are_applied_and_the_static_check_agrees() -> None:
    records = {record.patch.id: record for record in here.activation.patches.records()}
    taught = {f"megatron.router.{name}" for name in ("remember-router", "ask", "ask-in-groups", "ask-without-groups")}
    for name, record in records.items():
        expected = "superseded" if here.asks and name in taught else "verified"
        assert record.state.value == expected, (name, record.state, record.detail)
        superseded = [note for note in here.static[name] if note.startswith("superseded")]
        assert bool(superseded) == (expected == "superseded"), (name, here.static[name])
        assert not any(note.startswith(("drifted", "not installed")) for note in here.static[name]), here.static[name]
    assert taught < records.keys()
    assert not hasattr(here.router.topk_routing_with_score_function, "__wrapped__") or not here.asks
    assert here.activation.report()["patches"]


@behaviour
def a_megatron_that_an_image_has_patched_is_recognised() -> None:
    (record,) = [
        each for each in here.activation.patches.records() if each.patch.id == "megatron.router.select-experts"
    ]
    assert (f"the replay of {here.image}' image" in record.detail.replace("'s", "'")) == bool(here.image), record.detail
    assert ("it is off, and passes the decision on" in record.detail) == bool(here.image), record.detail
    if here.image:
        with asked_of_the_image() as asked, deciding(replaying(arbitrary())):
            assert made_router()(inputs())[1].equal(as_map(arbitrary()))
        assert len(asked) == 1, "its replay is in the way of the decision, and lets it through"


@behaviour
def a_router_asks_once_and_says_what_it_would_choose() -> None:
    import torch

    for name, dtype, made in cases():
        recording = Recording()
        with deciding(recording):
            _, routing_map = made(inputs())
        asked = recording.only
        assert asked.router is made
        assert asked.topk == TOPK
        assert asked.scores.requires_grad
        torch.testing.assert_close(
            asked.scores, scores_of(name, made, inputs()), rtol=1e-5, atol=1e-6, check_dtype=False
        )
        assert torch.equal(as_map(asked.choice[1]), routing_map), (name, dtype)
        assert torch.equal(asked.choice[0], asked.scores.gather(1, asked.choice[1])), (name, dtype)


@behaviour
def what_was_recorded_is_replayed_bit_for_bit() -> None:
    import torch

    for name, dtype, made in cases():
        recording = Recording()
        with deciding(recording):
            natural = made(inputs())
        assert (natural[1].sum(dim=1) == TOPK).all()
        with deciding(replaying(recording.only.choice[1])):
            replayed = made(inputs())
        for one, other in zip(natural, replayed, strict=True):
            assert one.dtype == other.dtype, (name, dtype)
            assert torch.equal(one, other), (name, dtype)


@behaviour
def arbitrary_experts_are_taken_exactly() -> None:
    import torch

    for name, dtype, made in cases():
        with deciding(replaying(arbitrary())):
            probs, routing_map = made(inputs())
        assert torch.equal(routing_map, as_map(arbitrary())), (name, dtype)
        assert torch.equal(probs != 0, as_map(arbitrary())), (name, dtype)


@behaviour
def experts_outside_of_the_natural_groups_keep_their_weights() -> None:
    """Where groups are without bias, the scores of other groups are hidden: -inf, unless it is asked before that."""
    import torch

    for name in IN_GROUPS_WITHOUT_BIAS:
        made = made_router(**FAMILIES[name])
        recording = Recording()
        with deciding(recording):
            made(inputs())
        size = EXPERTS // GROUPS["moe_router_num_groups"]
        natural = [set(row) for row in (recording.only.choice[1] // size).tolist()]
        outside = [set(row) - groups for row, groups in zip((arbitrary() // size).tolist(), natural, strict=True)]
        assert sum(map(bool, outside)) > TOKENS // 2, "the test must leave the natural groups"
        with deciding(replaying(arbitrary())):
            probs, routing_map = made(inputs())
        chosen = probs.gather(1, arbitrary())
        assert torch.isfinite(probs).all(), name
        assert (chosen > 0).all(), name
        assert (routing_map.sum(dim=1) == TOPK).all(), name
        torch.testing.assert_close(
            chosen.double(), formula(name, made.weight.detach().double(), inputs(), arbitrary()), rtol=1e-4, atol=1e-6
        )


@behaviour
def weights_are_of_the_current_logits_and_so_is_their_gradient() -> None:
    import torch

    factors = torch.randn(TOKENS, TOPK, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for name, dtype, made in cases():
        before = None
        for _ in range(2):  # the second time with other weights
            made.weight.grad = None
            weight = made.weight.detach().double().requires_grad_()
            expected = formula(name, weight, inputs(), arbitrary())
            (expected * factors).sum().backward()
            with deciding(replaying(arbitrary())):
                probs, _ = made(inputs())
            found = probs.gather(1, arbitrary())
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6, msg=f"{name} {dtype}")
            (found * factors).sum().backward()
            assert made.weight.grad.abs().max() > 1e-3, (name, dtype)
            torch.testing.assert_close(
                made.weight.grad.double(), weight.grad, rtol=1e-3, atol=1e-4, msg=f"{name} {dtype}"
            )
            assert before is None or not torch.allclose(before, found), (name, dtype)
            before = found.detach()
            made.weight.data.mul_(1.5)


@behaviour
def a_plugin_may_call_top_k_and_megatrons_routing_itself() -> None:
    """Neither is a decision of the router."""
    import torch

    for changed in (FAMILIES["softmax after"], FAMILIES["groups, sigmoid"]):
        made = made_router(**changed)
        inner = []

        def decide(router: Any, scores: Any, topk: int, choose: Any, inner: Any = inner, changed: Any = changed) -> Any:
            inner.append(torch.topk(scores, topk, dim=1).indices)
            keywords = {name.removeprefix("moe_router_"): value for name, value in changed.items()}
            keywords.pop("pre_softmax", None)
            inner.append(here.router.topk_routing_with_score_function(scores, topk, **keywords)[1])
            inner.append(choose()[1])
            return replaying(arbitrary())(router, scores, topk, choose)

        with deciding(decide):
            _, routing_map = made(inputs())
        assert len(inner) == 3
        assert torch.equal(as_map(inner[0]), as_map(inner[2])) == ("moe_router_num_groups" not in changed)
        assert torch.equal(inner[1], as_map(inner[2]))
        assert torch.equal(routing_map, as_map(arbitrary()))


@behaviour
def after_an_exception_nobody_asks_for_the_router_that_failed() -> None:
    import torch

    def fail(*question: Any) -> None:
        raise KeyError("on purpose")

    for changed in (FAMILIES["sigmoid"], FAMILIES["groups, sigmoid"]):
        made = made_router(**changed)
        natural = made(inputs())
        with deciding(fail), pytest.raises(KeyError, match="on purpose"):
            made(inputs())
        with pytest.raises(RuntimeError, match="shape"):
            made.routing(torch.zeros(1, 1, EXPERTS + 1))
        made.score_function = "unknown"
        with pytest.raises(ValueError, match="unknown"):
            made(inputs())
        made.score_function = "sigmoid"
        logits = made.gating(inputs()).reshape(TOKENS, EXPERTS).detach()
        recording = Recording()
        with deciding(recording):
            torch.topk(logits, TOPK, dim=1)
            here.utils.group_limited_topk(logits, TOPK, TOKENS, EXPERTS, 4, 2)
            for grouped in ({}, {"num_groups": 4, "group_topk": 2}):
                here.router.topk_routing_with_score_function(logits, TOPK, **grouped)
            assert recording.questions == [], "these are of no router"
            assert torch.equal(made(inputs())[1], natural[1])
        assert recording.only


@behaviour
def dropping_tokens_and_the_auxiliary_loss_ask_nobody() -> None:
    """They call top-k too. The auxiliary loss sees the natural choice, the counter of the expert bias the replayed."""
    import torch

    made = made_router(
        **FAMILIES["sigmoid with bias"],
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_expert_capacity_factor=EXPERTS / TOPK,  # room for all: none is dropped, and top-k is called
        moe_z_loss_coeff=0.001,
    ).train()
    made.set_layer_number(None)  # else it logs the losses, each Megatron in its own way
    seen = []
    natural_loss = here.router.switch_load_balancing_loss_func

    def loss(**keywords: Any) -> Any:
        seen.append(keywords["tokens_per_expert"].clone())
        return natural_loss(**keywords)

    # Only the scores count for it, not the bias.
    natural = as_map(torch.topk(made.gating(inputs()).reshape(TOKENS, EXPERTS), TOPK, dim=1).indices)
    recording = Recording()

    def decide(router: Any, scores: Any, topk: int, choose: Any) -> Any:
        recording(router, scores, topk, choose)
        return replaying(arbitrary())(router, scores, topk, choose)

    here.router.switch_load_balancing_loss_func = loss
    try:
        with deciding(decide):
            probs, routing_map = made(inputs())
    finally:
        here.router.switch_load_balancing_loss_func = natural_loss
    probs.sum().backward()
    assert recording.only
    assert torch.equal(routing_map, as_map(arbitrary()))
    assert [counts.long().tolist() for counts in seen] == [natural.sum(dim=0).tolist()]
    assert made.local_tokens_per_expert.long().tolist() == as_map(arbitrary()).sum(dim=0).tolist()
    assert made.local_tokens_per_expert.long().tolist() != natural.sum(dim=0).tolist()


@behaviour
def padding_that_is_spread_evenly_does_not_turn_an_experts_bias() -> None:
    """The counter sees rows of padding as well; what counts for the bias is who is above the mean."""
    import torch

    from miles_plugins.r3_replay.shards import spread
    from miles_plugins.r3_replay.trace import Routing

    made = made_router(**FAMILIES["sigmoid with bias"])
    updates = []
    for padding in (0, 4, 32):
        rows = spread(torch.arange(padding), Routing(layers=(0,), topk=TOPK, experts=EXPERTS))[:, 0].long()
        indices = torch.cat([arbitrary(), rows])
        made.local_tokens_per_expert.zero_()
        with deciding(replaying(indices)):
            made(torch.cat([inputs(), inputs(9)[:padding]]))
        counted = made.local_tokens_per_expert.clone()
        assert counted.sum() == (TOKENS + padding) * TOPK
        updated = here.utils.get_updated_expert_bias(counted, made.expert_bias, 1.0)
        updates.append((updated - made.expert_bias).round().tolist())
    assert updates[0] == updates[1] == updates[2]
    assert {-1.0, 1.0} <= set(updates[0])


def made_model(recompute: bool = False, **changed: Any) -> Any:
    """A GPTModel of two MoE layers with shared experts and a draft head (MTP)."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = configuration(
        **FAMILIES["sigmoid with bias"],
        moe_shared_expert_intermediate_size=HIDDEN,
        mtp_num_layers=1,
        mtp_loss_scaling_factor=0.1,
        **(full if recompute else {}),
        **changed,
    )
    torch.manual_seed(3)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    model = GPTModel(
        config,
        spec,
        vocab_size=32,
        max_sequence_length=TOKENS,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.train()


def loss_of(model: Any, seed: int = 0) -> Any:
    import torch

    tokens = torch.randint(0, 32, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(1, 1, TOKENS, TOKENS).triu(1).bool()
    return model(tokens, torch.arange(TOKENS)[None], mask, labels=tokens, loss_mask=torch.ones(1, TOKENS)).sum()


def routers_of(model: Any) -> list[Any]:
    """In order: two of the decoder, one of the draft head."""
    routers = {name: module for name, module in model.named_modules() if isinstance(module, here.router.TopKRouter)}
    assert len(routers) == 3
    assert next(reversed(routers)).startswith("mtp.")
    return list(routers.values())


@behaviour
def the_draft_heads_router_chooses_for_itself() -> None:
    import torch

    from miles_plugins.r3_replay.replay import Replay

    model = made_model()
    *of_decoder, draft = routers_of(model)
    replay = Replay([model], [0, 1])
    assert [replay.is_bound(router) for router in (*of_decoder, draft)] == [True, True, False]
    natural: dict[Any, Any] = {}

    def decide(router: Any, scores: Any, topk: int, choose: Any) -> Any:
        natural[router] = choose()[1]
        return replaying(arbitrary())(router, scores, topk, choose) if replay.is_bound(router) else None

    with deciding(decide):
        loss_of(model).backward()
    assert natural.keys() == {*of_decoder, draft}
    for router in of_decoder:
        assert torch.equal(router.local_tokens_per_expert, as_map(arbitrary()).sum(dim=0).float())
    assert torch.equal(draft.local_tokens_per_expert, as_map(natural[draft]).sum(dim=0).float())
    assert not torch.equal(as_map(natural[draft]), as_map(arbitrary()))
    assert all(router.weight.grad.abs().max() > 0 for router in (*of_decoder, draft))


@behaviour
def recomputed_layers_replay_their_own_microbatch_and_are_counted_once() -> None:
    """Two microbatches in flight, as in a pipeline: both forwards, then both backwards."""
    import torch

    from miles_plugins.microbatch import Microbatch, current_microbatch, set_current

    def decide(router: Any, scores: Any, topk: int, choose: Any) -> Any:
        microbatch = current_microbatch()
        assert microbatch is not None
        asked.append((microbatch.values["seed"], microbatch.recomputing))
        return replaying(microbatch.values[router])(router, scores, topk, choose)

    gradients, counts = [], []
    for recompute in (False, True):
        model, asked, losses = made_model(recompute), [], []
        for seed in (0, 1):
            microbatch = Microbatch({}, torch.arange(TOKENS))
            microbatch.values["seed"] = seed
            for number, router in enumerate(routers_of(model)):
                microbatch.values[router] = arbitrary(10 * number + seed)
            set_current(microbatch)
            with deciding(decide):
                losses.append(loss_of(model, seed))
        set_current(None)
        with deciding(decide):
            for loss in losses:
                loss.backward()
        first = [(0, False)] * 3 + [(1, False)] * 3
        assert asked == first + ([(0, True)] * 3 + [(1, True)] * 3 if recompute else [])
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        counts.append([router.local_tokens_per_expert.tolist() for router in routers_of(model)])
    expected = [
        sum(as_map(arbitrary(10 * number + seed)).sum(dim=0) for seed in (0, 1)).tolist() for number in range(3)
    ]
    assert counts == [expected, expected]
    for without, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, without)


@behaviour
def shared_experts_are_added_whatever_is_replayed() -> None:
    import torch

    layer = made_model().decoder.layers[0].mlp
    x = inputs()
    with deciding(replaying(arbitrary())):
        found, _ = layer(x)
        probs, _ = layer.router(x)

    def through(module: Any) -> Any:
        hidden = torch.nn.functional.gelu(x[:, 0] @ module.linear_fc1.weight.t())
        return hidden @ module.linear_fc2.weight.t()

    each = torch.stack([through(expert) for expert in layer.experts.local_experts], dim=1)  # [tokens, experts, hidden]
    expected = (each * probs[..., None]).sum(dim=1) + through(layer.shared_experts)
    assert math.isclose(probs.sum().item(), TOKENS, rel_tol=1e-4)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-3, atol=1e-4)


@behaviour
def two_features_that_decide_are_refused() -> None:
    from miles_plugins.errors import PatchError

    if here.asks:
        with pytest.raises(PatchError, match="two features want to decide") as caught:
            made_router(moe_enable_routing_replay=True)
        assert "--moe-enable-routing-replay" in caught.value.facts["other"]
        from megatron.core.transformer.moe.router_replay import RouterReplay

        RouterReplay.global_router_replay_instances.clear()
    if here.image:
        with replay_of_the_image(), pytest.raises(PatchError, match="two features want to decide") as caught:
            made_router()
        assert "image" in caught.value.facts["other"]
        assert made_router() is not None


@contextmanager
def asked_of_the_image() -> Iterator[list[str]]:
    """A list that grows by each top-k that goes through the image's own replay."""
    if here.image == "miles":
        from miles.utils.replay_base import routing_replay_manager as owner

        name = "get_topk_fn"
    else:
        from slime.utils import routing_replay as owner

        name = "get_routing_replay_compute_topk"
    asked: list[str] = []
    original = getattr(owner, name)

    def counting(compute_topk: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        through = original(compute_topk, *args, **kwargs)
        return lambda *args, **kwargs: (asked.append(name), through(*args, **kwargs))[1]

    setattr(owner, name, counting)
    try:
        yield asked
    finally:
        setattr(owner, name, original)


@contextmanager
def replay_of_the_image() -> Iterator[None]:
    """slime switches it on in the environment, miles in its manager."""
    if here.image == "miles":
        from miles.utils.replay_base import routing_replay_manager as manager

        manager.enabled = True
        try:
            yield
        finally:
            manager.enabled = False
        return
    from slime.utils.routing_replay import RoutingReplay

    os.environ["ENABLE_ROUTING_REPLAY"] = "1"
    try:
        yield
    finally:
        os.environ["ENABLE_ROUTING_REPLAY"] = "0"
        RoutingReplay.all_routing_replays.clear()


@behaviour
def a_run_whose_environment_switches_the_images_replay_on_does_not_start() -> None:
    from miles_plugins.errors import PatchError

    if here.image != "slime":
        return
    here.activation.patches.undo()
    stock = dict(vars(here.router))
    with replay_of_the_image(), pytest.raises(PatchError, match="two features want to decide") as caught:
        here.activation.patches.apply()
    assert "ENABLE_ROUTING_REPLAY" in caught.value.facts["other"]
    assert "slime.utils.routing_replay" in caught.value.facts["other"]
    assert dict(vars(here.router)) == stock, "nothing stays changed"
    here.activation.patches.apply()


def natural_outputs() -> list[Any]:
    """Of every kind of router, and of a model with its gradients."""
    found = [output.detach() for _, _, made in cases() for output in made(inputs())]
    model = made_model(recompute=True)
    loss_of(model).backward()
    return [*found, *(parameter.grad for parameter in model.parameters())]


def snapshot() -> dict[tuple[str, str], Any]:
    """Everything in Megatron's modules, and in the classes that are patched."""
    modules = {name: vars(module) for name, module in sys.modules.items() if name.partition(".")[0] == "megatron"}
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    owners = [
        *modules.items(),
        *((each.__name__, vars(each)) for each in (here.router.TopKRouter, CheckpointWithoutOutput)),
    ]
    return {(owner, name): value for owner, namespace in owners for name, value in namespace.items()}


def differing(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> set[tuple[str, str]]:
    changed = {key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)}
    return {key for key in changed if key[1] not in ("__dict__", "__weakref__")}  # made anew at each look


def made_gpt(**changed: Any) -> Any:
    """A GPT of Megatron's local layers, its experts in a SequentialMLP."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    torch.manual_seed(0)
    return GPTModel(
        config=configuration(**changed),
        transformer_layer_spec=get_gpt_layer_local_spec(EXPERTS, False, normalization="RMSNorm"),
        vocab_size=32,
        max_sequence_length=16,
        position_embedding_type="rope",
    )


def trained_on(model: Any) -> tuple[Any, dict[str, Any]]:
    """Its logits for some tokens, and the gradient of each parameter."""
    import torch

    model.zero_grad()
    tokens = torch.arange(16).unsqueeze(0) % 7
    mask = torch.ones(1, 1, 16, 16).triu(1).bool()
    logits = model(tokens, torch.arange(16).unsqueeze(0), mask)
    logits.square().sum().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@behaviour
def experts_compute_with_the_weights_that_a_plugin_gives_also_when_they_are_recomputed() -> None:
    import torch

    from miles_plugins.linears import offer

    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    for changed in ({}, recompute):
        plain, model = made_gpt(**changed), made_gpt(**changed)
        natural, _ = trained_on(plain)
        offer(here.activation.plugins, SimpleNamespace(), [model], "actor")  # type: ignore[arg-type]
        for factor in (1, 2):  # the second time the weights are others, as after an optimizer step
            for own, other in zip(model.parameters(), plain.parameters(), strict=True):
                own.data.mul_(factor)
                other.data.copy_(own)
            for name, parameter in plain.named_parameters():
                if ".experts." in name:
                    parameter.data.copy_(rounded([parameter.data])[0])
            logits, gradients = trained_on(model)
            expected, expected_gradients = trained_on(plain)
            assert torch.equal(logits, expected)
            assert not torch.equal(logits, natural)
            experts = [name for name in gradients if ".experts." in name]
            assert len(experts) == 2 * 2 * EXPERTS
            assert any(gradients[name].any() for name in experts)
            assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


@behaviour
def experts_compute_on_the_grid_of_the_int4_plugin_the_same_when_they_are_recomputed() -> None:
    import torch

    from miles_plugins.int4_qat import plugin as int4
    from miles_plugins.int4_qat.checkpoint import Format
    from miles_plugins.int4_qat.grid import Grid, fake_quantise
    from miles_plugins.int4_qat.selection import Selection
    from miles_plugins.linears import offer
    from miles_plugins.manager import Installed, Plugin, Plugins

    plugins = Plugins([Plugin(Installed("int4_qat", "miles-plugins", "0", None), int4)])
    bf16 = {"params_dtype": torch.bfloat16, "bf16": True}
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    results = []
    for changed in (bf16, {**bf16, **recompute}):
        model, plain = made_gpt(**changed), made_gpt(**changed)
        grid = Grid(8)  # HIDDEN is one group
        places = frozenset((str(layer), "experts") for layer in range(len(model.decoder.layers)))
        int4._selection, int4._grid = Selection(Format(8), frozenset(), places), grid
        int4._role, int4._complete = "actor", False
        int4._layers.clear()
        int4._places.clear()
        offer(plugins, SimpleNamespace(int4_other_passes=[]), [model], "actor")  # type: ignore[arg-type]
        assert int4._places == dict.fromkeys(places, 2 * EXPERTS)
        on_grid = 0
        for name, parameter in plain.named_parameters():
            if ".experts." in name:
                parameter.data.copy_(fake_quantise(parameter.data, grid))
                on_grid += 1
        assert on_grid == len(int4._layers) == 2 * 2 * EXPERTS
        int4.pass_begins("train", [model])  # which requires that all places were found
        results.append(trained_on(model))
        int4.pass_ends("train", None)
        # Once, however often recomputed; and none of an expert that got no token.
        assert {layer.quantized for layer in int4._layers} - {0} == {1}
        expected, expected_gradients = trained_on(plain)
        assert torch.equal(results[-1][0], expected)
        assert all(torch.equal(results[-1][1][name], expected_gradients[name]) for name in expected_gradients)
    (kept, kept_gradients), (recomputed, recomputed_gradients) = results
    assert torch.equal(kept, recomputed)
    assert kept_gradients.keys() == recomputed_gradients.keys()
    assert all(torch.equal(kept_gradients[name], recomputed_gradients[name]) for name in kept_gradients)
    int4._selection = int4._grid = None


def multiplying(weigh: bool, seen: dict[str, list[Any]]) -> Any:
    """A plugin whose product is the layer's own, of all layers but the output's, and that notes what each was given."""
    import torch

    from miles_plugins import hookimpl
    from miles_plugins.manager import Installed, Plugin, Plugins

    def forward_linear(linear: Any) -> Any:
        def product(x: Any, weights: Any, rows: Any) -> Any:
            seen.setdefault(linear.name, []).append(x)
            pairs = zip(x.split(list(rows)), weights, strict=True)
            return torch.cat([part @ weight.t() for part, weight in pairs])

        return None if linear.layer is None else product

    def weigh_expert_outputs() -> bool:
        return weigh

    module = ModuleType("multiplying")
    hooks = {each.__name__: hookimpl(each) for each in (forward_linear, weigh_expert_outputs)}
    vars(module).update(__file__="", **hooks)
    return Plugins([Plugin(Installed("multiplying", "tests", "0", None), module)])


@behaviour
def layers_compute_the_product_that_a_plugin_gives_with_their_own_gradients() -> None:
    import torch

    from miles_plugins.linears import offer

    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    for changed in ({}, recompute):
        expected, expected_gradients = trained_on(made_gpt(**changed))
        given: dict[bool, dict[str, list[Any]]] = {False: {}, True: {}}
        for weigh, seen in given.items():
            model = made_gpt(**changed)
            offer(multiplying(weigh, seen), SimpleNamespace(), [model], "actor")  # type: ignore[arg-type]
            logits, gradients = trained_on(model)
            assert len(seen) >= 2 * (2 + 2)
            if not weigh:
                assert torch.equal(logits, expected)
                assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)
            assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
            assert gradients["decoder.layers.0.mlp.router.weight"].any()
            for name, gradient in gradients.items():
                assert torch.allclose(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4), name
        first = "decoder.layers.0.mlp.experts.local_experts"  # of the first layer the inputs are otherwise the same
        sums = [
            sum(float(xs[0].abs().sum()) for name, xs in seen.items() if name.startswith(first) and "fc2" in name)
            for seen in given.values()
        ]
        # Weighed before, they were smaller by the probabilities: 1 / TOPK on average.
        assert 0 < sums[0] < 0.5 * sums[1]


@behaviour
def without_a_plugin_nothing_is_touched_and_undone_is_as_before() -> None:
    import torch

    patches = here.activation.patches
    with_patches = natural_outputs()
    patches.undo()
    stock, without_patches = snapshot(), natural_outputs()
    assert all(torch.equal(one, other) for one, other in zip(with_patches, without_patches, strict=True))
    assert getattr(made_router(), "router_replay", None) is None
    of_megatron = {key: value for key, value in stock.items() if "megatron" in str(getattr(value, "__module__", ""))}
    files = {key: getattr(value, "__code__", None) and value.__code__.co_filename for key, value in of_megatron.items()}
    ours = [key for key, file in files.items() if file and Path(file).is_relative_to(ROOT / "miles_plugins")]
    assert ours == []
    assert {"router" in str(record.patch.id) for record in here.without_plugin.patches.records()} == {False}
    here.without_plugin.patches.apply()  # recomputation only, which the host asked for
    assert not {key for key in differing(stock, snapshot()) if "moe" in key[0] or key[0] == "TopKRouter"}
    here.without_plugin.patches.undo()
    assert differing(stock, snapshot()) == set()
    patches.apply()  # now after the import, where the first time was before
    changed = {name for _, name in differing(stock, snapshot())}
    assert {"__init__", "checkpoint"} <= changed
    taught = {"routing", "topk_routing_with_score_function", "group_limited_topk", "torch"}
    assert taught & changed == (set() if here.asks else taught)
    assert all(torch.equal(one, other) for one, other in zip(natural_outputs(), without_patches, strict=True))
    patches.undo()
    assert differing(stock, snapshot()) == set()


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_on_every_megatron(name: str, reported: dict[str, str]) -> None:
    assert reported[name] == "", reported[name]


@pytest.mark.parametrize(
    ("patch", "file", "definition"),
    [
        ("remember-router", "router.py", '    def routing(self, logits: torch.Tensor):\n        """Top-k'),
        ("ask", "moe_utils.py", "def topk_routing_with_score_function("),
        ("ask-in-groups", "moe_utils.py", "def group_limited_topk("),
        ("ask-without-groups", "moe_utils.py", "\nimport torch\n"),
    ],
    ids=["remember-router", "ask", "ask-in-groups", "ask-without-groups"],
)
def test_what_an_old_megatron_must_have_is_missed_before_the_launch(
    patch: str, file: str, definition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from miles_plugins.errors import PatchError
    from miles_plugins.patches.megatron.router import SEAMS
    from miles_plugins.patching import check_statically

    folder = own_moe(unpacked_wheel("megatron-core", "0.15.3"), tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "megatron", raising=False)  # the check is of what a new process would find
    (declared,) = [each for seam in SEAMS for each in seam.patches if each.id == f"megatron.router.{patch}"]
    assert check_statically(declared) == []
    path = folder / MOE / file
    text = path.read_text()
    assert text.count(definition) == 1
    path.write_text(
        text.replace(definition, definition.replace("def ", "def no_").replace("torch\n", "torch.nn as nn\n"))
    )
    with pytest.raises(PatchError, match="does not fit") as caught:
        check_statically(declared)
    assert declared.target in str(caught.value)


def run() -> None:
    folder, asks, image = sys.argv[1:]
    prepare(folder, json.loads(asks), image)
    found = {}
    for name, function in BEHAVIOURS.items():
        try:
            function()
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    run()
