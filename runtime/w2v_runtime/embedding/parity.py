"""Parity: compares a bundle's outputs with reference outputs, for the exporter and for ``w2v-models verify``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from w2v_models.errors import BundleError
from w2v_models.manifest import EMBEDDING, FRAME_LENGTHS, LAST_HIDDEN_STATE, pooled_output
from w2v_models.tolerances import SHORTEST_SECONDS, ParityRow
from w2v_runtime.audio.reading import Audio
from w2v_runtime.embedding.model import Model
from w2v_runtime.embedding.results import Embedding, Request

Array = npt.NDArray[np.float32]
#: The longest waveform, in seconds, for which every layer is compared; for longer ones the last layer is enough.
LAYERS_SECONDS: Final = 2.5


@dataclass(frozen=True, eq=False)
class Reference:
    """The outputs of the reference model for one waveform, run alone.

    ``waveform`` (samples,), ``frames`` (T, D), ``pooled`` (D,) the mean over time, ``layers`` (L + 1, D) the mean over
    time of each layer, ``logits`` (K,) or (T, K), or None without a head or where the waveform is too short for it.
    ``rounding`` is empty if the model ran in float32; if it ran in float64, it holds by output how far the float32
    answer is from these (see ``ParityRow.rounding``).
    """

    case: str
    waveform: Array
    frames: Array
    pooled: Array
    layers: Array
    logits: Array | None
    rounding: Mapping[str, float] = field(default_factory=dict)


def compare(
    model: Model, references: Sequence[Reference], done: Callable[[int, int], None] = lambda i, n: None
) -> tuple[ParityRow, ...]:
    """Embed every reference alone, then in padded batches with NaN in the padding, and measure the differences.

    One batch holds the short ones, whose layers are compared too, another the longest and the shortest. Last, one
    short reference goes through the graphs for long audio. ``done(i, n)`` is called after the i-th
    of n runs.
    """
    references = comparable(references, model.precision, model.sample_rate)
    by_length = sorted(references, key=lambda reference: len(reference.waveform))
    short = [r for r in by_length if len(r.waveform) <= LAYERS_SECONDS * model.sample_rate]
    groups = [(reference.case, [reference]) for reference in references]
    groups += [(f"batch of {len(batch)}", batch) for batch in (short, [by_length[0], by_length[-1]]) if len(batch) > 1]
    rows: list[ParityRow] = []
    for i, (case, group) in enumerate(groups, 1):
        rows.extend(_rows(case, group, _batch_outputs(model, group)))
        done(i, len(groups) + 1)
    rows.extend(_rows(f"{short[-1].case}, in pieces", [short[-1]], _long_outputs(model, short[-1])))
    done(len(groups) + 1, len(groups) + 1)
    return tuple(rows)


def compare_batches(model: Model, references: Sequence[Reference], suffix: str) -> tuple[ParityRow, ...]:
    """Measure the differences of the public graph alone, in two batches: the short references, and the longest.

    ``suffix`` is added to the names of the cases.
    """
    by_length = sorted(references, key=lambda reference: len(reference.waveform))
    short = [r for r in by_length if len(r.waveform) <= LAYERS_SECONDS * model.sample_rate]
    rows: list[ParityRow] = []
    for case, group in ((f"batch of {len(short)}", short), (by_length[-1].case, by_length[-1:])):
        rows.extend(_rows(case + suffix, group, _batch_outputs(model, group, layers=False)))
    return tuple(rows)


def comparable(references: Sequence[Reference], precision: str, rate: int) -> list[Reference]:
    """The references that the tolerances of a precision are meant for: long enough, and not silence throughout."""
    if precision not in SHORTEST_SECONDS:
        return list(references)
    shortest = SHORTEST_SECONDS[precision] * rate
    return [r for r in references if len(r.waveform) >= shortest and np.ptp(r.waveform) > 0]


Columns = dict[str, list[Array]]


def _batch_outputs(model: Model, references: Sequence[Reference], layers: bool = True) -> Columns:
    """The public graph's outputs for each waveform of a batch, and the mean of every layer if all of them are short."""
    head = model.manifest.head
    names = [LAST_HIDDEN_STATE, FRAME_LENGTHS, EMBEDDING] + ([head.outputs[-1]] if head else [])
    waveforms = [reference.waveform for reference in references]
    frames, lengths, pooled, *columns = model.forward(waveforms, names, fill=np.nan)
    outputs: Columns = {
        "frames": [row[:length] for row, length in zip(frames, lengths, strict=True)],
        "pooled": list(pooled),
    }
    if layers and max(len(waveform) for waveform in waveforms) <= LAYERS_SECONDS * model.sample_rate:
        every = [pooled_output(str(layer), "mean") for layer in range(model.manifest.architecture.layers + 1)]
        outputs["layers"] = list(np.stack(model.forward(waveforms, every, fill=np.nan), axis=1))
    if head:
        per_frame = head.level == "frame"
        rows = zip(columns[0], lengths, strict=True)
        outputs["logits"] = [row[:length] if per_frame else row for row, length in rows]
    return outputs


def _long_outputs(model: Model, reference: Reference) -> Columns:
    """Frames and the head's output for one waveform, computed as that of a long recording."""
    rate = model.sample_rate
    audio = Audio(reference.waveform, rate, len(reference.waveform) / rate)
    (answer,) = model.embed_long([(reference.case, model.long(audio))], Request("frame"))
    if not isinstance(answer, Embedding):
        raise answer
    columns: Columns = {"frames": [answer.values]}
    return columns if answer.logits is None else columns | {"logits": [answer.logits]}


def _rows(case: str, references: Sequence[Reference], outputs: Columns) -> Iterator[ParityRow]:
    for name, actual in outputs.items():
        pairs = [
            difference(np.atleast_2d(mine), np.atleast_2d(theirs))
            for mine, theirs in zip(actual, (getattr(reference, name) for reference in references), strict=True)
            if theirs is not None
        ]
        if pairs:
            absolute, relative, cosine = zip(*pairs, strict=True)
            rounding = max(reference.rounding.get(name, 0.0) for reference in references)
            yield ParityRow(case, name, max(absolute), max(relative), min(cosine), rounding)


def difference(actual: Array, expected: Array) -> tuple[float, float, float]:
    """Max |Δ|, max |Δ| over the largest expected magnitude, and the smallest cosine of the rows of two matrices.

    If the shapes differ or ``actual`` is not finite, the result is (inf, inf, -1).
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
        "cases": np.array(json.dumps([reference.case for reference in references])),
        "rounding": np.array(json.dumps([dict(reference.rounding) for reference in references])),
    }
    for i, reference in enumerate(references):
        for name in ("waveform", "frames", "pooled", "layers", "logits"):
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
            references = [
                Reference(
                    case,
                    arrays[f"waveform_{i}"],
                    arrays[f"frames_{i}"],
                    arrays[f"pooled_{i}"],
                    arrays[f"layers_{i}"],
                    arrays.get(f"logits_{i}"),
                    {str(output): float(value) for output, value in rounding.items()},
                )
                for i, (case, rounding) in enumerate(
                    zip(*(json.loads(str(arrays[name])) for name in ("cases", "rounding")), strict=True)
                )
            ]
            if not references:
                raise ValueError("it holds no case")
            return references
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} does not hold reference vectors: {error}. Export the model again.") from None
