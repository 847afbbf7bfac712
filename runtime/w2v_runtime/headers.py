"""The samples that a container declares, and those that are there.

libsndfile clamps a cut file to what is there, silently. The few header fields that show it are read here with bounded
positional reads; nothing here allocates by a header.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from w2v_runtime.source import Content
from w2v_runtime.streams import MAX_CHUNKS, chunks

#: Data sizes that stand for "not known yet" in what was written to a pipe: the largest of 32 or 64 bits, with or
#: without a sign, or a little less.
_PIPE_SIZES: Final = (range(0x7EFF_FF00, 0x8000_0001), range(0xFFFF_EF00, 1 << 32), range(1 << 62, 1 << 64))


@dataclass(frozen=True)
class DataChunk:
    """The encoded samples of a container: bytes that its header declares, bytes from their start to the file's end."""

    declared: int
    available: int

    @property
    def unknown(self) -> bool:
        """Whether the size is a placeholder, as written to a pipe."""
        return any(self.declared in sizes for sizes in _PIPE_SIZES)

    @property
    def cut(self) -> bool:
        """Whether the file ends before its samples do."""
        return not self.unknown and self.available < self.declared

    @property
    def overflown(self) -> bool:
        """Whether more follows than the size field can say: its 32 bits wrapped, or a placeholder is too small."""
        return self.available > self.declared if self.unknown else self.available - self.declared >= 1 << 32


def data_chunk(content: Content, start: int) -> DataChunk | None:
    """The samples of a WAV, RF64, W64, AIFF, AU or SPH that begins at byte ``start``; None for other formats."""
    head = content.read(start, 1024)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _riff_data(content, start, "<" if head[:4] != b"RIFX" else ">")
    if head[:4] == b"FORM" and head[8:11] == b"AIF":
        return _aiff_data(content, start)
    if head[:4] == b"riff" and head[24:28] == b"wave":
        return _w64_data(content, start)
    if head[:4] in (b".snd", b"dns.") and len(head) >= 12:
        offset, declared = struct.unpack(">II" if head[:4] == b".snd" else "<II", head[4:12])
        return DataChunk(declared, max(0, content.size - start - offset))
    if head[:7] == b"NIST_1A":
        return _sphere_data(head, content.size - start)
    return None


def _riff_data(content: Content, start: int, order: str) -> DataChunk | None:
    long_size = None
    for tag, length, at in chunks(content, start + 12, order):
        if tag == b"ds64":
            sizes = content.read(at, 16)
            long_size = struct.unpack("<QQ", sizes)[1] if len(sizes) == 16 else None
        if tag == b"data":
            declared = long_size if long_size is not None and length == 0xFFFF_FFFF else length
            return DataChunk(declared, content.size - at)
    return None


def _aiff_data(content: Content, start: int) -> DataChunk | None:
    for tag, length, at in chunks(content, start + 12, ">"):
        if tag == b"SSND":  # two 32-bit words, offset and block size, stand before the samples
            return DataChunk(max(0, length - 8), max(0, content.size - at - 8))
    return None


def _w64_data(content: Content, start: int) -> DataChunk | None:
    start += 40
    for _ in range(MAX_CHUNKS):
        head = content.read(start, 24)
        if len(head) < 24:
            return None
        length: int = struct.unpack("<Q", head[16:])[0]  # counts its own 24 bytes
        if head[:4] == b"data":
            return DataChunk(max(0, length - 24), content.size - start - 24)
        start += max(24, length + -length % 8)
        if start >= content.size:
            return None
    return None


def _sphere_data(head: bytes, size: int) -> DataChunk | None:
    fields = {name: int(value) for name, value in re.findall(rb"(\w+) -i (\d{1,18})\n", head)}
    start = re.match(rb"NIST_1A\n\s*(\d{1,9})\n", head)
    if start is None or b"sample_count" not in fields:
        return None
    frame = fields.get(b"channel_count", 1) * fields.get(b"sample_n_bytes", 2)
    return DataChunk(fields[b"sample_count"] * frame, max(0, size - int(start.group(1))))
