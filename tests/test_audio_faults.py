"""Everything that can be wrong with an audio file: what fails, what is read with a warning."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import socket
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from audio_files import (
    JOINED,
    RATE,
    encoded,
    failure,
    flac_without_count,
    holed,
    pcm16,
    saved,
    speech_like,
    wav_bytes,
)
from w2v_models.errors import AudioError
from w2v_runtime.audio import ffmpeg
from w2v_runtime.audio.reading import MAX_DECLARED_SECONDS, declared_seconds, from_array, read_audio


@pytest.mark.parametrize("content", [b"", wav_bytes(b""), wav_bytes(pcm16(speech_like(1)), declared=0)])
def test_no_samples(tmp_path: Path, content: bytes) -> None:
    """An empty file, a header alone and a data size of 0 fail as having no samples."""
    assert failure(saved(tmp_path, content)).startswith("no samples")


@pytest.mark.parametrize("kind", ["AIFF", "OGG", "FLAC"])
def test_no_samples_in_other_formats(tmp_path: Path, kind: str) -> None:
    """A header without audio fails as having no samples in any format."""
    assert failure(saved(tmp_path, encoded(tmp_path, np.zeros(0, np.float32), kind=kind))).startswith("no samples")


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "NIST"])
def test_truncated_pcm_warns(tmp_path: Path, kind: str) -> None:
    """A cut file gives what is there, and both lengths in a warning."""
    content = encoded(tmp_path, speech_like(10), kind=kind, subtype="PCM_16")
    audio = read_audio(saved(tmp_path, content[: len(content) - round(5.8 * RATE) * 2]), RATE)
    assert audio.duration == pytest.approx(4.2, abs=1e-3)
    assert audio.warnings == ("truncated: the header declares 10.00 s, 4.20 s could be decoded",)


def test_truncated_mp3_warns(tmp_path: Path) -> None:
    """An MP3 that ends before its header says gives what is there, and both lengths in a warning."""
    content = encoded(tmp_path, speech_like(10), kind="MP3")
    audio = read_audio(saved(tmp_path, content[: len(content) // 2]), RATE)
    assert 4 < audio.duration < 6
    assert audio.warnings == (f"truncated: the header declares 10.00 s, {audio.duration:.2f} s could be decoded",)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_truncated_ogg_warns(tmp_path: Path, subtype: str) -> None:
    """Ogg declares no length; the missing end of the stream shows that it is cut."""
    content = encoded(tmp_path, speech_like(20), kind="OGG", subtype=subtype)
    audio = read_audio(saved(tmp_path, content[: len(content) // 2]), RATE)
    assert 0 < audio.duration < 15
    (warning,) = audio.warnings
    assert warning.startswith("truncated: the end of the Ogg stream is missing")
    assert f"{audio.duration:.2f} s could be decoded" in warning


@pytest.mark.parametrize("frames_off", [-2, 2])
def test_mp3_header_a_little_off(tmp_path: Path, frames_off: int) -> None:
    """An MP3 whose frame count is off by a few frames gives all of its audio, without a warning."""
    content = bytearray(encoded(tmp_path, speech_like(10), kind="MP3"))
    header = max(content.find(b"Xing"), content.find(b"Info"))
    (count,) = struct.unpack(">I", content[header + 8 : header + 12])
    content[header + 8 : header + 12] = struct.pack(">I", count + frames_off)
    audio = read_audio(saved(tmp_path, bytes(content)), RATE)
    assert audio.duration == pytest.approx(10, abs=0.1)
    assert audio.warnings == ()


@pytest.mark.parametrize("known", [True, False])
def test_cut_flac_fails(tmp_path: Path, known: bool) -> None:
    """A cut FLAC, with a sample count or without, fails with the seconds that could be decoded."""
    content = encoded(tmp_path, speech_like(10))
    content = content if known else flac_without_count(content)
    assert "s could be decoded" in failure(saved(tmp_path, content[: len(content) // 2]))


def test_damaged_flac_fails(tmp_path: Path) -> None:
    """Overwritten bytes within a FLAC fail it, with the seconds before them."""
    content = bytearray(encoded(tmp_path, speech_like(10)))
    middle = len(content) // 2
    content[middle : middle + 4] = b"\x5a\xa5\x11\x77"
    reason = failure(saved(tmp_path, bytes(content)))
    seconds = float(reason.split("only ")[1].split(" s ")[0])
    assert reason.startswith("damaged")
    assert 2 < seconds < 8


def test_flac_that_declares_too_much_fails_small(tmp_path: Path) -> None:
    """Four billion declared frames cost no memory and fail with what was there."""
    content = bytearray(encoded(tmp_path, speech_like(1)))
    content[22:26] = b"\xff\xff\xff\xff"
    path = saved(tmp_path, bytes(content))
    tracemalloc.start()
    assert "only 1.00 s could be decoded" in failure(path)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert declared_seconds(path) <= MAX_DECLARED_SECONDS


@pytest.mark.parametrize(("kind", "subtype"), JOINED)
@pytest.mark.parametrize("change", ["rate", "channels"])
def test_change_inside_the_stream_fails(tmp_path: Path, kind: str, subtype: str | None, change: str) -> None:
    """A stream of another rate or channel count behind the first fails the file."""
    rate = 48_000 if change == "rate" else RATE
    signal = speech_like(2, rate)
    second = np.stack([signal, signal], axis=1) if change == "channels" else signal
    content = encoded(tmp_path, speech_like(2), kind=kind, subtype=subtype)
    content += encoded(tmp_path, second, rate, kind, subtype)
    assert f"the stream changes from {RATE} Hz, 1 channel(s), to {rate} Hz" in failure(saved(tmp_path, content))


def test_channel_change_between_flac_frames_fails(tmp_path: Path) -> None:
    """FLAC frames of another channel count, without a header of their own, fail the file."""
    signal = speech_like(2)
    stereo = encoded(tmp_path, np.stack([signal, signal], axis=1))
    frames = stereo.index(b"\xff\xf8", 42)
    assert "damaged" in failure(saved(tmp_path, flac_without_count(encoded(tmp_path, signal)) + stereo[frames:]))


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e30, "full scale")])
def test_impossible_samples_fail_with_their_time(tmp_path: Path, value: float, reason: str) -> None:
    """A sample that is not finite, or too large to normalise, is found before resampling spreads it."""
    signal = np.zeros((44_100, 2), np.float32)
    signal[22_050, 1] = value
    message = failure(saved(tmp_path, encoded(tmp_path, signal, 44_100, "WAV", "FLOAT")))
    assert "the sample at 0.50 s" in message
    assert reason in message
    with pytest.raises(AudioError, match=r"the sample at 0\.50 s"):
        from_array(signal, 44_100, RATE)


@pytest.mark.parametrize("rate", [0, 1, 999, 1_000_001, 4_000_000_000])
def test_rates_are_bounded(tmp_path: Path, rate: int) -> None:
    """Sample rates that no recording has fail the file, and the array."""
    assert "header" in failure(saved(tmp_path, wav_bytes(pcm16(speech_like(1)), rate=rate)))
    with pytest.raises(AudioError, match="sample rate"):
        from_array(np.zeros(100), rate, RATE)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"#!AMR\n" + bytes(100), "AMR"),
        (b"\x00\x00\x00\x20ftypM4A " + bytes(100), "M4A"),
        (b"OggS\x00\x02" + bytes(22) + b"\x7fFLAC\x01\x00" + bytes(60), "Ogg-FLAC"),
        (b"\x1a\x45\xdf\xa3" + bytes(100), "WebM/Matroska"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(100), "WMA/ASF"),
        (b"wvpk" + bytes(5) + b"\x04" + bytes(100), "WavPack"),
        (b"ID3\x04\0\0\0\0\0\x05title" + (b"\xff\xf1\x60\x40\x03\x9f\xfc" + bytes(21)) * 9, "AAC"),
    ],
)
def test_unsupported_formats_are_named(tmp_path: Path, monkeypatch, content: bytes, name: str) -> None:
    """What cannot be decoded is called by its name; without the extra with what reads it and what converts it."""
    for installed in {ffmpeg.installed(), False}:
        monkeypatch.setattr(ffmpeg, "installed", lambda installed=installed: installed)
        reason = failure(saved(tmp_path, content))
        assert reason.startswith("unsupported format")
        assert name in reason
        assert ("which cannot be decoded" in reason) == installed
        assert ("ffmpeg -i IN -ar 16000 -ac 1 OUT.wav" in reason) != installed
        assert ("pip install 'w2v-onnx[av]'" in reason) != installed


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"This is a note, no sound.\n", "text"),
        ("Überall Töne, nur nicht hier.\n".encode(), "text"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "HTML"),
        (b"PK\x03\x04" + bytes(100), "a ZIP archive; unpack it"),
        (gzip.compress(wav_bytes(bytes(100))), "a gzip archive; unpack it"),
        (bz2.compress(wav_bytes(bytes(100))), "a bzip2 archive; unpack it"),
        (lzma.compress(wav_bytes(bytes(100))), "an xz archive; unpack it"),
        (bytes(257).replace(b"\0", b"a") + b"ustar\0" + bytes(300), "a tar archive; unpack it"),
    ],
)
def test_what_is_no_recording_is_named(tmp_path: Path, content: bytes, name: str) -> None:
    """Text, pages and archives are called by their name; to convert them would be no help."""
    reason = failure(saved(tmp_path, content))
    assert reason.startswith("unsupported format")
    assert name in reason
    assert "ffmpeg" not in reason


@pytest.mark.parametrize("coding", ["pcm,embedded-shorten-v2.00", "ulaw,embedded-shorten-v1.1", "pcm,embedded-wavpack"])
def test_compressed_sphere_is_named_with_what_converts_it(tmp_path: Path, monkeypatch, coding: str) -> None:
    """As the LDC's older corpora have it; a SPHERE of plain samples is read."""
    monkeypatch.setattr(ffmpeg, "installed", lambda: False)
    fields = [
        "NIST_1A",
        "   1024",
        "sample_count -i 16000",
        "channel_count -i 1",
        "sample_rate -i 16000",
        "sample_n_bytes -i 2",
        "sample_byte_format -s2 01",
        f"sample_coding -s{len(coding)} {coding}",
        "end_head",
    ]
    header = "\n".join([*fields, ""]).encode().ljust(1024)
    reason = failure(saved(tmp_path, header + b"ajkg\x02" + bytes(5000)))
    assert reason == (
        "unsupported format: this looks like SPHERE compressed with shorten or the like; "
        "convert it with: sph2pipe -f wav IN OUT.wav"
    )
    plain = header.replace(f"-s{len(coding)} {coding}".encode(), b"-s3 pcm").ljust(1024)
    assert read_audio(saved(tmp_path, plain + pcm16(speech_like(1))), RATE).duration == 1


