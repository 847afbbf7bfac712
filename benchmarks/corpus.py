"""Corpus runs against the engine alone: time, padding, memory, resuming, long audio. Writes results/corpus.md.

    python benchmarks/corpus.py all             # about an hour on two cores
    python benchmarks/corpus.py throughput      # or one figure: memory, resume, hours

Every command runs as a process of its own on files made for it; weights are seeded, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from machine import summary

HERE = Path(__file__).resolve().parent
RATE = 16000
#: The conv front end and frames of the real models, but little arithmetic, for figures that are not the engine's.
TINY = {
    "conv_dim": [24] * 7,
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
#: A third of the base model's width and depth: 2 000 files in minutes, with ten times less engine to hide behind.
SMALL = {
    "conv_dim": [192] * 7,
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
BASE = {}


_EXPORT = """
import json, sys
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor
from w2v_export import export_bundle
config, checkpoint, folder = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
Wav2Vec2Config(**config).save_pretrained(checkpoint)
Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(checkpoint)
export_bundle(checkpoint, folder, random_weights=True)
"""


def bundle(work: Path, name: str, config: dict[str, object]) -> Path:
    """Export a seeded wav2vec 2.0 of a size; kept in the work folder.

    In a process of its own: a child's peak memory counts from that of the process it was forked from.
    """
    folder = work / "bundles" / name
    if not folder.exists():
        checkpoint = work / "configs" / name
        subprocess.run([sys.executable, "-c", _EXPORT, json.dumps(config), checkpoint, folder], check=True)
    return folder


def make_files(folder: Path, seconds: np.ndarray) -> Path:
    """WAV files of noise, cut from one second of it so that making them is quick."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    noise = (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)
    pcm = np.tile((noise * 32767).astype(np.int16), int(seconds.max()) + 2)
    for i, length in enumerate(seconds):
        directory = folder / f"{i // 1000:03}"
        directory.mkdir(exist_ok=True)
        soundfile.write(directory / f"{i:06}.wav", pcm[i % 1000 :][: round(length * RATE)], RATE)
    return folder


def embed(*arguments: object) -> tuple[float, int, str]:
    """Run w2v-embed: (wall seconds, peak memory in bytes, standard error)."""
    code = "from w2v_runtime.commands.embed import main; main()"
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        log.seek(0)
        text = log.read().decode()
    if status:
        raise SystemExit(f"w2v-embed failed: {text}")
    return wall, usage.ru_maxrss * 1024, text


def lognormal(count: int, median: float = 4.0, sigma: float = 0.5) -> np.ndarray:
    """Durations in seconds as corpora of utterances have them."""
    return np.clip(np.random.default_rng(1).lognormal(np.log(median), sigma, count), 0.5, 30)


def throughput(work: Path, rows: list[str], name: str = "small", count: int = 2000) -> None:
    """Whole command against the sum of session.run for the same batches, run alone."""
    folder = make_files(work / f"files-{count}", lognormal(count))
    model = bundle(work, name, SMALL if name == "small" else BASE)
    wall, _, text = embed(folder, "-m", model, "-o", work / "out.npz", "--overwrite")
    engine, load = replay(model, folder)
    padding = re.search(r"padding ([\d.]+)", text)
    rows.append(
        f"| {count} files, {name} | whole command {wall:.1f} s, engine alone {engine:.1f} s (plus {load:.1f} s to "
        f"start and open the model) | {wall / engine:.3f} × (≤ 1.07) | padding {padding and padding[1]} % (≤ 4) |"
    )
    print(rows[-1], flush=True)


def throughput_base(work: Path, rows: list[str]) -> None:
    """The same at the base model's true size, over fewer files: the model's start weighs more."""
    throughput(work, rows, "base", 120)


