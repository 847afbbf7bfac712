"""Compute the items of an iterator a few ahead of their use, on a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from functools import partial
from typing import Final, TypeVar

from w2v_runtime.threads.stop import Stop
from w2v_runtime.threads.workers import Task, Workers

Item = TypeVar("Item")
_END: Final = object()


def ahead(items: Generator[Item, None, None], count: int, name: str) -> Generator[Item, None, None]:
    """Yield the items of a generator, of which a thread named ``name`` computes up to ``count`` ahead.

    What the generator raises is raised here in its place. Leaving early ends the thread and closes the generator.
    """
    stop = Stop()
    worker = Workers(1, name, stop)
    waiting: deque[Task[Item | object]] = deque()
    try:
        for _ in range(count):
            waiting.append(worker.submit(partial(next, items, _END)))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(worker.submit(partial(next, items, _END)))
            yield item  # type: ignore[misc]
    finally:
        stop.stop()
        worker.close()
        items.close()
