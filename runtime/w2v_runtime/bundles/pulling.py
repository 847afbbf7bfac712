"""Pull a published bundle from the hub to the default place, and find one that may have to be pulled.

What is downloaded stays in ``.NAME.w2v-partial`` beside the bundle's folder NAME until all of it is there, so that a
cut transfer goes on where it stopped; from there it is placed like an export.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from w2v_models.bundle import MANIFEST, MAX_MANIFEST_BYTES, Bundle, sha256
from w2v_models.errors import BundleError
from w2v_models.manifest import FileRecord, Manifest
from w2v_models.origin import Origin
from w2v_runtime.bundles import hub, library
from w2v_runtime.bundles.placing import placed, writing
from w2v_runtime.files.lock import BusyError

#: Called with a line for the user; None is quiet.
Tell = Callable[[str], None] | None

_DEFAULT_PRECISION: Final = "fp32"
_PARTIAL: Final = ".w2v-partial"


def find(
    model: str | os.PathLike[str] | None = None, precision: str = "fp32", offline: bool = False, tell: Tell = None
) -> Bundle:
    """The bundle that ``model`` names, as :func:`library.find` has it; one that is not here is pulled.

    The hub is asked only for an id of which this machine has no bundle, and for a precision that was not pulled yet.

    Args:
        model: a bundle folder, the id of an exported or published model, or None for the only one.
        precision: the stored precision that is needed.
        offline: ask no hub.
        tell: called with a line about the pull.

    Raises:
        BundleError: there is no such bundle here or on the hub, or it lacks the precision.
        EngineError: it is not here, and the extra ``hub`` is not installed.
        W2VError: the transfer was cut, or the disk is full.
    """
    offline = offline or hub.is_offline()
    try:
        bundle = library.find(model)
    except library.NotHereError as missing:
        if offline:
            raise
        if not hub.is_installed():
            raise library.NotHereError(
                f"{missing}, or pull it, if it is published: pip install 'w2v-onnx[hub]'"
            ) from None
        try:
            return pull(os.fspath(model or os.environ["W2V_MODEL"]), precisions=(precision,), tell=tell)
        except BundleError as error:
            raise library.NotHereError(f"{missing} (it cannot be pulled: {error})") from None
    lacks = precision in bundle.manifest.precisions and precision not in bundle.held
    if lacks and not offline and (origin := Origin.read(bundle.folder)):
        return pull(origin.repository, origin.commit, (precision,), tell)
    bundle.precision(precision)
    return bundle


def pull(repository: str, revision: str | None = None, precisions: Sequence[str] = (), tell: Tell = None) -> Bundle:
    """Download a published bundle to ``<org>--<name>`` below the folder of bundles, every file checked by its SHA-256.

    What is there of the same bundle is kept, also its other precisions. A pull that another process has begun is waited
    for.

    Args:
        repository: the id of the bundle's repository on the hub.
        revision: a branch, tag or commit; by default the main branch. It is resolved to a commit once, at the start.
        precisions: those to download; by default fp32, or all of a bundle that has no fp32.
        tell: called with a line about what is downloaded.

    Raises:
        BundleError: the repository is unknown, closed, not a bundle or damaged, or lacks a precision.
        EngineError: the extra ``hub`` is not installed.
        OutputError: another bundle, one that was not pulled from there, is at its place.
        W2VError: the transfer was cut, or the disk is full.
    """
    folder = library.default_folder(repository)
    remote = _Remote.open(repository, revision, tell)
    partial = folder.with_name(f".{folder.name}{_PARTIAL}")
    while True:
        if (found := _here(folder, remote.origin, precisions)) is not None:
            return found
        try:
            with placed(folder, overwrite=True) as staging, writing(folder):
                _refuse_other(folder, repository)
                remote.fill(staging, partial, folder, precisions)
            shutil.rmtree(partial, ignore_errors=True)
            return Bundle.open(folder)
        except BundleError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except BusyError:
            if tell is not None:
                tell(f"waiting for another process that writes {folder}")
            time.sleep(1)


def _here(folder: Path, origin: Origin, precisions: Sequence[str]) -> Bundle | None:
    """The bundle in ``folder``, if it is this commit's and holds the precisions."""
    if Origin.read(folder) != origin:
        return None
    bundle = Bundle.open(folder)
    return bundle if set(precisions or _default(bundle.manifest)) <= bundle.held.keys() else None


def _refuse_other(folder: Path, repository: str) -> None:
    """Refuse to replace a bundle that was not pulled from this repository.

    Raises:
        BundleError: there is one at ``folder``.
    """
    origin = Origin.read(folder)
    if (folder / MANIFEST).exists() and (origin is None or origin.repository != repository):
        came = f"pulled from {origin.repository}" if origin else "exported here"
        raise BundleError(
            f"{folder} holds a bundle that was {came}, so {repository} is not pulled over it; move that away first."
        )


