"""Items computed ahead on a thread: in order, no more than asked for, and gone when they are no longer wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from w2v_runtime.threads.ahead import ahead

NAME = "w2v-test-ahead"


def numbers(made: list[int], closed: threading.Event, count: int = 100) -> Generator[int, None, None]:
    try:
        for i in range(count):
            made.append(i)
            yield i
    finally:
        closed.set()


def running() -> bool:
    return any(thread.name.startswith(NAME) for thread in threading.enumerate())


def test_items_come_in_order_and_a_few_ahead():
    made, closed = list[int](), threading.Event()
    items = ahead(numbers(made, closed), 3, NAME)
    assert next(items) == 0
    time.sleep(0.2)
    assert made == [0, 1, 2, 3]
    assert [0, *items] == list(range(100))
    assert closed.is_set()
    assert not running()


def test_leaving_early_ends_the_thread_and_closes_the_generator():
    made, closed = list[int](), threading.Event()
    items = ahead(numbers(made, closed), 3, NAME)
    next(items)
    items.close()
    assert closed.is_set()
    assert not running()
    assert len(made) <= 5


def test_an_exception_comes_in_its_place():
    def failing() -> Generator[int, None, None]:
        yield 1
        raise LookupError("no more")

    items = ahead(failing(), 4, NAME)
    assert next(items) == 1
    with pytest.raises(LookupError, match="no more"):
        next(items)
    assert not running()
