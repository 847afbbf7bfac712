"""What windows change: long audio in windows against the same audio embedded whole. Writes results/windows.{json,md}.

    python benchmarks/windows.py [BUNDLE]       # default: the base model with seeded weights

The demo's recordings, joined to a minute, are embedded whole once and then for several windows and contexts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import report
from peers import BUNDLE, RATE
from seeded import prepare

from w2v_runtime import Embedder
from w2v_runtime.audio.reading import read_audio
from w2v_runtime.embedding.windows import Windowing
from w2v_runtime.runs.inputs import list_inputs

RECORDINGS = Path(__file__).resolve().parent.parent / "demo" / "recordings"
SECONDS = 60
CASES = ((5, 0), (5, 1), (10, 1), (10, 5), (20, 5), (30, 0), (30, 5))


def measure(model: Path) -> dict[str, Any]:
    """Every case against the whole."""
    joined = np.concatenate([read_audio(path, RATE).samples for path in list_inputs([str(RECORDINGS)])])
    embedder, waveform = Embedder(model), np.resize(joined, SECONDS * RATE)

    def frames(windowing: Windowing) -> np.ndarray:
        embedder.windowing = windowing
        return embedder.embed((waveform, RATE), level="frame").values.astype(float)

    whole, rows = frames(Windowing(SECONDS)), []
    for window, context in CASES:
        found = frames(Windowing(window, context))
        each, (pooled,) = cosines(found, whole), cosines(found.mean(0)[None], whole.mean(0)[None])
        near = {"min_cosine": each.min(), "mean_cosine": each.mean(), "pooled_cosine": pooled}
        rows.append({"window": window, "context": context, **{name: float(cosine) for name, cosine in near.items()}})
        rows[-1]["pooled_difference"] = float(np.abs(found.mean(0) - whole.mean(0)).max())
    source = embedder.manifest.source
    weights = f"seeded random weights (seed {source.seed})" if source.random else "the checkpoint's weights"
    return report.origin() | {"model": source.model, "weights": weights, "rows": rows}


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a with the same row of b."""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def main(options: argparse.Namespace) -> None:
    """Measure every case and write the table."""
    if not options.tables:
        model = options.bundle or prepare("base", BUNDLE) / BUNDLE
        report.save(options.output, "windows", measure(model))
    results = report.load(options.output, "windows")
    said = (
        f"Made by `python benchmarks/windows.py`: {results['model']} with {results['weights']}, {SECONDS} s of speech "
        "embedded whole and in windows. The normalisation and the group norm are the whole recording's in every row, "
        "so what differs is how far attention sees. Random weights attend almost evenly to everything; trained ones "
        "look nearer, so these rows are no measure of trained models: give the script a bundle of your own for that."
    )
    rows = [
        {
            "window": f"{row['window']} s",
            "context": f"{row['context']} s",
            "min frame cosine": f"{row['min_cosine']:.5f}",
            "mean frame cosine": f"{row['mean_cosine']:.5f}",
            "pooled cosine": f"{row['pooled_cosine']:.6f}",
            "pooled max abs Δ": f"{row['pooled_difference']:.1e}",
            "encoder work": f"{(row['window'] + 2 * row['context']) / row['window']:.2f} ×",
        }
        for row in results["rows"]
    ]
    head = report.head("Windows of long audio against the whole", said, {"": results})
    report.write(options.output, "windows", head + report.table(rows))


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("bundle", nargs="?", type=Path)
    main(parser.parse_args())
