"""What a run has finished so far, on disk: results in the order they came, and a journal that says where each is.

``.OUT.w2v-values`` holds the numbers. ``.OUT.w2v-journal`` holds a header that describes the run and a line for each
finished input. Values reach the disk before the lines that point to them, so after a crash every line but a torn last
one is true. When the output is complete the journal is rewritten in its order and stays beside it, for a later
``--resume``; the values are then the output's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, cast

import numpy as np

from w2v_models.errors import OutputError
from w2v_runtime.embedding.results import Embedding
from w2v_runtime.files.durable import replace, sync_folder
from w2v_runtime.files.outputs import JOURNAL_SUFFIX, VALUES_SUFFIX, hidden
from w2v_runtime.runs.inputs import Shard
from w2v_runtime.runs.journal import JOURNAL_FORMAT, Entry, Header, Stamp, Values, rewritten, write_journal

_ABSENT: Final = -1
#: Results beyond this size (hours of frames) are mapped, not read.
_MAPPED_BYTES: Final = 64 * 2**20


class Spool:
    """The growing record of one run. One thread writes."""

    def __init__(self, output: Path, header: Header, resume: bool = False) -> None:
        """Start an empty record beside ``output`` in place of any other, or with ``resume`` take up the one there.

        A torn last line is dropped, and a damaged line costs its own input, which :attr:`damaged` counts. Where the
        output is complete, its values are missed until :meth:`restore`.

        Raises:
            OutputError: there is no journal that could be taken up.
        """
        self.journal_path, self.values_path = hidden(output, JOURNAL_SUFFIX), hidden(output, VALUES_SUFFIX)
        self._shard = Shard.of(header.shard)
        self._lines: list[tuple[int, Entry]] = []
        self._at = array("q")  # where each input's line stands in the journal, by position among the inputs
        self._known: dict[int, int] = {}  # path's key → its first row in the four arrays below, for resuming
        self._earlier = array("q"), array("q"), array("q"), array("q")  # line's place, rows, size, time
        self._following = array("q")  # the next row of the same path: of an input listed twice, or embedded anew
        self._next: dict[int, int] = {}  # path's key → the row to look at next, where that is not its first
        self._listed = bytearray()  # by first row, whether an input of this run has its path, and is there
        self.count = self.rows = self.damaged = 0
        self._before = before = Header.read(self.journal_path) if resume else None
        self.complete = before is not None and before.finished
        if before is not None:
            self._values = _open(self.values_path, keep=not self.complete)
            self._journal = _open(self.journal_path, keep=True)
            try:
                self._load(before.checksums)
            except BaseException:
                self.close()
                raise
        else:
            # The journal comes first, so that values without one are never a run's.
            self._journal = _open(self.journal_path, keep=False)
            self._journal.write(dataclasses.replace(header, format=JOURNAL_FORMAT).to_line())
            self._journal.flush()
            os.fsync(self._journal.fileno())
            self._values = _open(self.values_path, keep=False)
            sync_folder(self.journal_path.parent)

    def _load(self, checksums: bool) -> None:
        available, values_end = self.values_path.stat().st_size, 0
        places, rows, sizes, times = self._earlier
        last: dict[int, int] = {}
        self._journal.seek(0)
        end = len(self._journal.readline())
        for line in self._journal:
            if not line.endswith(b"\n"):
                break
            entry, place = Entry.parse(line, checksums), end
            end += len(line)
            if entry is not None and not self.complete:
                stop = _ABSENT if entry.offset is None else entry.offset + entry.size
                entry = entry if 0 <= stop <= available else None
                values_end = max(values_end, stop if entry else 0)
            if entry is None:
                self.damaged += 1
                continue
            row, key = len(places), _key(entry.path)
            self._known.setdefault(key, row)
            if key in last:
                self._following[last[key]] = row
            last[key] = row
            self._following.append(_ABSENT)
            places.append(place)
            rows.append(entry.rows)
            sizes.append(entry.stamp.size)
            times.append(entry.stamp.mtime_ns)
        self._listed = bytearray(len(places))
        for file, size in ((self._journal, end), (self._values, values_end)):
            if file.seek(0, os.SEEK_END) != size:
                file.truncate(size)
                file.seek(size)

    @property
    def unchanged(self) -> bool:
        """Whether the complete output holds just the inputs recalled so far, in their order."""
        return self.complete and array("q", (at for at in self._at if at != _ABSENT)) == self._earlier[0]

    def is_of(self, header: Header) -> bool:
        """Whether the complete output, besides, tells of a run over the same inputs with the same failures."""
        before = self._before
        return (
            self.unchanged and before is not None and (before.inputs, before.failed) == (header.inputs, header.failed)
        )

    @property
    def earlier(self) -> int:
        """Inputs that earlier runs finished."""
        return len(self._known)

    def gone(self) -> Iterator[str]:
        """Paths of inputs that earlier runs finished, and that :meth:`recall` was not asked for or did not find."""
        for row in self._known.values():
            if not self._listed[row]:
                yield self._entry(self._earlier[0][row]).path

    def restore(self, header: Header, results: Iterable[Embedding]) -> None:
        """Take the results of a complete output back, so that it can be continued: one for each journal line."""
        moved: dict[int, int] = {}
        temporary = rewritten(self.journal_path)
        with _open(temporary, keep=False) as journal:
            journal.write(header.to_line())
            for old, embedding in zip(self._earlier[0], results, strict=True):
                entry = self._entry(old)
                moved[old] = journal.tell()
                journal.write(dataclasses.replace(entry, offset=self._values.tell()).to_line())
                self._write(embedding)
            self._values.flush()
            os.fsync(self._values.fileno())
            journal.flush()
            os.fsync(journal.fileno())
        replace(temporary, self.journal_path)
        self._journal.close()
        self._journal = _open(self.journal_path, keep=True)
        self._journal.seek(0, os.SEEK_END)
        for rows in (self._at, self._earlier[0]):
            for i, at in enumerate(rows):
                rows[i] = moved.get(at, at)
        self.complete = False

    def recall(self, position: int, path: str, now: Stamp | None) -> bool:
        """Whether an earlier run finished this input and it has not changed; if so it takes its place in the output.

        ``now`` is its stamp, with its content's hash where contents are compared; None where it is not there.
        """
        first = self._known.get(key := _key(path), _ABSENT)
        if first == _ABSENT or now is None:
            return False
        self._listed[first] = True
        places, rows, sizes, times = self._earlier
        row = self._next.get(key, first)
        while row != _ABSENT:
            before = self._entry(places[row]).stamp if now.sha256 else Stamp(sizes[row], times[row])
            following = self._following[row]
            if before.same(now):
                self._place(position, places[row], rows[row])
                if following != _ABSENT:
                    self._next[key] = following
                return True
            row = following
        return False

    def add(self, position: int, stamp: Stamp, embedding: Embedding) -> None:
        """Record a finished input at its position in the output; :meth:`flush` makes it last."""
        entry = Entry.of(embedding, stamp, self.index(position), self._values.tell())
        self._write(embedding)
        self._lines.append((position, entry))

    def _write(self, embedding: Embedding) -> None:
        self._values.write(_flat(embedding.values).data)
        if embedding.logits is not None and embedding.logits.ndim > 1:
            self._values.write(_flat(embedding.logits).data)

    def flush(self) -> None:
        """Bring everything added to the disk, the values before the lines that point to them."""
        if not self._lines:
            return
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
        entry = Entry.parse(self._journal.readline(), checksums=False)
        self._journal.seek(here)
        if entry is None:
            raise OutputError(f"{self.journal_path} was changed while it was in use; start again with --overwrite.")
        return entry

    def index(self, position: int) -> int:
        """The place among all shards' inputs of this shard's input at ``position``: shards take turns."""
        return position * self._shard.count + self._shard.index - 1

    def entries(self) -> Iterator[Entry]:
        """Finished inputs in the order of the inputs, numbered as they are now: earlier runs may have had others."""
        for position, at in enumerate(self._at):
            if at != _ABSENT:
                yield dataclasses.replace(self._entry(at), index=self.index(position))

    def embeddings(self) -> Iterator[Embedding]:
        """Results in the order of the inputs."""
        for entry in self.entries():
            numbers = self._numbers(entry)
            end = math.prod(entry.shape)
            logits = None if entry.logits_shape is None else numbers[end:].reshape(entry.logits_shape)
            yield entry.embedding(numbers[:end].reshape(entry.shape), logits)

    def _numbers(self, entry: Entry) -> Values:
        """What stands in the values file for an entry, flat: its values, then its logits."""
        offset = entry.offset or 0
        if entry.size > _MAPPED_BYTES:
            return np.memmap(self.values_path, np.float32, "r", offset, (entry.size // 4,))
        return np.frombuffer(os.pread(self._values.fileno(), entry.size, offset), np.float32)

    def finish(self, header: Header) -> None:
        """Leave only the journal, rewritten in the output's order: the values are in the output now."""
        finished = dataclasses.replace(header, finished=True)
        if not self.unchanged or finished != self._before:
            write_journal(self.journal_path, finished, self.entries())
        self.close()
        self.values_path.unlink()

    def close(self) -> None:
        """Close the files and leave them for a later ``--resume``."""
        try:
            self._values.close()
        finally:
            self._journal.close()


def _open(path: Path, keep: bool) -> BinaryIO:
    """Open a file of the run's own to read and write it, never through a link; begun anew unless it is kept."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | (0 if keep else os.O_TRUNC)
    return cast(BinaryIO, open(os.open(path, flags, 0o666), "r+b"))


def _key(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=7).digest(), "little")


def _flat(array_: Values) -> Values:
    return np.ascontiguousarray(array_, np.float32).reshape(-1)
