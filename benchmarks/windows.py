"""What windows change: long audio in windows against the same audio embedded whole. Writes results/windows.md.

    python benchmarks/windows.py [BUNDLE]       # default: the base model with seeded weights

The demo's recordings, joined to a minute, are embedded whole once and then for several windows and contexts.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from w2v_models import Bundle
from w2v_runtime import Embedder
from w2v_runtime.audio.reading import read_audio
from w2v_runtime.embedding.windows import Windowing
from w2v_runtime.runs.inputs import list_inputs

HERE = Path(__file__).resolve().parent
SECONDS = 60
CASES = ((5, 0), (5, 1), (10, 1), (10, 5), (20, 5), (30, 0), (30, 5))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a with the same row of b."""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def main(model: str | None) -> None:
    """Measure every case and write the table."""
    if model is None:
        from w2v_export import export_bundle

        model = str(Path(tempfile.gettempdir()) / "w2v-bench" / "bundles" / "base-catalogue")
        if not Path(model).exists():
            export_bundle("facebook/wav2vec2-base-960h", model, random_weights=True)
    bundle = Bundle.open(Path(model))
    joined = np.concatenate([read_audio(p, 16000).samples for p in list_inputs([str(HERE.parent / "demo/recordings")])])
    waveform = np.resize(joined, SECONDS * 16000)
    whole = Embedder(bundle, windowing=Windowing(window=SECONDS)).embed((waveform, 16000), level="frame").values
    embedder, rows = Embedder(bundle), []
    for window, context in CASES:
        embedder.windowing = Windowing(window, context)
        frames = embedder.embed((waveform, 16000), level="frame").values
        each = cosines(frames.astype(float), whole.astype(float))
        means = [x.astype(float).mean(0)[None] for x in (frames, whole)]
        cost = (window + 2 * context) / window
        rows.append(
            f"| {window} s | {context} s | {each.min():.5f} | {each.mean():.5f} | {cosines(*means)[0]:.6f} "
            f"| {np.abs(means[0] - means[1]).max():.1e} | {cost:.2f} × |"
        )
        print(rows[-1], flush=True)
    source = bundle.manifest.source
    weights = f"seeded random weights (seed {source.seed})" if source.random else "the checkpoint's weights"
    text = f"""# Windows of long audio against the whole

Made by `python benchmarks/windows.py`: {source.model} with {weights}, {SECONDS} s of speech embedded
whole and in windows. The normalisation and the group norm are the whole recording's in every row, so what differs is
how far attention sees. Random weights attend almost evenly to everything; trained ones look nearer, so these rows are
no measure of trained models: give the script a bundle of your own for that.

| window | context | min frame cosine | mean frame cosine | pooled cosine | pooled max abs Δ | encoder work |
|---|---|---|---|---|---|---|
"""
    (HERE / "results" / "windows.md").write_text(text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
