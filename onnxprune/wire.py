"""The message of a model file without its weights, and where in the file these lie: they are mapped, not parsed.

Only the frame of protobuf's wire format is read here: keys and lengths. Whatever is odd about it is left to protobuf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

LEAST = 1024  # bytes of weights that are worth leaving out
MOST = 10_000_000  # fields that are looked at
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # in ModelProto, GraphProto, TensorProto


class Bytes(Protocol):
    """A file in memory: bytes or a map."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: slice, /) -> bytes: ...


class Field(NamedTuple):
    """One field of a message: its number, and where its key, its content and what follows it start."""

    number: int
    counted: bool
    start: int
    content: int
    end: int


def without_weights(data: Bytes) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """The message, and {initializer of the main graph that lost its raw data: (offset, length)}."""
    places: dict[int, tuple[int, int]] = {}
    try:
        budget = [MOST]
        graphs = [f for f in _fields(data, 0, len(data), budget) if f.number == GRAPH]
        if len(graphs) != 1 or not graphs[0].counted:
            return data[:], {}
        graph = graphs[0]
        parts: list[bytes] = []
        last, count = graph.content, 0
        for tensor in _fields(data, graph.content, graph.end, budget):
            if tensor.number != INITIALIZER or not tensor.counted:
                continue
            count += 1
            if tensor.end - tensor.content < LEAST:
                continue
            raw = [f for f in _fields(data, tensor.content, tensor.end, budget) if f.number == RAW_DATA]
            if len(raw) != 1 or not raw[0].counted or raw[0].end - raw[0].content < LEAST:
                continue
            rest = data[tensor.content : raw[0].start] + data[raw[0].end : tensor.end]
            parts += [data[last : tensor.start], _framed(INITIALIZER, rest)]
            last = tensor.end
            places[count - 1] = raw[0].content, raw[0].end - raw[0].content
    except ValueError:  # protobuf has the last word on what is wrong
        return data[:], {}
    parts.append(data[last : graph.end])
    return data[: graph.start] + _framed(GRAPH, b"".join(parts)) + data[graph.end :], places


def _fields(data: Bytes, start: int, end: int, budget: list[int]) -> Iterator[Field]:
    """The fields of the message in this range. Raises ValueError where it is none, or too long."""
    while start < end:
        budget[0] -= 1
        key, content = _number(data, start)
        kind = key & 7
        if kind == 2:
            length, content = _number(data, content)
            stop = content + length
        elif kind == 0:
            stop = _number(data, content)[1]
        elif kind in (1, 5):
            stop = content + (8 if kind == 1 else 4)
        else:
            raise ValueError
        if stop > end or budget[0] < 0:
            raise ValueError
        yield Field(key >> 3, kind == 2, start, content, stop)
        start = stop


def _number(data: Bytes, start: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends. Raises ValueError."""
    value = 0
    for k, byte in enumerate(data[start : start + 10]):
        value |= (byte & 127) << 7 * k
        if byte < 128:
            return value, start + k + 1
    raise ValueError


def _framed(number: int, content: bytes) -> bytes:
    """A field with its key and length."""
    length, size = bytearray(), len(content)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | 2]) + bytes(length) + content
