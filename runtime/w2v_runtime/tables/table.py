"""A table of segments: its format by suffix or content, a pass that checks every row, then its rows as often as asked.

A new format is a module with a ``read`` that yields rows, and a line in :data:`_FORMATS`.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from w2v_models.errors import RefusedError
from w2v_runtime.tables import delimited, kaldi, manifests, nist, parquet, textgrid
from w2v_runtime.tables.rows import Column, Columns, Row, Value
from w2v_runtime.tables.text import is_gzip, open_text

_SEGMENTS: Final = "segments"
#: The first characters of a text, by which a table without a known suffix is recognised.
_HEAD: Final = 4096


@dataclass(frozen=True)
class _Format:
    """``named``: recordings are named without a suffix; ``id``: the field that no two rows may share, if any.

    ``one`` is what a row is called.
    """

    read: Callable[[str], Iterator[Row]]
    named: bool = False
    id: str | None = None
    one: str = "line"


_FORMATS: Final = {
    ".csv": _Format(delimited.read),
    ".tsv": _Format(delimited.read),
    ".parquet": _Format(parquet.read, one="row"),
    ".rttm": _Format(nist.read_rttm, named=True),
    ".ctm": _Format(nist.read_ctm, named=True),
    ".jsonl": _Format(manifests.read, id="id"),
    _SEGMENTS: _Format(kaldi.read, id="utterance"),
}
_KNOWN: Final = ".csv, .tsv, .parquet, .rttm, .ctm, .TextGrid, .jsonl, .jsonl.gz, or Kaldi's segments"


class Table:
    """A table that every row of which can be read; opening it reads it once.

    Attributes:
        path: the file, or the folder of TextGrids.
        named: whether ``file`` of its rows is a recording's name without suffix, not a path.
        one: what messages call a row, which ``number`` counts.
        columns: the columns that are carried through, with the kind of their values.
        count: its rows.

    Raises:
        RefusedError: the table is missing or not a file, of no known format, or has a row that is none; the message
            names the row.
    """

    def __init__(self, path: str, tier: str | None = None) -> None:
        self.path = path
        _check_place(path)
        format_ = _format_of(path, tier)
        if tier is not None and not _is_textgrid(path):
            raise RefusedError(f"--tier chooses a tier of a TextGrid, and {path} is none.")
        scp = kaldi.scp_beside(path) if format_.read is kaldi.read else None
        self.named = format_.named or (format_.read is kaldi.read and scp is None)
        self._format, self.one = format_, format_.one
        self._state = self._states()
        columns, ids, self.count = Columns(), array("q"), 0
        for row in self._read():
            self.count += 1
            columns.add(row.fields)
            if format_.id is not None and format_.id in row.fields:
                ids.append(hash(row.fields[format_.id]))
        self.columns: tuple[Column, ...] = columns.found()
        if strange := [column.name for column in self.columns if min(column.name, default=" ") < " "]:
            raise RefusedError(
                f"the table {path} has a column {strange[0]!r:.80}; rename it without control characters."
            )
        if not self.count:
            raise RefusedError(f"the table {path} has no segments.")
        self._refuse_twins(np.frombuffer(ids, np.int64))

    def rows(self) -> Iterator[Row]:
        """The rows, in the order of the table.

        Raises:
            RefusedError: the table was changed since it was opened.
        """
        if self._states() != self._state:
            raise RefusedError(f"the table {self.path} was changed while it was in use; repeat the command.")
        return self._read()

    def values(self, row: Row) -> tuple[Value, ...]:
        """The values of a row that are carried through, in the order of :attr:`columns`."""
        return tuple(row.fields.get(column.name) for column in self.columns)

    def _read(self) -> Iterator[Row]:
        try:
            yield from self._format.read(self.path)
        except RefusedError as error:
            raise RefusedError(f"the table {self.path} cannot be used: {error}") from None
        except OSError as error:
            raise RefusedError(
                f"the table {error.filename or self.path} cannot be read: {error.strerror or error}."
            ) from None
        except (UnicodeError, EOFError, ValueError) as error:
            raise RefusedError(f"the table {self.path} cannot be read: {error!s:.160}.") from None

    def _states(self) -> list[tuple[int, int, int]]:
        places = [self.path, *filter(None, [kaldi.scp_beside(self.path)])]
        states = map(os.stat, places)
        return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]

    def _refuse_twins(self, hashes: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        if len(np.unique(hashes)) == len(hashes):
            return
        name, seen = self._format.id or "", dict[Value, int]()
        for row in self._read():
            if (first := seen.setdefault(row.fields.get(name), row.number)) != row.number and name in row.fields:
                raise RefusedError(
                    f"the table {self.path} has the {name} {row.fields[name]!r:.80} twice, in lines {first} and "
                    f"{row.number}; name each segment once."
                )


def _check_place(path: str) -> None:
    if not os.path.exists(path):
        raise RefusedError(f"the table {path} does not exist; --segments names a table, or a folder of TextGrids.")
    if not os.path.isdir(path) and not os.path.isfile(path):
        raise RefusedError(f"the table {path} is no file, and it is read more than once; write it to a file first.")


def _is_textgrid(path: str) -> bool:
    return os.path.isdir(path) or path.lower().endswith(textgrid.SUFFIX)


def _format_of(path: str, tier: str | None) -> _Format:
    if _is_textgrid(path):
        return _Format(lambda name: textgrid.read(name, tier), named=True, one="interval")
    name = os.path.basename(path).lower()
    suffix = _SEGMENTS if name == _SEGMENTS else os.path.splitext(name.removesuffix(".gz"))[1]
    if suffix in _FORMATS and (not name.endswith(".gz") or is_gzip(path)):
        return _FORMATS[suffix]
    found = _FORMATS.get(_by_content(path))
    if found is None:
        raise RefusedError(f"the table {path} has no known format; it may be {_KNOWN}.")
    return found


def _by_content(path: str) -> str:
    """The format that the first line of a table without a known suffix has; an empty string if none."""
    try:
        with open_text(path) as file:
            line = file.readline(_HEAD).strip()
    except (OSError, UnicodeError, EOFError):
        return ""
    fields = line.split()
    if line.startswith("{"):
        return ".jsonl"
    for delimiter in (",", "\t", ";"):
        if set(delimited.NEEDED) <= {name.strip().strip('"') for name in line.split(delimiter)}:
            return ".csv"
    if fields and fields[0] in ("SPEAKER", "LEXEME", "SPKR-INFO") and len(fields) >= 8:
        return ".rttm"
    if len(fields) in (4, 5) and _numbers(fields[2:4]):
        if len(fields) == 5 and not fields[4].isdecimal():
            return ".ctm"
        return _SEGMENTS
    return ".ctm" if len(fields) == 6 and _numbers(fields[2:4]) else ""


def _numbers(fields: list[str]) -> bool:
    try:
        return all(float(field) == float(field) for field in fields)
    except ValueError:
        return False
