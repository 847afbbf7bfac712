"""Long audio: embedded in windows with context on both sides, joined at frame level, pooled in constant memory.

Attention is quadratic in time, so beyond a limit a recording is not embedded whole. The waveform's normalisation and
the group norm keep the statistics of the whole recording, which a first pass collects; each frame's convolutions see
all of their samples. So a window differs from the whole in one thing: how far attention and positional convolution see.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt

from w2v_models.errors import AudioError, RefusedError
from w2v_models.manifest import EMBEDDING, LAST_HIDDEN_STATE, LENGTHS, LOGITS, MOMENTS, WAVEFORM, ConvStack, Manifest
from w2v_runtime.moments import Moments
from w2v_runtime.pooling import RunningPool
from w2v_runtime.results import Embedding, Request

if TYPE_CHECKING:
    from w2v_runtime.audio import Audio
    from w2v_runtime.engine import Engine

Samples = npt.NDArray[np.float32]
#: Frames of one input beyond this many bytes are kept in a temporary file.
_IN_MEMORY_BYTES: Final = 256 * 2**20


@dataclass(frozen=True)
class Windowing:
    """How long audio is cut: ``window`` seconds of audio at a time, seen with ``context`` seconds on each side.

    Audio that fits one window with its context is embedded whole.
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
    """Frames ``first`` to ``last`` of a recording: from samples ``start`` to ``stop``, after ``skip`` of context."""

    first: int
    last: int
    start: int
    stop: int
    skip: int


def plan_windows(samples: int, rate: int, conv: ConvStack, windowing: Windowing) -> Iterator[Window]:
    """Windows that together hold every frame of a recording of ``samples`` samples once.

    Each starts on a frame's first sample, so that its frames are the whole recording's.
    """
    frames = conv.num_frames(samples)
    size = max(1, round(windowing.window * rate / conv.stride))
    context = round(windowing.context * rate / conv.stride)
    for first in range(0, frames, size):
        last = min(first + size, frames)
        begin, end = max(0, first - context), min(frames, last + context)
        yield Window(first, last, begin * conv.stride, (end - 1) * conv.stride + conv.receptive_field, first - begin)


def embed_long(
    engine: Engine, manifest: Manifest, windowing: Windowing, path: str, open_stream: OpenStream, request: Request
) -> Embedding:
    """Embed a recording of any length in two passes over its stream.

    Raises:
        AudioError: it cannot be read, or changed between the passes.
        W2VError: the engine failed.
    """
    architecture = manifest.architecture
    moments = _moments(engine, architecture.conv, open_stream)
    frames = architecture.conv.num_frames(moments.samples)
    pooled = RunningPool()
    values = _frame_array(frames, architecture.hidden_size) if request.level == "frame" else None
    windows = plan_windows(moments.samples, architecture.sample_rate, architecture.conv, windowing)
    with open_stream() as stream:
        for window, samples in _cut(windows, stream):
            block = _run(engine, window, samples, moments.vector())
            pooled.add(block)
            if values is not None:
                values[window.first : window.last] = block
        duration, warnings = stream.duration, stream.warnings
    if pooled.frames != frames:
        raise AudioError("changed while it was read; embed it again.")
    logits = None
    if manifest.head:
        feeds = {EMBEDDING: pooled.result(("mean",))[None]}
        logits = engine.run(feeds, [LOGITS], "head")[0][0]
    return Embedding(path, pooled.result(request.pooling) if values is None else values, duration, logits, warnings)


def _moments(engine: Engine, conv: ConvStack, open_stream: OpenStream) -> Moments:
    moments = Moments(conv.kernels[0], conv.strides[0])
    with open_stream() as stream:
        for block in stream:
            if engine.stopped:
                break
            moments.add(block)
    return moments


def _cut(windows: Iterable[Window], blocks: Iterable[Samples]) -> Iterator[tuple[Window, Samples]]:
    """Each window with its samples, holding no more of the stream than one window needs; fewer where it ends early."""
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
    for _ in stream:  # to the end, where the stream knows its duration and warnings
        pass


def _run(engine: Engine, window: Window, samples: Samples, moments: Samples) -> Samples:
    feeds = {WAVEFORM: samples[None], LENGTHS: np.array([len(samples)]), MOMENTS: moments[None]}
    (frames,) = engine.run(feeds, [LAST_HIDDEN_STATE], "windows")
    result: Samples = frames[0, window.skip : window.skip + window.last - window.first]
    return result


def _frame_array(frames: int, size: int) -> Samples:
    """(frames, size) float32, in a temporary file if it is large."""
    if frames * size * 4 <= _IN_MEMORY_BYTES:
        return np.empty((frames, size), np.float32)
    with tempfile.TemporaryFile(prefix="w2v-frames-") as file:
        return np.memmap(file, np.float32, "w+", shape=(frames, size))
