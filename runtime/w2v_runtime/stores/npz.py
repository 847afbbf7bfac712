"""``.npz``: ``embeddings``, ``paths``, ``durations``, ``metadata``; ``frame_offsets`` of frames; a head's ``logits``.

Reads with ``numpy.load(path)``, no pickle. ``embeddings`` is (N, D) float32, (ΣT, D) at frame level, with a layers axis
before D for several layers; the frames of input i are ``embeddings[frame_offsets[i]:frame_offsets[i + 1]]``. ``logits``
is (N, K), or (ΣT, K) of a frame-level head, with the same offsets; ``logit_names`` names the columns. Of segments,
``starts`` and ``ends`` (N,) are seconds of the recording, ``frame_starts`` (N,) those of their first frames, and each
other column of their table is an array (N,) of its name. Paths that are not UTF-8 are escaped, see
:func:`w2v_runtime.stores.names.file_text`.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
import zipfile
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from w2v_runtime.embedding.results import Segment
from w2v_runtime.stores.base import Layout, Ledger, Metadata, columns_of
from w2v_runtime.stores.names import file_text, path_of, plain
from w2v_runtime.stores.reading import Record, Recorder, Shape, Values, block_rows, check_array, cut
from w2v_runtime.stores.tree import told_apart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from w2v_runtime.embedding.results import Embedding
    from w2v_runtime.stores.pending import PendingFile
    from w2v_runtime.tables.rows import Column

_DTYPES: Final = {"int": np.int64, "float": np.float64, "bool": np.bool_}
#: The arrays that are not columns of a table of segments.
_RESERVED: Final = (
    *("embeddings", "paths", "durations", "frame_offsets", "logits", "logit_names", "metadata"),
    *("starts", "ends", "frame_starts"),
)
#: Text is padded to its longest string (4 bytes a character), so it is written in blocks of this many strings.
TEXT_BLOCK: Final = 4096


def write_header(file: IO[bytes], dtype: str, shape: tuple[int, ...]) -> None:
    """Write the header of a ``.npy`` file whose data follow in C order."""
    npy_format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})


def read_header(file: IO[bytes]) -> tuple[Shape, np.dtype[Any]]:
    """Read what :func:`write_header` wrote for vectors; the data follow, in C order.

    Raises:
        ValueError: it is not the header of a float32 or float16 array in C order.
    """
    version = npy_format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"it has a header of version {version}")
    shape, fortran_order, dtype = npy_format.read_array_header_1_0(file)
    if fortran_order:
        raise ValueError("it holds an array in Fortran order")
    check_array(dtype, shape, shape)
    return shape, dtype


def read(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The values of each input; the archive's checksum is checked with the last of them."""
    return _read(path, "embeddings", shapes)


