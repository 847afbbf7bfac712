"""Every architecture of the catalogue at its true size, with seeded weights: `make test-full` (about an hour)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from w2v_export import export_bundle
from w2v_export.checkpoint import seeded
from w2v_models import CATALOGUE, TOLERANCES
from w2v_models.catalogue import Variant
from w2v_runtime import Embedder

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_AUDIO = REPOSITORY.parent / "shared" / "audio"
RECORDINGS = SHARED_AUDIO if SHARED_AUDIO.is_dir() else REPOSITORY / "demo" / "recordings"


def offline_waveform(path: Path) -> np.ndarray:
    """What a careful user's script feeds the model: the mean of the channels, resampled to 16 kHz as a whole."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), rate, 16000)


def architectures() -> list[Variant]:
    """One variant of each architecture; those beyond 24 layers need more memory: `benchmarks/models.py`."""
    alike = {
        json.dumps([variant.model_type, variant.config, variant.labels]): variant
        for variant in reversed(CATALOGUE)
        if variant.config["num_hidden_layers"] <= 24
    }
    return list(reversed(alike.values()))


@pytest.mark.parametrize("variant", architectures(), ids=lambda variant: variant.id)
def test_a_variant_exports_and_embeds_real_recordings_as_transformers_does(variant, tmp_path):
    """The parity table holds, and frames, means and logits of real recordings are the recipes', alone and batched."""
    tolerances = TOLERANCES["fp32"]
    bundle = export_bundle(variant.id, tmp_path / "bundle", random_weights=True)
    rows = bundle.manifest.precisions["fp32"].parity
    worst = {output: max(row.max_abs for row in rows if row.output == output) for output in {r.output for r in rows}}
    embedder, reference = Embedder(bundle), seeded(variant.id, 0)
    paths = sorted(path for path in RECORDINGS.rglob("*.*") if path.suffix not in (".md", ".py"))
    batched = dict(zip(paths, embedder.embed_files(paths), strict=True))
    seen = {"frames": 0.0, "pooled": 0.0, "logits": 0.0}
    for path in paths:
        outputs = reference.run(offline_waveform(path))
        frames, pooled, logits = outputs.frames, outputs.frames.mean(axis=0), outputs.head
        mine = embedder.embed(path, level="frame").values
        assert mine.shape == frames.shape
        seen["frames"] = max(seen["frames"], np.abs(mine - frames).max())
        seen["pooled"] = max(seen["pooled"], np.abs(batched[path].values - pooled).max())
        if variant.labels:
            seen["logits"] = max(seen["logits"], np.abs(batched[path].logits - logits).max())
    print(f"\n{variant.id}: parity {worst}, {len(paths)} recordings {seen}")
    assert all(seen[output] <= tolerances[output].max_abs for output in seen)
