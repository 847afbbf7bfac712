"""Long audio: embedded in windows with context on both sides, joined at frame level, pooled in constant memory.

Attention is quadratic in time, so beyond a limit a recording is not embedded whole. The waveform's normalisation and
the group norm keep the statistics of the whole recording, which a first pass collects; each frame's convolutions see
all of their samples. So a window differs from the whole in one thing: how far attention and positional convolution see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt

from w2v_models.errors import AudioError, RefusedError, W2VError
from w2v_models.manifest import (
    HEAD_FRAMES,
    LAYER_WEIGHTS,
    LENGTHS,
    LOG_MEL_FRONT_END,
    MEL,
    MOMENTS,
    POOLED,
    WAVEFORM,
    ConvStack,
    Head,
    Manifest,
    frames_output,
)
from w2v_runtime.embedding.moments import MelMoments, WaveformMoments
from w2v_runtime.embedding.pooling import RunningPool
from w2v_runtime.embedding.results import Embedding, Request
from w2v_runtime.files.scratch import float_array
from w2v_runtime.threads.stop import Stop

if TYPE_CHECKING:
    from w2v_runtime.audio.reading import Audio
    from w2v_runtime.engines.base import Engine

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Windowing:
    """How long audio is split: into windows of ``window`` seconds, with ``context`` more seconds on each side.

    Audio that fits one window with its context is embedded whole.

    Examples:
        >>> Windowing(window=30, context=5).whole_samples(16000)
        640000
    """

    window: float = 30.0
    context: float = 5.0

    def __post_init__(self) -> None:
        if not 1 <= self.window <= 600:
            raise RefusedError(f"window must be 1 to 600 seconds, not {self.window}.")
        if not 0 <= self.context <= 300:
            raise RefusedError(f"context must be 0 to 300 seconds, not {self.context}.")

    def whole_samples(self, rate: int) -> int:
        """The longest audio that is embedded whole, in samples."""
        return round((self.window + 2 * self.context) * rate)


DEFAULT_WINDOWING: Final = Windowing()


class Stream(Protocol):
    """Audio at the model's rate in blocks (n,); after the last, ``duration`` in seconds and ``warnings`` are known."""

    def __iter__(self) -> Iterator[Samples]: ...

    @property
    def duration(self) -> float: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...


OpenStream = Callable[[], AbstractContextManager[Stream]]
Advance = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class HeldStream:
    """Audio in memory as a stream of one block."""

    audio: Audio

    def __iter__(self) -> Iterator[Samples]:
        yield self.audio.samples

    @property
    def duration(self) -> float:
        return self.audio.duration

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.audio.warnings


@dataclass(frozen=True)
class Window:
    """Frames ``first`` to ``last`` of a recording, computed from samples ``start`` to ``stop``.

    ``last`` and ``stop`` are exclusive. The first ``skip`` frames that the samples give are context.
    """

    first: int
    last: int
    start: int
    stop: int
    skip: int


def plan_windows(
    samples: int, rate: int, conv: ConvStack, windowing: Windowing, least_context: int = 0
) -> Iterator[Window]:
    """Yield the windows of a recording of ``samples`` samples; together they hold every frame once.

    Each window starts on a frame's first sample, so that its frames are those of the whole recording. The context is at
    least ``least_context`` frames on each side.
    """
    frames = conv.num_frames(samples)
    size = max(1, round(windowing.window * rate / conv.stride))
    context = max(least_context, round(windowing.context * rate / conv.stride))
    for first in range(0, frames, size):
        last = min(first + size, frames)
        begin, end = max(0, first - context), min(frames, last + context)
        yield Window(first, last, begin * conv.stride, (end - 1) * conv.stride + conv.receptive_field, first - begin)


def embed_long(
    engine: Engine,
    manifest: Manifest,
    windowing: Windowing,
    path: str,
    open_stream: OpenStream,
    request: Request,
    head: Head | None,
    advance: Advance,
    stop: Stop,
    scratch: str | None = None,
) -> Embedding:
    """Embed a recording of any length in two passes over its stream: the first collects moments, the second embeds.

    ``head`` is the head to compute, or None. ``advance(seconds)`` is called after each window with the seconds of the
    recording that are done. ``scratch`` is the folder for frames that would fill the memory; None means the system's
    folder for temporary files.

    Raises:
        AudioError: the recording cannot be read, or changed between the passes.
        StorageError: ``scratch`` has no room for the frames.
        W2VError: the engine failed, or ``stop`` ended the run.
    """
    architecture, margin = manifest.architecture, head.margin if head else 0
    samples, moments = _moments(engine, manifest, open_stream, stop)
    frames = architecture.conv.num_frames(samples)
    answer = _LayerOutputs(request, frames, architecture.hidden_size, scratch)
    columns = None if head is None else _HeadOutput(engine, head, frames, stop)
    feeds = {MOMENTS: moments[None]}
    if request.layer_weights is not None:
        feeds[LAYER_WEIGHTS] = np.array(request.layer_weights, np.float32)
    names = [frames_output(layer) for layer in request.layers] + ([HEAD_FRAMES] if head else [])
    windows = plan_windows(samples, architecture.sample_rate, architecture.conv, windowing, margin)
    done = 0
    with open_stream() as stream:
        for window, block in _window_samples(windows, stream):
            waveform = {WAVEFORM: block[None], LENGTHS: np.array([len(block)])}
            *layers, last = outputs = [output[0] for output in engine.run(waveform | feeds, names, "windows", stop)]
            if not all(np.isfinite(output).all() for output in outputs):
                raise W2VError("the model's answer is not finite; its weights may be damaged: w2v-models verify.")
            if columns is not None:
                columns.add(window, last)
            answer.add(window, layers if columns is not None else [*layers, last])
            done = window.last
            advance(done * architecture.conv.stride / architecture.sample_rate)
        duration, warnings = stream.duration, stream.warnings
    if done != frames:
        raise AudioError("changed while it was read; embed it again.")
    return Embedding(path, answer.result(), duration, None if columns is None else columns.result(), warnings)


