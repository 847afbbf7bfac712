"""Exchange two folders atomically where the system can, so that a reader, or a kill, always finds a whole folder."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

#: Constants of Linux: ``AT_FDCWD`` in <fcntl.h>, ``RENAME_EXCHANGE`` in <linux/fs.h>.
_AT_FDCWD: Final = -100
_EXCHANGE: Final = 2


def exchange(first: Path, second: Path, aside: Path) -> None:
    """Exchange two folders with the same parent: in one step if kernel and file system can.

    Otherwise it takes three renames, with ``second`` moved to ``aside`` meanwhile. After a kill between the first two
    renames ``second`` is missing, and renaming ``aside`` to ``second`` restores it.

    Raises:
        OSError: the folders cannot be renamed; both are as they were.
    """
    if exchanged_at_once(first, second):
        return
    second.rename(aside)
    try:
        first.rename(second)
    except OSError:
        aside.rename(second)
        raise
    aside.rename(first)


def exchanged_at_once(first: Path, second: Path) -> bool:
    """Exchange two paths with ``renameat2``; False if the system cannot, and then nothing was changed."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE) == 0)
