"""The tables from results/gpu.json.

Without measuring again: ``python benchmarks/gpu_report.py``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
BASELINE = "transformers fp32"
TERA = 1e12


def precision_of(peer: str) -> str:
    """The precision that a peer's name ends in or says before a comma."""
    return peer.partition(",")[0].split()[-1]


def row_table(row: Mapping[str, Any], peaks: Mapping[str, float], skipped: Mapping[str, str]) -> list[str]:
    """Rows of Markdown for one batch."""
    lines = ["| | seconds of audio a second | times as fast | TFLOP/s | of the peak |", "|---|---|---|---|---|"]
    base = statistics.median(row["seconds"][BASELINE])
    for peer, times in row["seconds"].items():
        middle = statistics.median(times)
        rate, peak = row["operations"] / middle, peaks.get(precision_of(peer))
        share = f"{rate / peak:.0%}" if peak else "–"
        lines.append(f"| {peer} | {row['audio'] / middle:,.0f} | {base / middle:.2f} | {rate / TERA:.1f} | {share} |")
    return lines + [f"| {peer} | not run: {reason} | | | |" for peer, reason in skipped.items()]


def accuracy_table(accuracy: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Rows of Markdown: how far each peer's batch of many lengths is from the baseline's single utterances."""
    lines = ["| | min frame cosine | pooled cosine | max abs Δ |", "|---|---|---|---|"]
    for peer, row in accuracy.items():
        cosines = f"{row['frame_cosine']:.6f} | {row['pooled_cosine']:.6f}"
        lines.append(f"| {peer} | {cosines} | {row['difference']:.1e} |")
    return lines


def files_table(files: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Rows of Markdown: audio a second of whole processes, without their start, and of the engine alone."""
    lines = ["| device | whole process | without its start | engine alone | share |", "|---|---|---|---|---|"]
    for device, row in files.items():
        total, start = row["audio"] * row["copies"], row["once"] - (row["again"] - row["once"]) / (row["copies"] - 1)
        whole, steady, alone = (total / seconds for seconds in (row["again"], row["again"] - start, row["alone"]))
        lines.append(f"| {device} | {whole:,.0f} | {steady:,.0f} | {alone:,.0f} | {steady / alone:.0%} |")
    return lines


def report(results: Mapping[str, Any]) -> str:
    """The whole page."""
    machine = "; ".join(f"{name}: {value}" for name, value in results["machine"].items())
    peaks = ", ".join(f"{precision} {rate / TERA:.1f}" for precision, rate in results["peaks"].items())
    lines = ["# On a GPU", "", f"Made by `{results['command']}` on {results['date']}. {machine}.", ""]
    lines += [
        f"Peak measured in large square matrices, TFLOP/s: {peaks}. *Times as fast*: against {BASELINE} in the same",
        "rounds, medians. Operations are those of the valid samples; padding counts for nothing.",
        "",
    ]
    for name, model in results["models"].items():
        for title, row in model["rows"].items():
            lines += [f"## {name}: {title}", "", *row_table(row, results["peaks"], model["skipped"]), ""]
        if model["accuracy"]:
            lines += [f"## {name}: accuracy", ""]
            lines += [f"A batch of many lengths, against {BASELINE} of each utterance alone.", ""]
            lines += [*accuracy_table(model["accuracy"]), ""]
        if model["files"]:
            lines += [f"## {name}: from files to stored vectors, fp16", ""]
            lines += ["Seconds of audio a second, `w2v-embed` on 16 kHz WAV files of 4 s in the mean.", ""]
            lines += [*files_table(model["files"]), ""]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Write gpu.md from the gpu.json beside it."""
    results = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
    (folder / "gpu.md").write_text(report(results), encoding="utf-8")


if __name__ == "__main__":
    write(RESULTS)
