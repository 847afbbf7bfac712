"""Inference engines: a bundle, a device and a precision in, arrays out. The one place that knows providers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy.typing as npt

from w2v_models.bundle import Bundle
from w2v_models.errors import BundleError, EngineError, W2VError
from w2v_models.manifest import EMBEDDING, FileRecord
from w2v_runtime import cuda as cuda_libraries
from w2v_runtime import processors
from w2v_runtime.onnx_file import OnnxFile, check_graph

Array = npt.NDArray[Any]

#: The first release whose CPU provider honours ``nonpad_kv_seqlen`` of Attention; 1.24 attends to the padding.
_OLDEST: Final = (1, 25)
#: Wheels that all install the import package ``onnxruntime``, over each other.
WHEELS: Final = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE, the default, searches again for every new length
    "arena_extend_strategy": "kSameAsRequested",
    "use_tf32": "0",
}


Graph = Literal["graph", "windows", "head", "mel"]


class Engine(Protocol):
    """What the runtime asks of an engine. Threads may share it."""

    device: str
    #: Seconds spent inside the engine so far.
    busy_seconds: float
    #: Whether :meth:`stop` was called and :meth:`start` not since.
    stopped: bool

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str], graph: Graph = "graph") -> list[Array]:
        """Run one of the bundle's graphs on named inputs and return the named outputs, in order.

        Nothing is computed that the outputs do not need. Inputs that they do not need may be given all the same.

        Raises:
            W2VError: the engine failed, or was stopped.
        """

    def stop(self) -> None:
        """Make a run in progress on another thread, and every later one, fail at once."""

    def start(self) -> None:
        """Run again after :meth:`stop`."""


def open_engine(
    bundle: Bundle,
    device: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    outputs: Sequence[str] = (EMBEDDING,),
) -> Engine:
    """Check the bundle's files and open its graph on a device, ready to compute ``outputs``.

    Raises:
        BundleError: the bundle lacks the precision, or a file of it is not what the manifest says.
        EngineError: no engine is installed, several are on top of each other, or the device cannot be had.
    """
    check_installation()
    engine = OnnxRuntimeEngine(bundle, precision, providers(device), threads or processors.available())
    engine.prepare(outputs)
    return engine


def check_installation() -> None:
    """Refuse to work without an engine, or with two wheels of ONNX Runtime on top of each other.

    Raises:
        EngineError: with the command that mends it.
    """
    installed = [name for name in WHEELS if installed_version(name)]
    keep = "gpu" if "onnxruntime-gpu" in installed else "cpu"
    if len(installed) > 1:
        raise EngineError(
            f"{' and '.join(installed)} overwrite each other; keep one: "
            f"pip uninstall -y {' '.join(installed)} && pip install 'w2v-onnx[{keep}]'"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise EngineError("No inference engine is installed: pip install 'w2v-onnx[cpu]', or [gpu] for CUDA.")
    try:
        import onnxruntime

        version: str = onnxruntime.__version__
    except (ImportError, AttributeError) as error:  # a removed wheel leaves a folder that imports and is empty
        raise EngineError(
            f"ONNX Runtime is damaged ({_first_line(error)}): "
            f"pip uninstall -y {' '.join(installed) or 'onnxruntime'}; pip install --force-reinstall 'w2v-onnx[{keep}]'"
        ) from None
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


def providers(device: str) -> list[tuple[str, dict[str, str]]]:
    """The providers to ask for, best first; ``auto`` takes CUDA where this build of ONNX Runtime has it.

    Raises:
        EngineError: the device is unknown, or this build does not have it.
    """
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


@dataclass(frozen=True)
class _Session:
    """An open session, and the inputs and outputs of its graph."""

    session: Any
    inputs: frozenset[str]
    outputs: frozenset[str]


class OnnxRuntimeEngine:
    """Sessions of ONNX Runtime, one a graph, opened when first needed on a graph cut to what is asked of it.

    The public graph serves what it has an output for, the graph of all layers everything else.
    """

    def __init__(
        self, bundle: Bundle, precision: str, providers: list[tuple[str, dict[str, str]]], threads: int
    ) -> None:
        import onnxruntime

        self._bundle, self._entry = bundle, bundle.precision(precision)
        self._providers, self._threads = providers, threads
        self._cuda = providers[0][0] == "CUDAExecutionProvider"
        if self._cuda:
            cuda_libraries.preload()
        self.device = "cuda" if self._cuda else "cpu"
        self.busy_seconds = 0.0
        self.stopped = False
        self._new_run = onnxruntime.RunOptions
        self._current = self._new_run()
        self._opening = threading.Lock()
        self._public = self._read("graph")
        self._check_names()
        self._sessions: dict[str, _Session] = {}

    def prepare(self, outputs: Sequence[str], graph: Graph = "graph") -> None:
        """Open what computes ``outputs``, so that the first run does not have to."""
        self._session(frozenset(outputs), graph)

    def _read(self, name: str) -> OnnxFile:
        """One of the bundle's graphs, checked in hash and content."""
        record: FileRecord | None = getattr(self._entry, name)
        if record is None:
            raise BundleError(f"{self._bundle.folder} has no {name} graph. Export the model again.")
        path = self._bundle.check(record)
        file = OnnxFile.read(path)
        check_graph(file, path, {os.path.basename(data.path): data.size for data in self._entry.data})
        return file

    def _check_names(self) -> None:
        manifest, found = self._bundle.manifest, (self._public.inputs, self._public.outputs)
        if found != (expected := (manifest.inputs, manifest.outputs)):
            raise BundleError(
                f"The graph in {self._bundle.folder} has inputs {found[0]} and outputs {found[1]}, "
                f"where its manifest says {expected[0]} and {expected[1]}."
            )

    def _session(self, outputs: frozenset[str], graph: Graph) -> _Session:
        """A session that has ``outputs``; it replaces one of the same graph that lacks some of them."""
        with self._opening:
            name = "layers" if graph == "graph" and not outputs <= set(self._public.outputs) else graph
            if name not in self._sessions or not outputs <= self._sessions[name].outputs:
                self._sessions.pop(name, None)
                self._sessions[name] = self._open(name, outputs)
            return self._sessions[name]

    def _open(self, name: str, outputs: frozenset[str]) -> _Session:
        import onnxruntime

        file = self._public if name == "graph" else self._read(name)
        for record in self._entry.data:
            self._bundle.check(record)
        folder = self._bundle.folder / os.path.dirname(self._entry.graph.path)
        kept = file.outputs if name == "graph" else tuple(sorted(outputs))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4  # errors come as exceptions, and need not be printed as well
        options.enable_mem_pattern = False  # patterns are planned for one shape; ours all differ
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if name == "windows":
            # Long inputs hide the packing of weights, which would be held a second time, and make the arena hold
            # a third more than is in use.
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        try:
            session = onnxruntime.InferenceSession(file.cut(kept), options, providers=self._providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            where = self._bundle.folder / getattr(self._entry, name).path
            raise BundleError(f"{where} cannot be opened by ONNX Runtime: {_first_line(error)}") from None
        if self._cuda and "CUDAExecutionProvider" not in session.get_providers():
            reasons = [f"{obstacle.what} ({obstacle.fix})" for obstacle in cuda_libraries.obstacles()]
            raise EngineError(
                "CUDA was asked for but does not load: "
                f"{'; '.join(reasons) or 'ONNX Runtime fell back to the CPU (w2v-doctor may say why)'}. "
                "Without it: --device cpu."
            )
        return _Session(session, frozenset(value.name for value in session.get_inputs()), frozenset(kept))

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str], graph: Graph = "graph") -> list[Array]:
        opened = self._session(frozenset(outputs), graph)
        self._current = run = self._new_run()
        if self.stopped:
            raise W2VError("The engine was stopped.")
        start = time.perf_counter()
        needed = {name: value for name, value in feeds.items() if name in opened.inputs}
        try:
            results: list[Array] = opened.session.run(list(outputs), needed, run)
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
