"""Each family at its true size, exported and verified with seeded weights. Writes results/models.{json,md}.

    python benchmarks/models.py [MODEL ...]     # half an hour on two cores, 20 GB of memory and of disk

Each export and each verification is a process of its own; bundles are removed once they are verified.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from corpus import machine

HERE = Path(__file__).resolve().parent
MODELS = (
    "facebook/wav2vec2-base-960h",
    "facebook/wav2vec2-large-robust",
    "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim",
    "facebook/hubert-large-ll60k",
    "ntu-spml/distilhubert",
    "microsoft/wavlm-base-plus",
    "microsoft/wavlm-large",
    "microsoft/unispeech-large-1500h-cv",
    "microsoft/unispeech-sat-base",
    "facebook/data2vec-audio-base",
    "facebook/wav2vec2-conformer-rel-pos-large",
    "facebook/wav2vec2-conformer-rope-large-960h-ft",
    "facebook/w2v-bert-2.0",
    "facebook/mms-1b-all",
)
_EXPORT = "import sys; from w2v_export.cli import main; main()"
_VERIFY = "import sys; from w2v_runtime.models_cli import main; main()"


def run(code: str, *arguments: str) -> tuple[float, int]:
    """Run a command as a process: (wall seconds, peak memory in bytes)."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed.")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def measure(model: str, bundle: Path) -> dict[str, object]:
    """Export and verify a model; what its manifest says of it."""
    seconds, peak = run(_EXPORT, "--model", model, "--random-weights", "--overwrite", "--output", str(bundle))
    run(_VERIFY, "verify", str(bundle))
    manifest = json.loads((bundle / "manifest.json").read_text())
    rows = manifest["precisions"]["fp32"]["parity"]
    worst = {
        output: max(row["max_rel" if output == "layers" else "max_abs"] for row in rows if row["output"] == output)
        for output in {row["output"] for row in rows}
    }
    architecture = manifest["architecture"]
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    return {
        "family": architecture["model_type"],
        "layers": architecture["layers"],
        "hidden": architecture["hidden_size"],
        "worst": worst,
        "bytes": size,
        "export_seconds": seconds,
        "export_peak": peak,
    }


def main(models: list[str]) -> None:
    """Measure the models and write the table."""
    store = HERE / "results" / "models.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for model in models or MODELS:
        with tempfile.TemporaryDirectory(dir=os.environ.get("W2V_BENCH_DIR")) as folder:
            results[model] = {"machine": machine()} | measure(model, Path(folder) / "bundle")
        print(model, results[model], flush=True)
        store.write_text(json.dumps(results, indent=2) + "\n")
    lines = ["# Models at their true size", "", "Made by `python benchmarks/models.py`. Seeded random weights.", ""]
    lines += [
        "max |Δ| against PyTorch over the parity cases, alone and batched (layers: relative to the largest value).",
        "",
        f"Machine: {machine()}",
        "",
        "| model | family | layers | size | frames | pooled | layers Δ | bundle | export | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        if (result := results.get(model)) is None:
            continue
        worst = result["worst"]
        lines.append(
            f"| {model} | {result['family']} | {result['layers']} | {result['hidden']} | {worst['frames']:.1e} "
            f"| {worst['pooled']:.1e} | {worst['layers']:.1e} | {result['bytes'] / 1e9:.2f} GB "
            f"| {result['export_seconds']:.0f} s | {result['export_peak'] / 2**30:.1f} GiB |"
        )
    (HERE / "results" / "models.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
