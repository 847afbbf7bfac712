"""Names of results that mirror the inputs' folders, for outputs that hold an entry an input."""

from __future__ import annotations

import hashlib
import os
from pathlib import PurePath
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

#: Bytes of one name that every file system takes, less what a suffix and a number may need.
MAX_NAME_BYTES: Final = 224


def mirrored(paths: Sequence[str], suffix: str = "", reserved: Collection[str] = ()) -> list[str]:
    """A name below one root for each path, in order: ``a/b.wav`` gives ``a/b.wav`` and the suffix.

    If any path is absolute or climbs with ``..``, all are named from the deepest folder that holds them all, so no name
    leaves the root. No two names are equal and none is another's folder: the later of two that would clash, such as
    the same file given twice, gets ``~2``. Top folders never bear a ``reserved`` name.
    """
    names = [_name(path, suffix, reserved) for path in _below_common_folder(paths)]
    return told_apart(names, {folder for name in names for folder in _folders(name)}, suffix)


def told_apart(names: Iterable[str], taken: Iterable[str], suffix: str = "") -> list[str]:
    """The names in order, none twice and none of those ``taken``.

    A name stays as it is unless it is taken or stood earlier; then ``~2`` is added before its ``suffix``, or ``~3``.
    """
    used, unique = set(taken), []
    for name in names:
        stem, number, free = name.removesuffix(suffix), 1, name
        while free in used:
            number += 1
            free = f"{stem}~{number}{suffix}"
        used.add(free)
        unique.append(free)
    return unique


def _below_common_folder(paths: Sequence[str]) -> list[PurePath]:
    plain = [PurePath(os.path.normpath(path)) for path in paths]
    if not any(path.is_absolute() or path.parts[0] == os.pardir for path in plain):
        return plain
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [PurePath(os.path.relpath(path, root)) for path in paths]


def _name(path: PurePath, suffix: str, reserved: Collection[str]) -> str:
    *folders, file = map(_shortened, path.parts)
    if folders and folders[0] in reserved:
        folders[0] += "~"
    return "/".join([*folders, file + suffix])


def _shortened(part: str) -> str:
    """A name that leaves room for a suffix: one too long keeps its beginning and gets a digest of the whole."""
    data = os.fsencode(part)
    if len(data) <= MAX_NAME_BYTES:
        return part
    digest = hashlib.sha256(data).hexdigest()[:16]
    return data[: MAX_NAME_BYTES - len(digest) - 1].decode(errors="ignore") + "~" + digest


def _folders(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]
