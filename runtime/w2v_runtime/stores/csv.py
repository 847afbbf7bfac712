"""``.csv``: ``file,start,end``, the head's labels, ``f0 … f{D-1}``; a row an input, or a row a frame.

Several layers give a column to each layer and dimension, ``l{layer}_f{i}``. Times are seconds; an utterance runs from 0
to its duration. Numbers have the fewest digits that give the same float32. UTF-8, line feeds end rows, quotes where
needed; a name that is not UTF-8 is written as its own bytes, and reads back with ``errors="surrogateescape"``.
"""

from __future__ import annotations

import csv
import itertools
from typing import TYPE_CHECKING

import numpy as np

from w2v_runtime.stores.base import Layout, Ledger
from w2v_runtime.stores.reading import Shape, Values, block_rows, cut, vector_shape
from w2v_runtime.stores.text import TextOutput, shortest
from w2v_runtime.stores.text import read_metadata as read_metadata

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from w2v_runtime.results import Embedding
    from w2v_runtime.stores.pending import PendingFile


class CsvStore:
    """Writes the header at once and each row as it comes."""

    def __init__(self, pending: PendingFile, layout: Layout) -> None:
        self._layout = layout
        self._ledger = Ledger(layout)
        self._output = TextOutput(pending)
        self._output.file.write(",".join(map(_quoted, columns(layout))) + "\n")

    def write(self, embedding: Embedding) -> None:
        rows = self._layout.rows_of(embedding)
        starts, ends = self._layout.times_of(embedding)
        file = _quoted(embedding.path)
        logits = [] if embedding.logits is None else list(shortest(embedding.logits))
        for row, start, end in zip(rows, starts.tolist(), ends.tolist(), strict=True):
            fields = (file, str(start), str(end), *logits, *shortest(row.ravel()))
            self._output.file.write(",".join(fields) + "\n")
        self._ledger.add(embedding, len(rows))

    def commit(self) -> None:
        self._output.commit(self._ledger)

    def discard(self) -> None:
        self._output.discard()


def read(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The values of each input."""
    return cut(_blocks(path), shapes)


def columns(layout: Layout) -> list[str]:
    """The names in the header line."""
    dims = [f"f{i}" for i in range(layout.dim)]
    if len(layout.layers) > 1:
        dims = [f"l{layer}_{dim}" for layer in layout.layers for dim in dims]
    return ["file", "start", "end", *layout.labels, *dims]


def _quoted(text: str) -> str:
    # The csv module of Python before 3.13 leaves a lone carriage return bare when lines end in "\n".
    if any(character in text for character in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def _blocks(path: Path) -> Iterator[Values]:
    vector = vector_shape(read_metadata(path))
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(_whole_lines(file), strict=True)
        header = next(rows)
        while len(block := _parsed(list(itertools.islice(rows, block_rows(vector))), len(header), vector)):
            yield block


def _whole_lines(file: Iterable[str]) -> Iterator[str]:
    """The lines of a file; a last one without its end may be cut in the middle of a number."""
    line = ""
    for line in file:
        yield line
    if not line.endswith("\n"):
        raise ValueError("its last row is cut short")


def _parsed(rows: list[list[str]], columns: int, vector: Shape) -> Values:
    """The vectors of rows of text, each of which ends in one: (rows, *vector)."""
    if any(len(row) != columns for row in rows):
        raise ValueError("a row has not as many fields as the header")
    width = int(np.prod(vector))
    return np.array([row[-width:] for row in rows], np.float32).reshape(len(rows), *vector)
