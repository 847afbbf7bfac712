"""Long recordings: whole in memory linear in their length, or in windows.

A long recording is read twice. The first pass (:func:`survey`) collects its moments, which the normalisation and the
group norm of every piece share. The second computes features piece by piece: a convolution has a finite reach, so these
equal the features of the whole. Only the encoder sees many frames at once, all of them or a window's, and its attention
never holds the scores of all pairs of frames. So a whole recording's embedding is the one that a single run would give,
and a window differs from it in one thing: how far attention and positional convolution see.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from w2v_models.errors import AudioError, OutOfMemoryError, W2VError
from w2v_models.manifest import (
    FEATURES,
    HEAD_FRAMES,
    LAYER_WEIGHTS,
    LENGTHS,
    LOG_MEL_FRONT_END,
    MEL,
    MOMENTS,
    POOLED,
    WAVEFORM,
    Architecture,
    Head,
    Manifest,
    frames_output,
    pooled_output,
)
from w2v_runtime.embedding.batching import pad
from w2v_runtime.embedding.moments import MelMoments, WaveformMoments
from w2v_runtime.embedding.pooling import RunningPool
from w2v_runtime.embedding.results import Embedding, Request, assembled
from w2v_runtime.embedding.spans import Answer, Span, SpanPools, outputs_of_spans
from w2v_runtime.embedding.windows import Window, Windowing, narrowed, plan_windows
from w2v_runtime.engines.base import Engine
from w2v_runtime.files.scratch import float_array
from w2v_runtime.threads.ahead import ahead
from w2v_runtime.threads.stop import Stop

Samples = npt.NDArray[np.float32]
Frames = npt.NDArray[np.float32]
Advance = Callable[[float], None]

#: Seconds of audio of which the features are computed at once: long enough for wide products, short enough that the
#: activations of the first convolutions, 512 · samples / 5 numbers, stay small.
PIECE_SECONDS: Final = 8.0
#: Batches of pieces that are read ahead of their use.
_READ_AHEAD: Final = 2


@dataclass(frozen=True, eq=False)
class Long:
    """A recording that is not embedded in a single run: what the first pass found, and how the second one reads it.

    ``samples`` are counted at the model's rate; ``moments`` is the input of the graph ``features``; ``duration`` is in
    seconds. ``open`` opens the recording as blocks of samples (n,), which are in memory if ``held``.
    """

    samples: int
    moments: Samples
    duration: float
    warnings: tuple[str, ...]
    open: Callable[[], AbstractContextManager[Iterable[Samples]]]
    held: bool


def survey(engine: Engine, architecture: Architecture, blocks: Iterable[Samples], stop: Stop) -> tuple[int, Samples]:
    """The first pass: the number of samples in the blocks, and the ``moments`` that all pieces share.

    Raises:
        W2VError: the engine failed, or ``stop`` ended it.
    """
    conv = architecture.conv
    moments: WaveformMoments | MelMoments = WaveformMoments(conv.kernels[0], conv.strides[0])
    if architecture.front_end == LOG_MEL_FRONT_END:

        def mel(block: Samples) -> Samples:
            features: Samples = engine.run({WAVEFORM: block[None]}, [MEL], "mel", stop)[0][0]
            return features

        moments = MelMoments(conv.kernels[0], conv.strides[0], mel)
    for block in blocks:
        stop.check()
        moments.add(block)
    return moments.samples, moments.vector()


class LongRun(NamedTuple):
    """What the long recordings of one call have in common; ``head`` is the one to compute, or None.

    ``budget`` is the audio of a batch in seconds. ``scratch`` is the folder for frames that would fill the memory; None
    means the system's folder for temporary files. ``advance(seconds)`` is called with the seconds that are done.
    """

    engine: Engine
    manifest: Manifest
    windowing: Windowing
    request: Request
    head: Head | None
    budget: float
    advance: Advance
    stop: Stop
    scratch: str | None


def embed_long(run: LongRun, recordings: Sequence[tuple[str, Long]]) -> list[Embedding | W2VError | MemoryError]:
    """Embed long recordings, given with their paths; one that fails has its error in place of its embedding.

    Pieces and windows of all recordings share batches: pieces of any, windows of equal length.

    Raises:
        StorageError: ``scratch`` has no room for the frames.
        W2VError: ``stop`` ended the run.
    """
    states = [_Recording(run, long) for _, long in recordings]
    _embed(run, states)
    return [state.result(path) for state, (path, _) in zip(states, recordings, strict=True)]


def embed_long_spans(
    run: LongRun, recordings: Sequence[tuple[Long, Sequence[Span]]]
) -> list[list[Answer | W2VError] | W2VError | MemoryError]:
    """Embed spans of long recordings' frames: an answer for each span, or the error of the recording.

    Raises:
        W2VError: ``stop`` ended the run.
    """
    states = [_Recording(run, long, spans) for long, spans in recordings]
    _embed(run, states)
    return [state.answers() for state in states]


def _embed(run: LongRun, states: Sequence[_Recording]) -> None:
    conv, rate = run.manifest.architecture.conv, run.manifest.architecture.sample_rate
    piece = max(1, round(PIECE_SECONDS * rate / conv.stride))
    size = max(1, int(run.budget // PIECE_SECONDS))
    pieces = _pieces(run, states, piece)
    if not all(state.long.held for state in states):
        pieces = ahead(pieces, _READ_AHEAD * size, "w2v-read-ahead")
    windows = _Windows(run)
    with contextlib.closing(pieces):
        while batch := list(itertools.islice(pieces, size)):
            for recording, features in _features(run, batch):
                recording.take(features)
                for window, seen in recording.ready():
                    windows.add(recording, window, seen)
    windows.flush()


class _Piece(NamedTuple):
    """Samples (n,) of which the next features of a recording are computed."""

    recording: _Recording
    samples: Samples


def _pieces(run: LongRun, recordings: Sequence[_Recording], frames: int) -> Generator[_Piece, None, None]:
    """Yield all pieces of ``frames`` frames, the last of a recording may be shorter; keep the error of a recording."""
    conv = run.manifest.architecture.conv
    for recording in recordings:
        spans = (
            (first * conv.stride, (min(first + frames, recording.frames) - 1) * conv.stride + conv.receptive_field)
            for first in range(0, recording.frames, frames)
        )
        try:
            with recording.long.open() as blocks:
                for samples in cut(blocks, spans):
                    run.stop.check()
                    if recording.error is not None:
                        break
                    yield _Piece(recording, samples)
        except (AudioError, MemoryError) as error:
            recording.error = error
        except W2VError:
            raise
        except Exception as error:  # a fault of ours, or of a decoder: it costs this recording, not the others
            recording.error = AudioError(f"unexpected {type(error).__name__}: {error}")


def cut(blocks: Iterable[Samples], spans: Iterable[tuple[int, int]]) -> Iterator[Samples]:
    """Yield the samples of each span, begin to end, holding one of them in memory; stop early if the blocks end."""
    stream, held, offset = iter(blocks), np.empty(0, np.float32), 0
    for begin, end in spans:
        parts, stop = [held], offset + len(held)
        while stop < end and (block := next(stream, None)) is not None:
            parts.append(block)
            stop += len(block)
        held = np.concatenate(parts)[begin - offset :]
        offset = begin
        if len(held) < end - begin:
            return
        yield held[: end - begin]


def _features(run: LongRun, batch: list[_Piece]) -> list[tuple[_Recording, Frames]]:
    """The projected features (frames, hidden) of each piece of a batch; where the engine fails, each half is tried."""
    batch = [piece for piece in batch if piece.recording.error is None]
    if not batch:
        return []
    try:
        return [(piece.recording, row) for piece, row in zip(batch, _computed(run, batch), strict=True)]
    except (W2VError, MemoryError) as error:
        run.stop.check()
        if len(batch) == 1:
            batch[0].recording.error = error
            return []
        half = len(batch) // 2
        return _features(run, batch[:half]) + _features(run, batch[half:])


def _computed(run: LongRun, batch: list[_Piece]) -> list[Frames]:
    conv = run.manifest.architecture.conv
    waveform, lengths = pad([piece.samples for piece in batch])
    moments = np.stack([piece.recording.long.moments for piece in batch])
    feeds: dict[str, npt.NDArray[Any]] = {WAVEFORM: waveform, LENGTHS: lengths, MOMENTS: moments}
    features = run.engine.run(feeds, [FEATURES], "features", run.stop)[0]
    return [row[: conv.num_frames(len(piece.samples))] for row, piece in zip(features, batch, strict=True)]


class _Recording:
    """A long recording in progress: the features that wait for a window, the windows to come, and the answer so far."""

    def __init__(self, run: LongRun, long: Long, spans: Sequence[Span] | None = None) -> None:
        self.long = long
        self.error: W2VError | MemoryError | None = None
        architecture = run.manifest.architecture
        self.frames = architecture.conv.num_frames(long.samples)
        self.whole = long.samples <= run.windowing.whole_samples(architecture.sample_rate)
        self.answer: _Whole | _Windowed | _Spans = _Whole(run) if self.whole else _Windowed(run, self.frames)
        if spans is not None:
            self.answer = _Spans(run, spans)
        self._windows = iter([Window(0, self.frames, 0, self.frames)])
        if not self.whole:
            margin = run.head.margin if run.head else 0
            step = architecture.step(run.request.layers[0])
            self._windows = plan_windows(
                self.frames, architecture.sample_rate, architecture.conv, run.windowing, margin, step
            )
        self._next = next(self._windows, None)
        self._features: deque[Frames] = deque()
        self._begin = self._end = 0  # the frames that ``_features`` hold

    def take(self, features: Frames) -> None:
        """Add the next features: (n, hidden)."""
        self._features.append(features)
        self._end += len(features)

    def ready(self) -> Iterator[tuple[Window, Frames]]:
        """Yield the windows whose features are all there, with what the encoder sees of them: (n, hidden)."""
        while (window := self._next) is not None and window.end <= self._end:
            held = np.concatenate(self._features)
            self._next = next(self._windows, None)
            seen = held[window.begin - self._begin : window.end - self._begin]
            begin = self._end if self._next is None else self._next.begin
            self._features = deque([held[begin - self._begin :].copy()])
            self._begin = begin
            del held
            yield window, seen

    def result(self, path: str) -> Embedding | W2VError | MemoryError:
        """The embedding of the recording at ``path``, or why there is none."""
        if error := self._failed():
            return error
        values, columns = cast(_Whole | _Windowed, self.answer).result()
        return Embedding(path, values, self.long.duration, columns, self.long.warnings)

    def answers(self) -> list[Answer | W2VError] | W2VError | MemoryError:
        """The answer of each span, or why there is none."""
        return self._failed() or cast(_Spans, self.answer).result()

    def _failed(self) -> W2VError | MemoryError | None:
        if self.error is None and self.answer.frames != self.frames:
            self.error = AudioError("changed while it was read; embed it again.")
        return self.error


class _Windows:
    """Windows that wait for a batch: those of equal length go through the encoder together."""

    def __init__(self, run: LongRun) -> None:
        self._run = run
        rate, stride = run.manifest.architecture.sample_rate, run.manifest.architecture.conv.stride
        self._seconds = stride / rate
        self._most = run.budget / self._seconds  # frames of a batch
        self._waiting: dict[tuple[int, bool], list[tuple[_Recording, Window, Frames]]] = {}
        self._done = 0

    def add(self, recording: _Recording, window: Window, features: Frames) -> None:
        """Add a window; its batch runs once another window of its length would not fit."""
        key = len(features), recording.whole
        batch = self._waiting.setdefault(key, [])
        batch.append((recording, window, features))
        if len(features) * (len(batch) + 1) > self._most:
            self._embed(self._waiting.pop(key))

    def flush(self) -> None:
        """Run what still waits."""
        while self._waiting:
            self._embed(self._waiting.popitem()[1])

    def _embed(self, batch: list[tuple[_Recording, Window, Frames]]) -> None:
        """Embed a batch. If the engine fails, each half is tried again: only a window that fails alone is lost."""
        run = self._run
        batch = [entry for entry in batch if entry[0].error is None]
        if not batch:
            return
        try:
            outputs = self._encoded([features for _, _, features in batch], batch[0][0].answer.names)
            if not all(np.isfinite(output).all() for output in outputs):
                raise W2VError("the model's answer is not finite; its weights may be damaged: w2v-models verify.")
        except (W2VError, MemoryError) as error:
            run.stop.check()
            if len(batch) == 1:
                recording = batch[0][0]
                recording.error = _with_advice(error) if recording.whole else error
            else:
                half = len(batch) // 2
                self._embed(batch[:half])
                self._embed(batch[half:])
            return
        for i, (recording, window, _) in enumerate(batch):
            recording.answer.add(window, [output[i] for output in outputs])
            self._done += window.last - window.first
        run.advance(self._done * self._seconds)

    def _encoded(self, features: list[Frames], names: Sequence[str]) -> list[npt.NDArray[Any]]:
        run = self._run
        feeds = {FEATURES: features[0][None] if len(features) == 1 else np.stack(features)}
        if run.request.layer_weights is not None:
            feeds[LAYER_WEIGHTS] = np.array(run.request.layer_weights, np.float32)
        return run.engine.run(feeds, names, "encoder", run.stop)


def _with_advice(error: W2VError | MemoryError) -> W2VError | MemoryError:
    if isinstance(error, OutOfMemoryError | MemoryError):
        advice = "a smaller whole (--whole) embeds it in windows, which take less memory."
        return OutOfMemoryError(f"{str(error) or 'out of memory'} It was embedded whole: {advice}")
    return error


class _Whole:
    """The answer for a whole recording: the encoder's graph pools it and computes its head."""

    def __init__(self, run: LongRun) -> None:
        request, self._columns = run.request, run.head is not None
        self.names = [pooled_output(layer, name) for layer in request.layers for name in request.pooling]
        if request.level == "frame":
            self.names = [frames_output(layer) for layer in request.layers]
        if run.head is not None:
            self.names.append(run.head.outputs[-1])
        self._run = run
        self._outputs: list[npt.NDArray[Any]] = []
        self.frames = 0

    def add(self, window: Window, outputs: list[npt.NDArray[Any]]) -> None:
        self._outputs = outputs
        self.frames = window.last

    def result(self) -> tuple[Samples, Samples | None]:
        """The values and the head's columns, as :class:`Embedding` has them."""
        columns = self._outputs.pop().copy() if self._columns else None
        if self._run.request.level == "utterance" or len(self._outputs) == 1:
            return assembled(self._outputs, self._run.request), columns
        first = self._outputs[0]
        values = float_array((len(first), len(self._outputs), first.shape[1]), self._run.scratch)
        for index in range(len(self._outputs)):
            values[:, index] = self._outputs[index]
        return values, columns


