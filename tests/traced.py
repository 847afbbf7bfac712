"""Modules that a test traced itself, opened as the exporter would have them."""

from __future__ import annotations

import onnx
import onnxruntime

from w2v_export.writer import raise_opset


def opened(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A traced graph in our operator set, checked, and opened on one thread."""
    raise_opset(proto)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
