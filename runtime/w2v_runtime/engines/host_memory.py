"""Page-locked (pinned) host memory, reused from run to run, for the copies of inputs to a GPU."""

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
#: Allocates a buffer of a size in bytes.
Allocate = Callable[[int], Bytes]

#: The alignment in bytes of arrays in a buffer, for vector instructions.
_ALIGNMENT: Final = 64


def page_locked(cudart: Any, device: int) -> Allocate:
    """An allocator of page-locked memory, which a GPU reads several times as fast as pageable memory.

    The memory is freed with the process: buffers only grow, and few times. If the driver refuses, pageable memory is
    allocated.

    Args:
        cudart: the CUDA runtime library, loaded.
        device: the GPU's number, so that no context is created on another GPU.
    """

    def allocate(size: int) -> Bytes:
        pointer = ctypes.c_void_p()
        refused = cudart.cudaSetDevice(device) or cudart.cudaHostAlloc(ctypes.byref(pointer), ctypes.c_size_t(size), 0)
        if refused or not pointer.value:
            return pageable(size)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer.value))

    return allocate


def pageable(size: int) -> Bytes:
    """Ordinary memory: (size,) uint8."""
    return np.empty(size, np.uint8)


class Buffer:
    """Memory that holds copies of a run's arrays, reused by the next run; it grows to the largest run."""

    def __init__(self, allocate: Allocate) -> None:
        self._allocate, self._bytes = allocate, pageable(0)

    def filled(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Copy arrays into this buffer and return the copies, which the next call overwrites."""
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
    """A pool of buffers; each run in progress borrows one."""

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._idle: deque[Buffer] = deque()

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[Buffer]:
        """Yield a buffer that no other run uses; it returns to the pool afterwards."""
        try:
            buffer = self._idle.pop()
        except IndexError:
            buffer = Buffer(self._allocate)
        try:
            yield buffer
        finally:
            self._idle.append(buffer)
