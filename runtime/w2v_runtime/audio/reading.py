"""Read a path, bytes, an open file or an array as mono float32 samples at the model's sample rate.

Channels are averaged, or one is picked, before soxr resamples (quality HQ, equal to ``soxr.resample`` of the whole).
Files are decoded in small blocks, so that memory depends on the decoded samples and not on what a header declares.
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

#: The least length of a block of an ``AudioStream`` in seconds; only the last block may be shorter.
BLOCK_SECONDS: Final = 30
#: Largest magnitude of a sample (full scale is 1): unscaled 32-bit integers pass, and their squares fit float32 sums.
MAX_PEAK: Final = 2.0**32
#: Upper limit on the seconds that a header declares, when work is planned by them.
MAX_DECLARED_SECONDS: Final = 100.0 * 3600


@dataclass(frozen=True, eq=False)
class Audio:
    """One input as the model takes it.

    ``samples`` is mono float32 (n,) at ``rate`` Hz. ``duration`` is the decoded length in seconds, before resampling
    (input frames / input sample rate). ``warnings`` says what is wrong with the input although it could be read.
    """

    samples: Samples
    rate: int
    duration: float
    warnings: tuple[str, ...] = ()


class AudioStream:
    """A recording as an iterator of mono float32 blocks at ``rate`` Hz, of ``BLOCK_SECONDS`` or a little more.

    ``duration`` (seconds) and ``warnings`` are final once the iterator is exhausted.

    Raises:
        AudioError: on opening or iterating, the source is not audio, is damaged, or has no such channel.
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
        """Seconds decoded so far, before resampling."""
        return self._decoder.seconds

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of a truncated file or of implausible levels."""
        return (*self._decoder.warnings, *self._mono.warnings)

    def close(self) -> None:
        """Release the file."""
        self._decoder.close()


def open_audio(source: Source, rate: int, channel: int | None = None) -> AudioStream:
    """Open a recording of any length to read it in blocks; use it in a ``with`` statement and iterate once.

    Args:
        source: the path of a regular file, the bytes of one, or an open binary file, which is read from its position
            to its end and then set back, if it is seekable; the format is recognised by the content.
        rate: the model's sample rate in Hz.
        channel: a channel number from 0; None for the mean of all.

    Raises:
        AudioError: the source cannot be opened as audio, or has no such channel. The message leaves out the path.
        TypeError: ``source`` is not a path, bytes or an open binary file.
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
    """Convert an array to :class:`Audio`, as ``read_audio`` returns it.

    Args:
        waveform: (n,) or (n, channels); floats with full scale 1, or integer PCM of up to 32 bits, scaled by its
            type's range.
        source_rate: the array's sample rate in Hz.
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
    """The duration in seconds that a recording's header declares: for planning only, since a header may be wrong.

    At most ``MAX_DECLARED_SECONDS``; if the header has no frame count, a guess from the file's size.

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
    """Mixes blocks (n, channels) down to blocks (n,) and checks them; ``rate`` in Hz gives the time of a bad sample.

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
        """Warnings of implausible levels so far."""
        return float_levels(self._peak)


def _mean(block: Frames) -> Samples:
    """The mean of the channels, summed in float64, column by column: numpy is slow at reducing a short last axis."""
    if block.shape[1] == 1:
        return _as_float32(block[:, 0])
    with np.errstate(invalid="ignore"):  # +inf and -inf sum to NaN, which is refused later
        total = block[:, 0].astype(np.float64)
        for column in block.T[1:]:
            total += column
    return _as_float32(total / block.shape[1])


def _as_float32(values: Frames) -> Samples:
    with np.errstate(over="ignore", invalid="ignore"):  # a value beyond float32 becomes infinite, and is refused later
        return np.ascontiguousarray(values, np.float32)


def _resample(blocks: Iterator[Samples], source_rate: float, rate: int) -> Iterator[Samples]:
    """Resample blocks (n,) from ``source_rate`` to ``rate``, both in Hz, as one continuous signal."""
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
