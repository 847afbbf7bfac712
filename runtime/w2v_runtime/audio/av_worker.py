"""A process that decodes files with FFmpeg (PyAV), so that a file that crashes, fills or stalls it costs no other.

It runs as a script of its own and imports nothing of the runtime. On its socket it gets a file's descriptor at a time,
and answers with messages, each a length in four bytes and so many bytes: a JSON object with ``rate``, ``channels``,
``declared`` frames (or null) and ``version``; blocks of float32 frames, interleaved; an empty message; a JSON object
with ``fault`` (null if all was decoded). What cannot be opened is answered by an object with ``fault`` alone.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

import av
import numpy as np

#: Address space in bytes: FFmpeg, numpy and what a header may make FFmpeg allocate.
MEMORY = 2 << 30
#: Samples (frames × channels) of a message.
BLOCK_SAMPLES = 1 << 17
#: What may be opened: containers and streams of audio. Playlists, images and scripts, which name other files, may not.
FORMATS = (
    "aa,aac,ac3,aea,aiff,amr,amrnb,amrwb,ape,asf,asf_o,ast,au,avi,bfstm,brstm,caf,dsf,iff,dts,dtshd,eac3,flac,flv,"
    "g722,g726,gsm,ircam,iss,loas,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,nut,oma,"
    "ogg,qcp,rm,shn,sox,swf,tak,truehd,tta,voc,vqf,w64,wav,wv,xwma"
)
#: No address of any protocol is ever opened; the file is read through this process.
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}


class Descriptor:
    """A file by its descriptor, read by position: the offset is the parent's too."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._position = descriptor, 0
        self._size = os.fstat(descriptor).st_size

    def read(self, count: int) -> bytes:
        content = os.pread(self._descriptor, count, self._position)
        self._position += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position


def send(connection: socket.socket, content: bytes) -> None:
    connection.sendall(struct.pack("<I", len(content)) + content)


def tell(connection: socket.socket, **told: object) -> None:
    send(connection, json.dumps(told).encode())


def as_floats(frame: Any) -> np.ndarray:
    """A frame's samples as float32 (frames, channels), full scale 1."""
    array = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(-1, frame.layout.nb_channels).T
    if array.dtype.kind == "u":
        array = (array.astype(np.float64) - 128) / 128
    elif array.dtype.kind == "i":
        array = array / float(1 << (8 * array.dtype.itemsize - 1))
    return np.ascontiguousarray(array.T, dtype="<f4")


def decode(connection: socket.socket, descriptor: int) -> None:
    version = f"{av.__version__}, FFmpeg {av.ffmpeg_version_info}"
    try:
        container: Any = av.open(Descriptor(descriptor), options=OPTIONS)
    except Exception as error:
        tell(connection, fault=reason(error), version=version)
        return
    with container:
        if not container.streams.audio:
            tell(connection, fault="it holds no audio", version=version)
            return
        stream = container.streams.audio[0]
        stream.codec_context.thread_count = 1
        blocks = blocks_of(container, stream)
        try:
            first = next(blocks, None)
        except Exception as error:
            tell(connection, fault=reason(error), version=version)
            return
        if first is None:
            tell(connection, fault="it holds no samples", version=version)
            return
        rate, channels = first[0], first[1].shape[1]
        seconds = None
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / av.time_base
        declared = None if seconds is None or not 0 < seconds < 1e9 else round(seconds * rate)
        tell(connection, rate=rate, channels=channels, declared=declared, version=version)
        fault = None
        try:
            while first is not None:
                now, samples = first
                if (now, samples.shape[1]) != (rate, channels):
                    send(connection, b"")
                    tell(connection, changed=[now, samples.shape[1]], fault=None)
                    return
                step = max(1, BLOCK_SAMPLES // channels)
                for start in range(0, len(samples), step):
                    send(connection, samples[start : start + step].tobytes())
                first = next(blocks, None)
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            fault = reason(error)
        send(connection, b"")
        tell(connection, fault=fault)


def blocks_of(container: Any, stream: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Rate and samples (frames, channels) of about half a second at a time."""
    waiting: list[np.ndarray] = []
    count, before = 0, (0, 0)
    for frame in container.decode(stream):
        if not frame.samples:
            continue
        samples = as_floats(frame)
        kind = frame.sample_rate, samples.shape[1]
        if waiting and (kind != before or count >= kind[0] // 2):
            yield before[0], np.concatenate(waiting)
            waiting, count = [], 0
        waiting.append(samples)
        count, before = count + len(samples), kind
    if waiting:
        yield before[0], np.concatenate(waiting)


def reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it takes more memory than a recording should"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends, and with it the socket
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    av.logging.set_level(av.logging.PANIC)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        while True:
            message, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            if not message or not descriptors:
                return
            try:
                decode(connection, descriptors[0])
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:  # before a header was told: what FFmpeg's libraries raise for such a file
                tell(connection, fault=reason(error), version=av.__version__)
            finally:
                with contextlib.suppress(OSError):
                    os.close(descriptors[0])


if __name__ == "__main__":
    main()