def replay(model: Path, folder: Path) -> tuple[float, float]:
    """Seconds of session.run over the batches of a corpus run with nothing beside it, and of opening the model."""
    code = """
import sys, time
start = time.perf_counter()
import numpy as np
from w2v_runtime import Embedder
embedder = Embedder(sys.argv[1]); opened = time.perf_counter() - start
from w2v_runtime.runs.inputs import list_inputs
shapes, run = [], embedder.engine.run
def record(feeds, outputs, graph="graph", stop=None):
    shapes.append((feeds["waveform"].shape, feeds["lengths"], list(outputs)))
    size = embedder.manifest.architecture.hidden_size
    return [np.zeros((len(feeds["lengths"]), size), np.float32)]
embedder.engine.run = record
for _ in embedder.embed_files(list_inputs([sys.argv[2]])): pass
embedder.engine.run = run
rng = np.random.default_rng(0)
before = embedder.engine.busy_seconds
for shape, lengths, outputs in shapes:
    run({"waveform": rng.standard_normal(shape, dtype=np.float32), "lengths": lengths}, outputs)
print(embedder.engine.busy_seconds - before, opened)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(folder)], capture_output=True, text=True, check=True
    )
    engine, opened = map(float, done.stdout.split())
    return engine, opened


def memory(work: Path, rows: list[str]) -> None:
    """Peak memory of the whole process for 2 000 and for 20 000 short files."""
    model, peaks = bundle(work, "tiny", TINY), {}
    for count in (2000, 20000):
        folder = make_files(work / f"short-{count}", np.random.default_rng(2).uniform(0.2, 1.5, count))
        _, peaks[count], _ = embed(folder, "-m", model, "-o", work / "out.npz", "--overwrite")
    ratio = peaks[20000] / peaks[2000]
    rows.append(
        f"| 20 000 against 2 000 short files, tiny | peak memory {peaks[20000] / 2**20:.0f} MiB against "
        f"{peaks[2000] / 2**20:.0f} MiB | {ratio:.3f} × (≤ 1.05) | |"
    )
    print(rows[-1], flush=True)


def resume(work: Path, rows: list[str]) -> None:
    """Start of --resume over 100 000 finished files: the whole command, which then has nothing to do."""
    model, folder = bundle(work, "tiny", TINY), make_files(work / "many", np.full(100_000, 0.1))
    output = work / "many.npz"
    wall, _, _ = embed(folder, "-m", model, "-o", output, "--overwrite")
    again, _, text = embed(folder, "-m", model, "-o", output, "--resume")
    if "100000 files were finished already" not in text:
        raise SystemExit(text)
    rows.append(
        f"| --resume over 100 000 finished files, tiny | {again:.1f} s (≤ 5), the run itself {wall:.0f} s | | |"
    )
    print(rows[-1], flush=True)


def hours(work: Path, rows: list[str]) -> None:
    """Peak memory above the loaded model while one long recording is embedded; the windows of one are all alike."""
    one_file(work, rows, "base", BASE, 0.1)
    one_file(work, rows, "tiny", TINY, 1)
    one_file(work, rows, "tiny", TINY, 10)


def hour_base(work: Path, rows: list[str]) -> None:
    """The same for a whole hour at the base model's true size."""
    one_file(work, rows, "base", BASE, 1)


def one_file(work: Path, rows: list[str], name: str, config: dict[str, object], length: float) -> None:
    """Embed one recording of ``length`` hours."""
    model = bundle(work, name, config)
    short = make_files(work / "one", np.array([1.0]))
    _, loaded, _ = embed(short, "-m", model, "-o", work / "out.npz", "--overwrite")
    path = work / f"{length}h.wav"
    if not path.exists():
        noise = (3000 * np.random.default_rng(0).standard_normal(60 * RATE)).astype(np.int16)
        with soundfile.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(round(60 * length)):
                file.write(noise)
    wall, peak, _ = embed(path, "-m", model, "-o", work / "out.npz", "--overwrite")
    above = (peak - loaded) / 2**30
    rows.append(
        f"| {length} h of audio in one file, {name} | {above:.2f} GiB above the model with 1 s of audio "
        f"({loaded / 2**30:.2f} GiB) | (≤ 1.5 GiB) | {wall:.0f} s, {3600 * length / wall:.1f} × real time |"
    )
    print(rows[-1], flush=True)


FIGURES: dict[str, Callable[[Path, list[str]], None]] = {
    "throughput": throughput,
    "throughput-base": throughput_base,
    "memory": memory,
    "resume": resume,
    "hours": hours,
    "hour-base": hour_base,
}


def main(names: list[str]) -> None:
    """Measure the named figures and add their rows to the results."""
    chosen = list(FIGURES) if names in ([], ["all"]) else names
    work = Path(os.environ.get("W2V_BENCH_DIR", Path(tempfile.gettempdir()) / "w2v-bench"))
    work.mkdir(parents=True, exist_ok=True)
    store = HERE / "results" / "corpus.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for name in chosen:
        rows: list[str] = []
        FIGURES[name](work, rows)
        results[name] = {"machine": summary(), "rows": rows}
        store.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    lines = ["# Corpus runs", "", "Made by `python benchmarks/corpus.py`. Random weights; each command a process.", ""]
    lines += [
        f"Machine: {next(iter(results.values()))['machine']}",
        "",
        "| what | measured | limit | |",
        "|---|---|---|---|",
    ]
    lines += [row for name in FIGURES if name in results for row in results[name]["rows"]]
    (HERE / "results" / "corpus.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