def read_logits(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The frame-level logits (T, K) of each input; the archive's checksum is checked with the last of them."""
    return _read(path, "logits", shapes)


def _read(path: Path, name: str, shapes: Iterable[Shape]) -> Iterator[Values]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        yield from cut(_vectors(member), shapes)


def read_records(path: Path) -> Iterator[Record]:
    """The record of each input, from the arrays beside the vectors."""
    metadata = read_metadata(path)
    recorder = Recorder(metadata, metadata.get("warnings", {}))
    with np.load(path, allow_pickle=False) as arrays:
        durations = arrays["durations"]
        rows = np.diff(arrays["frame_offsets"]) if metadata["level"] == "frame" else np.ones(len(durations), int)
        columns = metadata["labels"] and metadata["head_level"] != "frame"
        logits = arrays["logits"] if columns else np.empty((len(durations), 0), np.float32)
        segments = _segments(path, metadata, arrays) if recorder.segmented else itertools.repeat(None)
        told = zip(_texts(path, "paths"), durations, rows.tolist(), logits.tolist(), strict=True)
        for (path_, duration, count, numbers), segment in zip(told, segments, strict=False):
            yield recorder.record(path_of(path_), duration, count, numbers, segment)


def _segments(path: Path, metadata: Metadata, arrays: Any) -> Iterator[Segment]:
    columns = columns_of(metadata)
    fields = [
        _texts(path, name) if column.kind == "str" else _missing_as_none(arrays[name].tolist())
        for name, column in zip(column_names(columns), columns, strict=True)
    ]
    starts, ends = arrays["starts"].tolist(), arrays["ends"].tolist()
    firsts = arrays["frame_starts"].tolist() if metadata["level"] == "frame" else starts
    rows = zip(*fields, strict=True) if fields else itertools.repeat(())
    for start, end, first, row in zip(starts, ends, firsts, rows, strict=False):
        told = tuple(column.typed(value) for column, value in zip(columns, row, strict=True))
        yield Segment(start, end, None, told, first)


def _missing_as_none(values: list[Any]) -> Iterator[Any]:
    return (None if value != value else value for value in values)


def column_names(columns: Iterable[Column]) -> list[str]:
    """The names of the arrays of a table's other columns."""
    return told_apart((plain(column.name).replace("/", "_") for column in columns), _RESERVED)


def typed_array(column: Column, values: Sequence[Any]) -> npt.NDArray[Any]:
    """A column of numbers; where a value is missing it is one of floats, with NaN for it."""
    if not column.missing:
        return np.array(values, _DTYPES[column.kind])
    return np.array([math.nan if value is None else float(value) for value in values])


def read_metadata(path: Path) -> Metadata:
    """The metadata of the output."""
    with zipfile.ZipFile(path) as archive, archive.open("metadata.npy") as member:
        metadata: Metadata = json.loads(npy_format.read_array(member, allow_pickle=False).item())
    return metadata


class NpzStore:
    """Streams the vectors into the archive's first member; all else follows at commit.

    An archive takes one member at a time, so frame-level logits wait in a file without a name, which needs no removal.
    """

    def __init__(self, pending: PendingFile, layout: Layout) -> None:
        self._pending = pending
        self._layout = layout
        self._ledger = Ledger(layout)
        self._told: list[list[Any]] = [[] for _ in layout.columns or ()]
        self._file = pending.create()
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._embeddings = self._member("embeddings")
        write_header(self._embeddings, layout.numpy_dtype, (layout.rows, *layout.vector))
        self._logits = pending.scratch() if layout.logits_by_frame else io.BytesIO()

    def write(self, embedding: Embedding) -> None:
        rows = self._layout.rows_of(embedding)
        self._embeddings.write(rows.data)
        if self._layout.logits_by_frame:
            self._logits.write(self._layout.logits_of(embedding).data)
        for values, field in zip(self._told, self._layout.fields_of(embedding), strict=True):
            values.append(field)
        self._ledger.add(embedding, len(rows))

    def commit(self) -> None:
        ledger, layout = self._ledger, self._layout
        ledger.check_complete()
        self._embeddings.close()
        self._add_text("paths", [file_text(path) for path in ledger.paths])
        self._add("durations", np.asarray(ledger.durations))
        if layout.columns is not None:
            self._add_segments()
        if layout.level == "frame":
            self._add("frame_offsets", np.asarray(ledger.offsets))
        if layout.logits_by_frame:
            self._add_frame_logits()
        elif layout.labels:
            self._add("logits", np.asarray(ledger.logits).reshape(layout.count, len(layout.labels)))
        if layout.labels:
            self._add_text("logit_names", layout.labels)
        self._add("metadata", np.array(ledger.metadata_text()))
        self._zip.close()
        self._file.close()
        self._pending.commit()

    def _add_segments(self) -> None:
        ledger, columns = self._ledger, self._layout.columns or ()
        self._add("starts", np.asarray(ledger.starts))
        self._add("ends", ledger.ends)
        if self._layout.level == "frame":
            self._add("frame_starts", np.asarray(ledger.firsts))
        for name, column, values in zip(column_names(columns), columns, self._told, strict=True):
            if column.kind == "str":
                self._add_text(name, values)
            else:
                self._add(name, typed_array(column, values))

    def discard(self) -> None:
        self._pending.discard(self._logits, self._embeddings, self._zip, self._file)

    def _member(self, name: str) -> IO[bytes]:
        # A ZipInfo without a date, so that equal results are equal bytes; ZIP64 because sizes are not announced.
        return self._zip.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)

    def _add(self, name: str, array: npt.NDArray[np.generic]) -> None:
        with self._member(name) as member:
            npy_format.write_array(member, array, allow_pickle=False)

    def _add_frame_logits(self) -> None:
        self._logits.seek(0)
        with self._member("logits") as member:
            write_header(member, "<f4", (self._layout.rows, len(self._layout.labels)))
            shutil.copyfileobj(self._logits, member)
        self._logits.close()

    def _add_text(self, name: str, strings: Sequence[str]) -> None:
        dtype = f"<U{max(1, *map(len, strings)) if strings else 1}"
        with self._member(name) as member:
            write_header(member, dtype, (len(strings),))
            for block in _blocks(strings):
                member.write(np.array(block, dtype=dtype).tobytes())


def _blocks(strings: Sequence[str]) -> Iterable[Sequence[str]]:
    return (strings[start : start + TEXT_BLOCK] for start in range(0, len(strings), TEXT_BLOCK))


def _texts(path: Path, name: str) -> Iterator[str]:
    """The strings of a member that :meth:`NpzStore._add_text` wrote, block by block."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        npy_format.read_magic(member)
        (count,), _, dtype = npy_format.read_array_header_1_0(member)
        for start in range(0, count, TEXT_BLOCK):
            taken = min(TEXT_BLOCK, count - start)
            yield from np.frombuffer(member.read(taken * dtype.itemsize), dtype).tolist()


def _vectors(member: IO[bytes]) -> Iterator[Values]:
    (rows, *vector), dtype = read_header(member)
    at_once = block_rows(tuple(vector))
    for start in range(0, rows, at_once):
        taken = min(at_once, rows - start)
        data = member.read(dtype.itemsize * taken * int(np.prod(vector)))
        yield np.frombuffer(data, dtype).astype(np.float32, copy=False).reshape(taken, *vector)
    if member.read(1):
        raise ValueError("it holds more than its header says")
