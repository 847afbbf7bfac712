"""What the runtime asks of an engine, and the names of devices and precisions."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Final, NamedTuple, Protocol

import numpy.typing as npt

from w2v_models.errors import EngineError
from w2v_runtime.graphs.sessions import Graph
from w2v_runtime.threads import forks
from w2v_runtime.threads.stop import Stop

Array = npt.NDArray[Any]

AUTO: Final = "auto"
CPU: Final = "cpu"
CUDA: Final = "cuda"
OPENVINO: Final = "openvino"


class Precision(NamedTuple):
    """Which of a bundle's graphs serve a precision, and the devices that compute it, in the order of ``auto``."""

    stored: str
    devices: tuple[str, ...]


PRECISIONS: Final = {
    "fp32": Precision("fp32", (CUDA, CPU, OPENVINO)),
    "tf32": Precision("fp32", (CUDA,)),
    "bf16": Precision("fp32", (OPENVINO,)),
    "fp16": Precision("fp16", (CUDA, CPU)),
    "int8": Precision("int8", (CPU,)),
}


class Engine(Protocol):
    """What the runtime asks of an engine. Threads may share it."""

    device: str
    #: Runs that may be in progress at once, so that it never waits for the next.
    concurrency: int

    @property
    def busy_seconds(self) -> float:
        """Seconds in which a run was in progress so far."""

    def prepare(self, outputs: Sequence[str], graph: Graph = "graph") -> None:
        """Open what computes ``outputs``, so that the first run does not have to.

        Raises:
            BundleError: a file is not what the manifest says, or the engine cannot open it.
        """

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], graph: Graph = "graph", stop: Stop | None = None
    ) -> list[Array]:
        """Run one of the bundle's graphs on named inputs and return the named outputs, in order.

        Nothing is computed that the outputs do not need. Inputs that they do not need may be given all the same.
        ``stop`` ends it from another thread, at once; the runs of others go on.

        Raises:
            OutOfMemoryError: the device's memory does not hold the run.
            W2VError: the engine failed otherwise, or the run was stopped.
        """


class Stopwatch:
    """Seconds in which at least one of several threads was inside: ``with stopwatch: …``."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.renew()
        forks.renew_in_child(self)

    def renew(self) -> None:
        self._lock, self._inside, self._start = threading.Lock(), 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._start = time.perf_counter()
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.seconds += time.perf_counter() - self._start


def is_whole(value: object) -> bool:
    """Whether it is an integer, of Python's or numpy's."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def option(name: str, value: str) -> str:
    """What callers write: in Python, and on the command line."""
    return f"{name}={value!r} (--{name} {value})"


def stored_precision(precision: str) -> str:
    """The precision of the stored graphs that serve ``precision``.

    Raises:
        EngineError: there is no such precision.
    """
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise EngineError(f"precision {precision!r} is unknown; choose one of: {', '.join(PRECISIONS)}.")
    return PRECISIONS[precision].stored
