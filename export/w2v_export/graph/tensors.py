"""Parts of every graph: padding masks, exact means, dense layers, and custom operators for the ONNX export."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.onnx import symbolic_helper
from torch.onnx.symbolic_helper import parse_args
from torch.onnx.utils import register_custom_op_symbolic

#: "To the end" in an ONNX ``Slice``.
INT64_MAX: Final = 2**63 - 1
#: Steps that are added up before their sum joins the sums of other blocks.
SUMMED: Final = 512
#: Queries of one step of :func:`attention_by_distance`.
QUERIES: Final = 128
#: float32 in ONNX's ``TensorProto.DataType``.
_FLOAT: Final = 1


def valid(lengths: Tensor, size: Any) -> Tensor:
    """Mask of the first ``lengths`` of ``size`` positions: (batch,) → (batch, size, 1) bool."""
    return (torch.arange(size, device=lengths.device)[None, :] < lengths[:, None])[:, :, None]


def count(lengths: Tensor) -> Tensor:
    """Lengths as a divisor: (batch,) → (batch, 1, 1) float, at least 1, so that an empty row stays finite."""
    return lengths.clamp(min=1).to(torch.float32)[:, None, None]


def masked_mean(values: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the valid steps: (batch, time) → (batch, 1), (batch, time, channels) → (batch, 1, channels).

    Summed in float64, and in blocks for OpenVINO, which turns float64 into float32: engines add hundreds of thousands
    of samples one after the other, which in float32 loses the digits of an offset, and a norm over a pause amplifies
    the error.
    """
    total = summed(torch.where(mask, values, 0.0).double())
    divisor = count(lengths) if values.ndim == 3 else count(lengths).squeeze(2)
    return (total / divisor.double()).to(values.dtype)


