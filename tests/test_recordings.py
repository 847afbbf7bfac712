"""What Python callers give: every kind that is embedded, batched alike; any other, refused with the right call."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from conftest import speech
from w2v_models import AudioError, RefusedError
from w2v_models.errors import EngineError
from w2v_runtime import Embedder, Embedding, Failure
from w2v_runtime.embedding.corpus import CorpusOptions
from w2v_runtime.embedding.windows import Windowing

RATE = 16000
#: Short, so that some recordings go through windows.
WINDOWING = Windowing(1, 0.25, whole=1.5)


@pytest.fixture(scope="module")
def embedder(bundles) -> Embedder:
    return Embedder(bundles("base"), device="cpu", threads=1, windowing=WINDOWING)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Three that are embedded whole and two that are not, all of one kind."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{i}.wav" for i in range(5)]
    for i, path in enumerate(paths):
        soundfile.write(path, speech((0.5, 0.8, 1.1, 3.1, 4.2)[i], seed=i), RATE, subtype="FLOAT")
    return paths


class Pipe(io.RawIOBase):
    """A stream that can be read only once."""

    def __init__(self, content: bytes) -> None:
        self._rest = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._rest.readinto(buffer)


class Broken(io.RawIOBase):
    """A file on a network that is gone."""

    name = "broken.wav"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return 0

    def readinto(self, buffer: Any) -> int:
        raise ConnectionError("the network is gone")


@contextlib.contextmanager
def all_kinds(path: Path) -> Iterator[dict[str, tuple[Any, str]]]:
    """A recording in every form in which it may be given, with the name that its result has."""
    content, waveform = path.read_bytes(), soundfile.read(path, dtype="float32")[0]
    with (
        path.open("rb") as file,
        tempfile.TemporaryFile() as unnamed,
        zipfile.ZipFile(io.BytesIO(), "w") as archive,
    ):
        archive.writestr("in.zip.wav", content)
        unnamed.write(content)
        unnamed.seek(0)
        prefix = io.BytesIO(b"something before it" + content)
        prefix.seek(len(b"something before it"))
        yield {
            "string": (str(path), str(path)),
            "path": (path, str(path)),
            "bytes": (content, ""),
            "bytearray": (bytearray(content), ""),
            "memoryview": (memoryview(content), ""),
            "open file": (file, str(path)),
            "file in memory": (io.BytesIO(content), ""),
            "file that stands behind its beginning": (prefix, ""),
            "unnamed file": (unnamed, ""),
            "file in an archive": (archive.open("in.zip.wav"), "in.zip.wav"),
            "stream": (Pipe(content), ""),
            "pair": ((waveform, RATE), ""),
            "pair with a rate of numpy's": ((waveform[:, None], np.int64(RATE)), ""),
            "pair of a list": ((waveform.tolist(), float(RATE)), ""),
        }


@pytest.mark.parametrize("index", [1, 3])
def test_every_kind_is_the_same_recording(embedder, files, index):
    """Alone and in one batch with all others, whole and in windows, an open file twice: the file's own values."""
    expected = {level: embedder.embed(files[index], level=level) for level in ("utterance", "frame")}
    with all_kinds(files[index]) as kinds:
        for kind, (recording, name) in kinds.items():
            for level in ("utterance",) if kind == "stream" else expected:
                answer = embedder.embed(recording, level=level)
                assert answer.path == name, kind
                np.testing.assert_allclose(answer.values, expected[level].values, rtol=0, atol=1e-6, err_msg=kind)
    with all_kinds(files[index]) as kinds:
        results = list(embedder.embed_files(recording for recording, _ in kinds.values()))
        assert [result.path for result in results] == [name for _, name in kinds.values()]
    for kind, result in zip(kinds, results, strict=True):
        assert isinstance(result, Embedding), (kind, result)
        assert result.duration == pytest.approx(expected["utterance"].duration)
        np.testing.assert_allclose(result.values, expected["utterance"].values, rtol=0, atol=1e-5, err_msg=kind)


def test_they_are_batched_like_files(embedder, files, monkeypatch):
    """Pairs, bytes and open files of like lengths share a batch with files; what is long has windows of its own."""
    batches, embed_batch = [], Embedder.embed_batch
    monkeypatch.setattr(Embedder, "embed_batch", lambda *a: batches.append(len(a[1])) or embed_batch(*a))
    with files[0].open("rb") as file:
        short = [files[0], files[0].read_bytes(), file, soundfile.read(files[0], dtype="float32")]
        long = [files[3].read_bytes(), soundfile.read(files[3], dtype="float32")]
        results = list(embedder.embed_files([*short, *long]))
    assert batches == [4]
    assert [len(result.values) for result in results] == [48] * 6
    for result in results[4:]:
        np.testing.assert_allclose(result.values, embedder.embed(files[3]).values, rtol=0, atol=1e-6)


