"""Where failed inputs are listed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import IO

from w2v_runtime.results import Failure
from w2v_runtime.terminal import say


class FailureLog:
    """The failures file: JSON lines, written as they come; there is none where nothing failed."""

    def __init__(self, path: Path | None) -> None:
        """Begin; None sends failures to standard error, for output on standard output."""
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> FailureLog:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, failure: Failure) -> None:
        """List one failed input."""
        if self._path is None:
            say("w2v-embed", f"{failure.path}: {failure.reason}")
            return
        if self._file is None:
            self._file = self._path.open("w", encoding="ascii")
        self._file.write(json.dumps(dataclasses.asdict(failure)) + "\n")
        self._file.flush()
