"""What a review found in runs that looked right: each is repeated here with real files and processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from commands import assert_same, embed, journal_of, left_beside, results, run_merge, start, wait_for
from conftest import speech
from w2v_models import OutputError
from w2v_runtime.runs import merge as merging
from w2v_runtime.runs.readback import FinishedOutput


@pytest.fixture
def corpus(tmp_path):
    """Four short recordings."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(4):
        soundfile.write(folder / f"{index}.wav", speech(0.4 + 0.2 * index, seed=index), 16000)
    return folder


def run(bundles, *arguments: object, cwd: Path | None = None, before: str = "") -> tuple[int, str]:
    return embed(*arguments, "-m", bundles("base"), cwd=cwd, before=before)


@pytest.mark.parametrize(("samples", "rate"), [(1, 48000), (1, 44100), (2, 96000), (3, 1_000_000)])
def test_a_file_that_resamples_to_nothing_fails_alone(bundles, corpus, tmp_path, samples, rate):
    """So few samples that none is left at 16 kHz: that input is too short, the others are embedded, also later."""
    soundfile.write(corpus / "1b.wav", np.full(samples, 0.1, np.float32), rate)
    output = tmp_path / "out.npz"
    for choice in ((), ("--resume",)):
        code, errors = run(bundles, corpus, "-o", output, *choice)
        assert (code, "1b.wav: too short: 0 samples at 16000 Hz" in errors) == (3, True), errors
        assert results(output)[0] == ["0.wav", "1.wav", "2.wav", "3.wav"]


def test_a_fault_that_nobody_foresaw_costs_one_input(bundles, corpus, tmp_path):
    """A decoder that raises what it should not: that input fails with the fault's name, all others are embedded."""
    before = """
from w2v_runtime.embedding import model
right = model.open_audio
def wrong(source, *arguments):
    if str(source).endswith("2.wav"):
        raise ZeroDivisionError("by nothing")
    return right(source, *arguments)
model.open_audio = wrong
"""
    code, errors = run(bundles, corpus, "-o", tmp_path / "out.npz", before=before)
    assert (code, "2.wav: unexpected ZeroDivisionError: by nothing" in errors) == (3, True), errors
    assert results(tmp_path / "out.npz")[0] == ["0.wav", "1.wav", "3.wav"]


def shards(bundles, corpus: Path, folder: Path, suffix: str, *options: object) -> list[str]:
    """Two finished parts of a corpus."""
    parts = [f"{folder}/p{shard}{suffix}" for shard in (1, 2)]
    for shard, part in enumerate(parts, 1):
        assert run(bundles, corpus, "-o", part, "--shard", f"{shard}/2", *options)[0] == 0
    return parts


@pytest.mark.parametrize("suffix", [".csv", ".npz", "/"])
def test_a_part_that_a_run_replaces_while_it_is_merged_is_not_mixed_in(bundles, corpus, tmp_path, suffix):
    """Another run finishes over a part between its first and its last reading: refused, nothing is written."""
    parts = shards(bundles, corpus, tmp_path, suffix)
    (tmp_path / "other").mkdir()
    shutil.copy(corpus / "0.wav", tmp_path / "other" / "9.wav")

    def replaced() -> None:
        options = ("--overwrite", "--pooling", "max")
        assert run(bundles, tmp_path / "other", "-o", parts[1], *options)[0] == 0

    merged = tmp_path / "all.npz"
    with pytest.raises(OutputError, match=r"p2\S* was written to while it was read"):
        merging.merge(parts, merged, "npz", check=replaced)
    assert left_beside(merged) == []


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_do_not_go_with_the_metadata_of_others(bundles, corpus, tmp_path, suffix):
    """Killed between the renames of a text and of its metadata: the pair is refused, and --overwrite mends it."""
    (tmp_path / "max").mkdir()
    means, maxima = (shards(bundles, corpus, tmp_path / place, suffix, *options) for place, options in (
        ("", ()), ("max", ("--pooling", "max"))))  # fmt: skip
    merged = tmp_path / f"all{suffix}"
    assert run_merge(*means, "-o", merged).returncode == 0
    code = f"""
import os, signal
from pathlib import Path
replace, done = Path.replace, []
def killed(self, target):
    if str(target) == {str(merged)!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = killed
from w2v_runtime.commands.merge import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, *maxima, "-o", str(merged), "--overwrite"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert json.loads(Path(f"{merged}.metadata.json").read_text())["pooling"] == ["max"]
    with pytest.raises(OutputError, match=r"is not the file that \S+ describes"):
        FinishedOutput.open(merged, suffix[1:])
    assert run_merge(*maxima, "-o", merged, "--overwrite").returncode == 0
    assert FinishedOutput.open(merged, suffix[1:]).metadata["pooling"] == ["max"]


def test_parts_tell_of_their_list_once_it_grew(bundles, corpus, tmp_path):
    """A longer list gives one part nothing new to embed; its copy without a journal still joins the other's."""
    listed = tmp_path / "list.txt"
    names = [str(corpus / f"{index}.wav") for index in range(3)]
    parts = [tmp_path / "p1.npz", tmp_path / "p2.npz"]
    for count, choice in ((2, ()), (3, ("--resume",))):
        listed.write_text("\n".join(names[:count]))
        for shard, part in enumerate(parts, 1):
            options = ("--files-from", listed, "-o", part, "--shard", f"{shard}/2")
            assert run(bundles, *options, *choice)[0] == 0
    copies = [shutil.copy(part, tmp_path / f"copy-{part.name}") for part in parts]
    done = run_merge(*copies, "-o", tmp_path / "all.npz")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "all.npz")[0] == ["0.wav", "1.wav", "2.wav"]


