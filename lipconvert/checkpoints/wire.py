"""Protocol buffers as they lie in a file: where the fields of a message are, found without reading what is in them.

A message is a sequence of fields, each a tag (number and wire type, a varint) and then a varint, four or eight bytes, or a
length (a varint) and as many bytes. (https://protobuf.dev/programming-guides/encoding)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

# The bytes of a message from a place, of some length: of a file by seeking, or of memory.
At = Callable[[int, int], bytes | bytearray]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# Bytes of the longest varint, which holds 64 bits.
LONGEST = 10


class Field(NamedTuple):
    """A field of a message: its number, where its tag begins, where its value begins and ends."""

    number: int
    begin: int
    start: int
    stop: int


def of_memory(text: memoryview) -> At:
    """The bytes of what has been read."""
    return lambda start, length: bytes(text[start : start + length])


def fields(at: At, start: int, stop: int, most: int) -> list[Field]:
    """The fields of the message from ``start`` to ``stop``, in their order.

    Raises `ValueError` for what is no message, and for more than ``most`` fields, at the first one too many.
    """
    found: list[Field] = []
    place = start
    while place < stop:
        if len(found) == most:
            raise ValueError(f"it has more than {most} fields")
        head = at(place, min(2 * LONGEST, stop - place))
        tag, used = _varint(head, 0)
        number, kind = tag >> 3, tag & 7
        value = place + used
        if kind == VARINT:
            end = place + _varint(head, used)[1]
        elif kind == FIXED64:
            end = value + 8
        elif kind == FIXED32:
            end = value + 4
        elif kind == BYTES:
            length, used = _varint(head, used)
            value = place + used
            end = value + length
        else:
            raise ValueError(f"there is no wire type {kind}")
        if number == 0 or end > stop:
            raise ValueError(f"field {number} does not end within it")
        found.append(Field(number, place, value, end))
        place = end
    return found


def _varint(text: bytes | bytearray, start: int) -> tuple[int, int]:
    """(number, where it ends): seven bits a byte, the lowest first, the highest bit of a byte says that more follow."""
    number = 0
    for k, byte in enumerate(text[start : start + LONGEST]):
        number |= (byte & 127) << (7 * k)
        if byte < 128:
            return number, start + k + 1
    raise ValueError("a number has no end")