def _default(manifest: Manifest) -> tuple[str, ...]:
    held = tuple(manifest.precisions)
    return (_DEFAULT_PRECISION,) if _DEFAULT_PRECISION in held else held


class _Remote:
    """A repository at one commit: what it holds, by name, and how it is downloaded."""

    def __init__(self, origin: Origin, sizes: dict[str, int], tell: Tell) -> None:
        self.origin, self._sizes, self._tell = origin, sizes, tell

    @classmethod
    def open(cls, repository: str, revision: str | None, tell: Tell) -> _Remote:
        """Resolve a revision to a commit, and list what that holds.

        Raises:
            BundleError: there is no such repository or revision, or it holds no bundle.
        """
        info = hub.ask(repository, lambda m: m.HfApi().model_info(repository, revision=revision, files_metadata=True))
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        if MANIFEST not in sizes:
            raise BundleError(
                f"{repository} on the hub holds no {MANIFEST}: it is a checkpoint, not a published bundle. "
                f"Export it with: w2v-export --model {repository}"
            )
        return cls(Origin(repository, info.sha), sizes, tell)

    def fill(self, staging: Path, partial: Path, present: Path, precisions: Sequence[str]) -> None:
        """Put the manifest and the files of some precisions into ``staging``, from ``present`` where they are there.

        Raises:
            BundleError: the repository holds no valid bundle, lacks a precision or a file, or a file is not as the
                manifest says.
            W2VError: the transfer was cut.
        """
        if self._sizes[MANIFEST] > MAX_MANIFEST_BYTES:
            raise BundleError(f"{self.origin} has a {MANIFEST} of {self._sizes[MANIFEST]} bytes, which is none.")
        self._fetch(MANIFEST, staging / MANIFEST, self._sizes[MANIFEST])
        try:
            manifest = Bundle.open(staging).manifest
        except BundleError as error:
            reason = str(error).partition(": ")[2].removesuffix(" Export the model again.")
            raise BundleError(f"{self.origin} is not a bundle that this release reads: {reason}") from None
        if unknown := sorted(set(precisions) - manifest.precisions.keys()):
            held = ", ".join(manifest.precisions)
            raise BundleError(f"{self.origin} holds no {', '.join(unknown)} graph; choose a precision of: {held}.")
        kept = _kept(present, manifest)
        records = manifest.files_of({*(precisions or _default(manifest)), *kept})
        self._check_listed(records)
        known = {record.path for record in manifest.files_of(kept)} if kept else set()
        lacking = [record for record in records if record.path not in known]
        if self._tell is not None:
            total = sum(record.size for record in lacking)
            self._tell(f"pulling {self.origin}: {len(lacking)} files, {total / 1e6:.1f} MB")
        partial.mkdir(exist_ok=True)
        for record in records:
            place = staging / record.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if record.path in known:
                shutil.copyfile(present / record.path, place)
            else:
                os.replace(self._checked(record, partial / record.sha256), place)
        self.origin.write(staging)

    def _check_listed(self, records: Sequence[FileRecord]) -> None:
        """Refuse files that are missing, or of another size than the manifest says, before any is downloaded."""
        for record in records:
            size = self._sizes.get(record.path)
            if size != record.size:
                state = "is missing" if size is None else f"has {size} bytes where its manifest says {record.size}"
                raise BundleError(f"{record.path} of {self.origin} {state}; it has to be pushed again.")

    def _checked(self, record: FileRecord, part: Path) -> Path:
        """Download a file to ``part``, whose name is its SHA-256, from where an earlier transfer was cut."""
        self._fetch(record.path, part, record.size)
        if part.stat().st_size != record.size or sha256(part) != record.sha256:
            raise BundleError(
                f"{record.path} of {self.origin} is not the file that its manifest names (SHA-256 differs), so nothing "
                "is kept; pull again, and if that does not help, it has to be pushed again."
            )
        return part

    def _fetch(self, name: str, path: Path, size: int) -> None:
        hub.fetch(self.origin.repository, self.origin.commit, name, path, size, quiet=self._tell is None)


def _kept(folder: Path, manifest: Manifest) -> list[str]:
    """The precisions of the same bundle that are in ``folder`` already, whole."""
    with contextlib.suppress(BundleError):
        bundle = Bundle.open(folder)
        if bundle.manifest == manifest:
            for record in bundle.files:
                bundle.check(record)
            return list(bundle.held)
    return []