def test_a_list_of_failures_goes_when_nothing_fails_any_more(bundles, corpus, tmp_path):
    """The input that failed is no longer listed: --resume embeds nothing and removes the list, so a merge is clean."""
    (corpus / "bad.wav").write_bytes(b"no sound")
    output = tmp_path / "out.npz"
    assert run(bundles, corpus, "-o", output)[0] == 3
    (corpus / "bad.wav").unlink()
    assert run(bundles, corpus, "-o", output, "--resume")[0] == 0
    assert left_beside(output) == [".out.npz.w2v-journal", "out.npz"]
    assert run_merge(output, "-o", tmp_path / "all.npz").returncode == 0


def test_a_link_to_a_list_of_failures_stays_one(bundles, corpus, tmp_path):
    """The list that it leads to is replaced, the link is not."""
    (corpus / "bad.wav").write_bytes(b"no sound")
    (tmp_path / "lists").mkdir()
    target, link = tmp_path / "lists" / "real.jsonl", tmp_path / "link.jsonl"
    target.write_text(json.dumps({"path": "old", "stage": "read", "reason": "of an earlier run"}) + "\n")
    link.symlink_to("lists/real.jsonl")
    assert run(bundles, corpus, "-o", tmp_path / "out.npz", "--failures", link, "--overwrite")[0] == 3
    assert os.readlink(link) == "lists/real.jsonl"
    assert [json.loads(line)["path"] for line in target.read_text().splitlines()] == [str(corpus / "bad.wav")]


def test_an_input_listed_twice_is_finished_twice(bundles, corpus, tmp_path):
    """A complete output of duplicates has nothing to do; with one of them gone from the list, nothing is refused."""
    output, names = tmp_path / "out.npz", [corpus / "0.wav", corpus / "0.wav", corpus / "1.wav"]
    assert run(bundles, *names, "-o", output)[0] == 0
    written = output.stat().st_mtime_ns
    code, errors = run(bundles, *names, "-o", output, "--resume")
    assert (code, "nothing to do: 3 files were finished already" in errors) == (0, True), errors
    assert output.stat().st_mtime_ns == written
    code, errors = run(bundles, *names[1:], "-o", output, "--resume")
    assert (code, "2 files were finished already" in errors) == (0, True), errors
    assert results(output)[0] == ["0.wav", "1.wav"]
    soundfile.write(corpus / "0.wav", speech(1.3, seed=9), 16000)
    code, errors = run(bundles, *names, "-o", output, "--resume")
    assert (code, "1 file was finished already, 2 files embedded" in errors) == (0, True), errors
    fresh = tmp_path / "fresh.npz"
    assert run(bundles, *names, "-o", fresh)[0] == 0
    assert_same(output, fresh)


