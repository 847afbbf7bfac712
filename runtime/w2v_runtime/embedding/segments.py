"""Segments of one recording as the engine takes them: cut first, cut with context, or heard in their whole recording.

A recording is resampled as a whole and then cut at the samples nearest to the segment's times, so a cut equals that cut
of the resampled recording: there is no edge of a resampler at its ends.

A recording of up to :data:`HELD_SECONDS` is decoded once. A longer one is decoded twice, in bounded memory: the first
time to know its length and that all of it can be decoded, so that a bad recording fails all of its segments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from w2v_models.errors import AudioError, W2VError
from w2v_runtime.audio.reading import Audio, concatenate, from_array, open_audio
from w2v_runtime.audio.recordings import Recording, can_be_read_again
from w2v_runtime.embedding.inputs import WHOLE, Context, Input, Segments
from w2v_runtime.embedding.long import Long, cut, survey
from w2v_runtime.embedding.model import Model
from w2v_runtime.embedding.results import Embedding, Failure, Request, Segment
from w2v_runtime.embedding.spans import Answer, Span, frames_inside
from w2v_runtime.threads.stop import Stop

Samples = npt.NDArray[np.float32]

#: The longest recording that is held in memory while its segments are cut.
HELD_SECONDS: Final = 900.0
#: The longest segment of a longer recording that is held in memory; beyond it, it is read again as it is embedded.
_HELD_SEGMENT_SECONDS: Final = 300.0
#: Seconds of segments of such a recording that are cut at a time.
_STEP_SECONDS: Final = 60.0


#: An input with what became of it.
Result = tuple[Input, Embedding | Failure]


class Wanted(NamedTuple):
    """What an input takes from a unit: everything, or a span, of ``duration`` seconds; ``segment`` if it is one."""

    input: Input
    segment: Segment | None = None
    span: Span | None = None
    duration: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Unit:
    """Audio that goes through the engine as one, and the inputs that want something of it; or why they all fail."""

    wanted: tuple[Wanted, ...]
    audio: Audio | Long | Failure

    @property
    def held(self) -> float:
        """The seconds of audio in memory."""
        held = isinstance(self.audio, Audio) or (isinstance(self.audio, Long) and self.audio.held)
        return self.audio.duration if held else 0.0  # type: ignore[union-attr]

    @property
    def spans(self) -> list[Span]:
        """The span of each input, of units that have spans."""
        return [want.span for want in self.wanted if want.span is not None]

    def results(self, answers: Sequence[Embedding | Answer | W2VError | MemoryError]) -> list[Result]:
        """The result of each input from the engine's answer for it."""
        return [(want.input, self._result(want, answer)) for want, answer in zip(self.wanted, answers, strict=True)]

    def _result(self, want: Wanted, answer: Embedding | Answer | W2VError | MemoryError) -> Embedding | Failure:
        if isinstance(answer, W2VError | MemoryError):
            # What is long is read again while it is embedded.
            return want.input.failure("read" if isinstance(answer, AudioError) else "embed", answer)
        if isinstance(answer, Embedding):
            return answer if want.segment is None else dataclasses.replace(answer, segment=want.segment)
        values, columns = answer
        return Embedding(want.input.path, values, want.duration, columns, want.warnings, want.segment)


def read_segments(
    model: Model,
    segments: Segments,
    request: Request,
    context: Context,
    channel: int | None = None,
    pad_short: bool = False,
    stop: Stop | None = None,
) -> Iterator[list[Unit]]:
    """Read the segments of a recording, some at a time; a segment that cannot be is a unit with its failure.

    Raises:
        AudioError: the recording cannot be read; none of its segments was yielded before.
        W2VError: ``stop`` ended the reading.
    """
    stop = stop or Stop()
    first = segments.inputs[0]
    if first.fault is not None:
        raise AudioError(first.fault)
    if channel is None and first.segment is not None:
        channel = first.segment.channel
    reader, recording = _Reader(model, request, context, channel, pad_short, stop), first.source
    if context == WHOLE:
        yield reader.whole(segments.inputs, model.read(recording, reader.channel, stop=stop))
    else:
        yield from reader.cuts(segments.inputs, recording)


