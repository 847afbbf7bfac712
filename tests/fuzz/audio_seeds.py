"""Tiny audio files of every format that libsndfile writes, and of the oddities that the header reading knows."""

from __future__ import annotations

import io
import struct

import numpy as np
import soundfile
from nested_seeds import nested

RATE = 16_000
#: Formats that one stream can follow another in.
_JOINED = (("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16"))
#: Nothing in a headerless file tells its format, and SD2 keeps it in a second file.
_UNREADABLE = {"RAW", "SD2"}
#: Rates and channels that change the layout of what is written.
_LAYOUTS = ((RATE, 1), (44_100, 2), (8_000, 6))
_FRAMES = 400
#: The fuzzer keeps no more of an input.
_LONGEST = 16_384


def audio_seeds() -> dict[str, bytes]:
    """Seeds by name: each format with each of its encodings, files as other programs leave them, files in others."""
    seeds = {}
    for kind in sorted(set(soundfile.available_formats()) - _UNREADABLE):
        for subtype in soundfile.available_subtypes(kind):
            for rate, channels in _LAYOUTS:
                if content := encoded(kind, subtype, rate, channels):
                    seeds[f"{kind}-{subtype}-{rate}-{channels}"] = content
    inside = {name: seed.content for name, seed in nested(_FRAMES, RATE).items() if len(seed.content) <= _LONGEST}
    return seeds | _odd(seeds) | inside


def encoded(kind: str, subtype: str, rate: int = RATE, channels: int = 1, frames: int = _FRAMES) -> bytes:
    """A chirp in one format; empty where libsndfile cannot write such a file."""
    time = np.arange(frames) / rate
    chirp = 0.5 * np.sin(2 * np.pi * (200 + 900 * time) * time)
    file = io.BytesIO()
    try:
        soundfile.write(file, np.stack([chirp] * channels, axis=1), rate, subtype, format=kind)
    except (soundfile.SoundFileError, ValueError, TypeError):
        return b""
    return file.getvalue()


def _odd(seeds: dict[str, bytes]) -> dict[str, bytes]:
    wav = seeds["WAV-PCM_16-16000-1"]
    flac = seeds["FLAC-PCM_16-16000-1"]
    mp3 = seeds["MP3-MPEG_LAYER_III-16000-1"]
    header = max(mp3.find(b"Xing"), mp3.find(b"Info"))
    odd = {
        "empty": b"",
        "wav-from-a-pipe": wav.replace(struct.pack("<I", 2 * _FRAMES), b"\xff\xff\xff\xff"),
        "wav-extensible-float": _riff(struct.pack("<HHIIHH", 3, 2, RATE, 8 * RATE, 8, 32), bytes(800)),
        "wav-many-chunks": wav[:12] + b"junk\x02\x00\x00\x00ab" * 30 + wav[12:],
        "wav-1024-channels": _riff(struct.pack("<HHIIHH", 1, 1024, RATE, 2048 * RATE, 2048, 16), bytes(8 * 2048)),
        "rifx": b"RIFX\0\0\0\xecWAVEfmt " + struct.pack(">IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
        + b"data" + struct.pack(">I", 200) + bytes(200),
        "flac-without-count": flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4 + 16) + flac[42:],
        "flac-silence": _silence(),
        "mp3-without-count": mp3[:header] + bytes(8) + mp3[header + 8 :],
        "mp3-with-tags": b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10) + mp3 + b"TAG" + bytes(125),
        "text": b"This is a note, no sound.\n",
    }  # fmt: skip
    for kind, subtype in _JOINED:
        one, other = seeds[f"{kind}-{subtype}-16000-1"], encoded(kind, subtype, 48_000, 2)
        odd |= {f"{kind}-{subtype}-twice": one + one, f"{kind}-{subtype}-changes": one + other}
    return odd


def _riff(layout: bytes, samples: bytes) -> bytes:
    body = b"WAVEfmt " + struct.pack("<I", len(layout)) + layout + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _silence() -> bytes:
    """Ten seconds of silence in eight channels: far more samples than bytes."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros((10 * RATE, 8), np.float32), RATE, format="FLAC")
    return file.getvalue()
