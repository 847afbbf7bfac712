"""The front end of Wav2Vec2-BERT: samples to normalised log-mel features, with two mel frames stacked in a frame.

The reference, ``SeamlessM4TFeatureExtractor``, applies a chain of linear steps to each frame of 400 samples (scaling to
16 bits, removal of the mean, pre-emphasis, window, DFT). Their product is one matrix. The sum into mel bands is a
second matrix; all other steps are element by element.

Both products and the logarithm are in float64, and the spectrum between them is rounded to float32, all as in the
reference. A quiet band may lie 100 dB below a loud one or an offset, which a float32 product cannot resolve. And where
a band hardly varies (silence, a tone, a recording of two mel frames), the normalisation multiplies the differences by
up to 1/√1e-7, over 3000: only the same roundings give the same features.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import SeamlessM4TFeatureExtractor

from w2v_export.graph.tensors import blocks, masked_mean, num_frames, valid
from w2v_models.manifest import ConvStack

# The constants of ``SeamlessM4TFeatureExtractor``, which keeps them in its code and not in the checkpoint.
FRAME_LENGTH: Final = 400
HOP_LENGTH: Final = 160
FFT_LENGTH: Final = 512
#: Mel frames stacked in a frame; the code of the reference's attention mask assumes this number too.
STACKED: Final = 2
PREEMPHASIS: Final = 0.97
#: The factor from samples in [-1, 1] to 16-bit values, as in Kaldi.
SCALE: Final = 2.0**15
#: The least energy in a mel band.
MEL_FLOOR: Final = 1.192092955078125e-07
#: Added to the variance of a mel band.
NORMALISATION_EPSILON: Final = 1e-7


def frame_transform(window: NDArray[np.float64]) -> NDArray[np.complex128]:
    """All linear steps of ``transformers.audio_utils.spectrogram``: (400,) → (400, 257) complex.

    Row i is the result of the chain for the unit impulse at sample i, so that ``frame @ matrix`` is a frame's DFT.
    """
    frames = np.eye(FRAME_LENGTH) * SCALE
    frames -= frames.mean(axis=1, keepdims=True)
    emphasised = frames - PREEMPHASIS * np.pad(frames, ((0, 0), (1, 0)))[:, :-1]
    emphasised[:, 0] = frames[:, 0] * (1 - PREEMPHASIS)
    return np.fft.rfft(emphasised * window, FFT_LENGTH)


class LogMelFrontEnd(nn.Module):
    """``SeamlessM4TFeatureExtractor`` of each utterance alone, on a padded batch.

    Shape:
        - waveform: (batch, samples) float32; the content beyond an utterance's length is ignored, NaN included.
        - lengths: (batch,) int64, samples.
        - moments: (batch, 2·bands), mean and then variance of each mel band over the whole recording, if the
          utterances are windows of one; without it each utterance is normalised by its own statistics.
        - returns: (batch, frames, 2·bands), ``frames`` being ``conv.num_frames(samples)``; zero in the padding.

    Raises ValueError if ``extractor`` does not stack two mel frames, or ``conv`` does not describe it.
    """

    transform: Tensor
    filters: Tensor

    def __init__(self, extractor: SeamlessM4TFeatureExtractor, conv: ConvStack) -> None:
        super().__init__()
        self.bands: int = extractor.num_mel_bins
        if extractor.stride != STACKED:
            raise ValueError(
                f"preprocessor_config.json has stride {extractor.stride}: export a model whose stride is {STACKED}."
            )
        described = ConvStack((FRAME_LENGTH, STACKED), (HOP_LENGTH, STACKED), (self.bands, STACKED * self.bands))
        if conv != described:
            raise ValueError(f"preprocessor_config.json describes {described}: pass that in place of {conv}.")
        self.stride, self.receptive_field = conv.stride, conv.receptive_field

        audible = extractor.mel_filters.any(axis=1)  # not 0 Hz, nor the Nyquist frequency
        transform = frame_transform(extractor.window)[:, audible]
        # The squares of the real and of the imaginary parts, side by side, meet in the sum of a band.
        self.register_buffer("transform", torch.from_numpy(np.hstack([transform.real, transform.imag])))
        self.register_buffer("filters", torch.from_numpy(np.tile(extractor.mel_filters[audible], (2, 1))))

    @property
    def moments_size(self) -> int:
        """Numbers in ``moments``."""
        return 2 * self.bands

    def num_frames(self, samples: Tensor) -> Tensor:
        """Frames of utterances of ``samples`` samples."""
        return num_frames(samples, self.receptive_field, self.stride)

    def num_mel_frames(self, samples: Tensor) -> Tensor:
        """Mel frames of utterances of ``samples`` samples."""
        return num_frames(samples, FRAME_LENGTH, HOP_LENGTH)

    def mel(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """Log-mel energies before normalisation: → (batch, 2·frames + 1, bands) float32.

        The mel frame after the last pair is included because the statistics take it in.
        """
        frames = self.num_frames(torch.as_tensor(waveform.shape[1]))
        # The extra mel frame takes three whole blocks of 160 samples, of which it uses two and a half.
        tail = 3 * HOP_LENGTH
        x = torch.where(valid(lengths, waveform.shape[1]).squeeze(2), waveform, 0.0)
        x = F.pad(x, (0, tail))[:, : frames * self.stride + tail, None]
        spectrum = (blocks(x, FRAME_LENGTH, HOP_LENGTH, 1).double() @ self.transform).float()
        energy: Tensor = spectrum.double().square() @ self.filters
        return energy.clamp(min=MEL_FLOOR).log().float()

    def statistics(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over each utterance's mel frames: → (batch, 1, bands) twice.

        The variance is divided by n - 1, as in the reference; for one mel frame it is 0.
        """
        mel_frames = self.num_mel_frames(lengths)
        mask = valid(mel_frames, mel.shape[1])
        mean = masked_mean(mel, mask, mel_frames)
        return mean, masked_mean((mel - mean).square(), mask, mel_frames - 1)

    def forward(self, waveform: Tensor, lengths: Tensor, moments: Tensor | None = None) -> Tensor:
        mel = self.mel(waveform, lengths)
        if moments is None:
            mean, variance = self.statistics(mel, lengths)
        else:
            mean, variance = moments[:, None, : self.bands], moments[:, None, self.bands :]
        mel = (mel - mean) / torch.sqrt(variance + NORMALISATION_EPSILON)
        features = mel[:, :-1].reshape(mel.shape[0], -1, STACKED * self.bands)
        return torch.where(valid(self.num_frames(lengths), features.shape[1]), features, 0.0)
