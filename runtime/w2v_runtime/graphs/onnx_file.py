"""Check an ONNX file before an engine opens it, and cut it to some of its outputs, without the onnx package.

A bundle's graph of all layers has an output for every layer, and an engine computes all outputs of its graph. So
:meth:`OnnxFile.cut` removes all outputs that a run does not ask for, and all nodes that only these need. That is where
``--layer 6`` skips the encoder blocks after the sixth (unless the model has a head whose columns are returned too).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from w2v_models.errors import BundleError
from w2v_runtime.graphs.onnx_format import (
    External,
    GraphField,
    ModelField,
    ParsedModel,
    Part,
    Tensor,
    TensorField,
    shown,
)
from w2v_runtime.graphs.protobuf import WireError, length_field

__all__ = ["MAX_GRAPH_BYTES", "External", "OnnxFile", "check_graph"]

#: The size limit of a graph file; without the weights, which lie in another file, a graph has a few MB.
MAX_GRAPH_BYTES: Final = 64 * 2**20
_MAX_ELEMENTS: Final = 2**63 - 1
_VALUE_INFO_NAME: Final = 1
#: Fields that a cut drops if nothing that stays uses their names; nodes are dropped by the values they compute.
_DROPPED_UNUSED: Final = frozenset((GraphField.INITIALIZER, GraphField.INPUT, GraphField.VALUE_INFO))


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX ``ModelProto`` in memory; :meth:`read` reads one from ``path``."""

    path: Path
    _content: bytes = field(repr=False)
    _model: ParsedModel = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> OnnxFile:
        """Read a graph file; external tensor data is not read.

        Raises:
            BundleError: the file cannot be read, is no ONNX model, or is larger than :data:`MAX_GRAPH_BYTES`.
        """
        try:
            if not path.is_file():
                raise BundleError(f"{path} is not a file; a bundle's graph was expected there. Export the model again.")
            if (size := path.stat().st_size) > MAX_GRAPH_BYTES:
                raise BundleError(
                    f"{path} has {size} bytes, and a graph without its weights has at most {MAX_GRAPH_BYTES}. "
                    "Export the model again."
                )
            content = path.read_bytes()
            return cls(path, content, ParsedModel(content))
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}. Export the model again.") from None
        except WireError as error:
            raise BundleError(f"{path} is not an ONNX model: {error}. Export the model again.") from None

    @property
    def opsets(self) -> dict[str, int]:
        """Versions of the operator sets by domain; the default domain is the empty string."""
        return dict(self._model.opsets)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that a run must feed."""
        initializers = {name for part in self._parts(GraphField.INITIALIZER) for name in part.defines}
        return tuple(
            name for part in self._parts(GraphField.INPUT) for name in part.defines if name not in initializers
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs."""
        return tuple(name for part in self._parts(GraphField.OUTPUT) for name in part.defines)

    @property
    def node_domains(self) -> set[str]:
        """Operator domains of all nodes, those of subgraphs included."""
        return set(self._model.node_domains)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors: initializers and attributes, those of subgraphs included."""
        return tuple(self._model.tensors)

    @property
    def external(self) -> tuple[External, ...]:
        """Locations of the external tensor data."""
        return tuple(tensor.external for tensor in self._model.tensors if tensor.external)

    @property
    def has_functions(self) -> bool:
        """Whether the model defines operators of its own."""
        return ModelField.FUNCTIONS in self._model.fields

    @property
    def has_training_info(self) -> bool:
        """Whether the model holds graphs for training."""
        return ModelField.TRAINING_INFO in self._model.fields

    @property
    def has_sparse_tensors(self) -> bool:
        """Whether the model holds sparse tensors, which engines expand to whatever size they declare."""
        return self._model.has_sparse_tensors

    def cut(self, outputs: Sequence[str]) -> bytes:
        """Serialise the model with only these outputs, in this order, and only the nodes and weights that they need.

        The fields that stay are copied byte by byte.

        Args:
            outputs: names of outputs, or of other values that a node of the graph computes.

        Raises:
            BundleError: no output is named, one is named twice, or the graph does not compute it.
        """
        named = self._named(outputs)
        nodes, needed = self._needed(outputs)
        alive = needed.union(*(part.defines for part in nodes.values()))
        pieces: list[bytes] = []
        for part in self._model.parts:
            if part.field == GraphField.OUTPUT:
                pieces += named
                named = []
            elif part.field == GraphField.NODE:
                pieces += [self._content[part.begin : part.stop]] * (part.begin in nodes)
            elif part.field not in _DROPPED_UNUSED or not alive.isdisjoint(part.defines):
                pieces.append(self._content[part.begin : part.stop])
        begin, stop = self._model.graph_span
        graph = length_field(ModelField.GRAPH, b"".join(pieces + named))
        return self._content[:begin] + graph + self._content[stop:]

    def duplicates(self) -> list[str]:
        """Names of repeated outputs, and of values that are defined more than once."""
        computed = Counter(name for part in self._parts(GraphField.NODE) for name in part.defines)
        stored = Counter(name for part in self._parts(GraphField.INITIALIZER) for name in part.defines)
        return [name for counts in (Counter(self.outputs), computed + stored) for name in counts if counts[name] > 1]

    def _named(self, outputs: Sequence[str]) -> list[bytes]:
        """The serialised ``GraphProto.output`` fields of these outputs; without a declared type, only a name."""
        computed = {name for part in self._parts(GraphField.NODE) for name in part.defines}
        stated = {
            name: part for part in self._parts(GraphField.VALUE_INFO) for name in part.defines if name in computed
        }
        stated |= {name: part for part in self._parts(GraphField.OUTPUT) for name in part.defines}
        offered = f"{self.path} offers {shown(self.outputs)}; ask for some of these"
        if unknown := [name for name in outputs if name not in stated and name not in computed]:
            raise BundleError(f"There is no output {shown(unknown)}: {offered}.")
        if not outputs or len(set(outputs)) < len(outputs):
            raise BundleError(f"Outputs are none or named twice, {shown(outputs) or 'none'}: {offered}, each once.")
        payloads = (
            self._content[stated[name].payload : stated[name].stop]
            if name in stated
            else length_field(_VALUE_INFO_NAME, name.encode())
            for name in outputs
        )
        return [length_field(GraphField.OUTPUT, payload) for payload in payloads]

    def _needed(self, outputs: Sequence[str]) -> tuple[dict[int, Part], set[str]]:
        """The nodes that the outputs need, by the position of their first byte, and the names of the values."""
        producer = {name: part for part in self._parts(GraphField.NODE) for name in part.defines}
        nodes: dict[int, Part] = {}
        needed: set[str] = set()
        open_names = list(outputs)
        while open_names:
            name = open_names.pop()
            if name in needed:
                continue
            needed.add(name)
            node = producer.get(name)
            if node and node.begin not in nodes:
                nodes[node.begin] = node
                open_names += node.uses
        return nodes, needed

    def _parts(self, number: int) -> Iterator[Part]:
        return (part for part in self._model.parts if part.field == number)


def check_graph(file: OnnxFile, path: Path, data: Mapping[str, int]) -> None:
    """Refuse a graph that runs custom code, reads files outside the bundle, or declares more data than there is.

    The check bounds the cost of loading the graph, not of running it: a graph may compute any amount.

    Args:
        file: the graph.
        path: the graph's path, for messages.
        data: sizes in bytes of the files that may hold its tensors, by their path relative to the graph's folder.

    Raises:
        BundleError: the graph has operators of other domains than ONNX's, local functions, training graphs or sparse
            tensors; a name is defined twice; a tensor has an unknown type or impossible shape, data of another size
            than its shape's, or data in another file or beyond a file's end.
    """
    for fault in _faults(file, data):
        raise BundleError(f"{path} is not a graph as w2v-export writes it: {fault}. Export the model again.")


def _faults(file: OnnxFile, data: Mapping[str, int]) -> Iterator[str]:
    if foreign := (file.node_domains | file.opsets.keys()) - {"", "ai.onnx"}:
        yield f"it needs operators of {shown(sorted(foreign))}"
    if file.has_functions:
        yield "it defines functions"
    if file.has_training_info:
        yield "it holds a graph for training"
    if file.has_sparse_tensors:
        yield "it holds sparse tensors"
    if duplicates := file.duplicates():
        yield f"{shown(duplicates)} is defined more than once"
    for tensor in file.tensors:
        if fault := _shape_fault(tensor) or _data_fault(tensor, data):
            yield f"tensor {shown([tensor.name])} {fault}"


def _shape_fault(tensor: Tensor) -> str | None:
    if tensor.data_type not in TensorField.BITS and tensor.data_type != TensorField.STRING:
        return f"is of type {tensor.data_type}, which is unknown"
    product = 1
    for size in tensor.dims:
        product *= size or 1
        if size < 0 or product > _MAX_ELEMENTS:
            return "has an impossible shape"
    return None


def _data_fault(tensor: Tensor, data: Mapping[str, int]) -> str | None:
    """What is wrong with the data of a tensor of valid shape, or None."""
    elements = 1
    for size in tensor.dims:
        elements *= size
    if tensor.data_type == TensorField.STRING:
        inline = tensor.external is None and tensor.raw_bytes is None
        return None if inline and tensor.strings == elements else f"holds other than its {elements} strings"
    bits = TensorField.BITS[tensor.data_type]
    expected = -(-elements * bits // 8)
    if tensor.external:
        return _external_fault(tensor.external, expected, data)
    if tensor.raw_bytes is not None:
        return f"holds {tensor.raw_bytes} bytes for {expected}" if tensor.raw_bytes != expected else None
    # A byte of a typed field holds at most one element, or as many as are packed into it.
    too_many = elements * min(bits, 8) > 8 * tensor.typed_bytes
    return f"holds {tensor.typed_bytes} bytes for {elements} elements" if too_many else None


def _external_fault(external: External, expected: int, data: Mapping[str, int]) -> str | None:
    """What is wrong with the location of external data that should take ``expected`` bytes, or None."""
    if external.location not in data:
        return f"lies in the file {shown([external.location])}, which is not one of the bundle's"
    if external.length is None:
        return "does not say how long its data is"
    if external.length != expected:
        return f"holds {external.length} bytes for {expected}"
    if external.offset < 0 or external.offset + external.length > data[external.location]:
        return f"lies beyond the {data[external.location]} bytes of {shown([external.location])}"
    return None
