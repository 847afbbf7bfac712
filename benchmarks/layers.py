"""The time of ``--layer k`` against k, and of all layers against the last. Writes results/layers.{json,md}.

    python benchmarks/layers.py         # base and large, about 20 minutes on two cores

Seeded weights at true size; 10 s of audio, one utterance; engine time alone, one process a request, the requests
interleaved and repeated.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import report
from peers import BUNDLE
from processes import call
from report import MIB
from seeded import MODELS, prepare

from w2v_models import Bundle

REPEATS, SECONDS = 3, 10


def request_once(bundle: Path, layer: str) -> tuple[float, int]:
    """Seconds of the second run of a request, and the peak memory of this process."""
    from w2v_runtime import Embedder
    from w2v_runtime.embedding.results import Request

    embedder = Embedder(bundle, device="cpu", request=Request.of("utterance", "mean", layer))
    waveform = np.random.default_rng(0).standard_normal(SECONDS * embedder.sample_rate).astype(np.float32)
    for _ in range(2):
        before = embedder.engine.busy_seconds
        embedder.embed((waveform, embedder.sample_rate), layer=layer)
    return embedder.engine.busy_seconds - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str) -> dict[str, Any]:
    """Seconds and peak memory of every fourth layer, the last and all of a model, and the bundle's growth."""
    bundle = prepare(name, BUNDLE) / BUNDLE
    blocks = Bundle.open(bundle).manifest.architecture.layers
    requests = [*map(str, range(0, blocks + 1, blocks // 6)), "last", "all"]
    seconds: dict[str, list[float]] = {layer: [] for layer in requests}
    peaks = {}
    for _ in range(REPEATS):
        for layer in requests:
            taken, peaks[layer] = call(request_once, bundle, layer)
            seconds[layer].append(taken)
    files = {path.name: path.stat().st_size for path in (bundle / "onnx").iterdir()}
    growth = files["layers.onnx"] / (files["model.onnx"] + files["model.onnx_data"])
    return {"blocks": blocks, "seconds": seconds, "peak": peaks, "growth": growth}


def table(models: dict[str, Any]) -> list[str]:
    """Seconds of each layer, against the straight line from layer 0 to L; memory; and the bundle's growth."""
    rows = []
    for model, result in models.items():
        blocks, times = result["blocks"], {k: statistics.median(found) for k, found in result["seconds"].items()}
        step = (times[str(blocks)] - times["0"]) / blocks
        for layer, median in times.items():
            cells = {"model": model, "layer": layer, "seconds": report.spread(result["seconds"][layer], ".3f")}
            against = f"{median / times['last']:.3f} × last (≤ 1.05)" if layer == "all" else ""
            if layer.isdecimal():
                against = f"{median / (times['0'] + step * int(layer)):.3f} × (≤ 1.10)"
            cells["against front end + k blocks"] = against
            rows.append(cells | {"peak memory": f"{result['peak'][layer] / MIB:.0f} MiB"})
        growth = f"grows by {result['growth']:.2%} (≤ 5 %)"
        rows.append({"model": model, "layer": "bundle", "against front end + k blocks": growth})
    return report.table(rows)


def main(options: argparse.Namespace) -> None:
    """Measure the models and write the page; figures of other models stay."""
    results = {"models": {}} | report.load(options.output, "layers")
    for name in () if options.tables else options.models:
        results["models"][MODELS[name]] = report.origin() | measure(name)
        report.save(options.output, "layers", results)
    said = (
        f"Made by `python benchmarks/layers.py`. Seeded weights, one utterance of {SECONDS} s; engine time alone: the "
        "median of processes, and their range."
    )
    models = {model: results | result for model, result in results["models"].items()}  # one machine for all, once
    report.write(options.output, "layers", report.head("Layers", said, models) + table(models))


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    main(parser.parse_args())
