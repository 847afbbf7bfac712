"""Arrays too large for memory, in files without a name whose room is taken before it is used."""

from __future__ import annotations

import math
import os
import tempfile
from typing import Final

import numpy as np
import numpy.typing as npt

from w2v_models.errors import StorageError

#: Arrays beyond this many bytes are kept in a file.
_IN_MEMORY_BYTES: Final = 256 * 2**20
_ZEROS: Final = bytes(2**20)


def float_array(shape: tuple[int, ...], folder: str | None) -> npt.NDArray[np.float32]:
    """An array of float32 to be filled, in memory if it is small, else in a file of ``folder``.

    A file that is mapped without its room being there ends the process, without a word, when the disk is full as it is
    filled; so all of it is taken at once. The file has no name: it is gone with the array, or the process.

    Args:
        shape: of the array.
        folder: a folder; None is the system's for temporary files.

    Raises:
        StorageError: the folder has no room for it, or cannot be written.
    """
    size = 4 * math.prod(shape)
    if size <= _IN_MEMORY_BYTES:
        return np.empty(shape, np.float32)
    try:
        with tempfile.TemporaryFile(prefix="w2v-frames-", dir=folder) as file:
            _reserve(file.fileno(), size)
            return np.memmap(file, np.float32, "r+", shape=shape)
    except OSError as error:
        raise StorageError(
            f"{folder or tempfile.gettempdir()} cannot take the {size / 2**20:.0f} MiB of frames of a long recording: "
            f"{error.strerror}. Make room there; what is finished is kept."
        ) from error


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    for start in range(0, size, len(_ZEROS)):
        os.write(descriptor, _ZEROS[: size - start])
