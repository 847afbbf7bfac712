"""Several devices as one engine."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from w2v_runtime.engine import Array, Engine, Graph, Stopwatch


class SeveralEngines:
    """Engines that share the work: each run goes to the one with the fewest in progress.

    Args:
        engines: of one bundle in one precision, on devices of one kind.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = tuple(engines)
        self._running = [0] * len(self._engines)
        self._choosing = threading.Lock()
        self._busy = Stopwatch()
        self.device = self._engines[0].device
        self.runs = sum(engine.runs for engine in self._engines)
        self.stopped = False

    @property
    def busy_seconds(self) -> float:
        return self._busy.seconds

    def prepare(self, outputs: Sequence[str], graph: Graph = "graph") -> None:
        for engine in self._engines:
            engine.prepare(outputs, graph)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str], graph: Graph = "graph") -> list[Array]:
        with self._choosing:
            idlest = self._running.index(min(self._running))
            self._running[idlest] += 1
        try:
            with self._busy:
                return self._engines[idlest].run(feeds, outputs, graph)
        finally:
            with self._choosing:
                self._running[idlest] -= 1

    def stop(self) -> None:
        self.stopped = True
        for engine in self._engines:
            engine.stop()

    def start(self) -> None:
        self.stopped = False
        for engine in self._engines:
            engine.start()
