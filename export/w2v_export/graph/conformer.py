"""The Conformer encoders: Wav2Vec2-Conformer and Wav2Vec2-BERT.

A block is two half-step feed-forwards around self-attention and a depthwise convolution (Gulati et al. 2020,
"Conformer: Convolution-augmented Transformer for Speech Recognition"). The two families differ in that convolution,
and in the norm after the last block. Positions enter in the attention alone, in one of three forms or not at all.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.fusion import fuse_conv_bn_eval

from w2v_export.graph.encoder import Encoder, FeedForward, Frames, SelfAttention
from w2v_export.graph.tensors import Dense, attention, attention_by_distance, cast, distances, shared_transpose
from w2v_export.memory import releasing


class BareEntry(nn.Module):
    """Layer 0 is the projected features unchanged: the reference loads a positional convolution but never runs it."""

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # noqa: ARG002
        return x


class SinusoidalPositions(nn.Module):
    """Sinusoids of the distances from query to key (Dai et al. 2019, "Transformer-XL", section 3.3).

    Shape: (batch, time, hidden) → (2·time, hidden), row m for the distance time - m; only :func:`shift` needs row 0.
    Without lengths: (columns, hidden), for the distances of :func:`~w2v_export.graph.tensors.distances`.
    All sines come before all cosines, whereas the reference alternates them.
    """

    frequencies: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        exponents = torch.arange(0, hidden_size, 2).float() * -(math.log(10000.0) / hidden_size)
        self.register_buffer("frequencies", exponents.exp())

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        time = x.shape[1]
        backwards = -distances(x) if frames.lengths is None else time - torch.arange(2 * time, device=x.device)
        angles = backwards.to(torch.float32)[:, None] * self.frequencies
        return cast(torch.cat([angles.sin(), angles.cos()], dim=1), x.dtype)


class RotaryPositions(nn.Module):
    """Cosines and sines of the rotation at each frame (Su et al. 2021, "RoFormer").

    Shape: (batch, time, hidden) → (2, time, 1, head_size/2).
    """

    frequencies: Tensor

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies.detach().clone())

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # noqa: ARG002
        angles = torch.arange(x.shape[1], device=x.device).to(torch.float32)[:, None] * self.frequencies
        return cast(torch.stack([angles.cos(), angles.sin()])[:, :, None, :], x.dtype)


class DistanceIndex(nn.Module):
    """The row of the distance embedding for each query and key (Shaw et al. 2018).

    Shape: (batch, time, hidden) → (time, time) int64, the clipped distance key - query + left: 0 … left + right.
    Without lengths: (columns,), for the distances of :func:`~w2v_export.graph.tensors.distances`.
    """

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device)
        distance = distances(x) if frames.lengths is None else position[None, :] - position[:, None]
        return distance.clamp(-self.left, self.right) + self.left


def shift(scores: Tensor) -> Tensor:
    """Turn scores by distance into scores by key: (batch, heads, time, 2·time) → (batch, heads, time, time).

    Column m of row i holds the distance time - m, and key j of that row is at distance i - j: its score is at
    m = time - i + j, which is at i·(2·time - 1) + time + j in memory. So after the first ``time`` numbers are
    dropped and rows made shorter by one, column j holds key j ("Transformer-XL", appendix B).
    """
    batch, heads, time = scores.shape[:3]
    aligned = scores.reshape(batch, heads, -1, time)[:, :, 1:].reshape(batch, heads, time, -1)
    return aligned[:, :, :, :time]


class ConformerAttention(SelfAttention):
    """Self-attention with the parameter names of these families."""

    def __init__(self, reference: Any) -> None:
        projections = reference.linear_q, reference.linear_k, reference.linear_v, reference.linear_out
        super().__init__(*projections, heads=reference.num_heads)


class PositionBiasAttention(ConformerAttention):
    """Self-attention with a bias of query and distance added to its scores, from a table that all blocks share."""

    def by_head(self, query: Tensor) -> Tensor:
        """(batch, time, hidden) → (batch, heads, time, head_size)."""
        return query.reshape(query.shape[0], -1, self.heads, self.head_size).transpose(1, 2)

    def bias(self, query: Tensor, shared: Tensor) -> Tensor:
        """The position bias, scaled: query (batch, time, hidden) and ``shared`` → (batch, heads, time, time)."""
        raise NotImplementedError

    def factors(self, query: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """The same bias as the ``factor`` and ``table`` of :func:`~w2v_export.graph.tensors.attention_by_distance`."""
        raise NotImplementedError

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # type: ignore[override]
        assert frames.shared is not None
        query, key, value = self.query(x), self.key(x), self.value(x)
        if frames.lengths is None:
            factor, table = self.factors(query, frames.shared)
            attended = attention_by_distance(query, key, value, factor, table, self.heads, self.head_size)
        else:
            bias = self.bias(query, frames.shared)
            attended = attention(query, key, value, frames.lengths, bias, self.heads, self.head_size)
        return self.output(attended)


class RelativeAttention(PositionBiasAttention):
    """Scores ((q + u)·k + (q + v)·p) / √head_size, p the projected sinusoids of the distance ("Transformer-XL").

    u is folded into the query's bias. The scale, and the order of the sinusoids in :class:`SinusoidalPositions`, are
    folded into the projection of the positions.
    """

    def __init__(self, reference: Any) -> None:
        super().__init__(reference)
        content_bias, position_bias = reference.pos_bias_u, reference.pos_bias_v
        query = reference.linear_q
        self.query = Dense(shared_transpose(query), query.bias + content_bias.flatten())
        self.offset = nn.Parameter((position_bias - content_bias).detach()[:, None, :])
        weight = reference.linear_pos.weight.T / math.sqrt(self.head_size)
        self.position = Dense(torch.cat([weight[0::2], weight[1::2]]), None)

    def bias(self, query: Tensor, shared: Tensor) -> Tensor:
        factor, table = self.factors(query, shared)
        return shift(factor @ table)

    def factors(self, query: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.position(shared).reshape(-1, self.heads, self.head_size).permute(1, 2, 0)
        return self.by_head(query) + self.offset, positions


class RelativeKeyAttention(PositionBiasAttention):
    """Scores q·(k + e) / √head_size, with e the embedding of the clipped distance; the scale is folded into e."""

    def __init__(self, reference: Any) -> None:
        super().__init__(reference)
        self.distances = Dense(reference.distance_embedding.weight.T / math.sqrt(self.head_size), None)

    def bias(self, query: Tensor, shared: Tensor) -> Tensor:
        scores = self.distances(self.by_head(query))
        batch, heads, time = scores.shape[:3]
        return scores.gather(3, shared.expand(batch, heads, time, time))

    def factors(self, query: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        return self.by_head(query), self.distances.weight[:, shared][None]


class RotaryAttention(ConformerAttention):
    """Self-attention with queries and keys projected from hidden states that are rotated by position, in each head."""

    def rotate(self, x: Tensor, shared: Tensor) -> Tensor:
        cos, sin = shared[0], shared[1]
        heads = x.reshape(x.shape[0], -1, self.heads, self.head_size)
        begin, end = torch.split(heads, self.head_size // 2, dim=3)
        return torch.cat([begin * cos - end * sin, end * cos + begin * sin], dim=3).flatten(2)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # type: ignore[override]
        assert frames.shared is not None
        rotated = self.rotate(x, frames.shared)
        query, key, value = self.query(rotated), self.key(rotated), self.value(x)
        return self.output(attention(query, key, value, frames.lengths, None, self.heads, self.head_size))


class HalfStep(FeedForward):
    """A feed-forward with half its output: the factor 0.5 is folded into the weights, which is exact."""

    def __init__(self, feed_forward: Any) -> None:
        super().__init__(feed_forward)
        output = feed_forward.output_dense
        self.contract = Dense(output.weight.T * 0.5, output.bias * 0.5)


class CentredConv(nn.Module):
    """A depthwise convolution over past and future, its batch norm folded: (batch, time, hidden) → the same shape.

    The kernel reaches beyond the end of an utterance, so the padding is masked with zeros, as in the reference.
    """

    def __init__(self, conv: nn.Conv1d, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(conv, norm)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        return self.conv(frames.masked(x).transpose(1, 2)).transpose(1, 2)


class CausalConv(nn.Module):
    """A depthwise convolution over the past, then a layer norm: (batch, time, hidden) → the same shape.

    It needs no mask, since the padding comes after the utterance.
    """

    def __init__(self, conv: nn.Conv1d, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        self.padding = (conv.kernel_size[0] - 1, 0)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # noqa: ARG002
        return self.norm(self.conv(F.pad(x.transpose(1, 2), self.padding)).transpose(1, 2))


class ConvModule(nn.Module):
    """The convolution module of a block: pointwise with a gated linear unit, depthwise over time, pointwise."""

    def __init__(self, module: Any, depthwise: nn.Module) -> None:
        super().__init__()
        self.norm = module.layer_norm
        self.expand = Dense.of(module.pointwise_conv1)
        self.depthwise = depthwise
        self.activation = module.activation
        self.contract = Dense.of(module.pointwise_conv2)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        x = F.glu(self.expand(self.norm(x)), dim=2)
        return self.contract(self.activation(self.depthwise(x, frames)))


class ConformerLayer(nn.Module):
    """One Conformer block; the reference's kind of positions decides its attention class."""

    def __init__(self, layer: Any, depthwise: nn.Module) -> None:
        super().__init__()
        kind = ATTENTION.get(layer.self_attn.position_embeddings_type, ConformerAttention)
        self.first_norm, self.first = layer.ffn1_layer_norm, HalfStep(layer.ffn1)
        self.attention_norm, self.attention = layer.self_attn_layer_norm, kind(layer.self_attn)
        self.convolution = ConvModule(layer.conv_module, depthwise)
        self.second_norm, self.second = layer.ffn2_layer_norm, HalfStep(layer.ffn2)
        self.norm = layer.final_layer_norm

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        x = x + self.first(self.first_norm(x))
        x = x + self.attention(self.attention_norm(x), frames)
        x = x + self.convolution(x, frames)
        x = x + self.second(self.second_norm(x))
        return self.norm(x)


