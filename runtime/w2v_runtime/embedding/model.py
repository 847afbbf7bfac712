"""An opened bundle and its engine: reads recordings, runs the graph on batches or windows, returns embeddings.

What ``--layer 6`` skips is decided in :meth:`Model.outputs`: it names the graph's outputs that a request needs, and the
engine opens a graph that is cut to them (:meth:`w2v_runtime.graphs.onnx_file.OnnxFile.cut`). So the layers above the
highest one requested are not computed, unless a head needs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from w2v_models.bundle import Bundle
from w2v_models.errors import AudioError, RefusedError, W2VError
from w2v_models.manifest import (
    LAST_LAYER,
    LAYER_WEIGHTS,
    LENGTHS,
    WAVEFORM,
    Head,
    frames_output,
    pooled_output,
)
from w2v_runtime.audio.reading import Audio, AudioStream, concatenate, from_array, open_audio
from w2v_runtime.audio.recordings import Recording, can_be_read_again
from w2v_runtime.audio.source import Source
from w2v_runtime.bundles import pulling
from w2v_runtime.embedding.batching import BATCH_SECONDS, pad
from w2v_runtime.embedding.long import Advance, Long, LongRun, embed_long, embed_long_spans, survey
from w2v_runtime.embedding.opening import Opening, shared_engine
from w2v_runtime.embedding.results import Embedding, FrameTimes, Request, assembled
from w2v_runtime.embedding.spans import Answer, Span, SpanPools, outputs_of_spans
from w2v_runtime.embedding.windows import DEFAULT_WINDOWING, Window, Windowing, narrowed
from w2v_runtime.engines.base import Engine, stored_precision
from w2v_runtime.engines.choice import open_engine
from w2v_runtime.threads.stop import Stop

Waveform = npt.NDArray[np.float32]
DEFAULT_REQUEST: Final = Request()
#: The longest audio by device, in seconds, that goes through one graph in a padded batch; what is longer is embedded in
#: pieces, in less memory and, on a processor, faster.
DIRECT_SECONDS: Final = {"cpu": 40.0, "cuda": 40.0, "openvino": 40.0}
#: The longest recording that is decoded once and held in memory between the two passes over it.
HELD_SECONDS: Final = 300.0


class Model:
    """A bundle, the engine that computes its graphs, and the windowing of long audio.

    Its arguments are those of :class:`~w2v_runtime.embedder.Embedder`. Threads may share it. A pickle or a copy holds
    only the arguments: it opens the bundle again at its first use.
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
        scratch: str | None = None,
    ) -> None:
        bundle = model if isinstance(model, Bundle) else pulling.find(model, stored_precision(precision))
        self.bundle = dataclasses.replace(bundle, folder=bundle.folder.absolute())  # the process may change its folder
        self.manifest = self.bundle.manifest
        self.precision = precision
        self.windowing = windowing
        self._scratch = scratch
        outputs = tuple(self.outputs(self.resolve(request)))
        folder, sha256 = self.bundle.folder, self.manifest.sha256
        self._opening = Opening(folder, sha256, device, precision, threads, outputs, prepack)
        self._engine: Engine | None = open_engine(self.bundle, device, precision, threads, outputs, prepack)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engine": None}

    def __repr__(self) -> str:
        source = self.manifest.source
        random = ", random weights" if source.random else ""
        device = self._engine.device if self._engine else self._opening.device
        return f"{type(self).__name__}({source.model!r}, device={device!r}, precision={self.precision!r}{random})"

    @property
    def engine(self) -> Engine:
        """The engine that runs the graphs; a copy opens it at its first use.

        Raises:
            BundleError: this is a copy, and the bundle is missing or was replaced by another one.
            EngineError: this is a copy, and the engine or device is not available in this process.
        """
        if self._engine is None:
            self._engine = shared_engine(self._opening)
        return self._engine

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
        """Start and end of frames of the last layer in seconds."""
        return self.times_of(DEFAULT_REQUEST)

    def times_of(self, request: Request) -> FrameTimes:
        """Start and end of the frames of a request's layers in seconds.

        A frame of an adapter, which makes one of several, has the times of the encoder's frame that it is centred on.
        """
        architecture = self.manifest.architecture
        step = architecture.conv.stride * architecture.step(request.layers[0])
        return FrameTimes(step / self.sample_rate, architecture.conv.receptive_field / self.sample_rate)

    def head(self, request: Request) -> Head | None:
        """The head whose output belongs to the result, or None; a frame-level head serves frame-level requests only.

        Behind an adapter, it serves those whose frames are the adapter's.
        """
        head, step = self.manifest.head, self.manifest.architecture.step
        if head is not None and head.level == "frame":
            serves = request.level == "frame" and step(request.layers[0]) == step(LAST_LAYER)
            return head if serves else None
        return head

    def dimension(self, request: Request) -> int:
        """D, the size of one vector in the result of ``request``."""
        size = self.manifest.architecture.size(request.layers[0])
        return size * (len(request.pooling) if request.level == "utterance" else 1)

    def resolve(self, request: Request) -> Request:
        """The request with ``all`` and layer weights replaced by the names of this model's layers.

        Raises:
            RefusedError: the model does not have a layer, or not as many layers as there are weights; or an adapter's
                output is to be stacked with layers.
        """
        architecture = self.manifest.architecture
        resolved = request.resolved(architecture.layers)
        if architecture.adapter and LAST_LAYER in resolved.layers and len(resolved.layers) > 1:
            raise RefusedError(
                "layer last of this model is its adapter's output, with other frames than the layers "
                f"0 to {architecture.layers} of the encoder; ask for it alone."
            )
        return resolved

    def read(
        self, recording: Recording, channel: int | None = None, pad_short: bool = False, stop: Stop | None = None
    ) -> Audio | Long:
        """Read a recording for :meth:`embed_batch`, or the first time for :meth:`embed_long` if it is long.

        A long recording is held in memory if it has at most :data:`HELD_SECONDS`, or cannot be read twice. With
        ``pad_short`` audio that is too short for one frame or for the head is padded with silence, and gets a warning.

        Raises:
            AudioError: the recording cannot be read, or is too short.
            W2VError: ``stop`` ended the reading.
        """
        stop = stop or Stop()
        if isinstance(recording, tuple):
            waveform, rate = recording
            audio = from_array(waveform, rate, self.sample_rate, channel)
        else:
            most = HELD_SECONDS * self.sample_rate if can_be_read_again(recording) else math.inf
            samples, blocks = 0, list[Waveform]()
            with open_audio(recording, self.sample_rate, channel) as stream:
                rest = iter(stream)
                for block in rest:
                    stop.check()
                    blocks.append(block)
                    samples += len(block)
                    if samples > most:
                        return self._surveyed(recording, channel, itertools.chain(_emptied(blocks), rest), stream, stop)
                audio = Audio(concatenate(blocks), self.sample_rate, stream.duration, stream.warnings)
        return self.prepared(audio, pad_short, stop)

    def prepared(self, audio: Audio, pad_short: bool = False, stop: Stop | None = None) -> Audio | Long:
        """Audio in memory as :meth:`embed_batch` takes it, or :meth:`embed_long` if it is long.

        Raises:
            AudioError: it is too short for one frame or for the head, and ``pad_short`` is not given.
            W2VError: ``stop`` ended the survey.
        """
        return self.long(audio, stop) if self.is_long(audio) else self._long_enough(audio, pad_short)

    def is_long(self, audio: Audio) -> bool:
        """Whether audio is too long for :meth:`embed_batch`."""
        direct = round(DIRECT_SECONDS[self.engine.device] * self.sample_rate)
        return len(audio.samples) > min(direct, self.windowing.whole_samples(self.sample_rate))

    def long(self, audio: Audio, stop: Stop | None = None) -> Long:
        """Audio in memory, of any length from one frame on, as :meth:`embed_long` takes it."""
        samples, moments = survey(self.engine, self.manifest.architecture, [audio.samples], stop or Stop())
        opened = contextlib.nullcontext([audio.samples])
        return Long(samples, moments, audio.duration, audio.warnings, lambda: opened, held=True)

    def _surveyed(
        self, source: Source, channel: int | None, blocks: Iterable[Waveform], stream: AudioStream, stop: Stop
    ) -> Long:
        """Finish the first pass over a recording that is read a second time; ``blocks`` are those of ``stream``."""
        samples, moments = survey(self.engine, self.manifest.architecture, blocks, stop)

        def opened() -> AudioStream:
            return open_audio(source, self.sample_rate, channel)

        return Long(samples, moments, stream.duration, stream.warnings, opened, held=False)

    def _long_enough(self, audio: Audio, pad_short: bool) -> Audio:
        conv, head = self.manifest.architecture.conv, self.manifest.head
        shortest = conv.receptive_field + ((head.shortest if head else 1) - 1) * conv.stride
        if len(audio.samples) >= shortest:
            return audio
        what = "one frame" if head is None or head.shortest == 1 else f"the {head.kind} head"
        have = f"{len(audio.samples)} samples at {self.sample_rate} Hz, {what} needs {shortest}"
        if not pad_short:
            raise AudioError(f"too short: {have}; pad_short=True (--pad-short) embeds it with silence added.")
        samples = np.pad(audio.samples, (0, shortest - len(audio.samples)))
        return Audio(samples, audio.rate, audio.duration, (*audio.warnings, f"padded with silence: {have}"))

    def embed_long(
        self,
        recordings: Sequence[tuple[str, Long]],
        request: Request,
        advance: Advance = lambda seconds: None,
        stop: Stop | None = None,
        batch_seconds: float | None = None,
    ) -> list[Embedding | W2VError | MemoryError]:
        """Embed long recordings, given with their paths: whole or in windows, as :attr:`windowing` says.

        One that fails has its error in place of its embedding. ``advance(seconds)`` is called meanwhile with the
        seconds of audio that are done. ``batch_seconds`` is the largest batch; None means the device's default.

        Raises:
            StorageError: there is no room for the frames of a recording.
            W2VError: ``stop`` ended the run.
        """
        return embed_long(self._long_run(request, advance, stop, batch_seconds), recordings)

    def embed_long_spans(
        self,
        recordings: Sequence[tuple[Long, Sequence[Span]]],
        request: Request,
        advance: Advance = lambda seconds: None,
        stop: Stop | None = None,
        batch_seconds: float | None = None,
    ) -> list[list[Answer | W2VError] | W2VError | MemoryError]:
        """As :meth:`embed_long`, with an answer for each of the given spans of a recording's frames.

        Raises:
            W2VError: ``stop`` ended the run.
        """
        return embed_long_spans(self._long_run(request, advance, stop, batch_seconds), recordings)

    def _long_run(self, request: Request, advance: Advance, stop: Stop | None, batch_seconds: float | None) -> LongRun:
        return LongRun(
            self.engine,
            self.manifest,
            self.windowing,
            request,
            self.head(request),
            batch_seconds or BATCH_SECONDS[self.engine.device],
            advance,
            stop or Stop(),
            self._scratch,
        )

    def embed_batch(
        self, paths: Sequence[str], audios: Sequence[Audio], request: Request, stop: Stop | None = None
    ) -> list[Embedding]:
        """Embed audio in memory as one padded batch, and return one embedding for each item, in order.

        Raises:
            W2VError: the engine failed, a value or logit is not finite, or ``stop`` ended the run.
        """
        names, head = self.outputs(request), self.head(request)
        arrays = self.forward([audio.samples for audio in audios], names, 0.0, request.layer_weights, stop)
        outputs = dict(zip(names, arrays, strict=True))
        columns = None if head is None else outputs.pop(head.outputs[-1])
        frame_columns = head is not None and head.level == "frame"
        embeddings = []
        for i, (path, audio) in enumerate(zip(paths, audios, strict=True)):
            end = self.frames(request, len(audio.samples)) if request.level == "frame" else None
            values = assembled([array[i, :end] for array in outputs.values()], request)
            logits = None if columns is None else columns[i, : end if frame_columns else None].copy()
            if not (np.isfinite(values).all() and (logits is None or np.isfinite(logits).all())):
                raise W2VError("the model's answer is not finite; its weights may be damaged: w2v-models verify.")
            embeddings.append(Embedding(path, values, audio.duration, logits, audio.warnings))
        return embeddings

    def embed_spans(
        self, audios: Sequence[Audio], spans: Sequence[Sequence[Span]], request: Request, stop: Stop | None = None
    ) -> list[list[Answer | W2VError]]:
        """Embed audio in memory as one padded batch, and return an answer for each of the spans of each item.

        Raises:
            W2VError: the engine failed, a value or logit is not finite, or ``stop`` ended the run.
        """
        head, names = self.head(request), self.outputs(request)
        arrays = self.forward([audio.samples for audio in audios], names, 0.0, request.layer_weights, stop)
        answers = []
        for i, (audio, chosen) in enumerate(zip(audios, spans, strict=True)):
            pools, frames = SpanPools(request, head, chosen), self.frames(request, len(audio.samples))
            pools.add(Window(0, frames, 0, frames), [array[i] for array in arrays])
            answers.append(pools.answers(self.engine, stop or Stop()))
        return answers

    def outputs(self, request: Request) -> list[str]:
        """Names of the graph's outputs that a request needs: its vectors layer by layer, then what belongs to them.

        Whatever no output needs is cut from the graph and not computed, such as the layers above the requested ones.
        """
        head = self.head(request)
        if request.spans:
            return outputs_of_spans(request, head)
        columns = [] if head is None else [head.outputs[-1]]
        if request.level == "frame":
            return [frames_output(layer) for layer in request.layers] + columns
        return [pooled_output(layer, name) for layer in request.layers for name in request.pooling] + columns

    def frames(self, request: Request, samples: int) -> int:
        """Frames of a request's layers in a waveform."""
        architecture = self.manifest.architecture
        return narrowed(architecture.conv.num_frames(samples), architecture.step(request.layers[0]))

    def forward(
        self,
        waveforms: Sequence[Waveform],
        outputs: Sequence[str],
        fill: float = 0.0,
        layer_weights: Sequence[float] | None = None,
        stop: Stop | None = None,
    ) -> list[Any]:
        """Run the graph on waveforms [(samples_i,)], padded with ``fill``, and return its ``outputs``."""
        waveform, lengths = pad(waveforms, fill)
        feeds: dict[str, npt.NDArray[Any]] = {WAVEFORM: waveform, LENGTHS: lengths}
        if layer_weights is not None:
            feeds[LAYER_WEIGHTS] = np.array(layer_weights, np.float32)
        return self.engine.run(feeds, outputs, stop=stop)


def _emptied(blocks: list[Waveform]) -> Iterator[Waveform]:
    """Yield blocks and let go of each."""
    blocks.reverse()
    while blocks:
        yield blocks.pop()
