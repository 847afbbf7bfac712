"""The list of failed inputs (``--failures``): JSON lines with path, stage and reason."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from w2v_models.errors import OutputError
from w2v_runtime.embedding.results import Failure
from w2v_runtime.stores.pending import check_file

#: A longer line is not an entry of a list of failures.
_MAX_LINE_BYTES: Final = 2**20


class FailureLog:
    """Writes the list of failed inputs as they fail; without a failure there is no file.

    Only an earlier list of failures is ever replaced. A pipe or a device, such as ``/dev/stderr``, is written to.
    """

    def __init__(self, path: Path | None, tell: Callable[[Failure], None] = lambda failure: None) -> None:
        """Write to ``path``; if it is None there is no list, and ``tell`` is called with each failure."""
        self._path = path if path is None or is_stream(path) else Path(os.path.realpath(path))
        self._tell = tell
        self._file: IO[str] | None = None

    def __enter__(self) -> FailureLog:
        if self._path is not None and _is_regular(self._path):
            check_failures(self._path)
            if self._path.stat().st_size:
                self._path.unlink()
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, failure: Failure) -> None:
        """List one failed input.

        Raises:
            OSError: the list cannot be written.
        """
        if self._path is None:
            self._tell(failure)
            return
        if self._file is None:
            # Append: the list of an earlier run is already removed, and lines that others wrote since must stay.
            self._file = self._path.open("a", encoding="ascii")
        self._file.write(json.dumps(dataclasses.asdict(failure)) + "\n")
        self._file.flush()


def check_failures(path: Path) -> None:
    """Refuse a path for the list of failures if another file is there. An empty file counts as an empty list.

    Raises:
        OutputError: ``path`` is a folder or another file, or its folder is missing or not writable.
    """
    if is_stream(path):
        return
    check_file(path, overwrite=True)
    if path.exists() and not all(map(is_failure, _lines(path))):
        raise OutputError(
            f"{path} is no list of failures that w2v-embed wrote, so it is not replaced; name another with --failures."
        )


def is_failure(line: bytes) -> bool:
    """Whether a line is an entry of a list of failures."""
    try:
        failure = Failure(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return False
    return line.endswith(b"\n") and all(type(value) is str for value in vars(failure).values())


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe or a device, which holds nothing that could be overwritten."""
    return path.exists() and not path.is_dir() and not _is_regular(path)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from iter(lambda: file.readline(_MAX_LINE_BYTES), b"")
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}; name another with --failures.") from None


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
