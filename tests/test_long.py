"""Long audio: whole recordings equal PyTorch, and joined windows equal PyTorch on the same windows."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import speech
from w2v_models import TOLERANCES, AudioError, ConvStack, RefusedError
from w2v_runtime import Embedder
from w2v_runtime.audio.reading import Audio
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


@pytest.mark.parametrize("kind", ["base", "large", "emotion"])
@pytest.mark.parametrize(
    "windowing", [Windowing(2, 0.5, whole=3), Windowing(1, 0, whole=0), Windowing(3.3, 1.1, whole=5.5)]
)
def test_windows_equal_pytorch_on_the_same_windows(checkpoints, bundles, kind, windowing, tmp_path):
    """Frames, all poolings and logits of 7.3 s in windows, from a file and from an array."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from oracle import Oracle

    waveform = speech(7.3, seed=5) * np.linspace(0.1, 1, round(7.3 * 16000), dtype=np.float32) + np.float32(0.02)
    soundfile.write(tmp_path / "long.wav", waveform, 16000, subtype="FLOAT")
    expected = Oracle(checkpoints(kind))(waveform, windowing.window, windowing.context).last
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
@pytest.mark.parametrize("kind", ["base", "large", "emotion"])
def test_a_long_recording_is_embedded_as_pytorch_embeds_the_whole(checkpoints, bundles, kind, device):
    """A minute, longer than one run takes: frames, pooled vectors and logits are PyTorch's; in windows they are not."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if device == "openvino":
        pytest.importorskip("openvino")
    waveform = speech(61.3, seed=3) * np.linspace(0.1, 1, round(61.3 * 16000), dtype=np.float32)
    model = transformers.Wav2Vec2Model.from_pretrained(checkpoints(kind)).eval()
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(checkpoints(kind))
    with torch.inference_mode():
        values = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_values
        expected = model(values).last_hidden_state[0].numpy()
    embedder = Embedder(bundles(kind), device=device)
    frames = embedder.embed((waveform, 16000), level="frame")
    assert frames.values.shape == expected.shape
    assert np.abs(frames.values - expected).max() <= FRAMES
    pooled = embedder.embed((waveform, 16000), pooling="mean,std,min,max")
    assert np.abs(pooled.values - pool(expected, ("mean", "std", "min", "max"))).max() <= FRAMES
    assert np.abs(pooled.values[:48] - expected.mean(0)).max() <= POOLED
    if kind == "emotion":
        assert np.abs(pooled.logits - frames.logits).max() <= POOLED
    windowed = Embedder(bundles(kind), device=device, windowing=Windowing(whole=60))
    assert np.abs(windowed.embed((waveform, 16000), level="frame").values - expected).max() > 10 * FRAMES


def test_a_long_member_of_a_run_changes_no_other(bundles):
    """Short recordings, a minute and one in windows, in one run: each as it is alone, in its place."""
    embedder = Embedder(bundles("base"), windowing=Windowing(5, 1, whole=62))
    recordings = [(speech(seconds, seed=i), 16000) for i, seconds in enumerate((1.1, 61, 0.7, 70, 2.3, 41))]
    results = list(embedder.embed_files(recordings, level="frame"))
    assert [round(result.duration, 1) for result in results] == [1.1, 61, 0.7, 70, 2.3, 41]
    for result, recording in zip(results, recordings, strict=True):
        assert np.abs(result.values - embedder.embed(recording, level="frame").values).max() <= FRAMES / 5


def test_a_recording_that_is_read_twice_is_embedded_whole_too(bundles, tmp_path, monkeypatch):
    """Beyond what is held in memory, whole recordings and windows come from a second pass over the file."""
    from w2v_runtime.embedding import model

    waveform = speech(45, seed=3)
    soundfile.write(tmp_path / "long.wav", waveform, 16000, subtype="FLOAT")
    embedder = Embedder(bundles("base"))
    held = embedder.embed(tmp_path / "long.wav", level="frame")
    monkeypatch.setattr(model, "HELD_SECONDS", 10)
    assert not embedder.read(tmp_path / "long.wav").held
    twice = embedder.embed(tmp_path / "long.wav", level="frame")
    assert np.array_equal(twice.values, held.values)
    assert (twice.duration, twice.warnings) == (held.duration, held.warnings)


def test_long_recordings_of_one_call_share_their_batches(bundles, monkeypatch):
    """Pieces and windows of three recordings, whole and windowed, in batches of two minutes: each has its values."""
    embedder = Embedder(bundles("base"), windowing=Windowing(5, 1, whole=50))
    audios = [Audio(speech(seconds, seed=i), 16000, seconds) for i, seconds in enumerate((61, 45, 72.7))]
    longs = [(f"{i}", embedder.long(audio)) for i, audio in enumerate(audios)]
    rows, run = [], embedder.engine.run
    monkeypatch.setattr(
        embedder.engine,
        "run",
        lambda feeds, *rest: (rows.append(len(next(iter(feeds.values())))), run(feeds, *rest))[1],
    )
    together = embedder.embed_long(longs, Request("frame"), batch_seconds=120)
    assert max(rows) > 8
    for one, (_, long) in zip(together, longs, strict=True):
        (alone,) = embedder.embed_long([("", long)], Request("frame"))
        assert np.abs(one.values - alone.values).max() <= FRAMES / 5


def test_a_recording_that_fails_costs_no_other_of_its_call(bundles, tmp_path):
    """One of three long recordings is cut between the two passes: it has its error, the others have their values."""
    embedder = Embedder(bundles("base"), windowing=Windowing(5, 1, whole=20))
    paths = [tmp_path / f"{i}.wav" for i in range(3)]
    for i, path in enumerate(paths):
        soundfile.write(path, speech(310, seed=i), 16000)
    longs = [(path.name, embedder.read(path)) for path in paths]
    with paths[1].open("r+b") as file:
        file.truncate(2_000_000)
    first, cut, last = embedder.embed_long(longs, Request(), batch_seconds=600)
    assert isinstance(cut, AudioError)
    assert "changed while it was read" in str(cut)
    for found, path in ((first, paths[0]), (last, paths[2])):
        assert np.abs(found.values - embedder.embed(path).values).max() <= POOLED


@pytest.mark.parametrize("kind", ["base", "large"])
def test_in_pieces_it_is_the_whole(bundles, kind):
    """A recording of any length gives the same through the graphs for long ones."""
    from w2v_runtime.audio.reading import from_array

    embedder = Embedder(bundles(kind))
    for samples in (400, 5000, 33333):
        audio = from_array(speech(samples / 16000), 16000, 16000)
        (pieced,) = embedder.embed_long([("", embedder.long(audio))], Request("frame"))
        whole = embedder.embed((audio.samples, 16000), level="frame")
        assert np.abs(pieced.values - whole.values).max() <= FRAMES / 5


@given(
    samples=st.integers(400, 3_000_000),
    window=st.floats(1, 60),
    context=st.floats(0, 20),
)
@settings(max_examples=200, deadline=None)
def test_windows_hold_every_frame_once(samples, window, context):
    """They tile the frames, and have the context that was asked for as far as the recording goes."""
    frames, expected, around = WAV2VEC2.num_frames(samples), 0, round(context * 50)
    for w in plan_windows(frames, 16000, WAV2VEC2, Windowing(window, context)):
        assert w.first == expected
        assert w.begin == max(0, w.first - around)
        assert w.end == min(frames, w.last + around)
        assert 0 < w.last - w.first <= round(window * 50)
        expected = w.last
    assert expected == frames


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_moments_do_not_depend_on_the_blocks(data):
    """Mean, variance and the frames' mean and covariance equal numpy's over the whole, whatever the blocks.

    Offset and quiet audio too, and frames with gaps between them, where the stride is longer than the kernel.
    """
    kernel, stride = data.draw(st.sampled_from([(10, 5), (3, 5), (4, 4), (2, 9)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    wave = data.draw(st.sampled_from([1.0, 1e-3])) * rng.standard_normal(5000) + data.draw(
        st.sampled_from([0, 0.7, 50])
    )
    wave = wave.astype(np.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, 5000), max_size=12)))
    moments = WaveformMoments(kernel, stride)
    for block in np.split(wave, cuts):
        moments.add(block)
    vector, exact = moments.vector().astype(np.float64), wave.astype(np.float64)
    frames = np.lib.stride_tricks.sliding_window_view(exact, kernel)[::stride]
    centred = frames - frames.mean(0)
    expected = [exact.var(), *(frames.mean(0) - exact.mean()), *(centred.T @ centred / len(frames)).ravel()]
    coarse, fine, *others = vector
    assert abs(coarse + fine - exact.mean()) <= 1e-7 * exact.std()
    np.testing.assert_allclose(others, expected, rtol=2e-6, atol=1e-7 * exact.var())


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
    with pytest.raises(RefusedError, match="0 to 86400"):
        Windowing(whole=float("inf"))
