"""libsndfile through soundfile, made safe for files of unknown origin: what it opens, how it reads, what it prints."""

from __future__ import annotations

import ctypes
import io
import os
import stat
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import soundfile

from w2v_models.errors import AudioError
from w2v_runtime.headers import mp3_declares_frames

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Samples (frames times channels) decoded at a time: half a megabyte, so that a block stays in the processor's cache.
BLOCK_SAMPLES: Final = 1 << 17

#: From here on a frame count means that the header has none (FLAC and Ogg: 2^63-1).
_UNKNOWN_FRAMES: Final = 1 << 62
#: What libsndfile takes for the resource fork of a file without a name that it does not know by its first bytes: this
#: file of the current folder, whatever it is. Most MP3 files are among those.
_FORK: Final = "._"
#: The highest bit rate of an MP3 frame is 40 times the lowest.
_MP3_STRETCH: Final = 40
_MP3_FRAME: Final = 1152
_ID3V1_BYTES: Final = 128
_FAULTS: Final = (soundfile.SoundFileError, OSError, RuntimeError, ValueError, MemoryError)


class SoundError(Exception):
    """The decoder's own words for why it cannot open or go on."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor of a regular file, without ever waiting for, or waking, anything that is not one.

    Raises:
        AudioError: the path is something else, or cannot be opened.
    """
    try:
        _expect_regular(os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AudioError("does not exist, or no longer; check the path.") from None
    except AudioError:
        raise
    except (OSError, ValueError) as error:
        raise AudioError(f"cannot be opened ({_reason(error)}); check the path and its permissions.") from None
    try:
        _expect_regular(os.fstat(descriptor))  # it may have been replaced since
    except AudioError:
        os.close(descriptor)
        raise
    return descriptor


def _expect_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise AudioError("not a regular file; name an audio file.")


class Sound:
    """One stream of a file, read from front to back: the first, or the one that begins at byte ``start``.

    ``rate`` is in Hz; ``container`` is libsndfile's name of the format. ``declared`` is the untrusted number of frames
    in the header, None where it has none; ``estimated`` is that number, or a guess from the size. ``cut`` says that the
    file ended within an MP3 frame.

    Raises:
        SoundError: libsndfile cannot open it.
    """

    def __init__(self, descriptor: int, start: int = 0) -> None:
        self.start = start
        self.cut = False
        self._frames = 0
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._rest = _Rest(descriptor, start) if start else None
        self._file = self._open()
        self.rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        self.container: str = self._file.format
        frames: int = self._file.frames
        self.declared = frames if frames < _UNKNOWN_FRAMES else None
        # Lossless compression leaves about one byte of a sample.
        self.estimated = frames if self.declared is not None else self._size // self.channels
        self._step = max(1, BLOCK_SAMPLES // self.channels)
        if self.container == "MP3":
            self._step = min(self._step, self.rate)  # all of the block in which mpg123 meets damage is lost
        self._unbounded = self.container == "MP3" and not mp3_declares_frames(descriptor, start)
        if self._unbounded:
            self._open_unbounded_mp3()

    def _open(self) -> _Sequential:
        try:
            with _C_STREAMS:  # a descriptor is read without Python's lock, faster than a Python file
                file = _Sequential(self._rest or self._descriptor, "r", closefd=False)
        except _FAULTS as fault:
            raise SoundError(_reason(fault) + (f"; {_fork_reason()}" if os.path.lexists(_FORK) else "")) from None
        if file.format == "SD2":
            raise SoundError(_fork_reason())
        return file

    def _open_unbounded_mp3(self) -> None:
        """Open again as if the file were longer.

        Without a frame count, libsndfile stops where the whole would end had all frames the size of the first.
        """
        self.close()
        self.declared = None
        self._step = 4 * _MP3_FRAME  # and so is that with the last frame, if it is cut
        self._rest = _Rest(self._descriptor, self.start, _MP3_STRETCH)
        self._file = self._open()

    def read(self) -> npt.NDArray[np.float32]:
        """The next frames (n, channels) of at most ``BLOCK_SAMPLES`` samples in all, n = 0 at the end of the stream.

        Raises:
            SoundError: the stream is damaged.
        """
        frames = self._step
        if self.container == "FLAC" and self.declared is not None:
            frames = min(frames, self.declared - self._frames)  # libFLAC takes tags behind the stream for damage
        try:
            with _C_STREAMS:
                block: npt.NDArray[np.float32] = self._file.read(frames, dtype="float32", always_2d=True)
        except _FAULTS as fault:
            if self._unbounded and self.position >= self._size:
                self.cut = True
                return np.empty((0, self.channels), np.float32)
            raise SoundError(_reason(fault)) from None
        self._frames += len(block)
        return block

    @property
    def position(self) -> int:
        """The byte of the file up to which the decoder has read."""
        return self._rest.position if self._rest else os.lseek(self._descriptor, 0, os.SEEK_CUR)

    @property
    def frames_decoded(self) -> int:
        """Frames up to the fault, as far as the decoder kept count of them."""
        try:
            return int(self._file.tell())
        except _FAULTS:
            return 0

    def close(self) -> None:
        """Release the decoder; the descriptor stays open."""
        try:
            with _C_STREAMS:
                self._file.close()
        except _FAULTS:
            pass  # nothing was written, so nothing is lost


class _Sequential(soundfile.SoundFile):
    """A file that is never sought: soundfile seeks after each read of a seekable one, which hangs on a cut FLAC."""

    def seekable(self) -> bool:
        return False


class _Rest(io.RawIOBase):
    """A file from byte ``start`` on as a file of its own, which claims to be ``stretch`` times as long as it is.

    libsndfile opens most formats only at byte 0 of a descriptor.
    """

    def __init__(self, descriptor: int, start: int, stretch: int = 1) -> None:
        self._descriptor, self._start = descriptor, start
        self._end = start + stretch * (os.fstat(descriptor).st_size - start)
        self._stretched = stretch > 1
        self.position = start

    def readinto(self, buffer: WriteableBuffer) -> int:
        wanted = memoryview(buffer).nbytes
        content = os.pread(self._descriptor, wanted, self.position)
        if self._stretched and self.position == self._end - _ID3V1_BYTES:
            content = bytes(min(wanted, _ID3V1_BYTES))  # mpg123 gives up on a length behind which it cannot read a tag
        memoryview(buffer)[: len(content)] = content
        self.position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: self._start, os.SEEK_CUR: self.position, os.SEEK_END: self._end}[whence]
        self.position = max(self._start, origin + offset)
        return self.tell()

    def tell(self) -> int:
        return self.position - self._start


class _CStreams:
    """While any thread is inside the decoder, the C library's ``stdout`` and ``stderr`` lead nowhere.

    mpg123 prints what it finds odd about an MP3, libsndfile what it does about a sample dump (SDS). Only the pointers
    that C code prints through are exchanged, for the time of a call, counted over threads: the descriptors,
    ``sys.stdout`` and ``sys.stderr`` stay as they are. Without glibc it does nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._streams: list[ctypes.c_void_p] = []
        self._shown: list[int | None] = []
        if _has_glibc():
            library = ctypes.CDLL(None)
            library.fopen.restype = ctypes.c_void_p
            self._nowhere = library.fopen(os.devnull.encode(), b"we")
            if self._nowhere:
                self._streams = [ctypes.c_void_p.in_dll(library, name) for name in ("stdout", "stderr")]

    def __enter__(self) -> None:
        if not self._streams:
            return
        with self._lock:
            if self._users == 0:
                self._shown = [stream.value for stream in self._streams]
                for stream in self._streams:
                    stream.value = self._nowhere
            self._users += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._streams:
            return
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for stream, shown in zip(self._streams, self._shown, strict=True):
                    stream.value = shown


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False


def _fork_reason() -> str:
    where = os.path.join(os.getcwd(), _FORK)
    return f"libsndfile reads {where} as its resource fork, so move that away or start in another folder"


def _reason(fault: BaseException) -> str:
    if isinstance(fault, soundfile.LibsndfileError):
        return str(fault.error_string).rstrip(".")
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror
    return str(fault).rstrip(".") or type(fault).__name__


_C_STREAMS: Final = _CStreams()


def _renew_lock() -> None:
    """In a forked process no thread is opening a file, and would never release soundfile's own lock for that."""
    soundfile.SoundFile._sf_error_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
