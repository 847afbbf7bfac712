"""Segments of recordings: equal to transformers on the cut, the wider cut and the whole; runs, shards, failures."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from commands import embed, run_merge, wait_for
from commands import start as started
from conftest import speech
from w2v_models import TOLERANCES
from w2v_models.errors import RefusedError
from w2v_runtime import Embedder
from w2v_runtime.audio.reading import read_audio
from w2v_runtime.embedding import corpus, segments
from w2v_runtime.embedding.results import Embedding, Failure
from w2v_runtime.stores import output_format, read_metadata, read_records

RATE = 16000
#: Overlapping, nested, out of order, of one frame, to the end, and longer than what goes through one graph at once.
TIMES = [(30.0, 31.7), (1.5, 3.25), (0.0, 0.5), (3.2, 3.23), (2.0, 44.0), (1.0, 10.0), (50.0, None), (59.9, 60.01)]
CONTEXTS = [0.0, 1.5, "whole"]


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    """A minute at another rate, in two channels."""
    path = tmp_path_factory.mktemp("recording") / "minute.wav"
    left, right = speech(60, 22050, seed=3), speech(60, 22050, seed=4)
    soundfile.write(path, np.stack([left, right], axis=1), 22050, "FLOAT")
    return path


def heard(samples: int, start: float, end: float | None, context: float | str) -> tuple[int, int, int, int]:
    """The samples of a segment, and those that the model hears."""
    begin, stop = round(start * RATE), samples if end is None else min(samples, round(end * RATE))
    if context == "whole":
        return begin, stop, 0, samples
    more = round(float(context) * RATE)
    return begin, stop, max(0, begin - more), min(samples, stop + more)


def inside(begin: int, stop: int, first: int, frames: int, stride: int = 320, width: int = 400) -> np.ndarray:
    """Which of the frames that were heard belong to a segment: those centred in it, or else the nearest."""
    centres = first + np.arange(frames) * stride + width / 2
    chosen = (centres >= begin) & (centres < stop)
    if not chosen.any():
        chosen[np.abs(centres - (begin + stop) / 2).argmin()] = True
    return chosen


def near(values, reference, output: str) -> bool:
    tolerance = TOLERANCES["fp32"][output]
    return bool(np.abs(values - reference).max() <= max(tolerance.max_abs, tolerance.max_rel * np.abs(reference).max()))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ["base", "emotion", "x-vector", "classifier", "w2v-bert"])
def test_values_are_those_of_transformers(relatives, recording, name, context):
    """Of each layer, statistic and head, at both levels, alone in float64 on what the segment hears."""
    torch = pytest.importorskip("torch")
    from oracle import Oracle

    checkpoint, bundle = relatives(name)
    oracle, embedder = Oracle(checkpoint), Embedder(bundle)
    full = read_audio(str(recording), RATE).samples
    times, answers = TIMES if name == "base" else TIMES[:3], {}
    files, starts, ends = [recording] * len(times), *zip(*times, strict=True)
    options = {"context": context, "layer": [1, "last"]}
    pooled = list(embedder.embed_segments(files, starts, ends, pooling="mean,std,min,max", **options))
    frames = list(embedder.embed_segments(files, starts, ends, level="frame", **options))
    for (start, end), vector, rows in zip(times, pooled, frames, strict=True):
        begin, stop, first, last = heard(len(full), start, end, context)
        answer = answers.get((first, last)) or answers.setdefault((first, last), oracle(full[first:last]))
        chosen = inside(begin, stop, first, len(answer.last), *((320, 400) if name != "w2v-bert" else (320, 560)))
        if not context:
            chosen[:] = True
        reference = np.stack([answer.layers[1][chosen], answer.last[chosen]], axis=1)
        assert rows.values.shape == reference.shape
        assert near(rows.values, reference, "frames")
        statistics = [reference.mean(0), reference.std(0), reference.min(0), reference.max(0)]
        assert near(vector.values, np.concatenate(statistics, axis=1), "frames")
        assert (vector.start, vector.end) == (start, 60.0 if end is None else min(end, 60.0))
        assert rows.segment.first == pytest.approx(first / RATE + chosen.argmax() * 0.02, abs=1e-4)
        if answer.columns is not None:
            expected = head_answer(torch, oracle.model, answer, chosen)
            columns = rows.logits if expected.ndim == 2 else vector.logits
            assert near(columns, expected, "logits")
            assert vector.logits is None or near(rows.logits, expected, "logits")


def head_answer(torch, model, answer, chosen):
    """The head's answer to the chosen frames alone."""
    kind = type(model).__name__
    if kind.endswith("ForCTC"):
        return answer.columns[chosen]
    with torch.inference_mode():
        last = torch.from_numpy(answer.last[chosen])
        if kind == "EmotionModel":
            return model.classifier.out_proj(torch.tanh(model.classifier.dense(last.mean(0)))).numpy()
        if kind.endswith("ForSequenceClassification"):
            return model.classifier(model.projector(last).mean(0)).numpy()
        weights = torch.softmax(model.layer_weights, 0)[:, None, None]
        hidden = model.projector((weights * torch.from_numpy(answer.layers[:, chosen])).sum(0))[None]
        for layer in model.tdnn:
            hidden = layer(hidden)
        statistics = torch.cat([hidden.mean(1), hidden.std(1)], dim=-1)
        return model.feature_extractor(statistics)[0].numpy()


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_segment_does_not_depend_on_others_nor_on_their_order(bundles, recording, context):
    """Alone, in another order, with every other of its recording and of another one: nearly the same bits."""
    embedder = Embedder(bundles("emotion"))
    other = (speech(7, seed=9), RATE)
    files = [recording, other, recording, other, recording]
    starts, ends = [5.0, 1.0, 0.5, 0.0, 5.2], [6.0, 2.5, 40.0, 6.9, 5.8]
    together = list(embedder.embed_segments(files, starts, ends, context=context))
    order = [4, 2, 0, 3, 1]
    mixed = embedder.embed_segments(*([row[i] for i in order] for row in (files, starts, ends)), context=context)
    for i, result in zip(order, mixed, strict=True):
        (alone,) = embedder.embed_segments([files[i]], [starts[i]], [ends[i]], context=context)
        for one in (result, alone):
            assert np.abs(one.values - together[i].values).max() < 2e-6
            assert np.abs(one.logits - together[i].logits).max() < 2e-6


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_recording_that_is_too_long_to_hold_gives_the_same(bundles, recording, monkeypatch, context):
    """It is read in blocks, and long segments of it once more."""
    embedder = Embedder(bundles("base"))
    files, starts, ends = [recording] * len(TIMES), *zip(*TIMES, strict=True)
    held = list(embedder.embed_segments(files, starts, ends, context=context, level="frame"))
    monkeypatch.setattr(segments, "HELD_SECONDS", 20.0)
    monkeypatch.setattr(segments, "_HELD_SEGMENT_SECONDS", 15.0)
    monkeypatch.setattr(segments, "_STEP_SECONDS", 2.0)
    monkeypatch.setattr("w2v_runtime.embedding.model.HELD_SECONDS", 20.0)
    for before, after in zip(
        held, embedder.embed_segments(files, starts, ends, context=context, level="frame"), strict=True
    ):
        assert (before.start, before.end, before.segment) == (after.start, after.end, after.segment)
        assert np.abs(before.values - after.values).max() < 1e-5


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_recording_is_decoded_once(bundles, recording, monkeypatch, context):
    """Whatever the order of its segments, and however they overlap."""
    opened = []
    for module in (segments, sys.modules["w2v_runtime.embedding.model"]):
        real = module.open_audio
        monkeypatch.setattr(module, "open_audio", lambda *a, real=real: opened.append(a[0]) or real(*a))
    embedder = Embedder(bundles("base"))
    files, starts, ends = [str(recording)] * len(TIMES), *zip(*TIMES, strict=True)
    assert all(isinstance(r, Embedding) for r in embedder.embed_segments(files, starts, ends, context=context))
    assert opened == [str(recording)]


