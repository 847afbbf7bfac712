"""The progress of a run: a bar on a terminal, or a line every few minutes in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from w2v_runtime.commands import terminal
from w2v_runtime.runs.summary import Summary

if TYPE_CHECKING:
    from rich.progress import Task

Progress = Callable[[Summary], None]
#: Seconds between two lines in a log.
_LOG_SECONDS: Final = 300.0


class Listed(Protocol):
    """Inputs that are listed while they are used."""

    def total(self) -> int | None:
        """Wait until all inputs are listed, and return the number to embed; None if that is never known."""


class _State:
    """The state of a run that a bar or a log shows: its latest summary, and the number of inputs once that is known."""

    def __init__(self, inputs: Listed) -> None:
        self.summary = Summary()
        self._inputs = inputs
        self._listed: int | None = None
        self._start = time.monotonic()
        threading.Thread(target=self._count, name="w2v-count", daemon=True).start()

    def _count(self) -> None:
        self._listed = self._inputs.total()

    @property
    def total(self) -> int | None:
        """The inputs of the present stage; None while they are still being listed."""
        return self.summary.results if self.summary.stage == "writing" else self._listed

    def words(self) -> str:
        """The text behind the count of inputs: the stage, or hours of audio, speed and failures."""
        summary = self.summary
        if summary.stage != "embedding":
            return f"{summary.one}s · {summary.stage}"
        seconds = summary.audio_seconds + summary.running_seconds
        rate = seconds / max(time.monotonic() - self._start, 1e-9)
        text = f"{summary.one}s · {seconds / 3600:.2f} h · {rate:.1f} × real time"
        if summary.windowed:
            text = f"{text} · {summary.windowed} in windows"
        return f"{text} · {summary.failed} failed" if summary.failed else text


@contextlib.contextmanager
def shown(name: str, inputs: Listed, hidden: bool) -> Iterator[Progress]:
    """Show a run's progress on standard error while the block runs; in a log each line begins with ``name``."""
    if hidden:
        yield lambda summary: None
        return
    state = _State(inputs)
    with _bar(state) if sys.stderr.isatty() else _log(name, state) as update:
        yield update


@contextlib.contextmanager
def _log(name: str, state: _State) -> Iterator[Progress]:
    """A line every few minutes, however long one recording takes."""
    ended = threading.Event()

    def write() -> None:
        while not ended.wait(_LOG_SECONDS):
            of = "" if state.total is None else f" of {state.total}"
            terminal.say(name, f"{state.summary.done}{of} {state.words()}")

    def update(summary: Summary) -> None:
        state.summary = summary

    thread = threading.Thread(target=write, name="w2v-log", daemon=True)
    thread.start()
    try:
        yield update
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _bar(state: _State) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Count(ProgressColumn):
        """A column with the number of inputs done, their total, and the text of :meth:`_State.words`."""

        def render(self, task: Task) -> Text:  # noqa: ARG002
            total = "?" if state.total is None else state.total
            return Text(f"{state.summary.done}/{total} {state.words()}")

    columns = (SpinnerColumn(), BarColumn(), Count(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        stage, task = state.summary.stage, bar.add_task("", total=None)

        def update(summary: Summary) -> None:
            nonlocal stage, task
            state.summary = summary
            if summary.stage != stage:  # a task of its own, so that its time left is reckoned by its own pace
                bar.remove_task(task)
                stage, task = summary.stage, bar.add_task("", total=None)
            bar.update(task, completed=summary.done, total=state.total)

        yield update
