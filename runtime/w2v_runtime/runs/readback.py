"""Reads a finished output back: each input's entry and result, from its journal or, if that is damaged, without it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from w2v_models.errors import OutputError
from w2v_runtime.embedding.results import Embedding
from w2v_runtime.files.outputs import JOURNAL_SUFFIX, METADATA_SUFFIX, beside, exists, hidden
from w2v_runtime.runs.inputs import Shard
from w2v_runtime.runs.journal import (
    JOURNAL_FORMAT,
    UNKNOWN,
    DamagedJournalError,
    Entry,
    Header,
    Values,
    earlier_journal,
    read_entries,
)
from w2v_runtime.stores import OutputFormat, Record, read_logits, read_metadata, read_records, read_values
from w2v_runtime.stores.pending import INDEX, METADATA

#: The state of an output's files: inode, bytes and time of the last change, None for a file that is missing.
State = tuple[tuple[int, int, int] | None, ...]
#: The key in an output's metadata that describes the run that made it, as the journal's header does.
RUN: Final = "run"


def run_record(header: Header) -> dict[str, Any]:
    """The description of a run in its output's metadata, so that the output can be merged without its journal."""
    inputs = header.inputs
    return {
        "computes": header.fingerprint,
        "shard": header.shard,
        "inputs": None if inputs is None else inputs.count,
        "inputs_sha256": None if inputs is None else inputs.sha256,
        "failed": None if header.failed is None else list(header.failed),
    } | ({} if header.listed is None else {"listed": header.listed})


@dataclass(frozen=True)
class FinishedOutput:
    """A finished output. If its journal is damaged or gone, its inputs are known from the output itself.

    ``journal_whole`` says that the journal is neither damaged nor gone; ``state`` changes when a run writes to it.
    """

    path: Path
    kind: OutputFormat
    header: Header
    metadata: dict[str, Any]
    journal: Path | None
    journal_whole: bool
    state: State

    @classmethod
    def open(cls, path: Path, kind: OutputFormat) -> FinishedOutput:
        """Open an output that a run has finished.

        Raises:
            OutputError: the output is missing, damaged or unfinished, or neither it nor its journal describes its run.
        """
        if not exists(path):
            raise OutputError(f"{path} does not exist; name outputs of w2v-embed.")
        state = _state(path)
        journal = next(filter(Path.exists, (hidden(path, JOURNAL_SUFFIX), earlier_journal(path))), None)
        header = None
        with contextlib.suppress(DamagedJournalError):
            header = None if journal is None else Header.read(journal)
        if header is not None and not header.finished:
            raise OutputError(
                f"{path} is unfinished; continue it first, with w2v-embed --shard {header.shard} --resume."
            )
        metadata = read_metadata(path, kind)
        known = header is not None
        if header is not None and not _tells_of(metadata, header):
            raise OutputError(
                f"{path} is not the output that {journal} was written for, as when one of them was moved or copied "
                "alone. Bring back the other, or write it again with w2v-embed --overwrite."
            )
        if header is None:
            header = _header_in(metadata, path)
        whole = known and journal is not None and _is_whole(header, journal)
        return cls(path, kind, header, metadata, journal, whole, state)

    def check_unchanged(self) -> None:
        """Make sure that the output and its journal still are those that were opened.

        Raises:
            OutputError: a run has written to them since.
        """
        if _state(self.path) != self.state:
            raise OutputError(
                f"{self.path} was written to while it was read; wait until its run has ended, and repeat this."
            )

    def entries(self) -> Iterator[Entry]:
        """The journal's entry of each input, in the output's order; rebuilt from the output if the journal is damaged.

        Raises:
            OutputError: the output is damaged, or the indices of its inputs among those of all shards are unknown.
        """
        if self.journal_whole and self.journal is not None:
            yield from filter(None, read_entries(self.journal, self.header.checksums))
        else:
            yield from self._rebuilt()

    def results(self) -> Iterator[tuple[Entry, Embedding]]:
        """Each input's entry and result, in the output's order.

        Raises:
            OutputError: the output does not hold what its journal says.
        """
        entries, of_values, of_logits = itertools.tee(self._entries_of_the_output(), 3)
        first = next(self.entries(), None)
        values = read_values(self.path, self.kind, (entry.shape for entry in of_values))
        logits: Iterator[Values | None] = (
            read_logits(self.path, self.kind, (entry.logits_shape or () for entry in of_logits))
            if first is not None and first.logits_shape is not None
            else (None for _ in of_logits)
        )
        for entry, array, columns in zip(entries, values, logits, strict=True):
            yield entry, entry.embedding(array, columns)

    def _entries_of_the_output(self) -> Iterator[Entry]:
        """The entries, if the output's results belong to the same paths in the same order; those rebuilt from it do.

        Raises:
            OutputError: they do not, as where rows of a table were sorted.
        """
        if not self.journal_whole:
            yield from self._rebuilt()
            return
        records = read_records(self.path, self.kind)
        for entry in self.entries():
            record = next(records, None)
            if record is None or (record.path, _start(record)) != (entry.path, _start(entry)):
                there = "no further result" if record is None else f"the result of {record.path}"
                raise OutputError(
                    f"{self.path} holds {there} where its journal says {entry.path}: it was changed since it was "
                    "written. Bring it back, or write it again with w2v-embed --overwrite."
                )
            yield entry

    def _rebuilt(self) -> Iterator[Entry]:
        """Entries from the output's records, with the stamps of the lines of the journal that are undamaged."""
        lines = iter(()) if self.journal is None else read_entries(self.journal, self.header.checksums)
        told = filter(None, lines)
        waiting = next(told, None)
        indices = self._indices()
        for record in read_records(self.path, self.kind):
            if (index := next(indices, None)) is None:
                raise OutputError(f"{self.path} holds more results than its run had inputs; make it again.")
            stamp, earlier = UNKNOWN, None
            if waiting is not None and (waiting.path, _start(waiting)) == (record.path, _start(record)):
                stamp, earlier, waiting = waiting.stamp, waiting, next(told, None)
            yield Entry(
                record.path,
                stamp,
                index,
                None,
                record.shape,
                record.logits_shape,
                record.duration,
                record.logits,
                record.warnings,
                record.segment if earlier is None else earlier.segment,
            )

    def _indices(self) -> Iterator[int]:
        """The indices of the output's inputs among the inputs of all shards."""
        header = self.header
        if header.inputs is None or header.failed is None:
            raise OutputError(
                f"the journal of {self.path} is damaged, and the release that made it kept the places of its inputs "
                "nowhere else; make it again with w2v-embed --overwrite."
            )
        shard, failed = Shard.of(header.shard), frozenset(header.failed)
        if header.by_rows and shard.count > 1:
            raise OutputError(
                f"the journal of {self.path} is damaged, and the rows of this shard's segments stand nowhere else; "
                f"make it again with w2v-embed --shard {header.shard} --overwrite."
            )
        yield from (i for i in range(header.inputs.count) if shard.holds(i) and i not in failed)


