"""What fuzzing found, each made by code, and a short walk over seeds and their changes."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from random import Random

import numpy as np
import pytest
import soundfile

pytest.importorskip("onnx")

import mutators
import targets
from audio_seeds import audio_seeds, encoded
from bundle_seeds import bundle_seeds
from container_seeds import container_seeds
from list_seeds import list_seeds

from w2v_models.errors import AudioError, BundleError
from w2v_models.manifest import Manifest
from w2v_runtime.audio import ffmpeg
from w2v_runtime.audio.reading import read_audio
from w2v_runtime.bundles import library

SEEDS = {"audio": audio_seeds, "containers": container_seeds, "lists": list_seeds, "bundle": bundle_seeds}
#: Changes tried by this test, of each target; the fuzzer tries hundreds of thousands.
CHANGES = 300


@pytest.mark.parametrize("target", SEEDS)
def test_seeds_and_their_changes_keep_the_promises(tmp_path, target):
    """Every seed as it is, and some hundred changed ones: a valid object or the target's error, nothing else."""
    ffmpeg.end_idle()  # what other tests left is not this one's
    random, seeds = Random(0), SEEDS[target]()
    contents = [
        *seeds.values(),
        *(mutators.MUTATORS[target](random, random.choice([*seeds.values()])) for _ in range(CHANGES)),
    ]
    with warnings.catch_warnings(action="error"):
        for content in contents:
            targets.TARGETS[target](content, tmp_path)
    ffmpeg.end_idle()


def float_wav(*samples: bytes) -> bytes:
    """Two channels of 32-bit floats, each sample given by its bytes."""
    content = b"".join(samples)
    layout = struct.pack("<HHIIHH", 3, 2, 16_000, 128_000, 8, 32)
    return b"RIFF" + struct.pack("<I", 36 + len(content)) + b"WAVEfmt " + struct.pack("<I", 16) + layout + (
        b"data" + struct.pack("<I", len(content)) + content
    )  # fmt: skip


@pytest.mark.parametrize(
    "pair",
    [(np.float32(np.inf).tobytes(), np.float32(-np.inf).tobytes()), (b"\x01\x00\x80\x7f", bytes(4))],
    ids=["infinities of both signs", "signalling NaN"],
)
def test_samples_that_are_no_numbers_fail_without_a_warning_of_numpy(tmp_path, pair):
    """The mean over channels of such samples is refused, and nothing is printed about it."""
    (tmp_path / "a.wav").write_bytes(float_wav(*pair * 500))
    with warnings.catch_warnings(action="error"), pytest.raises(AudioError, match="is not finite"):
        read_audio(tmp_path / "a.wav", 16_000)


