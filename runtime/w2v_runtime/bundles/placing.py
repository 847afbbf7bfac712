"""Write a bundle to its output folder atomically: as a whole or not at all, and without a loss of other files.

The bundle is written into a staging folder beside the output folder, opened and checked there, and synced to the disk.
Then the two folders are exchanged, and of the replaced bundle only its own files are removed. All of this happens under
the output's lock. So what is found beside the output once the lock is held was left by a killed process: an unfinished
bundle, a replaced bundle, or, where two folders cannot be exchanged in one step, a bundle that was set aside and is
moved back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from w2v_models.bundle import MANIFEST, Bundle
from w2v_models.errors import BundleError, OutputError, W2VError
from w2v_models.ownership import own_files, remove, stranger
from w2v_runtime.files.durable import sync_file, sync_folder
from w2v_runtime.files.exchange import exchange
from w2v_runtime.files.lock import locked

#: Beside a bundle NAME, ``.NAME.w2v-new`` is the staging folder, ``.NAME.w2v-old`` a bundle that is set aside.
_NEW: Final = ".w2v-new"
_OLD: Final = ".w2v-old"
#: A file that marks an unfinished staging folder. From a folder without it, only a bundle's own files are removed.
_UNFINISHED: Final = ".unfinished"
_UNFINISHED_TEXT: Final = "A bundle is being written here. If its process was killed, the next export removes this.\n"


@contextlib.contextmanager
def placed(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a new staging folder to write a bundle into; it replaces ``output`` when the block succeeds.

    If the block fails, the staging folder is removed and ``output`` is as it was. A link at ``output`` is followed.

    Raises:
        OutputError: ``output`` exists or cannot be written, holds files that are not a bundle's, or another process
            writes to it.
        BundleError: the staging folder does not hold a valid bundle.
        W2VError: the disk is full, or the replaced bundle cannot be removed.
    """
    folder = _resolved(output)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder.parent} cannot be written: {error.strerror}. Choose another --output.") from None
    with locked(folder):
        _restore(folder)
        _check_free(folder, overwrite)
        _remove_leftovers(folder)
        staging = _beside(folder, _NEW)
        try:
            with writing(folder):
                staging.mkdir()
                (staging / _UNFINISHED).write_text(_UNFINISHED_TEXT)
            yield staging
            with writing(folder):
                _check_and_sync(staging)
                _swap(staging, folder, overwrite)
        except BaseException:
            with contextlib.suppress(OSError, W2VError):
                _restore(folder)
                _remove_leftovers(folder)
            raise
        sync_folder(folder.parent)
        try:
            _remove_leftovers(folder)
        except OutputError as error:
            raise W2VError(f"{folder} is written, but what it replaced is not gone: {error}") from None


def check(output: Path, overwrite: bool) -> None:
    """Refuse an output folder that :func:`placed` would refuse.

    Raises:
        OutputError: as for :func:`placed`.
    """
    folder = _resolved(output)
    if folder.parent.is_dir():
        with locked(folder):
            _restore(folder)
            _check_free(folder, overwrite)


def recover(folder: Path) -> None:
    """Move a bundle that a killed process had set aside back to ``folder``, if that does not exist."""
    with contextlib.suppress(OSError, ValueError, W2VError):
        folder = Path(os.path.realpath(folder))
        if not os.path.lexists(folder) and _beside(folder, _OLD).is_dir():
            with locked(folder):
                _restore(folder)


def recover_all(home: Path) -> None:
    """:func:`recover` every bundle in ``home``, a folder of bundles.

    Raises:
        OSError: ``home`` cannot be read.
    """
    for name in os.listdir(home):
        if name.startswith(".") and name.endswith(_OLD):
            recover(home / name[1 : -len(_OLD)])


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block into a message that names ``folder``, which Python's error of a full disk does not.

    Raises:
        W2VError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise W2VError(f"{folder} cannot be written: {error.strerror or error}. Nothing was left behind.") from None


def _resolved(output: Path) -> Path:
    """The real path of ``output``, with links resolved.

    Raises:
        OutputError: no bundle folder can be written there.
    """
    try:
        folder = Path(os.path.realpath(output))
        str(folder).encode()
    except FileNotFoundError:
        raise OutputError(f"{output} is relative to a current folder that does not exist any more.") from None
    except UnicodeEncodeError:
        raise OutputError(f"{folder} is no UTF-8, as the engines need it; choose another --output.") from None
    for path in (output, *output.parents):
        if os.path.islink(path) and not os.path.exists(path):
            raise OutputError(f"{path} is a link to nothing; remove it, or choose another --output.")
        if path.name == ".." and not os.path.exists(path):
            raise OutputError(f"{path} does not exist, so nothing is there; choose another --output.")
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(existing):
        raise OutputError(f"{existing} is not a folder, so no bundle can be there; choose another --output.")
    if existing == folder and any(path.samefile(folder) for path in _current_folders()):
        raise OutputError(f"{output} is the current folder or one around it; name a folder inside, such as ./bundle.")
    if os.path.ismount(folder):
        raise OutputError(f"{output} is a mount point; name a folder inside, such as {folder}/bundle.")
    within = folder.parent if existing == folder else existing
    if not os.access(within, os.W_OK | os.X_OK):
        raise OutputError(f"{output} cannot be written: no permission to write in {within}. Choose another --output.")
    return folder


