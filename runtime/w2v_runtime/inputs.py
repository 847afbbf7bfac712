"""What to embed: files, folders searched recursively, lists of paths, and a shard of them all."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from w2v_models.errors import RefusedError

_SUFFIXES: Final = (
    *(".wav", ".wave", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"),
    *(".au", ".snd", ".sph", ".caf", ".m4a", ".aac", ".amr"),
)
#: First bytes of audio files, whatever their name.
_MAGIC: Final = (b"RF64", b"riff\x2e\x91\xcf\x11", b"fLaC", b"OggS", b"ID3", b".snd", b"NIST_1A", b"caff")
#: First bytes of containers that hold other things too, such as pictures, and what bytes 8 to 12 say of audio.
_CONTAINERS: Final = {b"RIFF": (b"WAVE",), b"RIFX": (b"WAVE",), b"FORM": (b"AIFF", b"AIFC")}
_READ_BYTES: Final = 1 << 16


@dataclass(frozen=True)
class Shard:
    """The ``index``-th (from 1) of ``count`` parts: every count-th input, so that parts take equally long."""

    index: int = 1
    count: int = 1

    @classmethod
    def of(cls, text: str) -> Shard:
        """Read ``I/N``.

        Raises:
            RefusedError: it is not that, or I is not in 1 … N.
        """
        if not is_shard(text):
            raise RefusedError(f"shard {text!r:.40} is not I/N with I from 1 to N, such as 3/8.")
        return cls(*map(int, text.split("/")))

    def holds(self, position: int) -> bool:
        """Whether the input at ``position`` (from 0) belongs to this part."""
        return position % self.count == self.index - 1


def is_shard(text: str) -> bool:
    """Whether a text is ``I/N`` with I in 1 … N."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    return match is not None and 1 <= int(match[1]) <= int(match[2])


#: The one shard that holds every input.
ALL: Final = Shard()


def list_inputs(arguments: Iterable[str], files_from: str | None = None, null: bool = False) -> Iterator[str]:
    """Every input path, in a fixed order: the arguments (a folder's audio sorted by name), then the list's lines.

    Raises:
        RefusedError: the list cannot be read.
    """
    for argument in arguments:
        if os.path.isdir(argument):
            yield from _search(argument)
        else:
            yield argument
    if files_from is not None:
        yield from _read_list(files_from, b"\0" if null else b"\n")


def _search(folder: str) -> Iterator[str]:
    """Audio files below a folder. Links to folders are followed once, so that loops end."""
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            status = os.stat(current)
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError:
            yield current  # reading it fails with the reason
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (entry.path for entry in entries if not _is_folder(entry) and _is_audio(entry))
        pending.extend(entry.path for entry in reversed(entries) if _is_folder(entry))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_audio(entry: os.DirEntry[str]) -> bool:
    """By suffix, else by the first bytes of a regular file."""
    if entry.name.startswith("."):
        return False
    if os.path.splitext(entry.name)[1].lower() in _SUFFIXES:
        return True
    try:
        if not entry.is_file():
            return False
        with open(entry.path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return head.startswith(_MAGIC) or head[8:12] in _CONTAINERS.get(head[:4], ())


def check_list(name: str) -> None:
    """Refuse a list that cannot be read, without reading any of it: it may be a pipe.

    Raises:
        RefusedError: it is missing, a folder, or not readable.
    """
    if name == "-":
        return
    reason = None if os.access(name, os.R_OK) else "permission denied" if os.path.exists(name) else "no such file"
    if os.path.isdir(name):
        reason = "it is a folder; name it as an input to search it"
    if reason:
        raise RefusedError(f"the list {name} cannot be read: {reason}.")


def _read_list(name: str, separator: bytes) -> Iterator[str]:
    if name == "-":
        yield from _split(sys.stdin.buffer, separator)
        return
    try:
        with Path(name).open("rb") as file:
            yield from _split(file, separator)
    except OSError as error:
        raise RefusedError(f"the list {name} cannot be read: {error.strerror}.") from None


def _split(file: BinaryIO, separator: bytes) -> Iterator[str]:
    """Paths as they stream in; bytes that are not UTF-8 are kept (``os.fsdecode``). Empty lines are skipped."""
    rest = b""
    while block := file.read(_READ_BYTES):
        *lines, rest = (rest + block).split(separator)
        yield from map(os.fsdecode, filter(None, lines))
    if rest:
        yield os.fsdecode(rest)
