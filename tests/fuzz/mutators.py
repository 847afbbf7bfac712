"""Changes that keep an input plausible, so that it gets past magic numbers, lengths and checksums.

Each takes ``random`` and a content and returns another; the worker mixes them with libFuzzer's own changes of bytes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import zlib
from itertools import pairwise
from random import Random
from typing import Any, Final

import targets

from w2v_runtime.graphs.protobuf import LENGTH, VARINT, Wire, WireError, length_field

_NUMBERS: Final = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, *((1 << bits) - 1 for bits in (31, 32, 63, 64)), 1 << 31)
#: Headers stand at the front, so most changes of fields are made there.
_HEAD: Final = 256
#: How often checksums are put right after a change.
_REPAIRED: Final = 0.8
_MAX_PROTOBUF_DEPTH: Final = 6
_MARK: Final = "deeply nested lists go here"
#: Between paths, at the front of a list, in the middle of a letter; and a path longer than a block.
_SEPARATORS: Final = (
    *(b"\n", b"\r\n", b"\r", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0\xd8", b"x" * 70_000),
)
_JSON_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2, 1 << 31, 1 << 64, 10**400, -(10**400), 0.5, 1e308, float("nan"), float("inf"),
    "", "a", "../x", "/etc/passwd", "onnx/model.onnx", "a\0b", "\ud800", "\x1b[2J", "é" * 300, [], {}, [[]], {"": 0},
    "random", "checkpoint", "waveform", "log-mel", "utterance", "frame", "logits", "mean", "std1", "0" * 64,
)  # fmt: skip


def audio(random: Random, content: bytes) -> bytes:
    """A change of fields, blocks or length; checksums of Ogg pages and FLAC frames are mostly put right."""
    change = random.choice((_set_number, _set_number, _set_number, _cut, _repeat, _remove, _swap, _zero, _nothing))
    changed = change(random, bytearray(content))
    if random.random() < _REPAIRED:
        changed = _repair_ogg(_repair_flac(changed))
    return bytes(changed)


def lists(random: Random, content: bytes) -> bytes:
    """A change of blocks, of separators, or of letters as another encoding writes them; the kind stays."""
    kind, content = content[:1], content[1:]
    if random.random() < 0.1:
        kind = random.choice((targets.LINES_KIND, targets.NULL_KIND))
    if random.random() < 0.5:
        return kind + bytes(random.choice((_cut, _repeat, _remove, _swap, _zero))(random, bytearray(content)))
    start, _ = _span(random, bytearray(content))
    piece = random.choice(
        (b"\n", b"\r\n", b"\r", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0\xd8", b"x" * 70_000)
    )
    return kind + content[:start] + piece + content[start:]


def _set_number(random: Random, content: bytearray) -> bytearray:
    """A field of 1 to 8 bytes, mostly in the header, gets a number that programs stumble over."""
    size = random.choice((1, 2, 3, 4, 4, 8))
    reach = min(len(content), _HEAD) if random.random() < 0.7 else len(content)
    start = random.randrange(max(1, reach))
    number = random.choice((*_NUMBERS, len(content), len(content) - 8, random.getrandbits(64))) & (1 << 8 * size) - 1
    content[start : start + size] = number.to_bytes(size, random.choice(("little", "big")))
    return content


def _cut(random: Random, content: bytearray) -> bytearray:
    return content[: random.randrange(len(content) + 1)]


def _span(random: Random, content: bytearray) -> tuple[int, int]:
    start = random.randrange(len(content) + 1)
    return start, min(len(content), start + random.choice((1, 2, 4, 8, 32, 128, 512, 2048)))


def _repeat(random: Random, content: bytearray) -> bytearray:
    start, stop = _span(random, content)
    return content[:stop] + content[start:stop] * random.choice((1, 1, 2, 8)) + content[stop:]


def _remove(random: Random, content: bytearray) -> bytearray:
    start, stop = _span(random, content)
    return content[:start] + content[stop:]


def _swap(random: Random, content: bytearray) -> bytearray:
    start, stop = _span(random, content)
    at = random.randrange(len(content) + 1)
    return content[:at] + content[start:stop] + content[at + stop - start :]


def _zero(random: Random, content: bytearray) -> bytearray:
    start, stop = _span(random, content)
    content[start:stop] = bytes([random.choice((0, 0xFF))]) * (stop - start)
    return content


def _nothing(_: Random, content: bytearray) -> bytearray:
    return content


def _crc_table(polynomial: int, bits: int) -> list[int]:
    """Bytewise table of a CRC that shifts left."""
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 else 0)
            value &= (1 << bits) - 1
        table.append(value)
    return table


#: Of Ogg pages (RFC 3533, section 6) and of a FLAC frame and its header (RFC 9639, section 9).
_CRC32: Final = _crc_table(0x04C11DB7, 32)
_CRC16: Final = _crc_table(0x8005, 16)
_CRC8: Final = _crc_table(0x07, 8)


def _crc(table: list[int], bits: int, content: bytes | bytearray) -> int:
    value, mask = 0, (1 << bits) - 1
    for byte in content:
        value = (value << 8 ^ table[value >> bits - 8 ^ byte]) & mask
    return value


def _repair_ogg(content: bytearray) -> bytearray:
    """The checksum of each page, where it is whole."""
    for match in re.finditer(rb"OggS", bytes(content)):
        start = match.start()
        if len(content) < start + 27 or len(content) < start + 27 + content[start + 26]:
            break
        stop = start + 27 + content[start + 26] + sum(content[start + 27 : start + 27 + content[start + 26]])
        if stop <= len(content):
            content[start + 22 : start + 26] = bytes(4)
            content[start + 22 : start + 26] = _crc(_CRC32, 32, content[start:stop]).to_bytes(4, "little")
    return content


def _repair_flac(content: bytearray) -> bytearray:
    """The checksums of each frame, taken to reach from one sync code to the next."""
    if content[:4] != b"fLaC":
        return content
    starts = [match.start() for match in re.finditer(rb"\xff[\xf8\xf9]", bytes(content[42:]))]
    edges = [42 + start for start in starts] + [len(content)]
    for start, stop in pairwise(edges):
        check = start + _flac_header_size(content[start:stop])
        if check + 3 < stop:
            content[check] = _crc(_CRC8, 8, content[start:check])
            content[stop - 2 : stop] = _crc(_CRC16, 16, content[start : stop - 2]).to_bytes(2, "big")
    return content


def _flac_header_size(frame: bytearray) -> int:
    """Bytes of a frame's header before its checksum: the number is coded as in UTF-8, size and rate may follow."""
    if len(frame) < 5:
        return len(frame)
    ones = 8 - (frame[4] ^ 0xFF).bit_length()
    size, rate = frame[2] >> 4, frame[2] & 0x0F
    return 4 + max(1, ones) + {6: 1, 7: 2}.get(size, 0) + {12: 1, 13: 2, 14: 2}.get(rate, 0)


