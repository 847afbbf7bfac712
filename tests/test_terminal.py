"""What a run says, and where: terminals, pipes, homes that are missing."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading

import pytest

from commands import MAIN, embed, results, write_corpus


def on_terminal(*arguments: object, **environment: str) -> tuple[int, str]:
    """Run the command with a terminal for its standard error: its exit code and what the terminal got."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=end,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "140"} | environment,
    )
    os.close(end)
    limit = threading.Timer(60, process.kill)
    limit.start()
    shown = b""
    try:
        while block := os.read(terminal, 4096):
            shown += block
    except OSError:  # how Linux says that the other end was closed
        pass
    output, _ = process.communicate(timeout=60)
    limit.cancel()
    assert output == b""
    return process.returncode, shown.decode()


def test_a_terminal_shows_files_and_time_left(bundles, recordings, tmp_path):
    """Files done of all, hours, speed and time left while it runs; the summary at the end."""
    code, shown = on_terminal(
        recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz", "--batch-seconds", "1", COLORTERM="truecolor"
    )
    assert code == 0, shown
    assert "5/5" in shown
    assert re.search(r"files · 0\.00 h · [\d.]+ × real time", shown)
    assert re.search(r"\d:\d\d:\d\d", shown)
    assert "5 files embedded" in shown.splitlines()[-1]
    assert re.search(r"\x1b\[[\d;]*3[0-8]", shown)


def test_no_color_is_honoured(bundles, recordings, tmp_path):
    """With NO_COLOR the progress has no colours."""
    code, shown = on_terminal(recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz", NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[(?:[\d;]*;)?(?:3[0-8]|4[0-8]|9[0-7])[;m]", shown)


@pytest.mark.parametrize("choice", ["--quiet", "--no-progress"])
def test_a_terminal_can_be_spared(bundles, recordings, tmp_path, choice):
    """--quiet says nothing at all, --no-progress only the summary."""
    code, shown = on_terminal(recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz", choice)
    assert code == 0
    assert len(shown.splitlines()) == (0 if choice == "--quiet" else 1)
    assert "\x1b" not in shown


def test_a_list_from_a_pipe_is_read_once(bundles, tmp_path):
    """The progress does not count a list that can be read only once, and every input of it is embedded."""
    corpus = write_corpus(tmp_path / "corpus", 40, median=0.3)
    os.mkfifo(tmp_path / "list")
    names = "".join(f"{corpus}/{index:03}.wav\n" for index in range(40))
    writer = threading.Thread(target=(tmp_path / "list").write_text, args=(names,), daemon=True)
    writer.start()
    code, shown = on_terminal("--files-from", tmp_path / "list", "-m", bundles("base"), "-o", tmp_path / "out.npz")
    assert code == 0, shown[-300:]
    writer.join()
    assert results(tmp_path / "out.npz")[0] == [f"{index:03}.wav" for index in range(40)]


def test_a_pipe_gets_one_line(bundles, recordings, tmp_path):
    """Without a terminal there is the summary and no progress, and with --quiet nothing."""
    code, errors = embed(recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz", FORCE_COLOR=None)
    assert code == 0
    assert len(errors.splitlines()) == 1
    assert "\x1b" not in errors
    assert "\r" not in errors
    assert embed(recordings, "-m", bundles("base"), "-o", tmp_path / "quiet.npz", "--quiet") == (0, "")


@pytest.mark.parametrize("home", [None, "/proc/none"])
def test_a_home_is_not_needed(bundles, recordings, tmp_path, home):
    """A missing, unusable or unset HOME is no matter where the model is named."""
    code, errors = embed(
        recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz", HOME=home, XDG_CACHE_HOME=None, W2V_HOME=None
    )
    assert code == 0, errors
