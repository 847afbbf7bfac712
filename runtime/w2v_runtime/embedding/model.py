"""An opened bundle and its engine: reads recordings, runs the graph on batches or windows, returns embeddings.

What ``--layer 6`` skips is decided in :meth:`Model.outputs`: it names the graph's outputs that a request needs, and the
engine opens a graph that is cut to them (:meth:`w2v_runtime.graphs.onnx_file.OnnxFile.cut`). So the layers above the
highest one requested are not computed, unless a head needs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from w2v_models.bundle import Bundle
from w2v_models.errors import AudioError, W2VError
from w2v_models.manifest import (
    FRAME_LENGTHS,
    LAYER_WEIGHTS,
    LENGTHS,
    WAVEFORM,
    Head,
    frames_output,
    pooled_output,
)
from w2v_runtime.audio.reading import Audio, concatenate, from_array, open_audio
from w2v_runtime.audio.recordings import Recording, can_be_read_again, name_of
from w2v_runtime.audio.source import Source
from w2v_runtime.bundles import library
from w2v_runtime.embedding.batching import pad
from w2v_runtime.embedding.opening import Opening, shared_engine
from w2v_runtime.embedding.results import Embedding, FrameTimes, Request
from w2v_runtime.embedding.windows import (
    DEFAULT_WINDOWING,
    Advance,
    HeldStream,
    OpenStream,
    Stream,
    Windowing,
    embed_long,
)
from w2v_runtime.engines.base import Engine
from w2v_runtime.engines.choice import open_engine
from w2v_runtime.threads.stop import Stop

Waveform = npt.NDArray[np.float32]
DEFAULT_REQUEST: Final = Request()


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
        bundle = model if isinstance(model, Bundle) else library.find(model)
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
        """Start and end of frames in seconds."""
        conv = self.manifest.architecture.conv
        return FrameTimes(conv.stride / self.sample_rate, conv.receptive_field / self.sample_rate)

    def head(self, request: Request) -> Head | None:
        """The head whose output belongs to the result, or None; a frame-level head serves frame-level requests only."""
        head = self.manifest.head
        return None if head is None or (head.level == "frame" and request.level != "frame") else head

    def dimension(self, request: Request) -> int:
        """D, the size of one vector in the result of ``request``."""
        return self.manifest.architecture.hidden_size * (len(request.pooling) if request.level == "utterance" else 1)

    def resolve(self, request: Request) -> Request:
        """The request with ``all`` and layer weights replaced by the names of this model's layers.

        Raises:
            RefusedError: the model does not have a layer, or not as many layers as there are weights.
        """
        return request.resolved(self.manifest.architecture.layers)

    def read(
        self, recording: Recording, channel: int | None = None, pad_short: bool = False, stop: Stop | None = None
    ) -> Audio | None:
        """Read a recording into memory; None if it is too long for that and must go to :meth:`embed_long`.

        A waveform, and a stream that cannot be read twice, is read whatever its length. With ``pad_short`` audio that
        is too short for one frame or for the head is padded with silence, and gets a warning.

        Raises:
            AudioError: the recording cannot be read, or is too short.
            W2VError: ``stop`` ended the reading.
        """
        if isinstance(recording, tuple):
            waveform, rate = recording
            return self._long_enough(from_array(waveform, rate, self.sample_rate, channel), pad_short)
        again, stop, samples = can_be_read_again(recording), stop or Stop(), 0
        blocks: list[Waveform] = []
        with open_audio(recording, self.sample_rate, channel) as stream:
            for block in stream:
                stop.check()
                blocks.append(block)
                samples += len(block)
                if again and samples > self._whole_samples:
                    return None
            audio = Audio(concatenate(blocks), self.sample_rate, stream.duration, stream.warnings)
        return self._long_enough(audio, pad_short)

    def is_long(self, audio: Audio) -> bool:
        """Whether audio is longer than one window with its context, and must go to :meth:`embed_long`."""
        return len(audio.samples) > self._whole_samples

    @property
    def _whole_samples(self) -> int:
        return self.windowing.whole_samples(self.sample_rate)

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
        recording: Recording,
        held: Audio | None,
        channel: int | None,
        request: Request,
        advance: Advance = lambda seconds: None,
        stop: Stop | None = None,
    ) -> Embedding:
        """Embed a long recording in windows, from ``held`` if :meth:`read` returned it; see :meth:`embed_stream`."""
        if held is not None:
            return self.embed_windowed(name_of(recording), held, request, advance, stop)
        return self.embed_stream(cast(Source, recording), channel, request, advance, stop)  # a waveform is always held

    def embed_stream(
        self,
        source: Source,
        channel: int | None,
        request: Request,
        advance: Advance = lambda seconds: None,
        stop: Stop | None = None,
    ) -> Embedding:
        """Embed a recording of any length in windows, without holding all of its audio in memory.

        ``advance(seconds)`` is called after each window with the seconds of the recording that are done.

        Raises:
            AudioError: the recording cannot be read, or changed while it was read.
            W2VError: the engine failed, or ``stop`` ended it.
        """

        def stream() -> contextlib.AbstractContextManager[Stream]:
            return open_audio(source, self.sample_rate, channel)

        return self._embed_long(name_of(source), stream, request, advance, stop)

    def embed_windowed(
        self,
        path: str,
        audio: Audio,
        request: Request,
        advance: Advance = lambda seconds: None,
        stop: Stop | None = None,
    ) -> Embedding:
        """Embed audio in memory in windows, even if it would fit one; otherwise as :meth:`embed_stream`."""
        return self._embed_long(path, lambda: contextlib.nullcontext(HeldStream(audio)), request, advance, stop)

    def _embed_long(
        self, path: str, open_stream: OpenStream, request: Request, advance: Advance, stop: Stop | None
    ) -> Embedding:
        head, stop = self.head(request), stop or Stop()
        return embed_long(
            self.engine,
            self.manifest,
            self.windowing,
            path,
            open_stream,
            request,
            head,
            advance,
            stop,
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

    def outputs(self, request: Request) -> list[str]:
        """Names of the graph's outputs that a request needs: its vectors layer by layer, then what belongs to them.

        Whatever no output needs is cut from the graph and not computed, such as the layers above the requested ones.
        """
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
        stop: Stop | None = None,
    ) -> list[Any]:
        """Run the graph on waveforms [(samples_i,)], padded with ``fill``, and return its ``outputs``."""
        waveform, lengths = pad(waveforms, fill)
        feeds: dict[str, npt.NDArray[Any]] = {WAVEFORM: waveform, LENGTHS: lengths}
        if layer_weights is not None:
            feeds[LAYER_WEIGHTS] = np.array(layer_weights, np.float32)
        return self.engine.run(feeds, outputs, stop=stop)


def _assembled(arrays: list[Waveform], request: Request) -> Waveform:
    """Join one input's outputs to its values: statistics are concatenated, layers stacked before the last axis."""
    if request.level == "utterance":
        size = len(request.pooling)
        arrays = [np.concatenate(arrays[i : i + size]) for i in range(0, len(arrays), size)]
    return np.stack(arrays, axis=-2) if len(arrays) > 1 else arrays[0].copy()
