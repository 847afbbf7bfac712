"""From samples to the features that the encoder projects: normalisation and the strided convolutions.

- the waveform is normalised over each utterance's valid samples;
- activations stay channels-last, so layer norms need no transposes and every strided convolution is one GEMM:
  with stride 2, two neighbouring frames (batch, time, channels) *are* one row of (batch, time/2, 2·channels);
- the waveform is padded so that every level's length is even; surplus frames ride along and the lengths mask them;
- the group norm after conv 0 is folded into conv 0's weights, one set for each utterance (:class:`GroupNormFrontEnd`).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from w2v_export.graph.tensors import Dense, blocks, count, masked_mean, num_frames, valid
from w2v_models.manifest import ConvStack

#: Added to the variance in the waveform's normalisation (``Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm``).
NORMALISATION_EPSILON: Final = 1e-7


class Normalise(nn.Module):
    """Zero mean and unit variance over the valid samples; zero in the padding (Wav2Vec2FeatureExtractor)."""

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        mask = valid(lengths, waveform.shape[1])
        waveform = waveform[:, :, None]
        mean = masked_mean(waveform, mask, lengths)
        centred = torch.where(mask, waveform - mean, 0.0)
        variance = masked_mean(centred.square(), mask, lengths)
        return (centred / torch.sqrt(variance + NORMALISATION_EPSILON)).squeeze(2)


class BlockConv(nn.Module):
    """A strided 1-d convolution as one GEMM over blocks, channels-last.

    Shape: (batch, stride·n, C_in) → (batch, n - ⌈kernel/stride⌉ + 1, C_out).
    """

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.kernel, self.stride, self.channels = conv.kernel_size[0], conv.stride[0], conv.in_channels
        self.dense = Dense(conv.weight.permute(2, 1, 0).flatten(0, 1), conv.bias)

    def frames(self, x: Tensor) -> Tensor:
        """The inputs under each position of the kernel: (batch, frames, kernel·C_in)."""
        return blocks(x, self.kernel, self.stride, self.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.frames(x))


class GroupNormFrontEnd(nn.Module):
    """Conv 0 and its group norm, with statistics over each utterance's valid frames only, as one batched GEMM.

    Conv 0 is linear in its frame f of k samples. With m and C the mean and k×k covariance of f over the valid frames,
    output channel c, w_c·f + b_c, has mean w_c·m + b_c and variance w_cᵀ C w_c. The norm is therefore conv 0 itself
    with weights w_c·γ_c/√(w_cᵀ C w_c + ε) and bias β_c - (w_c·m)·γ_c/√(…): the conv's own bias cancels, and no pass
    over the (frames, channels) activation is needed.

    The reference's statistics include the remainder of samples that reaches no frame of the last level. The input is
    therefore longer by one such frame, ``surplus`` frames of this level, which count here and go no further.
    """

    def __init__(self, conv: nn.Conv1d, norm: nn.GroupNorm, surplus: int) -> None:
        super().__init__()
        if norm.num_groups != norm.num_channels:
            raise ValueError("the group norm must have one channel in a group")
        self.conv = BlockConv(conv)
        self.scale = nn.Parameter(norm.weight.detach().clone())
        self.shift = nn.Parameter(norm.bias.detach().clone())
        self.epsilon = norm.eps
        self.surplus = surplus

    def statistics(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (batch, 1, k) and covariance (batch, k, k) of the frames that lie within ``lengths`` samples."""
        valid_frames = (lengths + self.conv.stride - self.conv.kernel).clamp(min=0)
        valid_frames = valid_frames.div(self.conv.stride, rounding_mode="trunc")
        mask = valid(valid_frames, frames.shape[1])
        mean = masked_mean(frames, mask, valid_frames)
        centred = torch.where(mask, frames - mean, 0.0)
        return mean, centred.transpose(1, 2) @ centred / count(valid_frames)

    def forward(self, x: Tensor, lengths: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        frames = self.conv.frames(x)
        mean, covariance = statistics or self.statistics(frames, lengths)
        weight = self.conv.dense.weight
        variance = (weight * (covariance @ weight)).sum(1, keepdim=True)
        scale = self.scale / torch.sqrt(variance + self.epsilon)
        return frames[:, : -self.surplus] @ (weight * scale) + (self.shift - (mean @ weight) * scale)


class ConvLayer(nn.Module):
    """One level of the feature encoder: convolution, layer norm where the model has one, activation."""

    def __init__(self, layer: Any, surplus: int) -> None:
        super().__init__()
        norm: Any = getattr(layer, "layer_norm", None)
        self.grouped = isinstance(norm, nn.GroupNorm)
        self.conv = GroupNormFrontEnd(layer.conv, norm, surplus) if self.grouped else BlockConv(layer.conv)
        self.norm = None if self.grouped else norm
        self.activation = layer.activation

    def forward(self, x: Tensor, lengths: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
        x = self.conv(x, lengths, statistics) if self.grouped else self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.activation(x)


class WaveformFrontEnd(nn.Module):
    """The feature encoder of wav2vec 2.0 and most of its relatives: samples → features, one a frame.

    Shape: waveform (batch, samples), lengths (batch,) → (batch, ``ConvStack.num_frames(samples)``, conv channels).
    What stands beyond an utterance's length is ignored, NaN included; features beyond its frames are finite.

    With ``moments`` (batch, ``2 + k + k²``), as ``w2v_models.manifest.MOMENTS`` lays them out, the normalisation and
    the group norm take those in place of the utterance's own statistics.
    """

    def __init__(self, encoder: Any, conv: ConvStack, normalise: bool) -> None:
        super().__init__()
        self.stride = conv.stride
        self.receptive_field = conv.receptive_field
        self.padded_receptive_field = conv.padded_receptive_field
        self.normalise = Normalise() if normalise else None
        conv_layers = [ConvLayer(layer, conv.stride // conv.strides[0]) for layer in encoder.conv_layers]
        self.conv_layers = nn.ModuleList(conv_layers)
        #: Frames beyond the longest utterance's, of which only conv 0 sees anything.
        self.surplus = int(conv_layers[0].grouped)
        self.first_kernel = conv.kernels[0]

    @property
    def moments_size(self) -> int:
        """Numbers in ``moments``."""
        return 2 + self.first_kernel + self.first_kernel**2

    def forward(self, waveform: Tensor, lengths: Tensor, moments: Tensor | None = None) -> Tensor:
        statistics = None
        if moments is not None:
            waveform, statistics = self._normalised_by(moments, waveform, lengths)
        elif self.normalise is not None:
            waveform = self.normalise(waveform, lengths)
        else:
            waveform = torch.where(valid(lengths, waveform.shape[1]).squeeze(2), waveform, 0.0)
        frames = num_frames(torch.as_tensor(waveform.shape[1]), self.receptive_field, self.stride)
        x = F.pad(waveform, (0, self.padded_receptive_field + self.stride))
        x = x[:, : (frames + self.surplus - 1) * self.stride + self.padded_receptive_field, None]
        for conv_layer in self.conv_layers:
            x = conv_layer(x, lengths, statistics)
        return x

    def _normalised_by(
        self, moments: Tensor, waveform: Tensor, lengths: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The waveform normalised by the recording's moments, and the group norm's statistics that follow."""
        mean, scale = moments[:, :1], torch.ones_like(moments[:, :1])
        if self.normalise is None:
            mean = torch.zeros_like(mean)
        else:
            scale = 1 / torch.sqrt(moments[:, 1:2] + NORMALISATION_EPSILON)
        mask = valid(lengths, waveform.shape[1]).squeeze(2)
        waveform = torch.where(mask, (waveform - mean) * scale, 0.0)
        if not self.surplus:
            return waveform, None
        kernel = self.first_kernel
        frame_mean = ((moments[:, 2 : 2 + kernel] - mean) * scale)[:, None, :]
        covariance = moments[:, 2 + kernel :].reshape(-1, kernel, kernel) * (scale * scale)[:, :, None]
        return waveform, (frame_mean, covariance)
