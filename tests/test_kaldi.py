"""Kaldi's script files and archives as outputs: keys, ownership of the files, kills while they are replaced."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from commands import embed, run_merge
from w2v_models.errors import OutputError
from w2v_runtime.embedding.results import Embedding, FrameTimes
from w2v_runtime.stores import Layout, open_store, read_metadata, read_records, read_values

kaldiio = pytest.importorskip("kaldiio")

FILES = ("feats.scp", "feats.ark", "feats.scp.index.jsonl", "feats.scp.metadata.json")


@pytest.fixture
def place(tmp_path: Path, recordings: Path) -> Path:
    return tmp_path


def run(place: Path, bundle: Path, *arguments: object, out: str = "feats.scp") -> tuple[int, str]:
    return embed(place / "recordings", "-m", bundle, "-o", place / out, "--no-progress", *arguments)


def test_frames_of_a_ctc_model(bundles, place):
    """(T, D) and the logits (T, K) of each recording, equal to those of the .npz."""
    assert run(place, bundles("base"), "--level", "frame")[0] == 0
    assert run(place, bundles("base"), "--level", "frame", out="same.npz")[0] == 0
    with np.load(place / "same.npz") as expected:
        offsets, paths = expected["frame_offsets"], expected["paths"]
        frames, logits = expected["embeddings"], expected["logits"]
    feats, scores = (kaldiio.load_scp(str(place / name)) for name in ("feats.scp", "feats.logits.scp"))
    assert list(feats) == sorted(paths.tolist())
    for path, start, end in zip(paths.tolist(), offsets[:-1], offsets[1:], strict=True):
        assert np.array_equal(feats[path], frames[start:end])
        assert np.array_equal(scores[path], logits[start:end])


def test_keys_are_the_utterances_of_segments(bundles, place):
    """Those of Kaldi's own table; two that are equal are told apart in a table of another kind."""
    (place / "wav.scp").write_text(f"rec1 {place}/recordings/a.wav\nrec2 {place}/recordings/d.wav\n")
    (place / "segments").write_text("utt-b rec2 0.1 0.9\nutt-a rec1 0 0.3\nutt-c rec2 0.5 -1\n")
    code, said = embed("--segments", place / "segments", "-m", bundles("base"), "-o", place / "feats.scp")
    assert code == 0, said
    assert list(kaldiio.load_scp(str(place / "feats.scp"))) == ["utt-a", "utt-b", "utt-c"]
    (place / "turns.csv").write_text(
        "file,start,end,id,ark,key\na.wav,0,0.2,x y,1,k\na.wav,0.1,0.3,x y,2,k\na.wav,0.1,0.3,,3,k\na.wav,0,0.3,0,4,k\n"
    )
    code, said = embed(
        place / "recordings", "--segments", place / "turns.csv", "-m", bundles("base"), "-o", place / "turns.scp"
    )
    assert code == 0, said
    keys = list(kaldiio.load_scp(str(place / "turns.scp")))
    told = list(read_records(place / "turns.scp", "scp"))
    assert [record.segment.fields for record in told] == [("x y", 1, "k"), ("x y", 2, "k"), ("", 3, "k"), ("0", 4, "k")]
    assert keys == [f"{place}/recordings/a.wav.0.1-0.3", "0", "x%20y", "x%20y~2"]


@pytest.mark.parametrize("name", ["feats.ark", "feats.scp.index.jsonl", "feats.logits.ark", "feats.logits.scp"])
def test_a_strangers_file_is_never_replaced(bundles, place, name):
    """Beside an output that is new, and beside one that is replaced; it is refused before any work."""
    other = place / name
    other.write_bytes(b"mfcc of years")
    code, said = run(place, bundles("base"))
    assert (code, name in said) == (2, True), said
    code, said = run(place, bundles("base"), "--overwrite")
    assert (code, "not part of an earlier output" in said) == (2, True), said
    assert other.read_bytes() == b"mfcc of years"
    assert not (place / "feats.scp").exists()
    other.unlink()
    assert run(place, bundles("base"))[0] == 0
    other.write_bytes(b"mfcc of years")
    assert run(place, bundles("base"), "--overwrite")[0] == 2
    assert other.read_bytes() == b"mfcc of years"


