"""The inputs of a run: files, folders searched recursively, lists of paths, and shards of all these.

Which files of a folder are recordings, by the suffix and the first bytes of each audio container, is decided by the
table in :mod:`w2v_runtime.audio.formats`.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from w2v_models.errors import RefusedError
from w2v_runtime.audio import formats
from w2v_runtime.runs.lists import check_list as check_list
from w2v_runtime.runs.lists import read_list


@dataclass(frozen=True)
class Shard:
    """The ``index``-th (from 1) of ``count`` parts: every ``count``-th input, so that all parts take equally long."""

    index: int = 1
    count: int = 1

    @classmethod
    def of(cls, text: str) -> Shard:
        """Read ``I/N``.

        Raises:
            RefusedError: ``text`` is not ``I/N``, or I is not in 1 … N.
        """
        if not is_shard(text):
            raise RefusedError(f"shard {text!r:.40} is not I/N with I from 1 to N, such as 3/8.")
        return cls(*map(int, text.split("/")))

    def holds(self, position: int) -> bool:
        """Whether the input at ``position`` (from 0) belongs to this part."""
        return position % self.count == self.index - 1

    def holds_name(self, name: str) -> bool:
        """Whether all segments of the recording with this name belong to this part."""
        if self.count == 1:
            return True
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.count == self.index - 1

    def size(self, inputs: int) -> int:
        """How many of ``inputs`` inputs belong to this part."""
        return len(range(self.index - 1, inputs, self.count))


def is_shard(text: str) -> bool:
    """Whether a text is ``I/N`` with I in 1 … N."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    return match is not None and 1 <= int(match[1]) <= int(match[2])


#: The input that stands for a recording on standard input.
STANDARD_INPUT: Final = "-"
#: The one shard that holds every input.
ALL: Final = Shard()


class Listing:
    """An iterable of inputs that lists them ahead of their use and counts them; it can be iterated only once.

    Args:
        inputs: paths, as they are found.
        ahead: whether a thread lists them ahead. If False they are listed as they are used, for a source that may not
            end soon, such as a pipe.
    """

    def __init__(self, inputs: Iterable[str], ahead: bool = True) -> None:
        self._inputs, self._ahead = inputs, ahead
        self._count = 0
        self._ended = threading.Event()
        self._stopped = False

    def __iter__(self) -> Iterator[str]:
        return self._from_thread() if self._ahead else self._listed()

    def total(self) -> int | None:
        """Wait until all inputs are listed, and return their number; None if the listing stopped early."""
        self._ended.wait()
        return None if self._stopped else self._count

    def _listed(self) -> Iterator[str]:
        complete = False
        try:
            for path in self._inputs:
                if self._stopped:
                    return
                self._count += 1
                yield path
            complete = True
        finally:
            self._stopped = self._stopped or not complete
            self._ended.set()

    def _from_thread(self) -> Iterator[str]:
        found: SimpleQueue[str | BaseException | None] = SimpleQueue()
        threading.Thread(target=self._fill, args=(found,), name="w2v-list", daemon=True).start()
        try:
            while isinstance(item := found.get(), str):
                yield item
            if item is not None:
                raise item
        finally:
            self._stopped = self._stopped or not self._ended.is_set()

    def _fill(self, found: SimpleQueue[str | BaseException | None]) -> None:
        try:
            for path in self._listed():
                found.put(path)
            found.put(None)
        except BaseException as error:
            found.put(error)


def list_inputs(
    arguments: Iterable[str],
    files_from: str | None = None,
    null: bool = False,
    pass_over: Callable[[str], None] = lambda path: None,
) -> Iterator[str]:
    """Every input path, in a fixed order: the arguments (a folder's audio sorted by name), then the list's lines.

    The argument ``-`` is :data:`STANDARD_INPUT`; in a list or a folder a file of that name is ``./-``. ``pass_over`` is
    called with each file in a folder that is not a recording.

    Raises:
        RefusedError: the list cannot be read, or is not a list of paths.
    """
    for argument in arguments:
        if argument != STANDARD_INPUT and os.path.isdir(argument):
            yield from _search(argument, pass_over)
        else:
            yield argument
    if files_from is not None:
        yield from (
            os.path.join(os.curdir, path) if path == STANDARD_INPUT else path for path in read_list(files_from, null)
        )


def _search(folder: str, pass_over: Callable[[str], None]) -> Iterator[str]:
    """Recordings below a folder, except hidden ones. Links to folders are followed once, so that loops end."""
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            status = os.stat(current)
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError:
            yield current  # reading it fails with the reason
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                folders.append(entry.path)
            elif _is_recording(entry):
                yield entry.path
            else:
                pass_over(entry.path)
        pending.extend(reversed(folders))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_recording(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a recording: by its suffix, else by the first bytes of a regular file."""
    told = formats.by_name(entry.name)
    if told is not None:
        return told.recording
    try:
        if not entry.is_file():
            return False
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return formats.is_recording(os.read(descriptor, formats.HEAD_BYTES))
        finally:
            os.close(descriptor)
    except OSError:
        return False
