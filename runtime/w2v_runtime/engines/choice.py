"""Choose an engine by device and precision, and open a bundle with it.

:func:`open_engine` is the place to add an engine: each device is opened there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from w2v_models.bundle import Bundle
from w2v_models.errors import EngineError
from w2v_models.manifest import EMBEDDING
from w2v_runtime.engines.base import AUTO, CPU, CUDA, OPENVINO, PRECISIONS, Engine, is_whole, option, stored_precision
from w2v_runtime.engines.installed import check_installation, check_openvino, is_here
from w2v_runtime.threads import processors

#: More threads than any machine has processors for; each takes memory.
MAX_THREADS: Final = 1024


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
        BundleError: the bundle lacks the precision, or one of its files differs from its entry in the manifest.
        EngineError: no engine is installed, several wheels of one overwrite each other, the device is not available in
            this precision, or ``threads`` is not a positive whole number.
    """
    if threads is not None and not (is_whole(threads) and 1 <= threads <= MAX_THREADS):
        raise EngineError(f"threads (--threads) must be a whole number from 1 to {MAX_THREADS}, not {threads!r}.")
    chosen, threads = choose_device(device, precision), int(threads or processors.available())
    engine: Engine
    if chosen == OPENVINO:
        from w2v_runtime.engines.openvino import OpenVINOEngine

        engine = OpenVINOEngine(bundle, precision, threads)
    else:
        from w2v_runtime.engines.group import SeveralEngines
        from w2v_runtime.engines.onnxruntime import OnnxRuntimeEngine

        engines = [OnnxRuntimeEngine(bundle, precision, one, threads, prepack) for one in chosen.split(",")]
        engine = engines[0] if len(engines) == 1 else SeveralEngines(engines)
    engine.prepare(outputs)
    return engine


def choose_device(device: str, precision: str) -> str:
    """The device to open: ``cpu``, ``cuda``, ``cuda:N``, several as ``cuda:0,cuda:1``, or ``openvino``.

    ``auto`` means CUDA if this build of ONNX Runtime has it, else the processor: with ONNX Runtime, or with OpenVINO if
    ONNX Runtime is not installed or does not compute the precision. The engine's installation is checked.

    Raises:
        EngineError: the device or precision is unknown, the device does not compute the precision, or the engine is
            not installed or its installation is damaged.
    """
    stored_precision(precision)
    possible = PRECISIONS[precision].devices
    if device == AUTO:
        device = next((name for name in possible if is_here(name)), possible[0])
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
        check_openvino()
    else:
        check_installation()
    return device
