"""Synthetic waveforms for the parity test: speech-like, noise, silence, quiet and with an offset, all seeded."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from w2v_models.manifest import ConvStack

Waveform = npt.NDArray[np.float32]

#: First formants of some vowels in Hz (Peterson & Barney 1952, men): /i/, /a/, /u/, /ae/, /er/.
_VOWELS: Final = ((270, 2290, 3010), (730, 1090, 2440), (300, 870, 2240), (660, 1720, 2410), (490, 1350, 1690))
_SYLLABLE_SECONDS: Final = 0.2


def speech_like(samples: int, rate: int, seed: int = 0) -> Waveform:
    """Synthetic vowels, (samples,) float32 with peak 0.5: harmonics of a varying pitch, weighted by formants.

    It has the traits of speech that matter to the model: harmonics, formants, modulation at 5 Hz, pauses.
    """
    random = np.random.default_rng(seed)
    time = np.arange(samples) / rate
    syllables = int(samples / rate / _SYLLABLE_SECONDS) + 1
    at = np.minimum((time / _SYLLABLE_SECONDS).astype(int), syllables - 1)
    pitch = 120 + 20 * np.sin(2 * np.pi * 0.7 * time) + 10 * random.standard_normal(syllables)[at]
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    formants = np.array(_VOWELS)[random.integers(len(_VOWELS), size=syllables)][at]
    voice = np.zeros(samples)
    for harmonic in range(1, 30):
        distance = (harmonic * pitch[:, None] - formants) / 90
        voice += (1 / (1 + distance**2)).sum(axis=1) * np.sin(harmonic * phase) / harmonic**0.5
    loudness = np.where(random.random(syllables) < 0.15, 0.0, random.uniform(0.3, 1, syllables))[at]
    voice *= loudness * np.sin(np.pi * (time / _SYLLABLE_SECONDS % 1)) ** 2
    voice += 0.003 * random.standard_normal(samples)
    return scale(voice, 0.5)


def noise(samples: int, seed: int = 0) -> Waveform:
    """White Gaussian noise: (samples,), peak 0.5."""
    return scale(np.random.default_rng(seed).standard_normal(samples), 0.5)


def scale(waveform: npt.NDArray[np.floating], peak: float) -> Waveform:
    """Scale a waveform to a peak magnitude; returns float32."""
    return (waveform * (peak / max(float(np.abs(waveform).max()), 1e-30))).astype(np.float32)


def parity_waveforms(conv: ConvStack, rate: int) -> dict[str, Waveform]:
    """The built-in parity cases by name: speech from one frame to 12 s, and signals that reveal errors of a graph."""

    def seconds(value: float) -> int:
        return round(value * rate)

    field = conv.receptive_field
    lengths = {
        f"{field} samples": field,
        f"{field + 1} samples": field + 1,
        "0.1 s": seconds(0.1),
        "1 s": seconds(1),
        "3.7 s": seconds(3.7),
        "12 s": seconds(12),
    }
    cases = {f"speech {name}": speech_like(samples, rate, seed) for seed, (name, samples) in enumerate(lengths.items())}
    return cases | {
        f"noise {field} samples": noise(field),
        "noise 2.1 s": noise(seconds(2.1)),
        "silence 1.3 s": np.zeros(seconds(1.3), np.float32),
        "quiet 1 s": scale(speech_like(seconds(1), rate, seed=10), 1e-3),
        # With a larger offset the reference itself is inexact: it takes the mean in float32.
        "offset 1.9 s": speech_like(seconds(1.9), rate, seed=11) * np.float32(0.8) + np.float32(0.1),
    }
