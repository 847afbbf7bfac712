"""``.parquet``: ``file``, ``start``, ``end``, the head's labels, ``embedding``; one row per input, or per frame.

A frame-level head has its own logits in each row. A label's column has its name, with ``~2`` where another column has
that name already; the labels' columns are all those between ``end`` and ``embedding``. ``embedding`` is
fixed_size_list<float32> of D numbers; for several layers of layers · D, layer by layer (``layers`` and ``dim`` of the
metadata). The schema holds the metadata as JSON under ``b"w2v"``. The inputs' warnings by path, and at frame level
their durations, are known only at the end, so they are in the file's own key-value metadata, under ``b"w2v_warnings"``
and ``b"w2v_durations"``. Text in Parquet must be UTF-8; paths that are not are escaped, see :func:`file_text`.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from w2v_runtime.stores.base import Layout, Ledger, Metadata
from w2v_runtime.stores.reading import BLOCK_BYTES, Record, Recorder, Shape, Values, block_rows, cut, vector_shape
from w2v_runtime.stores.tree import told_apart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from w2v_runtime.embedding.results import Embedding
    from w2v_runtime.stores.pending import PendingFile

METADATA_KEY: Final = "w2v"
WARNINGS_KEY: Final = "w2v_warnings"
DURATIONS_KEY: Final = "w2v_durations"
#: Vectors are held back until they fill a row group of this many bytes.
ROW_GROUP_BYTES: Final = 32 * 2**20

_BEFORE_LABELS: Final = ("file", "start", "end")
_VECTORS: Final = "embedding"
#: The least that is read at a time from each of many columns, in bytes and in rows: each read has a high fixed cost.
_MIN_BUFFER_BYTES: Final = 4096
_MIN_ROWS: Final = 256

_URI: Final = "file:"


def file_text(path: str) -> str:
    """A path as Parquet text: itself if it is UTF-8, else its bytes percent-encoded after ``file:``.

    A path that itself begins with ``file:`` is encoded too, so the way back is certain:
    ``os.fsdecode(urllib.parse.unquote_to_bytes(text[5:])) if text.startswith("file:") else text``.
    """
    utf8 = not any("\ud800" <= character <= "\udfff" for character in path)
    return path if utf8 and not path.startswith(_URI) else _URI + quote(path, errors="surrogateescape")


def path_of(text: str) -> str:
    """The path that :func:`file_text` turned into ``text``."""
    return os.fsdecode(unquote_to_bytes(text.removeprefix(_URI))) if text.startswith(_URI) else text


class ParquetStore:
    """Collects rows in one fixed buffer and writes each full one as a row group."""

    def __init__(self, pending: PendingFile, layout: Layout) -> None:
        self._pending = pending
        self._layout = layout
        self._ledger = Ledger(layout)
        width = int(np.prod(layout.vector))
        numbers = width + (len(layout.labels) if layout.logits_by_frame else 0)
        capacity = max(1, min(ROW_GROUP_BYTES // (4 * numbers), layout.rows))
        self._files: list[str] = []
        self._times = np.empty((2, capacity))
        self._logits = np.empty((len(layout.labels), capacity), np.float32)
        self._vectors = np.empty((capacity, width), np.float32)
        self._schema = _schema(layout, width, json.dumps(self._ledger.metadata()))
        self._file = pending.create()
        # Dictionaries and statistics of vectors cost time and never help a reader.
        self._writer = pq.ParquetWriter(
            self._file, self._schema, use_dictionary=["file"], write_statistics=[*_BEFORE_LABELS]
        )

    def write(self, embedding: Embedding) -> None:
        rows = self._layout.rows_of(embedding)
        times, logits = np.stack(self._layout.times_of(embedding)), self._layout.logits_of(embedding)
        file = file_text(embedding.path)
        done = 0
        while done < len(rows):
            filled = len(self._files)
            taken = min(len(rows) - done, len(self._vectors) - filled)
            self._files += [file] * taken
            self._times[:, filled : filled + taken] = times[:, done : done + taken]
            self._logits[:, filled : filled + taken] = logits[done : done + taken].T
            self._vectors[filled : filled + taken] = rows[done : done + taken].reshape(taken, -1)
            done += taken
            if len(self._files) == len(self._vectors):
                self._write_row_group()
        self._ledger.add(embedding, len(rows))

    def commit(self) -> None:
        self._ledger.check_complete()
        if self._files:
            self._write_row_group()
        late = {WARNINGS_KEY: self._ledger.warnings, DURATIONS_KEY: self._ledger.frame_durations}
        self._writer.add_key_value_metadata({key: json.dumps(told) for key, told in late.items() if told})
        self._writer.close()
        self._file.close()
        self._pending.commit()

    def discard(self) -> None:
        self._pending.discard(self._writer, self._file)
        # A writer whose close failed closes again when it is garbage-collected, and prints the error.
        self._writer.is_open = False

    def _write_row_group(self) -> None:
        rows = len(self._files)
        vectors = pa.FixedSizeListArray.from_arrays(
            pa.array(self._vectors[:rows].ravel()), type=self._schema.field(_VECTORS).type
        )
        columns = [pa.array(self._files), *map(pa.array, (*self._times[:, :rows], *self._logits[:, :rows])), vectors]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=rows)
        self._files.clear()


def read(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The values of each input."""
    return cut(_vectors(path), shapes)


