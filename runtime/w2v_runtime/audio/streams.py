"""Find the audio streams of a file: after tags, between the Ogg pages of other streams, and joined one after another.

libsndfile decodes one stream that begins at the first byte. Here a file is divided by the lengths that its parts
declare: tags (ID3, APE, Lyrics3), Ogg pages, FLAC blocks, MPEG frames, RIFF chunks. So bytes inside one of these parts
that look like a stream, in a picture or an attachment, are not taken for one.
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

#: The most bytes of unknown content between two streams that are searched for the next one.
_GAP: Final = 65_536
#: The most bytes that libFLAC reads ahead of the frame that it decodes.
_FLAC_AHEAD: Final = 65_536
_FLAC_HEAD: Final = re.compile(rb'fLaC[\x00\x80]\x00\x00"')
#: What may follow the last frame of a FLAC stream: another stream, a tag, or zeros.
_SEAM: Final = re.compile(rb"fLaC|ID3|APETAGEX|LYRICSBEGIN|TAG|\0{64,}")
_MAX_PARTS: Final = 1 << 20
_OGG_HEAD: Final = 27 + 255
_OGG_BOS: Final = 2
_OGG_EOS: Final = 4
_OGG_CODECS: Final = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")


@dataclass(frozen=True)
class Stream:
    """One stream: the parts of the file that hold it, each as (first byte, byte after the last), in order.

    ``complete`` is False if the end of the stream is known to be missing, which only Ogg can tell.
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
    """The format of a file after its leading tags, its data chunk if the container declares one, and its streams.

    The iterator yields the streams that can be found without decoding: all streams of an Ogg, else only the first.
    """
    start = _after_tags(content, 0)
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
    return kind, data, iter([Stream(((start, _end_of_container(content, start, data)),))])


def _end_of_container(content: Content, start: int, data: DataChunk) -> int:
    """The end of a container in the file.

    It is the file's end, except in containers where the decoder would take the bytes after it for samples or a chunk.
    """
    container = content.read(start, 12)
    if container.startswith((b"riff", b"NIST")) or container[8:] in (b"8SVX", b"16SV"):
        return data.stop
    if container.startswith((b"RIFF", b"RIFX", b"FORM")) and data.stop < content.size:
        for tag, _, at in chunks(content, data.stop + data.declared % 2, container[:4]):
            if tag in (b"RIFF", b"RIFX", b"FORM"):
                return at - 8
    return content.size


def before_tags(content: Content, stream: Stream) -> Stream:
    """A stream that reaches to the end of the file, shortened by the tags (ID3v1, APEv2, Lyrics3) at that end."""
    start, stop = stream.start, stream.stop
    while (shorter := _start_of_last_tag(content, stop)) is not None and start < shorter < stop:
        stop = shorter
    return Stream(((start, stop),))


