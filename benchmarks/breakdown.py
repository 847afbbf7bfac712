"""Where a warm forward pass spends its time on the processor. Printed, and written to results/breakdown.{json,md}.

    python benchmarks/breakdown.py      # base and large, about two minutes on two cores once they are exported

The first table sums ONNX Runtime's own profile by kind of kernel, for one utterance of 10 s. The second times what
OpenVINO would gain from its compiled graph on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import report
from ceilings import arithmetic
from peers import BUNDLE, RATE
from processes import call
from report import GIGA, MIB
from seeded import MODELS, prepare

from w2v_export.signals import speech_like
from w2v_models import Bundle
from w2v_models.manifest import EMBEDDING, LENGTHS, WAVEFORM
from w2v_runtime.threads.processors import available

SECONDS, FIRST_SECONDS, RUNS, REPEATS = 10, 3, 12, 3
PRODUCTS, ATTENTION, CONVOLUTIONS, OUTSIDE = "products with weights", "attention", "convolutions", "outside kernels"
#: The kernels of ONNX Runtime in each row of the table; those of no row are the last row's.
KERNELS = {
    PRODUCTS: ("MatMul", "FusedMatMul", "Gemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    ATTENTION: ("Attention", "MultiHeadAttention"),
    CONVOLUTIONS: ("Conv", "FusedConv"),
    "GELU": ("Gelu", "BiasGelu", "FastGelu"),
    "norms": ("LayerNormalization", "SkipLayerNormalization", "InstanceNormalization", "GroupNorm"),
    "quantising": ("QuantizeLinear", "ReduceMax", "ReduceMin", "Max", "Div"),
    "sums": ("Add", "Mul", "Sub"),
    "layout": ("Slice", "Pad", "Concat", "Transpose", "Reshape"),
    "all other kernels": (),
}
ROW_OF = {kernel: row for row, kernels in KERNELS.items() for kernel in kernels}


def feeds(seconds: int) -> dict[str, np.ndarray]:
    """One utterance."""
    waveform = speech_like(seconds * RATE, RATE)[None]
    return {WAVEFORM: waveform, LENGTHS: np.array([waveform.shape[1]], np.int64)}


def profile(bundle: Path, precision: str) -> tuple[float, dict[str, float]]:
    """Seconds of a forward pass and of each row of :data:`KERNELS` in it: medians of the faster half of runs.

    The model is opened as ``w2v-embed`` opens it, but with ONNX Runtime's profile.
    """
    import onnxruntime

    from w2v_runtime.engines.choice import open_engine

    class Profiled(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling, self.profile_file_prefix = True, f"{place}/profile"

    with tempfile.TemporaryDirectory() as place:
        onnxruntime.SessionOptions = Profiled
        engine: Any = open_engine(Bundle.open(bundle), "cpu", precision, available())
        audio = feeds(SECONDS)
        for _ in range(RUNS):
            engine.run(audio, [EMBEDDING])
        events = json.loads(Path(engine._sessions.get((EMBEDDING,), "graph").session.end_profiling()).read_text())
    runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["dur"])
    totals = {row: [0.0] * (RUNS // 2) for row in KERNELS}
    for i, run in enumerate(runs[: RUNS // 2]):
        for event in events:
            kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
            if kernel and run["ts"] <= event["ts"] < run["ts"] + run["dur"]:
                totals[ROW_OF.get(event["args"]["op_name"], "all other kernels")][i] += event["dur"] / 1e6
    wall = statistics.median(run["dur"] for run in runs[: RUNS // 2]) / 1e6
    return wall, {row: statistics.median(seconds) for row, seconds in totals.items()}


def measure_kernels(bundle: Path) -> dict[str, Any]:
    """The first table's columns of a model, by precision: the median of processes that take turns, and their range.

    The first convolution is a product in both precisions, the others of the front end in int8 only.
    """
    answers: dict[str, list[tuple[float, dict[str, float]]]] = {"fp32": [], "int8": []}
    for _ in range(REPEATS):
        for precision, found in answers.items():
            found.append(call(profile, bundle, precision))
    parts, columns = arithmetic(Bundle.open(bundle).manifest.architecture, SECONDS * RATE), {}
    for precision, found in answers.items():
        moved = parts["front end"] if precision == "int8" else 0
        operations = {
            PRODUCTS: parts["linear"] + parts["first convolution"] + moved,
            CONVOLUTIONS: parts["positional convolution"] + parts["front end"] - moved,
            ATTENTION: parts["attention"],
        }
        middle, kernels = sorted(found, key=lambda answer: answer[0])[REPEATS // 2]
        rounds = [seconds for seconds, _ in found]
        columns[precision] = {"seconds": middle, "rounds": rounds, "kernels": kernels, "operations": operations}
    return columns


def opening(bundle: Path, precision: str, blob: Path, anew: bool) -> tuple[float, float, float]:
    """Open a graph in OpenVINO, compiled anew as the engine does it, and then written, or mapped from where it was.

    Seconds of opening it, of its first run, and of writing it.
    """
    from w2v_runtime.engines.openvino import OpenVINOEngine
    from w2v_runtime.engines.openvino_graph import read_graph

    engine: Any = OpenVINOEngine(Bundle.open(bundle), precision, available())
    openvino, audio, start = engine._openvino, feeds(FIRST_SECONDS), time.perf_counter()
    if anew:
        graph = read_graph(openvino, bundle / "onnx" / "model.onnx", (EMBEDDING,))
        compiled = openvino.Core().compile_model(graph, "CPU", engine._options)
    else:
        tensor = openvino.Tensor(np.memmap(blob, np.uint8, "c"), shared_memory=True)
        compiled = openvino.Core().import_model(tensor, "CPU", engine._options)
    opened = time.perf_counter()
    compiled.create_infer_request().infer({value.any_name: audio[value.any_name] for value in compiled.inputs})
    ran = time.perf_counter()
    if anew:
        blob.write_bytes(compiled.export_model().getbuffer())
    return opened - start, ran - opened, time.perf_counter() - ran


def measure_openings(bundle: Path) -> dict[str, Any]:
    """The second table's rows of a model, by precision; each opening in a process of its own."""
    rows = {}
    for precision in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as place:
            blob, found = Path(place) / "blob", {"compile": [], "load": [], "writing": []}
            for _ in range(REPEATS):
                *anew, writing = call(opening, bundle, precision, blob, True)
                *loaded, _ = call(opening, bundle, precision, blob, False)
                for name, seconds in (("compile", anew), ("load", loaded), ("writing", writing)):
                    found[name].append(seconds)
            rows[precision] = found | {"bytes": blob.stat().st_size}
    return rows