class _Windowed:
    """The answer for a recording in windows: frames are kept at frame level, else pooled as they come."""

    def __init__(self, run: LongRun, frames: int) -> None:
        request, architecture = run.request, run.manifest.architecture
        size, self._step = architecture.size(request.layers[0]), architecture.step(request.layers[0])
        frames = narrowed(frames, self._step)
        self.names = [frames_output(layer) for layer in request.layers]
        self._request = request
        self._pools = [RunningPool() for _ in request.layers]
        shape = (frames, len(request.layers), size) if len(request.layers) > 1 else (frames, size)
        self._values = float_array(shape, run.scratch) if request.level == "frame" else None
        self._head: _HeadOutput | None = None
        if run.head is not None:
            self._head = _HeadOutput(run, run.head, frames)
            self.names.append(HEAD_FRAMES if run.head.level == "utterance" else run.head.outputs[-1])
        self.frames = 0

    def add(self, window: Window, outputs: list[npt.NDArray[Any]]) -> None:
        self.frames += window.last - window.first
        window = window.narrowed(self._step)
        if self._head is not None:
            self._head.add(window, outputs.pop())
        blocks = [layer[window.first - window.begin : window.last - window.begin] for layer in outputs]
        if self._values is not None:
            self._values[window.first : window.last] = np.stack(blocks, axis=1) if len(blocks) > 1 else blocks[0]
        else:
            for pool, block in zip(self._pools, blocks, strict=True):
                pool.add(block)

    def result(self) -> tuple[Samples, Samples | None]:
        """The values and the head's columns, as :class:`Embedding` has them."""
        columns = None if self._head is None else self._head.result()
        if self._values is not None:
            return self._values, columns
        pooled = [pool.result(self._request.pooling) for pool in self._pools]
        return np.stack(pooled) if len(pooled) > 1 else pooled[0], columns


