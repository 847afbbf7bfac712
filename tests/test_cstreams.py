"""What other threads and forked processes print through the C library while recordings are decoded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from audio_files import encoded, holed, speech_like

#: Threads that decode a file again and again, until ``stop``.
DECODING = """
import ctypes, os, signal, sys, threading, time
from w2v_models.errors import AudioError
from w2v_runtime.audio.reading import read_audio
stop = False
decoded = 0
def decode():
    global decoded
    while not stop:
        try:
            read_audio(sys.argv[1], 16000)
        except AudioError:
            pass
        decoded += 1
threads = [threading.Thread(target=decode) for _ in range(3)]
for thread in threads: thread.start()
library = ctypes.CDLL(None)
while decoded < 3: time.sleep(0.01)
"""
#: Lines through the C library's own ``stdout``, at moments of all kinds.
PRINTING = """
before = decoded
for number in range(2000):
    library.puts(b"line %d" % number)
    if number % 50 == 0: time.sleep(0.002)
assert decoded > before
stop = True
for thread in threads: thread.join()
library.fflush(None)
"""
#: Children forked at moments of all kinds, each of which prints, decodes and prints again.
FORKING = """
library.fflush(None)
for number in range(40):
    time.sleep(0.0007 * (number % 9))
    child = os.fork()
    if not child:
        signal.alarm(20)
        library.puts(b"child %d" % number)
        try:
            read_audio(sys.argv[1], 16000)
        except AudioError:
            pass
        library.puts(b"end %d" % number)
        library.fflush(None)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "a child hangs"
stop = True
for thread in threads: thread.join()
"""


def output_of(script: str, path: Path) -> list[str]:
    """Lines on standard output of a script that gets a path; nothing is said on standard error."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "AIFF"])
def test_what_other_threads_print_is_seen(tmp_path: Path, kind: str) -> None:
    """While decoders that print nothing are at work, every line of every thread comes through."""
    path = tmp_path / "a"
    path.write_bytes(encoded(tmp_path, speech_like(3), kind=kind))
    assert output_of(DECODING + PRINTING, path) == [f"line {number}" for number in range(2000)]


@pytest.mark.parametrize("damaged", [False, True])
def test_forked_processes_print_and_decode(tmp_path: Path, damaged: bool) -> None:
    """Though a decoder that prints is silenced in the parent, its children are not, and none of them hangs."""
    content = encoded(tmp_path, speech_like(3), kind="MP3")
    path = tmp_path / "a"
    path.write_bytes(holed(content, 1000) if damaged else content)
    expected = [line for number in range(40) for line in (f"child {number}", f"end {number}")]
    assert output_of(DECODING + FORKING, path) == expected


def test_a_process_prints_again_once_its_mp3_is_decoded(tmp_path: Path) -> None:
    """Silence ends with the decoding, also of a damaged file."""
    path = tmp_path / "a"
    path.write_bytes(holed(encoded(tmp_path, speech_like(3), kind="MP3"), 1000))
    script = DECODING + "stop = True\nfor thread in threads: thread.join()\n"
    assert output_of(script + "library.puts(b'end'); library.fflush(None)", path) == ["end"]
