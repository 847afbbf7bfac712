"""Segments: cut, and heard in their whole recordings, against what they are made of. Writes results/segments.{json,md}.

    python benchmarks/segments.py          # 200 segments in 4 recordings, about ten minutes on two cores
    python benchmarks/segments.py --full   # 2 000 in 40, about an hour

The base model with seeded weights; segments of 1 to 6 s in recordings of five minutes, in a table in no order. The
commands run one after the other, each in a process of its own, and tell what their engine took.
"""

from __future__ import annotations

import argparse
import csv
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
import soundfile
from peers import BUNDLE, RATE
from processes import call
from report import MIB
from seeded import prepare

from w2v_export.signals import speech_like

MINUTES, ROWS = 5, 10**6
ROUNDS = 2


def write_corpus(place: Path, recordings: int) -> list[tuple[str, float, float]]:
    """Recordings, their segments in a table, and the same segments as files; returns the table's rows."""
    random, rows = np.random.default_rng(0), []
    for folder in ("in", "cut"):
        (place / folder).mkdir()
    for index in range(recordings):
        samples = speech_like(MINUTES * 60 * RATE, RATE, seed=index % 8)
        soundfile.write(place / "in" / f"{index}.wav", samples, RATE)
        rows += [
            (f"{index}.wav", float(start), round(float(start + random.uniform(1, 6)), 3))
            for start in random.uniform(0, MINUTES * 60 - 6, 50).round(3)
        ]
    random.shuffle(rows)
    with (place / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "start", "end"), *rows])
    for number, (name, start, end) in enumerate(rows):
        begin, stop = round(start * RATE), round(end * RATE)
        samples, _ = soundfile.read(place / "in" / name, start=begin, stop=stop, dtype="int16")
        soundfile.write(place / "cut" / f"{number:05}.wav", samples, RATE)
    return rows


def run(place: Path, name: str, *arguments: object) -> dict[str, float]:
    """Wall seconds of one command, and the share of them in which its engine was busy."""
    output = place / f"{name}.npz"
    command = [sys.executable, "-c", "from w2v_runtime.commands.embed import main; main()", *map(str, arguments)]
    start = time.monotonic()
    done = subprocess.run(
        [*command, "-o", str(output), "--overwrite", "--no-progress"], capture_output=True, text=True, check=True
    )
    wall = time.monotonic() - start
    told = re.search(r"in ([\d.]+) s .*engine busy (\d+)%", done.stderr)
    assert told is not None, done.stderr
    return {"wall": wall, "run": float(told[1]), "engine": float(told[1]) * int(told[2]) / 100}


def plan(rows: int) -> tuple[float, int]:
    """Seconds in which a table of so many rows is checked, and the memory that this takes."""
    from w2v_runtime.tables import Table

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        with path.open("w") as file:
            file.write("file,start,end,label,id\n")
            file.writelines(f"a/{i % 997}.wav,{i * 0.25},{i * 0.25 + 1.5},word{i % 99},{i}\n" for i in range(rows))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        assert Table(str(path)).count == rows
        return time.monotonic() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def measure(recordings: int) -> dict[str, Any]:
    """Every command, in rounds, so that what the machine does besides falls on all."""
    bundle = prepare("base", BUNDLE) / BUNDLE
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = write_corpus(place, recordings)
        segments = (place / "in", "--segments", place / "table.csv", "-m", bundle)
        commands: dict[str, Sequence[object]] = {
            "cut": segments,
            "files": (place / "cut", "-m", bundle),
            "whole": (*segments, "--segment-context", "whole"),
            "frames": (place / "in", "-m", bundle, "--level", "frame"),
        }
        times: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, arguments in commands.items():
                times[name].append(run(place, name, *arguments))
        with np.load(place / "cut.npz") as cut, np.load(place / "files.npz") as files:
            difference = float(np.abs(cut["embeddings"] - files["embeddings"]).max())
    seconds, memory = call(plan, ROWS)
    return {
        "segments": len(rows),
        "recordings": recordings,
        "times": times,
        "difference": difference,
        "plan": {"seconds": seconds, "memory": memory},
    }


def table(result: dict[str, Any]) -> list[str]:
    """What each command took, against what it is to be measured by."""
    best = {name: min(found, key=lambda told: told["wall"]) for name, found in result["times"].items()}
    cut, files, whole, frames = (best[name] for name in ("cut", "files", "whole", "frames"))
    against = {
        "cut": f"{cut['run'] / cut['engine']:.3f} × its engine alone (≤ 1.07), "
        f"{cut['wall'] / files['wall']:.3f} × files (≤ 1.0)",
        "whole": f"{whole['wall'] / frames['wall']:.3f} × frames (≤ 1.1)",
    }
    words = {
        "cut": f"{result['segments']} segments, cut",
        "files": "the same, cut to files beforehand",
        "whole": f"{result['segments']} segments, context whole",
        "frames": f"the {result['recordings']} recordings at frame level",
    }
    rows = [
        {
            "what": words[name],
            "seconds": report.spread([told["wall"] for told in result["times"][name]], ".1f"),
            "engine": f"{best[name]['engine']:.1f} s",
            "against": against.get(name, ""),
        }
        for name in words
    ]
    planned = result["plan"]
    rows.append(
        {
            "what": f"a .csv of {ROWS:,} rows, checked",
            "seconds": f"{planned['seconds']:.1f}",
            "against": f"≤ 10 s; {planned['memory'] / MIB:.0f} MiB (≤ 300)",
        }
    )
    return report.table(rows)


def main(options: argparse.Namespace) -> None:
    """Measure and write the page."""
    result = report.load(options.output, "segments")
    if not options.tables:
        result = report.origin() | measure(40 if options.full else 4)
        report.save(options.output, "segments", result)
    said = (
        "Made by `python benchmarks/segments.py`. The base model with seeded weights. Segments of 1 to 6 s in "
        f"recordings of {MINUTES} minutes, in no order. Seconds are those of the whole command, the best of the rounds "
        f"is compared. Cut segments and those of the files differ by {result['difference']:.1e} at most."
    )
    report.write(options.output, "segments", report.head("Segments", said, {"base": result}) + table(result))


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("--full", action="store_true", help="2 000 segments in 40 recordings")
    main(parser.parse_args())
