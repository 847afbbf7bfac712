"""Many files: decoded ahead on threads, batched by length, embedded without the engine ever waiting for audio."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from w2v_models.errors import AudioError, OutOfMemoryError, RefusedError, W2VError
from w2v_runtime import processors
from w2v_runtime.audio import Audio
from w2v_runtime.batching import Pool
from w2v_runtime.engine import CUDA
from w2v_runtime.long import Advance
from w2v_runtime.results import Embedding, Failure, Request

if TYPE_CHECKING:
    from w2v_runtime.embedder import Embedder

#: Padded seconds of audio in a batch, by device.
BATCH_SECONDS: Final = {"cpu": 8.0, "cuda": 480.0, "openvino": 8.0}
#: Inputs that may wait decoded for a batch, and the audio they may hold in batches' worth.
POOL_INPUTS: Final = 512
POOL_BATCHES: Final = 24


@dataclass(frozen=True)
class CorpusOptions:
    """How inputs are read and batched.

    ``channel`` None is the mean; ``pad_short`` and ``strict`` say what to do with short and damaged audio;
    ``batch_seconds`` (padded) and ``jobs`` (decoding threads) follow the device and the processors where None.
    """

    channel: int | None = None
    pad_short: bool = False
    strict: bool = False
    batch_seconds: float | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.batch_seconds is not None and not self.batch_seconds > 0:
            raise RefusedError(f"batch-seconds must be positive, not {self.batch_seconds}.")
        if self.jobs is not None and self.jobs < 1:
            raise RefusedError(f"jobs must be at least 1, not {self.jobs}.")


@dataclass(frozen=True)
class Input:
    """One input: its place among those of this run, from 0, and its path."""

    position: int
    path: str


@dataclass(frozen=True)
class Finished:
    """A batch that left the engine, and the inputs that failed meanwhile, each with its result."""

    results: tuple[tuple[Input, Embedding | Failure], ...]
    samples: int = 0
    padded_samples: int = 0


def embed_paths(
    embedder: Embedder, paths: Iterable[str], request: Request, options: CorpusOptions
) -> Generator[Embedding | Failure, None, None]:
    """Embed files and yield their results in the order of ``paths``."""
    inputs = (Input(position, path) for position, path in enumerate(paths))
    waiting: dict[int, Embedding | Failure] = {}
    position = 0
    for finished in embed_inputs(embedder, inputs, request, options):
        waiting.update((item.position, result) for item, result in finished.results)
        while position in waiting:
            yield waiting.pop(position)
            position += 1


def embed_inputs(
    embedder: Embedder,
    inputs: Iterable[Input],
    request: Request,
    options: CorpusOptions,
    advance: Advance = lambda seconds: None,
) -> Generator[Finished, None, None]:
    """Embed inputs and yield batch after batch, nearly in order. While batches run, the next is ready.

    ``advance(seconds)`` tells how much of a long recording is done while it runs.
    Closed between two of them, as by an interrupt, it stops those in the engine.
    """
    jobs = options.jobs or processors.available()
    seconds = options.batch_seconds or BATCH_SECONDS[embedder.engine.device]
    budget = max(1, round(seconds * embedder.sample_rate))
    pool = Pool(budget, longest_first=embedder.engine.device == CUDA)
    with _workers(embedder, jobs) as (decoder, runner):
        running: deque[Future[Finished]] = deque()
        for batch in _batches(pool, _decoded(embedder, inputs, options, decoder, jobs)):
            running.append(runner.submit(_run, embedder, batch, pool, request, options, advance))
            if len(running) > embedder.engine.runs:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


@dataclass(frozen=True, eq=False)
class _Decoded:
    """An input's audio, why it has none, or None where it is too long to be held."""

    input: Input
    audio: Audio | Failure | None


def _decoded(
    embedder: Embedder, inputs: Iterable[Input], options: CorpusOptions, decoder: ThreadPoolExecutor, jobs: int
) -> Iterator[_Decoded]:
    """Inputs as audio, in order, a few decoded ahead."""
    ahead: deque[Future[_Decoded]] = deque()
    for item in inputs:
        ahead.append(decoder.submit(_decode, embedder, item, options))
        if len(ahead) > 4 * jobs:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _decode(embedder: Embedder, item: Input, options: CorpusOptions) -> _Decoded:
    try:
        audio = embedder.read(item.path, options.channel, options.pad_short)
        if audio is not None:
            _refuse_warnings(audio.warnings, options)
        return _Decoded(item, audio)
    except (AudioError, MemoryError) as error:
        return _Decoded(item, Failure(item.path, "read", str(error) or "out of memory"))


