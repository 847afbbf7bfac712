"""Decoders that print are silenced while they are at work, and only they."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Final

import soundfile


class _CStreams:
    """The C library's ``stdout`` and ``stderr``, which lead nowhere while any thread is inside a decoder that prints.

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

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """Nothing that C code prints is seen while the block runs."""
        with self._lock:
            if self._users == 0:
                self._shown = [stream.value for stream in self._streams]
                for stream in self._streams:
                    stream.value = self._nowhere
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()

    def after_fork(self) -> None:
        """In a child: the threads that were inside a decoder are not in it, and what they held is given back."""
        self._lock = threading.Lock()
        self._users = 0
        if any(stream.value == self._nowhere for stream in self._streams):
            self._restore()
        if hasattr(soundfile.SoundFile, "_sf_error_lock"):  # held by soundfile while it opens a file
            soundfile.SoundFile._sf_error_lock = threading.Lock()

    def _restore(self) -> None:
        for stream, shown in zip(self._streams, self._shown, strict=True):
            stream.value = shown


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False


_C_STREAMS: Final = _CStreams()
os.register_at_fork(after_in_child=_C_STREAMS.after_fork)


def silenced(prints: bool) -> contextlib.AbstractContextManager[None]:
    """Keep what a decoder ``prints`` from being seen while the block runs; nothing where it does not print."""
    return _C_STREAMS.silenced() if prints else contextlib.nullcontext()
