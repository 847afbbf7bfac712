"""Arrays as waveforms: their scale, what has none that is known, and levels that no recording has."""

from __future__ import annotations

import io
from itertools import product
from typing import Any

import numpy as np
import pytest
import soundfile

from audio_files import RATE, encoded, speech_like
from w2v_models.errors import AudioError
from w2v_runtime.audio.reading import from_array, read_audio

SIGNAL = speech_like(1)
INT16 = (SIGNAL * 32767).astype(np.int16)


def read_as(dtype: str, subtype: str, signal: np.ndarray = SIGNAL) -> np.ndarray:
    """What soundfile returns of a WAV of ``subtype``, read as ``dtype``."""
    file = io.BytesIO()
    soundfile.write(file, signal, RATE, subtype, format="WAV")
    file.seek(0)
    return soundfile.read(file, dtype=dtype)[0]


@pytest.mark.parametrize(
    ("dtype", "subtype"),
    [
        *product(("int16", "int32", "float32", "float64"), ("PCM_U8", "PCM_16", "PCM_24", "PCM_32")),
        *product(("float32", "float64"), ("FLOAT", "DOUBLE")),
    ],
)
def test_what_soundfile_returns_is_right(dtype: str, subtype: str) -> None:
    """In any type the samples are those of the file, and their levels are those of a recording."""
    audio = from_array(read_as(dtype, subtype), RATE, RATE)
    np.testing.assert_allclose(audio.samples, SIGNAL, rtol=0, atol=0.01 if subtype == "PCM_U8" else 1e-4)
    assert audio.warnings == ()


@pytest.mark.parametrize(
    "waveform",
    [INT16.tolist(), INT16[:, None].tolist(), INT16.astype(np.int64), INT16.astype(np.uint64), [0, 0, 0], range(100)],
    ids=["list", "nested list", "int64", "uint64", "zeros", "range"],
)
def test_integers_without_a_full_scale_are_refused(waveform: Any) -> None:
    """Their range is 2^63, which is nobody's full scale; the message says what to give instead."""
    with pytest.raises(AudioError, match="its full scale is not known; give floats with full scale 1, or an int16"):
        from_array(waveform, RATE, RATE)


@pytest.mark.parametrize(
    ("waveform", "says"),
    [
        (INT16.astype(np.int32), "levels: int32 samples reach 19659 of 2147483648; if they are 16-bit integers, give"),
        (INT16.astype(np.int32)[:, None] // 100, "levels: int32 samples reach 197 of 2147483648; if they are 16-bit"),
        ((SIGNAL * 2**23).astype(np.int32), "levels: int32 samples reach 5033033 of 2147483648; if they are 24-bit"),
        (INT16.astype(np.float32), "levels: samples reach 19659 times full scale; if they are 16-bit integers, divide"),
        (INT16.astype(np.float64) / 256, "levels: samples reach 76.793 times full scale"),
    ],
    ids=["16 bits in int32", "quiet 16 bits in int32", "24 bits in int32", "16 bits in float", "8 bits in float"],
)
def test_levels_that_no_recording_has_are_warned_of(waveform: np.ndarray, says: str) -> None:
    """Integers that nobody scaled are embedded as they are given, with a warning of what they seem to be."""
    (warning,) = from_array(waveform, RATE, RATE).warnings
    assert warning.startswith(says)


def test_floats_in_a_file_are_warned_of_alike(tmp_path) -> None:
    """A WAV of floats may hold integers too."""
    (tmp_path / "a.wav").write_bytes(encoded(tmp_path, SIGNAL * 32768, kind="WAV", subtype="FLOAT"))
    (warning,) = read_audio(tmp_path / "a.wav", RATE).warnings
    assert warning.startswith("levels: samples reach")


@pytest.mark.parametrize("level", [-20, -50, -70, -90, -120])
@pytest.mark.parametrize(
    ("subtype", "dtype"), [("PCM_16", "int16"), ("PCM_16", "int32"), ("PCM_24", "int32"), ("FLOAT", "float32")]
)
def test_quiet_recordings_are_not_warned_of(level: int, subtype: str, dtype: str) -> None:
    """However quiet: what was scaled to int32 leaves the low bits empty, which samples of 16 bits would use."""
    quiet = SIGNAL / np.abs(SIGNAL).max() * 10 ** (level / 20)
    assert from_array(read_as(dtype, subtype, quiet), RATE, RATE).warnings == ()


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32"])
@pytest.mark.parametrize("noise", [0, 1, 8])
def test_silence_is_not_warned_of(dtype: str, noise: int) -> None:
    """Neither is noise of a few steps."""
    steps = np.random.default_rng(0).integers(-noise, noise + 1, 10_000)
    assert from_array(steps.astype(dtype), RATE, RATE).warnings == ()


def test_loud_recordings_are_not_warned_of() -> None:
    """Floats may be overdriven, and a single loud sample of int32 shows that all are scaled."""
    assert from_array(SIGNAL * 10, RATE, RATE).warnings == ()
    loud = INT16.astype(np.int32)
    loud[-1] = 1 << 24
    assert from_array(loud, RATE, RATE).warnings == ()


@pytest.mark.parametrize(
    ("waveform", "holds"),
    [
        (np.zeros(10, bool), "bool"),
        ([True, False], "bool"),
        (np.zeros(10, complex), "complex128"),
        (np.array([0.5, None]), "object"),
        ([b"a", b"b"], "S1"),
        ("a.wav", "<U5"),
        (np.zeros(10, "datetime64[s]"), "datetime64"),
        (np.zeros(10, "timedelta64[s]"), "timedelta64"),
        (np.zeros(3, [("left", "f4")]), "left"),
        ({"array": [0.0], "sampling_rate": RATE}, "object"),
        (None, "object"),
    ],
)
def test_what_is_no_number_is_refused(waveform: Any, holds: str) -> None:
    """The message names what the array holds, and what it may hold."""
    with pytest.raises(AudioError, match=f"the waveform holds .*{holds}.*; give floats with full scale 1"):
        from_array(waveform, RATE, RATE)


@pytest.mark.parametrize("dtype", [np.float16, np.longdouble])
def test_floats_of_any_size_are_right(dtype: type) -> None:
    """Half and extended precision have the same full scale."""
    np.testing.assert_allclose(from_array(SIGNAL.astype(dtype), RATE, RATE).samples, SIGNAL, rtol=0, atol=1e-3)


@pytest.mark.parametrize("swapped", [SIGNAL, SIGNAL.tolist(), [SIGNAL, SIGNAL]])
@pytest.mark.parametrize("rate", [RATE, float(RATE), np.int64(RATE)])
def test_a_pair_that_changed_places_is_told(swapped: Any, rate: Any) -> None:
    """``(rate, waveform)`` is refused with the order."""
    with pytest.raises(AudioError, match=r"changed places; give \(waveform, sample_rate\)"):
        from_array(rate, swapped, RATE)


@pytest.mark.parametrize("rate", [None, "16000", True, [RATE], np.zeros(3), {}])
def test_a_rate_that_is_no_number_is_refused(rate: Any) -> None:
    """With the pair that is meant."""
    with pytest.raises(AudioError, match=r"the sample rate is a number in Hz, not .*; give \(waveform, sample_rate\)"):
        from_array(SIGNAL, rate, RATE)


@pytest.mark.parametrize("rate", [RATE, float(RATE), np.int32(RATE), np.array(RATE)])
def test_a_rate_may_be_any_number(rate: Any) -> None:
    """Also that of another library."""
    np.testing.assert_array_equal(from_array(SIGNAL, rate, RATE).samples, SIGNAL)


@pytest.mark.parametrize("channel", ["mean", 1.0, [0]])
def test_a_channel_that_is_no_number_is_refused(channel: Any) -> None:
    """The command line's word for the mean is None here."""
    with pytest.raises(TypeError, match="channel is None for the mean of all, or a number from 0"):
        from_array(SIGNAL, RATE, RATE, channel)


def test_tensors_are_read_or_refused_with_what_makes_them_arrays() -> None:
    """PyTorch's own exceptions do not come through; what NumPy can read is read."""
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(SIGNAL)
    np.testing.assert_array_equal(from_array(tensor, RATE, RATE).samples, SIGNAL)
    np.testing.assert_array_equal(from_array(tensor, torch.tensor(RATE), RATE).samples, SIGNAL)
    for odd in (
        tensor.clone().requires_grad_(),
        tensor.bfloat16(),
        tensor.to("meta"),  # as on any device but the processor
        tensor.to_sparse(),
        [tensor.clone().requires_grad_()],
    ):
        with pytest.raises(AudioError, match=r"is not an array \(.*\); of a PyTorch tensor give \.detach\(\)\.cpu\(\)"):
            from_array(odd, RATE, RATE)
    np.testing.assert_allclose(
        from_array(tensor.bfloat16().requires_grad_().detach().cpu().float().numpy(), RATE, RATE).samples,
        SIGNAL,
        rtol=0,
        atol=0.01,
    )
    with pytest.raises(AudioError, match="int64"):
        from_array(torch.from_numpy(INT16).long(), RATE, RATE)
