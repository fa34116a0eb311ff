"""cpu_rehearsal: what stands in for CUDA, TransformerEngine and NCCL gives the numbers that they would give."""

from __future__ import annotations

import functools
import inspect
import sys
from argparse import Namespace
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import ArgumentError
from miles_plugins.cpu_rehearsal import plugin as cpu
from miles_plugins.patches.megatron import cpu as megatron_cpu
from miles_plugins.patches.slime import cpu as slime_cpu
from miles_plugins.patches.slime.cpu import transformer_engine_name
from miles_plugins.patches.torch import cpu as torch_cpu
from miles_plugins.patches.torch.cpu import device_mode, on_cpu
from miles_plugins.patching import PatchSet, State

torch = pytest.importorskip("torch")


def never(*args, **kwargs):
    pytest.fail("the original was called")


# -- attention over packed sequences ---------------------------------------------------------------------------------


def slow_attention(query, key, value, bounds, scale):
    """Token by token, head by head, in float64."""
    tokens, heads, size = query.shape
    per_group = heads // key.shape[1]
    output = torch.zeros(tokens, heads, size, dtype=torch.float64)
    for begin, end in pairwise(bounds):
        for token in range(begin, end):
            for head in range(heads):
                keys = key[begin : token + 1, head // per_group].double()
                values = value[begin : token + 1, head // per_group].double()
                weights = (keys @ query[token, head].double() * scale).softmax(dim=0)
                output[token, head] = weights @ values
    return output.reshape(tokens, -1)


def packed(*bounds: int):
    return SimpleNamespace(cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sampled_from([(4, 4), (4, 2), (4, 1), (1, 1)]),
    st.sampled_from([0.5, 1.0]),
)
def test_packed_attention_is_attention_within_each_sequence(lengths, heads, scale):
    bounds = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    generator = torch.Generator().manual_seed(sum(lengths))
    query, key, value = (
        torch.randn(bounds[-1], number, 3, generator=generator) for number in (heads[0], heads[1], heads[1])
    )
    attention = SimpleNamespace(softmax_scale=scale)
    found = megatron_cpu.packed_attention(never, attention, query, key, value, None, packed_seq_params=packed(*bounds))
    assert found.shape == (bounds[-1], heads[0] * 3)
    expected = slow_attention(query, key, value, bounds, scale)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_packed_attention_keeps_sequences_apart_in_the_gradient_too():
    query, key, value = (torch.randn(5, 2, 4, requires_grad=True) for _ in range(3))
    attention = SimpleNamespace(softmax_scale=0.5)
    arguments = (never, attention, query, key, value, None)
    megatron_cpu.packed_attention(*arguments, packed_seq_params=packed(0, 2, 5))[:2].sum().backward()
    assert value.grad[:2].abs().sum() > 0
    assert value.grad[2:].abs().sum() == 0
    assert key.grad[2:].abs().sum() == 0


def test_an_empty_sequence_is_no_sequence():
    query, key, value = (torch.randn(4, 2, 3) for _ in range(3))
    attention = SimpleNamespace(softmax_scale=1.0)
    arguments = (never, attention, query, key, value, None)
    one = megatron_cpu.packed_attention(*arguments, packed_seq_params=packed(0, 2, 4))
    two = megatron_cpu.packed_attention(*arguments, packed_seq_params=packed(0, 2, 2, 4, 4))
    assert torch.equal(one, two)


def test_attention_over_unpacked_sequences_is_megatrons_own():
    calls = []
    result = megatron_cpu.packed_attention(
        lambda *args, **kwargs: calls.append((args, kwargs)) or "own", "self", "q", "k", "v", "mask", "x", bias="b"
    )
    assert result == "own"
    assert calls == [(("self", "q", "k", "v", "mask", "x"), {"bias": "b"})]


# -- Megatron's other local modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [torch.tensor([1, 2]), [1, 2], None], ids=["tensor", "numbers", "none"])
def test_split_sizes_become_numbers(sizes):
    expected = None if sizes is None else [1, 2]
    calls = []
    assert (
        megatron_cpu.split_sizes_as_numbers(lambda *args: calls.append(args), "ctx", "group", "input", sizes, sizes)
        is None
    )
    assert calls == [("ctx", "group", "input", expected, expected)]
    assert calls[0][3] is None or all(type(size) is int for size in calls[0][3])


@pytest.mark.parametrize("parallel", [True, False])
def test_the_norm_works_under_sequence_parallelism(parallel):
    config = SimpleNamespace(sequence_parallel=parallel, eps=1e-5)

    def original(cls, config, hidden_size, eps=1e-5):
        assert not config.sequence_parallel, "as Megatron asserts"
        return torch.nn.LayerNorm(hidden_size, eps)

    norm = megatron_cpu.norm_under_sequence_parallelism(original, object, config, 4, eps=1e-3)
    assert norm.eps == 1e-3
    assert [getattr(each, "sequence_parallel", False) for each in norm.parameters()] == [parallel] * 2
    assert config.sequence_parallel is parallel, "the model's own configuration stays"


def test_what_a_pipeline_stage_sends_stays_whole_when_megatron_empties_it():
    sent = []
    received = torch.empty(3)
    output = torch.arange(3.0, requires_grad=True) * 2
    answer = megatron_cpu.send_a_copy(
        lambda **kwargs: sent.append(kwargs) or {"send_next": "request"},
        tensor_send_next=output,
        tensor_recv_prev=received,
        group="pp",
    )
    output.data = torch.empty(1)
    assert answer == {"send_next": "request"}
    assert sent[0].pop("tensor_send_next").tolist() == [0.0, 2.0, 4.0]
    assert sent[0].pop("tensor_recv_prev") is received, "what arrives must arrive in Megatron's own buffer"
    assert sent == [{"group": "pp"}]


def test_a_pipeline_stage_that_sends_nothing_sends_nothing():
    sent = []
    megatron_cpu.send_a_copy(lambda **kwargs: sent.append(kwargs), tensor_send_next=None, group="pp")
    assert sent == [{"tensor_send_next": None, "group": "pp"}]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gate_is_a_matrix_product_in_the_routers_type(with_bias, dtype):
    dtype = getattr(torch, dtype)
    inp = torch.randn(3, 4, dtype=torch.bfloat16)
    weight = torch.randn(8, 4, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(8, dtype=torch.bfloat16) if with_bias else None
    logits = megatron_cpu.gate(never, inp, weight, bias, dtype)
    assert logits.dtype == dtype
    expected = inp.to(dtype) @ weight.to(dtype).t() + (bias.to(dtype) if with_bias else 0)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert weight.grad.dtype == torch.bfloat16


# -- parameter names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "offset", "expected"),
    [
        (
            "module.decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight",
            4,
            "module.decoder.layers.3.mlp.experts.linear_fc1.weight5",
        ),
        (
            "decoder.layers.10.mlp.experts.local_experts.12.linear_fc2.weight",
            0,
            "decoder.layers.10.mlp.experts.linear_fc2.weight12",
        ),
        (
            "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.bias",
            8,
            "decoder.layers.0.mlp.experts.linear_fc2.bias8",
        ),
        (
            "module.decoder.layers.2.input_layernorm.weight",
            4,
            "module.decoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
        ),
        (
            "module.mtp.layers.0.transformer_layer.input_layernorm.weight",
            0,
            "module.mtp.layers.0.transformer_layer.self_attention.linear_qkv.layer_norm_weight",
        ),
        (
            "module.mtp.layers.0.transformer_layer.mlp.experts.local_experts.1.linear_fc1.weight",
            4,
            "module.mtp.layers.0.transformer_layer.mlp.experts.linear_fc1.weight5",
        ),
    ],
)
def test_local_names_become_transformer_engines(name, offset, expected):
    assert transformer_engine_name(name, offset) == expected


@pytest.mark.parametrize(
    "name",
    [
        "module.decoder.layers.3.mlp.router.weight",
        "decoder.layers.3.pre_mlp_layernorm.weight",
        "decoder.final_layernorm.weight",
        "embedding.word_embeddings.weight",
        "decoder.layers.3.self_attention.linear_qkv.weight",
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.3.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.3.mlp.experts.linear_fc1.weight5",
        "output_layer.weight",
    ],
)
def test_other_names_stay(name):
    assert transformer_engine_name(name, 4) == name


@pytest.mark.parametrize(
    ("world", "rank", "experts", "to_global", "expected"),
    [(2, 1, 8, True, 5), (1, 0, 8, True, 1), (4, 3, 8, True, 7), (2, 1, None, True, 1), (2, 1, 8, False, 1)],
)
def test_experts_are_named_by_their_global_index(monkeypatch, world, rank, experts, to_global, expected):
    core = ModuleType("megatron.core")
    core.mpu = SimpleNamespace(
        get_expert_model_parallel_world_size=lambda: world, get_expert_model_parallel_rank=lambda: rank
    )
    monkeypatch.setitem(sys.modules, "megatron", ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    names = ["a.mlp.experts.local_experts.1.linear_fc1.weight", "b"]

    def original(args, model, convert_to_global_name, *rest):
        assert convert_to_global_name is to_global
        return ((name, object()) for name in names)

    found = slime_cpu.named_params_and_buffers(original, Namespace(num_experts=experts), [], to_global)
    assert [name for name, _ in found] == [f"a.mlp.experts.linear_fc1.weight{expected}", "b"]


# -- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_device", "expected"),
    [
        ("cuda", "cpu"),
        ("cuda:3", "cpu"),
        (torch.device("cuda"), torch.device("cpu")),
        (torch.device("cuda", 1), torch.device("cpu")),
        ("cpu", "cpu"),
        ("meta", "meta"),
        (torch.device("meta"), torch.device("meta")),
        (None, None),
        (torch.float32, torch.float32),
    ],
)
def test_every_cuda_device_becomes_the_cpu(given_device, expected):
    assert on_cpu(given_device) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(2, device="cuda"),
        lambda: torch.zeros(2, device="cuda:1"),
        lambda: torch.tensor([1, 2], device=torch.device("cuda", 0)),
        lambda: torch.full((2,), 1.0, device="cuda", pin_memory=False),
        lambda: torch.empty(2, pin_memory=True),
        lambda: torch.empty_like(torch.ones(2), device="cuda"),
        lambda: torch.ones(2).new_zeros(2, device="cuda"),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.ones(2).to("cuda", torch.float64),
        lambda: torch.ones(2).to(device="cuda", dtype=torch.float64, non_blocking=True),
        lambda: torch.ones(2).to(torch.device("cuda:7")),
        lambda: torch.arange(2, device="cuda"),
        lambda: torch.nn.Linear(2, 2, device="cuda").weight,
        lambda: torch.nn.Linear(2, 2).to("cuda").weight,
    ],
)
def test_what_is_made_on_cuda_is_made_on_the_cpu(make):
    with device_mode():
        made = make()
    assert made.device == torch.device("cpu")
    assert not made.is_pinned() if torch.cuda.is_available() else True


