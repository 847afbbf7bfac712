"""Test whether int8 matrix products saturate on this processor, with a tiny graph of known answer."""

from __future__ import annotations

import functools
from typing import Final

#: y = MatMulInteger(x, 8×16 times 127) in opset 20, (1, 8) uint8 → (1, 16) int32.
BYTES: Final = (
    b'\x08\t:\xda\x01\n\x18\n\x01x\n\x01w\x12\x01y"\rMatMulInteger\x12\x05bytes'
    b"*\x8c\x01\x08\x08\x08\x10\x10\x03B\x01wJ\x80\x01" + 128 * b"\x7f" + b"Z\x13\n\x01x\x12\x0e\n\x0c\x08\x02\x12\x08"
    b"\n\x02\x08\x01\n\x02\x08\x08b\x13\n\x01y\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08\x01\n\x02\x08\x10B\x04\n\x00\x10\x14"
)


@functools.cache
def saturates() -> bool:
    """Whether this processor adds two products of uint8 and int8 in 16 bits and saturates, as those without VNNI do.

    The test multiplies the largest values. ONNX Runtime can avoid saturation (``session.x64quantprecision``), which on
    a processor with VNNI would take twice the time for nothing.
    """
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(BYTES, providers=["CPUExecutionProvider"])
    (answer,) = session.run(["y"], {"x": np.full((1, 8), 255, np.uint8)})
    return bool((answer != 8 * 255 * 127).any())
