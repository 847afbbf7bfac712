"""Decode an audio file to blocks of float32 frames, without trust in its header.

Here a truncated or damaged file becomes a warning or an :class:`AudioError`, by comparing the header's declared length
with the frames that were decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from w2v_models.errors import AudioError
from w2v_runtime.audio import ffmpeg, formats, streams
from w2v_runtime.audio.ffmpeg import FFmpegSound
from w2v_runtime.audio.formats import CONVERT
from w2v_runtime.audio.libsndfile import Sound, SoundError
from w2v_runtime.audio.source import Source, open_content
from w2v_runtime.audio.streams import Stream

#: A sample rate in Hz outside this range means a damaged header.
MIN_RATE: Final = 1_000
MAX_RATE: Final = 1_000_000
#: The largest channel count that libsndfile opens.
MAX_CHANNELS: Final = 1024

#: The declared length of an MP3 or Ogg file may exceed the decoded one by this much, in seconds or as a fraction of the
#: declared length, before the file counts as truncated.
_LOSSY_SECONDS: Final = 0.1
_LOSSY_FRACTION: Final = 0.01
#: Limits on the frames that a file can hold, in case the decoder runs on after the end of the file: it does so without
#: end for GSM in a W64 whose size has the highest bit set. A frame takes at least one bit, except in the compressed
#: formats, which store silence in less; a decoder may pad the last block.
_FRAMES_PER_BYTE: Final = 16
_PADDED_BYTES: Final = 65_536
_COMPRESSED: Final = frozenset(("FLAC", "OGG", "MP3", ffmpeg.CONTAINER))


class Decoder:
    """Decodes one source once, from start to end, with all streams that are joined in an MP3, Ogg or FLAC file.

    ``rate`` (Hz) and ``channels`` are the same for all streams; ``size`` is the file's size in bytes; ``frames`` counts
    the frames decoded so far. Once ``blocks`` is exhausted, ``warnings`` says whether the file is truncated.

    Raises:
        AudioError: the source cannot be read, or holds nothing that can be decoded.
        TypeError: the source is not a path, bytes or an open binary file.
    """

    def __init__(self, source: Source) -> None:
        self.frames = 0
        self.warnings: tuple[str, ...] = ()
        self._content = open_content(source)
        try:
            self.size = self._content.size
            self._kind, self._data, self._streams = streams.first_streams(self._content)
            self._sound = self._open_first()
            self.rate, self.channels = self._sound.rate, self._sound.channels
            self._check_header()
        except BaseException:
            self._content.close()
            raise

    def close(self) -> None:
        """Release the file; further calls do nothing."""
        if self._content.descriptor >= 0:
            self._sound.close()
            self._content.close()

    @property
    def seconds(self) -> float:
        """Seconds decoded so far."""
        return self.frames / self.rate

    @property
    def declared_seconds(self) -> float:
        """The duration in seconds that the header declares, untrusted; without one, a guess from the file's size."""
        return self._sound.estimated / self.rate

    def blocks(self) -> Iterator[npt.NDArray[np.float32]]:
        """Yield float32 blocks (frames, channels) of bounded size; full scale is 1.

        Raises:
            AudioError: the file is damaged, holds no samples, changes its sample rate or channel count between
                streams, or was written to since it was opened.
        """
        yield from self._stream()
        while self._open_next():
            yield from self._stream()
        self._content.check_unchanged()
        if self.frames == 0:
            raise AudioError(self._no_samples())

    def _stream(self) -> Iterator[npt.NDArray[np.float32]]:
        before = self.frames
        while len(block := self._read()):
            self.frames += len(block)
            self._check_end()
            yield block
        self._check_length(self.frames - before)

    def _read(self) -> npt.NDArray[np.float32]:
        try:
            return self._sound.read()
        except SoundError as fault:
            seconds = max(self.seconds, self._sound.frames_decoded / self.rate)
            decoded = f"only {seconds:.2f} s could be decoded" if seconds else "no samples could be decoded"
            raise AudioError(f"damaged: {decoded} ({fault}); restore the file from its source.") from None

    def _check_length(self, decoded: int) -> None:
        """Compare the ``decoded`` frames of a stream with its header: warn if it is truncated.

        Raises:
            AudioError: a FLAC stream, whose header is exact, has fewer frames than it declares.
        """
        sound, seconds = self._sound, decoded / self.rate
        if self._data is not None and self._data.cut and decoded:
            # The declared time follows from the ratio of bytes: encodings other than PCM have no fixed frame size.
            self._warn_cut(seconds * self._data.declared / max(1, self._data.available), seconds)
        if sound.cut:
            self._warn(f"truncated: the last MP3 frame is cut, {seconds:.2f} s could be decoded")
        if not sound.stream.complete and decoded:
            self._warn(f"truncated: the end of the Ogg stream is missing, {seconds:.2f} s could be decoded")
            return
        if sound.declared is None or decoded >= sound.declared:
            return
        declared = sound.declared / self.rate
        if sound.container == "FLAC":
            what = f"damaged: the header declares {declared:.2f} s, only {seconds:.2f} s could be decoded"
            raise AudioError(f"{what}; restore the file from its source.")
        lossy = sound.container in ("MP3", "OGG", ffmpeg.CONTAINER)
        if lossy and decoded and declared - seconds > max(_LOSSY_SECONDS, _LOSSY_FRACTION * declared):
            self._warn_cut(declared, seconds)

    def _open_next(self) -> bool:
        """Open the next stream of the file in place of the one that ended; return whether there is one.

        Raises:
            AudioError: the stream cannot be opened, or has another sample rate or channel count.
        """
        ended, following = self._sound, self._following()
        if following is None:
            return False
        try:
            self._sound = Sound(self._content, following, self._kind)
        except SoundError as fault:
            raise AudioError(
                f"damaged: behind the first {self.seconds:.2f} s a further stream cannot be opened ({fault}); "
                "restore the file from its source."
            ) from None
        ended.close()
        sound = self._sound
        if (sound.rate, sound.channels) != (self.rate, self.channels):
            raise AudioError(
                f"after {self.seconds:.2f} s the stream changes from {self.rate} Hz, {self.channels} channel(s), "
                f"to {sound.rate} Hz, {sound.channels} channel(s); split the file there."
            )
        return True

    def _following(self) -> Stream | None:
        """The stream that follows the decoded one in the file, or None."""
        ended = self._sound
        match ended.container:
            case "MP3":
                stop = streams.before_tags(self._content, ended.stream).stop
                return streams.next_mp3(self._content, ended.position, stop)
            case "FLAC":
                return streams.next_flac(self._content, ended.stream, ended.position, self._has_all_frames)
            case ffmpeg.CONTAINER:
                return None
            case _:
                return next(self._streams, None)

    def _has_all_frames(self, stream: Stream) -> bool:
        """Whether this part of the decoded stream holds as many frames as its header declares."""
        declared, frames = self._sound.declared, 0
        try:
            part = Sound(self._content, stream, self._kind)
            while block := len(part.read()):
                frames += block
        except SoundError:
            return False
        part.close()
        return frames == declared

    def _open_first(self) -> Sound | FFmpegSound:
        if self.size == 0:
            raise AudioError("no samples: the file is empty.")
        stream = next(self._streams)
        if stream.start == self.size:
            raise AudioError("no samples: there is a tag and nothing behind it.")
        try:
            return Sound(self._content, stream, self._kind)
        except SoundError as fault:
            kind = self._kind
            if kind is None or (kind.recording and kind.help):
                return self._open_with_ffmpeg(stream, fault)
            if kind.help:
                raise AudioError(f"unsupported format: this looks like {kind.name}; {kind.help}") from None
            raise AudioError(f"unsupported format or a damaged header ({fault}); {CONVERT}") from None

    def _open_with_ffmpeg(self, stream: Stream, fault: SoundError) -> FFmpegSound:
        """Open what is of no format that libsndfile decodes.

        Raises:
            AudioError: FFmpeg is not installed, or refuses it, too.
        """
        kind = self._kind
        looks = "unsupported format" if kind is None else f"unsupported format: this looks like {kind.name}"
        if not ffmpeg.installed():
            if kind is None:
                raise AudioError(f"{looks} or a damaged header ({fault}); {CONVERT}")
            raise AudioError(f"{looks}; {kind.help if kind.help != CONVERT else f'{ffmpeg.READ}, or {CONVERT}'}")
        try:
            return FFmpegSound(self._content, stream)
        except SoundError as second:
            if kind is None:
                raise AudioError(f"{looks} or a damaged header ({fault}; {second}); {CONVERT}") from None
            help_ = "restore the file from its source." if kind.help == CONVERT else kind.help
            raise AudioError(f"{looks}, which cannot be decoded ({second}); {help_}") from None

    def _check_header(self) -> None:
        check_layout(self.rate, self.channels)
        if self._data is not None and self._data.overflown:
            raise AudioError(
                f"the header's data size says {self._data.declared} bytes, but {self._data.available} follow; "
                "write it as RF64: ffmpeg -i IN -rf64 auto OUT.wav"
            )

        if self._data is not None and self._data.cut and self._kind is formats.SDS:
            # libsndfile repeats the last packet for those that are missing.
            raise AudioError(
                f"truncated: the header declares {self._data.declared} bytes of samples, {self._data.available} "
                "follow; restore the file from its source."
            )

    def _check_end(self) -> None:
        if self._sound.container not in _COMPRESSED and self.frames > _FRAMES_PER_BYTE * (self.size + _PADDED_BYTES):
            raise AudioError(
                f"damaged: the header declares more than {self.size} bytes can hold, and the decoder goes on behind "
                f"the end of the file; {CONVERT}"
            )

    def _no_samples(self) -> str:
        if self._data is not None and self._data.declared == 0 and self._data.available:
            return f"no samples: the header's data size is 0, though {self._data.available} bytes follow; {CONVERT}"
        return "no samples: there is a header and no audio behind it."

    def _warn_cut(self, declared: float, decoded: float) -> None:
        self._warn(f"truncated: the header declares {declared:.2f} s, {decoded:.2f} s could be decoded")

    def _warn(self, text: str) -> None:
        self.warnings = (*self.warnings, text)


def check_layout(rate: float, channels: int) -> None:
    """Refuse impossible sample rates (Hz) and channel counts.

    Raises:
        AudioError: the rate or the channel count is out of bounds.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(
            f"the sample rate {rate} Hz is not between {MIN_RATE} and {MAX_RATE} Hz; correct the header, or the rate."
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{channels} channels are not between 1 and {MAX_CHANNELS}; the shape is (frames, channels).")
