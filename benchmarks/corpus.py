"""Corpus runs against the engine alone: time, padding, memory, resuming, long audio. Writes results/corpus.md.

    python benchmarks/corpus.py all             # about an hour on two cores
    python benchmarks/corpus.py throughput      # or one figure: memory, resume, hours

Every figure is of whole commands on files made for it; weights are seeded, so nothing is downloaded. Figures that are
not measured again stay.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report
import soundfile
from peers import BUNDLE
from processes import W2V_EMBED, Finished, call, command, run, work_folder
from report import GIB, MIB
from seeded import lognormal, prepare, write_recordings

_OPEN = "import sys; from w2v_runtime import Embedder; Embedder(sys.argv[1])"


def embed(model: Path, audio: Path, output: str = "out.npz", mode: str = "--overwrite") -> Finished:
    """Run ``w2v-embed``."""
    return run(command(W2V_EMBED, audio, "-m", model, "-o", work_folder() / output, mode))


def throughput(name: str, count: int) -> list[str]:
    """Whole command against the engine alone for the same batches; with the base model, its start weighs more."""
    model = prepare(name, BUNDLE) / BUNDLE
    folder = write_recordings(work_folder() / f"files-{count}", lognormal(count, 4.0))
    whole = embed(model, folder)
    engine, start = call(engine_alone, model, folder), run([sys.executable, "-c", _OPEN, str(model)]).seconds
    padding = re.search(r"padding ([\d.]+)", whole.said)
    measured = f"whole command {whole.seconds:.1f} s, engine alone {engine:.1f} s"
    opening, limit = f"(plus {start:.1f} s to start and open the model)", f"{whole.seconds / engine:.3f} × (≤ 1.07)"
    return [f"| {count} files, {name} | {measured} {opening} | {limit} | padding {padding and padding[1]} % (≤ 4) |"]


def engine_alone(model: Path, folder: Path, device: str = "cpu", precision: str = "fp32") -> float:
    """Seconds in which the engine runs over the batches of a corpus, known beforehand and with nothing beside it."""
    from w2v_models.manifest import LENGTHS, WAVEFORM
    from w2v_runtime import Embedder
    from w2v_runtime.runs.inputs import list_inputs

    embedder = Embedder(model, device=device, precision=precision)
    engine, size = embedder.engine, embedder.manifest.architecture.hidden_size
    run_batch, batches = engine.run, []

    def record(feeds: Mapping[str, Any], outputs: Sequence[str], *_: object, **__: object) -> list[Any]:
        batches.append((feeds[WAVEFORM].shape, feeds[LENGTHS], list(outputs)))
        return [np.zeros((len(feeds[LENGTHS]), size), np.float32)]

    engine.run = record
    for _ in embedder.embed_files(list_inputs([str(folder)])):
        pass
    noise = np.random.default_rng(0).standard_normal(max(rows * samples for (rows, samples), *_ in batches), np.float32)

    def repeat(batch: tuple[tuple[int, int], Any, list[str]]) -> None:
        (rows, samples), lengths, outputs = batch
        run_batch({WAVEFORM: noise[: rows * samples].reshape(rows, samples), LENGTHS: lengths}, outputs)

    repeat(batches[0])
    before = engine.busy_seconds
    with ThreadPoolExecutor(engine.concurrency) as threads:
        list(threads.map(repeat, batches))
    return engine.busy_seconds - before


def memory() -> list[str]:
    """Peak memory of the whole process for 2 000 and for 20 000 short files."""
    model, peaks = prepare("tiny", BUNDLE) / BUNDLE, {}
    for count in (2000, 20000):
        durations = np.random.default_rng(2).uniform(0.2, 1.5, count).tolist()
        peaks[count] = embed(model, write_recordings(work_folder() / f"short-{count}", durations)).peak
    few, many = peaks[2000], peaks[20000]
    measured = f"peak memory {many / MIB:.0f} MiB against {few / MIB:.0f} MiB"
    return [f"| 20 000 against 2 000 short files, tiny | {measured} | {many / few:.3f} × (≤ 1.05) | |"]


def resume() -> list[str]:
    """Start of --resume over 100 000 finished files: the whole command, which then has nothing to do."""
    model, folder = prepare("tiny", BUNDLE) / BUNDLE, write_recordings(work_folder() / "many", [0.1] * 100_000)
    whole, again = (embed(model, folder, "many.npz", mode) for mode in ("--overwrite", "--resume"))
    if "100000 files were finished already" not in again.said:
        raise SystemExit(again.said)
    measured = f"{again.seconds:.1f} s (≤ 5), the run itself {whole.seconds:.0f} s"
    return [f"| --resume over 100 000 finished files, tiny | {measured} | | |"]


def hours(*recordings: tuple[str, float]) -> list[str]:
    """Peak memory above the loaded model while one recording of so many hours is embedded, by each named model."""
    rows = []
    for name, length in recordings:
        model = prepare(name, BUNDLE) / BUNDLE
        loaded = embed(model, write_recordings(work_folder() / "one", [1])).peak
        whole = embed(model, write_recordings(work_folder() / f"hours-{length}", [3600 * length]))
        above = f"{(whole.peak - loaded) / GIB:.2f} GiB above the model with 1 s of audio ({loaded / GIB:.2f} GiB)"
        speed = f"{whole.seconds:.0f} s, {3600 * length / whole.seconds:.1f} × real time"
        rows.append(f"| {length} h of audio in one file, {name} | {above} | (≤ 1.5 GiB) | {speed} |")
    return rows


def busy(name: str, length: float) -> list[str]:
    """How much of the time the engine computes while one MP3 of so many hours is decoded twice and embedded."""
    model, audio = prepare(name, BUNDLE) / BUNDLE, work_folder() / f"mp3-{length}" / "long.mp3"
    if not audio.exists():
        (wave,) = Path(write_recordings(work_folder() / f"hours-{length}", [3600 * length])).rglob("*.wav")
        audio.parent.mkdir(exist_ok=True)
        samples, rate = soundfile.read(wave, dtype="int16")
        soundfile.write(audio, samples, rate, format="MP3")
    whole = embed(model, audio)
    share = re.search(r"engine busy (\d+)", whole.said)
    measured = f"engine busy {share and share[1]} %, {whole.seconds:.0f} s with the start"
    return [f"| {length} h of MP3 in one file, {name} | {measured} | (≥ 95 %) | |"]


FIGURES: dict[str, Callable[[], list[str]]] = {
    "throughput": partial(throughput, "small", 2000),
    "throughput-base": partial(throughput, "base", 120),
    "memory": memory,
    "resume": resume,
    "hours": partial(hours, ("base", 0.1), ("tiny", 1), ("tiny", 10)),
    "hour-base": partial(hours, ("base", 1)),
    "mp3-base": partial(busy, "base", 1),
}


def main(options: argparse.Namespace) -> None:
    """Measure the named figures and write the page of all."""
    names = FIGURES if "all" in options.figures else options.figures
    results = report.records(options, "corpus", names, lambda name: {"rows": FIGURES[name]()})
    stored = {name: results[name] for name in FIGURES if name in results}
    said = "Made by `python benchmarks/corpus.py`. Seeded weights; each command a process."
    lines = [*report.head("Corpus runs", said, stored), "| what | measured | limit | |", "|---|---|---|---|"]
    report.write(options.output, "corpus", lines + [line for record in stored.values() for line in record["rows"]])


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("figures", nargs="*", choices=["all", *FIGURES], default="all")
    main(parser.parse_args())
