"""Kaldi's ``segments``: ``utterance recording start end [channel]``, with ``wav.scp`` beside it.

Format: https://kaldi-asr.org/doc/data_prep.html. An end of -1 is the end of the recording. ``wav.scp`` gives each
recording's file; a line of it that is a command (it ends in ``|``) is never run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from w2v_models.errors import RefusedError
from w2v_runtime.tables.rows import Row, seconds
from w2v_runtime.tables.text import lines

SCP: Final = "wav.scp"


def read(path: str) -> Iterator[Row]:
    """The rows of ``segments``; ``file`` is the path in ``wav.scp``, or the recording's name where there is none.

    Raises:
        RefusedError: a line does not have 4 or 5 fields, a time is none, a recording is not in ``wav.scp`` or is a
            command there.
    """
    scp = scp_beside(path)
    files = None if scp is None else _read_scp(scp)
    for number, line in lines(path):
        fields = line.split()
        if len(fields) not in (4, 5):
            raise RefusedError(f"line {number} has {len(fields)} fields; Kaldi's segments are: {_FIELDS}.")
        utterance, recording, start, end = fields[:4]
        try:
            begin, stop = seconds(start, "start"), seconds(end, "end")
        except RefusedError as error:
            raise RefusedError(f"line {number}: {error}.") from None
        if begin is None:
            raise RefusedError(f"line {number} has no start; Kaldi's segments are: {_FIELDS}.")
        channel = None
        if len(fields) == 5:
            if not (fields[4].isascii() and fields[4].isdecimal()):
                raise RefusedError(f"line {number}: channel {fields[4]!r:.40} is no number from 0.")
            channel = int(fields[4])
        file = recording if files is None else files.get(recording)
        if file is None:
            raise RefusedError(f"line {number}: the recording {recording!r:.80} is not in {scp}; add it there.")
        yield Row(number, file, begin, None if stop == -1 else stop, channel, {"utterance": utterance})


_FIELDS: Final = "utterance recording start end [channel]"


def scp_beside(path: str) -> str | None:
    """The ``wav.scp`` beside a table; None if there is none."""
    scp = os.path.join(os.path.dirname(path), SCP)
    return scp if os.path.isfile(scp) else None


def _read_scp(scp: str) -> dict[str, str]:
    files: dict[str, str] = {}
    for number, line in lines(scp):
        recording, _, file = line.partition(" ") if " " in line else line.partition("\t")
        file = file.strip()
        if not file:
            raise RefusedError(f"line {number} of {scp} names no file.")
        if file.endswith("|") or file.startswith("|"):
            raise RefusedError(
                f"line {number} of {scp} is a command, which is never run: {file!r:.80}. Write what it gives "
                "to a file, and name that file."
            )
        if recording in files:
            raise RefusedError(f"line {number} of {scp} names the recording {recording!r:.80} a second time.")
        files[recording] = file
    return files
