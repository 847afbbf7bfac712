"""One run of ``w2v-embed``: inputs to a finished output, resumable at any moment."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from w2v_models.bundle import Bundle
from w2v_models.errors import OutputError, W2VError
from w2v_runtime.corpus import CorpusOptions, Finished, Input, embed_inputs, embed_paths
from w2v_runtime.embedder import Embedder
from w2v_runtime.engine import installed_version
from w2v_runtime.failures import FailureLog
from w2v_runtime.inputs import ALL, Shard
from w2v_runtime.journal import FAILURES_SUFFIX, JOURNAL_SUFFIX, VALUES_SUFFIX, Header, Stamp, beside, exists, read_back
from w2v_runtime.long import DEFAULT_WINDOWING, Windowing
from w2v_runtime.results import Embedding, Failure, Request
from w2v_runtime.spool import Spool
from w2v_runtime.stores import Layout, OutputFormat, open_store, write_lines
from w2v_runtime.stores.pending import check_file

STDOUT: Final = "stdout"
#: Failures whose reasons are shown on the terminal, not only listed in the file.
_SHOWN_FAILURES: Final = 3


@dataclass
class Summary:
    """What a run did: files embedded now and by earlier runs, failures, audio and padding in seconds.

    ``warned`` counts the embedded files with warnings; ``running_seconds`` is what is done of a long recording.
    """

    embedded: int = 0
    recalled: int = 0
    failed: int = 0
    warned: int = 0
    audio_seconds: float = 0.0
    running_seconds: float = 0.0
    samples: int = 0
    padded_samples: int = 0
    wall_seconds: float = 0.0
    engine_seconds: float = 0.0
    first_failures: list[Failure] = field(default_factory=list)

    @property
    def padding(self) -> float:
        """The padding's share of all samples that went through the engine."""
        return 1 - self.samples / self.padded_samples if self.padded_samples else 0.0


@dataclass(frozen=True)
class RunOptions:
    """What a run reads, computes and writes."""

    output: Path
    format: OutputFormat
    request: Request
    corpus: CorpusOptions
    windowing: Windowing = DEFAULT_WINDOWING
    shard: Shard = ALL
    resume: bool = False
    overwrite: bool = False
    failures: Path | None = None
    hash: bool = False

    @property
    def failures_path(self) -> Path | None:
        """Where failed inputs are listed; None on standard output unless a file was named."""
        if self.failures is not None or self.format == STDOUT:
            return self.failures
        return beside(self.output, FAILURES_SUFFIX)


def header_of(bundle: Bundle, precision: str, options: RunOptions) -> Header:
    """The description that a later ``--resume`` must match."""
    request = options.request
    fingerprint = {
        "model": bundle.manifest.source.model,
        "bundle": bundle.manifest.sha256,
        "precision": precision,
        "level": request.level,
        "pooling": list(request.pooling) if request.level == "utterance" else [],
        "layers": list(request.layers),
        "layer_weights": list(request.layer_weights or []),
        "channel": "mean" if options.corpus.channel is None else options.corpus.channel,
        "pad_short": options.corpus.pad_short,
        "window": options.windowing.window,
        "context": options.windowing.context,
    }
    return Header(fingerprint, f"{options.shard.index}/{options.shard.count}", finished=False)


def check_output(options: RunOptions, header: Header) -> None:
    """Refuse an output that exists, unless it is to be replaced, or continued by an equal run.

    Raises:
        OutputError: with the choice the user has, or the differences.
    """
    journal = beside(options.output, JOURNAL_SUFFIX)
    unfinished = beside(options.output, VALUES_SUFFIX).exists()
    there = exists(options.output)
    if options.failures_path is not None:
        check_file(options.failures_path, overwrite=True)
    if options.resume:
        earlier = Header.read(journal)
        if earlier is None and there:
            raise OutputError(f"{options.output} has no journal to resume from; replace it with --overwrite.")
        if earlier is not None:
            _refuse_other(options.output, earlier, header)
    elif not options.overwrite and there:
        raise OutputError(f"{options.output} exists; continue it with --resume or replace it with --overwrite.")
    elif not options.overwrite and unfinished:
        raise OutputError(
            f"{options.output} has an unfinished run beside it ({journal.name}); "
            "continue it with --resume or start again with --overwrite."
        )


