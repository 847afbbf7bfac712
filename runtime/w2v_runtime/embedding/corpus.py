"""Embeds many recordings: threads decode ahead, inputs are batched by length, and the engine never waits for audio.

The size of a batch, and which inputs it holds, is decided in :mod:`w2v_runtime.embedding.batching`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Final

from w2v_models.errors import AudioError, OutOfMemoryError, RefusedError, W2VError
from w2v_runtime.audio.reading import Audio
from w2v_runtime.audio.recordings import Recording
from w2v_runtime.embedding.batching import BATCH_SECONDS, Pool
from w2v_runtime.embedding.long import Advance, Long
from w2v_runtime.embedding.model import Model
from w2v_runtime.embedding.results import Embedding, Failure, Request
from w2v_runtime.engines.base import CUDA, is_whole
from w2v_runtime.threads import processors
from w2v_runtime.threads.stop import Stop
from w2v_runtime.threads.workers import Task, Workers

#: Limits of what waits decoded for a batch: the number of inputs, and their audio as a multiple of the batch's budget.
POOL_INPUTS: Final = 512
POOL_BATCHES: Final = 24
#: Seconds of decoded audio that wait for the pool, beyond which no further input is decoded.
AHEAD_SECONDS: Final = 1200.0


@dataclass(frozen=True)
class CorpusOptions:
    """How inputs are read and batched.

    ``channel`` is a number from 0, None the mean of all channels. ``pad_short`` pads audio that is too short with
    silence; ``strict`` makes warnings failures. ``batch_seconds`` is the largest batch with its padding, None the
    device's default; ``jobs`` is the number of decoding threads, None that of the processors.

    Raises:
        RefusedError: a value is out of bounds or of another type.
    """

    channel: int | None = None
    pad_short: bool = False
    strict: bool = False
    batch_seconds: float | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.channel is not None and not (is_whole(self.channel) and self.channel >= 0):
            raise RefusedError(f"channel must be a number from 0, or None for the mean of all, not {self.channel!r}.")
        seconds = self.batch_seconds
        if seconds is not None and not (isinstance(seconds, Real) and 0 < seconds < math.inf):
            raise RefusedError(f"batch_seconds (--batch-seconds) must be positive, not {seconds!r}.")
        if self.jobs is not None and not (is_whole(self.jobs) and self.jobs >= 1):
            raise RefusedError(f"jobs (--jobs) must be a whole number, at least 1, not {self.jobs!r}.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> CorpusOptions:
        """Build the options from keyword arguments.

        Raises:
            TypeError: an option is unknown; the message names the known ones.
        """
        known = [option.name for option in dataclasses.fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"embed_files has no option {', '.join(unknown)}; its options are {', '.join(known)}.")
        return cls(**options)


@dataclass(frozen=True)
class Input:
    """One input: its position among the inputs of this run, from 0, its path, and its recording if it is not a file."""

    position: int
    path: str
    recording: Recording | None = None

    @property
    def source(self) -> Recording:
        """The recording to read: ``recording``, or else the file at ``path``."""
        return self.path if self.recording is None else self.recording


@dataclass(frozen=True)
class Finished:
    """The results of one finished batch, together with inputs that could not be read meanwhile.

    ``samples`` counts the batch's samples without padding, ``padded_samples`` with it.
    """

    results: tuple[tuple[Input, Embedding | Failure], ...]
    samples: int = 0
    padded_samples: int = 0


def embed_paths(
    model: Model, paths: Iterable[str], request: Request, options: CorpusOptions
) -> Generator[Embedding | Failure, None, None]:
    """Embed files and yield their results in the order of ``paths``."""
    return embed_in_order(model, (Input(i, path) for i, path in enumerate(paths)), request, options)


def embed_in_order(
    model: Model, inputs: Iterable[Input], request: Request, options: CorpusOptions
) -> Generator[Embedding | Failure, None, None]:
    """Embed inputs and yield their results in the order of their positions, which count from 0."""
    waiting: dict[int, Embedding | Failure] = {}
    position = 0
    with contextlib.closing(embed_inputs(model, inputs, request, options)) as batches:
        for finished in batches:
            waiting.update((item.position, result) for item, result in finished.results)
            while position in waiting:
                yield waiting.pop(position)
                position += 1


def embed_inputs(
    model: Model,
    inputs: Iterable[Input],
    request: Request,
    options: CorpusOptions,
    advance: Advance = lambda seconds: None,
) -> Generator[Finished, None, None]:
    """Embed inputs and yield the results of each batch, nearly in order; the next batch is prepared while one runs.

    ``advance(seconds)`` is called while a long recording runs, with the seconds of it that are done. Closing this
    generator early, as an interrupt does, stops its own batches in the engine and no others. An exception that
    ``inputs`` raises is raised again once the inputs before it are finished.

    Raises:
        W2VError: the graph cannot be opened, or the run is continued in a process forked since it began.
    """
    process = os.getpid()
    with contextlib.closing(_embed_batches(model, inputs, request, options, advance)) as batches:
        for finished in batches:
            yield finished
            if os.getpid() != process:
                raise W2VError("This run's threads are in the process that it was forked from; begin another one here.")


def _embed_batches(
    model: Model, inputs: Iterable[Input], request: Request, options: CorpusOptions, advance: Advance
) -> Generator[Finished, None, None]:
    engine, jobs = model.engine, options.jobs or processors.available()
    engine.prepare(model.outputs(request))
    seconds = options.batch_seconds or BATCH_SECONDS[engine.device]
    pool = Pool(max(1, round(seconds * model.sample_rate)), longest_first=engine.device == CUDA)
    work, faults = _Work(model, request, options, advance, seconds, pool), list[Exception]()
    with _workers(work.stop, jobs, engine.concurrency) as (decoder, runner):
        running: deque[Task[Finished]] = deque()
        for batch in _batches(work, _decode_ahead(work, _until_fault(inputs, faults), decoder, jobs)):
            running.append(runner.submit(partial(work.embed, batch)))
            if len(running) > engine.concurrency:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    if faults:
        raise faults[0]


def _until_fault(inputs: Iterable[Input], faults: list[Exception]) -> Iterator[Input]:
    """Yield inputs until the iterable ends or raises; the exception is added to ``faults``."""
    try:
        yield from inputs
    except Exception as fault:  # whatever the caller's own code raises
        faults.append(fault)


@dataclass(frozen=True, eq=False)
class _Decoded:
    """An input and its audio, or a Failure if it could not be read."""

    input: Input
    audio: Audio | Long | Failure

    @property
    def held(self) -> float:
        """The seconds of audio in memory."""
        held = isinstance(self.audio, Audio) or (isinstance(self.audio, Long) and self.audio.held)
        return self.audio.duration if held else 0.0  # type: ignore[union-attr]


def _decode_ahead(work: _Work, inputs: Iterable[Input], decoder: Workers, jobs: int) -> Iterator[_Decoded]:
    """Decode inputs on threads, a few ahead of their use, and yield them in order, so that batches are always the same.

    So much audio at most waits in memory: :data:`AHEAD_SECONDS`, and what two inputs a thread may hold beyond that.
    """
    ahead: deque[Task[_Decoded]] = deque()
    for item in inputs:
        ahead.append(decoder.submit(partial(work.decode, item)))
        while len(ahead) > 4 * jobs or _enough(ahead, 2 * jobs):
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _enough(ahead: deque[Task[_Decoded]], most_open: int) -> bool:
    finished = [task for task in ahead if task.done]
    return len(ahead) - len(finished) > most_open or sum(task.result().held for task in finished) > AHEAD_SECONDS


def _batches(work: _Work, decoded: Iterator[_Decoded]) -> Iterator[list[_Decoded]]:
    """Group decoded inputs into batches, long inputs into batches of their own; failed inputs are put into the next."""
    pool, failed, long = work.pool, list[_Decoded](), list[_Decoded]()
    for item in decoded:
        if isinstance(item.audio, Failure):
            failed.append(item)
        elif isinstance(item.audio, Long):
            long.append(item)
            if sum(item.audio.duration for item in long if isinstance(item.audio, Long)) >= work.batch_seconds:
                yield long
                long = []
        else:
            pool.add(len(item.audio.samples), item)
        if len(failed) >= POOL_INPUTS or len(pool) >= POOL_INPUTS or pool.samples >= POOL_BATCHES * pool.budget:
            yield failed + (pool.take() if len(pool) else [])
            failed = []
    if long:
        yield long
    while len(pool) or failed:
        yield failed + (pool.take() if len(pool) else [])
        failed = []


@dataclass(frozen=True, eq=False)
class _Work:
    """The steps of one run, decoding an input and embedding a batch; ``stop`` ends this run and no other."""

    model: Model
    request: Request
    options: CorpusOptions
    advance: Advance
    batch_seconds: float
    pool: Pool
    stop: Stop = field(default_factory=Stop)

    def decode(self, item: Input) -> _Decoded:
        """Read an input's audio; what cannot be read becomes a Failure."""
        try:
            audio = self.model.read(item.source, self.options.channel, self.options.pad_short, self.stop)
            self._refuse_warnings(audio.warnings)
            return _Decoded(item, audio)
        except (AudioError, MemoryError) as error:
            return _Decoded(item, _failure(item, "read", error))
        except W2VError:
            raise
        except Exception as error:  # a fault of ours, or of a decoder: it costs this input, not the run
            reason = f"unexpected {type(error).__name__}: {error}"
            return _Decoded(item, Failure(item.path, "read", reason))

    def embed(self, batch: list[_Decoded]) -> Finished:
        """Embed a batch, of which all inputs are long or none."""
        failed = [(item.input, item.audio) for item in batch if isinstance(item.audio, Failure)]
        long = [(item.input, item.audio) for item in batch if isinstance(item.audio, Long)]
        if long:
            return self._embed_long(long)
        ready = [(item.input, item.audio) for item in batch if isinstance(item.audio, Audio)]
        embedded = zip([item for item, _ in ready], self._embed(ready), strict=True)
        lengths = [len(audio.samples) for _, audio in ready]
        return Finished((*failed, *embedded), sum(lengths), max(lengths, default=0) * len(lengths))

    def _embed_long(self, items: list[tuple[Input, Long]]) -> Finished:
        recordings = [(item.path, long) for item, long in items]
        seconds = self.options.batch_seconds
        answers = self.model.embed_long(recordings, self.request, self.advance, self.stop, seconds)
        results = tuple(
            (item, answer if isinstance(answer, Embedding) else _failure(item, _stage(answer), answer))
            for (item, _), answer in zip(items, answers, strict=True)
        )
        samples = sum(long.samples for _, long in items)
        return Finished(results, samples, samples)

    def _embed(self, items: list[tuple[Input, Audio]]) -> list[Embedding | Failure]:
        """Embed a batch. If the engine fails, each half is tried again, so that only an input that fails alone is lost.

        After the engine ran out of memory, no later batch of the pool is larger than the halves.
        """
        if not items:
            return []
        paths, audios = [item.path for item, _ in items], [audio for _, audio in items]
        try:
            return list(self.model.embed_batch(paths, audios, self.request, self.stop))
        except (W2VError, MemoryError) as error:
            self.stop.check()
            if len(items) == 1:
                return [_failure(items[0][0], "embed", error)]
            if isinstance(error, OutOfMemoryError):
                longest = max(len(audio.samples) for audio in audios)
                self.pool.budget = min(self.pool.budget, longest * len(items) // 2)
            half = len(items) // 2
            return self._embed(items[:half]) + self._embed(items[half:])

    def _refuse_warnings(self, warnings: tuple[str, ...]) -> None:
        if self.options.strict and warnings:
            raise AudioError("; ".join(warnings))


def _stage(error: W2VError | MemoryError) -> str:
    """Where a long recording failed; it is read again while it is embedded."""
    return "read" if isinstance(error, AudioError) else "embed"


def _failure(item: Input, stage: str, error: W2VError | MemoryError) -> Failure:
    return Failure(item.path, stage, str(error) or "out of memory")


@contextlib.contextmanager
def _workers(stop: Stop, jobs: int, concurrency: int) -> Iterator[tuple[Workers, Workers]]:
    """Start the decoding threads and the engine's threads; leaving the block stops at once what still runs."""
    decoder, runner = Workers(jobs, "w2v-decode", stop), Workers(concurrency, "w2v-engine", stop)
    try:
        yield decoder, runner
    finally:
        stop.stop()
        decoder.close()
        runner.close()
