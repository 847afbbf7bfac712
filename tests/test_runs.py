"""Corpus runs: what is refused, what fails alone, and what ``--resume`` redoes and leaves."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from commands import (
    assert_same,
    embed,
    journal_line,
    journal_of,
    left_beside,
    recorded,
    results,
    start,
    values_of,
    write_corpus,
)
from conftest import speech
from w2v_models.bundle import Bundle
from w2v_models.errors import OutputError
from w2v_runtime import Embedder, Failure
from w2v_runtime.embedding.inputs import Input
from w2v_runtime.embedding.results import Embedding, Request
from w2v_runtime.runs.checks import check_earlier
from w2v_runtime.runs.inputs import list_inputs
from w2v_runtime.runs.journal import Header, Stamp
from w2v_runtime.runs.merge import merge
from w2v_runtime.runs.options import OutputOptions, RunOptions, header_of
from w2v_runtime.runs.spool import Spool
from w2v_runtime.stores.names import path_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixteen recordings."""
    return write_corpus(tmp_path_factory.mktemp("runs") / "corpus", 16)


@pytest.fixture(scope="module")
def uninterrupted(bundles, corpus, tmp_path_factory):
    """Their finished output."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out.npz"
    assert embed(corpus, "-m", bundles("base"), "-o", output)[0] == 0
    return output


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """A copy of that output, to go on from."""
    for path in (uninterrupted, journal_of(uninterrupted)):
        shutil.copy(path, tmp_path)
    return tmp_path / uninterrupted.name


@pytest.fixture(scope="module")
def killed(bundles, corpus, tmp_path_factory):
    """What a run leaves that was killed before it wrote its output: all inputs are recorded."""
    output = tmp_path_factory.mktemp("killed") / "out.npz"
    process = start(corpus, "-m", bundles("base"), "-o", output, before=killed_at("w2v_runtime.runs.run.open_store"))
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert len(recorded(output)) == 16
    assert not output.exists()
    return output


@pytest.fixture
def unfinished(killed, tmp_path):
    """A copy of that, to go on from."""
    for path in (values_of(killed), journal_of(killed)):
        shutil.copy(path, tmp_path)
    return tmp_path / killed.name


def killed_at(function: str) -> str:
    """Code that makes a process kill itself where it would call ``function``."""
    module, name = function.rsplit(".", 1)
    return (
        f"import os, {module}\ndef killed(*arguments, **options): os.kill(os.getpid(), 9)\n{module}.{name} = killed\n"
    )


def embedded_now(errors: str) -> int:
    """How many files a run says it embedded; none where it says nothing of it."""
    found = re.search(r"(\d+) files? embedded", errors)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("batch_seconds", [0.5, 8])
def test_a_bad_input_fails_alone_whatever_the_batch(bundles, corpus, uninterrupted, tmp_path, batch_seconds):
    """One bad file among many is the one that fails, at the front, in the middle and at the end of batches."""
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    soundfile.write(folder / "007.wav", np.full(20_000, np.inf, np.float32), 16000, subtype="FLOAT")
    output = tmp_path / "out.npz"
    code, errors = embed(folder, "-m", bundles("base"), "-o", output, "--batch-seconds", batch_seconds)
    assert code == 3, errors
    assert "1 failed" in errors
    (failure,) = map(json.loads, (tmp_path / "out.npz.failures.jsonl").read_text().splitlines())
    assert (Path(failure["path"]).name, failure["stage"]) == ("007.wav", "read")
    names, values = results(output)
    expected_names, expected = results(uninterrupted)
    assert names == [name for name in expected_names if name != "007.wav"]
    np.testing.assert_allclose(values, np.delete(expected, 7, axis=0), rtol=0, atol=1e-5)


def test_a_file_that_vanishes_after_it_was_listed_fails_alone(bundles, recordings):
    """Inputs are listed before they are read; one that is gone by then is a failure among results."""
    paths = list(list_inputs([str(recordings)]))
    (recordings / "d.wav").unlink()
    outcomes = list(Embedder(bundles("base")).embed_files(paths))
    assert [Path(outcome.path).name for outcome in outcomes if isinstance(outcome, Failure)] == ["d.wav"]
    assert len(outcomes) == 5


@pytest.mark.parametrize("kind", ["npz", "csv", "jsonl", "npy"])
def test_names_are_kept_apart_and_whole_in_every_output(bundles, tmp_path, kind):
    """Equal basenames in two folders, spaces, newlines, a leading - and bytes that are not UTF-8 come back."""
    folder = os.fsencode(tmp_path / "in")
    names = [b'-x, "y".wav', b"a/same.wav", b"b/same.wav", b"line\nbreak.wav", b"not\xffutf8.wav", "ünï.wav".encode()]
    for index, name in enumerate(names):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        soundfile.write(path, speech(0.3 + 0.1 * index, seed=index), 16000, format="WAV")
    output = f"{tmp_path}/out/" if kind == "npy" else f"{tmp_path}/out.{kind}"
    assert embed(tmp_path / "in", "-m", bundles("base"), "-o", output)[0] == 0
    if kind == "npz":
        with np.load(output) as stored:
            found = dict(zip(map(str, stored["paths"]), stored["embeddings"], strict=True))
    elif kind == "csv":
        with open(output, newline="", encoding="utf-8") as file:
            found = {row[0]: np.array(row[3:], np.float32) for row in list(csv.reader(file))[1:]}
    elif kind == "jsonl":
        lines = [json.loads(line) for line in Path(output).read_bytes().splitlines()]
        found = {line["file"]: np.array(line["embedding"], np.float32) for line in lines if "file" in line}
    else:
        lines = [json.loads(line) for line in Path(output, "index.jsonl").read_bytes().splitlines()]
        found = {line["file"]: np.load(Path(output, path_of(line["npy"]))) for line in lines}
    assert {os.fsencode(path_of(name)) for name in found} == {os.path.join(folder, name) for name in names}
    assert len({values.tobytes() for values in found.values()}) == len(names)


def test_an_unfinished_run_is_neither_replaced_nor_continued_unasked(bundles, corpus, unfinished):
    """Without --resume or --overwrite it is refused, with both named, and left as it was."""
    before = values_of(unfinished).read_bytes(), journal_of(unfinished).read_bytes()
    code, errors = embed(corpus, "-m", bundles("base"), "-o", unfinished)
    assert code == 2
    assert "--resume" in errors
    assert "--overwrite" in errors
    assert (values_of(unfinished).read_bytes(), journal_of(unfinished).read_bytes()) == before


def test_resume_refuses_another_request(bundles, corpus, finished):
    """Exit 2 with all that differs from the first run; the output stays."""
    before = finished.read_bytes()
    arguments = ("--resume", "--shard", "1/2", "--level", "frame", "--channel", "0", "--pad-short")
    code, errors = embed(corpus, "-m", bundles("large"), "-o", finished, *arguments)
    assert code == 2
    for difference in (
        "bundle was",
        "channel was 'mean' and is now 0",
        "level was 'utterance' and is now 'frame'",
        "pad_short was False and is now True",
        "shard was '1/1' and is now '1/2'",
    ):
        assert difference in errors
    assert finished.read_bytes() == before


@pytest.mark.parametrize(
    ("precision", "request_", "says"),
    [
        ("fp32", Request(), None),
        ("fp32", Request(pooling=("max",)), "pooling was ['mean'] and is now ['max']"),
        ("fp32", Request(layers=("2",)), "layers was ['last'] and is now ['2']"),
        ("int8", Request(), "precision was 'fp32' and is now 'int8'"),
    ],
)
def test_resume_is_for_an_equal_run(bundles, finished, precision, request_, says):
    """Each of precision, pooling and layer alone makes another run of it."""
    options = RunOptions(OutputOptions(finished, "npz", resume=True), request_)
    header = header_of(Bundle.open(bundles("base")), precision, options)
    if says is None:
        check_earlier(options, header)
    else:
        with pytest.raises(OutputError, match=re.escape(says)):
            check_earlier(options, header)


def test_resume_without_a_journal(bundles, corpus, finished):
    """What the inputs were when they were embedded is unknown: all are embedded again. Another's file is refused."""
    _, before = results(finished)
    journal_of(finished).unlink()
    code, errors = embed(corpus, "-m", bundles("base"), "-o", finished, "--resume")
    assert (code, embedded_now(errors)) == (0, 16)
    np.testing.assert_allclose(results(finished)[1], before, rtol=0, atol=1e-5)
    journal_of(finished).unlink()
    np.savez(finished, embeddings=np.zeros(3))
    code, errors = embed(corpus, "-m", bundles("base"), "-o", finished, "--resume")
    assert (code, "has no journal to resume from, and was not written by w2v-embed" in errors) == (2, True), errors