class _Spans:
    """The answers for spans of a recording, whole or in windows."""

    def __init__(self, run: LongRun, spans: Sequence[Span]) -> None:
        self._run, self._step = run, run.manifest.architecture.step(run.request.layers[0])
        self._pools = SpanPools(run.request, run.head, spans)
        self.names = outputs_of_spans(run.request, run.head)
        self.frames = 0

    def add(self, window: Window, outputs: list[npt.NDArray[Any]]) -> None:
        self.frames += window.last - window.first
        self._pools.add(window.narrowed(self._step), outputs)

    def result(self) -> list[Answer | W2VError]:
        return self._pools.answers(self._run.engine, self._run.stop)


class _HeadOutput:
    """Collects a head's frames window by window: keeps them at frame level, else feeds their statistics to the head."""

    def __init__(self, run: LongRun, head: Head, frames: int) -> None:
        self._run, self._head, self._frames = run, head, frames
        self._pool = RunningPool()
        self._rows: dict[int, Samples] = {}

    def add(self, window: Window, frames: Samples) -> None:
        """Add the head's frames of a window; the first of them is centred on the window's frame ``margin``."""
        margin = self._head.margin
        begin = window.begin + margin
        first, last = max(window.first, margin), min(window.last, self._frames - margin)
        block = frames[max(0, first - begin) : max(0, last - begin)]
        if self._head.level == "frame":
            self._rows[window.first] = block.copy()
        else:
            self._pool.add(block)

    def result(self) -> Samples:
        if self._head.level == "frame":
            return np.concatenate([self._rows[first] for first in sorted(self._rows)])
        feeds: Mapping[str, npt.NDArray[Any]] = {POOLED: self._pool.result(self._head.pooling)[None]}
        columns: Samples = self._run.engine.run(feeds, [self._head.outputs[-1]], "head", self._run.stop)[0][0]
        return columns
