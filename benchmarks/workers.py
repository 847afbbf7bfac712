"""A process that holds something open and answers one request at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self


class WorkerError(Exception):
    """What went wrong in the process: one line, fit for a table."""


class Worker:
    """Opens ``open(*arguments)`` in a fresh process and calls that object's methods there.

    Each engine has its threads and its memory to itself, and none is in the way of another's.

    Raises:
        WorkerError: it cannot be opened.
    """

    def __init__(self, open: Callable[..., Any], *arguments: object) -> None:  # noqa: A002
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, open, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def ask(self, method: str, *arguments: object) -> Any:
        """Call a method of the opened object.

        Raises:
            WorkerError: it failed, or the process is gone.
        """
        self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self.process.join()
            raise WorkerError(f"ended with exit code {self.process.exitcode}") from None
        if isinstance(answer, WorkerError):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self.process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(pipe: Connection, open: Callable[..., Any], arguments: tuple[object, ...]) -> None:  # noqa: A002
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # engines' chatter; what matters is sent
    try:
        opened = open(*arguments)
        pipe.send(None)
        while True:
            method, details = pipe.recv()
            pipe.send(getattr(opened, method)(*details))
    except EOFError:
        return
    except Exception as error:
        pipe.send(WorkerError((str(error) or type(error).__name__).splitlines()[0]))
