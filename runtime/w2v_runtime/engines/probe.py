"""Probe an engine: run a tiny graph with a known answer on a device, and catch the engine's messages."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

#: The probe graph y = MatMul(Conv(x, [1, 2]), [1, 10, 100]) in opset 20, serialised by ``onnx.helper``.
PROBE: Final = (
    b'\x08\t:\x8d\x01\n\x0f\n\x01x\n\x01w\x12\x01c"\x04Conv\n\x11\n\x01c\n\x01m\x12\x01y"\x06MatMul\x12\x05probe'
    b"*\x15\x08\x01\x08\x01\x08\x02\x10\x01B\x01wJ\x08\x00\x00\x80?\x00\x00\x00@"
    b"*\x17\x08\x03\x08\x01\x10\x01B\x01mJ\x0c\x00\x00\x80?\x00\x00 A\x00\x00\xc8B"
    b"Z\x17\n\x01x\x12\x12\n\x10\x08\x01\x12\x0c\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x04"
    b"b\x17\n\x01y\x12\x12\n\x10\x08\x01\x12\x0c\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x01B\x04\n\x00\x10\x14"
)
#: The right y for x = 1, 2, 3, 4.
ANSWER: Final = 1185.0
_COLOURS: Final = re.compile(r"\x1b\[[\d;]*m")


@dataclass(frozen=True)
class Trial:
    """The result of a probe: the computed value or None, the provider or processor, and the engine's messages."""

    answer: float | None
    provider: str
    said: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is :data:`ANSWER`; bfloat16 gives it too, since all factors are exact in it."""
        return self.answer == ANSWER

    @property
    def fault(self) -> str:
        """What is wrong with the result, in one line."""
        what = "does not compute" if self.answer is None else f"computes {self.answer} on {self.provider}"
        return " ".join(f"{what}, where {ANSWER} is right. {_COLOURS.sub('', self.said)}".split())


def compute(device: str, precision: str = "fp32") -> Trial:
    """Compute the probe graph on a device as its engine would."""
    answer, provider, error = None, "", ""
    with _native_stderr() as said:
        try:
            answer, provider = _by_openvino(precision) if device == "openvino" else _by_onnxruntime(device)
        except Exception as failure:  # the engines' exceptions share no base class
            error = str(failure)
    return Trial(answer, provider, " ".join((error, *said)))


def _by_onnxruntime(device: str) -> tuple[float, str]:
    import onnxruntime

    from w2v_runtime.engines.onnxruntime import providers

    session = onnxruntime.InferenceSession(PROBE, providers=providers(device))
    return float(session.run(["y"], {"x": _probe_input()})[0].item()), session.get_providers()[0]


def _by_openvino(precision: str) -> tuple[float, str]:
    from w2v_runtime.engines.openvino import DEVICE, PRECISION_HINTS, load

    core = load().Core()
    hint = {"INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision]}
    model = core.compile_model(core.read_model(io.BytesIO(PROBE)), DEVICE, hint)
    return float(model({"x": _probe_input()})["y"].item()), core.get_property(DEVICE, "FULL_DEVICE_NAME")


def _probe_input() -> Any:
    """The input x of the probe graph: (1, 1, 4) float32."""
    import numpy as np

    return np.array([[[1, 2, 3, 4]]], np.float32)


@contextlib.contextmanager
def _native_stderr() -> Iterator[list[str]]:
    """Catch what native code writes to file descriptor 2 (stderr); the yielded list holds the text afterwards."""
    said: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with _memory_file() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def _memory_file() -> IO[bytes]:
    """A file in memory (``memfd``) if the system has it, so that the probe works without a writable folder."""
    return os.fdopen(os.memfd_create("said"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()
