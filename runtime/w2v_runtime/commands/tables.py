"""Tables on the command line: plain aligned text that fits a terminal and that ``grep`` and ``awk`` read.

Cells hold what files say, so each is made :func:`~w2v_runtime.commands.terminal.printable` before it is measured.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TextIO

from w2v_runtime.commands.terminal import printable

_GAP: Final = "  "
_INDENT: Final = 4
#: Room for a word or two; narrower text is not wrapped at all.
_NARROWEST: Final = 20


@dataclass(frozen=True)
class Table:
    """Rows under a header, the first column naming each row; columns in ``right`` (from 0) hold numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[int] = frozenset()

    def lines(self, width: int | None) -> Iterator[str]:
        """The table as text, one line per row; if ``width`` is too small for that, each row is a short paragraph."""
        header, *rows = ([printable(cell) for cell in row] for row in (self.header, *self.rows))
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        yield printable(self.title)
        if width is None or sum(widths) + len(_GAP) * (len(widths) - 1) <= width:
            for row in (header, *rows):
                yield _GAP.join(self._aligned(i, cell, widths[i]) for i, cell in enumerate(row)).rstrip()
            return
        for first, *rest in rows:
            cells = zip(header[1:], rest, strict=True)
            told = ", ".join(f"{name}: {cell}".removeprefix(": ") for name, cell in cells if cell)
            yield first
            yield from _wrapped(told, width, " " * _INDENT)

    def _aligned(self, column: int, cell: str, width: int) -> str:
        return cell.rjust(width) if column in self.right else cell.ljust(width)


def pairs(title: str, values: Mapping[str, str], width: int | None) -> Iterator[str]:
    """Names and values as text, one line per pair; long values are wrapped and indented."""
    indent = max(map(len, values)) + len(_GAP)
    yield printable(title)
    for name, value in values.items():
        first, *rest = _wrapped(printable(value), width, " " * indent) or [""]
        yield (name.ljust(indent) + first.strip()).rstrip()
        yield from rest


def _wrapped(text: str, width: int | None, indent: str) -> list[str]:
    """Lines of ``text``, cut between words only, so that ids, hashes and paths stay whole."""
    if width is None:
        return [indent + text]
    return textwrap.wrap(
        text,
        max(width, len(indent) + _NARROWEST),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def width_of(file: TextIO) -> int | None:
    """The width of text in columns: ``$COLUMNS``, else the width of the terminal that ``file`` is, else None."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(file.fileno()).columns or None
    except OSError:
        return None
