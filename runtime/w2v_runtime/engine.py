"""Inference engines: a bundle, a device and a precision in, arrays out. The one place that chooses between engines."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import threading
import time
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy.typing as npt

from w2v_models.bundle import Bundle
from w2v_models.errors import EngineError
from w2v_models.manifest import EMBEDDING
from w2v_runtime import forks, processors
from w2v_runtime.stop import Stop

Array = npt.NDArray[Any]
Graph = Literal["graph", "windows", "head", "mel"]

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

#: Wheels that all install the import package ``onnxruntime``, over each other.
WHEELS: Final = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
#: The first release whose CPU provider honours ``nonpad_kv_seqlen`` of Attention; 1.24 attends to the padding.
_OLDEST: Final = (1, 25)
#: The first that computes these graphs; 2025.4 fails on recordings that are not whole blocks long.
_OLDEST_OPENVINO: Final = (2026, 1)
_NONE_INSTALLED: Final = "No inference engine is installed: pip install 'w2v-onnx[cpu]', [gpu] for CUDA, or [openvino]."


class Engine(Protocol):
    """What the runtime asks of an engine. Threads may share it."""

    device: str
    #: Runs that may be in progress at once, so that it never waits for the next.
    runs: int

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


def open_engine(
    bundle: Bundle,
    device: str = AUTO,
    precision: str = "fp32",
    threads: int | None = None,
    outputs: Sequence[str] = (EMBEDDING,),
    prepack: bool = True,
) -> Engine:
    """Check the bundle's files and open its graph on a device, ready to compute ``outputs``.

    Raises:
        BundleError: the bundle lacks the precision, or a file of it is not what the manifest says.
        EngineError: no engine is installed, several are on top of each other, or the device cannot be had in this
            precision or with so many threads.
    """
    if threads is not None and not (is_whole(threads) and threads >= 1):
        raise EngineError(f"threads (--threads) must be a whole number, at least 1, not {threads!r}.")
    chosen, threads = choose_device(device, precision), int(threads or processors.available())
    engine: Engine
    if chosen == OPENVINO:
        from w2v_runtime.openvino_engine import OpenVINOEngine

        engine = OpenVINOEngine(bundle, precision, threads)
    else:
        from w2v_runtime.onnxruntime_engine import OnnxRuntimeEngine
        from w2v_runtime.several import SeveralEngines

        engines = [OnnxRuntimeEngine(bundle, precision, one, threads, prepack) for one in chosen.split(",")]
        engine = engines[0] if len(engines) == 1 else SeveralEngines(engines)
    engine.prepare(outputs)
    return engine


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


def choose_device(device: str, precision: str) -> str:
    """The device to open, ``cpu``, ``cuda``, ``cuda:N`` or ``openvino``, whose engine is known to be installed.

    Several are of the form ``cuda:0,cuda:1``.
    ``auto`` is CUDA where this build of ONNX Runtime has it, then the processor, with OpenVINO only where ONNX Runtime
    is not installed or does not compute the precision.

    Raises:
        EngineError: the device or precision is unknown, they do not go together, or the engine is not installed well.
    """
    stored_precision(precision)
    possible = PRECISIONS[precision].devices
    if device == AUTO:
        device = next((name for name in possible if _is_here(name)), possible[0])
    kind = device.partition(":")[0] if isinstance(device, str) else ""
    if kind not in (CPU, CUDA, OPENVINO) or (device != kind and not re.fullmatch(r"cuda:\d+(,cuda:\d+)*", device)):
        raise EngineError(
            f"device {device!r} is unknown; choose one of: auto, cpu, cuda, cuda:N, cuda:N,cuda:M (several), openvino."
        )
    if len(set(parts := re.findall(r"\d+", device))) < len(parts):
        raise EngineError(f"device {device!r} names a GPU twice.")
    if kind not in possible:
        others = ", ".join(name for name, entry in PRECISIONS.items() if kind in entry.devices)
        raise EngineError(
            f"precision {precision} is not computed on {kind}: "
            f"choose {' or '.join(option('device', other) for other in possible)}, "
            f"or for {kind} one of the precisions {others}."
        )
    if kind == OPENVINO:
        _check_openvino()
    else:
        check_installation()
    return device


def _is_here(device: str) -> bool:
    """Whether the engine for a device is there, well or badly installed; for CUDA, whether it works and has it."""
    if device != CUDA:
        return importlib.util.find_spec("openvino" if device == OPENVINO else "onnxruntime") is not None
    try:
        import onnxruntime

        return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    except (ImportError, AttributeError):
        return False


def _check_openvino() -> None:
    if importlib.util.find_spec("openvino") is None:
        other = f"; ONNX Runtime is: {option('device', CPU)}" if importlib.util.find_spec("onnxruntime") else ""
        raise EngineError(f"OpenVINO is not installed: pip install 'w2v-onnx[openvino]'{other}.")
    version = installed_version("openvino")
    if version is not None and _release(version) < _OLDEST_OPENVINO:
        needed = ".".join(map(str, _OLDEST_OPENVINO))
        raise EngineError(f"OpenVINO {version} is too old for these graphs: pip install -U 'openvino>={needed}'")


def check_installation() -> None:
    """Refuse to work without ONNX Runtime, or with two wheels of it on top of each other.

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
        if importlib.util.find_spec("openvino") is None:
            raise EngineError(_NONE_INSTALLED)
        raise EngineError(
            "ONNX Runtime is not installed: pip install 'w2v-onnx[cpu]', or [gpu] for CUDA. "
            f"OpenVINO is: {option('device', OPENVINO)}."
        )
    try:
        import onnxruntime

        version: str = onnxruntime.__version__
    except (ImportError, AttributeError) as error:  # a removed wheel leaves a folder that imports and is empty
        raise EngineError(
            f"ONNX Runtime is damaged ({first_line(error)}): "
            f"pip uninstall -y {' '.join(installed) or 'onnxruntime'}; pip install --force-reinstall 'w2v-onnx[{keep}]'"
        ) from None
    if _release(version) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        raise EngineError(
            f"ONNX Runtime {version} computes padded batches wrongly; {needed} is needed: "
            f"pip install -U '{(installed or ['onnxruntime'])[0]}>={needed}'"
        )


def _release(version: str) -> tuple[int, ...]:
    """Year and release, or major and minor."""
    return tuple(int(part) for part in version.split(".")[:2])


def installed_version(distribution: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(error: BaseException) -> str:
    """An error's first line, its class where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