def _current_folders() -> list[Path]:
    """The current folder and its parents; empty if the current folder was removed."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return []
    return [here, *here.parents]


def _check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that exists, unless ``overwrite`` is set and it is a bundle that may be replaced, or empty."""
    for parent in folder.parents:
        with contextlib.suppress(BundleError):
            Bundle.open(parent)
            raise OutputError(f"{folder} is inside the bundle {parent}; choose another --output.")
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise OutputError(f"{folder} exists already; replace it with --overwrite, or choose another --output.")
    _own(folder, folder)
    for place, _, _ in os.walk(folder):
        if not os.access(place, os.W_OK | os.X_OK):
            raise OutputError(f"no permission to replace what {place} holds; choose another --output.")


def _own(folder: Path, name: Path) -> frozenset[str]:
    """The names of the files of the bundle in ``folder``, which messages call ``name``; none for an empty folder.

    Raises:
        OutputError: the folder is not a bundle, or holds other files too.
    """
    own, fault = frozenset((MANIFEST,)), None
    try:
        if not any(folder.iterdir()):
            return frozenset()
        try:
            own = own_files(folder)
        except BundleError as error:
            fault = error
        first = stranger(folder, own)
    except OSError as error:
        raise OutputError(
            f"{error.filename or name} cannot be read: {error.strerror}. Choose another --output."
        ) from None
    if fault is not None:
        raise OutputError(
            f"{name} is not empty and not a bundle, so it is not replaced: it holds {first or MANIFEST}. "
            f"Choose another --output, or remove it by hand: {fault}"
        )
    if first is not None:
        raise OutputError(
            f"{name} holds {first}, which is no file of its bundle, so it is not replaced; move that away, or choose "
            "another --output."
        )
    return own


def _check_and_sync(staging: Path) -> None:
    """Check that the staging folder holds a valid bundle and nothing else, and sync it to the disk.

    Raises:
        BundleError: it does not.
    """
    bundle = Bundle.open(staging)
    for record in bundle.files:
        bundle.check(record, remembered=False)
    if unlisted := stranger(staging, own_files(staging) | {_UNFINISHED}):
        raise BundleError(f"{staging / unlisted} was written, but its manifest does not list it.")
    (staging / _UNFINISHED).unlink()
    for place, _, files in os.walk(staging):
        for name in files:
            sync_file(Path(place, name))
        sync_folder(Path(place))


def _swap(staging: Path, folder: Path, overwrite: bool) -> None:
    """Move a finished bundle from ``staging`` to ``folder``; a bundle that was at ``folder`` is then at ``staging``."""
    _check_free(folder, overwrite)
    if not folder.is_dir() or not any(folder.iterdir()):
        staging.rename(folder)  # a rename replaces an empty folder, and fails on any other
        return
    aside = _beside(folder, _OLD)
    exchange(staging, folder, aside)
    try:
        _own(staging, folder)  # a file may have been added since the check
    except OutputError:
        exchange(staging, folder, aside)
        raise


def _restore(folder: Path) -> None:
    """Move a bundle that was set aside back to ``folder``, if that does not exist. The caller holds the lock."""
    aside = _beside(folder, _OLD)
    if aside.is_dir() and not os.path.lexists(folder):
        with contextlib.suppress(BundleError):
            own_files(aside)
            aside.rename(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what an earlier export left beside ``folder``, but no file of another origin. The caller holds the lock.

    Raises:
        OutputError: a leftover cannot be removed.
    """
    for path in (_beside(folder, _NEW), _beside(folder, _OLD)):
        try:
            if _is_file(path / _UNFINISHED):
                _remove_unfinished(path)
            elif os.path.lexists(path):
                remove(path, _own(path, path))
        except OSError as error:
            raise OutputError(f"{path}, left by an earlier export, cannot be removed: {error.strerror}.") from None


def _remove_unfinished(folder: Path) -> None:
    """Remove an unfinished staging folder, its marker file last: after a kill on the way it is still recognised."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _UNFINISHED:
            path.unlink()
    (folder / _UNFINISHED).unlink()
    folder.rmdir()


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}{suffix}")
