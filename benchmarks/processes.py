"""How a measured process is started: a command that runs to its end, or an object that is held open and asked.

Each is a fresh process, so that an engine has its threads and its memory to itself. A child's peak memory counts from
that of its parent, so nothing heavy is imported or computed in the process that measures.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from w2v_runtime.threads.processors import available

#: Modules of the commands of this package.
W2V_EMBED, W2V_EXPORT, W2V_MODELS = "w2v_runtime.commands.embed", "w2v_export.cli", "w2v_runtime.commands.models"
#: Seconds before a turn in which threads of the turn before stop waiting for work; ONNX Runtime's do so for 0.04 s.
PAUSE = 0.1

Figure = TypeVar("Figure")
#: Why somebody has no figure, by name.
Skipped = dict[str, str]


class ProcessError(Exception):
    """What went wrong in a process: one line, fit for a table."""


class Finished(NamedTuple):
    """A command that ran: wall seconds, peak memory in bytes, and what it said on standard error."""

    seconds: float
    peak: int
    said: str


def command(module: str, *arguments: object) -> list[str]:
    """The words that run a command of this package."""
    return [sys.executable, "-c", f"from {module} import main; main()", *map(str, arguments)]


def run(words: Sequence[str]) -> Finished:
    """Run a command to its end; a failure raises ProcessError with the last line that it said."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read().decode().strip()
    if status:
        last = said.rpartition("\n")[2].split(": ", 1)[-1]
        raise ProcessError(last or f"ended with exit code {process.returncode}")
    return Finished(seconds, usage.ru_maxrss * 1024, said)


class Worker:
    """Opens ``open(*arguments)`` in a process and calls that object's methods there; failures raise ProcessError."""

    def __init__(self, open: Callable[..., Any], *arguments: object) -> None:  # noqa: A002
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _silence)
        try:
            self.ask(open, *arguments)
        except ProcessError:
            self.close()
            raise

    def ask(self, method: str | Callable[..., Any], *arguments: object) -> Any:
        """Call a method of the opened object, by its name."""
        try:
            return self._pool.submit(_answer, method, arguments).result()
        except BrokenProcessPool:
            raise ProcessError("the process crashed, or was killed") from None

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns in a process of its own; a failure raises ProcessError."""
    with closing(Worker(partial, function, *arguments)) as worker:
        return worker.ask("__call__")


_opened: Any = None


def _silence() -> None:
    for stream in (1, 2):  # engines' chatter; what matters is sent
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _answer(what: str | Callable[..., Any], arguments: tuple[object, ...]) -> Any:
    """In the worker's process: open something, or call a method of what is open."""
    global _opened
    try:
        if isinstance(what, str):
            return getattr(_opened, what)(*arguments)
        _opened = what(*arguments)
    except Exception as error:  # some engines' exceptions cannot be sent
        raise ProcessError((str(error) or type(error).__name__).splitlines()[0]) from None


def in_rounds(entrants: Mapping[str, Callable[[], Figure]], rounds: int, skipped: Skipped) -> dict[str, list[Figure]]:
    """In every round one turn for each entrant, in an order drawn anew; who fails is left out, with the reason."""
    figures: dict[str, list[Figure]] = {name: [] for name in entrants if name not in skipped}
    chance = random.Random(0)
    for _ in range(rounds):
        for name in chance.sample(list(figures), len(figures)):
            time.sleep(PAUSE)
            try:
                figures[name].append(entrants[name]())
            except ProcessError as error:
                skipped[name] = str(error)
                del figures[name]
    return figures


def work_folder() -> Path:
    """Where models and audio are kept from one benchmark to the next.

    Every process started from here on has caches of its own there, byte code as an installation has it, and no network.
    """
    work = Path(os.environ.get("W2V_BENCH_DIR", Path(tempfile.gettempdir()) / "w2v-bench")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "cache" / "inductor")
    os.environ["OMP_NUM_THREADS"] = str(available())
    os.environ["HF_HUB_OFFLINE"] = "1"
    return work
