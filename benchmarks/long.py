"""Long recordings embedded whole: against transformers, and against windows. Writes results/long.{json,md}.

    python benchmarks/long.py                   # about twenty minutes on two cores
    python benchmarks/long.py base-60           # or one figure

Every figure is of a process of its own. The model is open and has embedded some seconds before memory and time count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report
from ceilings import arithmetic
from peers import BASELINE, BUNDLE, CHECKPOINT, PEERS, RATE, Array
from processes import call, work_folder
from report import GIB
from seeded import prepare

from w2v_export.signals import speech_like
from w2v_models.manifest import Architecture
from w2v_runtime import Embedder
from w2v_runtime.embedding.parity import difference
from w2v_runtime.embedding.windows import Windowing
from w2v_runtime.threads.processors import available

#: Seconds of a recording, and how often it is embedded.
LENGTHS = {60: 5, 300: 1}
MODELS = ("base", "large")
EVERY = [f"{model}-{seconds}" for model in MODELS for seconds in LENGTHS]
#: Seconds that are embedded before anything counts.
_WARM = 45


def measured(embed: Callable[[Array], Array], seconds: int, times: int, output: Path) -> dict[str, Any]:
    """Seconds of each turn and the peak memory above the open model in bytes; the frames go to ``output``."""
    embed(speech(_WARM))
    waveform = speech(seconds)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back
    turns = []
    for _ in range(times):
        start = time.perf_counter()
        frames = embed(waveform)
        turns.append(time.perf_counter() - start)
    peak = _memory("VmHWM") - before
    np.save(output, frames)
    return {"seconds": turns, "peak": peak}


def transformers(folder: Path, seconds: int, times: int, output: Path) -> dict[str, Any]:
    """The recipe on the whole recording."""
    embed = PEERS[BASELINE].open(folder, available())
    return measured(lambda waveform: embed([waveform], "frame")[0], seconds, times, output)


def ours(folder: Path, seconds: int, times: int, output: Path, whole: float) -> dict[str, Any]:
    """This package with recordings up to ``whole`` seconds embedded whole."""
    embedder = Embedder(folder / BUNDLE, "cpu", windowing=Windowing(whole=whole))
    return measured(lambda waveform: embedder.embed((waveform, RATE), level="frame").values, seconds, times, output)


def speech(seconds: int) -> Array:
    """Speech-like audio without a repetition."""
    return speech_like(seconds * RATE, RATE, seed=seconds)


def _memory(name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def measure(name: str) -> dict[str, Any]:
    """One model and length: transformers and this package whole, and this package in windows."""
    model, length = name.split("-")
    seconds, work = int(length), work_folder()
    folder = prepare(model, CHECKPOINT, BUNDLE)
    entrants: dict[str, tuple[Any, ...]] = {
        "transformers": (transformers, folder, seconds, LENGTHS[seconds], work / "transformers.npy"),
        "whole": (ours, folder, seconds, LENGTHS[seconds], work / "whole.npy", seconds),
        "windows": (ours, folder, seconds, LENGTHS[seconds], work / "windows.npy", 0),
    }
    figures: dict[str, Any] = {key: call(*entrant) for key, entrant in entrants.items()}
    expected = np.load(work / "transformers.npy").astype(np.float64)
    for key in ("whole", "windows"):
        frames = np.load(work / f"{key}.npy").astype(np.float64)
        figures[key]["frames"] = difference(frames, expected)
        figures[key]["pooled"] = difference(frames.mean(0)[None], expected.mean(0)[None])
    architecture = Embedder(folder / BUNDLE, "cpu").manifest.architecture
    figures["operations"] = {"whole": operations(architecture, seconds), "windows": windowed(architecture, seconds)}
    return figures


def operations(architecture: Architecture, seconds: float) -> int:
    """Additions and multiplications for a whole recording."""
    return sum(arithmetic(architecture, round(seconds * RATE)).values())


def windowed(architecture: Architecture, seconds: float) -> int:
    """The same in the default windows: features once, the encoder once more for the context."""
    windowing, total = Windowing(), 0
    parts = arithmetic(architecture, round(seconds * RATE))
    total = parts["front end"] + parts["first convolution"]
    for first in np.arange(0, seconds, windowing.window):
        begin, end = max(0.0, first - windowing.context), min(seconds, first + windowing.window + windowing.context)
        part = arithmetic(architecture, round((end - begin) * RATE))
        total += part["linear"] + part["positional convolution"] + part["attention"]
    return total


def main(options: argparse.Namespace) -> None:
    """Measure the named figures and write the page of all."""
    chosen = EVERY if "all" in options.figures else options.figures
    results = report.records(options, "long", chosen, measure)
    stored = {name: results[name] for name in EVERY if name in results}
    said = (
        "Made by `python benchmarks/long.py`: frames of one recording of speech-like audio, fp32, seeded weights. "
        f"Memory is the peak above that of the open model, which has embedded {_WARM} s. Differences are from "
        "transformers on the whole recording. Arithmetic counts products, those of attention among them."
    )
    rows = []
    for name, figures in stored.items():
        model, seconds = name.split("-")
        theirs = statistics.median(figures["transformers"]["seconds"])
        for key, title in (("transformers", "transformers, whole"), ("whole", "whole"), ("windows", "windows")):
            entry = figures[key]
            own = statistics.median(entry["seconds"])
            row = {
                "": f"{model}, {seconds} s: {title}",
                "seconds": report.spread(entry["seconds"]),
                "times as fast": f"{theirs / own:.2f}",
                "peak above the model": f"{entry['peak'] / GIB:.2f} GiB",
            }
            if key != "transformers":
                row["frames max abs Δ"], row["pooled max abs Δ"] = (f"{entry[x][0]:.1e}" for x in ("frames", "pooled"))
                row["min frame cosine"] = f"{entry['frames'][2]:.7f}"
                row["GFLOP/s"] = f"{figures['operations'][key] / own / report.GIGA:.0f}"
            rows.append(row)
    lines = [*report.head("Long recordings, whole", said, stored), *report.table(rows), ""]
    for name, figures in stored.items():
        whole, windows = (statistics.median(figures[key]["seconds"]) for key in ("whole", "windows"))
        share = figures["operations"]["whole"] / figures["operations"]["windows"]
        model, seconds = name.split("-")
        lines += report.wrapped(
            f"- {model}, {seconds} s: whole takes {whole / windows:.2f} × the time of windows, for {share:.2f} × the "
            f"arithmetic: {whole / windows / share:.2f} × its share."
        )
    report.write(options.output, "long", lines)


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("figures", nargs="*", choices=["all", *EVERY], default="all")
    main(parser.parse_args())
