"""Peers side by side, on a processor or a GPU: warm forward passes in rounds, how near their vectors are, the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import numpy as np
from ceilings import arithmetic
from peers import BASELINE, RATE, Array, Peer
from processes import Figure, ProcessError, Skipped, Worker, in_rounds
from report import GIGA, MIB, spread, table

from w2v_models.manifest import Architecture
from w2v_runtime.embedding.parity import difference

#: Utterances, and whether ``frame`` or ``utterance`` vectors of them are wanted.
Batch = tuple[Sequence[Array], str]
COMPILES = "not run: compiling costs more than it saves"


@contextmanager
def opened(entrants: Mapping[str, tuple[Any, ...]], skipped: Skipped) -> Iterator[dict[str, Worker]]:
    """Each entrant's class, opened with its arguments in a process of its own; who cannot be opened is skipped."""
    with ExitStack() as stack:
        workers = {}
        for name, (kind, *arguments) in entrants.items():
            if name in skipped:
                continue
            try:
                workers[name] = stack.enter_context(closing(Worker(kind, *arguments)))
            except ProcessError as error:
                skipped[name] = str(error)
        yield workers


def turns(entrants: Mapping[str, Callable[[], Figure]], rounds: int, skipped: Skipped) -> dict[str, list[Figure]]:
    """Figures of so many rounds; without the baseline there is nothing to compare."""
    figures = in_rounds(entrants, rounds, skipped)
    if BASELINE in skipped:
        raise SystemExit(f"{BASELINE} cannot be run, and all else is compared with it: {skipped[BASELINE]}")
    return figures


def forward(
    workers: Mapping[str, Worker], batch: Batch, rounds: int, architecture: Architecture, skipped: Skipped
) -> dict[str, Any]:
    """Seconds of a forward pass over a batch, behind one round that is not counted; and the arithmetic in it."""
    entrants = {name: partial(worker.ask, "seconds", *batch) for name, worker in workers.items()}
    turns(entrants, 1, skipped)
    seconds = turns(entrants, rounds, skipped)
    parts = [arithmetic(architecture, len(waveform)) for waveform in batch[0]]
    return {
        "audio_seconds": sum(map(len, batch[0])) / RATE,
        "operations": sum(sum(part.values()) for part in parts),
        "product_operations": sum(part["front end"] + part["linear"] for part in parts),
        "seconds": seconds,
    }


def accuracy(workers: Mapping[str, Worker], audio: Sequence[Array], skipped: Skipped) -> dict[str, dict[str, float]]:
    """How far each peer's frames and means of a batch are from the baseline's of each utterance alone."""
    expected = [workers[BASELINE].ask("embed", [waveform], "frame")[0] for waveform in audio]
    means, rows = np.stack([frames.mean(axis=0) for frames in expected]), {}
    frames, pooled = (
        turns({name: partial(worker.ask, "embed", audio, level) for name, worker in workers.items()}, 1, skipped)
        for level in ("frame", "utterance")
    )
    for name, (vectors,) in pooled.items():
        each = [difference(mine, theirs) for mine, theirs in zip(*frames[name], expected, strict=True)]
        rows[name] = {
            "frame_cosine": min(cosine for _, _, cosine in each),
            "pooled_cosine": difference(np.stack(vectors), means)[2],
            "difference": max(largest for largest, _, _ in each),
        }
    return rows


def ratios(seconds: Mapping[str, Sequence[float]], name: str) -> list[float]:
    """How many times as fast as the baseline a peer was, in each round."""
    return [theirs / own for theirs, own in zip(seconds[BASELINE], seconds[name], strict=True)]


def rate(operations: float, seconds: Sequence[float]) -> float:
    """GFLOP/s at the median time."""
    return operations / statistics.median(seconds) / GIGA


def peer_table(
    peers: Mapping[str, Peer],
    row: Mapping[str, Any],
    skipped: Skipped,
    accuracy: Mapping[str, Mapping[str, float]],
    ceilings: Mapping[str, float],
) -> list[str]:
    """Every peer's line of Markdown: its speed in the rounds of a row, and beside it how near it is to the baseline.

    ``accuracy`` is that of forward passes; a row of whole processes, which has a peak of memory, has its own.
    ``ceilings`` are GFLOP/s that can be reached, by precision.
    """
    seconds, whole, lines = row["seconds"], "peak" in row, []
    for name, peer in peers.items():
        cells = {"": name}
        lines.append(cells)
        if name not in seconds:
            cells["seconds"] = COMPILES if whole and peer.compiled else f"not run: {skipped.get(name, '')}"
            continue
        cells["seconds"] = spread(seconds[name], ".2f" if whole else ".3f")
        cells["times as fast"] = "1.00" if name == BASELINE else spread(ratios(seconds, name))
        if "audio_seconds" in row:
            cells["× real time"] = f"{row['audio_seconds'] / statistics.median(seconds[name]):,.1f}"
        if whole:
            cells["peak memory"] = f"{row['peak'][name] / MIB:.0f} MiB"
            cells["min pooled cosine"] = f"{row['pooled_cosine'][name]:.6f}"
            continue
        speed, near = rate(row["operations"], seconds[name]), accuracy[name]
        cells["GFLOP/s"] = f"{speed:,.0f}"
        if most := ceilings.get(peer.precision):
            cells["of the ceiling"] = f"{speed / most:.0%}"
        cells["min frame cosine"] = f"{near['frame_cosine']:.6f}"
        cells["pooled cosine"] = f"{near['pooled_cosine']:.6f}"
        cells["max abs Δ"] = f"{near['difference']:.1e}"
    return table(lines)