class _Place(NamedTuple):
    """Where a segment lies in its recording, in samples; ``duration`` is its length in seconds."""

    input: Input
    segment: Segment
    begin: int
    end: int
    duration: float
    warnings: tuple[str, ...]


class _Surveyed(NamedTuple):
    """A recording: its samples at the model's rate, its length in seconds, and the samples if they are in memory."""

    samples: int
    duration: float
    warnings: tuple[str, ...]
    held: Samples | None


@dataclass(frozen=True)
class _Reader:
    model: Model
    request: Request
    context: Context
    channel: int | None
    pad_short: bool
    stop: Stop

    def whole(self, inputs: Sequence[Input], audio: Audio | Long) -> list[Unit]:
        """All segments as spans of their recording's frames."""
        samples = audio.samples if isinstance(audio, Long) else len(audio.samples)
        placed, failed = self._placed(inputs, samples, audio.duration, audio.warnings)
        wanted = tuple(self._wanted(place, 0, samples) for place in placed)
        return [*failed, Unit(wanted, audio)] if wanted else failed

    def cuts(self, inputs: Sequence[Input], recording: Recording) -> Iterator[list[Unit]]:
        """Every segment as audio of its own, with its context, in the order of their starts."""
        found = self._survey(recording)
        placed, units = self._placed(inputs, found.samples, found.duration, found.warnings)
        placed.sort(key=lambda place: place.begin)
        if found.held is not None:
            for place in placed:
                begin, end = self._heard(place, found.samples)
                units.append(self._cut(place, found.held[begin:end], begin))
            yield units
            return
        short, most = list[_Place](), _HELD_SEGMENT_SECONDS * self.model.sample_rate
        for place in placed:
            begin, end = self._heard(place, found.samples)
            if end - begin > most:
                units.append(self._unheld(place, recording, begin, end))
            else:
                short.append(place)
        with open_audio(recording, self.model.sample_rate, self.channel) as stream:  # type: ignore[arg-type]
            spans = [self._heard(place, found.samples) for place in short]
            done = waiting = 0
            for samples in cut(stream, spans):
                self.stop.check()
                units.append(self._cut(short[done], samples.copy(), spans[done][0]))
                done, waiting = done + 1, waiting + len(samples)
                if waiting > _STEP_SECONDS * self.model.sample_rate:
                    yield units
                    units, waiting = [], 0
        for place in short[done:]:
            changed = AudioError("the recording changed while it was read; embed it again.")
            units.append(Unit((Wanted(place.input),), _unread(place.input, changed)))
        yield units

    def _survey(self, recording: Recording) -> _Surveyed:
        rate = self.model.sample_rate
        if isinstance(recording, tuple):
            audio = from_array(*recording, rate, self.channel)
            return _Surveyed(len(audio.samples), audio.duration, audio.warnings, audio.samples)
        blocks, samples = list[Samples](), 0
        most = HELD_SECONDS * rate if can_be_read_again(recording) else math.inf
        with open_audio(recording, rate, self.channel) as stream:
            for block in stream:
                self.stop.check()
                samples += len(block)
                if samples <= most:
                    blocks.append(block)
                else:
                    blocks.clear()
            held = concatenate(blocks) if samples <= most else None
            return _Surveyed(samples, stream.duration, stream.warnings, held)

    def _placed(
        self, inputs: Iterable[Input], samples: int, duration: float, warnings: tuple[str, ...]
    ) -> tuple[list[_Place], list[Unit]]:
        placed, failed = list[_Place](), list[Unit]()
        for item in inputs:
            try:
                placed.append(self._place(item, samples, duration, warnings))
            except AudioError as error:
                failed.append(Unit((Wanted(item),), _unread(item, error)))
        return placed, failed

    def _place(self, item: Input, samples: int, duration: float, warnings: tuple[str, ...]) -> _Place:
        """Where a segment lies in a recording; one that ends up to a frame behind it is clipped.

        Raises:
            AudioError: it is not inside the recording, or ends before it begins.
        """
        segment, rate = item.segment or Segment(0.0), self.model.sample_rate
        if segment.start < 0:
            raise AudioError("it begins before its recording; correct its start.")
        if segment.end is not None and segment.end <= segment.start:
            raise AudioError("it ends at or before its start; correct its times.")
        begin = round(segment.start * rate)
        if begin >= samples:
            raise AudioError(f"it begins behind the end of its recording, which has {duration:.3f} s.")
        rest = round(duration - segment.start, 9)
        if segment.end is None:
            return _Place(item, segment, begin, samples, rest, warnings)
        end, frame = round(segment.end * rate), self.model.manifest.architecture.conv.receptive_field
        beyond = (end - samples) / rate
        if end - samples > frame:
            raise AudioError(f"it ends {beyond:.3f} s behind the end of its recording, which has {duration:.3f} s.")
        if end - samples > 1:  # one sample is the rounding of the resampled length
            clipped = f"clipped: the segment ends {beyond:.3f} s behind its recording, which has {duration:.3f} s"
            return _Place(item, segment, begin, samples, rest, (*warnings, clipped))
        length = round(segment.end - segment.start, 9)
        return _Place(item, segment, begin, min(end, samples), length, warnings)

    def _heard(self, place: _Place, samples: int) -> tuple[int, int]:
        context = round(float(self.context) * self.model.sample_rate)
        return max(0, place.begin - context), min(samples, place.end + context)

    def _cut(self, place: _Place, samples: Samples, begin: int) -> Unit:
        """A segment as a unit of its own; ``samples`` are what it hears, from sample ``begin`` of the recording on."""
        audio = Audio(samples, self.model.sample_rate, place.duration, place.warnings)
        try:
            if not self.context:
                prepared = self.model.prepared(audio, self.pad_short, self.stop)
                return Unit(
                    (Wanted(place.input, dataclasses.replace(place.segment, first=place.segment.start)),), prepared
                )
            prepared = self.model.prepared(audio, False, self.stop)
        except AudioError as error:
            return Unit((Wanted(place.input),), _unread(place.input, error))
        return Unit((self._wanted(place, begin, len(samples)),), prepared)

    def _unheld(self, place: _Place, recording: Recording, begin: int, end: int) -> Unit:
        """A long segment of a long recording, read twice more: for its moments, and as it is embedded."""

        @contextlib.contextmanager
        def opened() -> Iterator[Iterable[Samples]]:
            with open_audio(recording, self.model.sample_rate, self.channel) as stream:  # type: ignore[arg-type]
                yield _between(stream, begin, end)

        with opened() as blocks:
            samples, moments = survey(self.model.engine, self.model.manifest.architecture, blocks, self.stop)
        audio = Long(samples, moments, place.duration, place.warnings, opened, held=False)
        if self.context:
            return Unit((self._wanted(place, begin, samples),), audio)
        return Unit((Wanted(place.input, dataclasses.replace(place.segment, first=place.segment.start)),), audio)

    def _wanted(self, place: _Place, begin: int, samples: int) -> Wanted:
        """The span of a segment in what it hears: ``samples`` samples from sample ``begin`` of the recording on."""
        architecture = self.model.manifest.architecture
        conv, step = architecture.conv, architecture.step(self.request.layers[0])
        frames = self.model.frames(self.request, samples)
        span, inside = frames_inside(place.begin - begin, place.end - begin, frames, conv, step)
        first = round((begin + span.first * step * conv.stride) / self.model.sample_rate, 9)
        warnings = place.warnings
        if not inside:
            warnings = (*warnings, "no frame is centred in the segment: the nearest one stands for it")
        return Wanted(place.input, dataclasses.replace(place.segment, first=first), span, place.duration, warnings)


def _unread(item: Input, error: AudioError) -> Failure:
    return Failure(item.path, "read", str(error))


def _between(blocks: Iterable[Samples], begin: int, end: int) -> Iterator[Samples]:
    """The samples from ``begin`` to ``end`` of a stream of blocks."""
    offset = 0
    for block in blocks:
        if offset >= end:
            return
        part = block[max(0, begin - offset) : end - offset]
        offset += len(block)
        if len(part):
            yield part
