"""Count the processors that this process may use, by CPU affinity and the quotas of its control groups (cgroups)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MEMBERSHIP = "proc/self/cgroup"
#: Mount points of the cpu controller of cgroup version 1, alone or together with cpuacct.
_MOUNTS_V1 = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/cpuacct,cpu")
_MOUNT_V2 = "sys/fs/cgroup"


def available(root: Path = Path("/")) -> int:
    """The number of processors that this process may use at once, at least 1.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    quota = cgroup_quota(root)
    return max(1, affinity() if quota is None else min(affinity(), math.ceil(quota)))


def affinity() -> int:
    """The number of processors in this process's CPU affinity, quotas aside."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """The CPU quota of the process's cgroup in processors (1.5 is one and a half), or None without a quota.

    A cgroup may use no more than any of its parents, so the smallest quota counts:
    https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu, and scheduler/sched-bwc.html for version 1.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    quotas = [_quota_v2(group) for group in _groups(root, "", (_MOUNT_V2,))]
    quotas += [_quota_v1(group) for group in _groups(root, "cpu", _MOUNTS_V1)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(root: Path, controller: str, mounts: tuple[str, ...]) -> Iterator[Path]:
    """The folders of this process's cgroup and of its parents.

    In a container the kernel's path may lie outside the mounted tree; the mount point is then the cgroup itself.
    """
    path = _membership(root / _MEMBERSHIP, controller).strip("/")
    for mount in mounts:
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield root / mount / group


def _membership(file: Path, controller: str) -> str:
    """The path of the process's cgroup, from lines ``number:controllers:path``; version 2 names no controller."""
    try:
        lines = [line.split(":", 2) for line in file.read_text(errors="surrogateescape").splitlines()]
    except OSError:
        return ""
    paths = [line[2] for line in lines if len(line) == 3 and controller in line[1].split(",")]
    return paths[0] if paths and ".." not in paths[0].split("/") else ""


def _quota_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float | None:
    try:
        return _ratio((group / "cpu.cfs_quota_us").read_text(), (group / "cpu.cfs_period_us").read_text())
    except OSError:
        return None


def _ratio(quota: str, period: str) -> float | None:
    """Quota in processors: microseconds of CPU time over the period in microseconds; None for ``max`` and -1."""
    try:
        ratio = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return ratio if ratio > 0 else None
