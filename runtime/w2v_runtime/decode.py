"""An audio file to blocks of float32 frames, believing none of what its header promises."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from w2v_models.errors import AudioError
from w2v_runtime import headers
from w2v_runtime.sound import Sound, SoundError, open_regular
from w2v_runtime.source import Source, descriptor_of

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
_CONVERT: Final = "convert it with: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav"


class Decoder:
    """One file, decoded once from front to back; streams joined in one MP3, Ogg or FLAC file follow one another.

    ``rate`` (Hz) and ``channels`` hold for all of it; ``size`` is in bytes; ``frames`` counts what was decoded so far.
    Once ``blocks`` is exhausted, ``warnings`` says what is missing.

    Raises:
        AudioError: the path is not a readable regular file, or holds nothing that can be decoded.
    """

    def __init__(self, source: Source) -> None:
        self.frames = 0
        self.warnings: tuple[str, ...] = ()
        self._descriptor = open_regular(source) if isinstance(source, str | os.PathLike) else descriptor_of(source)
        try:
            status = os.fstat(self._descriptor)
            self.size, self._modified_ns = status.st_size, status.st_mtime_ns
            self._sound = self._open_first()
            self.rate, self.channels = self._sound.rate, self._sound.channels
            self._data = headers.data_chunk(self._descriptor, self.size)
            self._check_header()
        except BaseException:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """Release the file; further calls do nothing."""
        if self._descriptor >= 0:
            self._sound.close()
            os.close(self._descriptor)
            self._descriptor = -1

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
        self._check_unchanged()
        if self.frames == 0:
            raise AudioError(self._no_samples())
        if self._sound.container == "OGG" and not self.warnings:
            self._check_ogg_end()

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
        ended = self._sound
        for start in headers.stream_starts(self._descriptor, ended.container, ended.start, ended.position):
            try:
                following = Sound(self._descriptor, start)
            except SoundError:
                continue
            ended.close()
            self._sound = following
            if (following.rate, following.channels) != (self.rate, self.channels):
                raise AudioError(
                    f"after {self.seconds:.2f} s the stream changes from {self.rate} Hz, {self.channels} channel(s), "
                    f"to {following.rate} Hz, {following.channels} channel(s); split the file there."
                )
            return True
        return False

    def _open_first(self) -> Sound:
        if self.size == 0:
            raise AudioError("no samples: the file is empty.")
        try:
            return Sound(self._descriptor)
        except SoundError as fault:
            foreign = headers.foreign_format(os.pread(self._descriptor, 512, 0))
            what = f": this looks like {foreign}" if foreign else f" or a damaged header ({fault})"
            raise AudioError(f"unsupported format{what}; {headers.NOT_AUDIO.get(foreign or '', _CONVERT)}") from None

    def _check_header(self) -> None:
        check_layout(self.rate, self.channels)
        if self._data is not None and self._data.overflown:
            raise AudioError(
                f"the header's data size says {self._data.declared} bytes, but {self._data.available} follow; "
                "write it as RF64: ffmpeg -i IN -rf64 auto OUT.wav"
            )

    def _check_end(self) -> None:
        if self._sound.container not in _PACKED and self.frames > _FRAMES_PER_BYTE * (self.size + _FILLED_BYTES):
            raise AudioError(
                f"damaged: the header declares more than {self.size} bytes can hold, and the decoder goes on behind "
                f"the end of the file; {_CONVERT}"
            )

    def _check_unchanged(self) -> None:
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified_ns):
            raise AudioError(
                f"written to while it was read: it had {self.size} bytes and has {status.st_size} now; "
                "embed it again once it is complete."
            )

    def _check_ogg_end(self) -> None:
        if not headers.ogg_is_complete(self._descriptor, self.size):
            self._warn(f"truncated: the end of the Ogg stream is missing, {self.seconds:.2f} s could be decoded")

    def _no_samples(self) -> str:
        if self._data is not None and self._data.declared == 0 and self._data.available:
            return f"no samples: the header's data size is 0, though {self._data.available} bytes follow; {_CONVERT}"
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
        raise AudioError(f"the sample rate {rate} Hz is not between {MIN_RATE} and {MAX_RATE} Hz; correct the header.")
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{channels} channels are not between 1 and {MAX_CHANNELS}; the shape is (frames, channels).")
