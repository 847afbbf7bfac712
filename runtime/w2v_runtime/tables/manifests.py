"""``.jsonl`` and ``.jsonl.gz``: Lhotse's cuts, and NeMo's manifests.

Lhotse (``lhotse.cut``): ``start``, ``duration`` and ``channel`` (from 0) of a cut, ``recording.sources[0].source``.
NeMo: ``audio_filepath``, ``offset``, ``duration``. Nothing that a manifest names is run or fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from w2v_models.errors import RefusedError
from w2v_runtime.tables.rows import Row, Value, seconds
from w2v_runtime.tables.text import lines


def read(path: str) -> Iterator[Row]:
    """The rows of a manifest, of either kind.

    Raises:
        RefusedError: a line is not JSON or of neither kind, a time is none, or a recording is not one file.
    """
    for number, line in lines(path):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise RefusedError(f"line {number} is not JSON.") from None
        try:
            if isinstance(entry, dict) and "audio_filepath" in entry:
                yield _nemo(number, entry)
            elif isinstance(entry, dict) and "recording" in entry:
                yield _lhotse(number, entry)
            else:
                raise RefusedError(
                    "it has neither audio_filepath, as NeMo's manifests have, nor a recording, as Lhotse's cuts"
                )
        except RefusedError as error:
            raise RefusedError(f"line {number}: {error}.") from None


def _nemo(number: int, entry: dict[str, Any]) -> Row:
    file, own = entry["audio_filepath"], ("audio_filepath", "offset", "duration")
    if not isinstance(file, str) or not file:
        raise RefusedError("audio_filepath is no path")
    start = seconds(entry.get("offset"), "offset") or 0.0
    duration = seconds(entry.get("duration"), "duration")
    end = None if duration is None else round(start + duration, 9)
    told = {name: value for name, value in entry.items() if name not in own and _is_value(value)}
    return Row(number, file, start, end, None, told)


def _lhotse(number: int, entry: dict[str, Any]) -> Row:
    recording = entry["recording"]
    sources = recording.get("sources") if isinstance(recording, dict) else None
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise RefusedError("its recording does not have one source; cuts of one file each are read")
    kind, file = sources[0].get("type"), sources[0].get("source")
    if kind != "file" or not isinstance(file, str) or not file:
        raise RefusedError(f"its source is of type {kind!r:.40}, which is neither run nor fetched; files are read")
    start, duration = seconds(entry.get("start"), "start"), seconds(entry.get("duration"), "duration")
    if start is None or duration is None:
        raise RefusedError("it lacks its start or its duration")
    channel = entry.get("channel", 0)
    if isinstance(channel, list) and len(channel) == 1:
        channel = channel[0]
    if type(channel) is not int or channel < 0:
        raise RefusedError(f"channel {channel!r:.40} is not one number from 0")
    told: dict[str, Value] = {"id": str(entry.get("id", ""))}
    supervisions = entry.get("supervisions") or []
    if isinstance(supervisions, list) and len(supervisions) == 1 and isinstance(supervisions[0], dict):
        names = ("speaker", "text", "language", "gender")
        told |= {name: value for name in names if _is_value(value := supervisions[0].get(name)) and value is not None}
    return Row(number, file, start, round(start + duration, 9), channel, told)


def _is_value(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
