"""Batches: which inputs are embedded together, and how their waveforms are padded to one array.

:class:`Pool` decides the batch: it groups waiting inputs of similar length within a budget of samples, which comes from
``--batch-seconds`` or :data:`BATCH_SECONDS`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: The largest batch by device, in seconds of audio with its padding; ``--batch-seconds`` replaces it.
BATCH_SECONDS: Final = {"cpu": 8.0, "cuda": 480.0, "openvino": 8.0}
#: The largest share of a batch's samples that may be padding.
MAX_PADDING: Final = 0.03


def pad(
    waveforms: Sequence[npt.NDArray[np.float32]], fill: float = 0.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Stack waveforms: [(samples_i,)] → (batch, max samples) float32 filled up with ``fill``, and (batch,) lengths."""
    lengths = np.array([len(waveform) for waveform in waveforms], np.int64)
    batch = np.full((len(waveforms), lengths.max()), fill, np.float32)
    for row, waveform in zip(batch, waveforms, strict=True):
        row[: len(waveform)] = waveform
    return batch, lengths


@dataclass(frozen=True, order=True)
class _Waiting:
    samples: int
    arrival: int
    item: Any


class Pool:
    """Inputs that wait for a batch, and the rule by which the next batch is formed.

    Each batch is built around the input that has waited longest, so that results stay nearly in the order of inputs,
    and takes in the inputs nearest to it in length while the padded size stays within ``budget`` samples and the
    padding within :data:`MAX_PADDING` of it. With ``longest_first`` the first batch is built around the longest input:
    an engine that keeps its memory then allocates most of what it will need at once.
    """

    def __init__(self, budget: int, longest_first: bool = False) -> None:
        self.budget = budget
        self.samples = 0
        self._longest_first = longest_first
        self._by_length: list[_Waiting] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._by_length)

    def add(self, samples: int, item: Any) -> None:
        """Add an input, ``item``, with a length of ``samples`` samples."""
        bisect.insort(self._by_length, _Waiting(samples, self._arrivals, item))
        self._arrivals += 1
        self.samples += samples

    def take(self) -> list[Any]:
        """Remove and return the next batch, shortest first; at least one input."""
        waiting = self._by_length
        oldest = min(range(len(waiting)), key=lambda i: waiting[i].arrival)
        first = last = len(waiting) - 1 if self._longest_first else oldest
        self._longest_first = False
        total = waiting[first].samples
        while True:
            choices = []
            if first > 0 and self._fits(waiting[last].samples, last - first + 2, total + waiting[first - 1].samples):
                choices.append((waiting[last].samples - waiting[first - 1].samples, first - 1, last))
            if last + 1 < len(waiting):
                longer = waiting[last + 1].samples
                if self._fits(longer, last - first + 2, total + longer):
                    choices.append(((longer - waiting[last].samples) * (last - first + 1), first, last + 1))
            if not choices:
                break
            _, first, last = min(choices)
            total = sum(entry.samples for entry in waiting[first : last + 1])
        batch = waiting[first : last + 1]
        del waiting[first : last + 1]
        self.samples -= total
        return [entry.item for entry in batch]

    def _fits(self, longest: int, count: int, total: int) -> bool:
        padded = longest * count
        return padded <= self.budget and padded - total <= MAX_PADDING * padded
