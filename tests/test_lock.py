"""One run at a time on an output: who holds its lock, and when a lock that was left behind gives way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import embed, finish, left_beside, recorded, start, wait_for, write_corpus
from w2v_models.errors import OutputError
from w2v_runtime.files import lock
from w2v_runtime.files.lock import locked


def write_lock(output, **holder):
    """A lock as another process would have left it."""
    path = output.with_name(f".{output.name}.w2v-lock")
    path.write_text(json.dumps(holder))
    return path


def test_the_second_of_two_runs_on_an_output_is_refused(bundles, tmp_path):
    """Exit 2 with the process that holds it; the first goes on and completes."""
    corpus, output = write_corpus(tmp_path / "corpus", 30), tmp_path / "out.npz"
    arguments = (corpus, "-m", bundles("base"), "-o", output, "--batch-seconds", "3")
    first = start(*arguments, before=SLOW)
    wait_for(lambda: len(recorded(output)) > 0, first)
    first.send_signal(signal.SIGSTOP)
    for choice in ("--resume", "--overwrite"):
        code, errors = embed(*arguments, choice)
        assert code == 2
        assert f"process {first.pid} on {socket.gethostname()}" in errors
    first.send_signal(signal.SIGCONT)
    assert finish(first)[0] == 0
    assert left_beside(output) == [".out.npz.w2v-journal", "out.npz"]


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    """A lock whose process is gone, or whose number another process has now, gives way at once."""
    output = tmp_path / "out.npz"
    process = subprocess.Popen(
        [sys.executable, "-c", f"""
import pathlib, time
from w2v_runtime.files.lock import locked
with locked(pathlib.Path({str(output)!r})):
    time.sleep(60)
"""]
    )  # fmt: skip
    wait_for((tmp_path / ".out.npz.w2v-lock").exists, process)
    with pytest.raises(OutputError, match=f"process {process.pid} "), locked(output):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    with locked(output):
        assert json.loads((tmp_path / ".out.npz.w2v-lock").read_text())["pid"] == os.getpid()
    write_lock(output, host=socket.gethostname(), namespace=lock._namespace(), pid=os.getpid(), started="1")
    with locked(output):
        pass
    assert list(tmp_path.iterdir()) == []


HOLD = """
import pathlib, sys, time
from w2v_runtime.files.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace of its own takes root")
def test_the_lock_of_another_process_namespace_is_respected(tmp_path):
    """Containers that share a host name count their processes anew, so that a number there means nothing here."""
    output = tmp_path / "out.npz"
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", HOLD]
    if subprocess.run([*container[:-3], "true"], check=False, capture_output=True).returncode:
        pytest.skip("namespaces are not to be had here")
    inside = subprocess.Popen([*container, output], stdout=subprocess.PIPE, text=True)
    try:
        assert inside.stdout.readline() == "held\n"
        holder = json.loads((tmp_path / ".out.npz.w2v-lock").read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), 1)
        with pytest.raises(OutputError, match="process 1 on"), locked(output):
            pass
    finally:
        inside.kill()
        inside.wait(timeout=10)
    # Nobody touches it any more, which only its age can tell from here.
    with pytest.raises(OutputError, match="process 1 on"), locked(output):
        pass
    os.utime(tmp_path / ".out.npz.w2v-lock", (0, 0))
    with locked(output):
        other = subprocess.run([*container, output], capture_output=True, text=True, timeout=60, check=False)
    assert other.returncode == 1
    assert f"is being written by process {os.getpid()} on" in other.stderr


def test_names_that_lead_to_one_output_share_its_lock(tmp_path, monkeypatch):
    """A link, a name through a link to the folder and a relative name are the output itself."""
    output = tmp_path / "data" / "out.npz"
    output.parent.mkdir()
    (tmp_path / "link.npz").symlink_to(output)
    (tmp_path / "folder").symlink_to(output.parent)
    monkeypatch.chdir(output.parent)
    with locked(tmp_path / "link.npz"):
        for name in (
            output,
            tmp_path / "link.npz",
            tmp_path / "folder" / "out.npz",
            Path("out.npz"),
            Path("./out.npz"),
        ):
            with pytest.raises(OutputError, match="is being written by"), locked(name):
                pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "folder", "link.npz"]


def test_a_run_that_lost_its_lock_writes_no_more(bundles, tmp_path):
    """Stopped for so long that another took its output over, a run ends with exit code 1 and leaves the other alone."""
    corpus, output = write_corpus(tmp_path / "corpus", 40), tmp_path / "out.npz"
    before = "import w2v_runtime.files.lock as lock\nlock._TOUCH_SECONDS = 0.01\n"
    process = start(corpus, "-m", bundles("base"), "-o", output, "--batch-seconds", "1", before=before + SLOW)
    wait_for(lambda: len(recorded(output)) > 2, process)
    process.send_signal(signal.SIGSTOP)
    other = write_lock(output, host="elsewhere", pid=1, started="1")
    process.send_signal(signal.SIGCONT)
    code, errors = finish(process)
    assert code == 1
    assert "was taken over by another run" in errors
    assert json.loads(other.read_text())["host"] == "elsewhere"
    assert not output.exists()