def test_resume_of_a_finished_output_leaves_it_untouched(bundles, corpus, finished):
    """Nothing to do: exit 0, not a byte and not a time of the output changed, nothing left beside it."""
    before = finished.stat()
    code, errors = embed(corpus, "-m", bundles("base"), "-o", finished, "--resume")
    assert code == 0
    assert "16 files were finished already" in errors
    assert embedded_now(errors) == 0
    after = finished.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert left_beside(finished) == [".out.npz.w2v-journal", "out.npz"]


def test_resume_does_not_trust_the_journal_of_a_removed_output(bundles, corpus, finished, uninterrupted):
    """The journal of a finished output is no use without the output: everything is embedded again."""
    finished.unlink()
    code, errors = embed(corpus, "-m", bundles("base"), "-o", finished, "--resume")
    assert code == 0
    assert embedded_now(errors) == 16
    assert_same(finished, uninterrupted)


def test_resume_refuses_the_journal_of_another_release(bundles, corpus, finished):
    """Exit 2 with the journal's name and what to do; the output stays."""
    first, rest = journal_of(finished).read_bytes().split(b"\n", 1)
    header = json.loads(first) | {"format": 1}
    journal_of(finished).write_bytes(journal_line(json.dumps(header).encode()) + b"\n" + rest)
    before = finished.read_bytes()
    code, errors = embed(corpus, "-m", bundles("base"), "-o", finished, "--resume")
    assert code == 2
    assert ".out.npz.w2v-journal was written by another release" in errors
    assert "--overwrite" in errors
    assert finished.read_bytes() == before


