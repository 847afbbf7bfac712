"""The journal of a run: what ``.OUT.w2v-journal`` says of the run and of each finished input.

Its first line is a :class:`Header` that describes the run, every further line an :class:`Entry` for a finished input.
Each line carries a checksum, so that a damaged one is known and costs just its own input. Beside a complete output the
journal stays, for a later ``--resume``; its i-th entry is then the output's i-th result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from w2v_models.errors import OutputError
from w2v_runtime.embedding.results import Embedding
from w2v_runtime.files.durable import replace, sync_folder
from w2v_runtime.files.outputs import EARLIER_SUFFIXES, JOURNAL_SUFFIX, VALUES_SUFFIX, beside, hidden
from w2v_runtime.runs.inputs import is_shard

#: Raised whenever the lines of a journal change. The release before wrote 2, whose lines have no checksums and whose
#: header knows nothing of the list of inputs; it is still read.
JOURNAL_FORMAT: Final = 3
_EARLIER_FORMAT: Final = 2
_CHECKSUM: Final = b',"crc32":'
_BLOCK_BYTES: Final = 2**20
#: Counts, sizes and times beyond this are damage: they still fit into 64 bits when a few are added.
_MAX_NUMBER: Final = 2**61
_FIRST_BYTES: Final = b'{"fingerprint":'
_NEW_SUFFIX: Final = ".new"
#: More of a first line than this is not read: it is no journal's.
_MAX_LINE_BYTES: Final = 2**28

Values = npt.NDArray[np.float32]


class DamagedJournalError(OutputError):
    """A journal does not say any more what run it belongs to."""


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
            return cls.of_status(path, os.stat(path), content)
        except (OSError, ValueError):
            return None

    @classmethod
    def of_status(cls, path: str, status: os.stat_result, content: bool = False) -> Stamp:
        """The stamp of a file whose status is known.

        Raises:
            OSError: its content is asked for and cannot be read.
        """
        if not content:
            return cls(status.st_size, status.st_mtime_ns)
        with open(path, "rb") as file:
            return cls(status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest())

    @classmethod
    def of_content(cls, file: BinaryIO) -> Stamp:
        """The stamp of what a file without a name holds: its size and its content, whenever it came."""
        size, digest = 0, hashlib.sha256()
        while block := file.read(_BLOCK_BYTES):
            size += len(block)
            digest.update(block)
        file.seek(0)
        return cls(size, 0, digest.hexdigest())

    def same(self, other: Stamp) -> bool:
        """Equal content where both know it, else equal size and time."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return (self.size, self.mtime_ns) == (other.size, other.mtime_ns)


#: The stamp of a file of which none is known: no file has it, so that the input is embedded again.
UNKNOWN: Final = Stamp(-1, -1)


