"""``.csv``: ``file,start,end``, the head's labels, ``f0 … f{D-1}``; one row per input, or per frame at frame level.

With several layers there is a column for each layer and dimension, ``l{layer}_f{i}``. Times are seconds; an utterance
runs from 0 to its duration. A frame-level head has its own logits in each row. A label's column has its name, with
``~2`` where another column has that name already; the labels' columns are the K that follow ``end``. Numbers have the
fewest digits that give the same float32. The file is UTF-8, line feeds end rows, fields are quoted where needed. Paths
that are not UTF-8 are escaped, see :func:`w2v_runtime.stores.names.file_text`. Of segments, ``start`` and ``end`` are
those in the recording, and the other columns of their table follow ``end``.
"""

from __future__ import annotations

import csv
import itertools
from typing import TYPE_CHECKING, Final

import numpy as np

from w2v_runtime.stores.base import COLUMNS, Layout, Ledger, columns_of
from w2v_runtime.stores.names import file_text, path_of
from w2v_runtime.stores.reading import Record, Recorder, Shape, Values, block_rows, cut, vector_shape
from w2v_runtime.stores.text import TextOutput, joined, shortest
from w2v_runtime.stores.text import read_metadata as read_metadata
from w2v_runtime.stores.tree import told_apart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from w2v_runtime.embedding.results import Embedding
    from w2v_runtime.stores.pending import PendingFile
    from w2v_runtime.tables.rows import Value

#: The columns in front of those of the labels.
_FIXED: Final = ("file", "start", "end")


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
        file = _quoted(file_text(embedding.path))
        told = [_quoted(_text(field)) for field in self._layout.fields_of(embedding)]
        logits = self._layout.logits_of(embedding)
        for row, labelled, start, end in zip(rows, logits, starts.tolist(), ends.tolist(), strict=True):
            fields = (file, str(start), str(end), *told, *shortest(labelled), joined(row.ravel(), ","))
            self._output.file.write(",".join(fields) + "\n")
        self._ledger.add(embedding, len(rows))

    def commit(self) -> None:
        self._output.commit(self._ledger)

    def discard(self) -> None:
        self._output.discard()


def read(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The values of each input."""
    vector = vector_shape(read_metadata(path))
    width = int(np.prod(vector))
    return cut(_blocks(path, slice(-width, None), vector), shapes)


def read_logits(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The frame-level logits (T, K) of each input."""
    metadata = read_metadata(path)
    width, told = int(np.prod(vector_shape(metadata))), len(metadata.get(COLUMNS, ()))
    return cut(_blocks(path, slice(len(_FIXED) + told, -width)), shapes)


def read_records(path: Path) -> Iterator[Record]:
    """The record of each input, from the table and the metadata file beside it."""
    metadata = read_metadata(path)
    width, columns = int(np.prod(vector_shape(metadata))), columns_of(metadata)
    labels = len(_FIXED) + len(columns)
    rows = (
        (
            path_of(row[0]),
            float(row[1]),
            float(row[2]),
            np.array(row[labels:-width], np.float32).tolist(),
            tuple(column.typed(field) for column, field in zip(columns, row[len(_FIXED) : labels], strict=True)),
        )
        for row in _rows(path)
    )
    recorder = Recorder(metadata, metadata.get("warnings", {}))
    return recorder.by_rows(rows, metadata.get("durations", ()), metadata.get("segments", ()))


def columns(layout: Layout) -> list[str]:
    """The names in the header line."""
    dims = vector_columns(layout.layers, layout.dim)
    told = layout.column_names((*_FIXED, *layout.labels, *dims))
    return [*_FIXED, *told, *told_apart(layout.labels, (*_FIXED, *dims)), *dims]


def vector_columns(layers: Sequence[str], dim: int) -> list[str]:
    """The names of the columns of a vector: ``f0`` …, and of several layers ``l9_f0`` …."""
    dims = [f"f{i}" for i in range(dim)]
    return dims if len(layers) == 1 else [f"l{layer}_{name}" for layer in layers for name in dims]


def _text(field: Value) -> str:
    return "" if field is None else str(field)


def _quoted(text: str) -> str:
    # The csv module of Python before 3.13 leaves a lone carriage return bare when lines end in "\n".
    if any(character in text for character in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def _blocks(path: Path, part: slice, vector: Shape = (-1,)) -> Iterator[Values]:
    """The fields ``part`` of each row as numbers, block by block: (rows, *vector)."""
    rows = _rows(path)
    for first in rows:
        block = [first, *itertools.islice(rows, block_rows((len(first),)) - 1)]
        yield np.array([row[part] for row in block], np.float32).reshape(len(block), *vector)


def _rows(path: Path) -> Iterator[list[str]]:
    """The rows after the header; ValueError if one has another number of fields than the header."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(_whole_lines(file), strict=True)
        columns = len(next(rows))
        for row in rows:
            if len(row) != columns:
                raise ValueError("a row has not as many fields as the header")
            yield row


def _whole_lines(file: Iterable[str]) -> Iterator[str]:
    """The lines of a file; ValueError if the last has no line end, for it may be cut in the middle of a number."""
    line = ""
    for line in file:
        yield line
    if not line.endswith("\n"):
        raise ValueError("its last row is cut short")
