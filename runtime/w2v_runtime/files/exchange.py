"""Two folders change places, so that whoever looks, and whenever the process is killed, finds a whole one."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

#: Of Linux: ``AT_FDCWD`` in <fcntl.h>, ``RENAME_EXCHANGE`` in <linux/fs.h>.
_HERE: Final = -100
_EXCHANGE: Final = 2


def exchange(first: Path, second: Path, aside: Path) -> None:
    """Let two folders with the same parent change places: in one step where kernel and file system can.

    Elsewhere it takes three renames, with ``second`` set ``aside`` meanwhile. After a kill between the first two of
    them nothing stands at ``second``, and renaming ``aside`` brings back what did.

    Raises:
        OSError: they cannot be renamed; both are as they were.
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
    """Exchange two paths with ``renameat2``; False where that is not to be had, and nothing was done."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0)
