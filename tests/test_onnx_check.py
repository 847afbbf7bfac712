"""Graphs that are refused before an engine sees them, for what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_models import (
    DATA,
    DATA_BYTES,
    branching,
    graph,
    model,
    nested_if,
    node,
    refusal,
    saved,
    saved_external,
    value,
)
from w2v_runtime.graphs.onnx_file import External, OnnxFile, check_graph
from w2v_runtime.graphs.protobuf import length_field

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def test_tensors_of_subgraphs_and_attributes_are_seen(tmp_path: Path) -> None:
    """External data is found in an initializer of a branch and in the attribute of a Constant, and refused."""
    made = nested_if(2)
    outside = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "secret")
    onnx.external_data_helper.set_external_data(outside, "../other", 0, 16)
    outside.ClearField("raw_data")
    outside.data_location = onnx.TensorProto.EXTERNAL
    branches = {item.name: item.g for item in made.graph.node[-1].attribute}
    inner = {item.name: item.g for item in branches["then_branch"].node[0].attribute}
    inner["else_branch"].initializer.append(outside)
    branches["else_branch"].node.append(node("Constant", [], ["k"], value=outside))
    file = OnnxFile.read(saved(tmp_path, made))
    assert file.external == (External("secret", "../other", 0, 16),) * 2
    assert "'../other'" in refusal(tmp_path, made)


def test_subgraph_depth(tmp_path: Path) -> None:
    """Eight Ifs in each other are read, nine are refused."""
    assert OnnxFile.read(saved(tmp_path, nested_if(8))).outputs[-1] == "out7"
    assert "nested deeper than 8" in refusal(tmp_path, nested_if(9))


def test_deep_nesting_is_cheap(tmp_path: Path) -> None:
    """A file that is nothing but nesting is refused without recursion into it."""
    payload = b""
    for _ in range(3000):
        payload = length_field(1, length_field(5, length_field(6, payload)))
    assert "nested deeper than 8" in refusal(tmp_path, length_field(7, payload))


def foreign_node(made: Any) -> None:
    made.graph.node[0].domain = "com.microsoft"


def foreign_branch(made: Any) -> None:
    body = graph([node("Gelu", ["a"], ["z"], domain="com.microsoft")], [], [value("z")])
    made.graph.node.append(node("If", ["x"], ["z"], then_branch=body, else_branch=body))


def foreign_opset(made: Any) -> None:
    made.opset_import.append(onnx.helper.make_opsetid("evil.ops", 1))


def function(made: Any) -> None:
    made.functions.append(onnx.helper.make_function("", "F", ["x"], ["y"], [], made.opset_import))


def training(made: Any) -> None:
    made.training_info.add()


def sparse(made: Any) -> None:
    made.graph.sparse_initializer.add().dims.append(1 << 40)


def sparse_attribute(made: Any) -> None:
    attribute = made.graph.node[0].attribute.add()
    attribute.name = "sparse_value"
    attribute.sparse_tensor.dims.append(1 << 40)


def output_twice(made: Any) -> None:
    made.graph.output.append(made.graph.output[0])


def computed_twice(made: Any) -> None:
    made.graph.node.append(node("Tanh", ["x"], ["a"]))


def computed_and_stored(made: Any) -> None:
    made.graph.node.append(node("Tanh", ["x"], ["wa"]))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (foreign_node, "operators of 'com.microsoft'"),
        (foreign_branch, "operators of 'com.microsoft'"),
        (foreign_opset, "operators of 'evil.ops'"),
        (function, "defines functions"),
        (training, "a graph for training"),
        (sparse, "sparse tensors"),
        (sparse_attribute, "sparse tensors"),
        (output_twice, "'a' is defined more than once"),
        (computed_twice, "'a' is defined more than once"),
        (computed_and_stored, "'wa' is defined more than once"),
    ],
)
def test_check_refuses_models(tmp_path: Path, spoil: Callable[[Any], None], reason: str) -> None:
    """Operators from elsewhere, functions, training graphs, sparse tensors and names defined twice are refused."""
    made = branching()
    path = saved(tmp_path, made)
    check_graph(OnnxFile.read(path), path, {})
    spoil(made)
    assert reason in refusal(tmp_path, made)


def test_check_accepts_the_default_domain_by_either_name(tmp_path: Path) -> None:
    """``ai.onnx`` is the default domain written out."""
    made = branching()
    made.graph.node[0].domain = made.opset_import[0].domain = "ai.onnx"
    path = saved(tmp_path, made)
    file = OnnxFile.read(path)
    check_graph(file, path, {})
    assert file.opsets == {"": 20}


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({"location": "../" + DATA}, "which is not one of the bundle's"),
        ({"location": "/etc/passwd"}, "which is not one of the bundle's"),
        ({"location": "./" + DATA}, "which is not one of the bundle's"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "which is not one of the bundle's"),
        ({"location": DATA + "\0/etc/passwd"}, "which is not one of the bundle's"),
        ({"location": None}, "which is not one of the bundle's"),
        ({"offset": "-4096"}, "lies beyond"),
        ({"offset": str(DATA_BYTES - 1)}, "lies beyond"),
        ({"offset": str(2**63 - 1)}, "lies beyond"),
        ({"offset": "9" * 5000}, "which is no number"),
        ({"offset": "1_0"}, "which is no number"),
        ({"offset": "0x10"}, "which is no number"),
        ({"offset": ""}, "which is no number"),
        ({"length": None}, "does not say how long"),
        ({"length": "-16384"}, "holds -16384 bytes for 16384"),
        ({"length": "16383"}, "holds 16383 bytes for 16384"),
        ({"length": "٣"}, "which is no number"),
        ({"prepacked_0": "w|0;16384"}, "external data with keys"),
    ],
)
def test_check_refuses_places_of_data(tmp_path: Path, place: dict[str, str | None], reason: str) -> None:
    """Data in a file that is not named, before its start, beyond its end or of another length is refused."""
    made = onnx.load(saved_external(tmp_path, branching()), load_external_data=False)
    tensor = made.graph.initializer[1]
    entries = {entry.key: entry.value for entry in tensor.external_data} | place
    del tensor.external_data[:]
    for key, text in entries.items():
        if text is not None:
            tensor.external_data.add(key=key, value=text)
    assert reason in refusal(tmp_path, made, {DATA: DATA_BYTES})


def test_check_refuses_a_place_said_twice(tmp_path: Path) -> None:
    """Two locations of one tensor are refused: engines may read either."""
    made = onnx.load(saved_external(tmp_path, branching()), load_external_data=False)
    made.graph.initializer[1].external_data.add(key="location", value="../other")
    assert "external data with keys" in refusal(tmp_path, made, {DATA: DATA_BYTES})


def test_missing_offset_is_the_start_of_the_file(tmp_path: Path) -> None:
    """External data without an offset begins at 0, as the format has it."""
    path = saved_external(tmp_path, branching())
    made = onnx.load(path, load_external_data=False)
    place = made.graph.initializer[0].external_data
    del place[[entry.key for entry in place].index("offset")]
    path = saved(tmp_path, made)
    assert OnnxFile.read(path).external[0].offset == 0
    check_graph(OnnxFile.read(path), path, {DATA: DATA_BYTES})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dims": [2, -2]}, "has an impossible shape"),
        ({"dims": [0, 1 << 32, 1 << 32]}, "has an impossible shape"),
        ({"dims": [1 << 62, 4]}, "has an impossible shape"),
        ({"dims": [1 << 40]}, "holds 16 bytes for 4398046511104"),
        ({"dims": [2, 3]}, "holds 16 bytes for 24"),
        ({"raw_data": b"123456789012345"}, "holds 15 bytes for 16"),
        ({"data_type": onnx.TensorProto.DOUBLE}, "holds 16 bytes for 32"),
        ({"data_type": onnx.TensorProto.INT4}, "holds 16 bytes for 2"),
        ({"data_type": onnx.TensorProto.STRING}, "holds other than its 4 strings"),
        ({"data_type": 0}, "is of type 0, which is unknown"),
        ({"data_type": 4711}, "is of type 4711, which is unknown"),
        ({"raw_data": None}, "holds 0 bytes for 4 elements"),
        ({"raw_data": None, "float_data": [1.0], "dims": [1 << 40]}, "holds 4 bytes for 1099511627776 elements"),
        ({"raw_data": None, "data_type": 8, "dims": [2], "string_data": [b"a"]}, "holds other than its 2 strings"),
    ],
)
def test_check_refuses_tensors(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    """Tensors of negative or overflowing shape, of unknown type, or with more elements than data are refused."""
    tensor = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    for name, changed in changes.items():
        tensor.ClearField(name)
        if isinstance(changed, list):
            getattr(tensor, name).extend(changed)
        elif changed is not None:
            setattr(tensor, name, changed)
    made = model(graph([node("Identity", ["w"], ["o"])], [], [value("o", [])], [tensor]))
    assert f"tensor 'w' {reason}" in refusal(tmp_path, made)


@pytest.mark.parametrize("kind", [kind for kind in onnx.TensorProto.DataType.values() if 0 < kind < 25])
def test_check_accepts_tensors_of_every_type(tmp_path: Path, kind: int) -> None:
    """What the onnx package stores passes, as raw bytes and as typed fields, odd counts of packed elements too."""
    text = kind == onnx.TensorProto.STRING
    array = np.zeros(3, onnx.helper.tensor_dtype_to_np_dtype(kind))
    tensors = [onnx.helper.make_tensor("typed", kind, [3], [b"a", b"", b"c"] if text else array)]
    if not text:
        tensors.append(onnx.numpy_helper.from_array(array, "raw"))
        assert tensors[1].data_type == kind
    path = saved(tmp_path, model(graph([], [], [], tensors)))
    check_graph(OnnxFile.read(path), path, {})


def test_packed_dims(tmp_path: Path) -> None:
    """Dims written as one packed field, as writers of proto3 do, count like separate ones."""
    tensor = length_field(1, b"\x02\x80\x01") + b"\x10\x01" + length_field(8, b"w") + length_field(9, bytes(1024))
    path = saved(tmp_path, length_field(7, length_field(5, tensor)))
    file = OnnxFile.read(path)
    assert file.tensors[0].dims == (2, 128)
    assert list(onnx.load(path).graph.initializer[0].dims) == [2, 128]
    check_graph(file, path, {})
