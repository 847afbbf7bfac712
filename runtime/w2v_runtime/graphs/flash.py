"""Replace attention by ONNX Runtime's own operator for it, which never holds the scores of all pairs of frames."""

from __future__ import annotations

from typing import Final, NamedTuple

from w2v_runtime.graphs.onnx_format import GraphField, ModelField, ParsedModel, Part
from w2v_runtime.graphs.protobuf import LENGTH, VARINT, Wire, length_field, number_field

#: The domain of the operators that ONNX Runtime adds to the standard ones.
DOMAIN: Final = "com.microsoft"
#: Fields of a ``NodeProto`` and of an ``AttributeProto``, and the attribute type INT.
_INPUT, _OUTPUT, _NAME, _OP_TYPE, _ATTRIBUTE, _DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TYPE, _INT = 1, 3, 20, 2
#: Fields of an ``OperatorSetIdProto``.
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
#: Attributes of an ``Attention`` whose meaning the other operator has too.
_HEADS: Final = ("q_num_heads", "kv_num_heads", "softmax_precision")


def with_flash_attention(content: bytes) -> bytes:
    """The model with ``com.microsoft.MultiHeadAttention`` in place of every ``Attention`` of three inputs.

    Without a mask, a bias or lengths, ONNX Runtime computes that operator as flash attention (Dao et al. 2022), in
    memory linear in the frames, where its kernel of the standard operator holds heads · frames² scores.
    """
    model = ParsedModel(content)
    begin, stop = model.graph_span
    pieces = [_rewritten(content, part) or content[part.begin : part.stop] for part in model.parts]
    opset = length_field(_OPSET_DOMAIN, DOMAIN.encode()) + number_field(_OPSET_VERSION, 1)
    graph = length_field(ModelField.GRAPH, b"".join(pieces)) + length_field(ModelField.OPSET_IMPORT, opset)
    return content[:begin] + graph + content[stop:]


class _Node(NamedTuple):
    inputs: list[str]
    outputs: list[str]
    name: str
    op_type: str
    domain: str
    attributes: dict[str, int]


def _rewritten(content: bytes, part: Part) -> bytes | None:
    """The other operator's node for a node that is such an ``Attention``; else None."""
    if part.field != GraphField.NODE:
        return None
    node = _parsed(content, part)
    plain = len(node.inputs) == 3 and all(node.inputs) and set(node.attributes) <= set(_HEADS)
    if node.op_type != "Attention" or node.domain or not plain:
        return None
    attribute = (
        length_field(_ATTRIBUTE_NAME, b"num_heads")
        + number_field(_ATTRIBUTE_INT, node.attributes["q_num_heads"])
        + number_field(_ATTRIBUTE_TYPE, _INT)
    )
    fields = [length_field(_INPUT, name.encode()) for name in node.inputs]
    fields += [length_field(_OUTPUT, name.encode()) for name in node.outputs]
    fields += [
        length_field(_NAME, node.name.encode()),
        length_field(_OP_TYPE, b"MultiHeadAttention"),
        length_field(_ATTRIBUTE, attribute),
        length_field(_DOMAIN, DOMAIN.encode()),
    ]
    return length_field(GraphField.NODE, b"".join(fields))


def _parsed(content: bytes, part: Part) -> _Node:
    wire = Wire(content)
    texts: dict[int, list[str]] = {field: [] for field in (_INPUT, _OUTPUT, _NAME, _OP_TYPE, _DOMAIN)}
    attributes: dict[str, int] = {}
    for field, _, _, value, stop in wire.fields(part.payload, part.stop, {}):
        if field in texts:
            texts[field].append(wire.text(value, stop))
        elif field == _ATTRIBUTE:
            name, number = "", 0
            for inner, kind, _, inner_value, inner_stop in wire.fields(value, stop, {_ATTRIBUTE_NAME: LENGTH}):
                if inner == _ATTRIBUTE_NAME:
                    name = wire.text(inner_value, inner_stop)
                elif inner == _ATTRIBUTE_INT and kind == VARINT:
                    number = wire.signed(inner_value, inner_stop)
            attributes[name] = number
    name, op_type, domain = ("".join(texts[field][-1:]) for field in (_NAME, _OP_TYPE, _DOMAIN))
    return _Node(texts[_INPUT], texts[_OUTPUT], name, op_type, domain, attributes)
