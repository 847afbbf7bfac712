"""Convert a bundle's ONNX graph to an OpenVINO model, cut to some of its outputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

_QUERY, _KEY, _VALUE, _BIAS, _LENGTHS = 0, 1, 2, 3, 6
#: The attention score of a masked key: finite, so that an utterance without valid frames gives no NaN.
_MASKED: Final = np.float32(-1e30)
_HEADS_FIRST: Final = np.array([0, 2, 1, 3])


def read_graph(openvino: Any, path: Path, outputs: Sequence[str]) -> Any:
    """The ``openvino.Model`` of an ONNX graph, cut to ``outputs``; the weights are memory-mapped, not read.

    Raises exceptions of OpenVINO's if it cannot convert the graph or the graph lacks an output.
    """
    frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    frontend.add_extension(_attention_extension())
    whole = frontend.convert(frontend.load(os.fspath(path)))
    return openvino.Model([whole.output(name).node for name in outputs], whole.get_parameters())


def _attention_extension() -> Any:
    """Converts ONNX ``Attention``, with or without ``nonpad_kv_seqlen``, to one fused operator.

    OpenVINO's own conversion writes the attention out in single operators, and so keeps the scores of all heads in
    memory, (time, time) each.
    """
    from openvino import opset13 as ops
    from openvino.frontend.onnx import ConversionExtension

    def convert(node: Any) -> list[Any]:
        query, key, value = map(node.get_input, (_QUERY, _KEY, _VALUE))
        heads = node.get_attribute("q_num_heads")
        bias, lengths = _optional_input(node, _BIAS), _optional_input(node, _LENGTHS)
        scores = [] if bias is None else [bias]
        if lengths is not None:
            time = ops.gather(ops.shape_of(key), np.int64(1), np.int64(0))
            steps = ops.unsqueeze(ops.range(np.int64(0), time, np.int64(1), "i64"), np.array([0, 1, 2]))
            valid = ops.less(steps, ops.unsqueeze(lengths, np.array([1, 2, 3])))
            scores = [ops.select(valid, np.float32(0) if bias is None else bias, _MASKED)]
        by_head = (
            ops.transpose(ops.reshape(x, np.array([0, 0, heads, -1]), special_zero=True), _HEADS_FIRST)
            for x in (query, key, value)
        )
        attended = ops.transpose(ops.scaled_dot_product_attention(*by_head, *scores), _HEADS_FIRST)
        joined: list[Any] = ops.reshape(attended, np.array([0, 0, -1]), special_zero=True).outputs()
        return joined

    return ConversionExtension("Attention", "", convert)


def _optional_input(node: Any, index: int) -> Any | None:
    """An input of a node; None if the node leaves it out."""
    if node.get_input_size() <= index:
        return None
    value = node.get_input(index)
    return None if value.get_node().get_type_name() == "NullNode" else value
