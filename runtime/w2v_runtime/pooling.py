"""Statistics over the frames of one utterance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from w2v_runtime.results import Pooling

#: By name: (frames, D) → (D,). ``std`` is the population's (no Bessel correction), so one frame gives zeros.
_STATISTICS: Final[dict[Pooling, Callable[..., Any]]] = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}


def pool(frames: npt.NDArray[np.float32], pooling: Sequence[Pooling]) -> npt.NDArray[np.float32]:
    """Pool over time and concatenate: (frames, D) → (len(pooling)·D,). Sums are taken in float64."""
    exact = frames.astype(np.float64)
    return np.concatenate([_STATISTICS[name](exact, axis=0) for name in pooling]).astype(np.float32)
