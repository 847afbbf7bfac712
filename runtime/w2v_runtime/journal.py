"""The journal of a run: what ``OUT.journal.jsonl`` says of the run and of each finished input.

Its first line is a :class:`Header` that describes the run, every further line an :class:`Entry` for a finished input.
Beside a complete output it stays, for a later ``--resume`` or ``w2v-merge``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from w2v_models.errors import OutputError
from w2v_runtime.results import Embedding
from w2v_runtime.stores import OutputFormat, read_logits, read_values

JOURNAL_SUFFIX: Final = ".journal.jsonl"
VALUES_SUFFIX: Final = ".values"
FAILURES_SUFFIX: Final = ".failures.jsonl"
#: Raised whenever the lines of a journal change; no release reads another's.
JOURNAL_FORMAT: Final = 2
_NEW_SUFFIX: Final = ".new"

Values = npt.NDArray[np.float32]


def beside(output: Path, suffix: str) -> Path:
    """A file of the run's own next to its output: ``out.npz`` → ``out.npz.journal.jsonl``."""
    return output.with_name(output.name + suffix)


def rewritten(journal: Path) -> Path:
    """Where a new state of a journal is written before it takes the journal's name."""
    return beside(journal, _NEW_SUFFIX)


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

    ``offset`` is where its numbers stand in ``OUT.values``, in bytes; None once they are in the output. They are the
    values, and after them the logits of a head that answers frame by frame, of ``logits_shape`` (T, K). The logits
    (K,) of another head stand here, in ``logits``.
    """

    path: str
    stamp: Stamp
    index: int
    offset: int | None
    shape: tuple[int, ...]
    logits_shape: tuple[int, ...] | None
    duration: float
    logits: tuple[float, ...] | None
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, embedding: Embedding, stamp: Stamp, index: int, offset: int | None) -> Entry:
        """The line for a result."""
        logits = embedding.logits
        by_frame = logits is not None and logits.ndim > 1
        return cls(
            path=embedding.path,
            stamp=stamp,
            index=index,
            offset=offset,
            shape=embedding.values.shape,
            logits_shape=logits.shape if logits is not None and by_frame else None,
            duration=embedding.duration,
            logits=None if logits is None or by_frame else tuple(logits.tolist()),
            warnings=embedding.warnings,
        )

    @property
    def size(self) -> int:
        """Size in bytes of what stands in ``OUT.values``."""
        return size_of(self.shape, self.logits_shape)

    @property
    def rows(self) -> int:
        """Frames of a frame-level result; meaningless for an utterance."""
        return self.shape[0]

    def embedding(self, values: Values, logits: Values | None) -> Embedding:
        """The result that this line, its values and its logits (T, K), if it has such, make up."""
        if self.logits is not None:
            logits = np.array(self.logits, np.float32)
        return Embedding(self.path, values, self.duration, logits, self.warnings)

    def to_line(self) -> bytes:
        # Not dataclasses.asdict, which copies every value in depth: journals have a line for each of many inputs.
        return _line(vars(self) | {"stamp": vars(self.stamp)})

    @classmethod
    def parse(cls, line: bytes) -> Entry | None:
        """Read a line; None if it is torn."""
        data = parse_line(line)
        if data is None:
            return None
        try:
            logits, logits_shape = data.pop("logits"), data.pop("logits_shape")
            return cls(
                stamp=Stamp(**data.pop("stamp")),
                shape=tuple(data.pop("shape")),
                logits_shape=None if logits_shape is None else tuple(logits_shape),
                warnings=tuple(data.pop("warnings")),
                logits=None if logits is None else tuple(logits),
                **data,
            )
        except (KeyError, TypeError):
            return None


ENTRY_FIELDS: Final = {field.name for field in dataclasses.fields(Entry)}


@dataclass(frozen=True)
class Header:
    """A journal's first line: what the run computes, its part of the inputs, and whether its output is complete."""

    fingerprint: dict[str, Any]
    shard: str
    finished: bool
    format: int = JOURNAL_FORMAT

    @classmethod
    def read(cls, journal: Path) -> Header | None:
        """The header of a journal, None where there is no journal or its first line is torn.

        Raises:
            OutputError: it is a journal of another release, or none at all.
        """
        try:
            with journal.open("rb") as file:
                data = parse_line(file.readline())
        except FileNotFoundError:
            return None
        if data is None:
            return None
        if data.get("format") != JOURNAL_FORMAT or set(data) != {field.name for field in dataclasses.fields(cls)}:
            raise OutputError(
                f"{journal} was written by another release of w2v-onnx, whose journals this one does not read; "
                "make its output again with w2v-embed --overwrite, or go on with that release."
            )
        return cls(**data)

    def to_line(self) -> bytes:
        return _line(dataclasses.asdict(self))


def size_of(shape: Iterable[int], logits_shape: Iterable[int] | None) -> int:
    """Bytes of float32 values and of the logits that stand with them."""
    return 4 * (math.prod(shape) + (0 if logits_shape is None else math.prod(logits_shape)))


def read_entries(journal: Path) -> Iterator[Entry]:
    """The entries of a journal, in order, up to a torn line."""
    with journal.open("rb") as file:
        file.readline()
        for line in file:
            entry = Entry.parse(line)
            if entry is None:
                return
            yield entry


def read_back(output: Path, kind: OutputFormat) -> Generator[tuple[Entry, Embedding], None, None]:
    """Each journal line of a complete output with the result that it stands for, in the output's order.

    Raises:
        OutputError: the output does not hold what its journal says.
    """
    journal = beside(output, JOURNAL_SUFFIX)
    first = next(read_entries(journal), None)
    by_frame = first is not None and first.logits_shape is not None
    entries, of_values, of_logits = itertools.tee(read_entries(journal), 3)
    values = read_values(output, kind, (entry.shape for entry in of_values))
    logits: Iterator[Values | None] = (
        read_logits(output, kind, (entry.logits_shape or () for entry in of_logits))
        if by_frame
        else (None for _ in of_logits)
    )
    for entry, array, columns in zip(entries, values, logits, strict=True):
        yield entry, entry.embedding(array, columns)


def write_journal(path: Path, header: Header, entries: Iterable[Entry]) -> None:
    """Write the journal of a complete output in one go; its i-th entry is the output's i-th result."""
    temporary = rewritten(path)
    with temporary.open("wb") as file:
        file.write(dataclasses.replace(header, finished=True).to_line())
        file.writelines(dataclasses.replace(entry, offset=None).to_line() for entry in entries)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n"


def parse_line(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None
