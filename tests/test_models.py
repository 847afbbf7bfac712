"""The manifest and the bundle on disk: what is read back equals what was written, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from w2v_models import CATALOGUE, Bundle, BundleError, ConvStack, Manifest, ParityRow
from w2v_models.manifest import FileRecord
from w2v_runtime import Embedder

WAV2VEC2 = ConvStack((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), (512,) * 7)


def frames_by_the_recurrence(conv: ConvStack, samples: int) -> int:
    for kernel, stride in zip(conv.kernels, conv.strides, strict=True):
        samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
    return samples


def test_frames_follow_from_the_convolutions():
    """Receptive field, stride and frame counts are derived, and equal the level-by-level recurrence."""
    assert (WAV2VEC2.receptive_field, WAV2VEC2.stride) == (400, 320)
    assert (WAV2VEC2.num_frames(190_800), WAV2VEC2.num_frames(93_680)) == (596, 292)
    for conv in (WAV2VEC2, ConvStack((8, 4, 4), (4, 2, 2), (1, 1, 1)), ConvStack((3,), (1,), (1,))):
        for samples in range(conv.receptive_field * 4):
            assert conv.num_frames(samples) == frames_by_the_recurrence(conv, samples)


def test_a_manifest_reads_back_as_it_was_written(bundles):
    """JSON and back is the identity, hash included."""
    manifest = Bundle.open(bundles("emotion")).manifest
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.sha256 == manifest.sha256
    changed = dataclasses.replace(manifest, created="2020-01-01T00:00:00+00:00")
    assert changed.sha256 != manifest.sha256


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("format_version",), 1, "format_version"),
        (("format_version",), None, "format_version"),
        (("surprise",), 1, "unknown fields: surprise"),
        (("source", "model"), 3, "manifest.source.model must be of type str"),
        (("source", "weights"), "borrowed", "weights must be"),
        (("source", "seed"), 4, "seed"),
        (("architecture", "conv", "kernels"), [10, 3], "same length"),
        (("architecture", "conv", "strides"), "5", "a list"),
        (("architecture", "hidden_size"), 0, "positive"),
        (("architecture", "hidden_size"), True, "of type int"),
        (
            ("head",),
            {"kind": "regression", "labels": [], "outputs": ["logits"], "level": "frame", "pooling": [], "margin": 0},
            "labels",
        ),
        (("precisions",), {}, "at least one precision"),
        (("precisions", "fp32", "parity"), [], "without proof"),
        (("precisions", "fp32", "graph", "path"), "../model.onnx", "plain path"),
        (("precisions", "fp32", "graph", "path"), "/etc/passwd", "plain path"),
        (("precisions", "fp32", "graph", "path"), "onnx/../../x", "plain path"),
        (("precisions", "fp32", "graph", "path"), "onnx\\..\\x", "plain path"),
        (("precisions", "fp32", "graph", "sha256"), "00", "64 hexadecimal"),
        (("precisions", "fp32", "graph", "size"), -1, "negative"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_place(bundles, tmp_path, path, value, says):
    """Each broken field is named in one sentence."""
    shutil.copytree(bundles("base"), tmp_path / "b")
    file = tmp_path / "b" / "manifest.json"
    data = json.loads(file.read_text())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="manifest") as caught:
        Bundle.open(tmp_path / "b")
    assert says in str(caught.value)


def test_what_is_no_manifest_is_refused(tmp_path):
    """A missing folder, an empty one, text, deep nesting and a huge file are each refused."""
    with pytest.raises(BundleError, match="not a folder"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(tmp_path)
    for content in ("", "hello", "[1]", "[" * 100_000, "{}", " " * (5 * 2**20)):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(BundleError, match="not a valid manifest"):
            Bundle.open(tmp_path)


def broken(bundles, tmp_path: Path, change) -> Path:
    folder = tmp_path / "b"
    shutil.copytree(bundles("base"), folder)
    change(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: (b / "onnx/model.onnx").unlink(), "cannot be read"),
        (lambda b: (b / "onnx/model.onnx_data").unlink(), "cannot be read"),
        (lambda b: (b / "onnx/model.onnx_data").write_bytes(b"short"), "has 5 bytes"),
        (lambda b: (b / "onnx/model.onnx").write_bytes((b / "onnx/model.onnx").read_bytes()[::-1]), "SHA-256"),
        (lambda b: ((b / "onnx/model.onnx_data").rename(b / "x"), (b / "onnx/model.onnx_data").symlink_to(b / "x")),
         "not a regular file"),
        (lambda b: ((b / "onnx").rename(b.parent / "elsewhere"), (b / "onnx").symlink_to(b.parent / "elsewhere")),
         "not a regular file"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_the_recorded_one_is_never_opened(bundles, tmp_path, change, says):
    """Missing, short, changed or linked files are refused with their path before an engine sees them."""
    with pytest.raises(BundleError, match=says):
        Embedder(broken(bundles, tmp_path, change))


def test_another_graph_under_a_right_hash_is_refused(bundles, tmp_path):
    """A graph whose outputs are not the manifest's, or that is no graph at all, is refused."""
    from w2v_models.bundle import record

    folder = tmp_path / "b"
    shutil.copytree(bundles("emotion"), folder)

    def replace_graph(content: bytes) -> None:
        graph = folder / "onnx" / "model.onnx"
        graph.write_bytes(content)
        data = json.loads((folder / "manifest.json").read_text())
        data["precisions"]["fp32"]["graph"] = dataclasses.asdict(record(folder, graph))
        (folder / "manifest.json").write_text(json.dumps(data))

    for content in (b"not onnx", b""):
        replace_graph(content)
        with pytest.raises(BundleError, match="not an ONNX model"):
            Embedder(folder)
    shutil.copy(bundles("large") / "onnx" / "model.onnx_data", folder / "onnx" / "model.onnx_data")
    data = json.loads((folder / "manifest.json").read_text())
    data["precisions"]["fp32"]["data"] = [dataclasses.asdict(record(folder, folder / "onnx" / "model.onnx_data"))]
    (folder / "manifest.json").write_text(json.dumps(data))
    replace_graph((bundles("large") / "onnx" / "model.onnx").read_bytes())
    with pytest.raises(BundleError, match="logits"):
        Embedder(folder)


