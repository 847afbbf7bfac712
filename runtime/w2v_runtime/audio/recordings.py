"""Check what callers in Python pass as a recording: a path, bytes, an open file, or (waveform, sample_rate)."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, Final

import numpy.typing as npt

from w2v_runtime.audio.source import Source

#: One input to embed: a source, or a waveform (samples,) or (samples, channels) with its sample rate in Hz.
Recording = Source | tuple[npt.ArrayLike, int]

_PAIR: Final = "(waveform, sample_rate)"
_OPEN: Final = "open(path, 'rb')"
#: Names of numeric dtypes of numpy, PyTorch and other libraries.
_NUMBERS: Final = re.compile(r"(torch\.)?(bool|u?int|b?float|complex)")


def check_recording(given: object, call: str = "embed({})") -> Recording:
    """Return ``given`` if its type is that of a recording.

    Args:
        given: any object.
        call: the call that takes one recording, for the message; ``{}`` stands for the recording.

    Raises:
        TypeError: ``given`` is no recording; the message holds the right call.
    """
    if isinstance(given, str | os.PathLike | bytes | bytearray | memoryview):
        return given
    if isinstance(given, tuple) and len(given) == 2:
        return _check_pair(given, call)
    if isinstance(given, io.TextIOBase):
        raise TypeError(f"a file in text mode cannot be read as audio: {call.format(_OPEN)}.")
    if callable(getattr(given, "read", None)):
        file: Any = given
        return file  # type: ignore[no-any-return]
    if isinstance(given, Mapping):
        raise TypeError(_instead_of_mapping(given, call))
    if _is_array(given) or isinstance(given, list | tuple):
        raise TypeError(f"a waveform needs its sample rate: {call.format(_PAIR)}.")
    raise TypeError(
        f"a recording is a path, bytes, an open binary file, or {_PAIR}, not {_kind(given)}: {call.format('path')}."
    )


def check_recordings(given: object, call: str = "embed_files") -> Iterable[Recording]:
    """Return ``given`` if it is an iterable of recordings.

    The items of a list or tuple are checked at once, those of another iterable when it is iterated.

    Raises:
        TypeError: ``given`` is a single recording, or something else; the message holds the right call.
    """
    if isinstance(given, str | os.PathLike):
        raise TypeError(f"{call} takes many recordings: embed({given!r}) or {call}([{given!r}]).")
    if isinstance(given, Mapping):
        raise TypeError(_instead_of_mapping(given, "embed({})"))
    pair = isinstance(given, tuple) and len(given) == 2 and any(map(_is_number, given))
    if pair or _is_array(given):
        raise TypeError(f"{call} takes many recordings: embed({_PAIR}) or {call}([{_PAIR}, …]).")
    if isinstance(given, bytes | bytearray | memoryview | io.IOBase) or callable(getattr(given, "read", None)):
        raise TypeError(f"{call} takes many recordings: embed(recording) or {call}([recording, …]).")
    if not isinstance(given, Iterable):
        raise TypeError(f"{call} takes an iterable of recordings, not {_kind(given)}: {call}([path, …]).")
    return list(_checked(given, call)) if isinstance(given, list | tuple) else _checked(given, call)


def _checked(recordings: Iterable[object], call: str) -> Iterator[Recording]:
    for position, given in enumerate(recordings):
        try:
            yield check_recording(given, call + "([{}, …])")
        except TypeError as error:
            raise TypeError(f"paths[{position}]: {error}") from None


def name_of(recording: Recording) -> str:
    """The path of a recording, also of an open file that has a name; else an empty string."""
    if isinstance(recording, str | os.PathLike):
        return str(os.fsdecode(recording))
    name = getattr(recording, "name", "")
    return name if isinstance(name, str) else ""


def can_be_read_again(source: Source) -> bool:
    """Whether a source can be opened twice, which is true of all but unseekable streams such as pipes."""
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        return True
    try:
        return source.seekable()
    except Exception:  # any kind of file object; reading it reports the error
        return False


def _check_pair(pair: tuple[Any, Any], call: str) -> tuple[npt.ArrayLike, int]:
    waveform, rate = pair
    if _is_number(rate):
        return waveform, rate
    if _is_number(waveform):
        raise TypeError(f"(sample_rate, waveform) is the wrong way round: {call.format(_PAIR)}.")
    raise TypeError(f"the sample rate is a number of Hz, not {_kind(rate)}: {call.format(_PAIR)}.")


def _instead_of_mapping(given: Mapping[Any, Any], call: str) -> str:
    """The error message, with the right call, for a mapping such as the audio column of a Hugging Face dataset."""
    if {"array", "sampling_rate"} <= given.keys():
        right = "(audio['array'], audio['sampling_rate'])"
    elif given.get("bytes") is not None:
        right = "audio['bytes']"
    elif given.get("path") is not None:
        right = "audio['path']"
    else:
        right = _PAIR
    return f"a recording is not {_kind(given)}: {call.format(right)}."


def _is_number(given: object) -> bool:
    return isinstance(given, Real) and not isinstance(given, bool)


def _is_array(given: object) -> bool:
    """Whether ``given`` is an array or tensor of numbers, of numpy or any other library."""
    return hasattr(given, "shape") and bool(_NUMBERS.match(str(getattr(given, "dtype", ""))))


def _kind(given: object) -> str:
    return "None" if given is None else type(given).__name__
