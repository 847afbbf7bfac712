"""Where a bundle is put: never over a stranger's file, never half, and never nowhere, however its process ends."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from placings import assert_whole, place, tree, write
from w2v_models import Bundle, BundleError, OutputError, W2VError
from w2v_runtime.bundles import library, placing
from w2v_runtime.bundles.placing import placed
from w2v_runtime.files import exchange


@pytest.fixture
def old(bundles, tmp_path) -> Path:
    """A bundle that may be replaced."""
    return Path(shutil.copytree(bundles("base"), tmp_path / "place" / "bundle"))


def edit_manifest(folder: Path, **fields: object) -> None:
    data = json.loads((folder / "manifest.json").read_text()) | fields
    (folder / "manifest.json").write_text(json.dumps(data))


STRANGERS = {
    "notes.txt": lambda folder: write(folder / "notes.txt"),
    "onnx/notes.txt": lambda folder: write(folder / "onnx" / "notes.txt"),
    "app/src/thesis.txt": lambda folder: write(folder / "app" / "src" / "thesis.txt"),
    ".git/HEAD": lambda folder: subprocess.run(["git", "init", "-q", folder], check=True),
    "empty": lambda folder: (folder / "empty").mkdir(),
    "link": lambda folder: (folder / "link").symlink_to("/etc"),
    "onnx/model.onnx": lambda folder: ((folder / "onnx/model.onnx").unlink(), os.mkfifo(folder / "onnx/model.onnx")),
    "onnx/model.onnx_data/mine": lambda folder: (
        (folder / "onnx/model.onnx_data").unlink(),
        write(folder / "onnx" / "model.onnx_data" / "mine"),
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_bundle_with_a_strangers_file_is_not_replaced(bundles, old, name):
    """The first file that the manifest does not list is named, before any work, and everything stays."""
    STRANGERS[name](old)
    before = tree(old)
    with pytest.raises(OutputError, match=f"bundle holds {name if name != '.git/HEAD' else '.git/'}"):
        placing.check(old, overwrite=True)
    with pytest.raises(OutputError, match="which is no file of its bundle, so it is not replaced"), placed(old, True):
        pytest.fail("work was begun")
    assert tree(old) == before
    assert tree(old.parent) == sorted(["bundle", *(f"bundle/{path}" for path in before)])


@pytest.mark.parametrize(
    "manifest",
    [
        '{"name": "a browser extension", "manifest_version": 3}',
        '{"format_version": 2, "files": [{"path": "app/src/thesis.txt", "sha256": "' + "0" * 64 + '", "size": 8}]}',
        "not JSON",
        "",
    ],
)
def test_another_programs_folder_is_not_replaced(bundles, tmp_path, manifest):
    """A file called manifest.json makes no bundle: what would be lost is named, and stays."""
    write(tmp_path / "mine" / "manifest.json", manifest)
    write(tmp_path / "mine" / "app" / "src" / "thesis.txt")
    with pytest.raises(OutputError, match=r"not empty and not a bundle.*it holds app/src/thesis\.txt"):
        place(bundles("base"), tmp_path / "mine")
    assert (tmp_path / "mine" / "app" / "src" / "thesis.txt").read_text() == "precious"
    assert (tmp_path / "mine" / "manifest.json").read_text() == manifest


def test_a_place_within_a_bundle_is_refused(bundles, old):
    """It would be a stranger in that bundle, which could then not be replaced any more."""
    with pytest.raises(OutputError, match=f"is inside the bundle {old}"):
        place(bundles("base"), old / "sub")
    assert not (old / "sub").exists()


def test_links_in_a_bundle_are_removed_and_never_followed(bundles, old, tmp_path):
    """A linked weights file, a linked folder and a linked manifest: what they point to stays, whatever it is."""
    away = tmp_path / "away"
    away.mkdir()
    (old / "onnx").rename(away / "onnx")
    write(away / "onnx" / "thesis.txt")
    (old / "onnx").symlink_to(away / "onnx")
    for name in ("reference.npz", "manifest.json"):
        (old / name).rename(away / name)
        (old / name).symlink_to(away / name)
    before = tree(away)
    place(bundles("emotion"), old)
    assert tree(away) == before
    assert_whole(old, bundles("emotion"))
    assert os.listdir(old.parent) == ["bundle"]


def test_a_link_at_the_place_is_followed(bundles, old, tmp_path):
    """The bundle that it points to is replaced, under its own lock; the link stays a link."""
    (tmp_path / "link").symlink_to(old)

    def look(staging: Path) -> None:
        assert staging.parent == old.parent
        with pytest.raises(OutputError, match=f"process {os.getpid()} on {socket.gethostname()}"):
            placing.check(old, True)

    place(bundles("emotion"), tmp_path / "link", meanwhile=look)
    assert (tmp_path / "link").is_symlink()
    assert_whole(old, bundles("emotion"))


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_an_older_releases_bundle_is_replaced(bundles, old, version):
    """Of its manifest the lists of files are read, whatever else it says; a stranger's file still counts."""
    data = json.loads((old / "manifest.json").read_text())
    data["precisions"] = {"fp32": {"graph": data["precisions"]["fp32"]["graph"], "of": data["precisions"]["fp32"]}}
    edit_manifest(old, format_version=version, precisions=data["precisions"], surprise=[1])
    write(old / "notes.txt")
    with pytest.raises(OutputError, match=r"bundle holds notes\.txt"):
        place(bundles("emotion"), old)
    (old / "notes.txt").unlink()
    place(bundles("emotion"), old)
    assert_whole(old, bundles("emotion"))
    assert os.listdir(old.parent) == ["bundle"]