def _refuse_other(output: Path, earlier: Header, now: Header) -> None:
    before, after = earlier.fingerprint | {"shard": earlier.shard}, now.fingerprint | {"shard": now.shard}
    differences = [
        f"{name} was {before.get(name)!r} and is now {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if differences:
        raise OutputError(
            f"{output} was begun by another run: {'; '.join(differences)}. "
            "Repeat that run's options, or start again with --overwrite."
        )


def metadata(embedder: Embedder, request: Request, corpus: CorpusOptions) -> dict[str, Any]:
    """What an output says of itself."""
    manifest, head = embedder.manifest, embedder.head(request)
    packages = ("w2v-onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy", "soundfile", "soxr")
    return {
        "model": manifest.source.model,
        "revision": manifest.source.revision,
        "bundle": manifest.sha256,
        "random_weights": manifest.source.random,
        "layer": list(request.layers),
        "layer_weights": None if request.layer_weights is None else list(request.layer_weights),
        "pooling": list(request.pooling) if request.level == "utterance" else None,
        "level": request.level,
        "precision": embedder.precision,
        "device": embedder.engine.device,
        "channel": "mean" if corpus.channel is None else corpus.channel,
        "labels": list(head.labels) if head else [],
        "head_level": head.level if head else None,
        "frame_step_seconds": embedder.times.step,
        "frame_width_seconds": embedder.times.width,
        "packages": {name: version for name in packages if (version := installed_version(name))},
    }


def run(
    embedder: Embedder,
    inputs: Iterable[str],
    options: RunOptions,
    header: Header,
    progress: Callable[[Summary], None] = lambda summary: None,
) -> Summary:
    """Embed every input that is not finished yet and write the output. The caller holds the output's lock.

    Raises:
        W2VError: the output cannot be written; what is finished stays resumable.
    """
    summary, start, busy = Summary(), time.monotonic(), embedder.engine.busy_seconds
    try:
        with contextlib.closing(Spool(options.output, header, options.resume)) as spool:
            _embed_rest(embedder, inputs, options, header, spool, summary, progress)
            if not spool.unchanged:
                _restore(spool, header, options)
                _write_output(embedder, spool, options)
            spool.finish(header)
    except OSError as error:
        raise W2VError(
            f"{error.filename or options.output} cannot be written: {error.strerror or error}. "
            "What is finished is kept: make room and repeat the command with --resume."
        ) from error
    summary.wall_seconds = time.monotonic() - start
    summary.engine_seconds = embedder.engine.busy_seconds - busy
    return summary


def _embed_rest(
    embedder: Embedder,
    inputs: Iterable[str],
    options: RunOptions,
    header: Header,
    spool: Spool,
    summary: Summary,
    progress: Callable[[Summary], None],
) -> None:
    """Embed what is not finished. Every batch is brought to the disk, so that a killed run loses no more than one."""
    stamps: dict[int, Stamp] = {}
    rest = _unfinished(inputs, options, spool, stamps, summary)

    def advance(seconds: float) -> None:
        summary.running_seconds = seconds

    progress(summary)
    with (
        FailureLog(options.failures_path) as failures,
        contextlib.closing(embed_inputs(embedder, rest, options.request, options.corpus, advance)) as batches,
    ):
        for finished in batches:
            _restore(spool, header, options)
            _record(finished, spool, stamps, failures, summary)
            spool.flush()
            progress(summary)


def stream(embedder: Embedder, inputs: Iterable[str], options: RunOptions) -> Summary:
    """Embed every input of the shard and write JSON lines to standard output as they come, in order."""
    summary, start = Summary(), time.monotonic()
    chosen = (path for index, path in enumerate(inputs) if options.shard.holds(index))
    results = embed_paths(embedder, chosen, options.request, options.corpus)
    with FailureLog(options.failures_path) as failures:

        def embedded() -> Iterator[Embedding]:
            for result in results:
                if isinstance(result, Failure):
                    failures.add(result)
                    summary.failed += 1
                else:
                    yield result
                    summary.embedded += 1
                    summary.warned += bool(result.warnings)
                    summary.audio_seconds += result.duration

        with contextlib.closing(results):
            write_lines(sys.stdout, _layout(embedder, options, count=0, rows=0), embedded())
    summary.wall_seconds, summary.engine_seconds = time.monotonic() - start, embedder.engine.busy_seconds
    return summary


def _unfinished(
    inputs: Iterable[str], options: RunOptions, spool: Spool, stamps: dict[int, Stamp], summary: Summary
) -> Iterator[Input]:
    """This shard's inputs that are not finished, each with its stamp taken before it is read."""
    position = 0
    for index, path in enumerate(inputs):
        if not options.shard.holds(index):
            continue
        if spool.recall(position, path, options.hash):
            summary.recalled += 1
        else:
            stamps[position] = Stamp.of(path, options.hash) or Stamp(0, 0)
            yield Input(position, path)
        position += 1


def _record(finished: Finished, spool: Spool, stamps: dict[int, Stamp], failures: FailureLog, summary: Summary) -> None:
    for item, result in finished.results:
        stamp = stamps.pop(item.position)
        if isinstance(result, Failure):
            failures.add(result)
            summary.failed += 1
            if len(summary.first_failures) < _SHOWN_FAILURES:
                summary.first_failures.append(result)
        else:
            spool.add(item.position, stamp, result)
            summary.embedded += 1
            summary.warned += bool(result.warnings)
            summary.audio_seconds += result.duration
    summary.running_seconds = 0.0
    summary.samples += finished.samples
    summary.padded_samples += finished.padded_samples


def _restore(spool: Spool, header: Header, options: RunOptions) -> None:
    """Where the output is complete, take its results back into the record, to add to them."""
    if spool.complete:
        spool.restore(header, read_back(options.output, options.format))


def _write_output(embedder: Embedder, spool: Spool, options: RunOptions) -> None:
    """Write the output from the record, in the order of the inputs; it appears under its name when complete."""
    layout = _layout(embedder, options, spool.count, spool.rows)
    store = open_store(options.output, layout, overwrite=True, kind=options.format)
    try:
        for embedding in spool.embeddings():
            store.write(embedding)
        store.commit()
    except BaseException:
        store.discard()
        raise


def _layout(embedder: Embedder, options: RunOptions, count: int, rows: int) -> Layout:
    request = options.request
    head = embedder.head(request)
    return Layout(
        count=count,
        frames=rows if request.level == "frame" else 0,
        dim=embedder.dimension(request),
        layers=request.layers,
        level=request.level,
        labels=head.labels if head else (),
        times=embedder.times,
        metadata=metadata(embedder, request, options.corpus),
        head_level="frame" if head and head.level == "frame" else "utterance",
    )
