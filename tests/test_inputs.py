"""What a run finds to embed: folders, lists, shards."""

from __future__ import annotations

import os
import shutil

import pytest
import soundfile

from conftest import speech
from w2v_models.errors import RefusedError
from w2v_runtime.inputs import Shard, check_list, list_inputs


def found(folder):
    """Inputs of a folder, named from it."""
    return [os.path.relpath(path, folder) for path in list_inputs([str(folder)])]


def test_a_folder_is_searched_in_name_order(tmp_path):
    """Files of a folder come before those of folders in it, each sorted by name; hidden files are left out."""
    for name in ("b/z.wav", "b/a/y.flac", "a/x.MP3", "c.ogg", "B.wav", "._c.ogg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert found(tmp_path) == ["B.wav", "c.ogg", "a/x.MP3", "b/z.wav", "b/a/y.flac"]


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "FLAC", "OGG", "AIFF", "AU", "CAF", "MP3"])
def test_audio_without_a_suffix_is_found_by_content(tmp_path, kind):
    """The first bytes tell audio, whatever the name."""
    if kind == "MP3":
        # An ID3 tag of no length, as tagged MP3 files begin; bare MPEG frames are too easily seen in other files.
        soundfile.write(tmp_path / "bare.mp3", speech(0.5), 16000)
        (tmp_path / "take 1").write_bytes(b"ID3\x04" + bytes(6) + (tmp_path / "bare.mp3").read_bytes())
        (tmp_path / "bare.mp3").unlink()
    else:
        soundfile.write(tmp_path / "take 1", speech(0.5), 16000, format=kind)
    assert found(tmp_path) == ["take 1"]


@pytest.mark.parametrize(
    "content",
    [b"", b"RIFF\x24\x00\x00\x00WEBPVP8 ", b"RIFF\x24\x00\x00\x00AVI LIST", b"FORM\x00\x00\x00\x24ILBM", b"hello"],
)
def test_what_is_no_audio_is_skipped(tmp_path, content):
    """Pictures, films and text in a folder are no inputs; neither are pipes."""
    (tmp_path / "file").write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    assert found(tmp_path) == []


def test_links_to_folders_are_followed_once(tmp_path):
    """A link to a folder above ends, and a folder linked twice is searched once; a link to nowhere is an input."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.wav").touch()
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "b").symlink_to("a")
    (tmp_path / "in" / "self").symlink_to("self")
    (tmp_path / "in" / "gone.wav").symlink_to("nowhere")
    assert found(tmp_path / "in") == ["gone.wav", "a/x.wav"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_an_unreadable_folder_is_an_input_that_fails(tmp_path):
    """It is handed on, so that reading it fails with the reason, and the others are found."""
    (tmp_path / "a").mkdir(mode=0)
    (tmp_path / "x.wav").touch()
    assert found(tmp_path) == ["x.wav", "a"]


def test_a_folder_that_vanishes_is_an_input_that_fails(tmp_path):
    """Likewise a folder that is gone when its turn comes."""
    for name in ("a/x.wav", "b/y.wav"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    inputs = list_inputs([str(tmp_path)])
    first = next(inputs)
    shutil.rmtree(tmp_path / "b")
    assert [first, *inputs] == [str(tmp_path / "a" / "x.wav"), str(tmp_path / "b")]


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


@pytest.mark.parametrize("count", [1, 3, 7, 30])
def test_shards_part_the_inputs(count):
    """Every input is in just one shard, and shards differ by at most one in size."""
    shards = [Shard(index, count) for index in range(1, count + 1)]
    assert all(sum(shard.holds(position) for shard in shards) == 1 for position in range(20))
    sizes = [sum(shard.holds(position) for position in range(20)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "/3", "1/", "-1/3", "1/0", "a/b", "1/3/5", "1.0/3", ""])
def test_a_shard_that_is_none_is_refused(text):
    """I and N are whole numbers with 1 ≤ I ≤ N."""
    with pytest.raises(RefusedError, match="I/N"):
        Shard.of(text)
