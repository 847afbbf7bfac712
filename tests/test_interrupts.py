"""Runs that are killed, interrupted, or find the disk full: real signals, real limits, and ``--resume`` after them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from commands import (
    assert_same,
    embed,
    finish,
    journal_of,
    left_beside,
    recorded,
    results,
    start,
    values_of,
    wait_for,
    write_corpus,
)
from conftest import speech

#: Batches of these seconds of padded audio, so that a short run has many.
SMALL_BATCHES = ("--batch-seconds", "6")
FILES = 48


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Recordings for a run of about two seconds."""
    return write_corpus(tmp_path_factory.mktemp("interrupts") / "corpus", FILES, median=1.8)


@pytest.fixture(scope="module")
def uninterrupted(bundles, corpus, tmp_path_factory):
    """Their finished output."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out.npz"
    assert embed(corpus, "-m", bundles("base"), "-o", output, *SMALL_BATCHES)[0] == 0
    return output


def logged(log: Path) -> str:
    """Code that makes a process append the names of each batch that it has embedded to ``log``.

    Each batch takes a tenth of a second longer, so that kills fall into the run on any machine.
    """
    return f"""
import json, os, time
from w2v_runtime.embedder import Embedder
embed_batch = Embedder.embed_batch
def logged(self, paths, *arguments):
    results = embed_batch(self, paths, *arguments)
    time.sleep(0.1)
    with open({str(log)!r}, "ab", buffering=0) as file:
        file.write(json.dumps(paths).encode() + b"\\n")
    return results
Embedder.embed_batch = logged
"""


def test_a_killed_run_completes_and_repeats_no_more_than_a_batch(bundles, corpus, uninterrupted, tmp_path):
    """After kill -9 at five moments: nothing under the output's name, nothing recorded is lost, equal in the end."""
    output, log = tmp_path / "out.npz", tmp_path / "log"
    arguments = (corpus, "-m", bundles("base"), "-o", output, "--resume", *SMALL_BATCHES)
    chance, before = random.Random(0), list[str]()
    for kill in range(5):
        process = start(*arguments, before=logged(log))
        # The first kill falls into the start of the process, the others each some files after the last.
        reach = 0 if kill == 0 else len(before) + chance.randint(1, 8)
        wait_for(lambda reach=reach: len(recorded(output)) >= reach, process)
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
        now = recorded(output)
        assert now[: len(before)] == before
        before = now
    assert 4 <= len(before) < FILES
    code, errors = embed(*arguments, before=logged(log))
    assert code == 0, errors
    assert f"{len(before)} files were finished already, {FILES - len(before)} files embedded" in errors
    assert_same(output, uninterrupted)
    assert left_beside(output) == [".out.npz.w2v-journal", "out.npz"]
    batches = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({path for batch in batches for path in batch}) == FILES
    assert sum(map(len, batches)) - FILES <= 5 * max(map(len, batches))


@pytest.mark.parametrize(("function", "number"), [("fsync", 5), ("replace", 1), ("replace", 2)])
def test_a_run_killed_at_a_write_to_the_disk_completes(bundles, recordings, tmp_path, function, number):
    """Killed as it records a batch, names its output or rewrites its journal, a run can be completed."""
    output = tmp_path / "out.npz"
    arguments = (recordings, "-m", bundles("base"), "-o", output, "--batch-seconds", "2")
    fatal = f"""
import os
calls, call = [], os.{function}
def fatal(*arguments):
    calls.append(arguments)
    os.kill(os.getpid(), 9) if len(calls) == {number} else call(*arguments)
os.{function} = fatal
"""
    process = start(*arguments, before=fatal)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    code, errors = embed(*arguments, "--resume")
    assert code == 0, errors
    names, values = results(output)
    assert names == ["a.wav", "d.wav", "e.wav", "a.wav", "c.flac"]
    assert np.isfinite(values).all()
    assert left_beside(output) == [".out.npz.w2v-journal", "out.npz"]


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory):
    """Ten hours of audio in recordings of half a minute: more than the fastest machine embeds within seconds."""
    folder = tmp_path_factory.mktemp("long") / "corpus"
    folder.mkdir()
    soundfile.write(folder / "0000.wav", speech(30), 16000)
    for index in range(1, 1200):
        os.link(folder / "0000.wav", folder / f"{index:04}.wav")
    return folder


