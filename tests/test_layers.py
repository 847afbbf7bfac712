"""Layers: which are had, what they are, what they cost, and how they reach the outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from conftest import speech
from w2v_models import TOLERANCES, RefusedError
from w2v_runtime import Embedder
from w2v_runtime.embedding.layer_weights import read_weights
from w2v_runtime.embedding.results import Request
from w2v_runtime.embedding.windows import Windowing
from w2v_runtime.graphs.onnx_file import OnnxFile

FRAMES = TOLERANCES["fp32"]["frames"].max_abs
POOLED = TOLERANCES["fp32"]["pooled"].max_abs
KINDS = ("base", "large")


@pytest.fixture
def waveform() -> np.ndarray:
    return speech(1.3, seed=3)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_what_enters_and_leaves_the_blocks_of_the_reference(checkpoints, bundles, kind, waveform):
    """Layer 0 enters the first block, layer k leaves block k before any final norm, by hooks on transformers."""
    pytest.importorskip("torch")
    from families import Reference

    embedder = Embedder(bundles(kind))
    expected, last, _ = Reference(checkpoints(kind))(waveform, embedder.manifest.architecture.conv.num_frames(20800))
    mine = embedder.embed((waveform, 16000), level="frame", layer="all").values
    assert mine.shape == (len(last), 4, 48)
    assert np.abs(mine - expected.transpose(1, 0, 2)).max() <= FRAMES
    for layer in range(4):
        one = embedder.embed((waveform, 16000), level="frame", layer=layer).values
        assert one.shape == last.shape
        assert np.abs(one - expected[layer]).max() <= FRAMES
    listed = embedder.embed((waveform, 16000), layer=["3", "last", 1], pooling="mean,std,min,max").values
    frames = [expected[3], last, expected[1]]
    pooled = [np.concatenate([f.mean(0), f.std(0), f.min(0), f.max(0)]) for f in frames]
    assert listed.shape == (3, 4 * 48)
    assert np.abs(listed - np.stack(pooled)).max() <= FRAMES
    assert (kind == "base") == (np.abs(listed[0] - listed[1]).max() < 1e-6)  # only a final norm sets them apart


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_never_changes_a_layer(bundles, kind):
    """Every layer of unequal recordings, one of a single frame and NaN in the padding, equals each alone."""
    embedder = Embedder(bundles(kind))
    waveforms = [speech(samples / 16000, seed=i) for i, samples in enumerate((400, 5000, 23456))]
    names = [f"layer_{k}_{pooling}" for k in range(4) for pooling in ("mean", "std", "min", "max")]
    batched = embedder.forward(waveforms, names, fill=np.nan)
    for i, waveform in enumerate(waveforms):
        for one, many in zip(embedder.forward([waveform], names), batched, strict=True):
            assert np.abs(one[0] - many[i]).max() <= POOLED


@pytest.mark.parametrize("kind", KINDS)
def test_windows_have_layers_too(bundles, kind):
    """Several layers of a recording in windows, pooled and frame by frame, are those of its windows alone."""
    waveform = np.tile(speech(1.1, seed=1), 4)
    windowed, whole = (Embedder(bundles(kind), windowing=w) for w in (Windowing(1, 9, whole=1), Windowing()))
    for options in ({"level": "frame"}, {"pooling": "mean,max"}):
        ours = windowed.embed((waveform, 16000), layer="0,2,last", **options).values
        theirs = whole.embed((waveform, 16000), layer="0,2,last", **options).values
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= FRAMES


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_layers_asked_for_are_computed(bundles, kind):
    """The graph for layer k holds k blocks and no more weights than they need; all layers cost one pass."""
    onnx = pytest.importorskip("onnx")
    folder = bundles(kind) / "onnx"
    file = OnnxFile.read(folder / "layers.onnx")

    def blocks(outputs: list[str]) -> tuple[int, int]:
        graph = onnx.load_from_string(file.cut(outputs)).graph
        return sum(node.op_type == "Attention" for node in graph.node), len(graph.initializer)

    assert [blocks([f"layer_{k}_mean"])[0] for k in range(4)] == [0, 1, 2, 3]
    assert blocks([f"layer_{k}_mean" for k in range(4)])[0] == 3
    assert blocks(["layer_1"])[1] < blocks(["layer_2"])[1] < blocks(["layer_3"])[1]
    data = (folder / "model.onnx_data").stat().st_size
    assert {entry.location for entry in file.external} == {"model.onnx_data"}
    assert data < 2**20  # of a tiny model: its weights once, not once a graph


def test_layer_weights_make_one_vector_of_all_layers(bundles, waveform, tmp_path):
    """The sum is that of the layers, pooled, by frames and in windows; learnt weights go through a softmax."""
    embedder = Embedder(bundles("large"))
    weights = (0.5, 0.125, 0.125, 0.25)
    layers = embedder.embed((waveform, 16000), level="frame", layer="all").values
    expected = np.tensordot(layers, weights, axes=(1, 0))
    frames = embedder.embed((waveform, 16000), level="frame", layer_weights=weights).values
    assert np.abs(frames - expected).max() <= FRAMES
    pooled = embedder.embed((waveform, 16000), pooling="mean,std", layer_weights=weights).values
    assert np.abs(pooled - np.concatenate([expected.mean(0), expected.std(0)])).max() <= FRAMES
    windowed = Embedder(embedder.bundle, windowing=Windowing(1, 9, whole=1))
    long = np.tile(waveform, 9)
    one, other = (e.embed((long, 16000), layer_weights=weights).values for e in (windowed, embedder))
    assert np.abs(one - other).max() <= FRAMES

    np.save(tmp_path / "w.npy", np.array(weights, np.float32))
    (tmp_path / "w.json").write_text(json.dumps(weights))
    (tmp_path / "w.txt").write_text("0.5, 0.125\n0.125 0.25\n")
    for name in ("w.npy", "w.json", "w.txt"):
        assert read_weights(tmp_path / name) == weights
    (tmp_path / "learnt.txt").write_text("1 2 0.5 -3")
    learnt = np.exp([1, 2, 0.5, -3])
    found = embedder.embed((waveform, 16000), layer_weights=read_weights(tmp_path / "learnt.txt")).values
    expected = np.tensordot(layers.mean(axis=0), learnt / learnt.sum(), axes=(0, 0))
    assert np.abs(found - expected).max() <= POOLED


def test_bad_layers_and_weights_are_refused_with_the_range(bundles, waveform, tmp_path):
    """A layer beyond the last, twice, mixed with all, or weights of the wrong number or content."""
    embedder = Embedder(bundles("base"))
    for layer, says in ((4, "0 to 3"), ("-1", "0 to 3"), ("2,2", "twice"), ("all,1", "all alone"), ("", "0 to 3")):
        with pytest.raises(RefusedError, match=says):
            embedder.embed((waveform, 16000), layer=layer)
    with pytest.raises(RefusedError, match="3 layer weights, but the model has the 4 layers 0 to 3"):
        embedder.embed((waveform, 16000), layer_weights=[1, 0, 0])
    with pytest.raises(RefusedError, match="exclude each other"):
        Request.of("utterance", "mean", "2", [1, 0, 0, 0])
    for content in ("", "1 2 three", "nan 1", "1e400 0"):
        (tmp_path / "w.txt").write_text(content)
        with pytest.raises(RefusedError, match=r"w\.txt does not hold layer weights"):
            read_weights(tmp_path / "w.txt")
    np.save(tmp_path / "w.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name in ("w.npy", "absent.txt"):
        with pytest.raises(RefusedError, match=name):
            read_weights(tmp_path / name)


def test_layers_reach_the_outputs(bundles, recordings, tmp_path):
    """The command writes several layers with their axis, refuses a layer out of range, and resumes only the same."""
    from commands import embed

    bundle = bundles("large")
    status, log = embed(recordings, "-m", bundle, "-o", tmp_path / "o.npz", "--layer", "all")
    assert status == 0, log
    with np.load(tmp_path / "o.npz") as output:
        assert output["embeddings"].shape == (5, 4, 48)
        assert json.loads(str(output["metadata"]))["layer"] == ["0", "1", "2", "3"]
        first = Embedder(bundle).embed(str(output["paths"][0]), layer="all").values
        assert np.abs(output["embeddings"][0] - first).max() <= POOLED
    for options, says in (
        (("--layer", "4"), "choose from 0 to 3"),
        (("--layer", "2", "--resume"), "layers was"),
        (("--layer-weights", tmp_path / "absent"), "cannot be read"),
    ):
        status, log = embed(recordings, "-m", bundle, "-o", tmp_path / "o.npz", *options)
        assert status == 2
        assert says in log
        assert "Traceback" not in log
    (tmp_path / "weights.txt").write_text("0 0 1 0")
    soundfile.write(tmp_path / "one.wav", speech(0.7), 16000)
    arguments = (tmp_path / "one.wav", "-m", bundle, "--level", "frame", "-o", tmp_path / "o.csv")
    assert embed(*arguments, "--layer-weights", tmp_path / "weights.txt")[0] == 0
    table = np.genfromtxt(tmp_path / "o.csv", delimiter=",", skip_header=1)[:, 3:]
    expected = Embedder(bundle).embed(tmp_path / "one.wav", level="frame", layer=2).values
    assert np.abs(table - expected).max() <= FRAMES
