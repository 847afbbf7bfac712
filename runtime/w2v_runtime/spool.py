"""What a run has finished so far, on disk: results in the order they came, and a journal that says where each is.

``OUT.values`` holds the numbers. ``OUT.journal.jsonl`` holds a header that describes the run and a line for each
finished input. Values reach the disk before the lines that point to them, so after a crash every line but a torn last
one is true. When the output is complete the journal is rewritten in its order and stays beside it, for a later
``--resume`` or ``w2v-merge``; the values are then the output's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from w2v_models.errors import OutputError
from w2v_runtime.inputs import Shard
from w2v_runtime.results import Embedding

JOURNAL_SUFFIX: Final = ".journal.jsonl"
VALUES_SUFFIX: Final = ".values"
_NEW_SUFFIX: Final = ".new"
_ABSENT: Final = -1
#: Results beyond this size (hours of frames) are mapped, not read.
_MAPPED_BYTES: Final = 64 * 2**20

Values = npt.NDArray[np.float32]


def beside(output: Path, suffix: str) -> Path:
    """A file of the run's own next to its output: ``out.npz`` → ``out.npz.journal.jsonl``."""
    return output.with_name(output.name + suffix)


def exists(output: Path) -> bool:
    """Whether there is an output. An empty folder is none."""
    return any(output.iterdir()) if output.is_dir() else output.exists()


@dataclass(frozen=True)
class Stamp:
    """How a file is known again: size in bytes, modification time in ns, and with ``--hash`` its content's SHA-256."""

    size: int
    mtime_ns: int
    sha256: str | None = None

    @classmethod
    def of(cls, path: str, content: bool = False) -> Stamp | None:
        """The stamp of a file as it is now, None where it cannot be read."""
        try:
            status = os.stat(path)
            if not content:
                return cls(status.st_size, status.st_mtime_ns)
            with open(path, "rb") as file:
                return cls(status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest())
        except OSError:
            return None

    def same(self, other: Stamp) -> bool:
        """Equal content where both know it, else equal size and time."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return (self.size, self.mtime_ns) == (other.size, other.mtime_ns)


@dataclass(frozen=True)
class Entry:
    """A journal line: an input's path and stamp, its index among all inputs, and what is known of its result.

    ``offset`` is where its values stand in ``OUT.values``, in bytes; None once they are in the output.
    """

    path: str
    stamp: Stamp
    index: int
    offset: int | None
    shape: tuple[int, ...]
    duration: float
    logits: tuple[float, ...] | None
    warnings: tuple[str, ...]

    @property
    def size(self) -> int:
        """Size of the values."""
        return 4 * math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Frames of a frame-level result; meaningless for an utterance."""
        return self.shape[0]

    def embedding(self, values: Values) -> Embedding:
        """The result that this line and its values make up."""
        logits = None if self.logits is None else np.array(self.logits, np.float32)
        return Embedding(self.path, values.reshape(self.shape), self.duration, logits, self.warnings)

    def to_line(self) -> bytes:
        # Not dataclasses.asdict, which copies every value in depth: journals have a line for each of many inputs.
        return _line(vars(self) | {"stamp": vars(self.stamp)})

    @classmethod
    def parse(cls, line: bytes) -> Entry | None:
        """Read a line; None if it is torn."""
        data = _parse(line)
        if data is None:
            return None
        try:
            logits = data.pop("logits")
            return cls(
                stamp=Stamp(**data.pop("stamp")),
                shape=tuple(data.pop("shape")),
                warnings=tuple(data.pop("warnings")),
                logits=None if logits is None else tuple(logits),
                **data,
            )
        except (KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Header:
    """A journal's first line: what the run computes, its part of the inputs, and whether its output is complete."""

    fingerprint: dict[str, Any]
    shard: str
    finished: bool

    @classmethod
    def read(cls, journal: Path) -> Header | None:
        """The header of a journal, None where there is no journal or its first line is torn."""
        try:
            with journal.open("rb") as file:
                data = _parse(file.readline())
        except FileNotFoundError:
            return None
        return None if data is None or set(data) != {field.name for field in dataclasses.fields(cls)} else cls(**data)


def read_entries(journal: Path) -> Iterator[Entry]:
    """The entries of a journal, in order, up to a torn line."""
    with journal.open("rb") as file:
        file.readline()
        for line in file:
            entry = Entry.parse(line)
            if entry is None:
                return
            yield entry


_ENTRY_FIELDS: Final = {field.name for field in dataclasses.fields(Entry)}


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
            self._journal.write(_line(dataclasses.asdict(header)))
            self.flush()

    def _load(self) -> None:
        available, values_end = self.values_path.stat().st_size, 0
        known, (places, rows, sizes, times) = self._known, self._earlier
        self._journal.seek(0)
        end = len(self._journal.readline())
        for line in self._journal:
            data = _parse(line)  # no Entry: of a hundred thousand lines, few are looked at again
            if data is None or not data.keys() >= _ENTRY_FIELDS:
                break
            if not self.complete:
                stop = (data["offset"] or 0) + 4 * math.prod(data["shape"])
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

    def restore(self, header: Header, values: Iterable[Values]) -> None:
        """Take the values of a complete output back, so that it can be continued: one array for each journal line."""
        entries = list(read_entries(self.journal_path))
        moved: dict[int, int] = {}
        temporary = beside(self.journal_path, _NEW_SUFFIX)
        with temporary.open("wb") as journal:
            journal.write(_line(dataclasses.asdict(header)))
            for old, entry, array_ in zip(self._earlier[0], entries, values, strict=True):
                moved[old] = journal.tell()
                journal.write(dataclasses.replace(entry, offset=self._values.tell()).to_line())
                self._values.write(np.ascontiguousarray(array_, np.float32).tobytes())
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
        values = np.ascontiguousarray(embedding.values, np.float32)
        entry = Entry(
            embedding.path,
            stamp,
            self._index(position),
            self._values.tell(),
            values.shape,
            embedding.duration,
            None if embedding.logits is None else tuple(float(value) for value in embedding.logits),
            embedding.warnings,
        )
        self._values.write(values.reshape(-1).data)
        self._lines.append((position, entry))

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
        descriptor = self._values.fileno()
        for entry in self.entries():
            offset = entry.offset or 0
            if entry.size > _MAPPED_BYTES:
                values: Values = np.memmap(self.values_path, np.float32, "r", offset, (entry.size // 4,))
            else:
                values = np.frombuffer(os.pread(descriptor, entry.size, offset), np.float32)
            yield entry.embedding(values)

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


def write_journal(path: Path, header: Header, entries: Iterable[Entry]) -> None:
    """Write the journal of a complete output in one go; its i-th entry is the output's i-th result."""
    temporary = beside(path, _NEW_SUFFIX)
    with temporary.open("wb") as file:
        file.write(_line(dataclasses.asdict(dataclasses.replace(header, finished=True))))
        file.writelines(dataclasses.replace(entry, offset=None).to_line() for entry in entries)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _key(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=7).digest(), "little")


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None
