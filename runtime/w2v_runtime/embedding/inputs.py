"""What a corpus is made of: recordings, and segments, which are grouped by the recording that they lie in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Final

from w2v_models.errors import W2VError
from w2v_runtime.audio.recordings import Recording
from w2v_runtime.embedding.results import Failure, Segment
from w2v_runtime.tables.rows import MAX_SECONDS

#: The context of a segment that hears its whole recording.
WHOLE: Final = "whole"
#: So many segments are looked at together to find those of one recording, where results are given in order.
AHEAD_IN_ORDER: Final = 16_384
#: What a segment hears: seconds on each side, 0 for the segment alone, or :data:`WHOLE`.
Context = float | str


@dataclass(frozen=True)
class Input:
    """One input: its position among the inputs of this run, from 0, its path, and its recording if it is not a file.

    ``segment`` is None for a whole recording. Of a segment, ``label`` is what messages call it, and ``fault`` says why
    its recording is not known, if so.
    """

    position: int
    path: str
    recording: Recording | None = None
    segment: Segment | None = None
    label: str = ""
    fault: str | None = None

    @property
    def source(self) -> Recording:
        """The recording to read: ``recording``, or else the file at ``path``."""
        return self.path if self.recording is None else self.recording

    def failure(self, stage: str, error: W2VError | MemoryError | str) -> Failure:
        """The failure of this input at a stage; for a segment the reason begins with its label."""
        reason = str(error) or "out of memory"
        return Failure(self.path, stage, f"{self.label}: {reason}" if self.label else reason)


@dataclass(frozen=True)
class Segments:
    """Segments of one channel of one recording, at least one; if the first has a fault, all have the same."""

    inputs: tuple[Input, ...]


def grouped(inputs: Iterable[Input], ahead: int) -> Iterator[Segments]:
    """Group segments by their recordings, in the order in which these first come.

    ``ahead`` segments are looked at together, so those of a recording that are further apart form several groups.
    """
    rest = iter(inputs)
    while chunk := list(itertools.islice(rest, ahead)):
        groups: dict[tuple[object, ...], list[Input]] = {}
        for item in chunk:
            recording = item.path if item.recording is None else id(item.recording)
            channel = None if item.segment is None else item.segment.channel
            groups.setdefault((recording, channel, item.fault), []).append(item)
        del chunk
        for group in list(groups):
            yield Segments(tuple(groups.pop(group)))


def segment_of(start: object, end: object) -> Segment:
    """A segment from two times in seconds; an end of None or NaN is the end of the recording.

    Raises:
        TypeError: a time is no number, or none that a recording has.
    """
    if not _is_time(start) or not (end is None or _is_time(end)):
        raise TypeError(f"the times of a segment are numbers of seconds, not {start!r:.40} and {end!r:.40}.")
    begin, stop = float(start), None if end is None else float(end)  # type: ignore[arg-type]
    if not abs(begin) <= MAX_SECONDS or (stop is not None and abs(stop) > MAX_SECONDS):
        raise TypeError(f"a segment starts and ends at a number of seconds, not at {begin!r} and {stop!r}.")
    return Segment(begin, None if stop is None or math.isnan(stop) else stop)


def label_of(what: str, segment: Segment) -> str:
    """What messages call a segment: ``what``, such as its line in a table, and its times."""
    return f"{what} ({segment.start:g} to {'its end' if segment.end is None else f'{segment.end:g} s'})"


def _is_time(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
