"""Check an array that holds a waveform: its dtype, shape, full scale and levels."""

from __future__ import annotations

import numbers
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from w2v_models.errors import AudioError
from w2v_runtime.audio.libsndfile import BLOCK_SAMPLES

Frames = npt.NDArray[Any]

#: Float samples beyond this (full scale is 1) are unscaled integers: no recording is overdriven by 24 dB.
_MAX_FLOAT_PEAK: Final = 16.0
#: The largest magnitude of a 24-bit and of a 16-bit sample.
_PEAK_24: Final = 1 << 23
_PEAK_16: Final = 1 << 15
#: Unscaled 16-bit samples that all stay below this are inaudible, so that a warning about them is of no use.
_SILENCE_PEAK: Final = 64
#: The low bits of an int32, which are zero in samples of 24 bits or fewer that were scaled to 32.
_LOW_BITS: Final = 0xFF


def frames_of(waveform: object) -> Frames:
    """The waveform as an array (samples, channels) of floats, or of integers whose full scale is known.

    Raises:
        AudioError: the waveform is empty, of another shape or dtype, or no array.
    """
    try:
        array: Frames = np.asarray(waveform)
    except Exception as error:  # the waveform may be of any library
        raise AudioError(_why_no_array(waveform, error)) from None
    if array.dtype.kind in "iu" and array.dtype.itemsize > 4:
        raise AudioError(
            f"the waveform holds {array.dtype}, as a list of whole numbers does, and its full scale is not known; "
            "give floats with full scale 1, or an int16 or int32 array."
        )
    if array.dtype.kind not in "fiu":
        raise AudioError(
            f"the waveform holds {array.dtype}; give floats with full scale 1, or an int16 or int32 array."
        )
    if array.ndim not in (1, 2):
        raise AudioError(f"the waveform has {array.ndim} dimensions; its shape is (samples,) or (samples, channels).")
    if not array.size:
        raise AudioError("no samples: the waveform is empty.")
    return array.reshape(len(array), -1)


def _why_no_array(waveform: object, error: Exception) -> str:
    if isinstance(waveform, list | tuple) and isinstance(error, ValueError):
        return "the waveform is not an array; its rows differ in length."
    said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"the waveform is not an array ({said}); of a PyTorch tensor give .detach().cpu().float().numpy()."


def rate_of(rate: object, waveform: object) -> float:
    """The sample rate of a waveform as a number, in Hz.

    Raises:
        AudioError: the rate is not a number, or has changed places with the waveform.
    """
    if isinstance(waveform, numbers.Real) and hasattr(rate, "__len__"):
        raise AudioError("the waveform and its sample rate have changed places; give (waveform, sample_rate).")
    if isinstance(rate, bool) or not (isinstance(rate, numbers.Real) or getattr(rate, "ndim", None) == 0):
        raise AudioError(f"the sample rate is a number in Hz, not {type(rate).__name__}; give (waveform, sample_rate).")
    number = float(rate)  # type: ignore[arg-type]
    return int(number) if number.is_integer() else number


def full_scale(frames: Frames) -> Frames:
    """Scale samples to full scale 1: integers by the range of their dtype; floats stay as they are."""
    if frames.dtype.kind == "f":
        return frames
    half = 2.0 ** (8 * frames.dtype.itemsize - 1)
    scaled = frames.astype(np.float64) / half
    return scaled - 1.0 if frames.dtype.kind == "u" else scaled


def float_levels(peak: float) -> tuple[str, ...]:
    """A warning if float samples with this largest magnitude (full scale is 1) must be unscaled integers."""
    if peak <= _MAX_FLOAT_PEAK:
        return ()
    return (f"levels: samples reach {peak:.6g} times full scale; if they are 16-bit integers, divide them by 32768",)


def integer_levels(frames: Frames) -> tuple[str, ...]:
    """A warning if 32-bit integers look like samples of 16 or 24 bits that were not scaled to 32.

    A quiet recording of 24 bits or fewer, scaled to int32 as soundfile does, has zeros in the low bits. A recording
    that uses the low bits was mixed or recorded in floats, and is seldom below -48 dB of full scale throughout.
    """
    if frames.dtype.kind not in "iu" or frames.dtype.itemsize != 4:
        return ()
    peak, bits = 0, 0
    step = max(1, BLOCK_SAMPLES // frames.shape[1])
    for start in range(0, len(frames), step):
        block = frames[start : start + step]
        peak = max(peak, int(block.max()), -int(block.min()))
        if peak > _PEAK_24:
            return ()
        bits |= int(np.bitwise_or.reduce(block, axis=None)) & _LOW_BITS
    if peak < _SILENCE_PEAK or not bits:
        return ()
    small = 16 if peak <= _PEAK_16 else 24
    shift = "give them as int16" if small == 16 else "shift them left by 8 bits"
    return (f"levels: {frames.dtype} samples reach {peak} of {1 << 31}; if they are {small}-bit integers, {shift}",)
