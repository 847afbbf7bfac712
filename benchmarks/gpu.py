"""Everything that embeds speech on an NVIDIA GPU, side by side. Printed, and written to results/gpu.{json,md}.

    python benchmarks/gpu.py                                    # base and large, about fifteen minutes on one H200
    python benchmarks/gpu.py --quick --models base              # fewer peers, rows and rounds, about four minutes
    python benchmarks/gpu.py --device cpu --output FOLDER       # the same rows where there is no GPU, with less audio

It needs a GPU, PyTorch with CUDA, transformers, this package with onnxruntime-gpu, and no network: weights are seeded.
Nothing may run beside it. Results are written after each row, so that a run cut short keeps what it had.

Warm forward passes of batches, from samples in host memory to vectors in host memory, are taken in rounds in which
every peer has one turn. Beside them stands what the GPU multiplies in large square matrices: its peak, measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comparison
import numpy as np
import report
from ceilings import torch_product
from comparison import peer_table
from corpus import engine_alone
from peers import BASELINE, CHECKPOINT, FP16_BUNDLE, GPU_PEERS, TRIAL_PEERS, Turns
from processes import W2V_EMBED, call, command, run, work_folder
from report import GIGA
from seeded import MODELS, lognormal, prepare, utterances, write_recordings

from w2v_models import Bundle
from w2v_runtime.threads.processors import available

TERA, MEDIAN_SECONDS = 1e12, 3.5
PEERS = {"cuda": GPU_PEERS, "cpu": TRIAL_PEERS}
PRECISIONS = {"cuda": ("fp32", "tf32", "bf16", "fp16"), "cpu": ("fp32",)}


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Utterances of 10 s in the batches, seconds of those in the batch of many lengths, rounds, files, how often these are
    embedded, and the size of the matrices.
    """

    batches: tuple[int, ...]
    mixed: list[float]
    rounds: int
    files: int
    copies: int
    square: int


MIXED = np.linspace(2, 16, 24).tolist()
SCALES = {
    "cuda": Scale((1, 8, 48), MIXED, 5, 450, 8, 8192),
    "quick": Scale((8, 48), MIXED, 2, 450, 4, 8192),
    "cpu": Scale((1, 2), [1, 2.5, 4], 1, 8, 2, 1024),
}


def describe(device: str) -> tuple[str, int]:
    """The device in its maker's words, and how many of it are here."""
    import torch

    return ("the processor", 1) if device == "cpu" else (torch.cuda.get_device_name(device), torch.cuda.device_count())


def peak(device: str, precision: str, size: int) -> float:
    """Operations a second that PyTorch reaches in square matrices: the fastest of many turns."""
    import torch

    product, times = torch_product((size, size, size), available(), precision, device), []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(10):
            product()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 10 * 2 * size**3 / min(times)


def measure(result: dict[str, Any], name: str, device: str, scale: Scale, gpus: int) -> Iterator[None]:
    """All rows of a model, into ``result``; yields after each."""
    folder, skipped = prepare(name, CHECKPOINT, FP16_BUNDLE), result["skipped"]
    bundle, many = folder / FP16_BUNDLE, scale.batches[-2]
    architecture = Bundle.open(bundle).manifest.architecture
    batches = {f"{count} × 10 s, pooled": (utterances([10] * count), "utterance") for count in scale.batches}
    batches[f"{many} × 10 s, frames"] = utterances([10] * many), "frame"
    batches[f"{len(scale.mixed)} of many lengths, pooled"] = utterances(scale.mixed), "utterance"
    entrants = {peer: (Turns, definition.open, folder, available()) for peer, definition in PEERS[device].items()}
    with comparison.opened(entrants, skipped) as workers:
        for title, (audio, level) in batches.items():
            near = comparison.accuracy(workers, audio, skipped)
            row = comparison.forward(workers, (audio, level), scale.rounds, architecture, skipped)
            result["rows"][title] = row | {"accuracy": near}
            yield
    for place in [device] if gpus == 1 else [device, ",".join(f"cuda:{i}" for i in range(gpus))]:
        result["files"][place] = measure_files(bundle, scale, place)
        yield


