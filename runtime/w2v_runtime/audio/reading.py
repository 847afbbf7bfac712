"""A path, bytes, an open file or an array to mono float32 samples at the model's rate.

Channels are averaged, or one is picked, before soxr resamples (quality HQ, equal to ``soxr.resample`` of the whole).
Files are decoded in small blocks, so that memory follows the result and not what a header declares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import numpy as np
import numpy.typing as npt
import soxr

from w2v_models.errors import AudioError
from w2v_runtime.audio.decoder import Decoder, check_layout
from w2v_runtime.audio.libsndfile import BLOCK_SAMPLES
from w2v_runtime.audio.source import Source as Source
from w2v_runtime.audio.waveform import Frames, float_levels, frames_of, full_scale, integer_levels, rate_of

Samples = npt.NDArray[np.float32]

#: Seconds of a block of an ``AudioStream``, at least; the last one may be shorter.
BLOCK_SECONDS: Final = 30
#: Largest magnitude, full scale being 1: 32-bit integers kept as floats pass, and float32 can still sum their squares.
MAX_PEAK: Final = 2.0**32
#: A header that declares more is not believed when work is planned.
MAX_DECLARED_SECONDS: Final = 100.0 * 3600


@dataclass(frozen=True, eq=False)
class Audio:
    """One input as the model takes it.

    ``samples`` is mono float32 (n,) at ``rate`` Hz. ``duration`` is what was decoded, in seconds of the input's own
    time (frames / its rate). ``warnings`` says what is wrong with the input though it could be read.
    """

    samples: Samples
    rate: int
    duration: float
    warnings: tuple[str, ...] = ()


class AudioStream:
    """A recording as an iterator of mono float32 blocks at ``rate`` Hz, of ``BLOCK_SECONDS`` or a little more.

    ``duration`` (seconds) and ``warnings`` are final once the iterator is exhausted.

    Raises:
        AudioError: when opened or read, the source is not audio, damaged, or has no such channel.
    """

    def __init__(self, source: Source, rate: int, channel: int | None = None) -> None:
        self.rate = rate
        self._decoder = Decoder(source)
        self._mono = _Mono(self._decoder.blocks(), channel, self._decoder.rate)
        try:
            _check_channel(channel, self._decoder.channels)
        except (AudioError, TypeError):
            self.close()
            raise

    def __enter__(self) -> AudioStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Samples]:
        return _join(_resample(iter(self._mono), self._decoder.rate, self.rate), BLOCK_SECONDS * self.rate)

    @property
    def duration(self) -> float:
        """Seconds decoded so far, in the file's own time."""
        return self._decoder.seconds

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is missing from the file, or odd about its levels."""
        return (*self._decoder.warnings, *self._mono.warnings)

    def close(self) -> None:
        """Release the file."""
        self._decoder.close()


def open_audio(source: Source, rate: int, channel: int | None = None) -> AudioStream:
    """Open a recording of any length for reading in blocks; to be used in a ``with`` statement, iterated once.

    Args:
        source: the path of a regular file, the bytes of one, or an open binary file, which is read from where it
            stands to its end and left where it stood, if it can be sought; the format is told by the content.
        rate: the model's sample rate in Hz.
        channel: a channel number from 0; None for the mean of all.

    Raises:
        AudioError: the source cannot be opened as audio, or has no such channel. The message leaves out the path.
        TypeError: it is no source.
    """
    return AudioStream(source, rate, channel)


def read_audio(source: Source, rate: int, channel: int | None = None) -> Audio:
    """Read a whole recording: the blocks of ``open_audio``, joined.

    Raises:
        AudioError: the file cannot be read as audio, holds no samples, or does not fit into memory.
    """
    with open_audio(source, rate, channel) as stream:
        try:
            samples = concatenate(stream)
        except MemoryError:
            raise AudioError(f"after {stream.duration:.0f} s the audio fills the memory; split the file.") from None
        return Audio(samples, rate, stream.duration, stream.warnings)


def from_array(waveform: npt.ArrayLike, source_rate: float, rate: int, channel: int | None = None) -> Audio:
    """Bring an array to the form of ``read_audio``.

    Args:
        waveform: (n,) or (n, channels); floats with full scale 1, or integer PCM of up to 32 bits, scaled by its
            type's range.
        source_rate: its sample rate in Hz.
        rate: the model's sample rate in Hz.
        channel: a channel number from 0; None for the mean of all.

    Raises:
        AudioError: the array is empty, of another shape or type, holds NaN or infinity, or its rate is out of bounds.
    """
    source_rate = rate_of(source_rate, waveform)
    frames = frames_of(waveform)
    check_layout(source_rate, frames.shape[1])
    _check_channel(channel, frames.shape[1])
    mono = _Mono(_slices(frames), channel, source_rate)
    samples = concatenate(_resample(iter(mono), source_rate, rate))
    return Audio(samples, rate, len(frames) / source_rate, (*integer_levels(frames), *mono.warnings))


def declared_seconds(source: Source) -> float:
    """What a recording's header declares, in seconds: cheap, good for planning, not to be trusted.

    At most ``MAX_DECLARED_SECONDS``; a guess from the file's size where the header does not say.

    Raises:
        AudioError: the file cannot be opened as audio.
    """
    decoder = Decoder(source)
    try:
        return min(decoder.declared_seconds, MAX_DECLARED_SECONDS)
    finally:
        decoder.close()


def _check_channel(channel: int | None, channels: int) -> None:
    if channel is not None and not isinstance(channel, int | np.integer):
        raise TypeError(f"channel is None for the mean of all, or a number from 0, not {channel!r}.")
    if channel is not None and not 0 <= channel < channels:
        raise AudioError(f"there is no channel {channel}: the audio has {channels}, numbered from 0; choose another.")


def _slices(frames: Frames) -> Iterator[Frames]:
    step = max(1, BLOCK_SAMPLES // frames.shape[1])
    for start in range(0, len(frames), step):
        yield full_scale(frames[start : start + step])


class _Mono:
    """Blocks (n, channels) as checked blocks (n,); ``rate`` in Hz tells where a bad sample stands.

    Raises:
        AudioError: when iterated, a sample is NaN, infinite, or beyond ``MAX_PEAK``.
    """

    def __init__(self, blocks: Iterator[Frames], channel: int | None, rate: float) -> None:
        self._blocks, self._channel, self._rate = blocks, channel, rate
        self._peak = 0.0

    def __iter__(self) -> Iterator[Samples]:
        frames = 0
        for block in self._blocks:
            mono = _mean(block) if self._channel is None else _as_float32(block[:, self._channel])
            peak = max(mono.max(), -mono.min())
            if not peak <= MAX_PEAK:
                bad = int(np.argmax(~(np.abs(mono) <= MAX_PEAK)))
                what = "is not finite" if not np.isfinite(mono[bad]) else f"is {mono[bad]:.1e} times full scale"
                raise AudioError(
                    f"the sample at {(frames + bad) / self._rate:.2f} s {what}; repair or convert the audio."
                )
            self._peak = max(self._peak, float(peak))
            frames += len(mono)
            yield mono

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about the levels so far."""
        return float_levels(self._peak)