def read_logits(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The frame-level logits (T, K) of each input."""
    return cut(_logits(path), shapes)


def read_records(path: Path) -> Iterator[Record]:
    """The record of each input, from the rows and the file's metadata."""
    with path.open("rb") as file:
        schema, told = pq.read_schema(file), pq.read_metadata(file).metadata or {}
    labels = schema.names[len(_BEFORE_LABELS) : -1]
    warnings, durations = (json.loads(told.get(key.encode(), b"null")) for key in (WARNINGS_KEY, DURATIONS_KEY))
    rows = (
        (path_of(file), start, end, logits)
        for batch in _batches(path, [*_BEFORE_LABELS, *labels], _MIN_ROWS)
        for file, start, end, *logits in zip(
            *(batch.column(name).to_pylist() for name in (*_BEFORE_LABELS, *labels)), strict=True
        )
    )
    return Recorder(_metadata(schema), warnings or {}).by_rows(rows, durations or ())


def read_metadata(path: Path) -> Metadata:
    """The metadata of the output, without the inputs' warnings."""
    with path.open("rb") as file:
        return _metadata(pq.read_schema(file))


def _metadata(schema: pa.Schema) -> Metadata:
    metadata: Metadata = json.loads(schema.metadata[METADATA_KEY.encode()])
    return metadata


def _vectors(path: Path) -> Iterator[Values]:
    vector = vector_shape(read_metadata(path))
    for batch in _batches(path, [_VECTORS], block_rows(vector)):
        yield batch.column(_VECTORS).flatten().to_numpy().reshape(len(batch), *vector)


def _logits(path: Path) -> Iterator[Values]:
    with path.open("rb") as file:
        names = pq.read_schema(file).names[len(_BEFORE_LABELS) : -1]
    for batch in _batches(path, names, max(_MIN_ROWS, block_rows((len(names),)))):
        yield np.stack([batch.column(name).to_numpy() for name in names], axis=1)


def _batches(path: Path, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """The named columns, in batches of ``rows`` rows.

    A batch may hold other columns too: Parquet takes a dot in a name for a path, so that ``a`` also selects ``a.b``.
    """
    # Without a buffer size, whole row groups would be read ahead.
    buffer = max(_MIN_BUFFER_BYTES, BLOCK_BYTES // len(columns))
    with path.open("rb") as file, pq.ParquetFile(file, buffer_size=buffer) as output:
        yield from output.iter_batches(rows, columns=columns)


def _schema(layout: Layout, width: int, metadata: str) -> pa.Schema:
    number = pa.field("element", pa.float32(), nullable=False)
    kinds = dict(zip(_BEFORE_LABELS, (pa.string(), pa.float64(), pa.float64()), strict=True))
    kinds |= {name: pa.float32() for name in told_apart(layout.labels, (*_BEFORE_LABELS, _VECTORS))}
    kinds |= {_VECTORS: pa.list_(number, width)}
    fields = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]
    return pa.schema(fields, metadata={METADATA_KEY: metadata})
