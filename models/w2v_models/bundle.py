"""A bundle on disk: a folder, its manifest, and the certainty that its files are the ones the manifest names."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from w2v_models.errors import BundleError
from w2v_models.manifest import FileRecord, Manifest, PrecisionRecord

MANIFEST: Final = "manifest.json"
#: A manifest is a few KiB; anything far larger is not one.
MAX_MANIFEST_BYTES: Final = 4 * 2**20


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(folder: Path, path: Path) -> FileRecord:
    """Describe a file of the bundle that is being written in ``folder``."""
    return FileRecord(path.relative_to(folder).as_posix(), sha256(path), path.stat().st_size)


@dataclass(frozen=True)
class Bundle:
    """A folder with a valid manifest. Open it with :meth:`open`; ask :meth:`check` before a file is used."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read a bundle's manifest.

        Raises:
            BundleError: the folder is missing or not a bundle, or its manifest is invalid.
        """
        path = folder / MANIFEST
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder; a bundle is the folder that w2v-export writes.")
        if not path.is_file():
            raise BundleError(f"{folder} holds no {MANIFEST}, so it is not a bundle; w2v-export writes one.")
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise ValueError(f"manifest is larger than {MAX_MANIFEST_BYTES} bytes")
            manifest = Manifest.from_json(path.read_bytes())
            if unproven := [name for name, entry in manifest.precisions.items() if not entry.parity]:
                raise ValueError(f"{', '.join(unproven)} has no parity rows, and a bundle without proof is not one")
            return cls(folder, manifest)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} is not a valid manifest: {error}. Export the model again.") from None

    def precision(self, name: str) -> PrecisionRecord:
        """The record of one precision.

        Raises:
            BundleError: the bundle does not hold it.
        """
        if name not in self.manifest.precisions:
            held = ", ".join(self.manifest.precisions)
            raise BundleError(f"{self.folder} holds no {name} graph; choose a precision that it holds: {held}.")
        return self.manifest.precisions[name]

    def check(self, entry: FileRecord) -> Path:
        """The path of a file of the bundle, once its kind, size and SHA-256 are those of the manifest.

        Raises:
            BundleError: it is missing, not a regular file of its own inside the folder, or not what was recorded.
        """
        path = self.folder / entry.path
        try:
            status = path.lstat()
            inside = path.resolve(strict=True) == self.folder.resolve(strict=True) / entry.path
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}. Export the model again.") from None
        if not stat.S_ISREG(status.st_mode) or not inside:
            raise BundleError(f"{path} is not a regular file inside the bundle, as its manifest says it is.")
        if status.st_size != entry.size:
            raise BundleError(f"{path} has {status.st_size} bytes where its manifest says {entry.size}. Export again.")
        if sha256(path) != entry.sha256:
            raise BundleError(f"{path} is not the file its manifest names (SHA-256 differs). Export again.")
        return path
