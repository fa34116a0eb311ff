"""Recorded routing on the wire: narrow, self-describing, and refused when a single bit of it changed.

One base64 text: a header of 32 bytes, then the expert ids in C order, one byte each up to 256 experts, else two. The
header carries the shape and an xxHash of all the rest, because a flipped bit usually is another valid expert id.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

from miles_plugins.errors import PluginError

if TYPE_CHECKING:
    import torch

MAGIC = b"R3-rows1"
SHAPE = struct.Struct("<4I")  # bytes an id, rows, layers, top-k
DIGEST = struct.Struct("<Q")
HEADER = len(MAGIC) + SHAPE.size + DIGEST.size


def encode(experts: torch.Tensor) -> str:
    """The text for `experts`, [rows, layers, topk] uint8 or int16 on the CPU."""
    import numpy
    import pybase64

    ids = experts.contiguous().numpy()
    message = _scratch(HEADER + ids.nbytes)
    message[HEADER:] = ids.reshape(-1).view(numpy.uint8).data
    described = MAGIC + SHAPE.pack(ids.itemsize, *ids.shape)
    message[:HEADER] = described + _digest(described, message[HEADER:])
    return pybase64.b64encode_as_string(message)


_of_thread = threading.local()


def _scratch(size: int) -> memoryview:
    """Memory to put a message together in, the same each time: to be given fresh pages costs more than to encode."""
    if len(getattr(_of_thread, "memory", b"")) < size:
        _of_thread.memory = bytearray(size)
    return memoryview(_of_thread.memory)[:size]


def decode(text: str, origin: str = "a response") -> torch.Tensor:
    """What `encode` was given: [rows, layers, topk] uint8 or int16, in memory of its own.

    Args:
        origin: how an error names where the text is from.

    Raises:
        PluginError: it is not a text that `encode` made, or not wholly.
    """
    import binascii

    import numpy
    import pybase64
    import torch

    try:
        message = pybase64.b64decode_as_bytearray(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise _refused(origin, f"{str(text)[:16]!r}… is no base64: {error}") from error
    described = bytes(message[: HEADER - DIGEST.size])
    if len(message) < HEADER or not described.startswith(MAGIC):
        raise _refused(origin, f"{len(message)} bytes that begin with {bytes(message[: len(MAGIC)])!r}")
    itemsize, rows, layers, topk = SHAPE.unpack_from(message, len(MAGIC))
    if itemsize not in (1, 2) or len(message) != HEADER + itemsize * rows * layers * topk:
        raise _refused(origin, f"{len(message)} bytes for {rows} x {layers} x {topk} ids of {itemsize} bytes")
    ids = numpy.frombuffer(message, dtype=numpy.uint8 if itemsize == 1 else numpy.int16, offset=HEADER)
    if _digest(described, ids.data) != bytes(message[HEADER - DIGEST.size : HEADER]):
        raise _refused(origin, "its checksum is wrong: it was changed or cut on the way")
    return torch.from_numpy(ids).reshape(rows, layers, topk)


def _digest(described: bytes, ids: memoryview) -> bytes:
    import xxhash

    digest = xxhash.xxh3_64(described)
    digest.update(ids)
    return DIGEST.pack(digest.intdigest())


def _refused(origin: str, found: str) -> PluginError:
    return PluginError(
        f"the routing in {origin} cannot be read",
        {"found": found, "expected": "what r3_replay's engine side sends"},
        "the SGLang server must run the same plugin version, and nothing between may change the response",
    )
