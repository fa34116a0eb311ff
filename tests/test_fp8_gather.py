"""Weights quantised before they are gathered: the same bytes as after, and half as many on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from miles_plugins.errors import UpstreamError  # noqa: E402
from miles_plugins.fp8_unified import plugin, travel  # noqa: E402
from miles_plugins.fp8_unified.blockwise import Format, Quantised, quantise_weight  # noqa: E402
from miles_plugins.fp8_unified.checkpoint import Declared  # noqa: E402
from miles_plugins.fp8_unified.chosen import Chosen  # noqa: E402
from miles_plugins.patches.slime import gather  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WORLD = 2
FORMAT = Format()
ARGS = Namespace(kv_channels=128, num_query_groups=2, num_attention_heads=4)


def same(found: Any, expected: Any) -> bool:
    codes = torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    return codes and torch.equal(found.scale_inv, expected.scale_inv)


def random_weight(n: int, k: int, seed: int = 0) -> Any:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 400), st.sampled_from(["float32", "power_of_two"]), st.integers(0, 99))
def test_a_parameter_comes_back_as_its_codes_and_scales(n: int, k: int, scale: Any, seed: int) -> None:
    weight, format = random_weight(n, k, seed), Format(scale=scale)
    (woven,) = travel.encode([weight], format)
    assert tuple(woven.shape) == travel.shape_of((n, k), format)
    ((name, found),) = travel.decode(f"{n}.weight", woven, lambda tensor: [("a.weight", tensor)], format)
    assert name == "a.weight"
    assert same(found, quantise_weight(weight, format))


@pytest.mark.parametrize(
    ("name", "dim", "joined"),
    [
        ("self_attention.linear_proj", 1, lambda parts: torch.cat(parts, dim=1)),
        ("self_attention.linear_q_up_proj", 0, lambda parts: torch.cat(parts, dim=0)),
        # gate and up of each rank, then of all
        ("mlp.linear_fc1", 0, lambda parts: torch.cat([p.chunk(2)[half] for half in (0, 1) for p in parts])),
        ("mlp.experts.linear_fc2", 1, lambda parts: torch.cat(parts, dim=1)),
    ],
)
def test_parts_of_ranks_join_into_what_the_whole_weight_gives(name: str, dim: int, joined: Any) -> None:
    parts = [random_weight(256, 256, rank) for rank in range(3)]
    assert travel.fits(ARGS, f"decoder.layers.0.{name}", (256, 256), dim, FORMAT)
    woven = joined(travel.encode(parts, FORMAT))
    ((_, found),) = travel.decode(name, woven, lambda tensor: [("a.weight", tensor)], FORMAT)
    assert same(found, quantise_weight(joined(parts), FORMAT))


@pytest.mark.parametrize(
    ("name", "shape", "dim", "expected"),
    [
        ("mlp.linear_fc1", (256, 100), None, True),
        ("mlp.linear_fc1", (128, 128), None, False),  # gate and up would share a tile
        ("mlp.linear_fc2", (100, 192), 1, False),  # a tile would lie on two ranks
        ("mlp.linear_fc2", (100, 192), None, True),
        ("self_attention.linear_q_up_proj", (192, 128), 0, False),
        ("self_attention.linear_qkv", (512, 256), 0, True),
        ("self_attention.linear_qkv", (640, 256), 0, False),  # with a gate, or no whole group
        ("self_attention.linear_kv_down_proj", (576, 256), None, False),
    ],
)
def test_what_has_whole_tiles_on_each_rank_can_travel(name: str, shape: Any, dim: Any, expected: bool) -> None:
    assert travel.fits(ARGS, f"decoder.layers.0.{name}", shape, dim, FORMAT) is expected


def test_heads_that_are_no_whole_tiles_cannot_travel() -> None:
    narrow = Namespace(kv_channels=64, num_query_groups=2, num_attention_heads=4)
    assert not travel.fits(narrow, "decoder.layers.0.self_attention.linear_qkv", (512, 256), None, FORMAT)


def test_the_plugin_says_by_name_and_shape_what_travels_as_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    places = frozenset({("3", "experts"), ("3", "attention")})
    found = Chosen(Declared(FORMAT), frozenset({"a", "b"}), places, layers=8)
    monkeypatch.setattr(plugin, "_chosen", found)

    def asked(name: str, shape: Any = (256, 256), dtype: Any = torch.bfloat16, **others: Any) -> Any:
        args = Namespace(**{**vars(ARGS), "fp8_gather": "fp8", **others})
        return plugin.encode_for_gathering(args, name, shape, dtype, None)

    expert = "decoder.layers.3.mlp.experts.linear_fc1.weight12"
    assert asked(expert) is asked("decoder.layers.3.self_attention.linear_proj.weight") is not None
    assert asked(expert).shape((256, 300)) == travel.shape_of((256, 300), FORMAT)
    assert asked(expert, fp8_gather="bf16") is None
    assert asked(expert, dtype=torch.float32) is None
    assert asked(expert, (128, 256)) is None
    assert asked("decoder.layers.4.mlp.experts.linear_fc1.weight12") is None  # in BF16 in the checkpoint
    assert asked("decoder.layers.3.mlp.router.weight") is None
    assert asked("decoder.layers.3.self_attention.linear_qkv.bias") is None

    weight = random_weight(256, 256)
    (woven,) = asked(expert).encode([weight])

    def convert(tensor: Any) -> Any:
        return [("a.weight", tensor[:128]), ("b.weight", tensor[128:])]

    named = dict(plugin.decode_gathered(Namespace(), expert, woven, convert))
    for name, part in (("a", weight[:128]), ("b", weight[128:])):
        pair = Quantised(named[f"{name}.weight"], named[f"{name}.weight_scale_inv"])
        assert same(pair, quantise_weight(part, FORMAT))


def test_a_converter_that_does_more_than_to_pick_rows_is_refused() -> None:
    (woven,) = travel.encode([random_weight(256, 256)], FORMAT)
    wrong = {
        "turned.weight": lambda tensor: [("turned.weight", tensor.t())],
        "torn.weight": lambda tensor: [("torn.weight", tensor[64:192])],
        "cut.weight": lambda tensor: [("cut.weight", tensor[:, :128])],
    }
    for name, convert in wrong.items():
        with pytest.raises(UpstreamError, match=name):
            travel.decode(name, woven, convert, FORMAT)


def test_rows_that_a_converter_takes_by_turns_are_found() -> None:
    """As query, key and value are of slime's Qwen3: a view, a split and a reshape."""
    weight = random_weight(8 * 128, 256)
    (woven,) = travel.encode([weight], FORMAT)
    seen = []

    def convert(tensor: Any) -> Any:
        seen.append(tensor)
        parts = torch.split(tensor.view(2, -1, 128, 256), [2, 1, 1], dim=1)
        return [(f"{name}.weight", part.reshape(-1, 256)) for name, part in zip("qkv", parts, strict=True)]

    for layer in (31, 32):
        found = travel.decode(f"turns.{layer}.linear_qkv.weight", woven, convert, FORMAT)
        for (_, pair), (_, part) in zip(found, convert(weight), strict=True):
            assert same(pair, quantise_weight(part.contiguous(), FORMAT))
    numbers = [tensor for tensor in seen if tensor.dtype == torch.int32]
    assert [each.untyped_storage().nbytes() for each in numbers] == [4 * 8 * 128]  # once, and one column in memory

    def strict(tensor: Any) -> Any:
        return [("a.weight", tensor.view(-1).view(1024, 256))]

    ((_, whole),) = travel.decode("strict.weight", woven, strict, FORMAT)
    assert same(whole, quantise_weight(weight, FORMAT))