def test_the_mode_changes_nothing_else():
    with device_mode():
        assert torch.ones(2, device="meta").device.type == "meta"
        assert torch.ones(2).to(torch.float64).dtype == torch.float64
        assert torch.ones(2).to(torch.zeros(1, dtype=torch.int64)).dtype == torch.int64
    with pytest.raises((AssertionError, RuntimeError)):
        torch.empty(1, device="cuda" if not torch.cuda.is_available() else "cuda:99")


def test_tensor_type_names_are_cudas():
    type_of = torch.Tensor.type
    tensor = torch.ones(2)
    assert torch_cpu.cuda_type_names(type_of, tensor) == "torch.cuda.FloatTensor"
    assert torch_cpu.cuda_type_names(type_of, tensor.bfloat16()) == "torch.cuda.BFloat16Tensor"
    assert torch_cpu.cuda_type_names(type_of, tensor, "torch.cuda.DoubleTensor").dtype == torch.float64
    assert torch_cpu.cuda_type_names(type_of, tensor, torch.int64).dtype == torch.int64
    assert torch_cpu.cuda_type_names(type_of, tensor, "torch.HalfTensor").dtype == torch.float16


TORCH_PATCHES = [
    patch for seam in torch_cpu.SEAMS for patch in seam.patches if patch.target.partition(":")[0].startswith("torch")
]


