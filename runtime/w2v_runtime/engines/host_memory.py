"""Memory of the host that feeds go through on their way to a GPU: page-locked, and used again."""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
#: Allocates so many bytes.
Allocate = Callable[[int], Bytes]

#: Where arrays start in a buffer, as vector instructions like it.
_ALIGNMENT: Final = 64


def page_locked(cudart: Any, device: int) -> Allocate:
    """An allocator of memory that GPUs read themselves, several times as fast as memory that may be swapped out.

    Args:
        cudart: the CUDA runtime library, loaded.
        device: the GPU's number, so that no other one is set up for it.

    What it allocates is freed with the process: buffers only grow, and few times. Where the driver refuses, the memory
    is of the usual kind.
    """

    def allocate(size: int) -> Bytes:
        pointer = ctypes.c_void_p()
        refused = cudart.cudaSetDevice(device) or cudart.cudaHostAlloc(ctypes.byref(pointer), ctypes.c_size_t(size), 0)
        if refused or not pointer.value:
            return pageable(size)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer.value))

    return allocate


def pageable(size: int) -> Bytes:
    """Memory of the usual kind."""
    return np.empty(size, np.uint8)


class Buffer:
    """Bytes that arrays are laid out in, one set after the other."""

    def __init__(self, allocate: Allocate) -> None:
        self._allocate, self._bytes = allocate, pageable(0)

    def filled(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Copies of arrays in this buffer, which the next call overwrites."""
        places, size = {}, 0
        for name, array in arrays.items():
            places[name] = size
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > len(self._bytes):
            self._bytes = self._allocate(size)
        copies = {}
        for name, array in arrays.items():
            part = self._bytes[places[name] : places[name] + array.nbytes]
            copies[name] = part.view(array.dtype).reshape(array.shape)
            np.copyto(copies[name], array)
        return copies


class Buffers:
    """Buffers for runs in progress; a run borrows one for as long as it takes."""

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._idle: deque[Buffer] = deque()

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[Buffer]:
        try:
            buffer = self._idle.pop()
        except IndexError:
            buffer = Buffer(self._allocate)
        try:
            yield buffer
        finally:
            self._idle.append(buffer)
