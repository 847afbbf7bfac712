"""The lines of docs/outputs.md and the examples of docs/tables.md, run with the libraries that are installed."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from commands import embed
from conftest import speech

DOCS = Path(__file__).parent.parent / "docs"
_SECTION = (DOCS / "outputs.md").read_text("utf-8").split("## Readers")[1].split("\n## ")[0]
LINES = [match for match in re.findall(r"^\| (.*?) \| `(.*)` \|$", _SECTION, re.MULTILINE) if "(" in match[1]]
#: Not of Python.
ELSEWHERE = ("R", "Spotlight", "embedding-atlas")


@pytest.fixture(scope="module")
def outputs(bundles, tmp_path_factory) -> Path:
    """Every output of the same recordings, one of which has a name that is not UTF-8, and two shards."""
    place = tmp_path_factory.mktemp("outputs")
    (place / "in").mkdir()
    (place / "parts").mkdir()
    for i, name in enumerate((b"a.wav", b"b c.wav", b"caf\xe9.wav")):
        soundfile.write(
            os.path.join(os.fsencode(place / "in"), name), speech(0.5 + 0.1 * i, seed=i), 16000, format="WAV"
        )
    (place / "in" / "bad.wav").write_bytes(b"")
    for name in ("out.npz", "out.csv", "out.jsonl", "out.parquet", "out.h5", "out.scp"):
        assert embed(place / "in", "-m", bundles("base"), "-o", place / name)[0] == 3
    for index in (1, 2):
        part = place / "parts" / f"{index}.parquet"
        assert embed(place / "in", "-m", bundles("base"), "-o", part, "--shard", f"{index}/2")[0] in (0, 3)
    return place


@pytest.mark.parametrize(("name", "line"), [line for line in LINES if line[0] not in ELSEWHERE])
def test_every_line_reads_what_was_written(outputs, monkeypatch, name, line):
    """The vectors, or a row for each recording."""
    modules = {}
    for module in re.findall(
        r"\b(numpy|pandas|polars|duckdb|pyarrow|datasets|audformat|h5py|tables|kaldiio|w2v_runtime)\b[.]", line
    ):
        modules[module] = pytest.importorskip(module)
    if "pyarrow" in line:
        importlib.import_module("pyarrow.dataset")
    if "w2v_runtime" in line:
        importlib.import_module("w2v_runtime.integrations.pandas")
    monkeypatch.chdir(outputs)
    read = eval(line, modules)
    with np.load("out.npz") as stored:
        vectors = stored["embeddings"]
    if isinstance(read, np.ndarray):
        assert np.array_equal(read, vectors)
    elif "kaldiio" in line:
        assert {row.tobytes() for row in read.values()} == {row.tobytes() for row in vectors}
    elif "count(*)" in line:
        assert read.fetchall() == [(3,)]
    else:
        assert read.shape[0] == 3


def test_the_lines_are_there():
    """A table that is not found would test nothing."""
    assert len(LINES) >= 13


def test_a_name_that_is_not_utf8_breaks_no_reader(outputs, monkeypatch):
    """And comes back as its bytes, in every format alike."""
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(outputs)
    made = {}
    exec((DOCS / "outputs.md").read_text("utf-8").split("```python\nimport os\n")[1].split("```")[0], {"os": os}, made)
    path_of = made["path_of"]
    path_of.__globals__.update(os=os, unquote_to_bytes=made["unquote_to_bytes"])
    with np.load("out.npz") as stored:
        names = [stored["paths"].tolist()]
    names.append(pandas.read_csv("out.csv")["file"].tolist())
    names.append(pandas.read_json("out.jsonl", lines=True)["file"].tolist())
    names.append(pandas.read_parquet("out.parquet")["file"].tolist())
    assert all(found == names[0] for found in names)
    assert [os.fsencode(path_of(name)).rpartition(b"/")[2] for name in names[0]] == [
        b"a.wav",
        b"b c.wav",
        b"caf\xe9.wav",
    ]
    polars = pytest.importorskip("polars")
    assert polars.read_csv("out.csv")["file"].to_list() == names[0]
    assert polars.read_ndjson("out.jsonl")["file"].to_list() == names[0]


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(4), ids=["pandas", "sklearn", "datasets", "torch"])
def test_the_examples_of_tables_and_learners_run(bundles, tmp_path, monkeypatch, capsys, number):
    """As they stand, but for the model."""
    for module in (("pandas",), ("sklearn",), ("datasets",), ("torch",))[number]:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("ab"):
        soundfile.write(f"{name}.wav", speech(2 + i, seed=i), 16000)
    (tmp_path / "recordings").symlink_to(".")
    (tmp_path / "turns.csv").write_text("file,start,end,label\na.wav,0,1,x\nb.wav,0.5,,y\n")
    code = examples("tables.md")[number].replace("facebook/wav2vec2-base-960h", str(bundles("base")))
    made: dict = {"__name__": "__main__"}
    exec(code, made)
    if number == 0:
        assert made["learn"].shape == (2, 4 + 48)
        assert not made["learn"].isna().drop(columns="end").any().any()
    elif number == 1:
        assert float(capsys.readouterr().out) > 0.8
    elif number == 2:
        assert np.array(made["dataset"]["embedding"]).shape == (2, 48)
    else:
        assert made["Embedded"](["a.wav"], [1])[0][0].shape == (48,)
