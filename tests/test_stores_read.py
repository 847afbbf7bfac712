"""Reading outputs back: bit for bit, input by input, in flat memory, and never what is damaged."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from w2v_models.errors import OutputError
from w2v_runtime.embedding.results import Embedding, FrameTimes, Level
from w2v_runtime.stores import Layout, OutputFormat, open_store, output_format, read_logits, read_metadata, read_values

DIM = 5
#: Names that end lines, hold quotes, look like the writers' own words, or are no text.
NAMES = ["a.wav", 'x, "embedding": [1].wav', "two\r\nlines.wav", os.fsdecode(b"\xff.wav"), "b/a.wav", "b/c.wav"]
NAMES_OF_OUTPUTS = ["out.npz", "out.csv", "out.jsonl", "out.parquet", "out.h5", "out.scp", "out"]
#: Tokens of which some are columns, words and signs of the formats.
TOKENS = ("|", ",", '"', "file", "f0", "embedding", ', "logits": [[', ', "embeddings": [[', "a", "a", "a.b", "")
#: Its shortest decimal, 7.038531e-26, becomes the next float32 when it is rounded to a double on the way.
ROUNDED_TWICE = np.uint32(0x15AE43FD).view(np.float32)
DAMAGED = (
    r"does not hold what its journal says; replace it with w2v-embed --overwrite|is not the file that \S+ describes"
)


@dataclass(frozen=True)
class Shape:
    """What an output holds."""

    level: Level = "utterance"
    layers: tuple[str, ...] = ("last",)
    labels: tuple[str, ...] = ()
    head: Level = "utterance"

    def embeddings(self, names: list[str] = NAMES, frames: int = 1) -> list[Embedding]:
        """One embedding a name, of any finite floats; at frame level with ``frames``, ``frames`` + 1, … frames."""
        random = np.random.default_rng(1)
        made = []
        for i, name in enumerate(names):
            vector = (DIM,) if len(self.layers) == 1 else (len(self.layers), DIM)
            shape = (frames + i, *vector) if self.level == "frame" else vector
            bits = random.integers(0, 2**32, shape, np.uint32)
            values = bits.view(np.float32)
            values[~np.isfinite(values)] = -0.0
            columns = (frames + i, len(self.labels)) if self.head == "frame" else (len(self.labels),)
            logits = random.standard_normal(columns, np.float32) if self.labels else None
            made.append(Embedding(name, values, 1.5, logits))
        return made

    def layout(self, made: list[Embedding]) -> Layout:
        frames = sum(len(embedding.values) for embedding in made) if self.level == "frame" else 0
        times = FrameTimes(0.02, 0.025)
        return Layout(len(made), frames, DIM, self.layers, self.level, self.labels, times, {"model": "tiny"}, self.head)


SHAPES = pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape("utterance", ("0", "last"), ("arousal", "valence")),
        Shape("frame", ("9",), ("arousal",)),
        Shape("frame", ("0", "9", "last")),
        Shape("frame", ("last",), TOKENS, "frame"),
        Shape("frame", ("0", "last"), TOKENS, "frame"),
    ],
    ids=["utterance", "utterance-layers-head", "frame-head", "frame-layers", "tokens", "tokens-layers"],
)


@pytest.fixture(params=NAMES_OF_OUTPUTS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where an output of each format goes."""
    pytest.importorskip({"out.parquet": "pyarrow", "out.h5": "h5py", "out.scp": "kaldiio"}.get(request.param, "numpy"))
    return tmp_path / request.param


def logit_shapes(made: list[Embedding]) -> list[tuple[int, ...]]:
    return [embedding.logits.shape for embedding in made]


def kind_of(path: Path) -> OutputFormat:
    return output_format(str(path) if path.suffix else f"{path}/")


def store(path: Path, shape: Shape, made: list[Embedding]) -> None:
    target = open_store(path, shape.layout(made), kind_of(path))
    for embedding in made:
        target.write(embedding)
    target.commit()


def read(path: Path, shapes: list[tuple[int, ...]]) -> Iterator[np.ndarray]:
    return read_values(path, kind_of(path), iter(shapes))


def logits_of(path: Path, shapes: list[tuple[int, ...]]) -> Iterator[np.ndarray]:
    return read_logits(path, kind_of(path), iter(shapes))


