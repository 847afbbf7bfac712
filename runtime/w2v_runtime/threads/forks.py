"""What a forked process cannot take over: locks that no thread of it releases, engines whose threads it lacks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Final, Protocol

#: Seconds that a fork waits at most for what runs in an engine; it then takes place all the same.
_PATIENCE: Final = 60.0


class Renewed(Protocol):
    """Something that begins anew in a forked process."""

    def renew(self) -> None:
        """Called in the child before anything else runs there."""


_RENEWED: Final[weakref.WeakSet[Renewed]] = weakref.WeakSet()


def renew_in_child(holder: Renewed) -> None:
    """Have ``holder.renew()`` called in every process that is forked from this one, for as long as it lives."""
    _RENEWED.add(holder)


def abandon(native: object) -> None:
    """Never destroy an object: its destructor would wait for threads that a forked process does not have."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))


class _Quiet:
    """Keeps forks and native code apart, whose own locks a child would find locked and its structures half changed."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self._lock, self._inside, self._forking, self._settled = threading.Lock(), 0, 0, 0.0
        self._changed = threading.Condition(self._lock)

    def enter(self) -> None:
        with self._lock:
            self._changed.wait_for(lambda: self._forking <= 0)
            self._inside += 1

    def leave(self, settling: float) -> None:
        with self._lock:
            self._inside -= 1
            self._settled = max(self._settled, time.monotonic() + settling)
            self._changed.notify_all()

    def before_fork(self) -> None:
        with self._lock:
            self._forking += 1
            self._changed.wait_for(lambda: self._inside <= 0, _PATIENCE)
        time.sleep(max(0.0, self._settled - time.monotonic()))

    def after_fork(self) -> None:
        with self._lock:
            self._forking -= 1
            self._changed.notify_all()


_QUIET: Final = _Quiet()


@contextlib.contextmanager
def held_off(settling: float = 0.0) -> Iterator[None]:
    """While inside, on this thread or another, no process is forked; a fork waits. Not to be nested.

    Args:
        settling: seconds that a fork waits after the end, for threads of the native code that go to rest behind it.
    """
    _QUIET.enter()
    try:
        yield
    finally:
        _QUIET.leave(settling)


def _renew_all() -> None:
    _QUIET.renew()
    holders: list[Any] = list(_RENEWED)
    for holder in holders:
        holder.renew()


os.register_at_fork(before=_QUIET.before_fork, after_in_parent=_QUIET.after_fork, after_in_child=_renew_all)
