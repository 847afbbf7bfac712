"""What the accuracy gates of the reduced precisions measure: a graph, still in PyTorch, against the reference."""

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
    """The smallest cosine of a frame, of the pooled vector and of a layer's mean with the reference's."""
    layers, last, _ = run(graph, reference.waveform)
    answers = {
        "frames": (last[0], reference.frames),
        "pooled": (last.mean(1), reference.pooled[None]),
        "layers": (torch.cat([layer.mean(1) for layer in layers]), reference.layers),
    }
    return {name: difference(mine.numpy(), theirs)[2] for name, (mine, theirs) in answers.items()}


def run(graph: InferenceGraph, waveform: Waveform) -> tuple[list[Tensor], Tensor, Tensor]:
    """A graph's layers, ``last_hidden_state`` and frame count of one utterance, (samples,)."""
    return graph.layers(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
