"""``.h5``: ``paths``, ``durations``, vectors, a head's ``logits`` and ``logit_names``; ``metadata`` as an attribute.

At utterance level there is one matrix: ``f["embeddings"][:]`` is (N, D). At frame level there is one dataset per input,
named like the input: ``f["frames/a/b.wav"][:]`` is (T, D); by position, ``f[f["datasets"][i]][:]`` belongs to
``f["paths"][i]``. A head's ``logits`` are a matrix (N, K) at both levels; those of a frame-level head are one dataset
per input, ``f["logits/a/b.wav"][:]`` of (T, K). If an input is absolute or has ``..``, all are named from the deepest
folder that holds them all (:func:`w2v_runtime.stores.tree.mirrored`). Several layers put a layers axis before D. Text
is UTF-8; paths that are not are escaped, see :func:`w2v_runtime.stores.names.file_text`. Of segments, ``starts``,
``ends`` and, of frames, ``frame_starts`` are seconds of the recording; ``columns/NAME`` is another column of the table.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from typing import TYPE_CHECKING, Any, Final

import h5py
import numpy as np

from w2v_runtime.embedding.results import Segment
from w2v_runtime.stores.base import Layout, Ledger, Metadata, columns_of
from w2v_runtime.stores.names import file_text, path_of, plain
from w2v_runtime.stores.npz import typed_array
from w2v_runtime.stores.reading import Record, Recorder, Shape, Values, block_rows, check_array, cut, paired
from w2v_runtime.stores.tree import mirrored, told_apart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from w2v_runtime.embedding.results import Embedding
    from w2v_runtime.stores.pending import PendingFile
    from w2v_runtime.tables.rows import Column

_FRAMES: Final = "frames"
_LOGITS: Final = "logits"
_STAGING: Final = "staging"
_COLUMNS: Final = "columns"
#: Names of datasets that are read at a time.
_NAMES_AT_ONCE: Final = 4096


class Hdf5Store:
    """Writes rows of the matrix, or numbered datasets that get their names at commit, once all inputs are known."""

    def __init__(self, pending: PendingFile, layout: Layout) -> None:
        self._pending = pending
        self._layout = layout
        self._ledger = Ledger(layout)
        self._told: list[list[Any]] = [[] for _ in layout.columns or ()]
        self._rows: list[npt.NDArray[Any]] = []
        self._disk = _DeferredErrorFile(pending.temporary)
        self._file = h5py.File(self._disk, "w")
        if layout.level == "frame":
            self._file.create_group(_FRAMES)
            self._target = self._file.create_group(_STAGING)
            if layout.logits_by_frame:
                self._file.create_group(_LOGITS)
        else:
            self._target = self._file.create_dataset("embeddings", (layout.count, *layout.vector), layout.numpy_dtype)

    def write(self, embedding: Embedding) -> None:
        rows = self._layout.rows_of(embedding)
        position = len(self._ledger.paths)
        if self._layout.level == "frame":
            self._target.create_dataset(f"{_FRAMES}/{position}", data=rows)
            if self._layout.logits_by_frame:
                self._target.create_dataset(f"{_LOGITS}/{position}", data=self._layout.logits_of(embedding))
        else:
            self._rows.append(rows[0])
            if len(self._rows) >= block_rows(self._layout.vector) // 8:
                self._write_rows(position + 1)
        self._disk.check()
        for values, field in zip(self._told, self._layout.fields_of(embedding), strict=True):
            values.append(field)
        self._ledger.add(embedding, len(rows))

    def _write_rows(self, end: int) -> None:
        """Write the rows that wait, the last of them before ``end``: a call for each takes ten times as long."""
        if self._rows:
            self._target[end - len(self._rows) : end] = np.stack(self._rows)
            self._rows.clear()

    def commit(self) -> None:
        ledger, layout = self._ledger, self._layout
        ledger.check_complete()
        self._write_rows(len(ledger.paths))
        self._add_text("paths", [file_text(path) for path in ledger.paths])
        self._file["durations"] = np.asarray(ledger.durations)
        if layout.columns is not None:
            self._add_segments()
        if layout.labels and not layout.logits_by_frame:
            self._file[_LOGITS] = np.asarray(ledger.logits).reshape(layout.count, len(layout.labels))
        if layout.labels:
            self._add_text("logit_names", layout.labels)
        if layout.level == "frame":
            self._name_datasets()
        self._file.attrs["metadata"] = ledger.metadata_text()
        self._file.close()
        self._disk.check()
        self._disk.close()
        self._pending.commit()

    def discard(self) -> None:
        self._disk.abandon()
        self._pending.discard(self._file, self._disk)

    def _add_segments(self) -> None:
        ledger, columns = self._ledger, self._layout.columns or ()
        self._file["starts"], self._file["ends"] = np.asarray(ledger.starts), ledger.ends
        if self._layout.level == "frame":
            self._file["frame_starts"] = np.asarray(ledger.firsts)
        for name, column, values in zip(_column_names(columns), columns, self._told, strict=True):
            if column.kind == "str":
                self._add_text(name, values)
            else:
                self._file[name] = typed_array(column, values)

    def _add_text(self, name: str, strings: Sequence[str]) -> None:
        # Of fixed length, which PyTables reads, too; an empty array of bytes would have none.
        data = np.array([_bytes(string) for string in strings] or [b""], "S")
        self._file.create_dataset(name, data=data[: len(strings)].astype(f"S{max(1, data.itemsize)}"))

    def _name_datasets(self) -> None:
        names = mirrored([file_text(name) for name in self._ledger.names])
        for group in (_FRAMES, _LOGITS) if self._layout.logits_by_frame else (_FRAMES,):
            for position, name in enumerate(names):
                self._file.move(f"{_STAGING}/{group}/{position}", _bytes(f"{group}/{name}"))
        del self._file[_STAGING]
        self._add_text("datasets", [f"{_FRAMES}/{name}" for name in names])


def read(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The values of each input."""
    with path.open("rb") as file, h5py.File(file, "r") as output:
        if _FRAMES not in output:
            yield from cut(_blocks(output["embeddings"]), shapes)
            return
        yield from _datasets(output, _FRAMES, shapes)


