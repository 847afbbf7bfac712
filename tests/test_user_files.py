"""Nothing of a user's is lost: files that are not this program's, and results whose inputs or records are gone."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from commands import (
    assert_same,
    embed,
    finish,
    journal_line,
    journal_of,
    left_beside,
    recorded,
    results,
    start,
    values_of,
)
from conftest import speech

THESIS = b"years of work\n"
#: Code that makes a run kill itself before it writes its output: all inputs are recorded.
KILLED = """
import os
import w2v_runtime.runs.run as run
run.open_store = lambda *arguments, **options: os.kill(os.getpid(), 9)
"""


@pytest.fixture
def work(recordings, tmp_path, monkeypatch):
    """A folder to work in: recordings, a list of them, notes, and layer weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(recordings.glob("*.wav"))))
    (tmp_path / "notes.txt").write_bytes(THESIS)
    (tmp_path / "weights.json").write_text("[0.25, 0.25, 0.25, 0.25]")
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name, and what links lead to."""
    return {
        str(path.relative_to(folder)): os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


INPUT = ["recordings"]
LIST = ["--files-from", "list.txt"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*INPUT, "--failures", "notes.txt"], "notes.txt is no list of failures"),
        ([*INPUT, "--failures", "recordings/a.wav"], "recordings/a.wav is no list of failures"),
        (["recordings/a.wav", "--failures", "recordings/a.wav"], "is an input and the list of failures at once"),
        (["recordings/a.wav", "--failures", "./recordings/../link.wav"], "is an input and the list of failures"),
        ([*LIST, "--failures", "list.txt"], "is the list of inputs and the list of failures at once"),
        ([*INPUT, "--failures", "out.npz"], "the list of failures out.npz is also the output"),
        ([*INPUT, "--failures", "OUT.npz"], "the list of failures OUT.npz is also the output"),
        ([*INPUT, "--failures", ".out.npz.w2v-journal"], "is also the run's journal"),
        ([*INPUT, "--failures", ".out.npz.w2v-values"], "is also the run's record of results"),
        ([*INPUT, "--failures", "notes"], "notes is a folder"),
        ([*INPUT, "--layer-weights", "weights.json", "--failures", "weights.json"], "the file of layer weights and"),
        ([*INPUT, "--failures", "bundle/manifest.json"], "is a file of the model and the list of failures"),
        ([*INPUT, "-o", "bundle/reference.npz", "--overwrite"], "is a file of the model and the output at once"),
        ([*INPUT, "-o", "out.csv", "--failures", "out.csv.metadata.json"], "is also the output's metadata"),
        ([*INPUT, "-o", "user.csv"], "user.csv.metadata.json is not the metadata of an earlier output"),
        ([*INPUT, "-o", "user.jsonl", "--overwrite"], "user.jsonl.metadata.json is not the metadata"),
        (["list.csv", "-o", "list.csv", "--overwrite"], "is an input and the output at once"),
        ([*INPUT, "-o", "recordings/a.wav/out.npz"], "a.wav"),
        ([*INPUT, "-o", "recordings/", "--overwrite"], "which is no part of an earlier output"),
        ([*INPUT, "-o", "recordings", "--overwrite"], "which is no part of an earlier output"),
        ([*INPUT, "-o", "notes", "--overwrite"], "notes holds metadata.json, which is no part of an earlier output"),
        ([*INPUT, "-o", "."], "current folder"),
        ([*INPUT, "-o", ".."], "which is no part of an earlier output"),
        ([*INPUT, "-o", "/"], "mount point"),
    ],
)
def test_a_path_that_would_be_lost_is_refused(bundles, work, words, says):
    """Exit 2 with the file and what it is, before any work, and every file as it was."""
    shutil.copytree(bundles("base"), work / "bundle")
    (work / "link.wav").symlink_to("recordings/a.wav")
    (work / "list.csv").write_text("recordings/a.wav\n")
    (work / "notes").mkdir()
    (work / "notes" / "metadata.json").write_text("{}")
    for name in ("user.csv.metadata.json", "user.jsonl.metadata.json"):
        (work / name).write_bytes(THESIS)
    before = snapshot(work)
    output = [] if "-o" in words else ["-o", "out.npz"]
    code, errors = embed(*words, *output, "-m", "bundle")
    assert code == 2, errors
    assert says in errors
    assert snapshot(work) == before


def test_a_listed_input_that_is_the_output_is_refused(bundles, work):
    """A list that names the output by a link is found out before the run replaces it."""
    (work / "out.npz").write_bytes(THESIS)
    (work / "link").symlink_to("out.npz")
    (work / "list.txt").write_text("recordings/a.wav\nlink\n")
    before = snapshot(work)
    code, errors = embed(*LIST, "-m", bundles("base"), "-o", "out.npz", "--overwrite")
    assert code == 2, errors
    assert "link is an input and the output at once" in errors
    assert snapshot(work) == before
    # Of a pipe it is known only when the name comes by, and then nothing was replaced either.
    process = start(
        "--files-from", "/dev/stdin", "-m", bundles("base"), "-o", "out.npz", "--overwrite", stdin=subprocess.PIPE
    )
    process.stdin.write("recordings/a.wav\nlink\n")
    code, errors = finish(process)
    assert code == 2, errors
    assert "link is an input and the output at once" in errors
    assert (work / "out.npz").read_bytes() == THESIS


def test_a_list_of_failures_replaces_only_lists_of_failures(bundles, work):
    """An earlier list is replaced, and removed where nothing fails; an empty file and a device take the new one."""
    arguments = ("recordings", "-m", bundles("base"), "-o", "out.npz", "--overwrite", "--failures")
    assert embed(*arguments, "failed.jsonl")[0] == 0
    assert not (work / "failed.jsonl").exists()
    (work / "recordings" / "bad.wav").write_bytes(b"")
    (work / "empty").touch()
    for name in ("failed.jsonl", "failed.jsonl", "empty", "/dev/null"):
        code, errors = embed(*arguments, name)
        assert code == 3, errors
    for name in ("failed.jsonl", "empty"):
        (failure,) = map(json.loads, (work / name).read_text().splitlines())
        assert Path(failure["path"]).name == "bad.wav"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    (work / "recordings" / "bad.wav").unlink()
    for name in ("failed.jsonl", "empty"):
        assert embed(*arguments, name)[0] == 0
    assert not (work / "failed.jsonl").exists()
    (work / "list.jsonl").write_text('{"path": "a.wav", "stage": "read", "reason": "none"}\n{"note": "mine"}\n')
    before = snapshot(work)
    code, errors = embed(*arguments, "list.jsonl")
    assert code == 2
    assert "list.jsonl is no list of failures" in errors
    assert snapshot(work) == before


def test_an_output_through_a_link_replaces_what_the_link_leads_to(bundles, work):
    """The link stays one, and what is the run's own lies beside the output itself."""
    (work / "data").mkdir()
    (work / "link.npz").symlink_to("data/out.npz")
    assert embed("recordings", "-m", bundles("base"), "-o", "link.npz")[0] == 0
    assert (work / "link.npz").is_symlink()
    assert sorted(path.name for path in (work / "data").iterdir()) == [".out.npz.w2v-journal", "out.npz"]
    code, errors = embed("recordings", "-m", bundles("base"), "-o", "data/out.npz", "--resume")
    assert code == 0
    assert "nothing to do: 5 files were finished already" in errors