#: Code that makes each batch of a run take longer.
SLOW = """
import time
from w2v_runtime.embedder import Embedder
embed_batch = Embedder.embed_batch
def slow(*arguments):
    time.sleep(0.1)
    return embed_batch(*arguments)
Embedder.embed_batch = slow
"""


def test_age_is_told_by_the_clock_of_the_file_system(tmp_path, monkeypatch):
    """A machine whose clock is an hour ahead of the file server's does not take a fresh lock for an old one."""
    write_lock(tmp_path / "out.npz", host="elsewhere", pid=1, started="1")
    monkeypatch.setattr(time, "time", lambda: time.time_ns() / 1e9 + 3600)
    with pytest.raises(OutputError, match="process 1 on elsewhere"), locked(tmp_path / "out.npz"):
        pass


def test_the_lock_of_another_host_gives_way_when_it_is_old(tmp_path):
    """Its process cannot be asked for, so its age decides: it is touched as long as it is held."""
    path = write_lock(tmp_path / "out.npz", host="elsewhere", pid=1, started="1")
    with pytest.raises(OutputError, match="process 1 on elsewhere"), locked(tmp_path / "out.npz"):
        pass
    hour_ago = time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))
    with locked(tmp_path / "out.npz"):
        assert json.loads(path.read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_lock_is_judged_by_its_age(tmp_path, content):
    """It says nothing of its holder, so it is respected while it is fresh."""
    path = tmp_path / ".out.npz.w2v-lock"
    path.write_text(content)
    with pytest.raises(OutputError, match=r"remove .*\.out\.npz\.w2v-lock"), locked(tmp_path / "out.npz"):
        pass
    os.utime(path, (0, 0))
    with locked(tmp_path / "out.npz"):
        pass


def test_a_held_lock_is_touched(tmp_path, monkeypatch):
    """Other hosts see by its time that it is held."""
    monkeypatch.setattr(lock, "_TOUCH_SECONDS", 0.01)
    path = tmp_path / ".out.npz.w2v-lock"
    with locked(tmp_path / "out.npz"):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 60


def test_a_lock_that_was_taken_over_is_left_to_its_new_holder(tmp_path):
    """A run that slept so long that another took over its output does not remove the other's lock."""
    path = tmp_path / ".out.npz.w2v-lock"
    with locked(tmp_path / "out.npz"):
        write_lock(tmp_path / "out.npz", host="elsewhere", pid=1, started="1")
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_the_slower_of_two_that_take_a_stale_lock_over_yields(tmp_path, monkeypatch):
    """It finds the faster one's lock in place of the stale one, and puts it back."""
    path = write_lock(tmp_path / "out.npz", host="elsewhere", pid=1, started="1")
    os.utime(path, (0, 0))
    is_stale = lock._is_stale

    def overtaken(path, holder):
        """Judge the stale lock, then let another run take it over."""
        judgement = is_stale(path, holder)
        if judgement:
            write_lock(tmp_path / "out.npz", host="faster", pid=2, started="2")
        return judgement

    monkeypatch.setattr(lock, "_is_stale", overtaken)
    with pytest.raises(OutputError, match="process 2 on faster"), locked(tmp_path / "out.npz"):
        pass
    assert json.loads(path.read_text())["host"] == "faster"


def test_a_stale_lock_is_removed_by_one_run_at_a_time(tmp_path):
    """While another run is about to remove it, it is not touched; the claim of a run that was killed gives way."""
    output = tmp_path / "out.npz"
    path = write_lock(output, host="elsewhere", pid=1, started="1")
    os.utime(path, (0, 0))
    claim = path.with_name(f"{path.name}.claim")
    claim.touch()
    with pytest.raises(OutputError, match="is being taken by another run; try again"), locked(output):
        pass
    assert json.loads(path.read_text())["host"] == "elsewhere"
    os.utime(claim, (0, 0))
    with locked(output):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("pid", [0, -1, 2**31, 10**30, True, "1"])
def test_a_lock_with_an_impossible_process_is_stale(tmp_path, pid):
    """A damaged lock of this machine names no process, so it gives way."""
    write_lock(tmp_path / "out.npz", host=socket.gethostname(), pid=pid, started="1", namespace=lock._namespace())
    with locked(tmp_path / "out.npz"):
        pass


def test_one_of_many_takes_a_stale_lock_over(tmp_path):
    """Processes that start together on an output with a stale lock: never two at a time."""
    code = f"""
import pathlib, time
from w2v_models.errors import OutputError
from w2v_runtime.files.lock import locked
inside = pathlib.Path({str(tmp_path)!r}) / "inside"
for attempt in range(200):
    try:
        with locked(inside.with_name("out.npz")):
            inside.touch(exist_ok=False)
            time.sleep(0.001)
            inside.unlink()
    except OutputError:
        time.sleep(0.001)
"""
    gone = {"host": socket.gethostname(), "namespace": lock._namespace(), "pid": 2**22 + 1, "started": "1"}
    write_lock(tmp_path / "out.npz", **gone)
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
