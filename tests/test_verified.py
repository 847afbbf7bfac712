"""Files of a bundle are checked by their SHA-256, and large ones are not read again until they are touched."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from w2v_models import Bundle, BundleError, Manifest, verified
from w2v_models import bundle as bundle_module
from w2v_models.manifest import FileRecord

NAME = "model.onnx_data"
LARGE = bytes(range(256)) * (verified.MIN_BYTES // 256) + b"end"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of the test's own; the folder of the records in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "w2v-onnx" / ".verified"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read for their SHA-256, in order."""
    names: list[str] = []
    digest = hashlib.file_digest

    def counting(file: Any, kind: str) -> Any:
        names.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return names


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing seems to begin five seconds after now: what a test has just written is no longer fresh."""
    clock = SimpleNamespace(time_ns=lambda: time.time_ns() + 5 * 10**9)
    monkeypatch.setattr(bundle_module, "time", clock)


def bundle_in(folder: Path, content: bytes = LARGE, name: str = NAME) -> tuple[Bundle, FileRecord]:
    """A folder with one file, and what a manifest would say of it."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return Bundle(folder, cast(Manifest, None)), bundle_module.record(folder, path)


def touch(path: Path) -> None:
    """Same content, another time of modification."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


@pytest.mark.usefixtures("settled")
def test_the_second_start_does_not_read_a_large_file(tmp_path, hashed):
    """It is hashed once for any number of checks, and once more after it was touched."""
    bundle, entry = bundle_in(tmp_path / "b")
    hashed.clear()
    for _ in range(3):
        assert bundle.check(entry) == tmp_path / "b" / NAME
    assert hashed == [NAME]
    touch(tmp_path / "b" / NAME)
    bundle.check(entry)
    bundle.check(entry)
    assert hashed == [NAME] * 2


@pytest.mark.usefixtures("settled")
def test_another_process_remembers_too(tmp_path):
    """A process that never hashed the file accepts it without reading it."""
    bundle, entry = bundle_in(tmp_path / "b")
    bundle.check(entry)
    script = (
        "import sys, hashlib; from pathlib import Path; from w2v_models import Bundle; "
        "from w2v_models.manifest import FileRecord\n"
        "def never(*arguments): raise AssertionError('hashed')\n"
        "hashlib.file_digest = never\n"
        "Bundle(Path(sys.argv[1]), None).check(FileRecord(sys.argv[2], sys.argv[3], int(sys.argv[4])))"
    )
    arguments = [str(tmp_path / "b"), entry.path, entry.sha256, str(entry.size)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("settled")
def test_a_check_that_trusts_nothing_reads_the_file_again(tmp_path, hashed):
    """With ``remembered=False`` every check hashes, and what it finds right is remembered for the others."""
    bundle, entry = bundle_in(tmp_path / "b")
    hashed.clear()
    bundle.check(entry, remembered=False)
    bundle.check(entry, remembered=False)
    bundle.check(entry)
    assert hashed == [NAME] * 2


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("same_time", [False, True])
def test_a_changed_file_is_refused(tmp_path, same_time):
    """Same size, other content: refused, also when the time of modification was set back to what it was."""
    bundle, entry = bundle_in(tmp_path / "b")
    path = bundle.check(entry)
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"other")
    if same_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(BundleError, match="SHA-256 differs"):
            bundle.check(entry)


@pytest.mark.usefixtures("settled")
def test_another_file_in_its_place_is_hashed(tmp_path, hashed):
    """A file moved over the remembered one is not taken for it, and neither is another expected SHA-256."""
    bundle, entry = bundle_in(tmp_path / "b")
    path = bundle.check(entry)
    status = path.stat()
    (tmp_path / "new").write_bytes(LARGE[::-1])
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(tmp_path / "new", path)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        bundle.check(entry)
    reversed_entry = FileRecord(entry.path, hashlib.sha256(LARGE[::-1]).hexdigest(), entry.size)
    bundle.check(reversed_entry)
    hashed.clear()
    bundle.check(reversed_entry)
    assert hashed == []
    with pytest.raises(BundleError, match="SHA-256 differs"):
        bundle.check(entry)


@pytest.mark.usefixtures("settled")
def test_a_file_that_rots_unseen_is_found_by_reading_and_then_by_all(tmp_path, monkeypatch):
    """Content that changes under unchanged times is found by a check that reads, which takes its record away."""
    bundle, entry = bundle_in(tmp_path / "b")
    bundle.check(entry)
    monkeypatch.setattr(bundle_module, "sha256", lambda path: "0" * 64)
    bundle.check(entry)
    for remembered in (False, True):
        with pytest.raises(BundleError, match="SHA-256 differs"):
            bundle.check(entry, remembered=remembered)


@pytest.mark.usefixtures("settled")
def test_small_files_are_always_read(tmp_path, hashed, cache):
    """A file below the limit leaves no record."""
    bundle, entry = bundle_in(tmp_path / "b", LARGE[: verified.MIN_BYTES - 1])
    hashed.clear()
    bundle.check(entry)
    bundle.check(entry)
    assert hashed == [NAME] * 2
    assert not cache.exists()


def test_a_fresh_file_is_not_remembered(tmp_path, hashed, cache):
    """A file written less than two seconds before it is hashed is hashed again; an older one is not."""
    bundle, entry = bundle_in(tmp_path / "b")
    hashed.clear()
    bundle.check(entry)
    assert not cache.exists()
    time.sleep(2.05)
    for _ in range(3):
        bundle.check(entry)
    assert hashed == [NAME] * 2


@pytest.mark.usefixtures("settled")
def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(tmp_path, monkeypatch, cache):
    """What was found right before the change says nothing about the file after it."""
    bundle, entry = bundle_in(tmp_path / "b")
    digest = bundle_module.sha256

    def changing(path: Path) -> str:
        found = digest(path)
        touch(path)
        return found

    monkeypatch.setattr(bundle_module, "sha256", changing)
    bundle.check(entry)
    assert not cache.exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\x00", b"[" * 100_000])
def test_a_damaged_record_is_passed_over(tmp_path, hashed, cache, content):
    """The file is hashed again and the record mended."""
    bundle, entry = bundle_in(tmp_path / "b")
    bundle.check(entry)
    (record,) = cache.iterdir()
    record.write_bytes(content)
    hashed.clear()
    bundle.check(entry)
    bundle.check(entry)
    assert hashed == [NAME]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("blocked", ["cache", "cache/w2v-onnx", "cache/w2v-onnx/.verified"])
def test_without_a_place_for_records_every_check_reads(tmp_path, hashed, blocked):
    """A file where a folder should be: nothing can be written there, even by root; no error."""
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).write_text("in the way")
    bundle, entry = bundle_in(tmp_path / "b")
    hashed.clear()
    bundle.check(entry)
    bundle.check(entry)
    assert hashed == [NAME] * 2


@pytest.mark.usefixtures("settled")
def test_the_oldest_records_are_forgotten(tmp_path, monkeypatch, hashed, cache):
    """There are never more than the limit, and the newest stay."""
    monkeypatch.setattr(verified, "MAX_RECORDS", 2)
    made = [bundle_in(tmp_path / str(i)) for i in range(3)]
    for age, (bundle, entry) in zip((300, 200, 100), made, strict=True):
        before = set(cache.iterdir()) if cache.exists() else set()
        bundle.check(entry)
        (new,) = set(cache.iterdir()) - before
        os.utime(new, (time.time() - age, time.time() - age))
    assert len(list(cache.iterdir())) == 2
    hashed.clear()
    for bundle, entry in (made[2], made[1], made[0]):
        bundle.check(entry)
    assert hashed == [NAME]


@pytest.mark.usefixtures("settled")
def test_many_writers_leave_whole_records(tmp_path, hashed, cache):
    """Thirty checks at a time of six files leave six records that hold, and no draft."""
    made = [bundle_in(tmp_path / str(i)) for i in range(6)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: one[0].check(one[1], remembered=False), made * 5))
    assert sorted(path.suffix for path in cache.iterdir()) == [".json"] * 6
    hashed.clear()
    for bundle, entry in made:
        bundle.check(entry)
    assert hashed == []


@pytest.mark.usefixtures("settled")
def test_names_that_are_no_text_are_remembered(tmp_path, hashed):
    """A folder whose name is not UTF-8."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    bundle, entry = bundle_in(folder)
    hashed.clear()
    bundle.check(entry)
    bundle.check(entry)
    assert hashed == [NAME]


