"""A cache of large files whose SHA-256 was found right, so that not every start reads hundreds of megabytes.

A record is valid as long as the file's path, size, times and inode are unchanged. Records are in the user's own cache
folder, even if bundles are elsewhere, because nobody else can write a record there. They only save time, so a cache
folder that is missing, full, read-only or damaged is silently ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Final

#: Smaller files are always hashed, which takes milliseconds.
MIN_BYTES: Final = 2**20
MAX_RECORDS: Final = 1000
#: A file touched less than this before it was hashed can change again without changing its times: they have the
#: resolution of the file system, up to 2 s. git has the same problem: its Documentation/technical/racy-git.txt.
_SETTLED_NS: Final = 2 * 10**9
_MAX_RECORD_BYTES: Final = 64 * 2**10


def is_remembered(path: Path, status: os.stat_result, sha256: str) -> bool:
    """Whether this very file was found to have this SHA-256 and has not been touched since.

    Args:
        path: the file, absolute and without links.
        status: what ``lstat`` says of it now.
        sha256: the hash that the file should have, in hex.
    """
    place = _record_path(path)
    if place is None or status.st_size < MIN_BYTES:
        return False
    try:
        with place.open("rb") as file:
            return file.read(_MAX_RECORD_BYTES) == _record(path, status, sha256)
    except OSError:
        return False


def remember(path: Path, status: os.stat_result, sha256: str, hashed_ns: int) -> None:
    """Note that the file has this SHA-256, unless it is small, or may have changed while it was hashed or just before.

    Args:
        path: the file, absolute and without links.
        status: what ``lstat`` said of it before it was hashed.
        sha256: the hash that was computed, in hex.
        hashed_ns: when hashing began, in nanoseconds since the epoch.
    """
    place = _record_path(path)
    settled = hashed_ns - max(status.st_mtime_ns, status.st_ctime_ns) >= _SETTLED_NS
    if place is None or status.st_size < MIN_BYTES or not settled:
        return
    record = _record(path, status, sha256)
    with contextlib.suppress(OSError):
        if _record(path, path.lstat(), sha256) == record:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _replace(place, record)
            _forget_oldest(place.parent)


def forget(path: Path) -> None:
    """Remove the record of a file."""
    place = _record_path(path)
    if place is not None:
        with contextlib.suppress(OSError):
            place.unlink()


def folder() -> Path | None:
    """Where records live: below ``$XDG_CACHE_HOME`` or ``~/.cache``; None for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "w2v-onnx" / ".verified" if os.path.isabs(cache) else None


def _record_path(path: Path) -> Path | None:
    records = folder()
    return None if records is None else records / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"


def _record(path: Path, status: os.stat_result, sha256: str) -> bytes:
    """A record as it is stored; its ctime differs after a change even if the modification time was set back."""
    facts = {
        "path": os.fspath(path),
        "size": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "changed_ns": status.st_ctime_ns,
        "inode": status.st_ino,
        "device": status.st_dev,
        "sha256": sha256,
    }
    return json.dumps(facts).encode()


def _replace(place: Path, content: bytes) -> None:
    """Write a file atomically, even if another process writes it at the same time."""
    handle, draft = tempfile.mkstemp(dir=place.parent, suffix=".new")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(draft, place)
    except OSError:
        os.unlink(draft)
        raise


def _forget_oldest(records: Path) -> None:
    with os.scandir(records) as entries:
        ages = sorted((entry.stat().st_mtime_ns, entry.path) for entry in entries)
    for _, oldest in ages[:-MAX_RECORDS]:
        os.unlink(oldest)