#: Code that prints each call that makes files and names durable, in order: what was synced, renamed and removed.
TRACED = """
import os, sys
def traced(name, call):
    def wrapped(*arguments, **options):
        shown = [os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else os.fspath(a) for a in arguments]
        result = call(*arguments, **options)
        print(name, *map(os.path.basename, shown), file=sys.stderr, sep="\\t", flush=True)
        return result
    return wrapped
for name in ("fsync", "replace", "rename", "unlink"):
    setattr(os, name, traced(name, getattr(os, name)))
"""


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_every_name_is_given_to_synced_bytes_and_synced_itself(bundles, corpus, tmp_path, suffix):
    """The order of a run's calls: a file before its rename, its folder behind it, all before values are removed."""
    (tmp_path / "place").mkdir()
    output = tmp_path / "place" / f"out{suffix}"
    code, errors = run(bundles, corpus, "-o", output, before=TRACED)
    assert code == 0
    calls = [line.split("\t") for line in errors.splitlines() if "\t" in line]
    calls = [call for call in calls if any("w2v-" in name or name == "place" for name in call)]
    renamed = [index for index, call in enumerate(calls) if call[0] in ("replace", "rename")]
    expected = {f"out{suffix}", f".out{suffix}.w2v-journal"} | (
        {"out.csv.metadata.json"} if suffix == ".csv" else set()
    )
    assert {calls[index][2] for index in renamed} == expected
    for index in renamed:
        assert ["fsync", calls[index][1]] in calls[:index], calls
        assert calls[index + 1] == ["fsync", "place"], calls
    removed = calls.index(["unlink", f".out{suffix}.w2v-values"])
    assert removed > max(renamed) + 1
    first = calls.index(["fsync", f".out{suffix}.w2v-values"])
    assert ["fsync", "place"] in calls[:first]


def test_lists_that_come_in_pieces_are_read_as_whole_ones(bundles, corpus, tmp_path):
    """UTF-16 whose mark comes alone is read; NUL that follows later is refused with its fix, not embedded as a name."""
    output = tmp_path / "out.npz"
    text = f"{corpus}/0.wav\n{corpus}/1.wav\n"
    for pieces, expected in (
        ([b"\xff", b"\xfe", text.encode("utf-16-le")], (0, "2 files embedded")),
        ([f"{corpus}/0.wav".encode(), f"\0{corpus}/1.wav\0".encode()], (2, "holds NUL bytes; give --null")),
        ([f"{corpus}/0.wav\n".encode(), f"{corpus}/1.wav\0".encode()], (2, "holds NUL bytes; give --null")),
    ):
        options = ("-m", bundles("base"), "-o", output, "--overwrite")
        process = start("--files-from", "-", *options, stdin=subprocess.PIPE)
        for piece in pieces:
            os.write(process.stdin.fileno(), piece)
            time.sleep(0.7)
        process.stdin.close()
        process.stdin = None
        errors = process.communicate(timeout=60)[1]
        assert (process.returncode, expected[1] in errors) == (expected[0], True), errors


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".jsonl", ".parquet", ".h5", ".scp", "/"])
def test_an_output_of_another_list_is_not_taken_for_its_own(bundles, corpus, tmp_path, suffix):
    """The output of the same recordings in another order is moved to the name: refused, no vector changes its path."""
    first, second = f"{tmp_path}/x{suffix}", f"{tmp_path}/y{suffix}"
    names = [corpus / "0.wav", corpus / "1.wav"]
    assert run(bundles, *names, "-o", first)[0] == 0
    assert run(bundles, *names[::-1], "-o", second)[0] == 0
    shutil.rmtree(first) if suffix == "/" else os.unlink(first)
    os.rename(second, first)
    if suffix in (".csv", ".jsonl", ".scp"):
        os.rename(f"{second}.metadata.json", f"{first}.metadata.json")
    if suffix == ".scp":
        os.rename(tmp_path / "y.ark", tmp_path / "x.ark")
        os.rename(f"{second}.index.jsonl", f"{first}.index.jsonl")
    code, errors = run(bundles, *names, corpus / "2.wav", "-o", first, "--resume")
    assert (code, "is not the output that" in errors) == (2, True), errors
    done = run_merge(first, "-o", tmp_path / "all.npz")
    assert (done.returncode, "is not the output that" in done.stderr) == (2, True), done.stderr


def test_rows_that_were_sorted_are_not_taken_for_others(bundles, corpus, tmp_path):
    """A table whose rows changed places keeps its metadata and its journal: refused, by --resume and by a merge."""
    output = tmp_path / "out.csv"
    assert run(bundles, corpus, "-o", output)[0] == 0
    head, *rows = output.read_text().splitlines(keepends=True)
    output.write_text("".join([head, *rows[::-1]]))
    told = json.loads(Path(f"{output}.metadata.json").read_text())
    told.pop("text")  # as a release wrote it that did not know its text
    Path(f"{output}.metadata.json").write_text(json.dumps(told))
    soundfile.write(corpus / "9.wav", speech(1), 16000)
    code, errors = run(bundles, corpus, "-o", output, "--resume")
    assert (code, "it was changed since it was written" in errors) == (2, True), errors
    assert run_merge(output, "-o", tmp_path / "all.npz").returncode == 2


