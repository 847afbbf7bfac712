"""Decode with FFmpeg (PyAV, the extra ``av``) what libsndfile refuses, in processes of its own (``av_worker``).

FFmpeg is a large surface for files that nobody checked: one that crashes it, takes its memory or stalls it fails alone.
A process is kept for the next file, since starting one takes longer than decoding most recordings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from w2v_models.errors import AudioError
from w2v_runtime.audio.libsndfile import SoundError
from w2v_runtime.audio.source import Content
from w2v_runtime.audio.streams import Stream

CONTAINER: Final = "FFMPEG"
#: What reads a file without this package's extra.
READ: Final = "read it with: pip install 'w2v-onnx[av]'"
_WORKER: Final = Path(__file__).with_name("av_worker.py")
#: Seconds without an answer after which a process counts as stalled.
STALL_SECONDS: Final = 60.0
#: Files after which a process is replaced: FFmpeg's decoders are not all free of leaks.
_FILES_PER_PROCESS: Final = 200
#: Frames that a byte of the sparsest codec can hold, and bytes of padding.
_FRAMES_PER_BYTE: Final = 512
_PADDED_BYTES: Final = 65_536
#: A message is a header, or a block of samples (and one FFmpeg frame more).
_MAX_MESSAGE: Final = 1 << 26

_idle: list[_Process] = []
_lock = threading.Lock()
#: The versions of PyAV and FFmpeg that decoded something in this process; None as long as nothing was.
used_version: str | None = None


def installed() -> bool:
    """Whether PyAV is there."""
    return importlib.util.find_spec("av") is not None


class FFmpegSound:
    """Decodes the first audio stream of a file; has what the decoder needs of a ``libsndfile.Sound``.

    Raises:
        SoundError: FFmpeg cannot open it, or holds no audio.
    """

    cut = False
    container = CONTAINER

    def __init__(self, content: Content, stream: Stream) -> None:
        global used_version
        self.stream = Stream(stream.parts)
        self._size, self._frames, self._ended = content.size, 0, False
        try:
            self._process, told = _begun(content.descriptor)
        except _LostError as error:
            raise SoundError(str(error)) from None
        used_version = told.get("version", used_version)
        if "rate" not in told:
            self._ended = True
            self.close()
            raise SoundError(f"FFmpeg says: {told.get('fault')}")
        self.rate, self.channels = int(told["rate"]), int(told["channels"])
        self.declared: int | None = told["declared"]
        self.estimated = content.size // self.channels if self.declared is None else self.declared

    def read(self) -> npt.NDArray[np.float32]:
        """Decode the next frames: (n, channels); n = 0 at the end.

        Raises:
            SoundError: the stream is damaged, or its decoder crashed or stalled.
            AudioError: the rate or the channels change within it.
        """
        empty = np.empty((0, self.channels), np.float32)
        if self._ended:
            return empty
        try:
            block = self._process.message()
            if block:
                samples = np.frombuffer(block, "<f4").reshape(-1, self.channels)
                self._frames += len(samples)
                if self._frames > _FRAMES_PER_BYTE * (self._size + _PADDED_BYTES):
                    raise SoundError(f"it goes on behind what {self._size} bytes can hold")
                return samples
            told = json.loads(self._process.message())
        except _LostError as error:
            raise SoundError(str(error)) from None
        self._ended = True
        if "changed" in told:
            rate, channels = told["changed"]
            raise AudioError(
                f"after {self._frames / self.rate:.2f} s the stream changes from {self.rate} Hz, {self.channels} "
                f"channel(s), to {rate} Hz, {channels} channel(s); split the file there."
            )
        if told["fault"] is not None:
            raise SoundError(f"FFmpeg says: {told['fault']}")
        return empty

    @property
    def frames_decoded(self) -> int:
        return self._frames

    @property
    def position(self) -> int:
        return self._size

    def close(self) -> None:
        """Give the process back, or end it if it has not come to the end of the file."""
        process, self._process = self._process, _NONE
        if self._ended:
            process.give_back()
        else:
            process.kill()


class _LostError(Exception):
    """A process crashed or stalled."""


class _Process:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        self._socket = ours
        self._socket.settimeout(STALL_SECONDS)
        self._files = 0

    def send(self, descriptor: int) -> None:
        self._files += 1
        try:
            socket.send_fds(self._socket, [b"f"], [descriptor])
        except OSError:
            raise _LostError(self._end()) from None

    def message(self) -> bytes:
        """The next message.

        Raises:
            _LostError: the process crashed, stalled or answers nonsense.
        """
        (size,) = struct.unpack("<I", self._bytes(4))
        if size > _MAX_MESSAGE:
            raise _LostError("FFmpeg's process answered nonsense")
        return self._bytes(size)

    def _bytes(self, count: int) -> bytes:
        content = bytearray(count)
        view = memoryview(content)
        while len(view):
            try:
                got = self._socket.recv_into(view)
            except TimeoutError:
                self.kill()
                raise _LostError(f"FFmpeg gave nothing for {STALL_SECONDS:g} s and was stopped") from None
            except OSError:
                got = 0
            if not got:
                raise _LostError(self._end())
            view = view[got:]
        return bytes(content)

    def _end(self) -> str:
        code = None
        if self._process is not None:
            self.kill(wait_first=True)
            code = self._process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"FFmpeg's process crashed on it ({how})"

    def give_back(self) -> None:
        if self._process is None:
            return
        with _lock:
            if self._files < _FILES_PER_PROCESS and self._process.poll() is None:
                _idle.append(self)
                return
        self.kill()

    def kill(self, wait_first: bool = False) -> None:
        if self._process is None:
            return
        self._socket.close()
        if wait_first:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Let go of the process of a parent."""
        self._socket.close()
        self._process = None


class _NoProcess(_Process):
    def __init__(self) -> None:
        self._process = None


_NONE: Final = _NoProcess()


def _begun(descriptor: int) -> tuple[_Process, dict[str, Any]]:
    """A process that has opened a file, and what it told of it; one that died while it waited is replaced.

    Raises:
        _LostError: a new process crashed on the file, or stalled.
    """
    while True:
        process, fresh = _taken()
        try:
            process.send(descriptor)
            return process, json.loads(process.message())
        except BaseException as error:
            process.kill()
            if fresh or not isinstance(error, _LostError):
                raise


def _taken() -> tuple[_Process, bool]:
    """A process, and whether it is new."""
    with _lock:
        if _idle:
            return _idle.pop(), False
    return _Process(), True


def _forked() -> None:
    global _lock
    _lock = threading.Lock()
    for process in _idle:
        process.forget()
    _idle.clear()


os.register_at_fork(after_in_child=_forked)


def end_idle() -> None:
    """End the processes that wait for a file."""
    with _lock:
        waiting = _idle.copy()
        _idle.clear()
    for process in waiting:
        process.kill()
