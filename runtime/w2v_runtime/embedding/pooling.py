"""Pooling of long audio: statistics over the frames of one utterance, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.float32]


class RunningPool:
    """Mean, standard deviation, minimum and maximum of frames that arrive in blocks.

    Blocks are merged in float64 by Chan, Golub & LeVeque (1979): with n frames of mean m and squared deviations S, a
    block of n', m', S' gives S + S' + (m' - m)²·n·n'/(n + n'). ``std`` divides by n, so one frame gives zeros.
    """

    def __init__(self) -> None:
        self.frames = 0
        self._mean = self._deviations = self._min = self._max = np.empty(0)

    def add(self, block: Frames) -> None:
        """Add a block of frames: (n, D)."""
        if not len(block):
            return
        exact = block.astype(np.float64)
        mean = exact.mean(axis=0)
        deviations = np.square(exact - mean).sum(axis=0)
        if not self.frames:
            self._mean, self._deviations = mean, deviations
            self._min, self._max = exact.min(axis=0), exact.max(axis=0)
        else:
            total, step = self.frames + len(block), mean - self._mean
            self._deviations = self._deviations + deviations + step**2 * (self.frames * len(block) / total)
            self._mean = self._mean + step * (len(block) / total)
            self._min, self._max = np.minimum(self._min, exact.min(axis=0)), np.maximum(self._max, exact.max(axis=0))
        self.frames += len(block)

    def result(self, pooling: Sequence[str]) -> Frames:
        """The named statistics, concatenated: (len(pooling)·D,). ``std1`` divides by n - 1."""
        statistics: dict[str, npt.NDArray[np.float64]] = {
            "mean": self._mean,
            "std": np.sqrt(self._deviations / max(self.frames, 1)),
            "std1": np.sqrt(self._deviations / max(self.frames - 1, 1)),
            "min": self._min,
            "max": self._max,
        }
        return np.concatenate([statistics[name] for name in pooling]).astype(np.float32)
