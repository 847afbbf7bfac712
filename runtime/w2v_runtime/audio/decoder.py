"""An audio file to blocks of float32 frames, believing none of what its header promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from w2v_models.errors import AudioError
from w2v_runtime.audio import formats, streams
from w2v_runtime.audio.formats import CONVERT
from w2v_runtime.audio.libsndfile import Sound, SoundError
from w2v_runtime.audio.source import Source, open_content
from w2v_runtime.audio.streams import Stream

#: Sample rates in Hz outside of this range are a damaged header, not a recording.
MIN_RATE: Final = 1_000
MAX_RATE: Final = 1_000_000
#: What libsndfile opens.
MAX_CHANNELS: Final = 1024

#: An MP3 or Ogg header may be this far off, in seconds or as a part of the whole, before the file counts as cut.
_LOSSY_SECONDS: Final = 0.1
_LOSSY_PART: Final = 0.01
#: A frame takes a bit at least, but in formats that pack silence closer; blocks may be filled up behind the end. The
#: GSM of a W64 whose size has its highest bit set goes on for ever.
_FRAMES_PER_BYTE: Final = 16
_FILLED_BYTES: Final = 65_536
_PACKED: Final = frozenset(("FLAC", "OGG", "MP3"))


class Decoder:
    """One source, decoded once from front to back; streams joined in one MP3, Ogg or FLAC file follow one another.

    ``rate`` (Hz) and ``channels`` hold for all of it; ``size`` is in bytes; ``frames`` counts what was decoded so far.
    Once ``blocks`` is exhausted, ``warnings`` says what is missing.

    Raises:
        AudioError: the source cannot be read, or holds nothing that can be decoded.
        TypeError: it is no source.
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
        """What was decoded so far, in seconds."""
        return self.frames / self.rate

    @property
    def declared_seconds(self) -> float:
        """What the header declares, untrusted, in seconds; where it declares nothing, a guess from the size."""
        return self._sound.estimated / self.rate

    def blocks(self) -> Iterator[npt.NDArray[np.float32]]:
        """Yield blocks (frames, channels) of bounded size; full scale is 1.

        Raises:
            AudioError: the file is damaged, holds no samples, changes its rate or channel count, or was written to
                since it was opened.
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
        """Warn of, or refuse, a stream of ``decoded`` frames whose header declares more."""
        sound, seconds = self._sound, decoded / self.rate
        if self._data is not None and self._data.cut and decoded:
            # Bytes stand for time, since encodings other than PCM have no fixed size of a frame.
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
        lossy = sound.container in ("MP3", "OGG")
        if lossy and decoded and declared - seconds > max(_LOSSY_SECONDS, _LOSSY_PART * declared):
            self._warn_cut(declared, seconds)

    def _open_next(self) -> bool:
        """Go on to the stream behind the one that ended, if there is one."""
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
        """The stream behind the one that was decoded."""
        ended = self._sound
        match ended.container:
            case "MP3":
                stop = streams.before_tags(self._content, ended.stream).stop
                return streams.next_mp3(self._content, ended.position, stop)
            case "FLAC":
                return streams.next_flac(self._content, ended.stream, ended.position, self._is_whole)
            case _:
                return next(self._streams, None)

    def _is_whole(self, stream: Stream) -> bool:
        """Whether a part of the stream that was decoded holds all of its samples."""
        declared, frames = self._sound.declared, 0
        try:
            part = Sound(self._content, stream, self._kind)
            while block := len(part.read()):
                frames += block
        except SoundError:
            return False
        part.close()
        return frames == declared

    def _open_first(self) -> Sound:
        if self.size == 0:
            raise AudioError("no samples: the file is empty.")
        stream = next(self._streams)
        if stream.start == self.size:
            raise AudioError("no samples: there is a tag and nothing behind it.")
        try:
            return Sound(self._content, stream, self._kind)
        except SoundError as fault:
            if self._kind is not None and self._kind.help:
                what, help_ = f": this looks like {self._kind.name}", self._kind.help
            else:
                what, help_ = f" or a damaged header ({fault})", CONVERT
            raise AudioError(f"unsupported format{what}; {help_}") from None

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
        if self._sound.container not in _PACKED and self.frames > _FRAMES_PER_BYTE * (self.size + _FILLED_BYTES):
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
        AudioError: one is out of bounds.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(
            f"the sample rate {rate} Hz is not between {MIN_RATE} and {MAX_RATE} Hz; correct the header, or the rate."
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{channels} channels are not between 1 and {MAX_CHANNELS}; the shape is (frames, channels).")
