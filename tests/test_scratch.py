"""Room for the frames of long recordings: taken before it is used, beside the output, or the run stops."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from commands import embed, left_beside, results
from conftest import speech
from w2v_models.errors import StorageError
from w2v_runtime.files import scratch

MIB = 2**20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not possible here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_an_array_that_finds_no_room_is_refused(small, monkeypatch):
    """No process dies of a page that the disk cannot give; what fits is an array like any other, without a file."""
    monkeypatch.setattr(scratch, "_IN_MEMORY_BYTES", 0)
    with pytest.raises(StorageError, match=r"small cannot take the 8 MiB of frames .*: No space left on device"):
        scratch.float_array((2 * MIB,), str(small))
    array = scratch.float_array((MIB // 2, 1), str(small))
    array[:] = 1
    assert float(array.sum()) == MIB // 2
    assert list(small.iterdir()) == []
    with pytest.raises(StorageError, match="cannot take"):
        scratch.float_array((MIB,), str(small))
    del array
    assert scratch.float_array((MIB // 2,), str(small)).shape == (MIB // 2,)


def test_a_long_recording_that_finds_no_room_stops_the_run(bundles, small, tmp_path):
    """Exit 1 with the output's place and the reason; a full folder for temporary files does not matter."""
    folder = tmp_path / "in"
    folder.mkdir()
    soundfile.write(folder / "a.wav", speech(2.0), 16000)
    soundfile.write(folder / "b.wav", np.tile(speech(30.0), 18), 16000)
    before = "from w2v_runtime.files import scratch\nscratch._IN_MEMORY_BYTES = 0\n"
    arguments = (folder, "-m", bundles("large"), "--level", "frame")
    code, errors = embed(*arguments, "-o", small / "out.npz", before=before)
    assert code == 1, errors
    assert f"{small} cannot take the " in errors
    assert "No space left on device" in errors
    assert left_beside(small / "out.npz") == [".out.npz.w2v-journal", ".out.npz.w2v-values"]
    code, errors = embed(*arguments, "-o", tmp_path / "out.npz", before=before, TMPDIR=str(small))
    assert code == 0, errors
    assert results(tmp_path / "out.npz")[0] == ["a.wav", "b.wav"]