def test_a_list_of_failures_has_one_run_at_a_time(bundles, corpus, tmp_path):
    """A second run with the same --failures is refused while the first one holds it, whose list stays."""
    (corpus / "bad.wav").write_bytes(b"no sound")
    failures = tmp_path / "f.jsonl"
    arguments = ("-m", bundles("base"), "--failures", failures)
    first = start("--files-from", "-", *arguments, "-o", tmp_path / "one.npz", stdin=subprocess.PIPE)
    os.write(first.stdin.fileno(), b"".join(os.fsencode(corpus / "bad.wav") + b"\n" for _ in range(3000)))
    wait_for(failures.exists, first)
    code, errors = embed(corpus / "0.wav", *arguments, "-o", tmp_path / "two.npz")
    assert (code, f"{failures} is being written by process {first.pid}" in errors) == (2, True), errors
    errors = first.communicate(timeout=60)[1]
    assert (first.returncode, len(failures.read_text().splitlines())) == (3, 3000), errors


def test_a_merge_counts_what_failed_and_not_what_lies_around(bundles, corpus, tmp_path):
    """With lists elsewhere a merge still knows the failures; a list of an earlier run beside a part is not counted."""
    (corpus / "bad.wav").write_bytes(b"no sound")
    parts = [tmp_path / "p1.npz", tmp_path / "p2.npz"]
    for shard, part in enumerate(parts, 1):
        run(bundles, corpus, "-o", part, "--shard", f"{shard}/2", "--failures", tmp_path / f"f{shard}.jsonl")
    done = run_merge(*parts, "-o", tmp_path / "all.npz")
    assert (done.returncode, "1 failed (listed where --failures said)" in done.stderr) == (3, True), done.stderr
    assert run(bundles, corpus, "-o", parts[0], "--overwrite")[0] == 3
    shutil.copy(corpus / "0.wav", corpus / "bad.wav")
    assert run(bundles, corpus, "-o", parts[0], "--resume", "--failures", tmp_path / "f.jsonl")[0] == 0
    done = run_merge(parts[0], "-o", tmp_path / "whole.npz")
    assert (done.returncode, "failed" in done.stderr) == (0, False), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_lock_that_found_no_room_is_not_left_behind(bundles, corpus, tmp_path):
    """A run that is refused on a full disk leaves no lock: with room, --resume goes on at once."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], check=True)
    try:
        arguments = (corpus / "0.wav", "-o", place / "out.npz")
        assert run(bundles, *arguments)[0] == 0
        with (place / "fill").open("wb", buffering=0) as fill, contextlib.suppress(OSError):
            while True:
                fill.write(bytes(512))
        code, errors = run(bundles, *arguments, "--overwrite")
        assert (code, "No space left" in errors) == (2, True), errors
        assert left_beside(place / "out.npz") == [".out.npz.w2v-journal", "out.npz"]
        (place / "fill").unlink()
        assert run(bundles, *arguments, "--resume")[0] == 0
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("failures", ["out/fail.jsonl", "out/deep/fail.jsonl", ".out.w2v-tmp", ".out.w2v-journal.new"])
def test_a_list_of_failures_within_the_output_is_refused_at_once(bundles, corpus, tmp_path, failures):
    """Before any work: in the folder that is the output, or under one of the run's own names."""
    (tmp_path / "out").mkdir()
    code, errors = run(bundles, corpus, "-o", f"{tmp_path}/out/", "--failures", tmp_path / failures)
    assert (code, "is, or lies in, what the run writes" in errors) == (2, True), errors
    assert os.listdir(tmp_path / "out") == []


def test_one_long_path_does_not_cost_the_others_their_files(bundles, corpus, tmp_path, monkeypatch):
    """An input below 3600 bytes of folders has its array in a folder of output too, under a shorter name."""
    monkeypatch.chdir(corpus)
    deep = "/".join(["d" * 200] * 18)
    os.makedirs(deep)
    shutil.copy("0.wav", f"{deep}/long.wav")
    output = tmp_path / "out"
    code, errors = run(bundles, "1.wav", f"{deep}/long.wav", "-o", f"{output}/")
    assert code == 0, errors
    listed = [json.loads(line) for line in (output / "index.jsonl").read_text().splitlines()]
    assert [line["file"] for line in listed] == ["1.wav", f"{deep}/long.wav"]
    assert all(np.load(output / line["npy"]).size for line in listed)


