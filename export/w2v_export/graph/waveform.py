"""The waveform front end: normalisation and strided convolutions, from samples to features.

- the waveform is normalised over each utterance's valid samples, or freed of its mean before a group norm;
- activations stay channels-first if only the first level has a norm; with a norm on every level, each convolution is
  transposed back to channels-last;
- the waveform is padded so that every level's length is even, as quantised levels need it; the surplus frames are
  masked by the lengths;
- the group norm after conv 0 is folded into conv 0's weights, one set for each utterance (:class:`GroupNormFrontEnd`).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from w2v_export.graph.tensors import blocks, cast, count, in_blocks, masked_mean, num_frames, valid
from w2v_models.manifest import ConvStack

#: Added to the variance in the waveform's normalisation (``Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm``).
NORMALISATION_EPSILON: Final = 1e-7
#: GPUs multiply float16 fast if rows are a multiple of this many numbers (16 bytes).
ALIGNED: Final = 8


def centred(waveform: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """The waveform without the mean of its valid samples; zero in the padding."""
    for _ in range(2):  # in OpenVINO, which has no float64 sums, the first mean of an offset is coarse
        waveform = torch.where(mask, waveform - masked_mean(waveform, mask, lengths), 0.0)
    return waveform


def normalised(waveform: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """Zero mean and unit variance over the valid samples; zero in the padding (Wav2Vec2FeatureExtractor)."""
    waveform = centred(waveform, mask, lengths)
    variance = masked_mean(waveform.square(), mask, lengths)
    return waveform / torch.sqrt(variance + NORMALISATION_EPSILON)


class FirstConv(nn.Module):
    """Conv 0 as one GEMM over the k samples of each frame, with its bias as the weight of an appended constant 1.

    Shape: (batch, samples, 1) → (batch, frames, channels), or (batch, channels, frames) where ``channels_first``.
    The number of frames is ``samples / stride - ⌈kernel/stride⌉ + 1``.

    The samples, and a group norm's statistics of them, are always float32. ``factors`` is the dtype of the product's
    factors, ``dtype`` that of its result.
    """

    channels_first = False
    factors = dtype = torch.float32

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        weight = conv.weight.detach().squeeze(1).T
        bias = torch.zeros_like(weight[:1]) if conv.bias is None else conv.bias.detach()[None]
        self.weight = nn.Parameter(torch.cat([weight, bias]))

    def frames(self, x: Tensor) -> Tensor:
        """The samples under each position of the kernel: (batch, frames, kernel)."""
        return blocks(x, self.kernel, self.stride, 1)

    def product(self, frames: Tensor, weight: Tensor) -> Tensor:
        """The GEMM of frames and ``weight``: (kernel + 1, channels), or one such for each utterance."""
        spare = 0 if self.factors == torch.float32 else -(self.kernel + 1) % ALIGNED
        frames = cast(F.pad(frames, (0, 1 + spare), value=1.0), self.factors)
        weight = cast(F.pad(weight, (0, 0, 0, spare)) if spare else weight, self.factors)
        y = weight.transpose(1, 2) @ frames.transpose(1, 2) if self.channels_first else frames @ weight
        return cast(y, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.frames(x), self.weight)


class GroupNormFrontEnd(FirstConv):
    """Conv 0 and its group norm, with statistics over each utterance's valid frames only, as one batched GEMM.

    Conv 0 is linear in its frame f of k samples. With m and C the mean and k×k covariance of f over the valid frames,
    output channel c, w_c·f + b_c, has mean w_c·m + b_c and variance w_cᵀ C w_c. The norm is therefore conv 0 itself
    with weights w_c·γ_c/√(w_cᵀ C w_c + ε) and bias β_c - (w_c·m)·γ_c/√(…): the conv's own bias cancels, and no pass
    over the (frames, channels) activation is needed.

    The reference's statistics include the remaining samples that are too few for a frame of the last level. So the
    input is longer by one such frame, ``surplus`` frames of this level, which enter the statistics and are dropped.
    """

    channels_first = True

    def __init__(self, conv: nn.Conv1d, norm: nn.GroupNorm, surplus: int) -> None:
        super().__init__(conv)
        if norm.num_groups != norm.num_channels:
            raise ValueError("the group norm must have one channel in a group")
        self.weight = nn.Parameter(self.weight[:-1].detach().contiguous())
        self.scale = nn.Parameter(norm.weight.detach().clone())
        self.shift = nn.Parameter(norm.bias.detach().clone())
        self.epsilon = norm.eps
        self.surplus = surplus

    def statistics(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (batch, 1, k) and covariance (batch, k, k) of the frames that lie within ``lengths`` samples.

        Products are added in float32 within blocks of frames, and the blocks in float64: cuBLAS sums one recording in
        parts, but a batch sequentially, which loses digits with every second (frames 8e-4 off at 25 s).
        """
        valid_frames = (lengths + self.stride - self.kernel).clamp(min=0)
        valid_frames = valid_frames.div(self.stride, rounding_mode="trunc")
        mask = valid(valid_frames, frames.shape[1])
        mean = masked_mean(frames, mask, valid_frames)
        centred_frames = in_blocks(torch.where(mask, frames - mean, 0.0), self.kernel)
        products = (centred_frames.transpose(2, 3) @ centred_frames).double().sum(1)
        return mean, (products / count(valid_frames).double()).to(frames.dtype)

    def forward(  # type: ignore[override]
        self, x: Tensor, lengths: Tensor, statistics: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        frames = self.frames(x)
        mean, covariance = statistics or self.statistics(frames, lengths)
        variance = (self.weight * (covariance @ self.weight)).sum(1, keepdim=True)
        scale = self.scale / torch.sqrt(variance + self.epsilon)
        weight = torch.cat([self.weight * scale, self.shift - (mean @ self.weight) * scale], dim=1)
        return self.product(frames[:, : -self.surplus], weight)


class StridedConv(nn.Module):
    """A strided convolution between channels-last or channels-first activations."""

    def __init__(self, conv: nn.Conv1d, channels_first: bool) -> None:
        super().__init__()
        self.conv, self.channels_first = conv, channels_first

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.channels_first else self.conv(x.transpose(1, 2)).transpose(1, 2)


class ConvLayer(nn.Module):
    """One level of the feature encoder: convolution, layer norm where the model has one, activation."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.activation = conv, norm, activation

    def forward(self, x: Tensor, *statistics: Any) -> Tensor:
        x = self.conv(x, *statistics)
        return self.activation(x if self.norm is None else self.norm(x))


def _conv_layers(encoder: Any, surplus: int) -> list[nn.Module]:
    """The levels of a reference's feature encoder, channels-first if the first level has a group norm."""
    levels: list[nn.Module] = []
    norms: list[Any] = [getattr(layer, "layer_norm", None) for layer in encoder.conv_layers]
    grouped = isinstance(norms[0], nn.GroupNorm)
    for layer, norm in zip(encoder.conv_layers, norms, strict=True):
        if levels:
            conv: nn.Module = StridedConv(layer.conv, channels_first=grouped)
        else:
            conv = GroupNormFrontEnd(layer.conv, norm, surplus) if grouped else FirstConv(layer.conv)
        levels.append(ConvLayer(conv, None if isinstance(norm, nn.GroupNorm) else norm, layer.activation))
    return levels


class WaveformFrontEnd(nn.Module):
    """The feature encoder of wav2vec 2.0 and most of its relatives: samples → one feature vector per frame.

    Shape: waveform (batch, samples), lengths (batch,) → (batch, ``ConvStack.num_frames(samples)``, conv channels).
    The content beyond an utterance's length is ignored, NaN included; features beyond its frames are finite.

    With ``moments`` (batch, ``3 + k + k²``), as ``w2v_models.manifest.MOMENTS`` lays them out, the normalisation and
    the group norm use these in place of the utterance's own statistics.
    """

    def __init__(self, encoder: Any, conv: ConvStack, normalise: bool) -> None:
        super().__init__()
        self.stride = conv.stride
        self.receptive_field = conv.receptive_field
        self.padded_receptive_field = conv.padded_receptive_field
        self.normalise = normalise
        self.conv_layers = nn.ModuleList(_conv_layers(encoder, surplus=conv.stride // conv.strides[0]))
        #: Last-level frames by which the input is padded for the group norm's statistics of conv 0.
        self.surplus = int(self.grouped)
        self.first_kernel = conv.kernels[0]

    @property
    def grouped(self) -> bool:
        """Whether conv 0 has a group norm."""
        return isinstance(self.conv_layers[0].conv, GroupNormFrontEnd)

    @property
    def moments_size(self) -> int:
        """Numbers in ``moments``."""
        return 3 + self.first_kernel + self.first_kernel**2

    def forward(self, waveform: Tensor, lengths: Tensor, moments: Tensor | None = None) -> Tensor:
        statistics = None
        if moments is not None:
            waveform, statistics = self._normalised_by(moments, waveform, lengths)
        else:
            mask = valid(lengths, waveform.shape[1]).squeeze(2)
            if self.normalise:
                waveform = normalised(waveform, mask, lengths)
            elif self.grouped:
                # A constant offset shifts each channel of conv 0 by a constant, which the group norm takes off again.
                # Taken off before, it costs no digits.
                waveform = centred(waveform, mask, lengths)
            else:
                waveform = torch.where(mask, waveform, 0.0)
        frames = num_frames(torch.as_tensor(waveform.shape[1]), self.receptive_field, self.stride)
        x = F.pad(waveform, (0, self.padded_receptive_field + self.stride))
        x = x[:, : (frames + self.surplus - 1) * self.stride + self.padded_receptive_field, None]
        first: Any
        first, *others = self.conv_layers
        x = first(x, lengths, statistics) if self.grouped else first(x)
        for conv_layer in others:
            x = conv_layer(x)
        return x.transpose(1, 2) if first.conv.channels_first else x

    def _normalised_by(
        self, moments: Tensor, waveform: Tensor, lengths: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The waveform normalised by the recording's moments, and the group norm's statistics computed from them."""
        mask = valid(lengths, waveform.shape[1]).squeeze(2)
        scale = torch.ones_like(moments[:, :1])
        if self.normalise or self.grouped:
            waveform = waveform - moments[:, :1] - moments[:, 1:2]
        if self.normalise:
            scale = 1 / torch.sqrt(moments[:, 2:3] + NORMALISATION_EPSILON)
        waveform = torch.where(mask, waveform * scale, 0.0)
        if not self.surplus:
            return waveform, None
        kernel = self.first_kernel
        frame_mean = (moments[:, 3 : 3 + kernel] * scale)[:, None, :]
        covariance = moments[:, 3 + kernel :].reshape(-1, kernel, kernel) * (scale * scale)[:, :, None]
        return waveform, (frame_mean, covariance)
