"""Stop the work of one caller, and of no other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from w2v_models.errors import W2VError


class Stop:
    """A handle by which a caller stops its own work, in an engine or waiting for one. Threads may share it.

    It has no lock, since another thread might hold that while the process is forked. Instead, operations on a set are
    atomic, and :meth:`ending` adds its function before it checks ``stopped``: so :meth:`stop` calls the function, or
    the check raises, or both.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._ends: set[Callable[[], None]] = set()

    def stop(self) -> None:
        """Stop the work that is in progress, and refuse all that would begin later."""
        self.stopped = True
        for end in tuple(self._ends):
            end()

    def check(self) -> None:
        """Raise if the work was stopped.

        Raises:
            W2VError: :meth:`stop` was called.
        """
        if self.stopped:
            raise W2VError("The run was stopped.")

    @contextlib.contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """Have :meth:`stop` call ``end`` if it is called while the block runs.

        Raises:
            W2VError: :meth:`stop` was called before.
        """
        self._ends.add(end)
        try:
            self.check()
            yield
        finally:
            self._ends.discard(end)
