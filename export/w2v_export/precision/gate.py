"""Measure the accuracy of an int8 or fp16 graph, before its export, by cosines with the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from w2v_export.graph.inference import InferenceGraph
from w2v_export.signals import Waveform
from w2v_runtime.embedding.parity import Reference, difference


def worst_cosines(graph: InferenceGraph, references: Sequence[Reference]) -> dict[str, float]:
    """The smallest cosine of each output over all references."""
    every = [lowest_cosines(graph, reference) for reference in references]
    return {output: min(cosines[output] for cosines in every) for output in every[0]}


@torch.inference_mode()
def lowest_cosines(graph: InferenceGraph, reference: Reference) -> dict[str, float]:
    """The smallest cosines with a reference, by output: of all frames, of the pooled vector, of all layers' means."""
    layers, last, _ = run(graph, reference.waveform)
    answers = {
        "frames": (last[0], reference.frames),
        "pooled": (last.mean(1), reference.pooled[None]),
        "layers": (torch.cat([layer.mean(1) for layer in layers]), reference.layers),
    }
    return {name: difference(mine.numpy(), theirs)[2] for name, (mine, theirs) in answers.items()}


def run(graph: InferenceGraph, waveform: Waveform) -> tuple[list[Tensor], Tensor, Tensor]:
    """Run a graph on one utterance (samples,): its layers, ``last_hidden_state``, and frame count (1,)."""
    return graph.layers(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
