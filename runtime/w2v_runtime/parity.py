"""A bundle against reference outputs: the comparison behind the exporter's proof and ``w2v-models verify``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from w2v_models.errors import BundleError
from w2v_models.manifest import EMBEDDING, FRAME_LENGTHS, LAST_HIDDEN_STATE, LOGITS
from w2v_models.parity import ParityRow
from w2v_runtime.embedder import Embedder

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Reference:
    """What the reference computes of one waveform, run alone.

    ``waveform`` (samples,), ``frames`` (T, D), ``pooled`` (D,) the mean over time, ``logits`` (K,) or None.
    """

    case: str
    waveform: Array
    frames: Array
    pooled: Array
    logits: Array | None


def compare(
    embedder: Embedder, references: Sequence[Reference], done: Callable[[int, int], None] = lambda i, n: None
) -> tuple[ParityRow, ...]:
    """Embed every reference alone, then all as one batch with NaN in the padding, and measure the differences.

    ``done(i, n)`` is called after the i-th of n runs.
    """
    rows: list[ParityRow] = []
    runs = len(references) + 1
    for i, reference in enumerate(references, 1):
        rows.extend(_rows(reference.case, [reference], _run(embedder, [reference])))
        done(i, runs)
    rows.extend(_rows(f"batch of {len(references)}", references, _run(embedder, references)))
    done(runs, runs)
    return tuple(rows)


Outputs = tuple[list[Array], list[Array], list[Array | None]]


def _run(embedder: Embedder, references: Sequence[Reference]) -> Outputs:
    names = [LAST_HIDDEN_STATE, FRAME_LENGTHS, EMBEDDING] + ([LOGITS] if embedder.manifest.head else [])
    outputs = embedder.forward([reference.waveform for reference in references], names, fill=np.nan)
    frames = [row[:length] for row, length in zip(outputs[0], outputs[1], strict=True)]
    return frames, list(outputs[2]), list(outputs[3]) if embedder.manifest.head else [None] * len(references)


def _rows(case: str, references: Sequence[Reference], outputs: Outputs) -> Iterator[ParityRow]:
    frames, pooled, logits = outputs
    columns: dict[str, Sequence[Array | None]] = {"frames": frames, "pooled": pooled, "logits": logits}
    for name, actual in columns.items():
        pairs = [
            difference(np.atleast_2d(mine), np.atleast_2d(theirs))
            for mine, theirs in zip(actual, (getattr(reference, name) for reference in references), strict=True)
            if mine is not None and theirs is not None
        ]
        if pairs:
            absolute, relative, cosine = zip(*pairs, strict=True)
            yield ParityRow(case, name, max(absolute), max(relative), min(cosine))


def difference(actual: Array, expected: Array) -> tuple[float, float, float]:
    """Max |Δ|, max |Δ| over the largest expected magnitude, and the smallest cosine of the rows of two matrices.

    Another shape, or anything that is not finite, counts as infinitely far.
    """
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return np.inf, np.inf, -1.0
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    largest = float(np.abs(a - b).max())
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.divide((a * b).sum(axis=1), norms, out=np.ones_like(norms), where=norms > 0)
    return largest, largest / max(float(np.abs(b).max()), 1e-30), float(cosine.min())


def save_references(path: Path, references: Sequence[Reference]) -> None:
    """Write references as an ``.npz`` of plain arrays, which :func:`load_references` reads."""
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "cases": np.array(json.dumps([reference.case for reference in references]))
    }
    for i, reference in enumerate(references):
        for name in ("waveform", "frames", "pooled", "logits"):
            value = getattr(reference, name)
            if value is not None:
                arrays[f"{name}_{i}"] = value
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load_references(path: Path) -> list[Reference]:
    """Read what :func:`save_references` wrote.

    Raises:
        BundleError: the file is not such an ``.npz``.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [
                Reference(
                    case,
                    arrays[f"waveform_{i}"],
                    arrays[f"frames_{i}"],
                    arrays[f"pooled_{i}"],
                    arrays.get(f"logits_{i}"),
                )
                for i, case in enumerate(json.loads(str(arrays["cases"])))
            ]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise BundleError(f"{path} does not hold reference vectors: {error}. Export the model again.") from None
