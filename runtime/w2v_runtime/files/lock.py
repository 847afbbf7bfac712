"""One run at a time on an output, on network file systems too: a file that only one process can create.

No ``flock``, which many network file systems ignore. The lock tells its host, process and process namespace and is
touched while it is held, so that one left behind by a killed run is recognised: by the process, where it can be asked
for, else by its age. Names that lead to one output share its lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from w2v_models.errors import OutputError, W2VError
from w2v_runtime.files.outputs import LOCK_SUFFIX, hidden

_TOUCH_SECONDS: Final = 20.0
_STALE_SECONDS: Final = 180.0
#: Beyond every process id.
_PIDS: Final = 2**31
#: Of a process that is there, but does not show when it started.
_ALIVE: Final = "alive"


class Held:
    """A lock while it is held."""

    def __init__(self, path: Path, me: dict[str, Any]) -> None:
        self._path, self._me = path, me
        self._released, self._lost = threading.Event(), False
        self._keeper = threading.Thread(target=self._touch, name="w2v-lock", daemon=True)
        self._keeper.start()

    def check(self) -> None:
        """Make sure that no other run took the output over, as one may while this process is stopped for minutes.

        Raises:
            W2VError: one did.
        """
        self._look()
        if self._lost:
            raise W2VError(
                f"{self._path} was taken over by another run while this one stood still; that one goes on with what "
                "is finished."
            )

    def release(self) -> None:
        """Give the output free, unless it is another's by now."""
        self._released.set()
        self._keeper.join()
        if _holder(self._path) == self._me:
            self._path.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._released.wait(_TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                self._look()
                if not self._lost:
                    os.utime(self._path)

    def _look(self) -> None:
        holder = _holder(self._path)
        self._lost = self._lost or (bool(holder) and holder != self._me)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[Held]:
    """Hold the lock of what ``output`` leads to while the block runs.

    Raises:
        OutputError: another run holds it, or the folder cannot be written.
    """
    path = hidden(output, LOCK_SUFFIX)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "namespace": _namespace()}
    try:
        _acquire(path, output, me)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be written: {error.strerror}. Choose another --output.") from None
    held = Held(path, me)
    try:
        yield held
    finally:
        held.release()


def _acquire(path: Path, output: Path, me: dict[str, Any]) -> None:
    for _ in range(2):
        try:
            _create(path, json.dumps(me))
            return
        except FileExistsError:
            holder = _holder(path)
            if not _is_stale(path, holder):
                raise OutputError(
                    f"{output} is being written by process {holder.get('pid')} on {holder.get('host')}. "
                    f"Wait for it, or choose another --output (if that run is gone, remove {path})."
                ) from None
            _remove(path, holder)
    raise OutputError(f"{path} is being taken by another run; try again.")


def _draft(path: Path) -> Path:
    """A name beside a lock that nobody else uses; process ids would not do, since one host has several namespaces."""
    return path.with_name(f"{path.name}.{os.urandom(6).hex()}")


def _create(path: Path, text: str) -> None:
    """Create a file with its content in one step, failing if it exists: a link to a written file."""
    draft = _draft(path)
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
    """Remove a stale lock. Of two runs that find one, the slower may catch the other's new lock: it puts that back.

    Where a third run has made its own lock by then, that one stays, and the other run finds out that it lost its lock.
    """
    aside = _draft(path)
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _holder(aside) == stale:
            aside.unlink()
        else:
            _put_back(aside, path)


def _put_back(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path)
        aside.unlink()
    except FileExistsError:
        aside.unlink()
    except OSError:  # a file system without hard links
        aside.rename(path)


def _holder(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _is_stale(path: Path, holder: dict[str, Any]) -> bool:
    """Whether a lock's process is known to be gone, or, where it cannot be asked for, nobody touched it for long."""
    namespace = _namespace()
    if holder.get("host") == socket.gethostname() and namespace and holder.get("namespace") == namespace:
        pid = holder.get("pid")
        started = _started(pid) if isinstance(pid, int) and 0 < pid < _PIDS else None
        return started is None or started not in (holder.get("started"), _ALIVE)
    try:
        return _file_system_time(path) - path.stat().st_mtime > _STALE_SECONDS
    except FileNotFoundError:
        return True


def _file_system_time(path: Path) -> float:
    """The time by the clock that dates the files beside ``path``, which may be a server's and differ from ours."""
    draft = _draft(path)
    try:
        draft.write_text("")
        return draft.stat().st_mtime
    finally:
        draft.unlink(missing_ok=True)


def _namespace() -> str:
    """The namespace that process ids of this process are counted in, and the boot that it belongs to; "" if unknown.

    Containers may share a host name, and each counts its processes from 1.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process of this namespace started, as the kernel counts it: a pid may be used again. None without one."""
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
        return _ALIVE
    return _ALIVE