@pytest.mark.parametrize("version", [0, 6, True, "2", None])
def test_a_bundle_of_an_unknown_release_is_not_replaced(bundles, old, version):
    """What a newer release keeps in its bundles cannot be known."""
    edit_manifest(old, format_version=version)
    before = tree(old)
    with pytest.raises(OutputError, match=r"not a bundle.*remove it by hand: .*this release reads version 5"):
        place(bundles("emotion"), old)
    assert tree(old) == before


def test_what_appears_while_a_bundle_is_made_survives(bundles, old):
    """A file that came into the old bundle is found when the two would change places: refused, and both stay."""
    with pytest.raises(OutputError, match=r"bundle holds onnx/thesis\.txt"):
        place(bundles("emotion"), old, meanwhile=lambda staging: write(old / "onnx" / "thesis.txt"))
    assert (old / "onnx" / "thesis.txt").read_text() == "precious"
    (old / "onnx" / "thesis.txt").unlink()
    assert_whole(old, bundles("base"))
    assert os.listdir(old.parent) == ["bundle"]


@pytest.mark.parametrize("at_once", [True, False])
def test_what_appears_at_the_last_moment_survives(bundles, old, monkeypatch, at_once):
    """Even between the last look and the exchange: the old bundle is put back with the file in it."""
    if not at_once:
        monkeypatch.setattr(exchange, "exchanged_at_once", lambda first, second: False)
    swap, calls = placing.exchange, []

    def late(*paths: Path) -> None:
        if not calls:
            write(old / "thesis.txt")
        calls.append(paths)
        swap(*paths)

    monkeypatch.setattr(placing, "exchange", late)
    with pytest.raises(OutputError, match=r"/place/bundle holds thesis\.txt"):
        place(bundles("emotion"), old)
    assert len(calls) == 2
    (old / "thesis.txt").unlink()
    assert_whole(old, bundles("base"))
    assert os.listdir(old.parent) == ["bundle"]


def test_what_appears_while_the_old_bundle_is_removed_survives(bundles, old, monkeypatch):
    """The new bundle is in place, the file is kept, and its place is told; later exports do not remove it either."""
    removing, aside = placing.remove, old.parent / ".bundle.w2v-new"

    def interrupted(folder: Path, own: frozenset[str]) -> None:
        write(folder / "onnx" / "thesis.txt")
        removing(folder, own)

    monkeypatch.setattr(placing, "remove", interrupted)
    with pytest.raises(W2VError, match=r"bundle is written, but what it replaced is not gone: .*w2v-new"):
        place(bundles("emotion"), old)
    monkeypatch.undo()
    assert_whole(old, bundles("emotion"))
    with pytest.raises(OutputError, match=r"w2v-new holds onnx/thesis\.txt, .* move that away"):
        place(bundles("base"), old)
    assert (aside / "onnx" / "thesis.txt").read_text() == "precious"
    (aside / "onnx" / "thesis.txt").unlink()
    place(bundles("base"), old)
    assert_whole(old, bundles("base"))
    assert os.listdir(old.parent) == ["bundle"]


