"""One run at a time on an output, on network file systems too: a file that only one process can create.

No ``flock``, which many network file systems ignore. The lock names its host and process and is touched while it is
held, so that one left behind by a killed run is recognised: on the same host by the process, elsewhere by its age.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from w2v_models.errors import OutputError

LOCK_SUFFIX: Final = ".lock"
_TOUCH_SECONDS: Final = 20.0
_STALE_SECONDS: Final = 180.0


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of ``output`` while the block runs.

    Raises:
        OutputError: another run holds it, or the folder cannot be written.
    """
    path = output.with_name(output.name + LOCK_SUFFIX)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    try:
        _acquire(path, me)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be written: {error.strerror}. Choose another --output.") from None
    released = threading.Event()
    keeper = threading.Thread(target=_touch, args=(path, released), name="w2v-lock", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        released.set()
        keeper.join()
        if _holder(path) == me:
            path.unlink(missing_ok=True)


def _acquire(path: Path, me: dict[str, Any]) -> None:
    for _ in range(2):
        try:
            _create(path, json.dumps(me))
            return
        except FileExistsError:
            holder = _holder(path)
            if not _is_stale(path, holder):
                raise OutputError(
                    f"{path.with_suffix('')} is being written by process {holder.get('pid')} on "
                    f"{holder.get('host')}. Wait for it, or choose another --output "
                    f"(if that run is gone, remove {path})."
                ) from None
            _remove(path, holder)
    raise OutputError(f"{path} is being taken by another run; try again.")


def _create(path: Path, text: str) -> None:
    """Create a file with its content in one step, failing if it exists: a link to a written file."""
    draft = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.new")
    try:
        draft.write_text(text)
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("x") as file:
            file.write(text)
    finally:
        draft.unlink(missing_ok=True)


def _remove(path: Path, stale: dict[str, Any]) -> None:
    """Remove a stale lock. Of two runs that find one, the slower may catch the other's new lock: it puts that back."""
    aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _holder(aside) == stale:
            aside.unlink()
        else:
            aside.rename(path)


def _holder(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _is_stale(path: Path, holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname():
        pid = holder.get("pid")
        return not isinstance(pid, int) or _started(pid) is None or _started(pid) != holder.get("started")
    try:
        return time.time() - path.stat().st_mtime > _STALE_SECONDS
    except FileNotFoundError:
        return True


def _started(pid: int) -> str | None:
    """When a process of this host started, as the kernel counts it; None if there is none. A pid may be used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return "alive"
    return "alive"


def _touch(path: Path, released: threading.Event) -> None:
    while not released.wait(_TOUCH_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
