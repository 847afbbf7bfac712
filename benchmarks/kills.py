"""One corpus run killed again and again, and resumed each time: what is lost, and what is done twice.

    python benchmarks/kills.py             # a minute or two

``kill -9`` at 25 random moments of one run over 300 files, with ``--resume`` after each; then the output is compared
value for value with that of a run that nobody disturbed. Writes results/kills.json and results/kills.md.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from corpus import HERE, TINY, bundle, embed, lognormal, make_files
from machine import summary

from w2v_runtime.files.outputs import JOURNAL_SUFFIX, VALUES_SUFFIX, hidden

FILES = 300
KILLS = 25
BATCH_SECONDS = 16

#: Runs the command, and appends the names of each batch that left the engine to the file named first. Every batch is
#: held back a little, so that the run is long enough to be hit at many different moments.
_LOGGED = """
import json, sys, time
log = open(sys.argv.pop(1), "ab", buffering=0)
from w2v_runtime.embedder import Embedder
embed_batch = Embedder.embed_batch
def logged(self, paths, *arguments):
    results = embed_batch(self, paths, *arguments)
    log.write(json.dumps(list(paths)).encode() + b"\\n")
    time.sleep(0.1)
    return results
Embedder.embed_batch = logged
from w2v_runtime.commands.embed import main
main()
"""


def recorded(output: Path) -> list[str]:
    """The inputs that the journal says are finished, in the order in which they were recorded."""
    journal = hidden(output, JOURNAL_SUFFIX)
    if not journal.exists():
        return []
    return [json.loads(line)["path"] for line in journal.read_bytes().split(b"\n")[1:-1]]


def kill_once(command: list[str], output: Path, reach: int, delay: float) -> int:
    """Start the run, and kill it ``delay`` seconds after ``reach`` inputs are recorded: inputs recorded in the end."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while len(recorded(output)) < reach and process.poll() is None:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the run ended with {process.returncode} before it was killed")
    if output.exists():
        raise SystemExit(f"{output} exists though the run was killed")
    return len(recorded(output))


def measure(work: Path, chance: random.Random) -> dict[str, Any]:
    """Kill, resume and compare; the figures of results/kills.json."""
    model = bundle(work, "tiny", TINY)
    files = make_files(work / f"files-{FILES}", lognormal(FILES, median=2.0))
    options = ("--batch-seconds", str(BATCH_SECONDS))
    whole, output, log = work / "whole.npz", work / "killed.npz", work / "batches"
    embed(files, "-m", model, "-o", whole, "--overwrite", *options)
    for path in (log, output, *(hidden(output, suffix) for suffix in (JOURNAL_SUFFIX, VALUES_SUFFIX))):
        path.unlink(missing_ok=True)
    command = [sys.executable, "-c", _LOGGED, log, files, "-m", model, "-o", output, "--resume", *options]
    command = list(map(str, command))

    # The first kill falls into the start of the process; the others are spread over the files, and over the batch.
    goals = sorted(chance.randrange(FILES - FILES // KILLS) for _ in range(KILLS - 1))
    kept = [kill_once(command, output, 0, chance.uniform(0.05, 0.5))]
    lost = 0
    for goal in goals:
        before = recorded(output)
        kept.append(kill_once(command, output, max(goal, len(before) + 1), chance.uniform(0, 0.4)))
        lost += recorded(output)[: len(before)] != before
    subprocess.run(command, check=True)

    batches = [json.loads(line) for line in log.read_text().splitlines()]
    times: dict[str, int] = {}
    for path in (path for batch in batches for path in batch):
        times[path] = times.get(path, 0) + 1
    with np.load(whole) as expected, np.load(output) as found:
        same_inputs = expected["paths"].tolist() == found["paths"].tolist()
        difference = float(np.abs(expected["embeddings"] - found["embeddings"]).max()) if same_inputs else None
        scale = float(np.abs(expected["embeddings"]).max())
    return {
        "machine": summary(),
        "files": FILES,
        "kills": len(kept),
        "recorded_at_kills": kept,
        "records_lost": lost,
        "same_inputs": same_inputs,
        "largest_difference": difference,
        "largest_value": scale,
        "embedded_twice": sum(count - 1 for count in times.values()),
        "most_times_one_input": max(times.values()),
        "largest_batch": max(map(len, batches)),
        "left_behind": sorted(path.name for path in work.iterdir() if output.name in path.name),
    }


def main() -> None:
    """Measure, and write the results."""
    place = os.environ.get("W2V_BENCH_DIR")
    work = Path(place) if place else Path(tempfile.mkdtemp(prefix="w2v-kills-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        figures = measure(work, random.Random(0))
    finally:
        if place is None:
            shutil.rmtree(work)
    (HERE / "results" / "kills.json").write_text(json.dumps(figures, indent=2) + "\n")
    allowed = figures["kills"] * figures["largest_batch"]
    lines = [
        "# Killed runs",
        "",
        "Made by `python benchmarks/kills.py`. Random weights; `kill -9` at random moments, `--resume` after each.",
        "",
        f"Machine: {figures['machine']}",
        "",
        "| what | records lost | inputs embedded again | largest difference from an undisturbed run |",
        "|---|---|---|---|",
        f"| {figures['files']} files, tiny, {figures['kills']} kills | {figures['records_lost']} (0) | "
        f"{figures['embedded_twice']} (≤ {allowed}: a batch a kill, of up to {figures['largest_batch']} files) | "
        + (f"{figures['largest_difference']:.1e} (≤ 1e-5)" if figures["same_inputs"] else "other inputs")
        + " |",
    ]
    (HERE / "results" / "kills.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
