"""Recordings behind, before and within other things give their own samples, once and whole."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from nested_seeds import ape, id3v1, id3v2, nested

import commands
from w2v_models.errors import AudioError
from w2v_runtime.audio.reading import read_audio

#: All streams below, and all above, the 64 KiB that a search for a further stream looks over.
SIZES = {"short": (8_000, 16_000, 1), "long": (150_000, 48_000, 2)}
TABLES = {name: nested(*size) for name, size in SIZES.items()}


def samples(content: bytes) -> np.ndarray:
    """What soundfile reads of a plain file, its channels averaged: (n,)."""
    return soundfile.read(io.BytesIO(content), always_2d=True)[0].mean(axis=1)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, table in TABLES.items() for name in table])
def test_a_nested_recording_is_read_once_and_whole(size, name):
    """Its samples are those that soundfile reads from the plain recording, and nothing is amiss (``--strict``)."""
    seed = TABLES[size][name]
    audio = read_audio(seed.content, SIZES[size][1])
    expected = np.concatenate([samples(plain) for plain in seed.plain])
    assert audio.duration == len(expected) / SIZES[size][1]
    assert audio.warnings == ()
    np.testing.assert_allclose(audio.samples, expected, rtol=0, atol=1e-6)


def test_both_sizes_are_what_they_are_called():
    """The long recordings are longer than any window in which streams are looked for, the short ones shorter."""
    for name in ("flac", "mp3", "vorbis", "opus"):
        (short,), (long,) = (TABLES[size][f"{name} behind a tag"].plain for size in SIZES)
        assert len(short) < 65_536 < len(long)


def flac_of_bytes(frames: int, spelled: bytes) -> bytes:
    """A FLAC of noise of 8 bits, which is stored as it is, and in its last frame the bytes of ``spelled``."""
    noise = np.random.default_rng(0).integers(0, 256, frames, np.uint8)
    noise[-2000 : -2000 + len(spelled)] = np.frombuffer(spelled, np.uint8)
    file = io.BytesIO()
    soundfile.write(file, noise.view(np.int8).astype(np.int16) << 8, 16_000, "PCM_S8", format="FLAC")
    return file.getvalue()


@pytest.mark.parametrize("follows", ["nothing", "another", "a tag with another"])
def test_samples_that_spell_a_flac_are_samples(follows):
    """The decoder reads ahead of where the first FLAC ends, so what looks like a seam may stand within it."""
    other = flac_of_bytes(8_000, b"")
    one = flac_of_bytes(20_000, b"ID3" + other[:900])
    assert one.find(other[:42]) > 0
    behind = {"nothing": b"", "another": other, "a tag with another": ape(other) + id3v1()}[follows]
    expected = [samples(one), samples(other)] if follows == "another" else [samples(one)]
    np.testing.assert_allclose(read_audio(one + behind, 16_000).samples, np.concatenate(expected), rtol=0, atol=1e-6)


def test_a_flac_without_a_count_ends_before_its_tags():
    """Where the header has no sample count, tags behind the last frame are no damage."""
    plain = TABLES["short"]["flac behind a tag"].plain[0]
    unknown = plain[:21] + bytes([plain[21] & 0xF0]) + bytes(4 + 16) + plain[42:]
    audio = read_audio(id3v2() + unknown + ape(plain) + id3v1(), 16_000)
    np.testing.assert_allclose(audio.samples, samples(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_an_mp3_without_a_count_ends_before_its_tags(size):
    """An MP3 in a tag behind one without a frame count is not played after it."""
    plain = TABLES[size]["mp3 behind a tag"].plain[0]
    header = max(plain.find(b"Xing"), plain.find(b"Info"))
    bare = plain[:header] + bytes(8) + plain[header + 8 :]
    rate = SIZES[size][1]
    alone, tagged = read_audio(bare, rate), read_audio(id3v2(plain) + bare + ape(plain) + id3v1(), rate)
    assert tagged.duration == alone.duration
    np.testing.assert_array_equal(tagged.samples, alone.samples)


def mpeg_wav(mp3: bytes, rate: int) -> bytes:
    """A WAV of coding 0x55, whose data chunk is an MP3."""
    layout = (0x55).to_bytes(2, "little") + b"\1\0" + rate.to_bytes(4, "little") + bytes(4) + b"\1\0\0\0"
    layout += b"\x0c\0\1\0" + bytes(10)
    body = b"WAVEfmt " + len(layout).to_bytes(4, "little") + layout + b"data" + len(mp3).to_bytes(4, "little") + mp3
    return b"RIFF" + len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize("size", SIZES)
def test_an_mp3_in_a_wav_is_that_mp3(size):
    """And what follows its data chunk is none of it."""
    plain, rate = TABLES[size]["mp3 behind a tag"].plain[0], SIZES[size][1]
    audio = read_audio(mpeg_wav(plain, rate) + b"LIST" + len(plain).to_bytes(4, "little") + plain, rate)
    assert audio.warnings == ()
    np.testing.assert_allclose(audio.samples, samples(plain), rtol=0, atol=1e-6)


def test_a_tag_without_a_recording_has_no_samples():
    """Neither has one that is cut."""
    for content in (id3v2(), id3v2(padding=1000)[:-500], id3v2(bytes(500), footer=True)):
        with pytest.raises(AudioError, match="no samples: there is a tag and nothing behind it"):
            read_audio(content, 16_000)


@pytest.mark.parametrize("name", ["vorbis", "opus"])
def test_a_chain_whose_links_are_cut_warns(name):
    """The missing end of the first link of two shows, and both are read."""
    one, other = TABLES["long"][f"{name} joined"].plain
    audio = read_audio(one[: len(one) // 2] + other, 48_000)
    assert [warning.split(",")[0] for warning in audio.warnings] == ["truncated: the end of the Ogg stream is missing"]
    assert len(samples(other)) / 48_000 < audio.duration < 6
    tail = samples(other)
    np.testing.assert_allclose(audio.samples[-len(tail) :], tail, rtol=0, atol=1e-6)


def test_a_further_stream_that_cannot_be_opened_fails_the_file():
    """It is not left out without a word."""
    plain = TABLES["short"]["vorbis behind a tag"].plain[0]
    with pytest.raises(AudioError, match=r"damaged: behind the first 0\.50 s a further stream cannot be opened"):
        read_audio(plain + plain[:100], 16_000)


def test_a_tagged_recording_is_embedded_as_the_plain_one(bundles, tmp_path):
    """In the command, with ``--strict``: equal durations, equal vectors."""
    for name in ("flac", "mp3", "vorbis", "wav"):
        seed = TABLES["short"][f"{name} behind a tag with a picture"]
        (tmp_path / f"{name}-plain").write_bytes(seed.plain[0])
        (tmp_path / f"{name}-tagged").write_bytes(seed.content)
    code, said = commands.embed(tmp_path, "-m", bundles("base"), "-o", tmp_path / "out.npz", "--strict")
    assert code == 0, said
    with np.load(tmp_path / "out.npz") as stored:
        assert len(stored["paths"]) == 8
        np.testing.assert_array_equal(stored["durations"][::2], stored["durations"][1::2])
        np.testing.assert_allclose(stored["embeddings"][::2], stored["embeddings"][1::2], rtol=0, atol=1e-5)
