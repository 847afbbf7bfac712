"""``add_adapter``: convolutions after the encoder, whose frames are the ``last_hidden_state``, as in transformers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import embed
from conftest import GROUP, LAYER, TINY, speech
from w2v_models import TOLERANCES, CheckpointError, RefusedError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import CONFORMER, SIZE, WAVLM, hooked  # noqa: E402
from w2v_export import export_bundle  # noqa: E402
from w2v_runtime import Embedder  # noqa: E402
from w2v_runtime.embedding.windows import Windowing  # noqa: E402

FRAMES = TOLERANCES["fp32"]["frames"].max_abs
POOLED = TOLERANCES["fp32"]["pooled"].max_abs
ADAPTER = {"add_adapter": True, "vocab_size": 7}
BERT = SIZE | {"conv_depthwise_kernel_size": 7, "position_embeddings_type": "relative_key"}
#: By name: the class's prefix and suffix in transformers, and its config.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2", "Model", TINY | LAYER | ADAPTER | {"output_hidden_size": 32}),
    "wav2vec2-ctc": ("Wav2Vec2", "ForCTC", TINY | GROUP | ADAPTER | {"num_adapter_layers": 2, "adapter_stride": 3}),
    "wavlm": ("WavLM", "Model", WAVLM | GROUP | ADAPTER | {"num_adapter_layers": 1}),
    "data2vec": (
        "Data2VecAudio",
        "Model",
        TINY | ADAPTER | {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 7},
    ),
    "conformer": ("Wav2Vec2Conformer", "ForCTC", CONFORMER | ADAPTER | {"output_hidden_size": 40}),
    "bert": ("Wav2Vec2Bert", "Model", BERT | ADAPTER | {"num_adapter_layers": 2}),
    "bert-ctc": (
        "Wav2Vec2Bert",
        "ForCTC",
        BERT | ADAPTER | {"use_intermediate_ffn_before_adapter": True, "output_hidden_size": 32, "adapter_act": "gelu"},
    ),
}


def save(folder: Path, name: str) -> Path:
    """Save a tiny checkpoint with an adapter, every weight of it at random."""
    prefix, suffix, config = KINDS[name]
    torch.manual_seed(0)
    model = getattr(transformers, prefix + suffix)(getattr(transformers, f"{prefix}Config")(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.numel() > 1 and value.min() == value.max():
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)
    bert = prefix == "Wav2Vec2Bert"
    extractor = transformers.SeamlessM4TFeatureExtractor if bert else transformers.Wav2Vec2FeatureExtractor
    extractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """A checkpoint and its bundle by name, made once."""
    pairs: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in pairs:
            folder = tmp_path_factory.mktemp(name)
            checkpoint = save(folder / "tiny", name)
            pairs[name] = checkpoint, export_bundle(checkpoint, folder / "bundle").folder
        return pairs[name]

    return make


@torch.inference_mode()
def answer(folder: Path, name: str, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What transformers says of one recording: layers 0 … L, the last hidden state, and logits, or None.

    Of Wav2Vec2-BERT, without the masked frame that its feature extractor appends to a recording with an odd number of
    log-mel frames.
    """
    prefix, suffix, _ = KINDS[name]
    model = getattr(transformers, prefix + suffix).from_pretrained(folder).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor(waveform, sampling_rate=16000, return_tensors="pt")
    if prefix == "Wav2Vec2Bert":
        frames = int(inputs["attention_mask"].sum())
        inputs = {key: value[:, :frames] for key, value in inputs.items()}
    with hooked(model.base_model.encoder) as seen:
        last = model.base_model(**inputs).last_hidden_state[0].numpy()
    logits = model(**inputs).logits[0].numpy() if suffix == "ForCTC" else None
    return np.stack([layer[0].numpy() for layer in seen]), last, logits


@pytest.mark.parametrize("name", KINDS)
def test_the_adapters_frames_are_transformers(made, name):
    """Frames, means and logits of unequal lengths in one batch, each as of the recording alone; layers as ever."""
    checkpoint, bundle = made(name)
    embedder = Embedder(bundle)
    waveforms = [speech(seconds, seed=i) for i, seconds in enumerate((0.41, 1.37, 0.06, 2.2, 0.93))]
    recordings = [(waveform, 16000) for waveform in waveforms]
    frames = list(embedder.embed_files(recordings, level="frame"))
    means = list(embedder.embed_files(recordings))
    layers = list(embedder.embed_files(recordings, level="frame", layer="all"))
    for waveform, mine, mean, every in zip(waveforms, frames, means, layers, strict=True):
        states, last, logits = answer(checkpoint, name, waveform)
        assert mine.values.shape == last.shape
        assert np.abs(mine.values - last).max() <= FRAMES
        assert np.abs(mean.values - last.mean(axis=0)).max() <= POOLED
        assert np.abs(every.values - states.transpose(1, 0, 2)).max() <= 2e-5 * np.abs(states).max()
        assert every.logits is None
        if logits is not None:
            assert np.abs(mine.logits - logits).max() <= FRAMES


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-ctc", "bert-ctc"])
def test_long_recordings_have_the_adapters_frames(made, name):
    """Whole: those of transformers. In windows: as many, each of a window near those of the whole."""
    checkpoint, bundle = made(name)
    waveform = speech(44.3, seed=3)
    _, last, logits = answer(checkpoint, name, waveform)
    whole = Embedder(bundle).embed((waveform, 16000), level="frame")
    assert np.abs(whole.values - last).max() <= FRAMES
    windowed = Embedder(bundle, windowing=Windowing(window=7, context=9, whole=0))
    frames = windowed.embed((waveform, 16000), level="frame")
    assert frames.values.shape == last.shape
    assert np.median(np.abs(frames.values - last)) < 0.05 * np.abs(last).std()
    mean = windowed.embed((waveform, 16000))
    assert np.abs(mean.values - frames.values.mean(axis=0)).max() <= POOLED
    if logits is not None:
        assert np.abs(whole.logits - logits).max() <= FRAMES
        assert frames.logits.shape == logits.shape


