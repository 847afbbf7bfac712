"""Check the installed engines: ONNX Runtime (one wheel of it, new enough) and OpenVINO."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Final

from w2v_models.errors import EngineError
from w2v_runtime.engines.base import CPU, CUDA, CUDA_PROVIDER, OPENVINO, option

#: Wheels that all install the import package ``onnxruntime`` and overwrite each other.
WHEELS: Final = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
#: The first release whose CPU provider honours ``nonpad_kv_seqlen`` of Attention; 1.24 attends to the padding.
_OLDEST: Final = (1, 25)
#: The first release of onnxruntime-gpu whose kernels take these graphs: 1.25 and 1.26 leave Cast, Reshape and Transpose
#: of operator set 24 to the processor, with 32 to 38 copies a run (``make check-cuda``).
_OLDEST_CUDA: Final = (1, 27)
#: The first release that computes these graphs; 2025.4 fails on recordings that are not whole blocks long.
_OLDEST_OPENVINO: Final = (2026, 1)
_NONE_INSTALLED: Final = "No inference engine is installed: pip install 'w2v-onnx[cpu]', [gpu] for CUDA, or [openvino]."


def is_here(device: str) -> bool:
    """Whether the engine for a device is installed, even if damaged.

    For CUDA, whether ONNX Runtime imports and its build has the CUDA provider.
    """
    if device != CUDA:
        return importlib.util.find_spec("openvino" if device == OPENVINO else "onnxruntime") is not None
    try:
        import onnxruntime

        return CUDA_PROVIDER in onnxruntime.get_available_providers()
    except (ImportError, AttributeError):
        return False


def check_openvino() -> None:
    """Refuse a missing or too old OpenVINO.

    Raises:
        EngineError: with the command that repairs the installation.
    """
    if importlib.util.find_spec("openvino") is None:
        other = f"; ONNX Runtime is: {option('device', CPU)}" if importlib.util.find_spec("onnxruntime") else ""
        raise EngineError(f"OpenVINO is not installed: pip install 'w2v-onnx[openvino]'{other}.")
    version = installed_version("openvino")
    if version is not None and _release(version) < _OLDEST_OPENVINO:
        needed = ".".join(map(str, _OLDEST_OPENVINO))
        raise EngineError(f"OpenVINO {version} is too old for these graphs: pip install -U 'openvino>={needed}'")


def check_installation() -> None:
    """Refuse an ONNX Runtime that is missing, damaged or too old, or two wheels of it that overwrite each other.

    Raises:
        EngineError: with the command that repairs the installation.
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
    if "onnxruntime-gpu" in installed and _release(version) < _OLDEST_CUDA:
        needed = ".".join(map(str, _OLDEST_CUDA))
        raise EngineError(
            f"onnxruntime-gpu {version} leaves most of a model to the processor; {needed} is needed: "
            f"pip install -U 'onnxruntime-gpu[cuda,cudnn]>={needed}'"
        )


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: year and release, or major and minor."""
    return tuple(int(part) for part in version.split(".")[:2])


def installed_version(distribution: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name if the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