def test_in_windows_a_whole_recording_has_the_frames_of_its_windows(bundles, recording):
    """Beyond --whole, segments are spans of windows: those of embed at frame level."""
    from w2v_runtime.embedding.windows import Windowing

    embedder = Embedder(bundles("emotion"), windowing=Windowing(window=10, context=2, whole=20))
    frames = embedder.embed(recording, level="frame").values
    files, starts, ends = [recording] * 3, [5.0, 8.5, 0.0], [9.0, 33.0, 60.0]
    centres = np.arange(len(frames)) * 0.02 + 0.0125
    for start, end, result in zip(
        starts, ends, embedder.embed_segments(files, starts, ends, context="whole", pooling="mean,max"), strict=True
    ):
        span = frames[(centres >= start) & (centres < end)]
        assert np.abs(result.values - np.concatenate([span.mean(0), span.max(0)])).max() < 1e-5
    assert np.abs(result.logits - embedder.embed(recording).logits).max() < 1e-5


def test_bad_segments_fail_alone_and_say_why(bundles, recording):
    """Each with its times; what ends up to a frame behind the recording is clipped, with a warning."""
    embedder = Embedder(bundles("base"))
    times = [(-1.0, 2.0), (5.0, 5.0), (7.0, 6.0), (61.0, 62.0), (59.0, 60.03), (59.0, 60.02), (1.0, 1.01), (1.0, 2.0)]
    starts, ends = zip(*times, strict=True)
    results = list(embedder.embed_segments([recording] * len(times), starts, ends))
    failed = [result.reason for result in results if isinstance(result, Failure)]
    for reason, words in zip(
        failed,
        ("begins before", "at or before its start", "at or before", "behind the end", "ends 0.030 s", "too short"),
        strict=True,
    ):
        assert words in reason
        assert reason.startswith("segment ")
    clipped, whole = (result for result in results if isinstance(result, Embedding))
    assert clipped.end == 60.0
    assert clipped.warnings == ("clipped: the segment ends 0.020 s behind its recording, which has 60.000 s",)
    assert whole.warnings == ()
    (padded,) = embedder.embed_segments([recording], [1.0], [1.01], pad_short=True)
    assert "padded" in padded.warnings[0]
    (strict,) = embedder.embed_segments([recording], [59.0], [60.02], strict=True)
    assert "clipped" in strict.reason
    (nearest,) = embedder.embed_segments([recording], [1.0], [1.001], context="whole")
    assert nearest.warnings == ("no frame is centred in the segment: the nearest one stands for it",)


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_bad_recording_fails_all_of_its_segments_once(bundles, recording, tmp_path, context):
    """With one reason, and no other's."""
    whole = tmp_path / "whole.flac"
    soundfile.write(whole, speech(10), RATE)
    cut = tmp_path / "cut.flac"
    cut.write_bytes(whole.read_bytes()[:60_000])
    embedder = Embedder(bundles("base"))
    files = [cut, recording, cut, tmp_path / "none.wav", whole]
    results = list(embedder.embed_segments(files, [0.0] * 5, [1.0] * 5, context=context))
    assert [type(result) for result in results] == [Failure, Embedding, Failure, Failure, Embedding]
    assert "damaged" in results[0].reason
    assert "damaged" in results[2].reason


