"""Which files of a folder are a bundle's own, by its manifest: nothing else is ever replaced or removed."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from w2v_models.bundle import MANIFEST, Bundle, read_manifest
from w2v_models.errors import BundleError
from w2v_models.manifest import older_files
from w2v_models.origin import ORIGIN, Origin


def own_files(folder: Path) -> frozenset[str]:
    """Paths of a bundle's files below its folder, with ``/``: the manifest, all that it lists, and a pull's origin.

    Of a manifest of an older format version only the records of files are read.

    Raises:
        BundleError: the folder is not a bundle, so that nothing in it is known.
    """
    try:
        records = Bundle.open(folder).manifest.files
    except BundleError:
        records = older_files(read_manifest(folder))
        if not records:
            raise
    origin = (ORIGIN,) if Origin.read(folder) else ()
    return frozenset((MANIFEST, *origin, *(record.path for record in records)))


def stranger(folder: Path, own: frozenset[str]) -> str | None:
    """The first path below ``folder`` that is neither a file of ``own`` nor a folder of one; None if there is none.

    A link is judged by its own name, wherever it points: it is not followed.

    Raises:
        OSError: a folder cannot be read, so that what it holds is not known.
    """
    own_folders, unread, unknown_folder = _folders(own), [PurePosixPath()], None
    while unread:
        within = unread.pop()
        with os.scandir(folder / within) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            path, mode = (within / entry.name).as_posix(), entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                unread.append(within / entry.name)
                if path not in own_folders:
                    unknown_folder = unknown_folder or path
            elif path not in (own | own_folders if stat.S_ISLNK(mode) else own if stat.S_ISREG(mode) else ()):
                return path
    return unknown_folder


def remove(folder: Path, own: frozenset[str]) -> None:
    """Remove the files of ``own``, the manifest last, and then the folders that held them. Links are not followed.

    Raises:
        OSError: something is left, such as a file that is not of ``own``.
    """
    own_folders = _folders(own)
    for place, folders, files, descriptor in os.fwalk(folder, topdown=False):
        within = PurePosixPath(Path(place).relative_to(folder).as_posix())
        for name in folders:
            if (within / name).as_posix() in own_folders:
                is_link = stat.S_ISLNK(os.lstat(name, dir_fd=descriptor).st_mode)
                (os.unlink if is_link else os.rmdir)(name, dir_fd=descriptor)
        for name in sorted(files, key=lambda name: name == MANIFEST):
            if (within / name).as_posix() in own:
                os.unlink(name, dir_fd=descriptor)
    folder.rmdir()


def _folders(own: frozenset[str]) -> frozenset[str]:
    """The folders that hold these files, except the bundle's own."""
    parents = {parent.as_posix() for path in own for parent in PurePosixPath(path).parents}
    return frozenset(parents - {"."})