def _start(told: Entry | Record) -> float | None:
    return None if told.segment is None else told.segment.start


def _tells_of(metadata: dict[str, Any], header: Header) -> bool:
    """Whether an output's metadata describe the run of ``header``, as far as that release's journals and outputs do."""
    told = metadata.get(RUN)
    if told is None:
        return True
    known = {name: value for name, value in run_record(header).items() if value is not None}
    return isinstance(told, dict) and all(told.get(name) == value for name, value in known.items())


def _state(path: Path) -> State:
    """The state of an output, of what a folder or a text says of itself, and of the journals beside it."""
    inside = (path / INDEX, path / METADATA) if path.is_dir() else ()
    journals = (hidden(path, JOURNAL_SUFFIX), earlier_journal(path))
    state = list[tuple[int, int, int] | None]()
    for file in (path, *inside, beside(path, METADATA_SUFFIX), *journals):
        try:
            status = file.stat()
            state.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            state.append(None)
    return tuple(state)


def _is_whole(header: Header, journal: Path) -> bool:
    """Whether no line of a journal is damaged, and none is missing."""
    count = 0
    for entry in read_entries(journal, header.checksums):
        if entry is None:
            return False
        count += 1
    return expected_results(header) in (None, count)


def expected_results(header: Header) -> int | None:
    """How many results a complete part has; None if its journal is of the previous release, which did not store it."""
    if header.inputs is None or header.failed is None:
        return None
    if header.listed is not None:
        return header.listed - len(header.failed)
    shard = Shard.of(header.shard)
    return len(range(shard.index - 1, header.inputs.count, shard.count)) - len(header.failed)


def _header_in(metadata: dict[str, Any], path: Path) -> Header:
    run = metadata.get(RUN)
    if not isinstance(run, dict):
        raise OutputError(
            f"{path} has no journal beside it ({hidden(path, JOURNAL_SUFFIX).name}) and does not tell of the run that "
            "made it; name outputs of w2v-embed."
        )
    inputs = run.get("inputs_sha256") and {"count": run.get("inputs"), "sha256": run["inputs_sha256"]}
    told = {"fingerprint": run.get("computes"), "shard": run.get("shard"), "finished": True, "format": JOURNAL_FORMAT}
    told |= {"listed": run["listed"]} if "listed" in run else {}
    return Header.of_dict(told | {"inputs": inputs, "failed": run.get("failed")}, path)