def test_decoders_do_not_print_to_standard_output(tmp_path):
    """libsndfile reports damaged sample dumps on the C library's standard output, where results may go."""
    content = bytearray(encoded("SDS", "PCM_16"))
    content[21::127] = b"\0" * len(content[21::127])
    (tmp_path / "a.sds").write_bytes(content)
    script = (
        "import sys; from w2v_runtime.audio.reading import read_audio; read_audio(sys.argv[1], 16000); print('end')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / "a.sds")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout in ("end\n", ""), done.stdout
    assert "Error" not in done.stdout


def apev2_footer(size: int, flags: int = 0) -> bytes:
    """A footer of an APE tag that says how long its tag is, in bytes."""
    return b"APETAGEX" + struct.pack("<IIII", 2000, size, 0, flags) + bytes(8)


def bare_mp3(frames: int = 8000) -> bytes:
    """An MP3 without the frame that holds its frame count, so that its end is looked for."""
    content = encoded("MP3", "MPEG_LAYER_III", frames=frames)
    at = max(content.find(b"Xing"), content.find(b"Info"))
    start = content.rindex(b"\xff", 0, at)
    return content[content.index(content[start : start + 2], at) :]


@pytest.mark.parametrize("size", [0, 1, 31, 2**32 - 1])
def test_a_tag_that_says_it_is_empty_ends_the_search(size):
    """Looking for the last tag took an APE footer of no bytes for one more tag, for ever."""
    plain = read_audio(bare_mp3(), 16_000).samples
    tagged = read_audio(bare_mp3() + apev2_footer(size), 16_000).samples
    assert np.array_equal(tagged[: len(plain)], plain)


def test_a_tag_behind_a_file_shorter_than_the_longest_tag():
    """An ID3v1 tag was looked up 355 bytes before the end, also where the file has fewer."""
    file = io.BytesIO()
    options = {"compression_level": 0.99, "bitrate_mode": "CONSTANT"}
    soundfile.write(file, np.zeros(2000), 24_000, "MPEG_LAYER_III", format="MP3", **options)
    content = file.getvalue()
    assert len(content) + 128 < 355
    plain = read_audio(content, 24_000).samples
    assert len(plain)
    assert np.array_equal(read_audio(content + b"TAG" + bytes(125), 24_000).samples, plain)


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_a_cut_sample_dump_is_not_filled_up(subtype):
    """libsndfile repeats the last packet for those that are missing; the whole dump is read as it is."""
    content = encoded("SDS", subtype, frames=9000)
    assert len(read_audio(content, 48_000).samples)
    with pytest.raises(AudioError, match=r"truncated: the header declares \d+ bytes of samples, \d+ follow"):
        read_audio(content[: len(content) * 6 // 10], 16_000)


def test_gsm_that_declares_too_much_ends(tmp_path):
    """libsndfile decodes silence behind the end of the file for as long as a size of 2^63 bytes or more allows."""
    content = encoded("W64", "GSM610")
    size = content.index(b"data") + 16
    (tmp_path / "a").write_bytes(content[:size] + struct.pack("<Q", 0xDF99_C100_0000_009A) + content[size + 8 :])
    with pytest.raises(AudioError, match="the decoder goes on behind the end of the file"):
        read_audio(tmp_path / "a", 16_000)


@pytest.mark.parametrize("kind", ["MP3", "WAV"])
def test_a_resource_fork_in_the_current_folder_does_not_change_what_is_read(tmp_path, monkeypatch, kind):
    """libsndfile takes ``._`` for the other half of an MP3, which then fails with its name; a WAV is read as ever."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(encoded(kind, "MPEG_LAYER_III" if kind == "MP3" else "PCM_16"))
    whole = read_audio("a", 16_000)
    (tmp_path / "._").write_bytes(bytes(300))
    if kind == "WAV":
        assert np.array_equal(read_audio("a", 16_000).samples, whole.samples)
    else:
        with pytest.raises(AudioError, match=rf"reads {tmp_path}/\._ as its resource fork, so move that away"):
            read_audio("a", 16_000)


def manifest_with(name: str, text: str) -> str:
    """A valid manifest but for the first value of this name, which is ``text``."""
    data = json.loads(bundle_seeds()["manifest-plain"][1:])
    mark = f'"{name}": '
    before, after = json.dumps(data).split(mark, 1)
    _, end = json.JSONDecoder().raw_decode(after)
    return f"{before}{mark}{text}{after[end:]}"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("max_abs", f"1{'0' * 400}", "within the range of float"),
        ("max_abs", "1e999", "within the range of float"),
        ("max_abs", "NaN", "NaN is not a number"),
        ("max_abs", "-Infinity", "-Infinity is not a number"),
        ("max_abs", "9" * 5000, "not JSON"),
        ("model", '"\\ud800"', "text that UTF-8 can hold"),
        ("torch", '"2", "torch": "1"', "names torch more than once"),
        ("format_version", "[" * 500 + "]" * 500, "format_version is"),
        ("source", json.dumps(dict.fromkeys(map(str, range(10_000)))), "and 9992 more"),
        ("precisions", '{"fp12": {}}', "precisions.fp12 lacks fields"),
    ],
)
def test_a_manifest_that_json_can_write_and_no_export_does_is_refused(name, text, says):
    """Numbers beyond float, what is no number, half characters, names given twice, and messages stay short."""
    with pytest.raises(ValueError, match=r"manifest|format_version") as caught:
        Manifest.from_json(manifest_with(name, text))
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_a_value_nested_near_the_limit_of_python_is_refused(depth):
    """Reading it may just succeed where showing it in the message would not."""
    with pytest.raises(ValueError, match="manifest"):
        Manifest.from_json(manifest_with("opset", "[" * depth + "]" * depth))


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "a\0b"])
def test_names_that_no_file_system_takes_are_no_bundles(name, monkeypatch, tmp_path):
    """A model's name that is too long, or holds NUL, is refused like any other that is not exported."""
    monkeypatch.setenv("W2V_HOME", str(tmp_path))
    with pytest.raises(BundleError):
        library.find(name)


def test_files_of_a_precision_in_two_folders_are_refused(tmp_path: Path):
    """A graph names its data from its own folder, so what was checked elsewhere would not be what is read."""
    text = manifest_with("data", '[{"path": "other/model.onnx_data", "sha256": "%s", "size": 1}]' % ("0" * 64))
    with pytest.raises(ValueError, match="all files of a precision must be in one folder"):
        Manifest.from_json(text)
