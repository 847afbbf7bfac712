"""Reference outputs for the parity test: PyTorch's results for each waveform, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from w2v_export.checkpoint import Checkpoint, Outputs
from w2v_export.recordings import Recording, named
from w2v_export.signals import Waveform, parity_waveforms
from w2v_models.errors import CheckpointError
from w2v_models.tolerances import TOLERANCES
from w2v_runtime.embedding.parity import Reference

#: Waveforms up to this many seconds are stored in the bundle with their reference outputs.
STORED_SECONDS: Final = 1.0


def reference_outputs(
    checkpoint: Checkpoint, recordings: Sequence[Recording], done: Callable[[int, int], None]
) -> list[Reference]:
    """Run the PyTorch reference on the built-in waveforms and on the user's recordings.

    ``done(i, n)`` is called after the i-th of n runs.

    Raises:
        CheckpointError: PyTorch itself computes NaN or infinity for a waveform.
    """
    architecture = checkpoint.architecture
    cases = parity_waveforms(architecture.conv, architecture.sample_rate)
    cases |= named(recordings, cases)
    references = []
    for case, waveform in cases.items():
        outputs = checkpoint.run(waveform)
        if not outputs.finite:
            raise CheckpointError(
                f"{checkpoint.source.model} cannot be exported: PyTorch itself computes NaN or infinity of the case "
                f"{case!r}, so the weights are damaged."
            )
        references.append(_reference(case, np.asarray(waveform), outputs))
        done(len(references), len(cases))
    return references


def exact_outputs(
    checkpoint: Checkpoint, references: Sequence[Reference], done: Callable[[int, int], None]
) -> list[Reference]:
    """The references again, with the reference model's answers in float64, and how far from them those in float32 are.

    That is the largest distance of any case: by how much one case is rounded is chance, such as how often errors of the
    same sign meet in a mean. The checkpoint computes in float64 from then on. ``done(i, n)`` is called after the i-th
    of n runs.
    """
    checkpoint.to_float64()
    answers = list[Reference]()
    largest: dict[str, float] = {}
    for single in references:
        double = _reference(single.case, single.waveform, checkpoint.run(single.waveform))
        exact = {name: values for name in TOLERANCES["fp32"] if (values := getattr(double, name)) is not None}
        for name, values in exact.items():
            largest[name] = max(largest.get(name, 0.0), float(np.abs(getattr(single, name) - values).max()))
        rounded = {name: values.astype(np.float32) for name, values in exact.items()}
        answers.append(dataclasses.replace(double, **rounded))
        done(len(answers), len(references))
    return [
        dataclasses.replace(answer, rounding={name: largest[name] for name in TOLERANCES["fp32"] if name in largest})
        for answer in answers
    ]


def _reference(case: str, waveform: Waveform, outputs: Outputs) -> Reference:
    pooled, layers = outputs.frames.mean(axis=0), outputs.layers.mean(axis=1)
    return Reference(case, waveform, outputs.frames, pooled, layers, outputs.head)


def stored(references: Sequence[Reference], rate: int) -> list[Reference]:
    """The references of at most ``STORED_SECONDS``, which are stored in the bundle; ``rate`` is in Hz."""
    return [reference for reference in references if len(reference.waveform) <= STORED_SECONDS * rate]
