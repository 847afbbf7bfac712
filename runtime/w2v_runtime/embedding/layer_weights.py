"""Weights of a sum of layers, such as a SUPERB probe learns: the rule by which they are read, and their files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from w2v_models.errors import RefusedError

#: How far the sum of normalised weights may be from 1.
_SUM_TOLERANCE: Final = 1e-3
#: A larger file is refused: it holds more than one weight per layer.
_MAX_BYTES: Final = 1 << 20


def normalised(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights that add up to 1: those that are not negative and do so already are returned unchanged.

    Any others are taken for a probe's parameters before its softmax, exp(w)/Σexp(w), which is applied (Yang et al.
    2021, SUPERB, section 3).

    Examples:
        >>> normalised([0.25, 0.75])
        (0.25, 0.75)
        >>> normalised([1.0, 1.0])
        (0.5, 0.5)
    """
    exact = np.asarray(weights, np.float64)
    if exact.min() < 0 or abs(exact.sum() - 1) > _SUM_TOLERANCE:
        exact = np.exp(exact - exact.max())
        exact /= exact.sum()
    return tuple(exact.tolist())


def read_weights(path: Path) -> tuple[float, ...]:
    """Read the weights of the layers 0 … L: ``.npy``, a JSON list, or numbers between spaces, commas or line ends.

    Raises:
        RefusedError: the file cannot be read, or does not hold finite numbers.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        weights = np.asarray(_numbers(content, path.suffix), dtype=np.float64).reshape(-1)
    except OSError as error:
        raise RefusedError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, EOFError) as error:
        raise RefusedError(f"{path} does not hold layer weights: {error}. Give one number a layer.") from None
    if not weights.size or not np.isfinite(weights).all():
        raise RefusedError(f"{path} does not hold layer weights: they must be finite numbers, one a layer.")
    return tuple(weights.tolist())


def _numbers(content: bytes, suffix: str) -> Any:
    if suffix == ".npy":
        return np.load(io.BytesIO(content), allow_pickle=False)
    text = content.decode("utf-8")
    if suffix == ".json":
        return json.loads(text)
    return [float(word) for word in text.replace(",", " ").split()]
