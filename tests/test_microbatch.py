"""A checkpointed function runs in the microbatch that it first ran in, whenever and wherever it runs again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plugins.microbatch import Microbatch, begin_microbatch, bind, current_microbatch, set_current


@pytest.fixture(autouse=True)
def _no_microbatch():
    set_current(None)
    yield
    set_current(None)


def microbatch(name: object = "m") -> Microbatch:
    return Microbatch({"name": name}, positions=None)


def seen() -> tuple[object, bool] | None:
    """What a router would see: the name of its microbatch, and whether it is being recomputed."""
    current = current_microbatch()
    return current and (current.batch["name"], current.recomputing)


# -- one function ----------------------------------------------------------------------------------------------------


def test_outside_of_a_pass_there_is_no_microbatch_and_nothing_to_bind():
    assert current_microbatch() is None
    assert bind(seen) is seen


@pytest.mark.parametrize("chunk", [0, 2])
def test_a_microbatch_is_the_current_one_when_it_begins_and_says_which_chunk_it_passes(chunk):
    told = []
    hook = SimpleNamespace(microbatch_begins=lambda **given: told.append((given, current_microbatch())))
    begin_microbatch(hook, "args", {"name": "m"}, "positions", *([chunk] if chunk else []))
    (given, current), *more = told
    assert more == []
    assert given == {"args": "args", "microbatch": current}
    assert (current.batch, current.positions, current.chunk) == ({"name": "m"}, "positions", chunk)
    assert current.values == {}


def test_the_first_call_is_forward_and_every_later_one_a_recomputation():
    set_current(microbatch())
    bound = bind(seen)
    assert [bound(), bound(), bound()] == [("m", False), ("m", True), ("m", True)]


def test_the_function_keeps_its_arguments_and_its_result():
    set_current(microbatch())
    assert bind(lambda *args, **kwargs: (args, kwargs))(1, 2, x=3) == ((1, 2), {"x": 3})


def test_a_recomputation_sees_its_own_microbatch_and_leaves_the_current_one():
    one, two = microbatch(1), microbatch(2)
    set_current(one)
    bound = bind(seen)
    assert bound() == (1, False)
    set_current(two)
    assert bound() == (1, True)
    assert current_microbatch() is two
    assert not one.recomputing
    set_current(None)
    assert bound() == (1, True)
    assert current_microbatch() is None


@pytest.mark.parametrize("call", [1, 2], ids=["forward", "recomputation"])
def test_an_exception_leaves_everything_as_it_was(call):
    one, two = microbatch(1), microbatch(2)
    set_current(one)
    calls = []

    def fail_at(number):
        calls.append(seen())
        if len(calls) == number:
            raise ValueError("in the layer")

    bound = bind(fail_at)
    if call == 2:
        bound(call)
    set_current(two)
    with pytest.raises(ValueError, match="in the layer"):
        bound(call)
    assert current_microbatch() is two
    assert not one.recomputing
    assert calls[-1] == (1, call == 2)


# -- nested checkpoints ----------------------------------------------------------------------------------------------


def test_what_is_nested_in_a_recomputation_is_recomputed():
    """The inner function is bound anew while the outer one is recomputed, and that first call is no forward pass."""
    one, two = microbatch(1), microbatch(2)
    inner = []

    def outer():
        inner.append(bind(seen))
        return seen(), inner[-1](), seen()

    set_current(one)
    bound = bind(outer)
    assert bound() == ((1, False),) * 3
    set_current(two)
    assert inner[0]() == (1, True)
    assert bound() == ((1, True),) * 3
    assert inner[1]() == (1, True)
    assert current_microbatch() is two
    assert not one.recomputing


def test_two_checkpoints_of_one_microbatch_do_not_disturb_each_other():
    one = microbatch(1)
    set_current(one)
    first, second = bind(seen), bind(seen)
    assert first() == (1, False)
    assert first() == (1, True)
    assert second() == (1, False), "the recomputation of one layer does not make another one's forward a recomputation"


# -- schedules -------------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw):
    """Forwards in order, each backward somewhere after its forward, in any interleaving; a subset is checkpointed."""
    count = draw(st.integers(1, 6))
    steps = [("forward", number) for number in range(count)]
    for number in range(count):
        after = steps.index(("forward", number)) + 1
        steps.insert(draw(st.integers(after, len(steps))), ("backward", number))
    checkpointed = [draw(st.booleans()) for _ in range(count)]
    return steps, checkpointed, draw(st.integers(1, 3))


def play(schedule) -> list[str]:
    """What goes wrong when a model of some layers runs a schedule."""
    steps, checkpointed, layers = schedule
    batches = [microbatch(number) for number in range(len(checkpointed))]
    functions: dict[int, list] = {}
    wrong = []
    for kind, number in steps:
        if kind == "forward":
            set_current(batches[number])
            functions[number] = [bind(seen) if checkpointed[number] else seen for _ in range(layers)]
            found = [function() for function in functions[number]]
            expected = (number, False)
        else:
            before = current_microbatch()
            found = [function() for function in functions[number][::-1]] if checkpointed[number] else []
            expected = (number, True)
            if current_microbatch() is not before:
                wrong.append(f"{kind} {number} changed the current microbatch")
        wrong += [f"{kind} {number} saw {each}" for each in found if each != expected]
    return wrong


@given(schedules())
def test_every_schedule_sees_its_own_microbatches(schedule):
    assert play(schedule) == []


def test_the_schedule_test_notices_a_cursor(monkeypatch):
    """The design that this one takes the place of: the current microbatch is whichever ran last."""
    monkeypatch.setitem(globals(), "bind", lambda function: function)
    partial = [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1)], [True, True], 1
    assert play(partial)


# -- threads ---------------------------------------------------------------------------------------------------------


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=10)


def test_another_thread_has_no_microbatch_of_its_own():
    set_current(microbatch())
    assert in_another_thread(current_microbatch) is None


def test_a_recomputation_in_another_thread_sees_its_microbatch():
    """Autograd runs the backward pass of each GPU in a thread of its own."""
    one = microbatch(1)
    set_current(one)
    bound = bind(seen)
    bound()
    set_current(microbatch(2))
    assert in_another_thread(lambda: (bound(), seen())) == ((1, True), None)
    assert seen() == (2, False)


def test_a_forward_goes_on_while_another_microbatch_is_recomputed_in_a_thread():
    one, two = microbatch(1), microbatch(2)
    inside, leave = threading.Event(), threading.Event()

    def layer(recomputed):
        if recomputed:
            inside.set()
            assert leave.wait(10)
        return seen()

    set_current(one)
    bound = bind(layer)
    assert bound(False) == (1, False)
    with ThreadPoolExecutor(1) as pool:
        recomputation = pool.submit(bound, True)
        assert inside.wait(10)
        set_current(two)
        assert bind(seen)() == (2, False)
        leave.set()
        assert recomputation.result(timeout=10) == (1, True)
    assert seen() == (2, False)


# -- with torch's own checkpoints ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_torch_recomputes_in_the_right_microbatch(reentrant):
    torch = pytest.importorskip("torch")
    from torch.utils.checkpoint import checkpoint

    record = []

    def layer(x):
        record.append(seen())
        return x.sin()

    def block(x):  # a checkpoint in a checkpoint
        return checkpoint(bind(layer), layer(x), use_reentrant=reentrant)

    losses = []
    for number in range(2):
        set_current(microbatch(number))
        x = torch.ones(3, requires_grad=True)
        losses.append(checkpoint(bind(block), x, use_reentrant=reentrant).sum())
    assert record == [(0, False)] * 2 + [(1, False)] * 2
    record.clear()
    losses[0].backward()
    assert record
    assert set(record) == {(0, True)}
    record.clear()
    losses[1].backward()
    assert set(record) == {(1, True)}
