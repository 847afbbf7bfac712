"""Stores: each format read back with its ordinary tool, whole or absent, in flat memory."""

from __future__ import annotations

import csv
import io
import json
import os
import time
import tracemalloc
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest

from w2v_models.errors import OutputError
from w2v_runtime.embedding.results import Embedding, FrameTimes, Level
from w2v_runtime.stores import EmbeddingStore, Layout, check_place, open_store, output_format, text, write_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from w2v_runtime.stores.base import JSON

TIMES = FrameTimes(step=0.02, width=0.025)
METADATA: dict[str, JSON] = {"model": "tiny", "random_weights": True}
LABELS = ("arousal", "dominance", "valence")
DIM = 5
#: Tokens as a vocabulary may hold them: signs that formats use themselves, names of columns, one twice; and the columns
#: that they become where the fixed ones are those of a table of numbers, or those of a table with a list.
TOKENS = ("<pad>", "|", "'", ",", '"', "file", "f0", "embedding", "a", "a.b", "a", "a~2", "two\nlines", "")
CSV_TOKENS = ("<pad>", "|", "'", ",", '"', "file~2", "f0~2", "embedding", "a", "a.b", "a~2", "a~2~2", "two\nlines", "")
PARQUET_TOKENS = tuple({"f0~2": "f0", "embedding": "embedding~2"}.get(name, name) for name in CSV_TOKENS)
NOT_UTF8 = os.fsdecode(b"caf\xe9 \xff.wav")
#: Names as file systems really hold them; the last two share a basename.
NAMES = [
    "plain.wav",
    "two words.wav",
    "line\nbreak\r.wav",
    'comma, "quote".wav',
    "-o.wav",
    "Ünïcödé 音.wav",
    NOT_UTF8,
    "a/same.wav",
    "b/same.wav",
]
#: Every exponent matters to a decimal: the smallest, the largest, a negative zero, one that needs nine digits.
HARD = np.array([1e-45, 3.4028235e38, -0.0, 0.1, 1.00000012], np.float32)

FORMATS = ["out.npz", "out.csv", "out.jsonl", "out.parquet", "out.h5", "out.scp", "out"]


@dataclass(frozen=True)
class Case:
    """One shape of output, with the embeddings and the layout that go with it."""

    level: Level = "utterance"
    layers: tuple[str, ...] = ("last",)
    labels: tuple[str, ...] = ()
    head: Level = "utterance"

    def embeddings(self) -> list[Embedding]:
        """One embedding a name, with 1, 2, … frames at frame level; the second has a warning."""
        generator = np.random.default_rng(7)
        made = []
        for position, name in enumerate(NAMES):
            shape: tuple[int, ...] = (position + 1,) if self.level == "frame" else ()
            shape += (len(self.layers), DIM) if len(self.layers) > 1 else (DIM,)
            values = generator.standard_normal(shape).astype(np.float32)
            values.reshape(-1)[:DIM] = np.roll(HARD, position)
            columns = (position + 1, len(self.labels)) if self.head == "frame" else (len(self.labels),)
            logits = generator.random(columns).astype(np.float32) if self.labels else None
            warnings = ("cut short",) if position == 1 else ()
            made.append(Embedding(name, values, 1 / (position + 1), logits, warnings))
        return made

    def layout(self, made: list[Embedding]) -> Layout:
        frames = sum(len(embedding.values) for embedding in made) if self.level == "frame" else 0
        return Layout(len(made), frames, DIM, self.layers, self.level, self.labels, TIMES, dict(METADATA), self.head)

    def rows(self, made: list[Embedding]) -> list[Any]:
        """The vectors of all inputs, one after the other."""
        return [row for e in made for row in (e.values if self.level == "frame" else [e.values])]

    def logits(self, made: list[Embedding]) -> list[Any]:
        """The logits that belong to each of those vectors; none without a head."""
        repeated = self.level == "frame" and self.head == "utterance"
        rows = [np.atleast_2d(e.logits).repeat(len(e.values) if repeated else 1, axis=0) for e in made if self.labels]
        return [row for part in rows for row in part]

    def spans(self, made: list[Embedding]) -> list[tuple[float, float]]:
        """Start and end of each row in seconds."""
        if self.level == "utterance":
            return [(0.0, embedding.duration) for embedding in made]
        return [
            (round(t * 0.02, 9), round(t * 0.02 + 0.025, 9)) for embedding in made for t in range(len(embedding.values))
        ]

    def check_metadata(self, metadata: dict[str, Any]) -> None:
        assert metadata.items() >= {**METADATA, "layers": list(self.layers), "dim": DIM}.items()
        if self.level == "frame":
            assert (metadata["frame_step_seconds"], metadata["frame_width_seconds"]) == (0.02, 0.025)


