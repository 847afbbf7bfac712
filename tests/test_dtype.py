"""--dtype float16: half the disk, a stated error, refused or failed where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from commands import embed, run_merge
from w2v_runtime.stores import output_format, read_metadata, read_records, read_values


@pytest.fixture(autouse=True)
def place(recordings, tmp_path) -> Path:
    return tmp_path


def run(bundle, place: Path, name: str, *arguments: object) -> str:
    code, said = embed(place / "recordings", "-m", bundle, "-o", f"{place}/{name}", "--no-progress", *arguments)
    assert code == 0, said
    return said


def vectors(place: Path, name: str) -> np.ndarray:
    path, kind = Path(f"{place}/{name}"), output_format(f"{place}/{name}")
    shapes = [record.shape for record in read_records(path, kind)]
    return np.concatenate([np.atleast_2d(values) for values in read_values(path, kind, shapes)])


@pytest.mark.parametrize("level", ["utterance", "frame"])
@pytest.mark.parametrize("name", ["out.npz", "out.csv", "out.jsonl", "out.parquet", "out.h5", "out.scp", "out/"])
def test_float16_is_the_nearest_of_float32(bundles, place, name, level):
    """In every format, at both levels; also when parts are merged and a run is resumed; logits stay float32."""
    bundle = bundles("emotion")
    run(bundle, place, f"whole-{name}", "--level", level)
    run(bundle, place, name, "--level", level, "--dtype", "float16")
    exact, half = vectors(place, f"whole-{name}"), vectors(place, name)
    assert np.array_equal(half.astype(np.float16), exact.astype(np.float16))
    bound = 2**-10 if name in ("out.csv", "out.jsonl") else 2**-11  # text has the shortest decimal of each number
    assert (np.abs(half - exact) <= bound * np.abs(exact) + 1e-7).all()
    assert read_metadata(Path(f"{place}/{name}"), output_format(f"{place}/{name}"))["dtype"] == "float16"
    assert "nothing to do" in run(bundle, place, name, "--level", level, "--dtype", "float16", "--resume")
    run_merge("-o", place / "merged.npz", f"{place}/{name}").check_returncode()
    with np.load(place / "merged.npz") as merged:
        assert merged["embeddings"].dtype == np.float16
        assert merged["logits"].dtype == np.float32
        assert np.array_equal(merged["embeddings"], exact.astype(np.float16))


def test_it_takes_half_the_disk(bundles, place):
    """Of what the vectors take."""
    sizes = []
    for dtype in ("float32", "float16"):
        run(bundles("base"), place, f"{dtype}.npz", "--level", "frame", "--dtype", dtype)
        sizes.append((place / f"{dtype}.npz").stat().st_size)
    with np.load(place / "float32.npz") as stored:
        assert sizes[0] - sizes[1] == pytest.approx(stored["embeddings"].nbytes / 2, abs=200)


def test_another_dtype_is_another_run(bundles, place):
    """Refused by --resume, and an unknown one at once."""
    run(bundles("base"), place, "out.npz", "--dtype", "float16")
    code, said = embed(place / "recordings", "-m", bundles("base"), "-o", place / "out.npz", "--resume")
    assert code == 2
    assert "dtype was 'float16' and is now None" in said
    code, said = embed(place / "recordings", "-m", bundles("base"), "-o", place / "new.npz", "--dtype", "int4")
    assert code == 2
    assert "dtype 'int4' is unknown" in said


def test_a_number_that_float16_has_not_fails_its_input(bundles, place):
    """It is never stored as infinity."""
    before = """
from w2v_runtime.embedding.model import Model
embed_batch = Model.embed_batch
def huge(*arguments):
    results = embed_batch(*arguments)
    for result in results:
        if result.path.endswith("d.wav"):
            result.values[0] = 70000
    return results
Model.embed_batch = huge
"""
    arguments = ("-m", bundles("base"), "-o", place / "out.npz", "--dtype", "float16", "--no-progress")
    code, said = embed(place / "recordings", *arguments, before=before)
    assert code == 3, said
    (line,) = (place / "out.npz.failures.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "a value of 70000 is too large for float16; leave --dtype out."
    with np.load(place / "out.npz") as stored:
        assert len(stored["paths"]) == 4
        assert np.isfinite(stored["embeddings"]).all()