def _mean(block: Frames) -> Samples:
    """The mean of the channels, summed in float64, column by column: numpy is slow at reducing a short last axis."""
    if block.shape[1] == 1:
        return _as_float32(block[:, 0])
    with np.errstate(invalid="ignore"):  # infinities of both signs make no number, which is refused
        total = block[:, 0].astype(np.float64)
        for column in block.T[1:]:
            total += column
    return _as_float32(total / block.shape[1])


def _as_float32(values: Frames) -> Samples:
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 is infinite, and refused
        return np.ascontiguousarray(values, np.float32)


def _resample(blocks: Iterator[Samples], source_rate: float, rate: int) -> Iterator[Samples]:
    """Blocks (n,) from one rate to another, in Hz, as one continuous signal."""
    if source_rate == rate:
        yield from blocks
        return
    resampler = soxr.ResampleStream(source_rate, rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.empty(0, np.float32), last=True)


def _join(blocks: Iterator[Samples], length: int) -> Iterator[Samples]:
    """Join short blocks to blocks of at least ``length`` samples."""
    waiting: list[Samples] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= length:
            yield concatenate(waiting)
            waiting = []
    if any(map(len, waiting)):
        yield concatenate(waiting)


def concatenate(blocks: Iterator[Samples] | AudioStream | list[Samples]) -> Samples:
    return np.concatenate([np.empty(0, np.float32), *blocks])
