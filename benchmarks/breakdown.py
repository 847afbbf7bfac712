"""Where a warm forward pass spends its time on the processor. Printed, and written to results/breakdown.{json,md}.

    python benchmarks/breakdown.py      # base and large, about two minutes on two cores once cpu.py has exported them

The first table sums ONNX Runtime's own profile by kind of kernel, for one utterance of 10 s. The second times what
OpenVINO would gain from its compiled graph on disk.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import seeded
from ceilings import conv_lengths, operations, product_operations
from cpu import MODELS, set_environment
from machine import summary
from workers import Worker

from w2v_export.signals import speech_like
from w2v_models import Bundle
from w2v_models.manifest import EMBEDDING, LENGTHS, WAVEFORM, Architecture
from w2v_runtime.threads.processors import available

RESULTS = Path(__file__).resolve().parent / "results"
RATE, SECONDS, FIRST_SECONDS = 16000, 10, 3
RUNS, REPEATS = 12, 3
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
OTHER = list(KERNELS)[-1]
PRECISIONS = ("fp32", "int8")
HINTS = {"fp32": "f32", "bf16": "bf16"}


class Profile:
    """A model opened as ``w2v-embed`` opens it, and with ONNX Runtime's profile."""

    def __init__(self, bundle: Path, precision: str) -> None:
        import onnxruntime

        from w2v_runtime.engines.choice import open_engine

        class Profiled(onnxruntime.SessionOptions):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.enable_profiling = True
                self.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "profile")

        onnxruntime.SessionOptions = Profiled
        self._engine: Any = open_engine(Bundle.open(bundle), "cpu", precision, available())

    def measure(self) -> tuple[float, dict[str, float]]:
        """Seconds of a forward pass and of each row of :data:`KERNELS` in it: medians of the faster half of runs."""
        waveform = speech_like(SECONDS * RATE, RATE)[None]
        feeds = {WAVEFORM: waveform, LENGTHS: np.array([waveform.shape[1]], np.int64)}
        for _ in range(RUNS):
            self._engine.run(feeds, [EMBEDDING])
        path = Path(self._engine._sessions.get((EMBEDDING,), "graph").session.end_profiling())
        events = json.loads(path.read_text())
        path.unlink()
        runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["dur"])
        runs = runs[: RUNS // 2]
        kernels = _kernels([event for event in events if _is_kernel(event)], runs)
        return statistics.median(run["dur"] for run in runs) / 1e6, kernels


def _is_kernel(event: dict[str, Any]) -> bool:
    return event.get("cat") == "Node" and event["name"].endswith("_kernel_time")


def _kernels(events: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, float]:
    """The median over runs of the seconds of each row."""
    rows = {kernel: row for row, kernels in KERNELS.items() for kernel in kernels}
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(runs))
    for i, run in enumerate(runs):
        for event in events:
            if run["ts"] <= event["ts"] < run["ts"] + run["dur"]:
                totals[rows.get(event["args"]["op_name"], OTHER)][i] += event["dur"] / 1e6
    return {row: statistics.median(totals[row]) for row in KERNELS if row in totals}