def test_what_comes_into_a_folder_while_it_is_replaced_stays(bundles, work):
    """Of a folder output only the arrays that its index lists are removed."""
    arguments = ("recordings", "-m", bundles("base"), "-o", "out/")
    assert embed(*arguments)[0] == 0
    late = """
from w2v_runtime.stores import pending
exchange = pending.exchange
def late(new, old, aside):
    (old / "thesis.txt").write_bytes(b"years of work\\n")
    exchange(new, old, aside)
pending.exchange = late
"""
    code, errors = embed(*arguments, "--overwrite", before=late)
    assert code == 0, errors
    assert (work / ".out.w2v-old" / "thesis.txt").read_bytes() == THESIS
    code, errors = embed(*arguments, "--overwrite")
    assert code == 2
    assert "thesis.txt was set aside" in errors
    (work / ".out.w2v-old" / "thesis.txt").unlink()
    assert embed(*arguments, "--overwrite")[0] == 0
    assert not (work / ".out.w2v-old").exists()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("gone", ["unlisted", "missing"])
def test_results_whose_inputs_are_gone_are_not_dropped_unasked(bundles, work, finished, gone):
    """An unmounted share takes its inputs out of the listing, or leaves a list of files that are not there: exit 2."""
    arguments = ("-m", bundles("base"), "-o", "out.npz")
    listed = INPUT if gone == "unlisted" else LIST
    process = start(*listed, *arguments, before="" if finished else KILLED)
    process.communicate(timeout=120)
    assert process.returncode == (0 if finished else -9)
    share = work / "recordings" / ("b" if gone == "unlisted" else "d.wav")
    share.rename(work / "unmounted")
    count, total = (2, 5) if gone == "unlisted" else (1, 3)
    held = {
        name: content for name, content in snapshot(work).items() if name.endswith(("out.npz", "journal", "values"))
    }
    code, errors = embed(*listed, *arguments, "--resume")
    assert code == 2, errors
    assert f"has results of {total} inputs, of which {count} " in errors
    assert os.path.join("recordings", "b", "a.wav") in errors or "d.wav" in errors
    assert "--prune" in errors
    assert {name: content for name, content in snapshot(work).items() if name in held} == held
    code, errors = embed(*listed, *arguments, "--resume", "--prune")
    assert code == (0 if gone == "unlisted" else 3), errors
    assert f"{count} result{'s' if count > 1 else ''} dropped" in errors
    assert len(results(work / "out.npz")[0]) == total - count
    (work / "unmounted").rename(share)
    code, errors = embed(*listed, *arguments, "--resume")
    assert code == 0
    assert f"{count} file{'s' if count > 1 else ''} embedded" in errors
    assert len(results(work / "out.npz")[0]) == total


