"""JSON to frozen dataclasses and back, strictly: unknown, missing and mistyped fields are errors with their place."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final, NoReturn, TypeVar

T = TypeVar("T")

#: The most names in an error message: a file may hold any number of wrong ones.
_MAX_LISTED: Final = 8


def parse(text: str | bytes, where: str) -> Any:
    """Decode JSON as the standard has it: no ``NaN``, no name twice in an object, UTF-8 throughout.

    Raises:
        ValueError: ``text`` is not such JSON, or is nested deeper than Python's recursion limit.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode()
        decoded.encode()  # lone surrogates are no text
        return json.loads(decoded, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        times = Counter(name for name, _ in pairs)
        raise ValueError(f"an object names {listed(name for name in times if times[name] > 1)} more than once")
    return made


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def read(kind: type[T], data: Any, where: str) -> T:
    """Build the dataclass ``kind`` from decoded JSON.

    Raises:
        ValueError: a field is unknown, missing, of the wrong type, or refused by the dataclass itself; the message
            starts with the field's place, such as ``manifest.source.model``.
    """
    return typing.cast(T, _read(kind, data, where))


def check(value: Any, where: str) -> None:
    """Make sure that a dataclass reads back from its own JSON.

    Raises:
        ValueError: a field is of the wrong type, or holds text that is none; the message starts with its place.
    """
    read(type(value), json.loads(json.dumps(dataclasses.asdict(value))), where)


def _read(kind: Any, data: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # only ``X | None`` is used
        return None if data is None else _read(arguments[0], data, where)
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list", data)
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        _expect(isinstance(data, dict), where, "an object", data)
        return {_read(str, key, where): _read(arguments[1], value, f"{where}.{key:.80}") for key, value in data.items()}
    if kind is float:
        _expect(isinstance(data, int | float) and not isinstance(data, bool), where, "a number", data)
        _expect(abs(data) <= sys.float_info.max, where, "a number within the range of float", data)
        return float(data)
    _expect(type(data) is kind, where, f"of type {kind.__name__}", data)
    _expect(kind is not str or _is_text(data), where, "text that UTF-8 can hold", data)
    return data


def _is_text(data: str) -> bool:
    """Whether a string has no lone surrogates, which JSON can write as escapes."""
    try:
        data.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_fields(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object", data)
    hints = typing.get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - fields):
        raise ValueError(f"{where} has unknown fields: {listed(unknown)}")
    if missing := sorted(fields - set(data)):
        raise ValueError(f"{where} lacks fields: {listed(missing)}")
    values = {name: _read(hints[name], data[name], f"{where}.{name}") for name in data}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _expect(condition: bool, where: str, what: str, data: Any) -> None:
    if not condition:
        raise ValueError(f"{where} must be {what}, not {shown(data)}")


def shown(data: Any) -> str:
    """A value for a message, cut to a length that can be read."""
    try:
        return f"{data!r:.80}"
    except (RecursionError, ValueError):  # nested too deep, or an integer of too many digits
        return f"a {type(data).__name__} that is too large to show"


def listed(names: Iterable[str], most: int = _MAX_LISTED) -> str:
    """Names for a message: the first few, each cut to a length that can be read, control characters escaped."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(f"{name!r:.80}"[1:-1] for name in ordered[:most]) + more