@dataclass(frozen=True)
class Entry:
    """A journal line: an input's path and stamp, its index among all inputs, and what is known of its result.

    ``offset`` is where its numbers stand in the values file, in bytes; None once they are in the output. They are the
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
        """Size in bytes of what stands in the values file."""
        return 4 * (math.prod(self.shape) + (0 if self.logits_shape is None else math.prod(self.logits_shape)))

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
    def parse(cls, line: bytes, checksums: bool = True) -> Entry | None:
        """Read a line; None if it is torn, damaged, or no entry."""
        data = _parse_line(line, checksums)
        if data is None:
            return None
        try:
            entry = cls(
                stamp=Stamp(**data.pop("stamp")),
                shape=tuple(data.pop("shape")),
                logits_shape=_tuple(data.pop("logits_shape")),
                warnings=tuple(data.pop("warnings")),
                logits=_tuple(data.pop("logits")),
                **data,
            )
        except (KeyError, TypeError):
            return None
        return entry if entry._is_sound() else None

    def _is_sound(self) -> bool:
        """Whether every field is of its type and within reach, whoever wrote the line."""
        stamp, offset = self.stamp, 0 if self.offset is None else self.offset
        sizes = (*self.shape, *(self.logits_shape or ()))
        return (
            _is_path(self.path)
            and all(type(size) is int and 1 <= size <= _MAX_NUMBER for size in sizes)
            and all(type(place) is int and 0 <= place <= _MAX_NUMBER for place in (self.index, offset))
            and 1 <= len(self.shape) <= 3
            and (self.logits_shape is None or len(self.logits_shape) == 2)
            and all(type(n) is int and abs(n) <= _MAX_NUMBER for n in (stamp.size, stamp.mtime_ns))
            and (stamp.sha256 is None or type(stamp.sha256) is str)
            and all(type(x) in (int, float) and abs(x) <= _MAX_NUMBER for x in (self.duration, *(self.logits or ())))
            and all(type(warning) is str for warning in self.warnings)
        )


@dataclass(frozen=True)
class Inputs:
    """All inputs of a run, those of other shards too: how many, and the SHA-256 of their paths in order."""

    count: int
    sha256: str


@dataclass(frozen=True)
class Header:
    """A journal's first line: what the run computes, its part of the inputs, and whether its output is complete.

    ``inputs``, known once the list has come to its end, and ``failed``, the indices among them of this part's inputs
    that have no result, tell a complete part; both are None before, and in what the release before wrote.
    """

    fingerprint: dict[str, Any]
    shard: str
    finished: bool
    inputs: Inputs | None = None
    failed: tuple[int, ...] | None = None
    format: int = JOURNAL_FORMAT

    @classmethod
    def read(cls, journal: Path) -> Header | None:
        """The header of a journal, None where there is no journal, or nothing but a torn first line.

        Raises:
            DamagedJournalError: it is damaged, or none at all.
            OutputError: it is a journal of another release, or cannot be read.
        """
        try:
            descriptor = os.open(journal, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"{journal} cannot be read: {error.strerror}.") from None
        with open(descriptor, "rb") as file:
            try:
                line = file.readline(_MAX_LINE_BYTES)
            except OSError as error:
                raise OutputError(f"{journal} cannot be read: {error.strerror}.") from None
        if _is_torn(line):
            return None
        return cls.of_dict(_parse_line(line, True) or _parse_line(line, False), journal)

    @classmethod
    def of_dict(cls, data: dict[str, Any] | None, source: Path) -> Header:
        """Build a header from decoded JSON that stands in ``source``.

        Raises:
            DamagedJournalError: it is none.
            OutputError: it is one of another release.
        """
        again = "make its output again with w2v-embed --overwrite"
        if data is None:
            raise DamagedJournalError(f"the first line of {source} is damaged, so its run is unknown; {again}.")
        if data.get("format") not in (JOURNAL_FORMAT, _EARLIER_FORMAT):
            raise OutputError(
                f"{source} was written by another release of w2v-onnx, whose journals this one does not read; "
                f"{again}, or go on with that release."
            )
        try:
            inputs, failed = data.pop("inputs", None), data.pop("failed", None)
            inputs = None if inputs is None else Inputs(**inputs)
            header = cls(inputs=inputs, failed=_tuple(failed), **data)
        except TypeError:
            header = None
        if header is None or not header._is_sound():
            raise DamagedJournalError(f"the first line of {source} does not describe a run; {again}.")
        return header

    def _is_sound(self) -> bool:
        inputs = Inputs(0, "") if self.inputs is None else self.inputs
        counts = (inputs.count, *(self.failed or ()))
        return (
            type(self.fingerprint) is dict
            and type(self.shard) is str
            and is_shard(self.shard)
            and type(self.finished) is bool
            and type(inputs.sha256) is str
            and all(type(count) is int and 0 <= count <= _MAX_NUMBER for count in counts)
        )

    @property
    def checksums(self) -> bool:
        """Whether the lines of this journal bear checksums."""
        return self.format != _EARLIER_FORMAT

    def to_line(self) -> bytes:
        return _line(dataclasses.asdict(self))


class InputList:
    """The inputs of a run as they pass by, counted and hashed: two parts that saw the same list can be joined."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = paths
        self._count, self._hash = 0, hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for path in self._paths:
            self._hash.update(os.fsencode(path) + b"\0")
            self._count += 1
            yield path

    @property
    def seen(self) -> Inputs:
        """What passed by so far: all inputs, once the iterator is exhausted."""
        return Inputs(self._count, self._hash.hexdigest())


