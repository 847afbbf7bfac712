"""Container headers: the declared size of the sample data against the bytes that the file holds.

libsndfile decodes a truncated file without an error, and in some containers takes all bytes after the data for samples.
The few header fields that reveal this are read here, for each container, with bounded positional reads; no memory is
allocated by a number in a header.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from w2v_runtime.audio.source import Content

#: A file with more chunks (or FLAC metadata blocks) than this before its samples is not searched further.
MAX_CHUNKS: Final = 4096
#: Data sizes that mean "unknown", as programs write them to a pipe: the largest signed or unsigned number of 32 or 64
#: bits, or a little less.
_PLACEHOLDER_SIZES: Final = (range(0x7EFF_FF00, 0x8000_0001), range(0xFFFF_EF00, 1 << 32), range(1 << 62, 1 << 64))
_MPEG_CODINGS: Final = (0x50, 0x55)
#: Of a MIDI sample dump: its header, a packet of samples, and what of it are samples.
_SDS_HEADER_BYTES: Final = 21
_SDS_PACKET_BYTES: Final = 127
_SDS_SAMPLE_BYTES: Final = 120


@dataclass(frozen=True)
class DataChunk:
    """The encoded samples of a container: its data chunk.

    ``start`` is the position of the first byte of the samples in the file, ``declared`` the size in bytes that the
    header declares, ``available`` the number of bytes from ``start`` to the file's end; ``mpeg`` says whether the
    samples are MPEG audio.
    """

    start: int
    declared: int
    available: int
    mpeg: bool = False

    @property
    def unknown(self) -> bool:
        """Whether the declared size is a placeholder, as programs write it to a pipe."""
        return any(self.declared in sizes for sizes in _PLACEHOLDER_SIZES)

    @property
    def cut(self) -> bool:
        """Whether the file is truncated: it ends before the declared end of the samples."""
        return not self.unknown and self.available < self.declared

    @property
    def overflown(self) -> bool:
        """Whether there is more data than the 32-bit size field can declare: it wrapped, or is a placeholder."""
        return self.available > self.declared if self.unknown else self.available - self.declared >= 1 << 32

    @property
    def stop(self) -> int:
        """The position after the last byte of the samples; the file's end if it is truncated or the size is unknown."""
        return self.start + (self.available if self.unknown else min(self.declared, self.available))


def data_chunk(content: Content, start: int) -> DataChunk | None:
    """The data chunk of a WAV, RF64, W64, AIFF, IFF, AU, SPH or SDS beginning at byte ``start``; None for others."""
    head = content.read(start, 1024)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _riff_data(content, start, head[:4])
    if head[:4] == b"FORM":
        return _form_data(content, start)
    if head[:4] == b"riff" and head[24:28] == b"wave":
        return _w64_data(content, start)
    if head[:4] in (b".snd", b"dns.") and len(head) >= 12:
        offset, declared = struct.unpack(">II" if head[:4] == b".snd" else "<II", head[4:12])
        return _chunk_at(content, start + offset, declared)
    if head[:7] == b"NIST_1A":
        return _sphere_data(content, start, head)
    if head[:2] == b"\xf0\x7e" and head[3:4] == b"\x01" and len(head) >= _SDS_HEADER_BYTES:
        return _sds_data(content, start, head)
    return None


def _chunk_at(content: Content, start: int, declared: int, mpeg: bool = False) -> DataChunk:
    return DataChunk(start, declared, max(0, content.size - start), mpeg)


def _riff_data(content: Content, start: int, riff: bytes) -> DataChunk | None:
    long_size, coding = None, 0
    for tag, length, at in chunks(content, start + 12, riff):
        if tag == b"ds64":
            sizes = content.read(at, 16)
            long_size = struct.unpack("<QQ", sizes)[1] if len(sizes) == 16 else None
        if tag == b"fmt ":
            coding = int.from_bytes(content.read(at, 2), "big" if riff == b"RIFX" else "little")
        if tag == b"data":
            declared = long_size if long_size is not None and length == 0xFFFF_FFFF else length
            return _chunk_at(content, at, declared, coding in _MPEG_CODINGS)
    return None


def _form_data(content: Content, start: int) -> DataChunk | None:
    for tag, length, at in chunks(content, start + 12, b"FORM"):
        if tag == b"SSND":  # two 32-bit words, offset and block size, stand before the samples
            return _chunk_at(content, at + 8, max(0, length - 8))
        if tag == b"BODY":
            return _chunk_at(content, at, length)
    return None


def chunks(content: Content, start: int, container: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the chunks from byte ``start`` on: (tag, declared length, position of the content's first byte).

    A chunk of odd length is followed by a padding byte. ``container`` is the tag of the container, which decides the
    byte order: big-endian for ``RIFX`` and ``FORM``, else little-endian.
    """
    order = ">" if container in (b"RIFX", b"FORM") else "<"
    for _ in range(MAX_CHUNKS):
        head = content.read(start, 8)
        if len(head) < 8:
            return
        tag, length = struct.unpack(f"{order}4sI", head)
        yield tag, length, start + 8
        start += 8 + length + length % 2
        if start >= content.size:
            return


def _w64_data(content: Content, start: int) -> DataChunk | None:
    start += 40
    for _ in range(MAX_CHUNKS):
        head = content.read(start, 24)
        if len(head) < 24:
            return None
        length: int = struct.unpack("<Q", head[16:])[0]  # counts its own 24 bytes
        if head[:4] == b"data":
            return _chunk_at(content, start + 24, max(0, length - 24))
        start += max(24, length + -length % 8)
        if start >= content.size:
            return None
    return None


def _sphere_data(content: Content, start: int, head: bytes) -> DataChunk | None:
    fields = {name: int(value) for name, value in re.findall(rb"(\w+) -i (\d{1,18})\n", head)}
    offset = re.match(rb"NIST_1A\n\s*(\d{1,9})\n", head)
    if offset is None or b"sample_count" not in fields:
        return None
    frame = fields.get(b"channel_count", 1) * fields.get(b"sample_n_bytes", 2)
    return _chunk_at(content, start + int(offset.group(1)), fields[b"sample_count"] * frame)


def _sds_data(content: Content, start: int, head: bytes) -> DataChunk:
    """The packets of a sample dump: 120 bytes of samples each, 7 bits to a byte, in 127 bytes with their frame."""
    bits = head[6]
    words = head[10] | head[11] << 7 | head[12] << 14
    in_packet = _SDS_SAMPLE_BYTES // max(1, -(-bits // 7))
    packets = -(-words // max(1, in_packet))
    return _chunk_at(content, start + _SDS_HEADER_BYTES, packets * _SDS_PACKET_BYTES)