class _LayerOutputs:
    """Collects frames of one or several layers window by window: keeps them at frame level, else pools them."""

    def __init__(self, request: Request, frames: int, size: int, scratch: str | None) -> None:
        self._request = request
        self._pools = [RunningPool() for _ in request.layers]
        shape = (frames, len(request.layers), size) if len(request.layers) > 1 else (frames, size)
        self._values = float_array(shape, scratch) if request.level == "frame" else None

    def add(self, window: Window, layers: list[Samples]) -> None:
        blocks = [layer[window.skip : window.skip + window.last - window.first] for layer in layers]
        if self._values is not None:
            self._values[window.first : window.last] = np.stack(blocks, axis=1) if len(blocks) > 1 else blocks[0]
        else:
            for pool, block in zip(self._pools, blocks, strict=True):
                pool.add(block)

    def result(self) -> Samples:
        if self._values is not None:
            return self._values
        pooled = [pool.result(self._request.pooling) for pool in self._pools]
        return np.stack(pooled) if len(pooled) > 1 else pooled[0]


class _HeadOutput:
    """Collects a head's frames window by window: keeps them at frame level, else feeds their statistics to the head."""

    def __init__(self, engine: Engine, head: Head, frames: int, stop: Stop) -> None:
        self._engine, self._head, self._frames, self._stop = engine, head, frames, stop
        self._pool = RunningPool()
        self._rows: list[Samples] = []

    def add(self, window: Window, frames: Samples) -> None:
        """Add the head's frames of a window; the first of them is centred on the window's frame ``margin``."""
        margin = self._head.margin
        begin = window.first - window.skip + margin
        first, last = max(window.first, margin), min(window.last, self._frames - margin)
        block = frames[max(0, first - begin) : max(0, last - begin)]
        if self._head.level == "frame":
            self._rows.append(block.copy())
        else:
            self._pool.add(block)

    def result(self) -> Samples:
        if self._head.level == "frame":
            return np.concatenate(self._rows)
        feeds = {POOLED: self._pool.result(self._head.pooling)[None]}
        columns: Samples = self._engine.run(feeds, [self._head.outputs[-1]], "head", self._stop)[0][0]
        return columns


def _moments(engine: Engine, manifest: Manifest, open_stream: OpenStream, stop: Stop) -> tuple[int, Samples]:
    """The first pass: the number of samples in the recording, and the ``moments`` that all its windows share."""
    conv = manifest.architecture.conv
    moments: WaveformMoments | MelMoments = WaveformMoments(conv.kernels[0], conv.strides[0])
    if manifest.architecture.front_end == LOG_MEL_FRONT_END:

        def mel(block: Samples) -> Samples:
            features: Samples = engine.run({WAVEFORM: block[None]}, [MEL], "mel", stop)[0][0]
            return features

        moments = MelMoments(conv.kernels[0], conv.strides[0], mel)
    with open_stream() as stream:
        for block in stream:
            stop.check()
            moments.add(block)
    return moments.samples, moments.vector()


def _window_samples(windows: Iterable[Window], blocks: Iterable[Samples]) -> Iterator[tuple[Window, Samples]]:
    """Yield each window with its samples (n,), holding one window in memory; stop early if the stream ends too soon."""
    stream, held, offset = iter(blocks), np.empty(0, np.float32), 0
    for window in windows:
        parts, end = [held], offset + len(held)
        while end < window.stop and (block := next(stream, None)) is not None:
            parts.append(block)
            end += len(block)
        held = np.concatenate(parts)[window.start - offset :]
        offset = window.start
        samples = held[: window.stop - offset]
        if len(samples) < window.stop - window.start:
            return
        yield window, samples
    for _ in stream:  # only at its end does a stream know its duration and warnings
        pass
