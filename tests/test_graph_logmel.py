"""The log-mel front end against the feature extractor of transformers, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest

from conftest import speech
from w2v_export.writer import raise_opset
from w2v_models.manifest import ConvStack

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from w2v_export.graph.logmel import MEL_FLOOR, LogMelFrontEnd  # noqa: E402
from w2v_export.graph.tensors import register_symbolics  # noqa: E402

CONV = ConvStack(kernels=(400, 2), strides=(160, 2), channels=(80, 160))
EXTRACTOR = transformers.SeamlessM4TFeatureExtractor()
#: The reference sums its statistics in float32; ours differ by that much.
TOLERANCE = 2e-5
#: The same on a handful of mel frames that hardly differ from each other, where its division magnifies it.
SHORT_TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def one_thread():
    """Small products run faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def front_end() -> LogMelFrontEnd:
    return LogMelFrontEnd(EXTRACTOR, CONV)


def reference(waveform: np.ndarray) -> np.ndarray:
    """The valid frames of one recording alone: (frames, 160) float32."""
    features = EXTRACTOR(waveform, sampling_rate=16000, return_tensors="np")
    return features.input_features[0][: features.attention_mask[0].sum()]


def ours(front_end: LogMelFrontEnd, waveform: np.ndarray) -> np.ndarray:
    return front_end(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))[0].numpy()


def noise(samples: int, amplitude: float) -> np.ndarray:
    return (amplitude * np.random.default_rng(5).standard_normal(samples)).astype(np.float32)


def padded(waveforms: list[np.ndarray], content: float) -> tuple[np.ndarray, np.ndarray]:
    """A batch with ``content`` behind every recording but the longest, and the lengths."""
    lengths = np.array([len(waveform) for waveform in waveforms])
    batch = np.full((len(waveforms), lengths.max()), content, np.float32)
    for row, waveform in zip(batch, waveforms, strict=True):
        row[: len(waveform)] = waveform
    return batch, lengths


SIGNALS = {
    "speech": speech(2.03),
    "quiet": speech(2.0, seed=1) * np.float32(1e-3),
    "offset": speech(2.0) + np.float32(0.5),
    "quiet on an offset": speech(2.0) * np.float32(1e-3) + np.float32(0.5),
    "noise": noise(30000, 0.1),
    "faint noise": noise(30000, 1e-5),
    "last bit of 16": np.random.default_rng(6).integers(-1, 2, 30000).astype(np.float32) / 32768,
    "pause of digital silence": np.concatenate([speech(0.6), np.zeros(8000, np.float32), speech(0.6, seed=2)]),
    "click": np.eye(1, 16000, 5000, dtype=np.float32)[0],
    "clipped": np.clip(speech(1.5) * 30, -1, 1),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_the_features_are_those_of_the_extractor(front_end, name):
    """Loud, quiet, offset and silent stretches alike: same shape, same values."""
    expected = reference(SIGNALS[name])
    found = ours(front_end, SIGNALS[name])
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SIGNALS)
def test_the_log_mel_energies_are_those_of_the_extractor(front_end, name):
    """Before normalisation all but a few in ten thousand are equal to the last bit, and those to the next."""
    waveform = SIGNALS[name]
    expected = EXTRACTOR(waveform, sampling_rate=16000, do_normalize_per_mel_bins=False).input_features[0]
    found = front_end.mel(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)])).numpy().reshape(-1, 80)
    expected = expected.reshape(-1, 80)[: CONV.num_frames(len(waveform)) * 2]
    found = found[: len(expected)]
    assert (found != expected).mean() < 2e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_the_frames_are_those_of_the_attention_mask():
    """``ConvStack.num_frames`` counts the frames that the reference's mask keeps, at every length."""
    for samples in [*range(560, 1300, 7), 719, 720, 879, 880, 1039, 1040, 15999, 16000, 16080, 16240]:
        mask = EXTRACTOR(np.ones(samples, np.float32), sampling_rate=16000).attention_mask
        assert mask.sum() == CONV.num_frames(samples), samples


