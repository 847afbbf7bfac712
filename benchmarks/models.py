"""Each family at its true size, exported and verified with seeded weights. Writes results/models.{json,md}.

    python benchmarks/models.py [MODEL ...]     # an hour on two cores, 20 GB of memory and of disk

Each export and each verification is a process of its own; bundles are removed once they are verified.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import report
from processes import W2V_EXPORT, W2V_MODELS, command, run, work_folder
from report import GIB, GIGA

from w2v_models import CATALOGUE, Bundle
from w2v_models.catalogue import Variant

HERE = Path(__file__).resolve().parent
MODELS = (
    "facebook/wav2vec2-base-960h",
    "facebook/wav2vec2-large-robust",
    "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim",
    "facebook/hubert-base-ls960",
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
    "facebook/wav2vec2-xls-r-2b",
)
BEGIN, END = "<!-- benchmarks/models.py writes this table -->", "<!-- end of the table -->"


def measure(model: str) -> dict[str, Any]:
    """Export and verify a model; what its manifest says of it."""
    with tempfile.TemporaryDirectory(dir=work_folder()) as place:
        bundle = Path(place) / "bundle"
        export = run(command(W2V_EXPORT, "--model", model, "--random-weights", "--output", bundle))
        run(command(W2V_MODELS, "verify", bundle))
        manifest = Bundle.open(bundle).manifest
        size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    worst: dict[str, float] = {}
    for row in manifest.precisions["fp32"].parity:
        found = row.max_rel if row.output == "layers" else row.max_abs
        worst[row.output] = max(found, worst.get(row.output, 0))
    return {
        "family": manifest.architecture.model_type,
        "layers": manifest.architecture.layers,
        "hidden": manifest.architecture.hidden_size,
        "worst": worst,
        "bytes": size,
        "export_seconds": export.seconds,
        "export_peak": export.peak,
    }


def shape(variant: Variant) -> tuple[str, str, str]:
    """What checkpoints share whose figures are the same: family, size as shown, and all of config and extractor."""
    config = variant.config
    size = f"{config['num_hidden_layers']} × {config['hidden_size']}"
    if "adapter_attn_dim" in config:
        size += f" + adapters of {config['adapter_attn_dim']}"
    return variant.model_type, size, json.dumps([config, variant.extractor, variant.labels], sort_keys=True)


def groups() -> dict[tuple[str, str, str], list[Variant]]:
    """The catalogue's checkpoints by what makes their figures the same."""
    found: dict[tuple[str, str, str], list[Variant]] = {}
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
        lines.append(f"| {key[0]} | {names} | {key[1]} | {figure} |")
    return lines


def readme_table(results: dict[str, dict[str, object]]) -> list[str]:
    """The README's table: a row a family, with the largest differences of its sizes that were measured."""
    lines = ["| family | for example | sizes (layers × size) | frames, pooled: max abs Δ |", "|---|---|---|---|"]
    for family in dict.fromkeys(variant.model_type for variant in CATALOGUE):
        variants = [variant for variant in CATALOGUE if variant.model_type == family]
        sizes = dict.fromkeys(key[1] for key in groups() if key[0] == family)
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


def main(options: argparse.Namespace) -> None:
    """Measure the models and write the tables; figures of other models stay."""
    write_tables(report.records(options, "models", options.models, measure), options.output)


def write_tables(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write models.md; where that is the published one, the tables in docs/models.md and the README too."""
    if folder == report.RESULTS:
        write_pages(results)
    said = (
        "Made by `python benchmarks/models.py`. Seeded random weights. Largest |Δ| against PyTorch over the parity "
        "cases, alone and batched (layers: relative to the largest value)."
    )
    stored = {model: results[model] for model in MODELS if model in results}
    rows = [
        {
            "model": model,
            "family": result["family"],
            "layers": f"{result['layers']}",
            "size": f"{result['hidden']}",
            **{output: f"{result['worst'][output]:.1e}" for output in ("frames", "pooled")},
            "layers Δ": f"{result['worst']['layers']:.1e}",
            "bundle": f"{result['bytes'] / GIGA:.2f} GB",
            "export": f"{result['export_seconds']:.0f} s",
            "peak memory": f"{result['export_peak'] / GIB:.1f} GiB",
        }
        for model, result in stored.items()
    ]
    report.write(folder, "models", report.head("Models at their true size", said, stored) + report.table(rows))


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    main(parser.parse_args())
