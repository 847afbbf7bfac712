"""Open a source of audio (a path, bytes or an open binary file) as a regular file that is read by position."""

from __future__ import annotations

import io
import os
import re
import stat
import tempfile
from typing import Any, BinaryIO, Final
from urllib.parse import unquote

from w2v_models.errors import AudioError

#: What audio is read from: a path, the bytes of a file, or an open binary file, read from its current position.
Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO

_COPY_BYTES: Final = 1 << 20
_URL: Final = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class Content:
    """An open regular file that is read by position (``pread``); it takes over ``descriptor`` and closes it.

    ``size`` is the file's size in bytes when it was opened.

    Raises:
        AudioError: on opening, ``descriptor`` is not that of a regular file.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        try:
            status = os.fstat(descriptor)
            _expect_regular(status)
        except OSError as error:
            os.close(descriptor)
            raise _unreadable(error) from None
        except AudioError:
            os.close(descriptor)
            raise
        self.size, self._modified_ns = status.st_size, status.st_mtime_ns

    def read(self, start: int, length: int) -> bytes:
        """Up to ``length`` bytes from byte ``start`` on, fewer only at the end of the file.

        Raises:
            AudioError: the system cannot read them.
        """
        try:
            content = os.pread(self.descriptor, length, start)
            while 0 < len(content) < length and start + len(content) < self.size:  # a read error may lie in the rest
                more = os.pread(self.descriptor, length - len(content), start + len(content))
                if not more:
                    break
                content += more
            return content
        except OSError as error:
            raise _unreadable(error) from None

    def check_readable(self, *places: int) -> None:
        """Read single bytes, to tell a read error of the system from a file that cannot be decoded.

        Raises:
            AudioError: the system cannot read the byte at one of ``places``, or the last byte of the file.
        """
        for place in (*places, self.size - 1):
            self.read(max(0, place), 1)

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened.

        Raises:
            AudioError: the size or the modification time has changed.
        """
        try:
            status = os.fstat(self.descriptor)
        except OSError as error:
            raise _unreadable(error) from None
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified_ns):
            raise AudioError(
                f"written to while it was read: it had {self.size} bytes and has {status.st_size} now; "
                "embed it again once it is complete."
            )

    def close(self) -> None:
        """Release the file; further calls do nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def open_content(source: Source) -> Content:
    """Open a source as a file; bytes and open files are copied into an unnamed file, which vanishes on closing.

    An open file is set back to its position if it is seekable, so that it can be opened again. One of a regular file
    at its start is not copied.

    Raises:
        AudioError: the source does not exist, cannot be read, or is no regular file. The message leaves out the path.
        TypeError: ``source`` is not a path, bytes or an open binary file.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return Content(_of_bytes(memoryview(source)))
    if isinstance(source, str | os.PathLike):
        return Content(_of_path(os.fspath(source)))
    if hasattr(source, "read"):
        return Content(_of_file(source))
    raise TypeError(
        f"audio is a path, bytes or an open binary file, not {type(source).__name__}; "
        "a waveform goes with its rate: (waveform, sample_rate)."
    )


def spooled(file: BinaryIO) -> BinaryIO:
    """Copy the rest of a stream that can be read only once, such as standard input, to a seekable unnamed file.

    Use the result in a ``with`` statement, since it holds disk space until it is closed.

    Raises:
        AudioError: the stream cannot be read, or the temporary folder has no room for it.
    """
    _check_open(file)
    copy = _unnamed_file()
    try:
        _copy(file, copy.fileno())
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return copy


