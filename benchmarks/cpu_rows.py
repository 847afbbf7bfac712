"""The rows of the processor benchmark: forward passes in warm processes, and whole processes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import peers
import soundfile
from ceilings import CEILINGS, Ceiling, operations, product_operations
from peers import BASELINE, PEERS, RATE, Turns
from seeded import BUNDLE
from workers import Worker, WorkerError

from w2v_export.signals import speech_like
from w2v_models import Bundle
from w2v_runtime.embedding.parity import difference

#: Seconds before a turn in which threads of the turn before stop waiting for work; ONNX Runtime's do so for 0.04 s.
PAUSE = 0.1
#: Seconds of audio of a forward pass.
FORWARDS = {"10s": 10, "1s": 1}
PROCESSES = ("file", "corpus")
_EMBED = "from w2v_runtime.commands.embed import main; main()"

Figure = TypeVar("Figure")
#: Why a peer has no figure, by its name.
Skipped = dict[str, str]


def in_rounds(entrants: Mapping[str, Callable[[], Figure]], rounds: int, skipped: Skipped) -> dict[str, list[Figure]]:
    """In every round one turn for each entrant, in an order drawn anew; who fails is left out, with the reason."""
    figures: dict[str, list[Figure]] = {name: [] for name in entrants}
    chance = random.Random(0)
    for _ in range(rounds):
        for name in chance.sample(list(figures), len(figures)):
            time.sleep(PAUSE)
            try:
                figures[name].append(entrants[name]())
            except WorkerError as error:
                leave_out(name, error, skipped)
                del figures[name]
    return figures


def leave_out(name: str, error: WorkerError, skipped: Skipped) -> None:
    """Note why a peer has no figure; without the baseline there is nothing to compare."""
    if name == BASELINE:
        raise SystemExit(f"{name} cannot be run, and all else is compared with it: {error}")
    skipped[name] = str(error)


def forwards(folder: Path, rounds: Mapping[str, int], threads: int, skipped: Skipped) -> dict[str, Any]:
    """Seconds of a forward pass for each row of ``rounds``, of the model's matrix products alone, and the accuracy."""
    architecture = Bundle.open(folder / BUNDLE).manifest.architecture
    rows: dict[str, Any] = {}
    with ExitStack() as stack:
        workers = {}
        for name in (name for name in (*PEERS, *CEILINGS) if name not in skipped):
            try:
                opened = (Turns, name, folder, threads) if name in PEERS else (Ceiling, name, architecture, threads)
                workers[name] = stack.enter_context(Worker(*opened))
            except WorkerError as error:
                leave_out(name, error, skipped)
        for row, count in rounds.items():
            waveform = speech_like(FORWARDS[row] * RATE, RATE)
            turns = {name: partial(worker.ask, "seconds", waveform) for name, worker in workers.items()}
            warm = in_rounds({name: turn for name, turn in turns.items() if name not in skipped}, 1, skipped)
            seconds = in_rounds({name: turns[name] for name in warm}, count, skipped)
            rows[row] = {
                "operations": operations(architecture, len(waveform)),
                "product_operations": product_operations(architecture, len(waveform)),
                "seconds": {name: times for name, times in seconds.items() if name in PEERS},
                "ceilings": {name: times for name, times in seconds.items() if name in CEILINGS},
            }
        remaining = {name: worker for name, worker in workers.items() if name in PEERS and name not in skipped}
        return {"rows": rows, "accuracy": accuracy(remaining)}


def accuracy(workers: Mapping[str, Worker]) -> dict[str, dict[str, float]]:
    """How far each peer's frames and pooled vector of 10 s are from the baseline's."""
    waveform = speech_like(FORWARDS["10s"] * RATE, RATE)
    answers = {
        name: [worker.ask("embed", waveform, level) for level in ("frame", "utterance")]
        for name, worker in workers.items()
    }
    expected_frames, expected_pooled = answers[BASELINE]
    rows = {}
    for name, (frames, pooled) in answers.items():
        largest, _, cosine = difference(frames, expected_frames)
        pooled_cosine = difference(pooled[None], expected_pooled[None])[2]
        rows[name] = {"frame_cosine": cosine, "pooled_cosine": pooled_cosine, "difference": largest}
    return rows


def processes(
    folder: Path, audio: Mapping[str, Path], rounds: Mapping[str, int], threads: int, skipped: Skipped
) -> dict[str, Any]:
    """Seconds and peak memory of whole processes, from the first import to the stored vectors, for each row.

    Args:
        folder: the model's forms.
        audio: the file and the folder of files, by row.
        rounds: rounds of the rows that are wanted.
        threads: threads of each engine.
        skipped: who is left out from the start, and gains those who fail.
    """
    with tempfile.TemporaryDirectory() as outputs:

        def stored(name: str) -> Path:
            return Path(outputs) / f"{name}.npz"

        def turns(row: str) -> dict[str, Callable[[], tuple[float, int]]]:
            names = [name for name, peer in PEERS.items() if name not in skipped and not peer.compiled]
            return {name: partial(run, command(name, folder, threads, stored(name), audio[row])) for name in names}

        in_rounds(turns("file"), 1, skipped)  # so that every file is in the system's cache
        rows = {}
        for row, count in rounds.items():
            figures = in_rounds(turns(row), count, skipped)
            vectors = {name: np.load(stored(name))["embeddings"] for name in figures}
            rows[row] = {
                "audio_seconds": audio_seconds(audio[row]),
                "seconds": {name: [seconds for seconds, _ in taken] for name, taken in figures.items()},
                "peak": {name: max(peak for _, peak in taken) for name, taken in figures.items()},
                "pooled_cosine": {name: difference(found, vectors[BASELINE])[2] for name, found in vectors.items()},
            }
        return rows


def command(name: str, folder: Path, threads: int, output: Path, audio: Path) -> list[str]:
    """The command that embeds a file or a folder: ``w2v-embed``, or the script of a peer."""
    if options := PEERS[name].options:
        fixed = ("-m", folder / BUNDLE, "-o", output, "--overwrite", "--threads", threads)
        return [sys.executable, "-c", _EMBED, *map(str, (audio, *fixed)), *options]
    return [sys.executable, peers.__file__, *map(str, (name, folder, threads, output, audio))]


def run(command: Sequence[str]) -> tuple[float, int]:
    """Run a process: (wall seconds, peak memory in bytes).

    Raises:
        WorkerError: it failed; the last line that it said.
    """
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read().decode().strip().splitlines()
    if status:
        raise WorkerError(said[-1].split(": ", 1)[-1] if said else f"ended with exit code {process.returncode}")
    return wall, usage.ru_maxrss * 1024


def audio_seconds(audio: Path) -> float:
    """Seconds of audio in a file, or in the files of a folder."""
    paths = audio.glob("*.wav") if audio.is_dir() else [audio]
    return sum(float(soundfile.info(path).duration) for path in paths)
