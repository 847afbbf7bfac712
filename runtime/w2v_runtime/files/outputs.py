"""Names of the files beside an output, and the check that a run writes no file twice and none that it reads.

A run's own files (journal, values, lock) lie beside its output under hidden names that end in ``.w2v-…``, so that a
folder of outputs still opens as a data set. Paths are compared by the files that they lead to, not by their names: so
links, ``./x`` and case-insensitive folders are seen through.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from w2v_models.errors import OutputError

JOURNAL_SUFFIX: Final = ".w2v-journal"
VALUES_SUFFIX: Final = ".w2v-values"
LOCK_SUFFIX: Final = ".w2v-lock"
FAILURES_SUFFIX: Final = ".failures.jsonl"
METADATA_SUFFIX: Final = ".metadata.json"
#: The suffixes of journal and values in the previous release, whose names had no leading dot.
EARLIER_SUFFIXES: Final = {JOURNAL_SUFFIX: ".journal.jsonl", VALUES_SUFFIX: ".values"}


def resolved(output: str | os.PathLike[str]) -> Path:
    """The file or folder that an output's name leads to, whether it exists or not."""
    return Path(os.path.realpath(output))


def hidden(output: Path, suffix: str) -> Path:
    """The path of a run's own hidden file beside the resolved output: ``out.npz`` → ``.out.npz.w2v-journal``."""
    place = resolved(output)
    return place.with_name(f".{place.name}{suffix}")


def beside(output: Path, suffix: str) -> Path:
    """The path of a file for users beside the resolved output: ``out.npz`` → ``out.npz.failures.jsonl``."""
    place = resolved(output)
    return place.with_name(place.name + suffix)


def exists(output: Path) -> bool:
    """Whether an output exists; an empty folder counts as none."""
    return any(output.iterdir()) if output.is_dir() else output.exists()


@dataclass(frozen=True)
class Use:
    """A path and its role in a run, as messages name it: ``the output``, ``an input``."""

    path: str | os.PathLike[str]
    what: str


@dataclass(frozen=True)
class Written:
    """The files that a run writes.

    Raises:
        OutputError: two of the paths lead to one file.
    """

    uses: tuple[Use, ...]
    _by_identity: dict[Hashable, Use] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for use in self.uses:
            identity = _identity(use.path)
            if (other := self._by_identity.setdefault(identity, use)) is not use:
                raise OutputError(f"{use.what} {os.fspath(use.path)} is also {other.what}; name another file.")

    def refuse_reads(self, reads: Iterable[Use]) -> None:
        """Refuse a run that would replace a file that it reads.

        Raises:
            OutputError: a path in ``reads`` leads to a file that is written; the message names both roles.
        """
        for read in reads:
            if (written := self._by_identity.get(_identity(read.path))) is not None:
                raise _collision(os.fspath(written.path), written.what, read.what)

    def refuse_read(self, path: str, status: os.stat_result) -> None:
        """Refuse an input that the run would replace, by its ``status``, where the caller has that already.

        Raises:
            OutputError: the run writes this file.
        """
        if (written := self._by_identity.get((status.st_dev, status.st_ino))) is not None:
            raise _collision(path, written.what, "an input")

    def refuse_inputs(self, paths: Iterable[str]) -> None:
        """Refuse a run that would replace one of these inputs.

        Raises:
            OutputError: the run writes one of the files.
        """
        for path in paths:
            try:
                status = os.stat(path)
            except (OSError, ValueError):
                continue
            self.refuse_read(path, status)


def _collision(path: str, written: str, read: str) -> OutputError:
    return OutputError(f"{path} is {read} and {written} at once, and would be replaced; name another file.")


def _identity(path: str | os.PathLike[str]) -> tuple[Hashable, ...]:
    """A key that is equal for two paths to one file.

    For an existing file it is device and inode. For a missing file it is the key of its folder and the file's name,
    without case and with accents in one Unicode form, since the file system may not distinguish these.
    """
    place = os.path.realpath(path)
    try:
        status = os.stat(place)
        return (status.st_dev, status.st_ino)
    except (OSError, ValueError):
        folder, name = os.path.split(place)
        if not name or folder == place:
            return (place,)
        return ("in", *_identity(folder), unicodedata.normalize("NFC", name).casefold())