def test_one_bad_segment_is_the_only_one_that_strict_refuses(bundles, recording):
    """Of those that share their recording's embedding, too."""
    embedder = Embedder(bundles("base"))
    good, bad = embedder.embed_segments([recording] * 2, [1.0, 59.0], [2.0, 60.02], context="whole", strict=True)
    assert isinstance(good, Embedding)
    assert isinstance(bad, Failure)


def test_wrong_arguments_are_refused(bundles, recording):
    """A single file, times that are none, another number of them, an unknown context or option."""
    embedder = Embedder(bundles("base"))
    with pytest.raises(TypeError, match="embed_segments takes many"):
        embedder.embed_segments(str(recording), [0.0], [1.0])
    with pytest.raises(TypeError, match="numbers of seconds"):
        list(embedder.embed_segments([recording], ["0"], [1.0]))
    with pytest.raises(ValueError, match="zip"):
        list(embedder.embed_segments([recording] * 2, [0.0] * 2, [1.0]))
    for context in (-1.0, float("nan"), "all", True):
        with pytest.raises(RefusedError, match="--segment-context"):
            embedder.embed_segments([recording], [0.0], [1.0], context=context)
    with pytest.raises(TypeError, match="embed_segments has no option"):
        embedder.embed_segments([recording], [0.0], [1.0], contxt=1)


