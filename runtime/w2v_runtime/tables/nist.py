"""``.rttm`` and ``.ctm``, the turns and words of NIST's evaluations; recordings are named without their suffix.

RTTM (NIST RT-09, appendix A): ``type recording channel start duration orthography subtype speaker score lookahead``.
CTM (sclite): ``recording channel start duration word [score]``. Channels count from 1, or from A.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from w2v_models.errors import RefusedError
from w2v_runtime.tables.rows import Row, Value, seconds
from w2v_runtime.tables.text import lines

_COMMENTS: Final = (";;", "#")
_NONE: Final = "<NA>"
#: The one object of RTTM that says how to score and is no segment.
_NO_SEGMENTS: Final = ("SPKR-INFO", "NOSCORE", "NO_RT_METADATA")


def read_rttm(path: str) -> Iterator[Row]:
    """The turns of an RTTM, with ``speaker``, and ``type`` and ``orthography`` where they say something.

    Raises:
        RefusedError: a line has fewer than 8 fields, or a time is none.
    """
    for number, line in lines(path, _COMMENTS):
        fields = line.split()
        if not 8 <= len(fields) <= 10:
            raise RefusedError(f"line {number} has {len(fields)} fields; a line of an RTTM has 9 or 10.")
        kind, recording, channel, start, duration, words, _, speaker = fields[:8]
        if kind in _NO_SEGMENTS:
            continue
        told: dict[str, Value] = {"speaker": None if speaker == _NONE else speaker, "type": kind}
        if words != _NONE:
            told["orthography"] = words
        yield _row(number, recording, channel, start, duration, told)


def read_ctm(path: str) -> Iterator[Row]:
    """The words of a CTM, with ``word`` and, where there is one, ``score``.

    Raises:
        RefusedError: a line has not 5 fields or more, or a time is none.
    """
    for number, line in lines(path, _COMMENTS):
        fields = line.split()
        if len(fields) < 5:
            raise RefusedError(f"line {number} has {len(fields)} fields; a line of a CTM has 5 or 6.")
        if fields[4] in ("<ALT_BEGIN>", "<ALT>", "<ALT_END>"):
            continue
        told: dict[str, Value] = {"word": fields[4]}
        if len(fields) > 5 and fields[5] != _NONE:
            told["score"] = fields[5]
        recording, channel, start, duration = fields[:4]
        yield _row(number, recording, channel, start, duration, told)


def _row(number: int, recording: str, channel: str, start: str, duration: str, told: dict[str, Value]) -> Row:
    try:
        begin, length = seconds(start, "start"), seconds(duration, "duration")
    except RefusedError as error:
        raise RefusedError(f"line {number}: {error}.") from None
    if begin is None or length is None:
        raise RefusedError(f"line {number} lacks its start or its duration.")
    return Row(number, recording, begin, round(begin + length, 9), _channel(channel), told)


def _channel(text: str) -> int | None:
    """The channel from 0: NIST's count from 1, or from A; None where it is another name."""
    if re.fullmatch(r"[1-9]\d{0,3}", text):
        return int(text) - 1
    return ord(text.upper()) - ord("A") if re.fullmatch(r"[A-Ha-h]", text) else None
