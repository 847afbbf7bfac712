"""A pool of worker threads for one run, which end with it, also when the waiting thread is interrupted (Ctrl-C).

``concurrent.futures`` is not used: its threads share locks with the waiting thread, and Ctrl-C inside its Python code
can leave a lock held for good, so that neither the threads nor the process end. A ``SimpleQueue`` and plain locks are
taken and released within one instruction.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from w2v_runtime.threads.stop import Stop

Result = TypeVar("Result")
#: Seconds between two checks of a waiting thread whether its run was stopped.
_POLL_SECONDS: Final = 0.5


class Task(Generic[Result]):
    """A call that a thread makes, and its result."""

    def __init__(self, call: Callable[[], Result], stop: Stop) -> None:
        self._call, self._stop = call, stop
        self._error: BaseException | None = None
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """Make the call."""
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
        finally:
            self._running.release()

    @property
    def done(self) -> bool:
        """Whether the call has returned or raised."""
        return not self._running.locked()

    def result(self) -> Result:
        """Wait for the call; return its result, or raise its exception.

        Raises:
            W2VError: the run was stopped meanwhile.
        """
        while not self._running.acquire(timeout=_POLL_SECONDS):
            self._stop.check()
        self._running.release()
        if self._error is not None:
            raise self._error
        return self._result


class Workers:
    """Up to ``count`` threads, started as tasks are submitted. They end with ``stop``, or with the process."""

    def __init__(self, count: int, name: str, stop: Stop) -> None:
        self._count, self._name, self._stop = count, name, stop
        self._tasks: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, call: Callable[[], Result]) -> Task[Result]:
        """Queue a call for the next free thread."""
        task = Task(call, self._stop)
        self._tasks.put(task)
        if len(self._threads) < self._count:
            self._threads.append(threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}"))
            self._threads[-1].start()
        return task

    def close(self) -> None:
        """Wait for the threads to end; call :meth:`Stop.stop` first."""
        for _ in self._threads:
            self._tasks.put(None)  # wakes a waiting thread
        for thread in self._threads:
            with contextlib.suppress(RuntimeError):  # this thread itself, or one whose start was interrupted
                thread.join()

    def _work(self) -> None:
        while not self._stop.stopped:
            try:
                task = self._tasks.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if not threading.main_thread().is_alive():
                    self._stop.stop()  # else these threads would keep the process from ending
                continue
            if task is not None:
                task.run()
