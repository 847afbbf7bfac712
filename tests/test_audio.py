"""Audio files and arrays become the model's samples, whatever their encoding, rate, channels and name."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soxr

from audio_files import (
    JOINED,
    RATE,
    encoded,
    flac_without_count,
    pcm16,
    saved,
    speech_like,
    wav_bytes,
)
from w2v_models.errors import AudioError
from w2v_runtime.audio.reading import declared_seconds, from_array, open_audio, read_audio

SHARED = Path(__file__).resolve().parents[2] / "shared" / "audio"


@pytest.mark.parametrize(
    ("kind", "subtype", "likeness"),
    [
        ("WAV", "PCM_U8", 0.999),
        ("WAV", "PCM_16", 0.999999),
        ("WAV", "PCM_24", 0.999999),
        ("WAV", "PCM_32", 0.999999),
        ("WAV", "FLOAT", 0.999999),
        ("WAV", "DOUBLE", 0.999999),
        ("WAV", "ULAW", 0.999),
        ("WAV", "ALAW", 0.999),
        ("WAV", "IMA_ADPCM", 0.99),
        ("WAV", "MS_ADPCM", 0.99),
        ("RF64", "PCM_16", 0.999999),
        ("W64", "PCM_16", 0.999999),
        ("AIFF", "PCM_24", 0.999999),
        ("AU", "PCM_16", 0.999999),
        ("CAF", "PCM_16", 0.999999),
        ("NIST", "PCM_16", 0.999999),
        ("FLAC", "PCM_16", 0.999999),
        ("OGG", "VORBIS", 0.99),
        ("OGG", "OPUS", 0.99),
        ("MP3", "MPEG_LAYER_III", 0.99),
    ],
)
def test_encodings(tmp_path: Path, kind: str, subtype: str, likeness: float) -> None:
    """Every encoding gives the signal that went in, told by content and not by name, without a warning."""
    signal = speech_like(2)
    audio = read_audio(saved(tmp_path, encoded(tmp_path, signal, kind=kind, subtype=subtype)), RATE)
    assert audio.samples.dtype == np.float32
    assert audio.rate == RATE
    assert audio.warnings == ()
    assert audio.duration == pytest.approx(2, abs=0.07)  # ADPCM and MP3 fill their last block
    assert np.corrcoef(audio.samples[: len(signal)], signal)[0, 1] > likeness


@pytest.mark.parametrize("rate", [8000, 11025, 11127, 16000, 22050, 35467, 44100, 48000, 96000, 192000])
def test_resampling_equals_offline(tmp_path: Path, rate: int) -> None:
    """A file of any rate, decoded in blocks, equals soxr on the whole signal."""
    signal = np.random.default_rng(rate).uniform(-0.5, 0.5, round(10.3 * rate)).astype(np.float32)
    audio = read_audio(saved(tmp_path, encoded(tmp_path, signal, rate, "WAV", "FLOAT")), RATE)
    expected = signal if rate == RATE else soxr.resample(signal, rate, RATE)
    assert audio.duration == len(signal) / rate
    np.testing.assert_allclose(audio.samples, expected, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(from_array(signal, rate, RATE).samples, audio.samples)


def test_stream_yields_the_same_samples_in_long_blocks(tmp_path: Path) -> None:
    """The blocks of a stream are 10 to 60 s long and joined are what read_audio returns."""
    path = saved(tmp_path, encoded(tmp_path, speech_like(95, 8000), 8000, "WAV", "PCM_16"))
    with open_audio(path, RATE) as stream:
        blocks = list(stream)
        assert stream.duration == 95
        assert stream.warnings == ()
    assert len(blocks) > 1
    assert all(10 * RATE <= len(block) <= 60 * RATE for block in blocks[:-1])
    np.testing.assert_array_equal(np.concatenate(blocks), read_audio(path, RATE).samples)


@pytest.mark.parametrize("channels", [2, 3, 8, 16, 1024])
def test_channels_are_averaged_before_resampling(tmp_path: Path, channels: int) -> None:
    """The mean of all channels, or the one asked for, is resampled as a mono signal."""
    signal = np.random.default_rng(0).uniform(-0.5, 0.5, (2000, channels)).astype(np.float32)
    path = saved(tmp_path, encoded(tmp_path, signal, 22050, "WAV", "FLOAT"))
    mean = soxr.resample(signal.mean(axis=1, dtype=np.float64).astype(np.float32), 22050, RATE)
    np.testing.assert_allclose(read_audio(path, RATE).samples, mean, rtol=0, atol=1e-6)
    last = soxr.resample(np.ascontiguousarray(signal[:, -1]), 22050, RATE)
    np.testing.assert_allclose(read_audio(path, RATE, channels - 1).samples, last, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channel", [-1, 2])
def test_missing_channel(tmp_path: Path, channel: int) -> None:
    """A channel that the file does not have is refused, with the number of those it has."""
    path = saved(tmp_path, encoded(tmp_path, np.zeros((100, 2), np.float32)))
    with pytest.raises(AudioError, match=f"no channel {channel}: the audio has 2"):
        read_audio(path, RATE, channel)
    with pytest.raises(AudioError, match="numbered from 0"):
        from_array(np.zeros((100, 2)), RATE, RATE, channel)


@pytest.mark.parametrize("declared", [0xFFFF_FFFF, 0x7FFF_F000, 0x7FFF_FFFF, 0x8000_0000])
def test_size_unknown_when_written_to_a_pipe(tmp_path: Path, declared: int) -> None:
    """A placeholder for the data size is no truncation: what is there is read."""
    audio = read_audio(saved(tmp_path, wav_bytes(pcm16(speech_like(1)), declared)), RATE)
    assert (audio.duration, audio.warnings) == (1.0, ())


def test_mp3_of_varying_bit_rate_without_count_is_read_whole(tmp_path: Path) -> None:
    """Large frames at the start do not end the decoding where a file of such frames would end."""
    parts = [
        encoded(tmp_path, speech_like(seconds), kind="MP3", bitrate_mode="CONSTANT", compression_level=level)
        for seconds, level in ((2, 0.0), (10, 0.99))
    ]
    assert len(parts[0]) / 2 > 2 * len(parts[1]) / 10
    content = bytearray(b"".join(parts))
    header = max(content.find(b"Xing"), content.find(b"Info"))
    content[header + 7] &= 0xFE  # the flag that a frame count follows
    assert 12 <= read_audio(saved(tmp_path, bytes(content)), RATE).duration < 12.3  # encoders pad


def test_flac_without_count_is_read_whole(tmp_path: Path) -> None:
    """A FLAC that was written to a pipe gives all of its samples."""
    path = saved(tmp_path, flac_without_count(encoded(tmp_path, speech_like(3))))
    assert read_audio(path, RATE).duration == 3
    assert 0 < declared_seconds(path) < 60


def test_flac_with_a_tag_behind_it(tmp_path: Path) -> None:
    """An ID3v1 tag behind the last FLAC frame is no damage."""
    path = saved(tmp_path, encoded(tmp_path, speech_like(2)) + b"TAG" + bytes(125))
    assert read_audio(path, RATE).duration == 2


@pytest.mark.parametrize(("kind", "subtype"), JOINED)
def test_joined_streams_are_read_whole(tmp_path: Path, kind: str, subtype: str | None) -> None:
    """Streams of one rate and channel count, joined in a file, follow one another."""
    content = encoded(tmp_path, speech_like(2), kind=kind, subtype=subtype)
    audio = read_audio(saved(tmp_path, content * 3), RATE)
    assert audio.duration == 3 * read_audio(saved(tmp_path, content), RATE).duration
    assert audio.warnings == ()


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0, 32768.0, 2.0**31])
def test_constant_signals_stay_finite(tmp_path: Path, value: float) -> None:
    """Silence, an offset, full scale and integers kept as floats pass resampling finite."""
    audio = read_audio(
        saved(tmp_path, encoded(tmp_path, np.full(48_000, value, np.float32), 48_000, "WAV", "FLOAT")), RATE
    )
    assert len(audio.samples) == RATE
    np.testing.assert_allclose(audio.samples[4000:-4000], value, rtol=1e-3)


def test_single_sample(tmp_path: Path) -> None:
    """One sample is read as one; whether that is too short is for the model to say."""
    audio = read_audio(saved(tmp_path, wav_bytes(b"\x00\x40", rate=44_100)), RATE)
    assert audio.duration == 1 / 44_100
    assert len(audio.samples) <= 1
    assert read_audio(saved(tmp_path, wav_bytes(b"\x00\x40")), RATE).samples.tolist() == [0.5]


@pytest.mark.parametrize(
    "name", [b"two words.wav", b"line\nbreak.wav", "höre.wav".encode(), b"-m.wav", b"\xff\xfe.wav"]
)
def test_any_name(tmp_path: Path, name: bytes) -> None:
    """Names with spaces, newlines, leading dashes and bytes that are not UTF-8 are opened."""
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(wav_bytes(pcm16(speech_like(1))))
    assert read_audio(path, RATE).duration == 1


def test_long_many_channel_file_in_bounded_memory(tmp_path: Path) -> None:
    """A minute of eight silent channels in a few kilobytes is streamed in a fraction of its decoded size."""
    path = saved(tmp_path, encoded(tmp_path, np.zeros((60 * 48_000, 8), np.float32), 48_000))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    with open_audio(path, RATE) as stream:
        assert sum(len(block) for block in stream) == 60 * RATE
        assert stream.duration == 60
    assert tracemalloc.get_traced_memory()[1] < 12 << 20  # decoded: 92 MB
    tracemalloc.stop()


def test_declared_seconds(tmp_path: Path) -> None:
    """The header's length is told without decoding; what is not audio fails."""
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        assert declared_seconds(saved(tmp_path, encoded(tmp_path, speech_like(7), kind=kind))) == pytest.approx(
            7, abs=0.1
        )
    with pytest.raises(AudioError, match="unsupported"):
        declared_seconds(saved(tmp_path, b"no audio"))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "uint16", "float16", "float32", "float64"])
