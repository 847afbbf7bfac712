"""``.csv`` and ``.tsv``: columns ``file``, ``start``, ``end`` and any others, as audformat and opensmile write them."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from w2v_models.errors import RefusedError
from w2v_runtime.tables.rows import Row, seconds
from w2v_runtime.tables.text import open_text

#: The columns that every such table has; all others are carried through.
NEEDED: Final = ("file", "start", "end")
_DELIMITERS: Final = (",", "\t", ";")
#: A field beyond this is not a label: an open quotation mark swallows the rest of a file.
_MAX_FIELD: Final = 2**20


def read(path: str) -> Iterator[Row]:
    """The rows of a table, read as they are used.

    Raises:
        RefusedError: a column is missing or named twice, a row has another number of fields than the header, or a time
            is none; the message names the table's line.
    """
    csv.field_size_limit(_MAX_FIELD)
    with open_text(path) as file:
        header_line = file.readline()
        delimiter = max(_DELIMITERS, key=header_line.count)
        rows = csv.reader(itertools.chain([header_line], file), delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            places = check_columns(header)
            for fields in rows:
                number = rows.line_num
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise RefusedError(
                        f"line {number} has {len(fields)} fields, but the header has {len(header)}: "
                        "quote fields that hold the delimiter."
                    )
                yield row_of(number, "line", fields, places)
        except csv.Error as error:
            raise RefusedError(f"line {rows.line_num} is no row of a table ({error}); quote its fields.") from None


class Places(NamedTuple):
    """Where in a row the needed columns are, and the others by name."""

    file: int
    start: int
    end: int
    others: tuple[tuple[str, int], ...]


def check_columns(header: list[str]) -> Places:
    """The places of the columns.

    Raises:
        RefusedError: one is missing, or a name occurs twice.
    """
    if missing := [name for name in NEEDED if name not in header]:
        there = ", ".join(header) if any(header) else "none"
        raise RefusedError(
            f"it has no column {', '.join(missing)}; a table of segments has the columns file, start and end, and this "
            f"one has: {there:.200}."
        )
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise RefusedError(f"it has two columns {twice[0]!r}; rename one.")
    others = tuple((name, place) for place, name in enumerate(header) if name not in NEEDED)
    file, start, end = map(header.index, NEEDED)
    return Places(file, start, end, others)


def row_of(number: int, word: str, fields: Sequence[Any], places: Places) -> Row:
    """A row from its fields; ``word`` is what messages call it, ``line`` or ``row``.

    Raises:
        RefusedError: a time is none, or there is no file or no start.
    """
    file = fields[places.file]
    if not isinstance(file, str) or not file:
        raise RefusedError(f"{word} {number} names no file.")
    try:
        begin, stop = seconds(fields[places.start], "start"), seconds(fields[places.end], "end")
    except RefusedError as error:
        raise RefusedError(f"{word} {number}: {error}.") from None
    if begin is None:
        raise RefusedError(f"{word} {number} has no start; write 0 where it is the beginning of the file.")
    others = {name: fields[place] for name, place in places.others}
    return Row(number, file, begin, stop, None, others)