class Opening:
    """What opens a bundle's graph in OpenVINO: compiled anew as the engine does it, or its compiled form on disk."""

    def __init__(self, bundle: Path, hint: str, blob: Path) -> None:
        self._graph, self._blob = bundle / "onnx" / "model.onnx", blob
        self._options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": available()}
        self._options |= {"PERFORMANCE_HINT": "LATENCY"}

    def compile(self) -> tuple[float, float]:
        """Seconds of compiling the graph, and of the first run."""
        from w2v_runtime.engines.openvino import load
        from w2v_runtime.engines.openvino_graph import read_graph

        openvino = load()
        return self._timed(
            lambda core: core.compile_model(read_graph(openvino, self._graph, (EMBEDDING,)), "CPU", self._options)
        )

    def load(self) -> tuple[float, float]:
        """Seconds of opening the compiled graph as memory mapped from disk, and of the first run."""
        from w2v_runtime.engines.openvino import load

        openvino = load()
        mapped = np.memmap(self._blob, np.uint8, "c")
        tensor = openvino.Tensor(mapped, shared_memory=True)
        return self._timed(lambda core: core.import_model(tensor, "CPU", self._options))

    def write(self) -> tuple[float, int]:
        """Compile the graph and write it: seconds of the writing, and bytes."""
        from w2v_runtime.engines.openvino import load
        from w2v_runtime.engines.openvino_graph import read_graph

        openvino = load()
        graph = read_graph(openvino, self._graph, (EMBEDDING,))
        compiled = openvino.Core().compile_model(graph, "CPU", self._options)
        start = time.perf_counter()
        self._blob.write_bytes(compiled.export_model().getbuffer())
        return time.perf_counter() - start, self._blob.stat().st_size

    def _timed(self, open_graph: Callable[[Any], Any]) -> tuple[float, float]:
        from w2v_runtime.engines.openvino import load

        samples = FIRST_SECONDS * RATE
        feeds = {WAVEFORM: speech_like(samples, RATE)[None], LENGTHS: np.array([samples], np.int64)}
        start = time.perf_counter()
        compiled = open_graph(load().Core())
        opened = time.perf_counter()
        request = compiled.create_infer_request()
        request.infer({value.any_name: feeds[value.any_name] for value in compiled.inputs})
        return opened - start, time.perf_counter() - opened


def measure_kernels(bundle: Path) -> dict[str, Any]:
    """The first table's columns of a model, by precision: the fastest of processes that take turns."""
    found: dict[str, list[tuple[float, dict[str, float]]]] = {precision: [] for precision in PRECISIONS}
    for _ in range(REPEATS):
        for precision, answers in found.items():
            with Worker(Profile, bundle, precision) as worker:
                answers.append(worker.ask("measure"))
            print(f"{bundle.parent.name} {precision}: {answers[-1][0]:.3f} s", flush=True)
    architecture, columns = Bundle.open(bundle).manifest.architecture, {}
    for precision, answers in found.items():
        wall, kernels = min(answers, key=lambda answer: answer[0])
        columns[precision] = {"seconds": wall, "kernels": kernels, "operations": _operations(architecture, precision)}
    return columns


def _operations(architecture: Architecture, precision: str) -> dict[str, int]:
    """Additions and multiplications of three rows; see :func:`ceilings.operations`.

    The first convolution is a product in both precisions, the others of the front end in int8 only.
    """
    samples, conv = SECONDS * RATE, architecture.conv
    first, *_, frames = lengths = conv_lengths(architecture, samples)
    front_end = sum(
        2 * lengths[i] * conv.kernels[i] * conv.channels[i - 1] * conv.channels[i] for i in range(1, len(lengths))
    )
    attention = architecture.layers * 4 * frames * frames * architecture.hidden_size
    products = product_operations(architecture, samples) + 2 * first * conv.kernels[0] * conv.channels[0]
    positional = operations(architecture, samples) - products - attention
    moved = 0 if precision == "int8" else front_end
    return {PRODUCTS: products - moved, CONVOLUTIONS: positional + moved, ATTENTION: attention}


def measure_openings(bundle: Path) -> dict[str, Any]:
    """The second table's rows of a model, by precision; each opening in a process of its own, the best of three."""
    rows = {}
    for precision, hint in HINTS.items():
        with tempfile.TemporaryDirectory() as folder:
            arguments = (Opening, bundle, hint, Path(folder) / "blob")
            with Worker(*arguments) as worker:
                written, size = worker.ask("write")
            found: dict[str, list[tuple[float, float]]] = {"compile": [], "load": []}
            for _ in range(REPEATS):
                for way, times in found.items():
                    with Worker(*arguments) as worker:
                        times.append(worker.ask(way))
        rows[precision] = {way: min(times, key=sum) for way, times in found.items()} | {
            "writing": written,
            "bytes": size,
        }
        print(f"{bundle.parent.name} {precision}: {rows[precision]}", flush=True)
    return rows


