"""Convert a graph to float16 (fp16), if measurements against the reference show that it stays accurate and finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from w2v_export.graph.half import halve, shape_for_gpu
from w2v_export.graph.inference import InferenceGraph
from w2v_export.precision.gate import run, worst_cosines
from w2v_export.signals import Waveform, scale, speech_like
from w2v_models.errors import ParityError
from w2v_models.tolerances import TOLERANCES
from w2v_runtime.embedding.parity import Reference, comparable

PRECISION: Final = "fp16"
#: The length in seconds of the longest signal.
_LONG: Final = 30
#: Peaks of a loud and of a quiet signal; 1 is full scale.
_LOUD, _QUIET = 100.0, 1e-5

Done = Callable[[int, int], None]


class Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which float16 operators compute in float32 and round their results, as on a GPU.

    PyTorch's float16 operators for processors are slow. ONNX Runtime on a processor computes long parts of a graph in
    float32, which hides overflows: its results prove the file, but not the precision.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default:
            return func(*args, **kwargs)
        halves = []

        def widen(x: Tensor) -> Tensor:
            if x.dtype != torch.float16:
                return x
            halves.append(x)
            return x.float()

        answer = func(*tree_map_only(Tensor, widen, args), **tree_map_only(Tensor, widen, kwargs))
        return tree_map_only(Tensor, _round, answer) if halves else answer


def _round(x: Tensor) -> Tensor:
    return x.half() if x.dtype == torch.float32 else x


@torch.inference_mode()
def convert(graph: InferenceGraph, references: Sequence[Reference], rate: int, done: Done = lambda i, n: None) -> None:
    """Convert ``graph`` to float16 and the form for GPUs, in place, and check it on ``references`` at ``rate`` Hz.

    ``done(i, n)`` is called after the i-th of n steps.

    Raises:
        ParityError: a cosine with the reference is below the tolerance, or an output on a loud, quiet or long signal
            is not finite.
    """
    shape_for_gpu(graph)
    halve(graph)
    references, signals = comparable(references, PRECISION, rate), extremes(rate)
    with Rounded():  # type: ignore[no-untyped-call]
        for i, (name, waveform) in enumerate(signals.items()):
            layers, last, _ = run(graph, waveform)
            if not all(bool(x.isfinite().all()) for x in (*layers, last)):
                raise ParityError(
                    f"fp16 cannot be had: on {name} the model's numbers leave float16's range, ±65504. "
                    "Export this model without fp16; --precision tf32 is the faster one on its fp32 graph."
                )
            done(1 + i, 1 + len(signals))
        cosines = worst_cosines(graph, references)
    if any(cosine < TOLERANCES[PRECISION][output].min_cosine for output, cosine in cosines.items()):
        found = {output: f"{cosine:.5f}" for output, cosine in cosines.items()}
        raise ParityError(
            f"fp16 cannot be had within its tolerance: the smallest cosines are {found}. Export this model without "
            "fp16; --precision tf32 is the faster one on its fp32 graph."
        )
    done(1 + len(signals), 1 + len(signals))


def extremes(rate: int) -> dict[str, Waveform]:
    """Signals that test the range of float16, by name: loud, quiet, a click, and long; ``rate`` in Hz."""
    speech = speech_like(3 * rate, rate)
    click = np.zeros(3 * rate, np.float32)
    click[rate] = 1.0
    return {
        "loud speech": scale(speech, _LOUD),
        "quiet speech": scale(speech, _QUIET),
        "a click in silence": click,
        "long speech": speech_like(_LONG * rate, rate),
    }
