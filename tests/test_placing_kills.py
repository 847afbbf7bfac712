"""Processes that are killed or overtaken while they put a bundle at its place: one of two bundles is always there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from commands import wait_for
from placings import assert_whole, place, start, write
from w2v_runtime.bundles import library


@pytest.fixture
def old(bundles, tmp_path) -> Path:
    """A bundle that may be replaced."""
    return Path(shutil.copytree(bundles("base"), tmp_path / "place" / "bundle"))


def fatal(target: str, number: int, after: bool = False) -> str:
    """Code that kills its process at the ``number``-th call of a function, before or after what that does."""
    module = target.rpartition(".")[0]
    return f"""
import os, {module}
calls, call = [], {target}
def fatal(*arguments, **named):
    calls.append(arguments)
    if len(calls) == {number} and not {after}:
        os.kill(os.getpid(), 9)
    answer = call(*arguments, **named)
    if len(calls) == {number}:
        os.kill(os.getpid(), 9)
    return answer
{target} = fatal
"""


IN_STEPS = "import w2v_runtime.files.exchange as exchange\nexchange.exchanged_at_once = lambda first, second: False\n"
KILLS = {
    "as it begins": (fatal("os.mkdir", 2, after=True), "old"),
    "as the manifest comes": (fatal("shutil.copy", 1), "old"),
    "as it is made durable": (fatal("os.fsync", 3), "old"),
    "before the exchange": (fatal("w2v_runtime.files.exchange.exchanged_at_once", 1), "old"),
    "after the exchange": (fatal("w2v_runtime.files.exchange.exchanged_at_once", 1, after=True), "new"),
    "as the old files go": (fatal("w2v_runtime.bundles.placing.remove", 1), "new"),
    "between the old files": (fatal("os.rmdir", 1), "new"),
    "before the first rename": (IN_STEPS + fatal("os.rename", 1), "old"),
    "after the first rename": (IN_STEPS + fatal("os.rename", 1, after=True), "old"),
    "before the second rename": (IN_STEPS + fatal("os.rename", 2), "old"),
    "after the second rename": (IN_STEPS + fatal("os.rename", 2, after=True), "new"),
    "after the third rename": (IN_STEPS + fatal("os.rename", 3, after=True), "new"),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_leaves_one_of_the_two_bundles(bundles, old, monkeypatch, moment):
    """At any point: whoever looks next finds the old or the new one, whole and alone; the next export clears the rest.

    The two that stand between the first and the second rename are found by what a user would do next.
    """
    before, left = KILLS[moment]
    process = start(bundles("emotion"), old, before=before)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    monkeypatch.setenv("W2V_HOME", str(old.parent))
    monkeypatch.delenv("W2V_MODEL", raising=False)
    expected = bundles("base" if left == "old" else "emotion")
    listed = subprocess.run(
        [sys.executable, "-c", "from w2v_runtime.commands.models import main; main()", "list", "--json"],
        capture_output=True,
        check=True,
    )
    assert [entry["folder"] for entry in json.loads(listed.stdout)["exported"]] == [str(old)]
    assert library.find().folder == old
    assert_whole(old, expected)
    place(bundles("base"), old)
    assert_whole(old, bundles("base"))
    assert os.listdir(old.parent) == ["bundle"]


def test_the_second_of_two_to_one_place_is_refused_and_the_first_left_alone(bundles, old):
    """At once, with the process that holds the place; its unfinished folder stays, and it completes."""
    first = start(bundles("emotion"), old, 1)
    staging = old.parent / ".bundle.w2v-new"
    wait_for((staging / "onnx" / "encoder.onnx").exists, first)
    first.send_signal(signal.SIGSTOP)
    second = start(bundles("base"), old)
    assert f"process {first.pid} on {socket.gethostname()}" in second.communicate(timeout=60)[1]
    assert second.returncode == 1
    assert (staging / ".unfinished").exists()
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=60) == 0, first.communicate()[1]
    assert_whole(old, bundles("emotion"))
    assert os.listdir(old.parent) == ["bundle"]


@pytest.mark.parametrize(
    ("call", "number"), [("os.unlink", 3), ("os.unlink", 7), ("os.unlink", 8), ("os.rmdir", 1), ("os.rmdir", 2)]
)
def test_a_kill_while_a_dead_folder_is_swept_does_no_harm(bundles, old, call, number):
    """What is left of it is swept by the export after that."""
    aside = old.parent / ".bundle.w2v-new"
    shutil.copytree(bundles("emotion"), aside)
    write(aside / ".unfinished", "")
    (aside / "manifest.json").unlink()
    process = start(bundles("emotion"), old, before=fatal(call, number))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    place(bundles("emotion"), old)
    assert_whole(old, bundles("emotion"))
    assert os.listdir(old.parent) == ["bundle"]