def test_arrays_of_any_number_type(dtype: str) -> None:
    """Integers are scaled by the range of their type, floats are taken as they are."""
    signal = np.array([-0.5, 0.0, 0.25])
    kind = np.dtype(dtype)
    half = 2.0 ** (8 * kind.itemsize - 1)
    values = signal if kind.kind == "f" else signal * half + (half if kind.kind == "u" else 0)
    audio = from_array(values.astype(kind), RATE, RATE)
    np.testing.assert_array_equal(audio.samples, signal.astype(np.float32))
    assert audio.duration == 3 / RATE


def test_array_is_copied_and_shaped_by_frames() -> None:
    """Rows are frames; the result does not share memory with the array."""
    waveform = np.array([[0.5, -0.5], [0.5, 0.0]], np.float32)
    assert from_array(waveform, RATE, RATE).samples.tolist() == [0.0, 0.25]
    mono = np.ones(10, np.float32)
    samples = from_array(mono, RATE, RATE).samples
    mono[:] = 0
    assert samples.min() == 1


@pytest.mark.parametrize(
    ("waveform", "reason"),
    [
        ([], "no samples"),
        (np.zeros((0, 2)), "no samples"),
        (np.zeros((1, 2, 3)), "3 dimensions"),
        (np.float32(0.5), "0 dimensions"),
        (np.zeros((2, 16_000)), "16000 channels"),
        (np.zeros(10, bool), "bool"),
        (np.zeros(10, complex), "complex"),
        (["a", "b"], "give floats"),
        ([[1.0], [1.0, 2.0]], "differ in length"),
        (np.full(10, 1e300), "not finite"),
    ],
)
def test_arrays_that_are_no_audio(waveform: npt.ArrayLike, reason: str) -> None:
    """An array of another shape or type is refused with what is wrong."""
    with pytest.raises(AudioError, match=reason):
        from_array(waveform, RATE, RATE)


