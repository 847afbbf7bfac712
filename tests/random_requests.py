"""Requests that nobody thought of: recordings, levels, layers, poolings, windows and engines, drawn at random."""

from __future__ import annotations

import importlib.util
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from conftest import speech
from families import FAMILIES, GAPS, HEADS, RAW
from oracle import Answer, Oracle
from w2v_models import TOLERANCES
from w2v_runtime import Embedder
from w2v_runtime.embedding.windows import Windowing

#: Every kind of checkpoint that the fixture ``relatives`` knows.
KINDS = (*FAMILIES, *HEADS, *RAW, *GAPS, "base", "large", "emotion")
RATE = 16000
POOLINGS = ("mean", "std", "min", "max")


@dataclass(frozen=True)
class Recorded:
    """One recording: what it is made of, and what a user hands over, (samples,) or (samples, channels)."""

    made_of: str
    rate: int
    samples: np.ndarray = field(repr=False)
    from_file: bool

    @property
    def waveform(self) -> np.ndarray:
        """What a careful script feeds the model: the mean of the channels, resampled as a whole."""
        mixed = self.samples.mean(axis=1, dtype=np.float32) if self.samples.ndim == 2 else self.samples
        return mixed if self.rate == RATE else soxr.resample(mixed, self.rate, RATE)


@dataclass(frozen=True)
class Asked:
    """A request: which recordings, and the arguments of ``embed``; ``windowing`` is None for the default."""

    recordings: tuple[Recorded, ...]
    arguments: dict[str, Any]
    windowing: Windowing | None
    device: str


def ask(kind: str, number: int, checkpoint: Path, bundle: Path, folder: Path) -> None:
    """Draw request ``number`` of a kind of checkpoint and compare its answer; ``folder`` is for its files."""
    oracle = Oracle(checkpoint)
    openvino = importlib.util.find_spec("openvino") and not oracle.bert  # OpenVINO lacks its float64
    asked = draw(zlib.crc32(f"{kind} {number}".encode()), oracle, ("cpu", "openvino") if openvino else ("cpu",))
    check(asked, bundle, oracle, folder)


def draw(seed: int, oracle: Oracle, devices: tuple[str, ...]) -> Asked:
    """Draw a request of a checkpoint; equal seeds draw equal requests."""
    random = np.random.default_rng(seed)
    layers = oracle.model.config.num_hidden_layers
    arguments: dict[str, Any] = {"level": str(random.choice(["utterance", "frame"]))}
    arguments["pooling"] = random.permutation(POOLINGS)[: random.integers(1, 5)].tolist()
    match random.integers(5):
        case 0:
            arguments["layer"] = "all"
        case 1:
            arguments["layer"] = [
                "last" if k > layers else int(k) for k in random.permutation(layers + 2)[: random.integers(1, 4)]
            ]
        case 2:
            arguments["layer_weights"] = _weights(random, layers + 1)
    windowing = None
    if random.random() < 0.4 and not hasattr(oracle.model, "tdnn"):  # a TDNN sees beyond a window's edge
        window, context, whole = random.integers(1, 4), random.choice([0, 0.3, 1]), random.choice([0, 0.5, 2])
        windowing = Windowing(float(window), float(context), float(whole))
    long = windowing is None and random.random() < 0.25
    recordings = [_recorded(random, oracle, 0.5, 8.0) for _ in range(random.integers(1, 4))]
    if long:
        recordings.insert(int(random.integers(len(recordings) + 1)), _recorded(random, oracle, 41, 55))
    return Asked(tuple(recordings), arguments, windowing, str(random.choice(devices)))


def _weights(random: np.random.Generator, count: int) -> list[float]:
    """A probe's weights: before its softmax, or behind it."""
    raw = random.normal(size=count)
    return (raw if random.random() < 0.5 else np.exp(raw) / np.exp(raw).sum()).tolist()


