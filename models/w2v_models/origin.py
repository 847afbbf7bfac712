"""Where a pulled bundle came from: a repository of the hub and its commit, in a file beside the manifest.

It is not in the manifest, so that a bundle has the same hash wherever it was pulled from.
"""

from __future__ import annotations

import dataclasses
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from w2v_models import schema

ORIGIN: Final = "origin.json"
_MAX_BYTES: Final = 4096


@dataclass(frozen=True)
class Origin:
    """A repository such as ``org/name``, and the commit that was pulled."""

    repository: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repository} at commit {self.commit}"

    @classmethod
    def read(cls, folder: Path) -> Origin | None:
        """The origin of the bundle in ``folder``; None if it was exported here, or the file is not one of ours."""
        path = folder / ORIGIN
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                return None
            return schema.read(cls, schema.parse(path.read_bytes(), ORIGIN), ORIGIN)
        except (OSError, ValueError):
            return None

    def write(self, folder: Path) -> None:
        """Write it beside the manifest in ``folder``."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        (folder / ORIGIN).write_text(text, encoding="utf-8")
