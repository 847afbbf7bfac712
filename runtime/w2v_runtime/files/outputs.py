"""The files of a run: what stands beside an output, and that no file is written which the run reads or writes twice.

Everything of a run's own lies beside its output under a hidden name that ends in ``.w2v-…``, so that a folder of
outputs still opens as a data set. Paths are told apart by the files that they lead to, not by their names: through
links, ``./x`` and folders that do not tell ``A`` from ``a``.
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
#: What the release before called its journal and its values, without a dot in front.
EARLIER_SUFFIXES: Final = {JOURNAL_SUFFIX: ".journal.jsonl", VALUES_SUFFIX: ".values"}


def resolved(output: str | os.PathLike[str]) -> Path:
    """The file or folder that an output's name leads to, whether it exists or not."""
    return Path(os.path.realpath(output))


def hidden(output: Path, suffix: str) -> Path:
    """A file of the run's own beside what an output's name leads to: ``out.npz`` → ``.out.npz.w2v-journal``."""
    place = resolved(output)
    return place.with_name(f".{place.name}{suffix}")


def beside(output: Path, suffix: str) -> Path:
    """A file for users next to an output: ``out.npz`` → ``out.npz.failures.jsonl``."""
    place = resolved(output)
    return place.with_name(place.name + suffix)


def exists(output: Path) -> bool:
    """Whether there is an output. An empty folder is none."""
    return any(output.iterdir()) if output.is_dir() else output.exists()


@dataclass(frozen=True)
class Use:
    """A path and what it is to a run, as a sentence says it: ``the output``, ``an input``."""

    path: str | os.PathLike[str]
    what: str


@dataclass(frozen=True)
class Written:
    """The files that a run writes.

    Raises:
        OutputError: two of them are one file.
    """

    uses: tuple[Use, ...]
    _by_identity: dict[Hashable, Use] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for use in self.uses:
            identity = _identity(use.path)
            if (other := self._by_identity.setdefault(identity, use)) is not use:
                raise OutputError(f"{use.what} {os.fspath(use.path)} is also {other.what}; name another file.")

    def refuse_reads(self, reads: Iterable[Use]) -> None:
        """Refuse a run that would replace what it reads.

        Raises:
            OutputError: with both uses of the file.
        """
        for read in reads:
            if (written := self._by_identity.get(_identity(read.path))) is not None:
                raise _collision(os.fspath(written.path), written.what, read.what)

    def refuse_read(self, path: str, status: os.stat_result) -> None:
        """Refuse an input, once its status is known anyway, that the run would replace.

        Raises:
            OutputError: as above.
        """
        if (written := self._by_identity.get((status.st_dev, status.st_ino))) is not None:
            raise _collision(path, written.what, "an input")

    def refuse_inputs(self, paths: Iterable[str]) -> None:
        """Refuse a run one of whose listed inputs it would replace.

        Raises:
            OutputError: as above.
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
    """What two paths to one file have in common.

    Of a file that is there, device and inode; of one that is not, those of its folder and its name, without regard to
    case and to how accents are composed, since the folder may not tell these apart.
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