def measure_files(bundle: Path, scale: Scale, device: str) -> dict[str, float]:
    """Whole processes over so many files, and over several times as many, and the engine alone over these."""
    work, durations, walls = work_folder(), lognormal(scale.files, MEDIAN_SECONDS), []
    for copies in (1, scale.copies):
        files = write_recordings(work / f"gpu-{scale.files * copies}", durations * copies)
        place = ("--device", device, "--precision", "fp16", "-o", work / "gpu.npz", "--overwrite", "--no-progress")
        walls.append(run(command(W2V_EMBED, files, "-m", bundle, *place)).seconds)
    alone = call(engine_alone, bundle, files, device, "fp16")
    return {"audio": sum(durations), "copies": scale.copies, "once": walls[0], "again": walls[1], "alone": alone}


def files_table(files: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Audio a second of whole processes, without their start, and of the engine alone."""
    rows = []
    for device, row in files.items():
        total, start = row["audio"] * row["copies"], row["once"] - (row["again"] - row["once"]) / (row["copies"] - 1)
        whole, steady, alone = (total / seconds for seconds in (row["again"], row["again"] - start, row["alone"]))
        cells = {"device": device, "whole process": f"{whole:,.0f}", "without its start": f"{steady:,.0f}"}
        rows.append(cells | {"engine alone": f"{alone:,.0f}", "share": f"{steady / alone:.0%}"})
    return report.table(rows)


def write(folder: Path, shown: bool) -> None:
    """Write gpu.md from the gpu.json beside it."""
    results = report.load(folder, "gpu")
    peaks = ", ".join(f"{precision} {rate / TERA:.1f}" for precision, rate in results["peaks"].items())
    said = (
        f"Made by `{results['command']}` on {results['date']}, on {results['device']}. Peak measured in large square "
        f"matrices, TFLOP/s: {peaks}. Medians of rounds, in brackets their range. *Times as fast*: against {BASELINE} "
        "in the same rounds. Operations are those of the valid samples; padding counts for nothing. Cosines and "
        f"differences: the row's batch, against {BASELINE} of each utterance alone."
    )
    lines = report.head("On a GPU", said, {"": results})
    ceilings = {precision: rate / GIGA for precision, rate in results["peaks"].items()}
    for name, model in results["models"].items():
        for title, row in model["rows"].items():
            lines += [f"## {name}: {title}", ""]
            lines += [*peer_table(PEERS[results["kind"]], row, model["skipped"], row["accuracy"], ceilings), ""]
        if model["files"]:
            lines += [f"## {name}: from files to stored vectors, fp16", ""]
            lines += ["Seconds of audio a second, `w2v-embed` on 16 kHz WAV files of 4 s in the mean.", ""]
            lines += [*files_table(model["files"]), ""]
    report.write(folder, "gpu", lines, shown)


def main(options: argparse.Namespace) -> None:
    """Measure what is asked for and write the results."""
    device, quick = options.device, options.quick
    scale = SCALES["quick" if quick and device == "cuda" else device]
    if not options.tables:
        work_folder()
        title, gpus = call(describe, device)
        peaks = {precision: call(peak, device, precision, scale.square) for precision in PRECISIONS[device]}
        results = report.origin() | {"device": title, "kind": device, "peaks": peaks, "models": {}}
        for name in options.models:
            skipped = {peer: "not in a quick run" for peer, its in PEERS[device].items() if quick and its.full}
            results["models"][name] = {"skipped": skipped, "rows": {}, "files": {}}
            for _ in measure(results["models"][name], name, device, scale, gpus):
                report.save(options.output, "gpu", results)
                write(options.output, shown=False)
    write(options.output, shown=True)


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("--device", choices=PEERS, default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer peers, rows and rounds")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    given = parser.parse_args()
    if given.device == "cpu" and given.output == report.RESULTS:
        parser.error("figures of a processor do not go to results/: give another folder with --output")
    main(given)
