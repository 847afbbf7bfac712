"""Files that libsndfile refuses, decoded by FFmpeg in a process of its own: every container, and hostile ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_files import failure
from commands import embed
from conftest import speech
from w2v_models.errors import AudioError
from w2v_runtime.audio import ffmpeg
from w2v_runtime.audio.reading import open_audio, read_audio

av = pytest.importorskip("av")

RATE = 16000
#: By name: codec, container, rate, whether it is lossless, the greatest delay in seconds that its container leaves in.
KINDS = {
    "aac.m4a": ("aac", "ipod", 44100, False, 0.03),
    "alac.m4a": ("alac", "ipod", 44100, True, 0),
    "aac.mp4": ("aac", "mp4", 48000, False, 0.03),
    "aac.mov": ("aac", "mov", 44100, False, 0.03),
    "aac.3gp": ("aac", "3gp", 32000, False, 0.04),
    "opus.webm": ("libopus", "webm", 48000, False, 0.01),
    "opus.mka": ("libopus", "matroska", 48000, False, 0.01),
    "adts.aac": ("aac", "adts", 44100, False, 0.03),
    "dolby.ac3": ("ac3", "ac3", 44100, False, 0.01),
    "pack.wv": ("wavpack", "wv", 44100, True, 0),
    "true.tta": ("tta", "tta", 44100, True, 0),
    "stream.ts": ("aac", "mpegts", 44100, False, 0.03),
    "video.avi": ("pcm_s16le", "avi", 44100, True, 0),
}


#: Encoders that would take 8 bits.
SIXTEEN_BITS = {"wavpack": "s16p", "tta": "s16"}


def encoded(path: Path, kind: str, seconds: float = 4.0, channels: int = 1, rate: int | None = None) -> Path:
    """Speech in a container, as PyAV writes it; further channels are silent."""
    codec, container, native, _, _ = KINDS[kind]
    rate = rate or native
    samples = np.zeros((int(seconds * rate), channels), np.int16)
    samples[:, 0] = (speech(seconds, rate) * 32767).astype(np.int16)
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.layout = "mono" if channels == 1 else "stereo"
        if codec in SIXTEEN_BITS:
            stream.format = SIXTEEN_BITS[codec]
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=stream.layout.name)
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_its_sound(tmp_path, kind):
    """Lossless ones sample for sample; others with the delay that their container does not tell."""
    _, _, rate, lossless, delay = KINDS[kind]
    audio = read_audio(str(encoded(tmp_path / kind, kind)), RATE)
    soundfile.write(tmp_path / "same.wav", (speech(4.0, rate) * 32767).astype(np.int16), rate)
    same = read_audio(str(tmp_path / "same.wav"), RATE).samples
    assert audio.warnings == ()
    if lossless:
        assert audio.duration == 4.0
        assert np.abs(audio.samples - same).max() < 1e-4
        return
    assert 4.0 <= audio.duration < 4.1
    lags = range(round(delay * RATE) + 2)
    found = [np.corrcoef(audio.samples[lag : lag + 48000], same[:48000])[0, 1] for lag in lags]
    assert max(found) > 0.95


def test_channels_are_handled_as_everywhere(tmp_path):
    """The mean of all, or one of them."""
    path = str(encoded(tmp_path / "a.m4a", "alac.m4a", channels=2))
    first, second, mean = (read_audio(path, RATE, channel).samples for channel in (0, 1, None))
    assert np.abs(second).max() == 0
    assert np.abs(mean - first / 2).max() < 1e-6
    assert "no channel 2" in failure_of(path, 2)


def failure_of(path: str, channel: int) -> str:
    with pytest.raises(AudioError) as error:
        read_audio(path, RATE, channel)
    return str(error.value)


def test_bytes_and_open_files_are_read_too(tmp_path):
    """And left at their position."""
    path = encoded(tmp_path / "a.m4a", "aac.m4a")
    whole = read_audio(str(path), RATE).samples
    assert np.array_equal(read_audio(path.read_bytes(), RATE).samples, whole)
    with path.open("rb") as file:
        assert np.array_equal(read_audio(file, RATE).samples, whole)
        assert file.tell() == 0


def test_what_libsndfile_reads_never_goes_that_way(tmp_path, monkeypatch):
    """Nor does what is no recording."""
    monkeypatch.setattr(ffmpeg, "_taken", lambda: pytest.fail("FFmpeg was asked"))
    for suffix in ("wav", "flac", "ogg", "mp3"):
        path = tmp_path / f"a.{suffix}"
        soundfile.write(path, speech(1, RATE), RATE)
        assert read_audio(str(path), RATE).duration == pytest.approx(1, abs=0.1)
    for content in (b"<html><body>", b"PK\x03\x04" + bytes(99), b"hello\n" * 9):
        assert "looks like" in failure(content)


def test_without_the_extra_the_reason_names_it(tmp_path, monkeypatch):
    """And the conversion that helps without it."""
    path = encoded(tmp_path / "a.m4a", "aac.m4a")
    monkeypatch.setattr(ffmpeg, "installed", lambda: False)
    said = failure(str(path))
    assert "this looks like M4A/MP4" in said
    assert "pip install 'w2v-onnx[av]'" in said
    assert "ffmpeg -i IN" in said


@pytest.mark.parametrize("kind", ["alac.m4a", "opus.webm", "adts.aac", "pack.wv", "true.tta"])
def test_cut_files_fail_or_are_warned_of(tmp_path, kind):
    """Wherever they are cut: never a shorter recording without a word."""
    content = encoded(tmp_path / kind, kind).read_bytes()
    whole = read_audio(content, RATE).duration
    for share in (0.02, 0.3, 0.7, 0.95):
        cut = content[: int(len(content) * share)]
        try:
            audio = read_audio(cut, RATE)
        except AudioError:
            continue
        assert np.isfinite(audio.samples).all()
        # A stream of AAC frames declares no length.
        assert kind == "adts.aac" or audio.warnings or audio.duration > 0.97 * whole, share


def test_a_rate_that_changes_inside_fails(tmp_path):
    """With the place where it does."""
    first, second = (encoded(tmp_path / f"{rate}.aac", "adts.aac", rate=rate).read_bytes() for rate in (44100, 22050))
    said = failure(first + second)
    assert "the stream changes from 44100 Hz, 1 channel(s), to 22050 Hz" in said


@pytest.mark.parametrize(
    "content",
    [
        "ffconcat version 1.0\nfile '{secret}'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n",
        '<?xml version="1.0"?><MPD><Period><AdaptationSet><BaseURL>{secret}</BaseURL></AdaptationSet></Period></MPD>',
    ],
    ids=["concat", "hls", "dash"],
)
def test_no_file_that_a_file_names_is_opened(tmp_path, content):
    """Playlists are none of the formats that may be opened."""
    secret = encoded(tmp_path / "secret.m4a", "aac.m4a")
    for junk in (b"", b"\x00\x01\x02"):
        path = tmp_path / "list.bin"
        path.write_bytes(content.format(secret=secret).encode() + junk)
        assert "unsupported format" in failure(str(path))


def workers() -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "av_worker.py"], capture_output=True, text=True)
    return list(map(int, done.stdout.split()))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_of_the_decoder_fails_one_file(tmp_path, number):
    """In the middle of it; the next one gets a new process."""
    ffmpeg.end_idle()
    path = str(encoded(tmp_path / "a.wv", "pack.wv", seconds=120))
    with open_audio(path, RATE) as stream:
        blocks = iter(stream)
        next(blocks)
        (process,) = workers()
        os.kill(process, number)
        with pytest.raises(AudioError, match=f"only .* s could be decoded .*crashed on it .signal {int(number)}"):
            list(blocks)
    assert read_audio(path, RATE).duration == 120


def test_a_process_that_died_while_it_waited_costs_no_file(tmp_path):
    """The next file gets a new one."""
    ffmpeg.end_idle()
    path = str(encoded(tmp_path / "a.m4a", "aac.m4a"))
    whole = read_audio(path, RATE).samples
    (process,) = workers()
    os.kill(process, signal.SIGKILL)
    assert np.array_equal(read_audio(path, RATE).samples, whole)


def test_a_decoder_that_stalls_is_stopped(tmp_path, monkeypatch):
    """After the time that it is given."""
    ffmpeg.end_idle()
    monkeypatch.setattr(ffmpeg, "STALL_SECONDS", 0.5)
    path = str(encoded(tmp_path / "a.wv", "pack.wv", seconds=120))
    with open_audio(path, RATE) as stream:
        blocks = iter(stream)
        next(blocks)
        (process,) = workers()
        os.kill(process, signal.SIGSTOP)
        with pytest.raises(AudioError, match=r"gave nothing for 0\.5 s"):
            list(blocks)
    assert workers() == []


def test_a_process_serves_many_files_and_leaves_with_this_one(tmp_path):
    """One that is left early is ended; the rest are reused, and none outlives the interpreter."""
    ffmpeg.end_idle()
    path = str(encoded(tmp_path / "a.m4a", "aac.m4a"))
    read_audio(path, RATE)
    (first,) = workers()
    read_audio(path, RATE)
    assert workers() == [first]
    code = f"""