def test_what_is_replaced_leaves_nothing_of_its_own(bundles, place):
    """Logits of an earlier output go with it, and nothing temporary stays."""
    assert run(place, bundles("base"), "--level", "frame")[0] == 0
    assert (place / "feats.logits.ark").exists()
    code, said = run(place, bundles("base"), "--overwrite")
    assert code == 0, said
    assert not (place / "feats.logits.ark").exists()
    assert not (place / "feats.logits.scp").exists()
    left = {entry.name for entry in place.iterdir()} - {"recordings"}
    assert left == {*FILES, ".feats.scp.w2v-journal"}
    (place / "feats.scp").unlink()
    code, said = run(place, bundles("base"))
    assert (code, "feats.ark exists" in said) == (2, True), said


def test_what_moves_together_still_reads(bundles, place):
    """Merged from another folder; without its archive, or with another one, it is damaged."""
    assert run(place, bundles("base"))[0] == 0
    (place / "moved").mkdir()
    for name in FILES:
        shutil.move(place / name, place / "moved" / name)
    run_merge("-o", place / "all.scp", place / "moved" / "feats.scp").check_returncode()
    before, after = (dict(kaldiio.load_ark(str(path))) for path in (place / "moved" / "feats.ark", place / "all.ark"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    archive = place / "moved" / "feats.ark"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-8])
    done = run_merge("-o", place / "again.npz", place / "moved" / "feats.scp")
    assert (done.returncode, "was cut or changed" in done.stderr) == (2, True), done.stderr
    archive.unlink()
    done = run_merge("-o", place / "again.npz", place / "moved" / "feats.scp")
    assert (done.returncode, "does not hold" in done.stderr) == (2, True), done.stderr


def layout(made: list[Embedding]) -> Layout:
    metadata = {"level": "utterance", "labels": []}
    return Layout(len(made), 0, 4, ("last",), "utterance", (), FrameTimes(0.02, 0.025), metadata)


def made(value: float) -> list[Embedding]:
    return [Embedding(f"{name}.wav", np.full(4, value, np.float32), 1.0, None, ()) for name in "ab"]


def test_a_kill_while_it_is_replaced_leaves_no_mixture(tmp_path, monkeypatch):
    """After every call that changes a name: the old output, the new one, or none; and it can be written again."""
    calls = 0

    def counted(real: Callable[..., None], stop: int) -> Callable[..., None]:
        def call(*arguments: object, **named: object) -> None:
            nonlocal calls
            calls += 1
            if calls > stop:
                raise KeyboardInterrupt
            real(*arguments, **named)

        return call

    def write(value: float, stop: int) -> None:
        results = made(value)
        nonlocal calls
        calls = 0
        store = open_store(tmp_path / "out.scp", layout(results), overwrite=True)
        for result in results:
            store.write(result)
        with monkeypatch.context() as patched:
            for name in ("unlink", "replace"):
                patched.setattr(os, name, counted(getattr(os, name), stop))
            store.commit()

    write(1, 1000)
    steps = calls
    assert steps >= 4
    states = set()
    for stop in range(steps + 5):
        with contextlib.suppress(KeyboardInterrupt):
            write(2 + stop, stop)
        if (tmp_path / "out.scp").exists():
            told = list(read_records(tmp_path / "out.scp", "scp"))
            read_metadata(tmp_path / "out.scp", "scp")
            values = [array[0] for array in read_values(tmp_path / "out.scp", "scp", [record.shape for record in told])]
            assert len(set(values)) == 1
            assert {array[0] for array in kaldiio.load_scp(str(tmp_path / "out.scp")).values()} == set(values)
            states.add("new" if values[0] == 2 + stop else "old")
        else:
            states.add("none")
    assert states == {"old", "none", "new"}


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_an_archive_never_runs_what_it_holds(tmp_path, monkeypatch):
    """A pickle in the place of a vector, which kaldiio's general reader would load, is damage."""
    monkeypatch.chdir(tmp_path)
    results = made(1)
    store = open_store(tmp_path / "out.scp", layout(results))
    for result in results:
        store.write(result)
    store.commit()
    archive = tmp_path / "out.ark"
    whole = archive.read_bytes()
    bomb = b"PKL" + pickle.dumps(_Bomb())
    archive.write_bytes(whole[:6] + bomb + whole[6 + len(bomb) :])
    with pytest.raises(OutputError, match=r"does not hold|was cut or changed"):
        list(read_values(tmp_path / "out.scp", "scp", [(4,), (4,)]))
    assert not (tmp_path / "exploded").exists()
