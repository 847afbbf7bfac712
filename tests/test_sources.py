"""What audio is read from: paths, bytes, open files of any kind; and what is refused, with the right call."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audio_files import RATE, encoded, failure, pcm16, speech_like, wav_bytes
from w2v_models.errors import AudioError
from w2v_runtime.audio.reading import declared_seconds, open_audio, read_audio
from w2v_runtime.audio.source import spooled

SIGNAL = speech_like(2)
WAV = wav_bytes(pcm16(SIGNAL))


@contextlib.contextmanager
def opened(kind: str, content: bytes, folder: Path) -> Iterator[Any]:
    """A source of ``content``, of one kind."""
    path = folder / "a.wav"
    path.write_bytes(content)
    with contextlib.ExitStack() as stack:
        if kind in ("bytes", "bytearray"):
            yield {"bytes": bytes, "bytearray": bytearray}[kind](content)
        elif kind == "memoryview":
            yield memoryview(b"x".join(content[i : i + 1] for i in range(len(content))))[::2]  # with gaps
        elif kind == "file":
            yield stack.enter_context(path.open("rb"))
        elif kind == "file without a buffer":
            yield stack.enter_context(path.open("rb", buffering=0))
        elif kind == "file that stands behind something":
            path.write_bytes(b"something" + content)
            file = stack.enter_context(path.open("rb"))
            file.read(9)
            yield file
        elif kind == "file open for writing too":
            file = stack.enter_context((folder / "b.wav").open("w+b"))
            file.write(content)
            file.seek(0)
            yield file
        elif kind == "BytesIO":
            yield io.BytesIO(content)
        elif kind == "gzip":
            (folder / "a.gz").write_bytes(gzip.compress(content))
            yield stack.enter_context(gzip.open(folder / "a.gz"))
        elif kind == "zip":
            with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(path, "a.wav")
            yield stack.enter_context(zipfile.ZipFile(folder / "a.zip").open("a.wav"))
        elif kind == "tar":
            with tarfile.open(folder / "a.tar", "w") as archive:
                archive.add(path)
            yield stack.enter_context(tarfile.open(folder / "a.tar")).extractfile(str(path)[1:])
        else:
            yield str(path)


KINDS = [
    *("path", "bytes", "bytearray", "memoryview", "file", "file without a buffer", "file that stands behind something"),
    *("file open for writing too", "BytesIO", "gzip", "zip", "tar"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_recording_again_and_again(tmp_path: Path, kind: str) -> None:
    """A second reading gives what the first gave, and an open file stands where it stood."""
    descriptors = len(os.listdir("/proc/self/fd"))
    with opened(kind, WAV, tmp_path) as source:
        place = source.tell() if hasattr(source, "tell") else None
        held = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            audio = read_audio(source, RATE)
            assert audio.duration == 2
            np.testing.assert_allclose(audio.samples, SIGNAL, rtol=0, atol=1e-4)
            assert place is None or source.tell() == place
        with open_audio(source, RATE) as stream:
            np.testing.assert_array_equal(np.concatenate(list(stream)), audio.samples)
        assert declared_seconds(source) == 2
        assert len(os.listdir("/proc/self/fd")) == held
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1  # archives keep their own file open


def test_an_open_file_is_not_copied(tmp_path: Path) -> None:
    """A plain file at its beginning is opened anew, so that what is written to it meanwhile is noticed."""
    (tmp_path / "a.wav").write_bytes(WAV)
    with (tmp_path / "a.wav").open("rb") as file, open_audio(file, RATE) as stream:
        with (tmp_path / "a.wav").open("ab") as other:
            other.write(bytes(100))
        with pytest.raises(AudioError, match="written to while it was read"):
            list(stream)


def test_a_stream_is_read_once(tmp_path: Path) -> None:
    """A pipe gives its recording, and the second time says why there is none."""
    (tmp_path / "a.wav").write_bytes(WAV)
    with subprocess.Popen(["cat", tmp_path / "a.wav"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        np.testing.assert_allclose(read_audio(process.stdout, RATE).samples, SIGNAL, rtol=0, atol=1e-4)
        with pytest.raises(AudioError, match=r"no samples: nothing is left to read.*give file\.read\(\)"):
            read_audio(process.stdout, RATE)


def test_a_spooled_stream_is_read_again_and_again(tmp_path: Path) -> None:
    """What ``spooled`` makes of a pipe is a file that can be read twice, and is gone when it is closed."""
    (tmp_path / "a.wav").write_bytes(WAV)
    descriptors = len(os.listdir("/proc/self/fd"))
    with subprocess.Popen(["cat", tmp_path / "a.wav"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with spooled(process.stdout) as file:
            for _ in range(2):
                np.testing.assert_allclose(read_audio(file, RATE).samples, SIGNAL, rtol=0, atol=1e-4)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_formats_are_told_by_content_alone(tmp_path: Path) -> None:
    """Bytes have no name, and need none."""
    for kind in ("FLAC", "OGG", "MP3"):
        assert read_audio(encoded(tmp_path, SIGNAL, kind=kind), RATE).duration == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (0, "not int"),
        (None, "not NoneType"),
        (["a.wav"], "not list"),
        ({"path": "a.wav"}, "not dict"),
        (np.zeros(10), r"not ndarray; a waveform goes with its rate: \(waveform, sample_rate\)"),
        (io.StringIO("RIFF"), r"text mode cannot be read as audio; open it as open\(path, 'rb'\)"),
    ],
)
def test_what_is_no_source_is_refused_with_the_right_call(source: Any, says: str) -> None:
    """A number, a list or a file in text mode is a mistake in the program, not in a recording."""
    with pytest.raises(TypeError, match=says):
        read_audio(source, RATE)


def test_a_file_in_text_mode_is_refused(tmp_path: Path) -> None:
    """Also one whose bytes are no text, and one that does not say that it is text."""
    (tmp_path / "a.wav").write_bytes(WAV)
    with (tmp_path / "a.wav").open(encoding="utf-8") as file, pytest.raises(TypeError, match="text mode"):
        read_audio(file, RATE)  # type: ignore[arg-type]

    class Text:
        def read(self, size: int) -> str:
            return "RIFF"

    with pytest.raises(TypeError, match="text mode"):
        read_audio(Text(), RATE)  # type: ignore[arg-type]


def test_open_files_that_cannot_be_read_fail_as_recordings(tmp_path: Path) -> None:
    """Closed, open for writing only, at its end, empty, a device: each with its reason."""
    path = tmp_path / "a.wav"
    path.write_bytes(WAV)
    closed = path.open("rb")
    closed.close()
    assert "the file is closed" in failure(closed)
    with (tmp_path / "new").open("wb") as file:
        assert "cannot be read" in failure(file)
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        assert failure(file) == (
            "no samples: the file is empty, or stands at its end; file.seek(0) goes back to its beginning."
        )
    assert failure(b"") == "no samples: the file is empty."
    assert failure(io.BytesIO()).startswith("no samples: the file is empty")
    with Path("/dev/zero").open("rb") as file:
        assert failure(file).startswith("not a regular file")


def test_errors_of_any_library_fail_as_recordings(tmp_path: Path) -> None:
    """A cut gzip and a damaged ZIP say what their own readers say."""
    with gzip.open(io.BytesIO(gzip.compress(WAV)[:-2000])) as file:
        assert failure(file).startswith("cannot be read (Compressed file ended before")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.wav", WAV)
    damaged = bytearray(content.getvalue())
    damaged[1000] ^= 0xFF
    with zipfile.ZipFile(io.BytesIO(damaged)).open("a.wav") as file:
        assert "Bad CRC-32" in failure(file)


def test_two_readers_of_one_open_file_are_noticed() -> None:
    """Each would get a part of it; neither is taken for the whole."""

    class Shared(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            content = super().read(100)
            super().read(100)  # another thread's
            return content

    assert failure(Shared(WAV)).startswith("something else read the open file at the same time")


def test_no_room_for_a_copy_fails_the_recording(tmp_path: Path) -> None:
    """Where the temporary folder has no room, the reason names it."""
    script = """if True:
        import io, resource, sys
        from w2v_runtime.audio.reading import read_audio
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        for source in (io.BytesIO(bytes(1 << 20)), bytes(1 << 20)):
            try:
                read_audio(source, 16000)
            except ValueError as error:
                print(error)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith(f"cannot be copied to {tmp_path} (File too large); make room")
    assert second.startswith("cannot be copied to memory (File too large)")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("https://example.org/a.wav", "a URL, and URLs are not fetched; download it and name the file."),
        ("s3://bucket/a b.wav", "a URL, and URLs are not fetched; download it and name the file."),
        ("HTTP://example.org/" + "a" * 300, "a URL, and URLs are not fetched; download it and name the file."),
        ("file:///data/a%20b.wav", "a URL; name the path alone: /data/a b.wav"),
        ("file://localhost/data/a.wav", "a URL; name the path alone: /data/a.wav"),
        ("nothing/*.wav", "does not exist: the shell found no match for this pattern"),
        ("a?.wav", "does not exist: the shell found no match for this pattern"),
        ("a[0-9].wav", "does not exist: the shell found no match for this pattern"),
        ("gone.wav", "does not exist, or no longer; check the path."),
        ("C:/gone.wav", "does not exist, or no longer; check the path."),
    ],
)
def test_a_path_that_is_none_says_what_it_is(path: str, says: str) -> None:
    """URLs and patterns that no shell expanded are told from names of files that are gone."""
    assert failure(path).startswith(says)


def test_a_folder_is_no_recording(tmp_path: Path) -> None:
    """As a line of a list, or in Python; as an input of the command it is searched."""
    assert failure(tmp_path) == "not a regular file, but a folder; name it as an input of its own to search it."


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path: Path) -> None:
    """Brackets and stars are allowed in names."""
    (tmp_path / "a[0]*.wav").write_bytes(WAV)
    assert read_audio(tmp_path / "a[0]*.wav", RATE).duration == 2
