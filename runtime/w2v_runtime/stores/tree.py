"""Names of results that mirror the inputs' folders, for outputs that hold one entry per input."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

#: Bytes of one name that every file system takes, less what a suffix and a number may need.
MAX_NAME_BYTES: Final = 224
#: Bytes of a folder's name below the root; systems take paths of 4096 bytes in all.
MAX_FOLDER_BYTES: Final = 2048


def mirrored(paths: Sequence[str], suffix: str = "", reserved: Collection[str] = ()) -> list[str]:
    """A name below one root for each path, in order: ``a/b.wav`` gives ``a/b.wav`` and the suffix.

    If any path is absolute or climbs with ``..``, all are named from the deepest folder that holds them all, so no name
    leaves the root. No two names are equal and none is another's folder: the later of two that would clash, such as
    the same file given twice, gets ``~2``. A top folder never has a ``reserved`` name.
    """
    places = [os.path.split(path) for path in paths]
    folders = _folders_below_root({folder for folder, _ in places}, reserved)
    names = (folders[folder] + _shortened(file) + suffix for folder, file in places)
    return told_apart(names, {folder for name in folders.values() for folder in _with_parents(name)}, suffix)


def told_apart(names: Iterable[str], taken: Iterable[str], suffix: str = "") -> list[str]:
    """Make names unique: the result, in the same order, has no name twice and none of those ``taken``.

    A name that is taken or occurred earlier gets ``~2``, or the next free number, before its ``suffix``.
    """
    used, unique = set(taken), []
    numbers: dict[str, int] = {}  # the last number tried for each name, so that none is tried twice
    for name in names:
        free = name
        while free in used:
            numbers[name] = number = numbers.get(name, 1) + 1
            free = f"{name.removesuffix(suffix)}~{number}{suffix}"
        used.add(free)
        unique.append(free)
    return unique


def _folders_below_root(folders: Iterable[str], reserved: Collection[str]) -> dict[str, str]:
    """For each folder its name below the root, with a slash at the end; the root itself has none."""
    plain = {folder: os.path.normpath(folder) for folder in folders}
    if any(os.path.isabs(path) or path.split(os.sep)[0] == os.pardir for path in plain.values()):
        absolute = {folder: os.path.abspath(folder) for folder in plain}
        root = os.path.commonpath(absolute.values())
        plain = {folder: os.path.relpath(path, root) for folder, path in absolute.items()}
    return {folder: _folder_name(path, reserved) for folder, path in plain.items()}


def _folder_name(path: str, reserved: Collection[str]) -> str:
    if path == os.curdir:
        return ""
    first, *rest = map(_shortened, path.split(os.sep))
    name = "/".join([f"{first}~" if first in reserved else first, *rest, ""])
    if len(os.fsencode(name)) <= MAX_FOLDER_BYTES:
        return name
    return f"{first}~{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}/"


def _shortened(part: str) -> str:
    """A name of at most :data:`MAX_NAME_BYTES`: one that is too long is cut and gets a digest of the whole."""
    data = os.fsencode(part)
    if len(data) <= MAX_NAME_BYTES:
        return part
    digest = hashlib.sha256(data).hexdigest()[:16]
    return data[: MAX_NAME_BYTES - len(digest) - 1].decode(errors="ignore") + "~" + digest


def _with_parents(folder: str) -> list[str]:
    """``a/b/`` gives ``a`` and ``a/b``."""
    parts = folder.split("/")[:-1]
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