def _refuse_warnings(warnings: tuple[str, ...], options: CorpusOptions) -> None:
    if options.strict and warnings:
        raise AudioError("; ".join(warnings))


def _batches(pool: Pool, decoded: Iterator[_Decoded]) -> Iterator[list[_Decoded]]:
    """Batches with little padding; long audio is one of its own, and what failed travels with the next."""
    failed: list[_Decoded] = []
    for item in decoded:
        if isinstance(item.audio, Audio):
            pool.add(len(item.audio.samples), item)
        elif item.audio is None:
            yield [item]
        else:
            failed.append(item)
        if len(failed) >= POOL_INPUTS or len(pool) >= POOL_INPUTS or pool.samples >= POOL_BATCHES * pool.budget:
            yield failed + (pool.take() if len(pool) else [])
            failed = []
    while len(pool) or failed:
        yield failed + (pool.take() if len(pool) else [])
        failed = []


def _run(
    embedder: Embedder, batch: list[_Decoded], pool: Pool, request: Request, options: CorpusOptions, advance: Advance
) -> Finished:
    if batch[0].audio is None:
        return _run_long(embedder, batch[0].input, request, options, advance)
    results: list[tuple[Input, Embedding | Failure]] = [
        (item.input, item.audio) for item in batch if isinstance(item.audio, Failure)
    ]
    ready = [(item.input, item.audio) for item in batch if isinstance(item.audio, Audio)]
    results.extend(zip([item for item, _ in ready], _embed(embedder, ready, pool, request), strict=True))
    lengths = [len(audio.samples) for _, audio in ready]
    return Finished(tuple(results), sum(lengths), max(lengths, default=0) * len(lengths))


def _run_long(embedder: Embedder, item: Input, request: Request, options: CorpusOptions, advance: Advance) -> Finished:
    try:
        embedding = embedder.embed_stream(item.path, options.channel, request, advance)
        _refuse_warnings(embedding.warnings, options)
    except AudioError as error:
        return Finished(((item, Failure(item.path, "read", str(error))),))
    except (W2VError, MemoryError) as error:
        if embedder.engine.stopped:
            raise
        return Finished(((item, Failure(item.path, "embed", str(error) or "out of memory")),))
    samples = round(embedding.duration * embedder.sample_rate)
    return Finished(((item, embedding),), samples, samples)


def _embed(
    embedder: Embedder, items: list[tuple[Input, Audio]], pool: Pool, request: Request
) -> list[Embedding | Failure]:
    """Embed a batch; where the engine fails, its halves, so that only an input that fails alone is lost.

    Where memory was short, no later batch of the pool is larger than the halves.
    """
    if not items:
        return []
    try:
        return list(embedder.embed_batch([item.path for item, _ in items], [audio for _, audio in items], request))
    except (W2VError, MemoryError) as error:
        if embedder.engine.stopped:
            raise
        if len(items) == 1:
            return [Failure(items[0][0].path, "embed", str(error) or "out of memory")]
        if isinstance(error, OutOfMemoryError):
            longest = max(len(audio.samples) for _, audio in items)
            pool.budget = min(pool.budget, longest * len(items) // 2)
        half = len(items) // 2
        return _embed(embedder, items[:half], pool, request) + _embed(embedder, items[half:], pool, request)


@contextlib.contextmanager
def _workers(embedder: Embedder, jobs: int) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """Decoding threads and the engine's threads. When the consumer stops early, what runs is ended at once."""
    decoder = ThreadPoolExecutor(jobs, thread_name_prefix="w2v-decode")
    runner = ThreadPoolExecutor(embedder.engine.runs, thread_name_prefix="w2v-engine")
    try:
        yield decoder, runner
    except BaseException:
        embedder.engine.stop()
        raise
    finally:
        decoder.shutdown(cancel_futures=True)
        runner.shutdown(cancel_futures=True)
        embedder.engine.start()
