"""The journal of a run, ``.OUT.w2v-journal``: it describes the run and each finished input, for ``--resume``.

Its first line is a :class:`Header` that describes the run, every further line an :class:`Entry` for a finished input.
Each line has a checksum, so that a damaged line is detected and only its own input is embedded again. Beside a complete
output the journal stays, for a later ``--resume``; its i-th entry is then the output's i-th result.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from w2v_models.errors import OutputError
from w2v_runtime.embedding.results import Embedding, Segment
from w2v_runtime.files.durable import flush, replace, sync_folder
from w2v_runtime.files.outputs import EARLIER_SUFFIXES, JOURNAL_SUFFIX, VALUES_SUFFIX, beside, hidden
from w2v_runtime.runs.inputs import is_shard

#: To be raised whenever the lines of a journal change. The previous release wrote 2, without checksums in the lines and
#: without the list of inputs in the header; it is still read.
JOURNAL_FORMAT: Final = 3
_EARLIER_FORMAT: Final = 2
_CHECKSUM: Final = b',"crc32":'
_BLOCK_BYTES: Final = 2**20
#: Larger counts, sizes and times count as damage; the sum of a few numbers up to this still fits into 64 bits.
_MAX_NUMBER: Final = 2**61
_FIRST_BYTES: Final = b'{"fingerprint":'
_NEW_SUFFIX: Final = ".new"
#: The key of a fingerprint that says what the segments of a table hear; absent in runs over whole recordings.
SEGMENTS: Final = "segment_context"
#: No more of a first line is read: a longer one is not a journal's.
_MAX_LINE_BYTES: Final = 2**28

Values = npt.NDArray[np.float32]


class DamagedJournalError(OutputError):
    """A journal's header is damaged, so that its run is unknown."""


@dataclass(frozen=True)
class Stamp:
    """By what a file is recognised: size in bytes, modification time in ns, with ``--hash`` its content's SHA-256."""

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
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        with open(path, "rb") as file:
            return cls(status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest())

    @classmethod
    def of_content(cls, file: BinaryIO) -> Stamp:
        """The stamp of an open file without a name: its size and the SHA-256 of its content; its time is 0."""
        size, digest = 0, hashlib.sha256()
        while block := file.read(_BLOCK_BYTES):
            size += len(block)
            digest.update(block)
        file.seek(0)
        return cls(size, 0, digest.hexdigest())

    def same(self, other: Stamp) -> bool:
        """Whether two stamps have an equal SHA-256 if both have one, else an equal size and modification time."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return (self.size, self.mtime_ns) == (other.size, other.mtime_ns)


#: Stands for a stamp that is unknown: no file has it, so that the input is embedded again.
UNKNOWN: Final = Stamp(-1, -1)


@dataclass(frozen=True)
class Entry:
    """A journal line: an input's path, stamp and index among all inputs, and its result without the values.

    ``offset`` is the offset of the result's numbers in the values file, in bytes; None once they are in the output. The
    numbers are the values, of ``shape``, and then frame-level logits, of ``logits_shape`` (T, K). The logits (K,) of an
    utterance-level head are in ``logits``. ``duration`` is in seconds.
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
    segment: Segment | None = None

    @classmethod
    def of(cls, embedding: Embedding, stamp: Stamp, index: int, offset: int | None) -> Entry:
        """The entry for a result."""
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
            segment=embedding.segment,
        )

    @property
    def key(self) -> str:
        """By what an input is recognised: its path, and of a segment where it lies."""
        return key_of(self.path, self.segment)

    @property
    def size(self) -> int:
        """Size in bytes of the result's numbers in the values file."""
        return 4 * (math.prod(self.shape) + (0 if self.logits_shape is None else math.prod(self.logits_shape)))

    @property
    def rows(self) -> int:
        """Frames of a frame-level result; meaningless for an utterance."""
        return self.shape[0]

    def embedding(self, values: Values, logits: Values | None) -> Embedding:
        """The result, made of this entry, its values and, for a frame-level head, its logits (T, K)."""
        if self.logits is not None:
            logits = np.array(self.logits, np.float32)
        return Embedding(self.path, values, self.duration, logits, self.warnings, self.segment)

    def to_line(self) -> bytes:
        # Not dataclasses.asdict, which copies every value in depth: journals have a line for each of many inputs.
        data = vars(self) | {"stamp": vars(self.stamp)}
        if self.segment is None:
            del data["segment"]
        else:
            data["segment"] = vars(self.segment)
        return _line(data)

    @classmethod
    def parse(cls, line: bytes, checksums: bool = True) -> Entry | None:
        """Read a line; None if it is torn, damaged, or not an entry."""
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
                segment=_segment(data.pop("segment", None)),
                **data,
            )
        except (KeyError, TypeError):
            return None
        return entry if entry._is_sound() else None

    def _is_sound(self) -> bool:
        """Whether every field has its type and a possible value: a line may have been written by anybody."""
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
            and (self.segment is None or _is_segment(self.segment))
        )


