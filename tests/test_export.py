"""Exported bundles against transformers, run as its documentation shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import LABELS, save_checkpoint, speech
from w2v_models import Bundle, BundleError, CheckpointError, OutputError, RefusedError
from w2v_models.tolerances import TOLERANCES
from w2v_runtime import Embedder
from w2v_runtime.embedding.parity import difference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import EmotionModel  # noqa: E402
from w2v_export import export_bundle  # noqa: E402
from w2v_export.checkpoint import load, seeded  # noqa: E402
from w2v_export.exporter import UnprovenError  # noqa: E402
from w2v_export.graph.waveform import GroupNormFrontEnd  # noqa: E402

KINDS = ("base", "large", "emotion")
FRAMES = TOLERANCES["fp32"]["frames"].max_abs
POOLED = TOLERANCES["fp32"]["pooled"].max_abs
LENGTHS = (400, 401, 719, 720, 1600, 4321, 16000, 23456)


@torch.inference_mode()
def reference(folder: Path, waveform: np.ndarray, kind: str):
    """A user's script: frames, mean and logits of one recording alone."""
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    inputs = extractor(waveform, sampling_rate=16000, return_tensors="pt")
    frames = transformers.Wav2Vec2Model.from_pretrained(folder).eval()(**inputs).last_hidden_state[0].numpy()
    if kind != "emotion":
        return frames, frames.mean(0), None
    pooled, logits = EmotionModel.from_pretrained(folder).eval()(inputs.input_values)
    return frames, pooled[0].numpy(), logits[0].numpy()


def test_the_group_norm_s_variances_keep_their_digits_in_long_audio():
    """Of filters that take nearly everything away (second differences), over 25 s in a batch, against float64."""
    conv, samples, lengths = torch.nn.Conv1d(1, 512, 10, 5, bias=False), 25 * 16000, (25 * 16000, 11 * 16000 + 7)
    front_end = GroupNormFrontEnd(conv, torch.nn.GroupNorm(512, 512), surplus=1)
    batch = np.zeros((2, samples), np.float32)
    for row, length in zip(batch, lengths, strict=True):
        row[:length] = 10 * speech(25)[:length]
    frames = front_end.frames(torch.from_numpy(batch)[:, :, None])
    _, covariance = front_end.statistics(frames, torch.tensor(lengths))
    filters = np.diff(np.random.default_rng(0).standard_normal((512, 12)), 2)
    for row, length, found in zip(batch, lengths, covariance.double().numpy(), strict=True):
        views = np.lib.stride_tricks.sliding_window_view(row[:length].astype(np.float64), 10)[::5]
        expected = np.einsum("ci,ij,cj->c", filters, np.cov(views.T, bias=True), filters)
        assert np.einsum("ci,ij,cj->c", filters, found, filters) == pytest.approx(expected, rel=6e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_checkpoint_embeds_as_in_transformers(checkpoints, bundles, kind):
    """Frames, pooled vectors and logits of each recording alone are transformers', down to one frame."""
    embedder = Embedder(bundles(kind))
    for i, samples in enumerate(LENGTHS):
        waveform = speech(samples / 16000, seed=i)
        frames, pooled, logits = reference(checkpoints(kind), waveform, kind)
        mine = embedder.embed((waveform, 16000), level="frame")
        assert mine.values.shape == frames.shape
        assert np.abs(mine.values - frames).max() <= FRAMES
        mean = embedder.embed((waveform, 16000))
        assert np.abs(mean.values - pooled).max() <= POOLED
        if kind == "emotion":
            assert embedder.labels == LABELS
            assert np.abs(mean.logits - logits).max() <= POOLED
        else:
            assert mean.logits is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [0.0, 1e4, np.nan, np.inf])
