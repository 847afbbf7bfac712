"""Parts of every graph: padding masks, exact means, dense layers, and custom operators for the ONNX export."""

from __future__ import annotations

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

    Summed in float64: engines add hundreds of thousands of float32 samples one after the other, which loses digits
    of an offset, and a layer norm over a pause amplifies the error.
    """
    total = torch.where(mask, values, 0.0).double().sum(1, keepdim=True)
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


@torch.library.custom_op("w2v::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, bias: Tensor | None, heads: int, head_size: int
) -> Tensor:
    """Multi-head attention over the first ``lengths`` keys: (batch, time, C) each, (batch,) → (batch, time, C).

    ``bias`` (batch or 1, heads or 1, time, time) is added to the scores after their division by √head_size.

    In ONNX this is ``Attention`` of operator set 24 with ``nonpad_kv_seqlen``, with the softmax always in float32. The
    exporter has operator sets up to 20, so the set is raised after the export (``w2v_export.writer``).
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, head_size).transpose(1, 2) for x in (query, key, value))
    mask = valid(lengths, key.shape[1]).transpose(1, 2)[:, None]
    scores = torch.where(mask, 0.0, -torch.inf) if bias is None else torch.where(mask, bias, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=scores).transpose(1, 2).flatten(2)


@parse_args("v", "v", "v", "v", "v", "i", "i")
def _attention_onnx(
    g: Any, query: Any, key: Any, value: Any, lengths: Any, bias: Any, heads: int, head_size: int
) -> Any:
    mask = _absent(g) if symbolic_helper._is_none(bias) else bias
    past = [_absent(g) for _ in ("past_key", "past_value")]
    dtype = query.type().dtype()
    softmax = {} if dtype == torch.float32 else {"softmax_precision_i": _FLOAT}
    attended = g.op(
        "Attention", query, key, value, mask, *past, lengths, q_num_heads_i=heads, kv_num_heads_i=heads, **softmax
    )
    return shaped(attended, heads * head_size, dtype)


def register_symbolics(opset: int) -> None:
    """Teach the TorchScript exporter the two operators above, from operator set ``opset`` on."""
    register_custom_op_symbolic("w2v::blocks", _blocks_onnx, opset)
    register_custom_op_symbolic("w2v::attention", _attention_onnx, opset)


class Dense(nn.Module):
    """A linear layer with its weight stored as (in, out), so that it computes ``x @ weight``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def of(cls, linear: nn.Linear) -> Dense:
        return cls(linear.weight.T, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias
