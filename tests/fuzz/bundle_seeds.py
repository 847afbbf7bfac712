"""Small manifests and graphs with a field of every kind, as inputs of the target ``bundle``."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from targets import GRAPH_KIND, MANIFEST_KIND

from w2v_models.manifest import (
    FORMAT_VERSION,
    Architecture,
    ConvStack,
    FileRecord,
    Head,
    Manifest,
    PrecisionRecord,
    Source,
)
from w2v_models.tolerances import ParityRow


def bundle_seeds() -> dict[str, bytes]:
    """Seeds by name: manifests with and without a head, graphs of the constructs that the reader knows."""
    graphs = {
        "plain": _model([helper.make_node("Add", ["x", "bias"], ["y"])], [numpy_helper.from_array(np.ones(3), "bias")]),
        "external": _external(),
        "typed": _typed(),
        "branches": _branches(3),
        "foreign": _model([helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")]),
        "constants": _constants(),
    }
    seeds = {f"graph-{name}": GRAPH_KIND + model.SerializeToString() for name, model in graphs.items()}
    for name, manifest in {"plain": _manifest(), "head": _manifest_with_head()}.items():
        seeds[f"manifest-{name}"] = MANIFEST_KIND + manifest.to_json().encode()
    return seeds


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 3))


def _model(nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto] | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", [_value("x")], [_value("y")], tensors or [], value_info=[_value("v")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _external() -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(3, 3), data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "model.onnx_data", "offset": "4096", "length": "36"}.items():
        tensor.external_data.add(key=key, value=value)
    return _model([helper.make_node("MatMul", ["x", "w"], ["v"]), helper.make_node("Tanh", ["v"], ["y"])], [tensor])


def _typed() -> onnx.ModelProto:
    kinds = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE, TensorProto.INT8, TensorProto.BOOL)
    tensors = [helper.make_tensor(f"t{kind}", kind, (2,), (1, 0)) for kind in kinds]
    tensors.append(helper.make_tensor("s", TensorProto.STRING, (2,), (b"a", b"b")))
    return _model([helper.make_node("Add", ["x", f"t{TensorProto.FLOAT}"], ["y"])], tensors)


def _branches(depth: int) -> onnx.ModelProto:
    inner = helper.make_graph([helper.make_node("Neg", ["x"], ["leaf"])], "leaf", [], [_value("leaf")])
    for level in range(depth):
        other = helper.make_graph([helper.make_node("Abs", ["x"], [f"o{level}"])], "o", [], [_value(f"o{level}")])
        node = helper.make_node("If", ["go"], [f"out{level}"], then_branch=inner, else_branch=other)
        inner = helper.make_graph([node], "b", [], [_value(f"out{level}")])
    go = numpy_helper.from_array(np.array(True), "go")
    return _model([*inner.node, helper.make_node("Identity", [f"out{depth - 1}"], ["y"])], [go])


def _constants() -> onnx.ModelProto:
    value = numpy_helper.from_array(np.arange(3, dtype=np.float32))
    nodes = [
        helper.make_node("Constant", [], ["c"], value=value),
        helper.make_node("Clip", ["x", "", "c"], ["v"], name="n", doc_string="d"),
        helper.make_node("Transpose", ["v"], ["y"], perm=[1, 0]),
    ]
    return _model(nodes)


def _manifest() -> Manifest:
    rows = (ParityRow("400 samples", "frames", 1e-6, 1e-6, 1.0), ParityRow("1 s", "pooled", 0.0, 0.0, 1.0))
    graphs = ("model", "layers", "features", "encoder")
    paths = (*(f"onnx/{name}.onnx" for name in graphs), "onnx/model.onnx_data", "reference.npz")
    *graphs, data, reference = (FileRecord(path, f"{i}" * 64, 100) for i, path in enumerate(paths))
    conv = ConvStack((10, 3, 2), (5, 2, 2), (24, 24, 24))
    return Manifest(
        FORMAT_VERSION,
        Source("org/name", None, "random", 0, "Apache-2.0"),
        Architecture("wav2vec2", "waveform", 16_000, conv, 48, 3, 4, 96, True),
        None,
        24,
        {"fp32": PrecisionRecord(*graphs, None, None, (data,), (), (), rows)},
        reference,
        (FileRecord("config.json", "b" * 64, 100),),
        "2026-01-01T00:00:00+00:00",
        {"torch": "2.13"},
    )


def _manifest_with_head() -> Manifest:
    plain = _manifest()
    head = Head("regression", ("arousal", "valence"), ("logits",), "utterance", ("mean", "std1"), 1)
    record = FileRecord("onnx/head.onnx", "a" * 64, 100)
    precision = dataclasses.replace(plain.precisions["fp32"], head=record, mel=record)
    source = Source("org/name", "abc", "checkpoint", None, None)
    return dataclasses.replace(plain, source=source, head=head, precisions={"fp32": precision})
