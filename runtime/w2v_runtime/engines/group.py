"""Several GPUs (``--device cuda:0,cuda:1``) as one engine."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from w2v_runtime.engines.base import Array, Engine, Stopwatch
from w2v_runtime.graphs.sessions import Graph
from w2v_runtime.threads import forks
from w2v_runtime.threads.stop import Stop


class SeveralEngines:
    """Distributes runs over several engines: each run goes to the engine with the fewest runs in progress.

    Args:
        engines: engines of one bundle in one precision, on devices of one kind.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = tuple(engines)
        self._busy = Stopwatch()
        self.device = self._engines[0].device
        self.concurrency = sum(engine.concurrency for engine in self._engines)
        self.renew()
        forks.renew_in_child(self)

    def renew(self) -> None:
        self._running, self._choosing = [0] * len(self._engines), threading.Lock()

    @property
    def busy_seconds(self) -> float:
        return self._busy.seconds

    def prepare(self, outputs: Sequence[str], graph: Graph = "graph") -> None:
        for engine in self._engines:
            engine.prepare(outputs, graph)

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], graph: Graph = "graph", stop: Stop | None = None
    ) -> list[Array]:
        with self._choosing:
            idlest = self._running.index(min(self._running))
            self._running[idlest] += 1
        try:
            with self._busy:
                return self._engines[idlest].run(feeds, outputs, graph, stop)
        finally:
            with self._choosing:
                self._running[idlest] -= 1