def test_lengths_around_every_edge_of_a_frame(front_end):
    """From the shortest recording on, with an even and an odd number of mel frames and any remainder of samples."""
    recording = speech(1.0, seed=3)[3000:]
    for samples in (560, 561, 719, 720, 721, 879, 880, 881, 1039, 1040, 1200, 1599, 4321, 4400):
        expected = reference(recording[:samples])
        found = ours(front_end, recording[:samples])
        assert found.shape == expected.shape, samples
        np.testing.assert_allclose(found, expected, rtol=0, atol=SHORT_TOLERANCE, err_msg=str(samples))


def test_two_mel_frames_that_hardly_differ(front_end):
    """In the shortest recordings the division magnifies what it finds; it finds what the reference finds."""
    recordings = speech(2.0)[: 560 * 57].reshape(57, 560)
    features = front_end(torch.from_numpy(recordings), torch.full((57,), 560)).numpy()
    np.testing.assert_allclose(features, np.stack([reference(row) for row in recordings]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, -1.0])
def test_a_constant_signal_has_no_features(front_end, value):
    """Silence and an offset alone stay at the floor in every band, and features are exactly zero."""
    waveform = np.full(12345, value, np.float32)
    mel = front_end.mel(torch.from_numpy(waveform)[None], torch.tensor([12345]))
    assert mel[0, : CONV.num_frames(12345) * 2].unique().tolist() == [np.float32(np.log(MEL_FLOOR))]
    assert not ours(front_end, waveform).any()
    assert abs(reference(waveform)).max() < 4e-3  # its mean of equal numbers is off by the last bit


def test_a_pause_gives_one_value_in_a_band(front_end):
    """Equal frames have equal energies wherever they stand, so that silence stays flat beside speech."""
    waveform = SIGNALS["pause of digital silence"]
    features = ours(front_end, waveform)
    silent = features[9600 // 320 + 2 : 17600 // 320 - 2].reshape(-1, 80)
    assert (silent == silent[0]).all()


@pytest.mark.parametrize("content", [0.0, 9.0, float("nan"), float("inf")])
def test_a_recording_in_a_batch_is_as_alone(front_end, content):
    """Neither neighbours nor what stands in the padding change a value, and the padding of the features is zero."""
    waveforms = [speech(seconds, seed=seed) for seed, seconds in enumerate((0.5, 0.035, 1.2, 0.0951, 0.78))]
    batch, lengths = padded(waveforms, content)
    features = front_end(torch.from_numpy(batch), torch.from_numpy(lengths)).numpy()
    assert features.shape == (5, CONV.num_frames(batch.shape[1]), 160)
    for row, waveform in zip(features, waveforms, strict=True):
        frames = CONV.num_frames(len(waveform))
        np.testing.assert_allclose(row[:frames], reference(waveform), rtol=0, atol=SHORT_TOLERANCE)
        np.testing.assert_allclose(row[:frames], ours(front_end, waveform), rtol=0, atol=1e-6)
        assert not row[frames:].any()


@pytest.mark.parametrize("samples", [16000, 16080])
def test_statistics_count_every_mel_frame(front_end, samples):
    """Mean and variance are NumPy's, n - 1 below the sum, over an odd last mel frame too."""
    waveform = speech(1.1)[:samples]
    expected = EXTRACTOR._extract_fbank_features(waveform).astype(np.float64)
    lengths = torch.tensor([samples])
    mean, variance = front_end.statistics(front_end.mel(torch.from_numpy(waveform)[None], lengths), lengths)
    assert mean.shape == variance.shape == (1, 1, 80)
    np.testing.assert_allclose(mean[0, 0].numpy(), expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance[0, 0].numpy(), expected.var(0, ddof=1), rtol=1e-6)


def test_windows_with_the_moments_of_the_recording_are_the_recording(front_end):
    """Cut at frames and normalised alike, windows side by side are the features of the whole."""
    waveform = torch.from_numpy(speech(2.0))[None]
    lengths = torch.tensor([waveform.shape[1]])
    whole = front_end(waveform, lengths)
    moments = torch.cat(front_end.statistics(front_end.mel(waveform, lengths), lengths), dim=2)[:, 0]
    frames = 30
    starts = range(0, whole.shape[1] - frames + 1, frames)
    windows = torch.cat([waveform[:, 320 * start : 320 * (start + frames) + 240] for start in starts])
    features = front_end(windows, torch.full((len(windows),), windows.shape[1]), moments.expand(len(windows), -1))
    np.testing.assert_allclose(features.flatten(0, 1), whole[0, : len(starts) * frames], rtol=0, atol=1e-6)


def test_a_description_that_is_not_the_extractors_is_refused():
    """The error names the file that disagrees."""
    with pytest.raises(ValueError, match=r"preprocessor_config\.json describes .*channels=\(80, 160\)"):
        LogMelFrontEnd(EXTRACTOR, ConvStack(kernels=(400, 2), strides=(160, 2), channels=(40, 80)))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json has stride 3"):
        LogMelFrontEnd(transformers.SeamlessM4TFeatureExtractor(stride=3), CONV)


def exported(front_end: LogMelFrontEnd, *moments: torch.Tensor) -> onnx.ModelProto:
    register_symbolics(20)
    names = ["waveform", "lengths", "moments"][: 2 + len(moments)]
    axes = {name: {0: "batch"} for name in names} | {"waveform": {0: "batch", 1: "samples"}}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            front_end,
            (torch.randn(2, 2000), torch.tensor([2000, 1000]), *moments),
            file,
            dynamo=False,
            opset_version=20,
            input_names=names,
            output_names=["features"],
            dynamic_axes=axes | {"features": {0: "batch", 1: "frames"}},
        )
    model = onnx.load_from_string(file.getvalue())
    raise_opset(model)
    return model


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["features"], feeds)[0]


