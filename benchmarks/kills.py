"""One corpus run killed again and again, and resumed each time: what is lost, and what is done twice.

    python benchmarks/kills.py             # a minute or two

``kill -9`` at 25 random moments of one run over 300 files, with ``--resume`` after each; then the output is compared
value for value with that of a run that nobody disturbed. Writes results/kills.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import report
from peers import BUNDLE
from processes import W2V_EMBED, command, run, work_folder
from seeded import lognormal, prepare, write_recordings

from w2v_runtime.files.outputs import JOURNAL_SUFFIX, hidden

FILES, KILLS, BATCH_SECONDS = 300, 25, 8

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


def kill_once(words: list[str], output: Path, reach: int, delay: float) -> None:
    """Start the run, and kill it ``delay`` seconds after ``reach`` inputs are recorded."""
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        while len(recorded(output)) < reach and process.poll() is None:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the run ended with {process.returncode} before it was killed")
    if output.exists():
        raise SystemExit(f"{output} exists though the run was killed")


def measure(work: Path, chance: random.Random) -> dict[str, Any]:
    """Kill, resume and compare."""
    shutil.rmtree(work, ignore_errors=True)
    files = write_recordings(work / "files", lognormal(FILES, median=2.0))
    whole, output, log = work / "whole.npz", work / "killed.npz", work / "batches"
    options = (files, "-m", prepare("tiny", BUNDLE) / BUNDLE, "--batch-seconds", BATCH_SECONDS)
    run(command(W2V_EMBED, *options, "-o", whole))
    words = [sys.executable, "-c", _LOGGED, *map(str, (log, *options, "-o", output, "--resume"))]

    # The first kill falls into the start of the process; the others are spread over the files, and over the batch, and
    # leave files enough for the last run not to end before its kill.
    kill_once(words, output, 0, chance.uniform(0.05, 0.5))
    goals, lost = sorted(chance.randrange(FILES * 3 // 4) for _ in range(KILLS - 1)), 0
    for goal in goals:
        before = recorded(output)
        kill_once(words, output, max(goal, len(before) + 1), chance.uniform(0, 0.4))
        lost += recorded(output)[: len(before)] != before
    run(words)

    batches = [json.loads(line) for line in log.read_text().splitlines()]
    times = Counter(path for batch in batches for path in batch)
    with np.load(whole) as expected, np.load(output) as found:
        if expected["paths"].tolist() != found["paths"].tolist():
            raise SystemExit("the killed run embedded other inputs than the undisturbed one")
        difference = float(np.abs(expected["embeddings"] - found["embeddings"]).max())
    return report.origin() | {
        "files": FILES,
        "kills": KILLS,
        "records_lost": lost,
        "largest_difference": difference,
        "embedded_twice": sum(count - 1 for count in times.values()),
        "largest_batch": max(map(len, batches)),
    }


def main(options: argparse.Namespace) -> None:
    """Measure, and write the results."""
    if not options.tables:
        report.save(options.output, "kills", measure(work_folder() / "kills", random.Random(0)))
    found = report.load(options.output, "kills")
    largest, allowed = found["largest_batch"], found["kills"] * found["largest_batch"]
    said = "Made by `python benchmarks/kills.py`. Seeded weights; `kill -9` at random moments, `--resume` after each."
    cells = {
        "what": f"{found['files']} files, tiny, {found['kills']} kills",
        "records lost": f"{found['records_lost']} (0)",
        "inputs embedded again": f"{found['embedded_twice']} (≤ {allowed}: a batch a kill, of up to {largest} files)",
        "largest difference from an undisturbed run": f"{found['largest_difference']:.1e} (≤ 1e-5)",
    }
    report.write(options.output, "kills", report.head("Killed runs", said, {"": found}) + report.table([cells]))


if __name__ == "__main__":
    main(report.parser(__doc__).parse_args())
