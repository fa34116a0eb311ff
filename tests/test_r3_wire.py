"""Routing on the wire: what comes out is what went in, bit for bit, or an error that says so."""

from __future__ import annotations

import base64
import random
import string
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plugins import PluginError
from miles_plugins.r3_replay import wire

torch = pytest.importorskip("torch")
pytest.importorskip("xxhash")

DTYPES = {"uint8": 255, "int16": 32767}
SEED = 20251011


def ids(*shape: int, dtype: str = "uint8", seed: int = 0):
    """Any ids: the wire does not know what a valid routing is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, DTYPES[dtype] + 1, shape, generator=generator).to(getattr(torch, dtype))


def same(a, b) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# -- round trip ------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 40),
    layers=st.integers(1, 9),
    topk=st.integers(1, 9),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 1000),
)
def test_what_was_encoded_is_decoded(rows, layers, topk, dtype, seed):
    original = ids(rows, layers, topk, dtype=dtype, seed=seed)
    kept = original.clone()
    assert same(wire.decode(wire.encode(original)), original)
    assert same(original, kept), "encoding reads only"


@pytest.mark.parametrize("shape", [(0, 3, 2), (0, 1, 1), (1, 1, 1), (5, 1, 1), (5, 3, 1), (5, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_shapes(shape, dtype):
    original = ids(*shape, dtype=dtype)
    assert same(wire.decode(wire.encode(original)), original)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "part",
    [
        lambda whole: whole[:, 1:4],  # the MoE layers of all
        lambda whole: whole[3:],
        lambda whole: whole[::2],
        lambda whole: whole[..., :2],
        lambda whole: whole.transpose(0, 1),
        lambda whole: whole[:1].expand(4, -1, -1),
    ],
    ids=["layers", "last rows", "every other row", "fewer experts", "transposed", "expanded"],
)
def test_what_is_not_contiguous_is_sent_in_its_own_order(part, dtype):
    original = part(ids(6, 5, 3, dtype=dtype))
    assert same(wire.decode(wire.encode(original)), original)


def test_every_id_survives():
    for dtype, most in DTYPES.items():
        original = torch.arange(most + 1, dtype=getattr(torch, dtype)).reshape(-1, 4, 2)
        assert same(wire.decode(wire.encode(original)), original)


def test_what_is_decoded_is_writable_and_its_own():
    text = wire.encode(ids(4, 3, 2))
    first, second = wire.decode(text), wire.decode(text)
    first.fill_(7)
    first[0, 0, 0] += 1
    assert same(second, ids(4, 3, 2))
    assert same(wire.decode(text), ids(4, 3, 2))


def test_json_and_http_carry_it_as_it_is():
    assert set(wire.encode(ids(64, 8, 4))) <= set(string.ascii_letters + string.digits + "+/=")


# -- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "topk", "dtype", "most"),
    [("Qwen3-30B-A3B", 48, 8, "uint8", 520), ("DeepSeek-V3", 58, 8, "uint8", 625), ("Kimi-K2", 60, 8, "int16", 1290)],
)
def test_bytes_of_a_token_on_the_wire(name, layers, topk, dtype, most):
    """A sample of 8192 tokens; as int32 of all layers, base64, Qwen3-30B-A3B takes 2048 a token."""
    assert len(wire.encode(ids(8191, layers, topk, dtype=dtype))) <= most * 8192


def test_short_samples_pay_for_the_header_once():
    assert len(wire.encode(ids(1, 1, 1))) <= 48
    assert wire.HEADER == 32


# -- anything else ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [None, "", " ", "A", "AAAA", "====", 3, 1.5, True, [], ["AAAA"], {"a": 1}, b"", "ä" * 60, "\udc80" * 60, "\0" * 60],
    ids=repr,
)
def test_what_is_no_routing_is_refused(text):
    with pytest.raises(PluginError, match="the routing in a response cannot be read"):
        wire.decode(text)
    with pytest.raises(PluginError, match="the routing in this one cannot be read"):
        wire.decode(text, "this one")


def test_what_sglang_itself_sends_is_refused_and_named():
    """base64 of int32: an engine without the plugin, which must not be taken for narrow ids."""
    of_sglang = base64.b64encode(ids(9, 3, 2).int().numpy().tobytes()).decode()
    with pytest.raises(PluginError, match="cannot be read") as caught:
        wire.decode(of_sglang)
    assert "same plugin version" in str(caught.value)
    assert "begin with" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(max_size=80), st.binary(max_size=80).map(lambda data: base64.b64encode(data).decode())))
def test_no_text_is_more_than_refused(text):
    with pytest.raises(PluginError):
        wire.decode(text)


# -- 10,000 corruptions ----------------------------------------------------------------------------------------------


def flip_bits(message: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        at = chance.randrange(8 * len(message))
        message[at // 8] ^= 1 << at % 8


def change_bytes(message: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 1, 4])):
        message[chance.randrange(len(message))] = chance.randrange(256)


def truncate(message: bytearray, chance: random.Random) -> None:
    del message[chance.randrange(len(message)) :]


def extend(message: bytearray, chance: random.Random) -> None:
    message += chance.randbytes(chance.randrange(1, 40))


def remove_inside(message: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(message))
    del message[at : at + chance.randrange(1, 9)]


def swap_blocks(message: bytearray, chance: random.Random) -> None:
    size = chance.choice([1, 2, 8, 16])
    first, second = sorted(chance.randrange(max(len(message) - 2 * size, 1)) for _ in range(2))
    second = max(second, first + size)
    message[first : first + size], message[second : second + size] = (
        message[second : second + size],
        message[first : first + size],
    )


def swap_rows(message: bytearray, chance: random.Random) -> None:
    """Two tokens' routing: as valid as before, and of other tokens."""
    itemsize, rows, layers, topk = wire.SHAPE.unpack_from(message, len(wire.MAGIC))
    size = itemsize * layers * topk
    if rows > 1:
        first, second = (wire.HEADER + size * row for row in chance.sample(range(rows), 2))
        kept = bytes(message[first : first + size])
        message[first : first + size] = message[second : second + size]
        message[second : second + size] = kept