def test_a_hard_linked_copy_of_an_unfinished_run_stays_as_it_is(bundles, corpus, tmp_path):
    """What cp -al saved is not written to by the runs that go on, neither by --resume nor by --overwrite."""
    here, saved = tmp_path / "here", tmp_path / "saved"
    here.mkdir()
    before = "import os\nfrom w2v_runtime.runs import run\nrun.open_store = lambda *a, **o: os.kill(os.getpid(), 9)\n"
    arguments = (corpus, "-m", bundles("base"), "-o", here / "out.npz")
    start(*arguments, before=before).communicate(timeout=60)
    subprocess.run(["cp", "-al", here, saved], check=True)
    kept = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert set(kept) >= {".out.npz.w2v-journal", ".out.npz.w2v-values"}
    soundfile.write(corpus / "9.wav", speech(1), 16000)
    (here / ".out.npz.w2v-lock").unlink(missing_ok=True)
    start(*arguments, "--resume", before=before).communicate(timeout=60)
    assert embed(*arguments, "--overwrite", "--level", "frame")[0] == 0
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == kept
    (corpus / "9.wav").unlink()
    code, errors = run(bundles, corpus, "-o", saved / "out.npz", "--resume")
    assert (code, "4 files were finished already" in errors) == (0, True), errors


