"""Lists of paths (``--files-from``), as programs of all systems write them: one path per line, or separated by NUL."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Final, cast

from w2v_models.errors import RefusedError
from w2v_runtime.audio import formats

_READ_BYTES: Final = 1 << 16
_UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def check_list(name: str) -> None:
    """Refuse a list that cannot be read, without reading any of it: it may be a pipe.

    Raises:
        RefusedError: the list is missing, a folder, or not readable.
    """
    if name == "-":
        return
    reason = None if os.access(name, os.R_OK) else "permission denied" if os.path.exists(name) else "no such file"
    if os.path.isdir(name):
        reason = "it is a folder; name it as an input to search it"
    if reason:
        raise RefusedError(f"the list {name} cannot be read: {reason}.")


def read_list(name: str, null: bool = False) -> Iterator[str]:
    """Yield the paths of a list while it is read; ``-`` is standard input. Bytes that are not UTF-8 are kept.

    Empty lines are skipped. Without ``null`` lines may end in CR LF, and the list may be UTF-16 if it begins with a
    byte order mark, as PowerShell writes it; a path that ends in CR needs ``null``.

    Raises:
        RefusedError: the list cannot be read, is not a list of paths, or has another separator.
    """
    if name == "-":
        if sys.stdin is None:
            raise RefusedError("standard input is closed, so no list can be read from it.")
        yield from _paths(cast(io.BufferedReader, sys.stdin.buffer), "on standard input", null)
        return
    try:
        with Path(name).open("rb") as file:
            yield from _paths(file, name, null)
    except OSError as error:
        raise RefusedError(f"the list {name} cannot be read: {error.strerror or error}.") from None


def _paths(file: io.BufferedReader, name: str, null: bool) -> Iterator[str]:
    blocks = iter(lambda: file.read1(_READ_BYTES), b"")
    first, separator = b"", b"\0" if null else b"\n"
    while separator not in first and len(first) < _READ_BYTES and (more := next(blocks, b"")):
        first += more
    if first.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise RefusedError(f"the list {name} is UTF-32; save it as UTF-8.")
    _check_separator(first, name, null)
    if null:
        paths = _split(chain([first.removeprefix(codecs.BOM_UTF8)], blocks), b"\0")
        yield from map(os.fsdecode, paths)
        return
    blocks = chain([first], blocks)
    if first.startswith(_UTF16) and b"\0" in first:
        blocks = _from_utf16(blocks, name)
    for number, line in enumerate(_split(blocks, b"\n")):
        path = (line if number else line.removeprefix(codecs.BOM_UTF8)).removesuffix(b"\r")
        if b"\0" in path:
            raise RefusedError(_holds_nul(name))
        if path:
            yield os.fsdecode(path)


def _check_separator(first: bytes, name: str, null: bool) -> None:
    """Refuse a list whose first block shows that it is not a list of paths, or that ``null`` is wrong for it."""
    if b"\0" not in first:
        if null and b"\n" in first:
            raise RefusedError(f"the list {name} has its paths in lines; leave --null out.")
        return
    wide = first.startswith(_UTF16)
    kind = None if wide else formats.by_head(first[: formats.HEAD_BYTES])
    if kind is not None and not formats.is_text(first.replace(b"\0", b"\n")):
        what = "name it as an input to embed it." if kind.recording else kind.help
        raise RefusedError(f"the list {name} is no list of paths, it looks like {kind.name}; {what}")
    if null and wide:
        raise RefusedError(f"the list {name} is UTF-16 with its paths in lines; leave --null out.")
    if not null and not wide:
        raise RefusedError(_holds_nul(name))


def _holds_nul(name: str) -> str:
    return (
        f"the list {name} holds NUL bytes; give --null if they separate its paths, as find -print0 writes them, else "
        "save it as UTF-8."
    )


def _from_utf16(blocks: Iterable[bytes], name: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-16")()
    try:
        for block in blocks:
            yield decoder.decode(block).encode()
        decoder.decode(b"", final=True)
    except UnicodeError:
        raise RefusedError(f"the list {name} begins as UTF-16 and is not; save it as UTF-8.") from None


def _split(blocks: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """Yield the parts between separators while blocks are read, except empty parts."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(separator)
        yield from filter(None, lines)
    if rest:
        yield rest
