"""Arrays too large for memory, in unnamed temporary files whose disk space is reserved at once."""

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
    """An uninitialised float32 array: in memory up to ``_IN_MEMORY_BYTES``, else memory-mapped to a file in ``folder``.

    The file's disk space is reserved at once: a write to a mapped page for which the full disk has no space would kill
    the process without a message. The file has no name, so it vanishes with the array or the process.

    Args:
        shape: the array's shape.
        folder: the folder of the file; None for the system's temporary folder.

    Raises:
        StorageError: the folder has not enough space, or cannot be written.
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
