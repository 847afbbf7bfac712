"""Inference engines: a bundle, a device and a precision in, arrays out. The one place that knows providers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from w2v_models.bundle import Bundle
from w2v_models.errors import BundleError, EngineError, W2VError
from w2v_models.manifest import LENGTHS, WAVEFORM
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


class Engine(Protocol):
    """What the runtime asks of an engine."""

    device: str
    #: Seconds spent inside the engine so far.
    busy_seconds: float

    def run(self, waveform: Array, lengths: Array, outputs: Sequence[str]) -> list[Array]:
        """Run a padded batch: (batch, samples) float32, (batch,) int64 → the named outputs, in order."""

    def stop(self) -> None:
        """Make a run in progress on another thread end at once, with an error."""


def open_engine(bundle: Bundle, device: str = "auto", precision: str = "fp32", threads: int | None = None) -> Engine:
    """Check the bundle's files and open its graph on a device.

    Raises:
        BundleError: the bundle lacks the precision, or a file of it is not what the manifest says.
        EngineError: no engine is installed, several are on top of each other, or the device cannot be had.
    """
    check_installation()
    providers = _providers(device)
    entry = bundle.precision(precision)
    for record in entry.data:
        bundle.check(record)
    graph = bundle.check(entry.graph)
    return OnnxRuntimeEngine(bundle, str(graph), providers, threads or processors.available())


def check_installation() -> None:
    """Refuse to work without an engine, or with two wheels of ONNX Runtime on top of each other.

    Raises:
        EngineError: with the command that mends it.
    """
    installed = [name for name in _WHEELS if _is_installed(name)]
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


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


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
    """A session of ONNX Runtime. Thread-safe as far as ``run`` and ``stop`` go."""

    def __init__(self, bundle: Bundle, graph: str, providers: list[tuple[str, dict[str, str]]], threads: int) -> None:
        import onnxruntime

        cuda = providers[0][0] == "CUDAExecutionProvider"
        if cuda and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # patterns are planned for one shape; ours all differ
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BundleError(f"{graph} cannot be opened by ONNX Runtime: {_first_line(error)}") from None
        used = self._session.get_providers()
        if cuda and "CUDAExecutionProvider" not in used:
            raise EngineError(
                "CUDA was asked for but does not load (ONNX Runtime fell back to the CPU): check the driver with "
                "nvidia-smi and install the CUDA libraries with pip install 'w2v-onnx[gpu]', or use --device cpu."
            )
        self.device = "cuda" if cuda else "cpu"
        self.busy_seconds = 0.0
        self._check_names(bundle)
        self._new_run = onnxruntime.RunOptions
        self._current = self._new_run()

    def _check_names(self, bundle: Bundle) -> None:
        inputs = tuple(value.name for value in self._session.get_inputs())
        outputs = tuple(value.name for value in self._session.get_outputs())
        expected = (bundle.manifest.inputs, bundle.manifest.outputs)
        if (inputs, outputs) != expected:
            raise BundleError(
                f"The graph in {bundle.folder} has inputs {inputs} and outputs {outputs}, "
                f"where its manifest says {expected[0]} and {expected[1]}."
            )

    def run(self, waveform: Array, lengths: Array, outputs: Sequence[str]) -> list[Array]:
        feeds = {
            WAVEFORM: np.ascontiguousarray(waveform, dtype=np.float32),
            LENGTHS: np.ascontiguousarray(lengths, dtype=np.int64),
        }
        self._current = run = self._new_run()
        start = time.perf_counter()
        try:
            results: list[Array] = self._session.run(list(outputs), feeds, run)
        except Exception as error:
            raise W2VError(f"The engine failed on a batch of shape {waveform.shape}: {_first_line(error)}") from error
        self.busy_seconds += time.perf_counter() - start
        return results

    def stop(self) -> None:
        self._current.terminate = True


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