def test_records_live_in_the_cache_folder_of_the_user(monkeypatch, tmp_path):
    """Where default bundles live, whatever ``$W2V_HOME`` says; a user without a home has none."""
    from w2v_runtime.bundles import library

    monkeypatch.delenv("W2V_HOME", raising=False)
    assert verified.folder() == library.home() / ".verified"
    monkeypatch.setenv("W2V_HOME", str(tmp_path / "elsewhere"))
    assert verified.folder() == tmp_path / "cache" / "w2v-onnx" / ".verified"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert verified.folder() == tmp_path / "me" / ".cache" / "w2v-onnx" / ".verified"
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert verified.folder() is None
    bundle, entry = bundle_in(tmp_path / "b")
    assert bundle.check(entry) == tmp_path / "b" / NAME


@pytest.mark.usefixtures("settled")
def test_a_hard_link_is_refused_until_it_is_a_file_of_its_own(tmp_path, hashed):
    """Right content under two names is refused unread; the command in the message mends it."""
    bundle, entry = bundle_in(tmp_path / "a bundle")
    path = tmp_path / "a bundle" / NAME
    os.link(path, tmp_path / "outside")
    hashed.clear()
    with pytest.raises(BundleError, match="hard link, one of 2 names") as caught:
        bundle.check(entry)
    assert hashed == []
    subprocess.run(str(caught.value).split("of its own: ")[1], shell=True, check=True)
    assert bundle.check(entry) == path
    assert os.listdir(tmp_path / "a bundle") == [NAME]


def test_a_loop_of_links_and_an_unreadable_file_are_refused(tmp_path):
    """In one sentence each."""
    bundle, entry = bundle_in(tmp_path / "b")
    path = tmp_path / "b" / NAME
    path.unlink()
    path.symlink_to(NAME)
    with pytest.raises(BundleError, match="not a regular file"):
        bundle.check(entry)
    path.unlink()
    path.write_bytes(LARGE)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads every file")
    with pytest.raises(BundleError, match="cannot be read: Permission denied"):
        bundle.check(entry)
