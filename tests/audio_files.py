"""Audio files for the tests, whole and broken, made on the spot."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from w2v_models.errors import AudioError
from w2v_runtime.audio.reading import Source, read_audio

RATE = 16_000
Signal = npt.NDArray[np.float32]
#: What may hold several streams, one behind the other: format and encoding.
JOINED = [("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", None)]


def speech_like(seconds: float, rate: int = RATE) -> Signal:
    """A chirp with a slow envelope, below every Nyquist frequency in use: (seconds · rate,), peak 0.6."""
    t = np.arange(round(seconds * rate)) / rate
    chirp: Signal = 0.6 * np.sin(2 * np.pi * (200 * t + 30 * np.sin(3 * t))) * np.cos(t) ** 2
    return chirp.astype(np.float32)


def wav_bytes(content: bytes, declared: int | None = None, rate: int = RATE, channels: int = 1, code: int = 1) -> bytes:
    """A 16-bit WAV whose header may lie."""
    size = len(content) if declared is None else declared
    layout = struct.pack("<HHIIHH", code, channels, rate, rate * channels * 2 & 0xFFFF_FFFF, channels * 2 & 0xFFFF, 16)
    head = b"RIFF" + struct.pack("<I", size + 36 & 0xFFFF_FFFF) + b"WAVEfmt " + struct.pack("<I", 16) + layout
    return head + b"data" + struct.pack("<I", size) + content


def pcm16(signal: Signal) -> bytes:
    """``signal`` as 16-bit samples, low byte first."""
    return (signal * 32767).astype("<i2").tobytes()


def encoded(
    folder: Path, signal: Signal, rate: int = RATE, kind: str = "FLAC", subtype: str | None = None, **options: object
) -> bytes:
    """``signal`` in one of libsndfile's formats."""
    path = folder / f"encoded-{kind}"
    soundfile.write(path, signal, rate, format=kind, subtype=subtype, **options)
    content = path.read_bytes()
    path.unlink()
    return content


def flac_without_count(content: bytes) -> bytes:
    """Clear a FLAC file's 36-bit number of samples and its checksum, as an encoder writing to a pipe leaves them."""
    return content[:21] + bytes([content[21] & 0xF0]) + bytes(4 + 16) + content[42:]


def holed(content: bytes, size: int = 4000) -> bytes:
    """Zeros in the middle of ``content``, as a download that skipped a part leaves them."""
    middle = len(content) // 2
    return content[:middle] + bytes(size) + content[middle + size :]


def saved(folder: Path, content: bytes) -> Path:
    """A file of these bytes, called a WAV whatever they are."""
    path = folder / "input.wav"
    path.write_bytes(content)
    return path


def failure(source: Source) -> str:
    """The reason for which ``source`` fails."""
    with pytest.raises(AudioError) as raised:
        read_audio(source, RATE)
    return str(raised.value)