def kernel_table(models: dict[str, Any]) -> list[str]:
    """Milliseconds and share of each kind of kernel, and the arithmetic of three of them."""
    rows = {row: {"": row} for row in (*KERNELS, OUTSIDE, "forward pass")}
    for name, model in models.items():
        for precision, found in model["kernels"].items():
            wall = found["seconds"]
            outside = max(wall - sum(found["kernels"].values()), 0)
            for row, seconds in {**found["kernels"], OUTSIDE: outside, "forward pass": wall}.items():
                cell = f"{seconds * 1e3:.0f} ms, {seconds / wall:.0%}" if seconds >= 5e-4 else "–"
                if operations := found["operations"].get(row):
                    cell += f", {operations / seconds / GIGA:.0f} GFLOP/s"
                rows[row][f"{name} {precision}"] = cell
            if rounds := found.get("rounds"):
                rows["forward pass"][f"{name} {precision}"] += f" ({min(rounds) * 1e3:.0f}–{max(rounds) * 1e3:.0f} ms)"
    return report.table([*rows.values()])


def opening_table(models: dict[str, Any]) -> list[str]:
    """Opening and first run, with and without a compiled graph on disk, and what that one costs."""
    rows = []
    for name, found in models.items():
        for precision, row in found["openings"].items():
            cells = {"": f"{name} {precision}"}
            for way, title in (("compile", "compiled anew"), ("load", "from disk")):
                opened, first = np.atleast_2d(row[way]).T  # the best alone was kept once
                cells[title] = f"{report.spread(opened)} + {report.spread(first)} s"
            writing = report.spread(np.atleast_1d(row["writing"]), ".1f")
            rows.append(cells | {"file": f"{row['bytes'] / MIB:.0f} MiB", "written in": f"{writing} s"})
    return report.table(rows)


def measure(name: str) -> dict[str, Any]:
    """Both tables' figures of a model."""
    bundle = prepare(name, BUNDLE) / BUNDLE
    return {"kernels": measure_kernels(bundle), "openings": measure_openings(bundle)}


def main(options: argparse.Namespace) -> None:
    """Measure both models and write the page."""
    models = report.records(options, "breakdown", MODELS, measure)
    said = (
        "Made by `python benchmarks/breakdown.py`. Seeded weights at true size. Medians of processes, in brackets "
        "their range; without brackets, the best of three."
    )
    kernels = (
        f"Forward passes with the profile on: the faster half of {RUNS}. Attention is computed in fp32 in both "
        "precisions. The ceiling of products stands in [cpu.md](cpu.md); what remains is attention, the positional "
        "convolution, and passes over memory that are each a few hundredths of the time. A faster forward pass would "
        "need kernels that ONNX Runtime does not have, attention in int8 or bf16 before all."
    )
    openings = (
        "The engine compiles anew. The file would be as large as the model, once for each precision, machine and set "
        "of outputs, and pays back its writing only after several starts. OpenVINO's own cache (`CACHE_DIR`) opens no "
        "faster than compiling, since it reads all weights to know them again."
    )
    lines = report.head("Where the time goes on a processor", said, models)
    lines += [f"## Kernels of ONNX Runtime, one utterance of {SECONDS} s", "", *kernel_table(models), ""]
    lines += [*report.wrapped(kernels), "", "## OpenVINO's compiled graph on disk", ""]
    lines += [f"Opening and the first run, of {FIRST_SECONDS} s of audio.", "", *opening_table(models), ""]
    report.write(options.output, "breakdown", lines + report.wrapped(openings))


if __name__ == "__main__":
    main(report.parser(__doc__).parse_args())
