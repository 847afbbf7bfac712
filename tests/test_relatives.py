"""Every family and head beside wav2vec 2.0's own: bundles against transformers, alone, batched and in windows."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conftest import speech  # noqa: E402
from families import FAMILIES, Reference  # noqa: E402
from w2v_models import TOLERANCES, AudioError  # noqa: E402
from w2v_models.manifest import FRAME_LENGTHS, frames_output  # noqa: E402
from w2v_runtime import Embedder  # noqa: E402
from w2v_runtime.audio.reading import from_array  # noqa: E402
from w2v_runtime.embedding.results import Request  # noqa: E402
from w2v_runtime.embedding.windows import Windowing  # noqa: E402

FRAMES = TOLERANCES["fp32"]["frames"].max_abs
POOLED = TOLERANCES["fp32"]["pooled"].max_abs
LENGTHS = (560, 1600, 4321, 16000, 23456)


@pytest.fixture(scope="module")
def models(relatives: Callable[[str], tuple[Path, Path]]) -> Callable[[str], tuple[Reference, Embedder]]:
    """The reference of a tiny checkpoint by name, loaded once, and its embedder."""
    reference = functools.cache(Reference)

    def model(name: str) -> tuple[Reference, Embedder]:
        checkpoint, bundle = relatives(name)
        return reference(checkpoint), Embedder(bundle)

    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_of_a_batch_is_transformers_own(models, name):
    """Layers 0 to L and the last hidden state of unequal recordings, NaN in the padding; there each is alone."""
    reference, embedder = models(name)
    conv, last = embedder.manifest.architecture.conv, embedder.manifest.architecture.layers
    waveforms = [speech(samples / 16000, seed=i) for i, samples in enumerate(LENGTHS)]
    names = [frames_output(str(layer)) for layer in range(last + 1)] + [frames_output("last"), FRAME_LENGTHS]
    *layers, final, lengths = embedder.forward(waveforms, names, fill=np.nan)
    for i, waveform in enumerate(waveforms):
        frames = conv.num_frames(len(waveform))
        assert lengths[i] == frames
        expected, expected_final, _ = reference(waveform, frames)
        assert expected_final.shape == (frames, embedder.manifest.architecture.hidden_size)
        for k, layer in enumerate(layers):
            assert np.abs(layer[i, :frames] - expected[k]).max() <= FRAMES, f"layer {k}"
        assert np.abs(final[i, :frames] - expected_final).max() <= FRAMES
        alone = embedder.embed((waveform, 16000), layer="all")
        assert np.abs(alone.values - expected.mean(axis=1)).max() <= POOLED
        assert np.abs(embedder.embed((waveform, 16000)).values - expected_final.mean(axis=0)).max() <= POOLED


@pytest.mark.parametrize("device", ["cpu", "openvino"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_in_pieces_it_is_the_whole(models, name, device):
    """Through the graphs for long recordings, whole by blocks of queries: every layer and statistic as in one run.

    Lengths are a frame or two, less than a block of queries, whole blocks and more than several.
    """
    _, embedder = models(name)
    if device == "openvino":
        pytest.importorskip("openvino")
        if name == "w2v-bert":
            pytest.skip("OpenVINO lacks its float64")
        embedder = Embedder(embedder.bundle, device=device)
    stride, field = embedder.manifest.architecture.conv.stride, embedder.manifest.architecture.conv.receptive_field
    for frames in (1, 2, 15, 128, 129, 700):
        audio = from_array(speech((field + (frames - 1) * stride) / 16000), 16000, 16000)
        for level, pooling in (("frame", "mean"), ("utterance", "mean,std,min,max")):
            request = embedder.resolve(Request.of(level, pooling, "all"))
            (pieced,) = embedder.embed_long([("", embedder.long(audio))], request)
            (whole,) = embedder.embed_batch([""], [audio], request)
            assert pieced.values.shape == whole.values.shape
            assert np.abs(pieced.values - whole.values).max() <= FRAMES / 5


WHOLE_IN_LITTLE_MEMORY = """
import resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_DATA, (900 << 20, 900 << 20))
from w2v_runtime import Embedder
noise = np.random.default_rng(0).standard_normal(300 * 16000, np.float32)
print(Embedder(sys.argv[1], "cpu", threads=1).embed((noise, 16000), pooling="mean,max", layer="all").values.sum())
"""


@pytest.mark.parametrize("name", ["hubert", "wavlm", "conformer-relative", "w2v-bert"])
def test_five_minutes_take_no_memory_for_pairs_of_frames(models, name):
    """The scores of one block alone, 4 heads of 15 000 frames by 15 000, would take four times what is allowed."""
    _, embedder = models(name)
    command = [sys.executable, "-c", WHOLE_IN_LITTLE_MEMORY, str(embedder.bundle.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert np.isfinite(float(done.stdout))


def test_log_mel_statistics_do_not_depend_on_the_blocks_of_a_recording(models):
    """The moments of a recording read in blocks are those of the whole, so that its windows share its normalisation."""
    _, embedder = models("w2v-bert")
    from w2v_runtime.embedding.moments import MelMoments

    waveform = speech(3.1, seed=4)
    vectors = []
    for cuts in ([], [100, 399, 400, 16000], list(range(1000, 49000, 1000))):
        moments = MelMoments(400, 160, lambda b: embedder.engine.run({"waveform": b[None]}, ["mel"], "mel")[0][0])
        for block in np.split(waveform, cuts):
            moments.add(block)
        assert moments.samples == len(waveform)
        vectors.append(moments.vector())
    assert np.abs(vectors[1] - vectors[0]).max() < 1e-5
    assert np.abs(vectors[2] - vectors[0]).max() < 1e-5


@pytest.mark.parametrize("name", ["classifier", "classifier-weighted"])
def test_a_classifier_answers_as_in_transformers(models, name):
    """Logits and labels of each utterance, alone and batched; embeddings beside them; in windows the same again."""
    reference, embedder = models(name)
    assert embedder.labels == ("neutral", "happy", "angry")
    waveforms = [speech(samples / 16000, seed=i) for i, samples in enumerate(LENGTHS)]
    batched = embedder.forward(waveforms, ["logits"], fill=np.inf)[0]
    for i, waveform in enumerate(waveforms):
        frames = embedder.manifest.architecture.conv.num_frames(len(waveform))
        _, last, answer = reference(waveform, frames)
        mine = embedder.embed((waveform, 16000))
        assert np.abs(mine.logits - answer.logits[0].numpy()).max() <= POOLED
        assert np.abs(batched[i] - answer.logits[0].numpy()).max() <= POOLED
        assert np.abs(mine.values - last.mean(0)).max() <= POOLED
    windowed = Embedder(embedder.bundle, windowing=Windowing(1, 5, whole=1)).embed((np.tile(waveforms[3], 4), 16000))
    whole = embedder.embed((np.tile(waveforms[3], 4), 16000))
    assert np.abs(windowed.logits - whole.logits).max() <= POOLED


def test_speaker_vectors_are_those_of_transformers(models):
    """X-vectors, alone and batched and from windows with their context; what is too short for them is refused."""
    reference, embedder = models("x-vector")
    assert embedder.labels == tuple(f"x{i}" for i in range(24))
    waveforms = [speech(samples / 16000, seed=i) for i, samples in enumerate(LENGTHS[2:])]
    batched, logits = embedder.forward(waveforms, ["embeddings", "logits"], fill=np.nan)
    for i, waveform in enumerate(waveforms):
        _, _, answer = reference(waveform, embedder.manifest.architecture.conv.num_frames(len(waveform)))
        assert np.abs(embedder.embed((waveform, 16000)).logits - answer.embeddings[0].numpy()).max() <= POOLED
        assert np.abs(batched[i] - answer.embeddings[0].numpy()).max() <= POOLED
        assert np.abs(logits[i] - answer.logits[0].numpy()).max() <= POOLED
    long = np.tile(waveforms[1], 4)
    windowed = Embedder(embedder.bundle, windowing=Windowing(1, 5, whole=1)).embed((long, 16000))
    assert np.abs(windowed.logits - embedder.embed((long, 16000)).logits).max() <= POOLED
    with pytest.raises(AudioError, match="x-vector head needs 3280"):
        embedder.embed((speech(0.2), 16000))


@pytest.mark.parametrize("name", ["frames", "ctc-bert"])
def test_a_head_that_answers_frame_by_frame_is_transformers_own(models, name):
    """Logits of each frame at frame level, whole and in windows; at utterance level there are none."""
    reference, embedder = models(name)
    tokens = ("<pad>", "<s>", "|", "e", ",", "'", "f0")
    assert embedder.labels == (tokens if name == "ctc-bert" else ("LABEL_0", "LABEL_1"))
    waveform = speech(2.9, seed=7)
    frames = embedder.manifest.architecture.conv.num_frames(len(waveform))
    _, _, answer = reference(waveform, frames)
    mine = embedder.embed((waveform, 16000), level="frame")
    assert mine.logits.shape == (frames, len(embedder.labels))
    assert np.abs(mine.logits - answer.logits[0, :frames].numpy()).max() <= FRAMES
    windowed = Embedder(embedder.bundle, windowing=Windowing(1, 0.4, whole=1)).embed((waveform, 16000), level="frame")
    assert windowed.logits.shape == mine.logits.shape
    assert np.abs(windowed.logits[:10] - mine.logits[:10]).max() < 0.5
    assert embedder.embed((waveform, 16000)).logits is None
