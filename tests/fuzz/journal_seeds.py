"""Journals of small runs, finished and not, of this release and the one before, as inputs of the target ``journal``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Final

import numpy as np

from w2v_runtime.embedding.results import Embedding, FrameTimes
from w2v_runtime.runs.journal import Entry, Header, Inputs, Stamp
from w2v_runtime.runs.readback import RUN, run_record
from w2v_runtime.stores import Layout, open_store

#: The results of the run that the journals tell of.
MADE: Final = tuple(
    Embedding(f"in/{index}.wav", np.arange(index, index + 4, dtype=np.float32), 1.5 * index + 1, np.ones(2, np.float32))
    for index in range(3)
)
VALUES: Final = b"".join(embedding.values.tobytes() for embedding in MADE)
_HEADER: Final = Header({"level": "utterance", "layers": ["last"]}, "1/1", True, Inputs(4, "0" * 64), (3,))


def write_output(path: Path) -> None:
    """The output of that run."""
    metadata = {"model": "tiny", "level": "utterance", "labels": ["a", "b"], "head_level": "utterance"}
    layout = Layout(
        count=len(MADE),
        frames=0,
        dim=4,
        layers=("last",),
        level="utterance",
        labels=("a", "b"),
        times=FrameTimes(0.02, 0.025),
        metadata=metadata | {RUN: run_record(_HEADER)},
    )
    store = open_store(path, layout, "npz", overwrite=True)
    for embedding in MADE:
        store.write(embedding)
    store.commit()


def journal_seeds() -> dict[str, bytes]:
    """Seeds by name."""
    seeds = {}
    for name, finished in (("finished", True), ("unfinished", False)):
        header = dataclasses.replace(_HEADER, finished=finished)
        lines = [header.to_line()]
        for index, embedding in enumerate(MADE):
            entry = Entry.of(embedding, Stamp(1000 + index, 10**18, "0" * 64), index, None if finished else 16 * index)
            lines.append(entry.to_line())
        seeds[name] = b"".join(lines)
        seeds[f"{name}-earlier"] = b"".join(map(_earlier, lines))
    return seeds


def _earlier(line: bytes) -> bytes:
    """A line as the release before wrote it."""
    data = json.loads(line)
    data.pop("crc32")
    if "fingerprint" in data:
        data = {name: data[name] for name in ("fingerprint", "shard", "finished")} | {"format": 2}
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"