def _recorded(random: np.random.Generator, oracle: Oracle, least: float, most: float) -> Recorded:
    seconds = least * (most / least) ** random.random()
    rate = int(random.choice([RATE, RATE, RATE, 8000, 44100]))
    gain = 10 ** random.uniform(-2, 0.5)
    samples = speech(seconds, rate, seed=int(random.integers(1000))) * np.float32(gain)
    made_of = f"{seconds:.3f} s of speech at {gain:.2g}"
    if rate == RATE and not oracle.bert and random.random() < 0.4:
        offset = float(random.choice([0.01, 0.37, 5, 50]))
        if random.random() < 0.3:
            samples, made_of = np.zeros_like(samples), f"{seconds:.3f} s of silence"
        samples, made_of = samples + np.float32(offset), f"{made_of}, offset {offset}"
    if random.random() < 0.3:
        samples = np.stack([samples, np.roll(samples, 1)], axis=1)
    return Recorded(made_of, rate, samples, bool(random.random() < 0.3))


def check(asked: Asked, bundle: Path, oracle: Oracle, folder: Path) -> None:
    """Compare every array of the results with the oracle's."""
    windowing = asked.windowing or Windowing()
    embedder = Embedder(bundle, asked.device, windowing=windowing)
    given: list[Any] = []
    for i, recording in enumerate(asked.recordings):
        given.append((recording.samples, recording.rate))
        if recording.from_file:
            given[-1] = folder / f"{i}.wav"
            soundfile.write(given[-1], recording.samples, recording.rate, subtype="FLOAT")
    if len(given) == 1:
        results = [embedder.embed(given[0], **asked.arguments)]
    else:
        results = list(embedder.embed_files(given, **asked.arguments))
    assert len(results) == len(given)
    for recording, result in zip(asked.recordings, results, strict=True):
        waveform = recording.waveform
        windows = () if len(waveform) <= windowing.whole * RATE else (windowing.window, windowing.context)
        answer = oracle(waveform, *windows)
        assert result.duration == len(recording.samples) / recording.rate
        for kind, values, expected, largest in compared(asked, result, answer):
            assert values.dtype == np.float32
            assert values.shape == expected.shape, (kind, recording)
            tolerance, off = TOLERANCES["fp32"][kind], np.abs(values - expected).max()
            within = off <= tolerance.max_abs or off <= tolerance.max_rel * largest
            assert within, f"{kind} of {recording}: max abs {off:.1e} of {largest:.1e}"


def compared(asked: Asked, result: Any, answer: Answer) -> list[tuple[str, np.ndarray, np.ndarray, float]]:
    """What is compared, one layer or statistic each.

    That is the row of the tolerances, the result's part, the oracle's, and the largest number that these are made of.
    """
    layer, weights = asked.arguments.get("layer", "last"), asked.arguments.get("layer_weights")
    if weights is not None:
        exact = np.array(weights)
        if exact.min() < 0 or abs(exact.sum() - 1) > 1e-3:
            exact = np.exp(exact) / np.exp(exact).sum()
        chosen = [("layers", np.tensordot(exact, answer.layers, 1))]
    else:
        names = range(len(answer.layers)) if layer == "all" else layer if isinstance(layer, list) else [layer]
        chosen = [("frames", answer.last) if name == "last" else ("layers", answer.layers[name]) for name in names]
    parts = []
    many = np.moveaxis(result.values, -2, 0) if len(chosen) > 1 else [result.values]
    assert len(many) == len(chosen)
    for values, (kind, frames) in zip(many, chosen, strict=True):
        largest = np.abs(frames).max()
        if asked.arguments["level"] == "frame":
            parts.append((kind, values, frames, largest))
            continue
        statistics = asked.arguments["pooling"]
        for name, part in zip(statistics, np.split(values, len(statistics)), strict=True):
            row = "pooled" if kind == "frames" and name == "mean" else kind
            parts.append((row, part, getattr(frames, name)(axis=0), largest))
    if answer.columns is not None and (answer.columns.ndim == 1 or asked.arguments["level"] == "frame"):
        parts.append(("logits", result.logits, answer.columns, np.abs(answer.columns).max()))
    else:
        assert result.logits is None
    return parts
