"""JSON to frozen dataclasses and back, strictly: unknown, missing and mistyped fields are errors with their place."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def read(kind: type[T], data: Any, where: str) -> T:
    """Build the dataclass ``kind`` from decoded JSON.

    Raises:
        ValueError: a field is unknown, missing, of the wrong type, or refused by the dataclass itself; the message
            starts with the field's place, such as ``manifest.source.model``.
    """
    return typing.cast(T, _read(kind, data, where))


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
        return {key: _read(arguments[1], value, f"{where}.{key}") for key, value in data.items()}
    if kind is float:
        _expect(isinstance(data, int | float) and not isinstance(data, bool), where, "a number", data)
        return float(data)
    _expect(type(data) is kind, where, f"of type {kind.__name__}", data)
    return data


def _read_fields(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object", data)
    hints = typing.get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - fields):
        raise ValueError(f"{where} has unknown fields: {', '.join(unknown)}")
    if missing := sorted(fields - set(data)):
        raise ValueError(f"{where} lacks fields: {', '.join(missing)}")
    values = {name: _read(hints[name], data[name], f"{where}.{name}") for name in data}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _expect(condition: bool, where: str, what: str, data: Any) -> None:
    if not condition:
        raise ValueError(f"{where} must be {what}, not {data!r:.80}")