def shapes_of(made: list[Embedding]) -> list[tuple[int, ...]]:
    return [embedding.values.shape for embedding in made]


@SHAPES
def test_values_return_bit_for_bit(output: Path, shape: Shape) -> None:
    """Each input's values come back with their shape and every bit, whatever floats and names they are."""
    made = shape.embeddings()
    made[0].values.reshape(-1)[0] = ROUNDED_TWICE
    made[1].values.reshape(-1)[0] = -ROUNDED_TWICE
    store(output, shape, made)
    values = list(read(output, shapes_of(made)))
    assert len(values) == len(made)
    for actual, embedding in zip(values, made, strict=True):
        assert actual.dtype == np.float32
        assert actual.shape == embedding.values.shape
        assert actual.tobytes() == embedding.values.tobytes()


@pytest.mark.parametrize("block", [2**20, 40])
@pytest.mark.parametrize("layers", [("last",), ("0", "9")])
def test_logits_by_frame_return_bit_for_bit(
    output: Path, layers: tuple[str, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each input's logits come back with their shape and every bit, wherever blocks of reading end."""
    shape = Shape("frame", layers, TOKENS, "frame")
    made = shape.embeddings()
    made[1].logits.reshape(-1)[0] = ROUNDED_TWICE
    store(output, shape, made)
    for module in ("reading", "jsonl"):
        monkeypatch.setattr(f"w2v_runtime.stores.{module}.BLOCK_BYTES", block)
    logits, values = list(logits_of(output, shapes := logit_shapes(made))), list(read(output, shapes_of(made)))
    assert [array.shape for array in logits] == shapes
    for embedding, actual, array in zip(made, logits, values, strict=True):
        assert actual.dtype == np.float32
        assert actual.tobytes() == embedding.logits.tobytes()
        assert array.tobytes() == embedding.values.tobytes()


def test_logits_that_the_output_lacks_are_refused(output: Path) -> None:
    """Logits of more inputs, frames or labels than the output holds, or of an output without any, are refused."""
    shape = Shape("frame", labels=("a", "b"), head="frame")
    made = shape.embeddings(NAMES[:2])
    store(output, shape, made)
    for wrong in ([(1, 2)], [(1, 2), (2, 2), (1, 2)], [(1, 2), (3, 2)], [(1, 3), (2, 3)], [(2,), (4,)]):
        with pytest.raises(OutputError, match=DAMAGED):
            list(logits_of(output, wrong))
    bare = output.with_name(f"bare-{output.name}")
    store(bare, Shape("frame"), [Embedding(embedding.path, embedding.values, 1.0) for embedding in made])
    with pytest.raises(OutputError, match=DAMAGED):
        list(logits_of(bare, [(1, 2), (2, 2)]))


@SHAPES
def test_metadata_return(output: Path, shape: Shape) -> None:
    """Every format gives back what it was told of the run and the shape of its vectors."""
    store(output, shape, [])
    expected = {"model": "tiny", "dim": DIM, "layers": list(shape.layers)}
    assert read_metadata(output, kind_of(output)).items() >= expected.items()


@pytest.mark.parametrize("level", ["utterance", "frame"])
def test_no_inputs(output: Path, level: Level) -> None:
    """An output of no inputs gives no values, and is damaged where its journal says it has some."""
    store(output, Shape(level), [])
    assert list(read(output, [])) == []
    with pytest.raises(OutputError, match=DAMAGED):
        list(read(output, [(DIM,) if level == "utterance" else (2, DIM)]))


@SHAPES
def test_more_or_fewer_rows_than_the_journal_says_are_refused(output: Path, shape: Shape) -> None:
    """An output with an input too many or too few, or with vectors of another length, is refused."""
    made = shape.embeddings()
    store(output, shape, made)
    shapes = shapes_of(made)
    longer = [(*first, last + 1) for *first, last in shapes]
    for wrong in (shapes[:-1], [*shapes, shapes[-1]], longer):
        with pytest.raises(OutputError, match=DAMAGED):
            list(read(output, wrong))


def test_frames_are_counted_by_input_where_the_format_knows_inputs(output: Path) -> None:
    """Formats with an entry an input notice that two inputs' frames were counted wrongly, though the sum is right."""
    if kind_of(output) not in ("jsonl", "h5", "scp", "npy"):
        pytest.skip("this format is one run of rows")
    shape = Shape("frame")
    store(output, shape, shape.embeddings(["a.wav", "b.wav"]))
    with pytest.raises(OutputError, match=DAMAGED):
        list(read(output, [(2, DIM), (1, DIM)]))


def test_a_missing_output_is_refused(output: Path) -> None:
    """A journal whose output is gone names the output."""
    with pytest.raises(OutputError, match=f"{output.name} {DAMAGED}"):
        list(read(output, [(DIM,)]))
    with pytest.raises(OutputError, match=DAMAGED):
        read_metadata(output, kind_of(output))


@SHAPES
def test_a_cut_output_is_refused(output: Path, shape: Shape) -> None:
    """An output that lost its end, be it one byte, is found out; nothing but OutputError is raised."""
    made = shape.embeddings(NAMES[:3])
    store(output, shape, made)
    file = output if output.is_file() else max(set(output.rglob("*.npy")) - set(output.rglob("logits/**/*")))
    file = file.with_suffix(".ark") if output.suffix == ".scp" else file
    whole = file.read_bytes()
    for kept in (len(whole) - 1, len(whole) - 2, len(whole) * 2 // 3, len(whole) // 3, 1, 0):
        file.write_bytes(whole[:kept])
        with pytest.raises(OutputError, match=DAMAGED):
            list(read(output, shapes_of(made)))


def test_a_flipped_byte_raises_nothing_else(output: Path) -> None:
    """Whatever byte is damaged, reading gives arrays of the right shapes or OutputError."""
    if output.suffix == ".h5":
        pytest.skip("the HDF5 library itself is not proof against damage")
    shape = Shape("frame", ("0", "9"), ("a", "b"), "frame")
    made = shape.embeddings(["a.wav", "b.wav"])
    store(output, shape, made)
    file = output if output.is_file() else output / "index.jsonl"
    file = file.with_suffix(".ark") if output.suffix == ".scp" else file
    whole = file.read_bytes()
    for position in np.random.default_rng(2).integers(0, len(whole), 150):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        file.write_bytes(damaged)
        for reading, shapes in ((read, shapes_of(made)), (logits_of, logit_shapes(made))):
            try:
                arrays = list(reading(output, shapes))
            except OutputError:
                continue
            assert [array.shape for array in arrays] == shapes


def test_npz_values_are_checksummed(tmp_path: Path) -> None:
    """A single wrong bit among the vectors of an .npz is found by the archive's own checksum."""
    made = Shape().embeddings()
    path = tmp_path / "out.npz"
    store(path, Shape(), made)
    data = bytearray(path.read_bytes())
    data[data.index(made[2].values.tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match=DAMAGED):
        list(read(path, shapes_of(made)))


@pytest.mark.parametrize(("count", "frames"), [(150, 400), (1, 60_000)])
def test_memory_is_flat(output: Path, count: int, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much an output holds, in memory are one input's values and a few blocks."""
    for module in ("reading", "jsonl", "parquet") if output.suffix == ".parquet" else ("reading", "jsonl"):
        monkeypatch.setattr(f"w2v_runtime.stores.{module}.BLOCK_BYTES", 2**14)
    shape = Shape("frame", labels=("a", "b", "c", "d"), head="frame")
    numbers = (np.full((frames, DIM), i, np.float32) for i in range(count))
    made = [Embedding(f"{i}.wav", values, 1.0, values[:, :4]) for i, values in enumerate(numbers)]
    store(output, shape, made)
    wanted = ((read, shapes_of(made)), (logits_of, logit_shapes(made)))
    limit = 0.8e6 + 1.2 * made[0].values.nbytes
    del made
    for reading, shapes in wanted:
        tracemalloc.start()
        for i, values in enumerate(reading(output, shapes)):
            assert (values == i).all()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit


def test_system_errors_stay_system_errors(tmp_path: Path) -> None:
    """An output that may not be read is not called damaged."""
    path = tmp_path / "out.npz"
    store(path, Shape(), [])
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(PermissionError):
        list(read(path, []))
