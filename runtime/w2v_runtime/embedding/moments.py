"""Mean and covariance of a long recording, summed up block by block, for its waveform normalisation and group norm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from w2v_runtime.embedding.pooling import RunningPool

Samples = npt.NDArray[np.float32]


class WaveformMoments:
    """Accumulates blocks of samples; :meth:`vector` is the input ``moments`` of the graph for windows.

    ``kernel`` and ``stride`` are those of the first convolution, in samples. The sums are float64 and taken about the
    first block's mean, so that a constant offset costs no digits: with f the samples (or frames) minus that mean, their
    mean is Σf/n and the covariance Σffᵀ/n - Σf Σfᵀ/n².
    """

    def __init__(self, kernel: int, stride: int) -> None:
        self._kernel, self._stride = kernel, stride
        self._rest = np.empty(0)
        self._gap = 0
        self._shift: float | None = None
        self.samples = 0
        self._frames = 0
        self._sum = self._square_sum = 0.0
        self._frame_sum = np.zeros(kernel)
        self._frame_products = np.zeros((kernel, kernel))

    def add(self, block: Samples) -> None:
        """Add the next block of samples: (n,)."""
        if not len(block):
            return
        exact = block.astype(np.float64)
        if self._shift is None:
            self._shift = float(exact.mean())
        exact -= self._shift
        self.samples += len(exact)
        self._sum += float(exact.sum())
        self._square_sum += float(exact @ exact)
        pending = np.concatenate([self._rest, exact])[self._gap :]
        self._gap = max(0, self._gap - len(self._rest) - len(exact))
        if len(pending) >= self._kernel:
            frames = np.lib.stride_tricks.sliding_window_view(pending, self._kernel)[:: self._stride]
            self._frames += len(frames)
            self._frame_sum += frames.sum(axis=0)
            self._frame_products += frames.T @ frames
            used = len(frames) * self._stride
            self._gap = max(0, used - len(pending))  # where the stride is longer than the kernel
            pending = pending[used:]
        self._rest = pending

    def vector(self) -> npt.NDArray[np.float32]:
        """Mean, variance, mean frame and covariance of the frames: (3 + k + k²,), as ``manifest.MOMENTS`` lays out."""
        shift, n, frames = self._shift or 0.0, max(self.samples, 1), max(self._frames, 1)
        mean, frame_mean = self._sum / n, self._frame_sum / frames
        variance = max(self._square_sum / n - mean**2, 0.0)
        covariance = self._frame_products / frames - np.outer(frame_mean, frame_mean)
        coarse = float(np.float32(shift + mean))
        vector = np.concatenate([[coarse, shift - coarse + mean, variance], frame_mean - mean, covariance.ravel()])
        return vector.astype(np.float32)


class MelMoments:
    """Accumulates the log-mel frames of blocks of samples: mean and unbiased variance of each band.

    Args:
        window: samples in one frame.
        hop: samples from one frame to the next.
        mel: computes the frames, (samples,) → (frames, bands).
    """

    def __init__(self, window: int, hop: int, mel: Callable[[Samples], Samples]) -> None:
        self._window, self._hop, self._mel = window, hop, mel
        self._rest = np.empty(0, np.float32)
        self._pool = RunningPool()
        self.samples = 0

    def add(self, block: Samples) -> None:
        """Add the next block of samples: (n,)."""
        self.samples += len(block)
        pending = np.concatenate([self._rest, block])
        if frames := max(0, (len(pending) - self._window) // self._hop + 1):
            used = (frames - 1) * self._hop + self._window
            self._pool.add(self._mel(pending[:used])[:frames])
            pending = pending[frames * self._hop :]
        self._rest = pending

    def vector(self) -> Samples:
        """Mean and variance: (2 · bands,)."""
        mean, std = np.split(self._pool.result(("mean", "std1")), 2)
        return np.concatenate([mean, std * std])
