"""Matrix products in int8: weights quantised per column, activations per row while the graph runs (dynamically).

Which products of a model go into int8 is decided in ``w2v_export.precision.int8``.

A row is one frame, so its scale depends on that frame alone: neither the batch nor its padding changes a result, and a
pause keeps its own resolution beside loud speech. The graphs hold standard operators only; ONNX Runtime fuses the last
four (MatMulInteger, Cast and two Mul) into one kernel.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.onnx.symbolic_helper import parse_args
from torch.onnx.utils import register_custom_op_symbolic

from w2v_export.graph.conformer import ConvModule
from w2v_export.graph.encoder import FeedForward, SelfAttention
from w2v_export.graph.inference import InferenceGraph, Projection
from w2v_export.graph.tensors import INT64_MAX, Dense, blocks, shaped
from w2v_export.graph.waveform import StridedConv

#: The largest magnitude of a quantised weight, and of a quantised activation around its zero point.
LEVELS: Final = 127
#: The zero point of activations, which are uint8: processors multiply uint8 with int8 weights.
ZERO_POINT: Final = 128
#: The least magnitude of a row or column, so that the scale of an all-zero one is not 0.
_SILENT: Final = 1e-30


@torch.library.custom_op("w2v::quantise_rows", mutates_args=())
def quantise_rows(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Quantise rows: (batch, rows, channels) → the same shape in uint8, and the scales (batch, rows, 1)."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=_SILENT) * (1 / LEVELS)
    return (torch.round(x / scale) + ZERO_POINT).to(torch.uint8), scale


@parse_args("v", "i")
def _quantise_rows_onnx(g: Any, x: Any, channels: int) -> tuple[Any, Any]:
    last = g.op("Constant", value_t=torch.tensor([-1]))
    lowest = g.op("Neg", g.op("ReduceMin", x, last, keepdims_i=1))
    largest = g.op("Max", g.op("ReduceMax", x, last, keepdims_i=1), lowest, _scalar(g, _SILENT))
    scale = g.op("Mul", largest, _scalar(g, 1 / LEVELS))
    flat = g.op("Reshape", scale, last)
    zero = g.op("Constant", value_t=torch.tensor(ZERO_POINT, dtype=torch.uint8))
    zeros = g.op("Expand", zero, g.op("Shape", flat))
    rows = g.op("Reshape", x, g.op("Constant", value_t=torch.tensor([-1, channels])))
    quantised = g.op("Reshape", g.op("QuantizeLinear", rows, flat, zeros, axis_i=0), g.op("Shape", x))
    return shaped(quantised, channels, torch.uint8), shaped(scale, 1)


@torch.library.custom_op("w2v::cut_rows", mutates_args=())
def cut_rows(x: Tensor, first: int, dropped: int, channels: int) -> Tensor:
    """Rows from ``first`` on without the last ``dropped``, cut to ``channels``: (batch, rows, C) → (batch, …)."""
    return x[:, first : x.shape[1] - dropped, :channels].clone()


@parse_args("v", "i", "i", "i")
def _cut_rows_onnx(g: Any, x: Any, first: int, dropped: int, channels: int) -> Any:
    begin = g.op("Constant", value_t=torch.tensor([first, 0]))
    end = g.op("Constant", value_t=torch.tensor([-dropped or INT64_MAX, channels]))
    axes = g.op("Constant", value_t=torch.tensor([1, 2]))
    return shaped(g.op("Slice", x, begin, end, axes), channels, x.type().dtype())


@torch.library.custom_op("w2v::int8_product", mutates_args=())
def int8_product(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, columns: int) -> Tensor:  # noqa: ARG001
    """Quantised rows times quantised weights: (batch, rows, k), (batch, rows, 1), (k, n), (n,) → (batch, rows, n)."""
    return ((x.float() - ZERO_POINT) @ weight.float()) * (x_scale * scale)


@parse_args("v", "v", "v", "v", "i")
def _int8_product_onnx(g: Any, x: Any, x_scale: Any, weight: Any, scale: Any, columns: int) -> Any:
    zero = g.op("Constant", value_t=torch.tensor(ZERO_POINT, dtype=torch.uint8))
    product = g.op("Cast", g.op("MatMulInteger", x, weight, zero), to_i=1)
    product = g.op("Mul", product, g.op("Mul", x_scale, scale))
    # Keeps the bias apart: ONNX Runtime would fuse it into its kernel, and then scale the bias with the rows.
    apart = g.op("Reshape", product, g.op("Constant", value_t=torch.tensor([0, -1, columns])))
    return shaped(apart, columns)


def _scalar(g: Any, value: float) -> Any:
    return g.op("Constant", value_t=torch.tensor(value))


def register_symbolics(opset: int) -> None:
    """Teach the TorchScript exporter the operators above, from operator set ``opset`` on."""
    register_custom_op_symbolic("w2v::quantise_rows", _quantise_rows_onnx, opset)
    register_custom_op_symbolic("w2v::cut_rows", _cut_rows_onnx, opset)
    register_custom_op_symbolic("w2v::int8_product", _int8_product_onnx, opset)


class QuantisedWeight(nn.Module):
    """A weight (k, n) as int8 with one scale per column, rounded to nearest."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.abs().amax(0).clamp(min=_SILENT) / LEVELS
        self.register_buffer("weight", torch.round(weight / scale).to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor, x_scale: Tensor) -> Tensor:
        return int8_product(x, x_scale, self.weight, self.scale, self.weight.shape[1])