def test_a_difference_that_is_no_number_never_passes():
    """NaN and infinity miss every tolerance."""
    for value in (math.nan, math.inf):
        assert not ParityRow("x", "frames", value, 0.0, 1.0).within("fp32")
    assert not ParityRow("x", "frames", 0.0, 0.0, math.nan).within("fp32")
    assert ParityRow("x", "frames", 1e-4, 0.0, 1.0).within("fp32")
    assert not ParityRow("x", "pooled", 1e-4, 1e-4, 1.0).within("fp32")
    assert ParityRow("x", "pooled", 1e-4, 1e-5, 1.0).within("fp32")


def test_paths_inside_a_bundle_are_plain():
    """Only relative, forward, dot-free paths are accepted."""
    for path in ("onnx/model.onnx", "reference.npz", "a/b_c-d.e"):
        assert FileRecord(path, "0" * 64, 1).path == path
    for path in ("", "/a", "a//b", "./a", "a/..", ".hidden", "a b", "a\nb", "C:x", "a/"):
        with pytest.raises(ValueError, match="plain path"):
            FileRecord(path, "0" * 64, 1)


def test_the_catalogue_holds_the_variants_of_wav2vec2():
    """Ids and sizes of the first variants, and the emotion model's labels in the model card's order."""
    sizes = {
        v.id: (v.config["num_hidden_layers"], v.config["hidden_size"], v.config["feat_extract_norm"])
        for v in CATALOGUE[:7]
    }
    assert sizes == {
        "facebook/wav2vec2-base-960h": (12, 768, "group"),
        "facebook/wav2vec2-base": (12, 768, "group"),
        "facebook/wav2vec2-large-robust": (24, 1024, "layer"),
        "facebook/wav2vec2-large-robust-ft-swbd-300h": (24, 1024, "layer"),
        "facebook/wav2vec2-large-robust-ft-libri-960h": (24, 1024, "layer"),
        "facebook/wav2vec2-large-xlsr-53": (24, 1024, "layer"),
        "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim": (12, 1024, "layer"),
    }  # fmt: skip
    assert CATALOGUE[6].labels == ("arousal", "dominance", "valence")
    assert len({variant.id for variant in CATALOGUE}) == len(CATALOGUE)


def test_the_catalogue_normalises_only_what_was_trained_so():
    """WavLM's base models and DistilHuBERT take the recording as it is; their sources stand in the catalogue."""
    raw = {v.id: v.extractor["return_attention_mask"] for v in CATALOGUE if not v.extractor.get("do_normalize", True)}
    assert raw == {"microsoft/wavlm-base-plus": True, "microsoft/wavlm-base": True, "ntu-spml/distilhubert": False}