UTTERANCES = Case()
SHAPES = pytest.mark.parametrize(
    "case",
    [
        UTTERANCES,
        Case("utterance", ("0", "last"), LABELS),
        Case("frame", ("9",), LABELS),
        Case("frame", ("0", "9"), ()),
        Case("frame", ("last",), TOKENS, "frame"),
        Case("frame", ("0", "9"), TOKENS, "frame"),
    ],
    ids=["utterance", "utterance-layers-head", "frame-head", "frame-layers", "tokens", "tokens-layers"],
)


def kind_of(path: Path) -> Any:
    """The format of a path as if typed, where a name without a suffix stands for a folder."""
    name = f"{path}/" if not path.suffix else str(path)
    for suffix, package in ((".parquet", "pyarrow"), (".h5", "h5py"), (".scp", "kaldiio")):
        if path.suffix == suffix:
            pytest.importorskip(package)
    return output_format(name)


def begin(path: Path, layout: Layout, overwrite: bool = False) -> EmbeddingStore:
    return open_store(path, layout, kind_of(path), overwrite)


def write_all(target: EmbeddingStore, made: Iterable[Embedding], commit: bool = False) -> None:
    for embedding in made:
        target.write(embedding)
    if commit:
        target.commit()


def store(path: Path, made: list[Embedding], layout: Layout, overwrite: bool = False) -> None:
    write_all(begin(path, layout, overwrite), made, commit=True)


