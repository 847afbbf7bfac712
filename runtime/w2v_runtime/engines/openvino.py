"""The OpenVINO engine, on the processor, in fp32 or bf16."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from w2v_models.bundle import Bundle
from w2v_models.errors import BundleError, EngineError, W2VError
from w2v_models.manifest import LOG_MEL_FRONT_END
from w2v_runtime.engines.base import CPU, OPENVINO, Array, Stopwatch, option, stored_precision
from w2v_runtime.engines.openvino_graph import read_graph
from w2v_runtime.graphs.sessions import Graph, GraphFile, Sessions
from w2v_runtime.threads import forks
from w2v_runtime.threads.stop import Stop

DEVICE: Final = "CPU"
PRECISION_HINTS: Final = {"fp32": "f32", "bf16": "bf16"}
FORMATS: Final = ("FP32", "BF16", "FP16", "INT8")
#: How often a waiting thread looks whether its run was stopped.
_POLL_MILLISECONDS: Final = 20
#: Seconds after a run until the threads of OpenVINO's pool sleep and hold none of its locks, so that a fork is safe.
_SETTLING: Final = 0.05
#: Compiled graphs that stay open beside the one that the engine was opened for; each has a copy of its weights.
_RECENT: Final = 2


def load() -> Any:
    """The package ``openvino``, without its telemetry, which would report every import over the network.

    Raises:
        EngineError: OpenVINO cannot be imported.
    """
    try:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO then uses a stub for it
        import openvino

        openvino.Core  # noqa: B018 - a removed wheel leaves a folder that imports and is empty
    except (ImportError, AttributeError) as error:
        raise EngineError(
            f"OpenVINO is damaged ({_reason(error)}): pip install --force-reinstall 'w2v-onnx[openvino]'"
        ) from None
    return openvino


def capabilities(core: Any) -> list[str]:
    """The number formats of :data:`FORMATS` in which OpenVINO computes on this processor."""
    able = core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    return [name for name in FORMATS if name in able]


@dataclass(eq=False)
class _Compiled:
    """A compiled graph, its inputs, and the infer request that runs it; the lock ``turn`` lets one run in at a time.

    A run that was stopped or failed leaves its shapes in the graph and would make the next result wrong: the graph is
    then ``spoiled`` and compiled again.
    """

    request: Any
    inputs: frozenset[str]
    turn: threading.Lock = field(default_factory=threading.Lock)
    spoiled: bool = False


class OpenVINOEngine:
    """Runs the graphs of a bundle, compiled by OpenVINO for the processor.

    Args:
        bundle: the model.
        precision: ``fp32`` or ``bf16``.
        threads: threads of a run.

    Raises:
        BundleError: the bundle lacks the precision.
        EngineError: OpenVINO does not load, the processor has no bfloat16, or the model needs float64, which OpenVINO
            turns into float32.
    """

    def __init__(self, bundle: Bundle, precision: str, threads: int) -> None:
        self._sessions = Sessions(bundle, stored_precision(precision), self._open, _RECENT)
        if bundle.manifest.architecture.front_end == LOG_MEL_FRONT_END:
            model = bundle.manifest.source.model
            raise EngineError(
                f"{model} needs float64 for its log-mel features, which OpenVINO lacks: {option('device', CPU)}."
            )
        self._openvino = load()
        core = self._openvino.Core()
        if precision == "bf16" and "BF16" not in capabilities(core):
            name = core.get_property(DEVICE, "FULL_DEVICE_NAME")
            raise EngineError(
                f"This processor ({name}) does not multiply bfloat16: choose {option('precision', 'fp32')}."
            )
        self._options = {
            "INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
        }
        self.device = OPENVINO
        self.concurrency = 1
        self._busy = Stopwatch()

    @property
    def busy_seconds(self) -> float:
        return self._busy.seconds

    def prepare(self, outputs: Sequence[str], graph: Graph = "graph") -> None:
        self._sessions.get(outputs, graph)

    def _open(self, graph: GraphFile) -> _Compiled:
        try:
            with forks.held_off(_SETTLING):
                model = read_graph(self._openvino, graph.path, graph.outputs)
                compiled = self._openvino.Core().compile_model(model, DEVICE, self._options)
                request = compiled.create_infer_request()
        except Exception as error:  # OpenVINO's exceptions share no base class
            raise BundleError(f"{graph.path} cannot be opened by OpenVINO: {_reason(error)}") from None
        return _Compiled(request, frozenset(value.any_name for value in compiled.inputs))

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], graph: Graph = "graph", stop: Stop | None = None
    ) -> list[Array]:
        stop = stop or Stop()
        while True:
            compiled = self._sessions.get(outputs, graph)
            while not compiled.turn.acquire(timeout=_POLL_MILLISECONDS / 1000):
                stop.check()
            try:
                if not compiled.spoiled:
                    with self._busy, forks.held_off(_SETTLING):
                        return self._run(compiled, feeds, outputs, stop)
            finally:
                compiled.turn.release()

    def _run(self, compiled: _Compiled, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop) -> list[Array]:
        """Run a graph under its lock; if the run fails, drop the graph, so that the next run compiles it again."""
        stop.check()
        try:
            _infer(compiled.request, {name: value for name, value in feeds.items() if name in compiled.inputs}, stop)
            return [compiled.request.get_tensor(name).data.copy() for name in outputs]
        except BaseException as error:
            compiled.spoiled = True
            self._sessions.forget(compiled)
            stop.check()
            if not isinstance(error, Exception):
                raise
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feeds.items())
            raise W2VError(f"The engine failed on {shapes}: {_reason(error)}") from error


def _infer(request: Any, feeds: Mapping[str, Array], stop: Stop) -> None:
    """Run a request and wait for it; it is cancelled if the run is stopped or the wait is interrupted."""
    request.start_async(feeds, share_inputs=True)
    try:
        while not request.wait_for(_POLL_MILLISECONDS):
            if stop.stopped:
                request.cancel()
    except BaseException:
        request.cancel()
        raise


def _reason(error: BaseException) -> str:
    """The line of an error that says what is wrong; the lines before it name positions in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '"))] or lines
    return telling[-1] if telling else type(error).__name__
