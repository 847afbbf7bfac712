"""``.parquet``: ``file``, ``start``, ``end``, the head's labels, ``embedding``; one row per input, or per frame.

A frame-level head has its own logits in each row. Of segments, the other columns of their table follow ``end``, typed.
A label's column has its name, with ``~2`` where another column has that name already. ``embedding`` is
fixed_size_list<float32> of D numbers; several layers have a column each, ``embedding_9``. The schema holds the metadata
as JSON under ``b"w2v"``, and where pandas looks for a table's ``attrs``. The inputs' warnings by path, and at frame
level their durations and segments, are known only at the end, so they are in the file's own key-value metadata, under
``b"w2v_warnings"``, ``b"w2v_durations"`` and ``b"w2v_segments"``. Text in Parquet must be UTF-8; paths that are not are
escaped, see :func:`w2v_runtime.stores.names.file_text`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from w2v_runtime.stores.base import COLUMNS, Layout, Ledger, Metadata
from w2v_runtime.stores.names import file_text, path_of
from w2v_runtime.stores.reading import BLOCK_BYTES, Record, Recorder, Shape, Values, block_rows, cut, vector_shape
from w2v_runtime.stores.tree import told_apart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from w2v_runtime.embedding.results import Embedding
    from w2v_runtime.stores.pending import PendingFile

METADATA_KEY: Final = "w2v"
#: Where pandas keeps ``DataFrame.attrs``.
_PANDAS_KEY: Final = "PANDAS_ATTRS"
WARNINGS_KEY: Final = "w2v_warnings"
DURATIONS_KEY: Final = "w2v_durations"
SEGMENTS_KEY: Final = "w2v_segments"
_KINDS: Final = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
#: Vectors are held back until they fill a row group of this many bytes.
ROW_GROUP_BYTES: Final = 32 * 2**20

_BEFORE_LABELS: Final = ("file", "start", "end")
_VECTORS: Final = "embedding"
#: The least that is read at a time from each of many columns, in bytes and in rows: each read has a high fixed cost.
_MIN_BUFFER_BYTES: Final = 4096
_MIN_ROWS: Final = 256


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
        self._told: list[list[Any]] = [[] for _ in layout.columns or ()]
        self._times = np.empty((2, capacity))
        self._logits = np.empty((len(layout.labels), capacity), np.float32)
        self._vectors = np.empty((capacity, width), layout.numpy_dtype)
        self._schema = _schema(layout, json.dumps(self._ledger.metadata()))
        self._file = pending.create()
        # Dictionaries and statistics of vectors cost time and never help a reader.
        self._writer = pq.ParquetWriter(
            self._file, self._schema, use_dictionary=["file"], write_statistics=[*_BEFORE_LABELS]
        )

    def write(self, embedding: Embedding) -> None:
        rows = self._layout.rows_of(embedding)
        times, logits = np.stack(self._layout.times_of(embedding)), self._layout.logits_of(embedding)
        file = file_text(embedding.path)
        if self._files and len(self._vectors) - len(self._files) < len(rows) <= len(self._vectors):
            self._write_row_group()  # so that one row group holds all rows of an input, if any can
        done = 0
        while done < len(rows):
            filled = len(self._files)
            taken = min(len(rows) - done, len(self._vectors) - filled)
            self._files += [file] * taken
            for column, field in zip(self._told, self._layout.fields_of(embedding), strict=True):
                column += [field] * taken
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
        ledger = self._ledger
        late = {
            WARNINGS_KEY: ledger.warnings,
            DURATIONS_KEY: ledger.frame_durations,
            SEGMENTS_KEY: ledger.frame_segments,
        }
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
        kind = self._schema.types[-1]
        layers = self._vectors[:rows].reshape(rows, -1, kind.list_size)
        vectors = [
            pa.FixedSizeListArray.from_arrays(pa.array(layers[:, layer].ravel()), type=kind)
            for layer in range(layers.shape[1])
        ]
        times, logits = map(pa.array, self._times[:, :rows]), map(pa.array, self._logits[:, :rows])
        kinds = self._schema.types[len(_BEFORE_LABELS) :]
        told = [pa.array(values, kind) for values, kind in zip(self._told, kinds, strict=False)]
        columns = [pa.array(self._files), *times, *told, *logits, *vectors]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=rows)
        self._files.clear()
        for values in self._told:
            values.clear()


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
    metadata = _metadata(schema)
    names = schema.names[: -len(_vector_names(schema))]
    labels = len(_BEFORE_LABELS) + len(metadata.get(COLUMNS, ()))
    keys = (WARNINGS_KEY, DURATIONS_KEY, SEGMENTS_KEY)
    warnings, durations, segments = (json.loads(told.get(key.encode(), b"null")) for key in keys)
    rows = (
        (path_of(row[0]), row[1], row[2], row[labels:], row[len(_BEFORE_LABELS) : labels])
        for batch in _batches(path, names, _MIN_ROWS)
        for row in zip(*(batch.column(name).to_pylist() for name in names), strict=True)
    )
    return Recorder(metadata, warnings or {}).by_rows(rows, durations or (), segments or ())


def read_metadata(path: Path) -> Metadata:
    """The metadata of the output, without the inputs' warnings."""
    with path.open("rb") as file:
        return _metadata(pq.read_schema(file))


def _metadata(schema: pa.Schema) -> Metadata:
    metadata: Metadata = json.loads(schema.metadata[METADATA_KEY.encode()])
    return metadata


def _vectors(path: Path) -> Iterator[Values]:
    vector = vector_shape(read_metadata(path))
    with path.open("rb") as file:
        names = _vector_names(pq.read_schema(file))
    for batch in _batches(path, names, block_rows(vector)):
        layers = [batch.column(name).flatten().to_numpy().reshape(len(batch), -1) for name in names]
        yield np.concatenate(layers, axis=1).astype(np.float32, copy=False).reshape(len(batch), *vector)


def _logits(path: Path) -> Iterator[Values]:
    with path.open("rb") as file:
        schema = pq.read_schema(file)
    told = len(_BEFORE_LABELS) + len(_metadata(schema).get(COLUMNS, ()))
    names = schema.names[told : -len(_vector_names(schema))]
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


def _vector_columns(layers: Sequence[str]) -> list[str]:
    return [_VECTORS] if len(layers) == 1 else [f"{_VECTORS}_{layer}" for layer in layers]


def _vector_names(schema: pa.Schema) -> list[str]:
    """The columns of the vectors, which are the last; the previous release wrote one for several layers, too."""
    if schema.names[-1] == _VECTORS:
        return [_VECTORS]
    return _vector_columns(_metadata(schema)["layers"])


def _schema(layout: Layout, metadata: str) -> pa.Schema:
    vectors = _vector_columns(layout.layers)
    taken = (*_BEFORE_LABELS, _VECTORS, *vectors)
    kinds = dict(zip(_BEFORE_LABELS, (pa.string(), pa.float64(), pa.float64()), strict=True))
    told = layout.column_names((*taken, *layout.labels))
    kinds |= {name: _KINDS[column.kind] for name, column in zip(told, layout.columns or (), strict=True)}
    kinds |= {name: pa.float32() for name in told_apart(layout.labels, taken)}
    number = pa.field("element", pa.float32() if layout.dtype == "float32" else pa.float16(), nullable=False)
    kinds |= dict.fromkeys(vectors, pa.list_(number, layout.dim))
    fields = [pa.field(name, kind, nullable=name in told) for name, kind in kinds.items()]
    return pa.schema(fields, metadata={METADATA_KEY: metadata, _PANDAS_KEY: metadata})
