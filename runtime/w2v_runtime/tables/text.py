"""Tables that are text: UTF-8 or UTF-16 with a byte order mark, of any line ends, perhaps compressed."""

from __future__ import annotations

import codecs
import gzip
import io
import os
from collections.abc import Iterator
from typing import IO, Final, TextIO, cast

from w2v_models.errors import RefusedError

_GZIP: Final = b"\x1f\x8b"
#: The longest line that is read: a row is short, and a file without line ends is none.
MAX_LINE: Final = 2**24


def open_text(path: str) -> TextIO:
    """Open a text; bytes that are not UTF-8 are kept as ``os.fsdecode`` keeps them, for names of files.

    Raises:
        OSError: it cannot be read.
    """
    opened = gzip.open if is_gzip(path) else open
    raw = cast(IO[bytes], opened(path, "rb"))
    head = raw.read(4)
    raw.seek(0)
    utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if utf16 else "utf-8-sig"
    return io.TextIOWrapper(raw, encoding, errors="strict" if utf16 else "surrogateescape", newline="")


def lines(path: str, comments: tuple[str, ...] = ()) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers from 1, without line ends, blank lines and comments.

    Raises:
        RefusedError: a line is too long to be one of a table.
        OSError: it cannot be read.
    """
    with open_text(path) as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) >= MAX_LINE:
                raise RefusedError(f"line {number} is longer than {MAX_LINE} characters.")
            line = line.strip("\r\n \t")
            if line and not line.startswith(comments or "\0"):
                yield number, line


def is_gzip(path: str) -> bool:
    """Whether a file is compressed with gzip, by its first bytes."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(2) == _GZIP
