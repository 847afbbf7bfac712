"""Recordings that an export is to be proven on (``--check``): decoded first, all of them compared, refused by name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from conftest import speech
from w2v_models import RefusedError
from w2v_models.manifest import Architecture, ConvStack

pytest.importorskip("torch")
pytest.importorskip("transformers")

from w2v_export import export_bundle
from w2v_export.recordings import named, read_recordings

CONV = ConvStack((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), (24,) * 7)
ARCHITECTURE = Architecture("wav2vec2", "waveform", 16000, CONV, 48, 3, 4, 96, True)


def write(path: Path, seconds: float, seed: int = 0, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, speech(seconds, rate, seed), rate, format="FLAC")
    return path


def test_every_recording_is_compared_under_a_name_of_its_own(checkpoints, tmp_path):
    """Equal names in two folders, the name of a built-in case, one file named twice: each has its rows, once."""
    first, second = write(tmp_path / "a" / "x.flac", 0.5, 1), write(tmp_path / "b" / "x.flac", 0.6, 2)
    write(tmp_path / "silence 1.3 s", 0.7, 3)
    other = write(tmp_path / "y.flac", 0.8, 4, 44100)
    with contextlib.chdir(tmp_path):
        checks = ["a/x.flac", second, "silence 1.3 s", other, first]
        bundle = export_bundle(checkpoints("base"), tmp_path / "bundle", check=checks)
    cases = [row.case for row in bundle.manifest.precisions["fp32"].parity if row.output == "pooled"]
    assert [cases.count(name) for name in (str(first), str(second), "./silence 1.3 s", "y.flac")] == [1, 1, 1, 1]
    assert cases.count("silence 1.3 s") == 1
    with np.load(tmp_path / "bundle" / "reference.npz") as stored:
        names = json.loads(str(stored["cases"]))
        lengths = {name: len(stored[f"waveform_{i}"]) for i, name in enumerate(names)}
    assert [lengths[name] for name in (str(first), str(second), "./silence 1.3 s")] == [8000, 9600, 11200]


def test_a_name_that_is_no_text_is_escaped(tmp_path):
    """The manifest holds text, so bytes that are none are written as escapes."""
    path = Path(os.fsdecode(os.fsencode(tmp_path / "x") + b"\xff.flac"))
    write(tmp_path / "x.flac", 0.1).rename(path)
    (name,) = named(read_recordings([path], ARCHITECTURE), ())
    assert name == "x\\xff.flac"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"this is no audio at all", "unsupported format"),
        (b"", "no samples"),
        (None, "not a regular file"),
        (0.02, "it has 320 samples at 16000 Hz, and a frame takes 400"),
        (40.5, "it is longer than the 40 s that can be checked; check a part of it"),
    ],
)
def test_a_recording_that_cannot_be_checked_is_named(checkpoints, tmp_path, content, says):
    """Before the checkpoint's weights are read, which here are none: exit 2 with the file."""
    folder = shutil.copytree(checkpoints("base"), tmp_path / "tiny")
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    path = tmp_path / "check.wav"
    if content is None:
        os.mkfifo(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    good = write(tmp_path / "good.flac", 0.5)
    with pytest.raises(RefusedError) as caught:
        export_bundle(folder, tmp_path / "bundle", check=[good, path])
    assert f"{path} cannot be checked: " in str(caught.value)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_half_an_hour_is_refused_in_little_time_and_memory(checkpoints, tmp_path):
    """A process of its own: what is beyond the limit is not decoded, and no weight is loaded for it."""
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 16000, 1) as file:
        for _ in range(30):
            file.write(np.zeros(16000 * 60, np.int16))
    code = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))\nimport sys\n"
    arguments = [
        "w2v-export",
        "--model",
        str(checkpoints("base")),
        "--output",
        str(tmp_path / "b"),
        "--check",
        str(path),
    ]
    code += f"sys.argv = {arguments!r}\nfrom w2v_export.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"w2v-export: error: {path} cannot be checked: it is longer than the 40 s" in done.stderr
    assert "loading" not in done.stderr
    assert not (tmp_path / "b").exists()
