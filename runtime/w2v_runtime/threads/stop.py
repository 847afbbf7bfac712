"""The end of one caller's work, and of nobody else's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from w2v_models.errors import W2VError


class Stop:
    """What a caller holds to end its own work, in the engine and on the way there. Threads may share it.

    It has no lock, which another thread might hold while the process is forked: operations on a set are atomic, and
    what is to be ended is noted before it is asked whether it is stopped, so that one of the two sees the other.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._ends: set[Callable[[], None]] = set()

    def stop(self) -> None:
        """End what is in progress, and whatever would begin later."""
        self.stopped = True
        for end in tuple(self._ends):
            end()

    def check(self) -> None:
        """Go on only where the work has not been ended.

        Raises:
            W2VError: it has.
        """
        if self.stopped:
            raise W2VError("The run was stopped.")

    @contextlib.contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """While inside, :meth:`stop` calls ``end``.

        Raises:
            W2VError: it was called before.
        """
        self._ends.add(end)
        try:
            self.check()
            yield
        finally:
            self._ends.discard(end)