def key_of(path: str, segment: Segment | None) -> str:
    """By what an input is recognised among the results of earlier runs."""
    return path if segment is None else f"{path}\0{segment.start!r}\0{segment.end!r}\0{segment.channel}"


@dataclass(frozen=True)
class Inputs:
    """All inputs of a run, those of other shards too: how many, and the SHA-256 of their paths in order."""

    count: int
    sha256: str


@dataclass(frozen=True)
class Header:
    """A journal's first line: what the run computes (``fingerprint``), its shard, and whether its output is complete.

    ``inputs`` describes all inputs, and ``failed`` holds the indices among them of this shard's inputs without a
    result. Both are None until the list of inputs has ended, and in journals of the previous release. ``listed`` counts
    this shard's inputs where that does not follow from their number: segments are shared out by recording.
    """

    fingerprint: dict[str, Any]
    shard: str
    finished: bool
    inputs: Inputs | None = None
    failed: tuple[int, ...] | None = None
    format: int = JOURNAL_FORMAT
    listed: int | None = None

    @classmethod
    def read(cls, journal: Path) -> Header | None:
        """The header of a journal, None where there is no journal, or nothing but a torn first line.

        Raises:
            DamagedJournalError: the header is damaged, or the file is not a journal.
            OutputError: the journal is of another release, or cannot be read.
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
        """Build a header from decoded JSON that was read from ``source``.

        Raises:
            DamagedJournalError: ``data`` is not a header.
            OutputError: the header is of another release.
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
        counts = (inputs.count, self.listed or 0, *(self.failed or ()))
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
        """Whether the lines of this journal have checksums."""
        return self.format != _EARLIER_FORMAT

    @property
    def by_rows(self) -> bool:
        """Whether the inputs are the segments of a table: each one's index is its row, in every shard."""
        return SEGMENTS in self.fingerprint

    def to_line(self) -> bytes:
        data = dataclasses.asdict(self)
        if self.listed is None:
            del data["listed"]
        return _line(data)


def read_entries(journal: Path, checksums: bool = True) -> Iterator[Entry | None]:
    """The entries of a journal, in order; None for each line that is damaged, and nothing for a torn last one."""
    with journal.open("rb") as file:
        file.readline()
        yield from entries_in(file, checksums)


def entries_in(file: IO[bytes], checksums: bool) -> Iterator[Entry | None]:
    """As :func:`read_entries`, from the present position of an open journal."""
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
        flush(file)
    replace(temporary, path)


def is_foreign(journal: Path) -> bool:
    """Whether a file with a journal's name holds nothing that a run wrote: no header, torn or whole, and no entry."""
    if journal.is_symlink() or not journal.is_file():
        return True
    with journal.open("rb") as file:
        first = file.read(len(_FIRST_BYTES))
    if not first.strip(b"\0") or _FIRST_BYTES.startswith(first):
        return False
    return not any(read_entries(journal, checksums=False))


def earlier_journal(output: Path) -> Path:
    """Where the previous release kept the journal of an output."""
    return beside(output, EARLIER_SUFFIXES[JOURNAL_SUFFIX])


def adopt_earlier(output: Path) -> None:
    """Rename the journal and the values file that the previous release left beside an output to their present names.

    The caller holds the output's lock.

    Raises:
        OutputError: the file with the journal's former name is damaged, or not a journal.
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
    """Remove the journal and the values file that the previous release left beside an output that is replaced.

    A file with the journal's former name that is not a journal belongs to somebody else, and stays.
    """
    try:
        if Header.read(earlier_journal(output)) is None:
            return
    except OutputError:
        return
    beside(output, EARLIER_SUFFIXES[VALUES_SUFFIX]).unlink(missing_ok=True)
    earlier_journal(output).unlink()


def rewritten(journal: Path) -> Path:
    """The path at which a journal is rewritten before it is renamed to ``journal``."""
    return journal.with_name(journal.name + _NEW_SUFFIX)


def _segment(data: dict[str, Any] | None) -> Segment | None:
    return None if data is None else Segment(**(data | {"fields": tuple(data["fields"])}))


def _is_segment(segment: Segment) -> bool:
    times = (segment.start, 0 if segment.end is None else segment.end, segment.first)
    return (
        all(type(time) in (int, float) and abs(time) <= _MAX_NUMBER for time in times)
        and (segment.channel is None or type(segment.channel) is int)
        and all(field is None or type(field) in (str, int, float, bool) for field in segment.fields)
    )


def _is_torn(line: bytes) -> bool:
    """Whether a first line was not written to its end: it is empty, only zeros, or the beginning of a header."""
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
    """The JSON object of a line; None if it is torn or damaged. A checksum is only optional without ``checksums``."""
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