def bundle(random: Random, content: bytes) -> bytes:
    """A change of one field of a manifest or a graph; the kind stays."""
    kind, content = content[:1], content[1:]
    if kind == targets.MANIFEST_KIND:
        try:
            return kind + _change_json(random, content)
        except RecursionError:
            return kind + content
    if kind == targets.GRAPH_KIND:
        return kind + _change_message(random, content, 0)
    return random.choice((targets.MANIFEST_KIND, targets.GRAPH_KIND)) + content


def journal(random: Random, content: bytes) -> bytes:
    """A change of one line of a journal, or of the order of lines; checksums are mostly put right."""
    lines = content.split(b"\n")
    line = random.randrange(len(lines))
    match random.randrange(8):
        case 0:
            del lines[line]
        case 1:
            lines.insert(random.randrange(len(lines) + 1), lines[line])
        case 2:
            lines[line] = bytes(_changed_bytes(random, lines[line]))
        case _:
            with contextlib.suppress(RecursionError):
                lines[line] = _change_json(random, lines[line])
            if random.random() < _REPAIRED and b'"crc32"' in lines[line]:
                lines[line] = _repair_line(lines[line])
    return b"\n".join(lines)


def _repair_line(line: bytes) -> bytes:
    """A line of a journal with the checksum of what it says."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        data = json.loads(line)
        data.pop("crc32", None)
        text = json.dumps(data, separators=(",", ":")).encode()
        return text[:-1] + b',"crc32":%d}' % zlib.crc32(text)
    return line


def _change_json(random: Random, content: bytes) -> bytes:
    """Replace, remove, repeat, rename or nest a value anywhere in a manifest."""
    try:
        data = json.loads(content)
    except ValueError:
        return content
    holders = list(_holders(data))
    if not holders:
        return json.dumps(random.choice(_JSON_VALUES)).encode()
    holder = random.choice(holders)
    keys = list(range(len(holder))) if isinstance(holder, list) else list(holder)
    key = random.choice(keys)
    match random.randrange(6):
        case 0 | 1:
            holder[key] = copy.deepcopy(random.choice(_JSON_VALUES))
        case 2:
            del holder[key]
        case 3:
            other = random.choice(holders)
            holder[key] = json.loads(
                json.dumps(other if random.random() < 0.3 else random.choice(list(_values(other))))
            )
        case 4 if isinstance(holder, dict):
            holder[random.choice(("", "x", "fp32", "path", str(random.random())))] = holder[key]
        case _:
            depth = random.choice((1, 10, 100, 900, 950, 970, 990, 100_000))
            holder[key] = _MARK
            return json.dumps(data).replace(json.dumps(_MARK), "[" * depth + "]" * depth, 1).encode()
    text = json.dumps(data)
    return (text if random.random() < 0.9 else text[: random.randrange(len(text))]).encode()


def _holders(data: Any) -> list[Any]:
    """Every object and list that is not empty."""
    found, pending = [], [data]
    while pending:
        item = pending.pop()
        if isinstance(item, dict | list) and item:
            found.append(item)
            pending.extend(_values(item))
    return found


def _values(holder: Any) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else holder


def _change_message(random: Random, content: bytes, depth: int) -> bytes:
    """Change a field of a message, or go into one and change it there; lengths of all around it are put right."""
    try:
        fields = list(Wire(content).fields(0, len(content), {}))
    except WireError:
        return _changed_bytes(random, content)
    if not fields:
        return _changed_bytes(random, content)
    number, kind, begin, value, stop = random.choice(fields)
    before, after = content[:begin], content[stop:]
    payload = content[value:stop]
    if kind == LENGTH and depth < _MAX_PROTOBUF_DEPTH and random.random() < 0.75:
        return before + length_field(number, _change_message(random, payload, depth + 1)) + after
    match random.randrange(5):
        case 0:
            return before + after
        case 1:
            return content[:stop] + content[begin:stop] + after
        case 2:
            other = random.choice(fields)
            return before + content[other[2] : other[4]] + after
        case 3 if kind == VARINT:
            return content[:value] + _varint(random.choice((*_NUMBERS, random.getrandbits(64)))) + after
        case _:
            return (
                before
                + length_field(
                    random.choice((number, number, random.randrange(1, 30))), _changed_bytes(random, payload)
                )
                + after
            )


def _changed_bytes(random: Random, content: bytes) -> bytes:
    words = (
        b"",
        b"../x",
        b"/etc/passwd",
        b"model.onnx_data",
        b"-1",
        b"9" * 19,
        b"com.microsoft",
        b"If",
        bytes(8),
        b"\xff" * 9 + b"\x01",
    )
    change = random.choice((_set_number, _cut, _repeat, _remove, _zero))
    return random.choice(words) if random.random() < 0.3 else bytes(change(random, bytearray(content)))


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


MUTATORS: Final = {"audio": audio, "containers": audio, "lists": lists, "bundle": bundle, "journal": journal}