def test_what_cannot_be_read_fails_alone(embedder, files):
    """Bytes that are no audio, a closed and a broken file, waveforms of odd shapes: each its own failure, with why."""
    with files[0].open("rb") as closed:
        pass
    bad = (
        {
            b"not audio at all, though long enough to be some": "format",
            closed: "closed",
            Broken(): "the network is gone",
            (np.zeros((2, 3, 4)), RATE): "3 dimensions",
            (np.array([0.0, np.nan] * 1000), RATE): "not finite",
            (np.zeros(10), RATE): "too short",
            (np.zeros(1000), 3): "sample rate",
            ([[0.0], [0.0, 0.1]], RATE): "not an array",
        }
        if False
        else [
            (b"not audio at all, though long enough to be some", "format"),
            (closed, "closed"),
            (Broken(), "the network is gone"),
            ((np.zeros((2, 3, 4)), RATE), "3 dimensions"),
            ((np.array([0.0, np.nan] * 1000), RATE), "not finite"),
            ((np.zeros(10), RATE), "too short"),
            ((np.zeros(1000), 3), "sample rate"),
            (([[0.0], [0.0, 0.1]], RATE), "not an array"),
        ]
    )
    recordings = [recording for one, _ in bad for recording in (one, files[0])]
    results = list(embedder.embed_files(recordings))
    for (recording, reason), result in zip(bad, results[::2], strict=True):
        assert isinstance(result, Failure), recording
        assert result.stage == "read"
        assert reason in result.reason
        with pytest.raises(AudioError, match=reason):
            embedder.embed(recording)
    assert [result.path for result in results[2:6:2]] == [str(files[0]), "broken.wav"]
    for result in results[1::2]:
        np.testing.assert_allclose(result.values, embedder.embed(files[0]).values, rtol=0, atol=1e-6)


def tensor_kinds() -> list[tuple[Any, str]]:
    torch = pytest.importorskip("torch")
    return [
        (torch.zeros(8000, requires_grad=True), r"\.detach\(\)"),
        (torch.zeros(8000, dtype=torch.bfloat16), r"\.float\(\)"),
        (torch.zeros(8000, device="meta"), r"\.cpu\(\)"),
    ]


def test_tensors_are_taken_or_refused_in_a_sentence(embedder):
    """A float tensor is a waveform; one that needs grad, is bfloat16 or elsewhere leaks no exception of PyTorch's."""
    torch = pytest.importorskip("torch")
    voice = speech(0.8)
    answer = embedder.embed((torch.from_numpy(voice), RATE))
    np.testing.assert_array_equal(answer.values, embedder.embed((voice, RATE)).values)
    for tensor, fix in tensor_kinds():
        with pytest.raises(AudioError, match=fix):
            embedder.embed((tensor, RATE))
        (result,) = embedder.embed_files([(tensor, RATE)])
        assert isinstance(result, Failure)
        with pytest.raises(TypeError, match=r"needs its sample rate: embed\(\(waveform, sample_rate\)\)\."):
            embedder.embed(tensor)


PAIR = r"\(waveform, sample_rate\)"
HUGGING_FACE = {"path": "a.wav", "array": np.zeros(8000), "sampling_rate": RATE}