def content(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of all files of a folder, by their names inside it."""
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return {entry.relative_to(path).as_posix(): entry.read_bytes() for entry in files}


def same(actual: Any, expected: Any) -> bool:
    """Equal bit for bit, the sign of zero included."""
    left, right = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    return left.shape == right.shape and left.tobytes() == right.tobytes()


@SHAPES
def test_npz(tmp_path: Path, case: Case) -> None:
    """An .npz gives back every value, name and duration without pickle, and the frames of each input by offsets."""
    made = case.embeddings()
    store(tmp_path / "out.npz", made, case.layout(made))
    with np.load(tmp_path / "out.npz", allow_pickle=False) as archive:
        read = dict(archive)
    assert [path_of(text) for text in read["paths"].tolist()] == NAMES
    assert read["paths"][6].item() == "file:caf%E9%20%FF.wav"
    assert read["durations"].tolist() == [embedding.duration for embedding in made]
    metadata = json.loads(read["metadata"].item())
    case.check_metadata(metadata)
    assert metadata["warnings"] == {"two words.wav": ["cut short"]}
    assert same(read["embeddings"], np.array([*case.rows(made)]))
    assert ("frame_offsets" in read) == (case.level == "frame")
    if case.level == "frame":
        assert read["frame_offsets"].dtype == np.int64
        for embedding, (start, end) in zip(made, pairwise(read["frame_offsets"]), strict=True):
            assert same(read["embeddings"][start:end], embedding.values)
    assert ("logits" in read, "logit_names" in read) == (bool(case.labels), bool(case.labels))
    if case.labels:
        assert read["logit_names"].tolist() == list(case.labels)
        by_frame = case.head == "frame"
        assert same(read["logits"], case.logits(made) if by_frame else [embedding.logits for embedding in made])


@SHAPES
def test_csv(tmp_path: Path, case: Case) -> None:
    """A .csv read by the csv module gives back every float32, name and time, and its metadata stand beside it."""
    made = case.embeddings()
    store(tmp_path / "out.csv", made, case.layout(made))
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    dims = [f"f{i}" for i in range(DIM)]
    several = [f"l{layer}_{dim}" for layer in case.layers for dim in dims]
    labels = CSV_TOKENS if case.labels == TOKENS else case.labels
    if len(case.layers) > 1:
        labels = tuple(label.replace("f0~2", "f0") for label in labels)
    assert header == ["file", "start", "end", *labels, *(several if len(case.layers) > 1 else dims)]
    assert len(set(header)) == len(header)
    expected = [(embedding, row) for embedding in made for row in case.rows([embedding])]
    for fields, (embedding, row) in zip(rows, expected, strict=True):
        assert path_of(fields[0]) == embedding.path
        assert same([float(field) for field in fields[3 + len(case.labels) :]], row.ravel())
    if case.labels:
        assert same([[float(field) for field in row[3 : 3 + len(case.labels)]] for row in rows], case.logits(made))
    assert [(float(row[1]), float(row[2])) for row in rows] == case.spans(made)
    assert b"file:caf%E9%20%FF.wav," in (tmp_path / "out.csv").read_bytes()
    case.check_metadata(json.loads((tmp_path / "out.csv.metadata.json").read_text()))


@SHAPES
def test_jsonl(tmp_path: Path, case: Case) -> None:
    """A .jsonl holds one object an input with its values nested as in the array, and standard output the same lines."""
    made = case.embeddings()
    layout = case.layout(made)
    store(tmp_path / "out.jsonl", made, layout)
    text = (tmp_path / "out.jsonl").read_text(encoding="ascii")
    for line, embedding in zip(text.splitlines(), made, strict=True):
        record = json.loads(line)
        assert (path_of(record["file"]), record["duration"]) == (embedding.path, embedding.duration)
        assert (record["start"], record["end"]) == (0, embedding.duration)
        assert same(record["embeddings" if case.level == "frame" else "embedding"], embedding.values)
        assert record.get("warnings", []) == list(embedding.warnings)
        assert ("logits" in record) == bool(case.labels)
        if case.labels and case.head == "frame":
            assert tuple(record["logit_names"]) == TOKENS
            assert same(record["logits"], embedding.logits)
        elif case.labels:
            assert tuple(record["logits"]) == LABELS
            assert same([*record["logits"].values()], embedding.logits)
        if case.level == "frame":
            assert (record["step"], record["width"], record["frames"]) == (0.02, 0.025, len(embedding.values))
    case.check_metadata(json.loads((tmp_path / "out.jsonl.metadata.json").read_text()))
    stream = io.StringIO()
    write_lines(stream, layout, made)
    assert stream.getvalue() == text


@SHAPES
def test_parquet(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .parquet has the announced columns, every value over several row groups, and the metadata in its schema."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from w2v_runtime.stores import parquet

    columns = len(case.labels) if case.head == "frame" else 0
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 4 * 4 * (DIM * len(case.layers) + columns))
    made = case.embeddings()
    store(tmp_path / "out.parquet", made, case.layout(made))
    table = pq.read_table(tmp_path / "out.parquet")
    rows = case.rows(made)
    labels = PARQUET_TOKENS if case.labels == TOKENS else case.labels
    columns = ["embedding"] if len(case.layers) == 1 else [f"embedding_{layer}" for layer in case.layers]
    assert table.schema.names == ["file", "start", "end", *labels, *columns]
    assert {table.schema.field(name).type for name in columns} == {
        pa.list_(pa.field("element", pa.float32(), nullable=False), DIM)
    }
    layers = [table[name].combine_chunks().flatten().to_numpy().reshape(-1, DIM) for name in columns]
    assert same(np.stack(layers, axis=1).reshape(np.shape(rows)), rows)
    assert json.loads(table.schema.metadata[b"PANDAS_ATTRS"]) == json.loads(table.schema.metadata[b"w2v"])
    assert list(zip(table["start"].to_pylist(), table["end"].to_pylist(), strict=True)) == case.spans(made)
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == -(-len(rows) // 4)
    owners = [embedding for embedding in made for _ in case.rows([embedding])]
    assert [path_of(text) for text in table["file"].to_pylist()] == [embedding.path for embedding in owners]
    for position, label in enumerate(labels):
        assert same(table[label].to_numpy(), [logits[position] for logits in case.logits(made)])
    case.check_metadata(json.loads(table.schema.metadata[b"w2v"]))
    warnings = pq.read_metadata(tmp_path / "out.parquet").metadata[b"w2v_warnings"]
    assert json.loads(warnings) == {"two words.wav": ["cut short"]}


def path_of(text: str) -> str:
    return os.fsdecode(unquote_to_bytes(text[5:])) if text.startswith("file:") else text


@SHAPES
def test_kaldi(tmp_path: Path, case: Case) -> None:
    """kaldiio gives each key its vector, or its matrix of frames; keys are words, lines sorted; logits stand apart."""
    kaldiio = pytest.importorskip("kaldiio")
    made = case.embeddings()
    store(tmp_path / "out.scp", made, case.layout(made))
    lines = (tmp_path / "out.scp").read_bytes().splitlines()
    assert lines == sorted(lines)
    assert all(len(line.split(b" ")) == 2 for line in lines)
    index = [json.loads(line) for line in (tmp_path / "out.scp.index.jsonl").read_bytes().splitlines()]
    assert [path_of(told["input"]["file"]) for told in index] == NAMES
    assert [told["key"] for told in index][:4] == [
        "plain.wav",
        "two%20words.wav",
        "line%0Abreak%0D.wav",
        'comma,%20"quote".wav',
    ]
    for pairs in (kaldiio.load_scp(str(tmp_path / "out.scp")), dict(kaldiio.load_ark(str(tmp_path / "out.ark")))):
        assert len(pairs) == len(made)
        for told, embedding in zip(index, made, strict=True):
            width = len(case.layers) * DIM
            expected = embedding.values.reshape(-1, width) if case.level == "frame" else embedding.values.reshape(width)
            assert same(pairs[told["key"]], expected)
    assert (tmp_path / "out.logits.scp").exists() == (case.head == "frame")
    if case.head == "frame":
        logits = kaldiio.load_scp(str(tmp_path / "out.logits.scp"))
        for told, embedding in zip(index, made, strict=True):
            assert same(logits[told["key"]], embedding.logits)
    elif case.labels:
        assert same([[*told["input"]["logits"].values()] for told in index], [embedding.logits for embedding in made])
    case.check_metadata(json.loads((tmp_path / "out.scp.metadata.json").read_text()))


@SHAPES
def test_h5(tmp_path: Path, case: Case) -> None:
    """An .h5 holds one matrix of utterances, or a dataset an input under its own name, and everything beside them."""
    h5py = pytest.importorskip("h5py")
    made = case.embeddings()
    store(tmp_path / "out.h5", made, case.layout(made))
    with h5py.File(tmp_path / "out.h5") as file:
        assert [path_of(os.fsdecode(path)) for path in file["paths"]] == NAMES
        assert file["durations"][:].tolist() == [embedding.duration for embedding in made]
        case.check_metadata(json.loads(file.attrs["metadata"]))
        if case.level == "utterance":
            assert same(file["embeddings"][:], [embedding.values for embedding in made])
            assert "frames" not in file
        else:
            assert same(file["frames/a/same.wav"][:], made[7].values)
            assert same(file["frames/file:caf%E9%20%FF.wav"][:], made[6].values)
            for name, embedding in zip(file["datasets"], made, strict=True):
                assert same(file[name][:], embedding.values)
            assert "staging" not in file
        assert ("logits" in file) == bool(case.labels)
        if case.labels:
            assert [name.decode() for name in file["logit_names"]] == list(case.labels)
        if case.labels and case.head == "frame":
            assert same(file["logits/a/same.wav"][:], made[7].logits)
            for name, embedding in zip(file["datasets"], made, strict=True):
                assert same(file[b"logits" + name.removeprefix(b"frames")][:], embedding.logits)
        elif case.labels:
            assert same(file["logits"][:], [embedding.logits for embedding in made])


@SHAPES
def test_npy_folder(tmp_path: Path, case: Case) -> None:
    """A folder mirrors the inputs' tree with one array each, and its index lists them in input order."""
    made = case.embeddings()
    store(tmp_path / "out", made, case.layout(made))
    arrays = {f"{name}.npy" for name in NAMES}
    if case.head == "frame":
        arrays |= {f"logits/{array}" for array in arrays}
    assert set(content(tmp_path / "out")) == arrays | {"metadata.json", "index.jsonl"}
    lines = (tmp_path / "out" / "index.jsonl").read_text().splitlines()
    for line, embedding in zip(lines, made, strict=True):
        record = json.loads(line)
        assert [path_of(record[name]) for name in ("file", "npy")] == [embedding.path, f"{embedding.path}.npy"]
        assert record["duration"] == embedding.duration
        assert record.get("warnings", []) == list(embedding.warnings)
        assert same(np.load(tmp_path / "out" / path_of(record["npy"])), embedding.values)
        if case.labels and case.head == "frame":
            assert path_of(record["logits_npy"]) == f"logits/{embedding.path}.npy"
            assert same(np.load(tmp_path / "out" / path_of(record["logits_npy"])), embedding.logits)
        elif case.labels:
            assert same([*record["logits"].values()], embedding.logits)
    case.check_metadata(json.loads((tmp_path / "out" / "metadata.json").read_text()))


def test_a_folder_of_logits_is_replaced_and_kept_apart(tmp_path: Path) -> None:
    """Inputs in a folder named ``logits`` do not mix with the arrays of logits, and the output can be overwritten."""
    case = Case("frame", labels=("a",), head="frame")
    made = [
        Embedding(name, np.full((2, DIM), i, np.float32), 1.0, np.full((2, 1), -i, np.float32))
        for i, name in enumerate(("x.wav", "logits/x.wav", "logits"))
    ]
    for overwrite in (False, True):
        store(tmp_path / "out", made, case.layout(made), overwrite)
        records = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
        assert [record["npy"] for record in records] == ["x.wav.npy", "logits~/x.wav.npy", "logits.npy"]
        for record, embedding in zip(records, made, strict=True):
            assert same(np.load(tmp_path / "out" / path_of(record["npy"])), embedding.values)
            assert same(np.load(tmp_path / "out" / path_of(record["logits_npy"])), embedding.logits)


def test_longest_names_still_fit_with_a_suffix(tmp_path: Path) -> None:
    """Two inputs whose names fill the 255 bytes of a file system become two arrays, found through the index."""
    names = ["é" * 120 + "x" * 11 + end for end in ("1.wav", "2.wav")]
    made = [Embedding(name, np.full(DIM, position, np.float32), 1.0) for position, name in enumerate(names)]
    store(tmp_path / "out", made, UTTERANCES.layout(made))
    records = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == names
    assert [np.load(tmp_path / "out" / path_of(record["npy"]))[0] for record in records] == [0, 1]


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_appears_before_commit_or_stays_after_discard(tmp_path: Path, name: str) -> None:
    """Until commit there is no output; discard removes every trace, may be called twice, and never touches a result."""
    made = UTTERANCES.embeddings()
    target = begin(tmp_path / name, UTTERANCES.layout(made))
    target.write(made[0])
    assert not (tmp_path / name).exists()
    target.discard()
    target.discard()
    assert list(tmp_path.iterdir()) == []
    target = begin(tmp_path / name, UTTERANCES.layout(made))
    write_all(target, made, commit=True)
    target.discard()
    left = {path.name for path in tmp_path.iterdir()}
    metadata = {f"{name}.metadata.json"} if name.endswith(("csv", "jsonl", "scp")) else set()
    assert left == {name} | metadata | ({"out.ark", "out.scp.index.jsonl"} if name == "out.scp" else set())


@pytest.mark.parametrize("name", FORMATS)
def test_existing_output_is_only_replaced_on_demand(tmp_path: Path, name: str) -> None:
    """An existing output is refused and untouched, also one that appears meanwhile; with overwrite it is replaced."""
    made = UTTERANCES.embeddings()
    path = tmp_path / name
    late = begin(path, UTTERANCES.layout(made))
    write_all(late, made)
    store(tmp_path / f"first-{name}", made, UTTERANCES.layout(made))
    (tmp_path / f"first-{name}").rename(path)
    before = content(path)
    with pytest.raises(OutputError, match="--overwrite"):
        late.commit()
    late.discard()
    with pytest.raises(OutputError, match="--overwrite"):
        begin(path, UTTERANCES.layout(made))
    with pytest.raises(OutputError, match="--overwrite"):
        check_place(path, kind=kind_of(path))
    assert content(path) == before
    fewer = made[:2]
    check_place(path, overwrite=True, kind=kind_of(path))
    store(path, fewer, UTTERANCES.layout(fewer), overwrite=True)
    assert content(path) != before
    store(tmp_path / f"fresh-{name}", fewer, UTTERANCES.layout(fewer))
    fresh = content(tmp_path / f"fresh-{name}")
    assert content(path) == {inside: data.replace(b"fresh-out.ark", b"out.ark") for inside, data in fresh.items()}
    assert not [entry for entry in tmp_path.iterdir() if ".w2v-" in entry.name]


def test_leftovers_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    """Temporary files of a run that was killed do not stand in the way of the next."""
    made = UTTERANCES.embeddings()
    for name in FORMATS:
        killed = begin(tmp_path / name, UTTERANCES.layout(made))
        killed.write(made[0])
        store(tmp_path / name, made, UTTERANCES.layout(made))
        assert (tmp_path / name).exists()


def test_a_folder_with_other_files_is_never_overwritten(tmp_path: Path) -> None:
    """A folder that holds anything but an earlier output is refused even with overwrite, and nothing in it is lost."""
    made = UTTERANCES.embeddings()
    store(tmp_path / "out", made, UTTERANCES.layout(made))
    (tmp_path / "out" / "a" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"a/notes\.txt"):
        begin(tmp_path / "out", UTTERANCES.layout(made), overwrite=True)
    assert (tmp_path / "out" / "a" / "notes.txt").read_text() == "mine"
    (tmp_path / "own").mkdir()
    np.save(tmp_path / "own" / "array.npy", np.zeros(3))
    with pytest.raises(OutputError, match=r"array\.npy"):
        begin(tmp_path / "own", UTTERANCES.layout(made), overwrite=True)


def test_an_empty_folder_is_a_free_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder takes a folder output without overwrite, unless the command runs in it."""
    (tmp_path / "out").mkdir()
    made = UTTERANCES.embeddings()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(OutputError, match="current folder"):
        open_store(Path(), UTTERANCES.layout(made))
    monkeypatch.chdir(tmp_path)
    store(tmp_path / "out", made, UTTERANCES.layout(made))
    assert (tmp_path / "out" / "plain.wav.npy").is_file()


def test_a_link_at_the_output_keeps_pointing_there(tmp_path: Path) -> None:
    """Where the output is a symbolic link, its target is what gets replaced."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "out.npz").write_bytes(b"old")
    (tmp_path / "out.npz").symlink_to(tmp_path / "real" / "out.npz")
    made = UTTERANCES.embeddings()
    store(tmp_path / "out.npz", made, UTTERANCES.layout(made), overwrite=True)
    assert (tmp_path / "out.npz").is_symlink()
    assert np.load(tmp_path / "real" / "out.npz")["paths"].tolist()[:6] == NAMES[:6]


@pytest.mark.parametrize("name", FORMATS)
def test_miscounted_outputs_do_not_commit(tmp_path: Path, name: str) -> None:
    """A store that got fewer inputs than announced, or one of another shape, says so and leaves no output."""
    made = UTTERANCES.embeddings()
    target = begin(tmp_path / name, UTTERANCES.layout(made))
    with pytest.raises(ValueError, match=r"plain\.wav: values"):
        target.write(Embedding("plain.wav", np.zeros((2, DIM), np.float32), 1.0))
    with pytest.raises(ValueError, match=r"plain\.wav: logits"):
        target.write(Embedding("plain.wav", np.zeros(DIM, np.float32), 1.0, np.zeros(3, np.float32)))
    target.write(made[0])
    with pytest.raises(ValueError, match="announced"):
        target.commit()
    target.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [None, (3,), (1, 3), (2, 2)])
