"""pandas and scikit-learn: tables keep their index, outputs read back, a transformer is one, in every process."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from commands import embed
from conftest import speech
from w2v_models.errors import AudioError, RefusedError
from w2v_runtime import Embedder, Failure

pd = pytest.importorskip("pandas")
sklearn = pytest.importorskip("sklearn")

from sklearn.base import clone  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import GroupKFold, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

from w2v_runtime.integrations.pandas import embed_table, read, to_frame  # noqa: E402
from w2v_runtime.integrations.sklearn import SpeechEmbedding  # noqa: E402


@pytest.fixture
def embedder(bundles) -> Embedder:
    return Embedder(bundles("emotion"))


@pytest.fixture
def turns(tmp_path):
    """Six segments of two recordings, with labels."""
    for i, name in enumerate("ab"):
        soundfile.write(tmp_path / f"{name}.wav", speech(4 + i, seed=i), 16000)
    rows = [(f"{'ab'[k % 2]}.wav", 0.5 * k, 0.5 * k + 1, "xy"[k % 2], k) for k in range(6)]
    return pd.DataFrame(rows, columns=["file", "start", "end", "label", "n"]).set_index("n", drop=False)


def audformat_index(turns):
    """file, start, end as audformat has them, the last end missing."""
    starts, ends = (pd.to_timedelta(turns[name], unit="s") for name in ("start", "end"))
    ends.iloc[-1] = pd.NaT
    return pd.MultiIndex.from_arrays([turns["file"], starts, ends], names=["file", "start", "end"])


def test_a_table_of_segments_keeps_its_index(embedder, turns, tmp_path):
    """Columns or an index of audformat, in seconds or timedeltas: the values of embed_segments, the head first."""
    expected = list(embedder.embed_segments([tmp_path / f for f in turns["file"]], turns["start"], turns["end"]))
    made = embed_table(turns, embedder, root=tmp_path)
    assert made.index.equals(turns.index)
    assert list(made.columns) == ["arousal", "dominance", "valence", *(f"f{i}" for i in range(48))]
    assert np.array_equal(made.iloc[:, 3:].to_numpy(), np.stack([result.values for result in expected]))
    assert np.array_equal(made.iloc[:, :3].to_numpy(), np.stack([result.logits for result in expected]))
    index = audformat_index(turns)
    for table in (index, pd.Series("x", index), pd.DataFrame({"label": "x"}, index)):
        other = embed_table(table, embedder, root=tmp_path)
        assert other.index.equals(index)
        assert np.abs(other.iloc[:5].to_numpy() - made.iloc[:5].to_numpy()).max() < 2e-6
    whole = embed_table(turns, embedder, root=tmp_path, context="whole", layer=[0, "last"], pooling="mean,std")
    assert list(whole.columns[3:5]) == ["l0_f0", "l0_f1"]
    assert whole.shape == (6, 3 + 2 * 96)


def test_a_table_of_files_keeps_its_index(embedder, turns, tmp_path):
    """An index of files, or a column; a bundle's folder in place of an Embedder."""
    files = pd.Index(["a.wav", "b.wav", "a.wav"], name="file")
    made = embed_table(files, embedder.bundle.folder, root=tmp_path)
    assert made.index.equals(files)
    assert np.abs(made.iloc[0, 3:].to_numpy() - embedder.embed(tmp_path / "a.wav").values).max() < 2e-6
    column = embed_table(pd.DataFrame({"file": files.to_numpy()}), embedder, root=tmp_path)
    assert np.abs(column.to_numpy() - made.to_numpy()).max() < 2e-6


def test_rows_that_fail_are_nan_and_told(embedder, turns, tmp_path):
    """The others stay at their place."""
    turns.loc[2, "end"] = 99.0
    turns.loc[3, "file"] = "none.wav"
    with pytest.warns(UserWarning, match=r"2 could not be embedded: row 2: .*behind the end.*row 3: .*does not exist"):
        made = embed_table(turns, embedder, root=tmp_path)
    assert made.isna().all(axis=1).tolist() == [False, False, True, True, False, False]
    assert [row for row, _ in made.attrs["failures"]] == [2, 3]