@pytest.mark.parametrize(
    ("given", "says", "right"),
    [
        (np.zeros(8000), "a waveform needs its sample rate", PAIR),
        ([0.1, 0.2, 0.3], "a waveform needs its sample rate", PAIR),
        ((0.1, 0.2, 0.3), "a waveform needs its sample rate", PAIR),
        ((RATE, np.zeros(8000)), r"\(sample_rate, waveform\) is the wrong way round", PAIR),
        ((np.zeros(8000), "16000"), "the sample rate is a number of Hz, not str", PAIR),
        ((np.zeros(8000), None), "the sample rate is a number of Hz, not None", PAIR),
        ((np.zeros(8000), True), "the sample rate is a number of Hz, not bool", PAIR),
        (HUGGING_FACE, "a recording is not dict", r"\(audio\['array'\], audio\['sampling_rate'\]\)"),
        ({"path": "a.wav", "bytes": b"x"}, "a recording is not dict", r"audio\['bytes'\]"),
        ({"path": "a.wav", "bytes": None}, "a recording is not dict", r"audio\['path'\]"),
        ({}, "a recording is not dict", PAIR),
        (io.StringIO("text"), "a file in text mode cannot be read as audio", r"open\(path, 'rb'\)"),
        (None, "a recording is .*, not None", "path"),
        (7, "a recording is .*, not int", "path"),
    ],
)
def test_other_kinds_are_refused_with_the_right_call(embedder, files, given, says, right):
    """By embed; by embed_files when it is called with a list, and behind what came before in an iterable."""
    with pytest.raises(TypeError, match=rf"^{says}: embed\({right}\)\.$"):
        embedder.embed(given)
    says = rf"^paths\[1\]: {says}: embed_files\(\[{right}, …\]\)\.$"
    with pytest.raises(TypeError, match=says):
        embedder.embed_files([files[0], given])
    results = embedder.embed_files(iter([files[0], given]))
    assert next(results).path == str(files[0])
    with pytest.raises(TypeError, match=says):
        next(results)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("a.wav", r"many recordings: embed\('a\.wav'\) or embed_files\(\['a\.wav'\]\)"),
        (Path("a.wav"), r"embed\(PosixPath\('a\.wav'\)\) or embed_files"),
        (b"RIFF", r"embed\(recording\) or embed_files\(\[recording"),
        (io.BytesIO(b"RIFF"), r"embed\(recording\) or embed_files\(\[recording"),
        (io.StringIO("a.wav"), r"embed\(recording\) or embed_files\(\[recording"),
        (np.zeros(8000), f"embed\\({PAIR}\\) or embed_files\\(\\[{PAIR}"),
        (np.zeros((2, 8000)), f"embed\\({PAIR}\\) or embed_files\\(\\[{PAIR}"),
        ((np.zeros(8000), RATE), f"embed\\({PAIR}\\) or embed_files\\(\\[{PAIR}"),
        ((RATE, np.zeros(8000)), f"embed\\({PAIR}\\) or embed_files\\(\\[{PAIR}"),
        ([0.1, 0.2], r"paths\[0\]: .*not float"),
        (HUGGING_FACE, r"embed\(\(audio\['array'\], audio\['sampling_rate'\]\)\)"),
        (7, r"an iterable of recordings, not int: embed_files\(\[path"),
        (None, r"an iterable of recordings, not None"),
    ],
)
def test_one_recording_is_not_many(embedder, given, says):
    """When embed_files is called, not at the first result."""
    with pytest.raises(TypeError, match=says):
        embedder.embed_files(given)


def test_paths_come_in_whatever_holds_paths(embedder, files):
    """Lists, tuples, arrays of strings or of objects, generators, dictionary keys."""
    names = [str(path) for path in files[:3]]
    expected = [embedder.embed(name).values for name in names]
    for given in (
        names,
        tuple(files[:3]),
        np.array(names),
        np.array(files[:3]),
        iter(names),
        dict.fromkeys(names).keys(),
    ):
        results = list(embedder.embed_files(given))
        assert [result.path for result in results] == names
        for result, right in zip(results, expected, strict=True):
            np.testing.assert_allclose(result.values, right, rtol=0, atol=1e-5)
    assert list(embedder.embed_files([])) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layer": None}, "layer is last, all, a whole number from 0, or several of them, not None"),
        ({"layer": 1.0}, "layer is last, all, a whole number from 0, or several of them, not 1.0"),
        ({"layer": True}, "layer is last, .* not True"),
        ({"layer": [1, None]}, "layer is last, .* not \\[1, None\\]"),
        ({"layer": []}, "layer is last, .* not \\[\\]"),
        ({"layer": b"last"}, "layer is last"),
        ({"layer": -1}, "choose from 0 to 3, last, or all"),
        ({"layer": 4}, "choose from 0 to 3, last, or all"),
        ({"pooling": None}, "pooling is one or several of mean, std, min, max, not None"),
        ({"pooling": 0.5}, "pooling is one or several of mean, std, min, max, not 0.5"),
        ({"pooling": {"mean": 1}}, "pooling is one or several of"),
        ({"pooling": "median"}, "choose from: mean, std, min, max"),
        ({"level": None}, "choose one of: utterance, frame"),
        ({"level": 1}, "choose one of: utterance, frame"),
        ({"layer_weights": "abc"}, "layer_weights .* finite numbers, one for each layer"),
        ({"layer_weights": 0.5}, "layer_weights .* finite numbers"),
        ({"layer_weights": [1, None, 1, 1]}, "layer_weights .* finite numbers"),
        ({"layer_weights": [1, np.nan, 1, 1]}, "layer_weights .* finite numbers"),
        ({"layer_weights": [1, 1]}, "2 layer weights, but the model has the 4 layers"),
        ({"channel": "left"}, "channel must be a number from 0, or None for the mean of all, not 'left'"),
        ({"channel": -1}, "channel must be a number from 0"),
        ({"channel": 1.0}, "channel must be a number from 0"),
        ({"batch_seconds": 0}, r"batch_seconds \(--batch-seconds\) must be positive, not 0"),
        ({"batch_seconds": "8"}, "batch_seconds .* must be positive, not '8'"),
        ({"batch_seconds": float("inf")}, "batch_seconds .* must be positive, not inf"),
        ({"batch_seconds": float("nan")}, "batch_seconds .* must be positive, not nan"),
        ({"jobs": 0}, r"jobs \(--jobs\) must be a whole number, at least 1, not 0"),
        ({"jobs": 2.0}, "jobs .* must be a whole number, at least 1, not 2.0"),
    ],
)
def test_options_are_refused_when_called_with_what_there_is(embedder, files, options, says):
    """By a sentence that names the argument of Python, and what it may be."""
    with pytest.raises(RefusedError, match=says):
        embedder.embed_files(files, **options)
    if not {"batch_seconds", "jobs"} & options.keys():
        with pytest.raises(RefusedError, match=says):
            embedder.embed(files[0], **options)


