"""Give freed memory back to the system, so that an export takes little more than its weights."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def release() -> None:
    """Free what nobody refers to, and return what the C library keeps of freed memory."""
    gc.collect()
    _trim()


def releasing(parts: Iterable[T]) -> Iterator[T]:
    """Iterate over the parts of a model, and give back what the work on one has freed before the next."""
    for part in parts:
        yield part
        _trim()


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):  # glibc's; other C libraries keep less
        ctypes.CDLL(None).malloc_trim(0)
