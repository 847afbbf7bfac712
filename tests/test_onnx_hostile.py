"""Bytes that are no ONNX model, or one made to harm its reader."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onnx_models import (
    nested_if,
    node,
    refusal,
    saved,
)
from w2v_models.errors import BundleError
from w2v_runtime.graphs import protobuf
from w2v_runtime.graphs.onnx_file import OnnxFile, check_graph
from w2v_runtime.graphs.protobuf import length_field

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

RELU = length_field(1, node("Relu", ["x"], ["o"]).SerializeToString())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no graph"),
        (b"\x08\x09", "no graph"),
        (b"not a model at all", "byte 0"),
        (b"\x3a", "cut off"),
        (b"\x3a\x05abc", "beyond the end"),
        (b"\x3a\xff\xff\xff\xff\x0f", "beyond the end"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "beyond the end"),
        (b"\x08\x80\x80", "cut off"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\x08" + b"\x80" * 10 + b"\x00", "more than 64 bits"),
        (b"\x80" * 12, "more than 64 bits"),
        (b"\x02\x00", "field 0 cannot be"),
        (b"\x82\x80\x80\x80\x20\x00", "field 1073741824 cannot be"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x0c", "wire type 4"),
        (b"\x0e", "wire type 6"),
        (b"\x38\x01", "field 7 cannot be, or not with wire type 0"),
        (b"\x3d\x00\x00\x00\x00", "field 7 cannot be, or not with wire type 5"),
        (b"\x09\x00\x00", "beyond the end"),
        (length_field(7, RELU) * 2, "a second graph"),
        (length_field(7, b"\x08\x01"), "field 1 cannot be, or not with wire type 0"),
        (length_field(7, b"\x0a\x03\x0a\x02x"), "beyond the end"),
        (length_field(7, b"\x0a\x01\x0a") + RELU, "cut off"),
        (length_field(7, length_field(1, length_field(1, b"\xff\xfe"))), "not UTF-8"),
        (length_field(7, length_field(5, b"\x0d\x00\x00\x00\x00")), "dims of wire type 5"),
        (length_field(7, length_field(5, b"\x70\x02")), "in a place that ONNX does not know"),
        (length_field(7, length_field(5, b"\x70\x81\x80\x80\x80\x10")), "out of range"),
        (length_field(7, length_field(1, length_field(5, length_field(5, b"") * 2))), "a second value"),
        (b"\x12\x80\x81\x01ORTM" + bytes(124 + 128 * 128) + length_field(7, RELU), "file of its own format"),
    ],
)
def test_malformed_bytes(tmp_path: Path, content: bytes, reason: str) -> None:
    """Bytes that are no message, or one that readers understand in different ways, are refused with the place."""
    assert reason in refusal(tmp_path, content)


def test_ort_mark_decides_how_bytes_are_read() -> None:
    """ONNX Runtime takes bytes with its mark for its own format, whatever they are as ONNX: hence their refusal."""
    with pytest.raises(Exception, match=r"ORT|flatbuffer|verify"):
        ort.InferenceSession(b"\x12\x80\x81\x01ORTM" + bytes(17000), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "tiny",
    [
        lambda many: b"\x0a\x00" * many,
        lambda many: length_field(1, b"\x0a\x01x" * many),
        lambda many: length_field(5, length_field(1, b"\x01" * 8 * many)),
        lambda many: length_field(5, b"\x0a\x01\x01" * many),
    ],
)
def test_many_tiny_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[[int], bytes]) -> None:
    """A file of nothing but tiny fields is refused at a number of them, before it fills the memory."""
    many = 1 << 12
    monkeypatch.setattr(protobuf, "MAX_FIELDS", many)
    path = saved(tmp_path, length_field(7, tiny(many)))
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match=f"more than {many} fields"):
            OnnxFile.read(path)
        assert tracemalloc.get_traced_memory()[1] < 300 * many
    finally:
        tracemalloc.stop()


def test_stated_sizes_allocate_nothing(tmp_path: Path) -> None:
    """Lengths and shapes of exabytes in a small file cost no memory."""
    tensor = b"\x08" + b"\xff" * 8 + b"\x7f" + b"\x10\x01" + length_field(8, b"w")
    path = saved(tmp_path, length_field(7, length_field(5, tensor)))
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match="elements"):
            check_graph(OnnxFile.read(path), path, {})
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


WHOLE = nested_if(1).SerializeToString()


@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(max_size=6), st.integers(0, 12)), min_size=1, max_size=4
    )
)
@example(edits=[(0, b"", len(WHOLE))])
@settings(max_examples=300, deadline=None)
def test_mutated_bytes(tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes, int]]) -> None:
    """A model with bytes replaced, inserted or removed is read, checked and cut, or refused; nothing else happens."""
    content = WHOLE
    for position, inserted, removed in edits:
        content = content[:position] + inserted + content[position + removed :]
    path = saved(tmp_path_factory.getbasetemp(), content)
    with contextlib.suppress(BundleError):
        file = OnnxFile.read(path)
        check_graph(file, path, {})
        file.cut(file.outputs)
    with contextlib.suppress(BundleError):
        OnnxFile.read(path).cut(["a", "out0"])
