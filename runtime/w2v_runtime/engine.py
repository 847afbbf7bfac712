"""Inference engines: a bundle, a device and a precision in, arrays out. The one place that knows providers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Protocol

import numpy.typing as npt

from w2v_models.bundle import Bundle
from w2v_models.errors import BundleError, EngineError, W2VError
from w2v_models.manifest import FileRecord
from w2v_runtime import processors

Array = npt.NDArray[Any]

#: The first release whose CPU provider honours ``nonpad_kv_seqlen`` of Attention; 1.24 attends to the padding.
_OLDEST: Final = (1, 25)
#: Wheels that all install the import package ``onnxruntime``, over each other.
_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE, the default, searches again for every new length
    "arena_extend_strategy": "kSameAsRequested",
    "use_tf32": "0",
}


Graph = Literal["graph", "windows", "head"]


class Engine(Protocol):
    """What the runtime asks of an engine. Threads may share it."""

    device: str
    #: Seconds spent inside the engine so far.
    busy_seconds: float
    #: Whether :meth:`stop` was called and :meth:`start` not since.
    stopped: bool

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str], graph: Graph = "graph") -> list[Array]:
        """Run one of the bundle's graphs on named inputs and return the named outputs, in order.

        Raises:
            W2VError: the engine failed, or was stopped.
        """

    def stop(self) -> None:
        """Make a run in progress on another thread, and every later one, fail at once."""

    def start(self) -> None:
        """Run again after :meth:`stop`."""


def open_engine(bundle: Bundle, device: str = "auto", precision: str = "fp32", threads: int | None = None) -> Engine:
    """Check the bundle's files and open its graph on a device.

    Raises:
        BundleError: the bundle lacks the precision, or a file of it is not what the manifest says.
        EngineError: no engine is installed, several are on top of each other, or the device cannot be had.
    """
    check_installation()
    return OnnxRuntimeEngine(bundle, precision, _providers(device), threads or processors.available())


def check_installation() -> None:
    """Refuse to work without an engine, or with two wheels of ONNX Runtime on top of each other.

    Raises:
        EngineError: with the command that mends it.
    """
    installed = [name for name in _WHEELS if installed_version(name)]
    if len(installed) > 1:
        keep = "gpu" if "onnxruntime-gpu" in installed else "cpu"
        raise EngineError(
            f"{' and '.join(installed)} overwrite each other; keep one: "
            f"pip uninstall -y {' '.join(installed)} && pip install 'w2v-onnx[{keep}]'"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise EngineError("No inference engine is installed: pip install 'w2v-onnx[cpu]', or [gpu] for CUDA.")
    import onnxruntime

    version: str = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        raise EngineError(
            f"ONNX Runtime {version} computes padded batches wrongly; {needed} is needed: "
            f"pip install -U '{(installed or ['onnxruntime'])[0]}>={needed}'"
        )


def installed_version(distribution: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers(device: str) -> list[tuple[str, dict[str, str]]]:
    """The providers to ask for, best first; ``auto`` takes CUDA where this build of ONNX Runtime has it."""
    import onnxruntime

    kind, _, index = device.partition(":")
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    cuda = ("CUDAExecutionProvider", _CUDA_OPTIONS | {"device_id": index or "0"})
    cpu: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
    if kind == "cpu" and not index:
        return [cpu]
    if kind == "auto" and not index:
        return [cuda, cpu] if has_cuda else [cpu]
    if kind == "cuda" and (not index or index.isdecimal()):
        if not has_cuda:
            raise EngineError(
                "This build of ONNX Runtime has no CUDA: pip uninstall -y onnxruntime && pip install 'w2v-onnx[gpu]'"
            )
        return [cuda, cpu]
    if kind == "openvino":
        raise EngineError("The openvino engine is not part of this release; use --device cpu, cuda or auto.")
    raise EngineError(f"device {device!r} is unknown; choose one of: auto, cpu, cuda, cuda:N, openvino.")


class OnnxRuntimeEngine:
    """Sessions of ONNX Runtime, one a graph; those for windows and head are opened when first needed."""

    def __init__(
        self, bundle: Bundle, precision: str, providers: list[tuple[str, dict[str, str]]], threads: int
    ) -> None:
        import onnxruntime

        self._bundle, self._entry = bundle, bundle.precision(precision)
        self._providers, self._threads = providers, threads
        self._cuda = providers[0][0] == "CUDAExecutionProvider"
        if self._cuda and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        self.device = "cuda" if self._cuda else "cpu"
        self.busy_seconds = 0.0
        self.stopped = False
        self._new_run = onnxruntime.RunOptions
        self._current = self._new_run()
        self._opening = threading.Lock()
        for record in self._entry.data:
            bundle.check(record)
        self._sessions: dict[Graph, Any] = {"graph": self._open(self._entry.graph)}
        self._check_names(bundle)

    def _open(self, record: FileRecord) -> Any:
        import onnxruntime

        path = self._bundle.check(record)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # patterns are planned for one shape; ours all differ
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=self._providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BundleError(f"{path} cannot be opened by ONNX Runtime: {_first_line(error)}") from None
        if self._cuda and "CUDAExecutionProvider" not in session.get_providers():
            raise EngineError(
                "CUDA was asked for but does not load (ONNX Runtime fell back to the CPU): check the driver with "
                "nvidia-smi and install the CUDA libraries with pip install 'w2v-onnx[gpu]', or use --device cpu."
            )
        return session

    def _check_names(self, bundle: Bundle) -> None:
        session = self._sessions["graph"]
        inputs = tuple(value.name for value in session.get_inputs())
        outputs = tuple(value.name for value in session.get_outputs())
        expected = (bundle.manifest.inputs, bundle.manifest.outputs)
        if (inputs, outputs) != expected:
            raise BundleError(
                f"The graph in {bundle.folder} has inputs {inputs} and outputs {outputs}, "
                f"where its manifest says {expected[0]} and {expected[1]}."
            )

    def _session(self, graph: Graph) -> Any:
        with self._opening:
            if graph not in self._sessions:
                record = self._entry.windows if graph == "windows" else self._entry.head
                if record is None:
                    raise BundleError(f"{self._bundle.folder} has no {graph} graph.")
                self._sessions[graph] = self._open(record)
            return self._sessions[graph]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str], graph: Graph = "graph") -> list[Array]:
        session = self._session(graph)
        self._current = run = self._new_run()
        if self.stopped:
            raise W2VError("The engine was stopped.")
        start = time.perf_counter()
        try:
            results: list[Array] = session.run(list(outputs), dict(feeds), run)
        except Exception as error:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feeds.items())
            raise W2VError(f"The engine failed on {shapes}: {_first_line(error)}") from error
        self.busy_seconds += time.perf_counter() - start
        return results

    def stop(self) -> None:
        self.stopped = True
        self._current.terminate = True

    def start(self) -> None:
        self.stopped = False


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
