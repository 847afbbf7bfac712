"""The encoder of WavLM: the transformer of wav2vec 2.0 with a gated relative position bias in its attention.

Chen et al., *WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing* (2022), section
III-A, as transformers computes it: the scores of query i and key j gain g_i · d_{j-i}. The embedding d of their
distance belongs to the first block and serves all of them; the gate g_i each block takes from its own input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from w2v_export.graph.encoder import Encoder, EncoderLayer, Entry, Frames, PositionalConv, SelfAttention
from w2v_export.graph.tensors import Dense, distances
from w2v_export.memory import releasing


class RelativePosition(nn.Module):
    """The relative position bias of every pair of frames, before the gate.

    The reference sorts distances into buckets, far ones logarithmically, and embeds the buckets. All distances beyond
    ``max_distance`` share the last bucket of their direction, so the bias of all distances up to there is a constant
    table (heads, 2·max_distance + 1). The table also fixes distances at the border of two buckets, where engines may
    round a logarithm differently.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.furthest = int(attention.max_distance)
        distances = torch.arange(-self.furthest, self.furthest + 1)
        embedded = attention.rel_attn_embed.weight[attention._relative_positions_bucket(distances)]
        self.table = nn.Parameter(embedded.detach().T.contiguous())

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """(batch, time, hidden) → (1, heads, time, time), rows for queries and columns for keys.

        Without lengths: (heads, 1, columns), the table of :func:`~w2v_export.graph.tensors.attention_by_distance`.
        """
        if frames.lengths is None:
            return self.table[:, None, self.index(distances(x))]
        position = torch.arange(x.shape[1], device=x.device)
        return self.table[:, self.index(position[None, :] - position[:, None])][None]

    def index(self, distance: Tensor) -> Tensor:
        """The column of :attr:`table` for each distance."""
        return distance.clamp(-self.furthest, self.furthest) + self.furthest


class Gate(nn.Module):
    """The gate of the relative position bias, for each query and head.

    With a, b = sigmoid(W·h), where h is the head's share of the block's input, the gate is a·(b·s_head - 1) + 2. The
    reference projects h to 2 × 4 columns and adds up each four: W holds their sums. W is the same for all heads, and
    is repeated on the diagonal of one (hidden, 2·heads) matrix, all columns for a before all columns for b, since one
    wide product costs engines less than a narrow one per head.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        linear, heads = attention.gru_rel_pos_linear, attention.num_heads
        self.heads = heads
        weight = linear.weight.detach().unflatten(0, (2, 4)).sum(1)
        bias = linear.bias.detach().unflatten(0, (2, 4)).sum(1)
        diagonal = torch.cat([torch.kron(torch.eye(heads), row[:, None]) for row in weight], dim=1)
        self.project = Dense(diagonal, bias.repeat_interleave(heads))
        self.scale = nn.Parameter(attention.gru_rel_pos_const.detach()[0, :, 0].clone())

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, hidden) → (batch, heads, time, 1)."""
        columns = torch.sigmoid(self.project(x)).transpose(1, 2)
        a, b = columns[:, : self.heads], columns[:, self.heads :]
        gate: Tensor = a * (b * self.scale - 1.0) + 2.0
        return gate[:, :, :, None]


class GatedAttention(nn.Module):
    """Self-attention with the shared position bias multiplied by the block's own gate."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.gate = Gate(attention)
        self.attend = SelfAttention.of(attention)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        assert frames.shared is not None
        if frames.lengths is None:
            return self.attend.by_distance(x, self.gate(x), frames.shared)
        attended: Tensor = self.attend(x, frames, self.gate(x) * frames.shared)
        return attended


def wavlm(model: Any) -> Encoder:
    """The encoder of a ``WavLMModel``, in the post-norm or the stable (pre-norm) form."""
    reference, stable = model.encoder, model.config.do_stable_layer_norm
    entry = Entry(PositionalConv(reference.pos_conv_embed), None if stable else reference.layer_norm)
    blocks: list[nn.Module] = [
        EncoderLayer(layer, stable, GatedAttention(layer.attention)) for layer in releasing(reference.layers)
    ]
    position = RelativePosition(reference.layers[0].attention)
    return Encoder(entry, blocks, reference.layer_norm if stable else None, shared=position)