def test_an_unknown_option_is_refused_with_the_known_ones(embedder, files):
    says = r"no option batch_size, overlap; its options are channel, pad_short, strict, batch_seconds, jobs\."
    with pytest.raises(TypeError, match=says):
        embedder.embed_files(files, batch_size=8, strict=True, overlap=2)


def test_numbers_of_numpy_s_are_numbers(embedder, files):
    """Layers, channels and counts as arrays hold them."""
    expected = embedder.embed(files[0], layer=[0, 2]).values
    for layers in (np.array([0, 2]), [np.int64(0), np.int32(2)], range(0, 4, 2)):
        np.testing.assert_array_equal(embedder.embed(files[0], layer=layers, channel=np.int64(0)).values, expected)
    assert CorpusOptions(batch_seconds=np.float32(3), jobs=np.int64(2)).jobs == 2
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    expected = embedder.embed(files[0], layer_weights=weights.tolist()).values
    np.testing.assert_array_equal(embedder.embed(files[0], layer_weights=weights).values, expected)


def test_errors_name_the_argument_and_the_option(embedder, bundles):
    """What a caller of Python types, and what a user of the command does."""
    with pytest.raises(AudioError, match=r"pad_short=True \(--pad-short\)"):
        embedder.embed((np.zeros(10), RATE))
    assert embedder.embed((np.zeros(10), RATE), pad_short=True).warnings
    (padded,) = embedder.embed_files([(np.zeros(10), RATE)], pad_short=True)
    assert "padded with silence" in padded.warnings[0]
    (strict,) = embedder.embed_files([(np.zeros(10), RATE)], pad_short=True, strict=True)
    assert isinstance(strict, Failure)
    with pytest.raises(EngineError, match=r"device='cuda' \(--device cuda\)"):
        Embedder(bundles("base"), device="cpu", precision="tf32")
    with pytest.raises(EngineError, match="device None is unknown; choose one of: auto, cpu"):
        Embedder(bundles("base"), device=None)
    for threads in (0, -1, 1.5, "2", True):
        with pytest.raises(EngineError, match=r"threads \(--threads\) must be a whole number from 1 to 1024"):
            Embedder(bundles("base"), device="cpu", threads=threads)


def test_an_open_file_is_left_as_it_stood(embedder, files):
    """Where it stood, open, and its owner's."""
    for path in (files[0], files[3]):
        with path.open("rb") as file:
            first = embedder.embed(file).values
            assert file.tell() == 0
            np.testing.assert_array_equal(embedder.embed(file).values, first)
            (result,) = embedder.embed_files([file])
            np.testing.assert_allclose(result.values, first, rtol=0, atol=1e-6)
            assert (file.tell(), file.closed) == (0, False)
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as stream:
        stream.write(files[0].read_bytes())
    with os.fdopen(reader, "rb") as stream:
        answer = embedder.embed(stream)
    assert answer.path == ""
    np.testing.assert_array_equal(answer.values, embedder.embed(files[0]).values)
