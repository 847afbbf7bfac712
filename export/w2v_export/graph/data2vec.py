"""The encoder of data2vec: the transformer of wav2vec 2.0 after a stack of convolutions in place of a single one.

Baevski et al., *data2vec: A General Framework for Self-supervised Learning in Speech, Vision and Language* (2022).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from w2v_export.graph.encoder import Encoder, EncoderLayer, Entry, Frames
from w2v_export.memory import releasing


class PositionalLevel(nn.Module):
    """A grouped convolution over time that keeps its length, a norm without weights, and an activation."""

    def __init__(self, level: Any) -> None:
        super().__init__()
        reference = level.conv
        (kernel,) = reference.kernel_size
        self.conv = nn.Conv1d(reference.in_channels, reference.out_channels, kernel, groups=reference.groups, padding=0)
        self.conv.load_state_dict(reference.state_dict())
        self.padding = (kernel // 2, (kernel - 1) // 2)
        self.norm = level.layer_norm
        self.activation = level.activation

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, hidden) → the same shape; ``x`` is zero in the padding, what comes out is not."""
        convolved = self.conv(F.pad(x.transpose(1, 2), self.padding)).transpose(1, 2)
        activated: Tensor = self.activation(self.norm(convolved))
        return activated


class PositionalStack(nn.Module):
    """A stack of convolutions in place of position embeddings.

    Each level writes nonzero values into the padding, where the next level must see zeros, as if the utterance ran
    alone. So the padding is masked between levels. The reference does not, and its batches differ from single runs.
    """

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.levels = nn.ModuleList(PositionalLevel(level) for level in embedding.layers)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        first, *others = self.levels
        x = first(x)
        for level in others:
            x = level(frames.masked(x))
        return x


def data2vec(model: Any) -> Encoder:
    """The encoder of a ``Data2VecAudioModel``, which has only the post-norm form."""
    reference = model.encoder
    entry = Entry(PositionalStack(reference.pos_conv_embed), reference.layer_norm)
    blocks: list[nn.Module] = [EncoderLayer(layer, stable=False) for layer in releasing(reference.layers)]
    return Encoder(entry, blocks, norm=None)
