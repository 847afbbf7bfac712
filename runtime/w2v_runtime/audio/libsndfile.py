"""libsndfile through soundfile, made safe for files of unknown origin: what it opens and how it reads."""

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

#: Samples (frames times channels) decoded at a time: half a megabyte, so that a block stays in the processor's cache.
BLOCK_SAMPLES: Final = 1 << 17

#: From here on a frame count means that the header has none (FLAC and Ogg: 2^63-1).
_UNKNOWN_FRAMES: Final = 1 << 62
#: What libsndfile takes for the resource fork of a file without a name that it does not know by its first bytes: this
#: file of the current folder, whatever it is. Most MP3 files are among those.
_RESOURCE_FORK: Final = "._"
#: Kinds whose decoders print; of what is of no known kind, libsndfile may make anything.
_PRINTING: Final = (None, formats.MP3, formats.SDS)
_PRINTING_CONTAINERS: Final = ("MP3", "SDS")
#: Containers in which libsndfile reports that the system could not read, but for encodings that come in blocks. In
#: others it takes zeros for what it could not read of the header.
_REPORTING: Final = ("WAV", "WAVEX", "AIFF", "AU", "FLAC", "OGG", "MP3")
_IN_BLOCKS: Final = ("IMA_ADPCM", "MS_ADPCM", "G721", "G723", "GSM", "NMS", "DWVW", "ALAC", "VOX")
#: libsndfile's number for an error of the system.
_SYSTEM_ERROR: Final = 2
#: The highest bit rate of an MP3 frame is 40 times the lowest.
_MP3_STRETCH: Final = 40
_MP3_FRAME: Final = 1152
_MP3_HEAD: Final = 512
_ID3V1_BYTES: Final = 128
_FAULTS: Final = (soundfile.SoundFileError, OSError, RuntimeError, ValueError, MemoryError)


class SoundError(Exception):
    """The decoder's own words for why it cannot open or go on."""


class Sound:
    """One stream of a file, read from front to back.

    ``rate`` is in Hz; ``container`` is libsndfile's name of the format. ``declared`` is the untrusted number of frames
    in the header, None where it has none; ``estimated`` is that number, or a guess from the size. ``cut`` says that the
    file ended within an MP3 frame.

    Args:
        content: the file.
        stream: where in it.
        kind: what its first bytes say it is.

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
        # Lossless compression leaves about one byte of a sample.
        self.estimated = frames if self.declared is not None else content.size // self.channels
        self._step = max(1, BLOCK_SAMPLES // self.channels)
        self._unbounded = False
        if self.container == "MP3":
            self._step = min(self._step, self.rate)  # all of the block in which mpg123 meets damage is lost
            self._unbounded = not mpeg.declares_frames(content.read(stream.start, _MP3_HEAD))
        if self._unbounded:
            self._open_unbounded_mp3()
        elif self.container == "FLAC" and self.declared is None:
            self.stream = before_tags(content, stream)  # which libFLAC takes for damage where it does not know the end
            self._open_view()
        elif self._view is None and not self._reports_errors():
            self._open_view()

    def _open(self) -> _Sequential:
        """Open the descriptor at the stream's first byte, which is fast, or a view where that cannot be."""
        start = self.stream.start
        if self.stream.parts == ((start, self._content.size),):
            with contextlib.suppress(SoundError) if start else contextlib.nullcontext():
                os.lseek(self._content.descriptor, start, os.SEEK_SET)
                return self._opened(self._content.descriptor)
        self._view = _View(self._content, self.stream)
        return self._opened(self._view)

    def _open_view(self, stretch: int = 1) -> None:
        """Open again as a view."""
        self.close()
        self._view = _View(self._content, self.stream, stretch)
        self._file = self._opened(self._view)

    def _open_unbounded_mp3(self) -> None:
        """Open again without the tags at the end, and as if the file were longer.

        Without a frame count, libsndfile stops where the whole would end had all frames the size of the first.
        """
        self.declared = None
        self._step = 4 * _MP3_FRAME  # and so is that with the last frame, if it is cut
        self.stream = before_tags(self._content, self.stream)
        self._open_view(_MP3_STRETCH)

    def _reports_errors(self) -> bool:
        return self.container in _REPORTING and not self._file.subtype.startswith(_IN_BLOCKS)

    def _opened(self, place: int | _View) -> _Sequential:
        try:
            with silenced(self._prints):  # a descriptor is read without Python's lock, faster than a Python file
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
        """The next frames (n, channels) of at most ``BLOCK_SAMPLES`` samples in all, n = 0 at the end of the stream.

        Raises:
            SoundError: the stream is damaged.
            AudioError: the system cannot read it.
        """
        frames = self._step
        if self.container == "FLAC" and self.declared is not None:
            frames = min(frames, self.declared - self._frames)  # libFLAC takes tags behind the stream for damage
        try:
            with silenced(self._prints):
                block: npt.NDArray[np.float32] = self._file.read(frames, dtype="float32", always_2d=True)
        except _FAULTS as fault:
            self._check_read()
            self._content.check_readable(self.position)
            if getattr(fault, "code", None) == _SYSTEM_ERROR:  # it could not be read, and can be again
                raise AudioError(f"cannot be read ({_reason(fault)}); check the disk or the network.") from None
            if self._unbounded and self.position >= self.stream.stop:
                self.cut = True
                return np.empty((0, self.channels), np.float32)
            raise SoundError(_reason(fault)) from None
        self._check_read()
        self._frames += len(block)
        return block

    def _check_read(self) -> None:
        """Raise what kept a view from reading, which the decoder took for the end of the file."""
        if self._view is not None and self._view.fault is not None:
            raise self._view.fault

    @property
    def position(self) -> int:
        """The byte of the file up to which the decoder has read."""
        return self._view.position if self._view else os.lseek(self._content.descriptor, 0, os.SEEK_CUR)

    @property
    def frames_decoded(self) -> int:
        """Frames up to the fault, as far as the decoder kept count of them."""
        try:
            return int(self._file.tell())
        except _FAULTS:
            return 0

    def close(self) -> None:
        """Release the decoder; the file stays open."""
        with contextlib.suppress(*_FAULTS), silenced(self._prints):
            self._file.close()  # nothing was written, so nothing is lost


class _Sequential(soundfile.SoundFile):
    """A file that is never sought: soundfile seeks after each read of a seekable one, which hangs on a cut FLAC."""

    def seekable(self) -> bool:
        return False


class _View(io.RawIOBase):
    """A stream of a file as a file of its own, which claims to be ``stretch`` times as long as it is.

    ``fault`` is what kept the system from reading; the decoder only saw the end of the file.
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
            content = bytes(min(wanted, _ID3V1_BYTES))  # mpg123 gives up on a length behind which it cannot read a tag
        else:
            content = self._read(wanted)
        memoryview(buffer)[: len(content)] = content
        self._at += len(content)
        return len(content)

    def _read(self, wanted: int) -> bytes:
        """The next bytes, across parts, since libsndfile takes fewer than it wanted for the end of the file."""
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
        """The part in which it stands."""
        return bisect_right(self._edges, self._at) - 1

    @property
    def position(self) -> int:
        """The byte of the whole file at which it stands."""
        part = self._part
        return self._parts[-1][1] if part == len(self._parts) else self._parts[part][0] + self._at - self._edges[part]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        self._at = origin + offset if origin + offset >= 0 else self._at  # as a descriptor stays where it was
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