def members(group: int) -> list[int]:
    """Processes of a process group that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_a_run_within_seconds(bundles, long_corpus, tmp_path, number):
    """Ctrl-C and SIGTERM in the middle of a long run: exit 130 within 3 s, no process left, no lock.

    That a batch in the engine is ended too, ``test_engine_runs.py`` shows.
    """
    output = tmp_path / "out.npz"
    process = start(long_corpus, "-m", bundles("base"), "-o", output, "--batch-seconds", "300", "--threads", "1")
    wait_for(values_of(output).exists, process)
    time.sleep(1.5)
    process.send_signal(number)
    sent = time.monotonic()
    code, errors = finish(process)
    assert time.monotonic() - sent < 3
    assert (code, errors.splitlines()[-1]) == (130, "w2v-embed: interrupted")
    assert members(process.pid) == []
    assert left_beside(output) == [".out.npz.w2v-journal", ".out.npz.w2v-values"]


def test_an_interrupt_keeps_what_was_finished(bundles, corpus, uninterrupted, tmp_path):
    """Interrupted between batches, a run keeps them all, and --resume goes on from there."""
    output = tmp_path / "out.npz"
    arguments = (corpus, "-m", bundles("base"), "-o", output, *SMALL_BATCHES)
    process = start(*arguments, before=logged(tmp_path / "log"))
    wait_for(lambda: len(recorded(output)) > 10, process)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    kept = len(recorded(output))
    assert 10 < kept < FILES
    code, errors = embed(*arguments, "--resume")
    assert code == 0
    assert f"{kept} files were finished already, {FILES - kept} files embedded" in errors
    assert_same(output, uninterrupted)


def limited(size: int) -> str:
    """Code that lets no file of a process grow beyond ``size`` bytes, as a full disk would not."""
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"


@pytest.fixture(scope="module")
def frames(bundles, corpus, tmp_path_factory):
    """Their frames, which take more room."""
    output = tmp_path_factory.mktemp("frames") / "out.npz"
    assert embed(corpus, "-m", bundles("base"), "-o", output, "--level", "frame", *SMALL_BATCHES)[0] == 0
    return output


@pytest.mark.parametrize("share", [0.5, 1.01])
def test_a_full_disk_stops_the_run_and_loses_nothing(bundles, corpus, frames, tmp_path, share):
    """No room for the results or for the output: exit 1 with the reason; with room, --resume completes."""
    output = tmp_path / "out.npz"
    arguments = (corpus, "-m", bundles("base"), "--level", "frame", *SMALL_BATCHES)
    with np.load(frames) as stored:
        size = stored["embeddings"].nbytes + stored["logits"].nbytes
    code, errors = embed(*arguments, "-o", output, before=limited(round(share * size)))
    assert code == 1, errors
    assert "File too large" in errors
    assert "--resume" in errors
    assert left_beside(output) == [".out.npz.w2v-journal", ".out.npz.w2v-values"]
    kept = len(recorded(output))
    assert (kept > FILES / 4) if share < 1 else (kept == FILES)
    code, errors = embed(*arguments, "-o", output, "--resume")
    assert code == 0, errors
    assert f"{kept} files were finished already" in errors
    assert_same(output, frames)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_full_file_system_stops_the_run_and_loses_nothing(bundles, corpus, tmp_path):
    """The same on a small file system that is full and then has room again."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], check=False).returncode:
        pytest.skip("mounting is not possible here")
    try:
        (place / "other").write_bytes(bytes(112 * 1024))
        arguments = (corpus, "-m", bundles("base"), "-o", place / "out.npz", *SMALL_BATCHES)
        code, errors = embed(*arguments)
        assert code == 1, errors
        assert "No space left on device" in errors
        assert not (place / "out.npz").exists()
        kept = len(recorded(place / "out.npz"))
        assert 0 < kept < FILES
        (place / "other").unlink()
        code, errors = embed(*arguments, "--resume")
        assert code == 0, errors
        assert f"{kept} files were finished already" in errors
        assert len(results(place / "out.npz")[0]) == FILES
    finally:
        subprocess.run(["umount", place], check=True)


def test_an_interrupted_replacement_leaves_the_earlier_output(bundles, corpus, uninterrupted, tmp_path):
    """--overwrite takes effect when the new output is complete; until then the earlier one stands as it was."""
    output = tmp_path / "out.npz"
    shutil.copy(uninterrupted, output)
    shutil.copy(journal_of(uninterrupted), journal_of(output))
    before = output.read_bytes()
    process = start(corpus, "-m", bundles("base"), "-o", output, "--overwrite", "--pooling", "max", *SMALL_BATCHES)
    wait_for(lambda: values_of(output).exists() and 0 < len(recorded(output)) < FILES, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert output.read_bytes() == before
