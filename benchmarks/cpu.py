"""Everything that embeds speech on this processor, side by side. Printed, and written to results/ and README.

    python benchmarks/cpu.py                # both models, about 12 minutes on two cores once they are exported
    python benchmarks/cpu.py --full         # more peers, rounds and files, about an hour

Nothing may run beside it; with the large model, the peers hold 17 GB at once.

Seeded weights at true size, the same for all. Four rows, each measured in rounds in which every peer has one turn, in
an order drawn anew: 10 s and 1 s of audio in a warm process; one file of 3 s, and a corpus, as processes from the
first import to the stored vectors. Beside them the matrix products of the models alone: what an engine could reach.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_report
import seeded
import soundfile
from corpus import lognormal
from cpu_rows import FORWARDS, PROCESSES, Skipped, forwards, processes
from machine import facts
from peers import PEERS, RATE

from w2v_export.signals import speech_like
from w2v_runtime.threads.processors import available

MODELS = {"base": "facebook/wav2vec2-base-960h", "large": "facebook/wav2vec2-large-robust"}
ROWS = (*FORWARDS, *PROCESSES)
#: Of the one file, and the middle of the corpus, whose mean is 4 s.
FILE_SECONDS, MEDIAN_SECONDS = 3, 3.5


@dataclass(frozen=True)
class Scale:
    """How much is measured: rounds of each row, and files of the corpus."""

    rounds: Mapping[str, int]
    files: int


SHORT = Scale({"10s": 3, "1s": 5, "file": 2, "corpus": 1}, files=24)
FULL = Scale({"10s": 9, "1s": 15, "file": 7, "corpus": 3}, files=60)


def make_audio(work: Path, files: int) -> dict[str, Path]:
    """The one file and the folder of the corpus: WAV at 16 kHz, kept in the work folder."""
    durations = {"file": [FILE_SECONDS], f"corpus-{files}": lognormal(files, MEDIAN_SECONDS).tolist()}
    for name, seconds in durations.items():
        (work / name).mkdir(exist_ok=True)
        for i, length in enumerate(seconds):
            soundfile.write(work / name / f"{i:03}.wav", speech_like(round(length * RATE), RATE, seed=i), RATE)
    return {"file": work / "file" / "000.wav", "corpus": work / f"corpus-{files}"}


def measure(
    model: str, folder: Path, audio: Mapping[str, Path], rounds: Mapping[str, int], skipped: Skipped
) -> dict[str, Any]:
    """All rows of a model; ``skipped`` are left out from the start."""
    seeded.prepare(model, folder)
    warm, whole = ({row: rounds[row] for row in rows if row in rounds} for rows in (FORWARDS, PROCESSES))
    result: dict[str, Any] = {"model": model, "skipped": skipped, "forwards": {}, "processes": {}}
    if warm:
        result["forwards"] = forwards(folder, warm, available(), skipped)
    if whole:
        result["processes"] = processes(folder, audio, whole, available(), skipped)
    for name, reason in skipped.items():
        skipped[name] = reason.replace(f"{folder}{os.sep}", "")
    return result


def set_environment(work: Path) -> None:
    """For every process started here: caches of their own, byte code as an installation has it, and no network."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "cache" / "inductor")
    os.environ["OMP_NUM_THREADS"] = str(available())
    os.environ["HF_HUB_OFFLINE"] = "1"


def main(arguments: Sequence[str]) -> None:
    """Measure what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more peers, rounds and files")
    parser.add_argument("--models", default=",".join(MODELS), help="of base,large; default both")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {','.join(ROWS)}; default all")
    parser.add_argument("--output", type=Path, default=cpu_report.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    models, rows = options.models.split(","), options.rows.split(",")
    for name, known, chosen in (("--models", MODELS, models), ("--rows", ROWS, rows)):
        if unknown := set(chosen) - set(known):
            parser.error(f"{name} has {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    place = os.environ.get("W2V_BENCH_DIR", Path(tempfile.gettempdir()) / "w2v-bench")
    work, scale = Path(place).resolve() / "cpu", FULL if options.full else SHORT
    work.mkdir(parents=True, exist_ok=True)
    set_environment(work)
    audio = make_audio(work, scale.files)
    rounds = {row: scale.rounds[row] for row in ROWS if row in rows}
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/cpu.py", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": facts(available()),
        "rounds": rounds,
        "files": scale.files,
        "models": {},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for name in models:
        skipped = {} if options.full else {peer: "only with --full" for peer in PEERS if PEERS[peer].full}
        results["models"][name] = measure(MODELS[name], work / name, audio, rounds, skipped)
        text = json.dumps(results, indent=2, ensure_ascii=False)
        (options.output / "cpu.json").write_text(text + "\n", encoding="utf-8")
    cpu_report.write(options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
