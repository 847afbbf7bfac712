"""Lists of paths as programs of all systems write them, and what is no list."""

from __future__ import annotations

import codecs
import io
import os
import subprocess
import sys

import pytest
import soundfile

import commands
from conftest import speech
from w2v_models.errors import RefusedError
from w2v_runtime.runs.inputs import list_inputs
from w2v_runtime.runs.lists import check_list, read_list

NAMES = ["a.wav", "two words.wav", "höre.wav", "-dash.wav"]


def read(folder, content, null=False):
    """The paths of a list with this content."""
    (folder / "list").write_bytes(content)
    return list(read_list(str(folder / "list"), null))


def refusal(folder, content, null=False):
    """Why a list with this content is refused, before any path of it is known."""
    (folder / "list").write_bytes(content)
    with pytest.raises(RefusedError) as raised:
        next(read_list(str(folder / "list"), null))
    assert str(raised.value).startswith(f"the list {folder / 'list'} ")
    return str(raised.value)


@pytest.mark.parametrize(("separator", "null"), [(b"\n", False), (b"\0", True)])
def test_lists_hold_names_of_any_bytes(tmp_path, separator, null):
    """Names come back byte by byte, across the blocks in which a list is read; empty lines are skipped."""
    names = [b"-dash.wav", b"a b.wav", b"\xff\xfe.wav", "ü.wav".encode(), b"x" * 70_000, b"last.wav"]
    names += [b"line\nbreak.wav"] if null else [b"nul"]
    for end in (b"", separator, separator * 2):
        (tmp_path / "list").write_bytes(separator + separator.join(names) + end)
        read = list_inputs(["first.wav"], str(tmp_path / "list"), null)
        assert [os.fsencode(name) for name in read] == [b"first.wav", *names]


def test_a_list_that_cannot_be_read_is_refused(tmp_path):
    """Missing, or a folder; a pipe is not opened to see."""
    with pytest.raises(RefusedError, match="no such file"):
        check_list(str(tmp_path / "missing"))
    with pytest.raises(RefusedError, match="folder"):
        check_list(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    check_list(str(tmp_path / "pipe"))
    check_list("-")


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_other_systems_are_read(tmp_path, bom, end):
    """CR LF ends a line as LF does, the last one too, and a mark of UTF-8 belongs to no name."""
    text = end + end.join(NAMES) + end
    for content in (text, text.rstrip()):
        assert read(tmp_path, bom + content.encode()) == NAMES


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_list_of_powershell_is_read(tmp_path, encoding):
    """UTF-16 of either order, told by its mark, also where a block ends within a letter."""
    mark = "" if encoding == "utf-16" else "\ufeff"
    names = [*NAMES, *(f"{'x' * 99}{number}𝄞.wav" for number in range(700))]
    assert read(tmp_path, (mark + "\r\n".join([*names, ""])).encode(encoding)) == names


def test_a_name_that_ends_in_cr_needs_nul(tmp_path):
    """Then it is kept, as is every other byte."""
    assert read(tmp_path, b"a.wav\r\0\xef\xbb\xbfb.wav\0c\nd.wav", null=True) == ["a.wav\r", "\ufeffb.wav", "c\nd.wav"]


@pytest.mark.parametrize("content", [b"a.wav\0b.wav\0", "a.wav\r\nb.wav".encode("utf-16-le"), b"a.wav\n\0"])
def test_nul_without_null_is_refused_with_both_ways_out(tmp_path, content):
    """Whether ``find -print0`` wrote it or it is UTF-16 without a mark."""
    said = refusal(tmp_path, content)
    assert "holds NUL bytes; give --null if they separate its paths" in said
    assert "else save it as UTF-8" in said


def test_lines_with_null_are_refused(tmp_path):
    """Else all of them would be one path; a single one without an end is what it is."""
    assert refusal(tmp_path, b"a.wav\nb.wav\n", null=True).endswith("has its paths in lines; leave --null out.")
    assert refusal(tmp_path, "a.wav\r\nb.wav".encode("utf-16"), null=True).endswith("leave --null out.")
    assert read(tmp_path, b"a.wav", null=True) == ["a.wav"]
    assert read(tmp_path, b"", null=True) == []


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("WAV", "it looks like WAV; name it as an input to embed it."),
        ("FLAC", "it looks like FLAC; name it as an input to embed it."),
        ("MP3", "it looks like MP3; name it as an input to embed it."),
        ("OGG", "it looks like Ogg; name it as an input to embed it."),
        ("PK", "it looks like a ZIP archive; unpack it and name the recordings in it."),
    ],
)
def test_a_recording_is_no_list(tmp_path, kind, says, null):
    """It is called by its name."""
    file = io.BytesIO(b"PK\3\4" + bytes(range(256)) * 9)
    if kind != "PK":
        soundfile.write(file, speech(1), 16_000, format=kind)
    assert refusal(tmp_path, file.getvalue(), null).endswith(f"is no list of paths, {says}")


def test_what_begins_as_utf16_and_is_not_is_refused(tmp_path):
    """Half a pair of surrogates, or half a letter at the end."""
    assert refusal(tmp_path, codecs.BOM_UTF16_LE + b"\0\xd8a\0").endswith("save it as UTF-8.")
    with pytest.raises(RefusedError, match="begins as UTF-16"):
        read(tmp_path, codecs.BOM_UTF16_LE + b"a\0\n\0b")


def test_a_list_from_a_pipe_is_used_as_it_comes(tmp_path):
    """A path is known when its line is written, not when the pipe has 64 KiB or ends."""
    script = "from w2v_runtime.runs.lists import read_list\nfor path in read_list('-'): print(path, flush=True)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        for name in NAMES:
            process.stdin.write(name.encode() + b"\r\n")
            process.stdin.flush()
            assert process.stdout.readline() == name.encode() + b"\n"
        process.stdin.close()
        assert process.stdout.read() == b""


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b"a.wav\0b.wav\0", [], "give --null"),
        (b"a.wav\nb.wav\n", ["--null"], "leave --null out"),
        (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0", [], "it looks like WAV"),
    ],
)
def test_a_list_that_is_none_ends_the_command_before_any_work(bundles, tmp_path, content, options, says):
    """Exit 2, and nothing is left where the output would be."""
    (tmp_path / "list").write_bytes(content)
    arguments = ("--files-from", tmp_path / "list", "-m", bundles("base"), "-o", tmp_path / "out.npz")
    code, said = commands.embed(*arguments, *options)
    assert (code, said.count("\n")) == (2, 1)
    assert says in said
    assert [path.name for path in tmp_path.iterdir()] == ["list"]


def test_names_from_other_systems_are_embedded(bundles, recordings, tmp_path):
    """A list with CR LF, a mark of UTF-8, URLs and patterns: what is there is embedded, the rest fails by its kind."""
    names = [str(recordings / "a.wav"), "https://example.org/b.wav", str(recordings / "*.flac"), ""]
    (tmp_path / "list").write_bytes(codecs.BOM_UTF8 + "\r\n".join(names).encode())
    arguments = ("--files-from", tmp_path / "list", "-m", bundles("base"), "-o", tmp_path / "out.npz")
    code, said = commands.embed(*arguments)
    assert code == 3
    assert "failed: https://example.org/b.wav: a URL, and URLs are not fetched" in said
    assert f"failed: {recordings}/*.flac: does not exist: the shell found no match" in said
    assert commands.results(tmp_path / "out.npz")[0] == ["a.wav"]