@pytest.mark.skipif(not (SHARED / "jfk.flac").exists(), reason="the shared recordings are not there")
def test_one_recording_in_three_encodings() -> None:
    """A stereo FLAC at 44.1 kHz and an MP3 give the samples of the 16 kHz WAV."""
    wav, flac, mp3 = (read_audio(SHARED / f"jfk.{kind}", RATE) for kind in ("wav", "flac", "mp3"))
    assert len(wav.samples) == len(flac.samples) == 11 * RATE
    assert np.corrcoef(wav.samples, flac.samples)[0, 1] > 0.9999
    length = min(len(wav.samples), len(mp3.samples))
    assert np.corrcoef(wav.samples[:length], mp3.samples[:length])[0, 1] > 0.99


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("libri-6313-76958-0021.flac", 11.925),
        ("lj-002-0020.wav", 1.54),
        ("ami-headset.wav", 6.0),
        ("gs-16k.opus", 15.83),
        ("stereo-44k.aiff", 2.745),
    ],
)
def test_real_recordings(name: str, seconds: float) -> None:
    """Real recordings are read in full length without a warning."""
    path = SHARED / name
    if not path.exists():
        pytest.skip("the shared recordings are not there")
    audio = read_audio(path, RATE)
    assert audio.duration == pytest.approx(seconds, abs=0.005)
    assert len(audio.samples) == pytest.approx(audio.duration * RATE, abs=1)
    assert audio.warnings == ()
