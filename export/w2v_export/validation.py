"""Read a checkpoint's JSON files without trust: regular files of bounded size, with a type check of every field."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from w2v_models import schema
from w2v_models.errors import CheckpointError

#: The size limit of a JSON file, above that of any config, vocabulary or index of weights.
MAX_JSON_BYTES: Final = 16 << 20
#: The most characters of a label.
MAX_LABEL: Final = 256
MAX_LABELS: Final = 1 << 16
_LISTED: Final = 12


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: the file is missing, not regular, unreadable, above ``MAX_JSON_BYTES``, or no JSON object.
    """
    try:
        content = _read(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        data = schema.parse(content, str(path))
    except ValueError as error:
        raise CheckpointError(f"{error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold an object, not {schema.shown(data)}.")
    return data


def _read(path: Path) -> bytes:
    """Read a file, after a check before and after opening that it is regular: a FIFO or a device may block."""
    _require_regular(path, os.stat(path))
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _require_regular(path, os.fstat(file.fileno()))
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, which no such file of a model is.")
    return content


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file, so it was not opened.")


def contents(folder: Path) -> str:
    """The contents of a folder as text for a message: its first entries by name, folders with a slash."""
    try:
        entries = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(folder))
    except OSError as error:
        return f"it cannot be listed: {error.strerror}"
    if not entries:
        return "it is empty"
    more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return f"it holds {', '.join(entries[:_LISTED])}{more}"


def readable(name: str) -> str:
    """A file's name as valid UTF-8 text for a manifest: other bytes are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Kind:
    """The values that a field may hold, as text for messages (``wanted``) and as a predicate (``fits``)."""

    wanted: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Field:
    """The values that a field may hold, and the default if it is missing."""

    kind: Kind
    default: Any


def constant(only: str | int) -> Kind:
    return Kind(json.dumps(only), lambda value: type(value) is type(only) and value == only)


def whole(low: int, high: int) -> Kind:
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    return Kind(
        f"a number from {low:g} to {high:g}",
        lambda value: type(value) in (int, float) and low <= value <= high,
    )


def flag() -> Kind:
    return Kind("true or false", lambda value: type(value) is bool)


def choice(*options: str) -> Kind:
    return Kind(f"one of {', '.join(options)}", lambda value: type(value) is str and value in options)


def several(kind: Kind, most: int, least: int = 1) -> Kind:
    return Kind(
        f"a list of {least} to {most} entries, each {kind.wanted}",
        lambda value: type(value) is list and least <= len(value) <= most and all(map(kind.fits, value)),
    )


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.wanted}, or null", lambda value: value is None or kind.fits(value))


def text() -> Kind:
    return Kind(f"text of at most {MAX_LABEL} characters", _is_text)


def plain_path(*suffixes: str) -> Kind:
    """A relative path, with one of these suffixes, that does not leave its folder."""
    return Kind(
        f"a path below the folder that ends in {' or '.join(suffixes)}",
        lambda value: type(value) is str and value.endswith(suffixes) and _is_below(value),
    )


def labels() -> Kind:
    return Kind(f"an object from numbers to different names of at most {MAX_LABEL} characters", _are_labels)


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= MAX_LABEL and not any("\ud800" <= c <= "\udfff" for c in value)


def _are_labels(value: Any) -> bool:
    return (
        type(value) is dict
        and len(value) <= MAX_LABELS
        and all(len(key) < 10 and key.isascii() and key.isdigit() for key in value)
        and all(type(name) is int or _is_text(name) for name in value.values())
        and len(set(map(str, value.values()))) == len(set(map(int, value))) == len(value)
    )


def _is_below(value: str) -> bool:
    parts = value.split("/")
    return value.isprintable() and "\\" not in value and not {"", ".", ".."} & set(parts) and len(value) <= MAX_LABEL


def checked(where: Path | str, data: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The values of the fields in the table ``fields``, with defaults for missing ones; other fields are left out.

    Numbers have the type of the default, whole or not, on which transformers insists.

    Raises:
        CheckpointError: values are invalid; the message names each field and what it must be.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} must hold an object, not {schema.shown(data)}.")
    given = {name: field.kind for name, field in fields.items() if name in data}
    refuse(where, [problem(name, kind, data[name]) for name, kind in given.items() if not kind.fits(data[name])])
    return {name: _like(field.default, data.get(name, field.default)) for name, field in fields.items()}


def _like(default: Any, value: Any) -> Any:
    """A number as one of the default's type, if it is the same number."""
    number = {int, float}
    same = {type(default), type(value)} == number and type(default)(value) == value
    return type(default)(value) if same else value


def problem(name: str, kind: Kind, value: Any) -> str:
    """The message for an invalid value of the field ``name``."""
    return f"{name} must be {kind.wanted}, not {schema.shown(value)}"


def refuse(where: Path | str, problems: list[str]) -> None:
    """Raise all problems of a file in one message, if there are any.

    Raises:
        CheckpointError: there are problems.
    """
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}.")
