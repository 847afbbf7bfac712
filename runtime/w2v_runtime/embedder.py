"""The embedder: waveforms in, embeddings out, through one opened bundle."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from w2v_models.bundle import Bundle
from w2v_models.errors import AudioError, RefusedError
from w2v_models.manifest import EMBEDDING, FRAME_LENGTHS, LAST_HIDDEN_STATE, LENGTHS, LOGITS, WAVEFORM
from w2v_runtime import library
from w2v_runtime.audio import Audio, from_array, open_audio
from w2v_runtime.batching import pad
from w2v_runtime.engine import Engine, open_engine
from w2v_runtime.long import DEFAULT_WINDOWING, HeldStream, OpenStream, Windowing, embed_long
from w2v_runtime.pooling import pool
from w2v_runtime.results import LAST_LAYER, Embedding, Failure, FrameTimes, Request

Waveform = npt.NDArray[np.float32]


class Embedder:
    """An opened bundle that embeds audio.

    Args:
        model: a bundle folder, the id of an exported model, or None for the only exported one.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: one that the bundle holds, such as ``fp32``.
        threads: threads inside the engine; None follows the processors that this process may use.
        windowing: how long audio is cut.

    Raises:
        BundleError: the bundle is missing, damaged or lacks the precision.
        EngineError: the engine or device cannot be had.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Bundle | None = None,
        device: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        windowing: Windowing = DEFAULT_WINDOWING,
    ) -> None:
        self.bundle = model if isinstance(model, Bundle) else library.find(model)
        self.manifest = self.bundle.manifest
        self.precision = precision
        self.windowing = windowing
        self.engine: Engine = open_engine(self.bundle, device, precision, threads)

    def __repr__(self) -> str:
        source = self.manifest.source
        random = ", random weights" if source.random else ""
        return f"Embedder({source.model!r}, device={self.engine.device!r}, precision={self.precision!r}{random})"

    @property
    def sample_rate(self) -> int:
        """Samples per second that the model takes; everything else is resampled to it."""
        return self.manifest.architecture.sample_rate

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the head's columns; empty without a head."""
        return self.manifest.head.labels if self.manifest.head else ()

    @property
    def times(self) -> FrameTimes:
        """Where frames stand in time."""
        conv = self.manifest.architecture.conv
        return FrameTimes(conv.stride / self.sample_rate, conv.receptive_field / self.sample_rate)

    def dimension(self, request: Request) -> int:
        """D, the length of one vector of the answer to ``request``."""
        return self.manifest.architecture.hidden_size * (len(request.pooling) if request.level == "utterance" else 1)

    def check(self, request: Request) -> None:
        """Refuse what this bundle cannot compute.

        Raises:
            RefusedError: a layer that the bundle does not hold.
        """
        if request.layers != (LAST_LAYER,):
            raise RefusedError(f"layer {','.join(request.layers)!r} is not in this bundle, which holds: {LAST_LAYER}.")

    def embed(
        self,
        audio: str | os.PathLike[str] | tuple[npt.ArrayLike, int],
        level: str = "utterance",
        pooling: str | Sequence[str] = "mean",
        layer: str | int | Sequence[str | int] = LAST_LAYER,
        channel: int | None = None,
        pad_short: bool = False,
    ) -> Embedding:
        """Embed one recording: a path, or (waveform, sample rate) with shape (samples,) or (samples, channels).

        Raises:
            AudioError: it cannot be read, or is too short for one frame.
            RefusedError: the level, pooling or layer is not to be had.
        """
        request = Request.of(level, pooling, layer)
        self.check(request)
        if isinstance(audio, np.ndarray):
            raise TypeError("a waveform needs its sample rate: embed((waveform, sample_rate)).")
        if not isinstance(audio, tuple):
            path = os.fspath(audio)
            whole = self.read(path, channel, pad_short)
            return (
                self.embed_stream(path, channel, request)
                if whole is None
                else self.embed_batch([path], [whole], request)[0]
            )
        array = from_array(audio[0], audio[1], self.sample_rate, channel)
        if len(array.samples) > self.windowing.whole_samples(self.sample_rate):
            return self._embed_long("", lambda: contextlib.nullcontext(HeldStream(array)), request)
        return self.embed_batch([""], [self._long_enough(array, pad_short)], request)[0]

    def embed_files(
        self,
        paths: Iterable[str | os.PathLike[str]],
        level: str = "utterance",
        pooling: str | Sequence[str] = "mean",
        layer: str | int | Sequence[str | int] = LAST_LAYER,
        **options: Any,
    ) -> Iterator[Embedding | Failure]:
        """Embed many recordings: one :class:`Embedding` or :class:`Failure` each, in the order of ``paths``."""
        from w2v_runtime.corpus import CorpusOptions, embed_paths

        request = Request.of(level, pooling, layer)
        return embed_paths(self, (os.fspath(path) for path in paths), request, CorpusOptions(**options))

    def read(self, path: str, channel: int | None = None, pad_short: bool = False) -> Audio | None:
        """Read a recording that is embedded whole; None if it is longer, and meant for :meth:`embed_stream`.

        With ``pad_short`` what is shorter than one frame is filled up with silence, and says so in its warnings.

        Raises:
            AudioError: it cannot be read, or is too short.
        """
        limit, blocks, samples = self.windowing.whole_samples(self.sample_rate), [], 0
        with open_audio(path, self.sample_rate, channel) as stream:
            for block in stream:
                blocks.append(block)
                samples += len(block)
                if samples > limit:
                    return None
            audio = Audio(np.concatenate(blocks), self.sample_rate, stream.duration, stream.warnings)
        return self._long_enough(audio, pad_short)

    def _long_enough(self, audio: Audio, pad_short: bool) -> Audio:
        shortest = self.manifest.architecture.conv.receptive_field
        if len(audio.samples) >= shortest:
            return audio
        have = f"{len(audio.samples)} samples at {self.sample_rate} Hz, one frame needs {shortest}"
        if not pad_short:
            raise AudioError(f"too short: {have}; --pad-short embeds it with silence added.")
        samples = np.pad(audio.samples, (0, shortest - len(audio.samples)))
        return Audio(samples, audio.rate, audio.duration, (*audio.warnings, f"padded with silence: {have}"))

    def embed_stream(self, path: str, channel: int | None, request: Request) -> Embedding:
        """Embed a recording of any length in windows, never holding the whole of it.

        Raises:
            AudioError: it cannot be read, or changed while it was read.
        """
        return self._embed_long(path, lambda: open_audio(path, self.sample_rate, channel), request)

    def _embed_long(self, path: str, open_stream: OpenStream, request: Request) -> Embedding:
        return embed_long(self.engine, self.manifest, self.windowing, path, open_stream, request)

    def embed_batch(self, paths: Sequence[str], audios: Sequence[Audio], request: Request) -> list[Embedding]:
        """Embed prepared audio as one batch."""
        in_graph = request.level == "utterance" and request.pooling == ("mean",)
        outputs = [EMBEDDING] if in_graph else [LAST_HIDDEN_STATE, FRAME_LENGTHS]
        if self.manifest.head:
            outputs.append(LOGITS)
        results = dict(zip(outputs, self.forward([audio.samples for audio in audios], outputs), strict=True))
        logits = results.get(LOGITS)
        if in_graph:
            values = list(results[EMBEDDING])
        else:
            frames = [
                row[:length] for row, length in zip(results[LAST_HIDDEN_STATE], results[FRAME_LENGTHS], strict=True)
            ]
            values = frames if request.level == "frame" else [pool(rows, request.pooling) for rows in frames]
        return [
            Embedding(
                path,
                values[i].copy(),
                audio.duration,
                None if logits is None else logits[i].copy(),
                audio.warnings,
            )
            for i, (path, audio) in enumerate(zip(paths, audios, strict=True))
        ]

    def forward(self, waveforms: Sequence[Waveform], outputs: Sequence[str], fill: float = 0.0) -> list[Any]:
        """Run the graph on waveforms [(samples_i,)], padded with ``fill``, and return its ``outputs``."""
        waveform, lengths = pad(waveforms, fill)
        return self.engine.run({WAVEFORM: waveform, LENGTHS: lengths}, outputs)