class QuantisedDense(nn.Module):
    """A :class:`Dense` layer in int8.

    With ``smoothing`` (k,) the input's channels are divided by it and the weight's rows multiplied, which moves
    outliers of the activations into the weights (Xiao et al. 2023, "SmoothQuant").
    """

    smoothing: Tensor | None

    def __init__(self, dense: Dense, smoothing: Tensor | None = None) -> None:
        super().__init__()
        weight = dense.weight.detach()
        self.register_buffer("smoothing", None if smoothing is None else 1 / smoothing)
        self.product = QuantisedWeight(weight if smoothing is None else weight * smoothing[:, None])
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.smoothing is not None:
            x = x * self.smoothing
        y = self.product(*quantise_rows(x, x.shape[-1]))
        return y if self.bias is None else y + self.bias


class QuantisedConv(nn.Module):
    """A strided convolution between channels-last activations as int8 products over blocks of one stride.

    With stride 2, two neighbouring frames of (batch, time, channels) *are* one row of (batch, time/2, 2·channels): a
    kernel of 2 is one product, and a kernel of 3 has a second one with the first half of the next row and its scale.
    Shape: (batch, stride·n, channels in) → (batch, n - ⌈kernel/stride⌉ + 1, channels out).
    """

    channels_first = False

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.stride, self.channels = conv.stride[0], conv.in_channels
        taps = torch.split(conv.weight.detach().permute(2, 1, 0), self.stride)
        self.products = nn.ModuleList(QuantisedWeight(weight.flatten(0, 1)) for weight in taps)
        self.channels_under = [weight.shape[0] * weight.shape[1] for weight in taps]
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantise_rows(blocks(x, self.stride, self.stride, self.channels), self.stride * self.channels)
        extra = len(self.products) - 1
        parts = []
        for shift, (product, channels) in enumerate(zip(self.products, self.channels_under, strict=True)):
            if extra:
                part = cut_rows(rows, shift, extra - shift, channels), cut_rows(scale, shift, extra - shift, 1)
            else:
                part = rows, scale
            parts.append(product(*part))
        y = sum(parts[1:], parts[0])
        return y if self.bias is None else y + self.bias


#: The dense layers whose input is frames, by module. Others have positions or distances as input, or are small.
_DENSE: Final[dict[type[nn.Module], tuple[str, ...]]] = {
    Projection: ("dense",),
    SelfAttention: ("query", "key", "value", "output"),
    FeedForward: ("expand", "contract"),
    ConvModule: ("expand", "contract"),
}


def quantisable(graph: InferenceGraph) -> dict[str, Dense | StridedConv]:
    """The layers of a graph that can be quantised to int8, by name, in the order of computation."""
    found: dict[str, Dense | StridedConv] = {}
    for name, module in graph.named_modules():
        if isinstance(module, StridedConv):
            found[name] = module
        for kind, names in _DENSE.items():
            if isinstance(module, kind):
                found |= {f"{name}.{part}": getattr(module, part) for part in names}
    return found
