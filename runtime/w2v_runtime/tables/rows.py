"""A row of a table of segments, the times in it, and the kinds of its other columns."""

from __future__ import annotations

import datetime
import math
import re
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from w2v_models.errors import RefusedError

#: A value of a column that is carried through: text as the table has it, or what a typed table holds; None is missing.
Value: TypeAlias = "str | int | float | bool | None"
Kind = Literal["str", "int", "float", "bool"]

#: No recording has a time beyond this: thirty years.
MAX_SECONDS: Final = 1e9
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
#: pandas' text of a timedelta: ``0 days 00:00:01.5``, and what it also reads, ``00:00:01.5``.
_TIMEDELTA: Final = re.compile(r"(?:(-?\d+) days?,? \+?)?(-)?(\d+):(\d\d):(\d\d(?:\.\d+)?)")
_DAYS: Final = re.compile(r"(-?\d+) days?")
#: What pandas, R and spreadsheets write where there is no value.
_MISSING: Final = frozenset(("", "NaT", "nan", "NaN", "NA", "<NA>", "None", "null"))
_INTEGER: Final = re.compile(r"0|-?[1-9]\d{0,17}")
_FLOAT: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_BOOLS: Final = {"True": True, "False": False}


class Row(NamedTuple):
    """One segment: ``start`` and ``end`` in seconds from the start of the recording.

    ``number`` is the line or row in the table, from 1, as messages name it. ``file`` is a path, or the name of a
    recording without its suffix where the format has names. ``end`` None is the end of the recording; ``channel``
    counts from 0, None where the table says nothing. ``fields`` are the values of the other columns by name.
    """

    number: int
    file: str
    start: float
    end: float | None
    channel: int | None
    fields: dict[str, Value]


@dataclass(frozen=True)
class Column:
    """A column that is carried through: its name, the kind of all its values, and whether any is missing."""

    name: str
    kind: Kind
    missing: bool = False

    def typed(self, value: Value) -> Value:
        """A value of the column as its kind; a text column keeps the text of the table, and has "" for a missing one.

        Examples:
            >>> Column("age", "int").typed("41"), Column("id", "str").typed("0041"), Column("age", "int").typed("")
            (41, '0041', None)
        """
        if self.kind == "str":
            return "" if value is None else value if isinstance(value, str) else str(value)
        if value is None or value == "":
            return None
        if self.kind == "bool":
            return _BOOLS[value] if isinstance(value, str) else bool(value)
        return int(value) if self.kind == "int" else float(value)


class Columns:
    """The columns of a table, in the order in which rows name them, and the kind that fits all their values.

    Text is a number only if nothing of it is lost: ``0012`` stays text, and so does a column in which one value is.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, Kind | None] = {}
        self._seen: dict[str, int] = {}
        self._rows = 0

    def add(self, fields: dict[str, Value]) -> None:
        """Look at the fields of one more row."""
        self._rows += 1
        kinds, seen = self._kinds, self._seen
        for name, value in fields.items():
            before = kinds.setdefault(name, None)
            if value is None or value == "":
                continue
            seen[name] = seen.get(name, 0) + 1
            if before != "str" and (now := _kind_of(value)) != before:
                kinds[name] = _joined(before, now)

    def found(self) -> tuple[Column, ...]:
        """The columns of all rows so far."""
        return tuple(
            Column(name, kind or "str", self._seen.get(name, 0) < self._rows) for name, kind in self._kinds.items()
        )


def _kind_of(value: Value) -> Kind:
    if isinstance(value, str):
        if _INTEGER.fullmatch(value):
            return "int"
        return "float" if _FLOAT.fullmatch(value) else "bool" if value in _BOOLS else "str"
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"


def _joined(before: Kind | None, now: Kind) -> Kind:
    if before is None or before == now:
        return now
    return "float" if {before, now} == {"int", "float"} else "str"


def seconds(value: Any, what: str) -> float | None:
    """A time of a table in seconds: a number, the text of one, or a timedelta; None where there is no value.

    Args:
        value: what the table holds.
        what: what it stands for, for the message, such as ``start``.

    Raises:
        RefusedError: it is no time.

    Examples:
        >>> seconds("1.5", "start"), seconds("0 days 00:00:01.5", "start"), seconds("", "end")
        (1.5, 1.5, None)
    """
    if isinstance(value, str):
        text = value.strip()
        if _NUMBER.fullmatch(text):
            number = float(text)
        elif text in _MISSING:
            return None
        elif match := _DAYS.fullmatch(text):
            number = int(match[1]) * 86400.0
        elif match := _TIMEDELTA.fullmatch(text):
            days, minus, hours, minutes, rest = match.groups()
            number = int(hours) * 3600 + int(minutes) * 60 + float(rest)
            number = (-number if minus else number) + int(days or 0) * 86400
        else:
            raise RefusedError(_no_time(what, value))
    elif value is None:
        return None
    elif isinstance(value, datetime.timedelta):
        number = value.total_seconds()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        if math.isnan(number):
            return None
    else:
        raise RefusedError(_no_time(what, value))
    if not abs(number) <= MAX_SECONDS:
        raise RefusedError(_no_time(what, value))
    return number


def _no_time(what: str, value: object) -> str:
    return f"{what} {value!r:.60} is no time; write seconds (1.5) or a timedelta (0 days 00:00:01.5)"