def _of_path(path: str) -> int:
    """Open a path as a descriptor if it is a regular file; a FIFO or a device is not opened, since that may block."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()  # raises for an unreadable folder, so that the message says so
            raise AudioError("not a regular file, but a folder; name it as an input of its own to search it.")
        _expect_regular(status)
        return os.open(path, _OPEN_FLAGS)
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(_why_not_opened(str(path), error)) from None


def _expect_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise AudioError("not a regular file; name an audio file.")


def _why_not_opened(path: str, error: OSError | ValueError) -> str:
    if url := _URL.match(path):
        rest = path[url.end() :]
        if url[1].lower() == "file":
            return f"a URL; name the path alone: {unquote(rest[rest.find('/') :])}"
        return "a URL, and URLs are not fetched; download it and name the file."
    if not isinstance(error, FileNotFoundError):
        return f"cannot be opened ({reason_of(error)}); check the path and its permissions."
    if any(character in path for character in "*?["):
        return "does not exist: the shell found no match for this pattern, or it was quoted; check the folder's name."
    return "does not exist, or no longer; check the path."


def _of_bytes(content: memoryview) -> int:
    """A descriptor of a file in memory (``memfd``) with these bytes; a temporary file on systems without memfd."""
    if not hasattr(os, "memfd_create"):
        return _copied(io.BytesIO(content))
    try:
        descriptor = os.memfd_create("w2v-audio", os.MFD_CLOEXEC)
    except OSError as error:
        raise _no_room("memory", error) from None
    try:
        _write(descriptor, content.cast("B") if content.c_contiguous else memoryview(content.tobytes()), "memory")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _of_file(file: BinaryIO) -> int:
    _check_open(file)
    opened = _reopened(file)
    return _copied(file) if opened is None else opened


def _check_open(file: BinaryIO) -> None:
    if isinstance(file, io.TextIOBase):
        raise _text_error()
    if getattr(file, "closed", False):
        raise AudioError("the file is closed; give it while it is open.")


def _text_error() -> TypeError:
    return TypeError("a file in text mode cannot be read as audio; open it as open(path, 'rb').")


def _reopened(file: BinaryIO) -> int | None:
    """A new descriptor of an open regular file that is at its start, so that it need not be copied; else None.

    Raises:
        AudioError: the open file is a device.
    """
    raw = getattr(file, "raw", file)
    if type(raw) is not io.FileIO or not raw.readable():
        return None
    try:
        kind = os.fstat(raw.fileno()).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
            raise AudioError("not a regular file; open an audio file.")  # a device may be endless
        return os.open(f"/proc/self/fd/{raw.fileno()}", _OPEN_FLAGS) if stat.S_ISREG(kind) and not file.tell() else None
    except OSError:
        return None


def _copied(file: BinaryIO) -> int:
    """A descriptor of an unnamed copy of a file from its position on; the file is set back to that position.

    Raises:
        AudioError: nothing is left to read, or something else read the file meanwhile.
    """
    start = _position(file)
    with _unnamed_file() as copy:
        copied = _copy(file, copy.fileno())
        if start is not None and not _seek_back(file, start, copied):
            raise AudioError("something else read the open file at the same time; open it once for each use.")
        if copied:
            return os.dup(copy.fileno())
    if start is None:
        raise AudioError("no samples: nothing is left to read, and a stream can be read only once; give file.read().")
    raise AudioError("no samples: the file is empty, or stands at its end; file.seek(0) goes back to its beginning.")


def _position(file: BinaryIO) -> int | None:
    """The position of an open file; None if it is not seekable."""
    try:
        start = file.tell()
        file.seek(start)
    except Exception:  # any kind of file object
        return None
    return start


def _seek_back(file: BinaryIO, start: int, copied: int) -> bool:
    """Seek back to ``start``; return whether the file had moved on by ``copied`` bytes."""
    try:
        end = file.tell()
        file.seek(start)
    except Exception as error:
        raise _unreadable(error) from error
    return end - start == copied


def _copy(file: BinaryIO, descriptor: int) -> int:
    """Copy the rest of a file to ``descriptor``; return the number of bytes."""
    copied = 0
    while block := _next_block(file):
        _write(descriptor, memoryview(block), tempfile.gettempdir())
        copied += len(block)
    return copied


def _next_block(file: BinaryIO) -> bytes:
    try:
        block: Any = file.read(_COPY_BYTES)
    except Exception as error:  # a file object of any library: of a network, of an archive
        raise _unreadable(error) from error
    if isinstance(block, str):
        raise _text_error()
    return block or b""


def _write(descriptor: int, content: memoryview, place: str) -> None:
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except OSError as error:
        raise _no_room(place, error) from None


def _unnamed_file() -> BinaryIO:
    try:
        return tempfile.TemporaryFile(prefix="w2v-audio-", buffering=0)
    except OSError as error:
        raise _no_room("the temporary folder", error) from None


def _no_room(place: str, error: OSError) -> AudioError:
    return AudioError(f"cannot be copied to {place} ({reason_of(error)}); make room, or set TMPDIR to another folder.")


def _unreadable(error: BaseException) -> AudioError:
    return AudioError(f"cannot be read ({reason_of(error)}); check the disk or the network that it is on.")


def reason_of(fault: BaseException) -> str:
    """The error's message without a full stop: the system's text, the exception's, else its class name."""
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror
    return str(fault).rstrip(".") or type(fault).__name__