APPEARING = {
    "folder": lambda output, bundle: write(output / "thesis.txt"),
    "bundle": lambda output, bundle: shutil.copytree(bundle, output),
    "file": lambda output, bundle: write(output),
    "link": lambda output, bundle: output.symlink_to("nowhere"),
    "empty folder": lambda output, bundle: output.mkdir(),
}


@pytest.mark.parametrize("kind", APPEARING)
def test_an_output_that_appears_is_not_deleted_without_overwrite(bundles, tmp_path, kind):
    """Whatever came to stand there while the bundle was made stays, and the export is refused."""
    output, expected = tmp_path / "place" / "bundle", tmp_path / "expected" / "bundle"
    expected.parent.mkdir()
    APPEARING[kind](expected, bundles("emotion"))
    with pytest.raises(OutputError, match="exists already"):
        place(bundles("base"), output, False, lambda staging: APPEARING[kind](output, bundles("emotion")))
    assert tree(output.parent) == tree(expected.parent)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (".", "is the current folder or one around it"),
        ("..", "is the current folder or one around it"),
        ("sub/../..", "is the current folder or one around it"),
        ("here", "is the current folder or one around it"),
        ("/", "is the current folder or one around it"),
        ("/proc", "mount point"),
        ("dangling", "dangling is a link to nothing"),
        ("dangling/bundle", "dangling is a link to nothing"),
        ("loop", "loop is a link to nothing"),
        ("file", "file is not a folder"),
        ("to-file", "file is not a folder"),
        ("file/a/b", "file is not a folder"),
        ("missing/../bundle", "missing/.. does not exist"),
        ("n" * 300, "File name too long"),
        (os.fsdecode(b"caf\xe9"), "no UTF-8"),
        ("/proc/bundle", "cannot be written"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_places_where_no_bundle_can_be_are_refused(tmp_path, monkeypatch, output, says, overwrite):
    """With a sentence that names them, and nothing made."""
    (tmp_path / "home" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    Path("dangling").symlink_to("nowhere/at/all")
    Path("loop").symlink_to("loop")
    Path("here").symlink_to(".")
    write(Path("file"))
    Path("to-file").symlink_to("file")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=says):
        placing.check(Path(output), overwrite)
    with pytest.raises(OutputError, match=says), placed(Path(output), overwrite):
        pytest.fail("work was begun")
    assert tree(tmp_path) == before


def test_a_current_folder_that_was_removed_matters_to_relative_places_alone(bundles, tmp_path, monkeypatch):
    """A place that is named in full is taken; one that is not is refused."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OutputError, match="bundle is relative to a current folder that does not exist any more"):
        placing.check(Path("bundle"), overwrite=False)
    place(bundles("base"), tmp_path / "bundle", overwrite=False)
    assert_whole(tmp_path / "bundle", bundles("base"))


def test_a_bundle_that_may_not_be_changed_is_not_replaced(bundles, old):
    """Such as one that was made read-only for all users: refused at once, not after the work."""
    (old / "onnx").chmod(0o555)
    if os.access(old / "onnx", os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(OutputError, match=f"no permission to replace what {old}/onnx holds"):
        placing.check(old, overwrite=True)
    assert_whole(old, bundles("base"))


def test_a_missing_home_is_made(bundles, tmp_path):
    """With all folders around it."""
    place(bundles("base"), tmp_path / "a" / "b" / "bundle", overwrite=False)
    assert_whole(tmp_path / "a" / "b" / "bundle", bundles("base"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest"),
        (lambda folder: (folder / "manifest.json").write_text(""), "not a valid manifest"),
        (lambda folder: (folder / "onnx" / "model.onnx").unlink(), "cannot be read"),
        (lambda folder: write(folder / "reference.npz", "x"), "has 1 bytes"),
        (lambda folder: write(folder / "onnx" / "traced.onnx"), "its manifest does not list it"),
    ],
)
def test_what_cannot_be_opened_replaces_nothing(bundles, old, spoil, says):
    """A manifest that does not read back, a missing or changed file, a file too many: the good bundle stays."""
    with pytest.raises(BundleError, match=says):
        place(bundles("emotion"), old, meanwhile=spoil)
    assert_whole(old, bundles("base"))
    assert os.listdir(old.parent) == ["bundle"]


def test_a_manifest_is_not_written_that_does_not_read_back(bundles, old):
    """A float where a whole number belongs, as from ``"sampling_rate": 16000.0``."""
    bundle = Bundle.open(old)
    object.__setattr__(bundle.manifest.architecture, "sample_rate", 16000.0)
    with pytest.raises(BundleError, match=r"manifest\.architecture\.sample_rate must be of type int, not 16000\.0"):
        bundle.save()
    assert_whole(old, old)
    assert Bundle.open(old).manifest.architecture.sample_rate == 16000


@pytest.mark.parametrize("how", ["by path", "by id", "by the next export"])
def test_a_bundle_that_was_set_aside_comes_back_whoever_asks(bundles, old, monkeypatch, how):
    """What a kill between two renames left is found by the folder's path, by its id, and by an export."""
    home = old.parent
    monkeypatch.setenv("W2V_HOME", str(home))
    old.rename(home / ".bundle.w2v-old")
    if how == "by path":
        assert library.find(old).folder == old
    elif how == "by id":
        assert library.find("bundle").folder == old
    else:
        with pytest.raises(OutputError, match="exists already"):
            placing.check(old, overwrite=False)
    assert_whole(old, bundles("base"))
    assert os.listdir(home) == ["bundle"]


def test_hidden_folders_are_no_bundles_of_the_library(bundles, old, monkeypatch):
    """Neither shown, nor counted when the only one is asked for, nor taken for a bundle that was set aside."""
    home = old.parent
    shutil.copytree(bundles("emotion"), home / ".bundle.w2v-new")
    shutil.copytree(bundles("emotion"), home / ".bundle.8s7d6f" / "bundle")
    shutil.copytree(bundles("emotion"), home / ".other")
    write(home / ".mine.w2v-old" / "thesis.txt")
    monkeypatch.setenv("W2V_HOME", str(home))
    monkeypatch.delenv("W2V_MODEL", raising=False)
    assert [bundle.folder for bundle in library.exported()] == [old]
    assert library.find().folder == old
    assert (home / ".mine.w2v-old" / "thesis.txt").read_text() == "precious"


def test_a_hidden_checkpoint_gets_a_visible_bundle(tmp_path, monkeypatch):
    """The bundle of a folder whose name begins with a dot would never be listed under that name."""
    monkeypatch.setenv("W2V_HOME", str(tmp_path / "home"))
    (tmp_path / ".model").mkdir()
    assert library.default_folder(str(tmp_path / ".model")) == tmp_path / "home" / "model"
    assert library.default_folder("/") == tmp_path / "home" / "model"


def test_an_interrupt_leaves_the_old_bundle(bundles, old):
    """Whatever stops the block: what it wrote is gone, what was there is whole."""

    def interrupt(staging: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place(bundles("emotion"), old, meanwhile=interrupt)
    assert_whole(old, bundles("base"))
    assert os.listdir(old.parent) == ["bundle"]


def test_a_folder_that_cannot_be_renamed_stays_where_it_is(bundles, old, monkeypatch):
    """The second of three renames fails: the first is taken back, and the reason told."""
    monkeypatch.setattr(exchange, "exchanged_at_once", lambda first, second: False)
    rename = os.rename

    def refused(source, target):
        if Path(source).name == ".bundle.w2v-new":
            raise OSError(18, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(W2VError, match="bundle cannot be written: Invalid cross-device link"):
        place(bundles("emotion"), old)
    assert_whole(old, bundles("base"))
    assert os.listdir(old.parent) == ["bundle"]
