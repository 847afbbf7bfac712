"""Parse an ONNX file in one pass without the onnx package: its graph's fields, its tensors, its operator domains.

Field numbers are those of ``onnx.proto3``. Tensor data is not copied; only its location and size are recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from w2v_runtime.graphs.protobuf import LENGTH, VARINT, Wire, WireError

#: The most levels of nested subgraphs (``If`` and ``Loop``), more than any model has.
MAX_SUBGRAPH_DEPTH: Final = 8
#: The bytes where ONNX Runtime looks for the magic ``ORTM`` of its own file format, before it parses ONNX.
_ORT_MARK: Final = slice(4, 8)
_MAX_SHOWN: Final = 8


class ModelField:
    """Field numbers of a ``ModelProto`` that are read; ``KINDS`` has their wire types. The next classes are alike."""

    OPSET_IMPORT, GRAPH, TRAINING_INFO, FUNCTIONS = 8, 7, 20, 25
    KINDS: Final = dict.fromkeys((OPSET_IMPORT, GRAPH, TRAINING_INFO, FUNCTIONS), LENGTH)


class GraphField:
    NODE, INITIALIZER, INPUT, OUTPUT, VALUE_INFO, SPARSE_INITIALIZER = 1, 5, 11, 12, 13, 15
    KINDS: Final = dict.fromkeys((NODE, INITIALIZER, INPUT, OUTPUT, VALUE_INFO, SPARSE_INITIALIZER), LENGTH)


class NodeField:
    INPUT, OUTPUT, ATTRIBUTE, DOMAIN = 1, 2, 5, 7
    KINDS: Final = dict.fromkeys((INPUT, OUTPUT, ATTRIBUTE, DOMAIN), LENGTH)


class AttributeField:
    T, G, TENSORS, GRAPHS, SPARSE_TENSOR, SPARSE_TENSORS = 5, 6, 10, 11, 22, 23
    KINDS: Final = dict.fromkeys((T, G, TENSORS, GRAPHS, SPARSE_TENSOR, SPARSE_TENSORS), LENGTH)


class TensorField:
    DIMS, DATA_TYPE, STRING_DATA, NAME, RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 1, 2, 6, 8, 9, 13, 14
    #: float_data, int32_data, int64_data, double_data, uint64_data
    NUMBERS: Final = frozenset((4, 5, 7, 10, 11))
    KINDS: Final = dict.fromkeys((STRING_DATA, NAME, RAW_DATA, EXTERNAL_DATA), LENGTH) | dict.fromkeys(
        (DATA_TYPE, DATA_LOCATION), VARINT
    )
    STRING: Final = 8
    #: Bits of an element by data_type; strings have none.
    BITS: Final = (
        dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8)
        | dict.fromkeys((4, 5, 10, 16), 16)
        | dict.fromkeys((1, 6, 12), 32)
        | dict.fromkeys((7, 11, 13, 14), 64)
        | {15: 128, 21: 4, 22: 4, 23: 4, 25: 2, 26: 2}
    )


#: ValueInfoProto.name, .type; StringStringEntryProto.key, .value; OperatorSetIdProto.domain, .version (a number).
_FIRST, _SECOND = 1, 2
_PAIR_KINDS: Final = {_FIRST: LENGTH, _SECOND: LENGTH}


@dataclass(frozen=True)
class External:
    """The location of a tensor's external data: a path relative to the graph's folder, offset and length in bytes.

    A missing offset is 0, as ONNX defines it; a missing length is None.
    """

    tensor: str
    location: str
    offset: int
    length: int | None


class Tensor(NamedTuple):
    """The header of a ``TensorProto`` anywhere in the file: type, shape and the size or location of its data."""

    name: str
    data_type: int
    dims: tuple[int, ...]
    #: Bytes of raw_data; None without raw_data.
    raw_bytes: int | None
    #: Bytes of the typed fields, an upper bound on the count of numbers in them.
    typed_bytes: int
    strings: int
    external: External | None


class Part(NamedTuple):
    """A field of a ``GraphProto`` as a span of bytes, key included, and the names of values it defines and uses."""

    field: int
    begin: int
    stop: int
    #: The first byte of the payload, which ends at ``stop``.
    payload: int
    defines: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()


class ParsedModel:
    """A parsed ``ModelProto``; its methods take the span of a message's payload.

    Raises:
        WireError: the bytes are not a ``ModelProto``, or exceed the limits of a bundle's graph.
    """

    def __init__(self, content: bytes) -> None:
        self.wire = Wire(content)
        self.opsets: dict[str, int] = {}
        self.node_domains: set[str] = set()
        self.tensors: list[Tensor] = []
        self.parts: list[Part] = []
        #: The span of the graph's field, key included: its first byte and the byte after its last.
        self.graph_span = (0, 0)
        #: Numbers of the model's fields.
        self.fields: set[int] = set()
        self.has_sparse_tensors = False
        if content[_ORT_MARK] == b"ORTM":
            raise WireError("ONNX Runtime would take it for a file of its own format")
        for number, _, begin, start, stop in self.wire.fields(0, len(content), ModelField.KINDS):
            if number == ModelField.OPSET_IMPORT:
                self._opset(start, stop)
            elif number == ModelField.GRAPH:
                if number in self.fields:
                    raise WireError(f"byte {begin}: a second graph")
                self.graph_span = (begin, stop)
                self.parts = self._graph(start, stop, 0)
            self.fields.add(number)
        if ModelField.GRAPH not in self.fields:
            raise WireError("it holds no graph")

    def _opset(self, start: int, stop: int) -> None:
        domain, version = "", 0
        for number, _, _, value, end in self.wire.fields(start, stop, {_FIRST: LENGTH, _SECOND: VARINT}):
            if number == _FIRST:
                domain = self.wire.text(value, end)
            elif number == _SECOND:
                version = self.wire.signed(value, end)
        self.opsets["" if domain == "ai.onnx" else domain] = version

    def _graph(self, start: int, stop: int, depth: int) -> list[Part]:
        if depth > MAX_SUBGRAPH_DEPTH:
            raise WireError(f"byte {start}: subgraphs are nested deeper than {MAX_SUBGRAPH_DEPTH}")
        parts = []
        for number, _, begin, value, end in self.wire.fields(start, stop, GraphField.KINDS):
            defines: tuple[str, ...] = ()
            uses: tuple[str, ...] = ()
            if number == GraphField.NODE:
                defines, uses = self._node(value, end, depth)
            elif number == GraphField.INITIALIZER:
                defines = (self._tensor(value, end),)
            elif number in (GraphField.INPUT, GraphField.OUTPUT, GraphField.VALUE_INFO):
                defines = (self._pair(value, end)[0],)
            elif number == GraphField.SPARSE_INITIALIZER:
                self.has_sparse_tensors = True
            parts.append(Part(number, begin, end, value, defines, uses))
        return parts

    def _node(self, start: int, stop: int, depth: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the values that a node computes, and that it or its subgraphs use, without empty names."""
        text = self.wire.text
        defines, uses, domain = [], [], ""
        for number, _, _, value, end in self.wire.fields(start, stop, NodeField.KINDS):
            if number == NodeField.INPUT:
                uses.append(text(value, end))
            elif number == NodeField.OUTPUT:
                defines.append(text(value, end))
            elif number == NodeField.ATTRIBUTE:
                uses += self._attribute(value, end, depth)
            elif number == NodeField.DOMAIN:
                domain = text(value, end)
        self.node_domains.add(domain)
        return tuple(filter(None, defines)), tuple(filter(None, uses))

    def _attribute(self, start: int, stop: int, depth: int) -> list[str]:
        """The names of values that an attribute's subgraphs use, those of the outer graph among them."""
        names: list[str] = []
        single = set()
        for number, _, begin, value, end in self.wire.fields(start, stop, AttributeField.KINDS):
            if number in (AttributeField.T, AttributeField.G):
                # Protobuf readers merge a repeated message, and the merged message would not be checked here.
                if number in single:
                    raise WireError(f"byte {begin}: a second value of one attribute")
                single.add(number)
            if number in (AttributeField.G, AttributeField.GRAPHS):
                for part in self._graph(value, end, depth + 1):
                    names += part.uses
                    if part.field == GraphField.OUTPUT:
                        names += part.defines
            elif number in (AttributeField.T, AttributeField.TENSORS):
                self._tensor(value, end)
            elif number in (AttributeField.SPARSE_TENSOR, AttributeField.SPARSE_TENSORS):
                self.has_sparse_tensors = True
        return names

    def _tensor(self, start: int, stop: int) -> str:
        """Parse a tensor, record it in ``tensors``, and return its name."""
        wire = self.wire
        name, data_type, location, typed_bytes, strings = "", 0, 0, 0, 0
        raw_bytes = None
        dims: list[int] = []
        entries: list[tuple[str, str]] = []
        for number, kind, begin, value, end in wire.fields(start, stop, TensorField.KINDS):
            if number == TensorField.NAME:
                name = wire.text(value, end)
            elif number == TensorField.DIMS:
                if kind not in (VARINT, LENGTH):
                    raise WireError(f"byte {begin}: dims of wire type {kind}")
                dims += [wire.signed(value, end)] if kind == VARINT else wire.packed(value, end)
            elif number == TensorField.DATA_TYPE:
                data_type = wire.small(value, end)
            elif number == TensorField.RAW_DATA:
                raw_bytes = end - value
            elif number in TensorField.NUMBERS:
                typed_bytes += end - value
            elif number == TensorField.STRING_DATA:
                strings += 1
            elif number == TensorField.EXTERNAL_DATA:
                key, text_span = self._pair(value, end)
                entries.append((key, wire.text(*text_span)))
            elif number == TensorField.DATA_LOCATION:
                location = wire.small(value, end)
        if location > 1:
            raise WireError(f"byte {start}: data of a tensor in a place that ONNX does not know")
        external = _external(name, entries, start) if location else None
        self.tensors.append(Tensor(name, data_type, tuple(dims), raw_bytes, typed_bytes, strings, external))
        return name

    def _pair(self, start: int, stop: int) -> tuple[str, tuple[int, int]]:
        """A message's first field as a string, and the span of its second; of repeated fields the last counts."""
        first, second = "", (stop, stop)
        for number, _, _, value, end in self.wire.fields(start, stop, _PAIR_KINDS):
            if number == _FIRST:
                first = self.wire.text(value, end)
            elif number == _SECOND:
                second = (value, end)
        return first, second


def _external(tensor: str, entries: Sequence[tuple[str, str]], position: int) -> External:
    """Parse a tensor's ``external_data`` entries.

    Raises:
        WireError: a key is repeated or unknown to ONNX, which could make engines read other bytes, or a number is none.
    """
    values = dict(entries)
    if len(values) < len(entries) or not values.keys() <= {"location", "offset", "length", "checksum"}:
        raise WireError(f"byte {position}: external data with keys {shown([key for key, _ in entries])}")
    numbers = {key: values[key] for key in ("offset", "length") if key in values}
    if wrong := [text for text in numbers.values() if not re.fullmatch("-?[0-9]{1,19}", text)]:
        raise WireError(f"byte {position}: external data at {shown(wrong)}, which is no number")
    length = int(numbers["length"]) if "length" in numbers else None
    return External(tensor, values.get("location", ""), int(numbers.get("offset", "0")), length)


def shown(names: Iterable[str]) -> str:
    """Names as text for a message: the first few, each shortened and with control characters escaped."""
    listed = list(names)
    more = f" and {len(listed) - _MAX_SHOWN} more" if len(listed) > _MAX_SHOWN else ""
    return ", ".join(repr(name[:80]) for name in listed[:_MAX_SHOWN]) + more
