"""The transformer encoder: the entry that makes layer 0 of the projected features, the blocks, and the final norm.

Each family of models is an :class:`Encoder` with its own parts. The parts here are those of wav2vec 2.0, HuBERT,
UniSpeech and UniSpeech-SAT, whose encoders are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from w2v_export.graph.tensors import Dense, attention, attention_by_distance, shared_transpose
from w2v_export.memory import releasing


@dataclass(frozen=True)
class Frames:
    """Inputs of a block besides the activations.

    ``lengths`` (batch,) int64 counts the valid frames, ``mask`` (batch, time, 1) marks them; both are None where all
    frames are valid, which is the form for long recordings: its memory grows in proportion to the time. ``shared`` is
    what the encoder computed once for all of its blocks, such as relative positions.
    """

    lengths: Tensor | None = None
    mask: Tensor | None = None
    shared: Tensor | None = None

    def masked(self, x: Tensor) -> Tensor:
        """``x`` (batch, time, channels) with zeros in the padding."""
        return x if self.mask is None else torch.where(self.mask, x, 0.0)


class Encoder(nn.Module):
    """The encoder: an entry, blocks, and a norm.

    Args:
        entry: (x, frames) → layer 0: adds the position embedding, and normalises in the post-norm form.
        blocks: (x, frames) → x each; values in padded frames must never affect a valid frame.
        norm: the norm between the last layer and the reference's ``last_hidden_state``; None if these are the same.
        shared: (x, frames) → the tensor that all blocks share, computed once from layer 0.

    Attributes:
        adapter: (x, frames) → the reference's ``last_hidden_state``, in place of the norm's output, where the reference
            has one; set by ``families``.
    """

    def __init__(
        self, entry: nn.Module, blocks: list[nn.Module], norm: nn.Module | None, shared: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.entry, self.blocks, self.norm, self.shared = entry, nn.ModuleList(blocks), norm, shared
        self.adapter: Any = None

    def forward(self, x: Tensor, frames: Frames) -> tuple[list[Tensor], Tensor]:
        """Projected features (batch, time, hidden), zero in the padding → (layers 0 … L, ``last_hidden_state``)."""
        x = self.entry(x, frames)
        if self.shared is not None:
            frames = Frames(frames.lengths, frames.mask, self.shared(x, frames))
        layers = [x]
        for block in self.blocks:
            layers.append(block(layers[-1], frames))
        last = layers[-1] if self.norm is None else self.norm(layers[-1])
        return layers, last if self.adapter is None else self.adapter(last, frames)


class Entry(nn.Module):
    """Adds a position embedding, then normalises in the post-norm form."""

    def __init__(self, position: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.position, self.norm = position, norm

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        x = x + self.position(x, frames)
        return x if self.norm is None else self.norm(x)


class PositionalConv(nn.Module):
    """The grouped convolution in place of position embeddings, with its weight norm folded."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        reference = embedding.conv
        (kernel,) = reference.kernel_size
        self.conv = nn.Conv1d(reference.in_channels, reference.out_channels, kernel, groups=reference.groups, padding=0)
        self.conv.weight = nn.Parameter(reference.weight.detach().clone())
        self.conv.bias = nn.Parameter(reference.bias.detach().clone())
        self.padding = (kernel // 2, (kernel - 1) // 2)
        self.norm: nn.Module | None = getattr(embedding, "batch_norm", None)
        self.activation = embedding.activation

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        x = x.transpose(1, 2)
        if self.norm is not None:  # HuBERT's option; the reference pads with zeros after it
            x = frames.masked(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.activation(self.conv(F.pad(x, self.padding))).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the valid frames, with two of its four biases folded away.

    A key bias adds q·b_k to every score of a row, and softmax does not change if a row is shifted; attention weights
    sum to 1, so a value bias adds b_v to every output, and is folded into the bias of the output projection.
    """

    def __init__(self, query: nn.Linear, key: nn.Linear, value: nn.Linear, output: nn.Linear, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_size = query.out_features // heads
        self.query = Dense.of(query)
        self.key = Dense(shared_transpose(key), None)
        self.value = Dense(shared_transpose(value), None)
        self.output = Dense(shared_transpose(output), output.bias + output.weight @ value.bias)

    @classmethod
    def of(cls, attention: Any) -> SelfAttention:
        """From a reference attention with the parameter names of wav2vec 2.0."""
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
        return cls(*projections, heads=attention.num_heads)

    def forward(self, x: Tensor, frames: Frames, bias: Tensor | None = None) -> Tensor:
        """``bias`` (batch or 1, heads or 1, time, time) is added to the scaled scores."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        return self.output(attention(query, key, value, frames.lengths, bias, self.heads, self.head_size))

    def by_distance(self, x: Tensor, factor: Tensor, table: Tensor) -> Tensor:
        """Attention over all frames; ``factor`` times ``table`` is added, see :func:`attention_by_distance`."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        return self.output(attention_by_distance(query, key, value, factor, table, self.heads, self.head_size))


class FeedForward(nn.Module):
    """Two dense layers around an activation."""

    def __init__(self, feed_forward: Any) -> None:
        super().__init__()
        self.expand = Dense.of(feed_forward.intermediate_dense)
        self.activation = feed_forward.intermediate_act_fn
        self.contract = Dense.of(feed_forward.output_dense)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.activation(self.expand(x)))


class LanguageAdapter(nn.Module):
    """The bottleneck adapter that MMS adds to each block, with one set of weights for each language."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.norm = adapter.norm
        self.contract, self.expand = Dense.of(adapter.linear_1), Dense.of(adapter.linear_2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(F.relu(self.contract(self.norm(x))))


class EncoderLayer(nn.Module):
    """One transformer block in the post-norm form or, if ``stable`` (``do_stable_layer_norm``), the pre-norm form."""

    def __init__(self, layer: Any, stable: bool, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.stable = stable
        self.attention = attention or SelfAttention.of(layer.attention)
        self.attention_norm = layer.layer_norm
        self.feed_forward = FeedForward(layer.feed_forward)
        self.feed_forward_norm = layer.final_layer_norm
        adapter = getattr(layer, "adapter_layer", None)
        self.adapter = None if adapter is None else LanguageAdapter(adapter)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        if self.stable:
            x = x + self.attention(self.attention_norm(x), frames)
            x = x + self.feed_forward(self.feed_forward_norm(x))
        else:
            x = self.attention_norm(x + self.attention(x, frames))
            x = self.feed_forward_norm(x + self.feed_forward(x))
        return x if self.adapter is None else self.adapter(x)


def transformer(model: Any) -> Encoder:
    """The encoder of a wav2vec 2.0, HuBERT, UniSpeech or UniSpeech-SAT model."""
    reference, stable = model.encoder, model.config.do_stable_layer_norm
    entry = Entry(PositionalConv(reference.pos_conv_embed), None if stable else reference.layer_norm)
    blocks: list[nn.Module] = [EncoderLayer(layer, stable) for layer in releasing(reference.layers)]
    return Encoder(entry, blocks, reference.layer_norm if stable else None)