class CountingEncoding:
    """One byte of each row; counts what is encoded together."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode(self, parameters: Any) -> Any:
        self.calls.append(len(parameters))
        return [parameter[:, :1].to(torch.uint8) for parameter in parameters]


def test_what_slime_leaves_out_of_a_walk_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = CountingEncoding()
    monkeypatch.setattr(gather, "_encoding", lambda args, name, *others: encoding if "fc" in name else None)
    monkeypatch.setattr(gather, "CHUNK", 5 * 4 * 4 * 4)
    names = [f"{layer}.{name}" for layer in range(4) for name in ("fc", "norm", "experts.fc1", "experts.fc2")]
    parameters = {f"layers.{name}": torch.nn.Parameter(torch.full((4, 4), float(i))) for i, name in enumerate(names)}
    for parameter in parameters.values():
        parameter.tensor_model_parallel = True

    def walk(experts: bool) -> Any:
        for name, parameter in gather._encoded(Namespace(), parameters.items()):
            if (".experts." in name) == experts:
                yield name, parameter

    for experts, expected in ((False, 4), (True, 8)):
        encoding.calls.clear()
        held = list(walk(experts))  # as slime v0.3.0's deltas do
        assert not encoding.calls
        for name, parameter in held:
            assert parameter.tensor_model_parallel
            assert not hasattr(parameter, "parallel_mode")
            for _ in range(2):
                assert parameter.data[0, 0] == parameters[name].data[0, 0]
        assert sum(encoding.calls) == expected > len(encoding.calls)
        batches = {id(each._batch): each._batch for _, each in held if isinstance(each, gather._Awaiting)}
        assert sum(batch._done is not None for batch in batches.values()) == 1  # of the others nothing is kept
        encoding.calls.clear()
        for _, parameter in walk(experts):
            assert parameter.data is not None
        assert sum(encoding.calls) == expected


@pytest.fixture(scope="module")
def answers(upstream_path: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What slime's own functions have gathered, on each of two ranks with tensor and expert parallelism."""
    folder = tmp_path_factory.mktemp("gather")
    own = {name: value for name, value in os.environ.items() if not name.startswith("MILES_PLUGINS")}
    alone = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TQDM_DISABLE": "1"}
    environment = {**own, **alone, "PYTHONPATH": os.pathsep.join([upstream_path, str(ROOT)])}
    script = str(ROOT / "tests" / "parallel" / "gathering.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(WORLD), str(folder / "store"), str(folder / f"{rank}.json")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for rank in ranks:
            _, complaints = rank.communicate(timeout=400)
            assert rank.returncode == 0, complaints[-4000:]
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.upstream
@pytest.mark.parametrize("way", ["over_nccl", "colocated"])
def test_slimes_own_gathering_gives_the_same_bytes_with_half_of_them_on_the_way(
    answers: list[dict[str, Any]], way: str
) -> None:
    after, before = answers[0][f"{way} bf16"], answers[0][f"{way} fp8"]
    assert before[0] == after[0]
    fp8 = [name for name, what in after[0].items() if "float8" in what]
    assert len(fp8) == 2 * (4 + 3 * 4)  # attention, and four experts, of two layers
    assert {name.replace(".weight", ".weight_scale_inv") for name in fp8} <= after[0].keys()
    sent = {gather: sum(each[f"{way} {gather}"][1].get(kind, 0) for each in answers) for gather, kind in KINDS.items()}
    # What travels is one byte an element and four for each block of 128; experts and attention alike.
    still = sum(each[f"{way} fp8"][1].get("torch.bfloat16", 0) for each in answers)
    assert sent["fp8"] / (sent["bf16"] - still) == pytest.approx(132 / 256)
    assert still < 0.1 * sent["bf16"]  # embeddings, the head, norms and routers


KINDS = {"bf16": "torch.bfloat16", "fp8": "torch.uint8"}


@pytest.mark.upstream
def test_colocated_every_rank_has_all_of_it(answers: list[dict[str, Any]]) -> None:
    ways = [answers[0]["colocated fp8"], answers[1]["colocated fp8"], answers[0]["over_nccl fp8"]]
    quantised = [{name: what for name, what in found.items() if "_proj" in name} for found, _ in ways]
    assert len(quantised[0]) == 2 * 2 * (4 + 3 * 4)
    assert quantised[0] == quantised[1] == quantised[2]
