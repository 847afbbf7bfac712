"""One run of ``w2v-embed``: embeds the inputs, keeps results in a spool for ``--resume``, and writes the output."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Final, cast

import numpy as np

from w2v_models.errors import OutputError, StorageError
from w2v_runtime.embedder import Embedder
from w2v_runtime.embedding.corpus import Finished, embed_in_order, embed_inputs
from w2v_runtime.embedding.inputs import AHEAD_IN_ORDER, Input, Segments, grouped
from w2v_runtime.embedding.results import Embedding, Failure
from w2v_runtime.files.outputs import JOURNAL_SUFFIX, VALUES_SUFFIX, Written, exists, hidden
from w2v_runtime.runs.checks import earlier_header
from w2v_runtime.runs.failures import FailureLog
from w2v_runtime.runs.journal import UNKNOWN, Header, Stamp, drop_earlier, write_journal
from w2v_runtime.runs.listed import Listed
from w2v_runtime.runs.options import RunOptions, layout
from w2v_runtime.runs.readback import FinishedOutput
from w2v_runtime.runs.spool import Spool
from w2v_runtime.runs.summary import Summary
from w2v_runtime.stores import EmbeddingStore, open_store, write_lines

#: Failures whose reasons are shown on the terminal, not only listed in the file.
_SHOWN_FAILURES: Final = 3
#: What the system answers where there is no room, or none for this user.
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Segments that are looked at together: of one recording those that are no further apart are read in one pass.
AHEAD: Final = 100_000
#: Stamps of recordings with segments that are remembered.
_RECENT_STAMPS: Final = 10_000
#: Inputs that are gone, of which an error message names at most this many.
_NAMED_INPUTS: Final = 3

OpenEmbedder = Callable[[], Embedder]
Progress = Callable[[Summary], None]


def run(
    open_embedder: OpenEmbedder,
    inputs: Listed,
    options: RunOptions,
    header: Header,
    written: Written,
    progress: Progress = lambda summary: None,
    check: Callable[[], None] = lambda: None,
) -> Summary:
    """Embed every input that is not finished yet and write the output. The caller holds the output's lock.

    Args:
        open_embedder: opens the model; called only once it is known that there is something to do.
        inputs: the inputs, recordings or the segments of a table.
        options: options that :func:`w2v_runtime.runs.checks.check_earlier` has accepted.
        header: the journal's header, with what the run computes.
        written: the files that the run writes, none of which may be an input.
        progress: called with the summary whenever it has changed.
        check: raises W2VError if this process lost the lock on the output.

    Raises:
        OutputError: an input is a file that the run writes, or results would be lost because their inputs are gone.
        StorageError: the output cannot be written; what is finished stays resumable.
    """
    return _Run(options, header, written, inputs, progress, check).go(open_embedder)


class _Run:
    """The state of a run: its summary, the stamps of inputs in progress, and the indices of failed inputs."""

    def __init__(
        self,
        options: RunOptions,
        header: Header,
        written: Written,
        inputs: Listed,
        progress: Progress,
        check: Callable[[], None],
    ) -> None:
        self._options, self._header, self._written, self._inputs = options, header, written, inputs
        self._progress, self._check = progress, check
        self._summary = Summary(one=inputs.one)
        self._stamps: dict[int, Stamp] = {}
        self._recent: dict[str, Stamp | None] = {}
        self._failed = array("q")

    def go(self, open_embedder: OpenEmbedder) -> Summary:
        start = time.monotonic()
        resumed = self._open_earlier() if self._options.output.resume else None
        with contextlib.ExitStack() as stack:
            if resumed is not None:
                stack.enter_context(contextlib.closing(resumed))
                todo: Iterable[Input] = self._unfinished(resumed)
            else:
                todo = self._inputs
            if todo or resumed is None or not resumed.is_of(self._finished_header()):
                embedder = open_embedder()
                busy = embedder.engine.busy_seconds
                if resumed is None:
                    with self._storage_errors():
                        spool = stack.enter_context(contextlib.closing(Spool(self._options.output.path, self._header)))
                        drop_earlier(self._options.output.path)
                else:
                    spool = resumed
                self._embed(embedder, todo, spool)
                self._write_output(embedder, spool)
                self._summary.engine_seconds = embedder.engine.busy_seconds - busy
            else:
                spool = resumed
                with FailureLog(self._options.output.failures_path):
                    pass  # nothing failed, so the list of an earlier run is removed
            with self._storage_errors():
                spool.finish(self._finished_header())
        self._summary.wall_seconds = time.monotonic() - start
        return self._summary

    def _open_earlier(self) -> Spool | None:
        """Open the spool of earlier runs; None if there is none. A complete output's damaged journal is rewritten."""
        output = self._options.output.path
        earlier = earlier_header(self._options)
        if earlier is None or not (exists(output) if earlier.finished else hidden(output, VALUES_SUFFIX).exists()):
            return None
        with self._storage_errors():
            if earlier.finished:
                finished = FinishedOutput.open(output, self._options.output.format)
                if not finished.journal_whole:
                    self._summary.damaged += sum(entry.stamp is UNKNOWN for entry in finished.entries())
                    write_journal(hidden(output, JOURNAL_SUFFIX), finished.header, finished.entries())
            spool = Spool(output, self._header, resume=True)
        self._summary.damaged += spool.damaged
        return spool

    def _unfinished(self, spool: Spool) -> list[Input]:
        """The inputs that no earlier run finished, or that changed since; all are checked before any is embedded.

        Raises:
            OutputError: results of inputs that are gone would be lost.
        """
        summary, todo = self._summary, []
        summary.stage = "checking"
        for item in self._inputs:
            if item.fault is None and spool.recall(item, self._stamp(item)):
                summary.recalled += 1
            else:
                todo.append(item)
            summary.checked += 1
            self._progress(summary)
        summary.stage = "embedding"
        gone = list(spool.gone())
        if gone and not self._options.output.prune:
            named = ", ".join(gone[:_NAMED_INPUTS]) + (", …" if len(gone) > _NAMED_INPUTS else "")
            are = "is" if len(gone) == 1 else "are"
            raise OutputError(
                f"{self._options.output.path} has results of {spool.earlier} inputs, of which {len(gone)} {are} no "
                f"longer listed, or no longer there: {named}. Bring them back (is a disk not mounted?), or drop "
                "their results with --prune."
            )
        summary.pruned = len(gone)
        return todo

    def _stamp(self, item: Input) -> Stamp | None:
        """The stamp of an input; None if the input is missing. That of a recording with many segments is taken once.

        Raises:
            OutputError: the input is one of the files that the run writes.
        """
        if item.recording is not None:
            return Stamp.of_content(cast(BinaryIO, item.recording))
        if item.segment is None:
            return self._stamp_of(item.path)
        if item.path not in self._recent:
            if len(self._recent) >= _RECENT_STAMPS:
                self._recent.clear()
            self._recent[item.path] = self._stamp_of(item.path)
        return self._recent[item.path]

    def _stamp_of(self, path: str) -> Stamp | None:
        try:
            status = os.stat(path)
            stamp = Stamp.of_status(path, status, self._options.output.hash)
        except (OSError, ValueError):
            return None
        self._written.refuse_read(path, status)
        return stamp

    def _embed(self, embedder: Embedder, todo: Iterable[Input], spool: Spool) -> None:
        """Embed inputs. Every finished batch is flushed to disk, so a killed run loses only what was in progress."""
        options, summary = self._options, self._summary

        def advance(seconds: float) -> None:
            summary.running_seconds = seconds

        inputs: Iterator[Input | Segments] = self._stamped(todo)
        if options.segments is not None:
            inputs = grouped(self._stamped(todo), AHEAD)
        self._progress(summary)
        with (
            FailureLog(options.output.failures_path) as failures,
            contextlib.closing(embed_inputs(embedder, inputs, options.request, options.corpus, advance)) as batches,
        ):
            for finished in batches:
                self._check()
                with self._storage_errors():
                    self._record(finished, spool, failures)
                self._progress(summary)

    def _stamped(self, inputs: Iterable[Input]) -> Iterator[Input]:
        """Yield the inputs, and take the stamp of each before it is read."""
        for item in inputs:
            self._stamps[item.position] = self._stamp(item) or Stamp(0, 0)
            yield item

    def _record(self, finished: Finished, spool: Spool, failures: FailureLog) -> None:
        summary = self._summary
        for item, answer in finished.results:
            stamp = self._stamps.pop(item.position)
            result = _storable(answer, self._options)
            if isinstance(result, Failure):
                failures.add(result)
                self._failed.append(spool.index(item.position))
                summary.failed += 1
                if len(summary.first_failures) < _SHOWN_FAILURES:
                    summary.first_failures.append(result)
            else:
                self._restore(spool)
                spool.add(item.position, stamp, result)
                summary.embedded += 1
                summary.warned += bool(result.warnings)
                summary.windowed += result.duration > self._options.windowing.whole
                summary.audio_seconds += result.duration
        summary.running_seconds = 0.0
        summary.samples += finished.samples
        summary.padded_samples += finished.padded_samples
        spool.flush()

    def _restore(self, spool: Spool) -> None:
        """If the output is complete, copy its results back into the spool, so that more can be added."""
        if spool.complete:
            finished = FinishedOutput.open(self._options.output.path, self._options.output.format)
            spool.restore(self._header, (embedding for _, embedding in finished.results()))

    def _write_output(self, embedder: Embedder, spool: Spool) -> None:
        """Write the output from the spool, in the order of the inputs; it gets its name when it is complete."""
        header = self._finished_header()
        if spool.is_of(header):
            return
        options, summary = self._options, self._summary
        summary.stage = "writing"
        with self._storage_errors():
            self._restore(spool)
            described = layout(embedder, options, header, spool.count, spool.rows)
            store = open_store(options.output.path, described, overwrite=True, kind=options.output.format)
            try:
                for embedding in spool.embeddings():
                    _write(store, embedding, spool)
                    summary.written += 1
                    self._progress(summary)
                self._check()
                store.commit()
            except BaseException:
                store.discard()
                raise

    def _finished_header(self) -> Header:
        return dataclasses.replace(
            self._header,
            finished=True,
            inputs=self._inputs.seen,
            failed=tuple(sorted(self._failed)),
            listed=self._inputs.listed,
        )

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Turn an OSError of the block into StorageError: the run stops, and what is finished stays."""
        try:
            yield
        except OSError as error:
            mend = "make room" if error.errno in _FULL else "mend that"
            raise StorageError(
                f"{error.filename or self._options.output.path} cannot be written: {error.strerror or error}. "
                f"What is finished is kept: {mend} and repeat the command with --resume."
            ) from error


def _write(store: EmbeddingStore, embedding: Embedding, spool: Spool) -> None:
    """Write a result. If it does not fit the layout, its journal line is damaged and has no checksum to tell."""
    try:
        store.write(embedding)
    except ValueError as error:
        raise OutputError(f"{spool.journal_path} is damaged ({error}); start again with --overwrite.") from error


def _storable(result: Embedding | Failure, options: RunOptions) -> Embedding | Failure:
    """The result; a failure where float16, which has no number beyond 65504, cannot hold it."""
    if isinstance(result, Embedding) and options.output.dtype == "float16":
        peak = float(np.abs(result.values).max())
        if peak > np.finfo(np.float16).max:
            return Failure(result.path, "write", f"a value of {peak:.6g} is too large for float16; leave --dtype out.")
    return result


def stream(embedder: Embedder, inputs: Listed, options: RunOptions, tell: Callable[[Failure], None]) -> Summary:
    """Embed every input of the shard and write JSON lines to standard output as they come, in order.

    ``tell`` is called with each failure unless a file was named for them.
    """
    summary, start = Summary(one=inputs.one), time.monotonic()
    numbered: Iterator[Input | Segments] = (
        dataclasses.replace(item, position=position) for position, item in enumerate(inputs)
    )
    if options.segments is not None:
        numbered = grouped(cast(Iterator[Input], numbered), AHEAD_IN_ORDER)
    results = embed_in_order(embedder, numbered, options.request, options.corpus)
    with FailureLog(options.output.failures_path, tell) as failures:

        def embedded() -> Iterator[Embedding]:
            for answer in results:
                result = _storable(answer, options)
                if isinstance(result, Failure):
                    failures.add(result)
                    summary.failed += 1
                else:
                    yield result
                    summary.embedded += 1
                    summary.warned += bool(result.warnings)
                    summary.windowed += result.duration > options.windowing.whole
                    summary.audio_seconds += result.duration

        with contextlib.closing(results):
            write_lines(sys.stdout, layout(embedder, options, None), embedded())
    summary.wall_seconds, summary.engine_seconds = time.monotonic() - start, embedder.engine.busy_seconds
    return summary
