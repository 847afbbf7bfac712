"""Find out why CUDA does not load: NVIDIA's driver, its devices, and the libraries that ONNX Runtime's build needs."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
import os
from dataclasses import dataclass
from typing import Any, Final

#: Libraries of the CUDA provider with a major version of their own; those of the next line have CUDA's major version.
_OWN_MAJOR: Final = {"libcurand": 10, "libcudnn": 9}
_WITH_CUDA: Final = ("libcudart", "libcublas", "libcublasLt")
_OTHER_MAJORS: Final = range(11, 16)
_DRIVER_FIX: Final = (
    "install NVIDIA's driver until nvidia-smi runs (a container needs the GPU passed in: docker run --gpus all), or "
    "work without a GPU: pip uninstall -y onnxruntime-gpu && pip install 'w2v-onnx[cpu]'"
)
_LIBRARIES_FIX: Final = "pip install -U 'w2v-onnx[gpu]'"


@dataclass(frozen=True)
class Obstacle:
    """Something that keeps CUDA from loading, and what to do about it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: the newest CUDA that it serves, and the names of the devices that it shows."""

    cuda: tuple[int, int]
    devices: tuple[str, ...]


class DriverError(Exception):
    """The driver does not load, or does not work."""


def preload() -> None:
    """Load the CUDA libraries of NVIDIA's wheels, so that the provider finds them.

    Standard output is discarded meanwhile: ONNX Runtime prints missing libraries there, where results may go.
    """
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def runtime_library() -> Any | None:
    """The CUDA runtime library that the installed ONNX Runtime is built for; None if it does not load."""
    major = (build() or "").partition(".")[0]
    try:
        return _load(f"libcudart.so.{major}")
    except OSError:
        return None


def build() -> str | None:
    """The version of CUDA that the installed ONNX Runtime is built for; None for a build without CUDA."""
    from onnxruntime.capi import build_and_package_info

    version: str | None = getattr(build_and_package_info, "cuda_version", None)
    return version or None


def driver() -> Driver:
    """Ask the driver for its version and devices.

    Raises:
        DriverError: it is not installed, shows no device, or fails.
    """
    try:
        library = _load("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"NVIDIA's driver does not load ({error})") from None
    version, count = ctypes.c_int(), ctypes.c_int()
    _call(library, "cuInit", 0)
    _call(library, "cuDriverGetVersion", ctypes.byref(version))
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    names = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        _call(library, "cuDeviceGet", ctypes.byref(device), index)
        _call(library, "cuDeviceGetName", name, len(name), device)
        names.append(name.value.decode(errors="replace"))
    # 13020 is 13.2: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VERSION.html
    return Driver((version.value // 1000, version.value % 1000 // 10), tuple(names))


def obstacles() -> list[Obstacle]:
    """All known reasons why this build of ONNX Runtime cannot use CUDA; call :func:`preload` before."""
    needed = build()
    major = int(needed.partition(".")[0]) if needed else None
    found = [_driver_obstacle(major), _library_obstacle(major)]
    return [obstacle for obstacle in found if obstacle]


def _driver_obstacle(major: int | None) -> Obstacle | None:
    try:
        here = driver()
    except DriverError as error:
        return Obstacle(str(error), _DRIVER_FIX)
    if not here.devices:
        return Obstacle(f"NVIDIA's driver shows no device{_hidden()}", _DRIVER_FIX)
    if major and here.cuda[0] < major:
        version = ".".join(map(str, here.cuda))
        return Obstacle(
            f"NVIDIA's driver serves CUDA up to {version}, and this build of ONNX Runtime needs CUDA {major}",
            f"update NVIDIA's driver to one that serves CUDA {major} (nvidia-smi shows which it serves)",
        )
    return None


def _library_obstacle(major: int | None) -> Obstacle | None:
    if major is None:
        return None
    names = [f"{name}.so.{major}" for name in _WITH_CUDA] + [f"{name}.so.{own}" for name, own in _OWN_MAJOR.items()]
    missing = [name for name in names if not _loads(name)]
    if not missing:
        return None
    others = [str(other) for other in _OTHER_MAJORS if other != major and _has_cuda(other)]
    instead = f"; CUDA {' and '.join(others)} is here, and this build needs CUDA {major}" if others else ""
    return Obstacle(f"{', '.join(missing)} cannot be loaded{instead}", _LIBRARIES_FIX)


def _has_cuda(major: int) -> bool:
    """Whether the CUDA runtime of a major version is installed as a wheel or on the loader's path."""
    try:
        importlib.metadata.version(f"nvidia-cuda-runtime-cu{major}")
    except importlib.metadata.PackageNotFoundError:
        return _loads(f"libcudart.so.{major}")
    return True


def _hidden() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"


def _loads(name: str) -> bool:
    try:
        _load(name)
    except OSError:
        return False
    return True


def _load(name: str) -> Any:
    return ctypes.CDLL(name)


def _call(library: Any, function: str, *arguments: Any) -> None:
    """Call a function of the driver.

    Raises:
        DriverError: it returned an error, with the driver's own words for it.
    """
    if code := getattr(library, function)(*arguments):
        words = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(words))
        text = words.value.decode(errors="replace") if words.value else "unknown"
        raise DriverError(f"NVIDIA's driver fails: {function} returns {code}, {text}{_hidden()}")