def test_prune_goes_with_resume(bundles, work):
    """Alone it would have nothing to drop."""
    code, errors = embed("recordings", "-m", bundles("base"), "-o", "out.npz", "--prune")
    assert code == 2
    assert "--resume" in errors


def altered(output: Path, line: int, replacement: bytes | None) -> None:
    """Replace a line of the journal; None turns a digit of it into another."""
    lines = journal_of(output).read_bytes().split(b"\n")
    digit = next(i for i, byte in enumerate(lines[line]) if 49 <= byte <= 56)
    flipped = lines[line][:digit] + bytes([lines[line][digit] + 1]) + lines[line][digit + 1 :]
    lines[line] = flipped if replacement is None else replacement
    journal_of(output).write_bytes(b"\n".join(lines))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", [None, b"\0" * 80, b'{"path": "x"}', b"[]", b"", b'{"path":1,"shape":"x"}'])
def test_a_damaged_line_costs_its_own_input(bundles, recordings, tmp_path, finished, damage):
    """In the middle of a journal it is skipped, counted and redone; what stands behind it is as good as before."""
    output, whole = tmp_path / "out.npz", tmp_path / "whole.npz"
    arguments = (recordings, "-m", bundles("base"))
    assert embed(*arguments, "-o", whole)[0] == 0
    start(*arguments, "-o", output, before="" if finished else KILLED).communicate(timeout=120)
    assert len(recorded(output)) == 5
    altered(output, 3, damage)
    code, errors = embed(*arguments, "-o", output, "--resume")
    assert code == 0, errors
    assert "4 files were finished already, 1 damaged line of the journal skipped, 1 file embedded" in errors
    assert_same(output, whole)
    assert left_beside(output) == [".out.npz.w2v-journal", "out.npz"]


@pytest.mark.parametrize(
    "entry",
    [
        {"offset": []},
        {"offset": None},
        {"offset": -4},
        {"shape": [0]},
        {"shape": [2**62]},
        {"shape": "48"},
        {"path": "\ud800"},
        {"path": 7},
        {"stamp": {"size": "1", "mtime_ns": 0, "sha256": None}},
        {"duration": 1e300},
        {"logits": ["a"]},
        {"index": 0.5},
        {"warnings": [1]},
        {"other": 1},
    ],
)
def test_an_entry_of_wrong_types_is_redone(bundles, recordings, tmp_path, entry):
    """Whoever wrote it with a right checksum, it costs its own input alone."""
    output = tmp_path / "out.npz"
    arguments = (recordings, "-m", bundles("base"), "-o", output)
    start(*arguments, before=KILLED).communicate(timeout=120)
    line = journal_of(output).read_bytes().split(b"\n")[2]
    altered(output, 2, journal_line(json.dumps(json.loads(line) | entry).encode()))
    code, errors = embed(*arguments, "--resume")
    assert code == 0, errors
    assert "4 files were finished already, 1 damaged line of the journal skipped, 1 file embedded" in errors


def test_a_damaged_header_is_known_from_a_complete_output(bundles, recordings, tmp_path):
    """The output tells of its own run; of an unfinished one nothing does, which is said, and nothing is thrown away."""
    output = tmp_path / "out.npz"
    arguments = (recordings, "-m", bundles("base"), "-o", output, "--resume")
    assert embed(*arguments)[0] == 0
    before = output.read_bytes()
    altered(output, 0, b"\xff\xfe")
    code, errors = embed(*arguments)
    assert code == 0, errors
    assert "nothing to do: 5 files were finished already" in errors
    assert output.read_bytes() == before
    start(*arguments[:-2], output, "--overwrite", before=KILLED).communicate(timeout=120)
    altered(output, 0, b"\xff\xfe")
    output.unlink()
    before = journal_of(output).read_bytes(), values_of(output).read_bytes()
    code, errors = embed(*arguments)
    assert code == 2, errors
    assert "the first line of" in errors
    assert "--overwrite" in errors
    assert (journal_of(output).read_bytes(), values_of(output).read_bytes()) == before