def test_tensor_type_names_are_not_prefixed_twice():
    """Under a function mode torch looks the method up again and gets the patched one."""
    patches = PatchSet(*(patch for patch in TORCH_PATCHES if patch.id == "torch.cpu.tensor-type"), name="test")
    patches.apply()
    try:
        with device_mode():
            assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    finally:
        patches.undo()
    assert torch.ones(2).type() == "torch.FloatTensor"


def test_every_patch_of_torch_applies_and_comes_off_again(monkeypatch):
    ours = torch_cpu.Stream, torch_cpu.Event
    for name in ("Stream", "Event"):  # whatever undo does to them, the other tests find them again
        monkeypatch.setattr(torch_cpu, name, getattr(torch_cpu, name))
    patches = PatchSet(*TORCH_PATCHES, name="test")
    before = torch.cuda.set_device, torch.cuda.Stream, torch.Tensor.cuda, torch.distributed.new_group
    patches.apply()
    try:
        assert {record.state for record in patches.records()} == {State.VERIFIED}
        torch.cuda.set_device(3)
        assert torch.ones(2).cuda().pin_memory().device.type == "cpu"
        assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
        assert torch.cuda.current_device() == torch.device("cpu")
        assert not torch.cuda.is_available(), "whoever asks first keeps its own CPU path"
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().synchronize()
    finally:
        patches.undo()
    assert before == (torch.cuda.set_device, torch.cuda.Stream, torch.Tensor.cuda, torch.distributed.new_group)
    assert ours == (torch_cpu.Stream, torch_cpu.Event), "undo takes upstream's names back, not our own module's"


