"""Silence the C library's ``stdout`` and ``stderr`` while a decoder that prints is running."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Final

import soundfile


class _CStreams:
    """Redirects the C library's ``stdout`` and ``stderr`` to the null device while a thread is inside a decoder.

    mpg123 prints warnings about an MP3, libsndfile prints while it reads a sample dump (SDS). Only the ``FILE``
    pointers that C code prints through are replaced, from the first thread's entry to the last one's exit: the file
    descriptors, ``sys.stdout`` and ``sys.stderr`` stay as they are. Without glibc this class does nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._streams: list[ctypes.c_void_p] = []
        self._saved: list[int | None] = []
        if _has_glibc():
            library = ctypes.CDLL(None)
            library.fopen.restype = ctypes.c_void_p
            self._devnull = library.fopen(os.devnull.encode(), b"we")
            if self._devnull:
                self._streams = [ctypes.c_void_p.in_dll(library, name) for name in ("stdout", "stderr")]

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """Discard what C code prints while the block runs."""
        with self._lock:
            if self._users == 0:
                self._saved = [stream.value for stream in self._streams]
                for stream in self._streams:
                    stream.value = self._devnull
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()

    def after_fork(self) -> None:
        """In a forked child, renew the locks and restore the streams: threads that were inside a decoder are gone."""
        self._lock = threading.Lock()
        self._users = 0
        if any(stream.value == self._devnull for stream in self._streams):
            self._restore()
        if hasattr(soundfile.SoundFile, "_sf_error_lock"):  # held by soundfile while it opens a file
            soundfile.SoundFile._sf_error_lock = threading.Lock()

    def _restore(self) -> None:
        for stream, shown in zip(self._streams, self._saved, strict=True):
            stream.value = shown


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False


_C_STREAMS: Final = _CStreams()
os.register_at_fork(after_in_child=_C_STREAMS.after_fork)


def silenced(prints: bool) -> contextlib.AbstractContextManager[None]:
    """A context that discards what a decoder prints; it does nothing if the decoder does not print (``prints``)."""
    return _C_STREAMS.silenced() if prints else contextlib.nullcontext()
