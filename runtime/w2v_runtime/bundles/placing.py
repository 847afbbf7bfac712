"""A bundle takes its place whole or not at all, and never that of a file that is no bundle's own.

It is written into a folder beside its place, opened and checked there, made durable, and then changes places with what
it replaces, of which only the bundle's own files are removed. All of that happens under the lock of the place. So what
stands beside it when the lock was got is what a killed process left: an unfinished bundle, one that was replaced, or,
where two folders cannot change places in one step, one that was set aside and comes back.
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

#: Beside a bundle NAME, ``.NAME.w2v-new`` is the next one, and ``.NAME.w2v-old`` one that is set aside.
_NEW: Final = ".w2v-new"
_OLD: Final = ".w2v-old"
#: Marks a folder that was begun here and is not finished. Of one without it, only a bundle's own files are removed.
_UNFINISHED: Final = ".unfinished"
_UNFINISHED_TEXT: Final = "A bundle is being written here. If its process was killed, the next export removes this.\n"


@contextlib.contextmanager
def placed(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to write a bundle into, which takes the place ``output`` when the block succeeds.

    Where the block fails nothing is left, and what was there is as it was. A link at ``output`` is followed.

    Raises:
        OutputError: the place is taken or cannot be written, holds more than a bundle, or another process writes to it.
        BundleError: what the block wrote is not a bundle.
        W2VError: the disk is full, or what was replaced cannot be removed.
    """
    folder = _place(output)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder.parent} cannot be written: {error.strerror}. Choose another --output.") from None
    with locked(folder):
        _restore(folder)
        _check_free(folder, overwrite)
        _sweep(folder)
        staging = _beside(folder, _NEW)
        try:
            with writing(folder):
                staging.mkdir()
                (staging / _UNFINISHED).write_text(_UNFINISHED_TEXT)
            yield staging
            with writing(folder):
                _finish(staging)
                _swap(staging, folder, overwrite)
        except BaseException:
            with contextlib.suppress(OSError, W2VError):
                _restore(folder)
                _sweep(folder)
            raise
        sync_folder(folder.parent)
        try:
            _sweep(folder)
        except OutputError as error:
            raise W2VError(f"{folder} is written, but what it replaced is not gone: {error}") from None


def check(output: Path, overwrite: bool) -> None:
    """Refuse at once what :func:`placed` would refuse.

    Raises:
        OutputError: as there.
    """
    folder = _place(output)
    if folder.parent.is_dir():
        with locked(folder):
            _restore(folder)
            _check_free(folder, overwrite)


def recover(folder: Path) -> None:
    """Bring back a bundle that a killed process had set aside, where nothing stands in its place."""
    with contextlib.suppress(OSError, ValueError, W2VError):
        folder = Path(os.path.realpath(folder))
        if not os.path.lexists(folder) and _beside(folder, _OLD).is_dir():
            with locked(folder):
                _restore(folder)


def recover_all(home: Path) -> None:
    """:func:`recover` every bundle of a folder of bundles.

    Raises:
        OSError: the folder cannot be read.
    """
    for name in os.listdir(home):
        if name.startswith(".") and name.endswith(_OLD):
            recover(home / name[1 : -len(_OLD)])


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say where writing failed: Python's own error of a full disk does not.

    Raises:
        W2VError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise W2VError(f"{folder} cannot be written: {error.strerror or error}. Nothing was left behind.") from None


def _place(output: Path) -> Path:
    """Where ``output`` really is, if a folder can be there at all."""
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
    if existing == folder and any(path.samefile(folder) for path in _around_here()):
        raise OutputError(f"{output} is the current folder or one around it; name a folder inside, such as ./bundle.")
    if os.path.ismount(folder):
        raise OutputError(f"{output} is a mount point; name a folder inside, such as {folder}/bundle.")
    within = folder.parent if existing == folder else existing
    if not os.access(within, os.W_OK | os.X_OK):
        raise OutputError(f"{output} cannot be written: no permission to write in {within}. Choose another --output.")
    return folder


def _around_here() -> list[Path]:
    """The current folder and all around it; none where it was removed."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return []
    return [here, *here.parents]


def _check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a place that is taken, unless it is a bundle, or nothing, and is to be replaced."""
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise OutputError(f"{folder} exists already; replace it with --overwrite, or choose another --output.")
    _own(folder, folder)
    for place, _, _ in os.walk(folder):
        if not os.access(place, os.W_OK | os.X_OK):
            raise OutputError(f"no permission to replace what {place} holds; choose another --output.")


def _own(folder: Path, name: Path) -> frozenset[str]:
    """The files of a bundle that is called ``name`` in messages, if it is one, or nothing, and holds nothing else."""
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


def _finish(staging: Path) -> None:
    """Make sure that what was written is a bundle and nothing else, and that it outlives a power cut."""
    bundle = Bundle.open(staging)
    for record in bundle.manifest.files:
        bundle.check(record, remembered=False)
    if unlisted := stranger(staging, own_files(staging) | {_UNFINISHED}):
        raise BundleError(f"{staging / unlisted} was written, but its manifest does not list it.")
    (staging / _UNFINISHED).unlink()
    for place, _, files in os.walk(staging):
        for name in files:
            sync_file(Path(place, name))
        sync_folder(Path(place))


def _swap(staging: Path, folder: Path, overwrite: bool) -> None:
    """Give a finished bundle its name; what had it is afterwards at ``staging``."""
    _check_free(folder, overwrite)
    if not folder.is_dir() or not any(folder.iterdir()):
        staging.rename(folder)  # which takes the place of an empty folder, and of nothing else
        return
    aside = _beside(folder, _OLD)
    exchange(staging, folder, aside)
    try:
        _own(staging, folder)  # a file may have come since it was looked at
    except OutputError:
        exchange(staging, folder, aside)
        raise


def _restore(folder: Path) -> None:
    """Under the lock: bring back a bundle that was set aside, where nothing stands in its place."""
    aside = _beside(folder, _OLD)
    if aside.is_dir() and not os.path.lexists(folder):
        with contextlib.suppress(BundleError):
            own_files(aside)
            aside.rename(folder)


def _sweep(folder: Path) -> None:
    """Under the lock: remove what stands beside ``folder`` from an export that ended, but no file of anybody else.

    Raises:
        OutputError: something is left.
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
    """Remove a folder that was begun here, its mark last, so that a kill on the way leaves it as one."""
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
