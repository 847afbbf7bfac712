"""Which recordings are embedded whole, and into which windows longer ones are split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from w2v_models.errors import RefusedError
from w2v_models.manifest import ConvStack

#: The bounds of :class:`Windowing` in seconds. The time of what is embedded whole grows with its square.
MAX_WHOLE: Final = 24 * 3600.0
MAX_WINDOW: Final = 600.0
MAX_CONTEXT: Final = 300.0


@dataclass(frozen=True)
class Windowing:
    """How long audio is embedded: whole up to ``whole`` seconds, beyond that in windows.

    A whole recording's embedding equals PyTorch's. Windows are ``window`` seconds long, and the model hears ``context``
    more seconds on each side of one; the normalisation and the convolutions are those of the whole recording.

    Examples:
        >>> Windowing(window=30, context=5, whole=60).whole_samples(16000)
        960000
    """

    window: float = 30.0
    context: float = 5.0
    whole: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.window <= MAX_WINDOW:
            raise RefusedError(f"window must be 1 to {MAX_WINDOW:g} seconds, not {self.window}.")
        if not 0 <= self.context <= MAX_CONTEXT:
            raise RefusedError(f"context must be 0 to {MAX_CONTEXT:g} seconds, not {self.context}.")
        if not 0 <= self.whole <= MAX_WHOLE or math.isnan(self.whole):
            raise RefusedError(f"whole must be 0 to {MAX_WHOLE:g} seconds, not {self.whole}.")

    def whole_samples(self, rate: int) -> int:
        """The longest audio that is embedded whole, in samples."""
        return round(self.whole * rate)


DEFAULT_WINDOWING: Final = Windowing()


@dataclass(frozen=True)
class Window:
    """Frames ``first`` to ``last`` of a recording, for which the encoder sees the frames ``begin`` to ``end``.

    ``last`` and ``end`` are exclusive.
    """

    first: int
    last: int
    begin: int
    end: int

    def narrowed(self, step: int) -> Window:
        """The window in frames of which one comes from ``step``, as an adapter makes them."""
        return Window(*(narrowed(frame, step) for frame in (self.first, self.last, self.begin, self.end)))


def narrowed(frames: int, step: int) -> int:
    """How many frames are left of so many where one comes from ``step``, as an adapter makes them; the last counts."""
    return -(-frames // step)


def plan_windows(
    frames: int, rate: int, conv: ConvStack, windowing: Windowing, least_context: int = 0, multiple: int = 1
) -> Iterator[Window]:
    """Yield the windows of a recording of ``frames`` frames; together they hold every frame once.

    The context is at least ``least_context`` frames on each side, as far as the recording goes. Both begin at multiples
    of ``multiple``, for the frames of an adapter.
    """
    size = narrowed(max(1, round(windowing.window * rate / conv.stride)), multiple) * multiple
    context = narrowed(max(least_context, round(windowing.context * rate / conv.stride)), multiple) * multiple
    for first in range(0, frames, size):
        last = min(first + size, frames)
        yield Window(first, last, max(0, first - context), min(frames, last + context))