def change_header(message: bytearray, chance: random.Random) -> None:
    fields = list(wire.SHAPE.unpack_from(message, len(wire.MAGIC)))
    fields[chance.randrange(4)] = chance.choice([0, 1, 2, 3, 4, 7, 8, 255, 2**31, 2**32 - 1])
    wire.SHAPE.pack_into(message, len(wire.MAGIC), *fields)


def reshape_header(message: bytearray, chance: random.Random) -> None:
    """Another shape of as many bytes: only the checksum can tell."""
    itemsize, *shape = wire.SHAPE.unpack_from(message, len(wire.MAGIC))
    if chance.random() < 0.5:
        chance.shuffle(shape)
    elif itemsize == 2:
        itemsize, shape[2] = 1, 2 * shape[2]
    elif shape[2] % 2 == 0:
        itemsize, shape[2] = 2, shape[2] // 2
    wire.SHAPE.pack_into(message, len(wire.MAGIC), itemsize, *shape)


def change_checksum(message: bytearray, chance: random.Random) -> None:
    begin = wire.HEADER - wire.DIGEST.size
    message[begin : wire.HEADER] = chance.choice([bytes(8), b"\xff" * 8, chance.randbytes(8)])


IN_BYTES = (
    *(flip_bits, change_bytes, truncate, extend, remove_inside, swap_blocks, swap_rows),
    *(change_header, reshape_header, change_checksum),
)


def other_character(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text))
    return text[:at] + chance.choice(string.ascii_letters + string.digits + "+/") + text[at + 1 :]


def outside_the_alphabet(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text))
    return text[:at] + chance.choice("-_.,%\0\x7fé\u2028\udc80") + text[at + chance.randrange(2) :]


def whitespace(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text) + 1)
    return text[:at] + chance.choice([" ", "\n", "\r\n", "\t", "\n" * 4, "\u00a0"]) + text[at:]


def padding(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text) + 1)
    return chance.choice([text + "=", text + "====", text.rstrip("="), text[:at] + "=" + text[at:], "=" + text])


def cut_text(text: str, chance: random.Random) -> str:
    return text[: chance.randrange(len(text))]


def doubled(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text))
    return text[: chance.choice([at, at // 4 * 4, len(text)])] + text


def url_alphabet(text: str, chance: random.Random) -> str:
    return text.translate(str.maketrans("+/", "-_"))


IN_TEXT = (other_character, outside_the_alphabet, whitespace, padding, cut_text, doubled, url_alphabet)

PAYLOADS = [
    *(ids(0, 3, 2), ids(1, 1, 1), ids(7, 4, 2), ids(6, 6, 6, seed=1), ids(16, 2, 4, seed=2)),
    *(ids(5, 3, 2, dtype="int16"), ids(9, 1, 1, dtype="int16"), ids(8, 4, 4, dtype="int16", seed=3)),
    *(ids(40, 48, 8, seed=4), ids(60, 12, 8, dtype="int16", seed=5)),
]


def another_header(message: bytearray, chance: random.Random) -> None:
    """Header and ids of two payloads: of another shape, or of the same with its own checksum."""
    itemsize, *shape = wire.SHAPE.unpack_from(message, len(wire.MAGIC))
    alike = ids(*shape, dtype={1: "uint8", 2: "int16"}[itemsize], seed=chance.randrange(10**6))
    other = base64.b64decode(wire.encode(chance.choice([*PAYLOADS, alike, alike])))
    message[: wire.HEADER] = other[: wire.HEADER]


def corrupted(text: str, way: Callable[..., object], chance: random.Random) -> str:
    if way in IN_TEXT:
        return way(text, chance)
    message = bytearray(base64.b64decode(text))
    way(message, chance)
    return base64.b64encode(message).decode()


def test_10000_corruptions_are_refused_or_change_nothing():
    chance = random.Random(SEED)
    texts = [wire.encode(payload) for payload in PAYLOADS]
    refused: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for number in range(10_000):
        which = chance.randrange(len(PAYLOADS))
        way = chance.choice([*IN_BYTES, another_header, *IN_TEXT])
        text = corrupted(texts[which], way, chance)
        changed[way.__name__] += text != texts[which]
        try:
            decoded = wire.decode(text)
        except PluginError:
            refused[way.__name__] += 1
        else:
            assert same(decoded, PAYLOADS[which]), f"corruption {number}: {way.__name__} of payload {which}"
    assert set(refused) == {way.__name__ for way in (*IN_BYTES, another_header, *IN_TEXT)}
    # Nearly every change is refused: what is left are the unused bits of the last base64 character.
    assert sum(changed.values()) > 9000
    assert sum(refused.values()) > 0.995 * sum(changed.values())


def test_each_single_bit_of_a_message_counts():
    message = base64.b64decode(wire.encode(ids(3, 2, 2)))
    for at in range(8 * len(message)):
        damaged = bytearray(message)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(PluginError):
            wire.decode(base64.b64encode(damaged).decode())