def test_a_batch_never_changes_an_embedding(bundles, kind, garbage):
    """Every utterance of a padded batch equals itself alone, whatever stands in the padding."""
    embedder = Embedder(bundles(kind))
    names = list(embedder.manifest.outputs)
    waveforms = [speech(samples / 16000, seed=i) for i, samples in enumerate(LENGTHS)]
    batched = dict(zip(names, embedder.forward(waveforms, names, fill=garbage), strict=True))
    for i, waveform in enumerate(waveforms):
        alone = dict(zip(names, embedder.forward([waveform], names), strict=True))
        frames = batched["frame_lengths"][i]
        assert frames == alone["frame_lengths"][0] == embedder.manifest.architecture.conv.num_frames(len(waveform))
        difference_ = np.abs(batched["last_hidden_state"][i, :frames] - alone["last_hidden_state"][0]).max()
        assert difference_ <= FRAMES / 5
        assert not batched["last_hidden_state"][i, frames:].any()
        if kind == "base":
            assert np.abs(batched["logits"][i, :frames] - alone["logits"][0]).max() <= FRAMES / 5
            assert not batched["logits"][i, frames:].any()
        for name in {"embedding"} | ({"logits"} if kind == "emotion" else set()):
            assert np.abs(batched[name][i] - alone[name][0]).max() <= POOLED


def test_real_recordings_embed_as_in_transformers(checkpoints, bundles, shared_audio):
    """The three encodings of one speech agree, and each 16 kHz recording gives what transformers gives."""
    import soundfile

    embedder = Embedder(bundles("base"))
    one, *others = (embedder.embed(shared_audio / f"jfk.{kind}").values for kind in ("wav", "flac", "mp3"))
    for other in others:
        assert difference(other[None], one[None])[2] > 0.999
    for name in ("jfk.wav", "libri-6313-76958-0021.flac", "ami-headset.wav"):
        waveform, rate = soundfile.read(shared_audio / name, dtype="float32")
        assert rate == 16000
        _, pooled, _ = reference(checkpoints("base"), waveform, "base")
        assert np.abs(embedder.embed(shared_audio / name).values - pooled).max() <= POOLED


def test_the_bundle_holds_its_proof(bundles):
    """The manifest holds parity rows for every case, alone and batched, within the one table of tolerances."""
    manifest = Bundle.open(bundles("emotion")).manifest
    rows = manifest.precisions["fp32"].parity
    cases = {row.case for row in rows}
    assert {"speech 400 samples", "speech 401 samples", "speech 12 s", "silence 1.3 s", "quiet 1 s"} <= cases
    assert any(case.startswith("batch of ") for case in cases)
    assert {row.output for row in rows} == {"frames", "pooled", "layers", "logits"}
    assert all(row.within("fp32") for row in rows)


def test_the_graph_is_standard_and_dynamic(bundles):
    """Standard operators of one set, attention among them, weights outside, both axes dynamic."""
    onnx = pytest.importorskip("onnx")
    folder = bundles("large")
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 24)]
    assert {node.domain for node in graph.graph.node} == {""}
    assert sum(node.op_type == "Attention" for node in graph.graph.node) == 3
    values = (*graph.graph.input, *graph.graph.output)
    assert {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values} == {
        "waveform": ["batch", "samples"],
        "lengths": ["batch"],
        "last_hidden_state": ["batch", "frames", 48],
        "frame_lengths": ["batch"],
        "embedding": ["batch", 48],
    }  # fmt: skip
    locations = {
        entry.value for tensor in graph.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"model.onnx_data"}
    assert (folder / "onnx" / "model.onnx").stat().st_size < 200_000


