"""Spans of a recording's frames: each gets its own statistics, frames and head, from one pass over the recording.

A segment that is heard with context, or in its whole recording, is a span of what was heard: the frames whose centre
lies in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from w2v_models.errors import AudioError, W2VError
from w2v_models.manifest import HEAD_FRAMES, POOLED, ConvStack, Head, frames_output
from w2v_runtime.embedding.pooling import RunningPool
from w2v_runtime.embedding.results import Request
from w2v_runtime.embedding.windows import Window
from w2v_runtime.engines.base import Engine
from w2v_runtime.threads.stop import Stop

Frames = npt.NDArray[np.float32]
#: The values and the head's columns of one span, as ``Embedding`` has them.
Answer = tuple[Frames, Frames | None]


class Span(NamedTuple):
    """The frames ``first`` to ``last``, exclusive, of what was heard; at least one."""

    first: int
    last: int


def frames_inside(begin: int, end: int, frames: int, conv: ConvStack, step: int) -> tuple[Span, bool]:
    """The span of the frames whose centre lies in the samples [begin, end), and whether there are any.

    Without any, it is the frame whose centre is nearest to the middle. Frame t of those of which one comes from
    ``step`` is centred on sample t·step·stride + receptive field / 2.

    Examples:
        >>> conv = ConvStack(kernels=(400,), strides=(320,), channels=(1,))
        >>> frames_inside(200, 840, 9, conv, 1), frames_inside(210, 220, 9, conv, 1)
        ((Span(first=0, last=2), True), (Span(first=0, last=1), False))
    """
    hop = 2 * conv.stride * step  # in half samples, so that every centre is a whole number
    first = max(0, -((conv.receptive_field - 2 * begin) // hop))
    last = min(frames, -((conv.receptive_field - 2 * end) // hop))
    if first < last:
        return Span(first, last), True
    nearest = -((hop // 2 - (begin + end - conv.receptive_field)) // hop)  # the earlier of two that are as near
    nearest = min(max(nearest, 0), frames - 1)
    return Span(nearest, nearest + 1), False


def outputs_of_spans(request: Request, head: Head | None) -> list[str]:
    """Names of the graph's outputs that spans are taken from: frames of each layer, and those of the head."""
    frames = [frames_output(layer) for layer in request.layers]
    if head is None:
        return frames
    return [*frames, HEAD_FRAMES if head.level == "utterance" else head.outputs[-1]]


class SpanPools:
    """The spans of one recording while its windows come, in any order.

    Args:
        request: level, poolings and layers.
        head: the head to compute, or None.
        spans: at least one.
    """

    def __init__(self, request: Request, head: Head | None, spans: Sequence[Span]) -> None:
        self._request, self._head, self.spans = request, head, tuple(spans)
        self._pools: list[list[RunningPool]] = [[RunningPool() for _ in request.layers] for _ in spans]
        self._head_pools = [RunningPool() for _ in spans]
        self._frames: list[dict[int, list[Frames]]] = [{} for _ in spans]
        self._columns: list[dict[int, Frames]] = [{} for _ in spans]

    def add(self, window: Window, outputs: Sequence[npt.NDArray[Any]]) -> None:
        """Add a window: ``outputs`` are those of :func:`outputs_of_spans`, (frames from ``window.begin`` on, D) each.

        The head's first frame is centred on frame ``margin`` of the window.
        """
        layers = outputs if self._head is None else outputs[:-1]
        for index, span in enumerate(self.spans):
            first, last = max(span.first, window.first), min(span.last, window.last)
            if first >= last:
                continue
            blocks = [layer[first - window.begin : last - window.begin] for layer in layers]
            if self._request.level == "frame":
                self._frames[index][first] = [block.copy() for block in blocks]
            else:
                for pool, block in zip(self._pools[index], blocks, strict=True):
                    pool.add(block)
            if self._head is not None:
                self._add_head(index, window, outputs[-1])

    def _add_head(self, index: int, window: Window, frames: npt.NDArray[Any]) -> None:
        """The head's frames that see nothing but the span."""
        margin, span = (0 if self._head is None else self._head.margin), self.spans[index]
        first = max(span.first + margin, window.first)
        last = min(span.last - margin, window.last)
        if first >= last:
            return
        block = frames[first - window.begin - margin : last - window.begin - margin]
        if self._head is not None and self._head.level == "frame":
            self._columns[index][first] = block.copy()
        else:
            self._head_pools[index].add(block)

    def answers(self, engine: Engine, stop: Stop) -> list[Answer | W2VError]:
        """The answer of each span; one whose frames are too few for the head has an error in its place.

        Raises:
            W2VError: the engine failed, or ``stop`` ended the run.
        """
        columns = self._heads(engine, stop)
        answers: list[Answer | W2VError] = []
        for index, told in enumerate(columns):
            values = self._values(index)
            if isinstance(told, W2VError):
                answers.append(told)
            elif not (np.isfinite(values).all() and (told is None or np.isfinite(told).all())):
                raise W2VError("the model's answer is not finite; its weights may be damaged: w2v-models verify.")
            else:
                answers.append((values, told))
        return answers

    def _values(self, index: int) -> Frames:
        if self._request.level == "frame":
            blocks = [self._frames[index][first] for first in sorted(self._frames[index])]
            layers = [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
            return np.stack(layers, axis=1) if len(layers) > 1 else layers[0]
        pooled = [pool.result(self._request.pooling) for pool in self._pools[index]]
        return np.stack(pooled) if len(pooled) > 1 else pooled[0]

    def _heads(self, engine: Engine, stop: Stop) -> list[Frames | W2VError | None]:
        head = self._head
        if head is None:
            return [None] * len(self.spans)
        if head.level == "frame":
            return [np.concatenate([rows[first] for first in sorted(rows)]) for rows in self._columns]
        least = head.shortest - 2 * head.margin
        enough = [pool.frames >= least for pool in self._head_pools]
        told: list[Frames | W2VError | None] = [
            AudioError(f"too short: it has {span.last - span.first} frames, the {head.kind} head needs {head.shortest}")
            for span in self.spans
        ]
        if any(enough):
            pools = [pool for pool, is_enough in zip(self._head_pools, enough, strict=True) if is_enough]
            feeds = {POOLED: np.stack([pool.result(head.pooling) for pool in pools])}
            rows = iter(engine.run(feeds, [head.outputs[-1]], "head", stop)[0])
            told = [next(rows).copy() if is_enough else error for is_enough, error in zip(enough, told, strict=True)]
        return told
