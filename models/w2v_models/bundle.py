"""A bundle on disk: a folder with a manifest, and files that are checked against it in size and SHA-256."""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from w2v_models import verified
from w2v_models.errors import BundleError
from w2v_models.manifest import FileRecord, Manifest, PrecisionRecord
from w2v_models.origin import Origin

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

        Examples:
            >>> bundle = Bundle.open(Path("facebook--wav2vec2-base-960h"))
            >>> list(bundle.manifest.precisions), bundle.manifest.architecture.hidden_size
            (['fp32'], 768)
        """
        text = read_manifest(folder)
        try:
            manifest = Manifest.from_json(text)
            if unproven := [name for name, entry in manifest.precisions.items() if not entry.parity]:
                raise ValueError(f"{', '.join(unproven)} has no parity rows, and a bundle without proof is not one")
            return cls(folder, manifest)
        except ValueError as error:
            raise _invalid(folder, error) from None

    def save(self) -> None:
        """Write the manifest, after a check that it can be read back.

        Raises:
            BundleError: the manifest breaks a rule of its own format, so that nobody could open the bundle.
        """
        text = self.manifest.to_json()
        try:
            Manifest.from_json(text)
        except ValueError as error:
            raise BundleError(f"the bundle would be one that cannot be opened: {error}.") from None
        (self.folder / MANIFEST).write_text(text, encoding="utf-8")

    @property
    def held(self) -> dict[str, PrecisionRecord]:
        """The precisions that are here: of a pulled bundle, those that were asked for; of any other, all.

        A pull leaves the manifest as it is, so that results name the same bundle whatever was pulled of it. A precision
        of which no file exists was not pulled.
        """
        return {
            name: entry
            for name, entry in self.manifest.precisions.items()
            if any(os.path.lexists(self.folder / record.path) for record in entry.files)
        }

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file that the manifest lists of the precisions that are here, each once."""
        return self.manifest.files_of(self.held)

    def precision(self, name: str) -> PrecisionRecord:
        """The record of one precision.

        Raises:
            BundleError: the bundle does not hold it.
        """
        held = self.held
        if name in held:
            return held[name]
        choice = f"choose a precision that it holds: {', '.join(held) or 'none'}"
        origin = Origin.read(self.folder) if name in self.manifest.precisions else None
        pull = f", or w2v-models pull {origin.repository} --precision {name}" if origin else ""
        raise BundleError(f"{self.folder} holds no {name} graph; {choice}{pull}.")

    def check(self, entry: FileRecord, remembered: bool = True) -> Path:
        """Check a file's kind, size and SHA-256 against the manifest, and return its path.

        Args:
            entry: the file's record in the manifest.
            remembered: whether a large file that passed before, and has not been touched since, passes without being
                read again; see :mod:`w2v_models.verified`.

        Raises:
            BundleError: the file is missing, not a regular file of its own inside the folder, or not what was recorded.
        """
        path = self.folder / entry.path
        try:
            status = path.lstat()
            real = self.folder.resolve(strict=True) / entry.path
            if not stat.S_ISREG(status.st_mode) or path.resolve(strict=True) != real:
                raise BundleError(
                    f"{path} is not a regular file inside the bundle, as its manifest says it is."
                    f"{_copying(self.folder, path, entry)}"
                )
            if status.st_nlink > 1:
                raise BundleError(_linked(path, status.st_nlink))
            if status.st_size != entry.size:
                raise BundleError(
                    f"{path} has {status.st_size} bytes where its manifest says {entry.size}. Export again."
                )
            if not _has_content(real, status, entry.sha256, remembered):
                raise BundleError(f"{path} is not the file its manifest names (SHA-256 differs). Export again.")
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}. Export the model again.") from None
        return path


def read_manifest(folder: Path) -> bytes:
    """Read the text of a bundle's manifest, without parsing it.

    Raises:
        BundleError: the folder or its manifest is missing, not readable, or larger than any manifest.
    """
    path = folder / MANIFEST
    try:
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder; a bundle is the folder that w2v-export writes.")
        if not path.is_file():
            raise BundleError(f"{folder} holds no {MANIFEST}, so it is not a bundle; w2v-export writes one.")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise _invalid(folder, f"manifest is larger than {MAX_MANIFEST_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.") from None


def _invalid(folder: Path, error: ValueError | str) -> BundleError:
    return BundleError(f"{folder / MANIFEST} is not a valid manifest: {error}. Export the model again.")


def _has_content(path: Path, status: os.stat_result, expected: str, remembered: bool) -> bool:
    """Whether a file has this SHA-256, by reading it or by having read it before."""
    if remembered and verified.is_remembered(path, status, expected):
        return True
    start_ns = time.time_ns()
    right = sha256(path) == expected
    if right:
        verified.remember(path, status, expected, start_ns)
    else:
        verified.forget(path)
    return right


def _copying(folder: Path, path: Path, entry: FileRecord) -> str:
    """The command that makes files of a bundle's links; empty if this is no link to a file of the recorded size.

    What a link leads to is not read: it is outside, and known by its hash only once it is copied.
    """
    try:
        status = path.stat()
    except OSError:  # it leads nowhere, or in a circle
        return ""
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
        return ""
    copy = shlex.quote(str(folder.absolute().with_name(f"{folder.name}-copy")))
    return f" It is reached by a link; copy the bundle and use the copy: cp -RL {shlex.quote(str(folder))} {copy}"


def _linked(path: Path, names: int) -> str:
    """The message on a file that has hard links, by whose other names it could be changed."""
    name, copy = shlex.quote(str(path)), shlex.quote(f"{path}.copy")
    return (
        f"{path} is a hard link, one of {names} names of the same file, so it changes with what lies outside the "
        f"bundle. Make it a file of its own: cp -p --reflink=auto {name} {copy} && mv {copy} {name}"
    )
