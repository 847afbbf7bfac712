"""The embedder: waveforms in, embeddings out, through one opened bundle."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from w2v_models.bundle import Bundle
from w2v_models.errors import AudioError, W2VError
from w2v_models.manifest import (
    FRAME_LENGTHS,
    LAST_LAYER,
    LAYER_WEIGHTS,
    LENGTHS,
    WAVEFORM,
    Head,
    frames_output,
    pooled_output,
)
from w2v_runtime import library
from w2v_runtime.audio import Audio, from_array, open_audio
from w2v_runtime.batching import pad
from w2v_runtime.engine import Engine, open_engine
from w2v_runtime.long import DEFAULT_WINDOWING, Advance, HeldStream, OpenStream, Windowing, embed_long
from w2v_runtime.results import Embedding, Failure, FrameTimes, Request

Waveform = npt.NDArray[np.float32]
DEFAULT_REQUEST: Final = Request()


class Embedder:
    """An opened bundle that embeds audio.

    Args:
        model: a bundle folder, the id of an exported model, or None for the only exported one.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, several as ``cuda:0,cuda:1``, or ``openvino``.
        precision: one that the bundle holds and the device computes: ``fp32``, ``tf32``, ``fp16``, ``bf16``, ``int8``.
        threads: threads inside the engine; None follows the processors that this process may use.
        windowing: how long audio is cut.
        request: what it is opened for; anything else can be asked of it too, and opens the graph again.
        prepack: whether ONNX Runtime rearranges the weights when it opens them. Without, the base model opens in a
            tenth of the time, runs take a little longer, and results differ in their last bits.

    Raises:
        RefusedError: the request names a layer that the model does not have.
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
        request: Request = DEFAULT_REQUEST,
        prepack: bool = True,
    ) -> None:
        self.bundle = model if isinstance(model, Bundle) else library.find(model)
        self.manifest = self.bundle.manifest
        self.precision = precision
        self.windowing = windowing
        outputs = self._outputs(self.resolve(request))
        self.engine: Engine = open_engine(self.bundle, device, precision, threads, outputs, prepack)

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

    def head(self, request: Request) -> Head | None:
        """The head whose columns belong to the answer; one that answers frame by frame only to frames."""
        head = self.manifest.head
        return None if head is None or (head.level == "frame" and request.level != "frame") else head

    def dimension(self, request: Request) -> int:
        """D, the length of one vector of the answer to ``request``."""
        return self.manifest.architecture.hidden_size * (len(request.pooling) if request.level == "utterance" else 1)

    def resolve(self, request: Request) -> Request:
        """The request with its layers named.

        Raises:
            RefusedError: a layer that the model does not have.
        """
        return request.resolved(self.manifest.architecture.layers)

    def embed(
        self,
        audio: str | os.PathLike[str] | tuple[npt.ArrayLike, int],
        level: str = "utterance",
        pooling: str | Sequence[str] = "mean",
        layer: str | int | Sequence[str | int] = LAST_LAYER,
        channel: int | None = None,
        pad_short: bool = False,
        layer_weights: Sequence[float] | None = None,
    ) -> Embedding:
        """Embed one recording: a path, or (waveform, sample rate) with shape (samples,) or (samples, channels).

        Raises:
            AudioError: it cannot be read, or is too short for one frame.
            RefusedError: the level, pooling or layer is not to be had.
        """
        request = self.resolve(Request.of(level, pooling, layer, layer_weights))
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
            return self.embed_windowed("", array, request)
        return self.embed_batch([""], [self._long_enough(array, pad_short)], request)[0]

    def embed_files(
        self,
        paths: Iterable[str | os.PathLike[str]],
        level: str = "utterance",
        pooling: str | Sequence[str] = "mean",
        layer: str | int | Sequence[str | int] = LAST_LAYER,
        layer_weights: Sequence[float] | None = None,
        **options: Any,
    ) -> Iterator[Embedding | Failure]:
        """Embed many recordings: one :class:`Embedding` or :class:`Failure` each, in the order of ``paths``."""
        from w2v_runtime.corpus import CorpusOptions, embed_paths

        request = self.resolve(Request.of(level, pooling, layer, layer_weights))
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
        conv, head = self.manifest.architecture.conv, self.manifest.head
        shortest = conv.receptive_field + ((head.shortest if head else 1) - 1) * conv.stride
        if len(audio.samples) >= shortest:
            return audio
        what = "one frame" if head is None or head.shortest == 1 else f"the {head.kind} head"
        have = f"{len(audio.samples)} samples at {self.sample_rate} Hz, {what} needs {shortest}"
        if not pad_short:
            raise AudioError(f"too short: {have}; --pad-short embeds it with silence added.")
        samples = np.pad(audio.samples, (0, shortest - len(audio.samples)))
        return Audio(samples, audio.rate, audio.duration, (*audio.warnings, f"padded with silence: {have}"))

    def embed_stream(
        self, path: str, channel: int | None, request: Request, advance: Advance = lambda seconds: None
    ) -> Embedding:
        """Embed a recording of any length in windows, never holding the whole of it.

        ``advance(seconds)`` is called after each window with the seconds of the recording that are done.

        Raises:
            AudioError: it cannot be read, or changed while it was read.
        """
        return self._embed_long(path, lambda: open_audio(path, self.sample_rate, channel), request, advance)

    def embed_windowed(self, path: str, audio: Audio, request: Request) -> Embedding:
        """Embed prepared audio in windows, also where it would fit one."""
        return self._embed_long(path, lambda: contextlib.nullcontext(HeldStream(audio)), request)

    def _embed_long(
        self, path: str, open_stream: OpenStream, request: Request, advance: Advance = lambda seconds: None
    ) -> Embedding:
        head = self.head(request)
        return embed_long(self.engine, self.manifest, self.windowing, path, open_stream, request, head, advance)

    def embed_batch(self, paths: Sequence[str], audios: Sequence[Audio], request: Request) -> list[Embedding]:
        """Embed prepared audio as one batch.

        Raises:
            W2VError: the engine failed, or its answer to one of them is not finite.
        """
        names, head = self._outputs(request), self.head(request)
        arrays = self.forward([audio.samples for audio in audios], names, layer_weights=request.layer_weights)
        outputs = dict(zip(names, arrays, strict=True))
        columns = None if head is None else outputs.pop(head.outputs[-1])
        lengths = outputs.pop(FRAME_LENGTHS, None)
        frame_columns = head is not None and head.level == "frame"
        embeddings = []
        for i, (path, audio) in enumerate(zip(paths, audios, strict=True)):
            end = None if lengths is None else lengths[i]
            values = _assembled([array[i, :end] for array in outputs.values()], request)
            logits = None if columns is None else columns[i, : end if frame_columns else None].copy()
            if not (np.isfinite(values).all() and (logits is None or np.isfinite(logits).all())):
                raise W2VError("the model's answer is not finite; its weights may be damaged: w2v-models verify.")
            embeddings.append(Embedding(path, values, audio.duration, logits, audio.warnings))
        return embeddings

    def _outputs(self, request: Request) -> list[str]:
        """The graph's outputs that a request needs, its vectors first, layer by layer."""
        head = self.head(request)
        columns = [] if head is None else [head.outputs[-1]]
        if request.level == "frame":
            return [frames_output(layer) for layer in request.layers] + [FRAME_LENGTHS, *columns]
        return [pooled_output(layer, name) for layer in request.layers for name in request.pooling] + columns

    def forward(
        self,
        waveforms: Sequence[Waveform],
        outputs: Sequence[str],
        fill: float = 0.0,
        layer_weights: Sequence[float] | None = None,
    ) -> list[Any]:
        """Run the graph on waveforms [(samples_i,)], padded with ``fill``, and return its ``outputs``."""
        waveform, lengths = pad(waveforms, fill)
        feeds: dict[str, npt.NDArray[Any]] = {WAVEFORM: waveform, LENGTHS: lengths}
        if layer_weights is not None:
            feeds[LAYER_WEIGHTS] = np.array(layer_weights, np.float32)
        return self.engine.run(feeds, outputs)


def _assembled(arrays: list[Waveform], request: Request) -> Waveform:
    """One input's outputs as its values: statistics concatenated, several layers stacked before the last axis."""
    if request.level == "utterance":
        size = len(request.pooling)
        arrays = [np.concatenate(arrays[i : i + size]) for i in range(0, len(arrays), size)]
    return np.stack(arrays, axis=-2) if len(arrays) > 1 else arrays[0].copy()
