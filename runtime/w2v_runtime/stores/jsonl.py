"""``.jsonl`` and standard output: one JSON object per input, each on a line of its own.

``file``, ``start``, ``end``, ``duration`` (seconds), ``logits`` by label, ``warnings`` if any, and ``embedding``: D
numbers, or a list of them for each layer. At frame level ``embeddings`` holds one such entry per frame, and frame t
runs from t·``step`` to t·``step`` + ``width`` seconds. For a frame-level head, ``logits`` holds a list of K numbers per
frame, and ``logit_names`` their labels. Of segments, ``start`` and ``end`` are those in the recording, where frames
begin at ``first``; the other columns of their table are fields. Reads with ``pandas.read_json(path, lines=True)``. The
lines are ASCII; a path that is not UTF-8 is escaped, see :func:`w2v_runtime.stores.names.file_text`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from w2v_runtime.embedding.results import Segment
from w2v_runtime.stores.base import JSON, Layout, Ledger, Metadata, columns_of
from w2v_runtime.stores.names import file_text, path_of, plain
from w2v_runtime.stores.reading import BLOCK_BYTES, Record, Recorder, Shape, Values, paired
from w2v_runtime.stores.text import TextOutput, joined, shortest
from w2v_runtime.stores.text import read_metadata as read_metadata
from w2v_runtime.stores.tree import told_apart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    from w2v_runtime.embedding.results import Embedding
    from w2v_runtime.stores.pending import PendingFile
    from w2v_runtime.tables.rows import Column

#: Where a line's vectors and its frame-level logits begin; inside a string the quotes would be escaped.
_VECTORS: Final = re.compile(rb', "embeddings?": (?=\[)')
_LOGITS: Final = re.compile(rb', "logits": (?=\[)')
_NUMBERS: Final = re.compile(rb', "(?:embeddings?|logits)": (?=\[)')
#: Where such a nested list ends; after a bracket inside it there is another bracket or another list.
_END: Final = re.compile(rb'\](?=, "|\}\n)')
#: The fields of a line that are not those of a table of segments.
_RESERVED: Final = (
    *("file", "start", "end", "duration", "step", "width", "frames", "first", "logits", "logit_names", "warnings"),
    *("embedding", "embeddings", "npy", "logits_npy"),
)
#: Bytes at the end of a block in which a match of these patterns may begin that goes on in the next block.
_OVERLAP: Final = 32


class JsonlStore:
    """Writes each line as its input comes."""

    def __init__(self, pending: PendingFile, layout: Layout) -> None:
        self._layout = layout
        self._ledger = Ledger(layout)
        self._output = TextOutput(pending)

    def write(self, embedding: Embedding) -> None:
        rows = _write_line(self._output.file, self._layout, embedding)
        self._ledger.add(embedding, rows)

    def commit(self) -> None:
        self._output.commit(self._ledger)

    def discard(self) -> None:
        self._output.discard()


def write_lines(file: IO[str], layout: Layout, embeddings: Iterable[Embedding]) -> None:
    """Write embeddings to a text stream, and flush each line as soon as its input is embedded.

    ``layout.count`` and ``layout.frames`` are not used.

    Raises:
        OSError: the stream's other end is closed, or its disk is full.
        ValueError: an embedding does not have this layout.
    """
    for embedding in embeddings:
        _write_line(file, layout, embedding)
        file.flush()


def read(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The values of each input."""
    return _read(path, _VECTORS, shapes)