@pytest.mark.parametrize(
    "table", [pd.DataFrame({"x": [1]}), pd.DataFrame({"file": ["a"], "start": [0]}), pd.Index([1])]
)
def test_a_table_without_files_is_refused(embedder, table):
    """With what it should have."""
    with pytest.raises(RefusedError, match="neither files nor segments"):
        embed_table(table, embedder)


def test_a_segment_without_a_start_is_refused(embedder, turns):
    """A gap in a table is not taken for the beginning of the file."""
    turns.loc[2, "start"] = None
    with pytest.raises(RefusedError, match="row 2 of the table has no start"):
        embed_table(turns, embedder)


def test_results_become_a_table(embedder, turns, tmp_path):
    """Index and columns as in .csv; failures are left out and warned of; frames are refused."""
    files = [tmp_path / "a.wav", tmp_path / "none.wav", tmp_path / "b.wav"]
    with pytest.warns(UserWarning, match="1 could not"):
        made = to_frame(embedder.embed_files(files), labels=embedder.labels)
    assert made.index.names == ["file", "start", "end"]
    assert made.index.get_level_values("end").total_seconds().tolist() == [4.0, 5.0]
    assert list(made.columns[:4]) == ["arousal", "dominance", "valence", "f0"]
    several = to_frame(embedder.embed_files(files[:1], layer=[1, 2]), layers=[1, 2])
    assert list(several.columns)[:4] == ["logit0", "logit1", "logit2", "l1_f0"]
    with pytest.raises(RefusedError, match="these are frames"):
        to_frame(embedder.embed_files(files[:1], level="frame"))


@pytest.mark.parametrize("level", ["utterance", "frame"])
@pytest.mark.parametrize("name", ["out.npz", "out.csv", "out.jsonl", "out.parquet", "out.h5", "out.scp", "out/"])
def test_every_output_reads_as_one_table(bundles, turns, tmp_path, name, level):
    """Files and segments, frames with their times, columns typed, metadata in attrs."""
    turns["age"] = [41, None, 3, 4, 5, 6]
    turns.drop(columns="n").to_csv(tmp_path / "turns.csv", index=False)
    arguments = ("-m", bundles("emotion"), "--level", level, "--layer", "1,last", "--no-progress")
    code, said = embed(tmp_path, "--segments", tmp_path / "turns.csv", "-o", f"{tmp_path}/{name}", *arguments)
    assert code == 0, said
    made = read(f"{tmp_path}/{name}")
    assert made.attrs["layer"] == ["1", "last"]
    assert list(made.columns[:6]) == ["label", "age", "arousal", "dominance", "valence", "l1_f0"]
    embedder = Embedder(bundles("emotion"))
    options = {"level": level, "layer": [1, "last"]}
    files = [tmp_path / file for file in turns["file"]]
    results = list(embedder.embed_segments(files, turns["start"], turns["end"], **options))
    counts = [len(result.values) if level == "frame" else 1 for result in results]
    assert len(made) == sum(counts)
    expected = np.concatenate([result.values.reshape(count, -1) for count, result in zip(counts, results, strict=True)])
    assert np.abs(made.iloc[:, 5:].to_numpy() - expected).max() < 2e-6
    assert made["label"].tolist() == np.repeat(turns["label"].to_numpy(), counts).tolist()
    assert made["age"].isna().sum() == counts[1]
    starts = made.index.get_level_values("start").total_seconds()
    firsts = np.cumsum([0, *counts])[:-1]
    assert starts[firsts].tolist() == pytest.approx(turns["start"].tolist())
    if level == "frame":
        assert starts[firsts[1] + 1] == pytest.approx(0.52)
    code, said = embed(tmp_path, "-o", f"{tmp_path}/whole-{name}", *arguments)
    assert code == 0, said
    whole = read(f"{tmp_path}/whole-{name}")
    assert whole.index.get_level_values("file").unique().tolist() == [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]
    assert list(whole.columns[:4]) == ["arousal", "dominance", "valence", "l1_f0"]


# ---- scikit-learn ----


