"""Long audio: joined windows equal PyTorch on the same windows, with the whole recording's statistics."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import speech
from w2v_models import TOLERANCES, ConvStack, RefusedError
from w2v_runtime import Embedder
from w2v_runtime.embedding.moments import WaveformMoments
from w2v_runtime.embedding.pooling import RunningPool
from w2v_runtime.embedding.results import Request
from w2v_runtime.embedding.windows import Windowing, plan_windows

WAV2VEC2 = ConvStack((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), (512,) * 7)
FRAMES = TOLERANCES["fp32"]["frames"].max_abs
POOLED = TOLERANCES["fp32"]["pooled"].max_abs


def pool(frames: np.ndarray, pooling: tuple[str, ...]) -> np.ndarray:
    running = RunningPool()
    running.add(frames)
    return running.result(pooling)


def windowed_reference(folder, waveform: np.ndarray, windowing: Windowing) -> np.ndarray:
    """transformers' own modules: front end over the whole recording, encoder over each window of its frames."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.Wav2Vec2Model.from_pretrained(folder).eval()
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    values = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_values
    joined = []
    with torch.inference_mode():
        features = model.feature_projection(model.feature_extractor(values).transpose(1, 2))[0]
        total, size, context = features.shape[1], round(windowing.window * 50), round(windowing.context * 50)
        for first in range(0, total, size):
            begin, end = max(0, first - context), min(total, first + size + context)
            hidden = model.encoder(features[:, begin:end].clone()).last_hidden_state[0]
            joined.append(hidden[first - begin : min(first + size, total) - begin].numpy())
    return np.concatenate(joined)


@pytest.mark.parametrize("kind", ["base", "large", "emotion"])
@pytest.mark.parametrize("windowing", [Windowing(2, 0.5), Windowing(1, 0), Windowing(3.3, 1.1)])
def test_windows_equal_pytorch_on_the_same_windows(checkpoints, bundles, kind, windowing, tmp_path):
    """Frames, all poolings and logits of 7.3 s in windows, from a file and from an array."""
    waveform = speech(7.3, seed=5) * np.linspace(0.1, 1, round(7.3 * 16000), dtype=np.float32) + np.float32(0.02)
    soundfile.write(tmp_path / "long.wav", waveform, 16000, subtype="FLOAT")
    expected = windowed_reference(checkpoints(kind), waveform, windowing)
    embedder = Embedder(bundles(kind), windowing=windowing)
    for audio in (tmp_path / "long.wav", (waveform, 16000)):
        frames = embedder.embed(audio, level="frame")
        assert frames.values.shape == expected.shape
        assert frames.duration == pytest.approx(7.3)
        assert np.abs(frames.values - expected).max() <= FRAMES
        pooled = embedder.embed(audio, pooling="mean,std,min,max")
        assert np.abs(pooled.values - pool(expected, ("mean", "std", "min", "max"))).max() <= FRAMES
        assert np.abs(pooled.values[:48] - expected.mean(0)).max() <= POOLED
    (from_corpus,) = embedder.embed_files([tmp_path / "long.wav"], level="frame")
    assert np.array_equal(from_corpus.values, frames.values)
    if kind == "emotion":
        (whole,) = Embedder(bundles(kind)).embed_files([tmp_path / "long.wav"])
        assert pooled.logits.shape == whole.logits.shape == (3,)
        assert np.abs(pooled.logits - whole.logits).max() < 0.5
        assert np.array_equal(pooled.logits, frames.logits)


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_windows_of_the_usual_size_join_to_the_whole(bundles, device):
    """45 s as everybody gets them, of a middle layer and in frames: near the recording embedded whole."""
    if device == "openvino":
        pytest.importorskip("openvino")
    waveform = speech(45, seed=3), 16000
    usual, whole = (Embedder(bundles("base"), device=device, windowing=w) for w in (Windowing(), Windowing(46, 0)))
    for request in ({"layer": 1}, {"level": "frame"}):
        found, expected = (embedder.embed(waveform, **request).values for embedder in (usual, whole))
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 5e-3


@pytest.mark.parametrize("kind", ["base", "large"])
def test_one_window_is_the_whole(bundles, kind):
    """A recording that fits one window gives the same through the graph for windows."""
    from w2v_runtime.audio.reading import from_array

    embedder = Embedder(bundles(kind))
    for samples in (400, 5000, 33333):
        audio = from_array(speech(samples / 16000), 16000, 16000)
        windowed = embedder.embed_windowed("", audio, Request("frame"))
        whole = embedder.embed((audio.samples, 16000), level="frame")
        assert np.abs(windowed.values - whole.values).max() <= FRAMES / 5


@given(
    samples=st.integers(400, 3_000_000),
    window=st.floats(1, 60),
    context=st.floats(0, 20),
)
@settings(max_examples=200, deadline=None)
def test_windows_hold_every_frame_once(samples, window, context):
    """Cores tile the frames; each window's samples give just its frames, from a frame's first sample on."""
    frames, expected = WAV2VEC2.num_frames(samples), 0
    for w in plan_windows(samples, 16000, WAV2VEC2, Windowing(window, context)):
        assert w.first == expected
        assert w.start % WAV2VEC2.stride == 0
        assert 0 <= w.start < w.stop <= samples
        inside = WAV2VEC2.num_frames(w.stop - w.start)
        assert w.skip == w.first - w.start // WAV2VEC2.stride
        assert w.skip + (w.last - w.first) <= inside
        assert inside <= round(window * 50) + 2 * round(context * 50)
        expected = w.last
    assert expected == frames


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_moments_do_not_depend_on_the_blocks(data):
    """Mean, variance and the frames' mean and covariance equal numpy's over the whole, offset and quiet audio too."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    wave = data.draw(st.sampled_from([1.0, 1e-3])) * rng.standard_normal(5000) + data.draw(st.sampled_from([0, 0.7]))
    wave = wave.astype(np.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, 5000), max_size=12)))
    moments = WaveformMoments(10, 5)
    for block in np.split(wave, cuts):
        moments.add(block)
    vector, exact = moments.vector().astype(np.float64), wave.astype(np.float64)
    frames = np.lib.stride_tricks.sliding_window_view(exact, 10)[::5]
    centred = frames - frames.mean(0)
    expected = [exact.mean(), exact.var(), *frames.mean(0), *(centred.T @ centred / len(frames)).ravel()]
    np.testing.assert_allclose(vector, expected, rtol=2e-6, atol=1e-7 * exact.var())


@given(st.lists(st.integers(0, 300), max_size=8), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_pooling_in_blocks_equals_pooling_the_whole(cuts, seed):
    """Mean, std, min and max are numpy's, whatever the blocks; std is the population's."""
    frames = (np.random.default_rng(seed).standard_normal((300, 5)) + 3).astype(np.float32)
    running = RunningPool()
    for block in np.split(frames, sorted(cuts)):
        running.add(block)
    exact = frames.astype(np.float64)
    expected = np.concatenate([exact.mean(0), exact.std(0), exact.min(0), exact.max(0)])
    np.testing.assert_allclose(running.result(("mean", "std", "min", "max")), expected, rtol=1e-6)
    assert not pool(frames[:1], ("std",)).any()


def test_windows_out_of_bounds_are_refused():
    """Windows below a second and negative contexts are refused with the range."""
    with pytest.raises(RefusedError, match="1 to 600"):
        Windowing(window=0.5)
    with pytest.raises(RefusedError, match="0 to 300"):
        Windowing(context=-1)