def test_the_answers_for_cuda_can_all_be_given():
    """Each is an attribute that this torch has, and calling the answer as upstream does gives a value."""
    for name, answer in torch_cpu.ANSWERS.items():
        assert hasattr(torch.cuda, name), name
        if not isinstance(answer, type):
            answer()
    stream = torch_cpu.Stream()
    with stream:
        event = stream.record_event()
    stream.wait_event(event)
    stream.wait_stream(stream)
    event.synchronize()
    assert stream.query()
    assert event.query()
    assert event.elapsed_time(event) == 0.0


def test_unknown_torchvision_operators_are_skipped_and_others_registered():
    registered = torch_cpu.known_operators(lambda op, *args: f"registered {op}", "torchvision::nothing_of_that_name")
    assert registered(never) is never
    assert torch_cpu.known_operators(lambda op, *args: f"registered {op}", "mylib::op") == "registered mylib::op"
    assert torch_cpu.known_operators(lambda op, *args: "registered", never) == "registered"


# -- process groups --------------------------------------------------------------------------------------------------


def helper(group_size, group_rank, global_ranks_in_group, backend, store, group_name, pg_options=None, device_id=None):
    return inspect.currentframe().f_locals


@pytest.mark.parametrize("form", ["positions", "names"])
def test_every_process_group_is_gloos(form):
    arguments = {"group_size": 2, "group_rank": 0, "global_ranks_in_group": [], "backend": "nccl", "store": "s"}
    arguments |= {"group_name": "g", "pg_options": "nccl's", "device_id": 3}
    given_arguments = (tuple(arguments.values()), {}) if form == "positions" else ((), arguments)
    found = torch_cpu.gloo_group(helper, *given_arguments[0], **given_arguments[1])
    assert str(found["backend"]) == "gloo"
    assert (found["pg_options"], found["device_id"]) == (None, None)
    assert (found["group_size"], found["store"], found["group_name"]) == (2, "s", "g")


