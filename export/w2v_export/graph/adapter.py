"""The adapters of ``add_adapter``: strided convolutions after the encoder, whose output is the ``last_hidden_state``.

That of Wav2Vec2-BERT has attention between them. Frame t of a level is centred on frame stride·t of the level below,
and what lies beyond an utterance's end counts as zero. The adapter computes in float32, whatever the encoder does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from w2v_export.graph.conformer import ConformerAttention, HalfStep
from w2v_export.graph.encoder import FeedForward, Frames
from w2v_export.graph.tensors import Dense, cast, valid


class Narrowing(nn.Module):
    """A strided convolution with a gated linear unit: (batch, time, in) → (batch, ⌈time / stride⌉, out)."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        return F.glu(self.conv(frames.masked(x).transpose(1, 2)), dim=1).transpose(1, 2)


class ConvLevel(nn.Module):
    """One convolution of the adapter of wav2vec 2.0, WavLM, data2vec and conformer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.narrowing = Narrowing(layer.conv)

    def forward(self, x: Tensor, frames: Frames, narrowed: Frames) -> Tensor:  # noqa: ARG002
        return self.narrowing(x, frames)


class AttentionLevel(nn.Module):
    """One layer of the adapter of Wav2Vec2-BERT: attention between frames that a convolution made, and a feed-forward.

    The frames that the attention's output is added to come from a convolution of their own.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.residual_norm, self.residual = layer.residual_layer_norm, Narrowing(layer.residual_conv)
        self.attention_norm, self.narrowing = layer.self_attn_layer_norm, Narrowing(layer.self_attn_conv)
        self.attention = ConformerAttention(layer.self_attn)
        self.feed_forward_norm, self.feed_forward = layer.ffn_layer_norm, FeedForward(layer.ffn)

    def forward(self, x: Tensor, frames: Frames, narrowed: Frames) -> Tensor:
        residual = self.residual(self.residual_norm(x), frames)
        x = self.narrowing(self.attention_norm(x), frames)
        x = residual + self.attention(x, narrowed)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Adapter(nn.Module):
    """The adapter of a reference model: (batch, time, hidden) → (batch, ⌈time / stride⌉, size).

    Attributes:
        stride: frames of the encoder for one of the output.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        reference, feed_forward = model.adapter, getattr(model, "intermediate_ffn", None)
        self.before = None if feed_forward is None else HalfStep(feed_forward)
        self.projection = None if reference.proj is None else Dense.of(reference.proj)
        self.norm = reference.proj_layer_norm
        level = AttentionLevel if hasattr(reference.layers[0], "self_attn") else ConvLevel
        self.levels = nn.ModuleList(level(layer) for layer in reference.layers)
        self.level_stride: int = model.config.adapter_stride
        self.stride = self.level_stride ** len(self.levels)

    def lengths(self, lengths: Tensor) -> Tensor:
        """Valid frames of the output, of those of the encoder."""
        return _narrowed(lengths, self.stride)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        x = cast(x, torch.float32)
        if self.before is not None:
            x = x + self.before(x)
        if self.projection is not None:
            x = self.norm(self.projection(x))
        for level in self.levels:
            narrowed = Frames()
            if frames.lengths is not None:
                lengths = _narrowed(frames.lengths, self.level_stride)
                narrowed = Frames(lengths, valid(lengths, _narrowed(x.shape[1], self.level_stride)))
            x, frames = level(x, frames, narrowed), narrowed
        return x


def _narrowed(frames: Any, stride: int) -> Any:
    """Frames after a centred convolution: (frames - 1) // stride + 1, and none of none."""
    return (frames + stride - 1) // stride
