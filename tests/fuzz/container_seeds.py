"""Tiny files of the containers that FFmpeg opens and libsndfile does not, as PyAV writes them."""

from __future__ import annotations

import io

import numpy as np

RATE = 16_000
#: Codec and container; the encoder's sample format where it would not take 16 bits.
_KINDS = (
    ("aac", "ipod", None),
    ("alac", "ipod", "s16p"),
    ("aac", "mov", None),
    ("aac", "3gp", None),
    ("aac", "adts", None),
    ("aac", "mpegts", None),
    ("aac", "flv", None),
    ("libopus", "webm", None),
    ("libopus", "matroska", None),
    ("pcm_s16le", "matroska", None),
    ("pcm_s16le", "avi", None),
    ("ac3", "ac3", None),
    ("wavpack", "wv", "s16p"),
    ("tta", "tta", "s16"),
)


def container_seeds() -> dict[str, bytes]:
    """Seeds by name."""
    return {f"{codec}-{container}": encoded(codec, container, kind) for codec, container, kind in _KINDS}


def encoded(codec: str, container: str, kind: str | None) -> bytes:
    """A fifth of a second of a chirp in one container."""
    import av

    time = np.arange(RATE // 5) / RATE
    chirp = 0.5 * np.sin(2 * np.pi * (200 + 900 * time) * time)
    content = io.BytesIO()
    with av.open(content, "w", format=container) as file:
        stream = file.add_stream(codec, rate=RATE if codec != "ac3" else 32_000)
        stream.layout = "mono"
        if kind is not None:
            stream.format = kind
        frame = av.AudioFrame.from_ndarray((chirp * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    return content.getvalue()