def test_torchs_own_helper_takes_what_is_set():
    """The function is torch's private one; what is set there by name must exist."""
    parameters = inspect.signature(torch.distributed.distributed_c10d._new_process_group_helper).parameters
    assert "backend" in parameters
    assert {"backend_options", "pg_options"} & set(parameters)


def test_a_group_by_name_is_gloos():
    def new_group(ranks=None, timeout=None, backend=None, pg_options=None):
        return ranks, timeout, backend, pg_options

    assert torch_cpu.gloo_group(new_group, [0, 1], backend="nccl", pg_options=1, timeout=2) == ([0, 1], 2, "gloo", None)


@pytest.mark.parametrize("name", ["init_process_group", "new_group"])
def test_a_group_by_position_is_gloos(name):
    """`torch.distributed.init_process_group("nccl")` is the usual form."""
    original = getattr(torch.distributed, name)
    order = list(inspect.signature(original).parameters)
    at = order.index("backend")

    @functools.wraps(original)
    def record(*args, **kwargs):
        return inspect.signature(original).bind(*args, **kwargs).arguments

    found = torch_cpu.gloo_group(record, *[None] * at, "nccl")
    assert found["backend"] == "gloo"


# -- the plugin ------------------------------------------------------------------------------------------------------


def arguments(**changed) -> Namespace:
    return Namespace(
        **{
            "colocate": False,
            "offload_train": False,
            "use_critic": False,
            "offload_rollout": False,
            "transformer_impl": "local",
            "distributed_backend": "gloo",
            "context_parallel_size": 1,
            "moe_grouped_gemm": False,
            **changed,
        }
    )


def test_arguments_that_fit():
    cpu.configure(arguments())
    cpu.configure(arguments(sglang_device="cpu", fp8=None))


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"colocate": True}, "--colocate"),
        ({"offload_train": True}, "--offload-train"),
        ({"offload_rollout": True}, "--offload-rollout"),
        ({"transformer_impl": "transformer_engine"}, "--transformer-impl"),
        ({"distributed_backend": "nccl"}, "--distributed-backend"),
        ({"sglang_device": "cuda"}, "--sglang-device"),
        ({"fp8": "e4m3"}, "--fp8-format"),
        ({"context_parallel_size": 2}, "--context-parallel-size"),
        ({"moe_grouped_gemm": True}, "--moe-grouped-gemm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_need_a_gpu_are_refused(changed, flag):
    with pytest.raises(ArgumentError, match="cpu_rehearsal cannot work") as caught:
        cpu.configure(arguments(**changed))
    assert list(caught.value.facts) == [flag]


def test_the_default_flags_pass_the_plugins_own_check():
    flags = cpu.default_flags()
    assert flags[flags.index("--transformer-impl") + 1] == "local"
    assert flags[flags.index("--distributed-backend") + 1] == "gloo"
    assert flags[flags.index("--sglang-device") + 1] == "cpu"


@pytest.mark.parametrize(
    ("role", "engine", "training"), [("driver", True, True), ("worker", True, False), ("trainer", False, True)]
)
def test_the_environment_of_each_role(role, engine, training):
    environment = cpu.process_environment(role)
    assert ("SGLANG_USE_CPU_ENGINE" in environment) is engine
    assert ("CUDA_DEVICE_MAX_CONNECTIONS" in environment) is training
    assert all(isinstance(value, str) for value in environment.values())


def test_evidence_is_shown_on_both_sides():
    assert all(cpu.probe(role) for role in cpu.SIDES)
    assert cpu.probe("driver") is None
    assert cpu.choose_device() == "cpu"
