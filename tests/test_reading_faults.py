"""A system that cannot read an input fails that input, with its reason, and never cuts a recording short in silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

import commands
from audio_files import failure, flac_without_count, speech_like, wav_bytes
from conftest import speech
from reading_faults import build, failing

#: Every way in which files are read: on descriptors, in views, through blocks of their own; format and encoding.
ENCODINGS = [
    *(("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAV", "GSM610"), ("RF64", "PCM_16")),
    *(("W64", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("NIST", "PCM_16"), ("CAF", "PCM_16")),
    *(("CAF", "ALAC_16"), ("VOC", "PCM_16"), ("XI", "DPCM_16"), ("SDS", "PCM_16"), ("PAF", "PCM_24")),
    *(("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
]
SWEEP = """
import ctypes, errno, json, os, sys
from w2v_models.errors import AudioError
from w2v_runtime.audio.reading import read_audio
fail = ctypes.CDLL(None).fail_reading
fail.argtypes = ctypes.c_char_p, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_int
for path in sys.argv[1:]:
    fail(b"", -1, 0, 0)
    whole, size = read_audio(path, 16000).samples.tobytes(), os.path.getsize(path)
    places = {0, 1, 40, 60, 100, 300, 1000, 4096, 9000, size - 1, *range(0, size, size // 7)}
    for times in (-1, 1):
        for place in sorted(places):
            fail(os.path.basename(path).encode(), place, times, errno.EIO)
            try:
                result = "whole" if read_audio(path, 16000).samples.tobytes() == whole else "another"
            except AudioError as error:
                result = str(error)
            print(json.dumps([os.path.basename(path), place, times, result]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("faults"))


def test_a_recording_is_whole_or_fails_wherever_the_disk_fails(tmp_path: Path, library: Path) -> None:
    """In every format, from every place on, once or for good: the samples are all of them, or the input fails.

    Where the disk keeps failing the reason is the system's; where it fails once, what the decoder makes of it.
    """
    paths = []
    for kind, subtype in ENCODINGS:
        paths.append(tmp_path / f"bad-{kind}-{subtype}")
        soundfile.write(paths[-1], speech(1.5), 16_000, subtype, format=kind)
    mp3, flac = (tmp_path / "bad-MP3-MPEG_LAYER_III").read_bytes(), (tmp_path / "bad-FLAC-PCM_16").read_bytes()
    header = max(mp3.find(b"Xing"), mp3.find(b"Info"))
    odd = {
        "bad-MP3-bare": mp3[:header] + bytes(8) + mp3[header + 8 :],
        "bad-MP3-tagged": b"ID3\4\0\0\0\0\x7f\x7f" + bytes(16383) + mp3,
        "bad-MP3-joined": mp3 + mp3,
        "bad-FLAC-bare": flac_without_count(flac),
        "bad-FLAC-joined": flac + flac,
    }
    for name, content in odd.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SWEEP, *paths], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({name for name, *_ in results}) == len(ENCODINGS) + len(odd)
    assert [result for result in results if result[3] == "another"] == []
    lasting = [(name, result) for name, _, times, result in results if times == -1]
    failed = [(name, result) for name, result in lasting if result != "whole"]
    assert len(failed) > 0.9 * len(lasting)  # the last byte of some formats is none of a sample
    said = "cannot be read (Input/output error); check the disk or the network that it is on."
    assert [item for item in failed if item[1] != said] == []


@pytest.mark.parametrize(("number", "reason"), [("EIO", "Input/output error"), ("ESTALE", "Stale file handle")])
def test_a_run_goes_on_past_inputs_that_the_system_cannot_read(bundles, tmp_path, library, number, reason):
    """They fail in the stage of reading with the system's reason, all others are embedded, exit 3."""
    folder = commands.write_corpus(tmp_path / "in", 4)
    for name, kind in (("bad.wav", "WAV"), ("bad.flac", "FLAC"), ("bad.ogg", "OGG"), ("bad.mp3", "MP3")):
        soundfile.write(folder / name, speech(4), 16_000, format=kind)
    arguments = (folder, "-m", bundles("base"), "-o", tmp_path / "out.npz")
    code, _ = commands.embed(*arguments, before=failing("/in/bad", 9000, number), LD_PRELOAD=str(library))
    assert code == 3
    failures = [json.loads(line) for line in (tmp_path / "out.npz.failures.jsonl").read_text().splitlines()]
    assert sorted(Path(failure["path"]).name for failure in failures) == ["bad.flac", "bad.mp3", "bad.ogg", "bad.wav"]
    for failure_ in failures:
        assert failure_["stage"] == "read"
        assert failure_["reason"].startswith(f"cannot be read ({reason}); check the disk or the network")
    assert commands.results(tmp_path / "out.npz")[0] == ["000.wav", "001.wav", "002.wav", "003.wav"]


def test_paths_that_the_system_refuses_fail_with_its_reason(tmp_path: Path) -> None:
    """A name that is too long, a loop of links, a file in the place of a folder."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(wav_bytes((speech_like(1) * 32767).astype("<i2").tobytes()))
    assert failure(tmp_path / ("a" * 300)).startswith("cannot be opened (File name too long)")
    assert failure(tmp_path / "loop").startswith("cannot be opened (Too many levels of symbolic links)")
    assert failure(tmp_path / "file" / "a.wav").startswith("cannot be opened (Not a directory)")
