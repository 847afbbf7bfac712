"""What a run finds to embed: folders, lists, shards."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
import soundfile

import commands
from audio_files import failure
from conftest import speech
from test_terminal import on_terminal
from w2v_models.errors import RefusedError
from w2v_runtime.audio import formats
from w2v_runtime.runs.inputs import Listing, Shard, list_inputs


def found(folder):
    """Inputs of a folder, named from it."""
    return [os.path.relpath(path, folder) for path in list_inputs([str(folder)])]


def test_a_folder_is_searched_in_name_order(tmp_path):
    """Files of a folder come before those of folders in it, each sorted by name; hidden files are left out."""
    for name in ("b/z.wav", "b/a/y.flac", "a/x.MP3", "c.ogg", "B.wav", "._c.ogg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert found(tmp_path) == ["B.wav", "c.ogg", "a/x.MP3", "b/z.wav", "b/a/y.flac"]


#: Formats of libsndfile that nothing in the first bytes tells, or that it cannot read back.
UNTOLD = {"RAW", "SD2", "HTK", "MPC2K"}


@pytest.mark.parametrize("kind", sorted(set(soundfile.available_formats()) - UNTOLD))
def test_audio_without_a_suffix_is_found_by_content(tmp_path, kind):
    """The first bytes tell audio, whatever the name."""
    soundfile.write(tmp_path / "take 1", speech(0.5), 16000, "ALAW" if kind == "WVE" else None, format=kind)
    assert found(tmp_path) == ["take 1"]


#: Of what libsndfile reads (``soundfile.available_formats``), and of what it does not.
READ = "aif aiff aifc au snd avr caf flac htk svx mpc mp3 mp2 ogg oga opus paf pvf rf64 sds sf voc w64 wav sph wve xi"
NOT_READ = "sd2 webm mp4 mov 3gp wma mka mkv wv m4a aac amr ape tta spx avi ac3"


def test_every_suffix_of_a_recording_is_found(tmp_path):
    """By name alone: what cannot be read is to fail by name, not to be passed over."""
    names = sorted(f"a.{suffix}".upper() for suffix in f"{READ} {NOT_READ}".split())
    for name in names:
        (tmp_path / name).write_bytes(b"nothing to see")
    assert found(tmp_path) == names


@pytest.mark.parametrize("bitrate", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_an_mp3_without_suffix_or_tag_is_found(tmp_path, rate, bitrate):
    """Frames that follow one another tell it, of any rate and size; also a short one."""
    for name, seconds in (("long", 5), ("short", 0.3)):
        path = tmp_path / name
        soundfile.write(path, speech(seconds, rate), rate, format="MP3", compression_level=bitrate)
    assert found(tmp_path) == ["long", "short"]


def test_what_only_looks_like_frames_is_no_mp3(tmp_path):
    """Sync words, a single frame, pictures, text of two bytes a letter, bytes of any kind."""
    frame = b"\xff\xfb\x90\x64" + bytes(413)
    random = np.random.default_rng(0)
    contents = [b"\xff\xfb" * 5000, frame, frame + bytes(5000), frame + frame + bytes(5000), b"\xff" * 9000]
    contents += ["Notizen".encode("utf-16") * 500, b"\xff\xd8\xff\xe0\0\x10JFIF" + random.bytes(9000)]
    contents += [b"\xff\xfb" + random.bytes(9000) for _ in range(200)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.bin").write_bytes(content)
    assert found(tmp_path) == []


def test_pictures_in_a_container_of_films_are_skipped(tmp_path):
    """HEIC and AVIF begin as MP4 does; an MP4 of any name is found."""
    for brand in (b"heic", b"mif1", b"avif"):
        (tmp_path / f"{brand.decode()}").write_bytes(b"\0\0\0\x20ftyp" + brand + bytes(100))
    (tmp_path / "clip").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    assert found(tmp_path) == ["clip"]


def test_hidden_folders_are_not_searched(tmp_path):
    """Neither what is in them nor a hidden file is found, or passed over; named as an input a hidden folder is."""
    for name in (".git/annex/objects/a.wav", ".snapshot/a.wav", "a/.cache/x.wav", "a/.x.wav", "a/.notes", "a/b.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    passed = []
    assert list(list_inputs([str(tmp_path)], pass_over=passed.append)) == [str(tmp_path / "a" / "b.wav")]
    assert passed == []
    assert found(tmp_path / ".snapshot") == ["a.wav"]
    assert found(tmp_path / ".git") == ["annex/objects/a.wav"]


def test_what_is_passed_over_is_told(tmp_path):
    """Every file of a searched folder that is no input, once; archives and pages by their name."""
    for name in ("a.wav", "b/notes.txt", "b/a.wav.gz", "page.html", "empty", "take 1.TextGrid"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe")
    passed = []
    assert list(list_inputs([str(tmp_path)], pass_over=passed.append)) == [str(tmp_path / "a.wav")]
    assert sorted(os.path.relpath(path, tmp_path) for path in passed) == sorted(
        ["b/notes.txt", "b/a.wav.gz", "page.html", "empty", "take 1.TextGrid", "pipe"]
    )


def test_no_suffix_stands_in_two_rows_of_the_table():
    """So that a name means one format."""
    suffixes = [suffix for row in formats.FORMATS for suffix in row.suffixes.split()]
    assert len(suffixes) == len(set(suffixes))
    assert all(formats.by_name("x" + suffix.upper()) is not None for suffix in suffixes)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_listing_is_used_while_it_grows(ahead):
    """An input can be used before the next one is found, and the total is known once the last one is."""
    go_on = threading.Semaphore(0)

    def slowly():
        for number in range(3):
            go_on.acquire()
            yield str(number)

    listing = Listing(slowly(), ahead)
    used = iter(listing)
    for number in range(3):
        go_on.release()
        assert next(used) == str(number)
    assert next(used, None) is None
    assert listing.total() == 3


@pytest.mark.parametrize("ahead", [True, False])
def test_a_listing_that_fails_or_is_left_has_no_total(ahead):
    """What the search raises is raised where its inputs are used; whoever waits for the total is told that it ends."""

    def broken():
        yield "a"
        raise RefusedError("the list x cannot be read")

    listing = Listing(broken(), ahead)
    used = iter(listing)
    assert next(used) == "a"
    with pytest.raises(RefusedError, match="the list x"):
        next(used)
    assert listing.total() is None
    left = Listing(iter("abc"), ahead=False)
    used = iter(left)
    assert next(used) == "a"
    used.close()
    assert left.total() is None


def test_a_listing_runs_ahead():
    """On its thread, however slowly its inputs are used."""
    listing = Listing(map(str, range(1000)))
    used = iter(listing)
    assert next(used) == "0"
    assert listing.total() == 1000
    assert list(used) == [str(number) for number in range(1, 1000)]


@pytest.mark.parametrize(
    "content",
    [b"", b"RIFF\x24\x00\x00\x00WEBPVP8 ", b"FORM\x00\x00\x00\x24ILBM", b"hello"],
)
def test_what_is_no_audio_is_skipped(tmp_path, content):
    """Pictures and text in a folder are no inputs; neither are pipes."""
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
    assert failure(tmp_path / "a").startswith("cannot be opened (Permission denied)")


def test_a_folder_that_vanishes_is_an_input_that_fails(tmp_path):
    """Likewise a folder that is gone when its turn comes."""
    for name in ("a/x.wav", "b/y.wav"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    inputs = list_inputs([str(tmp_path)])
    first = next(inputs)
    shutil.rmtree(tmp_path / "b")
    assert [first, *inputs] == [str(tmp_path / "a" / "x.wav"), str(tmp_path / "b")]


@pytest.mark.parametrize("count", [1, 3, 7, 30])
def test_shards_part_the_inputs(count):
    """Every input is in just one shard, and shards differ by at most one in size."""
    shards = [Shard(index, count) for index in range(1, count + 1)]
    assert all(sum(shard.holds(position) for shard in shards) == 1 for position in range(20))
    sizes = [sum(shard.holds(position) for position in range(20)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == [shard.size(20) for shard in shards]


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "/3", "1/", "-1/3", "1/0", "a/b", "1/3/5", "1.0/3", ""])
def test_a_shard_that_is_none_is_refused(text):
    """I and N are whole numbers with 1 ≤ I ≤ N."""
    with pytest.raises(RefusedError, match="I/N"):
        Shard.of(text)


#: Writes each path below a folder that Python opens to a file.
OPENINGS = """
import os, sys
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def hook(event, arguments):
    if event == "open" and str(arguments[0]).startswith({folder!r}):
        os.write(log, str(arguments[0]).encode() + b"\\n")
