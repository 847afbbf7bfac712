"""Decode one stream of an audio file with libsndfile (through soundfile), around its faults with untrusted files."""

from __future__ import annotations

import contextlib
import io
import os
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import soundfile

from w2v_models.errors import AudioError
from w2v_runtime.audio import formats, mpeg
from w2v_runtime.audio.cstreams import silenced
from w2v_runtime.audio.formats import Format
from w2v_runtime.audio.source import Content, reason_of
from w2v_runtime.audio.streams import Stream, before_tags

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Samples (frames × channels) decoded at a time: half a megabyte as float32, which stays in the processor's cache.
BLOCK_SAMPLES: Final = 1 << 17

#: A frame count from here on means that the header has none (libsndfile reports 2^63-1 for FLAC and Ogg).
_UNKNOWN_FRAMES: Final = 1 << 62
#: When libsndfile opens a descriptor and does not recognise the format by its first bytes, as with most MP3 files, it
#: reads this file of the current folder as the resource fork of a Sound Designer II file.
_RESOURCE_FORK: Final = "._"
#: Formats whose decoders print to stdout or stderr; a file of unknown format (None) may reach any decoder.
_PRINTING: Final = (None, formats.MP3, formats.SDS)
_PRINTING_CONTAINERS: Final = ("MP3", "SDS")
#: Containers in which libsndfile reports a read error of the system, except for encodings in blocks (next line). In
#: others it takes zeros for the parts of the header that it could not read.
_REPORTS_READ_ERRORS: Final = ("WAV", "WAVEX", "AIFF", "AU", "FLAC", "OGG", "MP3")
_BLOCK_ENCODINGS: Final = ("IMA_ADPCM", "MS_ADPCM", "G721", "G723", "GSM", "NMS", "DWVW", "ALAC", "VOX")
#: libsndfile's error code ``SF_ERR_SYSTEM``.
_SYSTEM_ERROR: Final = 2
#: The highest bit rate of an MP3 frame is 40 times the lowest.
_MP3_STRETCH: Final = 40
_MP3_FRAME: Final = 1152
_MP3_HEAD: Final = 512
_ID3V1_BYTES: Final = 128
_FAULTS: Final = (soundfile.SoundFileError, OSError, RuntimeError, ValueError, MemoryError)


class SoundError(Exception):
    """The decoder cannot open a stream or decode it further; holds the decoder's own message."""


