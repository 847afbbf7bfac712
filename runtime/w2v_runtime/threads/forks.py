"""Make forks safe: a forked process renews its locks, and opens engines again, whose threads it lacks.

A fork also waits while native code is at work (:func:`held_off`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Final, Protocol

#: The most seconds that a fork waits for native code to finish; then it takes place nevertheless.
_MAX_WAIT_SECONDS: Final = 60.0


class Renewed(Protocol):
    """An object whose state is renewed in a forked process."""

    def renew(self) -> None:
        """Replace locks and other state; called in the child before anything else runs there."""


_RENEWED: Final[weakref.WeakSet[Renewed]] = weakref.WeakSet()


def renew_in_child(holder: Renewed) -> None:
    """Have ``holder.renew()`` called in every process forked from this one, as long as ``holder`` lives."""
    _RENEWED.add(holder)


def abandon(native: object) -> None:
    """Leak an object on purpose: its destructor would wait for threads that a forked process does not have."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))


class _ForkGate:
    """Delays forks while native code is at work: a child would find its locks held and its structures half changed."""

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
            self._changed.wait_for(lambda: self._inside <= 0, _MAX_WAIT_SECONDS)
        time.sleep(max(0.0, self._settled - time.monotonic()))

    def after_fork(self) -> None:
        with self._lock:
            self._forking -= 1
            self._changed.notify_all()


_FORK_GATE: Final = _ForkGate()


@contextlib.contextmanager
def held_off(settling: float = 0.0) -> Iterator[None]:
    """Delay every fork, by any thread, until the block ends. Blocks must not be nested.

    Args:
        settling: seconds that a fork waits after the block, until threads of the native code have gone to sleep.
    """
    _FORK_GATE.enter()
    try:
        yield
    finally:
        _FORK_GATE.leave(settling)


def _renew_all() -> None:
    _FORK_GATE.renew()
    holders: list[Any] = list(_RENEWED)
    for holder in holders:
        holder.renew()


os.register_at_fork(before=_FORK_GATE.before_fork, after_in_parent=_FORK_GATE.after_fork, after_in_child=_renew_all)