# ---- the command ----


@pytest.fixture
def corpus_of(tmp_path) -> Path:
    """A folder with recordings, and a table whose rows are in no order, with labels of every kind."""
    place = tmp_path / "corpus"
    (place / "audio" / "b").mkdir(parents=True)
    for i, name in enumerate(("a.wav", "b/a.wav", "b/ü x.wav")):
        soundfile.write(place / "audio" / name, speech(6 + i, seed=i), RATE)
    rows = []
    for k in range(12):
        file = ("a.wav", "b/a.wav", "b/ü x.wav")[k * 5 % 3]
        rows.append([file, 0.25 * k, 0.25 * k + 1 + k / 10, f'é, "{k}"\nx', f"{k:03}", k, k / 4, k % 2 == 0, ""])
    with (place / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "start", "end", "label", "id", "n", "x", "yes", "none"], *rows])
    return place


OUTPUTS = ["out.npz", "out.csv", "out.jsonl", "out.parquet", "out.h5", "out.scp", "out/"]


def run(place: Path, bundle: Path, *arguments: object) -> tuple[int, str]:
    return embed(place / "audio", "--segments", place / "table.csv", "-m", bundle, "--no-progress", *arguments)


@pytest.mark.parametrize("level", ["utterance", "frame"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_carries_rows_and_reads_back(bundles, corpus_of, tmp_path, name, level):
    """In the order of the table, with its columns; without its journal it is merged and resumed alike."""
    out = Path(f"{tmp_path}/{name}")
    bundle = bundles("emotion")
    code, said = run(corpus_of, bundle, "-o", f"{tmp_path}/{name}", "--level", level, "--segment-context", "0.5")
    assert code == 0, said
    assert "12 segments embedded" in said
    with (corpus_of / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kind = output_format(f"{tmp_path}/{name}")
    told = list(read_records(out, kind))
    assert [Path(record.path).relative_to(corpus_of / "audio").as_posix() for record in told] == [
        row["file"] for row in rows
    ]
    for record, row in zip(told, rows, strict=True):
        assert record.segment.start == float(row["start"])
        assert record.segment.start + record.duration == pytest.approx(float(row["end"]), abs=1e-9)
        label, id_, n, x, yes, none = record.segment.fields
        assert (label, id_, n, x, yes) == (
            row["label"],
            row["id"],
            int(row["n"]),
            float(row["x"]),
            row["yes"] == "True",
        )
        assert none in ("", None)
    metadata = read_metadata(out, kind)
    assert metadata["segment_context"] == 0.5
    journal = out.parent / f".{out.name}.w2v-journal"
    merged = tmp_path / "merged.npz"
    run_merge("-o", merged, f"{tmp_path}/{name}").check_returncode()
    with_journal = merged.read_bytes()
    journal.unlink()
    run_merge("-o", merged, "--overwrite", f"{tmp_path}/{name}").check_returncode()
    assert merged.read_bytes() == with_journal
    with np.load(merged) as arrays:
        assert arrays["starts"].tolist() == [float(row["start"]) for row in rows]
        assert arrays["id"].tolist() == [row["id"] for row in rows]
        assert arrays["n"].dtype.kind == "i"
        assert arrays["yes"].dtype.kind == "b"
        assert arrays["label"].tolist() == [row["label"] for row in rows]


def test_labels_are_always_those_of_the_table(bundles, corpus_of, tmp_path):
    """A run that is resumed with another label writes that, and embeds nothing; a row that is gone is told."""
    out, bundle = tmp_path / "out.csv", bundles("base")
    assert run(corpus_of, bundle, "-o", out)[0] == 0
    table = corpus_of / "table.csv"
    table.write_text(table.read_text("utf-8").replace(",003,", ",changed,"), "utf-8")
    before = out.stat()
    code, said = run(corpus_of, bundle, "-o", out, "--resume")
    assert code == 0
    assert "12 segments were finished already, 0 segments embedded" in said
    assert ",changed," in out.read_text("utf-8")
    code, said = run(corpus_of, bundle, "-o", out, "--resume")
    assert "nothing to do" in said
    assert out.stat().st_ino != before.st_ino
    lines = table.read_text("utf-8").split("\nx")
    table.write_text("\nx".join([*lines[:3], *lines[4:]]), "utf-8")
    code, said = run(corpus_of, bundle, "-o", out, "--resume")
    assert code == 2
    assert "has results of 12 inputs, of which 1 is no longer listed" in said
    code, said = run(corpus_of, bundle, "-o", out, "--resume", "--prune")
    assert code == 0, said
    assert "1 result dropped" in said
    with out.open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 11


def test_another_context_is_another_run(bundles, corpus_of, tmp_path):
    """Refused by --resume, and so are whole recordings."""
    out, bundle = tmp_path / "out.npz", bundles("base")
    assert run(corpus_of, bundle, "-o", out)[0] == 0
    code, said = run(corpus_of, bundle, "-o", out, "--resume", "--segment-context", "whole")
    assert code == 2
    assert "segment_context was 0.0 and is now 'whole'" in said
    code, said = embed(corpus_of / "audio", "-m", bundle, "-o", out, "--resume")
    assert code == 2
    assert "segment_context was 0.0 and is now None" in said


def test_shards_hold_whole_recordings_and_merge_to_the_one_run(bundles, corpus_of, tmp_path):
    """Row for row, failures included."""
    table, bundle = corpus_of / "table.csv", bundles("base")
    with table.open("a", encoding="utf-8") as file:
        file.write("a.wav,5,99,late,1,1,1,True,\nlost.wav,0,1,lost,2,2,2,True,\n")
    assert run(corpus_of, bundle, "-o", tmp_path / "one.csv")[0] == 3
    parts, files = [], list[set[str]]()
    for index in (1, 2, 3):
        parts.append(tmp_path / f"part{index}.csv")
        assert run(corpus_of, bundle, "-o", parts[-1], "--shard", f"{index}/3")[0] in (0, 3)
        with parts[-1].open(newline="", encoding="utf-8") as file:
            files.append({row["file"] for row in csv.DictReader(file)})
    assert not files[0] & files[1] | files[1] & files[2] | files[0] & files[2]
    merged = run_merge("-o", tmp_path / "merged.csv", *parts)
    assert merged.returncode == 3, merged.stderr
    tables = []
    for name in ("merged.csv", "one.csv"):
        with (tmp_path / name).open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.reader(file)))
    assert [row[:9] for row in tables[0]] == [row[:9] for row in tables[1]]
    values = [np.array([row[9:] for row in table[1:]], np.float32) for table in tables]
    assert np.abs(values[0] - values[1]).max() < 2e-6
    failures = sorted((tmp_path / "merged.csv.failures.jsonl").read_text().splitlines())
    assert failures == sorted((tmp_path / "one.csv.failures.jsonl").read_text().splitlines())
    assert [json.loads(line)["reason"].split(":")[0] for line in failures] == [
        "line 26 (5 to 99 s)",
        "line 27 (0 to 1 s)",
    ]


def test_a_killed_run_goes_on_where_it_was(bundles, corpus_of, tmp_path):
    """And ends equal to one that was not."""
    bundle = bundles("base")
    assert run(corpus_of, bundle, "-o", tmp_path / "one.npz", "--batch-seconds", "1")[0] == 0
    out = tmp_path / "out.npz"
    arguments = (corpus_of / "audio", "--segments", corpus_of / "table.csv", "-m", bundle, "-o", out)
    process = started(*arguments, "--batch-seconds", "1", "--no-progress")
    journal = tmp_path / ".out.npz.w2v-journal"
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, said = run(corpus_of, bundle, "-o", out, "--batch-seconds", "1", "--resume")
    assert code == 0, said
    with np.load(out) as mine, np.load(tmp_path / "one.npz") as whole:
        assert mine["starts"].tolist() == whole["starts"].tolist()
        assert np.abs(mine["embeddings"] - whole["embeddings"]).max() < 2e-6


def test_json_lines_come_in_the_order_of_the_table(bundles, corpus_of):
    """On standard output, with the columns as fields."""
    arguments = [corpus_of / "audio", "--segments", corpus_of / "table.csv", "-m", bundles("base"), "-o", "-"]
    done = subprocess.run(
        [sys.executable, "-c", "from w2v_runtime.commands.embed import main; main()", *map(str, arguments)],
        capture_output=True,
        check=True,
        text=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == [f"{k:03}" for k in range(12)]
    assert [line["start"] for line in lines] == [0.25 * k for k in range(12)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--segment-context", "1"], "go with --segments only"),
        (["--tier", "words"], "go with --segments only"),
        (["--segments", "none.csv"], "none.csv does not exist"),
        (["--segments", "-"], "not standard input"),
        (["--segments", "table.csv", "--segment-context", "some"], "neither whole nor seconds"),
        (["--segments", "table.csv", "--tier", "x"], "is none"),
        (["--segments", "table.csv", "-o", "table.csv", "--overwrite"], "the table of segments"),
        (["--segments", "table.csv", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_options_are_refused_before_any_work(bundles, corpus_of, monkeypatch, arguments, words):
    """With exit code 2 and a sentence."""
    monkeypatch.chdir(corpus_of)
    code, said = embed(*arguments, "-m", bundles("base"))
    assert code == 2
    assert words in said
    assert sorted(os.listdir(corpus_of)) == ["audio", "table.csv"]


def test_a_recording_is_never_overwritten_by_the_output(bundles, corpus_of):
    """Not even with --overwrite, and not through a table."""
    out = corpus_of / "out.csv"
    with (corpus_of / "table.csv").open("a", encoding="utf-8") as file:
        file.write(f"{out},0,1,l,1,1,1,True,\n")
    out.write_bytes((corpus_of / "audio" / "a.wav").read_bytes())
    content = out.read_bytes()
    code, said = run(corpus_of, bundles("base"), "-o", out, "--overwrite")
    assert code == 2, said
    assert out.read_bytes() == content


def test_segments_of_real_speech_are_batched_without_much_padding(bundles, shared_audio, tmp_path):
    """Cut from several recordings, they share batches by their length."""
    paths = sorted(shared_audio.rglob("*.wav"))[:4]
    assert corpus.POOL_INPUTS > 4 * 20
    files, starts, ends = [], [], []
    for path in paths:
        seconds = soundfile.info(path).duration
        for k in range(20):
            start = (seconds - 1.5) * k / 20
            files, starts, ends = [*files, path], [*starts, start], [*ends, start + 0.5 + k % 10 / 10]
    results = list(Embedder(bundles("base")).embed_segments(files, starts, ends))
    assert all(isinstance(result, Embedding) for result in results)
