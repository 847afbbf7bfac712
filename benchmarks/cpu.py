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
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import comparison
import cpu_report
import numpy as np
import peers
import report
import soundfile
from ceilings import CEILINGS, Ceiling
from peers import BASELINE, BUNDLE, CHECKPOINT, CTRANSLATE2, OPTIMUM, PEERS, Turns
from processes import W2V_EMBED, Finished, Skipped, command, run, work_folder
from seeded import MODELS, lognormal, prepare, utterances, write_recordings

from w2v_models import Bundle
from w2v_runtime.embedding.parity import difference
from w2v_runtime.threads.processors import available

#: Seconds of audio of a forward pass, of the one file, and the middle of the corpus, whose mean is 4 s.
FORWARDS, FILE_SECONDS, MEDIAN_SECONDS = {"10s": 10, "1s": 1}, 3, 3.5


#: Rounds of each row, and files of the corpus, in a short run and a full one.
SHORT = {"10s": 3, "1s": 5, "file": 2, "corpus": 1}, 24
FULL = {"10s": 9, "1s": 15, "file": 7, "corpus": 3}, 60


def measure_forwards(folder: Path, rounds: Mapping[str, int], skipped: Skipped) -> dict[str, Any]:
    """Forward passes in warm processes, the model's matrix products beside them, and the accuracy over 10 s."""
    architecture, rows = Bundle.open(folder / BUNDLE).manifest.architecture, {}
    entrants: dict[str, tuple[Any, ...]] = {name: (Turns, PEERS[name].open, folder, available()) for name in PEERS}
    entrants |= {name: (Ceiling, name, architecture, available()) for name in CEILINGS}
    with comparison.opened(entrants, skipped) as workers:
        for name, count in rounds.items():
            batch = utterances([FORWARDS[name]]), "utterance"
            row = rows[name] = comparison.forward(workers, batch, count, architecture, skipped)
            row["ceilings"] = {name: row["seconds"].pop(name) for name in CEILINGS if name in row["seconds"]}
        embedding = {name: worker for name, worker in workers.items() if name in PEERS}
        return {"rows": rows, "accuracy": comparison.accuracy(embedding, utterances([10]), skipped)}


def measure_processes(
    folder: Path, audio: Mapping[str, Path], rounds: Mapping[str, int], skipped: Skipped
) -> dict[str, Any]:
    """Whole processes over the recordings of a folder, from the first import to the stored vectors."""
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        outputs = {name: Path(place) / f"{name}.npz" for name, peer in PEERS.items() if not peer.compiled}

        def starts(row: str) -> dict[str, Callable[[], Finished]]:
            return {name: partial(run, process(name, folder, audio[row], output)) for name, output in outputs.items()}

        comparison.turns(starts("file"), 1, skipped)  # so that every file is in the system's cache
        for row, count in rounds.items():
            figures = comparison.turns(starts(row), count, skipped)
            vectors = {name: np.load(outputs[name])["embeddings"] for name in figures}
            rows[row] = {
                "audio_seconds": sum(float(soundfile.info(path).duration) for path in audio[row].rglob("*.wav")),
                "seconds": {name: [each.seconds for each in found] for name, found in figures.items()},
                "peak": {name: max(each.peak for each in found) for name, found in figures.items()},
                "pooled_cosine": {name: difference(found, vectors[BASELINE])[2] for name, found in vectors.items()},
            }
    return rows


def process(name: str, folder: Path, audio: Path, output: Path) -> list[str]:
    """The command that embeds a folder: ``w2v-embed``, or the script of a peer."""
    if options := PEERS[name].options:
        fixed = ("-m", folder / BUNDLE, "-o", output, "--overwrite", "--threads", available())
        return command(W2V_EMBED, audio, *fixed, *options)
    return [sys.executable, peers.__file__, *map(str, (name, folder, available(), output, audio))]


def measure(name: str, rounds: Mapping[str, int], files: int, skipped: Skipped) -> dict[str, Any]:
    """The rows of a model; ``skipped`` are left out from the start."""
    folder, work = prepare(name, CHECKPOINT, OPTIMUM, *CTRANSLATE2.values(), BUNDLE), work_folder()
    audio = {
        "file": write_recordings(work / "cpu-file", [FILE_SECONDS]),
        "corpus": write_recordings(work / f"cpu-{files}", lognormal(files, MEDIAN_SECONDS)),
    }
    warm, whole = ({row: rounds[row] for row in rows if row in rounds} for rows in (FORWARDS, audio))
    result: dict[str, Any] = {"model": MODELS[name], "skipped": skipped, "forwards": {}, "processes": {}}
    if warm:
        result["forwards"] = measure_forwards(folder, warm, skipped)
    if whole:
        result["processes"] = measure_processes(folder, audio, whole, skipped)
    for peer, reason in skipped.items():
        skipped[peer] = reason.replace(f"{folder}/", "")
    return result


def main(options: argparse.Namespace) -> None:
    """Measure what is asked for and write the results."""
    scale, files = FULL if options.full else SHORT
    if not options.tables:
        rounds = {row: count for row, count in scale.items() if row in options.rows}
        results = report.origin() | {"rounds": rounds, "files": files, "models": {}}
        for name in options.models:
            skipped = {} if options.full else {peer: "only with --full" for peer in PEERS if PEERS[peer].full}
            results["models"][name] = measure(name, rounds, files, skipped)
            report.save(options.output, "cpu", results)
    cpu_report.write(options.output)


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("--full", action="store_true", help="more peers, rounds and files")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rows", nargs="+", choices=SHORT[0], default=[*SHORT[0]])
    main(parser.parse_args())