def _after_tags(content: Content, start: int, gap: bool = False) -> int:
    """The position after all consecutive tags that begin at ``start``.

    Args:
        content: the file.
        start: where the first tag would begin.
        gap: whether audio precedes ``start``: then zeros and tags that follow audio (ID3v1, Lyrics3) are skipped too.
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
    """Size in bytes of the ID3v2 tag with this 10-byte header (id3.org, section 3.1); 0 if it is none."""
    if len(head) < 10 or head[:3] != b"ID3" or 0xFF in head[3:5] or max(head[6:10]) > 0x7F:
        return 0
    return 10 + _syncsafe(head[6:10]) + (10 if head[5] & 0x10 else 0)


def _syncsafe(content: bytes) -> int:
    """The number in four bytes of seven bits each, as ID3v2 writes sizes."""
    return content[0] << 21 | content[1] << 14 | content[2] << 7 | content[3]


def _ape_bytes(head: bytes) -> int:
    """Size in bytes of the APEv2 tag with this 32-byte header; 0 if it is none."""
    return 32 + int.from_bytes(head[12:16], "little") if head[:8] == b"APETAGEX" and len(head) == 32 else 0


def _trailing_bytes(content: Content, start: int, head: bytes) -> int:
    """Size in bytes of the tag after audio (ID3v1, 3DI, Lyrics3) or of the zeros that begin at ``start``; else 0."""
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


def _start_of_last_tag(content: Content, stop: int) -> int | None:
    """The first byte of the tag that ends at ``stop``; None if no tag does."""
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
    """An Ogg page (RFC 3533, section 6): ``codec`` says whether it begins a stream of a known audio codec."""

    start: int
    stop: int
    serial: int
    begins: bool
    ends: bool
    codec: bool


def _ogg_streams(content: Content, start: int) -> Iterator[Stream]:
    """The audio streams of a chained Ogg file, each without the interleaved pages of other streams."""
    link = None
    for page in _ogg_pages(content, start):
        if link is None or (page.begins and link.begun):
            if link is not None:
                yield link.stream()
            link = _Link()
        link.add(page)
    yield Stream(((start, content.size),)) if link is None else link.stream()


def _ogg_pages(content: Content, start: int) -> Iterator[_Page]:
    """Yield the Ogg pages from ``start`` on, past tags and damage."""
    head = content.read(start, _OGG_HEAD)
    while start < content.size:
        if not _is_page(head):
            start = _find_page(content, _after_tags(content, start, gap=True), content.size)
            head = content.read(start, _OGG_HEAD)
            continue
        body = start + 27 + head[26]
        stop = body + sum(head[27 : 27 + head[26]])
        following = content.read(stop, _OGG_HEAD)
        cut = stop > content.size
        if stop != content.size and not _is_page(following):  # the page may be cut, and another file joined to it
            found = _find_page(content, start + 27, min(stop, content.size))
            cut = cut or found < stop
            stop = found
            following = content.read(stop, _OGG_HEAD)
        begins = bool(head[5] & _OGG_BOS)
        codec = begins and content.read(body, 8).startswith(_OGG_CODECS)
        yield _Page(
            start, stop, int.from_bytes(head[14:18], "little"), begins, bool(head[5] & _OGG_EOS) and not cut, codec
        )
        start, head = stop, following


def _is_page(head: bytes) -> bool:
    return len(head) >= 27 and head[:5] == b"OggS\0"


def _find_page(content: Content, start: int, stop: int) -> int:
    """The first page in [start, stop) that is followed by another page or by the end of the file; else ``stop``."""
    while start < stop:
        window = content.read(start, min(_GAP, stop - start))
        for match in re.finditer(rb"OggS\0[\0-\x07]", window):
            page = start + match.start()
            head = content.read(page, _OGG_HEAD)
            end = page + 27 + head[26] + sum(head[27 : 27 + head[26]]) if _is_page(head) else 0
            if end == content.size or (end and _is_page(content.read(end, 27))):
                return page
        start += max(1, len(window) - 5)  # a page may begin in the last bytes of a window
    return stop


class _Link:
    """One link of a chained Ogg file: streams that begin together; its audio is the first one of a known codec."""

    def __init__(self) -> None:
        self.begun = False
        self._serial: int | None = None
        self._known = False
        self._alone = True
        self._parts: list[tuple[int, int]] = []
        self._complete = False

    def add(self, page: _Page) -> None:
        """Add the next page of the file; pages of other streams are left out.

        Raises:
            AudioError: pages of other streams divide the audio into more than ``_MAX_PARTS`` parts.
        """
        self.begun = not page.begins
        if self._serial is None or (page.codec and not self._known):
            self._alone, self._serial, self._known, self._parts = self._serial is None, page.serial, page.codec, []
        if page.serial != self._serial:
            self._alone = False
            return
        begin = page.start
        # Damage between two pages of the audio stays in its part.
        if self._parts and (self._alone or self._parts[-1][1] == page.start):
            begin, _ = self._parts.pop()
        self._parts.append((begin, page.stop))
        self._complete = page.ends
        if len(self._parts) > _MAX_PARTS:
            raise AudioError(f"an Ogg with the pages of other streams in {_MAX_PARTS} places; {formats.CONVERT}")

    def stream(self) -> Stream:
        """The audio stream of this link."""
        return Stream(tuple(self._parts), self._complete)


def next_mp3(content: Content, position: int, stop: int) -> Stream | None:
    """The MPEG audio stream between ``position``, the end of the decoded one, and byte ``stop``; None without one."""
    start = _after_tags(content, position, gap=True)
    window = content.read(start, min(_GAP, max(0, stop - start)))
    found = mpeg.find(window, ends=start + len(window) == stop)
    return None if found is None else Stream(((start + found, stop),))


def next_flac(content: Content, stream: Stream, position: int, is_whole: Callable[[Stream], bool]) -> Stream | None:
    """The FLAC stream that follows a decoded one; None if there is none.

    A FLAC stream does not declare where its last frame ends, the decoder reads ahead, and samples may look like a seam
    (the start of a tag or stream). So the decoded stream ends at the first seam up to which all of its samples can be
    decoded.

    Args:
        content: the file.
        stream: the decoded stream.
        position: the byte up to which the decoder has read.
        is_whole: whether a part of the stream, from its start on, holds all of its samples.
    """
    start = max(_first_flac_frame(content, stream.start), position - _FLAC_AHEAD)
    window = content.read(start, position - start + _GAP)
    if b"fLaC" not in window and start + len(window) == content.size:
        return None
    seams = [start + match.start() for match in _SEAM.finditer(window)]
    after = [_after_tags(content, seam, gap=True) for seam in seams]
    heads = [bool(_FLAC_HEAD.match(content.read(place, 8))) for place in after]
    if not any(heads):
        return None
    place = 0
    for i in range(bisect_left(seams, True, key=lambda seam: is_whole(Stream(((stream.start, seam),)))), len(seams)):
        if seams[i] >= place:  # else the seam is inside a tag
            place = after[i]
            if heads[i]:
                return Stream(((place, content.size),))
    return None


def _first_flac_frame(content: Content, start: int) -> int:
    """The position after the metadata blocks of a FLAC stream (RFC 9639, section 8), where its frames begin."""
    start += 4
    for _ in range(MAX_CHUNKS):
        block = content.read(start, 4)
        if len(block) < 4:
            break
        start += 4 + int.from_bytes(block[1:], "big")
        if block[0] & 0x80:
            break
    return min(start, content.size)
