"""What libsndfile does not tell about a file: samples cut off, a further stream behind the first, foreign formats.

It clamps a cut file to what is there, silently, and stops at the end of the first of several joined streams.
The few header fields that show it are read here with bounded positional reads; nothing here allocates by a header.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

#: More chunks than this before the samples are not a recording.
_MAX_CHUNKS: Final = 4096
#: Data sizes that stand for "not known yet" in what was written to a pipe: the largest of 32 or 64 bits, with or
#: without a sign, or a little less.
_PIPE_SIZES: Final = (range(0x7EFF_FF00, 0x8000_0001), range(0xFFFF_EF00, 1 << 32), range(1 << 62, 1 << 64))
_MAX_OGG_PAGE: Final = 27 + 255 + 255 * 255
_MAX_OGG_STREAMS: Final = 16
_OGG_BEGIN_OF_STREAM: Final = 2
_OGG_END_OF_STREAM: Final = 4

_FOREIGN: Final[tuple[tuple[bytes, int, str], ...]] = (
    (b"#!AMR", 0, "AMR"),
    (b"ftyp", 4, "M4A/MP4 (AAC or ALAC)"),
    (b"\xff\xf1", 0, "AAC"),
    (b"\xff\xf9", 0, "AAC"),
    (b"ADIF", 0, "AAC"),
    (b"\x7fFLAC", 28, "Ogg-FLAC"),
    (b"Speex   ", 28, "Ogg-Speex"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, "WMA/ASF"),
    (b"\x1a\x45\xdf\xa3", 0, "WebM/Matroska"),
    (b"wvpk", 0, "WavPack"),
    (b"MAC ", 0, "Monkey's Audio"),
    (b"TTA1", 0, "True Audio"),
    (b"ajkg", 0, "Shorten"),
    (b"FLV\x01", 0, "Flash video"),
    (b"AVI ", 8, "AVI video"),
    (b"PK\x03\x04", 0, "a ZIP archive"),
    (b"\x1f\x8b", 0, "a gzip archive"),
)

#: What to do about files that are no recordings, by what :func:`foreign_format` calls them.
NOT_AUDIO: Final = {
    "a ZIP archive": "unpack it and name the recordings in it.",
    "a gzip archive": "unpack it and name the recordings in it.",
    "an HTML page": "it may stand for a recording that could not be downloaded; fetch that again.",
    "text": "leave it out, or give it with --files-from if it is a list of recordings.",
}

_STREAM_STARTS: Final[dict[str, tuple[re.Pattern[bytes], int]]] = {
    # How a stream begins, and how far behind its first byte the decoder may have read when it stops there.
    "MP3": (re.compile(rb"ID3[\x02-\x04]|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]", re.DOTALL), 4),
    "OGG": (re.compile(rb"OggS\x00[\x02\x03\x06\x07]", re.DOTALL), 2 * _MAX_OGG_PAGE),
    "FLAC": (re.compile(rb'fLaC[\x00\x80]\x00\x00"', re.DOTALL), 65536),
}


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


def data_chunk(descriptor: int, size: int) -> DataChunk | None:
    """The samples of a WAV, RF64, W64, AIFF, AU or SPH file of ``size`` bytes; None for other formats."""
    head = os.pread(descriptor, 1024, 0)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _riff_data(descriptor, size, "<" if head[:4] != b"RIFX" else ">")
    if head[:4] == b"FORM" and head[8:11] == b"AIF":
        return _aiff_data(descriptor, size)
    if head[:4] == b"riff" and head[24:28] == b"wave":
        return _w64_data(descriptor, size)
    if head[:4] in (b".snd", b"dns.") and len(head) >= 12:
        start, declared = struct.unpack(">II" if head[:4] == b".snd" else "<II", head[4:12])
        return DataChunk(declared, max(0, size - start))
    if head[:7] == b"NIST_1A":
        return _sphere_data(head, size)
    return None


def _riff_data(descriptor: int, size: int, order: str) -> DataChunk | None:
    long_size = None
    for tag, length, start in _chunks(descriptor, 12, size, order):
        if tag == b"ds64":
            sizes = os.pread(descriptor, 16, start)
            long_size = struct.unpack("<QQ", sizes)[1] if len(sizes) == 16 else None
        if tag == b"data":
            declared = long_size if long_size is not None and length == 0xFFFF_FFFF else length
            return DataChunk(declared, size - start)
    return None


def _aiff_data(descriptor: int, size: int) -> DataChunk | None:
    for tag, length, start in _chunks(descriptor, 12, size, ">"):
        if tag == b"SSND":  # two 32-bit words, offset and block size, stand before the samples
            return DataChunk(max(0, length - 8), max(0, size - start - 8))
    return None


def _chunks(descriptor: int, start: int, size: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Tag, declared length and first byte of the content of each chunk, padded to even lengths."""
    for _ in range(_MAX_CHUNKS):
        head = os.pread(descriptor, 8, start)
        if len(head) < 8:
            return
        tag, length = struct.unpack(f"{order}4sI", head)
        yield tag, length, start + 8
        start += 8 + length + length % 2
        if start >= size:
            return


def _w64_data(descriptor: int, size: int) -> DataChunk | None:
    start = 40
    for _ in range(_MAX_CHUNKS):
        head = os.pread(descriptor, 24, start)
        if len(head) < 24:
            return None
        length: int = struct.unpack("<Q", head[16:])[0]  # counts its own 24 bytes
        if head[:4] == b"data":
            return DataChunk(max(0, length - 24), size - start - 24)
        start += max(24, length + -length % 8)
        if start >= size:
            return None
    return None


def _sphere_data(head: bytes, size: int) -> DataChunk | None:
    fields = {name: int(value) for name, value in re.findall(rb"(\w+) -i (\d{1,18})\n", head)}
    start = re.match(rb"NIST_1A\n\s*(\d{1,9})\n", head)
    if start is None or b"sample_count" not in fields:
        return None
    frame = fields.get(b"channel_count", 1) * fields.get(b"sample_n_bytes", 2)
    return DataChunk(fields[b"sample_count"] * frame, max(0, size - int(start.group(1))))


def ogg_is_complete(descriptor: int, size: int) -> bool:
    """Whether the last Ogg page is whole and carries the end-of-stream flag."""
    start = max(0, size - 2 * _MAX_OGG_PAGE)
    tail = os.pread(descriptor, size - start, start)
    page = tail[max(0, tail.rfind(b"OggS\x00")) :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    length = 27 + page[26] + sum(page[27 : 27 + page[26]])
    return length <= len(page) and bool(page[5] & _OGG_END_OF_STREAM)


def mp3_declares_frames(descriptor: int, start: int) -> bool:
    """Whether the MP3 stream from byte ``start`` on has a Xing, Info or VBRI header with a number of frames."""
    tag = os.pread(descriptor, 10, start)
    if tag[:3] == b"ID3" and len(tag) == 10:
        start += 10 + (tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9]) + (10 if tag[5] & 0x10 else 0)
    head = os.pread(descriptor, 512, start)
    xing = re.search(rb"(?:Xing|Info)\x00\x00\x00(.)(.{4})", head, re.DOTALL)
    return bool(xing[1][0] & 1 and any(xing[2])) if xing else b"VBRI" in head


def stream_starts(descriptor: int, container: str, after: int, position: int) -> list[int]:
    """Bytes at which a further stream may begin once the decoder stopped at ``position``.

    Args:
        descriptor: the file.
        container: libsndfile's name of the format.
        after: start of the stream that ended; only later bytes count.
        position: how far the decoder has read.
    """
    if container not in _STREAM_STARTS:
        return []
    pattern, read_ahead = _STREAM_STARTS[container]
    first = _ogg_data_start(descriptor, after) if container == "OGG" else after + 1
    start = max(first, position - read_ahead)
    window = os.pread(descriptor, position - start + 65536, start)
    return [start + match.start() for match in pattern.finditer(window)][:16]


def _ogg_data_start(descriptor: int, start: int) -> int:
    """The first page behind those that begin the streams of one Ogg file, which may carry several side by side."""
    for _ in range(_MAX_OGG_STREAMS):
        page = os.pread(descriptor, 27 + 255, start)
        if len(page) < 27 or not page[5] & _OGG_BEGIN_OF_STREAM:
            break
        start += 27 + page[26] + sum(page[27 : 27 + page[26]])
    return start


def foreign_format(head: bytes) -> str | None:
    """What a file that libsndfile cannot open looks like by its first bytes; None where nothing is known of it."""
    for magic, offset, name in _FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            return name
    lower = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if lower.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    text = head.decode("utf-8", "replace").rstrip("\ufffd")  # the last character may be cut
    return "text" if text and all(char.isprintable() or char in "\t\r\n\f" for char in text) else None
