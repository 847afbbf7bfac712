"""What a run has finished so far, on disk: results in the order they came, and a journal that says where each is.

``OUT.values`` holds the numbers. ``OUT.journal.jsonl`` holds a header that describes the run and a line for each
finished input. Values reach the disk before the lines that point to them, so after a crash every line but a torn last
one is true. When the output is complete the journal is rewritten in its order and stays beside it, for a later
``--resume`` or ``w2v-merge``; the values are then the output's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from w2v_models.errors import OutputError
from w2v_runtime.inputs import Shard
from w2v_runtime.journal import (
    ENTRY_FIELDS,
    JOURNAL_SUFFIX,
    VALUES_SUFFIX,
    Entry,
    Header,
    Stamp,
    Values,
    beside,
    exists,
    parse_line,
    rewritten,
    size_of,
    write_journal,
)
from w2v_runtime.results import Embedding

_ABSENT: Final = -1
#: Results beyond this size (hours of frames) are mapped, not read.
_MAPPED_BYTES: Final = 64 * 2**20


class Spool:
    """The growing record of one run. One thread writes."""

    def __init__(self, output: Path, header: Header, resume: bool = False) -> None:
        """Take up the record beside ``output`` with ``resume``, if there is one; else start an empty one.

        A torn last line is dropped. Where the output is complete, its values are missed until :meth:`restore`.
        """
        self.journal_path, self.values_path = beside(output, JOURNAL_SUFFIX), beside(output, VALUES_SUFFIX)
        self._shard = Shard.of(header.shard)
        self._lines: list[tuple[int, Entry]] = []
        self._at = array("q")  # where each input's line stands in the journal, by position among the inputs
        self._known: dict[int, int] = {}  # path's key → row of the four arrays below, for resuming
        self._earlier = array("q"), array("q"), array("q"), array("q")  # line's place, rows, size, time
        self.count = self.rows = 0
        before = Header.read(self.journal_path) if resume else None
        self.complete = before is not None and before.finished and exists(output)
        if self.complete or (before is not None and not before.finished and self.values_path.exists()):
            self._values = self.values_path.open("w+b" if self.complete else "r+b")
            self._journal = self.journal_path.open("r+b")
            self._load()
        else:
            self._values = self.values_path.open("w+b")
            self._journal = self.journal_path.open("w+b")
            self._journal.write(header.to_line())
            self.flush()

    def _load(self) -> None:
        available, values_end = self.values_path.stat().st_size, 0
        known, (places, rows, sizes, times) = self._known, self._earlier
        self._journal.seek(0)
        end = len(self._journal.readline())
        for line in self._journal:
            data = parse_line(line)  # no Entry: of a hundred thousand lines, few are looked at again
            if data is None or not data.keys() >= ENTRY_FIELDS:
                break
            if not self.complete:
                stop = (data["offset"] or 0) + size_of(data["shape"], data["logits_shape"])
                if data["offset"] is None or stop > available:
                    break
                values_end = max(values_end, stop)
            known[_key(data["path"])] = len(places)
            places.append(end)
            rows.append(data["shape"][0])
            sizes.append(data["stamp"]["size"])
            times.append(data["stamp"]["mtime_ns"])
            end += len(line)
        for file, size in ((self._journal, end), (self._values, values_end)):
            file.truncate(size)
            file.seek(size)

    @property
    def unchanged(self) -> bool:
        """Whether the complete output holds just the inputs recalled so far, in their order."""
        return self.complete and self._at == self._earlier[0]

    def restore(self, header: Header, results: Iterable[tuple[Entry, Embedding]]) -> None:
        """Take the results of a complete output back, so that it can be continued: one for each journal line."""
        moved: dict[int, int] = {}
        temporary = rewritten(self.journal_path)
        with temporary.open("wb") as journal:
            journal.write(header.to_line())
            for old, (entry, embedding) in zip(self._earlier[0], results, strict=True):
                moved[old] = journal.tell()
                journal.write(dataclasses.replace(entry, offset=self._values.tell()).to_line())
                self._write(embedding)
            self._values.flush()
            os.fsync(self._values.fileno())
            journal.flush()
            os.fsync(journal.fileno())
        temporary.replace(self.journal_path)
        self._journal.close()
        self._journal = self.journal_path.open("r+b")
        self._journal.seek(0, os.SEEK_END)
        for rows in (self._at, self._earlier[0]):
            for i, at in enumerate(rows):
                rows[i] = moved.get(at, at)
        self.complete = False

    def recall(self, position: int, path: str, content: bool = False) -> bool:
        """Whether an earlier run finished this input and it has not changed; if so it takes its place in the output."""
        row = self._known.get(_key(path), _ABSENT)
        if row == _ABSENT:
            return False
        now = Stamp.of(path, content)
        places, rows, sizes, times = self._earlier
        before = self._entry(places[row]).stamp if content else Stamp(sizes[row], times[row])
        if now is None or not before.same(now):
            return False
        self._place(position, places[row], rows[row])
        return True

    def add(self, position: int, stamp: Stamp, embedding: Embedding) -> None:
        """Record a finished input at its position in the output; :meth:`flush` makes it last."""
        entry = Entry.of(embedding, stamp, self._index(position), self._values.tell())
        self._write(embedding)
        self._lines.append((position, entry))

    def _write(self, embedding: Embedding) -> None:
        self._values.write(_flat(embedding.values).data)
        if embedding.logits is not None and embedding.logits.ndim > 1:
            self._values.write(_flat(embedding.logits).data)

    def flush(self) -> None:
        """Bring everything added to the disk, the values before the lines that point to them."""
        self._values.flush()
        os.fsync(self._values.fileno())
        for position, entry in self._lines:
            self._place(position, self._journal.tell(), entry.rows)
            self._journal.write(entry.to_line())
        self._lines.clear()
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _place(self, position: int, at: int, rows: int) -> None:
        if position >= len(self._at):
            self._at.extend([_ABSENT] * (position + 1 - len(self._at)))
        self._at[position] = at
        self.count += 1
        self.rows += rows

    def _entry(self, at: int) -> Entry:
        here = self._journal.tell()
        self._journal.seek(at)
        entry = Entry.parse(self._journal.readline())
        self._journal.seek(here)
        if entry is None:
            raise OutputError(f"{self.journal_path} was changed while it was in use; start again with --overwrite.")
        return entry

    def _index(self, position: int) -> int:
        """The place among all shards' inputs of this shard's input at ``position``: shards take turns."""
        return position * self._shard.count + self._shard.index - 1

    def entries(self) -> Iterator[Entry]:
        """Finished inputs in the order of the inputs, numbered as they are now: earlier runs may have had others."""
        for position, at in enumerate(self._at):
            if at != _ABSENT:
                yield dataclasses.replace(self._entry(at), index=self._index(position))

    def embeddings(self) -> Iterator[Embedding]:
        """Results in the order of the inputs."""
        for entry in self.entries():
            numbers = self._numbers(entry)
            end = math.prod(entry.shape)
            logits = None if entry.logits_shape is None else numbers[end:].reshape(entry.logits_shape)
            yield entry.embedding(numbers[:end].reshape(entry.shape), logits)

    def _numbers(self, entry: Entry) -> Values:
        """What stands in ``OUT.values`` for an entry, flat: its values, then its logits."""
        offset = entry.offset or 0
        if entry.size > _MAPPED_BYTES:
            return np.memmap(self.values_path, np.float32, "r", offset, (entry.size // 4,))
        return np.frombuffer(os.pread(self._values.fileno(), entry.size, offset), np.float32)

    def finish(self, header: Header) -> None:
        """Leave only the journal, rewritten in the output's order: the values are in the output now."""
        if not self.unchanged:
            write_journal(self.journal_path, header, self.entries())
        self.close()
        self.values_path.unlink()

    def close(self) -> None:
        """Close the files and leave them for a later ``--resume``."""
        try:
            self._values.close()
        finally:
            self._journal.close()


def _key(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=7).digest(), "little")


def _flat(array_: Values) -> Values:
    return np.ascontiguousarray(array_, np.float32).reshape(-1)
