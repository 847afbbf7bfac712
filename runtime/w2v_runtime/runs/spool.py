"""The spool of a run: its finished results on disk, in the order they came, and the journal that points to them.

The values file ``.OUT.w2v-values`` holds the numbers. ``.OUT.w2v-journal`` holds a header that describes the run and a
line for each finished input. Values reach the disk before the lines that point to them, so after a crash every line
except a torn last one is true. When the output is complete the journal is rewritten in its order and stays beside it,
for a later ``--resume``; the values file is removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, cast

import numpy as np

from w2v_models.errors import OutputError
from w2v_runtime.embedding.inputs import Input, label_of
from w2v_runtime.embedding.results import Embedding
from w2v_runtime.files.durable import flush, replace, sync_folder
from w2v_runtime.files.outputs import JOURNAL_SUFFIX, VALUES_SUFFIX, hidden
from w2v_runtime.runs.inputs import Shard
from w2v_runtime.runs.journal import JOURNAL_FORMAT, Entry, Header, Stamp, Values, key_of, rewritten, write_journal
from w2v_runtime.tables.rows import Value

_ABSENT: Final = -1
#: Results beyond this size (hours of frames) are mapped, not read.
_MAPPED_BYTES: Final = 64 * 2**20


class Spool:
    """The finished results of one run: its values file and its journal. Only one thread may write."""

    def __init__(self, output: Path, header: Header, resume: bool = False) -> None:
        """Start an empty spool beside ``output`` in place of any other, or with ``resume`` open the one there, if any.

        A torn last line is dropped. A damaged line is counted in :attr:`damaged`, and its input is not finished. Where
        the output is complete, there are no values until :meth:`restore`.

        Raises:
            OutputError: the journal to resume is damaged, of another release, or cannot be read.
        """
        self.journal_path, self.values_path = hidden(output, JOURNAL_SUFFIX), hidden(output, VALUES_SUFFIX)
        self._shard, self._by_rows = Shard.of(header.shard), header.by_rows
        self._lines: list[tuple[int, Entry]] = []
        self._line_offsets = array("q")  # offset of each input's line in the journal, by position among the inputs
        self._earlier_rows: dict[int, int] = {}  # key of a path → its first row of the four arrays below, for resuming
        self._earlier = array("q"), array("q"), array("q"), array("q")  # line offset, frames, file size, file time
        self._following = array("q")  # the next row of the same path: of an input listed twice, or embedded again
        self._next: dict[int, int] = {}  # key of a path → the row to look at next, if that is not its first
        self._fields: dict[int, tuple[Value, ...]] = {}  # by position: of recalled segments whose row says else now
        self._listed = bytearray()  # by first row: whether this run lists an input with its path, and the file is there
        self.count = self.rows = self.damaged = 0
        self._before = before = Header.read(self.journal_path) if resume else None
        self.complete = before is not None and before.finished
        if before is not None:
            self._journal = _opened(self.journal_path)
            try:
                self._values = _created(self.values_path) if self.complete else _opened(self.values_path)
            except BaseException:
                self._journal.close()
                raise
            try:
                self._load(before.checksums)
            except BaseException:
                self.close()
                raise
        else:
            # The journal comes first, so that a values file without a journal never belongs to a run.
            self.values_path.unlink(missing_ok=True)
            temporary = rewritten(self.journal_path)
            self._journal = _created(temporary)
            self._journal.write(dataclasses.replace(header, format=JOURNAL_FORMAT).to_line())
            flush(self._journal)
            replace(temporary, self.journal_path)
            self._values = _created(self.values_path)
            sync_folder(self.journal_path.parent)

    def _load(self, checksums: bool) -> None:
        available, values_end = self.values_path.stat().st_size, 0
        offsets, rows, sizes, times = self._earlier
        last: dict[int, int] = {}
        self._journal.seek(0)
        end = len(self._journal.readline())
        for line in self._journal:
            if not line.endswith(b"\n"):
                break
            entry, offset = Entry.parse(line, checksums), end
            end += len(line)
            if entry is not None and not self.complete:
                stop = _ABSENT if entry.offset is None else entry.offset + entry.size
                entry = entry if 0 <= stop <= available else None
                values_end = max(values_end, stop if entry else 0)
            if entry is None:
                self.damaged += 1
                continue
            row, key = len(offsets), _key(entry.key)
            self._earlier_rows.setdefault(key, row)
            if key in last:
                self._following[last[key]] = row
            last[key] = row
            self._following.append(_ABSENT)
            offsets.append(offset)
            rows.append(entry.rows)
            sizes.append(entry.stamp.size)
            times.append(entry.stamp.mtime_ns)
        self._listed = bytearray(len(offsets))
        for file, size in ((self._journal, end), (self._values, values_end)):
            if file.seek(0, os.SEEK_END) != size:
                file.truncate(size)
                file.seek(size)

    @property
    def unchanged(self) -> bool:
        """Whether the output is complete and holds exactly the inputs recalled so far, in their order."""
        return (
            self.complete
            and not self._fields
            and array("q", (at for at in self._line_offsets if at != _ABSENT)) == self._earlier[0]
        )

    def is_of(self, header: Header) -> bool:
        """Whether the output is :attr:`unchanged` and its run had the inputs and the failures of ``header``."""
        before = self._before
        told = before is not None and (before.inputs, before.failed) == (header.inputs, header.failed)
        return told and self.unchanged

    @property
    def earlier(self) -> int:
        """Inputs that earlier runs finished."""
        return len(self._earlier_rows)

    def gone(self) -> Iterator[str]:
        """Names of inputs that earlier runs finished and that this run does not list, or whose files are missing."""
        for row in self._earlier_rows.values():
            if not self._listed[row]:
                entry = self._entry(self._earlier[0][row])
                yield entry.path if entry.segment is None else label_of(entry.path, entry.segment)

    def restore(self, header: Header, results: Iterable[Embedding]) -> None:
        """Copy the results of a complete output back, one for each journal line, so that it can be continued."""
        moved: dict[int, int] = {}
        temporary = rewritten(self.journal_path)
        with _created(temporary) as journal:
            journal.write(header.to_line())
            for old, embedding in zip(self._earlier[0], results, strict=True):
                entry = self._entry(old)
                moved[old] = journal.tell()
                journal.write(dataclasses.replace(entry, offset=self._values.tell()).to_line())
                self._write(embedding)
            flush(self._values)
            flush(journal)
        replace(temporary, self.journal_path)
        self._journal.close()
        self._journal = _opened(self.journal_path)
        self._journal.seek(0, os.SEEK_END)
        for offsets in (self._line_offsets, self._earlier[0]):
            for i, offset in enumerate(offsets):
                offsets[i] = moved.get(offset, offset)
        self.complete = False

    def recall(self, item: Input, now: Stamp | None) -> bool:
        """Whether an earlier run finished this input and its file is unchanged; if so, use that result at its position.

        ``now`` is the file's stamp, with the SHA-256 if contents are compared; None if the file is missing. What a
        table says of a segment beside its times is what it says now.
        """
        first = self._earlier_rows.get(key := _key(key_of(item.path, item.segment)), _ABSENT)
        if first == _ABSENT or now is None:
            return False
        self._listed[first] = True
        offsets, rows, sizes, times = self._earlier
        row = self._next.get(key, first)
        while row != _ABSENT:
            before = self._entry(offsets[row]).stamp if now.sha256 else Stamp(sizes[row], times[row])
            following = self._following[row]
            if before.same(now):
                self._set_line(item.position, offsets[row], rows[row])
                self._update(item)
                if following != _ABSENT:
                    self._next[key] = following
                return True
            row = following
        return False

    def _update(self, item: Input) -> None:
        """Remember the fields that a recalled segment has now, if they are others."""
        if item.segment is None or not item.segment.fields:
            return
        entry = self._entry(self._line_offsets[item.position])
        if entry.segment is not None and entry.segment.fields != item.segment.fields:
            self._fields[item.position] = item.segment.fields

    def add(self, position: int, stamp: Stamp, embedding: Embedding) -> None:
        """Add a finished input at its position in the output; :meth:`flush` makes it durable."""
        entry = Entry.of(embedding, stamp, self.index(position), self._values.tell())
        self._write(embedding)
        self._lines.append((position, entry))

    def _write(self, embedding: Embedding) -> None:
        self._values.write(_flat(embedding.values).data)
        if embedding.logits is not None and embedding.logits.ndim > 1:
            self._values.write(_flat(embedding.logits).data)

    def flush(self) -> None:
        """Flush everything added to disk, the values before the journal's lines that point to them."""
        if not self._lines:
            return
        flush(self._values)
        for position, entry in self._lines:
            self._set_line(position, self._journal.tell(), entry.rows)
            self._journal.write(entry.to_line())
        self._lines.clear()
        flush(self._journal)

    def _set_line(self, position: int, offset: int, rows: int) -> None:
        if position >= len(self._line_offsets):
            self._line_offsets.extend([_ABSENT] * (position + 1 - len(self._line_offsets)))
        self._line_offsets[position] = offset
        self.count += 1
        self.rows += rows

    def _entry(self, offset: int) -> Entry:
        here = self._journal.tell()
        self._journal.seek(offset)
        entry = Entry.parse(self._journal.readline(), checksums=False)
        self._journal.seek(here)
        if entry is None:
            raise OutputError(f"{self.journal_path} was changed while it was in use; start again with --overwrite.")
        return entry

    def index(self, position: int) -> int:
        """The index among all shards' inputs of this shard's input at ``position``: shards of files take turns."""
        return position if self._by_rows else position * self._shard.count + self._shard.index - 1

    def entries(self) -> Iterator[Entry]:
        """Entries in the order of the inputs, with the indices of this run: earlier runs may have had other inputs."""
        for position, offset in enumerate(self._line_offsets):
            if offset != _ABSENT:
                entry = dataclasses.replace(self._entry(offset), index=self.index(position))
                if entry.segment is not None and (fields := self._fields.get(position)) is not None:
                    entry = dataclasses.replace(entry, segment=dataclasses.replace(entry.segment, fields=fields))
                yield entry

    def embeddings(self) -> Iterator[Embedding]:
        """Results in the order of the inputs."""
        for entry in self.entries():
            numbers = self._numbers(entry)
            end = math.prod(entry.shape)
            logits = None if entry.logits_shape is None else numbers[end:].reshape(entry.logits_shape)
            yield entry.embedding(numbers[:end].reshape(entry.shape), logits)

    def _numbers(self, entry: Entry) -> Values:
        """An entry's numbers in the values file, flat: its values, then its frame-level logits."""
        offset = entry.offset or 0
        if entry.size > _MAPPED_BYTES:
            return np.memmap(self.values_path, np.float32, "r", offset, (entry.size // 4,))
        return np.frombuffer(os.pread(self._values.fileno(), entry.size, offset), np.float32)

    def finish(self, header: Header) -> None:
        """Leave only the journal, rewritten in the output's order: the values are in the output now."""
        finished = dataclasses.replace(header, finished=True)
        if finished != self._before or not self.unchanged:
            write_journal(self.journal_path, finished, self.entries())
        self.close()
        self.values_path.unlink()

    def close(self) -> None:
        """Close the files and leave them for a later ``--resume``."""
        try:
            self._values.close()
        finally:
            self._journal.close()


def _created(path: Path) -> BinaryIO:
    """Create one of the run's own files, in place of any other: a hard link to that one, as in a backup, keeps it."""
    path.unlink(missing_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return cast(BinaryIO, open(os.open(path, flags, 0o666), "r+b"))


def _opened(path: Path) -> BinaryIO:
    """Open one of the run's own files to add to it, never through a link; a file with several names is copied first."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        copy = rewritten(path)
        with _created(copy) as file, path.open("rb") as shared:
            shutil.copyfileobj(shared, file)
            flush(file)
        replace(copy, path)
        return _opened(path)
    return cast(BinaryIO, open(descriptor, "r+b"))


def _key(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=7).digest(), "little")


def _flat(array_: Values) -> Values:
    return np.ascontiguousarray(array_, np.float32).reshape(-1)