def read_logits(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The frame-level logits (T, K) of each input."""
    return _read(path, _LOGITS, shapes)


def _read(path: Path, beginning: re.Pattern[bytes], shapes: Iterable[Shape]) -> Iterator[Values]:
    with path.open("rb") as file:
        for first, shape in paired(_first_blocks(file), shapes):
            yield _read_array(_list_text(file, first, beginning), shape)


def read_records(path: Path) -> Iterator[Record]:
    """The record of each input, from the fields of its line before the vectors."""
    metadata = read_metadata(path)
    with path.open("rb") as file:
        yield from records_of(metadata, _descriptions(file))


def records_of(metadata: Metadata, lines: Iterable[dict[str, Any]]) -> Iterator[Record]:
    """The records of inputs, each of which :func:`described` described."""
    recorder, names = Recorder(metadata, {}), field_names(columns_of(metadata))
    for line in lines:
        yield _record(recorder, line, names)


def _descriptions(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The fields of each line before its vectors."""
    for first in _first_blocks(file):
        block = first
        while (found := _NUMBERS.search(block)) is None:
            block += _next_block(file, block)
        line = json.loads(block[: found.start()] + b"}")
        _skip(file, block)
        yield line


def _record(recorder: Recorder, line: dict[str, Any], names: list[str]) -> Record:
    segment = None
    if recorder.segmented:
        fields = tuple(line[name] for name in names)
        segment = Segment(line["start"], line["end"], None, fields, line.get("first", line["start"]))
    logits = line.get("logits", {}).values()
    record = recorder.record(path_of(line["file"]), line["duration"], line.get("frames", 1), logits, segment)
    return dataclasses.replace(record, warnings=tuple(line.get("warnings", ())))


def field_names(columns: Iterable[Column]) -> list[str]:
    """The names that the fields of a segment have in a line."""
    return told_apart((plain(column.name) for column in columns), _RESERVED)


def described(layout: Layout, embedding: Embedding) -> dict[str, JSON]:
    """The JSON fields of one input, without its vectors and its frame-level logits."""
    record: dict[str, JSON] = {"file": file_text(embedding.path), "start": embedding.start, "end": embedding.end}
    record["duration"] = embedding.duration
    record |= dict(zip(field_names(layout.columns or ()), layout.fields_of(embedding), strict=True))
    if layout.level == "frame":
        record |= {"step": layout.times.step, "width": layout.times.width, "frames": len(embedding.values)}
        if embedding.segment is not None:
            record["first"] = embedding.segment.first
    if embedding.logits is not None and not layout.logits_by_frame:
        # Through the decimal, so that a float32 does not come out with the 17 digits of a float64.
        numbers = [float(text) for text in shortest(embedding.logits)]
        record["logits"] = dict(zip(layout.labels, numbers, strict=True))
    if embedding.warnings:
        record["warnings"] = list(embedding.warnings)
    return record


def _write_line(file: IO[str], layout: Layout, embedding: Embedding) -> int:
    rows = layout.rows_of(embedding)
    name, values = ("embeddings", rows) if layout.level == "frame" else ("embedding", rows[0])
    record = described(layout, embedding)
    if layout.logits_by_frame:
        record["logit_names"] = list(layout.labels)
    file.write(json.dumps(record).removesuffix("}"))
    if layout.logits_by_frame:
        file.write(', "logits": ')
        _write_array(file, layout.logits_of(embedding))
    file.write(f', "{name}": ')
    _write_array(file, values)
    file.write("}\n")
    return len(rows)


def _write_array(file: IO[str], values: npt.NDArray[np.float32]) -> None:
    """Write an array as nested lists, piece by piece: the text of hours of frames is many times their size."""
    if values.ndim == 1:
        file.write("[" + joined(values, ", ") + "]")
        return
    for position, part in enumerate(values):
        file.write(", " if position else "[")
        _write_array(file, part)
    file.write("]" if len(values) else "[]")


def _first_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """The first block of each line; the caller reads the rest of the line from ``file`` before it asks for the next."""
    while block := file.readline(BLOCK_BYTES):
        yield block


def _list_text(file: IO[bytes], first: bytes, beginning: re.Pattern[bytes]) -> Iterator[bytes]:
    """Yield the text of one nested list of a line, block by block, without its last bracket; then skip to the line end.

    ``first`` is the line's first block, and ``beginning`` matches what stands in front of the list.

    Raises:
        ValueError: the line has no such list, or no end.
    """
    block = first
    while (found := beginning.search(block)) is None:
        block = block[-_OVERLAP:] + _next_block(file, block)
    block = block[found.end() :]
    while (found := _END.search(block)) is None:
        yield block[:-_OVERLAP]
        block = block[-_OVERLAP:] + _next_block(file, block)
    yield block[: found.start()]
    _skip(file, block)


def _skip(file: IO[bytes], block: bytes) -> None:
    """Go on to the end of the line whose last block was ``block``."""
    while not block.endswith(b"\n"):
        block = _next_block(file, block)


def _next_block(file: IO[bytes], block: bytes) -> bytes:
    """The block that follows ``block`` in the same line; ValueError if the line or the file ends there."""
    more = b"" if block.endswith(b"\n") else file.readline(BLOCK_BYTES)
    if not more:
        raise ValueError("a line is cut short")
    return more


def _read_array(text: Iterable[bytes], shape: Shape) -> Values:
    """Read an array from nested lists, block by block: their whole text is many times the array's size."""
    values = np.empty(shape, np.float32)
    flat, filled, lists, rest = values.reshape(-1), 0, 0, b""
    for block in text:
        lists += block.count(b"[")
        *numbers, rest = (rest + block.translate(None, b"[ ]")).split(b",")
        flat[filled : filled + len(numbers)] = np.array(numbers, np.float32)
        filled += len(numbers)
    if rest:
        flat[filled : filled + 1] = np.array([rest], np.float32)
        filled += 1
    if filled != flat.size or lists != sum(math.prod(shape[:axis]) for axis in range(len(shape))):
        raise ValueError(f"a line does not hold {shape} numbers")
    return values
