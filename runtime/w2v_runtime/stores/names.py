"""Paths as text that every reader takes: UTF-8, with what is not escaped alike in every format."""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import quote, unquote_to_bytes

_URI: Final = "file:"


def file_text(path: str) -> str:
    """A path as text: itself if it is UTF-8, else its bytes percent-encoded after ``file:``.

    A path that itself begins with ``file:`` is encoded too, so the way back is certain:
    ``os.fsdecode(urllib.parse.unquote_to_bytes(text[5:])) if text.startswith("file:") else text``.
    """
    utf8 = not any("\ud800" <= character <= "\udfff" for character in path)
    return path if utf8 and not path.startswith(_URI) else _URI + quote(path, errors="surrogateescape")


def path_of(text: str) -> str:
    """The path that :func:`file_text` turned into ``text``."""
    return os.fsdecode(unquote_to_bytes(text.removeprefix(_URI))) if text.startswith(_URI) else text


def plain(text: str) -> str:
    """A label as UTF-8: bytes of it that are none are replaced by U+FFFD."""
    return text.encode(errors="surrogateescape").decode(errors="replace")
