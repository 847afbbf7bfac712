"""The protocol :class:`Engine` that every inference engine implements, and the names of devices and precisions."""

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
#: What ONNX Runtime calls its provider for CUDA.
CUDA_PROVIDER: Final = "CUDAExecutionProvider"


class Precision(NamedTuple):
    """The stored precision whose graphs serve a precision, and the devices that compute it, in ``auto``'s order."""

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
    """An opened bundle on a device, which runs the bundle's graphs. Threads may share it."""

    device: str
    #: How many runs to keep in progress at once, so that the engine never waits for the next one.
    concurrency: int

    @property
    def busy_seconds(self) -> float:
        """Seconds so far in which at least one run was in progress."""

    def prepare(self, outputs: Sequence[str], graph: Graph = "graph") -> None:
        """Open the session that computes ``outputs``, so that the first run does not have to.

        Raises:
            BundleError: a file is not what the manifest says, or the engine cannot open it.
        """

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], graph: Graph = "graph", stop: Stop | None = None
    ) -> list[Array]:
        """Run one of the bundle's graphs on named inputs and return the named outputs, in order.

        Only what the outputs need is computed. ``feeds`` may hold inputs that the outputs do not need. ``stop`` ends
        this run from another thread, at once; runs with another ``Stop`` go on.

        Raises:
            OutOfMemoryError: the run does not fit into the device's memory.
            W2VError: the engine failed otherwise, or the run was stopped.
        """


class Stopwatch:
    """Counts the seconds in which at least one thread was inside a ``with stopwatch:`` block."""

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
    """Whether a value is an integer of Python or numpy, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def option(name: str, value: str) -> str:
    """An option as callers write it, for messages: in Python, and on the command line."""
    return f"{name}={value!r} (--{name} {value})"


def stored_precision(precision: str) -> str:
    """The precision of the bundle's graphs that serve ``precision``: ``fp32`` for ``tf32`` and ``bf16``, else itself.

    Raises:
        EngineError: the precision is unknown.
    """
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise EngineError(f"precision {precision!r} is unknown; choose one of: {', '.join(PRECISIONS)}.")
    return PRECISIONS[precision].stored