sys.addaudithook(hook)
"""


def test_a_searched_folder_is_listed_once(bundles, recordings, tmp_path):
    """Other files are opened once, though a terminal shows how many inputs there are; the summary counts them."""
    for number in range(30):
        (recordings / f"notes {number}").write_text("a note")
    (recordings / "old.zip").write_bytes(b"PK")
    before = OPENINGS.format(log=str(tmp_path / "log"), folder=str(recordings))
    arguments = (recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz")
    code, shown = on_terminal(*arguments, before=before)
    assert code == 0, shown
    assert "5/5" in shown
    assert re.search(r"5 files embedded, .*, 31 other files passed over → ", shown.splitlines()[-1])
    openings = Counter((tmp_path / "log").read_text().splitlines())
    assert {path: openings[path] for path in openings if "notes" in path} == {
        str(recordings / f"notes {number}"): 1 for number in range(30)
    }
    assert not openings[str(recordings / "old.zip")]


def test_the_summary_is_silent_where_nothing_was_passed_over(bundles, recordings, tmp_path):
    """And one other file is one."""
    arguments = (recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz")
    assert "passed over" not in commands.embed(*arguments)[1]
    (recordings / "notes").touch()
    code, said = commands.embed(*arguments, "--resume")
    assert code == 0
    assert "5 files were finished already, 1 other file passed over → " in said


def test_a_folder_without_recordings_is_refused_with_what_is_in_it(bundles, tmp_path):
    """Files that are none are counted in the refusal."""
    (tmp_path / "in").mkdir()
    for name in ("notes.txt", "page.html", ".hidden.wav"):
        (tmp_path / "in" / name).touch()
    code, said = commands.embed(tmp_path / "in", "-m", bundles("base"), "-o", tmp_path / "out.npz")
    assert code == 2
    assert f"no audio was found in {tmp_path / 'in'}; name recordings" in said
    assert said.endswith("(2 other files passed over).\n")


def test_foreign_formats_in_a_folder_fail_by_name(bundles, recordings, tmp_path):
    """What is a recording and cannot be decoded is not left out in silence."""
    (recordings / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    (recordings / "clip").write_bytes(b"\x1a\x45\xdf\xa3" + bytes(100))
    code, said = commands.embed(recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz")
    assert code == 3
    assert f"failed: {recordings}/clip.mp4: unsupported format: this looks like M4A/MP4 (AAC or ALAC)" in said
    assert f"failed: {recordings}/clip: unsupported format: this looks like WebM/Matroska" in said
    assert "5 files embedded" in said
