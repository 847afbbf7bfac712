"""Finds the recordings that a table names: below the inputs, then beside the table, then in the working directory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Final

from w2v_models.errors import AudioError

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_NAMED: Final = 3


class Recordings:
    """The recordings of a run, by the paths or names of a table.

    Args:
        table: the table's path.
        places: the inputs of the command line, files and folders, in their order.
        listed: all recordings that the inputs hold; needed only for tables that name recordings without a suffix.
    """

    def __init__(self, table: str, places: Iterable[str], listed: Iterable[str] | None = None) -> None:
        beside = table if os.path.isdir(table) else os.path.dirname(table) or os.curdir
        places = list(places)
        self._folders = [place for place in places if os.path.isdir(place)]
        self._files = _by_parts(place for place in places if not os.path.isdir(place))
        self._others = [beside] if os.path.abspath(beside) == os.getcwd() else [beside, os.curdir]
        self._names: dict[str, list[str]] | None = None
        if listed is not None:
            self._names = {}
            for path in listed:
                self._names.setdefault(_stem(path), []).append(path)
        self._found: dict[str, str] = {}
        self._last_folder: dict[str, dict[str, list[str]]] = {}

    def find(self, file: str) -> str:
        """The path of the recording that a table names ``file``.

        Raises:
            AudioError: it is not there, or several are; the message says where it was looked for.
        """
        if (path := self._found.get(file)) is None:
            path = self._found[file] = self._by_name(file) if self._names is not None else self._by_path(file)
        return path

    def _by_path(self, file: str) -> str:
        if _URL.match(file) and not os.path.exists(file):
            raise AudioError(
                f"{file} is a URL, and nothing that a table names is fetched; download it and name the file."
            )
        if os.path.isabs(file):
            return file
        candidates = [os.path.join(folder, file) for folder in self._folders]
        candidates += self._files.get(os.path.basename(file), [])
        tail = os.sep + os.path.normpath(file)
        found = [
            path for path in candidates if (os.sep + os.path.normpath(path)).endswith(tail) and os.path.exists(path)
        ]
        if len({os.path.realpath(path) for path in found}) > 1:
            raise AudioError(_ambiguous(file, found))
        if found:
            return found[0]
        for folder in self._others:
            if os.path.exists(path := os.path.normpath(os.path.join(folder, file))):
                return path
        looked = [*self._folders, *self._others]
        raise AudioError(f"{file} is not there; it was looked for in {', '.join(map(_place, looked))}.")

    def _by_name(self, name: str) -> str:
        tail, stem = os.sep + os.path.normpath(name), os.path.basename(os.path.normpath(name))
        found = (self._names or {}).get(stem, [])
        if len(found) > 1:
            found = [path for path in found if _without_suffix(os.sep + os.path.normpath(path)).endswith(tail)] or found
        for folder in self._others:
            if not found:
                below = os.path.normpath(os.path.join(folder, os.path.dirname(name)))
                found = self._in_folder(below).get(stem, [])
        if not found:
            where = "the inputs" if self._names else "no inputs"
            looked = ", ".join([where, *map(_place, self._others)])
            raise AudioError(f"no recording has the name {name!r}; it was looked for in {looked}.")
        if len(found) > 1:
            raise AudioError(_ambiguous(name, found))
        return found[0]

    def _in_folder(self, folder: str) -> dict[str, list[str]]:
        from w2v_runtime.audio import formats

        if folder not in self._last_folder:
            names: dict[str, list[str]] = {}
            try:
                entries = sorted(os.listdir(folder))
            except OSError:
                entries = []
            for entry in entries:
                told = formats.by_name(entry)
                if told is not None and told.recording:
                    names.setdefault(_stem(entry), []).append(os.path.normpath(os.path.join(folder, entry)))
            self._last_folder[folder] = names
        return self._last_folder[folder]


def _by_parts(paths: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(os.path.basename(path), []).append(path)
    return found


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0]


def _stem(path: str) -> str:
    return _without_suffix(os.path.basename(path))


def _place(folder: str) -> str:
    return "the working directory" if folder == os.curdir else folder


def _ambiguous(name: str, found: list[str]) -> str:
    there = ", ".join(found[:_NAMED]) + (", …" if len(found) > _NAMED else "")
    return f"{name!r} may be {there}; give fewer inputs, or rename one."
