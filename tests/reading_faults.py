"""Real processes in which the system fails to read some files: a library that stands before the C library's calls."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char name[256];
static long long from = -1, left;
static int code;

/* Reads of files whose path holds the name fail from this byte on, so many times (-1: always). */
void fail_reading(const char *part, long long start, long long times, int number)
{
    snprintf(name, sizeof name, "%s", part);
    from = start; left = times; code = number;
}

static int hit(int fd)
{
    char link[64], path[4096];
    ssize_t length;
    if (from < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, name) != NULL;
}

/* How many bytes may be read, as of a disk whose first bad block is in the middle; -1 for none. */
static ssize_t allowed(int fd, size_t wanted, long long at)
{
    if (left == 0 || !hit(fd) || at + (long long)wanted <= from) return wanted;
    if (at < from) return from - at;
    if (left > 0) left--;
    errno = code;
    return -1;
}

ssize_t read(int fd, void *buffer, size_t wanted)
{
    static ssize_t (*real)(int, void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "read");
    off_t at = from < 0 ? -1 : lseek(fd, 0, SEEK_CUR);
    ssize_t length = at < 0 ? (ssize_t)wanted : allowed(fd, wanted, at);
    return length < 0 ? -1 : real(fd, buffer, length);
}

#define PREAD(NAME) \
    ssize_t NAME(int fd, void *buffer, size_t wanted, off_t at) \
    { \
        static ssize_t (*real)(int, void *, size_t, off_t); \
        if (!real) real = dlsym(RTLD_NEXT, #NAME); \
        ssize_t length = from < 0 ? (ssize_t)wanted : allowed(fd, wanted, at); \
        return length < 0 ? -1 : real(fd, buffer, length, at); \
    }
PREAD(pread)
PREAD(pread64)
"""


def build(folder: Path) -> Path:
    """The library, to be named in ``LD_PRELOAD``; it does nothing until ``fail_reading`` is called."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not here")
    source, library = folder / "faults.c", folder / "faults.so"
    source.write_text(_SOURCE)
    done = subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], capture_output=True)
    if done.returncode:
        pytest.skip("gcc cannot build a library here")
    return library


def failing(name: str, start: int, number: str = "EIO", times: int = -1) -> str:
    """The code that makes reads of files whose path holds ``name`` fail from byte ``start`` on."""
    return (
        "import ctypes, errno\n"
        "_fail = ctypes.CDLL(None).fail_reading\n"
        "_fail.argtypes = ctypes.c_char_p, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_int\n"
        f"_fail({name.encode()!r}, {start}, {times}, errno.{number})\n"
    )