class Sound:
    """Decodes one stream of a file from start to end.

    ``rate`` is the sample rate in Hz; ``container`` is libsndfile's name of the format. ``declared`` is the frame count
    in the header, untrusted, or None if it has none; ``estimated`` is that count, or a guess from the file's size.
    ``cut`` says that the file ended within an MP3 frame.

    Args:
        content: the file.
        stream: the part of the file that holds the stream.
        kind: the format by the file's first bytes.

    Raises:
        SoundError: libsndfile cannot open it.
        AudioError: the system cannot read it.
    """

    def __init__(self, content: Content, stream: Stream, kind: Format | None) -> None:
        self.stream = stream
        self.cut = False
        self._content = content
        self._frames = 0
        self._view: _View | None = None
        self._prints = kind in _PRINTING
        self._file = self._open()
        self.rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        self.container: str = self._file.format
        self._prints = self.container in _PRINTING_CONTAINERS
        frames: int = self._file.frames
        self.declared = frames if frames < _UNKNOWN_FRAMES else None
        # Lossless compression takes about one byte per sample.
        self.estimated = frames if self.declared is not None else content.size // self.channels
        self._step = max(1, BLOCK_SAMPLES // self.channels)
        self._unbounded = False
        if self.container == "MP3":
            self._step = min(self._step, self.rate)  # mpg123 drops the whole block that contains damage
            self._unbounded = not mpeg.declares_frames(content.read(stream.start, _MP3_HEAD))
        if self._unbounded:
            self._open_unbounded_mp3()
        elif self.container == "FLAC" and self.declared is None:
            self.stream = before_tags(content, stream)  # libFLAC takes tags for damage if the header has no frame count
            self._open_view()
        elif self._view is None and not self._reports_errors():
            self._open_view()

    def _open(self) -> _Sequential:
        """Open the stream: by the file's descriptor if it reaches to the end of the file, else through a view.

        A descriptor is faster, since libsndfile then reads without Python.
        """
        start = self.stream.start
        if self.stream.parts == ((start, self._content.size),):
            with contextlib.suppress(SoundError) if start else contextlib.nullcontext():
                os.lseek(self._content.descriptor, start, os.SEEK_SET)
                return self._opened(self._content.descriptor)
        self._view = _View(self._content, self.stream)
        return self._opened(self._view)

    def _open_view(self, stretch: int = 1) -> None:
        """Open the stream again, through a view."""
        self.close()
        self._view = _View(self._content, self.stream, stretch)
        self._file = self._opened(self._view)

    def _open_unbounded_mp3(self) -> None:
        """Open an MP3 without a frame count again, without the tags at its end, and as if the file were longer.

        Without a frame count, libsndfile estimates the length from the size of the first frame and stops there.
        """
        self.declared = None
        self._step = 4 * _MP3_FRAME  # mpg123 also drops the block that contains a cut last frame
        self.stream = before_tags(self._content, self.stream)
        self._open_view(_MP3_STRETCH)

    def _reports_errors(self) -> bool:
        return self.container in _REPORTS_READ_ERRORS and not self._file.subtype.startswith(_BLOCK_ENCODINGS)

    def _opened(self, place: int | _View) -> _Sequential:
        try:
            with silenced(self._prints):  # a descriptor is read without the GIL, faster than a Python file
                file = _Sequential(place, "r", closefd=False)
        except _FAULTS as fault:
            self._check_read()
            self._content.check_readable(self.position)
            why = f"; {_resource_fork_reason()}" if os.path.lexists(_RESOURCE_FORK) else ""
            raise SoundError(_reason(fault) + why) from None
        if file.format == "SD2":
            raise SoundError(_resource_fork_reason())
        self._check_read()
        return file

    def read(self) -> npt.NDArray[np.float32]:
        """Decode the next frames: (n, channels), at most ``BLOCK_SAMPLES`` samples; n = 0 at the end of the stream.

        Raises:
            SoundError: the stream is damaged.
            AudioError: the system cannot read it.
        """
        frames = self._step
        if self.container == "FLAC" and self.declared is not None:
            frames = min(frames, self.declared - self._frames)  # libFLAC takes tags after the stream for damage
        try:
            with silenced(self._prints):
                block: npt.NDArray[np.float32] = self._file.read(frames, dtype="float32", always_2d=True)
        except _FAULTS as fault:
            self._check_read()
            self._content.check_readable(self.position)
            if getattr(fault, "code", None) == _SYSTEM_ERROR:  # a read error that has gone away since
                raise AudioError(f"cannot be read ({_reason(fault)}); check the disk or the network.") from None
            if self._unbounded and self.position >= self.stream.stop:
                self.cut = True
                return np.empty((0, self.channels), np.float32)
            raise SoundError(_reason(fault)) from None
        self._check_read()
        self._frames += len(block)
        return block

    def _check_read(self) -> None:
        """Raise the read error that a view kept; the decoder took it for the end of the file."""
        if self._view is not None and self._view.fault is not None:
            raise self._view.fault

    @property
    def position(self) -> int:
        """The byte of the file up to which the decoder has read."""
        return self._view.position if self._view else os.lseek(self._content.descriptor, 0, os.SEEK_CUR)

    @property
    def frames_decoded(self) -> int:
        """The decoder's own count of decoded frames, also after a fault; 0 if it has none."""
        try:
            return int(self._file.tell())
        except _FAULTS:
            return 0

    def close(self) -> None:
        """Release the decoder; the file stays open."""
        with contextlib.suppress(*_FAULTS), silenced(self._prints):
            self._file.close()  # nothing was written, so nothing is lost


class _Sequential(soundfile.SoundFile):
    """A sound file that is never sought.

    soundfile seeks after each read of a seekable file, which hangs on a truncated FLAC.
    """

    def seekable(self) -> bool:
        return False


class _View(io.RawIOBase):
    """A stream of a file, its parts joined, as a file object that claims to be ``stretch`` times as long as it is.

    ``fault`` is the read error of the system, if there was one; the decoder sees the end of the file instead.
    """

    def __init__(self, content: Content, stream: Stream, stretch: int = 1) -> None:
        self.fault: AudioError | None = None
        self._content, self._parts = content, stream.parts
        self._edges = (0, *accumulate(stop - start for start, stop in stream.parts))
        self._end = stretch * self._edges[-1]
        self._stretched = stretch > 1
        self._at = 0

    def readinto(self, buffer: WriteableBuffer) -> int:
        wanted = memoryview(buffer).nbytes
        if self._stretched and self._at == self._end - _ID3V1_BYTES:
            # mpg123 looks for a tag at the claimed end of the file, and fails if it cannot read there.
            content = bytes(min(wanted, _ID3V1_BYTES))
        else:
            content = self._read(wanted)
        memoryview(buffer)[: len(content)] = content
        self._at += len(content)
        return len(content)

    def _read(self, wanted: int) -> bytes:
        """The next ``wanted`` bytes, across parts: libsndfile takes fewer for the end of the file."""
        blocks, at = [], self._at
        try:
            for part in range(self._part, len(self._parts)):
                length = min(self._edges[part + 1], self._at + wanted) - at
                if length <= 0:
                    break
                blocks.append(self._content.read(self._parts[part][0] + at - self._edges[part], length))
                at += length
        except AudioError as error:
            self.fault = error
            return b""
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    @property
    def _part(self) -> int:
        """The index of the part that holds the current position."""
        return bisect_right(self._edges, self._at) - 1

    @property
    def position(self) -> int:
        """The current position as a byte of the whole file."""
        part = self._part
        return self._parts[-1][1] if part == len(self._parts) else self._parts[part][0] + self._at - self._edges[part]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        # A seek before the start changes nothing, as with a descriptor.
        self._at = origin + offset if origin + offset >= 0 else self._at
        return self._at

    def tell(self) -> int:
        return self._at


def _resource_fork_reason() -> str:
    where = os.path.join(os.getcwd(), _RESOURCE_FORK)
    return f"libsndfile reads {where} as its resource fork, so move that away or start in another folder"


def _reason(fault: BaseException) -> str:
    if isinstance(fault, soundfile.LibsndfileError):
        return str(fault.error_string).rstrip(".")
    return reason_of(fault)