def read_entries(journal: Path, checksums: bool = True) -> Iterator[Entry | None]:
    """The entries of a journal, in order; None for each line that is damaged, and nothing for a torn last one."""
    with journal.open("rb") as file:
        file.readline()
        yield from entries_in(file, checksums)


def entries_in(file: IO[bytes], checksums: bool) -> Iterator[Entry | None]:
    """The same from an open journal, from where it stands."""
    for line in file:
        if line.endswith(b"\n"):
            yield Entry.parse(line, checksums)


def write_journal(path: Path, header: Header, entries: Iterable[Entry]) -> None:
    """Write the journal of a complete output in one go; its i-th entry is the output's i-th result."""
    temporary = rewritten(path)
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(dataclasses.replace(header, finished=True, format=JOURNAL_FORMAT).to_line())
        file.writelines(dataclasses.replace(entry, offset=None).to_line() for entry in entries)
        file.flush()
        os.fsync(file.fileno())
    replace(temporary, path)


def earlier_journal(output: Path) -> Path:
    """Where the release before kept the journal of an output."""
    return beside(output, EARLIER_SUFFIXES[JOURNAL_SUFFIX])


def adopt_earlier(output: Path) -> None:
    """Give the journal and the values that the release before left beside an output the names that they have now.

    The caller holds the output's lock.

    Raises:
        OutputError: what bears such a name is damaged, or no journal of that release.
    """
    before, now = earlier_journal(output), hidden(output, JOURNAL_SUFFIX)
    if os.path.lexists(now) or Header.read(before) is None:
        return
    values = beside(output, EARLIER_SUFFIXES[VALUES_SUFFIX])
    if values.is_file():
        values.rename(hidden(output, VALUES_SUFFIX))
    before.rename(now)
    sync_folder(now.parent)


def drop_earlier(output: Path) -> None:
    """Remove the journal and the values that the release before left beside an output that is replaced.

    What bears such a name and is no journal is somebody else's, and stays.
    """
    try:
        if Header.read(earlier_journal(output)) is None:
            return
    except OutputError:
        return
    beside(output, EARLIER_SUFFIXES[VALUES_SUFFIX]).unlink(missing_ok=True)
    earlier_journal(output).unlink()


def rewritten(journal: Path) -> Path:
    """Where a new state of a journal is written before it takes the journal's name."""
    return journal.with_name(journal.name + _NEW_SUFFIX)


def _is_torn(line: bytes) -> bool:
    """Whether a first line was never written to its end: it has none, or holds nothing but the zeros of a lost one."""
    start = _FIRST_BYTES[: len(line)]
    return not line.endswith(b"\n") and (not line.strip(b"\0") or line.startswith(start))


def _is_path(path: Any) -> bool:
    try:
        return bool(os.fsencode(path)) and type(path) is str
    except (TypeError, UnicodeEncodeError):
        return False


def _tuple(items: Any) -> tuple[Any, ...] | None:
    return None if items is None else tuple(items)


def _line(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, separators=(",", ":")).encode("ascii")
    return b"%s%s%d}\n" % (text[:-1], _CHECKSUM, zlib.crc32(text))


def _parse_line(line: bytes, checksums: bool) -> dict[str, Any] | None:
    """What a line holds; None if it is torn or damaged. A line that bears a checksum must have the right one."""
    if not line.endswith(b"}\n"):
        return None
    text, mark, checksum = line[:-2].rpartition(_CHECKSUM)
    if mark and checksum.isdigit():
        text += b"}"
        if int(checksum) != zlib.crc32(text):
            return None
    elif checksums:
        return None
    else:
        text = line
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
