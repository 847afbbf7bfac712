"""``-`` among the inputs: one recording on standard input, embedded as the same recording in a file would be."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from commands import embed, results, start
from conftest import speech


def embed_piped(content: bytes, *arguments: object, before: str = "") -> tuple[int, bytes, bytes]:
    """Run the command with bytes on standard input: exit code, standard output and standard error."""
    process = start(*arguments, before=before, stdin=subprocess.PIPE)
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.reconfigure(errors="surrogateescape")
    output, errors = process.communicate(content.decode(errors="surrogateescape"), timeout=120)
    return process.returncode, output.encode(errors="surrogateescape"), errors.encode()


@pytest.mark.parametrize("seconds", [2.3, 47.0])
def test_a_piped_recording_is_embedded_as_the_file(bundles, tmp_path, seconds):
    """Short, and so long that it goes through windows in two passes; alone and beside files, in its place."""
    soundfile.write(tmp_path / "a.wav", speech(seconds), 16000)
    soundfile.write(tmp_path / "b.wav", speech(0.7, seed=1), 16000)
    content = (tmp_path / "a.wav").read_bytes()
    arguments = ("-m", bundles("large"), "-o")
    assert embed(tmp_path / "a.wav", tmp_path / "b.wav", *arguments, tmp_path / "files.npz")[0] == 0
    _, expected = results(tmp_path / "files.npz")
    code, _, errors = embed_piped(content, "-", tmp_path / "b.wav", *arguments, tmp_path / "out.npz")
    assert code == 0, errors
    names, values = results(tmp_path / "out.npz")
    assert names == ["-", "b.wav"]
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)
    code, lines, errors = embed_piped(content, "-", *arguments, "-")
    assert code == 0, errors
    (line,) = map(json.loads, lines.splitlines())
    assert (line["file"], round(line["duration"], 6)) == ("-", seconds)
    np.testing.assert_allclose(line["embedding"], expected[0], rtol=0, atol=1e-5)


def test_a_piped_recording_is_resumed_by_its_content(bundles, recordings, tmp_path):
    """The same recording again is finished already; another one is embedded in its place."""
    arguments = ("-", "-m", bundles("large"), "-o", tmp_path / "out.npz", "--resume")
    first, second = ((recordings / name).read_bytes() for name in ("a.wav", "d.wav"))
    assert embed_piped(first, *arguments)[0] == 0
    code, _, errors = embed_piped(first, *arguments)
    assert code == 0
    assert b"nothing to do: 1 file was finished already" in errors
    code, _, errors = embed_piped(second, *arguments)
    assert code == 0
    assert b"1 file embedded" in errors
    assert embed(recordings / "d.wav", "-m", bundles("large"), "-o", tmp_path / "file.npz")[0] == 0
    np.testing.assert_allclose(results(tmp_path / "out.npz")[1], results(tmp_path / "file.npz")[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"this is no recording\n", b"RIFF"])
def test_what_is_no_recording_fails_alone(bundles, recordings, tmp_path, content):
    """An empty pipe and text are failures of the input ``-``; the others are embedded."""
    output = tmp_path / "out.npz"
    code, _, errors = embed_piped(content, "-", recordings / "a.wav", "-m", bundles("large"), "-o", output)
    assert code == 3, errors
    (failure,) = map(json.loads, (tmp_path / "out.npz.failures.jsonl").read_text().splitlines())
    assert (failure["path"], failure["stage"]) == ("-", "read")
    assert results(output)[0] == ["a.wav"]


def test_standard_input_is_named_once(bundles, tmp_path):
    """It can be read once: as a recording, or as a list."""
    for words in (("-", "-"), ("-", "--files-from", "-")):
        code, errors = embed(*words, "-m", bundles("large"), "-o", tmp_path / "out.npz")
        assert code == 2
        assert "standard input, -, is named twice" in errors


def test_a_file_called_dash_is_a_file_in_lists_and_folders(bundles, recordings, tmp_path, monkeypatch):
    """Only the argument ``-`` is standard input."""
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes((recordings / "a.wav").read_bytes())
    Path("list").write_text("-\n")
    code, errors = embed("--files-from", "list", "-m", bundles("large"), "-o", "out.npz")
    assert code == 0, errors
    with np.load("out.npz") as stored:
        assert stored["paths"].tolist() == ["./-"]
