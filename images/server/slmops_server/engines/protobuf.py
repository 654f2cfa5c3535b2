"""Protobuf's wire format, as far as a decoder's ONNX graph needs it to be read and changed (messages of onnx.proto3).

The onnx package would be ten times the size of this server for it. A file may hold weights too, so nothing is copied:
parts are views of what was given.
"""

from collections.abc import Iterable, Iterator


def every(messages: Iterable[memoryview], field: int) -> Iterator[memoryview]:
    """The messages that these hold in one field."""
    for message in messages:
        for number, value, _ in fields(message):
            if number == field and isinstance(value, memoryview):
                yield value


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """(field number, value, the field as it was written) of a message."""
    at = 0
    while at < len(data):
        begin = at
        tag, at = varint(data, at)
        number, kind = tag >> 3, tag & 7
        value: int | memoryview
        if kind == 0:
            value, at = varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(kind, 0)
            if kind == 2:
                size, at = varint(data, at)
            value = data[at : at + size]
            at += size
            if kind not in (1, 2, 5) or at > len(data):
                raise ValueError(f"the ONNX file is damaged at byte {begin}")
        yield number, value, data[begin:at]


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at a byte, and where it ends. ValueError when the file ends before."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError(f"the ONNX file ends within a number at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def encoded(value: int) -> bytes:
    """A number of at least 0 as varint reads it."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def number_field(field: int, value: int) -> bytes:
    """A field that holds a number of at least 0."""
    return encoded(field << 3) + encoded(value)


def message(field: int, data: bytes) -> bytes:
    """A field that holds a message, a text or bytes."""
    return head(field, len(data)) + data


def head(field: int, size: int) -> bytes:
    """What stands before a message of `size` bytes."""
    return encoded(field << 3 | 2) + encoded(size)
