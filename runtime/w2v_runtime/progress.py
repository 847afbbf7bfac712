"""A line of progress on a terminal: files and hours done, times real time, time left."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from w2v_runtime.inputs import Shard

if TYPE_CHECKING:
    from w2v_runtime.summary import Summary

Progress = Callable[["Summary"], None]


class Listed(Protocol):
    """Inputs that are listed while they are used."""

    def total(self) -> int | None:
        """How many there are, once all are listed; None if that is never known."""


@contextlib.contextmanager
def shown(inputs: Listed, shard: Shard, hidden: bool) -> Iterator[Progress]:
    """Show a run's progress on standard error while the block runs; nothing where that is no terminal."""
    if hidden or not sys.stderr.isatty():
        yield lambda summary: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, Task, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    latest: list[Summary] = []
    start = time.monotonic()

    class Work(ProgressColumn):
        """What is done, also within a long recording, as often as the bar is drawn."""

        def render(self, task: Task) -> Text:  # noqa: ARG002
            return Text(_done(latest[-1], time.monotonic() - start) if latest else "files")

    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), Work(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("files", total=None)

        def count() -> None:
            total = inputs.total()
            bar.update(task, total=None if total is None else shard.size(total))

        threading.Thread(target=count, daemon=True).start()

        def update(summary: Summary) -> None:
            latest[:] = [summary]
            bar.update(task, completed=summary.done)

        yield update


def _done(summary: Summary, elapsed: float) -> str:
    seconds = summary.audio_seconds + summary.running_seconds
    text = f"files · {seconds / 3600:.2f} h · {seconds / max(elapsed, 1e-9):.1f} × real time"
    return f"{text} · {summary.failed} failed" if summary.failed else text