def kernel_table(models: dict[str, Any]) -> list[str]:
    """Rows of Markdown: milliseconds and share of each kind of kernel, and the arithmetic of three of them."""
    columns = [(model, precision) for model in models for precision in PRECISIONS]
    lines = [
        "| |" + "".join(f" {model} {precision} |" for model, precision in columns),
        "|---|" + "---|" * len(columns),
    ]
    for row in (*KERNELS, OUTSIDE, "forward pass"):
        cells = []
        for model, precision in columns:
            found = models[model]["kernels"][precision]
            wall, kernels = found["seconds"], found["kernels"]
            outside = max(wall - sum(kernels.values()), 0)
            seconds = {**dict.fromkeys(KERNELS, 0.0), **kernels, OUTSIDE: outside, "forward pass": wall}[row]
            cell = f"{seconds * 1e3:.0f} ms, {seconds / wall:.0%}" if seconds >= 5e-4 else "–"
            if arithmetic := found["operations"].get(row):
                cell += f", {arithmetic / seconds / 1e9:.0f} GFLOP/s"
            cells.append(cell)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def opening_table(models: dict[str, Any]) -> list[str]:
    """Rows of Markdown: opening and first run, with and without a compiled graph on disk, and what that one costs."""
    lines = ["| | compiled anew | from disk | file | written in |", "|---|---|---|---|---|"]
    for model, found in models.items():
        for precision, row in found["openings"].items():
            anew, loaded = (f"{opened:.2f} + {first:.2f} s" for opened, first in (row["compile"], row["load"]))
            size, writing = f"{row['bytes'] / 2**20:.0f} MiB", f"{row['writing']:.1f} s"
            lines.append(f"| {model} {precision} | {anew} | {loaded} | {size} | {writing} |")
    return lines


def report(models: dict[str, Any]) -> str:
    """The whole page."""
    return "\n".join(
        [
            "# Where the time goes on a processor",
            "",
            f"Made by `python benchmarks/breakdown.py`: {summary()}. Seeded weights at true size.",
            "",
            f"## Kernels of ONNX Runtime, one utterance of {SECONDS} s",
            "",
            *kernel_table(models),
            "",
            f"Forward passes with the profile on: the faster half of {RUNS}, in the fastest of {REPEATS} processes.",
            "Attention is computed in fp32 in both precisions. The products of int8 run at the ceiling of",
            "[cpu.md](cpu.md); what remains is attention, the positional convolution, and passes over memory that are",
            "each a few hundredths of the time. A faster forward pass would need kernels that ONNX Runtime does not",
            "have, attention in int8 or bf16 before all.",
            "",
            "## OpenVINO's compiled graph on disk",
            "",
            f"Opening and the first run, of {FIRST_SECONDS} s of audio, each in a process of its own, the best of",
            f"{REPEATS}.",
            "",
            *opening_table(models),
            "",
            "The engine compiles anew. The file would be as large as the model, once for each precision, machine",
            "and set of outputs, and pays back its writing only after several starts. OpenVINO's own cache",
            "(`CACHE_DIR`) opens no faster than compiling, since it reads all weights to know them again.",
            "",
        ]
    )


def main() -> None:
    """Measure both models and write the results."""
    work = Path(os.environ.get("W2V_BENCH_DIR", Path(tempfile.gettempdir()) / "w2v-bench")).resolve() / "cpu"
    set_environment(work)
    models: dict[str, Any] = {}
    for name, model in MODELS.items():
        seeded.prepare(model, work / name)
        bundle = work / name / seeded.BUNDLE
        models[name] = {"kernels": measure_kernels(bundle), "openings": measure_openings(bundle)}
    (RESULTS / "breakdown.json").write_text(json.dumps(models, indent=2) + "\n", encoding="utf-8")
    text = report(models)
    (RESULTS / "breakdown.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
