"""Lists of paths as programs write them, each behind a byte that says how it is separated."""

from __future__ import annotations

import codecs

import targets

_NAMES = ["a.wav", "two words.wav", "höre.wav", "-dash.wav", "https://example.org/a.wav", "*.wav", "x" * 300]


def list_seeds() -> dict[str, bytes]:
    """Seeds by name."""
    text, bare = "\n".join(_NAMES), b"\xff\xfe.wav\nline\rbreak.wav"
    lines = {
        "lines": text.encode(),
        "lines-of-windows": codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
        "lines-utf16": text.encode("utf-16"),
        "lines-utf16-be": codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
        "lines-utf32": text.encode("utf-32"),
        "bytes": bare,
        "nul": text.replace("\n", "\0").encode(),
        "wav": b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80\x3e\0\0\0\x7d\0\0\2\0\x10\0data",
        "empty": b"",
    }
    return {
        f"{name}-{kind.decode()}": kind + content
        for name, content in lines.items()
        for kind in (targets.LINES_KIND, targets.NULL_KIND)
    }
