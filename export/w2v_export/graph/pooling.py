"""Pooling inside the graph: mean, std, min and max over the valid frames of each utterance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from w2v_export.graph.tensors import count, summed, valid


class Pool:
    """Statistics over the first ``lengths`` of the frames ``x``.

    Shape: x (batch, time, channels), lengths (batch,) → (batch, channels) for each statistic.
    """

    def __init__(self, x: Tensor, lengths: Tensor) -> None:
        self.mask = valid(lengths, x.shape[1])
        self.x, self.lengths = x, lengths

    def _average(self, x: Tensor, n: Tensor) -> Tensor:
        """Sum over the valid frames divided by ``n`` (batch, 1, 1): (batch, 1, channels)."""
        return summed(torch.where(self.mask, x, 0.0)) / n

    def mean(self) -> Tensor:
        return self._average(self.x, count(self.lengths)).squeeze(1)

    def std(self, correction: int = 0) -> Tensor:
        """The population's standard deviation; with ``correction`` 1 the unbiased one, as ``torch.std``."""
        deviations = self.x - self.mean()[:, None]
        return self._average(deviations * deviations, count(self.lengths - correction)).sqrt().squeeze(1)

    def min(self) -> Tensor:
        return torch.where(self.mask, self.x, torch.inf).amin(1)

    def max(self) -> Tensor:
        return torch.where(self.mask, self.x, -torch.inf).amax(1)


STATISTICS: Final[dict[str, Callable[[Pool], Tensor]]] = {
    "mean": Pool.mean,
    "std": Pool.std,
    "std1": lambda pool: pool.std(correction=1),
    "min": Pool.min,
    "max": Pool.max,
}