def test_every_missing_weight_is_named(checkpoints, tmp_path):
    """A checkpoint without two encoder weights is refused, and both are named."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(checkpoints("large"), folder)
    weights = load_file(folder / "model.safetensors")
    gone = ["encoder.layers.1.attention.k_proj.weight", "feature_projection.projection.bias"]
    save_file(
        {k: v for k, v in weights.items() if k not in gone}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError) as caught:
        load(str(folder))
    assert all(name in str(caught.value) for name in gone)
    assert "encoder.layers.0" not in str(caught.value)


def test_an_unexpected_encoder_weight_and_an_unknown_head_are_refused(checkpoints, tmp_path):
    """Weights without a place in the encoder, and heads that are not known, are named instead of dropped."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "more"
    shutil.copytree(checkpoints("large"), folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("encoder.layers.9.layer_norm.weight", "speaker.weight"):
        save_file(weights | {name: torch.zeros(48)}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=name):
            load(str(folder))


def test_a_pickled_checkpoint_is_loaded_without_unpickling_code(checkpoints, tmp_path):
    """``pytorch_model.bin`` gives the same head; one that would run code on loading is refused."""
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(checkpoints("emotion"), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    checkpoint = load(str(folder))
    assert checkpoint.head.labels == LABELS
    assert torch.equal(checkpoint.head.dense.weight, weights["classifier.dense.weight"])

    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    torch.save({"wav2vec2.x": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        load(str(folder))
    assert not (tmp_path / "harmed").exists()


def test_old_weight_norm_names_load(checkpoints, tmp_path):
    """``weight_g``/``weight_v``, as older releases of transformers wrote them, are the same positional conv."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "old"
    shutil.copytree(checkpoints("large"), folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in weights.items()
    }
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    waveform = speech(0.5)
    assert np.array_equal(load(str(folder)).run(waveform).frames, load(str(checkpoints("large"))).run(waveform).frames)


def test_normalisation_follows_the_checkpoint(tmp_path):
    """With ``do_normalize: false`` the waveform enters as it is."""
    folder = save_checkpoint(tmp_path / "tiny", "large", seed=3)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_normalize": False}))
    embedder = Embedder(export_bundle(folder, tmp_path / "bundle"))
    waveform = speech(0.7)
    frames, _, _ = reference(folder, waveform, "large")
    assert np.abs(embedder.embed((waveform, 16000), level="frame").values - frames).max() <= FRAMES
    louder = embedder.embed((3 * waveform, 16000), level="frame").values
    assert np.abs(louder - frames).max() > 1e-2


def test_seeded_weights_repeat(tmp_path):
    """The same seed gives the same reference, another seed another one; a local config will do."""
    folder = save_checkpoint(tmp_path / "tiny", "base")
    waveform = speech(0.3)
    first, again, other = (seeded(str(folder), seed).run(waveform).frames for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_what_misses_its_tolerance_is_not_left_behind(checkpoints, tmp_path, monkeypatch):
    """A graph that differs from PyTorch is refused with its rows, and leaves nothing, not even a temporary folder."""
    from w2v_export.graph import waveform

    right = waveform.normalised
    monkeypatch.setattr(waveform, "normalised", lambda *arguments: 1.001 * right(*arguments))
    with pytest.raises(UnprovenError) as caught:
        export_bundle(checkpoints("large"), tmp_path / "out" / "bundle")
    assert any(not row.within("fp32") for row in caught.value.rows)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_bundle_is_only_replaced_on_demand(checkpoints, tmp_path):
    """Without overwrite it is refused; with it, replaced whole; a folder that is no bundle never is."""
    export_bundle(checkpoints("base"), tmp_path / "bundle")
    with pytest.raises(OutputError, match="--overwrite"):
        export_bundle(checkpoints("base"), tmp_path / "bundle")
    assert export_bundle(checkpoints("large"), tmp_path / "bundle", overwrite=True).manifest.architecture.layers == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="not a bundle"):
        export_bundle(checkpoints("base"), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_bad_requests_are_refused_before_any_work(checkpoints, tmp_path):
    """Unknown ids, folders without a config, unknown architectures and precisions, each with the fix."""
    with pytest.raises(CheckpointError, match="catalogue"):
        seeded("nobody/nothing", 0)
    with pytest.raises(CheckpointError, match=r"cannot be fetched|neither a folder"):
        load("nobody/nothing-at-all", offline=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(str(tmp_path / "empty"))
    other = tmp_path / "other"
    shutil.copytree(checkpoints("large"), other)
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="wav2vec2"):
        load(str(other))
    with pytest.raises(RefusedError, match="fp7"):
        export_bundle(checkpoints("large"), tmp_path / "x", precision=["fp7"])
    with pytest.raises(BundleError, match="w2v-export --model nobody/nothing"):
        Embedder("nobody/nothing")
