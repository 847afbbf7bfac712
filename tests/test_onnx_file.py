"""ONNX files without the onnx package: what is read, and what a cut graph computes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_models import (
    DATA,
    branching,
    graph,
    model,
    names,
    nested_if,
    node,
    run,
    saved,
    saved_external,
    value,
)
from w2v_models.errors import BundleError
from w2v_runtime.graphs import onnx_file, onnx_format
from w2v_runtime.graphs.onnx_file import External, OnnxFile, check_graph
from w2v_runtime.graphs.protobuf import length_field

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (onnx_format.ModelField, onnx.ModelProto),
        (onnx_format.GraphField, onnx.GraphProto),
        (onnx_format.NodeField, onnx.NodeProto),
        (onnx_format.AttributeField, onnx.AttributeProto),
        (onnx_format.TensorField, onnx.TensorProto),
    ],
)
def test_field_numbers(numbers: Any, message: Any) -> None:
    """Field numbers and wire types are those of the onnx package, and no field that holds a tensor is left out."""
    fields = message.DESCRIPTOR.fields_by_name
    wire_types = {3: 0, 5: 0, 14: 0, 9: 2, 11: 2, 12: 2}  # int64, int32, enum; string, message, bytes
    known = {name: number for name, number in vars(numbers).items() if isinstance(number, int) and name != "STRING"}
    assert {name: fields[name.lower()].number for name in known} == known
    for name, number in known.items():
        assert numbers.KINDS.get(number, 0) == wire_types[fields[name.lower()].type]
    holders = {"GraphProto", "TensorProto", "SparseTensorProto", "NodeProto", "FunctionProto", "TrainingInfoProto"}
    holding = {field.name for field in fields.values() if field.message_type and field.message_type.name in holders}
    assert holding <= {name.lower() for name in known}


def test_tensor_fields() -> None:
    """Typed data fields, sizes of elements and the small messages are those of the onnx package."""
    fields = onnx.TensorProto.DESCRIPTOR.fields_by_name
    typed = {number.number for name, number in fields.items() if name.endswith("_data")}
    text_raw_external = {6, 9, 13}
    assert typed - text_raw_external == onnx_format.TensorField.NUMBERS
    types = onnx.TensorProto.DataType
    assert types.Value("STRING") == onnx_format.TensorField.STRING
    for kind, bits in onnx_format.TensorField.BITS.items():
        if bits >= 8:
            assert onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize * 8 == bits
        else:
            assert types.Name(kind) in {4: ("INT4", "UINT4", "FLOAT4E2M1"), 2: ("INT2", "UINT2")}[bits]
    assert (onnx.TensorProto.EXTERNAL, onnx.TensorProto.DEFAULT) == (1, 0)
    first_two = [
        (onnx.ValueInfoProto, "name", "type"),
        (onnx.OperatorSetIdProto, "domain", "version"),
        (onnx.StringStringEntryProto, "key", "value"),
    ]
    for message, *pair in first_two:
        assert [message.DESCRIPTOR.fields_by_number[number].name for number in (1, 2)] == pair


def test_read(tmp_path: Path) -> None:
    """Operator sets, inputs, outputs, domains and places of external data are those that the onnx package reads."""
    made = branching()
    made.graph.input.append(value("high", []))
    path = saved_external(tmp_path, made)
    file = OnnxFile.read(path)
    assert file.opsets == {"": 20}
    assert file.inputs == ("x", "y")
    assert file.outputs == ("a", "c", "d", "e")
    assert file.node_domains == {""}
    assert (file.has_functions, file.has_training_info, file.has_sparse_tensors) == (False, False, False)
    expected = []
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            expected.append(External(tensor.name, DATA, int(place["offset"]), int(place["length"])))
    assert len(expected) == 3
    assert file.external == tuple(expected)
    check_graph(file, path, {DATA: (tmp_path / DATA).stat().st_size})


def test_cut_of_everything_changes_nothing(tmp_path: Path) -> None:
    """Asking for all outputs of a graph without idle parts gives its bytes back."""
    made = branching()
    del made.graph.initializer[-1]
    path = saved(tmp_path, made)
    assert OnnxFile.read(path).cut(["a", "c", "d", "e"]) == path.read_bytes()


@pytest.mark.parametrize("outputs", [["a"], ["c"], ["d"], ["e", "c"], ["e"], ["c", "a"], ["e", "d", "c", "a"]])
def test_cut_computes_the_same(tmp_path: Path, outputs: list[str]) -> None:
    """A cut graph, opened from bytes with its data outside, is valid and gives the very numbers of the whole one."""
    path = saved_external(tmp_path, branching())
    content = OnnxFile.read(path).cut(outputs)
    cut = onnx.load_from_string(content)
    assert names(cut.graph.output) == outputs
    onnx.load_external_data_for_model(cut, str(tmp_path))
    onnx.checker.check_model(cut, full_check=True)
    for ours, whole in zip(run(content, outputs, tmp_path), run(path.read_bytes(), outputs, tmp_path), strict=True):
        np.testing.assert_array_equal(ours, whole)


def test_cut_drops_what_is_not_needed(tmp_path: Path) -> None:
    """Nodes, weights, inputs and value types that no output needs are gone; the rest stays, byte for byte."""
    made = branching()
    file = OnnxFile.read(saved(tmp_path, made))
    cut = onnx.load_from_string(file.cut(["c"]))
    assert [item.op_type for item in cut.graph.node] == ["MatMul", "MatMul", "Tanh"]
    assert names(cut.graph.initializer) == ["wa", "wb"]
    assert names(cut.graph.input) == ["x"]
    assert names(cut.graph.value_info) == ["b"]
    assert list(cut.graph.node) == list(made.graph.node)[:3]
    assert cut.metadata_props == made.metadata_props
    assert [name for name in ("d", "e") if name in names(onnx.load_from_string(file.cut(["a"])).graph.output)] == []


def test_cut_opens_without_the_weights_it_dropped(tmp_path: Path) -> None:
    """A cut graph reads only the data that it uses: one whose data comes first opens with the rest of the file gone."""
    path = saved_external(tmp_path, branching())
    content = OnnxFile.read(path).cut(["a"])
    whole = run(path.read_bytes(), ["a"], tmp_path)
    (place,) = OnnxFile.read(saved(tmp_path, content)).external
    data = (tmp_path / DATA).read_bytes()
    (tmp_path / DATA).write_bytes(data[: place.offset + (place.length or 0)])
    np.testing.assert_array_equal(run(content, ["a"], tmp_path), whole)


def test_cut_keeps_unknown_fields(tmp_path: Path) -> None:
    """Fields of later versions of the format survive in the model, the graph and the nodes that stay."""
    first, last = (node("Relu", ["x"], [name]).SerializeToString() + length_field(999, name.encode()) for name in "pq")
    inside = b"".join(length_field(1, item) for item in (first, last)) + length_field(998, b"graph")
    inside += length_field(12, value("q").SerializeToString()) + length_field(12, value("p").SerializeToString())
    path = saved(tmp_path, length_field(997, b"before") + length_field(7, inside) + length_field(996, b"after"))
    expected = length_field(1, last) + length_field(998, b"graph") + length_field(12, value("q").SerializeToString())
    assert OnnxFile.read(path).cut(["q"]) == (
        length_field(997, b"before") + length_field(7, expected) + length_field(996, b"after")
    )


@pytest.mark.parametrize("typed", [True, False])
def test_cut_at_a_value_inside(tmp_path: Path, typed: bool) -> None:
    """A value that is no output can be asked for, with or without a stated type."""
    made = branching()
    if not typed:
        del made.graph.value_info[:]
    content = OnnxFile.read(saved(tmp_path, made)).cut(["b"])
    assert names(onnx.load_from_string(content).graph.output) == ["b"]
    made.graph.output.append(value("b"))
    np.testing.assert_array_equal(run(content, ["b"]), run(made.SerializeToString(), ["b"]))


@pytest.mark.parametrize("outputs", [["f"], ["a", "x"], ["wa"], ["a", "a"], [], [""]])
def test_cut_refuses_other_outputs(tmp_path: Path, outputs: list[str]) -> None:
    """An output that no node computes, none, or one twice is refused with the names that there are."""
    path = saved(tmp_path, branching())
    with pytest.raises(BundleError, match="offers 'a', 'c', 'd', 'e'; ask for some of these") as caught:
        OnnxFile.read(path).cut(outputs)
    assert str(path) in str(caught.value)


def test_cut_follows_names_into_subgraphs(tmp_path: Path) -> None:
    """What only a branch of an If inside an If uses is kept, and the result is that of the whole graph."""
    made = nested_if(2)
    path = saved(tmp_path, made)
    file = OnnxFile.read(path)
    check_graph(file, path, {})
    content = file.cut(["out1"])
    cut = onnx.load_from_string(content)
    assert [item.op_type for item in cut.graph.node] == ["MatMul", "If"]
    assert names(cut.graph.initializer) == ["wa", "far", "near", "go"]
    np.testing.assert_array_equal(run(content, ["out1"]), run(made.SerializeToString(), ["out1"]))


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file, a folder and one that is too large are refused with their names."""
    with pytest.raises(BundleError, match="is not a file"):
        OnnxFile.read(tmp_path / "absent.onnx")
    with pytest.raises(BundleError, match="is not a file"):
        OnnxFile.read(tmp_path)
    large = tmp_path / "large.onnx"
    with large.open("wb") as handle:
        handle.truncate(onnx_file.MAX_GRAPH_BYTES + 1)
    with pytest.raises(BundleError, match=f"{onnx_file.MAX_GRAPH_BYTES + 1} bytes"):
        OnnxFile.read(large)


def test_a_large_graph_is_read_quickly(tmp_path: Path) -> None:
    """5000 nodes are read, checked and cut in a fraction of a second of this processor."""
    chain = [
        node("Transpose", [f"/layers/{i}"], [f"/layers/{i + 1}"], name=f"/t/{i}", perm=[1, 0]) for i in range(5000)
    ]
    made = model(graph(chain, [value("/layers/0")], [value(f"/layers/{i}") for i in range(50, 5001, 50)]))
    made.graph.value_info.extend(value(f"/layers/{i}") for i in range(1, 5000) if i % 50)
    path = saved(tmp_path, made)
    start = time.process_time()
    file = OnnxFile.read(path)
    check_graph(file, path, {})
    cut = file.cut(["/layers/100"])
    assert time.process_time() - start < 1.5  # measured: 0.2
    assert len(onnx.load_from_string(cut).graph.node) == 100