@pytest.mark.parametrize(
    "header",
    [
        {"fingerprint": []},
        {"shard": 1},
        {"finished": "yes"},
        {"inputs": []},
        {"inputs": {"count": "5", "sha256": "0"}},
        {"failed": ["a"]},
        {"failed": 3},
        {"format": "3"},
        {"other": 1},
    ],
)
def test_a_header_of_wrong_types_is_a_sentence(bundles, recordings, tmp_path, header):
    """Whoever wrote it with a right checksum: exit 2, nothing replaced."""
    output = tmp_path / "out.npz"
    arguments = (recordings, "-m", bundles("base"), "-o", output)
    start(*arguments, before=KILLED).communicate(timeout=120)
    first, rest = journal_of(output).read_bytes().split(b"\n", 1)
    written = journal_line(json.dumps(json.loads(first) | header).encode()) + b"\n" + rest
    journal_of(output).write_bytes(written)
    code, errors = embed(*arguments, "--resume")
    assert code == 2, errors
    assert ".out.npz.w2v-journal" in errors
    assert "unexpected" not in errors
    assert journal_of(output).read_bytes() == written


def test_an_input_that_always_fails_does_not_rewrite_the_output(bundles, recordings, tmp_path):
    """A finished output is rewritten only when its content changes, and its inputs are not embedded for nothing."""
    (recordings / "bad.wav").write_bytes(b"")
    output = tmp_path / "out.npz"
    arguments = (recordings, "-m", bundles("base"), "-o", output, "--resume")
    assert embed(*arguments)[0] == 3
    before, journal = output.stat(), journal_of(output).stat()
    for _ in range(2):
        code, errors = embed(*arguments)
        assert code == 3, errors
        assert "5 files were finished already, 0 files embedded, 1 failed" in errors
        now = output.stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        now = journal_of(output).stat()
        assert (now.st_ino, now.st_mtime_ns) == (journal.st_ino, journal.st_mtime_ns)
        assert left_beside(output) == [".out.npz.w2v-journal", "out.npz", "out.npz.failures.jsonl"]
    soundfile.write(recordings / "bad.wav", speech(0.7), 16000)
    code, errors = embed(*arguments)
    assert code == 0, errors
    assert "1 file embedded" in errors
    assert len(results(output)[0]) == 6
    assert not (tmp_path / "out.npz.failures.jsonl").exists()


def test_what_the_release_before_left_is_resumed(bundles, recordings, tmp_path):
    """Its journal had another name, no checksums and no word of the list: finished and unfinished runs go on."""
    whole, output = tmp_path / "whole.npz", tmp_path / "out.npz"
    arguments = (recordings, "-m", bundles("base"), "-o")
    assert embed(*arguments, whole)[0] == 0
    for before in (KILLED, ""):
        start(*arguments, output, before=before).communicate(timeout=120)
        lines = [json.loads(line) for line in journal_of(output).read_bytes().splitlines()]
        for line in lines:
            line.pop("crc32")
        header = lines[0]
        lines[0] = {name: header[name] for name in ("fingerprint", "shard", "finished")} | {"format": 2}
        journal_of(output).unlink()
        earlier = tmp_path / "out.npz.journal.jsonl"
        earlier.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if values_of(output).exists():
            values_of(output).rename(tmp_path / "out.npz.values")
        code, errors = embed(*arguments, output)
        assert code == 2
        assert "--resume" in errors
        code, errors = embed(*arguments, output, "--resume")
        assert code == 0, errors
        assert "5 files were finished already, 0 files embedded" in errors
        assert_same(output, whole)
        assert left_beside(output) == [".out.npz.w2v-journal", "out.npz"]
        output.unlink()
        journal_of(output).unlink()


def test_a_closed_pipe_ends_a_stream_quietly(bundles, recordings):
    """``w2v-embed … -o - | head -1``: one line comes through, and nothing is said of the rest."""
    for index in range(40):
        shutil.copy(recordings / "a.wav", recordings / f"more{index}.wav")
    process = start(recordings, "-m", bundles("base"), "-o", "-")
    first = json.loads(process.stdout.readline())
    assert np.isfinite(first["embedding"]).all()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) in (0, 1)
