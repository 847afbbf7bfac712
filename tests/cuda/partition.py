"""Check without a GPU that CUDA takes every graph of every family, with an old and a new release of onnxruntime-gpu.

python tests/cuda/partition.py FOLDER TABLE

ONNX Runtime decides which nodes CUDA takes when a session is created, from its registry of kernels. For that its CUDA
provider has to load, and it does with stand-ins for NVIDIA's libraries that answer and do nothing: sessions can be
created, none can be run. Prints a table, writes it to ``TABLE`` and exits 1 if more than the arithmetic of shapes is
left to the processor. Releases are installed into ``FOLDER``; needs gcc and binutils.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent.parent))

from stand_ins import build
from worker import MARK

import families
from conftest import save_checkpoint
from w2v_export import export_bundle
from w2v_models.errors import W2VError

#: A release below the floor of the extra ``gpu``, which shows why it is where it is; the floor; the newest tried.
REFUSED: Final = "1.26.0"
RELEASES: Final = (REFUSED, "1.27.0", "1.31.1")
#: Graphs that differ: the two front ends, each family, a head in the public graph, and log-mel features.
MODELS: Final = ("base", "large", "emotion", "wavlm", "data2vec", "conformer-relative", "conformer-rotary", "w2v-bert")
#: Copies between GPU and processor that the sizes of shapes need in a run, and in a step of a loop.
_COPIES, _IN_A_LOOP = 3, 5
_COPIED: Final = re.compile(r"(\d+) Memcpy nodes are added to the graph (\w+)")
_WORKER: Final = Path(__file__).parent / "worker.py"
_REPOSITORY: Final = Path(__file__).parents[2]


def main(folder: Path, table: Path) -> int:
    """Make the bundles, ask each release, write the table; returns the exit code."""
    graphs = [graph for model in MODELS for graph in bundle(folder / "bundles", model)]
    rows, bad = [], 0
    for release in RELEASES:
        for graph, told in zip(graphs, ask(folder / release, release, graphs), strict=True):
            wrong = bool(told["misplaced"]) or told["copies"] > _COPIES or max(told["loops"], default=0) > _IN_A_LOOP
            bad += wrong and release != REFUSED
            left = ", ".join(f"{count} {name}" for name, count in sorted(told["misplaced"].items())) or "–"
            name = graph.relative_to(folder / "bundles")
            counts = f"{told['copies']} | {max(told['loops'], default='–')}"
            rows.append(f"| {release} | {name.parts[0]} | `{name.name}` | {told['shapes']} | {left} | {counts} |")
    text = "\n".join((_HEAD, *rows)) + "\n"
    table.write_text(text, encoding="utf-8")
    print(text)
    print(f"{bad} graphs are not taken whole." if bad else "CUDA takes every graph.", file=sys.stderr)
    return 1 if bad else 0


_HEAD: Final = f"""# What CUDA leaves to the processor

Written by `make check-cuda`, which needs no GPU: which nodes have no kernel is decided when a session is created. Tiny
models of each family, whose graphs are those of the real ones but for their number of layers. Arithmetic of shapes
stays on the processor on purpose, with the few numbers that it gives the GPU; everything else that is left costs two
copies of a batch. The encoders of long audio whose attention has a bias loop over blocks of queries, and copy four
offsets and a shape in each step of each layer. {REFUSED} is refused.

| onnxruntime-gpu | model | graph | nodes of shapes | others on the processor | copies a run | copies a step of a loop |
|---|---|---|---|---|---|---|"""


def bundle(folder: Path, model: str) -> list[Path]:
    """The graphs of a tiny bundle in fp32 and, where the model can be had in it, fp16."""
    place = folder / model
    if not place.exists():
        save = save_checkpoint if model in ("base", "large", "emotion") else families.save
        checkpoint = save(folder / "checkpoints" / model, model)
        try:
            export_bundle(checkpoint, place, precision=("fp32", "fp16"))
        except W2VError as error:
            print(f"{model}: {error}", file=sys.stderr)
            export_bundle(checkpoint, place)
    return sorted((place / "onnx").glob("*.onnx"))


def ask(place: Path, release: str, graphs: list[Path]) -> list[dict[str, Any]]:
    """What each graph leaves to the processor with a release, from a process that has it."""
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"onnxruntime-gpu=={release}"], check=True)
    (capi,) = place.glob("lib/python*/site-packages/onnxruntime/capi")
    build(capi / "libonnxruntime_providers_cuda.so", place / "stand-ins")
    paths = os.pathsep.join(str(_REPOSITORY / room) for room in ("models", "runtime"))
    environment = os.environ | {"LD_LIBRARY_PATH": str(place / "stand-ins"), "PYTHONPATH": paths}
    done = subprocess.run([python, _WORKER, *graphs], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"onnxruntime-gpu {release} does not open a graph: {done.stderr[-2000:]}")
    said = done.stderr.split(MARK)[1:]
    answers = []
    for line, text in zip(done.stdout.splitlines(), said, strict=True):
        copies = [(graph, int(count)) for count, graph in _COPIED.findall(text)]
        loops = [count for graph, count in copies if graph.startswith("sub_graph")]
        answers.append(json.loads(line) | {"copies": sum(count for _, count in copies) - sum(loops), "loops": loops})
    return answers


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2])))
