"""The float16 (fp16) graph for GPUs, with its convolutions as wide matrix products.

float16 reaches from the first convolution to the last layer. Inputs and outputs, the samples and their normalisation,
the statistics of the group norm, log-mel features, the angles of positions, pooling and the head stay in float32. Layer
norms and the softmax of the attention have float16 inputs and outputs, and compute in float32.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from w2v_export.graph.conformer import RotaryPositions, SinusoidalPositions
from w2v_export.graph.encoder import Frames, PositionalConv
from w2v_export.graph.inference import InferenceGraph
from w2v_export.graph.tensors import blocks, cast
from w2v_export.graph.waveform import FirstConv, StridedConv, WaveformFrontEnd

#: Frames that one row of :class:`BlockedPositionalConv` computes.
BLOCK: Final = 8


class ConvProduct(nn.Module):
    """A strided convolution between channels-last activations as one matrix product over all kernel positions.

    Shape: (batch, stride·n, channels in) → (batch, n - ⌈kernel/stride⌉ + 1, channels out).
    """

    channels_first = False

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.kernel, self.stride, self.channels = conv.kernel_size[0], conv.stride[0], conv.in_channels
        self.weight = nn.Parameter(conv.weight.detach().permute(2, 1, 0).flatten(0, 1).contiguous())
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        y = blocks(x, self.kernel, self.stride, self.channels) @ self.weight
        return y if self.bias is None else y + self.bias


class BlockedPositionalConv(nn.Module):
    """The positional convolution as one batched matrix product, whose rows compute :data:`BLOCK` frames each.

    The batch is one product for each group of channels. A row of the left factor holds the input of BLOCK consecutive
    output frames, kernel + BLOCK - 1 frames, padded to whole blocks. Column block d of the right factor is the kernel
    shifted down by d frames, with zeros around it; constant folding computes it once from the kernel. So a frame is
    copied kernel / BLOCK + 2 times instead of kernel times, and (BLOCK - 1) / kernel of the products are with zero.
    """

    def __init__(self, position: PositionalConv) -> None:
        super().__init__()
        conv = position.conv
        self.groups, self.kernel = conv.groups, conv.kernel_size[0]
        self.padding, self.norm, self.activation = position.padding, position.norm, position.activation
        weight = conv.weight.detach().reshape(self.groups, -1, conv.in_channels // self.groups, self.kernel)
        self.weight = nn.Parameter(weight.permute(0, 3, 2, 1).contiguous())
        self.bias = conv.bias

    @property
    def rows(self) -> int:
        """Input frames of a row of the left factor, in whole blocks."""
        return -(-(self.kernel + BLOCK - 1) // BLOCK) * BLOCK

    def moved(self) -> Tensor:
        """The right factor: (groups, rows · channels in, BLOCK · channels out)."""
        groups, kernel, channels, columns = self.weight.shape
        # The rows are longer by one than the rows that are read of them, so each next row read is shifted by one frame.
        weight = cast(self.weight, torch.float32)  # constant folding runs on the CPU, in float32
        row = F.pad(weight, (0, 0, 0, 0, 0, self.rows + 1 - kernel))
        rows = row[:, None].expand(groups, BLOCK, -1, channels, columns).reshape(groups, -1, channels, columns)
        read = rows[:, : BLOCK * self.rows].reshape(groups, BLOCK, self.rows, channels, columns)
        moved = read.permute(0, 2, 3, 1, 4).reshape(groups, self.rows * channels, BLOCK * columns)
        return cast(moved, self.weight.dtype)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        if self.norm is not None:  # HuBERT's option; the reference pads with zeros after it
            x = frames.masked(self.norm(x.transpose(1, 2)).transpose(1, 2))
        batch, time = x.shape[:2]
        channels = self.weight.shape[2]
        # Pad so that the last row has all the frames that it takes, then cut to whole blocks.
        x = F.pad(x, (0, 0, self.padding[0], self.rows - self.padding[0] - 1))
        x = x[:, : x.shape[1] // BLOCK * BLOCK]
        x = x.reshape(batch, -1, self.groups, channels).transpose(1, 2).reshape(batch * self.groups, -1, channels)
        seen = blocks(x, self.rows, BLOCK, channels).reshape(batch, self.groups, -1, self.rows * channels)
        y = (seen @ self.moved()).reshape(batch, self.groups, -1, channels).transpose(1, 2)
        y = y.reshape(batch, -1, self.groups * channels)[:, :time]
        return self.activation(y + self.bias)


def shape_for_gpu(graph: InferenceGraph) -> None:
    """Replace the convolutions of a graph by matrix products, in place; the outputs stay the same."""
    graph.names_axes = True
    for name, module in list(graph.named_modules()):
        if isinstance(module, FirstConv):
            module.channels_first = False
        if isinstance(module, StridedConv):
            graph.set_submodule(name, ConvProduct(module.conv))
        if isinstance(module, PositionalConv):
            graph.set_submodule(name, BlockedPositionalConv(module))


def halve(graph: InferenceGraph) -> None:
    """Convert a graph to float16, in place.

    Samples that are not normalised may be too small for float16, so the first convolution then multiplies in float32.
    """
    encoder = graph.encoder
    parts: list[Any] = [graph.projection, encoder.entry, encoder.blocks, encoder.norm]
    if not isinstance(encoder.shared, SinusoidalPositions | RotaryPositions):
        parts.append(encoder.shared)
    graph.dtype = torch.float16
    front_end = graph.front_end
    if isinstance(front_end, WaveformFrontEnd):
        first: Any
        first, *others = front_end.conv_layers
        first.conv.dtype = torch.float16
        first.conv.factors = torch.float16 if front_end.normalise else torch.float32
        parts += [*others, first.norm]
    for part in parts:
        if part is not None:
            part.half()