@pytest.mark.parametrize("name", ["out.csv", "out.npz"])
def test_a_pipe_or_a_device_is_not_replaced(bundles, corpus, tmp_path, name):
    """Named as the output through a link: refused, and it stays what it is."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / name).symlink_to("pipe")
    code, errors = run(bundles, corpus, "-o", tmp_path / name, "--overwrite")
    assert (code, "is a device, a pipe or a socket" in errors) == (2, True), errors
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == sorted(["in", "pipe", name])


def test_pipes_and_devices_in_the_places_of_files_do_not_hang(bundles, corpus, tmp_path):
    """A pipe among inputs whose contents are compared fails alone; others, and absurd threads, are refused."""
    os.mkfifo(corpus / "pipe.wav")
    names = [*corpus.iterdir()]
    for choice in ((), ("--resume",)):
        code, errors = run(bundles, *names, "-o", tmp_path / "out.npz", "--hash", *choice)
        assert (code, "pipe.wav: " in errors) == (3, True), errors
    os.mkfifo(tmp_path / "m.csv.metadata.json")
    for options, says in (
        (("-o", tmp_path / "m.csv"), "is a device, a pipe or a socket"),
        (("-o", tmp_path / "w.npz", "--layer-weights", "/dev/zero"), "has more than 1048576 bytes"),
        (("-o", tmp_path / "t.npz", "--threads", "100000"), "from 1 to 1024"),
    ):
        code, errors = run(bundles, corpus / "0.wav", *options)
        assert (code, says in errors) == (2, True), errors


@pytest.mark.parametrize(
    ("closed", "arguments", "code"),
    [
        ("2>&-", "in -o out.npz", 0),
        ("0<&- 1>&- 2>&-", "in -o out.npz", 0),
        ("0<&-", "- -o out.npz", 2),
        ("0<&-", "--files-from - -o out.npz", 2),
        ("1>&-", "in -o -", 2),
    ],
)
def test_closed_standard_streams(bundles, corpus, tmp_path, closed, arguments, code):
    """As daemons leave them: work that needs none is done, and work that needs one is refused."""
    main = "from w2v_runtime.commands.embed import main; main()"
    command = f"exec {sys.executable} -c '{main}' {arguments} -m {bundles('base')} {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    if code == 0:
        assert results(tmp_path / "out.npz")[0] == ["0.wav", "1.wav", "2.wav", "3.wav"]
        main = "from w2v_runtime.commands.merge import main; main()"
        command = f"exec {sys.executable} -c '{main}' out.npz -o all.npz 2>&-"
        assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False).returncode == 0
        assert results(tmp_path / "all.npz")[0] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    else:
        assert "is closed, so no" in done.stderr


@pytest.mark.parametrize("left", [None, b""])
def test_a_complete_output_without_its_journal_is_continued(bundles, corpus, tmp_path, left):
    """The journal is gone, or a kill left it empty: the output tells of its run, and --resume goes on from it."""
    output = tmp_path / "out.npz"
    assert run(bundles, corpus, "-o", output)[0] == 0
    journal_of(output).unlink() if left is None else journal_of(output).write_bytes(left)
    soundfile.write(corpus / "9.wav", speech(1), 16000)
    code, errors = run(bundles, corpus, "-o", output, "--resume")
    assert code == 0, errors
    assert results(output)[0] == ["0.wav", "1.wav", "2.wav", "3.wav", "9.wav"]


@pytest.mark.parametrize(("name", "mode"), [("out.npz", 0o600), ("out.csv", 0o640), ("out", 0o700)])
def test_a_replaced_output_keeps_its_access_rights(bundles, corpus, tmp_path, name, mode):
    """What was private stays so, a folder and a file alike."""
    output = tmp_path / name
    output.mkdir(mode) if name == "out" else output.touch(mode)
    output.chmod(mode)
    assert run(bundles, corpus, "-o", output, "--overwrite")[0] == 0
    assert stat.S_IMODE(output.stat().st_mode) == mode


def test_lists_with_other_marks(bundles, corpus, tmp_path):
    """UTF-32 is refused by name; a list separated by NUL may begin with the mark of UTF-8."""
    listed = tmp_path / "list"
    listed.write_bytes(f"{corpus}/0.wav\n".encode("utf-32"))
    code, errors = run(bundles, "--files-from", listed, "-o", tmp_path / "out.npz")
    assert (code, "is UTF-32; save it as UTF-8" in errors) == (2, True), errors
    listed.write_bytes(b"\xef\xbb\xbf" + os.fsencode(f"{corpus}/0.wav\0{corpus}/1.wav\0"))
    code, errors = run(bundles, "--files-from", listed, "--null", "-o", tmp_path / "out.npz")
    assert (code, "2 files embedded" in errors) == (0, True), errors


def test_the_list_of_another_run_is_not_begun_anew(bundles, corpus, tmp_path):
    """--failures with one name for several runs: the second is refused unless it goes on or starts again."""
    (corpus / "bad.wav").write_bytes(b"no sound")
    failures = tmp_path / "failed.jsonl"
    assert run(bundles, corpus, "-o", tmp_path / "a.npz", "--failures", failures)[0] == 3
    before = failures.read_text()
    code, errors = run(bundles, corpus / "0.wav", "-o", tmp_path / "b.npz", "--failures", failures)
    assert (code, "lists the failures of an earlier run" in errors) == (2, True), errors
    assert failures.read_text() == before
    assert run(bundles, corpus, "-o", tmp_path / "a.npz", "--failures", failures, "--resume")[0] == 3
    assert failures.read_text() == before


@pytest.mark.parametrize("choice", [(), ("--overwrite",)])
def test_a_foreign_file_in_the_journal_s_place_stays(bundles, corpus, tmp_path, choice):
    """Whatever is asked for: it is named, and nothing is written."""
    output = tmp_path / "out.npz"
    journal_of(output).write_text("my diary\n")
    code, errors = run(bundles, corpus, "-o", output, *choice)
    assert (code, "and is none; move it away" in errors) == (2, True), errors
    assert journal_of(output).read_text() == "my diary\n"
    assert left_beside(output) == [journal_of(output).name]


def test_another_program_s_file_is_not_said_to_be_continued(bundles, corpus, tmp_path):
    """A table of the user's under the output's name: refused as what it is, with or without --resume."""
    table = tmp_path / "labels.csv"
    table.write_text("file,label\na.wav,1\n")
    for choice in ((), ("--resume",)):
        code, errors = run(bundles, corpus, "-o", table, *choice)
        assert (code, "was not written by w2v-embed, so --resume cannot continue it" in errors) == (2, True), errors
    assert table.read_text() == "file,label\na.wav,1\n"


def test_failures_beyond_the_first_are_counted(bundles, corpus, tmp_path):
    """Three are shown, and how many more there are."""
    for index in range(5):
        (corpus / f"bad{index}.wav").write_bytes(b"no sound")
    code, errors = run(bundles, corpus, "-o", tmp_path / "out.npz")
    assert (code, errors.count("failed: /")) == (3, 3)
    assert "w2v-embed: failed: … and 2 more\n" in errors
