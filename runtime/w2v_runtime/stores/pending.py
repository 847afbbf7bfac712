"""Outputs that appear whole or not at all: written beside their final name, made durable, then renamed onto it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from w2v_models.errors import OutputError
from w2v_runtime.files.durable import replace, sync_file, sync_folder
from w2v_runtime.files.exchange import exchange
from w2v_runtime.stores.names import path_of

#: Suffixes of an unfinished output and of one that is being replaced; such names begin with a dot and are our own.
TEMPORARY_SUFFIX: Final = ".w2v-tmp"
REPLACED_SUFFIX: Final = ".w2v-old"
#: This file lists the arrays of a folder output, and so distinguishes it from any other folder.
INDEX: Final = "index.jsonl"
METADATA: Final = "metadata.json"
#: The keys under which the index names the arrays of an input.
ARRAYS: Final = ("npy", "logits_npy")


class _Closable(Protocol):
    def close(self) -> object: ...


class PendingFile:
    """A file that is written under a temporary name and renamed to ``path`` at commit.

    A link at ``path`` is followed, so that its target is replaced.

    Raises:
        OutputError: ``path`` exists and may not be overwritten, or its folder is missing or not writable.
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

    def check(self) -> None:
        """Raise OutputError if another output took the name meanwhile."""
        check_file(self.path, self._overwrite)

    def commit(self) -> None:
        """Make the closed temporary file durable and give it its name."""
        sync_file(self.temporary)
        self.check()
        _keep_mode(self.path, self.temporary)
        replace(self.temporary, self.path)

    def discard(self, *files: _Closable) -> None:
        """Close ``files`` in this order and remove the temporary file."""
        close_quietly(*files)
        self.temporary.unlink(missing_ok=True)


class PendingFolder:
    """A folder that is written under a temporary name; at commit it is exchanged with an earlier output at ``path``.

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
        """Make the temporary folder durable and give it its name.

        The replaced folder is then removed, unless it holds anything that is not part of an earlier output, such as a
        file that came into it since the check: then it stays, set aside under another name.
        """
        # One sync for all: an fsync each would take hours over millions of small files.
        if hasattr(os, "sync"):
            os.sync()
        replaced = _sibling(self.path, REPLACED_SUFFIX)
        if (stranger := _remove_output(replaced)) is not None:
            raise OutputError(
                f"{replaced / stranger} was set aside when an output was replaced; move it to a safe place."
            )
        check_folder(self.path, self._overwrite)
        _keep_mode(self.path, self.temporary)
        if self.path.is_dir():
            exchange(self.temporary, self.path, replaced)
            self.temporary.rename(replaced)
        else:
            self.temporary.rename(self.path)
        sync_folder(self.path.parent)
        _remove_output(replaced)

    def discard(self, *files: _Closable) -> None:
        """Close ``files`` and remove the temporary folder with all in it."""
        close_quietly(*files)
        shutil.rmtree(self.temporary, ignore_errors=True)


def check_file(path: Path, overwrite: bool) -> None:
    """Raise OutputError unless a file may be written at ``path``."""
    _check_parent(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file that can be written.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is a device, a pipe or a socket, which an output would replace; name a file.")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; continue with --resume, replace it with --overwrite, or name another.")


def check_folder(path: Path, overwrite: bool) -> None:
    """Raise OutputError unless a folder may be written at ``path``: none there, an empty one, or an earlier output.

    A folder is overwritten only if its index lists everything in it, so that no other file can be lost.
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
    if (stranger := _foreign_path(path)) is not None:
        raise OutputError(f"{path} holds {stranger}, which is no part of an earlier output; name another folder.")


def close_quietly(*files: _Closable) -> None:
    """Close files that are about to be removed; errors, such as those of a full disk, no longer matter."""
    for file in files:
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            file.close()


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: the folder {path.parent} does not exist; create it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: no permission to write in the folder {path.parent}.")


def _foreign_path(folder: Path) -> str | None:
    """The first path below ``folder`` that is not part of an earlier output, or None. A link is never part of one."""
    known = _listed(folder)
    for parent, folders, files in os.walk(folder):
        for name in files + [name for name in folders if os.path.islink(os.path.join(parent, name))]:
            path = Path(parent, name)
            if (inside := path.relative_to(folder).as_posix()) not in known or not _is_file(path):
                return inside
    return None


def _listed(folder: Path) -> set[str]:
    """The files of an output folder, as its index lists them; empty if its metadata are not those of an output."""
    known = {METADATA, INDEX}
    try:
        if not (_is_file(folder / METADATA) and _is_file(folder / INDEX)):
            return set()
        if not is_metadata((folder / METADATA).read_bytes()):
            return set()
        with (folder / INDEX).open("rb") as lines:
            for record in map(json.loads, lines):
                known.update(path_of(record[key]) for key in ARRAYS if key in record)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()
    return {name for name in known if name in (METADATA, INDEX) or name.endswith(".npy")}


def _remove_output(folder: Path) -> str | None:
    """Remove an earlier output and its folder. If that holds anything else, remove nothing and return that path."""
    if not folder.is_dir():
        return None
    if (stranger := _foreign_path(folder)) is not None:
        return stranger
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(parent, name))
        with contextlib.suppress(OSError):  # something came into it meanwhile
            os.rmdir(parent)
    return None


def is_metadata(content: bytes) -> bool:
    """Whether the content of a ``.json`` file is the metadata of an output."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(told, dict) and told.keys() >= {"layers", "dim"}


def _keep_mode(replaced: Path, replacement: Path) -> None:
    """Give what replaces an output the access rights of what it replaces."""
    with contextlib.suppress(FileNotFoundError):
        replacement.chmod(stat.S_IMODE(replaced.stat().st_mode))


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")