def num_frames(samples: Tensor, receptive_field: int, stride: int) -> Tensor:
    """``ConvStack.num_frames`` in tensor arithmetic."""
    return (samples + (stride - receptive_field)).clamp(min=0).div(stride, rounding_mode="trunc")


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as ``dtype``; if it is of that dtype already, no operator is added to the graph."""
    return x if x.dtype == dtype else x.to(dtype)


def _constant(g: Any, *values: int) -> Any:
    return g.op("Constant", value_t=torch.tensor(values))


def _absent(g: Any) -> Any:
    """An optional input that is left out."""
    none = g.op("prim::Constant")
    none.setType(torch._C.OptionalType.ofTensor())
    return none


def shaped(value: Any, channels: int, dtype: Any = torch.float32) -> Any:
    """Declare the shape of ``value``, (batch, time, channels), which the exporter cannot infer for custom operators."""
    value.setType(torch._C.TensorType.get().with_dtype(dtype).with_sizes([None, None, channels]))
    return value


@torch.library.custom_op("w2v::blocks", mutates_args=())
def blocks(x: Tensor, kernel: int, stride: int, channels: int) -> Tensor:
    """The input under each kernel position: (batch, stride·n, C) → (batch, n - b + 1, kernel·C), b = ⌈kernel/stride⌉.

    The input *is* (batch, n, stride·C); b shifted views of it side by side, cut to kernel·C columns, hold all kernel
    positions. It is a custom operator because traced PyTorch would take two slices for a view where ONNX needs one.
    """
    rows = x.reshape(x.shape[0], -1, stride * channels)
    extra = math.ceil(kernel / stride) - 1
    views = [rows[:, shift : rows.shape[1] - extra + shift] for shift in range(extra + 1)]
    return torch.cat(views, dim=-1)[:, :, : kernel * channels].clone()


@parse_args("v", "i", "i", "i")
def _blocks_onnx(g: Any, x: Any, kernel: int, stride: int, channels: int) -> Any:
    rows = g.op("Reshape", x, _constant(g, 0, -1, stride * channels))
    extra = math.ceil(kernel / stride) - 1
    views = [
        g.op("Slice", rows, _constant(g, shift), _constant(g, shift - extra), _constant(g, 1)) for shift in range(extra)
    ]
    rest = (kernel - extra * stride) * channels
    views.append(g.op("Slice", rows, _constant(g, extra, 0), _constant(g, INT64_MAX, rest), _constant(g, 1, 2)))
    frames = g.op("Concat", *views, axis_i=2) if extra else rows if kernel == stride else views[0]
    return shaped(frames, kernel * channels, x.type().dtype())


@torch.library.custom_op("w2v::in_blocks", mutates_args=())
def in_blocks(x: Tensor, channels: int) -> Tensor:
    """Time in blocks, the last one filled up with zeros: (batch, time, C) → (batch, blocks, :data:`SUMMED`, C).

    It is a custom operator because traced PyTorch would lose the number of channels, which ONNX then lacks.
    """
    rest = x.new_zeros(x.shape[0], -x.shape[1] % SUMMED, channels)
    return torch.cat([x, rest], dim=1).reshape(x.shape[0], -1, SUMMED, channels)


@parse_args("v", "i")
def _in_blocks_onnx(g: Any, x: Any, channels: int) -> Any:
    padded = _filled_up(g, x, SUMMED, 1)
    blocked = g.op("Reshape", padded, _constant(g, 0, -1, SUMMED, channels))
    blocked.setType(torch._C.TensorType.get().with_dtype(x.type().dtype()).with_sizes([None, None, SUMMED, channels]))
    return blocked


def _filled_up(g: Any, x: Any, size: int, axis: int) -> Any:
    """``x`` with zeros after it along an axis, up to a multiple of ``size``."""
    length = g.op("Shape", x, start_i=axis, end_i=axis + 1)
    surplus = g.op("Mod", g.op("Neg", length), _constant(g, size))  # not negative: it has the divisor's sign
    after = g.op("Concat", _constant(g, 0), surplus, axis_i=0)
    return g.op("Pad", x, after, _absent(g), _constant(g, axis))


def summed(x: Tensor) -> Tensor:
    """The sum over time, in blocks: (batch, time) → (batch, 1), (batch, time, C) → (batch, 1, C)."""
    if x.ndim == 2:
        return summed(x[:, :, None]).squeeze(2)
    return in_blocks(x, int(x.shape[2])).sum(2).sum(1, keepdim=True)


@torch.library.custom_op("w2v::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, bias: Tensor | None, heads: int, head_size: int
) -> Tensor:
    """Multi-head attention over the first ``lengths`` keys: (batch, time, C) each, (batch,) → (batch, time, C).

    Without ``lengths`` all keys are valid. ``bias`` (batch or 1, heads or 1, time, time) is added to the scores after
    their division by √head_size.

    In ONNX this is ``Attention`` of operator set 24 with ``nonpad_kv_seqlen``, with the softmax always in float32. The
    exporter has operator sets up to 20, so the set is raised after the export (``w2v_export.writer``).
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, head_size).transpose(1, 2) for x in (query, key, value))
    scores = bias
    if lengths is not None:
        mask = valid(lengths, key.shape[1]).transpose(1, 2)[:, None]
        scores = torch.where(mask, 0.0 if bias is None else bias, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=scores).transpose(1, 2).flatten(2)


@parse_args("v", "v", "v", "v", "v", "i", "i")
def _attention_onnx(
    g: Any, query: Any, key: Any, value: Any, lengths: Any, bias: Any, heads: int, head_size: int
) -> Any:
    return _attention_node(g, query, key, value, lengths, bias, heads, head_size)


def _attention_node(
    g: Any, query: Any, key: Any, value: Any, lengths: Any, bias: Any, heads: int, head_size: int
) -> Any:
    optional = [bias, None, None, lengths]  # between them the past keys and values
    optional = [None if one is None or symbolic_helper._is_none(one) else one for one in optional]
    while optional and optional[-1] is None:
        optional.pop()
    dtype = query.type().dtype()
    softmax = {} if dtype == torch.float32 else {"softmax_precision_i": _FLOAT}
    inputs = query, key, value, *(_absent(g) if one is None else one for one in optional)
    attended = g.op("Attention", *inputs, q_num_heads_i=heads, kv_num_heads_i=heads, **softmax)
    return shaped(attended, heads * head_size, dtype)


def distances(x: Tensor) -> Tensor:
    """The distance, key - query, of each column of a ``table`` of :func:`attention_by_distance`.

    Shape: x (batch, time, …) → (2·time + QUERIES + 1,) int64; so many columns let each step slice its own.
    """
    time = x.shape[1]
    return torch.arange(2 * time + QUERIES + 1, device=x.device) - (time + QUERIES)


