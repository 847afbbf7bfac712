"""Outputs that appear whole or not at all: written beside their final name, made durable, then renamed onto it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from w2v_models.errors import OutputError

TEMPORARY_SUFFIX: Final = ".w2v-tmp"
REPLACED_SUFFIX: Final = ".w2v-old"
#: Lists the arrays of a folder output, and so tells one from any other folder.
INDEX: Final = "index.jsonl"
METADATA: Final = "metadata.json"
#: Under these keys the index names the arrays of an input.
ARRAYS: Final = ("npy", "logits_npy")


class _Closable(Protocol):
    def close(self) -> object: ...


class PendingFile:
    """A file on its way to ``path``; a link at that name is followed, so that its target is what gets replaced.

    Raises:
        OutputError: ``path`` exists and may not be overwritten, or its folder cannot take it.
    """

    def __init__(self, path: Path, overwrite: bool) -> None:
        self._overwrite = overwrite
        self.path = Path(os.path.realpath(path))
        self.temporary = _sibling(self.path, TEMPORARY_SUFFIX)
        check_file(self.path, overwrite)

    def create(self) -> BinaryIO:
        """Open the temporary file for writing, in place of one that a killed run left behind."""
        self.temporary.unlink(missing_ok=True)
        return self.temporary.open("xb")

    def scratch(self) -> BinaryIO:
        """Open a file without a name on the same disk; closing it, or a kill, removes it."""
        return tempfile.TemporaryFile(dir=self.path.parent)

    def commit(self) -> None:
        """Make the closed temporary file durable and give it its name."""
        with self.temporary.open("rb") as file:
            os.fsync(file.fileno())
        check_file(self.path, self._overwrite)
        self.temporary.replace(self.path)
        _sync_folder(self.path.parent)

    def discard(self, *files: _Closable) -> None:
        """Close ``files`` in this order and remove the temporary file."""
        close_quietly(*files)
        self.temporary.unlink(missing_ok=True)


class PendingFolder:
    """A folder on its way to ``path``.

    Replacing an earlier output takes two renames; a kill between them leaves the old folder beside its name.

    Raises:
        OutputError: ``path`` is not free, or holds more than an earlier output that may be overwritten.
    """

    def __init__(self, path: Path, overwrite: bool) -> None:
        self._overwrite = overwrite
        self.path = Path(os.path.realpath(path))
        self.temporary = _sibling(self.path, TEMPORARY_SUFFIX)
        check_folder(self.path, overwrite)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()

    def commit(self) -> None:
        """Make the temporary folder durable and give it its name."""
        # One sync for all: an fsync each would take hours over millions of small files.
        if hasattr(os, "sync"):
            os.sync()
        check_folder(self.path, self._overwrite)
        replaced = _sibling(self.path, REPLACED_SUFFIX)
        shutil.rmtree(replaced, ignore_errors=True)
        if self.path.is_dir():
            self.path.rename(replaced)
        self.temporary.rename(self.path)
        _sync_folder(self.path.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def discard(self, *files: _Closable) -> None:
        """Close ``files`` and remove the temporary folder with all in it."""
        close_quietly(*files)
        shutil.rmtree(self.temporary, ignore_errors=True)


def check_file(path: Path, overwrite: bool) -> None:
    """Raise OutputError unless a file may be written at ``path``."""
    _check_parent(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file that can be written.")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; continue with --resume, replace it with --overwrite, or name another.")


def check_folder(path: Path, overwrite: bool) -> None:
    """Raise OutputError unless a folder may be written at ``path``: none there, an empty one, or an earlier output.

    A folder is only ever overwritten when all in it is listed in its index, so that no other file can be lost.
    """
    _check_parent(path)
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise OutputError(f"{path} is a file; name a folder, or end the output in a known suffix.")
    if os.path.ismount(path) or path == Path.cwd():
        raise OutputError(
            f"{path} is a mount point or the current folder; name a folder inside it, such as {path}/out."
        )
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{path} is not empty; continue with --resume, replace it with --overwrite, or name another.")
    if (stranger := _stranger(path)) is not None:
        raise OutputError(f"{path} holds {stranger}, which is no part of an earlier output; name another folder.")


def close_quietly(*files: _Closable) -> None:
    """Close what is about to be thrown away; a full disk makes that fail in ways that no longer matter."""
    for file in files:
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            file.close()


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: the folder {path.parent} does not exist; create it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: no permission to write in the folder {path.parent}.")


def _stranger(folder: Path) -> str | None:
    """A file below ``folder`` that no index of an earlier output lists, or None."""
    known = {METADATA, INDEX}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError), (folder / INDEX).open("rb") as lines:
        known.update(record[key] for record in map(json.loads, lines) for key in ARRAYS if key in record)
    for parent, _, files in os.walk(folder):
        for file in files:
            name = Path(parent, file).relative_to(folder).as_posix()
            if name not in known:
                return name
    return None


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable; some network file systems and Windows refuse to sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