def test_unknown_bytes_are_unsupported(tmp_path: Path) -> None:
    """Bytes of no known format, and a WAV of an unknown codec, fail with the hint to convert."""
    for content in (bytes(range(1, 200)), wav_bytes(bytes(100), code=0x999)):
        reason = failure(saved(tmp_path, content))
        assert reason.startswith("unsupported format")
        assert "ffmpeg" in reason


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A FIFO, a socket, a device and a folder are refused at once, a link to a file is followed."""
    fifo, link, name = tmp_path / "fifo", tmp_path / "link", tmp_path / "socket"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(name))
        for path in (fifo, name, Path(os.devnull), tmp_path):
            assert failure(path).startswith("not a regular file")
            with pytest.raises(AudioError, match="not a regular file"):
                declared_seconds(path)
    (tmp_path / "real").write_bytes(wav_bytes(pcm16(speech_like(1))))
    link.symlink_to("real")
    assert read_audio(link, RATE).duration == 1


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    """A missing file, a link to itself and an impossible name fail as inputs."""
    (tmp_path / "loop").symlink_to("loop")
    assert "does not exist" in failure(tmp_path / "gone.wav")
    assert "cannot be opened" in failure(tmp_path / "loop")
    assert "cannot be opened" in failure("a\0b.wav")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every file")
def test_unreadable_file(tmp_path: Path) -> None:
    """A file without permission to read fails with the system's reason."""
    path = saved(tmp_path, wav_bytes(pcm16(speech_like(1))))
    path.chmod(0)
    assert "Permission denied" in failure(path)


def test_wav_beyond_its_size_field_fails(tmp_path: Path) -> None:
    """A WAV over 4 GB whose 32-bit size wrapped around is refused, not cut."""
    path = tmp_path / "long.wav"
    for declared in (5_000_000_000 % 2**32, 0xFFFF_FFFF):
        path.write_bytes(wav_bytes(b"", declared))
        os.truncate(path, 44 + 5_000_000_000)
        assert "5000000000 follow; write it as RF64" in failure(path)


def test_decoders_do_not_print(tmp_path: Path) -> None:
    """A damaged MP3, read on many threads, leaves nothing on standard error but what the program itself writes."""
    path = saved(tmp_path, holed(encoded(tmp_path, speech_like(10), kind="MP3")))
    script = """if True:
        import sys, threading
        from w2v_models.errors import AudioError
        from w2v_runtime.audio.reading import read_audio
        def read():
            for _ in range(5):
                try:
                    read_audio(sys.argv[1], 16000)
                except AudioError as error:
                    sys.stderr.write(str(error)[:7] + "\\n")
        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, env=environment, check=True
    )
    assert run.stderr.split() == ["damaged"] * 40
