"""The graphs of a bundle: raw samples and lengths in, named outputs out.

The reference (transformers) runs channels-first convolutions, normalises the waveform outside the model, and lets
padding leak into the group norm. These graphs compute the same numbers from a padded batch: the front end
(``waveform``, ``logmel``) and the encoder (``encoder``, ``conformer``, ``data2vec``, ``wavlm``) mask the padding at
every level.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from w2v_export.graph.encoder import Encoder, Frames
from w2v_export.graph.logmel import LogMelFrontEnd
from w2v_export.graph.pooling import STATISTICS, Pool
from w2v_export.graph.tensors import Dense, cast, num_frames, valid
from w2v_export.graph.waveform import WaveformFrontEnd
from w2v_export.heads.modules import HeadModule
from w2v_models.manifest import (
    FEATURES,
    FRAME_LENGTHS,
    HEAD_FRAMES,
    LAST_LAYER,
    LOGITS,
    MEL,
    WEIGHTED_LAYERS,
    ConvStack,
    frames_output,
    pooled_output,
)
from w2v_runtime.embedding.results import POOLINGS

FrontEnd = WaveformFrontEnd | LogMelFrontEnd


class Projection(nn.Module):
    """From the front end's features to the encoder's width: a layer norm where the model has one, and a dense layer."""

    def __init__(self, norm: nn.Module | None, projection: nn.Linear) -> None:
        super().__init__()
        self.norm, self.dense = norm, Dense.of(projection)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x if self.norm is None else self.norm(x))


class InferenceGraph(nn.Module):
    """A speech encoder, and its head if it has one, with every output that can be requested (``layers.onnx``).

    Engines cut the exported graph to the outputs of a request, so that only what these need is computed.
    The graph takes over the parameters of the reference; neither may be trained afterwards.
    The projection and the encoder compute in ``dtype``; their outputs and all that follows are float32. With
    ``names_axes``, ONNX Runtime fuses residual sums with the norms after them, which is slower on processors and faster
    on GPUs.

    Shape:
        - waveform: (batch, samples) float32; the content beyond an utterance's length is ignored, NaN included.
        - lengths: (batch,) int64, samples.
        - layer_weights: (L + 1,), the weights of layers 0 … L in the sum that is the layer ``weighted``.
        - returns: for each layer (0 … L, last, weighted) its frames (batch, time, hidden), zero in the padding, and
          their statistics (batch, hidden); ``frame_lengths`` (batch,) of ``last``; the head's outputs. Behind an
          adapter, ``last`` and the head have its size and fewer frames.
    """

    dtype = torch.float32
    names_axes = False

    def __init__(
        self, front_end: FrontEnd, projection: Projection, encoder: Encoder, conv: ConvStack, head: HeadModule | None
    ) -> None:
        super().__init__()
        self.front_end: FrontEnd = front_end
        self.projection, self.encoder, self.head = projection, encoder, head
        self.receptive_field, self.stride = conv.receptive_field, conv.stride

    def forward(self, waveform: Tensor, lengths: Tensor, layer_weights: Tensor) -> dict[str, Tensor]:
        layers, last, frame_lengths = self.layers(waveform, lengths)
        outputs = self.outputs(layers, last, frame_lengths, layer_weights)
        return {FRAME_LENGTHS: self.last_lengths(frame_lengths)} | outputs

    def layers(self, waveform: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Layers 0 … L, ``last_hidden_state``, and the valid frames of each utterance."""
        features = self.features(waveform, lengths)
        frame_lengths = num_frames(lengths, self.receptive_field, self.stride)
        frames = Frames(frame_lengths, valid(frame_lengths, features.shape[1]))
        return *self.encoded(features, frames), frame_lengths

    def last_lengths(self, frame_lengths: Tensor) -> Tensor:
        """Valid frames of ``last_hidden_state``, of those of the layers: fewer behind an adapter."""
        adapter = self.encoder.adapter
        return frame_lengths if adapter is None else adapter.lengths(frame_lengths)

    def features(self, waveform: Tensor, lengths: Tensor, moments: Tensor | None = None) -> Tensor:
        """The front end and the projection: (batch, samples) → (batch, frames, hidden), in the graph's ``dtype``."""
        projected: Tensor = self.projection(cast(self.front_end(waveform, lengths, moments), self.dtype))
        return projected

    def encoded(self, features: Tensor, frames: Frames) -> tuple[list[Tensor], Tensor]:
        """Layers 0 … L and ``last_hidden_state``, in float32, from the projected features."""
        layers, last = self.encoder(frames.masked(features), frames)
        return [cast(layer, torch.float32) for layer in layers], cast(last, torch.float32)

    def outputs(
        self, layers: list[Tensor], last: Tensor, frame_lengths: Tensor, layer_weights: Tensor
    ) -> dict[str, Tensor]:
        """Every output of the layers and of the head, by name."""
        outputs: dict[str, Tensor] = {}
        last_lengths = self.last_lengths(frame_lengths)
        for name, hidden in _named(layers, last, layer_weights).items():
            pool = Pool(hidden, last_lengths if name == LAST_LAYER else frame_lengths)
            outputs[frames_output(name)] = torch.where(pool.mask, hidden, 0.0)
            outputs |= {pooled_output(name, pooling): STATISTICS[pooling](pool) for pooling in POOLINGS}
        if self.head is None:
            return outputs
        head_lengths = (last_lengths - 2 * self.head.margin).clamp(min=0)
        pool = Pool(self.head.frames(layers, last), head_lengths)
        if self.head.level == "frame":
            return outputs | {LOGITS: torch.where(pool.mask, pool.x, 0.0)}
        pooled = torch.cat([STATISTICS[name](pool) for name in self.head.pooling], dim=1)
        return outputs | {HEAD_FRAMES: pool.x} | self.head.vector(pooled)