@pytest.mark.parametrize("mapped_bytes", [0, 2**26])
def test_the_record_holds_logits_by_frame_as_numbers(tmp_path, monkeypatch, mapped_bytes):
    """They stand in the values file, return bit for bit after a crash, and are dropped where that file is too short."""
    monkeypatch.setattr("w2v_runtime.runs.spool._MAPPED_BYTES", mapped_bytes)
    output, header = tmp_path / "out.npz", Header({"level": "frame"}, "1/1", finished=False)
    random = np.random.default_rng(1)
    made = []
    for index, frames in enumerate((4000, 1, 7)):
        path = str(tmp_path / f"{index}.wav")
        Path(path).write_bytes(b"")
        values, logits = (random.standard_normal((frames, size), np.float32) for size in (5, 1000))
        made.append(Embedding(path, values, frames / 50, logits))
    spool = Spool(output, header)
    for position, embedding in enumerate(made):
        spool.add(position, Stamp.of(embedding.path), embedding)
    spool.flush()
    spool.close()
    assert journal_of(output).stat().st_size < 2000
    assert values_of(output).stat().st_size == 4008 * 1005 * 4
    for kept in (3, 2):
        spool = Spool(output, header, resume=True)
        recalled = [
            spool.recall(Input(position, embedding.path), Stamp.of(embedding.path))
            for position, embedding in enumerate(made)
        ]
        assert recalled == [True] * kept + [False] * (3 - kept)
        for actual, expected in zip(spool.embeddings(), made, strict=False):
            assert actual.values.tobytes() == expected.values.tobytes()
            assert actual.logits.shape == expected.logits.shape
            assert actual.logits.tobytes() == expected.logits.tobytes()
        assert spool.rows == sum(len(embedding.values) for embedding in made[:kept])
        spool.close()
        os.truncate(values_of(output), values_of(output).stat().st_size - 4)