def test_the_exported_graph_gives_the_same_features(front_end):
    """Standard operators only; shapes other than the traced one; NaN in the padding."""
    model = exported(front_end)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert sorted(tuple(tensor.dims) for tensor in model.graph.initializer) == [(400, 510), (510, 80)]
    signals = [*SIGNALS.values(), speech(0.5)[3000:3560], speech(0.5)[3000:3720]]
    for batch in (signals, signals[:1], signals[-2:]):
        waveform, lengths = padded(batch, float("nan"))
        features = run(model, {"waveform": waveform, "lengths": lengths})
        assert features.shape == (len(batch), CONV.num_frames(waveform.shape[1]), 160)
        for row, signal in zip(features, batch, strict=True):
            frames = CONV.num_frames(len(signal))
            tolerance = TOLERANCE if frames > 5 else SHORT_TOLERANCE
            np.testing.assert_allclose(row[:frames], reference(signal), rtol=0, atol=tolerance)
            assert not row[frames:].any()


def test_the_exported_graph_keeps_silence_at_zero(front_end):
    """Equal inputs have equal energies in ONNX Runtime too, at every place in a batch."""
    waveform = np.repeat(np.array([[0.0], [0.3], [-1.0]], np.float32), 23456, axis=1)
    features = run(exported(front_end), {"waveform": waveform, "lengths": np.array([23456, 23456, 7777])})
    assert not features.any()


def test_the_exported_graph_of_windows_takes_moments(front_end):
    """The third input replaces an utterance's own statistics."""
    waveform, lengths = padded([speech(0.8), speech(0.4, seed=1)], 0.0)
    moments = np.concatenate([noise(160, 2.0).reshape(2, 80) + 8, np.full((2, 80), 3.0, np.float32)], axis=1)
    feeds = {"waveform": waveform, "lengths": lengths, "moments": moments}
    features = run(exported(front_end, torch.ones(2, 160)), feeds)
    for row, found, samples, moment in zip(waveform, features, lengths, moments, strict=True):
        frames = CONV.num_frames(samples)
        mel = EXTRACTOR(row[:samples], sampling_rate=16000, do_normalize_per_mel_bins=False).input_features[0, :frames]
        expected = (mel.reshape(-1, 80) - moment[:80]) / np.sqrt(moment[80:])
        np.testing.assert_allclose(found[:frames].reshape(-1, 80), expected, rtol=0, atol=2e-6)
        assert not found[frames:].any()