def test_recordings_segments_and_waveforms_are_transformed(embedder, turns, tmp_path):
    """Lists, arrays and tables of them."""
    step = SpeechEmbedding(str(embedder.bundle.folder))
    files = [str(tmp_path / name) for name in ("a.wav", "b.wav")]
    expected = np.stack([embedder.embed(file).values for file in files])
    for given in (files, np.array(files), np.array(files)[:, None], pd.DataFrame({"path": files}), pd.Series(files)):
        assert np.abs(step.transform(given) - expected).max() < 2e-6
    pairs = [(soundfile.read(file)[0], 16000) for file in files]
    assert np.abs(step.fit_transform(pairs) - expected).max() < 1e-5
    turns["file"] = [str(tmp_path / name) for name in turns["file"]]
    made = step.transform(turns[["file", "start", "end"]])
    cut = embedder.embed_segments(turns["file"].tolist(), turns["start"], turns["end"])
    assert np.abs(made - np.stack([result.values for result in cut])).max() < 2e-6
    assert np.array_equal(step.transform(turns[["file", "start", "end"]].to_numpy()), made)
    for wrong in (turns[["label", "n"]], np.zeros((2, 2))):
        with pytest.raises(RefusedError, match="recordings are paths"):
            step.transform(wrong)


def test_it_is_a_step_as_others_are(embedder, tmp_path, turns):
    """clone, get_params, pickle, set_output, feature names; nothing but arguments travels."""
    step = SpeechEmbedding(str(embedder.bundle.folder), pooling="mean,std", layer=[1, 2], head=True)
    files = [str(tmp_path / "a.wav")]
    rows = step.transform(files)
    assert rows.dtype == np.float32
    names = step.get_feature_names_out()
    assert [*names[:4], len(names)] == ["arousal", "dominance", "valence", "l1_f0", 3 + 2 * 96]
    assert rows.shape == (1, len(names))
    copies = clone(step), pickle.loads(pickle.dumps(step))
    assert all(copy.get_params() == step.get_params() for copy in copies)
    assert all(np.array_equal(copy.transform(files), rows) for copy in copies)
    assert len(pickle.dumps(step)) < 1000
    table = step.set_output(transform="pandas").transform(files)
    assert list(table.columns) == list(names)


def test_what_cannot_be_embedded_is_raised_or_nan(embedder, tmp_path, turns):
    """With paths and reasons."""
    files = [str(tmp_path / "a.wav"), str(tmp_path / "none.wav")]
    with pytest.raises(AudioError, match=r"1 of 2 cannot be embedded: .*none.wav: does not exist"):
        SpeechEmbedding(embedder).transform(files)
    rows = SpeechEmbedding(embedder, errors="nan").transform(files)
    assert np.isnan(rows).all(axis=1).tolist() == [False, True]
    with pytest.raises(RefusedError, match="errors is one of"):
        SpeechEmbedding(embedder, errors="skip").fit(files)


def test_a_classifier_is_trained_in_processes(bundles, tmp_path):
    """The worked example: two kinds of sound, cross-validation by speaker, joblib's processes."""
    files, labels, speakers = [], [], []
    for speaker in range(4):
        for kind in ("voice", "noise"):
            for take in range(2):
                path = tmp_path / f"{speaker}-{kind}-{take}.wav"
                random = np.random.default_rng(len(files))
                noise = 0.1 * random.standard_normal(16000)
                soundfile.write(path, speech(1, seed=len(files)) if kind == "voice" else noise, 16000)
                files, labels, speakers = [*files, str(path)], [*labels, kind], [*speakers, speaker]
    embedding = SpeechEmbedding(str(bundles("base")), threads=1)
    model = make_pipeline(embedding, StandardScaler(), LogisticRegression())
    scores = cross_val_score(model, np.array(files), labels, groups=speakers, cv=GroupKFold(2), n_jobs=2)
    assert scores.min() > 0.9


def test_failures_are_results_of_the_package(embedder, tmp_path):
    """So that isinstance tells them, wherever they were made."""
    (result,) = embedder.embed_files([Path(tmp_path / "none.wav")])
    assert isinstance(result, Failure)
