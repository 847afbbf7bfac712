"""What names decide: the format of an output, and where inputs stand inside it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import pytest

from w2v_models.errors import OutputError
from w2v_runtime.stores import check_place, output_format
from w2v_runtime.stores.tree import mirrored, told_apart

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a/b.wav", "./a/c.wav"], ["a/b.wav.npy", "a/c.wav.npy"]),
        (["/data/x/a.wav", "/data/y/a.wav"], ["x/a.wav.npy", "y/a.wav.npy"]),
        (["/data/a.wav"], ["a.wav.npy"]),
        (["//data/a.wav", "/data/b.wav"], ["a.wav.npy", "b.wav.npy"]),
        (["../x/a.wav", "../a.wav"], ["x/a.wav.npy", "a.wav.npy"]),
        (["a/../../x/a.wav", "../y.wav"], ["x/a.wav.npy", "y.wav.npy"]),
        (["a.wav", "./a.wav", "a.wav"], ["a.wav.npy", "a.wav~2.npy", "a.wav~3.npy"]),
        (["x", "x.npy/y.wav"], ["x~2.npy", "x.npy/y.wav.npy"]),
        (["index.jsonl/a.wav", "b/index.jsonl/a.wav"], ["index.jsonl~/a.wav.npy", "b/index.jsonl/a.wav.npy"]),
        ([], []),
    ],
)
def test_mirrored_names_stay_inside_and_apart(paths: list[str], expected: list[str]) -> None:
    """Names mirror the tree below the common folder; none leaves it, and none clashes with another name or folder."""
    assert mirrored(paths, ".npy", {"index.jsonl"}) == expected


def test_equal_names_are_told_apart_in_as_many_steps() -> None:
    """A thousand inputs of one name take a few thousand steps, not half a million."""
    steps = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += event == "line" and frame.f_code is told_apart.__code__
        return count

    names = ["a.wav.npy"] * 1000
    before = sys.gettrace()
    sys.settrace(count)
    try:
        unique = told_apart(names, (), ".npy")
    finally:
        sys.settrace(before)
    assert unique == ["a.wav.npy", *(f"a.wav~{number}.npy" for number in range(2, 1001))]
    assert steps < 10_000


def test_mirrored_with_working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Relative, climbing and absolute inputs together are named from the folder that holds them all."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    names = mirrored(["a.wav", "../a.wav", str(tmp_path / "work" / "b" / "a.wav")])
    assert names == ["work/a.wav", "a.wav", "work/b/a.wav"]


def test_parquet_escapes_only_what_it_must() -> None:
    """A UTF-8 name stays itself in Parquet; one that is not, or that looks escaped already, comes back exactly."""
    pytest.importorskip("pyarrow")
    from w2v_runtime.stores.parquet import file_text

    not_utf8 = os.fsdecode(b"caf\xe9 \xff.wav")
    assert file_text("Ünï %41.wav") == "Ünï %41.wav"
    assert file_text(not_utf8) == "file:caf%E9%20%FF.wav"
    for name in (not_utf8, "file:a%41.wav"):
        assert os.fsdecode(unquote_to_bytes(file_text(name).removeprefix("file:"))) == name


@pytest.mark.parametrize(
    ("output", "kind"),
    [("x.npz", "npz"), ("a.b/x.CSV", "csv"), ("x.jsonl", "jsonl"), ("-", "stdout"), ("x/", "npy"), ("x.csv/", "npy")],
)
def test_format_by_name(output: str, kind: str) -> None:
    """The suffix decides, a trailing separator means a folder, and - means standard output."""
    assert output_format(output) == kind


def test_existing_folder_is_a_folder_output(tmp_path: Path) -> None:
    """A folder that exists is one whatever its name ends in."""
    (tmp_path / "x.csv").mkdir()
    assert output_format(str(tmp_path / "x.csv")) == "npy"


def test_missing_folder_and_wrong_kind_are_refused(tmp_path: Path) -> None:
    """An output in a missing folder, a folder over a file and a file over a folder are refused before any work."""
    with pytest.raises(OutputError, match=r"missing does not exist"):
        check_place(tmp_path / "missing" / "out.npz")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="is a file"):
        check_place(tmp_path / "taken", overwrite=True, kind="npy")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_place(tmp_path / "folder.csv", overwrite=True, kind="csv")


@pytest.mark.parametrize("output", ["x.npy", "x", "x.txt", ".npz"])
def test_unknown_suffix_lists_the_known(output: str) -> None:
    """An output of no known format is refused with the formats there are."""
    with pytest.raises(OutputError, match=r"\.npz, \.csv, \.jsonl, \.parquet, \.h5, \.scp"):
        output_format(output)


@pytest.mark.parametrize(
    ("output", "package", "extra"),
    [("x.parquet", "pyarrow", "parquet"), ("x.h5", "h5py", "hdf5"), ("x.scp", "kaldiio", "kaldi")],
)
def test_missing_package_names_the_extra(
    output: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format whose package is not installed is refused with the command that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OutputError, match=rf"pip install 'w2v-onnx\[{extra}\]'"):
        output_format(output)
