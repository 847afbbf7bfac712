"""What windows change: long audio in windows against the same audio embedded whole. Writes results/windows.{json,md}.

    python benchmarks/windows.py [BUNDLE]       # default: the base model with seeded weights; half an hour on two cores

The demo's recordings, joined to twenty minutes, are embedded whole once and then for several windows and contexts: the
first layer, a middle one and the last.
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
SECONDS = 1200
CASES = ((10, 1), (30, 0), (30, 5), (60, 10), (120, 20))


def measure(model: Path) -> dict[str, Any]:
    """Every case against the whole."""
    joined = np.concatenate([read_audio(path, RATE).samples for path in list_inputs([str(RECORDINGS)])])
    embedder, waveform = Embedder(model, "cpu"), np.resize(joined, SECONDS * RATE)
    layers = [0, embedder.manifest.architecture.layers // 2, "last"]

    def frames(windowing: Windowing) -> np.ndarray:
        embedder.windowing = windowing
        return embedder.embed((waveform, RATE), level="frame", layer=layers).values

    everything, rows = frames(Windowing(whole=SECONDS)), []
    for window, context in CASES:
        windowed = frames(Windowing(window, context, whole=0))
        for index, layer in enumerate(layers):
            found, whole = (values[:, index].astype(np.float64) for values in (windowed, everything))
            each, (pooled,) = cosines(found, whole), cosines(found.mean(0)[None], whole.mean(0)[None])
            near = {"min_cosine": each.min(), "mean_cosine": each.mean(), "pooled_cosine": pooled}
            near |= {"difference": np.abs(found - whole).max()}
            near |= {"pooled_difference": np.abs(found.mean(0) - whole.mean(0)).max()}
            case = {"window": window, "context": context, "layer": layer}
            rows.append(case | {name: float(figure) for name, figure in near.items()})
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
        f"Made by `python benchmarks/windows.py`: {results['model']} with {results['weights']}, {SECONDS // 60} min of "
        "speech embedded whole and in windows. The normalisation and the group norm are the whole recording's in every "
        "row, so what differs is how far attention sees. Random weights attend almost evenly to everything; trained "
        "ones look nearer, so these rows are no measure of trained models: "
        "give the script a bundle of your own for that."
    )
    rows = [
        {
            "window": f"{row['window']} s",
            "context": f"{row['context']} s",
            "layer": str(row["layer"]),
            "min frame cosine": f"{row['min_cosine']:.5f}",
            "mean frame cosine": f"{row['mean_cosine']:.5f}",
            "pooled cosine": f"{row['pooled_cosine']:.6f}",
            "frame max abs Δ": f"{row['difference']:.1e}",
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
