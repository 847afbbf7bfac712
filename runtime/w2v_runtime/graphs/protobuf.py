"""Read the protocol buffers wire format without trust: fields as spans of bytes, without a copy.

Source: https://protobuf.dev/programming-guides/encoding/. Refused, since no ONNX file needs them, are groups, varints
above 64 bits, and more fields than any graph of a speech model has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

VARINT: Final = 0
FIXED64: Final = 1
LENGTH: Final = 2
FIXED32: Final = 5
_FIXED_BYTES: Final = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT_BYTES: Final = 10
_MAX_NUMBER: Final = (1 << 29) - 1
#: The most fields that are read; a graph of 5000 nodes has about 100 000. A field of 2 bytes takes 100 in memory.
MAX_FIELDS: Final = 1 << 18

#: Field number, wire type, and positions: first byte of the key, first byte of the value, byte after the value.
Field = tuple[int, int, int, int, int]


class WireError(ValueError):
    """The bytes are not a valid message; the text says at which byte and why."""


class Wire:
    """A serialised message, and the number of its fields that may still be read."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.fields_left = MAX_FIELDS

    def fields(self, start: int, stop: int, kinds: Mapping[int, int]) -> Iterator[Field]:
        """The fields of the message in ``content[start:stop]``, in file order.

        Args:
            start: the first byte of the message.
            stop: the byte after its last.
            kinds: required wire types by field number; other fields may have any.

        Raises:
            WireError: while iterating, at the first field that is malformed, of the wrong type, or one too many.
        """
        content = self.content
        position = start
        while position < stop:
            begin = position
            # Most varints have one byte; a call for each would nearly double the time of reading a file.
            if (key := content[position]) < 0x80:
                position += 1
            else:
                key, position = self.varint(position, stop)
            number, kind = key >> 3, key & 7
            value = position
            if kind == LENGTH:
                if position < stop and (length := content[position]) < 0x80:
                    value += 1
                else:
                    length, value = self.varint(position, stop)
                position = value + length
            elif kind == VARINT:
                if position < stop and content[position] < 0x80:
                    position += 1
                else:
                    _, position = self.varint(position, stop)
            elif kind in _FIXED_BYTES:
                position += _FIXED_BYTES[kind]
            else:
                raise WireError(f"byte {begin}: wire type {kind} is not in use")
            if position > stop:
                raise WireError(f"byte {begin}: field {number} goes beyond the end of its message")
            if not 0 < number <= _MAX_NUMBER or kinds.get(number, kind) != kind:
                raise WireError(f"byte {begin}: field {number} cannot be, or not with wire type {kind}")
            self.fields_left -= 1
            if self.fields_left < 0:
                raise WireError(f"it has more than {MAX_FIELDS} fields")
            yield number, kind, begin, value, position

    def varint(self, position: int, stop: int) -> tuple[int, int]:
        """The unsigned number at ``position`` (below 2**64), and the position after it.

        Raises:
            WireError: the number does not end before ``stop``, or takes more than 64 bits.
        """
        number = 0
        for index in range(position, min(stop, position + _MAX_VARINT_BYTES)):
            byte = self.content[index]
            number |= (byte & 0x7F) << 7 * (index - position)
            if byte < 0x80:
                if number >= 1 << 64:
                    break
                return number, index + 1
        raise WireError(f"byte {position}: a number is cut off or takes more than 64 bits")

    def signed(self, position: int, stop: int) -> int:
        """The int64 at ``position``, in two's complement as the format writes it.

        Raises:
            WireError: as :meth:`varint`.
        """
        number, _ = self.varint(position, stop)
        return number - (1 << 64) if number >= 1 << 63 else number

    def small(self, position: int, stop: int) -> int:
        """The non-negative int32 or enum value at ``position``.

        Raises:
            WireError: as :meth:`varint`; or the value is negative or above 31 bits, which readers truncate differently.
        """
        number, _ = self.varint(position, stop)
        if number >= 1 << 31:
            raise WireError(f"byte {position}: {number} is out of range")
        return number

    def packed(self, start: int, stop: int) -> list[int]:
        """The packed int64 values in ``content[start:stop]``; each counts as a field.

        Raises:
            WireError: as :meth:`varint`, or there are too many values.
        """
        values = []
        while start < stop:
            values.append(self.signed(start, stop))
            _, start = self.varint(start, stop)
            self.fields_left -= 1
            if self.fields_left < 0:
                raise WireError(f"it has more than {MAX_FIELDS} fields")
        return values

    def text(self, start: int, stop: int) -> str:
        """The string in ``content[start:stop]``.

        Raises:
            WireError: the string is not UTF-8.
        """
        try:
            return self.content[start:stop].decode()
        except UnicodeDecodeError:
            raise WireError(f"byte {start}: a string is not UTF-8") from None


def length_field(number: int, payload: bytes) -> bytes:
    """A field of wire type :data:`LENGTH` as bytes: its key, the payload's length, the payload."""
    return _varint(number << 3 | LENGTH) + _varint(len(payload)) + payload


def number_field(number: int, value: int) -> bytes:
    """A field of wire type :data:`VARINT` as bytes; ``value`` is not negative."""
    return _varint(number << 3 | VARINT) + _varint(value)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
