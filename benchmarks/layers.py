"""The time of ``--layer k`` against k, and of all layers against the last. Writes results/layers.{json,md,svg}.

    python benchmarks/layers.py [MODEL ...]     # base and large by default, about 20 minutes on two cores

Seeded weights at true size; 10 s of audio, one utterance; engine time alone, one process a request, the requests
interleaved and repeated.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import summary

HERE = Path(__file__).resolve().parent
MODELS = ("facebook/wav2vec2-base-960h", "facebook/wav2vec2-large-robust")
REPEATS = 3
SECONDS = 10

_EXPORT = "import sys; from w2v_export import export_bundle; export_bundle(*sys.argv[1:3], random_weights=True)"
#: Seconds of each run after the first, and the peak memory of the process.
_MEASURE = """
import json, resource, sys, time
import numpy as np
from w2v_runtime import Embedder
from w2v_runtime.embedding.results import Request
bundle, layer, seconds, runs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
embedder = Embedder(bundle, device="cpu", request=Request.of("utterance", "mean", layer))
waveform = np.random.default_rng(0).standard_normal(seconds * embedder.sample_rate).astype(np.float32)
times = []
for _ in range(runs + 1):
    before = embedder.engine.busy_seconds
    embedder.embed((waveform, embedder.sample_rate), layer=layer)
    times.append(embedder.engine.busy_seconds - before)
print(json.dumps({"seconds": times[1:], "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def measure(bundle: Path, layer: str, runs: int) -> tuple[list[float], int]:
    """Run one request in a process of its own: (seconds of each run, peak memory in bytes)."""
    arguments = [sys.executable, "-c", _MEASURE, str(bundle), layer, str(SECONDS), str(runs)]
    answer = json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
    return answer["seconds"], answer["peak"]


def measure_model(model: str, work: Path) -> dict[str, object]:
    """Seconds and peak memory of every fourth layer, the last and all of a model, and the bundle's growth."""
    bundle = work / "layers" / model.replace("/", "--")
    if not bundle.exists():
        subprocess.run([sys.executable, "-c", _EXPORT, model, str(bundle)], check=True)
    manifest = json.loads((bundle / "manifest.json").read_text())
    blocks = manifest["architecture"]["layers"]
    requests = [str(layer) for layer in range(0, blocks + 1, blocks // 6)] + ["last", "all"]
    seconds: dict[str, list[float]] = {request: [] for request in requests}
    peaks: dict[str, int] = {}
    for _ in range(REPEATS):
        for request in requests:
            times, peaks[request] = measure(bundle, request, runs=1)
            seconds[request] += times
    files = {path.name: path.stat().st_size for path in (bundle / "onnx").iterdir()}
    growth = files["layers.onnx"] / (files["model.onnx"] + files["model.onnx_data"])
    return {"blocks": blocks, "seconds": seconds, "peak": peaks, "growth": growth}


def table(results: dict[str, dict[str, object]]) -> list[str]:
    """Rows of Markdown: median seconds, the straight line from layer 0 to L, and memory above layer 0."""
    lines = ["| model | layer | seconds (median, spread) | against front end + k blocks | peak memory |"]
    lines += ["|---|---|---|---|---|"]
    for model, result in results.items():
        blocks, times = int(result["blocks"]), {k: statistics.median(v) for k, v in result["seconds"].items()}
        first, step = times["0"], (times[str(blocks)] - times["0"]) / blocks
        for request, median in times.items():
            spread = (max(result["seconds"][request]) - min(result["seconds"][request])) / median
            if request == "all":
                against = f"{median / times['last']:.3f} × last (≤ 1.05)"
            elif request == "last":
                against = ""
            else:
                against = f"{median / (first + step * int(request)):.3f} × (≤ 1.10)"
            peak = result["peak"][request] / 2**20
            lines.append(f"| {model} | {request} | {median:.3f} ± {spread / 2:.0%} | {against} | {peak:.0f} MiB |")
        lines.append(f"| {model} | bundle | | grows by {result['growth']:.2%} (≤ 5 %) | |")
    return lines


def plot(results: dict[str, dict[str, object]], path: Path) -> None:
    """Median seconds against k, each model with the straight line from layer 0 to L."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for model, result in results.items():
        times = {int(k): statistics.median(v) for k, v in result["seconds"].items() if k.isdecimal()}
        (line,) = axes.plot(list(times), list(times.values()), "o", label=model)
        ends = [0, int(result["blocks"])]
        axes.plot(ends, [times[k] for k in ends], "-", color=line.get_color(), linewidth=0.8)
    axes.set(xlabel="layer k", ylabel=f"seconds for {SECONDS} s of audio", ylim=(0, None))
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main(models: list[str]) -> None:
    """Measure the models and write the results."""
    work = Path(os.environ.get("W2V_BENCH_DIR", Path(tempfile.gettempdir()) / "w2v-bench"))
    store = HERE / "results" / "layers.json"
    held = json.loads(store.read_text()) if store.exists() else {}
    results = held.get("models", {})
    for model in models or MODELS:
        results[model] = measure_model(model, work)
        print("\n".join(table({model: results[model]})), flush=True)
    store.write_text(json.dumps({"machine": summary(), "models": results}, indent=2) + "\n")
    lines = ["# Layers", "", "Made by `python benchmarks/layers.py`. Random weights; engine time alone.", ""]
    lines += [f"Machine: {summary()}", "", *table(results), "", "![seconds against the layer](layers.svg)"]
    (HERE / "results" / "layers.md").write_text("\n".join(lines) + "\n")
    plot(results, HERE / "results" / "layers.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
