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

from machine import summary

from w2v_models import CATALOGUE
from w2v_models.catalogue import Variant

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
BEGIN, END = "<!-- benchmarks/models.py writes this table -->", "<!-- end of the table -->"
_EXPORT = "import sys; from w2v_export.cli import main; main()"
_VERIFY = "import sys; from w2v_runtime.commands.models import main; main()"


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


def shape(variant: Variant) -> tuple[object, ...]:
    """What checkpoints share whose figures are the same: their family and size."""
    config = variant.config
    sizes = config["num_hidden_layers"], config["hidden_size"], config.get("position_embeddings_type")
    return variant.model_type, *sizes, variant.labels


def groups() -> dict[tuple[object, ...], list[Variant]]:
    """The catalogue's checkpoints by what makes their figures the same."""
    found: dict[tuple[object, ...], list[Variant]] = {}
    for variant in CATALOGUE:
        found.setdefault(shape(variant), []).append(variant)
    return found


def models_table(results: dict[str, dict[str, object]]) -> list[str]:
    """The table of docs/models.md: every checkpoint of the catalogue, by family and size, with the figure of one."""
    measured = {shape(variant): results[variant.id] for variant in CATALOGUE if variant.id in results}
    lines = ["| family | checkpoints (licence) | layers × size | frames, pooled: max abs Δ |", "|---|---|---|---|"]
    for key, variants in groups().items():
        names = "<br>".join(f"{variant.id} ({variant.licence})" for variant in variants)
        worst = measured[key]["worst"] if key in measured else None
        figure = f"{worst['frames']:.1e}, {worst['pooled']:.1e}" if worst else "not measured"
        lines.append(f"| {key[0]} | {names} | {key[1]} × {key[2]} | {figure} |")
    return lines


def readme_table(results: dict[str, dict[str, object]]) -> list[str]:
    """The README's table: a row a family, with the largest differences of its sizes that were measured."""
    lines = ["| family | for example | sizes (layers × size) | frames, pooled: max abs Δ |", "|---|---|---|---|"]
    for family in dict.fromkeys(variant.model_type for variant in CATALOGUE):
        variants = [variant for variant in CATALOGUE if variant.model_type == family]
        sizes = dict.fromkeys(f"{key[1]} × {key[2]}" for key in groups() if key[0] == family)
        worst = [results[variant.id]["worst"] for variant in variants if variant.id in results]
        frames, pooled = (f"{max(row[output] for row in worst):.1e}" for output in ("frames", "pooled"))
        lines.append(f"| {family} | {variants[0].id} | {', '.join(sizes)} | {frames}, {pooled} |")
    return lines


def write_pages(results: dict[str, dict[str, object]]) -> None:
    """Put the tables between their two marks in docs/models.md and in the README."""
    root = HERE.parent
    for path, table in ((root / "docs" / "models.md", models_table), (root / "README.md", readme_table)):
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        path.write_text("\n".join([before + BEGIN, "", *table(results), "", END + after]), encoding="utf-8")


def main(models: list[str]) -> None:
    """Measure the models and write the tables; with ``--tables`` only these."""
    if models == ["--tables"]:
        write_tables(json.loads((HERE / "results" / "models.json").read_text()))
        return
    store = HERE / "results" / "models.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for model in models or MODELS:
        with tempfile.TemporaryDirectory(dir=os.environ.get("W2V_BENCH_DIR")) as folder:
            results[model] = {"machine": summary()} | measure(model, Path(folder) / "bundle")
        print(model, results[model], flush=True)
        store.write_text(json.dumps(results, indent=2) + "\n")
    write_tables(results)


def write_tables(results: dict[str, dict[str, object]]) -> None:
    """Write results/models.md, and the tables in docs/models.md and in the README."""
    write_pages(results)
    lines = ["# Models at their true size", "", "Made by `python benchmarks/models.py`. Seeded random weights.", ""]
    lines += [
        "max |Δ| against PyTorch over the parity cases, alone and batched (layers: relative to the largest value).",
        "",
        f"Machine: {summary()}",
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