#: The attention class by ``position_embeddings_type``; the reference ignores other values.
ATTENTION: Final[dict[str | None, type[ConformerAttention]]] = {
    "relative": RelativeAttention,
    "relative_key": RelativeKeyAttention,
    "rotary": RotaryAttention,
}


def positions(model: Any) -> nn.Module | None:
    """The module for the positions that all blocks share: (batch, time, hidden) → a table; None without positions."""
    reference = model.encoder.layers[0].self_attn
    match reference.position_embeddings_type:
        case "relative":
            return SinusoidalPositions(reference.linear_pos.in_features)
        case "relative_key":
            return DistanceIndex(reference.left_max_position_embeddings, reference.right_max_position_embeddings)
        case "rotary":
            return RotaryPositions(model.encoder.embed_positions.inv_freq)
    return None


def conformer(model: Any) -> Encoder:
    """The encoder of a ``Wav2Vec2ConformerModel`` in evaluation mode."""
    blocks: list[nn.Module] = []
    for layer in releasing(model.encoder.layers):
        module = layer.conv_module
        blocks.append(ConformerLayer(layer, CentredConv(module.depthwise_conv, module.batch_norm)))
    return Encoder(BareEntry(), blocks, model.encoder.layer_norm, positions(model))


def bert(model: Any) -> Encoder:
    """The encoder of a ``Wav2Vec2BertModel`` in evaluation mode and without an adapter."""
    blocks: list[nn.Module] = []
    for layer in releasing(model.encoder.layers):
        module = layer.conv_module
        blocks.append(ConformerLayer(layer, CausalConv(module.depthwise_conv, module.depthwise_layer_norm)))
    return Encoder(BareEntry(), blocks, None, positions(model))