def test_logits_by_frame_need_a_row_a_frame(tmp_path: Path, name: str, shape: tuple[int, ...] | None) -> None:
    """Logits of another shape than (frames, labels) are refused where a head answers frame by frame."""
    target = begin(tmp_path / name, Layout(1, 2, DIM, ("last",), "frame", LABELS, TIMES, {}, "frame"))
    logits = None if shape is None else np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"plain\.wav: logits"):
        target.write(Embedding("plain.wav", np.zeros((2, DIM), np.float32), 1.0, logits))
    target.discard()
    assert list(tmp_path.iterdir()) == []


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the system refuse to grow any file beyond ``size`` bytes, as a full disk or a quota does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("case", [Case(), Case("frame"), Case("frame", labels=LABELS, head="frame")])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path, name: str, case: Case) -> None:
    """When the disk takes no more the store raises OSError, and discard then removes everything."""
    values = np.random.default_rng(1).standard_normal((4000, DIM)).astype(np.float32)
    inputs = [values] * 4 if case.level == "frame" else list(values)
    logits = values[:, : len(LABELS)] if case.labels else None
    made = [Embedding(f"{i}.wav", each, 1.0, logits) for i, each in enumerate(inputs)]
    target = begin(tmp_path / name, case.layout(made))
    with file_size_limit(20_000 if case.level == "frame" else 40), pytest.raises(OSError, match="File too large"):
        write_all(target, made, commit=True)
    with file_size_limit(40):
        target.discard()
    del target
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.npz", "out.csv", "out.jsonl", "out.h5"])
def test_equal_results_are_equal_bytes(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs over the same inputs write the same file, days apart."""
    case = Case("frame", ("9",), TOKENS, "frame")
    made = case.embeddings()
    store(tmp_path / f"1-{name}", made, case.layout(made))
    later = time.time() + 3e6
    monkeypatch.setattr(time, "time", lambda: later)
    store(tmp_path / f"2-{name}", made, case.layout(made))
    assert (tmp_path / f"1-{name}").read_bytes() == (tmp_path / f"2-{name}").read_bytes()


@pytest.mark.parametrize("case", [Case("frame"), Case("frame", labels=LABELS, head="frame")])
@pytest.mark.parametrize("name", FORMATS)
def test_no_inputs_make_a_valid_empty_output(tmp_path: Path, name: str, case: Case) -> None:
    """A run in which every input failed still writes an output, with no rows."""
    store(tmp_path / name, [], case.layout([]))
    if name == "out.npz":
        read = np.load(tmp_path / name)
        assert (read["embeddings"].shape, read["paths"].shape, read["frame_offsets"].tolist()) == ((0, DIM), (0,), [0])
        assert not case.labels or read["logits"].shape == (0, 3)
    assert (tmp_path / name).exists()


def long_audio(frames: int, tokens: int = 0) -> tuple[list[Embedding], Layout]:
    """One input of ``frames`` frames of 768, and of as many ``tokens``."""
    values = np.random.default_rng(3).standard_normal((frames, 768)).astype(np.float32)
    logits = np.random.default_rng(4).standard_normal((frames, tokens)).astype(np.float32) if tokens else None
    layout = Layout(1, frames, 768, ("last",), "frame", tuple(map(str, range(tokens))), TIMES, {}, "frame")
    return [Embedding("long.wav", values, frames / 50, logits)], layout


def peak(path: Path, made: Iterable[Embedding], layout: Layout) -> int:
    """Bytes that Python held at most while a store was written."""
    target = begin(path, layout)
    tracemalloc.start()
    try:
        write_all(target, made, commit=True)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "count"), [("out.npz", 20_000), ("out.h5", 1_500), ("out.csv", 300), ("out.jsonl", 300)]
)
def test_utterances_stream_in_flat_memory(tmp_path: Path, name: str, count: int) -> None:
    """Writing utterances holds a small part of their size: the vectors pass through."""
    dim = 768
    layout = Layout(count, 0, dim, ("last",), "utterance", (), TIMES, {})
    vector = np.random.default_rng(3).standard_normal(dim).astype(np.float32)
    made = (Embedding(f"{i}.wav", vector + i, 1.0) for i in range(count))
    assert peak(tmp_path / name, made, layout) < max(count * 300, 2**20)


@pytest.mark.parametrize("tokens", [0, 500])
@pytest.mark.parametrize("name", ["out.npz", "out", "out.h5", "out.jsonl", "out.csv"])
def test_long_audio_is_written_without_a_copy(tmp_path: Path, name: str, tokens: int) -> None:
    """The frames of one long input are written from where they lie, not from a second copy or a text of the whole."""
    made, layout = long_audio(500, tokens)
    assert peak(tmp_path / name, made, layout) < made[0].values.nbytes / 4


@pytest.mark.parametrize("tokens", [0, 32])
def test_parquet_holds_one_row_group(tmp_path: Path, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .parquet keeps no more rows back than one row group has, also within one long input."""
    pytest.importorskip("pyarrow")
    from w2v_runtime.stores import parquet

    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 2**18)
    made, layout = long_audio(3000, tokens)
    assert peak(tmp_path / "out.parquet", made, layout) < made[0].values.nbytes / 8


@pytest.mark.parametrize("kind", ["bits", "usual", "round", "powers"])
def test_numbers_are_written_alike_with_and_without_orjson(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra only saves time: every number has the digits that it has without, exponents included."""
    pytest.importorskip("orjson")
    random = np.random.default_rng(3)
    values = {
        "bits": random.integers(0, 2**32, 30_000, np.uint32).view(np.float32),
        "usual": random.standard_normal(30_000, np.float32) * np.float32(0.01),
        "round": np.round(random.standard_normal(30_000) * 1e3, 2).astype(np.float32),
        "powers": (10.0 ** random.uniform(-7, 18, 30_000)).astype(np.float32),
    }[kind]
    values = values[np.isfinite(values)]
    fast = text.joined(values, ", ")
    monkeypatch.setattr(text, "_dumps", None)
    assert text.joined(values, ", ") == fast
    assert np.array(fast.split(", "), np.float64).astype(np.float32).tobytes() == values.tobytes()
