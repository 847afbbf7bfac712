"""The machine and the packages that figures were measured with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: Instructions that decide the speed of matrix products.
_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm", "bf16")
_PACKAGES = ("torch", "transformers", "optimum-onnx", "onnxruntime", "openvino", "ctranslate2", "numpy", "w2v-onnx")


def facts(threads: int) -> dict[str, str]:
    """What stands over the tables: processor, threads of each engine, memory, system, and versions of packages."""
    cpu = _fields("/proc/cpuinfo")
    flags = set((cpu.get("flags") or cpu.get("Features", "")).split())
    memory = int(_fields("/proc/meminfo")["MemTotal"].split()[0]) / 2**20
    return {
        "processor": f"{cpu.get('model name', platform.machine())}, {os.cpu_count()} cores",
        "threads": str(threads),
        "instructions": " ".join(flag for flag in _FLAGS if flag in flags),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
    }


def summary() -> str:
    """Processor, cores and packages, for the head of a table."""
    import onnxruntime

    cpu = _fields("/proc/cpuinfo")
    flags = cpu.get("flags", "").split()
    vector = next((name for name in ("avx512f", "avx2") if name in flags), "no AVX2")
    model, cores = cpu.get("model name", platform.processor()), len(os.sched_getaffinity(0))
    engine = f"onnxruntime {onnxruntime.__version__}"
    return f"{model}, {cores} cores, {vector}; {engine}, Python {platform.python_version()}"


def _fields(path: str) -> dict[str, str]:
    """The first value of each field of a file of ``name: value`` lines."""
    found: dict[str, str] = {}
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