def test_a_window_is_a_recording_of_its_own(made):
    """Without context, each window's frames are those of transformers' encoder and adapter on that window alone."""
    checkpoint, bundle = made("wav2vec2-ctc")
    waveform = speech(5.0, seed=4)
    step = Embedder(bundle).manifest.architecture.adapter.stride
    size = -(-100 // step) * step  # frames of two seconds, in whole frames of the adapter
    model = transformers.Wav2Vec2ForCTC.from_pretrained(checkpoint).eval().wav2vec2
    extractor = transformers.AutoFeatureExtractor.from_pretrained(checkpoint)
    with torch.inference_mode():
        inputs = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_values
        hidden, _ = model.feature_projection(model.feature_extractor(inputs).transpose(1, 2))
        parts = [model.adapter(model.encoder(hidden[:, first : first + size])[0]) for first in range(0, 249, size)]
    expected = torch.cat(parts, 1)[0].numpy()
    embedder = Embedder(bundle, windowing=Windowing(window=2, context=0, whole=0))
    mine = embedder.embed((waveform, 16000), level="frame").values
    assert mine.shape == expected.shape
    assert np.abs(mine - expected).max() <= FRAMES


def test_times_sizes_and_refusals_follow_the_layer(made, tmp_path):
    """A row of a table every 40 ms of the adapter, every 20 ms of a layer; the two are not stacked."""
    _, bundle = made("bert-ctc")
    embedder = Embedder(bundle)
    assert embedder.manifest.architecture.adapter.size == 32
    assert embedder.times.starts(3).tolist() == [0, 0.04, 0.08]
    with pytest.raises(RefusedError, match="layer last of this model is its adapter's output"):
        embedder.embed((speech(1), 16000), layer="2,last")
    import soundfile

    soundfile.write(tmp_path / "a.wav", speech(0.5), 16000)
    for layer, step, size in (("last", 0.04, 32), ("2", 0.02, 48)):
        output = tmp_path / f"{layer}.csv"
        options = ["--model", str(bundle), "-o", str(output), "--level", "frame", "--layer", layer]
        code, errors = embed(tmp_path / "a.wav", *options)
        assert code == 0, errors
        with output.open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["start"]) for row in rows] == [round(step * i, 9) for i in range(len(rows))]
        assert len([column for column in rows[0] if column[0] == "f" and column[1:].isdigit()]) == size
        assert ("token_0" in rows[0] or "<pad>" in rows[0]) == (layer == "last")


def test_what_is_no_adapter_of_transformers_is_refused(tmp_path):
    """Heads that transformers refuses behind one, families that have none, and frames that nobody counts right."""
    folder = save(tmp_path / "tiny", "wav2vec2")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"adapter_kernel_size": 5}))
    with pytest.raises(CheckpointError, match="adapter_kernel_size must be 3 for an adapter_stride of 2"):
        export_bundle(folder, tmp_path / "bundle")
    path.write_text(json.dumps(config | {"model_type": "hubert"}))
    with pytest.raises(CheckpointError, match="add_adapter must be left out: transformers has no convolutions after"):
        export_bundle(folder, tmp_path / "bundle")
    torch.manual_seed(0)
    labels = {0: "a", 1: "b"}
    head = transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(**TINY, id2label=labels))
    from safetensors.torch import load_file, save_file

    weights = {f"wav2vec2.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    own = {name: value for name, value in head.state_dict().items() if not name.startswith("wav2vec2.")}
    save_file(weights | own, folder / "model.safetensors", {"format": "pt"})
    path.write_text(json.dumps(config | {"id2label": labels, "architectures": ["Wav2Vec2ForSequenceClassification"]}))
    with pytest.raises(CheckpointError, match=r"only a ctc head is known, not sequence-classification; --no-head"):
        export_bundle(folder, tmp_path / "bundle")
    assert export_bundle(folder, tmp_path / "bundle", head=False).manifest.architecture.adapter.size == 32


def test_reduced_precisions_keep_the_adapter(tmp_path):
    """int8 and fp16 pass their gates; the adapter computes in float32."""
    folder = save(tmp_path / "tiny", "bert-ctc")
    bundle = export_bundle(folder, tmp_path / "bundle", precision=["fp32", "int8"])
    waveform = speech(1.5, seed=2)
    exact, less = (
        Embedder(bundle, precision=precision, device="cpu").embed((waveform, 16000)).values
        for precision in ("fp32", "int8")
    )
    cosine = exact @ less / np.linalg.norm(exact) / np.linalg.norm(less)
    assert TOLERANCES["int8"]["pooled"].min_cosine <= cosine < 1