@torch.library.custom_op("w2v::attention_by_distance", mutates_args=())
def attention_by_distance(
    query: Tensor, key: Tensor, value: Tensor, factor: Tensor, table: Tensor, heads: int, head_size: int
) -> Tensor:
    """Multi-head attention with a bias of query and distance: (batch, time, C) each → (batch, time, C).

    The scaled score of query i and key j gains factor_i · table_{j-i}.

    Shape: factor (batch, heads, time, n); table (heads or 1, n, columns), column c for the distance
    ``distances(query)[c]``.

    In ONNX this is a ``Loop`` over blocks of :data:`QUERIES` queries, so that the scores and biases of a block are all
    that is held: the memory grows in proportion to the time, not to its square.
    """
    time = query.shape[1]
    position = torch.arange(time, device=query.device)
    columns = position[None, :] - position[:, None] + (time + QUERIES)
    scores = factor @ table
    bias = scores.gather(3, columns.expand(*scores.shape[:2], time, time))
    return attention(query, key, value, None, bias, heads, head_size)


@parse_args("v", "v", "v", "v", "v", "i", "i")
def _attention_by_distance_onnx(
    g: Any, query: Any, key: Any, value: Any, factor: Any, table: Any, heads: int, head_size: int
) -> Any:
    channels, dtype = heads * head_size, query.type().dtype()
    size, one, minus_one = _constant(g, QUERIES), _constant(g, 1), _constant(g, -1)
    time = g.op("Shape", query, start_i=1, end_i=2)
    query = _filled_up(g, query, QUERIES, 1)
    factor = _filled_up(g, factor, QUERIES, 2)
    steps = g.op("Squeeze", g.op("Div", g.op("Shape", query, start_i=1, end_i=2), size))
    width = g.op("Add", time, size)  # of a row of scores by distance
    forever = g.op("Constant", value_t=torch.tensor(True))

    loop = g.op("Loop", steps, forever)
    block = loop.node().addBlock()
    body = dataclasses.replace(g, block=block)
    step, alive = block.addInputToBlock(), block.addInputToBlock()
    first = body.op("Mul", body.op("Reshape", step, _constant(body, 1)), size)
    stop = body.op("Add", first, size)
    queries = shaped(body.op("Slice", query, first, stop, one), channels, dtype)
    begin = body.op("Sub", body.op("Add", time, _constant(body, 1)), first)
    columns = body.op("Slice", table, begin, body.op("Add", begin, width), _constant(body, 2))
    scores = body.op("MatMul", body.op("Slice", factor, first, stop, _constant(body, 2)), columns)
    # Query r of the block reads its scores from column QUERIES - 1 - r on: rows that are shorter by one do so.
    flat = body.op("Reshape", scores, _constant(body, 0, 0, -1))
    flat = body.op("Slice", flat, _constant(body, QUERIES - 1), minus_one, _constant(body, 2))
    rows = body.op("Reshape", flat, _constant(body, 0, 0, QUERIES, -1))
    bias = body.op("Slice", rows, _constant(body, 0), time, _constant(body, 3))
    attended = _attention_node(body, queries, key, value, None, bias, heads, head_size)
    block.registerOutput(body.op("Identity", alive))
    block.registerOutput(attended)

    joined = g.op("Transpose", loop, perm_i=[1, 0, 2, 3])
    joined = g.op("Reshape", joined, _constant(g, 0, -1, channels))
    return shaped(g.op("Slice", joined, _constant(g, 0), time, one), channels, dtype)


def register_symbolics(opset: int) -> None:
    """Teach the TorchScript exporter the operators above, from operator set ``opset`` on."""
    register_custom_op_symbolic("w2v::blocks", _blocks_onnx, opset)
    register_custom_op_symbolic("w2v::in_blocks", _in_blocks_onnx, opset)
    register_custom_op_symbolic("w2v::attention", _attention_onnx, opset)
    register_custom_op_symbolic("w2v::attention_by_distance", _attention_by_distance_onnx, opset)


def shared_transpose(layer: nn.Linear | nn.Conv1d) -> Tensor:
    """The weight of a linear layer or a pointwise convolution as (in, out).

    The layer keeps a view of it in place of its own, so that a model and its graph hold each weight once.
    """
    shape = layer.weight.shape
    weight = layer.weight.detach().flatten(1).T.contiguous()
    layer.weight.data = weight.T.reshape(shape)
    return weight


class Dense(nn.Module):
    """A linear layer with its weight stored as (in, out), so that it computes ``x @ weight``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def of(cls, layer: nn.Linear | nn.Conv1d) -> Dense:
        """From a linear layer or a pointwise convolution."""
        return cls(shared_transpose(layer), layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias
