"""Where the streams of a file lie: behind tags, between the pages of others, one behind the other.

libsndfile decodes one stream that begins at the first byte. Here the parts of a file are told apart by what they say of
their own lengths: tags (ID3, APE, Lyrics3), pages of Ogg, blocks of FLAC, frames of MPEG, chunks of RIFF. What looks
like a stream inside of one of them, in a picture or an attachment, is none.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from w2v_models.errors import AudioError
from w2v_runtime.audio import formats, mpeg
from w2v_runtime.audio.formats import Format
from w2v_runtime.audio.headers import MAX_CHUNKS, DataChunk, chunks, data_chunk
from w2v_runtime.audio.source import Content

#: Bytes between two streams that may be anything.
_GAP: Final = 65_536
#: libFLAC reads so far ahead of what it decoded, at most.
_FLAC_AHEAD: Final = 65_536
_FLAC_HEAD: Final = re.compile(rb'fLaC[\x00\x80]\x00\x00"')
#: What may stand behind the last frame of a FLAC.
_SEAM: Final = re.compile(rb"fLaC|ID3|APETAGEX|LYRICSBEGIN|TAG|\0{64,}")
_MAX_RUNS: Final = 1 << 20
_OGG_HEAD: Final = 27 + 255
_OGG_BEGINS: Final = 2
_OGG_ENDS: Final = 4
_OGG_CODECS: Final = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")


@dataclass(frozen=True)
class Stream:
    """One stream: parts of a file, first and behind the last, that follow one another in it.

    ``complete`` says whether its end is there, where the format tells.
    """

    parts: tuple[tuple[int, int], ...]
    complete: bool = True

    @property
    def start(self) -> int:
        return self.parts[0][0]

    @property
    def stop(self) -> int:
        return self.parts[-1][1]


def first_streams(content: Content) -> tuple[Format | None, DataChunk | None, Iterator[Stream]]:
    """What a file is behind the tags at its front, its samples where a container declares them, and its streams.

    Of the streams those are known before one is decoded: all of an Ogg, else the first.
    """
    start = _behind_tags(content, 0)
    kind = formats.by_head(content.read(start, formats.HEAD_BYTES))
    if kind is None and start:
        start += mpeg.find(content.read(start, _GAP)) or 0
    if kind is formats.OGG:
        return kind, None, _ogg_streams(content, start)
    data = data_chunk(content, start)
    if data is None:
        return kind, None, iter([Stream(((start, content.size),))])
    if data.mpeg:
        return formats.MP3, None, iter([Stream(((data.start, data.stop),))])
    return kind, data, iter([Stream(((start, _end_of_file(content, start, data)),))])


def _end_of_file(content: Content, start: int, data: DataChunk) -> int:
    """Where a container ends, where the decoder would take what follows for more of it: as samples, or as a chunk."""
    container = content.read(start, 12)
    if container.startswith((b"riff", b"NIST")) or container[8:] in (b"8SVX", b"16SV"):
        return data.stop
    if container.startswith((b"RIFF", b"RIFX", b"FORM")) and data.stop < content.size:
        for tag, _, at in chunks(content, data.stop + data.declared % 2, container[:4]):
            if tag in (b"RIFF", b"RIFX", b"FORM"):
                return at - 8
    return content.size


def before_tags(content: Content, stream: Stream) -> Stream:
    """A stream that reaches to the end of the file, without the tags there."""
    start, stop = stream.start, stream.stop
    while (shorter := _before_last_tag(content, stop)) is not None and start < shorter < stop:
        stop = shorter
    return Stream(((start, stop),))


def _behind_tags(content: Content, start: int, gap: bool = False) -> int:
    """The first byte behind tags, each of which begins where the one before ends.

    Args:
        content: the file.
        start: where the first would begin.
        gap: whether there was sound before: then zeros, and tags that stand behind sound, are skipped too.
    """
    while start < content.size:
        head = content.read(start, 32)
        size = _id3v2_bytes(head) or _ape_bytes(head)
        if not size and gap:
            size = _trailing_bytes(content, start, head)
        if not size:
            return start
        start, gap = min(content.size, start + size), True
    return start


def _id3v2_bytes(head: bytes) -> int:
    """Bytes of the ID3v2 tag that begins with these ten (id3.org, section 3.1), 0 where none does."""
    if len(head) < 10 or head[:3] != b"ID3" or 0xFF in head[3:5] or max(head[6:10]) > 0x7F:
        return 0
    return 10 + _syncsafe(head[6:10]) + (10 if head[5] & 0x10 else 0)


def _syncsafe(content: bytes) -> int:
    return content[0] << 21 | content[1] << 14 | content[2] << 7 | content[3]


def _ape_bytes(head: bytes) -> int:
    """Bytes of the APEv2 tag whose header these 32 are, 0 where they are none."""
    return 32 + int.from_bytes(head[12:16], "little") if head[:8] == b"APETAGEX" and len(head) == 32 else 0


def _trailing_bytes(content: Content, start: int, head: bytes) -> int:
    if head[:4] == b"TAG+":
        return 227
    if head[:3] == b"TAG":
        return 128
    if head[:3] == b"3DI":
        return 10
    if head[:11] == b"LYRICSBEGIN":
        end = re.search(rb"LYRICS200|LYRICSEND", content.read(start, _GAP))
        return end.end() if end else 0
    if head[:1] == b"\0":
        window = content.read(start, _GAP)
        return len(window) - len(window.lstrip(b"\0"))
    return 0


def _before_last_tag(content: Content, stop: int) -> int | None:
    """Where the tag begins that ends at ``stop``; None where none does."""
    tail = content.read(max(0, stop - 227), min(stop, 227))
    if tail[-128:-125] == b"TAG":
        return stop - (128 + 227 if stop >= 355 and content.read(stop - 355, 4) == b"TAG+" else 128)
    if tail[-32:-24] == b"APETAGEX":
        size, flags = struct.unpack("<I4xI", tail[-20:-8])
        return stop - int(size) - (32 if flags & 0x8000_0000 else 0)
    if tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
        return stop - 15 - int(tail[-15:-9])
    if tail[-10:-7] == b"3DI" and max(tail[-4:]) <= 0x7F:
        return stop - 20 - _syncsafe(tail[-4:])
    return None


@dataclass(frozen=True)
class _Page:
    """A page of Ogg (RFC 3533, section 6)."""

    start: int
    stop: int
    serial: int
    begins: bool
    ends: bool
    codec: bool


def _ogg_streams(content: Content, start: int) -> Iterator[Stream]:
    """The streams of an Ogg that follow one another, each without the pages of others that stand among its own."""
    link = None
    for page in _ogg_pages(content, start):
        if link is None or (page.begins and link.begun):
            if link is not None:
                yield link.stream()
            link = _Link()
        link.add(page)
    yield Stream(((start, content.size),)) if link is None else link.stream()


def _ogg_pages(content: Content, start: int) -> Iterator[_Page]:
    """Pages from ``start`` on, also behind tags and damage."""
    head = content.read(start, _OGG_HEAD)
    while start < content.size:
        if not _is_page(head):
            start = _find_page(content, _behind_tags(content, start, gap=True), content.size)
            head = content.read(start, _OGG_HEAD)
            continue
        body = start + 27 + head[26]
        stop = body + sum(head[27 : 27 + head[26]])
        following = content.read(stop, _OGG_HEAD)
        cut = stop > content.size
        if stop != content.size and not _is_page(following):  # it may be cut, and another file joined to it
            found = _find_page(content, start + 27, min(stop, content.size))
            cut = cut or found < stop
            stop = found
            following = content.read(stop, _OGG_HEAD)
        begins = bool(head[5] & _OGG_BEGINS)
        codec = begins and content.read(body, 8).startswith(_OGG_CODECS)
        yield _Page(
            start, stop, int.from_bytes(head[14:18], "little"), begins, bool(head[5] & _OGG_ENDS) and not cut, codec
        )
        start, head = stop, following


def _is_page(head: bytes) -> bool:
    return len(head) >= 27 and head[:5] == b"OggS\0"


def _find_page(content: Content, start: int, stop: int) -> int:
    """Where between two bytes a page begins, behind which another one stands, or the end; else ``stop``."""
    while start < stop:
        window = content.read(start, min(_GAP, stop - start))
        for match in re.finditer(rb"OggS\0[\0-\x07]", window):
            page = start + match.start()
            head = content.read(page, _OGG_HEAD)
            end = page + 27 + head[26] + sum(head[27 : 27 + head[26]]) if _is_page(head) else 0
            if end == content.size or (end and _is_page(content.read(end, 27))):
                return page
        start += max(1, len(window) - 5)  # a page may begin at the end of one window
    return stop


class _Link:
    """One link of a chain: streams that begin together, of which the audio is the first of a known codec."""

    def __init__(self) -> None:
        self.begun = False
        self._serial: int | None = None
        self._known = False
        self._alone = True
        self._parts: list[tuple[int, int]] = []
        self._complete = False

    def add(self, page: _Page) -> None:
        """Take in the next page."""
        self.begun = not page.begins
        if self._serial is None or (page.codec and not self._known):
            self._alone, self._serial, self._known, self._parts = self._serial is None, page.serial, page.codec, []
        if page.serial != self._serial:
            self._alone = False
            return
        begin = page.start
        # Damage between its own pages stays in it.
        if self._parts and (self._alone or self._parts[-1][1] == page.start):
            begin, _ = self._parts.pop()
        self._parts.append((begin, page.stop))
        self._complete = page.ends
        if len(self._parts) > _MAX_RUNS:
            raise AudioError(f"an Ogg with the pages of other streams in {_MAX_RUNS} places; {formats.CONVERT}")

    def stream(self) -> Stream:
        """The audio."""
        return Stream(tuple(self._parts), self._complete)


def next_mp3(content: Content, position: int, stop: int) -> Stream | None:
    """The MPEG audio behind what was decoded up to ``position``, before byte ``stop``."""
    start = _behind_tags(content, position, gap=True)
    window = content.read(start, min(_GAP, max(0, stop - start)))
    found = mpeg.find(window, ends=start + len(window) == stop)
    return None if found is None else Stream(((start + found, stop),))


def next_flac(content: Content, stream: Stream, position: int, is_whole: Callable[[Stream], bool]) -> Stream | None:
    """The FLAC behind one that was decoded.

    FLAC does not say where its last frame ends, the decoder reads ahead, and samples may look like a seam; so where
    another FLAC may follow, the first one ends at the first seam up to which all of it can be decoded.

    Args:
        content: the file.
        stream: what was decoded.
        position: how far the decoder has read.
        is_whole: whether a part of the stream from its start on holds all of its samples.
    """
    start = max(_flac_frames(content, stream.start), position - _FLAC_AHEAD)
    window = content.read(start, position - start + _GAP)
    if b"fLaC" not in window and start + len(window) == content.size:
        return None
    seams = [start + match.start() for match in _SEAM.finditer(window)]
    behind = [_behind_tags(content, seam, gap=True) for seam in seams]
    heads = [bool(_FLAC_HEAD.match(content.read(place, 8))) for place in behind]
    if not any(heads):
        return None
    place = 0
    for i in range(bisect_left(seams, True, key=lambda seam: is_whole(Stream(((stream.start, seam),)))), len(seams)):
        if seams[i] >= place:  # else it is inside of a tag
            place = behind[i]
            if heads[i]:
                return Stream(((place, content.size),))
    return None


def _flac_frames(content: Content, start: int) -> int:
    """The first byte behind the metadata blocks of a FLAC (RFC 9639, section 8)."""
    start += 4
    for _ in range(MAX_CHUNKS):
        block = content.read(start, 4)
        if len(block) < 4:
            break
        start += 4 + int.from_bytes(block[1:], "big")
        if block[0] & 0x80:
            break
    return min(start, content.size)
