"""Lock an output for one run at a time, on network file systems too, by a file that only one process can create.

``flock`` is not used, since many network file systems ignore it. The lock file holds its owner's host, process id and
process namespace, and its modification time is renewed while it is held. So a stale lock of a killed run is recognised:
by its process, if that can be looked up on this host, else by its age. All names of one output share its lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from w2v_models.errors import OutputError, W2VError
from w2v_runtime.files.outputs import LOCK_SUFFIX, hidden

#: Times that a lock is asked for: it may be released, or removed as a stale one, while it is looked at.
_ATTEMPTS: Final = 3
_TOUCH_SECONDS: Final = 20.0
_STALE_SECONDS: Final = 180.0
#: Beyond every process id.
_PIDS: Final = 2**31
#: Start time of a process that exists but does not show when it started.
_ALIVE: Final = "alive"
#: What file systems without hard links answer.
_NO_LINKS: Final = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


class BusyError(OutputError):
    """Another run holds the lock."""


class Held:
    """A held lock; a thread renews its modification time."""

    def __init__(self, path: Path, me: dict[str, Any]) -> None:
        self._path, self._me = path, me
        self._released, self._lost = threading.Event(), False
        self._keeper = threading.Thread(target=self._touch, name="w2v-lock", daemon=True)
        self._keeper.start()

    def check(self) -> None:
        """Check that the lock is still held: another run may take it over while this process is stopped for minutes.

        Raises:
            W2VError: another run has taken the lock over.
        """
        self._look()
        if self._lost:
            raise W2VError(
                f"{self._path} was taken over by another run while this one stood still; that one goes on with what "
                "is finished."
            )

    def release(self) -> None:
        """Remove the lock, unless another run has taken it over."""
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
    """Hold the lock of the file or folder that ``output`` leads to while the block runs.

    Raises:
        BusyError: another run holds it.
        OutputError: the folder cannot be written.
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
    for _ in range(_ATTEMPTS):
        try:
            _create(path, json.dumps(me))
            return
        except FileExistsError:
            holder = _holder(path)
            if not os.path.lexists(path):
                continue  # it was released meanwhile
            if not _is_stale(path, holder):
                raise BusyError(
                    f"{output} is being written by process {holder.get('pid')} on {holder.get('host')}. "
                    f"Wait for it, or choose another --output (if that run is gone, remove {path})."
                ) from None
            _remove(path, holder)
    raise BusyError(f"{path} is being taken by another run; try again.")


def _unique_name(path: Path) -> Path:
    """A unique name beside a lock file; a process id is not unique, since a host has several process namespaces."""
    return path.with_name(f"{path.name}.{os.urandom(6).hex()}")


def _create(path: Path, text: str) -> None:
    """Create a file with its content atomically, by a hard link to a written file.

    Raises:
        FileExistsError: the file exists.
    """
    draft = _unique_name(path)
    try:
        draft.write_text(text)
        os.link(draft, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with path.open("x") as file:
            file.write(text)
    finally:
        draft.unlink(missing_ok=True)


def _remove(path: Path, stale: dict[str, Any]) -> None:
    """Remove a stale lock, unless another run removes it at this moment or has taken it over already.

    Whoever removes a lock that is not its own holds the claim meanwhile, a second file that only one process can
    create, so the lock that is removed is the one that was judged. The claim of a killed process gives way by its age.
    """
    claim = path.with_name(f"{path.name}.claim")
    try:
        _create(claim, "")
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if _age(claim) > _STALE_SECONDS:
                claim.unlink()
        return
    try:
        if _holder(path) == stale:
            path.unlink(missing_ok=True)
    finally:
        claim.unlink(missing_ok=True)


def _holder(path: Path) -> dict[str, Any]:
    """The owner in a lock file; empty if there is none or it cannot be read."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _is_stale(path: Path, holder: dict[str, Any]) -> bool:
    """Whether a lock's process is gone or, if it cannot be looked up from here, the lock was not renewed for long."""
    namespace = _namespace()
    if holder.get("host") == socket.gethostname() and namespace and holder.get("namespace") == namespace:
        pid = holder.get("pid")
        started = _started(pid) if type(pid) is int and 0 < pid < _PIDS else None
        return started is None or started not in (holder.get("started"), _ALIVE)
    try:
        return _age(path) > _STALE_SECONDS
    except FileNotFoundError:
        return True


def _age(path: Path) -> float:
    """Seconds since a file was last touched, by the clock of its file system."""
    return _file_system_time(path) - path.stat().st_mtime


def _file_system_time(path: Path) -> float:
    """The current time of the file system that holds ``path``: a server's clock may differ from this machine's."""
    draft = _unique_name(path)
    try:
        draft.write_text("")
        return draft.stat().st_mtime
    finally:
        draft.unlink(missing_ok=True)


def _namespace() -> str:
    """The id of this process's pid namespace and of the machine's boot; empty if unknown.

    Containers may share a host name, and each has process ids from 1 on.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """The kernel's start time of a process in this pid namespace, since a pid may be reused; None if it is gone."""
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