def read_logits(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The frame-level logits (T, K) of each input."""
    with path.open("rb") as file, h5py.File(file, "r") as output:
        yield from _datasets(output, _LOGITS, shapes)


def read_records(path: Path) -> Iterator[Record]:
    """The record of each input, from the datasets beside the vectors."""
    metadata = read_metadata(path)
    recorder = Recorder(metadata, metadata.get("warnings", {}))
    with path.open("rb") as file, h5py.File(file, "r") as output:
        durations = output["durations"][:].tolist()
        rows = (len(output[name]) for name in _names(output["datasets"])) if _FRAMES in output else itertools.repeat(1)
        columns = metadata["labels"] and metadata["head_level"] != "frame"
        logits = output[_LOGITS][:].tolist() if columns else itertools.repeat(())
        segments = _segments(output, metadata) if recorder.segmented else itertools.repeat(None)
        told = zip(_names(output["paths"]), durations, rows, logits, segments, strict=False)
        for name, duration, frames, numbers, segment in told:
            yield recorder.record(path_of(os.fsdecode(name)), duration, frames, numbers, segment)


def _segments(output: h5py.File, metadata: Metadata) -> Iterator[Segment]:
    columns = columns_of(metadata)
    fields = [
        [os.fsdecode(text) for text in output[name][:]] if column.kind == "str" else output[name][:].tolist()
        for name, column in zip(_column_names(columns), columns, strict=True)
    ]
    starts, ends = output["starts"][:].tolist(), output["ends"][:].tolist()
    firsts = output["frame_starts"][:].tolist() if metadata["level"] == "frame" else starts
    rows = zip(*fields, strict=True) if fields else itertools.repeat(())
    for start, end, first, row in zip(starts, ends, firsts, rows, strict=False):
        told = (column.typed(None if value != value else value) for column, value in zip(columns, row, strict=True))
        yield Segment(start, end, None, tuple(told), first)


def _column_names(columns: Iterable[Column]) -> list[str]:
    """The datasets of a table's other columns."""
    names = (plain(column.name).replace("/", "_") for column in columns)
    plain_names = (name if name.strip("\0.") else "unnamed" for name in names)  # HDF5 has no names of dots alone
    return [f"{_COLUMNS}/{name}" for name in told_apart(plain_names, ())]


def read_metadata(path: Path) -> Metadata:
    """The metadata of the output."""
    with path.open("rb") as file, h5py.File(file, "r") as output:
        metadata: Metadata = json.loads(output.attrs["metadata"])
    return metadata


def _datasets(output: h5py.File, group: str, shapes: Iterable[Shape]) -> Iterator[Values]:
    """Each input's dataset in ``group``, whose names are those of the group of frames."""
    for name, shape in paired(_names(output["datasets"]), shapes):
        dataset = output[_bytes(group) + name.removeprefix(_bytes(_FRAMES))]
        check_array(dataset.dtype, dataset.shape, shape)
        yield dataset[:].astype(np.float32, copy=False)


def _blocks(matrix: h5py.Dataset) -> Iterator[Values]:
    check_array(matrix.dtype, matrix.shape, matrix.shape)
    at_once = block_rows(matrix.shape[1:])
    for start in range(0, len(matrix), at_once):
        yield matrix[start : start + at_once].astype(np.float32, copy=False)


def _names(datasets: h5py.Dataset) -> Iterator[bytes]:
    for start in range(0, len(datasets), _NAMES_AT_ONCE):
        yield from datasets[start : start + _NAMES_AT_ONCE]


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


class _DeferredErrorFile(io.FileIO):
    """A file that keeps the error of a failed write until :meth:`check` raises it.

    A write that raises under HDF5 crashes the whole process (seen with HDF5 2.0), so HDF5 is told that every write
    succeeded, and the store calls :meth:`check` afterwards.
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        super().__init__(path, "x+")
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        while len(view) and self._error is None:
            try:
                view = view[super().write(view) :]
            except OSError as error:
                self._error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return self.tell() if size is None else size

    def abandon(self) -> None:
        """Write nothing more: the file is going to be removed."""
        self._error = self._error or OSError("the output was discarded")

    def check(self) -> None:
        """Raise the first OSError that a write met."""
        if self._error is not None:
            raise self._error