import os, subprocess, sys
from w2v_runtime.audio.reading import read_audio
whole = read_audio({path!r}, 16000).duration
child = os.fork()
if not child:
    os._exit(0 if read_audio({path!r}, 16000).duration == whole else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert read_audio({path!r}, 16000).duration == whole
print(subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "av_worker"], capture_output=True, text=True).stdout)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    (other,) = map(int, done.stdout.split())
    for _ in range(100):
        if not Path(f"/proc/{other}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{other}").exists()


def test_a_corpus_of_all_containers(bundles, tmp_path):
    """Found in a folder and embedded; one that is damaged fails alone; the versions are in the metadata."""
    folder = tmp_path / "in"
    folder.mkdir()
    for kind in KINDS:
        encoded(folder / kind, kind, seconds=1.5)
    (folder / "bad.m4a").write_bytes((folder / "aac.m4a").read_bytes()[:3000])
    code, said = embed(folder, "-m", bundles("base"), "-o", tmp_path / "out.npz", "--no-progress")
    assert code == 3, said
    assert f"{len(KINDS)} files embedded" in said
    assert "bad.m4a" in said
    with np.load(tmp_path / "out.npz") as stored:
        assert "FFmpeg" in json.loads(str(stored["metadata"]))["packages"]["av"]
        assert np.isfinite(stored["embeddings"]).all()