class _Part(InferenceGraph):
    """A part of a graph, with the same parameters under the same names."""

    def __init__(self, graph: InferenceGraph) -> None:
        # Not the ``forward`` that the exporter sets on an instance.
        self.__dict__ = {name: value for name, value in graph.__dict__.items() if name != "forward"}


class FeatureGraph(_Part):
    """From pieces of long recordings to projected features, normalised by the statistics of the whole recordings.

    Shape: ``waveform`` and ``lengths`` as :class:`InferenceGraph`, a piece in each row; ``moments`` (batch, n) of the
    rows' recordings, as ``w2v_models.manifest.MOMENTS`` says. Returns ``features`` (batch, frames, hidden) float32,
    which in the padding hold anything.
    """

    def forward(self, waveform: Tensor, lengths: Tensor, moments: Tensor) -> dict[str, Tensor]:
        return {FEATURES: cast(self.features(waveform, lengths, moments), torch.float32)}


class EncoderGraph(_Part):
    """From the features of a long recording, or of a window of it, to all outputs, in memory linear in the frames.

    Shape: ``features`` (batch, frames, hidden) float32, every frame valid; ``layer_weights`` as
    :class:`InferenceGraph`. Returns the same outputs but ``frame_lengths``, and, of an utterance's head, its frames,
    whose statistics over all windows are the input of ``head.onnx``.
    """

    def forward(self, features: Tensor, layer_weights: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        frame_lengths = torch.full_like(features[:, 0, 0], features.shape[1], dtype=torch.int64)
        layers, last = self.encoded(cast(features, self.dtype), Frames())
        return self.outputs(layers, last, frame_lengths, layer_weights)


class HeadGraph(nn.Module):
    """The part of a head after the pooling: (batch, statistics · channels) → the head's outputs."""

    def __init__(self, head: HeadModule) -> None:
        super().__init__()
        self.head = head

    def forward(self, pooled: Tensor) -> dict[str, Tensor]:
        return self.head.vector(pooled)


class MelGraph(nn.Module):
    """Log-mel frames of a piece of audio, without normalisation: (batch, samples) → (batch, frames, bands)."""

    def __init__(self, front_end: LogMelFrontEnd) -> None:
        super().__init__()
        self.front_end = front_end

    def forward(self, waveform: Tensor) -> dict[str, Tensor]:
        lengths = torch.full_like(waveform[:, 0], waveform.shape[1], dtype=torch.int64)
        return {MEL: self.front_end.mel(waveform, lengths)}


def _named(layers: list[Tensor], last: Tensor, layer_weights: Tensor) -> dict[str, Tensor]:
    """All layers that can be requested, by name: 0 … L, the last hidden state, and the weighted sum."""
    weighted = layer_weights[0] * layers[0]
    for index, layer in enumerate(layers[1:], 1):
        weighted = weighted + layer_weights[index] * layer
    return {str(index): layer for index, layer in enumerate(layers)} | {LAST_LAYER: last, WEIGHTED_LAYERS: weighted}
