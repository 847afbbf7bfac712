"""Files and names that outlive a power cut."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


def flush(file: BinaryIO) -> None:
    """Bring what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Bring a closed file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk: new files, renames, removals.

    Some network file systems and Windows refuse to sync a folder; nothing more can be done there.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace(temporary: Path, path: Path) -> None:
    """Give a synced file the name ``path``, in place of what has it, for good.

    Raises:
        OSError: the rename failed; both files are as they were.
    """
    temporary.replace(path)
    sync_folder(path.parent)