def frames_of(embedder: Embedder, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A recording's frames, and what the head says of each."""
    alone = embedder.embed(path, level="frame")
    return alone.values, alone.logits


def test_a_head_that_answers_frame_by_frame(bundles, recordings, tmp_path):
    """Each frame's columns stand with it in .npz and .csv, also after --resume, and in the merged output of shards."""
    embedder = Embedder(bundles("base"))
    arguments = (recordings, "-m", bundles("base"), "--level", "frame", "-o")
    for output in (tmp_path / "out.npz", tmp_path / "out.csv"):
        assert embed(*arguments, output)[0] == 0
        assert max(map(len, journal_of(output).read_bytes().splitlines())) < 1000
    soundfile.write(recordings / "c.wav", speech(0.7, seed=9), 16000)
    for output in (tmp_path / "out.npz", tmp_path / "out.csv"):
        code, errors = embed(*arguments, output, "--resume")
        assert code == 0, errors
        assert "5 files were finished already" in errors
        assert embedded_now(errors) == 1
    parts = [tmp_path / "1.npz", tmp_path / "2.csv"]
    for number, part in enumerate(parts, start=1):
        assert embed(*arguments, part, "--shard", f"{number}/2")[0] == 0
    assert merge([str(part) for part in parts], tmp_path / "merged.npz", "npz").embedded == 6
    with (tmp_path / "out.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:3] + header[35:] == ["file", "start", "end", *(f"f{i}" for i in range(48))]
    assert header[3:35] == list(embedder.labels)
    table = np.array([row[3:] for row in rows], np.float32)
    for output in (tmp_path / "out.npz", tmp_path / "merged.npz"):
        with np.load(output) as stored:
            names, offsets = [str(path) for path in stored["paths"]], stored["frame_offsets"]
            values, logits = stored["embeddings"], stored["logits"]
            assert stored["logit_names"].tolist() == list(embedder.labels)
        assert names == list(list_inputs([str(recordings)]))
        assert logits.shape == (offsets[-1], 32)
        for name, (begin, end) in zip(names, pairwise(offsets), strict=True):
            expected_values, expected_logits = frames_of(embedder, Path(name))
            np.testing.assert_allclose(values[begin:end], expected_values, rtol=0, atol=2e-5)
            np.testing.assert_allclose(logits[begin:end], expected_logits, rtol=0, atol=2e-5)
            assert {row[0] for row in rows[begin:end]} == {name}
        np.testing.assert_allclose(table, np.hstack([logits, values]), rtol=0, atol=4e-5)


def test_a_head_that_answers_frame_by_frame_has_no_columns_for_utterances(bundles, corpus, uninterrupted):
    """At utterance level the output of such a bundle holds vectors only."""
    with np.load(uninterrupted) as stored:
        assert not {"logits", "logit_names"} & set(stored)
        assert json.loads(str(stored["metadata"]))["labels"] == []


def test_resume_redoes_just_what_changed(bundles, corpus, tmp_path):
    """Another size or time redoes an input, a new one takes its place in the order, and --prune drops a removed one."""
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    arguments = (folder, "-m", bundles("base"), "-o", tmp_path / "out.npz")
    assert embed(*arguments)[0] == 0
    soundfile.write(folder / "003.wav", speech(1.7, seed=90), 16000)
    os.utime(folder / "005.wav", ns=(0, 0))
    soundfile.write(folder / "008-new.wav", speech(0.6, seed=91), 16000)
    (folder / "010.wav").unlink()
    before = (tmp_path / "out.npz").read_bytes()
    code, errors = embed(*arguments, "--resume")
    assert code == 2
    assert "results of 16 inputs, of which 1 is no longer listed" in errors
    assert "010.wav" in errors
    assert (tmp_path / "out.npz").read_bytes() == before
    code, errors = embed(*arguments, "--resume", "--prune")
    assert code == 0
    assert "13 files were finished already, 1 result dropped, 3 files embedded" in errors
    names, values = results(tmp_path / "out.npz")
    assert names == sorted(path.name for path in folder.iterdir())
    embedder = Embedder(bundles("base"))
    for name in ("003.wav", "008-new.wav", "009.wav"):
        alone = embedder.embed(folder / name).values
        np.testing.assert_allclose(values[names.index(name)], alone, rtol=0, atol=2e-5)


def test_hash_compares_contents(bundles, corpus, tmp_path):
    """With --hash, other content of equal size and time is redone, and equal content of another time is not."""
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    arguments = (folder, "-m", bundles("base"), "-o", tmp_path / "out.npz", "--hash")
    assert embed(*arguments)[0] == 0
    changed = folder / "004.wav"
    status, content = changed.stat(), bytearray(changed.read_bytes())
    content[-2000:] = bytes(2000)
    changed.write_bytes(content)
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(folder / "005.wav", ns=(0, 0))
    code, errors = embed(*arguments, "--resume")
    assert code == 0
    assert "15 files were finished already" in errors
    assert embedded_now(errors) == 1
    alone = Embedder(bundles("base")).embed(changed).values
    np.testing.assert_allclose(results(tmp_path / "out.npz")[1][4], alone, rtol=0, atol=2e-5)


def torn_line(output: Path) -> int:
    """Cut the journal's last line."""
    journal_of(output).write_bytes(journal_of(output).read_bytes()[:-9])
    return 1


def torn_header(output: Path) -> int:
    """Leave half a header."""
    journal_of(output).write_bytes(journal_of(output).read_bytes()[:50])
    return 16


def no_journal_content(output: Path) -> int:
    """Leave an empty journal."""
    journal_of(output).write_bytes(b"")
    return 16


def short_values(output: Path) -> int:
    """Take away a vector and a half, which the journal's last two lines point to."""
    os.truncate(values_of(output), values_of(output).stat().st_size - 72 * 4)
    return 2


def stray_values(output: Path) -> int:
    """Add half a vector that no line points to."""
    with values_of(output).open("ab") as file:
        file.write(bytes(24 * 4))
    return 0


@pytest.mark.parametrize("damage", [torn_line, torn_header, no_journal_content, short_values, stray_values])
def test_resume_drops_what_is_torn(bundles, corpus, unfinished, uninterrupted, damage):
    """A torn end of the record costs just the inputs it stood for."""
    lost = damage(unfinished)
    code, errors = embed(corpus, "-m", bundles("base"), "-o", unfinished, "--resume")
    assert code == 0, errors
    assert embedded_now(errors) == lost
    assert_same(unfinished, uninterrupted)
    assert left_beside(unfinished) == [".out.npz.w2v-journal", "out.npz"]


def without_graph(bundle: Path, folder: Path) -> Path:
    """A bundle that cannot be opened, to see what is refused before that is tried."""
    copy = shutil.copytree(bundle, folder)
    (copy / "onnx" / "model.onnx").write_bytes(b"")
    return copy


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "missing/out.npz"], "missing"),
        (["-o", "file/out.npz"], "file"),
        (["-o", "file/"], "file is a file"),
        (["-o", "."], "current folder"),
        (["-o", "others", "--overwrite"], "thesis.txt"),
        (["-o", "out.npz", "--failures", "missing/failed.jsonl"], "missing"),
        (["-o", "out.npz", "--files-from", "missing.txt"], "missing.txt"),
        (["-o", "out.npz", "--files-from", "others"], "others"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_model_loads(
    bundles, recordings, tmp_path, monkeypatch, arguments, says
):
    """Exit 2, a sentence with the place, nothing left behind."""
    bundle = without_graph(bundles("base"), tmp_path / "bundle")
    work = tmp_path / "work"
    (work / "others").mkdir(parents=True)
    (work / "others" / "thesis.txt").write_text("years of work")
    (work / "file").write_text("a file")
    monkeypatch.chdir(work)
    code, errors = embed(recordings, "-m", bundle, *arguments)
    assert code == 2, errors
    assert says in errors
    assert "model.onnx" not in errors
    assert sorted(path.name for path in work.rglob("*")) == ["file", "others", "thesis.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(bundles, recordings, tmp_path):
    """Exit 2 before the model loads."""
    bundle = without_graph(bundles("base"), tmp_path / "bundle")
    (tmp_path / "locked").mkdir(mode=0o500)
    code, errors = embed(recordings, "-m", bundle, "-o", tmp_path / "locked" / "out.npz")
    assert code == 2
    assert "permission" in errors.lower()
