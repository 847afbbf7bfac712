"""Embeds many recordings: threads decode ahead, inputs are batched by length, and the engine never waits for audio.

The size of a batch, and which inputs it holds, is decided in :mod:`w2v_runtime.embedding.batching`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Final, NamedTuple, TypeVar

from w2v_models.errors import AudioError, OutOfMemoryError, RefusedError, W2VError
from w2v_runtime.audio.reading import Audio
from w2v_runtime.embedding.batching import BATCH_SECONDS, Pool
from w2v_runtime.embedding.inputs import WHOLE, Context, Input, Segments
from w2v_runtime.embedding.long import Advance, Long
from w2v_runtime.embedding.model import Model
from w2v_runtime.embedding.results import Embedding, Failure, Request
from w2v_runtime.embedding.segments import Result, Unit, Wanted, read_segments
from w2v_runtime.engines.base import CUDA, is_whole
from w2v_runtime.threads import processors
from w2v_runtime.threads.stop import Stop
from w2v_runtime.threads.workers import Task, Workers

T = TypeVar("T")
#: Limits of what waits decoded for a batch: the number of inputs, and their audio as a multiple of the batch's budget.
POOL_INPUTS: Final = 512
POOL_BATCHES: Final = 24
#: The most seconds that a segment hears on each side.
MAX_SEGMENT_CONTEXT: Final = 300.0
#: Seconds of decoded audio that wait for the pool, beyond which no further input is decoded.
AHEAD_SECONDS: Final = 1200.0


@dataclass(frozen=True)
class CorpusOptions:
    """How inputs are read and batched.

    ``channel`` is a number from 0, None the mean of all channels. ``pad_short`` pads audio that is too short with
    silence; ``strict`` makes warnings failures. ``batch_seconds`` is the largest batch with its padding, None the
    device's default; ``jobs`` is the number of decoding threads, None that of the processors. ``segment_context`` is
    what a segment hears: seconds on each side, or ``whole``.

    Raises:
        RefusedError: a value is out of bounds or of another type.
    """

    channel: int | None = None
    pad_short: bool = False
    strict: bool = False
    batch_seconds: float | None = None
    jobs: int | None = None
    segment_context: Context = 0.0

    def __post_init__(self) -> None:
        if self.channel is not None and not (is_whole(self.channel) and self.channel >= 0):
            raise RefusedError(f"channel must be a number from 0, or None for the mean of all, not {self.channel!r}.")
        seconds = self.batch_seconds
        if seconds is not None and not (isinstance(seconds, Real) and 0 < seconds < math.inf):
            raise RefusedError(f"batch_seconds (--batch-seconds) must be positive, not {seconds!r}.")
        if self.jobs is not None and not (is_whole(self.jobs) and self.jobs >= 1):
            raise RefusedError(f"jobs (--jobs) must be a whole number, at least 1, not {self.jobs!r}.")
        context = self.segment_context
        number = isinstance(context, Real) and not isinstance(context, bool) and 0 <= context <= MAX_SEGMENT_CONTEXT
        if not number and context != WHOLE:
            raise RefusedError(
                f"context (--segment-context) must be 0 to {MAX_SEGMENT_CONTEXT:g} seconds or {WHOLE}, not {context!r}."
            )

    @classmethod
    def of(cls, options: Mapping[str, Any], context: Context = 0.0, call: str = "embed_files") -> CorpusOptions:
        """Build the options from the keyword arguments of a ``call``, and a context.

        Raises:
            TypeError: an option is unknown; the message names the known ones.
        """
        known = [option.name for option in dataclasses.fields(cls) if option.name != "segment_context"]
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"{call} has no option {', '.join(unknown)}; its options are {', '.join(known)}.")
        return cls(**options, segment_context=context)


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
    model: Model, inputs: Iterable[Input | Segments], request: Request, options: CorpusOptions
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
    inputs: Iterable[Input | Segments],
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
    model: Model, inputs: Iterable[Input | Segments], request: Request, options: CorpusOptions, advance: Advance
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


def _until_fault(inputs: Iterable[Input | Segments], faults: list[Exception]) -> Iterator[Input | Segments]:
    """Yield inputs until the iterable ends or raises; the exception is added to ``faults``."""
    try:
        yield from inputs
    except Exception as fault:  # whatever the caller's own code raises
        faults.append(fault)


class _Step(NamedTuple):
    """Units that are decoded, and the reading that goes on from there; None at the end of an input."""

    units: list[Unit]
    rest: Iterator[list[Unit]] | None = None


def _decode_ahead(work: _Work, inputs: Iterable[Input | Segments], decoder: Workers, jobs: int) -> Iterator[Unit]:
    """Decode inputs on threads, a few ahead of their use, and yield them in order, so that batches are always the same.

    So much audio at most waits in memory: :data:`AHEAD_SECONDS`, and what two inputs a thread may hold beyond that.
    """
    ahead: deque[Task[_Step]] = deque()

    def first() -> Iterator[Unit]:
        step = ahead.popleft().result()
        if step.rest is not None:
            ahead.appendleft(decoder.submit(partial(work.next_step, step.rest)))
        yield from step.units

    for item in inputs:
        ahead.append(decoder.submit(partial(work.decode, item)))
        while len(ahead) > 4 * jobs or _enough(ahead, 2 * jobs):
            yield from first()
    while ahead:
        yield from first()


def _enough(ahead: deque[Task[_Step]], most_open: int) -> bool:
    finished = [task for task in ahead if task.done]
    held = sum(unit.held for task in finished for unit in task.result().units)
    return len(ahead) - len(finished) > most_open or held > AHEAD_SECONDS


def _batches(work: _Work, decoded: Iterator[Unit]) -> Iterator[list[Unit]]:
    """Group decoded units into batches, long units into batches of their own; failed ones are put into the next."""
    pool, failed, long = work.pool, list[Unit](), list[Unit]()
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

    def decode(self, item: Input | Segments) -> _Step:
        """Read an input's audio, or begin with a recording's segments; what cannot be read becomes a Failure."""
        if isinstance(item, Segments):
            options, inputs = self.options, item.inputs
            steps = read_segments(
                self.model,
                item,
                self.request,
                options.segment_context,
                options.channel,
                options.pad_short,
                self.stop,
            )
            return self.next_step(self._until_error(inputs, steps))
        audio = self._read((item,), lambda: self.model.read(item.source, *self._reading(), self.stop))
        return _Step([audio] if isinstance(audio, Unit) else self._refused(Unit((Wanted(item),), audio)))

    def _reading(self) -> tuple[int | None, bool]:
        return self.options.channel, self.options.pad_short

    def next_step(self, steps: Iterator[list[Unit]]) -> _Step:
        """Read on in the segments of a recording."""
        units = next(steps, None)
        return _Step([]) if units is None else _Step([part for unit in units for part in self._refused(unit)], steps)

    def _until_error(self, inputs: tuple[Input, ...], steps: Iterator[list[Unit]]) -> Iterator[list[Unit]]:
        """Yield the steps; if the recording fails, its segments that no step held fail for the same reason."""
        done = set[int]()
        while True:
            units = self._read(inputs, lambda: next(steps, None))
            if units is None:
                return
            if isinstance(units, Unit):
                yield [Unit(tuple(want for want in units.wanted if want.input.position not in done), units.audio)]
                return
            done.update(want.input.position for unit in units for want in unit.wanted)
            yield units

    def _read(self, inputs: tuple[Input, ...], reading: Callable[[], T]) -> T | Unit:
        """The result of a reading, or a unit with the failure of the inputs."""
        wanted, path = tuple(map(Wanted, inputs)), inputs[0].path
        try:
            return reading()
        except (AudioError, MemoryError) as error:
            return Unit(wanted, Failure(path, "read", str(error) or "out of memory"))
        except W2VError:
            raise
        except Exception as error:  # a fault of ours, or of a decoder: it costs this input, not the run
            return Unit(wanted, Failure(path, "read", f"unexpected {type(error).__name__}: {error}"))

    def _refused(self, unit: Unit) -> list[Unit]:
        """The unit; if the options are strict, what has warnings is a failure: all of it, or inputs on their own."""
        if not self.options.strict or isinstance(unit.audio, Failure):
            return [unit]
        if unit.audio.warnings:
            return [Unit(unit.wanted, Failure(unit.wanted[0].input.path, "read", "; ".join(unit.audio.warnings)))]
        fine = tuple(want for want in unit.wanted if not want.warnings)
        refused = [
            Unit((want,), Failure(want.input.path, "read", "; ".join(want.warnings)))
            for want in unit.wanted
            if want.warnings
        ]
        return [*refused, Unit(fine, unit.audio)] if fine else refused

    def embed(self, batch: list[Unit]) -> Finished:
        """Embed a batch, of which all units are long or none."""
        results = [
            (want.input, want.input.failure(unit.audio.stage, unit.audio.reason))
            for unit in batch
            if isinstance(unit.audio, Failure)
            for want in unit.wanted
        ]
        long = [(unit, unit.audio) for unit in batch if isinstance(unit.audio, Long)]
        ready = [(unit, unit.audio) for unit in batch if isinstance(unit.audio, Audio)]
        if long:
            samples = sum(audio.samples for _, audio in long)
            return Finished((*results, *self._embed_long(long)), samples, samples)
        lengths = [len(audio.samples) for _, audio in ready]
        return Finished((*results, *self._embed(ready)), sum(lengths), max(lengths, default=0) * len(lengths))

    def _embed_long(self, units: list[tuple[Unit, Long]]) -> list[Result]:
        chosen = self.advance, self.stop, self.options.batch_seconds
        if units[0][0].wanted[0].span is not None:
            answers = self.model.embed_long_spans([(audio, unit.spans) for unit, audio in units], self.request, *chosen)
            return [
                result
                for (unit, _), answer in zip(units, answers, strict=True)
                for result in unit.results(answer if isinstance(answer, list) else [answer] * len(unit.wanted))
            ]
        recordings = [(unit.wanted[0].input.path, audio) for unit, audio in units]
        embedded = self.model.embed_long(recordings, self.request, *chosen)
        return [result for (unit, _), one in zip(units, embedded, strict=True) for result in unit.results([one])]

    def _embed(self, units: list[tuple[Unit, Audio]]) -> list[Result]:
        """Embed a batch. If the engine fails, each half is tried again, so that only a unit that fails alone is lost.

        After the engine ran out of memory, no later batch of the pool is larger than the halves.
        """
        if not units:
            return []
        try:
            return self._embedded(units)
        except (W2VError, MemoryError) as error:
            self.stop.check()
            if len(units) == 1:
                return [(want.input, want.input.failure("embed", error)) for want in units[0][0].wanted]
            if isinstance(error, OutOfMemoryError):
                longest = max(len(audio.samples) for _, audio in units)
                self.pool.budget = min(self.pool.budget, longest * len(units) // 2)
            half = len(units) // 2
            return self._embed(units[:half]) + self._embed(units[half:])

    def _embedded(self, units: list[tuple[Unit, Audio]]) -> list[Result]:
        audios = [audio for _, audio in units]
        if units[0][0].wanted[0].span is not None:
            answers = self.model.embed_spans(audios, [unit.spans for unit, _ in units], self.request, self.stop)
            return [result for (unit, _), told in zip(units, answers, strict=True) for result in unit.results(told)]
        paths = [unit.wanted[0].input.path for unit, _ in units]
        embedded = self.model.embed_batch(paths, audios, self.request, self.stop)
        return [result for (unit, _), one in zip(units, embedded, strict=True) for result in unit.results([one])]


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
