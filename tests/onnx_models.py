"""Small ONNX models for the tests, with weights inside or outside, and what is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from w2v_models.errors import BundleError
from w2v_runtime.graphs.onnx_file import OnnxFile, check_graph

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

FLOAT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
FOLDER_ENTRY = "session.model_external_initializers_file_folder_path"
SIDE = 64
DATA = "model.onnx.data"
DATA_BYTES = 3 * SIDE * SIDE * 4


def value(name: str, shape: Sequence[int | str] = ("batch", SIDE), kind: int = FLOAT) -> Any:
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def node(*args: Any, **attributes: Any) -> Any:
    return onnx.helper.make_node(*args, **attributes)


def graph(nodes: list[Any], inputs: list[Any], outputs: list[Any], initializers: Sequence[Any] = ()) -> Any:
    return onnx.helper.make_graph(nodes, "g", inputs, outputs, initializers)


def model(of: Any) -> Any:
    return onnx.helper.make_model(of, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


def branching() -> Any:
    """x → a → (b → c), and d from the second input; three weights, one unused bias, every kind of optional field."""
    weights = np.random.default_rng(0).standard_normal((3, SIDE, SIDE)).astype(np.float32) / 8
    nodes = [
        node("MatMul", ["x", "wa"], ["a"], name="A", doc_string="first"),
        node("MatMul", ["a", "wb"], ["b"], name="B"),
        node("Tanh", ["b"], ["c"]),
        node("Clip", ["y", "", "high"], ["d0"]),
        node("MatMul", ["d0", "wd"], ["d"]),
        node("Add", ["a", "d"], ["e"]),
    ]
    arrays = {"wa": weights[0], "wb": weights[1], "wd": weights[2], "high": np.float32(0.5), "idle": np.ones(3)}
    initializers = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    made = model(graph(nodes, [value("x"), value("y")], [value(name) for name in "acde"], initializers))
    made.graph.value_info.extend([value("b"), value("d0")])
    onnx.helper.set_model_props(made, {"made": "here"})
    return made


def saved(folder: Path, content: Any) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


def saved_external(folder: Path, made: Any) -> Path:
    """Save with the large weights in a file beside the graph."""
    path = folder / "model.onnx"
    onnx.save_model(made, path, save_as_external_data=True, location=DATA, size_threshold=1024)
    return path


def run(content: bytes, outputs: Sequence[str], folder: Path | None = None) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if folder:
        options.add_session_config_entry(FOLDER_ENTRY, str(folder))
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(1)
    x, y = (random.standard_normal((2, SIDE)).astype(np.float32) for _ in "xy")
    names = {item.name for item in session.get_inputs()}
    return session.run(outputs, {name: array for name, array in (("x", x), ("y", y)) if name in names})


def names(items: Any) -> list[str]:
    return [item.name for item in items]


def nested_if(depth: int) -> Any:
    """If in If: the innermost branch takes ``a`` and ``far`` from the outermost graph, the others take ``near``."""
    inner = graph([node("Add", ["a", "far"], ["leaf"])], [], [value("leaf")])
    for level in range(depth):
        other = graph([node("Mul", ["a", "near"], [f"other{level}"])], [], [value(f"other{level}")])
        branch = node("If", ["go"], [f"out{level}"], then_branch=inner, else_branch=other)
        inner = graph([branch], [], [value(f"out{level}")])
    made = branching()
    made.graph.node.append(inner.node[0])
    made.graph.output.append(inner.output[0])
    for name, array in {"far": np.float32(2), "near": np.float32(3), "go": np.bool_(True)}.items():
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return made


def refusal(folder: Path, content: Any, data: dict[str, int] | None = None) -> str:
    """The message with which reading or checking refuses a model."""
    path = saved(folder, content)
    with pytest.raises(BundleError) as caught:
        check_graph(OnnxFile.read(path), path, data or {})
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith("Export the model again.")
    return str(caught.value)
